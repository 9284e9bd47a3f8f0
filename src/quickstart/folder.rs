//! The folder of a quickstart: who may use it, what lies where in it, and whether it stays.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rand::TryRngCore;

use super::show::{self, Show};
use crate::sample::{self, SampleSet};
use base::durable;
use base::fault::{Fault, IoContext};

/// The file that says that a quickstart made this folder; locked while one runs in it.
const MARK: &str = "quickstart.lock";
/// What the sample is made from: the same bytes in every quickstart.
const SEED: u64 = 7;

/// One quickstart's folder, while it runs there.
pub(super) struct Folder {
    path: PathBuf,
    temporary: bool,
    _lock: File,
}

impl Folder {
    /// Takes the folder, which is made if it is missing. One that holds anything else is refused:
    /// files in it would be overwritten.
    pub(super) fn open(dir: Option<PathBuf>) -> Result<Self, Fault> {
        let temporary = dir.is_none();
        let path = match dir {
            None => new_temporary()?,
            Some(dir) => {
                let path = std::path::absolute(&dir).at(dir.display())?;
                durable::create_dir_all(&path)?;
                path
            }
        };
        // Configurations are text.
        if path.to_str().is_none() {
            return Err(Fault::usage(format!(
                "the path of the folder {} is not UTF-8",
                path.display()
            ))
            .with_next("choose another --dir"));
        }
        let mark = path.join(MARK);
        let mut others = std::fs::read_dir(&path).at(path.display())?;
        if !mark.exists() && others.next().is_some() {
            return Err(Fault::conflict(format!(
                "{} is not empty, and no quickstart made it",
                path.display()
            ))
            .with_next("choose an empty folder, or one that is not there yet"));
        }
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&mark)
            .at(mark.display())?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(
            |_| {
                Fault::conflict(format!("another quickstart runs in {}", path.display()))
                    .with_next("stop it, or choose another --dir")
            },
        )?;
        Ok(Self {
            path,
            temporary,
            _lock: lock,
        })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it was made for this run alone.
    pub(super) fn is_temporary(&self) -> bool {
        self.temporary
    }

    /// Makes (again) what is published as this version.
    pub(super) async fn sample(&self, version: u32) -> Result<SampleSet, Fault> {
        let dir = self.path.join("source").join(format!("v{version}"));
        base::blocking::blocking(move || sample::make(&dir, SEED, version)).await
    }

    /// Makes (again) what site east has of its own.
    pub(super) async fn own_sample(&self) -> Result<SampleSet, Fault> {
        let dir = self.path.join("source").join("east");
        base::blocking::blocking(move || sample::make(&dir, SEED + 1, 1)).await
    }

    /// Ends the use: a temporary folder is removed when nobody needs it any more.
    pub(super) fn leave(self, done_with: bool, show: &Show) -> Result<(), Fault> {
        if self.temporary && done_with {
            return std::fs::remove_dir_all(&self.path)
                .at(format_args!("remove {}", self.path.display()));
        }
        if self.temporary {
            show.say("Everything is still there. To go on with it:");
            show.say(&format!(
                "   {} quickstart --dir {}",
                show::program(),
                show::quoted(&self.path)
            ));
        }
        Ok(())
    }
}

fn new_temporary() -> Result<PathBuf, Fault> {
    let mut bits = [0; 4];
    rand::rngs::OsRng
        .try_fill_bytes(&mut bits)
        .map_err(|e| Fault::internal(format!("no random bits from the system: {e}")))?;
    let path =
        std::path::absolute(std::env::temp_dir()).at("find the folder for temporary files")?;
    let path = path.join(format!("packhorse-quickstart-{}", hex::encode(bits)));
    DirBuilder::new()
        .mode(0o700)
        .create(&path)
        .at(format_args!("make the folder {}", path.display()))?;
    Ok(path)
}

//! The folder of a quickstart: its lock, its contents, and its removal.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rand::TryRngCore;

use super::show::{self, Show};
use crate::sample::{self, SampleSet};
use base::durable;
use base::fault::{Fault, IoContext};

/// The file that marks a folder as created by a quickstart. It is locked while a quickstart runs in
/// the folder.
const MARK: &str = "quickstart.lock";
/// The seed of the sample data: each quickstart has the same bytes.
const SEED: u64 = 7;

/// The folder of a running quickstart.
pub(super) struct Folder {
    path: PathBuf,
    temporary: bool,
    _lock: File,
}

impl Folder {
    /// Opens and locks the folder, and creates it if it is missing. A folder that no quickstart
    /// created and that is not empty is refused, because its files could be overwritten.
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
        // The path is written into configuration files, which are text.
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
                "{} is not empty and was not created by a quickstart",
                path.display()
            ))
            .with_next("choose an empty folder, or a path that does not exist yet"));
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

    /// Its path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether this run created it as a temporary folder.
    pub(super) fn is_temporary(&self) -> bool {
        self.temporary
    }

    /// Creates the source files of this version; a repeated call creates the same files.
    pub(super) async fn sample(&self, version: u32) -> Result<SampleSet, Fault> {
        let dir = self.path.join("source").join(format!("v{version}"));
        base::blocking::blocking(move || sample::make(&dir, SEED, version)).await
    }

    /// Creates the source files of the site east; a repeated call creates the same files.
    pub(super) async fn own_sample(&self) -> Result<SampleSet, Fault> {
        let dir = self.path.join("source").join("east");
        base::blocking::blocking(move || sample::make(&dir, SEED + 1, 1)).await
    }

    /// Ends the use of the folder. A temporary folder is removed if `done_with` is set.
    pub(super) fn leave(self, done_with: bool, show: &Show) -> Result<(), Fault> {
        if self.temporary && done_with {
            return std::fs::remove_dir_all(&self.path)
                .at(format_args!("remove {}", self.path.display()));
        }
        if self.temporary {
            show.say("The files were not removed. To continue with them:");
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
        .at(format_args!("create the folder {}", path.display()))?;
    Ok(path)
}

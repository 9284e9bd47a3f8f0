//! Fetched blobs of a failed publish, kept for the next attempt.
//!
//! They are in `pulled/<key>/` beside the scratch folders, one folder for each repository. A
//! successful publish removes its folder, and so does one that failed because of missing room.
//! Others are removed after a day, or at the start of the daemon.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use base::durable;
use base::fault::{Code, Fault, IoContext};
use base::limits::{PULLED_KEPT_MAX, PULLED_REPOSITORIES_MAX};
use registry::Reference;
use registry::image::Sha256;

/// In a scratch folder: names the folder of its kept blobs.
const MARK: &str = "kept";
const LOCK: &str = "lock";

/// A folder of kept blobs, held by one publish at a time.
pub(super) struct PulledBlobs {
    pub(super) path: PathBuf,
    _lock: File,
}

impl PulledBlobs {
    /// Removes the kept blobs. The folder and its lock stay.
    pub(super) fn empty(&self) -> Result<(), Fault> {
        for entry in
            std::fs::read_dir(&self.path).at(format_args!("list {}", self.path.display()))?
        {
            let path = entry
                .at(format_args!("list {}", self.path.display()))?
                .path();
            if path.file_name().is_some_and(|name| name != LOCK) {
                durable::remove_all(&path)?;
            }
        }
        Ok(())
    }
}

/// The folder for a reference; `None` while another publish uses it.
pub(super) fn open(scratch: &Path, reference: &Reference) -> Result<Option<PulledBlobs>, Fault> {
    let Some(all) = scratch.parent().map(|parent| parent.join("pulled")) else {
        return Ok(None);
    };
    let key =
        Sha256::of(format!("{}/{}", reference.origin.base(), reference.repository).as_bytes())
            .hex();
    let path = all.join(&key[..32]);
    prune(&all, &path);
    durable::create_dir_all(&path)?;
    let Some(lock) = lock(&path)? else {
        return Ok(None);
    };
    durable::replace_symlink(&scratch.join(MARK), &path.to_string_lossy())?;
    Ok(Some(PulledBlobs { path, _lock: lock }))
}

/// Handles the kept blobs of a scratch folder whose publish has ended.
pub(super) fn end<T>(scratch: &Path, result: &Result<T, Fault>) {
    let Ok(path) = std::fs::read_link(scratch.join(MARK)) else {
        return;
    };
    let of_use = result
        .as_ref()
        .is_err_and(|fault| fault.code != Code::NoSpace);
    // The holder of the lock pulls from the same repository now, and needs them.
    if !of_use && let Ok(Some(_lock)) = lock(&path) {
        let _ = durable::remove_all(&path);
    }
}

fn lock(folder: &Path) -> Result<Option<File>, Fault> {
    let path = folder.join(LOCK);
    let file = File::create(&path).at(format_args!("create {}", path.display()))?;
    Ok(flock(&file, FlockOperation::NonBlockingLockExclusive)
        .is_ok()
        .then_some(file))
}

/// Removes old folders, and the oldest if there are too many.
fn prune(all: &Path, but: &Path) {
    let mut folders: Vec<(Duration, PathBuf)> = std::fs::read_dir(all)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.path() != but)
        .filter_map(|entry| {
            Some((
                entry
                    .metadata()
                    .ok()?
                    .modified()
                    .ok()?
                    .elapsed()
                    .unwrap_or_default(),
                entry.path(),
            ))
        })
        .collect();
    folders.sort();
    for (at, (age, folder)) in folders.iter().enumerate() {
        if (*age > PULLED_KEPT_MAX || at + 1 >= PULLED_REPOSITORIES_MAX)
            && let Ok(Some(_lock)) = lock(folder)
        {
            let _ = durable::remove_all(folder);
        }
    }
}

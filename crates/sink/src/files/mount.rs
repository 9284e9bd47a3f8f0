//! The differences of a filesystem from those of Linux, determined by trying.

use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::Folding;
use base::durable;
use base::fault::{Fault, IoContext};

/// The number of bytes that are written and read back, to check that a filesystem stores data.
const TRIAL_BYTES: usize = 64 << 10;

/// The differences of a filesystem from those of Linux.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mount {
    /// It rejects names that Windows rejects (SMB, FAT).
    pub windows_names: bool,
    /// It rejects a backslash (SMB of a Linux client, which maps the other characters).
    pub no_backslash: bool,
    /// Readers see names that Windows reserves (`CON`, `aux.txt`) under other names (SMB).
    pub renames_reserved: bool,
    /// It treats different names as equal.
    pub folding: Folding,
    /// It has no symbolic links (FAT, SMB without mfsymlinks).
    pub no_links: bool,
    /// Permission bits cannot be changed (SMB, FAT, some FUSE); files keep those that the mount
    /// assigns.
    pub fixed_modes: bool,
    /// Modification times cannot be set (some FUSE); files keep the time at which they were written.
    pub fixed_times: bool,
    /// Two names cannot share one file, neither by a hard link nor by a reflink (FAT, some SMB and
    /// FUSE): each version has its own copy of every file.
    pub no_sharing: bool,
}

impl Mount {
    /// Tests all properties in a new directory, and removes it.
    pub(super) fn probe(folder: &Path) -> Result<Self, Fault> {
        let create = |path: &Path| {
            std::fs::create_dir(path).at(format_args!("create the directory {}", path.display()))
        };
        let can_create = |name: &str| create(&folder.join(name)).is_ok();
        let exists = |name: &str| std::fs::symlink_metadata(folder.join(name)).is_ok();
        create(folder)?;
        let mount = Self {
            windows_names: !can_create("a:b"),
            no_backslash: !can_create("a\\b"),
            renames_reserved: can_create("aux") && !lists(folder, "aux"),
            folding: Folding {
                case: can_create("Case") && exists("cASE"),
                unicode: can_create("\u{e9}") && exists("e\u{301}"),
            },
            no_links: std::os::unix::fs::symlink("Case", folder.join("link")).is_err(),
            fixed_modes: !takes_modes(&folder.join("mode"))?,
            fixed_times: !takes_times(&folder.join("mode"))?,
            no_sharing: !can_share(&folder.join("mode"), folder),
        };
        // A rejection only counts if the filesystem still works, so check that it is not full or
        // unavailable.
        create(&folder.join("last"))?;
        durable::remove_all(folder)?;
        Ok(mount)
    }
}

/// Whether a list of the directory has this name.
fn lists(folder: &Path, name: &str) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name())
        .any(|found| found == name)
}

fn takes_modes(path: &Path) -> Result<bool, Fault> {
    let what = || format!("create {}", path.display());
    let file = std::fs::File::options()
        .write(true)
        .create_new(true)
        .mode(0o640)
        .open(path)
        .at(what())?;
    durable::close(file).at(what())?;
    let set = std::fs::set_permissions(path, PermissionsExt::from_mode(0o604));
    Ok(set.is_ok() && std::fs::metadata(path).at(what())?.permissions().mode() & 0o777 == 0o604)
}

fn takes_times(path: &Path) -> Result<bool, Fault> {
    const EARLIER: Duration = Duration::from_secs(1_000_000_000);
    let what = || format!("create {}", path.display());
    let file = std::fs::File::options().write(true).open(path).at(what())?;
    let set = file.set_modified(SystemTime::UNIX_EPOCH + EARLIER);
    durable::close(file).at(what())?;
    // Some filesystems report success and change nothing.
    let stored = std::fs::metadata(path).at(what())?.modified().at(what())?;
    Ok(set.is_ok() && stored == SystemTime::UNIX_EPOCH + EARLIER)
}

/// Whether a file can get a second name, or share its blocks with another file. A filesystem may
/// report success without either, or reject a link with any error.
fn can_share(file: &Path, folder: &Path) -> bool {
    let link = folder.join("hard-link");
    if std::fs::hard_link(file, &link).is_ok() && link.exists() {
        return true;
    }
    let clone = || -> std::io::Result<()> {
        let into = std::fs::File::create(folder.join("reflink"))?;
        Ok(rustix::fs::ioctl_ficlone(into, std::fs::File::open(file)?)?)
    };
    clone().is_ok()
}

/// Writes, syncs and closes a file and reads it back, to check that data can be stored.
pub(crate) fn trial(path: &Path) -> Result<(), Fault> {
    let bytes: Vec<u8> = (0..TRIAL_BYTES)
        .map(|i| i as u8 ^ (i >> 8) as u8 | 1)
        .collect();
    // Under its own name: where nothing can be removed or renamed, a temporary name would stay.
    let file = std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .at(format_args!("create {}", path.display()))?;
    (&file)
        .write_all(&bytes)
        .and_then(|()| durable::sync_and_close(file))
        .at(format_args!("write {}", path.display()))?;
    let mut read = Vec::new();
    let file = std::fs::File::open(path).at(format_args!("read {}", path.display()))?;
    file.take(TRIAL_BYTES as u64 + 1)
        .read_to_end(&mut read)
        .at(format_args!("read {}", path.display()))?;
    durable::remove_all(path)?;
    if read == bytes {
        return Ok(());
    }
    Err(Fault::unreachable(format!(
        "{} returns other bytes than were written to it",
        path.display()
    ))
    .with_next("check that disk or NAS, which loses written data; this is retried automatically"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linux_filesystem_has_no_differences() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            Mount::probe(&dir.path().join("probe")).unwrap(),
            Mount::default()
        );
        trial(&dir.path().join("trial")).unwrap();
        let file = dir.path().join("file");
        durable::replace(&file, b"x").unwrap();
        assert!(can_share(&file, dir.path()));
        assert!(!can_share(&dir.path().join("missing"), dir.path()));
        for name in ["file", "hard-link", "reflink"] {
            let _ = std::fs::remove_file(dir.path().join(name));
        }
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            0,
            "the probe removes its files"
        );
        assert!(
            Mount::probe(&dir.path().join("gone/probe")).is_err(),
            "an unavailable filesystem is an error"
        );
        assert!(trial(&dir.path().join("gone/trial")).is_err());
    }
}

//! What a filesystem does otherwise than Linux's own, found out by trying it.

use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use crate::Folding;
use base::durable;
use base::fault::{Fault, IoContext};

/// Bytes that are written and read back to find out whether a filesystem stores anything.
const TRIAL_BYTES: usize = 64 << 10;

/// What a filesystem does otherwise than Linux's own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mount {
    /// It refuses names that Windows refuses (SMB, FAT).
    pub windows_names: bool,
    /// It takes different names for one.
    pub folding: Folding,
    /// It has no symbolic links (FAT, SMB without mfsymlinks).
    pub no_links: bool,
    /// Permission bits cannot be changed (SMB, FAT, some FUSE): files keep those that the mount
    /// gives them.
    pub fixed_modes: bool,
}

impl Mount {
    /// Tries all of it in a new folder, which is removed again.
    pub(super) fn probe(folder: &Path) -> Result<Self, Fault> {
        let make = |path: &Path| {
            std::fs::create_dir(path).at(format_args!("make the folder {}", path.display()))
        };
        let makes = |name: &str| make(&folder.join(name)).is_ok();
        let finds = |name: &str| std::fs::symlink_metadata(folder.join(name)).is_ok();
        make(folder)?;
        let mount = Self {
            windows_names: !makes("a:b"),
            folding: Folding {
                case: makes("Case") && finds("cASE"),
                unicode: makes("\u{e9}") && finds("e\u{301}"),
            },
            no_links: std::os::unix::fs::symlink("Case", folder.join("link")).is_err(),
            fixed_modes: !takes_modes(&folder.join("mode"))?,
        };
        // What it refused tells of it only if it still works: it has not filled up or gone away in
        // between.
        make(&folder.join("last"))?;
        durable::remove_all(folder)?;
        Ok(mount)
    }
}

fn takes_modes(path: &Path) -> Result<bool, Fault> {
    let what = || format!("make {}", path.display());
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

/// Writes a file, syncs and closes it, and reads it back: whether anything that is sent here can be
/// stored.
pub(crate) fn trial(path: &Path) -> Result<(), Fault> {
    let bytes: Vec<u8> = (0..TRIAL_BYTES)
        .map(|at| at as u8 ^ (at >> 8) as u8 | 1)
        .collect();
    durable::replace(path, &bytes)?;
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
        "{} holds other bytes than were written to it",
        path.display()
    ))
    .with_next(
        "check that disk or NAS: it loses what is written to it; this is tried again by itself",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filesystem_of_linux_is_found_to_be_one() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            Mount::probe(&dir.path().join("probe")).unwrap(),
            Mount::default()
        );
        trial(&dir.path().join("trial")).unwrap();
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            0,
            "nothing is left of it"
        );
        assert!(
            Mount::probe(&dir.path().join("gone/probe")).is_err(),
            "one that is away is not one that can do nothing"
        );
        assert!(trial(&dir.path().join("gone/trial")).is_err());
    }
}

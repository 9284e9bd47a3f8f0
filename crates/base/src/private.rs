//! Restricts the state directory to its owner: directories 0700, files 0600.
//!
//! A daemon calls [`tighten`] when it starts, and again after it has opened its state, so that this
//! also covers a directory created by an earlier version. The process's umask does not change: it
//! applies to artifacts written elsewhere.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

const FOLDER_MODE: u32 = 0o700;
pub const FILE_MODE: u32 = 0o600;
/// Subdirectories of the state in which every file belongs to the daemon itself. The other
/// subdirectories contain artifacts, which keep their modes; other users cannot reach them through
/// the state directory.
const OWN_DIRS: [&str; 4] = ["identity", "store", "relay", "scratch"];

/// Removes all permissions of other users from the state in this directory. Logs what cannot be
/// changed; the daemon continues.
pub fn tighten(data_dir: &Path) {
    if let Err(error) = set(data_dir, FOLDER_MODE) {
        tracing::warn!(path = %data_dir.display(), %error, "other users can read the daemon's state: its directory cannot be changed to mode 0700");
    }
    files_in(data_dir);
    for name in OWN_DIRS {
        tree(&data_dir.join(name));
    }
}

fn tree(folder: &Path) {
    // A link is not followed: its target is not part of the state.
    if !fs::symlink_metadata(folder).is_ok_and(|meta| meta.is_dir())
        || set(folder, FOLDER_MODE).is_err()
    {
        return;
    }
    for subdir in files_in(folder) {
        tree(&subdir);
    }
}

/// Restricts the files of a directory. Returns its subdirectories.
fn files_in(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut folders = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => folders.push(entry.path()),
            // A file that disappears meanwhile needs no change.
            Ok(kind) if kind.is_file() => drop(set(&entry.path(), FILE_MODE)),
            _ => {}
        }
    }
    folders
}

/// Removes all permissions of group and others, and gives the owner at least `mode`.
fn set(path: &Path, mode: u32) -> io::Result<()> {
    let meta = fs::symlink_metadata(path)?;
    if meta.mode() & 0o077 == 0 {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(meta.mode() & 0o700 | mode))
}

/// The umask of the process: the permissions that its new files do not get.
pub fn umask() -> u32 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    // Unknown: assume that any bit may be masked.
    line.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok())
        .unwrap_or(0o777)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::durable;

    #[test]
    fn a_state_directory_is_restricted_to_its_owner_and_artifacts_keep_their_modes() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let files = [
            "catalogue.db",
            "identity/ca.pem",
            "store/packs/00000001.pack",
            "store/index.redb",
        ];
        let artifacts = [
            "artifacts/dataset/x/1/a",
            "runs/r/output/m",
            "published/ab/f",
        ];
        for file in files.iter().chain(&artifacts) {
            durable::create_dir_all(data.join(file).parent().unwrap()).unwrap();
            durable::replace(&data.join(file), b"x").unwrap();
            fs::set_permissions(data.join(file), Permissions::from_mode(0o644)).unwrap();
        }
        fs::set_permissions(&data, Permissions::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink(dir.path(), data.join("scratch")).unwrap();
        let before = fs::metadata(dir.path()).unwrap().mode();
        tighten(&data);
        let mode = |path: &str| fs::metadata(data.join(path)).unwrap().mode() & 0o777;
        assert_eq!(
            (mode(""), mode("identity"), mode("store/packs")),
            (0o700, 0o700, 0o700)
        );
        assert!(files.iter().all(|file| mode(file) == 0o600));
        assert!(artifacts.iter().all(|file| mode(file) == 0o644));
        assert_eq!(
            fs::metadata(dir.path()).unwrap().mode(),
            before,
            "no link is followed"
        );
        tighten(&dir.path().join("none"));
        assert!(umask() <= 0o777);
    }
}

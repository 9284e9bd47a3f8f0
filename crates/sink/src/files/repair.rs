//! Repairs a version in place.
//!
//! Each missing or damaged entry of the artifact is replaced by rename, so a reader sees either the
//! old file or the complete new one. Files that a user added to the directory are kept. After a
//! crash the repair is repeated; entries that were replaced before are complete.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use super::copy;
use base::durable;
use base::fault::{Code, Fault, IoContext, Retry};

/// The number of bytes that are compared at once.
const COMPARE_BYTES: usize = 128 << 10;

/// Merges the staged artifact into the directory of a committed version of the same artifact. A
/// part of the staged directory may remain.
pub(super) fn merge(staged: &Path, folder: &Path) -> Result<(), Fault> {
    merge_folder(staged, folder).map_err(|fault| {
        if fault.code != Code::NotAllowed {
            return fault;
        }
        // An SMB server refuses to replace a file that is open for reading.
        fault.with_retry(Retry::Backoff).with_next(
            "close the programs that read this version, or give the daemon's user write permission there; this is retried automatically",
        )
    })
}

fn merge_folder(staged: &Path, folder: &Path) -> Result<(), Fault> {
    let mode = fs::metadata(staged)
        .at(staged.display())?
        .permissions()
        .mode()
        & 0o777;
    for path in [staged, folder] {
        // A directory of an artifact may be read-only, also for its owner.
        if mode & 0o700 != 0o700 {
            let _ = fs::set_permissions(path, PermissionsExt::from_mode(mode | 0o700));
        }
    }
    for entry in fs::read_dir(staged).at(staged.display())? {
        let entry = entry.at(staged.display())?;
        let (from, to) = (entry.path(), folder.join(entry.file_name()));
        let is_folder = entry.file_type().at(from.display())?.is_dir();
        let existing = match fs::symlink_metadata(&to) {
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            other => Some(other.at(to.display())?),
        };
        match existing {
            Some(existing) if is_folder && existing.is_dir() => {
                merge_folder(&from, &to)?;
                continue;
            }
            Some(existing) if is_folder || existing.is_dir() => rename_aside(&to)?,
            Some(existing) if is_same(&from, &to, &existing)? => continue,
            _ => {}
        }
        put_over(&from, &to)?;
    }
    let now = fs::metadata(folder)
        .at(folder.display())?
        .permissions()
        .mode()
        & 0o777;
    if now != mode {
        // If modes cannot be changed, `verify` reports the difference as a note.
        let _ = fs::set_permissions(folder, PermissionsExt::from_mode(mode));
    }
    durable::sync_dir(folder)
}

/// Replaces an entry by rename, after a copy if it is on another mount.
fn put_over(from: &Path, to: &Path) -> Result<(), Fault> {
    if durable::rename_over(from, to)? {
        return Ok(());
    }
    let near = to.with_file_name(format!(".packhorse-{:016x}.tmp", rand::random::<u64>()));
    let placed = copy::tree(from, &near).and_then(|()| durable::rename_over(&near, to));
    if placed.is_err() {
        let _ = durable::remove_all(&near);
    }
    placed.map(drop)
}

/// Renames an entry that occupies the path of a file or directory of the artifact, because it may
/// contain files of a user.
fn rename_aside(path: &Path) -> Result<(), Fault> {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let aside = path.with_file_name(format!("{name}.kept-{:08x}", rand::random::<u32>()));
    tracing::warn!(path = %path.display(), kept = %aside.display(), "an entry occupied the path of a part of the artifact and was renamed");
    durable::rename_noreplace(path, &aside)
}

/// Whether two entries have the same content.
fn is_same(from: &Path, to: &Path, existing: &fs::Metadata) -> Result<bool, Fault> {
    let new = fs::symlink_metadata(from).at(from.display())?;
    if new.is_symlink() || existing.is_symlink() {
        return Ok(new.is_symlink()
            && existing.is_symlink()
            && fs::read_link(from).ok() == fs::read_link(to).ok());
    }
    if (new.dev(), new.ino()) == (existing.dev(), existing.ino()) {
        return Ok(true);
    }
    if !existing.is_file() || new.len() != existing.len() {
        return Ok(false);
    }
    let mut staged_file = File::open(from).at(from.display())?;
    // An unreadable file counts as damaged.
    let Ok(mut committed_file) = durable::open_regular_nofollow(to) else {
        return Ok(false);
    };
    let (mut a, mut b) = (vec![0; COMPARE_BYTES], vec![0; COMPARE_BYTES]);
    let mut left = new.len();
    while left > 0 {
        let part = left.min(COMPARE_BYTES as u64) as usize;
        staged_file.read_exact(&mut a[..part]).at(from.display())?;
        if committed_file.read_exact(&mut b[..part]).is_err() || a[..part] != b[..part] {
            return Ok(false);
        }
        left -= part as u64;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_damaged_entries_are_replaced_and_user_files_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (staged, folder) = (dir.path().join("staged"), dir.path().join("v1"));
        let write = |path: &Path, text: &str| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            durable::replace(path, text.as_bytes()).unwrap();
        };
        for (name, text) in [
            ("a", "one"),
            ("sub/b", "two"),
            ("sub/deep/c", "three"),
            ("d", "four"),
        ] {
            write(&staged.join(name), text);
        }
        std::os::unix::fs::symlink("a", staged.join("link")).unwrap();
        write(&folder.join("a"), "one");
        write(&folder.join("sub/b"), "twX");
        write(&folder.join("sub/results/mine.csv"), "a user's");
        write(
            &folder.join("d/mine.txt"),
            "a user's directory at the path of a file",
        );
        std::os::unix::fs::symlink("elsewhere", folder.join("link")).unwrap();
        let intact_inode = fs::metadata(folder.join("a")).unwrap().ino();
        let mut reader = File::open(folder.join("sub/b")).unwrap();

        merge(&staged, &folder).unwrap();
        for (name, text) in [
            ("a", "one"),
            ("sub/b", "two"),
            ("sub/deep/c", "three"),
            ("d", "four"),
            ("sub/results/mine.csv", "a user's"),
        ] {
            assert_eq!(
                fs::read_to_string(folder.join(name)).unwrap(),
                text,
                "{name}"
            );
        }
        assert_eq!(fs::read_link(folder.join("link")).unwrap(), Path::new("a"));
        assert_eq!(
            fs::metadata(folder.join("a")).unwrap().ino(),
            intact_inode,
            "intact files are not touched"
        );
        let mut seen = String::new();
        reader.read_to_string(&mut seen).unwrap();
        assert_eq!(
            seen, "twX",
            "a reader of the old file can read it completely"
        );
        let kept = fs::read_dir(&folder)
            .unwrap()
            .flatten()
            .find(|e| e.file_name().to_string_lossy().starts_with("d.kept-"))
            .unwrap();
        assert!(kept.path().join("mine.txt").exists());
    }
}

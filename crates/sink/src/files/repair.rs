//! Repairs a version in place.
//!
//! Each entry of the artifact that is gone or damaged is replaced by rename, so a reader sees the
//! old file or the whole new one. What somebody else put into the folder stays where it is. After a
//! crash the repair is done again; what it had replaced is whole.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use base::durable;
use base::fault::{Code, Fault, IoContext, Retry};

/// Bytes that are compared at once.
const COMPARE_BYTES: usize = 128 << 10;

/// Puts the staged artifact into the folder where a version of the same artifact is. The staged
/// folder may be left in parts.
pub(super) fn merge(staged: &Path, folder: &Path) -> Result<(), Fault> {
    merge_folder(staged, folder).map_err(|fault| {
        if fault.code != Code::NotAllowed {
            return fault;
        }
        // An SMB server refuses to replace a file that somebody reads.
        fault.with_retry(Retry::Backoff).with_next(
            "close the programs that read this version, or give the daemon's user the right to write there; it is tried again by itself",
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
        // A folder of an artifact may be read-only, for its owner too.
        if mode & 0o700 != 0o700 {
            let _ = fs::set_permissions(path, PermissionsExt::from_mode(mode | 0o700));
        }
    }
    for entry in fs::read_dir(staged).at(staged.display())? {
        let entry = entry.at(staged.display())?;
        let (from, to) = (entry.path(), folder.join(entry.file_name()));
        let is_folder = entry.file_type().at(from.display())?.is_dir();
        let there = match fs::symlink_metadata(&to) {
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            other => Some(other.at(to.display())?),
        };
        match there {
            Some(there) if is_folder && there.is_dir() => {
                merge_folder(&from, &to)?;
                continue;
            }
            Some(there) if is_folder || there.is_dir() => put_aside(&to)?,
            Some(there) if is_same(&from, &to, &there)? => continue,
            _ => {}
        }
        durable::rename_over(&from, &to)?;
    }
    let now = fs::metadata(folder)
        .at(folder.display())?
        .permissions()
        .mode()
        & 0o777;
    if now != mode {
        // Where modes cannot be changed this is no fault: `verify` notes it.
        let _ = fs::set_permissions(folder, PermissionsExt::from_mode(mode));
    }
    durable::sync_dir(folder)
}

/// Keeps what is in the place of a file or folder of the artifact, and may hold a user's files,
/// under another name beside it.
fn put_aside(path: &Path) -> Result<(), Fault> {
    let name = path
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let aside = path.with_file_name(format!("{name}.kept-{:08x}", rand::random::<u32>()));
    tracing::warn!(path = %path.display(), kept = %aside.display(), "this was in the place of a part of the artifact");
    durable::rename_noreplace(path, &aside)
}

/// Whether two entries have the same content.
fn is_same(from: &Path, to: &Path, there: &fs::Metadata) -> Result<bool, Fault> {
    let new = fs::symlink_metadata(from).at(from.display())?;
    if new.is_symlink() || there.is_symlink() {
        return Ok(new.is_symlink()
            && there.is_symlink()
            && fs::read_link(from).ok() == fs::read_link(to).ok());
    }
    if (new.dev(), new.ino()) == (there.dev(), there.ino()) {
        return Ok(true);
    }
    if !there.is_file() || new.len() != there.len() {
        return Ok(false);
    }
    let mut mine = File::open(from).at(from.display())?;
    // What cannot be read is damaged.
    let Ok(mut theirs) = durable::open_regular_nofollow(to) else {
        return Ok(false);
    };
    let (mut a, mut b) = (vec![0; COMPARE_BYTES], vec![0; COMPARE_BYTES]);
    let mut left = new.len();
    while left > 0 {
        let part = left.min(COMPARE_BYTES as u64) as usize;
        mine.read_exact(&mut a[..part]).at(from.display())?;
        if theirs.read_exact(&mut b[..part]).is_err() || a[..part] != b[..part] {
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
    fn only_what_is_damaged_is_replaced_and_nothing_of_a_user_is_lost() {
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
            "a user's folder in the place of a file",
        );
        std::os::unix::fs::symlink("elsewhere", folder.join("link")).unwrap();
        let sound = fs::metadata(folder.join("a")).unwrap().ino();
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
            sound,
            "what is sound is not touched"
        );
        let mut seen = String::new();
        reader.read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "twX", "who reads the old file goes on with all of it");
        let kept = fs::read_dir(&folder)
            .unwrap()
            .flatten()
            .find(|e| e.file_name().to_string_lossy().starts_with("d.kept-"))
            .unwrap();
        assert!(kept.path().join("mine.txt").exists());
    }
}

//! Copies a staged tree to another mount: a directory of a kind or of a series may be a mount, a
//! subvolume or a link to another filesystem.
//!
//! The copy is durable when it is complete. After a crash it is made again from the staged tree,
//! which stays until the copy has its final name.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use base::durable;
use base::fault::{Fault, IoContext};
use base::limits::HARD_LINKED_FILES_KEPT_MAX;

use crate::stage::{copy_range, next_data};

/// The first copies of files with several names, by device and inode.
type Copied = HashMap<(u64, u64), PathBuf>;

/// Copies a file, a link or a complete directory to a new path, with permissions, modification
/// times, extended attributes of users, holes, and hard links inside the tree.
pub(super) fn tree(from: &Path, to: &Path) -> Result<(), Fault> {
    copy(from, to, &mut Copied::new())
}

fn copy(from: &Path, to: &Path, copied: &mut Copied) -> Result<(), Fault> {
    let meta = fs::symlink_metadata(from).at(from.display())?;
    if meta.is_symlink() {
        let target = fs::read_link(from).at(from.display())?;
        return std::os::unix::fs::symlink(target, to)
            .at(format_args!("create the link {}", to.display()));
    }
    if !meta.is_dir() {
        return copy_file(from, to, &meta, copied);
    }
    fs::DirBuilder::new()
        .mode(0o700)
        .create(to)
        .at(format_args!("create the directory {}", to.display()))?;
    for entry in fs::read_dir(from).at(from.display())? {
        let entry = entry.at(from.display())?;
        copy(&entry.path(), &to.join(entry.file_name()), copied)?;
    }
    attributes(from, to).at(to.display())?;
    mode(to, &meta)?;
    durable::sync_dir(to)
}

fn copy_file(from: &Path, to: &Path, meta: &Metadata, copied: &mut Copied) -> Result<(), Fault> {
    let what = || format!("copy {} to {}", from.display(), to.display());
    let has_names = meta.nlink() > 1;
    if has_names
        && let Some(first) = copied.get(&(meta.dev(), meta.ino()))
        && fs::hard_link(first, to).is_ok()
    {
        return Ok(());
    }
    let source = durable::open_regular_nofollow(from).at(from.display())?;
    let into = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)
        .at(what())?;
    let size = meta.len();
    let has_holes = meta.blocks().saturating_mul(512) < size;
    into.set_len(size).at(what())?;
    let mut at = 0;
    while let Some(data) = next_data(&source, at, size, has_holes) {
        if copy_range(&source, &into, data.clone()).is_err() {
            by_hand(&source, &into, data.start, data.end).at(what())?;
        }
        at = data.end;
    }
    attributes(from, to).at(to.display())?;
    mode(to, meta)?;
    let time = meta.modified().at(from.display())?;
    into.set_modified(time).at(what())?;
    durable::sync_and_close(into).at(what())?;
    if has_names && copied.len() < HARD_LINKED_FILES_KEPT_MAX {
        copied.insert((meta.dev(), meta.ino()), to.to_owned());
    }
    Ok(())
}

/// Copies a range that the filesystems cannot copy themselves.
fn by_hand(mut source: &File, mut into: &File, start: u64, end: u64) -> io::Result<()> {
    source.seek(SeekFrom::Start(start))?;
    into.seek(SeekFrom::Start(start))?;
    if io::copy(&mut source.take(end - start), &mut into)? == end - start {
        return Ok(());
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

/// Sets the permissions of the source. Where they cannot be changed, `verify` reports a note.
fn mode(to: &Path, meta: &Metadata) -> Result<(), Fault> {
    let _ = fs::set_permissions(to, PermissionsExt::from_mode(meta.mode() & 0o777));
    Ok(())
}

/// Copies the extended attributes of users. A filesystem without them is left as it is.
fn attributes(from: &Path, to: &Path) -> io::Result<()> {
    use rustix::fs::{XattrFlags, lgetxattr, llistxattr, lsetxattr};
    let mut names = vec![0; 64 << 10];
    let Ok(len) = llistxattr(from, &mut names) else {
        return Ok(());
    };
    let names = names.get(..len).unwrap_or_default();
    for name in names.split(|b| *b == 0).filter(|n| n.starts_with(b"user.")) {
        let mut value = vec![0; 64 << 10];
        let len = lgetxattr(from, name, &mut value)?;
        let value = value.get(..len).unwrap_or_default();
        let _ = lsetxattr(to, name, value, XattrFlags::empty());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, symlink};
    use std::time::{Duration, SystemTime};

    #[test]
    fn a_copy_has_everything_of_the_tree() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("sub/empty")).unwrap();
        durable::replace(&from.join("sub/a"), b"content").unwrap();
        fs::hard_link(from.join("sub/a"), from.join("sub/b")).unwrap();
        symlink("a", from.join("sub/link")).unwrap();
        let time = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
        let file = File::options()
            .write(true)
            .open(from.join("sub/a"))
            .unwrap();
        file.set_modified(time).unwrap();
        fs::set_permissions(from.join("sub/a"), fs::Permissions::from_mode(0o444)).unwrap();
        fs::set_permissions(from.join("sub"), fs::Permissions::from_mode(0o555)).unwrap();
        let sparse = File::create(from.join("sparse")).unwrap();
        sparse.set_len(64 << 20).unwrap();
        sparse.write_all_at(b"data", 32 << 20).unwrap();
        let set = rustix::fs::lsetxattr(
            from.join("sparse"),
            "user.k",
            b"v",
            rustix::fs::XattrFlags::empty(),
        );
        tree(&from, &to).unwrap();
        let (a, b) = (
            fs::metadata(to.join("sub/a")).unwrap(),
            fs::metadata(to.join("sub/b")).unwrap(),
        );
        assert_eq!(fs::read(to.join("sub/b")).unwrap(), b"content");
        assert_eq!(a.ino(), b.ino());
        assert_eq!((a.modified().unwrap(), a.mode() & 0o7777), (time, 0o444));
        assert_eq!(fs::metadata(to.join("sub")).unwrap().mode() & 0o7777, 0o555);
        assert!(to.join("sub/empty").is_dir());
        assert_eq!(fs::read_link(to.join("sub/link")).unwrap(), Path::new("a"));
        let copied = fs::metadata(to.join("sparse")).unwrap();
        assert_eq!(copied.len(), 64 << 20);
        assert!(
            copied.blocks() * 512 < 1 << 20,
            "{} blocks",
            copied.blocks()
        );
        let mut four = [0; 4];
        File::open(to.join("sparse"))
            .unwrap()
            .read_exact_at(&mut four, 32 << 20)
            .unwrap();
        assert_eq!(&four, b"data");
        if set.is_ok() {
            let mut value = [0; 8];
            let len = rustix::fs::lgetxattr(to.join("sparse"), "user.k", &mut value).unwrap();
            assert_eq!(&value[..len], b"v");
        }
    }
}

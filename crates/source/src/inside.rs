//! Reads a directory and nothing outside it: links are followed only while they stay inside.
//!
//! The label readers open every file through it, so that neither their result nor an error contains
//! content from elsewhere. Paths are resolved relative to the handle of the directory (`cap-std`),
//! not by their text.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cap_std::ambient_authority;
use cap_std::fs::{Dir, OpenOptions, OpenOptionsExt, ReadDir};

use crate::own::{self, Own};
use base::fault::{Fault, IoContext};

/// Opening a pipe without a writer must not block the daemon.
const NONBLOCK: i32 = rustix::fs::OFlags::NONBLOCK.bits() as i32;

/// A directory that is read.
#[derive(Debug)]
pub(super) struct Inside {
    dir: Dir,
    /// The path, for messages.
    root: PathBuf,
    own: Arc<Own>,
}

impl Inside {
    /// Opens a directory. The path itself may be a link.
    pub(super) fn open(root: &Path, own: Arc<Own>) -> Result<Self, Fault> {
        let dir = Dir::open_ambient_dir(root, ambient_authority())
            .at(format_args!("read the directory {}", root.display()))?;
        let inside = Self {
            dir,
            root: root.to_owned(),
            own,
        };
        inside
            .check_dir(&inside.dir)
            .map_err(|e| own::fault(root, &e))?;
        Ok(inside)
    }

    /// The files that are never read or written.
    pub(super) fn own(&self) -> &Own {
        &self.own
    }

    /// The path of an entry, for messages.
    pub(super) fn full(&self, rel: impl AsRef<Path>) -> PathBuf {
        let rel = rel.as_ref();
        if rel.as_os_str().is_empty() {
            self.root.clone()
        } else {
            self.root.join(rel)
        }
    }

    /// Opens a regular file.
    pub(super) fn file(&self, rel: impl AsRef<Path>) -> Result<File, Fault> {
        let rel = rel.as_ref();
        self.try_file(rel).map_err(|error| {
            let path = self.full(rel);
            let is_link = self
                .dir
                .symlink_metadata(rel)
                .is_ok_and(|meta| meta.is_symlink());
            match error.kind() {
                // The error of cap-std for a path that leaves the directory.
                io::ErrorKind::PermissionDenied if is_link && !own::is_refusal(&error) => {
                    Fault::integrity(format!(
                        "{}: it is a link that leaves the directory, or its target is unreadable",
                        path.display()
                    ))
                    .with_next("copy the file itself into the directory")
                }
                _ => own::fault(&path, &error),
            }
        })
    }

    /// Like [`Inside::file`], for callers that treat an unreadable file as missing.
    pub(super) fn try_file(&self, rel: impl AsRef<Path>) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(NONBLOCK);
        let file = self.dir.open_with(rel, &options)?.into_std();
        self.own.check_opened(&file)?;
        Ok(file)
    }

    /// Whether an entry of this name exists, including a link that is dangling or leaves the
    /// directory.
    pub(super) fn exists(&self, rel: impl AsRef<Path>) -> bool {
        self.dir.symlink_metadata(rel).is_ok()
    }

    /// Whether a regular file of this name exists, or a link to one inside the directory.
    pub(super) fn is_file(&self, rel: impl AsRef<Path>) -> bool {
        self.dir.metadata(rel).is_ok_and(|meta| meta.is_file())
    }

    /// Whether a directory of this name exists. A link to a directory does not count.
    pub(super) fn is_dir(&self, rel: impl AsRef<Path>) -> bool {
        self.dir
            .symlink_metadata(rel)
            .is_ok_and(|meta| meta.is_dir())
    }

    /// If this is a link to a directory anywhere: its target, for a message.
    pub(super) fn linked_folder(&self, rel: &Path) -> Option<PathBuf> {
        let target = self.dir.read_link_contents(rel).ok()?;
        // Only the type is checked outside the directory; nothing is read.
        std::fs::metadata(self.full(rel))
            .is_ok_and(|meta| meta.is_dir())
            .then_some(target)
    }

    /// Lists a directory.
    pub(super) fn list(&self, rel: &Path) -> Result<ReadDir, Fault> {
        let open = || -> io::Result<ReadDir> {
            if rel.as_os_str().is_empty() {
                return self.dir.entries();
            }
            let dir = self.dir.open_dir(rel)?;
            self.check_dir(&dir)?;
            dir.entries()
        };
        open().map_err(|e| match own::is_refusal(&e) {
            true => own::refusal(&self.full(rel)),
            false => Fault::io(format_args!("list {}", self.full(rel).display()), &e),
        })
    }

    fn check_dir(&self, dir: &Dir) -> io::Result<()> {
        let dir = dir.try_clone()?.into_std_file();
        self.own.check(&dir.metadata()?)?;
        self.own.check_place(&dir)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use base::durable;
    use base::fault::Code;

    #[test]
    fn links_stay_inside() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("labels");
        durable::create_dir_all(&root.join("sub")).unwrap();
        durable::replace(&dir.path().join("outside"), b"secret").unwrap();
        durable::replace(&root.join("sub/in"), b"in").unwrap();
        symlink("sub/in", root.join("fine")).unwrap();
        symlink("../outside", root.join("out")).unwrap();
        symlink(dir.path().join("outside"), root.join("absolute")).unwrap();
        symlink("..", root.join("up")).unwrap();
        symlink("nowhere", root.join("dangling")).unwrap();
        let inside = Inside::open(&root, Arc::default()).unwrap();
        assert_eq!(
            io::read_to_string(inside.file("fine").unwrap()).unwrap(),
            "in"
        );
        for (name, code) in [
            ("out", Code::Integrity),
            ("absolute", Code::Integrity),
            ("../outside", Code::NotAllowed),
            ("up/outside", Code::NotAllowed),
            ("dangling", Code::NotFound),
        ] {
            assert_eq!(inside.file(name).unwrap_err().code, code, "{name}");
            assert!(!inside.is_file(name), "{name}");
        }
        assert!(
            inside.is_dir("sub") && !inside.is_dir("up") && inside.list(Path::new("up")).is_err()
        );
        assert_eq!(inside.linked_folder(Path::new("up")), Some("..".into()));
        assert_eq!(inside.linked_folder(Path::new("out")), None);
    }
}

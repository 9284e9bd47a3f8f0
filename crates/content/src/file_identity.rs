//! The identity of a file at one time. A reader uses it to check that the content it read is the
//! content it examined.

use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base::fault::Fault;

/// The size and times of a file. It refers to the file by path, so it still checks the original
/// after the content was copied.
#[derive(Debug, Clone)]
pub struct FileIdentity {
    file: Arc<PathBuf>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    len: u64,
    modified: (i64, i64),
    /// The change time, which tools that preserve times (`cp -p`, `rsync`) cannot set. The inode
    /// number is not used, because some network filesystems invent it.
    changed: (i64, i64),
}

/// How a file compares with its identity.
#[derive(Debug)]
pub enum Comparison {
    Same,
    /// Only the change time differs. Somebody changed permissions, the owner, an attribute or the
    /// number of names, or wrote to the file and restored its time. Only the content can tell; this
    /// is the identity to read it again with.
    Suspect(FileIdentity),
    /// Written to, replaced or removed.
    Changed,
}

impl State {
    fn of(meta: &Metadata) -> Self {
        Self {
            len: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

impl FileIdentity {
    /// `meta` must have been read before any content of the file.
    pub fn new(file: Arc<PathBuf>, meta: &Metadata) -> Self {
        Self {
            file,
            state: State::of(meta),
        }
    }

    /// The path of the file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Compares the file with its identity.
    pub fn compare(&self) -> Result<Comparison, Fault> {
        match fs::symlink_metadata(&*self.file) {
            Ok(meta) => {
                let now = State::of(&meta);
                let (before, is_file) = (self.state, meta.is_file());
                Ok(if now == before {
                    Comparison::Same
                } else if is_file && (now.len, now.modified) == (before.len, before.modified) {
                    Comparison::Suspect(Self {
                        file: self.file.clone(),
                        state: now,
                    })
                } else {
                    Comparison::Changed
                })
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Comparison::Changed),
            Err(error) => Err(Fault::io(
                format_args!("read the metadata of {}", self.file.display()),
                &error,
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use super::*;
    use base::testing::wait_for_file_clock;

    #[test]
    fn a_written_replaced_or_removed_file_is_detected() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("a"), dir.path().join("b"));
        let put = |path: &Path| fs::File::create(path).unwrap().write_all(b"one").unwrap();
        put(&path);
        wait_for_file_clock();
        put(&other);
        let identity = || {
            FileIdentity::new(
                Arc::new(path.clone()),
                &fs::symlink_metadata(&path).unwrap(),
            )
        };
        let (first, time) = (identity(), fs::metadata(&path).unwrap().modified().unwrap());
        assert!(matches!(first.compare().unwrap(), Comparison::Same));
        wait_for_file_clock();
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"two", 0).unwrap();
        file.set_modified(time).unwrap();
        let Comparison::Suspect(second) = first.compare().unwrap() else {
            unreachable!("written to, and its time restored")
        };
        assert!(matches!(second.compare().unwrap(), Comparison::Same));
        fs::remove_file(&path).unwrap();
        assert!(
            matches!(second.compare().unwrap(), Comparison::Changed),
            "gone"
        );
        wait_for_file_clock();
        fs::hard_link(&other, &path).unwrap();
        assert!(
            matches!(second.compare().unwrap(), Comparison::Changed),
            "replaced"
        );
    }
}

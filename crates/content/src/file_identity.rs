//! What a file was like before it was looked at, so that whoever has read its content knows that it
//! is what was seen.

use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base::fault::Fault;

/// A file as it was at one time. It knows the file by its path: whoever copies the content first
/// still asks about the original.
#[derive(Debug, Clone)]
pub struct FileIdentity {
    file: Arc<PathBuf>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    len: u64,
    modified: (i64, i64),
    /// What tools that keep times (`cp -p`, `rsync`) cannot set. Not the inode's number: some
    /// network filesystems make that up.
    changed: (i64, i64),
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
    /// `meta` must have been had before anything was read of the file.
    pub fn new(file: Arc<PathBuf>, meta: &Metadata) -> Self {
        Self {
            file,
            state: State::of(meta),
        }
    }

    /// Where the file is.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Whether it is still what it was: not written to, not replaced, not gone.
    pub fn holds(&self) -> Result<bool, Fault> {
        match fs::symlink_metadata(&*self.file) {
            Ok(meta) => Ok(State::of(&meta) == self.state),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Fault::io(
                format_args!("look at {}", self.file.display()),
                &error,
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    use std::time::Duration;

    use super::*;

    #[test]
    fn it_breaks_when_the_file_is_written_to_replaced_or_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("a"), dir.path().join("b"));
        let put = |path: &Path| fs::File::create(path).unwrap().write_all(b"one").unwrap();
        put(&path);
        put(&other);
        let identity = || {
            FileIdentity::new(
                Arc::new(path.clone()),
                &fs::symlink_metadata(&path).unwrap(),
            )
        };
        let (first, time) = (identity(), fs::metadata(&path).unwrap().modified().unwrap());
        assert!(first.holds().unwrap());
        // Timestamps are as coarse as the kernel's tick.
        std::thread::sleep(Duration::from_millis(30));
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"two", 0).unwrap();
        file.set_modified(time).unwrap();
        assert!(!first.holds().unwrap(), "written to, and its time put back");
        let second = identity();
        fs::remove_file(&path).unwrap();
        assert!(!second.holds().unwrap(), "gone");
        std::thread::sleep(Duration::from_millis(30));
        fs::hard_link(&other, &path).unwrap();
        assert!(!second.holds().unwrap(), "replaced");
    }
}

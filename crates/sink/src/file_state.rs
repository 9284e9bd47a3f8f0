//! The state of a file at one time: whether anybody touched the file since then can be found without
//! reading it.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

/// A time of last modification must be so far in the past: a later write within the same tick of the
/// filesystem's clock would not change it. A tick of Linux has 10 ms at most…
const TICK_MS: i64 = 20;
/// …and that of a filesystem that stores whole seconds has 2 s at most.
const COARSE_TICK_MS: i64 = 2_500;

/// Size, inode and times of a file, as stat(2) reports them. No tool can set the change time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileState {
    pub len: u64,
    pub inode: u64,
    /// Seconds and nanoseconds.
    pub modified: (i64, i64),
    /// Also changed by a new link, another mode, and a rename on some filesystems.
    pub changed: (i64, i64),
}

impl FileState {
    pub fn of(meta: &Metadata) -> Self {
        Self {
            len: meta.len(),
            inode: meta.ino(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }

    pub(crate) fn of_stat(stat: &rustix::fs::Stat) -> Self {
        Self {
            len: stat.st_size as u64,
            inode: stat.st_ino,
            modified: (stat.st_mtime, stat.st_mtime_nsec as i64),
            changed: (stat.st_ctime, stat.st_ctime_nsec as i64),
        }
    }

    /// Whether the file had the same content at `other`, if both states were read from one open
    /// file: a link or another mode may have been added.
    pub fn has_content_of(&self, other: &Self) -> bool {
        let content = |state: &Self| (state.len, state.inode, state.modified);
        content(self) == content(other)
    }

    /// Whether a write after `now_ms` certainly changes the time of last modification.
    pub fn is_settled(&self, now_ms: i64) -> bool {
        let tick = match (self.modified.1, self.changed.1) {
            (0, 0) => COARSE_TICK_MS,
            _ => TICK_MS,
        };
        let modified_ms = self
            .modified
            .0
            .saturating_mul(1000)
            .saturating_add(self.modified.1 / 1_000_000);
        modified_ms.saturating_add(tick) <= now_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_just_written_is_not_settled() {
        let state = |modified, changed| FileState {
            len: 1,
            inode: 2,
            modified,
            changed,
        };
        let fine = state((100, 5_000_000), (100, 6_000_000));
        assert_eq!(
            [100_004, 100_024, 100_025].map(|now| fine.is_settled(now)),
            [false, false, true]
        );
        let coarse = state((100, 0), (100, 0));
        assert_eq!(
            [101_000, 102_499, 102_500].map(|now| coarse.is_settled(now)),
            [false, false, true]
        );
        assert!(!state((i64::MAX, 0), (0, 0)).is_settled(i64::MAX - 1));
    }

    #[test]
    fn a_link_changes_the_state_and_not_the_content() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("1"), dir.path().join("2"));
        base::durable::replace(&one, b"content").unwrap();
        let file = std::fs::File::open(&one).unwrap();
        let before = FileState::of(&file.metadata().unwrap());
        std::thread::sleep(std::time::Duration::from_millis(30));
        std::fs::hard_link(&one, &two).unwrap();
        let after = FileState::of(&file.metadata().unwrap());
        assert!(after != before && after.has_content_of(&before));
        assert_eq!(
            FileState::of_stat(&rustix::fs::stat(&two).unwrap()),
            FileState::of(&std::fs::metadata(&two).unwrap())
        );
    }
}

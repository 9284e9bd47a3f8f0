//! Free space: what a filesystem has left in bytes and in inodes, and what of it is reserved.
//!
//! Every check for free space uses [`Space::of`]. A filesystem that reports no blocks (some FUSE
//! filesystems) or no inodes (btrfs, some NFS servers) does not report that quantity: it is
//! unknown, and a check of it passes. A [`Reservation`] holds space for a writer that knows its
//! size before it begins; all other checks count that space as used.

use std::collections::HashMap;
use std::path::Path;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::fault::{Fault, IoContext};

/// The most that one reservation holds.
const BYTES_MAX: u64 = 1 << 60;

/// Reserved bytes, by device.
static RESERVED: LazyLock<Mutex<HashMap<u64, u64>>> = LazyLock::new(Mutex::default);

/// What a filesystem has left for a user that is not root. `None`: the filesystem does not report
/// it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes that are neither used nor reserved.
    pub bytes: Option<u64>,
    /// Files and directories that can still be created.
    pub inodes: Option<u64>,
}

impl Space {
    /// The free space of the filesystem that holds this path.
    pub fn of(path: &Path) -> Result<Self, Fault> {
        let stat = rustix::fs::statvfs(path)
            .map_err(std::io::Error::from)
            .at(format_args!(
                "query the free space of the filesystem of {}",
                path.display()
            ))?;
        let space = Self::from_counts(
            stat.f_blocks,
            stat.f_bavail.saturating_mul(stat.f_frsize),
            stat.f_files,
            stat.f_favail,
        );
        // Not under the lock: on a mount that does not answer, everybody would wait for it.
        let device = device(path)?;
        let reserved = RESERVED.lock().get(&device).copied().unwrap_or(0);
        Ok(Self {
            bytes: space.bytes.map(|bytes| bytes.saturating_sub(reserved)),
            ..space
        })
    }

    fn from_counts(blocks: u64, free_bytes: u64, files: u64, free_files: u64) -> Self {
        // Some filesystems report fewer files in total than free ones; only the total of zero says
        // that there is no count.
        Self {
            bytes: (blocks > 0).then_some(free_bytes),
            inodes: (files > 0).then_some(free_files),
        }
    }

    /// Whether both quantities suffice, as far as they are known.
    pub fn has(&self, bytes: u64, inodes: u64) -> bool {
        self.bytes.is_none_or(|free| free >= bytes) && self.inodes.is_none_or(|free| free >= inodes)
    }

    /// The free space in words: `12 MiB and 300 inodes`.
    pub fn text(&self) -> String {
        let bytes = match self.bytes {
            Some(bytes) if bytes >> 20 > 0 => format!("{} MiB", bytes >> 20),
            Some(bytes) => format!("{bytes} bytes"),
            None => "an unknown number of bytes".into(),
        };
        self.inodes.map_or(bytes.clone(), |inodes| {
            format!("{bytes} and {inodes} inodes")
        })
    }

    /// `no_space` where the filesystem of `path` has less than this. `what` states who needs it.
    pub fn check(
        path: &Path,
        bytes: u64,
        inodes: u64,
        what: impl std::fmt::Display,
    ) -> Result<(), Fault> {
        let space = Self::of(path)?;
        if space.has(bytes, inodes) {
            return Ok(());
        }
        let short = match space.bytes.filter(|free| *free < bytes) {
            Some(_) => format!("{bytes} bytes"),
            None => format!("{inodes} inodes"),
        };
        Err(Fault::no_space(format!(
            "{what}: no space left, {short} are needed in {} and {} are free",
            path.display(),
            space.text()
        )))
    }
}

fn device(path: &Path) -> Result<u64, Fault> {
    let stat = rustix::fs::stat(path)
        .map_err(std::io::Error::from)
        .at(format_args!("look at {}", path.display()))?;
    Ok(stat.st_dev)
}

/// Bytes of a filesystem that nobody else may count on. What was not used is free again when this
/// is dropped.
#[derive(Debug)]
pub struct Reservation {
    device: u64,
    left: AtomicU64,
}

impl Reservation {
    /// Reserves bytes of the filesystem of `path`, where `spare` bytes and these inodes stay free
    /// beside them.
    pub fn take(
        path: &Path,
        bytes: u64,
        spare: u64,
        inodes: u64,
        what: impl std::fmt::Display,
    ) -> Result<Self, Fault> {
        let device = device(path)?;
        // Reserved first and checked then: of two that begin at once, none counts the same bytes.
        // A size that a peer names may be of any size; more than every disk has is enough.
        let bytes = bytes.min(BYTES_MAX);
        let reservation = Self {
            device,
            left: AtomicU64::new(bytes),
        };
        {
            let mut reserved = RESERVED.lock();
            let there = reserved.entry(device).or_default();
            *there = there.saturating_add(bytes);
        }
        let space = Space::of(path)?;
        if space.has(spare, inodes) {
            return Ok(reservation);
        }
        drop(reservation);
        let space = Space::of(path)?;
        Err(Fault::no_space(format!(
            "{what} needs {bytes} bytes and {inodes} inodes in {}, beside {spare} bytes that stay free there, and {} are free",
            path.display(),
            space.text()
        )))
    }

    /// Notes that so many bytes were written: the filesystem counts them as used from now on.
    pub fn used(&self, bytes: u64) {
        let left = self
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                Some(left.saturating_sub(bytes))
            });
        give_back(self.device, left.unwrap_or(0).min(bytes));
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        give_back(self.device, self.left.swap(0, Ordering::SeqCst));
    }
}

fn give_back(device: u64, bytes: u64) {
    let mut reserved = RESERVED.lock();
    if let Some(all) = reserved.get_mut(&device) {
        *all = all.saturating_sub(bytes);
        if *all == 0 {
            reserved.remove(&device);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Code;

    #[test]
    fn a_quantity_that_is_not_reported_is_unknown_and_not_zero() {
        let silent = Space::from_counts(0, 0, 0, 0);
        assert_eq!(
            silent,
            Space {
                bytes: None,
                inodes: None
            }
        );
        assert!(silent.has(u64::MAX, u64::MAX));
        let full = Space::from_counts(100, 0, 0, 0);
        assert!(!full.has(1, 0), "no free block of 100 is a full filesystem");
        let no_inodes = Space::from_counts(100, 1 << 30, 50, 0);
        assert!(
            no_inodes.has(1 << 20, 0) && !no_inodes.has(1, 1),
            "a filesystem without free inodes is full"
        );
    }

    #[test]
    fn reserved_bytes_are_not_free_for_others_until_they_are_given_back() {
        let dir = tempfile::tempdir().unwrap();
        // Other tests write to the same filesystem meanwhile: only differences of this size are
        // looked at.
        let big = Space::of(dir.path()).unwrap().bytes.unwrap() / 2;
        let reservation = Reservation::take(dir.path(), big, 0, 0, "a test").unwrap();
        let left = Space::of(dir.path()).unwrap().bytes.unwrap();
        assert!(left < big + big / 2, "{left} of {big}");
        let fault = Reservation::take(dir.path(), 3 * big, big, 0, "another test").unwrap_err();
        assert_eq!(fault.code, Code::NoSpace, "{fault:?}");
        assert!(
            fault.message.contains(dir.path().to_str().unwrap())
                && fault.message.contains("another test"),
            "{fault:?}"
        );
        reservation.used(big);
        assert!(
            Space::of(dir.path()).unwrap().bytes.unwrap() > big + big / 2,
            "used bytes are no longer counted as reserved"
        );
        drop(reservation);
        assert!(
            Space::of(dir.path()).unwrap().bytes.unwrap() > big + big / 2,
            "nothing is given back twice"
        );
    }
}

//! Free space of a filesystem in bytes and inodes, and reservations of it.
//!
//! Every check for free space uses [`Space::of`]. Some filesystems report no blocks (some FUSE
//! filesystems) or no inodes (btrfs, some NFS servers). Such a quantity is unknown, and checks of
//! it pass. A [`Reservation`] holds space for a writer that knows its size before it starts; all
//! other checks count that space as used.

use std::collections::HashMap;
use std::path::Path;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::blocking;
use crate::fault::{Fault, IoContext};
use crate::text;

/// The largest size of one reservation.
const BYTES_MAX: u64 = 1 << 60;

/// Reserved bytes, by device.
static RESERVED: LazyLock<Mutex<HashMap<u64, u64>>> = LazyLock::new(Mutex::default);

/// The free space of a filesystem for a user who is not root. `None`: the filesystem does not
/// report it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes that are neither used nor reserved.
    pub bytes: Option<u64>,
    /// The number of files and directories that can still be created.
    pub inodes: Option<u64>,
}

impl Space {
    /// The free space of the filesystem that holds this path.
    pub fn of(path: &Path) -> Result<Self, Fault> {
        blocking::check("statvfs");
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
        // Done without the lock: if a mount does not respond, other callers must not wait for it.
        let device = device(path)?;
        let reserved = RESERVED.lock().get(&device).copied().unwrap_or(0);
        Ok(Self {
            bytes: space.bytes.map(|bytes| bytes.saturating_sub(reserved)),
            ..space
        })
    }

    fn from_counts(blocks: u64, free_bytes: u64, files: u64, free_files: u64) -> Self {
        // Some filesystems report fewer total files than free files. Only a total of zero means
        // that there is no count.
        Self {
            bytes: (blocks > 0).then_some(free_bytes),
            inodes: (files > 0).then_some(free_files),
        }
    }

    /// Whether both quantities suffice. An unknown quantity suffices.
    pub fn has(&self, bytes: u64, inodes: u64) -> bool {
        self.bytes.is_none_or(|free| free >= bytes) && self.inodes.is_none_or(|free| free >= inodes)
    }

    /// The free space for people: `12 MiB and 300 inodes`.
    pub fn text(&self) -> String {
        let bytes = match self.bytes {
            Some(bytes) if bytes > 0 => text::size(bytes),
            Some(bytes) => format!("{bytes} bytes"),
            None => "an unknown number of bytes".into(),
        };
        self.inodes.map_or(bytes.clone(), |inodes| {
            format!("{bytes} and {inodes} inodes")
        })
    }

    /// Returns `no_space` if the filesystem of `path` has less than this. `what` states who needs
    /// the space.
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
        let missing = match space.bytes.filter(|free| *free < bytes) {
            Some(_) => format!("{bytes} bytes"),
            None => format!("{inodes} inodes"),
        };
        Err(Fault::no_space(format!(
            "{what}: not enough free space, {missing} are needed in {} and {} are free",
            path.display(),
            space.text()
        )))
    }
}

fn device(path: &Path) -> Result<u64, Fault> {
    let stat = rustix::fs::stat(path)
        .map_err(std::io::Error::from)
        .at(format_args!("read the metadata of {}", path.display()))?;
    Ok(stat.st_dev)
}

/// Space of a filesystem reserved for one writer. Dropping it releases the unused rest.
#[derive(Debug)]
pub struct Reservation {
    device: u64,
    left: AtomicU64,
}

impl Reservation {
    /// Reserves `bytes` of the filesystem of `path`, if at least `spare` bytes and `inodes` inodes
    /// stay free.
    pub fn take(
        path: &Path,
        bytes: u64,
        spare: u64,
        inodes: u64,
        what: impl std::fmt::Display,
    ) -> Result<Self, Fault> {
        let device = device(path)?;
        // Reserve first, then check, so that two concurrent callers never count the same bytes. The
        // size may come from a peer, so it is limited; no disk is larger than the limit.
        let bytes = bytes.min(BYTES_MAX);
        let reservation = Self {
            device,
            left: AtomicU64::new(bytes),
        };
        {
            let mut reserved = RESERVED.lock();
            let on_device = reserved.entry(device).or_default();
            *on_device = on_device.saturating_add(bytes);
        }
        let space = Space::of(path)?;
        if space.has(spare, inodes) {
            return Ok(reservation);
        }
        drop(reservation);
        let space = Space::of(path)?;
        Err(Fault::no_space(format!(
            "{what} needs {bytes} bytes and {inodes} inodes in {}, plus a reserve of {spare} bytes, but only {} are free",
            path.display(),
            space.text()
        )))
    }

    /// Records that so many reserved bytes were written. The filesystem counts them as used from
    /// now on.
    pub fn used(&self, bytes: u64) {
        let left = self
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                Some(left.saturating_sub(bytes))
            });
        release(self.device, left.unwrap_or(0).min(bytes));
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        release(self.device, self.left.swap(0, Ordering::SeqCst));
    }
}

fn release(device: u64, bytes: u64) {
    let mut reserved = RESERVED.lock();
    if let Some(total) = reserved.get_mut(&device) {
        *total = total.saturating_sub(bytes);
        if *total == 0 {
            reserved.remove(&device);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Code;

    #[test]
    fn a_quantity_that_is_not_reported_is_unknown() {
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
        assert!(
            !full.has(1, 0),
            "0 free blocks of 100 mean a full filesystem"
        );
        let no_inodes = Space::from_counts(100, 1 << 30, 50, 0);
        assert!(
            no_inodes.has(1 << 20, 0) && !no_inodes.has(1, 1),
            "a filesystem without free inodes is full"
        );
    }

    #[test]
    fn reserved_bytes_are_not_free_for_others_until_they_are_released() {
        let dir = tempfile::tempdir().unwrap();
        // Other tests write to the same filesystem at the same time, so only large differences are
        // compared.
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
            "no bytes are released twice"
        );
    }
}

//! The times, extended attributes and hard links of staged files.
//!
//! Some filesystems refuse them. The content is then correct all the same, and `verify` reports the
//! difference as a note.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use rustix::fs::{
    AtFlags, Timespec, Timestamps, XattrFlags, fgetxattr, fsetxattr, statat, utimensat,
};
use rustix::io::Errno;

use super::{Sharing, Stage, sink_fault};
use base::durable;
use base::fault::{Fault, IoContext};
use base::limits::XATTRS_BYTES_MAX;
use base::names::RelPath;
use content::manifest::{Attributes, FileTime, Xattr};

/// The resolutions of the times of filesystems, in nanoseconds.
const RESOLUTIONS: [u32; 4] = [1, 100, 1_000, 1_000_000_000];

/// The metadata that a staged file gets. Files of several versions are one file only if it is the
/// same.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    pub mode: u32,
    pub attributes: Attributes,
}

impl Wanted {
    /// Whether a file has these attributes. Further ones do not matter, nor does the time where none
    /// can be set.
    pub(super) fn has_attributes(
        &self,
        file: &File,
        stat: &rustix::fs::Stat,
        fixed_times: bool,
    ) -> bool {
        let Attributes {
            modified, xattrs, ..
        } = &self.attributes;
        let same_time = fixed_times || modified.is_none_or(|time| is_time_of(stat, time));
        if !same_time || xattrs.is_empty() {
            return same_time;
        }
        let mut value = vec![0; XATTRS_BYTES_MAX];
        xattrs.iter().all(|xattr| {
            fgetxattr(file, xattr.name(), &mut value)
                .is_ok_and(|len| value.get(..len) == Some(xattr.value()))
        })
    }
}

impl Stage {
    /// Sets the modification time of a file if it differs. Returns `false` where the filesystem does
    /// not allow it.
    pub fn set_time(&self, path: &RelPath, time: FileTime) -> Result<bool, Fault> {
        let what = || self.what("set the time of", path);
        let stat = statat(self.dir.as_fd(), path.as_str(), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| sink_fault(what(), e))?;
        // The file may belong to an earlier version too: its time does not change without need.
        if self.fixed_times || is_time_of(&stat, time) {
            return Ok(true);
        }
        let (seconds, nanoseconds) = time.parts();
        let times = Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: rustix::fs::UTIME_OMIT,
            },
            last_modification: Timespec {
                tv_sec: seconds,
                tv_nsec: nanoseconds.into(),
            },
        };
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        match utimensat(self.dir.as_fd(), path.as_str(), &times, flags) {
            Ok(()) => Ok(true),
            Err(error) if is_refused(error) => Ok(false),
            Err(error) => Err(sink_fault(what(), error)),
        }
    }

    /// Sets extended attributes. Returns `false` where the filesystem does not allow it.
    pub fn set_xattrs(&self, path: &RelPath, xattrs: &[Xattr]) -> Result<bool, Fault> {
        let file = self
            .dir
            .open(path.as_str())
            .at_sink(self.what("open", path))?;
        for xattr in xattrs {
            let set = fsetxattr(&file, xattr.name(), xattr.value(), XattrFlags::empty());
            match set {
                Ok(()) => {}
                // A filesystem may have room for few attributes of one file.
                Err(error) if is_refused(error) || error == Errno::NOSPC => return Ok(false),
                Err(error) => {
                    return Err(sink_fault(self.what("set an attribute of", path), error));
                }
            }
        }
        Ok(true)
    }

    /// Makes `path` another name of the complete staged file `first`, which has the same content.
    /// Returns `false` where the filesystem does not allow it: `path` is then a file of its own.
    pub fn link_names(&self, first: &RelPath, path: &RelPath) -> Result<bool, Fault> {
        let (Some(one), other) = (self.stat(first)?, self.stat(path)?) else {
            return Ok(false);
        };
        if other.is_some_and(|other| (other.st_dev, other.st_ino) == (one.st_dev, one.st_ino)) {
            return Ok(true);
        }
        if !self.links_names.load(Ordering::Relaxed) {
            return Ok(false);
        }
        self.remove_file(path)?;
        let dir = self.dir.as_fd();
        if rustix::fs::linkat(dir, first.as_str(), dir, path.as_str(), AtFlags::empty()).is_ok() {
            return Ok(true);
        }
        self.links_names.store(false, Ordering::Relaxed);
        let source = self.open_to_read(first)?;
        if self.copy_within(&source, path, &one)? == Sharing::Not {
            let mut into = self.open_file(path, 0)?;
            std::io::copy(&mut &source, &mut into)
                .and_then(|_| durable::close(into))
                .at_sink(self.what("copy", path))?;
        }
        if !self.syncs_filesystem {
            self.sync_file(path)?;
        }
        Ok(false)
    }
}

/// Whether a file has this time, as far as its filesystem stores it: some drop digits.
fn is_time_of(stat: &rustix::fs::Stat, time: FileTime) -> bool {
    let (seconds, nanoseconds) = time.parts();
    let stored = u32::try_from(stat.st_mtime_nsec).unwrap_or(u32::MAX);
    let is_stored = |step: u32| stored == nanoseconds - nanoseconds % step;
    stat.st_mtime == seconds && RESOLUTIONS.into_iter().any(is_stored)
}

/// Whether a filesystem refuses an attribute, as some SMB, NFS and FUSE mounts do. `verify` then
/// reports the difference as a note.
fn is_refused(error: Errno) -> bool {
    matches!(
        error,
        Errno::PERM
            | Errno::NOTSUP
            | Errno::NOSYS
            | Errno::INVAL
            | Errno::OVERFLOW
            | Errno::TOOBIG
            | Errno::RANGE
    )
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::stage::StagingRoot;

    fn path(text: &str) -> RelPath {
        text.parse().unwrap()
    }

    #[test]
    fn times_and_attributes_are_set_and_a_link_needs_the_same_ones() {
        let dir = tempfile::tempdir().unwrap();
        let root = StagingRoot::open(dir.path()).unwrap();
        let stage = root.stage(&"t-1".parse().unwrap()).unwrap();
        stage.reflinks.store(false, Ordering::Relaxed);
        stage.write_file(&path("a"), b"content").unwrap();
        let time = FileTime::new(-5, 7).unwrap();
        let xattr = Xattr::new("user.k", b"v").unwrap();
        assert!(
            stage
                .set_xattrs(&path("a"), std::slice::from_ref(&xattr))
                .unwrap()
        );
        assert!(stage.set_time(&path("a"), time).unwrap());
        let a = stage.path().join("a");
        let before = SystemTime::UNIX_EPOCH - Duration::from_secs(5) + Duration::from_nanos(7);
        assert_eq!(fs::metadata(&a).unwrap().modified().unwrap(), before);
        let changed = fs::metadata(&a).unwrap().ctime_nsec();
        assert!(stage.set_time(&path("a"), time).unwrap());
        assert_eq!(
            fs::metadata(&a).unwrap().ctime_nsec(),
            changed,
            "it has this time"
        );

        let wanted = |time: Option<FileTime>, xattrs: &[Xattr]| Wanted {
            mode: 0o644,
            attributes: Attributes {
                modified: time,
                xattrs: xattrs.to_vec(),
                hard_link: None,
            },
        };
        let other = Xattr::new("user.k", b"w").unwrap();
        for (wanted, sharing) in [
            (wanted(None, &[]), Sharing::Link),
            (
                wanted(Some(time), std::slice::from_ref(&xattr)),
                Sharing::Link,
            ),
            (wanted(FileTime::new(-5, 8), &[]), Sharing::Copy),
            (wanted(FileTime::new(-4, 7), &[]), Sharing::Copy),
            (wanted(Some(time), &[other]), Sharing::Copy),
        ] {
            let source = File::open(&a).unwrap();
            let shared = stage.share(&a, &source, &path("b"), &wanted, true).unwrap();
            assert_eq!(shared, sharing, "{wanted:?}");
            assert_eq!(fs::read(stage.path().join("b")).unwrap(), b"content");
        }
    }

    #[test]
    fn a_second_name_is_a_link_or_a_file_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let root = StagingRoot::open(dir.path()).unwrap();
        let stage = root.stage(&"t-1".parse().unwrap()).unwrap();
        let inode = |name: &str| fs::metadata(stage.path().join(name)).unwrap().ino();
        assert!(
            !stage.link_names(&path("a"), &path("b")).unwrap(),
            "no first file"
        );
        stage.write_file(&path("a"), b"content").unwrap();
        stage.write_file(&path("b"), b"content").unwrap();
        for _ in 0..2 {
            assert!(stage.link_names(&path("a"), &path("b")).unwrap());
            assert_eq!(inode("a"), inode("b"));
        }
        stage.links_names.store(false, Ordering::Relaxed);
        stage.write_file(&path("c"), b"content").unwrap();
        assert!(!stage.link_names(&path("a"), &path("c")).unwrap());
        assert_ne!(inode("a"), inode("c"));
        // A name that cannot be linked: its directory does not exist.
        stage.links_names.store(true, Ordering::Relaxed);
        stage
            .link_names(&path("a"), &path("missing/c"))
            .unwrap_err();
        assert!(!stage.links_names.load(Ordering::Relaxed));
    }
}

//! Threads for the filesystems of this machine, so that one that hangs holds up its own work only.
//!
//! [`crate::blocking::blocking_at`] asks for the [`Threads`] of a path's filesystem. The filesystem
//! is found in the kernel's table of mounts, without a call to the filesystem itself. Nothing is
//! kept on disk.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use parking_lot::Mutex;

use crate::blocking;
use crate::limits::{MOUNT_THREADS_MAX, MOUNTS_KEPT};
use crate::threads::Threads;

/// Whether an existing path is on another mount than another one, or on another subvolume: then no
/// file of one can be renamed or linked to the other. Follows links, so it blocks.
pub fn are_apart(one: &Path, other: &Path) -> std::io::Result<bool> {
    blocking::check("mounts::are_apart");
    let table = table();
    let of = |path: &Path| -> std::io::Result<(PathBuf, u64)> {
        let path = std::fs::canonicalize(path)?;
        let device = std::fs::metadata(&path)?.dev();
        Ok((mount_of(&table, &path), device))
    };
    Ok(of(one)? != of(other)?)
}

/// The threads of each filesystem, by its mount point.
static MOUNTS: LazyLock<Mutex<HashMap<PathBuf, Threads>>> = LazyLock::new(Mutex::default);

/// The mount point of the filesystem that a path is on. A symbolic link in the path is not
/// followed: that would ask the filesystem.
pub fn mount_point(path: &Path) -> PathBuf {
    mount_of(&table(), path)
}

/// The threads of the filesystem that a path is on; see [`mount_point`].
pub(crate) fn threads_of(path: &Path) -> Threads {
    let mount = mount_point(path);
    let mut all = MOUNTS.lock();
    if all.len() >= MOUNTS_KEPT {
        all.retain(|_, threads| !threads.is_idle());
    }
    all.entry(mount)
        .or_insert_with(|| Threads::new("filesystem", MOUNT_THREADS_MAX))
        .clone()
}

/// The kernel's table of mounts; empty where there is none.
fn table() -> Vec<u8> {
    std::fs::read("/proc/self/mountinfo").unwrap_or_default()
}

/// The mount point that a path is below, of those in a table of the form of `/proc/self/mountinfo`
/// (proc(5)). `/` when none is.
fn mount_of(table: &[u8], path: &Path) -> PathBuf {
    let points = table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(unescaped);
    points
        .filter(|point| path.starts_with(point))
        .max_by_key(|point| point.as_os_str().len())
        .unwrap_or_else(|| PathBuf::from("/"))
}

/// A path of the table, in which the kernel writes space, tab, line feed and backslash as `\` and
/// three octal digits.
fn unescaped(text: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, behind @ ..] = rest {
        rest = behind;
        let digits = behind.first_chunk::<3>().filter(|digits| {
            *first == b'\\' && digits.iter().all(|digit| (b'0'..b'8').contains(digit))
        });
        match digits {
            Some(digits) => {
                out.push(digits.iter().fold(0u8, |value, digit| {
                    value.wrapping_mul(8).wrapping_add(digit - b'0')
                }));
                rest = &behind[3..];
            }
            None => out.push(*first),
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;
    use crate::blocking::{blocking, blocking_at};

    #[test]
    fn a_path_belongs_to_the_nearest_mount_above_it() {
        let table = b"22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n\
            30 22 0:25 / /mnt/nas rw - nfs4 nas:/export rw\n\
            31 30 0:26 / /mnt/nas/line\\0404 rw - nfs4 nas:/line rw\n";
        let of = |path: &str| mount_of(table, Path::new(path)).display().to_string();
        assert_eq!(of("/mnt/nas/a/b"), "/mnt/nas");
        assert_eq!(of("/mnt/nas/line 4/a"), "/mnt/nas/line 4");
        assert_eq!(of("/mnt/nasty"), "/");
        assert_eq!(of("registry.local:5000/a:v1"), "/");
        assert_eq!(mount_of(b"", Path::new("/a")), Path::new("/"));
    }

    #[test]
    fn a_link_leads_to_the_mount_of_its_target() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("proc");
        std::os::unix::fs::symlink("/proc", &link).unwrap();
        let inside = dir.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        assert!(are_apart(&link, dir.path()).unwrap());
        assert!(!are_apart(&inside, dir.path()).unwrap());
        assert!(are_apart(&dir.path().join("absent"), dir.path()).is_err());
    }

    /// One thread for all tasks: a call that blocked it would stop the test.
    #[tokio::test]
    async fn a_filesystem_that_hangs_holds_up_its_own_work_only() {
        let other = tempfile::tempdir().unwrap();
        assert_ne!(mount_of(&table(), other.path()), Path::new("/proc"));
        let (release, hangs) = sync_channel::<()>(0);
        let hangs = std::sync::Arc::new(Mutex::new(hangs));
        let hanging: Vec<_> = (0..=MOUNT_THREADS_MAX)
            .map(|_| {
                let hangs = hangs.clone();
                tokio::spawn(blocking_at(Path::new("/proc/1"), move || {
                    let _ = hangs.lock().recv();
                    Ok(())
                }))
            })
            .collect();
        while !threads_of(Path::new("/proc/1")).is_full() {
            tokio::task::yield_now().await;
        }
        assert_eq!(blocking_at(other.path(), || Ok(7)).await.unwrap(), 7);
        assert_eq!(blocking(|| Ok(8)).await.unwrap(), 8);
        drop(release);
        for task in hanging {
            task.await.unwrap().unwrap();
        }
    }
}

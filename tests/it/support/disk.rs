//! Small filesystems for one test: full ones, ones whose files can share blocks, and ones with a
//! power failure.

use std::path::{Path, PathBuf};

use super::command::{bound, run, tool};
use super::{secs, skipped};

/// A little more than the smallest XFS that its tools create.
const XFS_BYTES: u64 = 400 << 20;

/// A little more than the smallest btrfs that its tools create.
const BTRFS_BYTES: u64 = 128 << 20;

/// A small filesystem, which is unmounted when dropped.
pub(crate) struct SmallDisk {
    path: PathBuf,
    /// The image file; `None`: it is in memory.
    image: Option<PathBuf>,
}

impl SmallDisk {
    /// Mounts a filesystem in memory at `path`. `None` if nothing can be mounted; the reason is
    /// printed.
    pub(crate) fn mount_tmpfs(path: &Path, size: &str) -> Option<Self> {
        Self {
            path: path.into(),
            image: None,
        }
        .mounted("tmpfs", &format!("size={size}"), "tmpfs")
    }

    /// Mounts an ext4 in a file, on which space can be allocated before the bytes are written.
    /// Returns as above.
    pub(crate) fn mount_ext4(path: &Path, image: &Path, bytes: u64) -> Option<Self> {
        Self::make(
            path,
            image,
            bytes,
            bound("mkfs.ext4").args(["-q", "-F", "-m", "0"]),
        )?
        .mounted("ext4", "loop", image.to_str()?)
    }

    /// Mounts an XFS in a file, on which files can share blocks, and whose power failure can be
    /// simulated. Returns as above.
    pub(crate) fn mount_xfs(path: &Path, image: &Path) -> Option<Self> {
        Self::make(
            path,
            image,
            XFS_BYTES,
            bound("mkfs.xfs").args(["-q", "-m", "reflink=1"]),
        )?
        .mounted("xfs", "loop", image.to_str()?)
    }

    /// Mounts a small filesystem of this kind: `ext4`, `xfs`, `btrfs`, or `tmpfs`, which has few
    /// inodes. Returns as above.
    pub(crate) fn mount(kind: &str, path: &Path, image: &Path) -> Option<Self> {
        match kind {
            "ext4" => Self::mount_ext4(path, image, 64 << 20),
            "xfs" => Self::mount_xfs(path, image),
            "btrfs" => Self::make(path, image, BTRFS_BYTES, bound("mkfs.btrfs").arg("-q"))?
                .mounted("btrfs", "loop", image.to_str()?),
            _ => Self {
                path: path.into(),
                image: None,
            }
            .mounted("tmpfs", "size=64m,nr_inodes=200", "tmpfs"),
        }
    }

    fn make(
        path: &Path,
        image: &Path,
        bytes: u64,
        mkfs: &mut std::process::Command,
    ) -> Option<Self> {
        std::fs::File::create(image)
            .unwrap()
            .set_len(bytes)
            .unwrap();
        let made = run(mkfs.arg(image), secs(20));
        if made.code != 0 {
            skipped(&format!(
                "no filesystem can be created here: {}",
                made.err.trim()
            ));
            return None;
        }
        Some(Self {
            path: path.into(),
            image: Some(image.into()),
        })
    }

    fn mounted(self, kind: &str, options: &str, device: &str) -> Option<Self> {
        std::fs::create_dir_all(&self.path).unwrap();
        let output = run(
            bound("mount")
                .args(["-t", kind, "-o", options, device])
                .arg(&self.path),
            secs(20),
        );
        if output.code != 0 {
            skipped(&format!(
                "a {kind} cannot be mounted here: {}",
                output.err.trim()
            ));
            return None;
        }
        Some(self)
    }

    fn text(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// The used bytes.
    pub(crate) fn used(&self) -> u64 {
        let room = rustix::fs::statvfs(self.path.as_path()).unwrap();
        (room.f_blocks - room.f_bfree) * room.f_frsize
    }

    /// Fills it with a file of this name, so that `leave` bytes stay free.
    pub(crate) fn fill(&self, name: &str, leave: u64) -> PathBuf {
        let room = rustix::fs::statvfs(self.path.as_path()).unwrap();
        let free = room.f_bavail * room.f_frsize;
        // No free byte: the file requests more than there is, and takes all that fits.
        let len = if leave == 0 {
            free + (1 << 20)
        } else {
            free.saturating_sub(leave)
        };
        let filler = self.path.join(name);
        let _ = std::fs::write(&filler, vec![1; len as usize]);
        filler
    }

    /// Resizes a filesystem in memory.
    pub(crate) fn grow(&self, size: &str) {
        tool(
            "mount",
            &["-o", &format!("remount,size={size}"), self.text()],
        );
    }

    /// Syncs all data to the disk.
    pub(crate) fn sync(&self) {
        tool("sync", &["-f", self.text()]);
    }

    /// Simulates a power failure of an XFS: from now on nothing reaches the disk, not even data
    /// that was written before and not synced.
    pub(crate) fn cut_power(&self) {
        tool("xfs_io", &["-x", "-c", "shutdown", self.text()]);
    }

    /// Mounts it as it is after the power failure. No process may have a file of it open.
    pub(crate) fn power_on(&self) {
        let image = self
            .image
            .as_deref()
            .and_then(Path::to_str)
            .expect("a disk in a file");
        tool("umount", &[self.text()]);
        // A copy of the image under the same name: another mount namespace may still hold the old
        // filesystem, and the kernel would then reuse it.
        let copy = format!("{image}.copy");
        tool("cp", &["--sparse=always", image, &copy]);
        std::fs::rename(&copy, image).unwrap();
        tool(
            "mount",
            &["-t", "xfs", "-o", "loop,nouuid", image, self.text()],
        );
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = run(bound("umount").arg("-l").arg(&self.path), secs(20));
    }
}

//! A staging directory, in which the files of an artifact are written before a sink takes them.
//!
//! All writes use a handle of the directory, so no path in a manifest can reach outside it, even
//! with symbolic links in the directory. Links of the artifact itself are created last. After a
//! crash the directory is found under the id of its transfer, and the journal (see `chunk_index`)
//! states which bytes are durable.

mod attributes;
mod copy;

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use cap_std::fs::{Dir, DirBuilder, OpenOptions, OpenOptionsExt, Permissions, PermissionsExt};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, mkdirat, openat, statat};
use rustix::io::Errno;

use crate::file_state::FileState;
use base::durable;
use base::fault::{Fault, IoContext};
use base::limits::{STATE_INODES_SPARE, STATE_ROOM_BYTES_MIN};
use base::names::{RelPath, TransferId};
use base::space::Space;
use base::text;

pub use attributes::Wanted;
pub(crate) use copy::{copy_range, next_data};

/// The mode of staged files; other modes are set at the end.
pub const FILE_MODE: u32 = 0o644;
/// The bytes that are written to try whether a file can be written.
const TRIED_BYTES_MAX: u64 = 256 << 10;
/// The filesystem number of tmpfs.
const TMPFS: rustix::fs::FsWord = 0x0102_1994;
/// The numbers of the filesystems on which syncfs(2) writes everything: ext4, XFS, btrfs, tmpfs,
/// F2FS, ZFS, bcachefs.
const SYNCED_FILESYSTEMS: [rustix::fs::FsWord; 7] = [
    0xef53,
    0x5846_5342,
    0x9123_683e,
    TMPFS,
    0xf2f5_2010,
    0x2fc1_2fc1,
    0xca45_1a4e,
];
/// The first version of Linux in which syncfs(2) reports a lost write.
const SYNCFS_REPORTS_FROM: (u32, u32) = (5, 8);
/// The size limit of the small file that identifies a staging root.
const MARK_BYTES_MAX: u64 = 256;
/// Files of at least this size are preallocated.
const PREALLOCATE_BYTES: u64 = 1 << 20;

/// How a file got the same content as another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// The files share their blocks: nothing was written.
    Blocks,
    /// Both names refer to one file, which is already durable if files are synced one by one.
    Link,
    /// The filesystem copied the bytes.
    Copy,
    /// Not possible: the filesystem supports none of these.
    Not,
}

/// One staging directory.
pub struct Stage {
    /// The directory below which all paths are opened.
    dir: Dir,
    /// The same directory, opened for reading. A filesystem is synced through it, because `dir` may
    /// be a path-only handle.
    handle: File,
    path: PathBuf,
    /// Whether the filesystem may support reflinks; false after it rejected one.
    reflinks: AtomicBool,
    /// Whether the filesystem may have hard links; false after it rejected one.
    links_names: AtomicBool,
    /// Whether preallocation is cheap. A tmpfs would allocate and clear every page while all
    /// writers wait.
    preallocates: bool,
    /// Whether one call syncs the complete filesystem and reports each lost write.
    syncs_filesystem: bool,
    /// Whether permission bits cannot be changed here.
    fixed_modes: bool,
    /// Modification times cannot be set, and do not matter.
    fixed_times: bool,
}

/// The directory of the staging directories, held open: a later mount or unmount does not affect
/// operations through it.
pub struct StagingRoot {
    handle: File,
    path: PathBuf,
}

impl StagingRoot {
    /// Opens the directory and creates it if necessary.
    pub fn open(path: &Path) -> Result<Self, Fault> {
        durable::create_dir_all(path).map_err(Fault::of_sink)?;
        Ok(Self {
            handle: File::open(path).at_sink(format_args!("open {}", path.display()))?,
            path: path.to_owned(),
        })
    }

    /// Opens a directory that must exist.
    pub fn open_there(path: &Path) -> Result<Self, Fault> {
        let handle = File::open(path).at(format_args!("open {}", path.display()))?;
        Ok(Self {
            handle,
            path: path.to_owned(),
        })
    }

    /// The text of a small file in the directory.
    pub fn read(&self, name: &str) -> std::io::Result<String> {
        let mut text = String::new();
        let file = openat(
            &self.handle,
            name,
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
            Mode::empty(),
        )?;
        File::from(file)
            .take(MARK_BYTES_MAX)
            .read_to_string(&mut text)?;
        Ok(text)
    }

    /// A subdirectory, created if necessary.
    pub fn folder(&self, name: &str) -> Result<Self, Fault> {
        let path = self.path.join(name);
        let what = |doing: &str| format!("{doing} the directory {}", path.display());
        match mkdirat(&self.handle, name, Mode::RWXU | Mode::RWXG | Mode::RWXO) {
            Ok(()) => durable::sync_folder(&self.handle).at_sink(what("create"))?,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(sink_fault(what("create"), error)),
        }
        let opened = openat(
            &self.handle,
            name,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        );
        Ok(Self {
            handle: opened
                .map_err(|error| sink_fault(what("open"), error))?
                .into(),
            path,
        })
    }

    /// Whether a transfer has a staging directory. A NAS that does not respond is an error.
    pub fn has(&self, transfer: &TransferId) -> Result<bool, Fault> {
        match statat(&self.handle, transfer.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(sink_fault(
                format_args!(
                    "read the metadata of {}",
                    transfer.in_dir(&self.path).display()
                ),
                error,
            )),
        }
    }

    /// The staging directory of a transfer, created if necessary.
    pub fn stage(&self, transfer: &TransferId) -> Result<Stage, Fault> {
        let Self { handle, path } = self.folder(transfer.as_str())?;
        Stage::new(handle, path)
    }
}

impl Stage {
    fn new(handle: File, path: PathBuf) -> Result<Self, Fault> {
        let dir = Dir::from_std_file(
            handle
                .try_clone()
                .at_sink(format_args!("open {}", path.display()))?,
        );
        let kind = rustix::fs::fstatfs(&handle)
            .map(|stat| stat.f_type)
            .unwrap_or_default();
        let syncs_filesystem = SYNCED_FILESYSTEMS.contains(&kind) && syncfs_reports();
        let reflinks = AtomicBool::new(true);
        Ok(Self {
            dir,
            handle,
            path,
            reflinks,
            links_names: AtomicBool::new(true),
            preallocates: kind != TMPFS,
            syncs_filesystem,
            fixed_modes: false,
            fixed_times: false,
        })
    }

    /// The same directory on a filesystem where permission bits cannot be changed.
    pub fn with_fixed_modes(self, fixed_modes: bool) -> Self {
        Self {
            fixed_modes,
            ..self
        }
    }

    /// The same directory on a filesystem where modification times cannot be set.
    pub fn with_fixed_times(self, fixed_times: bool) -> Self {
        Self {
            fixed_times,
            ..self
        }
    }

    /// Whether permission bits cannot be changed here.
    pub fn has_fixed_modes(&self) -> bool {
        self.fixed_modes
    }

    /// Whether [`Stage::sync_filesystem`] makes everything durable and reports losses. Through
    /// FUSE, the call never reaches the server.
    pub fn syncs_filesystem(&self) -> bool {
        self.syncs_filesystem
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn what(&self, doing: &str, path: &RelPath) -> String {
        format!("{doing} {}", path.in_dir(&self.path).display())
    }

    /// Creates a directory; an existing one is accepted.
    pub fn make_dir(&self, path: &RelPath) -> Result<(), Fault> {
        match self.dir.create_dir_with(path.as_str(), &DirBuilder::new()) {
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            other => other.at_sink(self.what("create the directory", path)),
        }
    }

    /// Opens a file for writing at offsets, and creates it if necessary.
    pub fn open_file(&self, path: &RelPath, size: u64) -> Result<File, Fault> {
        let mut options = OpenOptions::new();
        options
            .write(true)
            .create(true)
            .truncate(false)
            .mode(FILE_MODE);
        let file = self
            .dir
            .open_with(path.as_str(), &options)
            .at_sink(self.what("open", path))?
            .into_std();
        if size >= PREALLOCATE_BYTES && self.preallocates {
            // If preallocation is not supported, a lack of space is detected later.
            if let Err(Errno::NOSPC | Errno::DQUOT) =
                rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size)
            {
                return Err(Fault::no_space(format!(
                    "{}: not enough space for its {size} bytes",
                    self.what("create", path)
                )));
            }
        }
        Ok(file)
    }

    /// Opens a file for writing at offsets, and creates it if necessary. It has its full length, and
    /// takes only the room of what is written.
    pub fn open_sparse(&self, path: &RelPath, size: u64) -> Result<File, Fault> {
        let file = self.open_file(path, 0)?;
        file.set_len(size).at_sink(self.what("create", path))?;
        Ok(file)
    }

    /// Opens a staged file for reading.
    pub fn open_to_read(&self, path: &RelPath) -> Result<File, Fault> {
        Ok(self
            .dir
            .open(path.as_str())
            .at_sink(self.what("open", path))?
            .into_std())
    }

    /// Writes a complete small file.
    pub fn write_file(&self, path: &RelPath, bytes: &[u8]) -> Result<(), Fault> {
        let file = self.open_file(path, 0)?;
        file.write_all_at(bytes, 0)
            .and_then(|()| durable::close(file))
            .at_sink(self.what("write", path))
    }

    /// Tries whether a file of this size can be written: creates, fills, syncs, closes and removes
    /// it. An existing file is opened and closed. No content of it is changed.
    pub fn try_file(&self, path: &RelPath, size: u64) -> Result<(), Fault> {
        let what = || self.what("write", path);
        let mut options = OpenOptions::new();
        options.write(true).mode(FILE_MODE);
        let existing = match self.dir.symlink_metadata(path.as_str()) {
            Ok(_) => true,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => false,
            Err(e) => return Err(Fault::io(what(), &e).of_sink()),
        };
        if existing {
            let file = self.dir.open_with(path.as_str(), &options);
            return file
                .and_then(|file| durable::close(file.into_std()))
                .at_sink(what());
        }
        let file = match self.dir.open_with(path.as_str(), options.create_new(true)) {
            // Its directory is not created yet.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            opened => opened.at_sink(what())?.into_std(),
        };
        let bytes = vec![1; size.min(TRIED_BYTES_MAX) as usize];
        let written = file
            .write_all_at(&bytes, 0)
            .and_then(|()| durable::sync_and_close(file))
            .at_sink(what());
        let removed = self.remove_file(path);
        written.and(removed)
    }

    /// The size of a regular file; `None` if there is none.
    pub fn size(&self, path: &RelPath) -> Result<Option<u64>, Fault> {
        Ok(self.file_state(path)?.map(|state| state.len))
    }

    /// The state of a regular file; `None` if there is none.
    pub fn file_state(&self, path: &RelPath) -> Result<Option<FileState>, Fault> {
        Ok(self.stat(path)?.map(|stat| FileState::of_stat(&stat)))
    }

    /// Whether an entry of this name exists, including a dangling link.
    pub fn exists(&self, path: &RelPath) -> bool {
        self.dir.symlink_metadata(path.as_str()).is_ok()
    }

    /// The disk space allocated for a file, in bytes.
    pub fn allocated(&self, path: &RelPath) -> Result<u64, Fault> {
        Ok(self
            .stat(path)?
            .map_or(0, |stat| stat.st_blocks as u64 * 512))
    }

    fn stat(&self, path: &RelPath) -> Result<Option<rustix::fs::Stat>, Fault> {
        // One call instead of three. Nothing is opened, so a link in the path does no harm.
        match statat(self.dir.as_fd(), path.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(
                (FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile).then_some(stat),
            ),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(e) => Err(sink_fault(self.what("read the metadata of", path), e)),
        }
    }

    /// Removes a file; a missing file is accepted.
    pub fn remove_file(&self, path: &RelPath) -> Result<(), Fault> {
        match self.dir.remove_file(path.as_str()) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other.at_sink(self.what("remove", path)),
        }
    }

    /// Gives `path` the same content as `from`, which is open as `source`, without reading its
    /// bytes here: by reflink; otherwise by hard link if mode and attributes match and `link` allows
    /// it; otherwise by a copy within the filesystem.
    pub fn share(
        &self,
        from: &Path,
        source: &File,
        path: &RelPath,
        wanted: &Wanted,
        link: bool,
    ) -> Result<Sharing, Fault> {
        if self.reflinks.load(Ordering::Relaxed) {
            self.remove_file(path)?;
            let into = self.open_file(path, 0)?;
            match rustix::fs::ioctl_ficlone(&into, source) {
                Ok(()) => {
                    durable::close(into).at_sink(self.what("close", path))?;
                    return Ok(Sharing::Blocks);
                }
                // Both files are on this filesystem, which does not support it; do not try again
                // for each file.
                Err(Errno::NOTSUP | Errno::NOTTY) => self.reflinks.store(false, Ordering::Relaxed),
                Err(_) => {}
            }
            self.remove_file(path)?;
        }
        let stat = rustix::fs::fstat(source).map_err(|e| sink_fault(from.display(), e))?;
        // If modes are fixed, a copy would get the same mode as the link has.
        let is_other_mode = stat.st_mode & 0o7777 != wanted.mode && !self.fixed_modes;
        if !link || is_other_mode || !wanted.has_attributes(source, &stat, self.fixed_times) {
            return self.copy_within(source, path, &stat);
        }
        let link_now = || {
            rustix::fs::linkat(
                rustix::fs::CWD,
                from,
                self.dir.as_fd(),
                path.as_str(),
                AtFlags::empty(),
            )
        };
        let linked = match link_now() {
            Err(Errno::EXIST) => {
                self.remove_file(path)?;
                link_now()
            }
            linked => linked,
        };
        match linked {
            Ok(()) => {
                // Not by its new name: an SMB server may refuse to open it while the file is open
                // under the other name.
                if !self.syncs_filesystem {
                    source.sync_all().at_sink(self.what("sync", path))?;
                }
                Ok(Sharing::Link)
            }
            Err(Errno::NOSPC | Errno::DQUOT) => {
                Err(Fault::no_space(self.what("create the link", path)))
            }
            // A different filesystem, too many links, or no support for links, which servers report
            // in several ways.
            Err(_) => self.copy_within(source, path, &stat),
        }
    }

    /// Creates a symbolic link; replaces an existing one.
    pub fn make_symlink(&self, path: &RelPath, target: &str) -> Result<(), Fault> {
        let current = rustix::fs::readlinkat(self.dir.as_fd(), path.as_str(), Vec::new());
        if current.is_ok_and(|current| current.as_bytes() == target.as_bytes()) {
            return Ok(());
        }
        self.remove_file(path)?;
        rustix::fs::symlinkat(target, self.dir.as_fd(), path.as_str())
            .map_err(|e| sink_fault(self.what("create the link", path), e))
    }

    /// Sets the mode of an entry if it differs. A directory keeps the set-group-ID bit that it
    /// inherits from its parent on a shared NAS.
    pub fn set_mode(&self, path: &RelPath, mode: u32) -> Result<(), Fault> {
        let meta = self
            .dir
            .symlink_metadata(path.as_str())
            .at_sink(self.what("read the metadata of", path))?;
        let now = meta.permissions().mode() & 0o7777;
        let mode = if meta.is_dir() {
            mode | (now & 0o2000)
        } else {
            mode
        };
        if now == mode {
            return Ok(());
        }
        let set = self
            .dir
            .set_permissions(path.as_str(), Permissions::from_mode(mode));
        // The content is correct, and `verify` reports the modes as a note.
        if self.fixed_modes {
            Ok(())
        } else {
            set.at_sink(self.what("set the mode of", path))
        }
    }

    /// Syncs one file by name.
    pub fn sync_file(&self, path: &RelPath) -> Result<(), Fault> {
        self.dir
            .open(path.as_str())
            .and_then(|file| durable::sync_and_close(file.into_std()))
            .at_sink(self.what("sync", path))
    }

    /// Syncs the entries of one directory; `None` is the staging directory itself.
    pub fn sync_dir(&self, path: Option<&RelPath>) -> Result<(), Fault> {
        durable::sync_dir(&path.map_or(self.path.clone(), |p| p.in_dir(&self.path)))
            .map_err(Fault::of_sink)
    }

    /// Syncs the complete filesystem, which is cheaper than many single files. Only valid if
    /// [`Stage::syncs_filesystem`].
    pub fn sync_filesystem(&self) -> Result<(), Fault> {
        rustix::fs::syncfs(&self.handle)
            .map_err(|e| sink_fault(format_args!("sync {}", self.path.display()), e))
    }

    /// The free space of the filesystem.
    pub fn space(&self) -> Result<Space, Fault> {
        Space::of(&self.path).map_err(Fault::of_sink)
    }
}

fn sink_fault(what: impl std::fmt::Display, errno: Errno) -> Fault {
    Fault::io(what, &errno.into()).of_sink()
}

/// The line of `doctor` about the space for a daemon's own state.
pub fn room_report(data_dir: &Path) -> Result<String, Fault> {
    let space = Space::of(data_dir)?;
    let at = format!("data_dir {}: {} free", data_dir.display(), space.text());
    let least = format!(
        "less than {} and {STATE_INODES_SPARE} inodes",
        text::size(STATE_ROOM_BYTES_MIN)
    );
    Ok(match space.has(STATE_ROOM_BYTES_MIN, STATE_INODES_SPARE) {
        true => format!("ok {at}"),
        false => format!("fault {at}, {least}; free space there, otherwise no state can be stored"),
    })
}

/// Whether syncfs(2) of this Linux version reports a lost write.
fn syncfs_reports() -> bool {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy().into_owned();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|part| part.parse::<u32>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= SYNCFS_REPORTS_FROM
}

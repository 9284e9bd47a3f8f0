//! A filesystem with faults: it forwards all calls to a folder, and fails as the test requests,
//! while it is in use.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request,
    SessionACL, TimeOrNow, WriteFlags,
};
use rustix::fs::{AtFlags, CWD};

use super::skipped;

/// Nothing is cached by the kernel.
const TTL: Duration = Duration::ZERO;

/// A call that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Op {
    Write,
    Fsync,
    /// The result of close(2).
    Flush,
    Rename,
    Unlink,
    Chmod,
    Link,
    Symlink,
    Mkdir,
    Create,
    Open,
    Read,
}

/// The current faults.
#[derive(Default)]
pub(crate) struct Faults {
    /// Calls that fail, each with its error.
    pub(crate) fail: HashMap<Op, Errno>,
    /// Only calls on files whose path contains this text fail; empty: all.
    pub(crate) only: String,
    /// After a failed sync, each later sync of the same file fails.
    pub(crate) sync_fails_again: bool,
    /// Files whose path contains this text store zeros instead of the written bytes.
    pub(crate) loses: Option<String>,
    /// Bytes that can still be written.
    pub(crate) room: Option<u64>,
    /// Every changing call fails.
    pub(crate) read_only: bool,
    /// Every entry shows these permission bits.
    pub(crate) mode: Option<u16>,
    /// Names that differ only in case are the same name.
    pub(crate) folds: bool,
    /// The filesystem reports a size of zero.
    pub(crate) no_size: bool,
    /// No call returns.
    pub(crate) hangs: bool,
    /// Calls so far.
    pub(crate) calls: HashMap<Op, u64>,
    /// The files whose sync failed.
    poisoned: HashSet<PathBuf>,
}

#[derive(Default)]
struct Shared {
    faults: Mutex<Faults>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The mounted filesystem, which is unmounted when dropped.
pub(crate) struct Faulty {
    shared: Arc<Shared>,
    path: PathBuf,
    session: Option<BackgroundSession>,
}

impl Faulty {
    /// Mounts one at `path`, backed by the folder `behind`. `None` if nothing can be mounted; the
    /// reason is printed.
    pub(crate) fn mount(path: &Path, behind: &Path) -> Option<Self> {
        fs::create_dir_all(path).unwrap();
        fs::create_dir_all(behind).unwrap();
        let shared = Arc::new(Shared::default());
        let nodes = Nodes {
            paths: HashMap::from([(1, PathBuf::new())]),
            numbers: HashMap::from([(PathBuf::new(), 1)]),
            next: 2,
        };
        let passed = Passed {
            behind: behind.into(),
            shared: shared.clone(),
            nodes: Mutex::new(nodes),
            files: Mutex::default(),
        };
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("faulty".into())];
        config.acl = SessionACL::All;
        match fuser::spawn_mount(passed, path, &config) {
            Ok(session) => Some(Self {
                shared,
                path: path.into(),
                session: Some(session),
            }),
            Err(error) => {
                skipped(&format!("no FUSE filesystem can be mounted here: {error}"));
                None
            }
        }
    }

    /// Changes the faults.
    pub(crate) fn set(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.shared.lock());
        self.shared.changed.notify_all();
    }

    /// Removes all faults.
    pub(crate) fn heal(&self) {
        self.set(|faults| {
            *faults = Faults {
                calls: std::mem::take(&mut faults.calls),
                ..Faults::default()
            }
        });
    }

    /// The number of calls so far.
    pub(crate) fn calls(&self, op: Op) -> u64 {
        self.shared.lock().calls.get(&op).copied().unwrap_or(0)
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        // A process that waits for an answer cannot be killed.
        self.heal();
        let _ = rustix::mount::unmount(&self.path, rustix::mount::UnmountFlags::DETACH);
        drop(self.session.take());
    }
}

struct Nodes {
    paths: HashMap<u64, PathBuf>,
    numbers: HashMap<PathBuf, u64>,
    next: u64,
}

struct Passed {
    behind: PathBuf,
    shared: Arc<Shared>,
    nodes: Mutex<Nodes>,
    files: Mutex<Files>,
}

/// The last handle number, and the open files.
type Files = (u64, HashMap<u64, (File, PathBuf)>);

type Answer<T> = Result<T, Errno>;

fn io<T>(result: std::io::Result<T>) -> Answer<T> {
    result.map_err(Errno::from)
}

impl Passed {
    /// Waits while the filesystem hangs, and returns the error if this call fails.
    fn enter(&self, op: Option<Op>, changes: bool, path: &Path) -> Answer<MutexGuard<'_, Faults>> {
        let mut faults = self.shared.lock();
        while faults.hangs {
            faults = self
                .shared
                .changed
                .wait(faults)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(op) = op {
            *faults.calls.entry(op).or_default() += 1;
            if op == Op::Fsync && faults.poisoned.contains(path) {
                return Err(Errno::ENOSPC);
            }
            if let Some(errno) = faults
                .fail
                .get(&op)
                .copied()
                .filter(|_| path.to_string_lossy().contains(&faults.only))
            {
                if op == Op::Fsync && faults.sync_fails_again {
                    faults.poisoned.insert(path.into());
                }
                return Err(errno);
            }
        }
        if changes && faults.read_only {
            Err(Errno::EROFS)
        } else {
            Ok(faults)
        }
    }

    fn path(&self, ino: INodeNo) -> Answer<PathBuf> {
        self.nodes
            .lock()
            .unwrap()
            .paths
            .get(&ino.0)
            .cloned()
            .ok_or(Errno::ENOENT)
    }

    fn child(&self, parent: INodeNo, name: &OsStr) -> Answer<PathBuf> {
        let folder = self.path(parent)?;
        let path = folder.join(name);
        if !self.shared.lock().folds || self.full(&path).symlink_metadata().is_ok() {
            return Ok(path);
        }
        let names = fs::read_dir(self.full(&folder))
            .into_iter()
            .flatten()
            .flatten()
            .map(|found| found.file_name());
        let folded = |name: &OsStr| name.to_string_lossy().to_lowercase();
        Ok(names
            .into_iter()
            .find(|there| folded(there) == folded(name))
            .map_or(path, |there| folder.join(there)))
    }

    fn full(&self, path: &Path) -> PathBuf {
        self.behind.join(path)
    }

    fn number(&self, path: &Path) -> u64 {
        let mut nodes = self.nodes.lock().unwrap();
        if let Some(number) = nodes.numbers.get(path) {
            return *number;
        }
        let number = nodes.next;
        nodes.next += 1;
        nodes.paths.insert(number, path.into());
        nodes.numbers.insert(path.into(), number);
        number
    }

    fn forget_path(&self, path: &Path) {
        let mut nodes = self.nodes.lock().unwrap();
        nodes.numbers.remove(path);
    }

    fn attr(&self, path: &Path) -> Answer<FileAttr> {
        let meta = io(fs::symlink_metadata(self.full(path)))?;
        let time = |secs: i64, nanos: i64| {
            SystemTime::UNIX_EPOCH + Duration::new(secs as u64, nanos as u32)
        };
        let kind = FileType::from_std(meta.file_type()).ok_or(Errno::EIO)?;
        let mode = self
            .shared
            .lock()
            .mode
            .filter(|_| kind != FileType::Symlink);
        Ok(FileAttr {
            ino: INodeNo(self.number(path)),
            size: meta.size(),
            blocks: meta.blocks(),
            atime: time(meta.atime(), meta.atime_nsec()),
            mtime: time(meta.mtime(), meta.mtime_nsec()),
            ctime: time(meta.ctime(), meta.ctime_nsec()),
            crtime: SystemTime::UNIX_EPOCH,
            kind,
            perm: mode.unwrap_or((meta.mode() & 0o7777) as u16),
            nlink: meta.nlink() as u32,
            uid: meta.uid(),
            gid: meta.gid(),
            rdev: 0,
            flags: 0,
            blksize: 4096,
        })
    }

    fn keep(&self, file: File, path: PathBuf) -> FileHandle {
        let mut files = self.files.lock().unwrap();
        files.0 += 1;
        let handle = files.0;
        files.1.insert(handle, (file, path));
        FileHandle(handle)
    }

    fn with_file<T>(
        &self,
        fh: FileHandle,
        work: impl FnOnce(&File, &Path) -> Answer<T>,
    ) -> Answer<T> {
        let files = self.files.lock().unwrap();
        let (file, path) = files.1.get(&fh.0).ok_or(Errno::EBADF)?;
        let (file, path) = (io(file.try_clone())?, path.clone());
        drop(files);
        work(&file, &path)
    }

    fn written(&self, fh: FileHandle, offset: u64, data: &[u8]) -> Answer<u32> {
        self.with_file(fh, |file, path| {
            let mut faults = self.enter(Some(Op::Write), true, path)?;
            if let Some(room) = &mut faults.room {
                *room = room.checked_sub(data.len() as u64).ok_or(Errno::ENOSPC)?;
            }
            let loses = faults
                .loses
                .as_ref()
                .is_some_and(|part| path.to_string_lossy().contains(part));
            drop(faults);
            io(if loses {
                file.write_all_at(&vec![0; data.len()], offset)
            } else {
                file.write_all_at(data, offset)
            })?;
            Ok(data.len() as u32)
        })
    }

    fn moved(&self, from: &Path, to: &Path) {
        let mut nodes = self.nodes.lock().unwrap();
        nodes.numbers.remove(to);
        let all: Vec<(u64, PathBuf)> = nodes
            .paths
            .iter()
            .map(|(number, path)| (*number, path.clone()))
            .collect();
        for (number, path) in all {
            let Ok(rest) = path.strip_prefix(from) else {
                continue;
            };
            if nodes.numbers.get(&path) != Some(&number) {
                continue;
            }
            let new = if rest.as_os_str().is_empty() {
                to.to_owned()
            } else {
                to.join(rest)
            };
            nodes.numbers.remove(&path);
            nodes.numbers.insert(new.clone(), number);
            nodes.paths.insert(number, new);
        }
    }
}

/// Answers with an entry or an error.
fn entry(reply: ReplyEntry, attr: Answer<FileAttr>) {
    match attr {
        Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
        Err(errno) => reply.error(errno),
    }
}

fn empty(reply: ReplyEmpty, done: Answer<()>) {
    match done {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for Passed {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.child(parent, name).and_then(|path| {
            drop(self.enter(None, false, &path)?);
            self.attr(&path)
        });
        entry(reply, found);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let found = self.path(ino).and_then(|path| {
            drop(self.enter(None, false, &path)?);
            self.attr(&path)
        });
        match found {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = self.path(ino).and_then(|path| {
            drop(self.enter(mode.map(|_| Op::Chmod), true, &path)?);
            if let Some(mode) = mode.filter(|_| self.shared.lock().mode.is_none()) {
                io(fs::set_permissions(
                    self.full(&path),
                    fs::Permissions::from_mode(mode & 0o7777),
                ))?;
            }
            if let Some(size) = size {
                io(File::options()
                    .write(true)
                    .open(self.full(&path))
                    .and_then(|file| file.set_len(size)))?;
            }
            self.attr(&path)
        });
        match set {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(errno) => reply.error(errno),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        match self
            .path(ino)
            .and_then(|path| io(fs::read_link(self.full(&path))))
        {
            Ok(target) => reply.data(target.as_os_str().as_bytes()),
            Err(errno) => reply.error(errno),
        }
    }

    fn mkdir(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let made = self.child(parent, name).and_then(|path| {
            drop(self.enter(Some(Op::Mkdir), true, &path)?);
            io(fs::create_dir(self.full(&path)))?;
            io(fs::set_permissions(
                self.full(&path),
                fs::Permissions::from_mode(mode & !umask & 0o7777),
            ))?;
            self.attr(&path)
        });
        entry(reply, made);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self.child(parent, name).and_then(|path| {
            drop(self.enter(Some(Op::Unlink), true, &path)?);
            io(fs::remove_file(self.full(&path)))?;
            self.shared.lock().poisoned.remove(&path);
            self.forget_path(&path);
            Ok(())
        });
        empty(reply, done);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self.child(parent, name).and_then(|path| {
            drop(self.enter(None, true, &path)?);
            io(fs::remove_dir(self.full(&path)))?;
            self.forget_path(&path);
            Ok(())
        });
        empty(reply, done);
    }

    fn symlink(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let made = self.child(parent, name).and_then(|path| {
            drop(self.enter(Some(Op::Symlink), true, &path)?);
            io(std::os::unix::fs::symlink(target, self.full(&path)))?;
            self.attr(&path)
        });
        entry(reply, made);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        to: INodeNo,
        new: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let done = self.child(parent, name).and_then(|from| {
            let to = self.child(to, new)?;
            // The new name decides whether the call fails.
            drop(self.enter(Some(Op::Rename), true, &to)?);
            let flags = rustix::fs::RenameFlags::from_bits_retain(flags.bits());
            rustix::fs::renameat_with(CWD, self.full(&from), CWD, self.full(&to), flags)
                .map_err(|e| Errno::from_i32(e.raw_os_error()))?;
            self.moved(&from, &to);
            Ok(())
        });
        empty(reply, done);
    }

    fn link(&self, _: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let made = self.path(ino).and_then(|from| {
            let path = self.child(parent, name)?;
            drop(self.enter(Some(Op::Link), true, &path)?);
            rustix::fs::linkat(
                CWD,
                self.full(&from),
                CWD,
                self.full(&path),
                AtFlags::empty(),
            )
            .map_err(|e| Errno::from_i32(e.raw_os_error()))?;
            self.attr(&path)
        });
        entry(reply, made);
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let opened = self.path(ino).and_then(|path| {
            let writes = flags.0 & 3 != 0;
            drop(self.enter(Some(Op::Open), writes, &path)?);
            Ok(self.keep(
                io(File::options()
                    .read(true)
                    .write(writes)
                    .open(self.full(&path)))?,
                path,
            ))
        });
        match opened {
            Ok(handle) => reply.opened(handle, FopenFlags::empty()),
            Err(errno) => reply.error(errno),
        }
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let made = self.child(parent, name).and_then(|path| {
            drop(self.enter(Some(Op::Create), true, &path)?);
            let mode = mode & !umask & 0o7777;
            let file = io(File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(mode)
                .open(self.full(&path)))?;
            Ok((self.attr(&path)?, self.keep(file, path)))
        });
        match made {
            Ok((attr, handle)) => {
                reply.created(&TTL, &attr, Generation(0), handle, FopenFlags::empty());
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = self.with_file(fh, |file, path| {
            drop(self.enter(Some(Op::Read), false, path)?);
            let mut out = vec![0; size as usize];
            let mut done = 0;
            while done < out.len() {
                match io(file.read_at(&mut out[done..], offset + done as u64))? {
                    0 => break,
                    some => done += some,
                }
            }
            out.truncate(done);
            Ok(out)
        });
        match read {
            Ok(bytes) => reply.data(&bytes),
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.written(fh, offset, data) {
            Ok(len) => reply.written(len),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, fh: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        empty(
            reply,
            self.with_file(fh, |_, path| {
                self.enter(Some(Op::Flush), false, path).map(drop)
            }),
        );
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.files.lock().unwrap().1.remove(&fh.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, fh: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(
            reply,
            self.with_file(fh, |_, path| {
                self.enter(Some(Op::Fsync), false, path).map(drop)
            }),
        );
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        empty(
            reply,
            self.path(ino)
                .and_then(|path| self.enter(None, false, &path).map(drop)),
        );
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listed = self.path(ino).and_then(|path| {
            drop(self.enter(None, false, &path)?);
            let mut names: Vec<(std::ffi::OsString, FileType)> = Vec::new();
            for found in io(fs::read_dir(self.full(&path)))?.flatten() {
                if let Some(kind) = found.file_type().ok().and_then(FileType::from_std) {
                    names.push((found.file_name(), kind));
                }
            }
            names.sort_by(|a, b| a.0.cmp(&b.0));
            Ok((path, names))
        });
        let (path, names) = match listed {
            Ok(listed) => listed,
            Err(errno) => return reply.error(errno),
        };
        for (at, (name, kind)) in names.iter().enumerate().skip(offset as usize) {
            if reply.add(
                INodeNo(self.number(&path.join(name))),
                at as u64 + 1,
                *kind,
                name,
            ) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let size = self.path(ino).and_then(|path| {
            let faults = self.enter(None, false, &path)?;
            if faults.no_size {
                return Ok((0, 0, 0));
            }
            drop(faults);
            let stat =
                rustix::fs::statvfs(&self.behind).map_err(|e| Errno::from_i32(e.raw_os_error()))?;
            Ok((stat.f_blocks, stat.f_bfree, stat.f_files))
        });
        match size {
            Ok((blocks, free, files)) => {
                reply.statfs(blocks, free, free, files, files / 2, 4096, 255, 4096);
            }
            Err(errno) => reply.error(errno),
        }
    }
}

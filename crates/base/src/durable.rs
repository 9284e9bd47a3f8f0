//! The only module that renames files, and that knows what must be synced before and after a
//! rename.
//!
//! After [`replace`] or [`rename_noreplace`] has returned `Ok`, the change survives a power
//! failure. A crash before that leaves either the old state or the new state, and at worst a hidden
//! temporary file in the same directory. If an fsync fails, the caller must discard the file and
//! write a new one: the kernel reports a lost write only once, and a second fsync of the same file
//! would succeed. Some filesystems (FUSE, network) report a lost write only when the file is
//! closed. Therefore each written file is closed with [`close`], which returns that error.

use std::fs::{self, File};
use std::io::{self, IoSlice, Read as _, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::blocking;
use crate::fault::{Code, Fault, IoContext};

fn parent(path: &Path) -> &Path {
    path.parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Slices of one vectored write; Linux accepts up to 1,024.
const PARTS_MAX: usize = 256;

/// Replaces a small file atomically: writes and syncs a temporary file, then renames it. Mode 0644.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    replace_with_mode(path, bytes, 0o644)
}

/// [`replace`] for a secret. The file has mode 0600 from its creation, so only its owner can read
/// it.
pub fn replace_secret(path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    replace_with_mode(path, bytes, 0o600)
}

/// A hidden, random file name in the same directory.
fn temporary_of(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // The name is random, not the process id: other machines may write to the same directory, and
    // containers often have equal process ids.
    parent(path).join(format!(".{name}.{:016x}.tmp", rand::random::<u64>()))
}

/// Whether this is the name of a temporary file of [`replace`] for a file `name`.
pub fn is_temporary_of(entry: &std::ffi::OsStr, name: &str) -> bool {
    let random = || {
        let rest = entry.to_str()?.strip_prefix('.')?.strip_prefix(name)?;
        rest.strip_prefix('.')?.strip_suffix(".tmp")
    };
    random().is_some_and(|random| {
        random.len() == 16 && random.bytes().all(|byte| byte.is_ascii_hexdigit())
    })
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    close(file) // before a rename: some network filesystems refuse to rename an open file
}

fn replace_with_mode(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Fault> {
    blocking::check("durable::replace");
    let temporary = temporary_of(path);
    if let Err(error) = write_new(&temporary, bytes, mode).and_then(|()| rename(&temporary, path)) {
        let _ = fs::remove_file(&temporary);
        return Err(Fault::io(format_args!("write {}", path.display()), &error));
    }
    sync_renamed(path)
}

/// Creates a small file, complete and synced, unless the name exists. If several callers do this at
/// once, also on different machines, exactly one succeeds. Returns whether this call created the
/// file. On a filesystem with neither hard links nor an exclusive rename, this checks first and
/// then renames, which is not atomic.
pub fn create(path: &Path, bytes: &[u8]) -> Result<bool, Fault> {
    blocking::check("durable::create");
    let what = || format!("write {}", path.display());
    let temporary = temporary_of(path);
    let put = || match fs::hard_link(&temporary, path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(_) => match rename_noreplace(&temporary, path) {
            Err(fault) if fault.code == Code::Conflict => Ok(false),
            renamed => renamed.map(|()| true),
        },
    };
    let created = write_new(&temporary, bytes, 0o644)
        .at(what())
        .and_then(|()| put());
    let _ = fs::remove_file(&temporary);
    if created.is_ok() {
        sync_renamed(path)?;
    }
    created
}

#[expect(clippy::disallowed_methods, reason = "this is the module that renames")]
fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)
}

/// Closes a file and returns the error of the close. Dropping the file would ignore it.
pub fn close(file: File) -> io::Result<()> {
    match nix::unistd::close(file) {
        // After EINTR, Linux has closed the file descriptor.
        Ok(()) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether a rename failed because the two paths are on different mounts.
fn is_across(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::XDEV.raw_os_error())
}

/// Renames and replaces the target. Syncs nothing: the caller syncs the directories. Returns
/// `false` if the two paths are on different mounts: nothing was renamed.
pub fn rename_over(from: &Path, to: &Path) -> Result<bool, Fault> {
    blocking::check("durable::rename_over");
    match rename(from, to) {
        Ok(()) => Ok(true),
        Err(error) if is_across(&error) => Ok(false),
        Err(error) => Err(Fault::io(
            format_args!("rename {} to {}", from.display(), to.display()),
            &error,
        )),
    }
}

/// Renames a file or directory to a name that does not exist, and syncs both parent directories.
/// The caller must have synced the content. A filesystem without exclusive rename (NFS) gets a
/// check before the rename. That is safe because only this program writes there.
pub fn rename_noreplace(from: &Path, to: &Path) -> Result<(), Fault> {
    if rename_within(from, to)? {
        return Ok(());
    }
    let what = format!("rename {} to {}", from.display(), to.display());
    Err(Fault::io(what, &rustix::io::Errno::XDEV.into()))
}

/// Like [`rename_noreplace`], but returns `false` if the two paths are on different mounts: nothing
/// was renamed.
pub fn rename_within(from: &Path, to: &Path) -> Result<bool, Fault> {
    blocking::check("durable::rename_within");
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    let what = || format!("rename {} to {}", from.display(), to.display());
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::NOTSUP) => {
            if fs::symlink_metadata(to).is_ok() {
                return Err(Fault::conflict(format!("{}: the target exists", what())));
            }
            match rename(from, to) {
                Err(error) if is_across(&error) => return Ok(false),
                renamed => renamed.at(what())?,
            }
        }
        Err(rustix::io::Errno::XDEV) => return Ok(false),
        Err(rustix::io::Errno::EXIST) => {
            return Err(Fault::conflict(format!("{}: the target exists", what())));
        }
        Err(error) => return Err(Fault::io(what(), &error.into())),
    }
    sync_renamed(to)?;
    if parent(from) != parent(to) {
        sync_dir(parent(from))?;
    }
    Ok(true)
}

/// Gives a file a second name that keeps its content when the first name is replaced.
pub fn keep_as(path: &Path, name: &Path) -> Result<(), Fault> {
    blocking::check("durable::keep_as");
    let what = || format!("keep {} as {}", path.display(), name.display());
    if fs::hard_link(path, name).is_err() {
        // Some filesystems have no hard links.
        fs::copy(path, name).at(what())?;
        sync_file(name)?;
    }
    sync_dir(parent(name))
}

/// Replaces a file with another file of the same directory, whose content the caller has synced.
pub fn move_over(from: &Path, to: &Path) -> Result<(), Fault> {
    blocking::check("durable::move_over");
    rename(from, to).at(format_args!(
        "rename {} to {}",
        from.display(),
        to.display()
    ))?;
    sync_renamed(to)
}

/// Replaces a symbolic link by rename. The link is a convenience for people: it is not synced, and
/// a filesystem without links returns `Ok`.
pub fn replace_symlink(link: &Path, target: &str) -> Result<(), Fault> {
    blocking::check("durable::replace_symlink");
    let name = link.file_name().unwrap_or_default().to_string_lossy();
    if fs::read_link(link).is_ok_and(|current| current == Path::new(target)) {
        return Ok(());
    }
    let temporary: PathBuf =
        parent(link).join(format!(".{name}.{:016x}.tmp", rand::random::<u64>()));
    if std::os::unix::fs::symlink(target, &temporary).is_err() {
        return Ok(());
    }
    let renamed = rename(&temporary, link).at(format_args!("replace the link {}", link.display()));
    if renamed.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    renamed
}

/// Makes the new name of a file or directory durable. On SMB a sync of the directory does nothing,
/// and after a power cut of the server the file would have its old name; a sync of the file by its
/// new name is passed on to the server, whose journal then holds the rename too. The content of a
/// directory that was renamed is followed by a file with the same effect: `CURRENT`, or a note.
fn sync_renamed(path: &Path) -> Result<(), Fault> {
    sync_dir(parent(path))?;
    let is_file = fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file());
    match is_file && is_smb(parent(path)) {
        true => sync_file(path),
        false => Ok(()),
    }
}

/// Whether a directory is on a share of an SMB server.
fn is_smb(folder: &Path) -> bool {
    rustix::fs::statfs(folder).is_ok_and(|stat| SMB_MAGIC.contains(&(stat.f_type as u32)))
}

/// The types of the filesystems `cifs` and `smb3`.
const SMB_MAGIC: [u32; 2] = [0xff53_4d42, 0xfe53_4d42];

/// Syncs the entries of a directory. An SMB server may reject this call, which is not an error.
pub fn sync_dir(path: &Path) -> Result<(), Fault> {
    blocking::check("durable::sync_dir");
    File::open(path)
        .and_then(|dir| sync_folder(&dir))
        .at(format_args!("sync the directory {}", path.display()))
}

/// Like [`sync_dir`], for an open directory.
pub fn sync_folder(folder: &File) -> io::Result<()> {
    blocking::check("durable::sync_folder");
    match folder.sync_all() {
        Err(e) if e.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => Ok(()),
        other => other,
    }
}

/// Syncs the content and the length of a file.
pub fn sync_file(path: &Path) -> Result<(), Fault> {
    blocking::check("durable::sync_file");
    File::open(path)
        .and_then(sync_and_close)
        .at(format_args!("sync {}", path.display()))
}

/// Syncs a file, then closes it.
pub fn sync_and_close(file: File) -> io::Result<()> {
    blocking::check("durable::sync_and_close");
    file.sync_all()?;
    close(file)
}

/// Creates a directory and its missing parents, and syncs each new entry.
pub fn create_dir_all(path: &Path) -> Result<(), Fault> {
    blocking::check("durable::create_dir_all");
    if path.is_dir() {
        return Ok(());
    }
    if let Some(ancestor) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        create_dir_all(ancestor)?;
    }
    match fs::create_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => return Ok(()),
        other => other.at(format_args!("create the directory {}", path.display()))?,
    }
    sync_dir(parent(path))
}

/// Removes a file or a complete directory. A missing path is not an error.
pub fn remove_all(path: &Path) -> Result<(), Fault> {
    blocking::check("durable::remove_all");
    let is_missing = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => make_removable(path).and_then(|()| fs::remove_dir_all(path)),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match result {
        Err(e) if is_missing(&e) => Ok(()),
        other => other.at(format_args!("remove {}", path.display())),
    }
}

/// Gives the owner all permissions on the directories below `path`. An artifact may contain
/// read-only directories, whose entries only root could remove otherwise.
fn make_removable(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let mode = fs::metadata(path)?.permissions().mode();
    if mode & 0o700 != 0o700 {
        fs::set_permissions(path, fs::Permissions::from_mode(mode | 0o700))?;
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            make_removable(&entry.path())?;
        }
    }
    Ok(())
}

/// Opens for reading a file that a user or a configuration names. Refuses everything except a
/// regular file, because reading a pipe or a device may never end. Does not block on a pipe.
pub fn open_regular(path: &Path) -> io::Result<File> {
    blocking::check("durable::open_regular");
    open_regular_with(path, OFlags::empty())
}

/// Like [`open_regular`], but does not follow a symbolic link.
pub fn open_regular_nofollow(path: &Path) -> io::Result<File> {
    blocking::check("durable::open_regular_nofollow");
    open_regular_with(path, OFlags::NOFOLLOW)
}

fn open_regular_with(path: &Path, flags: OFlags) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .custom_flags((flags | OFlags::NONBLOCK).bits() as i32)
        .open(path)?;
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        "it is not a regular file",
    ))
}

/// Reads a complete file as [`open_regular`] opens it. Fails if it has more than `bytes_max` bytes.
pub fn read_regular(path: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    blocking::check("durable::read_regular");
    let mut out = Vec::new();
    open_regular(path)?
        .take(bytes_max + 1)
        .read_to_end(&mut out)?;
    if out.len() as u64 > bytes_max {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("it has more than {bytes_max} bytes"),
        ));
    }
    Ok(out)
}

/// Like [`read_regular`], as UTF-8 text.
pub fn read_regular_text(path: &Path, bytes_max: u64) -> io::Result<String> {
    String::from_utf8(read_regular(path, bytes_max)?)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8 text"))
}

/// Writes all parts one after the other from `offset`, usually with one system call for many parts.
pub fn write_parts(file: &File, parts: &[impl AsRef<[u8]>], offset: u64) -> io::Result<()> {
    blocking::check("durable::write_parts");
    let mut at = offset;
    for batch in parts.chunks(PARTS_MAX) {
        let slices: Vec<IoSlice<'_>> = batch
            .iter()
            .map(|part| IoSlice::new(part.as_ref()))
            .collect();
        let written = rustix::io::pwritev(file, &slices, at);
        let mut written = written.or_else(|e| {
            if e == rustix::io::Errno::INTR {
                Ok(0)
            } else {
                Err(e)
            }
        })?;
        // Write the rest after a partial write: a signal or a full disk can shorten a write.
        for part in batch.iter().map(AsRef::as_ref) {
            let here = written.min(part.len());
            written -= here;
            file.write_all_at(&part[here..], at + here as u64)?;
            at += part.len() as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replace_leaves_exactly_one_complete_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        replace(&path, b"one").unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn exactly_one_of_many_concurrent_creates_succeeds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("id");
        let start = std::sync::Barrier::new(8);
        let created: Vec<usize> = std::thread::scope(|scope| {
            let (path, start) = (&path, &start);
            let all: Vec<_> = (0..8)
                .map(|number| {
                    scope.spawn(move || {
                        start.wait();
                        create(path, format!("{number}").as_bytes()).unwrap()
                    })
                })
                .collect();
            all.into_iter()
                .enumerate()
                .filter_map(|(number, made)| made.join().unwrap().then_some(number))
                .collect()
        });
        assert_eq!(created.len(), 1, "{created:?}");
        assert_eq!(fs::read_to_string(&path).unwrap(), created[0].to_string());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn rename_refuses_an_existing_target() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::create_dir(&a).unwrap();
        fs::create_dir(&b).unwrap();
        let fault = rename_noreplace(&a, &b).unwrap_err();
        assert_eq!(fault.code, Code::Conflict);
        rename_noreplace(&a, &dir.path().join("c")).unwrap();
    }

    #[test]
    fn only_a_regular_file_is_opened_and_a_pipe_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &pipe,
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
        for odd in [pipe.as_path(), dir.path(), Path::new("/dev/zero")] {
            assert_eq!(
                open_regular(odd).unwrap_err().kind(),
                io::ErrorKind::InvalidInput,
                "{}",
                odd.display()
            );
        }
        let file = dir.path().join("file");
        replace(&file, b"1234").unwrap();
        assert_eq!(read_regular(&file, 4).unwrap(), b"1234");
        assert_eq!(
            read_regular(&file, 3).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}

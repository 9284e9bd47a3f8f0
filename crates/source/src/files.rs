//! A directory or a single file as a source: datasets, operator projects and models.
//!
//! This module owns the walk and the rules for what can be published: names are UTF-8, links stay
//! inside the directory, there are no devices, pipes or sockets, and everything is readable.
//! [`FilesSource::open`] first walks the complete tree for these rules only, so that a publish is
//! rejected with a list of all offending entries before a byte is read. Then `ingest` drives the
//! second walk. Writes nothing, so a crash leaves nothing.
//!
//! The second walk uses `lost` to count what an artifact does not contain (times, owners, hard
//! links, …). For `--strict` the first walk counts it too, so that a publish is rejected before any
//! content is read.
//!
//! Memory does not grow with the tree: the directories on the current path hold only as many names
//! as fit a budget that the whole walk shares. A directory with more names is read again for the
//! next batch.

use std::ffi::OsStr;
use std::fs::{self, FileType, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::Access;

use self::lost::Lost;
use super::{Content, FileIdentity, Source, SourceBody, SourceEntry};
use crate::own::{self, Own};
use base::fault::{Fault, IoContext};
use base::limits::{OFFENDERS_LISTED_MAX, WALK_NAMES_BYTES_MAX};
use base::names::{RelPath, stays_inside};
use base::omitted::Omitted;
use content::manifest::KindInfo;

mod lost;

/// The smallest budget for the names of one directory of a walk in bytes, at any depth.
const FOLDER_NAMES_BYTES_MIN: usize = 64 << 10;
/// The memory overhead of a name.
const NAME_OVERHEAD_BYTES: usize = size_of::<Name>();
/// The permission bits recorded for symbolic links, which have none.
const SYMLINK_MODE: u32 = 0o777;

/// Reads a directory, or one file, in manifest order.
#[derive(Debug)]
pub struct FilesSource {
    input: Input,
    lost: Lost,
    /// The result of the first walk; `None` after the first entry.
    first_count: Option<Omitted>,
}

#[derive(Debug)]
enum Input {
    /// A single file: one entry with its own name.
    File(Option<SourceEntry>),
    /// A directory.
    Folder(Walk),
}

impl FilesSource {
    /// Checks everything below `path` by its metadata and prepares to read it.
    ///
    /// A path that does not exist is `not_found`. Entries that cannot be published are reported
    /// together: up to [`OFFENDERS_LISTED_MAX`] by name and the rest by count. The fault is
    /// `not_allowed` if all of them are only unreadable, otherwise `integrity`.
    pub fn open(path: &Path) -> Result<Self, Fault> {
        Self::open_for(path, Arc::default(), false)
    }

    /// Like [`FilesSource::open`], for a daemon, which never publishes its own state:
    /// `not_allowed`, anywhere in the tree. With `count_first`, everything that is left out is
    /// known before the first entry, at the cost of reading the metadata of each file.
    pub fn open_for(path: &Path, own: Arc<Own>, count_first: bool) -> Result<Self, Fault> {
        // Resolved once: no component of the root is a link, so what is opened later is what was
        // checked.
        let root = fs::canonicalize(path).at(format_args!("open {}", path.display()))?;
        own.check_path(&root)?;
        let meta = fs::metadata(&root).at(format_args!("open {}", path.display()))?;
        if meta.is_dir() {
            let mut first = count_first.then(|| Lost::of_folder(&root, &meta));
            refuse_offenders(&root, &own, first.as_mut())?;
            let (first_count, lost) = (
                first.map(|lost| lost.omitted().clone()),
                Lost::of_folder(&root, &meta),
            );
            return Ok(Self {
                input: Input::Folder(Walk::new(root, own)?),
                lost,
                first_count,
            });
        }
        if let Some(what) = special(meta.file_type()) {
            return Err(Fault::integrity(format!(
                "{} is {what}, not a file or a directory",
                path.display()
            )));
        }
        readable(&root).at(format_args!("read {}", path.display()))?;
        let name = path.file_name().or(root.file_name()).unwrap_or_default();
        let rel = rel_path(name.as_bytes()).map_err(|why| {
            Fault::integrity(format!(
                "{} cannot be published: {why}",
                printable(name.as_bytes())
            ))
        })?;
        let lost = Lost::of_file(rel.as_str(), &root, &meta);
        Ok(Self {
            input: Input::File(Some(file_entry(rel, &meta, root))),
            lost,
            first_count: None,
        })
    }
}

impl Source for FilesSource {
    fn next(&mut self) -> Result<Option<SourceEntry>, Fault> {
        self.first_count = None;
        self.lost.finish_pending();
        match &mut self.input {
            Input::File(entry) => Ok(entry.take()),
            Input::Folder(walk) => next_entry(walk, &mut self.lost),
        }
    }

    fn info(&self) -> KindInfo {
        KindInfo::Files
    }

    fn opened(&mut self, file: &fs::File) {
        self.lost.opened(file);
    }

    fn omitted(&self) -> Omitted {
        self.first_count
            .as_ref()
            .unwrap_or(self.lost.omitted())
            .clone()
    }
}

fn file_entry(path: RelPath, meta: &Metadata, file: PathBuf) -> SourceEntry {
    let identity = Some(FileIdentity::new(Arc::new(file.clone()), meta));
    SourceEntry {
        path,
        mode: mode(meta),
        body: SourceBody::File {
            size: meta.len(),
            content: Content::File(file),
        },
        identity,
    }
}

/// Set-user-ID and similar bits of files are not published. All bits of directories are recorded,
/// because the digest of existing directories must not change. A site never sets more than 0777.
fn mode(meta: &Metadata) -> u32 {
    meta.permissions().mode() & if meta.is_dir() { 0o7777 } else { 0o777 }
}

/// The next entry of the second walk. The tree may have changed since the first walk, so all rules
/// are checked again.
fn next_entry(walk: &mut Walk, lost: &mut Lost) -> Result<Option<SourceEntry>, Fault> {
    let Some(found) = walk.step()? else {
        return Ok(None);
    };
    let refuse = |why: String| {
        Fault::integrity(format!(
            "{}: {} cannot be published: {why}",
            walk.root.display(),
            printable(&found.rel)
        ))
    };
    let path = rel_path(&found.rel).map_err(refuse)?;
    let full = walk.full(&found.rel);
    let meta = match fs::symlink_metadata(&full) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(refuse("it disappeared while the directory was read".into())
                .with_next("publish again after all writers have finished"));
        }
        Err(error) => return Err(Fault::io(format_args!("read {}", full.display()), &error)),
    };
    if let Some(what) = special(meta.file_type()) {
        return Err(refuse(format!("it is {what}")));
    }
    // Before anything is read from it.
    walk.own.check(&meta).map_err(|_| own::refusal(&full))?;
    lost.note(path.as_str(), &full, &meta);
    if meta.is_dir() {
        walk.enter(&found.rel)
            .at(format_args!("read the directory {}", full.display()))?;
        return Ok(Some(SourceEntry {
            path,
            mode: mode(&meta),
            body: SourceBody::Dir,
            identity: None,
        }));
    }
    if meta.is_symlink() {
        let target = link_target(&walk.root, &found.rel).map_err(refuse)?;
        return Ok(Some(SourceEntry {
            path,
            mode: SYMLINK_MODE,
            body: SourceBody::Symlink(target),
            identity: None,
        }));
    }
    Ok(Some(file_entry(path, &meta, full)))
}

/// The first walk: finds by metadata everything that cannot be published, and counts what is left
/// out if requested.
fn refuse_offenders(root: &Path, own: &Arc<Own>, mut lost: Option<&mut Lost>) -> Result<(), Fault> {
    let mut offenders = Offenders::default();
    let mut walk = Walk::new(root.to_path_buf(), own.clone())?;
    while let Some(found) = walk.step()? {
        let full = walk.full(&found.rel);
        let path = rel_path(&found.rel);
        if let (Ok(path), Some(lost)) = (&path, lost.as_deref_mut())
            && let Ok(meta) = fs::symlink_metadata(&full)
        {
            lost.note(path.as_str(), &full, &meta);
            lost.finish_pending();
        }
        if let Err(why) = path {
            offenders.add(&found.rel, &why); // its content would only repeat the problem
        } else if let Some(what) = special(found.kind) {
            offenders.add(&found.rel, &format!("it is {what}"));
        } else if found.kind.is_symlink() {
            if let Err(why) = link_target(root, &found.rel) {
                offenders.add(&found.rel, &why);
            }
        } else if found.kind.is_dir() {
            if let Err(error) = walk.enter(&found.rel) {
                offenders.add_unreadable(&found.rel, &error);
            }
        } else if let Err(error) = readable(&full).and_then(|()| walk.check_file(&full)) {
            offenders.add_unreadable(&found.rel, &error);
        }
    }
    offenders.finish(root)
}

/// The entries that cannot be published; the first ones by name.
#[derive(Debug, Default)]
struct Offenders {
    listed: Vec<String>,
    total: u64,
    unreadable: u64,
    /// The number of entries that belong to the daemon itself.
    own: u64,
}

impl Offenders {
    fn add(&mut self, rel: &[u8], why: &str) {
        self.total += 1;
        if self.listed.len() < OFFENDERS_LISTED_MAX {
            self.listed.push(format!("{}: {why}", printable(rel)));
        }
    }

    fn add_unreadable(&mut self, rel: &[u8], error: &io::Error) {
        if own::is_refusal(error) {
            self.own += 1;
            return self.add(rel, &error.to_string());
        }
        self.unreadable += u64::from(error.kind() == io::ErrorKind::PermissionDenied);
        self.add(rel, &format!("it cannot be read: {error}"));
    }

    fn finish(self, root: &Path) -> Result<(), Fault> {
        if self.total == 0 {
            return Ok(());
        }
        let mut message = format!(
            "{}: {} cannot be published: {}",
            root.display(),
            count(self.total),
            self.listed.join("; ")
        );
        let more = self.total - self.listed.len() as u64;
        if more > 0 {
            message.push_str(&format!("; and {more} more"));
        }
        Err(if self.own > 0 {
            Fault::not_allowed(message).with_next(own::NEXT)
        } else if self.unreadable == self.total {
            Fault::not_allowed(message).with_next("give the daemon's user read permission for them")
        } else {
            Fault::integrity(message)
                .with_next("rename, correct or move these entries, then publish again")
        })
    }
}

fn count(n: u64) -> String {
    if n == 1 {
        "1 entry".into()
    } else {
        format!("{n} entries")
    }
}

fn rel_path(rel: &[u8]) -> Result<RelPath, String> {
    let text = std::str::from_utf8(rel).map_err(|_| "its name is not UTF-8".to_owned())?;
    text.parse()
        .map_err(|e: base::names::NameError| e.to_string())
}

/// A name for people: unchanged if it is plain text, otherwise also with its unprintable bytes
/// escaped.
fn printable(rel: &[u8]) -> String {
    let mut escaped = String::new();
    let mut plain = true;
    for chunk in rel.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() {
                plain = false;
                escaped.extend(c.escape_default());
            } else {
                escaped.push(c);
            }
        }
        for byte in chunk.invalid() {
            plain = false;
            escaped.push_str(&format!("\\x{byte:02x}"));
        }
    }
    if plain {
        return escaped;
    }
    let lossy: String = String::from_utf8_lossy(rel)
        .chars()
        .map(|c| {
            if base::text::is_unsafe(c) {
                '\u{fffd}'
            } else {
                c
            }
        })
        .collect();
    format!("{lossy} ({escaped})")
}

fn special(kind: FileType) -> Option<&'static str> {
    if kind.is_fifo() {
        Some("a named pipe")
    } else if kind.is_socket() {
        Some("a socket")
    } else if kind.is_block_device() || kind.is_char_device() {
        Some("a device")
    } else {
        None
    }
}

fn readable(path: &Path) -> io::Result<()> {
    Ok(rustix::fs::access(path, Access::READ_OK)?)
}

/// The target of the link at `rel`, or the reason why it cannot be published.
fn link_target(root: &Path, rel: &[u8]) -> Result<String, String> {
    let target = fs::read_link(root.join(OsStr::from_bytes(rel)))
        .map_err(|e| format!("the link cannot be read: {e}"))?;
    let target = target.as_os_str().as_bytes();
    let Ok(text) = std::str::from_utf8(target) else {
        return Err(format!(
            "it links to {}, which is not UTF-8",
            printable(target)
        ));
    };
    let is_folder =
        |path: &str| fs::symlink_metadata(root.join(path)).is_ok_and(|meta| meta.is_dir());
    stays_inside(&rel_path(rel)?, text, is_folder)
        .map_err(|why| format!("its link target {} {why}", printable(target)))?;
    Ok(text.to_owned())
}

/// An entry that a walk found.
#[derive(Debug)]
struct WalkEntry {
    /// The path below the root, not checked yet.
    rel: Vec<u8>,
    kind: FileType,
}

/// A walk in manifest order: depth first, the names of a directory sorted by bytes, a directory
/// before its content.
#[derive(Debug)]
struct Walk {
    root: PathBuf,
    own: Arc<Own>,
    levels: Vec<Level>,
    /// The memory of the names in bytes.
    held: usize,
}

/// A directory on the current path.
#[derive(Debug)]
struct Level {
    rel: Vec<u8>,
    device: u64,
    names: Names,
    /// The number of names that were returned.
    returned: usize,
}

/// Sorted names of a directory in one buffer; millions of small allocations would cost more.
#[derive(Debug, Default)]
struct Names {
    bytes: Vec<u8>,
    list: Vec<Name>,
    /// Whether the directory has more names after the last of these.
    more: bool,
}

#[derive(Debug, Clone, Copy)]
struct Name {
    start: u32,
    len: u16,
    kind: FileType,
}

impl Names {
    fn get(&self, name: &Name) -> &[u8] {
        &self.bytes[name.start as usize..name.start as usize + usize::from(name.len)]
    }

    fn last(&self) -> Option<&[u8]> {
        self.list.last().map(|name| self.get(name))
    }

    fn cost(&self) -> usize {
        self.bytes.len() + self.list.len() * NAME_OVERHEAD_BYTES
    }

    fn push(&mut self, name: &[u8], kind: FileType) {
        // The names of a directory fit the budget of the walk, and a name fits the limit of the
        // filesystem, so the casts are safe.
        self.list.push(Name {
            start: self.bytes.len() as u32,
            len: name.len() as u16,
            kind,
        });
        self.bytes.extend_from_slice(name);
    }

    fn sort(&mut self) {
        let (bytes, of) = (&self.bytes, |n: &Name| {
            n.start as usize..n.start as usize + usize::from(n.len)
        });
        self.list
            .sort_unstable_by(|a, b| bytes[of(a)].cmp(&bytes[of(b)]));
    }

    /// Keeps the smaller half.
    fn halve(&mut self) {
        self.sort();
        let mut kept = Self {
            more: true,
            ..Self::default()
        };
        for name in &self.list[..self.list.len() / 2] {
            kept.push(self.get(name), name.kind);
        }
        *self = kept;
    }
}

impl Walk {
    fn new(root: PathBuf, own: Arc<Own>) -> Result<Self, Fault> {
        let mut walk = Self {
            root,
            own,
            levels: Vec::new(),
            held: 0,
        };
        walk.enter(b"")
            .at(format_args!("read the directory {}", walk.root.display()))?;
        Ok(walk)
    }

    /// Rejects a file of the current directory if it belongs to the daemon. Files on other devices
    /// than the daemon's are not checked.
    fn check_file(&self, full: &Path) -> io::Result<()> {
        match self.levels.last() {
            Some(level) if self.own.may_be_on(level.device) => {
                self.own.check(&fs::symlink_metadata(full)?)
            }
            _ => Ok(()),
        }
    }

    fn full(&self, rel: &[u8]) -> PathBuf {
        if rel.is_empty() {
            self.root.clone()
        } else {
            self.root.join(OsStr::from_bytes(rel))
        }
    }

    /// The next entry; `None` at the end. The content of a directory follows only if
    /// [`Walk::enter`] is called for it.
    fn step(&mut self) -> Result<Option<WalkEntry>, Fault> {
        while let Some(mut level) = self.levels.pop() {
            if let Some(name) = level.names.list.get(level.returned) {
                let mut rel = level.rel.clone();
                if !rel.is_empty() {
                    rel.push(b'/');
                }
                rel.extend_from_slice(level.names.get(name));
                let found = WalkEntry {
                    rel,
                    kind: name.kind,
                };
                level.returned += 1;
                self.levels.push(level);
                return Ok(Some(found));
            }
            self.held -= level.names.cost();
            if level.names.more {
                let after = level.names.last().map(<[u8]>::to_vec);
                drop(level.names); // before the next batch is read
                self.read(level.rel.clone(), after.as_deref())
                    .at(format_args!(
                        "read the directory {}",
                        self.full(&level.rel).display()
                    ))?;
            }
        }
        Ok(None)
    }

    /// Descends into the directory that was found last.
    fn enter(&mut self, rel: &[u8]) -> io::Result<()> {
        self.read(rel.to_vec(), None)
    }

    fn read(&mut self, rel: Vec<u8>, after: Option<&[u8]>) -> io::Result<()> {
        let budget =
            (WALK_NAMES_BYTES_MAX.saturating_sub(self.held) / 3 * 2).max(FOLDER_NAMES_BYTES_MIN);
        let (names, device) = read_names(&self.full(&rel), after, budget, &self.own)?;
        self.held += names.cost();
        self.levels.push(Level {
            rel,
            device,
            names,
            returned: 0,
        });
        Ok(())
    }
}

/// The smallest names of a directory after `after`, sorted, as many as fit in `budget` bytes.
fn read_names(
    folder: &Path,
    after: Option<&[u8]>,
    budget: usize,
    own: &Own,
) -> io::Result<(Names, u64)> {
    let mut names = Names::default();
    // Names from here on belong to a later batch.
    let mut bound: Option<Vec<u8>> = None;
    let (entries, _opened, device) = own.read_dir(folder)?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.as_bytes();
        if after.is_some_and(|after| name <= after) {
            continue;
        }
        if bound.as_deref().is_some_and(|bound| name >= bound) {
            continue;
        }
        names.push(name, entry.file_type()?);
        if names.cost() > budget && names.list.len() > 1 {
            names.halve();
            bound = names.last().map(<[u8]>::to_vec);
        }
    }
    names.sort();
    Ok((names, device))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;
    use base::fault::Code;

    fn put(path: &Path, bytes: &[u8]) {
        use std::io::Write;
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::File::create(path).unwrap().write_all(bytes).unwrap();
    }

    fn entries(path: &Path) -> Vec<SourceEntry> {
        let mut source = FilesSource::open(path).unwrap();
        std::iter::from_fn(|| source.next().unwrap()).collect()
    }

    #[test]
    fn a_directory_is_read_in_manifest_order_with_modes_links_and_empty_directories() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("set");
        put(&root.join("a/x.png"), b"12345");
        put(&root.join("a.txt"), b"");
        put(&root.join("线体3/面板_0001.png"), b"1");
        fs::create_dir(root.join("empty")).unwrap();
        put(&root.join("run.sh"), b"#!/bin/sh\n");
        fs::set_permissions(root.join("run.sh"), fs::Permissions::from_mode(0o4755)).unwrap();
        symlink("../run.sh", root.join("a/run")).unwrap();
        symlink("nowhere", root.join("dangling")).unwrap();
        let got = entries(&root);
        let paths: Vec<&str> = got.iter().map(|e| e.path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "a",
                "a/run",
                "a/x.png",
                "a.txt",
                "dangling",
                "empty",
                "run.sh",
                "线体3",
                "线体3/面板_0001.png"
            ]
        );
        assert!(
            got.windows(2).all(|w| w[0].path < w[1].path),
            "the order of RelPath"
        );
        assert!(matches!(&got[1].body, SourceBody::Symlink(t) if t == "../run.sh"));
        assert!(
            matches!(&got[2].body, SourceBody::File { size: 5, content: Content::File(p) } if p.ends_with("a/x.png"))
        );
        assert_eq!(got[6].mode, 0o755, "not set-user-id");
        assert!(matches!(got[5].body, SourceBody::Dir));
    }

    #[test]
    fn a_file_is_one_entry_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        put(&dir.path().join("model.safetensors"), b"abc");
        let got = entries(&dir.path().join("model.safetensors"));
        assert_eq!(got.len(), 1);
        assert_eq!(got[0].path.as_str(), "model.safetensors");
        assert_eq!(
            FilesSource::open(&dir.path().join("none"))
                .unwrap_err()
                .code,
            Code::NotFound
        );
    }

    #[test]
    fn all_offenders_are_reported_together() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        put(&root.join(OsStr::from_bytes(b"bad\xff.png")), b"");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.join("pipe"),
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
        let _socket = UnixListener::bind(root.join("socket")).unwrap();
        fs::create_dir_all(root.join("sub/deep")).unwrap();
        symlink("/etc/passwd", root.join("sub/absolute")).unwrap();
        symlink("../../out", root.join("sub/escapes")).unwrap();
        symlink("deep/../../fine", root.join("sub/fine")).unwrap();
        // Inside according to the text but outside in reality: `up` is a link, so a `..` after it
        // leads elsewhere.
        symlink("../..", root.join("sub/deep/up")).unwrap();
        symlink("deep/up/../x", root.join("sub/through")).unwrap();
        let fault = FilesSource::open(root).unwrap_err();
        assert_eq!(fault.code, Code::Integrity);
        for part in [
            "6 entries",
            "bad\u{fffd}.png (bad\\xff.png): its name is not UTF-8",
            "pipe: it is a named pipe",
            "socket: it is a socket",
            "sub/absolute: its link target /etc/passwd is an absolute path",
            "sub/escapes: its link target ../../out leaves the directory",
            "sub/through: its link target deep/up/../x uses '..' after something that is not a directory",
        ] {
            assert!(
                fault.message.contains(part),
                "{part:?} not in {}",
                fault.message
            );
        }
        assert!(!fault.message.contains("sub/fine"), "{}", fault.message);
    }

    #[test]
    fn the_list_of_offenders_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..50 {
            symlink("/", dir.path().join(format!("l{i:02}"))).unwrap();
        }
        let fault = FilesSource::open(dir.path()).unwrap_err();
        assert!(
            fault.message.contains("50 entries") && fault.message.ends_with("and 30 more"),
            "{}",
            fault.message
        );
    }

    #[test]
    fn unreadable_entries_are_not_allowed() {
        if rustix::process::geteuid().is_root() {
            eprintln!("skipped: root reads everything");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        put(&dir.path().join("secret.png"), b"x");
        fs::set_permissions(
            dir.path().join("secret.png"),
            fs::Permissions::from_mode(0o000),
        )
        .unwrap();
        let fault = FilesSource::open(dir.path()).unwrap_err();
        assert_eq!(fault.code, Code::NotAllowed);
        assert!(
            fault.message.contains("secret.png: it cannot be read"),
            "{}",
            fault.message
        );
    }

    #[test]
    fn changes_between_the_walks_are_detected() {
        let dir = tempfile::tempdir().unwrap();
        put(&dir.path().join("a"), b"x");
        put(&dir.path().join("b"), b"x");
        let mut source = FilesSource::open(dir.path()).unwrap();
        fs::remove_file(dir.path().join("a")).unwrap();
        let fault = source.next().unwrap_err();
        assert!(
            fault
                .message
                .contains("a cannot be published: it disappeared"),
            "{}",
            fault.message
        );
        fs::remove_file(dir.path().join("b")).unwrap();
        symlink("/etc", dir.path().join("b")).unwrap();
        assert!(source.next().unwrap_err().message.contains("absolute path"));
    }

    #[test]
    fn the_state_of_the_daemon_is_rejected_anywhere_in_the_tree() {
        let dir = tempfile::tempdir().unwrap();
        let (state, above) = (dir.path().join("above/state"), dir.path().join("above"));
        put(&state.join("identity/ca.pem"), b"key");
        put(&state.join("api-token"), b"token");
        put(&above.join("mine"), b"x");
        let own = Arc::new(Own::of_state(&state));
        let refused = |path: &Path| FilesSource::open_for(path, own.clone(), false).unwrap_err();
        for path in [
            &above,
            &state,
            &state.join("identity"),
            &state.join("api-token"),
        ] {
            let fault = refused(path);
            assert_eq!(fault.code, Code::NotAllowed, "{}", path.display());
            assert!(fault.message.contains("this daemon's own state"), "{fault}");
        }
        fs::create_dir(dir.path().join("other")).unwrap();
        fs::hard_link(state.join("api-token"), dir.path().join("other/innocent")).unwrap();
        assert!(
            refused(&dir.path().join("other"))
                .message
                .contains("innocent: it is part of this daemon's own state")
        );
        // The second walk checks again.
        let mut source =
            FilesSource::open_for(&dir.path().join("other/.."), Arc::default(), false).unwrap();
        let Input::Folder(walk) = &mut source.input else {
            unreachable!("a folder")
        };
        walk.own = own.clone();
        let fault = std::iter::from_fn(|| source.next().transpose())
            .find_map(Result::err)
            .unwrap();
        assert_eq!(fault.code, Code::NotAllowed, "{fault}");
        FilesSource::open_for(&above.join("mine"), own, false).unwrap();
    }

    #[test]
    fn a_directory_larger_than_the_budget_is_read_in_batches() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..500 {
            put(&dir.path().join(format!("{:03}", (i * 7) % 500)), b"");
        }
        let (mut got, mut after, mut batches) = (Vec::new(), None::<Vec<u8>>, 0);
        loop {
            let (names, _) = read_names(
                dir.path(),
                after.as_deref(),
                100 * (3 + NAME_OVERHEAD_BYTES),
                &Own::none(),
            )
            .unwrap();
            assert!(names.list.len() <= 100);
            after = names.last().map(<[u8]>::to_vec);
            got.extend(
                names
                    .list
                    .iter()
                    .map(|n| String::from_utf8(names.get(n).to_vec()).unwrap()),
            );
            batches += 1;
            if !names.more {
                break;
            }
        }
        assert_eq!(got, (0..500).map(|i| format!("{i:03}")).collect::<Vec<_>>());
        assert!(batches > 4);
    }
}

//! A directory or a single file as a source: datasets, operator projects and models.
//!
//! This module owns the walk and the rules for what can be published: names are UTF-8, links stay
//! inside the directory, there are no devices, pipes or sockets, and everything is readable.
//! [`FilesSource::open`] first walks the complete tree for these rules only, so that a publish is
//! rejected with a list of all offending entries before a byte is read. Then `ingest` drives the
//! second walk. Writes nothing, so a crash leaves nothing.
//!
//! The second walk uses `kept` to read what an artifact contains beside names and content, and
//! `lost` to count what it does not contain (owners, special mode bits, …). For `--strict` the first walk counts it too, so that a publish is rejected before any
//! content is read.
//!
//! `walk` lists the entries, `select` says which of them are published, and `settle` waits for files
//! that are still written to.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fs::{self, FileType, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use encoding_rs::Encoding;
use rustix::fs::Access;

use self::kept::{Keeps, Kept};
use self::lost::Lost;
use self::select::Selection;
use self::settle::Settle;
use self::walk::{Walk, WalkEntry, WalkOptions};
use super::{Content, FileIdentity, Source, SourceBody, SourceEntry};
use crate::own::{self, Own};
use base::fault::{Code, Fault, IoContext};
use base::job_progress::JobProgress;
use base::limits::OFFENDERS_LISTED_MAX;
use base::names::{RelPath, stays_inside};
use base::omitted::Omitted;
use content::manifest::{Attributes, KindInfo};

mod kept;
mod lost;
mod select;
mod settle;
mod walk;

/// The permission bits recorded for symbolic links, which have none.
const SYMLINK_MODE: u32 = 0o777;

/// How a directory or a file is read.
#[derive(Debug, Clone, Default)]
pub struct FilesOptions {
    /// The files of the daemon, which are never published.
    pub own: Arc<Own>,
    /// Whether everything that is left out is counted before the first entry, at the cost of
    /// reading the metadata of each file.
    pub count_first: bool,
    /// Patterns of entries that are left out, in the syntax of gitignore.
    pub exclude: Vec<String>,
    /// Whether links are followed: what a link leads to is published in its place.
    pub copy_links: bool,
    /// How long each file must have stayed unchanged before it is read.
    pub settle: Option<Duration>,
    /// The encoding of names that are not UTF-8.
    pub name_encoding: Option<String>,
    /// Whether modification times of files are part of the artifact.
    pub times: bool,
    /// Whether extended attributes of users are part of the artifact.
    pub xattrs: bool,
    /// Whether several names of one file in a directory stay one file.
    pub hard_links: bool,
    /// The job, which can be cancelled while it waits.
    pub job: Option<Arc<JobProgress>>,
}

/// Reads a directory, or one file, in manifest order.
#[derive(Debug)]
pub struct FilesSource {
    input: Input,
    lost: Lost,
    kept: Kept,
    settle: Option<Settle>,
    /// The result of the first walk; `None` after the first entry.
    first_count: Option<Omitted>,
    /// The bytes of all files, as the first walk found them.
    total: u64,
    /// The files that are never read.
    own: Arc<Own>,
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
        Self::open_for(path, &FilesOptions::default())
    }

    /// Like [`FilesSource::open`]. A daemon never publishes its own state: `not_allowed`, anywhere
    /// in the tree.
    pub fn open_for(path: &Path, options: &FilesOptions) -> Result<Self, Fault> {
        let encoding = options.name_encoding.as_deref().map(name_encoding);
        let walk = WalkOptions {
            own: options.own.clone(),
            selection: Arc::new(Selection::new(&options.exclude)?),
            follow: options.copy_links,
            encoding: encoding.transpose()?,
        };
        let keeps = Keeps {
            times: options.times,
            xattrs: options.xattrs,
            hard_links: options.hard_links,
        };
        let mut kept = Kept::new(keeps);
        let settle = options
            .settle
            .map(|time| Settle::new(time, options.job.clone()));
        // Resolved once: no component of the root is a link, so what is opened later is what was
        // checked.
        let root = fs::canonicalize(path).at(format_args!("open {}", path.display()))?;
        options.own.check_path(&root)?;
        let meta = fs::metadata(&root).at(format_args!("open {}", path.display()))?;
        if meta.is_dir() {
            let mut first = options
                .count_first
                .then(|| Lost::of_folder(&root, &meta, keeps));
            let checked = refuse_offenders(&root, &walk, settle.as_ref(), first.as_mut())?;
            let (first_count, lost) = (
                first.map(|lost| {
                    let mut omitted = lost.omitted().clone();
                    omitted.merge(checked.excluded);
                    omitted
                }),
                Lost::of_folder(&root, &meta, keeps),
            );
            return Ok(Self {
                input: Input::Folder(Walk::new(&root, walk)?),
                lost,
                kept,
                settle,
                first_count,
                total: checked.bytes,
                own: options.own.clone(),
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
        let name = match walk.encoding {
            Some(encoding) => walk::decoded(name.as_bytes(), encoding)
                .map_or(name.as_bytes().to_vec(), |name| name.into_owned().into()),
            None => name.as_bytes().to_vec(),
        };
        let rel = rel_path(&name).map_err(|why| {
            Fault::integrity(format!("{} cannot be published: {why}", printable(&name)))
        })?;
        let meta = match &settle {
            Some(settle) => settle.wait(&root, meta)?,
            None => meta,
        };
        let lost = Lost::of_file(rel.as_str(), &root, &meta, keeps);
        let attributes = kept.of_file(&root, &meta)?;
        let total = meta.len();
        Ok(Self {
            input: Input::File(Some(file_entry(rel, &meta, root, attributes))),
            lost,
            kept,
            settle,
            first_count: None,
            total,
            own: options.own.clone(),
        })
    }
}

/// The text of a name in this encoding.
pub fn name_text<'a>(name: &'a [u8], encoding: &str) -> Result<Cow<'a, str>, Fault> {
    walk::decoded(name, name_encoding(encoding)?)
        .or_else(|| std::str::from_utf8(name).ok().map(Cow::from))
        .ok_or_else(|| {
            Fault::usage(format!(
                "{} is neither UTF-8 nor {encoding}",
                printable(name)
            ))
        })
}

/// The path on the disk with this text, if its names may be in this encoding.
pub fn path_on_disk(text: &str, encoding: &str) -> Result<PathBuf, Fault> {
    let encoding = name_encoding(encoding)?;
    let mut path = PathBuf::from("/");
    for name in text.split('/').filter(|name| !name.is_empty()) {
        let plain = path.join(name);
        path = if fs::symlink_metadata(&plain).is_ok() {
            plain
        } else {
            let (encoded, ..) = encoding.encode(name);
            path.join(OsStr::from_bytes(&encoded))
        };
    }
    Ok(path)
}

/// The encoding of names with this label.
fn name_encoding(label: &str) -> Result<&'static Encoding, Fault> {
    Encoding::for_label(label.as_bytes())
        .filter(|encoding| encoding.is_ascii_compatible())
        .ok_or_else(|| {
            let shown: String = label.chars().take(60).collect();
            Fault::usage(format!("{shown:?} is not an encoding of file names"))
                .with_next("use one of the WHATWG labels, such as gbk, big5, shift_jis or euc-kr")
        })
}

impl Source for FilesSource {
    fn next(&mut self) -> Result<Option<SourceEntry>, Fault> {
        self.first_count = None;
        self.lost.finish_pending();
        match &mut self.input {
            Input::File(entry) => Ok(entry.take()),
            Input::Folder(walk) => {
                next_entry(walk, &mut self.lost, &mut self.kept, self.settle.as_ref())
            }
        }
    }

    fn total(&self) -> Option<u64> {
        Some(self.total)
    }

    fn info(&self) -> KindInfo {
        KindInfo::Files
    }

    fn opened(&mut self, file: &fs::File) -> Result<(), Fault> {
        self.own.allow_opened(file)?;
        self.lost.opened(file);
        Ok(())
    }

    fn omitted(&self) -> Omitted {
        if let Some(first) = &self.first_count {
            return first.clone();
        }
        let mut omitted = self.lost.omitted().clone();
        if let Input::Folder(walk) = &self.input {
            omitted.merge(walk.excluded().clone());
        }
        omitted
    }
}

fn file_entry(
    path: RelPath,
    meta: &Metadata,
    file: PathBuf,
    attributes: Attributes,
) -> SourceEntry {
    let identity = Some(FileIdentity::new(Arc::new(file.clone()), meta));
    SourceEntry {
        path,
        mode: mode(meta),
        body: SourceBody::File {
            size: meta.len(),
            content: Content::File(file),
        },
        identity,
        attributes,
    }
}

/// Set-user-ID and similar bits of files are not published. All bits of directories are recorded,
/// because the digest of existing directories must not change. A site never sets more than 0777.
fn mode(meta: &Metadata) -> u32 {
    meta.permissions().mode() & if meta.is_dir() { 0o7777 } else { 0o777 }
}

/// The next entry of the second walk. The tree may have changed since the first walk, so all rules
/// are checked again.
fn next_entry(
    walk: &mut Walk,
    lost: &mut Lost,
    kept: &mut Kept,
    settle: Option<&Settle>,
) -> Result<Option<SourceEntry>, Fault> {
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
    let disappeared = || {
        refuse("it disappeared while the directory was read".into())
            .with_next("publish again after all writers have finished")
    };
    let path = rel_path(&found.rel).map_err(refuse)?;
    if let Some(why) = &found.broken {
        return Err(refuse(why.clone()));
    }
    let full = &found.full;
    let mut meta = match fs::symlink_metadata(full) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(disappeared()),
        Err(error) => return Err(Fault::io(format_args!("read {}", full.display()), &error)),
    };
    if let Some(what) = special(meta.file_type()) {
        return Err(refuse(format!("it is {what}")));
    }
    // Before anything is read from it.
    walk.options
        .own
        .check(&meta)
        .map_err(|_| own::refusal(full))?;
    if let Some(settle) = settle.filter(|_| meta.is_file()) {
        meta = settle.wait(full, meta).map_err(|fault| match fault.code {
            Code::NotFound => disappeared(),
            _ => fault,
        })?;
    }
    lost.note(path.as_str(), full, &meta);
    let attributes = kept.of(&path, full, &meta)?;
    if meta.is_dir() {
        walk.enter(&found.rel, full)
            .at(format_args!("read the directory {}", full.display()))?;
        return Ok(Some(SourceEntry {
            path,
            mode: mode(&meta),
            body: SourceBody::Dir,
            identity: None,
            attributes,
        }));
    }
    if meta.is_symlink() {
        let target = link_target(walk, &found).map_err(refuse)?;
        return Ok(Some(SourceEntry {
            path,
            mode: SYMLINK_MODE,
            body: SourceBody::Symlink(target),
            identity: None,
            attributes,
        }));
    }
    Ok(Some(file_entry(path, &meta, found.full, attributes)))
}

/// The result of the first walk.
struct Checked {
    excluded: Omitted,
    /// The bytes of all files.
    bytes: u64,
}

/// The first walk: finds by metadata everything that cannot be published, waits for files that are
/// written to, adds up the bytes, and counts what is left out if requested.
fn refuse_offenders(
    root: &Path,
    options: &WalkOptions,
    settle: Option<&Settle>,
    mut lost: Option<&mut Lost>,
) -> Result<Checked, Fault> {
    let mut offenders = Offenders::default();
    let mut bytes = 0u64;
    let mut walk = Walk::new(root, options.clone())?;
    while let Some(found) = walk.step()? {
        let full = &found.full;
        let path = rel_path(&found.rel);
        if let (Ok(path), Some(lost)) = (&path, lost.as_deref_mut())
            && let Ok(meta) = fs::symlink_metadata(full)
        {
            lost.note(path.as_str(), full, &meta);
            lost.finish_pending();
        }
        if let Some(why) = &found.broken {
            offenders.add(&found.rel, why);
        } else if let Err(why) = path {
            offenders.add(&found.rel, &why); // its content would only repeat the problem
        } else if let Some(what) = special(found.kind) {
            offenders.add(&found.rel, &format!("it is {what}"));
        } else if found.kind.is_symlink() {
            if let Err(why) = link_target(&walk, &found) {
                offenders.add(&found.rel, &why);
            }
        } else if found.kind.is_dir() {
            if let Err(error) = walk.enter(&found.rel, full) {
                offenders.add_unreadable(&found.rel, &error);
            }
        } else {
            let meta = match readable(full).and_then(|()| walk.check_file(full)) {
                Ok(meta) => meta,
                Err(error) => {
                    offenders.add_unreadable(&found.rel, &error);
                    continue;
                }
            };
            let meta = match settle {
                Some(settle) => match settle.wait(full, meta) {
                    // It was renamed when it was complete, and the second walk finds it.
                    Err(fault) if fault.code == Code::NotFound => continue,
                    settled => settled?,
                },
                None => meta,
            };
            bytes = bytes.saturating_add(meta.len());
        }
    }
    offenders.finish(root)?;
    Ok(Checked {
        excluded: walk.excluded().clone(),
        bytes,
    })
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
            Fault::integrity(message).with_next(
                "rename, correct or move these entries, or exclude them (--exclude); for links that leave the directory, see --copy-links; for names that are not UTF-8, --name-encoding",
            )
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

/// The target of a link, or the reason why it cannot be published.
fn link_target(walk: &Walk, link: &WalkEntry) -> Result<String, String> {
    let target = fs::read_link(&link.full).map_err(|e| format!("the link cannot be read: {e}"))?;
    let target = target.as_os_str().as_bytes();
    let decoded = walk
        .options
        .encoding
        .and_then(|encoding| walk::decoded(target, encoding));
    let text = match &decoded {
        Some(text) => text,
        None => std::str::from_utf8(target)
            .map_err(|_| format!("it links to {}, which is not UTF-8", printable(target)))?,
    };
    // Each directory by itself: a link on the way would be followed.
    let is_folder = |path: &[&str], known: usize| {
        (known + 1..=path.len()).all(|to| {
            let path = walk.on_disk(&path[..to].join("/"));
            fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir())
        })
    };
    stays_inside(&rel_path(&link.rel)?, text, is_folder)
        .map_err(|why| format!("its link target {} {why}", printable(target)))?;
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests;

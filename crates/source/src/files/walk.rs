//! A walk over a directory in manifest order: depth first, the names of a directory sorted by
//! bytes, a directory before its content.
//!
//! Entries that the [`Selection`] leaves out are counted and not returned. With `follow`, a link is
//! returned as what it leads to. Names that are not UTF-8 are decoded if the user stated their
//! encoding; the order is that of the decoded names.
//!
//! Memory does not grow with the tree: the directories on the current path hold only as many names
//! as fit a budget that the whole walk shares. A directory with more names is read again for the
//! next batch.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fs::{self, FileType, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use encoding_rs::Encoding;

use super::select::{self, IgnoreFile, Selection};
use crate::own::Own;
use base::fault::{Fault, IoContext};
use base::limits::WALK_NAMES_BYTES_MAX;
use base::omitted::{Category, Omitted};

/// The smallest budget for the names of one directory of a walk in bytes, at any depth.
const FOLDER_NAMES_BYTES_MIN: usize = 64 << 10;
/// The memory overhead of a name.
pub(super) const NAME_OVERHEAD_BYTES: usize = size_of::<Name>();

/// An entry that a walk found.
#[derive(Debug)]
pub(super) struct WalkEntry {
    /// The path below the root in the artifact, not checked yet.
    pub(super) rel: Vec<u8>,
    /// The path on the disk. If links are followed, it contains none.
    pub(super) full: PathBuf,
    /// If links are followed, the type of what a link leads to.
    pub(super) kind: FileType,
    /// Why it cannot be published: a link that cannot be followed, or a name that occurs twice.
    pub(super) broken: Option<String>,
}

/// How a walk reads.
#[derive(Debug, Clone, Default)]
pub(super) struct WalkOptions {
    pub(super) own: Arc<Own>,
    pub(super) selection: Arc<Selection>,
    /// Whether links are followed.
    pub(super) follow: bool,
    /// The encoding of names that are not UTF-8.
    pub(super) encoding: Option<&'static Encoding>,
}

#[derive(Debug)]
pub(super) struct Walk {
    pub(super) root: PathBuf,
    pub(super) options: WalkOptions,
    levels: Vec<Level>,
    /// The memory of the names in bytes.
    held: usize,
    /// The entries that the selection left out.
    excluded: Omitted,
}

/// A directory on the current path.
#[derive(Debug)]
struct Level {
    rel: Vec<u8>,
    full: PathBuf,
    /// The device and the inode.
    id: (u64, u64),
    ignore: Option<IgnoreFile>,
    names: Names,
    /// The number of names that were returned.
    returned: usize,
}

/// Sorted names of a directory in one buffer; millions of small allocations would cost more.
#[derive(Debug, Default)]
pub(super) struct Names {
    bytes: Vec<u8>,
    pub(super) list: Vec<Name>,
    /// Whether the directory has more names after the last of these.
    pub(super) more: bool,
}

/// A name in the buffer. If it was decoded, a NUL and the original bytes follow it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Name {
    start: u32,
    len: u16,
    /// The length with the original bytes.
    all: u16,
    kind: FileType,
}

impl Names {
    /// The name in the artifact.
    pub(super) fn get(&self, name: &Name) -> &[u8] {
        &self.bytes[name.start as usize..name.start as usize + usize::from(name.len)]
    }

    /// The name on the disk.
    fn on_disk(&self, name: &Name) -> &[u8] {
        let all = self.key(name);
        all.get(usize::from(name.len) + 1..).unwrap_or(all)
    }

    /// What the order depends on: no two names of a directory have the same key.
    fn key(&self, name: &Name) -> &[u8] {
        &self.bytes[name.start as usize..name.start as usize + usize::from(name.all)]
    }

    pub(super) fn last(&self) -> Option<&[u8]> {
        self.list.last().map(|name| self.key(name))
    }

    fn cost(&self) -> usize {
        self.bytes.len() + self.list.len() * NAME_OVERHEAD_BYTES
    }

    fn push(&mut self, key: &[u8], len: usize, kind: FileType) {
        // The names of a directory fit the budget of the walk, and a name fits the limit of the
        // filesystem, so the casts are safe.
        self.list.push(Name {
            start: self.bytes.len() as u32,
            len: len as u16,
            all: key.len() as u16,
            kind,
        });
        self.bytes.extend_from_slice(key);
    }

    fn sort(&mut self) {
        let (bytes, of) = (&self.bytes, |n: &Name| {
            n.start as usize..n.start as usize + usize::from(n.all)
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
            kept.push(self.key(name), usize::from(name.len), name.kind);
        }
        *self = kept;
    }
}

impl Walk {
    pub(super) fn new(root: &Path, options: WalkOptions) -> Result<Self, Fault> {
        let mut walk = Self {
            root: root.to_owned(),
            options,
            levels: Vec::new(),
            held: 0,
            excluded: Omitted::default(),
        };
        match walk.enter(b"", root) {
            Err(error) if select::is_wrong(&error) => {
                Err(Fault::integrity(format!("{}: {error}", root.display()))
                    .with_next("correct this file, or remove it"))
            }
            entered => entered.at(format_args!("read the directory {}", root.display())),
        }?;
        Ok(walk)
    }

    /// What the selection has left out so far.
    pub(super) fn excluded(&self) -> &Omitted {
        &self.excluded
    }

    /// The metadata of a file of the current directory. Rejects a file that belongs to the daemon;
    /// files on other devices than the daemon's are not checked.
    pub(super) fn check_file(&self, full: &Path) -> io::Result<Metadata> {
        let meta = fs::symlink_metadata(full)?;
        if let Some(level) = self.levels.last()
            && (self.options.own.may_be_on(level.id.0) || self.options.follow)
        {
            self.options.own.check(&meta)?;
        }
        Ok(meta)
    }

    /// The path on the disk of a path in the artifact, for the targets of links.
    pub(super) fn on_disk(&self, rel: &str) -> PathBuf {
        let plain = self.root.join(rel);
        match self.options.encoding {
            Some(encoding) if fs::symlink_metadata(&plain).is_err() => {
                let (encoded, _, _) = encoding.encode(rel);
                self.root.join(OsStr::from_bytes(&encoded))
            }
            _ => plain,
        }
    }

    /// The next entry; `None` at the end. The content of a directory follows only if
    /// [`Walk::enter`] is called for it.
    pub(super) fn step(&mut self) -> Result<Option<WalkEntry>, Fault> {
        while let Some(mut level) = self.levels.pop() {
            if let Some(name) = level.names.list.get(level.returned).copied() {
                let mut rel = level.rel.clone();
                if !rel.is_empty() {
                    rel.push(b'/');
                }
                rel.extend_from_slice(level.names.get(&name));
                let full = level
                    .full
                    .join(OsStr::from_bytes(level.names.on_disk(&name)));
                let is_repeated = level.returned > 0 && {
                    let before = &level.names.list[level.returned - 1];
                    level.names.get(before) == level.names.get(&name)
                };
                level.returned += 1;
                self.levels.push(level);
                let mut found = self.found(rel, full, name.kind);
                if is_repeated {
                    found.broken = Some("another entry has this name in another encoding".into());
                }
                let path = Path::new(OsStr::from_bytes(&found.rel));
                let files = self.levels.iter().rev().filter_map(|l| l.ignore.as_ref());
                let is_dir = found.kind.is_dir();
                match self.options.selection.excluded_by(files, path, is_dir) {
                    None => return Ok(Some(found)),
                    Some(by) => {
                        let example = self.excluded.wants_example(Category::Excluded).then(|| {
                            let slash = if is_dir { "/" } else { "" };
                            format!("{}{slash} ({by})", path.display())
                        });
                        self.excluded.add_many(Category::Excluded, 1, example);
                        continue;
                    }
                }
            }
            self.held -= level.names.cost();
            if level.names.more {
                let after = level.names.last().map(<[u8]>::to_vec);
                drop(std::mem::take(&mut level.names)); // before the next batch is read
                let what = level.full.display().to_string();
                let names = self
                    .read(&level.full, after.as_deref())
                    .at(format_args!("read the directory {what}"))?
                    .0;
                self.levels.push(Level {
                    names,
                    returned: 0,
                    ..level
                });
            }
        }
        Ok(None)
    }

    fn found(&self, rel: Vec<u8>, full: PathBuf, kind: FileType) -> WalkEntry {
        let plain = |full, broken| WalkEntry {
            rel: rel.clone(),
            full,
            kind,
            broken,
        };
        if !kind.is_symlink() || !self.options.follow {
            return plain(full, None);
        }
        match self.follow(&full) {
            Ok((target, kind)) => WalkEntry {
                rel,
                full: target,
                kind,
                broken: None,
            },
            Err(why) => plain(full, Some(why)),
        }
    }

    /// Where a link leads, and the type of what is there.
    fn follow(&self, full: &Path) -> Result<(PathBuf, FileType), String> {
        let cannot = |error: io::Error| format!("the link cannot be followed: {error}");
        let target = fs::canonicalize(full).map_err(cannot)?;
        self.options
            .own
            .check_path(&target)
            .map_err(|fault| fault.message)?;
        let meta = fs::symlink_metadata(&target).map_err(cannot)?;
        let is_above = self.levels.iter().any(|level| level.id == id(&meta));
        if meta.is_dir() && is_above {
            return Err(format!(
                "it links to {}, which contains the link",
                target.display()
            ));
        }
        Ok((target, meta.file_type()))
    }

    /// Descends into the directory that was found last.
    pub(super) fn enter(&mut self, rel: &[u8], full: &Path) -> io::Result<()> {
        let (names, id) = self.read(full, None)?;
        let ignore = IgnoreFile::read(full, rel, &self.options.own)?;
        self.levels.push(Level {
            rel: rel.to_vec(),
            full: full.to_owned(),
            id,
            ignore,
            names,
            returned: 0,
        });
        Ok(())
    }

    fn read(&mut self, full: &Path, after: Option<&[u8]>) -> io::Result<(Names, (u64, u64))> {
        let budget =
            (WALK_NAMES_BYTES_MAX.saturating_sub(self.held) / 3 * 2).max(FOLDER_NAMES_BYTES_MIN);
        let (names, id) = read_names(full, after, budget, &self.options)?;
        self.held += names.cost();
        Ok((names, id))
    }
}

fn id(meta: &Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

/// The text of a name or of the target of a link, if it must be decoded and can be.
pub(super) fn decoded<'a>(bytes: &'a [u8], encoding: &'static Encoding) -> Option<Cow<'a, str>> {
    let separators = |text: &[u8]| text.iter().filter(|b| matches!(b, b'/' | 0)).count();
    // Text in another encoding is rarely valid UTF-8, except pairs of bytes that are also letters
    // of European and Arabic scripts.
    let is_utf8 = |text: &str| text.is_ascii() || text.chars().any(|c| c.len_utf8() > 2);
    if std::str::from_utf8(bytes).is_ok_and(is_utf8) {
        return None;
    }
    encoding
        .decode_without_bom_handling_and_without_replacement(bytes)
        .filter(|text| separators(text.as_bytes()) == separators(bytes))
}

/// The smallest names of a directory after `after`, sorted, as many as fit in `budget` bytes. Also
/// returns the device and the inode of the directory.
pub(super) fn read_names(
    folder: &Path,
    after: Option<&[u8]>,
    budget: usize,
    options: &WalkOptions,
) -> io::Result<(Names, (u64, u64))> {
    let mut names = Names::default();
    // Names from here on belong to a later batch.
    let mut bound: Option<Vec<u8>> = None;
    let (entries, opened, _) = options.own.read_dir(folder)?;
    let mut key = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.as_bytes();
        key.clear();
        let text = options
            .encoding
            .and_then(|encoding| decoded(name, encoding));
        let len = match text {
            Some(text) => {
                key.extend_from_slice(text.as_bytes());
                key.push(0);
                key.extend_from_slice(name);
                text.len()
            }
            None => {
                key.extend_from_slice(name);
                name.len()
            }
        };
        if after.is_some_and(|after| key.as_slice() <= after) {
            continue;
        }
        if bound
            .as_ref()
            .is_some_and(|bound| key.as_slice() >= bound.as_slice())
        {
            continue;
        }
        names.push(&key, len, entry.file_type()?);
        if names.cost() > budget && names.list.len() > 1 {
            names.halve();
            bound = names.last().map(<[u8]>::to_vec);
        }
    }
    names.sort();
    Ok((names, id(&opened.metadata()?)))
}

//! What links and hard links require of other entries of a manifest, which may come later: a
//! directory, or a file with a certain content.
//!
//! Each requirement is two keyed hashes of 128 bits, of the path and of what must be there, so that
//! its memory does not depend on the lengths of paths. A table holds as many as fit in 2 MiB. When
//! it is full, the requirements are divided into parts by the hash of their path, and the table
//! keeps those of the first part; further walks over the manifest look at the other parts.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, DefaultHasher, Hasher, RandomState};

use super::super::walk::malformed_manifest;
use super::{Entry, EntryBody};
use crate::manifest::FileInfo;
use base::fault::Fault;
use base::names::{RelPath, stays_inside};

/// The requirements in the table: with seven eighths of its slots used, a table of 33 bytes a slot
/// has 2.1 MiB.
const TOGETHER_MAX: usize = 7 << 13;
/// The largest number of parts, so that a manifest may have about 900,000 requirements: more than
/// the hard links that a publish keeps. Each part is two walks.
const PARTS_MAX: u32 = 16;

/// A keyed hash that finds no collision for anybody who does not know the keys.
type Key = u128;

/// The keys of the hashes, chosen for each check.
#[derive(Default)]
struct Keys(RandomState, RandomState);

/// The hash of a path, component by component.
#[derive(Clone)]
struct PathHash(DefaultHasher, DefaultHasher);

impl Keys {
    fn hasher(&self) -> PathHash {
        PathHash(self.0.build_hasher(), self.1.build_hasher())
    }

    fn path(&self, path: &RelPath) -> Key {
        let mut hash = self.hasher();
        path.components().for_each(|name| hash.enter(name));
        hash.key()
    }

    fn file(&self, file: &FileInfo) -> Key {
        let mut hash = self.hasher();
        hash.write(&file.size.to_le_bytes());
        hash.write(&file.hash.0);
        hash.key()
    }

    /// Of a directory. The hash of a file has more input.
    fn directory(&self) -> Key {
        self.hasher().key()
    }
}

impl PathHash {
    fn write(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
        self.1.write(bytes);
    }

    fn enter(&mut self, name: &str) {
        self.write(name.as_bytes());
        self.write(b"/");
    }

    fn key(&self) -> Key {
        (Key::from(self.0.finish()) << 64) | Key::from(self.1.finish())
    }
}

/// What the entries of a manifest must be, as far as they were seen.
pub(super) struct Expected {
    keys: Keys,
    /// What must be at a path.
    at: HashMap<Key, Key>,
    /// Requirements are divided into so many parts, and the table has those of this part.
    parts: u32,
    part: u32,
    together_max: usize,
}

impl Default for Expected {
    fn default() -> Self {
        Self::with_table_of(TOGETHER_MAX)
    }
}

fn wrong_hard_link(path: &RelPath) -> Fault {
    malformed_manifest(&format!(
        "the hard link {:?} does not have the content of a file of the artifact",
        path.as_str()
    ))
}

/// The fault of a link with a directory whose key is in `wrong`, and that is none.
fn no_directory(
    keys: &Keys,
    link: &RelPath,
    target: &str,
    wrong: impl Fn(Key) -> bool,
) -> Result<(), Fault> {
    let mut found = None;
    each_folder(keys, link, target, |key, folder| {
        if found.is_none() && wrong(key) {
            found = Some(folder.join("/"));
        }
    })?;
    match found {
        None => Ok(()),
        Some(folder) => Err(malformed_manifest(&format!(
            "the link {:?} uses '..' after {folder:?}, which is not a directory",
            link.as_str()
        ))),
    }
}

impl Expected {
    pub(super) fn with_table_of(together_max: usize) -> Self {
        Self {
            keys: Keys::default(),
            at: HashMap::new(),
            parts: 1,
            part: 0,
            together_max,
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.at.len()
    }

    /// Adds what an entry requires of others.
    pub(super) fn note(&mut self, entry: &Entry) -> Result<(), Fault> {
        match (&entry.body, &entry.attributes.hard_link) {
            (EntryBody::Symlink(target), _) => {
                let (directory, mut folders) = (self.keys.directory(), Vec::new());
                each_folder(&self.keys, &entry.path, target, |key, _| folders.push(key))?;
                for folder in folders {
                    if !self.require(folder, directory)? {
                        no_directory(&self.keys, &entry.path, target, |key| key == folder)?;
                    }
                }
            }
            (EntryBody::File(file), Some(first)) => {
                let (at, what) = (self.keys.path(first), self.keys.file(file));
                if !self.require(at, what)? {
                    return Err(wrong_hard_link(&entry.path));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether what is required does not contradict another requirement: two files, or a file and a
    /// directory, cannot be at one path.
    fn require(&mut self, at: Key, what: Key) -> Result<bool, Fault> {
        if !is_in_part(at, self.parts, self.part) {
            return Ok(true);
        }
        if let Some(before) = self.at.get(&at) {
            return Ok(*before == what);
        }
        if self.at.len() == self.together_max {
            self.parts *= 2;
            if self.parts > PARTS_MAX {
                return Err(malformed_manifest(
                    "it has too many hard links, or links that use '..'",
                ));
            }
            // Drained, because single removals would leave slots that cannot be used again.
            let (parts, part) = (self.parts, self.part);
            let all = self.at.drain();
            let kept: Vec<_> = all.filter(|(at, _)| is_in_part(*at, parts, part)).collect();
            self.at.extend(kept);
            return self.require(at, what);
        }
        if self.at.len() == self.at.capacity() && self.at.len() >= self.together_max / 32 {
            // At once: while a table grows, the smaller one exists too.
            self.at.reserve(self.together_max - self.at.len());
        }
        self.at.insert(at, what);
        Ok(true)
    }

    /// Checks all requirements, after every entry was passed to [`Expected::note`] once. `walk`
    /// passes every entry of the manifest to its argument, until that returns `false`.
    pub(super) fn check(
        mut self,
        mut walk: impl FnMut(&mut dyn FnMut(&Entry) -> Result<bool, Fault>) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        loop {
            if !self.at.is_empty() {
                walk(&mut |entry| {
                    self.meet(entry);
                    Ok(!self.at.is_empty())
                })?;
            }
            if !self.at.is_empty() {
                walk(&mut |entry| self.explain(entry).map(|()| true))?;
                return Err(malformed_manifest("a link refers to an entry that changed"));
            }
            self.part += 1;
            self.at = HashMap::new();
            if self.part >= self.parts {
                return Ok(());
            }
            walk(&mut |entry| self.note(entry).map(|()| true))?;
        }
    }

    /// Removes the requirement that an entry meets.
    fn meet(&mut self, entry: &Entry) {
        let what = match &entry.body {
            EntryBody::Dir => self.keys.directory(),
            EntryBody::File(file) if entry.attributes.hard_link.is_none() => self.keys.file(file),
            EntryBody::File(_) | EntryBody::Symlink(_) => return,
        };
        let at = self.keys.path(&entry.path);
        if self.at.get(&at) == Some(&what) {
            self.at.remove(&at);
        }
    }

    /// Returns the fault of an entry with a requirement that is left in the table.
    fn explain(&self, entry: &Entry) -> Result<(), Fault> {
        let is_left = |key: Key| self.at.contains_key(&key);
        match (&entry.body, &entry.attributes.hard_link) {
            (EntryBody::Symlink(target), _) => {
                no_directory(&self.keys, &entry.path, target, is_left)
            }
            (EntryBody::File(_), Some(first)) if is_left(self.keys.path(first)) => {
                Err(wrong_hard_link(first))
            }
            _ => Ok(()),
        }
    }
}

fn is_in_part(at: Key, parts: u32, part: u32) -> bool {
    at as u32 % parts == part
}

/// Passes each directory that a link leaves by `..` to `take`. The cost is linear in the length of
/// the texts.
fn each_folder(
    keys: &Keys,
    link: &RelPath,
    target: &str,
    mut take: impl FnMut(Key, &[&str]),
) -> Result<(), Fault> {
    // The hash of the path up to each component, as far as it was looked at.
    let mut hashes: Vec<PathHash> = Vec::new();
    let inside = stays_inside(link, target, |folder, known| {
        // Whether it is a directory is known after all entries were seen.
        hashes.truncate(known);
        for name in &folder[hashes.len()..] {
            let mut hash = hashes.last().cloned().unwrap_or_else(|| keys.hasher());
            hash.enter(name);
            hashes.push(hash);
        }
        if let Some(hash) = hashes.last() {
            take(hash.key(), folder);
        }
        true
    });
    inside.map_err(|why| {
        malformed_manifest(&format!(
            "the target {target:?} of the link {:?} {why}",
            link.as_str()
        ))
    })
}

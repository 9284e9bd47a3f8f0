//! Walks a manifest, entry by entry and chunk by chunk, holding one page of each level.

use std::collections::{HashSet, VecDeque};

use bytes::Bytes;

use crate::chunk::Hash;
use crate::fault::Fault;
use crate::names::RelPath;

use super::build::check_order;
use super::page::{ChunkRef, Record, is_one_chunk, read_children, read_records};
use super::{Entry, EntryBody, PageRef, Root, Totals};

/// The most levels of index pages. An index page lists 45 pages or more, but the last of its level: eight levels are more than
/// there can be bytes to list.
const DEPTH_MAX: u8 = 8;
/// The most pages that are listed by index pages that were opened before: some 3 TB of zeros at the least, 100 as a rule.
const REPEATED_PAGES_MAX: usize = 1 << 20;

/// Gives the raw bytes of a page; they are checked by whoever gives them.
pub trait Pages {
    /// The page of that name.
    fn page(&self, id: Hash) -> Result<Bytes, Fault>;
}

/// Where a chunk stands: what a fetch request names it by, and what the journal counts by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spot {
    /// The entry page that names it.
    pub page: Hash,
    /// Which of that page's chunks it is.
    pub index: u32,
    /// Which of the whole artifact's chunks it is.
    pub ordinal: u64,
    /// Where it begins in its file, bytes.
    pub offset: u64,
}

/// One step of a walk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// An entry begins.
    Entry {
        /// Which of the artifact's entries it is.
        number: u64,
        /// The entry.
        entry: Entry,
        /// For a file: the ordinal of its first chunk, and how many of its chunks this walk knows without looking
        /// ahead (1 for a file of one chunk, else unknown).
        first_ordinal: u64,
    },
    /// A chunk of the file that began last.
    Chunk(ChunkRef, Spot),
}

/// An iterator over all of a manifest.
pub struct Walk<'a, P: Pages + ?Sized> {
    pages: &'a P,
    root: &'a Root,
    /// Pages still to read, with their depth (0: entry page), next last.
    ahead: Vec<(PageRef, u8)>,
    unfolding: Unfolding,
    /// What is wrong with the root, until it is told.
    refused: Option<Fault>,
    steps: VecDeque<Step>,
    seen: Totals,
    entries: u64,
    last: Option<RelPath>,
    open: Vec<String>,
    /// Bytes of the last file that its chunks have not covered yet, and its size.
    uncovered: u64,
    size: u64,
    failed: bool,
}

impl<'a, P: Pages + ?Sized> Walk<'a, P> {
    /// A walk over all of it.
    pub fn new(root: &'a Root, pages: &'a P) -> Self {
        let ahead = root.pages.iter().rev().map(|page| (*page, root.depth)).collect();
        let refused = check_root(root).err();
        let (unfolding, steps, seen, last, open) = Default::default();
        Self { pages, root, ahead, unfolding, refused, steps, seen, entries: 0, last, open, uncovered: 0, size: 0, failed: false }
    }

    fn read(&mut self, page: PageRef, depth: u8) -> Result<(), Fault> {
        let bytes = read_page(self.pages, &page)?;
        if depth > 0 {
            let children = self.unfolding.open(&page, &bytes)?;
            self.ahead.extend(children.into_iter().rev().map(|child| (child, depth - 1)));
            return Ok(());
        }
        let (mut index, before) = (0, self.entries);
        for record in read_records(&bytes)? {
            match record {
                Record::Entry(entry) => self.entry(entry, page.id, &mut index)?,
                Record::Chunk(chunk) => self.chunk(chunk, page.id, &mut index)?,
            }
        }
        if (u64::from(index), self.entries - before) != (page.chunks, page.entries) {
            return Err(impossible("a page does not hold what is said of it where it is listed"));
        }
        Ok(())
    }

    fn entry(&mut self, entry: Entry, page: Hash, index: &mut u32) -> Result<(), Fault> {
        self.covered()?;
        check_order(self.last.as_ref(), &mut self.open, &entry)?;
        self.last = Some(entry.path.clone());
        let body = entry.body.clone();
        self.steps.push_back(Step::Entry { number: self.entries, entry, first_ordinal: self.seen.chunks });
        self.entries += 1;
        match body {
            EntryBody::Dir => self.seen.dirs += 1,
            EntryBody::Symlink(_) => self.seen.symlinks += 1,
            EntryBody::File(file) => {
                self.seen.files += 1;
                self.seen.bytes = self.seen.bytes.checked_add(file.size).ok_or_else(|| self.wrong("is larger than can be"))?;
                (self.uncovered, self.size) = (file.size, file.size);
                if is_one_chunk(&self.root.chunking, file.size) {
                    self.chunk(ChunkRef { id: file.hash, len: file.size as u32 }, page, index)?;
                }
            }
        }
        Ok(())
    }

    fn chunk(&mut self, chunk: ChunkRef, page: Hash, index: &mut u32) -> Result<(), Fault> {
        let len = u64::from(chunk.len);
        if len == 0 || len > self.uncovered {
            return Err(self.wrong("has chunks that are more than the file"));
        }
        let spot = Spot { page, index: *index, ordinal: self.seen.chunks, offset: self.size - self.uncovered };
        self.uncovered -= len;
        self.seen.chunks += 1;
        *index += 1;
        self.steps.push_back(Step::Chunk(chunk, spot));
        Ok(())
    }

    fn covered(&self) -> Result<(), Fault> {
        if self.uncovered == 0 { Ok(()) } else { Err(self.wrong("has chunks that are less than the file")) }
    }

    fn wrong(&self, why: &str) -> Fault {
        let path = self.last.as_ref().map_or("", |p| p.as_str());
        Fault::integrity(format!("the manifest entry {path:?} {why}")).with_next("publish the artifact again")
    }

    fn step(&mut self) -> Result<Option<Step>, Fault> {
        if let Some(fault) = self.refused.take() {
            return Err(fault);
        }
        loop {
            if let Some(step) = self.steps.pop_front() {
                return Ok(Some(step));
            }
            let Some((page, depth)) = self.ahead.pop() else { break };
            self.read(page, depth)?;
        }
        self.covered()?;
        if self.seen != self.root.totals {
            return Err(Fault::integrity("the manifest does not hold what its totals say").with_next("publish the artifact again"));
        }
        Ok(None)
    }
}

impl<P: Pages + ?Sized> Iterator for Walk<'_, P> {
    type Item = Result<Step, Fault>;
    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let step = self.step().transpose();
        self.failed = !matches!(step, Some(Ok(_)));
        step
    }
}

/// Opens index pages, and refuses a manifest that unfolds to far more than its bytes. An index page may be listed many times, as
/// where a file holds nothing but zeros for very long, and each time all below it is there once more for a few bytes.
#[derive(Default)]
struct Unfolding {
    opened: HashSet<Hash>,
    repeated: usize,
}

impl Unfolding {
    /// The pages that this one lists.
    fn open(&mut self, page: &PageRef, bytes: &[u8]) -> Result<Vec<PageRef>, Fault> {
        let children = read_children(bytes)?;
        add_up(&children, page.chunks.into(), page.entries.into())?;
        if !self.opened.insert(page.id) {
            self.repeated += children.len();
            if self.repeated > REPEATED_PAGES_MAX {
                return Err(impossible("its index pages are listed so often that it unfolds without end"));
            }
        }
        Ok(children)
    }
}

/// The page, if it is as long as is said where it is listed: whoever receives it compares that.
fn read_page<P: Pages + ?Sized>(pages: &P, page: &PageRef) -> Result<Bytes, Fault> {
    let bytes = pages.page(page.id)?;
    if bytes.len() == page.len as usize {
        return Ok(bytes);
    }
    Err(impossible(&format!("page {} has {} bytes; where it is listed, it has {}", page.id, bytes.len(), page.len)))
}

fn impossible(why: &str) -> Fault {
    Fault::integrity(format!("the manifest is malformed: {why}")).with_next("publish the artifact again")
}

fn check_root(root: &Root) -> Result<(), Fault> {
    if root.depth > DEPTH_MAX {
        return Err(impossible(&format!("it has {} levels, over {DEPTH_MAX}", root.depth)));
    }
    let totals = &root.totals;
    let entries = u128::from(totals.files) + u128::from(totals.dirs) + u128::from(totals.symlinks);
    add_up(&root.pages, totals.chunks.into(), entries)
}

/// Every page holds something, and all together what the root or the page says that lists them.
fn add_up(listed: &[PageRef], chunks: u128, entries: u128) -> Result<(), Fault> {
    let (mut all_chunks, mut all_entries) = (0, 0);
    for page in listed {
        if page.chunks == 0 && page.entries == 0 {
            return Err(impossible("it lists a page that holds nothing"));
        }
        all_chunks += u128::from(page.chunks);
        all_entries += u128::from(page.entries);
    }
    if (all_chunks, all_entries) == (chunks, entries) { Ok(()) } else { Err(impossible("its counts do not add up")) }
}

/// Pages of one level that stand behind each other, and the index page that lists them (`None`: the root).
pub type Listed = (Option<Hash>, Vec<PageRef>);

/// The uppermost level of a manifest.
pub fn top_level(root: &Root) -> Result<Vec<Listed>, Fault> {
    check_root(root)?;
    Ok(vec![(None, root.pages.clone())])
}

/// The level below this one, in order; reads the index pages that this one consists of.
pub fn level_below(level: &[Listed], pages: &dyn Pages) -> Result<Vec<Listed>, Fault> {
    let mut unfolding = Unfolding::default();
    let mut below = Vec::new();
    for page in level.iter().flat_map(|(_, listed)| listed) {
        below.push((Some(page.id), unfolding.open(page, &read_page(pages, page)?)?));
    }
    Ok(below)
}

/// Calls `take` for every page of a manifest, index pages before what they list.
pub fn for_each_page(root: &Root, pages: &dyn Pages, mut take: impl FnMut(PageRef) -> Result<(), Fault>) -> Result<(), Fault> {
    let mut level = top_level(root)?;
    for depth in (0..=root.depth).rev() {
        for page in level.iter().flat_map(|(_, listed)| listed) {
            take(*page)?;
        }
        if depth > 0 {
            level = level_below(&level, pages)?;
        }
    }
    Ok(())
}

/// The entry pages of a manifest, in order; reads its index pages.
pub fn entry_pages(root: &Root, pages: &dyn Pages) -> Result<Vec<PageRef>, Fault> {
    let mut level = top_level(root)?;
    for _ in 0..root.depth {
        level = level_below(&level, pages)?;
    }
    Ok(level.into_iter().flat_map(|(_, listed)| listed).collect())
}

/// The children of one page, as a fetch request counts them: chunks of an entry page, pages of an index page.
pub fn children(page: &[u8], root: &Root) -> Result<Vec<ChunkRef>, Fault> {
    if page.first() == Some(&b'I') {
        return Ok(read_children(page)?.into_iter().map(|p| ChunkRef { id: p.id, len: p.len }).collect());
    }
    Ok(read_records(page)?
        .into_iter()
        .filter_map(|record| match record {
            Record::Chunk(chunk) => Some(chunk),
            Record::Entry(Entry { body: EntryBody::File(f), .. }) if is_one_chunk(&root.chunking, f.size) => {
                Some(ChunkRef { id: f.hash, len: f.size as u32 })
            }
            Record::Entry(_) => None,
        })
        .collect())
}

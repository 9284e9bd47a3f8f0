//! Walks a manifest, entry by entry and chunk by chunk, holding one page of each level.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use crate::chunk::Hash;
use base::fault::Fault;
use base::names::RelPath;

use super::build::check_order;
use super::page::{ChunkRef, LISTED_BYTES_MAX, Raw, Record, Records, is_one_chunk, read_children};
use super::{Entry, EntryBody, PageRef, Root, Totals};

/// The most levels of index pages. An index page lists 45 pages or more, but the last of its level:
/// eight levels are more than there can be bytes to list.
const DEPTH_MAX: u8 = 8;
/// The most pages that are listed by index pages that were opened before: some 470 GB of zeros at
/// the least, 14 TB as a rule.
const REPEATED_PAGES_MAX: usize = 1 << 17;
/// The most pages in a root: its bytes have room for fewer.
const ROOT_PAGES_MAX: usize = 16 << 10;
/// Pages of nothing but chunks that [`Walk::once_each`] remembers.
pub(super) const DIFFERENT_PAGES_KNOWN_MAX: usize = 64 << 10;

/// Gives the raw bytes of a page; they are checked by whoever gives them.
pub trait Pages {
    /// The page of that name.
    fn page(&self, id: Hash) -> Result<Bytes, Fault>;
}

/// Where a chunk stands: what a fetch request names it by, and what the journal counts by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkPosition {
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
        /// For a file: the ordinal of its first chunk, and how many of its chunks this walk knows
        /// without looking ahead (1 for a file of one chunk, else unknown).
        first_ordinal: u64,
    },
    /// A chunk of the file that began last.
    Chunk(ChunkRef, ChunkPosition),
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
    /// The entry page that is read now.
    page: Option<OpenPage>,
    /// The chunk of a file of one chunk that began last.
    only_chunk: Option<ChunkRef>,
    /// See [`Walk::once_each`].
    known: Known,
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
        Self::once_each(root, pages, 0)
    }

    /// A walk that leaves out the chunks of a page that holds nothing else and was read before, and
    /// only counts them: of a manifest that lists such a page very often it costs what its pages
    /// have bytes. Up to `known_max` of those pages are remembered.
    pub(super) fn once_each(root: &'a Root, pages: &'a P, known_max: usize) -> Self {
        let ahead = root
            .pages
            .iter()
            .rev()
            .map(|page| (*page, root.depth))
            .collect();
        let refused = check_root(root).err();
        let known = Known {
            pages: HashMap::new(),
            max: known_max,
        };
        let (unfolding, page, only_chunk, seen, entries, last, open, uncovered, size, failed) =
            Default::default();
        Self {
            pages,
            root,
            ahead,
            unfolding,
            refused,
            page,
            only_chunk,
            known,
            seen,
            entries,
            last,
            open,
            uncovered,
            size,
            failed,
        }
    }

    fn open(&mut self, page: PageRef, depth: u8) -> Result<(), Fault> {
        if depth == 0
            && let Some(&(chunks, bytes)) = self.known.pages.get(&page.id)
        {
            if (page.chunks, page.entries) != (chunks, 0) {
                return Err(other_than_listed());
            }
            self.uncovered = self
                .uncovered
                .checked_sub(bytes)
                .ok_or_else(|| self.wrong("has chunks that are more than the file"))?;
            self.seen.chunks += chunks;
            return Ok(());
        }
        let bytes = read_page(self.pages, &page)?;
        if depth > 0 {
            let children = self.unfolding.open(&page, &bytes)?;
            self.ahead
                .extend(children.into_iter().rev().map(|child| (child, depth - 1)));
            return Ok(());
        }
        self.page = Some(OpenPage {
            listed: page,
            records: Records::new(bytes)?,
            index: 0,
            before: self.entries,
            bytes: 0,
        });
        Ok(())
    }

    /// Ends the page that was read.
    fn close(&mut self, page: &OpenPage) -> Result<(), Fault> {
        let entries = self.entries - page.before;
        if (u64::from(page.index), entries) != (page.listed.chunks, page.listed.entries) {
            return Err(other_than_listed());
        }
        if entries == 0 && self.known.pages.len() < self.known.max {
            self.known
                .pages
                .insert(page.listed.id, (page.listed.chunks, page.bytes));
        }
        Ok(())
    }

    fn entry(&mut self, entry: Entry) -> Result<Step, Fault> {
        self.covered()?;
        check_order(self.last.as_ref(), &mut self.open, &entry)?;
        self.last = Some(entry.path.clone());
        let (number, first_ordinal) = (self.entries, self.seen.chunks);
        self.entries += 1;
        match &entry.body {
            EntryBody::Dir => self.seen.dirs += 1,
            EntryBody::Symlink(_) => self.seen.symlinks += 1,
            EntryBody::File(file) => {
                self.seen.files += 1;
                self.seen.bytes = self
                    .seen
                    .bytes
                    .checked_add(file.size)
                    .ok_or_else(|| self.wrong("is larger than can be"))?;
                (self.uncovered, self.size) = (file.size, file.size);
                if is_one_chunk(&self.root.chunking, file.size) {
                    self.only_chunk = Some(ChunkRef {
                        id: file.hash,
                        len: file.size as u32,
                    });
                }
            }
        }
        Ok(Step::Entry {
            number,
            entry,
            first_ordinal,
        })
    }

    fn chunk(&mut self, chunk: ChunkRef, page: &mut OpenPage) -> Result<Step, Fault> {
        let len = u64::from(chunk.len);
        if len == 0 || len > self.uncovered {
            return Err(self.wrong("has chunks that are more than the file"));
        }
        let spot = ChunkPosition {
            page: page.listed.id,
            index: page.index,
            ordinal: self.seen.chunks,
            offset: self.size - self.uncovered,
        };
        self.uncovered -= len;
        self.seen.chunks += 1;
        page.index += 1;
        page.bytes += len;
        Ok(Step::Chunk(chunk, spot))
    }

    /// The next step that the open page has; `None` at its end.
    fn step_of(&mut self, page: &mut OpenPage) -> Result<Option<Step>, Fault> {
        if let Some(chunk) = self.only_chunk.take() {
            return self.chunk(chunk, page).map(Some);
        }
        match page.records.next()? {
            Some(Record::Entry(entry)) => self.entry(entry).map(Some),
            Some(Record::Chunk(chunk)) => self.chunk(chunk, page).map(Some),
            None => Ok(None),
        }
    }

    fn covered(&self) -> Result<(), Fault> {
        if self.uncovered == 0 {
            Ok(())
        } else {
            Err(self.wrong("has chunks that are less than the file"))
        }
    }

    fn wrong(&self, why: &str) -> Fault {
        let path = self.last.as_ref().map_or("", |p| p.as_str());
        Fault::integrity(format!("the manifest entry {path:?} {why}"))
            .with_next("publish the artifact again")
    }

    fn step(&mut self) -> Result<Option<Step>, Fault> {
        if let Some(fault) = self.refused.take() {
            return Err(fault);
        }
        loop {
            if let Some(mut page) = self.page.take() {
                match self.step_of(&mut page)? {
                    Some(step) => {
                        self.page = Some(page);
                        return Ok(Some(step));
                    }
                    None => self.close(&page)?,
                }
            }
            let Some((page, depth)) = self.ahead.pop() else {
                break;
            };
            self.open(page, depth)?;
        }
        self.covered()?;
        if self.seen != self.root.totals {
            return Err(
                Fault::integrity("the manifest does not hold what its totals say")
                    .with_next("publish the artifact again"),
            );
        }
        Ok(None)
    }
}

/// An entry page as it is read.
struct OpenPage {
    listed: PageRef,
    records: Records,
    /// The chunks that were read of it…
    index: u32,
    /// …and their bytes.
    bytes: u64,
    /// The entries that were read before it.
    before: u64,
}

/// Pages of nothing but chunks: how many, and their bytes.
struct Known {
    pages: HashMap<Hash, (u64, u64)>,
    max: usize,
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

/// Opens index pages, and refuses a manifest that unfolds to far more than its bytes. An index page
/// may be listed many times, as where a file holds nothing but zeros for very long, and each time
/// all below it is there once more for a few bytes.
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
                return Err(impossible(
                    "its index pages are listed so often that it unfolds without end",
                ));
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
    Err(impossible(&format!(
        "page {} has {} bytes; where it is listed, it has {}",
        page.id,
        bytes.len(),
        page.len
    )))
}

fn other_than_listed() -> Fault {
    impossible("a page does not hold what is said of it where it is listed")
}

pub(super) fn impossible(why: &str) -> Fault {
    Fault::integrity(format!("the manifest is malformed: {why}"))
        .with_next("publish the artifact again")
}

fn check_root(root: &Root) -> Result<(), Fault> {
    if root.depth > DEPTH_MAX {
        return Err(impossible(&format!(
            "it has {} levels, over {DEPTH_MAX}",
            root.depth
        )));
    }
    if root.pages.len() > ROOT_PAGES_MAX {
        return Err(impossible(&format!(
            "its root lists {} pages, over {ROOT_PAGES_MAX}",
            root.pages.len()
        )));
    }
    if let Some(page) = root
        .pages
        .iter()
        .find(|page| u64::from(page.len) > LISTED_BYTES_MAX)
    {
        return Err(impossible(&format!(
            "it lists a page of {} bytes, over {LISTED_BYTES_MAX}",
            page.len
        )));
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
    if (all_chunks, all_entries) == (chunks, entries) {
        Ok(())
    } else {
        Err(impossible("its counts do not add up"))
    }
}

/// Pages of one level that stand behind each other, and the index page that lists them (`None`: the
/// root).
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
        below.push((
            Some(page.id),
            unfolding.open(page, &read_page(pages, page)?)?,
        ));
    }
    Ok(below)
}

/// Calls `take` for every page of a manifest, index pages before what they list.
pub fn for_each_page(
    root: &Root,
    pages: &dyn Pages,
    mut take: impl FnMut(PageRef) -> Result<(), Fault>,
) -> Result<(), Fault> {
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

/// The children of one page, as a fetch request counts them: chunks of an entry page, pages of an
/// index page.
pub fn children(page: &Bytes, root: &Root) -> Result<Vec<ChunkRef>, Fault> {
    if page.first() == Some(&b'I') {
        return Ok(read_children(page)?
            .into_iter()
            .map(|p| ChunkRef {
                id: p.id,
                len: p.len,
            })
            .collect());
    }
    let (mut records, mut out) = (Records::new(page.clone())?, Vec::new());
    while let Some(record) = records.raw()? {
        match record {
            Raw::Chunk(chunk) => out.push(chunk),
            Raw::File { file, .. } if is_one_chunk(&root.chunking, file.size) => {
                out.push(ChunkRef {
                    id: file.hash,
                    len: file.size as u32,
                });
            }
            Raw::Dir { .. } | Raw::Symlink { .. } | Raw::File { .. } => {}
        }
    }
    Ok(out)
}

//! Walks a manifest entry by entry and chunk by chunk, with one page of each level in memory.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use crate::chunk::{Hash, ShortHash};
use base::blocking::Stop;
use base::fault::Fault;
use base::names::RelPath;

use super::build::check_order;
use super::page::{ChunkRef, LISTED_BYTES_MAX, Raw, Record, Records, is_one_chunk, read_children};
use super::{Entry, EntryBody, PageRef, Root, Totals};

/// The largest number of levels of index pages. An index page lists at least 45 pages, except the
/// last of its level, so eight levels are more than any artifact needs.
const DEPTH_MAX: u8 = 8;
/// The largest number of pages below index pages that were opened before. It allows at least 470 GB
/// of zeros, usually 14 TB.
const REPEATED_PAGES_MAX: usize = 1 << 17;
/// The largest number of pages in a root; the size limit of a root allows fewer.
const ROOT_PAGES_MAX: usize = 16 << 10;
/// The largest number of different index pages. An index page of the builder lists about 300 pages
/// and each of these has about 256 records, so this is enough for 2 billion entries or chunks.
const INDEX_PAGES_MAX: usize = 7 << 12;
/// The number of pages with only chunks that [`Walk::once_each`] remembers, in 400 KiB.
pub(super) const DIFFERENT_PAGES_KNOWN_MAX: usize = 7 << 10;

/// Provides the raw bytes of pages. The implementation verifies them.
pub trait Pages {
    /// Returns the page with this id.
    fn page(&self, id: Hash) -> Result<Bytes, Fault>;
}

/// The same pages, until the work that reads them is stopped.
pub struct Until<'a, P: ?Sized> {
    pages: &'a P,
    stop: &'a Stop,
}

impl<'a, P: Pages + ?Sized> Until<'a, P> {
    pub fn new(pages: &'a P, stop: &'a Stop) -> Self {
        Self { pages, stop }
    }
}

impl<P: Pages + ?Sized> Pages for Until<'_, P> {
    fn page(&self, id: Hash) -> Result<Bytes, Fault> {
        self.stop.check()?;
        self.pages.page(id)
    }
}

/// The position of a chunk in an artifact. Fetch requests use it to identify a chunk, and the
/// journal counts by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkPosition {
    /// The entry page that lists the chunk.
    pub page: Hash,
    /// The number of the chunk on that page.
    pub index: u32,
    /// The number of the chunk in the artifact.
    pub ordinal: u64,
    /// The offset of the chunk in its file, in bytes.
    pub offset: u64,
}

/// One step of a walk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The start of an entry.
    Entry {
        /// The number of the entry in the artifact.
        number: u64,
        entry: Entry,
        /// For a file: the ordinal of its first chunk.
        first_ordinal: u64,
    },
    /// A chunk of the last file.
    Chunk(ChunkRef, ChunkPosition),
}

/// An iterator over a complete manifest.
pub struct Walk<'a, P: Pages + ?Sized> {
    pages: &'a P,
    root: &'a Root,
    /// Pages to read, with their depth (0: entry page); the next one is last.
    pending: Vec<(PageRef, u8)>,
    expansion: Expansion,
    /// The fault of an invalid root, which the first step returns.
    root_fault: Option<Fault>,
    /// The entry page that is being read.
    page: Option<OpenPage>,
    /// The chunk of the last file, if that file has one chunk.
    only_chunk: Option<ChunkRef>,
    /// See [`Walk::once_each`].
    known: Known,
    seen: Totals,
    entries: u64,
    last: Option<RelPath>,
    open: String,
    /// The bytes of the last file for which no chunk was read yet, and the size of the file.
    uncovered: u64,
    size: u64,
    failed: bool,
}

impl<'a, P: Pages + ?Sized> Walk<'a, P> {
    /// Creates a walk over a complete manifest.
    pub fn new(root: &'a Root, pages: &'a P) -> Self {
        Self::once_each(root, pages, 0)
    }

    /// Creates a walk that skips the chunks of a page with only chunks that was read before; it
    /// only counts them. If a manifest lists such a page many times, the cost depends on the size
    /// of the pages and not on their repetition. Remembers at most the last `known_max` of these
    /// pages.
    pub(super) fn once_each(root: &'a Root, pages: &'a P, known_max: usize) -> Self {
        let pending = root
            .pages
            .iter()
            .rev()
            .map(|page| (*page, root.depth))
            .collect();
        let root_fault = check_root(root).err();
        let known = Known {
            pages: HashMap::new(),
            max: known_max,
        };
        let (expansion, page, only_chunk, seen, entries, last, open, uncovered, size, failed) =
            Default::default();
        Self {
            pages,
            root,
            pending,
            expansion,
            root_fault,
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
                return Err(listing_mismatch());
            }
            self.uncovered = self.uncovered.checked_sub(bytes).ok_or_else(|| {
                self.entry_fault("has an empty chunk, or chunks with more bytes than the file")
            })?;
            self.seen.chunks += chunks;
            return Ok(());
        }
        let bytes = read_page(self.pages, &page)?;
        if depth > 0 {
            let children = self.expansion.open(&page, &bytes)?;
            self.pending
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

    /// Completes the page that was read.
    fn close(&mut self, page: &OpenPage) -> Result<(), Fault> {
        let entries = self.entries - page.before;
        if (u64::from(page.index), entries) != (page.listed.chunks, page.listed.entries) {
            return Err(listing_mismatch());
        }
        if entries == 0 && self.known.max > 0 {
            if self.known.pages.len() == self.known.max {
                self.known.pages.clear();
            }
            self.known
                .pages
                .insert(page.listed.id, (page.listed.chunks, page.bytes));
        }
        Ok(())
    }

    fn entry(&mut self, entry: Entry) -> Result<Step, Fault> {
        self.check_covered()?;
        if self.root.format < 2 && !entry.attributes.is_empty() {
            return Err(malformed_manifest("its format does not have attributes"));
        }
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
                    .ok_or_else(|| self.entry_fault("makes the total size overflow"))?;
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
            return Err(
                self.entry_fault("has an empty chunk, or chunks with more bytes than the file")
            );
        }
        let position = ChunkPosition {
            page: page.listed.id,
            index: page.index,
            ordinal: self.seen.chunks,
            offset: self.size - self.uncovered,
        };
        self.uncovered -= len;
        self.seen.chunks += 1;
        page.index += 1;
        page.bytes += len;
        Ok(Step::Chunk(chunk, position))
    }

    /// The next step of the open page; `None` at its end.
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

    fn check_covered(&self) -> Result<(), Fault> {
        if self.uncovered == 0 {
            Ok(())
        } else {
            Err(self.entry_fault("has chunks with fewer bytes than the file"))
        }
    }

    fn entry_fault(&self, why: &str) -> Fault {
        let path = self.last.as_ref().map_or("", |p| p.as_str());
        Fault::integrity(format!("the manifest entry {path:?} {why}"))
            .with_next("publish the artifact again")
    }

    fn step(&mut self) -> Result<Option<Step>, Fault> {
        if let Some(fault) = self.root_fault.take() {
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
            let Some((page, depth)) = self.pending.pop() else {
                break;
            };
            self.open(page, depth)?;
        }
        self.check_covered()?;
        if self.seen != self.root.totals {
            return Err(
                Fault::integrity("the content of the manifest does not match its totals")
                    .with_next("publish the artifact again"),
            );
        }
        Ok(None)
    }
}

/// The entry page that is being read.
struct OpenPage {
    listed: PageRef,
    records: Records,
    /// The number of chunks read from it.
    index: u32,
    /// The bytes of these chunks.
    bytes: u64,
    /// The number of entries read before it.
    before: u64,
}

/// Pages with only chunks: the number of chunks and their bytes.
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

/// Opens index pages, and rejects a manifest that expands to far more than its own size. An index
/// page may be listed many times, for example in a file with a very long run of zeros, and each
/// listing repeats everything below it for a few bytes.
#[derive(Default)]
struct Expansion {
    opened: HashSet<ShortHash>,
    repeated: usize,
}

impl Expansion {
    /// The pages that this page lists.
    fn open(&mut self, page: &PageRef, bytes: &[u8]) -> Result<Vec<PageRef>, Fault> {
        let children = read_children(bytes)?;
        add_up(&children, page.chunks.into(), page.entries.into())?;
        if !self.opened.insert(page.id.short()) {
            self.repeated += children.len();
            if self.repeated > REPEATED_PAGES_MAX {
                return Err(malformed_manifest("its index pages are repeated too often"));
            }
        } else if self.opened.len() > INDEX_PAGES_MAX {
            return Err(malformed_manifest(&format!(
                "it has more than {INDEX_PAGES_MAX} different index pages"
            )));
        }
        Ok(children)
    }
}

/// Reads a page and checks its length against its listing.
fn read_page<P: Pages + ?Sized>(pages: &P, page: &PageRef) -> Result<Bytes, Fault> {
    let bytes = pages.page(page.id)?;
    if bytes.len() == page.len as usize {
        return Ok(bytes);
    }
    Err(malformed_manifest(&format!(
        "page {} has {} bytes, but its listing states {}",
        page.id,
        bytes.len(),
        page.len
    )))
}

fn listing_mismatch() -> Fault {
    malformed_manifest("the content of a page does not match its listing")
}

pub(super) fn malformed_manifest(why: &str) -> Fault {
    Fault::integrity(format!("the manifest is malformed: {why}"))
        .with_next("publish the artifact again")
}

fn check_root(root: &Root) -> Result<(), Fault> {
    if root.depth > DEPTH_MAX {
        return Err(malformed_manifest(&format!(
            "it has {} levels, more than {DEPTH_MAX}",
            root.depth
        )));
    }
    if root.pages.len() > ROOT_PAGES_MAX {
        return Err(malformed_manifest(&format!(
            "its root lists {} pages, more than {ROOT_PAGES_MAX}",
            root.pages.len()
        )));
    }
    if let Some(page) = root
        .pages
        .iter()
        .find(|page| u64::from(page.len) > LISTED_BYTES_MAX)
    {
        return Err(malformed_manifest(&format!(
            "it lists a page of {} bytes, more than {LISTED_BYTES_MAX}",
            page.len
        )));
    }
    let totals = &root.totals;
    let entries = u128::from(totals.files) + u128::from(totals.dirs) + u128::from(totals.symlinks);
    add_up(&root.pages, totals.chunks.into(), entries)
}

/// Checks that every page has content, and that the sums equal the counts of the root or page that
/// lists them.
fn add_up(listed: &[PageRef], chunks: u128, entries: u128) -> Result<(), Fault> {
    let (mut all_chunks, mut all_entries) = (0, 0);
    for page in listed {
        if page.chunks == 0 && page.entries == 0 {
            return Err(malformed_manifest("it lists an empty page"));
        }
        all_chunks += u128::from(page.chunks);
        all_entries += u128::from(page.entries);
    }
    if (all_chunks, all_entries) == (chunks, entries) {
        Ok(())
    } else {
        Err(malformed_manifest("its counts are inconsistent"))
    }
}

/// Consecutive pages of one level, and the index page that lists them (`None`: the root).
pub type Listed = (Option<Hash>, Vec<PageRef>);

/// The top level of a manifest.
pub fn top_level(root: &Root) -> Result<Vec<Listed>, Fault> {
    check_root(root)?;
    Ok(vec![(None, root.pages.clone())])
}

/// The next lower level, in order. Reads the index pages of this level.
pub fn level_below(level: &[Listed], pages: &dyn Pages) -> Result<Vec<Listed>, Fault> {
    let mut expansion = Expansion::default();
    let mut below = Vec::new();
    for page in level.iter().flat_map(|(_, listed)| listed) {
        below.push((
            Some(page.id),
            expansion.open(page, &read_page(pages, page)?)?,
        ));
    }
    Ok(below)
}

/// Calls `take` for every page of a manifest; an index page comes before the pages that it lists.
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

/// The entry pages of a manifest, in order. Reads its index pages.
pub fn entry_pages(root: &Root, pages: &dyn Pages) -> Result<Vec<PageRef>, Fault> {
    let mut level = top_level(root)?;
    for _ in 0..root.depth {
        level = level_below(&level, pages)?;
    }
    Ok(level.into_iter().flat_map(|(_, listed)| listed).collect())
}

/// The children of one page in the numbering of fetch requests: chunks of an entry page, pages of
/// an index page.
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

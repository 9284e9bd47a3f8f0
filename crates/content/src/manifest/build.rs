//! Builds a manifest from ordered entries, page by page. Memory does not grow with the number of
//! entries.

use bytes::Bytes;

use crate::frame::Verified;
use base::fault::Fault;
use base::names::{Kind, RelPath};

use super::page::{ChunkRef, PageWriter, is_one_chunk};
use super::{
    Chunking, Entry, EntryBody, FORMAT_ATTRIBUTES, FORMAT_REFERRERS, KindInfo, PageRef, Root,
    Totals,
};

/// The largest number of pages in the root. If there are more, a level of index pages is added.
const ROOT_PAGES_MAX: usize = 128;

/// Receives finished pages.
pub(super) type PageSink<'a> = dyn FnMut(Verified) -> Result<(), Fault> + 'a;

/// Builds one manifest. Entries must be in manifest order; the chunks of a file follow directly
/// after it.
pub struct Builder<'a> {
    sink: &'a mut PageSink<'a>,
    chunking: Chunking,
    totals: Totals,
    page: PageWriter,
    /// Finished pages that are not listed yet, one list per level; level 0 holds entry pages.
    levels: Vec<Level>,
    last: Option<RelPath>,
    /// The innermost directory that the current position is in; empty: the artifact itself.
    open: String,
    has_attributes: bool,
}

#[derive(Default)]
struct Level {
    page: PageWriter,
    /// Finished pages of the level below, as long as they may still fit in the root.
    pages: Vec<PageRef>,
    spilled: bool,
}

impl<'a> Builder<'a> {
    /// Creates a builder that passes its pages to `sink`.
    pub fn new(chunking: Chunking, sink: &'a mut PageSink<'a>) -> Self {
        let levels = vec![Level::default()];
        Self {
            sink,
            chunking,
            totals: Totals::default(),
            page: PageWriter::default(),
            levels,
            last: None,
            open: String::new(),
            has_attributes: false,
        }
    }

    /// Whether a file of this size has chunk records. Otherwise it is one chunk, whose id is the
    /// hash of the file.
    pub fn lists_chunks(&self, size: u64) -> bool {
        size > 0 && !is_one_chunk(&self.chunking, size)
    }

    /// Adds an entry, and for a file the chunks that [`Builder::lists_chunks`] requires.
    pub fn push(&mut self, entry: &Entry, chunks: &[ChunkRef]) -> Result<(), Fault> {
        check_order(self.last.as_ref(), &mut self.open, entry)?;
        self.last = Some(entry.path.clone());
        self.has_attributes |= !entry.attributes.is_empty();
        match &entry.body {
            EntryBody::Dir => self.totals.dirs += 1,
            EntryBody::Symlink(_) => self.totals.symlinks += 1,
            EntryBody::File(file) => {
                self.totals.files += 1;
                self.totals.bytes += file.size;
                self.totals.chunks += u64::from(is_one_chunk(&self.chunking, file.size));
            }
        }
        if self.page.entry(entry, &self.chunking) {
            self.end_page()?;
        }
        for chunk in chunks {
            self.push_chunk(chunk)?;
        }
        Ok(())
    }

    /// Adds one more chunk of the last file, for a file whose chunks do not fit in memory at once.
    pub fn push_chunk(&mut self, chunk: &ChunkRef) -> Result<(), Fault> {
        self.totals.chunks += 1;
        if self.page.chunk(chunk) {
            self.end_page()?;
        }
        Ok(())
    }

    fn end_page(&mut self) -> Result<(), Fault> {
        let page = std::mem::take(&mut self.page);
        let listed = self.emit(page)?;
        self.list(0, listed)
    }

    fn emit(&mut self, page: PageWriter) -> Result<PageRef, Fault> {
        let chunk = Verified::new(Bytes::from(page.bytes));
        let listed = PageRef {
            id: chunk.id,
            len: chunk.bytes.len() as u32,
            chunks: page.chunks,
            entries: page.entries,
        };
        (self.sink)(chunk)?;
        Ok(listed)
    }

    /// Lists a finished page on the level above it.
    fn list(&mut self, level: usize, page: PageRef) -> Result<(), Fault> {
        if self.levels.len() == level {
            self.levels.push(Level::default());
        }
        let this = &mut self.levels[level];
        if !this.spilled {
            this.pages.push(page);
            if this.pages.len() <= ROOT_PAGES_MAX {
                return Ok(());
            }
            this.spilled = true;
            for page in std::mem::take(&mut self.levels[level].pages) {
                self.index(level, page)?;
            }
            return Ok(());
        }
        self.index(level, page)
    }

    fn index(&mut self, level: usize, page: PageRef) -> Result<(), Fault> {
        if self.levels[level].page.child(&page) {
            let full = std::mem::take(&mut self.levels[level].page);
            let listed = self.emit(full)?;
            self.list(level + 1, listed)?;
        }
        Ok(())
    }

    /// Completes the manifest.
    pub fn finish(mut self, kind: Kind, info: KindInfo) -> Result<Root, Fault> {
        if !self.page.bytes.is_empty() {
            self.end_page()?;
        }
        let mut level = 0;
        while self.levels[level].spilled {
            let rest = std::mem::take(&mut self.levels[level].page);
            if !rest.bytes.is_empty() {
                let listed = self.emit(rest)?;
                self.list(level + 1, listed)?;
            }
            level += 1;
        }
        let pages = std::mem::take(&mut self.levels[level].pages);
        Ok(Root {
            format: match &info {
                KindInfo::Image(image) if !image.referrers.is_empty() => FORMAT_REFERRERS,
                _ if self.has_attributes => FORMAT_ATTRIBUTES,
                _ => 1,
            },
            kind,
            info,
            chunking: self.chunking,
            totals: self.totals,
            depth: level as u8,
            pages,
        })
    }
}

/// Checks that every path comes after the previous path and is inside a listed directory. Therefore
/// a receiver can create the tree in one pass, and never writes through a link. `open` is the
/// innermost directory of the previous entry.
pub(super) fn check_order(
    last: Option<&RelPath>,
    open: &mut String,
    entry: &Entry,
) -> Result<(), Fault> {
    let wrong = |why: &str| {
        Err(Fault::integrity(format!(
            "the manifest entry {:?} {why}",
            entry.path.as_str()
        )))
    };
    if last.is_some_and(|last| *last >= entry.path) {
        return wrong("is out of order or listed twice");
    }
    let parent = entry.path.parent().unwrap_or("");
    // All directories above the open one are directories of the artifact too.
    let is_inside = parent.is_empty()
        || open
            .strip_prefix(parent)
            .is_some_and(|below| below.is_empty() || below.starts_with('/'));
    if !is_inside {
        return wrong("is not inside a directory of the artifact");
    }
    open.truncate(parent.len());
    if entry.body == EntryBody::Dir {
        open.clear();
        open.push_str(entry.path.as_str());
    }
    Ok(())
}

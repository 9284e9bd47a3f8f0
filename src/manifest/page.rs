//! Manifest pages: runs of records, cut where their content says so, so that two versions share most pages.
//!
//! ```text
//! page   = 'E' record*            entry page        page = 'I' child*      index page
//! record = 1 path mode                              folder
//!        | 2 path mode target                       symbolic link
//!        | 3 path mode size hash                    file; up to `Chunking::whole` bytes it is one chunk named by its hash
//!        | 4 len id                                 the next chunk of the file before (perhaps on the page before)
//! path   = shared suffix_len suffix                 bytes shared with the path before on this page, then the rest
//! child  = len chunks entries id
//! ```
//! Numbers are LEB128. A page ends after a record whose key (a hash) has its low bits zero, or when it is full.

use crate::chunk::Hash;
use crate::fault::Fault;
use crate::names::RelPath;

use super::{Chunking, Entry, EntryBody, FileInfo, PageRef};

/// A page is not cut before it has this many bytes…
pub(super) const PAGE_BYTES_MIN: usize = 2 << 10;
/// …and always once it has this many.
pub(super) const PAGE_BYTES_MAX: usize = 64 << 10;
/// One record in so many ends a page.
pub(super) const PAGE_CUT: u32 = 256;
const TARGET_BYTES_MAX: usize = 4096;

const DIR: u8 = 1;
const SYMLINK: u8 = 2;
const FILE: u8 = 3;
const CHUNK: u8 = 4;

/// A chunk of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRef {
    /// BLAKE3 of its raw bytes.
    pub id: Hash,
    /// Raw bytes.
    pub len: u32,
}

/// One record of an entry page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Record {
    /// An entry begins.
    Entry(Entry),
    /// The next chunk of the last file.
    Chunk(ChunkRef),
}

/// Whether a file's only chunk is named by the file's hash and has no record of its own.
pub(super) fn is_one_chunk(chunking: &Chunking, size: u64) -> bool {
    size > 0 && size <= u64::from(chunking.whole)
}

fn put_number(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// Writes one page.
#[derive(Debug, Default)]
pub(super) struct PageWriter {
    pub(super) bytes: Vec<u8>,
    pub(super) chunks: u64,
    pub(super) entries: u64,
    last_path: String,
}

impl PageWriter {
    fn begin(&mut self, kind: u8) {
        if self.bytes.is_empty() {
            self.bytes.push(kind);
        }
    }

    /// Adds an entry; true when the page must end here.
    pub(super) fn entry(&mut self, entry: &Entry, chunking: &Chunking) -> bool {
        self.begin(b'E');
        let (tag, key) = match &entry.body {
            EntryBody::Dir => (DIR, Hash::of(entry.path.as_str().as_bytes())),
            EntryBody::Symlink(_) => (SYMLINK, Hash::of(entry.path.as_str().as_bytes())),
            EntryBody::File(file) => (FILE, file.hash),
        };
        self.bytes.push(tag);
        let path = entry.path.as_str();
        let shared = path.bytes().zip(self.last_path.bytes()).take_while(|(a, b)| a == b).count();
        put_number(&mut self.bytes, shared as u64);
        put_number(&mut self.bytes, (path.len() - shared) as u64);
        self.bytes.extend_from_slice(&path.as_bytes()[shared..]);
        self.last_path = path.to_owned();
        put_number(&mut self.bytes, u64::from(entry.mode));
        match &entry.body {
            EntryBody::Dir => {}
            EntryBody::Symlink(target) => {
                put_number(&mut self.bytes, target.len() as u64);
                self.bytes.extend_from_slice(target.as_bytes());
            }
            EntryBody::File(file) => {
                put_number(&mut self.bytes, file.size);
                self.bytes.extend_from_slice(&file.hash.0);
                self.chunks += u64::from(is_one_chunk(chunking, file.size));
            }
        }
        self.entries += 1;
        self.ends_at(key)
    }

    /// Adds a chunk of the last file; true when the page must end here.
    pub(super) fn chunk(&mut self, chunk: &ChunkRef) -> bool {
        self.begin(b'E');
        self.bytes.push(CHUNK);
        put_number(&mut self.bytes, u64::from(chunk.len));
        self.bytes.extend_from_slice(&chunk.id.0);
        self.chunks += 1;
        self.ends_at(chunk.id)
    }

    /// Adds a child page; true when the page must end here.
    pub(super) fn child(&mut self, page: &PageRef) -> bool {
        self.begin(b'I');
        put_number(&mut self.bytes, u64::from(page.len));
        put_number(&mut self.bytes, page.chunks);
        put_number(&mut self.bytes, page.entries);
        self.bytes.extend_from_slice(&page.id.0);
        self.chunks += page.chunks;
        self.entries += page.entries;
        self.ends_at(page.id)
    }

    fn ends_at(&self, key: Hash) -> bool {
        let low = u32::from_le_bytes([key.0[0], key.0[1], key.0[2], key.0[3]]);
        let cut = if self.bytes[0] == b'I' { PAGE_CUT / 4 } else { PAGE_CUT };
        // Index pages have fewer and larger records, and few are wanted in the root.
        (self.bytes.len() >= PAGE_BYTES_MIN && low.is_multiple_of(cut)) || self.bytes.len() >= PAGE_BYTES_MAX
    }
}

/// Reads the bytes of a page, trusting none of them.
struct Reader<'a> {
    bytes: &'a [u8],
}

fn malformed(what: &str) -> Fault {
    Fault::integrity(format!("a manifest page is malformed: {what}")).with_next("publish the artifact again")
}

impl<'a> Reader<'a> {
    fn number(&mut self) -> Result<u64, Fault> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.bytes.split_first().ok_or_else(|| malformed("it ends in a number"))?;
            self.bytes = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(malformed("a number has no end"))
    }

    fn small(&mut self, max: u64, what: &str) -> Result<u32, Fault> {
        match self.number()? {
            n if n <= max => Ok(n as u32),
            n => Err(malformed(&format!("{what} is {n}, over {max}"))),
        }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Fault> {
        if len > self.bytes.len() {
            return Err(malformed("it ends in a record"));
        }
        let (head, rest) = self.bytes.split_at(len);
        self.bytes = rest;
        Ok(head)
    }

    fn hash(&mut self) -> Result<Hash, Fault> {
        let mut out = [0; 32];
        out.copy_from_slice(self.take(32)?);
        Ok(Hash(out))
    }
}

/// The records of an entry page.
pub(super) fn read_records(page: &[u8]) -> Result<Vec<Record>, Fault> {
    let Some((b'E', bytes)) = page.split_first().map(|(kind, rest)| (*kind, rest)) else {
        return Err(malformed("it is not an entry page"));
    };
    let mut reader = Reader { bytes };
    let mut out = Vec::new();
    let mut last: Vec<u8> = Vec::new();
    while !reader.bytes.is_empty() {
        let tag = reader.take(1)?[0];
        if tag == CHUNK {
            let len = reader.small(crate::limits::CHUNK_BYTES_MAX as u64, "a chunk's length")?;
            out.push(Record::Chunk(ChunkRef { len, id: reader.hash()? }));
            continue;
        }
        let shared = reader.number()? as usize;
        if shared > last.len() {
            return Err(malformed("a path shares more than there is"));
        }
        let len = reader.number()? as usize;
        last.truncate(shared);
        last.extend_from_slice(reader.take(len)?);
        let path = std::str::from_utf8(&last).map_err(|_| malformed("a path is not UTF-8"))?;
        let path: RelPath = path.parse().map_err(|e| malformed(&format!("{e}")))?;
        let mode = reader.small(0o7777, "a mode")?;
        let body = match tag {
            DIR => EntryBody::Dir,
            SYMLINK => {
                let len = reader.small(TARGET_BYTES_MAX as u64, "a link's target")? as usize;
                let target = std::str::from_utf8(reader.take(len)?).map_err(|_| malformed("a link's target is not UTF-8"))?;
                EntryBody::Symlink(target.to_owned())
            }
            FILE => EntryBody::File(FileInfo { size: reader.number()?, hash: reader.hash()? }),
            other => return Err(malformed(&format!("a record of kind {other}"))),
        };
        out.push(Record::Entry(Entry { path, mode, body }));
    }
    Ok(out)
}

/// The children of an index page.
pub fn read_children(page: &[u8]) -> Result<Vec<PageRef>, Fault> {
    let Some((b'I', bytes)) = page.split_first().map(|(kind, rest)| (*kind, rest)) else {
        return Err(malformed("it is not an index page"));
    };
    let mut reader = Reader { bytes };
    let mut out = Vec::new();
    while !reader.bytes.is_empty() {
        let len = reader.small(PAGE_BYTES_MAX as u64 * 2, "a page's length")?;
        let (chunks, entries) = (reader.number()?, reader.number()?);
        out.push(PageRef { id: reader.hash()?, len, chunks, entries });
    }
    Ok(out)
}

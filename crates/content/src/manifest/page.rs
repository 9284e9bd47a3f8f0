//! Manifest pages: sequences of records. Where a page ends depends on its content, so that two
//! versions share most pages.
//!
//! ```text
//! page   = 'E' record*            entry page        page = 'I' child*      index page
//! record = 1 path mode                              directory
//!        | 2 path mode target                       symbolic link
//!        | 3 path mode size hash                    file; up to `Chunking::whole` bytes it is one chunk with the hash as id
//!        | 4 len id                                 the next chunk of the last file (which may be on the previous page)
//!        | 5 … | 6 … | 7 …                          attributes of the next entry (format 2, see `attributes`)
//! path   = shared suffix_len suffix                 bytes shared with the previous path on this page, then the rest
//! child  = len chunks entries id
//! ```
//! Numbers are LEB128. A page ends after a record whose key (a hash) has zeros in its low bits, or
//! when it is full.

use bytes::Bytes;

use crate::chunk::Hash;
use base::fault::Fault;
use base::names::RelPath;

use super::attributes::{Attributes, HARD_LINK, TIME, XATTR};
use super::{Chunking, Entry, EntryBody, FileInfo, PageRef};

/// The smallest size at which a page can end, except the last page.
pub(super) const PAGE_BYTES_MIN: usize = 2 << 10;
/// The size from which a page always ends.
pub(super) const PAGE_BYTES_MAX: usize = 64 << 10;
/// On average, one record in this number ends a page.
pub(super) const PAGE_CUT: u32 = 256;
/// The largest page: one record, of any length, can follow when a page is almost full.
pub(super) const LISTED_BYTES_MAX: u64 = PAGE_BYTES_MAX as u64 * 2;
/// The limit of Linux.
const TARGET_BYTES_MAX: usize = 4095;
/// The permission bits that a reader of entries accepts. A peer must never set set-user-ID,
/// set-group-ID or the sticky bit.
const MODE_BITS: u32 = 0o777;

const DIR: u8 = 1;
const SYMLINK: u8 = 2;
const FILE: u8 = 3;
const CHUNK: u8 = 4;

/// A chunk of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRef {
    /// The BLAKE3 of the raw bytes.
    pub id: Hash,
    /// The number of raw bytes.
    pub len: u32,
}

impl ChunkRef {
    /// The chunk that a long run of zeros is cut into.
    pub fn of_zeros(chunking: &Chunking) -> Self {
        let zeros = vec![0; chunking.max as usize];
        let len = chunking.cut(&zeros);
        Self {
            id: Hash::of(&zeros[..len]),
            len: len as u32,
        }
    }
}

/// One record of an entry page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Record {
    /// The start of an entry.
    Entry(Entry),
    /// The next chunk of the last file.
    Chunk(ChunkRef),
}

/// Whether a file has only one chunk, whose id is the hash of the file and which has no record.
pub(super) fn is_one_chunk(chunking: &Chunking, size: u64) -> bool {
    size > 0 && size <= u64::from(chunking.whole)
}

pub(super) fn put_number(out: &mut Vec<u8>, mut n: u64) {
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

    /// Adds an entry. Returns whether the page must end here.
    pub(super) fn entry(&mut self, entry: &Entry, chunking: &Chunking) -> bool {
        self.begin(b'E');
        entry.attributes.write(&mut self.bytes);
        let (tag, key) = match &entry.body {
            EntryBody::Dir => (DIR, Hash::of(entry.path.as_str().as_bytes())),
            EntryBody::Symlink(_) => (SYMLINK, Hash::of(entry.path.as_str().as_bytes())),
            EntryBody::File(file) => (FILE, file.hash),
        };
        self.bytes.push(tag);
        let path = entry.path.as_str();
        let shared = path
            .bytes()
            .zip(self.last_path.bytes())
            .take_while(|(a, b)| a == b)
            .count();
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

    /// Adds a chunk of the last file. Returns whether the page must end here.
    pub(super) fn chunk(&mut self, chunk: &ChunkRef) -> bool {
        self.begin(b'E');
        self.bytes.push(CHUNK);
        put_number(&mut self.bytes, u64::from(chunk.len));
        self.bytes.extend_from_slice(&chunk.id.0);
        self.chunks += 1;
        self.ends_at(chunk.id)
    }

    /// Adds a child page. Returns whether the page must end here.
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
        let cut = if self.bytes[0] == b'I' {
            PAGE_CUT / 4
        } else {
            PAGE_CUT
        };
        // Index pages have fewer and larger records, and the root should list few of them.
        (self.bytes.len() >= PAGE_BYTES_MIN && low.is_multiple_of(cut))
            || self.bytes.len() >= PAGE_BYTES_MAX
    }
}

/// Parses the bytes of a page from an untrusted source.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
}

pub(super) fn malformed(what: &str) -> Fault {
    Fault::integrity(format!("a manifest page is malformed: {what}"))
        .with_next("publish the artifact again")
}

impl<'a> Reader<'a> {
    pub(super) fn number(&mut self) -> Result<u64, Fault> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self
                .bytes
                .split_first()
                .ok_or_else(|| malformed("it is truncated in a number"))?;
            self.bytes = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(malformed("a number is too long"))
    }

    fn small(&mut self, max: u64, what: &str) -> Result<u32, Fault> {
        match self.number()? {
            n if n <= max => Ok(n as u32),
            n => Err(malformed(&format!("{what} is {n}, more than {max}"))),
        }
    }

    /// Reads the length of a part of this page. A length that is too large fails when the part is
    /// read.
    fn length(&mut self) -> Result<usize, Fault> {
        self.number()
            .map(|n| usize::try_from(n).unwrap_or(usize::MAX))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Fault> {
        if len > self.bytes.len() {
            return Err(malformed("it is truncated in a record"));
        }
        let (head, rest) = self.bytes.split_at(len);
        self.bytes = rest;
        Ok(head)
    }

    /// A part that follows its length.
    pub(super) fn part(&mut self) -> Result<&'a [u8], Fault> {
        let len = self.length()?;
        self.take(len)
    }

    fn hash(&mut self) -> Result<Hash, Fault> {
        let mut out = [0; 32];
        out.copy_from_slice(self.take(32)?);
        Ok(Hash(out))
    }
}

/// A record in its raw form: the path and the target are not checked.
pub(super) enum Raw<'a> {
    Dir {
        path: &'a [u8],
        mode: u64,
    },
    Symlink {
        path: &'a [u8],
        mode: u64,
        target: &'a [u8],
    },
    File {
        path: &'a [u8],
        mode: u64,
        file: FileInfo,
    },
    /// The next chunk of the last file.
    Chunk(ChunkRef),
}

/// Reads an entry page record by record. Only one record is in memory, because a short record can
/// expand to a long path.
pub(super) struct Records {
    page: Bytes,
    at: usize,
    path: Vec<u8>,
}

impl Records {
    pub(super) fn new(page: Bytes) -> Result<Self, Fault> {
        if page.first() == Some(&b'E') {
            Ok(Self {
                page,
                at: 1,
                path: Vec::new(),
            })
        } else {
            Err(malformed("it is not an entry page"))
        }
    }

    /// Returns the next record unchecked, without attributes.
    pub(super) fn raw(&mut self) -> Result<Option<Raw<'_>>, Fault> {
        Ok(self.with_attributes()?.map(|(raw, _)| raw))
    }

    /// Returns the next record, and the attributes before it.
    fn with_attributes(&mut self) -> Result<Option<(Raw<'_>, Attributes)>, Fault> {
        let Self { page, at, path } = self;
        let mut reader = Reader {
            bytes: &page[*at..],
        };
        if reader.bytes.is_empty() {
            return Ok(None);
        }
        let (mut attributes, mut has_some) = (Attributes::default(), false);
        let tag = loop {
            match reader.take(1)?[0] {
                tag @ (TIME | XATTR | HARD_LINK) => {
                    attributes.read(tag, &mut reader)?;
                    has_some = true;
                }
                tag => break tag,
            }
        };
        if has_some && tag == CHUNK {
            return Err(malformed("a chunk has attributes"));
        }
        let raw = if tag == CHUNK {
            let len = reader.small(base::limits::CHUNK_BYTES_MAX as u64, "a chunk's length")?;
            Raw::Chunk(ChunkRef {
                len,
                id: reader.hash()?,
            })
        } else {
            let shared = reader.length()?;
            if shared > path.len() {
                return Err(malformed(
                    "a path shares more bytes than the previous path has",
                ));
            }
            let len = reader.length()?;
            let suffix = reader.take(len)?;
            path.truncate(shared);
            path.extend_from_slice(suffix);
            let (mode, path) = (reader.number()?, &path[..]);
            match tag {
                DIR => Raw::Dir { path, mode },
                SYMLINK => {
                    let len = reader.length()?;
                    Raw::Symlink {
                        path,
                        mode,
                        target: reader.take(len)?,
                    }
                }
                FILE => Raw::File {
                    path,
                    mode,
                    file: FileInfo {
                        size: reader.number()?,
                        hash: reader.hash()?,
                    },
                },
                other => return Err(malformed(&format!("unknown record type {other}"))),
            }
        };
        *at = page.len() - reader.bytes.len();
        Ok(Some((raw, attributes)))
    }

    /// Returns the next record after checking it.
    pub(super) fn next(&mut self) -> Result<Option<Record>, Fault> {
        let Some((raw, attributes)) = self.with_attributes()? else {
            return Ok(None);
        };
        let (path, mode, body) = match raw {
            Raw::Chunk(chunk) => return Ok(Some(Record::Chunk(chunk))),
            Raw::Dir { path, mode } => (path, mode, EntryBody::Dir),
            Raw::Symlink { path, mode, target } => {
                (path, mode, EntryBody::Symlink(read_target(target)?))
            }
            Raw::File { path, mode, file } => (path, mode, EntryBody::File(file)),
        };
        let path = std::str::from_utf8(path).map_err(|_| malformed("a path is not UTF-8"))?;
        let path: RelPath = path.parse().map_err(|e| malformed(&format!("{e}")))?;
        if mode > 0o7777 {
            return Err(malformed(&format!("a mode is {mode:o}, more than 7777")));
        }
        let entry = Entry {
            path,
            mode: mode as u32 & MODE_BITS,
            body,
            attributes,
        };
        match entry.wrong_attributes() {
            Some(why) => Err(malformed(&format!(
                "the entry {:?} {why}",
                entry.path.as_str()
            ))),
            None => Ok(Some(Record::Entry(entry))),
        }
    }
}

/// Checks a link target: Linux accepts 1 to 4095 bytes without NUL.
fn read_target(target: &[u8]) -> Result<String, Fault> {
    if target.is_empty() || target.len() > TARGET_BYTES_MAX {
        return Err(malformed(&format!(
            "a link target has {} bytes; 1 to {TARGET_BYTES_MAX} are allowed",
            target.len()
        )));
    }
    if target.contains(&0) {
        return Err(malformed("a link target contains a NUL"));
    }
    std::str::from_utf8(target)
        .map(str::to_owned)
        .map_err(|_| malformed("a link target is not UTF-8"))
}

/// The children of an index page.
pub fn read_children(page: &[u8]) -> Result<Vec<PageRef>, Fault> {
    let mut out = Vec::new();
    each_child(page, &mut |child| out.push(child))?;
    Ok(out)
}

/// Calls `take` for each child of an index page, up to the first malformed one.
pub(super) fn each_child(page: &[u8], take: &mut dyn FnMut(PageRef)) -> Result<(), Fault> {
    let Some((b'I', bytes)) = page.split_first().map(|(kind, rest)| (*kind, rest)) else {
        return Err(malformed("it is not an index page"));
    };
    let mut reader = Reader { bytes };
    while !reader.bytes.is_empty() {
        let len = reader.small(LISTED_BYTES_MAX, "a page's length")?;
        let (chunks, entries) = (reader.number()?, reader.number()?);
        take(PageRef {
            id: reader.hash()?,
            len,
            chunks,
            entries,
        });
    }
    Ok(())
}

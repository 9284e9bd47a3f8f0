//! Holes of sparse files: they are neither read nor cut, because the chunks of zeros are known.
//!
//! Only the hash of the whole file needs each zero. A hole that the filesystem reports is believed; a
//! file that changes meanwhile is found as before, by its identity and its size.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use bytes::Bytes;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::chunk::Chunking;
use crate::frame::Verified;

/// A smaller hole is read: looking for its end costs as much.
const HOLE_BYTES_MIN: u64 = 1 << 20;

/// The content of an entry.
pub(super) trait Input: Read {
    /// The end of the hole at an offset of a file of `size` bytes; `None`: there is no hole.
    fn hole_end(&mut self, _offset: u64, _size: u64) -> Option<u64> {
        None
    }

    /// Continues to read at this offset, which is in a hole or at its end.
    fn move_to(&mut self, _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Content without holes.
pub(super) struct Plain<R>(pub(super) R);

impl<R: Read> Read for Plain<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read> Input for Plain<R> {}

/// A complete file.
pub(super) struct WholeFile {
    file: File,
    has_holes: bool,
}

impl WholeFile {
    pub(super) fn new(file: File) -> io::Result<Self> {
        let meta = file.metadata()?;
        let has_holes = meta.blocks().saturating_mul(512) < meta.len();
        Ok(Self { file, has_holes })
    }
}

impl Read for WholeFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

impl Input for WholeFile {
    fn hole_end(&mut self, offset: u64, size: u64) -> Option<u64> {
        if !self.has_holes || offset >= size {
            return None;
        }
        let end = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data.min(size),
            // No data up to the end of the file, which may be shorter by now.
            Err(Errno::NXIO) if self.file.metadata().is_ok_and(|meta| meta.len() >= size) => size,
            Err(_) => offset,
        };
        // The call moved the position.
        self.move_to(offset).ok()?;
        (end > offset).then_some(end)
    }

    fn move_to(&mut self, offset: u64) -> io::Result<()> {
        self.file.seek(io::SeekFrom::Start(offset)).map(|_| ())
    }
}

/// Finds the holes of one file while it is read.
pub(super) struct Holes {
    chunking: Chunking,
    /// The chunk that zeros are cut into.
    pub(super) zeros: Verified,
    /// The hole that was found last.
    found: Range<u64>,
}

impl Holes {
    pub(super) fn new(chunking: Chunking) -> Self {
        let zeros = vec![0; chunking.max as usize];
        let len = chunking.cut(&zeros);
        Self {
            chunking,
            zeros: Verified::new(Bytes::from(zeros).slice(..len)),
            found: 0..0,
        }
    }

    /// The number of chunks of zeros that the file has from `offset` on, where the next chunk begins.
    /// `read` is where the reader is: what is before it was read. The last part of a hole is left to
    /// the reader, which finds the end of the file there.
    pub(super) fn chunks_at(
        &mut self,
        from: &mut dyn Input,
        offset: u64,
        read: u64,
        size: u64,
    ) -> Option<u64> {
        if !self.found.contains(&read) {
            let end = from.hole_end(read, size)?;
            self.found = read..end;
        }
        if offset < self.found.start || self.found.end - offset < HOLE_BYTES_MIN {
            return None;
        }
        let len = self.zeros.bytes.len() as u64;
        let rest = self.found.end - offset;
        // A chunk is cut when so many bytes are known.
        let known = rest.checked_sub(u64::from(self.chunking.max) + 1)?;
        let count = known / len + 1;
        (offset + count * len >= read).then_some(count)
    }
}

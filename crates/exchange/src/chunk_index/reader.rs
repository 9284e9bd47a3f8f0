//! Reads chunks from their storage locations, and verifies the hash of each.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::runtime::Handle;

use super::{At, ChunkIndex, LocationInfo};
use base::buffers::Buffers;
use base::durable;
use base::fault::{Fault, IoContext};
use base::names::RelPath;
use content::frame::Verified;
use content::manifest::ChunkRef;
use sink::{Sink, StorageLocation};

/// Bytes of a registry blob that are read at once: its chunks mostly follow each other.
const AHEAD_BYTES: u64 = 4 << 20;
/// The same for a file whose chunks are known to follow each other.
const FILE_AHEAD_BYTES: u64 = 1 << 20;
/// Buffers for reading published files: their number and size.
const BUFFERS_KEPT: usize = 16;
const BUFFER_BYTES: (usize, usize) = (128 << 10, 2 << 20);

/// Reads chunks, mostly consecutive ones of one file.
pub struct Reader {
    chunk_index: Arc<ChunkIndex>,
    /// Reads blobs of the registry; `None`: the site has no registry.
    images: Option<Arc<dyn Sink>>,
    runtime: Handle,
    /// Whether a file whose size differs from the recorded size is refused, even if the chunk may
    /// still be in it.
    strict: bool,
    /// The number of consecutive bytes that will be requested, if known.
    ahead: Option<u64>,
    buffers: Buffers,
    /// The file that was read last.
    source: Option<Source>,
}

struct Source {
    place: u32,
    entry: u64,
    info: Arc<LocationInfo>,
    path: RelPath,
    size: u64,
    /// `None`: a blob of the registry.
    file: Option<File>,
    /// Bytes read ahead: their offset and content.
    ahead: (u64, Bytes),
}

impl Reader {
    /// A reader for a thread that may block.
    pub fn new(
        chunk_index: Arc<ChunkIndex>,
        images: Option<Arc<dyn Sink>>,
        runtime: Handle,
    ) -> Self {
        Self {
            chunk_index,
            images,
            runtime,
            strict: false,
            ahead: None,
            buffers: buffers(),
            source: None,
        }
    }

    /// The same for content published in place: a file with another size is a changed file.
    pub fn strict(self, buffers: Buffers) -> Self {
        Self {
            strict: true,
            buffers,
            ..self
        }
    }

    /// Announces that so many consecutive bytes will be requested from the next chunk on.
    pub fn ahead(&mut self, bytes: u64) {
        self.ahead = Some(bytes);
    }

    /// One chunk. The index may be stale: the error is `not_found`, or `integrity` if the bytes
    /// differ.
    pub fn chunk(&mut self, chunk: ChunkRef, at: At) -> Result<Verified, Fault> {
        let read = self.read(chunk, at);
        if read.is_err() {
            self.source = None;
        }
        read
    }

    fn read(&mut self, chunk: ChunkRef, at: At) -> Result<Verified, Fault> {
        if at.len != chunk.len {
            return Err(Fault::integrity(
                "its length differs from the recorded length",
            ));
        }
        let source = match self
            .source
            .take()
            .filter(|source| source.place == at.place && source.entry == at.entry)
        {
            Some(same) => same,
            None => self.open(at)?,
        };
        let source = self.source.insert(source);
        let end = at.offset + u64::from(at.len);
        let (start, bytes) = &source.ahead;
        if at.offset < *start || end > *start + bytes.len() as u64 {
            // One call for each chunk would be expensive; for a registry it would be a round trip.
            let ahead = match source.file {
                Some(_) => self.ahead.map_or(0, |ahead| ahead.min(FILE_AHEAD_BYTES)),
                None => self
                    .ahead
                    .map_or(AHEAD_BYTES, |ahead| ahead.min(AHEAD_BYTES)),
            };
            let len = ahead
                .min(source.size.saturating_sub(at.offset))
                .max(u64::from(at.len)) as usize;
            let read = match &source.file {
                Some(file) => {
                    let mut out = self.buffers.room(len);
                    let read = read_full(file, &mut out[..len], at.offset)
                        .at(format_args!("read {}", source.path))?;
                    self.buffers.lend(out).slice(..read)
                }
                None => {
                    let Some(images) = &self.images else {
                        return Err(Fault::internal("this site has no registry"));
                    };
                    self.runtime.block_on(images.read_at(
                        &source.info.place,
                        &source.path,
                        at.offset,
                        len as u32,
                    ))?
                }
            };
            source.ahead = (at.offset, read);
        }
        let (start, bytes) = &source.ahead;
        let from = (at.offset - start) as usize;
        if bytes.len() < from + at.len as usize {
            return Err(Fault::integrity("it is shorter than its recorded size"));
        }
        let bytes = bytes.slice(from..from + at.len as usize);
        Verified::check(chunk.id, bytes)
            .map_err(|_| Fault::integrity("the content does not match the recorded hash"))
    }

    fn open(&self, at: At) -> Result<Source, Fault> {
        let gone = || Fault::not_found("its storage location is gone");
        let info = self.chunk_index.info(at.place).ok_or_else(gone)?;
        let (path, entry) = self
            .chunk_index
            .entry(at.place, at.entry)?
            .ok_or_else(gone)?;
        let file = match &info.place {
            StorageLocation::Folder { path: folder } => {
                let full = path.in_dir(folder);
                let file =
                    durable::open_regular(&full).at(format_args!("open {}", full.display()))?;
                if self.strict {
                    let meta = file.metadata().at(full.display())?;
                    // A folder can also be opened, and has a size.
                    if !meta.is_file() {
                        return Err(Fault::integrity("it is not a regular file any more"));
                    }
                    if meta.len() != entry.size {
                        return Err(Fault::integrity("the size differs from the recorded size"));
                    }
                }
                Some(file)
            }
            StorageLocation::Registry { .. } => None,
        };
        Ok(Source {
            place: at.place,
            entry: at.entry,
            info,
            path,
            size: entry.size,
            file,
            ahead: (0, Bytes::new()),
        })
    }
}

/// Buffers for [`Reader::strict`].
pub fn buffers() -> Buffers {
    Buffers::new(BUFFERS_KEPT, BUFFER_BYTES.0, BUFFER_BYTES.1)
}

/// Reads until the buffer is full or the file ends. Returns the number of bytes.
fn read_full(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

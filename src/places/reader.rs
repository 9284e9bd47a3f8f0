//! Reads chunks where the index says that they lie, and hashes each.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::runtime::Handle;

use super::{At, PlaceInfo, Places};
use crate::fault::{Fault, IoContext};
use crate::frame::Verified;
use crate::manifest::ChunkRef;
use crate::names::RelPath;
use crate::sink::{Place, Sink};

/// Bytes that are read at once of a blob in the registry, whose chunks mostly follow each other.
const AHEAD_BYTES: u64 = 4 << 20;

/// Reads chunks, mostly one behind the other from one file.
pub struct Reader {
    places: Arc<Places>,
    /// Reads blobs of the registry; `None` where there is none.
    images: Option<Arc<dyn Sink>>,
    runtime: Handle,
    /// Whether a file of another size than noted is refused, though the chunk may be in it.
    strict: bool,
    /// Bytes that are read at once of a blob at the most.
    ahead: u64,
    /// The file that was read last.
    source: Option<Source>,
}

struct Source {
    place: u32,
    entry: u64,
    info: Arc<PlaceInfo>,
    path: RelPath,
    size: u64,
    /// `None`: a blob of the registry.
    file: Option<File>,
    /// Where the bytes that were read ahead begin, and they.
    ahead: (u64, Bytes),
}

impl Reader {
    /// A reader for a thread that may block.
    pub fn new(places: Arc<Places>, images: Option<Arc<dyn Sink>>, runtime: Handle) -> Self {
        Self { places, images, runtime, strict: false, ahead: AHEAD_BYTES, source: None }
    }

    /// The same for what was published where it lies: there a file of another size is another file. Of a blob no more is read
    /// at once than `bytes`.
    pub fn strict(self, bytes: u64) -> Self {
        Self { strict: true, ahead: bytes.min(AHEAD_BYTES), ..self }
    }

    /// One chunk. What the index says may be stale: then it is `not_found`, or `integrity` for other bytes.
    pub fn chunk(&mut self, chunk: ChunkRef, at: At) -> Result<Verified, Fault> {
        let read = self.read(chunk, at);
        if read.is_err() {
            self.source = None;
        }
        read
    }

    fn read(&mut self, chunk: ChunkRef, at: At) -> Result<Verified, Fault> {
        if at.len != chunk.len {
            return Err(Fault::integrity("its length is another"));
        }
        let source = match self.source.take().filter(|source| source.place == at.place && source.entry == at.entry) {
            Some(same) => same,
            None => self.open(at)?,
        };
        let source = self.source.insert(source);
        let bytes = match &source.file {
            Some(file) => {
                let mut out = vec![0; at.len as usize];
                match file.read_exact_at(&mut out, at.offset) {
                    Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Err(Fault::integrity("it is shorter now")),
                    other => other.at(format_args!("read {}", source.path))?,
                }
                out.into()
            }
            None => {
                let end = at.offset + u64::from(at.len);
                let (start, bytes) = &source.ahead;
                if at.offset < *start || end > *start + bytes.len() as u64 {
                    // A request for every chunk would take a round trip each.
                    let Some(images) = &self.images else { return Err(Fault::internal("there is no registry here")) };
                    let len = self.ahead.min(source.size.saturating_sub(at.offset)).max(u64::from(at.len)) as u32;
                    let read = images.read_at(&source.info.place, &source.path, at.offset, len);
                    source.ahead = (at.offset, self.runtime.block_on(read)?);
                }
                let (start, bytes) = &source.ahead;
                let from = (at.offset - start) as usize;
                if bytes.len() < from + at.len as usize {
                    return Err(Fault::integrity("the blob is shorter now"));
                }
                bytes.slice(from..from + at.len as usize)
            }
        };
        Verified::check(chunk.id, bytes).map_err(|_| Fault::integrity("its content is another"))
    }

    fn open(&self, at: At) -> Result<Source, Fault> {
        let gone = || Fault::not_found("its place is gone");
        let info = self.places.info(at.place).ok_or_else(gone)?;
        let (path, entry) = self.places.entry(at.place, at.entry)?.ok_or_else(gone)?;
        let file = match &info.place {
            Place::Folder { path: folder } => {
                let full = folder.join(path.as_str());
                let file = File::open(&full).at(format_args!("open {}", full.display()))?;
                if self.strict && file.metadata().at(full.display())?.len() != entry.size {
                    return Err(Fault::integrity("its size is another"));
                }
                Some(file)
            }
            Place::Registry { .. } => None,
        };
        Ok(Source { place: at.place, entry: at.entry, info, path, size: entry.size, file, ahead: (0, Bytes::new()) })
    }
}

//! Reads chunks from the packs, and removes damaged ones from the index.
//!
//! A receiver that verifies each chunk gets frames as they are stored, and only their headers are
//! checked ([`Store::read_to_send`]); a bundle gets frames whose checksums are verified
//! ([`Store::read_listed`]); all other callers receive verified chunks ([`Store::read`]). A chunk
//! that is found damaged leaves the index, which is durable when the read returns, so that the next
//! publish of the same content stores it again. [`Store::recheck`] looks for damage in the chunks
//! that a receiver refused.

use bytes::Bytes;

use super::Store;
use super::index::Location;
use crate::chunk::Hash;
use crate::frame::Verified;
use crate::manifest::{ChunkRef, Pages};
use base::fault::{Code, Fault};

/// Consecutive frames of one pack, which are read at once and sent unchanged.
type Extent = (Location, u64);

/// What is checked of a frame that is read.
#[derive(Clone, Copy)]
enum Check {
    /// The header.
    Header,
    /// The header and the checksum of the complete frame.
    Sum,
}

impl Store {
    /// Reads the frames of these chunks, in this order, and checks every checksum. Consecutive
    /// frames of one pack are returned in one buffer. A missing chunk is `not_found`; a damaged
    /// chunk is `integrity` and is never returned.
    pub fn read_frames(&self, ids: &[Hash]) -> Result<Vec<Bytes>, Fault> {
        self.read_some(ids, None, Check::Sum)
    }

    /// Like [`Store::read_frames`], for chunks as a manifest lists them. A frame whose raw length
    /// differs from the manifest is `integrity`, because the receiver would reject it.
    pub fn read_listed(&self, chunks: &[ChunkRef]) -> Result<Vec<Bytes>, Fault> {
        let ids: Vec<Hash> = chunks.iter().map(|chunk| chunk.id).collect();
        self.read_some(&ids, Some(chunks), Check::Sum)
    }

    /// Like [`Store::read_listed`], for a receiver that verifies the hash of each chunk: the stored
    /// bytes are not read here, because a checksum of them would cost a tenth of a sender's time
    /// and find nothing that the receiver does not find.
    pub fn read_to_send(&self, chunks: &[ChunkRef]) -> Result<Vec<Bytes>, Fault> {
        let ids: Vec<Hash> = chunks.iter().map(|chunk| chunk.id).collect();
        self.read_some(&ids, Some(chunks), Check::Header)
    }

    fn read_some(
        &self,
        ids: &[Hash],
        listed: Option<&[ChunkRef]>,
        check: Check,
    ) -> Result<Vec<Bytes>, Fault> {
        // A collection may remove a pack between the lookup and the read. Therefore only a second
        // failure counts.
        let read = || self.read_located(ids, listed, check);
        read()
            .or_else(|_| read())
            .inspect_err(|fault| self.forget_damaged(ids, fault))
    }

    fn read_located(
        &self,
        ids: &[Hash],
        listed: Option<&[ChunkRef]>,
        check: Check,
    ) -> Result<Vec<Bytes>, Fault> {
        let mut runs: Vec<Extent> = Vec::new();
        for (id, found) in ids.iter().zip(self.locate_many(ids)?) {
            let Some(at) = found else {
                return Err(missing(*id));
            };
            match runs.last_mut() {
                Some((first, len))
                    if first.pack == at.pack
                        && u64::from(first.offset) + *len == u64::from(at.offset) =>
                {
                    *len += u64::from(at.frame_len);
                }
                _ => runs.push((at, u64::from(at.frame_len))),
            }
        }
        self.read_runs(ids, listed, check, runs)
    }

    fn read_runs(
        &self,
        ids: &[Hash],
        listed: Option<&[ChunkRef]>,
        check: Check,
        runs: Vec<Extent>,
    ) -> Result<Vec<Bytes>, Fault> {
        let mut out = Vec::with_capacity(runs.len());
        let mut wanted = ids.iter();
        let mut listed = listed.unwrap_or_default().iter();
        for (first, len) in runs {
            let bytes = self
                .inner
                .packs
                .read(first.pack, u64::from(first.offset), len as usize)?;
            let mut rest = bytes.clone();
            while !rest.is_empty() {
                let packs = &self.inner.packs;
                let (id, raw_len) = match check {
                    Check::Header => {
                        let header = packs.skip_frame(first.pack, &mut rest)?;
                        (header.id, header.raw_len)
                    }
                    Check::Sum => {
                        let frame = packs.split_frame(first.pack, &mut rest)?;
                        (frame.id(), frame.raw_len())
                    }
                };
                if Some(id) != wanted.next().copied() {
                    return Err(Fault::integrity(format!(
                        "the pack {} contains chunk {id} at the position of a different chunk in the index",
                        first.pack,
                    )));
                }
                listed
                    .next()
                    .map_or(Ok(()), |chunk| check_len(chunk, raw_len))?;
            }
            out.push(bytes);
        }
        Ok(out)
    }

    /// Reads and verifies one chunk.
    pub fn read(&self, id: Hash) -> Result<Verified, Fault> {
        // Two attempts, as in `read_some`.
        self.read_once(id)
            .or_else(|_| self.read_once(id))
            .inspect_err(|fault| self.forget_damaged(&[id], fault))
    }

    /// Like [`Store::read`], for a chunk as a manifest lists it. A different length is `integrity`.
    pub fn read_chunk(&self, chunk: ChunkRef) -> Result<Verified, Fault> {
        let read = self.read(chunk.id)?;
        check_len(&chunk, read.bytes.len() as u32)?;
        Ok(read)
    }

    /// Reads and verifies those of these chunks that the store has, and removes damaged ones from
    /// the index. Returns the number of damaged chunks.
    pub fn recheck(&self, ids: &[Hash]) -> Result<usize, Fault> {
        let mut bad = 0;
        for id in ids {
            if self.has(*id)? {
                bad += usize::from(
                    self.read(*id)
                        .is_err_and(|fault| fault.code == Code::Integrity),
                );
            }
        }
        Ok(bad)
    }

    /// Removes damaged chunks from the index, so that the next publish of the same content stores
    /// them again.
    fn forget_damaged(&self, ids: &[Hash], fault: &Fault) {
        if fault.code != Code::Integrity {
            return;
        }
        let damaged: Vec<(Hash, Location)> =
            ids.iter().filter_map(|id| self.damaged(*id)).collect();
        if damaged.is_empty() {
            return;
        }
        tracing::error!(chunks = damaged.len(), error = %fault, "damaged chunks in the store");
        {
            // A chunk that was not flushed is only in the open part.
            let mut open = self.inner.open.lock();
            open.forget(&damaged);
        }
        if let Err(fault) = self.inner.index.forget_chunks(&damaged) {
            tracing::error!(error = %fault, "the chunk index cannot be updated");
        }
    }

    /// The chunk and its position, if it is damaged.
    fn damaged(&self, id: Hash) -> Option<(Hash, Location)> {
        let at = self.locate(id).ok().flatten()?;
        self.read_at(id, at)
            .is_err_and(|fault| fault.code == Code::Integrity)
            .then_some((id, at))
    }

    fn read_once(&self, id: Hash) -> Result<Verified, Fault> {
        let Some(at) = self.locate(id)? else {
            return Err(missing(id));
        };
        self.read_at(id, at)
    }

    fn read_at(&self, id: Hash, at: Location) -> Result<Verified, Fault> {
        let mut bytes =
            self.inner
                .packs
                .read(at.pack, u64::from(at.offset), at.frame_len as usize)?;
        let frame = self.inner.packs.split_frame(at.pack, &mut bytes)?;
        Ok(frame.verify(id, frame.raw_len())?)
    }
}

impl Pages for Store {
    fn page(&self, id: Hash) -> Result<Bytes, Fault> {
        self.read(id)
            .map(|chunk| chunk.bytes)
            .map_err(|fault| fault.context(format!("manifest page {id}")))
    }
}

/// Checks the length. A frame can be valid and still differ from the manifest; then the manifest is
/// wrong.
fn check_len(listed: &ChunkRef, len: u32) -> Result<(), Fault> {
    if listed.len == len {
        return Ok(());
    }
    Err(Fault::integrity(format!("chunk {} has {len} bytes, but the manifest states {}", listed.id, listed.len))
        .with_next("run 'packhorse verify' on the artifact, then publish the content again; if the error occurs again, publish it under a new version"))
}

/// The fault of a chunk that an artifact references but the store does not have.
fn missing(id: Hash) -> Fault {
    Fault::integrity(format!("chunk {id} is missing from the store: it was lost or damaged"))
        .with_next("run 'packhorse verify' on the artifacts, publish the affected ones again, then retry their transfers")
}

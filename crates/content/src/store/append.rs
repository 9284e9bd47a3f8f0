//! Appends frames to the open pack, and makes them durable.
//!
//! A put writes to the open pack and records the position in memory ([`Open`]), where this process
//! finds it at once. A flush syncs the packs first and commits the positions to the index
//! afterwards: the index never names bytes that a power failure could lose. What a crash leaves
//! behind the last commit is scanned at the next start.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::Ordering;

use super::Store;
use super::index::Location;
use super::pack::{FREE_SPACE, Unsynced, Writer};
use crate::chunk::Hash;
use crate::frame::Frame;
use base::fault::{Code, Fault};
use base::limits::{APPEND_LOOK_BYTES, INGEST_BATCH_BYTES, PACK_BYTES, STORE_SPARE_BYTES};
use base::space::Space;

/// The number of packs that are synced and closed before the index is written. After a crash, at
/// most this many packs (2 GiB) are scanned at the next start.
const PACKS_A_COMMIT: usize = 64;
/// The number of chunks that wait for the index; they take about 10 MB of memory.
pub(super) const ROWS_A_COMMIT: usize = 100_000;

/// The open pack, and the entries that the index does not have yet.
pub(super) struct Open {
    writer: Option<Writer>,
    /// Packs that are full and not synced.
    full: VecDeque<Unsynced>,
    /// The length to which each pack was synced since the index was written.
    synced: HashMap<u32, u64>,
    pending: HashMap<Hash, Location>,
    next_pack: u32,
}

impl Open {
    /// Nothing is open. The next pack gets this number.
    pub(super) fn new(next_pack: u32) -> Self {
        Self {
            writer: None,
            full: VecDeque::new(),
            synced: HashMap::new(),
            pending: HashMap::new(),
            next_pack,
        }
    }

    /// The position of a chunk that the index does not have yet.
    pub(super) fn find(&self, id: Hash) -> Option<Location> {
        self.pending.get(&id).copied()
    }

    /// The number of the pack that the next append writes to, unless that pack is full.
    pub(super) fn current_pack(&self) -> u32 {
        self.writer.as_ref().map_or(self.next_pack, Writer::number)
    }

    /// Removes these chunks, if they are at these positions.
    pub(super) fn forget(&mut self, chunks: &[(Hash, Location)]) {
        for (id, at) in chunks {
            if self.pending.get(id) == Some(at) {
                self.pending.remove(id);
            }
        }
    }

    /// Closes the open pack. Returns the number of the next one.
    pub(super) fn seal(&mut self) -> u32 {
        self.full
            .extend(self.writer.take().map(|writer| writer.unsynced()));
        self.next_pack
    }

    /// The writer of the open pack.
    #[cfg(test)]
    pub(super) fn writer_mut(&mut self) -> &mut Writer {
        self.writer.as_mut().unwrap()
    }

    /// The entries of synced bytes.
    fn synced_rows(&self) -> Vec<(Hash, Location)> {
        let is_synced = |at: &Location| {
            self.synced
                .get(&at.pack)
                .is_some_and(|len| u64::from(at.offset) < *len)
        };
        self.pending
            .iter()
            .filter(|(_, at)| is_synced(at))
            .map(|(id, at)| (*id, *at))
            .collect()
    }
}

impl Store {
    /// Stores a frame whose BLAKE3 the caller verified. Returns the bytes stored, 0 if the store
    /// already had the chunk.
    pub fn put(&self, frame: &Frame) -> Result<u64, Fault> {
        if self.has(frame.id())? {
            return Ok(0);
        }
        self.append(frame)
    }

    /// Like [`Store::put`], but first reads and verifies an existing chunk, and replaces it if it
    /// is damaged.
    pub fn put_over(&self, frame: &Frame) -> Result<u64, Fault> {
        if self.has(frame.id())? {
            match self.read(frame.id()) {
                Ok(_) => return Ok(0),
                // The read removed the damaged chunk from the index.
                Err(fault) if fault.code == Code::Integrity => {}
                Err(fault) => return Err(fault),
            }
        }
        self.append(frame)
    }

    /// Like [`Store::put`], for many frames that are not created yet: calls `frame` only for
    /// missing chunks, with their positions in `ids`.
    pub fn put_lacking(
        &self,
        ids: &[Hash],
        frame: impl FnMut(usize) -> Frame,
    ) -> Result<u64, Fault> {
        let here = self.has_many(ids)?;
        // The chunks of a hole are all the same.
        let mut taken = HashSet::new();
        let frames: Vec<Frame> = (0..ids.len())
            .filter(|place| !here[*place] && taken.insert(ids[*place]))
            .map(frame)
            .collect();
        self.append_all(&frames)
    }

    /// Fails if [`Store::append`] would fail because of a full disk. Call this before fetching
    /// content.
    pub fn check_room(&self) -> Result<(), Fault> {
        let open = self.inner.open.lock();
        match &open.writer {
            // As much as the next append requires.
            Some(writer) if writer.len() < self.inner.pack_bytes => self.inner.packs.check_room(
                writer.number(),
                STORE_SPARE_BYTES + APPEND_LOOK_BYTES + 2 * INGEST_BATCH_BYTES as u64,
            ),
            _ => self
                .inner
                .packs
                .check_room(open.next_pack, STORE_SPARE_BYTES + PACK_BYTES),
        }
    }

    /// Fails if this many more bytes do not fit, in addition to the reserve of the store.
    pub fn check_room_for(&self, bytes: u64) -> Result<(), Fault> {
        let free = Space::of(self.inner.packs.dir())?.bytes.unwrap_or(u64::MAX);
        let room = free.saturating_sub(STORE_SPARE_BYTES + PACK_BYTES);
        if bytes <= room {
            return Ok(());
        }
        let path = self.inner.packs.dir().display();
        Err(Fault::no_space(format!(
            "{bytes} more bytes do not fit in {path}, which has {room} bytes available"
        ))
        .with_next(FREE_SPACE))
    }

    /// Like [`Store::put`], for a caller that knows that the index does not have the chunk.
    pub fn append(&self, frame: &Frame) -> Result<u64, Fault> {
        self.append_all(std::slice::from_ref(frame))
    }

    /// Like [`Store::append`], for many frames, which are stored one after the other. Returns the
    /// bytes stored. Can fail because an older pack cannot be synced, although these frames were
    /// stored.
    pub fn append_all(&self, frames: &[Frame]) -> Result<u64, Fault> {
        let Some(meter) = self.lease.as_ref().and_then(|lease| lease.meter()) else {
            return self.append_leaving(frames, STORE_SPARE_BYTES + PACK_BYTES);
        };
        let bytes = frames.iter().map(|frame| frame.len() as u64).sum();
        meter.take(bytes)?;
        let appended = self.append_leaving(frames, STORE_SPARE_BYTES + PACK_BYTES);
        // After most errors it is unknown how much was stored, so all of it counts. A full disk
        // stores nothing.
        match &appended {
            Ok(kept) => meter.release(bytes.saturating_sub(*kept)),
            Err(fault) if fault.code == Code::NoSpace => meter.release(bytes),
            Err(_) => {}
        }
        appended
    }

    /// Appends, if a new pack would leave `spare` bytes free on the disk. Then syncs full packs.
    pub(super) fn append_leaving(&self, frames: &[Frame], spare: u64) -> Result<u64, Fault> {
        let mut open = self.inner.open.lock();
        let appended = self.append_to(&mut open, frames, spare);
        let is_one_full = !open.full.is_empty();
        drop(open);
        let synced = if is_one_full {
            self.sync_full_packs()
        } else {
            Ok(())
        };
        appended.and_then(|bytes| synced.map(|()| bytes))
    }

    fn append_to(&self, open: &mut Open, frames: &[Frame], spare: u64) -> Result<u64, Fault> {
        let mut new = HashSet::new();
        let frames: Vec<&Frame> = frames
            .iter()
            .filter(|f| !open.pending.contains_key(&f.id()) && new.insert(f.id()))
            .collect();
        if frames.is_empty() {
            return Ok(0);
        }
        if open
            .writer
            .as_ref()
            .is_some_and(|w| w.len() >= self.inner.pack_bytes)
        {
            open.seal();
        }
        if open.writer.is_none() {
            let number = open.next_pack;
            open.writer = Some(self.inner.packs.create(number, spare)?);
            open.next_pack += 1;
        }
        let Some(writer) = open.writer.as_mut() else {
            return Err(Fault::internal("no pack is open"));
        };
        let pieces: Vec<&[u8]> = frames.iter().flat_map(|frame| frame.pieces()).collect();
        // A collection requires no reserve: it frees space.
        let mut offset = writer.append(&pieces, spare.min(STORE_SPARE_BYTES))?;
        let (pack, begin) = (writer.number(), offset);
        for frame in frames {
            let location = Location {
                pack,
                offset,
                frame_len: frame.len() as u32,
            };
            open.pending.insert(frame.id(), location);
            offset += location.frame_len;
        }
        Ok(u64::from(offset - begin))
    }

    /// Makes everything that was put so far durable.
    pub fn flush(&self) -> Result<(), Fault> {
        let _turn = self.inner.syncing.lock();
        let last = {
            let open = self.inner.open.lock();
            open.writer
                .as_ref()
                .filter(|_| !open.pending.is_empty())
                .map(Writer::unsynced)
        };
        // The open pack is synced before the full ones: it can become full meanwhile, and is then
        // one of them.
        if let Some(last) = last {
            self.sync(&last)?;
        }
        self.sync_all_full()?;
        self.commit()
    }

    /// Makes full packs durable. Updates the index only if enough entries have accumulated, because
    /// each update copies most of its leaves.
    fn sync_full_packs(&self) -> Result<(), Fault> {
        let _turn = self.inner.syncing.lock();
        self.sync_all_full()?;
        let enough = {
            let open = self.inner.open.lock();
            open.synced.len() >= PACKS_A_COMMIT || open.pending.len() >= ROWS_A_COMMIT
        };
        if enough { self.commit() } else { Ok(()) }
    }

    /// How often chunks were lost after a put, because the disk failed when they were synced. Only
    /// the caller that synced gets the error. Other callers that put must compare this value: read
    /// it before the first put and pass it to [`Store::flush_since`] after the last one.
    pub fn losses(&self) -> u64 {
        self.inner.losses.load(Ordering::SeqCst)
    }

    /// Like [`Store::flush`], but also fails if chunks were lost since [`Store::losses`] returned
    /// `before`. The lost chunks may be those that the caller put, or those that it found and did
    /// not put.
    pub fn flush_since(&self, before: u64) -> Result<(), Fault> {
        self.flush()?;
        if self.losses() == before {
            return Ok(());
        }
        Err(Fault::internal(format!("writing to the disk of {} failed: chunks were lost", self.inner.packs.dir().display()))
            .with_next("check that disk (the daemon's log contains the error), then publish again: content that is already stored is not sent again"))
    }

    fn sync_all_full(&self) -> Result<(), Fault> {
        loop {
            let Some(pack) = self.inner.open.lock().full.pop_front() else {
                return Ok(());
            };
            self.sync(&pack)?;
        }
    }

    /// Syncs a pack. Afterwards the index may name its bytes.
    fn sync(&self, pack: &Unsynced) -> Result<(), Fault> {
        let number = pack.number;
        let synced = pack.sync();
        let mut open = self.inner.open.lock();
        let Err(fault) = synced else {
            open.synced.insert(number, pack.len);
            return Ok(());
        };
        // A failed sync may have lost any of the new bytes of the pack, and a second sync would
        // succeed. Therefore remove all of its entries; the chunks must be put again.
        open.pending.retain(|_, at| at.pack != number);
        open.full.retain(|other| other.number != number);
        open.synced.remove(&number);
        open.writer.take_if(|writer| writer.number() == number);
        // Update the counter last: a caller that reads the new value no longer finds any of these
        // chunks.
        self.inner.losses.fetch_add(1, Ordering::SeqCst);
        drop(open);
        tracing::error!(pack = number, error = %fault, "chunks were lost: syncing the pack failed");
        // Cut the pack, so that the next start does not accept frames that may be only in memory.
        let cut = self.inner.index.packs().and_then(|known| {
            self.inner
                .packs
                .cut(number, known.get(&number).copied().unwrap_or(0))
        });
        if let Err(fault) = cut {
            tracing::error!(pack = number, error = %fault, "the pack cannot be truncated to its durable length");
        }
        Err(fault)
    }

    /// Adds all synced entries to the index.
    fn commit(&self) -> Result<(), Fault> {
        let (found, packs) = {
            let open = self.inner.open.lock();
            (
                open.synced_rows(),
                open.synced
                    .iter()
                    .map(|(number, len)| (*number, *len))
                    .collect::<Vec<_>>(),
            )
        };
        if !found.is_empty() {
            self.inner.index.commit(&found, &packs)?;
        }
        let mut open = self.inner.open.lock();
        for (id, _) in found {
            open.pending.remove(&id);
        }
        open.synced.clear();
        Ok(())
    }
}

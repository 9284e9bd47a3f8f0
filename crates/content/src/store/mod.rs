//! The store: chunks in packs, and an index of their positions.
//!
//! The hub keeps all content here. A site keeps only manifest pages here; its delivered files and
//! blobs are its chunk store (see `chunk_index`). A chunk is written as a [`Frame`] and appended to
//! the open pack. [`Store::flush`] syncs the pack and then commits its index entries, so the index
//! never names bytes that a power failure could lose. A full pack is synced by the thread that
//! starts the next pack. That thread also updates the index if enough entries have accumulated;
//! other threads continue to put meanwhile. This process can read chunks immediately after they are
//! put, before the flush.
//!
//! On disk, in the directory of the store: `packs/00000001.pack …` (a header of 8 bytes, then
//! frames) and `index.redb`. After a crash, the part of the last packs that is not in the index is
//! scanned: complete frames are kept, the incomplete rest is cut off. The index takes 35 to 71
//! bytes of disk per chunk, and memory only for its cache ([`INDEX_CACHE_BYTES`]).
//! [`rebuild_index`] rebuilds it from the packs.

mod index;
mod lease;
mod pack;
mod rebuild;

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::chunk::{Hash, ShortHash};
use crate::frame::{Frame, FrameError, HEADER_BYTES, Header, Verified};
use crate::manifest::{ChunkRef, Pages};
use base::durable;
use base::fault::{Code, Fault};
use base::limits::{PACK_BYTES, STORE_SPARE_BYTES};
use base::space::Space;

pub use index::INDEX_CACHE_BYTES;
use index::{Index, Location, REBUILD};
use lease::{Lease, Leases};

pub use lease::Meter;
use pack::{FREE_SPACE, Packs, Unsynced, Writer};
pub use rebuild::{Rebuilt, rebuild_index};

const INDEX: &str = "index.redb";

/// The number of packs that are synced and closed before the index is written. After a crash, at
/// most this many packs (2 GiB) are scanned at the next start.
const PACKS_A_COMMIT: usize = 64;
/// The number of chunks that wait for the index; they take about 10 MB of memory.
const ROWS_A_COMMIT: usize = 100_000;
/// The number of packs that a collection rewrites per scan of the index.
const COLLECT_TOGETHER: usize = 256;

/// A handle to a store. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
    /// Shared by the clones of a handle.
    lease: Option<Arc<Lease>>,
}

struct Inner {
    packs: Packs,
    index: Index,
    /// Held by one thread while it syncs packs and updates the index. Always taken before `open`.
    syncing: Mutex<()>,
    /// Held during an append, never during a sync.
    open: Mutex<Open>,
    /// The size from which a pack is full.
    pack_bytes: u64,
    /// See [`Store::losses`].
    losses: AtomicU64,
    /// See [`Store::leased`].
    leases: Arc<Leases>,
}

/// The open pack, and the entries that the index does not have yet.
struct Open {
    writer: Option<Writer>,
    /// Packs that are full and not synced.
    full: VecDeque<Unsynced>,
    /// The length to which each pack was synced since the index was written.
    synced: HashMap<u32, u64>,
    pending: HashMap<Hash, Location>,
    next_pack: u32,
}

impl Open {
    /// Closes the open pack.
    fn seal(&mut self) {
        self.full
            .extend(self.writer.take().map(|writer| writer.unsynced()));
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

/// Consecutive frames of one pack, which are read at once and sent unchanged.
type Extent = (Location, u64);

impl Store {
    /// Opens or creates the store in this directory, and recovers it after a crash.
    pub fn open(dir: &Path) -> Result<Self, Fault> {
        Self::open_with(dir, PACK_BYTES)
    }

    fn open_with(dir: &Path, pack_bytes: u64) -> Result<Self, Fault> {
        durable::create_dir_all(&dir.join("packs"))?;
        let packs = Packs::new(dir.join("packs"));
        let path = dir.join(INDEX);
        if !path.exists() && !packs.list()?.is_empty() {
            return Err(Fault::config(format!(
                "{} is missing although there are packs: the chunk index is lost",
                path.display()
            ))
            .with_next(REBUILD));
        }
        let index = Index::open(&path)?;
        let known = index.packs()?;
        // The number of a lost pack is not reused: the index may still have chunks in it.
        let mut next_pack = known.keys().next_back().map_or(1, |last| last + 1);
        for number in packs.list()? {
            next_pack = next_pack.max(number + 1);
            let synced = known.get(&number).copied().unwrap_or(0);
            if synced == 0 && packs.put_aside(number)? {
                continue;
            }
            if synced == 0 || packs.len(number)? > synced {
                let (found, end) = packs.recover(number, synced)?;
                if found.is_empty() && synced == 0 {
                    packs.remove(number)?;
                    continue;
                }
                tracing::info!(
                    pack = number,
                    chunks = found.len(),
                    "recovered the tail of a pack"
                );
                index.commit(&found, &[(number, end)])?;
            }
        }
        let open = Open {
            writer: None,
            full: VecDeque::new(),
            synced: HashMap::new(),
            pending: HashMap::new(),
            next_pack,
        };
        let (syncing, open) = (Mutex::new(()), Mutex::new(open));
        let (losses, leases) = Default::default();
        Ok(Self {
            inner: Arc::new(Inner {
                packs,
                index,
                syncing,
                open,
                pack_bytes,
                losses,
                leases,
            }),
            lease: None,
        })
    }

    /// Packs that the index names but that do not exist.
    pub fn lost_packs(&self) -> Result<Vec<u32>, Fault> {
        let existing = self.inner.packs.list()?;
        Ok(self
            .inner
            .index
            .packs()?
            .into_keys()
            .filter(|number| !existing.contains(number))
            .collect())
    }

    /// Whether damage of the index was detected since it was opened.
    pub fn is_damaged(&self) -> bool {
        self.inner.index.is_damaged()
    }

    /// The directory of the packs, for messages.
    pub fn path(&self) -> PathBuf {
        self.inner.packs.dir().to_owned()
    }

    fn locate(&self, id: Hash) -> Result<Option<Location>, Fault> {
        if let Some(found) = self.inner.open.lock().pending.get(&id) {
            return Ok(Some(*found));
        }
        self.inner.index.get(id)
    }

    /// Looks up pending chunks first: a flush adds chunks to the index before it removes them from
    /// `pending`, so the reverse order could miss them. A pending copy takes precedence: the index
    /// may name an older copy in a pack that a collection removes, and only the returned position
    /// is pinned.
    fn locate_many(&self, ids: &[Hash]) -> Result<Vec<Option<Location>>, Fault> {
        let pending: Vec<Option<Location>> = {
            let open = self.inner.open.lock();
            ids.iter().map(|id| open.pending.get(id).copied()).collect()
        };
        Ok(pending
            .into_iter()
            .zip(self.inner.index.get_many(ids)?)
            .map(|(pending, found)| pending.or(found))
            .collect())
    }

    /// Returns a handle with a lease: no collection removes what is put or found through this
    /// handle and its clones while one of them exists. Take it before the first lookup and keep it
    /// until the artifact is in the catalogue.
    pub fn leased(&self) -> Self {
        self.lease(None)
    }

    /// Like [`Store::leased`], with a meter for everything that is put through this handle and its
    /// clones.
    pub fn leased_with(&self, meter: Arc<dyn Meter>) -> Self {
        self.lease(Some(meter))
    }

    fn lease(&self, meter: Option<Arc<dyn Meter>>) -> Self {
        let open = self.inner.open.lock();
        let floor = open.writer.as_ref().map_or(open.next_pack, Writer::number);
        let lease = self.inner.leases.begin(floor, meter);
        Self {
            inner: self.inner.clone(),
            lease: Some(Arc::new(lease)),
        }
    }

    /// Whether the store has the chunk.
    pub fn has(&self, id: Hash) -> Result<bool, Fault> {
        let mut found = [self.locate(id)?];
        if let Some(lease) = &self.lease {
            lease.pin(&mut found);
        }
        Ok(found[0].is_some())
    }

    /// The raw length of a chunk as stated in its frame; `None` if the store does not have the
    /// chunk. Reads only the header of the frame.
    pub fn raw_len(&self, id: Hash) -> Result<Option<u32>, Fault> {
        // This lookup pins the chunk, as every lookup with a lease does.
        if !self.has(id)? {
            return Ok(None);
        }
        let Some(at) = self.locate(id)? else {
            return Ok(None);
        };
        let head = self
            .inner
            .packs
            .read(at.pack, u64::from(at.offset), HEADER_BYTES)?;
        let header = head
            .first_chunk()
            .ok_or(FrameError::Malformed)
            .and_then(Header::parse)?;
        Ok(Some(header.raw_len))
    }

    /// For each of these chunks, whether the store has it.
    pub fn has_many(&self, ids: &[Hash]) -> Result<Vec<bool>, Fault> {
        let mut found = self.locate_many(ids)?;
        if let Some(lease) = &self.lease {
            lease.pin(&mut found);
        }
        Ok(found.into_iter().map(|found| found.is_some()).collect())
    }

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
        let frames: Vec<Frame> = (0..ids.len())
            .filter(|place| !here[*place])
            .map(frame)
            .collect();
        self.append_all(&frames)
    }

    /// Fails if [`Store::append`] would fail because of a full disk. Call this before fetching
    /// content.
    pub fn check_room(&self) -> Result<(), Fault> {
        let open = self.inner.open.lock();
        match &open.writer {
            Some(writer) if writer.len() < self.inner.pack_bytes => self
                .inner
                .packs
                .check_room(writer.number(), STORE_SPARE_BYTES),
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
            Ok(kept) => meter.give_back(bytes.saturating_sub(*kept)),
            Err(fault) if fault.code == Code::NoSpace => meter.give_back(bytes),
            Err(_) => {}
        }
        appended
    }

    /// Appends, if a new pack would leave `spare` bytes free on the disk. Then syncs full packs.
    fn append_leaving(&self, frames: &[Frame], spare: u64) -> Result<u64, Fault> {
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

    /// Reads the frames of these chunks, in this order, and checks every checksum. Consecutive
    /// frames of one pack are returned in one buffer. A missing chunk is `not_found`; a damaged
    /// chunk is `integrity` and is never returned.
    pub fn read_frames(&self, ids: &[Hash]) -> Result<Vec<Bytes>, Fault> {
        self.read_some(ids, None)
    }

    /// Like [`Store::read_frames`], for chunks as a manifest lists them. A frame whose raw length
    /// differs from the manifest is `integrity`, because the receiver would reject it.
    pub fn read_listed(&self, chunks: &[ChunkRef]) -> Result<Vec<Bytes>, Fault> {
        let ids: Vec<Hash> = chunks.iter().map(|chunk| chunk.id).collect();
        self.read_some(&ids, Some(chunks))
    }

    fn read_some(&self, ids: &[Hash], listed: Option<&[ChunkRef]>) -> Result<Vec<Bytes>, Fault> {
        // A collection may remove a pack between the lookup and the read. Therefore only a second
        // failure counts.
        let read = || self.read_located(ids, listed);
        read()
            .or_else(|_| read())
            .inspect_err(|fault| self.forget_damaged(ids, fault))
    }

    fn read_located(&self, ids: &[Hash], listed: Option<&[ChunkRef]>) -> Result<Vec<Bytes>, Fault> {
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
        self.read_runs(ids, listed, runs)
    }

    fn read_runs(
        &self,
        ids: &[Hash],
        listed: Option<&[ChunkRef]>,
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
                let frame = self.inner.packs.split_frame(first.pack, &mut rest)?;
                let expected = wanted.next().copied();
                if Some(frame.id()) != expected {
                    return Err(Fault::integrity(format!(
                        "the pack {} contains chunk {} at the position of a different chunk in the index",
                        first.pack,
                        frame.id()
                    )));
                }
                listed
                    .next()
                    .map_or(Ok(()), |chunk| check_len(chunk, frame.raw_len()))?;
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
            // A chunk that was not flushed is only in `pending`.
            let mut open = self.inner.open.lock();
            for (id, at) in &damaged {
                if open.pending.get(id) == Some(at) {
                    open.pending.remove(id);
                }
            }
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

    /// Frees unused buffers. Call this periodically.
    pub fn rest(&self) {
        self.inner.packs.rest();
    }

    /// The size of all packs on disk.
    pub fn stored_bytes(&self) -> Result<u64, Fault> {
        self.inner
            .packs
            .list()?
            .into_iter()
            .map(|number| self.inner.packs.len(number))
            .sum()
    }

    /// Removes every chunk that is not `live`; see [`Store::begin_collection`]. Returns the bytes
    /// freed.
    pub fn collect(&self, live: &dyn Fn(ShortHash) -> bool) -> Result<u64, Fault> {
        self.begin_collection()?.sweep(live, &|| Ok(()))
    }

    /// Starts a collection. Content that is put after this call, and content with a lease from
    /// before or after it, is kept. Therefore determine the live chunks after this call. Other
    /// threads continue to put and look up meanwhile.
    pub fn begin_collection(&self) -> Result<Collection, Fault> {
        let collection = {
            let mut open = self.inner.open.lock();
            open.seal();
            Collection {
                end_before: self.inner.leases.begin_collection(open.next_pack),
                store: self.clone(),
            }
        };
        // The index does not have the content of the packs that others write meanwhile, but it must
        // have the content of all older packs.
        self.flush()?;
        Ok(collection)
    }
}

/// A running collection.
pub struct Collection {
    store: Store,
    /// Packs from this number on are not touched.
    end_before: u32,
}

impl Drop for Collection {
    fn drop(&mut self) {
        self.store.inner.leases.end_collection();
    }
}

impl Collection {
    /// Removes every chunk that is not `live`. A pack with less than 70 % live bytes is rewritten.
    /// Other packs, and packs that are pinned by a lease, keep their garbage. Calls
    /// `check_cancelled` repeatedly and stops if it fails; the work done until then is valid.
    /// Returns the bytes freed.
    pub fn sweep(
        self,
        live: &dyn Fn(ShortHash) -> bool,
        check_cancelled: &dyn Fn() -> Result<(), Fault>,
    ) -> Result<u64, Fault> {
        let store = &self.store;
        let before = store.stored_bytes()?;
        let mut alive: HashMap<u32, u64> = HashMap::new();
        store.inner.index.scan(|id, at| {
            if live(id) {
                *alive.entry(at.pack).or_default() += u64::from(at.frame_len);
            }
        })?;
        let mut sparse = Vec::new();
        for number in store
            .inner
            .packs
            .list()?
            .into_iter()
            .filter(|number| *number < self.end_before)
        {
            if alive.get(&number).copied().unwrap_or(0) * 10 < store.inner.packs.len(number)? * 7 {
                sparse.push(number);
            }
        }
        for batch in sparse.chunks(COLLECT_TOGETHER) {
            let packs = store.inner.leases.select_packs(batch);
            let dead = store
                .copy_live(&packs, live, check_cancelled)
                .inspect_err(|_| store.inner.leases.deselect_packs(&packs))?;
            // Remove the packs from the index before their files. A crash in between leaves packs
            // that the index does not name. The next start adds their frames again, which only
            // costs space.
            store.inner.index.forget(&dead, &packs)?;
            packs
                .iter()
                .try_for_each(|number| store.inner.packs.remove(*number))?;
        }
        Ok(before.saturating_sub(store.stored_bytes()?))
    }
}

impl Pages for Store {
    fn page(&self, id: Hash) -> Result<Bytes, Fault> {
        self.read(id)
            .map(|chunk| chunk.bytes)
            .map_err(|fault| fault.context(format!("manifest page {id}")))
    }
}

impl Store {
    /// Copies the live chunks out of these packs and makes the copies durable. Returns the chunks
    /// to remove from the index. A damaged chunk is already lost; it is removed too, so that it
    /// does not block later collections.
    fn copy_live(
        &self,
        packs: &[u32],
        live: &dyn Fn(ShortHash) -> bool,
        check_cancelled: &dyn Fn() -> Result<(), Fault>,
    ) -> Result<Vec<ShortHash>, Fault> {
        let losses = self.losses();
        let mut chunks: Vec<(ShortHash, Location)> = Vec::new();
        self.inner.index.scan(|id, at| {
            if packs.contains(&at.pack) {
                chunks.push((id, at));
            }
        })?;
        chunks.sort_unstable_by_key(|(_, at)| (at.pack, at.offset));
        let mut dead: Vec<ShortHash> = Vec::new();
        for (id, at) in chunks {
            check_cancelled()?;
            if !live(id) {
                dead.push(id);
                continue;
            }
            match self.read_named(id, at) {
                // A collection may use the reserve, because it frees more space.
                Ok(frame) => {
                    self.append_leaving(&[frame], 0)?;
                }
                Err(fault) if fault.code == Code::Integrity => {
                    tracing::error!(chunk = hex::encode(id), error = %fault, "damaged chunk in the store: it was removed from the index");
                    dead.push(id);
                }
                Err(fault) => return Err(fault),
            }
        }
        // A concurrent flush may have failed for the copied chunks. Then the only copies are in the
        // old packs.
        self.flush_since(losses)?;
        Ok(dead)
    }

    /// Reads the frame at this position, and checks its id and checksum.
    fn read_named(&self, id: ShortHash, at: Location) -> Result<Frame, Fault> {
        let frame = Frame::parse(self.inner.packs.read(
            at.pack,
            u64::from(at.offset),
            at.frame_len as usize,
        )?);
        let frame = frame.map_err(|e| {
            Fault::from(e).context(format!("pack {}, chunk {}…", at.pack, hex::encode(id)))
        })?;
        if frame.id().short() != id {
            return Err(Fault::integrity(format!(
                "the pack {} contains a different chunk at the position of {}…",
                at.pack,
                hex::encode(id)
            )));
        }
        Ok(frame)
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

#[cfg(test)]
mod tests;

//! The store: chunks in packs, and the index that says where each lies.
//!
//! The hub keeps everything here; a site keeps manifest pages here (its files and blobs are its
//! chunk store, see `places`). A chunk is written as a [`Frame`], appended to the open pack.
//! [`Store::flush`] syncs it and then commits its index entries, so the index never names bytes
//! that a power cut could take. A pack that is full is synced by whoever begins the next, who tells
//! the index as well once there is enough to tell; the others go on putting meanwhile. Chunks put
//! but not flushed can be read at once by this process.
//!
//! On disk, under the store's folder: `packs/00000001.pack …` (a header of 8 bytes, then frames)
//! and `index.redb`. After a crash what the index does not know of the last packs is scanned: whole
//! frames are kept, the torn rest is cut off. The index costs 35 to 71 bytes of disk a chunk and no
//! memory but its cache ([`INDEX_CACHE_BYTES`]); [`rebuild_index`] makes it again from the packs.

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
use pack::{MAKE_ROOM, Packs, Unsynced, Writer};
pub use rebuild::{Rebuilt, rebuild_index};

const INDEX: &str = "index.redb";

/// Packs that are synced and closed before the index is written. What a crash leaves of them is
/// read at the next start: 2 GiB at the most…
const PACKS_A_COMMIT: usize = 64;
/// …and chunks that wait for the index, in about 10 MB of memory.
const ROWS_A_COMMIT: usize = 100_000;
/// Packs that a collection rewrites for one look through the index.
const COLLECT_TOGETHER: usize = 256;

/// A store. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
    /// Shared by the clones of a handle.
    lease: Option<Arc<Lease>>,
}

struct Inner {
    packs: Packs,
    index: Index,
    /// Held while packs are synced and the index is told, by one at a time. Always taken before
    /// `open`.
    syncing: Mutex<()>,
    /// Held for as long as an append takes, never over a sync.
    open: Mutex<Open>,
    /// From this length on a pack is full.
    pack_bytes: u64,
    /// See [`Store::losses`].
    losses: AtomicU64,
    /// See [`Store::leased`].
    leases: Arc<Leases>,
}

/// The pack being written, and what the index does not know yet.
struct Open {
    writer: Option<Writer>,
    /// Packs that are full and not synced.
    full: VecDeque<Unsynced>,
    /// How far packs were synced since the index was written.
    synced: HashMap<u32, u64>,
    pending: HashMap<Hash, Location>,
    next_pack: u32,
}

impl Open {
    /// Ends the open pack.
    fn seal(&mut self) {
        self.full
            .extend(self.writer.take().map(|writer| writer.unsynced()));
    }

    /// The rows of what was synced.
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

/// Frames that lie behind each other in one pack: read at once, sent as they are.
type Extent = (Location, u64);

impl Store {
    /// Opens or makes the store in this folder, and mends what a crash left.
    pub fn open(dir: &Path) -> Result<Self, Fault> {
        Self::open_with(dir, PACK_BYTES)
    }

    fn open_with(dir: &Path, pack_bytes: u64) -> Result<Self, Fault> {
        durable::create_dir_all(&dir.join("packs"))?;
        let packs = Packs::new(dir.join("packs"));
        let path = dir.join(INDEX);
        if !path.exists() && !packs.list()?.is_empty() {
            return Err(Fault::config(format!(
                "{} is missing, and there are packs beside it: the chunk index is lost",
                path.display()
            ))
            .with_next(REBUILD));
        }
        let index = Index::open(&path)?;
        let known = index.packs()?;
        // A pack that was lost leaves its number to the chunks that the index still looks for in
        // it.
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

    /// Packs that the index counts on and that are gone.
    pub fn lost_packs(&self) -> Result<Vec<u32>, Fault> {
        let there = self.inner.packs.list()?;
        Ok(self
            .inner
            .index
            .packs()?
            .into_keys()
            .filter(|number| !there.contains(number))
            .collect())
    }

    /// Whether the index was found damaged since it was opened.
    pub fn is_damaged(&self) -> bool {
        self.inner.index.is_damaged()
    }

    /// The folder of the packs, for what is said to people.
    pub fn path(&self) -> PathBuf {
        self.inner.packs.dir().to_owned()
    }

    fn locate(&self, id: Hash) -> Result<Option<Location>, Fault> {
        if let Some(found) = self.inner.open.lock().pending.get(&id) {
            return Ok(Some(*found));
        }
        self.inner.index.get(id)
    }

    /// What is pending is looked up first: a flush puts chunks into the index before it forgets
    /// them here, so that the other order would miss those that are flushed in between. A pending
    /// copy goes first: the row may name an older one in a pack that a collection takes away, and
    /// only what is found is pinned.
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

    /// A handle for whoever will count on what he puts and finds: no collection takes it away while
    /// this handle or a clone of it is there. It is to be taken before the first look, and kept
    /// until the artifact is in the catalogue.
    pub fn leased(&self) -> Self {
        self.lease(None)
    }

    /// [`Store::leased`], with a meter for all that is put through this handle and its clones.
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

    /// Whether the chunk is here.
    pub fn has(&self, id: Hash) -> Result<bool, Fault> {
        let mut found = [self.locate(id)?];
        if let Some(lease) = &self.lease {
            lease.pin(&mut found);
        }
        Ok(found[0].is_some())
    }

    /// The raw length of a chunk as its frame names it; `None` when the chunk is not here. Reads no
    /// more than the frame's header.
    pub fn raw_len(&self, id: Hash) -> Result<Option<u32>, Fault> {
        // As for every look of somebody with a lease.
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

    /// Which of these chunks are here.
    pub fn has_many(&self, ids: &[Hash]) -> Result<Vec<bool>, Fault> {
        let mut found = self.locate_many(ids)?;
        if let Some(lease) = &self.lease {
            lease.pin(&mut found);
        }
        Ok(found.into_iter().map(|found| found.is_some()).collect())
    }

    /// Puts a frame whose BLAKE3 the caller verified. Returns the bytes it took, 0 when the chunk
    /// was here already.
    pub fn put(&self, frame: &Frame) -> Result<u64, Fault> {
        if self.has(frame.id())? {
            return Ok(0);
        }
        self.append(frame)
    }

    /// [`Store::put`] for a caller that repairs: a chunk that is here is read and verified first,
    /// and replaced if it is damaged.
    pub fn put_over(&self, frame: &Frame) -> Result<u64, Fault> {
        if self.has(frame.id())? {
            match self.read(frame.id()) {
                Ok(_) => return Ok(0),
                // The read removed it from the index.
                Err(fault) if fault.code == Code::Integrity => {}
                Err(fault) => return Err(fault),
            }
        }
        self.append(frame)
    }

    /// [`Store::put`] for many.
    pub fn put_all(&self, mut frames: Vec<Frame>) -> Result<u64, Fault> {
        let ids: Vec<Hash> = frames.iter().map(Frame::id).collect();
        let mut here = self.has_many(&ids)?.into_iter();
        frames.retain(|_| !here.next().unwrap_or(false));
        self.append_all(&frames)
    }

    /// [`Store::put`] for many whose frames are still to be made: asks only for those that are not
    /// here, by their places in `ids`.
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

    /// Fails as [`Store::append`] does for want of room, before what is to be put is fetched for
    /// nothing.
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

    /// Fails when so many bytes more will not fit, beside the room that the store leaves.
    pub fn check_room_for(&self, bytes: u64) -> Result<(), Fault> {
        let free = Space::of(self.inner.packs.dir())?.bytes.unwrap_or(u64::MAX);
        let room = free.saturating_sub(STORE_SPARE_BYTES + PACK_BYTES);
        if bytes <= room {
            return Ok(());
        }
        let path = self.inner.packs.dir().display();
        Err(Fault::no_space(format!(
            "{bytes} bytes more will not fit in {path}, which has {room} to spare"
        ))
        .with_next(MAKE_ROOM))
    }

    /// [`Store::put`] for a caller that knows that the index lacks the chunk.
    pub fn append(&self, frame: &Frame) -> Result<u64, Fault> {
        self.append_all(std::slice::from_ref(frame))
    }

    /// [`Store::append`] for many, which lie behind each other then. Returns the bytes that they
    /// took. It may fail over an older pack that cannot be synced, though these were kept.
    pub fn append_all(&self, frames: &[Frame]) -> Result<u64, Fault> {
        let Some(meter) = self.lease.as_ref().and_then(|lease| lease.meter()) else {
            return self.append_leaving(frames, STORE_SPARE_BYTES + PACK_BYTES);
        };
        let bytes = frames.iter().map(|frame| frame.len() as u64).sum();
        meter.take(bytes)?;
        let appended = self.append_leaving(frames, STORE_SPARE_BYTES + PACK_BYTES);
        // Where it is not known how much was kept, all of it counts, but for a full disk, which
        // kept nothing.
        match &appended {
            Ok(kept) => meter.give_back(bytes.saturating_sub(*kept)),
            Err(fault) if fault.code == Code::NoSpace => meter.give_back(bytes),
            Err(_) => {}
        }
        appended
    }

    /// Appends, if a new pack would leave this much room on the disk, and syncs what became full.
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
        // A collection asks for nothing to stay free: it makes room.
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

    /// Makes everything put so far durable.
    pub fn flush(&self) -> Result<(), Fault> {
        let _turn = self.inner.syncing.lock();
        let last = {
            let open = self.inner.open.lock();
            open.writer
                .as_ref()
                .filter(|_| !open.pending.is_empty())
                .map(Writer::unsynced)
        };
        // Before the full ones: at any moment it may become full itself, and be one of them.
        if let Some(last) = last {
            self.sync(&last)?;
        }
        self.sync_all_full()?;
        self.commit()
    }

    /// Makes the packs durable that are full. The index is told when there is enough to tell: each
    /// time it copies most of its leaves.
    fn sync_full_packs(&self) -> Result<(), Fault> {
        let _turn = self.inner.syncing.lock();
        self.sync_all_full()?;
        let enough = {
            let open = self.inner.open.lock();
            open.synced.len() >= PACKS_A_COMMIT || open.pending.len() >= ROWS_A_COMMIT
        };
        if enough { self.commit() } else { Ok(()) }
    }

    /// How often chunks were lost after they were put, because the disk failed when they were to be
    /// made durable. That is told to whoever synced; everybody else who puts compares: this before
    /// the first put, [`Store::flush_since`] after the last.
    pub fn losses(&self) -> u64 {
        self.inner.losses.load(Ordering::SeqCst)
    }

    /// [`Store::flush`], which fails as well if anything was lost since [`Store::losses`] said
    /// `before`: it may have been what the caller put, or what he found here and did not put.
    pub fn flush_since(&self, before: u64) -> Result<(), Fault> {
        self.flush()?;
        if self.losses() == before {
            return Ok(());
        }
        Err(Fault::internal(format!("the disk of {} failed while it was written: chunks were lost", self.inner.packs.dir().display()))
            .with_next("look after that disk (the daemon's log has its error), then publish again: what was kept is not sent again"))
    }

    fn sync_all_full(&self) -> Result<(), Fault> {
        loop {
            let Some(pack) = self.inner.open.lock().full.pop_front() else {
                return Ok(());
            };
            self.sync(&pack)?;
        }
    }

    /// Syncs a pack. After that its bytes may be named by the index.
    fn sync(&self, pack: &Unsynced) -> Result<(), Fault> {
        let number = pack.number;
        let synced = pack.sync();
        let mut open = self.inner.open.lock();
        let Err(fault) = synced else {
            open.synced.insert(number, pack.len);
            return Ok(());
        };
        // A sync that failed may have lost any of the pack's new bytes: forget them all, they will
        // be sent again. The next one would say that all is well.
        open.pending.retain(|_, at| at.pack != number);
        open.full.retain(|other| other.number != number);
        open.synced.remove(&number);
        open.writer.take_if(|writer| writer.number() == number);
        // After that: whoever reads the new count finds none of them here.
        self.inner.losses.fetch_add(1, Ordering::SeqCst);
        drop(open);
        tracing::error!(pack = number, error = %fault, "chunks were lost: the disk failed as they were to be made durable");
        // Nor may the next start take them for whole: they may be so in memory only.
        let cut = self.inner.index.packs().and_then(|known| {
            self.inner
                .packs
                .cut(number, known.get(&number).copied().unwrap_or(0))
        });
        if let Err(fault) = cut {
            tracing::error!(pack = number, error = %fault, "the pack cannot be cut back to what is durable of it");
        }
        Err(fault)
    }

    /// Tells the index of all that was synced.
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

    /// The frames of these chunks in this order, neighbours joined into one piece, every sum
    /// checked. A chunk that is not here is `not_found`; a damaged one is `integrity` and is never
    /// given out.
    pub fn read_frames(&self, ids: &[Hash]) -> Result<Vec<Bytes>, Fault> {
        self.read_some(ids, None)
    }

    /// [`Store::read_frames`] of chunks as a manifest names them: a frame that has another raw
    /// length than the manifest names is `integrity` as well, because whoever receives it refuses
    /// it.
    pub fn read_listed(&self, chunks: &[ChunkRef]) -> Result<Vec<Bytes>, Fault> {
        let ids: Vec<Hash> = chunks.iter().map(|chunk| chunk.id).collect();
        self.read_some(&ids, Some(chunks))
    }

    fn read_some(&self, ids: &[Hash], listed: Option<&[ChunkRef]>) -> Result<Vec<Bytes>, Fault> {
        // A collection may take a pack away between the look at the index and the read: the second
        // failure is believed.
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
                        "the pack {} holds chunk {} where the index says another",
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

    /// One chunk's raw bytes, verified.
    pub fn read(&self, id: Hash) -> Result<Verified, Fault> {
        // As in `read_frames`.
        self.read_unforgiving(id)
            .or_else(|_| self.read_unforgiving(id))
            .inspect_err(|fault| self.forget_damaged(&[id], fault))
    }

    /// [`Store::read`] of a chunk as a manifest names it: another length than the manifest names is
    /// `integrity` as well.
    pub fn read_chunk(&self, chunk: ChunkRef) -> Result<Verified, Fault> {
        let read = self.read(chunk.id)?;
        check_len(&chunk, read.bytes.len() as u32)?;
        Ok(read)
    }

    /// Reads and verifies these chunks as far as they are here, and removes those from the index
    /// that do not verify. Returns how many those were.
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

    /// A chunk that turned out damaged is as good as not there: forgotten, it is stored anew by the
    /// next publish of it.
    fn forget_damaged(&self, ids: &[Hash], fault: &Fault) {
        if fault.code != Code::Integrity {
            return;
        }
        let damaged: Vec<(Hash, Location)> =
            ids.iter().filter_map(|id| self.damaged(*id)).collect();
        if damaged.is_empty() {
            return;
        }
        tracing::error!(chunks = damaged.len(), error = %fault, "damage in the store");
        {
            // What is not flushed yet stands there only.
            let mut open = self.inner.open.lock();
            for (id, at) in &damaged {
                if open.pending.get(id) == Some(at) {
                    open.pending.remove(id);
                }
            }
        }
        if let Err(fault) = self.inner.index.forget_chunks(&damaged) {
            tracing::error!(error = %fault, "the chunk index cannot be written");
        }
    }

    /// The chunk and where it lies, if it is damaged there.
    fn damaged(&self, id: Hash) -> Option<(Hash, Location)> {
        let at = self.locate(id).ok().flatten()?;
        self.read_at(id, at)
            .is_err_and(|fault| fault.code == Code::Integrity)
            .then_some((id, at))
    }

    fn read_unforgiving(&self, id: Hash) -> Result<Verified, Fault> {
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

    /// To be called now and then: an idle daemon keeps no buffers.
    pub fn rest(&self) {
        self.inner.packs.rest();
    }

    /// Bytes that the packs take on the disk.
    pub fn stored_bytes(&self) -> Result<u64, Fault> {
        self.inner
            .packs
            .list()?
            .into_iter()
            .map(|number| self.inner.packs.len(number))
            .sum()
    }

    /// Removes every chunk for which `live` says no; see [`Store::begin_collection`]. Returns the
    /// bytes freed.
    pub fn collect(&self, live: &dyn Fn(ShortHash) -> bool) -> Result<u64, Fault> {
        self.begin_collection()?.sweep(live, &|| Ok(()))
    }

    /// Begins a collection. What is put from here on stays, and what is leased from here on or was
    /// before; so what is alive is to be worked out after this call. Others go on putting and
    /// finding meanwhile.
    pub fn begin_collection(&self) -> Result<Collection, Fault> {
        let collection = {
            let mut open = self.inner.open.lock();
            open.seal();
            Collection {
                end_before: self.inner.leases.begin_collection(open.next_pack),
                store: self.clone(),
            }
        };
        // The index does not know yet what lives in the packs that others write meanwhile; of the
        // older ones it knows all.
        self.flush()?;
        Ok(collection)
    }
}

/// A collection that has begun.
pub struct Collection {
    store: Store,
    /// Packs from this number on are let be.
    end_before: u32,
}

impl Drop for Collection {
    fn drop(&mut self) {
        self.store.inner.leases.end_collection();
    }
}

impl Collection {
    /// Removes every chunk for which `live` says no. Packs of which less than 70 % lives are
    /// written anew; the others, and those in which somebody with a lease found something, keep
    /// their dead weight. `go_on` is asked now and then, and ends the collection when it fails;
    /// what was done until then is whole. Returns the bytes freed.
    pub fn sweep(
        self,
        live: &dyn Fn(ShortHash) -> bool,
        go_on: &dyn Fn() -> Result<(), Fault>,
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
        for some in sparse.chunks(COLLECT_TOGETHER) {
            let packs = store.inner.leases.take_away(some);
            let dead = store
                .move_out(&packs, live, go_on)
                .inspect_err(|_| store.inner.leases.leave(&packs))?;
            // The index forgets the packs before the files go: a crash between leaves packs that
            // nothing names, and the next start takes their frames in again, which costs room and
            // no harm.
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
    /// Moves what lives out of these packs, and makes it durable. Returns the chunks that are to be
    /// forgotten. What is damaged is lost already, and would else stand in the way of every
    /// collection to come.
    fn move_out(
        &self,
        packs: &[u32],
        live: &dyn Fn(ShortHash) -> bool,
        go_on: &dyn Fn() -> Result<(), Fault>,
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
            go_on()?;
            if !live(id) {
                dead.push(id);
                continue;
            }
            match self.read_named(id, at) {
                // A collection may use the room that is kept free: it makes more.
                Ok(frame) => {
                    self.append_leaving(&[frame], 0)?;
                }
                Err(fault) if fault.code == Code::Integrity => {
                    tracing::error!(chunk = hex::encode(id), error = %fault, "damage in the store: the chunk is forgotten");
                    dead.push(id);
                }
                Err(fault) => return Err(fault),
            }
        }
        // A flush of somebody else may have failed over what was moved: then it lives in the old
        // packs only.
        self.flush_since(losses)?;
        Ok(dead)
    }

    /// The frame that lies there, if it is the one of that name and undamaged.
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
                "the pack {} holds another chunk where {}… should be",
                at.pack,
                hex::encode(id)
            )));
        }
        Ok(frame)
    }
}

/// A frame may be sound and still not be what a manifest names: then it is the manifest that is
/// wrong.
fn check_len(listed: &ChunkRef, len: u32) -> Result<(), Fault> {
    if listed.len == len {
        return Ok(());
    }
    Err(Fault::integrity(format!("chunk {} has {len} bytes; the manifest says {}", listed.id, listed.len))
        .with_next("run 'packhorse verify' on the artifact, then publish the content again; if that finds the same, under a new version"))
}

/// An artifact names the chunk, so it was here once.
fn missing(id: Hash) -> Fault {
    Fault::integrity(format!("chunk {id} is not in the store: it was lost or damaged"))
        .with_next("run 'packhorse verify' on the artifacts, publish those hit again, then retry their transfers")
}

#[cfg(test)]
mod tests;

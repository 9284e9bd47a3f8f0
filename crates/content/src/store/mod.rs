//! The store: chunks in packs, and an index of their positions.
//!
//! The hub keeps all content here. A site keeps only manifest pages here; its delivered files and
//! blobs are its chunk store (see `chunk_index`). A chunk is written as a
//! [`Frame`](crate::frame::Frame) and appended to the open pack. [`Store::flush`] syncs the pack and
//! then commits its index entries, so the index never names bytes that a power failure could lose. A
//! full pack is synced by the thread that starts the next pack. That thread also updates the index
//! if enough entries have accumulated; other threads continue to put at the same time. This process
//! can read chunks immediately after they are put, before the flush. The parts: `append` writes,
//! `read` reads, `collect` removes.
//!
//! On disk, in the directory of the store: `packs/00000001.pack …` (a header of 8 bytes, then
//! frames) and `index.redb`. After a crash, the part of the last packs that is not in the index is
//! scanned: complete frames are kept, the incomplete rest is cut off. The index takes 35 to 71
//! bytes of disk per chunk, and memory only for its cache ([`INDEX_CACHE_BYTES`]).
//! [`rebuild_index`] rebuilds it from the packs.

mod append;
mod collect;
mod index;
mod lease;
mod pack;
mod read;
mod rebuild;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use parking_lot::Mutex;

use crate::chunk::Hash;
use crate::frame::{FrameError, HEADER_BYTES, Header};
use append::Open;
use base::durable;
use base::fault::Fault;
use base::limits::PACK_BYTES;
use index::{Index, Location, REBUILD};
use lease::{Lease, Leases};
use pack::Packs;

pub use collect::Collection;
pub use index::INDEX_CACHE_BYTES;
pub use lease::Meter;
pub use rebuild::{Rebuilt, rebuild_index};

const INDEX: &str = "index.redb";

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
        let (syncing, open) = (Mutex::new(()), Mutex::new(Open::new(next_pack)));
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
        let pending = self.inner.open.lock().find(id);
        match pending {
            Some(found) => Ok(Some(found)),
            None => self.inner.index.get(id),
        }
    }

    /// Looks up pending chunks first: a flush adds chunks to the index before it removes them from
    /// `pending`, so the reverse order could miss them. A pending copy takes precedence: the index
    /// may name an older copy in a pack that a collection removes, and only the returned position
    /// is pinned.
    fn locate_many(&self, ids: &[Hash]) -> Result<Vec<Option<Location>>, Fault> {
        let pending: Vec<Option<Location>> = {
            let open = self.inner.open.lock();
            ids.iter().map(|id| open.find(*id)).collect()
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
        let floor = open.current_pack();
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
}

#[cfg(test)]
mod tests;

//! Collections: remove the content that no artifact needs.
//!
//! `gc` calls [`Store::begin_collection`], determines the live chunks, and calls
//! [`Collection::sweep`]. Publishes continue during a collection: `lease` protects what they put or
//! find. After a crash in the middle, packs that were rewritten and not yet removed only cost space.

use std::collections::HashMap;

use super::Store;
use super::index::Location;
use crate::chunk::ShortHash;
use crate::frame::Frame;
use base::fault::{Code, Fault};

/// The number of packs that a collection rewrites per scan of the index.
const COLLECT_TOGETHER: usize = 256;

impl Store {
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
            let next_pack = open.seal();
            Collection {
                end_before: self.inner.leases.begin_collection(next_pack),
                store: self.clone(),
            }
        };
        // The index does not have the content of the packs that others write meanwhile, but it must
        // have the content of all older packs.
        self.flush()?;
        Ok(collection)
    }

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

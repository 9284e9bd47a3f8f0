//! Leases: protect content in use from garbage collection.
//!
//! A publisher holds a lease ([`Store::leased`](super::Store::leased)) from before its first lookup
//! in the store until the artifact is in the catalogue. The lease protects two things from
//! collections:
//! - Content that is put: it goes to the open pack or a later one, and no collection touches these
//!   packs (the *floor* of the lease).
//! - Content that is found: its pack is *pinned* at the same moment. Packs that a collection has
//!   already selected are *gone*: their content counts as missing and is put again.
//!
//! A collection also protects what was leased at any time since it began, because it may have read
//! the catalogue before an artifact was added. A collection never waits for a lease, and a lease
//! never waits for a collection. A pinned pack keeps its garbage until a later collection. In
//! memory only: after a crash there are no publishers with leases.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;

use super::index::Location;
use base::fault::Fault;

/// Counts the bytes that are put through a leased handle, and can reject them.
pub trait Meter: Send + Sync {
    /// Counts bytes before they are stored, or rejects them.
    fn take(&self, bytes: u64) -> Result<(), Fault>;
    /// Returns bytes that were counted but not stored.
    fn release(&self, bytes: u64);
}

/// All leases of a store. Its lock is taken after the lock of the open pack, never before.
#[derive(Default)]
pub(super) struct Leases {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    active: HashMap<u64, LeaseState>,
    /// The number of running collections.
    collections: usize,
    /// Packs pinned by leases that ended since the collection began.
    pinned_since_start: HashSet<u32>,
    /// Packs that a collection removes or has removed. Their numbers are never reused.
    gone: HashSet<u32>,
}

struct LeaseState {
    floor: u32,
    pins: HashSet<u32>,
}

impl Leases {
    /// Starts a lease. `floor` is the number of the open pack or of the next pack. The caller holds
    /// the lock of the open pack.
    pub(super) fn begin(self: &Arc<Self>, floor: u32, meter: Option<Arc<dyn Meter>>) -> Lease {
        let mut state = self.state.lock();
        state.next += 1;
        let id = state.next;
        state.active.insert(
            id,
            LeaseState {
                floor,
                pins: HashSet::new(),
            },
        );
        Lease {
            leases: self.clone(),
            id,
            meter,
        }
    }

    /// Starts a collection. Returns the number of the first pack that it must not touch.
    /// `first_new` is the number of the next pack; no pack is open. The caller holds the lock of
    /// the open pack.
    pub(super) fn begin_collection(&self, first_new: u32) -> u32 {
        let mut state = self.state.lock();
        state.collections += 1;
        state
            .active
            .values()
            .map(|held| held.floor)
            .fold(first_new, u32::min)
    }

    /// Ends a collection.
    pub(super) fn end_collection(&self) {
        let mut state = self.state.lock();
        state.collections -= 1;
        if state.collections == 0 {
            state.pinned_since_start.clear();
        }
    }

    /// Selects those of these packs that are not pinned. From now on their content counts as
    /// missing.
    pub(super) fn select_packs(&self, packs: &[u32]) -> Vec<u32> {
        let mut state = self.state.lock();
        let is_pinned = |pack: &u32| {
            state.pinned_since_start.contains(pack)
                || state.active.values().any(|held| held.pins.contains(pack))
        };
        let free: Vec<u32> = packs
            .iter()
            .copied()
            .filter(|pack| !is_pinned(pack) && !state.gone.contains(pack))
            .collect();
        state.gone.extend(&free);
        free
    }

    /// Undoes the selection of these packs.
    pub(super) fn deselect_packs(&self, packs: &[u32]) {
        let mut state = self.state.lock();
        packs.iter().for_each(|pack| {
            state.gone.remove(pack);
        });
    }
}

/// Protects what its holder puts and finds. Dropping it ends the protection.
pub(super) struct Lease {
    leases: Arc<Leases>,
    id: u64,
    /// Dropped with the last handle, after the end of the lease.
    meter: Option<Arc<dyn Meter>>,
}

impl Lease {
    pub(super) fn meter(&self) -> Option<&dyn Meter> {
        self.meter.as_deref()
    }

    /// Pins what was found. A position in a selected pack counts as missing.
    pub(super) fn pin(&self, found: &mut [Option<Location>]) {
        let mut state = self.leases.state.lock();
        let State { active, gone, .. } = &mut *state;
        let Some(held) = active.get_mut(&self.id) else {
            return;
        };
        for place in found {
            match place {
                Some(at) if gone.contains(&at.pack) => *place = None,
                Some(at) => {
                    held.pins.insert(at.pack);
                }
                None => {}
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.leases.state.lock();
        if let Some(held) = state.active.remove(&self.id)
            && state.collections > 0
        {
            state.pinned_since_start.extend(held.pins);
        }
    }
}

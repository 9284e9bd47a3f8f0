//! Leases: what a collection must leave alone because somebody counts on it.
//!
//! Whoever publishes holds a lease ([`Store::leased`](super::Store::leased)) from before the first
//! look at the store until the artifact is in the catalogue. Two things are safe from collections
//! meanwhile:
//! - what is put: it goes to the open pack or a later one, and no collection touches these packs
//!   (the lease's *floor*);
//! - what is found: the pack in which it lies is *pinned* at the same moment. Packs that a
//!   collection has chosen already are *gone*: what lies in them counts as not found, and is put
//!   again.
//!
//! A collection spares what was leased at any time since it began, because it may have read the
//! catalogue before an artifact was added. It never waits for a lease, nor does a lease wait for
//! it. A pinned pack keeps its dead weight until a later collection. All of it is in memory: after
//! a crash nobody counts on anything.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;

use super::index::Location;
use base::fault::Fault;

/// Counts what is put through the handle of a lease, and may refuse it.
pub trait Meter: Send + Sync {
    /// Counts bytes that are about to be stored, or refuses them.
    fn take(&self, bytes: u64) -> Result<(), Fault>;
    /// Bytes that were counted and not stored after all.
    fn give_back(&self, bytes: u64);
}

/// All leases of a store. Its lock is taken after that of the open pack, never before.
#[derive(Default)]
pub(super) struct Leases {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    active: HashMap<u64, LeaseState>,
    /// Collections that have begun and not ended.
    collections: usize,
    /// Packs that were pinned by leases which ended since the collection began.
    spared: HashSet<u32>,
    /// Packs that a collection takes away, or took away: their numbers are never used again.
    gone: HashSet<u32>,
}

struct LeaseState {
    floor: u32,
    pins: HashSet<u32>,
}

impl Leases {
    /// Begins a lease. `floor` is the number of the open pack, or of the next; the caller holds the
    /// open pack's lock.
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

    /// Begins a collection, and says from which pack on it must touch nothing. `first_new` is the
    /// number of the next pack, with none open; the caller holds the open pack's lock.
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
            state.spared.clear();
        }
    }

    /// Of these packs those that nobody has pinned; from now on nothing is found in them.
    pub(super) fn take_away(&self, packs: &[u32]) -> Vec<u32> {
        let mut state = self.state.lock();
        let is_pinned = |pack: &u32| {
            state.spared.contains(pack)
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

    /// These packs stay after all.
    pub(super) fn leave(&self, packs: &[u32]) {
        let mut state = self.state.lock();
        packs.iter().for_each(|pack| {
            state.gone.remove(pack);
        });
    }
}

/// Keeps what its holder puts and finds from being collected, until it is dropped.
pub(super) struct Lease {
    leases: Arc<Leases>,
    id: u64,
    /// Dropped with the last handle, after the lease ended.
    meter: Option<Arc<dyn Meter>>,
}

impl Lease {
    pub(super) fn meter(&self) -> Option<&dyn Meter> {
        self.meter.as_deref()
    }

    /// Pins what was found. What lies in a pack that goes away counts as not found.
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
            state.spared.extend(held.pins);
        }
    }
}

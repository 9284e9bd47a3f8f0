//! A budget of bytes in flight, shared by many peers.
//!
//! The hub takes from one budget the memory for the chunks that it reads for its sites. A site
//! takes from another the memory for the chunks that it sends. The part of each peer is limited and
//! shrinks as more peers connect. A peer that does not read from its connection therefore blocks
//! only its own part. Among the requests of one peer, the request with the highest priority is
//! served first, so that a manifest does not wait behind the content requested by a large transfer.
//! In memory only.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::fault::Fault;
use crate::peer::Peer;

/// A budget of bytes. Cheap to clone.
#[derive(Clone)]
pub struct Budget {
    inner: Arc<Inner>,
}

struct Inner {
    /// The size of the budget in bytes.
    total: u64,
    /// The largest part of one peer in bytes, even if there are few peers.
    part_max: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    used: u64,
    seats: usize,
    /// Peers that hold bytes or wait for bytes.
    peers: HashMap<Peer, Account>,
    requests: u64,
}

#[derive(Default)]
struct Account {
    used: u64,
    /// Waiting requests in the order in which they are served: by priority, then by arrival.
    waiting: BTreeMap<(Reverse<i32>, u64), (u64, oneshot::Sender<Share>)>,
}

/// Bytes taken from a budget. Dropping the share returns them.
pub struct Share {
    inner: Arc<Inner>,
    peer: Peer,
    bytes: u64,
}

/// Reserves a part of the budget for a peer while the peer is connected.
pub struct Seat {
    inner: Arc<Inner>,
}

impl Share {
    /// The bytes that were taken.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Budget {
    /// Creates a budget of `total` bytes. One peer gets at most `part_max` of them.
    pub fn new(total: u64, part_max: u64) -> Self {
        Self {
            inner: Arc::new(Inner {
                total,
                part_max,
                state: Mutex::default(),
            }),
        }
    }

    /// Counts one more connected peer, for which a part of the budget is reserved.
    pub fn seat(&self) -> Seat {
        self.inner.state.lock().seats += 1;
        Seat {
            inner: self.inner.clone(),
        }
    }

    /// The part of one peer while all connected peers use the budget.
    pub fn part(&self) -> u64 {
        self.inner.part(&self.inner.state.lock())
    }

    /// Waits until `bytes` are available. A request that is larger than the part of its peer is
    /// served when the peer holds nothing else.
    pub async fn take(&self, peer: &Peer, bytes: u64, priority: i32) -> Result<Share, Fault> {
        let (send, receive) = oneshot::channel();
        {
            let mut state = self.inner.state.lock();
            state.requests += 1;
            let key = (Reverse(priority), state.requests);
            state
                .peers
                .entry(peer.clone())
                .or_default()
                .waiting
                .insert(key, (bytes, send));
        }
        Inner::serve(&self.inner);
        receive
            .await
            .map_err(|_| Fault::internal("the byte budget was closed"))
    }
}

impl Inner {
    fn part(&self, state: &State) -> u64 {
        (self.total / state.peers.len().max(state.seats).max(1) as u64).min(self.part_max)
    }

    /// Serves all requests that can be served now.
    fn serve(this: &Arc<Self>) {
        // If the receiver of a share is gone, the share is dropped here, and the drop locks the
        // state. Therefore the share is sent after `next` has released the lock.
        while let Some((send, share)) = this.next() {
            drop(send.send(share));
        }
    }

    /// Serves the next request: among the waiting peers whose part allows it, that of the peer that
    /// holds the fewest bytes.
    fn next(self: &Arc<Self>) -> Option<(oneshot::Sender<Share>, Share)> {
        let mut state = self.state.lock();
        let part = self.part(&state);
        let left = self.total.saturating_sub(state.used);
        let all_free = state.used == 0;
        let fits = |account: &Account| {
            let (bytes, _) = account.waiting.first_key_value()?.1;
            ((account.used == 0 || account.used + bytes <= part) && (all_free || *bytes <= left))
                .then_some(account.used)
        };
        let peer = state
            .peers
            .iter()
            .filter_map(|(peer, account)| Some((fits(account)?, peer)))
            .min()?
            .1
            .clone();
        let account = state.peers.get_mut(&peer)?;
        let (_, (bytes, send)) = account.waiting.pop_first()?;
        account.used += bytes;
        state.used += bytes;
        Some((
            send,
            Share {
                inner: self.clone(),
                peer,
                bytes,
            },
        ))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        {
            let mut state = self.inner.state.lock();
            state.used -= self.bytes;
            if let Some(account) = state.peers.get_mut(&self.peer) {
                account.used -= self.bytes;
                if account.used == 0 && account.waiting.is_empty() {
                    state.peers.remove(&self.peer);
                }
            }
        }
        Inner::serve(&self.inner);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.inner.state.lock().seats -= 1;
        Inner::serve(&self.inner);
    }
}

/// Slots for blocking work. Each peer has a fixed number of them, so that one peer cannot occupy
/// all processors and the disk. Cheap to clone.
#[derive(Clone)]
pub struct WorkPlaces {
    each: usize,
    peers: Arc<Mutex<HashMap<Peer, Weak<Semaphore>>>>,
}

impl WorkPlaces {
    /// Creates slots: `each` for each peer.
    pub fn new(each: usize) -> Self {
        Self {
            each,
            peers: Arc::default(),
        }
    }

    /// Waits for a slot of this peer. Dropping the permit frees the slot.
    pub async fn take(&self, peer: &Peer) -> Option<OwnedSemaphorePermit> {
        let places = {
            let mut peers = self.peers.lock();
            match peers.get(peer).and_then(Weak::upgrade) {
                Some(places) => places,
                None => {
                    peers.retain(|_, places| places.strong_count() > 0);
                    let places = Arc::new(Semaphore::new(self.each));
                    peers.insert(peer.clone(), Arc::downgrade(&places));
                    places
                }
            }
        };
        places.acquire_owned().await.ok()
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    fn peer(name: &str) -> Peer {
        Peer::Site(name.parse().unwrap())
    }

    /// Takes bytes that are available without waiting.
    fn now(budget: &Budget, name: &str, bytes: u64) -> Option<Share> {
        budget
            .take(&peer(name), bytes, 0)
            .now_or_never()
            .map(Result::unwrap)
    }

    #[test]
    fn a_peer_that_returns_nothing_leaves_the_others_their_part() {
        let budget = Budget::new(100, 40);
        let slow: Vec<Option<Share>> = (0..9).map(|_| now(&budget, "slow", 10)).collect();
        assert_eq!(
            slow.iter().flatten().count(),
            4,
            "limited by the largest part of one peer"
        );
        let quick: Vec<Option<Share>> = (0..9).map(|_| now(&budget, "quick", 10)).collect();
        assert_eq!(quick.iter().flatten().count(), 4);
        assert_eq!(budget.part(), 40);
        let seats: Vec<Seat> = (0..10).map(|_| budget.seat()).collect();
        assert_eq!(budget.part(), 10);
        drop(quick);
        assert!(
            now(&budget, "quick", 10).is_some(),
            "its part is a tenth of the budget now"
        );
        let held = now(&budget, "quick", 10);
        assert!(held.is_some() && now(&budget, "quick", 10).is_none());
        drop(seats);
        assert!(
            now(&budget, "quick", 10).is_some(),
            "a peer that disconnected has no part"
        );
    }

    #[test]
    fn the_highest_priority_is_served_first_and_cancelled_requests_hold_nothing() {
        let budget = Budget::new(10, 10);
        let all = now(&budget, "a", 10).unwrap();
        let a = peer("a");
        let mut bulk = Box::pin(budget.take(&a, 10, 0));
        let mut manifest = Box::pin(budget.take(&a, 10, 20));
        let mut gone = Box::pin(budget.take(&a, 10, 30));
        assert!(
            bulk.as_mut().now_or_never().is_none() && manifest.as_mut().now_or_never().is_none()
        );
        assert!(gone.as_mut().now_or_never().is_none());
        drop(gone);
        drop(all);
        let first = manifest.as_mut().now_or_never();
        assert!(first.is_some() && bulk.as_mut().now_or_never().is_none());
        drop(first);
        assert!(bulk.as_mut().now_or_never().is_some());
        assert!(budget.inner.state.lock().peers.is_empty());
    }

    #[test]
    fn a_request_larger_than_a_part_is_served_alone() {
        let budget = Budget::new(10, 4);
        let large = now(&budget, "a", 30);
        assert!(
            large.is_some() && now(&budget, "a", 1).is_none() && now(&budget, "b", 1).is_none()
        );
        drop(large);
        assert!(now(&budget, "b", 1).is_some());
    }

    #[test]
    fn a_peer_has_a_fixed_number_of_slots_for_work() {
        let places = WorkPlaces::new(2);
        let take = |name: &str| places.take(&peer(name)).now_or_never().flatten();
        let (first, second) = (take("a"), take("a"));
        assert!(
            first.is_some() && second.is_some() && take("a").is_none(),
            "two places"
        );
        assert!(take("b").is_some(), "another peer has its own slots");
        drop(first);
        assert!(take("a").is_some());
        drop(second);
        assert!(take("c").is_some());
        assert_eq!(
            places.peers.lock().len(),
            1,
            "peers without work are removed"
        );
    }
}

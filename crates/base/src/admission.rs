//! Slots for connections whose peer is not authenticated yet. Their number is limited in total and
//! for each address.
//!
//! The listener for sites has one pool for TCP handshakes, one for QUIC handshakes and one for join
//! requests. The API has one pool for each of its listeners. If a pool is full, or if one address
//! has used its share of it, the pool evicts the oldest unfinished connection and gives its slot to
//! the new connection. Therefore silent connections cannot keep out a peer that completes its
//! handshake. This module does no I/O: the owner of a [`Permit`] must close its connection when
//! [`Permit::evicted`] is ready, and drops the permit after the connection. A listener waits for
//! [`Pool::ready`] before it accepts the next connection: those that are being closed have open
//! files too. Nothing survives a restart.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The unit that counts as one address: an IPv4 address, or the /64 network of an IPv6 address,
/// because one machine can use all addresses of a /64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Network(IpAddr);

impl From<IpAddr> for Network {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            v4 @ IpAddr::V4(_) => Self(v4),
            IpAddr::V6(v6) => {
                let [a, b, c, d, ..] = v6.segments();
                Self(IpAddr::from([a, b, c, d, 0, 0, 0, 0]))
            }
        }
    }
}

struct Entry {
    /// `None` for a local socket, which counts for no address.
    network: Option<Network>,
    is_finished: bool,
    evicted: CancellationToken,
}

/// All slots of a pool, oldest first.
#[derive(Default)]
struct Slots {
    next: u64,
    entries: BTreeMap<u64, Entry>,
    /// The permits that exist; some of them may have lost their slots.
    permits: usize,
}

impl Slots {
    fn unfinished(&self) -> impl Iterator<Item = (u64, Option<Network>)> {
        self.entries
            .iter()
            .filter(|(_, entry)| !entry.is_finished)
            .map(|(id, entry)| (*id, entry.network))
    }

    fn unfinished_of(&self, network: Network) -> impl Iterator<Item = u64> {
        self.unfinished()
            .filter(move |(_, of)| *of == Some(network))
            .map(|(id, _)| id)
    }

    fn evict(&mut self, id: u64) {
        if let Some(entry) = self.entries.remove(&id) {
            entry.evicted.cancel();
        }
    }
}

#[derive(Default)]
struct PoolState {
    slots: Mutex<Slots>,
    left: Notify,
}

/// A pool of slots for connections.
pub struct Pool {
    permits_max: usize,
    shared: Arc<PoolState>,
}

impl Pool {
    /// Creates a pool with this number of slots.
    pub fn new(permits_max: usize) -> Self {
        Self {
            permits_max,
            shared: Arc::default(),
        }
    }

    /// Takes a slot for a new connection. If `network` already has `own_max` unfinished
    /// connections, or if the pool is full, this evicts the oldest unfinished connection. Returns
    /// `None` if the pool is full and all its connections are finished.
    pub fn enter(&self, network: Option<Network>, own_max: usize) -> Option<Permit> {
        let mut slots = self.shared.slots.lock();
        if let Some(network) = network {
            let own: Vec<u64> = slots.unfinished_of(network).collect();
            let surplus = (own.len() + 1).saturating_sub(own_max.max(1));
            own.into_iter().take(surplus).for_each(|id| slots.evict(id));
        }
        if slots.entries.len() >= self.permits_max {
            let (oldest, _) = slots.unfinished().next()?;
            slots.evict(oldest);
        }
        let id = slots.next;
        slots.next += 1;
        slots.permits += 1;
        let evicted = CancellationToken::new();
        slots.entries.insert(
            id,
            Entry {
                network,
                is_finished: false,
                evicted: evicted.clone(),
            },
        );
        Some(Permit {
            id,
            shared: self.shared.clone(),
            evicted,
        })
    }

    /// Like [`Pool::enter`], but waits for a finished connection to leave if no connection can be
    /// evicted.
    pub async fn enter_when_possible(&self, network: Option<Network>, own_max: usize) -> Permit {
        loop {
            let left = self.shared.left.notified();
            if let Some(permit) = self.enter(network, own_max) {
                return permit;
            }
            left.await;
        }
    }

    /// Waits until no more connections exist than there are slots: those that lost their slots to
    /// newer ones are closed.
    pub async fn ready(&self) {
        loop {
            let left = self.shared.left.notified();
            if self.shared.slots.lock().permits <= self.permits_max {
                return;
            }
            left.await;
        }
    }

    /// The number of connections that have a slot.
    pub fn used(&self) -> usize {
        self.shared.slots.lock().entries.len()
    }

    /// The number of unfinished connections of one address.
    pub fn unfinished_of(&self, network: Network) -> usize {
        self.shared.slots.lock().unfinished_of(network).count()
    }
}

/// The slot of one connection, which is closed before the permit is dropped. Dropping it frees the
/// slot.
pub struct Permit {
    id: u64,
    shared: Arc<PoolState>,
    evicted: CancellationToken,
}

impl Permit {
    /// Completes when the pool has given this slot to a newer connection.
    pub async fn evicted(&self) {
        self.evicted.cancelled().await;
    }

    /// Marks the peer as authenticated. The pool no longer evicts this connection, and it no longer
    /// counts for its address.
    pub fn finish(&self) {
        self.set_finished(true);
    }

    /// Marks the connection as unfinished: the pool may evict it again.
    pub fn reopen(&self) {
        self.set_finished(false);
    }

    /// Whether [`Permit::finish`] was called.
    pub fn is_finished(&self) -> bool {
        self.shared
            .slots
            .lock()
            .entries
            .get(&self.id)
            .is_some_and(|entry| entry.is_finished)
    }

    fn set_finished(&self, is_finished: bool) {
        if let Some(entry) = self.shared.slots.lock().entries.get_mut(&self.id) {
            entry.is_finished = is_finished;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut slots = self.shared.slots.lock();
        slots.entries.remove(&self.id);
        slots.permits -= 1;
        drop(slots);
        self.shared.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> Option<Network> {
        Some(text.parse::<IpAddr>().unwrap().into())
    }

    fn is_evicted(permit: &Permit) -> bool {
        permit.evicted.is_cancelled()
    }

    #[test]
    fn an_ipv6_network_counts_as_one_address() {
        assert_eq!(network("::ffff:10.0.0.1"), network("10.0.0.1"));
        assert_eq!(network("2001:db8:1:2::1"), network("2001:db8:1:2:ffff::9"));
        assert_ne!(network("2001:db8:1:2::1"), network("2001:db8:1:3::1"));
        assert_ne!(network("10.0.0.1"), network("10.0.0.2"));
    }

    #[test]
    fn silent_connections_of_one_address_take_eight_slots_and_block_no_other_peer() {
        let pool = Pool::new(256);
        let silent: Vec<Permit> = (0..300)
            .map(|_| pool.enter(network("10.0.0.1"), 8).unwrap())
            .collect();
        assert_eq!(
            (
                pool.used(),
                silent.iter().filter(|p| !is_evicted(p)).count()
            ),
            (8, 8)
        );
        assert!(
            silent[..292].iter().all(is_evicted),
            "the oldest connections are evicted first"
        );
        let other = pool.enter(network("10.0.0.2"), 8).unwrap();
        assert_eq!(pool.used(), 9);
        // The same address can still connect.
        let own = pool.enter(network("10.0.0.1"), 8).unwrap();
        assert!(is_evicted(&silent[292]) && !is_evicted(&own) && !is_evicted(&other));
        drop(silent);
        assert_eq!(pool.used(), 2, "an evicted slot is freed only once");
    }

    #[test]
    fn a_full_pool_closes_the_oldest_unfinished_connection() {
        let pool = Pool::new(4);
        let permits: Vec<Permit> = (0..4)
            .map(|n| pool.enter(network(&format!("10.0.0.{n}")), 8).unwrap())
            .collect();
        permits[0].finish();
        let fifth = pool.enter(network("10.0.1.1"), 8).unwrap();
        assert!(!is_evicted(&permits[0]) && is_evicted(&permits[1]) && !is_evicted(&permits[2]));
        for permit in permits[2..].iter().chain([&fifth]) {
            permit.finish();
        }
        assert!(
            pool.enter(None, 8).is_none(),
            "a finished connection is never evicted"
        );
        permits[3].reopen();
        assert!(pool.enter(None, 8).is_some() && is_evicted(&permits[3]));
    }

    #[test]
    fn a_finished_connection_does_not_count_for_its_address() {
        let pool = Pool::new(64);
        let finished: Vec<Permit> = (0..20)
            .map(|_| {
                pool.enter(network("10.0.0.1"), 8)
                    .inspect(|p| p.finish())
                    .unwrap()
            })
            .collect();
        let young: Vec<Permit> = (0..8)
            .map(|_| pool.enter(network("10.0.0.1"), 8).unwrap())
            .collect();
        assert!(finished.iter().chain(&young).all(|p| !is_evicted(p)));
        assert_eq!(
            (
                pool.used(),
                pool.unfinished_of(network("10.0.0.1").unwrap())
            ),
            (28, 8)
        );
    }

    #[tokio::test]
    async fn the_next_connection_waits_until_those_without_a_slot_are_closed() {
        let pool = Pool::new(2);
        let mut open: Vec<Permit> = Vec::new();
        for _ in 0..3 {
            pool.ready().await;
            open.push(pool.enter(network("10.0.0.1"), 8).unwrap());
        }
        assert!(is_evicted(&open[0]) && pool.used() == 2);
        let ready = pool.ready();
        tokio::pin!(ready);
        assert!(futures::poll!(&mut ready).is_pending());
        drop(open.remove(0));
        ready.await;
    }

    #[tokio::test]
    async fn a_new_connection_waits_if_all_others_are_finished() {
        let pool = Pool::new(1);
        let first = pool.enter(None, 8).unwrap();
        first.finish();
        let next = pool.enter_when_possible(None, 8);
        tokio::pin!(next);
        assert!(futures::poll!(&mut next).is_pending());
        drop(first);
        drop(next.await);
        assert_eq!(pool.used(), 0);
    }
}

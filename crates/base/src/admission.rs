//! ChunkIndex for connections whose peer has not proved who it is: bounded in total and for each
//! address.
//!
//! The connections of sites have a pool for TCP handshakes, one for QUIC handshakes and one for
//! joins; the API has one for each of its listeners. If a pool, or the part of it that one address
//! may use, is full, the oldest unfinished connection is closed and the newcomer takes its place.
//! So silent connections cannot keep a peer out that completes its handshake. Nothing here does
//! I/O: whoever holds a [`Permit`] must end its connection when [`Permit::evicted`] is ready.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// What counts as one address: an IPv4 address, or the /64 of an IPv6 address, which one machine
/// can use as a whole.
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
    /// `None`: it counts for no address (a local socket).
    network: Option<Network>,
    is_finished: bool,
    evicted: CancellationToken,
}

/// All places of a pool, oldest first.
#[derive(Default)]
struct Book {
    next: u64,
    entries: BTreeMap<u64, Entry>,
}

impl Book {
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
    book: Mutex<Book>,
    left: Notify,
}

/// A pool of places.
pub struct Pool {
    places_max: usize,
    shared: Arc<PoolState>,
}

impl Pool {
    /// A pool of so many places.
    pub fn new(places_max: usize) -> Self {
        Self {
            places_max,
            shared: Arc::default(),
        }
    }

    /// Takes a place for a new connection, and closes the oldest unfinished one if `network` has
    /// `own_max` of them or the pool is full. `None`: every connection of the pool is finished.
    pub fn enter(&self, network: Option<Network>, own_max: usize) -> Option<Permit> {
        let mut book = self.shared.book.lock();
        if let Some(network) = network {
            let own: Vec<u64> = book.unfinished_of(network).collect();
            let surplus = (own.len() + 1).saturating_sub(own_max.max(1));
            own.into_iter().take(surplus).for_each(|id| book.evict(id));
        }
        if book.entries.len() >= self.places_max {
            let (oldest, _) = book.unfinished().next()?;
            book.evict(oldest);
        }
        let id = book.next;
        book.next += 1;
        let evicted = CancellationToken::new();
        book.entries.insert(
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

    /// [`Pool::enter`] that waits until a finished connection leaves, where it must.
    pub async fn enter_when_possible(&self, network: Option<Network>, own_max: usize) -> Permit {
        loop {
            let left = self.shared.left.notified();
            if let Some(place) = self.enter(network, own_max) {
                return place;
            }
            left.await;
        }
    }

    /// Connections that have a place.
    pub fn used(&self) -> usize {
        self.shared.book.lock().entries.len()
    }

    /// Unfinished connections of one address.
    pub fn unfinished_of(&self, network: Network) -> usize {
        self.shared.book.lock().unfinished_of(network).count()
    }
}

/// A connection's place; free again when it is dropped.
pub struct Permit {
    id: u64,
    shared: Arc<PoolState>,
    evicted: CancellationToken,
}

impl Permit {
    /// Ready when a newer connection has taken the place.
    pub async fn evicted(&self) {
        self.evicted.cancelled().await;
    }

    /// The peer has proved who it is: the connection is no longer closed for a newer one, and its
    /// address may open another.
    pub fn finish(&self) {
        self.set_finished(true);
    }

    /// The connection may be closed for a newer one again.
    pub fn reopen(&self) {
        self.set_finished(false);
    }

    /// Whether [`Permit::finish`] was called.
    pub fn is_finished(&self) -> bool {
        self.shared
            .book
            .lock()
            .entries
            .get(&self.id)
            .is_some_and(|entry| entry.is_finished)
    }

    fn set_finished(&self, is_finished: bool) {
        if let Some(entry) = self.shared.book.lock().entries.get_mut(&self.id) {
            entry.is_finished = is_finished;
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.shared.book.lock().entries.remove(&self.id);
        self.shared.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(text: &str) -> Option<Network> {
        Some(text.parse::<IpAddr>().unwrap().into())
    }

    fn is_evicted(place: &Permit) -> bool {
        place.evicted.is_cancelled()
    }

    #[test]
    fn an_address_is_one_machine() {
        assert_eq!(network("::ffff:10.0.0.1"), network("10.0.0.1"));
        assert_eq!(network("2001:db8:1:2::1"), network("2001:db8:1:2:ffff::9"));
        assert_ne!(network("2001:db8:1:2::1"), network("2001:db8:1:3::1"));
        assert_ne!(network("10.0.0.1"), network("10.0.0.2"));
    }

    #[test]
    fn three_hundred_silent_connections_of_one_address_take_eight_places_and_keep_nobody_out() {
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
        assert!(silent[..292].iter().all(is_evicted), "the oldest go first");
        let other = pool.enter(network("10.0.0.2"), 8).unwrap();
        assert_eq!(pool.used(), 9);
        // The same address is not locked out either.
        let own = pool.enter(network("10.0.0.1"), 8).unwrap();
        assert!(is_evicted(&silent[292]) && !is_evicted(&own) && !is_evicted(&other));
        drop(silent);
        assert_eq!(
            pool.used(),
            2,
            "a place that was taken away is not given back twice"
        );
    }

    #[test]
    fn a_full_pool_closes_the_oldest_unfinished_connection() {
        let pool = Pool::new(4);
        let places: Vec<Permit> = (0..4)
            .map(|n| pool.enter(network(&format!("10.0.0.{n}")), 8).unwrap())
            .collect();
        places[0].finish();
        let fifth = pool.enter(network("10.0.1.1"), 8).unwrap();
        assert!(!is_evicted(&places[0]) && is_evicted(&places[1]) && !is_evicted(&places[2]));
        for place in places[2..].iter().chain([&fifth]) {
            place.finish();
        }
        assert!(
            pool.enter(None, 8).is_none(),
            "nobody who is finished is closed"
        );
        places[3].reopen();
        assert!(pool.enter(None, 8).is_some() && is_evicted(&places[3]));
    }

    #[test]
    fn who_has_proved_who_he_is_does_not_count_for_his_address() {
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
    async fn a_newcomer_waits_for_a_place_where_all_are_finished() {
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

//! Seats for authenticated connections: limited in total and for each peer, with a part that only
//! sites can use. How often a peer takes one is limited too.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;

use base::admission::Network;
use base::fault::Fault;
use base::limits::{
    CONNECTIONS_PER_PUBLISHER_MAX, CONNECTIONS_PER_SITE_MAX, PUBLISHER_CONNECTIONS_PER_SECOND_MAX,
    SITE_CONNECTIONS_PER_SECOND_MAX,
};
use base::peer::Peer;
use base::rate_limiter::RateLimiter;

/// The seats of a hub. Clones share them.
#[derive(Clone)]
pub(super) struct Seats {
    /// The limit on all connections.
    seats_max: usize,
    /// The limit on TCP connections, each of which needs a file descriptor.
    tcp_max: usize,
    counts: Arc<Mutex<Counts>>,
    rates: Arc<Rates>,
}

/// How often each site, and each publisher, may connect.
struct Rates {
    sites: RateLimiter<Peer>,
    publishers: RateLimiter<Peer>,
}

#[derive(Default)]
struct Counts {
    all: usize,
    tcp: usize,
    publishers: usize,
    publishers_tcp: usize,
    by_holder: HashMap<Peer, usize>,
    by_network: HashMap<Network, usize>,
}

impl Seats {
    pub(super) fn new(seats_max: usize, tcp_max: usize) -> Self {
        Self {
            seats_max,
            tcp_max,
            counts: Arc::default(),
            rates: Arc::new(Rates {
                sites: limiter(SITE_CONNECTIONS_PER_SECOND_MAX),
                publishers: limiter(PUBLISHER_CONNECTIONS_PER_SECOND_MAX),
            }),
        }
    }

    /// The number of connections.
    pub(super) fn used(&self) -> usize {
        self.counts.lock().all
    }

    /// The number of connections from one address.
    pub(super) fn used_by(&self, network: Network) -> usize {
        self.counts
            .lock()
            .by_network
            .get(&network)
            .copied()
            .unwrap_or(0)
    }

    /// Takes a seat for an authenticated peer, or returns why there is none. A quarter of the seats
    /// is reserved for sites.
    pub(super) fn take(&self, who: &Peer, network: Network, over_tcp: bool) -> Result<Seat, Fault> {
        let is_publisher = matches!(who, Peer::Publisher(_));
        let own_max = if is_publisher {
            CONNECTIONS_PER_PUBLISHER_MAX
        } else {
            CONNECTIONS_PER_SITE_MAX
        };
        let usable = |seats: usize| {
            if is_publisher {
                seats - seats / 4
            } else {
                seats
            }
        };
        let mut counts = self.counts.lock();
        if counts.by_holder.get(who).is_some_and(|own| *own >= own_max) {
            return Err(busy(format!(
                "{who} has {own_max} connections, which is the limit"
            )));
        }
        if counts.all >= self.seats_max
            || (is_publisher && counts.publishers >= usable(self.seats_max))
        {
            return Err(busy(format!(
                "the hub cannot accept another connection: its limit is {}",
                usable(self.seats_max)
            )));
        }
        if over_tcp
            && (counts.tcp >= self.tcp_max
                || (is_publisher && counts.publishers_tcp >= usable(self.tcp_max)))
        {
            let limit = usable(self.tcp_max);
            return Err(busy(format!(
                "the hub cannot accept another TCP connection: its limit is {limit}, derived from its limit of open files"
            )));
        }
        let rate = match is_publisher {
            true => &self.rates.publishers,
            false => &self.rates.sites,
        };
        if let Err(wait) = rate.try_go(who) {
            let wait = wait.as_secs() + 1;
            return Err(busy(format!(
                "{who} connects too often; the hub accepts its next connection in {wait} s"
            )));
        }
        let seat = Seat {
            who: who.clone(),
            network,
            over_tcp,
            counts: self.counts.clone(),
        };
        counts.count(&seat, true);
        *counts.by_holder.entry(who.clone()).or_default() += 1;
        *counts.by_network.entry(network).or_default() += 1;
        Ok(seat)
    }
}

fn limiter((per_second, burst): (u32, u32)) -> RateLimiter<Peer> {
    RateLimiter::new(per_second, burst)
}

fn busy(message: String) -> Fault {
    Fault::unreachable(message)
        .with_next("no action is needed: the connection is retried automatically")
}

impl Counts {
    fn count(&mut self, seat: &Seat, is_added: bool) {
        let step = |count: &mut usize, counts: bool| match (counts, is_added) {
            (true, true) => *count += 1,
            (true, false) => *count -= 1,
            (false, _) => {}
        };
        let is_publisher = matches!(seat.who, Peer::Publisher(_));
        step(&mut self.all, true);
        step(&mut self.tcp, seat.over_tcp);
        step(&mut self.publishers, is_publisher);
        step(&mut self.publishers_tcp, is_publisher && seat.over_tcp);
    }
}

/// The seat of one connection. Dropping it frees the seat.
#[derive(Debug)]
pub(super) struct Seat {
    who: Peer,
    network: Network,
    over_tcp: bool,
    counts: Arc<Mutex<Counts>>,
}

impl std::fmt::Debug for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Counts")
            .field("all", &self.all)
            .finish_non_exhaustive()
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let counts = self.counts.clone();
        let mut counts = counts.lock();
        counts.count(self, false);
        decrement(&mut counts.by_holder, self.who.clone());
        decrement(&mut counts.by_network, self.network);
    }
}

fn decrement<K: Hash + Eq>(counts: &mut HashMap<K, usize>, key: K) {
    if let Entry::Occupied(mut count) = counts.entry(key) {
        *count.get_mut() -= 1;
        if *count.get() == 0 {
            count.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publisher(n: usize) -> Peer {
        Peer::Publisher(format!("pub{n}").parse().unwrap())
    }

    fn site(n: usize) -> Peer {
        Peer::Site(format!("site{n}").parse().unwrap())
    }

    fn network() -> Network {
        std::net::IpAddr::from([127, 0, 0, 1]).into()
    }

    #[test]
    fn a_publisher_gets_sixteen_connections_and_a_site_can_still_connect() {
        let seats = Seats::new(4096, 4096);
        let taken: Vec<Seat> = (0..4096)
            .filter_map(|_| seats.take(&publisher(0), network(), true).ok())
            .collect();
        assert_eq!(
            (taken.len(), seats.used(), seats.used_by(network())),
            (CONNECTIONS_PER_PUBLISHER_MAX, 16, 16)
        );
        let fault = seats.take(&publisher(0), network(), false).unwrap_err();
        assert!(
            fault.message.contains("publisher pub0 has 16 connections"),
            "{fault}"
        );
        let other = seats.take(&publisher(1), network(), true).unwrap();
        let site = seats.take(&site(0), network(), true).unwrap();
        drop((taken, other, site));
        assert_eq!((seats.used(), seats.used_by(network())), (0, 0));
        assert!(
            seats.counts.lock().by_holder.is_empty() && seats.counts.lock().by_network.is_empty()
        );
    }

    #[test]
    fn a_quarter_of_the_seats_is_for_sites() {
        let seats = Seats::new(64, 64);
        let many: Vec<Seat> = (0..64)
            .filter_map(|n| seats.take(&publisher(n), network(), true).ok())
            .collect();
        assert_eq!(many.len(), 48);
        let sites: Vec<Seat> = (0..64)
            .filter_map(|n| seats.take(&site(n), network(), false).ok())
            .collect();
        assert_eq!((sites.len(), seats.used()), (16, 64));
    }

    #[test]
    fn connections_over_tcp_stay_within_the_open_files() {
        let seats = Seats::new(4096, 8);
        let tcp: Vec<Seat> = (0..20)
            .filter_map(|n| seats.take(&site(n), network(), true).ok())
            .collect();
        assert_eq!(tcp.len(), 8);
        assert!(
            seats
                .take(&site(30), network(), true)
                .unwrap_err()
                .message
                .contains("open files")
        );
        seats.take(&site(30), network(), false).unwrap();
    }

    #[test]
    fn a_site_has_a_few_seats_while_it_reconnects() {
        let seats = Seats::new(64, 64);
        let own: Vec<Seat> = (0..64)
            .filter_map(|_| seats.take(&site(0), network(), true).ok())
            .collect();
        assert_eq!(own.len(), CONNECTIONS_PER_SITE_MAX);
        drop(own);
        seats.take(&site(0), network(), true).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_connects_again_and_again_waits_and_no_other_does() {
        let seats = Seats::new(64, 64);
        let connects = |who: Peer| seats.take(&who, network(), false);
        let rates = [
            (site(0), site(1), SITE_CONNECTIONS_PER_SECOND_MAX),
            (
                publisher(0),
                publisher(1),
                PUBLISHER_CONNECTIONS_PER_SECOND_MAX,
            ),
        ];
        for (loud, calm, (per_second, burst)) in rates {
            let taken = (0..1_000).filter(|_| connects(loud.clone()).is_ok());
            assert_eq!(taken.count(), burst as usize);
            let fault = connects(loud.clone()).unwrap_err();
            assert!(fault.message.contains("connects too often"), "{fault}");
            connects(calm).unwrap();
            tokio::time::advance(std::time::Duration::from_secs(1)).await;
            let taken = (0..100).filter(|_| connects(loud.clone()).is_ok());
            assert_eq!(taken.count(), per_second as usize, "attempts cost nothing");
        }
    }
}

//! The receive windows of a hub: how much unread data the peers may send.
//!
//! Unread data of a peer occupies memory. A connection whose peer is not authenticated may send
//! [`CONNECTION_WINDOW_FIRST_BYTES`]. Connections without requests share a small total equally; it
//! is for messages and questions, and all connections of one peer get at most
//! [`CONNECTION_WINDOW_IDLE_BYTES_MAX`] of it. While the hub fetches from a peer, the peer gets an equal part of
//! a larger total, which the connections of that peer share. This is as much as the hub requests
//! from one peer at once. Therefore all peers together cannot make the hub hold more than the two
//! totals plus the minimum of each connection: [`CONNECTION_WINDOW_LEAST_BYTES`], or
//! [`CONNECTION_WINDOW_WANTED_LEAST_BYTES`] while the hub fetches.
//!
//! QUIC cannot take back credit that a peer has received. A smaller window therefore creates a
//! debt, which decreases as the bytes of the peer are read. The debt counts as part of the window,
//! so that shrinking and growing a window repeatedly never adds up. Over TCP the window limits the
//! unread data directly: above it, the hub does not read from the socket. The window that both ends
//! of a TCP connection start with is larger and fixed, because older peers expect it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use base::limits::{
    CONNECTION_WINDOW_FIRST_BYTES, CONNECTION_WINDOW_IDLE_BYTES_MAX, CONNECTION_WINDOW_LEAST_BYTES,
    CONNECTION_WINDOW_WANTED_BYTES_MAX, CONNECTION_WINDOW_WANTED_LEAST_BYTES,
};
use base::peer::Peer;

use super::mux::UnreadLimit;

/// A connection keeps its larger window for this long after a fetch, because the next request
/// usually follows.
const LINGER: Duration = Duration::from_secs(5);

/// The windows of all connections of a hub.
pub(super) struct Windows {
    idle_total: u64,
    wanted_total: u64,
    connections: Mutex<Connections>,
}

#[derive(Default)]
struct Connections {
    total: usize,
    of_peer: HashMap<Peer, OfPeer>,
    /// The number of peers from which the hub fetches.
    wanted_peers: usize,
}

/// What the connections of one peer have together.
#[derive(Default)]
struct OfPeer {
    connections: usize,
    /// The number of connections over which the hub fetches.
    wanted: usize,
    /// The bytes that the peer may have sent and the hub has not read: all windows and debts.
    granted: u64,
}

impl Connections {
    fn enter(&mut self, holder: &Peer) {
        self.total += 1;
        let peer = self.of_peer.entry(holder.clone()).or_default();
        peer.connections += 1;
        peer.granted += CONNECTION_WINDOW_FIRST_BYTES;
    }

    /// Removes a connection with this window and debt.
    fn leave(&mut self, holder: &Peer, granted: u64) {
        self.total -= 1;
        if let Some(peer) = self.of_peer.get_mut(holder) {
            peer.connections -= 1;
            peer.granted = peer.granted.saturating_sub(granted);
            if peer.connections == 0 {
                self.of_peer.remove(holder);
            }
        }
    }

    fn begin_fetch(&mut self, holder: &Peer) {
        let peer = self.of_peer.entry(holder.clone()).or_default();
        peer.wanted += 1;
        self.wanted_peers += usize::from(peer.wanted == 1);
    }

    fn end_fetch(&mut self, holder: &Peer) {
        if let Some(peer) = self.of_peer.get_mut(holder) {
            peer.wanted -= 1;
            self.wanted_peers -= usize::from(peer.wanted == 0);
        }
    }
}

impl Windows {
    /// Creates the windows. Connections without a fetch share `idle_total` bytes, the others share
    /// `wanted_total`.
    pub(super) fn new(idle_total: u64, wanted_total: u64) -> Arc<Self> {
        Arc::new(Self {
            idle_total,
            wanted_total,
            connections: Mutex::default(),
        })
    }

    /// The window of a connection without a fetch; `held` is what it has now.
    fn idle(&self, connections: &Connections, peer: &OfPeer, held: u64) -> u64 {
        let others = peer.granted.saturating_sub(held);
        (self.idle_total / connections.total.max(1) as u64)
            .min(CONNECTION_WINDOW_IDLE_BYTES_MAX / peer.connections.max(1) as u64)
            .min(CONNECTION_WINDOW_IDLE_BYTES_MAX.saturating_sub(others))
            .max(CONNECTION_WINDOW_LEAST_BYTES)
    }

    fn wanted(&self, connections: &Connections, peer: &OfPeer, held: u64) -> u64 {
        let of_peer = (self.wanted_total / connections.wanted_peers.max(1) as u64)
            .min(CONNECTION_WINDOW_WANTED_BYTES_MAX);
        let others = peer.granted.saturating_sub(held);
        (of_peer / peer.wanted.max(1) as u64)
            .min(of_peer.saturating_sub(others))
            .max(CONNECTION_WINDOW_WANTED_LEAST_BYTES)
            .max(self.idle(connections, peer, held))
    }
}

/// The connection to which a window applies.
pub(super) enum Of {
    Quic(quinn::Connection),
    Tcp(UnreadLimit),
    #[cfg(test)]
    Test(Arc<AtomicU64>),
}

struct State {
    /// The number of requests whose answers are not read yet.
    requests: usize,
    is_wanted: bool,
    /// When the last answer was read.
    idle_since: Instant,
    window: u64,
    /// Credit that was taken back, and the bytes read at that time. Bytes read since then reduce
    /// the debt.
    debt: u64,
    debt_from: u64,
}

/// The window of one connection.
pub(super) struct Window {
    windows: Arc<Windows>,
    /// `None`: the peer is not authenticated.
    holder: Option<Peer>,
    of: Of,
    /// The bytes read from the connection.
    pub(super) read: Arc<AtomicU64>,
    state: Mutex<State>,
}

impl Window {
    /// Creates the window of a connection to this peer.
    pub(super) fn new(windows: &Arc<Windows>, holder: Option<Peer>, of: Of) -> Arc<Self> {
        if let Some(holder) = &holder {
            windows.connections.lock().enter(holder);
        }
        let state = State {
            requests: 0,
            is_wanted: false,
            idle_since: Instant::now(),
            window: CONNECTION_WINDOW_FIRST_BYTES,
            debt: 0,
            debt_from: 0,
        };
        let window = Self {
            windows: windows.clone(),
            holder,
            of,
            read: Arc::default(),
            state: Mutex::new(state),
        };
        window.fit();
        Arc::new(window)
    }

    /// Records a request over this connection, until its answer is read.
    pub(super) fn want(self: &Arc<Self>) -> Wanted {
        {
            let mut state = self.state.lock();
            state.requests += 1;
            if let Some(holder) = self.holder.as_ref().filter(|_| !state.is_wanted) {
                state.is_wanted = true;
                self.windows.connections.lock().begin_fetch(holder);
                self.set(&mut state);
            }
        }
        Wanted {
            window: self.clone(),
        }
    }

    /// Adjusts the window to its current size. Called periodically.
    pub(super) fn fit(&self) {
        let mut state = self.state.lock();
        if state.is_wanted && state.requests == 0 && state.idle_since.elapsed() >= LINGER {
            state.is_wanted = false;
            if let Some(holder) = &self.holder {
                self.windows.connections.lock().end_fetch(holder);
            }
        }
        self.set(&mut state);
    }

    fn set(&self, state: &mut State) {
        // One lock around reading and granting: two connections of a peer never get the same bytes.
        let mut connections = self.windows.connections.lock();
        let held = state.window + state.debt;
        let peer = self
            .holder
            .as_ref()
            .and_then(|holder| connections.of_peer.get(holder));
        let room = match peer {
            None => CONNECTION_WINDOW_FIRST_BYTES,
            Some(peer) if state.is_wanted => self.windows.wanted(&connections, peer, held),
            Some(peer) => self.windows.idle(&connections, peer, held),
        };
        match &self.of {
            Of::Quic(connection) => {
                if let Some(window) = self.step(state, room) {
                    connection.set_receive_window(
                        quinn::VarInt::from_u64(window).unwrap_or(quinn::VarInt::MAX),
                    );
                }
            }
            Of::Tcp(limit) => {
                state.window = room;
                limit.set(room);
            }
            #[cfg(test)]
            Of::Test(window) => {
                if let Some(now) = self.step(state, room) {
                    window.store(now, Ordering::Relaxed);
                }
            }
        }
        let peer = self
            .holder
            .as_ref()
            .and_then(|holder| connections.of_peer.get_mut(holder));
        if let Some(peer) = peer {
            peer.granted = (peer.granted + state.window + state.debt).saturating_sub(held);
        }
    }

    /// The next QUIC window towards `room`, including the debt; `None` if it does not change.
    fn step(&self, state: &mut State, room: u64) -> Option<u64> {
        let read = self.read.load(Ordering::Relaxed);
        state.debt = state
            .debt
            .saturating_sub(read.saturating_sub(state.debt_from));
        state.debt_from = read;
        if room < state.window {
            state.debt += state.window - room;
            state.window = room;
        } else if room > state.window + state.debt {
            state.window = room - state.debt;
        } else {
            return None;
        }
        Some(state.window)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let Some(holder) = &self.holder else { return };
        let state = self.state.lock();
        let mut connections = self.windows.connections.lock();
        if state.is_wanted {
            connections.end_fetch(holder);
        }
        connections.leave(holder, state.window + state.debt);
    }
}

/// A request of the hub over a connection.
pub(super) struct Wanted {
    window: Arc<Window>,
}

impl Drop for Wanted {
    fn drop(&mut self) {
        let mut state = self.window.state.lock();
        state.requests -= 1;
        state.idle_since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn connection(windows: &Arc<Windows>, name: &str) -> (Arc<Window>, Arc<AtomicU64>) {
        let set = Arc::new(AtomicU64::new(CONNECTION_WINDOW_FIRST_BYTES));
        let holder = Peer::Publisher(name.parse().unwrap());
        (
            Window::new(windows, Some(holder), Of::Test(set.clone())),
            set,
        )
    }

    fn rest(window: &Window) {
        window.state.lock().idle_since -= LINGER;
        window.fit();
    }

    #[test]
    fn connections_share_the_totals_and_fetches_get_more() {
        let windows = Windows::new(16 * MIB, 96 * MIB);
        let lines: Vec<_> = (0..64)
            .map(|n| connection(&windows, &format!("p{n}")))
            .collect();
        lines.iter().for_each(|(window, _)| window.fit());
        let room = |n: usize| {
            let state = lines[n].0.state.lock();
            state.window + state.debt
        };
        assert_eq!(lines[63].1.load(Ordering::Relaxed), 16 * MIB / 64);
        assert!((0..64).map(room).sum::<u64>() <= 16 * MIB + 64 * CONNECTION_WINDOW_IDLE_BYTES_MAX);
        // A connection with a fetch has a sufficient window for 200 Mbit/s over 100 ms, from the
        // first request on.
        let wanted = lines[63].0.want();
        assert!(
            lines[63].1.load(Ordering::Relaxed) >= 8 * MIB,
            "{}",
            lines[63].1.load(Ordering::Relaxed)
        );
        // More peers reduce the part of each.
        let others: Vec<_> = (0..48).map(|n| lines[n].0.want()).collect();
        lines[63].0.fit();
        assert_eq!(lines[63].1.load(Ordering::Relaxed), 96 * MIB / 49);
        drop((wanted, others));
        lines.iter().for_each(|(window, _)| rest(window));
        assert_eq!(lines[63].1.load(Ordering::Relaxed), 16 * MIB / 64);
        assert_eq!(windows.connections.lock().wanted_peers, 0);
        drop(lines);
        assert_eq!(windows.connections.lock().total, 0);
        assert!(windows.connections.lock().of_peer.is_empty());
    }

    #[test]
    fn the_idle_connections_of_one_peer_share_one_maximum() {
        let windows = Windows::new(64 * MIB, 96 * MIB);
        let lines: Vec<_> = (0..16).map(|_| connection(&windows, "office")).collect();
        let (other, its) = connection(&windows, "other");
        lines.iter().for_each(|(window, _)| window.fit());
        other.fit();
        let held: u64 = lines
            .iter()
            .map(|(window, _)| {
                let state = window.state.lock();
                state.window + state.debt
            })
            .sum();
        // The first one had all of it before the others came, and QUIC takes nothing back.
        assert!(
            held <= CONNECTION_WINDOW_IDLE_BYTES_MAX + 16 * CONNECTION_WINDOW_FIRST_BYTES,
            "{held}"
        );
        // What is read can be granted to the others.
        lines[0].0.read.fetch_add(100 * MIB, Ordering::Relaxed);
        lines.iter().for_each(|(window, _)| window.fit());
        let last = lines[15].0.state.lock();
        assert_eq!(
            last.window + last.debt,
            CONNECTION_WINDOW_IDLE_BYTES_MAX / 16
        );
        assert_eq!(its.load(Ordering::Relaxed), 64 * MIB / 17);
    }

    #[test]
    fn the_connections_of_one_peer_share_one_part() {
        let windows = Windows::new(16 * MIB, 96 * MIB);
        let lines: Vec<_> = (0..16).map(|_| connection(&windows, "office")).collect();
        let _wanted: Vec<_> = lines.iter().map(|(window, _)| window.want()).collect();
        lines.iter().for_each(|(window, _)| window.fit());
        let sum: u64 = lines
            .iter()
            .map(|(_, set)| set.load(Ordering::Relaxed))
            .sum();
        assert!(
            sum <= CONNECTION_WINDOW_WANTED_BYTES_MAX
                .max(16 * CONNECTION_WINDOW_WANTED_LEAST_BYTES),
            "{sum}"
        );
    }

    #[test]
    fn withdrawn_credit_is_not_granted_twice() {
        let windows = Windows::new(MIB, 96 * MIB);
        let (window, set) = connection(&windows, "office");
        for _ in 0..50 {
            drop(window.want());
            rest(&window);
            let state = window.state.lock();
            assert!(
                state.window + state.debt <= CONNECTION_WINDOW_WANTED_BYTES_MAX,
                "{} and {}",
                state.window,
                state.debt
            );
        }
        // Reading reduces the debt, and the window grows again.
        assert!(window.state.lock().debt > 0);
        window.read.fetch_add(100 * MIB, Ordering::Relaxed);
        let _wanted = window.want();
        assert_eq!(
            (set.load(Ordering::Relaxed), window.state.lock().debt),
            (CONNECTION_WINDOW_WANTED_BYTES_MAX, 0)
        );
    }
}

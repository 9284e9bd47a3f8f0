//! The receive windows of a hub: how much unread data the peers may send.
//!
//! Unread data of a peer occupies memory. A connection whose peer is not authenticated may send
//! [`CONNECTION_WINDOW_FIRST_BYTES`]. Connections without requests share a small total equally; it
//! is for messages and questions. While the hub fetches from a peer, the peer gets an equal part of
//! a larger total, which the connections of that peer share. This is as much as the hub requests
//! from one peer at once. Therefore all peers together cannot make the hub hold more than the two
//! totals plus the minimum of each connection: [`CONNECTION_WINDOW_LEAST_BYTES`], or
//! [`CONNECTION_WINDOW_WANTED_LEAST_BYTES`] while the hub fetches.
//!
//! QUIC cannot take back credit that a peer has received. A smaller window therefore creates a
//! debt, which decreases as the bytes of the peer are read. The debt counts as part of the window,
//! so that shrinking and growing a window repeatedly never adds up. TCP has no such window: both
//! ends start with a fixed window, which older peers also expect.

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
    /// The number of connections per peer from which the hub fetches.
    wanted: HashMap<Peer, usize>,
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

    fn idle(&self, connections: &Connections) -> u64 {
        (self.idle_total / connections.total.max(1) as u64).clamp(
            CONNECTION_WINDOW_LEAST_BYTES,
            CONNECTION_WINDOW_IDLE_BYTES_MAX,
        )
    }

    fn wanted(&self, connections: &Connections, holder: &Peer) -> u64 {
        let of_peer = (self.wanted_total / connections.wanted.len().max(1) as u64)
            .min(CONNECTION_WINDOW_WANTED_BYTES_MAX);
        let lines = connections.wanted.get(holder).copied().unwrap_or(0).max(1) as u64;
        (of_peer / lines)
            .max(CONNECTION_WINDOW_WANTED_LEAST_BYTES)
            .max(self.idle(connections))
    }
}

/// The connection to which a window applies.
pub(super) enum Of {
    Quic(quinn::Connection),
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
        if holder.is_some() {
            windows.connections.lock().total += 1;
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
                *self
                    .windows
                    .connections
                    .lock()
                    .wanted
                    .entry(holder.clone())
                    .or_default() += 1;
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
            self.end_fetch();
        }
        self.set(&mut state);
    }

    fn end_fetch(&self) {
        let Some(holder) = &self.holder else { return };
        let mut connections = self.windows.connections.lock();
        if let Some(lines) = connections.wanted.get_mut(holder) {
            *lines -= 1;
            if *lines == 0 {
                connections.wanted.remove(holder);
            }
        }
    }

    fn set(&self, state: &mut State) {
        let room = {
            let connections = self.windows.connections.lock();
            match &self.holder {
                None => CONNECTION_WINDOW_FIRST_BYTES,
                Some(holder) if state.is_wanted => self.windows.wanted(&connections, holder),
                Some(_) => self.windows.idle(&connections),
            }
        };
        match &self.of {
            Of::Quic(connection) => {
                if let Some(window) = self.step(state, room) {
                    connection.set_receive_window(
                        quinn::VarInt::from_u64(window).unwrap_or(quinn::VarInt::MAX),
                    );
                }
            }
            #[cfg(test)]
            Of::Test(window) => {
                if let Some(now) = self.step(state, room) {
                    window.store(now, Ordering::Relaxed);
                }
            }
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
        if self.holder.is_some() {
            self.windows.connections.lock().total -= 1;
        }
        if self.state.lock().is_wanted {
            self.end_fetch();
        }
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
        assert!(windows.connections.lock().wanted.is_empty());
        drop(lines);
        assert_eq!(windows.connections.lock().total, 0);
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

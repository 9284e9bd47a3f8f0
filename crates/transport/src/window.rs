//! How far the lines of a hub may run ahead of their readers.
//!
//! What a peer sends and nobody reads yet lies in memory. A connection that has not shown who it is
//! may send [`CONNECTION_WINDOW_FIRST_BYTES`]. A line that is not asked for anything has an equal part of
//! a small total: messages and questions come over it. While the hub fetches over a line, its peer
//! has an equal part of a larger total, which its lines that are fetched from share; that is as
//! much as the hub asks of one peer at once. So all peers together cannot make the hub hold more
//! than the two totals, and each at least [`CONNECTION_WINDOW_LEAST_BYTES`], or
//! [`CONNECTION_WINDOW_WANTED_LEAST_BYTES`] while it is fetched from.
//!
//! QUIC cannot take back room that a peer was given: a smaller window is a debt, which is paid as
//! the peer's bytes are read. A debt counts as room, so that a window which shrinks and grows again
//! never adds up. Over TCP there is no such window: both ends begin with the same room for a line,
//! which an older peer knows as well.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::identity::Holder;
use base::limits::{
    CONNECTION_WINDOW_FIRST_BYTES, CONNECTION_WINDOW_IDLE_BYTES_MAX, CONNECTION_WINDOW_LEAST_BYTES,
    CONNECTION_WINDOW_WANTED_BYTES_MAX, CONNECTION_WINDOW_WANTED_LEAST_BYTES,
};

/// A line that was fetched from keeps its window for so long: the next request usually follows.
const LINGER: Duration = Duration::from_secs(5);

/// The windows of all lines of a hub.
pub(super) struct Windows {
    idle_total: u64,
    wanted_total: u64,
    book: Mutex<Book>,
}

#[derive(Default)]
struct Book {
    lines: usize,
    /// The lines of each peer that are fetched from.
    wanted: HashMap<Holder, usize>,
}

impl Windows {
    /// Windows for lines of which those that are not fetched from share `idle_total` bytes, and the
    /// others `wanted_total`.
    pub(super) fn new(idle_total: u64, wanted_total: u64) -> Arc<Self> {
        Arc::new(Self {
            idle_total,
            wanted_total,
            book: Mutex::default(),
        })
    }

    fn idle(&self, book: &Book) -> u64 {
        (self.idle_total / book.lines.max(1) as u64).clamp(
            CONNECTION_WINDOW_LEAST_BYTES,
            CONNECTION_WINDOW_IDLE_BYTES_MAX,
        )
    }

    fn wanted(&self, book: &Book, holder: &Holder) -> u64 {
        let of_peer = (self.wanted_total / book.wanted.len().max(1) as u64)
            .min(CONNECTION_WINDOW_WANTED_BYTES_MAX);
        let lines = book.wanted.get(holder).copied().unwrap_or(0).max(1) as u64;
        (of_peer / lines)
            .max(CONNECTION_WINDOW_WANTED_LEAST_BYTES)
            .max(self.idle(book))
    }
}

/// What a window is set on.
pub(super) enum Of {
    Quic(quinn::Connection),
    #[cfg(test)]
    Test(Arc<AtomicU64>),
}

struct State {
    /// Requests whose answers are not read yet.
    requests: usize,
    is_wanted: bool,
    /// When the last answer was read.
    idle_since: Instant,
    window: u64,
    /// Room that was taken back, and the bytes that had been read when it was: what is read since
    /// pays it.
    debt: u64,
    debt_from: u64,
}

/// The window of one line.
pub(super) struct Window {
    windows: Arc<Windows>,
    /// `None`: a connection whose peer has not shown who it is.
    holder: Option<Holder>,
    of: Of,
    /// Bytes that were read off the line.
    pub(super) read: Arc<AtomicU64>,
    state: Mutex<State>,
}

impl Window {
    /// The window of a line to this peer.
    pub(super) fn new(windows: &Arc<Windows>, holder: Option<Holder>, of: Of) -> Arc<Self> {
        if holder.is_some() {
            windows.book.lock().lines += 1;
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

    /// Notes that the hub asks for something over this line, until the answer is read.
    pub(super) fn want(self: &Arc<Self>) -> Wanted {
        {
            let mut state = self.state.lock();
            state.requests += 1;
            if let Some(holder) = self.holder.as_ref().filter(|_| !state.is_wanted) {
                state.is_wanted = true;
                *self
                    .windows
                    .book
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

    /// Fits the window to what it may be now. To be called every moment.
    pub(super) fn fit(&self) {
        let mut state = self.state.lock();
        if state.is_wanted && state.requests == 0 && state.idle_since.elapsed() >= LINGER {
            state.is_wanted = false;
            self.want_no_more();
        }
        self.set(&mut state);
    }

    fn want_no_more(&self) {
        let Some(holder) = &self.holder else { return };
        let mut book = self.windows.book.lock();
        if let Some(lines) = book.wanted.get_mut(holder) {
            *lines -= 1;
            if *lines == 0 {
                book.wanted.remove(holder);
            }
        }
    }

    fn set(&self, state: &mut State) {
        let room = {
            let book = self.windows.book.lock();
            match &self.holder {
                None => CONNECTION_WINDOW_FIRST_BYTES,
                Some(holder) if state.is_wanted => self.windows.wanted(&book, holder),
                Some(_) => self.windows.idle(&book),
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

    /// The next window of QUIC on the way to `room`, debt included; `None`: it stays as it is.
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
            self.windows.book.lock().lines -= 1;
        }
        if self.state.lock().is_wanted {
            self.want_no_more();
        }
    }
}

/// Something that the hub has asked for over a line.
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
        let holder = Holder::Publisher(name.parse().unwrap());
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
    fn lines_share_what_there_is_and_those_that_are_fetched_from_have_more() {
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
        // One that is fetched from has enough for 200 Mbit/s over 100 ms and more, with the first
        // request.
        let wanted = lines[63].0.want();
        assert!(
            lines[63].1.load(Ordering::Relaxed) >= 8 * MIB,
            "{}",
            lines[63].1.load(Ordering::Relaxed)
        );
        // With others the part shrinks.
        let others: Vec<_> = (0..48).map(|n| lines[n].0.want()).collect();
        lines[63].0.fit();
        assert_eq!(lines[63].1.load(Ordering::Relaxed), 96 * MIB / 49);
        drop((wanted, others));
        lines.iter().for_each(|(window, _)| rest(window));
        assert_eq!(lines[63].1.load(Ordering::Relaxed), 16 * MIB / 64);
        assert!(windows.book.lock().wanted.is_empty());
        drop(lines);
        assert_eq!(windows.book.lock().lines, 0);
    }

    #[test]
    fn the_lines_of_one_peer_have_one_part_together() {
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
    fn room_that_was_taken_back_is_not_given_twice() {
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
        // What is read pays the debt, and the window opens again.
        assert!(window.state.lock().debt > 0);
        window.read.fetch_add(100 * MIB, Ordering::Relaxed);
        let _wanted = window.want();
        assert_eq!(
            (set.load(Ordering::Relaxed), window.state.lock().debt),
            (CONNECTION_WINDOW_WANTED_BYTES_MAX, 0)
        );
    }
}

//! How long a registry has owed an answer: requests that wait, each since it was sent or since its
//! body last moved.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The requests of one client that wait for an answer.
#[derive(Debug, Default)]
pub(super) struct Silence(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    last: u64,
    since: HashMap<u64, Instant>,
}

/// One request that waits; it ends when this is dropped.
pub(super) struct Owed<'a> {
    of: &'a Silence,
    number: u64,
}

impl Silence {
    /// A request is sent.
    pub(super) fn begin(&self) -> Owed<'_> {
        let mut waiting = self.0.lock();
        waiting.last += 1;
        let number = waiting.last;
        waiting.since.insert(number, Instant::now());
        Owed { of: self, number }
    }

    /// The longest wait of them all.
    pub(super) fn longest(&self) -> Option<Duration> {
        self.0.lock().since.values().map(Instant::elapsed).max()
    }
}

impl Owed<'_> {
    /// Its body moved.
    pub(super) fn moved(&self) {
        self.of.0.lock().since.insert(self.number, Instant::now());
    }
}

impl Drop for Owed<'_> {
    fn drop(&mut self) {
        self.of.0.lock().since.remove(&self.number);
    }
}

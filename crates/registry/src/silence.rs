//! Measures how long a registry has not answered: the pending requests, each with the time when it
//! was sent or when its body last made progress.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The pending requests of one client.
#[derive(Debug, Default)]
pub(super) struct Silence(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    last_number: u64,
    since: HashMap<u64, Instant>,
}

/// One pending request. Dropping it ends the measurement.
pub(super) struct Pending<'a> {
    silence: &'a Silence,
    number: u64,
}

impl Silence {
    /// Records that a request is sent.
    pub(super) fn begin(&self) -> Pending<'_> {
        let mut waiting = self.0.lock();
        waiting.last_number += 1;
        let number = waiting.last_number;
        waiting.since.insert(number, Instant::now());
        Pending {
            silence: self,
            number,
        }
    }

    /// The longest current wait.
    pub(super) fn longest(&self) -> Option<Duration> {
        self.0.lock().since.values().map(Instant::elapsed).max()
    }
}

impl Pending<'_> {
    /// Records progress of the body.
    pub(super) fn progressed(&self) {
        self.silence
            .0
            .lock()
            .since
            .insert(self.number, Instant::now());
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.silence.0.lock().since.remove(&self.number);
    }
}

//! Whether a path drops what is above a rate, as the congestion control of a connection found it.
//!
//! The congestion control notes it, the owner of the connection reads it: a network that limits UDP
//! may let TCP pass at the full rate of the link.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The control tries a higher rate again and again. What it found counts for this long.
const COUNTS_FOR: Duration = Duration::from_secs(30);

/// The rate above which the path drops, in bytes per second. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Limited(Arc<Mutex<Option<(u64, Instant)>>>);

impl Limited {
    /// Notes what was found now.
    pub(super) fn note(&self, now: Instant, rate: u64) {
        *self.0.lock() = Some((rate, now));
    }

    /// Forgets what was found.
    pub(super) fn clear(&self) {
        *self.0.lock() = None;
    }

    /// What was found recently.
    pub(super) fn get(&self, now: Instant) -> Option<u64> {
        let (rate, at) = (*self.0.lock())?;
        (now.saturating_duration_since(at) < COUNTS_FOR).then_some(rate)
    }
}

//! What is measured in one round trip, and in several.

use std::time::{Duration, Instant};

/// One round trip. It ends with the first acknowledgement of a packet that was sent after its
/// start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Round {
    pub(super) began: Instant,
    pub(super) delivered: u64,
    pub(super) lost: u64,
    pub(super) limited: bool,
    /// Whether it is the first one after an idle time.
    pub(super) resumed: bool,
    pub(super) min_rtt: Duration,
    /// All round trips together, and their number.
    pub(super) trips: Duration,
    pub(super) packets: u32,
}

impl Round {
    pub(super) fn new(began: Instant, delivered: u64, limited: bool, resumed: bool) -> Self {
        Self {
            began,
            delivered,
            lost: 0,
            limited,
            resumed,
            min_rtt: Duration::MAX,
            trips: Duration::ZERO,
            packets: 0,
        }
    }
}

/// The rounds since the gain was adjusted.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rounds {
    pub(super) delivered: u64,
    pub(super) lost: u64,
    pub(super) elapsed: Duration,
    pub(super) trips: Duration,
    pub(super) packets: u32,
    pub(super) min_rtt: Option<Duration>,
}

//! When to try again, and the transfer rate: plain functions of time and events.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use base::fault::{Fault, Reason, Retry};
use base::limits::{
    BACKOFF_FIRST, BACKOFF_MAX, SINK_PAUSE_MAX, SINK_SILENT_AFTER, SOURCE_PAUSE_MAX,
};
use model::transfer::Bytes;
use sink::rounded_secs;

/// The rate is an average over this time.
const WINDOW_MS: u64 = 10_000;

/// The pause before the next attempt. It doubles with each attempt, with jitter, so that many sites
/// do not come at once.
#[derive(Debug, Default)]
pub(super) struct Pause {
    tries: u32,
}

impl Pause {
    /// How long to wait after this fault; `None`: another attempt is of no use. `costs`: the
    /// attempt received bytes.
    pub(super) fn after(&mut self, fault: &Fault, costs: bool) -> Option<Duration> {
        match fault.retry {
            Retry::Never => None,
            Retry::AfterMs(ms) => Some(Duration::from_millis(ms).max(BACKOFF_FIRST)),
            Retry::Backoff => {
                // A source may reconnect at any moment, and the request costs little.
                let longest = match fault.reason {
                    Reason::WaitingForSource => SOURCE_PAUSE_MAX,
                    // The attempt that finds out usually receives no byte.
                    Reason::SinkUnavailable | Reason::SinkDenied | Reason::NoSpace if !costs => {
                        SINK_PAUSE_MAX
                    }
                    _ => BACKOFF_MAX,
                };
                let whole = BACKOFF_FIRST
                    .saturating_mul(1 << self.tries.min(16))
                    .min(longest);
                self.tries += 1;
                Some(whole.mul_f64(rand::random_range(0.5..1.0)))
            }
        }
    }
}

/// Bytes per second over the last seconds.
#[derive(Debug)]
pub(super) struct ProgressRate {
    samples: VecDeque<(u64, u64)>,
    last: u64,
}

impl ProgressRate {
    /// Starts now; earlier bytes are already counted in `bytes`.
    pub(super) fn new(now_ms: u64, bytes: u64) -> Self {
        Self {
            samples: VecDeque::from([(now_ms, bytes)]),
            last: 0,
        }
    }

    /// Adds a sample: the bytes so far. Returns bytes per second.
    pub(super) fn rate(&mut self, now_ms: u64, bytes: u64) -> u64 {
        self.samples.push_back((now_ms, bytes));
        while self.samples.len() > 2
            && self
                .samples
                .front()
                .is_some_and(|(at, _)| at + WINDOW_MS < now_ms)
        {
            self.samples.pop_front();
        }
        let (from_ms, from) = self.samples.front().copied().unwrap_or((now_ms, bytes));
        self.last = bytes.saturating_sub(from) * 1000 / now_ms.saturating_sub(from_ms).max(1);
        self.last
    }

    /// The seconds that this many bytes take at the last rate.
    pub(super) fn eta(&self, bytes: u64) -> Option<u64> {
        (self.last > 0).then(|| bytes.div_ceil(self.last))
    }
}

/// Detects that received bytes are not stored: their disk does not answer.
#[derive(Debug, Default)]
pub(super) struct Stall {
    last: Bytes,
    since: Option<Instant>,
}

impl Stall {
    /// Adds a sample: the bytes so far. Returns for how many seconds nothing was stored although
    /// there is something to store, if that is long.
    pub(super) fn secs(&mut self, bytes: Bytes) -> Option<u64> {
        let moved = std::mem::replace(&mut self.last, bytes) != bytes;
        let waits = bytes.received + bytes.reused + bytes.resumed > bytes.committed
            && bytes.committed < bytes.total;
        if moved || !waits {
            self.since = None;
            return None;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        Some(since.elapsed())
            .filter(|time| *time >= SINK_SILENT_AFTER)
            .map(rounded_secs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn bytes_that_are_here_and_not_stored_are_noticed() {
        let mut stall = Stall::default();
        let bytes = |received, committed| Bytes {
            total: 100,
            received,
            committed,
            ..Bytes::default()
        };
        let mut after = |bytes| (stall.secs(bytes), stall.since.is_some());
        assert_eq!(after(bytes(50, 20)), (None, false), "it moves");
        assert_eq!(after(bytes(50, 20)), (None, true));
        tokio::time::advance(SINK_SILENT_AFTER).await;
        assert_eq!(after(bytes(50, 20)), (Some(3), true));
        assert_eq!(after(bytes(50, 50)), (None, false), "stored");
        assert_eq!(
            after(bytes(50, 50)),
            (None, false),
            "the line brings nothing, which is not the disk's fault"
        );
    }

    #[test]
    fn pauses_grow_to_a_limit_and_end_when_it_is_of_no_use() {
        let mut pause = Pause::default();
        let fault = Fault::internal("x");
        let waits: Vec<Duration> = (0..20).filter_map(|_| pause.after(&fault, false)).collect();
        assert_eq!(waits.len(), 20);
        assert!(
            waits[0] <= BACKOFF_FIRST && waits[19] >= BACKOFF_MAX / 2 && waits[19] <= BACKOFF_MAX
        );
        assert_eq!(pause.after(&Fault::usage("x"), false), None);
        assert!(
            pause
                .after(&fault.with_reason(Reason::WaitingForSource), true)
                .unwrap()
                <= SOURCE_PAUSE_MAX
        );
        let full = Fault::no_space("x");
        assert!(pause.after(&full, false).unwrap() <= SINK_PAUSE_MAX);
        let denied = Fault::not_allowed("x").of_sink();
        assert!(pause.after(&denied, false).unwrap() <= SINK_PAUSE_MAX);
        assert!(
            pause.after(&full, true).unwrap() >= BACKOFF_MAX / 2,
            "what sends the same bytes again is tried seldom"
        );
    }

    #[test]
    fn a_rate_is_that_of_the_last_seconds() {
        let mut pace = ProgressRate::new(0, 0);
        for second in 1..=30 {
            pace.rate(
                second * 1000,
                if second <= 15 { second * 100 } else { 1500 },
            );
        }
        assert_eq!(
            pace.rate(31_000, 1500),
            0,
            "it stood for longer than the window"
        );
        assert_eq!(pace.eta(10), None);
        assert_eq!(
            ProgressRate::new(0, 5000).rate(1000, 5100),
            100,
            "what came before an interruption is no speed"
        );
    }
}

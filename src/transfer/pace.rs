//! When to try again, and how fast it goes: plain functions of time and events.

use std::collections::VecDeque;
use std::time::Duration;

use crate::fault::{Fault, Reason, Retry};
use crate::limits::{BACKOFF_FIRST, BACKOFF_MAX, SOURCE_PAUSE_MAX};

/// The rate is taken over this much time.
const WINDOW_MS: u64 = 10_000;

/// The pause before the next try: doubles from one to the next, with jitter, so that many sites do not come at once.
#[derive(Debug, Default)]
pub(super) struct Pause {
    tries: u32,
}

impl Pause {
    /// How long to wait after this fault; `None`: trying again is of no use.
    pub(super) fn after(&mut self, fault: &Fault) -> Option<Duration> {
        match fault.retry {
            Retry::Never => None,
            Retry::AfterMs(ms) => Some(Duration::from_millis(ms).max(BACKOFF_FIRST)),
            Retry::Backoff => {
                // A source comes back at any moment, and asking whether it has costs little.
                let longest = if fault.reason == Reason::WaitingForSource { SOURCE_PAUSE_MAX } else { BACKOFF_MAX };
                let whole = BACKOFF_FIRST.saturating_mul(1 << self.tries.min(16)).min(longest);
                self.tries += 1;
                Some(whole.mul_f64(rand::random_range(0.5..1.0)))
            }
        }
    }
}

/// Bytes a second over the last seconds.
#[derive(Debug)]
pub(super) struct Pace {
    samples: VecDeque<(u64, u64)>,
    last: u64,
}

impl Pace {
    /// Begins here, with what came before already counted in `bytes`.
    pub(super) fn new(now_ms: u64, bytes: u64) -> Self {
        Self { samples: VecDeque::from([(now_ms, bytes)]), last: 0 }
    }

    /// Takes the bytes so far; gives bytes a second.
    pub(super) fn rate(&mut self, now_ms: u64, bytes: u64) -> u64 {
        self.samples.push_back((now_ms, bytes));
        while self.samples.len() > 2 && self.samples.front().is_some_and(|(at, _)| at + WINDOW_MS < now_ms) {
            self.samples.pop_front();
        }
        let (from_ms, from) = self.samples.front().copied().unwrap_or((now_ms, bytes));
        self.last = bytes.saturating_sub(from) * 1000 / now_ms.saturating_sub(from_ms).max(1);
        self.last
    }

    /// Seconds for this many bytes at the last rate.
    pub(super) fn eta(&self, bytes: u64) -> Option<u64> {
        (self.last > 0).then(|| bytes.div_ceil(self.last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_end_when_it_is_of_no_use() {
        let mut pause = Pause::default();
        let fault = Fault::unreachable("x");
        let waits: Vec<Duration> = (0..20).filter_map(|_| pause.after(&fault)).collect();
        assert_eq!(waits.len(), 20);
        assert!(waits[0] <= BACKOFF_FIRST && waits[19] >= BACKOFF_MAX / 2 && waits[19] <= BACKOFF_MAX);
        assert_eq!(pause.after(&Fault::usage("x")), None);
        assert!(pause.after(&fault.with_reason(Reason::WaitingForSource)).unwrap() <= SOURCE_PAUSE_MAX);
    }

    #[test]
    fn a_rate_is_that_of_the_last_seconds() {
        let mut pace = Pace::new(0, 0);
        for second in 1..=30 {
            pace.rate(second * 1000, if second <= 15 { second * 100 } else { 1500 });
        }
        assert_eq!(pace.rate(31_000, 1500), 0, "it stood for longer than the window");
        assert_eq!(pace.eta(10), None);
        assert_eq!(Pace::new(0, 5000).rate(1000, 5100), 100, "what came before an interruption is no speed");
    }
}

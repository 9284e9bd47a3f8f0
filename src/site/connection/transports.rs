//! Which transport a site uses under `auto`, and when it moves to the other one.
//!
//! A site prefers QUIC. It moves to TCP if the network lets UDP pass but drops what is above a rate
//! (either end's congestion control finds that), tries TCP for some seconds, and returns if TCP is
//! not much faster. Otherwise it tries QUIC again after an hour. A site that is on TCP because QUIC
//! had no answer tries QUIC each minute.
//!
//! Pure: the caller measures and connects. Nothing is stored.

use std::time::{Duration, Instant};

/// How often the caller looks.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How often a site on TCP tries whether QUIC works again.
const QUIC_EVERY: Duration = Duration::from_secs(60);
/// Less was moved between two looks: no transfer runs, and its rate tells nothing.
const BUSY_BYTES: u64 = 64 << 10;
/// The consecutive busy looks with a limited rate before TCP is tried.
const LOOKS_LIMITED: u32 = 2;
/// The busy looks after which a trial of TCP ends.
const LOOKS_TRIAL: u32 = 4;
/// TCP is kept if it moves this many times what QUIC did, in percent.
const FASTER_PERCENT: u64 = 150;
/// How long TCP is used, or not tried again.
const DECIDED_FOR: Duration = Duration::from_secs(3600);

/// TCP is used because QUIC was limited.
#[derive(Debug, Clone, Copy)]
struct Limited {
    /// What QUIC moved, in bytes per second.
    rate: u64,
    until: Instant,
    /// The looks of the trial so far, and the best rate; `None`: the trial has ended.
    trial: Option<(u32, u64)>,
}

/// The transports of a site. One for the life of the daemon.
#[derive(Debug)]
pub(super) struct Transports {
    limited: Option<Limited>,
    looks_limited: u32,
    no_trial_before: Option<Instant>,
    quic_tried: Instant,
}

impl Transports {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            limited: None,
            looks_limited: 0,
            no_trial_before: None,
            quic_tried: now,
        }
    }

    /// Whether so many bytes since the last look are a transfer.
    pub(super) fn is_busy(moved: u64) -> bool {
        moved >= BUSY_BYTES
    }

    /// A look at a QUIC connection: what was moved since the last one, and the rate above which the
    /// path drops. Returns whether TCP should be tried.
    pub(super) fn look_at_quic(&mut self, now: Instant, moved: u64, rate: Option<u64>) -> bool {
        if !Self::is_busy(moved) || self.no_trial_before.is_some_and(|before| now < before) {
            return false;
        }
        self.looks_limited = match rate {
            Some(_) => self.looks_limited + 1,
            None => 0,
        };
        self.looks_limited >= LOOKS_LIMITED
    }

    /// The site moved to TCP, because the path drops what is above this rate.
    pub(super) fn moved_to_tcp(&mut self, now: Instant, rate: u64) {
        self.looks_limited = 0;
        self.limited = Some(Limited {
            rate,
            until: now + DECIDED_FOR,
            trial: Some((0, 0)),
        });
    }

    /// TCP does not connect, or QUIC is used again: TCP is not tried for a while.
    pub(super) fn stay_on_quic(&mut self, now: Instant) {
        (self.limited, self.looks_limited) = (None, 0);
        self.no_trial_before = Some(now + DECIDED_FOR);
    }

    /// A look at a TCP connection. Returns whether QUIC should be tried.
    pub(super) fn look_at_tcp(&mut self, now: Instant, moved: u64) -> bool {
        if self.judge_trial(moved) == Some(false) {
            self.stay_on_quic(now);
            return true;
        }
        if self.limited.is_some_and(|limited| now < limited.until) {
            return false;
        }
        let is_due = now.saturating_duration_since(self.quic_tried) >= QUIC_EVERY;
        if is_due {
            self.quic_tried = now;
        }
        is_due
    }

    /// A connection over TCP begins: the next try of QUIC is a while away.
    pub(super) fn began_tcp(&mut self, now: Instant) {
        self.quic_tried = now;
    }

    /// The site moved to QUIC.
    pub(super) fn moved_to_quic(&mut self) {
        self.limited = None;
    }

    /// The rate to which QUIC was limited, while TCP is used because of it.
    pub(super) fn limited_rate(&self, now: Instant) -> Option<u64> {
        let limited = self.limited.filter(|limited| now < limited.until);
        limited.map(|limited| limited.rate)
    }

    /// Counts a look during the trial. Returns the result when the trial ends: whether TCP is much
    /// faster.
    fn judge_trial(&mut self, moved: u64) -> Option<bool> {
        let limited = self.limited.as_mut()?;
        let (looks, best) = limited.trial.as_mut()?;
        if !Self::is_busy(moved) {
            return None;
        }
        *looks += 1;
        *best = (*best).max(moved / LOOK_EVERY.as_secs());
        if *best >= limited.rate / 100 * FASTER_PERCENT {
            limited.trial = None;
            return Some(true);
        }
        (*looks >= LOOKS_TRIAL).then_some(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is moved between two looks at so many bytes per second.
    fn at(rate: u64) -> u64 {
        rate * LOOK_EVERY.as_secs()
    }

    const RATE: u64 = 125_000;

    /// A site whose QUIC is limited, after it moved to TCP.
    fn on_tcp(now: Instant) -> Transports {
        let mut transports = Transports::new(now);
        assert!(!transports.look_at_quic(now, at(RATE), Some(RATE)));
        assert!(transports.look_at_quic(now, at(RATE), Some(RATE)));
        transports.moved_to_tcp(now, RATE);
        transports
    }

    #[test]
    fn quic_stays_if_it_is_not_limited_or_nothing_is_transferred() {
        let now = Instant::now();
        let mut transports = Transports::new(now);
        for _ in 0..100 {
            assert!(!transports.look_at_quic(now, at(RATE), None));
            assert!(!transports.look_at_quic(now, 10_000, Some(RATE)));
        }
        assert!(!transports.look_at_quic(now, at(RATE), Some(RATE)));
        assert!(
            !transports.look_at_quic(now, at(RATE), None),
            "once is not enough"
        );
        assert!(!transports.look_at_quic(now, at(RATE), Some(RATE)));
    }

    #[test]
    fn a_faster_tcp_is_kept_for_an_hour() {
        let now = Instant::now();
        let mut transports = on_tcp(now);
        assert!(!transports.look_at_tcp(now, at(RATE)));
        assert!(!transports.look_at_tcp(now, at(40 * RATE)));
        for minute in 0..59 {
            let later = now + Duration::from_secs(60 * minute);
            assert_eq!(transports.limited_rate(later), Some(RATE));
            assert!(
                !transports.look_at_tcp(later, at(RATE)),
                "slow since, but it was faster"
            );
        }
        let later = now + Duration::from_secs(3601);
        assert!(transports.look_at_tcp(later, 0));
        assert_eq!(transports.limited_rate(later), None);
        assert!(
            !transports.look_at_tcp(later, 0),
            "the next try is a minute away"
        );
        assert!(transports.look_at_tcp(later + QUIC_EVERY, 0));
    }

    #[test]
    fn a_tcp_that_is_not_faster_is_left_and_not_tried_for_an_hour() {
        let now = Instant::now();
        let mut transports = on_tcp(now);
        for _ in 1..LOOKS_TRIAL {
            assert!(!transports.look_at_tcp(now, at(RATE)));
            assert!(!transports.look_at_tcp(now, 0), "no transfer tells nothing");
        }
        assert!(transports.look_at_tcp(now, at(RATE)));
        transports.moved_to_quic();
        let soon = now + Duration::from_secs(3599);
        for _ in 0..10 {
            assert!(!transports.look_at_quic(soon, at(RATE), Some(RATE)));
        }
        let later = now + Duration::from_secs(3600);
        assert!(!transports.look_at_quic(later, at(RATE), Some(RATE)));
        assert!(transports.look_at_quic(later, at(RATE), Some(RATE)));
    }

    #[test]
    fn quic_is_tried_each_minute_where_it_had_no_answer() {
        let now = Instant::now();
        let mut transports = Transports::new(now);
        transports.began_tcp(now);
        let tried = (0..60u32).filter(|look| transports.look_at_tcp(now + LOOK_EVERY * *look, 0));
        assert_eq!(tried.count(), 4);
    }
}

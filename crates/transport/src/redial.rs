//! The pause before the next attempt to connect to the hub: a pure function of the earlier
//! attempts.

use std::time::Duration;

use base::limits::{BACKOFF_FIRST, RECONNECT_MAX, RECONNECT_SOON_ATTEMPTS, RECONNECT_SOON_MAX};

/// After a connection of at least this duration, the next attempt starts without the longer pauses.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// The pauses between attempts. They double, with jitter, so that many sites do not reconnect at
/// once. They stay short for some minutes, and become longer when the hub does not come back.
#[derive(Debug)]
pub struct Redial {
    pause_max: Duration,
    attempts: u32,
}

impl Default for Redial {
    fn default() -> Self {
        Self {
            pause_max: BACKOFF_FIRST,
            attempts: 0,
        }
    }
}

impl Redial {
    /// The next pause.
    pub fn pause(&mut self) -> Duration {
        let pause = self.pause_max.mul_f64(rand::random_range(0.5..1.0));
        self.attempts = self.attempts.saturating_add(1);
        let longest = match self.attempts < RECONNECT_SOON_ATTEMPTS {
            true => RECONNECT_SOON_MAX,
            false => RECONNECT_MAX,
        };
        self.pause_max = (self.pause_max * 2).min(longest);
        pause
    }

    /// Records that a connection ended after this time. A long connection resets the pauses. A
    /// connection that ends soon does not, so that a permanent problem does not cause frequent
    /// attempts.
    pub fn stood(&mut self, time: Duration) {
        if time >= STABLE_AFTER {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_about(pause: Duration, pause_max: Duration) -> bool {
        pause >= pause_max / 2 && pause <= pause_max
    }

    #[test]
    fn pauses_double_to_a_limit() {
        let mut redial = Redial::default();
        let mut total = Duration::ZERO;
        for doublings in 0..RECONNECT_SOON_ATTEMPTS {
            let pause_max = BACKOFF_FIRST
                .saturating_mul(1 << doublings.min(20))
                .min(RECONNECT_SOON_MAX);
            let pause = redial.pause();
            total += pause;
            assert!(is_about(pause, pause_max), "{doublings}: {pause:?}");
        }
        assert!(total > Duration::from_secs(120), "{total:?}");
        for _ in 0..9 {
            redial.pause();
        }
        assert!(is_about(redial.pause(), RECONNECT_MAX));
    }

    #[test]
    fn pauses_of_sites_differ() {
        let pauses: Vec<Duration> = (0..20).map(|_| Redial::default().pause()).collect();
        assert!(pauses.windows(2).any(|two| two[0] != two[1]), "{pauses:?}");
    }

    #[test]
    fn a_long_connection_resets_the_pauses_and_a_short_one_does_not() {
        let mut redial = Redial::default();
        for _ in 0..10 {
            redial.pause();
        }
        redial.stood(STABLE_AFTER - Duration::from_millis(1));
        assert!(is_about(redial.pause(), RECONNECT_SOON_MAX));
        redial.stood(STABLE_AFTER);
        assert!(is_about(redial.pause(), BACKOFF_FIRST));
        assert!(is_about(redial.pause(), BACKOFF_FIRST * 2));
    }
}

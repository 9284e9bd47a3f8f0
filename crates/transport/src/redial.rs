//! How long to wait before the hub is dialled again: a plain function of how it went.

use std::time::Duration;

use base::limits::{BACKOFF_FIRST, RECONNECT_MAX};

/// A line that stood this long was a good one: the next is dialled at once.
const GOOD_FROM: Duration = Duration::from_secs(10);

/// The pauses between one call and the next: they double, with jitter, so that many sites do not
/// come at once.
#[derive(Debug)]
pub struct Redial {
    longest: Duration,
}

impl Default for Redial {
    fn default() -> Self {
        Self {
            longest: BACKOFF_FIRST,
        }
    }
}

impl Redial {
    /// The next pause.
    pub fn pause(&mut self) -> Duration {
        let pause = self.longest.mul_f64(rand::random_range(0.5..1.0));
        self.longest = (self.longest * 2).min(RECONNECT_MAX);
        pause
    }

    /// A line has ended that stood so long. After a good one the pauses begin anew; one that ends
    /// as soon as it stands, because this end cannot work, is not dialled without end.
    pub fn stood(&mut self, time: Duration) {
        if time >= GOOD_FROM {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_about(pause: Duration, longest: Duration) -> bool {
        pause >= longest / 2 && pause <= longest
    }

    #[test]
    fn pauses_double_to_a_limit() {
        let mut redial = Redial::default();
        for doublings in 0..40u32 {
            let longest = BACKOFF_FIRST
                .saturating_mul(1 << doublings.min(20))
                .min(RECONNECT_MAX);
            let pause = redial.pause();
            assert!(is_about(pause, longest), "{doublings}: {pause:?}");
        }
    }

    #[test]
    fn no_two_sites_come_at_once() {
        let pauses: Vec<Duration> = (0..20).map(|_| Redial::default().pause()).collect();
        assert!(pauses.windows(2).any(|two| two[0] != two[1]), "{pauses:?}");
    }

    #[test]
    fn a_good_line_is_followed_at_once_and_one_that_ends_at_once_is_not() {
        let mut redial = Redial::default();
        for _ in 0..10 {
            redial.pause();
        }
        redial.stood(GOOD_FROM - Duration::from_millis(1));
        assert!(is_about(redial.pause(), RECONNECT_MAX));
        redial.stood(GOOD_FROM);
        assert!(is_about(redial.pause(), BACKOFF_FIRST));
        assert!(is_about(redial.pause(), BACKOFF_FIRST * 2));
    }
}

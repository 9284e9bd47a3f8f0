//! How often each peer may do something: report, ask for a change, connect. A peer that floods a
//! daemon slows down itself only. In memory.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Peers whose rate is remembered; the entry of the longest idle peer is removed first.
const PACED_MAX: usize = 4096;
/// A rate limit for each peer (`K` identifies one): so many steps per second, and as many at once as
/// a burst. Cheap to call.
pub struct RateLimiter<K> {
    per_second: f64,
    burst: f64,
    /// For each peer, the number of available steps at a point in time; below 0 the peer waits.
    peers: Mutex<HashMap<K, (Instant, f64)>>,
}

impl<K: Clone + Eq + Hash> RateLimiter<K> {
    /// So many steps `per_second`, and `burst` at once after a pause.
    pub fn new(per_second: u32, burst: u32) -> Self {
        Self {
            per_second: per_second.into(),
            burst: burst.into(),
            peers: Mutex::default(),
        }
    }

    /// Takes so many steps; waits until they are available.
    pub async fn go(&self, peer: &K, steps: usize) {
        let wait = self.take(peer, steps, Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// Takes one step if it is available now; otherwise returns how long the peer must wait for it,
    /// and takes nothing.
    pub fn try_go(&self, peer: &K) -> Result<(), Duration> {
        self.with(peer, Instant::now(), |left| {
            let lacking = 1.0 - *left;
            if lacking > 0.0 {
                return Err(Duration::from_secs_f64(lacking / self.per_second));
            }
            *left -= 1.0;
            Ok(())
        })
    }

    /// Takes so many steps, and returns how long the peer must wait for them.
    fn take(&self, peer: &K, steps: usize, now: Instant) -> Duration {
        self.with(peer, now, |left| {
            *left -= steps as f64;
            Duration::from_secs_f64((-*left / self.per_second).max(0.0))
        })
    }

    /// Passes the number of steps that the peer has now.
    fn with<T>(&self, peer: &K, now: Instant, take: impl FnOnce(&mut f64) -> T) -> T {
        let mut peers = self.peers.lock();
        let earned = |since: Instant, left: f64| {
            (left + now.duration_since(since).as_secs_f64() * self.per_second).min(self.burst)
        };
        if peers.len() >= PACED_MAX {
            peers.retain(|_, (since, left)| earned(*since, *left) < self.burst);
        }
        let (since, left) = peers.entry(peer.clone()).or_insert((now, self.burst));
        (*since, *left) = (now, earned(*since, *left));
        take(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_with_too_many_requests_slows_down_only_itself() {
        let pace = RateLimiter::new(10, 20);
        let [loud, calm] = ["loud", "calm"];
        let now = Instant::now();
        assert_eq!(
            pace.take(&loud, 20, now),
            Duration::ZERO,
            "a burst is not delayed"
        );
        assert_eq!(pace.take(&loud, 30, now), Duration::from_secs(3));
        assert_eq!(
            pace.take(&calm, 20, now),
            Duration::ZERO,
            "another peer has its own limit"
        );
        assert_eq!(
            pace.take(&loud, 10, now + Duration::from_secs(4)),
            Duration::ZERO,
            "ten steps are available after a second"
        );
        assert_eq!(
            pace.take(&loud, 20, now + Duration::from_secs(3600)),
            Duration::ZERO,
            "after an hour no more than a burst is available"
        );
        assert_eq!(
            pace.take(&loud, 10, now + Duration::from_secs(3600)),
            Duration::from_secs(1)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_step_that_is_refused_costs_nothing() {
        let pace = RateLimiter::new(2, 3);
        for _ in 0..3 {
            assert_eq!(pace.try_go(&"site"), Ok(()));
        }
        for _ in 0..1_000 {
            assert_eq!(pace.try_go(&"site"), Err(Duration::from_millis(500)));
        }
        assert_eq!(pace.try_go(&"other"), Ok(()));
        tokio::time::advance(Duration::from_millis(500)).await;
        assert_eq!(pace.try_go(&"site"), Ok(()));
        assert!(pace.try_go(&"site").is_err());
    }
}

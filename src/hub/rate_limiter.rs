//! How fast each peer may report and ask for changes. A limiter delays and never refuses: a peer
//! that floods the hub slows down itself only. In memory.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use base::peer::Peer;

/// Peers whose rate is remembered; the entry of the longest idle peer is removed first.
const PACED_MAX: usize = 4096;
/// A rate limit for each peer: so many steps per second, and as many at once as a burst. Cheap to
/// call.
pub(super) struct RateLimiter {
    per_second: f64,
    burst: f64,
    /// For each peer, the number of available steps at a point in time; below 0 the peer waits.
    peers: Mutex<HashMap<Peer, (Instant, f64)>>,
}

impl RateLimiter {
    pub(super) fn new(per_second: u32, burst: u32) -> Self {
        Self {
            per_second: per_second.into(),
            burst: burst.into(),
            peers: Mutex::default(),
        }
    }

    /// Takes so many steps; waits until they are available.
    pub(super) async fn go(&self, peer: &Peer, steps: usize) {
        let wait = self.take(peer, steps, Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// Takes so many steps, and returns how long the peer must wait for them.
    fn take(&self, peer: &Peer, steps: usize, now: Instant) -> Duration {
        let mut peers = self.peers.lock();
        let earned = |since: Instant, left: f64| {
            (left + now.duration_since(since).as_secs_f64() * self.per_second).min(self.burst)
        };
        if peers.len() >= PACED_MAX {
            peers.retain(|_, (since, left)| earned(*since, *left) < self.burst);
        }
        let (since, left) = peers.entry(peer.clone()).or_insert((now, self.burst));
        (*since, *left) = (now, earned(*since, *left) - steps as f64);
        Duration::from_secs_f64((-*left / self.per_second).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_with_too_many_requests_slows_down_only_itself() {
        let pace = RateLimiter::new(10, 20);
        let [loud, calm] = ["loud", "calm"].map(|name| Peer::Site(name.parse().unwrap()));
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
}

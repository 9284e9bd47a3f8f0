//! Spaces the packets of a connection over a slow path.
//!
//! quinn's pacer sends up to ten packets at once. Over 2 Mbit/s these are 60 ms: more than a short
//! queue holds, and more than a policer lets through. The congestion control therefore limits the
//! window to what is in flight and what a bucket holds, and the connection is woken when the bucket
//! has filled again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// A faster path is not paced: ten packets are 24 ms of 5 Mbit/s.
const RATE_MAX: u64 = 625_000;
/// The bucket holds one packet, or what is sent in this time.
const BUCKET: Duration = Duration::from_millis(4);
/// The connection is woken for one packet, or for what is sent in this time.
const STEP: Duration = Duration::from_millis(2);

/// The pace of one connection. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Pace(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    bucket: Mutex<Option<Bucket>>,
    is_empty: Notify,
}

#[derive(Debug)]
struct Bucket {
    /// Bytes per second.
    rate: u64,
    packet: u64,
    /// What may be sent, as of this time.
    bytes: u64,
    at: Instant,
}

impl Bucket {
    fn in_time(&self, time: Duration) -> u64 {
        (u128::from(self.rate) * time.as_nanos() / 1_000_000_000) as u64
    }

    fn step(&self) -> u64 {
        self.in_time(STEP).max(self.packet)
    }

    fn fill(&mut self, now: Instant) {
        let bytes = self.in_time(now.saturating_duration_since(self.at));
        let most = self.in_time(BUCKET).max(self.packet);
        if bytes > 0 {
            self.bytes = self.bytes.saturating_add(bytes).min(most);
            self.at = now;
        }
    }

    /// When the next packets may be sent, if not now.
    fn due(&self) -> Option<Instant> {
        let lacks = self.step().checked_sub(self.bytes).filter(|n| *n > 0)?;
        (self.bytes < self.packet).then(|| {
            let time = u128::from(lacks) * 1_000_000_000 / u128::from(self.rate.max(1));
            self.at + Duration::from_nanos(u64::try_from(time).unwrap_or(u64::MAX)) + GRAIN
        })
    }
}

/// Rounding never makes a wake-up too early.
const GRAIN: Duration = Duration::from_nanos(1000);

impl Pace {
    /// Sets the rate in bytes per second, for packets of this size.
    pub(super) fn set(&self, now: Instant, rate: u64, packet: u64) {
        let mut bucket = self.0.bucket.lock();
        if rate > RATE_MAX || rate == 0 {
            if bucket.take().is_some() {
                self.0.is_empty.notify_one();
            }
            return;
        }
        match &mut *bucket {
            Some(bucket) => {
                bucket.fill(now);
                (bucket.rate, bucket.packet) = (rate, packet);
            }
            None => {
                *bucket = Some(Bucket {
                    rate,
                    packet,
                    bytes: packet,
                    at: now,
                });
            }
        }
    }

    /// Takes sent bytes out of the bucket.
    pub(super) fn sent(&self, now: Instant, bytes: u64) {
        let mut bucket = self.0.bucket.lock();
        if let Some(bucket) = &mut *bucket {
            bucket.fill(now);
            bucket.bytes = bucket.bytes.saturating_sub(bytes);
            if bucket.due().is_some() {
                self.0.is_empty.notify_one();
            }
        }
    }

    /// The bytes that may be sent now; `None` if the path is not paced.
    pub(super) fn allows(&self) -> Option<u64> {
        self.0.bucket.lock().as_ref().map(|bucket| bucket.bytes)
    }

    /// When more may be sent, if nothing may be sent now.
    pub(super) fn due(&self) -> Option<Instant> {
        self.0.bucket.lock().as_ref().and_then(Bucket::due)
    }

    /// Fills the bucket.
    pub(super) fn fill(&self, now: Instant) {
        if let Some(bucket) = &mut *self.0.bucket.lock() {
            bucket.fill(now);
        }
    }

    /// Waits until an empty bucket has filled again.
    pub(super) async fn filled(&self) {
        loop {
            let changed = self.0.is_empty.notified();
            match self.due() {
                None => changed.await,
                Some(at) => {
                    tokio::time::sleep_until(at.into()).await;
                    self.fill(Instant::now());
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKET: u64 = 1500;

    #[test]
    fn a_slow_path_gets_one_packet_at_a_time() {
        let (pace, start) = (Pace::default(), Instant::now());
        assert_eq!((pace.allows(), pace.due()), (None, None));
        // 2 Mbit/s: 6 ms each.
        pace.set(start, 250_000, PACKET);
        assert_eq!((pace.allows(), pace.due()), (Some(PACKET), None));
        pace.sent(start, PACKET);
        let due = pace.due().unwrap();
        assert!(due >= start + Duration::from_millis(6) && due < start + Duration::from_millis(7));
        pace.fill(due);
        assert!(pace.allows().unwrap() >= PACKET && pace.due().is_none());
        pace.fill(start + Duration::from_secs(10));
        assert_eq!(pace.allows(), Some(PACKET));
    }

    #[test]
    fn small_steps_fill_the_bucket_as_well() {
        let (pace, start) = (Pace::default(), Instant::now());
        pace.set(start, 1000, PACKET);
        pace.sent(start, PACKET);
        for step in 1..=1500 {
            pace.fill(start + Duration::from_micros(step * 1000));
        }
        assert_eq!(pace.allows(), Some(PACKET));
    }

    #[test]
    fn a_fast_path_is_not_paced() {
        let (pace, start) = (Pace::default(), Instant::now());
        pace.set(start, 250_000, PACKET);
        pace.set(start, RATE_MAX + 1, PACKET);
        assert_eq!(pace.allows(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_woken_when_the_bucket_has_filled() {
        let pace = Pace::default();
        pace.set(Instant::now(), RATE_MAX, PACKET);
        let waiter = pace.clone();
        let task = tokio::spawn(async move { waiter.filled().await });
        tokio::task::yield_now().await;
        assert!(!task.is_finished());
        pace.sent(Instant::now(), 10 * PACKET);
        task.await.unwrap();
    }
}

//! The rate of a path, from packets that were sent at the same moment.
//!
//! The narrowest link of a path spaces the packets of a burst, and their acknowledgements arrive
//! with this spacing. The first burst of a connection therefore tells the rate before the window
//! has reached it. Acknowledgements that a busy machine sends together make the rate too high,
//! and ones that it delays make it too low.

use std::time::{Duration, Instant};

use super::per_second;

/// A rate is computed from at least this many packets, in at least this many acknowledgements, after
/// the first one.
const PACKETS_MIN: u64 = 4;
const ACKS_MIN: u32 = 2;

/// The acknowledged part of a burst.
#[derive(Debug, Clone, Copy)]
struct Burst {
    sent: Instant,
    first_acked: Instant,
    /// The bytes acknowledged after the first acknowledgement, the number of acknowledgements, and
    /// the time of the last one.
    bytes: u64,
    acks: u32,
    last_acked: Instant,
    rate: u64,
}

/// The bursts of one startup.
#[derive(Debug, Clone, Default)]
pub(super) struct Bursts {
    current: Option<Burst>,
    highest: Option<u64>,
    typical: Option<u64>,
}

impl Bursts {
    /// Processes the acknowledgement of a packet that was sent at `sent`.
    pub(super) fn acked(&mut self, now: Instant, sent: Instant, bytes: u64, mtu: u64) {
        match &mut self.current {
            Some(burst) if burst.sent > sent => {}
            Some(burst) if burst.sent == sent => {
                if now > burst.first_acked {
                    burst.bytes += bytes;
                }
                if now > burst.last_acked {
                    burst.acks += 1;
                    burst.last_acked = now;
                }
                if burst.bytes >= PACKETS_MIN * mtu && burst.acks >= ACKS_MIN {
                    // The last packet may wait for a delayed acknowledgement: the highest rate of
                    // the parts is that of the path.
                    let rate = per_second(burst.bytes, now.duration_since(burst.first_acked));
                    burst.rate = burst.rate.max(rate);
                    self.highest = Some(self.highest.unwrap_or(0).max(burst.rate));
                }
            }
            _ => {
                let next = Burst {
                    sent,
                    first_acked: now,
                    bytes: 0,
                    acks: 0,
                    last_acked: now,
                    rate: 0,
                };
                if let Some(burst) = self.current.replace(next).filter(|b| b.rate > 0) {
                    self.typical = Some(match self.typical {
                        Some(typical) => typical / 4 * 3 + burst.rate / 4,
                        None => burst.rate,
                    });
                }
            }
        }
    }

    /// The bytes that the path holds without a queue, by the fastest burst.
    pub(super) fn most(&self, trip: Duration) -> Option<u64> {
        self.highest.map(|rate| bytes_in(rate, trip))
    }

    /// The same by an average burst.
    pub(super) fn typical(&self, trip: Duration) -> Option<u64> {
        self.typical.map(|rate| bytes_in(rate, trip))
    }
}

/// The bytes that this rate carries in this time.
pub(super) fn bytes_in(rate: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(rate) * time.as_nanos() / 1_000_000_000).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRIP: Duration = Duration::from_millis(100);

    /// Acknowledgements of two packets each, at these milliseconds, of one burst.
    fn burst(bursts: &mut Bursts, start: Instant, at: &[u64]) {
        for ms in at {
            let now = start + TRIP + Duration::from_millis(*ms);
            bursts.acked(now, start, 1000, 1000);
            bursts.acked(now, start, 1000, 1000);
        }
    }

    #[test]
    fn a_burst_tells_the_rate_and_a_late_last_packet_does_not_change_it() {
        let (mut bursts, start) = (Bursts::default(), Instant::now());
        burst(&mut bursts, start, &[0, 10]);
        assert_eq!(
            bursts.most(TRIP),
            None,
            "one acknowledgement after the first"
        );
        burst(&mut bursts, start, &[20, 30, 70]);
        // 2,000 bytes each 10 ms.
        assert_eq!(bursts.most(TRIP), Some(20_000));
        assert_eq!(bursts.typical(TRIP), None);
        burst(&mut bursts, start + TRIP, &[0, 5, 10]);
        assert_eq!(bursts.most(TRIP), Some(40_000));
        assert_eq!(bursts.typical(TRIP), Some(20_000));
    }

    #[test]
    fn packets_that_are_sent_apart_tell_nothing() {
        let (mut bursts, start) = (Bursts::default(), Instant::now());
        for ms in 0..50 {
            let sent = start + Duration::from_millis(ms);
            bursts.acked(sent + TRIP, sent, 1000, 1000);
        }
        assert_eq!(bursts.most(TRIP), None);
    }
}

//! The emulated path of one direction.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

use super::HEADERS;

/// The properties of one direction of a path.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    /// Bits per second.
    pub(crate) rate: u64,
    /// One way.
    pub(crate) delay: Duration,
    /// A packet that would wait longer is dropped.
    pub(crate) queue: Duration,
    /// The share of packets that are lost at random.
    pub(crate) loss: f64,
    pub(crate) duplicates: f64,
    /// The share of packets that arrive later by `reorder_by`.
    pub(crate) reorder: f64,
    pub(crate) reorder_by: Duration,
    /// A policer in front of the queue: bits per second, and the packets of its bucket.
    pub(crate) police: Option<(u64, u64)>,
}

impl Line {
    /// A line with this rate in kbit/s, this round trip and this queue, in milliseconds.
    pub(crate) fn new(kbit: u64, round_trip_ms: u64, queue_ms: u64) -> Self {
        Self {
            rate: kbit * 1000,
            delay: Duration::from_micros(round_trip_ms * 500),
            queue: Duration::from_millis(queue_ms),
            loss: 0.0,
            duplicates: 0.0,
            reorder: 0.0,
            reorder_by: Duration::ZERO,
            police: None,
        }
    }

    pub(crate) fn lossy(self, loss: f64) -> Self {
        Self { loss, ..self }
    }

    fn time_of(&self, bytes: usize) -> Duration {
        Duration::from_secs_f64(bytes as f64 * 8.0 / self.rate as f64)
    }
}

/// Packets since the start.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Seen {
    pub(crate) sent: u64,
    /// Dropped because the queue was full, or by the policer.
    pub(crate) dropped: u64,
    pub(crate) lost: u64,
    pub(crate) bytes: u64,
}

impl std::ops::Sub for Seen {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            sent: self.sent - before.sent,
            dropped: self.dropped - before.dropped,
            lost: self.lost - before.lost,
            bytes: self.bytes - before.bytes,
        }
    }
}

impl Seen {
    pub(crate) fn dropped_share(&self) -> f64 {
        self.dropped as f64 / self.sent.max(1) as f64
    }
}

pub(super) struct Direction {
    line: Line,
    free_at: Instant,
    /// Bits in the bucket of the policer, and when that was.
    bucket: (f64, Instant),
    pub(super) seen: Seen,
}

impl Direction {
    pub(super) fn new(line: Line, now: Instant) -> Self {
        Self {
            line,
            free_at: now,
            bucket: (f64::MAX, now),
            seen: Seen::default(),
        }
    }

    /// When the packet arrives, and when a duplicate does.
    pub(super) fn pass(
        &mut self,
        now: Instant,
        bytes: usize,
        random: &mut u64,
    ) -> [Option<Instant>; 2] {
        let mut chance = || {
            *random ^= *random << 13;
            *random ^= *random >> 7;
            *random ^= *random << 17;
            (*random >> 11) as f64 / (1u64 << 53) as f64
        };
        self.seen.sent += 1;
        if let Some((rate, packets)) = self.line.police {
            let full = (packets * (1500 + HEADERS as u64) * 8) as f64;
            let (bits, at) = self.bucket;
            let bits = (bits + (now - at).as_secs_f64() * rate as f64).min(full);
            let needs = bytes as f64 * 8.0;
            if bits < needs {
                self.bucket = (bits, now);
                self.seen.dropped += 1;
                return [None, None];
            }
            self.bucket = (bits - needs, now);
        }
        if chance() < self.line.loss {
            self.seen.lost += 1;
            return [None, None];
        }
        let start = self.free_at.max(now);
        if start - now > self.line.queue {
            self.seen.dropped += 1;
            return [None, None];
        }
        self.free_at = start + self.line.time_of(bytes);
        self.seen.bytes += bytes as u64;
        let mut at = self.free_at + self.line.delay;
        if chance() < self.line.reorder {
            at += self.line.reorder_by;
        }
        let again = (chance() < self.line.duplicates).then(|| at + Duration::from_micros(100));
        [Some(at), again]
    }
}

/// A packet on its way.
pub(super) struct Flight {
    pub(super) at: Instant,
    pub(super) number: u64,
    pub(super) pair: usize,
    /// The receiving end.
    pub(super) end: usize,
    pub(super) packet: Vec<u8>,
}

impl PartialEq for Flight {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Flight {}

impl PartialOrd for Flight {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Flight {
    /// The earliest is the greatest.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

//! A BBR-style congestion control for connections with a long round trip: the window is the
//! measured bandwidth times the smallest round trip (BDP), times a gain, normally 1.5.
//!
//! It uses the model of BBR: the bandwidth is the best delivery rate of recent rounds, regardless
//! of loss. It differs from the published BBR (v1) as follows:
//! - It sets only the window. It has no pacing gains and no ProbeBW cycle: quinn's pacer sends at
//!   1.25 windows per round trip.
//! - The window gain in normal operation is 1.5, not 2. It is 2 if the path has no queue, rises
//!   towards 2 if other senders keep a queue, and falls to 1 and then 1.25 after more than 1/12 of
//!   a round was lost.
//! - Startup grows by the acknowledged bytes up to 1.75 BDP, and also ends when the round trip
//!   increases or 1/8 of a round is lost.
//! - Instead of ProbeRTT with 4 packets, it halves the window for two rounds when the smallest
//!   round trip was not seen for 10 s, or when the path seems to have changed.
//!
//! Reason: quinn's BBR has a window of two to three BDP. On a connection of 200 Mbit/s and 100 ms
//! it sent half of all packets into a full queue. A window of 1.5 BDP keeps the connection full
//! with half a round trip of queue, also between busy machines, and uses bandwidth that becomes
//! free.
//!
//! The module only computes with the times and bytes that quinn reports. No state is kept across
//! connections.

use std::any::Any;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use quinn::congestion::Controller;
use quinn_proto::RttEstimator;

/// The bandwidth is the best rate of this many rounds.
const ROUNDS: usize = 10;
/// The normal window, in quarters of a BDP.
const GAIN_QUARTERS: u64 = 6;
/// The window after a short queue was detected, in quarters of a BDP.
const GAIN_QUARTERS_SHORT_QUEUE: u64 = 5;
/// The largest window, in quarters of a BDP. It is used while the path has no queue, because more
/// bandwidth may be available, and while other senders keep a queue, because a sender with a
/// smaller share of the queue gets no bandwidth.
const GAIN_QUARTERS_MAX: u64 = 8;
/// The largest window during startup, in quarters of a BDP. A last doubling would overfill the
/// queue of most paths.
const START_QUARTERS: u64 = 7;
/// The smallest round trip is measured again if it was not seen for this long.
const LEAST_FOR: Duration = Duration::from_secs(10);
/// The number of rounds with an empty queue for that measurement.
const DRAIN_ROUNDS: u8 = 2;
/// The number of rounds with a reduced gain after one in twelve packets was lost, which indicates a
/// short queue.
const CAREFUL_ROUNDS: u8 = 20;
/// The number of rounds without growth that end startup.
const FLAT_ROUNDS: u8 = 2;
/// The delay that a busy machine may add to a round trip.
const JITTER: Duration = Duration::from_millis(4);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nearly doubles the window per round, until the bandwidth stops growing or a queue builds up.
    Start {
        best: u64,
        rounds_without_growth: u8,
    },
    /// The normal phase, at full bandwidth.
    Cruise,
    /// Empties the queue for this many more rounds, to measure the round trip without a queue.
    Drain { rounds: u8 },
}

/// One round trip. It ends with the first acknowledgement of a packet that was sent after its
/// start.
#[derive(Debug, Clone, Copy)]
struct Round {
    began: Instant,
    delivered: u64,
    lost: u64,
    limited: bool,
    min_rtt: Duration,
}

#[derive(Debug, Clone)]
pub(super) struct Bbr {
    phase: Phase,
    window: u64,
    first_window: u64,
    mtu: u64,
    gain_quarters: u64,
    /// Whether the gain is high because the path had no queue, rather than because of other
    /// senders.
    gain_is_for_empty_queue: bool,
    /// The number of rounds for which a short queue is remembered.
    careful_rounds: u8,
    /// Whether a round with enough data was measured. Until then, the first window is used.
    measured: bool,
    delivered: u64,
    /// The rates of the last rounds in bytes per second.
    rates: VecDeque<u64>,
    min_rtt: Duration,
    min_rtt_seen: Instant,
    round: Option<Round>,
    ended: bool,
    acked: u64,
    smoothed: Duration,
}

impl Bbr {
    pub(super) fn new(now: Instant, window: u64, mtu: u16) -> Self {
        Self {
            phase: Phase::Start {
                best: 0,
                rounds_without_growth: 0,
            },
            window,
            first_window: window,
            mtu: mtu.into(),
            gain_quarters: GAIN_QUARTERS,
            gain_is_for_empty_queue: false,
            careful_rounds: 0,
            measured: false,
            delivered: 0,
            rates: VecDeque::with_capacity(ROUNDS),
            min_rtt: Duration::MAX,
            min_rtt_seen: now,
            round: None,
            ended: false,
            acked: 0,
            smoothed: Duration::ZERO,
        }
    }

    /// Processes the acknowledgement of a packet that was sent at `sent`.
    fn acked(&mut self, now: Instant, sent: Instant, bytes: u64, limited: bool) {
        self.delivered += bytes;
        self.acked += bytes;
        let trip = now.saturating_duration_since(sent);
        if trip
            <= self
                .min_rtt
                .saturating_add(self.min_rtt.min(Duration::from_secs(1)) / 50)
        {
            self.min_rtt_seen = now;
            self.min_rtt = self.min_rtt.min(trip);
        }
        match &mut self.round {
            Some(round) => {
                round.min_rtt = round.min_rtt.min(trip);
                round.limited |= limited;
                self.ended |= sent >= round.began;
            }
            None => self.ended = true,
        }
    }

    /// Called after all packets of one acknowledgement were processed.
    fn end_acks(&mut self, now: Instant, limited: bool, smoothed: Duration) {
        let acked = std::mem::take(&mut self.acked);
        if std::mem::take(&mut self.ended) {
            let next = Round {
                began: now,
                delivered: self.delivered,
                lost: 0,
                limited,
                min_rtt: Duration::MAX,
            };
            if let Some(round) = self.round.replace(next) {
                self.end_round(now, &round);
            }
        }
        if let Phase::Start { .. } = self.phase {
            let queued = smoothed
                > self
                    .min_rtt
                    .saturating_add(self.min_rtt / 4)
                    .saturating_add(JITTER);
            if queued && self.measured && !limited {
                self.phase = Phase::Cruise;
                self.add_partial_round(now);
            } else if !limited {
                let most = if !self.measured {
                    u64::MAX
                } else {
                    self.bdp() / 4 * START_QUARTERS
                };
                self.window = (self.window + acked).min(most.max(self.window));
                return;
            }
        }
        self.adjust_window(acked, limited);
    }

    /// Startup ends in the middle of a round. The rate of this round is that of the path; the rate
    /// of the last round is outdated.
    fn add_partial_round(&mut self, now: Instant) {
        let Some(round) = self.round else { return };
        let elapsed = now.saturating_duration_since(round.began);
        if elapsed >= self.min_rtt / 4 {
            self.rates
                .push_back(per_second(self.delivered - round.delivered, elapsed));
        }
    }

    fn end_round(&mut self, now: Instant, round: &Round) {
        let delivered = self.delivered - round.delivered;
        let rate = per_second(delivered, now.saturating_duration_since(round.began));
        // A round with too little data gives only a lower bound of the bandwidth.
        if !round.limited || rate > self.bandwidth() {
            while self.rates.len() >= ROUNDS {
                self.rates.pop_front();
            }
            self.rates.push_back(rate);
        }
        self.measured |= !round.limited;
        match &mut self.phase {
            Phase::Start {
                best,
                rounds_without_growth,
            } if !round.limited => {
                if rate > *best + *best / 4 {
                    (*best, *rounds_without_growth) = (rate, 0);
                } else {
                    *rounds_without_growth += 1;
                }
                if *rounds_without_growth >= FLAT_ROUNDS || round.lost > delivered / 8 {
                    self.phase = Phase::Cruise;
                }
            }
            Phase::Start { .. } => {}
            Phase::Cruise => {
                let quarters = |n: u64| self.min_rtt / 20 * (n * 5 + 7) as u32 + JITTER;
                // The queue is longer than that of this end: other senders keep a queue.
                let others_keep_queue =
                    round.min_rtt > quarters(self.gain_quarters.max(GAIN_QUARTERS));
                // The queue is shorter than that of this end: the path is not full, or the machines
                // at its ends are too busy to keep it full with a window that just fits.
                let no_queue = round.min_rtt < self.min_rtt + self.min_rtt / 12 + JITTER / 2;
                self.careful_rounds = if round.lost > delivered / 12 {
                    CAREFUL_ROUNDS
                } else {
                    self.careful_rounds.saturating_sub(1)
                };
                self.gain_quarters = if round.lost > delivered / 12 {
                    4
                } else if self.careful_rounds > 0 {
                    GAIN_QUARTERS_SHORT_QUEUE
                } else if no_queue {
                    GAIN_QUARTERS_MAX
                } else if others_keep_queue {
                    (self.gain_quarters + 1).clamp(GAIN_QUARTERS, GAIN_QUARTERS_MAX)
                } else if self.gain_is_for_empty_queue {
                    GAIN_QUARTERS
                } else {
                    self.gain_quarters.max(GAIN_QUARTERS)
                };
                self.gain_is_for_empty_queue = no_queue;
                let path_changed = others_keep_queue
                    && self.gain_quarters == GAIN_QUARTERS_MAX
                    && round.min_rtt > self.min_rtt * 5 / 2;
                if path_changed || now.saturating_duration_since(self.min_rtt_seen) > LEAST_FOR {
                    self.min_rtt = round.min_rtt;
                    self.phase = Phase::Drain {
                        rounds: DRAIN_ROUNDS,
                    };
                }
            }
            Phase::Drain { rounds } => {
                self.min_rtt = self.min_rtt.min(round.min_rtt);
                *rounds -= 1;
                if *rounds == 0 {
                    (self.min_rtt_seen, self.gain_quarters) = (now, GAIN_QUARTERS);
                    self.phase = Phase::Cruise;
                }
            }
        }
    }

    fn bandwidth(&self) -> u64 {
        self.rates.iter().copied().max().unwrap_or(0)
    }

    /// The estimated BDP: the bytes that the path holds without a queue.
    fn bdp(&self) -> u64 {
        let min_rtt = if self.min_rtt == Duration::MAX {
            0
        } else {
            self.min_rtt.as_nanos()
        };
        u64::try_from(u128::from(self.bandwidth()) * min_rtt / 1_000_000_000).unwrap_or(u64::MAX)
    }

    /// Adjusts the window to the BDP.
    fn adjust_window(&mut self, acked: u64, limited: bool) {
        let bdp = self.bdp();
        if bdp == 0 || !self.measured || matches!(self.phase, Phase::Start { .. }) {
            return;
        }
        let target = match self.phase {
            Phase::Drain { .. } => bdp / 2,
            _ => bdp / 4 * self.gain_quarters + 4 * self.mtu,
        };
        let target = target.max(self.min_window());
        if target <= self.window {
            self.window = target;
        } else if !limited {
            self.window = target.min(self.window + acked);
        }
    }

    fn min_window(&self) -> u64 {
        16 * self.mtu
    }

    fn lost(&mut self, now: Instant, bytes: u64, persistent: bool) {
        if let Some(round) = &mut self.round {
            round.lost += bytes;
        }
        if persistent {
            // Nothing arrived for a long time: discard the measurements.
            *self = Self {
                window: self.min_window(),
                ..Self::new(now, self.first_window, self.mtu as u16)
            };
        }
    }
}

fn per_second(bytes: u64, elapsed: Duration) -> u64 {
    u64::try_from(u128::from(bytes) * 1_000_000_000 / elapsed.as_nanos().max(1)).unwrap_or(u64::MAX)
}

impl Controller for Bbr {
    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        self.acked(now, sent, bytes, app_limited);
        self.smoothed = rtt.get();
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        _in_flight: u64,
        app_limited: bool,
        _largest_packet_num_acked: Option<u64>,
    ) {
        self.end_acks(now, app_limited, self.smoothed);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        _sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.lost(now, lost_bytes, is_persistent_congestion);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu.into();
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.first_window
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A path in virtual time, whose queue drops what does not fit, and a sender that behaves like
    /// quinn.
    struct Bench {
        rate: u64,
        trip: Duration,
        queue: u64,
        /// One packet in this number is lost.
        loss: u64,
        /// The round trip in the second half of the run.
        later_trip: Duration,
        /// The number of steps of 200 µs after which the sender processes received
        /// acknowledgements.
        stall: u64,
    }

    const PACKET: u64 = 1450;

    impl Bench {
        /// Sends for this long. Returns the used share of the bandwidth, and the share of packets
        /// that the queue dropped.
        fn run(&self, first_window: u64, time: Duration) -> (f64, f64) {
            let start = Instant::now();
            let mut bbr = Bbr::new(start, first_window, PACKET as u16);
            let mut smoothed = self.trip;
            // Time sent, time acknowledged (`None`: lost). In the order of sending.
            let mut flying: VecDeque<(Instant, Option<Instant>)> = VecDeque::new();
            let (mut in_flight, mut sent, mut dropped, mut arrived) = (0u64, 0u64, 0u64, 0u64);
            let mut free_at = start;
            let mut next_send = start;
            let mut now = start;
            let step = Duration::from_micros(200);
            let mut seed = 7u64;
            let mut steps = 0;
            while now < start + time {
                now += step;
                steps += 1;
                let mut acks = Vec::new();
                let mut lost = 0;
                while let Some(&(at, back)) = flying.front().filter(|_| steps % self.stall == 0) {
                    let gone = back.is_none()
                        && flying
                            .iter()
                            .skip(3)
                            .find_map(|f| f.1)
                            .is_some_and(|b| b <= now);
                    match back {
                        Some(back) if back <= now => acks.push(at),
                        None if gone => lost += PACKET,
                        _ => break,
                    }
                    in_flight -= PACKET;
                    flying.pop_front();
                }
                if lost > 0 {
                    bbr.lost(now, lost, false);
                }
                if !acks.is_empty() {
                    for at in &acks {
                        arrived += 1;
                        smoothed = smoothed * 7 / 8 + (now - *at) / 8;
                        bbr.acked(now, *at, PACKET, false);
                    }
                    bbr.end_acks(now, false, smoothed);
                }
                // quinn's pacer: 1.25 windows per round trip.
                while next_send <= now && in_flight + PACKET <= bbr.window {
                    next_send = next_send.max(now - step)
                        + smoothed.mul_f64(PACKET as f64 / (1.25 * bbr.window as f64));
                    sent += 1;
                    in_flight += PACKET;
                    seed = seed
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    free_at = free_at.max(now);
                    let waits = (free_at - now).as_secs_f64() * self.rate as f64;
                    let trip = if now - start > time / 2 {
                        self.later_trip
                    } else {
                        self.trip
                    };
                    let back = if waits > self.queue as f64 {
                        dropped += 1;
                        None
                    } else {
                        free_at += Duration::from_secs_f64(PACKET as f64 / self.rate as f64);
                        (self.loss == 0 || !(seed >> 33).is_multiple_of(self.loss))
                            .then_some(free_at + trip)
                    };
                    flying.push_back((now, back));
                }
            }
            (
                arrived as f64 * PACKET as f64 / (self.rate as f64 * time.as_secs_f64()),
                dropped as f64 / sent as f64,
            )
        }
    }

    const PATH: Bench = Bench {
        rate: 25_000_000,
        trip: Duration::from_millis(100),
        queue: 2_500_000,
        loss: 0,
        later_trip: Duration::from_millis(100),
        stall: 1,
    };

    #[test]
    fn a_long_path_is_full_and_its_queue_is_not() {
        for loss in [0, 1000, 100] {
            let (used, dropped) = Bench { loss, ..PATH }.run(1_250_000, Duration::from_secs(9));
            let delivers = if loss == 100 { 0.99 } else { 1.0 };
            assert!(
                used > 0.96 * delivers,
                "one in {loss} lost: {used:.3} of the bandwidth is used"
            );
            assert!(
                dropped < 0.01,
                "one in {loss} lost: {dropped:.3} dropped by the queue"
            );
        }
    }

    #[test]
    fn a_busy_machine_keeps_the_path_full() {
        for stall in [50, 150, 250] {
            let (used, dropped) = Bench { stall, ..PATH }.run(1_250_000, Duration::from_secs(9));
            assert!(
                used > 0.9 && dropped < 0.03,
                "a look each {} ms: {used:.3} used, {dropped:.3} dropped",
                stall / 5
            );
        }
    }

    #[test]
    fn a_bandwidth_far_from_the_estimate_is_found() {
        let (used, _) = Bench {
            rate: 250_000_000,
            queue: 25_000_000,
            ..PATH
        }
        .run(1_250_000, Duration::from_secs(9));
        assert!(used > 0.9, "a fast path: {used:.3}");
        let (used, dropped) = Bench {
            rate: 1_250_000,
            queue: 125_000,
            ..PATH
        }
        .run(1_250_000, Duration::from_secs(20));
        assert!(
            used > 0.9 && dropped < 0.1,
            "a slow path: {used:.3}, {dropped:.3} dropped"
        );
    }

    #[test]
    fn a_shallow_queue_and_a_longer_path_are_handled() {
        let (used, dropped) = Bench {
            queue: 250_000,
            ..PATH
        }
        .run(1_250_000, Duration::from_secs(20));
        assert!(
            used > 0.85 && dropped < 0.1,
            "a shallow queue: {used:.3}, {dropped:.3} dropped"
        );
        let (used, _) = Bench {
            later_trip: Duration::from_millis(250),
            ..PATH
        }
        .run(1_250_000, Duration::from_secs(60));
        assert!(used > 0.85, "a longer path: {used:.3}");
    }
}

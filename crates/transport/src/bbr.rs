//! The congestion control of long lines: a window of the measured bandwidth times the least round
//! trip, and a half more.
//!
//! It goes by the model of BBR (the line is what it delivers, whatever is lost on it) without
//! pacing gains, which quinn's pacer does not know: quinn's own BBR, whose window is two to three
//! times what the line holds, sent half of all packets into a full queue on a 200 Mbit/s, 100 ms
//! line. A window of 1.5 keeps the line full with half a round trip in its queue, also between
//! machines that are busy, and finds freed bandwidth by itself: a line without any queue gets a
//! window of 2 until it has one.
//!
//! All of it is arithmetic on the times and bytes that quinn reports; nothing is kept over
//! connections.

use std::any::Any;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use quinn::congestion::Controller;
use quinn_proto::RttEstimator;

/// The bandwidth is the best of so many round trips.
const ROUNDS: usize = 10;
/// The window is this times bandwidth times round trip, in quarters.
const GAIN_QUARTERS: u64 = 6;
/// And this, in quarters, where a queue turned out to be short.
const GAIN_QUARTERS_CAREFUL: u64 = 5;
/// It rises to this, in quarters, while the line has no queue at all and so may carry more, and
/// where others keep a queue: who does not hold his part of that gets nothing.
const GAIN_QUARTERS_MAX: u64 = 8;
/// At the start it is at most this, in quarters: a last doubling would fill the queue of most lines
/// to the brim, and more.
const START_QUARTERS: u64 = 7;
/// The least round trip is measured anew when it was not seen for this long.
const LEAST_FOR: Duration = Duration::from_secs(10);
/// Round trips with an emptied queue that it takes.
const DRAIN_ROUNDS: u8 = 2;
/// Round trips without more than the usual gain after one in twelve packets was lost: the queue is
/// short.
const CAREFUL_ROUNDS: u8 = 20;
/// Round trips without growth that end the start.
const FLAT_ROUNDS: u8 = 2;
/// What a busy machine may add to a round trip.
const JITTER: Duration = Duration::from_millis(4);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nearly doubling, until the bandwidth grows no more or the queue does.
    Start { best: u64, flat: u8 },
    /// Full.
    Cruise,
    /// Emptying the queue for so many more rounds, to see the bare round trip.
    Drain { rounds: u8 },
}

/// One round trip: it ends with the first acknowledgement of a packet that was sent after it began.
#[derive(Debug, Clone, Copy)]
struct Round {
    began: Instant,
    delivered: u64,
    lost: u64,
    limited: bool,
    least: Duration,
}

#[derive(Debug, Clone)]
pub(super) struct Bbr {
    phase: Phase,
    window: u64,
    first_window: u64,
    mtu: u64,
    gain_quarters: u64,
    /// Whether the gain is high because the line had no queue, and not because somebody else has
    /// one.
    gain_was_for_empty: bool,
    /// Rounds in which a queue that is too short for more is still remembered.
    careful: u8,
    /// Whether a round was measured in which there was enough to send: before that, the first
    /// window stands.
    measured: bool,
    delivered: u64,
    /// Bytes a second of the last rounds.
    rates: VecDeque<u64>,
    least: Duration,
    least_seen: Instant,
    round: Option<Round>,
    ended: bool,
    acked: u64,
    smoothed: Duration,
}

impl Bbr {
    pub(super) fn new(now: Instant, window: u64, mtu: u16) -> Self {
        Self {
            phase: Phase::Start { best: 0, flat: 0 },
            window,
            first_window: window,
            mtu: mtu.into(),
            gain_quarters: GAIN_QUARTERS,
            gain_was_for_empty: false,
            careful: 0,
            measured: false,
            delivered: 0,
            rates: VecDeque::with_capacity(ROUNDS),
            least: Duration::MAX,
            least_seen: now,
            round: None,
            ended: false,
            acked: 0,
            smoothed: Duration::ZERO,
        }
    }

    /// A packet that was sent at `sent` has arrived.
    fn acked(&mut self, now: Instant, sent: Instant, bytes: u64, limited: bool) {
        self.delivered += bytes;
        self.acked += bytes;
        let trip = now.saturating_duration_since(sent);
        if trip
            <= self
                .least
                .saturating_add(self.least.min(Duration::from_secs(1)) / 50)
        {
            self.least_seen = now;
            self.least = self.least.min(trip);
        }
        match &mut self.round {
            Some(round) => {
                round.least = round.least.min(trip);
                round.limited |= limited;
                self.ended |= sent >= round.began;
            }
            None => self.ended = true,
        }
    }

    /// All packets of one acknowledgement were told.
    fn end_acks(&mut self, now: Instant, limited: bool, smoothed: Duration) {
        let acked = std::mem::take(&mut self.acked);
        if std::mem::take(&mut self.ended) {
            let next = Round {
                began: now,
                delivered: self.delivered,
                lost: 0,
                limited,
                least: Duration::MAX,
            };
            if let Some(round) = self.round.replace(next) {
                self.end_round(now, &round);
            }
        }
        if let Phase::Start { .. } = self.phase {
            let queued = smoothed
                > self
                    .least
                    .saturating_add(self.least / 4)
                    .saturating_add(JITTER);
            if queued && self.measured && !limited {
                self.phase = Phase::Cruise;
                self.note_part_of_round(now);
            } else if !limited {
                let most = if !self.measured {
                    u64::MAX
                } else {
                    self.holds() / 4 * START_QUARTERS
                };
                self.window = (self.window + acked).min(most.max(self.window));
                return;
            }
        }
        self.fit(acked, limited);
    }

    /// The start ends in the middle of a round, and the line carries what this round shows and not
    /// what the last one did.
    fn note_part_of_round(&mut self, now: Instant) {
        let Some(round) = self.round else { return };
        let took = now.saturating_duration_since(round.began);
        if took >= self.least / 4 {
            self.rates
                .push_back(per_second(self.delivered - round.delivered, took));
        }
    }

    fn end_round(&mut self, now: Instant, round: &Round) {
        let delivered = self.delivered - round.delivered;
        let rate = per_second(delivered, now.saturating_duration_since(round.began));
        // A round in which there was too little to send says only what the line carries at least.
        if !round.limited || rate > self.bandwidth() {
            while self.rates.len() >= ROUNDS {
                self.rates.pop_front();
            }
            self.rates.push_back(rate);
        }
        self.measured |= !round.limited;
        match &mut self.phase {
            Phase::Start { best, flat } if !round.limited => {
                if rate > *best + *best / 4 {
                    (*best, *flat) = (rate, 0);
                } else {
                    *flat += 1;
                }
                if *flat >= FLAT_ROUNDS || round.lost > delivered / 8 {
                    self.phase = Phase::Cruise;
                }
            }
            Phase::Start { .. } => {}
            Phase::Cruise => {
                let quarters = |n: u64| self.least / 20 * (n * 5 + 7) as u32 + JITTER;
                // More queue than this end's own: somebody else's.
                let foreign = round.least > quarters(self.gain_quarters.max(GAIN_QUARTERS));
                // Not even the queue that this end should have there: the line is not full, or the
                // machines at its ends are too busy to keep it so with a window that just fits.
                let empty = round.least < self.least + self.least / 12 + JITTER / 2;
                self.careful = if round.lost > delivered / 12 {
                    CAREFUL_ROUNDS
                } else {
                    self.careful.saturating_sub(1)
                };
                self.gain_quarters = if round.lost > delivered / 12 {
                    4
                } else if self.careful > 0 {
                    GAIN_QUARTERS_CAREFUL
                } else if empty {
                    GAIN_QUARTERS_MAX
                } else if foreign {
                    (self.gain_quarters + 1).clamp(GAIN_QUARTERS, GAIN_QUARTERS_MAX)
                } else if self.gain_was_for_empty {
                    GAIN_QUARTERS
                } else {
                    self.gain_quarters.max(GAIN_QUARTERS)
                };
                self.gain_was_for_empty = empty;
                let moved = foreign
                    && self.gain_quarters == GAIN_QUARTERS_MAX
                    && round.least > self.least * 5 / 2;
                if moved || now.saturating_duration_since(self.least_seen) > LEAST_FOR {
                    self.least = round.least;
                    self.phase = Phase::Drain {
                        rounds: DRAIN_ROUNDS,
                    };
                }
            }
            Phase::Drain { rounds } => {
                self.least = self.least.min(round.least);
                *rounds -= 1;
                if *rounds == 0 {
                    (self.least_seen, self.gain_quarters) = (now, GAIN_QUARTERS);
                    self.phase = Phase::Cruise;
                }
            }
        }
    }

    fn bandwidth(&self) -> u64 {
        self.rates.iter().copied().max().unwrap_or(0)
    }

    /// Bytes that the line holds without a queue, as far as it is known.
    fn holds(&self) -> u64 {
        let least = if self.least == Duration::MAX {
            0
        } else {
            self.least.as_nanos()
        };
        u64::try_from(u128::from(self.bandwidth()) * least / 1_000_000_000).unwrap_or(u64::MAX)
    }

    /// Fits the window to what the line holds.
    fn fit(&mut self, acked: u64, limited: bool) {
        let holds = self.holds();
        if holds == 0 || !self.measured || matches!(self.phase, Phase::Start { .. }) {
            return;
        }
        let target = match self.phase {
            Phase::Drain { .. } => holds / 2,
            _ => holds / 4 * self.gain_quarters + 4 * self.mtu,
        };
        let target = target.max(self.least_window());
        if target <= self.window {
            self.window = target;
        } else if !limited {
            self.window = target.min(self.window + acked);
        }
    }

    fn least_window(&self) -> u64 {
        16 * self.mtu
    }

    fn lost(&mut self, now: Instant, bytes: u64, persistent: bool) {
        if let Some(round) = &mut self.round {
            round.lost += bytes;
        }
        if persistent {
            // Nothing at all arrived for long: what was known of the line is void.
            *self = Self {
                window: self.least_window(),
                ..Self::new(now, self.first_window, self.mtu as u16)
            };
        }
    }
}

fn per_second(bytes: u64, took: Duration) -> u64 {
    u64::try_from(u128::from(bytes) * 1_000_000_000 / took.as_nanos().max(1)).unwrap_or(u64::MAX)
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

    /// A line in virtual time, with a queue that drops what does not fit, and a sender as quinn is
    /// one.
    struct Bench {
        rate: u64,
        trip: Duration,
        queue: u64,
        /// One packet in so many is lost.
        loss: u64,
        /// The round trip is this from half the time on.
        later_trip: Duration,
        /// The sender looks at what came only once in so many steps of 200 µs.
        stall: u64,
    }

    const PACKET: u64 = 1450;

    impl Bench {
        /// Sends for this long; returns the share of the line that was used, and the share of
        /// packets that the queue dropped.
        fn run(&self, first_window: u64, time: Duration) -> (f64, f64) {
            let start = Instant::now();
            let mut bbr = Bbr::new(start, first_window, PACKET as u16);
            let mut smoothed = self.trip;
            // Sent at, acknowledged at; `None` is lost. In order of sending.
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
                // quinn's pacer: a quarter more than the window in a round trip.
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

    const LINE: Bench = Bench {
        rate: 25_000_000,
        trip: Duration::from_millis(100),
        queue: 2_500_000,
        loss: 0,
        later_trip: Duration::from_millis(100),
        stall: 1,
    };

    #[test]
    fn a_long_line_is_full_and_its_queue_is_not() {
        for loss in [0, 1000, 100] {
            let (used, dropped) = Bench { loss, ..LINE }.run(1_250_000, Duration::from_secs(9));
            let delivers = if loss == 100 { 0.99 } else { 1.0 };
            assert!(
                used > 0.96 * delivers,
                "one in {loss} lost: {used:.3} of the line is used"
            );
            assert!(
                dropped < 0.01,
                "one in {loss} lost: {dropped:.3} dropped by the queue"
            );
        }
    }

    #[test]
    fn a_busy_machine_keeps_the_line_full() {
        for stall in [50, 150, 250] {
            let (used, dropped) = Bench { stall, ..LINE }.run(1_250_000, Duration::from_secs(9));
            assert!(
                used > 0.9 && dropped < 0.03,
                "a look each {} ms: {used:.3} used, {dropped:.3} dropped",
                stall / 5
            );
        }
    }

    #[test]
    fn a_line_much_faster_or_slower_than_thought_is_found_out() {
        let (used, _) = Bench {
            rate: 250_000_000,
            queue: 25_000_000,
            ..LINE
        }
        .run(1_250_000, Duration::from_secs(9));
        assert!(used > 0.9, "a fast line: {used:.3}");
        let (used, dropped) = Bench {
            rate: 1_250_000,
            queue: 125_000,
            ..LINE
        }
        .run(1_250_000, Duration::from_secs(20));
        assert!(
            used > 0.9 && dropped < 0.1,
            "a slow line: {used:.3}, {dropped:.3} dropped"
        );
    }

    #[test]
    fn a_shallow_queue_and_a_path_that_becomes_longer_are_lived_with() {
        let (used, dropped) = Bench {
            queue: 250_000,
            ..LINE
        }
        .run(1_250_000, Duration::from_secs(20));
        assert!(
            used > 0.85 && dropped < 0.1,
            "a shallow queue: {used:.3}, {dropped:.3} dropped"
        );
        let (used, _) = Bench {
            later_trip: Duration::from_millis(250),
            ..LINE
        }
        .run(1_250_000, Duration::from_secs(60));
        assert!(used > 0.85, "a longer path: {used:.3}");
    }
}

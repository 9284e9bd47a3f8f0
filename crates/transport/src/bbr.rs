//! A BBR-style congestion control for connections with a long round trip: the window is the
//! measured bandwidth times the smallest round trip (BDP), times a gain, normally 1.5.
//!
//! It uses the model of BBR: the bandwidth is the best delivery rate of recent rounds, regardless
//! of loss. It differs from the published BBR as follows:
//! - It sets the window. It has no ProbeBW cycle: quinn's pacer sends at 1.25 windows per round
//!   trip. Below 5 Mbit/s it also sets a pace, for which quinn's bursts are too long (module `pace`).
//! - Startup begins with 10 to 32 packets and doubles the window per round. It ends when the
//!   bandwidth stops growing, when the round trip increases, or when the window reaches what the
//!   spacing of acknowledgements tells of the path (module `bursts`). Loss alone does not end it.
//! - The gain in normal operation begins at 1.125. It rises to 1.5, and to 2 while the path has no
//!   queue or while other senders keep one. It falls when packets are lost that a smaller window
//!   would not have lost (module `gain`).
//! - After an idle time, the first round is sent at the measured bandwidth, not faster. A new
//!   connection starts from half of the bandwidth that the last one measured (module `path`).
//! - Instead of ProbeRTT with 4 packets, it halves the window for two rounds when the smallest
//!   round trip was not seen for 10 s, or when the path seems to have changed.
//!
//! Reason: quinn's BBR has a window of two to three BDP. On a connection of 200 Mbit/s and 100 ms
//! it sent half of all packets into a full queue. A window of 1.5 BDP keeps the connection full
//! with half a round trip of queue, also between busy machines, and uses bandwidth that becomes
//! free.
//!
//! The module only computes with the times and bytes that quinn reports.

mod bursts;
mod gain;
mod round;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use quinn::congestion::Controller;
use quinn_proto::RttEstimator;

use super::limited::Limited;
use super::pace::Pace;
use super::path::{Measured, Path};
use bursts::{Bursts, bytes_in};
use gain::{Gain, Stretch, Verdict};
use round::{Round, Rounds};

/// The bandwidth is the best rate of this many rounds.
const ROUNDS: usize = 10;
/// The smallest round trip is measured again if it was not seen for this long.
const LEAST_FOR: Duration = Duration::from_secs(10);
/// The number of rounds with an empty queue for that measurement.
const DRAIN_ROUNDS: u8 = 2;
/// The number of rounds without growth that end startup.
const FLAT_ROUNDS: u8 = 2;
/// The number of rounds with an unchanged window after startup has found the bandwidth.
const SETTLE_ROUNDS: u8 = 2;
/// The delay that a busy machine may add to a round trip.
const JITTER: Duration = Duration::from_millis(4);
/// The delay that shows a queue during startup: an eighth of the round trip, but within these.
const QUEUE_MIN: Duration = JITTER;
const QUEUE_MAX: Duration = Duration::from_millis(16);
/// The round trip is compared after this part of the window.
const COMPARED_PART: u64 = 2;
/// An eighth of the gain makes a queue of an eighth of the round trip, but at most of this length.
const EIGHTH_MAX: Duration = Duration::from_micros(12_500);
/// Fewer lost packets of a round are an accident.
const LOST_PACKETS: u64 = 4;
/// A gain is judged after this many packets, the result of an experiment after the second number.
const JUDGED_PACKETS: u64 = 32;
const JUDGED_PACKETS_EXPERIMENT: u64 = 64;
/// A path that holds fewer packets is paced from the first one.
const RAMP_PACKETS: u64 = 60;
/// Startup more than doubles the window while bursts show room for this many times the window.
const MUCH_ROOM: u64 = 2;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Doubles the window per round, until the bandwidth stops growing or a queue builds up.
    Start {
        best: u64,
        rounds_without_growth: u8,
    },
    /// Measures the bandwidth of the window that startup has reached, for this many more rounds.
    Settle { rounds: u8 },
    /// The normal phase, at full bandwidth.
    Cruise,
    /// Empties the queue for this many more rounds, to measure the round trip without a queue.
    Drain { rounds: u8 },
}

#[derive(Debug, Clone)]
pub(super) struct Bbr {
    phase: Phase,
    window: u64,
    first_window: u64,
    mtu: u64,
    gain: Gain,
    bursts: Bursts,
    /// Whether a round with enough data was measured. Until then, the first window is used.
    measured: bool,
    /// Whether nothing is in flight, or was until a round trip ago.
    idle: bool,
    delivered: u64,
    /// The rates of the last rounds in bytes per second.
    rates: VecDeque<u64>,
    min_rtt: Duration,
    min_rtt_seen: Instant,
    round: Option<Round>,
    rounds: Rounds,
    ended: bool,
    acked: u64,
    smoothed: Duration,
    /// What is in flight, as of the last acknowledgement, and what was sent and lost since.
    in_flight: u64,
    pace: Pace,
    /// Tells the owner of the connection whether the path drops what is above a rate.
    limited: Limited,
    path: Path,
    /// What an earlier connection measured, until this one has tried it.
    recalled: Option<Measured>,
}

impl Bbr {
    /// The control of a connection over this path, whose round trip is `trip`.
    pub(super) fn new(
        now: Instant,
        trip: Duration,
        window: u64,
        mtu: u16,
        path: &Path,
        pace: &Pace,
        limited: &Limited,
    ) -> Self {
        let recalled = path.recall(now, trip);
        let half = recalled.map_or(0, |known| bytes_in(known.rate, known.trip.min(trip)) / 2);
        let fresh = Self::fresh(now, window, mtu);
        Self {
            window: fresh.window.max(half),
            recalled,
            path: path.clone(),
            pace: pace.clone(),
            limited: limited.clone(),
            ..fresh
        }
    }

    fn fresh(now: Instant, window: u64, mtu: u16) -> Self {
        Self {
            phase: Phase::Start {
                best: 0,
                rounds_without_growth: 0,
            },
            window: window.max(Gain::new().least_window(mtu.into())),
            first_window: window,
            mtu: mtu.into(),
            gain: Gain::new(),
            bursts: Bursts::default(),
            measured: false,
            idle: false,
            delivered: 0,
            rates: VecDeque::with_capacity(ROUNDS),
            min_rtt: Duration::MAX,
            min_rtt_seen: now,
            round: None,
            rounds: Rounds::default(),
            ended: false,
            acked: 0,
            smoothed: Duration::ZERO,
            in_flight: 0,
            pace: Pace::default(),
            limited: Limited::default(),
            path: Path::default(),
            recalled: None,
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
        if matches!(self.phase, Phase::Start { .. }) {
            self.bursts.acked(now, sent, bytes, self.mtu);
        }
        match &mut self.round {
            Some(round) => {
                round.min_rtt = round.min_rtt.min(trip);
                round.trips = round.trips.saturating_add(trip);
                round.packets += 1;
                round.limited |= limited;
                self.ended |= sent >= round.began;
            }
            None => self.ended = true,
        }
    }

    /// Called after all packets of one acknowledgement were processed.
    fn end_acks(&mut self, now: Instant, in_flight: u64, limited: bool) {
        let acked = std::mem::take(&mut self.acked);
        if std::mem::take(&mut self.ended) {
            let resumed = std::mem::take(&mut self.idle);
            let next = Round::new(now, self.delivered, limited, resumed);
            if let Some(round) = self.round.replace(next) {
                self.end_round(now, &round);
            }
        }
        if in_flight == 0 && limited {
            self.idle = true;
        }
        if let Phase::Start { .. } = self.phase {
            self.start(now, acked, limited);
        }
        self.adjust_window(acked, limited);
        self.in_flight = in_flight;
        self.set_pace(now);
    }

    /// Sets the pace, if the bandwidth is known.
    fn set_pace(&self, now: Instant) {
        let rate = match self.phase {
            Phase::Cruise | Phase::Drain { .. } if self.measured => {
                self.bandwidth() / 100 * self.gain.pace_percent()
            }
            // Startup finds the bandwidth with quinn's bursts.
            _ => self
                .recalled
                .filter(|known| known.is_full)
                .map_or(0, |known| known.rate),
        };
        self.pace.set(now, rate, self.mtu);
    }

    /// Grows the window, or ends startup.
    fn start(&mut self, now: Instant, acked: u64, limited: bool) {
        if limited {
            return;
        }
        if self.has_queue() || self.is_mostly_lost() {
            if self.measured {
                self.phase = Phase::Cruise;
                self.add_partial_round(now);
            }
            return;
        }
        let room = self.room();
        let most = room.map_or(u64::MAX, |room| {
            (room + 3 * self.mtu).max(self.gain.least_window(self.mtu))
        });
        let has_much_room = self
            .bursts
            .typical(self.min_rtt)
            .is_some_and(|room| room >= MUCH_ROOM * self.window);
        let step = if has_much_room { 3 * acked } else { acked };
        if self.window + step >= most {
            self.window = most;
            self.phase = Phase::Settle {
                rounds: SETTLE_ROUNDS,
            };
        } else {
            self.window += step;
        }
    }

    /// The bytes that the path holds without a queue, as far as that is known before it is full.
    fn room(&self) -> Option<u64> {
        let recalled = self.recalled.filter(|known| known.is_full);
        recalled
            .map(|known| bytes_in(known.rate, self.min_rtt))
            .or_else(|| self.bursts.most(self.min_rtt))
    }

    /// Whether all packets of this round waited in a queue, or the recent ones in a long queue.
    fn has_queue(&self) -> bool {
        let long = self.min_rtt.saturating_add(self.min_rtt / 4 + JITTER);
        if self.smoothed > long {
            return true;
        }
        let queue = (self.min_rtt / 8).clamp(QUEUE_MIN, QUEUE_MAX);
        self.round.is_some_and(|round| {
            let packets = self.window / self.mtu / COMPARED_PART;
            u64::from(round.packets) >= packets
                && round.min_rtt > self.min_rtt.saturating_add(queue)
        })
    }

    /// Whether more packets of this round were lost than arrived. No path loses as many at random.
    fn is_mostly_lost(&self) -> bool {
        self.round.is_some_and(|round| {
            round.lost > (self.delivered - round.delivered).max(LOST_PACKETS * self.mtu)
        })
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
        let elapsed = now.saturating_duration_since(round.began);
        let rate = per_second(delivered, elapsed);
        // A round with too little data, or with a window that is reduced on purpose, gives only a
        // lower bound of the bandwidth.
        let is_bound = round.limited || self.gain.is_experiment();
        if !is_bound || rate > self.bandwidth() {
            while self.rates.len() >= ROUNDS {
                self.rates.pop_front();
            }
            self.rates.push_back(rate);
        }
        self.measured |= !round.limited;
        if self.bandwidth() > 0 {
            self.path.remember(
                now,
                Measured {
                    rate: self.bandwidth(),
                    trip: self.min_rtt,
                    is_full: self.phase == Phase::Cruise,
                },
            );
        }
        match &mut self.phase {
            Phase::Start {
                best,
                rounds_without_growth,
            } if !round.limited => {
                if rate > *best + *best / 4 {
                    (*best, *rounds_without_growth) = (rate, 0);
                } else {
                    *rounds_without_growth += 1;
                    // The path drops what it does not deliver.
                    if round.lost > delivered / 8 {
                        *rounds_without_growth = FLAT_ROUNDS;
                    }
                }
                if *rounds_without_growth >= FLAT_ROUNDS {
                    self.phase = Phase::Cruise;
                }
            }
            Phase::Start { .. } => {}
            Phase::Settle { rounds } => {
                if !round.limited || delivered >= self.window / 5 * 4 {
                    *rounds -= 1;
                    if *rounds == 0 {
                        self.phase = Phase::Cruise;
                    }
                }
            }
            Phase::Cruise => {
                // A round with too little data tells only of its losses.
                let tells = if round.limited {
                    round.lost > LOST_PACKETS * self.mtu && !self.gain.is_experiment()
                } else {
                    !round.resumed
                };
                if round.resumed {
                    self.gain.resume();
                }
                if tells {
                    self.judge(now, round, delivered, elapsed);
                }
                let path_changed = self.gain.is_most()
                    && round.min_rtt > self.min_rtt * 5 / 2
                    && self.is_others_queue(round.min_rtt);
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
                    self.min_rtt_seen = now;
                    self.gain.restart();
                    self.rounds = Rounds::default();
                    self.phase = Phase::Cruise;
                }
            }
        }
    }

    /// Whether the queue is longer than that of this end.
    fn is_others_queue(&self, trip: Duration) -> bool {
        trip > self.min_rtt / 20 * 27 + self.eighth() * self.gain.queue_eighths() + JITTER
    }

    /// The queue that an eighth of the gain makes.
    fn eighth(&self) -> Duration {
        (self.min_rtt / 8).min(EIGHTH_MAX)
    }

    /// Adjusts the gain when enough packets were measured.
    fn judge(&mut self, now: Instant, round: &Round, delivered: u64, elapsed: Duration) {
        let all = &mut self.rounds;
        all.delivered += delivered;
        all.lost += round.lost;
        all.elapsed += elapsed;
        all.trips = all.trips.saturating_add(round.trips);
        all.packets += round.packets;
        all.min_rtt = Some(all.min_rtt.unwrap_or(Duration::MAX).min(round.min_rtt));
        let packets = if self.gain.is_experiment() {
            JUDGED_PACKETS_EXPERIMENT
        } else {
            JUDGED_PACKETS
        };
        if all.delivered + all.lost < packets * self.mtu {
            return;
        }
        let all = std::mem::take(&mut self.rounds);
        let queue = (all.trips / all.packets.max(1)).saturating_sub(self.min_rtt);
        let min_rtt = all.min_rtt.unwrap_or(self.min_rtt);
        let stretch = Stretch {
            rate: per_second(all.delivered, all.elapsed),
            lost: all.lost as f64 / (all.delivered + all.lost) as f64,
            packets: (all.delivered + all.lost) as f64 / self.mtu as f64,
            is_empty: queue < (self.min_rtt / 16).min(JITTER * 3 / 2) + JITTER / 2,
            has_room: min_rtt < self.min_rtt + self.min_rtt / 12 + JITTER / 2,
            others_queue: self.is_others_queue(min_rtt),
            window: self.window,
            bdp: self.bdp(),
            mtu: self.mtu,
        };
        match self.gain.adjust(&stretch) {
            Verdict::Nothing => {}
            Verdict::Bandwidth(rate) => {
                self.rates.clear();
                self.rates.push_back(rate);
            }
        }
        if self.gain.is_limited() {
            self.limited.note(now, self.bandwidth());
        }
    }

    fn bandwidth(&self) -> u64 {
        self.rates.iter().copied().max().unwrap_or(0)
    }

    /// The estimated BDP: the bytes that the path holds without a queue.
    fn bdp(&self) -> u64 {
        if self.min_rtt == Duration::MAX {
            return 0;
        }
        bytes_in(self.bandwidth(), self.min_rtt)
    }

    /// Adjusts the window to the BDP.
    fn adjust_window(&mut self, acked: u64, limited: bool) {
        let bdp = self.bdp();
        let may_adjust = matches!(self.phase, Phase::Cruise | Phase::Drain { .. });
        if bdp == 0 || !self.measured || !may_adjust {
            return;
        }
        let eighth = bytes_in(self.bandwidth(), self.eighth());
        let mut target = self.gain.window(bdp, eighth, self.mtu);
        if let Phase::Drain { .. } = self.phase {
            target = bdp / 2;
        } else if self.idle {
            target = target.min(self.resumed_window(bdp));
        }
        let target = target.max(self.gain.least_window(self.mtu));
        if target <= self.window {
            self.window = target;
        } else if !limited {
            // quinn sends up to ten packets at once: a slower growth does not double such a burst.
            self.window = target.min(self.window + acked.div_ceil(2));
        }
    }

    /// The window after an idle time, which quinn's pacer sends at the bandwidth of the path.
    fn resumed_window(&self, bdp: u64) -> u64 {
        (bdp / 5 * 4 + 3 * self.mtu).max(self.gain.least_window(self.mtu))
    }

    /// Whether so much less is in flight than the path holds that quinn's pacer, whose rate follows
    /// from the window, would be too slow with a window that is what is in flight.
    fn is_ramp(&self) -> bool {
        let bdp = self.bdp();
        bdp > RAMP_PACKETS * self.mtu && self.in_flight < bdp / 5 * 4
    }

    fn lost(&mut self, now: Instant, bytes: u64, persistent: bool) {
        self.in_flight = self.in_flight.saturating_sub(bytes);
        if let Some(round) = &mut self.round {
            round.lost += bytes;
        }
        if self.recalled.is_some() && self.is_mostly_lost() {
            // The path is not what it was.
            self.recalled = None;
            self.path.forget();
            self.window = (self.window / 2).min(self.first_window);
        }
        if !self.measured && self.is_mostly_lost() {
            self.window = self.gain.least_window(self.mtu);
        }
        if persistent {
            // Nothing arrived for a long time: discard the measurements.
            let fresh = Self::fresh(now, self.first_window, self.mtu as u16);
            self.path.forget();
            *self = Self {
                window: fresh.gain.least_window(self.mtu),
                path: self.path.clone(),
                pace: self.pace.clone(),
                limited: self.limited.clone(),
                in_flight: self.in_flight,
                ..fresh
            };
            self.set_pace(now);
        }
    }
}

fn per_second(bytes: u64, elapsed: Duration) -> u64 {
    u64::try_from(u128::from(bytes) * 1_000_000_000 / elapsed.as_nanos().max(1)).unwrap_or(u64::MAX)
}

impl Controller for Bbr {
    fn on_sent(&mut self, now: Instant, bytes: u64, _last_packet_number: u64) {
        self.in_flight += bytes;
        self.pace.sent(now, bytes);
    }

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
        in_flight: u64,
        app_limited: bool,
        _largest_packet_num_acked: Option<u64>,
    ) {
        self.end_acks(now, in_flight, app_limited);
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
        // Nothing would be sent with a window of less than a packet.
        self.window = self.window.max(self.gain.least_window(self.mtu));
    }

    fn window(&self) -> u64 {
        let window = match self.room() {
            Some(bdp) if self.idle => self.window.min(self.resumed_window(bdp)),
            _ => self.window,
        };
        match self.pace.allows() {
            // quinn sends while what is in flight is less than the window.
            Some(bytes) if !self.is_ramp() => {
                // quinn sends no acknowledgement either while other frames wait for the window.
                // Those of a receiver need less than a packet in flight.
                window.min((self.in_flight + bytes + 1).max(2 * self.mtu))
            }
            _ => window,
        }
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

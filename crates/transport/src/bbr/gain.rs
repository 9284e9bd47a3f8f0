//! How much larger than the path's bytes in flight the window is, and what a loss means.
//!
//! A loss has one of three reasons. A queue that is full: the window must become smaller. A
//! policer, or a queue of a few packets, which drops everything above its rate: the window must
//! not be larger than what is delivered. Or the path loses packets at random: a smaller window
//! only delivers less, and the window must be larger by what is lost. Where the round trip does
//! not show a queue, the reason is found by an experiment: the window is reduced for some rounds.
//! If less is delivered and the same part is lost, the loss is random.

/// The normal gain, in eighths.
const NORMAL: u64 = 12;
/// The first gain after startup.
const FIRST: u64 = 9;
/// The gain at which this end has no queue of its own.
const LEAST: u64 = 8;
/// The largest gain. It is used while the path has no queue, because more bandwidth may be
/// available, and while other senders keep a queue, because a sender with a smaller share of the
/// queue gets no bandwidth.
const MOST: u64 = 16;
/// The number of stretches without congestion after which a window that caused loss is tried again.
/// It halves each time when a larger window causes no loss, and doubles when it does.
const CLEAN_FIRST: u32 = 16;
const CLEAN_MOST: u32 = 64;
/// The number of stretches for which the result of an experiment is believed. It doubles when the
/// next one has the same result.
const BELIEVED: u32 = 16;
const BELIEVED_MOST: u32 = 320;
/// The pace in percent of the bandwidth: as quinn's pacer; where more caused loss; when more is
/// tried.
const PACE_PERCENT: u64 = 125;
const PACE_PERCENT_LIMITED: u64 = 101;
const PACE_PERCENT_PROBE: u64 = 112;
/// The first stretches still see the losses of startup.
const HOLD_AFTER_STARTUP: u8 = 2;
/// The window during an experiment, in percent.
const EXPERIMENT_PERCENT: u64 = 80;
/// The part of the packets, and their number, whose loss is an accident.
const ACCIDENT: f64 = 0.02;
const ACCIDENT_PACKETS: f64 = 2.5;
/// A larger random loss is examined again.
const DOUBTFUL: f64 = 0.04;
/// No larger loss counts as random.
const RANDOM_MAX: f64 = 0.3;
/// No path loses as much at random.
const LOST_MAX: f64 = 0.4;
/// One experiment may be wrong where many packets are lost at random; so many in a row are not.
const LIMITED: u32 = 2;
/// The smallest window, in packets. One packet less is in flight.
const PACKETS: u64 = 4;
const PACKETS_LEAST: u64 = 2;

/// What was measured over one or more round trips.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stretch {
    /// Bytes per second.
    pub(super) rate: u64,
    /// The lost part of the packets, and the number of packets.
    pub(super) lost: f64,
    pub(super) packets: f64,
    /// No packet waited in a queue, on average.
    pub(super) is_empty: bool,
    /// Some packets did not wait: the path is not full, or the machines at its ends are too busy to
    /// keep it full with a window that just fits.
    pub(super) has_room: bool,
    /// The queue is longer than that of this end.
    pub(super) others_queue: bool,
    /// The window, and the bytes that the path holds without a queue.
    pub(super) window: u64,
    pub(super) bdp: u64,
    pub(super) mtu: u64,
}

#[derive(Debug, Clone, Copy)]
struct Experiment {
    /// The stretch before.
    rate: u64,
    lost: f64,
    /// The next stretch still sees the losses of the larger window.
    settled: bool,
}

/// What a stretch tells about the measured bandwidth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Nothing,
    /// The bandwidth is this one.
    Bandwidth(u64),
}

#[derive(Debug, Clone)]
pub(super) struct Gain {
    eighths: u64,
    /// A larger window caused loss.
    limit: Option<u64>,
    /// The number of stretches without congestion, and after how many the limit is raised.
    clean: u32,
    clean_for: u32,
    /// The limit was raised.
    is_probe: bool,
    /// The gain is high because the path had no queue, not because of other senders.
    is_for_room: bool,
    /// So many more stretches see the losses of the window before.
    hold: u8,
    /// The part of the packets that is lost at random.
    random: f64,
    experiment: Option<Experiment>,
    believed: u32,
    believed_for: u32,
    packets: u64,
    /// So many experiments in a row found that the path drops what is above a rate, without a queue.
    limited: u32,
}

impl Gain {
    pub(super) fn new() -> Self {
        Self {
            eighths: FIRST,
            limit: None,
            clean: 0,
            clean_for: CLEAN_FIRST,
            is_probe: false,
            is_for_room: false,
            hold: HOLD_AFTER_STARTUP,
            random: 0.0,
            experiment: None,
            believed: 0,
            believed_for: BELIEVED,
            packets: PACKETS,
            limited: 0,
        }
    }

    /// The window for a path that holds `bdp` bytes without a queue; `eighth` is what an eighth of
    /// the gain adds.
    pub(super) fn window(&self, bdp: u64, eighth: u64, mtu: u64) -> u64 {
        let arrives = bdp + (self.eighths - LEAST) * eighth;
        // One packet that is sent, and two that wait for a delayed acknowledgement.
        let window = arrives as f64 / (1.0 - self.random) + (3 * mtu) as f64;
        let window = (window as u64).min(self.limit.unwrap_or(u64::MAX));
        if self.experiment.is_some() {
            window / 100 * EXPERIMENT_PERCENT
        } else {
            window
        }
    }

    /// The smallest window.
    pub(super) fn least_window(&self, mtu: u64) -> u64 {
        let less = u64::from(self.experiment.is_some());
        (self.packets - less).max(PACKETS_LEAST) * mtu
    }

    /// The pace, in percent of the bandwidth.
    pub(super) fn pace_percent(&self) -> u64 {
        let percent = if self.experiment.is_some() {
            EXPERIMENT_PERCENT
        } else if self.limit.is_none() {
            PACE_PERCENT
        } else if self.is_probe {
            PACE_PERCENT_PROBE
        } else {
            PACE_PERCENT_LIMITED
        };
        (percent as f64 / (1.0 - self.random)) as u64
    }

    pub(super) fn is_most(&self) -> bool {
        self.eighths == MOST
    }

    /// The part of the gain that makes a queue, in eighths, for comparing with a queue of other
    /// senders.
    pub(super) fn queue_eighths(&self) -> u32 {
        (self.eighths.max(NORMAL) - LEAST) as u32
    }

    /// A transfer begins after an idle time: the losses of the last one are over.
    pub(super) fn resume(&mut self) {
        self.hold = 0;
    }

    pub(super) fn is_experiment(&self) -> bool {
        self.experiment.is_some()
    }

    /// Whether the path drops what is above a rate although it has no queue: a policer does, and a
    /// queue of a few packets.
    pub(super) fn is_limited(&self) -> bool {
        self.limited >= LIMITED && (self.limit.is_some() || self.experiment.is_some())
    }

    /// The smallest round trip was measured again.
    pub(super) fn restart(&mut self) {
        self.eighths = self.eighths.min(NORMAL);
    }

    pub(super) fn adjust(&mut self, stretch: &Stretch) -> Verdict {
        if let Some(experiment) = &mut self.experiment {
            if !experiment.settled {
                experiment.settled = true;
                return Verdict::Nothing;
            }
            let before = *experiment;
            self.experiment = None;
            return self.conclude(&before, stretch);
        }
        if self.hold > 0 {
            self.hold -= 1;
            return Verdict::Nothing;
        }
        self.believed = self.believed.saturating_sub(1);
        let chance = 2.5 * (self.random * (1.0 - self.random) / stretch.packets).sqrt();
        let excess = stretch.lost > self.random + chance + ACCIDENT
            && stretch.lost * stretch.packets > ACCIDENT_PACKETS;
        let is_doubtful = self.random > DOUBTFUL && stretch.lost > self.random / 2.0;
        let shows_no_queue = stretch.is_empty
            || stretch.window <= stretch.bdp + 3 * stretch.mtu
            || self.is_least(stretch);
        if (excess || is_doubtful) && shows_no_queue && self.believed == 0 {
            self.experiment = Some(Experiment {
                rate: stretch.rate,
                lost: stretch.lost,
                settled: false,
            });
            return Verdict::Nothing;
        }
        if excess && !shows_no_queue {
            let step = if stretch.lost > self.random + 0.125 {
                2
            } else {
                1
            };
            self.eighths = self.eighths.saturating_sub(step).max(LEAST);
            self.reduce((stretch.window / 8 * (8 - step)).max(stretch.bdp + 3 * stretch.mtu));
            return Verdict::Nothing;
        }
        if stretch.is_empty || stretch.lost < self.random.max(ACCIDENT) {
            self.random = (3.0 * self.random + stretch.lost.min(RANDOM_MAX)) / 4.0;
        }
        self.clean += 1;
        self.is_probe = self.clean >= self.clean_for;
        if self.clean >= self.clean_for {
            self.clean = 0;
            self.clean_for = (self.clean_for / 2).max(1);
            self.limit = self
                .limit
                .map(|limit| limit + limit / 8 + stretch.mtu)
                .filter(|limit| *limit < 2 * stretch.bdp);
            self.packets = (self.packets + 1).min(PACKETS);
        }
        if stretch.others_queue {
            self.eighths = (self.eighths + 2).clamp(NORMAL, MOST);
        } else if stretch.has_room || self.eighths < NORMAL {
            // Whether that is too much is seen after a round trip.
            self.hold = u8::from(!stretch.is_empty);
            let step = if self.eighths < NORMAL { 1 } else { 2 };
            self.eighths = (self.eighths + step).min(MOST);
        } else if self.is_for_room {
            self.eighths = NORMAL;
        }
        self.is_for_room = stretch.has_room;
        Verdict::Nothing
    }

    fn conclude(&mut self, before: &Experiment, stretch: &Stretch) -> Verdict {
        let chance = 2.0 * (before.lost / stretch.packets).sqrt();
        let is_less_lost = stretch.lost < before.lost * 0.6 && before.lost - stretch.lost > chance;
        let is_congestion =
            before.lost > LOST_MAX || is_less_lost || stretch.rate > before.rate / 100 * 93;
        self.limited = if is_congestion { self.limited + 1 } else { 0 };
        if is_congestion {
            if self.is_least(stretch) {
                self.packets = (self.packets - 1).max(PACKETS_LEAST);
            }
            (self.eighths, self.random, self.believed_for) = (LEAST, 0.0, BELIEVED);
            self.reduce(stretch.bdp + 3 * stretch.mtu);
            Verdict::Bandwidth(stretch.rate.max(before.rate))
        } else {
            self.random = ((before.lost + stretch.lost) / 2.0).min(RANDOM_MAX);
            (self.limit, self.believed, self.hold) = (None, self.believed_for, 1);
            self.believed_for = (self.believed_for * 2).min(BELIEVED_MOST);
            self.eighths = self.eighths.max(NORMAL);
            Verdict::Bandwidth(before.rate)
        }
    }

    fn reduce(&mut self, limit: u64) {
        self.limit = Some(limit);
        (self.clean, self.hold, self.is_probe) = (0, 1, false);
        self.clean_for = (self.clean_for * 2).clamp(CLEAN_FIRST, CLEAN_MOST);
    }

    /// Whether the window is as small as it may be.
    fn is_least(&self, stretch: &Stretch) -> bool {
        stretch.window <= self.packets * stretch.mtu
    }
}

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
/// The number of stretches for which the result of an experiment is believed.
const BELIEVED: u32 = 40;
/// The first stretches still see the losses of startup.
const HOLD_AFTER_STARTUP: u8 = 2;
/// The window during an experiment, in percent.
const EXPERIMENT_PERCENT: u64 = 80;
/// The part of the packets, and their number, whose loss is an accident.
const ACCIDENT: f64 = 0.02;
const ACCIDENT_PACKETS: u64 = 2;
/// The smallest window, in packets. One packet less is in flight.
const PACKETS: u64 = 4;
const PACKETS_LEAST: u64 = 2;

/// What was measured over one or more round trips.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stretch {
    /// Bytes per second.
    pub(super) rate: u64,
    /// The lost part of the packets, and their number.
    pub(super) lost: f64,
    pub(super) lost_packets: u64,
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
    /// The gain is high because the path had no queue, not because of other senders.
    is_for_room: bool,
    /// So many more stretches see the losses of the window before.
    hold: u8,
    /// The part of the packets that is lost at random.
    random: f64,
    experiment: Option<Experiment>,
    believed: u32,
    packets: u64,
}

impl Gain {
    pub(super) fn new() -> Self {
        Self {
            eighths: FIRST,
            limit: None,
            clean: 0,
            clean_for: CLEAN_FIRST,
            is_for_room: false,
            hold: HOLD_AFTER_STARTUP,
            random: 0.0,
            experiment: None,
            believed: 0,
            packets: PACKETS,
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
        let excess =
            stretch.lost > 2.0 * self.random + ACCIDENT && stretch.lost_packets > ACCIDENT_PACKETS;
        let shows_no_queue = stretch.is_empty
            || stretch.window <= stretch.bdp + 3 * stretch.mtu
            || self.is_least(stretch);
        if excess && shows_no_queue && self.believed == 0 {
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
            self.reduce(stretch.window / 8 * (8 - step));
            return Verdict::Nothing;
        }
        if stretch.is_empty || stretch.lost < self.random {
            self.random = (3.0 * self.random + stretch.lost.min(0.5)) / 4.0;
        }
        self.clean += 1;
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
        let is_congestion =
            stretch.lost < before.lost * 0.6 || stretch.rate > before.rate / 100 * 93;
        if is_congestion {
            if self.is_least(stretch) {
                self.packets = (self.packets - 1).max(PACKETS_LEAST);
            }
            (self.eighths, self.random) = (LEAST, 0.0);
            self.reduce(stretch.bdp + 3 * stretch.mtu);
            Verdict::Bandwidth(stretch.rate.max(before.rate))
        } else {
            self.random = ((before.lost + stretch.lost) / 2.0).min(0.5);
            (self.limit, self.believed, self.hold) = (None, BELIEVED, 1);
            self.eighths = self.eighths.max(NORMAL);
            Verdict::Bandwidth(before.rate)
        }
    }

    fn reduce(&mut self, limit: u64) {
        self.limit = Some(limit);
        (self.clean, self.hold) = (0, 1);
        self.clean_for = (self.clean_for * 2).clamp(CLEAN_FIRST, CLEAN_MOST);
    }

    /// Whether the window is as small as it may be.
    fn is_least(&self, stretch: &Stretch) -> bool {
        stretch.window <= self.packets * stretch.mtu
    }
}

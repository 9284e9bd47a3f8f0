//! Chooses the congestion control of a QUIC connection.
//!
//! BBR (module `bbr`) uses the full bandwidth of a connection with a long round trip even under
//! loss, where CUBIC stalls. CUBIC is faster on a loopback or within a building. quinn requires the
//! choice when it creates a connection, before a round trip was measured and before the configured
//! setting is known. Therefore [`Fitting`] starts as CUBIC and chooses at the first measured round
//! trip. It changes back to CUBIC if a shorter round trip shows that a busy machine delayed the
//! first measurement. In memory only.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, CubicConfig};
use quinn_proto::RttEstimator;

use super::bbr::Bbr;
use super::limited::Limited;
use super::pace::Pace;
use super::path::Path;
use crate::Congestion;

/// The round trip that quinn assumes before it has measured one. An estimate of exactly this value
/// is not a measurement.
pub(super) const UNKNOWN_RTT: Duration = Duration::from_millis(333);
/// The shortest round trip of a connection that counts as long.
pub(super) const LONG_RTT: Duration = Duration::from_millis(5);
/// The first window of a long connection is this rate times the round trip, within the bounds
/// below: 4 Mbit/s.
const FIRST_RATE_BYTES_PER_SECOND: u64 = 4_000_000 / 8;
/// The smallest first window of a long connection: 10 packets, as RFC 9002 recommends.
const FIRST_WINDOW_MIN: u64 = 10 * 1200;
/// The largest first window of a long connection: 32 packets, paced over a round trip.
const FIRST_WINDOW_MAX: u64 = 32 * 1200;
/// The first window of a short connection, which slow start doubles immediately.
const SHORT_WINDOW: u64 = 128 << 10;

/// The configured congestion control of a connection, and the pace that it sets. The configuration
/// can change while the connection is open. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Choice {
    configured: Arc<AtomicU8>,
    pace: Pace,
    limited: Limited,
}

const AUTO: u8 = 0;
const BBR: u8 = 1;
const CUBIC: u8 = 2;

impl Choice {
    pub(super) fn new(congestion: Congestion) -> Self {
        let choice = Self {
            configured: Arc::default(),
            pace: Pace::default(),
            limited: Limited::default(),
        };
        choice.set(congestion);
        choice
    }

    pub(super) fn set(&self, congestion: Congestion) {
        let value = match congestion {
            Congestion::Auto => AUTO,
            Congestion::Bbr => BBR,
            Congestion::Cubic => CUBIC,
        };
        self.configured.store(value, Ordering::Relaxed);
    }

    /// The pace of the connection, which its owner must keep.
    pub(super) fn pace(&self) -> &Pace {
        &self.pace
    }

    /// The rate above which the path drops what this end sends, in bytes per second, if it was found.
    pub(super) fn limited(&self, now: Instant) -> Option<u64> {
        self.limited.get(now)
    }

    #[cfg(any(test, feature = "testing"))]
    pub(super) fn get(&self) -> Congestion {
        match self.configured.load(Ordering::Relaxed) {
            BBR => Congestion::Bbr,
            CUBIC => Congestion::Cubic,
            _ => Congestion::Auto,
        }
    }

    /// Whether a connection with this round trip counts as long. With `auto`, a connection that was
    /// found to be short stays short.
    fn is_long(&self, rtt: Duration, before: Chosen) -> bool {
        match self.configured.load(Ordering::Relaxed) {
            BBR => true,
            CUBIC => false,
            _ => rtt >= LONG_RTT && before != Chosen::Short,
        }
    }
}

/// The factory for one connection over this path.
pub(super) fn factory(choice: &Choice, path: &Path) -> Arc<dyn ControllerFactory + Send + Sync> {
    Arc::new(FittingFactory {
        choice: choice.clone(),
        path: path.clone(),
    })
}

fn cubic(window: u64) -> CubicConfig {
    let mut config = CubicConfig::default();
    config.initial_window(window);
    config
}

fn first_window(rtt: Duration) -> u64 {
    let bytes = u128::from(FIRST_RATE_BYTES_PER_SECOND) * rtt.as_micros() / 1_000_000;
    u64::try_from(bytes)
        .unwrap_or(u64::MAX)
        .clamp(FIRST_WINDOW_MIN, FIRST_WINDOW_MAX)
}

struct FittingFactory {
    choice: Choice,
    path: Path,
}

impl ControllerFactory for FittingFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Fitting::new(
            self.choice.clone(),
            self.path.clone(),
            now,
            current_mtu,
        ))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chosen {
    Nothing,
    Long,
    Short,
}

/// Delegates to the controller that fits the connection.
struct Fitting {
    choice: Choice,
    path: Path,
    inner: Box<dyn Controller>,
    chosen: Chosen,
    mtu: u16,
}

impl Fitting {
    fn new(choice: Choice, path: Path, now: Instant, mtu: u16) -> Self {
        let inner = Arc::new(CubicConfig::default()).build(now, mtu);
        Self {
            choice,
            path,
            inner,
            chosen: Chosen::Nothing,
            mtu,
        }
    }

    fn choose(&mut self, now: Instant, rtt: Duration) {
        match (self.chosen, self.choice.is_long(rtt, self.chosen)) {
            (Chosen::Long, true) | (Chosen::Short, false) => {}
            (_, true) => {
                self.inner = Box::new(Bbr::new(
                    now,
                    rtt,
                    first_window(rtt),
                    self.mtu,
                    &self.path,
                    self.choice.pace(),
                    &self.choice.limited,
                ));
                self.chosen = Chosen::Long;
            }
            (_, false) => {
                let window = self.inner.window().max(SHORT_WINDOW);
                self.choice.pace().set(now, 0, self.mtu.into());
                self.choice.limited.clear();
                self.inner = Arc::new(cubic(window)).build(now, self.mtu);
                self.chosen = Chosen::Short;
            }
        }
    }
}

impl Controller for Fitting {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.inner.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        // The smallest round trip only decreases, so with `auto` the choice changes at most once
        // and only to CUBIC.
        if rtt.min() != UNKNOWN_RTT || rtt.get() != UNKNOWN_RTT {
            self.choose(now, rtt.min());
        }
        self.inner.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        largest_packet_num_acked: Option<u64>,
    ) {
        self.inner
            .on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.inner
            .on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu;
        self.inner.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.inner.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.inner.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self {
            choice: self.choice.clone(),
            path: self.path.clone(),
            inner: self.inner.clone_box(),
            chosen: self.chosen,
            mtu: self.mtu,
        })
    }

    fn initial_window(&self) -> u64 {
        self.inner.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fitting(congestion: Congestion) -> Fitting {
        let choice = Choice::new(congestion);
        Fitting::new(choice, Path::default(), Instant::now(), 1200)
    }

    fn chosen_after(rtts: &[u64]) -> (Chosen, u64) {
        let mut fitting = fitting(Congestion::Auto);
        for rtt in rtts {
            fitting.choose(Instant::now(), Duration::from_millis(*rtt));
        }
        (fitting.chosen, fitting.window())
    }

    #[test]
    fn a_setting_overrides_the_round_trip_and_may_arrive_late() {
        let (now, short, long) = (
            Instant::now(),
            Duration::from_millis(1),
            Duration::from_millis(100),
        );
        let mut set = fitting(Congestion::Cubic);
        set.choose(now, long);
        assert_eq!(set.chosen, Chosen::Short);
        set.choice.set(Congestion::Bbr);
        set.choose(now, short);
        assert_eq!(set.chosen, Chosen::Long);
    }

    #[test]
    fn the_round_trip_decides() {
        assert_eq!(chosen_after(&[1]), (Chosen::Short, SHORT_WINDOW));
        assert_eq!(chosen_after(&[50]), (Chosen::Long, 25_000));
        assert_eq!(chosen_after(&[10]), (Chosen::Long, FIRST_WINDOW_MIN));
        assert_eq!(chosen_after(&[5000]), (Chosen::Long, FIRST_WINDOW_MAX));
    }

    #[test]
    fn a_delayed_first_measurement_is_corrected() {
        assert_eq!(chosen_after(&[60, 30, 2]), (Chosen::Short, SHORT_WINDOW));
        assert_eq!(chosen_after(&[1, 60]).0, Chosen::Short);
    }

    #[test]
    fn a_copy_for_a_new_path_keeps_the_choice() {
        let mut first = fitting(Congestion::Auto);
        first.choose(Instant::now(), Duration::from_millis(50));
        let copy = first.clone_box().into_any().downcast::<Fitting>().unwrap();
        assert_eq!((copy.chosen, copy.window()), (Chosen::Long, 25_000));
    }
}

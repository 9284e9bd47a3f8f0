//! What was measured on the paths to other machines, for the next connection to the same address.
//!
//! A connection that knows nothing of its path starts slowly. One to an address where a rate was
//! measured within the last hour, with about the same round trip, starts from half of that rate, as
//! the IETF's "careful resume" does. In memory only.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A measurement is used for this long.
const AGE_MAX: Duration = Duration::from_secs(3600);
/// The number of addresses that are remembered.
const PATHS_MAX: usize = 4096;
/// The round trip may differ by this much: a handshake over a slow link takes longer.
const TRIP_SLACK: Duration = Duration::from_millis(20);

/// The rate of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Measured {
    /// Bytes per second.
    pub(super) rate: u64,
    /// The smallest round trip.
    pub(super) trip: Duration,
    /// Whether the path carries no more, or only no more was sent.
    pub(super) is_full: bool,
}

/// The path to one address. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Path(Arc<Mutex<Option<(Measured, Instant)>>>);

impl Path {
    /// Remembers a measurement. One that only shows a lower bound does not replace a higher rate.
    pub(super) fn remember(&self, now: Instant, measured: Measured) {
        let mut known = self.0.lock();
        let is_news = known.is_none_or(|(before, at)| {
            measured.is_full || measured.rate > before.rate || is_old(now, at)
        });
        if is_news {
            *known = Some((measured, now));
        }
    }

    /// What is known, if it is not too old and this round trip fits it.
    pub(super) fn recall(&self, now: Instant, trip: Duration) -> Option<Measured> {
        let (measured, at) = (*self.0.lock())?;
        let fits = trip + TRIP_SLACK >= measured.trip && trip <= measured.trip * 2 + TRIP_SLACK;
        (fits && !is_old(now, at)).then_some(measured)
    }

    /// Discards what is known.
    pub(super) fn forget(&self) {
        *self.0.lock() = None;
    }
}

fn is_old(now: Instant, at: Instant) -> bool {
    now.saturating_duration_since(at) > AGE_MAX
}

/// The paths from this machine.
static PATHS: LazyLock<Paths> = LazyLock::new(Paths::default);

/// The path to an address, as it is remembered by this process.
pub(super) fn to(address: IpAddr) -> Path {
    PATHS.to(address)
}

#[derive(Debug, Default)]
struct Paths(Mutex<HashMap<IpAddr, Path>>);

impl Paths {
    fn to(&self, address: IpAddr) -> Path {
        let mut paths = self.0.lock();
        if let Some(path) = paths.get(&address) {
            return path.clone();
        }
        if paths.len() >= PATHS_MAX {
            let now = Instant::now();
            paths.retain(|_, path| {
                Arc::strong_count(&path.0) > 1
                    || path.0.lock().is_some_and(|(_, at)| !is_old(now, at))
            });
        }
        let path = Path::default();
        if paths.len() < PATHS_MAX {
            paths.insert(address, path.clone());
        }
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRIP: Duration = Duration::from_millis(100);

    fn measured(rate: u64, is_full: bool) -> Measured {
        Measured {
            rate,
            trip: TRIP,
            is_full,
        }
    }

    #[test]
    fn a_measurement_is_used_for_an_hour_on_a_path_of_the_same_length() {
        let (path, now) = (Path::default(), Instant::now());
        assert_eq!(path.recall(now, TRIP), None);
        path.remember(now, measured(1000, true));
        let later = now + Duration::from_secs(3599);
        assert_eq!(path.recall(later, TRIP), Some(measured(1000, true)));
        assert_eq!(path.recall(later, TRIP / 2), None);
        assert_eq!(path.recall(later, TRIP * 3), None);
        assert_eq!(path.recall(later + Duration::from_secs(2), TRIP), None);
    }

    #[test]
    fn a_lower_bound_does_not_replace_a_higher_rate() {
        let (path, now) = (Path::default(), Instant::now());
        path.remember(now, measured(1000, true));
        path.remember(now, measured(500, false));
        assert_eq!(path.recall(now, TRIP), Some(measured(1000, true)));
        path.remember(now, measured(500, true));
        assert_eq!(path.recall(now, TRIP), Some(measured(500, true)));
        path.remember(now, measured(600, false));
        assert_eq!(path.recall(now, TRIP), Some(measured(600, false)));
        path.forget();
        assert_eq!(path.recall(now, TRIP), None);
    }

    #[test]
    fn the_number_of_addresses_is_bounded() {
        let paths = Paths::default();
        let address = |n: u32| IpAddr::from(n.to_be_bytes());
        let held = paths.to(address(0));
        held.remember(Instant::now(), measured(1000, true));
        for n in 1..2 * PATHS_MAX as u32 {
            paths.to(address(n));
            assert!(paths.0.lock().len() <= PATHS_MAX);
        }
        let again = paths.to(address(0)).recall(Instant::now(), TRIP);
        assert_eq!(again, Some(measured(1000, true)));
    }
}

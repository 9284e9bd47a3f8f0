//! The rate at which requests with an invalid token are answered: for all together, and for each
//! token whose id they name. Never by address: behind a proxy all clients have one.
//!
//! A valid token is never counted, so a flood of invalid ones delays no valid caller. Beyond the
//! rate, the answer is that there were too many.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Answers per second, and at once.
const ALL: (f64, f64) = (50.0, 200.0);
const OF_ONE: (f64, f64) = (1.0, 10.0);
/// Tokens whose rate is remembered. Only tokens that exist are.
const REMEMBERED_MAX: usize = 1024;

/// The rates of invalid tokens.
#[derive(Default)]
pub(super) struct Refusals(Mutex<Buckets>);

#[derive(Default)]
struct Buckets {
    all: Option<Bucket>,
    each: HashMap<String, Bucket>,
    total: u64,
}

#[derive(Clone, Copy)]
struct Bucket {
    since: Instant,
    left: f64,
}

impl Bucket {
    fn new(now: Instant, (_, burst): (f64, f64)) -> Self {
        Self {
            since: now,
            left: burst,
        }
    }

    fn earned(&self, now: Instant, (rate, burst): (f64, f64)) -> f64 {
        let earned = now.duration_since(self.since).as_secs_f64() * rate;
        (self.left + earned).min(burst)
    }

    /// Takes one, if there is one.
    fn take(&mut self, now: Instant, limit: (f64, f64)) -> bool {
        let left = self.earned(now, limit);
        let is_free = left >= 1.0;
        (self.since, self.left) = (now, if is_free { left - 1.0 } else { left });
        is_free
    }
}

impl Refusals {
    /// Counts an invalid token; `id` if it names one that exists. Returns after how long the next
    /// one is answered, if there were too many.
    pub(super) fn count(&self, id: Option<&str>) -> Option<Duration> {
        self.count_at(id, Instant::now())
    }

    fn count_at(&self, id: Option<&str>, now: Instant) -> Option<Duration> {
        let mut buckets = self.0.lock();
        buckets.total += 1;
        let all = buckets.all.get_or_insert_with(|| Bucket::new(now, ALL));
        if !all.take(now, ALL) {
            return Some(Duration::from_secs(1));
        }
        let id = id?;
        if buckets.each.len() >= REMEMBERED_MAX {
            buckets
                .each
                .retain(|_, bucket| bucket.earned(now, OF_ONE) < OF_ONE.1);
        }
        if buckets.each.len() >= REMEMBERED_MAX && !buckets.each.contains_key(id) {
            return None;
        }
        let one = buckets.each.entry(id.to_owned());
        let is_free = one
            .or_insert_with(|| Bucket::new(now, OF_ONE))
            .take(now, OF_ONE);
        (!is_free).then_some(Duration::from_secs(1))
    }

    /// How many were counted since the daemon started.
    pub(super) fn total(&self) -> u64 {
        self.0.lock().total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_tokens_have_a_rate_together_and_for_each_id() {
        let (refusals, now) = (Refusals::default(), Instant::now());
        for n in 0..10 {
            assert_eq!(refusals.count_at(Some("a"), now), None, "{n}");
        }
        assert!(refusals.count_at(Some("a"), now).is_some());
        assert_eq!(
            refusals.count_at(Some("b"), now),
            None,
            "another id has its own rate"
        );
        let later = now + Duration::from_secs(3);
        let answered = (0..10)
            .filter(|_| refusals.count_at(Some("a"), later).is_none())
            .count();
        assert_eq!(answered, 3, "one a second");
        let answered = (0..1000)
            .filter(|_| refusals.count_at(None, later).is_none())
            .count();
        assert!((180..=200).contains(&answered), "{answered}");
        assert!(refusals.count_at(None, later).is_some());
        assert_eq!(refusals.total(), 10 + 1 + 1 + 10 + 1000 + 1);
        // Ids that exist are few; a map of them is bounded all the same.
        let mut at = later;
        for n in 0..3 * REMEMBERED_MAX {
            at += Duration::from_millis(100);
            refusals.count_at(Some(&n.to_string()), at);
        }
        assert!(refusals.0.lock().each.len() <= REMEMBERED_MAX);
    }
}

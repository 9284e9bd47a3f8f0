//! Answers that are believed for a moment: of what is asked at each request, and seldom has another
//! answer.
//!
//! The hub keeps in it who may read what and which sites hold it, the origin what lies here. In
//! memory only; whoever shares one puts it behind a lock.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

use crate::limits::LATELY_ANSWERS_MAX;

/// Answers by what was asked.
pub struct ExpiringCache<K, V> {
    /// Each with the time from which it is believed no more.
    answers: HashMap<K, (Instant, V)>,
}

impl<K, V> Default for ExpiringCache<K, V> {
    fn default() -> Self {
        Self {
            answers: HashMap::new(),
        }
    }
}

impl<K: Clone + Eq + Hash, V> ExpiringCache<K, V> {
    /// The answer, if there is one that is still believed.
    pub fn get(&self, asked: &K) -> Option<&V> {
        self.get_at(Instant::now(), asked)
    }

    /// Keeps an answer, to be believed for so long. Those that are believed no more go, and if
    /// there are too many still, the one that would go next.
    pub fn put(&mut self, asked: K, answer: V, believed_for: Duration) {
        self.put_at(Instant::now(), asked, answer, believed_for);
    }

    /// Believes no answer to this any more.
    pub fn forget(&mut self, asked: &K) {
        self.answers.remove(asked);
    }

    fn get_at(&self, now: Instant, asked: &K) -> Option<&V> {
        self.answers
            .get(asked)
            .filter(|(until, _)| now < *until)
            .map(|(_, answer)| answer)
    }

    fn put_at(&mut self, now: Instant, asked: K, answer: V, believed_for: Duration) {
        self.answers.retain(|_, (until, _)| now < *until);
        if self.answers.len() >= LATELY_ANSWERS_MAX {
            let next = self
                .answers
                .iter()
                .min_by_key(|(_, (until, _))| *until)
                .map(|(asked, _)| asked.clone());
            if let Some(asked) = next {
                self.answers.remove(&asked);
            }
        }
        self.answers.insert(asked, (now + believed_for, answer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOMENT: Duration = Duration::from_secs(1);

    #[test]
    fn an_answer_is_believed_for_a_moment_and_then_dropped() {
        let (mut lately, now) = (ExpiringCache::default(), Instant::now());
        lately.put_at(now, "a", 1, MOMENT);
        lately.put_at(now, "b", 2, MOMENT * 3);
        let just_before = now + MOMENT - Duration::from_nanos(1);
        assert_eq!(
            (
                lately.get_at(just_before, &"a"),
                lately.get_at(just_before, &"c")
            ),
            (Some(&1), None)
        );
        assert_eq!(
            (
                lately.get_at(now + MOMENT, &"a"),
                lately.get_at(now + MOMENT, &"b")
            ),
            (None, Some(&2))
        );
        // A new answer takes the place of the old one, and its time.
        lately.put_at(now + MOMENT, "b", 3, MOMENT);
        assert_eq!(lately.get_at(now + MOMENT, &"b"), Some(&3));
        assert_eq!(lately.get_at(now + MOMENT * 2, &"b"), None);
        assert_eq!(lately.answers.len(), 1, "what was believed no more is gone");
    }

    #[test]
    fn of_too_many_the_one_that_would_go_next_goes() {
        let (mut lately, now) = (ExpiringCache::default(), Instant::now());
        lately.put_at(now, usize::MAX, (), MOMENT);
        for asked in 0..LATELY_ANSWERS_MAX {
            lately.put_at(now, asked, (), MOMENT * 2);
        }
        assert_eq!(lately.answers.len(), LATELY_ANSWERS_MAX);
        assert_eq!(
            (lately.get_at(now, &usize::MAX), lately.get_at(now, &0)),
            (None, Some(&()))
        );
    }
}

//! A small in-memory cache whose entries expire. It holds answers that are asked for at each
//! request and seldom change.
//!
//! The hub uses it for access decisions and for the sites that hold an artifact. The site that
//! published an artifact uses it for what it holds. In memory only. A shared cache needs a lock
//! around it.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

use crate::limits::LATELY_ANSWERS_MAX;

/// A cache of answers by question. Each entry has its own expiry time.
pub struct ExpiringCache<K, V> {
    /// Each answer with its expiry time.
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
    /// Returns the answer to this question if there is one that has not expired.
    pub fn get(&self, question: &K) -> Option<&V> {
        self.get_at(Instant::now(), question)
    }

    /// Stores an answer that expires after `valid_for`. Removes expired answers. If the cache is
    /// full, it also removes the answer that would expire first.
    pub fn put(&mut self, question: K, answer: V, valid_for: Duration) {
        self.put_at(Instant::now(), question, answer, valid_for);
    }

    /// Removes the answer to this question.
    pub fn forget(&mut self, question: &K) {
        self.answers.remove(question);
    }

    fn get_at(&self, now: Instant, question: &K) -> Option<&V> {
        self.answers
            .get(question)
            .filter(|(expires_at, _)| now < *expires_at)
            .map(|(_, answer)| answer)
    }

    fn put_at(&mut self, now: Instant, question: K, answer: V, valid_for: Duration) {
        self.answers.retain(|_, (expires_at, _)| now < *expires_at);
        if self.answers.len() >= LATELY_ANSWERS_MAX {
            let next = self
                .answers
                .iter()
                .min_by_key(|(_, (expires_at, _))| *expires_at)
                .map(|(question, _)| question.clone());
            if let Some(question) = next {
                self.answers.remove(&question);
            }
        }
        self.answers.insert(question, (now + valid_for, answer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALID_FOR: Duration = Duration::from_secs(1);

    #[test]
    fn an_answer_expires() {
        let (mut lately, now) = (ExpiringCache::default(), Instant::now());
        lately.put_at(now, "a", 1, VALID_FOR);
        lately.put_at(now, "b", 2, VALID_FOR * 3);
        let just_before = now + VALID_FOR - Duration::from_nanos(1);
        assert_eq!(
            (
                lately.get_at(just_before, &"a"),
                lately.get_at(just_before, &"c")
            ),
            (Some(&1), None)
        );
        assert_eq!(
            (
                lately.get_at(now + VALID_FOR, &"a"),
                lately.get_at(now + VALID_FOR, &"b")
            ),
            (None, Some(&2))
        );
        // A new answer replaces the old answer and its expiry time.
        lately.put_at(now + VALID_FOR, "b", 3, VALID_FOR);
        assert_eq!(lately.get_at(now + VALID_FOR, &"b"), Some(&3));
        assert_eq!(lately.get_at(now + VALID_FOR * 2, &"b"), None);
        assert_eq!(lately.answers.len(), 1, "expired answers are removed");
    }

    #[test]
    fn a_full_cache_removes_the_answer_that_expires_first() {
        let (mut lately, now) = (ExpiringCache::default(), Instant::now());
        lately.put_at(now, usize::MAX, (), VALID_FOR);
        for question in 0..LATELY_ANSWERS_MAX {
            lately.put_at(now, question, (), VALID_FOR * 2);
        }
        assert_eq!(lately.answers.len(), LATELY_ANSWERS_MAX);
        assert_eq!(
            (lately.get_at(now, &usize::MAX), lately.get_at(now, &0)),
            (None, Some(&()))
        );
    }
}

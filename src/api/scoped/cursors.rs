//! The cursors of tokens with a scope.
//!
//! The number of an event counts all events of the daemon, so it says how much happens outside the
//! scope. A token with a scope gets numbers of its own instead: each answer takes the next one. They
//! are in memory: after a restart a reader begins again, as after a restore of the catalogue.

use std::collections::{HashMap, VecDeque};

use base::clock::now_ms;
use base::fault::Fault;

/// Numbers of one token that can be continued from: the newest ones.
const NUMBERS_MAX: usize = 4096;
/// Tokens with numbers; those of the token that has used its own longest ago are removed first.
const TOKENS_MAX: usize = 256;
/// A new row of numbers begins at the time, so many for each millisecond: a number from before a
/// restart is never one of the new ones. The numbers stay below 2^53, which JSON can hold.
const NUMBERS_PER_MS: u64 = 1024;

/// Which list a number continues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum List {
    Transfers,
    Events,
}

/// The cursors of all tokens.
#[derive(Default)]
pub(super) struct Cursors {
    tokens: HashMap<String, Numbers>,
    uses: u64,
}

struct Numbers {
    next: u64,
    used: u64,
    known: VecDeque<Number>,
}

struct Number {
    number: u64,
    transfers: u64,
    events: u64,
}

impl Number {
    fn of(&mut self, list: List) -> &mut u64 {
        match list {
            List::Transfers => &mut self.transfers,
            List::Events => &mut self.events,
        }
    }
}

impl Cursors {
    fn numbers(&mut self, token: &str) -> &mut Numbers {
        if self.tokens.len() >= TOKENS_MAX && !self.tokens.contains_key(token) {
            let oldest = self.tokens.iter().min_by_key(|(_, numbers)| numbers.used);
            if let Some(oldest) = oldest.map(|(token, _)| token.clone()) {
                self.tokens.remove(&oldest);
            }
        }
        self.uses += 1;
        let begin = || Numbers {
            next: now_ms().unsigned_abs().saturating_mul(NUMBERS_PER_MS),
            used: 0,
            known: VecDeque::new(),
        };
        let numbers = self.tokens.entry(token.to_owned()).or_insert_with(begin);
        numbers.used = self.uses;
        numbers
    }

    /// A new number for a cursor of the daemon.
    pub(super) fn give(&mut self, token: &str, cursor: u64) -> u64 {
        let numbers = self.numbers(token);
        numbers.next += 1;
        if numbers.known.len() >= NUMBERS_MAX {
            numbers.known.pop_front();
        }
        numbers.known.push_back(Number {
            number: numbers.next,
            transfers: cursor,
            events: cursor,
        });
        numbers.next
    }

    /// The cursor of the daemon behind a number. 0 is the beginning.
    pub(super) fn find(&mut self, token: &str, list: List, number: u64) -> Result<u64, Fault> {
        if number == 0 {
            return Ok(0);
        }
        let known = &mut self.numbers(token).known;
        match known.binary_search_by_key(&number, |known| known.number) {
            Ok(at) => Ok(known.get_mut(at).map_or(0, |known| *known.of(list))),
            Err(_) => Err(begin_again()),
        }
    }

    /// Nothing visible happened up to this cursor: the number continues from there.
    pub(super) fn move_to(&mut self, token: &str, list: List, number: u64, cursor: u64) {
        let known = &mut self.numbers(token).known;
        if let Ok(at) = known.binary_search_by_key(&number, |known| known.number)
            && let Some(known) = known.get_mut(at)
        {
            let own = known.of(list);
            *own = cursor.max(*own);
        }
    }
}

/// The fault for a number that cannot be continued from. It says nothing about other numbers.
pub(super) fn begin_again() -> Fault {
    Fault::conflict(
        "this cursor is too old, of another token, or from before the daemon was restarted",
    )
    .with_next("read the complete list of transfers, then continue from the cursor of that answer")
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::fault::Code;

    #[test]
    fn numbers_increase_with_the_answers_and_not_with_the_events() {
        let mut cursors = Cursors::default();
        let first = cursors.give("a", 1000);
        let second = cursors.give("a", 99_000);
        assert_eq!(second, first + 1);
        assert!(second < 1 << 53);
        let mut find = |list, number| cursors.find("a", list, number);
        assert_eq!(find(List::Events, first).unwrap(), 1000);
        assert_eq!(find(List::Events, second).unwrap(), 99_000);
        assert_eq!(find(List::Events, 0).unwrap(), 0);
        for wrong in [1, 1000, second + 1, u64::MAX] {
            assert_eq!(
                find(List::Transfers, wrong).unwrap_err().code,
                Code::Conflict
            );
        }
        cursors.move_to("a", List::Events, first, 2000);
        cursors.move_to("a", List::Events, first, 1500);
        assert_eq!(cursors.find("a", List::Events, first).unwrap(), 2000);
        assert_eq!(cursors.find("a", List::Transfers, first).unwrap(), 1000);
        assert!(
            cursors.find("b", List::Events, first).is_err(),
            "a number is of one token"
        );
    }

    #[test]
    fn the_memory_of_numbers_is_bounded() {
        let mut cursors = Cursors::default();
        let first = cursors.give("a", 1);
        for n in 0..NUMBERS_MAX {
            cursors.give("a", n as u64);
        }
        assert!(cursors.find("a", List::Events, first).is_err());
        assert!(cursors.find("a", List::Events, first + 1).is_ok());
        for n in 0..2 * TOKENS_MAX {
            cursors.give(&n.to_string(), 1);
        }
        assert!(cursors.tokens.len() <= TOKENS_MAX);
    }
}

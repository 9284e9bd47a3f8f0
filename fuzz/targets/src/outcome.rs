//! What an input led to, as far as the messages of the parser tell: inputs that lead to something
//! new are kept and changed further.
//!
//! This takes the place of measured coverage, which stable Rust does not offer.

use std::cell::Cell;
use std::hash::{DefaultHasher, Hash, Hasher};

thread_local! {
    static SEEN: Cell<u64> = const { Cell::new(0) };
}

/// Notes what happened: the words of a message count, what it quotes and its numbers do not.
pub(crate) fn note(what: &str) {
    let mut hasher = DefaultHasher::new();
    SEEN.get().hash(&mut hasher);
    words(what).for_each(|word| word.hash(&mut hasher));
    SEEN.set(hasher.finish());
}

/// Notes whether a parser took its input, and returns what it made of it.
pub(crate) fn taken<T, E: std::fmt::Display>(result: Result<T, E>) -> Option<T> {
    match result {
        Ok(value) => {
            note("taken");
            Some(value)
        }
        Err(why) => {
            note(&why.to_string());
            None
        }
    }
}

/// What was noted since the last call.
pub(crate) fn take() -> u64 {
    SEEN.replace(0)
}

fn words(message: &str) -> impl Iterator<Item = &str> {
    let outside_quotes = message.split('"').step_by(2);
    outside_quotes
        .flat_map(|part| part.split(|c: char| !c.is_ascii_alphanumeric()))
        .filter(|word| {
            !word.is_empty()
                && word.bytes().all(|byte| byte.is_ascii_alphabetic())
                && word.len() < 20
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(message: &str) -> u64 {
        note(message);
        take()
    }

    #[test]
    fn numbers_and_quotes_make_no_difference() {
        assert_eq!(of("a mode is 777, over 7777"), of("a mode is 4, over 9"));
        assert_eq!(
            of("the entry \"a\" is wrong"),
            of("the entry \"other\" is wrong")
        );
        assert_ne!(of("it ends in a number"), of("it ends in a record"));
    }
}

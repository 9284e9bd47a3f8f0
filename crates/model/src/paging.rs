//! Lists cut by bytes: what is sent as one message or answer stays within what its receiver accepts.

use std::io;

use serde::Serialize;

/// Counts what is written and keeps nothing.
#[derive(Default)]
struct Counter(usize);

impl io::Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The bytes of a value as JSON.
pub fn json_bytes<T: Serialize + ?Sized>(value: &T) -> usize {
    let mut counter = Counter::default();
    // What cannot be written as JSON fails where it is sent.
    let _ = serde_json::to_writer(&mut counter, value);
    counter.0
}

/// Room for rows that are made one after the other.
#[derive(Debug)]
pub struct Budget {
    left: usize,
    empty: bool,
}

impl Budget {
    /// Room for so many bytes of JSON.
    pub fn new(max: usize) -> Self {
        Self { left: max, empty: true }
    }

    /// Whether there is room for one more; the first always has it.
    pub fn takes<T: Serialize>(&mut self, row: &T) -> bool {
        let bytes = json_bytes(row) + 1;
        let takes = self.empty || bytes <= self.left;
        (self.left, self.empty) = (self.left.saturating_sub(bytes), false);
        takes
    }
}

/// How many of these rows, from the first, have together no more than `max` bytes as a JSON list; at least one.
pub fn fitting<T: Serialize>(rows: &[T], max: usize) -> usize {
    let mut total = 2;
    for (n, row) in rows.iter().enumerate() {
        total += json_bytes(row) + 1;
        if total > max {
            return n.max(1);
        }
    }
    rows.len()
}

/// The rows in as many lists as they need, each of at most `max` bytes as JSON. A row that is larger has a list of its own.
pub fn pages<T: Serialize>(mut rows: Vec<T>, max: usize) -> impl Iterator<Item = Vec<T>> {
    std::iter::from_fn(move || {
        if rows.is_empty() {
            return None;
        }
        let rest = rows.split_off(fitting(&rows, max));
        Some(std::mem::replace(&mut rows, rest))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_keep_their_size_and_lose_nothing() {
        let rows: Vec<String> = (0..100).map(|n| "x".repeat(n % 17)).collect();
        let all: Vec<Vec<String>> = pages(rows.clone(), 40).collect();
        assert!(all.iter().all(|page| json_bytes(page) <= 40), "{all:?}");
        assert_eq!(all.concat(), rows);
        assert!(all.len() > 10);
        assert_eq!(pages(vec!["y".repeat(99), "z".into()], 40).count(), 2, "one that is too large goes alone");
        assert_eq!(pages(Vec::<u8>::new(), 40).count(), 0);
        let mut budget = Budget::new(8);
        assert_eq!(["0123456789", ""].map(|row| budget.takes(&row)), [true, false]);
        let mut budget = Budget::new(8);
        assert_eq!(["ab", "", ""].map(|row| budget.takes(&row)), [true, true, false]);
        assert_eq!(json_bytes(&["a\n"]), serde_json::to_string(&["a\n"]).unwrap().len());
    }
}

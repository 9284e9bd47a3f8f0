//! Lists split by bytes: a message or answer stays within the limit of its receiver.

use std::io;

use serde::Serialize;

/// Counts the written bytes and discards them.
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
    // A value that is not valid as JSON fails when it is sent.
    let _ = serde_json::to_writer(&mut counter, value);
    counter.0
}

/// The limits of one page of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Rows.
    pub rows: u32,
    /// Bytes of JSON; a single row may exceed them.
    pub bytes: usize,
}

impl Room {
    /// The number of rows for a query: one more than the limit, to know whether more rows follow.
    pub fn rows_asked(self) -> i64 {
        i64::from(self.rows) + 1
    }
}

/// A page of a list, and the start of the next one.
#[derive(Debug)]
pub struct Page<T> {
    /// The rows.
    pub rows: Vec<T>,
    /// The key of the next page; `None`: this is the last page.
    pub next: Option<String>,
    /// Whether a row that changed while the list was read may be on several pages. The reader
    /// keeps the first one.
    pub repeats: bool,
}

impl<T> Page<T> {
    /// A last page.
    pub fn whole(rows: Vec<T>) -> Self {
        Self {
            rows,
            next: None,
            repeats: false,
        }
    }
}

/// Fills a page row by row, so that only the page is in memory.
#[derive(Debug)]
pub struct Pager<T> {
    rows: Vec<T>,
    rows_max: usize,
    budget: Budget,
    last: Option<String>,
    /// Rows that were offered, those included that had no room or were skipped.
    read: usize,
    is_cut: bool,
}

impl<T: Serialize> Pager<T> {
    /// An empty page with these limits.
    pub fn new(room: Room) -> Self {
        let rows_max = usize::try_from(room.rows).unwrap_or(usize::MAX);
        Self {
            rows: Vec::new(),
            rows_max,
            budget: Budget::new(room.bytes),
            last: None,
            read: 0,
            is_cut: false,
        }
    }

    /// Adds a row, and the key of the row after it. `false`: the row does not fit, and the page
    /// ends before it.
    pub fn put(&mut self, row: T, key: impl Into<String>) -> bool {
        self.read += 1;
        self.is_cut = self.rows.len() >= self.rows_max || !self.budget.takes(&row);
        if !self.is_cut {
            self.rows.push(row);
            self.last = Some(key.into());
        }
        !self.is_cut
    }

    /// Skips a row that cannot be shown. The list continues after its key, if it has one. Always
    /// `true`: a skipped row takes no room.
    pub fn skip(&mut self, key: impl Into<String>) -> bool {
        self.read += 1;
        let key = key.into();
        if !key.is_empty() {
            self.last = Some(key);
        }
        true
    }

    /// The page. It is followed by another if a row had no room, or if as many rows were read as
    /// [`Room::rows_asked`] says and some of them were skipped.
    pub fn page(self) -> Page<T> {
        let is_cut = self.is_cut || self.read > self.rows_max;
        Page {
            rows: self.rows,
            next: self.last.filter(|_| is_cut),
            repeats: false,
        }
    }
}

/// A byte limit for rows that are created one after another.
#[derive(Debug)]
pub struct Budget {
    left: usize,
    empty: bool,
}

impl Budget {
    /// A limit of so many bytes of JSON.
    pub fn new(max: usize) -> Self {
        Self {
            left: max,
            empty: true,
        }
    }

    /// Whether one more row fits; the first row always fits.
    pub fn takes<T: Serialize>(&mut self, row: &T) -> bool {
        let bytes = json_bytes(row) + 1;
        let takes = self.empty || bytes <= self.left;
        (self.left, self.empty) = (self.left.saturating_sub(bytes), false);
        takes
    }
}

/// How many of these rows, from the first, fit in `max` bytes as a JSON list; at least one.
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

/// Splits the rows into lists of at most `max` bytes as JSON. A larger row gets its own list.
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
        assert_eq!(
            pages(vec!["y".repeat(99), "z".into()], 40).count(),
            2,
            "one that is too large goes alone"
        );
        assert_eq!(pages(Vec::<u8>::new(), 40).count(), 0);
        let mut pager = Pager::new(Room { rows: 3, bytes: 11 });
        assert_eq!(
            ["abcd", "e", "fg"].map(|row| pager.put(row, row)),
            [true, true, false],
            "the third is beyond the bytes"
        );
        let page = pager.page();
        assert_eq!(
            (page.rows, page.next.as_deref()),
            (vec!["abcd", "e"], Some("e"))
        );
        let mut pager = Pager::new(Room { rows: 1, bytes: 2 });
        assert_eq!(
            ["much too long", ""].map(|row| pager.put(row, row)),
            [true, false],
            "one row always has room"
        );
        let mut pager = Pager::new(Room {
            rows: 2,
            bytes: 100,
        });
        assert_eq!(["a", "b"].map(|row| pager.put(row, row)), [true, true]);
        assert_eq!(pager.page().next, None, "nothing follows what is whole");
        let mut pager = Pager::new(Room {
            rows: 2,
            bytes: 100,
        });
        assert!(pager.put("a", "a") && pager.skip("b") && pager.skip(""));
        let page = pager.page();
        assert_eq!(
            (page.rows, page.next.as_deref()),
            (vec!["a"], Some("b")),
            "as many rows were read as were asked for"
        );
        let mut pager = Pager::new(Room {
            rows: 3,
            bytes: 100,
        });
        assert!(pager.put("a", "a") && pager.skip("b"));
        assert_eq!(pager.page().next, None, "nothing follows a skipped row");
        let mut budget = Budget::new(8);
        assert_eq!(
            ["0123456789", ""].map(|row| budget.takes(&row)),
            [true, false]
        );
        let mut budget = Budget::new(8);
        assert_eq!(
            ["ab", "", ""].map(|row| budget.takes(&row)),
            [true, true, false]
        );
        assert_eq!(
            json_bytes(&["a\n"]),
            serde_json::to_string(&["a\n"]).unwrap().len()
        );
    }
}

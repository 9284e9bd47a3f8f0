//! Compares exported rows with the stored canonical files, line by line. Only `verify` uses it.

use std::path::{Path, PathBuf};

use super::canonical::{Lines, Table};
use super::engine::Rows;
use base::limits::OFFENDERS_LISTED_MAX;

const EXCERPT_CHARS: usize = 160;

/// Receives the rows in canonical order and collects the differences. Rows are matched by their
/// number, so that one missing row is reported as one difference.
pub(super) struct Compare {
    dir: PathBuf,
    found: Vec<String>,
    omitted: u64,
    /// The index in [`Table::ALL`] of the file that is being compared.
    at: usize,
    /// `None` at the end of the file or after a read error.
    lines: Option<Lines>,
    /// The number of the next line of `lines`.
    next: u64,
    /// The file could not be read, which is reported once and not for every row.
    unreadable: bool,
}

impl Compare {
    pub(super) fn new(dir: &Path) -> Self {
        let mut compare = Self {
            dir: dir.into(),
            found: Vec::new(),
            omitted: 0,
            at: 0,
            lines: None,
            next: 0,
            unreadable: false,
        };
        compare.open();
        compare
    }

    fn open(&mut self) {
        self.next = 0;
        self.unreadable = false;
        self.lines = match Lines::open(&self.dir, Table::ALL[self.at]) {
            Ok(lines) => Some(lines),
            Err(fault) => {
                self.unreadable = true;
                self.report(format!("the stored canonical file cannot be read: {fault}"));
                None
            }
        };
    }

    fn report(&mut self, line: String) {
        if self.found.len() < OFFENDERS_LISTED_MAX {
            self.found.push(line);
        } else {
            self.omitted += 1;
        }
    }

    /// The next stored line without its line end; `None` at the end of the file.
    fn next_stored(&mut self) -> Option<String> {
        let lines = self.lines.as_mut()?;
        match lines.next() {
            Ok(Some(line)) => {
                self.next += 1;
                return Some(line.into());
            }
            Ok(None) => {}
            Err(fault) => {
                self.unreadable = true;
                self.report(format!("the stored canonical file cannot be read: {fault}"));
            }
        }
        self.lines = None;
        None
    }

    /// Compares one batch.
    pub(super) fn rows(&mut self, rows: &Rows) {
        while Table::ALL[self.at] < rows.table {
            self.end_file();
        }
        for (number, line) in rows.iter() {
            self.row(number, line);
        }
    }

    fn row(&mut self, number: u64, line: &[u8]) {
        let file = Table::ALL[self.at].file();
        if self.unreadable {
            return;
        }
        if number < self.next {
            return self.report(format!(
                "{file} line {}: the database contains this row twice",
                number + 1
            ));
        }
        while self.next < number {
            if self.next_stored().is_none() {
                return self.report(format!(
                    "{file} line {}: the database contains a row that was never published",
                    number + 1
                ));
            }
            self.report(format!(
                "{file} line {}: the row is missing from the database",
                self.next
            ));
        }
        match self.next_stored() {
            Some(stored) if stored.as_bytes() == line => {}
            Some(next_stored) => {
                let (database, published) =
                    difference(&String::from_utf8_lossy(line), &next_stored);
                self.report(format!(
                    "{file} line {}: the database contains {database}, the published row is {published}",
                    number + 1
                ));
            }
            None => self.report(format!(
                "{file} line {}: the database contains a row that was never published",
                number + 1
            )),
        }
    }

    fn end_file(&mut self) {
        while self.next_stored().is_some() {
            self.report(format!(
                "{} line {}: the row is missing from the database",
                Table::ALL[self.at].file(),
                self.next
            ));
        }
        if self.at + 1 < Table::ALL.len() {
            self.at += 1;
            self.open();
        }
    }

    /// The differences, one line each; a last line counts those that were omitted.
    pub(super) fn finish(mut self) -> Vec<String> {
        while self.at + 1 < Table::ALL.len() {
            self.end_file();
        }
        self.end_file();
        if self.omitted > 0 {
            self.found
                .push(format!("and {} more different rows", self.omitted));
        }
        self.found
    }
}

/// The parts of two lines around the first difference.
fn difference(a: &str, b: &str) -> (String, String) {
    let same = a.chars().zip(b.chars()).take_while(|(a, b)| a == b).count();
    let from = same.saturating_sub(EXCERPT_CHARS / 2);
    let cut = |s: &str| {
        let part: String = s
            .trim_end()
            .chars()
            .skip(from)
            .take(EXCERPT_CHARS)
            .collect();
        if from > 0 { format!("…{part}") } else { part }
    };
    (cut(a), cut(b))
}

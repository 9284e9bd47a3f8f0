//! Compares exported rows with the kept canonical files, line by line; used by `verify` alone.

use std::path::{Path, PathBuf};

use super::canonical::{Lines, Table};
use super::engine::Rows;
use base::limits::OFFENDERS_LISTED_MAX;

const EXCERPT_CHARS: usize = 160;

/// Takes the rows in canonical order and collects what differs. Rows are matched by their number,
/// so that one missing row is reported as one.
pub(super) struct Compare {
    dir: PathBuf,
    found: Vec<String>,
    more: u64,
    /// The file that is being compared: its place in [`Table::ALL`].
    at: usize,
    /// `None` once it has ended or could not be read.
    lines: Option<Lines>,
    /// The number of the line that `lines` gives next.
    next: u64,
    /// The file could not be read, which is said once and not for every row.
    unreadable: bool,
}

impl Compare {
    pub(super) fn new(dir: &Path) -> Self {
        let mut compare = Self {
            dir: dir.into(),
            found: Vec::new(),
            more: 0,
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
                self.report(format!("the kept canonical file cannot be read: {fault}"));
                None
            }
        };
    }

    fn report(&mut self, line: String) {
        if self.found.len() < OFFENDERS_LISTED_MAX {
            self.found.push(line);
        } else {
            self.more += 1;
        }
    }

    /// The next kept line without its end; `None` at the end of the file.
    fn kept(&mut self) -> Option<String> {
        let lines = self.lines.as_mut()?;
        match lines.next() {
            Ok(Some(line)) => {
                self.next += 1;
                return Some(line.into());
            }
            Ok(None) => {}
            Err(fault) => {
                self.unreadable = true;
                self.report(format!("the kept canonical file cannot be read: {fault}"));
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
                "{file} line {}: the database holds this row twice",
                number + 1
            ));
        }
        while self.next < number {
            if self.kept().is_none() {
                return self.report(format!(
                    "{file} line {}: the database holds a row that was never published",
                    number + 1
                ));
            }
            self.report(format!(
                "{file} line {}: the row is missing in the database",
                self.next
            ));
        }
        match self.kept() {
            Some(kept) if kept.as_bytes() == line => {}
            Some(kept) => {
                let (database, published) = difference(&String::from_utf8_lossy(line), &kept);
                self.report(format!(
                    "{file} line {}: the database says {database}, published was {published}",
                    number + 1
                ));
            }
            None => self.report(format!(
                "{file} line {}: the database holds a row that was never published",
                number + 1
            )),
        }
    }

    fn end_file(&mut self) {
        while self.kept().is_some() {
            self.report(format!(
                "{} line {}: the row is missing in the database",
                Table::ALL[self.at].file(),
                self.next
            ));
        }
        if self.at + 1 < Table::ALL.len() {
            self.at += 1;
            self.open();
        }
    }

    /// What differs, one line each; a last line counts what was left out.
    pub(super) fn finish(mut self) -> Vec<String> {
        while self.at + 1 < Table::ALL.len() {
            self.end_file();
        }
        self.end_file();
        if self.more > 0 {
            self.found
                .push(format!("and {} more rows that differ", self.more));
        }
        self.found
    }
}

/// The parts of two lines around the place where they begin to differ.
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

//! Rows that cannot be read: skipped in lists and reported, so that one damaged row stops nothing
//! else.
//!
//! The engines call [`MalformedRows::sound`] for each row of a list. `doctor` shows what was found
//! since the daemon started. Where a missing row would cost data (a collection, a removal), a list
//! fails instead.

use std::collections::BTreeMap;
use std::fmt;

use base::fault::Fault;
use parking_lot::Mutex;

/// Rows that are reported at most.
const ROWS_MAX: usize = 1_000;
/// Characters of a row's key that are reported.
const KEY_CHARS_MAX: usize = 160;

/// A row that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MalformedRow {
    /// The table.
    pub table: &'static str,
    /// The key of the row.
    pub key: String,
    /// What is wrong with it.
    pub why: String,
}

impl fmt::Display for MalformedRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} cannot be read: {}",
            self.table, self.key, self.why
        )
    }
}

/// The rows that could not be read since the catalogue was opened.
#[derive(Debug, Default)]
pub(crate) struct MalformedRows(Mutex<BTreeMap<(&'static str, String), String>>);

impl MalformedRows {
    /// The row, if it could be read. Otherwise it is logged, once, and reported by
    /// [`MalformedRows::all`].
    pub(crate) fn sound<T>(
        &self,
        table: &'static str,
        key: &str,
        row: Result<T, Fault>,
    ) -> Option<T> {
        let mut found = self.0.lock();
        match row {
            Ok(row) => {
                if !found.is_empty() {
                    found.remove(&(table, short(key)));
                }
                Some(row)
            }
            Err(fault) => {
                let key = short(key);
                // The message of [`malformed`] names the row too.
                let why = fault.message.split_once(&format!("{key}: "));
                let why = why.map_or(&*fault.message, |(_, why)| why).to_owned();
                if found.len() < ROWS_MAX && found.insert((table, key.clone()), why).is_none() {
                    tracing::error!(table, %key, error = %fault, "a row of the catalogue cannot be read and is skipped");
                }
                None
            }
        }
    }

    /// All of them.
    pub(crate) fn all(&self) -> Vec<MalformedRow> {
        let found = self.0.lock();
        found
            .iter()
            .map(|((table, key), why)| MalformedRow {
                table,
                key: key.clone(),
                why: why.clone(),
            })
            .collect()
    }
}

fn short(key: &str) -> String {
    key.chars().take(KEY_CHARS_MAX).collect()
}

/// The fault of a row that cannot be read.
pub(crate) fn malformed(table: &str, key: &str, why: impl fmt::Display) -> Fault {
    Fault::internal(format!(
        "the catalogue holds a malformed {table} {}: {why}",
        short(key)
    ))
    .with_next("restore the daemon's data directory from a backup")
}

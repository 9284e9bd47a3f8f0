//! Rows that the catalogue could not store, for example because its disk is full: kept in memory
//! until they are written, and shown in the meantime.
//!
//! A transfer is reported with its stored state and the reason why the new state is not stored. So
//! nothing is reported that is not durable, and a user sees the reason. A crash loses the rows in
//! memory: the transfer then continues from the catalogue.

use std::collections::HashMap;
use std::time::Instant;

use parking_lot::Mutex;

use base::fault::Fault;
use base::limits::STATE_LOG_EVERY;
use base::names::TransferId;
use model::transfer::State;
use state::TransferRow;

/// The transfers with an unwritten row.
#[derive(Default)]
pub(super) struct Unwritten {
    rows: Mutex<HashMap<String, Entry>>,
    logged: Mutex<Option<Instant>>,
}

struct Entry {
    row: TransferRow,
    /// Whether the catalogue knows the transfer at all.
    is_adopted: bool,
}

impl Unwritten {
    pub(super) fn rows(&self) -> Vec<TransferRow> {
        let mut rows: Vec<TransferRow> = self
            .rows
            .lock()
            .values()
            .map(|entry| entry.row.clone())
            .collect();
        rows.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        rows
    }

    /// Records that a transfer's row was not written. Returns whether to log this.
    pub(super) fn not_saved(&self, row: &TransferRow, fault: &Fault) -> bool {
        // A final state counts only when it is durable.
        let state = if row.state.is_final() {
            State::Committing
        } else {
            row.state
        };
        self.put(
            TransferRow {
                state,
                ..row.clone()
            },
            fault,
            true,
        )
    }

    /// Records that a transfer from the hub was not stored. Returns whether to log this.
    pub(super) fn not_adopted(&self, row: &TransferRow, fault: &Fault) -> bool {
        if row.state.is_final() {
            // It ended here, and starts again when this can be stored.
            return self.put(
                TransferRow {
                    state: State::Queued,
                    ..row.clone()
                },
                fault,
                false,
            );
        }
        self.put(row.clone(), fault, false)
    }

    fn put(&self, mut row: TransferRow, fault: &Fault, is_adopted: bool) -> bool {
        row.body.set_fault(Some(fault));
        row.body.receipt = None;
        let mut rows = self.rows.lock();
        // A task that is being stopped says nothing about the newer request.
        if rows
            .get(row.id.as_str())
            .is_none_or(|there| there.row.generation <= row.generation)
        {
            rows.insert(row.id.to_string(), Entry { row, is_adopted });
        }
        drop(rows);
        let mut logged = self.logged.lock();
        let is_due = logged.is_none_or(|at| at.elapsed() >= STATE_LOG_EVERY);
        if is_due {
            *logged = Some(Instant::now());
        }
        is_due
    }

    /// The row of this generation was written.
    pub(super) fn saved(&self, id: &str, generation: i64) {
        self.forget(id, |entry| entry.row.generation <= generation);
    }

    /// The transfer was stored, as of this generation.
    pub(super) fn adopted(&self, id: &str, generation: i64) {
        self.forget(id, |entry| {
            !entry.is_adopted || entry.row.generation < generation
        });
    }

    fn forget(&self, id: &str, which: impl Fn(&Entry) -> bool) {
        let mut rows = self.rows.lock();
        if rows.get(id).is_some_and(which) {
            rows.remove(id);
        }
        if rows.is_empty() {
            *self.logged.lock() = None;
        }
    }

    /// Removes transfers that were not stored and that the hub does not list any more.
    pub(super) fn retain(&self, wanted: impl Fn(&TransferId) -> bool) {
        self.rows
            .lock()
            .retain(|_, entry| entry.is_adopted || wanted(&entry.row.id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::fault::Reason;
    use content::chunk::Hash;
    use state::{Body, Want};

    fn row(id: &str, state: State) -> TransferRow {
        TransferRow {
            id: id.parse().unwrap(),
            delivery: "d-1".parse().unwrap(),
            artifact: "model/m:1".parse().unwrap(),
            digest: Hash([1; 32]),
            site: "chengdu".parse().unwrap(),
            want: Want::Run,
            generation: 0,
            state,
            body: Body::default(),
            created_ms: 0,
            updated_ms: 0,
            finished_ms: None,
            cursor: 0,
            after: Vec::new(),
            removed_ms: None,
        }
    }

    #[test]
    fn a_state_that_is_not_durable_is_not_shown_but_its_reason_is() {
        let unwritten = Unwritten::default();
        let full = Fault::no_space("the catalogue /data/catalogue.db: its disk is full");
        assert!(
            unwritten.not_saved(&row("t-1", State::Done), &full),
            "the first is logged"
        );
        assert!(
            !unwritten.not_saved(&row("t-1", State::Done), &full),
            "those at once after it are not"
        );
        assert!(!unwritten.not_adopted(&row("t-2", State::Queued), &full));
        let shown = unwritten.rows();
        assert_eq!(
            shown
                .iter()
                .map(|row| (row.id.as_str(), row.state))
                .collect::<Vec<_>>(),
            [("t-1", State::Committing), ("t-2", State::Queued)]
        );
        assert!(
            shown
                .iter()
                .all(|row| row.body.reason == Some(Reason::NoSpace))
        );
        unwritten.adopted("t-1", 0);
        assert_eq!(
            unwritten.rows().len(),
            2,
            "a transfer that is known to the catalogue waits for its row to be written"
        );
        unwritten.retain(|id| id.as_str() == "t-1");
        let older = row("t-1", State::Transferring);
        let newer = TransferRow {
            generation: 1,
            ..older.clone()
        };
        unwritten.not_saved(&newer, &full);
        unwritten.not_saved(&older, &full);
        assert_eq!(
            unwritten.rows()[0].generation,
            1,
            "what an older task could not write says nothing of a newer one"
        );
        unwritten.saved("t-1", 0);
        assert_eq!(unwritten.rows().len(), 1);
        unwritten.adopted("t-1", 2);
        assert!(
            unwritten.rows().is_empty(),
            "what was begun again since is written"
        );
        unwritten.not_saved(&newer, &full);
        unwritten.saved("t-1", 1);
        assert!(unwritten.rows().is_empty());
        assert!(
            unwritten.not_saved(&row("t-3", State::Planning), &full),
            "a new condition is logged again"
        );
    }
}

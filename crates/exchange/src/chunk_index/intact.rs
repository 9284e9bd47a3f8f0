//! When the content of a file of this site was verified completely, and the state of the file then.
//!
//! A file whose state still equals its record was not touched since. A delivery takes it over without
//! hashing it again while the record is young enough; a damage of the disk that changes no state is
//! found by the scrub, which reads each file before its record is too old.
//!
//! [`ChunkIndex::commit`] writes the records of files that a delivery took over, in the transaction
//! of their group commit; the end of an assembly and the scrub write theirs with
//! [`ChunkIndex::note_intact`]. A record that a crash loses costs one more hash of its file. A
//! version of the program that does not know the table ignores it.

use std::time::Duration;

use redb::{TableDefinition, TableError, WriteTransaction};

use super::ChunkIndex;
use base::fault::Fault;
use sink::file_state::FileState;

/// Length, inode, modification time, change time (seconds and nanoseconds each), and when the
/// content was verified, in milliseconds since 1970.
type IntactRow = (u64, u64, i64, i64, i64, i64, i64);

/// Location and entry → the record. The first record creates the table: a start writes nothing, so
/// that it succeeds on a full disk.
const INTACT: TableDefinition<'_, (u32, u64), IntactRow> = TableDefinition::new("intact");

/// The number of a location, and that of an entry in its manifest.
pub type FileKey = (u32, u64);

/// The record of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Intact {
    /// The state when the content was known to be intact.
    pub state: FileState,
    /// When all bytes were last verified, in milliseconds since 1970.
    pub checked_ms: i64,
}

impl Intact {
    /// Whether a file with this state now has the verified content, as far as this can be known
    /// without reading it.
    pub fn holds(&self, now: &FileState, now_ms: i64, age_max: Duration) -> bool {
        self.state == *now && self.is_younger_than(now_ms, age_max)
    }

    /// Whether the content was verified less than `age` ago. A clock that was set back makes no
    /// record younger.
    pub fn is_younger_than(&self, now_ms: i64, age: Duration) -> bool {
        now_ms
            .checked_sub(self.checked_ms)
            .and_then(|past| u64::try_from(past).ok())
            .is_some_and(|past| u128::from(past) < age.as_millis())
    }

    fn row(&self) -> IntactRow {
        let FileState {
            len,
            inode,
            modified,
            changed,
        } = self.state;
        (
            len,
            inode,
            modified.0,
            modified.1,
            changed.0,
            changed.1,
            self.checked_ms,
        )
    }

    fn of_row(row: IntactRow) -> Self {
        let (len, inode, modified, modified_ns, changed, changed_ns, checked_ms) = row;
        Self {
            state: FileState {
                len,
                inode,
                modified: (modified, modified_ns),
                changed: (changed, changed_ns),
            },
            checked_ms,
        }
    }
}

/// Removes the records of a location.
pub(super) fn remove(write: &WriteTransaction, place: u32) -> Result<(), redb::Error> {
    let mut table = write.open_table(INTACT)?;
    table.retain_in((place, 0)..=(place, u64::MAX), |_, _| false)?;
    Ok(())
}

/// Writes records; `None` removes one.
pub(super) fn write(
    write: &WriteTransaction,
    rows: &[(FileKey, Option<Intact>)],
) -> Result<(), redb::Error> {
    if rows.is_empty() {
        return Ok(());
    }
    let mut table = write.open_table(INTACT)?;
    for (key, intact) in rows {
        match intact {
            Some(intact) => drop(table.insert(key, intact.row())?),
            None => drop(table.remove(key)?),
        }
    }
    Ok(())
}

impl ChunkIndex {
    /// The records of these files.
    pub fn intact(&self, wanted: &[FileKey]) -> Result<Vec<Option<Intact>>, Fault> {
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        self.tree.read(|read| {
            let table = match read.open_table(INTACT) {
                Err(TableError::TableDoesNotExist(_)) => return Ok(vec![None; wanted.len()]),
                table => table?,
            };
            wanted
                .iter()
                .map(|key| Ok(table.get(key)?.map(|row| Intact::of_row(row.value()))))
                .collect()
        })
    }

    /// Records that files are intact; `None`: this is not known any more.
    pub fn note_intact(&self, rows: &[(FileKey, Option<Intact>)]) -> Result<(), Fault> {
        if rows.is_empty() {
            return Ok(());
        }
        self.tree.write(|transaction| {
            // Without these records a file is hashed once more.
            transaction.set_durability(redb::Durability::None)?;
            write(transaction, rows)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn intact(inode: u64, checked_ms: i64) -> Intact {
        Intact {
            state: FileState {
                len: 5,
                inode,
                modified: (1, 2),
                changed: (3, 4),
            },
            checked_ms,
        }
    }

    #[test]
    fn a_record_holds_for_the_same_state_and_a_time() {
        let known = intact(7, 1_000);
        let day = Duration::from_secs(86_400);
        assert!(known.holds(&known.state, 1_000, day));
        assert!(known.holds(&known.state, 86_400_999, day));
        assert!(!known.holds(&known.state, 86_401_000, day), "too old");
        assert!(
            !known.holds(&known.state, 999, day),
            "the clock was set back"
        );
        assert!(!known.holds(&known.state, 1_000, Duration::ZERO));
        let other = |change: fn(&mut FileState)| {
            let mut state = known.state;
            change(&mut state);
            known.holds(&state, 1_000, day)
        };
        assert!(!other(|state| state.len += 1));
        assert!(!other(|state| state.inode += 1));
        assert!(!other(|state| state.modified.1 += 1));
        assert!(!other(|state| state.changed.1 += 1));
    }

    #[test]
    fn records_are_kept_for_each_file_and_go_with_their_location() {
        let dir = tempfile::tempdir().unwrap();
        let keys = [(1, 0), (1, u64::MAX), (2, 0)];
        {
            let index = ChunkIndex::open(dir.path()).unwrap();
            assert_eq!(index.intact(&keys).unwrap(), [None; 3], "no table yet");
            index.note_intact(&[]).unwrap();
            let rows: Vec<_> = keys
                .iter()
                .zip(1..)
                .map(|(key, n)| (*key, Some(intact(n, n as i64))))
                .collect();
            index.note_intact(&rows).unwrap();
            index
                .note_intact(&[(keys[0], None), (keys[2], Some(intact(9, 9)))])
                .unwrap();
            assert_eq!(
                index.intact(&keys).unwrap(),
                [None, Some(intact(2, 2)), Some(intact(9, 9))]
            );
            // The next durable write keeps them.
            index.trial().unwrap();
        }
        let index = ChunkIndex::open(dir.path()).unwrap();
        assert_eq!(index.intact(&keys).unwrap()[2], Some(intact(9, 9)));
        index.remove(1).unwrap();
        assert_eq!(
            index.intact(&keys).unwrap(),
            [None, None, Some(intact(9, 9))]
        );
    }
}

//! Removes the chunk rows of removed locations: staging folders that were cleared, and artifacts
//! that were removed.
//!
//! A removed location takes effect at once: no lookup returns its rows any more. The rows are
//! spread over the whole tree, so they are removed later, one part of the tree at a time. A number
//! in the file counts the removed locations; an interrupted sweep starts again from the beginning.

use std::ops::Bound;

use redb::{ReadableTable, TableDefinition, TableError, WriteTransaction};

use super::{CHUNKS, ChunkIndex};
use base::fault::Fault;
use content::chunk::Hash;

/// The number of locations removed since the last complete sweep.
const STALE: TableDefinition<'_, (), u64> = TableDefinition::new("stale");

/// Records a removed location. The first removal creates the table: a start writes nothing, so that
/// it succeeds on a full disk.
pub(super) fn note(write: &WriteTransaction) -> Result<(), redb::Error> {
    let mut stale = write.open_table(STALE)?;
    let before = stale.get(())?.map_or(0, |count| count.value());
    stale.insert((), before + 1)?;
    Ok(())
}

impl ChunkIndex {
    /// The number of removed locations whose rows may still exist; 0: none.
    pub fn stale(&self) -> Result<u64, Fault> {
        self.tree.read(|read| match read.open_table(STALE) {
            Err(TableError::TableDoesNotExist(_)) => Ok(0),
            table => Ok(table?.get(())?.map_or(0, |count| count.value())),
        })
    }

    /// Removes the rows of removed locations among the next `rows` after a chunk. Returns the last
    /// chunk of these; `None` at the end.
    pub fn sweep(&self, behind: Option<Hash>, rows: usize) -> Result<Option<Hash>, Fault> {
        let known = self.known.read();
        let (last, gone) = self.tree.read(|read| {
            let chunks = read.open_table(CHUNKS)?;
            let from = behind
                .as_ref()
                .map_or(Bound::Unbounded, |id| Bound::Excluded(&id.0));
            let (mut count, mut last, mut gone) = (0, None, Vec::new());
            for row in chunks
                .range::<&[u8; 32]>((from, Bound::Unbounded))?
                .take(rows)
            {
                let (id, at) = row?;
                let id = Hash(*id.value());
                if !known.contains_key(&at.value().0) {
                    gone.push(id);
                }
                count += 1;
                last = Some(id);
            }
            Ok((last.filter(|_| count == rows), gone))
        })?;
        if !gone.is_empty() {
            self.tree.write(|write| {
                // After a crash these rows are checked once more.
                write.set_durability(redb::Durability::None)?;
                let mut chunks = write.open_table(CHUNKS)?;
                for id in &gone {
                    // Another location may have it by now.
                    let is_gone = chunks
                        .get(&id.0)?
                        .is_some_and(|row| !known.contains_key(&row.value().0));
                    if is_gone {
                        chunks.remove(&id.0)?;
                    }
                }
                Ok(())
            })?;
        }
        Ok(last)
    }

    /// Records that all rows were checked since so many locations were removed.
    pub fn swept(&self, stale: u64) -> Result<(), Fault> {
        self.tree.write(|write| {
            let mut table = write.open_table(STALE)?;
            let now = table.get(())?.map_or(0, |count| count.value());
            table.insert((), now.saturating_sub(stale))?;
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::RwLock;

    use super::super::{At, Commit, LocationInfo};
    use super::*;
    use content::manifest::Digest;
    use sink::StorageLocation;

    #[test]
    fn the_rows_of_a_removed_place_go_and_the_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let index = ChunkIndex::open(dir.path()).unwrap();
        let put = |name: &str| {
            let place = StorageLocation::Folder {
                path: dir.path().join(name),
            };
            let info = LocationInfo {
                place,
                digest: Digest::of(name.as_bytes()),
                transfer: Some(name.into()),
                foreign: false,
                adopting: false,
            };
            index.put(None, info).unwrap()
        };
        let ids = |which: &str| {
            (0..100)
                .map(|n| Hash::of(format!("{which} {n}").as_bytes()))
                .collect::<Vec<_>>()
        };
        let (gone, stays) = (put("gone"), put("stays"));
        for (place, which) in [(gone, "gone"), (stays, "stays")] {
            let journal = RwLock::new(index.journal(place, 100).unwrap());
            let at = |n: usize| At {
                place,
                entry: 0,
                offset: n as u64,
                len: 1,
            };
            let chunks = ids(which)
                .into_iter()
                .enumerate()
                .map(|(n, id)| (id, at(n)))
                .collect();
            index
                .commit(
                    place,
                    &journal,
                    &mut Commit {
                        chunks,
                        ..Commit::default()
                    },
                )
                .unwrap();
        }
        assert_eq!(index.stale().unwrap(), 0);
        index.remove(gone).unwrap();
        let rows = || {
            index
                .tree
                .read(|read| Ok(read.open_table(CHUNKS)?.iter()?.count()))
                .unwrap()
        };
        assert_eq!((index.stale().unwrap(), rows()), (1, 200));
        let mut behind = None;
        let mut steps = 0;
        while let Some(last) = index.sweep(behind, 30).unwrap() {
            (behind, steps) = (Some(last), steps + 1);
        }
        index.swept(1).unwrap();
        assert!(steps >= 5, "{steps}");
        assert_eq!((index.stale().unwrap(), rows()), (0, 100));
        assert!(
            index
                .find(&ids("stays"))
                .unwrap()
                .iter()
                .all(Option::is_some)
        );
    }
}

//! The index of the store: a B-tree on disk (redb) from half a chunk id to pack, offset and length.

use std::collections::BTreeMap;
use std::path::Path;

use redb::{ReadableTable, TableDefinition};

use crate::chunk::{Hash, ShortHash};
use crate::redb_file::Tree;
use base::fault::{Code, Fault};

/// What to do if the index is damaged or missing.
pub(super) const REBUILD: &str = "stop the daemon, then run 'packhorse store rebuild-index --config FILE' with its configuration: it makes \
                                  the index again from the packs; then start the daemon";
/// The limit on the memory of the index.
pub const INDEX_CACHE_BYTES: usize = 16 << 20;

const CHUNKS: TableDefinition<'_, &ShortHash, (u32, u32, u32)> = TableDefinition::new("chunks");
/// Pack → the number of its bytes that are synced and indexed.
const PACKS: TableDefinition<'_, u32, u64> = TableDefinition::new("packs");

/// The position of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) pack: u32,
    pub(super) offset: u32,
    pub(super) frame_len: u32,
}

impl Location {
    fn from_row((pack, offset, frame_len): (u32, u32, u32)) -> Self {
        Self {
            pack,
            offset,
            frame_len,
        }
    }
}

pub(super) struct Index {
    tree: Tree,
}

impl Index {
    pub(super) fn open(path: &Path) -> Result<Self, Fault> {
        // A daemon that cannot start because its index is damaged exits with the same code as one
        // whose index is missing.
        let tree = Tree::open(path, "the chunk index", REBUILD.into(), INDEX_CACHE_BYTES).map_err(
            |not| match not.is_damaged {
                true => Fault {
                    code: Code::Config,
                    ..not.fault
                },
                false => not.fault,
            },
        )?;
        if tree.is_rolled_back() {
            tracing::warn!(path = %path.display(), "the chunk index was damaged: an older state was restored, and missing entries are read from the packs");
        }
        tree.write(|write| {
            write.open_table(CHUNKS)?;
            write.open_table(PACKS)?;
            Ok(())
        })?;
        Ok(Self { tree })
    }

    pub(super) fn is_damaged(&self) -> bool {
        self.tree.is_damaged()
    }

    pub(super) fn get(&self, id: Hash) -> Result<Option<Location>, Fault> {
        Ok(self.get_many(&[id])?.pop().flatten())
    }

    pub(super) fn get_many(&self, ids: &[Hash]) -> Result<Vec<Option<Location>>, Fault> {
        self.tree.read(|read| {
            let chunks = read.open_table(CHUNKS)?;
            ids.iter()
                .map(|id| {
                    Ok(chunks
                        .get(&id.short())?
                        .map(|row| Location::from_row(row.value())))
                })
                .collect()
        })
    }

    pub(super) fn packs(&self) -> Result<BTreeMap<u32, u64>, Fault> {
        self.tree.read(|read| {
            let packs = read.open_table(PACKS)?;
            packs
                .iter()?
                .map(|row| {
                    row.map(|(k, v)| (k.value(), v.value()))
                        .map_err(redb::Error::from)
                })
                .collect()
        })
    }

    /// Adds chunks of packs that are synced up to these lengths. The chunks are inserted in order
    /// of their ids, because neighbours share a leaf.
    pub(super) fn commit(
        &self,
        found: &[(Hash, Location)],
        packs: &[(u32, u64)],
    ) -> Result<(), Fault> {
        let mut found: Vec<&(Hash, Location)> = found.iter().collect();
        found.sort_unstable_by_key(|(id, _)| *id);
        self.tree.write(|write| {
            let mut chunks = write.open_table(CHUNKS)?;
            for (id, at) in found {
                chunks.insert(&id.short(), (at.pack, at.offset, at.frame_len))?;
            }
            let mut table = write.open_table(PACKS)?;
            for (pack, len) in packs {
                table.insert(pack, len)?;
            }
            Ok(())
        })
    }

    /// Calls `see` for every chunk.
    pub(super) fn scan(&self, mut see: impl FnMut(ShortHash, Location)) -> Result<(), Fault> {
        self.tree.read(|read| {
            for row in read.open_table(CHUNKS)?.iter()? {
                let (id, at) = row?;
                see(*id.value(), Location::from_row(at.value()));
            }
            Ok(())
        })
    }

    /// Removes these chunks if they are still at these positions. A chunk that was moved or stored
    /// again meanwhile stays.
    pub(super) fn forget_chunks(&self, positions: &[(Hash, Location)]) -> Result<(), Fault> {
        self.tree.write(|write| {
            let mut chunks = write.open_table(CHUNKS)?;
            for (id, at) in positions {
                let is_unmoved = chunks
                    .get(&id.short())?
                    .is_some_and(|row| Location::from_row(row.value()) == *at);
                if is_unmoved {
                    chunks.remove(&id.short())?;
                }
            }
            Ok(())
        })
    }

    /// Removes these packs, and these chunks if they are still in them.
    pub(super) fn forget(&self, ids: &[ShortHash], packs: &[u32]) -> Result<(), Fault> {
        self.tree.write(|write| {
            let mut chunks = write.open_table(CHUNKS)?;
            for id in ids {
                let here = chunks
                    .get(id)?
                    .is_some_and(|row| packs.contains(&row.value().0));
                if here {
                    chunks.remove(id)?;
                }
            }
            let mut table = write.open_table(PACKS)?;
            for pack in packs {
                table.remove(pack)?;
            }
            Ok(())
        })
    }
}

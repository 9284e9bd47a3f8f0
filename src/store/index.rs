//! Where each chunk lies: a B-tree on disk (redb), half a chunk id → pack, offset, length.

use std::collections::BTreeMap;
use std::path::Path;

use redb::{ReadableTable, TableDefinition};

use crate::chunk::{Hash, ShortHash};
use crate::fault::Fault;
use crate::tree::Tree;

/// What the index keeps in memory at the most.
pub const INDEX_CACHE_BYTES: usize = 16 << 20;

const CHUNKS: TableDefinition<'_, &ShortHash, (u32, u32, u32)> = TableDefinition::new("chunks");
/// Pack → bytes of it that are synced and indexed.
const PACKS: TableDefinition<'_, u32, u64> = TableDefinition::new("packs");

/// Where a frame lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) pack: u32,
    pub(super) offset: u32,
    pub(super) frame_len: u32,
}

impl Location {
    fn from_row((pack, offset, frame_len): (u32, u32, u32)) -> Self {
        Self { pack, offset, frame_len }
    }
}

pub(super) struct Index {
    tree: Tree,
}

impl Index {
    pub(super) fn open(path: &Path) -> Result<Self, Fault> {
        let tree = Tree::open(path, "the chunk index", INDEX_CACHE_BYTES)?;
        let write = tree.write()?;
        write.open_table(CHUNKS).map_err(|e| tree.fault(e))?;
        write.open_table(PACKS).map_err(|e| tree.fault(e))?;
        write.commit().map_err(|e| tree.fault(e))?;
        Ok(Self { tree })
    }

    pub(super) fn get(&self, id: Hash) -> Result<Option<Location>, Fault> {
        Ok(self.get_many(&[id])?[0])
    }

    pub(super) fn get_many(&self, ids: &[Hash]) -> Result<Vec<Option<Location>>, Fault> {
        let read = self.tree.read()?;
        let chunks = read.open_table(CHUNKS).map_err(|e| self.tree.fault(e))?;
        ids.iter()
            .map(|id| Ok(chunks.get(&id.short()).map_err(|e| self.tree.fault(e))?.map(|row| Location::from_row(row.value()))))
            .collect()
    }

    pub(super) fn packs(&self) -> Result<BTreeMap<u32, u64>, Fault> {
        let read = self.tree.read()?;
        let packs = read.open_table(PACKS).map_err(|e| self.tree.fault(e))?;
        packs
            .iter()
            .map_err(|e| self.tree.fault(e))?
            .map(|row| row.map(|(k, v)| (k.value(), v.value())).map_err(|e| self.tree.fault(e)))
            .collect()
    }

    /// Takes chunks in, of packs that are synced up to these lengths. In the order of their names: neighbours share a
    /// leaf.
    pub(super) fn commit(&self, found: &[(Hash, Location)], packs: &[(u32, u64)]) -> Result<(), Fault> {
        let mut found: Vec<&(Hash, Location)> = found.iter().collect();
        found.sort_unstable_by_key(|(id, _)| *id);
        let write = self.tree.write()?;
        {
            let mut chunks = write.open_table(CHUNKS).map_err(|e| self.tree.fault(e))?;
            for (id, at) in found {
                chunks.insert(&id.short(), (at.pack, at.offset, at.frame_len)).map_err(|e| self.tree.fault(e))?;
            }
            let mut table = write.open_table(PACKS).map_err(|e| self.tree.fault(e))?;
            for (pack, len) in packs {
                table.insert(pack, len).map_err(|e| self.tree.fault(e))?;
            }
        }
        write.commit().map_err(|e| self.tree.fault(e))
    }

    /// Shows every chunk with its place.
    pub(super) fn scan(&self, mut see: impl FnMut(ShortHash, Location)) -> Result<(), Fault> {
        let read = self.tree.read()?;
        for row in read.open_table(CHUNKS).map_err(|e| self.tree.fault(e))?.iter().map_err(|e| self.tree.fault(e))? {
            let (id, at) = row.map_err(|e| self.tree.fault(e))?;
            see(*id.value(), Location::from_row(at.value()));
        }
        Ok(())
    }

    /// Forgets these chunks, as far as they still lie there: one that was moved or stored anew meanwhile stays known.
    pub(super) fn forget_chunks(&self, lying: &[(Hash, Location)]) -> Result<(), Fault> {
        let write = self.tree.write()?;
        {
            let mut chunks = write.open_table(CHUNKS).map_err(|e| self.tree.fault(e))?;
            for (id, at) in lying {
                let there =
                    chunks.get(&id.short()).map_err(|e| self.tree.fault(e))?.is_some_and(|row| Location::from_row(row.value()) == *at);
                if there {
                    chunks.remove(&id.short()).map_err(|e| self.tree.fault(e))?;
                }
            }
        }
        write.commit().map_err(|e| self.tree.fault(e))
    }

    /// Forgets these chunks, as far as they are still placed in these packs, and the packs.
    pub(super) fn forget(&self, ids: &[ShortHash], packs: &[u32]) -> Result<(), Fault> {
        let write = self.tree.write()?;
        {
            let mut chunks = write.open_table(CHUNKS).map_err(|e| self.tree.fault(e))?;
            for id in ids {
                let here = chunks.get(id).map_err(|e| self.tree.fault(e))?.is_some_and(|row| packs.contains(&row.value().0));
                if here {
                    chunks.remove(id).map_err(|e| self.tree.fault(e))?;
                }
            }
            let mut table = write.open_table(PACKS).map_err(|e| self.tree.fault(e))?;
            for pack in packs {
                table.remove(pack).map_err(|e| self.tree.fault(e))?;
            }
        }
        write.commit().map_err(|e| self.tree.fault(e))
    }
}

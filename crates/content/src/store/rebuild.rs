//! Rebuilds the index of a store from its packs. No daemon may use the store meanwhile.
//!
//! Each pack is read completely. A frame counts if its checksum and its BLAKE3 are correct. All
//! other bytes are skipped one by one, so damage in a pack costs only the chunks that it affects.
//! No pack is changed. The new index is written to a new file, and the old index is kept under
//! another name. After a crash, the old index is still in place, and the next run removes the
//! incomplete file.

use std::path::{Path, PathBuf};

use super::INDEX;
use super::append::ROWS_A_COMMIT;
use super::index::{Index, Location};
use super::pack::Packs;
use crate::chunk::Hash;
use base::clock;
use base::durable;
use base::fault::Fault;

/// The result of a rebuild.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Rebuilt {
    /// The directory of the store.
    pub store: PathBuf,
    /// The number of packs with chunks.
    pub packs: u64,
    /// The number of chunks; a chunk that is stored twice counts twice.
    pub chunks: u64,
    /// The number of bytes in packs that belong to no complete chunk.
    pub damaged_bytes: u64,
    /// The path of the previous index, if there was one.
    pub kept: Option<PathBuf>,
}

/// Rebuilds the index of the store in this directory.
pub fn rebuild_index(dir: &Path) -> Result<Rebuilt, Fault> {
    let (path, new) = (dir.join(INDEX), dir.join(format!("{INDEX}.new")));
    durable::remove_all(&new)?;
    let mut out = Rebuilt {
        store: dir.to_owned(),
        ..Rebuilt::default()
    };
    let packs = Packs::new(dir.join("packs"));
    let index = Index::open(&new)?;
    let mut found: Vec<(Hash, Location)> = Vec::new();
    let mut lengths: Vec<(u32, u64)> = Vec::new();
    for number in packs.list()? {
        let (chunks, len) = (out.chunks, packs.len(number)?);
        out.damaged_bytes += packs.scan(number, |id, at| {
            out.chunks += 1;
            found.push((id, at));
            if found.len() >= ROWS_A_COMMIT {
                // The pack itself is recorded after all of it was read. After a crash, the rebuild
                // starts again.
                index.commit(&found, &[])?;
                found.clear();
            }
            Ok(())
        })?;
        if out.chunks > chunks {
            out.packs += 1;
            lengths.push((number, len));
        }
    }
    index.commit(&found, &lengths)?;
    drop(index);
    durable::sync_file(&new)?;
    if path.exists() {
        let kept = dir.join(format!("{INDEX}.old-{}", clock::now_unix_ms()));
        durable::keep_as(&path, &kept)?;
        out.kept = Some(kept);
    }
    durable::move_over(&new, &path)?;
    Ok(out)
}

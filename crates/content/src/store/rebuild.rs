//! Makes the index of a store again from its packs, while no daemon uses the store.
//!
//! Each pack is read from its first byte to its last. A frame counts when its sum and its BLAKE3
//! are right; bytes that are no such frame are passed over one by one, so damage in a pack costs
//! the chunks that it hit. No pack is changed. The new index is written beside the old one, which
//! keeps its content under another name; a crash leaves the old one in place and a file that the
//! next run removes.

use std::path::{Path, PathBuf};

use super::index::{Index, Location};
use super::pack::Packs;
use super::{INDEX, ROWS_A_COMMIT};
use crate::chunk::Hash;
use base::clock;
use base::durable;
use base::fault::Fault;

/// What was found in the packs of a store.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Rebuilt {
    /// The store's folder.
    pub store: PathBuf,
    /// Packs that hold chunks.
    pub packs: u64,
    /// Chunks in them; one that is there twice counts twice.
    pub chunks: u64,
    /// Bytes in packs that belong to no whole chunk.
    pub damaged_bytes: u64,
    /// Where the index from before is; `None`: there was none.
    pub kept: Option<PathBuf>,
}

/// Makes the index of the store in this folder again.
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
                // The pack itself is noted once all of it was read: what a crash cut short is made
                // again as a whole.
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

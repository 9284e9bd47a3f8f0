//! Files with long runs of zeros, such as disk images: they are staged with holes.
//!
//! A chunk of zeros is neither fetched nor written: the file has its full length from the start, and
//! what nobody writes to takes no room. This is safe only in a file that this transfer created: a
//! file that an interrupted attempt left without a journaled chunk is created again.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Assembly, Dest};
use crate::chunk_index::Journal;
use base::fault::Fault;
use content::chunk::Hash;
use content::manifest::{ChunkRef, Step, Walk};
use sink::stage::Stage;

/// From so many chunks of zeros on, a file is staged with holes. They are 1 MiB.
const ZEROS_MIN: u64 = 16;
/// The files with holes of one artifact; all others are written completely.
const FILES_MAX: usize = 1 << 18;

/// A file that is staged with holes.
#[derive(Debug)]
pub(super) struct SparseFile {
    /// The chunk that is not written.
    zeros: Hash,
    /// Whether this transfer created the staged file.
    is_created: AtomicBool,
}

/// The files with holes, by their number.
pub(super) type SparseFiles = HashMap<u64, Arc<SparseFile>>;

impl Assembly {
    /// Finds the files with long runs of zeros.
    pub(super) fn sparse_files(&self, journal: Option<&Journal>) -> Result<SparseFiles, Fault> {
        let (root, mut files) = (&self.incoming.root, SparseFiles::new());
        // Files of one chunk are small.
        if root.totals.chunks <= root.totals.files {
            return Ok(files);
        }
        let zeros = ChunkRef::of_zeros(&root.chunking);
        let (mut current, mut count, mut has_some) = (0, 0, false);
        for step in Walk::new(root, &self.shared.store) {
            match step? {
                Step::Entry { number, .. } => (current, count, has_some) = (number, 0, false),
                Step::Chunk(chunk, spot) => {
                    has_some |= journal.is_some_and(|journal| journal.has(spot.ordinal));
                    count += u64::from(chunk == zeros);
                    if has_some && let Some(file) = files.get(&current) {
                        file.is_created.store(true, Ordering::Relaxed);
                    }
                    if chunk == zeros && count == ZEROS_MIN && files.len() < FILES_MAX {
                        let file = SparseFile {
                            zeros: zeros.id,
                            is_created: AtomicBool::new(has_some),
                        };
                        files.insert(current, Arc::new(file));
                    }
                }
            }
        }
        Ok(files)
    }
}

impl SparseFile {
    pub(super) fn is_hole(&self, chunk: &Hash) -> bool {
        *chunk == self.zeros
    }
}

impl Dest {
    /// Whether this chunk is a hole of the file.
    pub(super) fn is_hole(&self, chunk: &Hash) -> bool {
        self.sparse.as_ref().is_some_and(|file| file.is_hole(chunk))
    }

    /// Opens the staged file.
    pub(super) fn open(&self, stage: &Stage) -> Result<std::fs::File, Fault> {
        let Some(sparse) = &self.sparse else {
            return stage.open_file(&self.path, self.file.size);
        };
        if !sparse.is_created.swap(true, Ordering::Relaxed) {
            stage.remove_file(&self.path)?;
        }
        stage.open_sparse(&self.path, self.file.size)
    }
}

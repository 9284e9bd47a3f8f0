//! What a manifest names, as far as it can be read: for whoever must not lose what a malformed
//! manifest may still need.
//!
//! `gc`, the eviction of relayed bytes and `verify` use it. Nothing is checked that need not be for
//! that: a path that is not allowed, an order or totals that are wrong do not matter. Pages that
//! are gone or damaged are left out, and said.

use std::collections::HashSet;

use super::page::{Raw, Records, each_child};
use super::{ChunkRef, PageRef, Pages, Root};
use crate::chunk::Hash;
use base::fault::{Code, Fault};
use base::limits::OFFENDERS_LISTED_MAX;

/// Something that a manifest names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named {
    /// A page.
    Page(Hash),
    /// A chunk that has a record of its own.
    Chunk(ChunkRef),
    /// The content of a file: up to [`crate::manifest::Chunking::whole`] bytes it is a chunk of
    /// that name.
    File {
        /// Its hash.
        hash: Hash,
        /// Its bytes.
        size: u64,
    },
}

/// Gives `take` all that can be read of a manifest, but pages that are in `seen` already, and what
/// those name. Returns what could not be read, the first of it. Only a store that cannot be read at
/// all is an error.
pub fn survey<P: Pages + ?Sized>(
    root: &Root,
    pages: &P,
    seen: &mut HashSet<Hash>,
    take: &mut dyn FnMut(Named),
) -> Result<Vec<Fault>, Fault> {
    let mut faults = Vec::new();
    let mut note = |fault: Fault| {
        if faults.len() < OFFENDERS_LISTED_MAX {
            faults.push(fault);
        }
    };
    let mut ahead: Vec<Hash> = root.pages.iter().rev().map(|page| page.id).collect();
    while let Some(id) = ahead.pop() {
        if !seen.insert(id) {
            continue;
        }
        take(Named::Page(id));
        let page = match pages.page(id) {
            Ok(page) => page,
            Err(fault) if matches!(fault.code, Code::Integrity | Code::NotFound) => {
                note(fault);
                continue;
            }
            Err(fault) => return Err(fault),
        };
        // By what it says of itself, whatever depth it is listed at.
        let read = if page.first() == Some(&b'I') {
            let mut list = |child: PageRef| ahead.push(child.id);
            each_child(&page, &mut list)
        } else {
            Records::new(page).and_then(|mut records| {
                while let Some(record) = records.raw()? {
                    match record {
                        Raw::Chunk(chunk) => take(Named::Chunk(chunk)),
                        Raw::File { file, .. } => take(Named::File {
                            hash: file.hash,
                            size: file.size,
                        }),
                        Raw::Dir { .. } | Raw::Symlink { .. } => {}
                    }
                }
                Ok(())
            })
        };
        if let Err(fault) = read {
            note(fault);
        }
    }
    Ok(faults)
}

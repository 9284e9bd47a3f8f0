//! Lists what a manifest references, as far as the manifest is readable. For callers that must not
//! lose content that a malformed manifest may still reference.
//!
//! `gc`, the eviction of relayed content and `verify` use it. It checks only what it needs: invalid
//! paths, a wrong order and wrong totals are ignored. Missing and damaged pages are skipped and
//! reported.

use std::collections::HashSet;

use super::page::{Raw, Records, each_child};
use super::{ChunkRef, PageRef, Pages, Root};
use crate::chunk::Hash;
use base::fault::{Code, Fault};
use base::limits::OFFENDERS_LISTED_MAX;

/// An object that a manifest references.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named {
    /// A page.
    Page(Hash),
    /// A chunk that has its own record.
    Chunk(ChunkRef),
    /// The content of a file. A file of at most [`crate::manifest::Chunking::whole`] bytes is one
    /// chunk with this hash as id.
    File {
        hash: Hash,
        /// In bytes.
        size: u64,
    },
}

/// Calls `take` for everything that a manifest references. Skips pages that are in `seen`, and adds
/// pages to it. Returns the first faults of unreadable parts. Fails only if the store itself cannot
/// be read.
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
        // The first byte of the page determines its type, independent of the depth at which it is
        // listed.
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

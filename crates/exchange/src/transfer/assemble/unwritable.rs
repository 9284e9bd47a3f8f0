//! Staged files that the sink refuses although it stores others. Each is tried with other content
//! before its own is requested again; the rest of the artifact is assembled meanwhile.
//!
//! The list is in the transfer's counters, from one attempt to the next. A restart of the daemon
//! forgets it, which costs one more request of that content.

use std::collections::{BTreeMap, HashSet};

use parking_lot::Mutex;

use super::Dest;
use base::fault::Fault;
use base::names::RelPath;
use sink::stage::Stage;

/// Files that are remembered.
const FILES_MAX: usize = 1024;
/// Refused files after which no more are tried.
const REFUSED_MAX: usize = 16;

/// The files that could not be written, by number, with their sizes.
#[derive(Debug, Default)]
pub(super) struct Unwritable(Mutex<BTreeMap<u64, (RelPath, u64)>>);

/// The files that one attempt leaves out, and why.
#[derive(Debug, Default)]
pub(super) struct LeftOut {
    pub(super) files: HashSet<u64>,
    pub(super) fault: Option<Fault>,
}

impl Unwritable {
    /// Records that a staged file could not be written.
    pub(super) fn add(&self, dest: &Dest) {
        let mut files = self.0.lock();
        if files.len() < FILES_MAX {
            files.insert(dest.number, (dest.path.clone(), dest.file.size));
        }
    }

    /// Tries the files. Those that can be written now are forgotten. Blocks.
    pub(super) fn tried(&self, stage: &Stage) -> LeftOut {
        let mut left_out = LeftOut::default();
        let files = self.0.lock().clone();
        for (number, (path, size)) in files {
            if left_out.files.len() < REFUSED_MAX {
                match stage.try_file(&path, size) {
                    Ok(()) => {
                        self.0.lock().remove(&number);
                        continue;
                    }
                    Err(fault) => left_out.fault = left_out.fault.or(Some(fault)),
                }
            }
            left_out.files.insert(number);
        }
        left_out
    }
}

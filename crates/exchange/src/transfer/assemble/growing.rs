//! Large files as they grow: how much of each is written from its start, for a sink that begins
//! before the file is complete.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::Dest;

/// The sink begins early with files of this size.
const LARGE_BYTES: u64 = 1 << 20;

/// A partly written file.
pub(super) struct Arrival {
    pub(super) dest: Arc<Dest>,
    /// Bytes that are written from its start. The channel closes before the last byte if this pass
    /// does not complete the file.
    pub(super) grown: watch::Receiver<u64>,
}

/// The files that one pass fills.
pub(super) struct Growing {
    files: HashMap<u64, Growth>,
    arrivals: mpsc::Sender<Arrival>,
}

struct Growth {
    front: u64,
    /// The written ranges after a gap.
    beyond: BTreeMap<u64, u64>,
    grown: watch::Sender<u64>,
}

impl Growing {
    pub(super) fn new(arrivals: mpsc::Sender<Arrival>) -> Self {
        Self {
            files: HashMap::new(),
            arrivals,
        }
    }

    /// A part of this file is written for the first time in this pass.
    pub(super) fn begin(&mut self, dest: &Arc<Dest>) {
        if dest.file.size < LARGE_BYTES {
            return;
        }
        let (grown, seen) = watch::channel(0);
        // A hint: a sink that is busy sees the file at the commit.
        if self
            .arrivals
            .try_send(Arrival {
                dest: dest.clone(),
                grown: seen,
            })
            .is_ok()
        {
            self.files.insert(
                dest.number,
                Growth {
                    front: 0,
                    beyond: BTreeMap::new(),
                    grown,
                },
            );
        }
    }

    /// Records written parts of a file: offset and bytes.
    pub(super) fn note(&mut self, dest: &Dest, parts: impl Iterator<Item = (u64, u32)>) {
        let Some(growth) = self.files.get_mut(&dest.number) else {
            return;
        };
        growth
            .beyond
            .extend(parts.map(|(begin, len)| (begin, begin + u64::from(len))));
        let before = growth.front;
        while let Some(next) = growth
            .beyond
            .first_entry()
            .filter(|next| *next.key() <= growth.front)
        {
            growth.front = growth.front.max(next.remove());
        }
        if growth.front > before {
            growth.grown.send_replace(growth.front);
        }
        if growth.front == dest.file.size {
            self.files.remove(&dest.number);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use parking_lot::Mutex;

    use super::*;
    use content::chunk::Hash;
    use content::manifest::FileInfo;

    fn dest(number: u64, size: u64) -> Arc<Dest> {
        let file = FileInfo {
            size,
            hash: Hash([0; 32]),
        };
        Arc::new(Dest {
            number,
            path: "blob".parse().unwrap(),
            wanted: Default::default(),
            file,
            handle: Mutex::default(),
            announced: AtomicBool::default(),
            sparse: None,
        })
    }

    #[test]
    fn only_content_before_the_first_gap_is_reported() {
        let (arrivals, mut arrived) = mpsc::channel(4);
        let mut growing = Growing::new(arrivals);
        let (large, small) = (dest(1, 3 << 20), dest(2, 100));
        growing.begin(&large);
        growing.begin(&small);
        let mut seen = arrived.try_recv().unwrap().grown;
        assert!(arrived.try_recv().is_err(), "small files are not worth it");
        let mut check = |parts: &[(u64, u32)], expected: u64| {
            growing.note(&large, parts.iter().copied());
            assert_eq!(*seen.borrow_and_update(), expected);
        };
        check(&[(1 << 20, 1 << 20)], 0);
        check(&[(0, 1 << 10)], 1 << 10);
        check(&[(1 << 10, (1 << 20) - (1 << 10)), (0, 1 << 10)], 2 << 20);
        check(&[(2 << 20, 1 << 20)], 3 << 20);
        assert!(growing.files.is_empty(), "complete files are removed");
    }
}

//! Walks the manifest of one pass and starts what each missing chunk needs.

use std::sync::Arc;

use parking_lot::RwLock;
use tokio::sync::mpsc;

use super::begin_finish::HeldBySink;
use super::recent::Recent;
use super::unwritable::LeftOut;
use super::{
    Assembly, Batch, COPY_BYTES, Dest, Failure, Item, Job, LOOK_UP, Local, SparseFiles, WHOLES_MAX,
    Whole,
};
use crate::chunk_index::{At, Journal};
use crate::fetch::Ranges;
use base::fault::Fault;
use base::limits::{FETCH_BATCH_BYTES, FETCH_BATCH_CHUNKS_MAX};
use content::chunk::Hash;
use content::manifest::{EntryBody, Step};
use model::protocol::Wanted;
use sink::stage::{self, Stage};

/// The most chunks of a file that is shared whole, about 34 GiB: each takes 150 bytes of memory.
const SHARED_CHUNKS_MAX: usize = 1 << 20;

/// Chunks of zeros that are handed to a worker together.
const HOLES_TOGETHER: usize = 1024;

/// A file that may be shared whole: its local copy, and its chunks so far.
pub(super) struct Sharing {
    dest: Arc<Dest>,
    from: Local,
    items: Vec<Item>,
}

pub(super) struct Producer {
    pub(super) assembly: Assembly,
    pub(super) journal: Arc<RwLock<Journal>>,
    pub(super) stage: Arc<Stage>,
    pub(super) held: Arc<HeldBySink>,
    pub(super) left_out: Arc<LeftOut>,
    pub(super) sparse: Arc<SparseFiles>,
    pub(super) failure: Arc<Failure>,
    pub(super) jobs: mpsc::Sender<Job>,
    pub(super) batches: mpsc::Sender<Batch>,
    pub(super) batch: Batch,
    /// Chunks requested in this pass. A chunk that is mistaken for another waits for the next pass;
    /// older ones are in the index by then.
    pub(super) asked: Recent,
    pub(super) sharing: Option<Sharing>,
    /// The next group of work.
    pub(super) copies: Vec<(Item, At)>,
    pub(super) copy_bytes: usize,
    pub(super) holes: Vec<Item>,
    pub(super) wholes: Vec<Whole>,
    pub(super) whole_bytes: u64,
}

/// The other end of the queue has ended: its thread failed and reports the reason.
struct Ended;

impl Producer {
    pub(super) fn run(mut self) -> Result<(), Fault> {
        let assembly = self.assembly.clone();
        let mut pending: Vec<Item> = Vec::with_capacity(LOOK_UP);
        let mut dest: Option<Arc<Dest>> = None;
        for step in assembly.walk() {
            if self.failure.token.is_cancelled() {
                return Ok(());
            }
            match step? {
                Step::Entry { number, entry, .. } => {
                    dest = None;
                    match entry.body {
                        EntryBody::Dir => self.stage.make_dir(&entry.path)?,
                        EntryBody::File(file)
                            if !self.held.files.contains(&number)
                                && !self.left_out.files.contains(&number) =>
                        {
                            let (handle, announced) = Default::default();
                            let sparse = self.sparse.get(&number).cloned();
                            dest = Some(Arc::new(Dest {
                                number,
                                path: entry.path,
                                wanted: stage::Wanted {
                                    mode: entry.mode,
                                    attributes: entry.attributes,
                                },
                                file,
                                handle,
                                announced,
                                sparse,
                            }));
                        }
                        EntryBody::File(_) | EntryBody::Symlink(_) => {}
                    }
                }
                Step::Chunk(chunk, spot) => {
                    let Some(dest) = &dest else { continue };
                    if self.journal.read().has(spot.ordinal) {
                        continue;
                    }
                    pending.push(Item {
                        dest: dest.clone(),
                        chunk,
                        spot,
                    });
                    if pending.len() >= LOOK_UP && self.look_up(&mut pending)?.is_err() {
                        return Ok(());
                    }
                }
            }
        }
        if self.look_up(&mut pending)?.is_ok()
            && self.end_sharing()?.is_ok()
            && self.send_copies().is_ok()
            && self.send_holes().is_ok()
            && self.send_wholes().is_ok()
        {
            let _ = self.send_batch();
        }
        Ok(())
    }

    fn look_up(&mut self, pending: &mut Vec<Item>) -> Result<Result<(), Ended>, Fault> {
        let ids: Vec<Hash> = pending.iter().map(|item| item.chunk.id).collect();
        let (found, wholes) = self.failure.patiently(|| {
            let found = self.find(&ids)?;
            let firsts = pending
                .iter()
                .zip(&found)
                .map(|(item, at)| (item.dest.file, at.filter(|_| item.spot.offset == 0)));
            let wholes = self.assembly.shareable(firsts)?;
            Ok((found, wholes))
        })?;
        for ((item, at), from) in pending.drain(..).zip(found).zip(wholes) {
            if let Some(sharing) = self
                .sharing
                .as_mut()
                .filter(|s| s.dest.number == item.dest.number)
            {
                sharing.items.push(item);
                // The chunks of so large a file would take too much memory: it is copied chunk by
                // chunk.
                if sharing.items.len() < SHARED_CHUNKS_MAX || self.end_sharing()?.is_ok() {
                    continue;
                }
                return Ok(Err(Ended));
            }
            if self.end_sharing()?.is_err() {
                return Ok(Err(Ended));
            }
            if let Some(from) = from {
                self.sharing = Some(Sharing {
                    dest: item.dest.clone(),
                    from,
                    items: vec![item],
                });
            } else if self.assign(item, at).is_err() {
                return Ok(Err(Ended));
            }
        }
        Ok(Ok(()))
    }

    /// Where these chunks are stored at this site, except where this transfer could not read.
    fn find(&self, ids: &[Hash]) -> Result<Vec<Option<At>>, Fault> {
        let mut found = self.assembly.shared.chunk_index.find(ids)?;
        let unreadable = self.assembly.counters.unreadable.lock();
        if !unreadable.is_empty() {
            for at in &mut found {
                *at = at.filter(|at| !unreadable.contains(&at.place));
            }
        }
        Ok(found)
    }

    fn assign(&mut self, item: Item, at: Option<At>) -> Result<(), Ended> {
        if item.dest.is_hole(&item.chunk.id) {
            self.holes.push(item);
            return if self.holes.len() >= HOLES_TOGETHER {
                self.send_holes()
            } else {
                Ok(())
            };
        }
        match at {
            Some(at) => {
                self.copy_bytes += at.len as usize;
                self.copies.push((item, at));
                if self.copy_bytes >= COPY_BYTES {
                    self.send_copies()
                } else {
                    Ok(())
                }
            }
            None => self.ask(item),
        }
    }

    fn send_copies(&mut self) -> Result<(), Ended> {
        self.copy_bytes = 0;
        let copies = std::mem::take(&mut self.copies);
        if copies.is_empty() {
            Ok(())
        } else {
            self.jobs
                .blocking_send(Job::Copy(copies))
                .map_err(|_| Ended)
        }
    }

    fn send_holes(&mut self) -> Result<(), Ended> {
        let holes = std::mem::take(&mut self.holes);
        if holes.is_empty() {
            Ok(())
        } else {
            self.jobs
                .blocking_send(Job::Holes(holes))
                .map_err(|_| Ended)
        }
    }

    fn send_wholes(&mut self) -> Result<(), Ended> {
        self.whole_bytes = 0;
        let wholes = std::mem::take(&mut self.wholes);
        if wholes.is_empty() {
            Ok(())
        } else {
            self.jobs
                .blocking_send(Job::Share(wholes))
                .map_err(|_| Ended)
        }
    }

    fn end_sharing(&mut self) -> Result<Result<(), Ended>, Fault> {
        let Some(Sharing { dest, from, items }) = self.sharing.take() else {
            return Ok(Ok(()));
        };
        let bytes: u64 = items.iter().map(|item| u64::from(item.chunk.len)).sum();
        if bytes == dest.file.size {
            let chunks = items
                .iter()
                .map(|item| {
                    (
                        item.chunk.id,
                        item.spot.ordinal,
                        item.spot.offset,
                        item.chunk.len,
                    )
                })
                .collect();
            self.whole_bytes += bytes;
            self.wholes.push(Whole { dest, from, chunks });
            return Ok(
                if self.whole_bytes >= COPY_BYTES as u64 || self.wholes.len() >= WHOLES_MAX {
                    self.send_wholes()
                } else {
                    Ok(())
                },
            );
        }
        // A part of it is staged and journaled and must stay, so the rest is copied chunk by chunk.
        let ids: Vec<Hash> = items.iter().map(|item| item.chunk.id).collect();
        let found = self.failure.patiently(|| self.find(&ids))?;
        for (item, at) in items.into_iter().zip(found) {
            if self.assign(item, at).is_err() {
                return Ok(Err(Ended));
            }
        }
        Ok(Ok(()))
    }

    fn ask(&mut self, item: Item) -> Result<(), Ended> {
        if !self.asked.insert(item.chunk.id) {
            return Ok(()); // it is fetched once; the next pass finds it here
        }
        if self
            .assembly
            .counters
            .refused
            .lock()
            .contains(&item.chunk.id)
        {
            return self.ask_again(item);
        }
        match self.batch.wants.last_mut() {
            Some(Wanted::Children { page, ranges }) if *page == item.spot.page => {
                let mut runs = Ranges(std::mem::take(ranges));
                runs.push(item.spot.index);
                *ranges = runs.0;
            }
            _ => self.batch.wants.push(Wanted::Children {
                page: item.spot.page,
                ranges: vec![(item.spot.index, 1)],
            }),
        }
        self.batch.bytes += u64::from(item.chunk.len);
        self.batch.items.push(item);
        if self.batch.bytes >= FETCH_BATCH_BYTES || self.batch.items.len() >= FETCH_BATCH_CHUNKS_MAX
        {
            self.send_batch()
        } else {
            Ok(())
        }
    }

    /// Requests a chunk that was refused, by itself: a sender that does not know such a request
    /// refuses all of it.
    fn ask_again(&mut self, item: Item) -> Result<(), Ended> {
        let batch = Batch {
            wants: vec![Wanted::Refused {
                page: item.spot.page,
                ranges: vec![(item.spot.index, 1)],
            }],
            bytes: u64::from(item.chunk.len),
            items: vec![item],
        };
        self.batches.blocking_send(batch).map_err(|_| Ended)
    }

    fn send_batch(&mut self) -> Result<(), Ended> {
        if self.batch.items.is_empty() {
            return Ok(());
        }
        let batch = std::mem::replace(
            &mut self.batch,
            Batch {
                wants: Vec::new(),
                items: Vec::new(),
                bytes: 0,
            },
        );
        self.batches.blocking_send(batch).map_err(|_| Ended)
    }
}

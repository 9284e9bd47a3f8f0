//! The group commit: syncs written files, and only then updates the index and the journal.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Instant;

use parking_lot::RwLock;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::growing::Growing;
use super::{Counters, DIRTY_FILES_MAX, Dest, Done, Failure, SYNC_ALL_FROM};
use crate::chunk_index::{At, ChunkIndex, Commit, Journal};
use base::durable;
use base::fault::{Fault, IoContext};
use base::limits::{COMMIT_BYTES, COMMIT_EVERY};
use content::chunk::Hash;
use sink::stage::Stage;

/// Chunks that wait for the index, in about 4 MB of memory.
const ROWS_A_COMMIT: usize = 64 << 10;

/// A chunk that is written.
pub(super) struct Fresh {
    /// The number of its file.
    entry: u64,
    ordinal: u64,
    bytes: u32,
}

pub(super) struct Committer {
    pub(super) stage: Arc<Stage>,
    pub(super) chunk_index: Arc<ChunkIndex>,
    pub(super) journal: Arc<RwLock<Journal>>,
    pub(super) place: u32,
    pub(super) counters: Arc<Counters>,
    pub(super) commit: Commit,
    /// Chunks written since the last commit.
    pub(super) fresh: Vec<Fresh>,
    /// Locations of chunks that are committed, or will be next, and that the index does not have
    /// yet.
    pub(super) rows: Vec<(Hash, At)>,
    /// Bytes that were written since the last commit, without shared ones.
    pub(super) unsynced: u64,
    /// Files of several chunks written since the last commit.
    pub(super) large: HashMap<u64, Arc<Dest>>,
    /// Files of one chunk, or shared ones.
    pub(super) small: Vec<Arc<Dest>>,
    pub(super) growing: Growing,
    /// The permits beyond the first, released when something was stored.
    pub(super) more: Option<(Arc<Semaphore>, usize)>,
    pub(super) failure: Arc<Failure>,
    /// Permits for bytes that a kill may lose, released when they are committed.
    pub(super) shares: Vec<Arc<OwnedSemaphorePermit>>,
}

impl Committer {
    pub(super) fn run(mut self, queue: &Receiver<Vec<Done>>) -> Result<(), Fault> {
        let mut last = Instant::now();
        loop {
            match queue.recv_timeout(COMMIT_EVERY.saturating_sub(last.elapsed())) {
                Ok(done) => done.into_iter().for_each(|done| self.take(done)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.flush(true),
            }
            if self.unsynced >= COMMIT_BYTES
                || self.large.len() >= DIRTY_FILES_MAX
                || last.elapsed() >= COMMIT_EVERY
            {
                self.flush(false)?;
                last = Instant::now();
            }
        }
    }

    fn take(&mut self, done: Done) {
        let Done {
            dest,
            chunks,
            bytes,
            written,
            synced,
            uncommitted,
            taken_over,
        } = done;
        self.shares.extend(uncommitted);
        if let Some((from, intact)) = taken_over {
            let own = (self.place, dest.number);
            // `finish` puts the state of the staged file into its record.
            let records = [(from, Some(intact)), (own, Some(intact))];
            self.commit.intact.extend(records);
        }
        self.unsynced += if written { bytes } else { 0 };
        let first = !dest.announced.swap(true, Ordering::Relaxed);
        if first {
            self.commit
                .entries
                .push((dest.number, dest.path.clone(), dest.file));
            self.growing.begin(&dest);
        }
        self.growing.note(
            &dest,
            chunks.iter().map(|&(_, _, offset, len)| (offset, len)),
        );
        for (id, ordinal, offset, len) in chunks {
            self.rows.push((
                id,
                At {
                    place: self.place,
                    entry: dest.number,
                    offset,
                    len,
                },
            ));
            self.fresh.push(Fresh {
                entry: dest.number,
                ordinal,
                bytes: len,
            });
        }
        if synced {
            return;
        }
        if dest.handle.lock().is_some() {
            self.large.entry(dest.number).or_insert(dest);
        } else {
            self.small.push(dest);
        }
    }

    /// Makes written files durable. A file with a failure is written again from its beginning: its
    /// content is unknown, and the system reports a lost write only once.
    fn sync(&self) -> Result<(), Fault> {
        let whole =
            self.stage.syncs_filesystem() && self.large.len() + self.small.len() >= SYNC_ALL_FROM;
        let handles: Vec<_> = self
            .large
            .values()
            .map(|dest| (dest, dest.handle.lock().take()))
            .collect();
        if whole && let Err(fault) = self.stage.sync_filesystem() {
            self.counters.damaged.lock().extend(
                self.large
                    .keys()
                    .copied()
                    .chain(self.small.iter().map(|dest| dest.number)),
            );
            return Err(fault);
        }
        let mut first = Ok(());
        for (dest, handle) in handles {
            let Some(file) = handle else { continue };
            let synced = if whole { Ok(()) } else { file.sync_data() };
            let closed = durable::close(file);
            if let Err(fault) = synced
                .and(closed)
                .at_sink(format_args!("sync {}", dest.path))
            {
                self.counters.damaged.lock().insert(dest.number);
                self.counters.unwritable.add(dest);
                first = first.and(Err(fault));
            }
        }
        for dest in self.small.iter().filter(|_| !whole) {
            if let Err(fault) = self.stage.sync_file(&dest.path) {
                self.counters.damaged.lock().insert(dest.number);
                self.counters.unwritable.add(dest);
                first = first.and(Err(fault));
            }
        }
        first
    }

    /// Records synced chunks in the index and the journal.
    fn note(&mut self) -> Result<(), Fault> {
        let Self {
            failure,
            chunk_index,
            journal,
            place,
            commit,
            ..
        } = self;
        failure.patiently(|| chunk_index.commit(*place, journal, commit))
    }

    /// `all`: adds every chunk to the index; otherwise only when there are many. Chunks that could
    /// not be synced do not count, and end the pass; the others count.
    fn flush(&mut self, all: bool) -> Result<(), Fault> {
        if self.fresh.is_empty() && (self.rows.is_empty() || !all) {
            return Ok(());
        }
        let synced = self
            .sync()
            .inspect_err(|_| self.failure.stored.store(false, Ordering::Relaxed));
        self.large.clear();
        self.small.clear();
        self.unsynced = 0;
        let fresh = std::mem::take(&mut self.fresh);
        let damaged = self.counters.damaged.lock().clone();
        let good = || fresh.iter().filter(|chunk| !damaged.contains(&chunk.entry));
        let bytes = good().map(|chunk| u64::from(chunk.bytes)).sum();
        self.commit
            .ordinals
            .extend(good().map(|chunk| chunk.ordinal));
        self.commit
            .entries
            .retain(|(entry, ..)| !damaged.contains(entry));
        self.rows.retain(|(_, at)| !damaged.contains(&at.entry));
        if all || self.rows.len() >= ROWS_A_COMMIT {
            self.commit.chunks.append(&mut self.rows);
        }
        let some_stored = !self.commit.ordinals.is_empty();
        if synced.is_err() && !some_stored && self.commit.chunks.is_empty() {
            return synced;
        }
        self.note()
            .inspect_err(|_| self.failure.stored.store(false, Ordering::Relaxed))?;
        self.shares.clear();
        if some_stored {
            // Only recorded chunks would not be sent again.
            self.counters.store_failed.store(false, Ordering::Relaxed);
            if let Some((uncommitted, more)) = self.more.take() {
                uncommitted.add_permits(more);
            }
        }
        self.counters.committed.fetch_add(bytes, Ordering::Relaxed);
        if let Err(fault) = synced {
            self.failure.set(fault);
        }
        Ok(())
    }
}

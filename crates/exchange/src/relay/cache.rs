//! The cache of relayed chunks: a store with a budget, and the thread that writes to it.
//!
//! It is a thread, because a disk sync must not delay a connection: frames are passed on before
//! they are kept. The queue is short, and a fetch waits for a free slot: a disk slower than the
//! connection slows the connection.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use tokio::sync::{RwLock, mpsc};

use base::fault::{Fault, IoContext};
use base::workers::{Pace, Worker, Workers};
use content::frame::Frame;
use content::store::Store;

use super::inflight_fetch::{InflightFetch, InflightFetches};

/// Queued groups of frames: about 6 MiB.
const QUEUED_MAX: usize = 32;

/// The store and its budget.
pub(super) struct RelayCache {
    pub(super) store: Store,
    /// Held for reading by readers and writers of chunks, for writing by an eviction.
    pub(super) gate: Arc<RwLock<()>>,
    pub(super) budget: u64,
    /// Approximate bytes of the packs.
    pub(super) bytes: AtomicU64,
    /// Bytes that were passed on without being kept, because there was no room.
    pub(super) unkept: AtomicU64,
    unflushed: AtomicBool,
}

impl RelayCache {
    pub(super) fn open(dir: &Path, budget: u64) -> Result<Self, Fault> {
        let store = Store::open(dir)?;
        let bytes = AtomicU64::new(store.stored_bytes()?);
        let (gate, unkept, unflushed) = Default::default();
        Ok(Self {
            store,
            gate,
            budget,
            bytes,
            unkept,
            unflushed,
        })
    }

    pub(super) fn is_full(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) >= self.budget
    }

    /// Keeps frames that were verified and that the store lacks, if there is room. The worker
    /// reports a fault; frames that cannot be kept are passed on all the same.
    fn put(&self, frames: &[Frame], worker: &Worker) {
        let append = || {
            let appended = self.store.append_all(frames);
            appended
                .map_err(|fault| fault.context("relayed chunks are passed on without being kept"))
        };
        let kept = (!self.is_full()).then(|| worker.iterate_blocking(append));
        match kept {
            Some(Ok(bytes)) => {
                self.bytes.fetch_add(bytes, Ordering::Relaxed);
                self.unflushed.store(true, Ordering::Relaxed);
            }
            Some(Err(_)) | None => {
                let len: usize = frames.iter().map(Frame::len).sum();
                self.unkept.fetch_add(len as u64, Ordering::Relaxed);
            }
        }
    }

    /// Flushes the store, if there is something to flush.
    pub(super) fn flush(&self) -> Result<(), Fault> {
        if self.unflushed.swap(false, Ordering::Relaxed) {
            self.store.flush()
        } else {
            Ok(())
        }
    }
}

/// The next frames of an in-flight fetch, to be kept. Dropping it settles them, whether or not they
/// were kept.
pub(super) struct Group {
    pub(super) flights: Arc<InflightFetches>,
    pub(super) flight: Arc<InflightFetch>,
    pub(super) frames: Vec<Frame>,
}

impl Drop for Group {
    fn drop(&mut self) {
        // In this order: a request that finds no in-flight fetch finds the chunk in the store, and
        // a request that joined one gets its frames.
        self.flights.forget(self.frames.iter().map(Frame::id));
        self.flight.settle(self.frames.len());
    }
}

/// The thread, the worker `relay-cache`; it ends, and is waited for, when this is dropped.
pub(super) struct Keeper {
    queue: Option<mpsc::Sender<Group>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    pub(super) fn start(kept: Arc<RelayCache>, workers: &Workers) -> Result<Self, Fault> {
        let worker = workers.register("relay-cache", Pace::on_request());
        let (queue, mut groups) = mpsc::channel::<Group>(QUEUED_MAX);
        let work = move || {
            while let Some(group) = groups.blocking_recv() {
                let _gate = kept.gate.blocking_read();
                kept.put(&group.frames, &worker);
            }
            worker.end();
        };
        let thread = std::thread::Builder::new()
            .name("relay-keeper".into())
            .spawn(work)
            .at("start a thread")?;
        Ok(Self {
            queue: Some(queue),
            thread: Some(thread),
        })
    }

    /// Queues frames to be kept.
    pub(super) async fn keep(&self, group: Group) {
        if let Some(queue) = &self.queue
            && queue.send(group).await.is_err()
        {
            tracing::error!("the relay's cache has stopped: chunks are passed on and not kept");
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

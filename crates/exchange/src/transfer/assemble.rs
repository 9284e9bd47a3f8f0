//! Assembles an artifact in its staging folder: from content at the site, and from the connection
//! for the rest.
//!
//! One pass walks the manifest and starts what each missing chunk needs. Passes repeat until
//! nothing is missing, so the next pass handles a local chunk that was stale and a chunk that
//! occurs twice.
//!
//! ```text
//! producer (walks, looks up) ──copy, share──▶ workers (verify, write) ──▶ committer (sync,
//! journal)
//!          └──── batches ──▶ fetches (connection) ──frames──▶ ┘
//! ```
//! The producer, the workers and the committer are threads, because they block on disks; fetches
//! are tasks. Every arrow is a bounded queue, and the bytes of a batch hold a share of the daemon's
//! budget until they are written.

mod begin_finish;
mod committer;
mod estimate;
mod failure;
mod growing;
mod names;
mod producer;
mod recent;
mod sparse;
mod unwritable;
mod worker;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use futures::{StreamExt, stream};
use parking_lot::{Mutex, RwLock};
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::chunk_index::{At, ChunkIndex, Commit, FileKey, Intact, Journal, Reader};
use crate::fetch::{self, Fetcher};
use base::blocking::blocking;
use base::buffers::Buffers;
use base::fault::{Code, Fault, Reason};
use base::limits::{
    FETCH_FAR_FROM, FETCH_IN_FLIGHT_FAR_MAX, FETCH_IN_FLIGHT_MAX, SINK_STOP_MAX,
    UNCOMMITTED_BYTES_AFTER_FAILURE_MAX, UNCOMMITTED_BYTES_FAR_MAX, UNCOMMITTED_BYTES_MAX,
};
use base::names::RelPath;
use content::chunk::Hash;
use content::frame::Frame;
use content::manifest::{ChunkPosition, ChunkRef, FileInfo, Walk};
use content::store::Store;
use model::protocol::Wanted;
use sink::stage::{self, Stage};
use sink::{Incoming, Sink};

use super::memory::{Memory, UNIT_BYTES};
use super::stopped;
use begin_finish::HeldBySink;
use committer::Committer;
pub use estimate::{Estimate, Room};
use failure::{Ending, Failure};
use growing::{Arrival, Growing};
use producer::Producer;
use recent::Recent;
use sparse::{SparseFile, SparseFiles};
use unwritable::{LeftOut, Unwritable};
use worker::{READ_BYTES, Worker};

/// Chunks that are looked up together.
const LOOK_UP: usize = 256;
/// Chunks that are recorded together.
const ROWS_TOGETHER: usize = 64 << 10;
/// Jobs that wait for a worker.
const JOBS_MAX: usize = 64;
/// Large files that wait until the sink begins with them…
const ARRIVALS_MAX: usize = 16;
/// …and that it processes at once.
const ARRIVALS_AT_ONCE: usize = 2;
/// Bytes of frames that are handed to a worker together.
const JOB_BYTES: usize = 256 << 10;
/// Bytes of local chunks, or files, that are handed to a worker together…
const COPY_BYTES: usize = 2 << 20;
/// …and files at the most.
const WHOLES_MAX: usize = 64;
/// Files with several chunks that may be open between two commits.
const DIRTY_FILES_MAX: usize = 256;
/// From so many files on, one sync of the filesystem is cheaper than one for each.
const SYNC_ALL_FROM: usize = 32;
/// Bytes that a site keeps free on its disks.
const SPARE_BYTES: u64 = 16 << 20;
/// Inodes that a site keeps free on its disks, for `CURRENT` and the names of versions.
const INODES_SPARE: u64 = 8;

/// A transfer's bytes as they grow.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes of local chunks, see [`model::transfer::Bytes`].
    pub reused: AtomicU64,
    /// Bytes that an earlier attempt staged.
    pub resumed: AtomicU64,
    /// Bytes of received chunks.
    pub received: AtomicU64,
    /// Durable bytes.
    pub committed: AtomicU64,
    /// Transmitted bytes.
    pub wire: Arc<AtomicU64>,
    /// Whether received bytes could not be stored, and none were stored since: few are requested
    /// until storing works.
    pub(super) store_failed: AtomicBool,
    /// The files, by number, with a failed write, sync or close. Their content is unknown: they are
    /// written again.
    pub(super) damaged: Mutex<HashSet<u64>>,
    /// Files that the sink refused in an earlier attempt.
    unwritable: Unwritable,
    /// Storage locations, by number, that could not be read in this attempt: their chunks are
    /// fetched. The index keeps them, because a NAS or a registry that is away for a time loses no
    /// content.
    unreadable: Mutex<HashSet<u32>>,
    /// Chunks that did not verify when they arrived. Each is requested again once, and the sender
    /// then verifies its own copy.
    refused: Mutex<HashSet<Hash>>,
}

/// The components that all assemblies of a daemon share.
#[derive(Clone)]
pub struct AssemblyContext {
    /// Manifest pages.
    pub store: Store,
    /// Where chunks are stored.
    pub chunk_index: Arc<ChunkIndex>,
    /// The bytes in flight.
    pub memory: Arc<Memory>,
    /// The sink that reads blobs of the registry.
    pub images: Arc<dyn Sink>,
    /// How long a file of this site that nobody touched is taken over without hashing it.
    pub trusted_for: Duration,
}

/// One artifact being assembled.
#[derive(Clone)]
pub struct Assembly {
    /// The daemon's shared components.
    pub shared: AssemblyContext,
    /// Its destination.
    pub sink: Arc<dyn Sink>,
    /// The artifact.
    pub incoming: Incoming,
    /// The source of its bytes.
    pub fetcher: Fetcher,
    /// Higher goes first.
    pub priority: i32,
    /// Its progress.
    pub counters: Arc<Counters>,
    /// Stops it at the next chunk; staged content stays.
    pub stop: CancellationToken,
    /// Locked as long as a thread of this assembly may use the staging folder, even a thread that
    /// is not awaited any more.
    pub staging: Option<Arc<OwnedMutexGuard<()>>>,
}

/// A file as it is staged.
struct Dest {
    number: u64,
    path: RelPath,
    wanted: stage::Wanted,
    file: FileInfo,
    /// Open while chunks of it are in flight; files of one chunk are opened, written and closed.
    handle: Mutex<Option<File>>,
    announced: AtomicBool,
    /// If it is staged with holes.
    sparse: Option<Arc<SparseFile>>,
}

struct Item {
    dest: Arc<Dest>,
    chunk: ChunkRef,
    spot: ChunkPosition,
}

enum Job {
    /// Frames from the connection.
    Write {
        frames: Vec<(Item, Frame)>,
        share: Share,
    },
    /// Chunks at this site.
    Copy(Vec<(Item, At)>),
    /// Whole files at this site.
    Share(Vec<Whole>),
    /// Chunks of zeros, which are not written.
    Holes(Vec<Item>),
}

/// A whole file that this site holds.
struct Whole {
    dest: Arc<Dest>,
    from: Local,
    chunks: Vec<(Hash, u64, u64, u32)>,
}

/// A file at this site.
struct Local {
    path: PathBuf,
    /// Whether a hard link of it is safe: nobody else writes to it.
    link: bool,
    /// The number of its storage location, and its entry there.
    key: FileKey,
    /// Its record, if nobody else writes to it.
    intact: Option<Intact>,
}

/// The resources of a batch until its last chunk is committed.
#[derive(Clone)]
struct Share {
    /// Of the daemon's memory, until the batch is written.
    _memory: Arc<OwnedSemaphorePermit>,
    /// Of the bytes that a kill may lose, until the batch is committed.
    uncommitted: Arc<OwnedSemaphorePermit>,
}

struct Batch {
    wants: Vec<Wanted>,
    items: Vec<Item>,
    bytes: u64,
}

/// Chunks of a file that are written; they count when they are synced.
struct Done {
    dest: Arc<Dest>,
    chunks: Vec<(Hash, u64, u64, u32)>,
    bytes: u64,
    /// Whether bytes were written; otherwise blocks were shared.
    written: bool,
    /// Whether it is already durable.
    synced: bool,
    /// Of the bytes that a kill may lose; none for local content.
    uncommitted: Option<Arc<OwnedSemaphorePermit>>,
    /// The file at this site that was taken over as a whole, and its new record.
    taken_over: Option<(FileKey, Intact)>,
}

impl Assembly {
    /// The staging folder of this transfer.
    fn staged(&self) -> PathBuf {
        self.incoming.transfer.in_dir(self.sink.staging_root())
    }

    fn walk(&self) -> Walk<'_, Store> {
        Walk::new(&self.incoming.root, &self.shared.store)
    }

    /// Assembles everything. Returns the staging folder, complete and durable.
    pub async fn run(&self) -> Result<PathBuf, Fault> {
        if self.counters.store_failed.load(Ordering::Relaxed) {
            // A test file is written before bytes are requested again that could not be stored.
            let places = self.shared.chunk_index.clone();
            blocking(move || places.trial()).await?;
            tokio::select! {
                tried = self.sink.trial() => tried?,
                () = self.given_up() => return Err(stopped()),
            }
        }
        self.counters.unreadable.lock().clear();
        let this = self.clone();
        let (place, journal, stage) = self.on_thread(move || this.begin()).await?;
        let (counters, tried) = (self.counters.clone(), stage.clone());
        let left_out = self.on_thread(move || Ok(counters.unwritable.tried(&tried)));
        let left_out = Arc::new(left_out.await?);
        let held = Arc::new(self.held_by_sink(&journal).await?);
        let this = self.clone();
        let (journal, sparse) = self
            .on_thread(move || {
                let sparse = this.sparse_files(Some(&journal))?;
                Ok((journal, Arc::new(sparse)))
            })
            .await?;
        let journal = Arc::new(RwLock::new(journal));
        let total = self.incoming.root.totals.chunks;
        let mut stuck = 0;
        loop {
            let before = journal.read().count();
            if before + held.unjournaled(&journal.read()) >= total {
                break;
            }
            tokio::select! {
                done = self.pass(place, &journal, &stage, &held, &left_out, &sparse) => done?,
                // A thread that hangs in the sink is abandoned. It holds `staging`, so nobody else
                // uses the folder before it ends.
                () = self.given_up() => return Err(stopped()),
            }
            stuck = if journal.read().count() == before {
                stuck + 1
            } else {
                0
            };
            if stuck > 0
                && let Some(fault) = &left_out.fault
            {
                return Err(fault.clone());
            }
            if stuck == 3 {
                return Err(Fault::internal(format!(
                    "{} chunks of {} are missing and cannot be had",
                    total - before,
                    self.incoming.artifact
                )));
            }
        }
        let (this, held, staged) = (self.clone(), held.clone(), stage.clone());
        self.on_thread(move || this.finish(&staged, &held)).await?;
        Ok(stage.path().to_owned())
    }

    /// Runs work on a thread of the sink, unless the transfer is stopped first.
    async fn on_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        tokio::select! {
            done = self.sink.threads().run(work) => done,
            () = self.given_up() => Err(stopped()),
        }
    }

    /// Returns some time after the transfer was stopped.
    async fn given_up(&self) {
        self.stop.cancelled().await;
        tokio::time::sleep(SINK_STOP_MAX).await;
    }

    async fn pass(
        &self,
        place: u32,
        journal: &Arc<RwLock<Journal>>,
        stage: &Arc<Stage>,
        held: &Arc<HeldBySink>,
        left_out: &Arc<LeftOut>,
        sparse: &Arc<SparseFiles>,
    ) -> Result<(), Fault> {
        let failure = Arc::new(Failure::new(&self.stop, self.incoming.waits.clone()));
        let (jobs, job_queue) = mpsc::channel::<Job>(JOBS_MAX);
        let (batches, mut batch_queue) = mpsc::channel::<Batch>(4);
        let (done, done_queue) = sync_channel::<Vec<Done>>(JOBS_MAX);
        let (arrived, arrivals) = mpsc::channel(ARRIVALS_MAX);
        let mut early = JoinSet::new();
        early.spawn(self.clone().hand_on(arrivals));

        let producer = Producer {
            assembly: self.clone(),
            journal: journal.clone(),
            stage: stage.clone(),
            held: held.clone(),
            left_out: left_out.clone(),
            sparse: sparse.clone(),
            failure: failure.clone(),
            jobs: jobs.clone(),
            batches,
            batch: Batch {
                wants: Vec::new(),
                items: Vec::new(),
                bytes: 0,
            },
            asked: Recent::default(),
            sharing: None,
            copies: Vec::new(),
            copy_bytes: 0,
            holes: Vec::new(),
            wholes: Vec::new(),
            whole_bytes: 0,
        };
        let workers = std::thread::available_parallelism()
            .map_or(2, usize::from)
            .clamp(2, 4);
        let mut threads: Vec<oneshot::Receiver<()>> = Vec::new();
        // They wait for each other, so all of them start or none does.
        let room = self.sink.threads().reserve(workers as u32 + 2).await?;
        let guard = |failure: &Arc<Failure>,
                     work: Box<dyn FnOnce() -> Result<(), Fault> + Send>| {
            let (failure, staging) = (failure.clone(), self.staging.clone());
            self.sink.threads().start(&room, move || {
                let ending = Ending(failure);
                if let Err(fault) = work() {
                    ending.0.set(fault);
                }
                drop(staging);
            })
        };
        threads.push(guard(&failure, Box::new(move || producer.run()))?);
        let job_queue = Arc::new(Mutex::new(job_queue));
        for _ in 0..workers {
            let worker = Worker {
                stage: stage.clone(),
                shared: self.shared.clone(),
                counters: self.counters.clone(),
                failure: failure.clone(),
                done: done.clone(),
                local: Reader::new(
                    self.shared.chunk_index.clone(),
                    Some(self.shared.images.clone()),
                    tokio::runtime::Handle::current(),
                ),
                buffer: vec![0; READ_BYTES],
            };
            let queue = job_queue.clone();
            threads.push(guard(&failure, Box::new(move || worker.run(&queue)))?);
        }
        drop((job_queue, done));
        let (requests, bytes) = match self.fetcher.rtt() >= FETCH_FAR_FROM {
            true => (FETCH_IN_FLIGHT_FAR_MAX, UNCOMMITTED_BYTES_FAR_MAX),
            false => (FETCH_IN_FLIGHT_MAX, UNCOMMITTED_BYTES_MAX),
        };
        // After a failure one or two batches, until something was stored.
        let first = if self.counters.store_failed.load(Ordering::Relaxed) {
            UNCOMMITTED_BYTES_AFTER_FAILURE_MAX
        } else {
            bytes
        };
        let uncommitted = Arc::new(Semaphore::new((first / UNIT_BYTES) as usize));
        let committer = Committer {
            more: Some((uncommitted.clone(), ((bytes - first) / UNIT_BYTES) as usize)),
            failure: failure.clone(),
            stage: stage.clone(),
            chunk_index: self.shared.chunk_index.clone(),
            journal: journal.clone(),
            place,
            counters: self.counters.clone(),
            commit: Commit::default(),
            fresh: Vec::new(),
            rows: Vec::new(),
            unsynced: 0,
            large: HashMap::new(),
            small: Vec::new(),
            growing: Growing::new(arrived),
            shares: Vec::new(),
        };
        threads.push(guard(
            &failure,
            Box::new(move || committer.run(&done_queue)),
        )?);

        let mut fetches = JoinSet::new();
        let in_flight = Arc::new(Semaphore::new(requests));
        let buffers = fetch::buffers();
        while let Some(batch) = batch_queue.recv().await {
            let Ok(turn) = in_flight.clone().acquire_owned().await else {
                break;
            };
            let units = batch.bytes.div_ceil(UNIT_BYTES).max(1) as u32;
            // Its own limit first: a transfer that waits for its disk holds no memory that others
            // need.
            let Ok(own) = uncommitted.clone().acquire_many_owned(units).await else {
                break;
            };
            let Some(memory) = self
                .shared
                .memory
                .take(self.incoming.artifact.kind, units)
                .await
            else {
                break;
            };
            let share = Share {
                _memory: Arc::new(memory),
                uncommitted: Arc::new(own),
            };
            if failure.token.is_cancelled() {
                break;
            }
            let (fetcher, jobs, failure) = (self.fetcher.clone(), jobs.clone(), failure.clone());
            let (priority, buffers) = (self.priority, buffers.clone());
            fetches.spawn(async move {
                let work = fetch_batch(&fetcher, priority, batch, share, &jobs, &buffers);
                tokio::select! {
                    result = work => if let Err(fault) = result { failure.set(fault) },
                    () = failure.token.cancelled() => {}
                }
                drop(turn);
            });
        }
        drop(batch_queue);
        while fetches.join_next().await.is_some() {}
        drop(jobs);
        for thread in threads {
            let _ = thread.await;
        }
        // Work that the sink began is ended here, because the commit begins it again. The commit
        // repeats failed work.
        tokio::select! {
            _ = early.join_next() => {}
            () = failure.token.cancelled() => {}
        }
        if !failure.stored.load(Ordering::Relaxed) {
            self.counters.store_failed.store(true, Ordering::Relaxed);
        }
        if !self.counters.damaged.lock().is_empty() {
            self.discard(place, journal, stage).await;
        }
        match failure.take() {
            Some(fault) => Err(fault),
            None if self.stop.is_cancelled() => {
                Err(Fault::internal("stopped").with_reason(Reason::PausedByUser))
            }
            None => Ok(()),
        }
    }
}

impl Assembly {
    /// Removes staged files that could not be written. The journal is changed first: after a crash
    /// in between they are written again.
    async fn discard(&self, place: u32, journal: &Arc<RwLock<Journal>>, stage: &Arc<Stage>) {
        let (this, noted) = (self.clone(), journal.clone());
        let removed = match blocking(move || this.clear_damaged(place, &noted)).await {
            Ok(files) => {
                let (this, stage) = (self.clone(), stage.clone());
                self.on_thread(move || this.remove_damaged(&stage, files))
                    .await
            }
            Err(fault) => Err(fault),
        };
        if let Err(fault) = removed {
            tracing::warn!(error = %fault, "a staged file that could not be written could not be removed");
        }
    }

    /// Lets the sink begin with large files while their bytes and other files still arrive.
    async fn hand_on(self, arrivals: mpsc::Receiver<Arrival>) {
        let (this, staged) = (&self, &self.staged());
        stream::unfold(arrivals, |mut arrivals| async move {
            arrivals.recv().await.map(|arrival| (arrival, arrivals))
        })
        .for_each_concurrent(ARRIVALS_AT_ONCE, |Arrival { dest, grown }| async move {
            this.sink
                .arriving(&this.incoming, staged, &dest.path, &dest.file, grown)
                .await;
        })
        .await;
    }
}

async fn fetch_batch(
    fetcher: &Fetcher,
    priority: i32,
    batch: Batch,
    share: Share,
    jobs: &mpsc::Sender<Job>,
    buffers: &Buffers,
) -> Result<(), Fault> {
    let again = match batch.wants.first() {
        Some(Wanted::Refused { .. }) => batch.items.first().map(|item| item.chunk.id),
        _ => None,
    };
    let explained = |fault: Fault| match again.filter(|_| fault.code == Code::Integrity) {
        Some(chunk) => fault.context(format_args!(
            "chunk {chunk} did not match its hash when it arrived and was requested again"
        )),
        None => fault,
    };
    let mut frames = fetcher.ask(batch.wants, priority).await?;
    let mut items = batch.items.into_iter();
    while items.len() > 0 {
        // One message for many chunks: waking another thread costs as much as writing one chunk.
        let some = frames.some(items.len(), JOB_BYTES, buffers).await;
        let some = some.map_err(explained)?;
        let together = items.by_ref().take(some.len()).zip(some).collect();
        let job = Job::Write {
            frames: together,
            share: share.clone(),
        };
        if jobs.send(job).await.is_err() {
            // A writer failed and reports the reason itself.
            std::future::pending::<()>().await;
        }
    }
    Ok(())
}

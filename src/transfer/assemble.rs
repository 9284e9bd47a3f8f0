//! Assembles an artifact in its staging folder: from what the site has, and from the line for the rest.
//!
//! One pass walks the manifest and starts what each missing chunk needs; passes go on until nothing is missing, so a
//! local chunk that turned out stale, or one that occurs twice, is simply found by the next pass.
//!
//! ```text
//! producer (walks, looks up) ──copy, share──▶ workers (verify, write) ──▶ committer (sync, journal)
//!          └──── batches ──▶ fetches (line) ──frames──▶ ┘
//! ```
//! The producer, the workers and the committer are threads, for they block on disks; fetches are tasks. Every arrow is
//! a bounded queue, and the bytes of a batch hold a share of the daemon's budget until they are written.

mod committer;
mod names;
mod producer;
mod worker;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;

use parking_lot::{Mutex, RwLock};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::buffers::Buffers;
use crate::chunk::Hash;
use crate::durable;
use crate::fault::{Fault, Reason};
use crate::fetch::{self, Fetcher, blocking};
use crate::frame::Frame;
use crate::limits::{FETCH_IN_FLIGHT_MAX, UNCOMMITTED_BYTES_MAX};
use crate::manifest::{ChunkRef, EntryBody, FileInfo, KindInfo, Spot, Step, Walk};
use crate::names::RelPath;
use crate::places::{At, Commit, Journal, PlaceInfo, Places, Reader};
use crate::sink::{Incoming, Place, Sink};
use crate::stage::{FILE_MODE, Stage, free_bytes};
use crate::store::Store;
use crate::wire::Wanted;

use committer::Committer;
use producer::Producer;
use worker::{READ_BYTES, Worker};

/// Chunks that are looked up together.
const LOOK_UP: usize = 256;
/// Chunks that are noted together.
const ROWS_TOGETHER: usize = 64 << 10;
/// Jobs that wait for a worker.
const JOBS_MAX: usize = 64;
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
/// Bytes of a share of the budget.
pub const BUDGET_UNIT: u64 = 4 << 10;
/// Room that a site keeps free on its disks.
const SPARE_BYTES: u64 = 16 << 20;

/// A transfer's bytes as they grow.
#[derive(Debug, Default)]
pub struct Counters {
    /// See [`crate::api::types::Bytes`].
    pub reused: AtomicU64,
    /// Likewise.
    pub resumed: AtomicU64,
    /// Likewise.
    pub received: AtomicU64,
    /// Likewise.
    pub committed: AtomicU64,
    /// Likewise.
    pub wire: Arc<AtomicU64>,
}

/// What all assemblies of a daemon share.
#[derive(Clone)]
pub struct Shared {
    /// Manifest pages.
    pub store: Store,
    /// Where chunks lie.
    pub places: Arc<Places>,
    /// The bytes in flight, in units of [`BUDGET_UNIT`].
    pub budget: Arc<Semaphore>,
    /// The sink that reads blobs of the registry.
    pub images: Arc<dyn Sink>,
}

/// One artifact being assembled.
#[derive(Clone)]
pub struct Assembly {
    /// The daemon's.
    pub shared: Shared,
    /// Where it will go.
    pub sink: Arc<dyn Sink>,
    /// What it is.
    pub incoming: Incoming,
    /// Where the bytes come from.
    pub fetcher: Fetcher,
    /// Higher goes first.
    pub priority: i32,
    /// How far it is.
    pub counters: Arc<Counters>,
    /// Stops it at the next chunk; what is there is kept.
    pub stop: CancellationToken,
}

/// What a delivery would move.
#[derive(Debug, Clone, Copy, Default)]
pub struct Estimate {
    /// Raw bytes that the site lacks.
    pub missing: u64,
    /// Raw bytes that would be written: of what it has, all but files that can be shared whole.
    pub needs: u64,
}

/// A file as it is staged.
struct Dest {
    number: u64,
    path: RelPath,
    mode: u32,
    file: FileInfo,
    /// Open while chunks of it are on the way; files of one chunk are opened, written and closed.
    handle: Mutex<Option<Arc<File>>>,
    announced: AtomicBool,
}

struct Item {
    dest: Arc<Dest>,
    chunk: ChunkRef,
    spot: Spot,
}

enum Job {
    /// Frames from the line.
    Write { frames: Vec<(Item, Frame)>, share: Share },
    /// Chunks that lie here.
    Copy(Vec<(Item, At)>),
    /// Whole files that lie here.
    Share(Vec<Whole>),
}

/// A whole file that lies here already.
struct Whole {
    dest: Arc<Dest>,
    from: Local,
    chunks: Vec<(Hash, u64, u64, u32)>,
}

/// A file that lies here.
struct Local {
    path: PathBuf,
    /// Whether a hard link of it will do: nobody else writes into it.
    link: bool,
}

/// What a batch holds until the last of it has come to rest.
#[derive(Clone)]
struct Share {
    /// Of the daemon's memory: until it is written.
    _memory: Arc<OwnedSemaphorePermit>,
    /// Of what a kill may cost: until it is committed.
    uncommitted: Arc<OwnedSemaphorePermit>,
}

struct Batch {
    wants: Vec<Wanted>,
    items: Vec<Item>,
    bytes: u64,
}

/// Chunks of a file that are in place; they count once they are synced.
struct Done {
    dest: Arc<Dest>,
    chunks: Vec<(Hash, u64, u64, u32)>,
    bytes: u64,
    /// Whether bytes were written, or only blocks shared.
    written: bool,
    /// Of what a kill may cost; nothing for what lies here.
    uncommitted: Option<Arc<OwnedSemaphorePermit>>,
}

/// The first fault of a pass ends all of it.
struct Failure {
    token: CancellationToken,
    fault: Mutex<Option<Fault>>,
}

impl Failure {
    fn set(&self, fault: Fault) {
        self.fault.lock().get_or_insert(fault);
        self.token.cancel();
    }
}

impl Assembly {
    /// The staging folder of this transfer.
    fn staged(&self) -> PathBuf {
        self.sink.staging_root().join(&self.incoming.transfer)
    }

    fn walk(&self) -> Walk<'_, Store> {
        Walk::new(&self.incoming.root, &self.shared.store)
    }

    /// What it would take to bring the artifact here.
    pub fn estimate(&self, journal: Option<&Journal>) -> Result<Estimate, Fault> {
        let mut out = Estimate::default();
        // Each with the file that it is of, its number, and where it begins there.
        let mut pending: Vec<(ChunkRef, FileInfo, u64, u64)> = Vec::new();
        let mut seen: HashSet<Hash> = HashSet::new();
        let places = &self.shared.places;
        let mut whole = None;
        // The index hears late of a folder that somebody took away.
        let mut gone: HashMap<u32, bool> = HashMap::new();
        let mut is_gone = |place: u32| {
            *gone
                .entry(place)
                .or_insert_with(|| places.info(place).is_none_or(|i| matches!(&i.place, Place::Folder { path } if !path.is_dir())))
        };
        let mut look = |pending: &mut Vec<(ChunkRef, FileInfo, u64, u64)>| -> Result<(), Fault> {
            let ids: Vec<Hash> = pending.iter().map(|(chunk, ..)| chunk.id).collect();
            let found: Vec<Option<At>> = places.find(&ids)?.into_iter().map(|at| at.filter(|at| !is_gone(at.place))).collect();
            let wholes =
                self.shareable(pending.iter().zip(&found).map(|((_, file, _, offset), at)| (*file, at.filter(|_| *offset == 0))))?;
            for (((chunk, _, number, _), at), local) in pending.drain(..).zip(found).zip(wholes) {
                let len = u64::from(chunk.len);
                if local.is_some_and(|local| local.link) {
                    whole = Some(number);
                }
                out.missing += if at.is_none() && seen.insert(chunk.id) { len } else { 0 };
                out.needs += if whole == Some(number) { 0 } else { len };
            }
            Ok(())
        };
        let mut of = None;
        for step in self.walk() {
            match step? {
                Step::Entry { number, entry, .. } => of = if let EntryBody::File(file) = entry.body { Some((number, file)) } else { None },
                Step::Chunk(chunk, spot) => {
                    let Some((number, file)) = of.filter(|_| !journal.is_some_and(|j| j.has(spot.ordinal))) else { continue };
                    pending.push((chunk, file, number, spot.offset));
                    if pending.len() >= LOOK_UP {
                        look(&mut pending)?;
                    }
                }
            }
        }
        look(&mut pending)?;
        Ok(out)
    }

    /// Where the same files lie whole: of each it is told where its first chunk was found, if what was looked for is that.
    fn shareable(&self, files: impl Iterator<Item = (FileInfo, Option<At>)>) -> Result<Vec<Option<Local>>, Fault> {
        let places = &self.shared.places;
        let mut out: Vec<Option<Local>> = Vec::new();
        let (mut wanted, mut of) = (Vec::new(), Vec::new());
        for (number, (file, at)) in files.enumerate() {
            out.push(None);
            let Some(at) = at.filter(|at| at.offset == 0) else { continue };
            let Some(info) = places.info(at.place).filter(|info| info.transfer.is_none()) else { continue };
            if matches!(info.place, Place::Folder { .. }) {
                wanted.push((at.place, at.entry));
                of.push((number, file, info));
            }
        }
        for ((number, file, info), there) in of.into_iter().zip(places.entries(&wanted)?) {
            let (Place::Folder { path }, Some((rel, _))) = (&info.place, there.filter(|(_, there)| *there == file)) else { continue };
            let link = self.incoming.artifact.kind.is_files() && !info.foreign;
            out[number] = Some(Local { path: path.join(rel.as_str()), link });
        }
        Ok(out)
    }

    /// Brings everything here. Returns the staging folder, complete and durable.
    pub async fn run(&self) -> Result<PathBuf, Fault> {
        let this = self.clone();
        let (place, journal, stage) = blocking(move || this.begin()).await?;
        let journal = Arc::new(RwLock::new(journal));
        let held = Arc::new(self.held_by_sink().await?);
        let total = self.incoming.root.totals.chunks;
        let mut stuck = 0;
        loop {
            let before = journal.read().count();
            if before + held.unjournaled(&journal.read()) >= total {
                break;
            }
            self.pass(place, &journal, &stage, &held).await?;
            stuck = if journal.read().count() == before { stuck + 1 } else { 0 };
            if stuck == 3 {
                return Err(Fault::internal(format!(
                    "{} chunks of {} are missing and cannot be had",
                    total - before,
                    self.incoming.artifact
                )));
            }
        }
        let (this, held, staged) = (self.clone(), held.clone(), stage.clone());
        blocking(move || this.finish(&staged, &held)).await?;
        Ok(stage.path().to_owned())
    }

    /// Opens or finds the staging folder and the journal, and makes sure that there is room.
    fn begin(&self) -> Result<(u32, Journal, Arc<Stage>), Fault> {
        names::check(&self.incoming, self.walk(), self.sink.as_ref())?;
        let (places, path) = (&self.shared.places, self.staged());
        let totals = self.incoming.root.totals;
        let mut place = places.staged_by(&self.incoming.transfer);
        if let Some(old) = place.filter(|_| !path.is_dir()) {
            // Somebody cleaned the staging folder away: the journal speaks of nothing.
            places.remove(old)?;
            place = None;
        }
        if place.is_none() {
            durable::remove_all(&path)?;
        }
        let stage = Stage::open(&path)?;
        let (digest, transfer) = (self.incoming.digest, Some(self.incoming.transfer.clone()));
        let info = PlaceInfo { place: Place::Folder { path }, digest, transfer, foreign: false };
        let place = match place {
            Some(place) => place,
            None => places.put(None, info)?,
        };
        let journal = places.journal(place, totals.chunks)?;
        let mut resumed = 0;
        if journal.count() > 0 {
            let behind = places.is_behind(place);
            let (mut rows, mut entry) = (Vec::new(), 0);
            for step in self.walk() {
                match step? {
                    Step::Entry { number, .. } => entry = number,
                    Step::Chunk(chunk, spot) if journal.has(spot.ordinal) => {
                        resumed += u64::from(chunk.len);
                        if behind {
                            rows.push((chunk.id, At { place, entry, offset: spot.offset, len: chunk.len }));
                        }
                        if rows.len() >= ROWS_TOGETHER {
                            places.note(&mut rows, &mut Vec::new(), false)?;
                        }
                    }
                    Step::Chunk(..) => {}
                }
            }
            if behind {
                places.note(&mut rows, &mut Vec::new(), false)?;
                places.caught_up(place);
            }
        }
        self.counters.resumed.fetch_max(resumed, Ordering::Relaxed);
        self.counters.committed.fetch_max(resumed, Ordering::Relaxed);
        let free = stage.free_bytes()?.saturating_sub(SPARE_BYTES);
        if totals.bytes - resumed > free {
            // Only now is it worth to look what the site has; shared files take no room.
            let need = self.estimate(Some(&journal))?.needs;
            if need > free {
                return Err(Fault::no_space(format!(
                    "{} needs {need} bytes more in {}, which has {free} to spare",
                    self.incoming.artifact,
                    self.sink.staging_root().display()
                )));
            }
        }
        Ok((place, journal, Arc::new(stage)))
    }

    /// Files that the far end holds already, whole.
    async fn held_by_sink(&self) -> Result<Held, Fault> {
        let mut held = Held::default();
        if !matches!(self.incoming.root.info, KindInfo::Image(_)) {
            return Ok(held);
        }
        let this = self.clone();
        // Number, path, file, and the ordinals of its chunks.
        let files: Vec<(u64, RelPath, FileInfo, Range<u64>)> = blocking(move || {
            let mut out: Vec<(u64, RelPath, FileInfo, Range<u64>)> = Vec::new();
            for step in this.walk() {
                match step? {
                    Step::Entry { number, entry, first_ordinal } => {
                        if let EntryBody::File(file) = entry.body {
                            out.push((number, entry.path, file, first_ordinal..first_ordinal));
                        }
                    }
                    Step::Chunk(..) => {
                        if let Some(last) = out.last_mut() {
                            last.3.end += 1;
                        }
                    }
                }
            }
            Ok(out)
        })
        .await?;
        for (number, path, file, ordinals) in files {
            let holds = tokio::select! {
                holds = self.sink.holds(&self.incoming, &path, &file) => holds?,
                () = self.stop.cancelled() => return Ok(held),
            };
            if holds {
                held.files.insert(number);
                held.ordinals.push(ordinals);
                held.bytes += file.size;
            }
        }
        self.counters.reused.fetch_max(held.bytes, Ordering::Relaxed);
        Ok(held)
    }

    async fn pass(&self, place: u32, journal: &Arc<RwLock<Journal>>, stage: &Arc<Stage>, held: &Arc<Held>) -> Result<(), Fault> {
        let failure = Arc::new(Failure { token: self.stop.child_token(), fault: Mutex::default() });
        let (jobs, job_queue) = mpsc::channel::<Job>(JOBS_MAX);
        let (batches, mut batch_queue) = mpsc::channel::<Batch>(4);
        let (done, done_queue) = sync_channel::<Vec<Done>>(JOBS_MAX);

        let producer = Producer {
            assembly: self.clone(),
            journal: journal.clone(),
            stage: stage.clone(),
            held: held.clone(),
            failure: failure.clone(),
            jobs: jobs.clone(),
            batches,
            batch: Batch { wants: Vec::new(), items: Vec::new(), bytes: 0 },
            asked: HashSet::new(),
            sharing: None,
            copies: Vec::new(),
            copy_bytes: 0,
            wholes: Vec::new(),
            whole_bytes: 0,
        };
        let mut threads = Vec::new();
        let guard = |failure: &Arc<Failure>, work: Box<dyn FnOnce() -> Result<(), Fault> + Send>| {
            let failure = failure.clone();
            tokio::task::spawn_blocking(move || {
                if let Err(fault) = work() {
                    failure.set(fault);
                }
            })
        };
        threads.push(guard(&failure, Box::new(move || producer.run())));
        let job_queue = Arc::new(Mutex::new(job_queue));
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 4) {
            let worker = Worker {
                stage: stage.clone(),
                shared: self.shared.clone(),
                counters: self.counters.clone(),
                done: done.clone(),
                local: Reader::new(self.shared.places.clone(), Some(self.shared.images.clone()), tokio::runtime::Handle::current()),
                buffer: vec![0; READ_BYTES],
            };
            let queue = job_queue.clone();
            threads.push(guard(&failure, Box::new(move || worker.run(&queue))));
        }
        drop((job_queue, done));
        let committer = Committer {
            stage: stage.clone(),
            places: self.shared.places.clone(),
            journal: journal.clone(),
            place,
            counters: self.counters.clone(),
            commit: Commit::default(),
            rows: Vec::new(),
            bytes: 0,
            unsynced: 0,
            large: HashMap::new(),
            small: Vec::new(),
            shares: Vec::new(),
        };
        threads.push(guard(&failure, Box::new(move || committer.run(&done_queue))));

        let mut fetches = JoinSet::new();
        let in_flight = Arc::new(Semaphore::new(FETCH_IN_FLIGHT_MAX));
        let uncommitted = Arc::new(Semaphore::new((UNCOMMITTED_BYTES_MAX / BUDGET_UNIT) as usize));
        let buffers = fetch::buffers();
        while let Some(batch) = batch_queue.recv().await {
            let Ok(turn) = in_flight.clone().acquire_owned().await else { break };
            let units = batch.bytes.div_ceil(BUDGET_UNIT).max(1) as u32;
            // Its own limit first: a transfer that waits for its disk holds none of what the others need.
            let Ok(own) = uncommitted.clone().acquire_many_owned(units).await else { break };
            let Ok(memory) = self.shared.budget.clone().acquire_many_owned(units).await else { break };
            let share = Share { _memory: Arc::new(memory), uncommitted: Arc::new(own) };
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
        match failure.fault.lock().take() {
            Some(fault) => Err(fault),
            None if self.stop.is_cancelled() => Err(Fault::internal("stopped").with_reason(Reason::PausedByUser)),
            None => Ok(()),
        }
    }

    /// Makes what has no chunks, sets modes, and syncs the tree.
    fn finish(&self, stage: &Stage, held: &Held) -> Result<(), Fault> {
        let mut dirs: Vec<(RelPath, u32)> = Vec::new();
        let mut loose: Vec<RelPath> = Vec::new();
        for step in self.walk() {
            let Step::Entry { number, entry, .. } = step? else { continue };
            match entry.body {
                EntryBody::Dir => {
                    stage.make_dir(&entry.path)?;
                    dirs.push((entry.path, entry.mode));
                }
                EntryBody::Symlink(target) => stage.make_symlink(&entry.path, &target)?,
                EntryBody::File(_) if held.files.contains(&number) => {}
                EntryBody::File(file) => {
                    if file.size == 0 && stage.size(&entry.path)? != Some(0) {
                        stage.write_file(&entry.path, b"")?;
                    }
                    if stage.size(&entry.path)? != Some(file.size) {
                        // Somebody reached into the staging folder: nothing that the journal says can be believed.
                        if let Some(place) = self.shared.places.staged_by(&self.incoming.transfer) {
                            self.shared.places.remove(place)?;
                        }
                        return Err(Fault::integrity(format!("the staged file {:?} is gone or has another size", entry.path.as_str()))
                            .with_retry(crate::fault::Retry::Backoff)
                            .with_next("nothing: it is brought again by itself"));
                    }
                    if entry.mode != FILE_MODE {
                        stage.set_mode(&entry.path, entry.mode)?;
                    }
                    if (file.size == 0 || entry.mode != FILE_MODE) && loose.len() < SYNC_ALL_FROM {
                        loose.push(entry.path);
                    }
                }
            }
        }
        let all = dirs.len() + loose.len() >= SYNC_ALL_FROM;
        if !all {
            loose.iter().try_for_each(|path| stage.sync_file(path))?;
        }
        // Deepest first: a folder that its owner may not write to still lets its subfolders be changed by path.
        for (path, mode) in dirs.iter().rev() {
            stage.set_mode(path, *mode)?;
            if !all {
                stage.sync_dir(Some(path))?;
            }
        }
        if all { stage.sync_filesystem() } else { stage.sync_dir(None) }
    }
}

/// What the far end holds.
#[derive(Debug, Default)]
struct Held {
    files: HashSet<u64>,
    ordinals: Vec<Range<u64>>,
    bytes: u64,
}

impl Held {
    /// Chunks that need not be staged and were not staged either, before the far end held them.
    fn unjournaled(&self, journal: &Journal) -> u64 {
        self.ordinals.iter().cloned().flatten().filter(|ordinal| !journal.has(*ordinal)).count() as u64
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
    let mut frames = fetcher.ask(batch.wants, priority).await?;
    let mut items = batch.items.into_iter();
    while items.len() > 0 {
        // One hand-over for many chunks: waking another thread costs as much as writing one.
        let some = frames.some(items.len(), JOB_BYTES, buffers).await?;
        let together = items.by_ref().take(some.len()).zip(some).collect();
        let job = Job::Write { frames: together, share: share.clone() };
        jobs.send(job).await.map_err(|_| Fault::internal("the writers ended early"))?;
    }
    Ok(())
}

/// Free room in a sink's staging, for `plan`.
pub fn free_room(sink: &dyn Sink) -> Option<u64> {
    free_bytes(sink.staging_root()).ok()
}

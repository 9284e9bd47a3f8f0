//! Ingest: reads a source once, cuts it into chunks, hashes, compresses and stores them, and builds
//! the manifest.
//!
//! One thread reads and cuts, because both must be in order. One worker per core hashes, looks up,
//! compresses and stores batches of chunks. Their results are put back in order for the manifest.
//! The number of batches in flight is limited, so memory does not grow with the artifact. Nothing
//! is visible until the caller records the root manifest in the catalogue. A failed publish leaves
//! chunks that no artifact references; `gc` removes them, and a second attempt reuses them.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use bytes::Bytes;

use crate::chunk::{Chunking, DEFAULT_CHUNKING, Hash};
use crate::frame::{Frame, Verified};
use crate::manifest::{ChunkRef, Digest, FileInfo, Root};
use crate::source::Source;
use crate::store::Store;
use base::fault::Fault;
use base::job_progress::JobProgress;
use base::limits::{CHUNK_BYTES_MAX, INGEST_BATCH_BYTES, INGEST_BATCHES_MAX};
use base::names::{Kind, RelPath};
use base::omitted::Omitted;

mod holes;
mod reading;
#[cfg(test)]
mod tests;

// A file that is one chunk must fit in a batch.
const _: () = assert!(CHUNK_BYTES_MAX <= INGEST_BATCH_BYTES);

/// How often the progress of the job is updated.
const REPORT_EVERY: Duration = Duration::from_millis(200);

/// The progress of an ingest.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes read so far.
    pub read: AtomicU64,
    /// Compressed bytes that were new to the store.
    pub stored: AtomicU64,
    /// Bytes of a file that does not fit in the store; 0 if there is no such file.
    pub wanted: AtomicU64,
    /// The job of this ingest, which can be cancelled.
    job: Option<Arc<JobProgress>>,
}

impl Progress {
    fn check(&self) -> Result<(), Fault> {
        self.job.as_ref().map_or(Ok(()), |job| job.check())
    }
}

/// Runs `work` on this thread, updates the progress of the job meanwhile, and adds the stored bytes
/// at the end.
pub fn reported<T>(job: &Arc<JobProgress>, work: impl FnOnce(&Progress) -> T) -> T {
    let progress = Progress {
        job: Some(job.clone()),
        ..Progress::default()
    };
    std::thread::scope(|scope| {
        let (done, ended) = sync_channel::<()>(0);
        let progress = &progress;
        scope.spawn(move || {
            while ended
                .recv_timeout(REPORT_EVERY)
                .is_err_and(|e| e == RecvTimeoutError::Timeout)
            {
                job.bytes
                    .store(progress.read.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        });
        let result = work(progress);
        drop(done);
        job.bytes
            .store(progress.read.load(Ordering::Relaxed), Ordering::Relaxed);
        job.stored
            .fetch_add(progress.stored.load(Ordering::Relaxed), Ordering::Relaxed);
        job.wanted
            .store(progress.wanted.load(Ordering::Relaxed), Ordering::Relaxed);
        result
    })
}

/// The result of an ingest.
#[derive(Debug)]
pub struct Ingested {
    pub root: Root,
    pub digest: Digest,
    /// Compressed bytes that were new to the store.
    pub stored: u64,
    /// What the source left out.
    pub omitted: Omitted,
}

/// The place that the content of a chunk comes from. A keeper may record it instead of the bytes.
#[derive(Debug, Clone)]
pub struct ChunkOrigin {
    /// The number of the entry in the manifest.
    pub entry: u64,
    /// The offset of the chunk in the file of the entry, in bytes.
    pub offset: u64,
}

/// Records the content of chunks: the store of the hub keeps the bytes; a site records where they
/// are.
pub trait Keeper: Sync {
    /// Records these chunks. Returns the number of bytes stored.
    fn keep(&self, chunks: &[(Verified, ChunkOrigin)]) -> Result<u64, Fault>;
    /// Called for every file after all its chunks were kept.
    fn file(&self, number: u64, path: &RelPath, file: &FileInfo) -> Result<(), Fault>;
    /// Makes all kept chunks durable.
    fn flush(&self) -> Result<(), Fault>;
    /// Fails with `no_space` if there is no space for this many more bytes.
    fn check_room_for(&self, _bytes: u64) -> Result<(), Fault> {
        Ok(())
    }
    /// The number of bytes that [`Keeper::keep`] would store for these chunks. The chunks must be
    /// distinct.
    fn bytes_needed(&self, _chunks: &[Verified]) -> Result<u64, Fault> {
        Ok(0)
    }
}

impl Keeper for Store {
    fn keep(&self, chunks: &[(Verified, ChunkOrigin)]) -> Result<u64, Fault> {
        let ids: Vec<Hash> = chunks.iter().map(|(chunk, _)| chunk.id).collect();
        self.put_lacking(&ids, |place| Frame::encode(&chunks[place].0))
    }

    fn file(&self, _: u64, _: &RelPath, _: &FileInfo) -> Result<(), Fault> {
        Ok(())
    }

    fn flush(&self) -> Result<(), Fault> {
        Store::flush(self)
    }

    fn check_room_for(&self, bytes: u64) -> Result<(), Fault> {
        Store::check_room_for(self, bytes)
    }

    fn bytes_needed(&self, chunks: &[Verified]) -> Result<u64, Fault> {
        let ids: Vec<Hash> = chunks.iter().map(|chunk| chunk.id).collect();
        let lacking = chunks
            .iter()
            .zip(self.has_many(&ids)?)
            .filter(|(_, here)| !here);
        Ok(lacking
            .map(|(chunk, _)| Frame::encode(chunk).len() as u64)
            .sum())
    }
}

/// A batch of chunks for a worker: the bytes of consecutive reads, and the range of each chunk in
/// them.
struct Batch {
    number: u64,
    block: Bytes,
    chunks: Vec<(Range<usize>, ChunkOrigin)>,
}

type Answer = (u64, Result<Vec<ChunkRef>, Fault>);

/// Ingests `source`. Stores manifest pages in `pages` and content in `keeper`. Blocks the calling
/// thread and starts worker threads.
pub fn ingest(
    source: &mut dyn Source,
    kind: Kind,
    pages: &Store,
    keeper: &dyn Keeper,
    progress: &Progress,
) -> Result<Ingested, Fault> {
    ingest_as(DEFAULT_CHUNKING, source, kind, pages, keeper, progress)
}

fn ingest_as(
    chunking: Chunking,
    source: &mut dyn Source,
    kind: Kind,
    pages: &Store,
    keeper: &dyn Keeper,
    progress: &Progress,
) -> Result<Ingested, Fault> {
    if let (Some(job), Some(total)) = (&progress.job, source.total()) {
        job.total.store(total, Ordering::Relaxed);
    }
    let losses = pages.losses();
    let workers = std::thread::available_parallelism()
        .map_or(2, usize::from)
        .clamp(2, 8);
    let (batches, work) = sync_channel::<Batch>(INGEST_BATCHES_MAX);
    let (answers, results) = sync_channel::<Answer>(INGEST_BATCHES_MAX * 2);
    let work = parking_lot::Mutex::new(work);
    let root = std::thread::scope(|scope| {
        for _ in 0..workers {
            let answers = answers.clone();
            let work = &work;
            scope.spawn(move || run_worker(work, &answers, keeper, progress));
        }
        drop(answers);
        // `batches` is moved into this call, so that the workers end when it returns, with any
        // result.
        reading::read_all(
            chunking, source, kind, pages, keeper, progress, batches, results,
        )
    })?;
    keeper.flush()?;
    pages.flush_since(losses)?;
    let digest = root.digest();
    Ok(Ingested {
        root,
        digest,
        stored: progress.stored.load(Ordering::Relaxed),
        omitted: source.omitted(),
    })
}

fn run_worker(
    work: &parking_lot::Mutex<Receiver<Batch>>,
    answers: &SyncSender<Answer>,
    keeper: &dyn Keeper,
    progress: &Progress,
) {
    loop {
        let next = work.lock().recv();
        let Ok(batch) = next else { return };
        let block = batch.block;
        let mut chunks: Vec<(Verified, ChunkOrigin)> = Vec::with_capacity(batch.chunks.len());
        let mut last = 0..0;
        for (range, origin) in batch.chunks {
            // The chunks of a hole are one range of the block.
            let chunk = match chunks.last() {
                Some((same, _)) if range == last => same.clone(),
                _ => Verified::new(block.slice(range.clone())),
            };
            last = range;
            chunks.push((chunk, origin));
        }
        drop(block);
        let refs = chunks
            .iter()
            .map(|(chunk, _)| ChunkRef {
                id: chunk.id,
                len: chunk.bytes.len() as u32,
            })
            .collect();
        let answer = keeper.keep(&chunks).map(|stored| {
            progress.stored.fetch_add(stored, Ordering::Relaxed);
            refs
        });
        if answers.send((batch.number, answer)).is_err() {
            return;
        }
    }
}

//! Ingest: reads a source once, cuts, hashes, squeezes and keeps its content, and builds its
//! manifest.
//!
//! One thread reads and cuts (both must be in order); as many workers as there are cores hash, look
//! up, compress and store batches of chunks; their answers are put back in order for the manifest.
//! Batches in flight are bounded, so memory does not grow with the artifact. Nothing is visible
//! until the caller records the root manifest in the catalogue: a publish that fails leaves chunks
//! that nothing names, which `gc` takes away and a second try reuses.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use bytes::Bytes;

use crate::bloom::BloomFilter;
use crate::chunk::{Chunking, DEFAULT_CHUNKING, Hash};
use crate::frame::{Frame, Verified};
use crate::manifest::{Builder, ChunkRef, Digest, Entry, EntryBody, FileInfo, Root};
use crate::source::{Content, Source, SourceBody, SourceEntry};
use crate::store::Store;
use base::buffers::Buffers;
use base::durable;
use base::fault::{Fault, IoContext};
use base::job_progress::JobProgress;
use base::limits::{CHUNK_BYTES_MAX, FORECAST_BYTES_MIN, INGEST_BATCH_BYTES, INGEST_BATCHES_MAX};
use base::names::{Kind, RelPath};
use base::omitted::Omitted;

// A file that is one chunk must fit in a batch.
const _: () = assert!(CHUNK_BYTES_MAX <= INGEST_BATCH_BYTES);

/// How often a job is told how far its reading is.
const REPORT_EVERY: Duration = Duration::from_millis(200);

/// How far a publish is, for whoever watches.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes read so far.
    pub read: AtomicU64,
    /// Bytes that the store did not have, as stored.
    pub stored: AtomicU64,
    /// Bytes that a file takes for which the store has no room; 0: none is known to.
    pub wanted: AtomicU64,
    /// The job that this is part of, which somebody may cancel.
    job: Option<Arc<JobProgress>>,
}

impl Progress {
    fn check(&self) -> Result<(), Fault> {
        self.job.as_ref().map_or(Ok(()), |job| job.check())
    }
}

/// Runs `work` on this thread, tells the job's watchers how far its reading is, and adds what it
/// stored.
pub fn reported<T>(watched: &Arc<JobProgress>, work: impl FnOnce(&Progress) -> T) -> T {
    let counted = Progress {
        job: Some(watched.clone()),
        ..Progress::default()
    };
    std::thread::scope(|scope| {
        let (done, ended) = sync_channel::<()>(0);
        let counted = &counted;
        scope.spawn(move || {
            while ended
                .recv_timeout(REPORT_EVERY)
                .is_err_and(|e| e == RecvTimeoutError::Timeout)
            {
                watched
                    .bytes
                    .store(counted.read.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        });
        let result = work(counted);
        drop(done);
        watched
            .stored
            .fetch_add(counted.stored.load(Ordering::Relaxed), Ordering::Relaxed);
        watched
            .wanted
            .store(counted.wanted.load(Ordering::Relaxed), Ordering::Relaxed);
        result
    })
}

/// What came of it.
#[derive(Debug)]
pub struct Ingested {
    /// The root manifest.
    pub root: Root,
    /// Its digest.
    pub digest: Digest,
    /// Bytes that the store did not have, as stored.
    pub stored: u64,
    /// What the source left out.
    pub omitted: Omitted,
}

/// Where a chunk's content came from: what a keeper may note instead of the bytes.
#[derive(Debug, Clone)]
pub struct ChunkOrigin {
    /// The entry's number in the manifest.
    pub entry: u64,
    /// Where the chunk begins in the entry's file, bytes.
    pub offset: u64,
}

/// Keeps the content of chunks: the hub's store keeps the bytes, a site notes where they lie.
pub trait Keeper: Sync {
    /// Keeps these chunks. Returns the bytes that it took.
    fn keep(&self, chunks: &[(Verified, ChunkOrigin)]) -> Result<u64, Fault>;
    /// PushedManifest of every file, once all its chunks are kept.
    fn file(&self, number: u64, path: &RelPath, file: &FileInfo) -> Result<(), Fault>;
    /// Makes what was kept durable.
    fn flush(&self) -> Result<(), Fault>;
    /// Fails with `no_space` where it has no room for so many bytes more.
    fn check_room_for(&self, _bytes: u64) -> Result<(), Fault> {
        Ok(())
    }
    /// The bytes that [`Keeper::keep`] would take for these chunks, of which none is twice among
    /// them.
    fn would_take(&self, _chunks: &[Verified]) -> Result<u64, Fault> {
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

    fn would_take(&self, chunks: &[Verified]) -> Result<u64, Fault> {
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

/// Bytes of entries that wait for the names of their chunks: more than belong to the blocks on
/// their way, as a rule.
const WAITING_BYTES_MAX: usize = 8 << 20;

/// A run of cut chunks on its way to a worker: bytes read behind each other, and where each chunk
/// lies in them.
struct Batch {
    number: u64,
    block: Bytes,
    chunks: Vec<(Range<usize>, ChunkOrigin)>,
}

type Answer = (u64, Result<Vec<ChunkRef>, Fault>);

/// Reads `source` in. Pages go to `pages`, content to `keeper`. Runs on the calling thread and a
/// few of its own.
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
        // `batches` is moved in, so that the workers end with this whatever comes of it.
        read_all(
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
        let chunks: Vec<(Verified, ChunkOrigin)> = batch
            .chunks
            .into_iter()
            .map(|(range, origin)| (Verified::new(block.slice(range)), origin))
            .collect();
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

/// An entry that waits for the names of its chunks.
struct Waiting {
    entry: SourceEntry,
    /// BLAKE3 of the whole file; of a file of one chunk the chunk's name says it.
    hash: Option<Hash>,
    /// Whether it is still being cut.
    open: bool,
    chunks_left: usize,
    chunks: Vec<ChunkRef>,
}

struct Reading<'a, 'b> {
    builder: Builder<'a>,
    keeper: &'b dyn Keeper,
    batches: SyncSender<Batch>,
    results: Receiver<Answer>,
    progress: &'b Progress,
    chunking: Chunking,
    /// What was read and not handed over: chunks up to `cut`, what is not cut yet up to `filled`,
    /// then room.
    block: Vec<u8>,
    filled: usize,
    cut: usize,
    chunks: Vec<(Range<usize>, ChunkOrigin)>,
    buffers: Buffers,
    sent: u64,
    answered: u64,
    /// Answers that came before their turn.
    early: BTreeMap<u64, Vec<ChunkRef>>,
    waiting: VecDeque<Waiting>,
    /// Bytes of memory that these take, without their chunks, about.
    waiting_bytes: usize,
    entries: u64,
    built: u64,
}

#[expect(clippy::too_many_arguments, reason = "all of it goes into one struct")]
fn read_all(
    chunking: Chunking,
    source: &mut dyn Source,
    kind: Kind,
    pages: &Store,
    keeper: &dyn Keeper,
    progress: &Progress,
    batches: SyncSender<Batch>,
    results: Receiver<Answer>,
) -> Result<Root, Fault> {
    let mut sink = |page: Verified| pages.put(&Frame::encode(&page)).map(|_| ());
    let mut reading = Reading {
        builder: Builder::new(chunking, &mut sink),
        keeper,
        batches,
        results,
        progress,
        chunking,
        block: vec![0; INGEST_BATCH_BYTES],
        filled: 0,
        cut: 0,
        chunks: Vec::new(),
        buffers: Buffers::new(INGEST_BATCHES_MAX, INGEST_BATCH_BYTES, INGEST_BATCH_BYTES),
        sent: 0,
        answered: 0,
        early: BTreeMap::new(),
        waiting: VecDeque::new(),
        waiting_bytes: 0,
        entries: 0,
        built: 0,
    };
    while let Some(entry) = source.next()? {
        reading.read(entry, source)?;
    }
    reading.send()?;
    while reading.answered < reading.sent {
        reading.wait()?;
    }
    reading.build()?;
    reading.builder.finish(kind, source.info())
}

impl Reading<'_, '_> {
    fn read(&mut self, entry: SourceEntry, source: &mut dyn Source) -> Result<(), Fault> {
        self.progress.check()?;
        let (path, body, identity) = (
            entry.path.clone(),
            entry.body.clone(),
            entry.identity.clone(),
        );
        let scratch = match &body {
            SourceBody::File {
                content: Content::Scratch(file),
                ..
            } => Some(file.clone()),
            _ => None,
        };
        self.waiting_bytes += weight(&entry);
        self.waiting.push_back(Waiting {
            entry,
            hash: None,
            open: true,
            chunks_left: 0,
            chunks: Vec::new(),
        });
        let hash = match body {
            SourceBody::File { size, content } => {
                self.check_room(&path, size, &content)?;
                let mut from = open(&content, size, |file| source.opened(file))?;
                self.cut(&path, size, &mut *from)?
            }
            SourceBody::Dir | SourceBody::Symlink(_) => None,
        };
        // What was read is what the source saw only if nobody wrote to the file since.
        if let Some(identity) = identity
            && !identity.holds()?
        {
            return Err(changed(
                &path,
                &format!(
                    "{} has another time or size than before",
                    identity.file().display()
                ),
            ));
        }
        if let Some(file) = scratch {
            std::fs::remove_file(&file).at(format_args!("remove {}", file.display()))?;
        }
        if let Some(waiting) = self.waiting.back_mut() {
            (waiting.hash, waiting.open) = (hash, false);
        }
        self.entries += 1;
        self.build()?;
        // Behind a small file, whose block is not full, any number of entries could gather that
        // have no content.
        if self.waiting_bytes >= WAITING_BYTES_MAX {
            self.send()?;
            while self.waiting_bytes >= WAITING_BYTES_MAX && self.answered < self.sent {
                self.wait()?;
                self.build()?;
            }
        }
        Ok(())
    }

    /// A large file that will not fit is told before any of it is kept. What it takes only its
    /// content tells: what is kept already is not kept again, and what can be compressed takes
    /// less. So one that might not fit is read once more than others are.
    fn check_room(&self, path: &RelPath, size: u64, content: &Content) -> Result<(), Fault> {
        if size < FORECAST_BYTES_MIN || self.keeper.check_room_for(size).is_ok() {
            return Ok(());
        }
        let (mut from, mut takes, mut seen) = (
            open(content, size, |_| {})?.take(size),
            0,
            BloomFilter::default(),
        );
        let (mut block, mut filled) = (vec![0; INGEST_BATCH_BYTES], 0);
        loop {
            self.progress.check()?;
            filled += read_all_of(&mut from, &mut block[filled..])
                .at(format_args!("read {:?}", path.as_str()))?;
            let is_last = filled < block.len();
            let (mut cut, mut chunks) = (0, Vec::new());
            while cut < filled && (is_last || filled - cut >= self.chunking.max as usize) {
                let len = self.chunking.cut(&block[cut..filled]);
                chunks.push(Verified::new(Bytes::copy_from_slice(
                    &block[cut..cut + len],
                )));
                cut += len;
            }
            chunks.retain(|chunk| seen.is_new(&chunk.id));
            takes += self.keeper.would_take(&chunks)?;
            if is_last {
                break;
            }
            block.copy_within(cut..filled, 0);
            filled -= cut;
        }
        self.keeper.check_room_for(takes).map_err(|fault| {
            self.progress.wanted.store(takes, Ordering::Relaxed);
            fault.context(format!("the file {:?}", path.as_str()))
        })
    }

    /// Cuts a file's content into batches. Returns its hash, unless it is one chunk and so named by
    /// that.
    fn cut(
        &mut self,
        path: &RelPath,
        size: u64,
        from: &mut dyn Read,
    ) -> Result<Option<Hash>, Fault> {
        if size == 0 {
            self.fill(path, 0, 0, from)?;
            return Ok(Some(Hash::of(b"")));
        }
        if !self.builder.lists_chunks(size) {
            if self.filled + size as usize > INGEST_BATCH_BYTES {
                self.send()?;
            }
            self.fill(path, size, 0, from)?;
            self.take(size as usize, 0);
            return Ok(None);
        }
        let mut hasher = blake3::Hasher::new();
        let (mut read, mut offset) = (0u64, 0u64);
        while read < size || self.cut < self.filled {
            let start = self.filled;
            read = self.fill(path, size, read, from)?;
            hasher.update(&self.block[start..self.filled]);
            while self.cut < self.filled
                && (read == size || self.filled - self.cut >= self.chunking.max as usize)
            {
                let len = self.chunking.cut(&self.block[self.cut..self.filled]);
                self.take(len, offset);
                offset += len as u64;
            }
            if self.filled >= INGEST_BATCH_BYTES {
                self.send()?;
            }
        }
        Ok(Some(Hash(*hasher.finalize().as_bytes())))
    }

    /// Reads of a file of `size` bytes, of which `read` were read, as much as the block takes.
    /// Returns how many are read.
    fn fill(
        &mut self,
        path: &RelPath,
        size: u64,
        read: u64,
        from: &mut dyn Read,
    ) -> Result<u64, Fault> {
        self.progress.check()?;
        let room = INGEST_BATCH_BYTES - self.filled;
        let want = (size - read).min(room as u64) as usize;
        let mut read_into = |buffer: &mut [u8]| {
            read_all_of(from, buffer)
                .map_err(|e| Fault::io(format_args!("read {:?}", path.as_str()), &e))
        };
        let got = read_into(&mut self.block[self.filled..self.filled + want])?;
        self.filled += got;
        self.progress.read.fetch_add(got as u64, Ordering::Relaxed);
        let read = read + got as u64;
        // At the end one byte more, to see that the file has not grown.
        let more = if read == size {
            read_into(&mut [0])? as u64
        } else {
            0
        };
        if got < want || more > 0 {
            let read = read + more;
            return Err(changed(
                path,
                &format!(
                    "it had {size} bytes when it was listed, and {read} or more when it was read"
                ),
            ));
        }
        Ok(read)
    }

    /// The next bytes that are not cut yet become a chunk.
    fn take(&mut self, len: usize, offset: u64) {
        if let Some(waiting) = self.waiting.back_mut() {
            waiting.chunks_left += 1;
        }
        self.chunks.push((
            self.cut..self.cut + len,
            ChunkOrigin {
                entry: self.entries,
                offset,
            },
        ));
        self.cut += len;
    }

    /// Hands the chunks over. What is not cut yet begins the next block.
    fn send(&mut self) -> Result<(), Fault> {
        if self.chunks.is_empty() {
            return Ok(());
        }
        let mut next = self.buffers.take(INGEST_BATCH_BYTES);
        next.resize(INGEST_BATCH_BYTES, 0);
        let rest = self.cut..self.filled;
        next[..rest.len()].copy_from_slice(&self.block[rest.clone()]);
        (self.cut, self.filled) = (0, rest.len());
        let block = std::mem::replace(&mut self.block, next);
        let batch = Batch {
            number: self.sent,
            block: self.buffers.lend(block),
            chunks: std::mem::take(&mut self.chunks),
        };
        self.sent += 1;
        self.batches
            .send(batch)
            .map_err(|_| Fault::internal("the ingest workers ended early"))?;
        while self.sent - self.answered > INGEST_BATCHES_MAX as u64 {
            self.wait()?;
        }
        Ok(())
    }

    /// Waits for one answer, and puts what is in turn where it belongs.
    fn wait(&mut self) -> Result<(), Fault> {
        let (number, answer) = self
            .results
            .recv()
            .map_err(|_| Fault::internal("the ingest workers ended early"))?;
        self.early.insert(number, answer?);
        while let Some(refs) = self.early.remove(&self.answered) {
            self.answered += 1;
            let mut refs = refs.into_iter();
            for waiting in &mut self.waiting {
                if waiting.chunks_left == 0 {
                    continue;
                }
                let before = waiting.chunks.len();
                waiting
                    .chunks
                    .extend(refs.by_ref().take(waiting.chunks_left));
                waiting.chunks_left -= waiting.chunks.len() - before;
                if waiting.chunks_left > 0 {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Gives the manifest every entry at the front whose chunks are all named.
    fn build(&mut self) -> Result<(), Fault> {
        while self
            .waiting
            .front()
            .is_some_and(|w| w.chunks_left == 0 && !w.open)
        {
            let Some(Waiting {
                entry,
                hash,
                chunks,
                ..
            }) = self.waiting.pop_front()
            else {
                break;
            };
            self.waiting_bytes -= weight(&entry);
            let body = match entry.body {
                SourceBody::Dir => EntryBody::Dir,
                SourceBody::Symlink(target) => EntryBody::Symlink(target),
                SourceBody::File { size, .. } => {
                    let hash = hash
                        .or(chunks.first().map(|c| c.id))
                        .ok_or_else(|| Fault::internal("a file without a hash"))?;
                    let file = FileInfo { size, hash };
                    self.keeper.file(self.built, &entry.path, &file)?;
                    EntryBody::File(file)
                }
            };
            let chunks = if hash.is_some() { &chunks[..] } else { &[] };
            self.builder.push(
                &Entry {
                    path: entry.path,
                    mode: entry.mode & 0o7777,
                    body,
                },
                chunks,
            )?;
            self.built += 1;
        }
        Ok(())
    }
}

/// Bytes of memory that an entry takes, about.
fn weight(entry: &SourceEntry) -> usize {
    let own = match &entry.body {
        SourceBody::Symlink(target) => target.len(),
        SourceBody::File {
            content: Content::Memory(bytes),
            ..
        } => bytes.len(),
        SourceBody::File { .. } | SourceBody::Dir => 0,
    };
    size_of::<Waiting>() + 2 * entry.path.as_str().len() + own
}

/// Reads until the buffer is full or nothing follows.
fn read_all_of(from: &mut dyn Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

/// Opens what an entry holds. `opened` gets the file that the source gave as a whole.
fn open(
    content: &Content,
    size: u64,
    opened: impl FnOnce(&File),
) -> Result<Box<dyn Read + '_>, Fault> {
    let open =
        |path: &Path| durable::open_regular(path).at(format_args!("read {}", path.display()));
    Ok(match content {
        Content::Memory(bytes) => Box::new(&bytes[..]),
        Content::File(from) => {
            let file = open(from)?;
            opened(&file);
            Box::new(file)
        }
        Content::Scratch(from) => Box::new(open(from)?),
        Content::Range { file: from, offset } => {
            let mut file = open(from)?;
            file.seek(SeekFrom::Start(*offset)).at(from.display())?;
            Box::new(file.take(size))
        }
    })
}

fn changed(path: &RelPath, how: &str) -> Fault {
    Fault::integrity(format!(
        "the file {:?} changed while it was read: {how}",
        path.as_str()
    ))
    .with_next("publish again when nothing writes to it any more")
}

#[cfg(test)]
mod tests;

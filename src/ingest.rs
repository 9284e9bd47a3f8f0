//! Ingest: reads a source once, cuts, hashes, squeezes and keeps its content, and builds its manifest.
//!
//! One thread reads and cuts (both must be in order); as many workers as there are cores hash, look up, squeeze and
//! store batches of chunks; their answers are put back in order for the manifest. Batches in flight are bounded, so
//! memory does not grow with the artifact. Nothing is visible until the caller records the root manifest in the
//! catalogue: a publish that fails leaves chunks that nothing names, which `gc` takes away and a second try reuses.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::{Bytes, BytesMut};

use crate::chunk::{Chunking, DEFAULT_CHUNKING, Hash};
use crate::fault::{Fault, IoContext};
use crate::frame::{Frame, Verified};
use crate::limits::{INGEST_BATCH_BYTES, INGEST_BATCHES_MAX};
use crate::manifest::{Builder, ChunkRef, Digest, Entry, EntryBody, FileInfo, Root};
use crate::names::{Kind, RelPath};
use crate::source::{Content, Source, SourceBody, SourceEntry};
use crate::store::Store;

/// How far a publish is, for whoever watches.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes read so far.
    pub read: AtomicU64,
    /// Bytes that the store did not have, as stored.
    pub stored: AtomicU64,
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
}

/// Where a chunk's content came from: what a keeper may note instead of the bytes.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The entry's number in the manifest.
    pub entry: u64,
    /// Where the chunk begins in the entry's file, bytes.
    pub offset: u64,
}

/// Keeps the content of chunks: the hub's store keeps the bytes, a site notes where they lie.
pub trait Keeper: Sync {
    /// Keeps these chunks. Returns the bytes that it took.
    fn keep(&self, chunks: &[(Verified, Origin)]) -> Result<u64, Fault>;
    /// Told of every file, once all its chunks are kept.
    fn file(&self, number: u64, path: &RelPath, file: &FileInfo) -> Result<(), Fault>;
    /// Makes what was kept durable.
    fn flush(&self) -> Result<(), Fault>;
}

impl Keeper for Store {
    fn keep(&self, chunks: &[(Verified, Origin)]) -> Result<u64, Fault> {
        let ids: Vec<Hash> = chunks.iter().map(|(chunk, _)| chunk.id).collect();
        let mut stored = 0;
        for ((chunk, _), here) in chunks.iter().zip(self.has_many(&ids)?) {
            if !here {
                stored += self.append(&Frame::encode(chunk))?;
            }
        }
        Ok(stored)
    }

    fn file(&self, _: u64, _: &RelPath, _: &FileInfo) -> Result<(), Fault> {
        Ok(())
    }

    fn flush(&self) -> Result<(), Fault> {
        Store::flush(self)
    }
}

/// A run of cut chunks on its way to a worker.
struct Batch {
    number: u64,
    chunks: Vec<(Bytes, Origin)>,
}

type Answer = (u64, Result<Vec<ChunkRef>, Fault>);

/// Reads `source` in. Pages go to `pages`, content to `keeper`. Runs on the calling thread and a few of its own.
pub fn ingest(source: &mut dyn Source, kind: Kind, pages: &Store, keeper: &dyn Keeper, progress: &Progress) -> Result<Ingested, Fault> {
    let workers = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8);
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
        read_all(source, kind, pages, keeper, progress, batches, results)
    })?;
    keeper.flush()?;
    pages.flush()?;
    let digest = root.digest();
    Ok(Ingested { root, digest, stored: progress.stored.load(Ordering::Relaxed) })
}

fn run_worker(work: &parking_lot::Mutex<Receiver<Batch>>, answers: &SyncSender<Answer>, keeper: &dyn Keeper, progress: &Progress) {
    loop {
        let next = work.lock().recv();
        let Ok(batch) = next else { return };
        let chunks: Vec<(Verified, Origin)> = batch.chunks.into_iter().map(|(bytes, origin)| (Verified::new(bytes), origin)).collect();
        let refs = chunks.iter().map(|(chunk, _)| ChunkRef { id: chunk.id, len: chunk.bytes.len() as u32 }).collect();
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
    batch: Vec<(Bytes, Origin)>,
    batch_bytes: usize,
    sent: u64,
    answered: u64,
    /// Answers that came before their turn.
    early: BTreeMap<u64, Vec<ChunkRef>>,
    waiting: VecDeque<Waiting>,
    entries: u64,
    built: u64,
}

fn read_all(
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
        builder: Builder::new(DEFAULT_CHUNKING, &mut sink),
        keeper,
        batches,
        results,
        progress,
        chunking: DEFAULT_CHUNKING,
        batch: Vec::new(),
        batch_bytes: 0,
        sent: 0,
        answered: 0,
        early: BTreeMap::new(),
        waiting: VecDeque::new(),
        entries: 0,
        built: 0,
    };
    while let Some(entry) = source.next()? {
        reading.read(entry)?;
    }
    reading.send()?;
    while reading.answered < reading.sent {
        reading.wait()?;
    }
    reading.build()?;
    reading.builder.finish(kind, source.info())
}

impl Reading<'_, '_> {
    fn read(&mut self, entry: SourceEntry) -> Result<(), Fault> {
        let (path, body) = (entry.path.clone(), entry.body.clone());
        self.waiting.push_back(Waiting { entry, hash: None, open: true, chunks_left: 0, chunks: Vec::new() });
        let hash = match body {
            SourceBody::File { size, content: Content::Memory(bytes) } => self.cut(&path, size, &mut &bytes[..])?,
            SourceBody::File { size, content: Content::Range { file: from, offset } } => {
                let mut file = open(&from)?;
                file.seek(SeekFrom::Start(offset)).at(from.display())?;
                self.cut(&path, size, &mut file.take(size))?
            }
            SourceBody::File { size, content: Content::File(from) } => {
                let mut file = open(&from)?;
                let before = file.metadata().at(from.display())?;
                let hash = self.cut(&path, size, &mut file)?;
                let after = file.metadata().at(from.display())?;
                if (before.len(), before.mtime(), before.mtime_nsec()) != (after.len(), after.mtime(), after.mtime_nsec()) {
                    return Err(changed(&path, "its time or size changed"));
                }
                hash
            }
            SourceBody::Dir | SourceBody::Symlink(_) => None,
        };
        if let Some(waiting) = self.waiting.back_mut() {
            (waiting.hash, waiting.open) = (hash, false);
        }
        self.entries += 1;
        self.build()
    }

    /// Cuts a file's content into batches. Returns its hash, unless it is one chunk and so named by that.
    fn cut(&mut self, path: &RelPath, size: u64, from: &mut dyn Read) -> Result<Option<Hash>, Fault> {
        let one = !self.builder.lists_chunks(size);
        let mut hasher = (!one).then(blake3::Hasher::new);
        let mut buffer = BytesMut::new();
        let (mut offset, mut total) = (0u64, 0u64);
        let block = if one { size as usize + 1 } else { INGEST_BATCH_BYTES + self.chunking.max as usize };
        loop {
            let mut ended = false;
            let start = buffer.len();
            // No more than is left, and a byte to see that the file has not grown.
            let left = (size - total).min(block as u64) as usize + 1;
            buffer.resize(block.min(start + left).max(start), 0);
            let mut filled = start;
            while filled < buffer.len() {
                match from.read(&mut buffer[filled..]) {
                    Ok(0) => {
                        ended = true;
                        break;
                    }
                    Ok(n) => filled += n,
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(e) => return Err(Fault::io(format_args!("read {:?}", path.as_str()), &e)),
                }
            }
            buffer.truncate(filled);
            total += (filled - start) as u64;
            self.progress.read.fetch_add((filled - start) as u64, Ordering::Relaxed);
            if total > size || (ended && total < size) {
                return Err(changed(path, &format!("it had {size} bytes when it was listed, and {total} or more when it was read")));
            }
            if let Some(hasher) = &mut hasher {
                hasher.update(&buffer[start..]);
            }
            while !buffer.is_empty() && (ended || buffer.len() >= self.chunking.max as usize) {
                let len = if one { buffer.len() } else { self.chunking.cut(&buffer) };
                let chunk = buffer.split_to(len).freeze();
                let origin = Origin { entry: self.entries, offset };
                offset += len as u64;
                self.take(chunk, origin)?;
            }
            if ended || total == size && buffer.is_empty() {
                break;
            }
        }
        Ok(match hasher {
            Some(hasher) => Some(Hash(*hasher.finalize().as_bytes())),
            None => (size == 0).then(|| Hash::of(b"")),
        })
    }

    fn take(&mut self, chunk: Bytes, origin: Origin) -> Result<(), Fault> {
        if let Some(waiting) = self.waiting.back_mut() {
            waiting.chunks_left += 1;
        }
        self.batch_bytes += chunk.len();
        self.batch.push((chunk, origin));
        if self.batch_bytes >= INGEST_BATCH_BYTES { self.send() } else { Ok(()) }
    }

    fn send(&mut self) -> Result<(), Fault> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let batch = Batch { number: self.sent, chunks: std::mem::take(&mut self.batch) };
        self.batch_bytes = 0;
        self.sent += 1;
        self.batches.send(batch).map_err(|_| Fault::internal("the ingest workers ended early"))?;
        while self.sent - self.answered > INGEST_BATCHES_MAX as u64 {
            self.wait()?;
        }
        Ok(())
    }

    /// Waits for one answer, and puts what is in turn where it belongs.
    fn wait(&mut self) -> Result<(), Fault> {
        let (number, answer) = self.results.recv().map_err(|_| Fault::internal("the ingest workers ended early"))?;
        self.early.insert(number, answer?);
        while let Some(refs) = self.early.remove(&self.answered) {
            self.answered += 1;
            let mut refs = refs.into_iter();
            for waiting in &mut self.waiting {
                if waiting.chunks_left == 0 {
                    continue;
                }
                let before = waiting.chunks.len();
                waiting.chunks.extend(refs.by_ref().take(waiting.chunks_left));
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
        while self.waiting.front().is_some_and(|w| w.chunks_left == 0 && !w.open) {
            let Some(Waiting { entry, hash, chunks, .. }) = self.waiting.pop_front() else { break };
            let body = match entry.body {
                SourceBody::Dir => EntryBody::Dir,
                SourceBody::Symlink(target) => EntryBody::Symlink(target),
                SourceBody::File { size, .. } => {
                    let hash = hash.or(chunks.first().map(|c| c.id)).ok_or_else(|| Fault::internal("a file without a hash"))?;
                    let file = FileInfo { size, hash };
                    self.keeper.file(self.built, &entry.path, &file)?;
                    EntryBody::File(file)
                }
            };
            let chunks = if hash.is_some() { &chunks[..] } else { &[] };
            self.builder.push(&Entry { path: entry.path, mode: entry.mode & 0o7777, body }, chunks)?;
            self.built += 1;
        }
        Ok(())
    }
}

fn open(path: &Path) -> Result<File, Fault> {
    File::open(path).at(format_args!("read {}", path.display()))
}

fn changed(path: &RelPath, how: &str) -> Fault {
    Fault::integrity(format!("the file {:?} changed while it was read: {how}", path.as_str()))
        .with_next("publish again when nothing writes to it any more")
}

//! The one thread of an ingest that reads: cuts the entries of a source into chunks, gives them to
//! the workers in batches, and builds the manifest from the results, which it puts back in order.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender};

use bytes::Bytes;

use super::holes::{Holes, Input, Plain, WholeFile};
use super::{Answer, Batch, ChunkOrigin, Keeper, Progress};
use crate::bloom::BloomFilter;
use crate::chunk::{Chunking, Hash};
use crate::file_identity::{Comparison, FileIdentity};
use crate::frame::{Frame, Verified};
use crate::manifest::{Builder, ChunkRef, Entry, EntryBody, FileInfo, Root};
use crate::source::{Content, Source, SourceBody, SourceEntry};
use crate::store::Store;
use base::buffers::Buffers;
use base::durable;
use base::fault::{Fault, IoContext};
use base::limits::{FORECAST_BYTES_MIN, INGEST_BATCH_BYTES, INGEST_BATCHES_MAX};
use base::names::{Kind, RelPath};
use base::text;

/// How often a file is read again whose change time does not stay the same.
const REREADS_MAX: usize = 4;
/// The bytes that are read at once then.
const REREAD_BYTES: usize = 256 << 10;

/// The chunks of a hole that are sent together.
const SAME_CHUNKS_MAX: usize = 4096;

/// The zeros of a hole that are hashed at once.
static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// The limit on the memory of entries that wait for the ids of their chunks. Usually more than the
/// entries of all batches in flight need.
const WAITING_BYTES_MAX: usize = 8 << 20;

/// An entry that waits for the ids of its chunks.
struct Waiting {
    entry: SourceEntry,
    /// The BLAKE3 of the file; `None` for a file of one chunk, whose id is that hash.
    hash: Option<Hash>,
    /// Whether the file is still being cut.
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
    /// Bytes that were read and not sent: chunks up to `cut`, uncut bytes up to `filled`, then free
    /// space.
    block: Vec<u8>,
    filled: usize,
    cut: usize,
    chunks: Vec<(Range<usize>, ChunkOrigin)>,
    buffers: Buffers,
    sent: u64,
    answered: u64,
    /// Results that arrived before those of earlier batches.
    out_of_order: BTreeMap<u64, Vec<ChunkRef>>,
    waiting: VecDeque<Waiting>,
    /// The approximate memory of the waiting entries, without their chunks.
    waiting_bytes: usize,
    entries: u64,
    built: u64,
    /// The source checked the files before they are read here, as an image's blobs: what is read
    /// must be what was checked, and not only the same for the whole time.
    checked_before: bool,
}

#[expect(clippy::too_many_arguments, reason = "all of it goes into one struct")]
pub(super) fn read_all(
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
        out_of_order: BTreeMap::new(),
        waiting: VecDeque::new(),
        waiting_bytes: 0,
        entries: 0,
        built: 0,
        checked_before: kind == Kind::Image,
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
        self.waiting_bytes += memory_of(&entry);
        self.waiting.push_back(Waiting {
            entry,
            hash: None,
            open: true,
            chunks_left: 0,
            chunks: Vec::new(),
        });
        let hash = match &body {
            SourceBody::File { size, content } => {
                self.check_room(&path, *size, content)?;
                let mut from = open(content, *size, |file| source.opened(file))?;
                self.cut(&path, *size, &mut *from)?
            }
            SourceBody::Dir | SourceBody::Symlink(_) => None,
        };
        // The bytes read are those that the source saw only if the file has not changed since.
        if let Some(identity) = identity {
            self.check_unchanged(&path, &body, identity, hash)?;
        }
        if let Some(file) = scratch {
            std::fs::remove_file(&file).at(format_args!("remove {}", file.display()))?;
        }
        if let Some(waiting) = self.waiting.back_mut() {
            (waiting.hash, waiting.open) = (hash, false);
        }
        self.entries += 1;
        self.build()?;
        // After a small file, whose block is not full, any number of entries without content could
        // wait.
        if self.waiting_bytes >= WAITING_BYTES_MAX {
            self.send()?;
            while self.waiting_bytes >= WAITING_BYTES_MAX && self.answered < self.sent {
                self.wait()?;
                self.build()?;
            }
        }
        Ok(())
    }

    /// Rejects a file that changed while it was read. If only its change time differs, the content
    /// is read again: the bytes count as long as they are the same.
    fn check_unchanged(
        &self,
        path: &RelPath,
        body: &SourceBody,
        mut identity: FileIdentity,
        hash: Option<Hash>,
    ) -> Result<(), Fault> {
        for _ in 0..REREADS_MAX {
            let now = match identity.compare()? {
                Comparison::Same => return Ok(()),
                Comparison::Changed => break,
                Comparison::Suspect(_) if self.checked_before => break,
                Comparison::Suspect(now) => now,
            };
            let (size, offset) = match body {
                SourceBody::File {
                    size,
                    content: Content::File(_),
                } => (*size, 0),
                SourceBody::File {
                    size,
                    content: Content::Range { offset, .. },
                } => (*size, *offset),
                _ => break,
            };
            // A file of one chunk is the last one in the block.
            let only = || {
                self.chunks
                    .last()
                    .map(|(range, _)| &self.block[range.clone()])
            };
            let read = hash.or_else(|| only().map(Hash::of));
            if read != Some(self.hash_of(now.file(), offset, size)?) {
                break;
            }
            identity = now;
        }
        Err(changed(
            path,
            &format!(
                "the time, the size or the content of {} differs from the start of the read",
                identity.file().display()
            ),
        ))
    }

    /// Hashes a range of a file, or what exists of it.
    fn hash_of(&self, file: &Path, offset: u64, size: u64) -> Result<Hash, Fault> {
        let what = || format!("read {}", file.display());
        let mut from = durable::open_regular(file).at(what())?;
        from.seek(SeekFrom::Start(offset)).at(what())?;
        let mut from = from.take(size);
        let (mut hasher, mut buffer) = (blake3::Hasher::new(), vec![0; REREAD_BYTES]);
        loop {
            self.progress.check()?;
            match read_all_of(&mut from, &mut buffer).at(what())? {
                0 => return Ok(Hash(*hasher.finalize().as_bytes())),
                read => hasher.update(&buffer[..read]),
            };
        }
    }

    /// Rejects a large file that does not fit before any of it is stored. Its stored size depends
    /// on the content: chunks that are already stored need no space, and compressed chunks need
    /// less. Therefore a file that may not fit is read one additional time.
    fn check_room(&self, path: &RelPath, size: u64, content: &Content) -> Result<(), Fault> {
        if size < FORECAST_BYTES_MIN || self.keeper.check_room_for(size).is_ok() {
            return Ok(());
        }
        let takes = self.measured(path, size, content)?;
        self.keeper.check_room_for(takes).map_err(|fault| {
            self.progress.wanted.store(takes, Ordering::Relaxed);
            fault.context(format!("the file {:?}", path.as_str()))
        })
    }

    /// The bytes that storing a file takes. Reads it.
    fn measured(&self, path: &RelPath, size: u64, content: &Content) -> Result<u64, Fault> {
        let before = self.progress.job.as_ref().map(|job| job.what());
        if let Some(job) = &self.progress.job {
            let (path, size) = (path.as_str(), text::size(size));
            job.doing(format!(
                "reading {path:?} ({size}) to learn whether it fits"
            ));
        }
        let what = || format!("read {:?}", path.as_str());
        let mut from = open(content, size, |_| Ok(()))?;
        let (mut takes, mut seen) = (0, BloomFilter::default());
        let mut holes = Holes::new(self.chunking);
        let (mut block, mut filled, mut read) = (vec![0; INGEST_BATCH_BYTES], 0, 0);
        loop {
            self.progress.check()?;
            let offset = read - filled as u64;
            if let Some(count) = holes.chunks_at(&mut *from, offset, read, size) {
                if seen.is_new(&holes.zeros.id) {
                    takes += self
                        .keeper
                        .bytes_needed(std::slice::from_ref(&holes.zeros))?;
                }
                (read, filled) = (offset + count * holes.zeros.bytes.len() as u64, 0);
                from.move_to(read).at(what())?;
                continue;
            }
            let room = (size - read).min((block.len() - filled) as u64) as usize;
            let more = read_all_of(&mut *from, &mut block[filled..filled + room]).at(what())?;
            (filled, read) = (filled + more, read + more as u64);
            let is_last = more < room || read == size;
            let (mut cut, mut chunks) = (0, Vec::new());
            while cut < filled && (is_last || filled - cut >= self.chunking.max as usize) {
                let len = self.chunking.cut(&block[cut..filled]);
                chunks.push(Verified::new(Bytes::copy_from_slice(
                    &block[cut..cut + len],
                )));
                cut += len;
            }
            chunks.retain(|chunk| seen.is_new(&chunk.id));
            takes += self.keeper.bytes_needed(&chunks)?;
            if is_last {
                break;
            }
            block.copy_within(cut..filled, 0);
            filled -= cut;
        }
        if let (Some(job), Some(before)) = (&self.progress.job, before) {
            job.doing(before);
        }
        Ok(takes)
    }

    /// Cuts the content of a file into batches. Returns its hash, unless the file is one chunk,
    /// whose id is the hash.
    fn cut(
        &mut self,
        path: &RelPath,
        size: u64,
        from: &mut dyn Input,
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
        let mut holes = Holes::new(self.chunking);
        while read < size || self.cut < self.filled {
            if let Some(count) = holes.chunks_at(from, offset, read, size) {
                offset = self.take_zeros(&holes, count, offset, read, &mut hasher)?;
                read = offset;
                from.move_to(read)
                    .at(format_args!("read {:?}", path.as_str()))?;
                continue;
            }
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

    /// Reads from a file of `size` bytes, of which `read` bytes were read, as much as fits in the
    /// block. Returns how many bytes are read now.
    fn fill(
        &mut self,
        path: &RelPath,
        size: u64,
        read: u64,
        from: &mut dyn Input,
    ) -> Result<u64, Fault> {
        self.progress.check()?;
        let room = INGEST_BATCH_BYTES - self.filled;
        let wanted = (size - read).min(room as u64) as usize;
        let mut read_into = |buffer: &mut [u8]| {
            read_all_of(from, buffer)
                .map_err(|e| Fault::io(format_args!("read {:?}", path.as_str()), &e))
        };
        let filled_now = read_into(&mut self.block[self.filled..self.filled + wanted])?;
        self.filled += filled_now;
        self.progress
            .read
            .fetch_add(filled_now as u64, Ordering::Relaxed);
        let read = read + filled_now as u64;
        // At the end, try to read one more byte, to detect that the file has grown.
        let more = if read == size {
            read_into(&mut [0])? as u64
        } else {
            0
        };
        if filled_now < wanted || more > 0 {
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

    /// Makes a chunk of the next `len` uncut bytes.
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

    /// Makes `count` chunks of zeros at `offset`, of which the bytes before `read` are in the block.
    /// Returns where they end.
    fn take_zeros(
        &mut self,
        holes: &Holes,
        count: u64,
        mut offset: u64,
        mut read: u64,
        hasher: &mut blake3::Hasher,
    ) -> Result<u64, Fault> {
        let len = holes.zeros.bytes.len();
        let mut left = count;
        // The uncut bytes are zeros too.
        self.filled = self.cut;
        while left > 0 {
            if self.cut + len > INGEST_BATCH_BYTES || self.chunks.len() >= SAME_CHUNKS_MAX {
                self.send()?;
            }
            let now = left.min((SAME_CHUNKS_MAX - self.chunks.len()) as u64);
            self.block[self.cut..self.cut + len].fill(0);
            let range = self.cut..self.cut + len;
            for number in 0..now {
                let origin = ChunkOrigin {
                    entry: self.entries,
                    offset: offset + number * len as u64,
                };
                self.chunks.push((range.clone(), origin));
            }
            if let Some(waiting) = self.waiting.back_mut() {
                waiting.chunks_left += now as usize;
            }
            (self.cut, self.filled) = (range.end, range.end);
            (left, offset) = (left - now, offset + now * len as u64);
            while read < offset {
                self.progress.check()?;
                let zeros = (offset - read).min(ZEROS.len() as u64);
                hasher.update(&ZEROS[..zeros as usize]);
                self.progress.read.fetch_add(zeros, Ordering::Relaxed);
                read += zeros;
            }
        }
        Ok(offset)
    }

    /// Sends the chunks to a worker. Uncut bytes become the start of the next block.
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

    /// Waits for one result. Assigns the results that are next in order to their entries.
    fn wait(&mut self) -> Result<(), Fault> {
        let (number, answer) = self
            .results
            .recv()
            .map_err(|_| Fault::internal("the ingest workers ended early"))?;
        self.out_of_order.insert(number, answer?);
        while let Some(refs) = self.out_of_order.remove(&self.answered) {
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

    /// Adds to the manifest all entries at the front of the queue whose chunk ids are complete.
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
            self.waiting_bytes -= memory_of(&entry);
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
                    attributes: entry.attributes,
                },
                chunks,
            )?;
            self.built += 1;
        }
        Ok(())
    }
}

/// The approximate memory of an entry in bytes.
fn memory_of(entry: &SourceEntry) -> usize {
    let own = match &entry.body {
        SourceBody::Symlink(target) => target.len(),
        SourceBody::File {
            content: Content::Memory(bytes),
            ..
        } => bytes.len(),
        SourceBody::File { .. } | SourceBody::Dir => 0,
    };
    size_of::<Waiting>() + 2 * entry.path.as_str().len() + own + entry.attributes.xattr_bytes()
}

/// Reads until the buffer is full or the input ends.
fn read_all_of(from: &mut (impl Read + ?Sized), buffer: &mut [u8]) -> std::io::Result<usize> {
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

/// Opens the content of an entry. Calls `opened` if the content is, or is in, a file of the source.
pub(super) fn open(
    content: &Content,
    size: u64,
    opened: impl FnOnce(&File) -> Result<(), Fault>,
) -> Result<Box<dyn Input + '_>, Fault> {
    let open =
        |path: &Path| durable::open_regular(path).at(format_args!("read {}", path.display()));
    Ok(match content {
        Content::Memory(bytes) => Box::new(Plain(&bytes[..])),
        Content::File(from) => {
            let file = open(from)?;
            opened(&file)?;
            Box::new(WholeFile::new(file).at(from.display())?)
        }
        Content::Scratch(from) => Box::new(WholeFile::new(open(from)?).at(from.display())?),
        Content::Range { file: from, offset } => {
            let mut file = open(from)?;
            opened(&file)?;
            file.seek(SeekFrom::Start(*offset)).at(from.display())?;
            Box::new(Plain(file.take(size)))
        }
    })
}

fn changed(path: &RelPath, how: &str) -> Fault {
    Fault::integrity(format!(
        "the file {:?} changed while it was read: {how}",
        path.as_str()
    ))
    .with_next("publish again after the writer of the file has finished")
}

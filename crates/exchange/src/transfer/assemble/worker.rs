//! Writes chunks: verifies each, whether it was received or is local, and writes it.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SendError, SyncSender};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::{AssemblyContext, Counters, Dest, Done, Failure, Item, Job, Local, Whole};
use crate::chunk_index::{At, Intact, Reader};
use base::clock;
use base::durable;
use base::durable::write_parts;
use base::fault::{Code, Fault, IoContext};
use base::limits::REFUSED_CHUNKS_MAX;
use content::chunk::Hash;
use content::frame::{Frame, FrameError, Verified};
use content::manifest::{ChunkPosition, ChunkRef};
use sink::file_state::FileState;
use sink::stage::{self, Stage};

/// Bytes of a file that are read at once to be hashed.
pub(super) const READ_BYTES: usize = 256 << 10;
/// Files of one job that cannot be stored before the rest of the job is given up.
const FAILURES_A_JOB_MAX: usize = 2;
/// The most bytes of one file that are written together.
const RUN_BYTES: u64 = 1 << 20;

pub(super) struct Worker {
    pub(super) stage: Arc<Stage>,
    pub(super) shared: AssemblyContext,
    pub(super) counters: Arc<Counters>,
    pub(super) failure: Arc<Failure>,
    pub(super) done: SyncSender<Vec<Done>>,
    /// Reads local content.
    pub(super) local: Reader,
    /// The buffer for hashing files: [`READ_BYTES`].
    pub(super) buffer: Vec<u8>,
}

impl Worker {
    pub(super) fn run(mut self, queue: &Mutex<mpsc::Receiver<Job>>) -> Result<(), Fault> {
        loop {
            let job = queue.lock().blocking_recv();
            let Some(job) = job else { return Ok(()) };
            let mut done = Vec::new();
            let worked = match job {
                Job::Write { frames, share } => {
                    let written = self.write_all(frames, &mut done);
                    if let Some(first) = done.first_mut() {
                        first.uncommitted = Some(share.uncommitted.clone());
                    }
                    written
                }
                Job::Copy(copies) => self.copy_all(copies, &mut done),
                Job::Share(wholes) => self.share_all(wholes, &mut done),
                Job::Holes(holes) => self.leave_holes(holes, &mut done),
            };
            let some_stored = !done.is_empty();
            // Stored chunks count, even if others failed.
            if self.report(done).is_err() {
                return worked;
            }
            match worked {
                // The pass ends, and received chunks are stored.
                Err(fault) if some_stored => self.failure.set(fault),
                Err(fault) => return Err(fault),
                Ok(()) => {}
            }
        }
    }

    /// Writes received chunks.
    fn write_all(&self, frames: Vec<(Item, Frame)>, done: &mut Vec<Done>) -> Result<(), Fault> {
        let (mut run, mut tries) = (None, Tries::default());
        for (item, frame) in frames {
            let chunk = match frame.verify(item.chunk.id, item.chunk.len) {
                Ok(chunk) => chunk,
                Err(fault) if self.request_again(&fault, item.chunk.id) => continue,
                Err(fault) => {
                    tries.failed(fault.into());
                    break;
                }
            };
            self.counters
                .received
                .fetch_add(chunk.bytes.len() as u64, Ordering::Relaxed);
            if tries.note(self.put(item, chunk, &mut run, done)).is_break() {
                break;
            }
        }
        let _ = tries.note(self.end_run(run, done));
        tries.end()
    }

    /// Whether a chunk that did not verify is requested again by the next pass: the first time, and
    /// only for a few chunks of a transfer.
    fn request_again(&self, fault: &FrameError, chunk: Hash) -> bool {
        let mut refused = self.counters.refused.lock();
        let again = matches!(fault, FrameError::Mismatch { .. })
            && refused.len() < REFUSED_CHUNKS_MAX
            && refused.insert(chunk);
        if again {
            tracing::warn!(%chunk, error = %fault, "a received chunk is refused; it is requested again, and the sender checks its copy");
        }
        again
    }

    /// Copies local chunks.
    fn copy_all(&mut self, copies: Vec<(Item, At)>, done: &mut Vec<Done>) -> Result<(), Fault> {
        let (mut run, mut tries) = (None, Tries::default());
        for (item, at) in copies {
            let put = match self.local.chunk(item.chunk, at) {
                Ok(chunk) => {
                    self.counters
                        .reused
                        .fetch_add(chunk.bytes.len() as u64, Ordering::Relaxed);
                    self.put(item, chunk, &mut run, done)
                }
                Err(fault) => self.fetch_instead(item.chunk.id, at.place, &fault),
            };
            if tries.note(put).is_break() {
                break;
            }
        }
        let _ = tries.note(self.end_run(run, done));
        tries.end()
    }

    /// Records chunks of zeros, which need not be written.
    fn leave_holes(&self, holes: Vec<Item>, done: &mut Vec<Done>) -> Result<(), Fault> {
        let mut tries = Tries::default();
        for item in holes {
            if tries.note(self.leave_hole(item, done)).is_break() {
                break;
            }
        }
        tries.end()
    }

    fn leave_hole(&self, item: Item, done: &mut Vec<Done>) -> Result<(), Fault> {
        let Item { dest, chunk, spot } = item;
        let mut handle = dest.handle.lock();
        if handle.is_none() {
            *handle = Some(dest.open(&self.stage)?);
        }
        drop(handle);
        let bytes = u64::from(chunk.len);
        self.counters.reused.fetch_add(bytes, Ordering::Relaxed);
        let row = (chunk.id, spot.ordinal, spot.offset, chunk.len);
        match done.last_mut() {
            Some(last) if Arc::ptr_eq(&last.dest, &dest) && last.bytes == 0 => {
                last.chunks.push(row);
            }
            _ => done.push(Done {
                dest,
                chunks: vec![row],
                bytes: 0,
                written: false,
                synced: false,
                uncommitted: None,
                taken_over: None,
            }),
        }
        Ok(())
    }

    /// Shares whole local files.
    fn share_all(&mut self, wholes: Vec<Whole>, done: &mut Vec<Done>) -> Result<(), Fault> {
        let mut tries = Tries::default();
        for Whole { dest, from, chunks } in wholes {
            if tries
                .note(self.share_one(dest, &from, chunks, done))
                .is_break()
            {
                break;
            }
        }
        tries.end()
    }

    fn share_one(
        &mut self,
        dest: Arc<Dest>,
        from: &Local,
        chunks: Chunks,
        done: &mut Vec<Done>,
    ) -> Result<(), Fault> {
        use stage::Sharing;
        match self.share(&dest, from) {
            Ok((Sharing::Not, _)) => self.copy_whole(&dest, &chunks, from, done),
            Ok((how, intact)) => {
                self.counters
                    .reused
                    .fetch_add(dest.file.size, Ordering::Relaxed);
                let (written, synced) = (
                    how == Sharing::Copy,
                    how == Sharing::Link && !self.stage.syncs_filesystem(),
                );
                done.push(Done {
                    bytes: dest.file.size,
                    dest,
                    chunks,
                    written,
                    synced,
                    uncommitted: None,
                    taken_over: intact.map(|intact| (from.key, intact)),
                });
                Ok(())
            }
            Err(fault) if fault.code == Code::NoSpace => Err(fault),
            Err(fault) => {
                self.stage.remove_file(&dest.path)?;
                chunks.first().map_or(Ok(()), |first| {
                    self.fetch_instead(first.0, from.key.0, &fault)
                })
            }
        }
    }

    /// Has a chunk fetched that could not be taken from its storage location. Content that changed
    /// or is gone leaves the index; a location that cannot be read is avoided by this transfer
    /// only.
    fn fetch_instead(&self, chunk: Hash, location: u32, fault: &Fault) -> Result<(), Fault> {
        let is_stale = matches!(
            fault.code,
            Code::NotFound | Code::Integrity | Code::Conflict | Code::Usage
        );
        if is_stale {
            tracing::info!(%chunk, error = %fault, "local content is stale; fetching it instead");
            return self
                .failure
                .patiently(|| self.shared.chunk_index.forget(chunk));
        }
        if self.counters.unreadable.lock().insert(location) {
            tracing::warn!(location, error = %fault, "local content cannot be read; fetching it instead");
        }
        Ok(())
    }

    /// Sends written chunks to the committer. An error means that the committer failed; it reports
    /// the reason itself.
    fn report(&self, done: Vec<Done>) -> Result<(), SendError<Vec<Done>>> {
        self.done.send(done)
    }

    /// Writes verified bytes at their offset; consecutive ones are written together.
    fn put(
        &self,
        item: Item,
        chunk: Verified,
        run: &mut Option<WriteRun>,
        done: &mut Vec<Done>,
    ) -> Result<(), Fault> {
        if item.dest.is_hole(&chunk.id) {
            let ended = run.take();
            self.leave_hole(item, done)?;
            return self.end_run(ended, done);
        }
        let ended = if run.as_ref().is_some_and(|run| run.is_continued_by(&item)) {
            None
        } else {
            run.take()
        };
        let Item { dest, spot, .. } = item;
        let run = run.get_or_insert_with(|| WriteRun {
            dest,
            offset: spot.offset,
            len: 0,
            chunks: Vec::new(),
            parts: Vec::new(),
        });
        run.chunks.push((
            chunk.id,
            spot.ordinal,
            spot.offset,
            chunk.bytes.len() as u32,
        ));
        run.len += chunk.bytes.len() as u64;
        run.parts.push(chunk.bytes);
        self.end_run(ended, done)
    }

    /// Writes the collected bytes.
    fn end_run(&self, run: Option<WriteRun>, done: &mut Vec<Done>) -> Result<(), Fault> {
        let Some(run) = run else { return Ok(()) };
        let dest = run.dest.clone();
        self.write(run, done).inspect_err(|_| {
            self.counters.unwritable.add(&dest);
            self.failure.stored.store(false, Ordering::Relaxed);
        })
    }

    fn write(&self, run: WriteRun, done: &mut Vec<Done>) -> Result<(), Fault> {
        let WriteRun {
            dest,
            offset,
            len,
            chunks,
            parts,
        } = run;
        if len == dest.file.size {
            // The file is complete: it need not stay open.
            let file = self
                .stage
                .open_file(&dest.path, 0)
                .inspect_err(|fault| self.is_refused(&dest, fault))?;
            let written = write_parts(&file, &parts, offset);
            let closed = durable::close(file);
            written
                .and(closed)
                .at_sink(format_args!("write {}", dest.path))
                .inspect_err(|_| self.is_damaged(&dest))?;
        } else {
            // Locked while writing: the kernel admits one writer at a time, and the others would
            // spin.
            let mut handle = dest.handle.lock();
            let file = match &mut *handle {
                Some(file) => file,
                none => none.insert(
                    dest.open(&self.stage)
                        .inspect_err(|fault| self.is_refused(&dest, fault))?,
                ),
            };
            let written = write_parts(file, &parts, offset);
            drop(handle);
            // A full disk or an exceeded quota wrote none of these bytes; other errors may have
            // damaged what was written before.
            written
                .at_sink(format_args!("write {}", dest.path))
                .inspect_err(|fault| {
                    if fault.code != Code::NoSpace {
                        self.is_damaged(&dest);
                    }
                })?;
        }
        done.push(Done {
            dest,
            chunks,
            bytes: len,
            written: true,
            synced: false,
            uncommitted: None,
            taken_over: None,
        });
        Ok(())
    }

    /// Has a staged file removed that the filesystem refuses to open: an NFS client may refuse it
    /// for ever, although its server allows it again.
    fn is_refused(&self, dest: &Dest, fault: &Fault) {
        if fault.code == Code::NotAllowed {
            self.is_damaged(dest);
        }
    }

    /// Has a file written again from its beginning.
    fn is_damaged(&self, dest: &Dest) {
        self.counters.damaged.lock().insert(dest.number);
    }

    /// Shares a local file as the staged file, and verifies all its bytes, unless they were verified
    /// and nobody touched the file since. Returns the new record of the local file.
    fn share(
        &mut self,
        dest: &Dest,
        from: &Local,
    ) -> Result<(stage::Sharing, Option<Intact>), Fault> {
        let Local {
            path: from,
            link,
            intact,
            ..
        } = from;
        let file = durable::open_regular_nofollow(from).at(from.display())?;
        let state = || Ok::<_, Fault>(FileState::of(&file.metadata().at(from.display())?));
        let before = state()?;
        if before.len != dest.file.size {
            return Err(Fault::integrity("the size differs from the recorded size"));
        }
        if *link {
            // Nobody else writes to it, so the hashed bytes are the shared bytes.
            let now_ms = clock::now_ms();
            let known =
                intact.filter(|known| known.holds(&before, now_ms, self.shared.trusted_for));
            if known.is_none() {
                self.check_content(&file, from, dest)?;
            }
            let how = self
                .stage
                .share(from, &file, &dest.path, &dest.wanted, true)?;
            // A link changes the state.
            let after = state()?;
            let is_same = after.has_content_of(&before);
            if known.is_some() && !is_same {
                return Err(Fault::integrity("it was changed while it was shared"));
            }
            let checked_ms = known.map_or(now_ms, |known| known.checked_ms);
            let record = is_same && after.is_settled(now_ms);
            return Ok((
                how,
                record.then_some(Intact {
                    state: after,
                    checked_ms,
                }),
            ));
        }
        // Its owner may write to it at any moment: the result is verified.
        let how = self
            .stage
            .share(from, &file, &dest.path, &dest.wanted, false)?;
        if how != stage::Sharing::Not {
            let staged = dest.path.in_dir(self.stage.path());
            self.check_content(&self.stage.open_to_read(&dest.path)?, &staged, dest)?;
        }
        Ok((how, None))
    }

    /// Hashes a file whole.
    fn check_content(&mut self, file: &File, path: &Path, dest: &Dest) -> Result<(), Fault> {
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        while at < dest.file.size {
            let part = (dest.file.size - at).min(self.buffer.len() as u64) as usize;
            file.read_exact_at(&mut self.buffer[..part], at)
                .at(path.display())?;
            hasher.update(&self.buffer[..part]);
            at += part as u64;
        }
        if *hasher.finalize().as_bytes() == dest.file.hash.0 {
            Ok(())
        } else {
            Err(Fault::integrity(
                "the content does not match the recorded hash",
            ))
        }
    }

    /// Copies a file's chunks from a local file that cannot be shared; the next pass handles chunks
    /// that cannot be read.
    fn copy_whole(
        &self,
        dest: &Arc<Dest>,
        chunks: &[(Hash, u64, u64, u32)],
        from: &Local,
        done: &mut Vec<Done>,
    ) -> Result<(), Fault> {
        let source = durable::open_regular_nofollow(&from.path).at(from.path.display());
        let mut run = None;
        for &(id, ordinal, offset, len) in chunks {
            let mut out = vec![0; len as usize];
            let read = source.as_ref().map_err(Fault::clone).and_then(|source| {
                source
                    .read_exact_at(&mut out, offset)
                    .at(from.path.display())
            });
            let chunk = match read.and_then(|()| Ok(Verified::check(id, out.into())?)) {
                Ok(chunk) => chunk,
                Err(fault) => {
                    self.fetch_instead(id, from.key.0, &fault)?;
                    continue;
                }
            };
            if !dest.is_hole(&id) {
                self.counters
                    .reused
                    .fetch_add(u64::from(len), Ordering::Relaxed);
            }
            let spot = ChunkPosition {
                page: Hash([0; 32]),
                index: 0,
                ordinal,
                offset,
            };
            self.put(
                Item {
                    dest: dest.clone(),
                    chunk: ChunkRef { id, len },
                    spot,
                },
                chunk,
                &mut run,
                done,
            )?;
        }
        self.end_run(run, done)
    }
}

/// The chunks of a file: hash, ordinal, offset and bytes of each.
type Chunks = Vec<(Hash, u64, u64, u32)>;

/// The failures of one job: a file that cannot be stored does not delay the others, but a failing
/// disk is left alone.
#[derive(Default)]
struct Tries {
    failed: usize,
    first: Option<Fault>,
}

impl Tries {
    fn failed(&mut self, fault: Fault) {
        self.failed += 1;
        self.first.get_or_insert(fault);
    }

    /// Whether the job continues after this.
    fn note(&mut self, tried: Result<(), Fault>) -> ControlFlow<()> {
        if let Err(fault) = tried {
            self.failed(fault);
        }
        if self.failed < FAILURES_A_JOB_MAX {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    }

    fn end(self) -> Result<(), Fault> {
        self.first.map_or(Ok(()), Err)
    }
}

/// Verified bytes of one file that follow each other.
struct WriteRun {
    dest: Arc<Dest>,
    offset: u64,
    len: u64,
    chunks: Chunks,
    parts: Vec<Bytes>,
}

impl WriteRun {
    fn is_continued_by(&self, item: &Item) -> bool {
        Arc::ptr_eq(&self.dest, &item.dest)
            && self.offset + self.len == item.spot.offset
            && self.len < RUN_BYTES
    }
}

#[cfg(test)]
mod tests;

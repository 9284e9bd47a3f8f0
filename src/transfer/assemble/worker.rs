//! Puts chunks in place: verifies each, whether it came over the line or lies here, and writes it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::{AHEAD_BYTES, Counters, Dest, Done, Item, Job, Shared, Whole};
use crate::chunk::Hash;
use crate::fault::{Fault, IoContext};
use crate::frame::Verified;
use crate::manifest::{ChunkRef, Spot};
use crate::names::RelPath;
use crate::places::{At, PlaceInfo};
use crate::sink::Place;
use crate::stage::Stage;

/// A local file that chunks were read from last.
pub(super) struct Source {
    place: u32,
    entry: u64,
    file: Option<File>,
    path: RelPath,
    size: u64,
    info: Arc<PlaceInfo>,
    /// Where the bytes that were read ahead begin, and they.
    ahead: (u64, Bytes),
}

pub(super) struct Worker {
    pub(super) stage: Arc<Stage>,
    pub(super) shared: Shared,
    pub(super) counters: Arc<Counters>,
    pub(super) done: SyncSender<Vec<Done>>,
    pub(super) runtime: tokio::runtime::Handle,
    pub(super) source: Option<Source>,
    /// Whether whole files may be hard links of those of other versions.
    pub(super) any_link: bool,
}

impl Worker {
    pub(super) fn run(mut self, queue: &Mutex<mpsc::Receiver<Job>>) -> Result<(), Fault> {
        loop {
            let job = queue.lock().blocking_recv();
            let Some(job) = job else { return Ok(()) };
            match job {
                Job::Write { frames, _share } => {
                    let mut done: Vec<Done> = Vec::with_capacity(frames.len());
                    for (item, frame) in frames {
                        let chunk = frame.verify(item.chunk.id, item.chunk.len)?;
                        let written = self.write(item, &chunk)?;
                        self.counters.received.fetch_add(written.bytes, Ordering::Relaxed);
                        match done.last_mut() {
                            Some(last) if last.dest.number == written.dest.number => {
                                last.bytes += written.bytes;
                                last.chunks.extend(written.chunks);
                            }
                            _ => done.push(written),
                        }
                    }
                    self.report(done)?;
                }
                Job::Copy(copies) => {
                    let mut done = Vec::with_capacity(copies.len());
                    for (item, at) in copies {
                        match self.read_local(item.chunk, at) {
                            Ok(chunk) => {
                                self.counters.reused.fetch_add(chunk.bytes.len() as u64, Ordering::Relaxed);
                                done.push(self.write(item, &chunk)?);
                            }
                            Err(fault) => {
                                tracing::info!(chunk = %item.chunk.id, error = %fault, "a local chunk is stale; fetching it instead");
                                self.source = None;
                                self.shared.places.forget(item.chunk.id)?;
                            }
                        }
                    }
                    self.report(done)?;
                }
                Job::Share(wholes) => {
                    let mut done = Vec::with_capacity(wholes.len());
                    for Whole { dest, from, chunks } in wholes {
                        match self.share(&dest, &from) {
                            Ok(true) => {
                                self.counters.reused.fetch_add(dest.file.size, Ordering::Relaxed);
                                done.push(Done { bytes: dest.file.size, dest, chunks, written: false });
                            }
                            Ok(false) => self.copy_whole(&dest, &chunks, &from, &mut done)?,
                            Err(fault) => {
                                tracing::info!(path = %from.display(), error = %fault, "a local file is stale; fetching it instead");
                                self.stage.remove_file(&dest.path)?;
                                if let Some(first) = chunks.first() {
                                    self.shared.places.forget(first.0)?;
                                }
                            }
                        }
                    }
                    self.report(done)?;
                }
            }
        }
    }

    fn report(&self, done: Vec<Done>) -> Result<(), Fault> {
        self.done.send(done).map_err(|_| Fault::internal("the committer ended early"))
    }

    /// Puts verified bytes at their place.
    fn write(&self, item: Item, chunk: &Verified) -> Result<Done, Fault> {
        let Item { dest, spot, .. } = item;
        if chunk.bytes.len() as u64 == dest.file.size {
            self.stage.write_file(&dest.path, &chunk.bytes)?;
        } else {
            let file = {
                let mut handle = dest.handle.lock();
                match &*handle {
                    Some(file) => file.clone(),
                    None => handle.insert(Arc::new(self.stage.open_file(&dest.path, dest.file.size)?)).clone(),
                }
            };
            file.write_all_at(&chunk.bytes, spot.offset).at(format_args!("write {}", dest.path))?;
        }
        let len = chunk.bytes.len() as u32;
        Ok(Done { dest, chunks: vec![(chunk.id, spot.ordinal, spot.offset, len)], bytes: u64::from(len), written: true })
    }

    /// A chunk from the site's own files or blobs, verified.
    fn read_local(&mut self, chunk: ChunkRef, at: At) -> Result<Verified, Fault> {
        if at.len != chunk.len {
            return Err(Fault::integrity("its length is another"));
        }
        if !self.source.as_ref().is_some_and(|s| s.place == at.place && s.entry == at.entry) {
            let gone = || Fault::not_found("its place is gone");
            let info = self.shared.places.info(at.place).ok_or_else(gone)?;
            let (path, entry) = self.shared.places.entry(at.place, at.entry)?.ok_or_else(gone)?;
            let file = match &info.place {
                Place::Folder { path: folder } => {
                    let full = folder.join(path.as_str());
                    Some(File::open(&full).at(format_args!("open {}", full.display()))?)
                }
                Place::Registry { .. } => None,
            };
            let size = entry.size;
            self.source = Some(Source { place: at.place, entry: at.entry, file, path, size, info, ahead: (0, Bytes::new()) });
        }
        let Some(source) = &mut self.source else { return Err(Fault::internal("no source")) };
        let bytes: Bytes = match &source.file {
            Some(file) => {
                let mut out = vec![0; at.len as usize];
                file.read_exact_at(&mut out, at.offset).at(format_args!("read {}", source.path))?;
                out.into()
            }
            None => {
                let end = at.offset + u64::from(at.len);
                let (start, bytes) = &source.ahead;
                if at.offset < *start || end > *start + bytes.len() as u64 {
                    // A request for every chunk would take a round trip each.
                    let len = AHEAD_BYTES.min(source.size.saturating_sub(at.offset)).max(u64::from(at.len)) as u32;
                    let read = self.shared.images.read_at(&source.info.place, &source.path, at.offset, len);
                    source.ahead = (at.offset, self.runtime.block_on(read)?);
                }
                let (start, bytes) = &source.ahead;
                let from = (at.offset - start) as usize;
                if bytes.len() < from + at.len as usize {
                    return Err(Fault::integrity("the blob is shorter than it was"));
                }
                bytes.slice(from..from + at.len as usize)
            }
        };
        Ok(Verified::check(chunk.id, bytes)?)
    }

    /// Makes the staged file the same as one that lies here, after checking all of that one's bytes.
    fn share(&self, dest: &Dest, from: &PathBuf) -> Result<bool, Fault> {
        let mut hasher = blake3::Hasher::new();
        let file = File::open(from).at(from.display())?;
        if file.metadata().at(from.display())?.len() != dest.file.size {
            return Err(Fault::integrity("its size is another"));
        }
        hasher.update_reader(&file).at(from.display())?;
        if *hasher.finalize().as_bytes() != dest.file.hash.0 {
            return Err(Fault::integrity("its content is another"));
        }
        self.stage.share(from, &dest.path, dest.mode, self.any_link)
    }

    /// Copies a file's chunks from one that lies here and cannot be shared.
    fn copy_whole(&self, dest: &Arc<Dest>, chunks: &[(Hash, u64, u64, u32)], from: &PathBuf, done: &mut Vec<Done>) -> Result<(), Fault> {
        let source = File::open(from).at(from.display())?;
        for &(id, ordinal, offset, len) in chunks {
            let mut out = vec![0; len as usize];
            source.read_exact_at(&mut out, offset).at(from.display())?;
            let Ok(chunk) = Verified::check(id, out.into()) else {
                self.shared.places.forget(id)?;
                continue;
            };
            let spot = Spot { page: Hash([0; 32]), index: 0, ordinal, offset };
            done.push(self.write(Item { dest: dest.clone(), chunk: ChunkRef { id, len }, spot }, &chunk)?);
            self.counters.reused.fetch_add(u64::from(len), Ordering::Relaxed);
        }
        Ok(())
    }
}

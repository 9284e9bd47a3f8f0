//! The begin and the end of an assembly: what exists before the first pass, and what is done after
//! the last.

use std::collections::HashSet;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::RwLock;

use super::{Assembly, INODES_SPARE, LOOK_UP, ROWS_TOGETHER, SPARE_BYTES, SYNC_ALL_FROM, names};
use crate::chunk_index::{At, ChunkIndex, Commit, FileKey, Intact, Journal, LocationInfo};
use crate::transfer::stopped;
use base::clock;
use base::durable;
use base::fault::{Fault, Retry};
use base::names::RelPath;
use base::private::umask;
use base::space::Space;
use content::chunk::Hash;
use content::manifest::{Entry, EntryBody, FileInfo, KindInfo, Step};
use sink::StorageLocation;
use sink::file_state::FileState;
use sink::stage::{FILE_MODE, Stage};

/// What the sink holds.
#[derive(Debug, Default)]
pub(super) struct HeldBySink {
    pub(super) files: HashSet<u64>,
    pub(super) ordinals: Vec<Range<u64>>,
    pub(super) bytes: u64,
}

impl HeldBySink {
    /// Chunks that need not be staged, because the sink holds them, and that are not in the
    /// journal.
    pub(super) fn unjournaled(&self, journal: &Journal) -> u64 {
        self.ordinals
            .iter()
            .cloned()
            .flatten()
            .filter(|ordinal| !journal.has(*ordinal))
            .count() as u64
    }
}

impl Assembly {
    /// Creates or opens the staging folder and the journal, and checks that there is room.
    pub(in crate::transfer) fn begin(&self) -> Result<(u32, Journal, Arc<Stage>), Fault> {
        names::check(&self.incoming, self.walk(), self.sink.as_ref())?;
        let (index, path) = (&self.shared.chunk_index, self.staged());
        let totals = self.incoming.root.totals;
        let root = self.sink.staging()?;
        let has_folder = root.has(&self.incoming.transfer)?;
        let mut place = index.staged_by(&self.incoming.transfer);
        if let Some(old) = place
            && !has_folder
        {
            // The staging folder was removed from outside: the journal is not valid any more.
            index.remove(old)?;
            place = None;
        }
        // After a loss of the chunk index the folder is the only record of what was staged.
        let begins_adopting = place.is_none() && index.loss().is_some() && has_folder;
        if place.is_none() && !begins_adopting {
            durable::remove_all(&path).map_err(Fault::of_sink)?;
        }
        let stage = root
            .stage(&self.incoming.transfer)?
            .with_fixed_modes(self.sink.fixed_modes())
            .with_fixed_times(self.sink.fixed_times());
        let (digest, transfer) = (
            self.incoming.digest,
            Some(self.incoming.transfer.to_string()),
        );
        let info = LocationInfo {
            place: StorageLocation::Folder { path },
            digest,
            transfer,
            foreign: false,
            adopting: begins_adopting,
        };
        let place = match place {
            Some(place) => place,
            None => index.put(None, info)?,
        };
        let mut journal = index.journal(place, totals.chunks)?;
        // An interrupted rebuild continues.
        if let Some(info) = index.info(place).filter(|info| info.adopting) {
            journal = self.adopt(&stage, place, journal)?;
            index.put(
                Some(place),
                LocationInfo {
                    adopting: false,
                    ..LocationInfo::clone(&info)
                },
            )?;
        }
        let noted = RwLock::new(journal);
        let damaged = self.clear_damaged(place, &noted)?;
        self.remove_damaged(&stage, damaged)?;
        let journal = noted.into_inner();
        let mut resumed = 0;
        if journal.count() > 0 {
            let behind = index.is_behind(place);
            let (mut rows, mut entry) = (Vec::new(), 0);
            for step in self.walk() {
                match step? {
                    Step::Entry { number, .. } => entry = number,
                    Step::Chunk(chunk, spot) if journal.has(spot.ordinal) => {
                        resumed += u64::from(chunk.len);
                        if behind {
                            rows.push((
                                chunk.id,
                                At {
                                    place,
                                    entry,
                                    offset: spot.offset,
                                    len: chunk.len,
                                },
                            ));
                        }
                        if rows.len() >= ROWS_TOGETHER {
                            index.note(&mut rows, &mut Vec::new(), false)?;
                        }
                    }
                    Step::Chunk(..) => {}
                }
            }
            if behind {
                index.note(&mut rows, &mut Vec::new(), false)?;
                index.caught_up(place);
            }
        }
        self.counters.resumed.fetch_max(resumed, Ordering::Relaxed);
        // The content that an earlier attempt staged may be lost.
        self.counters.committed.store(resumed, Ordering::Relaxed);
        let space = stage.space()?;
        let free = space.bytes.unwrap_or(u64::MAX).saturating_sub(SPARE_BYTES);
        if totals.bytes - resumed > free {
            // The lookup of local content starts only now, because shared files take no room, and
            // neither does room that was reserved before.
            let need = self
                .estimate(Some(&journal))?
                .needs
                .saturating_sub(self.room_ahead(&stage, &journal)?);
            if need > free {
                return Err(Fault::no_space(format!(
                    "{} needs {need} bytes more in {}, which has {free} to spare",
                    self.incoming.artifact,
                    self.sink.staging_root().display()
                )));
            }
        }
        self.check_inodes(&stage, &journal, space.inodes)?;
        self.check_target()?;
        Ok((place, journal, Arc::new(stage)))
    }

    /// Adds the content of the staging folder to the journal, after hashing it: it is unknown which
    /// of it is durable.
    fn adopt(&self, stage: &Stage, place: u32, journal: Journal) -> Result<Journal, Fault> {
        let journal = RwLock::new(journal);
        let (mut commit, mut current, mut buffer) = (Commit::default(), None, Vec::new());
        let put = |commit: &mut Commit| -> Result<(), Fault> {
            if stage.syncs_filesystem() {
                stage.sync_filesystem()?;
            }
            self.shared.chunk_index.commit(place, &journal, commit)
        };
        for step in self.walk() {
            if self.stop.is_cancelled() {
                return Err(stopped());
            }
            match step? {
                Step::Entry { number, entry, .. } => {
                    current = match entry.body {
                        EntryBody::File(file) if stage.size(&entry.path)? == Some(file.size) => {
                            if !stage.syncs_filesystem() {
                                stage.sync_file(&entry.path)?;
                            }
                            let opened = stage.open_to_read(&entry.path)?;
                            commit.entries.push((number, entry.path, file));
                            Some((number, opened))
                        }
                        _ => None,
                    };
                }
                Step::Chunk(chunk, spot) => {
                    let Some((number, file)) = current
                        .as_ref()
                        .filter(|_| !journal.read().has(spot.ordinal))
                    else {
                        continue;
                    };
                    buffer.resize(chunk.len as usize, 0);
                    if file.read_exact_at(&mut buffer, spot.offset).is_ok()
                        && Hash::of(&buffer) == chunk.id
                    {
                        commit.chunks.push((
                            chunk.id,
                            At {
                                place,
                                entry: *number,
                                offset: spot.offset,
                                len: chunk.len,
                            },
                        ));
                        commit.ordinals.push(spot.ordinal);
                    }
                    if commit.chunks.len() >= ROWS_TOGETHER {
                        put(&mut commit)?;
                    }
                }
            }
        }
        put(&mut commit)?;
        Ok(journal.into_inner())
    }

    /// Fails when the filesystem has fewer inodes than the artifact still needs: one for each entry
    /// that is not staged.
    fn check_inodes(
        &self,
        stage: &Stage,
        journal: &Journal,
        free: Option<u64>,
    ) -> Result<(), Fault> {
        let totals = self.incoming.root.totals;
        let Some(free) = free.filter(|free| {
            *free < (totals.files + totals.dirs + totals.symlinks).saturating_add(INODES_SPARE)
        }) else {
            return Ok(());
        };
        let mut staged = 0;
        for step in self.walk() {
            if let Step::Entry { entry, .. } = step? {
                staged += u64::from(stage.exists(&entry.path));
            }
        }
        let needed = self.estimate(Some(journal))?.inodes.saturating_sub(staged) + INODES_SPARE;
        if needed <= free {
            return Ok(());
        }
        Err(Fault::no_space(format!(
            "{} needs {needed} inodes more in {}, which has {free}: its filesystem has room for too few files",
            self.incoming.artifact,
            self.sink.staging_root().display()
        )))
    }

    /// Fails when the version would be copied to another mount, which lacks room for it.
    fn check_target(&self) -> Result<(), Fault> {
        let Some(copy) = self.copy_at_commit()? else {
            return Ok(());
        };
        let (bytes, inodes) = (
            copy.bytes.saturating_add(SPARE_BYTES),
            copy.inodes.saturating_add(INODES_SPARE),
        );
        Space::check(
            &copy.to,
            bytes,
            inodes,
            format_args!("{} is copied to another mount", self.incoming.artifact),
        )
        .map_err(Fault::of_sink)
    }

    /// Bytes of staged files that are reserved and not journaled: large files are reserved when
    /// they are created.
    fn room_ahead(&self, stage: &Stage, journal: &Journal) -> Result<u64, Fault> {
        let (mut ahead, mut of_file) = (0, 0u64);
        for step in self.walk() {
            match step? {
                Step::Entry { entry, .. } => {
                    ahead += of_file;
                    of_file = if let EntryBody::File(file) = entry.body {
                        stage.allocated(&entry.path)?.min(file.size)
                    } else {
                        0
                    };
                }
                Step::Chunk(chunk, spot) if journal.has(spot.ordinal) => {
                    of_file = of_file.saturating_sub(chunk.len.into());
                }
                Step::Chunk(..) => {}
            }
        }
        Ok(ahead + of_file)
    }

    /// Files that the sink already holds completely.
    pub(super) async fn held_by_sink(&self, journal: &Journal) -> Result<HeldBySink, Fault> {
        let mut held = HeldBySink::default();
        if !matches!(self.incoming.root.info, KindInfo::Image(_)) {
            return Ok(held);
        }
        let this = self.clone();
        // Number, path, file, and the ordinals of its chunks.
        let walk = move || {
            let mut out: Vec<(u64, RelPath, FileInfo, Range<u64>)> = Vec::new();
            for step in this.walk() {
                match step? {
                    Step::Entry {
                        number,
                        entry,
                        first_ordinal,
                    } => {
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
        };
        let files: Vec<(u64, RelPath, FileInfo, Range<u64>)> = self.on_thread(walk).await?;
        for (number, path, file, ordinals) in files {
            let holds = tokio::select! {
                holds = self.sink.holds(&self.incoming, &path, &file) => holds?,
                () = self.stop.cancelled() => return Ok(held),
            };
            if holds {
                held.files.insert(number);
                // Content that was staged before the sink stored it counts as resumed.
                held.bytes += if ordinals.clone().any(|ordinal| journal.has(ordinal)) {
                    0
                } else {
                    file.size
                };
                held.ordinals.push(ordinals);
            }
        }
        self.counters
            .reused
            .fetch_max(held.bytes, Ordering::Relaxed);
        Ok(held)
    }

    /// Clears the journal bits of the staged files that could not be written, and returns these
    /// files. A failure is repeated by the next attempt, before anything else.
    pub(super) fn clear_damaged(
        &self,
        place: u32,
        journal: &RwLock<Journal>,
    ) -> Result<Vec<(u64, RelPath)>, Fault> {
        let damaged = std::mem::take(&mut *self.counters.damaged.lock());
        if damaged.is_empty() {
            return Ok(Vec::new());
        }
        self.clear_bits(place, journal, &damaged)
            .inspect_err(|_| self.counters.damaged.lock().extend(damaged))
    }

    /// Removes staged files that could not be written. What cannot be removed now, because the
    /// filesystem is read-only for example, is removed by the next attempt: a filesystem may report
    /// an earlier error at each later write to that file.
    pub(super) fn remove_damaged(
        &self,
        stage: &Stage,
        files: Vec<(u64, RelPath)>,
    ) -> Result<(), Fault> {
        let mut failure = None;
        for (number, path) in files {
            if let Err(fault) = stage.remove_file(&path) {
                self.counters.damaged.lock().insert(number);
                failure.get_or_insert(fault);
            }
        }
        failure.map_or(Ok(()), Err)
    }

    fn clear_bits(
        &self,
        place: u32,
        journal: &RwLock<Journal>,
        damaged: &HashSet<u64>,
    ) -> Result<Vec<(u64, RelPath)>, Fault> {
        let (mut paths, mut ordinals, mut bytes, mut is_one) = (Vec::new(), Vec::new(), 0, false);
        for step in self.walk() {
            match step? {
                Step::Entry { number, entry, .. } => {
                    is_one = damaged.contains(&number);
                    if is_one {
                        paths.push((number, entry.path));
                    }
                }
                Step::Chunk(chunk, spot) if is_one && journal.read().has(spot.ordinal) => {
                    ordinals.push(spot.ordinal);
                    bytes += u64::from(chunk.len);
                }
                Step::Chunk(..) => {}
            }
        }
        self.shared
            .chunk_index
            .uncommit(place, journal, &ordinals)?;
        let committed = &self.counters.committed;
        let _ = committed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
            Some(now.saturating_sub(bytes))
        });
        Ok(paths)
    }

    /// Creates entries without chunks, sets modes, and syncs the tree.
    pub(super) fn finish(&self, stage: &Stage, held: &HeldBySink) -> Result<(), Fault> {
        let mut dirs: Vec<(RelPath, u32)> = Vec::new();
        let mut loose: Vec<RelPath> = Vec::new();
        // Attributes are metadata of many files, which one call makes durable. Where there is no such
        // call, network filesystems store them at the server at once.
        let (mut refused, has_times) = (0u64, self.incoming.root.format > 1);
        let mut records = Records::of(self);
        // The umask may have removed permissions that the artifact has.
        let masked = umask() & FILE_MODE != 0;
        for step in self.walk() {
            let Step::Entry { number, entry, .. } = step? else {
                continue;
            };
            match entry.body {
                EntryBody::Dir => {
                    stage.make_dir(&entry.path)?;
                    refused += self.set_attributes(stage, &entry)?;
                    dirs.push((entry.path, entry.mode));
                }
                EntryBody::Symlink(target) => stage.make_symlink(&entry.path, &target)?,
                EntryBody::File(_) if held.files.contains(&number) => {}
                EntryBody::File(file) => {
                    // Another name of an earlier file, which is complete, with its attributes.
                    if let Some(first) = &entry.attributes.hard_link
                        && stage.link_names(first, &entry.path)?
                    {
                        continue;
                    }
                    if file.size == 0 && stage.size(&entry.path)? != Some(0) {
                        stage.write_file(&entry.path, b"")?;
                    }
                    let state = stage.file_state(&entry.path)?;
                    let Some(mut state) = state.filter(|state| state.len == file.size) else {
                        // The staging folder was changed from outside: the journal is not reliable.
                        if let Some(place) =
                            self.shared.chunk_index.staged_by(&self.incoming.transfer)
                        {
                            self.shared.chunk_index.remove(place)?;
                        }
                        return Err(Fault::integrity(format!(
                            "the staged file {:?} is gone or has another size",
                            entry.path.as_str()
                        ))
                        .with_retry(Retry::Backoff)
                        .with_next(
                            "no action is needed: the content is fetched again automatically",
                        ));
                    };
                    // Before the mode, which may forbid it.
                    if !entry.attributes.is_empty() {
                        refused += self.set_attributes(stage, &entry)?;
                        state = stage.file_state(&entry.path)?.unwrap_or(state);
                    }
                    // On a mount with fixed modes nothing changes.
                    let sets_mode = (masked || entry.mode != FILE_MODE) && !stage.has_fixed_modes();
                    if sets_mode {
                        stage.set_mode(&entry.path, entry.mode)?;
                        state = stage.file_state(&entry.path)?.unwrap_or(state);
                    }
                    records.add(number, state);
                    if file.size == 0 || sets_mode {
                        if !stage.syncs_filesystem() {
                            stage.sync_file(&entry.path)?;
                        } else if loose.len() < SYNC_ALL_FROM {
                            loose.push(entry.path);
                        }
                    }
                }
            }
        }
        if refused > 0 {
            tracing::warn!(
                entries = refused,
                "the filesystem does not keep the times or extended attributes of some entries; 'verify' lists them"
            );
        }
        records.end();
        let all =
            stage.syncs_filesystem() && (has_times || dirs.len() + loose.len() >= SYNC_ALL_FROM);
        if !all {
            loose.iter().try_for_each(|path| stage.sync_file(path))?;
        }
        // Deepest first: the subfolders of a folder without write permission can still be changed
        // by path.
        for (path, mode) in dirs.iter().rev() {
            stage.set_mode(path, *mode)?;
            if !all {
                stage.sync_dir(Some(path))?;
            }
        }
        if all {
            stage.sync_filesystem()
        } else {
            stage.sync_dir(None)
        }
    }

    /// Sets the time and the extended attributes of an entry. Returns 1 if the filesystem refuses
    /// some of them.
    fn set_attributes(&self, stage: &Stage, entry: &Entry) -> Result<u64, Fault> {
        let attributes = &entry.attributes;
        let mut is_set = true;
        if !attributes.xattrs.is_empty() {
            is_set &= stage.set_xattrs(&entry.path, &attributes.xattrs)?;
        }
        if let Some(time) = attributes.modified {
            is_set &= stage.set_time(&entry.path, time)?;
        }
        Ok(u64::from(!is_set))
    }
}

/// Records the files of an artifact as intact at the end of its assembly, when all of them are
/// verified, synced and have their final modes.
struct Records<'a> {
    chunk_index: &'a ChunkIndex,
    /// The location; `None`: nothing is recorded.
    place: Option<u32>,
    now_ms: i64,
    pending: Vec<(FileKey, FileState)>,
    rows: Vec<(FileKey, Option<Intact>)>,
}

impl<'a> Records<'a> {
    fn of(assembly: &'a Assembly) -> Self {
        let chunk_index = &assembly.shared.chunk_index;
        let incoming = &assembly.incoming;
        let is_used = incoming.artifact.kind.is_files() && !assembly.shared.trusted_for.is_zero();
        let place = is_used.then(|| chunk_index.staged_by(&incoming.transfer));
        Self {
            chunk_index,
            place: place.flatten(),
            now_ms: clock::now_ms(),
            pending: Vec::new(),
            rows: Vec::new(),
        }
    }

    fn add(&mut self, number: u64, state: FileState) {
        let Some(place) = self.place else { return };
        self.pending.push(((place, number), state));
        if self.pending.len() >= LOOK_UP {
            let looked_up = self.look_up();
            self.note(looked_up);
        }
        if self.rows.len() >= ROWS_TOGETHER {
            let written = self.write();
            self.note(written);
        }
    }

    /// A delivery does not fail because its files must be hashed when they are used again.
    fn note(&mut self, done: Result<(), Fault>) {
        if let Err(fault) = done {
            tracing::warn!(error = %fault, "delivered files could not be recorded as intact; they are hashed when they are used again");
            self.place = None;
            self.pending.clear();
            self.rows.clear();
        }
    }

    /// Compares with the records of files that were taken over: their content was verified earlier.
    fn look_up(&mut self) -> Result<(), Fault> {
        let keys: Vec<FileKey> = self.pending.iter().map(|(key, _)| *key).collect();
        let known = self.chunk_index.intact(&keys)?;
        for ((key, state), known) in self.pending.drain(..).zip(known) {
            let checked_ms = known.map_or(self.now_ms, |known| known.checked_ms);
            let now = state
                .is_settled(self.now_ms)
                .then_some(Intact { state, checked_ms });
            if now != known {
                self.rows.push((key, now));
            }
        }
        Ok(())
    }

    fn write(&mut self) -> Result<(), Fault> {
        let written = self.chunk_index.note_intact(&self.rows);
        self.rows.clear();
        written
    }

    fn end(mut self) {
        let ended = self.look_up().and_then(|()| self.write());
        self.note(ended);
    }
}

//! Reads the files of an artifact at a site again, slowly, and records which of them are intact.
//!
//! A file with a young record is left out: a delivery or an earlier scrub verified it. The scrub
//! reads a file before its record is too old, so that a delivery rarely has to hash a file that
//! nobody touched. It changes no file; what it finds is reported, and `verify --repair` repairs it.
//! The records are durable with the next group commit; a crash costs a second read.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::stopped;
use super::verify::{FileProblems, place_now};
use crate::chunk_index::{ChunkIndex, FileKey, Intact};
use base::clock;
use base::durable;
use base::fault::{Fault, IoContext};
use base::limits::OFFENDERS_LISTED_MAX;
use content::chunk::Hash;
use content::manifest::{EntryBody, FileInfo, Step, Walk};
use content::store::Store;
use sink::file_state::FileState;
use sink::{Incoming, Sink, StorageLocation, Verification};

/// Files that are looked up and recorded together.
const LOOK_UP: usize = 256;
/// Bytes that are read at once.
const READ_BYTES: usize = 256 << 10;
/// The longest sleep without a look whether the daemon stops.
const SLEEP_MAX: Duration = Duration::from_millis(100);
/// Files with several names of which the content is remembered during one round.
const LINKED_KEPT_MAX: usize = 1 << 16;

/// How the scrub reads: shared by the artifacts of one round.
pub struct Scrub {
    /// A file whose content was verified longer ago is read.
    pub due_after: Duration,
    pub bytes_per_second: u64,
    pub stop: CancellationToken,
    /// Files with several names that were read in this round: versions share their unchanged files.
    linked: Mutex<HashMap<FileState, Hash>>,
}

/// What was read of an artifact, and found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Scrubbed {
    pub files: u64,
    pub bytes: u64,
    /// Missing or damaged files: the first few.
    pub faults: Vec<String>,
    /// How many there are.
    pub damaged: u64,
}

/// A file to be read.
struct Due {
    key: FileKey,
    path: PathBuf,
    file: FileInfo,
}

/// The result of reading a file.
enum Found {
    /// Its new record; `None` if somebody touched it meanwhile.
    Intact(Option<Intact>),
    /// What is wrong with it.
    Damaged(&'static str),
    Unread(io::Error),
}

impl Scrub {
    /// A round.
    pub fn new(due_after: Duration, bytes_per_second: u64, stop: CancellationToken) -> Self {
        Self {
            due_after,
            bytes_per_second,
            stop,
            linked: Mutex::default(),
        }
    }

    /// Reads the files of a committed artifact that are due. An error says nothing about the
    /// artifact.
    pub async fn artifact(
        self: &Arc<Self>,
        sink: Arc<dyn Sink>,
        store: Store,
        chunk_index: Arc<ChunkIndex>,
        incoming: Incoming,
        place: StorageLocation,
    ) -> Result<Scrubbed, Fault> {
        let place = place_now(sink.as_ref(), &incoming, &place);
        let quick = Verification::new(true, |_| {});
        let faults = sink.verify(&incoming, &place, &quick).await?;
        if !faults.is_empty() {
            return Ok(Scrubbed {
                damaged: faults.len() as u64,
                faults,
                ..Scrubbed::default()
            });
        }
        let StorageLocation::Folder { path: folder } = place.clone() else {
            return Ok(Scrubbed::default());
        };
        // An artifact without a location in the index gets one when the index is rebuilt.
        let Some(number) = chunk_index.landed(incoming.digest, &place) else {
            return Ok(Scrubbed::default());
        };
        let (this, threads) = (self.clone(), sink.threads().clone());
        threads
            .run(move || this.read(&incoming, &store, &chunk_index, number, &folder))
            .await
    }

    fn read(
        &self,
        incoming: &Incoming,
        store: &Store,
        chunk_index: &ChunkIndex,
        number: u32,
        folder: &Path,
    ) -> Result<Scrubbed, Fault> {
        let (mut out, mut buffer) = (Scrubbed::default(), vec![0; READ_BYTES]);
        let mut pending = Vec::with_capacity(LOOK_UP);
        for step in Walk::new(&incoming.root, store) {
            if self.stop.is_cancelled() {
                return Err(stopped());
            }
            if let Step::Entry {
                number: entry,
                entry: body,
                ..
            } = step?
                && let EntryBody::File(file) = body.body
            {
                pending.push(Due {
                    key: (number, entry),
                    path: body.path.in_dir(folder),
                    file,
                });
            }
            if pending.len() == LOOK_UP {
                self.read_some(&mut pending, chunk_index, &mut out, &mut buffer)?;
            }
        }
        self.read_some(&mut pending, chunk_index, &mut out, &mut buffer)?;
        Ok(out)
    }

    /// Reads those of these files that are due.
    fn read_some(
        &self,
        pending: &mut Vec<Due>,
        chunk_index: &ChunkIndex,
        out: &mut Scrubbed,
        buffer: &mut [u8],
    ) -> Result<(), Fault> {
        let keys: Vec<FileKey> = pending.iter().map(|due| due.key).collect();
        let (known, now_ms) = (chunk_index.intact(&keys)?, clock::now_ms());
        let mut rows = Vec::new();
        for (due, known) in pending.drain(..).zip(known) {
            if known.is_some_and(|known| known.is_younger_than(now_ms, self.due_after)) {
                continue;
            }
            let mut problems = FileProblems::default();
            let record = match self.check(&due, out, buffer)? {
                Found::Intact(record) => record,
                Found::Damaged(why) => {
                    problems
                        .faults
                        .push(format!("{}: {why}", due.path.display()));
                    None
                }
                Found::Unread(error) => {
                    problems.error(&due.path, &error)?;
                    None
                }
            };
            for fault in problems.faults.into_iter().chain(problems.unread) {
                out.damaged += 1;
                if out.faults.len() < OFFENDERS_LISTED_MAX {
                    out.faults.push(fault);
                }
            }
            if record != known {
                rows.push((due.key, record));
            }
        }
        chunk_index.note_intact(&rows)
    }

    /// Reads one file.
    fn check(&self, due: &Due, out: &mut Scrubbed, buffer: &mut [u8]) -> Result<Found, Fault> {
        let begin = || -> io::Result<(File, Metadata)> {
            let file = durable::open_regular_nofollow(&due.path)?;
            let meta = file.metadata()?;
            Ok((file, meta))
        };
        let (mut file, meta) = match begin() {
            Ok(begun) => begun,
            Err(error) => return Ok(Found::Unread(error)),
        };
        let state = FileState::of(&meta);
        let now_ms = clock::now_ms();
        let record = |state: FileState| {
            state.is_settled(now_ms).then_some(Intact {
                state,
                checked_ms: now_ms,
            })
        };
        if state.len != due.file.size {
            return Ok(Found::Damaged("the size differs from the delivered size"));
        }
        if self.linked.lock().get(&state) == Some(&due.file.hash) {
            return Ok(Found::Intact(record(state)));
        }
        let (mut hasher, began, mut read) = (blake3::Hasher::new(), Instant::now(), 0_u64);
        loop {
            match file.read(buffer) {
                Ok(0) => break,
                Ok(len) => {
                    hasher.update(&buffer[..len]);
                    read += len as u64;
                    self.rest(began, read)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Ok(Found::Unread(error)),
            }
        }
        out.files += 1;
        out.bytes += read;
        let now = FileState::of(&file.metadata().at(due.path.display())?);
        if *hasher.finalize().as_bytes() != due.file.hash.0 {
            return Ok(Found::Damaged(
                "the content does not match the delivered content",
            ));
        }
        if now != state {
            // Linked or touched meanwhile: the next round reads it again.
            return Ok(Found::Intact(None));
        }
        if meta.nlink() > 1 {
            let mut linked = self.linked.lock();
            if linked.len() < LINKED_KEPT_MAX {
                linked.insert(state, due.file.hash);
            }
        }
        Ok(Found::Intact(record(state)))
    }

    /// Sleeps until so many bytes may have been read since `began`.
    fn rest(&self, began: Instant, read: u64) -> Result<(), Fault> {
        let until = Duration::from_secs_f64(read as f64 / self.bytes_per_second.max(1) as f64);
        loop {
            if self.stop.is_cancelled() {
                return Err(stopped());
            }
            let left = until.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(SLEEP_MAX));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEEK: Duration = Duration::from_secs(7 * 86_400);

    fn put(path: &Path, content: &[u8]) {
        durable::replace(path, content).unwrap();
    }

    #[test]
    fn due_files_are_read_and_recorded_and_damage_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let index = ChunkIndex::open(dir.path()).unwrap();
        let file = |name: &str| dir.path().join(name);
        let due = |number: u64, name: &str, content: &[u8]| Due {
            key: (1, number),
            path: file(name),
            file: FileInfo {
                size: content.len() as u64,
                hash: Hash::of(content),
            },
        };
        for name in ["good", "bad", "young", "old"] {
            put(&file(name), name.as_bytes());
        }
        std::fs::hard_link(file("good"), file("linked")).unwrap();
        // The resolution of timestamps is the tick of the kernel.
        std::thread::sleep(Duration::from_millis(30));
        let all = || {
            vec![
                due(0, "good", b"good"),
                due(1, "linked", b"good"),
                due(2, "bad", b"other"),
                due(3, "young", b"OTHER"),
                due(4, "old", b"old"),
                due(5, "gone", b"gone"),
            ]
        };
        let state = |name: &str| FileState::of(&std::fs::metadata(file(name)).unwrap());
        let checked = |name: &str, past: Duration| {
            Some(Intact {
                state: state(name),
                checked_ms: clock::now_ms() - past.as_millis() as i64,
            })
        };
        let young = checked("young", WEEK / 2);
        index
            .note_intact(&[
                ((1, 2), checked("bad", WEEK)),
                ((1, 3), young),
                ((1, 4), checked("old", WEEK)),
                ((1, 5), checked("good", WEEK)),
            ])
            .unwrap();
        let begun = clock::now_ms();
        let round = || {
            let scrub = Scrub::new(WEEK, u64::MAX, CancellationToken::new());
            let (mut out, mut buffer) = (Scrubbed::default(), vec![0; 3]);
            scrub
                .read_some(&mut all(), &index, &mut out, &mut buffer)
                .unwrap();
            out
        };
        let out = round();
        // One read of the two names, one of "old"; "bad" has another size.
        assert_eq!((out.files, out.bytes, out.damaged), (2, 7, 2));
        assert!(
            out.faults[0].contains("bad: the size differs") && out.faults[1].contains("gone"),
            "{:?}",
            out.faults
        );
        let keys: Vec<FileKey> = all().iter().map(|due| due.key).collect();
        let known = index.intact(&keys).unwrap();
        let is_new = |number: usize| known[number].is_some_and(|new| new.checked_ms >= begun);
        assert!(is_new(0) && is_new(1) && is_new(4), "{known:?}");
        assert_eq!((known[2], known[3], known[5]), (None, young, None));
        // What is recorded is not read again, and damage is reported again.
        let again = round();
        assert_eq!((again.files, again.damaged), (0, 2));
        put(&file("bad"), b"OTHER");
        assert!(round().faults[0].contains("does not match"));
    }

    #[test]
    fn reading_waits_for_its_rate_and_ends_when_the_daemon_stops() {
        let stop = CancellationToken::new();
        let scrub = Scrub::new(WEEK, 1000, stop.clone());
        let began = Instant::now();
        scrub.rest(began, 50).unwrap();
        assert!(began.elapsed() >= Duration::from_millis(50));
        stop.cancel();
        assert!(scrub.rest(began, 1_000_000).is_err());
    }
}

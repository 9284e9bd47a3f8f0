//! Checks whether content that was published in place is unchanged. It uses stat, because inotify
//! does not report changes on a NAS.
//!
//! [`InPlaceReader::check`] walks the manifest and compares the size of each file. A file that
//! changed since it was last read is read and hashed again. This uses the clock of its filesystem
//! (ctime), which nobody can set. A check usually costs one stat for each file. For an artifact of
//! any size it holds one page of each level of the manifest; a [`Mark`] stays in memory between
//! checks.
//!
//! The site's watch calls it. Nothing survives the daemon: a new [`Mark`] starts at the time of
//! publishing, so the first checks read again the files that changed since then.

use std::fs::{File, symlink_metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use tokio_util::sync::CancellationToken;

use super::{InPlaceReader, changed_text, has_file, is_away};
use base::fault::Fault;
use base::names::RelPath;
use content::chunk::Hash;
use content::manifest::{ChunkRef, Digest, EntryBody, FileInfo, Root, Step, Walk};
use sink::StorageLocation;

/// A check without hurry pauses this many times as long as it works.
pub const RESTS: u32 = 4;
/// Work between two rests.
const WORK: Duration = Duration::from_millis(100);
/// How often a pause checks whether the daemon stops.
const STOP_LOOK_EVERY: Duration = Duration::from_millis(50);
/// How far the clock of a NAS may be behind the local clock.
const SKEW_MAX: Duration = Duration::from_secs(120);
/// The resolution of the coarsest clock of a filesystem (FAT).
const CLOCK_STEP_MAX: Duration = Duration::from_secs(2);

/// Links are not followed, and opening a pipe does not wait for a writer.
const NEVER_WAITS: i32 = (OFlags::NOFOLLOW.bits() | OFlags::NONBLOCK.bits()) as i32;

/// Seconds and nanoseconds since 1970, by the clock of a filesystem.
type Time = (i64, i64);
/// The time of the last change of a file, or the reason why it is a different file.
type ChangeCheck = Result<Time, String>;

/// Which files of an artifact need not be read again: one point in time for all files.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    /// Only files with a later time changed since they were read.
    read: Time,
    /// The latest time that an earlier check saw, and when that check ended: the clock of the
    /// filesystem was at least at that time then.
    seen: Option<(Time, Instant)>,
}

impl Mark {
    /// For content whose publish began at this time of the local clock, in milliseconds since 1970.
    pub fn new(published_ms: i64) -> Self {
        let ms = published_ms.saturating_sub(SKEW_MAX.as_millis() as i64);
        Self {
            read: (ms.div_euclid(1000), ms.rem_euclid(1000) * 1_000_000),
            seen: None,
        }
    }

    /// As if the last check ended so long ago that the clock of every filesystem has moved on.
    #[cfg(test)]
    pub(super) fn age(&mut self) {
        let (_, ended) = self.seen.as_mut().expect("a check has ended");
        *ended -= CLOCK_STEP_MAX + Duration::from_millis(1);
    }

    /// A time that no file can have that changes from now on: a time that an earlier check saw. A
    /// time that this check sees does not qualify, because a file may change after this check
    /// passed it.
    fn past(&self) -> Option<Time> {
        self.seen
            .filter(|(_, ended)| ended.elapsed() > CLOCK_STEP_MAX)
            .map(|(time, _)| time)
    }
}

/// The result of a check.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ContentCheck {
    /// The number of changed files.
    pub changed: u64,
    /// The path of the first one, and the reason.
    pub first: Option<String>,
    /// Bytes that were read.
    pub read: u64,
}

impl ContentCheck {
    /// A description of the change; `None`: nothing changed.
    pub fn message(self) -> Option<String> {
        let others = self.changed.saturating_sub(1);
        self.first.map(|first| match others {
            0 => first,
            1 => format!("{first}; so did another file"),
            _ => format!("{first}; so did {others} other files"),
        })
    }
}

impl InPlaceReader {
    /// Checks content that was published at `place`. `None`: no result, because a folder is
    /// unavailable or `stop` was cancelled. Without `hurry` it leaves the disk idle most of the
    /// time. Blocks.
    pub fn check(
        &self,
        digest: Digest,
        root: &Root,
        place: &StorageLocation,
        mark: &mut Mark,
        hurry: bool,
        stop: &CancellationToken,
    ) -> Result<Option<ContentCheck>, Fault> {
        let folders = self.folders(digest, place);
        let away = || folders.iter().any(|folder| is_away(folder));
        if away() {
            return Ok(None);
        }
        let published = folder_of(place);
        let past = mark.past();
        let (mut check, mut latest): (_, Time) = (ContentCheck::default(), (i64::MIN, 0));
        let (mut suspect, mut buffer) = (None::<Suspect>, Vec::new());
        let mut began = Instant::now();
        for step in Walk::new(root, &self.inner.store) {
            if !hurry && began.elapsed() >= WORK {
                rest(began.elapsed() * RESTS, stop);
                began = Instant::now();
            }
            if stop.is_cancelled() {
                return Ok(None);
            }
            let wrong = match step? {
                Step::Entry { entry, .. } => {
                    suspect = None;
                    let EntryBody::File(file) = entry.body else {
                        continue;
                    };
                    // Blobs of a registry are addressed by digest: they cannot change.
                    if published.is_none() && has_file(place, &entry.path, &file) {
                        continue;
                    }
                    let Some((path, seen)) = stat(&folders, &entry.path, &file)? else {
                        continue;
                    };
                    match seen {
                        Err(why) => Some((path, why)),
                        // Written content is on a filesystem with another clock, and only the
                        // daemon writes there.
                        Ok(_) if !published.is_some_and(|folder| path.starts_with(folder)) => None,
                        Ok(time) => {
                            latest = latest.max(time);
                            suspect = (time > mark.read).then_some(Suspect { path, file: None });
                            None
                        }
                    }
                }
                Step::Chunk(chunk, spot) => match &mut suspect {
                    None => None,
                    Some(file) => {
                        check.read += u64::from(chunk.len);
                        let why = match file.is_still(chunk, spot.offset, &mut buffer) {
                            Ok(true) => None,
                            Ok(false) => {
                                Some("the content does not match the recorded hash".to_owned())
                            }
                            Err(error) => Some(why_not(&file.path, &error)?),
                        };
                        why.and_then(|why| suspect.take().map(|file| (file.path, why)))
                    }
                },
            };
            if let Some((path, why)) = wrong {
                // It may have been unmounted during the check.
                if check.changed == 0 && away() {
                    return Ok(None);
                }
                check.changed += 1;
                check
                    .first
                    .get_or_insert_with(|| changed_text(path.display(), why));
            }
        }
        if check.changed > 0 && away() {
            return Ok(None);
        }
        if let (0, Some(past)) = (check.changed, past) {
            mark.read = past;
        }
        if mark.seen.is_none() || past.is_some() {
            mark.seen = Some((latest, Instant::now()));
        }
        Ok(Some(check))
    }

    /// The folders that may hold an artifact's files: its written content first.
    fn folders(&self, digest: Digest, place: &StorageLocation) -> Vec<PathBuf> {
        let published = folder_of(place);
        let kept = Some(self.kept_folder(digest))
            .filter(|kept| kept.is_dir() && published != Some(kept.as_path()));
        kept.into_iter()
            .chain(published.map(Path::to_owned))
            .collect()
    }
}

fn folder_of(place: &StorageLocation) -> Option<&Path> {
    match place {
        StorageLocation::Folder { path } => Some(path),
        StorageLocation::Registry { .. } => None,
    }
}

/// A file that must be read.
struct Suspect {
    path: PathBuf,
    file: Option<File>,
}

impl Suspect {
    fn is_still(&mut self, chunk: ChunkRef, offset: u64, buffer: &mut Vec<u8>) -> io::Result<bool> {
        let file = match &mut self.file {
            Some(file) => file,
            // It was a file at the stat: anything else must not be followed or waited for.
            none => none.insert(
                File::options()
                    .read(true)
                    .custom_flags(NEVER_WAITS)
                    .open(&self.path)?,
            ),
        };
        buffer.resize(chunk.len as usize, 0);
        file.read_exact_at(buffer, offset)?;
        Ok(Hash::of(buffer) == chunk.id)
    }
}

/// The file of an entry: the first that exists, else its path in the last folder. `None`: there is
/// no folder.
fn stat(
    folders: &[PathBuf],
    path: &RelPath,
    file: &FileInfo,
) -> Result<Option<(PathBuf, ChangeCheck)>, Fault> {
    let mut last = None;
    for folder in folders {
        let path = path.in_dir(folder);
        let why = match symlink_metadata(&path) {
            Ok(meta) if !meta.is_file() => "it is not a regular file any more".to_owned(),
            Ok(meta) if meta.len() != file.size => {
                format!("it has {} bytes now, and had {}", meta.len(), file.size)
            }
            Ok(meta) => return Ok(Some((path, Ok((meta.ctime(), meta.ctime_nsec()))))),
            Err(error) => why_not(&path, &error)?,
        };
        last = Some((path, Err(why)));
    }
    Ok(last)
}

/// Why a file is unavailable; a fault if this says nothing about the file.
fn why_not(path: &Path, error: &io::Error) -> Result<String, Fault> {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => Ok("it is gone".into()),
        ErrorKind::UnexpectedEof => Ok("it is shorter than its recorded size".into()),
        ErrorKind::PermissionDenied => Ok(error.to_string()),
        _ => Err(Fault::io(format_args!("look at {}", path.display()), error)),
    }
}

/// Sleeps until `stop` is cancelled at the latest.
fn rest(time: Duration, stop: &CancellationToken) {
    let until = Instant::now() + time;
    while !stop.is_cancelled() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        std::thread::sleep(left.min(STOP_LOOK_EVERY));
    }
}

//! The look: whether what was published in place still is what it was. By stat, for inotify does
//! not tell of a NAS.
//!
//! [`InPlaceReader::look`] walks the manifest and compares the size of each file. One that changed
//! since it was last read is read and hashed again: that goes by the clock of its filesystem
//! (ctime), which is not ours and which nobody can set. So a look costs a stat a file as a rule.
//! Whatever the size of the artifact, it holds a page of each level of the manifest, and a [`Mark`]
//! outlives it.
//!
//! The site's watch calls it. Nothing survives the daemon: a new [`Mark`] goes by the time of
//! publishing, so the first looks read again what changed since then.

use std::fs::{File, symlink_metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use tokio_util::sync::CancellationToken;

use super::{InPlaceReader, changed_text, is_away, lies_at};
use base::fault::Fault;
use base::names::RelPath;
use content::chunk::Hash;
use content::manifest::{ChunkRef, Digest, EntryBody, FileInfo, Root, Step, Walk};
use sink::StorageLocation;

/// A look that is in no hurry rests so many times as long as it works.
pub const RESTS: u32 = 4;
/// Work between two rests.
const WORK: Duration = Duration::from_millis(100);
/// How often a rest looks whether the daemon stops.
const STOP_LOOK_EVERY: Duration = Duration::from_millis(50);
/// What the clock of a NAS may be behind ours.
const SKEW_MAX: Duration = Duration::from_secs(120);
/// The steps of the coarsest clock that a filesystem has (FAT).
const CLOCK_STEP_MAX: Duration = Duration::from_secs(2);

/// A link is not followed, and nobody need write into a pipe.
const NEVER_WAITS: i32 = (OFlags::NOFOLLOW.bits() | OFlags::NONBLOCK.bits()) as i32;

/// Seconds and nanoseconds since 1970, by the clock of a filesystem.
type Time = (i64, i64);
/// When a file changed last, or why it is another.
type ChangeCheck = Result<Time, String>;

/// Which files of an artifact need not be read again: whatever their number, one point in time says
/// it.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    /// No file changed since it was read but those that bear a later time.
    read: Time,
    /// The latest time that an earlier look saw, and when that look ended: the clock there was no
    /// earlier then.
    seen: Option<(Time, Instant)>,
}

impl Mark {
    /// Of what began to be published at this time by our clock, in milliseconds since 1970.
    pub fn new(published_ms: i64) -> Self {
        let ms = published_ms.saturating_sub(SKEW_MAX.as_millis() as i64);
        Self {
            read: (ms.div_euclid(1000), ms.rem_euclid(1000) * 1_000_000),
            seen: None,
        }
    }

    /// A time that no file can bear which changes from now on. So it is one that was seen before:
    /// of what a look sees itself it cannot be said, since a file that it has passed may change
    /// before one that it comes to.
    fn past(&self) -> Option<Time> {
        self.seen
            .filter(|(_, ended)| ended.elapsed() > CLOCK_STEP_MAX)
            .map(|(time, _)| time)
    }
}

/// What a look saw.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Files that are no longer what was published.
    pub changed: u64,
    /// The path of the first of them, and why.
    pub first: Option<String>,
    /// Bytes that were read.
    pub read: u64,
}

impl Look {
    /// What changed, in words; `None`: nothing.
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
    /// Looks at what was published at `place`. `None`: nothing can be said, because a folder is
    /// away or `stop` came. Unless it is in a `hurry` it leaves the disk alone most of the time.
    /// Blocks.
    pub fn look(
        &self,
        digest: Digest,
        root: &Root,
        place: &StorageLocation,
        mark: &mut Mark,
        hurry: bool,
        stop: &CancellationToken,
    ) -> Result<Option<Look>, Fault> {
        let folders = self.folders(digest, place);
        let away = || folders.iter().any(|folder| is_away(folder));
        if away() {
            return Ok(None);
        }
        let published = folder_of(place);
        let past = mark.past();
        let (mut look, mut latest): (_, Time) = (Look::default(), (i64::MIN, 0));
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
                    // Blobs of a registry are named by their digests: they cannot change.
                    if published.is_none() && lies_at(place, &entry.path, &file) {
                        continue;
                    }
                    let Some((path, seen)) = stat(&folders, &entry.path, &file)? else {
                        continue;
                    };
                    match seen {
                        Err(why) => Some((path, why)),
                        // What had to be written lies under another clock, and nobody but us writes
                        // there.
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
                        look.read += u64::from(chunk.len);
                        let why = match file.is_still(chunk, spot.offset, &mut buffer) {
                            Ok(true) => None,
                            Ok(false) => Some("its content is another".to_owned()),
                            Err(error) => Some(why_not(&file.path, &error)?),
                        };
                        why.and_then(|why| suspect.take().map(|file| (file.path, why)))
                    }
                },
            };
            if let Some((path, why)) = wrong {
                // It may have been unmounted while this looked.
                if look.changed == 0 && away() {
                    return Ok(None);
                }
                look.changed += 1;
                look.first
                    .get_or_insert_with(|| changed_text(path.display(), why));
            }
        }
        if look.changed > 0 && away() {
            return Ok(None);
        }
        if let (0, Some(past)) = (look.changed, past) {
            mark.read = past;
        }
        if mark.seen.is_none() || past.is_some() {
            mark.seen = Some((latest, Instant::now()));
        }
        Ok(Some(look))
    }

    /// The folders in which the files of an artifact may lie: what had to be written of it first.
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

/// A file that has to be read.
struct Suspect {
    path: PathBuf,
    file: Option<File>,
}

impl Suspect {
    fn is_still(&mut self, chunk: ChunkRef, offset: u64, buffer: &mut Vec<u8>) -> io::Result<bool> {
        let file = match &mut self.file {
            Some(file) => file,
            // It was a file when it was looked at: nothing else may be followed, or waited for.
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

/// The file that an entry is: where it lies first, else where it would in the last folder. `None`:
/// there is no folder.
fn stat(
    folders: &[PathBuf],
    path: &RelPath,
    file: &FileInfo,
) -> Result<Option<(PathBuf, ChangeCheck)>, Fault> {
    let mut last = None;
    for folder in folders {
        let path = path.in_dir(folder);
        let why = match symlink_metadata(&path) {
            Ok(meta) if !meta.is_file() => "it is no regular file now".to_owned(),
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

/// Why a file cannot be had; a fault if that says nothing of the file.
fn why_not(path: &Path, error: &io::Error) -> Result<String, Fault> {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => Ok("it is gone".into()),
        ErrorKind::UnexpectedEof => Ok("it is shorter now".into()),
        ErrorKind::PermissionDenied => Ok(error.to_string()),
        _ => Err(Fault::io(format_args!("look at {}", path.display()), error)),
    }
}

/// Sleeps, unless `stop` comes.
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

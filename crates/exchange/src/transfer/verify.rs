//! Compares an artifact at a site with its manifest.
//!
//! A fault of the artifact is a missing entry, an entry of another type, or other content. An error
//! of the NAS says nothing about the artifact: the check then fails, and nothing is fetched again.

use std::fs::Metadata;
use std::io::{self, ErrorKind, Read as _};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use xxhash_rust::xxh3::xxh3_64;

use crate::chunk_index::ChunkIndex;
use base::durable;
use base::fault::{Fault, IoContext};
use base::limits::{OFFENDERS_LISTED_MAX, XATTRS_BYTES_MAX};
use content::manifest::{Attributes, EntryBody, FileInfo, FileTime, Step, Walk, Xattr};
use content::store::Store;
use sink::file_state::FileState;
use sink::{Incoming, Sink, StorageLocation, Verification};

/// Files whose records are looked up together.
const LOOK_UP: usize = 256;
/// Bytes of a file that are read at once.
const READ_BYTES: usize = 256 << 10;

/// The result of a check, one line each.
#[derive(Debug, Default)]
pub struct VerifyReport {
    /// Missing or damaged entries, which are delivered again.
    pub faults: Vec<String>,
    /// Other differences from the delivered state, which stay as they are.
    pub notes: Vec<String>,
    /// Why the content could not be read: its condition is unknown.
    pub unread: Option<String>,
}

/// Compares a committed artifact with its manifest: reads its content, unless a quick check was
/// requested.
pub async fn verify(
    sink: &dyn Sink,
    store: Store,
    incoming: &Incoming,
    place: &StorageLocation,
    verification: &Verification,
) -> Result<VerifyReport, Fault> {
    let place = &place_now(sink, incoming, place);
    let faults = sink.verify(incoming, place, verification).await?;
    // An artifact that is missing as a whole is not reported file by file.
    let folder = match place {
        StorageLocation::Folder { path }
            if faults.is_empty() && incoming.artifact.kind.is_files() =>
        {
            path.clone()
        }
        _ => {
            return Ok(VerifyReport {
                faults,
                notes: verification.take_notes(),
                unread: verification.take_unread(),
            });
        }
    };
    let (mut files, noted) = compare(sink, store, incoming, folder, verification).await?;
    if !files.faults.is_empty() {
        // A NAS that was unmounted in the meantime has lost nothing.
        let lost = sink.verify(incoming, place, verification).await?;
        files.faults.splice(0..0, lost);
    }
    let FileProblems { mut faults, unread } = files;
    if !unread.is_empty() {
        // If the disk works but cannot read a few files, those files are damaged.
        sink.trial().await?;
        faults.extend(unread);
    }
    Ok(VerifyReport {
        faults,
        notes: noted.into_iter().chain(verification.take_notes()).collect(),
        unread: verification.take_unread(),
    })
}

/// Whether a folder that no daemon registered holds exactly what the manifest lists.
pub(super) async fn is_intact(
    sink: &dyn Sink,
    store: Store,
    incoming: &Incoming,
    folder: PathBuf,
) -> Result<bool, Fault> {
    let (files, _) = compare(sink, store, incoming, folder, &Verification::default()).await?;
    Ok(files.faults.is_empty() && files.unread.is_empty())
}

/// Compares the entries of a folder with the manifest. The second result is what differs beside the
/// content.
async fn compare(
    sink: &dyn Sink,
    store: Store,
    incoming: &Incoming,
    folder: PathBuf,
    verification: &Verification,
) -> Result<(FileProblems, Vec<String>), Fault> {
    let (root, quick, shared) = (
        incoming.root.clone(),
        verification.quick,
        verification.clone(),
    );
    let work = move || {
        let (mut seen, mut modes, mut others) = (
            FileProblems::default(),
            Listed::default(),
            Listed::default(),
        );
        for step in Walk::new(&root, &store) {
            let Step::Entry { entry, .. } = step? else {
                continue;
            };
            let path = entry.path.in_dir(&folder);
            if let EntryBody::File(file) = entry.body
                && !quick
            {
                shared.read(file.size);
            }
            let there = match std::fs::symlink_metadata(&path) {
                Ok(there) => there,
                Err(error) => {
                    seen.error(&path, &error)?;
                    continue;
                }
            };
            if !matches!(entry.body, EntryBody::Symlink(_)) {
                let mode = there.permissions().mode() & 0o7777;
                if there.is_symlink() {
                    modes.add(|| format!("{} is a link", entry.path));
                } else if mode & noted(&entry.body) != entry.mode {
                    modes.add(|| format!("{} is {mode:o} and was {:o}", entry.path, entry.mode));
                }
            }
            if let Some(what) = attribute_fault(&entry.attributes, &path, &there) {
                others.add(|| format!("{}: {what}", entry.path));
            }
            let wrong = match entry.body {
                EntryBody::Dir => std::fs::metadata(&path)
                    .map(|meta| (!meta.is_dir()).then(|| "the folder is missing".to_owned())),
                EntryBody::Symlink(_) if !there.is_symlink() => {
                    Ok(Some("the link is missing or has another target".to_owned()))
                }
                EntryBody::Symlink(target) => std::fs::read_link(&path).map(|now| {
                    (now != Path::new(&target))
                        .then(|| "the link is missing or has another target".to_owned())
                }),
                EntryBody::File(file) if quick => size_fault(&path, file),
                EntryBody::File(file) => file_fault(&path, file),
            };
            match wrong {
                Ok(wrong) => seen
                    .faults
                    .extend(wrong.map(|why| format!("{}: {why}", path.display()))),
                Err(error) => seen.error(&path, &error)?,
            }
        }
        let modes = modes.line(|count| {
            format!(
                "{} has not the permission bits that were published ({count})",
                folder.display()
            )
        });
        let others = others.line(|count| {
            format!(
                "{} has not the times or attributes that were published ({count})",
                folder.display()
            )
        });
        if quick {
            shared.note("quick check: names and sizes were compared; no content was read");
        }
        Ok((seen, modes.into_iter().chain(others).collect()))
    };
    sink.threads().run(work).await
}

/// The current location of an artifact: the root of its sink may have changed since it was
/// delivered.
pub(super) fn place_now(
    sink: &dyn Sink,
    incoming: &Incoming,
    place: &StorageLocation,
) -> StorageLocation {
    sink.place_of(&incoming.artifact)
        .unwrap_or_else(|| place.clone())
}

/// Problems of an artifact's files.
#[derive(Default)]
pub(super) struct FileProblems {
    /// Missing or damaged files.
    pub(super) faults: Vec<String>,
    /// Files that the disk cannot read. They are damaged if the disk works otherwise.
    pub(super) unread: Vec<String>,
}

impl FileProblems {
    /// Records an error of a stat or a read. Returns the error if it says nothing about the
    /// artifact.
    pub(super) fn error(&mut self, path: &Path, error: &io::Error) -> Result<(), Fault> {
        use rustix::io::Errno;
        let line = || format!("{}: read: {error}", path.display());
        match Errno::from_io_error(error) {
            // Missing, of another type, below a symbolic link, or refused because it is not a
            // regular file.
            None
            | Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::ISDIR | Errno::NXIO) => {
                self.faults.push(line());
            }
            Some(Errno::IO | Errno::BADMSG | Errno::UCLEAN) => self.unread.push(line()),
            Some(_) => {
                return Err(Fault::io(format_args!("read {}", path.display()), error).of_sink());
            }
        }
        Ok(())
    }
}

/// Checks a committed artifact: presence, types, sizes, and whether a file was written to since. Only
/// files that somebody touched are read. Returns the first difference. Entries that were not checked
/// by `until` count as intact.
pub(super) async fn look(
    sink: Arc<dyn Sink>,
    store: Store,
    chunk_index: Arc<ChunkIndex>,
    incoming: Incoming,
    place: StorageLocation,
    until: Instant,
) -> Result<Option<String>, Fault> {
    let place = place_now(sink.as_ref(), &incoming, &place);
    let StorageLocation::Folder { path: folder } = place.clone() else {
        return Ok(None);
    };
    let threads = sink.threads().clone();
    let work = move || {
        let touched = Touched {
            committed: sink.committed_at(&incoming.artifact),
            location: chunk_index.landed(incoming.digest, &place),
            chunk_index,
            until,
        };
        let mut files = Vec::with_capacity(LOOK_UP);
        for step in Walk::new(&incoming.root, &store) {
            let Step::Entry { entry, number, .. } = step? else {
                continue;
            };
            if Instant::now() >= until {
                break;
            }
            let path = entry.path.in_dir(&folder);
            let meta = match std::fs::symlink_metadata(&path) {
                Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                    return Ok(Some(format!("{} is gone", path.display())));
                }
                other => other.at_sink(path.display())?,
            };
            let wrong = match entry.body {
                EntryBody::Dir => (!meta.is_dir()).then_some("is not a folder"),
                EntryBody::Symlink(_) if !meta.is_symlink() => Some("is a link to another target"),
                EntryBody::Symlink(target) => {
                    (std::fs::read_link(&path).at_sink(path.display())? != Path::new(&target))
                        .then_some("is a link to another target")
                }
                EntryBody::File(file) if !meta.is_file() || meta.len() != file.size => {
                    Some("has another size")
                }
                EntryBody::File(file) => {
                    let modified = entry.attributes.modified;
                    let wrong = touched.was_written(&meta, modified);
                    if wrong.is_none() {
                        files.push((number, path.clone(), file, FileState::of(&meta)));
                    }
                    wrong
                }
            };
            if let Some(wrong) = wrong {
                return Ok(Some(format!("{} {wrong}", path.display())));
            }
            if files.len() == LOOK_UP
                && let Some(wrong) = touched.first_changed(&mut files)?
            {
                return Ok(Some(wrong));
            }
        }
        touched.first_changed(&mut files)
    };
    threads.run(work).await
}

/// Whether somebody touched files of a committed artifact.
struct Touched {
    committed: Option<SystemTime>,
    /// The location of the artifact in the index.
    location: Option<u32>,
    chunk_index: Arc<ChunkIndex>,
    until: Instant,
}

impl Touched {
    /// Whether a file has a later time than the artifact. A published time may be later, too.
    fn was_written(&self, meta: &Metadata, published: Option<FileTime>) -> Option<&'static str> {
        let published = published.filter(|time| Some(time.system_time()) > self.committed);
        let since = meta
            .modified()
            .ok()
            .zip(self.committed)
            .is_some_and(|(written, committed)| {
                written > committed && !published.is_some_and(|time| time.is_near(written))
            });
        since.then_some("was written to since it arrived")
    }

    /// Reads the files whose state is not that of their record; without a record, those with a later
    /// change time, which no tool can set. A new link or another mode changes the state, too.
    fn first_changed(
        &self,
        files: &mut Vec<(u64, PathBuf, FileInfo, FileState)>,
    ) -> Result<Option<String>, Fault> {
        let known = match self.location {
            Some(location) => {
                let keys: Vec<_> = files.iter().map(|(entry, ..)| (location, *entry)).collect();
                self.chunk_index.intact(&keys)?
            }
            None => vec![None; files.len()],
        };
        let committed = self
            .committed
            .and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
        for ((_, path, file, state), known) in files.drain(..).zip(known) {
            let is_touched = match known {
                Some(known) => known.state != state,
                None => committed.is_some_and(|at| {
                    state.changed > (at.as_secs() as i64, i64::from(at.subsec_nanos()))
                }),
            };
            if is_touched && self.is_changed(&path, file).at_sink(path.display())? {
                return Ok(Some(format!(
                    "{} was changed since it arrived",
                    path.display()
                )));
            }
        }
        Ok(None)
    }

    /// Whether a file has other content, if it can be read in time.
    fn is_changed(&self, path: &Path, file: FileInfo) -> io::Result<bool> {
        let mut opened = durable::open_regular_nofollow(path)?;
        let (mut hasher, mut buffer) = (blake3::Hasher::new(), vec![0; READ_BYTES]);
        while Instant::now() < self.until {
            match opened.read(&mut buffer)? {
                0 => return Ok(*hasher.finalize().as_bytes() != file.hash.0),
                read => drop(hasher.update(buffer.get(..read).unwrap_or_default())),
            }
        }
        Ok(false)
    }
}

/// The additional entries in an artifact's folder, as one line. `whole`: all entries of the
/// artifact exist.
pub async fn beside(
    sink: &dyn Sink,
    store: Store,
    incoming: &Incoming,
    place: &StorageLocation,
    whole: bool,
) -> Result<Option<String>, Fault> {
    let folder = match place_now(sink, incoming, place) {
        StorageLocation::Folder { path } if incoming.artifact.kind.is_files() => path,
        _ => return Ok(None),
    };
    let root = incoming.root.clone();
    let work = move || {
        // Usually there are none, and counting is enough; otherwise 8 bytes are held for each name.
        let totals = root.totals;
        let (mut there, names) = (0, totals.files + totals.dirs + totals.symlinks);
        each(&folder, Path::new(""), &mut |_: &Path| {
            there += 1;
            true
        });
        if whole && there <= names {
            return Ok(None);
        }
        let mut own = Vec::with_capacity(names as usize);
        for step in Walk::new(&root, &store) {
            if let Step::Entry { entry, .. } = step? {
                own.push(xxh3_64(entry.path.as_str().as_bytes()));
            }
        }
        own.sort_unstable();
        let mut strangers = Listed::default();
        each(&folder, Path::new(""), &mut |path: &Path| {
            let known = own
                .binary_search(&xxh3_64(path.as_os_str().as_bytes()))
                .is_ok();
            if !known {
                strangers.add(|| path.display().to_string());
            }
            known
        });
        Ok(strangers
            .line(|count| format!("{} holds additional entries ({count})", folder.display())))
    };
    sink.threads().run(work).await
}

/// Calls `see` with each entry of `below` in a folder, by its relative path; a folder for which
/// `see` returns false is not entered. A folder that cannot be read is skipped: additional entries
/// belong to others, who may restrict access or remove them.
fn each(folder: &Path, below: &Path, see: &mut impl FnMut(&Path) -> bool) {
    for entry in std::fs::read_dir(folder.join(below))
        .into_iter()
        .flatten()
        .flatten()
    {
        let path = below.join(entry.file_name());
        if see(&path) && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            each(folder, &path, see);
        }
    }
}

/// The first entries, and how many there are.
#[derive(Default)]
struct Listed {
    shown: Vec<String>,
    count: usize,
}

impl Listed {
    fn add(&mut self, what: impl FnOnce() -> String) {
        self.count += 1;
        if self.count <= OFFENDERS_LISTED_MAX {
            self.shown.push(what());
        }
    }

    fn line(self, of: impl FnOnce(usize) -> String) -> Option<String> {
        let more = if self.count > self.shown.len() {
            ", …"
        } else {
            ""
        };
        (self.count > 0).then(|| format!("{}: {}{more}", of(self.count), self.shown.join(", ")))
    }
}

/// The permission bits that must be as published. A folder may have inherited its other bits.
fn noted(body: &EntryBody) -> u32 {
    if *body == EntryBody::Dir {
        0o777
    } else {
        0o7777
    }
}

/// Which attribute of an entry differs.
fn attribute_fault(attributes: &Attributes, path: &Path, there: &Metadata) -> Option<String> {
    if let (Some(time), Ok(now)) = (attributes.modified, there.modified())
        && !time.is_near(now)
    {
        return Some("its modification time".into());
    }
    let mut value = vec![0; XATTRS_BYTES_MAX * usize::from(!attributes.xattrs.is_empty())];
    let differs = |xattr: &&Xattr| {
        let len = rustix::fs::lgetxattr(path, xattr.name(), &mut value);
        len.map_or(true, |len| value.get(..len) != Some(xattr.value()))
    };
    let wrong = attributes.xattrs.iter().find(differs);
    wrong.map(|xattr| format!("its attribute {}", xattr.name()))
}

fn size_fault(path: &Path, file: FileInfo) -> io::Result<Option<String>> {
    let meta = std::fs::metadata(path)?;
    Ok(match meta.is_file() {
        false => Some("it is not a file".to_owned()),
        true => (meta.len() != file.size)
            .then(|| format!("it has {} bytes, {} were delivered", meta.len(), file.size)),
    })
}

fn file_fault(path: &Path, file: FileInfo) -> io::Result<Option<String>> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(durable::open_regular_nofollow(path)?)?;
    Ok((*hasher.finalize().as_bytes() != file.hash.0)
        .then(|| "the content does not match the delivered content".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::fault::{Reason, Retry};
    use rustix::io::Errno as E;

    #[test]
    fn an_error_of_the_nas_says_nothing_of_the_artifact() {
        let look = |error: io::Error| {
            let mut seen = FileProblems::default();
            seen.error(Path::new("/nas/a"), &error)
                .map(|()| (seen.faults.len(), seen.unread.len()))
        };
        for gone in [E::NOENT, E::NOTDIR, E::LOOP, E::ISDIR] {
            assert_eq!(look(gone.into()).unwrap(), (1, 0), "{gone:?}");
        }
        assert_eq!(
            look(io::Error::new(
                ErrorKind::InvalidInput,
                "it is not a regular file"
            ))
            .unwrap(),
            (1, 0)
        );
        assert_eq!(
            look(E::IO.into()).unwrap(),
            (0, 1),
            "one bad block, or a disk that failed"
        );
        for away in [
            E::HOSTDOWN,
            E::NETDOWN,
            E::NETRESET,
            E::CONNABORTED,
            E::STALE,
            E::ACCESS,
            E::TIMEDOUT,
            E::INVAL,
        ] {
            let fault = look(away.into()).unwrap_err();
            let waits = matches!(fault.reason, Reason::SinkUnavailable | Reason::SinkDenied)
                && fault.retry == Retry::Backoff;
            assert!(waits, "{fault:?}");
        }
    }
}

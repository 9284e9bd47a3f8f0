//! Compares what a site holds of an artifact with its manifest.
//!
//! A fault of the artifact is what is gone, of another kind, or of another content. An error of the
//! NAS says nothing of the artifact: then the look fails, and nothing is brought again.

use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use xxhash_rust::xxh3::xxh3_64;

use base::durable;
use base::fault::{Fault, IoContext};
use base::limits::OFFENDERS_LISTED_MAX;
use content::manifest::{EntryBody, FileInfo, Step, Walk};
use content::store::Store;
use sink::{Incoming, Look, Sink, StorageLocation};

/// What a look at an artifact found, one line each.
#[derive(Debug, Default)]
pub struct VerifyReport {
    /// What is gone or damaged, and is brought again.
    pub faults: Vec<String>,
    /// What else is not as it was delivered, and is left so.
    pub notes: Vec<String>,
    /// Why the content could not be read: then nothing is known of it.
    pub unread: Option<String>,
}

/// Compares all that was committed of an artifact with its manifest: reads its content, unless a
/// quick look was asked for.
pub async fn verify(
    sink: &dyn Sink,
    store: Store,
    incoming: &Incoming,
    place: &StorageLocation,
    look: &Look,
) -> Result<VerifyReport, Fault> {
    let place = &place_now(sink, incoming, place);
    let faults = sink.verify(incoming, place, look).await?;
    // What is gone as a whole need not be told file by file.
    let folder = match place {
        StorageLocation::Folder { path }
            if faults.is_empty() && incoming.artifact.kind.is_files() =>
        {
            path.clone()
        }
        _ => {
            return Ok(VerifyReport {
                faults,
                notes: look.take_notes(),
                unread: look.take_unread(),
            });
        }
    };
    let (root, quick, shared) = (incoming.root.clone(), look.quick, look.clone());
    let work = move || {
        let (mut seen, mut modes) = (FileProblems::default(), Listed::default());
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
            let wrong = match entry.body {
                EntryBody::Dir => std::fs::metadata(&path)
                    .map(|meta| (!meta.is_dir()).then(|| "the folder is gone".to_owned())),
                EntryBody::Symlink(_) if !there.is_symlink() => {
                    Ok(Some("the link is gone or another".to_owned()))
                }
                EntryBody::Symlink(target) => std::fs::read_link(&path).map(|now| {
                    (now != Path::new(&target)).then(|| "the link is gone or another".to_owned())
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
        if quick {
            shared.note("quick check: names and sizes were compared; no content was read");
        }
        Ok((seen, modes))
    };
    let (FileProblems { mut faults, unread }, modes) = sink.threads().run(work).await?;
    if !faults.is_empty() {
        // A NAS that was unmounted meanwhile has lost nothing.
        faults.splice(0..0, sink.verify(incoming, place, look).await?);
    }
    if !unread.is_empty() {
        // A disk that works cannot read a few files only: those are damaged.
        sink.trial().await?;
        faults.extend(unread);
    }
    Ok(VerifyReport {
        faults,
        notes: modes.into_iter().chain(look.take_notes()).collect(),
        unread: look.take_unread(),
    })
}

/// Where an artifact is now: its sink may have another root than when it arrived.
fn place_now(sink: &dyn Sink, incoming: &Incoming, place: &StorageLocation) -> StorageLocation {
    sink.place_of(&incoming.artifact)
        .unwrap_or_else(|| place.clone())
}

/// What is wrong with the files of an artifact.
#[derive(Default)]
struct FileProblems {
    /// What is gone or damaged.
    faults: Vec<String>,
    /// What the disk cannot read. It is damaged if the disk works otherwise.
    unread: Vec<String>,
}

impl FileProblems {
    /// Takes an error of looking at or reading an entry. Returns it if it says nothing of the
    /// artifact.
    fn error(&mut self, path: &Path, error: &io::Error) -> Result<(), Fault> {
        use rustix::io::Errno;
        let line = || format!("{}: read: {error}", path.display());
        match Errno::from_io_error(error) {
            // Gone, of another kind, or behind a link, and what is refused as no regular file.
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

/// Looks at what was committed of an artifact without reading it: presence, kinds, sizes, and
/// whether something was written to since. Returns the first thing that is wrong. What was not
/// looked at by `until` is believed.
pub(super) async fn look(
    sink: Arc<dyn Sink>,
    store: Store,
    incoming: Incoming,
    place: StorageLocation,
    until: Instant,
) -> Result<Option<String>, Fault> {
    let StorageLocation::Folder { path: folder } = place_now(sink.as_ref(), &incoming, &place)
    else {
        return Ok(None);
    };
    let threads = sink.threads().clone();
    let work = move || {
        let committed = sink.committed_at(&incoming.artifact);
        for step in Walk::new(&incoming.root, &store) {
            let Step::Entry { entry, .. } = step? else {
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
                EntryBody::Dir => (!meta.is_dir()).then_some("is no folder"),
                EntryBody::Symlink(_) if !meta.is_symlink() => Some("is another link"),
                EntryBody::Symlink(target) => {
                    (std::fs::read_link(&path).at_sink(path.display())? != Path::new(&target))
                        .then_some("is another link")
                }
                EntryBody::File(file) if !meta.is_file() || meta.len() != file.size => {
                    Some("has another size")
                }
                EntryBody::File(_) => {
                    let since = meta
                        .modified()
                        .ok()
                        .zip(committed)
                        .is_some_and(|(written, committed)| written > committed);
                    since.then_some("was written to since it arrived")
                }
            };
            if let Some(wrong) = wrong {
                return Ok(Some(format!("{} {wrong}", path.display())));
            }
        }
        Ok(None)
    };
    threads.run(work).await
}

/// What lies in an artifact's folder and is no part of it, as one line. `whole`: all that is part
/// of it is there.
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
        // As a rule there is nothing, and then counting says so; else 8 bytes are held of each
        // name.
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
            .line(|count| format!("{} holds what is no part of it ({count})", folder.display())))
    };
    sink.threads().run(work).await
}

/// Tells `see` of all that lies in `below` of a folder, by its path in there; a folder that it does
/// not want is not looked into. Nor is one that cannot be: what lies beside an artifact is others'
/// and may be theirs alone, or gone meanwhile.
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

/// The first of what is told of, and how many there are.
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

/// The bits that must be as they were published. A folder may have got its others from the folder
/// that it is in.
fn noted(body: &EntryBody) -> u32 {
    if *body == EntryBody::Dir {
        0o777
    } else {
        0o7777
    }
}

fn size_fault(path: &Path, file: FileInfo) -> io::Result<Option<String>> {
    let meta = std::fs::metadata(path)?;
    Ok(match meta.is_file() {
        false => Some("it is no file".to_owned()),
        true => (meta.len() != file.size)
            .then(|| format!("it has {} bytes, {} were delivered", meta.len(), file.size)),
    })
}

fn file_fault(path: &Path, file: FileInfo) -> io::Result<Option<String>> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(durable::open_regular_nofollow(path)?)?;
    Ok((*hasher.finalize().as_bytes() != file.hash.0)
        .then(|| "its content is not what was delivered".to_owned()))
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

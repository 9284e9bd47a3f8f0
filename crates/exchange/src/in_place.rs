//! Serves artifacts from where they were published or committed, without a second copy of their
//! bytes.
//!
//! [`InPlaceReader::publish`] reads a source and stores only its manifest, and a row in
//! [`ChunkIndex`] for each chunk. Entries whose content is not simply a file of the published
//! folder are written to `<data_dir>/published/<digest>/`, each at its path in the artifact. The
//! same applies to the layout files of a received image when another site requests it.
//! [`fetch::serve`](crate::fetch::serve) reads the chunks again, hashes each, and never sends a
//! changed chunk: the error is `integrity`, with the path. [`InPlaceReader::check`] finds changed
//! files before a request does.
//!
//! The site's daemon calls it, and so does a publish from another machine; [`Holdings`] says which
//! artifacts exist. The rows are hints: a missing or stale row is recreated from the manifest. A
//! crash during a publish leaves a folder `published/p-…`, which [`InPlaceReader::clean`] removes
//! at the next start.

mod keep;
mod watch;

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use crate::chunk_index::{self, At, ChunkIndex, LocationInfo, Reader};
use crate::fetch::{Child, Library, Opened, Pieces, pieces};
use base::blocking::{Stop, blocking, blocking_at, cancellable};
use base::budget::{Budget, Share};
use base::buffers::Buffers;
use base::durable;
use base::expiring_cache::ExpiringCache;
use base::fault::{Code, Fault, IoContext, Reason, Retry};
use base::locks::Locks;
use base::names::RelPath;
use base::peer::Peer;
use content::chunk::Hash;
use content::frame::Frame;
use content::manifest::{ChunkRef, Digest, EntryBody, FileInfo, Pages, Root, Step, Until, Walk};
use content::store::Store;
use model::actor::Actor;
use model::policy::{self, Object, Verb};
use model::protocol::Wanted;
use sink::{Sink, StorageLocation};
use state::Catalogue;

pub use keep::InPlace;
pub use watch::{ContentCheck, Mark, RESTS};

/// The next step for a file that changed after it was published.
pub const CHANGED_NEXT: &str = "restore the original content and retry the transfer, or publish the current content as a new version";

/// Artifacts kept open.
const OPENED_MAX: usize = 16;
/// Rows of the index that are written together.
const ROWS_TOGETHER: usize = 32 << 10;
/// The rows of one artifact are recreated at most this often: the walk over a large manifest takes
/// time.
const INDEX_EVERY: Duration = Duration::from_secs(30);
/// How long the answer of [`Holdings`] is cached.
const HELD_FOR: Duration = Duration::from_secs(1);

/// An artifact at this site.
#[derive(Debug, Clone)]
pub struct HeldArtifact {
    /// Its root manifest.
    pub root: Root,
    /// Its storage locations, the best first.
    pub places: Vec<StorageLocation>,
}

/// Says which artifacts this daemon can serve.
#[async_trait]
pub trait Holdings: Send + Sync {
    /// The artifact with this digest, if this site holds it.
    async fn held(&self, digest: Digest) -> Result<Option<HeldArtifact>, Fault>;
}

/// Serves the artifacts at this site. Cheap to clone.
#[derive(Clone)]
pub struct InPlaceReader {
    inner: Arc<Inner>,
}

struct Inner {
    /// Manifest pages.
    store: Store,
    chunk_index: Arc<ChunkIndex>,
    /// `<data_dir>/published`
    kept: PathBuf,
    holdings: Arc<dyn Holdings>,
    /// Reads blobs of the registry; `None`: the site has no registry.
    images: Option<Arc<dyn Sink>>,
    opened: Mutex<Vec<Arc<Opened>>>,
    budget: Budget,
    /// The artifacts whose rows were just recreated.
    indexed: Mutex<ExpiringCache<Digest, ()>>,
    /// Locked while the rows of an artifact are recreated.
    indexing: Locks<Digest>,
    /// Buffers for reading published files.
    buffers: Buffers,
    /// Recent answers of `holdings`: a path of the filesystem of each artifact.
    held: Mutex<ExpiringCache<Digest, PathBuf>>,
    /// Locked while a folder in `kept` is created or replaced.
    keeping: Mutex<()>,
}

impl InPlaceReader {
    /// A reader that stores its pages in `store`, its rows in `chunk_index`, and written content in
    /// `kept`. Bytes that were read and not yet sent take at most `memory`.
    pub fn new(
        store: Store,
        chunk_index: Arc<ChunkIndex>,
        kept: PathBuf,
        holdings: Arc<dyn Holdings>,
        images: Option<Arc<dyn Sink>>,
        memory: u64,
    ) -> Self {
        let budget = Budget::new(memory, memory);
        let (opened, held, indexed, indexing, keeping) = Default::default();
        let buffers = chunk_index::buffers();
        Self {
            inner: Arc::new(Inner {
                store,
                chunk_index,
                kept,
                holdings,
                images,
                opened,
                budget,
                indexed,
                indexing,
                buffers,
                held,
                keeping,
            }),
        }
    }

    /// Removes what a crash left, and what no artifact in `live` needs. Blocks.
    pub fn clean(&self, live: &[Digest]) -> Result<(), Fault> {
        let Ok(entries) = std::fs::read_dir(&self.inner.kept) else {
            return Ok(());
        };
        for entry in entries {
            let entry = entry.at(self.inner.kept.display())?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !live.iter().any(|digest| digest.hex() == name) {
                durable::remove_all(&entry.path())?;
            }
        }
        Ok(())
    }

    /// The folder of an artifact's written content.
    fn kept_folder(&self, digest: Digest) -> PathBuf {
        self.inner.kept.join(digest.hex())
    }

    /// The possible locations of an artifact's files: its written content first. The last one is
    /// used for files that are found nowhere.
    fn candidates(
        &self,
        digest: Digest,
        places: &[StorageLocation],
    ) -> Result<Vec<(u32, StorageLocation)>, Fault> {
        let known = &self.inner.chunk_index;
        let folder = self.kept_folder(digest);
        let kept = Some(StorageLocation::Folder {
            path: folder.clone(),
        })
        .filter(|kept| folder.is_dir() && !places.contains(kept));
        let number = |place: StorageLocation| {
            let foreign = !matches!(&place, StorageLocation::Folder { path } if *path == folder);
            let number = match known.landed(digest, &place) {
                Some(number) => number,
                None => known.put(
                    None,
                    LocationInfo {
                        place: place.clone(),
                        digest,
                        transfer: None,
                        foreign,
                        adopting: false,
                    },
                )?,
            };
            Ok((number, place))
        };
        kept.into_iter()
            .chain(places.iter().cloned())
            .map(number)
            .collect()
    }

    /// Records the location of every chunk of an artifact. `replace`: also where another location of
    /// it is known. Blocks.
    pub fn index(
        &self,
        digest: Digest,
        root: &Root,
        places: &[StorageLocation],
        replace: bool,
    ) -> Result<(), Fault> {
        let known = &self.inner.chunk_index;
        let candidates = self.candidates(digest, places)?;
        let (mut rows, mut entries, mut current) = (Vec::new(), Vec::new(), None);
        for step in Walk::new(root, &self.inner.store) {
            match step? {
                Step::Entry { number, entry, .. } => {
                    let EntryBody::File(file) = entry.body else {
                        continue;
                    };
                    let Some(place) = place_of(&candidates, &entry.path, &file) else {
                        return Ok(());
                    };
                    current = Some((place, number));
                    entries.push((place, number, entry.path, file));
                }
                Step::Chunk(chunk, spot) => {
                    let Some((place, entry)) = current else {
                        continue;
                    };
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
            }
            if rows.len() >= ROWS_TOGETHER || entries.len() >= ROWS_TOGETHER {
                known.note(&mut rows, &mut entries, replace)?;
            }
        }
        known.note(&mut rows, &mut entries, replace)
    }

    /// [`InPlaceReader::index`] once more, unless that was just done. Returns whether the rows are
    /// fresh.
    fn recreate_rows(
        &self,
        opened: &Opened,
        runtime: &tokio::runtime::Handle,
    ) -> Result<bool, Fault> {
        // One task for each artifact: a task that waited here finds the work done. A slow disk
        // delays only the readers of its own artifacts.
        let _alone = runtime.block_on(self.inner.indexing.lock(&opened.digest));
        if self.inner.indexed.lock().get(&opened.digest).is_some() {
            return Ok(false);
        }
        // Asked again now: no rows may be written for an artifact that was removed a moment ago.
        let held = runtime
            .block_on(self.inner.holdings.held(opened.digest))?
            .ok_or_else(|| not_here(opened.digest))?;
        tracing::info!(digest = %opened.digest, "recreating the chunk rows of an artifact");
        self.keep_layout(opened.digest, &opened.root)?;
        self.index(opened.digest, &opened.root, &held.places, true)?;
        let mut indexed = self.inner.indexed.lock();
        indexed.put(opened.digest, (), INDEX_EVERY);
        Ok(true)
    }

    fn reader(&self, runtime: &tokio::runtime::Handle) -> Reader {
        Reader::new(
            self.inner.chunk_index.clone(),
            self.inner.images.clone(),
            runtime.clone(),
        )
        .strict(self.inner.buffers.clone())
    }

    /// Frees buffers that were not used since the last call.
    pub fn rest(&self) {
        self.inner.buffers.rest();
    }

    /// Fails when this site does not hold an artifact. Asked for each request, with a short cache,
    /// so that a removed artifact is soon not served any more. Returns a path of its filesystem.
    async fn ensure_held(&self, digest: Digest) -> Result<PathBuf, Fault> {
        if let Some(path) = self.inner.held.lock().get(&digest) {
            return Ok(path.clone());
        }
        let held = self.inner.holdings.held(digest).await?;
        let held = held.ok_or_else(|| not_here(digest))?;
        let path = held
            .places
            .first()
            .map(|place| place.filesystem().to_owned());
        let path = path.unwrap_or_else(|| self.inner.kept.clone());
        self.inner.held.lock().put(digest, path.clone(), HELD_FOR);
        Ok(path)
    }

    /// Reads and hashes these chunks. Blocks.
    fn read(
        &self,
        opened: &Opened,
        chunks: &[ChunkRef],
        runtime: &tokio::runtime::Handle,
    ) -> Result<Vec<Bytes>, Fault> {
        let mut reader = self.reader(runtime);
        let ids: Vec<Hash> = chunks.iter().map(|c| c.id).collect();
        let found = self.inner.chunk_index.find(&ids)?;
        let runs = runs(&found);
        let mut out = Vec::with_capacity(chunks.len());
        for ((chunk, at), run) in chunks.iter().zip(found).zip(runs) {
            reader.ahead(run);
            let first = match at {
                Some(at) => reader.chunk(*chunk, at),
                None => Err(Fault::not_found(
                    "the storage location of this chunk is not recorded",
                )),
            };
            let chunk = match first {
                Ok(read) => read,
                Err(_) => {
                    let fresh = self.recreate_rows(opened, runtime)?;
                    let at = self
                        .inner
                        .chunk_index
                        .find(&[chunk.id])?
                        .into_iter()
                        .flatten()
                        .next();
                    let at = at.ok_or_else(|| {
                        Fault::internal(format!(
                            "chunk {} of {} has no storage location",
                            chunk.id, opened.digest
                        ))
                    })?;
                    match reader.chunk(*chunk, at) {
                        Ok(read) => read,
                        Err(fault) => return Err(self.wrong(opened, at, fresh, fault)),
                    }
                }
            };
            out.extend(Frame::encode(&chunk).into_pieces());
        }
        Ok(out)
    }

    /// The error for a chunk that cannot be served.
    fn wrong(&self, opened: &Opened, at: At, fresh: bool, fault: Fault) -> Fault {
        let info = self.inner.chunk_index.info(at.place);
        let own = info
            .as_ref()
            .is_some_and(|info| info.digest == opened.digest);
        let path = self
            .inner
            .chunk_index
            .entry(at.place, at.entry)
            .ok()
            .flatten()
            .map(|(path, _)| path);
        let (Some(info), Some(path)) = (info, path) else {
            return fault
                .with_reason(Reason::Internal)
                .with_retry(Retry::Backoff);
        };
        if !own && !fresh {
            // A row of another artifact replaced this one; it is looked up again after a while.
            return fault
                .with_reason(Reason::WaitingForSource)
                .with_retry(Retry::Backoff);
        }
        match &info.place {
            StorageLocation::Folder { path: folder } => {
                if is_away(folder) {
                    return Fault::unreachable(format!(
                        "{}, where it was published, is empty or not there",
                        folder.display()
                    ))
                    .with_reason(Reason::WaitingForSource)
                    .with_next("mount it again, or restore the files; the transfer then continues by itself");
                }
                unreadable(&path.in_dir(folder), fault)
            }
            StorageLocation::Registry { repository } if !path.as_str().starts_with("blobs/") => {
                // A received image is part of the registry's own data; only a published one is a
                // file.
                Fault::not_found(format!("{path} is not a blob of {repository}"))
                    .with_reason(Reason::WaitingForSource)
                    .with_retry(Retry::Backoff)
            }
            StorageLocation::Registry { repository }
                if matches!(fault.code, Code::NotFound | Code::Integrity) =>
            {
                changed(format_args!("{path} of {repository}"), &fault)
            }
            // Access that is denied now may be granted later.
            StorageLocation::Registry { .. } => fault
                .with_reason(Reason::WaitingForSource)
                .with_retry(Retry::Backoff),
        }
    }

    /// Problems of an artifact's files, one line each. Reads all files. Blocks.
    pub fn verify(
        &self,
        digest: Digest,
        root: &Root,
        places: &[StorageLocation],
        read: impl Fn(u64) -> Result<(), Fault>,
    ) -> Result<Vec<String>, Fault> {
        self.index(digest, root, places, true)?;
        let candidates = self.candidates(digest, places)?;
        let runtime = tokio::runtime::Handle::current();
        let mut reader = self.reader(&runtime);
        reader.ahead(u64::MAX);
        let (mut faults, mut file) = (Vec::new(), None::<(RelPath, At, bool)>);
        for step in Walk::new(root, &self.inner.store) {
            match step? {
                Step::Entry { number, entry, .. } => {
                    let EntryBody::File(info) = entry.body else {
                        continue;
                    };
                    let place = place_of(&candidates, &entry.path, &info);
                    file = place.map(|place| {
                        (
                            entry.path,
                            At {
                                place,
                                entry: number,
                                offset: 0,
                                len: 0,
                            },
                            false,
                        )
                    });
                }
                Step::Chunk(chunk, spot) => {
                    read(u64::from(chunk.len))?;
                    let Some((path, at, is_reported)) = &mut file else {
                        continue;
                    };
                    // The location of this entry, not of an equal chunk elsewhere.
                    let at = At {
                        offset: spot.offset,
                        len: chunk.len,
                        ..*at
                    };
                    if let Err(fault) = reader.chunk(chunk, at)
                        && !*is_reported
                    {
                        *is_reported = true;
                        faults.push(format!("{path}: {fault}"));
                    }
                }
            }
        }
        Ok(faults)
    }
}

/// The error for a file that cannot be read: it changed, or a condition that may pass prevents
/// reading.
fn unreadable(path: &Path, fault: Fault) -> Fault {
    match fault.code {
        // `Conflict`: a file replaced its folder. `Usage`: a folder or a pipe replaced the file.
        Code::NotFound | Code::Integrity | Code::Conflict | Code::Usage => {
            changed(path.display(), &fault)
        }
        // A failing disk, a failing connection or a missing permission says nothing about the
        // content.
        _ => Fault {
            message: format!("{} cannot be read now: {fault}", path.display()),
            ..fault
        }
        .with_reason(Reason::WaitingForSource)
        .with_retry(Retry::Backoff)
        .with_next(
            "fix this at the site where it was published; the transfer then continues by itself",
        ),
    }
}

fn changed(path: impl Display, why: impl Display) -> Fault {
    Fault::integrity(changed_text(path, why)).with_next(CHANGED_NEXT)
}

fn changed_text(path: impl Display, why: impl Display) -> String {
    format!("{path} changed after it was published: {why}")
}

/// For each chunk: the number of consecutive bytes from its start.
fn runs(found: &[Option<At>]) -> Vec<u64> {
    let mut out = vec![0; found.len()];
    let mut next: Option<(At, u64)> = None;
    for (run, at) in out.iter_mut().zip(found).rev() {
        let Some(at) = at else {
            next = None;
            continue;
        };
        let follows = next.filter(|(n, _)| {
            (n.place, n.entry, n.offset) == (at.place, at.entry, at.offset + u64::from(at.len))
        });
        *run = u64::from(at.len) + follows.map_or(0, |(_, behind)| behind);
        next = Some((*at, *run));
    }
    out
}

/// Whether a folder is empty or missing, as the mount point of an unmounted NAS is: this says
/// nothing about the files.
fn is_away(folder: &Path) -> bool {
    std::fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none())
}

/// The first location that holds this file, else the last one, where the caller learns its path.
fn place_of(candidates: &[(u32, StorageLocation)], path: &RelPath, file: &FileInfo) -> Option<u32> {
    let here = candidates
        .iter()
        .find(|(_, place)| candidates.len() > 1 && has_file(place, path, file));
    here.or(candidates.last()).map(|(number, _)| *number)
}

fn has_file(place: &StorageLocation, path: &RelPath, file: &FileInfo) -> bool {
    match place {
        StorageLocation::Folder { path: folder } => std::fs::symlink_metadata(path.in_dir(folder))
            .is_ok_and(|meta| meta.is_file() && meta.len() == file.size),
        StorageLocation::Registry { .. } => path.as_str().starts_with("blobs/sha256/"),
    }
}

/// The error for an artifact that this site does not hold.
fn not_here(digest: Digest) -> Fault {
    Fault::not_found(format!("artifact {digest} is not at this site any more"))
        .with_reason(Reason::SourceGone)
}

#[async_trait]
impl Library for InPlaceReader {
    /// Only the hub reads here. It decides for whom it asks.
    async fn open(&self, peer: &Peer, digest: Digest) -> Result<Arc<Opened>, Fault> {
        policy::may(&Actor::from(peer), Verb::ReadContent, &Object::Daemon)
            .map_err(|_| not_here(digest))?;
        if let Some(opened) = self.inner.opened.lock().iter().find(|o| o.digest == digest) {
            return Ok(opened.clone());
        }
        let held = self
            .inner
            .holdings
            .held(digest)
            .await?
            .ok_or_else(|| not_here(digest))?;
        let store = self.inner.store.clone();
        let open = move |stop: &Stop| Opened::new(digest, held.root, &Until::new(&store, stop));
        let opened = Arc::new(cancellable((), open).await?);
        let mut cache = self.inner.opened.lock();
        if cache.len() >= OPENED_MAX {
            cache.remove(0);
        }
        cache.push(opened.clone());
        Ok(opened)
    }

    async fn share(&self, peer: &Peer, bytes: u64, priority: i32) -> Result<Share, Fault> {
        self.inner.budget.take(peer, bytes, priority).await
    }

    async fn page(&self, _opened: &Opened, page: Hash) -> Result<Bytes, Fault> {
        let store = self.inner.store.clone();
        blocking(move || store.page(page)).await
    }

    async fn frames(
        &self,
        _peer: &Peer,
        opened: &Arc<Opened>,
        wanted: &Wanted,
        children: Vec<Child>,
        _priority: i32,
    ) -> Result<Pieces, Fault> {
        // Pages are in the store, whether the root lists them or an index page does.
        let store = self.inner.store.clone();
        let chunks: Vec<ChunkRef> = children.iter().map(|c| c.chunk).collect();
        let are_pages = match wanted {
            Wanted::TopPages(_) | Wanted::Root | Wanted::RootAndPages(_) | Wanted::Delta { .. } => {
                true
            }
            Wanted::Children { .. } | Wanted::Refused { .. } => chunks
                .first()
                .is_some_and(|chunk| opened.pages.contains(&chunk.id)),
        };
        if are_pages {
            return blocking(move || store.read_listed(&chunks))
                .await
                .map(pieces);
        }
        let path = self.ensure_held(opened.digest).await?;
        let (this, opened) = (self.clone(), opened.clone());
        let runtime = tokio::runtime::Handle::current();
        blocking_at(&path, move || this.read(&opened, &chunks, &runtime))
            .await
            .map(pieces)
    }
}

#[async_trait]
impl Holdings for Catalogue {
    async fn held(&self, digest: Digest) -> Result<Option<HeldArtifact>, Fault> {
        let rows = self.all_by_digest(digest).await?;
        let places: Vec<StorageLocation> =
            rows.iter().filter_map(|row| row.place.clone()).collect();
        Ok(rows
            .into_iter()
            .next()
            .filter(|_| !places.is_empty())
            .map(|row| HeldArtifact {
                root: row.root,
                places,
            }))
    }
}

#[cfg(test)]
mod tests;

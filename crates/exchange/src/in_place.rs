//! The origin: gives out artifacts from where they were published, or landed, without a second copy
//! of their bytes.
//!
//! [`InPlaceReader::publish`] reads a source in and keeps nothing of it but its manifest, and a
//! note in [`ChunkIndex`] of where each chunk lies. Entries whose content is not simply a file of
//! the folder that was published are written to `<data_dir>/published/<digest>/`, each at its path
//! in the artifact; so is the layout of an image that arrived, once somebody asks for it.
//! [`fetch::serve`](crate::fetch::serve) reads the chunks from there again, hashes each, and never
//! gives out one that changed: that is `integrity`, with the path. [`InPlaceReader::look`] finds
//! what changed before anybody asks.
//!
//! The site's daemon calls it, and so may whoever publishes from another machine; [`Holdings`] says
//! what there is. The notes are hints: one that is missing, or names a place that is gone, is made
//! anew from the manifest. A crash while publishing leaves a folder `published/p-…`, which
//! [`InPlaceReader::clean`] takes away at the next start.

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
use crate::wire::Peer;
use base::blocking::blocking;
use base::budget::{Budget, Share};
use base::buffers::Buffers;
use base::durable;
use base::expiring_cache::ExpiringCache;
use base::fault::{Code, Fault, IoContext, Reason, Retry};
use base::names::RelPath;
use content::chunk::Hash;
use content::frame::Frame;
use content::manifest::{ChunkRef, Digest, EntryBody, FileInfo, Pages, Root, Step, Walk};
use content::store::Store;
use model::protocol::Wanted;
use sink::{Sink, StorageLocation};
use state::Catalogue;

pub use keep::InPlace;
pub use watch::{Look, Mark, RESTS};

/// What to do about a file that changed after it was published.
pub const CHANGED_NEXT: &str = "put the old content back and retry the transfer, or publish what is there now as a new version";

/// Artifacts kept open.
const OPENED_MAX: usize = 16;
/// Rows of the index that are written together.
const ROWS_TOGETHER: usize = 32 << 10;
/// The notes of one artifact are made anew at most this often: a walk over a large manifest takes a
/// while.
const INDEX_EVERY: Duration = Duration::from_secs(30);
/// So long it is believed that an artifact lies here.
const HELD_FOR: Duration = Duration::from_secs(1);

/// An artifact that lies here.
#[derive(Debug, Clone)]
pub struct HeldArtifact {
    /// Its root manifest.
    pub root: Root,
    /// Every place where it lies, the best first.
    pub places: Vec<StorageLocation>,
}

/// Says what there is to give out.
#[async_trait]
pub trait Holdings: Send + Sync {
    /// The artifact of this digest, if it lies here.
    async fn held(&self, digest: Digest) -> Result<Option<HeldArtifact>, Fault>;
}

/// Gives out what lies here. Cheap to clone.
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
    /// Reads blobs of the registry; `None` where there is none.
    images: Option<Arc<dyn Sink>>,
    opened: Mutex<Vec<Arc<Opened>>>,
    budget: Budget,
    /// The artifacts whose notes were just made anew; held while that goes on.
    indexed: Mutex<ExpiringCache<Digest, ()>>,
    /// What published files are read into.
    buffers: Buffers,
    /// What lay here a moment ago.
    held: Mutex<ExpiringCache<Digest, ()>>,
    /// Held while a folder in `kept` is made or replaced.
    keeping: Mutex<()>,
}

impl InPlaceReader {
    /// An origin that keeps its pages in `store`, its notes in `places`, and what it must write
    /// itself in `kept`. What is read and not yet sent takes no more than `memory` bytes.
    pub fn new(
        store: Store,
        chunk_index: Arc<ChunkIndex>,
        kept: PathBuf,
        holdings: Arc<dyn Holdings>,
        images: Option<Arc<dyn Sink>>,
        memory: u64,
    ) -> Self {
        let budget = Budget::new(memory, memory);
        let (opened, held, indexed, keeping) = Default::default();
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
                buffers,
                held,
                keeping,
            }),
        }
    }

    /// Takes away what a crash left, and what no artifact in `live` needs. Blocks.
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

    /// The folder of what had to be written of an artifact.
    fn kept_folder(&self, digest: Digest) -> PathBuf {
        self.inner.kept.join(digest.hex())
    }

    /// Where the files of an artifact may lie: what had to be written of it first, the last stands
    /// for what lies nowhere.
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

    /// Notes where every chunk of an artifact lies. `anew`: even where another place of it is
    /// known. Blocks.
    pub fn index(
        &self,
        digest: Digest,
        root: &Root,
        places: &[StorageLocation],
        anew: bool,
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
                known.note(&mut rows, &mut entries, anew)?;
            }
        }
        known.note(&mut rows, &mut entries, anew)
    }

    /// [`InPlaceReader::index`] once more, unless that was just done. Returns whether the notes are
    /// fresh.
    fn index_anew(&self, opened: &Opened, runtime: &tokio::runtime::Handle) -> Result<bool, Fault> {
        // One at a time: whoever waits here finds it done.
        let mut indexed = self.inner.indexed.lock();
        if indexed.get(&opened.digest).is_some() {
            return Ok(false);
        }
        // Asked now: of what was taken away a moment ago nothing may be noted again.
        let held = runtime
            .block_on(self.inner.holdings.held(opened.digest))?
            .ok_or_else(|| not_here(opened.digest))?;
        tracing::info!(digest = %opened.digest, "noting anew where an artifact lies");
        self.keep_layout(opened.digest, &opened.root)?;
        self.index(opened.digest, &opened.root, &held.places, true)?;
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

    /// Gives buffers back that nobody used since the last call.
    pub fn rest(&self) {
        self.inner.buffers.rest();
    }

    /// Fails when an artifact does not lie here. It is asked at each request, and believed for a
    /// moment: what is taken away is soon given no more.
    async fn lies_here(&self, digest: Digest) -> Result<(), Fault> {
        if self.inner.held.lock().get(&digest).is_some() {
            return Ok(());
        }
        self.inner
            .holdings
            .held(digest)
            .await?
            .ok_or_else(|| not_here(digest))?;
        self.inner.held.lock().put(digest, (), HELD_FOR);
        Ok(())
    }

    /// These chunks, each read where it lies and hashed. Blocks.
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
                None => Err(Fault::not_found("it is not noted where this chunk lies")),
            };
            let chunk = match first {
                Ok(read) => read,
                Err(_) => {
                    let fresh = self.index_anew(opened, runtime)?;
                    let at = self
                        .inner
                        .chunk_index
                        .find(&[chunk.id])?
                        .into_iter()
                        .flatten()
                        .next();
                    let at = at.ok_or_else(|| {
                        Fault::internal(format!(
                            "chunk {} of {} lies nowhere",
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

    /// What is said of a chunk that cannot be given.
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
            // Another artifact's note took this one's place; in a while it is looked for again.
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
                    .with_next("mount it again, or put the files back; it goes on by itself");
                }
                unreadable(&path.in_dir(folder), fault)
            }
            StorageLocation::Registry { repository } if !path.as_str().starts_with("blobs/") => {
                // What arrived here was made part of the registry's own answers; only where it was
                // published it is a file.
                Fault::not_found(format!("{path} is no blob of {repository}"))
                    .with_reason(Reason::WaitingForSource)
                    .with_retry(Retry::Backoff)
            }
            StorageLocation::Registry { repository }
                if matches!(fault.code, Code::NotFound | Code::Integrity) =>
            {
                changed(format_args!("{path} of {repository}"), &fault)
            }
            // Whoever may not read there now may do so again.
            StorageLocation::Registry { .. } => fault
                .with_reason(Reason::WaitingForSource)
                .with_retry(Retry::Backoff),
        }
    }

    /// What is wrong with the files of an artifact, one line each. Reads all of them. Blocks.
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
                    let Some((path, at, told)) = &mut file else {
                        continue;
                    };
                    // Where this entry lies, not where the same chunk may lie besides.
                    let at = At {
                        offset: spot.offset,
                        len: chunk.len,
                        ..*at
                    };
                    if let Err(fault) = reader.chunk(chunk, at)
                        && !*told
                    {
                        *told = true;
                        faults.push(format!("{path}: {fault}"));
                    }
                }
            }
        }
        Ok(faults)
    }
}

/// What is said of a file that cannot be read: whether it changed, or something else that may pass
/// keeps it from being read.
fn unreadable(path: &Path, fault: Fault) -> Fault {
    match fault.code {
        // A conflict is a file where its folder was; usage is a folder or a pipe where the file
        // was.
        Code::NotFound | Code::Integrity | Code::Conflict | Code::Usage => {
            changed(path.display(), &fault)
        }
        // A disk or a line that fails, or a right that lacks, says nothing of the content.
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

/// Of each chunk, how many bytes lie behind each other from its first on.
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

/// Whether a folder is empty or not there, as a NAS is that is not mounted: that says nothing of
/// the files.
fn is_away(folder: &Path) -> bool {
    std::fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none())
}

/// The first place where such a file lies, else the last, where whoever looks for it learns its
/// path.
fn place_of(candidates: &[(u32, StorageLocation)], path: &RelPath, file: &FileInfo) -> Option<u32> {
    let here = candidates
        .iter()
        .find(|(_, place)| candidates.len() > 1 && lies_at(place, path, file));
    here.or(candidates.last()).map(|(number, _)| *number)
}

fn lies_at(place: &StorageLocation, path: &RelPath, file: &FileInfo) -> bool {
    match place {
        StorageLocation::Folder { path: folder } => std::fs::symlink_metadata(path.in_dir(folder))
            .is_ok_and(|meta| meta.is_file() && meta.len() == file.size),
        StorageLocation::Registry { .. } => path.as_str().starts_with("blobs/sha256/"),
    }
}

/// The answer for what does not lie here (any more).
fn not_here(digest: Digest) -> Fault {
    Fault::not_found(format!("no artifact {digest} lies here any more"))
        .with_reason(Reason::SourceGone)
}

#[async_trait]
impl Library for InPlaceReader {
    /// The peer is the hub, which decides for whom it asks.
    async fn open(&self, _peer: &Peer, digest: Digest) -> Result<Arc<Opened>, Fault> {
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
        let opened = Arc::new(blocking(move || Opened::new(digest, held.root, &store)).await?);
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
        // Pages lie in the store, whether the root lists them or an index page does.
        let store = self.inner.store.clone();
        let chunks: Vec<ChunkRef> = children.iter().map(|c| c.chunk).collect();
        let are_pages = match wanted {
            Wanted::TopPages(_) | Wanted::Root | Wanted::RootAndPages(_) | Wanted::Delta { .. } => {
                true
            }
            Wanted::Children { .. } => chunks
                .first()
                .is_some_and(|chunk| opened.pages.contains(&chunk.id)),
        };
        if are_pages {
            return blocking(move || store.read_listed(&chunks))
                .await
                .map(pieces);
        }
        self.lies_here(opened.digest).await?;
        let (this, opened) = (self.clone(), opened.clone());
        let runtime = tokio::runtime::Handle::current();
        blocking(move || this.read(&opened, &chunks, &runtime))
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

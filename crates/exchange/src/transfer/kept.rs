//! What of an artifact is at the site although its records are not: versions that share the content
//! of a removed version, and a folder of the artifact that lost its note.
//!
//! The chunk index has one location for each chunk. When the version at that location is gone, the
//! chunks are recorded again from the manifests of the other versions of the series. Everything
//! here may be repeated, and a crash loses only rows, which are hints.

use base::blocking::blocking;
use base::fault::Fault;
use base::names::ArtifactRef;
use content::manifest::{Digest, EntryBody, Root, Step, Walk};
use content::store::Store;
use sink::{Committed, Incoming, Sink, StorageLocation};
use tokio_util::sync::CancellationToken;

use super::verify::is_intact;
use super::{Runner, unless};
use crate::chunk_index::{At, ChunkIndex, LocationInfo};

/// Rows of the index that are written together.
const ROWS_TOGETHER: usize = 32 << 10;

impl Runner {
    /// Records the chunks of the other versions of a series again, if a version of it was removed
    /// from outside.
    pub async fn find_removed_versions(
        &self,
        artifact: &ArtifactRef,
        sink: &dyn Sink,
    ) -> Result<(), Fault> {
        let Some(StorageLocation::Folder { path }) = sink.place_of(artifact) else {
            return Ok(());
        };
        let Some(series) = path.parent().map(ToOwned::to_owned) else {
            return Ok(());
        };
        let places = self.inner.shared.chunk_index.clone();
        let look = move || {
            let mut gone = Vec::new();
            for (number, info) in places.committed() {
                let StorageLocation::Folder { path } = &info.place else {
                    continue;
                };
                if info.foreign || path.parent() != Some(&series) {
                    continue;
                }
                // Any error but this says nothing about the version.
                let is_gone = std::fs::symlink_metadata(path)
                    .is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
                if is_gone {
                    gone.push(number);
                }
            }
            Ok(gone)
        };
        let gone = sink.threads().run(look).await?;
        if gone.is_empty() {
            return Ok(());
        }
        let (places, count) = (self.inner.shared.chunk_index.clone(), gone.len());
        blocking(move || {
            gone.into_iter()
                .try_for_each(|number| places.remove(number))
        })
        .await?;
        tracing::info!(versions = count, series = %artifact, "versions were removed from outside; the chunks of the others are recorded again");
        self.record_series(artifact).await
    }

    /// Records the chunks of all versions of a series again, where no other location of a chunk is
    /// known. Called after a version was removed.
    pub async fn record_series(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        let inner = &self.inner;
        for name in inner.catalogue.artifact_names().await? {
            if (name.kind, name.name()) != (artifact.kind, artifact.name()) {
                continue;
            }
            let Ok(row) = inner.catalogue.artifact(&name).await else {
                continue;
            };
            let Some(place) = row.place.filter(|_| !row.published) else {
                continue;
            };
            let (places, store) = (inner.shared.chunk_index.clone(), inner.shared.store.clone());
            let record = move || match places.landed(row.digest, &place) {
                Some(number) => record(&places, &store, row.digest, &row.root, number),
                None => Ok(()),
            };
            if let Err(fault) = blocking(record).await {
                tracing::warn!(artifact = %name, error = %fault, "the chunks of a version could not be recorded again");
            }
        }
        Ok(())
    }

    /// Registers and commits the folder of an artifact that has no note, if its content is intact:
    /// the hidden folder of the NAS was lost, or somebody copied the version there. The check can be
    /// stopped; the commit is awaited, as every commit is.
    pub(super) async fn claimed(
        &self,
        incoming: &Incoming,
        stop: &CancellationToken,
    ) -> Result<Option<Committed>, Fault> {
        let sink = self.inner.sinks.of(incoming.artifact.kind);
        let look = async {
            let alone = self.alone_with(&incoming.artifact).await;
            Ok(match self.look_for_unregistered(incoming).await? {
                Some(true) => Some(alone),
                Some(false) | None => None,
            })
        };
        let Some(_alone) = unless(stop, look).await? else {
            return Ok(None);
        };
        sink.register(incoming).await?;
        let staged = incoming.transfer.in_dir(sink.staging_root());
        sink.commit(incoming, &staged).await.map(Some)
    }

    /// Registers the folder of an artifact of the catalogue if its note is missing and its content
    /// intact.
    pub async fn register(&self, incoming: &Incoming) -> Result<Registered, Fault> {
        let _alone = self.alone_with(&incoming.artifact).await;
        match self.look_for_unregistered(incoming).await? {
            None => Ok(Registered::Before),
            Some(false) => Ok(Registered::Differs),
            Some(true) => {
                let sink = self.inner.sinks.of(incoming.artifact.kind);
                sink.register(incoming).await?;
                Ok(Registered::Now)
            }
        }
    }

    /// Whether the folder of an artifact is intact, if it exists without a note.
    async fn look_for_unregistered(&self, incoming: &Incoming) -> Result<Option<bool>, Fault> {
        let sink = self.inner.sinks.of(incoming.artifact.kind);
        let Some(folder) = sink.unregistered(incoming).await? else {
            return Ok(None);
        };
        let store = self.inner.shared.store.clone();
        let intact = is_intact(sink.as_ref(), store, incoming, folder.clone()).await?;
        tracing::info!(artifact = %incoming.artifact, folder = %folder.display(), intact, "the folder of an artifact without a note was checked");
        Ok(Some(intact))
    }

    /// Records the chunks of a committed artifact that was not staged here, so that later transfers
    /// find them.
    pub(super) async fn record_landed(
        &self,
        incoming: &Incoming,
        place: &StorageLocation,
    ) -> Result<(), Fault> {
        let shared = &self.inner.shared;
        let (places, store) = (shared.chunk_index.clone(), shared.store.clone());
        let (digest, root, place) = (incoming.digest, incoming.root.clone(), place.clone());
        if !incoming.artifact.kind.is_files() {
            return Ok(());
        }
        blocking(move || {
            if places.landed(digest, &place).is_some() {
                return Ok(());
            }
            let info = LocationInfo {
                place,
                digest,
                transfer: None,
                foreign: false,
                adopting: false,
            };
            let number = places.put(None, info)?;
            record(&places, &store, digest, &root, number)
        })
        .await
    }
}

/// The result of [`Runner::register`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Registered {
    /// Its note exists.
    Before,
    Now,
    /// The content of the folder is not that of the artifact.
    Differs,
}

/// Records the location of each chunk of a committed artifact.
fn record(
    places: &ChunkIndex,
    store: &Store,
    digest: Digest,
    root: &Root,
    place: u32,
) -> Result<(), Fault> {
    let (mut rows, mut entries, mut current) = (Vec::new(), Vec::new(), None);
    for step in Walk::new(root, store) {
        match step? {
            Step::Entry { number, entry, .. } => {
                current = None;
                if let EntryBody::File(file) = entry.body {
                    current = Some(number);
                    entries.push((place, number, entry.path, file));
                }
            }
            Step::Chunk(chunk, spot) => {
                let Some(entry) = current else { continue };
                let at = At {
                    place,
                    entry,
                    offset: spot.offset,
                    len: chunk.len,
                };
                rows.push((chunk.id, at));
            }
        }
        if rows.len() >= ROWS_TOGETHER || entries.len() >= ROWS_TOGETHER {
            places.note(&mut rows, &mut entries, false)?;
        }
    }
    tracing::debug!(%digest, "the chunks of a version were recorded again");
    places.note(&mut rows, &mut entries, false)
}

//! Maintains the chunk index of a site: follows sinks whose root moved, rebuilds the index after a
//! loss, removes unused rows.
//!
//! `site` calls [`IndexKeeper::follow_roots`] before all other work, and starts the workers. All
//! operations can be repeated: a crash loses only work, no state.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::Opened;
use base::blocking::blocking;
use base::fault::Fault;
use base::limits::{PLACES_SWEEP_EVERY, PLACES_SWEEP_PAUSE, PLACES_SWEEP_ROWS};
use base::workers::{Pace, Worker, Workers};
use exchange::chunk_index::{ChunkIndex, LocationInfo};
use exchange::in_place::InPlaceReader;
use exchange::transfer::Sinks;
use sink::StorageLocation;
use state::Catalogue;

/// Keeps the chunk index in agreement with the catalogue and the sinks.
#[derive(Clone)]
pub(super) struct IndexKeeper {
    catalogue: Catalogue,
    chunk_index: Arc<ChunkIndex>,
    sinks: Sinks,
    reader: InPlaceReader,
    stop: CancellationToken,
}

impl IndexKeeper {
    /// Creates it for the opened state of a site.
    pub(super) fn new(opened: &Opened) -> Self {
        Self {
            catalogue: opened.catalogue.clone(),
            chunk_index: opened.shared.chunk_index.clone(),
            sinks: opened.sinks.clone(),
            reader: opened.reader.clone(),
            stop: opened.stop.clone(),
        }
    }

    /// Starts the workers that rebuild the index after a loss, and that sweep it.
    pub(super) fn start_workers(&self, workers: &Workers) {
        workers.start_until_done(
            "index-rebuild",
            Pace::on_request().long(),
            self,
            |this| async move { this.rebuild_places().await },
        );
        workers.start(
            "index-sweep",
            Pace::every(PLACES_SWEEP_EVERY).long(),
            self,
            |this, worker| async move { this.keep_places_swept(&worker).await },
        );
    }

    /// Removes the rows of locations that no longer exist, in steps.
    async fn keep_places_swept(&self, worker: &Worker) -> Result<(), Fault> {
        loop {
            tokio::time::sleep(PLACES_SWEEP_EVERY).await;
            // The worker reports a fault, and tries again.
            let _ = worker
                .iterate(async {
                    let swept = self.sweep_places().await;
                    swept.map_err(|fault| fault.context("sweep the chunk index"))
                })
                .await;
        }
    }

    async fn sweep_places(&self) -> Result<(), Fault> {
        let places = &self.chunk_index;
        let looked = places.clone();
        let stale = blocking(move || looked.stale()).await?;
        let mut behind = None;
        while stale > 0 && !self.stop.is_cancelled() {
            let (places, from) = (places.clone(), behind);
            behind = blocking(move || places.sweep(from, PLACES_SWEEP_ROWS)).await?;
            if behind.is_none() {
                let places = self.chunk_index.clone();
                return blocking(move || places.swept(stale)).await;
            }
            tokio::time::sleep(PLACES_SWEEP_PAUSE).await;
        }
        Ok(())
    }

    /// Updates the location of each artifact whose sink root has changed: a root may have been
    /// moved, or be mounted at another path. Missing files are detected when they are checked.
    pub(super) async fn follow_roots(&self) -> Result<(), Fault> {
        for name in self.catalogue.artifact_names().await? {
            // An artifact that was removed in the meantime has no location.
            let Ok(row) = self.catalogue.artifact(&name).await else {
                continue;
            };
            let (artifact, digest) = (row.artifact, row.digest);
            let Some(now) = self.sinks.of(artifact.kind).place_of(&artifact) else {
                continue;
            };
            let Some(before) = row.place.filter(|before| !row.published && *before != now) else {
                continue;
            };
            let (places, place) = (self.chunk_index.clone(), now.clone());
            blocking(move || match places.landed(digest, &before) {
                Some(number) => places
                    .put(
                        Some(number),
                        LocationInfo {
                            place,
                            digest,
                            transfer: None,
                            foreign: false,
                            adopting: false,
                        },
                    )
                    .map(drop),
                None => Ok(()),
            })
            .await?;
            let location = if let StorageLocation::Folder { path } = &now {
                Some(path.display().to_string())
            } else {
                None
            };
            self.catalogue
                .set_place(&artifact, Some(&now), location.as_deref())
                .await?;
            tracing::info!(%artifact, "the location of an artifact was updated, because the root of its sink changed");
        }
        Ok(())
    }

    /// After a loss of the chunk index: adds the chunk rows of each local artifact again.
    async fn rebuild_places(&self) -> Result<(), Fault> {
        let loss = self.chunk_index.loss();
        if loss.is_none_or(|loss| loss.artifacts.is_some()) {
            return Ok(());
        }
        let noted = self.note_all_places().await;
        let artifacts = noted.map_err(|fault| fault.context("rebuild the chunk index"))?;
        tracing::info!(artifacts, "the chunk index was rebuilt");
        Ok(())
    }

    async fn note_all_places(&self) -> Result<u64, Fault> {
        let mut noted = 0;
        for name in self.catalogue.artifact_names().await? {
            // An artifact that was removed in the meantime has no location.
            let Ok(row) = self.catalogue.artifact(&name).await else {
                continue;
            };
            let Some(place) = row.place else { continue };
            if self.stop.is_cancelled() {
                return Err(Fault::internal("the daemon stops"));
            }
            let (places, origin, artifact) = (
                self.chunk_index.clone(),
                self.reader.clone(),
                row.artifact.clone(),
            );
            let work = move || {
                if places.landed(row.digest, &place).is_none() {
                    let info = LocationInfo {
                        place: place.clone(),
                        digest: row.digest,
                        transfer: None,
                        foreign: row.published,
                        adopting: false,
                    };
                    places.put(None, info)?;
                }
                origin.index(row.digest, &row.root, &[place], false)
            };
            match blocking(work).await {
                Ok(()) => noted += 1,
                // An artifact with a damaged manifest must not prevent the others.
                Err(fault) => {
                    tracing::error!(%artifact, error = %fault, "the chunk rows of an artifact could not be rebuilt");
                }
            }
        }
        let places = self.chunk_index.clone();
        blocking(move || places.rebuilt(noted)).await?;
        Ok(noted)
    }
}

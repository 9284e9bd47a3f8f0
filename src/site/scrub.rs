//! Reads all files that were delivered to this site again, slowly: a disk may lose what nobody
//! touched, and a delivery uses files again that were verified a short time ago.
//!
//! `site` starts the worker; `exchange::transfer::Scrub` reads. The chunk index keeps when each file
//! was read; after a crash a few files are read twice.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::Opened;
use crate::config;
use base::fault::{Code, Fault};
use base::names::{ArtifactRef, TransferId};
use base::workers::{Pace, Worker, Workers};
use content::store::Store;
use exchange::chunk_index::ChunkIndex;
use exchange::transfer::{Scrub, Scrubbed, Sinks};
use sink::Incoming;
use state::Catalogue;

/// The rounds in the time after which each file must have been read…
const ROUNDS: u32 = 14;
/// …and the limits of the pause between two rounds.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(12 * 3600));

/// Reads delivered files. Cheap to clone.
#[derive(Clone)]
pub(super) struct Scrubber {
    catalogue: Catalogue,
    store: Store,
    chunk_index: Arc<ChunkIndex>,
    sinks: Sinks,
    config: config::Scrub,
    stop: CancellationToken,
}

impl Scrubber {
    /// Creates it for the opened state of a site.
    pub(super) fn new(opened: &Opened) -> Self {
        Self {
            catalogue: opened.catalogue.clone(),
            store: opened.shared.store.clone(),
            chunk_index: opened.shared.chunk_index.clone(),
            sinks: opened.sinks.clone(),
            config: opened.config.scrub.clone(),
            stop: opened.stop.clone(),
        }
    }

    /// Starts the worker, unless the configuration disables it.
    pub(super) fn start_worker(&self, workers: &Workers) {
        if self.config.every.is_zero() || self.config.rate == 0 {
            return;
        }
        let pause = (self.config.every / ROUNDS).clamp(PAUSE.0, PAUSE.1);
        workers.start(
            "scrub",
            Pace::every(pause).long(),
            self,
            move |this, worker| async move { this.keep_reading(pause, &worker).await },
        );
    }

    async fn keep_reading(&self, pause: Duration, worker: &Worker) -> Result<(), Fault> {
        loop {
            tokio::time::sleep(pause).await;
            // The worker reports a fault, and tries again.
            let _ = worker.iterate(self.round()).await;
        }
    }

    /// Reads what is due of each artifact. One that cannot be read does not prevent the others.
    async fn round(&self) -> Result<(), Fault> {
        // Earlier than necessary: a record must not become too old before its file is read.
        let due_after = self.config.every / 2;
        let scrub = Scrub::new(due_after, self.config.rate, self.stop.clone());
        let scrub = Arc::new(scrub);
        let (mut first, mut files, mut bytes) = (Ok(()), 0, 0);
        for artifact in self.catalogue.artifact_names().await? {
            if self.stop.is_cancelled() {
                break;
            }
            if !artifact.kind.is_files() {
                continue;
            }
            let result = match self.artifact(&scrub, &artifact).await {
                Ok(Some(scrubbed)) => {
                    files += scrubbed.files;
                    bytes += scrubbed.bytes;
                    damaged(&artifact, &scrubbed)
                }
                Ok(None) => Ok(()),
                Err(fault) => Err(fault.context(format_args!("read {artifact} again"))),
            };
            if let Err(fault) = &result {
                tracing::error!(%artifact, error = %fault, next = %fault.next, "delivered files are damaged or could not be read");
            }
            first = first.and(result);
        }
        if files > 0 {
            tracing::info!(files, bytes, "delivered files were read again");
        }
        first
    }

    /// Reads what is due of an artifact; `None`: it is not here, or was published here.
    async fn artifact(
        &self,
        scrub: &Arc<Scrub>,
        artifact: &ArtifactRef,
    ) -> Result<Option<Scrubbed>, Fault> {
        let Some(incoming) = self.delivered(artifact).await? else {
            return Ok(None);
        };
        let (incoming, place) = incoming;
        let scrubbed = scrub
            .artifact(
                self.sinks.of(artifact.kind).clone(),
                self.store.clone(),
                self.chunk_index.clone(),
                incoming,
                place,
            )
            .await?;
        // An artifact that was removed meanwhile has no files.
        let is_here = scrubbed.damaged == 0 || self.delivered(artifact).await?.is_some();
        Ok(Some(scrubbed).filter(|_| is_here))
    }

    async fn delivered(
        &self,
        artifact: &ArtifactRef,
    ) -> Result<Option<(Incoming, sink::StorageLocation)>, Fault> {
        let row = match self.catalogue.artifact(artifact).await {
            Err(fault) if fault.code == Code::NotFound => return Ok(None),
            row => row?,
        };
        let Some(place) = row.place.filter(|_| !row.published) else {
            return Ok(None);
        };
        let incoming = Incoming {
            artifact: row.artifact,
            digest: row.digest,
            root: row.root,
            transfer: TransferId::none(),
            waits: Default::default(),
        };
        Ok(Some((incoming, place)))
    }
}

/// The fault of an artifact of which files are damaged.
fn damaged(artifact: &ArtifactRef, scrubbed: &Scrubbed) -> Result<(), Fault> {
    let Some(first) = scrubbed.faults.first() else {
        return Ok(());
    };
    Err(Fault::integrity(format!(
        "{artifact}: {} files are missing or damaged, the first: {first}",
        scrubbed.damaged
    ))
    .with_next(format!(
        "at this site, run 'packhorse verify {artifact} --repair'"
    )))
}

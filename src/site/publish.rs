//! Publishing at a site: the content stays in place, and the hub is informed.
//!
//! The site's catalogue stores the artifact with an *offer* until the hub has accepted or refused
//! it. The offer survives a crash, and is sent again whenever a connection is established.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;

use super::Opened;
use super::hub_link::HubLink;
use crate::api::types::{PublishRequest, Published};
use crate::config::Config;
use crate::jobs::until_room;
use crate::open_source::{self, Access, AtSite, TIMES_DIFFER};
use crate::reach::Reach;
use base::blocking::blocking;
use base::clock;
use base::durable;
use base::fault::{Code, Fault, Retry};
use base::job_progress::JobProgress;
use base::names::ArtifactRef;
use content::ingest;
use content::manifest::{DatasetBinding, Digest, Root};
use content::store::Store;
use exchange::in_place::{InPlace, InPlaceReader};
use model::protocol::AskHub;
use model::run;
use sink::StorageLocation;
use state::{ArtifactRow, Catalogue, Offer, Subject};

/// The pause before an offer that failed is sent again.
const OFFER_AGAIN: Duration = Duration::from_secs(5);

/// Publishes at this site, and sends offers to the hub.
#[derive(Clone)]
pub(super) struct Publications {
    config: Arc<Config>,
    catalogue: Catalogue,
    store: Store,
    reader: InPlaceReader,
    /// The sources of a publish other than paths.
    sources: AtSite,
    hub: Arc<HubLink>,
    /// Held while an offer is sent to the hub.
    offering: Arc<Mutex<()>>,
}

impl Publications {
    /// Published artifacts are recorded in the catalogue and store of this site.
    pub(super) fn new(opened: &Opened, sources: AtSite, hub: Arc<HubLink>) -> Self {
        Self {
            config: opened.config.clone(),
            catalogue: opened.catalogue.clone(),
            store: opened.shared.store.clone(),
            reader: opened.reader.clone(),
            sources,
            hub,
            offering: Arc::default(),
        }
    }

    /// Publishes at this site, without copying the files of a folder, and informs the hub. If the
    /// hub does not answer, it is informed later, and `note` reports that. `patience` is how long
    /// the publish waits for space on a full disk.
    pub(super) async fn publish(
        &self,
        request: PublishRequest,
        reach: Reach,
        progress: Arc<JobProgress>,
        patience: Duration,
    ) -> Result<Published, Fault> {
        let since_ms = clock::now_ms();
        let artifact: ArtifactRef = request.as_ref.parse()?;
        let to = request.to.as_deref().map(str::parse).transpose()?;
        open_source::check_image_name(&artifact, &request.options)?;
        let options = request.options.clone();
        blocking(move || open_source::check_bad_out(&options)).await?;
        let run = request.run.as_deref().map(run::known).transpose()?;
        let dataset = open_source::dataset_of(
            &self.catalogue,
            &artifact,
            request.options.for_dataset.as_deref(),
        )
        .await;
        let dataset = dataset.map_err(|fault| {
            if fault.code == Code::NotFound {
                fault.context("this site")
            } else {
                fault
            }
        })?;
        let read = || self.read_in_place(&artifact, &request, &reach, dataset.clone(), &progress);
        let published = until_room(&self.store, &progress, patience, read).await?;
        let (mut root, omitted) = (published.ingested.root, published.ingested.omitted);
        let as_published =
            open_source::as_published(&self.catalogue, &self.store, &artifact, &root).await?;
        let differs = match &as_published {
            Some(_) => Some(TIMES_DIFFER.to_owned()),
            None => self
                .access()
                .note(artifact.kind, &request.options, &omitted),
        };
        if open_source::with_other_referrers(&self.catalogue, &artifact, &root)
            .await?
            .is_some()
        {
            // What was published first may be gone from the source, which has the content.
            return Err(Fault::conflict(format!(
                "{artifact} was published before with other signatures or SBOMs"
            ))
            .with_next(
                "publish it under another version; --no-referrers publishes the image alone",
            ));
        }
        root = as_published.unwrap_or(root);
        progress.check()?;

        let _turn = self.offering.lock().await;
        let added = self.catalogue.add_artifact(&artifact, &root, None).await?;
        let before = self.catalogue.artifact(&artifact).await?;
        let held = !added && before.place.is_some();
        // An artifact that the hub has never accepted can be removed if the hub refuses it.
        // Otherwise the hub lists this site as its origin.
        let new = added || before.offer.is_some_and(|offer| offer.new);
        let location = match &published.place {
            // A folder that this daemon wrote is of no interest to users.
            StorageLocation::Folder { path } if path.starts_with(&self.config.data_dir) => {
                request.source.clone()
            }
            StorageLocation::Folder { path } => path.display().to_string(),
            StorageLocation::Registry { repository } => repository.clone(),
        };
        self.catalogue.set_omitted(&artifact, &omitted).await?;
        let offer = Offer { to, run, new };
        self.catalogue
            .set_published(&artifact, &published.place, &location, since_ms, &offer)
            .await?;
        // The whole content was just read, so it is unchanged.
        self.catalogue.set_changed(&artifact, None).await?;
        progress.doing(format!("sending the offer of {artifact} to the hub"));
        let row = self.catalogue.artifact(&artifact).await?;
        match self.offer(&row).await {
            Ok(answer) => {
                tracing::info!(%artifact, digest = %row.digest, bytes = answer.bytes, "published in place");
                // An older hub does not return the omissions.
                Ok(Published {
                    unchanged: held,
                    omitted: omitted.list(),
                    note: answer.note.clone().or(differs),
                    ..answer
                })
            }
            Err(fault) if may_pass(&fault) => {
                tracing::warn!(%artifact, error = %fault, "published in place; the hub is informed when it answers");
                Ok(Published {
                    artifact: artifact.to_string(),
                    digest: row.digest.hex(),
                    transfers: Vec::new(),
                    bytes: row.root.totals.bytes,
                    stored: 0,
                    unchanged: held,
                    note: Some(format!(
                        "it was published at this site; the hub is informed when it answers: {}",
                        fault.message
                    )),
                    omitted: omitted.list(),
                })
            }
            Err(fault) => {
                self.withdraw(&artifact, new).await?;
                Err(fault)
            }
        }
    }

    /// The access of a publish at this site.
    fn access(&self) -> Access {
        let format = self.hub.manifest_format();
        Access::of_daemon(&self.config, Some(self.sources.clone()), format)
    }

    /// Reads a source in place, and stores the content that exists nowhere else.
    async fn read_in_place(
        &self,
        artifact: &ArtifactRef,
        request: &PublishRequest,
        reach: &Reach,
        dataset: Option<(DatasetBinding, Root)>,
        progress: &Arc<JobProgress>,
    ) -> Result<InPlace, Fault> {
        progress.doing(format!("reading {}", request.source));
        let (this, kind) = (self.clone(), artifact.kind);
        let (options, text, watched) = (
            request.options.clone(),
            request.source.clone(),
            progress.clone(),
        );
        let (access, reach) = (self.access(), reach.clone());
        let config = self.config.clone();
        let published = open_source::with_scratch(
            &self.config.data_dir,
            &request.source,
            progress,
            move |scratch, runtime| {
                let access = access.for_reach(&reach, &config);
                let dataset = dataset
                    .map(|(binding, root)| open_source::bind(binding, root, this.store.clone()));
                let mut source =
                    open_source::open(kind, &text, &options, dataset, &access, scratch, runtime)?;
                let base = open_source::base_of(kind, &text, &options, access.site.as_ref())?;
                open_source::read(source.as_mut(), &options, |source| {
                    ingest::reported(&watched, |counted| {
                        this.reader.publish(kind, source, base.as_ref(), counted)
                    })
                })
            },
        );
        published
            .await
            .map_err(|fault| fault.of_publish().context(format!("publish {artifact}")))
    }

    /// Sends the offer of an artifact to the hub. Called with `offering` held.
    async fn offer(&self, row: &ArtifactRow) -> Result<Published, Fault> {
        let Offer { to, run, new: _ } = row.offer.clone().unwrap_or_default();
        let question = AskHub::Publish {
            artifact: row.artifact.clone(),
            digest: row.digest,
            to,
            run,
            omitted: row.omitted.brief(),
        };
        let answer: Published = self.hub.ask(&question).await?;
        self.catalogue.offered(&row.artifact).await?;
        Ok(answer)
    }

    /// Handles a refusal by the hub: an artifact that the hub never had is removed from the
    /// catalogue.
    async fn withdraw(&self, artifact: &ArtifactRef, new: bool) -> Result<(), Fault> {
        let catalogue = &self.catalogue;
        match new {
            true => catalogue.remove_artifact(artifact).await?,
            false => catalogue.offered(artifact).await?,
        }
        // A run may wait for the hub's answer.
        catalogue.notify();
        Ok(())
    }

    /// Sends all offers that the hub has not answered, while there is a connection. Ends only with
    /// the connection.
    pub(super) async fn keep_offering(&self) -> Result<(), Fault> {
        let mut watch = self.catalogue.watch(Subject::Artifacts);
        loop {
            let mut all_heard = true;
            for (artifact, _) in self.catalogue.offers().await? {
                let _turn = self.offering.lock().await;
                // A publish may have sent this offer during the wait.
                let Ok(row) = self.catalogue.artifact(&artifact).await else {
                    continue;
                };
                let Some(new) = row.offer.as_ref().map(|offer| offer.new) else {
                    continue;
                };
                match self.offer(&row).await {
                    Ok(_) => {
                        tracing::info!(artifact = %row.artifact, "the hub accepted an artifact that was published here");
                    }
                    Err(fault) if may_pass(&fault) => {
                        all_heard = false;
                        tracing::debug!(artifact = %row.artifact, error = %fault, "an offer could not be sent to the hub");
                    }
                    Err(fault) => {
                        tracing::error!(artifact = %row.artifact, error = %fault, "the hub refused an artifact that was published here");
                        if let Err(fault) = self.withdraw(&row.artifact, new).await {
                            all_heard = false;
                            tracing::warn!(artifact = %row.artifact, error = %fault, "the refusal of an artifact could not be stored; retrying");
                        }
                    }
                }
            }
            if all_heard {
                watch.changed().await;
            } else {
                tokio::time::sleep(OFFER_AGAIN).await;
            }
        }
    }

    /// Removes the files that a publish left after a crash.
    pub(super) async fn clean(&self) -> Result<(), Fault> {
        let live: Vec<Digest> = self.catalogue.digests().await?;
        let (origin, scratch) = (self.reader.clone(), self.config.data_dir.join("scratch"));
        blocking(move || {
            durable::remove_all(&scratch)?;
            origin.clean(&live)
        })
        .await
    }
}

/// Whether the hub may accept it later.
fn may_pass(fault: &Fault) -> bool {
    fault.code == Code::Unreachable || fault.retry != Retry::Never
}

//! What the hub does in jobs: publish, import, export, collect, verify.
//!
//! The API starts them. A job ends with the daemon; what it stored before is kept, and nothing of
//! it counts until the artifact is in the catalogue.

mod verify;

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::deliveries::Deliveries;
use super::library::HubLibrary;
use super::manifests::{AllArtifacts, Live, fault_of, malformed_line, mark};
use super::quota::QuotaLedger;
use super::relay::RelayKeeper;
use super::runs::RunKeeper;
use super::short;
use crate::api::types::{Job, PublishRequest, Published};
use crate::config::Config;
use crate::jobs::{Jobs, until_room};
use crate::label_export::{LabelExport, unpack};
use crate::open_source::{self, Access, REFERRERS_DIFFER, TIMES_DIFFER};
use crate::reach::{Pinned, Reach};
use base::blocking::{blocking, blocking_at};
use base::fault::Fault;
use base::job_progress::JobProgress;
use base::limits::ROOM_AWAITED_MAX;
use base::names::ArtifactRef;
use content::bundle::{self, Member};
use content::ingest::{self, Ingested};
use content::manifest::{DatasetBinding, FORMAT_MAX, Root};
use content::store::Store;
use model::actor::Actor;
use model::run;
use state::{ArtifactRow, Catalogue, Part, new_delivery_id};

/// The jobs of the hub. Cheap to clone.
#[derive(Clone)]
pub(super) struct HubJobs {
    jobs: Jobs,
    parts: Arc<JobParts>,
    /// Held by the collection that runs. Publishes hold leases of the store instead, and wait for
    /// none.
    collecting: Arc<tokio::sync::Mutex<()>>,
}

/// What the jobs work with.
pub(super) struct JobParts {
    pub(super) config: Config,
    pub(super) catalogue: Catalogue,
    pub(super) store: Store,
    pub(super) library: HubLibrary,
    pub(super) deliveries: Deliveries,
    pub(super) runs: RunKeeper,
    pub(super) relay: RelayKeeper,
    pub(super) quotas: QuotaLedger,
}

impl HubJobs {
    /// No job runs yet.
    pub(super) fn new(parts: JobParts) -> Self {
        let jobs = Jobs::new(parts.catalogue.clone());
        Self {
            jobs,
            parts: Arc::new(parts),
            collecting: Arc::default(),
        }
    }

    /// All jobs, to show and cancel them.
    pub(super) fn all(&self) -> &Jobs {
        &self.jobs
    }

    /// Begins a publish.
    pub(super) fn publish(&self, request: PublishRequest, reach: Reach) -> Result<Job, Fault> {
        let (this, asked) = (self.clone(), (request.clone(), reach.clone()));
        self.jobs
            .start_once("publish", &asked, move |progress| async move {
                this.publish_now(request, reach, progress).await
            })
    }

    /// Begins a verify.
    pub(super) fn verify(&self, artifact: ArtifactRef, quick: bool) -> Result<Job, Fault> {
        let (this, asked) = (self.clone(), (artifact.to_string(), quick));
        self.jobs
            .start_once("verify", &asked, move |progress| async move {
                this.verify_now(artifact, quick, progress).await
            })
    }

    /// Begins an export of artifacts whose content the hub holds.
    pub(super) fn export(
        &self,
        members: Vec<Member>,
        out: String,
        reach: Reach,
    ) -> Result<Job, Fault> {
        let (store, config) = (self.parts.store.clone(), self.parts.config.clone());
        let names: Vec<String> = members.iter().map(|m| m.artifact.to_string()).collect();
        let asked = (names, out.clone(), reach.clone());
        self.jobs
            .start_once("export", &asked, move |progress| async move {
                progress.doing(format!("writing {out}"));
                let out = PathBuf::from(out);
                let path = out.clone();
                blocking_at(&path, move || {
                    // It writes a new file only; but not among the daemon's own.
                    let pinned = Pinned::new_file(&out, &reach.own(&config))?;
                    let written = bundle::export(&members, &store, pinned.path(), &progress)
                        .and_then(|written| {
                            bundle::sync_parent(pinned.path())?;
                            Ok(written)
                        })
                        .map_err(|fault| pinned.named(&out, fault))?;
                    Ok(BTreeMap::from([("bytes", written)]))
                })
                .await
            })
    }

    /// Begins an export of labels whose content the hub holds.
    pub(super) fn export_labels(
        &self,
        row: ArtifactRow,
        export: LabelExport,
    ) -> Result<Job, Fault> {
        let (store, config) = (self.parts.store.clone(), self.parts.config.clone());
        let asked = format!("{export:?}");
        self.jobs
            .start_once("export labels", &asked, move |progress| async move {
                let (watched, out) = (progress.clone(), export.out.display().to_string());
                let data_dir = config.data_dir.clone();
                open_source::with_scratch(&data_dir, &out, &progress, move |scratch, _| {
                    watched.doing("reading the rows");
                    unpack(&row.root, &store, &scratch.folder, &watched)?;
                    export.write(&config, &scratch.folder, &watched)
                })
                .await
            })
    }

    /// Begins an import.
    pub(super) fn import(&self, file: String, reach: Reach) -> Result<Job, Fault> {
        let (this, asked) = (self.clone(), (file.clone(), reach.clone()));
        self.jobs
            .start_once("import", &asked, move |progress| async move {
                this.import_now(file, reach, progress).await
            })
    }

    /// Begins a collection.
    pub(super) fn collect(&self) -> Result<Job, Fault> {
        let this = self.clone();
        let jobs = &self.jobs;
        jobs.start_collection(move |progress| async move { this.collect_now(progress).await })
    }

    async fn publish_now(
        &self,
        request: PublishRequest,
        reach: Reach,
        progress: Arc<JobProgress>,
    ) -> Result<Published, Fault> {
        let inner = &*self.parts;
        let artifact: ArtifactRef = request.as_ref.parse()?;
        // All checks that can refuse the request come before the first byte is read.
        let sites = match &request.to {
            Some(to) => Some((to, inner.catalogue.select_sites(&to.parse()?).await?)),
            None => None,
        };
        let run = request.run.as_deref().map(run::known).transpose()?;
        if let Some(run) = &run {
            inner
                .runs
                .check_model(&Actor::Admin, run, &artifact)
                .await?;
        }
        open_source::check_image_name(&artifact, &request.options)?;
        let options = request.options.clone();
        blocking(move || open_source::check_bad_out(&options)).await?;
        let dataset = open_source::dataset_of(
            &inner.catalogue,
            &artifact,
            request.options.for_dataset.as_deref(),
        )
        .await?;
        let read = until_room(&inner.store, &progress, ROOM_AWAITED_MAX, || {
            self.read_in(&artifact, &request, &reach, dataset.clone(), &progress)
        });
        let (leased, mut ingested) = read.await?;
        let access = self.access().await?;
        let mut note = access.note(artifact.kind, &request.options, &ingested.omitted);
        let (catalogue, new) = (&inner.catalogue, &ingested.root);
        let of_times = open_source::as_published(catalogue, &leased, &artifact, new).await?;
        let before = match of_times {
            Some(root) => Some((root, TIMES_DIFFER)),
            None => open_source::with_other_referrers(catalogue, &artifact, new)
                .await?
                .map(|root| (root, REFERRERS_DIFFER)),
        };
        if let Some((root, why)) = before {
            ingested.digest = root.digest();
            ingested.root = root;
            note = Some(why.to_owned());
        }
        let bytes = ingested.root.totals.bytes;
        progress.end()?;
        let added = match &run {
            Some(run) => {
                inner
                    .runs
                    .add_model(&Actor::Admin, run, &artifact, &ingested.root)
                    .await?
            }
            None => {
                inner
                    .library
                    .register(None, &artifact, &ingested.root)
                    .await?
            }
        };
        inner
            .catalogue
            .set_omitted(&artifact, &ingested.omitted)
            .await?;
        let transfers = match sites {
            Some((_, sites)) => {
                let part = Part::new(&inner.catalogue.artifact(&artifact).await?, &sites);
                inner
                    .deliveries
                    .begin(&new_delivery_id(), None, &[part])
                    .await?
                    .into_iter()
                    .map(Into::into)
                    .collect()
            }
            None => Vec::new(),
        };
        let stored = progress.stored.load(Ordering::Relaxed);
        tracing::info!(%artifact, digest = %ingested.digest, bytes, stored, "published");
        Ok(Published {
            artifact: artifact.to_string(),
            digest: ingested.digest.hex(),
            transfers,
            bytes,
            stored,
            unchanged: !added,
            note,
            omitted: ingested.omitted.list(),
        })
    }

    /// The access of a publish at this hub.
    async fn access(&self) -> Result<Access, Fault> {
        let parts = &*self.parts;
        let format = parts.catalogue.manifest_format().await?;
        Ok(Access::of_daemon(
            &parts.config,
            None,
            format.unwrap_or(FORMAT_MAX),
        ))
    }

    /// Reads a source into the store. No garbage collection removes its content until the returned
    /// store, which holds a lease, is dropped.
    async fn read_in(
        &self,
        artifact: &ArtifactRef,
        request: &PublishRequest,
        reach: &Reach,
        dataset: Option<(DatasetBinding, Root)>,
        progress: &Arc<JobProgress>,
    ) -> Result<(Store, Ingested), Fault> {
        let inner = &*self.parts;
        let leased = inner.store.leased();
        progress.doing(format!("reading {}", request.source));
        let (store, options, text, kind) = (
            leased.clone(),
            request.options.clone(),
            request.source.clone(),
            artifact.kind,
        );
        let (watched, access) = (progress.clone(), self.access().await?);
        let (config, reach) = (inner.config.clone(), reach.clone());
        let ingested = open_source::with_scratch(
            &inner.config.data_dir,
            &request.source,
            progress,
            move |scratch, runtime| {
                let access = access.for_reach(&reach, &config);
                let dataset =
                    dataset.map(|(binding, root)| open_source::bind(binding, root, store.clone()));
                let mut source =
                    open_source::open(kind, &text, &options, dataset, &access, scratch, runtime)?;
                open_source::read(source.as_mut(), &options, |source| {
                    ingest::reported(&watched, |counted| {
                        ingest::ingest(source, kind, &store, &store, counted)
                    })
                })
            },
        );
        let ingested = ingested
            .await
            .map_err(|fault| fault.of_publish().context(format!("publish {artifact}")))?;
        Ok((leased, ingested))
    }

    /// Imports all artifacts of a bundle. Returns their names.
    async fn import_now(
        &self,
        file: String,
        reach: Reach,
        progress: Arc<JobProgress>,
    ) -> Result<Vec<String>, Fault> {
        let store = &self.parts.store;
        let read = until_room(store, &progress, ROOM_AWAITED_MAX, || async {
            let leased = store.leased();
            progress.doing(format!("reading {file}"));
            let (store, file, progress) = (leased.clone(), PathBuf::from(&file), progress.clone());
            let (config, reach) = (self.parts.config.clone(), reach.clone());
            let path = file.clone();
            let read = move || {
                let pinned = Pinned::file(&file, &reach.own(&config))?;
                bundle::import(pinned.path(), &store, &progress)
                    .map_err(|fault| pinned.named(&file, fault))
            };
            Ok((leased, blocking_at(&path, read).await?))
        });
        let (_leased, members) = read.await?;
        progress.end()?;
        for member in &members {
            self.parts
                .library
                .register(None, &member.artifact, &member.root()?)
                .await?;
        }
        Ok(members
            .into_iter()
            .map(|m| m.artifact.to_string())
            .collect())
    }

    /// Removes the chunks that no artifact names. A malformed manifest is reported; the content
    /// that can be read from it is kept.
    pub(super) async fn collect_now(
        &self,
        progress: Arc<JobProgress>,
    ) -> Result<serde_json::Value, Fault> {
        progress.doing("waiting for another collection to end");
        let alone = self.collecting.clone().lock_owned().await;
        progress.doing("flushing the store");
        let unfinished = self.parts.quotas.unfinished();
        let store = self.parts.store.clone();
        let collection = blocking(move || store.begin_collection()).await?;
        // The names are read only now, because the collection does not touch content that is
        // published from here on. A publish that is committing at this moment is waited for: if it
        // was cancelled, its lease may already have ended.
        let names = self.parts.catalogue.artifact_names_settled().await?;
        let all = AllArtifacts::of(&self.parts.catalogue);
        let store = self.parts.store.clone();
        progress.doing("marking the content in use");
        let result = blocking(move || {
            // A thread cannot be cancelled. So the next collection starts only when this thread has
            // ended, even if its job was cancelled.
            let _alone = alone;
            let lost = store.lost_packs()?;
            if !lost.is_empty() || store.is_damaged() {
                // The chunks below an unreadable page would be removed, and would be missing if the
                // lost pack were restored later.
                return Err(Fault::integrity("the store has lost packs or its index is damaged: nothing is collected")
                    .with_next("see 'packhorse doctor'; restore the packs from a backup, or publish again the artifacts that 'packhorse verify' reports"));
            }
            let (mut live, mut pages, mut malformed) = (Live::new(), HashSet::new(), Vec::new());
            for name in &names {
                progress.check()?;
                let Some(row) = all.row(name)? else { continue };
                let checked = fault_of(&row.artifact, &row.root, &store, &progress.stop());
                progress.check()?;
                if let Some(fault) = checked? {
                    let line = malformed_line(&row, &fault);
                    tracing::warn!(artifact = %row.artifact, error = %fault, "the manifest of an artifact cannot be used");
                    progress.note(line);
                    malformed.push(row.artifact.to_string());
                }
                mark(&row.root, &store, &mut pages, &mut live)?;
            }
            let freed = collection.sweep(&|id| live.contains(&short(id)), &|| progress.check())?;
            let mut result = serde_json::json!({ "freed": freed });
            if !malformed.is_empty() {
                result["malformed"] = malformed.into();
            }
            Ok(result)
        })
        .await?;
        self.parts.quotas.forget_collected(unfinished);
        self.parts.relay.forget_prefetched();
        Ok(result)
    }
}

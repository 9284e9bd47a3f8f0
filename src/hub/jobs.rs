//! The jobs of the hub: publish, import, and garbage collection. `verify` has its own module.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::manifests::{AllArtifacts, Live, fault_of, malformed_line, mark};
use super::{Hub, short};
use crate::api::types::{PublishRequest, Published};
use crate::jobs::until_room;
use crate::open_source::{self, Access};
use base::blocking::blocking;
use base::fault::Fault;
use base::job_progress::JobProgress;
use base::limits::ROOM_AWAITED_MAX;
use base::names::ArtifactRef;
use content::bundle;
use content::ingest::{self, Ingested};
use content::manifest::{DatasetBinding, Root};
use content::store::Store;
use model::actor::Actor;
use model::run;
use state::{Part, new_delivery_id};

impl Hub {
    pub(super) async fn publish_now(
        &self,
        request: PublishRequest,
        progress: Arc<JobProgress>,
    ) -> Result<Published, Fault> {
        let inner = &self.inner;
        let artifact: ArtifactRef = request.as_ref.parse()?;
        // All checks that can refuse the request come before the first byte is read.
        let sites = match &request.to {
            Some(to) => Some((to, inner.catalogue.select_sites(&to.parse()?).await?)),
            None => None,
        };
        let run = request.run.as_deref().map(run::known).transpose()?;
        if let Some(run) = &run {
            self.check_run_model(&Actor::Admin, run, &artifact).await?;
        }
        let dataset = open_source::dataset_of(
            &inner.catalogue,
            &artifact,
            request.options.for_dataset.as_deref(),
        )
        .await?;
        let read = until_room(&inner.store, &progress, ROOM_AWAITED_MAX, || {
            self.read_in(&artifact, &request, dataset.clone(), &progress)
        });
        let (_leased, ingested) = read.await?;
        let bytes = ingested.root.totals.bytes;
        progress.end()?;
        let added = match &run {
            Some(run) => {
                self.add_run_model(&Actor::Admin, run, &artifact, &ingested.root)
                    .await?
            }
            None => self.register(None, &artifact, &ingested.root).await?,
        };
        inner
            .catalogue
            .set_omitted(&artifact, &ingested.omitted)
            .await?;
        let transfers = match sites {
            Some((_, sites)) => {
                let part = Part::new(&inner.catalogue.artifact(&artifact).await?, &sites);
                self.begin_delivery(&new_delivery_id(), None, &[part])
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
            note: None,
            omitted: ingested.omitted.list(),
        })
    }

    /// Reads a source into the store. No garbage collection removes its content until the returned
    /// store, which holds a lease, is dropped.
    async fn read_in(
        &self,
        artifact: &ArtifactRef,
        request: &PublishRequest,
        dataset: Option<(DatasetBinding, Root)>,
        progress: &Arc<JobProgress>,
    ) -> Result<(Store, Ingested), Fault> {
        let inner = &self.inner;
        let leased = inner.store.leased();
        progress.doing(format!("reading {}", request.source));
        let (store, options, text, kind) = (
            leased.clone(),
            request.options.clone(),
            request.source.clone(),
            artifact.kind,
        );
        let (watched, config) = (progress.clone(), inner.config.clone());
        let ingested =
            open_source::with_scratch(&inner.config.data_dir, progress, move |scratch, runtime| {
                let dataset =
                    dataset.map(|(binding, root)| open_source::bind(binding, root, store.clone()));
                let access = Access::of_daemon(&config, None);
                let mut source =
                    open_source::open(kind, &text, &options, dataset, &access, scratch, runtime)?;
                open_source::read(source.as_mut(), &options, |source| {
                    ingest::reported(&watched, |counted| {
                        ingest::ingest(source, kind, &store, &store, counted)
                    })
                })
            });
        let ingested = ingested
            .await
            .map_err(|fault| fault.of_publish().context(format!("publish {artifact}")))?;
        Ok((leased, ingested))
    }

    /// Imports all artifacts of a bundle. Returns their names.
    pub(super) async fn import_now(
        &self,
        file: String,
        progress: Arc<JobProgress>,
    ) -> Result<Vec<String>, Fault> {
        let store = &self.inner.store;
        let read = until_room(store, &progress, ROOM_AWAITED_MAX, || async {
            let leased = store.leased();
            progress.doing(format!("reading {file}"));
            let (store, file, progress) = (leased.clone(), PathBuf::from(&file), progress.clone());
            let config = self.inner.config.clone();
            let read = move || {
                config.own().check_path(&file)?;
                bundle::import(&file, &store, &progress)
            };
            Ok((leased, blocking(read).await?))
        });
        let (_leased, members) = read.await?;
        progress.end()?;
        for member in &members {
            self.register(None, &member.artifact, &member.root()?)
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
        let alone = self.inner.collecting.clone().lock_owned().await;
        progress.doing("flushing the store");
        let unfinished = self.unfinished();
        let store = self.inner.store.clone();
        let collection = blocking(move || store.begin_collection()).await?;
        // The names are read only now, because the collection does not touch content that is
        // published from here on. A publish that is committing at this moment is waited for: if it
        // was cancelled, its lease may already have ended.
        let names = self.inner.catalogue.artifact_names_settled().await?;
        let all = AllArtifacts::of(&self.inner.catalogue);
        let store = self.inner.store.clone();
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
                if let Some(fault) = fault_of(&row.artifact, &row.root, &store)? {
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
        self.forget_collected(unfinished);
        // The artifacts that count as prefetched may have used chunks of the store that no artifact
        // named.
        self.inner.relay_memory.lock().whole.clear();
        Ok(result)
    }
}

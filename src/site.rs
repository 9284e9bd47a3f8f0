//! A site: dials the hub, keeps a line to it, and runs the transfers that the hub wants.

mod backend;
mod connection;
mod lost;
mod publish;
mod runs;
mod watch;

use std::sync::Arc;

use tokio::sync::{self, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::jobs::Jobs;
use crate::open_source::AtSite;
use base::blocking::blocking;
use base::fault::Fault;
use base::limits::{PLACES_SWEEP_EVERY, PLACES_SWEEP_PAUSE, PLACES_SWEEP_ROWS, REST_EVERY};
use base::peer::Peer;
use content::store::Store;
use exchange::chunk_index::{ChunkIndex, LocationInfo};
use exchange::in_place::InPlaceReader;
use exchange::transfer::{self, AssemblyContext, LOOKS_ASKED_MAX, Runner, Sinks};
use sink::files::FilesSink;
use sink::{StorageLocation, images, labels};
use state::Catalogue;
use transport::Link;
use transport::identity::SiteIdentity;

/// The site. Cheap to clone.
#[derive(Clone)]
pub struct Site {
    inner: Arc<Inner>,
}

struct Inner {
    config: Config,
    memory: Memory,
    catalogue: Catalogue,
    shared: AssemblyContext,
    sinks: Sinks,
    runner: Runner,
    identity: sync::watch::Sender<Arc<SiteIdentity>>,
    link: sync::watch::Sender<Option<Link>>,
    /// Why there is no line, as the last try said.
    line_fault: parking_lot::Mutex<Option<Fault>>,
    jobs: Jobs,
    runs: runs::RunsState,
    /// What can be published here beside paths.
    sources: AtSite,
    /// Gives the hub what was published here, or landed.
    origin: InPlaceReader,
    /// HeldArtifact while the hub is told of what was published here.
    offering: sync::Mutex<()>,
    watch: watch::WatchState,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// What of the daemon's budget is for what, in bytes.
struct Memory {
    /// Asked for by transfers and not yet written.
    to_fetch: u64,
    /// Read for the hub and not yet given to the line.
    to_read: u64,
    /// Buffered by the line for sending.
    to_send: u64,
}

impl Memory {
    fn of(budget: u64) -> Self {
        Self {
            to_fetch: budget / 2,
            to_read: budget / 8,
            to_send: budget / 8 * 3,
        }
    }
}

impl Site {
    /// Opens the site's state and sinks. It must have joined.
    pub async fn open(config: Config, stop: CancellationToken) -> Result<Self, Fault> {
        let Some(identity) = SiteIdentity::load(&config.data_dir)? else {
            return Err(Fault::not_allowed(format!(
                "site {} has not joined a hub yet: {} holds no certificate",
                config.name,
                config.data_dir.display()
            ))
            .with_next(
                "at the hub: packhorse token create --site NAME; then here: packhorse join --config FILE --hub HOST:PORT --token TOKEN",
            ));
        };
        if *identity.holder() != Peer::Site(config.name.clone()) {
            return Err(Fault::config(format!(
                "the config says that this is site {}, its certificate says {}",
                config.name,
                identity.holder()
            ))
            .with_next("correct the name in the configuration, or join again"));
        }
        let memory = Memory::of(config.limits.memory);
        lost::note(&config.data_dir)?;
        let catalogue = Catalogue::open(&config.data_dir).await?;
        let data = config.data_dir.clone();
        // Whatever came here, or is on its way, has rows in there.
        let expected = catalogue.any_artifact().await?
            || !catalogue.open_transfers(&config.name).await?.is_empty();
        let (store, places) = blocking(move || {
            Ok((
                Store::open(&data.join("store"))?,
                ChunkIndex::open_expected(&data, expected)?,
            ))
        })
        .await?;
        let rows = labels::open(config.sink.labels.as_ref(), &config.data_dir)?;
        let sources = AtSite {
            labels: rows.clone(),
            catalogue: catalogue.clone(),
            registry: config.sink.images.clone(),
        };
        let sinks = Sinks {
            files: Arc::new(FilesSink::open(
                config.sink.files.as_ref(),
                &config.data_dir,
            )?),
            labels: rows,
            images: images::open(config.sink.images.as_ref(), &config.data_dir)?,
        };
        let shared = AssemblyContext {
            store,
            chunk_index: Arc::new(places),
            memory: Arc::new(transfer::Memory::new(memory.to_fetch)),
            images: sinks.images.clone(),
        };
        let (identity, identity_watch) = sync::watch::channel(Arc::new(identity));
        let (link, link_watch) = sync::watch::channel(None);
        let (looks, asked) = mpsc::channel(LOOKS_ASKED_MAX);
        let runner = Runner::new(
            catalogue.clone(),
            shared.clone(),
            sinks.clone(),
            identity_watch,
            link_watch,
            looks,
            stop.clone(),
        );
        tracing::info!(name = %config.name, api = %config.listen.api, data = %config.data_dir.display(), "the site is ready");
        let jobs = Jobs::new(catalogue.clone());
        let origin = InPlaceReader::new(
            shared.store.clone(),
            shared.chunk_index.clone(),
            config.data_dir.join("published"),
            Arc::new(catalogue.clone()),
            Some(sinks.images.clone()),
            memory.to_read,
        );
        let (line_fault, offering, runs, tasks) = Default::default();
        Ok(Self {
            inner: Arc::new(Inner {
                config,
                memory,
                catalogue,
                shared,
                sinks,
                runner,
                identity,
                link,
                line_fault,
                jobs,
                sources,
                origin,
                offering,
                watch: watch::WatchState::new(asked),
                runs,
                tasks,
                stop,
            }),
        })
    }

    /// Keeps the line and works until the daemon stops.
    pub async fn run(&self) -> Result<(), Fault> {
        self.clean_published().await?;
        if let Err(fault) = self.follow_roots().await {
            tracing::error!(error = %fault, "the new root of a sink could not be noted; the next start of the daemon tries again");
        }
        self.inner.runner.start().await?;
        let this = self.clone();
        self.inner
            .tasks
            .spawn(async move { this.keep_runs().await });
        let this = self.clone();
        self.inner
            .tasks
            .spawn(async move { this.keep_watch().await });
        let runner = self.inner.runner.clone();
        self.inner
            .tasks
            .spawn(async move { runner.keep_clean().await });
        let this = self.clone();
        self.inner
            .tasks
            .spawn(async move { this.keep_resting().await });
        let this = self.clone();
        self.inner
            .tasks
            .spawn(async move { this.rebuild_places().await });
        let this = self.clone();
        self.inner
            .tasks
            .spawn(async move { this.keep_places_swept().await });
        self.keep_line().await
    }

    /// Removes the rows of places that are gone from the chunk index, a part at a time.
    async fn keep_places_swept(&self) {
        let stop = &self.inner.stop;
        while stop
            .run_until_cancelled(tokio::time::sleep(PLACES_SWEEP_EVERY))
            .await
            .is_some()
        {
            if let Err(fault) = self.sweep_places().await {
                tracing::warn!(error = %fault, "the chunk index could not be swept; tried again");
            }
        }
    }

    async fn sweep_places(&self) -> Result<(), Fault> {
        let (inner, places) = (&self.inner, &self.inner.shared.chunk_index);
        let looked = places.clone();
        let stale = blocking(move || looked.stale()).await?;
        let mut behind = None;
        while stale > 0 && !inner.stop.is_cancelled() {
            let (places, from) = (places.clone(), behind);
            behind = blocking(move || places.sweep(from, PLACES_SWEEP_ROWS)).await?;
            if behind.is_none() {
                let places = self.inner.shared.chunk_index.clone();
                return blocking(move || places.swept(stale)).await;
            }
            tokio::time::sleep(PLACES_SWEEP_PAUSE).await;
        }
        Ok(())
    }

    /// Notes each artifact where its sink has it now, if that is elsewhere than before: a root may
    /// have been moved, or be mounted at another path. What is not there is found out when it is
    /// looked at.
    async fn follow_roots(&self) -> Result<(), Fault> {
        let inner = &self.inner;
        for name in inner.catalogue.artifact_names().await? {
            // One that was removed meanwhile is nowhere.
            let Ok(row) = inner.catalogue.artifact(&name).await else {
                continue;
            };
            let (artifact, digest) = (row.artifact, row.digest);
            let Some(now) = inner.sinks.of(artifact.kind).place_of(&artifact) else {
                continue;
            };
            let Some(before) = row.place.filter(|before| !row.published && *before != now) else {
                continue;
            };
            let (places, place) = (inner.shared.chunk_index.clone(), now.clone());
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
            inner
                .catalogue
                .set_place(&artifact, Some(&now), location.as_deref())
                .await?;
            tracing::info!(%artifact, "its sink has another root than before");
        }
        Ok(())
    }

    /// After a loss of the chunk index: notes again where the chunks of each artifact are that is
    /// here.
    async fn rebuild_places(&self) {
        let inner = &self.inner;
        if inner
            .shared
            .chunk_index
            .loss()
            .is_none_or(|loss| loss.artifacts.is_some())
        {
            return;
        }
        match self.note_all_places().await {
            Ok(artifacts) => tracing::info!(artifacts, "the chunk index was made again"),
            Err(fault) => {
                tracing::error!(error = %fault, "the chunk index could not be made again; the next start of the daemon tries again");
            }
        }
    }

    async fn note_all_places(&self) -> Result<u64, Fault> {
        let inner = &self.inner;
        let mut noted = 0;
        for name in inner.catalogue.artifact_names().await? {
            // One that was removed meanwhile lies nowhere.
            let Ok(row) = inner.catalogue.artifact(&name).await else {
                continue;
            };
            let Some(place) = row.place else { continue };
            if inner.stop.is_cancelled() {
                return Err(Fault::internal("the daemon stops"));
            }
            let (places, origin, artifact) = (
                inner.shared.chunk_index.clone(),
                inner.origin.clone(),
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
                // One artifact whose manifest is damaged must not keep the others from being noted.
                Err(fault) => {
                    tracing::error!(%artifact, error = %fault, "where an artifact is could not be noted again");
                }
            }
        }
        let places = inner.shared.chunk_index.clone();
        blocking(move || places.rebuilt(noted)).await?;
        Ok(noted)
    }

    /// Gives back what an idle daemon does not need.
    async fn keep_resting(&self) {
        let mut rest = tokio::time::interval(REST_EVERY);
        loop {
            tokio::select! {
                _ = rest.tick() => {
                    self.inner.shared.store.rest();
                    self.inner.origin.rest();
                }
                () = self.inner.stop.cancelled() => return,
            }
        }
    }

    /// Waits for what runs; each transfer writes down where it is.
    pub async fn stopped(&self) {
        self.inner.runner.drained().await;
        if let Some(link) = self.inner.link.send_replace(None) {
            // Else the hub would take it for online until it had been silent for long.
            link.close_and_flush("the site stops").await;
        }
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }
}

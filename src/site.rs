//! A site: connects to the hub, and executes the transfers that the hub requests.
//!
//! [`Site`] creates the components and starts their workers: `hub_link` (the connection, as the
//! other components use it), `connection` (keeps the connection, executes the desired state),
//! `publish` (publishing in place), `watch` (checks published content), `runs` (training runs),
//! `index` (the chunk index). `backend` implements the API. `serve` calls this module. Each
//! component states which of its state survives a crash.

mod adopt;
mod backend;
mod connection;
mod hub_link;
mod index;
mod lost;
mod publish;
mod runs;
mod scrub;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::jobs::Jobs;
use crate::open_source::AtSite;
use base::blocking::blocking;
use base::fault::Fault;
use base::limits::{CHANGE_WAIT_MAX, EVENT_TRIM_EVERY, REST_EVERY};
use base::peer::Peer;
use base::workers::{Pace, Workers};
use connection::Connection;
use content::store::Store;
use exchange::chunk_index::ChunkIndex;
use exchange::in_place::InPlaceReader;
use exchange::transfer::{self, AssemblyContext, CHECK_REQUESTS_MAX, Runner, Sinks};
use hub_link::HubLink;
use index::IndexKeeper;
use publish::Publications;
use runs::RunKeeper;
use scrub::Scrubber;
use sink::files::FilesSink;
use sink::{images, labels};
use state::Catalogue;
use transport::identity::SiteIdentity;
use watch::Watch;

/// How often each sink is asked to keep what it holds readable for others.
const TEND_EVERY: Duration = Duration::from_secs(60);
/// How long the end of the daemon waits for the sinks.
const LEAVE_MAX: Duration = Duration::from_secs(2);

/// The site. Cheap to clone.
#[derive(Clone)]
pub struct Site {
    inner: Arc<Inner>,
}

struct Inner {
    opened: Opened,
    hub: Arc<HubLink>,
    jobs: Jobs,
    publications: Publications,
    watch: Watch,
    runs: RunKeeper,
    index: IndexKeeper,
    connection: Connection,
    workers: Workers,
}

/// The opened state of a site, for its components. Cheap to clone.
#[derive(Clone)]
struct Opened {
    config: Arc<Config>,
    catalogue: Catalogue,
    shared: AssemblyContext,
    sinks: Sinks,
    runner: Runner,
    /// Reads published and delivered content for the hub.
    reader: InPlaceReader,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// The parts of the daemon's memory budget, in bytes.
struct Memory {
    /// Requested by transfers and not yet written.
    to_fetch: u64,
    /// Read for the hub and not yet passed to the connection.
    to_read: u64,
    /// In the send buffer of the connection.
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
                "site {} has not joined a hub yet: {} has no certificate",
                config.name,
                config.data_dir.display()
            ))
            .with_next(
                "at the hub: packhorse token create --site NAME; then here: packhorse join --config FILE --hub HOST:PORT --token TOKEN",
            ));
        };
        if *identity.holder() != Peer::Site(config.name.clone()) {
            return Err(Fault::config(format!(
                "the name in the configuration is {}, but the certificate is for {}",
                config.name,
                identity.holder()
            ))
            .with_next("correct the name in the configuration, or join again"));
        }
        let memory = Memory::of(config.limits.memory);
        lost::note(&config.data_dir)?;
        let catalogue = Catalogue::open(&config.data_dir).await?;
        let data = config.data_dir.clone();
        // Each delivered artifact, and each open transfer, has rows in the chunk index.
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
            trusted_for: config.scrub.every,
        };
        let hub = Arc::new(HubLink::new(identity, config.data_dir.clone()));
        let (check_requests, requested) = mpsc::channel(CHECK_REQUESTS_MAX);
        let runner = Runner::new(
            catalogue.clone(),
            shared.clone(),
            sinks.clone(),
            hub.watch_identity(),
            hub.watch_link(),
            check_requests,
            stop.clone(),
        );
        tracing::info!(name = %config.name, api = %config.listen.api, data = %config.data_dir.display(), "the site is ready");
        let jobs = Jobs::new(catalogue.clone());
        let reader = InPlaceReader::new(
            shared.store.clone(),
            shared.chunk_index.clone(),
            config.data_dir.join("published"),
            Arc::new(catalogue.clone()),
            Some(sinks.images.clone()),
            memory.to_read,
        );
        let opened = Opened {
            config: Arc::new(config),
            catalogue,
            shared,
            sinks,
            runner,
            reader,
            tasks: TaskTracker::new(),
            stop,
        };
        let publications = Publications::new(&opened, sources, hub.clone());
        let watch = Watch::new(&opened, requested);
        let runs = RunKeeper::new(&opened, watch.clone(), publications.clone());
        let connection = Connection::new(
            &opened,
            hub.clone(),
            publications.clone(),
            runs.clone(),
            memory.to_send,
        );
        Ok(Self {
            inner: Arc::new(Inner {
                hub,
                jobs,
                publications,
                watch,
                runs,
                index: IndexKeeper::new(&opened),
                connection,
                workers: Workers::new(opened.stop.clone()),
                opened,
            }),
        })
    }

    /// Starts the site's background work, and returns when the daemon stops.
    pub async fn run(&self) -> Result<(), Fault> {
        let (inner, opened) = (&self.inner, &self.inner.opened);
        let Some(hub) = &opened.config.hub else {
            return Err(Fault::config("a site needs [hub] address"));
        };
        inner.publications.clean().await?;
        if let Err(fault) = inner.index.follow_roots().await {
            tracing::error!(error = %fault, "the new root of a sink could not be stored; the next start of the daemon tries again");
        }
        opened.runner.start().await?;
        let workers = &inner.workers;
        let address = hub.address.clone();
        workers.start(
            "connection",
            Pace::Continuous,
            &inner.connection,
            move |connection, worker| {
                let address = address.clone();
                async move { connection.keep(&address, &worker).await }
            },
        );
        workers.start(
            "runs",
            Pace::every(CHANGE_WAIT_MAX),
            &inner.runs,
            |runs, worker| async move { runs.keep(&worker).await },
        );
        inner.watch.start_workers(workers);
        opened.runner.start_cleanup_workers(workers);
        self.inner.index.start_workers(workers);
        Scrubber::new(opened).start_worker(workers);
        workers.repeat(
            "event-trim",
            EVENT_TRIM_EVERY,
            opened,
            |opened| async move {
                let trimmed = opened.catalogue.trim_events().await;
                trimmed.map_err(|fault| fault.context("remove old events"))
            },
        );
        workers.repeat("sink-tend", TEND_EVERY, opened, |opened| async move {
            for sink in opened.sinks.all() {
                sink.tend().await?;
            }
            Ok(())
        });
        workers.repeat("idle-release", REST_EVERY, opened, |opened| async move {
            opened.shared.store.rest();
            opened.reader.rest();
            Ok(())
        });
        opened.stop.cancelled().await;
        Ok(())
    }

    /// Reads the certificate of this site again, which the next connection uses. Returns whether it
    /// changed.
    pub async fn reload_certificate(&self) -> Result<bool, Fault> {
        self.inner.hub.reload_certificate().await
    }

    /// The site's catalogue.
    pub(crate) fn catalogue(&self) -> &Catalogue {
        &self.inner.opened.catalogue
    }

    /// The site's background work.
    pub fn workers(&self) -> &Workers {
        &self.inner.workers
    }

    /// Waits for running work. Each transfer stores its position.
    pub async fn stopped(&self) {
        let opened = &self.inner.opened;
        opened.runner.drained().await;
        if let Some(link) = self.inner.hub.disconnected() {
            // Otherwise the hub would show the site as online until the timeout for silence.
            link.close_and_flush("the site stops").await;
        }
        opened.tasks.close();
        opened.tasks.wait().await;
        let leave = futures::future::join_all(opened.sinks.all().map(|sink| sink.leave()));
        let _ = timeout(LEAVE_MAX, leave).await;
    }
}

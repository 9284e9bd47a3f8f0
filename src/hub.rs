//! The hub: owns the catalogue and the store, sends each site its desired state, and sends the
//! content that sites request.

mod answers;
mod backend;
mod deliveries;
mod entitlement;
#[cfg(test)]
mod hostile;
mod jobs;
mod library;
mod links;
mod manifest_push;
mod manifests;
mod members;
mod membership;
mod peer_budgets;
mod planning;
mod quota;
mod refused;
mod relay;
mod runs;
mod session;
mod sharing;
mod upload;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use crate::config::Config;
use base::blocking::blocking;
use base::durable;
use base::fault::Fault;
use base::limits::{
    CHANGE_WAIT_MAX, EVENT_TRIM_EVERY, HEARD_LOOK_EVERY, HEARD_STORE_EVERY, REST_EVERY,
};
use base::names::SiteSelector;
use base::peer::Peer;
use base::tally::Tally;
use base::workers::{Pace, Worker, Workers};
use content::chunk::ShortHash;
use content::manifest::FORMAT_MAX;
use content::store::Store;
use state::Catalogue;
use transport::identity::{Claim, HubIdentity, Redeemer, Serial};
use transport::{Arrival, Link, Listener};

use deliveries::Deliveries;
use entitlement::Entitlement;
use jobs::{HubJobs, JobParts};
use library::HubLibrary;
use links::Links;
use manifests::Manifests;
use membership::Membership;
use peer_budgets::PeerBudgets;
use quota::QuotaLedger;
use relay::{RelayKeeper, RelayParts};
use runs::RunKeeper;
pub(crate) use runs::lineage_view;
use session::{SessionParts, Sessions};
use upload::{UploadParts, Uploads};

/// How often the hub looks whether its own certificate is to be renewed.
const CERTIFICATE_CHECK_EVERY: Duration = Duration::from_secs(3600);

/// The hub. Cheap to clone.
#[derive(Clone)]
pub struct Hub {
    inner: Arc<Inner>,
}

/// The components of the hub. Each has its purpose in the `//!` of its module.
struct Inner {
    config: Config,
    catalogue: Catalogue,
    store: Store,
    identity: Arc<HubIdentity>,
    listener: Listener,
    links: Links,
    membership: Membership,
    budgets: Arc<PeerBudgets>,
    /// When it was last stored when something was received from each site.
    heard_stored: Mutex<Instant>,
    deliveries: Deliveries,
    runs: RunKeeper,
    relay: RelayKeeper,
    manifests: Manifests,
    // For tests, which look into these.
    #[cfg(test)]
    quotas: QuotaLedger,
    #[cfg(test)]
    entitlement: Entitlement,
    jobs: HubJobs,
    sessions: Sessions,
    uploads: Uploads,
    workers: Workers,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Hub {
    /// Opens the hub's state and binds its transport.
    pub async fn open(config: Config, stop: CancellationToken) -> Result<Self, Fault> {
        durable::remove_all(&config.data_dir.join("scratch"))?;
        refuse_a_part(
            &config.data_dir,
            "catalogue.db",
            has_packs(&config.data_dir),
            "the store has packs",
        )?;
        let has_identity = config.data_dir.join("identity/ca.pem").exists();
        refuse_a_part(
            &config.data_dir,
            "catalogue.db",
            has_identity,
            "the hub has an identity",
        )?;
        let share = config.share.allow.as_ref().map(|list| {
            list.iter()
                .map(|text| text.parse())
                .collect::<Result<Vec<SiteSelector>, _>>()
        });
        let catalogue = Catalogue::open(&config.data_dir).await?;
        let entitlement = Entitlement::new(catalogue.clone(), share.transpose()?);
        let published = catalogue.any_artifact().await?;
        // If only the index is lost, the store reports the next step.
        let needed = published && !has_packs(&config.data_dir);
        refuse_a_part(
            &config.data_dir,
            "store/index.redb",
            needed,
            "the catalogue names artifacts",
        )?;
        let joined = !catalogue.sites().await?.is_empty();
        refuse_a_part(
            &config.data_dir,
            "identity/ca.pem",
            joined,
            "sites have joined",
        )?;
        let identity = Arc::new(HubIdentity::open_or_create(&config.data_dir, &config.name)?);
        let dir = config.data_dir.join("store");
        let store = blocking(move || Store::open(&dir)).await?;
        let workers = Workers::new(stop.clone());
        let manifest_format = catalogue.manifest_format().await?.unwrap_or(FORMAT_MAX);
        let membership =
            Membership::new(catalogue.clone(), identity.clone(), config.identity.grace);
        let listener = Listener::bind(
            config.listen.quic,
            identity.clone(),
            Arc::new(membership.clone()),
            &config.line,
            config.limits.memory / 2,
            &workers,
        )?;
        listener
            .manifest_format()
            .store(manifest_format, Ordering::Relaxed);
        tracing::info!(name = %config.name, line = %listener.local_addr(), api = %config.listen.api, data = %config.data_dir.display(), "the hub is ready");
        let (tasks, links) = (TaskTracker::new(), Links::default());
        let budgets = Arc::new(PeerBudgets::new(config.limits.memory));
        let manifests = Manifests::new(catalogue.clone(), store.clone());
        let quotas = QuotaLedger::new(catalogue.clone(), config.quota.clone());
        let relay = RelayKeeper::open(
            &config,
            RelayParts {
                catalogue: catalogue.clone(),
                store: store.clone(),
                manifests: manifests.clone(),
                links: links.clone(),
                entitlement: entitlement.clone(),
                budgets: budgets.clone(),
                workers: workers.clone(),
                tasks: tasks.clone(),
                stop: stop.clone(),
            },
        )
        .await?;
        let library = HubLibrary::new(
            catalogue.clone(),
            store.clone(),
            entitlement.clone(),
            budgets.clone(),
            relay.clone(),
        );
        let deliveries = Deliveries::new(catalogue.clone(), links.clone(), entitlement.clone());
        deliveries.read_revoked().await?;
        let runs = RunKeeper::new(
            catalogue.clone(),
            entitlement.clone(),
            deliveries.clone(),
            library.clone(),
        );
        let jobs = HubJobs::new(JobParts {
            config: config.clone(),
            catalogue: catalogue.clone(),
            store: store.clone(),
            library: library.clone(),
            deliveries: deliveries.clone(),
            runs: runs.clone(),
            relay: relay.clone(),
            quotas: quotas.clone(),
        });
        let sessions = Sessions::new(SessionParts {
            data_dir: config.data_dir.clone(),
            manifest_format: listener.manifest_format(),
            catalogue: catalogue.clone(),
            store: store.clone(),
            identity: identity.clone(),
            membership: membership.clone(),
            links: links.clone(),
            entitlement: entitlement.clone(),
            budgets: budgets.clone(),
            library: library.clone(),
            relay: relay.clone(),
            deliveries: deliveries.clone(),
            runs: runs.clone(),
            quotas: quotas.clone(),
            manifests: manifests.clone(),
            traffic: Default::default(),
            refused_reports: Tally::new("refused a report of a site"),
            unknown: Tally::new(
                "a site connected that is not registered at this hub; it must join again",
            ),
            tasks: tasks.clone(),
            stop: stop.clone(),
        });
        let uploads = Uploads::new(UploadParts {
            catalogue: catalogue.clone(),
            store: store.clone(),
            membership: membership.clone(),
            entitlement: entitlement.clone(),
            budgets: budgets.clone(),
            library,
            deliveries: deliveries.clone(),
            quotas: quotas.clone(),
            manifests: manifests.clone(),
            tasks: tasks.clone(),
            stop: stop.clone(),
        });
        Ok(Self {
            inner: Arc::new(Inner {
                config,
                catalogue,
                store,
                identity,
                listener,
                links,
                membership,
                budgets,
                heard_stored: Mutex::new(Instant::now()),
                deliveries,
                runs,
                relay,
                manifests,
                #[cfg(test)]
                quotas,
                #[cfg(test)]
                entitlement,
                jobs,
                sessions,
                uploads,
                workers,
                tasks,
                stop,
            }),
        })
    }

    /// Starts the hub's background work, and returns when the daemon stops.
    pub async fn run(&self) -> Result<(), Fault> {
        let workers = &self.inner.workers;
        workers.start(
            "connections",
            Pace::Continuous,
            self,
            |this, worker| async move { this.accept_connections(&worker).await },
        );
        workers.start(
            "runs",
            Pace::every(CHANGE_WAIT_MAX),
            &self.inner.runs,
            |runs, worker| async move { runs.keep(&worker).await },
        );
        self.inner.relay.start_workers(workers);
        workers.repeat("event-trim", EVENT_TRIM_EVERY, self, |this| async move {
            let trimmed = this.inner.catalogue.trim_events().await;
            trimmed.map_err(|fault| fault.context("remove old events"))
        });
        workers.repeat("last-seen", HEARD_LOOK_EVERY, self, |this| async move {
            let heard = this.inner.links.look();
            let due = this.inner.heard_stored.lock().elapsed() >= HEARD_STORE_EVERY;
            if due && !heard.is_empty() {
                this.inner.catalogue.sites_heard(&heard).await?;
                *this.inner.heard_stored.lock() = Instant::now();
            }
            Ok(())
        });
        workers.repeat(
            "hub-certificate",
            CERTIFICATE_CHECK_EVERY,
            &self.inner.identity,
            |identity| async move {
                if blocking(move || identity.renew_if_due()).await? {
                    tracing::info!("the hub's certificate was renewed");
                }
                Ok(())
            },
        );
        workers.repeat("idle-release", REST_EVERY, self, |this| async move {
            this.inner.store.rest();
            this.inner.relay.rest();
            Ok(())
        });
        self.inner.stop.cancelled().await;
        Ok(())
    }

    /// The hub's catalogue.
    pub(crate) fn catalogue(&self) -> &Catalogue {
        &self.inner.catalogue
    }

    /// The hub's background work.
    pub fn workers(&self) -> &Workers {
        &self.inner.workers
    }

    /// Accepts sites, publishers and requests to join until the daemon stops.
    async fn accept_connections(&self, worker: &Worker) -> Result<(), Fault> {
        let refused_joins = Tally::new("a join request was refused");
        loop {
            let arrival = tokio::select! {
                arrival = self.inner.listener.accept() => arrival,
                () = self.inner.stop.cancelled() => None,
            };
            if arrival.is_some() {
                worker.count();
            }
            match arrival {
                None => return Ok(()),
                Some(Arrival::Join(request)) => {
                    let (this, refused) = (self.clone(), refused_joins.clone());
                    self.inner.tasks.spawn(async move {
                        let remote = request.remote_address();
                        match request.redeem(&this).await {
                            Ok(who) => tracing::info!(%who, %remote, "joined"),
                            Err(fault) => refused.note(format_args!("{remote}: {fault}")),
                        }
                    });
                }
                Some(Arrival::Publisher { name, link }) if link.is_for_renewal() => {
                    self.serve_renewal(Peer::Publisher(name), link);
                }
                Some(Arrival::Site { name, link, .. }) if link.is_for_renewal() => {
                    self.serve_renewal(Peer::Site(name), link);
                }
                Some(Arrival::Publisher { name, link }) => {
                    let (this, span) = (self.clone(), link.span());
                    let work = async move { this.inner.uploads.welcome(name, link).await };
                    self.inner.tasks.spawn(work.instrument(span));
                }
                Some(Arrival::Site { name, link, .. }) => {
                    let (this, span) = (self.clone(), link.span());
                    let work = async move { this.inner.sessions.welcome(name, link).await };
                    self.inner.tasks.spawn(work.instrument(span));
                }
            }
        }
    }

    /// Serves a peer whose certificate is expired.
    fn serve_renewal(&self, who: Peer, link: Link) {
        let (this, span) = (self.clone(), link.span());
        let work = async move {
            let inner = &this.inner;
            inner
                .membership
                .serve_renewal(&who, &link, &inner.budgets, &inner.stop)
                .await;
        };
        self.inner.tasks.spawn(work.instrument(span));
    }

    /// Closes every connection, and waits for running work.
    pub async fn stopped(&self) {
        self.inner.listener.close();
        self.inner.links.close_all("the hub stops");
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
        self.inner.relay.flush_at_end().await;
        self.inner.listener.wait_idle().await;
    }
}

#[async_trait]
impl Redeemer for Hub {
    async fn redeem(
        &self,
        id: &str,
        secret_hash: &[u8; 32],
        claim: &Claim,
        key_hash: &[u8; 32],
    ) -> Result<(Peer, Serial), Fault> {
        let redeemed = self
            .inner
            .catalogue
            .redeem_token(id, secret_hash, claim, key_hash)
            .await;
        if let Ok((who, serial)) = &redeemed {
            // Earlier certificates are not accepted from here on.
            let why = format!("{who} was enrolled again, with a new certificate");
            self.inner.listener.disconnect(who, Some(serial), &why);
        }
        redeemed
    }
}

/// A hub that lost a part of its state must not begin a new one beside the rest: an empty catalogue
/// would let `gc` free the whole store, and a new CA would lock every site out.
fn refuse_a_part(data_dir: &Path, part: &str, needed: bool, why: &str) -> Result<(), Fault> {
    if !needed || data_dir.join(part).exists() {
        return Ok(());
    }
    Err(Fault::config(format!("{} is missing, and {why}: a part of the hub's state is lost", data_dir.join(part).display())).with_next(
        format!("stop the hub and restore the complete directory {} from a backup; to start with an empty hub, move that directory to another location", data_dir.display()),
    ))
}

fn has_packs(data_dir: &Path) -> bool {
    std::fs::read_dir(data_dir.join("store").join("packs"))
        .is_ok_and(|mut packs| packs.next().is_some())
}

/// Eight bytes of a hash, for sets of content in use. An unused chunk with the same eight bytes as
/// a used one is kept, which has no effect.
fn short(id: ShortHash) -> u64 {
    u64::from_le_bytes([id[0], id[1], id[2], id[3], id[4], id[5], id[6], id[7]])
}

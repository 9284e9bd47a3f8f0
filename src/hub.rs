//! The hub: owns the catalogue and the store, sends each site its desired state, and sends the
//! content that sites request.

mod backend;
mod entitlement;
#[cfg(test)]
mod hostile;
mod jobs;
mod manifest_push;
mod manifests;
mod planning;
mod prefetch;
mod quota;
mod refused;
mod relay;
mod runs;
mod session;
mod sharing;
mod upload;
mod verify;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::Config;
use crate::jobs::Jobs;
use base::blocking::blocking;
use base::budget::{Budget, Share, WorkPlaces};
use base::durable;
use base::expiring_cache::ExpiringCache;
use base::fault::Fault;
use base::limits::{
    CHANGE_WAIT_MAX, CHANGES_AT_ONCE_MAX, CHANGES_PER_SECOND_MAX, CONTROL_FRAME_BYTES_MAX,
    EVENT_TRIM_EVERY, PEER_WORK_MAX, QUESTIONS_BYTES_MAX, REPORTS_AT_ONCE_MAX,
    REPORTS_PER_SECOND_MAX, REST_EVERY,
};
use base::names::{ArtifactRef, PublisherName, SiteName, SiteSelector};
use base::peer::Peer;
use base::tally::Tally;
use base::workers::{Pace, Worker, Workers};
use content::chunk::{Hash, ShortHash};
use content::manifest::{ChunkRef, Digest, Pages};
use content::store::Store;
use exchange::fetch::{Child, Library, Opened, Pieces, nothing_such, pieces};
use exchange::relay::{Of, Relay, Upstream};
use model::protocol::Wanted;
use state::Catalogue;
use transport::identity::{Claim, HubIdentity, Redeemer};
use transport::{Arrival, Link, Listener};

use entitlement::Entitlement;
pub(crate) use runs::lineage_view;

/// Artifacts that stay open for sites that read them.
const OPENED_MAX: usize = 64;
/// The largest part of the budget for one site, in bytes: enough answers to fill a fast connection.
const SITE_SHARE_MAX: u64 = 12 << 20;

/// The hub. Cheap to clone.
#[derive(Clone)]
pub struct Hub {
    inner: Arc<Inner>,
}

struct Inner {
    config: Config,
    catalogue: Catalogue,
    store: Store,
    identity: Arc<HubIdentity>,
    listener: Listener,
    links: Links,
    /// The sites as sources of content.
    upstream: Arc<dyn Upstream>,
    relay: Relay,
    relay_memory: Mutex<relay::Memory>,
    /// Bytes that sites have transmitted for the relay.
    relay_wire: Arc<AtomicU64>,
    opened: Mutex<Vec<Arc<Opened>>>,
    entitlement: Entitlement,
    jobs: Jobs,
    /// Manifests that were checked since the daemon started.
    checked_manifests: Arc<Mutex<manifests::Checked>>,
    /// The bytes that are read for peers and not yet sent.
    budget: Budget,
    /// The bytes of questions that are being answered…
    questions: Budget,
    /// …and of control messages.
    messages: Budget,
    /// The blocking work of each site and publisher.
    work: WorkPlaces,
    /// The reserved quotas of running publishes of sites and publishers.
    reserved: quota::Reserved,
    /// The rate limit for reports…
    reports: quota::RateLimiter,
    /// …and for requests that change something.
    changes: quota::RateLimiter,
    /// The connection of each running upload.
    uploads: Mutex<HashMap<(PublisherName, ArtifactRef), Link>>,
    /// The space in bytes that an upload lacked.
    short_of: Mutex<ExpiringCache<Digest, u64>>,
    /// Held by a running garbage collection. Publishes hold leases of the store instead, and do not
    /// wait for it.
    collecting: Arc<tokio::sync::Mutex<()>>,
    /// Events of training runs are applied one at a time.
    runs: tokio::sync::Mutex<()>,
    workers: Workers,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// The open connections of sites.
type Links = Arc<RwLock<HashMap<SiteName, Connected>>>;

/// A site's connection.
#[derive(Clone)]
struct Connected {
    link: Link,
    cert_der: Arc<Vec<u8>>,
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
        let listener = Listener::bind(
            config.listen.quic,
            identity.clone(),
            &config.line,
            config.limits.memory / 2,
            &workers,
        )?;
        tracing::info!(name = %config.name, line = %listener.local_addr(), api = %config.listen.api, data = %config.data_dir.display(), "the hub is ready");
        let jobs = Jobs::new(catalogue.clone());
        let links = Links::default();
        let relay_wire = Arc::new(AtomicU64::new(0));
        let lines = relay::RelayLinks {
            links: links.clone(),
            catalogue: catalogue.clone(),
            wire: relay_wire.clone(),
            known: Mutex::default(),
        };
        let upstream: Arc<dyn Upstream> = Arc::new(lines);
        let (data, main, sites, room) = (
            config.data_dir.clone(),
            store.clone(),
            upstream.clone(),
            config.relay.budget,
        );
        let kept_by = workers.clone();
        let relay = blocking(move || Relay::open(&data, main, sites, room, &kept_by)).await?;
        let (relay_memory, opened, uploads, short_of, collecting, runs, checked_manifests) =
            Default::default();
        let tasks = TaskTracker::new();
        // Three eighths are for content, and an eighth is for messages. The other half is for the
        // send buffers of connections.
        let budget = Budget::new(config.limits.memory / 8 * 3, SITE_SHARE_MAX);
        let questions = Budget::new(config.limits.memory / 16, QUESTIONS_BYTES_MAX);
        let messages = Budget::new(config.limits.memory / 16, CONTROL_FRAME_BYTES_MAX as u64);
        let work = WorkPlaces::new(PEER_WORK_MAX);
        Ok(Self {
            inner: Arc::new(Inner {
                config,
                catalogue,
                store,
                identity,
                listener,
                links,
                upstream,
                relay,
                relay_memory,
                relay_wire,
                opened,
                entitlement,
                jobs,
                checked_manifests,
                budget,
                questions,
                messages,
                work,
                reserved: Default::default(),
                reports: quota::RateLimiter::new(REPORTS_PER_SECOND_MAX, REPORTS_AT_ONCE_MAX),
                changes: quota::RateLimiter::new(CHANGES_PER_SECOND_MAX, CHANGES_AT_ONCE_MAX),
                uploads,
                short_of,
                collecting,
                runs,
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
            self,
            |this, worker| async move { this.keep_runs(&worker).await },
        );
        self.start_relay_workers(workers);
        workers.repeat("event-trim", EVENT_TRIM_EVERY, self, |this| async move {
            let trimmed = this.inner.catalogue.trim_events().await;
            trimmed.map_err(|fault| fault.context("remove old events"))
        });
        workers.repeat("idle-release", REST_EVERY, self, |this| async move {
            this.inner.store.rest();
            this.inner.relay.rest();
            Ok(())
        });
        self.inner.stop.cancelled().await;
        Ok(())
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
                Some(Arrival::Publisher { name, link }) => {
                    let this = self.clone();
                    self.inner
                        .tasks
                        .spawn(async move { this.welcome_publisher(name, link).await });
                }
                Some(Arrival::Site {
                    name,
                    link,
                    cert_der,
                }) => {
                    let this = self.clone();
                    self.inner
                        .tasks
                        .spawn(async move { this.welcome(name, link, cert_der).await });
                }
            }
        }
    }

    /// Closes every connection, and waits for running work.
    pub async fn stopped(&self) {
        self.inner.listener.close();
        let links: Vec<Link> = self
            .inner
            .links
            .read()
            .values()
            .map(|c| c.link.clone())
            .collect();
        links.iter().for_each(|link| link.close("the hub stops"));
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
        self.flush_relay_at_end().await;
        self.inner.listener.wait_idle().await;
    }

    fn is_online(&self, site: &SiteName) -> bool {
        self.inner.links.read().contains_key(site)
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
    ) -> Result<Peer, Fault> {
        self.inner
            .catalogue
            .redeem_token(id, secret_hash, claim, key_hash)
            .await
    }
}

#[async_trait]
impl Library for Hub {
    async fn open(&self, peer: &Peer, digest: Digest) -> Result<Arc<Opened>, Fault> {
        let inner = &self.inner;
        if !inner.entitlement.may_read_manifest(peer, digest).await? {
            return Err(nothing_such());
        }
        if let Some(opened) = inner.opened.lock().iter().find(|o| o.digest == digest) {
            return Ok(opened.clone());
        }
        let rows = inner.catalogue.all_by_digest(digest).await?;
        let relayed = rows.iter().all(|row| row.origin.is_some());
        let row = rows.into_iter().next().ok_or_else(nothing_such)?;
        let store = inner.store.clone();
        let _place = self.work_place(peer).await;
        let opened = Arc::new(
            blocking(move || Opened::new(digest, row.root, &store))
                .await?
                .relayed(relayed),
        );
        let mut cache = inner.opened.lock();
        if cache.len() >= OPENED_MAX {
            cache.remove(0);
        }
        cache.push(opened.clone());
        Ok(opened)
    }

    async fn may_read_content(&self, peer: &Peer, opened: &Opened) -> Result<bool, Fault> {
        let entitlement = &self.inner.entitlement;
        entitlement.may_read_content(peer, opened.digest).await
    }

    async fn share(&self, peer: &Peer, bytes: u64, priority: i32) -> Result<Share, Fault> {
        self.inner.budget.take(peer, bytes, priority).await
    }

    async fn work_place(&self, peer: &Peer) -> Option<OwnedSemaphorePermit> {
        self.inner.work.take(peer).await
    }

    async fn page(&self, _opened: &Opened, page: Hash) -> Result<Bytes, Fault> {
        let store = self.inner.store.clone();
        blocking(move || store.page(page)).await
    }

    async fn ready(
        &self,
        peer: &Peer,
        opened: &Opened,
        wanted: &Wanted,
        children: &[Child],
    ) -> Result<(), Fault> {
        match relayed_page(opened, wanted) {
            Some(_) => self.inner.relay.ready(peer, opened.digest, children).await,
            None => Ok(()),
        }
    }

    async fn frames(
        &self,
        peer: &Peer,
        opened: &Arc<Opened>,
        wanted: &Wanted,
        children: Vec<Child>,
        priority: i32,
    ) -> Result<Pieces, Fault> {
        if let Some(page) = relayed_page(opened, wanted) {
            self.note_use(opened.digest).await;
            return self
                .inner
                .relay
                .frames(
                    peer,
                    Of {
                        digest: opened.digest,
                        page,
                        priority,
                    },
                    children,
                )
                .await;
        }
        let store = self.inner.store.clone();
        let chunks: Vec<ChunkRef> = children.into_iter().map(|c| c.chunk).collect();
        let _place = self.work_place(peer).await;
        blocking(move || store.read_listed(&chunks))
            .await
            .map(pieces)
    }
}

/// The page of a relayed artifact whose children are requested. The hub always has the root and the
/// pages that it lists.
fn relayed_page(opened: &Opened, wanted: &Wanted) -> Option<Hash> {
    match wanted {
        Wanted::Children { page, .. } if opened.relayed => Some(*page),
        _ => None,
    }
}

/// Refuses to start if a part of the hub's state is lost. A new, empty part would do damage: with
/// an empty catalogue `gc` would remove the whole store, and a new CA would refuse every enrolled
/// site.
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

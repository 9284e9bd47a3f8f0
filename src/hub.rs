//! The hub: keeps the catalogue and the store, tells sites what they should hold, and gives them the bytes.

mod backend;
mod session;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::catalogue::Catalogue;
use crate::chunk::Hash;
use crate::config::Config;
use crate::durable;
use crate::fault::Fault;
use crate::fetch::{Library, Opened, blocking, nothing_such};
use crate::identity::{HubIdentity, Redeemer};
use crate::jobs::Jobs;
use crate::line::{Arrival, Link, Listener};
use crate::manifest::{ChunkRef, Digest, Pages};
use crate::names::SiteName;
use crate::store::Store;
use crate::transfer::BUDGET_UNIT;
use crate::wire::{Peer, Wanted};

pub(crate) use backend::not_in_this_version;

/// Artifacts kept open for sites that read them.
const OPENED_MAX: usize = 64;
/// How long an answer to "may this site read it" is good.
const ENTITLED_FOR: Duration = Duration::from_secs(2);
/// What one site may have of the budget: enough answers to keep a fast line full.
const SITE_SHARE_UNITS: usize = ((12 << 20) / BUDGET_UNIT) as usize;
/// How often buffers that nobody used since are given back.
const REST_EVERY: Duration = Duration::from_secs(5);
/// How often old events are forgotten.
const TRIM_EVERY: Duration = Duration::from_secs(600);

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
    links: RwLock<HashMap<SiteName, Connected>>,
    opened: Mutex<Vec<Arc<Opened>>>,
    entitled: Mutex<HashMap<(SiteName, Digest), Instant>>,
    jobs: Jobs,
    /// The bytes read for sites and not yet sent, in units of [`BUDGET_UNIT`].
    budget: Arc<Semaphore>,
    /// What each site may have of the budget.
    shares: Mutex<HashMap<SiteName, Arc<Semaphore>>>,
    /// Publishes and collections take turns: many may publish, one may collect.
    collecting: Arc<tokio::sync::RwLock<()>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// A site's line.
#[derive(Clone)]
struct Connected {
    link: Link,
    cert_der: Arc<Vec<u8>>,
}

impl Hub {
    /// Opens the hub's state and binds its line.
    pub async fn open(config: Config, stop: CancellationToken) -> Result<Self, Fault> {
        durable::remove_all(&config.data_dir.join("scratch"))?;
        let identity = Arc::new(HubIdentity::open_or_create(&config.data_dir, &config.name)?);
        let catalogue = Catalogue::open(&config.data_dir).await?;
        let dir = config.data_dir.join("store");
        let store = blocking(move || Store::open(&dir)).await?;
        let listener = Listener::bind(config.listen.quic, identity.clone(), &config.line)?;
        tracing::info!(name = %config.name, line = %listener.local_addr(), api = %config.listen.api, data = %config.data_dir.display(), "the hub is ready");
        let jobs = Jobs::new(catalogue.clone());
        let (links, opened, entitled, shares, collecting) = Default::default();
        let tasks = TaskTracker::new();
        // Half of it: what the lines hold to send is the other half.
        let budget = Arc::new(Semaphore::new((config.limits.memory / 2 / BUDGET_UNIT) as usize));
        Ok(Self {
            inner: Arc::new(Inner {
                config,
                catalogue,
                store,
                identity,
                listener,
                links,
                opened,
                entitled,
                jobs,
                budget,
                shares,
                collecting,
                tasks,
                stop,
            }),
        })
    }

    /// Takes sites in until the daemon stops.
    pub async fn run(&self) -> Result<(), Fault> {
        let mut trim = tokio::time::interval(TRIM_EVERY);
        let mut rest = tokio::time::interval(REST_EVERY);
        loop {
            let arrival = tokio::select! {
                arrival = self.inner.listener.accept() => arrival,
                _ = trim.tick() => {
                    if let Err(fault) = self.inner.catalogue.trim_events().await {
                        tracing::warn!(error = %fault, "old events could not be forgotten");
                    }
                    continue;
                }
                _ = rest.tick() => {
                    self.inner.store.rest();
                    continue;
                }
                () = self.inner.stop.cancelled() => None,
            };
            match arrival {
                None => return Ok(()),
                Some(Arrival::Join(request)) => {
                    let this = self.clone();
                    self.inner.tasks.spawn(async move {
                        match request.redeem(&this).await {
                            Ok(site) => tracing::info!(%site, "a site joined"),
                            Err(fault) => tracing::warn!(error = %fault, "a join was refused"),
                        }
                    });
                }
                Some(Arrival::Site { name, link, cert_der }) => {
                    let this = self.clone();
                    self.inner.tasks.spawn(async move { this.welcome(name, link, cert_der).await });
                }
            }
        }
    }

    /// Closes every line and waits for what runs.
    pub async fn stopped(&self) {
        self.inner.listener.close();
        let links: Vec<Link> = self.inner.links.read().values().map(|c| c.link.clone()).collect();
        links.iter().for_each(|link| link.close("the hub stops"));
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
        self.inner.listener.wait_idle().await;
    }

    fn is_online(&self, site: &SiteName) -> bool {
        self.inner.links.read().contains_key(site)
    }
}

#[async_trait]
impl Redeemer for Hub {
    async fn redeem(&self, id: &str, secret_hash: &[u8; 32], site: &SiteName) -> Result<SiteName, Fault> {
        self.inner.catalogue.redeem_token(id, secret_hash, site).await
    }
}

#[async_trait]
impl Library for Hub {
    async fn open(&self, peer: &Peer, digest: Digest) -> Result<Arc<Opened>, Fault> {
        let inner = &self.inner;
        let key = (peer.clone(), digest);
        let fresh = inner.entitled.lock().get(&key).is_some_and(|at| at.elapsed() < ENTITLED_FOR);
        if !fresh {
            if !inner.catalogue.is_entitled(peer, digest).await? {
                return Err(nothing_such());
            }
            let mut entitled = inner.entitled.lock();
            entitled.retain(|_, at| at.elapsed() < ENTITLED_FOR);
            entitled.insert(key, Instant::now());
        }
        if let Some(opened) = inner.opened.lock().iter().find(|o| o.digest == digest) {
            return Ok(opened.clone());
        }
        let row = inner.catalogue.by_digest(digest).await?.ok_or_else(nothing_such)?;
        let store = inner.store.clone();
        let opened = Arc::new(blocking(move || Opened::new(digest, row.root, &store)).await?);
        let mut cache = inner.opened.lock();
        if cache.len() >= OPENED_MAX {
            cache.remove(0);
        }
        cache.push(opened.clone());
        Ok(opened)
    }

    async fn share(&self, peer: &Peer, bytes: u64) -> Result<[OwnedSemaphorePermit; 2], Fault> {
        let units = bytes.div_ceil(BUDGET_UNIT).max(1) as u32;
        let own = self.inner.shares.lock().entry(peer.clone()).or_insert_with(|| Arc::new(Semaphore::new(SITE_SHARE_UNITS))).clone();
        // The site's own share first: a site that takes nothing waits for itself and not in front of the others.
        let own = own.acquire_many_owned(units).await;
        let all = self.inner.budget.clone().acquire_many_owned(units).await;
        match (own, all) {
            (Ok(own), Ok(all)) => Ok([own, all]),
            _ => Err(Fault::internal("the hub stops")),
        }
    }

    async fn page(&self, _opened: &Opened, page: Hash) -> Result<Bytes, Fault> {
        let store = self.inner.store.clone();
        blocking(move || store.page(page)).await
    }

    async fn frames(&self, _opened: &Opened, _wanted: &Wanted, ids: Vec<ChunkRef>) -> Result<Vec<Bytes>, Fault> {
        let store = self.inner.store.clone();
        let ids: Vec<Hash> = ids.into_iter().map(|c| c.id).collect();
        blocking(move || store.read_frames(&ids)).await
    }
}

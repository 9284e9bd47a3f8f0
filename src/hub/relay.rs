//! Artifacts whose content is at sites: which site is asked for it, and what of it the hub keeps
//! for how long.
//!
//! The library calls it for peers that read, and a worker keeps it durable and within its budget.
//! After a crash the relay's store has what its last flush had ([`exchange::relay`]).

mod prefetch;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::entitlement::Entitlement;
use super::links::Links;
use super::manifests::{AllArtifacts, Live, Manifests, mark};
use super::peer_budgets::PeerBudgets;
use super::short;
use crate::config::{self, Config};
use base::blocking::blocking;
use base::buffers::Buffers;
use base::clock;
use base::expiring_cache::ExpiringCache;
use base::fault::Fault;
use base::limits::CHANGE_WAIT_MAX;
use base::names::SiteName;
use base::peer::Peer;
use base::text;
use base::workers::{Pace, Worker, Workers};
use content::chunk::ShortHash;
use content::manifest::Digest;
use content::store::Store;
use exchange::fetch::{Child, Fetcher, Pieces};
use exchange::relay::{Holder, Of, Relay, Sent, TOGETHER_BYTES, Upstream};
use model::protocol::Wanted;
use state::{Catalogue, RelayedArtifact};

/// How often the relay's store is flushed.
const FLUSH_EVERY: Duration = Duration::from_secs(1);
/// How often expired content is evicted, unless it expires sooner.
const EVICT_EVERY: Duration = Duration::from_secs(60);
/// How often while the budget is used up; also the shortest interval.
const EVICT_EVERY_WHEN_FULL: Duration = Duration::from_secs(5);
/// How long the sources of an artifact are cached: they are needed for each request to a site.
const SOURCES_FOR: Duration = Duration::from_secs(1);
/// Several uses within this time are recorded once.
const USED_EVERY: Duration = Duration::from_secs(10);

/// The connections to sites, as sources of the relay.
struct RelayLinks {
    links: Links,
    catalogue: Catalogue,
    wire: Arc<AtomicU64>,
    /// The sites that have an artifact, connected or not, and whether it was published there.
    known: Mutex<ExpiringCache<Digest, Vec<(SiteName, bool)>>>,
}

impl RelayLinks {
    async fn holders(&self, digest: Digest) -> Result<Vec<(SiteName, bool)>, Fault> {
        if let Some(known) = self.known.lock().get(&digest) {
            return Ok(known.clone());
        }
        let found = self.catalogue.sources(digest).await?;
        // An empty result is not cached, so that a transfer that waits for a source sees it at
        // once.
        if !found.is_empty() {
            self.known.lock().put(digest, found.clone(), SOURCES_FOR);
        }
        Ok(found)
    }
}

#[async_trait]
impl Upstream for RelayLinks {
    async fn sources(&self, digest: Digest, but: Option<&SiteName>) -> Result<Vec<Holder>, Fault> {
        let all = self.holders(digest).await?;
        let here = all
            .into_iter()
            .filter(|(site, _)| Some(site) != but && self.links.is_online(site));
        Ok(here.map(|(site, origin)| Holder { site, origin }).collect())
    }

    async fn is_elsewhere(&self, digest: Digest, but: Option<&SiteName>) -> Result<bool, Fault> {
        Ok(self
            .catalogue
            .sources(digest)
            .await?
            .iter()
            .any(|(site, _)| Some(site) != but))
    }

    async fn ask(
        &self,
        source: &SiteName,
        of: Of,
        wants: Vec<Wanted>,
        count: usize,
        buffers: &Buffers,
    ) -> Result<Sent, Fault> {
        let link = self.links.of(source);
        let link =
            link.ok_or_else(|| Fault::unreachable(format!("site {source} is not connected")))?;
        let frames = Fetcher::new(link, of.digest, self.wire.clone())
            .ask(wants, of.priority)
            .await?;
        Ok(stream::unfold(
            (frames, buffers.clone(), count),
            |(mut frames, buffers, left)| async move {
                if left == 0 {
                    return None;
                }
                let some = frames.some(left, TOGETHER_BYTES, &buffers).await;
                let left = some.as_ref().map_or(0, |some| left - some.len());
                Some((some, (frames, buffers, left)))
            },
        )
        .boxed())
    }
}

/// The state of the relay in memory.
#[derive(Default)]
struct Memory {
    /// The artifacts whose use was recorded recently.
    used: ExpiringCache<Digest, ()>,
    /// The artifacts that were prefetched completely.
    whole: HashSet<Digest>,
    /// The failed prefetches: the time of the failure, and the pause.
    failed: HashMap<Digest, (Instant, Duration)>,
}

/// Content whose origin is a site: relays it, keeps it within a budget, and prefetches it. Cheap to
/// clone.
#[derive(Clone)]
pub(super) struct RelayKeeper {
    inner: Arc<Inner>,
}

struct Inner {
    catalogue: Catalogue,
    /// The hub's own store, which holds the manifest pages.
    pages: Store,
    manifests: Manifests,
    links: Links,
    entitlement: Entitlement,
    budgets: Arc<PeerBudgets>,
    /// The sites as sources of bytes.
    upstream: Arc<dyn Upstream>,
    relay: Relay,
    memory: Mutex<Memory>,
    /// Bytes that crossed the connections of sites for the relay.
    wire: Arc<AtomicU64>,
    config: config::Relay,
    /// The hub as a separate peer, in addition to the peers that request content.
    own: Peer,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// What the relay works with.
pub(super) struct RelayParts {
    pub(super) catalogue: Catalogue,
    pub(super) store: Store,
    pub(super) manifests: Manifests,
    pub(super) links: Links,
    pub(super) entitlement: Entitlement,
    pub(super) budgets: Arc<PeerBudgets>,
    pub(super) workers: Workers,
    pub(super) tasks: TaskTracker,
    pub(super) stop: CancellationToken,
}

impl RelayKeeper {
    /// Opens the relay of the hub with this configuration.
    pub(super) async fn open(config: &Config, parts: RelayParts) -> Result<Self, Fault> {
        let wire = Arc::new(AtomicU64::new(0));
        let upstream: Arc<dyn Upstream> = Arc::new(RelayLinks {
            links: parts.links.clone(),
            catalogue: parts.catalogue.clone(),
            wire: wire.clone(),
            known: Mutex::default(),
        });
        let (data, main) = (config.data_dir.clone(), parts.store.clone());
        let (sites, budget) = (upstream.clone(), config.relay.budget);
        let kept_by = parts.workers.clone();
        let relay = blocking(move || Relay::open(&data, main, sites, budget, &kept_by)).await?;
        Ok(Self {
            inner: Arc::new(Inner {
                catalogue: parts.catalogue,
                pages: parts.store,
                manifests: parts.manifests,
                links: parts.links,
                entitlement: parts.entitlement,
                budgets: parts.budgets,
                upstream,
                relay,
                memory: Mutex::default(),
                wire,
                config: config.relay.clone(),
                own: Peer::Hub(config.name.clone()),
                tasks: parts.tasks,
                stop: parts.stop,
            }),
        })
    }

    /// Waits a little for a source of these chunks, if one is needed.
    pub(super) async fn ready(
        &self,
        peer: &Peer,
        digest: Digest,
        children: &[Child],
    ) -> Result<(), Fault> {
        self.inner.relay.ready(peer, digest, children).await
    }

    /// The frames of these chunks, in order, each as soon as it is here.
    pub(super) async fn frames(
        &self,
        peer: &Peer,
        of: Of,
        children: Vec<Child>,
    ) -> Result<Pieces, Fault> {
        self.note_use(of.digest).await;
        self.inner.relay.frames(peer, of, children).await
    }

    /// The relay itself, to read what it keeps.
    pub(super) fn relay(&self) -> &Relay {
        &self.inner.relay
    }

    /// Frees memory that is not used at the moment.
    pub(super) fn rest(&self) {
        self.inner.relay.rest();
    }

    /// A collection ran: what was prefetched may have been in chunks that no artifact named.
    pub(super) fn forget_prefetched(&self) {
        self.inner.memory.lock().whole.clear();
    }

    /// What `doctor` reports of the relay.
    pub(super) fn doctor_line(&self) -> String {
        let (kept, budget) = (self.inner.relay.kept_bytes(), self.inner.config.budget);
        format!(
            "ok relay: the cache of content between sites has {} of at most {}",
            text::size(kept),
            text::size(budget)
        )
    }

    /// Records a use of relayed content: the least recently used artifact is evicted first.
    pub(super) async fn note_use(&self, digest: Digest) {
        {
            let mut memory = self.inner.memory.lock();
            if memory.used.get(&digest).is_some() {
                return;
            }
            memory.used.put(digest, (), USED_EVERY);
        }
        if let Err(fault) = self.inner.catalogue.relay_used(digest).await {
            tracing::warn!(%digest, error = %fault, "the use of relayed content could not be recorded");
        }
    }

    /// Starts the workers that flush and evict relayed content, and that prefetch.
    pub(super) fn start_workers(&self, workers: &Workers) {
        workers.repeat("relay-flush", FLUSH_EVERY, self, |this| async move {
            let relay = this.inner.relay.clone();
            let flushed = blocking(move || relay.flush()).await;
            flushed.map_err(|fault| fault.context("flush relayed content"))
        });
        let evict_every = EVICT_EVERY
            .min(self.inner.config.keep)
            .max(EVICT_EVERY_WHEN_FULL);
        workers.start(
            "relay-evict",
            Pace::every(evict_every).long(),
            self,
            move |this, worker| async move { this.keep_evicting(evict_every, &worker).await },
        );
        workers.start(
            "prefetch",
            Pace::every(CHANGE_WAIT_MAX),
            self,
            |this, worker| async move { this.keep_prefetching(&worker).await },
        );
    }

    /// Flushes relayed content when the daemon stops.
    pub(super) async fn flush_at_end(&self) {
        let relay = self.inner.relay.clone();
        if let Err(fault) = blocking(move || relay.flush()).await {
            tracing::warn!(error = %fault, "relayed content could not be flushed");
        }
    }

    async fn keep_evicting(&self, every: Duration, worker: &Worker) -> Result<(), Fault> {
        let mut last = Instant::now();
        loop {
            tokio::time::sleep(EVICT_EVERY_WHEN_FULL).await;
            if !self.inner.relay.is_full() && last.elapsed() < every {
                continue;
            }
            last = Instant::now();
            // The worker reports a fault, and tries again.
            let _ = worker.iterate(self.evict()).await;
        }
    }

    /// Evicts expired artifacts, and while the budget is used up, the least recently used one.
    pub(super) async fn evict(&self) -> Result<u64, Fault> {
        let keep = self.inner.config.keep.as_millis() as i64;
        let mut freed = 0;
        loop {
            let now = clock::now_ms();
            let mut idle = self
                .inner
                .catalogue
                .relay_kept()
                .await?
                .into_iter()
                .filter(|kept| !kept.pinned && !kept.open)
                .peekable();
            let oldest = idle
                .peek()
                .map(|kept| kept.digest)
                .filter(|_| self.inner.relay.is_full());
            let gone: HashSet<Digest> = idle
                .filter(|kept| kept.used_ms + keep < now)
                .map(|kept| kept.digest)
                .chain(oldest)
                .collect();
            if gone.is_empty() {
                return Ok(freed);
            }
            freed += self.evict_these(&gone).await?;
        }
    }

    pub(super) async fn evict_these(&self, gone: &HashSet<Digest>) -> Result<u64, Fault> {
        let catalogue = &self.inner.catalogue;
        let (pages, manifests) = (self.inner.pages.clone(), self.inner.manifests.clone());
        let all = AllArtifacts::of(catalogue);
        let freed = self
            .inner
            .relay
            .evict(|| async move {
                // No content is added now, so the recorded artifacts are complete. An artifact may
                // have been pinned or transferred since it was selected.
                let kept = catalogue.relay_kept().await?;
                let stays = |k: &RelayedArtifact| !gone.contains(&k.digest) || k.pinned || k.open;
                let stay: Vec<RelayedArtifact> =
                    kept.iter().filter(|k| stays(k)).cloned().collect();
                for left in kept.iter().filter(|k| !stays(k)) {
                    catalogue.relay_evicted(&left.artifact).await?;
                    tracing::info!(artifact = %left.artifact, "relayed content is evicted");
                }
                let live = blocking(move || {
                    let (mut live, mut seen) = (Live::new(), HashSet::new());
                    for RelayedArtifact {
                        artifact, digest, ..
                    } in stay
                    {
                        // Content below an unreadable page is not kept, and is fetched again when
                        // it is requested. Each manifest is reported once.
                        let Some(root) = all.root(digest)? else {
                            continue;
                        };
                        manifests.warn_once(&artifact, digest, &root)?;
                        mark(&root, &pages, &mut seen, &mut live)?;
                    }
                    Ok(live)
                })
                .await?;
                Ok(move |id: ShortHash| live.contains(&short(id)))
            })
            .await?;
        let mut memory = self.inner.memory.lock();
        memory.used = ExpiringCache::default();
        memory.whole.clear();
        Ok(freed)
    }

    /// The metrics of the relay.
    pub(super) fn metrics(&self) -> String {
        let relay = &self.inner.relay;
        let wire = self.inner.wire.load(Ordering::Relaxed);
        format!(
            "# TYPE packhorse_relay_bytes gauge\npackhorse_relay_bytes {}\n\
             # TYPE packhorse_relay_fetched_bytes counter\npackhorse_relay_fetched_bytes {}\n\
             # TYPE packhorse_relay_unkept_bytes counter\npackhorse_relay_unkept_bytes {}\n\
             # TYPE packhorse_relay_wire_bytes counter\npackhorse_relay_wire_bytes {wire}\n",
            relay.kept_bytes(),
            relay.fetched_bytes(),
            relay.unkept_bytes(),
        )
    }
}

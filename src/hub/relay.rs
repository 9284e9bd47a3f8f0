//! Artifacts whose bytes live at sites: who is asked for them, and what is kept of them for how
//! long.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use parking_lot::Mutex;

use super::manifests::{AllArtifacts, Live, fault_of, mark};
use super::{Hub, Links, short};
use base::blocking::blocking;
use base::buffers::Buffers;
use base::clock;
use base::expiring_cache::ExpiringCache;
use base::fault::Fault;
use base::limits::CHANGE_WAIT_MAX;
use base::names::SiteName;
use base::workers::{Pace, Worker, Workers};
use content::chunk::ShortHash;
use content::manifest::Digest;
use exchange::fetch::Fetcher;
use exchange::relay::{Holder, Of, Relay, Sent, TOGETHER_BYTES, Upstream};
use model::protocol::Wanted;
use state::{Catalogue, RelayedArtifact};

/// How often the relay's store is made durable.
const FLUSH_EVERY: Duration = Duration::from_secs(1);
/// How often it is looked for what may go, unless it may go sooner than that.
const EVICT_EVERY: Duration = Duration::from_secs(60);
/// How often while the budget is used up, and how often at the most.
const EVICT_EVERY_WHEN_FULL: Duration = Duration::from_secs(5);
/// So long it is believed where an artifact lies: it is asked for each request that goes to a site.
const SOURCES_FOR: Duration = Duration::from_secs(1);
/// Uses that follow each other sooner are noted once.
const USED_EVERY: Duration = Duration::from_secs(10);

/// The hub's lines, as the relay sees them.
pub(super) struct RelayLinks {
    pub(super) links: Links,
    pub(super) catalogue: Catalogue,
    pub(super) wire: Arc<AtomicU64>,
    /// The sites that hold an artifact, connected or not, and whether it was published there.
    pub(super) known: Mutex<ExpiringCache<Digest, Vec<(SiteName, bool)>>>,
}

impl RelayLinks {
    async fn holders(&self, digest: Digest) -> Result<Vec<(SiteName, bool)>, Fault> {
        if let Some(known) = self.known.lock().get(&digest) {
            return Ok(known.clone());
        }
        let found = self.catalogue.sources(digest).await?;
        // Whoever waits for a source sees it at once.
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
        let links = self.links.read();
        let here = all
            .into_iter()
            .filter(|(site, _)| Some(site) != but && links.contains_key(site));
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
        let link = self.links.read().get(source).map(|c| c.link.clone());
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

/// What of the relay lives as long as the daemon.
#[derive(Default)]
pub(super) struct Memory {
    /// The artifacts whose use was just noted.
    used: ExpiringCache<Digest, ()>,
    /// What was fetched ahead whole.
    pub(super) whole: HashSet<Digest>,
    /// What could not be fetched ahead: when that was, and how long it rests.
    pub(super) failed: HashMap<Digest, (Instant, Duration)>,
}

impl Hub {
    /// Notes that relayed bytes were asked for: the longest unused go first.
    pub(super) async fn note_use(&self, digest: Digest) {
        {
            let mut memory = self.inner.relay_memory.lock();
            if memory.used.get(&digest).is_some() {
                return;
            }
            memory.used.put(digest, (), USED_EVERY);
        }
        if let Err(fault) = self.inner.catalogue.relay_used(digest).await {
            tracing::warn!(%digest, error = %fault, "the use of relayed bytes could not be noted");
        }
    }

    /// Starts the workers that keep relayed content durable and within its budget, and that
    /// prefetch.
    pub(super) fn start_relay_workers(&self, workers: &Workers) {
        workers.repeat("relay-flush", FLUSH_EVERY, self, |this| async move {
            let relay = this.inner.relay.clone();
            let flushed = blocking(move || relay.flush()).await;
            flushed.map_err(|fault| fault.context("make relayed content durable"))
        });
        let evict_every = EVICT_EVERY
            .min(self.inner.config.relay.keep)
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

    /// Makes relayed content durable when the daemon stops.
    pub(super) async fn flush_relay_at_end(&self) {
        let relay = self.inner.relay.clone();
        if let Err(fault) = blocking(move || relay.flush()).await {
            tracing::warn!(error = %fault, "relayed content could not be made durable");
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

    /// Evicts what is too old, and while the budget is used up the longest unused.
    pub(super) async fn evict(&self) -> Result<u64, Fault> {
        let keep = self.inner.config.relay.keep.as_millis() as i64;
        let mut freed = 0;
        loop {
            let now = clock::now_unix_ms() as i64;
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
        let (pages, checked) = (
            self.inner.store.clone(),
            self.inner.checked_manifests.clone(),
        );
        let all = AllArtifacts::of(catalogue);
        let freed = self
            .inner
            .relay
            .evict(|| async move {
                // Nobody puts now, so what is noted as kept is all there is. A pin or a transfer
                // may have come meanwhile.
                let kept = catalogue.relay_kept().await?;
                let stays = |k: &RelayedArtifact| !gone.contains(&k.digest) || k.pinned || k.open;
                let stay: Vec<RelayedArtifact> = kept.iter().filter(|k| stays(k)).cloned().collect();
                for left in kept.iter().filter(|k| !stays(k)) {
                    catalogue.relay_evicted(&left.artifact).await?;
                    tracing::info!(artifact = %left.artifact, "relayed bytes are evicted");
                }
                let live = blocking(move || {
                    let (mut live, mut seen) = (Live::new(), HashSet::new());
                    for RelayedArtifact { artifact, digest, .. } in stay {
                        // What cannot be read is not kept, and is fetched again when it is asked
                        // for. Each is reported once.
                        let Some(root) = all.root(digest)? else { continue };
                        let is_new = !checked.lock().contains_key(&digest);
                        if is_new {
                            let fault = fault_of(&artifact, &root, &pages)?;
                            checked.lock().insert(digest, fault.is_none());
                            if let Some(fault) = fault {
                                tracing::warn!(%artifact, error = %fault, "the manifest of an artifact cannot be used");
                            }
                        }
                        mark(&root, &pages, &mut seen, &mut live)?;
                    }
                    Ok(live)
                })
                .await?;
                Ok(move |id: ShortHash| live.contains(&short(id)))
            })
            .await?;
        let mut memory = self.inner.relay_memory.lock();
        memory.used = ExpiringCache::default();
        memory.whole.clear();
        Ok(freed)
    }

    /// What the metrics say of the relay.
    pub(super) fn relay_metrics(&self) -> String {
        let relay: &Relay = &self.inner.relay;
        let wire = self.inner.relay_wire.load(Ordering::Relaxed);
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

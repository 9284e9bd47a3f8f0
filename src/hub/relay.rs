//! Artifacts whose bytes live at sites: whom they are shared with, who is asked for them, fetching ahead for a site that is
//! away, and what is kept of them for how long.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::{StreamExt, TryStreamExt, stream};
use tokio_util::sync::CancellationToken;

use super::{Hub, Links, short};
use crate::buffers::Buffers;
use crate::catalogue::{Catalogue, Kept, no_artifact};
use crate::chunk::{Hash, ShortHash};
use crate::clock;
use crate::fault::{Code, Fault, Retry};
use crate::fetch::{Child, Fetcher, blocking};
use crate::limits::{FETCH_BATCH_BYTES, FETCH_BATCH_CHUNKS_MAX};
use crate::line::PRIORITY_BULK;
use crate::manifest::{Digest, Root, Step, Walk};
use crate::names::{ArtifactRef, SiteName, SiteSelector};
use crate::relay::{Holder, Of, Relay, Sent, TOGETHER_BYTES, Upstream};
use crate::wire::Wanted;

/// Artifacts that are fetched ahead at once.
const AHEAD_ARTIFACTS_MAX: usize = 2;
/// Requests on the way for one of them.
const AHEAD_IN_FLIGHT_MAX: usize = 8;
/// Requests that wait for their turn.
const AHEAD_QUEUED_MAX: usize = 8;
/// The pause before what could not be fetched ahead is tried again.
const AHEAD_AGAIN: Duration = Duration::from_secs(60);
/// How often the relay's store is made durable.
const FLUSH_EVERY: Duration = Duration::from_secs(1);
/// How often it is looked for what may go, unless it may go sooner than that.
const EVICT_EVERY: Duration = Duration::from_secs(60);
/// How often while the budget is used up, and how often at the most.
const EVICT_EVERY_WHEN_FULL: Duration = Duration::from_secs(5);
/// Uses that follow each other sooner are noted once.
const USED_EVERY: Duration = Duration::from_secs(10);

/// The hub's lines, as the relay sees them.
pub(super) struct Lines {
    pub(super) links: Links,
    pub(super) catalogue: Catalogue,
    pub(super) wire: Arc<AtomicU64>,
}

#[async_trait]
impl Upstream for Lines {
    async fn sources(&self, digest: Digest, but: Option<&SiteName>) -> Result<Vec<Holder>, Fault> {
        let all = self.catalogue.sources(digest).await?;
        let links = self.links.read();
        let here = all.into_iter().filter(|(site, _)| Some(site) != but && links.contains_key(site));
        Ok(here.map(|(site, origin)| Holder { site, origin }).collect())
    }

    async fn is_elsewhere(&self, digest: Digest, but: Option<&SiteName>) -> Result<bool, Fault> {
        Ok(self.catalogue.sources(digest).await?.iter().any(|(site, _)| Some(site) != but))
    }

    async fn ask(&self, source: &SiteName, of: Of, wants: Vec<Wanted>, count: usize, buffers: &Buffers) -> Result<Sent, Fault> {
        let link = self.links.read().get(source).map(|c| c.link.clone());
        let link = link.ok_or_else(|| Fault::unreachable(format!("site {source} is not connected")))?;
        let frames = Fetcher::new(link, of.digest, self.wire.clone()).ask(wants, of.priority).await?;
        Ok(stream::unfold((frames, buffers.clone(), count), |(mut frames, buffers, left)| async move {
            if left == 0 {
                return None;
            }
            let some = frames.some(left, TOGETHER_BYTES, &buffers).await;
            let left = some.as_ref().map_or(0, |some| left - some.len());
            Some((some, (frames, buffers, left)))
        })
        .boxed())
    }
}

/// What of the relay lives as long as the daemon.
#[derive(Default)]
pub(super) struct Memory {
    /// When the use of an artifact was last noted.
    used: HashMap<Digest, Instant>,
    /// What was fetched ahead whole.
    whole: HashSet<Digest>,
    /// What could not be fetched ahead, and when.
    failed: HashMap<Digest, Instant>,
}

impl Hub {
    /// Of these sites those that may have an artifact by the hub's policy and by what its origin says. A site named outright that
    /// may not gets the answer for what does not exist.
    pub(super) async fn shared_with(
        &self,
        artifact: &ArtifactRef,
        origin: Option<&SiteName>,
        sites: &[SiteName],
        by: &SiteSelector,
    ) -> Result<Vec<SiteName>, Fault> {
        let Some(origin) = origin else { return Ok(sites.to_vec()) };
        let named = matches!(by, SiteSelector::Names(_));
        let mut out = Vec::new();
        for site in sites {
            let allowed = self.inner.catalogue.shares_with(origin, site).await?;
            if !allowed && named {
                return Err(no_artifact(artifact));
            }
            // "All" means all others.
            if allowed && (named || site != origin) {
                out.push(site.clone());
            }
        }
        if out.is_empty() { Err(no_artifact(artifact)) } else { Ok(out) }
    }

    /// Notes that relayed bytes were asked for: the longest unused go first.
    pub(super) async fn note_use(&self, digest: Digest) {
        {
            let mut memory = self.inner.relay_memory.lock();
            if memory.used.get(&digest).is_some_and(|at| at.elapsed() < USED_EVERY) {
                return;
            }
            memory.used.retain(|_, at| at.elapsed() < USED_EVERY);
            memory.used.insert(digest, Instant::now());
        }
        if let Err(fault) = self.inner.catalogue.relay_used(digest).await {
            tracing::warn!(%digest, error = %fault, "the use of relayed bytes could not be noted");
        }
    }

    /// Keeps what was relayed durable and within its budget, and fetches ahead, until the daemon stops.
    pub(super) async fn keep_relay(&self) {
        tokio::select! {
            () = self.keep_flushing() => {}
            () = self.keep_evicting() => {}
            () = self.keep_fetching_ahead() => {}
            () = self.inner.stop.cancelled() => {}
        }
        let relay = self.inner.relay.clone();
        if let Err(fault) = blocking(move || relay.flush()).await {
            tracing::warn!(error = %fault, "relayed bytes could not be made durable");
        }
    }

    async fn keep_flushing(&self) {
        let mut ticks = tokio::time::interval(FLUSH_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let relay = self.inner.relay.clone();
            if let Err(fault) = blocking(move || relay.flush()).await {
                tracing::error!(error = %fault, "relayed bytes could not be made durable");
            }
        }
    }

    async fn keep_evicting(&self) {
        let every = EVICT_EVERY.min(self.inner.config.relay.keep).max(EVICT_EVERY_WHEN_FULL);
        let mut last = Instant::now();
        loop {
            tokio::time::sleep(EVICT_EVERY_WHEN_FULL).await;
            if !self.inner.relay.is_full() && last.elapsed() < every {
                continue;
            }
            last = Instant::now();
            if let Err(fault) = self.evict().await {
                tracing::error!(error = %fault, "relayed bytes could not be evicted");
            }
        }
    }

    /// Evicts what is too old, and while the budget is used up the longest unused.
    pub(super) async fn evict(&self) -> Result<u64, Fault> {
        let keep = self.inner.config.relay.keep.as_millis() as i64;
        let mut freed = 0;
        loop {
            let now = clock::now_unix_ms() as i64;
            let mut idle = self.inner.catalogue.relay_kept().await?.into_iter().filter(|kept| !kept.pinned && !kept.open).peekable();
            let oldest = idle.peek().map(|kept| kept.digest).filter(|_| self.inner.relay.is_full());
            let gone: HashSet<Digest> = idle.filter(|kept| kept.used_ms + keep < now).map(|kept| kept.digest).chain(oldest).collect();
            if gone.is_empty() {
                return Ok(freed);
            }
            freed += self.evict_these(&gone).await?;
        }
    }

    async fn evict_these(&self, gone: &HashSet<Digest>) -> Result<u64, Fault> {
        let catalogue = &self.inner.catalogue;
        let pages = self.inner.store.clone();
        let freed = self
            .inner
            .relay
            .evict(|| async move {
                // Nobody puts now, so what is noted as kept is all there is. A pin or a transfer may have come meanwhile.
                let kept = catalogue.relay_kept().await?;
                let stays = |k: &Kept| !gone.contains(&k.digest) || k.pinned || k.open;
                let stay: Vec<Root> = kept.iter().filter(|k| stays(k)).map(|k| k.root.clone()).collect();
                for left in kept.iter().filter(|k| !stays(k)) {
                    catalogue.relay_evicted(&left.artifact).await?;
                    tracing::info!(artifact = %left.artifact, "relayed bytes are evicted");
                }
                let live = blocking(move || {
                    let mut live: HashSet<u64> = HashSet::new();
                    for root in stay {
                        for step in Walk::new(&root, &pages) {
                            if let Step::Chunk(chunk, _) = step? {
                                live.insert(short(chunk.id.short()));
                            }
                        }
                    }
                    Ok(live)
                })
                .await?;
                Ok(move |id: ShortHash| live.contains(&short(id)))
            })
            .await?;
        let mut memory = self.inner.relay_memory.lock();
        memory.used.clear();
        memory.whole.clear();
        Ok(freed)
    }

    /// Fetches what is on its way to sites that are away from sites that are there.
    async fn keep_fetching_ahead(&self) {
        let mut running: HashMap<Digest, (CancellationToken, tokio::task::JoinHandle<()>)> = HashMap::new();
        loop {
            let changed = self.inner.catalogue.changed();
            running.retain(|_, (_, task)| !task.is_finished());
            match self.wanted_ahead().await {
                Ok(wanted) => {
                    for (digest, (stop, _)) in &running {
                        if !wanted.contains(digest) {
                            stop.cancel();
                        }
                    }
                    for digest in wanted {
                        if running.len() < AHEAD_ARTIFACTS_MAX && !running.contains_key(&digest) {
                            let (this, stop) = (self.clone(), self.inner.stop.child_token());
                            let token = stop.clone();
                            let task = self.inner.tasks.spawn(async move { this.fetch_ahead(digest, &token).await });
                            running.insert(digest, (stop, task));
                        }
                    }
                }
                Err(fault) => tracing::error!(error = %fault, "it could not be worked out what to fetch ahead"),
            }
            // It ends after a while too: what failed gets its next try however quiet the catalogue is.
            changed.await;
        }
    }

    /// What should be fetched ahead now: every target is away, a source is there, and there is room.
    async fn wanted_ahead(&self) -> Result<Vec<Digest>, Fault> {
        if self.inner.relay.is_full() {
            return Ok(Vec::new());
        }
        let open = self.inner.catalogue.relayed_open().await?;
        // Whoever is there asks for what he lacks, which is less than all of it.
        let served: HashSet<Digest> = open.iter().filter(|(_, site)| self.is_online(site)).map(|(digest, _)| *digest).collect();
        let mut out = Vec::new();
        for (digest, _) in open {
            let skip = {
                let mut memory = self.inner.relay_memory.lock();
                memory.failed.retain(|_, at| at.elapsed() < AHEAD_AGAIN);
                memory.whole.contains(&digest) || memory.failed.contains_key(&digest)
            };
            if !skip && !served.contains(&digest) && !out.contains(&digest) && !self.inner.upstream.sources(digest, None).await?.is_empty()
            {
                out.push(digest);
            }
        }
        Ok(out)
    }

    async fn fetch_ahead(&self, digest: Digest, stop: &CancellationToken) {
        tracing::info!(%digest, "fetching ahead for a site that is away");
        let result = tokio::select! {
            result = self.fetch_whole(digest) => result,
            () = stop.cancelled() => return,
        };
        let mut memory = self.inner.relay_memory.lock();
        match result {
            Ok(true) => {
                memory.whole.insert(digest);
                tracing::info!(%digest, "fetched ahead");
            }
            Ok(false) => tracing::info!(%digest, "fetching ahead waits for room"),
            Err(fault) => {
                tracing::warn!(%digest, error = %fault, "it could not be fetched ahead");
                // A source that is away says so when it is back; all else would be tried in vain at every change.
                if fault.retry == Retry::Never || fault.code == Code::NoSpace {
                    memory.failed.insert(digest, Instant::now());
                }
            }
        }
    }

    /// Brings all of an artifact into the relay's store; `false` when there is no room for it.
    async fn fetch_whole(&self, digest: Digest) -> Result<bool, Fault> {
        let inner = &self.inner;
        let Some(row) = inner.catalogue.by_digest(digest).await? else { return Ok(true) };
        self.note_use(digest).await;
        let (send, receive) = tokio::sync::mpsc::channel::<Result<(Hash, Vec<Child>), Fault>>(AHEAD_QUEUED_MAX);
        let (relay, pages) = (inner.relay.clone(), inner.store.clone());
        let walking = tokio::task::spawn_blocking(move || {
            if let Err(fault) = list_lacking(&row.root, &pages, &relay, &send) {
                let _ = send.blocking_send(Err(fault));
            }
        });
        let requests = stream::unfold(receive, |mut receive| async move { receive.recv().await.map(|request| (request, receive)) });
        let fetched = requests
            .map(Ok)
            .try_for_each_concurrent(AHEAD_IN_FLIGHT_MAX, |request: Result<(Hash, Vec<Child>), Fault>| async move {
                let (page, children) = request?;
                if inner.relay.is_full() {
                    return Err(Fault::no_space("the relay's budget is used up"));
                }
                let bytes: u64 = children.iter().map(|c| u64::from(c.chunk.len)).sum();
                // As a peer of its own, beside those that ask.
                let _share = inner.budget.take(&inner.config.name, bytes, 0).await?;
                let unkept = inner.relay.unkept_bytes();
                inner.relay.bring(Of { digest, page, priority: PRIORITY_BULK }, children).await?;
                if inner.relay.unkept_bytes() != unkept {
                    return Err(Fault::no_space("the hub's disk takes no more relayed bytes"));
                }
                Ok(())
            })
            .await;
        let _ = walking.await;
        match fetched {
            Ok(()) => Ok(true),
            Err(_) if inner.relay.is_full() => Ok(false),
            Err(fault) => Err(fault),
        }
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

/// Lists what is lacking of an artifact, in requests of about [`FETCH_BATCH_BYTES`]. Ends early when nobody listens.
fn list_lacking(
    root: &Root,
    pages: &crate::store::Store,
    relay: &Relay,
    send: &tokio::sync::mpsc::Sender<Result<(Hash, Vec<Child>), Fault>>,
) -> Result<(), Fault> {
    let (mut page, mut children, mut bytes) = (None, Vec::new(), 0);
    let flush = |page: Option<Hash>, children: &mut Vec<Child>| -> Result<bool, Fault> {
        let lacking = relay.lacking(&std::mem::take(children))?;
        let Some(page) = page.filter(|_| !lacking.is_empty()) else { return Ok(true) };
        Ok(send.blocking_send(Ok((page, lacking))).is_ok())
    };
    for step in Walk::new(root, pages) {
        let Step::Chunk(chunk, spot) = step? else { continue };
        if page.is_some_and(|p| p != spot.page) || bytes >= FETCH_BATCH_BYTES || children.len() >= FETCH_BATCH_CHUNKS_MAX {
            if !flush(page, &mut children)? {
                return Ok(());
            }
            bytes = 0;
        }
        page = Some(spot.page);
        bytes += u64::from(chunk.len);
        children.push(Child { index: spot.index, chunk });
    }
    flush(page, &mut children).map(|_| ())
}

//! Publishing from another machine: the publisher's connection at the hub, over which the hub
//! fetches the content that it lacks.
//!
//! A publisher reads its source in place and sends the digest of the artifact ([`AskHub::Upload`]).
//! The hub then fetches over the same connection: the root, the pages, and of the chunks only those
//! that its store lacks. Each chunk is verified before it is stored. The store is flushed with
//! every group commit. So after a kill of either side, the next attempt does not send stored
//! content again. The artifact enters the catalogue only when all its content is durable.
//!
//! A publisher may do nothing else: it cannot read artifacts, cannot deliver artifacts of others,
//! and is not a site. Its join token may limit the names that it publishes under and the sites that it
//! delivers to ([`model::publisher_scope`]).

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use super::answers::{self, verb_of};
use super::deliveries::Deliveries;
use super::entitlement::Entitlement;
use super::library::HubLibrary;
use super::manifests::Manifests;
use super::membership::Membership;
use super::peer_budgets::PeerBudgets;
use super::quota::QuotaLedger;
use crate::api::types::Published;
use base::blocking::{Stop, blocking, cancellable};
use base::expiring_cache::ExpiringCache;
use base::fault::{Code, Fault};
use base::limits::{
    COMMIT_BYTES, COMMIT_EVERY, FETCH_BATCH_BYTES, FETCH_BATCH_CHUNKS_MAX, FETCH_IN_FLIGHT_MAX,
    MANIFEST_IDLE_MAX, SILENCE_MAX,
};
use base::names::{ArtifactRef, PublisherName, SiteSelector};
use base::omitted::Omitted;
use base::peer::Peer;
use content::bloom::BloomFilter;
use content::chunk::Hash;
use content::frame::HEADER_BYTES;
use content::manifest::{ChunkRef, Digest, Root, Step, Until, Walk};
use content::store::Store;
use exchange::fetch::{self, Fetcher, Ranges};
use exchange::wire;
use model::actor::Actor;
use model::policy::{self, Object, Refusal, Verb};
use model::protocol::{AskHub, CONTROL, FETCH, QUESTION, Wanted};
use state::Catalogue;
use transport::{Link, PRIORITY_BULK, RecvHalf, SendHalf};

/// Streams of one publisher's connection that are answered at once.
const STREAMS_MAX: usize = 8;
/// Batches that are planned in advance of the running requests.
const BATCHES_AHEAD_MAX: usize = 8;
/// Chunks that are looked up in one call.
const LOOKED_UP_TOGETHER: usize = 1024;
/// Remembered requested chunks, so that a chunk that occurs twice is requested once: as many as can
/// be in flight or planned.
const ASKED_KEPT: usize = FETCH_BATCH_CHUNKS_MAX * (FETCH_IN_FLIGHT_MAX + BATCHES_AHEAD_MAX + 2);

/// How long the hub remembers, without another attempt, how much space an artifact lacked.
const SHORT_FOR: Duration = Duration::from_secs(600);

/// The content of one request.
#[derive(Default)]
struct Batch {
    wants: Vec<(Hash, Ranges)>,
    chunks: Vec<ChunkRef>,
    bytes: u64,
}

/// The connections of the publishers. Cheap to clone.
#[derive(Clone)]
pub(super) struct Uploads {
    inner: Arc<Inner>,
}

struct Inner {
    parts: UploadParts,
    /// Over which connection a publisher sends what.
    running: Mutex<HashMap<(PublisherName, ArtifactRef), Link>>,
    /// The bytes that an upload was found to have no room for.
    short_of: Mutex<ExpiringCache<Digest, u64>>,
}

/// What the uploads work with.
pub(super) struct UploadParts {
    pub(super) catalogue: Catalogue,
    pub(super) store: Store,
    pub(super) membership: Membership,
    pub(super) entitlement: Entitlement,
    pub(super) budgets: Arc<PeerBudgets>,
    pub(super) library: HubLibrary,
    pub(super) deliveries: Deliveries,
    pub(super) quotas: QuotaLedger,
    pub(super) manifests: Manifests,
    pub(super) tasks: TaskTracker,
    pub(super) stop: CancellationToken,
}

impl Uploads {
    /// Serves no publisher yet.
    pub(super) fn new(parts: UploadParts) -> Self {
        Self {
            inner: Arc::new(Inner {
                parts,
                running: Mutex::default(),
                short_of: Mutex::default(),
            }),
        }
    }

    fn parts(&self) -> &UploadParts {
        &self.inner.parts
    }

    /// What a test serves to another hub.
    #[cfg(test)]
    pub(super) fn library(&self) -> &HubLibrary {
        &self.parts().library
    }

    /// Serves a publisher until its connection ends.
    pub(super) async fn welcome(&self, name: PublisherName, link: Link) {
        let _seats = self.parts().budgets.seats();
        let streams = Arc::new(Semaphore::new(STREAMS_MAX));
        loop {
            let stream = tokio::select! {
                stream = link.accept() => stream,
                () = self.parts().stop.cancelled() => None,
            };
            let Some((send, recv)) = stream else { break };
            let Ok(turn) = streams.clone().acquire_owned().await else {
                break;
            };
            let (this, name, link) = (self.clone(), name.clone(), link.clone());
            let work = async move {
                if let Err(fault) = this.stream(send, recv, &link, &name).await {
                    tracing::debug!(error = %fault, "a stream ended");
                }
                drop(turn);
            };
            self.parts().tasks.spawn(work.in_current_span());
        }
        link.close("the hub stops");
    }

    async fn stream(
        &self,
        mut send: SendHalf,
        mut recv: RecvHalf,
        link: &Link,
        name: &PublisherName,
    ) -> Result<(), Fault> {
        let peer = Peer::Publisher(name.clone());
        let actor = Actor::from(&peer);
        let mut kind = [0];
        let read = timeout(SILENCE_MAX, recv.read_exact(&mut kind)).await;
        read.map_err(|_| Fault::unreachable("the peer opened a stream and sent nothing"))??;
        match kind[0] {
            QUESTION => {}
            FETCH => {
                fetch::serve(send, recv, link, &peer, &self.parts().library).await;
                return Ok(());
            }
            CONTROL => {
                return policy::may(&actor, Verb::Control, &Object::Daemon).map_err(Into::into);
            }
            other => return Err(Fault::integrity(format!("a stream of kind {other}"))),
        }
        self.parts().budgets.change(&peer).await;
        let (question, share) =
            wire::receive_question(&mut recv, self.parts().budgets.questions(), &peer).await?;
        // A publisher that was removed may still have its certificate.
        self.parts().catalogue.publisher_seen(name).await?;
        let may = self
            .parts()
            .membership
            .may_enter(&peer, link)
            .await?
            // Another process of this publisher may have renewed its certificate since this
            // connection was opened.
            .or_else(|refusal| match refusal {
                Refusal::Superseded => Ok(()),
                refusal => Err(refusal),
            })
            .and_then(|()| policy::may(&actor, verb_of(&question), &Object::Daemon));
        let answer = match (may, question) {
            (Err(Refusal::Unknown), _) => {
                Err(Fault::not_allowed(format!("the publisher {name} is not registered at the hub"))
                    .with_next("at the hub: packhorse token create --publisher NAME; then publish again with --join-token TOKEN"))
            }
            (Err(refusal), _) => Err(refusal.into()),
            (Ok(()), AskHub::Upload { artifact, digest, to, omitted }) => {
                let key = (name.clone(), artifact.clone());
                let before = self.inner.running.lock().insert(key.clone(), link.clone());
                if let Some(before) = before.filter(|before| before != link) {
                    // The connection of a killed process of this publisher: its share of the budget
                    // would delay this one.
                    before.close("the publisher started a new upload");
                }
                let answer = tokio::select! {
                    answer = self.take_upload(name, link, artifact, digest, to.as_ref(), &omitted) => answer.map_err(of_the_hub),
                    _ = link.closed() => Err(Fault::unreachable("the publisher's connection ended")),
                    () = self.parts().stop.cancelled() => Err(Fault::unreachable("the hub stops")),
                };
                let mut uploads = self.inner.running.lock();
                if uploads.get(&key) == Some(link) {
                    uploads.remove(&key);
                }
                answer
            }
            (Ok(()), AskHub::Renew { request }) => {
                self.parts().membership.renew(&peer, link, request.as_str()).await
            }
            (Ok(()), _) => Err(Fault::internal("a publisher's question has no answer")),
        };
        if let Err(fault) = self.flush_uploaded().await {
            tracing::error!(error = %fault, "the store cannot be flushed");
        }
        drop(share);
        answers::send(&self.parts().budgets, &mut send, &peer, answer).await
    }

    /// Flushes the store, so that the received content is kept even if the upload failed.
    async fn flush_uploaded(&self) -> Result<(), Fault> {
        let store = self.parts().store.clone();
        blocking(move || store.flush()).await
    }

    async fn take_upload(
        &self,
        publisher: &PublisherName,
        link: &Link,
        artifact: ArtifactRef,
        digest: Digest,
        to: Option<&SiteSelector>,
        omitted: &Omitted,
    ) -> Result<serde_json::Value, Fault> {
        let inner = self.parts();
        let peer = Peer::Publisher(publisher.clone());
        let actor = Actor::from(&peer);
        // All checks that can refuse the upload come before the first byte is fetched.
        let scope = inner.catalogue.publisher_scope(publisher).await?;
        let scope = &scope.unwrap_or_default();
        let artifact_of_scope = Object::Upload {
            artifact: &artifact,
            scope,
        };
        policy::may(&actor, Verb::Upload, &artifact_of_scope)?;
        if let Some(to) = to {
            for site in inner.catalogue.select_sites(to).await? {
                let row = inner.catalogue.site(site.as_str()).await?;
                let labels = &row.map(|row| row.labels).unwrap_or_default();
                let target = Object::UploadTo {
                    site: &site,
                    labels,
                    scope,
                };
                policy::may(&actor, Verb::Deliver, &target)?;
            }
        }
        let fetcher = Fetcher::new(link.clone(), digest, Arc::default());
        let manifest = fetcher.clone().with_idle_max(MANIFEST_IDLE_MAX);
        // The threads of the upload hold it too: they may end after the upload.
        let offer = Arc::new(inner.budgets.offer(&peer).await);
        let root = manifest.root().await?;
        if root.kind != artifact.kind {
            return Err(Fault::integrity(format!(
                "{artifact} has the manifest of {}",
                root.kind.with_article()
            )));
        }
        if let Ok(row) = inner.catalogue.artifact(&artifact).await
            && row.digest != digest
        {
            // Returns the conflict with its usual text.
            let taken = inner.catalogue.add_artifact(&artifact, &root, None).await;
            inner
                .entitlement
                .hide_taken(&actor, &artifact, digest, taken)
                .await?;
        }
        let reserved = inner.quotas.reserve(&peer, &artifact, &root).await?;
        // Until the artifact is in the catalogue, no garbage collection removes content that the
        // upload found or stored.
        let store = inner.store.leased_with(reserved.clone());
        let losses = store.losses();
        manifest.pages(&root, None, &store).await?;
        let places = inner.budgets.check(&peer).await;
        inner.manifests.check(&artifact, &root, places).await?;
        let stored = self.pull(&peer, &fetcher, &root, &store, &offer).await?;
        let flushed = store.clone();
        blocking(move || flushed.flush_since(losses)).await?;
        let added = inner.library.register(None, &artifact, &root).await;
        let added = inner
            .entitlement
            .hide_taken(&actor, &artifact, digest, added)
            .await?;
        reserved.finish();
        inner.catalogue.set_omitted(&artifact, omitted).await?;
        if added {
            inner.catalogue.set_publisher(&artifact, publisher).await?;
        }
        drop(store);
        let transfers = match to {
            Some(to) => {
                inner
                    .deliveries
                    .deliver(&actor, std::slice::from_ref(&artifact), to, true)
                    .await?
                    .transfers
            }
            None => Vec::new(),
        };
        let bytes = root.totals.bytes;
        tracing::info!(%artifact, %digest, bytes, stored, "published from another machine");
        let (artifact, digest) = (artifact.to_string(), digest.hex());
        let published = Published {
            artifact,
            digest,
            transfers,
            bytes,
            stored,
            unchanged: !added,
            note: None,
            omitted: omitted.list(),
        };
        serde_json::to_value(published).map_err(|e| Fault::internal(e.to_string()))
    }

    /// Fetches every chunk that the store, which holds a lease, lacks. Returns the number of stored
    /// bytes.
    async fn pull(
        &self,
        publisher: &Peer,
        fetcher: &Fetcher,
        root: &Root,
        store: &Store,
        offer: &Arc<Option<OwnedSemaphorePermit>>,
    ) -> Result<u64, Fault> {
        let (send, batches) = mpsc::channel(BATCHES_AHEAD_MAX);
        // A publisher repeats its request until there is space. Content that is fetched before
        // would use space without need.
        let short_of = self.inner.short_of.lock().get(&root.digest()).copied();
        if let Some(bytes) = short_of {
            self.check_room_for(bytes).await?;
        }
        self.inner.short_of.lock().forget(&root.digest());
        let lacking = self.lacking_where_room_is_short(root, offer).await?;
        let (planned, packs, offer) = (root.clone(), store.clone(), offer.clone());
        let stop = Stop::default();
        let _ended = stop.when_dropped();
        let planning = base::blocking::spawn(move || {
            let _offer = offer;
            // Without space, further content cannot be stored.
            plan(&planned, &packs, &stop, |batch| {
                packs
                    .check_room()
                    .map(|()| send.blocking_send(batch).is_ok())
            })
        });
        let batches = futures::stream::unfold(batches, |mut batches| async move {
            Some((batches.recv().await?, batches))
        });
        let fetch_batch = |batch| self.fetch_batch(publisher, fetcher, batch, store.clone());
        let running = batches
            .map(fetch_batch)
            .buffer_unordered(FETCH_IN_FLIGHT_MAX);
        tokio::pin!(running);
        let (mut fetched, mut stored, mut unflushed, mut flushed) = (0, 0, 0, Instant::now());
        let mut flushing: Option<tokio::task::JoinHandle<Result<(), Fault>>> = None;
        while let Some(bytes) = running.next().await {
            let (raw, bytes) = bytes?;
            fetched += raw;
            stored += bytes;
            unflushed += bytes;
            // From an eighth of the content on, its compression ratio is known. The result is
            // reported before half of the content has arrived.
            if let Some(lacking) =
                lacking.filter(|lacking| (lacking / 8..lacking / 2).contains(&fetched))
            {
                let rest = (u128::from(lacking - fetched) * u128::from(stored)
                    / u128::from(fetched.max(1))) as u64;
                self.check_room_for(rest).await.inspect_err(|_| {
                    self.inner
                        .short_of
                        .lock()
                        .put(root.digest(), rest, SHORT_FOR);
                })?;
            }
            // Concurrently with the fetches: the connection does not wait for the disk's sync.
            if (unflushed >= COMMIT_BYTES || flushed.elapsed() >= COMMIT_EVERY)
                && flushing.as_ref().is_none_or(|f| f.is_finished())
            {
                let store = self.parts().store.clone();
                let before = flushing.replace(base::blocking::spawn(move || store.flush()));
                if let Some(before) = before {
                    before
                        .await
                        .map_err(|e| Fault::internal(format!("a flush ended: {e}")))??;
                }
                (unflushed, flushed) = (0, Instant::now());
            }
        }
        planning
            .await
            .map_err(|e| Fault::internal(format!("planning ended: {e}")))??;
        if let Some(last) = flushing {
            last.await
                .map_err(|e| Fault::internal(format!("a flush ended: {e}")))??;
        }
        Ok(stored)
    }

    /// Fails if the disk of the store has no space for so many bytes.
    async fn check_room_for(&self, bytes: u64) -> Result<(), Fault> {
        let store = self.parts().store.clone();
        blocking(move || store.check_room_for(bytes)).await
    }

    /// The bytes of an artifact that the store lacks. `None`: the whole artifact would fit on its
    /// disk, so they were not counted.
    async fn lacking_where_room_is_short(
        &self,
        root: &Root,
        offer: &Arc<Option<OwnedSemaphorePermit>>,
    ) -> Result<Option<u64>, Fault> {
        let (store, root) = (self.parts().store.clone(), root.clone());
        if self.check_room_for(root.totals.bytes).await.is_ok() {
            return Ok(None);
        }
        let count = cancellable(offer.clone(), move |stop| {
            let (mut lacking, mut seen) = (0, BloomFilter::default());
            plan(&root, &store, stop, |batch| {
                lacking += batch
                    .chunks
                    .iter()
                    .filter(|chunk| seen.is_new(&chunk.id))
                    .map(|chunk| u64::from(chunk.len))
                    .sum::<u64>();
                Ok(true)
            })?;
            Ok(Some(lacking))
        });
        count.await
    }

    /// Fetches one batch into the store. Returns its size, and the number of stored bytes.
    async fn fetch_batch(
        &self,
        publisher: &Peer,
        fetcher: &Fetcher,
        batch: Batch,
        store: Store,
    ) -> Result<(u64, u64), Fault> {
        // Bytes in flight hold a share of the daemon's budget, from the publisher's part.
        let share = self
            .parts()
            .budgets
            .content(publisher, batch.bytes, PRIORITY_BULK)
            .await?;
        let wants = batch
            .wants
            .into_iter()
            .map(|(page, ranges)| Wanted::Children {
                page,
                ranges: ranges.0,
            })
            .collect();
        let mut frames = fetcher.ask(wants, 0).await?;
        let mut received = Vec::with_capacity(batch.chunks.len());
        for chunk in batch.chunks {
            let frame = frames.next().await?;
            // Checked immediately: the whole batch is held in memory, and the share covers only the
            // sizes in the manifest.
            if frame.raw_len() != chunk.len || frame.len() > HEADER_BYTES + chunk.len as usize {
                return Err(Fault::integrity(format!(
                    "the size of chunk {} from {publisher} differs from its manifest",
                    chunk.id
                ))
                .with_next("publish again with the same version of packhorse as the hub"));
            }
            received.push((chunk, frame));
        }
        let place = self.parts().budgets.work_place(publisher).await;
        // The work started here is completed even if the connection ends; the lease, the share and
        // the place are held until then.
        cancellable((share, place), move |_| {
            let mut stored = 0;
            for (chunk, frame) in received {
                let raw = frame.verify(chunk.id, chunk.len)?;
                stored += store.put(&frame.fit_to_store(&raw))?;
            }
            Ok((batch.bytes, stored))
        })
        .await
    }
}

/// States for the publisher that the full disk is that of the hub. The upload ends with this fault.
fn of_the_hub(fault: Fault) -> Fault {
    if fault.code != Code::NoSpace {
        return fault;
    }
    fault
        .context("the hub has no room")
        .with_next("free space at the hub, then publish again: stored content is not sent again")
}

/// Walks the manifest and passes batches of the chunks that the store lacks to `take`, until it
/// returns `false` or the work is stopped. Blocks.
fn plan(
    root: &Root,
    store: &Store,
    stop: &Stop,
    take: impl FnMut(Batch) -> Result<bool, Fault>,
) -> Result<(), Fault> {
    let mut planner = Planner {
        store,
        take,
        batch: Batch::default(),
        asked: HashSet::new(),
        order: VecDeque::new(),
    };
    let mut looked_at = Vec::with_capacity(LOOKED_UP_TOGETHER);
    for step in Walk::new(root, &Until::new(store, stop)) {
        if let Step::Chunk(chunk, spot) = step? {
            looked_at.push((chunk, spot.page, spot.index));
            if looked_at.len() == LOOKED_UP_TOGETHER && !planner.look(&mut looked_at)? {
                return Ok(());
            }
        }
    }
    planner.look(&mut looked_at)?;
    planner.send()?;
    Ok(())
}

struct Planner<'a, F> {
    store: &'a Store,
    take: F,
    batch: Batch,
    /// Chunks that may still be in flight, and the order of their requests.
    asked: HashSet<Hash>,
    order: VecDeque<Hash>,
}

impl<F: FnMut(Batch) -> Result<bool, Fault>> Planner<'_, F> {
    /// Requests the chunks that the store lacks. `false`: the receiver takes no more batches.
    fn look(&mut self, chunks: &mut Vec<(ChunkRef, Hash, u32)>) -> Result<bool, Fault> {
        let ids: Vec<Hash> = chunks.iter().map(|(chunk, ..)| chunk.id).collect();
        for ((chunk, page, index), here) in chunks.drain(..).zip(self.store.has_many(&ids)?) {
            if here || !self.asked.insert(chunk.id) {
                continue;
            }
            self.order.push_back(chunk.id);
            if self.order.len() > ASKED_KEPT
                && let Some(oldest) = self.order.pop_front()
            {
                self.asked.remove(&oldest);
            }
            match self.batch.wants.last_mut() {
                Some((last, ranges)) if *last == page => ranges.push(index),
                _ => {
                    let mut ranges = Ranges::default();
                    ranges.push(index);
                    self.batch.wants.push((page, ranges));
                }
            }
            self.batch.bytes += u64::from(chunk.len);
            self.batch.chunks.push(chunk);
            let full = self.batch.bytes >= FETCH_BATCH_BYTES
                || self.batch.chunks.len() >= FETCH_BATCH_CHUNKS_MAX;
            if full && !self.send()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn send(&mut self) -> Result<bool, Fault> {
        let batch = std::mem::take(&mut self.batch);
        if batch.chunks.is_empty() {
            return Ok(true);
        }
        (self.take)(batch)
    }
}

#[cfg(test)]
pub(super) mod tests;

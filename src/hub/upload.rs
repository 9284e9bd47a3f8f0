//! Publishing from another machine: a publisher's line at the hub, and the pull of what the hub
//! lacks over it.
//!
//! A publisher reads its source where it lies and says what it has ([`AskHub::Upload`]). The hub
//! fetches over that line, the other way round than a site does: the root, the pages, and of the
//! chunks only those that its store lacks, each verified before it is kept. The store is flushed
//! with every group commit, so that whichever end is killed, the next try sends nothing again that
//! was kept. Only when all is durable does the artifact enter the catalogue.
//!
//! A publisher may do nothing else: it reads nothing, delivers nothing of others, and is no site.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use super::Hub;
use super::session::verb_of;
use crate::api::types::Published;
use base::blocking::blocking;
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
use content::manifest::{ChunkRef, Digest, Root, Step, Walk};
use content::store::Store;
use exchange::fetch::{self, Fetcher, Library, Ranges};
use exchange::wire;
use model::actor::Actor;
use model::policy::{self, Object, Refusal, Verb};
use model::protocol::{AskHub, CONTROL, FETCH, QUESTION, Wanted};
use transport::{Link, PRIORITY_BULK, RecvHalf, SendHalf};

/// Streams of one publisher's line that are answered at once.
const STREAMS_MAX: usize = 8;
/// Batches that are planned ahead of those on the way.
const BATCHES_AHEAD_MAX: usize = 8;
/// Chunks that are looked up together.
const LOOKED_UP_TOGETHER: usize = 1024;
/// Chunks asked for that are remembered, so that one that comes twice is asked for once: as many as
/// can be on the way.
const ASKED_KEPT: usize = FETCH_BATCH_CHUNKS_MAX * (FETCH_IN_FLIGHT_MAX + BATCHES_AHEAD_MAX + 2);

/// How long it is remembered what an artifact has no room for, though nobody asked again.
const SHORT_FOR: Duration = Duration::from_secs(600);

/// What one request brings.
#[derive(Default)]
struct Batch {
    wants: Vec<(Hash, Ranges)>,
    chunks: Vec<ChunkRef>,
    bytes: u64,
}

impl Hub {
    /// Hears a publisher until its line ends.
    pub(super) async fn welcome_publisher(&self, name: PublisherName, link: Link) {
        let _seats = self.seats();
        let streams = Arc::new(Semaphore::new(STREAMS_MAX));
        loop {
            let stream = tokio::select! {
                stream = link.accept() => stream,
                () = self.inner.stop.cancelled() => None,
            };
            let Some((send, recv)) = stream else { break };
            let Ok(turn) = streams.clone().acquire_owned().await else {
                break;
            };
            let (this, name, link) = (self.clone(), name.clone(), link.clone());
            self.inner.tasks.spawn(async move {
                if let Err(fault) = this.hear_publisher(send, recv, &link, &name).await {
                    tracing::debug!(publisher = %name, error = %fault, "a stream ended");
                }
                drop(turn);
            });
        }
        link.close("the hub stops");
    }

    async fn hear_publisher(
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
        read.map_err(|_| Fault::unreachable("a stream stayed empty"))??;
        match kind[0] {
            QUESTION => {}
            FETCH => {
                fetch::serve(send, recv, &peer, self).await;
                return Ok(());
            }
            CONTROL => {
                return policy::may(&actor, Verb::Control, &Object::Daemon).map_err(Into::into);
            }
            other => return Err(Fault::integrity(format!("a stream of kind {other}"))),
        }
        self.inner.changes.go(&peer, 1).await;
        let (question, share) =
            wire::receive_question(&mut recv, &self.inner.questions, &peer).await?;
        // A publisher that was removed may still hold its certificate.
        let known = self.inner.catalogue.publisher_seen(name).await?;
        let may = policy::may(&actor, Verb::Connect, &Object::Membership { known })
            .and_then(|()| policy::may(&actor, verb_of(&question), &Object::Daemon));
        let answer = match (may, question) {
            (Err(Refusal::Unknown), _) => {
                Err(Fault::not_allowed(format!("the hub does not know the publisher {name} (any more)"))
                    .with_next("at the hub: packhorse token create --publisher NAME; then publish again with --join-token TOKEN"))
            }
            (Err(refusal), _) => Err(refusal.into()),
            (Ok(()), AskHub::Upload { artifact, digest, to, omitted }) => {
                let key = (name.clone(), artifact.clone());
                let before = self.inner.uploads.lock().insert(key.clone(), link.clone());
                if let Some(before) = before.filter(|before| before != link) {
                    // Of a publisher that was killed: what it holds of the budget would keep this
                    // one waiting.
                    before.close("the publisher began anew");
                }
                let answer = tokio::select! {
                    answer = self.take_upload(name, link, artifact, digest, to.as_ref(), &omitted) => answer.map_err(of_the_hub),
                    _ = link.closed() => Err(Fault::unreachable("the publisher's line ended")),
                    () = self.inner.stop.cancelled() => Err(Fault::unreachable("the hub stops")),
                };
                let mut uploads = self.inner.uploads.lock();
                if uploads.get(&key) == Some(link) {
                    uploads.remove(&key);
                }
                answer
            }
            (Ok(()), AskHub::Renew { request }) => self.renew_for(&peer, request.as_str()),
            (Ok(()), _) => Err(Fault::internal("a publisher's question has no answer")),
        };
        if let Err(fault) = self.flush_uploaded().await {
            tracing::error!(error = %fault, "the store cannot be flushed");
        }
        drop(share);
        self.send_answer(&mut send, &peer, answer).await
    }

    /// Whatever came of it, what was brought stays.
    async fn flush_uploaded(&self) -> Result<(), Fault> {
        let store = self.inner.store.clone();
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
        let inner = &self.inner;
        let peer = Peer::Publisher(publisher.clone());
        let actor = Actor::from(&peer);
        // Whatever can be refused is refused before a byte is moved.
        if let Some(to) = to {
            inner.catalogue.select_sites(to).await?;
        }
        let fetcher = Fetcher::new(link.clone(), digest, Arc::default());
        let manifest = fetcher.clone().with_idle_max(MANIFEST_IDLE_MAX);
        let root = manifest.root().await?;
        if root.kind != artifact.kind {
            return Err(Fault::integrity(format!(
                "{artifact} has the manifest of a {}",
                root.kind
            )));
        }
        if let Ok(row) = inner.catalogue.artifact(&artifact).await
            && row.digest != digest
        {
            // Says the conflict in its own words.
            let taken = inner.catalogue.add_artifact(&artifact, &root, None).await;
            inner
                .entitlement
                .hide_taken(&actor, &artifact, digest, taken)
                .await?;
        }
        let reserved = self.reserve(&peer, &artifact, &root).await?;
        // Until the artifact is in the catalogue no collection takes what was found here or
        // brought.
        let store = inner.store.leased_with(reserved.clone());
        let losses = store.losses();
        manifest.pages(&root, None, &store).await?;
        self.check_manifest(&artifact, &root).await?;
        let stored = self.pull(&peer, &fetcher, &root, &store).await?;
        let flushed = store.clone();
        blocking(move || flushed.flush_since(losses)).await?;
        let added = self.register(None, &artifact, &root).await;
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
                self.deliver_to(&actor, std::slice::from_ref(&artifact), to, true)
                    .await?
                    .transfers
            }
            None => Vec::new(),
        };
        let bytes = root.totals.bytes;
        tracing::info!(%artifact, %digest, %publisher, bytes, stored, "published from another machine");
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

    /// Brings every chunk that the store, a leased one, lacks. Returns the bytes that were stored.
    async fn pull(
        &self,
        publisher: &Peer,
        fetcher: &Fetcher,
        root: &Root,
        store: &Store,
    ) -> Result<u64, Fault> {
        let (send, batches) = mpsc::channel(BATCHES_AHEAD_MAX);
        // A publisher asks again and again until there is room; what came meanwhile would be kept
        // for nothing.
        let short_of = self.inner.short_of.lock().get(&root.digest()).copied();
        short_of.map_or(Ok(()), |bytes| self.inner.store.check_room_for(bytes))?;
        self.inner.short_of.lock().forget(&root.digest());
        let lacking = self.lacking_where_room_is_short(root).await?;
        let (planned, packs) = (root.clone(), store.clone());
        let planning = tokio::task::spawn_blocking(move || {
            // What comes after that would have been sent for nothing.
            plan(&planned, &packs, |batch| {
                packs
                    .check_room()
                    .map(|()| send.blocking_send(batch).is_ok())
            })
        });
        let batches = futures::stream::unfold(batches, |mut batches| async move {
            Some((batches.recv().await?, batches))
        });
        let bring = |batch| self.bring(publisher, fetcher, batch, store.clone());
        let running = batches.map(bring).buffer_unordered(FETCH_IN_FLIGHT_MAX);
        tokio::pin!(running);
        let (mut brought, mut stored, mut unflushed, mut flushed) = (0, 0, 0, Instant::now());
        let mut flushing: Option<tokio::task::JoinHandle<Result<(), Fault>>> = None;
        while let Some(bytes) = running.next().await {
            let (raw, bytes) = bytes?;
            brought += raw;
            stored += bytes;
            unflushed += bytes;
            // How well the content is squeezed is seen from an eighth of it on; before half of it
            // came it is told.
            if let Some(lacking) =
                lacking.filter(|lacking| (lacking / 8..lacking / 2).contains(&brought))
            {
                let rest = (u128::from(lacking - brought) * u128::from(stored)
                    / u128::from(brought.max(1))) as u64;
                self.inner.store.check_room_for(rest).inspect_err(|_| {
                    self.inner
                        .short_of
                        .lock()
                        .put(root.digest(), rest, SHORT_FOR);
                })?;
            }
            // Beside the fetching: the line does not wait for the disk's sync.
            if (unflushed >= COMMIT_BYTES || flushed.elapsed() >= COMMIT_EVERY)
                && flushing.as_ref().is_none_or(|f| f.is_finished())
            {
                let store = self.inner.store.clone();
                let before = flushing.replace(tokio::task::spawn_blocking(move || store.flush()));
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

    /// The bytes that the store lacks of an artifact, where all of it might not fit on its disk.
    async fn lacking_where_room_is_short(&self, root: &Root) -> Result<Option<u64>, Fault> {
        let (store, root) = (self.inner.store.clone(), root.clone());
        if store.check_room_for(root.totals.bytes).is_ok() {
            return Ok(None);
        }
        let count = blocking(move || {
            let (mut lacking, mut seen) = (0, BloomFilter::default());
            plan(&root, &store, |batch| {
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

    /// Brings one batch into the store. Returns its bytes, and those that were stored.
    async fn bring(
        &self,
        publisher: &Peer,
        fetcher: &Fetcher,
        batch: Batch,
        store: Store,
    ) -> Result<(u64, u64), Fault> {
        // What is on the way holds a share of the daemon's budget, out of the publisher's own.
        let _share = self.share(publisher, batch.bytes, PRIORITY_BULK).await?;
        let wants = batch
            .wants
            .into_iter()
            .map(|(page, ranges)| Wanted::Children {
                page,
                ranges: ranges.0,
            })
            .collect();
        let mut frames = fetcher.ask(wants, 0).await?;
        let mut brought = Vec::with_capacity(batch.chunks.len());
        for chunk in batch.chunks {
            let frame = frames.next().await?;
            // At once: all of the batch waits here, and the share is what the manifest says of it.
            if frame.raw_len() != chunk.len || frame.len() > HEADER_BYTES + chunk.len as usize {
                return Err(Fault::integrity(format!(
                    "{publisher} sent chunk {} in another size than its manifest says",
                    chunk.id
                ))
                .with_next("publish again with the same version of packhorse as the hub"));
            }
            brought.push((chunk, frame));
        }
        let _place = self.work_place(publisher).await;
        // What was begun here ends even if the publisher's line does not last; the lease is held as
        // long.
        blocking(move || {
            let mut stored = 0;
            for (chunk, frame) in brought {
                let raw = frame.verify(chunk.id, chunk.len)?;
                stored += store.put(&frame.fit_to_store(&raw))?;
            }
            Ok((batch.bytes, stored))
        })
        .await
    }
}

/// To the publisher a full disk is the hub's, and the upload ends with it.
fn of_the_hub(fault: Fault) -> Fault {
    if fault.code != Code::NoSpace {
        return fault;
    }
    fault
        .context("the hub has no room")
        .with_next("make room at the hub, then publish again: what was kept is not sent again")
}

/// Walks the manifest and hands out batches of the chunks that the store lacks, until `take` says
/// `false`. Blocks.
fn plan(
    root: &Root,
    store: &Store,
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
    for step in Walk::new(root, store) {
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
    /// Chunks that may still be on the way, and the order in which they were asked for.
    asked: HashSet<Hash>,
    order: VecDeque<Hash>,
}

impl<F: FnMut(Batch) -> Result<bool, Fault>> Planner<'_, F> {
    /// Asks for those that are not here. `false`: nobody takes batches any more.
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

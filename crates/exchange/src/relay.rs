//! The relay: how the hub serves an artifact whose bytes are at a site. It is cut-through and cache
//! in one.
//!
//! A requested chunk is taken from the hub's own store, from the relay's store, or is fetched from
//! a site that has it: once, for any number of waiting requests (an in-flight fetch). Each frame is
//! verified, passed on at once, and kept in a store under `<data_dir>/relay` for later requests.
//! That store has a budget; content without room in it is passed on and not kept.
//!
//! The hub calls it for its sites, and to prefetch for a site that is offline. After a crash the
//! relay's store has the content of its last flush (at most a second or 32 MiB ago) and the whole
//! frames behind it; the rest is fetched again.

mod cache;
mod inflight_fetch;
mod restore;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use tokio::time::Instant;

use crate::fetch::{self, Child, Pieces, Ranges};
use base::blocking::blocking;
use base::buffers::Buffers;
use base::fault::{Code, Fault, Reason, Retry};
use base::names::SiteName;
use base::peer::Peer;
use base::workers::Workers;
use content::chunk::{Hash, ShortHash};
use content::frame::{Frame, Verified};
use content::manifest::{ChunkRef, Digest};
use content::store::Store;
use model::protocol::Wanted;

use cache::{Group, Keeper, RelayCache};
use inflight_fetch::{InflightFetch, InflightFetches, Ticket};

/// Stored bytes that are received, verified, passed on and kept together, approximately.
pub const TOGETHER_BYTES: usize = 128 << 10;
/// How long a fetch waits for a source that disconnected, before the requester gets an error.
const PATIENCE: Duration = Duration::from_secs(2);
/// The interval between two checks for a source.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often a plan is made again because a kept chunk is damaged.
const PLANS_MAX: u32 = 3;

/// Frames as a site sends them: neither checksum nor hash is verified.
pub type Sent = BoxStream<'static, Result<Vec<Frame>, Fault>>;

/// A site that has an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its name.
    pub site: SiteName,
    /// Whether it was published there; otherwise it was only received there.
    pub origin: bool,
}

/// The sites that have bytes.
#[async_trait]
pub trait Upstream: Send + Sync {
    /// The connected sites that hold this artifact, the best first; never `but`.
    async fn sources(&self, digest: Digest, but: Option<&SiteName>) -> Result<Vec<Holder>, Fault>;
    /// Whether any site but this one holds it, connected or not.
    async fn is_elsewhere(&self, digest: Digest, but: Option<&SiteName>) -> Result<bool, Fault>;
    /// Requests frames from one of them. They come in the order of the request, in some of these
    /// buffers.
    async fn ask(
        &self,
        source: &SiteName,
        of: Of,
        wants: Vec<Wanted>,
        count: usize,
        buffers: &Buffers,
    ) -> Result<Sent, Fault>;
}

/// The relay. Cheap to clone.
#[derive(Clone)]
pub struct Relay {
    inner: Arc<Inner>,
}

struct Inner {
    /// The hub's own store.
    main: Store,
    upstream: Arc<dyn Upstream>,
    flights: Arc<InflightFetches>,
    kept: Arc<RelayCache>,
    keeper: Keeper,
    /// Buffers for received frames.
    buffers: Buffers,
    fetched: AtomicU64,
}

/// A part of an answer.
enum Slot {
    Here(Vec<Bytes>),
    Coming(Ticket),
}

/// Parts of an answer, each with its index in the request.
type Slots = Vec<(usize, Slot)>;

/// How a request is answered.
struct Planned {
    /// Chunks that are fetched from a site; all others are here.
    coming: Slots,
    claimed: Option<Claimed>,
    /// Which chunks the hub's own store has.
    in_main: Vec<bool>,
}

/// The chunks that a request must fetch itself.
struct Claimed {
    flight: Arc<InflightFetch>,
    children: Vec<Child>,
}

/// Which artifact, which page of it, and how urgently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Of {
    /// The artifact.
    pub digest: Digest,
    /// The page that lists the requested chunks.
    pub page: Hash,
    /// Higher is sent first, also by the source. A request that joins an in-flight fetch gets the
    /// priority of the request that began it.
    pub priority: i32,
}

/// The error when no source is connected. That no other site has it at all is another code: the
/// requester may be its origin.
fn waiting(digest: Digest, elsewhere: bool) -> Fault {
    let fault = match elsewhere {
        true => Fault::unreachable(format!("no site that holds {digest} is connected"))
            .with_next("no action is needed: the transfer resumes when the site that holds the artifact reconnects; see 'packhorse sites'"),
        false => Fault::not_found(format!("no other site holds {digest}"))
            .with_next("no action is needed: the transfer resumes when another site holds the artifact, or when its files are restored"),
    };
    fault
        .with_reason(Reason::WaitingForSource)
        .with_retry(Retry::Backoff)
}

impl Relay {
    /// Opens the relay's store. Blocks.
    pub fn open(
        data_dir: &Path,
        main: Store,
        upstream: Arc<dyn Upstream>,
        budget: u64,
        workers: &Workers,
    ) -> Result<Self, Fault> {
        let kept = Arc::new(RelayCache::open(&data_dir.join("relay"), budget)?);
        let flights = Arc::<InflightFetches>::default();
        let keeper = Keeper::start(kept.clone(), workers)?;
        let buffers = fetch::buffers();
        Ok(Self {
            inner: Arc::new(Inner {
                main,
                upstream,
                flights,
                kept,
                keeper,
                buffers,
                fetched: AtomicU64::new(0),
            }),
        })
    }

    /// Approximate bytes of the relay's packs.
    pub fn kept_bytes(&self) -> u64 {
        self.inner.kept.bytes.load(Ordering::Relaxed)
    }

    /// Stored bytes that sites sent for the relay since the daemon's start.
    pub fn fetched_bytes(&self) -> u64 {
        self.inner.fetched.load(Ordering::Relaxed)
    }

    /// Bytes of these that were passed on without being kept, because there was no room.
    pub fn unkept_bytes(&self) -> u64 {
        self.inner.kept.unkept.load(Ordering::Relaxed)
    }

    /// Whether the budget is used up.
    pub fn is_full(&self) -> bool {
        self.inner.kept.is_full()
    }

    /// Which of these chunks neither store has. Blocks.
    pub fn lacking(&self, children: &[Child]) -> Result<Vec<Child>, Fault> {
        let ids: Vec<Hash> = children.iter().map(|c| c.chunk.id).collect();
        let main = self.inner.main.has_many(&ids)?;
        let kept = self.inner.kept.store.has_many(&ids)?;
        Ok(children
            .iter()
            .zip(main.into_iter().zip(kept))
            .filter(|(_, (m, k))| !m && !k)
            .map(|(c, _)| *c)
            .collect())
    }

    /// Waits a little for a source, if one is needed.
    pub async fn ready(
        &self,
        peer: &Peer,
        digest: Digest,
        children: &[Child],
    ) -> Result<(), Fault> {
        let mut until = None;
        // First, because a source is nearly always connected, and a lookup of each chunk costs
        // more.
        while self
            .inner
            .upstream
            .sources(digest, peer.site())
            .await?
            .is_empty()
        {
            let until = *until.get_or_insert_with(|| Instant::now() + PATIENCE);
            let (this, asked) = (self.clone(), children.to_vec());
            if blocking(move || this.lacking(&asked)).await?.is_empty() {
                return Ok(());
            }
            if Instant::now() >= until {
                return Err(waiting(
                    digest,
                    self.inner
                        .upstream
                        .is_elsewhere(digest, peer.site())
                        .await?,
                ));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// The frames of these chunks, in order, each as soon as it is available.
    pub async fn frames(&self, peer: &Peer, of: Of, children: Vec<Child>) -> Result<Pieces, Fault> {
        let slots = self.plan(peer.site(), of, children, true).await?;
        Ok(stream::iter(slots)
            .then(move |slot| async move {
                match slot {
                    Slot::Here(pieces) => pieces.into_iter().map(Ok).collect::<Vec<_>>(),
                    Slot::Coming(ticket) => vec![ticket.frame(of.digest).await],
                }
            })
            .flat_map(stream::iter)
            .boxed())
    }

    /// Fetches the chunks that are not here, and waits until they are kept.
    pub async fn fetch_and_keep(&self, of: Of, children: Vec<Child>) -> Result<(), Fault> {
        for slot in self.plan(None, of, children, false).await? {
            if let Slot::Coming(ticket) = slot {
                ticket.settled(of.digest).await?;
            }
        }
        Ok(())
    }

    /// Reads chunks that are here, joins in-flight fetches, and begins to fetch the rest.
    async fn plan(
        &self,
        peer: Option<&SiteName>,
        of: Of,
        children: Vec<Child>,
        read: bool,
    ) -> Result<Vec<Slot>, Fault> {
        for _ in 1..PLANS_MAX {
            match self.plan_once(peer, of, children.clone(), read).await {
                // A chunk is damaged and was removed from the index: it is fetched again.
                Err(fault) if fault.code == Code::Integrity => {
                    tracing::warn!(error = %fault, "a relayed chunk is fetched again");
                }
                other => return other,
            }
        }
        self.plan_once(peer, of, children, read).await
    }

    async fn plan_once(
        &self,
        peer: Option<&SiteName>,
        of: Of,
        children: Vec<Child>,
        read: bool,
    ) -> Result<Vec<Slot>, Fault> {
        let gate = self.inner.kept.gate.clone().read_owned().await;
        let (this, but) = (self.clone(), peer.cloned());
        blocking(move || {
            let _gate = gate;
            let Planned {
                coming,
                claimed,
                in_main,
            } = this.slots(of, &children)?;
            if let Some(claimed) = claimed {
                let this = this.clone();
                // In its own task, started at once: the requester may stop at any moment, and
                // others may wait for the same chunks.
                tokio::spawn(async move { this.fly(claimed, of, but).await });
            }
            if read {
                this.read_here(&children, coming, &in_main)
            } else {
                Ok(coming.into_iter().map(|(_, slot)| slot).collect())
            }
        })
        .await
    }

    /// The chunks that are already in flight, each with its index, and the chunks that must be
    /// fetched.
    fn slots(&self, of: Of, children: &[Child]) -> Result<Planned, Fault> {
        let inner = &self.inner;
        let ids: Vec<Hash> = children.iter().map(|c| c.chunk.id).collect();
        let in_main = inner.main.has_many(&ids)?;
        let mut coming = Vec::new();
        let mut claimed = Vec::new();
        let flight = Arc::new(InflightFetch::new(of.digest));
        let mut flights = inner.flights.lock();
        // The lookup holds the lock of the in-flight fetches: a chunk that arrived is found in the
        // store, any other in the list.
        let kept = inner.kept.store.has_many(&ids)?;
        for (index, child) in children
            .iter()
            .enumerate()
            .filter(|(index, _)| !in_main[*index] && !kept[*index])
        {
            let (flight, at) = flights.entry(child.chunk.id).or_insert_with(|| {
                claimed.push(*child);
                (flight.clone(), claimed.len() - 1)
            });
            coming.push((index, Slot::Coming(flight.ticket(*at))));
        }
        let claimed = (!claimed.is_empty()).then_some(Claimed {
            flight,
            children: claimed,
        });
        Ok(Planned {
            coming,
            claimed,
            in_main,
        })
    }

    /// Merges local chunks and fetched chunks in the order of the request.
    fn read_here(
        &self,
        children: &[Child],
        coming: Slots,
        in_main: &[bool],
    ) -> Result<Vec<Slot>, Fault> {
        let inner = &self.inner;
        let chunks: Vec<ChunkRef> = children.iter().map(|c| c.chunk).collect();
        let mut out = Vec::new();
        let mut at = 0;
        let here = |from: usize, to: usize, out: &mut Vec<Slot>| -> Result<(), Fault> {
            for run in (from..to)
                .collect::<Vec<_>>()
                .chunk_by(|a, b| in_main[*a] == in_main[*b])
            {
                let (Some(first), Some(last)) = (run.first(), run.last()) else {
                    continue;
                };
                let store = if in_main[*first] {
                    &inner.main
                } else {
                    &inner.kept.store
                };
                out.push(Slot::Here(store.read_to_send(&chunks[*first..=*last])?));
            }
            Ok(())
        };
        for (index, slot) in coming {
            here(at, index, &mut out)?;
            out.push(slot);
            at = index + 1;
        }
        here(at, children.len(), &mut out)?;
        Ok(out)
    }

    /// Fetches the claimed chunks, from one site or another.
    async fn fly(&self, claimed: Claimed, of: Of, but: Option<SiteName>) {
        let Claimed { flight, children } = claimed;
        // However this ends, no request may wait for ever.
        let mut landing = Receiving {
            relay: self,
            flight: &flight,
            children: &children,
            done: 0,
            fault: None,
        };
        let mut since = Instant::now();
        let fault = loop {
            let mut last = None;
            let before = landing.done;
            let sources = match self.inner.upstream.sources(of.digest, but.as_ref()).await {
                Ok(sources) => sources,
                Err(fault) => break fault,
            };
            for Holder {
                site: source,
                origin,
            } in sources
            {
                match self.pull(&source, of, &mut landing).await {
                    Ok(()) => return,
                    Err(fault) => {
                        tracing::info!(%source, digest = %of.digest, error = %fault, "a relayed chunk did not come");
                        // A site that only received the artifact may have lost it; the site that
                        // published it may still have it.
                        let fault = if origin {
                            fault
                        } else {
                            fault.with_retry(Retry::Backoff)
                        };
                        // An error of the content is more useful than the absence of another site.
                        if last
                            .as_ref()
                            .is_none_or(|old: &Fault| old.retry != Retry::Never)
                        {
                            last = Some(fault);
                        }
                    }
                }
            }
            if landing.done > before {
                since = Instant::now();
            }
            match last {
                // The source answers, and its error does not pass in moments.
                Some(fault) if fault.retry == Retry::Never => break fault,
                Some(fault) if since.elapsed() >= PATIENCE => {
                    break fault.with_reason(Reason::WaitingForSource);
                }
                None if since.elapsed() >= PATIENCE => {
                    break match self
                        .inner
                        .upstream
                        .is_elsewhere(of.digest, but.as_ref())
                        .await
                    {
                        Ok(elsewhere) => waiting(of.digest, elsewhere),
                        Err(fault) => fault,
                    };
                }
                _ => tokio::time::sleep(LOOK_EVERY).await,
            }
        };
        landing.fault = Some(fault);
    }

    /// Requests the missing part of an in-flight fetch from this site.
    async fn pull(
        &self,
        source: &SiteName,
        of: Of,
        landing: &mut Receiving<'_>,
    ) -> Result<(), Fault> {
        let mut wants: Vec<Wanted> = Vec::new();
        let mut ranges = Ranges::default();
        let mut last = None;
        for child in &landing.children[landing.done..] {
            if last.is_some_and(|last| child.index <= last) {
                wants.push(Wanted::Children {
                    page: of.page,
                    ranges: std::mem::take(&mut ranges).0,
                });
            }
            ranges.push(child.index);
            last = Some(child.index);
        }
        wants.push(Wanted::Children {
            page: of.page,
            ranges: ranges.0,
        });
        let count = landing.children.len() - landing.done;
        let mut sent = self
            .inner
            .upstream
            .ask(source, of, wants, count, &self.inner.buffers)
            .await?;
        while landing.done < landing.children.len() {
            let early = || Fault::unreachable(format!("site {source} ended an answer early"));
            let frames = sent.next().await.ok_or_else(early)??;
            let frames = self
                .verified(&landing.children[landing.done..], frames)
                .map_err(|fault| fault.context(format!("site {source}")))?;
            landing.land(frames).await;
        }
        Ok(())
    }

    /// Verifies frames in this task: they are few, and passing them to another thread takes longer.
    fn verified(&self, children: &[Child], frames: Vec<Frame>) -> Result<Vec<Frame>, Fault> {
        let mut checked = Vec::with_capacity(frames.len());
        for (child, frame) in children.iter().zip(frames) {
            let chunk = frame.verify(child.chunk.id, child.chunk.len)?;
            checked.push(frame.fit_to_store(&chunk));
        }
        let len: usize = checked.iter().map(Frame::len).sum();
        self.inner.fetched.fetch_add(len as u64, Ordering::Relaxed);
        Ok(checked)
    }

    /// Flushes the relay's store, if there is something to flush. Blocks.
    pub fn flush(&self) -> Result<(), Fault> {
        self.inner.kept.flush()
    }

    /// Frees buffers that were not used since the last call.
    pub fn rest(&self) {
        self.inner.kept.store.rest();
        self.inner.buffers.rest();
    }

    /// A chunk of the hub's or the relay's store, verified; `None`: neither has it. Blocks.
    pub fn read(&self, chunk: ChunkRef) -> Result<Option<Verified>, Fault> {
        for store in [&self.inner.main, &self.inner.kept.store] {
            if store.has(chunk.id)? {
                return store.read_chunk(chunk).map(Some);
            }
        }
        Ok(None)
    }

    /// Reads these chunks again in both stores, and removes those from the index that do not
    /// verify. Returns how many. Blocks.
    pub fn recheck(&self, ids: &[Hash]) -> Result<usize, Fault> {
        Ok(self.inner.main.recheck(ids)? + self.inner.kept.store.recheck(ids)?)
    }

    /// Removes everything that `live` does not name; `live` is called when no put is running.
    /// Returns the freed bytes.
    pub async fn evict<F, L>(&self, live: impl FnOnce() -> F) -> Result<u64, Fault>
    where
        F: Future<Output = Result<L, Fault>>,
        L: Fn(ShortHash) -> bool + Send + 'static,
    {
        let kept = self.inner.kept.clone();
        let gate = kept.gate.clone().write_owned().await;
        let live = live().await?;
        blocking(move || {
            let _gate = gate;
            let freed = kept.store.collect(&live)?;
            kept.bytes
                .store(kept.store.stored_bytes()?, Ordering::Relaxed);
            Ok(freed)
        })
        .await
    }
}

/// An in-flight fetch as it arrives. When it is dropped before everything arrived, the waiting
/// requests get an error.
struct Receiving<'a> {
    relay: &'a Relay,
    flight: &'a Arc<InflightFetch>,
    children: &'a [Child],
    done: usize,
    fault: Option<Fault>,
}

impl Receiving<'_> {
    /// Passes frames on, and queues them for the cache.
    async fn land(&mut self, frames: Vec<Frame>) {
        self.done += frames.len();
        self.flight
            .land(frames.iter().map(Frame::to_bytes).collect());
        let inner = &self.relay.inner;
        inner
            .keeper
            .keep(Group {
                flights: inner.flights.clone(),
                flight: self.flight.clone(),
                frames,
            })
            .await;
    }
}

impl Drop for Receiving<'_> {
    fn drop(&mut self) {
        if self.done < self.children.len() {
            self.relay.inner.flights.forget(
                self.children[self.done..]
                    .iter()
                    .map(|child| child.chunk.id),
            );
            self.flight.fail(
                self.fault
                    .take()
                    .unwrap_or_else(|| Fault::internal("a fetch of the relay ended early")),
            );
        }
    }
}

#[cfg(test)]
mod tests;

//! Fetching: one side asks for chunks by where a manifest names them, the other gives the stored frames as they are.
//!
//! Both sides of the fetch stream live here: [`serve`] answers from a [`Library`], [`Fetcher`] asks. What comes back is
//! not trusted: the asker verifies every frame against the name that its manifest says.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use crate::chunk::Hash;
use crate::fault::{Fault, Reason, Retry};
use crate::frame::{Frame, FrameError, HEADER_BYTES, Header};
use crate::limits::{FETCH_BATCH_BYTES, FETCH_BATCH_CHUNKS_MAX, FETCH_REQUEST_BYTES_MAX, ROOT_BYTES_MAX, SILENCE_MAX};
use crate::line::{Link, RecvHalf, SendHalf};
use crate::manifest::{ChunkRef, Digest, PageRef, Pages, Root, children, for_each_page, read_children};
use crate::store::Store;
use crate::wire::{self, FETCH, FetchRequest, PRIORITY_MANIFEST, Peer, Wanted};

/// Parsed pages remembered for each open artifact: about 1 MiB.
const RECENT_PAGES_MAX: usize = 64;
/// A line that brings more than this in the time of silence is not dead; its own upkeep takes less.
const LIVELY_BYTES: u64 = 16 << 10;
/// Raw bytes that are read from the store for one answer before they are sent.
const ANSWER_BYTES: u64 = 1 << 20;
/// How long a peer may take for one piece of an answer.
const WRITE_MAX: Duration = Duration::from_secs(120);
/// Manifest requests on the way at once.
const MANIFEST_IN_FLIGHT: usize = 8;

/// An artifact that is open for reading by a peer.
pub struct Opened {
    /// Its digest.
    pub digest: Digest,
    /// Its root manifest.
    pub root: Root,
    /// Every page of it: what a request may name.
    pub pages: HashSet<Hash>,
    /// The children of the pages that were named last: a page is named by many requests behind each other.
    recent: Mutex<VecDeque<(Hash, Arc<Vec<ChunkRef>>)>>,
}

impl Opened {
    /// Lists an artifact's pages; reads its index pages only.
    pub fn new(digest: Digest, root: Root, source: &dyn Pages) -> Result<Self, Fault> {
        let mut pages = HashSet::new();
        for_each_page(&root, source, |page| {
            pages.insert(page.id);
            Ok(())
        })?;
        Ok(Self { digest, root, pages, recent: Mutex::default() })
    }
}

impl Opened {
    /// What a page of this artifact lists. A page that is not one of its own is as good as not there.
    async fn children(&self, page: Hash, library: &dyn Library) -> Result<Arc<Vec<ChunkRef>>, Fault> {
        if !self.pages.contains(&page) {
            return Err(nothing_such());
        }
        if let Some((_, known)) = self.recent.lock().iter().find(|(id, _)| *id == page) {
            return Ok(known.clone());
        }
        let listed = Arc::new(children(&library.page(self, page).await?, &self.root)?);
        let mut recent = self.recent.lock();
        if recent.len() == RECENT_PAGES_MAX {
            recent.pop_front();
        }
        recent.push_back((page, listed.clone()));
        Ok(listed)
    }
}

/// Gives out artifacts.
#[async_trait]
pub trait Library: Send + Sync {
    /// The artifact, if this peer may read it. What does not exist and what he may not see get the same answer.
    async fn open(&self, peer: &Peer, digest: Digest) -> Result<Arc<Opened>, Fault>;
    /// A share of the daemon's budget for this many bytes, out of what this peer may have of it.
    async fn share(&self, peer: &Peer, bytes: u64) -> Result<[OwnedSemaphorePermit; 2], Fault>;
    /// A page's raw bytes.
    async fn page(&self, opened: &Opened, page: Hash) -> Result<Bytes, Fault>;
    /// The frames of these children of an opened artifact, in order, in any number of pieces.
    async fn frames(&self, opened: &Opened, wanted: &Wanted, ids: Vec<ChunkRef>) -> Result<Vec<Bytes>, Fault>;
}

/// The answer to a peer that asks for what it may not have, or what is not there.
pub fn nothing_such() -> Fault {
    Fault::not_found("the hub has no such artifact for this site").with_reason(Reason::SourceGone)
}

fn pick(all: &[ChunkRef], ranges: &[(u32, u32)]) -> Result<Vec<ChunkRef>, Fault> {
    let mut out = Vec::new();
    for &(first, count) in ranges {
        let range = first as usize..(first as usize).saturating_add(count as usize);
        let part = all.get(range).ok_or_else(|| Fault::integrity("a fetch request names more than the page holds"))?;
        out.extend_from_slice(part);
        if out.len() > FETCH_BATCH_CHUNKS_MAX * 4 {
            return Err(Fault::integrity("a fetch request asks for too much at once"));
        }
    }
    Ok(out)
}

/// Answers one fetch stream; its kind byte was read already.
pub async fn serve(mut send: SendHalf, mut recv: RecvHalf, peer: &Peer, library: &dyn Library) {
    if let Err(fault) = answer(&mut send, &mut recv, peer, library).await {
        tracing::debug!(%peer, error = %fault, "a fetch was refused");
        let _ = send.write_bytes(Frame::fault(&fault).bytes().clone()).await;
    }
    let _ = send.finish();
}

async fn answer(send: &mut SendHalf, recv: &mut RecvHalf, peer: &Peer, library: &dyn Library) -> Result<(), Fault> {
    let request = timeout(SILENCE_MAX, wire::receive_bytes(recv, FETCH_REQUEST_BYTES_MAX)).await;
    let request = request.map_err(|_| Fault::unreachable("a fetch request did not arrive"))??;
    let request: FetchRequest = postcard::from_bytes(&request).map_err(|_| Fault::integrity("a malformed fetch request"))?;
    // Manifests and small artifacts go before large ones on the way back too; control goes before all of them.
    send.set_priority(request.priority.clamp(0, PRIORITY_MANIFEST));
    let opened = library.open(peer, request.digest).await?;
    for wanted in &request.wants {
        let ids = match wanted {
            Wanted::Root => {
                let root = crate::frame::Verified::new(opened.root.to_bytes().into());
                send.write_bytes(Frame::encode(&root).bytes().clone()).await?;
                continue;
            }
            Wanted::TopPages(ranges) => {
                let all: Vec<ChunkRef> = opened.root.pages.iter().map(|p| ChunkRef { id: p.id, len: p.len }).collect();
                pick(&all, ranges)?
            }
            Wanted::Children { page, ranges } => pick(&opened.children(*page, library).await?, ranges)?,
        };
        let mut ids = ids.as_slice();
        while !ids.is_empty() {
            let (mut bytes, mut count) = (0, 0);
            while count < ids.len() && bytes < ANSWER_BYTES {
                bytes += u64::from(ids[count].len);
                count += 1;
            }
            let (now, later) = ids.split_at(count);
            ids = later;
            // What is read and not yet taken by the line holds a share of the daemon's budget.
            let _share = library.share(peer, bytes).await?;
            for piece in library.frames(&opened, wanted, now.to_vec()).await? {
                let sent = timeout(WRITE_MAX, send.write_bytes(piece)).await;
                sent.map_err(|_| Fault::unreachable(format!("{peer} takes nothing from this stream")))??;
            }
        }
    }
    Ok(())
}

/// Asks one peer for one artifact.
#[derive(Clone)]
pub struct Fetcher {
    link: Link,
    digest: Digest,
    wire: Arc<AtomicU64>,
}

/// The frames of one request, one by one.
pub struct Frames {
    link: Link,
    recv: RecvHalf,
    wire: Arc<AtomicU64>,
    /// Keeps the request's stream until the answer is read.
    _send: SendHalf,
}

fn silent() -> Fault {
    Fault::unreachable(format!("the line was silent for {} s", SILENCE_MAX.as_secs())).with_reason(Reason::HubUnreachable)
}

/// A line that broke is no fault of the transfer: it goes on when there is another.
fn broken(fault: Fault) -> Fault {
    Fault { retry: Retry::Backoff, ..fault.with_reason(Reason::HubUnreachable) }
}

impl Fetcher {
    /// A fetcher of this artifact over this link, which counts what crosses the line in `wire`.
    pub fn new(link: Link, digest: Digest, wire: Arc<AtomicU64>) -> Self {
        Self { link, digest, wire }
    }

    /// Asks. The frames come in the order of the request.
    pub async fn ask(&self, wants: Vec<Wanted>, priority: i32) -> Result<Frames, Fault> {
        let request = FetchRequest { digest: self.digest, priority, wants };
        let bytes = postcard::to_stdvec(&request).map_err(|e| Fault::internal(format!("a fetch request: {e}")))?;
        let (mut send, recv) = self.link.open(priority).await.map_err(broken)?;
        let mut out = BytesMut::with_capacity(bytes.len() + 5);
        out.extend_from_slice(&[FETCH]);
        out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        out.extend_from_slice(&bytes);
        self.wire.fetch_add(out.len() as u64, Ordering::Relaxed);
        send.write_bytes(out.freeze()).await.map_err(broken)?;
        send.finish().map_err(broken)?;
        Ok(Frames { link: self.link.clone(), recv, wire: self.wire.clone(), _send: send })
    }

    /// The root manifest, checked against its digest.
    pub async fn root(&self) -> Result<Root, Fault> {
        let mut frames = self.ask(vec![Wanted::Root], PRIORITY_MANIFEST).await?;
        let frame = frames.next().await?;
        let len = frame.raw_len();
        if len as usize > ROOT_BYTES_MAX {
            return Err(Fault::integrity("the root manifest is larger than allowed"));
        }
        Root::parse(&frame.verify(self.digest, len)?.bytes, self.digest)
    }

    /// Brings every page of the manifest that the store lacks.
    pub async fn pages(&self, root: &Root, store: &Store) -> Result<(), Fault> {
        let mut level: Vec<(Option<Hash>, Vec<PageRef>)> = vec![(None, root.pages.clone())];
        for depth in (0..=root.depth).rev() {
            self.bring(&level, store).await?;
            if depth == 0 {
                break;
            }
            let (above, pages) = (level, store.clone());
            level = blocking(move || {
                let mut below = Vec::new();
                for page in above.iter().flat_map(|(_, pages)| pages) {
                    below.push((Some(page.id), read_children(&pages.page(page.id)?)?));
                }
                Ok(below)
            })
            .await?;
        }
        let store = store.clone();
        blocking(move || store.flush()).await
    }

    async fn bring(&self, level: &[(Option<Hash>, Vec<PageRef>)], store: &Store) -> Result<(), Fault> {
        let mut requests: Vec<(Vec<Wanted>, Vec<PageRef>)> = Vec::new();
        let mut seen = HashSet::new();
        for (parent, pages) in level {
            let ids: Vec<Hash> = pages.iter().map(|p| p.id).collect();
            let here = store.has_many(&ids)?;
            let (mut ranges, mut lacking, mut bytes) = (Ranges::default(), Vec::new(), 0);
            let wanted = |ranges: Ranges| match parent {
                None => Wanted::TopPages(ranges.0),
                Some(page) => Wanted::Children { page: *page, ranges: ranges.0 },
            };
            for (index, page) in pages.iter().enumerate() {
                if here[index] || !seen.insert(page.id) {
                    continue;
                }
                ranges.push(index as u32);
                lacking.push(*page);
                bytes += u64::from(page.len);
                if bytes >= FETCH_BATCH_BYTES / 2 || lacking.len() >= FETCH_BATCH_CHUNKS_MAX {
                    requests.push((vec![wanted(std::mem::take(&mut ranges))], std::mem::take(&mut lacking)));
                    bytes = 0;
                }
            }
            if !lacking.is_empty() {
                requests.push((vec![wanted(ranges)], lacking));
            }
        }
        let fetch = |(wants, pages): (Vec<Wanted>, Vec<PageRef>)| async move {
            let mut frames = self.ask(wants, PRIORITY_MANIFEST).await?;
            for page in pages {
                let frame = frames.next().await?;
                frame.verify(page.id, page.len)?;
                store.put(&frame)?;
            }
            Ok::<(), Fault>(())
        };
        let mut running = futures::stream::iter(requests.into_iter().map(fetch)).buffer_unordered(MANIFEST_IN_FLIGHT);
        while let Some(result) = running.next().await {
            result?;
        }
        Ok(())
    }
}

impl Frames {
    /// The next frame as the peer sent it: its sum and its name are not checked yet, [`Frame::verify`] does.
    pub async fn next(&mut self) -> Result<Frame, Fault> {
        let link = self.link.clone();
        let read = self.read();
        tokio::pin!(read);
        loop {
            let before = link.bytes().1;
            match timeout(SILENCE_MAX, &mut read).await {
                Ok(result) => return result,
                // On a slow line this stream may wait long for its turn behind others: silent is a line that brings nothing.
                Err(_) if link.bytes().1 - before > LIVELY_BYTES => {}
                Err(_) => return Err(silent()),
            }
        }
    }

    async fn read(&mut self) -> Result<Frame, Fault> {
        let mut head = [0; HEADER_BYTES];
        self.recv.read_exact(&mut head).await.map_err(broken)?;
        let header = Header::parse(&head).map_err(Fault::from)?;
        let mut bytes = BytesMut::zeroed(header.frame_len());
        bytes[..HEADER_BYTES].copy_from_slice(&head);
        self.recv.read_exact(&mut bytes[HEADER_BYTES..]).await.map_err(broken)?;
        self.wire.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        match Frame::from_line(header, bytes.freeze()) {
            Err(FrameError::Fault(fault)) => Err(fault),
            other => Ok(other?),
        }
    }
}

/// Ascending indexes as `(first, count)` runs.
#[derive(Debug, Default)]
pub struct Ranges(pub Vec<(u32, u32)>);

impl Ranges {
    /// Adds an index that is larger than those before.
    pub fn push(&mut self, index: u32) {
        match self.0.last_mut() {
            Some((first, count)) if *first + *count == index => *count += 1,
            _ => self.0.push((index, 1)),
        }
    }
}

/// Runs work that blocks where it may.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Fault> + Send + 'static) -> Result<T, Fault> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Fault::internal(format!("a task ended: {e}")))?
}

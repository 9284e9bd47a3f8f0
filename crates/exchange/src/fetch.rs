//! Fetching: one side requests chunks by their position in a manifest, the other sends the stored
//! frames unchanged.
//!
//! Both sides of the fetch stream are here: [`serve`] answers from a [`Library`], [`Fetcher`] sends
//! requests; `pages` holds what is specific to manifest pages. Received data is not trusted: the
//! requester verifies every frame against the hash in its manifest.

mod pages;

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf, Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::BoxStream;
use parking_lot::Mutex;
use tokio::sync::{OnceCell, OwnedSemaphorePermit};
use tokio::time::{Instant, timeout};

use crate::wire::{self, PRIORITY_MANIFEST};
use base::blocking::blocking;
use base::budget::Share;
use base::buffers::Buffers;
use base::fault::{Fault, Reason, Retry};
use base::limits::{
    FETCH_BATCH_BYTES, FETCH_BATCH_CHUNKS_MAX, FETCH_IDLE_MAX, FETCH_PROGRESS_BYTES,
    FETCH_REQUEST_BYTES_MAX, ROOT_BYTES_MAX, SILENCE_MAX,
};
use base::peer::Peer;
use content::chunk::Hash;
use content::frame::{Frame, FrameError, HEADER_BYTES, Header, Verified};
use content::manifest::{
    ChunkRef, Digest, PageRef, Pages, Root, children, entry_pages, for_each_page,
};
use content::store::Store;
use model::protocol::{FETCH, FetchRequest, Wanted};
use transport::{Link, RecvHalf, SendHalf, Want};

/// Parsed pages cached for each open artifact: about 1 MiB.
const RECENT_PAGES_MAX: usize = 64;
/// How often a connection with an overdue answer is checked.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Raw bytes that are read from the store for one answer before they are sent.
const ANSWER_BYTES: u64 = 1 << 20;
/// How long a peer may take for one piece of an answer: with the data before it, at 20 KB/s.
const WRITE_MAX: Duration = Duration::from_secs(900);
/// Bytes of manifest pages that are verified and stored together.
const PAGES_STORED_TOGETHER_BYTES: usize = 256 << 10;
/// Pieces of a stream that are received (a packet each at most) or written at once.
const PIECES: usize = 64;
/// Room for the frame that exceeds the requested bytes.
const FRAME_BYTES_USUAL: usize = HEADER_BYTES + (128 << 10);
/// Frame buffers that are kept while a transfer runs…
const BUFFERS_KEPT: usize = 16;
/// …each of at most this size.
const BUFFER_BYTES_MAX: usize = 2 << 20;

/// An artifact that is open for reading by a peer.
pub struct Opened {
    /// Its digest.
    pub digest: Digest,
    /// Its root manifest.
    pub root: Root,
    /// All its pages: a request may name these.
    pub pages: HashSet<Hash>,
    /// Its entry pages, in order.
    entry_pages: Vec<PageRef>,
    /// Whether its bytes are at another daemon (for the hub: at a site).
    pub relayed: bool,
    /// The children of the pages that were named last: consecutive requests name the same page.
    recent: Mutex<VecDeque<(Hash, Arc<Vec<ChunkRef>>)>>,
    /// The root manifest as it is sent, created by the first request.
    root_frame: OnceCell<Bytes>,
}

impl Opened {
    /// Lists an artifact's pages; reads its index pages only.
    pub fn new(digest: Digest, root: Root, source: &dyn Pages) -> Result<Self, Fault> {
        let mut pages = HashSet::new();
        for_each_page(&root, source, |page| {
            pages.insert(page.id);
            Ok(())
        })?;
        let entry_pages = entry_pages(&root, source)?;
        Ok(Self {
            digest,
            root,
            pages,
            entry_pages,
            relayed: false,
            recent: Mutex::default(),
            root_frame: OnceCell::new(),
        })
    }

    /// The same for an artifact whose bytes are at another daemon.
    pub fn relayed(self, relayed: bool) -> Self {
        Self { relayed, ..self }
    }
}

impl Opened {
    /// The root manifest as one frame.
    async fn root_frame(
        self: &Arc<Self>,
        peer: &Peer,
        library: &dyn Library,
    ) -> Result<Bytes, Fault> {
        let make = || async {
            let _place = library.work_place(peer).await;
            let opened = self.clone();
            blocking(move || {
                Ok(Frame::encode(&Verified::new(opened.root.to_bytes().into())).to_bytes())
            })
            .await
        };
        self.root_frame.get_or_try_init(make).await.cloned()
    }

    /// The entries of a page of this artifact. A page of another artifact gets the same answer as a
    /// missing page.
    async fn children(
        self: &Arc<Self>,
        peer: &Peer,
        page: Hash,
        library: &dyn Library,
    ) -> Result<Arc<Vec<ChunkRef>>, Fault> {
        if !self.pages.contains(&page) {
            return Err(nothing_such());
        }
        if let Some((_, known)) = self.recent.lock().iter().find(|(id, _)| *id == page) {
            return Ok(known.clone());
        }
        let listed = {
            let _place = library.work_place(peer).await;
            let (bytes, opened) = (library.page(self, page).await?, self.clone());
            Arc::new(blocking(move || children(&bytes, &opened.root)).await?)
        };
        let mut recent = self.recent.lock();
        if recent.len() == RECENT_PAGES_MAX {
            recent.pop_front();
        }
        recent.push_back((page, listed.clone()));
        Ok(listed)
    }
}

/// Provides artifacts to peers.
#[async_trait]
pub trait Library: Send + Sync {
    /// The artifact, if this peer may read it. A missing artifact and a forbidden one get the same
    /// answer.
    async fn open(&self, peer: &Peer, digest: Digest) -> Result<Arc<Opened>, Fault>;
    /// Waits until these chunks are available, or returns why they are not: called before a share
    /// of the budget is taken.
    async fn ready(
        &self,
        _peer: &Peer,
        _opened: &Opened,
        _wanted: &Wanted,
        _children: &[Child],
    ) -> Result<(), Fault> {
        Ok(())
    }
    /// Whether this peer may read the content of an opened artifact, and not only its manifest.
    async fn may_read_content(&self, _peer: &Peer, _opened: &Opened) -> Result<bool, Fault> {
        Ok(true)
    }
    /// A share of the daemon's budget for this many bytes, within this peer's part of it.
    async fn share(&self, peer: &Peer, bytes: u64, priority: i32) -> Result<Share, Fault>;
    /// A permit for blocking work of this peer, if that is bounded. It is held during the work, and
    /// never while waiting for anything else of the peer.
    async fn work_place(&self, _peer: &Peer) -> Option<OwnedSemaphorePermit> {
        None
    }
    /// A page's raw bytes.
    async fn page(&self, opened: &Opened, page: Hash) -> Result<Bytes, Fault>;
    /// The frames of these children of an opened artifact, in order, in any number of pieces, each
    /// as soon as it is available.
    async fn frames(
        &self,
        peer: &Peer,
        opened: &Arc<Opened>,
        wanted: &Wanted,
        children: Vec<Child>,
        priority: i32,
    ) -> Result<Pieces, Fault>;
}

/// Consecutive frames, split anywhere.
pub type Pieces = BoxStream<'static, Result<Bytes, Fault>>;

/// A child of a page, or of the root's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Child {
    /// Its index in the list.
    pub index: u32,
    /// The chunk or page.
    pub chunk: ChunkRef,
}

/// Pieces that are available.
pub fn pieces(all: Vec<Bytes>) -> Pieces {
    futures::stream::iter(all.into_iter().map(Ok)).boxed()
}

/// The error for a peer that requests an artifact that is forbidden or missing.
pub fn nothing_such() -> Fault {
    Fault::not_found("the hub has no such artifact for this site").with_reason(Reason::SourceGone)
}

/// Raw bytes of the pages that a root manifest lists.
fn listed_bytes(root: &Root) -> u64 {
    root.pages.iter().map(|page| u64::from(page.len)).sum()
}

/// The pages that a root manifest lists, as what they are: chunks.
fn listed(root: &Root) -> Vec<ChunkRef> {
    root.pages
        .iter()
        .map(|page| ChunkRef {
            id: page.id,
            len: page.len,
        })
        .collect()
}

fn pick(all: &[ChunkRef], ranges: &[(u32, u32)]) -> Result<Vec<Child>, Fault> {
    let mut out = Vec::new();
    for &(first, count) in ranges {
        let range = first as usize..(first as usize).saturating_add(count as usize);
        let part = all
            .get(range)
            .ok_or_else(|| Fault::integrity("a fetch request names more than the page holds"))?;
        out.extend((first..).zip(part).map(|(index, chunk)| Child {
            index,
            chunk: *chunk,
        }));
        if out.len() > FETCH_BATCH_CHUNKS_MAX {
            return Err(Fault::integrity(
                "a fetch request asks for too much at once",
            ));
        }
    }
    Ok(out)
}

/// The frames of a root manifest and of the pages that it lists, concatenated, for a peer that did
/// not request them; `None` when they have more than `most` bytes. The sizes that the root states
/// are not trusted.
pub async fn manifest_frames(
    peer: &Peer,
    library: &dyn Library,
    opened: &Arc<Opened>,
    most: usize,
) -> Result<Option<Vec<u8>>, Fault> {
    let mut out = opened.root_frame(peer, library).await?.to_vec();
    for (index, chunk) in (0..).zip(listed(&opened.root)) {
        if out.len() > most {
            break;
        }
        let mut pieces = library
            .frames(
                peer,
                opened,
                &Wanted::TopPages(Vec::new()),
                vec![Child { index, chunk }],
                PRIORITY_MANIFEST,
            )
            .await?;
        while let Some(piece) = pieces.next().await {
            out.extend_from_slice(&piece?);
        }
    }
    Ok((out.len() <= most).then_some(out))
}

/// Stores the result of [`manifest_frames`]: returns the root, and puts the pages in the store.
/// Blocks.
pub fn take_manifest(mut frames: Bytes, digest: Digest, store: &Store) -> Result<Root, Fault> {
    let mut next = || -> Result<Frame, Fault> {
        let head = frames
            .first_chunk::<HEADER_BYTES>()
            .ok_or(FrameError::Malformed)?;
        let header = Header::parse(head)?;
        if frames.len() < header.frame_len() {
            return Err(FrameError::Malformed.into());
        }
        frame(header, frames.split_to(header.frame_len()))
    };
    let root = parse_root(&next()?, digest)?;
    for page in &root.pages {
        let frame = next()?;
        let raw = frame.verify(page.id, page.len)?;
        store.put(&frame.fit_to_store(&raw))?;
    }
    if !frames.is_empty() {
        return Err(Fault::integrity(
            "a pushed manifest has more frames than pages",
        ));
    }
    Ok(root)
}

fn parse_root(frame: &Frame, digest: Digest) -> Result<Root, Fault> {
    let len = frame.raw_len();
    if len as usize > ROOT_BYTES_MAX {
        return Err(Fault::integrity("the root manifest is larger than allowed"));
    }
    Root::parse(&frame.verify(digest, len)?.bytes, digest)
}

/// Takes the frames of these pages from an answer, verifies them and puts them into the store.
async fn store_pages(frames: &mut Frames, pages: Vec<PageRef>, store: &Store) -> Result<(), Fault> {
    let mut pages = pages.into_iter();
    while pages.len() > 0 {
        let (mut some, mut bytes) = (Vec::new(), 0);
        while bytes < PAGES_STORED_TOGETHER_BYTES
            && let Some(page) = pages.next()
        {
            let frame = frames.next().await?;
            bytes += frame.len();
            some.push((page, frame));
        }
        let store = store.clone();
        blocking(move || {
            some.into_iter().try_for_each(|(page, frame)| {
                let raw = frame.verify(page.id, page.len)?;
                store.put(&frame.fit_to_store(&raw)).map(drop)
            })
        })
        .await?;
    }
    Ok(())
}

/// Answers one fetch stream; its kind byte was read already.
pub async fn serve(mut send: SendHalf, mut recv: RecvHalf, peer: &Peer, library: &dyn Library) {
    if let Err(fault) = answer(&mut send, &mut recv, peer, library).await {
        tracing::debug!(%peer, error = %fault, "a fetch was refused");
        let _ = send.write_bytes(Frame::fault(&fault).to_bytes()).await;
    }
    let _ = send.finish();
}

async fn answer(
    send: &mut SendHalf,
    recv: &mut RecvHalf,
    peer: &Peer,
    library: &dyn Library,
) -> Result<(), Fault> {
    let request = timeout(
        SILENCE_MAX,
        wire::receive_bytes(recv, FETCH_REQUEST_BYTES_MAX),
    )
    .await;
    let request = request.map_err(|_| Fault::unreachable("a fetch request did not arrive"))??;
    let mut request = FetchRequest::parse(&request)?;
    // Answers have the same order as requests: manifests and small artifacts before large ones;
    // control messages before all of them.
    request.priority = request.priority.clamp(0, PRIORITY_MANIFEST);
    send.set_priority(request.priority);
    let opened = library.open(peer, request.digest).await?;
    for wanted in &request.wants {
        let children = match wanted {
            Wanted::Root | Wanted::RootAndPages(_) => {
                let root = opened.root_frame(peer, library).await?;
                let _share = library
                    .share(peer, root.len() as u64, request.priority)
                    .await?;
                let sent = timeout(WRITE_MAX, send.write_bytes(root)).await;
                sent.map_err(|_| takes_nothing(peer))??;
                match wanted {
                    Wanted::RootAndPages(max)
                        if listed_bytes(&opened.root) <= (*max).min(FETCH_BATCH_BYTES) =>
                    {
                        pick(
                            &listed(&opened.root),
                            &[(0, opened.root.pages.len() as u32)],
                        )?
                    }
                    _ => continue,
                }
            }
            Wanted::TopPages(ranges) => pick(&listed(&opened.root), ranges)?,
            Wanted::Children { page, ranges } => {
                let children = pick(&opened.children(peer, *page, library).await?, ranges)?;
                // Everything that is not a page of the manifest is content.
                let has_content = children
                    .iter()
                    .any(|child| !opened.pages.contains(&child.chunk.id));
                if has_content && !library.may_read_content(peer, &opened).await? {
                    return Err(nothing_such());
                }
                children
            }
            Wanted::Delta {
                ranges,
                base,
                against,
            } => {
                pages::answer(send, peer, library, &opened, ranges, *base, *against).await?;
                continue;
            }
        };
        let mut children = children.as_slice();
        while !children.is_empty() {
            let (mut bytes, mut count) = (0, 0);
            while count < children.len() && bytes < ANSWER_BYTES {
                bytes += u64::from(children[count].chunk.len);
                count += 1;
            }
            let (now, later) = children.split_at(count);
            children = later;
            library.ready(peer, &opened, wanted, now).await?;
            // Bytes that were read and not yet sent hold a share of the daemon's budget.
            let _share = library.share(peer, bytes, request.priority).await?;
            // Available pieces are written together: QUIC is woken once for all of them.
            let mut pieces = library
                .frames(peer, &opened, wanted, now.to_vec(), request.priority)
                .await?
                .ready_chunks(PIECES);
            while let Some(some) = pieces.next().await {
                let mut end = None;
                let mut some: Vec<Bytes> = some
                    .into_iter()
                    .map_while(|piece| piece.map_err(|fault| end = Some(fault)).ok())
                    .collect();
                let sent = timeout(WRITE_MAX, send.write_many(&mut some)).await;
                sent.map_err(|_| takes_nothing(peer))??;
                if let Some(fault) = end {
                    return Err(fault);
                }
            }
        }
    }
    Ok(())
}

fn takes_nothing(peer: &Peer) -> Fault {
    Fault::unreachable(format!("{peer} takes nothing from this stream"))
}

/// Requests one artifact from one peer.
#[derive(Clone)]
pub struct Fetcher {
    link: Link,
    digest: Digest,
    wire: Arc<AtomicU64>,
    /// How long an answer may make no progress.
    idle_max: Duration,
}

/// The frames of one request, one by one or several at a time.
pub struct Frames {
    link: Link,
    recv: RecvHalf,
    wire: Arc<AtomicU64>,
    /// How long this stream may deliver less than [`FETCH_PROGRESS_BYTES`] while it is awaited…
    idle_max: Duration,
    /// …how long it was awaited since its last progress, and the bytes since then.
    waited: Duration,
    brought: u64,
    /// Received bytes that are not part of a frame yet.
    pieces: VecDeque<Bytes>,
    /// Why the answer ended early, reported after the frames before it were taken.
    ended: Option<Fault>,
    /// Holds the request's stream until the answer is read…
    _send: SendHalf,
    /// …and its permit.
    _want: Want,
}

fn silent() -> Fault {
    Fault::unreachable(format!(
        "the connection was silent for {} s",
        SILENCE_MAX.as_secs()
    ))
    .with_reason(Reason::HubUnreachable)
}

fn stalled(idle_max: Duration) -> Fault {
    broken(Fault::unreachable(format!(
        "an answer made no progress for {} s, although the connection works",
        idle_max.as_secs()
    )))
}

/// A broken connection is not a fault of the transfer, which resumes over the next one.
fn broken(fault: Fault) -> Fault {
    Fault {
        retry: Retry::Backoff,
        ..fault.with_reason(Reason::HubUnreachable)
    }
}

impl Fetcher {
    /// A fetcher of this artifact over this link; `wire` counts the transmitted bytes.
    pub fn new(link: Link, digest: Digest, wire: Arc<AtomicU64>) -> Self {
        Self {
            link,
            digest,
            wire,
            idle_max: FETCH_IDLE_MAX,
        }
    }

    /// The same, with a deadline for an answer without progress, whatever else the connection
    /// delivers.
    pub fn with_idle_max(self, idle_max: Duration) -> Self {
        Self { idle_max, ..self }
    }

    /// The round-trip time of the connection.
    pub fn rtt(&self) -> Duration {
        self.link.rtt()
    }

    /// Sends a request. The frames come in its order.
    pub async fn ask(&self, wants: Vec<Wanted>, priority: i32) -> Result<Frames, Fault> {
        let request = FetchRequest {
            digest: self.digest,
            priority,
            wants,
        };
        let bytes = request.to_bytes()?;
        let (mut send, recv) = self.link.open(priority).await.map_err(broken)?;
        let mut out = BytesMut::with_capacity(bytes.len() + 5);
        out.extend_from_slice(&[FETCH]);
        out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        out.extend_from_slice(&bytes);
        self.wire.fetch_add(out.len() as u64, Ordering::Relaxed);
        let want = self.link.want();
        send.write_bytes(out.freeze()).await.map_err(broken)?;
        send.finish().map_err(broken)?;
        Ok(Frames {
            link: self.link.clone(),
            recv,
            wire: self.wire.clone(),
            idle_max: self.idle_max,
            waited: Duration::ZERO,
            brought: 0,
            pieces: VecDeque::new(),
            ended: None,
            _send: send,
            _want: want,
        })
    }

    /// The root manifest, checked against its digest.
    pub async fn root(&self) -> Result<Root, Fault> {
        let mut frames = self.ask(vec![Wanted::Root], PRIORITY_MANIFEST).await?;
        self.next_root(&mut frames).await
    }

    /// The root manifest and, if they are small, the pages that it lists, which go to the store:
    /// one round trip instead of two. For a site that has no other version, and so none of these
    /// pages.
    pub async fn root_and_pages(&self, store: &Store) -> Result<Root, Fault> {
        pages::check_room(store).await?;
        let mut frames = self
            .ask(
                vec![Wanted::RootAndPages(FETCH_BATCH_BYTES)],
                PRIORITY_MANIFEST,
            )
            .await?;
        let root = self.next_root(&mut frames).await?;
        if listed_bytes(&root) <= FETCH_BATCH_BYTES {
            store_pages(&mut frames, root.pages.clone(), store).await?;
        }
        Ok(root)
    }

    async fn next_root(&self, frames: &mut Frames) -> Result<Root, Fault> {
        let (frame, digest) = (frames.next().await?, self.digest);
        blocking(move || parse_root(&frame, digest)).await
    }
}

impl Frames {
    /// The next frame as the peer sent it: its checksum and its hash are not verified yet;
    /// [`Frame::verify`] does that.
    pub async fn next(&mut self) -> Result<Frame, Fault> {
        let mut bytes = Vec::new();
        let (header, _) = self.append(&mut bytes).await?;
        frame(header, bytes.into())
    }

    /// The next frames, up to `bytes` and at most `count`, in one buffer of `buffers`. When the
    /// answer ends early, the frames before the end are returned first.
    pub async fn some(
        &mut self,
        count: usize,
        bytes: usize,
        buffers: &Buffers,
    ) -> Result<Vec<Frame>, Fault> {
        if let Some(fault) = self.ended.take() {
            return Err(fault);
        }
        let mut buffer = buffers.take(bytes + FRAME_BYTES_USUAL);
        buffer.clear();
        buffer.reserve(bytes + FRAME_BYTES_USUAL);
        let mut found: Vec<(Header, Range<usize>)> = Vec::new();
        while found.len() < count && buffer.len() < bytes {
            match self.append(&mut buffer).await {
                Ok(frame) => found.push(frame),
                Err(fault) if found.is_empty() => return Err(fault),
                Err(fault) => {
                    self.ended = Some(fault);
                    break;
                }
            }
        }
        let all = buffers.lend(buffer);
        found
            .into_iter()
            .map(|(header, range)| frame(header, all.slice(range)))
            .collect()
    }

    /// Appends one frame to the buffer.
    async fn append(&mut self, buffer: &mut Vec<u8>) -> Result<(Header, Range<usize>), Fault> {
        let start = buffer.len();
        let mut head = [0; HEADER_BYTES];
        self.take(HEADER_BYTES, buffer).await?;
        head.copy_from_slice(&buffer[start..]);
        let header = Header::parse(&head).map_err(Fault::from)?;
        buffer.reserve(header.stored_len as usize);
        self.take(header.stored_len as usize, buffer).await?;
        self.wire
            .fetch_add(header.frame_len() as u64, Ordering::Relaxed);
        if header.is_fault() {
            // It ends the answer.
            frame(header, Bytes::copy_from_slice(&buffer[start..]))?;
        }
        Ok((header, start..buffer.len()))
    }

    /// Moves exactly `len` bytes from the connection to the end of the buffer: one copy, without
    /// zeroing before.
    async fn take(&mut self, mut len: usize, buffer: &mut Vec<u8>) -> Result<(), Fault> {
        while len > 0 {
            let Some(first) = self.pieces.front_mut() else {
                self.read().await?;
                continue;
            };
            let part = first.len().min(len);
            buffer.extend_from_slice(&first[..part]);
            first.advance(part);
            len -= part;
            if first.is_empty() {
                self.pieces.pop_front();
            }
        }
        Ok(())
    }

    async fn read(&mut self) -> Result<(), Fault> {
        let mut pieces = [const { Bytes::new() }; PIECES];
        let begun = Instant::now();
        let count = {
            let read = self.recv.read_chunks(&mut pieces);
            tokio::pin!(read);
            // The bytes of all streams of the connection at their last progress, and the time of
            // that.
            let mut seen: Option<(u64, Instant)> = None;
            loop {
                let look_after =
                    LOOK_EVERY.min(self.idle_max.saturating_sub(self.waited + begun.elapsed()));
                if let Ok(result) = timeout(look_after, &mut read).await {
                    break result.map_err(broken)?;
                }
                if self.waited + begun.elapsed() >= self.idle_max {
                    // Only this answer is given up: the connection may serve others.
                    return Err(stalled(self.idle_max));
                }
                // On a slow connection this stream may wait long behind others: a connection is
                // silent only if none of its streams delivers.
                let brought = self.link.stream_bytes().1;
                match seen {
                    Some((before, since)) if brought == before => {
                        if since.elapsed() >= SILENCE_MAX {
                            // Packets may still be answered; the next request opens a new
                            // connection.
                            self.link.close("it made no progress for too long");
                            return Err(silent());
                        }
                    }
                    _ => seen = Some((brought, Instant::now())),
                }
            }
        };
        let Some(count) = count else {
            return Err(broken(Fault::unreachable(
                "the answer to a fetch ended too early",
            )));
        };
        self.waited += begun.elapsed();
        self.brought += pieces
            .iter()
            .take(count)
            .map(|piece| piece.len() as u64)
            .sum::<u64>();
        if self.brought >= FETCH_PROGRESS_BYTES {
            (self.waited, self.brought) = (Duration::ZERO, 0);
        }
        self.pieces.extend(
            pieces
                .into_iter()
                .take(count)
                .filter(|piece| !piece.is_empty()),
        );
        Ok(())
    }
}

fn frame(header: Header, bytes: Bytes) -> Result<Frame, Fault> {
    match Frame::from_line(header, bytes) {
        Err(FrameError::Fault(fault)) => Err(fault),
        other => Ok(other?),
    }
}

/// Frame buffers of one transfer.
pub fn buffers() -> Buffers {
    Buffers::new(BUFFERS_KEPT, FRAME_BYTES_USUAL, BUFFER_BYTES_MAX)
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

#[cfg(test)]
mod tests;

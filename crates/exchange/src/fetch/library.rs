//! What a daemon provides to the peers that fetch from it: the trait [`Library`], and an artifact
//! that is open for reading.
//!
//! The hub, the relay and a site implement [`Library`]; `answer` calls it. Open artifacts and the
//! pages that were read last are in memory only.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use parking_lot::Mutex;
use tokio::sync::{OnceCell, OwnedSemaphorePermit};

use super::answer::ANSWER_BYTES;
use base::blocking::blocking;
use base::budget::Share;
use base::fault::{Fault, Reason};
use base::peer::Peer;
use content::chunk::Hash;
use content::frame::{Frame, Verified};
use content::manifest::{
    ChunkRef, Digest, PageRef, Pages, Root, children, entry_pages, for_each_page,
};
use model::protocol::Wanted;

/// Parsed pages cached for each open artifact: about 1 MiB.
const RECENT_PAGES_MAX: usize = 64;

/// An artifact that is open for reading by a peer.
pub struct Opened {
    /// Its digest.
    pub digest: Digest,
    /// Its root manifest.
    pub root: Root,
    /// All its pages: a request may name these.
    pub pages: HashSet<Hash>,
    /// Its entry pages, in order.
    pub(super) entry_pages: Vec<PageRef>,
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
    pub(super) async fn root_frame(
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
    pub(super) async fn children(
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
    /// Verifies the copies of these chunks, which the peer received and refused. A damaged copy is
    /// not sent again: `frames` takes the chunk from elsewhere, or fails.
    async fn recheck(
        &self,
        _peer: &Peer,
        _opened: &Opened,
        _children: &[Child],
    ) -> Result<(), Fault> {
        Ok(())
    }
    /// Raw bytes that are read for one answer before they are sent. The buffer that holds them is
    /// freed when the peer has acknowledged the last of them, so with many peers they must be few.
    fn answer_bytes(&self) -> u64 {
        ANSWER_BYTES
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

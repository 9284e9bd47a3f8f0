//! The artifacts of the hub: takes them into the catalogue, and gives their manifests and content
//! to peers that may read them.
//!
//! Sessions, uploads, runs and jobs call it. The list of artifacts open for reading is in memory
//! only.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;

use super::entitlement::Entitlement;
use super::peer_budgets::PeerBudgets;
use super::relay::RelayKeeper;
use base::blocking::{Stop, blocking, cancellable};
use base::budget::Share;
use base::fault::{Code, Fault};
use base::names::{ArtifactRef, SiteName};
use base::peer::Peer;
use content::chunk::Hash;
use content::manifest::{ChunkRef, Digest, Pages, Root, Until};
use content::store::Store;
use exchange::fetch::{Child, Library, Opened, Pieces, nothing_such, pieces};
use exchange::relay::Of;
use model::protocol::Wanted;
use state::Catalogue;

/// Artifacts kept open for peers that read them.
const OPENED_MAX: usize = 64;

/// The artifacts of the hub. Cheap to clone.
#[derive(Clone)]
pub(super) struct HubLibrary {
    inner: Arc<Inner>,
}

struct Inner {
    catalogue: Catalogue,
    store: Store,
    entitlement: Entitlement,
    budgets: Arc<PeerBudgets>,
    relay: RelayKeeper,
    opened: Mutex<Vec<Arc<Opened>>>,
}

impl HubLibrary {
    /// Nothing is open yet.
    pub(super) fn new(
        catalogue: Catalogue,
        store: Store,
        entitlement: Entitlement,
        budgets: Arc<PeerBudgets>,
        relay: RelayKeeper,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                catalogue,
                store,
                entitlement,
                budgets,
                relay,
                opened: Mutex::default(),
            }),
        }
    }

    /// Takes an artifact into the catalogue that was published at a site, or whose content is in
    /// the hub's store now. `false`: it was there already.
    pub(super) async fn register(
        &self,
        origin: Option<&SiteName>,
        artifact: &ArtifactRef,
        root: &Root,
    ) -> Result<bool, Fault> {
        let catalogue = &self.inner.catalogue;
        let added = catalogue.add_artifact(artifact, root, origin).await?;
        if !added && origin.is_none() {
            // A site may have published the same before: the hub has all of it now, and asks the
            // site no more.
            catalogue.take_over(artifact).await?;
            self.forget(root.digest());
        }
        Ok(added)
    }

    /// What was opened by this digest is looked at again: where its content is has changed.
    pub(super) fn forget(&self, digest: Digest) {
        self.inner
            .opened
            .lock()
            .retain(|opened| opened.digest != digest);
    }
}

#[async_trait]
impl Library for HubLibrary {
    async fn open(&self, peer: &Peer, digest: Digest) -> Result<Arc<Opened>, Fault> {
        let inner = &self.inner;
        if !inner.entitlement.may_read_manifest(peer, digest).await? {
            return Err(nothing_such());
        }
        if let Some(opened) = inner.opened.lock().iter().find(|o| o.digest == digest) {
            return Ok(opened.clone());
        }
        let rows = inner.catalogue.all_by_digest(digest).await?;
        let relayed = rows.iter().all(|row| row.origin.is_some());
        let row = rows.into_iter().next().ok_or_else(nothing_such)?;
        let store = inner.store.clone();
        let place = self.work_place(peer).await;
        let open = move |stop: &Stop| Opened::new(digest, row.root, &Until::new(&store, stop));
        let opened = Arc::new(cancellable(place, open).await?.relayed(relayed));
        let mut cache = inner.opened.lock();
        if cache.len() >= OPENED_MAX {
            cache.remove(0);
        }
        cache.push(opened.clone());
        Ok(opened)
    }

    async fn may_read_content(&self, peer: &Peer, opened: &Opened) -> Result<bool, Fault> {
        let entitlement = &self.inner.entitlement;
        entitlement.may_read_content(peer, opened.digest).await
    }

    fn answer_bytes(&self) -> u64 {
        self.inner.budgets.answer_bytes()
    }

    async fn share(&self, peer: &Peer, bytes: u64, priority: i32) -> Result<Share, Fault> {
        self.inner.budgets.content(peer, bytes, priority).await
    }

    async fn work_place(&self, peer: &Peer) -> Option<OwnedSemaphorePermit> {
        self.inner.budgets.work_place(peer).await
    }

    async fn page(&self, _opened: &Opened, page: Hash) -> Result<Bytes, Fault> {
        let store = self.inner.store.clone();
        blocking(move || store.page(page)).await
    }

    async fn ready(
        &self,
        peer: &Peer,
        opened: &Opened,
        wanted: &Wanted,
        children: &[Child],
    ) -> Result<(), Fault> {
        match content_page(opened, wanted, children) {
            Some(_) if opened.relayed => {
                self.inner.relay.ready(peer, opened.digest, children).await
            }
            _ => Ok(()),
        }
    }

    async fn recheck(&self, peer: &Peer, opened: &Opened, children: &[Child]) -> Result<(), Fault> {
        let ids: Vec<Hash> = children.iter().map(|child| child.chunk.id).collect();
        let relay = self.inner.relay.relay().clone();
        let place = self.work_place(peer).await;
        let bad = cancellable(place, move |_| relay.recheck(&ids)).await?;
        if bad > 0 {
            let rows = self.inner.catalogue.all_by_digest(opened.digest).await?;
            let artifacts: Vec<String> = rows.iter().map(|row| row.artifact.to_string()).collect();
            tracing::error!(
                %peer,
                artifacts = artifacts.join(", "),
                bad,
                "chunks that a site refused are damaged at the hub; they were removed from the index"
            );
        }
        Ok(())
    }

    async fn frames(
        &self,
        peer: &Peer,
        opened: &Arc<Opened>,
        wanted: &Wanted,
        children: Vec<Child>,
        priority: i32,
    ) -> Result<Pieces, Fault> {
        let page = content_page(opened, wanted, &children);
        let of = page.map(|page| Of {
            digest: opened.digest,
            page,
            priority,
        });
        if let Some(of) = of.filter(|_| opened.relayed) {
            return self.inner.relay.frames(peer, of, children).await;
        }
        let chunks: Arc<[ChunkRef]> = children.iter().map(|c| c.chunk).collect();
        match (self.read(peer, &chunks, of.is_some()).await, of) {
            // The store has lost a chunk, or has just found it damaged. Another site may have it.
            (Err(fault), Some(of)) if fault.code == Code::Integrity => {
                match self.inner.relay.relay().restore(peer, of, &children).await {
                    Ok(0) => return Err(fault),
                    Ok(restored) => {
                        tracing::warn!(%peer, digest = %opened.digest, restored, error = %fault, "chunks that the hub had lost were fetched from a site and stored again");
                    }
                    Err(not) => {
                        tracing::warn!(digest = %opened.digest, error = %not, "chunks that the hub has lost could not be fetched from a site");
                        return Err(fault);
                    }
                }
                self.read(peer, &chunks, true).await
            }
            (read, _) => read,
        }
        .map(pieces)
    }
}

impl HubLibrary {
    /// Reads frames of the hub's own store. A peer verifies each chunk of content; pages are also
    /// summed here, because a peer without one page can do nothing.
    async fn read(
        &self,
        peer: &Peer,
        chunks: &Arc<[ChunkRef]>,
        is_content: bool,
    ) -> Result<Vec<Bytes>, Fault> {
        let (store, chunks) = (self.inner.store.clone(), chunks.clone());
        let place = self.work_place(peer).await;
        cancellable(place, move |_| match is_content {
            true => store.read_to_send(&chunks),
            false => store.read_listed(&chunks),
        })
        .await
    }
}

/// The page whose chunks of content are asked for. The pages of an artifact are always in the hub's
/// own store.
fn content_page(opened: &Opened, wanted: &Wanted, children: &[Child]) -> Option<Hash> {
    match wanted {
        Wanted::Children { page, .. } | Wanted::Refused { page, .. } => Some(*page).filter(|_| {
            !children
                .iter()
                .any(|child| opened.pages.contains(&child.chunk.id))
        }),
        _ => None,
    }
}

//! Fetching: one side requests chunks by their position in a manifest, the other sends the stored
//! frames unchanged.
//!
//! Both sides of the fetch stream are here: [`serve`] answers from a [`Library`]; [`Fetcher`] sends
//! requests and receives [`Frames`]. `pages` holds what is specific to manifest pages. Received data
//! is not trusted: the requester verifies every frame against the hash in its manifest.

mod answer;
mod frames;
mod library;
mod pages;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use crate::wire::PRIORITY_MANIFEST;
use base::blocking::blocking;
use base::fault::Fault;
use base::limits::{FETCH_BATCH_BYTES, FETCH_IDLE_MAX, ROOT_BYTES_MAX};
use content::frame::{Frame, FrameError, HEADER_BYTES, Header};
use content::manifest::{ChunkRef, Digest, PageRef, Root};
use content::store::Store;
use frames::{Stream, broken, frame};
use model::protocol::{FETCH, FetchRequest, Wanted};
use transport::Link;

pub use answer::{manifest_frames, serve};
pub use frames::{Frames, buffers};
pub use library::{Child, Library, Opened, Pieces, nothing_such, pieces};

/// Bytes of manifest pages that are verified and stored together.
const PAGES_STORED_TOGETHER_BYTES: usize = 256 << 10;
/// Pieces of a stream that are received (a packet each at most) or written at once.
const PIECES: usize = 64;

/// Requests one artifact from one peer.
#[derive(Clone)]
pub struct Fetcher {
    link: Link,
    digest: Digest,
    wire: Arc<AtomicU64>,
    /// How long an answer may make no progress.
    idle_max: Duration,
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
        let stream = Stream {
            link: self.link.clone(),
            send,
            recv,
            want,
        };
        Ok(Frames::new(stream, self.wire.clone(), self.idle_max))
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

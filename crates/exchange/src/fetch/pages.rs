//! How manifest pages are transferred: plain, or as a delta against the pages of another version
//! that the requester holds.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use tokio::time::timeout;

use super::answer::{WRITE_MAX, reads_nothing};
use super::{Fetcher, Library, Opened, Ranges, store_pages};
use crate::wire::PRIORITY_MANIFEST;
use base::blocking::{Stop, blocking, cancellable};
use base::fault::{Fault, Reason};
use base::limits::{
    CHUNK_BYTES_MAX, DIFFERENCE_BASE_BYTES_MAX, FETCH_BATCH_BYTES, FETCH_BATCH_CHUNKS_MAX,
};
use base::peer::Peer;
use content::chunk::Hash;
use content::frame::{Frame, Verified};
use content::manifest::delta::{Alignment, compress, restore};
use content::manifest::{
    Digest, Listed, PageRef, Pages, Root, Until, entry_pages, level_below, top_level,
};
use content::store::Store;
use model::protocol::Wanted;
use transport::SendHalf;

/// Manifest requests in flight.
const IN_FLIGHT: usize = 8;
/// Raw bytes of pages that one request asks for, about.
const REQUEST_BYTES: u64 = FETCH_BATCH_BYTES / 2;

/// Answers [`Wanted::Delta`] with one frame.
pub(super) async fn answer(
    send: &mut SendHalf,
    peer: &Peer,
    library: &dyn Library,
    opened: &Opened,
    ranges: &[(u32, u32)],
    base: Digest,
    against: (u32, u32),
) -> Result<(), Fault> {
    let base = library.open(peer, base).await?;
    let (pages, old) = (
        pick(&opened.entry_pages, ranges)?,
        pick(&base.entry_pages, &[against])?,
    );
    let bytes = |pages: &[PageRef]| pages.iter().map(|p| u64::from(p.len)).sum::<u64>();
    if bytes(&pages) > CHUNK_BYTES_MAX as u64 || bytes(&old) > DIFFERENCE_BASE_BYTES_MAX {
        return Err(too_much());
    }
    let share = library
        .share(peer, bytes(&pages) + bytes(&old), PRIORITY_MANIFEST)
        .await?;
    let place = library.work_place(peer).await;
    let (pages, old) = (
        read(library, opened, &pages).await?,
        read(library, &base, &old).await?,
    );
    let (frame, _share) = cancellable(place, move |_| {
        let raw_len = pages.iter().map(Bytes::len).sum();
        Ok((Frame::delta(raw_len, compress(&old, &pages)?), share))
    })
    .await?;
    let sent = timeout(WRITE_MAX, send.write_bytes(frame.to_bytes())).await;
    sent.map_err(|_| reads_nothing(peer))?
}

fn too_much() -> Fault {
    Fault::integrity("a fetch request asks for too much at once")
}

fn pick(all: &[PageRef], ranges: &[(u32, u32)]) -> Result<Vec<PageRef>, Fault> {
    let mut out = Vec::new();
    for &(first, count) in ranges {
        let range = first as usize..(first as usize).saturating_add(count as usize);
        out.extend_from_slice(
            all.get(range).ok_or_else(|| {
                Fault::integrity("a fetch request names more pages than there are")
            })?,
        );
        if out.len() > FETCH_BATCH_CHUNKS_MAX {
            return Err(too_much());
        }
    }
    Ok(out)
}

async fn read(library: &dyn Library, of: &Opened, pages: &[PageRef]) -> Result<Vec<Bytes>, Fault> {
    let mut out = Vec::with_capacity(pages.len());
    for page in pages {
        out.push(library.page(of, page.id).await?);
    }
    Ok(out)
}

/// A version that the requester holds, for deltas.
struct Base {
    digest: Digest,
    pages: Vec<PageRef>,
    alignment: Alignment,
}

/// Fails when the store has no room for pages, before they are sent.
pub(super) async fn check_room(store: &Store) -> Result<(), Fault> {
    let store = store.clone();
    blocking(move || store.check_room()).await
}

impl Fetcher {
    /// Fetches every page of the manifest that the store lacks. `base` is the root manifest of a
    /// similar artifact, whose pages the store probably holds: then only the delta is transferred.
    pub async fn pages(
        &self,
        root: &Root,
        base: Option<&Root>,
        store: &Store,
    ) -> Result<(), Fault> {
        let losses = store.losses();
        let mut level = top_level(root)?;
        for depth in (0..=root.depth).rev() {
            if depth == 0 {
                if let Some(base) = base {
                    self.differences(&level, base, store).await?;
                }
                self.fetch_level(&level, store).await?;
                break;
            }
            self.fetch_level(&level, store).await?;
            let (above, pages) = (level, store.clone());
            let below = move |stop: &Stop| level_below(&above, &Until::new(&pages, stop));
            level = cancellable((), below).await?;
        }
        let store = store.clone();
        blocking(move || store.flush_since(losses)).await
    }

    /// Fetches missing entry pages as deltas. [`Fetcher::fetch_level`] fetches the pages that this
    /// leaves.
    async fn differences(&self, level: &[Listed], base: &Root, store: &Store) -> Result<(), Fault> {
        let all: Vec<PageRef> = level.iter().flat_map(|(_, pages)| pages).copied().collect();
        let (root, pages) = (base.clone(), store.clone());
        let prepared = cancellable((), move |stop| {
            let old = entry_pages(&root, &Until::new(&pages, stop))?;
            let here = pages.has_many(&old.iter().map(|p| p.id).collect::<Vec<_>>())?;
            if !here.into_iter().all(|here| here) {
                return Err(Fault::not_found("some pages of the older version are gone"));
            }
            let lacking = pages
                .has_many(&all.iter().map(|p| p.id).collect::<Vec<_>>())?
                .into_iter()
                .map(|here| !here)
                .collect::<Vec<_>>();
            let base = Base {
                digest: root.digest(),
                alignment: Alignment::new(&old, &all),
                pages: old,
            };
            Ok((Arc::new(base), requests(&all, &lacking)))
        });
        let Ok((base, requests)) = prepared.await else {
            return Ok(());
        };
        if !requests.is_empty() {
            check_room(store).await?;
        }
        let ask = |request| self.delta(request, base.clone(), store.clone());
        let mut running =
            futures::stream::iter(requests.into_iter().map(ask)).buffer_unordered(IN_FLIGHT);
        while let Some(result) = running.next().await {
            match result {
                Ok(()) => {}
                Err(fault) if fault.reason == Reason::HubUnreachable => return Err(fault),
                // The hub does not serve this base to this site, or the site holds another one:
                // plain pages are fetched.
                Err(fault) => {
                    tracing::debug!(error = %fault, "manifest pages could not be had as a delta");
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn delta(&self, request: Request, base: Arc<Base>, store: Store) -> Result<(), Fault> {
        let old = base.alignment.beside(&request.span);
        let against = (old.start as u32, old.len() as u32);
        let wanted = Wanted::Delta {
            ranges: request.ranges.0,
            base: base.digest,
            against,
        };
        let frame = self
            .ask(vec![wanted], PRIORITY_MANIFEST)
            .await?
            .next()
            .await?;
        blocking(move || {
            let old: Vec<Bytes> = base.pages[old]
                .iter()
                .map(|page| store.page(page.id))
                .collect::<Result<_, _>>()?;
            let lens: Vec<u32> = request.pages.iter().map(|page| page.len).collect();
            let compressed = frame.compressed(lens.iter().map(|len| *len as usize).sum())?;
            for (page, bytes) in request.pages.iter().zip(restore(&old, &compressed, &lens)?) {
                store.put(&Frame::encode(&Verified::check(page.id, bytes)?))?;
            }
            Ok(())
        })
        .await
    }

    async fn fetch_level(&self, level: &[Listed], store: &Store) -> Result<(), Fault> {
        let mut requests: Vec<(Vec<Wanted>, Vec<PageRef>)> = Vec::new();
        let mut seen = HashSet::new();
        let ids = |pages: &[PageRef]| pages.iter().map(|page| page.id).collect::<Vec<Hash>>();
        let (asked, looked) = (level.iter().map(|(_, pages)| ids(pages)), store.clone());
        let asked: Vec<Vec<Hash>> = asked.collect();
        let found = move || asked.iter().map(|ids| looked.has_many(ids)).collect();
        let found: Vec<Vec<bool>> = blocking(found).await?;
        for ((parent, pages), here) in level.iter().zip(found) {
            let (mut ranges, mut lacking, mut bytes) = (Ranges::default(), Vec::new(), 0);
            let wanted = |ranges: Ranges| match parent {
                None => Wanted::TopPages(ranges.0),
                Some(page) => Wanted::Children {
                    page: *page,
                    ranges: ranges.0,
                },
            };
            for (index, page) in pages.iter().enumerate() {
                if here[index] || !seen.insert(page.id) {
                    continue;
                }
                ranges.push(index as u32);
                lacking.push(*page);
                bytes += u64::from(page.len);
                if bytes >= REQUEST_BYTES || lacking.len() >= FETCH_BATCH_CHUNKS_MAX {
                    requests.push((
                        vec![wanted(std::mem::take(&mut ranges))],
                        std::mem::take(&mut lacking),
                    ));
                    bytes = 0;
                }
            }
            if !lacking.is_empty() {
                requests.push((vec![wanted(ranges)], lacking));
            }
        }
        if !requests.is_empty() {
            check_room(store).await?;
        }
        let fetch = |(wants, pages): (Vec<Wanted>, Vec<PageRef>)| async move {
            let mut frames = self.ask(wants, PRIORITY_MANIFEST).await?;
            store_pages(&mut frames, pages, store).await
        };
        let mut running =
            futures::stream::iter(requests.into_iter().map(fetch)).buffer_unordered(IN_FLIGHT);
        while let Some(result) = running.next().await {
            result?;
        }
        Ok(())
    }
}

/// Pages that are requested together, as numbers in the list of all pages.
struct Request {
    ranges: Ranges,
    pages: Vec<PageRef>,
    /// From the first to after the last.
    span: Range<usize>,
}

fn requests(all: &[PageRef], lacking: &[bool]) -> Vec<Request> {
    let mut out: Vec<Request> = Vec::new();
    let mut seen = HashSet::new();
    let mut bytes = 0;
    for (number, page) in all.iter().enumerate() {
        if !lacking[number] || !seen.insert(page.id) {
            continue;
        }
        // Pages far behind the last one would be compared with other old pages.
        if let Some(last) = out.last_mut()
            && bytes < REQUEST_BYTES
            && last.pages.len() < FETCH_BATCH_CHUNKS_MAX
            && number - last.span.end < FETCH_BATCH_CHUNKS_MAX / 8
        {
            last.ranges.push(number as u32);
            last.pages.push(*page);
            last.span.end = number + 1;
        } else {
            bytes = 0;
            let mut ranges = Ranges::default();
            ranges.push(number as u32);
            out.push(Request {
                ranges,
                pages: vec![*page],
                span: number..number + 1,
            });
        }
        bytes += u64::from(page.len);
    }
    out
}

//! Answers fetch requests from a [`Library`].
//!
//! The daemons call [`serve`] for each fetch stream that a peer opens, and [`manifest_frames`] for a
//! manifest that they send without a request. Nothing is kept between two requests.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use tokio::time::{Instant, timeout};

use super::frames::CHECK_EVERY;
use super::library::{Child, Library, Opened, nothing_such};
use super::{PIECES, listed, listed_bytes, pages};
use crate::wire::{self, PRIORITY_MANIFEST};
use base::fault::{Fault, Reason, Retry};
use base::limits::{
    ANSWER_SILENT_MAX, FETCH_BATCH_BYTES, FETCH_BATCH_CHUNKS_MAX, FETCH_REQUEST_BYTES_MAX,
    REFUSED_CHUNKS_MAX, SILENCE_MAX,
};
use base::peer::Peer;
use content::frame::Frame;
use content::manifest::ChunkRef;
use model::protocol::{FetchRequest, Wanted};
use transport::{Link, RecvHalf, SendHalf};

/// Raw bytes that are read from the store for one answer before they are sent.
pub(super) const ANSWER_BYTES: u64 = 1 << 20;
/// How long a peer may take for one piece of an answer: with the data before it, at 20 KB/s.
pub(super) const WRITE_MAX: Duration = Duration::from_secs(900);

/// Answers one fetch stream; its kind byte was read already.
pub async fn serve(
    mut send: SendHalf,
    mut recv: RecvHalf,
    link: &Link,
    peer: &Peer,
    library: &dyn Library,
) {
    let silence = Silence::new(link);
    if let Err(fault) = answer(&mut send, &mut recv, silence, peer, library).await {
        tracing::debug!(%peer, error = %fault, "a fetch was refused");
        match Frame::fault(&fault) {
            Ok(frame) => drop(send.write_bytes(frame.to_bytes()).await),
            // The peer sees an answer that ended too early.
            Err(unsent) => tracing::error!(%peer, error = %unsent, "a refusal was not sent"),
        }
    }
    let _ = send.finish();
    // A requester whose transfer was paused or cancelled needs nothing of what is buffered.
    tokio::select! {
        () = send.delivered() => {}
        () = tokio::time::sleep(WRITE_MAX) => {}
    }
}

async fn answer(
    send: &mut SendHalf,
    recv: &mut RecvHalf,
    mut silence: Silence<'_>,
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
    let opened = silence.limit(library.open(peer, request.digest)).await?;
    for wanted in &request.wants {
        let children = match wanted {
            Wanted::Root | Wanted::RootAndPages(_) => {
                let root = silence.limit(opened.root_frame(peer, library)).await?;
                let _share = library
                    .share(peer, root.len() as u64, request.priority)
                    .await?;
                let sent = timeout(WRITE_MAX, send.write_bytes(root)).await;
                sent.map_err(|_| reads_nothing(peer))??;
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
            Wanted::Children { page, ranges } | Wanted::Refused { page, ranges } => {
                let page = silence.limit(opened.children(peer, *page, library)).await?;
                let children = pick(&page, ranges)?;
                // Everything that is not a page of the manifest is content.
                let has_content = children
                    .iter()
                    .any(|child| !opened.pages.contains(&child.chunk.id));
                if has_content && !library.may_read_content(peer, &opened).await? {
                    return Err(nothing_such());
                }
                if matches!(wanted, Wanted::Refused { .. }) {
                    if children.len() > REFUSED_CHUNKS_MAX {
                        return Err(Fault::integrity(
                            "a fetch request names too many refused chunks",
                        ));
                    }
                    silence
                        .limit(library.recheck(peer, &opened, &children))
                        .await?;
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
            let together = library.answer_bytes();
            while count < children.len() && bytes < together {
                bytes += u64::from(children[count].chunk.len);
                count += 1;
            }
            let (now, later) = children.split_at(count);
            children = later;
            silence
                .limit(library.ready(peer, &opened, wanted, now))
                .await?;
            // Bytes that were read and not yet sent hold a share of the daemon's budget.
            let _share = library.share(peer, bytes, request.priority).await?;
            // Available pieces are written together: QUIC is woken once for all of them.
            let frames = library.frames(peer, &opened, wanted, now.to_vec(), request.priority);
            let mut pieces = silence.limit(frames).await?.ready_chunks(PIECES);
            while let Some(some) = silence.limit(async { Ok(pieces.next().await) }).await? {
                let mut end = None;
                let mut some: Vec<Bytes> = some
                    .into_iter()
                    .map_while(|piece| piece.map_err(|fault| end = Some(fault)).ok())
                    .collect();
                let sent = timeout(WRITE_MAX, send.write_many(&mut some)).await;
                sent.map_err(|_| reads_nothing(peer))??;
                if let Some(fault) = end {
                    return Err(fault);
                }
            }
        }
    }
    Ok(())
}

/// How long nothing was sent over the connection of an answer while the answer waited for content:
/// a site that has it may be connected and send nothing.
struct Silence<'a> {
    link: &'a Link,
    written: u64,
    since: Instant,
}

impl<'a> Silence<'a> {
    fn new(link: &'a Link) -> Self {
        Self {
            link,
            written: link.stream_bytes().0,
            since: Instant::now(),
        }
    }

    /// Ends a wait during which nothing was sent for [`ANSWER_SILENT_MAX`].
    async fn limit<T>(&mut self, wait: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
        tokio::pin!(wait);
        loop {
            if let Ok(result) = timeout(CHECK_EVERY, &mut wait).await {
                return result;
            }
            let written = self.link.stream_bytes().0;
            if written != self.written {
                (self.written, self.since) = (written, Instant::now());
            } else if self.since.elapsed() >= ANSWER_SILENT_MAX {
                return Err(Fault::unreachable(format!(
                    "the requested content did not arrive from its source for {} s",
                    ANSWER_SILENT_MAX.as_secs()
                ))
                .with_next("no action is needed: it is requested again automatically")
                .with_reason(Reason::WaitingForSource)
                .with_retry(Retry::Backoff));
            }
        }
    }
}

pub(super) fn reads_nothing(peer: &Peer) -> Fault {
    Fault::unreachable(format!("{peer} takes nothing from this stream"))
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

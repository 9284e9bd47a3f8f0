//! Prefetching: the hub fetches content for offline sites from online sources, because the source
//! may be offline when the site reconnects. The worker `prefetch` runs this; prefetched content is
//! stored like all relayed content.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt, stream};
use tokio_util::sync::CancellationToken;

use super::RelayKeeper;
use base::fault::{Code, Fault, Retry};
use base::limits::{FETCH_BATCH_BYTES, FETCH_BATCH_CHUNKS_MAX};
use base::workers::Worker;
use content::chunk::Hash;
use content::manifest::{Digest, Root, Step, Walk};
use content::store::Store;
use exchange::fetch::Child;
use exchange::relay::{Of, Relay};
use transport::PRIORITY_BULK;

/// Artifacts that are prefetched at once.
const AHEAD_ARTIFACTS_MAX: usize = 2;
/// Requests in flight for one of them.
const AHEAD_IN_FLIGHT_MAX: usize = 8;
/// Requests that are queued.
const AHEAD_QUEUED_MAX: usize = 8;
/// The pause before a failed prefetch is repeated…
const AHEAD_AGAIN: Duration = Duration::from_secs(60);
/// …and the pause if the failure is temporary although a source is online, for example if its disk
/// is offline.
const AHEAD_AGAIN_SOON: Duration = Duration::from_secs(10);

impl RelayKeeper {
    /// Fetches content for offline sites from sites that are online.
    pub(super) async fn keep_prefetching(&self, worker: &Worker) -> Result<(), Fault> {
        let all = self.inner.stop.child_token();
        // The fetches end with this worker, so that a restarted worker does not start a second
        // fetch of the same artifact.
        let _ends_with_this = all.clone().drop_guard();
        let mut running: HashMap<Digest, (CancellationToken, tokio::task::JoinHandle<()>)> =
            HashMap::new();
        let mut watch = self.inner.catalogue.watch_decisions();
        loop {
            running.retain(|_, (_, task)| !task.is_finished());
            let wanted = worker.iterate(async {
                let wanted = self.wanted_ahead().await;
                wanted.map_err(|fault| fault.context("determine what to prefetch"))
            });
            // The worker reports a fault, and tries again.
            if let Ok(wanted) = wanted.await {
                for (digest, (stop, _)) in &running {
                    if !wanted.contains(digest) {
                        stop.cancel();
                    }
                }
                for digest in wanted {
                    if running.len() < AHEAD_ARTIFACTS_MAX && !running.contains_key(&digest) {
                        let (this, stop) = (self.clone(), all.child_token());
                        let token = stop.clone();
                        let task = self
                            .inner
                            .tasks
                            .spawn(async move { this.fetch_ahead(digest, &token).await });
                        running.insert(digest, (stop, task));
                    }
                }
            }
            // This also ends after a while, so that a failed prefetch is repeated without a change
            // in the catalogue.
            watch.changed().await;
        }
    }

    /// The artifacts to prefetch now, in order. For each, every target is offline, at least one
    /// target may receive it, a source is online, and there is space.
    async fn wanted_ahead(&self) -> Result<Vec<Digest>, Fault> {
        if self.inner.relay.is_full() {
            return Ok(Vec::new());
        }
        let open = self.inner.catalogue.relayed_open().await?;
        // An online site itself requests the chunks that it lacks, which are fewer.
        let served: HashSet<Digest> = open
            .iter()
            .filter(|(_, site)| self.inner.links.is_online(site))
            .map(|(digest, _)| *digest)
            .collect();
        let known: HashSet<Digest> = open.iter().map(|(digest, _)| *digest).collect();
        self.inner
            .memory
            .lock()
            .failed
            .retain(|digest, _| known.contains(digest));
        let mut out = Vec::new();
        for (digest, site) in open {
            let skip = {
                let memory = self.inner.memory.lock();
                let rests = memory
                    .failed
                    .get(&digest)
                    .is_some_and(|(at, rests)| at.elapsed() < *rests);
                rests || memory.whole.contains(&digest)
            };
            if skip || served.contains(&digest) || out.contains(&digest) {
                continue;
            }
            // A site that may not receive it any more will be given nothing.
            if !self.inner.upstream.sources(digest, None).await?.is_empty()
                && self
                    .inner
                    .entitlement
                    .is_shared_still(&site, digest)
                    .await?
            {
                out.push(digest);
            }
        }
        // A failed artifact goes to the end of the list, otherwise it would block the others.
        let memory = self.inner.memory.lock();
        out.sort_by_key(|digest| memory.failed.get(digest).map(|(at, _)| *at));
        Ok(out)
    }

    async fn fetch_ahead(&self, digest: Digest, stop: &CancellationToken) {
        tracing::info!(%digest, "prefetching for an offline site");
        let result = tokio::select! {
            result = self.fetch_whole(digest) => result,
            () = stop.cancelled() => return,
        };
        let fault = match result {
            Ok(true) => {
                tracing::info!(%digest, "prefetched");
                let mut memory = self.inner.memory.lock();
                memory.whole.insert(digest);
                memory.failed.remove(&digest);
                return;
            }
            Ok(false) => {
                tracing::info!(%digest, "prefetching waits for space");
                return;
            }
            Err(fault) => fault,
        };
        tracing::warn!(%digest, error = %fault, "the prefetch failed");
        let rests = if fault.retry == Retry::Never || fault.code == Code::NoSpace {
            AHEAD_AGAIN
        } else {
            AHEAD_AGAIN_SOON
        };
        // If the source is offline, its next connection triggers another attempt. Any other failure
        // needs a pause, otherwise each change would trigger a useless attempt.
        let away = self
            .inner
            .upstream
            .sources(digest, None)
            .await
            .is_ok_and(|there| there.is_empty());
        if !away || rests == AHEAD_AGAIN {
            self.inner
                .memory
                .lock()
                .failed
                .insert(digest, (Instant::now(), rests));
        }
    }

    /// Fetches a whole artifact into the relay's store; `false` if there is no space for it.
    async fn fetch_whole(&self, digest: Digest) -> Result<bool, Fault> {
        let inner = &self.inner;
        let Some(row) = inner.catalogue.by_digest(digest).await? else {
            return Ok(true);
        };
        self.note_use(digest).await;
        let (send, receive) =
            tokio::sync::mpsc::channel::<Result<(Hash, Vec<Child>), Fault>>(AHEAD_QUEUED_MAX);
        let (relay, pages) = (inner.relay.clone(), inner.pages.clone());
        let walking = base::blocking::spawn(move || {
            if let Err(fault) = list_lacking(&row.root, &pages, &relay, &send) {
                let _ = send.blocking_send(Err(fault));
            }
        });
        let requests = stream::unfold(receive, |mut receive| async move {
            receive.recv().await.map(|request| (request, receive))
        });
        let fetched = requests
            .map(Ok)
            .try_for_each_concurrent(
                AHEAD_IN_FLIGHT_MAX,
                |request: Result<(Hash, Vec<Child>), Fault>| async move {
                    let (page, children) = request?;
                    if inner.relay.is_full() {
                        return Err(Fault::no_space("the relay's budget is used up"));
                    }
                    let bytes: u64 = children.iter().map(|c| u64::from(c.chunk.len)).sum();
                    // Prefetching has its own share of the budget, in addition to those of the
                    // peers.
                    let _share = inner.budgets.content(&inner.own, bytes, 0).await?;
                    let unkept = inner.relay.unkept_bytes();
                    inner
                        .relay
                        .fetch_and_keep(
                            Of {
                                digest,
                                page,
                                priority: PRIORITY_BULK,
                            },
                            children,
                        )
                        .await?;
                    if inner.relay.unkept_bytes() != unkept {
                        return Err(Fault::no_space(
                            "the hub's disk has no space for more relayed content",
                        ));
                    }
                    Ok(())
                },
            )
            .await;
        let _ = walking.await;
        match fetched {
            Ok(()) => Ok(true),
            Err(_) if inner.relay.is_full() => Ok(false),
            Err(fault) => Err(fault),
        }
    }
}

/// Lists the missing chunks of an artifact, in requests of about [`FETCH_BATCH_BYTES`]. Ends early
/// when the receiver is closed.
fn list_lacking(
    root: &Root,
    pages: &Store,
    relay: &Relay,
    send: &tokio::sync::mpsc::Sender<Result<(Hash, Vec<Child>), Fault>>,
) -> Result<(), Fault> {
    let (mut page, mut children, mut bytes) = (None, Vec::new(), 0);
    let flush = |page: Option<Hash>, children: &mut Vec<Child>| -> Result<bool, Fault> {
        let lacking = relay.lacking(&std::mem::take(children))?;
        let Some(page) = page.filter(|_| !lacking.is_empty()) else {
            return Ok(true);
        };
        Ok(send.blocking_send(Ok((page, lacking))).is_ok())
    };
    for step in Walk::new(root, pages) {
        let Step::Chunk(chunk, spot) = step? else {
            continue;
        };
        if page.is_some_and(|p| p != spot.page)
            || bytes >= FETCH_BATCH_BYTES
            || children.len() >= FETCH_BATCH_CHUNKS_MAX
        {
            if !flush(page, &mut children)? {
                return Ok(());
            }
            bytes = 0;
        }
        page = Some(spot.page);
        bytes += u64::from(chunk.len);
        children.push(Child {
            index: spot.index,
            chunk,
        });
    }
    flush(page, &mut children).map(|_| ())
}

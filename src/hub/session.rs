//! The connections of the sites at the hub: which streams a site may open, and what happens on
//! each.
//!
//! `control` is the control stream of a site, `list` sends on it what the site has to do, `questions`
//! answers its questions. The hub calls
//! [`Sessions::welcome`] for each connection. Nothing is stored here: a site that connects again
//! starts from the beginning.

mod control;
mod list;
mod questions;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use super::deliveries::Deliveries;
use super::entitlement::Entitlement;
use super::library::HubLibrary;
use super::links::Links;
use super::manifests::Manifests;
use super::membership::Membership;
use super::peer_budgets::PeerBudgets;
use super::quota::QuotaLedger;
use super::relay::RelayKeeper;
use super::runs::RunKeeper;
use base::clock;
use base::fault::Fault;
use base::limits::{FETCH_STREAMS_MAX, QUESTIONS_AT_ONCE_MAX, SILENCE_MAX};
use base::names::SiteName;
use base::peer::Peer;
use base::tally::Tally;
use content::store::Store;
use exchange::fetch;
use model::protocol::{CONTROL, FETCH, QUESTION};
use state::Catalogue;
use transport::identity::HubIdentity;
use transport::{Link, RecvHalf, SendHalf};

/// The limits and the control stream of one site's connection.
struct Streams {
    fetches: Semaphore,
    questions: Semaphore,
    /// Ends the control stream.
    control: Mutex<CancellationToken>,
}

/// The connections of the sites. Cheap to clone.
#[derive(Clone)]
pub(super) struct Sessions {
    inner: Arc<SessionParts>,
}

/// What the sessions work with.
pub(super) struct SessionParts {
    pub(super) data_dir: PathBuf,
    pub(super) catalogue: Catalogue,
    pub(super) store: Store,
    pub(super) identity: Arc<HubIdentity>,
    pub(super) membership: Membership,
    pub(super) links: Links,
    /// The newest format of manifests that the listener announces to peers.
    pub(super) manifest_format: Arc<AtomicU32>,
    pub(super) entitlement: Entitlement,
    pub(super) budgets: Arc<PeerBudgets>,
    pub(super) library: HubLibrary,
    pub(super) relay: RelayKeeper,
    pub(super) deliveries: Deliveries,
    pub(super) runs: RunKeeper,
    pub(super) quotas: QuotaLedger,
    pub(super) manifests: Manifests,
    pub(super) traffic: ControlTraffic,
    /// Reports of sites that were refused: a site may send any number of them.
    pub(super) refused_reports: Tally,
    /// Sites with a certificate of this hub that are not in its catalogue.
    pub(super) unknown: Tally,
    pub(super) tasks: TaskTracker,
    pub(super) stop: CancellationToken,
}

/// The bytes of the messages of all control streams.
#[derive(Default)]
pub(super) struct ControlTraffic {
    sent: AtomicU64,
    received: AtomicU64,
}

impl ControlTraffic {
    fn sent(&self, bytes: usize) {
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The metrics.
    fn metrics(&self) -> String {
        let (sent, received) = (
            self.sent.load(Ordering::Relaxed),
            self.received.load(Ordering::Relaxed),
        );
        format!(
            "# HELP packhorse_control_bytes Bytes of control messages since the start, manifests included.\n\
             # TYPE packhorse_control_bytes counter\n\
             packhorse_control_bytes{{to=\"sites\"}} {sent}\npackhorse_control_bytes{{to=\"hub\"}} {received}\n"
        )
    }
}

impl Sessions {
    /// Serves no site yet.
    pub(super) fn new(parts: SessionParts) -> Self {
        Self {
            inner: Arc::new(parts),
        }
    }

    /// The metrics of the control streams.
    pub(super) fn metrics(&self) -> String {
        self.inner.traffic.metrics()
    }

    /// Serves a site until its connection ends.
    pub(super) async fn welcome(&self, name: SiteName, link: Link) {
        // The gate lets in a site that the hub does not know, which learns that here.
        match self
            .inner
            .membership
            .refusal(&Peer::Site(name.clone()), &link)
            .await
        {
            Ok(None) => {}
            Ok(Some(why)) => {
                self.inner
                    .unknown
                    .note(format_args!("{name} at {}: {why}", link.remote_address()));
                link.refuse(&why);
                return;
            }
            Err(fault) => {
                tracing::error!(error = %fault, "the catalogue cannot be read");
                link.close("the hub cannot read its catalogue");
                return;
            }
        }
        self.inner.links.enter(&name, &link);
        tracing::info!("a site is online");
        self.note_seen(&name, true, clock::now_ms(), None).await;
        let _seats = self.inner.budgets.seats();
        let streams = Arc::new(Streams {
            fetches: Semaphore::new(FETCH_STREAMS_MAX),
            questions: Semaphore::new(QUESTIONS_AT_ONCE_MAX),
            control: Mutex::default(),
        });
        loop {
            let stream = tokio::select! {
                stream = link.accept() => stream,
                () = self.inner.stop.cancelled() => None,
            };
            let Some((send, recv)) = stream else { break };
            let (this, name, link, streams) =
                (self.clone(), name.clone(), link.clone(), streams.clone());
            self.inner.tasks.spawn(
                async move { this.stream(send, recv, name, &link, &streams).await }
                    .in_current_span(),
            );
        }
        link.close("the hub stops");
        let heard_ms = self.inner.links.heard_ms(&name);
        self.inner.links.leave(&name, &link);
        tracing::info!("a site is offline");
        // A newer connection may have replaced this one.
        let online = self.inner.links.is_online(&name);
        let heard_ms = heard_ms.unwrap_or_else(clock::now_ms);
        self.note_seen(&name, online, heard_ms, None).await;
    }

    async fn note_seen(&self, name: &SiteName, online: bool, at_ms: i64, version: Option<&str>) {
        let catalogue = &self.inner.catalogue;
        if let Err(fault) = catalogue.site_seen(name, online, at_ms, version).await {
            tracing::error!(error = %fault, "the catalogue cannot be written");
        }
    }

    async fn stream(
        &self,
        send: SendHalf,
        mut recv: RecvHalf,
        site: SiteName,
        link: &Link,
        streams: &Streams,
    ) {
        let mut kind = [0];
        if !matches!(
            timeout(SILENCE_MAX, recv.read_exact(&mut kind)).await,
            Ok(Ok(()))
        ) {
            return;
        }
        let result = match kind[0] {
            FETCH => {
                // The stream is a fetch: control messages and questions never wait for fetches.
                let Ok(_turn) = streams.fetches.acquire().await else {
                    return;
                };
                let peer = Peer::Site(site.clone());
                fetch::serve(send, recv, link, &peer, &self.inner.library).await;
                Ok(())
            }
            CONTROL => {
                let ended = CancellationToken::new();
                std::mem::replace(&mut *streams.control.lock(), ended.clone()).cancel();
                tokio::select! {
                    result = self.control(send, recv, &site, link) => result,
                    () = ended.cancelled() => Err(Fault::integrity("the site opened another control stream")),
                }
            }
            QUESTION => {
                let Ok(_turn) = streams.questions.acquire().await else {
                    return;
                };
                self.question(send, recv, &site, link).await
            }
            other => Err(Fault::integrity(format!("a stream of kind {other}"))),
        };
        if let Err(fault) = result {
            tracing::debug!(error = %fault, "a stream ended");
        }
    }
}

#[cfg(test)]
mod tests;

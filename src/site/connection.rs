//! The site's side of the connection: connects, keeps the connection, answers questions, and moves
//! between QUIC and TCP. `control` is the control stream, `transports` decides about the moves.

mod control;
mod reporter;
mod transports;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::Instrument as _;

use super::Opened;
use super::hub_link::HubLink;
use super::publish::Publications;
use super::runs::RunKeeper;
use transports::{LOOK_EVERY, Transports};

use crate::config::Transport;
use base::budget::Budget;
use base::fault::{Code, Fault};
use base::limits::{
    ANSWER_MAX, FETCH_STREAMS_MAX, QUESTIONS_AT_ONCE_MAX, QUESTIONS_BYTES_MAX, SILENCE_MAX,
};
use base::names::{ArtifactRef, TransferId};
use base::peer::Peer;
use base::workers::Worker;
use content::manifest::Digest;
use exchange::fetch::{self, Fetcher};
use exchange::transfer::Assembly;
use exchange::wire;
use model::actor::Actor;
use model::policy::{self, Object, Verb};
use model::protocol::{AskHub, AskSite, FETCH, Planned, QUESTION};
use transport::{self, ConnectionSettings, Link, RecvHalf, Redial, SendHalf};

/// The pause between attempts to connect with a renewed certificate.
const RENEWED_RETRY_EVERY: Duration = Duration::from_secs(60);
/// Connects to the hub, executes the desired state, reports, and answers questions.
#[derive(Clone)]
pub(super) struct Connection {
    opened: Opened,
    hub: Arc<HubLink>,
    publications: Publications,
    runs: RunKeeper,
    /// The bytes that a connection may buffer for sending.
    send_bytes: u64,
    transports: Arc<Mutex<Transports>>,
}

impl Connection {
    /// Creates it without a connection.
    pub(super) fn new(
        opened: &Opened,
        hub: Arc<HubLink>,
        publications: Publications,
        runs: RunKeeper,
        send_bytes: u64,
    ) -> Self {
        let opened = opened.clone();
        Self {
            opened,
            hub,
            publications,
            runs,
            send_bytes,
            transports: Arc::new(Mutex::new(Transports::new(Instant::now()))),
        }
    }

    /// Connects until the daemon stops; a connection that ended is replaced by another.
    pub(super) async fn keep(&self, address: &str, worker: &Worker) -> Result<(), Fault> {
        let opened = &self.opened;
        // The connection of an earlier run of this worker.
        if let Some(link) = self.hub.disconnected() {
            link.close("the site connects again");
        }
        let mut redial = Redial::default();
        while !opened.stop.is_cancelled() {
            let dialled = tokio::select! {
                dialled = self.dial(address) => dialled,
                () = opened.stop.cancelled() => return Ok(()),
            };
            match dialled {
                Ok(link) if link.is_for_renewal() => {
                    worker.count();
                    self.renew_expired(&link).await;
                }
                Ok(link) => {
                    worker.count();
                    let began = Instant::now();
                    self.use_line(link, address).await;
                    redial.stood(began.elapsed());
                }
                Err(fault) => {
                    worker.count_error(&fault);
                    if self.has_other_certificate(&fault).await {
                        redial = Redial::default();
                    }
                    if self.hub.failed(&fault) {
                        tracing::warn!(hub = %address, error = %fault, next = %fault.next, "no connection to the hub");
                    }
                    opened.catalogue.notify();
                }
            }
            tokio::select! {
                () = tokio::time::sleep(redial.pause()) => {}
                () = opened.stop.cancelled() => {}
            }
        }
        Ok(())
    }

    /// Whether 'packhorse join' stored another certificate since the start, after the hub has refused
    /// this one. The next attempt uses it.
    async fn has_other_certificate(&self, fault: &Fault) -> bool {
        if fault.code != Code::NotAllowed {
            return false;
        }
        match self.hub.reload_certificate().await {
            Ok(changed) => changed,
            Err(fault) => {
                tracing::warn!(error = %fault, "the certificate could not be read again");
                false
            }
        }
    }

    /// Renews an expired certificate: the hub admits it for nothing else.
    async fn renew_expired(&self, link: &Link) {
        let renewed = self.hub.renew(link).await;
        link.close_and_flush("the certificate was renewed").await;
        if let Err(fault) = renewed {
            let fault = fault.context("the certificate has expired and could not be renewed");
            self.hub.failed(&fault);
        }
        self.opened.catalogue.notify();
    }

    /// Connects with a certificate that was renewed, so that the hub sees it, and does not accept the
    /// one before it any more.
    async fn wait_for_renewal(&self, link: &Link, address: &str) -> Link {
        let mut current = self.hub.watch_identity();
        if current.changed().await.is_err() {
            return std::future::pending().await;
        }
        loop {
            match self.dial(address).await {
                Ok(newer) if !newer.is_for_renewal() => return newer,
                Ok(_) => {}
                Err(fault) => {
                    tracing::warn!(error = %fault, "no connection with the renewed certificate yet; the current one continues");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(RENEWED_RETRY_EVERY) => {}
                _ = link.closed() => return std::future::pending().await,
            }
        }
    }

    /// Connects, over TCP first while QUIC is limited.
    async fn dial(&self, address: &str) -> Result<Link, Fault> {
        let (identity, line) = (self.hub.identity(), &self.opened.config.line);
        let dial = |settings: ConnectionSettings| {
            let identity = identity.clone();
            async move { transport::dial(address, &identity, &settings, self.send_bytes).await }
        };
        let limited = self.transports.lock().limited_rate(Instant::now());
        if let Some(rate) = limited {
            let settings = ConnectionSettings {
                transport: Transport::Tcp,
                ..line.clone()
            };
            if let Ok(link) = dial(settings).await {
                link.set_reason(udp_is_limited(rate));
                return Ok(link);
            }
            self.transports.lock().moved_to_quic();
        }
        dial(line.clone()).await
    }

    /// Uses a connection until it ends. A better one that becomes available replaces it.
    async fn use_line(&self, mut link: Link, address: &str) {
        let opened = &self.opened;
        loop {
            self.hub.connected(link.clone());
            opened.catalogue.notify();
            let span = link.span();
            let use_it = async {
                tokio::select! {
                    ended = self.talk(&link) => {
                        if let Err(fault) = ended {
                            tracing::info!(error = %fault, "the control stream ended");
                        }
                        None
                    }
                    () = self.answer(&link) => None,
                    better = self.wait_for_better(&link, address) => Some((better, false)),
                    newer = self.wait_for_renewal(&link, address) => Some((newer, true)),
                    () = opened.stop.cancelled() => None,
                }
            };
            let better = use_it.instrument(span.clone()).await;
            if let Some((better, is_renewed)) = better {
                // New requests use the new one; the hub closes the old one.
                span.in_scope(|| match (is_renewed, better.reason()) {
                    (true, _) => {
                        tracing::info!("moved to a connection with the renewed certificate")
                    }
                    (false, Some(why)) => tracing::info!(why, "moved from QUIC to TCP"),
                    (false, None) => tracing::info!("moved from TCP to QUIC"),
                });
                link = better;
                continue;
            }
            if opened.stop.is_cancelled() {
                // Transfers still store their positions; the connection is closed after that.
                return;
            }
            self.hub.disconnected();
            let refused = link.refusal();
            link.close("the site closes the connection");
            match refused {
                Some(why) => {
                    let fault = refused_by_hub(&why);
                    if self.hub.failed(&fault) {
                        span.in_scope(|| {
                            tracing::warn!(error = %fault, next = %fault.next, "no connection to the hub");
                        });
                    }
                }
                None => {
                    self.hub.ended_well();
                    span.in_scope(|| tracing::info!("the connection to the hub ended"));
                }
            }
            opened.catalogue.notify();
            return;
        }
    }

    /// Waits until the other transport should be used and is connected.
    async fn wait_for_better(&self, link: &Link, address: &str) -> Link {
        if self.opened.config.line.transport != Transport::Auto {
            return std::future::pending().await;
        }
        let total = || {
            let (sent, received) = link.bytes();
            sent + received
        };
        let over_tcp = link.transport() == "tcp";
        if over_tcp {
            self.transports.lock().began_tcp(Instant::now());
        }
        let mut before = total();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let moved = total() - std::mem::replace(&mut before, total());
            let better = match over_tcp {
                true => self.look_at_tcp(moved, address).await,
                false => self.look_at_quic(link, moved, address).await,
            };
            if let Some(better) = better {
                return better;
            }
        }
    }

    async fn look_at_tcp(&self, moved: u64, address: &str) -> Option<Link> {
        let tries = self.transports.lock().look_at_tcp(Instant::now(), moved);
        if !tries {
            return None;
        }
        let better = self.connect_over(Transport::Quic, address).await.ok()?;
        self.transports.lock().moved_to_quic();
        Some(better)
    }

    async fn look_at_quic(&self, link: &Link, moved: u64, address: &str) -> Option<Link> {
        if !Transports::is_busy(moved) {
            return None;
        }
        let rate = match link.limited_rate() {
            Some(rate) => Some(rate),
            // A hub of an earlier version does not know the question.
            None => wire::ask::<_, Option<u64>>(link, &AskHub::LimitedRate)
                .await
                .ok()
                .flatten(),
        };
        let now = Instant::now();
        let tries = self.transports.lock().look_at_quic(now, moved, rate);
        let rate = rate.filter(|_| tries)?;
        match self.connect_over(Transport::Tcp, address).await {
            Ok(better) => {
                better.set_reason(udp_is_limited(rate));
                let mut transports = self.transports.lock();
                transports.moved_to_tcp(Instant::now(), rate);
                Some(better)
            }
            Err(fault) => {
                tracing::info!(error = %fault, rate, "the network limits UDP, and TCP does not connect");
                let mut transports = self.transports.lock();
                transports.stay_on_quic(Instant::now());
                None
            }
        }
    }

    async fn connect_over(&self, over: Transport, address: &str) -> Result<Link, Fault> {
        let (identity, line) = (self.hub.identity(), &self.opened.config.line);
        transport::probe(over, address, &identity, line, self.send_bytes).await
    }

    /// Answers the streams that the hub opens.
    async fn answer(&self, link: &Link) {
        let fetches = Arc::new(Semaphore::new(FETCH_STREAMS_MAX));
        let questions = Arc::new(Semaphore::new(QUESTIONS_AT_ONCE_MAX));
        let budget = Budget::new(QUESTIONS_BYTES_MAX, QUESTIONS_BYTES_MAX);
        // Only the hub is dialled, so only the hub opens streams here.
        let Some(hub) = link.peer().cloned() else {
            return;
        };
        while let Some((send, mut recv)) = link.accept().await {
            let (this, link, hub, fetches) =
                (self.clone(), link.clone(), hub.clone(), fetches.clone());
            let (questions, budget) = (questions.clone(), budget.clone());
            let work = async move {
                let mut kind = [0];
                if !matches!(
                    timeout(SILENCE_MAX, recv.read_exact(&mut kind)).await,
                    Ok(Ok(()))
                ) {
                    return;
                }
                let result = match kind[0] {
                    QUESTION => {
                        let Ok(_turn) = questions.acquire().await else {
                            return;
                        };
                        this.question(send, recv, &link, &hub, &budget).await
                    }
                    FETCH => {
                        // A question never waits for fetches.
                        let Ok(_turn) = fetches.acquire().await else {
                            return;
                        };
                        fetch::serve(send, recv, &link, &hub, &this.opened.reader).await;
                        Ok(())
                    }
                    other => Err(Fault::integrity(format!("a stream of kind {other}"))),
                };
                if let Err(fault) = result {
                    tracing::debug!(error = %fault, "a stream ended");
                }
            };
            self.opened.tasks.spawn(work.in_current_span());
        }
    }

    async fn question(
        &self,
        mut send: SendHalf,
        mut recv: RecvHalf,
        link: &Link,
        hub: &Peer,
        budget: &Budget,
    ) -> Result<(), Fault> {
        send.set_priority(wire::PRIORITY_QUESTION);
        let (question, _share) = wire::receive_question(&mut recv, budget, hub).await?;
        let verb = match question {
            AskSite::Plan { .. } => Verb::Plan,
            AskSite::CheckPresence { .. } | AskSite::Holds { .. } => Verb::Verify,
        };
        policy::may(&Actor::from(hub), verb, &Object::Daemon)?;
        let answer = async {
            match question {
                AskSite::Plan { artifact, digest } => {
                    wire::send(&mut send, &self.plan_for(link, artifact, digest).await).await
                }
                AskSite::CheckPresence { artifact, digest } => {
                    wire::send(
                        &mut send,
                        &self.opened.runner.presence(&artifact, digest).await,
                    )
                    .await
                }
                AskSite::Holds { artifact, digest } => {
                    wire::send(
                        &mut send,
                        &self.opened.runner.holds(&artifact, digest).await,
                    )
                    .await
                }
            }
        };
        timeout(ANSWER_MAX, answer)
            .await
            .map_err(|_| Fault::unreachable("a question of the hub was not answered in time"))??;
        send.finish()
    }

    async fn plan_for(
        &self,
        link: &Link,
        artifact: ArtifactRef,
        digest: Digest,
    ) -> Result<Planned, Fault> {
        let opened = &self.opened;
        let fetcher = Fetcher::new(link.clone(), digest, Default::default());
        let root = fetcher.root().await?;
        let base = opened
            .catalogue
            .previous_version(&artifact)
            .await?
            .map(|kin| kin.root);
        fetcher
            .pages(&root, base.as_ref(), &opened.shared.store)
            .await?;
        let sink = opened.sinks.of(artifact.kind).clone();
        // As a delivery does: what others removed is found in the versions that share it.
        let removed = opened
            .runner
            .find_removed_versions(&artifact, sink.as_ref());
        if let Err(fault) = removed.await {
            tracing::warn!(%artifact, error = %fault, "versions that were removed could not be looked for");
        }
        let threads = sink.threads().clone();
        let assembly = Assembly {
            shared: opened.shared.clone(),
            sink,
            incoming: sink::Incoming {
                artifact,
                digest,
                root,
                transfer: TransferId::none(),
                waits: Default::default(),
            },
            fetcher,
            priority: 0,
            counters: Default::default(),
            stop: opened.stop.clone(),
            staging: None,
        };
        let look = move || {
            let estimate = assembly.estimate(None)?;
            Ok((estimate.missing, assembly.room(estimate)?))
        };
        let (missing, room) = threads.run(look).await?;
        Ok(Planned {
            missing,
            needs: room.needs,
            free: room.free,
            inodes: Some(room.inodes),
            free_inodes: room.free_inodes,
            rate: opened.runner.last_rate(),
        })
    }
}

/// Why a connection is over TCP: the network lets UDP pass at this rate, in bytes per second.
fn udp_is_limited(rate: u64) -> String {
    format!(
        "the network limits UDP to about {:.1} Mbit/s; QUIC is tried again within an hour",
        rate as f64 * 8.0 / 1e6
    )
}

/// The fault of a hub that refuses this site after the welcome: its catalogue is from before the
/// site joined, or the site was removed there.
fn refused_by_hub(why: &str) -> Fault {
    let fault = Fault::not_allowed(format!("the hub refused this site: {why}"));
    match why.contains(transport::REVOKED) {
        true => fault.with_next(transport::next_after_refusal(why)),
        false => fault.with_next(
            "at the hub: packhorse token create --site NAME; then here, with the daemon stopped: packhorse join",
        ),
    }
}

#[cfg(test)]
mod tests;

//! The site's side of the connection: connects, keeps the connection, reports, and moves from TCP
//! to QUIC when QUIC works again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::timeout;
use tracing::Instrument as _;

use super::Opened;
use super::hub_link::HubLink;
use super::publish::Publications;
use super::runs::RunKeeper;
use crate::api::VERSION;
use crate::config::Transport;
use base::budget::Budget;
use base::fault::{Fault, Reason};
use base::limits::{
    ANSWER_BYTES_MAX, ANSWER_MAX, BACKOFF_MAX, FETCH_STREAMS_MAX, QUESTIONS_AT_ONCE_MAX,
    QUESTIONS_BYTES_MAX, REPORT_BYTES_MAX, SILENCE_MAX, SINK_ANSWER_MAX, STATE_RETRY_EVERY,
};
use base::names::{ArtifactRef, TransferId};
use base::peer::Peer;
use base::text::Message;
use base::workers::Worker;
use content::manifest::Digest;
use exchange::fetch::{self, Fetcher};
use exchange::transfer::{Assembly, free_room};
use exchange::wire;
use model::actor::Actor;
use model::paging;
use model::policy::{self, Object, Verb};
use model::protocol::{
    AllowList, AskSite, CONTROL, Desired, FETCH, FromHub, FromSite, Planned, QUESTION, Report,
};
use model::run::{DesiredRun, RunReport};
use state::TransferRow;
use transport::{self, Link, RecvHalf, Redial, SendHalf};

/// How often a site on TCP checks whether QUIC works again.
const QUIC_PROBE_EVERY: Duration = Duration::from_secs(60);
/// How often the age of the certificate is checked.
const RENEW_CHECK_EVERY: Duration = Duration::from_secs(3600);
/// Desired lists shorter than this are complete.
const DESIRED_MAX: usize = 1000;

/// The complete desired state.
struct List {
    transfers: Vec<Desired>,
    runs: Vec<DesiredRun>,
}

/// Connects to the hub, executes the desired state, reports, and answers questions.
#[derive(Clone)]
pub(super) struct Connection {
    opened: Opened,
    hub: Arc<HubLink>,
    publications: Publications,
    runs: RunKeeper,
    /// The bytes that a connection may buffer for sending.
    send_bytes: u64,
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
            let identity = self.hub.identity();
            let dialled = tokio::select! {
                dialled = transport::dial(address, &identity, &opened.config.line, self.send_bytes) => dialled,
                () = opened.stop.cancelled() => return Ok(()),
            };
            match dialled {
                Ok(link) => {
                    worker.count();
                    let began = Instant::now();
                    self.use_line(link, address).await;
                    redial.stood(began.elapsed());
                }
                Err(fault) => {
                    worker.count_error(&fault);
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
                    better = self.wait_for_quic(&link, address) => Some(better),
                    () = opened.stop.cancelled() => None,
                }
            };
            let better = use_it.instrument(span.clone()).await;
            if let Some(better) = better {
                // Running fetches complete over the old connection; new requests use the new one.
                span.in_scope(|| tracing::info!("moved from TCP to QUIC"));
                link = better;
                continue;
            }
            if opened.stop.is_cancelled() {
                // Transfers still store their positions; the connection is closed after that.
                return;
            }
            self.hub.disconnected();
            link.close("the site closes the connection");
            span.in_scope(|| tracing::info!("the connection to the hub ended"));
            opened.catalogue.notify();
            return;
        }
    }

    async fn wait_for_quic(&self, link: &Link, address: &str) -> Link {
        if link.transport() != "tcp" || self.opened.config.line.transport != Transport::Auto {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(QUIC_PROBE_EVERY).await;
            let identity = self.hub.identity();
            if let Ok(better) = transport::probe_quic(
                address,
                &identity,
                &self.opened.config.line,
                self.send_bytes,
            )
            .await
            {
                return better;
            }
        }
    }

    /// The control stream: sends the hello, executes the desired state, and reports each change.
    async fn talk(&self, link: &Link) -> Result<(), Fault> {
        let opened = &self.opened;
        let (mut send, mut recv) = link.open(wire::PRIORITY_CONTROL).await?;
        send.write_all(&[CONTROL]).await?;
        let congestion = opened.config.line.congestion;
        let share = opened.config.share.allow.as_deref().map(AllowList::of);
        // Always sent: for a hub, `None` means a site of an earlier version, which decides itself.
        let train = Some(AllowList::of(
            opened
                .config
                .train
                .as_ref()
                .map_or(&[], |train| &train.allow),
        ));
        wire::send(
            &mut send,
            &FromSite::Hello {
                version: VERSION.into(),
                share,
                train,
                congestion,
            },
        )
        .await?;
        let (listed, mut asked) = mpsc::channel::<Vec<TransferId>>(4);
        let (newest, lists) = watch::channel(None);
        let read = async {
            loop {
                let FromHub::Desired {
                    revision,
                    transfers,
                    runs,
                    manifests,
                } = wire::receive(&mut recv).await?;
                tracing::debug!(
                    revision,
                    transfers = transfers.len(),
                    runs = runs.len(),
                    "desired"
                );
                opened.runner.accept_pushed(manifests).await;
                newest.send_replace(Some(Arc::new(List { transfers, runs })));
            }
        };
        let write = async {
            let mut cursor = opened.catalogue.cursor().await?;
            let mut said: Vec<RunReport> = Vec::new();
            let mut said_unwritten: Vec<TransferRow> = Vec::new();
            // An empty list is sent too: files may have been restored since the last connection.
            let mut said_changed: Option<Vec<(ArtifactRef, Message)>> = None;
            let mut renew = tokio::time::interval(RENEW_CHECK_EVERY);
            loop {
                let changed = opened.catalogue.changed();
                let query = crate::api::types::TransferQuery {
                    since: Some(cursor),
                    ..Default::default()
                };
                let (rows, next) = opened.catalogue.transfers(&query).await?;
                cursor = next;
                if !rows.is_empty() {
                    send_reports(&mut send, rows.into_iter().map(report).collect()).await?;
                }
                let unwritten = opened.runner.unwritten();
                if unwritten != said_unwritten {
                    send_reports(&mut send, unwritten.iter().cloned().map(report).collect())
                        .await?;
                    said_unwritten = unwritten;
                }
                let runs = self.runs.reports().await?;
                if runs != said {
                    for some in paging::pages(runs.clone(), REPORT_BYTES_MAX) {
                        wire::send(&mut send, &FromSite::Runs(some)).await?;
                    }
                    said = runs;
                }
                let mut changed_here = opened.catalogue.changed_here().await?;
                // The complete list is sent. Entries that do not fit are sent when other entries
                // are removed.
                changed_here.truncate(paging::fitting(&changed_here, ANSWER_BYTES_MAX));
                if said_changed.as_ref() != Some(&changed_here) {
                    wire::send(&mut send, &FromSite::Changed(changed_here.clone())).await?;
                    said_changed = Some(changed_here);
                }
                tokio::select! {
                    () = changed => {}
                    Some(ids) = asked.recv() => {
                        let mut reports = Vec::new();
                        for id in ids {
                            // The row is read just before it is sent, so that an older state never
                            // follows a newer one.
                            match opened.catalogue.transfer(&id).await {
                                Ok(row) => reports.push(report(row)),
                                // A transfer that could not be adopted is reported with the
                                // unwritten ones.
                                Err(fault) => tracing::debug!(transfer = %id, error = %fault, "a transfer is not reported"),
                            }
                        }
                        send_reports(&mut send, reports).await?;
                    }
                    _ = renew.tick() => self.hub.renew(link).await,
                }
            }
        };
        tokio::select! {
            result = read => result,
            result = self.apply_lists(lists, listed) => result,
            result = write => result,
            result = self.publications.keep_offering() => result,
        }
    }

    /// Executes the newest desired state of the hub, and passes its transfers to `listed`. A change
    /// that cannot be stored is tried again here and not over a new connection, which would bring
    /// the same list. It delays neither the rest of the list nor a newer list.
    async fn apply_lists(
        &self,
        mut lists: watch::Receiver<Option<Arc<List>>>,
        listed: mpsc::Sender<Vec<TransferId>>,
    ) -> Result<(), Fault> {
        let mut logged = None;
        while lists.changed().await.is_ok() {
            let Some(list) = lists.borrow_and_update().clone() else {
                continue;
            };
            let (mut left, mut pause) = (None, STATE_RETRY_EVERY);
            loop {
                let unapplied = self
                    .opened
                    .runner
                    .apply(
                        &list.transfers,
                        list.transfers.len() < DESIRED_MAX,
                        left.as_ref(),
                    )
                    .await;
                // After the transfers: an ended run removes the content that they delivered.
                let runs = self.runs.apply(&list.runs, &unapplied.transfers).await;
                let fault = unapplied.fault.or(runs.err());
                if left.is_none() || fault.is_none() {
                    let ids = list
                        .transfers
                        .iter()
                        .map(|wanted| wanted.id.clone())
                        .collect();
                    if listed.send(ids).await.is_err() {
                        return Ok(());
                    }
                }
                let Some(fault) = fault else {
                    logged = None;
                    break;
                };
                // Space may become free at any moment; any other fault may be permanent.
                pause = if fault.reason == Reason::NoSpace {
                    STATE_RETRY_EVERY
                } else {
                    pause
                };
                if logged.as_ref() != Some(&fault.message) {
                    tracing::warn!(error = %fault, "the desired state of the hub could not be stored; retrying");
                    logged = Some(fault.message);
                }
                left = Some(unapplied.transfers);
                tokio::select! {
                    () = tokio::time::sleep(pause) => pause = (pause * 2).min(BACKOFF_MAX),
                    newer = lists.changed() => {
                        if newer.is_err() {
                            return Ok(());
                        }
                        lists.mark_changed();
                        break;
                    }
                }
            }
        }
        Ok(())
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
                        fetch::serve(send, recv, &hub, &this.opened.reader).await;
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
            AskSite::Stands { .. } | AskSite::Holds { .. } => Verb::Verify,
        };
        policy::may(&Actor::from(hub), verb, &Object::Daemon)?;
        let answer = async {
            match question {
                AskSite::Plan { artifact, digest } => {
                    wire::send(&mut send, &self.plan_for(link, artifact, digest).await).await
                }
                AskSite::Stands { artifact, digest } => {
                    wire::send(
                        &mut send,
                        &self.opened.runner.standing(&artifact, digest).await,
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
        let looked = sink.clone();
        let free = sink
            .threads()
            .run_for(SINK_ANSWER_MAX, move || Ok(free_room(looked.as_ref())))
            .await?;
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
        let estimate = threads.run(move || assembly.estimate(None)).await?;
        Ok(Planned {
            missing: estimate.missing,
            needs: estimate.needs,
            free,
            rate: opened.runner.last_rate(),
        })
    }
}

/// Sends reports in as many messages as they need.
async fn send_reports(send: &mut SendHalf, reports: Vec<Report>) -> Result<(), Fault> {
    for some in paging::pages(reports, REPORT_BYTES_MAX) {
        wire::send(send, &FromSite::Report(some)).await?;
    }
    Ok(())
}

fn report(row: TransferRow) -> Report {
    Report {
        id: row.id,
        generation: row.generation,
        state: row.state,
        body: row.body,
    }
}

#[cfg(test)]
mod tests;

//! The control stream of a site: what the hub wants comes in and is executed, reports go out.
//!
//! Messages of the hub are merged as they arrive, so the newest request counts, and an
//! acknowledgement never waits for the catalogue. What cannot be stored is tried again on the same
//! connection. Nothing here survives a connection: each begins with the complete list.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::Connection;
use super::reporter::Reporter;
use crate::api::VERSION;
use base::fault::{Fault, Reason};
use base::limits::{
    ANSWER_BYTES_MAX, BACKOFF_MAX, CHANGES_BYTES_MAX, REPORT_BYTES_MAX, STATE_RETRY_EVERY,
    TRANSFERS_LISTED_MAX,
};
use base::names::{ArtifactRef, TransferId};
use base::text::Message;
use content::manifest::FORMAT_MAX;
use exchange::wire;
use model::desired::{Received, ReceivedList};
use model::paging;
use model::protocol::{
    AllowList, CONTROL, Changes, Desired, FromHub, FromSite, Known, PushedManifest, Report,
    ReportBatch,
};
use model::run::{DesiredRun, RunReport};
use model::transfer::{State, TransferQuery};
use state::TransferRow;
use transport::{Link, RecvHalf, SendHalf};

/// How often the age of the certificate is checked.
const RENEW_CHECK_EVERY: Duration = Duration::from_secs(3600);
/// A list of a hub of an earlier version is complete if it has fewer transfers than this.
const OLDER_LIST_MAX: usize = 1000;

/// Requests of the hub that are not executed yet.
#[derive(Debug, Default)]
struct Requests {
    set: BTreeMap<TransferId, Desired>,
    removed: BTreeSet<TransferId>,
    /// A complete list has ended: all other transfers are given up.
    gives_up: bool,
    /// All training runs of the site.
    runs: Option<Vec<DesiredRun>>,
    /// These requests are all there are: earlier ones are void.
    is_whole: bool,
}

impl Requests {
    fn set(&mut self, wanted: Vec<Desired>) {
        for wanted in wanted {
            self.removed.remove(&wanted.id);
            self.set.insert(wanted.id.clone(), wanted);
        }
    }

    fn remove(&mut self, ids: impl IntoIterator<Item = TransferId>) {
        for id in ids {
            self.set.remove(&id);
            self.removed.insert(id);
        }
    }

    /// A complete list has ended: what it does not name is not executed any more.
    fn drop_unlisted(&mut self, received: &ReceivedList) {
        self.set.retain(|id, _| received.contains(id));
    }

    /// Refuses more requests than a hub may send before they are executed: the transfers of an old
    /// and of a new list.
    fn check_size(&self) -> Result<(), Fault> {
        let most = 2 * TRANSFERS_LISTED_MAX;
        if self.set.len() <= most && self.removed.len() <= most {
            return Ok(());
        }
        Err(Fault::integrity(format!(
            "the hub changes more than {most} transfers at once"
        )))
    }

    /// Adds newer requests.
    fn merge(&mut self, newer: Self) {
        if newer.is_whole {
            *self = newer;
            return;
        }
        self.remove(newer.removed);
        self.set(newer.set.into_values().collect());
        self.gives_up |= newer.gives_up;
        self.runs = newer.runs.or(self.runs.take());
    }
}

/// What the parts of the control stream share.
#[derive(Default)]
struct Shared {
    received: Mutex<ReceivedList>,
    requests: Mutex<Requests>,
    has_requests: Notify,
    reporter: Mutex<Reporter>,
    /// There is something to report, or to ask for.
    to_send: Notify,
    asks_list: Mutex<bool>,
}

impl Connection {
    /// The control stream: sends the hello, executes the desired state, and reports each change.
    pub(super) async fn talk(&self, link: &Link) -> Result<(), Fault> {
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
                changes: true,
                manifest_format: FORMAT_MAX,
                reason: link.reason().map(|reason| reason.as_str().into()),
            },
        )
        .await?;
        let shared = Shared::default();
        tokio::select! {
            result = self.receive(&mut recv, &shared) => result,
            result = self.execute(&shared) => result,
            result = self.report(&mut send, &shared, link) => result,
            result = self.publications.keep_offering() => result,
        }
    }

    /// Takes the messages of the hub.
    async fn receive(&self, recv: &mut RecvHalf, shared: &Shared) -> Result<(), Fault> {
        loop {
            match wire::receive(recv).await? {
                FromHub::Changes(changes) => self.take_changes(changes, shared).await?,
                FromHub::Stored { number, unstored } => {
                    let now = Instant::now();
                    shared.reporter.lock().processed(number, &unstored, now);
                }
                FromHub::Desired {
                    revision,
                    transfers,
                    runs,
                    manifests,
                } => {
                    tracing::debug!(revision, transfers = transfers.len(), "a complete list");
                    self.accept_pushed(manifests).await;
                    shared.reporter.lock().begin(false);
                    shared.received.lock().replace(&transfers);
                    let mut requests = Requests {
                        gives_up: transfers.len() < OLDER_LIST_MAX,
                        runs: Some(runs),
                        is_whole: true,
                        ..Requests::default()
                    };
                    requests.set(transfers);
                    *shared.requests.lock() = requests;
                    shared.has_requests.notify_one();
                }
            }
            shared.to_send.notify_one();
        }
    }

    async fn accept_pushed(&self, manifests: Vec<PushedManifest>) {
        self.opened.runner.accept_pushed(manifests).await;
    }

    async fn take_changes(&self, changes: Changes, shared: &Shared) -> Result<(), Fault> {
        tracing::debug!(
            revision = changes.revision,
            set = changes.set.len(),
            removed = changes.removed.len(),
            "changes"
        );
        shared.reporter.lock().begin(true);
        let received = shared.received.lock().take(&changes)?;
        let complete = match received {
            Received::Applies { complete } => complete,
            Received::AskList => {
                tracing::warn!(
                    revision = changes.revision,
                    "a message of the hub is missing; the complete list is requested"
                );
                *shared.asks_list.lock() = true;
                return Ok(());
            }
        };
        self.accept_pushed(changes.manifests).await;
        let mut requests = shared.requests.lock();
        requests.set(changes.set);
        requests.remove(changes.removed);
        requests.gives_up |= complete;
        requests.runs = changes.runs.or(requests.runs.take());
        if complete {
            requests.drop_unlisted(&shared.received.lock());
        }
        requests.check_size()?;
        drop(requests);
        shared.has_requests.notify_one();
        Ok(())
    }

    /// Executes the requests of the hub. A request that cannot be stored is tried again here and
    /// not over a new connection, which would bring the same request. It delays no other.
    async fn execute(&self, shared: &Shared) -> Result<(), Fault> {
        let runner = &self.opened.runner;
        let (mut left, mut runs) = (Requests::default(), None);
        let (mut logged, mut pause) = (None, STATE_RETRY_EVERY);
        loop {
            left.merge(std::mem::take(&mut *shared.requests.lock()));
            left.is_whole = false;
            if left.gives_up {
                left.drop_unlisted(&shared.received.lock());
            }
            runs = left.runs.take().or(runs);
            let unapplied = runner.apply(left.set.values()).await;
            self.note_applied(&left.set, shared).await;
            left.set.retain(|id, _| unapplied.transfers.contains(id));
            let mut fault = unapplied.fault;
            let removed: Vec<TransferId> = left.removed.iter().cloned().collect();
            match runner.give_up_these(&removed).await {
                Ok(()) => left.removed.clear(),
                Err(failed) => fault = fault.or(Some(failed)),
            }
            if left.gives_up {
                let is_wanted = |id: &TransferId| shared.received.lock().contains(id);
                match runner.give_up(is_wanted).await {
                    Ok(()) => left.gives_up = false,
                    Err(failed) => fault = fault.or(Some(failed)),
                }
            }
            if let Some(runs) = &runs {
                // After the transfers: an ended run removes the content that they delivered.
                let applied = self.runs.apply(runs, &unapplied.transfers).await;
                fault = fault.or(applied.err());
            }
            shared.to_send.notify_one();
            let Some(fault) = fault else {
                (logged, pause) = (None, STATE_RETRY_EVERY);
                shared.has_requests.notified().await;
                continue;
            };
            // Space may become free at any moment; any other fault may be permanent.
            if fault.reason == Reason::NoSpace {
                pause = STATE_RETRY_EVERY;
            }
            if logged.as_ref() != Some(&fault.message) {
                tracing::warn!(error = %fault, "the desired state of the hub could not be stored; retrying");
                logged = Some(fault.message);
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(BACKOFF_MAX),
                () = shared.has_requests.notified() => pause = STATE_RETRY_EVERY,
            }
        }
    }

    /// The hub is informed of the state of the transfers that it wants, unless it knows it.
    async fn note_applied(&self, applied: &BTreeMap<TransferId, Desired>, shared: &Shared) {
        for (id, wanted) in applied {
            // A transfer that could not be stored is reported with the unwritten ones.
            let Ok(row) = self.opened.catalogue.transfer(id).await else {
                continue;
            };
            let known = Known {
                state: row.state,
                reason: row.body.reason,
            };
            let mut reporter = shared.reporter.lock();
            let is_known = row.state == State::Queued
                && row.generation == wanted.generation
                && known == wanted.known;
            if !(is_known && reporter.acknowledges()) {
                reporter.note(row.id, row.state.is_final());
            }
        }
    }

    /// Sends what changes at this site.
    async fn report(&self, send: &mut SendHalf, shared: &Shared, link: &Link) -> Result<(), Fault> {
        let opened = &self.opened;
        let mut cursor = opened.catalogue.cursor().await?;
        let mut said_runs: Vec<RunReport> = Vec::new();
        let mut said_unwritten: Vec<TransferRow> = Vec::new();
        // An empty list is sent too: files may have been restored since the last connection.
        let mut said_changed: Option<Vec<(ArtifactRef, Message)>> = None;
        let mut certificate = None;
        let mut renew = tokio::time::interval(RENEW_CHECK_EVERY);
        loop {
            let changed = opened.catalogue.changed();
            loop {
                let query = TransferQuery {
                    since: Some(cursor),
                    ..TransferQuery::default()
                };
                let (rows, next) = opened.catalogue.transfers(&query).await?;
                let is_last = rows.is_empty();
                cursor = next;
                let mut reporter = shared.reporter.lock();
                for row in rows {
                    reporter.note(row.id, row.state.is_final());
                }
                if is_last {
                    break;
                }
            }
            let unwritten = opened.runner.unwritten();
            if unwritten != said_unwritten {
                let mut reporter = shared.reporter.lock();
                for row in unwritten.iter().chain(&said_unwritten) {
                    reporter.note(row.id.clone(), false);
                }
                drop(reporter);
                said_unwritten = unwritten;
            }
            if std::mem::take(&mut *shared.asks_list.lock()) {
                wire::send(send, &FromSite::List).await?;
            }
            self.send_due(send, shared, &said_unwritten, &mut certificate)
                .await?;
            let runs = self.runs.reports().await?;
            if runs != said_runs {
                for some in paging::pages(runs.clone(), REPORT_BYTES_MAX) {
                    wire::send(send, &FromSite::Runs(some)).await?;
                }
                said_runs = runs;
            }
            let mut changed_here = opened.catalogue.changed_here().await?;
            // The complete list is sent. Entries that do not fit are sent when other entries are
            // removed.
            changed_here.truncate(paging::fitting(&changed_here, ANSWER_BYTES_MAX));
            if said_changed.as_ref() != Some(&changed_here) {
                wire::send(send, &FromSite::Changed(changed_here.clone())).await?;
                said_changed = Some(changed_here);
            }
            tokio::pin!(changed);
            loop {
                let next_at = shared.reporter.lock().next_at(Instant::now());
                tokio::select! {
                    () = &mut changed => break,
                    () = shared.to_send.notified() => break,
                    () = sleep_until(next_at.unwrap_or_else(Instant::now)), if next_at.is_some() => {
                        self.send_due(send, shared, &said_unwritten, &mut certificate).await?;
                    }
                    _ = renew.tick() => self.hub.renew_if_due(link).await,
                }
            }
        }
    }

    /// Sends the reports that are due.
    async fn send_due(
        &self,
        send: &mut SendHalf,
        shared: &Shared,
        unwritten: &[TransferRow],
        certificate: &mut Option<model::receipt::Certificate>,
    ) -> Result<(), Fault> {
        loop {
            let (ids, acknowledges) = {
                let mut reporter = shared.reporter.lock();
                (reporter.next(Instant::now()), reporter.acknowledges())
            };
            if ids.is_empty() {
                return Ok(());
            }
            let unwritten: HashMap<&TransferId, &TransferRow> =
                unwritten.iter().map(|row| (&row.id, row)).collect();
            let mut budget = paging::Budget::new(match acknowledges {
                true => CHANGES_BYTES_MAX,
                false => REPORT_BYTES_MAX,
            });
            let (mut reports, mut rest) = (Vec::new(), ids.into_iter());
            for id in rest.by_ref() {
                let row = match unwritten.get(&id) {
                    Some(row) => (*row).clone(),
                    // The row is read just before it is sent, so that an older state never follows
                    // a newer one.
                    None => match self.opened.catalogue.transfer(&id).await {
                        Ok(row) => row,
                        Err(fault) => {
                            tracing::debug!(transfer = %id, error = %fault, "a transfer is not reported");
                            continue;
                        }
                    },
                };
                let report = report(row);
                if !budget.takes(&report) {
                    shared.reporter.lock().put_back([id]);
                    break;
                }
                reports.push(report);
            }
            shared.reporter.lock().put_back(rest);
            if reports.is_empty() {
                continue;
            }
            let ids: Vec<TransferId> = reports.iter().map(|report| report.id.clone()).collect();
            let number = shared.reporter.lock().sent(ids, Instant::now());
            let message = match acknowledges {
                true => FromSite::Reports(ReportBatch::new(number, reports, certificate)),
                false => FromSite::Report(reports),
            };
            wire::send(send, &message).await?;
        }
    }
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
mod tests {
    use super::*;
    use model::protocol::from_json;

    fn changes(text: &str) -> Changes {
        from_json(text.as_bytes()).unwrap()
    }

    fn wanted(id: &str) -> String {
        let digest = "00".repeat(32);
        format!(
            r#"{{"id":"{id}","delivery":"d-1","artifact":"model/{id}:1","digest":"{digest}","want":"run","generation":0,"total":1,"created_ms":1}}"#
        )
    }

    #[test]
    fn a_request_that_could_not_be_stored_ends_with_a_complete_list_without_it() {
        let mut received = ReceivedList::default();
        let first = changes(&format!(
            r#"{{"revision":1,"begin":true,"end":true,"set":[{},{}]}}"#,
            wanted("t-1"),
            wanted("t-2")
        ));
        received.take(&first).unwrap();
        // Both wait for room on the disk.
        let mut left = Requests::default();
        left.set(first.set);
        let list = changes(&format!(
            r#"{{"revision":2,"begin":true,"end":true,"set":[{}]}}"#,
            wanted("t-2")
        ));
        received.take(&list).unwrap();
        let mut newer = Requests::default();
        newer.set(list.set);
        left.merge(newer);
        left.drop_unlisted(&received);
        let ids: Vec<&str> = left.set.keys().map(|id| id.as_str()).collect();
        assert_eq!(ids, ["t-2"]);
    }

    #[test]
    fn requests_that_are_not_executed_are_bounded() {
        let id = |n: usize| format!("t-{n}").parse::<TransferId>().unwrap();
        let mut requests = Requests::default();
        requests.remove((0..2 * TRANSFERS_LISTED_MAX).map(id));
        requests.check_size().unwrap();
        requests.remove([id(2 * TRANSFERS_LISTED_MAX)]);
        requests.check_size().unwrap_err();
    }
}

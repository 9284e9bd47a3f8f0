//! The control stream of a site: what the site reports, and what is acknowledged. `list` sends what
//! the site has to do.
//!
//! What the catalogue cannot store, because its disk is full for example, is stored, or sent again
//! by the site, on the same connection.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tracing::Instrument as _;

use super::Sessions;
use crate::api::types::State;
use crate::config::Congestion;
use base::blocking::blocking;
use base::clock;
use base::fault::{Code, Fault};
use base::limits::{REPORTS_UNACKED_MAX, RUNS_OPEN_MAX, STATE_RETRY_EVERY, STATE_WRITE_BYTES_MIN};
use base::names::{ArtifactRef, RunName, SiteName, TransferId};
use base::peer::Peer;
use base::space::Space;
use base::spans;
use base::text::Message;
use content::manifest::FORMAT_MAX;
use exchange::wire;
use model::actor::Actor;
use model::policy::{self, Object, Verb};
use model::protocol::{FromHub, FromSite, Report};
use model::receipt::Certificate;
use model::run::RunReport;
use state::{Subject, TransferRow};
use transport::identity::verify_signature;
use transport::{Link, RecvHalf, SendHalf};

/// What a site has to do is read again at this interval, even without a wake-up.
const WORK_POLL_EVERY: Duration = Duration::from_secs(60);
/// Messages of a site that the catalogue could not store, for example because its disk is full.
/// They are stored, or requested, again on this connection.
#[derive(Default)]
struct Unstored {
    /// Whether a report of a transfer is missing, of a site that sends no batches.
    reports: bool,
    runs: Vec<RunReport>,
    changed: Option<Vec<(ArtifactRef, Message)>>,
    hello: Option<Hello>,
}

impl Unstored {
    fn is_empty(&self) -> bool {
        !self.reports && self.runs.is_empty() && self.changed.is_none() && self.hello.is_none()
    }
}

/// What is stored of a site's first message.
struct Hello {
    share: Option<Vec<String>>,
    train: Option<Vec<String>>,
    manifest_format: u32,
}

/// The batches of reports that were processed and are not acknowledged yet.
#[derive(Default)]
pub(super) struct Processed {
    /// The number of the last one.
    number: Option<u64>,
    /// The transfers whose reports could not be stored.
    unstored: Vec<TransferId>,
}

/// One control stream, as its reading and its writing half share it.
pub(super) struct Control<'a> {
    pub(super) site: &'a SiteName,
    unstored: Mutex<Unstored>,
    processed: Mutex<Processed>,
    /// There is something to acknowledge, or the site has asked for the complete list.
    pub(super) answer: Notify,
    pub(super) is_list_asked: AtomicBool,
    /// Whether the site receives changes; `None`: its hello has not arrived.
    receives_changes: watch::Sender<Option<bool>>,
}

impl<'a> Control<'a> {
    fn of(site: &'a SiteName) -> Self {
        Self {
            site,
            unstored: Mutex::default(),
            processed: Mutex::default(),
            answer: Notify::new(),
            is_list_asked: AtomicBool::new(false),
            receives_changes: watch::Sender::new(None),
        }
    }

    /// What was processed since the last call.
    pub(super) fn take_processed(&self) -> Option<FromHub> {
        let Processed { number, unstored } = std::mem::take(&mut *self.processed.lock());
        number.map(|number| FromHub::Stored { number, unstored })
    }

    /// How long the writing half waits for a change.
    pub(super) fn poll(&self) -> Duration {
        match self.unstored.lock().is_empty() {
            true => WORK_POLL_EVERY,
            false => STATE_RETRY_EVERY,
        }
    }
}

/// Whether the hub failed to store a message, in contrast to a refusal of the message.
fn is_not_stored(fault: &Fault) -> bool {
    matches!(
        fault.code,
        Code::NoSpace | Code::Internal | Code::Unreachable
    )
}

impl Sessions {
    /// The control stream of a site, until it ends.
    pub(super) async fn control(
        &self,
        mut send: SendHalf,
        mut recv: RecvHalf,
        site: &SiteName,
        link: &Link,
    ) -> Result<(), Fault> {
        let peer = Peer::Site(site.clone());
        policy::may(&Actor::from(&peer), Verb::Control, &Object::Daemon)?;
        send.set_priority(wire::PRIORITY_CONTROL);
        let control = Control::of(site);
        let read = async {
            let mut certificate = None;
            loop {
                let (message, share) =
                    wire::receive_within(&mut recv, self.inner.budgets.messages(), &peer).await?;
                self.inner.traffic.received(share.bytes());
                self.take(&control, &peer, link, message, &mut certificate)
                    .await?;
            }
            #[expect(unreachable_code, reason = "states the error type of an endless loop")]
            Ok::<(), Fault>(())
        };
        let write = async {
            let mut hello = control.receives_changes.subscribe();
            let receives_changes = match hello.wait_for(Option::is_some).await {
                Ok(receives_changes) => *receives_changes == Some(true),
                Err(_) => return Ok(()),
            };
            match receives_changes {
                true => self.send_changes(&mut send, &control).await,
                false => self.send_lists(&mut send, &control).await,
            }
        };
        tokio::select! {
            result = read => result,
            result = write => result,
            () = self.inner.stop.cancelled() => Ok(()),
        }
    }

    /// Handles one message of a site. `certificate`: the last one of its batches of reports.
    async fn take(
        &self,
        control: &Control<'_>,
        peer: &Peer,
        link: &Link,
        message: FromSite,
        certificate: &mut Option<Certificate>,
    ) -> Result<(), Fault> {
        let (site, unstored) = (control.site, &control.unstored);
        // Each of these is written to the catalogue and to the log as a whole.
        if matches!(message, FromSite::Hello { .. } | FromSite::Changed(_)) {
            self.inner.budgets.change(peer).await;
        }
        match message {
            FromSite::Hello {
                version,
                share,
                train,
                congestion,
                changes,
                manifest_format,
                reason,
            } => {
                if let Some(reason) = reason {
                    link.set_reason(reason.as_str());
                }
                // The site knows its connection; `auto` keeps the setting of the hub's own
                // configuration.
                if congestion != Congestion::Auto {
                    link.set_congestion(congestion);
                }
                // The first hello decides for the whole stream.
                control.receives_changes.send_if_modified(|known| {
                    let is_first = known.is_none();
                    known.get_or_insert(changes);
                    is_first
                });
                let [share, train] = [share, train].map(|list| list.map(|list| list.texts()));
                let hello = Hello {
                    share,
                    train,
                    manifest_format,
                };
                if let Err(fault) = self.take_hello(site, &hello).await {
                    tracing::error!(error = %fault, "the settings that a site reported could not be stored; retrying");
                    unstored.lock().hello = Some(hello);
                }
                self.note_seen(site, true, clock::now_ms(), Some(&version))
                    .await;
                // A site counts from its version on.
                self.announce_manifest_format().await?;
            }
            FromSite::Report(reports) => {
                if !self
                    .take_reports(site, peer, reports.into_iter())
                    .await
                    .is_empty()
                {
                    unstored.lock().reports = true;
                }
            }
            FromSite::Reports(batch) => {
                let number = batch.number;
                let reports = batch.into_reports(certificate);
                let failed = self.take_reports(site, peer, reports).await;
                let mut processed = control.processed.lock();
                processed.number = Some(number);
                processed.unstored.extend(failed);
                if processed.unstored.len() > 2 * REPORTS_UNACKED_MAX {
                    return Err(Fault::integrity(
                        "the site sent more reports than may wait for an acknowledgement",
                    ));
                }
                drop(processed);
                control.answer.notify_one();
            }
            FromSite::List => {
                control.is_list_asked.store(true, Ordering::Relaxed);
                control.answer.notify_one();
            }
            FromSite::Runs(reports) => {
                self.inner.budgets.reports(peer, reports.len()).await;
                // The reports of all runs may arrive in several messages.
                let names: Vec<RunName> =
                    reports.iter().map(|report| report.name.clone()).collect();
                let failed = self.take_run_reports(site, reports).await;
                let mut unstored = unstored.lock();
                unstored.runs.retain(|report| !names.contains(&report.name));
                unstored.runs.extend(failed);
                unstored.runs.truncate(RUNS_OPEN_MAX);
            }
            FromSite::Changed(all) => match self.inner.catalogue.set_changed_at(site, &all).await {
                Ok(true) => {
                    tracing::info!(
                        artifacts = all.len(),
                        "a site reported changed files of artifacts that it published"
                    );
                }
                Ok(false) => {}
                Err(fault) => {
                    tracing::error!(error = %fault, "the changes that a site reported could not be stored; retrying");
                    unstored.lock().changed = Some(all);
                }
            },
        }
        if !unstored.lock().is_empty() {
            self.inner.catalogue.notify_of(Subject::Site(site.clone()));
        }
        Ok(())
    }

    /// Handles a site's reports of its transfers. Returns those that could not be stored.
    async fn take_reports(
        &self,
        site: &SiteName,
        peer: &Peer,
        reports: impl ExactSizeIterator<Item = Report>,
    ) -> Vec<TransferId> {
        self.inner.budgets.reports(peer, reports.len()).await;
        let mut unstored = Vec::new();
        for report in reports {
            // An invalid report must not end the connection for all other reports.
            let id = report.id.clone();
            match self.take_report(site, report).await {
                Err(fault) if is_not_stored(&fault) => {
                    if unstored.is_empty() {
                        tracing::error!(transfer = %id, error = %fault, "a report could not be stored; it is requested again");
                    }
                    unstored.push(id);
                }
                Err(fault) => {
                    let refused = &self.inner.refused_reports;
                    refused.note(format_args!("{site}, transfer {id}: {fault}"));
                }
                Ok(()) => {}
            }
        }
        unstored
    }

    async fn take_hello(&self, site: &SiteName, hello: &Hello) -> Result<(), Fault> {
        let catalogue = &self.inner.catalogue;
        catalogue.set_share(site, hello.share.as_deref()).await?;
        catalogue
            .set_train_allow(site, hello.train.as_deref())
            .await?;
        catalogue
            .set_manifest_format(site, hello.manifest_format)
            .await
    }

    /// Tells each peer that connects from now on which manifests all sites read.
    async fn announce_manifest_format(&self) -> Result<(), Fault> {
        let format = self.inner.catalogue.manifest_format().await?;
        let format = format.unwrap_or(FORMAT_MAX);
        self.inner.manifest_format.store(format, Ordering::Relaxed);
        Ok(())
    }

    /// Handles a site's reports of its runs. Returns the reports that could not be stored.
    async fn take_run_reports(&self, site: &SiteName, reports: Vec<RunReport>) -> Vec<RunReport> {
        let mut unstored = Vec::new();
        for report in reports {
            let span = spans::run(&report.name);
            let taken = self.inner.runs.take_report(site, report.clone());
            match taken.instrument(span.clone()).await {
                Err(fault) if is_not_stored(&fault) => {
                    span.in_scope(|| tracing::error!(error = %fault, "a report of a run could not be stored; retrying"));
                    unstored.push(report);
                }
                Err(fault) => {
                    let refused = &self.inner.refused_reports;
                    refused.note(format_args!("{site}, run {}: {fault}", report.name));
                }
                Ok(()) => {}
            }
        }
        unstored
    }

    /// Stores the messages that could not be stored before, when there is space. Returns whether
    /// the site must send its reports again.
    pub(super) async fn store_again(&self, control: &Control<'_>) -> bool {
        let (site, unstored) = (control.site, &control.unstored);
        if unstored.lock().is_empty() {
            return false;
        }
        let data = self.inner.data_dir.clone();
        let space = blocking(move || Space::of(&data)).await;
        if space.is_ok_and(|space| !space.has(STATE_WRITE_BYTES_MIN, 1)) {
            return false;
        }
        let held = std::mem::take(&mut *unstored.lock());
        let catalogue = &self.inner.catalogue;
        if let Some(hello) = held.hello
            && self.take_hello(site, &hello).await.is_err()
        {
            unstored.lock().hello.get_or_insert(hello);
        }
        if let Some(changed) = held.changed
            && catalogue.set_changed_at(site, &changed).await.is_err()
        {
            unstored.lock().changed.get_or_insert(changed);
        }
        let failed = self.take_run_reports(site, held.runs).await;
        let mut now = unstored.lock();
        // A report that arrived in the meantime is newer.
        for report in failed {
            if now.runs.len() < RUNS_OPEN_MAX
                && now.runs.iter().all(|newer| newer.name != report.name)
            {
                now.runs.push(report);
            }
        }
        held.reports
    }

    pub(in crate::hub) async fn take_report(
        &self,
        site: &SiteName,
        report: Report,
    ) -> Result<(), Fault> {
        let row = match self.inner.catalogue.transfer(&report.id).await {
            Err(fault) if fault.code == Code::NotFound => return Ok(()),
            row => row?,
        };
        let actor = Actor::Site(site.clone());
        let transfer = Object::Transfer { to: &row.site };
        policy::may(&actor, Verb::Report, &transfer).map_err(|_| {
            Fault::not_allowed(format!(
                "site {site} reported a transfer of site {}",
                row.site
            ))
        })?;
        let span = spans::transfer(&row.id, &row.artifact, &row.site);
        self.take_report_of(row, report).instrument(span).await
    }

    /// Stores a report of the transfer with this row.
    async fn take_report_of(&self, row: TransferRow, report: Report) -> Result<(), Fault> {
        // The state machine refuses reports that were never requested, that are late, or that have
        // no receipt.
        if let (State::Done, Some(receipt)) = (report.state, &report.body.receipt) {
            receipt.check(
                &row,
                |certificate| self.inner.identity.verify_site(certificate),
                verify_signature,
            )?;
        }
        if report.generation == row.generation && row.state != State::Cancelled {
            // Before the failure becomes visible: a user who sees it may publish again at once.
            self.inner.relay.recheck_refused(&report).await;
        }
        let is_news = report.generation == row.generation && report.state != row.state;
        let state = report.state;
        self.inner
            .catalogue
            .report(&report.id, report.generation, state, report.body)
            .await?;
        if is_news {
            tracing::info!(state = state.as_str(), "the site reports another state");
        }
        Ok(())
    }
}

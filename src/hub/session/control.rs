//! The control stream of a site: the list of wanted transfers and runs goes out, reports come in.
//!
//! What the catalogue cannot store, because its disk is full for example, is stored, or asked for,
//! again on the same connection.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::Instrument as _;

use super::Sessions;
use crate::api::types::State;
use crate::config::Congestion;
use crate::hub::manifest_push::ManifestPush;
use base::blocking::blocking;
use base::fault::{Code, Fault};
use base::limits::{RUNS_OPEN_MAX, STATE_RETRY_EVERY, STATE_WRITE_BYTES_MIN};
use base::names::{ArtifactRef, Kind, RunName, SiteName};
use base::peer::Peer;
use base::space::Space;
use base::spans;
use base::text::Message;
use exchange::wire;
use model::actor::Actor;
use model::policy::{self, Object, Verb};
use model::protocol::{Desired, FromHub, FromSite, Report};
use model::run::{DesiredRun, RunReport};
use state::{Subject, TransferRow};
use transport::identity::verify_signature;
use transport::{Link, RecvHalf, SendHalf};

/// What a site has to do is read again at this interval, even without a wake-up.
const WORK_POLL_EVERY: Duration = Duration::from_secs(60);
/// The largest part of one message that lineages may use.
pub(super) const LINEAGE_BYTES_MAX: usize = 1 << 20;

/// Messages of a site that the catalogue could not store, for example because its disk is full.
/// They are stored, or requested, again on this connection.
#[derive(Default)]
struct Unstored {
    /// Whether a report of a transfer is missing.
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

/// `share` and `train` of a site's first message.
type Hello = (Option<Vec<String>>, Option<Vec<String>>);

/// Whether the hub failed to store a message, in contrast to a refusal of the message.
fn is_not_stored(fault: &Fault) -> bool {
    matches!(
        fault.code,
        Code::NoSpace | Code::Internal | Code::Unreachable
    )
}

impl Sessions {
    /// The control stream: after each change, the whole desired state is sent again.
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
        let unstored: Mutex<Unstored> = Mutex::default();
        let read = async {
            loop {
                let (message, _share) =
                    wire::receive_within(&mut recv, self.inner.budgets.messages(), &peer).await?;
                match message {
                    FromSite::Hello {
                        version,
                        share,
                        train,
                        congestion,
                    } => {
                        // The site knows its connection; `auto` keeps the setting of the hub's own
                        // configuration.
                        if congestion != Congestion::Auto {
                            link.set_congestion(congestion);
                        }
                        let [share, train] =
                            [share, train].map(|list| list.map(|list| list.texts()));
                        if let Err(fault) = self
                            .take_hello(site, share.as_deref(), train.as_deref())
                            .await
                        {
                            tracing::error!(error = %fault, "the settings that a site reported could not be stored; retrying");
                            unstored.lock().hello = Some((share, train));
                        }
                        self.note_seen(site, Some(&version)).await;
                    }
                    FromSite::Report(reports) => {
                        self.inner.budgets.reports(&peer, reports.len()).await;
                        for report in reports {
                            // An invalid report must not end the connection for all other reports.
                            let id = report.id.clone();
                            match self.take_report(site, report).await {
                                Err(fault) if is_not_stored(&fault) => {
                                    if !std::mem::replace(&mut unstored.lock().reports, true) {
                                        tracing::error!(transfer = %id, error = %fault, "a report could not be stored; it is requested again");
                                    }
                                }
                                Err(fault) => {
                                    tracing::warn!(transfer = %id, error = %fault, "a report was refused");
                                }
                                Ok(()) => {}
                            }
                        }
                    }
                    FromSite::Runs(reports) => {
                        self.inner.budgets.reports(&peer, reports.len()).await;
                        // The reports of all runs may arrive in several messages.
                        let names: Vec<RunName> =
                            reports.iter().map(|report| report.name.clone()).collect();
                        let failed = self.take_run_reports(site, reports).await;
                        let mut unstored = unstored.lock();
                        unstored.runs.retain(|report| !names.contains(&report.name));
                        unstored.runs.extend(failed);
                        unstored.runs.truncate(RUNS_OPEN_MAX);
                    }
                    FromSite::Changed(all) => {
                        match self.inner.catalogue.set_changed_at(site, &all).await {
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
                        }
                    }
                }
                if !unstored.lock().is_empty() {
                    self.inner.catalogue.notify_of(Subject::Site(site.clone()));
                }
            }
            #[expect(unreachable_code, reason = "states the error type of an endless loop")]
            Ok::<(), Fault>(())
        };
        let write = async {
            let mut last: Option<(Vec<Desired>, Vec<DesiredRun>)> = None;
            let mut revision = 0;
            let inner = &self.inner;
            let mut push = ManifestPush::begin(inner.catalogue.clone(), inner.library.clone());
            let mut tried = Instant::now();
            let mut work = self.inner.catalogue.watch(Subject::Site(site.clone()));
            loop {
                if tried.elapsed() >= STATE_RETRY_EVERY {
                    tried = Instant::now();
                    if self.store_again(site, &unstored).await {
                        // The site answers each list with the state of all its transfers.
                        last = None;
                    }
                }
                let now = (
                    self.desired_transfers(site).await?,
                    self.inner.runs.desired(site).await?,
                );
                if last.as_ref() != Some(&now) {
                    revision += 1;
                    let (transfers, runs) = now.clone();
                    let (manifests, _share) = push.next(site, &transfers).await;
                    wire::send(
                        &mut send,
                        &FromHub::Desired {
                            revision,
                            transfers,
                            runs,
                            manifests,
                        },
                    )
                    .await?;
                    last = Some(now);
                }
                let poll = match unstored.lock().is_empty() {
                    true => WORK_POLL_EVERY,
                    false => STATE_RETRY_EVERY,
                };
                work.changed_within(poll).await;
            }
            #[expect(unreachable_code, reason = "states the error type of an endless loop")]
            Ok::<(), Fault>(())
        };
        tokio::select! {
            result = read => result,
            result = write => result,
            () = self.inner.stop.cancelled() => Ok(()),
        }
    }

    async fn take_hello(
        &self,
        site: &SiteName,
        share: Option<&[String]>,
        train: Option<&[String]>,
    ) -> Result<(), Fault> {
        self.inner.catalogue.set_share(site, share).await?;
        self.inner.catalogue.set_train_allow(site, train).await
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
                    span.in_scope(
                        || tracing::warn!(error = %fault, "a report of a run was refused"),
                    );
                }
                Ok(()) => {}
            }
        }
        unstored
    }

    /// Stores the messages that could not be stored before, when there is space. Returns whether
    /// the site must send its reports again.
    async fn store_again(&self, site: &SiteName, unstored: &Mutex<Unstored>) -> bool {
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
        if let Some((share, train)) = held.hello
            && self
                .take_hello(site, share.as_deref(), train.as_deref())
                .await
                .is_err()
        {
            unstored.lock().hello.get_or_insert((share, train));
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

    /// The transfers of a site's desired state, each with the transfers that must complete first.
    pub(super) async fn desired_transfers(&self, site: &SiteName) -> Result<Vec<Desired>, Fault> {
        let catalogue = &self.inner.catalogue;
        let waits = catalogue.waits(site).await?;
        let mut out = Vec::new();
        let mut told = 0;
        for row in catalogue.open_transfers(site).await? {
            let after = waits
                .iter()
                .filter(|(id, _)| *id == row.id)
                .map(|(_, first)| first.clone())
                .collect();
            let lineage = if row.artifact.kind == Kind::Model {
                catalogue.lineage(&row.artifact).await?
            } else {
                None
            };
            // A transfer must be listed, otherwise the site cancels it. The lineage of its model is
            // included only if there is space.
            let lineage = lineage.filter(|lineage| {
                let bytes = serde_json::to_vec(lineage).map_or(0, |text| text.len());
                let fits = told + bytes <= LINEAGE_BYTES_MAX;
                told += if fits { bytes } else { 0 };
                fits
            });
            out.push(Desired {
                after,
                lineage,
                ..desired(row)
            });
        }
        Ok(out)
    }
}

fn desired(row: TransferRow) -> Desired {
    Desired {
        id: row.id,
        delivery: row.delivery,
        artifact: row.artifact,
        digest: row.digest,
        want: row.want,
        generation: row.generation,
        total: row.body.bytes.total,
        created_ms: row.created_ms,
        after: Vec::new(),
        lineage: None,
    }
}

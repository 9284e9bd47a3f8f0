//! The connection of one site at the hub: sends the desired state, handles reports, and answers
//! fetches and questions.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::manifest_push::ManifestPush;
use super::{Connected, Hub};
use crate::api::types::{Published, RunVerb, State, Transfer, TransferQuery};
use crate::config::Congestion;
use base::budget::Seat;
use base::fault::{Code, Fault};
use base::limits::{
    ANSWER_BYTES_MAX, ANSWER_IDLE_MAX, ANSWER_MAX, API_ROWS_MAX, FETCH_STREAMS_MAX, LONG_POLL_MAX,
    MANIFEST_IDLE_MAX, OFFER_MAX, QUESTIONS_AT_ONCE_MAX, RUNS_OPEN_MAX, SILENCE_MAX,
    STATE_RETRY_EVERY, STATE_WRITE_BYTES_MIN,
};
use base::names::{ArtifactRef, Kind, RunName, SiteName, SiteSelector, WorkIds};
use base::omitted::Omitted;
use base::peer::Peer;
use base::space::Space;
use base::text::Message;
use content::manifest::Digest;
use exchange::fetch::{self, Fetcher};
use exchange::wire;
use model::actor::Actor;
use model::paging::{self, Room};
use model::policy::{self, Object, Verb};
use model::protocol::{
    AskHub, AskSite, CONTROL, Desired, FETCH, FromHub, FromSite, QUESTION, Report,
};
use model::run::{DesiredRun, RunReport};
use state::{Subject, TransferRow, no_delivery};
use transport::identity::verify_signature;
use transport::{Link, RecvHalf, SendHalf};

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

/// The limits and the control stream of one site's connection.
struct Streams {
    fetches: Semaphore,
    questions: Semaphore,
    /// Ends the control stream.
    control: Mutex<CancellationToken>,
}

/// The bytes of an answer besides its list.
const ANSWER_FRAME_BYTES: usize = 1 << 10;
/// What a site has to do is read again at this interval, even without a wake-up.
const WORK_POLL_EVERY: Duration = Duration::from_secs(60);
/// The largest part of one message that lineages may use.
const LINEAGE_BYTES_MAX: usize = 1 << 20;

impl Hub {
    /// Serves a site until its connection ends.
    pub(super) async fn welcome(&self, name: SiteName, link: Link, cert_der: Vec<u8>) {
        let known = self
            .inner
            .catalogue
            .site(name.as_str())
            .await
            .is_ok_and(|site| site.is_some());
        let actor = Actor::Site(name.clone());
        if policy::may(&actor, Verb::Connect, &Object::Membership { known }).is_err() {
            link.close("the site is not registered at the hub: join again");
            return;
        }
        let connected = Connected {
            link: link.clone(),
            cert_der: Arc::new(cert_der),
        };
        let old = self
            .inner
            .links
            .write()
            .insert(name.clone(), connected.clone());
        if let Some(old) = old {
            if !old.link.is_closed() && old.link.remote_address().ip() != link.remote_address().ip()
            {
                let (old, new) = (old.link.remote_address(), link.remote_address());
                tracing::warn!(site = %name, %old, %new, "a site connected from another address while its connection was open: do two machines use its name?");
            }
            old.link.close("the site has a newer connection");
        }
        tracing::info!(site = %name, line = link.transport(), "a site is online");
        self.note_seen(&name, None).await;
        let _seats = self.seats();
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
            self.inner
                .tasks
                .spawn(async move { this.stream(send, recv, name, &link, &streams).await });
        }
        link.close("the hub stops");
        {
            let mut links = self.inner.links.write();
            // A newer connection of the same site is kept.
            if links
                .get(&name)
                .is_some_and(|c| Arc::ptr_eq(&c.cert_der, &connected.cert_der))
            {
                links.remove(&name);
            }
        }
        tracing::info!(site = %name, "a site is offline");
        self.note_seen(&name, None).await;
    }

    /// Reserves the part of each budget for a connected peer.
    pub(super) fn seats(&self) -> [Seat; 3] {
        [
            self.inner.budget.seat(),
            self.inner.questions.seat(),
            self.inner.messages.seat(),
        ]
    }

    async fn note_seen(&self, name: &SiteName, version: Option<&str>) {
        if let Err(fault) = self.inner.catalogue.site_seen(name, version).await {
            tracing::error!(site = %name, error = %fault, "the catalogue cannot be written");
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
                fetch::serve(send, recv, &Peer::Site(site.clone()), self).await;
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
                self.question(send, recv, &site).await
            }
            other => Err(Fault::integrity(format!("a stream of kind {other}"))),
        };
        if let Err(fault) = result {
            tracing::debug!(%site, error = %fault, "a stream ended");
        }
    }

    /// The control stream: after each change, the whole desired state is sent again.
    async fn control(
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
                    wire::receive_within(&mut recv, &self.inner.messages, &peer).await?;
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
                            tracing::error!(%site, error = %fault, "the settings that a site reported could not be stored; retrying");
                            unstored.lock().hello = Some((share, train));
                        }
                        self.note_seen(site, Some(&version)).await;
                    }
                    FromSite::Report(reports) => {
                        self.inner.reports.go(&peer, reports.len()).await;
                        for report in reports {
                            // An invalid report must not end the connection for all other reports.
                            let id = report.id.clone();
                            match self.take_report(site, report).await {
                                Err(fault) if is_not_stored(&fault) => {
                                    if !std::mem::replace(&mut unstored.lock().reports, true) {
                                        tracing::error!(%site, transfer = %id, error = %fault, "a report could not be stored; it is requested again");
                                    }
                                }
                                Err(fault) => {
                                    tracing::warn!(%site, transfer = %id, error = %fault, "a report was refused");
                                }
                                Ok(()) => {}
                            }
                        }
                    }
                    FromSite::Runs(reports) => {
                        self.inner.reports.go(&peer, reports.len()).await;
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
                                tracing::info!(%site, artifacts = all.len(), "a site reported changed files of artifacts that it published");
                            }
                            Ok(false) => {}
                            Err(fault) => {
                                tracing::error!(%site, error = %fault, "the changes that a site reported could not be stored; retrying");
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
            let mut push = ManifestPush::begin();
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
                    self.desired_runs(site).await?,
                );
                if last.as_ref() != Some(&now) {
                    revision += 1;
                    let (transfers, runs) = now.clone();
                    let (manifests, _share) = self.push_new(site, &transfers, &mut push).await;
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
            match self.take_run_report(site, report.clone()).await {
                Err(fault) if is_not_stored(&fault) => {
                    tracing::error!(%site, run = %report.name, error = %fault, "a report of a run could not be stored; retrying");
                    unstored.push(report);
                }
                Err(fault) => {
                    tracing::warn!(%site, run = %report.name, error = %fault, "a report of a run was refused");
                }
                Ok(()) => {}
            }
        }
        unstored
    }

    /// Stores the messages that could not be stored before, when there is space. Returns whether
    /// the site must send its reports again.
    async fn store_again(&self, site: &SiteName, unstored: &Mutex<Unstored>) -> bool {
        if unstored.lock().is_empty()
            || Space::of(&self.inner.config.data_dir)
                .is_ok_and(|space| !space.has(STATE_WRITE_BYTES_MIN, 1))
        {
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

    async fn take_report(&self, site: &SiteName, report: Report) -> Result<(), Fault> {
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
            self.recheck_refused(site, &report).await;
        }
        self.inner
            .catalogue
            .report(&report.id, report.generation, report.state, report.body)
            .await
    }

    async fn question(
        &self,
        mut send: SendHalf,
        mut recv: RecvHalf,
        site: &SiteName,
    ) -> Result<(), Fault> {
        let peer = Peer::Site(site.clone());
        let (question, share) =
            wire::receive_question(&mut recv, &self.inner.questions, &peer).await?;
        if !matches!(
            question,
            AskHub::Delivery(_)
                | AskHub::Transfers { .. }
                | AskHub::ShowRun(_)
                | AskHub::ListRuns { .. }
        ) {
            self.inner.changes.go(&peer, 1).await;
        }
        let actor = Actor::from(&peer);
        let may = policy::may(&actor, verb_of(&question), &Object::Daemon);
        let answer = match (may, question) {
            (Err(refusal), _) => Err(refusal.into()),
            (
                Ok(()),
                AskHub::Publish {
                    artifact,
                    digest,
                    to,
                    run,
                    omitted,
                },
            ) => {
                let offer =
                    self.take_offer(site, artifact, digest, to.as_ref(), run.as_ref(), &omitted);
                let offer = timeout(OFFER_MAX, offer).await;
                offer.unwrap_or_else(|_| {
                    Err(Fault::unreachable(format!(
                        "the manifest did not arrive within {} s",
                        OFFER_MAX.as_secs()
                    )))
                })
            }
            (Ok(()), question) => {
                let answer = timeout(ANSWER_MAX, self.answer(site, &actor, question)).await;
                answer.unwrap_or_else(|_| {
                    Err(Fault::unreachable("the hub did not answer in time")
                        .with_next("ask again later"))
                })
            }
        };
        drop(share);
        self.send_answer(&mut send, &peer, answer).await
    }

    /// Sends the answer to a question. The unsent part of the answer counts against the peer's
    /// budget.
    pub(super) async fn send_answer(
        &self,
        send: &mut SendHalf,
        peer: &Peer,
        answer: Result<serde_json::Value, Fault>,
    ) -> Result<(), Fault> {
        let answer = answer.and_then(fits);
        let text = serde_json::to_vec(&answer)
            .map_err(|e| Fault::internal(format!("an answer as JSON: {e}")))?;
        drop(answer);
        let _share = self
            .inner
            .questions
            .take(peer, text.len() as u64, wire::PRIORITY_QUESTION)
            .await?;
        send.set_priority(wire::PRIORITY_QUESTION);
        let sent = timeout(ANSWER_IDLE_MAX, wire::send_bytes(send, &text)).await;
        sent.map_err(|_| {
            Fault::unreachable(format!("{peer} does not read the answer to its question"))
        })??;
        send.finish()
    }

    async fn answer(
        &self,
        site: &SiteName,
        actor: &Actor,
        question: AskHub,
    ) -> Result<serde_json::Value, Fault> {
        match question {
            AskHub::Act { id, action } => {
                self.act_on(actor, &id, action).await?;
                as_json(self.answer_page(&id, None).await?.0)
            }
            AskHub::Deliver { artifacts, to } => {
                as_json(self.deliver_to(actor, &artifacts, &to, false).await?)
            }
            AskHub::Renew { request } => {
                self.renew_for(&Peer::Site(site.clone()), request.as_str())
            }
            AskHub::Delivery(id) => self.delivery_for(actor, &id).await,
            AskHub::Transfers { id, since, wait } => {
                self.transfers_for(actor, &id, since, wait).await
            }
            AskHub::StartRun(request) => as_json(self.start_run(actor, &request).await?),
            AskHub::ActOnRun(request) => as_json(self.act_on_run(actor, &request).await?),
            AskHub::ShowRun(name) => as_json(self.show_run(actor, name.as_str()).await?),
            AskHub::ListRuns { limit, from } => {
                let room = Room {
                    rows: limit.saturating_sub(from).min(API_ROWS_MAX),
                    bytes: ANSWER_BYTES_MAX,
                };
                as_json(self.list_runs(actor, None, from, room).await?.rows)
            }
            AskHub::Publish { .. } | AskHub::Upload { .. } => {
                Err(Fault::internal("an offer or upload is handled elsewhere"))
            }
        }
    }

    /// A delivery with all parts, for an actor that may read all of them.
    async fn delivery_for(&self, actor: &Actor, id: &str) -> Result<serde_json::Value, Fault> {
        let row = self.inner.catalogue.delivery(id).await?;
        if !self.may_read_all(actor, &all_of(id)).await? {
            return Err(no_delivery(id));
        }
        as_json(self.whole(&row, ANSWER_BYTES_MAX).await?)
    }

    /// Whether an actor may read the state of each of these transfers.
    async fn may_read_all(&self, actor: &Actor, query: &TransferQuery) -> Result<bool, Fault> {
        let mut of_others: HashMap<(ArtifactRef, SiteName), TransferRow> = HashMap::new();
        let see = |row: TransferRow| {
            // Most transfers are the actor's own. The others need more facts.
            let own = Object::Progress {
                to: &row.site,
                origin: None,
                delivered: false,
            };
            if policy::may(actor, Verb::Read, &own).is_err() {
                of_others.insert((row.artifact.clone(), row.site.clone()), row);
            }
            true
        };
        let catalogue = &self.inner.catalogue;
        catalogue.scan_transfers(query, None, i64::MAX, see).await?;
        for row in of_others.values() {
            if !self.inner.entitlement.may_read_progress(actor, row).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The state of the transfers of a site's artifacts to any site.
    async fn transfers_for(
        &self,
        actor: &Actor,
        id: &WorkIds,
        since: Option<u64>,
        wait: u64,
    ) -> Result<serde_json::Value, Fault> {
        // All transfers are checked, changed or not: a site gets the same answer for transfers that
        // it may not read and for those that do not exist.
        let ids = id.to_string();
        if !self.may_read_all(actor, &all_of(&ids)).await? {
            return Err(no_transfers(&ids));
        }
        let until = Instant::now() + Duration::from_secs(wait).min(LONG_POLL_MAX);
        loop {
            let changed = self.inner.catalogue.changed();
            let (rows, cursor) = self.answer_page(&ids, since).await?;
            if !rows.is_empty() || since.is_none() || Instant::now() >= until {
                return as_json((rows, cursor));
            }
            let _ = tokio::time::timeout_at(until.into(), changed).await;
        }
    }

    /// As many of the transfers of ids as one answer can have, and the next cursor. If some are
    /// left, the transfers that changed first are returned, and the rest follows after the cursor.
    async fn answer_page(
        &self,
        id: &str,
        since: Option<u64>,
    ) -> Result<(Vec<Transfer>, u64), Fault> {
        let query = TransferQuery {
            since: Some(since.unwrap_or(0)),
            ..all_of(id)
        };
        // Space for the list, the cursor and the enclosing JSON.
        let room = Room {
            rows: u32::MAX,
            bytes: ANSWER_BYTES_MAX - ANSWER_FRAME_BYTES,
        };
        let (mut page, cursor) = self
            .inner
            .catalogue
            .transfer_page(&query, None, room, |row| self.view(row))
            .await?;
        if page.next.is_none() && since.is_none() {
            // The list is complete: in the order of creation.
            page.rows.sort_by(|one, other| one.id.cmp(&other.id));
        }
        Ok((page.rows, cursor))
    }

    /// The transfers of a site's desired state, each with the transfers that must complete first.
    async fn desired_transfers(&self, site: &SiteName) -> Result<Vec<Desired>, Fault> {
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

    /// Adds an artifact that was published at a site to the catalogue. Its content stays at the
    /// site until it is requested.
    async fn take_offer(
        &self,
        site: &SiteName,
        artifact: ArtifactRef,
        digest: Digest,
        to: Option<&SiteSelector>,
        run: Option<&RunName>,
        omitted: &Omitted,
    ) -> Result<serde_json::Value, Fault> {
        let inner = &self.inner;
        let actor = Actor::Site(site.clone());
        // All checks that can refuse the offer come before the artifact exists.
        if let Some(to) = to {
            let sites = inner.catalogue.select_sites(to).await?;
            inner
                .entitlement
                .targets(&actor, &artifact, Some(site), &sites, to)
                .await?;
        }
        if let Some(run) = run {
            self.check_run_model(&actor, run, &artifact).await?;
        }
        let link = self
            .link_of(site)
            .ok_or_else(|| Fault::unreachable(format!("the connection to site {site} ended")))?;
        let fetcher = Fetcher::new(link, digest, Arc::default()).with_idle_max(MANIFEST_IDLE_MAX);
        let root = fetcher.root().await?;
        let reserved = self
            .reserve(&Peer::Site(site.clone()), &artifact, &root)
            .await?;
        // Until the artifact is in the catalogue, no garbage collection removes its pages.
        let store = inner.store.leased_with(reserved.clone());
        fetcher.pages(&root, None, &store).await?;
        self.check_manifest(&artifact, &root).await?;
        // If this digest was opened before the artifact was known here, it must be opened again.
        inner.opened.lock().retain(|opened| opened.digest != digest);
        let added = match run {
            Some(run) => self.add_run_model(&actor, run, &artifact, &root).await,
            None => {
                inner
                    .catalogue
                    .add_artifact(&artifact, &root, Some(site))
                    .await
            }
        };
        let added = inner
            .entitlement
            .hide_taken(&actor, &artifact, digest, added)
            .await?;
        reserved.finish();
        inner.catalogue.set_omitted(&artifact, omitted).await?;
        let transfers = match to {
            Some(to) => {
                self.deliver_to(&actor, std::slice::from_ref(&artifact), to, true)
                    .await?
                    .transfers
            }
            None => Vec::new(),
        };
        tracing::info!(%artifact, %digest, %site, bytes = root.totals.bytes, "published at a site");
        let (artifact, digest, bytes) = (artifact.to_string(), digest.hex(), root.totals.bytes);
        let published = Published {
            artifact,
            digest,
            transfers,
            bytes,
            stored: 0,
            unchanged: !added,
            note: None,
            omitted: omitted.list(),
        };
        serde_json::to_value(published).map_err(|e| Fault::internal(e.to_string()))
    }

    fn link_of(&self, site: &SiteName) -> Option<Link> {
        self.inner.links.read().get(site).map(|c| c.link.clone())
    }

    pub(super) fn renew_for(
        &self,
        holder: &Peer,
        request: &str,
    ) -> Result<serde_json::Value, Fault> {
        let request = hex::decode(request)
            .map_err(|_| Fault::integrity("a malformed certificate request"))?;
        Ok(serde_json::Value::String(hex::encode(
            self.inner.identity.issue_as(holder, &request)?,
        )))
    }

    /// Sends a question to a site that is online.
    pub(super) async fn ask_site<T: serde::de::DeserializeOwned + Send + 'static>(
        &self,
        site: &SiteName,
        question: &AskSite,
    ) -> Result<T, Fault> {
        let link = self
            .link_of(site)
            .ok_or_else(|| Fault::unreachable(format!("site {site} is not connected")))?;
        wire::ask(&link, question).await
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

/// A query for these ids, each of a transfer or a delivery.
fn all_of(id: &str) -> TransferQuery {
    TransferQuery {
        id: Some(id.to_owned()),
        ..TransferQuery::default()
    }
}

/// The answer for transfers that do not exist, or that an actor may not know.
pub(super) fn no_transfers(ids: &str) -> Fault {
    Fault::not_found(format!("there is no transfer or delivery {ids}"))
        .with_next("'packhorse status' lists them")
}

/// The verb of a question, before its object is known.
pub(super) fn verb_of(question: &AskHub) -> Verb {
    match question {
        AskHub::Publish { .. } => Verb::Offer,
        AskHub::Upload { .. } => Verb::Upload,
        AskHub::Renew { .. } => Verb::Renew,
        AskHub::Act { .. } => Verb::Act,
        AskHub::Deliver { .. } => Verb::Deliver,
        AskHub::Delivery(_) | AskHub::Transfers { .. } => Verb::Read,
        AskHub::ShowRun(_) | AskHub::ListRuns { .. } => Verb::Read,
        AskHub::StartRun(_) => Verb::Train,
        AskHub::ActOnRun(request) => verb_of_run(request.action),
    }
}

/// The verb of an action on a training run.
pub(super) fn verb_of_run(action: RunVerb) -> Verb {
    match action {
        RunVerb::Finish => Verb::Finish,
        RunVerb::Cancel => Verb::Cancel,
    }
}

/// Replaces an answer that its receiver would refuse as too large with a fault.
fn fits(answer: serde_json::Value) -> Result<serde_json::Value, Fault> {
    let bytes = paging::json_bytes(&answer);
    if bytes <= ANSWER_BYTES_MAX {
        return Ok(answer);
    }
    Err(Fault::usage(format!(
        "the request was executed, but its answer has {bytes} bytes; at most {ANSWER_BYTES_MAX} are allowed"
    ))
    .with_next("see 'packhorse status'; name fewer artifacts and sites at once"))
}

fn as_json<T: serde::Serialize>(value: T) -> Result<serde_json::Value, Fault> {
    serde_json::to_value(value).map_err(|e| Fault::internal(format!("an answer as JSON: {e}")))
}

#[cfg(test)]
mod tests;

//! The hub's implementation of the API.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;
use tokio::time::Instant;

use super::Hub;
use super::session::no_transfers;
use super::sharing::{self, Targets};
use crate::api::types::*;
use crate::api::{Backend, View, worker_page};
use crate::delivery::Whole;
use base::blocking::blocking;
use base::fault::{Code, Fault, Reason};
use base::limits::{API_PAGE_BYTES, DELIVERY_ARTIFACTS_MAX, DELIVERY_PARTS_MAX, PLAN_ROWS_MAX};
use base::names::{ArtifactRef, DeliveryId, SiteName, SiteSelector, TransferId, check_label};
use base::peer::Peer;
use base::text::Message;
use content::bundle::{self, Member};
use content::manifest::{Digest, Root};
use model::actor::Actor;
use model::paging::{Budget, Page, Pager, Room};
use model::policy::{self, Object, Verb};
use model::protocol::{AskSite, Planned, Standing, Stands};
use state::{
    Body, Changed, DeliveryRow, Part, SiteRow, TransferRow, new_delivery_id, what_changed,
};
use transport::identity::JoinToken;

/// How long all sites together may take to compute a plan.
const PLAN_MAX: Duration = Duration::from_secs(30);
/// Rows of a plan that are computed at once.
const PLANS_AT_ONCE: usize = 256;
/// How long a site may take to answer whether it still has an artifact.
const HOLDS_MAX: Duration = Duration::from_secs(5);
/// Sites that are asked this at once.
const HOLDS_AT_ONCE: usize = 32;

fn no_artifact_named() -> Fault {
    Fault::usage("no artifact is named")
}

fn parse_refs(artifacts: &[String]) -> Result<Vec<ArtifactRef>, Fault> {
    if artifacts.is_empty() {
        return Err(no_artifact_named());
    }
    artifacts.iter().map(|a| Ok(a.parse()?)).collect()
}

/// Refuses a request that is too large for one delivery or for one plan.
fn check_size(artifacts: &[ArtifactRef], sites: usize, parts_max: usize) -> Result<(), Fault> {
    let next = "name fewer artifacts or fewer sites at once";
    if artifacts.len() > DELIVERY_ARTIFACTS_MAX {
        return Err(Fault::usage(format!(
            "{} artifacts are named, and {DELIVERY_ARTIFACTS_MAX} are allowed at once",
            artifacts.len()
        ))
        .with_next(next));
    }
    let parts = artifacts.len().saturating_mul(sites);
    if parts > parts_max {
        let message = format!(
            "{} artifacts to {sites} sites are {parts} transfers, and {parts_max} are allowed at once",
            artifacts.len()
        );
        return Err(Fault::usage(message).with_next(next));
    }
    Ok(())
}

impl Hub {
    /// A transfer as the API shows it. If its site is offline, that is the reason of an open
    /// transfer.
    pub(super) fn view(&self, row: &TransferRow) -> Transfer {
        let mut view = row.view();
        if !row.state.is_final() && row.state != State::Paused && !self.is_online(&row.site) {
            view.reason = Some(Reason::SiteOffline);
            view.message = Some(format!("site {} is not connected", row.site));
            view.next = Some(
                "no action is needed: the transfer resumes when the site reconnects; see 'packhorse sites'".into(),
            );
            (view.rate, view.eta_seconds) = (0, None);
        }
        view
    }

    /// A delivery as the API shows it, and as a site receives it, with as many of its parts as fit
    /// in `max` bytes.
    pub(super) async fn whole(&self, row: &DeliveryRow, max: usize) -> Result<Delivery, Fault> {
        let mut whole = Whole::new(max);
        self.inner
            .catalogue
            .each_part(&row.id, |part| whole.add(self.view(&part)))
            .await?;
        Ok(whole.end(row))
    }

    /// A site as the API shows it, with the state of its connection.
    fn site_view(&self, row: &SiteRow) -> Site {
        let mut site = row.view();
        if let Some(connected) = self.inner.links.read().get(&site.name) {
            site.online = true;
            site.line = Some(connected.link.transport().into());
            site.rtt_ms = Some(connected.link.rtt().as_secs_f64() * 1000.0);
        }
        site
    }

    /// Starts a delivery. `brought`: the actor offers or uploads the artifacts in this request.
    pub(super) async fn deliver_to(
        &self,
        actor: &Actor,
        artifacts: &[ArtifactRef],
        selector: &SiteSelector,
        brought: bool,
    ) -> Result<Delivered, Fault> {
        if artifacts.is_empty() {
            return Err(no_artifact_named());
        }
        let sites = self.inner.catalogue.select_sites(selector).await?;
        check_size(artifacts, sites.len(), DELIVERY_PARTS_MAX)?;
        let (mut parts, mut left_out) = (Vec::new(), Vec::new());
        for artifact in artifacts {
            let entitlement = &self.inner.entitlement;
            let row = entitlement
                .artifact_for(actor, Verb::Deliver, artifact, brought)
                .await?;
            let targets = entitlement
                .targets(actor, artifact, row.origin.as_ref(), &sites, selector)
                .await?;
            parts.push(Part::new(&row, &targets.sites));
            left_out.extend(targets.left_out);
        }
        let delivery = new_delivery_id();
        let (transfers, notes) = self.begin_noted(&delivery, None, &parts).await?;
        let digest = parts
            .first()
            .map(|part| part.digest.hex())
            .unwrap_or_default();
        let artifact = artifacts
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(",");
        let transfers = transfers.into_iter().map(Into::into).collect();
        Ok(Delivered {
            artifact,
            digest,
            delivery: delivery.into(),
            transfers,
            left_out,
            notes,
        })
    }

    /// Starts a delivery, and repeats the transfers whose content the sites have lost since they
    /// were done.
    pub(super) async fn begin_delivery(
        &self,
        id: &DeliveryId,
        run: Option<&str>,
        parts: &[Part],
    ) -> Result<Vec<TransferId>, Fault> {
        Ok(self.begin_noted(id, run, parts).await?.0)
    }

    /// The same, and returns the state at the sites that had received something of it before.
    async fn begin_noted(
        &self,
        id: &DeliveryId,
        run: Option<&str>,
        parts: &[Part],
    ) -> Result<(Vec<TransferId>, Vec<String>), Fault> {
        let (mut lost, mut notes) = (Vec::new(), Vec::new());
        let done = self.inner.catalogue.done_already(parts).await?;
        let mut asked = futures::stream::iter(done)
            .map(|row| async move {
                let standing = self.standing(&row).await;
                (row, standing)
            })
            .buffered(HOLDS_AT_ONCE);
        while let Some((row, standing)) = asked.next().await {
            let found = found(&row, &standing);
            notes.extend(found.note);
            if found.again {
                lost.push(row.id);
            } else if standing.is_some() && row.body.message != found.message {
                let body = Body {
                    message: found.message,
                    ..row.body
                };
                self.inner
                    .catalogue
                    .update_transfer(&row.id, row.generation, row.state, &body)
                    .await?;
            }
        }
        Ok((
            self.inner.catalogue.deliver(id, run, parts, &lost).await?,
            notes,
        ))
    }

    /// The state of a delivered artifact at a site, as the site reports it. `None`: the site is
    /// offline or slow; its last report stays valid. A `retry` makes the site verify the artifact.
    async fn standing(&self, row: &TransferRow) -> Option<Standing> {
        let (artifact, digest) = (row.artifact.clone(), row.digest);
        let question = AskSite::Stands {
            artifact: artifact.clone(),
            digest,
        };
        match tokio::time::timeout(HOLDS_MAX, self.ask_site::<Standing>(&row.site, &question)).await
        {
            Ok(Ok(standing)) => return Some(standing),
            Ok(Err(_)) => {}
            Err(_) => return None,
        }
        // A site of the previous version reports only whether it has the artifact.
        let question = AskSite::Holds { artifact, digest };
        let answer = tokio::time::timeout(HOLDS_MAX, self.ask_site::<bool>(&row.site, &question))
            .await
            .ok()?
            .ok()?;
        let state = if answer {
            Stands::Sound
        } else {
            Stands::Missing
        };
        Some(Standing {
            state,
            detail: None,
            active: None,
        })
    }

    /// Performs an action on a transfer, or on all transfers of a delivery. An actor that may not
    /// act on all of them gets the answer for a transfer that does not exist.
    pub(super) async fn act_on(
        &self,
        actor: &Actor,
        id: &str,
        action: Action,
    ) -> Result<(), Fault> {
        // For several transfers, a retry repeats the failed ones; if none failed, each is verified
        // again.
        let (mut ids, mut failed, mut may_act) = (Vec::new(), false, true);
        let query = TransferQuery {
            id: Some(id.to_owned()),
            ..TransferQuery::default()
        };
        let see = |row: TransferRow| {
            failed |= matches!(row.state, State::Failed | State::Cancelled);
            may_act &= policy::may(actor, Verb::Act, &Object::Transfer { to: &row.site }).is_ok();
            ids.push(row.id);
            may_act
        };
        self.inner
            .catalogue
            .scan_transfers(&query, None, i64::MAX, see)
            .await?;
        if !may_act {
            return Err(no_transfers(id));
        }
        let single = ids.len() == 1;
        let (mut acted, mut refused) = (false, None);
        for one in ids {
            let row = self.inner.catalogue.transfer(&one).await?;
            let fits = row.takes(action, failed);
            if !fits && single {
                let state = if row.removed_ms.is_some() {
                    "removed"
                } else {
                    row.state.as_str()
                };
                return Err(nothing_to(action, &format!("transfer {id} is {state}")));
            }
            let refusal = if fits && action == Action::Retry {
                let artifact = self.inner.catalogue.artifact(&row.artifact).await?;
                self.inner
                    .entitlement
                    .no_longer_shared(actor, &row, &artifact)
                    .await?
            } else {
                None
            };
            match (fits, refusal) {
                (true, None) => {
                    acted = true;
                    self.inner.catalogue.act(&row.id, action).await?;
                }
                (_, refusal) => refused = refused.or(refusal),
            }
        }
        // For several transfers, the permitted ones continue.
        match refused {
            _ if acted => Ok(()),
            Some(refusal) => Err(refusal),
            None => Err(nothing_to(
                action,
                &format!("the action does not apply to any transfer of {id}"),
            )),
        }
    }

    /// Asks a site for the cost of a delivery to it. `None`: the site is offline or does not
    /// answer. Until the answer, the site may read the manifest of the artifact, and nothing else
    /// of it.
    async fn ask_plan(
        &self,
        site: &SiteName,
        artifact: &ArtifactRef,
        digest: Digest,
    ) -> Option<Planned> {
        let _plan = self.inner.entitlement.plan(site, digest);
        self.ask_site(
            site,
            &AskSite::Plan {
                artifact: artifact.clone(),
                digest,
            },
        )
        .await
        .ok()
    }

    /// Adds an artifact to the catalogue that was published at a site, or whose bytes are now in
    /// the hub's store. `false`: the catalogue has it already.
    pub(super) async fn register(
        &self,
        origin: Option<&SiteName>,
        artifact: &ArtifactRef,
        root: &Root,
    ) -> Result<bool, Fault> {
        let inner = &self.inner;
        let added = inner.catalogue.add_artifact(artifact, root, origin).await?;
        if !added && origin.is_none() {
            // A site may have published the same content before: the hub now has all of it, and
            // does not fetch from the site any more.
            inner.catalogue.take_over(artifact).await?;
            inner
                .opened
                .lock()
                .retain(|opened| opened.digest != root.digest());
        }
        Ok(added)
    }

    /// The lines of `doctor` about published content that changed at its site. Only that site knows
    /// for sure whether the changed content was published again. Here, a newer unchanged version
    /// from the same site counts as that.
    async fn changed_lines(&self) -> Result<Vec<String>, Fault> {
        let published = self.inner.catalogue.published_at_sites().await?.into_iter();
        let lines = what_changed(published).into_iter().map(|Changed { artifact, place: site, how, newer }| match newer {
            Some(newer) => format!("ok {artifact} at {site}: {how}; {newer} was published there since"),
            None => format!("fault {artifact} at {site}: {how}; restore the original content there, or publish a new version"),
        });
        Ok(lines.collect())
    }
}

/// The fault of an action that does not apply to any of the named transfers.
fn nothing_to(action: Action, how: &str) -> Fault {
    let word = match action {
        Action::Pause => "pause",
        Action::Resume => "resume",
        Action::Cancel => "cancel",
        Action::Retry => "retry",
    };
    Fault::conflict(format!("{how}: there is nothing to {word}"))
        .with_next("see 'packhorse status'")
}

#[async_trait]
impl Backend for Hub {
    fn role(&self) -> &'static str {
        "hub"
    }

    fn name(&self) -> String {
        self.inner.config.name.to_string()
    }

    async fn ready(&self) -> Result<(), Fault> {
        self.inner.catalogue.cursor().await.map(|_| ())
    }

    async fn publish(&self, request: PublishRequest) -> Result<Job, Fault> {
        let artifact: ArtifactRef = request.as_ref.parse()?;
        if let Some(to) = &request.to {
            self.inner.catalogue.select_sites(&to.parse()?).await?;
        }
        let this = self.clone();
        tracing::info!(%artifact, source = %request.source, "publishing");
        self.inner
            .jobs
            .start(move |progress| async move { this.publish_now(request, progress).await })
    }

    async fn deliver(&self, request: DeliverRequest) -> Result<Delivered, Fault> {
        let (artifacts, to) = (parse_refs(&request.artifacts)?, request.to.parse()?);
        self.deliver_to(&Actor::Admin, &artifacts, &to, false).await
    }

    async fn plan(&self, request: DeliverRequest) -> Result<Vec<PlanRow>, Fault> {
        let refs = parse_refs(&request.artifacts)?;
        let selector: SiteSelector = request.to.parse()?;
        let sites = self.inner.catalogue.select_sites(&selector).await?;
        check_size(&refs, sites.len(), PLAN_ROWS_MAX)?;
        let mut rows = Vec::new();
        for artifact in &refs {
            let row = self.inner.catalogue.artifact(artifact).await?;
            let origin = row.origin.as_ref();
            let Targets {
                sites,
                mut left_out,
            } = self
                .inner
                .entitlement
                .targets(&Actor::Admin, artifact, origin, &sites, &selector)
                .await?;
            let (digest, total) = (row.digest, row.root.totals.bytes);
            rows.extend(
                sites
                    .into_iter()
                    .map(|site| (artifact, digest, total, site, std::mem::take(&mut left_out))),
            );
        }
        // The deadline is for all sites together. The questions to one site are sent one after the
        // other.
        let deadline = Instant::now() + PLAN_MAX;
        let mut turns: HashMap<SiteName, Arc<tokio::sync::Mutex<()>>> = HashMap::new();
        let asked = rows
            .into_iter()
            .map(|(artifact, digest, total, site, left_out)| {
                let turn = turns.entry(site.clone()).or_default().clone();
                async move {
                    let planned = tokio::time::timeout_at(deadline, async {
                        let _turn = turn.lock().await;
                        self.ask_plan(&site, artifact, digest).await
                    });
                    let planned = planned.await.ok().flatten();
                    PlanRow {
                        artifact: artifact.to_string(),
                        site: site.to_string(),
                        asked: planned.is_some(),
                        total,
                        missing: planned.as_ref().map_or(total, |p| p.missing),
                        needs: planned.as_ref().map_or(total, |p| p.needs),
                        free: planned.as_ref().and_then(|p| p.free),
                        seconds: planned
                            .as_ref()
                            .and_then(|p| (p.rate > 0).then(|| p.missing.div_ceil(p.rate))),
                        left_out,
                    }
                }
            });
        Ok(futures::stream::iter(asked.collect::<Vec<_>>())
            .buffered(PLANS_AT_ONCE)
            .collect()
            .await)
    }

    async fn transfers(
        &self,
        query: &TransferQuery,
        behind: Option<&str>,
        room: Room,
    ) -> Result<(Page<Transfer>, u64), Fault> {
        self.inner
            .catalogue
            .transfer_page(query, behind, room, |row| self.view(row))
            .await
    }

    async fn act(&self, id: &str, action: Action, room: Room) -> Result<Page<Transfer>, Fault> {
        self.act_on(&Actor::Admin, id, action).await?;
        let query = TransferQuery {
            id: Some(id.to_owned()),
            ..TransferQuery::default()
        };
        Ok(self.transfers(&query, None, room).await?.0)
    }

    async fn deliveries(&self, behind: Option<&str>, room: Room) -> Result<Page<Delivery>, Fault> {
        let mut pager = Pager::new(room);
        for row in self
            .inner
            .catalogue
            .deliveries(behind, room.rows_asked(), false)
            .await?
        {
            let shown = match self.whole(&row, room.bytes).await {
                // One of its transfers cannot be read: this delivery is omitted, so that the others
                // can be listed.
                Err(fault) if fault.code == Code::Internal => {
                    tracing::error!(delivery = %row.id, error = %fault, "a delivery cannot be read");
                    pager.skip(&*row.id);
                    continue;
                }
                shown => shown?,
            };
            if !pager.put(shown, &*row.id) {
                break;
            }
        }
        Ok(pager.page())
    }

    async fn delivery(&self, id: &str, max: usize) -> Result<Delivery, Fault> {
        self.whole(&self.inner.catalogue.delivery(id).await?, max)
            .await
    }

    async fn runs(&self, behind: Option<&str>, room: Room) -> Result<Page<Run>, Fault> {
        self.list_runs(&Actor::Admin, behind, 0, room).await
    }

    async fn run(&self, name: &str) -> Result<Run, Fault> {
        self.show_run(&Actor::Admin, name).await
    }

    async fn train(&self, request: RunRequest) -> Result<Run, Fault> {
        self.start_run(&Actor::Admin, &request.try_into()?).await
    }

    async fn act_on_run(&self, request: RunActionRequest) -> Result<Run, Fault> {
        Hub::act_on_run(self, &Actor::Admin, &request.try_into()?).await
    }

    async fn artifacts(&self, behind: Option<&str>, room: Room) -> Result<Page<Artifact>, Fault> {
        self.inner
            .catalogue
            .artifact_page(behind, room, View::view)
            .await
    }

    async fn show(&self, artifact: &str) -> Result<ArtifactDetail, Fault> {
        let artifact: ArtifactRef = artifact.parse()?;
        let row = self.inner.catalogue.artifact(&artifact).await?;
        let lineage = self
            .inner
            .catalogue
            .lineage(&artifact)
            .await?
            .map(super::lineage_view);
        Ok(ArtifactDetail {
            artifact: row.view(),
            transfers: Vec::new(),
            lineage,
        })
    }

    async fn transfers_of_artifact(
        &self,
        artifact: &str,
        behind: Option<&str>,
        room: Room,
    ) -> Result<Page<Transfer>, Fault> {
        self.inner
            .catalogue
            .artifact_transfer_page(&artifact.parse()?, behind, room, |row| self.view(row))
            .await
    }

    async fn sites(&self, behind: Option<&str>, room: Room) -> Result<Page<Site>, Fault> {
        self.inner
            .catalogue
            .site_page(behind, room, |row| self.site_view(row))
            .await
    }

    async fn token(&self, request: TokenRequest) -> Result<String, Fault> {
        let holder = match (&request.site, &request.publisher) {
            (Some(site), None) => Peer::Site(site.parse()?),
            (None, Some(publisher)) if request.labels.is_empty() => {
                Peer::Publisher(publisher.parse()?)
            }
            (None, Some(_)) => {
                return Err(Fault::usage(
                    "a publisher has no labels, because nothing is delivered to it",
                ));
            }
            _ => return Err(Fault::usage("a token is for a site or for a publisher")),
        };
        if request.ttl_seconds == 0 {
            return Err(Fault::usage(
                "the validity of a token must be longer than 0",
            ));
        }
        request
            .labels
            .iter()
            .try_for_each(|(key, value)| check_label(key, value))?;
        let token = JoinToken::generate(&self.inner.identity);
        self.inner
            .catalogue
            .add_token(
                token.id(),
                &token.secret_hash(),
                &holder,
                &request.labels,
                request.ttl_seconds,
            )
            .await?;
        Ok(token.to_string())
    }

    async fn verify(&self, request: VerifyRequest) -> Result<Job, Fault> {
        let artifact: ArtifactRef = request.artifact.parse()?;
        self.inner.catalogue.artifact(&artifact).await?;
        if request.repair {
            return Err(Fault::usage("the hub cannot repair an artifact itself")
                .with_next("publish the artifact again: the damaged content is then stored again; to repair a copy at a site, run the command there"));
        }
        let this = self.clone();
        self.inner.jobs.start(move |progress| async move {
            this.verify_now(artifact, request.quick, progress).await
        })
    }

    async fn pin(&self, artifact: &str, pinned: bool) -> Result<Artifact, Fault> {
        let artifact: ArtifactRef = artifact.parse()?;
        let row = self.inner.catalogue.artifact(&artifact).await?;
        if row.origin.is_none() {
            return Err(Fault::usage(format!(
                "{artifact} is in the hub's store, which never evicts it"
            ))
            .with_next("pin only artifacts that were published at a site"));
        }
        self.inner.catalogue.set_pinned(&artifact, pinned).await?;
        Ok(self.inner.catalogue.artifact(&artifact).await?.view())
    }

    async fn export(&self, artifacts: Vec<String>, out: String) -> Result<Job, Fault> {
        let mut members = Vec::new();
        for artifact in parse_refs(&artifacts)? {
            let row = self.inner.catalogue.artifact(&artifact).await?;
            if let Some(site) = &row.origin {
                return Err(Fault::usage(format!(
                    "{artifact} was published at site {site}, and this hub may have only a part of its content"
                ))
                .with_next("publish it at the hub, or deliver it over the network"));
            }
            members.push(Member::new(artifact, &row.root));
        }
        let (store, config) = (self.inner.store.clone(), self.inner.config.clone());
        self.inner.jobs.start(move |progress| async move {
            progress.doing(format!("writing {out}"));
            blocking(move || {
                let out = PathBuf::from(out);
                // The export only creates a new file, but not in the daemon's own directories.
                config.own().check_path(out.parent().unwrap_or(&out))?;
                let written = bundle::export(&members, &store, &out, &progress)?;
                bundle::sync_parent(&out)?;
                Ok(BTreeMap::from([("bytes", written)]))
            })
            .await
        })
    }

    async fn import(&self, file: String) -> Result<Job, Fault> {
        let this = self.clone();
        self.inner
            .jobs
            .start(move |progress| async move { this.import_now(file, progress).await })
    }

    async fn gc(&self) -> Result<Job, Fault> {
        let this = self.clone();
        self.inner
            .jobs
            .start_collection(move |progress| async move { this.collect_now(progress).await })
    }

    async fn doctor(&self) -> Result<Vec<String>, Fault> {
        let data = &self.inner.config.data_dir;
        let mut out = Vec::new();
        out.push(sink::stage::room_report(data)?);
        let store = self.inner.store.clone();
        let (stored, lost) =
            blocking(move || Ok((store.stored_bytes()?, store.lost_packs()?))).await?;
        let packs = self.inner.store.path();
        out.push(format!(
            "ok store: {} MiB in packs at {}",
            stored >> 20,
            packs.display()
        ));
        if self.inner.store.is_damaged() {
            out.push("fault store: the chunk index is damaged; stop the hub, then 'packhorse store rebuild-index'".into());
        }
        if !lost.is_empty() {
            let next = "restore the hub's data_dir, or publish again the artifacts that 'packhorse verify' reports";
            out.push(format!(
                "fault store: {} packs are missing in {}, the first is {:08}.pack; {next}",
                lost.len(),
                packs.display(),
                lost[0]
            ));
        }
        let (kept, budget) = (
            self.inner.relay.kept_bytes(),
            self.inner.config.relay.budget,
        );
        out.push(format!(
            "ok relay: the cache of content between sites has {} MiB of at most {} MiB",
            kept >> 20,
            budget >> 20
        ));
        out.push(format!(
            "ok line: listening on {} (UDP and TCP)",
            self.inner.listener.local_addr()
        ));
        out.extend(
            self.inner
                .identity
                .clock_fault()
                .map(|text| format!("fault clock: {text}")),
        );
        let mut joined = Vec::new();
        for row in self.inner.catalogue.sites().await? {
            let site = self.site_view(&row);
            let word = if site.online { "ok" } else { "fault" };
            let line = site.line.unwrap_or_else(|| "not connected".into());
            out.push(format!("{word} site {}: {line}", site.name));
            joined.push(site.name);
        }
        let allow = self.inner.config.share.allow.as_deref();
        out.extend(sharing::share_fault(allow, &joined));
        out.extend(sharing::site_list_faults(&self.inner.catalogue, &joined).await?);
        out.extend(self.changed_lines().await?);
        out.extend(crate::api::malformed_lines(&self.inner.catalogue));
        out.extend(self.manifest_lines().await?);
        out.extend(self.inner.workers.doctor());
        Ok(out)
    }

    async fn job(&self, id: &str) -> Result<Job, Fault> {
        self.inner.jobs.get(id)
    }

    async fn jobs(&self, behind: Option<&str>, room: Room) -> Result<Page<Job>, Fault> {
        Ok(self.inner.jobs.list(behind, room))
    }

    async fn workers(&self, behind: Option<&str>, room: Room) -> Result<Page<Worker>, Fault> {
        Ok(worker_page(&self.inner.workers, behind, room))
    }

    async fn cancel_job(&self, id: &str) -> Result<Job, Fault> {
        self.inner.jobs.cancel(id)
    }

    async fn events(&self, since: u64, limit: u32) -> Result<Vec<Event>, Fault> {
        let (mut out, mut room) = (Vec::new(), Budget::new(API_PAGE_BYTES));
        for row in self.inner.catalogue.events(since, limit).await? {
            let (mut event, name) = (row.view(), row.name);
            event.body = match event.what.as_str() {
                "transfer" => self
                    .inner
                    .catalogue
                    .transfer(&name)
                    .await
                    .ok()
                    .and_then(|row| serde_json::to_value(self.view(&row)).ok()),
                "artifact" => match name.parse() {
                    Ok(artifact) => self
                        .inner
                        .catalogue
                        .artifact(&artifact)
                        .await
                        .ok()
                        .and_then(|row| serde_json::to_value(row.view()).ok()),
                    Err(_) => None,
                },
                "run" => self
                    .show_run(&Actor::Admin, &name)
                    .await
                    .ok()
                    .and_then(|run| serde_json::to_value(run).ok()),
                _ => {
                    let site = self.inner.catalogue.site(&name).await.ok().flatten();
                    site.and_then(|row| serde_json::to_value(self.site_view(&row)).ok())
                }
            }
            .unwrap_or_default();
            if !room.takes(&event) {
                break;
            }
            out.push(event);
        }
        Ok(out)
    }

    fn changed(&self) -> futures::future::BoxFuture<'static, ()> {
        Box::pin(self.inner.catalogue.changed())
    }

    async fn metrics(&self) -> Result<String, Fault> {
        let mut counted = crate::metrics::Transfers::default();
        for row in self.inner.catalogue.counted_transfers().await? {
            // As in the view of each transfer: an offline site is the reason of an open transfer.
            let state = State::parse(&row.state);
            let is_open = state.is_some_and(|state| !state.is_final() && state != State::Paused);
            let is_away = is_open && row.site.parse().is_ok_and(|site| !self.is_online(&site));
            counted.add(&row, is_away.then_some(Reason::SiteOffline));
        }
        let mut out = counted.to_text();
        let store = self.inner.store.clone();
        let stored = blocking(move || store.stored_bytes()).await?;
        let online = self.inner.links.read().len();
        out.push_str(&self.relay_metrics());
        let _ = writeln!(
            out,
            "# TYPE packhorse_store_bytes gauge\npackhorse_store_bytes {stored}"
        );
        let _ = writeln!(
            out,
            "# TYPE packhorse_sites_online gauge\npackhorse_sites_online {online}"
        );
        let _ = writeln!(
            out,
            "# TYPE packhorse_jobs_running gauge\npackhorse_jobs_running {}",
            self.inner.jobs.running()
        );
        Ok(out)
    }
}

/// The handling of an artifact whose transfer is done already.
struct RepeatedDelivery {
    /// Whether its transfer starts again.
    again: bool,
    /// A note for the client.
    note: Option<String>,
    /// The message of the transfer from now on, if it does not start again.
    message: Option<Message>,
}

fn found(row: &TransferRow, standing: &Option<Standing>) -> RepeatedDelivery {
    let (artifact, site) = (&row.artifact, &row.site);
    let Some(standing) = standing else {
        let note = format!(
            "{artifact} arrived at {site} before; the site does not answer, so its copy was not checked"
        );
        return RepeatedDelivery {
            again: false,
            note: Some(note),
            message: None,
        };
    };
    let detail = standing
        .detail
        .as_ref()
        .map(|detail| format!(": {detail}"))
        .unwrap_or_default();
    let again = |what: &str| RepeatedDelivery {
        again: true,
        note: Some(format!("{artifact} {what} at {site}{detail}")),
        message: None,
    };
    match (standing.state, &standing.active) {
        (Stands::Missing, _) => again("is delivered again, because it is missing"),
        (Stands::Damaged, _) => again("is delivered again, because it was changed or damaged"),
        (Stands::Unavailable, _) => again("waits until the site can check its copy"),
        (Stands::Sound, Some(active))
            if active.as_str() != artifact.version() && !active.is_empty() =>
        {
            let message = format!(
                "the site has it, but it is not active: the active version is {active}. To make this content active, publish it under a new version"
            );
            RepeatedDelivery {
                again: false,
                note: Some(format!("{artifact} at {site}: {message}")),
                message: Some(message.into()),
            }
        }
        (Stands::Sound, _) => RepeatedDelivery {
            again: false,
            note: None,
            message: None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::upload::tests::Bench;
    use base::fault::Code;
    use transport::identity::Claim;

    #[tokio::test]
    async fn an_action_that_applies_to_no_transfer_of_a_delivery_is_refused() {
        let bench = Bench::start().await;
        let token = bench.token(None, Some("office")).await;
        bench
            .publish(&bench.source("a", 100, 1), "model/a:v1", Some(&token))
            .await
            .unwrap();
        for site in ["east", "west"] {
            bench
                .join(
                    &bench.token(Some(site), None).await,
                    &Claim::Site(site.parse().unwrap()),
                )
                .await;
        }
        let delivered = bench
            .hub
            .deliver_to(
                &Actor::Admin,
                &["model/a:v1".parse().unwrap()],
                &"east,west".parse().unwrap(),
                false,
            )
            .await
            .unwrap();
        let code = async |id: &str, action| {
            bench
                .hub
                .act_on(&Actor::Admin, id, action)
                .await
                .map(|_| ())
                .map_err(|fault| fault.code)
        };
        let (all, one) = (delivered.delivery.as_str(), delivered.transfers[0].as_str());
        for (action, expected) in [
            (Action::Cancel, Ok(())),
            (Action::Pause, Err(Code::Conflict)),
            (Action::Retry, Ok(())),
            (Action::Retry, Err(Code::Conflict)),
            (Action::Pause, Ok(())),
        ] {
            assert_eq!(code(all, action).await, expected, "{action:?}");
            if expected.is_err() {
                assert_eq!(code(one, action).await, expected, "{action:?} of one");
            }
        }
    }
}

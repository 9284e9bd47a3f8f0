//! What the hub can be asked over its API.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;

use super::Hub;
use super::sharing::Shared;
use crate::api::Backend;
use crate::api::View;
use crate::api::types::*;
use crate::delivery;
use base::blocking::blocking;
use base::fault::{Fault, Reason};
use base::limits::{API_LIST_BYTES_MAX, API_ROWS_MAX};
use base::names::{ArtifactRef, DeliveryId, SiteName, SiteSelector, TransferId, check_label};
use base::text::Message;
use content::bundle::{self, Member};
use content::manifest::Root;
use exchange::wire::{AskSite, Standing, Stands};
use model::paging::Budget;
use state::{Body, Changed, DeliveryRow, Part, TransferRow, new_delivery_id, what_changed};
use transport::identity::{Holder, JoinToken};

/// How long a site may take to work out a plan.
const PLAN_MAX: Duration = Duration::from_secs(30);
/// How long it may take to say whether it has something still.
const HOLDS_MAX: Duration = Duration::from_secs(5);
/// Sites that are asked that together.
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

impl Hub {
    /// A transfer as the API shows it: a site that is away is the reason for whatever is open.
    pub(super) fn view(&self, row: &TransferRow) -> Transfer {
        let mut view = row.view();
        if !row.state.is_final() && row.state != State::Paused && !self.is_online(&row.site) {
            view.reason = Some(Reason::SiteOffline);
            view.message = Some(format!("site {} is not connected", row.site));
            view.next = Some("nothing: it goes on by itself when the site is back; see 'packhorse sites'".into());
            (view.rate, view.eta_seconds) = (0, None);
        }
        view
    }

    /// A delivery as the API shows it, and as a site is told of it.
    pub(super) fn whole(&self, row: &DeliveryRow) -> Delivery {
        delivery::view(row, row.parts.iter().map(|part| self.view(part)).collect())
    }

    /// Begins a delivery; `by` is who asks over a line, `None` the administrator.
    pub(super) async fn deliver_to(
        &self,
        by: Option<&SiteName>,
        artifacts: &[ArtifactRef],
        selector: &SiteSelector,
    ) -> Result<Delivered, Fault> {
        if artifacts.is_empty() {
            return Err(no_artifact_named());
        }
        let sites = self.inner.catalogue.select_sites(selector).await?;
        let mut rows = Vec::new();
        for artifact in artifacts {
            rows.push(self.inner.catalogue.artifact(artifact).await?);
        }
        let (mut targets, mut left_out) = (Vec::new(), Vec::new());
        for row in &rows {
            let shared = self.shared_with(by, &row.artifact, row.origin.as_ref(), &sites, selector).await?;
            targets.push(shared.sites);
            left_out.extend(shared.left_out);
        }
        let delivery = new_delivery_id();
        let parts: Vec<Part> = rows.iter().zip(&targets).map(|(row, sites)| Part::new(row, sites)).collect();
        let (transfers, notes) = self.begin_noted(&delivery, None, &parts).await?;
        let digest = rows.first().map(|row| row.digest.hex()).unwrap_or_default();
        let artifact = artifacts.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let transfers = transfers.into_iter().map(Into::into).collect();
        Ok(Delivered { artifact, digest, delivery: delivery.into(), transfers, left_out, notes })
    }

    /// Begins a delivery, and again what its sites have lost since it was done.
    pub(super) async fn begin_delivery(&self, id: &DeliveryId, run: Option<&str>, parts: &[Part]) -> Result<Vec<TransferId>, Fault> {
        Ok(self.begin_noted(id, run, parts).await?.0)
    }

    /// The same, and what was found at the sites that had something of it already.
    async fn begin_noted(&self, id: &DeliveryId, run: Option<&str>, parts: &[Part]) -> Result<(Vec<TransferId>, Vec<String>), Fault> {
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
                let body = Body { message: found.message, ..row.body };
                self.inner.catalogue.update_transfer(&row.id, row.generation, row.state, &body).await?;
            }
        }
        Ok((self.inner.catalogue.deliver(id, run, parts, &lost).await?, notes))
    }

    /// How a site says that an artifact is there which it was given; `None`: it is away, or slow, and is taken at its old word. `retry`
    /// asks it to look closely.
    async fn standing(&self, row: &TransferRow) -> Option<Standing> {
        let (artifact, digest) = (row.artifact.clone(), row.digest);
        let question = AskSite::Stands { artifact: artifact.clone(), digest };
        match tokio::time::timeout(HOLDS_MAX, self.ask_site::<Standing>(&row.site, &question)).await {
            Ok(Ok(standing)) => return Some(standing),
            Ok(Err(_)) => {}
            Err(_) => return None,
        }
        // A site of the version before knows only whether it is there.
        let question = AskSite::Holds { artifact, digest };
        let answer = tokio::time::timeout(HOLDS_MAX, self.ask_site::<bool>(&row.site, &question)).await.ok()?.ok()?;
        let state = if answer { Stands::Sound } else { Stands::Missing };
        Some(Standing { state, detail: None, active: None })
    }

    /// Does what is asked of a transfer, or of all of a delivery; `by` is the site that asks, `None` the administrator.
    pub(super) async fn act_on(&self, by: Option<&SiteName>, id: &str, action: Action) -> Result<Vec<Transfer>, Fault> {
        let rows = self.inner.catalogue.transfers_of(id).await?;
        let single = rows.len() == 1;
        // Of several, those that failed are meant; where none did, all are looked at again.
        let failed = rows.iter().any(|row| matches!(row.state, State::Failed | State::Cancelled));
        let mut out = Vec::new();
        let (mut acted, mut refused) = (false, None);
        for row in rows {
            let fits = match action {
                Action::Pause => !row.state.is_final(),
                Action::Resume => row.state == State::Paused || !row.state.is_final(),
                Action::Cancel => row.state != State::Done,
                Action::Retry if row.state == State::Done => !failed && row.removed_ms.is_none(),
                Action::Retry => matches!(row.state, State::Failed | State::Cancelled),
            };
            if !fits && single {
                let state = if row.removed_ms.is_some() { "given back" } else { row.state.as_str() };
                return Err(nothing_to(action, &format!("transfer {id} is {state}")));
            }
            let refusal = if fits && action == Action::Retry { self.shared_no_more(by, &row).await? } else { None };
            let row = match (fits, refusal) {
                (true, None) => {
                    acted = true;
                    self.inner.catalogue.act(&row.id, action).await?
                }
                (_, refusal) => {
                    refused = refused.or(refusal);
                    row
                }
            };
            out.push(self.view(&row));
        }
        // Of several, those that may go on do.
        match refused {
            _ if acted => Ok(out),
            Some(refusal) => Err(refusal),
            None => Err(nothing_to(action, &format!("of {id}, every transfer has ended or stays as it is"))),
        }
    }

    /// Takes an artifact into the catalogue that was published at a site, or whose bytes are in the hub's store now. `false`: it
    /// was there already.
    pub(super) async fn register(&self, origin: Option<&SiteName>, artifact: &ArtifactRef, root: &Root) -> Result<bool, Fault> {
        let inner = &self.inner;
        let added = inner.catalogue.add_artifact(artifact, root, origin).await?;
        if !added && origin.is_none() {
            // A site may have published the same before: the hub has all of it now, and asks the site no more.
            inner.catalogue.take_over(artifact).await?;
            inner.opened.lock().retain(|opened| opened.digest != root.digest());
        }
        Ok(added)
    }

    /// What `doctor` says of what changed where it was published: one line each. Whether what is there now was published anew only
    /// that site knows for sure: here a newer version from there that is sound is taken for it.
    async fn changed_lines(&self) -> Result<Vec<String>, Fault> {
        let rows = self.inner.catalogue.artifacts().await?.into_iter();
        let published = rows.filter_map(|row| Some((row.origin.clone()?, row.created_ms, row)));
        let lines = what_changed(published).into_iter().map(|Changed { artifact, place: site, how, newer }| match newer {
            Some(newer) => format!("ok {artifact} at {site}: {how}; {newer} was published there since"),
            None => format!("fault {artifact} at {site}: {how}; there, put the old content back or publish a new version"),
        });
        Ok(lines.collect())
    }
}

/// The fault of an action that fits no transfer that it names.
fn nothing_to(action: Action, how: &str) -> Fault {
    let word = match action {
        Action::Pause => "pause",
        Action::Resume => "resume",
        Action::Cancel => "cancel",
        Action::Retry => "retry",
    };
    Fault::conflict(format!("{how}: there is nothing to {word}")).with_next("see 'packhorse status'")
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
        self.inner.jobs.start(move |progress| async move { this.publish_now(request, progress).await })
    }

    async fn deliver(&self, request: DeliverRequest) -> Result<Delivered, Fault> {
        self.deliver_to(None, &parse_refs(&request.artifacts)?, &request.to.parse()?).await
    }

    async fn plan(&self, request: DeliverRequest) -> Result<Vec<PlanRow>, Fault> {
        let refs = parse_refs(&request.artifacts)?;
        let selector: SiteSelector = request.to.parse()?;
        let sites = self.inner.catalogue.select_sites(&selector).await?;
        let mut out = Vec::new();
        for artifact in refs {
            let row = self.inner.catalogue.artifact(&artifact).await?;
            let Shared { sites, mut left_out } = self.shared_with(None, &artifact, row.origin.as_ref(), &sites, &selector).await?;
            for site in &sites {
                let question = AskSite::Plan { artifact: artifact.clone(), digest: row.digest };
                // A site may plan what it is not yet entitled to hold: for that moment it may read the manifest.
                self.inner.entitled.lock().put((site.clone(), row.digest), (), PLAN_MAX);
                let asked = tokio::time::timeout(PLAN_MAX, self.ask_site::<exchange::wire::Planned>(site, &question)).await;
                let total = row.root.totals.bytes;
                let planned = asked.ok().and_then(Result::ok);
                out.push(PlanRow {
                    artifact: artifact.to_string(),
                    site: site.to_string(),
                    asked: planned.is_some(),
                    total,
                    missing: planned.as_ref().map_or(total, |p| p.missing),
                    needs: planned.as_ref().map_or(total, |p| p.needs),
                    free: planned.as_ref().and_then(|p| p.free),
                    seconds: planned.as_ref().and_then(|p| (p.rate > 0).then(|| p.missing.div_ceil(p.rate))),
                    left_out: std::mem::take(&mut left_out),
                });
            }
        }
        Ok(out)
    }

    async fn transfers(&self, query: &TransferQuery) -> Result<(Vec<Transfer>, u64), Fault> {
        let (rows, cursor) = self.inner.catalogue.transfers(query).await?;
        Ok((rows.iter().map(|row| self.view(row)).collect(), cursor))
    }

    async fn act(&self, id: &str, action: Action) -> Result<Vec<Transfer>, Fault> {
        self.act_on(None, id, action).await
    }

    async fn transfers_behind(&self, id: &str, limit: u32) -> Result<Vec<Transfer>, Fault> {
        Ok(self.inner.catalogue.transfers_behind(id, limit).await?.iter().map(|row| self.view(row)).collect())
    }

    async fn deliveries(&self, behind: Option<&str>, limit: u32) -> Result<Vec<Delivery>, Fault> {
        let rows = self.inner.catalogue.deliveries(behind, limit).await?;
        Ok(rows.iter().map(|row| self.whole(row)).collect())
    }

    async fn delivery(&self, id: &str) -> Result<Delivery, Fault> {
        Ok(self.whole(&self.inner.catalogue.delivery(id).await?))
    }

    async fn runs(&self, limit: u32) -> Result<Vec<Run>, Fault> {
        self.list_runs(None, limit).await
    }

    async fn run(&self, name: &str) -> Result<Run, Fault> {
        self.show_run(None, name).await
    }

    async fn train(&self, request: RunRequest) -> Result<Run, Fault> {
        self.start_run(None, &request.try_into()?).await
    }

    async fn act_on_run(&self, request: RunActionRequest) -> Result<Run, Fault> {
        Hub::act_on_run(self, None, &request.try_into()?).await
    }

    async fn artifacts(&self) -> Result<Vec<Artifact>, Fault> {
        self.inner.catalogue.map_artifacts(|row| row.view()).await
    }

    async fn show(&self, artifact: &str) -> Result<ArtifactDetail, Fault> {
        let artifact: ArtifactRef = artifact.parse()?;
        let row = self.inner.catalogue.artifact(&artifact).await?;
        let transfers = self.inner.catalogue.transfers_of_artifact(&artifact).await?;
        let lineage = self.inner.catalogue.lineage(&artifact).await?.map(super::lineage_view);
        Ok(ArtifactDetail { artifact: row.view(), transfers: transfers.iter().map(|t| self.view(t)).collect(), lineage })
    }

    async fn sites(&self) -> Result<Vec<Site>, Fault> {
        let mut sites: Vec<Site> = self.inner.catalogue.sites().await?.iter().map(View::view).collect();
        let links = self.inner.links.read();
        for site in &mut sites {
            if let Some(connected) = links.get(&site.name) {
                site.online = true;
                site.line = Some(connected.link.transport().into());
                site.rtt_ms = Some(connected.link.rtt().as_secs_f64() * 1000.0);
            }
        }
        Ok(sites)
    }

    async fn token(&self, request: TokenRequest) -> Result<String, Fault> {
        let holder = match (&request.site, &request.publisher) {
            (Some(site), None) => Holder::Site(site.parse()?),
            (None, Some(publisher)) if request.labels.is_empty() => Holder::Publisher(publisher.parse()?),
            (None, Some(_)) => return Err(Fault::usage("a publisher has no labels: nothing is delivered to it")),
            _ => return Err(Fault::usage("a token is for a site or for a publisher")),
        };
        if request.ttl_seconds == 0 {
            return Err(Fault::usage("a token must be good for some time"));
        }
        request.labels.iter().try_for_each(|(key, value)| check_label(key, value))?;
        let token = JoinToken::generate(&self.inner.identity);
        self.inner.catalogue.add_token(token.id(), &token.secret_hash(), &holder, &request.labels, request.ttl_seconds).await?;
        Ok(token.to_string())
    }

    async fn verify(&self, request: VerifyRequest) -> Result<Job, Fault> {
        let artifact: ArtifactRef = request.artifact.parse()?;
        self.inner.catalogue.artifact(&artifact).await?;
        if request.repair {
            return Err(Fault::usage("the hub repairs nothing by itself")
                .with_next("publish the artifact again: what is damaged is stored anew; at a site, run this there"));
        }
        let this = self.clone();
        self.inner.jobs.start(move |progress| async move { this.verify_now(artifact, request.quick, progress).await })
    }

    async fn pin(&self, artifact: &str, pinned: bool) -> Result<Artifact, Fault> {
        let artifact: ArtifactRef = artifact.parse()?;
        let row = self.inner.catalogue.artifact(&artifact).await?;
        if row.origin.is_none() {
            return Err(Fault::usage(format!("{artifact} is the hub's own and stays anyway")).with_next("pin what lives at a site"));
        }
        self.inner.catalogue.set_pinned(&artifact, pinned).await?;
        Ok(self.inner.catalogue.artifact(&artifact).await?.view())
    }

    async fn export(&self, artifacts: Vec<String>, out: String) -> Result<Job, Fault> {
        let mut members = Vec::new();
        for artifact in parse_refs(&artifacts)? {
            let row = self.inner.catalogue.artifact(&artifact).await?;
            if let Some(site) = &row.origin {
                return Err(Fault::usage(format!("{artifact} lives at site {site}, and this hub may hold only some of it"))
                    .with_next("publish it at the hub, or deliver it over the line"));
            }
            members.push(Member::new(artifact, &row.root));
        }
        let (store, config) = (self.inner.store.clone(), self.inner.config.clone());
        self.inner.jobs.start(move |progress| async move {
            progress.doing(format!("writing {out}"));
            blocking(move || {
                let out = PathBuf::from(out);
                // It writes a new file only; but not among the daemon's own.
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
        self.inner.jobs.start(move |progress| async move { this.import_now(file, progress).await })
    }

    async fn gc(&self) -> Result<Job, Fault> {
        let this = self.clone();
        self.inner.jobs.start_collection(move |progress| async move { this.collect_now(progress).await })
    }

    async fn doctor(&self) -> Result<Vec<String>, Fault> {
        let data = &self.inner.config.data_dir;
        let mut out = Vec::new();
        out.push(sink::stage::room_report(data)?);
        let store = self.inner.store.clone();
        let (stored, lost) = blocking(move || Ok((store.stored_bytes()?, store.lost_packs()?))).await?;
        let packs = self.inner.store.path();
        out.push(format!("ok store: {} MiB in packs at {}", stored >> 20, packs.display()));
        if self.inner.store.is_damaged() {
            out.push("fault store: the chunk index is damaged; stop the hub, then 'packhorse store rebuild-index'".into());
        }
        if !lost.is_empty() {
            let next = "restore the hub's data_dir, or publish again what 'packhorse verify' finds damaged";
            out.push(format!(
                "fault store: {} packs are gone from {}, the first is {:08}.pack; {next}",
                lost.len(),
                packs.display(),
                lost[0]
            ));
        }
        let (kept, budget) = (self.inner.relay.kept_bytes(), self.inner.config.relay.budget);
        out.push(format!("ok relay: {} MiB of {} MiB are kept of what passed from site to site", kept >> 20, budget >> 20));
        out.push(format!("ok line: listening on {} (UDP and TCP)", self.inner.listener.local_addr()));
        out.extend(self.inner.identity.clock_fault().map(|text| format!("fault clock: {text}")));
        let mut joined = Vec::new();
        for site in self.sites().await? {
            let word = if site.online { "ok" } else { "fault" };
            let line = site.line.unwrap_or_else(|| "not connected".into());
            out.push(format!("{word} site {}: {line}", site.name));
            joined.push(site.name);
        }
        out.extend(self.share_fault(&joined));
        out.extend(self.site_list_faults(&joined).await?);
        out.extend(self.changed_lines().await?);
        out.extend(self.manifest_lines().await?);
        Ok(out)
    }

    async fn job(&self, id: &str) -> Result<Job, Fault> {
        self.inner.jobs.get(id)
    }

    async fn jobs(&self) -> Result<Vec<Job>, Fault> {
        Ok(self.inner.jobs.list())
    }

    async fn cancel_job(&self, id: &str) -> Result<Job, Fault> {
        self.inner.jobs.cancel(id)
    }

    async fn events(&self, since: u64, limit: u32) -> Result<Vec<Event>, Fault> {
        let sites = self.sites().await?;
        let (mut out, mut room) = (Vec::new(), Budget::new(API_LIST_BYTES_MAX));
        for row in self.inner.catalogue.events(since, limit).await? {
            let (mut event, name) = (row.view(), row.name);
            event.body = match event.what.as_str() {
                "transfer" => self.inner.catalogue.transfer(&name).await.ok().and_then(|row| serde_json::to_value(self.view(&row)).ok()),
                "artifact" => match name.parse() {
                    Ok(artifact) => {
                        self.inner.catalogue.artifact(&artifact).await.ok().and_then(|row| serde_json::to_value(row.view()).ok())
                    }
                    Err(_) => None,
                },
                "run" => self.show_run(None, &name).await.ok().and_then(|run| serde_json::to_value(run).ok()),
                _ => sites.iter().find(|s| s.name.as_str() == name).and_then(|s| serde_json::to_value(s).ok()),
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
        self.inner.catalogue.each_transfer(API_ROWS_MAX, |row| counted.add(&self.view(&row))).await?;
        let mut out = counted.to_text();
        let store = self.inner.store.clone();
        let stored = blocking(move || store.stored_bytes()).await?;
        let online = self.inner.links.read().len();
        out.push_str(&self.relay_metrics());
        let _ = writeln!(out, "# TYPE packhorse_store_bytes gauge\npackhorse_store_bytes {stored}");
        let _ = writeln!(out, "# TYPE packhorse_sites_online gauge\npackhorse_sites_online {online}");
        let _ = writeln!(out, "# TYPE packhorse_jobs_running gauge\npackhorse_jobs_running {}", self.inner.jobs.running());
        Ok(out)
    }
}

/// What is done about an artifact that is done already.
struct Found {
    /// Whether its transfer begins again.
    again: bool,
    /// For whoever asked.
    note: Option<String>,
    /// What the transfer says from now on, if it does not begin again.
    message: Option<Message>,
}

fn found(row: &TransferRow, standing: &Option<Standing>) -> Found {
    let (artifact, site) = (&row.artifact, &row.site);
    let Some(standing) = standing else {
        let note = format!("{artifact} arrived at {site} before; the site does not answer, so whether it is there still was not checked");
        return Found { again: false, note: Some(note), message: None };
    };
    let detail = standing.detail.as_ref().map(|detail| format!(": {detail}")).unwrap_or_default();
    let again = |what: &str| Found { again: true, note: Some(format!("{artifact} {what} at {site}{detail}")), message: None };
    match (standing.state, &standing.active) {
        (Stands::Missing, _) => again("is delivered again, because it is missing"),
        (Stands::Damaged, _) => again("is delivered again, because it was changed or damaged"),
        (Stands::Unavailable, _) => again("waits until the site can look whether it is there still"),
        (Stands::Sound, Some(active)) if active.as_str() != artifact.version() && !active.is_empty() => {
            let message = format!(
                "it is held but not active: the active version is {active}. To make this content active, publish it under a new version"
            );
            Found { again: false, note: Some(format!("{artifact} at {site}: {message}")), message: Some(message.into()) }
        }
        (Stands::Sound, _) => Found { again: false, note: None, message: None },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::upload::tests::Bench;
    use base::fault::Code;
    use transport::identity::Claim;

    #[tokio::test]
    async fn an_action_that_fits_no_transfer_of_a_delivery_is_refused_as_for_one_transfer() {
        let bench = Bench::start().await;
        let token = bench.token(None, Some("office")).await;
        bench.publish(&bench.source("a", 100, 1), "model/a:v1", Some(&token)).await.unwrap();
        for site in ["east", "west"] {
            bench.join(&bench.token(Some(site), None).await, &Claim::Site(site.parse().unwrap())).await;
        }
        let delivered = bench.hub.deliver_to(None, &["model/a:v1".parse().unwrap()], &"east,west".parse().unwrap()).await.unwrap();
        let code = async |id: &str, action| bench.hub.act_on(None, id, action).await.map(|_| ()).map_err(|fault| fault.code);
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

//! The hub's implementation of the API.

use std::fmt::Write as _;
use std::time::Duration;

use async_trait::async_trait;

use super::deliveries::no_artifact_named;
use super::{Hub, sharing};
use crate::api::types::*;
use crate::api::{Backend, RunToken, View, worker_page};
use crate::label_export::LabelExport;
use crate::reach::Reach;
use crate::serve::wrong_role;
use base::blocking::blocking;
use base::clock::rfc3339_ms;
use base::fault::{Code, Fault, Reason};
use base::limits::API_PAGE_BYTES;
use base::names::{ArtifactRef, RunName, SiteName, SiteSelector, check_label};
use base::peer::Peer;
use base::text;
use content::bundle::Member;
use model::actor::Actor;
use model::paging::{Budget, Page, Pager, Room};
use model::publisher_scope::{PATTERNS_MAX, PublisherScope};
use state::{Changed, EventRow, SiteRow, what_changed};
use transport::identity::JoinToken;

impl Hub {
    /// A note on each site that a scope names and that has not joined: the name may be misspelled.
    async fn unknown_sites(&self, scope: &PublisherScope) -> Result<Vec<String>, Fault> {
        let sites = scope.deliver_to.as_ref().and_then(|to| to.sites());
        let Some(SiteSelector::Names(names)) = sites else {
            return Ok(Vec::new());
        };
        let mut notes = Vec::new();
        for name in names {
            if self.inner.catalogue.site(name.as_str()).await?.is_none() {
                notes.push(format!(
                    "no site has joined with the name {name}; 'packhorse sites' lists the sites"
                ));
            }
        }
        Ok(notes)
    }
}

/// The limits of a publisher as the API shows them.
fn limits(scope: &PublisherScope) -> TokenLimits {
    TokenLimits {
        artifacts: scope
            .artifacts
            .as_ref()
            .map(|patterns| patterns.iter().map(ToString::to_string).collect()),
        deliver_to: scope.deliver_to.as_ref().map(ToString::to_string),
    }
}

fn parse_refs(artifacts: &[String]) -> Result<Vec<ArtifactRef>, Fault> {
    if artifacts.is_empty() {
        return Err(no_artifact_named());
    }
    artifacts.iter().map(|a| Ok(a.parse()?)).collect()
}

/// The longest validity of a join token.
const TOKEN_TTL_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

impl Hub {
    /// A site as the API shows it, with the state of its connection.
    pub(super) fn site_view(&self, row: &SiteRow) -> Site {
        let mut site = row.view();
        if let Some(link) = self.inner.links.of(&site.name) {
            site.online = true;
            let heard_ms = self.inner.links.heard_ms(&site.name).max(row.seen_ms);
            site.last_seen = heard_ms.map(rfc3339_ms);
            site.line = Some(link.transport().into());
            site.line_reason = link.reason();
            site.rtt_ms = Some(link.rtt().as_secs_f64() * 1000.0);
        }
        site
    }

    /// The subject of an event as it was then; `None`: it cannot be read any more.
    async fn event_body(&self, row: &EventRow) -> Option<serde_json::Value> {
        let catalogue = &self.inner.catalogue;
        match row.what.as_str() {
            "transfer" => {
                let now = catalogue.transfer(&row.name).await.ok()?;
                // Whether its site is connected belongs to the present.
                let view = if row.is_newest_of(&now) {
                    self.inner.deliveries.view(&now)
                } else {
                    row.transfer(now).view()
                };
                serde_json::to_value(view).ok()
            }
            "artifact" => {
                let now = catalogue.artifact(&row.name.parse().ok()?).await.ok()?;
                serde_json::to_value(row.artifact(now).view()).ok()
            }
            "run" => {
                let view = match row.run() {
                    Some(run) => super::runs::run_view(&run),
                    None => {
                        let runs = &self.inner.runs;
                        runs.show(&Actor::Admin, &row.name).await.ok()?
                    }
                };
                serde_json::to_value(view).ok()
            }
            _ => {
                let now = catalogue.site(&row.name).await.ok().flatten()?;
                let mut view = self.site_view(&now);
                if let Some(then) = row.site() {
                    view.online = then.online;
                    view.last_seen = then.seen_ms.map(rfc3339_ms);
                    view.version = then.version;
                    if !then.online {
                        (view.line, view.line_reason, view.rtt_ms) = (None, None, None);
                    }
                }
                serde_json::to_value(view).ok()
            }
        }
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

    async fn publish(&self, request: PublishRequest, reach: Reach) -> Result<Job, Fault> {
        reach.check_options(&request.options)?;
        let artifact: ArtifactRef = request.as_ref.parse()?;
        if let Some(to) = &request.to {
            self.inner.catalogue.select_sites(&to.parse()?).await?;
        }
        tracing::info!(%artifact, source = %request.source, "publishing");
        self.inner.jobs.publish(request, reach)
    }

    async fn deliver(&self, request: DeliverRequest) -> Result<Delivered, Fault> {
        let (artifacts, to) = (parse_refs(&request.artifacts)?, request.to.parse()?);
        self.inner
            .deliveries
            .deliver(&Actor::Admin, &artifacts, &to, false)
            .await
    }

    async fn plan(&self, request: DeliverRequest) -> Result<Vec<PlanRow>, Fault> {
        let (artifacts, to) = (parse_refs(&request.artifacts)?, request.to.parse()?);
        self.inner
            .deliveries
            .plan(&Actor::Admin, &artifacts, &to)
            .await
    }

    async fn transfers(
        &self,
        query: &TransferQuery,
        behind: Option<&str>,
        room: Room,
    ) -> Result<(Page<Transfer>, u64), Fault> {
        self.inner
            .catalogue
            .transfer_page(query, behind, room, |row| self.inner.deliveries.view(row))
            .await
    }

    async fn act(&self, id: &str, action: Action, room: Room) -> Result<Page<Transfer>, Fault> {
        let deliveries = &self.inner.deliveries;
        deliveries.act_on(&Actor::Admin, id, action).await?;
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
            let shown = match self.inner.deliveries.whole(&row, room.bytes).await {
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
        self.inner
            .deliveries
            .whole(&self.inner.catalogue.delivery(id).await?, max)
            .await
    }

    async fn runs(&self, behind: Option<&str>, room: Room) -> Result<Page<Run>, Fault> {
        self.inner.runs.list(&Actor::Admin, behind, 0, room).await
    }

    async fn run(&self, name: &str) -> Result<Run, Fault> {
        self.inner.runs.show(&Actor::Admin, name).await
    }

    async fn train(&self, request: RunRequest) -> Result<Run, Fault> {
        self.inner
            .runs
            .start(&Actor::Admin, &request.try_into()?)
            .await
    }

    async fn act_on_run(&self, request: RunActionRequest) -> Result<Run, Fault> {
        self.inner
            .runs
            .act_on(&Actor::Admin, &request.try_into()?)
            .await
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
            .artifact_transfer_page(&artifact.parse()?, behind, room, |row| {
                self.inner.deliveries.view(row)
            })
            .await
    }

    async fn open_by_artifact(&self) -> Result<Vec<(SiteName, ArtifactRef, u64)>, Fault> {
        self.inner.catalogue.open_by_artifact().await
    }

    async fn run_token(&self, _run: &RunName) -> Option<RunToken> {
        None
    }

    async fn sites(&self, behind: Option<&str>, room: Room) -> Result<Page<Site>, Fault> {
        self.inner
            .catalogue
            .site_page(behind, room, |row| self.site_view(row))
            .await
    }

    async fn site(&self, name: &str) -> Result<Site, Fault> {
        self.show_site(name).await
    }

    async fn set_site(&self, actor: &Actor, request: SetSiteRequest) -> Result<Site, Fault> {
        self.relabel(actor, request).await
    }

    async fn act_on_site(
        &self,
        actor: &Actor,
        request: MemberActionRequest,
    ) -> Result<Site, Fault> {
        self.change_site(actor, request).await
    }

    async fn publishers(&self, behind: Option<&str>, room: Room) -> Result<Page<Publisher>, Fault> {
        self.publisher_page(behind, room).await
    }

    async fn publisher(&self, name: &str) -> Result<Publisher, Fault> {
        self.show_publisher(name).await
    }

    async fn act_on_publisher(
        &self,
        actor: &Actor,
        request: MemberActionRequest,
    ) -> Result<Publisher, Fault> {
        self.change_publisher(actor, request).await
    }

    async fn token(&self, request: TokenRequest) -> Result<TokenReply, Fault> {
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
        let scope = PublisherScope {
            artifacts: match &request.artifacts[..] {
                [] => None,
                patterns => Some(
                    patterns
                        .iter()
                        .map(|pattern| pattern.parse())
                        .collect::<Result<_, _>>()?,
                ),
            },
            deliver_to: request.deliver_to.as_deref().map(str::parse).transpose()?,
        };
        let is_limited = scope != PublisherScope::default();
        if is_limited && request.publisher.is_none() {
            return Err(Fault::usage(
                "artifacts and deliver_to limit a publisher, and the token is for a site",
            ));
        }
        if request.artifacts.len() > PATTERNS_MAX {
            return Err(Fault::usage(format!(
                "a token has at most {PATTERNS_MAX} patterns of artifacts"
            )));
        }
        if request.ttl_seconds == 0 {
            return Err(Fault::usage(
                "the validity of a token must be longer than 0",
            ));
        }
        if request.ttl_seconds > TOKEN_TTL_MAX.as_secs() {
            return Err(Fault::usage("a join token is valid for at most 30 days")
                .with_next("create the token when it is needed"));
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
        // The token works before this, but nobody has it.
        if is_limited {
            self.inner.catalogue.limit_token(token.id(), &scope).await?;
        }
        let limits = match &holder {
            Peer::Publisher(name) => {
                let earlier = self.inner.catalogue.publisher_scope(name).await?;
                Some(limits(&scope.clone().over(earlier.unwrap_or_default())))
            }
            Peer::Site(_) | Peer::Hub(_) => None,
        };
        Ok(TokenReply {
            token: token.to_string(),
            limits,
            notes: self.unknown_sites(&scope).await?,
        })
    }

    async fn verify(&self, request: VerifyRequest) -> Result<Job, Fault> {
        let artifact: ArtifactRef = request.artifact.parse()?;
        self.inner.catalogue.artifact(&artifact).await?;
        if request.repair {
            return Err(Fault::usage("the hub cannot repair an artifact itself")
                .with_next("publish the artifact again: the damaged content is then stored again; to repair a copy at a site, run the command there"));
        }
        self.inner.jobs.verify(artifact, request.quick)
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

    async fn export_labels(
        &self,
        request: ExportLabelsRequest,
        reach: Reach,
    ) -> Result<Job, Fault> {
        reach.check_machine("export-labels")?;
        let export = LabelExport::parse(&request)?;
        let row = self.inner.catalogue.artifact(&export.artifact).await?;
        if let Some(site) = &row.origin {
            return Err(Fault::usage(format!(
                "{} was published at site {site}, and this hub may have only a part of its content",
                export.artifact
            ))
            .with_next("run the command at a site that holds it"));
        }
        self.inner.jobs.export_labels(row, export)
    }

    async fn export(
        &self,
        artifacts: Vec<String>,
        out: String,
        reach: Reach,
    ) -> Result<Job, Fault> {
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
        self.inner.jobs.export(members, out, reach)
    }

    async fn import(&self, file: String, reach: Reach) -> Result<Job, Fault> {
        self.inner.jobs.import(file, reach)
    }

    async fn adopt(&self) -> Result<Job, Fault> {
        Err(wrong_role("adopt", "site"))
    }

    async fn gc(&self) -> Result<Job, Fault> {
        self.inner.jobs.collect()
    }

    async fn doctor(&self) -> Result<Vec<String>, Fault> {
        let data = &self.inner.config.data_dir;
        let mut out = Vec::new();
        let (store, looked) = (self.inner.store.clone(), data.clone());
        out.push(blocking(move || sink::stage::room_report(&looked)).await?);
        let (stored, lost) =
            blocking(move || Ok((store.stored_bytes()?, store.lost_packs()?))).await?;
        let packs = self.inner.store.path();
        out.push(format!(
            "ok store: {} in packs at {}",
            text::size(stored),
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
        out.push(self.inner.relay.doctor_line());
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
            let line = match (&site.revoked, site.line) {
                (Some(revoked), _) => format!(
                    "ok site {}: revoked at {} by {}",
                    site.name, revoked.at, revoked.by
                ),
                (None, Some(line)) => format!("ok site {}: {line}", site.name),
                (None, None) => format!("fault site {}: not connected", site.name),
            };
            out.push(line);
            joined.push(site.name);
        }
        let allow = self.inner.config.share.allow.as_deref();
        out.extend(sharing::share_fault(allow, &joined));
        out.extend(sharing::site_list_faults(&self.inner.catalogue, &joined).await?);
        out.extend(self.changed_lines().await?);
        out.extend(crate::api::malformed_lines(&self.inner.catalogue));
        out.extend(self.inner.manifests.doctor_lines().await?);
        out.extend(self.inner.workers.doctor());
        Ok(out)
    }

    async fn job(&self, id: &str) -> Result<Job, Fault> {
        self.inner.jobs.all().get(id)
    }

    async fn jobs(&self, behind: Option<&str>, room: Room) -> Result<Page<Job>, Fault> {
        Ok(self.inner.jobs.all().list(behind, room))
    }

    async fn workers(&self, behind: Option<&str>, room: Room) -> Result<Page<Worker>, Fault> {
        Ok(worker_page(&self.inner.workers, behind, room))
    }

    async fn cancel_job(&self, id: &str) -> Result<Job, Fault> {
        self.inner.jobs.all().cancel(id)
    }

    async fn events(&self, since: u64, limit: u32) -> Result<Vec<Event>, Fault> {
        self.inner.catalogue.check_event_cursor(since).await?;
        let (mut out, mut room) = (Vec::new(), Budget::new(API_PAGE_BYTES));
        for row in self.inner.catalogue.events(since, limit).await? {
            let mut event = row.view();
            event.body = self.event_body(&row).await.unwrap_or_default();
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
            let is_away = is_open
                && row
                    .site
                    .parse()
                    .is_ok_and(|site| !self.inner.links.is_online(&site));
            counted.add(&row, is_away.then_some(Reason::SiteOffline));
        }
        let mut out = counted.to_text();
        let store = self.inner.store.clone();
        let stored = blocking(move || store.stored_bytes()).await?;
        let online = self.inner.links.count();
        out.push_str(&self.inner.relay.metrics());
        out.push_str(&self.inner.sessions.metrics());
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
            self.inner.jobs.all().running()
        );
        Ok(out)
    }
}

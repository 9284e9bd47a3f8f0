//! The site's implementation of the API. Requests that only the hub can decide are forwarded to the
//! hub.

mod checks;
mod hub_transfers;

use std::fmt::Write as _;

use async_trait::async_trait;

use super::Site;
use super::adopt::adopt;
use crate::api::types::{Site as SiteView, *};
use crate::api::{Backend, RunToken, View, worker_page};
use crate::delivery::Whole;
use crate::label_export::LabelExport;
use crate::reach::Reach;
use crate::serve::wrong_role;
use base::blocking::blocking_at;
use base::fault::{Code, Fault};
use base::limits::{API_PAGE_BYTES, ROOM_AWAITED_MAX};
use base::names::{ArtifactRef, DeliveryId, RunName, SiteName, WorkId};
use hub_transfers::{cursor_of_hub, is_full, no_such_work};
use model::paging::{Budget, Page, Pager, Room};
use model::protocol::AskHub;
use model::run;
use state::{DeliveryRow, TransferRow};

impl Site {
    /// The state of this site's own transfers.
    async fn own_transfers(
        &self,
        query: &TransferQuery,
        behind: Option<&str>,
        room: Room,
    ) -> Result<(Page<Transfer>, u64), Fault> {
        let own = TransferQuery {
            since: query.since.filter(|cursor| cursor & CURSOR_OF_HUB == 0),
            ..query.clone()
        };
        // If the catalogue cannot be written, the shown state reports that.
        let unwritten = self.inner.opened.runner.unwritten();
        let show = |row: &TransferRow| match unwritten
            .iter()
            .find(|newer| newer.id == row.id && newer.generation >= row.generation)
        {
            Some(newer) => TransferRow {
                state: newer.state,
                body: newer.body.clone(),
                ..row.clone()
            }
            .view(),
            None => row.view(),
        };
        self.inner
            .opened
            .catalogue
            .transfer_page(&own, behind, room, show)
            .await
    }

    /// The part of a delivery that goes to this site.
    async fn own_delivery(&self, row: &DeliveryRow, max: usize) -> Result<Delivery, Fault> {
        let mut whole = Whole::new(max);
        self.inner
            .opened
            .catalogue
            .each_part(&row.id, |part| whole.add(part.view()))
            .await?;
        Ok(whole.end(row))
    }
}

#[async_trait]
impl Backend for Site {
    fn role(&self) -> &'static str {
        "site"
    }

    fn name(&self) -> String {
        self.inner.opened.config.name.to_string()
    }

    async fn ready(&self) -> Result<(), Fault> {
        self.inner.opened.catalogue.cursor().await.map(|_| ())
    }

    async fn publish(&self, request: PublishRequest, reach: Reach) -> Result<Job, Fault> {
        reach.check_options(&request.options)?;
        let artifact: ArtifactRef = request.as_ref.parse()?;
        let this = self.clone();
        tracing::info!(%artifact, source = %request.source, "publishing in place");
        let (jobs, asked) = (&self.inner.jobs, (request.clone(), reach.clone()));
        jobs.start_once("publish", &asked, move |progress| async move {
            this.inner
                .publications
                .publish(request, reach, progress, ROOM_AWAITED_MAX)
                .await
        })
    }

    async fn deliver(&self, request: DeliverRequest) -> Result<Delivered, Fault> {
        let artifacts = request
            .artifacts
            .iter()
            .map(|artifact| artifact.parse())
            .collect::<Result<_, _>>()?;
        self.inner
            .hub
            .ask(&AskHub::Deliver {
                artifacts,
                to: request.to.parse()?,
            })
            .await
    }

    async fn plan(&self, _request: DeliverRequest) -> Result<Vec<PlanRow>, Fault> {
        Err(wrong_role("plan", "hub"))
    }

    async fn transfers(
        &self,
        query: &TransferQuery,
        behind: Option<&str>,
        room: Room,
    ) -> Result<(Page<Transfer>, u64), Fault> {
        if let (Some(id), Some(after)) = (&query.id, behind.and_then(cursor_of_hub)) {
            return self.page_at_hub(id, query, Some(after)).await;
        }
        let Some(id) = query.id.as_ref().filter(|_| behind.is_none()) else {
            return self.own_transfers(query, behind, room).await;
        };
        // This site may not have all parts of a delivery. A transfer that is not here may go to
        // another site, and the hub knows it.
        let whole = id.split(',').any(|id| id.trim().starts_with("d-"));
        let first = if whole {
            self.page_at_hub(id, query, None).await
        } else {
            self.own_transfers(query, None, room).await
        };
        let fault = match first {
            // A client that has received all parts does not continue with a subset.
            Err(fault) if fault.code == Code::NotFound || whole && query.since.is_none() => fault,
            answer => return answer,
        };
        let second = if whole {
            self.own_transfers(query, None, room).await
        } else {
            self.page_at_hub(id, query, None).await
        };
        second.map_err(|second| if whole { fault } else { second })
    }

    async fn act(&self, id: &str, action: Action, _room: Room) -> Result<Page<Transfer>, Fault> {
        let id: WorkId = id.parse().map_err(|_| no_such_work(id))?;
        let rows: Vec<Transfer> = self
            .inner
            .hub
            .ask(&AskHub::Act {
                id: id.clone(),
                action,
            })
            .await?;
        if is_full(&rows) {
            // The following pages continue after the cursor of this one.
            let all = TransferQuery::default();
            return Ok(self.page_at_hub(&id, &all, None).await?.0);
        }
        Ok(Page::whole(rows))
    }

    async fn deliveries(&self, behind: Option<&str>, room: Room) -> Result<Page<Delivery>, Fault> {
        let mut pager = Pager::new(room);
        for row in self
            .inner
            .opened
            .catalogue
            .deliveries(behind, room.rows_asked(), true)
            .await?
        {
            let shown = match self.own_delivery(&row, room.bytes).await {
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
        let asked: DeliveryId = id.parse().map_err(|_| no_such_work(id))?;
        // If the answer has no space for all parts, the API requests the others.
        let fault = match self
            .inner
            .hub
            .ask::<Delivery>(&AskHub::Delivery(asked))
            .await
        {
            Err(fault) => fault,
            Ok(mut whole) => {
                hub_transfers::mark(&mut whole.parts);
                return Ok(whole);
            }
        };
        let Ok(row) = self.inner.opened.catalogue.delivery(id).await else {
            return Err(fault);
        };
        let own = self.own_delivery(&row, max).await?;
        let why = match fault.code {
            Code::NotFound => "the hub does not show this delivery to this site".into(),
            _ => fault.message,
        };
        Ok(Delivery {
            note: Some(format!("this site's part only: {why}")),
            ..own
        })
    }

    async fn runs(&self, behind: Option<&str>, room: Room) -> Result<Page<Run>, Fault> {
        // The key is the number of runs on the earlier pages, and the name of the first run.
        let (from, first) = match behind.and_then(|key| key.split_once(' ')) {
            Some((from, first)) => (from.parse().unwrap_or(0), Some(first)),
            None => (0, None),
        };
        let limit = room.rows.saturating_add(from).saturating_add(1);
        let runs: Vec<Run> = self
            .inner
            .hub
            .ask(&AskHub::ListRuns { limit, from })
            .await?;
        let begins_anew = runs
            .first()
            .is_some_and(|run| Some(run.name.as_str()) == first);
        // An older hub does not know `from`, and returns the first page each time.
        if from > 0 && begins_anew {
            return Ok(Page::whole(Vec::new()));
        }
        let first = first
            .or(runs.first().map(|run| run.name.as_str()))
            .unwrap_or_default()
            .to_owned();
        let mut pager = Pager::new(room);
        let mut number = from;
        let full = is_full(&runs);
        for run in runs {
            number += 1;
            if !pager.put(run, format!("{number} {first}")) {
                break;
            }
        }
        let page = pager.page();
        // The hub's answer may also be incomplete.
        let next = page
            .next
            .or_else(|| full.then(|| format!("{number} {first}")));
        Ok(Page { next, ..page })
    }

    async fn run(&self, name: &str) -> Result<Run, Fault> {
        self.inner
            .hub
            .ask(&AskHub::ShowRun(run::known(name)?))
            .await
    }

    async fn run_token(&self, run: &RunName) -> Option<RunToken> {
        self.inner.runs.token_of(run).await
    }

    async fn train(&self, request: RunRequest) -> Result<Run, Fault> {
        self.inner
            .hub
            .ask(&AskHub::StartRun(request.try_into()?))
            .await
    }

    async fn act_on_run(&self, request: RunActionRequest) -> Result<Run, Fault> {
        self.inner
            .hub
            .ask(&AskHub::ActOnRun(request.try_into()?))
            .await
    }

    async fn artifacts(&self, behind: Option<&str>, room: Room) -> Result<Page<Artifact>, Fault> {
        self.inner
            .opened
            .catalogue
            .artifact_page(behind, room, View::view)
            .await
    }

    async fn show(&self, artifact: &str) -> Result<ArtifactDetail, Fault> {
        let artifact: ArtifactRef = artifact.parse()?;
        let row = self.inner.opened.catalogue.artifact(&artifact).await?;
        let lineage = self
            .inner
            .opened
            .catalogue
            .lineage(&artifact)
            .await?
            .map(crate::hub::lineage_view);
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
            .opened
            .catalogue
            .artifact_transfer_page(&artifact.parse()?, behind, room, |row| row.view())
            .await
    }

    async fn open_by_artifact(&self) -> Result<Vec<(SiteName, ArtifactRef, u64)>, Fault> {
        self.inner.opened.catalogue.open_by_artifact().await
    }

    async fn sites(&self, _behind: Option<&str>, _room: Room) -> Result<Page<SiteView>, Fault> {
        let link = self.inner.hub.link();
        let open = self
            .inner
            .opened
            .catalogue
            .open_transfers(&self.inner.opened.config.name)
            .await?
            .len();
        Ok(Page::whole(vec![SiteView {
            name: self.inner.opened.config.name.clone(),
            labels: Default::default(),
            online: link.is_some(),
            line: link.as_ref().map(|l| l.transport().into()),
            line_reason: link.as_ref().and_then(|l| l.reason()),
            rtt_ms: link.as_ref().map(|l| l.rtt().as_secs_f64() * 1000.0),
            joined_at: self
                .inner
                .hub
                .identity()
                .validity()
                .map(|v| base::clock::rfc3339(v.from))
                .unwrap_or_default(),
            last_seen: None,
            version: Some(crate::api::VERSION.into()),
            open_transfers: open as u64,
            certificate: None,
            revoked: None,
            changed: None,
        }]))
    }

    async fn token(&self, _request: TokenRequest) -> Result<TokenReply, Fault> {
        Err(wrong_role("token create", "hub"))
    }

    async fn verify(&self, request: VerifyRequest) -> Result<Job, Fault> {
        let VerifyRequest {
            artifact,
            repair,
            quick,
        } = request;
        let artifact: ArtifactRef = artifact.parse()?;
        let row = self.inner.opened.catalogue.artifact(&artifact).await?;
        if repair && row.published {
            return Err(Fault::usage(format!(
                "cannot repair {artifact}: it was published at this site, and no other daemon holds the missing content"
            ))
            .with_next("restore the original files, or publish a new version"));
        }
        let this = self.clone();
        let (jobs, asked) = (&self.inner.jobs, (artifact.to_string(), repair, quick));
        jobs.start_once("verify", &asked, move |progress| async move {
            let mut faults = this.verify_now(row, quick, progress).await?;
            if let Some(first) = faults.first().filter(|_| repair) {
                let found = faults.len();
                // A fault replaces the findings, so it includes them.
                let in_vain = |fault: Fault| {
                    fault.context(format!(
                        "{found} found, the first: {first}; the missing content cannot be fetched now"
                    ))
                };
                let asked = this.ask_again(&artifact).await.map_err(in_vain)?;
                faults.push(asked);
            }
            Ok(faults)
        })
    }

    async fn pin(&self, _artifact: &str, _pinned: bool) -> Result<Artifact, Fault> {
        Err(wrong_role("pin", "hub"))
    }

    async fn export_labels(
        &self,
        request: ExportLabelsRequest,
        reach: Reach,
    ) -> Result<Job, Fault> {
        reach.check_machine("export-labels")?;
        let export = LabelExport::parse(&request)?;
        let artifact = &export.artifact;
        let row = self.inner.opened.catalogue.artifact(artifact).await?;
        let Some(place) = row.place else {
            return Err(
                Fault::not_found(format!("this site has no copy of {artifact}"))
                    .with_next("deliver it to this site, or run the command at the hub"),
            );
        };
        let (jobs, config) = (&self.inner.jobs, self.inner.opened.config.clone());
        jobs.start_once("export labels", &request, move |progress| async move {
            let out = export.out.clone();
            blocking_at(&out, move || {
                export.write(&config, place.filesystem(), &progress)
            })
            .await
        })
    }

    async fn export(
        &self,
        _artifacts: Vec<String>,
        _out: String,
        _reach: Reach,
    ) -> Result<Job, Fault> {
        Err(not_in_this_version("export"))
    }

    async fn import(&self, _file: String, _reach: Reach) -> Result<Job, Fault> {
        Err(not_in_this_version("import"))
    }

    async fn adopt(&self) -> Result<Job, Fault> {
        let this = self.clone();
        self.inner
            .jobs
            .start(move |progress| async move { adopt(&this.inner.opened, progress).await })
    }

    async fn gc(&self) -> Result<Job, Fault> {
        Err(wrong_role("gc", "hub"))
    }

    async fn doctor(&self) -> Result<Vec<String>, Fault> {
        self.checks().await
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
        self.inner
            .opened
            .catalogue
            .check_event_cursor(since)
            .await?;
        let (mut out, mut room) = (Vec::new(), Budget::new(API_PAGE_BYTES));
        for row in self.inner.opened.catalogue.events(since, limit).await? {
            let mut event = row.view();
            let catalogue = &self.inner.opened.catalogue;
            let body = match event.what.as_str() {
                "transfer" => {
                    let now = catalogue.transfer(&row.name).await.ok();
                    now.and_then(|now| serde_json::to_value(row.transfer(now).view()).ok())
                }
                _ => match row.name.parse() {
                    Ok(artifact) => {
                        let now = catalogue.artifact(&artifact).await.ok();
                        now.and_then(|now| serde_json::to_value(row.artifact(now).view()).ok())
                    }
                    Err(_) => None,
                },
            };
            event.body = body.unwrap_or_default();
            if !room.takes(&event) {
                break;
            }
            out.push(event);
        }
        Ok(out)
    }

    fn changed(&self) -> futures::future::BoxFuture<'static, ()> {
        Box::pin(self.inner.opened.catalogue.changed())
    }

    async fn metrics(&self) -> Result<String, Fault> {
        let mut counted = crate::metrics::Transfers::default();
        self.inner
            .opened
            .catalogue
            .counted_transfers()
            .await?
            .iter()
            .for_each(|some| counted.add(some, None));
        let mut out = counted.to_text();
        let connected = u8::from(self.inner.hub.link().is_some());
        let _ = writeln!(
            out,
            "# TYPE packhorse_hub_connected gauge\npackhorse_hub_connected {connected}"
        );
        Ok(out)
    }
}

/// The fault for a command that this version does not implement.
fn not_in_this_version(what: &str) -> Fault {
    Fault::usage(format!(
        "this version of packhorse cannot run {what} at a site"
    ))
    .with_next("run it at the hub, or deliver over the network")
}

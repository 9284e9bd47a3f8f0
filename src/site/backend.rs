//! What a site can be asked over its API. What only the hub can decide is passed on to it.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;

use super::Site;
use crate::api::View;
use crate::api::types::Site as SiteView;
use crate::api::types::*;
use crate::api::{Backend, RunToken};
use crate::delivery;
use crate::serve::wrong_role;
use crate::trainer;
use base::blocking::blocking;
use base::fault::{Code, Fault};
use base::job_progress::JobProgress;
use base::limits::{ANSWER_BYTES_MAX, API_LIST_BYTES_MAX, API_ROWS_MAX, ID_BYTES_MAX, ROOM_AWAITED_MAX, SINK_ANSWER_MAX};
use base::names::{ArtifactRef, DeliveryId, RunName, TransferId, WorkId, WorkIds};
use exchange::transfer::{Found, beside, verify};
use exchange::wire::AskHub;
use model::paging::{self, Budget};
use model::run;
use sink::{Incoming, Look};
use state::ArtifactRow;

/// Marks a cursor as the hub's: the two count by themselves, and what one has told says nothing of what the other has. Whoever comes
/// with one to the other is told all.
const OF_HUB: u64 = 1 << 52;

impl Site {
    /// Re-reads what this site holds of an artifact. One line a fault; what else is not as it was delivered is noted.
    async fn verify_now(&self, row: ArtifactRow, quick: bool, progress: Arc<JobProgress>) -> Result<Vec<String>, Fault> {
        let Some(place) = row.place.clone() else { return Ok(vec![format!("{} is not held here", row.artifact)]) };
        progress.doing(format!("re-reading {}", row.artifact));
        if row.published {
            if quick {
                progress.note("it was published here, of which there is no quick check: its content was read");
            }
            let origin = self.inner.origin.clone();
            return blocking(move || {
                let read = |bytes| {
                    progress.bytes.fetch_add(bytes, Ordering::Relaxed);
                    progress.check()
                };
                origin.verify(row.digest, &row.root, &[place], read)
            })
            .await;
        }
        let sink = self.inner.sinks.of(row.artifact.kind).clone();
        let incoming = Incoming {
            artifact: row.artifact,
            digest: row.digest,
            root: row.root,
            transfer: TransferId::none(),
            waits: Default::default(),
        };
        let counted = progress.clone();
        let look = Look::new(quick, move |bytes| {
            counted.bytes.fetch_add(bytes, Ordering::Relaxed);
        });
        let store = &self.inner.shared.store;
        let Found { faults, notes, unread } = verify(sink.as_ref(), store.clone(), &incoming, &place, &look).await?;
        if let Some(why) = unread.filter(|_| faults.is_empty()) {
            return Err(Fault::not_allowed(format!("{} was not verified: {why}", incoming.artifact))
                .with_next("when the registry gives the image out, run 'packhorse verify' again"));
        }
        notes.into_iter().for_each(|note| progress.note(note));
        // A repair leaves it where it is, so it is named before.
        progress.doing(format!("looking for what lies beside {}", incoming.artifact));
        if let Some(note) = beside(sink.as_ref(), store.clone(), &incoming, &place, faults.is_empty()).await? {
            progress.note(note);
        }
        Ok(faults)
    }

    /// Asks the hub to bring an artifact again, of which something is gone or damaged here.
    async fn ask_again(&self, artifact: &ArtifactRef) -> Result<String, Fault> {
        let rows = self.inner.catalogue.transfers_of_artifact(artifact).await?;
        let Some(brought) = rows.iter().rev().find(|row| row.state == State::Done && row.removed_ms.is_none()) else {
            return Err(Fault::conflict(format!("no transfer that is done brought {artifact} here"))
                .with_next("see 'packhorse status'; at the hub: packhorse deliver"));
        };
        let _: Vec<Transfer> = self.ask_hub(&AskHub::Act { id: (&brought.id).into(), action: Action::Retry }).await?;
        Ok(format!("the hub was asked to bring what lacks: packhorse status {}", brought.id))
    }

    /// How this site's own transfers stand.
    async fn own_transfers(&self, query: &TransferQuery) -> Result<(Vec<Transfer>, u64), Fault> {
        let own = TransferQuery { since: query.since.filter(|cursor| cursor & OF_HUB == 0), ..query.clone() };
        let (mut rows, cursor) = self.inner.catalogue.transfers(&own).await?;
        // Where the catalogue cannot be written, what is shown says so.
        let unwritten = self.inner.runner.unwritten();
        for row in &mut rows {
            if let Some(newer) = unwritten.iter().find(|newer| newer.id == row.id && newer.generation >= row.generation) {
                (row.state, row.body) = (newer.state, newer.body.clone());
            }
        }
        Ok((rows.iter().map(|row| row.view()).collect(), cursor))
    }

    /// The same as the hub says it.
    async fn transfers_at_hub(&self, id: &str, query: &TransferQuery) -> Result<(Vec<Transfer>, u64), Fault> {
        let since = query.since.filter(|cursor| cursor & OF_HUB != 0).map(|cursor| cursor & !OF_HUB);
        // No transfer has an id that does not parse.
        let id: WorkIds = id.parse().map_err(|_| no_such_work(id))?;
        let asked = AskHub::Transfers { id: id.clone(), since, wait: since.and(query.wait).unwrap_or(0) };
        let (mut rows, mut cursor): (Vec<Transfer>, u64) = self.ask_hub(&asked).await?;
        // Whoever asks for what changed since goes on by himself.
        let mut full = since.is_none() && is_full(&rows);
        while full {
            let asked = AskHub::Transfers { id: id.clone(), since: Some(cursor), wait: 0 };
            let (more, next): (Vec<Transfer>, u64) = self.ask_hub(&asked).await?;
            // One that changed meanwhile comes a second time.
            rows.retain(|row| more.iter().all(|new| new.id != row.id));
            full = is_full(&more) && next > cursor && rows.len() < API_ROWS_MAX as usize;
            rows.extend(more);
            cursor = next.max(cursor);
        }
        Ok((rows, cursor | OF_HUB))
    }
}

#[async_trait]
impl Backend for Site {
    fn role(&self) -> &'static str {
        "site"
    }

    fn name(&self) -> String {
        self.inner.config.name.to_string()
    }

    async fn ready(&self) -> Result<(), Fault> {
        self.inner.catalogue.cursor().await.map(|_| ())
    }

    async fn publish(&self, request: PublishRequest) -> Result<Job, Fault> {
        let artifact: ArtifactRef = request.as_ref.parse()?;
        let this = self.clone();
        tracing::info!(%artifact, source = %request.source, "publishing in place");
        self.inner.jobs.start(move |progress| async move { this.publish_now(request, progress, ROOM_AWAITED_MAX).await })
    }

    async fn deliver(&self, request: DeliverRequest) -> Result<Delivered, Fault> {
        let artifacts = request.artifacts.iter().map(|artifact| artifact.parse()).collect::<Result<_, _>>()?;
        self.ask_hub(&AskHub::Deliver { artifacts, to: request.to.parse()? }).await
    }

    async fn plan(&self, _request: DeliverRequest) -> Result<Vec<PlanRow>, Fault> {
        Err(wrong_role("plan", "hub"))
    }

    async fn transfers(&self, query: &TransferQuery) -> Result<(Vec<Transfer>, u64), Fault> {
        let Some(id) = &query.id else { return self.own_transfers(query).await };
        // Of a delivery what is here may not be all; else what is not here may go to another site, and the hub knows.
        let whole = id.split(',').any(|id| id.trim().starts_with("d-"));
        let first = if whole { self.transfers_at_hub(id, query).await } else { self.own_transfers(query).await };
        let fault = match first {
            // Whoever has seen the whole does not go on with a part.
            Err(fault) if fault.code == Code::NotFound || whole && query.since.is_none() => fault,
            answer => return answer,
        };
        let second = if whole { self.own_transfers(query).await } else { self.transfers_at_hub(id, query).await };
        second.map_err(|second| if whole { fault } else { second })
    }

    async fn act(&self, id: &str, action: Action) -> Result<Vec<Transfer>, Fault> {
        let id: WorkId = id.parse().map_err(|_| no_such_work(id))?;
        let rows: Vec<Transfer> = self.ask_hub(&AskHub::Act { id: id.clone(), action }).await?;
        match is_full(&rows) {
            true => Ok(self.transfers_at_hub(&id, &TransferQuery::default()).await?.0),
            false => Ok(rows),
        }
    }

    async fn transfers_behind(&self, id: &str, limit: u32) -> Result<Vec<Transfer>, Fault> {
        Ok(self.inner.catalogue.transfers_behind(id, limit).await?.iter().map(|row| row.view()).collect())
    }

    async fn deliveries(&self, behind: Option<&str>, limit: u32) -> Result<Vec<Delivery>, Fault> {
        let rows = self.inner.catalogue.deliveries(behind, limit).await?;
        Ok(rows.iter().map(|row| delivery::view(row, row.parts.iter().map(|t| t.view()).collect())).collect())
    }

    async fn delivery(&self, id: &str) -> Result<Delivery, Fault> {
        let asked: DeliveryId = id.parse().map_err(|_| no_such_work(id))?;
        let fault = match self.ask_hub::<Delivery>(&AskHub::Delivery(asked)).await {
            Err(fault) => fault,
            Ok(whole) if whole.parts_total.is_some() => {
                let (parts, _) = self.transfers_at_hub(id, &TransferQuery::default()).await?;
                return Ok(Delivery { parts, parts_total: None, note: None, ..whole });
            }
            whole => return whole,
        };
        let Ok(row) = self.inner.catalogue.delivery(id).await else { return Err(fault) };
        let own = delivery::view(&row, row.parts.iter().map(|t| t.view()).collect());
        let why = match fault.code {
            Code::NotFound => "the hub tells it no more of this delivery".into(),
            _ => fault.message,
        };
        Ok(Delivery { note: Some(format!("this site's part only: {why}")), ..own })
    }

    async fn runs(&self, limit: u32) -> Result<Vec<Run>, Fault> {
        let mut runs: Vec<Run> = Vec::new();
        loop {
            let from = runs.len() as u32;
            let more: Vec<Run> = self.ask_hub(&AskHub::ListRuns { limit, from }).await?;
            // An older hub does not know `from`, and begins anew each time.
            if from > 0 && more.first().is_none_or(|first| runs.iter().any(|run| run.name == first.name)) {
                return Ok(runs);
            }
            let full = is_full(&more);
            runs.extend(more);
            if !full || runs.len() as u32 >= limit {
                return Ok(runs);
            }
        }
    }

    async fn run(&self, name: &str) -> Result<Run, Fault> {
        self.ask_hub(&AskHub::ShowRun(run::known(name)?)).await
    }

    async fn run_token(&self, run: &RunName) -> Option<RunToken> {
        self.token_of_run(run).await
    }

    async fn train(&self, request: RunRequest) -> Result<Run, Fault> {
        self.ask_hub(&AskHub::StartRun(request.try_into()?)).await
    }

    async fn act_on_run(&self, request: RunActionRequest) -> Result<Run, Fault> {
        self.ask_hub(&AskHub::ActOnRun(request.try_into()?)).await
    }

    async fn artifacts(&self) -> Result<Vec<Artifact>, Fault> {
        self.inner.catalogue.map_artifacts(|row| row.view()).await
    }

    async fn show(&self, artifact: &str) -> Result<ArtifactDetail, Fault> {
        let artifact: ArtifactRef = artifact.parse()?;
        let row = self.inner.catalogue.artifact(&artifact).await?;
        let transfers = self.inner.catalogue.transfers_of_artifact(&artifact).await?;
        let lineage = self.inner.catalogue.lineage(&artifact).await?.map(crate::hub::lineage_view);
        Ok(ArtifactDetail { artifact: row.view(), transfers: transfers.iter().map(|t| t.view()).collect(), lineage })
    }

    async fn sites(&self) -> Result<Vec<SiteView>, Fault> {
        let link = self.inner.link.borrow().clone();
        let open = self.inner.catalogue.open_transfers(&self.inner.config.name).await?.len();
        Ok(vec![SiteView {
            name: self.inner.config.name.clone(),
            labels: Default::default(),
            online: link.is_some(),
            line: link.as_ref().map(|l| l.transport().into()),
            rtt_ms: link.as_ref().map(|l| l.rtt().as_secs_f64() * 1000.0),
            joined_at: self.inner.identity.borrow().validity().map(|v| base::clock::rfc3339(v.from)).unwrap_or_default(),
            last_seen: None,
            version: Some(crate::api::VERSION.into()),
            open_transfers: open as u64,
        }])
    }

    async fn token(&self, _request: TokenRequest) -> Result<String, Fault> {
        Err(wrong_role("token create", "hub"))
    }

    async fn verify(&self, request: VerifyRequest) -> Result<Job, Fault> {
        let VerifyRequest { artifact, repair, quick } = request;
        let artifact: ArtifactRef = artifact.parse()?;
        let row = self.inner.catalogue.artifact(&artifact).await?;
        if repair && row.published {
            return Err(Fault::usage(format!("{artifact} was published here: nobody else has what lacks"))
                .with_next("put the files back as they were, or publish a new version"));
        }
        let this = self.clone();
        self.inner.jobs.start(move |progress| async move {
            let mut faults = this.verify_now(row, quick, progress).await?;
            if let Some(first) = faults.first().filter(|_| repair) {
                let found = faults.len();
                // A fault takes the place of the findings: what was found is said with it.
                let in_vain = |fault: Fault| fault.context(format!("{found} found, the first: {first}; what lacks cannot be brought now"));
                let asked = this.ask_again(&artifact).await.map_err(in_vain)?;
                faults.push(asked);
            }
            Ok(faults)
        })
    }

    async fn pin(&self, _artifact: &str, _pinned: bool) -> Result<Artifact, Fault> {
        Err(wrong_role("pin", "hub"))
    }

    async fn export(&self, _artifacts: Vec<String>, _out: String) -> Result<Job, Fault> {
        Err(not_in_this_version("export"))
    }

    async fn import(&self, _file: String) -> Result<Job, Fault> {
        Err(not_in_this_version("import"))
    }

    async fn gc(&self) -> Result<Job, Fault> {
        Err(wrong_role("gc", "hub"))
    }

    async fn doctor(&self) -> Result<Vec<String>, Fault> {
        let inner = &self.inner;
        let mut out = Vec::new();
        let link = inner.link.borrow().clone();
        out.push(match (&link, inner.line_fault.lock().clone()) {
            (Some(link), _) => {
                format!("ok line: {} to {}, round trip {} ms", link.transport(), link.remote_address(), link.rtt().as_millis())
            }
            (None, Some(fault)) => format!("fault line: {}; {}", fault.message, fault.next),
            (None, None) => "fault line: not connected yet".into(),
        });
        out.extend(link.as_ref().and_then(transport::clock_difference).map(|text| format!("fault clock: {text}")));
        let probes = inner.sinks.all().map(|sink| async move {
            let silent = |_| {
                let text = format!("{} has not answered for {} s", sink.staging_root().display(), SINK_ANSWER_MAX.as_secs());
                Err(sink.held_up().unwrap_or_else(|| Fault::unreachable(text)))
            };
            tokio::time::timeout(SINK_ANSWER_MAX, sink.probe()).await.unwrap_or_else(silent)
        });
        for probed in futures::future::join_all(probes).await {
            out.push(match probed {
                Ok(text) => format!("ok {text}"),
                Err(fault) => format!("fault {}; {}", fault.message, fault.next),
            });
        }
        if let Some(program) = inner.config.train.as_ref().and_then(|train| train.command.first()) {
            out.push(match trainer::check_program(program) {
                Ok(()) => format!("ok train: {program} can be run"),
                Err(fault) => format!("fault {}; {}", fault.message, fault.next),
            });
        }
        out.push(sink::stage::room_report(&inner.config.data_dir)?);
        out.extend(crate::site::lost::report(&inner.config.data_dir));
        out.extend(inner.shared.places.loss().map(|loss| loss.report(&inner.config.data_dir)));
        out.extend(self.changed_lines().await?);
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
        let (mut out, mut room) = (Vec::new(), Budget::new(API_LIST_BYTES_MAX));
        for row in self.inner.catalogue.events(since, limit).await? {
            let (mut event, name) = (row.view(), row.name);
            let body = match event.what.as_str() {
                "transfer" => self.inner.catalogue.transfer(&name).await.ok().and_then(|row| serde_json::to_value(row.view()).ok()),
                _ => match name.parse() {
                    Ok(artifact) => {
                        self.inner.catalogue.artifact(&artifact).await.ok().and_then(|row| serde_json::to_value(row.view()).ok())
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
        Box::pin(self.inner.catalogue.changed())
    }

    async fn metrics(&self) -> Result<String, Fault> {
        let mut counted = crate::metrics::Transfers::default();
        self.inner.catalogue.each_transfer(API_ROWS_MAX, |row| counted.add(&row.view())).await?;
        let mut out = counted.to_text();
        let connected = u8::from(self.inner.link.borrow().is_some());
        let _ = writeln!(out, "# TYPE packhorse_hub_connected gauge\npackhorse_hub_connected {connected}");
        Ok(out)
    }
}

/// Whether an answer of the hub may have had no room for all: it is cut behind a row, and no row has half the room.
fn is_full<T: serde::Serialize>(rows: &[T]) -> bool {
    paging::json_bytes(rows) > ANSWER_BYTES_MAX / 2
}

/// The answer for an id that is none of a transfer or delivery.
fn no_such_work(id: &str) -> Fault {
    let id: String = id.chars().take(ID_BYTES_MAX).collect();
    Fault::not_found(format!("there is no transfer or delivery {}", id.escape_debug())).with_next("'packhorse status' lists them")
}

/// The fault for a command whose work is not in this version; said plainly rather than half done.
fn not_in_this_version(what: &str) -> Fault {
    Fault::usage(format!("{what} at a site is not in this version of packhorse yet"))
        .with_next("run it at the hub, or deliver over the line")
}

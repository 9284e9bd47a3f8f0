//! The site's implementation of the API. Requests that only the hub can decide are forwarded to the
//! hub.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;

use super::Site;
use crate::api::types::{Site as SiteView, *};
use crate::api::{Backend, RunToken, View, worker_page};
use crate::delivery::Whole;
use crate::serve::wrong_role;
use crate::trainer;
use base::blocking::{blocking, blocking_at};
use base::fault::{Code, Fault};
use base::job_progress::JobProgress;
use base::limits::{
    ANSWER_BYTES_MAX, API_PAGE_BYTES, API_ROWS_MAX, ID_BYTES_MAX, ROOM_AWAITED_MAX, SINK_ANSWER_MAX,
};
use base::names::{ArtifactRef, DeliveryId, RunName, TransferId, WorkId, WorkIds};
use exchange::transfer::{VerifyReport, beside, verify};
use model::paging::{self, Budget, Page, Pager, Room};
use model::protocol::AskHub;
use model::run;
use sink::{Incoming, Look};
use state::{ArtifactRow, DeliveryRow, TransferRow};

/// Marks a cursor as the hub's. Hub and site count independently, so a cursor of one has no meaning
/// for the other. A client that uses a cursor with the other daemon receives all transfers.
const OF_HUB: u64 = 1 << 52;

impl Site {
    /// Reads and checks this site's copy of an artifact. Returns one line for each fault; other
    /// differences are notes.
    async fn verify_now(
        &self,
        row: ArtifactRow,
        quick: bool,
        progress: Arc<JobProgress>,
    ) -> Result<Vec<String>, Fault> {
        let Some(place) = row.place.clone() else {
            return Ok(vec![format!("this site has no copy of {}", row.artifact)]);
        };
        progress.doing(format!("re-reading {}", row.artifact));
        if row.published {
            if quick {
                progress.note(
                    "it was published here, and there is no quick check for that: its content was read",
                );
            }
            let origin = self.inner.opened.reader.clone();
            let path = place.filesystem().to_owned();
            return blocking_at(&path, move || {
                let read = |bytes| {
                    progress.bytes.fetch_add(bytes, Ordering::Relaxed);
                    progress.check()
                };
                origin.verify(row.digest, &row.root, &[place], read)
            })
            .await;
        }
        let sink = self.inner.opened.sinks.of(row.artifact.kind).clone();
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
        let store = &self.inner.opened.shared.store;
        let VerifyReport {
            faults,
            notes,
            unread,
        } = verify(sink.as_ref(), store.clone(), &incoming, &place, &look).await?;
        if let Some(why) = unread.filter(|_| faults.is_empty()) {
            return Err(Fault::not_allowed(format!(
                "{} was not verified: {why}",
                incoming.artifact
            ))
            .with_next(
                "run 'packhorse verify' again when the registry allows a pull of the image",
            ));
        }
        notes.into_iter().for_each(|note| progress.note(note));
        // A repair keeps additional files, so they are reported before it.
        progress.doing(format!(
            "looking for additional files of {}",
            incoming.artifact
        ));
        if let Some(note) = beside(
            sink.as_ref(),
            store.clone(),
            &incoming,
            &place,
            faults.is_empty(),
        )
        .await?
        {
            progress.note(note);
        }
        Ok(faults)
    }

    /// Requests from the hub a new delivery of an artifact that is damaged or incomplete here.
    async fn ask_again(&self, artifact: &ArtifactRef) -> Result<String, Fault> {
        let rows = self
            .inner
            .opened
            .catalogue
            .transfers_of_artifact(artifact)
            .await?;
        let Some(brought) = rows
            .iter()
            .rev()
            .find(|row| row.state == State::Done && row.removed_ms.is_none())
        else {
            return Err(Fault::conflict(format!(
                "no completed transfer delivered {artifact} to this site"
            ))
            .with_next("see 'packhorse status'; at the hub: packhorse deliver"));
        };
        let _: Vec<Transfer> = self
            .inner
            .hub
            .ask(&AskHub::Act {
                id: (&brought.id).into(),
                action: Action::Retry,
            })
            .await?;
        Ok(format!(
            "the missing content was requested from the hub: packhorse status {}",
            brought.id
        ))
    }

    /// The state of this site's own transfers.
    async fn own_transfers(
        &self,
        query: &TransferQuery,
        behind: Option<&str>,
        room: Room,
    ) -> Result<(Page<Transfer>, u64), Fault> {
        let own = TransferQuery {
            since: query.since.filter(|cursor| cursor & OF_HUB == 0),
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

    /// The transfers as the hub reports them, as one page.
    async fn page_at_hub(
        &self,
        id: &str,
        query: &TransferQuery,
    ) -> Result<(Page<Transfer>, u64), Fault> {
        let (rows, cursor) = self.transfers_at_hub(id, query).await?;
        Ok((Page::whole(rows), cursor))
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

    /// The state of transfers as the hub reports it: the content of one of the hub's answers, or,
    /// without a cursor, all of them up to the maximum rows of a list.
    async fn transfers_at_hub(
        &self,
        id: &str,
        query: &TransferQuery,
    ) -> Result<(Vec<Transfer>, u64), Fault> {
        let since = query
            .since
            .filter(|cursor| cursor & OF_HUB != 0)
            .map(|cursor| cursor & !OF_HUB);
        // An id that does not parse belongs to no transfer.
        let id: WorkIds = id.parse().map_err(|_| no_such_work(id))?;
        let asked = AskHub::Transfers {
            id: id.clone(),
            since,
            wait: since.and(query.wait).unwrap_or(0),
        };
        let (mut rows, mut cursor): (Vec<Transfer>, u64) = self.inner.hub.ask(&asked).await?;
        // A client with a cursor requests the next page itself.
        let mut full = since.is_none() && is_full(&rows);
        while full {
            let asked = AskHub::Transfers {
                id: id.clone(),
                since: Some(cursor),
                wait: 0,
            };
            let (more, next): (Vec<Transfer>, u64) = self.inner.hub.ask(&asked).await?;
            // A transfer that changed in the meantime is returned again.
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
        self.inner.opened.config.name.to_string()
    }

    async fn ready(&self) -> Result<(), Fault> {
        self.inner.opened.catalogue.cursor().await.map(|_| ())
    }

    async fn publish(&self, request: PublishRequest) -> Result<Job, Fault> {
        let artifact: ArtifactRef = request.as_ref.parse()?;
        let this = self.clone();
        tracing::info!(%artifact, source = %request.source, "publishing in place");
        self.inner.jobs.start(move |progress| async move {
            this.inner
                .publications
                .publish(request, progress, ROOM_AWAITED_MAX)
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
        let Some(id) = query.id.as_ref().filter(|_| behind.is_none()) else {
            return self.own_transfers(query, behind, room).await;
        };
        // This site may not have all parts of a delivery. A transfer that is not here may go to
        // another site, and the hub knows it.
        let whole = id.split(',').any(|id| id.trim().starts_with("d-"));
        let first = if whole {
            self.page_at_hub(id, query).await
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
            self.page_at_hub(id, query).await
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
        match is_full(&rows) {
            true => Ok(Page::whole(
                self.transfers_at_hub(&id, &TransferQuery::default())
                    .await?
                    .0,
            )),
            false => Ok(Page::whole(rows)),
        }
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
            whole => return whole,
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
        }]))
    }

    async fn token(&self, _request: TokenRequest) -> Result<String, Fault> {
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
        self.inner.jobs.start(move |progress| async move {
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
        let link = inner.hub.link();
        out.push(match (&link, inner.hub.fault()) {
            (Some(link), _) => {
                let config = &inner.opened.config;
                let addresses = config.hub.iter().flat_map(|hub| hub.address.split(','));
                let proxy = addresses
                    .filter(|_| link.transport() == "tcp")
                    .find_map(|address| config.line.proxy.of_hub(address))
                    .map_or_else(String::new, |proxy| format!(" through the proxy {proxy}"));
                format!(
                    "ok line: {} to {}{proxy}, round trip {} ms",
                    link.transport(),
                    link.remote_address(),
                    link.rtt().as_millis()
                )
            }
            (None, Some(fault)) => format!("fault line: {}; {}", fault.message, fault.next),
            (None, None) => "fault line: not connected yet".into(),
        });
        out.extend(
            link.as_ref()
                .and_then(transport::clock_difference)
                .map(|text| format!("fault clock: {text}")),
        );
        let probes = inner.opened.sinks.all().map(|sink| async move {
            let silent = |_| {
                let text = format!(
                    "{} has not answered for {} s",
                    sink.staging_root().display(),
                    SINK_ANSWER_MAX.as_secs()
                );
                Err(sink.held_up().unwrap_or_else(|| Fault::unreachable(text)))
            };
            tokio::time::timeout(SINK_ANSWER_MAX, sink.probe())
                .await
                .unwrap_or_else(silent)
        });
        for probed in futures::future::join_all(probes).await {
            out.push(match probed {
                Ok(text) => format!("ok {text}"),
                Err(fault) => format!("fault {}; {}", fault.message, fault.next),
            });
        }
        if let Some(program) = inner
            .opened
            .config
            .train
            .as_ref()
            .and_then(|train| train.command.first().cloned())
        {
            let path = PathBuf::from(&program);
            let checked = blocking_at(&path, move || {
                trainer::check_program(&program)
                    .map(|()| format!("ok train: {program} is executable"))
            });
            let silent = |_| {
                let text = format!(
                    "{} has not answered for {} s",
                    path.display(),
                    SINK_ANSWER_MAX.as_secs()
                );
                Err(Fault::unreachable(text))
            };
            let checked = tokio::time::timeout(SINK_ANSWER_MAX, checked).await;
            out.push(match checked.unwrap_or_else(silent) {
                Ok(text) => text,
                Err(fault) => format!("fault {}; {}", fault.message, fault.next),
            });
        }
        let (data, index) = (
            inner.opened.config.data_dir.clone(),
            inner.opened.shared.chunk_index.clone(),
        );
        let own = move || {
            let mut out = vec![sink::stage::room_report(&data)?];
            out.extend(crate::site::lost::report(&data));
            out.extend(index.loss().map(|loss| loss.report(&data)));
            Ok(out)
        };
        out.extend(blocking(own).await?);
        out.extend(inner.watch.changed_lines().await?);
        out.extend(crate::api::malformed_lines(&inner.opened.catalogue));
        out.extend(inner.workers.doctor());
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
        self.inner
            .opened
            .catalogue
            .check_event_cursor(since)
            .await?;
        let (mut out, mut room) = (Vec::new(), Budget::new(API_PAGE_BYTES));
        for row in self.inner.opened.catalogue.events(since, limit).await? {
            let (mut event, name) = (row.view(), row.name);
            let body = match event.what.as_str() {
                "transfer" => self
                    .inner
                    .opened
                    .catalogue
                    .transfer(&name)
                    .await
                    .ok()
                    .and_then(|row| serde_json::to_value(row.view()).ok()),
                _ => match name.parse() {
                    Ok(artifact) => self
                        .inner
                        .opened
                        .catalogue
                        .artifact(&artifact)
                        .await
                        .ok()
                        .and_then(|row| serde_json::to_value(row.view()).ok()),
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

/// Whether an answer of the hub may be incomplete for lack of space: it ends after a row, and no
/// row takes half the space.
fn is_full<T: serde::Serialize>(rows: &[T]) -> bool {
    paging::json_bytes(rows) > ANSWER_BYTES_MAX / 2
}

/// The fault for an id that belongs to no transfer or delivery.
fn no_such_work(id: &str) -> Fault {
    let id: String = id.chars().take(ID_BYTES_MAX).collect();
    Fault::not_found(format!(
        "there is no transfer or delivery {}",
        id.escape_debug()
    ))
    .with_next("'packhorse status' lists them")
}

/// The fault for a command that this version does not implement.
fn not_in_this_version(what: &str) -> Fault {
    Fault::usage(format!(
        "this version of packhorse cannot run {what} at a site"
    ))
    .with_next("run it at the hub, or deliver over the network")
}

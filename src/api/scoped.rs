//! The daemon as the holder of a token with a scope sees it: what is outside the scope does not
//! exist.
//!
//! `routes` puts [`Scoped`] between the handlers and the daemon's [`Backend`], so no handler can
//! forget the scope, and a new operation of the trait does not compile before it is decided here
//! what its scope is. [`view`] decides about rows, [`cursors`] replaces the numbers of events.
//!
//! A hidden object and one that does not exist get the same answer, from the same code, at the same
//! time: an answer that something does not exist is given at a multiple of 50 ms, whatever
//! was looked at before. Nothing is stored.

mod cursors;
mod reading;
mod requests;
mod view;

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use futures::future::BoxFuture;
use parking_lot::Mutex;

use super::started::StartedJobs;
use super::types::*;
use super::{Backend, RunToken};
use crate::reach::Reach;
use base::expiring_cache::ExpiringCache;
use base::fault::{Code, Fault};
use base::limits::{API_PAGE_BYTES, API_PAGE_ROWS, API_ROWS_DEFAULT};
use base::names::{ArtifactRef, RunName, SiteName};
use cursors::{Cursors, List, begin_again};
use model::actor::Actor;
use model::grant::Grant;
use model::paging::{Page, Room};
use model::policy::Verb;
use state::{no_artifact, no_delivery, no_site, no_work};
use view::{Sites, no_run};

/// What the requests of all tokens share.
#[derive(Default)]
pub(super) struct Shared {
    cursors: Mutex<Cursors>,
    /// The sites that a token sees.
    sites: Mutex<ExpiringCache<String, Sites>>,
    /// Ids of transfers and deliveries that a token sees.
    works: Mutex<ExpiringCache<(String, String), ()>>,
}

/// A daemon, seen through the scope of a token. One request has one.
pub(super) struct Scoped {
    inner: Arc<dyn Backend>,
    actor: Actor,
    grant: Arc<Grant>,
    shared: Arc<Shared>,
    started: Arc<StartedJobs>,
    /// How far a reader from the beginning has found nothing: it looks again after each change.
    read_to: Mutex<HashMap<&'static str, u64>>,
}

impl Scoped {
    pub(super) fn new(
        inner: Arc<dyn Backend>,
        grant: Arc<Grant>,
        shared: Arc<Shared>,
        started: Arc<StartedJobs>,
    ) -> Self {
        Self {
            inner,
            actor: Actor::Token(grant.clone()),
            grant,
            shared,
            started,
            read_to: Mutex::default(),
        }
    }
}

/// The largest page of the daemon that is read to find visible rows.
const PAGE: Room = Room {
    rows: API_PAGE_ROWS,
    bytes: API_PAGE_BYTES,
};

fn name_of(list: List) -> &'static str {
    match list {
        List::Transfers => "transfers",
        List::Events => "events",
    }
}

/// A fault about a cursor names numbers of events.
fn without_numbers(fault: Fault) -> Fault {
    if fault.code == Code::Conflict {
        begin_again()
    } else {
        fault
    }
}

/// A text of a request, as errors name it.
fn printable(text: &str) -> String {
    let text: String = text.chars().take(base::limits::ID_BYTES_MAX).collect();
    text.escape_debug().to_string()
}

/// How much of a publish was new to the daemon says what others have published.
fn without_store(mut job: Job) -> Job {
    if let Some(result) = job
        .result
        .as_mut()
        .and_then(serde_json::Value::as_object_mut)
        && result.contains_key("stored")
        && let Some(bytes) = result.get("bytes").cloned()
    {
        result.insert("stored".into(), bytes);
    }
    job
}

#[async_trait]
impl Backend for Scoped {
    fn role(&self) -> &'static str {
        self.inner.role()
    }

    fn name(&self) -> String {
        self.inner.name()
    }

    async fn ready(&self) -> Result<(), Fault> {
        self.inner.ready().await
    }

    async fn publish(&self, request: PublishRequest, reach: Reach) -> Result<Job, Fault> {
        self.evenly(self.publish_in_scope(request, reach)).await
    }

    async fn deliver(&self, request: DeliverRequest) -> Result<Delivered, Fault> {
        let work = async {
            let view = self.view().await?;
            let request = self.narrow(&view, request).await?;
            let mut done = self.inner.deliver(request).await?;
            done.notes
                .retain(|note| view.text(Some(note.clone())).is_some());
            Ok(done)
        };
        self.evenly(work).await
    }

    async fn plan(&self, request: DeliverRequest) -> Result<Vec<PlanRow>, Fault> {
        let work = async {
            let view = self.view().await?;
            self.inner.plan(self.narrow(&view, request).await?).await
        };
        self.evenly(work).await
    }

    async fn transfers(
        &self,
        query: &TransferQuery,
        behind: Option<&str>,
        room: Room,
    ) -> Result<(Page<Transfer>, u64), Fault> {
        let work = async {
            let view = self.view().await?;
            if behind.is_none()
                && let Some(ids) = &query.id
            {
                for id in ids.split(',') {
                    self.check_work(&view, id.trim()).await?;
                }
            }
            if let Some(since) = query.since {
                return self.changed_transfers(query, since, room).await;
            }
            let (mut behind, mut cursor) = (behind.map(str::to_owned), None);
            loop {
                let (page, raw) = self.inner.transfers(query, behind.as_deref(), room).await?;
                // A change during the first page must be returned by the next query.
                let cursor = *cursor.get_or_insert(raw);
                let rows = page.rows.into_iter();
                let rows: Vec<Transfer> = rows.filter_map(|row| view.transfer(row)).collect();
                if !rows.is_empty() || page.next.is_none() {
                    let page = Page {
                        rows,
                        next: page.next,
                        repeats: page.repeats,
                    };
                    return Ok((page, self.give(cursor)));
                }
                behind = page.next;
            }
        };
        self.evenly(work).await
    }

    async fn act(&self, id: &str, action: Action, room: Room) -> Result<Page<Transfer>, Fault> {
        let work = async {
            let view = self.view().await?;
            let mut ids = Vec::new();
            self.parts(&view, id, |part| {
                ids.push(part.id);
                true
            })
            .await?;
            if ids.is_empty() {
                return Err(no_work(&printable(id)));
            }
            // Of a delivery, only the visible parts.
            for id in ids {
                self.inner.act(&id, action, room).await?;
            }
            let query = TransferQuery {
                id: Some(id.to_owned()),
                ..TransferQuery::default()
            };
            Ok(self.transfers(&query, None, room).await?.0)
        };
        self.evenly(work).await
    }

    async fn deliveries(&self, behind: Option<&str>, room: Room) -> Result<Page<Delivery>, Fault> {
        let view = self.view().await?;
        let mut behind = behind.map(str::to_owned);
        loop {
            let page = self.inner.deliveries(behind.as_deref(), room).await?;
            let mut rows = Vec::new();
            for whole in page.rows {
                rows.extend(self.visible_delivery(&view, whole, room.bytes).await?);
            }
            if !rows.is_empty() || page.next.is_none() {
                return Ok(Page {
                    rows,
                    next: page.next,
                    repeats: page.repeats,
                });
            }
            behind = page.next;
        }
    }

    async fn delivery(&self, id: &str, max: usize) -> Result<Delivery, Fault> {
        let work = async {
            let view = self.view().await?;
            let whole = match self.inner.delivery(id, max).await {
                Err(fault) if fault.code == Code::NotFound => {
                    return Err(no_delivery(&printable(id)));
                }
                whole => whole?,
            };
            let shown = self.visible_delivery(&view, whole, max).await?;
            shown.ok_or_else(|| no_delivery(&printable(id)))
        };
        self.evenly(work).await
    }

    async fn runs(&self, behind: Option<&str>, room: Room) -> Result<Page<Run>, Fault> {
        let view = self.view().await?;
        let inner = &self.inner;
        let read = |behind: Option<String>| -> BoxFuture<'_, _> {
            Box::pin(async move { inner.runs(behind.as_deref(), room).await })
        };
        self.visible_page(behind, read, |run| view.run(run)).await
    }

    async fn run(&self, name: &str) -> Result<Run, Fault> {
        self.evenly(self.visible_run(name)).await
    }

    async fn train(&self, request: RunRequest) -> Result<Run, Fault> {
        let work = async {
            let view = self.view().await?;
            self.check_train(&view, &request).await?;
            self.inner.train(request).await
        };
        self.evenly(work).await
    }

    async fn act_on_run(&self, request: RunActionRequest) -> Result<Run, Fault> {
        let work = async {
            self.visible_run(&request.name).await?;
            let run = self.inner.act_on_run(request).await?;
            let name = run.name.to_string();
            self.view().await?.run(run).ok_or_else(|| no_run(&name))
        };
        self.evenly(work).await
    }

    async fn artifacts(&self, behind: Option<&str>, room: Room) -> Result<Page<Artifact>, Fault> {
        let view = self.view().await?;
        let inner = &self.inner;
        let read = |behind: Option<String>| -> BoxFuture<'_, _> {
            Box::pin(async move { inner.artifacts(behind.as_deref(), room).await })
        };
        self.visible_page(behind, read, |row| view.artifact(row))
            .await
    }

    async fn show(&self, artifact: &str) -> Result<ArtifactDetail, Fault> {
        let work = async { self.artifact(&self.view().await?, artifact).await };
        self.evenly(work).await
    }

    async fn transfers_of_artifact(
        &self,
        artifact: &str,
        behind: Option<&str>,
        room: Room,
    ) -> Result<Page<Transfer>, Fault> {
        let view = self.view().await?;
        let inner = &self.inner;
        let read = |behind: Option<String>| -> BoxFuture<'_, _> {
            Box::pin(async move {
                inner
                    .transfers_of_artifact(artifact, behind.as_deref(), room)
                    .await
            })
        };
        self.visible_page(behind, read, |row| view.transfer(row))
            .await
    }

    async fn open_by_artifact(&self) -> Result<Vec<(SiteName, ArtifactRef, u64)>, Fault> {
        let view = self.view().await?;
        let mut open = self.inner.open_by_artifact().await?;
        open.retain(|(site, artifact, _)| view.has_site(site) && view.has_artifact(artifact));
        Ok(open)
    }

    async fn sites(&self, behind: Option<&str>, room: Room) -> Result<Page<Site>, Fault> {
        let view = self.view().await?;
        let (inner, open) = (&self.inner, self.open(&view).await?);
        let read = |behind: Option<String>| -> BoxFuture<'_, _> {
            Box::pin(async move { inner.sites(behind.as_deref(), room).await })
        };
        self.visible_page(behind, read, |site| view.site(site, &open))
            .await
    }

    async fn site(&self, name: &str) -> Result<Site, Fault> {
        let work = async {
            let view = self.view().await?;
            let site: SiteName = name.parse()?;
            let row = match self.inner.site(name).await {
                Err(fault) if fault.code == Code::NotFound => return Err(no_site([&site])),
                row => row?,
            };
            let shown = view.site(row, &self.open(&view).await?);
            shown.ok_or_else(|| no_site([&site]))
        };
        self.evenly(work).await
    }

    async fn set_site(&self, _actor: &Actor, _request: SetSiteRequest) -> Result<Site, Fault> {
        self.refuse(Verb::ManageSites)
    }

    async fn act_on_site(
        &self,
        _actor: &Actor,
        _request: MemberActionRequest,
    ) -> Result<Site, Fault> {
        self.refuse(Verb::ManageSites)
    }

    async fn publishers(
        &self,
        _behind: Option<&str>,
        _room: Room,
    ) -> Result<Page<Publisher>, Fault> {
        self.refuse(Verb::Diagnose)
    }

    async fn publisher(&self, _name: &str) -> Result<Publisher, Fault> {
        self.refuse(Verb::Diagnose)
    }

    async fn act_on_publisher(
        &self,
        _actor: &Actor,
        _request: MemberActionRequest,
    ) -> Result<Publisher, Fault> {
        self.refuse(Verb::ManageSites)
    }

    async fn token(&self, _request: TokenRequest) -> Result<TokenReply, Fault> {
        self.refuse(Verb::CreateToken)
    }

    async fn run_token(&self, _run: &RunName) -> Option<RunToken> {
        None
    }

    async fn verify(&self, request: VerifyRequest) -> Result<Job, Fault> {
        let work = async {
            self.artifact(&self.view().await?, &request.artifact)
                .await?;
            self.inner.verify(request).await
        };
        self.evenly(work).await
    }

    async fn pin(&self, artifact: &str, pinned: bool) -> Result<Artifact, Fault> {
        let work = async {
            let view = self.view().await?;
            self.artifact(&view, artifact).await?;
            let row = self.inner.pin(artifact, pinned).await?;
            let name = row.artifact.clone();
            view.artifact(row).ok_or_else(|| no_artifact(&name))
        };
        self.evenly(work).await
    }

    async fn export_labels(
        &self,
        request: ExportLabelsRequest,
        reach: Reach,
    ) -> Result<Job, Fault> {
        let work = async {
            self.artifact(&self.view().await?, &request.artifact)
                .await?;
            self.inner.export_labels(request, reach).await
        };
        self.evenly(work).await
    }

    async fn export(
        &self,
        artifacts: Vec<String>,
        out: String,
        reach: Reach,
    ) -> Result<Job, Fault> {
        let work = async {
            let view = self.view().await?;
            for artifact in &artifacts {
                self.artifact(&view, artifact).await?;
            }
            self.inner.export(artifacts, out, reach).await
        };
        self.evenly(work).await
    }

    async fn import(&self, _file: String, _reach: Reach) -> Result<Job, Fault> {
        self.refuse(Verb::Import)
    }

    async fn adopt(&self) -> Result<Job, Fault> {
        self.refuse(Verb::Import)
    }

    async fn gc(&self) -> Result<Job, Fault> {
        self.refuse(Verb::Collect)
    }

    async fn doctor(&self) -> Result<Vec<String>, Fault> {
        self.refuse(Verb::Diagnose)
    }

    async fn job(&self, id: &str) -> Result<Job, Fault> {
        let work = async {
            self.check_job(id, Verb::Read)?;
            Ok(without_store(self.inner.job(id).await?))
        };
        self.evenly(work).await
    }

    async fn jobs(&self, behind: Option<&str>, room: Room) -> Result<Page<Job>, Fault> {
        let inner = &self.inner;
        let read = |behind: Option<String>| -> BoxFuture<'_, _> {
            Box::pin(async move { inner.jobs(behind.as_deref(), room).await })
        };
        let own = |job: Job| self.check_job(&job.id, Verb::Read).ok().map(|()| job);
        self.visible_page(behind, read, |job| own(job).map(without_store))
            .await
    }

    async fn workers(&self, _behind: Option<&str>, _room: Room) -> Result<Page<Worker>, Fault> {
        self.refuse(Verb::Diagnose)
    }

    async fn cancel_job(&self, id: &str) -> Result<Job, Fault> {
        let work = async {
            self.check_job(id, Verb::CancelJob)?;
            self.inner.cancel_job(id).await
        };
        self.evenly(work).await
    }

    async fn events(&self, since: u64, limit: u32) -> Result<Vec<Event>, Fault> {
        let view = self.view().await?;
        let open = self.open(&view).await?;
        let mut raw = self.raw_cursor(List::Events, since)?;
        loop {
            let read = self.inner.events(raw, API_ROWS_DEFAULT).await;
            let events = read.map_err(without_numbers)?;
            let Some(last) = events.last().map(|event| event.seq) else {
                self.nothing_up_to(List::Events, since, raw);
                return Ok(Vec::new());
            };
            let visible = events
                .into_iter()
                .filter_map(|event| view.event(event, &open));
            let mut shown: Vec<Event> = visible.take(limit as usize).collect();
            if !shown.is_empty() {
                for event in &mut shown {
                    event.seq = self.give(event.seq);
                }
                return Ok(shown);
            }
            raw = last;
        }
    }

    fn changed(&self) -> BoxFuture<'static, ()> {
        self.inner.changed()
    }

    async fn metrics(&self) -> Result<String, Fault> {
        self.refuse(Verb::Diagnose)
    }
}

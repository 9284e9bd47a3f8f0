//! A backend in memory, for the tests of the API and of the command line.

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::types::*;
use super::{AccessTokens, ApiToken, Backend};
use crate::reach::Reach;
use base::fault::{Fault, Reason};
use base::workers::Workers;
use model::paging::{Page, Pager, Room};

/// The token of every fake daemon.
pub(crate) const TOKEN: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// What a test sets and reads.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) ready: Option<Fault>,
    pub(crate) transfers: Vec<Transfer>,
    pub(crate) events: Vec<Event>,
    pub(crate) jobs: Vec<Job>,
    pub(crate) runs: Vec<Run>,
    pub(crate) seq: u64,
    pub(crate) published: Vec<PublishRequest>,
    pub(crate) delivered: Vec<DeliverRequest>,
    pub(crate) doctor: Vec<String>,
}

/// The backend.
pub(crate) struct Fake {
    pub(crate) world: Mutex<World>,
    pub(crate) artifacts: Mutex<Vec<Artifact>>,
    pub(crate) workers: Workers,
    /// The pages of a query with ids, which may repeat rows.
    pub(crate) repeating: Mutex<Option<Vec<Vec<Transfer>>>>,
    /// Whether an id that does not exist is refused, as the daemons do.
    pub(crate) strict: std::sync::atomic::AtomicBool,
    /// Sites besides `chengdu`, with their regions.
    pub(crate) more_sites: Mutex<Vec<(String, String)>>,
    /// The reach of each publish, export and import.
    pub(crate) reaches: Mutex<Vec<Reach>>,
    /// The token of the trainer of the run `r`.
    pub(crate) trainer: super::RunToken,
    changed: Arc<Notify>,
    /// How often somebody asked for transfers or events.
    asks: tokio::sync::watch::Sender<u64>,
}

/// The access tokens of a new catalogue. It is opened by a runtime of its own: the clock of a test
/// may be paused, and would run ahead meanwhile.
pub(crate) fn access() -> (Arc<AccessTokens>, tempfile::TempDir) {
    static OPENS: LazyLock<tokio::runtime::Runtime> =
        LazyLock::new(|| tokio::runtime::Runtime::new().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let open = async move {
        let catalogue = state::Catalogue::open(&path).await.unwrap();
        Arc::new(AccessTokens::open(catalogue, false).await.unwrap())
    };
    let opens = std::thread::spawn(|| OPENS.block_on(open));
    (opens.join().unwrap(), dir)
}

/// A transfer with plain values.
pub(crate) fn transfer(id: &str, site: &str, state: State) -> Transfer {
    Transfer {
        id: id.into(),
        delivery: "d1".into(),
        artifact: "dataset/line3:v1".parse().unwrap(),
        digest: "ab".repeat(32),
        site: site.parse().unwrap(),
        state,
        reason: None,
        message: None,
        next: None,
        waits_for: None,
        bytes: Bytes {
            total: 1000,
            ..Bytes::default()
        },
        rate: 0,
        eta_seconds: None,
        attempts: 1,
        location: None,
        created_at: "2026-11-23T10:00:00.000Z".into(),
        updated_at: "2026-11-23T10:00:05.000Z".into(),
        finished_at: None,
        receipt: None,
        removed_at: None,
        note: None,
        cursor: 0,
    }
}

/// A run with plain values.
pub(crate) fn run(name: &str, state: RunState) -> Run {
    let model = RunModel {
        artifact: "model/m:1".into(),
        digest: "cd".repeat(32),
    };
    let input = RunInput {
        artifact: "dataset/line3:v1".into(),
        digest: "ab".repeat(32),
        bytes: 1000,
    };
    Run {
        name: name.parse().unwrap(),
        from: "chengdu".parse().unwrap(),
        on: "wuhan".parse().unwrap(),
        state,
        message: None,
        next: None,
        inputs: vec![input],
        expect: "model/m".into(),
        model: (state == RunState::Done).then_some(model),
        delivery: "d1".into(),
        home: None,
        trainer: None,
        released: false,
        created_at: "2026-11-23T10:00:00.000Z".into(),
        deadline_at: "2026-11-30T10:00:00.000Z".into(),
        finished_at: None,
    }
}

/// A transfer that waits for its site.
pub(crate) fn offline(id: &str, site: &str) -> Transfer {
    Transfer {
        reason: Some(Reason::SiteOffline),
        message: Some(format!("site {site} is not connected")),
        next: Some("nothing: it goes on when the site comes".into()),
        ..transfer(id, site, State::Queued)
    }
}

/// A job that has ended.
pub(crate) fn job(id: &str, result: Result<serde_json::Value, Fault>) -> Job {
    let state = if result.is_ok() { "done" } else { "failed" };
    let (result, error) =
        result.map_or_else(|fault| (None, Some(fault)), |value| (Some(value), None));
    Job {
        id: id.into(),
        state: state.into(),
        bytes: 0,
        total: None,
        doing: String::new(),
        notes: Vec::new(),
        result,
        error,
    }
}

impl Default for Fake {
    fn default() -> Self {
        Self {
            world: Mutex::default(),
            artifacts: Mutex::new(vec![artifact("dataset/line3:v1")]),
            workers: Workers::default(),
            repeating: Mutex::default(),
            strict: Default::default(),
            more_sites: Mutex::default(),
            reaches: Mutex::default(),
            trainer: super::RunToken::new("r".parse().unwrap()).unwrap(),
            changed: Arc::default(),
            asks: tokio::sync::watch::Sender::default(),
        }
    }
}

/// An artifact with plain values.
pub(crate) fn artifact(name: &str) -> Artifact {
    Artifact {
        artifact: name.parse().unwrap(),
        digest: "ab".repeat(32),
        bytes: 3 << 30,
        files: 40_000,
        origin: None,
        created_at: "2026-11-23T10:00:00.000Z".into(),
        info: serde_json::json!({"is": "files"}),
        location: None,
        pinned: false,
        changed: None,
        published_here: false,
        omitted: Vec::new(),
    }
}

/// The page of these rows after the one with this key.
fn page<T: serde::Serialize>(
    rows: Vec<T>,
    behind: Option<&str>,
    room: Room,
    key: impl Fn(&T) -> String,
) -> Page<T> {
    let from = behind
        .and_then(|behind| rows.iter().position(|row| key(row) == behind))
        .map_or(0, |at| at + 1);
    let mut pager = Pager::new(room);
    for row in rows.into_iter().skip(from) {
        let key = key(&row);
        if !pager.put(row, key) {
            break;
        }
    }
    pager.page()
}

impl Fake {
    fn artifact(&self, artifact: &str) -> Result<Artifact, Fault> {
        let found = self
            .artifacts
            .lock()
            .iter()
            .find(|a| a.artifact.to_string() == artifact)
            .cloned();
        found.ok_or_else(|| Fault::not_found(format!("there is no artifact {artifact:?}")))
    }

    /// Sets or replaces a transfer, as a change with an event.
    pub(crate) fn put(&self, mut transfer: Transfer) {
        let mut world = self.world.lock();
        world.seq += 1;
        transfer.cursor = world.seq;
        let body = serde_json::to_value(&transfer).unwrap();
        let event = Event {
            seq: world.seq,
            at: "2026-11-23T10:00:00.000Z".into(),
            what: "transfer".into(),
            body,
        };
        world.events.push(event);
        world.transfers.retain(|t| t.id != transfer.id);
        world.transfers.push(transfer);
        drop(world);
        self.changed.notify_waiters();
    }

    /// Waits until somebody has asked for transfers or events so many times from now on: a client
    /// that waits has asked once, and one that asked again was not satisfied.
    pub(crate) fn asked(&self, times: u64) -> impl Future<Output = ()> + use<> {
        let mut asks = self.asks.subscribe();
        let enough = *asks.borrow_and_update() + times;
        async move {
            asks.wait_for(|asks| *asks >= enough).await.unwrap();
        }
    }

    /// Sets or replaces a job.
    pub(crate) fn put_job(&self, job: Job) {
        let mut world = self.world.lock();
        world.jobs.retain(|j| j.id != job.id);
        world.jobs.push(job);
        drop(world);
        self.changed.notify_waiters();
    }

    /// Serves it on a free port; returns the base URL and a guard that stops it.
    pub(crate) async fn serve(
        self: &Arc<Self>,
    ) -> (
        String,
        tokio::sync::oneshot::Sender<()>,
        tokio::task::JoinHandle<Result<(), Fault>>,
    ) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.serve_on(listener)
    }

    /// Serves it on this listener.
    pub(crate) fn serve_on(
        self: &Arc<Self>,
        listener: tokio::net::TcpListener,
    ) -> (
        String,
        tokio::sync::oneshot::Sender<()>,
        tokio::task::JoinHandle<Result<(), Fault>>,
    ) {
        let base = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let backend = Arc::clone(self);
        let shutdown = async move {
            let _ = stopped.await;
        };
        let task = tokio::spawn(async move {
            let token = ApiToken::parse(TOKEN).unwrap();
            let (access, _dir) = access();
            super::serve(&listener, None, backend, token, access, shutdown).await
        });
        (base, stop, task)
    }
}

#[async_trait]
impl Backend for Fake {
    fn role(&self) -> &'static str {
        "hub"
    }
    fn name(&self) -> String {
        "central".into()
    }
    async fn ready(&self) -> Result<(), Fault> {
        self.world.lock().ready.clone().map_or(Ok(()), Err)
    }
    async fn publish(&self, request: PublishRequest, reach: Reach) -> Result<Job, Fault> {
        self.reaches.lock().push(reach);
        request.as_ref.parse::<base::names::ArtifactRef>()?;
        self.world.lock().published.push(request);
        Ok(Job {
            state: "running".into(),
            ..self.job("publish").await?
        })
    }
    async fn deliver(&self, request: DeliverRequest) -> Result<Delivered, Fault> {
        let mut world = self.world.lock();
        let transfers = world.transfers.iter().map(|t| t.id.clone()).collect();
        let artifact = request.artifacts.join(",");
        world.delivered.push(request);
        Ok(Delivered {
            artifact,
            digest: "ab".repeat(32),
            delivery: "d1".into(),
            transfers,
            left_out: Vec::new(),
            notes: Vec::new(),
        })
    }
    async fn plan(&self, request: DeliverRequest) -> Result<Vec<PlanRow>, Fault> {
        let row = |artifact: &String| PlanRow {
            artifact: artifact.clone(),
            site: "chengdu".into(),
            asked: true,
            total: 3 << 30,
            missing: 20 << 20,
            needs: 20 << 20,
            free: Some(1 << 40),
            inodes: Some(30),
            free_inodes: None,
            seconds: Some(75),
            left_out: Vec::new(),
        };
        Ok(request.artifacts.iter().map(row).collect())
    }
    async fn transfers(
        &self,
        query: &TransferQuery,
        behind: Option<&str>,
        room: Room,
    ) -> Result<(Page<Transfer>, u64), Fault> {
        self.asks.send_modify(|asks| *asks += 1);
        let known = |id: &str| {
            let world = self.world.lock();
            world
                .transfers
                .iter()
                .any(|t| t.id == id || t.delivery == id)
        };
        if let (None, Some(ids)) = (&*self.repeating.lock(), &query.id)
            && let Some(unknown) = ids.split(',').find(|id| !known(id))
            && self.strict.load(std::sync::atomic::Ordering::Relaxed)
        {
            return Err(state::no_work(unknown));
        }
        if let (Some(pages), Some(_)) = (&*self.repeating.lock(), &query.id) {
            let at = behind.map_or(0, |at| at.parse().unwrap());
            let page = Page {
                rows: pages[at].clone(),
                next: (at + 1 < pages.len()).then(|| (at + 1).to_string()),
                repeats: true,
            };
            return Ok((page, 0));
        }
        let world = self.world.lock();
        let ids: Option<Vec<&str>> = query.id.as_ref().map(|ids| ids.split(',').collect());
        let wanted = |t: &&Transfer| {
            let named = ids.as_ref().is_none_or(|ids| {
                ids.contains(&t.id.as_str()) || ids.contains(&t.delivery.as_str())
            });
            named && query.since.is_none_or(|since| t.cursor > since)
        };
        let mut found: Vec<Transfer> = world.transfers.iter().filter(wanted).cloned().collect();
        found.sort_by_key(|t| t.cursor);
        if query.since.is_none() {
            found.reverse();
        }
        let page = page(found, behind, room, |t| t.id.clone());
        let cut = page.next.is_some() && query.since.is_some();
        let cursor = if cut {
            page.rows.last().map_or(0, |t| t.cursor)
        } else {
            world.seq
        };
        Ok((page, cursor))
    }
    async fn act(&self, id: &str, action: Action, _room: Room) -> Result<Page<Transfer>, Fault> {
        let found = self
            .world
            .lock()
            .transfers
            .iter()
            .find(|t| t.id == id)
            .cloned();
        let mut transfer =
            found.ok_or_else(|| Fault::not_found(format!("there is no transfer {id:?}")))?;
        transfer.state = match action {
            Action::Pause => State::Paused,
            Action::Resume | Action::Retry => State::Queued,
            Action::Cancel => State::Cancelled,
        };
        self.put(transfer.clone());
        Ok(Page::whole(vec![transfer]))
    }
    async fn deliveries(&self, _behind: Option<&str>, room: Room) -> Result<Page<Delivery>, Fault> {
        Ok(Page::whole(vec![self.delivery("d1", room.bytes).await?]))
    }
    async fn delivery(&self, id: &str, max: usize) -> Result<Delivery, Fault> {
        let parts: Vec<Transfer> = self
            .world
            .lock()
            .transfers
            .iter()
            .filter(|t| t.delivery == id)
            .cloned()
            .collect();
        if parts.is_empty() {
            return Err(Fault::not_found(format!("there is no delivery {id}")));
        }
        let row = state::DeliveryRow {
            id: id.parse()?,
            run: None,
            created_ms: 0,
        };
        let mut whole = crate::delivery::Whole::new(max);
        parts.into_iter().for_each(|part| whole.add(part));
        Ok(whole.end(&row))
    }
    async fn runs(&self, behind: Option<&str>, room: Room) -> Result<Page<Run>, Fault> {
        Ok(page(self.world.lock().runs.clone(), behind, room, |run| {
            run.name.to_string()
        }))
    }
    async fn run(&self, name: &str) -> Result<Run, Fault> {
        let found = self
            .world
            .lock()
            .runs
            .iter()
            .find(|r| r.name.as_str() == name)
            .cloned();
        found.ok_or_else(|| Fault::not_found(format!("there is no run {name:?}")))
    }
    async fn train(&self, request: RunRequest) -> Result<Run, Fault> {
        let run = run(&request.name, RunState::Delivering);
        self.world.lock().runs.push(run.clone());
        Ok(run)
    }
    async fn act_on_run(&self, request: RunActionRequest) -> Result<Run, Fault> {
        let mut run = self.run(&request.name).await?;
        run.state = if request.action == RunVerb::Cancel {
            RunState::Cancelled
        } else {
            RunState::Publishing
        };
        self.world.lock().runs.retain(|r| r.name != run.name);
        self.world.lock().runs.push(run.clone());
        self.changed.notify_waiters();
        Ok(run)
    }
    async fn artifacts(&self, behind: Option<&str>, room: Room) -> Result<Page<Artifact>, Fault> {
        Ok(page(
            self.artifacts.lock().clone(),
            behind,
            room,
            |artifact| artifact.artifact.to_string(),
        ))
    }
    async fn show(&self, artifact: &str) -> Result<ArtifactDetail, Fault> {
        Ok(ArtifactDetail {
            artifact: self.artifact(artifact)?,
            transfers: Vec::new(),
            lineage: None,
        })
    }
    async fn transfers_of_artifact(
        &self,
        _artifact: &str,
        behind: Option<&str>,
        room: Room,
    ) -> Result<Page<Transfer>, Fault> {
        Ok(page(
            self.world.lock().transfers.clone(),
            behind,
            room,
            |t| t.id.clone(),
        ))
    }
    async fn open_by_artifact(
        &self,
    ) -> Result<Vec<(base::names::SiteName, base::names::ArtifactRef, u64)>, Fault> {
        let transfers = &self.world.lock().transfers;
        let open = transfers.iter().filter(|t| !t.state.is_final());
        Ok(open
            .map(|t| (t.site.clone(), t.artifact.clone(), 1))
            .collect())
    }
    async fn run_token(&self, run: &base::names::RunName) -> Option<super::RunToken> {
        (run == self.trainer.run()).then(|| self.trainer.clone())
    }
    async fn sites(&self, _behind: Option<&str>, _room: Room) -> Result<Page<Site>, Fault> {
        let site = |name: &str, region: &str| Site {
            name: name.parse().unwrap(),
            labels: [("region".to_owned(), region.to_owned())].into(),
            online: true,
            line: Some("quic".into()),
            line_reason: None,
            rtt_ms: Some(42.25),
            joined_at: "2026-11-23T10:00:00.000Z".into(),
            last_seen: None,
            version: Some("0.1.0".into()),
            open_transfers: 2,
            certificate: None,
            revoked: None,
            changed: None,
        };
        let mut sites = vec![site("chengdu", "west")];
        sites.extend(
            self.more_sites
                .lock()
                .iter()
                .map(|(name, region)| site(name, region)),
        );
        Ok(Page::whole(sites))
    }
    async fn token(&self, request: TokenRequest) -> Result<TokenReply, Fault> {
        let limits = request.publisher.is_some().then(|| TokenLimits {
            artifacts: (!request.artifacts.is_empty()).then_some(request.artifacts),
            deliver_to: request.deliver_to,
        });
        Ok(TokenReply {
            token: format!(
                "id.secret-for-{}-{}s",
                request.site.or(request.publisher).unwrap_or_default(),
                request.ttl_seconds
            ),
            limits,
            notes: Vec::new(),
        })
    }
    async fn verify(&self, _request: VerifyRequest) -> Result<Job, Fault> {
        self.job("verify").await
    }
    async fn pin(&self, artifact: &str, pinned: bool) -> Result<Artifact, Fault> {
        Ok(Artifact {
            pinned,
            ..self.artifact(artifact)?
        })
    }
    async fn export_labels(
        &self,
        _request: ExportLabelsRequest,
        reach: Reach,
    ) -> Result<Job, Fault> {
        self.reaches.lock().push(reach);
        self.job("export-labels").await
    }
    async fn export(
        &self,
        _artifacts: Vec<String>,
        _out: String,
        reach: Reach,
    ) -> Result<Job, Fault> {
        self.reaches.lock().push(reach);
        self.job("export").await
    }
    async fn import(&self, _file: String, reach: Reach) -> Result<Job, Fault> {
        self.reaches.lock().push(reach);
        self.job("import").await
    }
    async fn adopt(&self) -> Result<Job, Fault> {
        self.job("adopt").await
    }
    async fn gc(&self) -> Result<Job, Fault> {
        self.job("gc").await
    }
    async fn doctor(&self) -> Result<Vec<String>, Fault> {
        Ok(self.world.lock().doctor.clone())
    }
    async fn job(&self, id: &str) -> Result<Job, Fault> {
        let found = self.world.lock().jobs.iter().find(|j| j.id == id).cloned();
        found.ok_or_else(|| Fault::not_found(format!("there is no job {id:?}")))
    }
    async fn jobs(&self, behind: Option<&str>, room: Room) -> Result<Page<Job>, Fault> {
        Ok(page(self.world.lock().jobs.clone(), behind, room, |job| {
            job.id.clone()
        }))
    }
    async fn workers(&self, behind: Option<&str>, room: Room) -> Result<Page<Worker>, Fault> {
        Ok(super::worker_page(&self.workers, behind, room))
    }
    async fn cancel_job(&self, id: &str) -> Result<Job, Fault> {
        let mut job = self.job(id).await?;
        job.state = "cancelled".into();
        Ok(job)
    }
    async fn events(&self, since: u64, limit: u32) -> Result<Vec<Event>, Fault> {
        self.asks.send_modify(|asks| *asks += 1);
        let world = self.world.lock();
        Ok(world
            .events
            .iter()
            .filter(|e| e.seq > since)
            .take(limit as usize)
            .cloned()
            .collect())
    }
    fn changed(&self) -> futures::future::BoxFuture<'static, ()> {
        let changed = self.changed.clone().notified_owned();
        Box::pin(async move {
            let _ = tokio::time::timeout(Duration::from_secs(1), changed).await;
        })
    }
    async fn metrics(&self) -> Result<String, Fault> {
        Ok("packhorse_up 1\n".into())
    }
}

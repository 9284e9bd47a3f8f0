//! Transfers at a site: each a task that goes from `queued` to `done` and survives everything between.
//!
//! The hub says what it wants ([`Runner::apply`], level-triggered: the whole list each time); the catalogue holds where
//! each transfer is, and is written before anything is told to anybody. A try that fails with a fault that may pass is
//! made again after a growing pause; what was staged stays.

mod assemble;
mod pace;
mod verify;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use parking_lot::Mutex;
use tokio::sync::{OwnedMutexGuard, Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::api::types::{Bytes, State};
use crate::catalogue::{Body, Catalogue, TransferRow, Want};
use crate::clock;
use crate::durable;
use crate::fault::{Code, Fault, Reason};
use crate::fetch::{Fetcher, blocking, take_manifest};
use crate::identity::SiteIdentity;
use crate::limits::TOLD_KEPT_MAX;
use crate::line::Link;
use crate::manifest::{Digest, Root};
use crate::names::{ArtifactRef, Kind};
use crate::origin::CHANGED_NEXT;
use crate::places::PlaceInfo;
use crate::sink::{Incoming, Landed, Sink};
use crate::wire::{Desired, Told};

pub use assemble::{Assembly, BUDGET_UNIT, Counters, Estimate, Shared, free_room};
use pace::{Pace, Pause};
pub use verify::verify;

/// Artifacts below this size do not wait for, nor behind, larger ones.
const SMALL_BYTES: u64 = 256 << 20;
/// Large transfers at once.
const LARGE_TURNS: usize = 3;
/// Small transfers at once.
const SMALL_TURNS: usize = 4;
/// Transfers that wait for a look at once.
pub const LOOKS_ASKED_MAX: usize = 16;
/// How often a transfer's progress is written down.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// The sinks of a site.
#[derive(Clone)]
pub struct Sinks {
    /// Datasets, operators, models.
    pub files: Arc<dyn Sink>,
    /// Labels.
    pub labels: Arc<dyn Sink>,
    /// Images.
    pub images: Arc<dyn Sink>,
}

impl Sinks {
    /// The sink of a kind.
    pub fn of(&self, kind: Kind) -> &Arc<dyn Sink> {
        match kind {
            Kind::Dataset | Kind::Operator | Kind::Model => &self.files,
            Kind::Labels => &self.labels,
            Kind::Image => &self.images,
        }
    }
}

/// Asks for a look at a content that was published here in place.
pub struct AskLook {
    /// Which.
    pub digest: Digest,
    /// Takes what changed; `None`: it is sound, or nothing can be said.
    pub answer: oneshot::Sender<Option<String>>,
}

/// Runs a site's transfers. Cheap to clone.
#[derive(Clone)]
pub struct Runner {
    inner: Arc<Inner>,
}

struct Inner {
    catalogue: Catalogue,
    shared: Shared,
    sinks: Sinks,
    identity: watch::Receiver<Arc<SiteIdentity>>,
    link: watch::Receiver<Option<Link>>,
    looks: mpsc::Sender<AskLook>,
    small: Semaphore,
    large: Semaphore,
    running: Mutex<HashMap<String, Running>>,
    /// Who lands, looks at, or takes away an artifact does so alone.
    alone: Mutex<HashMap<ArtifactRef, Arc<tokio::sync::Mutex<()>>>>,
    /// Roots of manifests that the hub told of by itself, with the bytes that crossed the line for each.
    told: Mutex<Vec<(Digest, Root, u64)>>,
    /// Bytes a second, as a transfer last had it.
    last_rate: AtomicU64,
    stop: CancellationToken,
}

struct Running {
    stop: CancellationToken,
    generation: i64,
    task: JoinHandle<()>,
}

/// Waits for what may be dropped at any moment, unless the transfer is stopped first.
async fn unless<T>(stop: &CancellationToken, work: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
    tokio::select! {
        result = work => result,
        () = stop.cancelled() => Err(stopped()),
    }
}

/// What ends a try when somebody paused or cancelled it, or the daemon stops: never shown.
fn stopped() -> Fault {
    Fault::internal("the transfer was stopped")
}

impl Runner {
    /// A runner with nothing to do yet. What was published here it has looked at by `looks`; `stop` ends all of it.
    pub fn new(
        catalogue: Catalogue,
        shared: Shared,
        sinks: Sinks,
        identity: watch::Receiver<Arc<SiteIdentity>>,
        link: watch::Receiver<Option<Link>>,
        looks: mpsc::Sender<AskLook>,
        stop: CancellationToken,
    ) -> Self {
        let (small, large) = (Semaphore::new(SMALL_TURNS), Semaphore::new(LARGE_TURNS));
        let (running, alone, told, last_rate) = Default::default();
        let inner = Inner { catalogue, shared, sinks, identity, link, looks, small, large, running, alone, told, last_rate, stop };
        Self { inner: Arc::new(inner) }
    }

    /// Bytes a second, as the line last went; 0 when it is not known.
    pub fn last_rate(&self) -> u64 {
        self.inner.last_rate.load(Ordering::Relaxed)
    }

    /// Takes in manifests that the hub tells of by itself. They are hints: what is wrong with one shows when it is asked for.
    pub async fn hear(&self, manifests: Vec<Told>) {
        for Told { digest, frames } in manifests {
            let (store, wire) = (self.inner.shared.store.clone(), frames.len() as u64);
            let taken = blocking(move || {
                let frames = BASE64.decode(frames).map_err(|e| Fault::integrity(format!("base64: {e}")))?;
                take_manifest(frames.into(), digest, &store)
            });
            match taken.await {
                Ok(root) => {
                    let mut told = self.inner.told.lock();
                    told.retain(|(of, ..)| *of != digest);
                    // Those before it begin sooner.
                    if told.len() < TOLD_KEPT_MAX {
                        told.push((digest, root, wire));
                    }
                }
                Err(fault) => tracing::warn!(%digest, error = %fault, "a manifest that the hub told of cannot be used"),
            }
        }
    }

    /// The root manifest that the hub told of.
    fn told(&self, digest: Digest, counters: &Counters) -> Option<Root> {
        let mut told = self.inner.told.lock();
        let at = told.iter().position(|(of, ..)| *of == digest)?;
        let (_, root, wire) = told.remove(at);
        counters.wire.fetch_add(wire, Ordering::Relaxed);
        Some(root)
    }

    /// Does what the hub wants.
    pub async fn apply(&self, desired: &[Desired], complete: bool) -> Result<(), Fault> {
        let inner = &self.inner;
        let site = inner.identity.borrow().name().clone();
        for wanted in desired {
            let row = TransferRow {
                id: wanted.id.clone(),
                delivery: wanted.delivery.clone(),
                artifact: wanted.artifact.clone(),
                digest: wanted.digest,
                site: site.clone(),
                want: wanted.want,
                generation: wanted.generation,
                state: State::Queued,
                body: Body { bytes: Bytes { total: wanted.total, ..Bytes::default() }, ..Body::default() },
                created_ms: wanted.created_ms,
                updated_ms: 0,
                finished_ms: None,
                cursor: 0,
                after: wanted.after.clone(),
                removed_ms: None,
            };
            if let Some(lineage) = &wanted.lineage {
                inner.catalogue.set_lineage(&wanted.artifact, lineage).await?;
            }
            let row = inner.catalogue.adopt(&row).await?;
            if let Err(fault) = self.follow(&row).await {
                // One transfer's trouble must not keep the others from going on.
                tracing::warn!(transfer = %row.id, error = %fault, "what the hub wants of a transfer could not be done; tried again");
            }
        }
        if complete {
            for row in inner.catalogue.open_transfers(&site).await? {
                if !desired.iter().any(|d| d.id == row.id)
                    && let Err(fault) = self.cancel(&row).await
                {
                    tracing::warn!(transfer = %row.id, error = %fault, "a transfer could not be cleaned up; tried again");
                }
            }
        }
        Ok(())
    }

    /// Goes on with what was open when the daemon stopped, without waiting for the hub.
    pub async fn start(&self) -> Result<(), Fault> {
        let site = self.inner.identity.borrow().name().clone();
        for row in self.inner.catalogue.open_transfers(&site).await? {
            self.follow(&row).await?;
        }
        Ok(())
    }

    async fn follow(&self, row: &TransferRow) -> Result<(), Fault> {
        match row.want {
            Want::Cancel => self.cancel(row).await,
            _ if row.state.is_final() => Ok(()),
            Want::Pause => {
                self.halt(&row.id).await;
                if row.state == State::Paused {
                    return Ok(());
                }
                let row = self.inner.catalogue.transfer(&row.id).await?;
                if row.state.is_final() {
                    return Ok(());
                }
                let mut body = row.body;
                body.set_fault(Some(
                    &Fault::internal("paused").with_reason(Reason::PausedByUser).with_next(format!("packhorse resume {}", row.id)),
                ));
                self.inner.catalogue.update_transfer(&row.id, row.generation, State::Paused, &body).await
            }
            Want::Run => {
                self.spawn(row);
                Ok(())
            }
        }
    }

    /// Stops a transfer's task and waits until it is gone.
    async fn halt(&self, id: &str) {
        let running = self.inner.running.lock().remove(id);
        if let Some(running) = running {
            running.stop.cancel();
            let _ = running.task.await;
        }
    }

    async fn cancel(&self, row: &TransferRow) -> Result<(), Fault> {
        self.halt(&row.id).await;
        let row = self.inner.catalogue.transfer(&row.id).await?;
        if row.state == State::Done || row.state == State::Cancelled {
            return Ok(());
        }
        let staged = self.inner.sinks.of(row.artifact.kind).staging_root().join(&row.id);
        let places = self.inner.shared.places.clone();
        let id = row.id.clone();
        blocking(move || {
            if let Some(place) = places.staged_by(&id) {
                places.remove(place)?;
            }
            durable::remove_all(&staged)
        })
        .await?;
        let mut body = row.body;
        body.set_fault(Some(
            &Fault::internal("cancelled").with_reason(Reason::CancelledByUser).with_next(format!("packhorse retry {}", row.id)),
        ));
        self.inner.catalogue.update_transfer(&row.id, row.generation, State::Cancelled, &body).await
    }

    fn spawn(&self, row: &TransferRow) {
        let mut running = self.inner.running.lock();
        if let Some(there) = running.get(&row.id) {
            if !there.task.is_finished() && there.generation == row.generation {
                return;
            }
            there.stop.cancel();
        }
        let stop = self.inner.stop.child_token();
        let (this, row, token) = (self.clone(), row.clone(), stop.clone());
        let (id, generation) = (row.id.clone(), row.generation);
        let task = tokio::spawn(async move { this.go(row, token).await });
        running.insert(id, Running { stop, generation, task });
    }

    /// Waits until nothing runs any more; called after `stop`.
    pub async fn drained(&self) {
        let all: Vec<Running> = self.inner.running.lock().drain().map(|(_, running)| running).collect();
        for running in all {
            let _ = running.task.await;
        }
    }

    /// One transfer, from where it stands to its end.
    async fn go(&self, mut row: TransferRow, stop: CancellationToken) {
        let mut pause = Pause::default();
        let first = row.body.bytes;
        let counters = Arc::new(Counters::default());
        counters.received.store(first.received, Ordering::Relaxed);
        counters.reused.store(first.reused, Ordering::Relaxed);
        counters.wire.store(first.wire, Ordering::Relaxed);
        let mut link = self.inner.link.clone();
        loop {
            row.body.attempts += 1;
            let before = counters.committed.load(Ordering::Relaxed);
            let Err(fault) = self.attempt(&mut row, &counters, &stop).await else { return };
            if stop.is_cancelled() {
                self.note_bytes(&mut row, &counters);
                let _ = self.inner.catalogue.update_transfer(&row.id, row.generation, row.state, &row.body).await;
                return;
            }
            if counters.committed.load(Ordering::Relaxed) > before {
                pause = Pause::default();
            }
            self.note_bytes(&mut row, &counters);
            row.body.rate = 0;
            let fault = self.unless_changed_here(&mut row, fault, &stop).await;
            row.body.set_fault(Some(&fault));
            let Some(wait) = pause.after(&fault) else {
                tracing::warn!(transfer = %row.id, artifact = %row.artifact, error = %fault, "a transfer failed");
                row.state = State::Failed;
                self.save(&row).await;
                return;
            };
            tracing::info!(transfer = %row.id, artifact = %row.artifact, error = %fault, wait_ms = wait.as_millis() as u64, "a transfer waits");
            self.save(&row).await;
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // A new line is what most waits are for.
                _ = link.changed(), if fault.reason == Reason::HubUnreachable => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// The hub never asks a site for what it lacks itself. So what was published here, and no other site has, is looked at: when it
    /// changed, it would wait for ever.
    async fn unless_changed_here(&self, row: &mut TransferRow, fault: Fault, stop: &CancellationToken) -> Fault {
        let waits = fault.reason == Reason::WaitingForSource && fault.code == Code::NotFound;
        if !waits || !self.inner.catalogue.all_by_digest(row.digest).await.is_ok_and(|all| all.iter().any(|known| known.published)) {
            return fault;
        }
        // The look may take a while.
        row.body.set_fault(Some(&fault));
        self.save(row).await;
        let (answer, answered) = oneshot::channel();
        let look = async {
            self.inner.looks.send(AskLook { digest: row.digest, answer }).await.ok()?;
            answered.await.ok()?
        };
        let changed = tokio::select! {
            changed = look => changed,
            () = stop.cancelled() => None,
        };
        changed.map_or(fault, |changed| Fault::integrity(changed).with_next(CHANGED_NEXT))
    }

    async fn save(&self, row: &TransferRow) {
        if let Err(fault) = self.inner.catalogue.update_transfer(&row.id, row.generation, row.state, &row.body).await {
            tracing::error!(transfer = %row.id, error = %fault, "the catalogue cannot be written");
        }
    }

    fn note_bytes(&self, row: &mut TransferRow, counters: &Counters) {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let was = row.body.bytes;
        row.body.bytes = Bytes {
            total: was.total,
            reused: was.reused.max(get(&counters.reused)),
            resumed: was.resumed.max(get(&counters.resumed)),
            received: was.received.max(get(&counters.received)),
            committed: was.committed.max(get(&counters.committed)),
            wire: was.wire.max(get(&counters.wire)),
        };
    }

    async fn enter(&self, row: &mut TransferRow, state: State, wait: Option<Fault>) {
        row.state = state;
        // Until bytes come it still waits for its source, however often it asks.
        let waits = row.body.reason == Some(Reason::WaitingForSource) && matches!(state, State::Planning | State::Transferring);
        if wait.is_some() || !waits {
            row.body.set_fault(wait.as_ref());
        }
        self.save(row).await;
    }

    /// The line, as soon as there is one.
    async fn link(&self, row: &mut TransferRow) -> Result<Link, Fault> {
        let mut watch = self.inner.link.clone();
        loop {
            if let Some(link) = watch.borrow_and_update().clone().filter(|link| !link.is_closed()) {
                return Ok(link);
            }
            if row.body.reason != Some(Reason::HubUnreachable) {
                let fault = Fault::unreachable("there is no line to the hub").with_reason(Reason::HubUnreachable);
                let state = row.state;
                self.enter(row, state, Some(fault)).await;
            }
            watch.changed().await.map_err(|_| stopped())?;
        }
    }

    /// Waits until the transfers that go first are done, or given up.
    async fn let_others_go_first(&self, row: &mut TransferRow) -> Result<(), Fault> {
        let catalogue = &self.inner.catalogue;
        loop {
            let changed = catalogue.changed();
            let mut waits = None;
            // As the hub says now: it may have been told since that nothing need go first.
            for id in catalogue.transfer(&row.id).await?.after {
                match catalogue.transfer(&id).await {
                    Ok(first) if matches!(first.state, State::Done | State::Cancelled) => {}
                    Ok(first) if first.state == State::Failed => {
                        waits = Some(format!("{} must be here first, and failed: {id}", first.artifact));
                    }
                    Ok(first) => waits = Some(format!("{} must be here first: {id}", first.artifact)),
                    Err(fault) if fault.code == Code::NotFound => waits = Some(format!("transfer {id} must be done first")),
                    Err(fault) => return Err(fault),
                }
            }
            let Some(message) = waits else { return Ok(()) };
            if row.body.message.as_ref() != Some(&message) {
                let wait = Fault::internal(message)
                    .with_reason(Reason::WaitingForDependency)
                    .with_next("nothing: it begins by itself; if what it waits for failed, mend that and retry it");
                self.enter(row, State::Queued, Some(wait)).await;
            }
            changed.await;
        }
    }

    async fn attempt(&self, row: &mut TransferRow, counters: &Arc<Counters>, stop: &CancellationToken) -> Result<(), Fault> {
        let inner = &self.inner;
        let resumes_commit = row.state == State::Committing;
        if !resumes_commit {
            unless(stop, self.let_others_go_first(row)).await?;
        }
        let turns = if row.body.bytes.total < SMALL_BYTES { &inner.small } else { &inner.large };
        let _turn = match turns.try_acquire() {
            Ok(turn) => turn,
            Err(_) => {
                let wait = Fault::internal("other transfers go first")
                    .with_reason(Reason::WaitingForTurn)
                    .with_next("nothing: it begins by itself");
                self.enter(row, State::Queued, Some(wait)).await;
                unless(stop, async { turns.acquire().await.map_err(|_| stopped()) }).await?
            }
        };
        let sink = inner.sinks.of(row.artifact.kind).clone();
        let known = inner.catalogue.by_digest(row.digest).await?.map(|known| known.root);

        if let (true, Some(root)) = (resumes_commit, &known) {
            // The daemon ended in or after the commit: the sink knows which.
            let incoming = incoming(row, root);
            let staged = sink.staging_root().join(&row.id);
            if !staged.exists()
                && let Ok(landed) = sink.commit(&incoming, &staged).await
            {
                return self.land(row, counters, &incoming, landed).await;
            }
        }

        self.enter(row, State::Planning, None).await;
        if let Some(landed) = unless(stop, self.still_here(row)).await? {
            let Some(root) = known else { return Err(Fault::internal("an artifact that lies here is not in the catalogue")) };
            return self.land(row, counters, &incoming(row, &root), landed).await;
        }
        let base = inner.catalogue.kin(&row.artifact).await?.map(|kin| kin.root);
        let mut fetcher = None;
        let root = match known.or_else(|| self.told(row.digest, counters)) {
            Some(root) => root,
            None => {
                let new = Fetcher::new(unless(stop, self.link(row)).await?, row.digest, counters.wire.clone());
                let root = if base.is_some() {
                    unless(stop, new.root()).await?
                } else {
                    unless(stop, new.root_and_pages(&inner.shared.store)).await?
                };
                fetcher = Some(new);
                root
            }
        };
        if root.kind != row.artifact.kind {
            return Err(Fault::integrity(format!("{} has the manifest of a {}", row.artifact, root.kind)));
        }
        let fetcher = match fetcher {
            Some(fetcher) => fetcher,
            None => Fetcher::new(unless(stop, self.link(row)).await?, row.digest, counters.wire.clone()),
        };
        if row.body.reason != Some(Reason::WaitingForSource) {
            row.body.set_fault(None);
        }
        unless(stop, fetcher.pages(&root, base.as_ref(), &inner.shared.store)).await?;
        inner.catalogue.add_artifact(&row.artifact, &root, None).await?;
        row.body.bytes.total = root.totals.bytes;
        let incoming = incoming(row, &root);
        unless(stop, sink.check(&incoming)).await?;

        self.enter(row, State::Transferring, None).await;
        let assembly = Assembly {
            shared: inner.shared.clone(),
            sink: sink.clone(),
            incoming: incoming.clone(),
            fetcher,
            priority: if root.totals.bytes < SMALL_BYTES { 10 } else { 0 },
            counters: counters.clone(),
            stop: stop.clone(),
        };
        let staged = {
            let run = assembly.run();
            let before = counters.received.load(Ordering::Relaxed);
            tokio::pin!(run);
            let mut pace = Pace::new(clock::now_unix_ms(), row.body.bytes.received + row.body.bytes.reused);
            let mut ticks = tokio::time::interval(PROGRESS_EVERY);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            ticks.tick().await;
            loop {
                tokio::select! {
                    staged = &mut run => break staged?,
                    _ = ticks.tick() => {
                        self.note_bytes(row, counters);
                        if row.body.reason == Some(Reason::WaitingForSource) && counters.received.load(Ordering::Relaxed) > before {
                            row.body.set_fault(None);
                        }
                        let bytes = row.body.bytes;
                        row.body.rate = pace.rate(clock::now_unix_ms(), bytes.received + bytes.reused);
                        self.inner.last_rate.store(row.body.rate, Ordering::Relaxed);
                        row.body.eta_seconds = pace.eta(bytes.total.saturating_sub(bytes.committed));
                        self.save(row).await;
                    }
                }
            }
        };
        self.note_bytes(row, counters);
        row.body.rate = 0;
        self.enter(row, State::Committing, None).await;
        let _alone = self.alone_with(&row.artifact).await;
        let landed = sink.commit(&incoming, &staged).await?;
        self.land(row, counters, &incoming, landed).await
    }

    /// Waits until nobody else lands, looks at, or takes away this artifact.
    pub async fn alone_with(&self, artifact: &ArtifactRef) -> OwnedMutexGuard<()> {
        let lock = {
            let mut all = self.inner.alone.lock();
            all.retain(|_, lock| Arc::strong_count(lock) > 1);
            all.entry(artifact.clone()).or_default().clone()
        };
        lock.lock_owned().await
    }

    /// Looks closely at what was committed before, if it was. What is sound counts as landed; what is not is brought again.
    async fn still_here(&self, row: &TransferRow) -> Result<Option<Landed>, Fault> {
        let inner = &self.inner;
        let _alone = self.alone_with(&row.artifact).await;
        let there = match inner.catalogue.artifact(&row.artifact).await {
            Ok(there) if there.digest == row.digest && !there.published => there,
            Err(fault) if fault.code != Code::NotFound => return Err(fault),
            _ => return Ok(None),
        };
        // Once something of it is staged, it was looked at.
        let (Some(place), None) = (&there.place, inner.shared.places.staged_by(&row.id)) else { return Ok(None) };
        let sink = inner.sinks.of(row.artifact.kind);
        let incoming = incoming(row, &there.root);
        let faults = match verify(sink.as_ref(), inner.shared.store.clone(), &incoming, place, |_| {}).await {
            // A page of the manifest is damaged: it is brought again as well.
            Err(fault) if fault.code == Code::Integrity => vec![fault.to_string()],
            other => other?,
        };
        let Some(first) = faults.first() else {
            return Ok(Some(Landed { place: place.clone(), location: there.location.clone().unwrap_or_default() }));
        };
        tracing::warn!(transfer = %row.id, artifact = %row.artifact, faults = faults.len(), first, "what was here is brought again");
        sink.clear(&incoming).await?;
        Ok(None)
    }

    /// Whether an artifact is here still, by a quick look.
    pub async fn holds(&self, artifact: &ArtifactRef, digest: Digest) -> Result<bool, Fault> {
        let there = match self.inner.catalogue.artifact(artifact).await {
            Ok(there) if there.digest == digest && there.place.is_some() => there,
            Err(fault) if fault.code != Code::NotFound => return Err(fault),
            _ => return Ok(false),
        };
        let incoming = Incoming { artifact: artifact.clone(), digest, root: there.root, transfer: "holds".into() };
        if there.published { Ok(true) } else { self.inner.sinks.of(artifact.kind).stands(&incoming).await }
    }

    /// Everything is durable and visible: note where, sign, and say so.
    async fn land(&self, row: &mut TransferRow, counters: &Counters, incoming: &Incoming, landed: Landed) -> Result<(), Fault> {
        let inner = &self.inner;
        let (places, id, digest) = (inner.shared.places.clone(), row.id.clone(), row.digest);
        let place = landed.place.clone();
        blocking(move || {
            if let Some(number) = places.staged_by(&id) {
                places.put(Some(number), PlaceInfo { place, digest, transfer: None, foreign: false })?;
            }
            Ok(())
        })
        .await?;
        inner.catalogue.add_artifact(&row.artifact, &incoming.root, None).await?;
        inner.catalogue.set_place(&row.artifact, Some(&landed.place), Some(&landed.location)).await?;
        counters.committed.store(row.body.bytes.total, Ordering::Relaxed);
        self.note_bytes(row, counters);
        row.body.location = Some(landed.location);
        row.body.receipt = Some(self.receipt(row)?);
        self.enter(row, State::Done, None).await;
        tracing::info!(transfer = %row.id, artifact = %row.artifact, "a transfer is done");
        Ok(())
    }

    /// What the site signs when an artifact is committed: a JSON text, and the signature over exactly that text.
    fn receipt(&self, row: &TransferRow) -> Result<serde_json::Value, Fault> {
        let identity = self.inner.identity.borrow().clone();
        let statement = serde_json::json!({
            "artifact": row.artifact, "digest": row.digest, "site": row.site, "transfer": row.id,
            "location": row.body.location, "committed_at": clock::now_rfc3339(),
        })
        .to_string();
        let signature = BASE64.encode(identity.sign(statement.as_bytes())?);
        let certificate = BASE64.encode(identity.cert_der());
        Ok(serde_json::json!({ "statement": statement, "signature": signature, "certificate": certificate }))
    }
}

fn incoming(row: &TransferRow, root: &Root) -> Incoming {
    Incoming { artifact: row.artifact.clone(), digest: row.digest, root: root.clone(), transfer: row.id.clone() }
}

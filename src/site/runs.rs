//! Training runs at the training site: executes the effects of the state machine `run::site`, and
//! passes it the observed events.
//!
//! Each change is written before it is executed, and the state machine returns an effect until it
//! is done. So a crash at any point leaves no work undone. The trainer is a separate process: see
//! `trainer`.

mod cleanup;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tracing::Instrument as _;

use super::Opened;
use super::publish::Publications;
use super::watch::{Watch, WatchResult};
use crate::api::RunToken;
use crate::api::types::{PublishRequest, SourceOptions, State};
use crate::trainer::Folder;
use base::blocking::blocking;
use base::clock;
use base::fault::{Code, Fault, Retry};
use base::limits::{BACKOFF_FIRST, BACKOFF_MAX, TRAINER_CALL_MAX, TRAINER_LOOK_EVERY};
use base::names::{ArtifactRef, Kind, RunName, SiteName, TransferId};
use base::spans;
use base::workers::Worker;
use model::actor::Actor;
use model::policy::{self, Object, Verb};
use model::run::site::{Effect, Event, Observation, Phase, Process, Run, Trainer, step};
use model::run::{DesiredRun, Input, Lineage, Model, RunReport};

/// The most open runs that are checked.
const OPEN_MAX: u32 = 10_000;
/// The shortest pause between two checks, whatever changes.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Operations that are retried independently: a platform that does not answer must not delay the
/// removal of borrowed inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Try {
    /// The operations that the run needs to continue.
    GoOn,
    /// The call that informs a platform of the run's end.
    CallOff,
}

/// The state of the run keeper in memory.
#[derive(Default)]
struct RunsState {
    /// Events are applied one at a time.
    turn: tokio::sync::Mutex<()>,
    /// Runs for which a task is working.
    busy: Mutex<HashSet<RunName>>,
    /// The number of failures, and the time of the next attempt.
    again: Mutex<HashMap<(RunName, Try), (u32, Instant)>>,
    /// The runs in the hub's last list.
    listed: Mutex<Vec<RunName>>,
}

/// Whether this site trains for `from`.
fn may_borrow(from: &SiteName, allow: &[String]) -> bool {
    let trainer = Object::Trainer { allow: Some(allow) };
    policy::may(&Actor::Site(from.clone()), Verb::Borrow, &trainer).is_ok()
}

/// A run for which a task is working, until this is dropped.
struct Busy<'a>(&'a RunsState, &'a RunName);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.busy.lock().remove(self.1);
    }
}

fn now_ms() -> i64 {
    clock::now_unix_ms() as i64
}

/// Executes the training runs of this site.
#[derive(Clone)]
pub(super) struct RunKeeper {
    opened: Opened,
    watch: Watch,
    publications: Publications,
    state: Arc<RunsState>,
}

impl RunKeeper {
    /// `watch` checks the inputs, and `publications` publishes the models.
    pub(super) fn new(opened: &Opened, watch: Watch, publications: Publications) -> Self {
        Self {
            opened: opened.clone(),
            watch,
            publications,
            state: Arc::default(),
        }
    }

    /// Applies the hub's complete list of runs. A run that cannot be stored does not prevent the
    /// others; the first fault is returned. A run that borrowed with one of the `unadopted`
    /// transfers waits, because its inputs may be requested again.
    pub(super) async fn apply(
        &self,
        desired: &[DesiredRun],
        unadopted: &HashSet<TransferId>,
    ) -> Result<(), Fault> {
        let catalogue = &self.opened.catalogue;
        let mut first = Ok(());
        {
            let _turn = self.state.turn.lock().await;
            for wanted in desired {
                if !wanted
                    .borrowed
                    .iter()
                    .any(|borrowed| unadopted.contains(&borrowed.transfer))
                {
                    first = first.and(self.apply_run(wanted).await);
                }
            }
            for run in catalogue.open_runs::<Run>(OPEN_MAX).await? {
                if !desired
                    .iter()
                    .any(|wanted| wanted.spec.name == run.spec.name)
                {
                    let (after, _) = step(&run, Event::Unlisted, now_ms());
                    if after != run {
                        first = first.and(self.save_run(&after).await);
                    }
                }
            }
            *self.state.listed.lock() = desired
                .iter()
                .map(|wanted| wanted.spec.name.clone())
                .collect();
        }
        for wanted in desired {
            if let Some(model) = &wanted.model {
                first = first.and(
                    catalogue
                        .set_lineage(&model.artifact, &Lineage::from(&wanted.spec))
                        .await,
                );
            }
        }
        first
    }

    async fn apply_run(&self, wanted: &DesiredRun) -> Result<(), Fault> {
        let name = wanted.spec.name.as_str();
        let here = self
            .opened
            .catalogue
            .run::<Run>(name)
            .await?
            .filter(|run| run.spec.id == wanted.spec.id);
        let run = match &here {
            Some(run) => step(run, Event::Wanted(Box::new(wanted.clone())), now_ms()).0,
            None => Run::new(wanted.clone()),
        };
        if here.is_none_or(|before| before != run) {
            self.save_run(&run).await
        } else {
            Ok(())
        }
    }

    /// The reports of the runs that the hub lists.
    pub(super) async fn reports(&self) -> Result<Vec<RunReport>, Fault> {
        let mut out: Vec<RunReport> = Vec::new();
        let listed = self.state.listed.lock().clone();
        for name in listed {
            let Some(run) = self.opened.catalogue.run::<Run>(name.as_str()).await? else {
                continue;
            };
            let mut report = run.report();
            report.by_command = matches!(self.trainer(&run), Trainer::Command);
            for id in std::mem::take(&mut report.removed) {
                // An input that was delivered again in the meantime is not removed.
                let gone = match self.opened.catalogue.transfer(&id).await {
                    Ok(row) => {
                        row.state == State::Cancelled
                            || row.state == State::Done && row.removed_ms.is_some()
                    }
                    Err(fault) if fault.code == Code::NotFound => true,
                    Err(fault) => return Err(fault),
                };
                if gone {
                    report.removed.push(id);
                }
            }
            out.push(report);
        }
        Ok(out)
    }

    async fn save_run(&self, run: &Run) -> Result<(), Fault> {
        let phase = serde_json::to_value(run.phase)
            .ok()
            .and_then(|v| v.as_str().map(str::to_owned))
            .unwrap_or_default();
        self.opened
            .catalogue
            .save_run(run.spec.name.as_str(), &phase, run.is_open(), run)
            .await
    }

    /// Checks the open runs after each change, and running trainers at short intervals, until the
    /// daemon stops.
    pub(super) async fn keep(&self, worker: &Worker) -> Result<(), Fault> {
        loop {
            let changed = self.opened.catalogue.changed();
            let looked = worker.iterate(async {
                let open = self.opened.catalogue.open_runs::<Run>(OPEN_MAX).await;
                let mut often = false;
                for run in open.map_err(|fault| fault.context("read the open runs"))? {
                    often |= run.phase == Phase::Training && !run.by_platform;
                    self.look_soon(run.spec.name, worker);
                }
                Ok(often)
            });
            // The worker reports a fault, and tries again.
            let often = looked.await.unwrap_or_default();
            tokio::select! {
                () = async { changed.await; tokio::time::sleep(LOOK_EVERY).await } => {}
                () = tokio::time::sleep(TRAINER_LOOK_EVERY), if often => {}
            }
        }
    }

    /// Checks a run in a separate task, unless a task is working for it already.
    fn look_soon(&self, name: RunName, worker: &Worker) {
        if !self.state.busy.lock().insert(name.clone()) {
            return;
        }
        let (this, worker) = (self.clone(), worker.clone());
        let span = spans::run(&name);
        let work = async move {
            // Removed at the end of the task, even after a panic; otherwise the run would never be
            // checked again.
            let busy = Busy(&this.state, &name);
            tokio::select! {
                result = this.look_at(&name) => {
                    if let Err(fault) = result {
                        worker.count_error(&fault.clone().context(&name));
                        tracing::warn!(error = %fault, "a run could not continue; retrying");
                    }
                }
                () = this.opened.stop.cancelled() => {}
            }
            drop(busy);
        };
        self.opened.tasks.spawn(work.instrument(span));
    }

    async fn look_at(&self, name: &RunName) -> Result<(), Fault> {
        let Some((mut run, mut effects)) = self.look(name, false).await? else {
            return Ok(());
        };
        // The inputs are checked without delaying other runs. That may take long, so the effects
        // are determined again after it.
        if effects.contains(&Effect::Check) && self.may_begin(&run).await? {
            let Some(now) = self.look(name, true).await? else {
                return Ok(());
            };
            (run, effects) = now;
        }
        for effect in effects {
            self.run_effect(&run, effect).await?;
        }
        Ok(())
    }

    /// Checks a run; changes are durable when this returns. `checked`: its inputs were checked just
    /// before.
    async fn look(
        &self,
        name: &RunName,
        checked: bool,
    ) -> Result<Option<(Run, Vec<Effect>)>, Fault> {
        let _turn = self.state.turn.lock().await;
        let Some(before) = self.opened.catalogue.run::<Run>(name.as_str()).await? else {
            return Ok(None);
        };
        let seen = self.see(&before, checked).await?;
        self.go_on(&before, Event::Looked(seen)).await.map(Some)
    }

    /// Applies an event; changes are durable when this returns.
    async fn take(&self, name: &RunName, event: Event) -> Result<(), Fault> {
        let _turn = self.state.turn.lock().await;
        let Some(before) = self.opened.catalogue.run::<Run>(name.as_str()).await? else {
            return Ok(());
        };
        self.go_on(&before, event).await.map(|_| ())
    }

    /// Called with `turn` held.
    async fn go_on(&self, before: &Run, event: Event) -> Result<(Run, Vec<Effect>), Fault> {
        let (after, effects) = step(before, event, now_ms());
        if after != *before {
            let name = &after.spec.name;
            if after.phase != before.phase {
                // The earlier failures belong to another phase.
                self.state.again.lock().remove(&(name.clone(), Try::GoOn));
                spans::run(name).in_scope(|| tracing::info!(phase = ?after.phase, why = after.message.as_deref().unwrap_or_default(), "the phase of a run changed"));
            }
            self.save_run(&after).await?;
        }
        Ok((after, effects))
    }

    fn folder(&self, run: &Run) -> Folder {
        Folder::new(
            run.spec
                .name
                .in_dir(&self.opened.config.data_dir.join("runs")),
        )
    }

    /// The trainer at this site for the site that started the run.
    fn trainer(&self, run: &Run) -> Trainer {
        match &self.opened.config.train {
            None => Trainer::None,
            // Only this site's own configuration decides, never the hub.
            Some(train) if !may_borrow(&run.spec.from, &train.allow) => Trainer::Refused,
            Some(train) if train.url.is_some() => Trainer::Platform,
            Some(_) => Trainer::Command,
        }
    }

    async fn see(&self, run: &Run, checked: bool) -> Result<Observation, Fault> {
        let catalogue = &self.opened.catalogue;
        let mut missing = None;
        if run.phase == Phase::Waiting {
            for input in &run.spec.inputs {
                if !self.is_listed(input).await? {
                    missing = Some(input.artifact.to_string());
                    break;
                }
            }
        }
        let others = catalogue.open_runs::<Run>(OPEN_MAX).await?;
        let training = others
            .iter()
            .filter(|other| is_at_work(other) && other.spec.name != run.spec.name)
            .count();
        let at_once = self
            .opened
            .config
            .train
            .as_ref()
            .and_then(|train| train.at_once)
            .unwrap_or(1);
        let folder = self.folder(run);
        // Before the first start of this run, an existing folder belongs to an earlier run of the
        // same name.
        let fresh = run.starts == 0;
        let (process, has_output, resolved) = blocking(move || {
            let resolved = folder.path().canonicalize().ok();
            Ok(match fresh {
                true => (Process::Absent, false, resolved),
                false => (folder.process()?, folder.has_output(), resolved),
            })
        })
        .await?;
        // After the state of the process was read: a trainer that has ended published before its
        // end.
        let name = Some(run.spec.name.as_str());
        let offers = catalogue.offers().await?;
        let offering = offers
            .iter()
            .any(|(_, offer)| offer.run.as_ref().map(RunName::as_str) == name);
        let kept = match resolved {
            Some(folder) if process == Process::Absent => catalogue
                .published_in(&folder)
                .await?
                .map(|artifact| artifact.to_string()),
            _ => None,
        };
        let turn = training < at_once as usize;
        Ok(Observation {
            missing,
            turn,
            trainer: self.trainer(run),
            process,
            has_output,
            offering,
            kept,
            checked,
        })
    }

    /// Whether the catalogue lists an input as present. An input that is being delivered again is
    /// not present until it has arrived.
    async fn is_listed(&self, input: &Input) -> Result<bool, Fault> {
        let catalogue = &self.opened.catalogue;
        match catalogue.artifact(&input.artifact).await {
            Ok(row) if row.place.is_some() && row.digest == input.digest => {}
            Err(fault) if fault.code != Code::NotFound => return Err(fault),
            _ => return Ok(false),
        }
        Ok(catalogue
            .transfers_of_artifact(&input.artifact)
            .await?
            .iter()
            .all(|row| row.state.is_final()))
    }

    /// Whether a trainer may start with the inputs now. If not, the reason is recorded.
    async fn may_begin(&self, run: &Run) -> Result<bool, Fault> {
        let name = &run.spec.name;
        if self.is_too_soon(name, Try::GoOn) {
            return Ok(false);
        }
        let Err(fault) = self.check_inputs(run).await else {
            return Ok(true);
        };
        self.put_off(name, Try::GoOn);
        let event = match fault.retry {
            Retry::Never => Event::NotStarted(fault.message),
            Retry::Backoff | Retry::AfterMs(_) => Event::NotYet(fault.message),
        };
        self.take(name, event).await?;
        Ok(false)
    }

    /// Checks the inputs before a trainer starts. Files that were published here in place may have
    /// changed since, and the lineage of the model would then be wrong. A failed check is tried
    /// again; only a missing or changed input is a permanent failure.
    async fn check_inputs(&self, run: &Run) -> Result<(), Fault> {
        for Input {
            artifact, digest, ..
        } in &run.spec.inputs
        {
            let in_place = match self.opened.catalogue.artifact(artifact).await {
                Ok(there) => artifact.kind.is_files() && there.published,
                Err(fault) => return Err(not_now(artifact, fault)),
            };
            if in_place {
                match self.watch.look_over(artifact, true).await {
                    Ok(WatchResult::Sound) => {}
                    Ok(WatchResult::Changed(how)) => {
                        return Err(Fault::integrity(format!(
                            "{artifact} differs from its published content: {how}"
                        )));
                    }
                    Ok(WatchResult::Unknown) => {
                        return Err(not_now(
                            artifact,
                            Fault::unreachable("its folder is not available"),
                        ));
                    }
                    Err(fault) => return Err(not_now(artifact, fault)),
                }
            }
            match self.opened.runner.holds(artifact, *digest).await {
                Ok(true) => {}
                Ok(false) => {
                    return Err(Fault::not_found(format!(
                        "{artifact} is no longer at this site"
                    )));
                }
                Err(fault) => return Err(not_now(artifact, fault)),
            }
        }
        Ok(())
    }

    async fn run_effect(&self, run: &Run, effect: Effect) -> Result<(), Fault> {
        let name = &run.spec.name;
        match effect {
            // The caller has done this, or it is too early.
            Effect::Check => Ok(()),
            Effect::Start if run.by_platform => {
                if self.is_too_soon(name, Try::GoOn) {
                    return Ok(());
                }
                let event = match self.call_platform(run).await {
                    Ok(()) => Event::Called,
                    Err(fault) => {
                        self.put_off(name, Try::GoOn);
                        Event::NotStarted(fault.message)
                    }
                };
                self.take(name, event).await
            }
            Effect::Start => match self.start_command(run).await {
                Ok(()) => Ok(()),
                Err(fault) => self.take(name, Event::NotStarted(fault.message)).await,
            },
            Effect::Stop if run.by_platform => {
                if self.is_too_soon(name, Try::CallOff) {
                    return Ok(());
                }
                if let Err(fault) = self.call_off(run).await {
                    self.put_off(name, Try::CallOff);
                    tracing::warn!(error = %fault, "the training platform could not be informed of a run's end; retrying");
                    return Ok(());
                }
                self.take(name, Event::CalledOff).await
            }
            Effect::Stop => {
                let folder = self.folder(run);
                blocking(move || folder.stop()).await
            }
            Effect::Publish => {
                if self.is_too_soon(name, Try::GoOn) {
                    return Ok(());
                }
                let event = match self.publish_output(run).await {
                    Ok(model) => Event::Published(model),
                    Err(fault) => {
                        self.put_off(name, Try::GoOn);
                        Event::NotPublished {
                            again: fault.retry != Retry::Never,
                            why: fault.message,
                        }
                    }
                };
                self.take(name, event).await
            }
            Effect::Remove(list) => self.give_all_back(name, list).await,
        }
    }

    fn is_too_soon(&self, name: &RunName, what: Try) -> bool {
        self.state
            .again
            .lock()
            .get(&(name.clone(), what))
            .is_some_and(|(_, at)| Instant::now() < *at)
    }

    fn put_off(&self, name: &RunName, what: Try) {
        let mut again = self.state.again.lock();
        again.retain(|_, (_, at)| at.elapsed() < BACKOFF_MAX);
        let (tries, at) = again
            .entry((name.clone(), what))
            .or_insert((0, Instant::now()));
        *at = Instant::now()
            + BACKOFF_FIRST
                .saturating_mul(1 << (*tries).min(16))
                .min(BACKOFF_MAX);
        *tries += 1;
    }

    async fn start_command(&self, run: &Run) -> Result<(), Fault> {
        let Some(train) = &self.opened.config.train else {
            return Err(Fault::config("there is no [train]"));
        };
        let descriptor = self.descriptor(run).await?;
        let folder = self.folder(run);
        let path = folder.descriptor().display().to_string();
        let mut command = train.command.clone();
        command.push(path.clone());
        let environment = BTreeMap::from([
            ("PACKHORSE_RUN".to_owned(), path),
            (
                "PACKHORSE_API".to_owned(),
                format!("http://{}", from_here(self.opened.config.listen.api)),
            ),
            // Never the admin token: this token may only publish and finish this run, during its
            // training.
            (
                "PACKHORSE_TOKEN_FILE".to_owned(),
                folder.token().display().to_string(),
            ),
        ]);
        let (deadline_ms, token) = (run.spec.deadline_ms, RunToken::new(run.spec.name.clone())?);
        blocking(move || {
            folder.prepare(&descriptor)?;
            folder.keep_token(&token)?;
            folder.start(&command, environment, deadline_ms)
        })
        .await
    }

    async fn call_platform(&self, run: &Run) -> Result<(), Fault> {
        self.check_inputs(run).await?;
        let descriptor = self.descriptor(run).await?;
        let (folder, text, id) = (self.folder(run), descriptor.clone(), run.spec.id.clone());
        // A platform may have accepted a call that was not answered: the output that it has written
        // since is kept.
        blocking(move || {
            if folder.descriptor_of(&id)?.is_some() {
                Ok(())
            } else {
                folder.prepare(&text)
            }
        })
        .await?;
        self.post(&descriptor).await
    }

    /// Informs a platform that its run has ended, with the content of the first call.
    async fn call_off(&self, run: &Run) -> Result<(), Fault> {
        let (folder, id) = (self.folder(run), run.spec.id.clone());
        // Without a descriptor the platform was never called.
        let Some(mut descriptor) = blocking(move || folder.descriptor_of(&id)).await? else {
            return Ok(());
        };
        descriptor["cancel"] = true.into();
        self.post(&descriptor).await
    }

    async fn post(&self, descriptor: &Value) -> Result<(), Fault> {
        let url = self
            .opened
            .config
            .train
            .as_ref()
            .and_then(|train| train.url.clone());
        let Some(url) = url else {
            return Err(Fault::config("there is no [train] url"));
        };
        // Set once for each process; every caller sets the same provider.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(TRAINER_CALL_MAX)
            .build();
        let client =
            client.map_err(|e| Fault::internal(format!("cannot create an HTTP client: {e}")))?;
        let unreachable =
            |why: String| Fault::unreachable(format!("the training platform at {url} {why}"));
        let answer = client
            .post(&url)
            .json(descriptor)
            .send()
            .await
            .map_err(|e| unreachable(format!("does not answer: {e}")))?;
        if answer.status().is_success() {
            Ok(())
        } else {
            Err(unreachable(format!("answers {}", answer.status())))
        }
    }

    /// The descriptor for a trainer: the location of each input, and the output folder for the
    /// model.
    async fn descriptor(&self, run: &Run) -> Result<Value, Fault> {
        let spec = &run.spec;
        let mut inputs = Vec::new();
        for input in &spec.inputs {
            let row = self.opened.catalogue.artifact(&input.artifact).await?;
            let artifact = &input.artifact;
            let mut about = json!({
                "artifact": artifact, "kind": artifact.kind, "name": artifact.name(), "version": artifact.version(),
                "digest": input.digest.hex(), "bytes": input.bytes,
            });
            let more = match artifact.kind {
                Kind::Dataset | Kind::Operator | Kind::Model => json!({ "path": row.location }),
                Kind::Image => json!({ "image": row.location }),
                Kind::Labels => {
                    let sink = self.opened.config.labels_sink();
                    let schema = if sink.url.starts_with("sqlite:") {
                        ""
                    } else {
                        "packhorse."
                    };
                    json!({
                        "database": sink.url, "table": format!("{schema}annotations"),
                        "label_set": artifact.name(), "location": row.location,
                        "rows": row.place.as_ref().and_then(|place| match place {
                            sink::StorageLocation::Folder { path } => Some(path.display().to_string()),
                            sink::StorageLocation::Registry { .. } => None,
                        }),
                    })
                }
            };
            if let (Some(about), Value::Object(more)) = (about.as_object_mut(), more) {
                about.extend(more);
            }
            inputs.push(about);
        }
        let deadline = jiff::Timestamp::from_millisecond(spec.deadline_ms)
            .map(clock::rfc3339)
            .unwrap_or_default();
        Ok(json!({
            "run": spec.name, "id": spec.id, "from": spec.from, "on": spec.on, "start": run.starts, "deadline_at": deadline,
            "inputs": inputs, "output": self.folder(run).output(), "expect": spec.expect,
            "model": spec.expect.reference(&spec.name)?,
        }))
    }

    /// The token of a run, during its training at this site.
    pub(super) async fn token_of(&self, name: &RunName) -> Option<RunToken> {
        let run = self
            .opened
            .catalogue
            .run::<Run>(name.as_str())
            .await
            .ok()??;
        if run.phase != Phase::Training || run.by_platform {
            return None;
        }
        let folder = self.folder(&run);
        blocking(move || Ok(folder.read_token()))
            .await
            .ok()?
            .filter(|token| token.run() == name)
    }

    async fn publish_output(&self, run: &Run) -> Result<Model, Fault> {
        let artifact = run.spec.expect.reference(&run.spec.name)?;
        let request = PublishRequest {
            source: self.folder(run).output().display().to_string(),
            as_ref: artifact.to_string(),
            to: None,
            options: SourceOptions::default(),
            run: Some(run.spec.name.to_string()),
        };
        let published = self
            .publications
            .publish(request, Arc::default(), Duration::ZERO)
            .await?;
        // It is published here, but the hub may still refuse it.
        if let Some(note) = published.note {
            return Err(Fault::unreachable(note));
        }
        let digest = hex::decode(&published.digest)
            .ok()
            .and_then(|bytes| bytes.try_into().ok());
        let digest = digest
            .ok_or_else(|| Fault::internal(format!("{:?} is not a digest", published.digest)))?;
        Ok(Model {
            artifact,
            digest: content::chunk::Hash(digest),
        })
    }
}

/// The fault for an input that cannot be checked. This is temporary unless its manifest is damaged.
fn not_now(artifact: &ArtifactRef, fault: Fault) -> Fault {
    match fault.code {
        Code::Integrity => fault.context(artifact),
        _ => fault
            .context(format_args!("waits for {artifact}"))
            .with_retry(Retry::Backoff),
    }
}

/// Whether a run is training. A run whose trainer has ended, and that only waits until the hub has
/// its model, is not.
fn is_at_work(run: &Run) -> bool {
    run.phase == Phase::Training && run.ended.is_none()
}

/// The address by which a local process reaches an address that the daemon listens on.
fn from_here(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address.ip() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

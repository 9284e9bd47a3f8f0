//! Training runs at the training site: executes the effects of the state machine `run::site`, and
//! passes it the observed events.
//!
//! Each change is written before it is executed, and the state machine returns an effect until it
//! is done. So a crash at any point leaves no work undone. The trainer is a separate process: see
//! `trainer`.

mod cleanup;
mod inputs;
mod trainer_calls;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::Instrument as _;

use super::Opened;
use super::publish::Publications;
use super::watch::Watch;
use crate::api::types::{PublishRequest, SourceOptions, State};
use crate::reach::Reach;
use crate::trainer::Folder;
use base::blocking::blocking;
use base::clock;
use base::fault::{Code, Fault, Retry};
use base::limits::{BACKOFF_FIRST, BACKOFF_MAX, TRAINER_LOOK_EVERY};
use base::names::{RunName, SiteName, TransferId};
use base::spans;
use base::workers::Worker;
use model::actor::Actor;
use model::policy::{self, Object, Verb};
use model::run::site::{Effect, Event, Observation, Phase, Process, Run, Trainer, step};
use model::run::{DesiredRun, Lineage, Model, RunReport};

/// The most open runs that are checked.
const OPEN_MAX: u32 = 10_000;
/// The shortest pause between two checks.
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
                    let (after, _) = step(&run, Event::Unlisted, clock::now_ms());
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
            Some(run) => {
                step(
                    run,
                    Event::Wanted(Box::new(wanted.clone())),
                    clock::now_ms(),
                )
                .0
            }
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
        let mut watch = self.opened.catalogue.watch_decisions();
        loop {
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
                () = async { watch.changed().await; tokio::time::sleep(LOOK_EVERY).await } => {}
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
        let (after, effects) = step(before, event, clock::now_ms());
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
            Effect::Remove(list) => self.remove_all_borrowed(name, list).await,
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
            .publish(request, Reach::Machine, Arc::default(), Duration::ZERO)
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

/// Whether a run is training. A run whose trainer has ended, and that only waits until the hub has
/// its model, is not.
fn is_at_work(run: &Run) -> bool {
    run.phase == Phase::Training && run.ended.is_none()
}

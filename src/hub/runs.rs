//! Training runs at the hub: executes the effects of the state machine `run::hub`, and passes it
//! the observed events.
//!
//! Runs are checked one at a time, and each change is written before it is executed. Effects that a
//! crash prevented are executed at the next check, because the state machine returns an effect
//! until it is done.

use std::sync::Arc;
use std::time::Duration;

use tracing::Instrument as _;

use super::answers::verb_of_run;
use super::deliveries::Deliveries;
use super::entitlement::Entitlement;
use super::library::HubLibrary;
use crate::api::types::{self, ModelLineage, RunModel, RunState, RunTrainer, RunVerb, State};
use base::clock;
use base::fault::{Code, Fault};
use base::limits::{RUN_INPUTS_MAX, RUN_TTL_MAX, RUNS_OPEN_MAX};
use base::names::{ArtifactRef, Kind, RunName, SiteName, SiteSelector};
use base::spans;
use base::workers::Worker;
use content::chunk::Hash;
use content::manifest::Root;
use model::actor::Actor;
use model::paging::{Page, Room};
use model::policy::{self, Object, Refusal, Scope, ShareList, Verb};
use model::run::hub::{Effect, Event, Finish, ObservedTransfer, Run, step};
use model::run::{
    Borrowed, DesiredRun, Input, Lineage, Model, RunAct, RunOrder, RunReport, Spec,
    no_run as unknown,
};
use state::{Catalogue, Part, TransferRow, new_delivery_id, new_run_id};

/// A run may take several steps in one check; more steps than this are a defect.
const STEPS_MAX: usize = 16;
/// The shortest pause between two checks, whatever changes.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// The most open runs that are checked.
const OPEN_MAX: u32 = 10_000;
/// The approximate part of one message that the runs of a site may use.
const TOLD_BYTES_MAX: usize = 1 << 20;

fn now_ms() -> i64 {
    clock::now_unix_ms() as i64
}

/// The training runs. Cheap to clone.
#[derive(Clone)]
pub(super) struct RunKeeper {
    inner: Arc<Inner>,
}

struct Inner {
    catalogue: Catalogue,
    entitlement: Entitlement,
    deliveries: Deliveries,
    library: HubLibrary,
    /// Events are handled one after the other.
    turn: tokio::sync::Mutex<()>,
}

impl RunKeeper {
    /// The runs of this catalogue.
    pub(super) fn new(
        catalogue: Catalogue,
        entitlement: Entitlement,
        deliveries: Deliveries,
        library: HubLibrary,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                catalogue,
                entitlement,
                deliveries,
                library,
                turn: tokio::sync::Mutex::default(),
            }),
        }
    }

    /// Checks the open runs after each change, until the daemon stops.
    pub(super) async fn keep(&self, worker: &Worker) -> Result<(), Fault> {
        loop {
            let changed = self.inner.catalogue.changed();
            // The worker reports a fault, and tries again.
            let _ = worker
                .iterate(async {
                    let open = self.inner.catalogue.open_runs::<Run>(OPEN_MAX).await;
                    for run in open.map_err(|fault| fault.context("read the open runs"))? {
                        let name = &run.spec.name;
                        let look = async {
                            if let Err(fault) = Box::pin(self.look_at(name)).await {
                                worker.count_error(&fault.clone().context(name));
                                tracing::warn!(error = %fault, "a run could not continue; retrying");
                            }
                        };
                        look.instrument(spans::run(name)).await;
                    }
                    Ok(())
                })
                .await;
            changed.await;
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn load(&self, name: &str) -> Result<Run, Fault> {
        self.inner
            .catalogue
            .run(name)
            .await?
            .ok_or_else(|| unknown(name))
    }

    /// Applies an event; the change is durable when this returns. The caller executes the effects.
    async fn take(&self, name: &RunName, event: Event) -> Result<(Run, Vec<Effect>, bool), Fault> {
        let _turn = self.inner.turn.lock().await;
        self.take_in_turn(name, event).await
    }

    /// The same for a caller that holds `turn`.
    async fn take_in_turn(
        &self,
        name: &RunName,
        event: Event,
    ) -> Result<(Run, Vec<Effect>, bool), Fault> {
        let before = self.load(name.as_str()).await?;
        let (after, effects) = step(&before, event, now_ms())?;
        let changed = after != before;
        if changed {
            if after.state != before.state {
                spans::run(name).in_scope(|| {
                    tracing::info!(
                        state = after.state.as_str(),
                        why = after.message.as_deref().unwrap_or_default(),
                        "the state of a run changed"
                    );
                });
            }
            self.inner
                .catalogue
                .save_run(name.as_str(), after.state.as_str(), after.is_open(), &after)
                .await?;
        }
        Ok((after, effects, changed))
    }

    /// Checks a run until nothing changes.
    async fn look_at(&self, name: &RunName) -> Result<(), Fault> {
        for _ in 0..STEPS_MAX {
            let run = self.load(name.as_str()).await?;
            let parts = self
                .inner
                .catalogue
                .delivery_parts(&run.spec.delivery)
                .await?;
            // After its end, a run concerns only the transfers that no other run or delivery needs.
            let own = match run.state.is_final() {
                true => {
                    self.inner
                        .catalogue
                        .only_borrowed(name.as_str(), &run.spec.on)
                        .await?
                }
                false => parts.clone().unwrap_or_default(),
            };
            let inputs = own.iter().map(|row| self.seen(row)).collect();
            let home = match &run.model {
                Some(model) => self.home_of(&run, model).await?,
                None => None,
            };
            let home = home.map(|row| self.seen(&row));
            let (run, effects, changed) = self
                .take(
                    name,
                    Event::Looked {
                        delivered: parts.is_some(),
                        inputs,
                        home,
                    },
                )
                .await?;
            for effect in &effects {
                self.run_effect(&run, *effect).await?;
            }
            if effects.is_empty() && !changed {
                return Ok(());
            }
        }
        Err(Fault::internal("the run does not reach a stable state"))
    }

    fn seen(&self, row: &TransferRow) -> ObservedTransfer {
        let view = self.inner.deliveries.view(row);
        ObservedTransfer {
            id: row.id.clone(),
            state: view.state,
            message: view.message,
        }
    }

    async fn home_of(&self, run: &Run, model: &Model) -> Result<Option<TransferRow>, Fault> {
        let rows = self
            .inner
            .catalogue
            .transfers_of_artifact(&model.artifact)
            .await?;
        let own = |row: &TransferRow| row.site == run.spec.from && row.removed_ms.is_none();
        // The transfer that was not cancelled, else the one that was cancelled last.
        let standing = rows
            .iter()
            .rev()
            .find(|row| own(row) && row.state != State::Cancelled);
        Ok(standing
            .or_else(|| rows.iter().rev().find(|row| own(row)))
            .cloned())
    }

    async fn run_effect(&self, run: &Run, effect: Effect) -> Result<(), Fault> {
        let catalogue = &self.inner.catalogue;
        match effect {
            Effect::Borrow => {
                let mut parts = Vec::new();
                for input in &run.spec.inputs {
                    let row = catalogue.artifact(&input.artifact).await?;
                    // An artifact that was published at that site needs no transfer. Its rows and
                    // images were delivered there, otherwise the run was refused.
                    if row.origin.as_ref() != Some(&run.spec.on) {
                        parts.push(Part::new(&row, std::slice::from_ref(&run.spec.on)));
                    }
                }
                self.inner
                    .deliveries
                    .begin(&run.spec.delivery, Some(run.spec.name.as_str()), &parts)
                    .await
                    .map(|_| ())
            }
            Effect::SendHome => {
                let Some(model) = &run.model else {
                    return Ok(());
                };
                catalogue
                    .set_lineage(&model.artifact, &Lineage::from(&run.spec))
                    .await?;
                let row = catalogue.artifact(&model.artifact).await?;
                let part = Part::new(&row, std::slice::from_ref(&run.spec.from));
                self.inner
                    .deliveries
                    .begin(&new_delivery_id(), None, &[part])
                    .await
                    .map(|_| ())
            }
            Effect::Abandon => {
                let own = catalogue
                    .only_borrowed(run.spec.name.as_str(), &run.spec.on)
                    .await?;
                let home = match &run.model {
                    Some(model) => self.home_of(run, model).await?,
                    None => None,
                };
                for row in own.into_iter().chain(home) {
                    if !matches!(row.state, State::Done | State::Cancelled) {
                        catalogue.act(&row.id, types::Action::Cancel).await?;
                    }
                }
                Ok(())
            }
        }
    }

    /// The runs of a site's desired state: the oldest, as many as fit in a message. The others
    /// wait.
    pub(super) async fn desired(&self, site: &SiteName) -> Result<Vec<DesiredRun>, Fault> {
        let mut out = Vec::new();
        let mut told = 0;
        for run in self.inner.catalogue.open_runs::<Run>(OPEN_MAX).await? {
            if run.spec.on != *site {
                continue;
            }
            // The estimate uses only values that never change, because the site ends a run that is
            // no longer listed. The list of borrowed inputs repeats the inputs.
            let spec = serde_json::to_vec(&run.spec)
                .map_err(|e| Fault::internal(format!("a run as JSON: {e}")))?;
            told += 3 * spec.len();
            if told > TOLD_BYTES_MAX && !out.is_empty() {
                break;
            }
            let borrowed = self
                .inner
                .catalogue
                .only_borrowed(run.spec.name.as_str(), site)
                .await?;
            let borrowed = borrowed.into_iter().map(|row| Borrowed {
                transfer: row.id,
                artifact: row.artifact,
                digest: row.digest,
                generation: Some(row.generation),
            });
            let (want, ready) = (run.want(), run.is_ready());
            out.push(DesiredRun {
                want,
                borrowed: borrowed.collect(),
                model: run.model,
                spec: run.spec,
                ready,
            });
        }
        Ok(out)
    }

    /// Handles a site's report of a run.
    pub(super) async fn take_report(
        &self,
        site: &SiteName,
        report: RunReport,
    ) -> Result<(), Fault> {
        let run = self.load(report.name.as_str()).await?;
        let actor = Actor::Site(site.clone());
        let Spec { from, on, .. } = &run.spec;
        policy::may(&actor, Verb::Report, &Object::Run { from, on })
            .map_err(|_| Fault::not_allowed(format!("site {site} reported a run of site {on}")))?;
        if run.spec.id != report.id {
            return Ok(());
        }
        let borrowed = match report.removed.is_empty() {
            true => Vec::new(),
            false => {
                self.inner
                    .catalogue
                    .only_borrowed(report.name.as_str(), site)
                    .await?
            }
        };
        for id in &report.removed {
            let Ok(row) = self.inner.catalogue.transfer(id).await else {
                continue;
            };
            let transfer = Object::Transfer { to: &row.site };
            let ours = policy::may(&actor, Verb::Report, &transfer).is_ok()
                && run
                    .spec
                    .inputs
                    .iter()
                    .any(|input| input.artifact == row.artifact);
            if !ours || row.state != State::Done || row.removed_ms.is_some() {
                continue;
            }
            if borrowed.iter().any(|row| row.id == *id) {
                self.inner.catalogue.set_removed(id, now_ms()).await?;
            } else {
                // Another run or delivery has requested the artifact since, and the site learned it
                // too late.
                spans::transfer(id, &row.artifact, site).in_scope(|| {
                    tracing::info!("a removed artifact is requested again, and delivered again");
                });
                self.inner.catalogue.act(id, types::Action::Retry).await?;
            }
        }
        let name = report.name.clone();
        self.take(&name, Event::Reported(Box::new(report)))
            .await
            .map(|_| ())
    }

    /// Refuses a model that its run would refuse, before any of it is stored.
    pub(super) async fn check_model(
        &self,
        actor: &Actor,
        run: &RunName,
        artifact: &ArtifactRef,
    ) -> Result<(), Fault> {
        let row = self.run_for(actor, Verb::Publish, run.as_str()).await?;
        // The digest of a new model is not known yet; a known model has one.
        let digest = match &row.model {
            Some(model) => model.digest,
            None => Hash([0; 32]),
        };
        step(
            &row,
            Event::Published(Model {
                artifact: artifact.clone(),
                digest,
            }),
            now_ms(),
        )
        .map(|_| ())
    }

    /// Adds the model of a run to the catalogue. If the run ended while the manifest was fetched,
    /// the model is refused, because it would use up its version in vain. `false`: the catalogue
    /// has it already.
    pub(super) async fn add_model(
        &self,
        actor: &Actor,
        name: &RunName,
        artifact: &ArtifactRef,
        root: &Root,
    ) -> Result<bool, Fault> {
        let turn = self.inner.turn.lock().await;
        self.check_model(actor, name, artifact).await?;
        let added = self
            .inner
            .library
            .register(actor.site(), artifact, root)
            .await?;
        let model = Model {
            artifact: artifact.clone(),
            digest: root.digest(),
        };
        let (run, ..) = self.take_in_turn(name, Event::Published(model)).await?;
        drop(turn);
        self.inner
            .catalogue
            .set_lineage(artifact, &Lineage::from(&run.spec))
            .await?;
        Ok(added)
    }

    /// Starts a run, or returns the one that was started before.
    pub(super) async fn start(&self, actor: &Actor, order: &RunOrder) -> Result<types::Run, Fault> {
        let (catalogue, entitlement) = (&self.inner.catalogue, &self.inner.entitlement);
        let RunOrder {
            name,
            from,
            on,
            inputs: wanted,
            expect,
            ttl_seconds,
        } = order.clone();
        if from == on {
            return Err(
                Fault::usage(format!("site {from} cannot train for itself in a run"))
                    .with_next("start the trainer there manually"),
            );
        }
        if wanted.is_empty() || wanted.len() > RUN_INPUTS_MAX {
            return Err(Fault::usage(format!(
                "a run needs 1 to {RUN_INPUTS_MAX} inputs, and {} are named",
                wanted.len()
            )));
        }
        if ttl_seconds == 0 || ttl_seconds > RUN_TTL_MAX.as_secs() {
            return Err(Fault::usage(format!(
                "a run's time is 1 s to {} days",
                RUN_TTL_MAX.as_secs() / 86_400
            )));
        }
        policy::may(actor, Verb::Train, &Object::NewRun { from: &from })?;
        catalogue
            .select_sites(&format!("{from},{on}").parse()?)
            .await?;
        if let Some(list) = entitlement.excluded_by(&on, &from).await? {
            let (who, place) = match list {
                ShareList::Hub => ("the hub's policy".to_owned(), "the hub".to_owned()),
                ShareList::Origin => (format!("site {on}"), on.to_string()),
            };
            return Err(Fault::not_allowed(format!(
                "{who} does not share artifacts of {on} with {from}"
            ))
            .with_next(format!(
                "add {from} to [share] allow in the configuration of {place}"
            )));
        }
        let allow = catalogue.train_list(&on).await?;
        let trainer = Object::Trainer {
            allow: allow.as_deref(),
        };
        if policy::may(&Actor::Site(from.clone()), Verb::Borrow, &trainer).is_err() {
            return Err(Fault::not_allowed(format!("site {on} does not train for {from}"))
                .with_next(format!("add {from} to [train] allow in the configuration of site {on}, then restart its daemon")));
        }
        let mut inputs: Vec<Input> = Vec::new();
        let (mut own, mut changed): (Vec<Part>, Vec<String>) = Default::default();
        for artifact in wanted {
            if inputs.iter().any(|input| input.artifact == artifact) {
                continue;
            }
            let row = entitlement
                .artifact_for(actor, Verb::Train, &artifact, false)
                .await?;
            // The training site needs all inputs.
            let there = SiteSelector::Names(vec![on.clone()]);
            let (origin, only) = (row.origin.as_ref(), std::slice::from_ref(&on));
            entitlement
                .targets(actor, &artifact, origin, only, &there)
                .await?;
            if row.origin.as_ref() == Some(&on)
                && matches!(artifact.kind, Kind::Labels | Kind::Image)
            {
                own.push(Part::new(&row, std::slice::from_ref(&on)));
            } else if row.origin.as_ref() == Some(&on) && row.changed.is_some() {
                changed.push(artifact.to_string());
            }
            inputs.push(Input {
                artifact,
                digest: row.digest,
                bytes: row.root.totals.bytes,
            });
        }
        let _turn = self.inner.turn.lock().await;
        if let Some(run) = catalogue.run::<Run>(name.as_str()).await? {
            let same = run.spec.from == from
                && run.spec.on == on
                && run.spec.inputs == inputs
                && run.spec.expect == expect;
            let ended_badly = matches!(run.state, RunState::Failed | RunState::Cancelled);
            return match same && !ended_badly {
                true => Ok(view(&run)),
                false => Err(Fault::conflict(match same {
                    true => format!("run {name} is {} already", run.state.as_str()),
                    false => format!("the run {name} exists already, with other parameters"),
                })
                .with_next("start it under another name")),
            };
        }
        let model = expect.reference(&name)?;
        match catalogue.artifact(&model).await {
            Ok(_) => {
                return Err(Fault::conflict(format!(
                    "{model} exists already, and run {name} would publish its model under that name"
                ))
                .with_next("expect another version, or start the run under another name"));
            }
            Err(fault) if fault.code != Code::NotFound => return Err(fault),
            Err(_) => {}
        }
        // The trainer would read the changed files, and the lineage of the model would be wrong.
        if let Some(first) = changed.first() {
            let why = format!(
                "{}: changed at {on} since it was published there",
                changed.join(", ")
            );
            return Err(Fault::conflict(why).with_next(format!(
                "'packhorse show {first}' lists the changes; at {on}, restore the original content, or publish the current content as a new version"
            )));
        }
        // A trainer finds rows and images by their names. Publishing in place does not create these
        // names. The run does not create them either, because it removes what it delivers, and this
        // is the site's own artifact.
        let named = catalogue.done_already(&own).await?;
        own.retain(|part| named.iter().all(|row| row.artifact != part.artifact));
        if !own.is_empty() {
            let all: Vec<String> = own.iter().map(|part| part.artifact.to_string()).collect();
            return Err(Fault::conflict(format!(
                "{}: published at {on}, but not delivered there, so no trainer finds the rows or the image under that name",
                all.join(", ")
            ))
            .with_next(format!("packhorse deliver {} --to {on}; when that is done, start the run again", all.join(" "))));
        }
        let open = catalogue.open_runs::<Run>(OPEN_MAX).await?;
        if open.iter().filter(|run| run.spec.on == on).count() >= RUNS_OPEN_MAX {
            return Err(
                Fault::conflict(format!("{RUNS_OPEN_MAX} runs are open at site {on}"))
                    .with_next("wait until one has ended"),
            );
        }
        let created_ms = now_ms();
        let ttl_ms = i64::try_from(ttl_seconds.saturating_mul(1000)).unwrap_or(i64::MAX);
        let spec = Spec {
            name,
            id: new_run_id(),
            from,
            on,
            inputs,
            expect,
            delivery: new_delivery_id(),
            created_ms,
            deadline_ms: created_ms.saturating_add(ttl_ms),
        };
        let run = Run::new(spec);
        catalogue
            .save_run(run.spec.name.as_str(), run.state.as_str(), true, &run)
            .await?;
        spans::run(&run.spec.name)
            .in_scope(|| tracing::info!(from = %run.spec.from, on = %run.spec.on, "a run starts"));
        Ok(view(&run))
    }

    /// Finishes or cancels a run.
    pub(super) async fn act_on(
        &self,
        actor: &Actor,
        request: &RunAct,
    ) -> Result<types::Run, Fault> {
        let run = self
            .run_for(actor, verb_of_run(request.action), request.name.as_str())
            .await?;
        let event = match request.action {
            RunVerb::Finish => Event::Finish(Finish {
                failed: request.failed.as_deref().map(Into::into),
            }),
            RunVerb::Cancel => Event::Cancel,
        };
        let (run, ..) = self.take(&run.spec.name, event).await?;
        Ok(view(&run))
    }

    /// The run, if `actor` may do `verb` with it. A run that the actor may not know gets the answer
    /// for one that does not exist.
    async fn run_for(&self, actor: &Actor, verb: Verb, name: &str) -> Result<Run, Fault> {
        let run = self.load(name).await?;
        let Spec { from, on, .. } = &run.spec;
        match policy::may(actor, verb, &Object::Run { from, on }) {
            Ok(()) => Ok(run),
            Err(Refusal::Hidden) => Err(unknown(name)),
            Err(other) => Err(other.into()),
        }
    }

    /// One run, if `actor` may read it.
    pub(super) async fn show(&self, actor: &Actor, name: &str) -> Result<types::Run, Fault> {
        Ok(view(&self.run_for(actor, Verb::Read, name).await?))
    }

    /// The newest of the runs that `actor` may read.
    pub(super) async fn list(
        &self,
        actor: &Actor,
        behind: Option<&str>,
        skip: u32,
        room: Room,
    ) -> Result<Page<types::Run>, Fault> {
        let of = match policy::runs_scope(actor)? {
            Scope::All => None,
            Scope::Of(site) => Some(site),
        };
        self.inner
            .catalogue
            .run_page(of, behind, skip, room, view)
            .await
    }
}

/// A lineage as the API shows it.
pub(crate) fn lineage_view(lineage: Lineage) -> ModelLineage {
    let inputs = lineage.inputs.iter().map(Into::into).collect();
    ModelLineage {
        run: lineage.run,
        from: lineage.from,
        on: lineage.on,
        inputs,
    }
}

fn time(ms: i64) -> String {
    jiff::Timestamp::from_millisecond(ms)
        .map(clock::rfc3339)
        .unwrap_or_default()
}

fn view(run: &Run) -> types::Run {
    let trainer = run.site.as_ref().map(|site| {
        let ended = site.ended.as_ref();
        let phase = serde_json::to_value(site.phase)
            .ok()
            .and_then(|v| v.as_str().map(str::to_owned));
        RunTrainer {
            phase: phase.unwrap_or_default(),
            starts: site.starts,
            started_at: site.started_ms.map(time),
            ended_at: ended.map(|e| time(e.ended_ms)),
            exit_code: ended.and_then(|e| e.exit_code),
            signal: ended.and_then(|e| e.signal),
            message: site.words().map(str::to_owned),
            tail: ended.map(|e| e.tail.to_string()),
        }
    });
    types::Run {
        name: run.spec.name.clone(),
        from: run.spec.from.clone(),
        on: run.spec.on.clone(),
        state: run.state,
        message: run.message(),
        next: run.next.clone(),
        inputs: run.spec.inputs.iter().map(Into::into).collect(),
        expect: run.spec.expect.to_string(),
        model: run.model.as_ref().map(|m| RunModel {
            artifact: m.artifact.to_string(),
            digest: m.digest.hex(),
        }),
        delivery: run.spec.delivery.to_string(),
        home: run.home.as_ref().map(ToString::to_string),
        trainer,
        released: run.released,
        created_at: time(run.spec.created_ms),
        deadline_at: time(run.spec.deadline_ms),
        finished_at: run.finished_ms.map(time),
    }
}

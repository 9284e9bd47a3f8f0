//! The whole run, as the hub stores it.
//!
//! ```text
//! delivering ─ inputs there ─▶ waiting ─ trainer began ─▶ training ─ ended well, or `finish` ─▶
//! publishing
//!                                                            └──────── published with --run ───────┬──┘
//!                       done ◀─ committed at `from` ─ returning ◀───────── model in the catalogue ─┘
//! ```
//! Each state may end as `cancelled` by a user, or as `failed` when the trainer failed or the
//! deadline passed before there is a model. A stalled transfer does not fail the run: its reason is
//! reported, and the run continues when a user has fixed it. A `finish` that arrives before the hub
//! knows that the platform has started is stored until then.

use serde::{Deserialize, Serialize};

use super::RunState;
use super::site::Phase;
use super::{Model, RunReport, Spec, Want};
use crate::transfer::State as Transfer;
use base::fault::Fault;
use base::names::TransferId;

/// The message for a run without a model at its deadline.
const LATE: &str = "its time is up, and there is no model yet";

/// One run at the hub.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The request.
    pub spec: Spec,
    /// Its state.
    pub state: RunState,
    /// Why it is stalled, or why it failed.
    pub message: Option<String>,
    /// The next step for the user.
    pub next: Option<String>,
    /// The model, when it is in the catalogue.
    pub model: Option<Model>,
    /// The transfer of the model to the requesting site.
    pub home: Option<TransferId>,
    /// The last report of the site.
    pub site: Option<RunReport>,
    /// The platform's report of its end, if it came before the site reported its start.
    #[serde(default)]
    pub early: Option<Finish>,
    /// The time of its end.
    pub finished_ms: Option<i64>,
    /// Whether the site has removed everything that it borrowed.
    pub released: bool,
}

/// A platform's report that it has finished.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finish {
    /// The reason of a failure; `None`: the model is in the output folder.
    pub failed: Option<String>,
}

/// A transfer, as far as it concerns a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservedTransfer {
    /// Its id.
    pub id: TransferId,
    /// Its state.
    pub state: Transfer,
    /// The reason, if it is stalled.
    pub message: Option<String>,
}

/// What happens to a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// An observation: the transfers of the inputs (none before the delivery; `None`: already at
    /// the site), and the transfer of the model.
    Looked {
        /// Whether the delivery has started.
        delivered: bool,
        /// The transfers of the inputs.
        inputs: Vec<ObservedTransfer>,
        /// The transfer of the model.
        home: Option<ObservedTransfer>,
    },
    /// A report of the site.
    Reported(Box<RunReport>),
    /// A model was published for this run.
    Published(Model),
    /// The platform reports its end, with success or failure.
    Finish(Finish),
    /// A user cancels it.
    Cancel,
}

/// An effect. Each may be performed twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Deliver the inputs to the site that trains.
    Borrow,
    /// Deliver the model to the requesting site, and record its lineage.
    SendHome,
    /// Cancel the run's own open transfers.
    Abandon,
}

impl Run {
    /// A new run.
    pub fn new(spec: Spec) -> Self {
        Self {
            spec,
            state: RunState::Delivering,
            message: None,
            next: None,
            model: None,
            home: None,
            site: None,
            early: None,
            finished_ms: None,
            released: false,
        }
    }

    /// Whether the run still needs work.
    pub fn is_open(&self) -> bool {
        !(self.state.is_final() && self.released)
    }

    /// The request for the training site.
    pub fn want(&self) -> Want {
        match self.state {
            RunState::Delivering | RunState::Waiting | RunState::Training => Want::Train,
            RunState::Publishing => Want::Publish,
            RunState::Returning | RunState::Done => Want::Release,
            RunState::Failed | RunState::Cancelled => Want::Stop,
        }
    }

    /// Whether the hub has a receipt for every input.
    pub fn is_ready(&self) -> bool {
        self.state != RunState::Delivering
    }

    /// The message for users: why it is stalled or how it ended, and which borrowed artifacts
    /// remain at the training site.
    pub fn message(&self) -> Option<String> {
        let left = self
            .site
            .iter()
            .flat_map(|site| &site.left)
            .map(|why| format!("at {}: {why}", self.spec.on));
        let all: Vec<String> = self.message.iter().cloned().chain(left).collect();
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// Whether a model may still be published.
    fn is_making(&self) -> bool {
        matches!(
            self.state,
            RunState::Delivering | RunState::Waiting | RunState::Training | RunState::Publishing
        )
    }

    fn say(&mut self, message: Option<String>, next: &str) {
        self.next = message.is_some().then(|| next.to_owned());
        self.message = message;
    }

    fn end(&mut self, state: RunState, why: Option<String>, next: &str, now_ms: i64) {
        self.state = state;
        self.finished_ms = Some(now_ms);
        self.say(why, next);
    }

    fn fail(&mut self, why: String, now_ms: i64) {
        self.end(
            RunState::Failed,
            Some(why),
            "fix the cause, then start a run with another name",
            now_ms,
        );
    }

    fn enter(&mut self, state: RunState) {
        self.state = state;
        self.say(None, "");
    }
}

/// Processes an event. A refusal leaves the run unchanged.
pub fn step(run: &Run, event: Event, now_ms: i64) -> Result<(Run, Vec<Effect>), Fault> {
    let mut run = run.clone();
    let effects = match event {
        Event::Looked {
            delivered,
            inputs,
            home,
        } => looked(&mut run, delivered, &inputs, home, now_ms),
        Event::Reported(report) => {
            reported(&mut run, *report, now_ms);
            Vec::new()
        }
        Event::Published(model) => {
            published(&mut run, model)?;
            Vec::new()
        }
        Event::Finish(request) => {
            finish(&mut run, request, now_ms)?;
            Vec::new()
        }
        Event::Cancel => {
            cancel(&mut run, now_ms)?;
            Vec::new()
        }
    };
    Ok((run, effects))
}

fn looked(
    run: &mut Run,
    delivered: bool,
    inputs: &[ObservedTransfer],
    home: Option<ObservedTransfer>,
    now_ms: i64,
) -> Vec<Effect> {
    if run.is_making() && now_ms >= run.spec.deadline_ms {
        run.fail(LATE.into(), now_ms);
    }
    match run.state {
        RunState::Delivering if !delivered => return vec![Effect::Borrow],
        RunState::Delivering => match inputs.iter().find(|seen| seen.state != Transfer::Done) {
            None => run.enter(RunState::Waiting),
            Some(_) => {
                let stuck = inputs
                    .iter()
                    .filter(|seen| seen.state != Transfer::Done)
                    .find(|seen| seen.message.is_some());
                let next = format!("see 'packhorse status {}'", run.spec.delivery);
                run.say(stuck.map(|seen| describe(seen, "an input")), &next);
            }
        },
        RunState::Waiting | RunState::Training => {
            let message = run
                .site
                .as_ref()
                .and_then(|site| site.message.as_deref())
                .map(str::to_owned);
            run.say(message, "nothing, or see the log of the site that trains");
        }
        RunState::Publishing => {
            let message = run
                .site
                .as_ref()
                .and_then(|site| site.message.as_deref())
                .map(str::to_owned);
            run.say(message, "no action is needed: it continues automatically");
        }
        RunState::Returning => match home {
            None => return vec![Effect::SendHome],
            Some(home) => {
                run.home = Some(home.id.clone());
                match home.state {
                    Transfer::Done => run.end(RunState::Done, None, "", now_ms),
                    _ => {
                        let next = format!("see 'packhorse status {}'", home.id);
                        run.say(
                            home.message.is_some().then(|| describe(&home, "the model")),
                            &next,
                        );
                    }
                }
            }
        },
        RunState::Done | RunState::Failed | RunState::Cancelled => {
            // A failed transfer keeps its staged content until it is cancelled.
            let left = inputs
                .iter()
                .chain(&home)
                .any(|seen| !matches!(seen.state, Transfer::Done | Transfer::Cancelled));
            if left && run.state != RunState::Done {
                return vec![Effect::Abandon];
            }
        }
    }
    Vec::new()
}

fn describe(seen: &ObservedTransfer, what: &str) -> String {
    format!(
        "{what}: transfer {} is {}: {}",
        seen.id,
        seen.state.as_str(),
        seen.message.as_deref().unwrap_or_default()
    )
}

fn reported(run: &mut Run, report: RunReport, now_ms: i64) {
    if report.id != run.spec.id {
        return;
    }
    run.released = report.released;
    if run.is_making() {
        match report.phase {
            Phase::Waiting | Phase::Publishing | Phase::Published => {}
            Phase::Training if matches!(run.state, RunState::Delivering | RunState::Waiting) => {
                run.enter(RunState::Training);
            }
            Phase::Training => {}
            Phase::Trained if report.has_output => run.enter(RunState::Publishing),
            Phase::Trained => {
                run.fail("the trainer ended well, but left nothing in its output folder and published nothing with --run".into(), now_ms);
            }
            // The site may notice first and end the trainer itself.
            Phase::Failed if now_ms >= run.spec.deadline_ms => run.fail(LATE.into(), now_ms),
            Phase::Failed => {
                run.fail(
                    report.words().unwrap_or("the trainer failed").into(),
                    now_ms,
                );
            }
        }
    }
    run.site = Some(report);
    if run.state == RunState::Training
        && let Some(request) = run.early.take()
    {
        // It has no effect on a command, which finishes when its process ends.
        let _ = finish(run, request, now_ms);
    }
}

fn published(run: &mut Run, model: Model) -> Result<(), Fault> {
    let name = &run.spec.name;
    if run.model.as_ref() == Some(&model) {
        return Ok(());
    }
    if let Some(there) = &run.model {
        return Err(
            Fault::conflict(format!("run {name} has made its model: {}", there.artifact))
                .with_next("publish this without --run"),
        );
    }
    if !run.spec.expect.accepts(&model.artifact) {
        return Err(Fault::conflict(format!(
            "run {name} is to make {}, not {}",
            run.spec.expect, model.artifact
        ))
        .with_next(format!("publish it as {}", run.spec.expect)));
    }
    if !run.is_making() {
        return Err(
            Fault::conflict(format!("run {name} is {}", run.state.as_str()))
                .with_next("publish this without --run"),
        );
    }
    run.model = Some(model);
    run.enter(RunState::Returning);
    Ok(())
}

fn finish(run: &mut Run, request: Finish, now_ms: i64) -> Result<(), Fault> {
    let name = run.spec.name.clone();
    if run.state == RunState::Publishing
        || run.state == RunState::Returning
        || run.state == RunState::Done
    {
        return Ok(()); // a repeated report
    }
    let by_command = run.site.as_ref().is_some_and(|site| site.by_command);
    if run.state == RunState::Waiting && !by_command {
        // A fast platform may finish before the report of its start arrives.
        run.early = Some(request);
        return Ok(());
    }
    if run.state != RunState::Training && !(by_command && run.state == RunState::Waiting) {
        return Err(Fault::conflict(format!(
            "run {name} is {}: there is nothing to finish",
            run.state.as_str()
        ))
        .with_next(format!("see 'packhorse train show {name}'")));
    }
    if !run.site.as_ref().is_some_and(|site| site.by_platform) {
        return Err(Fault::conflict(format!(
            "the trainer of run {name} is a command: it finishes when that ends"
        ))
        .with_next(format!("wait, or 'packhorse train cancel {name}'")));
    }
    match request.failed {
        Some(why) => run.fail(format!("the training platform says: {why}"), now_ms),
        None => run.enter(RunState::Publishing),
    }
    Ok(())
}

fn cancel(run: &mut Run, now_ms: i64) -> Result<(), Fault> {
    match run.state {
        RunState::Cancelled => Ok(()),
        RunState::Done | RunState::Failed => Err(Fault::conflict(format!(
            "run {} is {}: there is nothing to cancel",
            run.spec.name,
            run.state.as_str()
        ))
        .with_next(format!("see 'packhorse train show {}'", run.spec.name))),
        _ => {
            run.end(
                RunState::Cancelled,
                Some("cancelled by a person".into()),
                "start a run of another name",
                now_ms,
            );
            Ok(())
        }
    }
}

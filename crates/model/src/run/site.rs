//! A run at the training site.
//!
//! ```text
//! waiting ─ hub says ready, inputs there, slot free ─▶ training ─ ended with 0 ─▶ trained ─ hub
//! says publish ─▶ publishing ─▶ published
//!     └──────────────┴─ no trainer, ended badly, deadline passed, stopped ─▶ failed
//! ```
//! Independent of the phase, `released` records whether everything borrowed was removed: when the
//! hub says that the run is over, or when its deadline has passed, even without the hub. [`may_go`]
//! decides which artifacts may be removed now.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Borrowed, DesiredRun, Ended, Model, RunReport, Spec, Want};
use base::limits::{TRAINER_CALL_OFF_MAX, TRAINER_STARTS_MAX};
use base::names::{ArtifactRef, RunName, TransferId};

/// The phase of a run at the site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Waits for its inputs or for a slot.
    Waiting,
    /// The trainer runs.
    Training,
    /// The trainer succeeded, or there is a model.
    Trained,
    /// Its output is being published.
    Publishing,
    /// The model is registered at the hub.
    Published,
    /// It failed or was stopped.
    Failed,
}

/// One run at the site that trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The request.
    pub spec: Spec,
    /// The hub's current request.
    pub want: Want,
    /// Whether the hub has a receipt for every input.
    #[serde(default)]
    pub ready: bool,
    /// The artifacts to remove at the end, from the hub's last message.
    pub borrowed: Vec<Borrowed>,
    /// The model, at this site or as the hub registered it.
    pub model: Option<Model>,
    /// Its phase.
    pub phase: Phase,
    /// Whether a platform trains.
    pub by_platform: bool,
    /// Whether the platform accepted the start call.
    pub called: bool,
    /// Whether the platform accepted the message that the run is over without a model, or is not
    /// called any more.
    #[serde(default)]
    pub called_off: bool,
    /// The number of starts of the trainer.
    pub starts: u32,
    /// The time of the last start.
    pub started_ms: Option<i64>,
    /// The trainer's end.
    pub ended: Option<Ended>,
    /// Whether its output folder has content.
    pub has_output: bool,
    /// What it waits for, or the reason of its failure.
    pub message: Option<String>,
    /// Transfers whose artifacts were removed.
    pub removed: Vec<TransferId>,
    /// Artifacts that could not be removed, with reasons, by transfer.
    #[serde(default)]
    pub left: BTreeMap<TransferId, String>,
    /// Whether the cleanup is complete.
    pub released: bool,
}

/// The trainer of this site, from the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trainer {
    /// No `[train]` section exists.
    None,
    /// None for the site that started this run: `[train] allow` does not name it.
    Refused,
    /// A command.
    Command,
    /// A platform that is called over HTTP.
    Platform,
}

/// The process of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Process {
    /// Never started, or ended without a record of its end.
    Absent,
    /// Running.
    Running,
    /// Ended.
    Ended(Ended),
}

/// An observation of the site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observation {
    /// The first input that is not committed yet.
    pub missing: Option<String>,
    /// Whether a slot for another run is free.
    pub turn: bool,
    /// The trainer.
    pub trainer: Trainer,
    /// The command's process.
    pub process: Process,
    /// Whether its output folder has content.
    pub has_output: bool,
    /// Whether a model was published for it here, and the hub does not know it yet.
    pub offering: bool,
    /// An artifact that was published in place from the run's folder: a start empties the folder
    /// and would delete it.
    pub kept: Option<String>,
    /// Whether the inputs were just verified and may be given to a trainer.
    pub checked: bool,
}

/// What happens to a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The hub's request.
    Wanted(Box<DesiredRun>),
    /// The hub's complete list does not contain it.
    Unlisted,
    /// An observation.
    Looked(Observation),
    /// The command could not be started, or the platform could not be called (this is tried again).
    NotStarted(String),
    /// The inputs cannot be verified now, for this reason; tried again.
    NotYet(String),
    /// The platform accepted the start call.
    Called,
    /// The platform accepted the message that the run is over.
    CalledOff,
    /// The model is registered at the hub.
    Published(Model),
    /// The registration failed; tried again if `retry`.
    NotPublished {
        /// The reason.
        why: String,
        /// Whether another attempt may succeed.
        again: bool,
    },
    /// A borrowed input was removed.
    Removed {
        /// The transfer that delivered it.
        transfer: TransferId,
        /// Why it remains, if only a person can remove it.
        stays: Option<String>,
    },
    /// The removal failed, and is tried again.
    NotRemoved {
        /// The transfer that delivered it.
        transfer: TransferId,
        /// The reason.
        why: String,
    },
}

/// An effect. Each may be performed twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Verify the inputs: then a trainer can be started.
    Check,
    /// Start the command with an empty folder, or call the platform.
    Start,
    /// End the command; send a platform the message that the run is over, until it accepts.
    Stop,
    /// Publish the output folder.
    Publish,
    /// Remove these inputs.
    Remove(Vec<Borrowed>),
}

impl Run {
    /// A new run from the hub.
    pub fn new(desired: DesiredRun) -> Self {
        Self {
            spec: desired.spec,
            want: desired.want,
            ready: desired.ready,
            borrowed: desired.borrowed,
            model: desired.model,
            phase: Phase::Waiting,
            by_platform: false,
            called: false,
            called_off: false,
            starts: 0,
            started_ms: None,
            ended: None,
            has_output: false,
            message: None,
            removed: Vec::new(),
            left: BTreeMap::new(),
            released: false,
        }
    }

    /// The report for the hub.
    pub fn report(&self) -> RunReport {
        RunReport {
            name: self.spec.name.clone(),
            id: self.spec.id.clone(),
            phase: self.phase,
            by_platform: self.by_platform,
            by_command: false,
            starts: self.starts,
            started_ms: self.started_ms,
            ended: self.ended.clone(),
            has_output: self.has_output,
            model: self.model.clone(),
            message: self.message.as_deref().map(Into::into),
            removed: self.removed.clone(),
            left: self.left.values().map(|why| why.as_str().into()).collect(),
            released: self.released,
        }
    }

    /// Whether its trainer reads this artifact or may start to.
    fn uses(&self, artifact: &ArtifactRef) -> bool {
        let may = match self.phase {
            Phase::Waiting => self.want == Want::Train,
            Phase::Training => true,
            Phase::Trained | Phase::Publishing | Phase::Published | Phase::Failed => false,
        };
        may && self
            .spec
            .inputs
            .iter()
            .any(|input| input.artifact == *artifact)
    }

    /// Whether the run still needs work: a platform may still need a message when everything else
    /// is done.
    pub fn is_open(&self) -> bool {
        !self.released || self.owes_word()
    }

    /// Whether a called platform still needs the message that the run is over without a model.
    fn owes_word(&self) -> bool {
        self.by_platform && self.starts > 0 && self.model.is_none() && !self.called_off
    }

    fn is_making(&self) -> bool {
        matches!(
            self.phase,
            Phase::Waiting | Phase::Training | Phase::Trained | Phase::Publishing
        )
    }

    fn fail(&mut self, why: impl Into<String>) {
        self.phase = Phase::Failed;
        self.message = Some(why.into());
    }
}

/// Whether a run may remove this now: the hub's current message lists exactly this, and no other
/// run at this site uses it. The hub takes a run with a model for finished, but a trainer that
/// published by itself may still run.
pub fn may_go(open: &[Run], run: &RunName, borrowed: &Borrowed) -> bool {
    let (own, others): (Vec<&Run>, Vec<&Run>) =
        open.iter().partition(|other| other.spec.name == *run);
    own.iter().any(|own| own.borrowed.contains(borrowed))
        && !others.iter().any(|other| other.uses(&borrowed.artifact))
}

/// Processes an event.
pub fn step(run: &Run, event: Event, now_ms: i64) -> (Run, Vec<Effect>) {
    let mut run = run.clone();
    let effects = match event {
        Event::Wanted(desired) => {
            run.want = desired.want;
            run.ready = desired.ready;
            run.borrowed = desired.borrowed;
            run.model = desired.model.or(run.model);
            run.left
                .retain(|transfer, _| run.borrowed.iter().any(|b| b.transfer == *transfer));
            // More artifacts may be removable than the last message said.
            run.released &= run
                .borrowed
                .iter()
                .all(|b| run.removed.contains(&b.transfer));
            Vec::new()
        }
        Event::Unlisted => {
            run.want = Want::Stop;
            Vec::new()
        }
        Event::Looked(seen) => looked(&mut run, &seen, now_ms),
        Event::NotStarted(why) => {
            match run.by_platform {
                true => run.message = Some(why),
                false => run.fail(why),
            }
            Vec::new()
        }
        Event::NotYet(why) => {
            run.message = Some(why);
            Vec::new()
        }
        Event::CalledOff => {
            run.called_off = true;
            Vec::new()
        }
        Event::Called => {
            run.called = true;
            run.message = None;
            Vec::new()
        }
        Event::Published(model) => {
            run.phase = Phase::Published;
            run.model = Some(model);
            run.message = None;
            Vec::new()
        }
        Event::NotPublished { why, again: true } => {
            run.message = Some(why);
            Vec::new()
        }
        Event::NotPublished { why, again: false } => {
            run.fail(why);
            Vec::new()
        }
        Event::Removed { transfer, stays } => {
            run.left.remove(&transfer);
            run.left.extend(stays.map(|why| (transfer.clone(), why)));
            if !run.removed.contains(&transfer) {
                run.removed.push(transfer);
            }
            Vec::new()
        }
        Event::NotRemoved { transfer, why } => {
            run.left.insert(transfer, why);
            Vec::new()
        }
    };
    (run, effects)
}

fn looked(run: &mut Run, seen: &Observation, now_ms: i64) -> Vec<Effect> {
    let late = now_ms >= run.spec.deadline_ms;
    let running = seen.process == Process::Running;
    run.has_output = seen.has_output;
    let over = run.want == Want::Stop || late;
    if over && running {
        return vec![Effect::Stop];
    }
    if over || run.want == Want::Release {
        // A trainer that published by itself may still work; the deadline of the run limits its
        // time.
        if running {
            run.message = None;
            return Vec::new();
        }
        let mut effects = Vec::new();
        if let Process::Ended(ended) = &seen.process {
            run.ended.get_or_insert_with(|| ended.clone());
        }
        // The site does not control a platform's process.
        if over && run.owes_word() {
            let until_ms = run
                .spec
                .deadline_ms
                .saturating_add(TRAINER_CALL_OFF_MAX.as_millis() as i64);
            match now_ms < until_ms {
                true => effects.push(Effect::Stop),
                false => run.called_off = true,
            }
        }
        if run.is_making() {
            run.message = None;
            if over && run.model.is_none() {
                run.fail(if late {
                    "its time is up"
                } else {
                    "the run was ended"
                });
            }
        }
        match run.phase {
            // The trainer has ended and reads nothing any more.
            Phase::Training => run.phase = Phase::Trained,
            // Publishing is complete when the hub knows the model.
            Phase::Publishing => run.phase = Phase::Published,
            Phase::Waiting | Phase::Trained | Phase::Published | Phase::Failed => {}
        }
        effects.extend(release(run));
        return effects;
    }
    // A publish that the hub does not know yet decides: nothing may overtake it, and another start
    // must not delete its bytes.
    if seen.offering && !running && run.is_making() {
        if let Process::Ended(ended) = &seen.process {
            run.ended = Some(ended.clone());
        }
        run.message = Some("waits until the hub knows the model that was published for it".into());
        return Vec::new();
    }
    match run.phase {
        Phase::Waiting if seen.trainer == Trainer::None => {
            run.fail("this site trains for nobody: its configuration has no [train]");
        }
        Phase::Waiting if seen.trainer == Trainer::Refused => refuse(run),
        Phase::Waiting => {
            run.by_platform = seen.trainer == Trainer::Platform;
            match (&seen.missing, &seen.kept) {
                (Some(missing), _) => run.message = Some(format!("waits for {missing}")),
                (None, _) if !run.ready => {
                    run.message =
                        Some("waits for the hub to say that all of its inputs are here".into());
                }
                (None, Some(kept)) => {
                    run.fail(format!("its folder belongs to an older run of this name: {kept} is published from it"));
                }
                (None, None) if !seen.turn => {
                    run.message = Some("waits for its turn: other runs train here".into());
                }
                (None, None) if !seen.checked => return vec![Effect::Check],
                (None, None) => return start(run, now_ms),
            }
        }
        Phase::Training if run.by_platform => {
            if run.want == Want::Publish {
                return publish(run);
            }
            match run.called {
                true => {}
                false if seen.trainer == Trainer::Refused => refuse(run),
                false => return vec![Effect::Start],
            }
        }
        Phase::Training => match &seen.process {
            Process::Running => run.message = None,
            Process::Absent => match &seen.kept {
                // If it is the run's model, the hub knows it and says so when it is connected.
                Some(kept) => {
                    run.message = Some(format!(
                        "its trainer ended and is not started again: {kept} is published from the run's folder"
                    ));
                }
                None if seen.trainer == Trainer::Refused => refuse(run),
                None if run.starts >= TRAINER_STARTS_MAX => {
                    run.fail(format!(
                        "the trainer was started {} times and never said how it ended",
                        run.starts
                    ));
                }
                None if !seen.checked => return vec![Effect::Check],
                None => return start(run, now_ms),
            },
            Process::Ended(ended) => {
                run.ended = Some(ended.clone());
                run.message = None;
                match ended.is_well() {
                    true => run.phase = Phase::Trained,
                    false => run.fail(ended.message.to_string()),
                }
            }
        },
        Phase::Trained if run.want == Want::Publish => return publish(run),
        Phase::Publishing => return vec![Effect::Publish],
        Phase::Trained | Phase::Published | Phase::Failed => {}
    }
    Vec::new()
}

fn start(run: &mut Run, now_ms: i64) -> Vec<Effect> {
    run.phase = Phase::Training;
    run.starts += 1;
    run.started_ms = Some(now_ms);
    run.message = None;
    vec![Effect::Start]
}

fn refuse(run: &mut Run) {
    let from = &run.spec.from;
    run.fail(format!("site {} does not train for {from}: [train] allow in its configuration does not name {from}", run.spec.on));
}

fn publish(run: &mut Run) -> Vec<Effect> {
    if !run.has_output {
        run.fail(
            "there is nothing in the run's output folder, and nothing was published with --run",
        );
        return Vec::new();
    }
    run.phase = Phase::Publishing;
    run.message = None;
    vec![Effect::Publish]
}

fn release(run: &mut Run) -> Vec<Effect> {
    let left: Vec<Borrowed> = run
        .borrowed
        .iter()
        .filter(|b| !run.removed.contains(&b.transfer))
        .cloned()
        .collect();
    // Before the hub says that the run is over, more artifacts may be borrowed.
    run.released = left.is_empty() && matches!(run.want, Want::Stop | Want::Release);
    if left.is_empty() {
        Vec::new()
    } else {
        vec![Effect::Remove(left)]
    }
}

//! A run at the site that trains.
//!
//! ```text
//! waiting ─ hub says ready, inputs there, turn free ─▶ training ─ ended with 0 ─▶ trained ─ hub says publish ─▶ publishing ─▶ published
//!     └──────────────┴─ no trainer, ended badly, time is up, stopped ─▶ failed
//! ```
//! Beside the phase stands whether all that was borrowed is gone (`released`): when the hub says
//! that the run is over, or when its time is up, the hub heard or not. [`may_go`] says what of it
//! may be taken away, whatever was said before.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Borrowed, DesiredRun, Ended, Model, RunReport, Spec, Want};
use base::limits::{TRAINER_CALL_OFF_MAX, TRAINER_STARTS_MAX};
use base::names::{ArtifactRef, RunName, TransferId};

/// How far a run is at the site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// For its inputs, or for its turn.
    Waiting,
    /// The trainer works.
    Training,
    /// It ended well; once there is a model, in whatever way.
    Trained,
    /// What it made is being published.
    Publishing,
    /// The model is registered at the hub.
    Published,
    /// It ended badly, or was ended.
    Failed,
}

/// One run at the site that trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// What was asked for.
    pub spec: Spec,
    /// What the hub wants.
    pub want: Want,
    /// Whether the hub has seen every input arrive.
    #[serde(default)]
    pub ready: bool,
    /// What is to be removed in the end, as the hub said last.
    pub borrowed: Vec<Borrowed>,
    /// The model, here or as the hub knows it.
    pub model: Option<Model>,
    /// How far it is.
    pub phase: Phase,
    /// Whether a platform trains.
    pub by_platform: bool,
    /// Whether the platform took the call.
    pub called: bool,
    /// Whether the platform has heard that the run is over without a model, or is told so no more.
    #[serde(default)]
    pub called_off: bool,
    /// How often the trainer was started.
    pub starts: u32,
    /// When last.
    pub started_ms: Option<i64>,
    /// How it ended.
    pub ended: Option<Ended>,
    /// Whether there is something in its output folder.
    pub has_output: bool,
    /// What it waits for, or why it failed.
    pub message: Option<String>,
    /// Transfers whose artifacts were removed.
    pub removed: Vec<TransferId>,
    /// What is there still though it should be gone, and why, by its transfer.
    #[serde(default)]
    pub left: BTreeMap<TransferId, String>,
    /// Whether nothing is left to be cleaned up.
    pub released: bool,
}

/// Who trains here, as the config says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trainer {
    /// Nobody: there is no `[train]`.
    None,
    /// Not for the site that started this run: `[train] allow` does not name it.
    Refused,
    /// A command.
    Command,
    /// A platform that is called.
    Platform,
}

/// A command's process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Process {
    /// Never started, or gone without having said how it ended.
    Absent,
    /// Works.
    Running,
    /// Ended.
    Ended(Ended),
}

/// What is there, when somebody looks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observation {
    /// The first input that is not committed yet.
    pub missing: Option<String>,
    /// Whether another run may train beside those that do.
    pub turn: bool,
    /// Who trains.
    pub trainer: Trainer,
    /// The command's process.
    pub process: Process,
    /// Whether there is something in its output folder.
    pub has_output: bool,
    /// Whether a model was published for it here, and the hub has not heard of that yet.
    pub offering: bool,
    /// An artifact that was published out of the run's folder and is read there: a start, which
    /// empties that, would wipe it.
    pub kept: Option<String>,
    /// Whether the inputs themselves were looked at just now, and may be given to a trainer.
    pub checked: bool,
}

/// What happens to a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// What the hub wants of it.
    Wanted(Box<DesiredRun>),
    /// The hub, who lists all its runs, does not list it.
    Unlisted,
    /// Somebody looked.
    Looked(Observation),
    /// The command could not be started at all, or the platform not called, which is tried again.
    NotStarted(String),
    /// The inputs cannot be looked at now, for this reason; tried again.
    NotYet(String),
    /// The platform took the call.
    Called,
    /// The platform has heard that the run is over.
    CalledOff,
    /// The model is registered at the hub.
    Published(Model),
    /// It could not be; tried again if so said.
    NotPublished {
        /// Why.
        why: String,
        /// Whether trying again helps.
        again: bool,
    },
    /// A borrowed input is given back.
    Removed {
        /// The transfer that brought it.
        transfer: TransferId,
        /// Why it lies there all the same, where only a person can take it away.
        stays: Option<String>,
    },
    /// It could not be removed, which is tried again.
    NotRemoved {
        /// The transfer that brought it.
        transfer: TransferId,
        /// Why.
        why: String,
    },
}

/// What is to be done for a run. Each may be done twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Look at the inputs themselves: nothing else keeps a trainer from being started.
    Check,
    /// Start the command from nothing, or call the platform.
    Start,
    /// End the command; of a platform, tell it that the run is over, until it has heard.
    Stop,
    /// Publish the output folder.
    Publish,
    /// Remove these inputs.
    Remove(Vec<Borrowed>),
}

impl Run {
    /// A run that the hub was just heard of.
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

    /// What the hub is told.
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

    /// Whether its trainer reads this artifact, or may begin to.
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

    /// Whether something is left to do here: a platform may still have to be told when all else is
    /// done.
    pub fn is_open(&self) -> bool {
        !self.released || self.owes_word()
    }

    /// Whether a platform that was called has still to hear, once the run is over, that there is no
    /// model.
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

/// Whether a run may give this back now: the hub still says so in these very words, and no other
/// run here has a use for it. The hub counts a run that has its model as one that needs nothing
/// more, but a trainer that published by itself may run on.
pub fn may_go(open: &[Run], run: &RunName, borrowed: &Borrowed) -> bool {
    let (own, others): (Vec<&Run>, Vec<&Run>) =
        open.iter().partition(|other| other.spec.name == *run);
    own.iter().any(|own| own.borrowed.contains(borrowed))
        && !others.iter().any(|other| other.uses(&borrowed.artifact))
}

/// Takes an event.
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
            // More may be free to be removed than when it was said before.
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
        // A trainer that published by itself may still have something to do; its time is bounded by
        // the run's.
        if running {
            run.message = None;
            return Vec::new();
        }
        let mut effects = Vec::new();
        if let Process::Ended(ended) = &seen.process {
            run.ended.get_or_insert_with(|| ended.clone());
        }
        // A platform's process is not ours to end.
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
            // Whatever trained is gone, and reads nothing any more.
            Phase::Training => run.phase = Phase::Trained,
            // That the hub knows a model is what publishing was for.
            Phase::Publishing => run.phase = Phase::Published,
            Phase::Waiting | Phase::Trained | Phase::Published | Phase::Failed => {}
        }
        effects.extend(release(run));
        return effects;
    }
    // What the hub has still to hear of decides: nothing may overtake it, nor may its bytes be
    // wiped by another start.
    if seen.offering && !running && run.is_making() {
        if let Process::Ended(ended) = &seen.process {
            run.ended = Some(ended.clone());
        }
        run.message =
            Some("waits for the hub to hear of the model that was published for it".into());
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
                    run.fail(format!("its folder is that of an older run of this name: {kept}, published out of it, is read there"));
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
                // If it is the run's model, the hub knows it, and says so as soon as there is a
                // line.
                Some(kept) => {
                    run.message = Some(format!(
                        "its trainer is gone, and is not started anew: {kept} is read in the run's folder"
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
    // Before the hub said that it is over, more may be borrowed still.
    run.released = left.is_empty() && matches!(run.want, Want::Stop | Want::Release);
    if left.is_empty() {
        Vec::new()
    } else {
        vec![Effect::Remove(left)]
    }
}

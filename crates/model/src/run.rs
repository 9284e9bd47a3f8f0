//! Cross-site training runs: site `from` borrows the trainer of site `on`. The data is delivered
//! there, the trainer runs, and the model is returned.
//!
//! Two state machines without I/O: [`hub`] is the whole run, [`site`] the part of the training
//! site. Each takes an event and returns the new state and the due effects; `hub::runs` and
//! `site::runs` perform them. Nothing depends on one message or one effect: the hub repeatedly
//! sends the site all its runs ([`DesiredRun`]), the site reports each run ([`RunReport`]), due
//! effects are returned at every observation until their result is observed, and every effect may
//! be repeated. Both states are rows in the catalogues, written before anything is performed or
//! reported.

pub mod hub;
mod request;
pub mod site;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use base::fault::Fault;
use base::limits::{DELIVERY_ARTIFACTS_MAX, TRAINER_TAIL_BYTES};
use base::list;
use base::names::{
    ArtifactRef, DeliveryId, Kind, NAME_BYTES_MAX, RunId, RunName, SiteName, TransferId,
};
use base::number;
use base::text::{Message, Text};
use content::manifest::Digest;
pub use request::{RunActionRequest, RunInput, RunRequest, RunState, RunVerb};

/// One artifact that a run needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Input {
    /// The artifact.
    pub artifact: ArtifactRef,
    /// Its digest at the start of the run, so that the reference cannot change its meaning.
    pub digest: Digest,
    /// Its bytes.
    #[serde(deserialize_with = "number::count")]
    pub bytes: u64,
}

impl From<&Input> for RunInput {
    fn from(input: &Input) -> Self {
        Self {
            artifact: input.artifact.to_string(),
            digest: input.digest.hex(),
            bytes: input.bytes,
        }
    }
}

/// The expected model of a run: `model/NAME`, or `model/NAME:VERSION`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Expect {
    /// Its reference, with a default version if none was given.
    name: String,
    version: Option<String>,
}

impl Expect {
    /// The reference under which the daemon publishes the output.
    pub fn reference(&self, run: &RunName) -> Result<ArtifactRef, Fault> {
        Ok(ArtifactRef::new(
            Kind::Model,
            &self.name,
            self.version.as_deref().unwrap_or(run.as_str()),
        )?)
    }

    /// Whether this is the model that was expected.
    pub fn accepts(&self, artifact: &ArtifactRef) -> bool {
        artifact.kind == Kind::Model
            && artifact.name() == self.name
            && self
                .version
                .as_deref()
                .is_none_or(|version| version == artifact.version())
    }
}

impl FromStr for Expect {
    type Err = Fault;
    fn from_str(text: &str) -> Result<Self, Fault> {
        let (series, version) = match text.split_once(':') {
            Some((series, version)) => (series, Some(version)),
            None => (text, None),
        };
        let whole: ArtifactRef = format!("{series}:{}", version.unwrap_or("v")).parse()?;
        if whole.kind != Kind::Model {
            return Err(Fault::usage(format!(
                "a run makes a model, and {text} is {}",
                whole.kind.with_article()
            ))
            .with_next("expect model/NAME[:VERSION]"));
        }
        Ok(Self {
            name: whole.name().into(),
            version: version.map(Into::into),
        })
    }
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "model/{}", self.name)?;
        self.version
            .as_ref()
            .map_or(Ok(()), |version| write!(f, ":{version}"))
    }
}

impl From<Expect> for String {
    fn from(value: Expect) -> String {
        value.to_string()
    }
}

impl TryFrom<String> for Expect {
    type Error = Fault;
    fn try_from(value: String) -> Result<Self, Fault> {
        value.parse()
    }
}

/// A requested run: a [`RunRequest`] whose names are parsed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunOrder {
    /// Its name.
    pub name: RunName,
    /// The site that borrows the trainer and receives the model.
    pub from: SiteName,
    /// The site that trains.
    pub on: SiteName,
    /// Its inputs.
    pub inputs: Vec<ArtifactRef>,
    /// The expected model.
    pub expect: Expect,
    /// Its time limit, seconds.
    pub ttl_seconds: u64,
}

impl TryFrom<RunRequest> for RunOrder {
    type Error = Fault;
    fn try_from(request: RunRequest) -> Result<Self, Fault> {
        Ok(Self {
            name: request.name.parse()?,
            from: request.from.parse()?,
            on: request.on.parse()?,
            expect: request.expect.parse()?,
            inputs: request
                .inputs
                .iter()
                .map(|input| input.parse())
                .collect::<Result<_, _>>()?,
            ttl_seconds: request.ttl_seconds,
        })
    }
}

/// A requested action on a run: a [`RunActionRequest`] whose name is parsed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunAct {
    /// The run.
    pub name: RunName,
    /// The artifact.
    pub action: RunVerb,
    /// Only for `finish`: the reason of a failure.
    #[serde(default)]
    pub failed: Option<Message>,
}

impl TryFrom<RunActionRequest> for RunAct {
    type Error = Fault;
    fn try_from(request: RunActionRequest) -> Result<Self, Fault> {
        Ok(Self {
            name: known(&request.name)?,
            action: request.action,
            failed: request.failed.map(Into::into),
        })
    }
}

/// The error for a run that does not exist or that the requester may not see.
pub fn no_run(name: &str) -> Fault {
    Fault::not_found(format!("there is no run {}", name.escape_debug()))
        .with_next("'packhorse train list' lists them")
}

/// The name of a run in a request. Every run has a name that parses.
pub fn known(name: &str) -> Result<RunName, Fault> {
    name.parse()
        .map_err(|_| no_run(&name.chars().take(NAME_BYTES_MAX).collect::<String>()))
}

/// The request; it never changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// The run's name, unique at its hub.
    pub name: RunName,
    /// Distinguishes this run from one of the same name at another hub.
    pub id: RunId,
    /// The site that borrows the trainer and receives the model.
    pub from: SiteName,
    /// The site that trains.
    pub on: SiteName,
    /// Its inputs, in the requested order.
    pub inputs: Vec<Input>,
    /// The expected model.
    pub expect: Expect,
    /// The delivery of the inputs.
    pub delivery: DeliveryId,
    /// The time of the request.
    pub created_ms: i64,
    /// The deadline for its model.
    pub deadline_ms: i64,
}

/// The model that a run made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Model {
    /// Its reference.
    pub artifact: ArtifactRef,
    /// Its digest.
    pub digest: Digest,
}

/// The origin of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// The run that created it.
    pub run: RunName,
    /// The site that receives the model.
    pub from: SiteName,
    /// The site that trained.
    pub on: SiteName,
    /// The inputs.
    pub inputs: Vec<Input>,
}

impl From<&Spec> for Lineage {
    fn from(spec: &Spec) -> Self {
        Self {
            run: spec.name.clone(),
            from: spec.from.clone(),
            on: spec.on.clone(),
            inputs: spec.inputs.clone(),
        }
    }
}

/// The last part of a trainer's output. A byte that is not UTF-8 takes three.
pub type Tail = Text<{ 3 * TRAINER_TAIL_BYTES }>;

/// How a trainer ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Its exit code; absent when a signal ended it, or when it never ran.
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// A description of the end.
    pub message: Message,
    /// The last part of its output.
    pub tail: Tail,
    /// The time.
    pub ended_ms: i64,
}

impl Ended {
    /// Whether it succeeded.
    pub fn is_well(&self) -> bool {
        self.exit_code == Some(0)
    }
}

/// The hub's request for a run at the training site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Want {
    /// Train when the inputs are committed.
    Train,
    /// Publish the trainer's output folder.
    Publish,
    /// The model is registered: clean up when the trainer has ended.
    Release,
    /// The run is over: end the trainer and clean up.
    Stop,
}

/// A borrowed input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Borrowed {
    /// The transfer that delivered it.
    pub transfer: TransferId,
    /// The artifact.
    pub artifact: ArtifactRef,
    /// Its digest.
    pub digest: Digest,
    /// The generation of that transfer: content that a later generation delivered is not meant.
    /// `None`: an older hub does not send it.
    #[serde(default, deserialize_with = "number::optional_generation")]
    pub generation: Option<i64>,
}

/// A run that the hub requests from a site; every change sends the complete list of runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DesiredRun {
    /// The run.
    pub spec: Spec,
    /// The requested action.
    pub want: Want,
    /// Artifacts that only this run needs at the site: removed when it ends.
    pub borrowed: Vec<Borrowed>,
    /// The model, once the hub knows it.
    pub model: Option<Model>,
    /// Whether the hub has received a receipt for every input: earlier content at the site may be
    /// about to be removed. An older hub does not send this, and means true.
    #[serde(default = "yes")]
    pub ready: bool,
}

fn yes() -> bool {
    true
}

/// The state of a run at the training site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunReport {
    /// The run.
    pub name: RunName,
    /// Its unique id.
    pub id: RunId,
    /// Its phase.
    pub phase: site::Phase,
    /// Whether a platform trains, which reports its own end.
    pub by_platform: bool,
    /// Whether the trainer is a command, which reports its own end. An earlier version does not
    /// send this.
    #[serde(default)]
    pub by_command: bool,
    /// The number of starts of the trainer.
    pub starts: u32,
    /// The time of the last start.
    pub started_ms: Option<i64>,
    /// Its end.
    pub ended: Option<Ended>,
    /// Whether its output folder has content.
    pub has_output: bool,
    /// The published model.
    pub model: Option<Model>,
    /// What it waits for, or the reason of its failure.
    pub message: Option<Message>,
    /// Transfers whose artifacts were removed.
    #[serde(deserialize_with = "list::at_most::<_, _, DELIVERY_ARTIFACTS_MAX>")]
    pub removed: Vec<TransferId>,
    /// Borrowed artifacts that could not be removed, with reasons.
    #[serde(
        default,
        deserialize_with = "list::at_most::<_, _, DELIVERY_ARTIFACTS_MAX>"
    )]
    pub left: Vec<Message>,
    /// Whether the cleanup is complete.
    pub released: bool,
}

impl RunReport {
    /// The description for users: the trainer's failure, else the site's message, else the
    /// trainer's end.
    pub fn words(&self) -> Option<&str> {
        let ended = self.ended.as_ref();
        let badly = ended
            .filter(|ended| !ended.is_well())
            .map(|ended| &ended.message);
        badly
            .or(self.message.as_ref())
            .or(ended.map(|ended| &ended.message))
            .map(|text| &**text)
    }
}

#[cfg(test)]
mod tests;

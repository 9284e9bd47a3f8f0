//! Cross-site training runs: site `from` borrows site `on`. Its data goes there, is trained on, and
//! the model comes home.
//!
//! Two state machines without I/O: [`hub`] is the whole run, [`site`] the part of the site that
//! trains. Each takes an event and gives the new state and what is to be done; `hub::runs` and
//! `site::runs` do it. Nothing hangs on one message or one effect: the hub tells the site all its
//! runs again and again ([`DesiredRun`]), the site tells how each stands ([`RunReport`]), effects
//! that are due are given at every look until what they do is seen, and all may be done twice. Both
//! states are rows in the catalogues, written before anything is done or told.

pub mod hub;
mod request;
pub mod site;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use base::fault::Fault;
use base::limits::TRAINER_TAIL_BYTES;
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
    /// What.
    pub artifact: ArtifactRef,
    /// Its digest when the run was started; the reference cannot come to mean anything else.
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

/// The model that a run is to make: `model/NAME`, or `model/NAME:VERSION`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Expect {
    /// Its reference, with the version that it gets when none was said.
    name: String,
    version: Option<String>,
}

impl Expect {
    /// What the daemon publishes the output as.
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
                "a run makes a model, and {text} is a {}",
                whole.kind
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

/// A run as it is asked for: a [`RunRequest`] whose names are parsed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunOrder {
    /// Its name.
    pub name: RunName,
    /// Who borrows, and gets the model.
    pub from: SiteName,
    /// Who trains.
    pub on: SiteName,
    /// What it trains with.
    pub inputs: Vec<ArtifactRef>,
    /// What it is to make.
    pub expect: Expect,
    /// How long it may take, seconds.
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

/// What is to be done with a run: a [`RunActionRequest`] whose name is parsed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunAct {
    /// Which.
    pub name: RunName,
    /// What.
    pub action: RunVerb,
    /// `finish` only: why it failed, if it did.
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

/// The answer for a run that does not exist, and for one that somebody may not see.
pub fn no_run(name: &str) -> Fault {
    Fault::not_found(format!("there is no run {}", name.escape_debug()))
        .with_next("'packhorse train list' lists them")
}

/// The name of a run that somebody refers to. No run has a name that does not parse.
pub fn known(name: &str) -> Result<RunName, Fault> {
    name.parse()
        .map_err(|_| no_run(&name.chars().take(NAME_BYTES_MAX).collect::<String>()))
}

/// What was asked for; never changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// The run's name, unique at its hub.
    pub name: RunName,
    /// Tells this run from one of the same name at another hub.
    pub id: RunId,
    /// Who borrows, and gets the model.
    pub from: SiteName,
    /// Who trains.
    pub on: SiteName,
    /// What it trains with, in the order asked.
    pub inputs: Vec<Input>,
    /// What comes out.
    pub expect: Expect,
    /// The delivery that brings the inputs.
    pub delivery: DeliveryId,
    /// When it was asked for.
    pub created_ms: i64,
    /// When it must have made its model.
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

/// What a model was made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// The run that made it.
    pub run: RunName,
    /// For whom.
    pub from: SiteName,
    /// Where.
    pub on: SiteName,
    /// Of what.
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

/// The end of what a trainer said. A byte that is no UTF-8 takes three.
pub type Tail = Text<{ 3 * TRAINER_TAIL_BYTES }>;

/// How a trainer ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Its exit code; absent when a signal ended it, or it never ran.
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// What happened, in words.
    pub message: Message,
    /// The end of what it said.
    pub tail: Tail,
    /// When.
    pub ended_ms: i64,
}

impl Ended {
    /// Whether it ended well.
    pub fn is_well(&self) -> bool {
        self.exit_code == Some(0)
    }
}

/// What the hub wants of a run at the site that trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Want {
    /// Train, once the inputs are there.
    Train,
    /// Publish what the trainer left in its output folder.
    Publish,
    /// The model is known: clean up once the trainer has ended.
    Release,
    /// It is over: end the trainer, clean up.
    Stop,
}

/// A borrowed input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Borrowed {
    /// The transfer that brought it.
    pub transfer: TransferId,
    /// What.
    pub artifact: ArtifactRef,
    /// Its digest.
    pub digest: Digest,
    /// Which time the transfer brought it: what was brought anew since is not meant. `None`: an
    /// older hub does not say.
    #[serde(default, deserialize_with = "number::optional_generation")]
    pub generation: Option<i64>,
}

/// A run that the hub wants of a site; sent with all others whenever one changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DesiredRun {
    /// The run.
    pub spec: Spec,
    /// What the site should do.
    pub want: Want,
    /// What nobody but this run wants at the site: to be removed when it ends.
    pub borrowed: Vec<Borrowed>,
    /// The model, once the hub knows it.
    pub model: Option<Model>,
    /// Whether the hub has seen every input arrive: what the site holds of them before may be about
    /// to go, or gone. An older hub does not say, and means it.
    #[serde(default = "yes")]
    pub ready: bool,
}

fn yes() -> bool {
    true
}

/// How a run stands at the site that trains.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunReport {
    /// Which.
    pub name: RunName,
    /// Which of that name.
    pub id: RunId,
    /// How far it is.
    pub phase: site::Phase,
    /// Whether a platform trains, which says itself when it is finished.
    pub by_platform: bool,
    /// Whether a command will train, which nobody finishes but itself. An earlier version does not
    /// say.
    #[serde(default)]
    pub by_command: bool,
    /// How often the trainer was started.
    pub starts: u32,
    /// When it was started last.
    pub started_ms: Option<i64>,
    /// How it ended.
    pub ended: Option<Ended>,
    /// Whether there is something in its output folder.
    pub has_output: bool,
    /// What it published.
    pub model: Option<Model>,
    /// What it waits for, or why it failed.
    pub message: Option<Message>,
    /// Transfers whose artifacts were removed.
    pub removed: Vec<TransferId>,
    /// What of the borrowed is there still though it should be gone, and why.
    #[serde(default)]
    pub left: Vec<Message>,
    /// Whether nothing of it is left to be cleaned up.
    pub released: bool,
}

impl RunReport {
    /// What is to be said of it: how the trainer ended badly, else what the site says, else how it
    /// ended.
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

//! Training runs: states, requests and lineage.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use base::limits::{MESSAGE_BYTES_MAX, NEXT_BYTES_MAX, TRAINER_TAIL_BYTES};
use base::names::{RunName, SiteName};
use base::text;
use model::run::{RunInput, RunState};

/// The state of a trainer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunTrainer {
    /// The phase of the run at its site: `waiting`, `training`, `trained`, `publishing`,
    /// `published`, `failed`.
    pub phase: String,
    /// The number of starts.
    pub starts: u32,
    /// The time of the last start.
    pub started_at: Option<String>,
    /// The time of its end.
    pub ended_at: Option<String>,
    /// Its exit code.
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// A description of its end.
    #[serde(default, deserialize_with = "text::optional::<_, MESSAGE_BYTES_MAX>")]
    pub message: Option<String>,
    /// The last part of its output.
    #[serde(
        default,
        deserialize_with = "text::optional::<_, { 3 * TRAINER_TAIL_BYTES }>"
    )]
    pub tail: Option<String>,
}

/// A training run: `from` borrows the trainer of `on`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Run {
    /// Its name.
    #[schema(value_type = String)]
    pub name: RunName,
    /// The site that borrows the trainer and receives the model.
    #[schema(value_type = String)]
    pub from: SiteName,
    /// The site that trains.
    #[schema(value_type = String)]
    pub on: SiteName,
    /// Its state.
    pub state: RunState,
    /// Why it is stalled, or why it failed.
    #[serde(default, deserialize_with = "text::optional::<_, MESSAGE_BYTES_MAX>")]
    pub message: Option<String>,
    /// The next step for the user.
    #[serde(default, deserialize_with = "text::optional::<_, NEXT_BYTES_MAX>")]
    pub next: Option<String>,
    /// Its inputs.
    pub inputs: Vec<RunInput>,
    /// The expected model: `model/NAME` or `model/NAME:VERSION`.
    pub expect: String,
    /// Its model: reference and digest.
    pub model: Option<RunModel>,
    /// The delivery of the inputs.
    pub delivery: String,
    /// The transfer of the model to the requesting site.
    pub home: Option<String>,
    /// The trainer, when its site has reported it.
    pub trainer: Option<RunTrainer>,
    /// Whether the training site has removed everything that it borrowed.
    pub released: bool,
    /// The time of the request.
    pub created_at: String,
    /// The deadline for its model.
    pub deadline_at: String,
    /// The time of its end.
    pub finished_at: Option<String>,
}

/// A model of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunModel {
    /// `model/name:version`.
    pub artifact: String,
    /// Its digest, hex.
    pub digest: String,
}

/// The selection of a run.
#[derive(Debug, Clone, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct RunQuery {
    /// Its name.
    pub name: String,
    /// Wait up to this many seconds for its end.
    pub wait: Option<u64>,
}

/// The lineage of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelLineage {
    /// The run that created it.
    #[schema(value_type = String)]
    pub run: RunName,
    /// The site that received it.
    #[schema(value_type = String)]
    pub from: SiteName,
    /// The site that trained.
    #[schema(value_type = String)]
    pub on: SiteName,
    /// The inputs: data, labels, code and image, by digest.
    pub inputs: Vec<RunInput>,
}

//! Training runs: how each stands, what is asked of one, and what a model was made of.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use base::limits::{MESSAGE_BYTES_MAX, NEXT_BYTES_MAX, TRAINER_TAIL_BYTES};
use base::names::{RunName, SiteName};
use base::text;
use model::run::{RunInput, RunState};

/// How a trainer did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunTrainer {
    /// How far the run is at its site: `waiting`, `training`, `trained`, `publishing`, `published`,
    /// `failed`.
    pub phase: String,
    /// How often it was started.
    pub starts: u32,
    /// When it was started last.
    pub started_at: Option<String>,
    /// When it ended.
    pub ended_at: Option<String>,
    /// Its exit code.
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// What happened, in words.
    #[serde(default, deserialize_with = "text::optional::<_, MESSAGE_BYTES_MAX>")]
    pub message: Option<String>,
    /// The end of what it said.
    #[serde(
        default,
        deserialize_with = "text::optional::<_, { 3 * TRAINER_TAIL_BYTES }>"
    )]
    pub tail: Option<String>,
}

/// A training run: `from` borrows `on`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Run {
    /// Its name.
    #[schema(value_type = String)]
    pub name: RunName,
    /// Who borrows, and gets the model.
    #[schema(value_type = String)]
    pub from: SiteName,
    /// Who trains.
    #[schema(value_type = String)]
    pub on: SiteName,
    /// Where it is.
    pub state: RunState,
    /// Why it stands, or why it ended badly.
    #[serde(default, deserialize_with = "text::optional::<_, MESSAGE_BYTES_MAX>")]
    pub message: Option<String>,
    /// What to do next about it.
    #[serde(default, deserialize_with = "text::optional::<_, NEXT_BYTES_MAX>")]
    pub next: Option<String>,
    /// What it trains with.
    pub inputs: Vec<RunInput>,
    /// The model that it is to make: `model/NAME` or `model/NAME:VERSION`.
    pub expect: String,
    /// The model that it made: reference and digest.
    pub model: Option<RunModel>,
    /// The delivery that brings the inputs.
    pub delivery: String,
    /// The transfer that brings the model home.
    pub home: Option<String>,
    /// The trainer, once its site has spoken of it.
    pub trainer: Option<RunTrainer>,
    /// Whether the site that trains has removed all that it borrowed.
    pub released: bool,
    /// When it was asked for.
    pub created_at: String,
    /// When it must have made its model.
    pub deadline_at: String,
    /// When it ended.
    pub finished_at: Option<String>,
}

/// A model that a run made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunModel {
    /// `model/name:version`.
    pub artifact: String,
    /// Its digest, hex.
    pub digest: String,
}

/// Which run.
#[derive(Debug, Clone, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct RunQuery {
    /// Its name.
    pub name: String,
    /// Wait up to this many seconds for its end.
    pub wait: Option<u64>,
}

/// What a model was made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelLineage {
    /// The run that made it.
    #[schema(value_type = String)]
    pub run: RunName,
    /// For whom.
    #[schema(value_type = String)]
    pub from: SiteName,
    /// Where.
    #[schema(value_type = String)]
    pub on: SiteName,
    /// Of what: data, labels, code and image, by digest.
    pub inputs: Vec<RunInput>,
}

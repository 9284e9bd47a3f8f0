//! Requests for training runs, and the names of their states.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The state of a training run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    /// Its inputs are being delivered.
    Delivering,
    /// The inputs are delivered; the trainer has not started.
    Waiting,
    /// The trainer runs.
    Training,
    /// The trainer succeeded; its output is being published.
    Publishing,
    /// The model is being delivered to the requesting site.
    Returning,
    /// The model is delivered.
    Done,
    /// It created no model.
    Failed,
    /// Cancelled by a user.
    Cancelled,
}

impl RunState {
    /// The name in JSON and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            RunState::Delivering => "delivering",
            RunState::Waiting => "waiting",
            RunState::Training => "training",
            RunState::Publishing => "publishing",
            RunState::Returning => "returning",
            RunState::Done => "done",
            RunState::Failed => "failed",
            RunState::Cancelled => "cancelled",
        }
    }

    /// Whether it has ended, except for the cleanup.
    pub fn is_final(self) -> bool {
        matches!(
            self,
            RunState::Done | RunState::Failed | RunState::Cancelled
        )
    }
}

/// An input of a run, or its model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunInput {
    /// `kind/name:version`.
    pub artifact: String,
    /// Its digest, hex.
    pub digest: String,
    /// Bytes of all its files.
    pub bytes: u64,
}

/// A request for a training run.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// Its name, unique: `[a-z0-9][a-z0-9._-]*`.
    pub name: String,
    /// The site that borrows the trainer and receives the model.
    pub from: String,
    /// The site that trains.
    pub on: String,
    /// Its inputs: `kind/name:version`, one or more.
    pub inputs: Vec<String>,
    /// The expected model: `model/NAME` or `model/NAME:VERSION`.
    pub expect: String,
    /// The time limit for the model, seconds.
    pub ttl_seconds: u64,
}

/// An action on a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RunVerb {
    /// The training platform has finished.
    Finish,
    /// Cancel it.
    Cancel,
}

/// A request to finish or cancel a run.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunActionRequest {
    /// The name of the run.
    pub name: String,
    /// The action.
    pub action: RunVerb,
    /// Only for `finish`: the reason of a failure.
    #[serde(default)]
    pub failed: Option<String>,
}

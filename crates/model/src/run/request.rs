//! What is asked of training runs, and the words for their states.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where a training run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    /// Its inputs are on their way.
    Delivering,
    /// They are there; the site has not begun yet.
    Waiting,
    /// The trainer works.
    Training,
    /// It ended well; what it made is being published.
    Publishing,
    /// The model is on its way home.
    Returning,
    /// The model is home.
    Done,
    /// It made no model.
    Failed,
    /// Given up by somebody.
    Cancelled,
}

impl RunState {
    /// The word in JSON and tables.
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

    /// Whether nothing more happens by itself, but for cleaning up.
    pub fn is_final(self) -> bool {
        matches!(
            self,
            RunState::Done | RunState::Failed | RunState::Cancelled
        )
    }
}

/// An artifact that a run trains with, or the model that it made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunInput {
    /// `kind/name:version`.
    pub artifact: String,
    /// Its digest, hex.
    pub digest: String,
    /// Bytes of all its files.
    pub bytes: u64,
}

/// Ask for a training run.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// Its name, unique: `[a-z0-9][a-z0-9._-]*`.
    pub name: String,
    /// The site that borrows, and gets the model.
    pub from: String,
    /// The site that trains.
    pub on: String,
    /// What it trains with: `kind/name:version`, one or more.
    pub inputs: Vec<String>,
    /// What it is to make: `model/NAME` or `model/NAME:VERSION`.
    pub expect: String,
    /// How long it may take to make it, seconds.
    pub ttl_seconds: u64,
}

/// What to do with a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RunVerb {
    /// The training platform has finished.
    Finish,
    /// Give it up.
    Cancel,
}

/// Ask to finish or cancel a run.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunActionRequest {
    /// Which.
    pub name: String,
    /// What.
    pub action: RunVerb,
    /// `finish` only: why it failed, if it did.
    #[serde(default)]
    pub failed: Option<String>,
}

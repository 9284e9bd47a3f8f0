//! What crosses the API: requests, answers, and the documented fields of `status`.
//!
//! Each subject has a file; here is what belongs to none: jobs, events, how many. Times are RFC
//! 3339 in UTC. Sizes are bytes. A field is never renamed or removed once released.

mod artifacts;
mod deliveries;
mod runs;
mod sites;
mod transfers;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

pub use artifacts::{
    Artifact, ArtifactDetail, ExportRequest, ImportRequest, PinRequest, PublishRequest, Published,
    ShowQuery, SourceOptions, VerifyRequest,
};
pub use deliveries::{DeliverRequest, Delivered, Delivery, DeliveryQuery, LeftOut, PlanRow};
pub use model::run::{RunActionRequest, RunInput, RunRequest, RunState, RunVerb};
pub use model::transfer::{Action, Bytes, State, TransferQuery};
pub use runs::{ModelLineage, Run, RunModel, RunQuery, RunTrainer};
pub use sites::{Site, TokenReply, TokenRequest};
pub use transfers::{ActionRequest, Transfer};

use base::fault::Fault;

/// Work that was accepted (202) and goes on: ask `GET /v1/jobs?id=…&wait=…`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// `running`, `done`, `failed` or `cancelled`.
    pub state: String,
    /// Bytes worked through so far.
    pub bytes: u64,
    /// Bytes in all, where known.
    pub total: Option<u64>,
    /// What it does now, in words.
    pub doing: String,
    /// What whoever asked should know beside the answer.
    #[serde(default)]
    pub notes: Vec<String>,
    /// The answer, once done.
    #[schema(value_type = Option<Object>)]
    pub result: Option<serde_json::Value>,
    /// The error, once failed or cancelled.
    #[schema(value_type = Option<Object>)]
    pub error: Option<Fault>,
}

/// Which job.
#[derive(Debug, Clone, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct JobQuery {
    /// Its id.
    pub id: String,
    /// Wait up to this many seconds for its end.
    pub wait: Option<u64>,
}

/// One event, as the stream and `--watch` carry it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Rises by one or more from event to event; the SSE `id`.
    pub seq: u64,
    /// When.
    pub at: String,
    /// `transfer`, `artifact` or `site`.
    pub what: String,
    /// The thing after the change (a [`Transfer`], [`Artifact`] or [`Site`]).
    #[schema(value_type = Object)]
    pub body: serde_json::Value,
}

/// Which events.
#[derive(Debug, Clone, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct EventQuery {
    /// Only those after this one; all that are kept when absent. `Last-Event-ID` goes before it.
    pub since: Option<u64>,
    /// JSON only: wait up to this many seconds for one.
    pub wait: Option<u64>,
    /// JSON only: at most this many (1,000 when absent).
    pub limit: Option<u32>,
    /// `json` for an array, `sse` for a stream; when absent the `Accept` header decides.
    pub format: Option<String>,
}

/// How many.
#[derive(Debug, Clone, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct LimitQuery {
    /// At most this many, newest first (1,000 when absent).
    pub limit: Option<u32>,
}

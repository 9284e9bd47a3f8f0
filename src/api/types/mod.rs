//! The data of the API: requests, answers, and the documented fields of `status`.
//!
//! Each subject has a file; this one has the common types: jobs, events, limits. Times are RFC 3339
//! in UTC. Sizes are bytes. A released field is never renamed or removed.

mod access;
mod artifacts;
mod deliveries;
mod members;
mod runs;
mod sites;
mod transfers;
mod workers;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

pub use access::{
    AccessQuery, AccessRotateRequest, AccessToken, AccessTokenReply, AccessTokenRequest,
};
pub use artifacts::{
    Artifact, ArtifactDetail, ExportLabelsRequest, ExportRequest, ImportRequest, PinRequest,
    PublishRequest, Published, ShowQuery, SourceOptions, VerifyRequest,
};
pub use deliveries::{DeliverRequest, Delivered, Delivery, DeliveryQuery, LeftOut, PlanRow};
pub use members::{
    MemberAction, MemberActionRequest, MemberCertificate, MemberChange, MemberQuery,
    MemberRevocation, Publisher, SetSiteRequest,
};
pub use model::run::{RunActionRequest, RunInput, RunRequest, RunState, RunVerb};
pub use model::transfer::{Action, Bytes, State, TransferQuery};
pub use runs::{ModelLineage, Run, RunModel, RunQuery, RunTrainer};
pub use sites::{Site, TokenLimits, TokenReply, TokenRequest};
pub use transfers::{ActionRequest, CURSOR_OF_HUB, Transfer};
pub use workers::{Worker, WorkerError};

use base::fault::Fault;

/// Accepted work (202) that continues: query `GET /v1/jobs?id=…&wait=…`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    /// Its id.
    pub id: String,
    /// `running`, `done`, `failed` or `cancelled`.
    pub state: String,
    /// Processed bytes.
    pub bytes: u64,
    /// Total bytes, if known.
    pub total: Option<u64>,
    /// A description of its current step.
    pub doing: String,
    /// Notes for the user.
    #[serde(default)]
    pub notes: Vec<String>,
    /// The result, when done.
    #[schema(value_type = Option<Object>)]
    pub result: Option<serde_json::Value>,
    /// The error, when failed or cancelled.
    #[schema(value_type = Option<Object>)]
    pub error: Option<Fault>,
}

/// The selection of a job.
#[derive(Debug, Clone, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct JobQuery {
    /// Its id.
    pub id: String,
    /// Wait up to this many seconds for its end.
    pub wait: Option<u64>,
}

/// One event of the stream and of `--watch`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Increases from event to event; the SSE `id`.
    pub seq: u64,
    /// Its time.
    pub at: String,
    /// `transfer`, `artifact` or `site`.
    pub what: String,
    /// The object after the change (a [`Transfer`], [`Artifact`] or [`Site`]).
    #[schema(value_type = Object)]
    pub body: serde_json::Value,
}

/// The selection of events.
#[derive(Debug, Clone, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct EventQuery {
    /// Only events after this one; all stored events when absent. `Last-Event-ID` has precedence.
    pub since: Option<u64>,
    /// JSON only: wait up to this many seconds for an event.
    pub wait: Option<u64>,
    /// JSON only: at most this many (1,000 when absent).
    pub limit: Option<u32>,
    /// `json` for an array, `sse` for a stream; when absent the `Accept` header decides.
    pub format: Option<String>,
}

/// A limit.
#[derive(Debug, Clone, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct LimitQuery {
    /// At most this many, newest first (1,000 when absent).
    pub limit: Option<u32>,
}

//! Transfers: states and requests.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use base::fault::Reason;
use base::limits::{LOCATION_BYTES_MAX, MESSAGE_BYTES_MAX, NEXT_BYTES_MAX};
use base::names::{ArtifactRef, SiteName};
use base::text;
use model::receipt::Receipt;
use model::transfer::{Action, Bytes, State};

/// Marks a cursor that a site passes on as the hub's. Hub and site count independently, so a cursor
/// of one has no meaning for the other. A client that uses a cursor with the other daemon receives
/// all transfers.
pub const CURSOR_OF_HUB: u64 = 1 << 52;

/// One transfer, as `status` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Transfer {
    /// Its id: `[A-Za-z0-9._-]`.
    pub id: String,
    /// Its delivery.
    pub delivery: String,
    /// `kind/name:version`.
    #[schema(value_type = String)]
    pub artifact: ArtifactRef,
    /// The artifact's digest, hex.
    pub digest: String,
    /// Its destination.
    #[schema(value_type = String)]
    pub site: SiteName,
    /// Its state.
    pub state: State,
    /// The reason of a wait or failure.
    #[schema(value_type = Option<String>)]
    pub reason: Option<Reason>,
    /// A description of the last error or wait.
    #[serde(default, deserialize_with = "text::optional::<_, MESSAGE_BYTES_MAX>")]
    pub message: Option<String>,
    /// The next step for the user.
    #[serde(default, deserialize_with = "text::optional::<_, NEXT_BYTES_MAX>")]
    pub next: Option<String>,
    /// The transfer to the same site that must be done first, if this one waits for it.
    #[serde(default)]
    pub waits_for: Option<String>,
    /// Bytes.
    pub bytes: Bytes,
    /// Raw bytes per second over the last seconds; 0 when it is stalled.
    pub rate: u64,
    /// Estimated seconds to the end at this rate.
    pub eta_seconds: Option<u64>,
    /// The number of attempts.
    pub attempts: u32,
    /// The location of the artifact, when done.
    #[serde(default, deserialize_with = "text::optional::<_, LOCATION_BYTES_MAX>")]
    pub location: Option<String>,
    /// A note on a done transfer, for example that a registry holds the image but does not give it
    /// out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// The time of the request.
    pub created_at: String,
    /// The time of the last change.
    pub updated_at: String,
    /// The time of its end.
    pub finished_at: Option<String>,
    /// The signed receipt, when done.
    #[schema(value_type = Option<Object>)]
    #[serde(default, deserialize_with = "Receipt::lenient")]
    pub receipt: Option<Receipt>,
    /// The time when its artifact was removed again, because a run had only borrowed it.
    #[serde(default)]
    pub removed_at: Option<String>,
    /// The number of the event of the last change: pass the largest one to `--since`.
    pub cursor: u64,
}

/// A request for `pause`, `resume`, `cancel` or `retry`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ActionRequest {
    /// A transfer, or a delivery: then all of its transfers.
    pub id: String,
    /// The action.
    pub action: Action,
}

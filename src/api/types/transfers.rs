//! Transfers: where each is, and what is asked of one.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use base::fault::Reason;
use base::limits::{LOCATION_BYTES_MAX, MESSAGE_BYTES_MAX, NEXT_BYTES_MAX};
use base::names::{ArtifactRef, SiteName};
use base::text;
use model::receipt::Receipt;
use model::transfer::{Action, Bytes, State};

/// One transfer, as `status` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Transfer {
    /// Its id: `[A-Za-z0-9._-]`.
    pub id: String,
    /// The delivery it is part of.
    pub delivery: String,
    /// `kind/name:version`.
    #[schema(value_type = String)]
    pub artifact: ArtifactRef,
    /// The artifact's digest, hex.
    pub digest: String,
    /// Where it goes.
    #[schema(value_type = String)]
    pub site: SiteName,
    /// Where it is.
    pub state: State,
    /// Why it is there, if not by itself.
    #[schema(value_type = Option<String>)]
    pub reason: Option<Reason>,
    /// The last error or the wait, in words.
    #[serde(default, deserialize_with = "text::optional::<_, MESSAGE_BYTES_MAX>")]
    pub message: Option<String>,
    /// What to do next about it.
    #[serde(default, deserialize_with = "text::optional::<_, NEXT_BYTES_MAX>")]
    pub next: Option<String>,
    /// The transfer to the same site that must be done first, while it waits for that.
    #[serde(default)]
    pub waits_for: Option<String>,
    /// Bytes.
    pub bytes: Bytes,
    /// Raw bytes a second over the last seconds; 0 when it stands.
    pub rate: u64,
    /// Seconds to go at this rate.
    pub eta_seconds: Option<u64>,
    /// How often it was begun.
    pub attempts: u32,
    /// Where it landed, once done.
    #[serde(default, deserialize_with = "text::optional::<_, LOCATION_BYTES_MAX>")]
    pub location: Option<String>,
    /// What there is to know about it although it is done: a registry that holds the image and does
    /// not give it out, say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// When it was asked for.
    pub created_at: String,
    /// When this last changed.
    pub updated_at: String,
    /// When it ended.
    pub finished_at: Option<String>,
    /// The signed receipt, once done.
    #[schema(value_type = Option<Object>)]
    #[serde(default, deserialize_with = "Receipt::lenient")]
    pub receipt: Option<Receipt>,
    /// When what it brought was taken away again, because a run had only borrowed it.
    #[serde(default)]
    pub removed_at: Option<String>,
    /// The event at which this last changed: give the largest one seen to `--since`.
    pub cursor: u64,
}

/// Ask for `pause`, `resume`, `cancel` or `retry`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ActionRequest {
    /// A transfer, or a delivery: then all of its transfers.
    pub id: String,
    /// What to do.
    pub action: Action,
}

//! Transfers: where each is, and what is asked of one.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::fault::Reason;
use crate::limits::{LOCATION_BYTES_MAX, MESSAGE_BYTES_MAX, NEXT_BYTES_MAX};
use crate::names::{ArtifactRef, SiteName};
use crate::number;
use crate::receipt::Receipt;
use crate::text;

/// The state of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Not begun; the reason says what it waits for.
    Queued,
    /// The site works out what it lacks.
    Planning,
    /// Bytes move.
    Transferring,
    /// Everything is there; the sink makes it visible.
    Committing,
    /// Committed, receipt signed.
    Done,
    /// Held by somebody.
    Paused,
    /// Stopped by a fault that needs a person; `retry` begins again where it stood.
    Failed,
    /// Given up by somebody.
    Cancelled,
}

impl State {
    /// The word in JSON and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Queued => "queued",
            State::Planning => "planning",
            State::Transferring => "transferring",
            State::Committing => "committing",
            State::Done => "done",
            State::Paused => "paused",
            State::Failed => "failed",
            State::Cancelled => "cancelled",
        }
    }

    /// Whether nothing more happens by itself.
    pub fn is_final(self) -> bool {
        matches!(self, State::Done | State::Failed | State::Cancelled)
    }

    /// The state of that name.
    pub fn parse(s: &str) -> Option<Self> {
        use State as S;
        [S::Queued, S::Planning, S::Transferring, S::Committing, S::Done, S::Paused, S::Failed, S::Cancelled]
            .into_iter()
            .find(|state| state.as_str() == s)
    }
}

/// Bytes of a transfer, which never go backwards. What came over the line, or was reused, before an interruption is counted as resumed
/// too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Bytes {
    /// Raw bytes of all the artifact's files.
    #[serde(deserialize_with = "number::count")]
    pub total: u64,
    /// Taken from what the site already had.
    #[serde(deserialize_with = "number::count")]
    pub reused: u64,
    /// Found in place from before an interruption.
    #[serde(deserialize_with = "number::count")]
    pub resumed: u64,
    /// Raw bytes that came over the line.
    #[serde(deserialize_with = "number::count")]
    pub received: u64,
    /// Raw bytes durable at the site.
    #[serde(deserialize_with = "number::count")]
    pub committed: u64,
    /// What crossed the line for it, manifests and framing included.
    #[serde(deserialize_with = "number::count")]
    pub wire: u64,
}

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
    /// What there is to know about it although it is done: a registry that holds the image and does not give it out, say.
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

/// Which transfers.
#[derive(Debug, Clone, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct TransferQuery {
    /// Only these (comma-separated ids of transfers or deliveries).
    pub id: Option<String>,
    /// Only what changed after this cursor.
    pub since: Option<u64>,
    /// Wait up to this many seconds for a change after `since`.
    pub wait: Option<u64>,
    /// At most this many (1,000 when absent), in the order of their cursors when `since` is given, else newest first.
    pub limit: Option<u32>,
}

/// What `pause`, `resume`, `cancel` and `retry` ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Hold it.
    Pause,
    /// Let it go on.
    Resume,
    /// Give it up and clean.
    Cancel,
    /// Begin a failed or cancelled one again, where it stood.
    Retry,
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

//! A transfer: the delivery of one artifact to one site. Its states, actions and reports.

mod step;
#[cfg(test)]
mod tests;

use base::fault::{Fault, Reason};
use base::limits::NOTE_BYTES_MAX;
use base::names::{ArtifactRef, DeliveryId, SiteName, TransferId};
use base::number;
use base::text::{Location, Message, Next, Text};
use content::manifest::Digest;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::receipt::Receipt;

pub use step::{Effect, Event, Step, step};

/// The state of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Not started; the reason says what it waits for.
    Queued,
    /// The site determines what it lacks.
    Planning,
    /// Content is transferred.
    Transferring,
    /// All content is staged; the sink makes it visible.
    Committing,
    /// Committed, receipt signed.
    Done,
    /// Paused by a user.
    Paused,
    /// Stopped by a fault that needs a person; `retry` continues with the staged content.
    Failed,
    /// Cancelled by a user.
    Cancelled,
}

impl State {
    /// The name in JSON and tables.
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

    /// Whether this state is final.
    pub fn is_final(self) -> bool {
        matches!(self, State::Done | State::Failed | State::Cancelled)
    }

    /// The state of that name.
    pub fn parse(s: &str) -> Option<Self> {
        use State as S;
        [
            S::Queued,
            S::Planning,
            S::Transferring,
            S::Committing,
            S::Done,
            S::Paused,
            S::Failed,
            S::Cancelled,
        ]
        .into_iter()
        .find(|state| state.as_str() == s)
    }
}

/// Bytes of a transfer; they never decrease. Bytes that were received or reused before an
/// interruption also count as resumed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Bytes {
    /// Raw bytes of all the artifact's files.
    #[serde(deserialize_with = "number::count")]
    pub total: u64,
    /// Taken from what the site already had.
    #[serde(deserialize_with = "number::count")]
    pub reused: u64,
    /// Staged before an interruption.
    #[serde(deserialize_with = "number::count")]
    pub resumed: u64,
    /// Received raw bytes.
    #[serde(deserialize_with = "number::count")]
    pub received: u64,
    /// Raw bytes durable at the site.
    #[serde(deserialize_with = "number::count")]
    pub committed: u64,
    /// Transmitted bytes, including manifests and framing.
    #[serde(deserialize_with = "number::count")]
    pub wire: u64,
}

/// A selection of transfers.
#[derive(Debug, Clone, Default, Serialize, Deserialize, IntoParams)]
#[serde(default)]
#[into_params(parameter_in = Query)]
pub struct TransferQuery {
    /// Only these (comma-separated ids of transfers or deliveries).
    pub id: Option<String>,
    /// Only transfers that changed after this cursor.
    pub since: Option<u64>,
    /// Wait up to this many seconds for a change after `since`.
    pub wait: Option<u64>,
    /// At most this many (1,000 when absent), in the order of their cursors when `since` is given,
    /// else newest first.
    pub limit: Option<u32>,
}

/// The actions `pause`, `resume`, `cancel` and `retry`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Pause it.
    Pause,
    /// Continue it.
    Resume,
    /// Cancel it and remove its staged content.
    Cancel,
    /// Start a failed or cancelled transfer again, with its staged content.
    Retry,
}

/// The hub's request for a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Want {
    /// Run.
    Run,
    /// Pause.
    Pause,
    /// Cancel and remove the staged content.
    Cancel,
}

impl Want {
    /// The name in the catalogue.
    pub fn as_str(self) -> &'static str {
        match self {
            Want::Run => "run",
            Want::Pause => "pause",
            Want::Cancel => "cancel",
        }
    }
}

/// The report of a site on a transfer, shown by `status`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Body {
    /// The reason of a wait or failure.
    pub reason: Option<Reason>,
    /// A description of the reason.
    pub message: Option<Message>,
    /// The next step for the user.
    pub next: Option<Next>,
    /// The transfer that must be done first, if it waits for one.
    pub waits_for: Option<TransferId>,
    /// Bytes.
    pub bytes: Bytes,
    /// Raw bytes per second.
    #[serde(deserialize_with = "number::count")]
    pub rate: u64,
    /// Estimated seconds to the end.
    #[serde(deserialize_with = "number::optional_count")]
    pub eta_seconds: Option<u64>,
    /// The number of attempts.
    pub attempts: u32,
    /// The location of the committed artifact.
    pub location: Option<Location>,
    /// The signed receipt.
    #[serde(deserialize_with = "Receipt::lenient")]
    pub receipt: Option<Receipt>,
    /// Whether it was committed before it was started again.
    pub landed: bool,
    /// A note on a transfer that is done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<Text<NOTE_BYTES_MAX>>,
}

impl Body {
    /// Records a fault, or success with `None`. It ends an earlier wait for another transfer.
    pub fn set_fault(&mut self, fault: Option<&Fault>) {
        self.reason = fault.map(|f| f.reason);
        self.message = fault.map(|f| f.message.as_str().into());
        self.next = fault.map(|f| f.next.as_str().into());
        self.waits_for = None;
    }

    /// The report of an ended transfer that starts again: a failed one continues with its staged
    /// content, a done or cancelled one starts from nothing.
    pub fn begun_again(self, from: State) -> Self {
        match from {
            // The content of a cancelled transfer was removed.
            State::Done | State::Cancelled => Self {
                bytes: Bytes {
                    total: self.bytes.total,
                    ..Bytes::default()
                },
                attempts: self.attempts,
                landed: self.landed || from == State::Done,
                ..Self::default()
            },
            _ => self,
        }
    }
}

/// One transfer.
#[derive(Debug, Clone, PartialEq)]
pub struct TransferRow {
    /// Its id.
    pub id: TransferId,
    /// Its delivery.
    pub delivery: DeliveryId,
    /// The artifact.
    pub artifact: ArtifactRef,
    /// Its digest.
    pub digest: Digest,
    /// The destination.
    pub site: SiteName,
    /// The hub's request.
    pub want: Want,
    /// The generation; every retry increments it.
    pub generation: i64,
    /// Its state.
    pub state: State,
    /// The other fields of the report.
    pub body: Body,
    /// The time of the request.
    pub created_ms: i64,
    /// The time of its last change.
    pub updated_ms: i64,
    /// The time of its end.
    pub finished_ms: Option<i64>,
    /// The number of the event of its last change.
    pub cursor: i64,
    /// The transfers to this site that must be done first.
    pub after: Vec<TransferId>,
    /// The time when its artifact was removed again.
    pub removed_ms: Option<i64>,
}

impl TransferRow {
    /// Whether this transfer itself committed its artifact, now or in an earlier generation; an
    /// artifact that a cancelled transfer only found is not its own.
    pub fn has_landed(&self) -> bool {
        self.state == State::Done || self.body.landed
    }
}

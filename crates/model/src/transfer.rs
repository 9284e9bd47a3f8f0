//! A transfer: one artifact on its way to one site. Its states, what is asked of it and what is
//! reported of it.

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

/// Bytes of a transfer, which never go backwards. What came over the line, or was reused, before an
/// interruption is counted as resumed too.
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
    /// At most this many (1,000 when absent), in the order of their cursors when `since` is given,
    /// else newest first.
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

/// What the hub asks of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Want {
    /// Go on.
    Run,
    /// Stand still.
    Pause,
    /// Give up and clean.
    Cancel,
}

impl Want {
    /// The word in the catalogue.
    pub fn as_str(self) -> &'static str {
        match self {
            Want::Run => "run",
            Want::Pause => "pause",
            Want::Cancel => "cancel",
        }
    }
}

/// What a site reports of a transfer, and `status` shows.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Body {
    /// Why it is where it is.
    pub reason: Option<Reason>,
    /// In words.
    pub message: Option<Message>,
    /// What to do next.
    pub next: Option<Next>,
    /// The transfer that must be done first, while it waits for that.
    pub waits_for: Option<TransferId>,
    /// Bytes.
    pub bytes: Bytes,
    /// Raw bytes a second.
    #[serde(deserialize_with = "number::count")]
    pub rate: u64,
    /// Seconds to go.
    #[serde(deserialize_with = "number::optional_count")]
    pub eta_seconds: Option<u64>,
    /// How often it was begun.
    pub attempts: u32,
    /// Where it landed.
    pub location: Option<Location>,
    /// The signed receipt.
    #[serde(deserialize_with = "Receipt::lenient")]
    pub receipt: Option<Receipt>,
    /// Whether it had landed before it was begun again.
    pub landed: bool,
    /// What there is to know about it although it is done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<Text<NOTE_BYTES_MAX>>,
}

impl Body {
    /// Notes a fault, or with `None` that all is well. Whatever it waited for before, it waits for
    /// no more.
    pub fn set_fault(&mut self, fault: Option<&Fault>) {
        self.reason = fault.map(|f| f.reason);
        self.message = fault.map(|f| f.message.as_str().into());
        self.next = fault.map(|f| f.next.as_str().into());
        self.waits_for = None;
    }

    /// As it is when a transfer that ended begins again: one that failed goes on with what it has,
    /// one that was done or cancelled begins at nothing.
    pub fn begun_again(self, from: State) -> Self {
        match from {
            // What was cancelled was cleared away.
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
    /// The delivery it is part of.
    pub delivery: DeliveryId,
    /// What.
    pub artifact: ArtifactRef,
    /// Its digest.
    pub digest: Digest,
    /// Where to.
    pub site: SiteName,
    /// What the hub asks for.
    pub want: Want,
    /// Raised by every retry.
    pub generation: i64,
    /// Where it is.
    pub state: State,
    /// The rest.
    pub body: Body,
    /// When it was asked for.
    pub created_ms: i64,
    /// When it last changed.
    pub updated_ms: i64,
    /// When it ended.
    pub finished_ms: Option<i64>,
    /// The event at which it last changed.
    pub cursor: i64,
    /// The transfers to this site that go first.
    pub after: Vec<TransferId>,
    /// When what it brought was taken away again.
    pub removed_ms: Option<i64>,
}

impl TransferRow {
    /// Whether this very transfer has landed what it brings, now or before it was begun again: what
    /// a cancelled one only found there is not its own.
    pub fn has_landed(&self) -> bool {
        self.state == State::Done || self.body.landed
    }
}

//! Transfers in the catalogue: what is known of each; `changes` writes it, `queries` finds it.

mod changes;
mod queries;

use serde::{Deserialize, Serialize};
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::{ArtifactRow, fault, time};
use crate::api::types::{Bytes, State, Transfer};
use crate::chunk::Hash;
use crate::clock;
use crate::fault::{Fault, Reason};
use crate::limits::NOTE_BYTES_MAX;
use crate::manifest::{Digest, KindInfo};
use crate::names::{ArtifactRef, DeliveryId, RunId, SiteName, TransferId};
use crate::number;
use crate::receipt::Receipt;
use crate::text::{Location, Message, Next, Text};

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
    fn as_str(self) -> &'static str {
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
    /// Notes a fault, or with `None` that all is well. Whatever it waited for before, it waits for no more.
    pub fn set_fault(&mut self, fault: Option<&Fault>) {
        self.reason = fault.map(|f| f.reason);
        self.message = fault.map(|f| f.message.as_str().into());
        self.next = fault.map(|f| f.next.as_str().into());
        self.waits_for = None;
    }

    /// As it is when a transfer that ended begins again: one that failed goes on with what it has, one that was done
    /// or cancelled begins at nothing.
    fn begun_again(self, from: State) -> Self {
        match from {
            // What was cancelled was cleared away.
            State::Done | State::Cancelled => Self {
                bytes: Bytes { total: self.bytes.total, ..Bytes::default() },
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

/// A transfer that a site took over.
#[derive(Debug, Clone, PartialEq)]
pub struct Adopted {
    /// As it stands there.
    pub row: TransferRow,
    /// Transfers that were cancelled for it, as they were before.
    pub superseded: Vec<TransferRow>,
}

/// One artifact of a delivery.
#[derive(Debug, Clone)]
pub struct Part {
    /// What.
    pub artifact: ArtifactRef,
    /// Its digest.
    pub digest: Digest,
    /// Its bytes.
    pub total: u64,
    /// The artifact that must be at the site first.
    pub needs: Option<ArtifactRef>,
    /// Where it goes.
    pub sites: Vec<SiteName>,
}

impl Part {
    /// An artifact to these sites.
    pub fn new(row: &ArtifactRow, sites: &[SiteName]) -> Self {
        let needs = match &row.root.info {
            KindInfo::Labels(labels) => labels.dataset.as_ref().map(|dataset| dataset.artifact.clone()),
            KindInfo::Files | KindInfo::Image(_) => None,
        };
        Self { artifact: row.artifact.clone(), digest: row.digest, total: row.root.totals.bytes, needs, sites: sites.to_vec() }
    }
}

impl TransferRow {
    /// Whether this very transfer has landed what it brings, now or before it was begun again: what a cancelled one only found
    /// there is not its own.
    pub fn has_landed(&self) -> bool {
        self.state == State::Done || self.body.landed
    }

    /// As `status` shows it.
    pub fn view(&self) -> Transfer {
        let body = self.body.clone();
        Transfer {
            id: self.id.to_string(),
            delivery: self.delivery.to_string(),
            artifact: self.artifact.clone(),
            digest: self.digest.hex(),
            site: self.site.clone(),
            state: self.state,
            reason: body.reason,
            message: body.message.map(Into::into),
            next: body.next.map(Into::into),
            waits_for: body.waits_for.map(Into::into),
            bytes: body.bytes,
            rate: if self.state == State::Transferring { body.rate } else { 0 },
            eta_seconds: if self.state == State::Transferring { body.eta_seconds } else { None },
            attempts: body.attempts,
            location: body.location.map(Into::into),
            note: body.note.map(Into::into),
            created_at: time(self.created_ms),
            updated_at: time(self.updated_ms),
            finished_at: self.finished_ms.map(time),
            receipt: body.receipt,
            removed_at: self.removed_ms.map(time),
            cursor: self.cursor as u64,
        }
    }
}

pub(super) fn transfer(row: &SqliteRow) -> Result<TransferRow, Fault> {
    let malformed = |what: &str| Fault::internal(format!("the catalogue holds a malformed transfer: {what}"));
    let text = |name: &str| row.try_get::<String, _>(name).map_err(fault);
    let number = |name: &str| row.try_get::<i64, _>(name).map_err(fault);
    let digest: Vec<u8> = row.try_get("digest").map_err(fault)?;
    Ok(TransferRow {
        id: text("id")?.parse()?,
        delivery: text("delivery")?.parse()?,
        artifact: text("reference")?.parse()?,
        digest: Hash(digest.try_into().map_err(|_| malformed("digest"))?),
        site: text("site")?.parse()?,
        want: match text("want")?.as_str() {
            "pause" => Want::Pause,
            "cancel" => Want::Cancel,
            _ => Want::Run,
        },
        generation: number("generation")?,
        state: State::parse(&text("state")?).ok_or_else(|| malformed("state"))?,
        body: serde_json::from_str(&text("body")?).map_err(|_| malformed("body"))?,
        created_ms: number("created_ms")?,
        updated_ms: number("updated_ms")?,
        finished_ms: row.try_get("finished_ms").map_err(fault)?,
        cursor: number("cursor")?,
        after: serde_json::from_str(&text("after_ids")?).map_err(|_| malformed("after_ids"))?,
        removed_ms: row.try_get("removed_ms").map_err(fault)?,
    })
}

/// A new id: sorts by time, and cannot be guessed from another.
pub(crate) fn new_id(prefix: &str) -> String {
    format!("{prefix}-{:011x}{:08x}", clock::now_unix_ms(), rand::random::<u32>())
}

/// The same for a transfer.
fn new_transfer_id() -> TransferId {
    TransferId::made(clock::now_unix_ms(), rand::random())
}

/// The same for a delivery.
pub(crate) fn new_delivery_id() -> DeliveryId {
    DeliveryId::made(clock::now_unix_ms(), rand::random())
}

/// The same for a training run.
pub(crate) fn new_run_id() -> RunId {
    RunId::made(clock::now_unix_ms(), rand::random())
}

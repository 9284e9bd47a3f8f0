//! Transfers in the catalogue: what is known of each; `changes` writes it, `queries` finds it.

mod changes;
mod queries;

use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::{ArtifactRow, fault};
use base::clock;
use base::fault::Fault;
use base::names::{ArtifactRef, DeliveryId, RunId, SiteName, TransferId};
use content::chunk::Hash;
use content::manifest::{Digest, KindInfo};
use model::transfer::State;
pub use model::transfer::{Body, TransferRow, Want};

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
            KindInfo::Labels(labels) => labels
                .dataset
                .as_ref()
                .map(|dataset| dataset.artifact.clone()),
            KindInfo::Files | KindInfo::Image(_) => None,
        };
        Self {
            artifact: row.artifact.clone(),
            digest: row.digest,
            total: row.root.totals.bytes,
            needs,
            sites: sites.to_vec(),
        }
    }
}

pub(super) fn transfer(row: &SqliteRow) -> Result<TransferRow, Fault> {
    let malformed =
        |what: &str| Fault::internal(format!("the catalogue holds a malformed transfer: {what}"));
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
pub fn new_id(prefix: &str) -> String {
    format!(
        "{prefix}-{:011x}{:08x}",
        clock::now_unix_ms(),
        rand::random::<u32>()
    )
}

/// The same for a transfer.
fn new_transfer_id() -> TransferId {
    TransferId::made(clock::now_unix_ms(), rand::random())
}

/// The same for a delivery.
pub fn new_delivery_id() -> DeliveryId {
    DeliveryId::made(clock::now_unix_ms(), rand::random())
}

/// The same for a training run.
pub fn new_run_id() -> RunId {
    RunId::made(clock::now_unix_ms(), rand::random())
}

//! Transfers: their rows. [`changes`] passes events to the state machine; the engine stores what it
//! returns.

mod changes;

use async_trait::async_trait;
use base::clock;
use base::fault::{Fault, Reason};
use base::names::{ArtifactRef, DeliveryId, RunId, SiteName, TransferId};
use content::manifest::{Digest, KindInfo};
pub use model::transfer::{Body, TransferRow, Want};
use model::transfer::{State, TransferQuery};

use crate::engine::See;
use crate::{ArtifactRow, Catalogue};

/// The result of [`Catalogue::adopt`].
#[derive(Debug, Clone, PartialEq)]
pub struct Adopted {
    /// The stored row.
    pub row: TransferRow,
    /// The transfers that were cancelled because of it, as they were before.
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
    /// The artifact that must be delivered to the site first.
    pub needs: Option<ArtifactRef>,
    /// The sites that receive it.
    pub sites: Vec<SiteName>,
}

impl Part {
    /// An artifact for these sites.
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

/// What a site has to do for one transfer.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkRow {
    /// The transfer.
    pub id: TransferId,
    /// Its delivery.
    pub delivery: DeliveryId,
    /// The artifact.
    pub artifact: ArtifactRef,
    /// Its digest.
    pub digest: Digest,
    /// The request.
    pub want: Want,
    /// The generation.
    pub generation: i64,
    /// Bytes of the artifact; 0 if the row does not say.
    pub total: u64,
    /// The time of the request.
    pub created_ms: i64,
    /// The state.
    pub state: State,
    /// The reason of the state.
    pub reason: Option<Reason>,
}

/// The transfers of one site in one state and for one reason, together.
#[derive(Debug, Clone, sqlx::FromRow)]
pub struct Counted {
    /// The state.
    pub state: String,
    /// The site.
    pub site: String,
    /// The reason, if there is one.
    pub reason: Option<String>,
    /// How many there are.
    pub transfers: i64,
    /// Bytes.
    pub reused: f64,
    /// Bytes.
    pub resumed: f64,
    /// Bytes.
    pub received: f64,
    /// Bytes.
    pub committed: f64,
    /// Bytes.
    pub wire: f64,
}

/// The fault for a transfer that does not exist.
pub(crate) fn no_transfer(id: &str) -> Fault {
    Fault::not_found(format!("there is no transfer {id}"))
        .with_next("'packhorse status' lists them")
}

/// The fault for an id that belongs to no transfer and no delivery.
pub fn no_work(id: &str) -> Fault {
    Fault::not_found(format!("there is no transfer or delivery {id}"))
        .with_next("'packhorse status' lists them")
}

/// Transfers: reading them.
#[async_trait]
pub trait Transfers: Send + Sync {
    /// Begins a transaction that changes transfers.
    async fn change_transfers(&self) -> Result<Box<dyn TransferChanges>, Fault>;

    /// One transfer.
    async fn transfer(&self, id: &str) -> Result<TransferRow, Fault>;

    /// The transfers of an id, which may be the id of a delivery. Fails if one cannot be read.
    async fn transfers_of(&self, id: &str) -> Result<Vec<TransferRow>, Fault>;

    /// What a site has to do: its transfers that have not ended, or that it has still to cancel;
    /// oldest first, [`base::limits::TRANSFERS_LISTED_MAX`] at most.
    async fn open_transfers(&self, site: &SiteName) -> Result<Vec<TransferRow>, Fault>;

    /// Shows the same transfers, all of them, behind this one. It reads only the columns that a
    /// [`WorkRow`] needs: damage of others does not matter.
    async fn each_open_transfer(
        &self,
        site: &SiteName,
        behind: Option<&str>,
        see: See<'_, WorkRow>,
    ) -> Result<(), Fault>;

    /// Which open transfers of a site wait for which others: the other transfer delivers the
    /// artifact that they need, and is not cancelled. A failed transfer is still waited for,
    /// because an operator will fix the cause.
    async fn waits(&self, site: &SiteName) -> Result<Vec<(TransferId, TransferId)>, Fault>;

    /// Whether a site has a transfer of this content that was neither cancelled nor removed.
    async fn is_delivered(&self, site: &SiteName, digest: Digest) -> Result<bool, Fault>;

    /// The transfers of one artifact. Fails if one cannot be read.
    async fn transfers_of_artifact(
        &self,
        artifact: &ArtifactRef,
    ) -> Result<Vec<TransferRow>, Fault>;

    /// The current transfer of an artifact to a site: not cancelled, nor its result removed.
    async fn current_transfer(
        &self,
        artifact: &ArtifactRef,
        site: &SiteName,
    ) -> Result<Option<TransferRow>, Fault>;

    /// Passes the transfers that a query selects to `see`, `rows` at most. The order: by event
    /// number for a query with a cursor, by time of creation for a query with ids, else the newest
    /// first. `behind`: the list continues after this transfer, if the query has no cursor. Fails
    /// if a transfer that the query names by its id cannot be read.
    async fn each_transfer(
        &self,
        query: &TransferQuery,
        behind: Option<&str>,
        rows: i64,
        see: See<'_, TransferRow>,
    ) -> Result<(), Fault>;

    /// Passes `rows` transfers of an artifact to `see`, by time of creation, beginning after this
    /// one.
    async fn each_transfer_of_artifact(
        &self,
        artifact: &ArtifactRef,
        behind: Option<&str>,
        rows: i64,
        see: See<'_, TransferRow>,
    ) -> Result<(), Fault>;

    /// The number of open transfers of each artifact to each site.
    async fn open_by_artifact(&self) -> Result<Vec<(SiteName, ArtifactRef, u64)>, Fault>;

    /// The number of transfers in each group, and their bytes.
    async fn counted_transfers(&self) -> Result<Vec<Counted>, Fault>;
}

/// A transaction that changes transfers. Until it ends, no other transaction changes the rows that
/// it read. It has no effect unless it is committed.
#[async_trait]
pub trait TransferChanges: Send {
    /// One transfer.
    async fn transfer(&mut self, id: &str) -> Result<Option<TransferRow>, Fault>;

    /// The current transfer of an artifact to a site: not cancelled, nor its result removed.
    async fn current(
        &mut self,
        artifact: &ArtifactRef,
        site: &SiteName,
    ) -> Result<Option<TransferRow>, Fault>;

    /// The other transfers of the same artifact to the same site that are neither done nor
    /// cancelled.
    async fn rivals(&mut self, of: &TransferRow) -> Result<Vec<TransferRow>, Fault>;

    /// Whether a site may currently be removing the content of this transfer. That is the case if
    /// all runs that need it have ended, or their deadline has passed (a site may notice that
    /// first), and the cleanup of one of them is not complete.
    async fn may_be_removing(&mut self, id: &TransferId, now_ms: i64) -> Result<bool, Fault>;

    /// The greatest id of a transfer.
    async fn greatest_id(&mut self) -> Result<Option<TransferId>, Fault>;

    /// Stores a delivery.
    async fn add_delivery(
        &mut self,
        id: &DeliveryId,
        run: Option<&str>,
        created_ms: i64,
    ) -> Result<(), Fault>;

    /// Stores that a transfer to this site is part of a delivery.
    async fn add_part(
        &mut self,
        delivery: &DeliveryId,
        transfer: &TransferId,
        site: &SiteName,
    ) -> Result<(), Fault>;

    /// Stores a new transfer.
    async fn insert(&mut self, row: &TransferRow, needs: Option<&ArtifactRef>)
    -> Result<(), Fault>;

    /// Stores a transfer as it is after a step.
    async fn store(&mut self, row: &TransferRow, difference: Difference) -> Result<(), Fault>;

    /// Makes the changes durable.
    async fn commit(self: Box<Self>) -> Result<(), Fault>;
}

/// What a step changed of a transfer.
#[derive(Debug, Clone, Copy)]
pub struct Difference {
    /// Something that users see; it becomes an event.
    pub shows: bool,
    /// The work of its site, not only the progress.
    pub work: bool,
}

/// The fault for a second open transfer of an artifact to the same site.
pub(crate) fn second_transfer(row: &TransferRow) -> Fault {
    Fault::conflict(format!(
        "another transfer of {} to {} exists already, so {} cannot begin again",
        row.artifact, row.site, row.id
    ))
    .with_next("see 'packhorse status'")
}

impl Catalogue {
    /// The transfers of these parts that are done.
    pub async fn done_already(&self, parts: &[Part]) -> Result<Vec<TransferRow>, Fault> {
        let mut out = Vec::new();
        for part in parts {
            for site in &part.sites {
                out.extend(
                    self.current_transfer(&part.artifact, site)
                        .await?
                        .filter(|row| row.state == State::Done),
                );
            }
        }
        Ok(out)
    }
}

/// Creates an id that sorts by time and cannot be guessed from another id.
pub fn new_id(prefix: &str) -> String {
    format!(
        "{prefix}-{:011x}{:08x}",
        clock::now_unix_ms(),
        rand::random::<u32>()
    )
}

/// Creates the id of a delivery.
pub fn new_delivery_id() -> DeliveryId {
    DeliveryId::made(clock::now_unix_ms(), rand::random())
}

/// Creates the id of a training run.
pub fn new_run_id() -> RunId {
    RunId::made(clock::now_unix_ms(), rand::random())
}

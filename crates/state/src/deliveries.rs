//! Deliveries: the transfers of one request.

use async_trait::async_trait;
use base::fault::{Code, Fault};
use base::names::{DeliveryId, SiteName};

use crate::{Catalogue, TransferRow};

/// The row of a delivery; [`Catalogue::each_part`] returns its transfers.
#[derive(Debug, Clone)]
pub struct DeliveryRow {
    /// Its id.
    pub id: DeliveryId,
    /// The training run that requested it, if there is one.
    pub run: Option<String>,
    /// When it was requested.
    pub created_ms: i64,
}

/// The fault for a delivery that does not exist. A delivery that the caller may not see gets the
/// same fault.
pub fn no_delivery(id: &str) -> Fault {
    Fault::not_found(format!("there is no delivery {id}"))
        .with_next("'packhorse status' lists the transfers")
}

/// Deliveries.
#[async_trait]
pub trait Deliveries: Send + Sync {
    /// One delivery. A site knows only the transfers of it that go to that site.
    async fn delivery(&self, id: &str) -> Result<DeliveryRow, Fault>;

    /// Whether a delivery was begun.
    async fn has_delivery(&self, id: &str) -> Result<bool, Fault>;

    /// The deliveries before this one, newest first. `by_transfers`: includes deliveries that only
    /// have transfers and no row of their own, as at a site.
    async fn deliveries(
        &self,
        behind: Option<&str>,
        rows: i64,
        by_transfers: bool,
    ) -> Result<Vec<DeliveryRow>, Fault>;

    /// The transfers of a run that nothing else needs: every delivery that they are part of was
    /// requested by this run or by a run that has ended. Transfers that were delivered before the
    /// run, or were requested later, are excluded. A run that has its model counts as ended,
    /// although its trainer may still run; the site checks that.
    async fn only_borrowed(&self, run: &str, site: &SiteName) -> Result<Vec<TransferRow>, Fault>;
}

impl Catalogue {
    /// The transfers of a delivery; `None` if it was never begun. Fails if one cannot be read,
    /// because a run would begin without it.
    pub async fn delivery_parts(&self, id: &str) -> Result<Option<Vec<TransferRow>>, Fault> {
        if !self.has_delivery(id).await? {
            return Ok(None);
        }
        match self.transfers_of(id).await {
            Err(fault) if fault.code == Code::NotFound => Ok(Some(Vec::new())),
            rows => rows.map(Some),
        }
    }
}

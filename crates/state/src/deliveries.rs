//! Deliveries: what was asked for in one request.

use async_trait::async_trait;
use base::fault::{Code, Fault};
use base::names::{DeliveryId, SiteName};

use crate::{Catalogue, TransferRow};

/// One delivery; [`Catalogue::each_part`] shows its transfers.
#[derive(Debug, Clone)]
pub struct DeliveryRow {
    /// Its id.
    pub id: DeliveryId,
    /// The run that borrows by it.
    pub run: Option<String>,
    /// When it was asked for.
    pub created_ms: i64,
}

/// The answer for a delivery that does not exist, and for one that the caller may not see.
pub fn no_delivery(id: &str) -> Fault {
    Fault::not_found(format!("there is no delivery {id}"))
        .with_next("'packhorse status' lists the transfers")
}

/// Deliveries.
#[async_trait]
pub trait Deliveries: Send + Sync {
    /// One delivery. A site knows it by those of its transfers that go to that site.
    async fn delivery(&self, id: &str) -> Result<DeliveryRow, Fault>;

    /// Whether a delivery was begun.
    async fn has_delivery(&self, id: &str) -> Result<bool, Fault>;

    /// The newest deliveries behind this one, newest first. `by_transfers`: those too that are
    /// known by their transfers alone, as a site knows them.
    async fn deliveries(
        &self,
        behind: Option<&str>,
        rows: i64,
        by_transfers: bool,
    ) -> Result<Vec<DeliveryRow>, Fault>;

    /// Of the transfers that a run waits for, those that only ended runs need besides: every
    /// delivery that they are part of was asked for by a run that has ended, or by this one. What
    /// was delivered before the run, or was asked for since, is not among them. A run that has its
    /// model counts as ended, though its trainer may still run: the site takes care of that.
    async fn only_borrowed(&self, run: &str, site: &SiteName) -> Result<Vec<TransferRow>, Fault>;

    /// Records that a site removed what a transfer brought, unless the transfer began again
    /// meanwhile.
    async fn set_removed(&self, id: &str, removed_ms: i64) -> Result<(), Fault>;
}

impl Catalogue {
    /// The transfers of a delivery; `None` when it was never begun. Fails if one cannot be read: a
    /// run would begin without it.
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

//! Deliveries in the catalogue: what was asked for as one.

use super::transfers::transfer;
use super::{Catalogue, TransferRow, fault};
use base::fault::Fault;
use base::names::{DeliveryId, SiteName};

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

/// The answer for a delivery that does not exist, and for one that somebody may not see.
pub fn no_delivery(id: &str) -> Fault {
    Fault::not_found(format!("there is no delivery {id}"))
        .with_next("'packhorse status' lists the transfers")
}

impl Catalogue {
    /// One delivery. A site knows it by those of its transfers that go to that site.
    pub async fn delivery(&self, id: &str) -> Result<DeliveryRow, Fault> {
        let row: Option<(Option<String>, Option<i64>)> = sqlx::query_as(
            "SELECT (SELECT run FROM delivery WHERE id = ?1), COALESCE((SELECT created_ms FROM delivery WHERE id = ?1),
                    (SELECT MIN(created_ms) FROM transfer WHERE delivery = ?1))
             WHERE EXISTS (SELECT 1 FROM transfer WHERE delivery = ?1) OR EXISTS (SELECT 1 FROM delivery_part WHERE delivery = ?1)",
        )
        .bind(id)
        .fetch_optional(&self.read)
        .await
        .map_err(fault)?;
        let Some((run, Some(created_ms))) = row else {
            return Err(no_delivery(id));
        };
        Ok(DeliveryRow {
            id: id.parse()?,
            run,
            created_ms,
        })
    }

    /// The transfers of a delivery; `None` when it was never begun.
    pub async fn delivery_parts(&self, id: &str) -> Result<Option<Vec<TransferRow>>, Fault> {
        let there: Option<(i64,)> = sqlx::query_as("SELECT 1 FROM delivery WHERE id = ?")
            .bind(id)
            .fetch_optional(&self.read)
            .await
            .map_err(fault)?;
        match there {
            None => Ok(None),
            Some(_) => Ok(Some(self.transfers_of(id).await.unwrap_or_default())),
        }
    }

    /// Of the transfers that a run waits for, those that nobody else wants: every delivery that
    /// they are part of was asked for by a run that needs them no longer, or by this one. What
    /// stood before the run, or was asked for since, is not among them. A run that has its model
    /// counts as one that needs nothing, though its trainer may run on: that the site minds, which
    /// knows.
    pub async fn only_borrowed(
        &self,
        run: &str,
        site: &SiteName,
    ) -> Result<Vec<TransferRow>, Fault> {
        let rows = sqlx::query(
            "SELECT DISTINCT t.* FROM transfer t JOIN delivery_part p ON p.transfer = t.id JOIN delivery d ON d.id = p.delivery
             WHERE d.run = ?1 AND t.site = ?2 AND NOT EXISTS (
                SELECT 1 FROM delivery_part q JOIN delivery e ON e.id = q.delivery LEFT JOIN run r ON r.name = e.run
                WHERE q.transfer = t.id AND (e.run IS NULL OR (e.run != ?1
                    AND (r.state IS NULL OR r.state NOT IN ('returning', 'done', 'failed', 'cancelled')))))
             ORDER BY t.created_ms, t.id",
        )
        .bind(run)
        .bind(site.as_str())
        .fetch_all(&self.read)
        .await
        .map_err(fault)?;
        rows.iter().map(transfer).collect()
    }

    /// Whether a site may be taking away at this moment what this transfer brought: nobody wants it
    /// but runs that are over, or whose time is up, which a site may notice first; and one of them
    /// has not given back all yet.
    pub(super) async fn may_be_going(
        tx: &mut sqlx::SqliteConnection,
        id: &str,
        now_ms: i64,
    ) -> Result<bool, Fault> {
        let (going,): (bool,) = sqlx::query_as(
            "SELECT COUNT(*) = COUNT(r.name) AND TOTAL(r.open) > 0
             FROM delivery_part p JOIN delivery d ON d.id = p.delivery LEFT JOIN run r ON r.name = d.run AND (
                r.state IN ('returning', 'done', 'failed', 'cancelled') OR json_extract(r.body, '$.spec.deadline_ms') <= ?2)
             WHERE p.transfer = ?1",
        )
        .bind(id)
        .bind(now_ms)
        .fetch_one(tx)
        .await
        .map_err(fault)?;
        Ok(going)
    }

    /// Notes that what a transfer brought was taken away again.
    pub async fn set_removed(&self, id: &str, removed_ms: i64) -> Result<(), Fault> {
        let mut tx = self
            .write
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(fault)?;
        let seq = super::note(&mut tx, "transfer", id).await?;
        // One that was begun again meanwhile is on its way here anew.
        let remove = "UPDATE transfer SET removed_ms = ?, cursor = ?
             WHERE id = ? AND removed_ms IS NULL AND state IN ('done', 'failed', 'cancelled')";
        sqlx::query(remove)
            .bind(removed_ms)
            .bind(seq)
            .bind(id)
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        tx.commit().await.map_err(fault)?;
        self.notify();
        Ok(())
    }
}

//! Deliveries in SQLite.

use async_trait::async_trait;
use base::fault::Fault;
use base::names::SiteName;

use super::transfers::{key, transfer};
use super::{Sqlite, fault, malformed};
use crate::TransferRow;
use crate::deliveries::{Deliveries, DeliveryRow, no_delivery};

const TABLE: &str = "delivery";
const NEWEST: &str = "SELECT id, run, created_ms FROM delivery WHERE (created_ms, id) < ($1, $2) ORDER BY created_ms DESC, id DESC LIMIT $3";
const NEWEST_BY_TRANSFERS: &str = "SELECT id, run, created_ms FROM (
        SELECT id, run, created_ms FROM delivery
        UNION ALL SELECT delivery, NULL, MIN(created_ms) FROM transfer
            WHERE delivery NOT IN (SELECT id FROM delivery) GROUP BY delivery) AS known
     WHERE (created_ms, id) < ($1, $2) ORDER BY created_ms DESC, id DESC LIMIT $3";

#[async_trait]
impl Deliveries for Sqlite {
    async fn delivery(&self, id: &str) -> Result<DeliveryRow, Fault> {
        let row: Option<(Option<String>, Option<i64>)> = sqlx::query_as(
            "SELECT (SELECT run FROM delivery WHERE id = $1), COALESCE((SELECT created_ms FROM delivery WHERE id = $1),
                    (SELECT MIN(created_ms) FROM transfer WHERE delivery = $1))
             WHERE EXISTS (SELECT 1 FROM transfer WHERE delivery = $1) OR EXISTS (SELECT 1 FROM delivery_part WHERE delivery = $1)",
        )
        .bind(id)
        .fetch_optional(self.read())
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

    async fn has_delivery(&self, id: &str) -> Result<bool, Fault> {
        let there = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM delivery WHERE id = $1)");
        there.bind(id).fetch_one(self.read()).await.map_err(fault)
    }

    async fn deliveries(
        &self,
        behind: Option<&str>,
        rows: i64,
        by_transfers: bool,
    ) -> Result<Vec<DeliveryRow>, Fault> {
        let mut last = match behind {
            None => (i64::MAX, String::new()),
            Some(id) => match self.delivery(id).await {
                Ok(row) => (row.created_ms, id.to_owned()),
                Err(_) => return Ok(Vec::new()),
            },
        };
        let sql = if by_transfers {
            NEWEST_BY_TRANSFERS
        } else {
            NEWEST
        };
        let mut out: Vec<DeliveryRow> = Vec::new();
        loop {
            let left = rows - out.len() as i64;
            let found: Vec<(String, Option<String>, i64)> = sqlx::query_as(sql)
                .bind(last.0)
                .bind(&last.1)
                .bind(left)
                .fetch_all(self.read())
                .await
                .map_err(fault)?;
            let is_end = (found.len() as i64) < left;
            last = found
                .last()
                .map(|(id, _, created_ms)| (*created_ms, id.clone()))
                .unwrap_or_default();
            out.extend(found.into_iter().filter_map(|(id, run, created_ms)| {
                let id =
                    self.sound(TABLE, &id, id.parse().map_err(|e| malformed(TABLE, &id, e)))?;
                Some(DeliveryRow {
                    id,
                    run,
                    created_ms,
                })
            }));
            // A skipped row is replaced by the next one.
            if is_end || out.len() as i64 >= rows {
                return Ok(out);
            }
        }
    }

    async fn only_borrowed(&self, run: &str, site: &SiteName) -> Result<Vec<TransferRow>, Fault> {
        let rows = sqlx::query(
            "SELECT t.* FROM transfer t WHERE t.site = $2
             AND EXISTS (SELECT 1 FROM delivery_part p JOIN delivery d ON d.id = p.delivery WHERE p.transfer = t.id AND d.run = $1)
             AND NOT EXISTS (
                SELECT 1 FROM delivery_part q JOIN delivery e ON e.id = q.delivery LEFT JOIN run r ON r.name = e.run
                WHERE q.transfer = t.id AND (e.run IS NULL OR (e.run <> $1
                    AND (r.state IS NULL OR r.state NOT IN ('returning', 'done', 'failed', 'cancelled')))))
             ORDER BY t.created_ms, t.id",
        )
        .bind(run)
        .bind(site.as_str())
        .fetch_all(self.read())
        .await
        .map_err(fault)?;
        Ok(rows
            .iter()
            .filter_map(|row| self.sound("transfer", &key(row), transfer(row)))
            .collect())
    }
}

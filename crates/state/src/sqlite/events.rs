//! Events in SQLite.

use async_trait::async_trait;
use base::fault::Fault;

use super::{Sqlite, fault};
use crate::events::{EventRow, Events};

#[async_trait]
impl Events for Sqlite {
    async fn cursor(&self) -> Result<u64, Fault> {
        let (value,): (i64,) = sqlx::query_as("SELECT value FROM counter WHERE name = 'event'")
            .fetch_one(self.read())
            .await
            .map_err(fault)?;
        Ok(value as u64)
    }

    async fn oldest_event(&self) -> Result<Option<u64>, Fault> {
        let oldest: Option<i64> = sqlx::query_scalar("SELECT MIN(seq) FROM event")
            .fetch_one(self.read())
            .await
            .map_err(fault)?;
        Ok(oldest.map(|seq| seq as u64))
    }

    async fn events(&self, since: u64, limit: u32) -> Result<Vec<EventRow>, Fault> {
        let rows: Vec<(i64, i64, String, String, Option<String>)> = sqlx::query_as(
            "SELECT seq, at_ms, what, name, state FROM event WHERE seq > $1 ORDER BY seq LIMIT $2",
        )
        .bind(i64::try_from(since).unwrap_or(i64::MAX))
        .bind(i64::from(limit))
        .fetch_all(self.read())
        .await
        .map_err(fault)?;
        Ok(rows
            .into_iter()
            .map(|(seq, at_ms, what, name, state)| EventRow {
                seq: seq as u64,
                at_ms,
                what,
                name,
                state,
            })
            .collect())
    }

    async fn trim_events(&self) -> Result<(), Fault> {
        let mut write = self.begin().await?;
        sqlx::query("DELETE FROM event WHERE seq <= (SELECT seq FROM event ORDER BY seq DESC LIMIT 1 OFFSET $1)")
            .bind(base::limits::EVENTS_KEPT)
            .execute(write.db())
            .await
            .map_err(fault)?;
        write.commit().await
    }
}

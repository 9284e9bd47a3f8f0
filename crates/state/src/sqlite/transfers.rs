//! Transfers in SQLite.

use async_trait::async_trait;
use base::fault::Fault;
use base::limits::TRANSFERS_LISTED_MAX;
use base::names::{ArtifactRef, DeliveryId, SiteName, TransferId};
use content::manifest::Digest;
use futures::TryStreamExt as _;
use futures::stream::BoxStream;
use model::transfer::{State, TransferQuery};
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::{Sqlite, Write, digest_of, fault, json, malformed};
use crate::engine::{Listed, See};
use crate::events::TransferState;
use crate::transfers::{
    Counted, Difference, TransferChanges, Transfers, WorkRow, no_transfer, no_work, second_transfer,
};
use crate::wake::Subject;
use crate::{TransferRow, Want};

const TABLE: &str = "transfer";
const ONE: &str = "SELECT * FROM transfer WHERE id = $1";
const CURRENT: &str = "SELECT * FROM transfer WHERE reference = $1 AND site = $2 AND state <> 'cancelled' AND removed_ms IS NULL
     ORDER BY created_ms DESC LIMIT 1";

/// The transfers of ids, each of a transfer or of a delivery; `$1` is the JSON list of them.
macro_rules! chosen {
    ($rest:literal) => {
        concat!(
            "WITH asked (id) AS MATERIALIZED (SELECT value FROM json_each($1)),
             chosen (id) AS MATERIALIZED (
                SELECT t.id FROM asked a CROSS JOIN transfer t ON t.id = a.id
                UNION SELECT t.id FROM asked a CROSS JOIN transfer t ON t.delivery = a.id
                UNION SELECT p.transfer FROM asked a CROSS JOIN delivery_part p ON p.delivery = a.id)
             SELECT t.* FROM chosen c CROSS JOIN transfer t ON t.id = c.id ",
            $rest
        )
    };
}

const CHOSEN: &str = chosen!("WHERE c.id > $2 ORDER BY c.id LIMIT $3");
const CHOSEN_SINCE: &str = chosen!("WHERE t.cursor > $2 ORDER BY t.cursor, t.id LIMIT $3");
const SINCE: &str = "SELECT * FROM transfer WHERE cursor > $2 ORDER BY cursor, id LIMIT $3";
const NEWEST: &str = "SELECT * FROM transfer ORDER BY created_ms DESC, id DESC LIMIT $3";
const NEWEST_BEHIND: &str = "SELECT * FROM transfer WHERE (created_ms, id) < (SELECT created_ms, id FROM transfer WHERE id = $2)
                             ORDER BY created_ms DESC, id DESC LIMIT $3";
const UNKNOWN: &str =
    "SELECT value FROM json_each($1) a WHERE NOT EXISTS (SELECT 1 FROM transfer WHERE id = a.value)
     AND NOT EXISTS (SELECT 1 FROM transfer WHERE delivery = a.value)
     AND NOT EXISTS (SELECT 1 FROM delivery_part WHERE delivery = a.value) LIMIT 1";

const WORK: &str = "SELECT id, delivery, reference, digest, want, generation, created_ms, state,
        json_valid(body) AS has_body,
        CASE WHEN json_valid(body) THEN json_extract(body, '$.bytes.total') END AS total,
        CASE WHEN json_valid(body) THEN json_extract(body, '$.reason') END AS reason
     FROM transfer WHERE site = $1 AND (state NOT IN ('done', 'failed', 'cancelled') OR want = 'cancel')
       AND ($2 IS NULL OR (created_ms, id) > (SELECT created_ms, id FROM transfer WHERE id = $2))
     ORDER BY created_ms, id";

fn want(text: &str) -> Want {
    match text {
        "pause" => Want::Pause,
        "cancel" => Want::Cancel,
        _ => Want::Run,
    }
}

fn work(row: &SqliteRow) -> Result<WorkRow, Fault> {
    let id: String = row.try_get("id").map_err(fault)?;
    let wrong = |what: &str| malformed(TABLE, &id, what);
    let text = |name: &str| row.try_get::<String, _>(name).map_err(fault);
    let number = |name: &str| row.try_get::<i64, _>(name).map_err(fault);
    let reason: Option<String> = row.try_get("reason").unwrap_or_default();
    Ok(WorkRow {
        id: id.parse().map_err(|_| wrong("id"))?,
        delivery: text("delivery")?.parse().map_err(|_| wrong("delivery"))?,
        artifact: text("reference")?.parse().map_err(|_| wrong("reference"))?,
        digest: digest_of(row.try_get("digest").map_err(fault)?).ok_or_else(|| wrong("digest"))?,
        want: want(&text("want")?),
        generation: number("generation")?,
        total: row
            .try_get::<Option<i64>, _>("total")
            .ok()
            .flatten()
            .and_then(|total| u64::try_from(total).ok())
            .unwrap_or_default(),
        created_ms: number("created_ms")?,
        state: State::parse(&text("state")?).ok_or_else(|| wrong("state"))?,
        reason: reason.and_then(|reason| serde_json::from_value(reason.into()).ok()),
    })
}

pub(super) fn transfer(row: &SqliteRow) -> Result<TransferRow, Fault> {
    let id: String = row.try_get("id").map_err(fault)?;
    let wrong = |what: &str| malformed(TABLE, &id, what);
    let text = |name: &str| row.try_get::<String, _>(name).map_err(fault);
    let number = |name: &str| row.try_get::<i64, _>(name).map_err(fault);
    Ok(TransferRow {
        id: id.parse().map_err(|_| wrong("id"))?,
        delivery: text("delivery")?.parse().map_err(|_| wrong("delivery"))?,
        artifact: text("reference")?.parse().map_err(|_| wrong("reference"))?,
        digest: digest_of(row.try_get("digest").map_err(fault)?).ok_or_else(|| wrong("digest"))?,
        site: text("site")?.parse().map_err(|_| wrong("site"))?,
        want: want(&text("want")?),
        generation: number("generation")?,
        state: State::parse(&text("state")?).ok_or_else(|| wrong("state"))?,
        body: serde_json::from_str(&text("body")?).map_err(|_| wrong("body"))?,
        created_ms: number("created_ms")?,
        updated_ms: number("updated_ms")?,
        finished_ms: row.try_get("finished_ms").map_err(fault)?,
        cursor: number("cursor")?,
        after: serde_json::from_str(&text("after_ids")?).map_err(|_| wrong("after_ids"))?,
        removed_ms: row.try_get("removed_ms").map_err(fault)?,
    })
}

/// The key of a row that may be malformed.
pub(super) fn key(row: &SqliteRow) -> String {
    row.try_get("id").unwrap_or_default()
}

impl Sqlite {
    fn sound_transfers(&self, rows: &[SqliteRow]) -> Vec<TransferRow> {
        rows.iter()
            .filter_map(|row| self.sound(TABLE, &key(row), transfer(row)))
            .collect()
    }

    /// Shows the rows of a statement. `are_named`: the caller named them, so one that cannot be
    /// read is an error.
    async fn show(
        &self,
        mut found: BoxStream<'_, Result<SqliteRow, sqlx::Error>>,
        are_named: bool,
        see: See<'_, TransferRow>,
    ) -> Result<(), Fault> {
        while let Some(row) = found.try_next().await.map_err(fault)? {
            let (key, read) = (key(&row), transfer(&row));
            if are_named && let Err(fault) = read {
                return Err(fault);
            }
            let listed = match self.sound(TABLE, &key, read) {
                Some(row) => Listed::Row(row),
                None => Listed::Malformed {
                    key,
                    cursor: row.try_get("cursor").unwrap_or_default(),
                },
            };
            if !see(listed) {
                break;
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Transfers for Sqlite {
    async fn change_transfers(&self) -> Result<Box<dyn TransferChanges>, Fault> {
        Ok(Box::new(self.begin().await?))
    }

    async fn transfer(&self, id: &str) -> Result<TransferRow, Fault> {
        let row = sqlx::query(ONE)
            .bind(id)
            .fetch_optional(self.read())
            .await
            .map_err(fault)?;
        row.as_ref().map_or_else(|| Err(no_transfer(id)), transfer)
    }

    async fn transfers_of(&self, id: &str) -> Result<Vec<TransferRow>, Fault> {
        let rows = sqlx::query(
            "SELECT * FROM transfer WHERE id = $1 OR delivery = $1 OR id IN (SELECT transfer FROM delivery_part WHERE delivery = $1)
             ORDER BY created_ms, id",
        )
        .bind(id)
        .fetch_all(self.read())
        .await
        .map_err(fault)?;
        if rows.is_empty() {
            return Err(no_work(id));
        }
        rows.iter().map(transfer).collect()
    }

    async fn open_transfers(&self, site: &SiteName) -> Result<Vec<TransferRow>, Fault> {
        let rows = sqlx::query(
            "SELECT * FROM transfer WHERE site = $1 AND (state NOT IN ('done', 'failed', 'cancelled') OR want = 'cancel')
             ORDER BY created_ms, id LIMIT $2",
        )
        .bind(site.as_str())
        .bind(TRANSFERS_LISTED_MAX as i64)
        .fetch_all(self.read())
        .await
        .map_err(fault)?;
        Ok(self.sound_transfers(&rows))
    }

    async fn each_open_transfer(
        &self,
        site: &SiteName,
        behind: Option<&str>,
        see: See<'_, WorkRow>,
    ) -> Result<(), Fault> {
        let mut found = sqlx::query(WORK)
            .bind(site.as_str())
            .bind(behind)
            .fetch(self.read());
        while let Some(row) = found.try_next().await.map_err(fault)? {
            let (key, read) = (key(&row), work(&row));
            let listed = match (read, row.try_get("has_body").unwrap_or_default()) {
                (Ok(read), true) => self.sound(TABLE, &key, Ok(read)),
                (Ok(read), false) => {
                    let _ = self.sound::<()>(TABLE, &key, Err(malformed(TABLE, &key, "body")));
                    Some(read)
                }
                (Err(fault), _) => self.sound(TABLE, &key, Err(fault)),
            };
            let listed = match listed {
                Some(row) => Listed::Row(row),
                None => Listed::Malformed { key, cursor: 0 },
            };
            if !see(listed) {
                break;
            }
        }
        Ok(())
    }

    async fn waits(&self, site: &SiteName) -> Result<Vec<(TransferId, TransferId)>, Fault> {
        let rows: Vec<(String, String)> = sqlx::query_as(
            "SELECT t.id, f.id FROM transfer t JOIN transfer f ON f.site = t.site AND f.reference = t.needs
             WHERE t.site = $1 AND t.needs IS NOT NULL AND t.state NOT IN ('done', 'failed', 'cancelled')
               AND f.state NOT IN ('done', 'cancelled') ORDER BY t.id, f.id",
        )
        .bind(site.as_str())
        .fetch_all(self.read())
        .await
        .map_err(fault)?;
        let id = |id: &String| {
            self.sound(
                TABLE,
                id,
                id.parse().map_err(|_| malformed(TABLE, id, "id")),
            )
        };
        Ok(rows
            .iter()
            .filter_map(|(waiting, first)| Some((id(waiting)?, id(first)?)))
            .collect())
    }

    async fn is_delivered(&self, site: &SiteName, digest: Digest) -> Result<bool, Fault> {
        sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM transfer WHERE site = $1 AND digest = $2 AND state <> 'cancelled' AND removed_ms IS NULL)",
        )
        .bind(site.as_str())
        .bind(&digest.0[..])
        .fetch_one(self.read())
        .await
        .map_err(fault)
    }

    async fn transfers_of_artifact(
        &self,
        artifact: &ArtifactRef,
    ) -> Result<Vec<TransferRow>, Fault> {
        let rows =
            sqlx::query("SELECT * FROM transfer WHERE reference = $1 ORDER BY created_ms, id")
                .bind(artifact.to_string())
                .fetch_all(self.read())
                .await
                .map_err(fault)?;
        rows.iter().map(transfer).collect()
    }

    async fn current_transfer(
        &self,
        artifact: &ArtifactRef,
        site: &SiteName,
    ) -> Result<Option<TransferRow>, Fault> {
        let current = sqlx::query(CURRENT)
            .bind(artifact.to_string())
            .bind(site.as_str());
        current
            .fetch_optional(self.read())
            .await
            .map_err(fault)?
            .as_ref()
            .map(transfer)
            .transpose()
    }

    async fn each_transfer(
        &self,
        query: &TransferQuery,
        behind: Option<&str>,
        rows: i64,
        see: See<'_, TransferRow>,
    ) -> Result<(), Fault> {
        let ids = query
            .id
            .as_ref()
            .map(|ids| json("ids", &ids.split(',').map(str::trim).collect::<Vec<_>>()))
            .transpose()?;
        if let Some(ids) = ids.as_ref().filter(|_| behind.is_none()) {
            let unknown: Option<(String,)> = sqlx::query_as(UNKNOWN)
                .bind(ids)
                .fetch_optional(self.read())
                .await
                .map_err(fault)?;
            if let Some((id,)) = unknown {
                return Err(no_work(&id));
            }
        }
        let sql = match (&ids, query.since, behind) {
            (Some(_), Some(_), _) => CHOSEN_SINCE,
            (Some(_), None, _) => CHOSEN,
            (None, Some(_), _) => SINCE,
            (None, None, None) => NEWEST,
            (None, None, Some(_)) => NEWEST_BEHIND,
        };
        let are_named = ids.is_some();
        let asked = sqlx::query(sql).bind(ids);
        let asked = match query.since {
            Some(since) => asked.bind(i64::try_from(since).unwrap_or(i64::MAX)),
            None => asked.bind(behind.unwrap_or_default()),
        };
        self.show(asked.bind(rows).fetch(self.read()), are_named, see)
            .await
    }

    async fn each_transfer_of_artifact(
        &self,
        artifact: &ArtifactRef,
        behind: Option<&str>,
        rows: i64,
        see: See<'_, TransferRow>,
    ) -> Result<(), Fault> {
        let query = sqlx::query(
            "SELECT * FROM transfer WHERE reference = $1 AND id > $2 ORDER BY id LIMIT $3",
        );
        let query = query
            .bind(artifact.to_string())
            .bind(behind.unwrap_or_default())
            .bind(rows);
        self.show(query.fetch(self.read()), false, see).await
    }

    async fn open_by_artifact(&self) -> Result<Vec<(SiteName, ArtifactRef, u64)>, Fault> {
        let rows: Vec<(String, String, i64)> = sqlx::query_as(
            "SELECT site, reference, COUNT(*) FROM transfer WHERE state NOT IN ('done', 'failed', 'cancelled') GROUP BY site, reference",
        )
        .fetch_all(self.read())
        .await
        .map_err(fault)?;
        // A row that cannot be read is reported where it is listed.
        let counted = |(site, artifact, count): (String, String, i64)| {
            Some((
                site.parse().ok()?,
                artifact.parse().ok()?,
                u64::try_from(count).ok()?,
            ))
        };
        Ok(rows.into_iter().filter_map(counted).collect())
    }

    async fn counted_transfers(&self) -> Result<Vec<Counted>, Fault> {
        sqlx::query_as(
            "SELECT state, site, json_extract(body, '$.reason') AS reason, COUNT(*) AS transfers,
                    TOTAL(json_extract(body, '$.bytes.reused')) AS reused, TOTAL(json_extract(body, '$.bytes.resumed')) AS resumed,
                    TOTAL(json_extract(body, '$.bytes.received')) AS received, TOTAL(json_extract(body, '$.bytes.committed')) AS committed,
                    TOTAL(json_extract(body, '$.bytes.wire')) AS wire
             FROM (SELECT state, site, CASE WHEN json_valid(body) THEN body ELSE '{}' END AS body FROM transfer)
             GROUP BY state, site, 3",
        )
        .fetch_all(self.read())
        .await
        .map_err(fault)
    }
}

#[async_trait]
impl TransferChanges for Write {
    async fn transfer(&mut self, id: &str) -> Result<Option<TransferRow>, Fault> {
        let row = sqlx::query(ONE)
            .bind(id)
            .fetch_optional(self.db())
            .await
            .map_err(fault)?;
        row.as_ref().map(transfer).transpose()
    }

    async fn current(
        &mut self,
        artifact: &ArtifactRef,
        site: &SiteName,
    ) -> Result<Option<TransferRow>, Fault> {
        let current = sqlx::query(CURRENT)
            .bind(artifact.to_string())
            .bind(site.as_str());
        current
            .fetch_optional(self.db())
            .await
            .map_err(fault)?
            .as_ref()
            .map(transfer)
            .transpose()
    }

    async fn rivals(&mut self, of: &TransferRow) -> Result<Vec<TransferRow>, Fault> {
        let rows = sqlx::query("SELECT * FROM transfer WHERE reference = $1 AND site = $2 AND id <> $3 AND state NOT IN ('done', 'cancelled')")
            .bind(of.artifact.to_string())
            .bind(of.site.as_str())
            .bind(of.id.as_str())
            .fetch_all(self.db())
            .await
            .map_err(fault)?;
        rows.iter().map(transfer).collect()
    }

    async fn may_be_removing(&mut self, id: &TransferId, now_ms: i64) -> Result<bool, Fault> {
        sqlx::query_scalar(
            "SELECT COUNT(*) = COUNT(r.name) AND COALESCE(SUM(r.open), 0) > 0
             FROM delivery_part p JOIN delivery d ON d.id = p.delivery LEFT JOIN run r ON r.name = d.run AND (
                r.state IN ('returning', 'done', 'failed', 'cancelled')
                OR CASE WHEN json_valid(r.body) THEN json_extract(r.body, '$.spec.deadline_ms') <= $2 END)
             WHERE p.transfer = $1",
        )
        .bind(id.as_str())
        .bind(now_ms)
        .fetch_one(self.db())
        .await
        .map_err(fault)
    }

    async fn greatest_id(&mut self) -> Result<Option<TransferId>, Fault> {
        let id: Option<String> =
            sqlx::query_scalar("SELECT id FROM transfer ORDER BY id DESC LIMIT 1")
                .fetch_optional(self.db())
                .await
                .map_err(fault)?;
        // An id that cannot be read has no time, and nothing depends on it.
        Ok(id.and_then(|id| id.parse().ok()))
    }

    async fn add_delivery(
        &mut self,
        id: &DeliveryId,
        run: Option<&str>,
        created_ms: i64,
    ) -> Result<(), Fault> {
        sqlx::query("INSERT INTO delivery (id, run, created_ms) VALUES ($1, $2, $3)")
            .bind(id.as_str())
            .bind(run)
            .bind(created_ms)
            .execute(self.db())
            .await
            .map_err(fault)?;
        self.changes(Subject::Other);
        Ok(())
    }

    async fn add_part(
        &mut self,
        delivery: &DeliveryId,
        transfer: &TransferId,
        site: &SiteName,
    ) -> Result<(), Fault> {
        sqlx::query("INSERT INTO delivery_part (delivery, transfer) VALUES ($1, $2)")
            .bind(delivery.as_str())
            .bind(transfer.as_str())
            .execute(self.db())
            .await
            .map_err(fault)?;
        // What a run borrowed is so no longer when it was asked for otherwise.
        self.changes(Subject::Site(site.clone()));
        Ok(())
    }

    async fn insert(
        &mut self,
        row: &TransferRow,
        needs: Option<&ArtifactRef>,
    ) -> Result<(), Fault> {
        let cursor = self
            .note(
                "transfer",
                &row.id,
                json("a transfer", &TransferState::of(row))?,
                Subject::Site(row.site.clone()),
            )
            .await?;
        sqlx::query(
            "INSERT INTO transfer (id, delivery, reference, digest, site, want, generation, state, body, created_ms, updated_ms, cursor,
                 after_ids, needs)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)",
        )
        .bind(row.id.as_str())
        .bind(row.delivery.as_str())
        .bind(row.artifact.to_string())
        .bind(&row.digest.0[..])
        .bind(row.site.as_str())
        .bind(row.want.as_str())
        .bind(row.generation)
        .bind(row.state.as_str())
        .bind(json("a transfer", &row.body)?)
        .bind(row.created_ms)
        .bind(row.updated_ms)
        .bind(cursor)
        .bind(json("a transfer", &row.after)?)
        .bind(needs.map(ToString::to_string))
        .execute(self.db())
        .await
        .map(drop)
        .map_err(fault)
    }

    async fn store(&mut self, row: &TransferRow, difference: Difference) -> Result<(), Fault> {
        let subject = match difference.work {
            true => Subject::Site(row.site.clone()),
            false => Subject::Progress,
        };
        let cursor = match difference.shows {
            true => {
                let state = json("a transfer", &TransferState::of(row))?;
                self.note("transfer", &row.id, state, subject.clone())
                    .await?
            }
            false => row.cursor,
        };
        self.changes(subject);
        let stored = sqlx::query(
            "UPDATE transfer SET want = $1, generation = $2, state = $3, body = $4, updated_ms = $5, finished_ms = $6, after_ids = $7,
                 removed_ms = $8, cursor = $9 WHERE id = $10",
        )
        .bind(row.want.as_str())
        .bind(row.generation)
        .bind(row.state.as_str())
        .bind(json("a transfer", &row.body)?)
        .bind(row.updated_ms)
        .bind(row.finished_ms)
        .bind(json("a transfer", &row.after)?)
        .bind(row.removed_ms)
        .bind(cursor)
        .bind(row.id.as_str())
        .execute(self.db())
        .await;
        stored.map(drop).map_err(|e| match &e {
            sqlx::Error::Database(db) if db.is_unique_violation() => second_transfer(row),
            _ => fault(e),
        })
    }

    async fn commit(self: Box<Self>) -> Result<(), Fault> {
        Write::commit(*self).await
    }
}

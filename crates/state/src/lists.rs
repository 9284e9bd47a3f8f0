//! Lists that are read a page at a time, each page within a number of rows and of bytes: no list is
//! in memory as a whole.

use futures::TryStreamExt as _;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::artifacts::artifact;
use super::sites::{SITES, SiteColumns, SiteRow, site};
use super::transfers::transfer;
use super::{ArtifactRow, Catalogue, DeliveryRow, TransferRow, fault};
use base::fault::Fault;
use base::limits::API_ROWS_DEFAULT;
use base::names::{ArtifactRef, DeliveryId, SiteName};
use content::chunk::Hash;
use content::manifest::Digest;
use model::paging::{Page, Pager, Room};
use model::transfer::TransferQuery;

/// The transfers of ids, each of a transfer or of a delivery; `?1` is the JSON list of them.
macro_rules! chosen {
    ($rest:literal) => {
        concat!(
            "WITH asked (id) AS MATERIALIZED (SELECT value FROM json_each(?1)),
             chosen (id) AS MATERIALIZED (
                SELECT t.id FROM asked a CROSS JOIN transfer t ON t.id = a.id
                UNION SELECT t.id FROM asked a CROSS JOIN transfer t ON t.delivery = a.id
                UNION SELECT p.transfer FROM asked a CROSS JOIN delivery_part p ON p.delivery = a.id)
             SELECT t.* FROM chosen c CROSS JOIN transfer t ON t.id = c.id ",
            $rest
        )
    };
}

const CHOSEN: &str = chosen!("WHERE c.id > ?2 ORDER BY c.id LIMIT ?3");
const CHOSEN_SINCE: &str = chosen!("WHERE t.cursor > ?2 ORDER BY t.cursor, t.id LIMIT ?3");
const SINCE: &str = "SELECT * FROM transfer WHERE cursor > ?2 ORDER BY cursor, id LIMIT ?3";
const NEWEST: &str = "SELECT * FROM transfer ORDER BY created_ms DESC, id DESC LIMIT ?3";
const NEWEST_BEHIND: &str = "SELECT * FROM transfer WHERE (created_ms, id) < (SELECT created_ms, id FROM transfer WHERE id = ?2)
                             ORDER BY created_ms DESC, id DESC LIMIT ?3";
const UNKNOWN: &str =
    "SELECT value FROM json_each(?1) a WHERE NOT EXISTS (SELECT 1 FROM transfer WHERE id = a.value)
     AND NOT EXISTS (SELECT 1 FROM transfer WHERE delivery = a.value)
     AND NOT EXISTS (SELECT 1 FROM delivery_part WHERE delivery = a.value) LIMIT 1";

impl Catalogue {
    /// Shows the transfers that a query means one by one until `see` says `false`, `rows` of them
    /// at most: what changed since a cursor in that order, the transfers of ids as they were begun,
    /// else the newest first. `behind`: the transfer behind which it goes on, where there is no
    /// cursor.
    pub async fn scan_transfers(
        &self,
        query: &TransferQuery,
        behind: Option<&str>,
        rows: i64,
        mut see: impl FnMut(TransferRow) -> bool + Send,
    ) -> Result<(), Fault> {
        let ids = query.id.as_ref().map(|ids| {
            serde_json::json!(ids.split(',').map(str::trim).collect::<Vec<_>>()).to_string()
        });
        if let Some(ids) = ids.as_ref().filter(|_| behind.is_none()) {
            let unknown: Option<(String,)> = sqlx::query_as(UNKNOWN)
                .bind(ids)
                .fetch_optional(&self.read)
                .await
                .map_err(fault)?;
            if let Some((id,)) = unknown {
                return Err(
                    Fault::not_found(format!("there is no transfer or delivery {id}"))
                        .with_next("'packhorse status' lists them"),
                );
            }
        }
        let sql = match (&ids, query.since, behind) {
            (Some(_), Some(_), _) => CHOSEN_SINCE,
            (Some(_), None, _) => CHOSEN,
            (None, Some(_), _) => SINCE,
            (None, None, None) => NEWEST,
            (None, None, Some(_)) => NEWEST_BEHIND,
        };
        let asked = sqlx::query(sql).bind(ids);
        let asked = match query.since {
            Some(since) => asked.bind(i64::try_from(since).unwrap_or(i64::MAX)),
            None => asked.bind(behind.unwrap_or_default()),
        };
        let mut found = asked.bind(rows).fetch(&self.read);
        while let Some(row) = found.try_next().await.map_err(fault)? {
            if !see(transfer(&row)?) {
                break;
            }
        }
        Ok(())
    }

    /// A page of the transfers that a query means, as `show` shows them, and the cursor to go on
    /// from: behind what the page holds, where the query has one.
    pub async fn transfer_page<T: Serialize + Send>(
        &self,
        query: &TransferQuery,
        behind: Option<&str>,
        room: Room,
        mut show: impl FnMut(&TransferRow) -> T + Send,
    ) -> Result<(Page<T>, u64), Fault> {
        // Before the rows: what changes meanwhile must still come.
        let newest = self.cursor().await?;
        let mut pager = Pager::new(room);
        let (mut cursors, mut cut_at) = (Vec::new(), None);
        let see = |row: TransferRow| {
            let is_in = pager.put(show(&row), &*row.id);
            if is_in {
                cursors.push(row.cursor as u64);
            }
            cut_at = (!is_in).then_some(row.cursor as u64);
            is_in
        };
        self.scan_transfers(query, behind, room.rows_asked(), see)
            .await?;
        let mut page = pager.page();
        let (Some(cut_at), Some(_), Some(last)) = (cut_at, query.since, cursors.last().copied())
        else {
            return Ok((page, newest));
        };
        // An earlier version gave several transfers one cursor: those go together, if they fit.
        let before = cursors.iter().take_while(|cursor| **cursor < last).count();
        if cut_at == last && before > 0 {
            page.rows.truncate(before);
            cursors.truncate(before);
        }
        let cursor = cursors.last().copied().unwrap_or(newest);
        Ok((page, cursor))
    }

    /// The transfers that a query means, `limit` of them at most (1,000 when it does not say), and
    /// the cursor to go on from.
    pub async fn transfers(&self, query: &TransferQuery) -> Result<(Vec<TransferRow>, u64), Fault> {
        let newest = self.cursor().await?;
        let limit = i64::from(query.limit.unwrap_or(API_ROWS_DEFAULT));
        let mut rows = Vec::new();
        self.scan_transfers(query, None, limit, |row| {
            rows.push(row);
            true
        })
        .await?;
        // A reader who got a full page goes on behind it, not behind what it was not shown.
        let cursor = match (query.since, rows.last()) {
            (Some(_), Some(last)) if rows.len() as i64 == limit => last.cursor as u64,
            _ => newest,
        };
        Ok((rows, cursor))
    }

    /// A page of the transfers of an artifact, in the order in which they were begun, behind this
    /// one.
    pub async fn artifact_transfer_page<T: Serialize + Send>(
        &self,
        artifact: &ArtifactRef,
        behind: Option<&str>,
        room: Room,
        mut show: impl FnMut(&TransferRow) -> T + Send,
    ) -> Result<Page<T>, Fault> {
        let query = sqlx::query(
            "SELECT * FROM transfer WHERE reference = ? AND id > ? ORDER BY id LIMIT ?",
        );
        let query = query
            .bind(artifact.to_string())
            .bind(behind.unwrap_or_default())
            .bind(room.rows_asked());
        let mut rows = query.fetch(&self.read);
        let mut pager = Pager::new(room);
        while let Some(row) = rows.try_next().await.map_err(fault)? {
            let row = transfer(&row)?;
            if !pager.put(show(&row), &*row.id) {
                break;
            }
        }
        Ok(pager.page())
    }

    /// A page of the artifacts by name, behind this one, as `show` shows them.
    pub async fn artifact_page<T: Serialize + Send>(
        &self,
        behind: Option<&str>,
        room: Room,
        mut show: impl FnMut(&ArtifactRow) -> T + Send,
    ) -> Result<Page<T>, Fault> {
        let query =
            sqlx::query("SELECT * FROM artifact WHERE reference > ? ORDER BY reference LIMIT ?");
        let mut rows = query
            .bind(behind.unwrap_or_default())
            .bind(room.rows_asked())
            .fetch(&self.read);
        let mut pager = Pager::new(room);
        while let Some(row) = rows.try_next().await.map_err(fault)? {
            let row = artifact(&row)?;
            if !pager.put(show(&row), row.artifact.to_string()) {
                break;
            }
        }
        Ok(pager.page())
    }

    /// The names of all artifacts, in order: whoever works on all of them reads one after the
    /// other.
    pub async fn artifact_names(&self) -> Result<Vec<ArtifactRef>, Fault> {
        names(&self.read).await
    }

    /// The names and digests of all artifacts, in order.
    pub async fn artifacts_by_digest(&self) -> Result<Vec<(ArtifactRef, Digest)>, Fault> {
        let mut rows = sqlx::query_as::<_, (String, Vec<u8>)>(
            "SELECT reference, digest FROM artifact ORDER BY reference",
        )
        .fetch(&self.read);
        let mut out = Vec::new();
        while let Some((name, digest)) = rows.try_next().await.map_err(fault)? {
            let digest = digest.try_into().map(Hash).map_err(|_| {
                Fault::internal(format!("the catalogue holds a malformed digest of {name}"))
            })?;
            out.push((name.parse()?, digest));
        }
        Ok(out)
    }

    /// The same as [`Catalogue::artifact_names`], once every change that has begun is written or
    /// given up: what is visible to nobody yet and will be is among them.
    pub async fn artifact_names_settled(&self) -> Result<Vec<ArtifactRef>, Fault> {
        names(&self.write).await
    }

    /// A page of the sites by name, behind this one, as `show` shows them.
    pub async fn site_page<T: Serialize + Send>(
        &self,
        behind: Option<&str>,
        room: Room,
        mut show: impl FnMut(&SiteRow) -> T + Send,
    ) -> Result<Page<T>, Fault> {
        let mut rows = sqlx::query_as::<_, SiteColumns>(SITES)
            .bind(behind)
            .bind(room.rows_asked())
            .fetch(&self.read);
        let mut pager = Pager::new(room);
        while let Some(row) = rows.try_next().await.map_err(fault)? {
            let row = site(row)?;
            if !pager.put(show(&row), row.name.to_string()) {
                break;
            }
        }
        Ok(pager.page())
    }

    /// A page of the runs, the newest first, as `show` shows them: those that a site has to do
    /// with, or all; behind the run of this name, and without the first `skip` of them.
    pub async fn run_page<T: DeserializeOwned, S: Serialize>(
        &self,
        of: Option<&SiteName>,
        behind: Option<&str>,
        skip: u32,
        room: Room,
        mut show: impl FnMut(&T) -> S + Send,
    ) -> Result<Page<S>, Fault> {
        let mut rows = sqlx::query_as::<_, (String, String)>(
            "SELECT name, body FROM run WHERE (?1 IS NULL OR json_extract(body, '$.spec.from') = ?1 OR json_extract(body, '$.spec.on') = ?1)
             AND (?2 IS NULL OR created_ms < (SELECT created_ms FROM run WHERE name = ?2)
                  OR (created_ms = (SELECT created_ms FROM run WHERE name = ?2) AND name > ?2))
             ORDER BY created_ms DESC, name LIMIT ?3 OFFSET ?4",
        )
        .bind(of.map(|site| site.as_str()))
        .bind(behind)
        .bind(room.rows_asked())
        .bind(i64::from(skip))
        .fetch(&self.read);
        let mut pager = Pager::new(room);
        while let Some((name, body)) = rows.try_next().await.map_err(fault)? {
            let run = super::runs::parse((name.clone(), body))?;
            if !pager.put(show(&run), name) {
                break;
            }
        }
        Ok(pager.page())
    }

    /// The newest deliveries behind this one, newest first. `by_transfers`: those too that are
    /// known by their transfers alone, as a site knows them.
    pub async fn deliveries(
        &self,
        behind: Option<&str>,
        rows: i64,
        by_transfers: bool,
    ) -> Result<Vec<DeliveryRow>, Fault> {
        let key = match behind {
            Some(id) => match self.delivery(id).await {
                Ok(row) => row.created_ms,
                Err(_) => return Ok(Vec::new()),
            },
            None => i64::MAX,
        };
        let sql = match by_transfers {
            false => {
                "SELECT id, run, created_ms FROM delivery WHERE (created_ms, id) < (?1, ?2) ORDER BY created_ms DESC, id DESC LIMIT ?3"
            }
            true => {
                "SELECT id, run, created_ms FROM (
                    SELECT id, run, created_ms FROM delivery
                    UNION ALL SELECT delivery, NULL, MIN(created_ms) FROM transfer
                        WHERE delivery NOT IN (SELECT id FROM delivery) GROUP BY delivery)
                 WHERE (created_ms, id) < (?1, ?2) ORDER BY created_ms DESC, id DESC LIMIT ?3"
            }
        };
        let found: Vec<(String, Option<String>, i64)> = sqlx::query_as(sql)
            .bind(key)
            .bind(behind.unwrap_or_default())
            .bind(rows)
            .fetch_all(&self.read)
            .await
            .map_err(fault)?;
        found
            .into_iter()
            .map(|(id, run, created_ms)| {
                Ok(DeliveryRow {
                    id: id.parse()?,
                    run,
                    created_ms,
                })
            })
            .collect()
    }

    /// Shows the transfers of a delivery one by one, in the order in which they were begun.
    pub async fn each_part(
        &self,
        id: &DeliveryId,
        mut see: impl FnMut(TransferRow) + Send,
    ) -> Result<(), Fault> {
        let query = TransferQuery {
            id: Some(id.to_string()),
            ..TransferQuery::default()
        };
        self.scan_transfers(&query, None, i64::MAX, |row| {
            see(row);
            true
        })
        .await
    }

    /// How many transfers there are, and their bytes.
    pub async fn counted_transfers(&self) -> Result<Vec<Counted>, Fault> {
        sqlx::query_as(
            "SELECT state, site, json_extract(body, '$.reason') AS reason, COUNT(*) AS transfers,
                    TOTAL(json_extract(body, '$.bytes.reused')) AS reused, TOTAL(json_extract(body, '$.bytes.resumed')) AS resumed,
                    TOTAL(json_extract(body, '$.bytes.received')) AS received, TOTAL(json_extract(body, '$.bytes.committed')) AS committed,
                    TOTAL(json_extract(body, '$.bytes.wire')) AS wire
             FROM transfer GROUP BY state, site, 3",
        )
        .fetch_all(&self.read)
        .await
        .map_err(fault)
    }
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

async fn names(pool: &sqlx::SqlitePool) -> Result<Vec<ArtifactRef>, Fault> {
    let mut rows =
        sqlx::query_as::<_, (String,)>("SELECT reference FROM artifact ORDER BY reference")
            .fetch(pool);
    let mut out = Vec::new();
    while let Some((name,)) = rows.try_next().await.map_err(fault)? {
        out.push(name.parse()?);
    }
    Ok(out)
}

//! Training runs and lineage in SQLite.

use async_trait::async_trait;
use base::clock;
use base::fault::Fault;
use base::names::{ArtifactRef, SiteName};
use futures::TryStreamExt as _;
use model::run::Lineage;

use super::{Sqlite, fault, json, malformed};
use crate::engine::{Listed, See};
use crate::runs::{RunRow, Runs};
use crate::wake::Subject;

type Columns = (String, String, i64, String);

fn run((name, state, open, body): Columns) -> RunRow {
    RunRow {
        name,
        state,
        open: open != 0,
        body,
    }
}

#[async_trait]
impl Runs for Sqlite {
    async fn put_run(&self, run: &RunRow, sites: &[SiteName]) -> Result<(), Fault> {
        let mut write = self.begin().await?;
        sqlx::query(
            "INSERT INTO run (name, state, open, body, created_ms, updated_ms) VALUES ($1, $2, $3, $4, $5, $5)
             ON CONFLICT (name) DO UPDATE SET state = $2, open = $3, body = $4, updated_ms = $5",
        )
        .bind(&run.name)
        .bind(&run.state)
        .bind(i64::from(run.open))
        .bind(&run.body)
        .bind(clock::now_ms())
        .execute(write.db())
        .await
        .map_err(fault)?;
        write
            .note("run", &run.name, run.body.clone(), Subject::Other)
            .await?;
        sites
            .iter()
            .for_each(|site| write.changes(Subject::Site(site.clone())));
        write.commit().await
    }

    async fn run_row(&self, name: &str) -> Result<Option<RunRow>, Fault> {
        let row: Option<Columns> =
            sqlx::query_as("SELECT name, state, open, body FROM run WHERE name = $1")
                .bind(name)
                .fetch_optional(self.read())
                .await
                .map_err(fault)?;
        Ok(row.map(run))
    }

    async fn open_run_rows(&self, limit: u32) -> Result<Vec<RunRow>, Fault> {
        let query = "SELECT name, state, open, body FROM run WHERE open = 1 ORDER BY created_ms, name LIMIT $1";
        let rows: Vec<Columns> = sqlx::query_as(query)
            .bind(i64::from(limit))
            .fetch_all(self.read())
            .await
            .map_err(fault)?;
        Ok(rows.into_iter().map(run).collect())
    }

    async fn each_run(
        &self,
        of: Option<&SiteName>,
        behind: Option<&str>,
        skip: u32,
        rows: i64,
        see: See<'_, RunRow>,
    ) -> Result<(), Fault> {
        let mut found = sqlx::query_as::<_, Columns>(
            "SELECT name, state, open, body FROM run
             WHERE ($1 IS NULL OR CASE WHEN json_valid(body) THEN
                 json_extract(body, '$.spec.from') = $1 OR json_extract(body, '$.spec.on') = $1 END)
             AND ($2 IS NULL OR created_ms < (SELECT created_ms FROM run WHERE name = $2)
                  OR (created_ms = (SELECT created_ms FROM run WHERE name = $2) AND name > $2))
             ORDER BY created_ms DESC, name LIMIT $3 OFFSET $4",
        )
        .bind(of.map(|site| site.as_str()))
        .bind(behind)
        .bind(rows)
        .bind(i64::from(skip))
        .fetch(self.read());
        while let Some(row) = found.try_next().await.map_err(fault)? {
            if !see(Listed::Row(run(row))) {
                break;
            }
        }
        Ok(())
    }

    async fn set_lineage(&self, artifact: &ArtifactRef, lineage: &Lineage) -> Result<(), Fault> {
        // A site receives the lineage with each list of the hub. A stored lineage that cannot be
        // read is replaced.
        if self.lineage(artifact).await.ok().flatten().as_ref() == Some(lineage) {
            return Ok(());
        }
        let mut write = self.begin().await?;
        sqlx::query("INSERT INTO lineage (reference, body) VALUES ($1, $2) ON CONFLICT (reference) DO UPDATE SET body = $2")
            .bind(artifact.to_string())
            .bind(json("a lineage", lineage)?)
            .execute(write.db())
            .await
            .map_err(fault)?;
        write.changes(Subject::Artifacts);
        write.commit().await
    }

    async fn lineage(&self, artifact: &ArtifactRef) -> Result<Option<Lineage>, Fault> {
        let name = artifact.to_string();
        let row: Option<(String,)> =
            sqlx::query_as("SELECT body FROM lineage WHERE reference = $1")
                .bind(&name)
                .fetch_optional(self.read())
                .await
                .map_err(fault)?;
        Ok(row.and_then(|(body,)| {
            let read = serde_json::from_str(&body).map_err(|e| malformed("lineage", &name, e));
            self.sound("lineage", &name, read)
        }))
    }
}

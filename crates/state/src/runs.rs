//! Training runs in the catalogue, as JSON that `run` gives its meaning; and the lineage of models.

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Catalogue, fault, note};
use base::clock;
use base::fault::Fault;
use base::names::ArtifactRef;
use model::run::Lineage;

/// Name and body.
type Columns = (String, String);

pub(super) fn parse<T: DeserializeOwned>((name, body): Columns) -> Result<T, Fault> {
    serde_json::from_str(&body)
        .map_err(|e| Fault::internal(format!("the catalogue holds a malformed run {name}: {e}")))
}

impl Catalogue {
    /// Writes a run. `open` until it has ended and nothing of it is left to be cleaned up.
    pub async fn save_run<T: Serialize + Sync>(
        &self,
        name: &str,
        state: &str,
        open: bool,
        run: &T,
    ) -> Result<(), Fault> {
        let body = serde_json::to_string(run)
            .map_err(|e| Fault::internal(format!("a run as JSON: {e}")))?;
        let now = clock::now_unix_ms() as i64;
        let mut tx = self
            .write
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(fault)?;
        sqlx::query(
            "INSERT INTO run (name, state, open, body, created_ms, updated_ms) VALUES (?1, ?2, ?3, ?4, ?5, ?5)
             ON CONFLICT (name) DO UPDATE SET state = ?2, open = ?3, body = ?4, updated_ms = ?5",
        )
        .bind(name)
        .bind(state)
        .bind(open)
        .bind(body)
        .bind(now)
        .execute(&mut *tx)
        .await
        .map_err(fault)?;
        note(&mut tx, "run", name).await?;
        tx.commit().await.map_err(fault)?;
        self.notify();
        Ok(())
    }

    /// One run.
    pub async fn run<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, Fault> {
        let row: Option<Columns> = sqlx::query_as("SELECT name, body FROM run WHERE name = ?")
            .bind(name)
            .fetch_optional(&self.read)
            .await
            .map_err(fault)?;
        row.map(parse).transpose()
    }

    /// All runs that are open, oldest first.
    pub async fn open_runs<T: DeserializeOwned>(&self, limit: u32) -> Result<Vec<T>, Fault> {
        let query = "SELECT name, body FROM run WHERE open = 1 ORDER BY created_ms, name LIMIT ?";
        let rows: Vec<Columns> = sqlx::query_as(query)
            .bind(i64::from(limit))
            .fetch_all(&self.read)
            .await
            .map_err(fault)?;
        rows.into_iter().map(parse).collect()
    }

    /// An artifact that was published here and is read in this folder, or below it: resolved, as
    /// places are.
    pub async fn published_in(&self, folder: &Path) -> Result<Option<ArtifactRef>, Fault> {
        let row: Option<(String,)> = sqlx::query_as(
            "SELECT reference FROM artifact WHERE published_ms IS NOT NULL
             AND substr(json_extract(place, '$.path') || '/', 1, length(?1) + 1) = ?1 || '/' ORDER BY reference LIMIT 1",
        )
        .bind(folder.to_string_lossy().into_owned())
        .fetch_optional(&self.read)
        .await
        .map_err(fault)?;
        row.map(|(name,)| Ok(name.parse()?)).transpose()
    }

    /// Notes what a model was made of.
    pub async fn set_lineage(
        &self,
        artifact: &ArtifactRef,
        lineage: &Lineage,
    ) -> Result<(), Fault> {
        if self.lineage(artifact).await?.as_ref() == Some(lineage) {
            return Ok(());
        }
        let body = serde_json::to_string(lineage)
            .map_err(|e| Fault::internal(format!("a lineage as JSON: {e}")))?;
        sqlx::query("INSERT INTO lineage (reference, body) VALUES (?1, ?2) ON CONFLICT (reference) DO UPDATE SET body = ?2")
            .bind(artifact.to_string())
            .bind(body)
            .execute(&self.write)
            .await
            .map_err(fault)?;
        self.notify();
        Ok(())
    }

    /// What a model was made of, where that is known.
    pub async fn lineage(&self, artifact: &ArtifactRef) -> Result<Option<Lineage>, Fault> {
        let row: Option<(String,)> = sqlx::query_as("SELECT body FROM lineage WHERE reference = ?")
            .bind(artifact.to_string())
            .fetch_optional(&self.read)
            .await
            .map_err(fault)?;
        row.map(|(body,)| {
            serde_json::from_str(&body)
                .map_err(|e| Fault::internal(format!("a malformed lineage of {artifact}: {e}")))
        })
        .transpose()
    }
}

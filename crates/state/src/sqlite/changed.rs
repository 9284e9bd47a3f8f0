//! Artifacts that were published in place, and their changes, in SQLite.

use std::collections::HashMap;
use std::path::Path;

use async_trait::async_trait;
use base::fault::Fault;
use base::limits::CHANGED_REPORTED_MAX;
use base::names::{ArtifactRef, SiteName};
use base::text::Message;
use sink::StorageLocation;

use super::{Sqlite, Write, fault, malformed};
use crate::changed::{InPlace, PublishedInPlace};

const TABLE: &str = "artifact";

fn parsed(name: &str) -> Result<ArtifactRef, Fault> {
    name.parse().map_err(|e| malformed(TABLE, name, e))
}

#[async_trait]
impl InPlace for Sqlite {
    async fn published(&self) -> Result<Vec<(ArtifactRef, StorageLocation)>, Fault> {
        let rows: Vec<(String, String)> = sqlx::query_as(
            "SELECT reference, place FROM artifact WHERE published_ms IS NOT NULL AND place IS NOT NULL ORDER BY reference",
        )
        .fetch_all(self.read())
        .await
        .map_err(fault)?;
        Ok(rows
            .iter()
            .filter_map(|(name, place)| {
                let place = serde_json::from_str(place).map_err(|e| malformed(TABLE, name, e));
                let read = parsed(name).and_then(|artifact| Ok((artifact, place?)));
                self.sound(TABLE, name, read)
            })
            .collect())
    }

    async fn published_at_sites(&self) -> Result<Vec<PublishedInPlace<SiteName>>, Fault> {
        let rows: Vec<(String, i64, String, Option<String>)> =
            sqlx::query_as("SELECT origin, created_ms, reference, changed FROM artifact WHERE origin IS NOT NULL ORDER BY reference")
                .fetch_all(self.read())
                .await
                .map_err(fault)?;
        let read = |(site, at_ms, name, changed): (String, i64, String, Option<String>)| {
            let site = site.parse().map_err(|e| malformed(TABLE, &name, e));
            self.sound(
                TABLE,
                &name,
                site.and_then(|site| Ok((site, at_ms, parsed(&name)?, changed))),
            )
        };
        Ok(rows.into_iter().filter_map(read).collect())
    }

    async fn published_here(&self) -> Result<Vec<PublishedInPlace<Option<String>>>, Fault> {
        let rows: Vec<(Option<String>, i64, String, Option<String>)> = sqlx::query_as(
            "SELECT place, published_ms, reference, changed FROM artifact WHERE published_ms IS NOT NULL ORDER BY reference",
        )
        .fetch_all(self.read())
        .await
        .map_err(fault)?;
        let read =
            |(place, at_ms, name, changed): (Option<String>, i64, String, Option<String>)| {
                self.sound(
                    TABLE,
                    &name,
                    parsed(&name).map(|artifact| (place, at_ms, artifact, changed)),
                )
            };
        Ok(rows.into_iter().filter_map(read).collect())
    }

    async fn published_in(&self, folder: &Path) -> Result<Option<ArtifactRef>, Fault> {
        let row: Option<(String,)> = sqlx::query_as(
            "SELECT reference FROM artifact WHERE published_ms IS NOT NULL
             AND CASE WHEN json_valid(place) THEN substr(json_extract(place, '$.path') || '/', 1, length($1) + 1) = $1 || '/' END
             ORDER BY reference LIMIT 1",
        )
        .bind(folder.to_string_lossy().into_owned())
        .fetch_optional(self.read())
        .await
        .map_err(fault)?;
        row.map(|(name,)| parsed(&name)).transpose()
    }

    async fn set_changed(
        &self,
        artifact: &ArtifactRef,
        changed: Option<&str>,
    ) -> Result<bool, Fault> {
        let mut write = self.begin().await?;
        let new = put(&mut write, None, &artifact.to_string(), changed).await?;
        write.commit().await?;
        Ok(new)
    }

    async fn changed_here(&self) -> Result<Vec<(ArtifactRef, Message)>, Fault> {
        let rows: Vec<(String, String)> = sqlx::query_as(
            "SELECT reference, changed FROM artifact
             WHERE changed IS NOT NULL AND published_ms IS NOT NULL AND offer IS NULL ORDER BY reference LIMIT $1",
        )
        .bind(CHANGED_REPORTED_MAX)
        .fetch_all(self.read())
        .await
        .map_err(fault)?;
        let read = |(name, changed): (String, String)| {
            self.sound(TABLE, &name, parsed(&name))
                .map(|artifact| (artifact, changed.into()))
        };
        Ok(rows.into_iter().filter_map(read).collect())
    }

    async fn set_changed_at(
        &self,
        site: &SiteName,
        all: &[(ArtifactRef, Message)],
    ) -> Result<bool, Fault> {
        // A site may send anything: at most as many entries are stored as a correct site sends.
        let all = all.iter().take(CHANGED_REPORTED_MAX as usize);
        let all: HashMap<String, String> = all
            .map(|(artifact, how)| (artifact.to_string(), how.to_string()))
            .collect();
        let mut write = self.begin().await?;
        let before: Vec<(String,)> = sqlx::query_as(
            "SELECT reference FROM artifact WHERE changed IS NOT NULL AND origin = $1",
        )
        .bind(site.as_str())
        .fetch_all(write.db())
        .await
        .map_err(fault)?;
        let mut new = false;
        for (name,) in before.iter().filter(|(name,)| !all.contains_key(name)) {
            new |= put(&mut write, Some(site), name, None).await?;
        }
        for (name, changed) in &all {
            new |= put(&mut write, Some(site), name, Some(changed)).await?;
        }
        write.commit().await?;
        Ok(new)
    }
}

/// Writes how an artifact changed, if `origin` published it (`None`: this daemon). Returns whether
/// this differs from the stored value.
async fn put(
    write: &mut Write,
    origin: Option<&SiteName>,
    name: &str,
    changed: Option<&str>,
) -> Result<bool, Fault> {
    let done = sqlx::query(
        "UPDATE artifact SET changed = $1 WHERE reference = $2 AND origin IS NOT DISTINCT FROM $3 AND changed IS DISTINCT FROM $1",
    )
    .bind(changed)
    .bind(name)
    .bind(origin.map(|site| site.as_str()))
    .execute(write.db())
    .await
    .map_err(fault)?;
    let new = done.rows_affected() > 0;
    if new {
        write.note_artifact(name).await?;
    }
    Ok(new)
}

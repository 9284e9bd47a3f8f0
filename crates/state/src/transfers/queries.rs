//! Which transfers there are: by id, artifact or site, what is still to do, and who may have what.

use super::{Part, TransferRow, transfer};
use crate::{Catalogue, fault};
use base::fault::Fault;
use base::names::{ArtifactRef, SiteName, TransferId};
use content::manifest::Digest;
use model::transfer::State;

pub(super) async fn one<'e>(
    db: impl sqlx::SqliteExecutor<'e>,
    id: &str,
) -> Result<TransferRow, Fault> {
    let row = sqlx::query("SELECT * FROM transfer WHERE id = ?")
        .bind(id)
        .fetch_optional(db)
        .await
        .map_err(fault)?;
    match row {
        Some(row) => transfer(&row),
        None => Err(Fault::not_found(format!("there is no transfer {id}"))
            .with_next("'packhorse status' lists them")),
    }
}

/// The transfer of an artifact to a site that stands.
pub(super) async fn standing<'e>(
    db: impl sqlx::SqliteExecutor<'e>,
    artifact: &ArtifactRef,
    site: &SiteName,
) -> Result<Option<TransferRow>, Fault> {
    let there = sqlx::query(
        "SELECT * FROM transfer WHERE reference = ? AND site = ? AND state != 'cancelled' AND removed_ms IS NULL
         ORDER BY created_ms DESC LIMIT 1",
    )
    .bind(artifact.to_string())
    .bind(site.as_str())
    .fetch_optional(db)
    .await
    .map_err(fault)?;
    there.as_ref().map(transfer).transpose()
}

impl Catalogue {
    /// One transfer.
    pub async fn transfer(&self, id: &str) -> Result<TransferRow, Fault> {
        one(&self.read, id).await
    }

    /// The transfers of an id, which may be a delivery's.
    pub async fn transfers_of(&self, id: &str) -> Result<Vec<TransferRow>, Fault> {
        let rows = sqlx::query(
            "SELECT * FROM transfer WHERE id = ?1 OR delivery = ?1 OR id IN (SELECT transfer FROM delivery_part WHERE delivery = ?1)
             ORDER BY created_ms, id",
        )
        .bind(id)
        .fetch_all(&self.read)
        .await
        .map_err(fault)?;
        if rows.is_empty() {
            return Err(
                Fault::not_found(format!("there is no transfer or delivery {id}"))
                    .with_next("'packhorse status' lists them"),
            );
        }
        rows.iter().map(transfer).collect()
    }

    /// What a site has to do: its transfers that are not ended, or that it has still to give up;
    /// oldest first.
    pub async fn open_transfers(&self, site: &SiteName) -> Result<Vec<TransferRow>, Fault> {
        let rows = sqlx::query(
            "SELECT * FROM transfer WHERE site = ? AND (state NOT IN ('done', 'failed', 'cancelled') OR want = 'cancel')
             ORDER BY created_ms, id LIMIT 1000",
        )
        .bind(site.as_str())
        .fetch_all(&self.read)
        .await
        .map_err(fault)?;
        rows.iter().map(transfer).collect()
    }

    /// Which open transfers of a site wait for which others: what they need is on its way there,
    /// and not given up. One that failed is still waited for, since a person will see to it.
    pub async fn waits(&self, site: &SiteName) -> Result<Vec<(TransferId, TransferId)>, Fault> {
        let rows: Vec<(String, String)> = sqlx::query_as(
            "SELECT t.id, first.id FROM transfer t JOIN transfer first ON first.site = t.site AND first.reference = t.needs
             WHERE t.site = ? AND t.needs IS NOT NULL AND t.state NOT IN ('done', 'failed', 'cancelled')
               AND first.state NOT IN ('done', 'cancelled') ORDER BY t.id, first.id",
        )
        .bind(site.as_str())
        .fetch_all(&self.read)
        .await
        .map_err(fault)?;
        rows.into_iter()
            .map(|(id, first)| Ok((id.parse()?, first.parse()?)))
            .collect()
    }

    /// Whether a site may read this content: it has a transfer of it that was not cancelled, nor
    /// its result removed.
    pub async fn is_entitled(&self, site: &SiteName, digest: Digest) -> Result<bool, Fault> {
        let row: Option<(i64,)> =
            sqlx::query_as("SELECT 1 FROM transfer WHERE site = ? AND digest = ? AND state != 'cancelled' AND removed_ms IS NULL LIMIT 1")
                .bind(site.as_str())
                .bind(&digest.0[..])
                .fetch_optional(&self.read)
                .await
                .map_err(fault)?;
        Ok(row.is_some())
    }

    /// The transfers of one artifact.
    pub async fn transfers_of_artifact(
        &self,
        artifact: &ArtifactRef,
    ) -> Result<Vec<TransferRow>, Fault> {
        let rows =
            sqlx::query("SELECT * FROM transfer WHERE reference = ? ORDER BY created_ms, id")
                .bind(artifact.to_string())
                .fetch_all(&self.read)
                .await
                .map_err(fault)?;
        rows.iter().map(transfer).collect()
    }

    /// The transfers of these parts that are done.
    pub async fn done_already(&self, parts: &[Part]) -> Result<Vec<TransferRow>, Fault> {
        let mut out = Vec::new();
        for part in parts {
            for site in &part.sites {
                out.extend(
                    standing(&self.read, &part.artifact, site)
                        .await?
                        .filter(|row| row.state == State::Done),
                );
            }
        }
        Ok(out)
    }
}

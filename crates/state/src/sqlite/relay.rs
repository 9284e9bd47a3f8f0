//! Relayed artifacts and the sharing lists of sites, in SQLite.

use async_trait::async_trait;
use base::clock;
use base::fault::Fault;
use base::names::{ArtifactRef, SiteName};
use content::manifest::Digest;

use super::{Sqlite, digest_of, fault, json, malformed};
use crate::relay::{Relay, RelayedArtifact, ShareTerms};

const TABLE: &str = "artifact";

#[async_trait]
impl Relay for Sqlite {
    async fn set_share(&self, site: &SiteName, share: Option<&[String]>) -> Result<(), Fault> {
        let share = share
            .map(|list| json("whom a site shares with", list))
            .transpose()?;
        self.set_of_site("UPDATE site SET share = $1 WHERE name = $2", share, site)
            .await
    }

    async fn share_terms(&self, origin: &SiteName, site: &SiteName) -> Result<ShareTerms, Fault> {
        let (share, labels): (Option<String>, Option<String>) =
            sqlx::query_as("SELECT (SELECT share FROM site WHERE name = $1), (SELECT labels FROM site WHERE name = $2)")
                .bind(origin.as_str())
                .bind(site.as_str())
                .fetch_one(self.read())
                .await
                .map_err(fault)?;
        Ok(ShareTerms { share, labels })
    }

    async fn origins_for(
        &self,
        site: &SiteName,
        digest: Digest,
    ) -> Result<Vec<Option<SiteName>>, Fault> {
        let rows: Vec<(Option<String>,)> = sqlx::query_as(
            "SELECT DISTINCT a.origin FROM transfer t JOIN artifact a ON a.reference = t.reference
             WHERE t.site = $1 AND t.digest = $2 AND a.digest = t.digest AND t.state <> 'cancelled' AND t.removed_ms IS NULL",
        )
        .bind(site.as_str())
        .bind(&digest.0[..])
        .fetch_all(self.read())
        .await
        .map_err(fault)?;
        rows.into_iter()
            .map(|(origin,)| Ok(origin.map(|name| name.parse()).transpose()?))
            .collect()
    }

    async fn sources(&self, digest: Digest) -> Result<Vec<(SiteName, bool)>, Fault> {
        let rows: Vec<(String, i64)> = sqlx::query_as(
            "SELECT site, MIN(rank) FROM (
                SELECT origin AS site, 0 AS rank FROM artifact WHERE digest = $1 AND origin IS NOT NULL
                UNION ALL SELECT site, 1 FROM transfer WHERE digest = $1 AND state = 'done' AND removed_ms IS NULL) AS known
             GROUP BY site ORDER BY MIN(rank), site",
        )
        .bind(&digest.0[..])
        .fetch_all(self.read())
        .await
        .map_err(fault)?;
        let read = |(name, rank): (String, i64)| {
            let site = name.parse().map_err(|e| malformed("transfer", &name, e));
            self.sound("transfer", &name, site)
                .map(|site| (site, rank == 0))
        };
        Ok(rows.into_iter().filter_map(read).collect())
    }

    async fn relayed_open(&self) -> Result<Vec<(Digest, SiteName)>, Fault> {
        let rows: Vec<(Vec<u8>, String)> = sqlx::query_as(
            "SELECT t.digest, t.site FROM transfer t JOIN artifact a ON a.reference = t.reference
             WHERE a.origin IS NOT NULL AND t.want = 'run' AND t.state NOT IN ('done', 'failed', 'cancelled', 'paused')
             GROUP BY t.digest, t.site ORDER BY MIN(t.created_ms) LIMIT 1000",
        )
        .fetch_all(self.read())
        .await
        .map_err(fault)?;
        let read = |(digest, site): (Vec<u8>, String)| {
            let digest = digest_of(digest).ok_or_else(|| malformed("transfer", &site, "digest"));
            let row = digest.and_then(|digest| {
                Ok((
                    digest,
                    site.parse().map_err(|e| malformed("transfer", &site, e))?,
                ))
            });
            self.sound("transfer", &site, row)
        };
        Ok(rows.into_iter().filter_map(read).collect())
    }

    async fn relay_used(&self, digest: Digest) -> Result<(), Fault> {
        let mut write = self.begin().await?;
        sqlx::query("UPDATE artifact SET used_ms = $1 WHERE digest = $2 AND origin IS NOT NULL")
            .bind(clock::now_ms())
            .bind(&digest.0[..])
            .execute(write.db())
            .await
            .map_err(fault)?;
        write.commit().await
    }

    async fn relay_kept(&self) -> Result<Vec<RelayedArtifact>, Fault> {
        let rows: Vec<(String, Vec<u8>, i64, i64, bool)> = sqlx::query_as(
            "SELECT reference, digest, pinned, used_ms,
                    EXISTS (SELECT 1 FROM transfer t WHERE t.digest = artifact.digest AND t.state NOT IN ('done', 'failed', 'cancelled'))
             FROM artifact WHERE origin IS NOT NULL AND used_ms IS NOT NULL ORDER BY used_ms",
        )
        .fetch_all(self.read())
        .await
        .map_err(fault)?;
        let read = |(name, digest, pinned, used_ms, open): (String, Vec<u8>, i64, i64, bool)| {
            let digest = digest_of(digest).ok_or_else(|| malformed(TABLE, &name, "digest"));
            let row = digest.and_then(|digest| {
                let artifact = name.parse().map_err(|e| malformed(TABLE, &name, e))?;
                Ok(RelayedArtifact {
                    artifact,
                    digest,
                    pinned: pinned != 0,
                    open,
                    used_ms,
                })
            });
            self.sound(TABLE, &name, row)
        };
        Ok(rows.into_iter().filter_map(read).collect())
    }

    async fn relay_evicted(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        self.on_artifact(
            "UPDATE artifact SET used_ms = NULL WHERE reference = $1",
            artifact,
            None,
        )
        .await
        .map(drop)
    }

    async fn set_pinned(&self, artifact: &ArtifactRef, pinned: bool) -> Result<(), Fault> {
        let name = artifact.to_string();
        let mut write = self.begin().await?;
        sqlx::query("UPDATE artifact SET pinned = $1 WHERE reference = $2")
            .bind(i64::from(pinned))
            .bind(&name)
            .execute(write.db())
            .await
            .map_err(fault)?;
        write.note_artifact(&name).await?;
        write.commit().await
    }

    async fn take_over(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        self.on_artifact(
            "UPDATE artifact SET origin = NULL, changed = NULL WHERE reference = $1",
            artifact,
            None,
        )
        .await
        .map(drop)
    }
}

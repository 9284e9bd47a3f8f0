//! What the hub knows of artifacts whose bytes live at sites: who has them, whom they are shared
//! with, what is kept.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Catalogue, fault, note};
use base::clock;
use base::fault::Fault;
use base::names::{ArtifactRef, SiteName, SiteSelector};
use content::chunk::Hash;
use content::manifest::{Digest, Root};

/// Who forbids that a site has what another published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forbids {
    /// The hub's policy.
    Hub,
    /// The site where it was published.
    Origin,
}

/// A relayed artifact of which something may be kept.
#[derive(Debug, Clone)]
pub struct RelayedArtifact {
    /// Its name.
    pub artifact: ArtifactRef,
    /// Its digest.
    pub digest: Digest,
    /// Its root manifest.
    pub root: Root,
    /// Whether it stays whatever its age.
    pub pinned: bool,
    /// Whether a transfer of it is open.
    pub open: bool,
    /// When it was last asked for.
    pub used_ms: i64,
}

fn digest_of(bytes: Vec<u8>) -> Result<Digest, Fault> {
    bytes
        .try_into()
        .map(Hash)
        .map_err(|_| Fault::internal("the catalogue holds a malformed row: digest"))
}

impl Catalogue {
    /// Sets the hub's policy of who may have what sites publish, which a site can only narrow;
    /// `None`: everybody. Clones that were made before do not know it.
    #[must_use]
    pub fn with_share_policy(self, policy: Option<Vec<SiteSelector>>) -> Self {
        Self {
            share_policy: policy.map(Arc::from),
            ..self
        }
    }

    /// Notes whom a site shares with; `None`: everybody.
    pub async fn set_share(&self, site: &SiteName, share: Option<&[String]>) -> Result<(), Fault> {
        let share = share.map(|list| serde_json::to_string(list).unwrap_or_default());
        sqlx::query("UPDATE site SET share = ? WHERE name = ?")
            .bind(share)
            .bind(site.as_str())
            .execute(&self.write)
            .await
            .map_err(fault)?;
        Ok(())
    }

    /// Whether `site` may have what is published at `origin`, by the hub's policy and by what
    /// `origin` says.
    pub async fn shares_with(&self, origin: &SiteName, site: &SiteName) -> Result<bool, Fault> {
        Ok(self.forbidden_by(origin, site).await?.is_none())
    }

    /// Who forbids that `site` has what is published at `origin`; of both the hub, whose word comes
    /// first. What is its own a site may always have.
    pub async fn forbidden_by(
        &self,
        origin: &SiteName,
        site: &SiteName,
    ) -> Result<Option<Forbids>, Fault> {
        if origin == site {
            return Ok(None);
        }
        let (share, labels): (Option<String>, Option<String>) =
            sqlx::query_as("SELECT (SELECT share FROM site WHERE name = ?1), (SELECT labels FROM site WHERE name = ?2)")
                .bind(origin.as_str())
                .bind(site.as_str())
                .fetch_one(&self.read)
                .await
                .map_err(fault)?;
        let labels: BTreeMap<String, String> = labels
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or_default();
        let allowed_by =
            |list: &[SiteSelector]| list.iter().any(|selector| selector.includes(site, &labels));
        if self
            .share_policy
            .as_deref()
            .is_some_and(|policy| !allowed_by(policy))
        {
            return Ok(Some(Forbids::Hub));
        }
        let Some(share) = share else { return Ok(None) };
        // What cannot be read allows nobody.
        let list: Vec<String> = serde_json::from_str(&share).unwrap_or_default();
        let list: Vec<SiteSelector> = list.iter().filter_map(|text| text.parse().ok()).collect();
        Ok(if allowed_by(&list) {
            None
        } else {
            Some(Forbids::Origin)
        })
    }

    /// Whether a site that has a transfer of this content may have it for all that the hub's policy
    /// and its sources say: by one of its names at least.
    pub async fn is_shared(&self, site: &SiteName, digest: Digest) -> Result<bool, Fault> {
        let origins: Vec<(Option<String>,)> = sqlx::query_as(
            "SELECT DISTINCT a.origin FROM transfer t JOIN artifact a ON a.reference = t.reference
             WHERE t.site = ? AND t.digest = ? AND a.digest = t.digest AND t.state != 'cancelled' AND t.removed_ms IS NULL",
        )
        .bind(site.as_str())
        .bind(&digest.0[..])
        .fetch_all(&self.read)
        .await
        .map_err(fault)?;
        for (origin,) in origins {
            match origin {
                None => return Ok(true),
                Some(origin) if self.shares_with(&origin.parse()?, site).await? => return Ok(true),
                Some(_) => {}
            }
        }
        Ok(false)
    }

    /// The sites that have this content, and whether it was published there: those first, then
    /// those where it has arrived.
    pub async fn sources(&self, digest: Digest) -> Result<Vec<(SiteName, bool)>, Fault> {
        let rows: Vec<(String, i64)> = sqlx::query_as(
            "SELECT site, MIN(rank) FROM (SELECT origin AS site, 0 AS rank FROM artifact WHERE digest = ?1 AND origin IS NOT NULL
             UNION ALL SELECT site, 1 FROM transfer WHERE digest = ?1 AND state = 'done' AND removed_ms IS NULL) GROUP BY site ORDER BY MIN(rank), site",
        )
        .bind(&digest.0[..])
        .fetch_all(&self.read)
        .await
        .map_err(fault)?;
        rows.into_iter()
            .map(|(name, rank)| Ok((name.parse()?, rank == 0)))
            .collect()
    }

    /// Where artifacts that live at sites are on their way to: each digest with a site that waits
    /// for it.
    pub async fn relayed_open(&self) -> Result<Vec<(Digest, SiteName)>, Fault> {
        let rows: Vec<(Vec<u8>, String)> = sqlx::query_as(
            "SELECT DISTINCT t.digest, t.site FROM transfer t JOIN artifact a ON a.reference = t.reference
             WHERE a.origin IS NOT NULL AND t.want = 'run' AND t.state NOT IN ('done', 'failed', 'cancelled', 'paused')
             ORDER BY t.created_ms LIMIT 1000",
        )
        .fetch_all(&self.read)
        .await
        .map_err(fault)?;
        rows.into_iter()
            .map(|(digest, site)| Ok((digest_of(digest)?, site.parse()?)))
            .collect()
    }

    /// Notes that relayed bytes of this content were asked for.
    pub async fn relay_used(&self, digest: Digest) -> Result<(), Fault> {
        sqlx::query("UPDATE artifact SET used_ms = ? WHERE digest = ? AND origin IS NOT NULL")
            .bind(clock::now_unix_ms() as i64)
            .bind(&digest.0[..])
            .execute(&self.write)
            .await
            .map_err(fault)?;
        Ok(())
    }

    /// Relayed artifacts of which something may be kept, the longest unused first.
    pub async fn relay_kept(&self) -> Result<Vec<RelayedArtifact>, Fault> {
        /// Reference, digest, root, pinned, when it was used, whether a transfer is open.
        type Row = (String, Vec<u8>, Vec<u8>, i64, i64, i64);
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT reference, digest, root, pinned, used_ms,
                    EXISTS (SELECT 1 FROM transfer t WHERE t.digest = artifact.digest AND t.state NOT IN ('done', 'failed', 'cancelled'))
             FROM artifact WHERE origin IS NOT NULL AND used_ms IS NOT NULL ORDER BY used_ms",
        )
        .fetch_all(&self.read)
        .await
        .map_err(fault)?;
        rows.into_iter()
            .map(|(reference, digest, root, pinned, used_ms, open)| {
                let digest = digest_of(digest)?;
                let root = Root::parse(&root, digest)?;
                Ok(RelayedArtifact {
                    artifact: reference.parse()?,
                    digest,
                    root,
                    pinned: pinned != 0,
                    open: open != 0,
                    used_ms,
                })
            })
            .collect()
    }

    /// Notes that nothing is kept under this name any more. The same content may stay under
    /// another, pinned or open.
    pub async fn relay_evicted(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        sqlx::query("UPDATE artifact SET used_ms = NULL WHERE reference = ?")
            .bind(artifact.to_string())
            .execute(&self.write)
            .await
            .map_err(fault)?;
        Ok(())
    }

    /// Says whether an artifact's relayed bytes stay whatever their age.
    pub async fn set_pinned(&self, artifact: &ArtifactRef, pinned: bool) -> Result<(), Fault> {
        let mut tx = self
            .write
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(fault)?;
        sqlx::query("UPDATE artifact SET pinned = ? WHERE reference = ?")
            .bind(pinned)
            .bind(artifact.to_string())
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        note(&mut tx, "artifact", &artifact.to_string()).await?;
        tx.commit().await.map_err(fault)?;
        self.notify();
        Ok(())
    }

    /// The hub holds the bytes of this artifact itself now.
    pub async fn take_over(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        sqlx::query("UPDATE artifact SET origin = NULL, changed = NULL WHERE reference = ?")
            .bind(artifact.to_string())
            .execute(&self.write)
            .await
            .map_err(fault)?;
        Ok(())
    }
}

//! Artifacts in the catalogue.

use serde::{Deserialize, Serialize};
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::{Catalogue, fault, note};
use base::clock;
use base::fault::Fault;
use base::names::{ArtifactRef, RunName, SiteName, SiteSelector};
use base::omitted::Omitted;
use content::chunk::Hash;
use content::manifest::{Digest, Root};
use sink::StorageLocation;

/// One artifact.
#[derive(Debug, Clone)]
pub struct ArtifactRow {
    /// Its name.
    pub artifact: ArtifactRef,
    /// The BLAKE3 of its root manifest.
    pub digest: Digest,
    /// The root manifest.
    pub root: Root,
    /// The site whose bytes these are; `None`: this daemon's own.
    pub origin: Option<SiteName>,
    /// Where people find it on this daemon's sinks.
    pub location: Option<String>,
    /// Where the daemon reads its files, if it holds them.
    pub place: Option<StorageLocation>,
    /// When it was recorded.
    pub created_ms: i64,
    /// Whether it was published here, at this site, and lies where it was published.
    pub published: bool,
    /// When its source began to be read for that; 0 if it was not.
    pub published_ms: i64,
    /// How it changed since it was published, in place here or at its site; `None`: it is sound as
    /// far as is known.
    pub changed: Option<String>,
    /// What the hub has still to be told of it (at a site).
    pub offer: Option<Offer>,
    /// Whether its relayed bytes stay whatever their age (at the hub).
    pub pinned: bool,
    /// When its relayed bytes were last asked for (at the hub).
    pub used_ms: i64,
    /// What its publish left out.
    pub omitted: Omitted,
}

/// What a site tells the hub of an artifact that was published there, again and again until the hub
/// has heard it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Offer {
    /// Sites to deliver to at once.
    pub to: Option<SiteSelector>,
    /// The training run that made it.
    pub run: Option<RunName>,
    /// Whether the hub has never heard of the artifact.
    pub new: bool,
}

fn stored(what: impl std::fmt::Display) -> Fault {
    Fault::internal(format!("the catalogue holds a malformed row: {what}"))
}

/// The answer for an artifact that does not exist, and for one that somebody may not have.
pub fn no_artifact(artifact: &ArtifactRef) -> Fault {
    Fault::not_found(format!("there is no artifact {artifact}"))
        .with_next("'packhorse artifacts' lists what there is")
}

pub(super) fn artifact(row: &SqliteRow) -> Result<ArtifactRow, Fault> {
    let get = |name: &str| row.try_get::<Option<String>, _>(name).map_err(fault);
    let digest: Vec<u8> = row.try_get("digest").map_err(fault)?;
    let root: Vec<u8> = row.try_get("root").map_err(fault)?;
    let digest = Hash(digest.try_into().map_err(|_| stored("digest"))?);
    let published: Option<i64> = row.try_get("published_ms").map_err(fault)?;
    Ok(ArtifactRow {
        artifact: row
            .try_get::<String, _>("reference")
            .map_err(fault)?
            .parse()
            .map_err(stored)?,
        digest,
        root: Root::parse(&root, digest)?,
        origin: get("origin")?
            .map(|s| s.parse())
            .transpose()
            .map_err(stored)?,
        location: get("location")?,
        place: get("place")?
            .map(|s| serde_json::from_str(&s))
            .transpose()
            .map_err(stored)?,
        created_ms: row.try_get("created_ms").map_err(fault)?,
        published: published.is_some(),
        published_ms: published.unwrap_or(0),
        changed: get("changed")?,
        offer: get("offer")?
            .map(|s| serde_json::from_str(&s))
            .transpose()
            .map_err(stored)?,
        pinned: row.try_get::<i64, _>("pinned").map_err(fault)? != 0,
        used_ms: row
            .try_get::<Option<i64>, _>("used_ms")
            .map_err(fault)?
            .unwrap_or(0),
        omitted: get("omitted")?
            .map(|s| serde_json::from_str(&s))
            .transpose()
            .map_err(stored)?
            .unwrap_or_default(),
    })
}

impl Catalogue {
    /// Records a published or arriving artifact. `false` when the same content stands under this
    /// name already; other content is a conflict.
    pub async fn add_artifact(
        &self,
        artifact: &ArtifactRef,
        root: &Root,
        origin: Option<&SiteName>,
    ) -> Result<bool, Fault> {
        let digest = root.digest();
        let mut tx = self
            .write
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(fault)?;
        let name = artifact.to_string();
        let there: Option<(Vec<u8>,)> =
            sqlx::query_as("SELECT digest FROM artifact WHERE reference = ?")
                .bind(&name)
                .fetch_optional(&mut *tx)
                .await
                .map_err(fault)?;
        if let Some((other,)) = there {
            if other == digest.0 {
                return Ok(false);
            }
            return Err(Fault::conflict(format!(
                "{artifact} is published already with other content: {} there, {digest} now",
                hex::encode(other)
            ))
            .with_next("an artifact never changes: publish this under a new version"));
        }
        sqlx::query("INSERT INTO artifact (reference, digest, root, origin, created_ms, bytes) VALUES (?, ?, ?, ?, ?, ?)")
            .bind(&name)
            .bind(&digest.0[..])
            .bind(root.to_bytes())
            .bind(origin.map(|s| s.as_str()))
            .bind(clock::now_unix_ms() as i64)
            .bind(i64::try_from(root.totals.bytes).unwrap_or(i64::MAX))
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        note(&mut tx, "artifact", &name).await?;
        tx.commit().await.map_err(fault)?;
        self.notify();
        Ok(true)
    }

    /// Notes which publisher brought an artifact.
    pub async fn set_publisher(
        &self,
        artifact: &ArtifactRef,
        publisher: &SiteName,
    ) -> Result<(), Fault> {
        sqlx::query("UPDATE artifact SET publisher = ? WHERE reference = ?")
            .bind(publisher.as_str())
            .bind(artifact.to_string())
            .execute(&self.write)
            .await
            .map_err(fault)?;
        Ok(())
    }

    /// Whether this publisher brought an artifact.
    pub async fn was_published_by(
        &self,
        artifact: &ArtifactRef,
        publisher: &SiteName,
    ) -> Result<bool, Fault> {
        sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM artifact WHERE reference = ? AND publisher = ?)",
        )
        .bind(artifact.to_string())
        .bind(publisher.as_str())
        .fetch_one(&self.read)
        .await
        .map_err(fault)
    }

    /// How many artifacts a site or a publisher published, and their bytes together.
    pub async fn published_by(
        &self,
        site: Option<&SiteName>,
        publisher: Option<&SiteName>,
    ) -> Result<(u64, u64), Fault> {
        let (artifacts, bytes): (i64, f64) = sqlx::query_as(
            "SELECT COUNT(*), TOTAL(bytes) FROM artifact WHERE origin = ?1 OR publisher = ?2",
        )
        .bind(site.map(|name| name.as_str()))
        .bind(publisher.map(|name| name.as_str()))
        .fetch_one(&self.read)
        .await
        .map_err(fault)?;
        Ok((artifacts as u64, bytes as u64))
    }

    /// Notes where an artifact lies on this daemon, or that it no longer does.
    pub async fn set_place(
        &self,
        artifact: &ArtifactRef,
        place: Option<&StorageLocation>,
        location: Option<&str>,
    ) -> Result<(), Fault> {
        let place = place
            .map(serde_json::to_string)
            .transpose()
            .map_err(stored)?;
        sqlx::query("UPDATE artifact SET place = ?, location = ? WHERE reference = ?")
            .bind(place)
            .bind(location)
            .bind(artifact.to_string())
            .execute(&self.write)
            .await
            .map_err(fault)?;
        self.notify();
        Ok(())
    }

    /// Notes that an artifact was published here and lies there, since when its source was read,
    /// and what the hub has to be told of it. What was received before stays where it landed.
    pub async fn set_published(
        &self,
        artifact: &ArtifactRef,
        place: &StorageLocation,
        location: &str,
        since_ms: i64,
        offer: &Offer,
    ) -> Result<(), Fault> {
        let place = serde_json::to_string(place).map_err(stored)?;
        let offer = serde_json::to_string(offer).map_err(stored)?;
        let mut tx = self
            .write
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(fault)?;
        sqlx::query("UPDATE artifact SET offer = ? WHERE reference = ?")
            .bind(offer)
            .bind(artifact.to_string())
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        sqlx::query(
            "UPDATE artifact SET published_ms = ?, location = ?, place = ?
             WHERE reference = ? AND (place IS NULL OR published_ms IS NOT NULL)",
        )
        .bind(since_ms)
        .bind(location)
        .bind(place)
        .bind(artifact.to_string())
        .execute(&mut *tx)
        .await
        .map_err(fault)?;
        tx.commit().await.map_err(fault)?;
        self.notify();
        Ok(())
    }

    /// Keeps what the publish of an artifact left out: that of the last publish counts, since the
    /// same content may come from another source.
    pub async fn set_omitted(
        &self,
        artifact: &ArtifactRef,
        omitted: &Omitted,
    ) -> Result<(), Fault> {
        let text = (!omitted.is_empty())
            .then(|| serde_json::to_string(omitted))
            .transpose()
            .map_err(stored)?;
        sqlx::query("UPDATE artifact SET omitted = ? WHERE reference = ?")
            .bind(text)
            .bind(artifact.to_string())
            .execute(&self.write)
            .await
            .map_err(fault)?;
        Ok(())
    }

    /// Notes that the hub has heard of an artifact that was published here.
    pub async fn offered(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        sqlx::query("UPDATE artifact SET offer = NULL WHERE reference = ?")
            .bind(artifact.to_string())
            .execute(&self.write)
            .await
            .map_err(fault)?;
        Ok(())
    }

    /// What the hub has still to be told of, oldest first.
    pub async fn offers(&self) -> Result<Vec<ArtifactRow>, Fault> {
        let rows = sqlx::query("SELECT * FROM artifact WHERE offer IS NOT NULL ORDER BY id")
            .fetch_all(&self.read)
            .await
            .map_err(fault)?;
        rows.iter().map(artifact).collect()
    }

    /// All artifacts of this digest, those that lie here first.
    pub async fn all_by_digest(&self, digest: Digest) -> Result<Vec<ArtifactRow>, Fault> {
        let rows =
            sqlx::query("SELECT * FROM artifact WHERE digest = ? ORDER BY place IS NULL, id")
                .bind(&digest.0[..])
                .fetch_all(&self.read)
                .await
                .map_err(fault)?;
        rows.iter().map(artifact).collect()
    }

    /// One artifact by name.
    pub async fn artifact(&self, artifact: &ArtifactRef) -> Result<ArtifactRow, Fault> {
        let row = sqlx::query("SELECT * FROM artifact WHERE reference = ?")
            .bind(artifact.to_string())
            .fetch_optional(&self.read)
            .await
            .map_err(fault)?;
        match row {
            Some(row) => self::artifact(&row),
            None => Err(no_artifact(artifact)),
        }
    }

    /// Any artifact of this digest; the content is the same under every name.
    pub async fn by_digest(&self, digest: Digest) -> Result<Option<ArtifactRow>, Fault> {
        let row =
            sqlx::query("SELECT * FROM artifact WHERE digest = ? ORDER BY place IS NULL LIMIT 1")
                .bind(&digest.0[..])
                .fetch_optional(&self.read)
                .await
                .map_err(fault)?;
        row.as_ref().map(artifact).transpose()
    }

    /// The newest other version of this artifact that this daemon holds.
    pub async fn kin(&self, of: &ArtifactRef) -> Result<Option<ArtifactRow>, Fault> {
        // All of "kind/name:" and nothing else: ';' is the character behind ':'.
        let series = of.series();
        let row = sqlx::query(
            "SELECT * FROM artifact WHERE reference > ? AND reference < ? AND reference != ? AND place IS NOT NULL \
             ORDER BY created_ms DESC LIMIT 1",
        )
        .bind(format!("{series}:"))
        .bind(format!("{series};"))
        .bind(of.to_string())
        .fetch_optional(&self.read)
        .await
        .map_err(fault)?;
        row.as_ref().map(artifact).transpose()
    }

    /// Whether a site has, or published, any version of this artifact.
    pub async fn has_kin_at(&self, site: &SiteName, of: &ArtifactRef) -> Result<bool, Fault> {
        let series = of.series();
        sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM transfer WHERE site = ?1 AND reference > ?2 AND reference < ?3
                            AND state = 'done' AND removed_ms IS NULL)
                 OR EXISTS (SELECT 1 FROM artifact WHERE origin = ?1 AND reference > ?2 AND reference < ?3)",
        )
        .bind(site.as_str())
        .bind(format!("{series}:"))
        .bind(format!("{series};"))
        .fetch_one(&self.read)
        .await
        .map_err(fault)
    }

    /// The digests of all artifacts.
    pub async fn digests(&self) -> Result<Vec<Digest>, Fault> {
        let rows: Vec<(Vec<u8>,)> = sqlx::query_as("SELECT DISTINCT digest FROM artifact")
            .fetch_all(&self.read)
            .await
            .map_err(fault)?;
        rows.into_iter()
            .map(|(digest,)| digest.try_into().map(Hash).map_err(|_| stored("digest")))
            .collect()
    }

    /// Whether there is any.
    pub async fn any_artifact(&self) -> Result<bool, Fault> {
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM artifact)")
            .fetch_one(&self.read)
            .await
            .map_err(fault)
    }

    /// All artifacts, by name, with their root manifests: too much to have in memory but in a test.
    #[cfg(any(test, feature = "testing"))]
    pub async fn artifacts(&self) -> Result<Vec<ArtifactRow>, Fault> {
        let rows = sqlx::query("SELECT * FROM artifact ORDER BY reference")
            .fetch_all(&self.read)
            .await
            .map_err(fault)?;
        rows.iter().map(artifact).collect()
    }

    /// Notes that what arrived here is being taken away. `false`: it is published here, or being
    /// so, and stays.
    pub async fn leave(&self, artifact: &ArtifactRef) -> Result<bool, Fault> {
        let done = sqlx::query("UPDATE artifact SET place = NULL WHERE reference = ? AND published_ms IS NULL AND offer IS NULL")
            .bind(artifact.to_string())
            .execute(&self.write)
            .await
            .map_err(fault)?;
        self.notify();
        Ok(done.rows_affected() > 0)
    }

    /// Takes the row of what was taken away, unless it came here in another way since
    /// [`Catalogue::leave`].
    pub async fn remove_left(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        sqlx::query("DELETE FROM artifact WHERE reference = ? AND place IS NULL AND offer IS NULL")
            .bind(artifact.to_string())
            .execute(&self.write)
            .await
            .map_err(fault)?;
        self.notify();
        Ok(())
    }

    /// Takes an artifact's row away.
    pub async fn remove_artifact(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        sqlx::query("DELETE FROM artifact WHERE reference = ?")
            .bind(artifact.to_string())
            .execute(&self.write)
            .await
            .map_err(fault)?;
        self.notify();
        Ok(())
    }
}

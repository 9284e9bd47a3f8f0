//! Artifacts in SQLite.

use async_trait::async_trait;
use base::clock;
use base::fault::Fault;
use base::names::{ArtifactRef, PublisherName, SiteName};
use base::omitted::Omitted;
use base::peer::Peer;
use content::manifest::{Digest, Root};
use futures::TryStreamExt as _;
use sink::StorageLocation;
use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};

use super::{Sqlite, digest_of, fault, json, malformed};
use crate::artifacts::{ArtifactRow, Artifacts, Offer, no_artifact, other_content};
use crate::engine::{Listed, See};
use crate::wake::Subject;

const TABLE: &str = "artifact";

fn artifact(row: &SqliteRow) -> Result<ArtifactRow, Fault> {
    let name: String = row.try_get("reference").map_err(fault)?;
    let wrong = |what: &dyn std::fmt::Display| malformed(TABLE, &name, what);
    let text = |column: &str| row.try_get::<Option<String>, _>(column).map_err(fault);
    let digest =
        digest_of(row.try_get("digest").map_err(fault)?).ok_or_else(|| wrong(&"digest"))?;
    let root: Vec<u8> = row.try_get("root").map_err(fault)?;
    let published: Option<i64> = row.try_get("published_ms").map_err(fault)?;
    Ok(ArtifactRow {
        artifact: name.parse().map_err(|e| wrong(&e))?,
        digest,
        root: Root::parse(&root, digest).map_err(|fault| {
            fault.context(format_args!(
                "the catalogue holds a malformed {TABLE} {name}"
            ))
        })?,
        origin: text("origin")?
            .map(|s| s.parse())
            .transpose()
            .map_err(|e| wrong(&e))?,
        location: text("location")?,
        place: text("place")?
            .map(|s| serde_json::from_str(&s))
            .transpose()
            .map_err(|e| wrong(&e))?,
        created_ms: row.try_get("created_ms").map_err(fault)?,
        published: published.is_some(),
        published_ms: published.unwrap_or(0),
        changed: text("changed")?,
        offer: text("offer")?
            .map(|s| serde_json::from_str(&s))
            .transpose()
            .map_err(|e| wrong(&e))?,
        pinned: row.try_get::<i64, _>("pinned").map_err(fault)? != 0,
        used_ms: row
            .try_get::<Option<i64>, _>("used_ms")
            .map_err(fault)?
            .unwrap_or(0),
        omitted: text("omitted")?
            .map(|s| serde_json::from_str(&s))
            .transpose()
            .map_err(|e| wrong(&e))?
            .unwrap_or_default(),
    })
}

/// The key of a row that may be malformed.
fn key(row: &SqliteRow) -> String {
    row.try_get("reference").unwrap_or_default()
}

/// The range of names that contains all versions of an artifact: after the first and before the
/// second. `;` is the character after `:`.
fn versions(of: &ArtifactRef) -> (String, String) {
    let series = of.series();
    (format!("{series}:"), format!("{series};"))
}

async fn names(pool: &SqlitePool) -> Result<Vec<ArtifactRef>, Fault> {
    let mut rows =
        sqlx::query_as::<_, (String,)>("SELECT reference FROM artifact ORDER BY reference")
            .fetch(pool);
    let mut out = Vec::new();
    while let Some((name,)) = rows.try_next().await.map_err(fault)? {
        out.push(name.parse().map_err(|e| malformed(TABLE, &name, e))?);
    }
    Ok(out)
}

impl Sqlite {
    /// Writes one value (`$1`) of an artifact (`$2`) and wakes no task.
    async fn set_text(
        &self,
        sql: &'static str,
        value: Option<String>,
        artifact: &ArtifactRef,
    ) -> Result<(), Fault> {
        let mut write = self.begin().await?;
        sqlx::query(sql)
            .bind(value)
            .bind(artifact.to_string())
            .execute(write.db())
            .await
            .map_err(fault)?;
        write.commit().await
    }

    /// Runs a statement for one artifact (`$1`) and wakes `subject`. Returns whether it changed a
    /// row.
    pub(super) async fn on_artifact(
        &self,
        sql: &'static str,
        artifact: &ArtifactRef,
        subject: Option<Subject>,
    ) -> Result<bool, Fault> {
        let mut write = self.begin().await?;
        let done = sqlx::query(sql)
            .bind(artifact.to_string())
            .execute(write.db())
            .await
            .map_err(fault)?;
        subject
            .into_iter()
            .for_each(|subject| write.changes(subject));
        write.commit().await?;
        Ok(done.rows_affected() > 0)
    }
}

#[async_trait]
impl Artifacts for Sqlite {
    async fn add_artifact(
        &self,
        artifact: &ArtifactRef,
        root: &Root,
        origin: Option<&SiteName>,
    ) -> Result<bool, Fault> {
        let (digest, name) = (root.digest(), artifact.to_string());
        let mut write = self.begin().await?;
        let there: Option<(Vec<u8>,)> =
            sqlx::query_as("SELECT digest FROM artifact WHERE reference = $1")
                .bind(&name)
                .fetch_optional(write.db())
                .await
                .map_err(fault)?;
        match there {
            Some((other,)) if other == digest.0 => return Ok(false),
            Some((other,)) => return Err(other_content(artifact, &other, digest)),
            None => {}
        }
        sqlx::query("INSERT INTO artifact (reference, digest, root, origin, created_ms, bytes) VALUES ($1, $2, $3, $4, $5, $6)")
            .bind(&name)
            .bind(&digest.0[..])
            .bind(root.to_bytes())
            .bind(origin.map(|s| s.as_str()))
            .bind(clock::now_ms())
            .bind(i64::try_from(root.totals.bytes).unwrap_or(i64::MAX))
            .execute(write.db())
            .await
            .map_err(fault)?;
        write.note_artifact(&name).await?;
        write.commit().await?;
        Ok(true)
    }

    async fn set_publisher(
        &self,
        artifact: &ArtifactRef,
        publisher: &PublisherName,
    ) -> Result<(), Fault> {
        let sql = "UPDATE artifact SET publisher = $1 WHERE reference = $2";
        self.set_text(sql, Some(publisher.to_string()), artifact)
            .await
    }

    async fn publisher_of(&self, artifact: &ArtifactRef) -> Result<Option<PublisherName>, Fault> {
        let name: Option<Option<String>> =
            sqlx::query_scalar("SELECT publisher FROM artifact WHERE reference = $1")
                .bind(artifact.to_string())
                .fetch_optional(self.read())
                .await
                .map_err(fault)?;
        Ok(name.flatten().map(|name| name.parse()).transpose()?)
    }

    async fn published_by(&self, peer: &Peer) -> Result<(u64, u64), Fault> {
        let (site, publisher) = match peer {
            Peer::Site(name) => (Some(name.as_str()), None),
            Peer::Publisher(name) => (None, Some(name.as_str())),
            Peer::Hub(_) => (None, None),
        };
        // A sum of integers could overflow, because the sizes are those that sites stated.
        let (artifacts, bytes): (i64, f64) = sqlx::query_as(
            "SELECT COUNT(*), COALESCE(SUM(CAST(bytes AS DOUBLE PRECISION)), 0.0) FROM artifact WHERE origin = $1 OR publisher = $2",
        )
        .bind(site)
        .bind(publisher)
        .fetch_one(self.read())
        .await
        .map_err(fault)?;
        Ok((artifacts as u64, bytes as u64))
    }

    async fn set_place(
        &self,
        artifact: &ArtifactRef,
        place: Option<&StorageLocation>,
        location: Option<&str>,
    ) -> Result<(), Fault> {
        let place = place.map(|place| json("a place", place)).transpose()?;
        let mut write = self.begin().await?;
        sqlx::query("UPDATE artifact SET place = $1, location = $2 WHERE reference = $3")
            .bind(place)
            .bind(location)
            .bind(artifact.to_string())
            .execute(write.db())
            .await
            .map_err(fault)?;
        write.changes(Subject::Artifacts);
        write.commit().await
    }

    async fn set_published(
        &self,
        artifact: &ArtifactRef,
        place: &StorageLocation,
        location: &str,
        since_ms: i64,
        offer: &Offer,
    ) -> Result<(), Fault> {
        let (place, offer) = (json("a place", place)?, json("an offer", offer)?);
        let mut write = self.begin().await?;
        sqlx::query("UPDATE artifact SET offer = $1 WHERE reference = $2")
            .bind(offer)
            .bind(artifact.to_string())
            .execute(write.db())
            .await
            .map_err(fault)?;
        sqlx::query(
            "UPDATE artifact SET published_ms = $1, location = $2, place = $3
             WHERE reference = $4 AND (place IS NULL OR published_ms IS NOT NULL)",
        )
        .bind(since_ms)
        .bind(location)
        .bind(place)
        .bind(artifact.to_string())
        .execute(write.db())
        .await
        .map_err(fault)?;
        write.changes(Subject::Artifacts);
        write.commit().await
    }

    async fn set_omitted(&self, artifact: &ArtifactRef, omitted: &Omitted) -> Result<(), Fault> {
        let text = (!omitted.is_empty())
            .then(|| json("what was left out", omitted))
            .transpose()?;
        self.set_text(
            "UPDATE artifact SET omitted = $1 WHERE reference = $2",
            text,
            artifact,
        )
        .await
    }

    async fn offered(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        self.on_artifact(
            "UPDATE artifact SET offer = NULL WHERE reference = $1",
            artifact,
            None,
        )
        .await
        .map(drop)
    }

    async fn offers(&self) -> Result<Vec<(ArtifactRef, Offer)>, Fault> {
        let rows: Vec<(String, String)> = sqlx::query_as(
            "SELECT reference, offer FROM artifact WHERE offer IS NOT NULL ORDER BY id",
        )
        .fetch_all(self.read())
        .await
        .map_err(fault)?;
        let read = |(name, offer): (String, String)| {
            let artifact = name.parse().map_err(|e| malformed(TABLE, &name, e));
            let offer = serde_json::from_str(&offer).map_err(|e| malformed(TABLE, &name, e));
            self.sound(
                TABLE,
                &name,
                artifact.and_then(|artifact| Ok((artifact, offer?))),
            )
        };
        Ok(rows.into_iter().filter_map(read).collect())
    }

    async fn all_by_digest(&self, digest: Digest) -> Result<Vec<ArtifactRow>, Fault> {
        let rows =
            sqlx::query("SELECT * FROM artifact WHERE digest = $1 ORDER BY place IS NULL, id")
                .bind(&digest.0[..])
                .fetch_all(self.read())
                .await
                .map_err(fault)?;
        Ok(rows
            .iter()
            .filter_map(|row| self.sound(TABLE, &key(row), artifact(row)))
            .collect())
    }

    async fn artifact(&self, name: &ArtifactRef) -> Result<ArtifactRow, Fault> {
        let row = sqlx::query("SELECT * FROM artifact WHERE reference = $1")
            .bind(name.to_string())
            .fetch_optional(self.read())
            .await
            .map_err(fault)?;
        row.as_ref()
            .map_or_else(|| Err(no_artifact(name)), artifact)
    }

    async fn previous_version(&self, of: &ArtifactRef) -> Result<Option<ArtifactRow>, Fault> {
        let (first, last) = versions(of);
        let row = sqlx::query(
            "SELECT * FROM artifact WHERE reference > $1 AND reference < $2 AND reference <> $3 AND place IS NOT NULL
             ORDER BY created_ms DESC LIMIT 1",
        )
        .bind(first)
        .bind(last)
        .bind(of.to_string())
        .fetch_optional(self.read())
        .await
        .map_err(fault)?;
        Ok(row.and_then(|row| self.sound(TABLE, &key(&row), artifact(&row))))
    }

    async fn has_previous_version_at(
        &self,
        site: &SiteName,
        of: &ArtifactRef,
    ) -> Result<bool, Fault> {
        let (first, last) = versions(of);
        sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM transfer WHERE site = $1 AND reference > $2 AND reference < $3
                            AND state = 'done' AND removed_ms IS NULL)
                 OR EXISTS (SELECT 1 FROM artifact WHERE origin = $1 AND reference > $2 AND reference < $3)",
        )
        .bind(site.as_str())
        .bind(first)
        .bind(last)
        .fetch_one(self.read())
        .await
        .map_err(fault)
    }

    async fn digests(&self) -> Result<Vec<Digest>, Fault> {
        let rows: Vec<(Vec<u8>,)> = sqlx::query_as("SELECT DISTINCT digest FROM artifact")
            .fetch_all(self.read())
            .await
            .map_err(fault)?;
        rows.into_iter()
            .map(|(digest,)| digest_of(digest).ok_or_else(|| malformed(TABLE, "", "digest")))
            .collect()
    }

    async fn any_artifact(&self) -> Result<bool, Fault> {
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM artifact)")
            .fetch_one(self.read())
            .await
            .map_err(fault)
    }

    async fn artifact_names(&self) -> Result<Vec<ArtifactRef>, Fault> {
        names(self.read()).await
    }

    async fn artifact_names_settled(&self) -> Result<Vec<ArtifactRef>, Fault> {
        // This waits for the only connection that writes.
        names(&self.write).await
    }

    async fn artifacts_by_digest(&self) -> Result<Vec<(ArtifactRef, Digest)>, Fault> {
        let mut rows = sqlx::query_as::<_, (String, Vec<u8>)>(
            "SELECT reference, digest FROM artifact ORDER BY reference",
        )
        .fetch(self.read());
        let mut out = Vec::new();
        while let Some((name, digest)) = rows.try_next().await.map_err(fault)? {
            let digest = digest_of(digest).ok_or_else(|| malformed(TABLE, &name, "digest"))?;
            out.push((
                name.parse().map_err(|e| malformed(TABLE, &name, e))?,
                digest,
            ));
        }
        Ok(out)
    }

    async fn each_artifact(
        &self,
        behind: Option<&str>,
        rows: i64,
        see: See<'_, ArtifactRow>,
    ) -> Result<(), Fault> {
        let query =
            sqlx::query("SELECT * FROM artifact WHERE reference > $1 ORDER BY reference LIMIT $2");
        let mut found = query
            .bind(behind.unwrap_or_default())
            .bind(rows)
            .fetch(self.read());
        while let Some(row) = found.try_next().await.map_err(fault)? {
            let key = key(&row);
            let row = self.sound(TABLE, &key, artifact(&row));
            if !see(row.map_or(Listed::Malformed { key, cursor: 0 }, Listed::Row)) {
                break;
            }
        }
        Ok(())
    }

    async fn leave(&self, artifact: &ArtifactRef) -> Result<bool, Fault> {
        let sql = "UPDATE artifact SET place = NULL WHERE reference = $1 AND published_ms IS NULL AND offer IS NULL";
        self.on_artifact(sql, artifact, Some(Subject::Artifacts))
            .await
    }

    async fn remove_left(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        let sql = "DELETE FROM artifact WHERE reference = $1 AND place IS NULL AND offer IS NULL";
        self.on_artifact(sql, artifact, Some(Subject::Artifacts))
            .await
            .map(drop)
    }

    async fn remove_artifact(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        let sql = "DELETE FROM artifact WHERE reference = $1";
        self.on_artifact(sql, artifact, Some(Subject::Artifacts))
            .await
            .map(drop)
    }
}

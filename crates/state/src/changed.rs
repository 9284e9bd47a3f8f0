//! What was published in place and is no longer what it was: at its site as the watch found it, at
//! the hub as the site tells it.

use std::collections::HashMap;
use std::hash::Hash;

use super::{Catalogue, fault, note};
use base::fault::Fault;
use base::limits::CHANGED_TOLD_MAX;
use base::names::{ArtifactRef, SiteName};
use base::text::Message;

/// An artifact that changed after it was published in place.
pub struct Changed<P> {
    /// Its name.
    pub artifact: ArtifactRef,
    /// Where it was published.
    pub place: P,
    /// How it changed.
    pub how: String,
    /// The newest version that was published there since, and is sound.
    pub newer: Option<ArtifactRef>,
}

/// What was published in place: where, when, its name, and how it changed since.
pub type PublishedInPlace<P> = (P, i64, ArtifactRef, Option<String>);

/// What changed of what was published in place.
pub fn what_changed<P: Eq + Hash>(
    published: impl Iterator<Item = PublishedInPlace<P>>,
) -> Vec<Changed<P>> {
    let (mut changed, mut sound) = (
        Vec::new(),
        HashMap::<(String, P), (i64, ArtifactRef)>::new(),
    );
    for (place, at_ms, artifact, how) in published {
        let of = (artifact.series(), place);
        match how {
            Some(how) => changed.push((artifact, of, at_ms, how)),
            None if sound.get(&of).is_none_or(|(newest, _)| *newest < at_ms) => {
                sound.insert(of, (at_ms, artifact));
            }
            None => {}
        }
    }
    let changed = changed.into_iter().map(|(artifact, of, at_ms, how)| {
        let newer = sound
            .get(&of)
            .filter(|(later, _)| *later > at_ms)
            .map(|(_, newer)| newer.clone());
        Changed {
            artifact,
            place: of.1,
            how,
            newer,
        }
    });
    changed.collect()
}

impl Catalogue {
    /// The names of what was published here, in place.
    pub async fn published(&self) -> Result<Vec<ArtifactRef>, Fault> {
        let rows: Vec<(String,)> = sqlx::query_as(
            "SELECT reference FROM artifact WHERE published_ms IS NOT NULL ORDER BY reference",
        )
        .fetch_all(&self.read)
        .await
        .map_err(fault)?;
        rows.into_iter().map(|(name,)| Ok(name.parse()?)).collect()
    }

    /// What was published at sites, at the hub; in place, as far as it knows.
    pub async fn published_at_sites(&self) -> Result<Vec<PublishedInPlace<SiteName>>, Fault> {
        let rows: Vec<(String, i64, String, Option<String>)> =
            sqlx::query_as("SELECT origin, created_ms, reference, changed FROM artifact WHERE origin IS NOT NULL ORDER BY reference")
                .fetch_all(&self.read)
                .await
                .map_err(fault)?;
        rows.into_iter()
            .map(|(site, at_ms, name, changed)| Ok((site.parse()?, at_ms, name.parse()?, changed)))
            .collect()
    }

    /// What was published here, in place; the place as it is stored.
    pub async fn published_here(&self) -> Result<Vec<PublishedInPlace<Option<String>>>, Fault> {
        let rows: Vec<(Option<String>, i64, String, Option<String>)> = sqlx::query_as(
            "SELECT place, published_ms, reference, changed FROM artifact WHERE published_ms IS NOT NULL ORDER BY reference",
        )
        .fetch_all(&self.read)
        .await
        .map_err(fault)?;
        rows.into_iter()
            .map(|(place, at_ms, name, changed)| Ok((place, at_ms, name.parse()?, changed)))
            .collect()
    }

    /// Notes how an artifact of this daemon changed since it was published, or with `None` that it
    /// is what it was. `false`: that was known.
    pub async fn set_changed(
        &self,
        artifact: &ArtifactRef,
        changed: Option<&str>,
    ) -> Result<bool, Fault> {
        let mut tx = self
            .write
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(fault)?;
        let new = put(&mut tx, None, &artifact.to_string(), changed).await?;
        tx.commit().await.map_err(fault)?;
        if new {
            self.notify();
        }
        Ok(new)
    }

    /// What the hub has to know of what changed here: everything that it has heard of, and how it
    /// changed.
    pub async fn changed_here(&self) -> Result<Vec<(ArtifactRef, Message)>, Fault> {
        let rows: Vec<(String, String)> = sqlx::query_as(
            "SELECT reference, changed FROM artifact
             WHERE changed IS NOT NULL AND published_ms IS NOT NULL AND offer IS NULL ORDER BY reference LIMIT ?",
        )
        .bind(CHANGED_TOLD_MAX)
        .fetch_all(&self.read)
        .await
        .map_err(fault)?;
        rows.into_iter()
            .map(|(name, changed)| Ok((name.parse()?, changed.into())))
            .collect()
    }

    /// Notes what changed at a site, at the hub: these of what is published there, and nothing else
    /// of it. `false`: that was known.
    pub async fn set_changed_at(
        &self,
        site: &SiteName,
        all: &[(ArtifactRef, Message)],
    ) -> Result<bool, Fault> {
        // A site may say anything: no more is taken in than one that is sound would say.
        let all = all.iter().take(CHANGED_TOLD_MAX as usize);
        let all: HashMap<String, String> = all
            .map(|(artifact, how)| (artifact.to_string(), how.to_string()))
            .collect();
        let mut tx = self
            .write
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(fault)?;
        let before: Vec<(String,)> = sqlx::query_as(
            "SELECT reference FROM artifact WHERE changed IS NOT NULL AND origin = ?",
        )
        .bind(site.as_str())
        .fetch_all(&mut *tx)
        .await
        .map_err(fault)?;
        let mut new = false;
        for (name,) in before.iter().filter(|(name,)| !all.contains_key(name)) {
            new |= put(&mut tx, Some(site), name, None).await?;
        }
        for (name, changed) in &all {
            new |= put(&mut tx, Some(site), name, Some(changed)).await?;
        }
        tx.commit().await.map_err(fault)?;
        if new {
            self.notify();
        }
        Ok(new)
    }
}

/// Writes how an artifact changed, if its bytes are those of `origin` (`None`: this daemon's own)
/// and it was not known.
async fn put(
    connection: &mut sqlx::SqliteConnection,
    origin: Option<&SiteName>,
    name: &str,
    changed: Option<&str>,
) -> Result<bool, Fault> {
    let done = sqlx::query("UPDATE artifact SET changed = ?1 WHERE reference = ?2 AND origin IS ?3 AND changed IS NOT ?1")
        .bind(changed)
        .bind(name)
        .bind(origin.map(|site| site.as_str()))
        .execute(&mut *connection)
        .await
        .map_err(fault)?;
    let new = done.rows_affected() > 0;
    if new {
        note(connection, "artifact", name).await?;
    }
    Ok(new)
}

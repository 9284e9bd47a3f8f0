//! Sites, publishers and join tokens in the catalogue (the hub's).

use std::collections::BTreeMap;

use super::{Catalogue, fault, note};
use base::clock;
use base::fault::Fault;
use base::names::{SiteName, SiteSelector};
use transport::identity::{Claim, Holder};

type TokenColumns = (
    Vec<u8>,
    String,
    String,
    i64,
    Option<i64>,
    String,
    Option<Vec<u8>>,
    Option<i64>,
);
pub(super) type SiteColumns = (String, String, i64, Option<i64>, Option<String>, i64);

/// What a token's certificate is good for, as the table says it.
const SITE: &str = "site";
const PUBLISHER: &str = "publisher";
/// The sites behind a name; and one of them.
pub(super) const SITES: &str = "SELECT name, labels, joined_ms, seen_ms, version,
        (SELECT COUNT(*) FROM transfer t WHERE t.site = site.name AND t.state NOT IN ('done', 'failed', 'cancelled'))
     FROM site WHERE ?1 IS NULL OR name > ?1 ORDER BY name LIMIT ?2";
/// A token, and when its holder was here last.
const REDEEM: &str = "SELECT secret_hash, site, labels, expires_ms, used_ms, role, key_hash,
        CASE role WHEN 'site' THEN (SELECT seen_ms FROM site WHERE name = token.site)
                  ELSE (SELECT seen_ms FROM publisher WHERE name = token.site) END
     FROM token WHERE id = ?";
const ONE_SITE: &str = "SELECT name, labels, joined_ms, seen_ms, version,
        (SELECT COUNT(*) FROM transfer t WHERE t.site = site.name AND t.state NOT IN ('done', 'failed', 'cancelled'))
     FROM site WHERE name = ?1";
/// Entries of a site's `[train] allow` that are kept.
const TRAIN_ALLOW_MAX: usize = 10_000;

/// A site as the catalogue knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct SiteRow {
    /// Its name.
    pub name: SiteName,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// When it joined.
    pub joined_ms: i64,
    /// When it last connected.
    pub seen_ms: Option<i64>,
    /// The program version that it runs.
    pub version: Option<String>,
    /// Its transfers that have not ended.
    pub open_transfers: u64,
}

/// A row of [`SITES`].
pub(super) fn site(
    (name, labels, joined_ms, seen_ms, version, open): SiteColumns,
) -> Result<SiteRow, Fault> {
    Ok(SiteRow {
        name: name.parse()?,
        labels: serde_json::from_str(&labels).unwrap_or_default(),
        joined_ms,
        seen_ms,
        version,
        open_transfers: open as u64,
    })
}

/// Whom a site shares with and trains for, as it told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowLists {
    /// The site.
    pub site: SiteName,
    /// Its `[share] allow`.
    pub share: Vec<String>,
    /// Its `[train] allow`.
    pub train: Vec<String>,
}

impl Catalogue {
    /// Keeps a join token: only the hash of its secret. A site and a publisher may not share a
    /// name.
    pub async fn add_token(
        &self,
        id: &str,
        secret_hash: &[u8; 32],
        holder: &Holder,
        labels: &BTreeMap<String, String>,
        ttl_seconds: u64,
    ) -> Result<(), Fault> {
        let now = clock::now_unix_ms() as i64;
        let (role, taken) = match holder {
            Holder::Publisher(_) => (PUBLISHER, "SELECT 'a site' FROM site WHERE name = ?"),
            Holder::Site(_) => (SITE, "SELECT 'a publisher' FROM publisher WHERE name = ?"),
            Holder::Hub(_) => return Err(Fault::usage("a hub joins nothing")),
        };
        let taken: Option<(String,)> = sqlx::query_as(taken)
            .bind(holder.name().as_str())
            .fetch_optional(&self.read)
            .await
            .map_err(fault)?;
        if let Some((what,)) = taken {
            return Err(
                Fault::conflict(format!("{} is {what} already", holder.name()))
                    .with_next("choose another name"),
            );
        }
        sqlx::query("INSERT INTO token (id, secret_hash, role, site, labels, expires_ms) VALUES (?, ?, ?, ?, ?, ?)")
            .bind(id)
            .bind(&secret_hash[..])
            .bind(role)
            .bind(holder.name().as_str())
            .bind(serde_json::to_string(labels).unwrap_or_default())
            .bind(now.saturating_add((ttl_seconds as i64).saturating_mul(1000)))
            .execute(&self.write)
            .await
            .map_err(fault)?;
        Ok(())
    }

    /// Uses a join token up and enrols its site or publisher. `claim` is who asks, as he says.
    /// Used by the key of this hash, it is good for that key until its holder has connected.
    pub async fn redeem_token(
        &self,
        id: &str,
        secret_hash: &[u8; 32],
        claim: &Claim,
        key_hash: &[u8; 32],
    ) -> Result<Holder, Fault> {
        let role = match claim {
            Claim::Site(_) => SITE,
            Claim::Publisher => PUBLISHER,
        };
        let refuse = |why: &str| {
            Fault::not_allowed(format!("the join token {id} {why}")).with_next(format!(
                "make a new one at the hub: packhorse token create --{role} NAME"
            ))
        };
        let now = clock::now_unix_ms() as i64;
        let mut tx = self
            .write
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(fault)?;
        let row: Option<TokenColumns> = sqlx::query_as(REDEEM)
            .bind(id)
            .fetch_optional(&mut *tx)
            .await
            .map_err(fault)?;
        let Some((_, name, labels, expires, used, bound, used_for, seen)) =
            row.filter(|row| row.0 == secret_hash)
        else {
            return Err(refuse("is not one of this hub"));
        };
        if let Some(used) = used {
            // The answer may have been lost on its way to the holder of this key, who has not been
            // here since.
            let is_again =
                used_for.is_some_and(|key| key == key_hash) && seen.is_none_or(|seen| seen < used);
            if !is_again {
                return Err(refuse("was used already"));
            }
        }
        if expires < now {
            return Err(refuse("has expired"));
        }
        if bound != role {
            return Err(refuse(&format!("is for a {bound}, not for a {role}")));
        }
        if let Claim::Site(claimed) = claim
            && name != claimed.as_str()
        {
            return Err(refuse(&format!(
                "is for the site {name}, and this config says {claimed}"
            )));
        }
        sqlx::query("UPDATE token SET used_ms = ?, key_hash = ? WHERE id = ?")
            .bind(now)
            .bind(&key_hash[..])
            .bind(id)
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        let holder = match claim {
            Claim::Publisher => {
                let join = "INSERT INTO publisher (name, joined_ms) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET joined_ms = excluded.joined_ms";
                sqlx::query(join)
                    .bind(&name)
                    .bind(now)
                    .execute(&mut *tx)
                    .await
                    .map_err(fault)?;
                Holder::Publisher(name.parse()?)
            }
            Claim::Site(_) => {
                sqlx::query(
                    "INSERT INTO site (name, labels, joined_ms) VALUES (?, ?, ?)
                     -- A token without labels says nothing of them.
                     ON CONFLICT (name) DO UPDATE SET joined_ms = excluded.joined_ms,
                         labels = CASE excluded.labels WHEN '{}' THEN site.labels ELSE excluded.labels END",
                )
                .bind(&name)
                .bind(&labels)
                .bind(now)
                .execute(&mut *tx)
                .await
                .map_err(fault)?;
                note(&mut tx, "site", &name).await?;
                Holder::Site(name.parse()?)
            }
        };
        tx.commit().await.map_err(fault)?;
        self.notify();
        Ok(holder)
    }

    /// Notes that a publisher is there; `false` for one that this hub does not know.
    pub async fn publisher_seen(&self, name: &SiteName) -> Result<bool, Fault> {
        let done = sqlx::query("UPDATE publisher SET seen_ms = ? WHERE name = ?")
            .bind(clock::now_unix_ms() as i64)
            .bind(name.as_str())
            .execute(&self.write)
            .await
            .map_err(fault)?;
        Ok(done.rows_affected() == 1)
    }

    /// Notes that a site came or went.
    pub async fn site_seen(&self, site: &SiteName, version: Option<&str>) -> Result<(), Fault> {
        let mut tx = self
            .write
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(fault)?;
        sqlx::query("UPDATE site SET seen_ms = ?, version = COALESCE(?, version) WHERE name = ?")
            .bind(clock::now_unix_ms() as i64)
            .bind(version)
            .bind(site.as_str())
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        // Whoever follows the site's transfers learns by the same event that their reason changed.
        // Each has a cursor of its own, so that a page of what changed can end behind any of them;
        // the event comes behind the last.
        let (newest,): (i64,) = sqlx::query_as(
            "SELECT COALESCE((SELECT seq FROM sqlite_sequence WHERE name = 'event'), 0)",
        )
        .fetch_one(&mut *tx)
        .await
        .map_err(fault)?;
        let changed = sqlx::query(
            "UPDATE transfer SET cursor = ?1 + open.number FROM (
                SELECT id, ROW_NUMBER() OVER (ORDER BY cursor, id) AS number FROM transfer
                WHERE site = ?2 AND state NOT IN ('done', 'failed', 'cancelled')) AS open
             WHERE transfer.id = open.id",
        )
        .bind(newest)
        .bind(site.as_str())
        .execute(&mut *tx)
        .await
        .map_err(fault)?;
        let seq = newest + i64::try_from(changed.rows_affected()).unwrap_or(0).max(1);
        sqlx::query("INSERT INTO event (seq, at_ms, what, name) VALUES (?, ?, 'site', ?)")
            .bind(seq)
            .bind(clock::now_unix_ms() as i64)
            .bind(site.as_str())
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        tx.commit().await.map_err(fault)?;
        self.notify();
        Ok(())
    }

    /// Notes which sites a site trains for; `None`: it has not said.
    pub async fn set_train_allow(
        &self,
        site: &SiteName,
        allow: Option<&[String]>,
    ) -> Result<(), Fault> {
        // Only what can be read counts, and no more than a list of all sites that a hub can have.
        let list: Option<Vec<&String>> = allow.map(|list| {
            list.iter()
                .take(TRAIN_ALLOW_MAX)
                .filter(|text| text.parse::<SiteSelector>().is_ok())
                .collect()
        });
        sqlx::query("UPDATE site SET train_allow = ? WHERE name = ?")
            .bind(list.map(|list| serde_json::to_string(&list).unwrap_or_default()))
            .bind(site.as_str())
            .execute(&self.write)
            .await
            .map_err(fault)?;
        Ok(())
    }

    /// The lists that the sites told, by name; the list of a site that told none is empty.
    pub async fn allow_lists(&self) -> Result<Vec<AllowLists>, Fault> {
        let rows: Vec<(String, Option<String>, Option<String>)> =
            sqlx::query_as("SELECT name, share, train_allow FROM site WHERE share IS NOT NULL OR train_allow IS NOT NULL ORDER BY name")
                .fetch_all(&self.read)
                .await
                .map_err(fault)?;
        let list = |text: Option<String>| {
            text.and_then(|text| serde_json::from_str(&text).ok())
                .unwrap_or_default()
        };
        rows.into_iter()
            .map(|(name, share, train)| {
                Ok(AllowLists {
                    site: name.parse()?,
                    share: list(share),
                    train: list(train),
                })
            })
            .collect()
    }

    /// Whether the site `on` trains for the site `from`, as `on` said last. One that has not said
    /// anything, an earlier version or one that has not connected yet, decides itself.
    pub async fn trains_for(&self, on: &SiteName, from: &SiteName) -> Result<bool, Fault> {
        let row: Option<(Option<String>,)> =
            sqlx::query_as("SELECT train_allow FROM site WHERE name = ?")
                .bind(on.as_str())
                .fetch_optional(&self.read)
                .await
                .map_err(fault)?;
        let Some(allow) = row.and_then(|(allow,)| allow) else {
            return Ok(true);
        };
        let list: Vec<String> = serde_json::from_str(&allow).unwrap_or_default();
        Ok(base::names::names_site(&list, from))
    }

    /// All sites, by name.
    pub async fn sites(&self) -> Result<Vec<SiteRow>, Fault> {
        let rows: Vec<SiteColumns> = sqlx::query_as(SITES)
            .bind(None::<&str>)
            .bind(i64::MAX)
            .fetch_all(&self.read)
            .await
            .map_err(fault)?;
        rows.into_iter().map(site).collect()
    }

    /// One site, if there is one of this name.
    pub async fn site(&self, name: &str) -> Result<Option<SiteRow>, Fault> {
        let row: Option<SiteColumns> = sqlx::query_as(ONE_SITE)
            .bind(name)
            .fetch_optional(&self.read)
            .await
            .map_err(fault)?;
        row.map(site).transpose()
    }

    /// The sites that a selection means; a name that does not exist, or a selection of none, is
    /// `not_found`.
    pub async fn select_sites(&self, selector: &SiteSelector) -> Result<Vec<SiteName>, Fault> {
        let all = self.sites().await?;
        let chosen: Vec<SiteName> = match selector {
            SiteSelector::All => all.into_iter().map(|s| s.name).collect(),
            SiteSelector::Names(names) => {
                let missing: Vec<&str> = names
                    .iter()
                    .filter(|n| !all.iter().any(|s| s.name == **n))
                    .map(|n| n.as_str())
                    .collect();
                if !missing.is_empty() {
                    return Err(Fault::not_found(format!(
                        "there is no site {}",
                        missing.join(", ")
                    ))
                    .with_next("'packhorse sites' lists those that have joined"));
                }
                names.clone()
            }
            SiteSelector::Labels(terms) => all
                .into_iter()
                .filter(|site| terms.iter().all(|t| t.matches(&site.labels)))
                .map(|s| s.name)
                .collect(),
        };
        if chosen.is_empty() {
            return Err(Fault::not_found("the selection matches no site")
                .with_next("'packhorse sites' lists them with their labels"));
        }
        Ok(chosen)
    }
}

//! Sites, publishers and join tokens in SQLite.

use std::collections::BTreeMap;

use async_trait::async_trait;
use base::clock;
use base::fault::Fault;
use base::names::{PublisherName, SiteName, SiteSelector};
use base::peer::Peer;
use futures::TryStreamExt as _;
use model::publisher_scope::PublisherScope;
use transport::identity::{Claim, Serial};

use super::members::MemberColumns;
use super::{Sqlite, fault, json, malformed};
use crate::engine::{Listed, See};
use crate::events::SiteState;
use crate::sites::{AllowLists, PUBLISHER, SITE, SiteRow, Sites, TokenRow};
use crate::wake::Subject;

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

#[derive(sqlx::FromRow)]
struct SiteColumns {
    name: String,
    labels: String,
    joined_ms: i64,
    seen_ms: Option<i64>,
    version: Option<String>,
    open_transfers: i64,
    #[sqlx(flatten)]
    member: MemberColumns,
}

const TABLE: &str = "site";
/// The sites after a name, or the one of a name.
const SITES: &str = "SELECT site.name, labels, joined_ms, seen_ms, version,
        (SELECT COUNT(*) FROM transfer t WHERE t.site = site.name AND t.state NOT IN ('done', 'failed', 'cancelled')) AS open_transfers,
        serial, issued_ms, expires_ms, confirmed_ms, previous, previous_until_ms,
        revoked_ms, revoked_by, revoked_why, change, changed_ms, changed_by
     FROM site LEFT JOIN member m ON m.role = 'site' AND m.name = site.name
     WHERE ($1 IS NULL OR site.name > $1) AND ($2 IS NULL OR site.name = $2) ORDER BY site.name LIMIT $3";
/// A token, and when its holder connected with the certificate of the token. Of a certificate that an
/// earlier version issued, only when the holder last connected is known.
const TOKEN: &str = "SELECT secret_hash, token.site, labels, token.expires_ms, used_ms, token.role, key_hash,
        CASE WHEN m.issued_ms >= used_ms THEN CASE WHEN m.confirmed_ms IS NULL THEN NULL ELSE MAX(m.confirmed_ms, used_ms) END
             WHEN token.role = 'site' THEN (SELECT seen_ms FROM site WHERE name = token.site)
             ELSE (SELECT seen_ms FROM publisher WHERE name = token.site) END
     FROM token LEFT JOIN member m ON m.role = token.role AND m.name = token.site WHERE id = $1";
/// Entries of a site's `[train] allow` that are stored.
const TRAIN_ALLOW_MAX: usize = 10_000;

fn token(
    (secret_hash, name, labels, expires_ms, used_ms, role, key_hash, seen_ms): TokenColumns,
) -> TokenRow {
    TokenRow {
        secret_hash,
        name,
        labels,
        expires_ms,
        used_ms,
        role,
        key_hash,
        seen_ms,
    }
}

impl Sqlite {
    /// A row of [`SITES`]. A site whose labels cannot be read is returned without labels, and is
    /// reported.
    fn site_row(&self, row: SiteColumns) -> Result<SiteRow, Fault> {
        let name = row.name;
        let labels = serde_json::from_str(&row.labels).map_err(|e| malformed(TABLE, &name, e));
        Ok(SiteRow {
            labels: self
                .sound("labels of site", &name, labels)
                .unwrap_or_default(),
            member: row.member.member(&name)?,
            name: name.parse().map_err(|e| malformed(TABLE, &name, e))?,
            joined_ms: row.joined_ms,
            seen_ms: row.seen_ms,
            version: row.version,
            open_transfers: row.open_transfers as u64,
        })
    }

    /// Writes one value (`$1`) of a site (`$2`).
    pub(super) async fn set_of_site<T>(
        &self,
        sql: &'static str,
        value: Option<T>,
        site: &SiteName,
    ) -> Result<(), Fault>
    where
        Option<T>: for<'q> sqlx::Encode<'q, sqlx::Sqlite> + sqlx::Type<sqlx::Sqlite> + Send,
    {
        let mut write = self.begin().await?;
        sqlx::query(sql)
            .bind(value)
            .bind(site.as_str())
            .execute(write.db())
            .await
            .map_err(fault)?;
        write.commit().await
    }
}

/// The limits of a publisher.
const SCOPE: &str = "SELECT scope FROM publisher WHERE name = $1";

/// The limits in a row of `table`; `None`: there is no row. Limits that cannot be read allow nothing.
fn read_scope(
    table: &str,
    key: &str,
    row: Option<(Option<String>,)>,
) -> Result<Option<PublisherScope>, Fault> {
    match row {
        None => Ok(None),
        Some((None,)) => Ok(Some(PublisherScope::default())),
        Some((Some(scope),)) => serde_json::from_str(&scope)
            .map(Some)
            .map_err(|e| malformed(table, key, e)),
    }
}

#[async_trait]
impl Sites for Sqlite {
    async fn add_token(
        &self,
        id: &str,
        secret_hash: &[u8; 32],
        holder: &Peer,
        labels: &BTreeMap<String, String>,
        ttl_seconds: u64,
    ) -> Result<(), Fault> {
        let now = clock::now_ms();
        let (role, taken) = match holder {
            Peer::Publisher(_) => (PUBLISHER, "SELECT 'a site' FROM site WHERE name = $1"),
            Peer::Site(_) => (SITE, "SELECT 'a publisher' FROM publisher WHERE name = $1"),
            Peer::Hub(_) => return Err(Fault::usage("a hub joins nothing")),
        };
        let mut write = self.begin().await?;
        let taken: Option<(String,)> = sqlx::query_as(taken)
            .bind(holder.name())
            .fetch_optional(write.db())
            .await
            .map_err(fault)?;
        if let Some((what,)) = taken {
            return Err(
                Fault::conflict(format!("{} is {what} already", holder.name()))
                    .with_next("choose another name"),
            );
        }
        if write.member(holder).await?.revoked.is_some() {
            return Err(
                Fault::conflict(format!("{holder} is revoked")).with_next(format!(
                    "let it in again first: packhorse {role} restore {}",
                    holder.name()
                )),
            );
        }
        sqlx::query("INSERT INTO token (id, secret_hash, role, site, labels, expires_ms) VALUES ($1, $2, $3, $4, $5, $6)")
            .bind(id)
            .bind(&secret_hash[..])
            .bind(role)
            .bind(holder.name())
            .bind(json("labels", labels)?)
            .bind(now.saturating_add((ttl_seconds as i64).saturating_mul(1000)))
            .execute(write.db())
            .await
            .map_err(fault)?;
        write.commit().await
    }

    async fn limit_token(&self, id: &str, scope: &PublisherScope) -> Result<(), Fault> {
        let mut write = self.begin().await?;
        sqlx::query("UPDATE token SET scope = $1 WHERE id = $2")
            .bind(json("scope", scope)?)
            .bind(id)
            .execute(write.db())
            .await
            .map_err(fault)?;
        write.commit().await
    }

    async fn publisher_scope(&self, name: &PublisherName) -> Result<Option<PublisherScope>, Fault> {
        let row = sqlx::query_as(SCOPE)
            .bind(name.as_str())
            .fetch_optional(self.read())
            .await
            .map_err(fault)?;
        read_scope("publisher", name.as_str(), row)
    }

    async fn redeem_token(
        &self,
        id: &str,
        secret_hash: &[u8; 32],
        claim: &Claim,
        key_hash: &[u8; 32],
    ) -> Result<(Peer, Serial), Fault> {
        let now = clock::now_ms();
        let mut write = self.begin().await?;
        let row: Option<TokenColumns> = sqlx::query_as(TOKEN)
            .bind(id)
            .fetch_optional(write.db())
            .await
            .map_err(fault)?;
        let row = row.map(token);
        let holder = TokenRow::redeemed(row.as_ref(), id, secret_hash, claim, key_hash, now)?;
        if write.member(&holder).await?.revoked.is_some() {
            return Err(
                Fault::not_allowed(format!("{holder} was revoked at the hub")).with_next(
                    "ask the administrator of the hub to restore it, then for a new token",
                ),
            );
        }
        sqlx::query("UPDATE token SET used_ms = $1, key_hash = $2 WHERE id = $3")
            .bind(now)
            .bind(&key_hash[..])
            .bind(id)
            .execute(write.db())
            .await
            .map_err(fault)?;
        let name = holder.name();
        match &holder {
            Peer::Site(_) => {
                // A token without labels does not change them.
                let labels = row.map_or_else(|| "{}".into(), |row| row.labels);
                sqlx::query(
                    "INSERT INTO site (name, labels, joined_ms) VALUES ($1, $2, $3)
                     ON CONFLICT (name) DO UPDATE SET joined_ms = excluded.joined_ms,
                         labels = CASE excluded.labels WHEN '{}' THEN site.labels ELSE excluded.labels END",
                )
                .bind(name)
                .bind(labels)
                .bind(now)
                .execute(write.db())
                .await
                .map_err(fault)?;
                let state = SiteState {
                    online: false,
                    seen_ms: None,
                    version: None,
                };
                let state = json("a site", &state)?;
                write.note("site", name, state, Subject::Other).await?;
            }
            Peer::Publisher(_) | Peer::Hub(_) => {
                let of_token = "SELECT scope FROM token WHERE id = $1";
                let of_token: Option<(Option<String>,)> = sqlx::query_as(of_token)
                    .bind(id)
                    .fetch_optional(write.db())
                    .await
                    .map_err(fault)?;
                let earlier: Option<(Option<String>,)> = sqlx::query_as(SCOPE)
                    .bind(name)
                    .fetch_optional(write.db())
                    .await
                    .map_err(fault)?;
                let scope = read_scope("token", id, of_token)?;
                let scope = match read_scope("publisher", name, earlier)? {
                    Some(earlier) => scope.unwrap_or_default().over(earlier),
                    None => scope.unwrap_or_default(),
                };
                sqlx::query(
                    "INSERT INTO publisher (name, joined_ms, scope) VALUES ($1, $2, $3)
                     ON CONFLICT (name) DO UPDATE SET joined_ms = excluded.joined_ms, scope = excluded.scope",
                )
                .bind(name)
                .bind(now)
                .bind(json("scope", &scope)?)
                .execute(write.db())
                .await
                .map_err(fault)?;
                write.changes(Subject::Other);
            }
        }
        let serial = write.issue(&holder, None, now).await?;
        write.commit().await?;
        Ok((holder, serial))
    }

    async fn publisher_seen(&self, name: &PublisherName) -> Result<bool, Fault> {
        let mut write = self.begin().await?;
        let done = sqlx::query("UPDATE publisher SET seen_ms = $1 WHERE name = $2")
            .bind(clock::now_ms())
            .bind(name.as_str())
            .execute(write.db())
            .await
            .map_err(fault)?;
        write.commit().await?;
        Ok(done.rows_affected() == 1)
    }

    async fn site_seen(
        &self,
        site: &SiteName,
        online: bool,
        at_ms: i64,
        version: Option<&str>,
    ) -> Result<(), Fault> {
        let mut write = self.begin().await?;
        let version: Option<(Option<String>,)> = sqlx::query_as(
            "UPDATE site SET seen_ms = $1, version = COALESCE($2, version) WHERE name = $3 RETURNING version",
        )
        .bind(at_ms)
        .bind(version)
        .bind(site.as_str())
        .fetch_optional(write.db())
        .await
        .map_err(fault)?;
        let state = SiteState {
            online,
            seen_ms: Some(at_ms),
            version: version.and_then(|(version,)| version),
        };
        let state = json("a site", &state)?;
        // Each transfer gets its own number, so that a page of changes can end after any of them.
        // The event has the number of the last one.
        let (open,): (i64,) =
            sqlx::query_as("SELECT COUNT(*) FROM transfer WHERE site = $1 AND state NOT IN ('done', 'failed', 'cancelled')")
                .bind(site.as_str())
                .fetch_one(write.db())
                .await
                .map_err(fault)?;
        let count = open.max(1);
        let last = write.take_numbers(count).await?;
        sqlx::query(
            "UPDATE transfer SET cursor = $1 + open.number FROM (
                SELECT id, ROW_NUMBER() OVER (ORDER BY cursor, id) AS number FROM transfer
                WHERE site = $2 AND state NOT IN ('done', 'failed', 'cancelled')) AS open
             WHERE transfer.id = open.id",
        )
        .bind(last - count)
        .bind(site.as_str())
        .execute(write.db())
        .await
        .map_err(fault)?;
        // The work of the site does not change.
        write
            .note_as(last, "site", site.as_str(), state, Subject::Other)
            .await?;
        write.commit().await
    }

    async fn sites_heard(&self, heard: &[(SiteName, i64)]) -> Result<(), Fault> {
        let mut write = self.begin().await?;
        for (site, at_ms) in heard {
            sqlx::query("UPDATE site SET seen_ms = $1 WHERE name = $2 AND (seen_ms IS NULL OR seen_ms < $1)")
                .bind(at_ms)
                .bind(site.as_str())
                .execute(write.db())
                .await
                .map_err(fault)?;
        }
        write.commit().await
    }

    async fn set_manifest_format(&self, site: &SiteName, format: u32) -> Result<(), Fault> {
        let sql = "UPDATE site SET manifest_format = $1 WHERE name = $2";
        self.set_of_site(sql, Some(i64::from(format)), site).await
    }

    async fn manifest_format(&self) -> Result<Option<u32>, Fault> {
        let (least,): (Option<i64>,) = sqlx::query_as(
            "SELECT MIN(COALESCE(manifest_format, 1)) FROM site WHERE version IS NOT NULL",
        )
        .fetch_one(self.read())
        .await
        .map_err(fault)?;
        Ok(least.map(|format| u32::try_from(format).unwrap_or(1)))
    }

    async fn set_train_allow(
        &self,
        site: &SiteName,
        allow: Option<&[String]>,
    ) -> Result<(), Fault> {
        // Only entries that can be parsed are stored, and at most as many as a hub can have sites.
        let list: Option<Vec<&String>> = allow.map(|list| {
            list.iter()
                .take(TRAIN_ALLOW_MAX)
                .filter(|text| text.parse::<SiteSelector>().is_ok())
                .collect()
        });
        let list = list
            .map(|list| json("whom a site trains for", &list))
            .transpose()?;
        self.set_of_site(
            "UPDATE site SET train_allow = $1 WHERE name = $2",
            list,
            site,
        )
        .await
    }

    async fn train_allow(&self, site: &SiteName) -> Result<Option<String>, Fault> {
        let row: Option<(Option<String>,)> =
            sqlx::query_as("SELECT train_allow FROM site WHERE name = $1")
                .bind(site.as_str())
                .fetch_optional(self.read())
                .await
                .map_err(fault)?;
        Ok(row.and_then(|(allow,)| allow))
    }

    async fn allow_lists(&self) -> Result<Vec<AllowLists>, Fault> {
        let rows: Vec<(String, Option<String>, Option<String>)> =
            sqlx::query_as("SELECT name, share, train_allow FROM site WHERE share IS NOT NULL OR train_allow IS NOT NULL ORDER BY name")
                .fetch_all(self.read())
                .await
                .map_err(fault)?;
        let list = |text: Option<String>| {
            text.and_then(|text| serde_json::from_str(&text).ok())
                .unwrap_or_default()
        };
        let read = |(name, share, train): (String, Option<String>, Option<String>)| {
            let site = self.sound(
                TABLE,
                &name,
                name.parse().map_err(|e| malformed(TABLE, &name, e)),
            )?;
            Some(AllowLists {
                site,
                share: list(share),
                train: list(train),
            })
        };
        Ok(rows.into_iter().filter_map(read).collect())
    }

    async fn sites(&self) -> Result<Vec<SiteRow>, Fault> {
        let rows: Vec<SiteColumns> = sqlx::query_as(SITES)
            .bind(None::<&str>)
            .bind(None::<&str>)
            .bind(i64::MAX)
            .fetch_all(self.read())
            .await
            .map_err(fault)?;
        Ok(rows
            .into_iter()
            .filter_map(|row| self.sound(TABLE, &row.name.clone(), self.site_row(row)))
            .collect())
    }

    async fn site(&self, name: &str) -> Result<Option<SiteRow>, Fault> {
        let row: Option<SiteColumns> = sqlx::query_as(SITES)
            .bind(None::<&str>)
            .bind(name)
            .bind(1)
            .fetch_optional(self.read())
            .await
            .map_err(fault)?;
        row.map(|row| self.site_row(row)).transpose()
    }

    async fn each_site(
        &self,
        behind: Option<&str>,
        rows: i64,
        see: See<'_, SiteRow>,
    ) -> Result<(), Fault> {
        let mut found = sqlx::query_as::<_, SiteColumns>(SITES)
            .bind(behind)
            .bind(None::<&str>)
            .bind(rows)
            .fetch(self.read());
        while let Some(row) = found.try_next().await.map_err(fault)? {
            let key = row.name.clone();
            let row = self.sound(TABLE, &key, self.site_row(row));
            if !see(row.map_or(Listed::Malformed { key, cursor: 0 }, Listed::Row)) {
                break;
            }
        }
        Ok(())
    }
}

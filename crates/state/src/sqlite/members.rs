//! The certificates of sites and publishers in SQLite.

use std::collections::BTreeMap;

use async_trait::async_trait;
use base::clock;
use base::fault::Fault;
use base::names::SiteName;
use base::peer::Peer;
use model::policy::Standing;
use transport::identity::{LEAF_VALIDITY, Serial};

use super::{Sqlite, Write, fault, json, malformed};
use crate::events::SiteState;
use crate::members::{
    LOSSES_NAMED_MAX, Losses, Member, MemberChange, Members, PREVIOUS_ACCEPTED_MS, PublisherRow,
    Revocation, no_member, refuse_removal,
};
use crate::sites::{PUBLISHER, SITE};
use crate::wake::Subject;

/// The columns of [`MEMBER_COLUMNS`].
#[derive(Default, sqlx::FromRow)]
pub(super) struct MemberColumns {
    serial: Option<Vec<u8>>,
    issued_ms: Option<i64>,
    expires_ms: Option<i64>,
    confirmed_ms: Option<i64>,
    previous: Option<Vec<u8>>,
    previous_until_ms: Option<i64>,
    revoked_ms: Option<i64>,
    revoked_by: Option<String>,
    revoked_why: Option<String>,
    change: Option<String>,
    changed_ms: Option<i64>,
    changed_by: Option<String>,
}

const MEMBER: &str =
    "SELECT serial, issued_ms, expires_ms, confirmed_ms, previous, previous_until_ms,
        revoked_ms, revoked_by, revoked_why, change, changed_ms, changed_by
     FROM member WHERE role = $1 AND name = $2";

const PUBLISHERS: &str = "SELECT p.name, joined_ms, seen_ms, scope, serial, issued_ms, expires_ms, confirmed_ms, previous,
        previous_until_ms, revoked_ms, revoked_by, revoked_why, change, changed_ms, changed_by
     FROM publisher p LEFT JOIN member m ON m.role = 'publisher' AND m.name = p.name
     WHERE ($1 IS NULL OR p.name > $1) AND ($2 IS NULL OR p.name = $2) ORDER BY p.name LIMIT $3";

#[derive(sqlx::FromRow)]
struct PublisherColumns {
    name: String,
    joined_ms: i64,
    seen_ms: Option<i64>,
    scope: Option<String>,
    #[sqlx(flatten)]
    member: MemberColumns,
}

impl PublisherColumns {
    fn row(self) -> Result<PublisherRow, Fault> {
        Ok(PublisherRow {
            member: self.member.member(&self.name)?,
            name: self
                .name
                .parse()
                .map_err(|e| malformed("publisher", &self.name, e))?,
            joined_ms: self.joined_ms,
            seen_ms: self.seen_ms,
            scope: self.scope,
        })
    }
}

impl MemberColumns {
    pub(super) fn member(self, name: &str) -> Result<Member, Fault> {
        let serial = |bytes: Option<Vec<u8>>| {
            bytes
                .map(|bytes| {
                    Serial::from_bytes(&bytes)
                        .ok_or_else(|| malformed("member", name, "a serial that is none"))
                })
                .transpose()
        };
        let previous = serial(self.previous)?.zip(self.previous_until_ms);
        let revoked = self.revoked_ms.map(|at_ms| Revocation {
            at_ms,
            by: self.revoked_by.unwrap_or_default(),
            why: self.revoked_why,
        });
        let changed = self
            .change
            .zip(self.changed_ms)
            .map(|(what, at_ms)| MemberChange {
                what,
                at_ms,
                by: self.changed_by.unwrap_or_default(),
            });
        Ok(Member {
            serial: serial(self.serial)?,
            issued_ms: self.issued_ms,
            expires_ms: self.expires_ms,
            confirmed_ms: self.confirmed_ms,
            previous,
            revoked,
            changed,
        })
    }
}

fn role_of(who: &Peer) -> &'static str {
    match who {
        Peer::Publisher(_) => PUBLISHER,
        Peer::Site(_) | Peer::Hub(_) => SITE,
    }
}

fn exists(who: &Peer) -> &'static str {
    match who {
        Peer::Publisher(_) => "SELECT COUNT(*) FROM publisher WHERE name = $1",
        Peer::Site(_) | Peer::Hub(_) => "SELECT COUNT(*) FROM site WHERE name = $1",
    }
}

impl Write {
    /// The row of a member, also of one that was removed.
    pub(super) async fn member(&mut self, who: &Peer) -> Result<Member, Fault> {
        let found: Option<MemberColumns> = sqlx::query_as(MEMBER)
            .bind(role_of(who))
            .bind(who.name())
            .fetch_optional(self.db())
            .await
            .map_err(fault)?;
        found.unwrap_or_default().member(who.name())
    }

    /// Records the serial of a new certificate as the newest. `previous`: the one that is accepted
    /// until the new one was seen.
    pub(super) async fn issue(
        &mut self,
        who: &Peer,
        previous: Option<&Serial>,
        now: i64,
    ) -> Result<Serial, Fault> {
        let member = self.member(who).await?;
        let newest = match (&member.serial, previous) {
            // This hub was restored from a backup of the time before this one was issued.
            (Some(newest), Some(previous)) if previous.is_newer_than(newest) => Some(previous),
            (newest, _) => newest.as_ref(),
        };
        let serial = Serial::next(newest, now.max(0).unsigned_abs());
        let validity_ms = i64::try_from(LEAF_VALIDITY.as_millis()).unwrap_or(i64::MAX);
        sqlx::query(
            "INSERT INTO member (role, name, serial, issued_ms, expires_ms, previous, previous_until_ms)
             VALUES ($1, $2, $3, $4, $5, $6, $7)
             ON CONFLICT (role, name) DO UPDATE SET serial = excluded.serial, issued_ms = excluded.issued_ms,
                 expires_ms = excluded.expires_ms, confirmed_ms = NULL, previous = excluded.previous,
                 previous_until_ms = excluded.previous_until_ms,
                 change = CASE member.change WHEN 'removed' THEN NULL ELSE member.change END",
        )
        .bind(role_of(who))
        .bind(who.name())
        .bind(serial.as_bytes())
        .bind(now)
        .bind(now.saturating_add(validity_ms))
        .bind(previous.map(Serial::as_bytes))
        .bind(previous.map(|_| now.saturating_add(PREVIOUS_ACCEPTED_MS)))
        .execute(self.db())
        .await
        .map_err(fault)?;
        Ok(serial)
    }

    /// Fails if there is no site or publisher of this name.
    async fn must_exist(&mut self, who: &Peer) -> Result<(), Fault> {
        let (count,): (i64,) = sqlx::query_as(exists(who))
            .bind(who.name())
            .fetch_one(self.db())
            .await
            .map_err(fault)?;
        if count == 0 {
            Err(no_member(who))
        } else {
            Ok(())
        }
    }

    /// Records a change by a person.
    async fn note_change(&mut self, who: &Peer, what: &str, by: &str) -> Result<(), Fault> {
        sqlx::query(
            "INSERT INTO member (role, name, change, changed_ms, changed_by) VALUES ($1, $2, $3, $4, $5)
             ON CONFLICT (role, name) DO UPDATE SET change = $3, changed_ms = $4, changed_by = $5",
        )
        .bind(role_of(who))
        .bind(who.name())
        .bind(what)
        .bind(clock::now_ms())
        .bind(by)
        .execute(self.db())
        .await
        .map(drop)
        .map_err(fault)
    }

    /// Records the event of a change of a site. A publisher has no events.
    async fn note_site(&mut self, who: &Peer, online: bool) -> Result<(), Fault> {
        let Peer::Site(site) = who else {
            self.changes(Subject::Other);
            return Ok(());
        };
        let row: Option<(Option<i64>, Option<String>)> =
            sqlx::query_as("SELECT seen_ms, version FROM site WHERE name = $1")
                .bind(site.as_str())
                .fetch_optional(self.db())
                .await
                .map_err(fault)?;
        let (seen_ms, version) = row.unwrap_or_default();
        let state = SiteState {
            online,
            seen_ms,
            version,
        };
        let state = json("a site", &state)?;
        self.note("site", site.as_str(), state, Subject::Other)
            .await
            .map(drop)
    }
}

impl Sqlite {
    /// The certificates of a site or publisher that exists.
    pub(super) async fn member_of(&self, who: &Peer) -> Result<Member, Fault> {
        let found: Option<MemberColumns> = sqlx::query_as(MEMBER)
            .bind(role_of(who))
            .bind(who.name())
            .fetch_optional(self.read())
            .await
            .map_err(fault)?;
        found.unwrap_or_default().member(who.name())
    }
}

#[async_trait]
impl Members for Sqlite {
    async fn member(&self, who: &Peer) -> Result<Option<Member>, Fault> {
        let (count,): (i64,) = sqlx::query_as(exists(who))
            .bind(who.name())
            .fetch_one(self.read())
            .await
            .map_err(fault)?;
        match count {
            0 => Ok(None),
            _ => self.member_of(who).await.map(Some),
        }
    }

    async fn confirm(&self, who: &Peer, presented: &Serial) -> Result<(), Fault> {
        let mut write = self.begin().await?;
        if !write.member(who).await?.is_news(presented) {
            return Ok(());
        }
        sqlx::query(
            "UPDATE member SET serial = $1, confirmed_ms = $2, previous = NULL, previous_until_ms = NULL
             WHERE role = $3 AND name = $4",
        )
        .bind(presented.as_bytes())
        .bind(clock::now_ms())
        .bind(role_of(who))
        .bind(who.name())
        .execute(write.db())
        .await
        .map_err(fault)?;
        write.commit().await
    }

    async fn renew(&self, who: &Peer, presented: &Serial) -> Result<Serial, Fault> {
        let now = clock::now_ms();
        let mut write = self.begin().await?;
        write.must_exist(who).await?;
        let standing = write.member(who).await?.standing(presented, now);
        if standing != Standing::Current {
            return Err(Fault::not_allowed(format!(
                "the certificate of {who} was replaced by a newer one or revoked"
            ))
            .with_next("connect again with the newest certificate, or join again"));
        }
        let serial = write.issue(who, Some(presented), now).await?;
        write.commit().await?;
        Ok(serial)
    }

    async fn revoke(
        &self,
        who: &Peer,
        by: &str,
        why: Option<&str>,
        online: bool,
    ) -> Result<(), Fault> {
        let now = clock::now_ms();
        let mut write = self.begin().await?;
        write.must_exist(who).await?;
        if write.member(who).await?.revoked.is_some() {
            return Ok(());
        }
        write.note_change(who, "revoked", by).await?;
        sqlx::query(
            "UPDATE member SET revoked_ms = $1, revoked_by = $2, revoked_why = $3 WHERE role = $4 AND name = $5",
        )
        .bind(now)
        .bind(by)
        .bind(why)
        .bind(role_of(who))
        .bind(who.name())
        .execute(write.db())
        .await
        .map_err(fault)?;
        sqlx::query(
            "UPDATE token SET expires_ms = $1 WHERE role = $2 AND site = $3 AND expires_ms > $1 AND used_ms IS NULL",
        )
        .bind(now.saturating_sub(1))
        .bind(role_of(who))
        .bind(who.name())
        .execute(write.db())
        .await
        .map_err(fault)?;
        write.note_site(who, online).await?;
        write.commit().await
    }

    async fn restore(&self, who: &Peer, by: &str) -> Result<(), Fault> {
        let mut write = self.begin().await?;
        write.must_exist(who).await?;
        if write.member(who).await?.revoked.is_none() {
            return Ok(());
        }
        write.note_change(who, "restored", by).await?;
        sqlx::query(
            "UPDATE member SET revoked_ms = NULL, revoked_by = NULL, revoked_why = NULL WHERE role = $1 AND name = $2",
        )
        .bind(role_of(who))
        .bind(who.name())
        .execute(write.db())
        .await
        .map_err(fault)?;
        write.note_site(who, false).await?;
        write.commit().await
    }

    async fn set_labels(
        &self,
        site: &SiteName,
        set: &BTreeMap<String, String>,
        unset: &[String],
        by: &str,
        online: bool,
    ) -> Result<(), Fault> {
        let who = Peer::Site(site.clone());
        let mut write = self.begin().await?;
        let row: Option<(String,)> = sqlx::query_as("SELECT labels FROM site WHERE name = $1")
            .bind(site.as_str())
            .fetch_optional(write.db())
            .await
            .map_err(fault)?;
        let (text,) = row.ok_or_else(|| no_member(&who))?;
        let before: BTreeMap<String, String> =
            serde_json::from_str(&text).map_err(|e| malformed("site", site.as_str(), e))?;
        let mut labels = before.clone();
        unset.iter().for_each(|key| drop(labels.remove(key)));
        labels.extend(set.clone());
        if labels == before {
            return Ok(());
        }
        sqlx::query("UPDATE site SET labels = $1 WHERE name = $2")
            .bind(json("labels", &labels)?)
            .bind(site.as_str())
            .execute(write.db())
            .await
            .map_err(fault)?;
        write.note_change(&who, "set", by).await?;
        write.note_site(&who, online).await?;
        write.commit().await
    }

    async fn losses(&self, site: &SiteName) -> Result<Losses, Fault> {
        let (open_transfers,): (i64,) = sqlx::query_as(
            "SELECT COUNT(*) FROM transfer WHERE site = $1 AND state NOT IN ('done', 'failed', 'cancelled')",
        )
        .bind(site.as_str())
        .fetch_one(self.read())
        .await
        .map_err(fault)?;
        let last_copies: Vec<(String,)> = sqlx::query_as(
            "SELECT a.reference FROM artifact a WHERE a.origin = $1
                 AND NOT EXISTS (SELECT 1 FROM artifact b WHERE b.digest = a.digest AND (b.origin IS NULL OR b.origin <> $1))
                 AND NOT EXISTS (SELECT 1 FROM transfer t WHERE t.digest = a.digest AND t.site <> $1
                     AND t.state = 'done' AND t.removed_ms IS NULL)
             ORDER BY a.reference LIMIT $2",
        )
        .bind(site.as_str())
        .bind(LOSSES_NAMED_MAX)
        .fetch_all(self.read())
        .await
        .map_err(fault)?;
        let runs: Vec<(String,)> = sqlx::query_as(
            "SELECT name FROM run WHERE open = 1
                 AND (json_extract(body, '$.spec.from') = $1 OR json_extract(body, '$.spec.on') = $1)
             ORDER BY name LIMIT $2",
        )
        .bind(site.as_str())
        .bind(LOSSES_NAMED_MAX)
        .fetch_all(self.read())
        .await
        .map_err(fault)?;
        let names = |rows: Vec<(String,)>| rows.into_iter().map(|(name,)| name).collect();
        Ok(Losses {
            open_transfers: open_transfers as u64,
            last_copies: names(last_copies),
            runs: names(runs),
        })
    }

    async fn remove_member(&self, who: &Peer, by: &str, force: bool) -> Result<(), Fault> {
        if let (Peer::Site(site), false) = (who, force)
            && let Some(refusal) = refuse_removal(who, &self.losses(site).await?)
        {
            return Err(refusal);
        }
        let mut write = self.begin().await?;
        write.must_exist(who).await?;
        write.note_change(who, "removed", by).await?;
        let mut statements = vec![
            "UPDATE member SET revoked_ms = NULL, revoked_by = NULL, revoked_why = NULL, previous = NULL WHERE role = $1 AND name = $2",
            "DELETE FROM token WHERE role = $1 AND site = $2",
        ];
        statements.push(match who {
            Peer::Publisher(_) => "DELETE FROM publisher WHERE $1 = 'publisher' AND name = $2",
            Peer::Site(_) | Peer::Hub(_) => "DELETE FROM site WHERE $1 = 'site' AND name = $2",
        });
        for statement in statements {
            sqlx::query(statement)
                .bind(role_of(who))
                .bind(who.name())
                .execute(write.db())
                .await
                .map_err(fault)?;
        }
        write.note_site(who, false).await?;
        write.commit().await
    }

    async fn publishers(
        &self,
        behind: Option<&str>,
        rows: i64,
    ) -> Result<Vec<PublisherRow>, Fault> {
        let found: Vec<PublisherColumns> = sqlx::query_as(PUBLISHERS)
            .bind(behind)
            .bind(None::<&str>)
            .bind(rows)
            .fetch_all(self.read())
            .await
            .map_err(fault)?;
        let sound = |row: PublisherColumns| {
            let key = row.name.clone();
            self.sound("publisher", &key, row.row())
        };
        Ok(found.into_iter().filter_map(sound).collect())
    }

    async fn publisher(&self, name: &str) -> Result<Option<PublisherRow>, Fault> {
        let found: Option<PublisherColumns> = sqlx::query_as(PUBLISHERS)
            .bind(None::<&str>)
            .bind(name)
            .bind(1)
            .fetch_optional(self.read())
            .await
            .map_err(fault)?;
        found.map(PublisherColumns::row).transpose()
    }
}

//! Transfers in the catalogue.

use serde::{Deserialize, Serialize};
use sqlx::Row;
use sqlx::sqlite::SqliteRow;

use super::{ArtifactRow, Catalogue, fault, note, time};
use crate::api::types::{Action, Bytes, State, Transfer, TransferQuery};
use crate::chunk::Hash;
use crate::clock;
use crate::fault::{Fault, Reason};
use crate::manifest::{Digest, KindInfo};
use crate::names::{ArtifactRef, SiteName};

/// What the hub asks of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Want {
    /// Go on.
    Run,
    /// Stand still.
    Pause,
    /// Give up and clean.
    Cancel,
}

impl Want {
    fn as_str(self) -> &'static str {
        match self {
            Want::Run => "run",
            Want::Pause => "pause",
            Want::Cancel => "cancel",
        }
    }
}

/// What a site reports of a transfer, and `status` shows.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Body {
    /// Why it is where it is.
    pub reason: Option<Reason>,
    /// In words.
    pub message: Option<String>,
    /// What to do next.
    pub next: Option<String>,
    /// The transfer that must be done first, while it waits for that.
    pub waits_for: Option<String>,
    /// Bytes.
    pub bytes: Bytes,
    /// Raw bytes a second.
    pub rate: u64,
    /// Seconds to go.
    pub eta_seconds: Option<u64>,
    /// How often it was begun.
    pub attempts: u32,
    /// Where it landed.
    pub location: Option<String>,
    /// The signed receipt.
    pub receipt: Option<serde_json::Value>,
    /// Whether it had landed before it was begun again.
    pub landed: bool,
}

impl Body {
    /// Notes a fault, or with `None` that all is well. Whatever it waited for before, it waits for no more.
    pub fn set_fault(&mut self, fault: Option<&Fault>) {
        self.reason = fault.map(|f| f.reason);
        self.message = fault.map(|f| f.message.clone());
        self.next = fault.map(|f| f.next.clone());
        self.waits_for = None;
    }

    /// As it is when a transfer that ended begins again: one that failed goes on with what it has, one that was done
    /// or cancelled begins at nothing.
    fn begun_again(self, from: State) -> Self {
        match from {
            // What was cancelled was cleared away.
            State::Done | State::Cancelled => Self {
                bytes: Bytes { total: self.bytes.total, ..Bytes::default() },
                attempts: self.attempts,
                landed: self.landed || from == State::Done,
                ..Self::default()
            },
            _ => self,
        }
    }
}

/// One transfer.
#[derive(Debug, Clone, PartialEq)]
pub struct TransferRow {
    /// Its id.
    pub id: String,
    /// The delivery it is part of.
    pub delivery: String,
    /// What.
    pub artifact: ArtifactRef,
    /// Its digest.
    pub digest: Digest,
    /// Where to.
    pub site: SiteName,
    /// What the hub asks for.
    pub want: Want,
    /// Raised by every retry.
    pub generation: i64,
    /// Where it is.
    pub state: State,
    /// The rest.
    pub body: Body,
    /// When it was asked for.
    pub created_ms: i64,
    /// When it last changed.
    pub updated_ms: i64,
    /// When it ended.
    pub finished_ms: Option<i64>,
    /// The event at which it last changed.
    pub cursor: i64,
    /// The transfers to this site that go first.
    pub after: Vec<String>,
    /// When what it brought was taken away again.
    pub removed_ms: Option<i64>,
}

/// One artifact of a delivery.
#[derive(Debug, Clone)]
pub struct Part {
    /// What.
    pub artifact: ArtifactRef,
    /// Its digest.
    pub digest: Digest,
    /// Its bytes.
    pub total: u64,
    /// The artifact that must be at the site first.
    pub needs: Option<ArtifactRef>,
    /// Where it goes.
    pub sites: Vec<SiteName>,
}

impl Part {
    /// An artifact to these sites.
    pub fn new(row: &ArtifactRow, sites: &[SiteName]) -> Self {
        let needs = match &row.root.info {
            KindInfo::Labels(labels) => labels.dataset.as_ref().map(|dataset| dataset.artifact.clone()),
            KindInfo::Files | KindInfo::Image(_) => None,
        };
        Self { artifact: row.artifact.clone(), digest: row.digest, total: row.root.totals.bytes, needs, sites: sites.to_vec() }
    }
}

impl TransferRow {
    /// Whether this very transfer has landed what it brings, now or before it was begun again: what a cancelled one only found
    /// there is not its own.
    pub fn has_landed(&self) -> bool {
        self.state == State::Done || self.body.landed
    }

    /// As `status` shows it.
    pub fn view(&self) -> Transfer {
        let body = self.body.clone();
        Transfer {
            id: self.id.clone(),
            delivery: self.delivery.clone(),
            artifact: self.artifact.clone(),
            digest: self.digest.hex(),
            site: self.site.clone(),
            state: self.state,
            reason: body.reason,
            message: body.message,
            next: body.next,
            waits_for: body.waits_for,
            bytes: body.bytes,
            rate: if self.state == State::Transferring { body.rate } else { 0 },
            eta_seconds: if self.state == State::Transferring { body.eta_seconds } else { None },
            attempts: body.attempts,
            location: body.location,
            created_at: time(self.created_ms),
            updated_at: time(self.updated_ms),
            finished_at: self.finished_ms.map(time),
            receipt: body.receipt,
            removed_at: self.removed_ms.map(time),
            cursor: self.cursor as u64,
        }
    }
}

pub(super) fn transfer(row: &SqliteRow) -> Result<TransferRow, Fault> {
    let malformed = |what: &str| Fault::internal(format!("the catalogue holds a malformed transfer: {what}"));
    let text = |name: &str| row.try_get::<String, _>(name).map_err(fault);
    let number = |name: &str| row.try_get::<i64, _>(name).map_err(fault);
    let digest: Vec<u8> = row.try_get("digest").map_err(fault)?;
    Ok(TransferRow {
        id: text("id")?,
        delivery: text("delivery")?,
        artifact: text("reference")?.parse()?,
        digest: Hash(digest.try_into().map_err(|_| malformed("digest"))?),
        site: text("site")?.parse()?,
        want: match text("want")?.as_str() {
            "pause" => Want::Pause,
            "cancel" => Want::Cancel,
            _ => Want::Run,
        },
        generation: number("generation")?,
        state: State::parse(&text("state")?).ok_or_else(|| malformed("state"))?,
        body: serde_json::from_str(&text("body")?).map_err(|_| malformed("body"))?,
        created_ms: number("created_ms")?,
        updated_ms: number("updated_ms")?,
        finished_ms: row.try_get("finished_ms").map_err(fault)?,
        cursor: number("cursor")?,
        after: serde_json::from_str(&text("after_ids")?).map_err(|_| malformed("after_ids"))?,
        removed_ms: row.try_get("removed_ms").map_err(fault)?,
    })
}

/// A new id: sorts by time, and cannot be guessed from another.
pub(crate) fn new_id(prefix: &str) -> String {
    format!("{prefix}-{:011x}{:08x}", clock::now_unix_ms(), rand::random::<u32>())
}

async fn one<'e>(db: impl sqlx::SqliteExecutor<'e>, id: &str) -> Result<TransferRow, Fault> {
    let row = sqlx::query("SELECT * FROM transfer WHERE id = ?").bind(id).fetch_optional(db).await.map_err(fault)?;
    match row {
        Some(row) => transfer(&row),
        None => Err(Fault::not_found(format!("there is no transfer {id}")).with_next("'packhorse status' lists them")),
    }
}

/// The transfer of an artifact to a site that stands.
async fn standing<'e>(db: impl sqlx::SqliteExecutor<'e>, artifact: &ArtifactRef, site: &SiteName) -> Result<Option<TransferRow>, Fault> {
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

/// Finds the transfer of an artifact to a site that stands, or begins one.
async fn begin(
    tx: &mut sqlx::SqliteConnection,
    delivery: &str,
    part: &Part,
    site: &SiteName,
    lost: &[String],
    now: i64,
) -> Result<String, Fault> {
    if let Some(row) = standing(&mut *tx, &part.artifact, site).await? {
        let begins_again = match row.state {
            State::Failed => true,
            State::Done => lost.contains(&row.id) || Catalogue::may_be_going(tx, &row.id, now).await?,
            _ => false,
        };
        if begins_again {
            let body = row.body.begun_again(row.state);
            let seq = note(tx, "transfer", &row.id).await?;
            sqlx::query("UPDATE transfer SET state = 'queued', want = 'run', generation = generation + 1, finished_ms = NULL, body = ?, updated_ms = ?, cursor = ? WHERE id = ?")
                .bind(serde_json::to_string(&body).unwrap_or_default()).bind(now).bind(seq).bind(&row.id).execute(&mut *tx).await.map_err(fault)?;
        }
        return Ok(row.id);
    }
    let id = new_id("t");
    let seq = note(tx, "transfer", &id).await?;
    let body = Body { bytes: Bytes { total: part.total, ..Bytes::default() }, ..Body::default() };
    sqlx::query(
        "INSERT INTO transfer (id, delivery, reference, digest, site, state, body, created_ms, updated_ms, cursor, needs)
         VALUES (?, ?, ?, ?, ?, 'queued', ?, ?, ?, ?, ?)",
    )
    .bind(&id)
    .bind(delivery)
    .bind(part.artifact.to_string())
    .bind(&part.digest.0[..])
    .bind(site.as_str())
    .bind(serde_json::to_string(&body).unwrap_or_default())
    .bind(now)
    .bind(now)
    .bind(seq)
    .bind(part.needs.as_ref().map(ToString::to_string))
    .execute(&mut *tx)
    .await
    .map_err(fault)?;
    Ok(id)
}

impl Catalogue {
    /// Begins a delivery: a transfer for each artifact and site, all in one transaction, so that no site ever hears of
    /// labels without the dataset that they wait for. A transfer that stands already is taken instead: one that runs as
    /// it is, one that is done stays done; a failed one begins again, and so does a done one that is named in `lost`, or that a run
    /// is giving back. What was given back does not stand.
    pub async fn deliver(&self, delivery: &str, run: Option<&str>, parts: &[Part], lost: &[String]) -> Result<Vec<String>, Fault> {
        let now = clock::now_unix_ms() as i64;
        let mut tx = self.write.begin_with("BEGIN IMMEDIATE").await.map_err(fault)?;
        sqlx::query("INSERT INTO delivery (id, run, created_ms) VALUES (?, ?, ?)")
            .bind(delivery)
            .bind(run)
            .bind(now)
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        let mut ids: Vec<String> = Vec::new();
        for part in parts {
            for site in &part.sites {
                let id = begin(&mut tx, delivery, part, site, lost, now).await?;
                // One artifact named twice is one part.
                if ids.contains(&id) {
                    continue;
                }
                sqlx::query("INSERT INTO delivery_part (delivery, transfer) VALUES (?, ?)")
                    .bind(delivery)
                    .bind(&id)
                    .execute(&mut *tx)
                    .await
                    .map_err(fault)?;
                ids.push(id);
            }
        }
        tx.commit().await.map_err(fault)?;
        self.notify();
        Ok(ids)
    }

    /// The transfers of these parts that are done.
    pub async fn done_already(&self, parts: &[Part]) -> Result<Vec<TransferRow>, Fault> {
        let mut out = Vec::new();
        for part in parts {
            for site in &part.sites {
                out.extend(standing(&self.read, &part.artifact, site).await?.filter(|row| row.state == State::Done));
            }
        }
        Ok(out)
    }

    /// Takes over a transfer that the hub asks for (at a site). Returns it as it stands here.
    pub async fn adopt(&self, wanted: &TransferRow) -> Result<TransferRow, Fault> {
        let mut tx = self.write.begin_with("BEGIN IMMEDIATE").await.map_err(fault)?;
        let here = sqlx::query("SELECT * FROM transfer WHERE id = ?").bind(&wanted.id).fetch_optional(&mut *tx).await.map_err(fault)?;
        let mut row = match here {
            Some(row) => transfer(&row)?,
            None => {
                // Another transfer of the same artifact that the hub no longer knows would bar this one.
                sqlx::query(
                    "UPDATE transfer SET state = 'cancelled' WHERE reference = ? AND site = ? AND state NOT IN ('done', 'cancelled')",
                )
                .bind(wanted.artifact.to_string())
                .bind(wanted.site.as_str())
                .execute(&mut *tx)
                .await
                .map_err(fault)?;
                let seq = note(&mut tx, "transfer", &wanted.id).await?;
                sqlx::query(
                    "INSERT INTO transfer (id, delivery, reference, digest, site, want, generation, state, body, created_ms, updated_ms, cursor, after_ids)
                     VALUES (?, ?, ?, ?, ?, ?, ?, 'queued', ?, ?, ?, ?, ?)",
                )
                .bind(&wanted.id)
                .bind(&wanted.delivery)
                .bind(wanted.artifact.to_string())
                .bind(&wanted.digest.0[..])
                .bind(wanted.site.as_str())
                .bind(wanted.want.as_str())
                .bind(wanted.generation)
                .bind(serde_json::to_string(&Body { bytes: wanted.body.bytes, ..Body::default() }).unwrap_or_default())
                .bind(wanted.created_ms)
                .bind(clock::now_unix_ms() as i64)
                .bind(seq)
                .bind(serde_json::to_string(&wanted.after).unwrap_or_default())
                .execute(&mut *tx)
                .await
                .map_err(fault)?;
                tx.commit().await.map_err(fault)?;
                self.notify();
                return self.transfer(&wanted.id).await;
            }
        };
        let again = wanted.generation > row.generation && row.state.is_final();
        if again || row.want != wanted.want || row.generation != wanted.generation || row.after != wanted.after {
            (row.want, row.generation) = (wanted.want, wanted.generation);
            row.after.clone_from(&wanted.after);
            if again {
                row.body = row.body.begun_again(row.state);
                // What was given back after a run is brought again: what may lie there meanwhile is not its own.
                row.body.landed &= row.removed_ms.is_none();
                (row.state, row.finished_ms, row.removed_ms) = (State::Queued, None, None);
            }
            sqlx::query(
                "UPDATE transfer SET want = ?, generation = ?, state = ?, body = ?, finished_ms = ?, after_ids = ?, removed_ms = ? WHERE id = ?",
            )
                .bind(row.want.as_str())
                .bind(row.generation)
                .bind(row.state.as_str())
                .bind(serde_json::to_string(&row.body).unwrap_or_default())
                .bind(row.finished_ms)
                .bind(serde_json::to_string(&row.after).unwrap_or_default())
                .bind(row.removed_ms)
                .bind(&row.id)
                .execute(&mut *tx)
                .await
                .map_err(fault)?;
            tx.commit().await.map_err(fault)?;
            self.notify();
        }
        Ok(row)
    }

    /// Does what somebody asks of a transfer, at the hub. It shows at once; the site follows when it hears of it.
    pub async fn act(&self, id: &str, action: Action) -> Result<TransferRow, Fault> {
        let mut tx = self.write.begin_with("BEGIN IMMEDIATE").await.map_err(fault)?;
        let mut row = one(&mut *tx, id).await?;
        let hold = |reason, next: &str| {
            Some(Fault::internal("asked for by a person").with_reason(reason).with_next(format!("packhorse {next} {id}")))
        };
        let (want, state, why) = match action {
            Action::Pause => (Want::Pause, State::Paused, hold(Reason::PausedByUser, "resume")),
            Action::Cancel => (Want::Cancel, State::Cancelled, hold(Reason::CancelledByUser, "retry")),
            Action::Resume if row.state == State::Paused => (Want::Run, State::Queued, None),
            Action::Resume => (Want::Run, row.state, None),
            Action::Retry => {
                row.body = row.body.begun_again(row.state);
                (Want::Run, State::Queued, None)
            }
        };
        row.body.set_fault(why.as_ref());
        let now = clock::now_unix_ms() as i64;
        let seq = note(&mut tx, "transfer", id).await?;
        sqlx::query(
            "UPDATE transfer SET want = ?, state = ?, body = ?, generation = generation + ?, updated_ms = ?, finished_ms = ?, cursor = ? WHERE id = ?",
        )
        .bind(want.as_str())
        .bind(state.as_str())
        .bind(serde_json::to_string(&row.body).unwrap_or_default())
        .bind(i64::from(action == Action::Retry))
        .bind(now)
        .bind(state.is_final().then_some(now))
        .bind(seq)
        .bind(id)
        .execute(&mut *tx)
        .await
        .map_err(|e| match &e {
            sqlx::Error::Database(db) if db.is_unique_violation() => {
                Fault::conflict(format!("another transfer of {} to {} stands already, so {id} cannot begin again", row.artifact, row.site))
                    .with_next("see 'packhorse status'")
            }
            _ => fault(e),
        })?;
        tx.commit().await.map_err(fault)?;
        self.notify();
        self.transfer(id).await
    }

    /// Writes where a transfer is. A state that is final stays, unless a newer generation asked for it again.
    pub async fn update_transfer(&self, id: &str, generation: i64, state: State, body: &Body) -> Result<(), Fault> {
        let mut tx = self.write.begin_with("BEGIN IMMEDIATE").await.map_err(fault)?;
        let now = clock::now_unix_ms() as i64;
        let text = serde_json::to_string(body).unwrap_or_default();
        let same: Option<(i64,)> = sqlx::query_as("SELECT 1 FROM transfer WHERE id = ? AND state = ? AND body = ? AND generation = ?")
            .bind(id)
            .bind(state.as_str())
            .bind(&text)
            .bind(generation)
            .fetch_optional(&mut *tx)
            .await
            .map_err(fault)?;
        if same.is_some() {
            return Ok(());
        }
        let seq = note(&mut tx, "transfer", id).await?;
        sqlx::query(
            "UPDATE transfer SET state = ?, body = ?, updated_ms = ?, cursor = ?, finished_ms = ?
             WHERE id = ? AND generation <= ? AND (state NOT IN ('done', 'cancelled') OR state = ?)",
        )
        .bind(state.as_str())
        .bind(&text)
        .bind(now)
        .bind(seq)
        .bind(state.is_final().then_some(now))
        .bind(id)
        .bind(generation)
        .bind(state.as_str())
        .execute(&mut *tx)
        .await
        .map_err(fault)?;
        tx.commit().await.map_err(fault)?;
        self.notify();
        Ok(())
    }

    /// Notes that the site has given a cancelled transfer up.
    pub async fn confirm_cancelled(&self, id: &str) -> Result<(), Fault> {
        sqlx::query("UPDATE transfer SET want = 'run' WHERE id = ? AND state = 'cancelled'")
            .bind(id)
            .execute(&self.write)
            .await
            .map_err(fault)?;
        self.notify();
        Ok(())
    }

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
            return Err(Fault::not_found(format!("there is no transfer or delivery {id}")).with_next("'packhorse status' lists them"));
        }
        rows.iter().map(transfer).collect()
    }

    /// The transfers that a query asks for, and the cursor to go on from.
    pub async fn transfers(&self, query: &TransferQuery) -> Result<(Vec<TransferRow>, u64), Fault> {
        let cursor = self.cursor().await?;
        let limit = i64::from(query.limit.unwrap_or(1000).min(10_000));
        if let Some(ids) = &query.id {
            let mut out: Vec<TransferRow> = Vec::new();
            for id in ids.split(',') {
                for row in self.transfers_of(id.trim()).await? {
                    if query.since.is_none_or(|since| row.cursor as u64 > since) && !out.iter().any(|o| o.id == row.id) {
                        out.push(row);
                    }
                }
            }
            return Ok((out, cursor));
        }
        let rows = match query.since {
            Some(since) => {
                sqlx::query("SELECT * FROM transfer WHERE cursor > ? ORDER BY cursor LIMIT ?")
                    .bind(since as i64)
                    .bind(limit)
                    .fetch_all(&self.read)
                    .await
            }
            None => sqlx::query("SELECT * FROM transfer ORDER BY created_ms DESC, id DESC LIMIT ?").bind(limit).fetch_all(&self.read).await,
        };
        let rows: Vec<TransferRow> = rows.map_err(fault)?.iter().map(transfer).collect::<Result<_, _>>()?;
        // A reader who got a full page goes on behind it, not behind what it was not shown.
        let cursor = match (query.since, rows.last()) {
            (Some(_), Some(last)) if rows.len() as i64 == limit => last.cursor as u64,
            _ => cursor,
        };
        Ok((rows, cursor))
    }

    /// What a site has to do: its transfers that are not ended, or that it has still to give up; oldest first.
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

    /// Which open transfers of a site wait for which others: what they need is on its way there, and not given up. One
    /// that failed is still waited for, since a person will see to it.
    pub async fn waits(&self, site: &SiteName) -> Result<Vec<(String, String)>, Fault> {
        sqlx::query_as(
            "SELECT t.id, first.id FROM transfer t JOIN transfer first ON first.site = t.site AND first.reference = t.needs
             WHERE t.site = ? AND t.needs IS NOT NULL AND t.state NOT IN ('done', 'failed', 'cancelled')
               AND first.state NOT IN ('done', 'cancelled') ORDER BY t.id, first.id",
        )
        .bind(site.as_str())
        .fetch_all(&self.read)
        .await
        .map_err(fault)
    }

    /// Whether a site may read this content: it has a transfer of it that was not cancelled, nor its result removed.
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
    pub async fn transfers_of_artifact(&self, artifact: &ArtifactRef) -> Result<Vec<TransferRow>, Fault> {
        let rows = sqlx::query("SELECT * FROM transfer WHERE reference = ? ORDER BY created_ms, id")
            .bind(artifact.to_string())
            .fetch_all(&self.read)
            .await
            .map_err(fault)?;
        rows.iter().map(transfer).collect()
    }
}

//! What changes a transfer: it is asked for, taken over, held, begun again, and told of as it goes on.

use super::queries::{one, standing};
use super::{Adopted, Body, Part, TransferRow, Want, new_transfer_id, transfer};
use crate::{Catalogue, fault, note};
use base::clock;
use base::fault::{Fault, Reason};
use base::names::{DeliveryId, SiteName, TransferId};
use model::transfer::{Action, Bytes, State};

/// Finds the transfer of an artifact to a site that stands, or begins one.
async fn begin(
    tx: &mut sqlx::SqliteConnection,
    delivery: &DeliveryId,
    part: &Part,
    site: &SiteName,
    lost: &[TransferId],
    now: i64,
) -> Result<TransferId, Fault> {
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
                .bind(serde_json::to_string(&body).unwrap_or_default()).bind(now).bind(seq).bind(row.id.as_str()).execute(&mut *tx).await.map_err(fault)?;
        }
        return Ok(row.id);
    }
    let id = new_transfer_id();
    let seq = note(tx, "transfer", &id).await?;
    let body = Body { bytes: Bytes { total: part.total, ..Bytes::default() }, ..Body::default() };
    sqlx::query(
        "INSERT INTO transfer (id, delivery, reference, digest, site, state, body, created_ms, updated_ms, cursor, needs)
         VALUES (?, ?, ?, ?, ?, 'queued', ?, ?, ?, ?, ?)",
    )
    .bind(id.as_str())
    .bind(delivery.as_str())
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

/// Cancels the other open transfers of the same artifact to the same site. Returns them as they were.
async fn cancel_others(tx: &mut sqlx::SqliteConnection, wanted: &TransferRow) -> Result<Vec<TransferRow>, Fault> {
    let rows = sqlx::query("SELECT * FROM transfer WHERE reference = ? AND site = ? AND id != ? AND state NOT IN ('done', 'cancelled')")
        .bind(wanted.artifact.to_string())
        .bind(wanted.site.as_str())
        .bind(wanted.id.as_str())
        .fetch_all(&mut *tx)
        .await
        .map_err(fault)?;
    let others: Vec<TransferRow> = rows.iter().map(transfer).collect::<Result<_, _>>()?;
    let why = Fault::internal(format!("the hub asks for {} with transfer {}", wanted.artifact, wanted.id))
        .with_reason(Reason::CancelledByUser)
        .with_next(format!("see 'packhorse status {}'", wanted.id));
    for other in &others {
        let mut body = other.body.clone();
        body.set_fault(Some(&why));
        let (now, seq) = (clock::now_unix_ms() as i64, note(tx, "transfer", &other.id).await?);
        sqlx::query("UPDATE transfer SET state = 'cancelled', body = ?, updated_ms = ?, finished_ms = ?, cursor = ? WHERE id = ?")
            .bind(serde_json::to_string(&body).unwrap_or_default())
            .bind(now)
            .bind(now)
            .bind(seq)
            .bind(other.id.as_str())
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
    }
    Ok(others)
}

impl Catalogue {
    /// Begins a delivery: a transfer for each artifact and site, all in one transaction, so that no site ever hears of
    /// labels without the dataset that they wait for. A transfer that stands already is taken instead: one that runs as
    /// it is, one that is done stays done; a failed one begins again, and so does a done one that is named in `lost`, or that a run
    /// is giving back. What was given back does not stand.
    pub async fn deliver(
        &self,
        delivery: &DeliveryId,
        run: Option<&str>,
        parts: &[Part],
        lost: &[TransferId],
    ) -> Result<Vec<TransferId>, Fault> {
        let now = clock::now_unix_ms() as i64;
        let mut tx = self.write.begin_with("BEGIN IMMEDIATE").await.map_err(fault)?;
        sqlx::query("INSERT INTO delivery (id, run, created_ms) VALUES (?, ?, ?)")
            .bind(delivery.as_str())
            .bind(run)
            .bind(now)
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        let mut ids: Vec<TransferId> = Vec::new();
        for part in parts {
            for site in &part.sites {
                let id = begin(&mut tx, delivery, part, site, lost, now).await?;
                // One artifact named twice is one part.
                if ids.contains(&id) {
                    continue;
                }
                sqlx::query("INSERT INTO delivery_part (delivery, transfer) VALUES (?, ?)")
                    .bind(delivery.as_str())
                    .bind(id.as_str())
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

    /// Takes over a transfer that the hub asks for (at a site). Another open one of the same artifact would bar it: the hub, restored from
    /// a backup, knows nothing of that any more, and it is cancelled.
    pub async fn adopt(&self, wanted: &TransferRow) -> Result<Adopted, Fault> {
        let mut tx = self.write.begin_with("BEGIN IMMEDIATE").await.map_err(fault)?;
        let here =
            sqlx::query("SELECT * FROM transfer WHERE id = ?").bind(wanted.id.as_str()).fetch_optional(&mut *tx).await.map_err(fault)?;
        let mut row = match here {
            Some(row) => transfer(&row)?,
            None => {
                let superseded = cancel_others(&mut tx, wanted).await?;
                let seq = note(&mut tx, "transfer", &wanted.id).await?;
                sqlx::query(
                    "INSERT INTO transfer (id, delivery, reference, digest, site, want, generation, state, body, created_ms, updated_ms, cursor, after_ids)
                     VALUES (?, ?, ?, ?, ?, ?, ?, 'queued', ?, ?, ?, ?, ?)",
                )
                .bind(wanted.id.as_str())
                .bind(wanted.delivery.as_str())
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
                return Ok(Adopted { row: self.transfer(&wanted.id).await?, superseded });
            }
        };
        let mut superseded = Vec::new();
        let again = wanted.generation > row.generation && row.state.is_final();
        if again || row.want != wanted.want || row.generation != wanted.generation || row.after != wanted.after {
            (row.want, row.generation) = (wanted.want, wanted.generation);
            row.after.clone_from(&wanted.after);
            if again {
                superseded = cancel_others(&mut tx, wanted).await?;
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
                .bind(row.id.as_str())
                .execute(&mut *tx)
                .await
                .map_err(fault)?;
            tx.commit().await.map_err(fault)?;
            self.notify();
        }
        Ok(Adopted { row, superseded })
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

    /// Notes that a cancelled transfer was committed before its site learned of the cancel. Does nothing if the transfer began again
    /// since.
    pub async fn done_after_cancel(&self, id: &str, generation: i64, body: &Body) -> Result<(), Fault> {
        let mut tx = self.write.begin_with("BEGIN IMMEDIATE").await.map_err(fault)?;
        let now = clock::now_unix_ms() as i64;
        let seq = note(&mut tx, "transfer", id).await?;
        sqlx::query(
            "UPDATE transfer SET state = 'done', want = 'run', body = ?, updated_ms = ?, finished_ms = ?, cursor = ?
             WHERE id = ? AND generation = ? AND state = 'cancelled'",
        )
        .bind(serde_json::to_string(body).unwrap_or_default())
        .bind(now)
        .bind(now)
        .bind(seq)
        .bind(id)
        .bind(generation)
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
}

//! Changes of transfers. What changes is decided by [`model::transfer::step`]; here a row is read,
//! passed to it, and what it returns is stored, all in one database transaction.

use super::queries::{one, standing};
use super::{Adopted, Body, Part, TransferRow, Want, new_transfer_id, transfer};
use crate::{Catalogue, fault, note};
use base::clock;
use base::fault::Fault;
use base::names::{DeliveryId, SiteName, TransferId};
use model::transfer::{Action, Bytes, Event, State, step};
use serde::Serialize;

type Connection = sqlx::SqliteConnection;

fn json(value: &impl Serialize) -> Result<String, Fault> {
    serde_json::to_string(value).map_err(|e| Fault::internal(format!("a transfer as JSON: {e}")))
}

fn now_ms() -> i64 {
    clock::now_unix_ms() as i64
}

/// Stores a transfer as it is after a step. `shows`: whether users see a difference.
async fn store(tx: &mut Connection, row: &TransferRow, shows: bool) -> Result<(), Fault> {
    let cursor = if shows {
        note(&mut *tx, "transfer", &row.id).await?
    } else {
        row.cursor
    };
    let stored = sqlx::query(
        "UPDATE transfer SET want = ?, generation = ?, state = ?, body = ?, updated_ms = ?, finished_ms = ?, after_ids = ?, removed_ms = ?,
             cursor = ? WHERE id = ?",
    )
    .bind(row.want.as_str())
    .bind(row.generation)
    .bind(row.state.as_str())
    .bind(json(&row.body)?)
    .bind(row.updated_ms)
    .bind(row.finished_ms)
    .bind(json(&row.after)?)
    .bind(row.removed_ms)
    .bind(cursor)
    .bind(row.id.as_str())
    .execute(&mut *tx)
    .await;
    stored.map(drop).map_err(|e| match &e {
        sqlx::Error::Database(db) if db.is_unique_violation() => Fault::conflict(format!(
            "another transfer of {} to {} exists already, so {} cannot begin again",
            row.artifact, row.site, row.id
        ))
        .with_next("see 'packhorse status'"),
        _ => fault(e),
    })
}

/// Stores a transfer that is new here.
async fn insert(
    tx: &mut Connection,
    row: &TransferRow,
    needs: Option<String>,
) -> Result<(), Fault> {
    let cursor = note(&mut *tx, "transfer", &row.id).await?;
    sqlx::query(
        "INSERT INTO transfer (id, delivery, reference, digest, site, want, generation, state, body, created_ms, updated_ms, cursor,
             after_ids, needs)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(row.id.as_str())
    .bind(row.delivery.as_str())
    .bind(row.artifact.to_string())
    .bind(&row.digest.0[..])
    .bind(row.site.as_str())
    .bind(row.want.as_str())
    .bind(row.generation)
    .bind(row.state.as_str())
    .bind(json(&row.body)?)
    .bind(row.created_ms)
    .bind(row.updated_ms)
    .bind(cursor)
    .bind(json(&row.after)?)
    .bind(needs)
    .execute(&mut *tx)
    .await
    .map(drop)
    .map_err(fault)
}

/// Passes an event to the state machine, and stores the transfer if it changed. Returns it as it is
/// now.
async fn change(tx: &mut Connection, row: TransferRow, event: Event) -> Result<TransferRow, Fault> {
    let Some(next) = step(&row, event, now_ms())?.row else {
        return Ok(row);
    };
    let shows =
        (next.state, next.generation) != (row.state, row.generation) || next.body != row.body;
    store(tx, &next, shows).await?;
    Ok(next)
}

/// Finds the transfer of an artifact to a site that stands, or begins one.
async fn begin(
    tx: &mut Connection,
    delivery: &DeliveryId,
    part: &Part,
    site: &SiteName,
    lost: &[TransferId],
) -> Result<TransferId, Fault> {
    let now = now_ms();
    if let Some(row) = standing(&mut *tx, &part.artifact, site).await? {
        let lost = row.state == State::Done
            && (lost.contains(&row.id) || Catalogue::may_be_going(&mut *tx, &row.id, now).await?);
        return Ok(change(tx, row, Event::Delivered { lost }).await?.id);
    }
    let row = TransferRow {
        id: new_transfer_id(),
        delivery: delivery.clone(),
        artifact: part.artifact.clone(),
        digest: part.digest,
        site: site.clone(),
        want: Want::Run,
        generation: 0,
        state: State::Queued,
        body: Body {
            bytes: Bytes {
                total: part.total,
                ..Bytes::default()
            },
            ..Body::default()
        },
        created_ms: now,
        updated_ms: now,
        finished_ms: None,
        cursor: 0,
        after: Vec::new(),
        removed_ms: None,
    };
    insert(tx, &row, part.needs.as_ref().map(ToString::to_string)).await?;
    Ok(row.id)
}

/// Cancels the other open transfers of the same artifact to the same site. Returns them as they
/// were.
async fn cancel_others(
    tx: &mut Connection,
    wanted: &TransferRow,
) -> Result<Vec<TransferRow>, Fault> {
    let rows = sqlx::query("SELECT * FROM transfer WHERE reference = ? AND site = ? AND id != ? AND state NOT IN ('done', 'cancelled')")
        .bind(wanted.artifact.to_string())
        .bind(wanted.site.as_str())
        .bind(wanted.id.as_str())
        .fetch_all(&mut *tx)
        .await
        .map_err(fault)?;
    let others: Vec<TransferRow> = rows.iter().map(transfer).collect::<Result<_, _>>()?;
    for other in &others {
        change(
            &mut *tx,
            other.clone(),
            Event::Superseded {
                by: wanted.id.clone(),
            },
        )
        .await?;
    }
    Ok(others)
}

impl Catalogue {
    /// Begins a delivery: a transfer for each artifact and site, all in one transaction, so that no
    /// site ever hears of labels without the dataset that they wait for. An open transfer is taken
    /// instead as it is, one that is done stays done; a failed one begins again, and so does a done
    /// one that is named in `lost`, or whose artifact is being removed after a run.
    pub async fn deliver(
        &self,
        delivery: &DeliveryId,
        run: Option<&str>,
        parts: &[Part],
        lost: &[TransferId],
    ) -> Result<Vec<TransferId>, Fault> {
        let mut tx = self
            .write
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(fault)?;
        sqlx::query("INSERT INTO delivery (id, run, created_ms) VALUES (?, ?, ?)")
            .bind(delivery.as_str())
            .bind(run)
            .bind(now_ms())
            .execute(&mut *tx)
            .await
            .map_err(fault)?;
        let mut ids: Vec<TransferId> = Vec::new();
        for part in parts {
            for site in &part.sites {
                let id = begin(&mut tx, delivery, part, site, lost).await?;
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

    /// Takes over a transfer that the hub asks for (at a site). Another open one of the same
    /// artifact would bar it: the hub, restored from a backup, knows nothing of that any more, and
    /// it is cancelled.
    pub async fn adopt(&self, wanted: &TransferRow) -> Result<Adopted, Fault> {
        let mut tx = self
            .write
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(fault)?;
        let here = sqlx::query("SELECT * FROM transfer WHERE id = ?")
            .bind(wanted.id.as_str())
            .fetch_optional(&mut *tx)
            .await
            .map_err(fault)?;
        let (row, superseded) = match here {
            None => {
                let superseded = cancel_others(&mut tx, wanted).await?;
                let body = Body {
                    bytes: wanted.body.bytes,
                    ..Body::default()
                };
                let row = TransferRow {
                    state: State::Queued,
                    body,
                    updated_ms: now_ms(),
                    ..wanted.clone()
                };
                insert(&mut tx, &row, None).await?;
                (row, superseded)
            }
            Some(row) => {
                let row = transfer(&row)?;
                let begins_again = row.state.is_final() && wanted.generation > row.generation;
                let superseded = if begins_again {
                    cancel_others(&mut tx, wanted).await?
                } else {
                    Vec::new()
                };
                let event = Event::Wanted {
                    want: wanted.want,
                    generation: wanted.generation,
                    after: wanted.after.clone(),
                };
                let now = change(&mut tx, row.clone(), event).await?;
                if now == row {
                    return Ok(Adopted { row, superseded });
                }
                (now, superseded)
            }
        };
        tx.commit().await.map_err(fault)?;
        self.notify();
        Ok(Adopted { row, superseded })
    }

    /// Does what a user asks of a transfer, at the hub. It shows at once; the site follows when it
    /// hears of it.
    pub async fn act(&self, id: &str, action: Action) -> Result<TransferRow, Fault> {
        self.change_transfer(id, Event::Asked(action)).await?;
        self.transfer(id).await
    }

    /// Notes what a site reports, at the hub. Who reports, and a receipt, were checked before.
    pub async fn report(
        &self,
        id: &str,
        generation: i64,
        state: State,
        body: Body,
    ) -> Result<(), Fault> {
        self.change_transfer(
            id,
            Event::Reported {
                generation,
                state,
                body,
            },
        )
        .await
        .map(drop)
    }

    /// Notes how far a transfer's own task is, at the site. What has ended stays so, unless a newer
    /// generation asked for it again.
    pub async fn update_transfer(
        &self,
        id: &str,
        generation: i64,
        state: State,
        body: &Body,
    ) -> Result<(), Fault> {
        self.change_transfer(
            id,
            Event::Moved {
                generation,
                state,
                body: body.clone(),
            },
        )
        .await
        .map(drop)
    }

    /// Notes that the hub does not list a transfer any more, at the site: it is to be cancelled.
    /// Returns it as it is now.
    pub async fn unlist(&self, row: &TransferRow) -> Result<TransferRow, Fault> {
        let event = Event::Wanted {
            want: Want::Cancel,
            generation: row.generation,
            after: row.after.clone(),
        };
        self.change_transfer(&row.id, event).await
    }

    /// Notes that the task of a transfer that was to pause or to be cancelled has ended, at the
    /// site. Returns the transfer as it is now.
    pub async fn end_transfer(
        &self,
        id: &str,
        generation: i64,
        want: Want,
    ) -> Result<TransferRow, Fault> {
        self.change_transfer(id, Event::Ended { generation, want })
            .await
    }

    async fn change_transfer(&self, id: &str, event: Event) -> Result<TransferRow, Fault> {
        let mut tx = self
            .write
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(fault)?;
        let row = one(&mut *tx, id).await?;
        let now = change(&mut tx, row.clone(), event).await?;
        if now != row {
            tx.commit().await.map_err(fault)?;
            self.notify();
        }
        Ok(now)
    }
}

//! Changes of transfers. [`model::transfer::step`] decides what changes. This module reads a row,
//! passes it to `step`, and stores the result, all in one transaction of the engine.

use base::clock;
use base::fault::{Code, Fault};
use base::names::{DeliveryId, SiteName, TransferId};
use model::transfer::{Action, Bytes, Event, State, step};

use super::{Adopted, Body, Difference, Part, TransferChanges, TransferRow, Want, no_transfer};
use crate::Catalogue;

type Changes = Box<dyn TransferChanges>;

/// Passes an event to the state machine, and stores the transfer if it changed. Returns the current
/// row.
async fn change(
    changes: &mut Changes,
    row: TransferRow,
    event: Event,
) -> Result<TransferRow, Fault> {
    let Some(next) = step(&row, event, clock::now_ms())?.row else {
        return Ok(row);
    };
    let work = |row: &TransferRow| {
        let after = row.after.clone();
        (row.state, row.want, row.generation, after, row.removed_ms)
    };
    let moved = (next.state, next.generation) != (row.state, row.generation);
    let difference = Difference {
        shows: moved || next.body != row.body || next.removed_ms != row.removed_ms,
        work: work(&next) != work(&row),
    };
    changes.store(&next, difference).await?;
    Ok(next)
}

/// Finds the current transfer of an artifact to a site, or begins one.
async fn begin(
    changes: &mut Changes,
    ids: &mut Ids,
    delivery: &DeliveryId,
    part: &Part,
    site: &SiteName,
    lost: &[TransferId],
) -> Result<TransferId, Fault> {
    let now = ids.now_ms as i64;
    if let Some(row) = changes.current(&part.artifact, site).await? {
        let lost = row.state == State::Done
            && (lost.contains(&row.id) || changes.may_be_removing(&row.id, now).await?);
        return Ok(change(changes, row, Event::Delivered { lost }).await?.id);
    }
    let row = TransferRow {
        id: ids.next(),
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
    changes.insert(&row, part.needs.as_ref()).await?;
    Ok(row.id)
}

/// The ids of the transfers that one delivery begins. They rise, because transfers are listed and
/// delivered in the order of their time and, at the same time, of their ids: the parts of a
/// delivery keep the order in which they were named. A site activates the version of the greatest
/// id, so that ids also rise when the clock was put back.
struct Ids {
    now_ms: u64,
    id_ms: u64,
    random: u32,
}

impl Ids {
    /// Ids of this time, or later if `greatest` is an id of a later time.
    fn after(greatest: Option<&TransferId>, now_ms: u64, random: u32) -> Self {
        let behind = greatest.and_then(TransferId::made_ms);
        let id_ms = behind.map_or(now_ms, |last| now_ms.max(last.saturating_add(1)));
        Self {
            now_ms,
            id_ms,
            random,
        }
    }

    fn next(&mut self) -> TransferId {
        let id = TransferId::made(self.id_ms, self.random);
        // A step of random length, so that no id can be guessed from another.
        let step = u32::from(rand::random::<u16>()) + 1;
        let (random, carries) = self.random.overflowing_add(step);
        self.random = random;
        self.id_ms += u64::from(carries);
        id
    }
}

/// Cancels the other open transfers of the same artifact to the same site. Returns the rows before
/// the change.
async fn cancel_rivals(
    changes: &mut Changes,
    wanted: &TransferRow,
) -> Result<Vec<TransferRow>, Fault> {
    let rivals = changes.rivals(wanted).await?;
    for other in &rivals {
        change(
            changes,
            other.clone(),
            Event::Superseded {
                by: wanted.id.clone(),
            },
        )
        .await?;
    }
    Ok(rivals)
}

impl Catalogue {
    /// Begins a delivery: a transfer for each artifact and site, all in one transaction, so that no
    /// site receives labels without the dataset that they need. An open or done transfer becomes
    /// part of the delivery unchanged. A failed transfer restarts, and so does a done transfer that
    /// is in `lost` or whose artifact is being removed after a run.
    pub async fn deliver(
        &self,
        delivery: &DeliveryId,
        run: Option<&str>,
        parts: &[Part],
        lost: &[TransferId],
    ) -> Result<Vec<TransferId>, Fault> {
        let mut changes = self.change_transfers().await?;
        changes.add_delivery(delivery, run, clock::now_ms()).await?;
        let greatest = changes.greatest_id().await?;
        let mut new_ids = Ids::after(greatest.as_ref(), clock::now_unix_ms(), rand::random());
        let mut ids: Vec<TransferId> = Vec::new();
        for part in parts {
            for site in &part.sites {
                let id = begin(&mut changes, &mut new_ids, delivery, part, site, lost).await?;
                // An artifact that is named twice is one part.
                if !ids.contains(&id) {
                    changes.add_part(delivery, &id, site).await?;
                    ids.push(id);
                }
            }
        }
        changes.commit().await?;
        Ok(ids)
    }

    /// Stores a transfer that the hub requests, at the site. Another open transfer of the same
    /// artifact is cancelled: a hub that was restored from a backup does not know it any more.
    pub async fn adopt(&self, wanted: &TransferRow) -> Result<Adopted, Fault> {
        let mut changes = self.change_transfers().await?;
        let (row, superseded) = match changes.transfer(&wanted.id).await? {
            None => {
                let superseded = cancel_rivals(&mut changes, wanted).await?;
                let body = Body {
                    bytes: wanted.body.bytes,
                    ..Body::default()
                };
                let row = TransferRow {
                    state: State::Queued,
                    body,
                    updated_ms: clock::now_ms(),
                    ..wanted.clone()
                };
                changes.insert(&row, None).await?;
                (row, superseded)
            }
            Some(row) => {
                let begins_again = row.state.is_final() && wanted.generation > row.generation;
                let superseded = if begins_again {
                    cancel_rivals(&mut changes, wanted).await?
                } else {
                    Vec::new()
                };
                let event = Event::Wanted {
                    want: wanted.want,
                    generation: wanted.generation,
                    after: wanted.after.clone(),
                };
                let now = change(&mut changes, row.clone(), event).await?;
                if now == row {
                    return Ok(Adopted { row, superseded });
                }
                (now, superseded)
            }
        };
        changes.commit().await?;
        Ok(Adopted { row, superseded })
    }

    /// Stores an action that a user requested, at the hub. The change is visible immediately; the
    /// site follows when it receives the new list.
    pub async fn act(&self, id: &str, action: Action) -> Result<TransferRow, Fault> {
        self.change_transfer(id, Event::Asked(action)).await?;
        self.transfer(id).await
    }

    /// Stores what a site reports, at the hub. The sender, and a receipt, were checked before.
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

    /// Stores the progress of a transfer's own task, at the site. A transfer that has ended stays
    /// ended, unless a newer generation restarted it.
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

    /// Stores that the hub does not list a transfer any more, at the site, so that it is cancelled.
    /// Returns the current row.
    pub async fn unlist(&self, row: &TransferRow) -> Result<TransferRow, Fault> {
        let event = Event::Wanted {
            want: Want::Cancel,
            generation: row.generation,
            after: row.after.clone(),
        };
        self.change_transfer(&row.id, event).await
    }

    /// Stores that the task of a transfer has ended after a request to pause or cancel, at the
    /// site. Returns the current row.
    pub async fn end_transfer(
        &self,
        id: &str,
        generation: i64,
        want: Want,
    ) -> Result<TransferRow, Fault> {
        self.change_transfer(id, Event::Ended { generation, want })
            .await
    }

    /// Stores that the site removed the content of a transfer, unless the transfer restarted in the
    /// meantime. A transfer that does not exist any more needs no mark.
    pub async fn set_removed(&self, id: &str, removed_ms: i64) -> Result<(), Fault> {
        let event = Event::Removed { at_ms: removed_ms };
        match self.change_transfer(id, event).await {
            Err(fault) if fault.code != Code::NotFound => Err(fault),
            _ => Ok(()),
        }
    }

    async fn change_transfer(&self, id: &str, event: Event) -> Result<TransferRow, Fault> {
        let mut changes = self.change_transfers().await?;
        let row = changes.transfer(id).await?.ok_or_else(|| no_transfer(id))?;
        let now = change(&mut changes, row.clone(), event).await?;
        if now != row {
            changes.commit().await?;
        }
        Ok(now)
    }
}

#[cfg(test)]
mod tests {
    use super::Ids;

    #[test]
    fn the_ids_of_one_delivery_rise() {
        // The random part overflows, too.
        for random in [0, u32::MAX - 5, u32::MAX] {
            let mut ids = Ids::after(None, 7, random);
            let all: Vec<_> = (0..10_000).map(|_| ids.next()).collect();
            assert!(all.is_sorted_by(|a, b| a < b));
        }
    }
}

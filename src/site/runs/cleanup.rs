//! Removes the inputs that a run borrowed, unless another run or delivery needs them or they are
//! being delivered again.
//!
//! Each borrowed input is removed separately. A removal that failed is repeated at the next check.

use super::{OPEN_MAX, RunKeeper, Try};
use crate::api::types::State;
use base::blocking::blocking;
use base::clock;
use base::fault::{Code, Fault};
use base::names::{RunName, TransferId};
use exchange::transfer::beside;
use model::run::Borrowed;
use model::run::site::{Event, Run, may_go};
use sink::{Incoming, Sink};
use state::{ArtifactRow, TransferRow};

/// The result of a removal.
enum Back {
    /// It is being delivered, or was requested again.
    NotNow,
    /// It is not here.
    Gone,
    /// It was removed from the catalogue, but only a person can remove its content, for this
    /// reason.
    Stays(String),
}

impl RunKeeper {
    /// Removes each input that a run borrowed, and records the result.
    pub(super) async fn remove_all_borrowed(
        &self,
        name: &RunName,
        list: Vec<Borrowed>,
    ) -> Result<(), Fault> {
        if self.is_too_soon(name, Try::GoOn) {
            return Ok(());
        }
        let mut again = false;
        for borrowed in list {
            let artifact = borrowed.artifact.clone();
            // An input that cannot be removed must not prevent the removal of the others.
            let event = match self.remove_borrowed(name, &borrowed).await {
                Ok(Back::NotNow) => continue,
                Ok(Back::Gone) => Event::Removed {
                    transfer: borrowed.transfer,
                    stays: None,
                },
                Ok(Back::Stays(why)) => {
                    let stays = Some(format!(
                        "{artifact} stays, and only a person can remove it: {why}"
                    ));
                    Event::Removed {
                        transfer: borrowed.transfer,
                        stays,
                    }
                }
                Err(fault) => {
                    tracing::warn!(%artifact, error = %fault, "a borrowed artifact could not be removed; retrying");
                    again = true;
                    let why = format!(
                        "{artifact} could not be removed; the site tries again: {}",
                        fault.message
                    );
                    Event::NotRemoved {
                        transfer: borrowed.transfer,
                        why,
                    }
                }
            };
            self.take(name, event).await?;
        }
        if again {
            self.put_off(name, Try::GoOn);
        }
        Ok(())
    }

    /// Removes a borrowed input.
    async fn remove_borrowed(&self, run: &RunName, borrowed: &Borrowed) -> Result<Back, Fault> {
        let (opened, artifact) = (&self.opened, &borrowed.artifact);
        let row = match opened.catalogue.transfer(&borrowed.transfer).await {
            Ok(row) => row,
            Err(fault) if fault.code == Code::NotFound => return Ok(Back::Gone),
            Err(fault) => return Err(fault),
        };
        // A transfer that is running, or being cancelled, is skipped for now: waiting for it would
        // delay the others.
        if !has_ended(&row) {
            return Ok(Back::NotNow);
        }
        // It may start again at any moment. Then it either completes after this, or this finds the
        // new content.
        let _alone = opened.runner.alone_with(artifact).await;
        let row = opened.catalogue.transfer(&row.id).await?;
        if !has_ended(&row)
            || borrowed
                .generation
                .is_some_and(|meant| meant != row.generation)
        {
            // The next check decides whether it must be removed.
            return Ok(Back::NotNow);
        }
        if row.removed_ms.is_some() {
            return Ok(Back::Gone);
        }
        let there = match opened.catalogue.artifact(artifact).await {
            Ok(there) => Some(there),
            Err(fault) if fault.code == Code::NotFound => None,
            Err(fault) => return Err(fault),
        };
        // Content that was published here since, or that another transfer delivered, does not
        // belong to this transfer. A cancelled transfer owns the content only if it had delivered
        // it before it was started again. Another transfer that had delivered it counts, even if it
        // was cancelled since.
        let others = opened.catalogue.transfers_of_artifact(artifact).await?;
        let stands = |other: &TransferRow| {
            other.removed_ms.is_none()
                && (other.has_landed() || !matches!(other.state, State::Failed | State::Cancelled))
        };
        let others = others
            .iter()
            .any(|other| other.id != row.id && stands(other));
        let ours = match &there {
            Some(there) => !there.published && row.has_landed(),
            None => row.state == State::Done,
        };
        let mut stays = None;
        if ours && !others {
            {
                // From here on a new run does not find the input. A run that has found it is listed
                // in the catalogue.
                let _turn = self.state.turn.lock().await;
                if !may_go(
                    &opened.catalogue.all_open_runs::<Run>(OPEN_MAX).await?,
                    run,
                    borrowed,
                ) {
                    return Ok(Back::NotNow);
                }
                if there.is_some() && !opened.catalogue.leave(artifact).await? {
                    return Ok(Back::NotNow);
                }
            }
            let sink = opened.sinks.of(artifact.kind);
            stays = match there
                .as_ref()
                .map(|there| strangers(self, sink.as_ref(), there))
            {
                Some(found) => found.await?,
                None => None,
            };
            if stays.is_none() {
                stays = sink
                    .remove(artifact, there.as_ref().map(|there| &there.root.info))
                    .await?;
            }
            let (places, digest) = (opened.shared.chunk_index.clone(), row.digest);
            blocking(move || places.remove_digest(digest)).await?;
            // Other versions may share its files.
            opened.runner.record_series(artifact).await?;
            // It may be published here at this moment.
            opened.catalogue.remove_left(artifact).await?;
            tracing::info!(%artifact, transfer = %row.id, stays = stays.as_deref().unwrap_or_default(), "a borrowed artifact was removed");
        }
        // If the transfer started again in the meantime, it waits to deliver everything again: it
        // must not be marked as removed.
        if !has_ended(&opened.catalogue.transfer(&row.id).await?) {
            return Ok(Back::NotNow);
        }
        opened
            .catalogue
            .set_removed(&row.id, clock::now_ms())
            .await?;
        Ok(stays.map_or(Back::Gone, Back::Stays))
    }
}

/// Whether a transfer is neither running nor being cancelled.
fn has_ended(row: &TransferRow) -> bool {
    matches!(row.state, State::Done | State::Cancelled)
}

/// The files that users have added to the folder of an artifact, because of which it is not
/// removed.
async fn strangers(
    keeper: &RunKeeper,
    sink: &dyn Sink,
    there: &ArtifactRow,
) -> Result<Option<String>, Fault> {
    let (Some(place), true) = (&there.place, there.artifact.kind.is_files()) else {
        return Ok(None);
    };
    let incoming = Incoming {
        artifact: there.artifact.clone(),
        digest: there.digest,
        root: there.root.clone(),
        transfer: TransferId::none(),
        waits: Default::default(),
    };
    beside(
        sink,
        keeper.opened.shared.store.clone(),
        &incoming,
        place,
        false,
    )
    .await
}

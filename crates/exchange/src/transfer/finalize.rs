//! The end of a transfer: records the commit, signs the receipt, and checks the committed copy when
//! it is wanted again.
//!
//! `attempt` finalizes what a sink has committed or held before. The row gets the state `done`
//! last, with the receipt in it: after a crash before that, the transfer is finalized again.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;

use super::verify::{VerifyReport, look, verify};
use super::{Counters, Runner, incoming, unless};
use crate::chunk_index::LocationInfo;
use base::blocking::blocking;
use base::fault::{Code, Fault, IoContext};
use base::limits::{CANCEL_LOOK_MAX, PRESENCE_CHECK_MAX};
use base::names::{ArtifactRef, TransferId};
use content::manifest::Digest;
use model::protocol::{Presence, PresenceState};
use model::receipt::Receipt;
use model::transfer::State;
use sink::{Committed, Incoming, Sink, Verification};
use state::TransferRow;

impl Runner {
    /// Waits until no other task commits, checks or removes this artifact.
    pub async fn alone_with(&self, artifact: &ArtifactRef) -> OwnedMutexGuard<()> {
        self.inner.alone.lock(artifact).await
    }

    /// Verifies a copy that was committed before. Intact content counts as delivered; other content
    /// is fetched again.
    pub(super) async fn still_here(&self, row: &TransferRow) -> Result<Option<Committed>, Fault> {
        let inner = &self.inner;
        let _alone = self.alone_with(&row.artifact).await;
        let there = match inner.catalogue.artifact(&row.artifact).await {
            Ok(there) if there.digest == row.digest && !there.published => there,
            Err(fault) if fault.code != Code::NotFound => return Err(fault),
            _ => return Ok(None),
        };
        let sink = inner.sinks.of(row.artifact.kind);
        let Some(place) = &there.place else {
            return Ok(None);
        };
        // If something of it is staged, it was verified before.
        if self.is_staged(&row.id, sink).await? {
            return Ok(None);
        }
        let incoming = incoming(row, &there.root);
        let VerifyReport {
            faults,
            notes,
            unread,
        } = match verify(
            sink.as_ref(),
            inner.shared.store.clone(),
            &incoming,
            place,
            &Verification::default(),
        )
        .await
        {
            // A damaged page of the manifest is fetched again as well.
            Err(fault) if fault.code == Code::Integrity => VerifyReport {
                faults: vec![fault.to_string()],
                ..VerifyReport::default()
            },
            other => other?,
        };
        let Some(first) = faults.first() else {
            let note = notes.into_iter().next().or(unread);
            if row.artifact.kind.is_files() {
                // An earlier attempt may have ended before the version became the active one.
                let landed = sink
                    .commit(&incoming, &row.id.in_dir(sink.staging_root()))
                    .await?;
                return Ok(Some(Committed {
                    note: landed.note.or(note),
                    ..landed
                }));
            }
            return Ok(Some(Committed {
                place: place.clone(),
                location: there.location.clone().unwrap_or_default(),
                note,
            }));
        };
        tracing::warn!(
            faults = faults.len(),
            first,
            "the committed copy is incomplete or damaged; it is delivered again"
        );
        sink.clear(&incoming).await?;
        Ok(None)
    }

    /// Whether it is recorded that a transfer has staged content.
    async fn has_staged(&self, id: &TransferId) -> Result<bool, Fault> {
        let (index, id) = (self.inner.shared.chunk_index.clone(), id.clone());
        blocking(move || Ok(index.staged_by(&id).is_some())).await
    }

    /// Whether a transfer has staged content: recorded, and present. A commit that reached its
    /// rename leaves no staged content.
    async fn is_staged(&self, id: &TransferId, sink: &Arc<dyn Sink>) -> Result<bool, Fault> {
        if !self.has_staged(id).await? {
            return Ok(false);
        }
        let staged = id.in_dir(sink.staging_root());
        sink.threads()
            .run(move || staged.try_exists().at_sink(staged.display()))
            .await
    }

    /// Uses an intact copy that another site committed to the same folder, or that this site
    /// committed before it lost its state. The check can be stopped; the commit is awaited, as
    /// every commit is.
    pub(super) async fn adopted(
        &self,
        incoming: &Incoming,
        stop: &CancellationToken,
    ) -> Result<Option<Committed>, Fault> {
        let inner = &self.inner;
        let sink = inner.sinks.of(incoming.artifact.kind);
        let Some(place) = sink.place_of(&incoming.artifact) else {
            return Ok(None);
        };
        let look = async {
            let alone = self.alone_with(&incoming.artifact).await;
            // Staged content is better than the copy in the folder.
            if self.is_staged(&incoming.transfer, sink).await?
                || !sink.exists_at_target(incoming).await?
            {
                return Ok(None);
            }
            let faults = verify(
                sink.as_ref(),
                inner.shared.store.clone(),
                incoming,
                &place,
                &Verification::default(),
            )
            .await?
            .faults;
            if let Some(first) = faults.first() {
                tracing::warn!(
                    faults = faults.len(),
                    first,
                    "the copy in the folder is incomplete or damaged"
                );
                return Ok(None);
            }
            Ok(Some(alone))
        };
        let Some(_alone) = unless(stop, look).await? else {
            return Ok(None);
        };
        sink.commit(incoming, &incoming.transfer.in_dir(sink.staging_root()))
            .await
            .map(Some)
    }

    /// Whether the site still holds an artifact, by a quick check.
    pub async fn holds(&self, artifact: &ArtifactRef, digest: Digest) -> Result<bool, Fault> {
        let there = match self.inner.catalogue.artifact(artifact).await {
            Ok(there) if there.digest == digest && there.place.is_some() => there,
            Err(fault) if fault.code != Code::NotFound => return Err(fault),
            _ => return Ok(false),
        };
        let incoming = Incoming {
            artifact: artifact.clone(),
            digest,
            root: there.root,
            transfer: TransferId::none(),
            waits: Default::default(),
        };
        if there.published {
            Ok(true)
        } else {
            self.inner
                .sinks
                .of(artifact.kind)
                .exists_at_target(&incoming)
                .await
        }
    }

    /// The condition of an artifact at this site, by a check that ends in time. Of the content it
    /// reads only files that somebody touched.
    pub async fn presence(
        &self,
        artifact: &ArtifactRef,
        digest: Digest,
    ) -> Result<Presence, Fault> {
        let plain = |state, detail: Option<String>| Presence {
            state,
            detail: detail.map(Into::into),
            active: None,
        };
        let there = match self.inner.catalogue.artifact(artifact).await {
            Ok(there) if there.digest == digest => there,
            Err(fault) if fault.code != Code::NotFound => return Err(fault),
            _ => return Ok(plain(PresenceState::Missing, None)),
        };
        let Some(place) = there.place else {
            return Ok(plain(PresenceState::Missing, None));
        };
        if there.published {
            return Ok(plain(PresenceState::Intact, None));
        }
        let sink = self.inner.sinks.of(artifact.kind).clone();
        let until = std::time::Instant::now() + PRESENCE_CHECK_MAX / 2;
        let look = async {
            let incoming = Incoming {
                artifact: artifact.clone(),
                digest,
                root: there.root,
                transfer: TransferId::none(),
                waits: Default::default(),
            };
            if !sink.exists_at_target(&incoming).await? {
                return Ok(plain(PresenceState::Missing, None));
            }
            let wrong = if artifact.kind.is_files() {
                let (store, index) = (&self.inner.shared.store, &self.inner.shared.chunk_index);
                let (store, index) = (store.clone(), index.clone());
                look(sink.clone(), store, index, incoming, place, until).await?
            } else {
                // Names and sizes in the registry or the database.
                let quick = Verification::new(true, |_| {});
                let verified = sink.verify(&incoming, &place, &quick);
                match tokio::time::timeout_at(until.into(), verified).await {
                    Ok(found) => found?.into_iter().next(),
                    Err(_) => None,
                }
            };
            if wrong.is_some() {
                return Ok(plain(PresenceState::Damaged, wrong));
            }
            sink.restore_switch(artifact).await?;
            Ok::<_, Fault>(Presence {
                state: PresenceState::Intact,
                detail: None,
                active: sink.active(artifact).await?.map(Into::into),
            })
        };
        Ok(match tokio::time::timeout(PRESENCE_CHECK_MAX, look).await {
            Ok(Ok(presence)) => presence,
            // Other content has replaced it: the transfer reports what to do.
            Ok(Err(fault)) if fault.code == Code::Conflict => {
                plain(PresenceState::Damaged, Some(fault.message))
            }
            Ok(Err(fault)) => plain(PresenceState::Unavailable, Some(fault.message)),
            Err(_) => {
                let silent = format!(
                    "{} has not answered for {} s",
                    sink.staging_root().display(),
                    PRESENCE_CHECK_MAX.as_secs()
                );
                plain(
                    PresenceState::Unavailable,
                    Some(sink.wait_reason().map_or(silent, |fault| fault.message)),
                )
            }
        })
    }

    /// Everything is durable and visible: records the location, signs the receipt, and reports.
    pub(super) async fn land(
        &self,
        row: &mut TransferRow,
        counters: &Counters,
        incoming: &Incoming,
        landed: Committed,
    ) -> Result<(), Fault> {
        let inner = &self.inner;
        let (places, id, digest) = (inner.shared.chunk_index.clone(), row.id.clone(), row.digest);
        let place = landed.place.clone();
        let was_staged = blocking(move || {
            let staged = places.staged_by(&id);
            if let Some(number) = staged {
                places.put(
                    Some(number),
                    LocationInfo {
                        place,
                        digest,
                        transfer: None,
                        foreign: false,
                        adopting: false,
                    },
                )?;
            }
            Ok(staged.is_some())
        })
        .await?;
        if !was_staged {
            self.record_landed(incoming, &landed.place).await?;
        }
        inner
            .catalogue
            .add_artifact(&row.artifact, &incoming.root, None)
            .await?;
        inner
            .catalogue
            .set_place(&row.artifact, Some(&landed.place), Some(&landed.location))
            .await?;
        counters
            .committed
            .store(row.body.bytes.total, Ordering::Relaxed);
        self.note_bytes(row, counters);
        row.body.location = Some(landed.location.into());
        row.body.note = landed.note.map(Into::into);
        let identity = inner.identity.borrow().clone();
        row.body.receipt = Some(Receipt::sign(
            row,
            base::clock::now_ms(),
            identity.cert_der(),
            |statement| identity.sign(statement),
        )?);
        self.enter(row, State::Done, None).await;
        tracing::info!("a transfer is done");
        Ok(())
    }

    /// Whether the artifact of a transfer that was cancelled during a `retry` is still here as
    /// before. If so, the transfer is `done`.
    pub(super) async fn undone_by_cancel(&self, row: &mut TransferRow) -> Result<bool, Fault> {
        let inner = &self.inner;
        if !row.body.landed || row.removed_ms.is_some() {
            return Ok(false);
        }
        // A sink that does not answer must not delay a cancellation. An artifact that it cannot
        // check now is as before: nobody removed it, and it may be in use. If something of it is
        // staged, an earlier check found it damaged.
        match tokio::time::timeout(CANCEL_LOOK_MAX, self.holds(&row.artifact, row.digest)).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return Ok(false),
            _ if self.has_staged(&row.id).await? => return Ok(false),
            unknown => {
                tracing::warn!(
                    ?unknown,
                    "a sink does not report whether it still holds this artifact"
                );
            }
        }
        let there = inner.catalogue.artifact(&row.artifact).await?;
        row.body.bytes.committed = row.body.bytes.total;
        row.body.set_fault(None);
        row.body.location = there.location.map(Into::into);
        let identity = inner.identity.borrow().clone();
        row.body.receipt = Some(Receipt::sign(
            row,
            base::clock::now_ms(),
            identity.cert_der(),
            |statement| identity.sign(statement),
        )?);
        row.state = State::Done;
        self.write(row).await?;
        tracing::info!(
            "a transfer was cancelled while it was done again; the artifact is still here"
        );
        Ok(true)
    }
}

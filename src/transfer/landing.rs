//! The end of a transfer: what is committed is noted, signed for, and looked at again when it is wanted a second time.
//!
//! `attempt` lands what a sink has committed, or what was here all along. The row says `done` last, with the receipt in
//! it: a crash before that and the transfer lands again.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::OwnedMutexGuard;

use super::verify::{Found, verify};
use super::{Counters, Runner, incoming};
use crate::api::types::State;
use crate::catalogue::TransferRow;
use crate::fault::{Code, Fault};
use crate::fetch::blocking;
use crate::limits::CANCEL_LOOK_MAX;
use crate::manifest::Digest;
use crate::names::{ArtifactRef, TransferId};
use crate::places::PlaceInfo;
use crate::receipt::Receipt;
use crate::sink::{Incoming, Landed, Look};

impl Runner {
    /// Waits until nobody else lands, looks at, or takes away this artifact.
    pub async fn alone_with(&self, artifact: &ArtifactRef) -> OwnedMutexGuard<()> {
        let lock = {
            let mut all = self.inner.alone.lock();
            all.retain(|_, lock| Arc::strong_count(lock) > 1);
            all.entry(artifact.clone()).or_default().clone()
        };
        lock.lock_owned().await
    }

    /// Looks closely at what was committed before, if it was. What is sound counts as landed; what is not is brought again.
    pub(super) async fn still_here(&self, row: &TransferRow) -> Result<Option<Landed>, Fault> {
        let inner = &self.inner;
        let _alone = self.alone_with(&row.artifact).await;
        let there = match inner.catalogue.artifact(&row.artifact).await {
            Ok(there) if there.digest == row.digest && !there.published => there,
            Err(fault) if fault.code != Code::NotFound => return Err(fault),
            _ => return Ok(None),
        };
        // Once something of it is staged, it was looked at.
        let (Some(place), None) = (&there.place, inner.shared.places.staged_by(&row.id)) else { return Ok(None) };
        let sink = inner.sinks.of(row.artifact.kind);
        let incoming = incoming(row, &there.root);
        let Found { faults, notes } = match verify(sink.as_ref(), inner.shared.store.clone(), &incoming, place, &Look::default()).await {
            // A page of the manifest is damaged: it is brought again as well.
            Err(fault) if fault.code == Code::Integrity => Found { faults: vec![fault.to_string()], notes: Vec::new() },
            other => other?,
        };
        let Some(first) = faults.first() else {
            let note = notes.into_iter().next();
            return Ok(Some(Landed { place: place.clone(), location: there.location.clone().unwrap_or_default(), note }));
        };
        tracing::warn!(transfer = %row.id, artifact = %row.artifact, faults = faults.len(), first, "what was here is brought again");
        sink.clear(&incoming).await?;
        Ok(None)
    }

    /// Whether an artifact is here still, by a quick look.
    pub async fn holds(&self, artifact: &ArtifactRef, digest: Digest) -> Result<bool, Fault> {
        let there = match self.inner.catalogue.artifact(artifact).await {
            Ok(there) if there.digest == digest && there.place.is_some() => there,
            Err(fault) if fault.code != Code::NotFound => return Err(fault),
            _ => return Ok(false),
        };
        let incoming =
            Incoming { artifact: artifact.clone(), digest, root: there.root, transfer: TransferId::none(), waits: Default::default() };
        if there.published { Ok(true) } else { self.inner.sinks.of(artifact.kind).stands(&incoming).await }
    }

    /// Everything is durable and visible: note where, sign, and say so.
    pub(super) async fn land(&self, row: &mut TransferRow, counters: &Counters, incoming: &Incoming, landed: Landed) -> Result<(), Fault> {
        let inner = &self.inner;
        let (places, id, digest) = (inner.shared.places.clone(), row.id.clone(), row.digest);
        let place = landed.place.clone();
        blocking(move || {
            if let Some(number) = places.staged_by(&id) {
                places.put(Some(number), PlaceInfo { place, digest, transfer: None, foreign: false })?;
            }
            Ok(())
        })
        .await?;
        inner.catalogue.add_artifact(&row.artifact, &incoming.root, None).await?;
        inner.catalogue.set_place(&row.artifact, Some(&landed.place), Some(&landed.location)).await?;
        counters.committed.store(row.body.bytes.total, Ordering::Relaxed);
        self.note_bytes(row, counters);
        row.body.location = Some(landed.location);
        row.body.note = landed.note.map(Into::into);
        let identity = inner.identity.borrow().clone();
        row.body.receipt = Some(Receipt::sign(row, &identity)?);
        self.enter(row, State::Done, None).await;
        tracing::info!(transfer = %row.id, artifact = %row.artifact, "a transfer is done");
        Ok(())
    }

    /// A transfer that was cancelled while it was done again: whether its artifact is still here, as it was before. If so it is
    /// `done` after all.
    pub(super) async fn undone_by_cancel(&self, row: &mut TransferRow) -> Result<bool, Fault> {
        let inner = &self.inner;
        if !row.body.landed || row.removed_ms.is_some() {
            return Ok(false);
        }
        // A sink that does not answer must not keep a cancel waiting.
        match tokio::time::timeout(CANCEL_LOOK_MAX, self.holds(&row.artifact, row.digest)).await {
            Ok(Ok(true)) => {}
            _ => return Ok(false),
        }
        let there = inner.catalogue.artifact(&row.artifact).await?;
        row.body.bytes.committed = row.body.bytes.total;
        row.body.set_fault(None);
        row.body.location = there.location;
        let identity = inner.identity.borrow().clone();
        row.body.receipt = Some(Receipt::sign(row, &identity)?);
        inner.catalogue.update_transfer(&row.id, row.generation, State::Done, &row.body).await?;
        tracing::info!(transfer = %row.id, artifact = %row.artifact, "a transfer was cancelled while it was done again; the artifact is still here");
        Ok(true)
    }
}

//! One transfer's task: its attempts, the pauses between them, and its row in the catalogue.
//!
//! [`Runner::spawn`] starts it. It calls `attempt` until that succeeds, until another attempt is of
//! no use, or until the transfer is stopped. A row is written before it is reported, so after a
//! crash the task begins with the state in the catalogue.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::progress_rate::Pause;
use super::waiting::{Takes, stays};
use super::{CheckRequest, Counters, Runner};
use crate::in_place::CHANGED_NEXT;
use base::fault::{Code, Fault, Reason};
use base::limits::STATE_RETRY_EVERY;
use model::transfer::{Bytes, State};
use sink::Waits;
use state::TransferRow;

impl Runner {
    /// One transfer, from its current state to its end. `before`: cancelled when the task before
    /// this one has ended.
    pub(super) async fn go(
        &self,
        mut row: TransferRow,
        stop: CancellationToken,
        before: Option<CancellationToken>,
    ) {
        if let Some(before) = before
            && !self.follows(&mut row, before, &stop).await
        {
            return;
        }
        let mut pause = Pause::default();
        let first = row.body.bytes;
        let counters = Arc::new(Counters::default());
        counters.received.store(first.received, Ordering::Relaxed);
        counters.reused.store(first.reused, Ordering::Relaxed);
        counters.wire.store(first.wire, Ordering::Relaxed);
        let mut link = self.inner.link.clone();
        // The largest staged amount so far.
        let mut most = 0;
        loop {
            row.body.attempts += 1;
            let received = counters.received.load(Ordering::Relaxed);
            let resumes_commit = row.state == State::Committing;
            // Thousands may wait: the memory of an attempt is allocated behind the wait.
            let ended = match self.wait_for_slot(&mut row, &stop).await {
                Ok(_slot) => {
                    Box::pin(self.attempt(&mut row, &counters, &stop, resumes_commit)).await
                }
                Err(fault) => Err(fault),
            };
            let Err(fault) = ended else {
                return;
            };
            if stop.is_cancelled() {
                self.note_bytes(&mut row, &counters);
                let _ = self.write(&row).await;
                return;
            }
            // Staged content may be lost again and again, which is no progress.
            let committed = counters.committed.load(Ordering::Relaxed);
            if committed > most {
                (most, pause) = (committed, Pause::default());
            }
            self.note_bytes(&mut row, &counters);
            row.body.rate = 0;
            let fault = self.unless_changed_here(&mut row, fault, &stop).await;
            row.body.set_fault(Some(&fault));
            let costs = counters.received.load(Ordering::Relaxed) > received;
            let Some(wait) = pause.after(&fault, costs) else {
                tracing::warn!(error = %fault, "a transfer failed");
                row.state = State::Failed;
                self.save(&row).await;
                return;
            };
            tracing::info!(error = %fault, wait_ms = wait.as_millis() as u64, "a transfer waits");
            self.save(&row).await;
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // Most waits end with a new connection.
                _ = link.changed(), if fault.reason == Reason::HubUnreachable => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Waits for the end of the task before this one. It waits even when this one is stopped: the
    /// end of this task implies the end of both. Returns whether there is still something to do.
    async fn follows(
        &self,
        row: &mut TransferRow,
        before: CancellationToken,
        stop: &CancellationToken,
    ) -> bool {
        let sink = self.inner.sinks.of(row.artifact.kind).clone();
        let ended = async {
            before.cancelled().await;
            Ok(())
        };
        let waited = self
            .watched(row, sink.as_ref(), &Waits::default(), Takes::AnyTime, ended)
            .await;
        if waited.is_err() || stop.is_cancelled() {
            return false;
        }
        match self.inner.catalogue.transfer(&row.id).await {
            Ok(now) if now.generation == row.generation && !now.state.is_final() => {
                *row = now;
                true
            }
            Ok(_) => false,
            // The known row is enough for the first attempt, which reads the catalogue again.
            Err(_) => true,
        }
    }

    /// The hub never requests content from a site that lacks it itself. So content that was
    /// published here, and that no other site has, is checked: if it changed, the transfer would
    /// wait for ever.
    async fn unless_changed_here(
        &self,
        row: &mut TransferRow,
        fault: Fault,
        stop: &CancellationToken,
    ) -> Fault {
        let waits = fault.reason == Reason::WaitingForSource && fault.code == Code::NotFound;
        if !waits
            || !self
                .inner
                .catalogue
                .all_by_digest(row.digest)
                .await
                .is_ok_and(|all| all.iter().any(|known| known.published))
        {
            return fault;
        }
        // The check may take a while.
        row.body.set_fault(Some(&fault));
        self.save(row).await;
        let (answer, answered) = oneshot::channel();
        let look = async {
            self.inner
                .check_requests
                .send(CheckRequest {
                    digest: row.digest,
                    answer,
                })
                .await
                .ok()?;
            answered.await.ok()?
        };
        let changed = tokio::select! {
            changed = look => changed,
            () = stop.cancelled() => None,
        };
        changed.map_or(fault, |changed| {
            Fault::integrity(changed).with_next(CHANGED_NEXT)
        })
    }

    /// Writes a transfer's row once. Older unwritten rows of it are discarded.
    pub(super) async fn write(&self, row: &TransferRow) -> Result<(), Fault> {
        self.inner
            .catalogue
            .update_transfer(&row.id, row.generation, row.state, &row.body)
            .await?;
        self.inner.unwritten.saved(&row.id, row.generation);
        Ok(())
    }

    /// Writes a transfer's row. A final state is tried again until it is written or the daemon
    /// stops: no later write would store it.
    pub(super) async fn save(&self, row: &TransferRow) {
        let inner = &self.inner;
        loop {
            let Err(fault) = self.write(row).await else {
                return;
            };
            if inner.unwritten.not_saved(row, &fault) {
                tracing::error!(error = %fault, "the catalogue cannot be written");
            }
            inner.catalogue.notify();
            if !row.state.is_final() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(STATE_RETRY_EVERY) => {}
                () = inner.stop.cancelled() => return,
            }
        }
    }

    pub(super) fn note_bytes(&self, row: &mut TransferRow, counters: &Counters) {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let was = row.body.bytes;
        row.body.bytes = Bytes {
            total: was.total,
            reused: was.reused.max(get(&counters.reused)),
            resumed: was.resumed.max(get(&counters.resumed)),
            received: was.received.max(get(&counters.received)),
            committed: was.committed.max(get(&counters.committed)),
            wire: was.wire.max(get(&counters.wire)),
        };
    }

    pub(super) async fn enter(&self, row: &mut TransferRow, state: State, wait: Option<Fault>) {
        row.state = state;
        // Until it makes progress it still waits for its source or its sink, however often it asks.
        let waits = stays(row.body.reason)
            && matches!(
                state,
                State::Planning | State::Transferring | State::Committing
            );
        if wait.is_some() || !waits {
            row.body.set_fault(wait.as_ref());
        }
        self.save(row).await;
    }
}

//! When a transfer may work: which transfers go first, and how many work at once.
//!
//! `task` waits here before each attempt. Nothing is stored: the order is in the catalogue,
//! and slots are taken again after a restart.

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;

use super::waiting::Takes;
use super::{Runner, sink_number, stopped, unless};
use base::fault::{Code, Fault, Reason};
use base::text::Message;
use model::transfer::State;
use sink::Waits;
use state::{Subject, TransferRow};

/// Transfers of about one size. They wait neither for larger transfers nor behind their requests.
struct Size {
    /// The largest artifact of this size, bytes.
    most: u64,
    /// How many work at once.
    slots: usize,
    /// The priority of their requests on the connection; below that of manifests.
    priority: i32,
}

const SIZES: [Size; 3] = [
    Size {
        most: 8 << 20,
        slots: 4,
        priority: 15,
    },
    Size {
        most: 256 << 20,
        slots: 4,
        priority: 10,
    },
    Size {
        most: u64::MAX,
        slots: 3,
        priority: 0,
    },
];

fn size(bytes: u64) -> usize {
    SIZES
        .iter()
        .position(|size| bytes <= size.most)
        .unwrap_or(SIZES.len() - 1)
}

/// The priority of the requests of an artifact of so many bytes.
pub(super) fn priority(bytes: u64) -> i32 {
    SIZES[size(bytes)].priority
}

/// The slots of one sink, by size.
pub(super) struct Slots([Semaphore; SIZES.len()]);

impl Default for Slots {
    fn default() -> Self {
        Self(SIZES.map(|size| Semaphore::new(size.slots)))
    }
}

impl Runner {
    /// Waits until this transfer may work: the transfers that go first are done, and a slot of its
    /// size is free.
    pub(super) async fn wait_for_slot(
        &self,
        row: &mut TransferRow,
        stop: &CancellationToken,
    ) -> Result<SemaphorePermit<'_>, Fault> {
        // A transfer that was committing when the daemon stopped has waited already.
        if row.state != State::Committing {
            unless(stop, self.let_others_go_first(row)).await?;
        }
        // Each sink has its own slots: a sink that hangs delays no transfer of another sink.
        let slots = &self.inner.slots[sink_number(row.artifact.kind)].0[size(row.body.bytes.total)];
        let sink = self.inner.sinks.of(row.artifact.kind).clone();
        if let Ok(turn) = slots.try_acquire() {
            return Ok(turn);
        }
        let wait = Fault::internal("other transfers go first")
            .with_reason(Reason::WaitingForTurn)
            .with_next("no action is needed: it starts automatically");
        self.enter(row, State::Queued, Some(wait)).await;
        let turn = async { slots.acquire().await.map_err(|_| stopped()) };
        unless(
            stop,
            self.watched(row, sink.as_ref(), &Waits::default(), Takes::AnyTime, turn),
        )
        .await
    }

    /// Waits until the transfers that go first are done or cancelled.
    async fn let_others_go_first(&self, row: &mut TransferRow) -> Result<(), Fault> {
        let catalogue = &self.inner.catalogue;
        let by_itself = || "no action is needed: it starts automatically".to_owned();
        let mut watch = catalogue.watch(Subject::Site(row.site.clone()));
        loop {
            let mut waits = None;
            // As the hub says now: the order may have been removed since.
            for id in catalogue.transfer(&row.id).await?.after {
                match catalogue.transfer(&id).await {
                    Ok(first) if matches!(first.state, State::Done | State::Cancelled) => {}
                    Ok(first) if first.state == State::Failed => {
                        let why = first
                            .body
                            .message
                            .map_or_else(|| format!("see 'packhorse status {id}'"), Into::into);
                        let next = format!(
                            "fix the cause, then run 'packhorse retry {id}'; this transfer then continues by itself"
                        );
                        waits = Some((
                            format!("{} must be here first, and failed: {why}", first.artifact),
                            next,
                            id,
                        ));
                    }
                    Ok(first) => {
                        waits = Some((
                            format!("{} must be here first: {id}", first.artifact),
                            by_itself(),
                            id,
                        ));
                    }
                    Err(fault) if fault.code == Code::NotFound => {
                        waits =
                            Some((format!("transfer {id} must be done first"), by_itself(), id));
                    }
                    Err(fault) => return Err(fault),
                }
            }
            let Some((message, next, id)) = waits else {
                return Ok(());
            };
            if row.body.message.as_ref() != Some(&Message::from(message.as_str()))
                || row.body.waits_for.as_ref() != Some(&id)
            {
                let wait = Fault::internal(message)
                    .with_reason(Reason::WaitingForDependency)
                    .with_next(next);
                row.state = State::Queued;
                row.body.set_fault(Some(&wait));
                row.body.waits_for = Some(id);
                self.save(row).await;
            }
            watch.changed().await;
        }
    }
}

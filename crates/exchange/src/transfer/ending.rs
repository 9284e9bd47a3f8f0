//! How a transfer is stopped, paused and cancelled, and how its staging folder is removed.
//!
//! Nothing here delays the control stream: a sink that hangs delays only the end of its own
//! transfers. A commit that has begun is awaited, because an artifact that may become visible must
//! not be reported as cancelled. A failed removal is repeated.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;
use tracing::Instrument as _;

use super::{Runner, Running, Sinks};
use base::blocking::blocking;
use base::durable;
use base::fault::{Code, Fault, IoContext};
use base::limits::{LEFTOVERS_AGAIN_AFTER, ROOT_USE_SAID_EVERY, SINK_STOP_MAX};
use base::names::TransferId;
use base::spans;
use base::workers::{Pace, Worker, Workers};
use model::transfer::State;
use sink::Sink;
use state::{TransferRow, Want};

/// The pause before another attempt to store an end.
const NOTE_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// The part of a staging folder that is removed.
enum Leftover {
    /// The content that a transfer staged.
    Staged(TransferId),
    /// The content that a sink moved aside for removal.
    Aside(PathBuf),
}

impl Runner {
    /// Pauses or cancels a transfer in the background.
    pub(super) fn end(&self, row: &TransferRow, want: Want) {
        let mut ending = self.inner.ending.lock();
        ending.retain(|_, task| !task.is_finished());
        let key = (row.id.clone(), row.generation, want);
        if ending.contains_key(&key) {
            return;
        }
        let (this, row, mine) = (self.clone(), row.clone(), key.clone());
        let span = spans::transfer(&row.id, &row.artifact, &row.site);
        let work = async move {
            this.halt(&row.id, row.generation).await;
            while let Err(fault) = this.note_end(&row, want).await {
                tracing::warn!(error = %fault, "the end of a transfer could not be stored; it is tried again");
                tokio::select! {
                    () = tokio::time::sleep(NOTE_AGAIN_AFTER) => {}
                    () = this.inner.stop.cancelled() => return,
                }
            }
            // A later request starts a new end; the earlier request is in the catalogue.
            this.inner.ending.lock().remove(&mine);
            if want == Want::Pause
                && let Ok(now) = this.inner.catalogue.transfer(&row.id).await
                && now.generation == row.generation
                && !now.state.is_final()
            {
                match now.want {
                    // Resumed in between: its new task may be the one that was stopped.
                    Want::Run => this.spawn(&now),
                    // Resumed and paused again.
                    Want::Pause if this.task_of(&now.id, now.generation).is_some() => {
                        this.end(&now, Want::Pause);
                    }
                    _ => {}
                }
            }
        };
        ending.insert(key, tokio::spawn(work.instrument(span)));
    }

    /// The task of a transfer that runs, unless that is one of a newer generation.
    pub(super) fn task_of(&self, id: &TransferId, generation: i64) -> Option<Running> {
        let running = self.inner.running.lock();
        running
            .get(id)
            .filter(|there| there.generation <= generation && !there.ended.is_cancelled())
            .cloned()
    }

    /// Stops a transfer's task, unless that is a newer one, and waits until it and those before it
    /// have ended.
    async fn halt(&self, id: &TransferId, generation: i64) {
        if let Some(task) = self.task_of(id, generation) {
            task.stop.cancel();
            task.ended.cancelled().await;
        }
    }

    async fn note_end(&self, row: &TransferRow, want: Want) -> Result<(), Fault> {
        let mut row = loop {
            let now = self.inner.catalogue.transfer(&row.id).await?;
            // Another action was requested since.
            if now.generation != row.generation || want == Want::Pause && now.want != Want::Pause {
                return Ok(());
            }
            if self.task_of(&now.id, now.generation).is_none() {
                break now;
            }
            // It was resumed in between, and then this action was requested again.
            self.halt(&now.id, now.generation).await;
        };
        if want == Want::Cancel && matches!(row.state, State::Done | State::Cancelled) {
            // Another transfer replaced it: its staged content stays.
            self.inner.leftovers.notify_waiters();
            return Ok(());
        }
        if want == Want::Cancel {
            // A cancelled transfer usually leaves nothing. A sink that hangs is not waited for.
            let clean = tokio::time::timeout(
                SINK_STOP_MAX,
                self.remove_staged(&row.id, Some(row.generation)),
            )
            .await;
            if let Ok(Err(fault)) = clean {
                tracing::warn!(error = %fault, "a staging folder could not be removed; it is tried again");
            }
            if self.undone_by_cancel(&mut row).await? {
                return Ok(());
            }
        }
        self.inner
            .catalogue
            .end_transfer(&row.id, row.generation, want)
            .await?;
        self.inner.unwritten.saved(&row.id, row.generation);
        self.inner.leftovers.notify_waiters();
        Ok(())
    }

    /// Waits until no other task uses the staging folder of a transfer.
    pub(super) async fn staging_of(&self, id: &TransferId) -> OwnedMutexGuard<()> {
        self.inner.staging.lock(id).await
    }

    /// Removes the staged content of a transfer, if it is still of this generation. `None`: if the
    /// content is of no use any more.
    async fn remove_staged(&self, id: &TransferId, generation: Option<i64>) -> Result<(), Fault> {
        let guard = self.staging_of(id).await;
        let row = match self.inner.catalogue.transfer(id).await {
            Ok(row) => Some(row),
            Err(fault) if fault.code == Code::NotFound => None,
            Err(fault) => return Err(fault),
        };
        let index = self.inner.shared.chunk_index.clone();
        let (looked, of) = (index.clone(), id.clone());
        let place = blocking(move || Ok(looked.staged_by(&of))).await?;
        let of_no_use = match (&row, generation) {
            (Some(row), Some(generation)) => row.generation == generation,
            // A failed transfer keeps its content for `retry`.
            (Some(row), None) => matches!(row.state, State::Done | State::Cancelled),
            (None, _) => place.is_none(),
        };
        if !of_no_use {
            return Ok(());
        }
        if let Some(place) = place {
            blocking(move || index.remove(place)).await?;
        }
        let sinks: Vec<_> = match &row {
            Some(row) => vec![self.inner.sinks.of(row.artifact.kind).clone()],
            None => self
                .inner
                .sinks
                .all()
                .map(Clone::clone)
                .into_iter()
                .filter(|sink| !sink.is_shared())
                .collect(),
        };
        let guard = Arc::new(guard);
        for sink in sinks {
            let (staged, guard) = (id.in_dir(sink.staging_root()), guard.clone());
            sink.threads()
                .run(move || {
                    let removed = durable::remove_all(&staged);
                    drop(guard);
                    removed
                })
                .await?;
        }
        Ok(())
    }

    /// Starts the workers that remove unused content of the staging folders, now and after each
    /// cancellation. Each sink has its own worker: a sink that hangs does not delay another one.
    pub fn start_cleanup_workers(&self, workers: &Workers) {
        let Sinks {
            files,
            labels,
            images,
        } = &self.inner.sinks;
        for (name, sink) in [
            ("cleanup-files", files),
            ("cleanup-labels", labels),
            ("cleanup-images", images),
        ] {
            workers.start(
                name,
                Pace::every(ROOT_USE_SAID_EVERY).long(),
                &(self.clone(), sink.clone()),
                |(this, sink), worker| async move { this.keep_sink_clean(sink, &worker).await },
            );
        }
    }

    async fn keep_sink_clean(&self, sink: Arc<dyn Sink>, worker: &Worker) -> Result<(), Fault> {
        loop {
            let asked = self.inner.leftovers.notified();
            let cleaned = worker.iterate(async {
                let cleaned = self.clean(&sink).await;
                let renewed = sink.clone();
                // An unavailable root is reported by the next transfer.
                let _ = sink.threads().run(move || renewed.renew()).await;
                let folder = sink.staging_root().display();
                cleaned.map_err(|fault| {
                    fault.context(format_args!(
                        "unused staged content could not be removed from {folder}"
                    ))
                })
            });
            // The worker reports a fault, and tries again.
            let pause = match cleaned.await {
                Ok(()) => ROOT_USE_SAID_EVERY,
                Err(_) => LEFTOVERS_AGAIN_AFTER,
            };
            let _ = tokio::time::timeout(pause, asked).await;
        }
    }

    /// Removes the unused content of one sink. Returns the first fault after all of it was tried.
    async fn clean(&self, sink: &Arc<dyn Sink>) -> Result<(), Fault> {
        let this = sink.clone();
        let mut first = Ok(());
        for leftover in sink.threads().run(move || leftovers(this.as_ref())).await? {
            let removed = match leftover {
                Leftover::Staged(id) => self.remove_staged(&id, None).await,
                Leftover::Aside(path) => {
                    sink.threads().run(move || durable::remove_all(&path)).await
                }
            };
            first = first.and(removed);
        }
        first
    }
}

/// Content of a staging folder that may be of no use.
fn leftovers(sink: &dyn Sink) -> Result<Vec<Leftover>, Fault> {
    let root = sink.staging_root();
    let entries = match std::fs::read_dir(root) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.at(root.display())?,
    };
    let mut out = Vec::new();
    for entry in entries {
        let name = entry
            .at(root.display())?
            .file_name()
            .to_string_lossy()
            .into_owned();
        if let Ok(id) = name.parse()
            && name.starts_with("t-")
        {
            out.push(Leftover::Staged(id));
        } else if sink.may_remove(&name) {
            out.push(Leftover::Aside(root.join(name)));
        }
    }
    Ok(out)
}

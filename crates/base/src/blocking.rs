//! Work that blocks, away from the threads of the runtime.
//!
//! A call that reads or writes a disk, or asks a filesystem for something, hangs for as long as the
//! disk or the NAS does not answer. On a thread of the runtime it would stop everything else that
//! this thread serves. So such a call runs in one of these ways:
//! - [`blocking`]: on the shared pool of the runtime. For the daemon's own files in `data_dir`, and
//!   for work that only computes.
//! - [`cancellable`]: the same for work that may take long, or that holds permits or memory of a
//!   peer: it is told when nobody waits for it any more, and what it holds is held until it ended.
//! - [`blocking_at`]: on threads that belong to the filesystem of a path. For a path that a user
//!   names: a source, a published folder, a bundle. A filesystem that hangs takes its own threads
//!   and no others.
//! - [`crate::threads::Threads`]: on the threads of a sink.
//!
//! The functions that block call [`check`], which panics in a debug build on a thread of the
//! runtime: the tests find a call in the wrong place. A release build checks nothing.

use std::cell::Cell;
use std::path::Path;

use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::Span;

use crate::fault::Fault;
use crate::mounts;

thread_local! {
    /// Whether this thread may block at the moment.
    static MAY_BLOCK: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` on a thread of the shared pool, where it may block.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    spawn(work)
        .await
        .map_err(|e| Fault::internal(format!("a blocking task panicked or was cancelled: {e}")))?
}

/// Whether blocking work should end early. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Stop(CancellationToken);

impl Stop {
    /// Tells the work to end.
    pub fn set(&self) {
        self.0.cancel();
    }

    /// Whether the work should end.
    pub fn is_set(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Tells the work to end when the guard is dropped.
    pub fn when_dropped(&self) -> DropGuard {
        self.0.clone().drop_guard()
    }

    /// Fails if the work should end. Called before each step that may take a moment.
    pub fn check(&self) -> Result<(), Fault> {
        if self.is_set() {
            return Err(Fault::partial("the work was stopped: nobody waits for it")
                .with_next("repeat the request"));
        }
        Ok(())
    }
}

impl From<CancellationToken> for Stop {
    fn from(token: CancellationToken) -> Self {
        Self(token)
    }
}

/// Runs `work` on a thread of the shared pool like [`blocking`]. When the future is dropped, `work`
/// is told to stop, and does not begin if it still waits for a thread. `held`, such as permits or a
/// share of a budget, is dropped after `work` has ended, and not with the future.
pub async fn cancellable<T: Send + 'static>(
    held: impl Send + 'static,
    work: impl FnOnce(&Stop) -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    let stop = Stop::default();
    let _dropped = stop.when_dropped();
    blocking(move || {
        let _held = held;
        stop.check()?;
        work(&stop)
    })
    .await
}

/// Starts `work` on a thread of the shared pool; it continues when no task waits for it.
#[expect(
    clippy::disallowed_methods,
    reason = "this is the place that takes the span along"
)]
pub fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let span = Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(|| may_block(work)))
}

/// Runs `work` on a thread of the filesystem that `path` is on. Waits while a filesystem has its
/// most calls running.
pub async fn blocking_at<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    mounts::threads_of(path).run(work).await
}

/// Runs `work` on this thread, which is none of the runtime's.
pub fn may_block<T>(work: impl FnOnce() -> T) -> T {
    /// Restores what was, even after a panic.
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            MAY_BLOCK.set(self.0);
        }
    }
    let _before = Before(MAY_BLOCK.replace(true));
    work()
}

/// Panics in a debug build when a task of the runtime runs on this thread: `what` may block. Called
/// by the functions that do.
#[inline]
pub fn check(what: &str) {
    debug_assert!(
        MAY_BLOCK.get() || tokio::task::try_id().is_none() || std::thread::panicking(),
        "{what} blocks a thread of the runtime: call it in base::blocking"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_nobody_waits_for_is_stopped_and_holds_its_permit_until_it_ended() {
        let places = std::sync::Arc::new(tokio::sync::Semaphore::new(1));
        let place = places.clone().acquire_owned().await.unwrap();
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        let (go_on, may_go_on) = std::sync::mpsc::sync_channel::<()>(1);
        let work = cancellable(place, move |stop| {
            begun.send(()).unwrap();
            while !stop.is_set() {
                std::thread::yield_now();
            }
            may_go_on.recv().unwrap();
            stop.check()
        });
        let work = tokio::spawn(work);
        has_begun.await.unwrap();
        work.abort();
        assert!(work.await.unwrap_err().is_cancelled());
        assert_eq!(places.available_permits(), 0, "the thread still works");
        go_on.send(()).unwrap();
        let _place = places.acquire().await.unwrap();
    }

    #[tokio::test]
    async fn work_whose_future_was_dropped_before_a_thread_was_free_does_not_begin() {
        // A runtime with one blocking thread, which is busy.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(1)
            .build()
            .unwrap();
        let (free, is_free) = std::sync::mpsc::sync_channel::<()>(1);
        let busy = runtime.spawn(blocking(move || {
            is_free.recv().unwrap();
            Ok(())
        }));
        let has_run = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let held = std::sync::Arc::new(());
        let (runs, holds) = (has_run.clone(), held.clone());
        let queued = runtime.spawn(async move {
            let work = cancellable(holds, move |_| {
                runs.store(true, std::sync::atomic::Ordering::SeqCst);
                Ok(())
            });
            tokio::select! {
                biased;
                _ = work => {}
                () = tokio::task::yield_now() => {}
            }
        });
        queued.await.unwrap();
        free.send(()).unwrap();
        busy.await.unwrap().unwrap();
        // The queue is in order: the dropped work had its turn.
        runtime.spawn(blocking(|| Ok(()))).await.unwrap().unwrap();
        runtime.shutdown_background();
        assert!(!has_run.load(std::sync::atomic::Ordering::SeqCst));
        assert_eq!(std::sync::Arc::strong_count(&held), 1);
    }

    #[tokio::test]
    async fn a_call_that_blocks_a_thread_of_the_runtime_is_found() {
        let task = || tokio::spawn(async { check("a test") });
        let found = task().await.unwrap_err().into_panic();
        let text = found.downcast::<String>().unwrap();
        assert!(
            text.contains("a test blocks a thread of the runtime"),
            "{text}"
        );
        let elsewhere = async {
            let checked = || {
                check("a test");
                Ok(())
            };
            blocking(checked).await?;
            blocking_at(Path::new("/"), checked).await?;
            blocking(checked).await
        };
        tokio::spawn(elsewhere).await.unwrap().unwrap();
        // A nested call may block as long as the call around it may.
        may_block(|| may_block(|| ()));
        assert!(!MAY_BLOCK.get());
    }
}

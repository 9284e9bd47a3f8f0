//! Work that blocks, away from the threads of the runtime.
//!
//! A call that reads or writes a disk, or asks a filesystem for something, hangs for as long as the
//! disk or the NAS does not answer. On a thread of the runtime it would stop everything else that
//! this thread serves. So such a call runs in one of these ways:
//! - [`blocking`]: on the shared pool of the runtime. For the daemon's own files in `data_dir`, and
//!   for work that only computes.
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

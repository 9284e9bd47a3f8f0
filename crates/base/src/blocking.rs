//! Runs blocking work outside the threads of the async runtime.

use crate::fault::Fault;

/// Runs `work` on a thread of tokio's blocking pool and waits for its result.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Fault::internal(format!("a blocking task panicked or was cancelled: {e}")))?
}

//! Work that blocks, away from the threads of the runtime.

use crate::fault::Fault;

/// Runs `work` on a thread where it may block.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
) -> Result<T, Fault> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Fault::internal(format!("a task ended: {e}")))?
}

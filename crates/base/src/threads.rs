//! Threads for calls that may hang: those of one sink, or of one filesystem.
//!
//! Every call that can hang in a far end (a NAS that is away, a disk that is dead) runs on a thread
//! of that far end. The number of these threads is limited for each, so that one that hangs takes
//! nothing from the others. A caller may stop waiting at any moment; the thread ends when the call
//! returns. No thread keeps the process alive.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinHandle;
use tracing::{Instrument as _, Span};

use crate::blocking::may_block;
use crate::fault::Fault;

/// The threads of one sink, or of one filesystem. Cheap to clone.
#[derive(Clone)]
pub struct Threads {
    name: &'static str,
    room: Arc<Semaphore>,
    max: usize,
}

impl Threads {
    /// No thread yet, and `max` of them at most; `name` is what the system shows.
    pub fn new(name: &'static str, max: usize) -> Self {
        Self {
            name,
            room: Arc::new(Semaphore::new(max)),
            max,
        }
    }

    /// What the system shows.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Whether none of them runs.
    pub fn is_idle(&self) -> bool {
        self.room.available_permits() == self.max
    }

    /// Whether all of them run.
    pub fn is_full(&self) -> bool {
        self.room.available_permits() == 0
    }

    /// Runs a call that may block, on a thread of its own. Dropping the future leaves the thread to
    /// itself.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let room = self.reserve(1).await?;
        let ended = self.start(&room, work)?;
        drop(room);
        ended.await.unwrap_or_else(|_| {
            Err(Fault::internal(format!(
                "a thread of {} panicked",
                self.name
            )))
        })
    }

    /// [`Threads::run`] of a call that continues while its caller does something else. Dropping the
    /// handle leaves the thread to itself.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
    ) -> JoinHandle<Result<T, Fault>> {
        let this = self.clone();
        tokio::spawn(async move { this.run(work).await }.in_current_span())
    }

    /// [`Threads::run`] with a maximum wait. The call itself continues after it.
    pub async fn run_for<T: Send + 'static>(
        &self,
        time: Duration,
        work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        tokio::time::timeout(time, self.run(work))
            .await
            .unwrap_or_else(|_| {
                Err(Fault::unreachable(format!(
                    "{} has not answered for {} s",
                    self.name,
                    time.as_secs()
                )))
            })
    }

    /// Waits for room for several threads that wait for each other, and takes it at once.
    pub async fn reserve(&self, threads: u32) -> Result<Arc<OwnedSemaphorePermit>, Fault> {
        let room = self.room.clone().acquire_many_owned(threads).await;
        room.map(Arc::new)
            .map_err(|_| Fault::internal(format!("the threads of {} are gone", self.name)))
    }

    /// Starts a thread for which room was reserved. The receiver closes without a value if the
    /// thread panics.
    pub fn start<T: Send + 'static>(
        &self,
        room: &Arc<OwnedSemaphorePermit>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<oneshot::Receiver<T>, Fault> {
        let (ended, receiver) = oneshot::channel();
        let (room, runtime, span) = (
            room.clone(),
            tokio::runtime::Handle::try_current().ok(),
            Span::current(),
        );
        let body = move || {
            let _runtime = runtime.as_ref().map(tokio::runtime::Handle::enter);
            let done = span.in_scope(|| may_block(work));
            drop(room);
            let _ = ended.send(done);
        };
        std::thread::Builder::new()
            .name(self.name.into())
            .spawn(body)
            .map_err(|e| Fault::internal(format!("start a thread for {}: {e}", self.name)))?;
        Ok(receiver)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_threads_are_limited_and_a_panic_is_a_fault() {
        let threads = Threads::new("test", 2);
        let all = threads.reserve(2).await.unwrap();
        assert!(threads.is_full());
        let late = threads
            .run_for(Duration::from_millis(10), || Ok(()))
            .await
            .unwrap_err();
        assert_eq!(
            late.reason,
            crate::fault::Reason::SinkUnavailable,
            "{late:?}"
        );
        drop(all);
        assert!(threads.is_idle());
        threads.run(|| Ok(())).await.unwrap();
        let fault = threads
            .run(|| -> Result<(), Fault> { unreachable!("for the test") })
            .await
            .unwrap_err();
        assert!(fault.message.contains("panicked"), "{fault:?}");
    }
}

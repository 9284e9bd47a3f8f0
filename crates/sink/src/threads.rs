//! The threads of one sink, and the check whether its target responds.
//!
//! Every call that can hang in the target of a sink (an unavailable NAS, a dead disk) runs on a
//! thread of that sink. The number of threads is limited for each sink, so a sink that hangs does
//! not affect the others. A caller may stop waiting at any time; the thread ends when the call
//! returns. No thread keeps the process alive.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use base::fault::Fault;
use base::limits::{SINK_SILENT_AFTER, SINK_THREADS_MAX};

/// The threads of one sink. Cheap to clone.
#[derive(Clone)]
pub struct Threads {
    name: &'static str,
    permits: Arc<Semaphore>,
}

impl Threads {
    /// Creates no thread; `name` is the name of the threads in the system.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            permits: Arc::new(Semaphore::new(SINK_THREADS_MAX)),
        }
    }

    /// Runs a blocking call on its own thread. Dropping the future does not stop the thread.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let permits = self.reserve(1).await?;
        let ended = self.start(&permits, work)?;
        drop(permits);
        ended.await.unwrap_or_else(|_| {
            Err(Fault::internal(format!(
                "a thread of {} panicked",
                self.name
            )))
        })
    }

    /// Like [`Threads::run`], for a call that runs while the caller does something else. Dropping
    /// the handle does not stop the thread.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
    ) -> JoinHandle<Result<T, Fault>> {
        let this = self.clone();
        tokio::spawn(async move { this.run(work).await })
    }

    /// Like [`Threads::run`], with a time limit for the wait. The call itself continues.
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

    /// Reserves several threads at once, for threads that wait for each other.
    pub async fn reserve(&self, threads: u32) -> Result<Arc<OwnedSemaphorePermit>, Fault> {
        let permits = self.permits.clone().acquire_many_owned(threads).await;
        permits
            .map(Arc::new)
            .map_err(|_| Fault::internal(format!("the threads of {} ended", self.name)))
    }

    /// Starts a reserved thread. The receiver closes without a value if the thread panics.
    pub fn start<T: Send + 'static>(
        &self,
        permits: &Arc<OwnedSemaphorePermit>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<oneshot::Receiver<T>, Fault> {
        let (ended, receiver) = oneshot::channel();
        let (permits, runtime) = (permits.clone(), tokio::runtime::Handle::try_current().ok());
        let run_work = move || {
            let _runtime = runtime.as_ref().map(tokio::runtime::Handle::enter);
            let done = work();
            drop(permits);
            let _ = ended.send(done);
        };
        std::thread::Builder::new()
            .name(self.name.into())
            .spawn(run_work)
            .map_err(|e| Fault::internal(format!("start a thread for {}: {e}", self.name)))?;
        Ok(receiver)
    }
}

/// Checks whether the target responds: a small call runs on its own thread, at most one at a time,
/// and its age is measured.
#[derive(Clone, Default)]
pub struct Heartbeat {
    started: Arc<Mutex<Option<Instant>>>,
}

impl Heartbeat {
    /// How long the target has not responded, if that is long. Starts a call if none is running.
    /// Returns immediately.
    pub fn silent_for(
        &self,
        threads: &Threads,
        call: impl FnOnce() + Send + 'static,
    ) -> Option<Duration> {
        let mut started = self.started.lock();
        if let Some(since) = *started {
            return Some(since.elapsed()).filter(|age| *age >= SINK_SILENT_AFTER);
        }
        *started = Some(Instant::now());
        let started_of_call = self.started.clone();
        let ended = move || {
            call();
            *started_of_call.lock() = None;
        };
        // The thread is not reserved: a target that hangs occupies all threads, and then this call
        // is most important.
        if std::thread::Builder::new()
            .name(threads.name.into())
            .spawn(ended)
            .is_err()
        {
            *started = None;
        }
        None
    }
}

/// A duration for a message that is updated each second; it is rounded so that the message changes
/// seldom.
pub fn rounded_secs(time: Duration) -> u64 {
    const STEPS: [u64; 10] = [3, 5, 10, 20, 30, 60, 300, 600, 1800, 3600];
    let seconds = time.as_secs();
    let hours = seconds / 3600 * 3600;
    STEPS
        .into_iter()
        .rev()
        .find(|step| *step <= seconds)
        .unwrap_or(1)
        .max(hours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_call_that_hangs_is_detected_and_does_not_affect_others() {
        let (threads, heartbeat) = (Threads::new("test"), Heartbeat::default());
        let (release, held) = std::sync::mpsc::sync_channel::<()>(0);
        assert_eq!(
            heartbeat.silent_for(&threads, move || {
                let _ = held.recv();
            }),
            None
        );
        assert_eq!(
            heartbeat.silent_for(&threads, || unreachable!("one call at a time")),
            None,
            "the call is still recent"
        );
        tokio::time::advance(SINK_SILENT_AFTER).await;
        assert_eq!(
            heartbeat.silent_for(&threads, || ()),
            Some(SINK_SILENT_AFTER)
        );
        assert_eq!(
            threads.run(|| Ok(7)).await.unwrap(),
            7,
            "another call succeeds"
        );
        drop(release);
        while heartbeat.started.lock().is_some() {
            std::thread::yield_now();
        }
        assert_eq!(
            heartbeat.silent_for(&threads, || ()),
            None,
            "the target responds again"
        );
    }

    #[tokio::test]
    async fn the_threads_are_limited_and_a_panic_is_a_fault() {
        let threads = Threads::new("test");
        let all = threads.reserve(SINK_THREADS_MAX as u32).await.unwrap();
        let late = threads
            .run_for(Duration::from_millis(10), || Ok(()))
            .await
            .unwrap_err();
        assert_eq!(
            late.reason,
            base::fault::Reason::SinkUnavailable,
            "{late:?}"
        );
        drop(all);
        threads.run(|| Ok(())).await.unwrap();
        let fault = threads
            .run(|| -> Result<(), Fault> { unreachable!("for the test") })
            .await
            .unwrap_err();
        assert!(fault.message.contains("panicked"), "{fault:?}");
    }

    #[test]
    fn times_in_messages_change_seldom() {
        let shown = |seconds: u64| rounded_secs(Duration::from_secs(seconds));
        assert_eq!(
            [3, 4, 7, 59, 61, 3599, 3601, 7300].map(shown),
            [3, 3, 5, 30, 60, 1800, 3600, 7200]
        );
    }
}

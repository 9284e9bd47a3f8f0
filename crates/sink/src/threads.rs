//! The threads of one sink, and whether its far end answers.
//!
//! Every call that can hang in the far end of a sink (a NAS that is away, a disk that is dead) runs
//! on a thread of that sink. The number of these threads is limited for each sink, so a sink that
//! hangs takes nothing from the others. A caller may stop waiting at any moment; the thread ends
//! when the call returns. No thread keeps the process alive.

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
    room: Arc<Semaphore>,
}

impl Threads {
    /// No thread yet; `name` is what the system shows.
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            room: Arc::new(Semaphore::new(SINK_THREADS_MAX)),
        }
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

    /// [`Threads::run`] of a call that goes on while its caller does something else. Dropping the
    /// handle leaves the thread to itself.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
    ) -> JoinHandle<Result<T, Fault>> {
        let this = self.clone();
        tokio::spawn(async move { this.run(work).await })
    }

    /// [`Threads::run`] for at most so long. The call itself goes on.
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
        let (room, runtime) = (room.clone(), tokio::runtime::Handle::try_current().ok());
        let body = move || {
            let _runtime = runtime.as_ref().map(tokio::runtime::Handle::enter);
            let done = work();
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

/// Finds out whether the far end answers: a small call runs on a thread of its own, at most one at
/// a time, and its age is looked at.
#[derive(Clone, Default)]
pub struct Heartbeat {
    begun: Arc<Mutex<Option<Instant>>>,
}

impl Heartbeat {
    /// How long the far end has not answered, if that is long; begins a call if none runs. Returns
    /// at once.
    pub fn silent_for(
        &self,
        threads: &Threads,
        call: impl FnOnce() + Send + 'static,
    ) -> Option<Duration> {
        let mut begun = self.begun.lock();
        if let Some(since) = *begun {
            return Some(since.elapsed()).filter(|age| *age >= SINK_SILENT_AFTER);
        }
        *begun = Some(Instant::now());
        let mine = self.begun.clone();
        let ended = move || {
            call();
            *mine.lock() = None;
        };
        // No room is reserved: a far end that hangs has all of it taken, and then this call matters
        // most.
        if std::thread::Builder::new()
            .name(threads.name.into())
            .spawn(ended)
            .is_err()
        {
            *begun = None;
        }
        None
    }
}

/// A time as it is shown in a message that is written again each second: it changes seldom.
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
    async fn a_call_that_hangs_is_noticed_and_takes_nothing_from_others() {
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
            "it has not been long"
        );
        tokio::time::advance(SINK_SILENT_AFTER).await;
        assert_eq!(
            heartbeat.silent_for(&threads, || ()),
            Some(SINK_SILENT_AFTER)
        );
        assert_eq!(
            threads.run(|| Ok(7)).await.unwrap(),
            7,
            "another call goes through"
        );
        drop(release);
        while heartbeat.begun.lock().is_some() {
            std::thread::yield_now();
        }
        assert_eq!(
            heartbeat.silent_for(&threads, || ()),
            None,
            "it answers again"
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

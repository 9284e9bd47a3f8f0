//! The check whether the target of a sink responds.
//!
//! The calls themselves run on the [`Threads`] of the sink.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use base::blocking::may_block;
use base::limits::SINK_SILENT_AFTER;
use base::threads::Threads;

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
            may_block(call);
            *started_of_call.lock() = None;
        };
        // The thread is not reserved: a target that hangs occupies all threads, and then this call
        // is most important.
        if std::thread::Builder::new()
            .name(threads.name().into())
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
        let (threads, heartbeat) = (Threads::new("test", 4), Heartbeat::default());
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

    #[test]
    fn times_in_messages_change_seldom() {
        let shown = |seconds: u64| rounded_secs(Duration::from_secs(seconds));
        assert_eq!(
            [3, 4, 7, 59, 61, 3599, 3601, 7300].map(shown),
            [3, 3, 5, 30, 60, 1800, 3600, 7200]
        );
    }
}

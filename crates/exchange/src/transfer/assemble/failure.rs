//! How a pass ends early: with the first fault of any of its threads. A failure of the chunk index
//! does not end it.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use base::fault::{Fault, Reason, Retry};
use base::limits::STATE_RETRY_EVERY;
use sink::Waits;

/// How often a thread that waits for the chunk index checks whether the transfer was stopped.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The first fault of a pass ends all of it.
pub(super) struct Failure {
    /// Cancelled with the first fault, and when the transfer is stopped.
    pub(super) token: CancellationToken,
    /// Cancelled when the transfer is stopped.
    stop: CancellationToken,
    fault: Mutex<Option<Fault>>,
    /// Whether the failed operation was to store something.
    pub(super) stored: AtomicBool,
    /// Receives what the pass waits for.
    waits: Waits,
    /// The pause between two attempts to use the chunk index.
    pause: Duration,
}

impl Failure {
    /// The state of a new pass.
    pub(super) fn new(stop: &CancellationToken, waits: Waits) -> Self {
        let (token, fault, stored) = (stop.child_token(), Mutex::default(), AtomicBool::new(true));
        Self {
            token,
            stop: stop.clone(),
            fault,
            stored,
            waits,
            pause: STATE_RETRY_EVERY,
        }
    }

    /// Ends the pass.
    pub(super) fn set(&self, fault: Fault) {
        self.fault.lock().get_or_insert(fault);
        self.token.cancel();
    }

    /// Why the pass ended.
    pub(super) fn take(&self) -> Option<Fault> {
        self.fault.lock().take()
    }

    /// Uses the chunk index. While its disk is full or fails, this waits and reports that, also in
    /// a pass that has ended: received bytes need not be sent again.
    pub(super) fn patiently<T>(
        &self,
        mut call: impl FnMut() -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let mut reported = false;
        loop {
            let fault = match call() {
                Err(fault)
                    if fault.retry == Retry::Backoff
                        && matches!(fault.reason, Reason::NoSpace | Reason::SinkUnavailable) =>
                {
                    fault
                }
                done => {
                    if reported {
                        self.waits.clear();
                    }
                    return done;
                }
            };
            reported = true;
            self.waits.report(fault.clone());
            let began = Instant::now();
            while began.elapsed() < self.pause {
                if self.stop.is_cancelled() {
                    return Err(fault);
                }
                std::thread::sleep(LOOK_EVERY);
            }
        }
    }
}

/// Records that a thread panicked: otherwise the others would wait for it for ever.
pub(super) struct Ending(pub(super) Arc<Failure>);

impl Drop for Ending {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0
                .set(Fault::internal("a thread of the transfer panicked"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_without_room_is_waited_for_until_the_transfer_is_stopped() {
        let (stop, waits) = (CancellationToken::new(), Waits::default());
        let failure = Failure {
            pause: Duration::from_millis(1),
            ..Failure::new(&stop, waits.clone())
        };
        let mut tries = 0;
        let done = failure.patiently(|| {
            tries += 1;
            if tries == 1 {
                Err(Fault::no_space("the chunk index: its disk is full"))
            } else {
                Ok(tries)
            }
        });
        assert_eq!(
            (done.unwrap(), waits.now()),
            (2, None),
            "it continues automatically, and says so"
        );
        let damaged = failure
            .patiently(|| Err::<(), _>(Fault::internal("damaged")))
            .unwrap_err();
        assert_eq!(
            (damaged.reason, waits.now()),
            (Reason::Internal, None),
            "a permanent fault is not waited for"
        );
        // The connection ends: received chunks are still recorded when there is room.
        failure.set(Fault::unreachable("the connection ended"));
        let stopped = failure.patiently(|| {
            stop.cancel();
            Err::<(), _>(Fault::no_space("full"))
        });
        assert_eq!(
            (
                stopped.unwrap_err().reason,
                waits.now().map(|fault| fault.reason)
            ),
            (Reason::NoSpace, Some(Reason::NoSpace))
        );
    }
}

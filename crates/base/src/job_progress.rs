//! The progress of a job: counters, notes and the cancel request. The job and the threads that do
//! its work share it.
//!
//! In memory only.

use std::cmp::Ordering;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering as Atomic};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::blocking::Stop;
use crate::fault::{Fault, Reason};
use crate::limits::{JOB_NOTES_MAX, MESSAGE_BYTES_MAX};
use crate::text;

/// The progress of one job.
#[derive(Debug, Default)]
pub struct JobProgress {
    /// Bytes processed.
    pub bytes: AtomicU64,
    /// The bytes that the job will process; 0 if that is not known.
    pub total: AtomicU64,
    /// Compressed bytes that were new to the store, over all attempts.
    pub stored: AtomicU64,
    /// Bytes for which the store had no space. 0 means the space for one pack.
    pub wanted: AtomicU64,
    doing: Mutex<String>,
    notes: Mutex<Vec<String>>,
    cancelled: CancellationToken,
    /// Whether the job is in its short last step, which must not be interrupted.
    ending: AtomicBool,
}

impl JobProgress {
    /// Sets the description of the current step.
    pub fn doing(&self, what: impl Into<String>) {
        *self.doing.lock() = what.into();
    }

    /// Adds a note that the user sees next to the result.
    pub fn note(&self, what: impl Into<String>) {
        let mut notes = self.notes.lock();
        match notes.len().cmp(&JOB_NOTES_MAX) {
            Ordering::Less => notes.push(text::prefix(&what.into(), MESSAGE_BYTES_MAX).into()),
            Ordering::Equal => notes.push("further notes were discarded".into()),
            Ordering::Greater => {}
        }
    }

    /// Fails if the job was cancelled. Call this often, and before each long step.
    pub fn check(&self) -> Result<(), Fault> {
        if self.cancelled.is_cancelled() {
            Err(cancelled())
        } else {
            Ok(())
        }
    }

    /// Runs `work`, and stops it when the job is cancelled.
    pub async fn or_cancelled<T>(
        &self,
        work: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        self.cancelled
            .run_until_cancelled(work)
            .await
            .unwrap_or_else(|| Err(cancelled()))
    }

    /// [`JobProgress::check`], then the start of the last step: the result becomes visible, and the
    /// job can no longer be cancelled.
    pub fn end(&self) -> Result<(), Fault> {
        self.ending.store(true, Atomic::SeqCst);
        self.check()
    }

    /// The description of the current step.
    pub fn what(&self) -> String {
        self.doing.lock().clone()
    }

    pub fn notes(&self) -> Vec<String> {
        self.notes.lock().clone()
    }

    /// Requests cancellation.
    pub fn cancel(&self) {
        self.cancelled.cancel();
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.is_cancelled()
    }

    /// Tells work that blocks to end when the job is cancelled.
    pub fn stop(&self) -> Stop {
        self.cancelled.clone().into()
    }

    /// Waits for a cancel request.
    pub async fn cancelled(&self) {
        self.cancelled.cancelled().await;
    }

    /// Whether [`JobProgress::end`] was called.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Atomic::SeqCst)
    }
}

/// The fault of cancelled work.
pub fn cancelled() -> Fault {
    Fault::partial("the job was cancelled")
        .with_reason(Reason::CancelledByUser)
        .with_next("run the command again to start a new job")
}

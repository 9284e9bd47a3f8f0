//! How far a job is, shared between the job and its work: counters, notes and the request to end.
//!
//! Kept in memory only.

use std::cmp::Ordering;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering as Atomic};

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::fault::{Fault, Reason};
use crate::limits::{JOB_NOTES_MAX, MESSAGE_BYTES_MAX};
use crate::text;

/// One job's progress, shared with its work.
#[derive(Debug, Default)]
pub struct JobProgress {
    /// Bytes worked through.
    pub bytes: AtomicU64,
    /// Bytes that were new to the store, as stored, of all tries.
    pub stored: AtomicU64,
    /// Bytes that the store was found to have no room for; 0: no more than any pack needs.
    pub wanted: AtomicU64,
    doing: Mutex<String>,
    notes: Mutex<Vec<String>>,
    cancelled: CancellationToken,
    /// Whether what is left to do is short, and must not be left half done.
    ending: AtomicBool,
}

impl JobProgress {
    /// Says what it does now.
    pub fn doing(&self, what: impl Into<String>) {
        *self.doing.lock() = what.into();
    }

    /// Says something that is to be known beside the answer.
    pub fn note(&self, what: impl Into<String>) {
        let mut notes = self.notes.lock();
        match notes.len().cmp(&JOB_NOTES_MAX) {
            Ordering::Less => notes.push(text::prefix(&what.into(), MESSAGE_BYTES_MAX).into()),
            Ordering::Equal => notes.push("there is more to note than is kept".into()),
            Ordering::Greater => {}
        }
    }

    /// Fails once somebody cancelled the job. Work asks this often, and before each step that takes
    /// long.
    pub fn check(&self) -> Result<(), Fault> {
        if self.cancelled.is_cancelled() {
            Err(cancelled())
        } else {
            Ok(())
        }
    }

    /// Does `work`, and gives it up when somebody cancels the job.
    pub async fn or_cancelled<T>(
        &self,
        work: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        self.cancelled
            .run_until_cancelled(work)
            .await
            .unwrap_or_else(|| Err(cancelled()))
    }

    /// [`JobProgress::check`], after which the job is not cancelled any more: what it has to show
    /// for itself becomes visible now.
    pub fn end(&self) -> Result<(), Fault> {
        self.ending.store(true, Atomic::SeqCst);
        self.check()
    }

    /// What it does now.
    pub fn what(&self) -> String {
        self.doing.lock().clone()
    }

    /// What was noted.
    pub fn notes(&self) -> Vec<String> {
        self.notes.lock().clone()
    }

    /// Asks the work to end.
    pub fn cancel(&self) {
        self.cancelled.cancel();
    }

    /// Whether somebody asked the work to end.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.is_cancelled()
    }

    /// Waits until somebody asks the work to end.
    pub async fn cancelled(&self) {
        self.cancelled.cancelled().await;
    }

    /// Whether the work passed [`JobProgress::end`].
    pub fn is_ending(&self) -> bool {
        self.ending.load(Atomic::SeqCst)
    }
}

/// The fault of work that somebody cancelled.
pub fn cancelled() -> Fault {
    Fault::partial("the job was cancelled")
        .with_reason(Reason::CancelledByUser)
        .with_next("run the command again to begin it anew")
}

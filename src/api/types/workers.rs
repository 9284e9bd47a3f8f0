//! The background work of a daemon.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A background worker of this daemon. All counts begin at 0 when the daemon starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Worker {
    /// Its name, for example `relay-flush`.
    pub name: String,
    /// `running`: it serves whatever comes in; `idle`: it waits for its next iteration; `busy`: an
    /// iteration is in progress; `failed`: its last iteration failed, or it ended unexpectedly and
    /// is about to be restarted; `ended`: its work is complete.
    pub state: String,
    /// When its last iteration ended.
    pub last_iteration: Option<String>,
    /// Iterations that ended, with success or with an error.
    pub iterations: u64,
    /// Errors, including those that did not end an iteration.
    pub errors: u64,
    /// How often it was restarted because it had ended unexpectedly.
    pub restarts: u64,
    /// The last error, which may be in the past.
    pub last_error: Option<WorkerError>,
    /// What is wrong with it now and what to do, as `doctor` reports it.
    pub problem: Option<String>,
}

/// The last error of a worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WorkerError {
    /// When.
    pub at: String,
    /// What happened.
    pub message: String,
    /// What to do.
    pub next: String,
}

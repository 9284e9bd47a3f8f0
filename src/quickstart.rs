//! A hub and two sites on this machine. (The lead's; here only so that the command line compiles.)

use std::path::PathBuf;

use crate::fault::Fault;

/// Runs it.
pub async fn run(_dir: Option<PathBuf>, _once: bool) -> Result<(), Fault> {
    Err(Fault::internal("not built"))
}

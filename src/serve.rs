//! The daemon. (The lead's; here only so that the command line compiles.)

use crate::config::Config;
use crate::fault::Fault;

/// Runs the daemon until it is told to stop.
pub async fn run(config: Config) -> Result<(), Fault> {
    let _ = config;
    Err(Fault::internal("not built"))
}

/// Enrols a site.
pub async fn join(_config: &Config, _hub: &str, _token: &str) -> Result<(), Fault> {
    Err(Fault::internal("not built"))
}

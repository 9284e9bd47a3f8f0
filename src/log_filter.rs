//! The filter of the log, which can be changed while the daemon runs.
//!
//! `PACKHORSE_LOG` sets it for any command. Without it, a daemon takes `[log] filter` of its
//! configuration, at its start and again at each SIGHUP.

use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;

use base::fault::Fault;
use base::spans;

/// The crates of the program.
pub const CRATES: [&str; 10] = [
    "packhorse",
    "base",
    "content",
    "exchange",
    "model",
    "registry",
    "sink",
    "source",
    "state",
    "transport",
];
/// The filter of a daemon.
pub const OF_DAEMON: &str = "warn,packhorse=info";

/// Replaces the filter of the running log.
type Replace = Box<dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync>;

static REPLACE: OnceLock<Replace> = OnceLock::new();

/// Keeps the handle of the log, which is set once per process.
pub fn keep(replace: Replace) {
    // A second log (in tests) has no effect either.
    let _ = REPLACE.set(replace);
}

/// The filter of the environment, which nothing replaces.
pub fn of_environment() -> Option<String> {
    std::env::var("PACKHORSE_LOG")
        .ok()
        .filter(|filter| !filter.is_empty())
}

/// Parses a filter. `packhorse` in it means all crates of the program. It keeps all spans, so that
/// each line has its fields.
pub fn parse(filter: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(expanded(filter)).map_err(|error| error.to_string())
}

/// The filter with all crates of the program for `packhorse`.
pub fn expanded(filter: &str) -> String {
    let each = |directive: &str| match directive.trim().strip_prefix("packhorse") {
        Some(level) if level.is_empty() || level.starts_with('=') => {
            CRATES.map(|name| format!("{name}{level}")).join(",")
        }
        _ => directive.to_owned(),
    };
    let all = filter.split(',').map(each).collect::<Vec<_>>().join(",");
    format!("{all},{}=info", spans::TARGET)
}

/// Uses the filter of the configuration, or the default one, unless the environment has one.
/// Returns whether it is used.
pub fn set_configured(filter: Option<&str>) -> Result<bool, Fault> {
    if of_environment().is_some() {
        return Ok(false);
    }
    let Some(replace) = REPLACE.get() else {
        return Ok(false);
    };
    let wrong = |why: String| Fault::config(format!("[log] filter is not a valid filter: {why}"));
    let parsed = parse(filter.unwrap_or(OF_DAEMON)).map_err(wrong)?;
    replace(parsed).map_err(|why| Fault::internal(format!("the log filter: {why}")))?;
    Ok(true)
}

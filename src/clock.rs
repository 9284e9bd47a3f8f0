//! The only place that reads the wall clock, so that all times have one form.

use jiff::Timestamp;

/// Now.
pub fn now() -> Timestamp {
    Timestamp::now()
}

/// RFC 3339 in UTC with milliseconds, the form of every time that a machine reads.
pub fn rfc3339(at: Timestamp) -> String {
    format!("{at:.3}")
}

/// Now, in that form.
pub fn now_rfc3339() -> String {
    rfc3339(now())
}

/// Milliseconds since 1970.
pub fn now_unix_ms() -> u64 {
    now().as_millisecond().unsigned_abs()
}

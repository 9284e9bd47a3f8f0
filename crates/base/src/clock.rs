//! The only module that reads the wall clock. It also defines the text form of all times.

use std::time::Duration;

use jiff::Timestamp;

pub fn now() -> Timestamp {
    Timestamp::now()
}

/// RFC 3339 in UTC with milliseconds: the form of every time that a program reads.
pub fn rfc3339(at: Timestamp) -> String {
    format!("{at:.3}")
}

/// Formats milliseconds since 1970 as [`rfc3339`] does. Returns an empty text if the value is
/// outside the calendar.
pub fn rfc3339_ms(ms: i64) -> String {
    Timestamp::from_millisecond(ms)
        .map(rfc3339)
        .unwrap_or_default()
}

/// The current time, formatted as [`rfc3339`] does.
pub fn now_rfc3339() -> String {
    rfc3339(now())
}

/// Milliseconds since 1970, for a field that cannot be negative.
pub fn now_unix_ms() -> u64 {
    now().as_millisecond().unsigned_abs()
}

/// Milliseconds since 1970, as the rows of a catalogue store them.
pub fn now_ms() -> i64 {
    now().as_millisecond()
}

/// A duration for people: `2 d 3 h`, `1 h 5 min`, `90 s`.
pub fn span(difference: Duration) -> String {
    let seconds = difference.as_secs();
    match seconds {
        86_400.. => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
        3600.. => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{seconds} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_short() {
        let texts = [0, 59, 3661, 86_400 * 2 + 3600 * 5].map(|s| span(Duration::from_secs(s)));
        assert_eq!(texts, ["0 s", "59 s", "1 h 1 min", "2 d 5 h"]);
    }
}

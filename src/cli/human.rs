//! Numbers and times in the form for people. Output for programs does not use this module.

use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::api::types::{State, Transfer};
use base::text::is_unsafe;
pub(crate) use base::text::size as bytes;

/// `12 MiB/s`; a dash for zero.
pub(super) fn rate(bytes_per_second: u64) -> String {
    if bytes_per_second == 0 {
        "-".into()
    } else {
        format!("{}/s", bytes(bytes_per_second))
    }
}

/// `45s`, `3m 20s`, `2h 05m`, `3d 04h`.
pub(crate) fn seconds(count: u64) -> String {
    let (days, hours, minutes) = (count / 86_400, count / 3600 % 24, count / 60 % 60);
    match count {
        0..60 => format!("{count}s"),
        60..3600 => format!("{minutes}m {:02}s", count % 60),
        3600..86_400 => format!("{hours}h {minutes:02}m"),
        _ => format!("{days}d {hours:02}h"),
    }
}

/// The progress of a transfer, by the bytes committed at the site. 100 only when it is done; `None`
/// before its size is known.
pub(super) fn percent(transfer: &Transfer) -> Option<u64> {
    match transfer.state {
        State::Done => Some(100),
        _ => share(transfer.bytes.committed, transfer.bytes.total),
    }
}

/// `part` of `whole` in whole percent, rounded down and 99 at most.
pub(super) fn share(part: u64, whole: u64) -> Option<u64> {
    let hundredths = u128::from(part) * 100;
    hundredths
        .checked_div(u128::from(whole))
        .map(|p| p.min(99) as u64)
}

/// A time of the API as local time.
pub(super) fn local(rfc3339: &str) -> String {
    in_zone(rfc3339, TimeZone::system())
}

fn in_zone(rfc3339: &str, zone: TimeZone) -> String {
    match rfc3339.parse::<Timestamp>() {
        Ok(at) => at.to_zoned(zone).strftime("%Y-%m-%d %H:%M:%S").to_string(),
        Err(_) => clean(rfc3339),
    }
}

/// The text without characters that control a terminal: file names and texts of peers can contain
/// any character.
pub(crate) fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if is_unsafe(c) { '\u{fffd}' } else { c })
        .collect()
}

/// [`clean`], with line ends kept and the following lines indented.
pub(super) fn clean_lines(text: &str) -> String {
    text.lines().map(clean).collect::<Vec<_>>().join("\n    ")
}

/// Whether the environment allows colours (<https://no-color.org>).
pub(super) fn colour_wanted() -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_rounded_down() {
        let texts: Vec<String> = [
            0,
            1023,
            1024,
            1536,
            10 << 20,
            (1 << 30) - 1,
            3 << 30,
            u64::MAX,
        ]
        .into_iter()
        .map(bytes)
        .collect();
        assert_eq!(
            texts,
            [
                "0 B",
                "1023 B",
                "1.0 KiB",
                "1.5 KiB",
                "10 MiB",
                "1023 MiB",
                "3.0 GiB",
                "16383 PiB"
            ]
        );
        let texts: Vec<String> = [0, 59, 60, 200, 7500, 100_000]
            .into_iter()
            .map(seconds)
            .collect();
        assert_eq!(texts, ["0s", "59s", "1m 00s", "3m 20s", "2h 05m", "1d 03h"]);
        assert_eq!(share(999, 1000), Some(99));
        assert_eq!(share(1000, 1000), Some(99));
        assert_eq!(share(u64::MAX, u64::MAX), Some(99));
        assert_eq!(share(0, 0), None);
    }

    #[test]
    fn times_are_local_and_texts_harmless() {
        let zone = TimeZone::fixed(jiff::tz::offset(8));
        assert_eq!(
            in_zone("2026-11-23T18:30:00.123Z", zone.clone()),
            "2026-11-24 02:30:00"
        );
        assert_eq!(in_zone("yester\u{1b}[2Jday", zone), "yester\u{fffd}[2Jday");
        assert_eq!(clean_lines("a\nb\u{7}\u{202e}"), "a\n    b\u{fffd}\u{fffd}");
    }
}

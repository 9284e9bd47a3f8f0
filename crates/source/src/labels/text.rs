//! The text of records: what databases can hold, and what encoding it is in when it is not UTF-8.

use std::io::Read;
use std::path::Path;

use crate::inside::Inside;
use base::fault::{Fault, IoContext};
use base::limits::LABEL_SIDE_FILE_BYTES_MAX;

use super::refuse::{Refusals, Why};

/// The bytes as text, or a refusal that names the encoding they seem to be in. Raw NULs are refused
/// too.
pub(super) fn text<'a>(bytes: &'a [u8], place: &str, refusals: &mut Refusals) -> Option<&'a str> {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            refusals.add(Why::Utf8, place, not_utf8(bytes, error.valid_up_to()));
            return None;
        }
    };
    if text.contains('\0') {
        refusals.add(Why::Nul, place, "it holds a NUL character");
        return None;
    }
    Some(text)
}

/// Says where bytes stop being UTF-8, and what they look like.
pub(super) fn not_utf8(bytes: &[u8], valid_up_to: usize) -> String {
    let guess = if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        "; the text looks like UTF-16"
    } else if looks_like_gbk(bytes) {
        "; the text looks like GBK"
    } else {
        ""
    };
    format!("byte {valid_up_to} of the record is not UTF-8{guess}")
}

/// Whether all that is not ASCII comes in pairs as GBK writes them: a lead of 0x81–0xFE, then
/// 0x40–0xFE but 0x7F.
fn looks_like_gbk(bytes: &[u8]) -> bool {
    let mut bytes = bytes.iter();
    let mut pairs = 0;
    while let Some(&lead) = bytes.next() {
        if lead < 0x80 {
            continue;
        }
        match bytes.next() {
            Some(&trail)
                if (0x81..=0xfe).contains(&lead)
                    && (0x40..=0xfe).contains(&trail)
                    && trail != 0x7f =>
            {
                pairs += 1;
            }
            _ => return false,
        }
    }
    pairs > 0
}

/// A small file beside the labels, whole, without a byte order mark. What is wrong with its text is
/// a fault.
pub(super) fn side_file(inside: &Inside, path: &Path) -> Result<String, Fault> {
    let mut refusals = Refusals::default();
    let text = one_of_many(
        inside,
        path,
        &inside.full(path).display().to_string(),
        &mut refusals,
    )?;
    refusals.check()?;
    Ok(text.unwrap_or_default())
}

/// The same for one of many files: what is wrong with its text is refused, and the next file can be
/// read.
pub(super) fn one_of_many(
    inside: &Inside,
    path: &Path,
    place: &str,
    refusals: &mut Refusals,
) -> Result<Option<String>, Fault> {
    let at = || format!("read {}", inside.full(path).display());
    let mut bytes = Vec::new();
    inside
        .file(path)?
        .take(LABEL_SIDE_FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .at(at())?;
    if bytes.len() as u64 > LABEL_SIDE_FILE_BYTES_MAX {
        refusals.add(
            Why::TooLarge,
            place,
            format_args!("the file is larger than {LABEL_SIDE_FILE_BYTES_MAX} bytes"),
        );
        return Ok(None);
    }
    let text = text(&bytes, place, refusals);
    Ok(text.map(|text| text.strip_prefix('\u{feff}').unwrap_or(text).to_owned()))
}

/// The text as a JSON string, quotes included.
pub(super) fn json_string(text: &str) -> String {
    // Text always serialises.
    serde_json::to_string(text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodings_are_named() {
        let gbk = [b'a', 0xc8, 0xb1, 0xcf, 0xdd];
        assert!(not_utf8(&gbk, 1).ends_with("GBK"));
        assert!(not_utf8(&[0xff, 0xfe, b'a', 0], 0).ends_with("UTF-16"));
        assert!(not_utf8(&[b'a', 0xc3], 1).ends_with("not UTF-8"));
        let mut refusals = Refusals::default();
        assert_eq!(text("缺陷".as_bytes(), "x", &mut refusals), Some("缺陷"));
        assert_eq!(text(b"a\0b", "x", &mut refusals), None);
        assert_eq!(refusals.count(Why::Nul), 1);
    }
}

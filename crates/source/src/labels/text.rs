//! The text of records: what databases can hold, and what encoding it is in when it is not UTF-8.

use std::io::Read;
use std::path::Path;

use crate::inside::Inside;
use base::fault::{Fault, IoContext};
use base::limits::LABEL_SIDE_FILE_BYTES_MAX;

use super::collect::Collector;
use super::encoding::{Decoded, decode, looks_like_gbk};
use super::refuse::{Refusals, Why};
use super::xml;

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

/// A small file beside the labels, whole, without a byte order mark. What is wrong with its text is
/// a fault.
pub(super) fn side_file(
    inside: &Inside,
    path: &Path,
    collector: &mut Collector,
) -> Result<String, Fault> {
    let bytes = bounded(inside, path)?;
    let mut refusals = Refusals::default();
    let place = inside.full(path).display().to_string();
    let text = bytes.and_then(|bytes| whole(&bytes, &place, None, collector, &mut refusals));
    refusals.check()?;
    text.ok_or_else(|| {
        Fault::integrity(format!(
            "{place} is larger than {LABEL_SIDE_FILE_BYTES_MAX} bytes"
        ))
        .with_next(Why::TooLarge.advice())
    })
}

/// The same for one of many XML files: what is wrong with its text is refused, and the next file
/// can be read.
pub(super) fn xml_file(
    inside: &Inside,
    path: &Path,
    place: &str,
    collector: &mut Collector,
) -> Result<Option<String>, Fault> {
    let mut refusals = std::mem::take(&mut collector.refusals);
    let text = bounded(inside, path).map(|bytes| match bytes {
        Some(bytes) => {
            let declared = xml::declared_encoding(&bytes);
            whole(&bytes, place, declared, collector, &mut refusals)
        }
        None => {
            let detail = format_args!("the file is larger than {LABEL_SIDE_FILE_BYTES_MAX} bytes");
            refusals.add(Why::TooLarge, place, detail);
            None
        }
    });
    collector.refusals = refusals;
    text
}

/// The file's bytes; `None` when there are too many.
fn bounded(inside: &Inside, path: &Path) -> Result<Option<Vec<u8>>, Fault> {
    let mut bytes = Vec::new();
    let at = || format!("read {}", inside.full(path).display());
    inside
        .file(path)?
        .take(LABEL_SIDE_FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .at(at())?;
    Ok((bytes.len() as u64 <= LABEL_SIDE_FILE_BYTES_MAX).then_some(bytes))
}

/// The text of a whole file.
fn whole(
    bytes: &[u8],
    place: &str,
    declared: Option<&str>,
    collector: &mut Collector,
    refusals: &mut Refusals,
) -> Option<String> {
    let known = declared.and_then(|declared| declared.parse().ok());
    let text = match decode(bytes, collector.encoding, known) {
        Decoded::Text(text, inferred) => {
            collector.note_encoding(place, inferred);
            text
        }
        Decoded::Invalid(encoding) => {
            refusals.add(
                Why::Utf8,
                place,
                format_args!("its bytes are not {encoding}"),
            );
            return None;
        }
        Decoded::Unknown => {
            let valid_up_to =
                std::str::from_utf8(bytes).map_or_else(|error| error.valid_up_to(), str::len);
            let mut detail = not_utf8(bytes, valid_up_to);
            if let Some(declared) = declared.filter(|_| known.is_none()) {
                detail.push_str(&format!(
                    "; it declares the encoding {declared:?}, which is not known"
                ));
            }
            refusals.add(Why::Utf8, place, detail);
            return None;
        }
    };
    if text.contains('\0') {
        refusals.add(Why::Nul, place, "it holds a NUL character");
        return None;
    }
    Some(text.into_owned())
}

/// The text as a JSON string, quotes included.
pub(super) fn json_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
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

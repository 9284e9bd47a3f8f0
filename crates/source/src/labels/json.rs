//! JSON of any length in a fixed amount of memory: the file is cut into records, each record
//! checked and compacted.
//!
//! [`JsonReader`] walks the outer objects and lists and captures one value at a time, without white
//! space, bounded in bytes and depth; what is over a bound is skipped, so that the next record can
//! still be read. [`Fields`] takes a captured object apart without copying; its parse is the one
//! that proves the syntax.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::io::BufRead;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use base::fault::{Fault, IoContext};
use base::limits::{LABEL_DEPTH_MAX, LABEL_RECORD_BYTES_MAX};

use super::refuse::{Refusals, Why};
use super::text;

/// What was noticed while a value was captured.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flags {
    too_large: bool,
    /// How many bytes the value may have.
    bytes_max: usize,
    too_deep: bool,
    /// A number has an exponent, so it may be beyond what a float holds.
    exponent: bool,
}

/// Reads the outer structure of a JSON file.
pub(super) struct JsonReader<R> {
    inner: R,
    what: String,
    offset: u64,
    /// How many bytes a captured value may have.
    pub(super) record_bytes_max: usize,
}

impl<R: BufRead> JsonReader<R> {
    /// A reader; `what` names the file in errors.
    pub(super) fn new(inner: R, what: impl Into<String>) -> Self {
        Self {
            inner,
            what: what.into(),
            offset: 0,
            record_bytes_max: LABEL_RECORD_BYTES_MAX,
        }
    }

    /// The next byte that is not white space (nor a byte order mark at the start), left where it
    /// is.
    pub(super) fn peek(&mut self) -> Result<Option<u8>, Fault> {
        loop {
            let buf = self
                .inner
                .fill_buf()
                .at(format_args!("read {}", self.what))?;
            if buf.is_empty() {
                return Ok(None);
            }
            let mut skip = if self.offset == 0 && buf.starts_with(&[0xef, 0xbb, 0xbf]) {
                3
            } else {
                0
            };
            if self.offset == 0
                && (buf.starts_with(&[0xff, 0xfe]) || buf.starts_with(&[0xfe, 0xff]))
            {
                return Err(self
                    .fault("the text looks like UTF-16, not UTF-8")
                    .with_next(Why::Utf8.advice()));
            }
            skip += buf[skip..]
                .iter()
                .take_while(|b| b.is_ascii_whitespace())
                .count();
            let next = buf.get(skip).copied();
            self.consume(skip);
            if next.is_some() {
                return Ok(next);
            }
        }
    }

    /// A fault at this place in the file, which ends the reading.
    pub(super) fn fault(&self, why: impl fmt::Display) -> Fault {
        Fault::integrity(format!("malformed JSON at byte {}: {why}", self.offset))
            .with_next(Why::Malformed.advice())
    }

    fn consume(&mut self, n: usize) {
        self.inner.consume(n);
        self.offset += n as u64;
    }

    /// Takes this byte, which must come next.
    pub(super) fn expect(&mut self, byte: u8) -> Result<(), Fault> {
        match self.peek()? {
            Some(found) if found == byte => {
                self.consume(1);
                Ok(())
            }
            Some(found) => Err(self.fault(format!(
                "'{}' expected, '{}' found",
                char::from(byte).escape_debug(),
                char::from(found).escape_debug()
            ))),
            None => Err(self.fault(format!(
                "the file ends where '{}' is expected: it is cut off",
                char::from(byte)
            ))),
        }
    }

    /// Goes on to the next member of a list or object that was opened: false when it is closed here
    /// by `close`.
    pub(super) fn more(&mut self, first: &mut bool, close: u8) -> Result<bool, Fault> {
        if self.peek()? == Some(close) {
            self.consume(1);
            return Ok(false);
        }
        if !std::mem::take(first) {
            self.expect(b',')?;
            if self.peek()? == Some(close) {
                return Err(self.fault(format!("'{}' right after a comma", char::from(close))));
            }
        }
        Ok(true)
    }

    /// A key and its colon.
    pub(super) fn key(&mut self) -> Result<String, Fault> {
        if self.peek()? != Some(b'"') {
            return Err(self.fault("a key in quotes is expected"));
        }
        let mut key = Vec::new();
        self.capture(&mut key)?;
        self.expect(b':')?;
        serde_json::from_slice(&key)
            .map_err(|error| self.fault(format!("a key is not a string: {error}")))
    }

    /// Nothing but white space may follow.
    pub(super) fn end(&mut self) -> Result<(), Fault> {
        match self.peek()? {
            None => Ok(()),
            Some(_) => Err(self.fault("something follows the end of the document")),
        }
    }

    /// Takes the next value into `out` without its white space. The syntax inside is not checked,
    /// only brackets and quotes are followed; over a limit the rest is skipped and flagged.
    pub(super) fn capture(&mut self, out: &mut Vec<u8>) -> Result<Flags, Fault> {
        out.clear();
        if matches!(self.peek()?, None | Some(b',' | b':' | b']' | b'}')) {
            return Err(self.fault("a value is expected"));
        }
        let mut state = Capture::default();
        state.flags.bytes_max = self.record_bytes_max;
        loop {
            let buf = self
                .inner
                .fill_buf()
                .at(format_args!("read {}", self.what))?;
            if buf.is_empty() {
                let whole = state.depth == 0 && !state.in_string;
                return if whole {
                    Ok(state.flags)
                } else {
                    Err(self.fault("the file ends within a value: it is cut off"))
                };
            }
            let (used, done) = state.feed(buf, out);
            self.consume(used);
            if done {
                return Ok(state.flags);
            }
        }
    }
}

/// Where a capture stands between two buffers.
#[derive(Default)]
struct Capture {
    flags: Flags,
    depth: u32,
    in_string: bool,
    escaped: bool,
    /// White space was left out right before this.
    gap: bool,
}

impl Capture {
    /// Follows the bytes of one buffer: how many belong to the value, and whether it ended.
    fn feed(&mut self, buf: &[u8], out: &mut Vec<u8>) -> (usize, bool) {
        let mut at = 0;
        while at < buf.len() {
            let start = at;
            if self.in_string {
                at += self.string_part(&buf[at..]);
                self.keep(&buf[start..at], out);
                if !self.in_string && self.depth == 0 {
                    return (at, true);
                }
                continue;
            }
            match buf[at] {
                b' ' | b'\n' | b'\r' | b'\t' => {
                    if self.depth == 0 {
                        return (at, true);
                    }
                    self.gap = true;
                    at += 1;
                    continue;
                }
                b',' | b':' | b']' | b'}' if self.depth == 0 => return (at, true),
                b',' | b':' => at += 1,
                b'"' => {
                    self.in_string = true;
                    at += 1;
                }
                b'{' | b'[' => {
                    self.depth += 1;
                    self.flags.too_deep |= self.depth > LABEL_DEPTH_MAX;
                    at += 1;
                }
                b'}' | b']' => {
                    self.depth -= 1;
                    at += 1;
                    if self.depth == 0 {
                        self.keep(&buf[start..at], out);
                        return (at, true);
                    }
                }
                _ => {
                    let before = out.last().copied().filter(|b| is_word(*b));
                    if self.gap && before.is_some() {
                        // White space between two bare words must not make one word of them.
                        self.keep(b" ", out);
                    }
                    let word = buf[at..].iter().take_while(|b| is_word(**b)).count().max(1);
                    at += word;
                    let mut before = before;
                    for byte in &buf[start..at] {
                        self.flags.exponent |= matches!(byte, b'e' | b'E')
                            && before.is_some_and(|b| b.is_ascii_digit());
                        before = Some(*byte);
                    }
                }
            }
            self.gap = false;
            self.keep(&buf[start..at], out);
        }
        (at, false)
    }

    /// How many bytes belong to the string that is open; closes it at its quote.
    fn string_part(&mut self, buf: &[u8]) -> usize {
        for (at, byte) in buf.iter().enumerate() {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => {
                    self.in_string = false;
                    return at + 1;
                }
                _ => {}
            }
        }
        buf.len()
    }

    fn keep(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        if out.len() + bytes.len() > self.flags.bytes_max {
            self.flags.too_large = true;
        } else if !self.flags.too_large {
            out.extend_from_slice(bytes);
        }
    }
}

fn is_word(byte: u8) -> bool {
    !matches!(
        byte,
        b' ' | b'\n' | b'\r' | b'\t' | b',' | b':' | b'{' | b'}' | b'[' | b']' | b'"'
    )
}

/// A captured record as text that a database can hold, or a refusal.
pub(super) fn vet<'a>(
    record: &'a [u8],
    flags: Flags,
    place: &str,
    refusals: &mut Refusals,
) -> Option<&'a str> {
    if flags.too_large {
        refusals.add(
            Why::TooLarge,
            place,
            format!("it is larger than {} bytes", flags.bytes_max),
        );
        return None;
    }
    if flags.too_deep {
        refusals.add(
            Why::TooDeep,
            place,
            format!("it is nested deeper than {LABEL_DEPTH_MAX}"),
        );
        return None;
    }
    let text = text::text(record, place, refusals)?;
    if let Err((why, detail)) = check_escapes(text) {
        refusals.add(why, place, detail);
        return None;
    }
    if let Some(word) = not_finite(text, flags.exponent) {
        refusals.add(Why::NotFinite, place, format!("it holds {word}"));
        return None;
    }
    Some(text)
}

/// JSON text from inside another format (a cell of a CSV), vetted and compacted.
pub(super) fn compact(text: &str, place: &str, refusals: &mut Refusals) -> Option<String> {
    let mut out = Vec::new();
    let mut reader = JsonReader::new(text.as_bytes(), place);
    let captured = reader
        .capture(&mut out)
        .and_then(|flags| reader.end().map(|()| flags));
    let flags = match captured {
        Ok(flags) => flags,
        Err(fault) => {
            refusals.add(Why::Malformed, place, fault);
            return None;
        }
    };
    let text = vet(&out, flags, place, refusals)?;
    match serde_json::from_str::<&RawValue>(text) {
        Ok(_) => Some(text.to_owned()),
        Err(error) => {
            refusals.add(Why::Malformed, place, error);
            None
        }
    }
}

/// Escapes that no database text can hold: NUL, and halves of a surrogate pair.
fn check_escapes(text: &str) -> Result<(), (Why, &'static str)> {
    let bytes = text.as_bytes();
    let unit = |at: usize| {
        let digits = text.get(at + 2..at + 6)?;
        (bytes.get(at..at + 2) == Some(br"\u"))
            .then(|| u16::from_str_radix(digits, 16).ok())
            .flatten()
    };
    let mut at = 0;
    while let Some(found) = bytes[at..].iter().position(|b| *b == b'\\') {
        at += found;
        match unit(at) {
            Some(0) => return Err((Why::Nul, r"it holds a NUL character (\u0000)")),
            Some(0xd800..=0xdbff) if matches!(unit(at + 6), Some(0xdc00..=0xdfff)) => at += 12,
            Some(0xd800..=0xdfff) => return Err((Why::Utf8, "it holds half of a surrogate pair")),
            _ => at += 2,
        }
        if at >= bytes.len() {
            break;
        }
    }
    Ok(())
}

/// The first bare word that stands for no finite number: what Python writes for NaN, and numbers
/// beyond a float.
fn not_finite(text: &str, exponents: bool) -> Option<&str> {
    // Both words hold a capital that JSON's own words do not, so most records are done after one
    // look.
    let suspicious = exponents || text.bytes().any(|b| b == b'N' || b == b'I');
    if !suspicious {
        return None;
    }
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] == b'"' {
            at += 1;
            while at < bytes.len() && bytes[at] != b'"' {
                at += if bytes[at] == b'\\' { 2 } else { 1 };
            }
            at += 1;
        } else if is_word(bytes[at]) {
            let length = bytes[at..].iter().take_while(|b| is_word(**b)).count();
            let word = &text[at..at + length];
            // `parse` takes NaN and the infinities in every spelling, and makes an infinity of
            // 1e999.
            if word.parse::<f64>().is_ok_and(|n| !n.is_finite()) {
                return Some(word);
            }
            at += length;
        } else {
            at += 1;
        }
    }
    None
}

/// An object's members in order, values as the text they are.
#[derive(Debug)]
pub(super) struct Fields<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> Fields<'a> {
    /// Takes a vetted record apart; what is wrong with it is noted.
    pub(super) fn parse(text: &'a str, place: &str, refusals: &mut Refusals) -> Option<Self> {
        match serde_json::from_str(text) {
            Ok(fields) => Some(fields),
            Err(error) => {
                let why = if error.is_data() {
                    Why::Shape
                } else {
                    Why::Malformed
                };
                refusals.add(why, place, error);
                None
            }
        }
    }

    /// Takes a member out; `None` when it is missing or null.
    pub(super) fn take(&mut self, name: &str) -> Option<&'a str> {
        let at = self.0.iter().position(|(key, _)| key == name)?;
        let (_, value) = self.0.remove(at);
        Some(value.get()).filter(|text| *text != "null")
    }

    /// A member that stays where it is; `None` when it is missing or null.
    pub(super) fn peek(&self, name: &str) -> Option<&'a str> {
        let (_, value) = self.0.iter().find(|(key, _)| key == name)?;
        Some(value.get()).filter(|text| *text != "null")
    }

    /// The values of all members.
    pub(super) fn into_values(self) -> Vec<&'a RawValue> {
        self.0.into_iter().map(|(_, value)| value).collect()
    }

    /// What was not taken, as a compact JSON object; `None` when nothing is left.
    pub(super) fn rest(&self) -> Option<String> {
        let mut out = String::new();
        for (key, value) in &self.0 {
            out.push(if out.is_empty() { '{' } else { ',' });
            out.push_str(&text::json_string(key));
            out.push(':');
            out.push_str(value.get());
        }
        (!out.is_empty()).then(|| out + "}")
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Fields<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members: Vec<(Cow<'de, str>, &'de RawValue)> = Vec::with_capacity(8);
                let mut seen = HashSet::new();
                while let Some(Key(key)) = map.next_key::<Key<'de>>()? {
                    // Few members, the usual case, are compared faster than hashed.
                    let twice = match members.len() {
                        0..32 => members.iter().any(|(other, _)| *other == key),
                        32 => {
                            seen.extend(members.iter().map(|(other, _)| other.clone()));
                            !seen.insert(key.clone())
                        }
                        _ => !seen.insert(key.clone()),
                    };
                    if twice {
                        return Err(de::Error::custom(format!("the key {key:?} comes twice")));
                    }
                    members.push((key, map.next_value()?));
                }
                Ok(Fields(members))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// A key, borrowed from the record unless it holds an escape.
struct Key<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Key<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Key<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }
            fn visit_borrowed_str<E: de::Error>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Borrowed(text)))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// A JSON value that is a string.
pub(super) fn as_string(json: &str) -> Option<String> {
    serde_json::from_str(json).ok()
}

/// A JSON value that is a number. Parsed exactly, where `serde_json` may be one unit in the last
/// place off.
pub(super) fn as_number(json: &str) -> Option<f64> {
    let first = *json.as_bytes().first()?;
    if first == b'-' || first.is_ascii_digit() {
        json.parse().ok()
    } else {
        None
    }
}

/// A JSON value that is a whole number; 640.0 is one.
pub(super) fn as_integer(json: &str) -> Option<i64> {
    if let Ok(n) = json.parse() {
        return Some(n);
    }
    let n = as_number(json)?;
    // Beyond 2^53 a float no longer names one integer.
    (n.fract() == 0.0 && n.abs() <= 9_007_199_254_740_992.0).then_some(n as i64)
}

/// The numbers of a compact list, of lists in lists too, in order; `None` when there is anything
/// else in it.
pub(super) fn as_numbers(json: &str) -> Option<Vec<f64>> {
    if !json.starts_with('[') {
        return None;
    }
    json.split([',', '[', ']'])
        .filter(|part| !part.is_empty())
        .map(as_number)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture(text: &[u8], buffer: usize) -> Result<(String, Flags, u64), Fault> {
        let mut out = Vec::new();
        let mut reader = JsonReader::new(std::io::BufReader::with_capacity(buffer, text), "x");
        let flags = reader.capture(&mut out)?;
        Ok((String::from_utf8(out).unwrap(), flags, reader.offset))
    }

    #[test]
    fn values_are_cut_and_compacted_at_any_buffer_size() {
        for (text, expected) in [
            (
                "  {\"a\" : [1, 2.5e3, \"x \\\" ] y\"] , \"b\":{ } } ,",
                "{\"a\":[1,2.5e3,\"x \\\" ] y\"],\"b\":{}}",
            ),
            ("12 ,", "12"),
            ("true]", "true"),
            ("\"a\\\\\" ", "\"a\\\\\""),
            ("[1 2, tr ue, \"a\" 1]", "[1 2,tr ue,\"a\"1]"),
            ("\u{feff}[]", "[]"),
            ("[\"缺 陷\" ]", "[\"缺 陷\"]"),
        ] {
            for buffer in [3, 4, 5, 7, 64] {
                assert_eq!(
                    capture(text.as_bytes(), buffer).unwrap().0,
                    expected,
                    "{text:?} with {buffer}"
                );
            }
        }
        for bad in ["", "  ", ",", "[1", "\"a", "{\"a\":\"\\\""] {
            assert!(capture(bad.as_bytes(), 4).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn limits_skip_the_record_and_no_more() {
        let large = format!("[\"{}\"]", "x".repeat(LABEL_RECORD_BYTES_MAX));
        let (text, flags, offset) = capture(large.as_bytes(), 4096).unwrap();
        assert!(
            flags.too_large && text.len() <= LABEL_RECORD_BYTES_MAX && offset == large.len() as u64
        );
        let deep = "[".repeat(129) + &"]".repeat(129);
        assert!(capture(deep.as_bytes(), 4096).unwrap().1.too_deep);
        let fair = "[".repeat(128) + &"]".repeat(128);
        assert!(!capture(fair.as_bytes(), 4096).unwrap().1.too_deep);
    }

    #[test]
    fn records_that_no_database_holds() {
        for (text, why) in [
            (&br#"{"a":"\u0000"}"#[..], Why::Nul),
            (b"{\"a\":\"\0\"}", Why::Nul),
            (br#"{"a":"\ud800x"}"#, Why::Utf8),
            (br#"{"a":"\udc00\ud800"}"#, Why::Utf8),
            (b"{\"a\":\"\xff\"}", Why::Utf8),
            (br#"{"a":NaN}"#, Why::NotFinite),
            (br#"{"a":[-Infinity]}"#, Why::NotFinite),
            (br#"{"a":1e999}"#, Why::NotFinite),
            (br#"{"a":1,}"#, Why::Malformed),
            (br#"{"a":01}"#, Why::Malformed),
            (br#"{"a":1,"a":2}"#, Why::Shape),
            (br#"{"a":1,"\u0061":2}"#, Why::Shape),
            (br#"[1]"#, Why::Shape),
        ] {
            let mut refusals = Refusals::default();
            let mut out = Vec::new();
            let flags = JsonReader::new(text, "x").capture(&mut out).unwrap();
            let ok = vet(&out, flags, "x", &mut refusals)
                .and_then(|text| Fields::parse(text, "x", &mut refusals))
                .is_some();
            assert!(
                !ok && refusals.count(why) == 1,
                "{}: {:?}",
                String::from_utf8_lossy(text),
                refusals.check()
            );
        }
        let mut refusals = Refusals::default();
        for good in [
            r#"{"NaN":"Infinity 1e999 \\u0000 \ud83d\ude00"}"#,
            r#"{"Info":1e3,"e":"\""}"#,
        ] {
            assert_eq!(compact(good, "x", &mut refusals).as_deref(), Some(good));
        }
    }

    #[test]
    fn fields_and_numbers() {
        let mut refusals = Refusals::default();
        let many: String = (0..100).map(|n| format!("\"k{n}\":{n},")).collect();
        let text = format!("{{{many}\"z\":null}}");
        let mut fields = Fields::parse(&text, "x", &mut refusals).unwrap();
        assert_eq!(
            (fields.take("k7"), fields.take("z"), fields.take("z")),
            (Some("7"), None, None)
        );
        assert!(fields.rest().unwrap().starts_with("{\"k0\":0,"));
        assert!(Fields::parse(&format!("{{{many}\"k0\":1}}"), "x", &mut refusals).is_none());
        assert_eq!(as_numbers("[[1,2.5],[-3e1]]"), Some(vec![1.0, 2.5, -30.0]));
        assert_eq!(
            (as_numbers("[1,\"a\"]"), as_numbers("1"), as_numbers("[]")),
            (None, None, Some(vec![]))
        );
        assert_eq!(
            (as_integer("640.0"), as_integer("1.5"), as_integer("\"1\"")),
            (Some(640), None, None)
        );
        assert_eq!(as_number("0.30000000000000004"), Some(0.1 + 0.2));
    }
}

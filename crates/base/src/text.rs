//! Text from outside: limited in length, and without characters that could disguise what is
//! displayed.
//!
//! Peers, registries and training platforms send messages, versions and locations. [`Text`] parses
//! such a text: it cuts the text to its limit at a character boundary, and replaces control
//! characters and bidirectional overrides with U+FFFD. The rest is never stored. Text that this
//! daemon writes itself uses the same type, so that all readers of a field find the same form.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{self, DeserializeOwned, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::limits::{LOCATION_BYTES_MAX, MESSAGE_BYTES_MAX, NEXT_BYTES_MAX, VERSION_BYTES_MAX};

/// Whether a character can move the cursor, start a control sequence, or change the order in which
/// other characters are displayed.
pub fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// The longest prefix of at most `max` bytes that ends at a character boundary.
pub fn prefix(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}

fn clean(text: &str, max: usize, keep: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len().min(max));
    for c in text.chars() {
        let c = if is_unsafe(c) && !keep(c) {
            char::REPLACEMENT_CHARACTER
        } else {
            c
        };
        if out.len() + c.len_utf8() > max {
            break;
        }
        out.push(c);
    }
    out
}

/// One line of at most `max` bytes, without unsafe characters.
pub fn line(text: &str, max: usize) -> String {
    clean(text, max, |_| false)
}

/// Lines of at most `max` bytes in total. Line ends and tabs are kept; unsafe characters are
/// replaced.
pub fn lines(text: &str, max: usize) -> String {
    clean(text, max, |c| matches!(c, '\n' | '\t'))
}

/// A text of at most `MAX` bytes without unsafe characters, except line ends and tabs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize)]
#[serde(transparent)]
pub struct Text<const MAX: usize>(String);

impl<const MAX: usize> Text<MAX> {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<const MAX: usize> std::ops::Deref for Text<MAX> {
    type Target = str;
    fn deref(&self) -> &str {
        &self.0
    }
}

impl<const MAX: usize> fmt::Display for Text<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<const MAX: usize> From<&str> for Text<MAX> {
    fn from(text: &str) -> Self {
        Self(lines(text, MAX))
    }
}

impl<const MAX: usize> From<String> for Text<MAX> {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

impl<const MAX: usize> From<Text<MAX>> for String {
    fn from(text: Text<MAX>) -> String {
        text.0
    }
}

impl<const MAX: usize> PartialEq<str> for Text<MAX> {
    fn eq(&self, other: &str) -> bool {
        self.0 == other
    }
}

impl<'de, const MAX: usize> Deserialize<'de> for Text<MAX> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_str(TextVisitor::<MAX>)
    }
}

/// Shortens the text while it is parsed, so that a long text without escapes is never copied
/// completely.
struct TextVisitor<const MAX: usize>;

impl<const MAX: usize> Visitor<'_> for TextVisitor<MAX> {
    type Value = Text<MAX>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }
    fn visit_str<E: de::Error>(self, text: &str) -> Result<Text<MAX>, E> {
        Ok(text.into())
    }
}

/// For a field of type `String` that a peer fills in: `#[serde(deserialize_with =
/// "text::bounded::<_, MAX>")]`.
pub fn bounded<'de, D: Deserializer<'de>, const MAX: usize>(d: D) -> Result<String, D::Error> {
    Text::<MAX>::deserialize(d).map(Into::into)
}

/// Like [`bounded`], for an optional field.
pub fn optional<'de, D: Deserializer<'de>, const MAX: usize>(
    d: D,
) -> Result<Option<String>, D::Error> {
    Ok(Option::<Text<MAX>>::deserialize(d)?.map(Into::into))
}

/// A message: what happened and why.
pub type Message = Text<MESSAGE_BYTES_MAX>;
/// What to do next.
pub type Next = Text<NEXT_BYTES_MAX>;
/// The location of an artifact.
pub type Location = Text<LOCATION_BYTES_MAX>;
pub type Version = Text<VERSION_BYTES_MAX>;

/// Text of at most `MAX` bytes that must not be changed, because a signature covers it or it is
/// decoded. A longer text is an error. Not for display.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Exact<const MAX: usize>(String);

impl<const MAX: usize> Exact<MAX> {
    /// Returns `None` if the text is too long.
    pub fn new(text: String) -> Option<Self> {
        (text.len() <= MAX).then_some(Self(text))
    }

    pub fn empty() -> Self {
        Self(String::new())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<'de, const MAX: usize> Deserialize<'de> for Exact<MAX> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct ExactVisitor<const MAX: usize>;
        impl<const MAX: usize> Visitor<'_> for ExactVisitor<MAX> {
            type Value = Exact<MAX>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a text of at most {MAX} bytes")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Exact<MAX>, E> {
                if text.len() > MAX {
                    return Err(E::invalid_length(text.len(), &self));
                }
                Ok(Exact(text.into()))
            }
        }
        d.deserialize_str(ExactVisitor)
    }
}

/// A value, or `None` if the data has a different form. Other data is skipped without using memory.
/// For self-describing formats only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lenient<T>(pub Option<T>);

impl<'de, T: FromText> Deserialize<'de> for Lenient<T> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(LenientVisitor(PhantomData))
    }
}

/// A type that [`Lenient`] can read from a text.
pub trait FromText: Sized {
    /// Returns `None` if the text is not valid.
    fn from_text(text: &str) -> Option<Self>;
}

impl<const MAX: usize> FromText for Exact<MAX> {
    fn from_text(text: &str) -> Option<Self> {
        (text.len() <= MAX).then(|| Self(text.into()))
    }
}

struct LenientVisitor<T>(PhantomData<T>);

impl<'de, T: FromText> Visitor<'de> for LenientVisitor<T> {
    type Value = Lenient<T>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything")
    }
    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Lenient(T::from_text(text)))
    }
    fn visit_bool<E: de::Error>(self, _: bool) -> Result<Self::Value, E> {
        Ok(Lenient(None))
    }
    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Self::Value, E> {
        Ok(Lenient(None))
    }
    fn visit_u64<E: de::Error>(self, _: u64) -> Result<Self::Value, E> {
        Ok(Lenient(None))
    }
    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Self::Value, E> {
        Ok(Lenient(None))
    }
    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(Lenient(None))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        skip_seq(&mut seq)?;
        Ok(Lenient(None))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Lenient(None))
    }
}

/// Reads a list to its end and discards it.
pub fn skip_seq<'de, A: SeqAccess<'de>>(seq: &mut A) -> Result<(), A::Error> {
    while seq.next_element::<IgnoredAny>()?.is_some() {}
    Ok(())
}

/// Parses a message of a peer. The error describes the problem without the content that the peer
/// sent.
pub fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|e| line(&e.to_string(), 300))
}

/// Refuses JSON with more values than `max` before they take memory: a value of one byte costs some
/// hundred bytes once it is parsed. Returns the number of values. Each value but the first follows
/// one of three characters; the same characters inside strings count too.
pub fn check_values(json: &[u8], max: usize) -> Result<(), usize> {
    let begins = |byte: &&u8| matches!(byte, b',' | b'[' | b'{');
    let values = json.iter().filter(begins).count();
    if values <= max { Ok(()) } else { Err(values) }
}

/// `512 B`, `1.5 GiB`, `40 MiB`: rounded down, so that no value looks larger than it is.
pub fn size(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let power = (count.ilog2() / 10).min(UNITS.len() as u32);
    let unit = UNITS[power as usize - 1];
    let tenths = (u128::from(count) * 10) >> (10 * power);
    if tenths < 100 {
        format!("{}.{} {unit}", tenths / 10, tenths % 10)
    } else {
        format!("{} {unit}", tenths / 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Short = Text<8>;

    #[test]
    fn json_of_too_many_values_is_refused() {
        let json = br#"{"a":[1,"x",{}]}"#;
        assert_eq!(check_values(json, 5), Ok(()));
        assert_eq!(check_values(json, 4), Err(5));
    }

    #[test]
    fn a_text_is_cut_and_cleaned_when_it_is_parsed() {
        let parsed = |json: &str| serde_json::from_str::<Short>(json).unwrap().to_string();
        assert_eq!(parsed("\"short\""), "short");
        assert_eq!(parsed("\"0123456789\""), "01234567");
        assert_eq!(parsed("\"0123456ä\""), "0123456", "no part of a character");
        assert_eq!(parsed("\"a\\u001bb\\u202e\""), "a\u{fffd}b\u{fffd}");
        assert_eq!(parsed("\"a\\nb\\tc\""), "a\nb\tc");
        assert!(
            serde_json::from_str::<Short>("[0,1]").is_err()
                && serde_json::from_str::<Short>("7").is_err()
        );
        assert_eq!(line("a\nb\u{2066}\u{7}", 99), "a\u{fffd}b\u{fffd}\u{fffd}");
        for text in ["\u{202e}\u{200f}\u{9b}31m\u{7f}", "plain ä 图"] {
            assert!(!lines(text, 999).contains(is_unsafe));
        }
        assert_eq!(prefix("aä", 2), "a");
    }

    #[test]
    fn an_exact_text_that_is_too_long_is_refused() {
        assert_eq!(
            serde_json::from_str::<Exact<3>>("\"a\\u001bb\"")
                .unwrap()
                .as_str(),
            "a\u{1b}b"
        );
        assert!(serde_json::from_str::<Exact<3>>("\"abcd\"").is_err());
        assert!(Exact::<3>::new("abcd".into()).is_none());
        for (json, there) in [
            ("\"abc\"", true),
            ("\"abcd\"", false),
            ("{\"a\":[1]}", false),
            ("[[]]", false),
            ("null", false),
            ("1.5", false),
        ] {
            assert_eq!(
                serde_json::from_str::<Lenient<Exact<3>>>(json)
                    .unwrap()
                    .0
                    .is_some(),
                there,
                "{json}"
            );
        }
    }

    #[test]
    fn a_parse_error_contains_no_unsafe_characters() {
        #[derive(Debug, Deserialize)]
        enum One {
            #[expect(dead_code, reason = "only its name is read")]
            A(u8),
        }
        let error = parse_json::<One>(
            format!("{{\"\\u001b]0;\\u202e{}\":1}}", "x".repeat(5000)).as_bytes(),
        )
        .unwrap_err();
        assert!(
            error.len() <= 300 && !error.contains(is_unsafe),
            "{error:?}"
        );
    }
}

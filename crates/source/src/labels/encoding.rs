//! The character encoding of label files: named by the user, declared by the file, or inferred from
//! its bytes.
//!
//! The rule, for every format: a byte order mark decides; else the encoding that the user named;
//! else UTF-8, if the bytes are valid UTF-8; else the encoding that the file declares (XML); else
//! UTF-16 or GBK, if the bytes look like it. An inferred encoding is reported. Bytes that are in
//! none of these are refused by the reader of the record.

use std::borrow::Cow;
use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;
use std::str::FromStr;

use encoding_rs::{DecoderResult, Encoding, GB18030, UTF_8, UTF_16BE, UTF_16LE};

use base::fault::Fault;

/// How much of a file is looked at when its encoding is inferred, and decoded at once.
const BLOCK_BYTES: usize = 64 << 10;
/// What stands for a byte sequence that its encoding does not have: no UTF-8 text holds this byte,
/// so the record is refused.
const INVALID: u8 = 0xff;

/// An encoding that text can be read in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TextEncoding(&'static Encoding);

impl FromStr for TextEncoding {
    type Err = Fault;
    fn from_str(label: &str) -> Result<Self, Fault> {
        let plain = label.trim().to_ascii_lowercase().replace('_', "-");
        // Names that Python and Windows use, beside those of the standard.
        let known = match plain.as_str() {
            "cp936" | "ms936" | "windows-936" | "936" => "gbk",
            "cp65001" | "utf-8-sig" | "utf8-sig" => "utf-8",
            "utf16" => "utf-16",
            "utf-16-le" | "utf16le" => "utf-16le",
            "utf-16-be" | "utf16be" => "utf-16be",
            "latin-1" => "latin1",
            "cp950" => "big5",
            "cp932" => "shift_jis",
            "cp949" => "euc-kr",
            other => other,
        };
        let found = Encoding::for_label_no_replacement(known.as_bytes());
        found.map(Self).ok_or_else(|| {
            let shown: String = label.chars().take(60).collect();
            Fault::usage(format!("there is no text encoding {shown:?}")).with_next(
                "name one such as utf-8, gbk, gb18030, big5, shift_jis, utf-16le or windows-1252",
            )
        })
    }
}

/// What bytes mean.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decoded<'a> {
    /// Text, without its byte order mark; and its encoding, where that was inferred.
    Text(Cow<'a, str>, Option<&'static str>),
    /// They are not in this encoding, which the user or the file named.
    Invalid(&'static str),
    /// They are in no encoding that could be inferred.
    Unknown,
}

/// Decodes a whole small file.
pub(super) fn decode(
    bytes: &[u8],
    given: Option<TextEncoding>,
    declared: Option<TextEncoding>,
) -> Decoded<'_> {
    let strictly = |encoding: &'static Encoding, bytes, inferred| match encoding
        .decode_without_bom_handling_and_without_replacement(bytes)
    {
        Some(text) => Decoded::Text(text, inferred),
        None => Decoded::Invalid(encoding.name()),
    };
    if let Some((encoding, mark)) = Encoding::for_bom(bytes) {
        // UTF-8 that is not valid goes on, so that the record at fault is named.
        match strictly(encoding, &bytes[mark..], None) {
            Decoded::Invalid(_) if encoding == UTF_8 => return Decoded::Unknown,
            decoded => return decoded,
        }
    }
    if let Some(given) = given {
        return strictly(given.0, bytes, None);
    }
    if let Some(utf16) = looks_like_utf16(bytes) {
        return strictly(utf16, bytes, Some(utf16.name()));
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        let other = declared.filter(|declared| declared.0 != UTF_8 && !bytes.is_ascii());
        return Decoded::Text(Cow::Borrowed(text), other.map(|_| UTF_8.name()));
    }
    if let Some(declared) = declared.filter(|declared| declared.0 != UTF_8) {
        return strictly(declared.0, bytes, None);
    }
    if looks_like_gbk(bytes)
        && let Decoded::Text(text, _) = strictly(GB18030, bytes, None)
    {
        return Decoded::Text(text, Some(GBK));
    }
    Decoded::Unknown
}

/// How GB 18030 is called in reports: most files are in its older part.
const GBK: &str = "GBK";

/// UTF-16 without a mark: text of which many characters are ASCII has a NUL in every second byte.
fn looks_like_utf16(bytes: &[u8]) -> Option<&'static Encoding> {
    let head = &bytes[..bytes.len().min(BLOCK_BYTES) & !1];
    if head.len() < 4 || !head.contains(&0) {
        return None;
    }
    let nuls = |at: usize| {
        head.iter()
            .skip(at)
            .step_by(2)
            .filter(|byte| **byte == 0)
            .count()
    };
    let (first, second, units) = (nuls(0), nuls(1), head.len() / 2);
    match () {
        () if second * 2 > units && first * 20 < second => Some(UTF_16LE),
        () if first * 2 > units && second * 20 < first => Some(UTF_16BE),
        () => None,
    }
}

/// Whether all that is not ASCII comes in pairs as GBK writes them (a lead of 0x81–0xFE, then
/// 0x40–0xFE but 0x7F), and nearly all of them in its common part (GB 2312), which text in other
/// encodings rarely keeps to. A pair cut off at the end counts as one.
pub(super) fn looks_like_gbk(bytes: &[u8]) -> bool {
    let mut bytes = bytes.iter().copied();
    let (mut pairs, mut common) = (0u64, 0u64);
    while let Some(lead) = bytes.next() {
        if lead < 0x80 {
            continue;
        }
        let Some(trail) = bytes.next() else { break };
        let is_pair =
            (0x81..=0xfe).contains(&lead) && (0x40..=0xfe).contains(&trail) && trail != 0x7f;
        // The longer sequences of GB 18030: four bytes, the second a digit.
        let is_long = (0x81..=0xfe).contains(&lead) && trail.is_ascii_digit();
        if is_long {
            if !matches!(bytes.next(), None | Some(0x81..=0xfe))
                || !matches!(bytes.next(), None | Some(b'0'..=b'9'))
            {
                return false;
            }
        } else if !is_pair {
            return false;
        }
        pairs += 1;
        common += u64::from((0xa1..=0xf7).contains(&lead) && trail >= 0xa1);
    }
    common > 0 && common * 10 >= pairs * 9
}

/// Reads a file of any length as UTF-8. What is not text of its encoding is given as a byte that is
/// not UTF-8, so that the record with it is refused and the next one can be read.
pub(super) struct Utf8Reader<R> {
    inner: R,
    state: State,
    /// Read and not decoded yet.
    block: Vec<u8>,
    ready: Vec<u8>,
    at: usize,
    ended: bool,
    found: Inferred,
}

/// The encoding that a [`Utf8Reader`] inferred, once it did.
#[derive(Debug, Clone, Default)]
pub(super) struct Inferred(Rc<Cell<Option<&'static str>>>);

impl Inferred {
    /// The encoding's name; `None` for UTF-8 and for one that was not inferred.
    pub(super) fn name(&self) -> Option<&'static str> {
        self.0.get()
    }
}

enum State {
    /// Nothing was read.
    Start(Option<TextEncoding>),
    /// ASCII so far.
    Ascii,
    /// UTF-8, or nothing that is known: bytes go through as they are.
    Plain,
    Convert(Box<encoding_rs::Decoder>),
}

impl<R: Read> Utf8Reader<R> {
    pub(super) fn new(inner: R, given: Option<TextEncoding>) -> Self {
        Self {
            inner,
            state: State::Start(given),
            block: Vec::new(),
            ready: Vec::new(),
            at: 0,
            ended: false,
            found: Inferred::default(),
        }
    }

    /// A handle on what it will infer.
    pub(super) fn inferred(&self) -> Inferred {
        self.found.clone()
    }

    /// Reads until the block is full, or to the end of the file.
    fn fill(&mut self) -> io::Result<()> {
        let wanted = (BLOCK_BYTES - self.block.len().min(BLOCK_BYTES)) as u64;
        let read = (&mut self.inner)
            .take(wanted)
            .read_to_end(&mut self.block)?;
        self.ended = (read as u64) < wanted;
        Ok(())
    }

    /// Decodes the next block.
    fn step(&mut self) -> io::Result<()> {
        self.fill()?;
        if let State::Start(given) = self.state {
            self.state = self.begin(given);
        }
        if matches!(self.state, State::Ascii) {
            let ascii = self.block.iter().take_while(|byte| byte.is_ascii()).count();
            // Of a few bytes at the end of a block nothing can be inferred: they wait for the next
            // block.
            if ascii < self.block.len()
                && (ascii == 0 || self.ended || self.block.len() - ascii > 256)
            {
                self.state = self.infer(ascii);
            } else {
                self.ready.extend(self.block.drain(..ascii));
                return Ok(());
            }
        }
        match &mut self.state {
            State::Convert(decoder) => {
                let mut from = 0;
                loop {
                    let room =
                        decoder.max_utf8_buffer_length_without_replacement(self.block.len() - from);
                    let start = self.ready.len();
                    self.ready
                        .resize(start + room.unwrap_or(4 * BLOCK_BYTES), 0);
                    let (result, read, written) = decoder.decode_to_utf8_without_replacement(
                        &self.block[from..],
                        &mut self.ready[start..],
                        self.ended,
                    );
                    self.ready.truncate(start + written);
                    from += read;
                    match result {
                        DecoderResult::InputEmpty => break,
                        DecoderResult::OutputFull => {}
                        DecoderResult::Malformed(..) => self.ready.push(INVALID),
                    }
                }
                self.block.clear();
            }
            State::Start(_) | State::Ascii | State::Plain => self.ready.append(&mut self.block),
        }
        Ok(())
    }

    /// What the beginning of the file says.
    fn begin(&self, given: Option<TextEncoding>) -> State {
        let convert =
            |encoding: &'static Encoding| State::Convert(Box::new(encoding.new_decoder()));
        if let Some((encoding, _)) = Encoding::for_bom(&self.block) {
            return if encoding == UTF_8 {
                State::Plain
            } else {
                convert(encoding)
            };
        }
        if let Some(given) = given {
            return if given.0 == UTF_8 {
                State::Plain
            } else {
                convert(given.0)
            };
        }
        match looks_like_utf16(&self.block) {
            Some(utf16) => {
                self.found.0.set(Some(utf16.name()));
                convert(utf16)
            }
            None => State::Ascii,
        }
    }

    /// What the first bytes that are not ASCII say; they begin here.
    fn infer(&self, from: usize) -> State {
        let bytes = &self.block[from..];
        let is_utf8 = match std::str::from_utf8(bytes) {
            Ok(_) => true,
            Err(error) => error.error_len().is_none(),
        };
        if !is_utf8 && looks_like_gbk(bytes) {
            self.found.0.set(Some(GBK));
            return State::Convert(Box::new(GB18030.new_decoder_without_bom_handling()));
        }
        State::Plain
    }
}

impl<R: Read> Read for Utf8Reader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.at == self.ready.len() {
            self.ready.clear();
            self.at = 0;
            if self.ended && self.block.is_empty() {
                return Ok(0);
            }
            self.step()?;
        }
        let n = buf.len().min(self.ready.len() - self.at);
        buf[..n].copy_from_slice(&self.ready[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GBK_TEXT: &[u8] = b"a,\xc8\xb1\xcf\xdd\n";

    fn streamed(bytes: &[u8], given: Option<&str>) -> (Vec<u8>, Option<&'static str>) {
        let given = given.map(|label| label.parse().unwrap());
        let mut reader = Utf8Reader::new(bytes, given);
        let found = reader.inferred();
        let mut out = Vec::new();
        reader.read_to_end(&mut out).unwrap();
        (out, found.name())
    }

    fn utf16(text: &str, big: bool) -> Vec<u8> {
        let order = |unit: u16| {
            if big {
                unit.to_be_bytes()
            } else {
                unit.to_le_bytes()
            }
        };
        text.encode_utf16().flat_map(order).collect()
    }

    #[test]
    fn names_of_python_and_windows() {
        for (label, name) in [
            ("utf8", "UTF-8"),
            ("UTF_8", "UTF-8"),
            ("utf-8-sig", "UTF-8"),
            ("gb2312", "GBK"),
            ("GB18030", "gb18030"),
            ("cp936", "GBK"),
            ("ISO-8859-1", "windows-1252"),
            ("latin_1", "windows-1252"),
            ("utf_16", "UTF-16LE"),
            ("cp950", "Big5"),
        ] {
            assert_eq!(
                label.parse::<TextEncoding>().unwrap().0.name(),
                name,
                "{label}"
            );
        }
        for bad in ["", "klingon", "utf-7", "hz-gb-2312"] {
            assert!(bad.parse::<TextEncoding>().is_err(), "{bad}");
        }
    }

    #[test]
    fn whole_files() {
        let text = |text: &str, inferred| Decoded::Text(Cow::Owned(text.to_owned()), inferred);
        let gbk = "gbk".parse().ok();
        assert_eq!(decode(GBK_TEXT, None, None), text("a,缺陷\n", Some("GBK")));
        assert_eq!(decode(GBK_TEXT, gbk, None), text("a,缺陷\n", None));
        assert_eq!(decode(GBK_TEXT, None, gbk), text("a,缺陷\n", None));
        // A declaration over bytes that are valid UTF-8 is wrong, and of no consequence over ASCII.
        assert_eq!(
            decode("缺陷".as_bytes(), None, gbk),
            text("缺陷", Some("UTF-8"))
        );
        assert_eq!(decode(b"abc", None, gbk), text("abc", None));
        assert_eq!(decode("缺陷".as_bytes(), None, None), text("缺陷", None));
        assert_eq!(
            decode("\u{feff}缺".as_bytes(), None, None),
            text("缺", None)
        );
        assert_eq!(
            decode(
                &[b"\xff\xfe", utf16("缺x", false).as_slice()].concat(),
                None,
                None
            ),
            text("缺x", None)
        );
        for (big, name) in [(false, "UTF-16LE"), (true, "UTF-16BE")] {
            assert_eq!(
                decode(&utf16("abc,缺d", big), None, None),
                text("abc,缺d", Some(name))
            );
        }
        assert_eq!(decode(b"caf\xe9 1", None, None), Decoded::Unknown);
        assert_eq!(
            decode(b"caf\xe9 1", "latin1".parse().ok(), None),
            text("café 1", None)
        );
        assert_eq!(decode(b"caf\xe9 1", gbk, None), Decoded::Invalid("GBK"));
        assert_eq!(decode(b"a\0b", None, None), text("a\0b", None));
    }

    #[test]
    fn files_of_any_length() {
        let long = "x".repeat(BLOCK_BYTES - 3);
        let gb = |text: &str| GB18030.encode(text).0.into_owned();
        for lead in ["", "a", "ab", "abc", "abcd"] {
            let text = format!("{lead}{long}划痕,缺陷\n{long}凹坑\n");
            assert_eq!(
                streamed(text.as_bytes(), None),
                (text.clone().into_bytes(), None)
            );
            assert_eq!(
                streamed(&gb(&text), None),
                (text.clone().into_bytes(), Some("GBK"))
            );
            assert_eq!(
                streamed(&gb(&text), Some("gb2312")),
                (text.clone().into_bytes(), None)
            );
            assert_eq!(
                streamed(&utf16(&text, false), None),
                (text.clone().into_bytes(), Some("UTF-16LE"))
            );
            assert_eq!(
                streamed(&utf16(&text, true), Some("utf-16be")),
                (text.into_bytes(), None)
            );
        }
        assert_eq!(streamed(b"", None), (Vec::new(), None));
        assert_eq!(
            streamed(b"a\xc8", None),
            (b"a\xc8".to_vec(), None),
            "nothing is inferred of half a character"
        );
        // One bad sequence spoils its record and no other.
        let (out, _) = streamed(b"a\xc8\xb1\n\xff\xff\nb\xcf\xdd\n", Some("gbk"));
        let lines: Vec<&[u8]> = out.split(|byte| *byte == b'\n').collect();
        assert_eq!((lines[0], lines[2]), ("a缺".as_bytes(), "b陷".as_bytes()));
        assert!(std::str::from_utf8(lines[1]).is_err());
    }
}

//! The words of a KLARF file, one at a time.
//!
//! Words are separated by white space; `;` ends a statement unless it is in quotes. In version 1.8
//! braces and commas are words too. A word is bounded in bytes.

use std::io::BufRead;

use base::fault::{Fault, IoContext};
use base::limits::LABEL_RECORD_BYTES_MAX;

use super::refuse::Why;

/// The longest word, in bytes.
const WORD_BYTES_MAX: usize = 64 << 10;

/// A word, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Word {
    pub(super) text: String,
    /// It was in quotes, so it is no sign and no keyword.
    pub(super) quoted: bool,
    pub(super) line: u64,
}

impl Word {
    /// Whether it is this sign or keyword.
    pub(super) fn is(&self, text: &str) -> bool {
        !self.quoted && self.text.eq_ignore_ascii_case(text)
    }
}

/// Reads words.
pub(super) struct Words<R> {
    inner: R,
    what: String,
    line: u64,
    /// Braces and commas are words.
    pub(super) has_braces: bool,
    back: Option<Word>,
}

impl<R: BufRead> Words<R> {
    pub(super) fn new(inner: R, what: impl Into<String>) -> Self {
        Self {
            inner,
            what: what.into(),
            line: 1,
            has_braces: false,
            back: None,
        }
    }

    /// A fault at this line, which ends the reading.
    pub(super) fn fault(&self, why: impl std::fmt::Display) -> Fault {
        Fault::integrity(format!("malformed KLARF at line {}: {why}", self.line))
            .with_next(Why::Malformed.advice())
    }

    /// Counts a word that is kept in memory with others: of one statement, defect or row.
    pub(super) fn keep(&self, word: &Word, bytes: &mut usize) -> Result<(), Fault> {
        *bytes += word.text.len() + size_of::<Word>();
        if *bytes > LABEL_RECORD_BYTES_MAX {
            return Err(self.fault(format!(
                "a statement or row is larger than {LABEL_RECORD_BYTES_MAX} bytes"
            )));
        }
        Ok(())
    }

    /// Gives a word back, to be read again.
    pub(super) fn push_back(&mut self, word: Word) {
        self.back = Some(word);
    }

    /// The next word, where the file must go on.
    pub(super) fn need(&mut self) -> Result<Word, Fault> {
        let word = self.next()?;
        word.ok_or_else(|| self.fault("the file ends without EndOfFile: it is cut off"))
    }

    /// Takes this sign or keyword, which must come next.
    pub(super) fn expect(&mut self, text: &str) -> Result<(), Fault> {
        let word = self.need()?;
        match word.is(text) {
            true => Ok(()),
            false => Err(self.fault(format!("{text:?} expected, {:?} found", shown(&word.text)))),
        }
    }

    /// The next word; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<Word>, Fault> {
        if let Some(word) = self.back.take() {
            return Ok(Some(word));
        }
        let Some(first) = self.after_space()? else {
            return Ok(None);
        };
        let line = self.line;
        let mut bytes = Vec::new();
        let quoted = first == b'"';
        if quoted {
            loop {
                match self.byte()? {
                    None => return Err(self.fault("a quote is not closed")),
                    Some(b'"') => break,
                    Some(byte) => self.push(&mut bytes, byte)?,
                }
            }
        } else {
            bytes.push(first);
            while !self.is_sign(first) {
                let next = self.peek()?;
                match next {
                    Some(byte)
                        if !byte.is_ascii_whitespace() && byte != b'"' && !self.is_sign(byte) =>
                    {
                        self.byte()?;
                        self.push(&mut bytes, byte)?;
                    }
                    _ => break,
                }
            }
        }
        let text = String::from_utf8(bytes).map_err(|_| {
            self.fault("its text is not UTF-8")
                .with_next(Why::Utf8.advice())
        })?;
        if text.contains('\0') {
            return Err(self
                .fault("it holds a NUL character")
                .with_next(Why::Nul.advice()));
        }
        Ok(Some(Word { text, quoted, line }))
    }

    fn is_sign(&self, byte: u8) -> bool {
        byte == b';' || (self.has_braces && matches!(byte, b'{' | b'}' | b','))
    }

    fn push(&self, bytes: &mut Vec<u8>, byte: u8) -> Result<(), Fault> {
        if bytes.len() >= WORD_BYTES_MAX {
            return Err(self.fault(format!("a word is longer than {WORD_BYTES_MAX} bytes")));
        }
        bytes.push(byte);
        Ok(())
    }

    fn peek(&mut self) -> Result<Option<u8>, Fault> {
        let buffer = self.inner.fill_buf();
        let buffer = buffer.at(format_args!("read {}", self.what))?;
        Ok(buffer.first().copied())
    }

    fn byte(&mut self) -> Result<Option<u8>, Fault> {
        let byte = self.peek()?;
        if byte.is_some() {
            self.inner.consume(1);
        }
        self.line += u64::from(byte == Some(b'\n'));
        Ok(byte)
    }

    /// Takes the first byte that is not white space.
    fn after_space(&mut self) -> Result<Option<u8>, Fault> {
        loop {
            match self.byte()? {
                Some(byte) if byte.is_ascii_whitespace() => {}
                // A byte order mark in front of the first word.
                Some(0xef) if self.line == 1 && self.peek()? == Some(0xbb) => {
                    self.byte()?;
                    self.byte()?;
                }
                byte => return Ok(byte),
            }
        }
    }
}

/// The beginning of a text, for a message.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(60).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_signs() {
        let all = |text: &str, has_braces: bool| {
            let mut words = Words::new(text.as_bytes(), "x");
            words.has_braces = has_braces;
            let mut out = Vec::new();
            while let Some(word) = words.next().unwrap() {
                out.push(format!(
                    "{}{}@{}",
                    word.text,
                    if word.quoted { "'" } else { "" },
                    word.line
                ));
            }
            out
        };
        assert_eq!(
            all("\u{feff}LotID \"批;01\"3;\n 1.5,2;", false),
            ["LotID@1", "批;01'@1", "3@1", ";@1", "1.5,2@2", ";@2"]
        );
        assert_eq!(
            all("a{b,c}\n\"\"", true),
            ["a@1", "{@1", "b@1", ",@1", "c@1", "}@1", "'@2"]
        );
        assert!(Words::new("\"a".as_bytes(), "x").next().is_err());
        let long = "x".repeat(WORD_BYTES_MAX + 1);
        assert!(Words::new(long.as_bytes(), "x").next().is_err());
    }
}

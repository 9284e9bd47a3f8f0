//! Changes of inputs: bits, bytes, numbers, words, lengths, repeats, and parts of other inputs.

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, RngCore as _};

/// No input is longer.
pub(crate) const INPUT_BYTES_MAX: usize = 64 << 10;
/// Changes of one input, at most.
const CHANGES_MAX: u32 = 6;
/// Levels of nesting that are put in at once: more than any stack of a parser should be asked to
/// hold.
const NESTING: usize = 3000;

const NUMBERS: [u64; 22] = [
    0,
    1,
    2,
    7,
    8,
    15,
    16,
    63,
    64,
    127,
    128,
    255,
    256,
    1023,
    4096,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX,
];

const TEXTS: [&str; 40] = [
    "-1",
    "0",
    "-0.0",
    "1e308",
    "1e309",
    "-1e309",
    "1e-400",
    "NaN",
    "Infinity",
    "9007199254740993",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775809",
    "0.1",
    "1.",
    ".5",
    "00",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "\\u0000",
    "\\ud800",
    "\u{0}",
    "\u{202e}",
    "\u{feff}",
    "\u{fffd}",
    "\u{e4}",
    "\u{65e5}",
    "..",
    ".",
    "/",
    "../x",
    "//",
    "\\",
    "\r\n",
    "\n",
    "\t",
    "%",
];

/// Changes inputs. The same generator and the same inputs give the same changes.
pub(crate) struct Mutator<'a> {
    pub(crate) rng: &'a mut StdRng,
    pub(crate) words: &'a [&'static str],
    pub(crate) others: &'a [Vec<u8>],
}

impl Mutator<'_> {
    /// Changes an input once or a few times.
    pub(crate) fn change(&mut self, input: &mut Vec<u8>) {
        for _ in 0..=self.rng.random_range(0..CHANGES_MAX) {
            self.once(input);
        }
        input.truncate(INPUT_BYTES_MAX);
    }

    fn once(&mut self, input: &mut Vec<u8>) {
        if input.is_empty() {
            let byte = self.rng.random();
            input.push(byte);
            return;
        }
        match self.rng.random_range(0..100) {
            0..10 => {
                let at = self.at(input);
                input[at] ^= 1 << self.rng.random_range(0..8);
            }
            10..18 => {
                let at = self.at(input);
                input[at] = self.rng.random();
            }
            18..24 => {
                let at = self.at(input);
                input[at] = *[0, 1, 0x20, 0x2f, 0x7f, 0x80, 0xfe, 0xff]
                    .choose(self.rng)
                    .unwrap_or(&0);
            }
            24..36 => self.number(input),
            36..44 => self.digits(input),
            44..50 => {
                let text = TEXTS.choose(self.rng).unwrap_or(&"");
                self.put(input, text.as_bytes());
            }
            50..64 => self.word(input),
            64..70 => {
                let (from, to) = self.range(input);
                input.drain(from..to);
            }
            70..78 => {
                let (from, to) = self.range(input);
                let part = input[from..to].to_vec();
                let times = if self.rng.random_ratio(1, 20) {
                    self.rng.random_range(2..200)
                } else {
                    1
                };
                let times = times.min(INPUT_BYTES_MAX / part.len().max(1));
                let at = self.at(input);
                input.splice(at..at, part.repeat(times));
            }
            78..88 => self.splice(input),
            88..92 => input.truncate(self.at(input)),
            92..96 => {
                let bytes: Vec<u8> = (0..self.rng.random_range(1..16))
                    .map(|_| self.rng.random())
                    .collect();
                self.put(input, &bytes);
            }
            96..98 => {
                let (from, to) = self.range(input);
                let (other, _) = self.range(input);
                let len = (to - from).min(input.len() - other);
                input.copy_within(from..from + len, other);
            }
            98 => {
                let open = *[&b"["[..], b"{\"a\":", b"<a>", b"(", b"a[", b"/"]
                    .choose(self.rng)
                    .unwrap_or(&&b"["[..]);
                self.put(input, &open.repeat(NESTING));
            }
            _ => {
                let len = self.rng.random_range(0..4096);
                let byte = self.rng.random();
                let at = self.at(input);
                input.splice(at..at, std::iter::repeat_n(byte, len));
            }
        }
    }

    fn at(&mut self, input: &[u8]) -> usize {
        self.rng.random_range(0..input.len().max(1))
    }

    /// A part of an input: often a short one.
    fn range(&mut self, input: &[u8]) -> (usize, usize) {
        let from = self.at(input);
        let most = input.len() - from;
        let most = if self.rng.random_ratio(3, 4) {
            most.min(16)
        } else {
            most
        };
        (from, from + self.rng.random_range(0..=most))
    }

    /// Puts bytes in, or over what is there.
    fn put(&mut self, input: &mut Vec<u8>, bytes: &[u8]) {
        let at = self.at(input);
        let end = if self.rng.random() {
            at
        } else {
            (at + bytes.len()).min(input.len())
        };
        input.splice(at..end, bytes.iter().copied());
    }

    fn word(&mut self, input: &mut Vec<u8>) {
        let Some(word) = self.words.choose(self.rng) else {
            return self.number(input);
        };
        // In the place of another word, where there is one.
        let starts: Vec<usize> = input
            .windows(2)
            .enumerate()
            .filter(|(_, w)| w[0] == b'"' && w[1] != b'"')
            .map(|(at, _)| at + 1)
            .collect();
        if let Some(&start) = starts.choose(self.rng)
            && self.rng.random()
            && let Some(len) = input[start..].iter().position(|&byte| byte == b'"')
        {
            input.splice(start..start + len, word.bytes());
            return;
        }
        self.put(input, word.as_bytes());
    }

    /// Writes a number over some bytes: of any width, in both byte orders, or as LEB128.
    fn number(&mut self, input: &mut Vec<u8>) {
        let number = match self.rng.random_range(0..4) {
            0 => self.rng.next_u64() >> self.rng.random_range(0..64),
            1 => input.len() as u64,
            _ => NUMBERS.choose(self.rng).copied().unwrap_or(0),
        };
        let number = number
            .wrapping_add(self.rng.random_range(0..3))
            .wrapping_sub(1);
        let bytes = number.to_le_bytes();
        let width = *[1, 2, 4, 8].choose(self.rng).unwrap_or(&4);
        match self.rng.random_range(0..5) {
            0 | 1 => self.over(input, &bytes[..width]),
            2 => self.over(input, &number.to_be_bytes()[8 - width..]),
            3 => {
                let (mut rest, mut out) = (number, Vec::new());
                while rest >= 0x80 {
                    out.push(rest as u8 | 0x80);
                    rest >>= 7;
                }
                out.push(rest as u8);
                self.put(input, &out);
            }
            _ => self.put(input, &bytes[..width]),
        }
    }

    fn over(&mut self, input: &mut [u8], bytes: &[u8]) {
        let at = self.at(input);
        for (to, from) in input[at..].iter_mut().zip(bytes) {
            *to = *from;
        }
    }

    /// Another number in the place of one that is written in digits.
    fn digits(&mut self, input: &mut Vec<u8>) {
        let is_digit = |at: usize| input.get(at).is_some_and(u8::is_ascii_digit);
        let starts: Vec<usize> = (0..input.len())
            .filter(|&at| is_digit(at) && (at == 0 || !is_digit(at - 1)))
            .collect();
        let Some(&start) = starts.choose(self.rng) else {
            return self.number(input);
        };
        let len = input[start..]
            .iter()
            .take_while(|byte| byte.is_ascii_digit())
            .count();
        let text = match self.rng.random_range(0..3) {
            0 => TEXTS[self.rng.random_range(0..17)].to_owned(),
            1 => NUMBERS.choose(self.rng).copied().unwrap_or(0).to_string(),
            _ => self.rng.random_range(0..40).to_string(),
        };
        input.splice(start..start + len, text.into_bytes());
    }

    /// A part of another input.
    fn splice(&mut self, input: &mut Vec<u8>) {
        let Some(other) = self.others.choose(self.rng) else {
            return;
        };
        let (from, to) = self.range(other);
        let part = other[from.min(other.len())..to.min(other.len())].to_vec();
        if self.rng.random_ratio(1, 4) {
            input.truncate(self.at(input));
            input.extend_from_slice(&other[from.min(other.len())..]);
        } else {
            self.put(input, &part);
        }
    }
}

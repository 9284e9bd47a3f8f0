//! The text of an access token: `phk_ID_SECRET` and a checksum.
//!
//! The checksum finds typing errors and random guesses before anything is looked up. It is no
//! secret: anybody can compute it. The secret has 256 random bits, so a plain hash of it is enough.

use std::fmt;

use rand::TryRngCore;

use base::fault::Fault;

/// The prefix, by which scanners for leaked secrets recognise a token.
const PREFIX: &str = "phk_";
/// Characters of an id: 60 bits.
const ID_CHARS: usize = 12;
/// Random bytes of a secret, and the characters that they take.
const SECRET_BYTES: usize = 32;
const SECRET_CHARS: usize = 43;
/// Characters of the checksum, which has 32 bits.
const CHECK_CHARS: usize = 6;
const ID_DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// A token with its secret. It exists only while it is created or presented.
pub(crate) struct TokenText(String);

impl fmt::Debug for TokenText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenText({}, …)", self.id())
    }
}

impl TokenText {
    /// A new one.
    pub(crate) fn generate() -> Result<Self, Fault> {
        let mut random = [0; SECRET_BYTES + ID_CHARS];
        rand::rngs::OsRng
            .try_fill_bytes(&mut random)
            .map_err(|e| Fault::internal(format!("no random bits from the system: {e}")))?;
        let (secret, id) = random.split_at(SECRET_BYTES);
        let id = id
            .iter()
            .map(|byte| char::from(ID_DIGITS[usize::from(byte & 31)]));
        let mut text: String = PREFIX.chars().chain(id).collect();
        text.push('_');
        text.push_str(&digits::<SECRET_CHARS>(secret));
        text.push_str(&checksum(&text));
        Ok(Self(text))
    }

    /// Parses a token, and verifies its checksum.
    pub(crate) fn parse(presented: &[u8]) -> Option<Self> {
        let length = PREFIX.len() + ID_CHARS + 1 + SECRET_CHARS + CHECK_CHARS;
        let text = std::str::from_utf8(presented)
            .ok()
            .filter(|text| text.len() == length && text.is_ascii())?;
        let (id, rest) = text.strip_prefix(PREFIX)?.split_at(ID_CHARS);
        let secret = rest.strip_prefix('_')?;
        let (start, check) = text.split_at(length - CHECK_CHARS);
        let is_well_formed = id.bytes().all(|c| ID_DIGITS.contains(&c))
            && secret.bytes().all(|c| c.is_ascii_alphanumeric())
            && checksum(start) == check;
        is_well_formed.then(|| Self(text.to_owned()))
    }

    /// Its id, which is no secret.
    pub(crate) fn id(&self) -> &str {
        &self.0[PREFIX.len()..PREFIX.len() + ID_CHARS]
    }

    /// The hash that the daemon stores.
    pub(crate) fn hash(&self) -> blake3::Hash {
        blake3::Hash::from(blake3::derive_key(
            "packhorse access token v1",
            self.0.as_bytes(),
        ))
    }

    /// The text, which is shown once.
    pub(crate) fn into_secret(self) -> String {
        self.0
    }
}

/// A number of many bytes in base 62, with leading zeros.
fn digits<const N: usize>(number: &[u8]) -> String {
    let mut number = number.to_vec();
    let mut out = [b'0'; N];
    for digit in out.iter_mut().rev() {
        let mut rest = 0u32;
        for byte in &mut number {
            let value = rest << 8 | u32::from(*byte);
            (*byte, rest) = ((value / 62) as u8, value % 62);
        }
        *digit = DIGITS[rest as usize];
    }
    out.map(char::from).iter().collect()
}

fn checksum(text: &str) -> String {
    let hash = blake3::hash(text.as_bytes());
    digits::<CHECK_CHARS>(&hash.as_bytes()[..4])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_found_again_by_its_parts_and_nothing_else_is_one() {
        let token = TokenText::generate().unwrap();
        let (id, hash) = (token.id().to_owned(), token.hash());
        assert!(!format!("{token:?}").contains(&token.0[20..]));
        let text = token.into_secret();
        assert_eq!(text.len(), 66, "{text}");
        let again = TokenText::parse(text.as_bytes()).unwrap();
        assert_eq!((again.id(), again.hash()), (id.as_str(), hash));
        assert_ne!(TokenText::generate().unwrap().hash(), hash);
        // Each single character that differs is noticed.
        for at in 0..text.len() {
            let mut wrong = text.clone().into_bytes();
            wrong[at] = if wrong[at] == b'x' { b'y' } else { b'x' };
            assert!(TokenText::parse(&wrong).is_none(), "{at}");
        }
        for wrong in [
            &text[1..],
            &format!("{text}0"),
            "",
            "phk_",
            &"phk_".repeat(20),
            &"ü".repeat(33),
        ] {
            assert!(TokenText::parse(wrong.as_bytes()).is_none(), "{wrong}");
        }
        assert!(TokenText::parse(&[0xff; 66]).is_none());
    }

    #[test]
    fn numbers_in_base_62() {
        for (number, text) in [
            (&[0, 0, 0, 0], "000000"),
            (&[0, 0, 0, 61], "00000z"),
            (&[0, 0, 0, 62], "000010"),
            (&[0xff, 0xff, 0xff, 0xff], "4gfFC3"),
        ] {
            assert_eq!(digits::<6>(number), text);
        }
        let largest = digits::<SECRET_CHARS>(&[0xff; 32]);
        assert!(
            largest.starts_with(|c| c != '0'),
            "all digits are needed: {largest}"
        );
        assert_eq!(&digits::<44>(&[0xff; 32])[..1], "0", "and no more");
    }
}

//! The serial number of a certificate: which of two certificates of one holder is the newer one.
//!
//! A serial begins with the byte [`MARK`], then 8 bytes that grow with each certificate of a holder
//! (the time of issue in milliseconds, or more), then 8 random bytes. Certificates of earlier
//! versions have other serials and count as older than every ordered one.

use std::fmt;

use rand::Rng as _;

use super::certificate::parse;
use base::fault::Fault;

const MARK: u8 = b'P';
const ORDERED_BYTES: usize = 17;
/// The limit of RFC 5280.
const BYTES_MAX: usize = 20;

/// A serial number, without leading zeros.
#[derive(Clone, PartialEq, Eq)]
pub struct Serial(Vec<u8>);

impl Serial {
    /// The serial of a certificate.
    pub fn of(cert_der: &[u8]) -> Result<Self, Fault> {
        let certificate = parse(cert_der)?;
        Self::from_bytes(certificate.raw_serial())
            .ok_or_else(|| Fault::not_allowed("the certificate has no valid serial number"))
    }

    /// A stored serial; `None`: it has no bytes or too many.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let start = bytes.iter().position(|byte| *byte != 0)?;
        let bytes = &bytes[start..];
        (bytes.len() <= BYTES_MAX).then(|| Self(bytes.to_vec()))
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The serial of the next certificate of a holder whose newest one has the serial `after`. It is
    /// newer than that, even if the clock was set back.
    pub fn next(after: Option<&Self>, now_ms: u64) -> Self {
        let least = after
            .and_then(Self::order)
            .map_or(0, |last| last.saturating_add(1));
        let mut bytes = vec![MARK];
        bytes.extend_from_slice(&now_ms.max(least).to_be_bytes());
        bytes.extend_from_slice(&rand::rng().random::<[u8; 8]>());
        Self(bytes)
    }

    /// The part that grows; `None`: a certificate of an earlier version.
    fn order(&self) -> Option<u64> {
        if self.0.len() != ORDERED_BYTES || self.0[0] != MARK {
            return None;
        }
        Some(u64::from_be_bytes(self.0[1..9].try_into().ok()?))
    }

    /// Whether a certificate with this serial was issued after the other, by the same hub for the
    /// same holder.
    pub fn is_newer_than(&self, other: &Self) -> bool {
        self.order() > other.order()
    }
}

/// As `openssl x509 -serial` prints it.
impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode_upper(&self.0))
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Serial({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_serial_is_newer_although_the_clock_was_set_back() {
        let first = Serial::next(None, 5_000);
        let second = Serial::next(Some(&first), 1_000);
        let third = Serial::next(Some(&second), 9_000);
        assert!(second.is_newer_than(&first) && third.is_newer_than(&second));
        assert!(!first.is_newer_than(&second) && !first.is_newer_than(&first));
        assert_ne!(Serial::next(None, 5_000), first, "the rest is random");
        let last = Serial::next(None, u64::MAX);
        assert_eq!(Serial::next(Some(&last), 0).order(), Some(u64::MAX));
    }

    #[test]
    fn a_serial_of_an_earlier_version_is_older_than_every_other() {
        for old in [&[1][..], &[MARK; 20], &[0x7f; 17], &[MARK; 16]] {
            let old = Serial::from_bytes(old).unwrap();
            let new = Serial::next(Some(&old), 1);
            assert!(new.is_newer_than(&old) && !old.is_newer_than(&new), "{old}");
            assert!(!old.is_newer_than(&old));
        }
    }

    #[test]
    fn stored_serials_are_checked() {
        let serial = Serial::next(None, 1);
        assert_eq!(Serial::from_bytes(serial.as_bytes()), Some(serial.clone()));
        assert_eq!(serial.to_string().len(), 2 * ORDERED_BYTES);
        assert!(serial.to_string().starts_with("50"));
        let with_zero = [&[0, 0], serial.as_bytes()].concat();
        assert_eq!(Serial::from_bytes(&with_zero), Some(serial));
        for bad in [&[][..], &[0], &[1; 21]] {
            assert_eq!(Serial::from_bytes(bad), None);
        }
    }
}

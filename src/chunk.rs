//! Chunks: how content is cut, named, and squeezed.
//!
//! Cutting is FastCDC 2020 (Xia et al., normalised chunking), naming is BLAKE3 of the raw bytes, squeezing is zstd when
//! a cheap sample says that it pays. The parameters are recorded in every root manifest.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A BLAKE3 hash: of a chunk's raw bytes, of a file's content, or of a root manifest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// The hash of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// 64 lower-case hex digits.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.hex())
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.hex()[..16])
    }
}

impl FromStr for Hash {
    type Err = hex::FromHexError;
    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let mut out = [0; 32];
        hex::decode_to_slice(s, &mut out)?;
        Ok(Self(out))
    }
}

impl Serialize for Hash {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if s.is_human_readable() { s.serialize_str(&self.hex()) } else { self.0.serialize(s) }
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        if d.is_human_readable() {
            String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
        } else {
            Ok(Self(<[u8; 32]>::deserialize(d)?))
        }
    }
}

/// Sizes chosen by measuring model, image-layer, code and photo data; the table is in BENCHMARKS.md.
pub const DEFAULT_CHUNKING: Chunking = Chunking { min: 8 << 10, avg: 32 << 10, max: 128 << 10 };

/// FastCDC parameters, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunking {
    /// No chunk is smaller, but a file's last.
    pub min: u32,
    /// The size aimed at.
    pub avg: u32,
    /// No chunk is larger.
    pub max: u32,
}

impl Chunking {
    /// A file up to this size is one chunk: cutting it would cost more in references than it could save.
    pub fn whole_file_max(&self) -> u64 {
        u64::from(self.max) / 2
    }

    /// Where the next chunk of `data` ends. `data` must hold [`Chunking::max`] bytes or all that is left of the file.
    pub fn cut(&self, data: &[u8]) -> usize {
        let (min, avg, max) = (self.min as usize, self.avg as usize, self.max as usize);
        fastcdc::v2020::FastCDC::new(data, min, avg, max).cut(0, data.len()).1
    }
}

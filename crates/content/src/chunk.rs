//! Chunks: how content is cut, named, and compressed.
//!
//! Cutting is FastCDC 2020 (Xia et al., normalised chunking), naming is BLAKE3 of the raw bytes,
//! squeezing is zstd when a cheap sample says that it pays. The parameters are recorded in every
//! root manifest.

use std::fmt;
use std::str::FromStr;

use fastcdc::v2020::{FastCDC, Normalization};
use serde::{Deserialize, Serialize};

use base::limits::CHUNK_BYTES_MAX;

/// A BLAKE3 hash: of a chunk's raw bytes, of a file's content, or of a root manifest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash(pub [u8; 32]);

/// See [`Hash::short`].
pub type ShortHash = [u8; 16];

impl Hash {
    /// The hash of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Half of it: what large tables keep. Two chunks that share it could only be made on purpose,
    /// with 2^64 hashes; the whole of it stands in each frame, and is compared when the frame is
    /// read.
    pub fn short(&self) -> ShortHash {
        let mut out = [0; 16];
        out.copy_from_slice(&self.0[..16]);
        out
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
        if s.is_human_readable() {
            s.serialize_str(&self.hex())
        } else {
            self.0.serialize(s)
        }
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        if d.is_human_readable() {
            String::deserialize(d)?
                .parse()
                .map_err(serde::de::Error::custom)
        } else {
            Ok(Self(<[u8; 32]>::deserialize(d)?))
        }
    }
}

/// Sizes chosen by measuring model, image-layer, code and photo data; the table is in
/// BENCHMARKS.md.
pub const DEFAULT_CHUNKING: Chunking = Chunking {
    min: 8 << 10,
    avg: 28 << 10,
    max: 64 << 10,
    whole: 256 << 10,
    normalization: 2,
};

/// FastCDC parameters, in bytes: all that decides where content is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunking {
    /// No chunk is smaller, but a file's last.
    pub min: u32,
    /// The size aimed at.
    pub avg: u32,
    /// No chunk is larger, but a file that is one.
    pub max: u32,
    /// A file up to this size is one chunk: cutting it would cost more in references than it could
    /// save.
    pub whole: u32,
    /// How closely sizes keep to the one aimed at: FastCDC's normalization level, 0 to 3.
    pub normalization: u8,
}

impl Chunking {
    /// Whether content can be cut so, and every chunk is within [`CHUNK_BYTES_MAX`].
    pub fn is_possible(&self) -> bool {
        let Self {
            min,
            avg,
            max,
            whole,
            normalization,
        } = *self;
        64 <= min
            && min <= avg
            && avg <= max
            && (max.max(whole) as usize) <= CHUNK_BYTES_MAX
            && normalization <= 3
    }

    /// Where the next chunk of `data` ends. `data` must hold [`Chunking::max`] bytes or all that is
    /// left of the file.
    pub fn cut(&self, data: &[u8]) -> usize {
        let (min, avg, max) = (self.min as usize, self.avg as usize, self.max as usize);
        let level = match self.normalization {
            0 => Normalization::Level0,
            1 => Normalization::Level1,
            2 => Normalization::Level2,
            _ => Normalization::Level3,
        };
        FastCDC::with_level(data, min, avg, max, level)
            .cut(0, data.len())
            .1
    }
}

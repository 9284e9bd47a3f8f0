//! Chunks: how content is cut into chunks, and how chunks are named.
//!
//! Content is cut with FastCDC 2020 (Xia et al., normalised chunking). The name of a chunk is the
//! BLAKE3 of its raw bytes. The parameters are recorded in every root manifest. Compression is in
//! `frame`.

use std::fmt;
use std::str::FromStr;

use fastcdc::v2020::{FastCDC, Normalization};
use serde::{Deserialize, Serialize};

use base::limits::CHUNK_BYTES_MAX;

/// A BLAKE3 hash: of the raw bytes of a chunk, of the content of a file, or of a root manifest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash(pub [u8; 32]);

/// See [`Hash::short`].
pub type ShortHash = [u8; 16];

impl Hash {
    /// Hashes these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The first half of the hash, which large tables store. An accidental collision is not
    /// realistic, and a deliberate one costs 2^64 hashes. The full hash is in each frame and is
    /// compared when the frame is read.
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

/// Chosen by measurements with model, image-layer, code and photo data; the table is in
/// BENCHMARKS.md.
pub const DEFAULT_CHUNKING: Chunking = Chunking {
    min: 8 << 10,
    avg: 28 << 10,
    max: 64 << 10,
    whole: 256 << 10,
    normalization: 2,
};

/// The parameters of FastCDC in bytes: everything that determines where content is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunking {
    /// The smallest chunk, except the last chunk of a file.
    pub min: u32,
    /// The target size.
    pub avg: u32,
    /// The largest chunk, except a file that is one chunk.
    pub max: u32,
    /// A file of at most this size is one chunk: cutting it would cost more in references than it
    /// could save.
    pub whole: u32,
    /// How close the sizes are to the target: the normalization level of FastCDC, 0 to 3.
    pub normalization: u8,
}

impl Chunking {
    /// Whether the parameters are valid and every chunk is within [`CHUNK_BYTES_MAX`].
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

    /// The length of the next chunk of `data`. `data` must contain [`Chunking::max`] bytes or the
    /// complete rest of the file.
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

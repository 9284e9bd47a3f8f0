//! Frames: a chunk as it is stored and sent. The same bytes lie in a pack and cross the line.
//!
//! ```text
//! offset  size  field
//!      0    32  id: BLAKE3 of the raw bytes
//!     32     4  raw length, little endian
//!     36     4  stored length, little endian
//!     40     1  codec: 0 raw, 1 zstd, 255 fault (stored bytes are a JSON fault; on the line only)
//!     41     3  zero
//!     44     8  XXH3-64 of bytes 0..44 and the stored bytes, little endian
//!     52     …  stored bytes
//! ```
//!
//! The XXH3 sum tells a flipped bit on a disk at a tenth of BLAKE3's price, so a daemon checks it whenever it reads a
//! frame to send it on. Only [`Frame::verify`] turns stored bytes into raw ones, and it checks the BLAKE3.

use bytes::{Bytes, BytesMut};
use thiserror::Error;
use xxhash_rust::xxh3::Xxh3;

use crate::chunk::Hash;
use crate::fault::Fault;
use crate::limits::CHUNK_BYTES_MAX;

/// Bytes before the stored bytes.
pub const HEADER_BYTES: usize = 52;
const RAW: u8 = 0;
const ZSTD: u8 = 1;
const FAULT: u8 = 255;
/// zstd's fastest regular level: the line is rarely faster than it, and higher levels gain a few percent.
const ZSTD_LEVEL: i32 = 1;
/// Stored bytes must be smaller than this share of the raw ones to be worth decompressing.
const WORTH_NUMERATOR: usize = 15;
const WORTH_DENOMINATOR: usize = 16;
/// A sample of this many bytes tells whether data is random.
const SAMPLE_BYTES: usize = 4096;

/// What is wrong with a frame.
#[derive(Debug, Error)]
pub enum FrameError {
    /// It ends too early, or its lengths are impossible.
    #[error("a frame is cut off or malformed")]
    Malformed,
    /// Its sum is wrong: the disk or the sender changed it.
    #[error("the stored bytes of chunk {0} are damaged")]
    Damaged(Hash),
    /// Its bytes are not those that its name says.
    #[error("chunk {expected} does not hash to its name")]
    Mismatch {
        /// The name asked for.
        expected: Hash,
    },
    /// The sender could not go on, and says why.
    #[error("{0}")]
    Fault(Fault),
}

impl From<FrameError> for Fault {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Fault(fault) => fault,
            other => Fault::integrity(other.to_string()),
        }
    }
}

/// Raw bytes whose BLAKE3 was compared with their name.
#[derive(Debug, Clone)]
pub struct Verified {
    /// Their name.
    pub id: Hash,
    /// The bytes.
    pub bytes: Bytes,
}

impl Verified {
    /// Raw bytes and their name, by hashing them.
    pub fn new(bytes: Bytes) -> Self {
        Self { id: Hash::of(&bytes), bytes }
    }

    /// Raw bytes, if they hash to this name.
    pub fn check(id: Hash, bytes: Bytes) -> Result<Self, FrameError> {
        if Hash::of(&bytes) == id { Ok(Self { id, bytes }) } else { Err(FrameError::Mismatch { expected: id }) }
    }
}

/// The fixed part of a frame.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    /// The chunk's name.
    pub id: Hash,
    /// Raw bytes.
    pub raw_len: u32,
    /// Stored bytes that follow.
    pub stored_len: u32,
    codec: u8,
    sum: u64,
}

impl Header {
    /// Reads a header. Lengths beyond the limits are refused, so that a peer cannot make us allocate.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let mut id = [0; 32];
        id.copy_from_slice(&bytes[..32]);
        let mut sum = [0; 8];
        sum.copy_from_slice(&bytes[44..52]);
        let header = Self { id: Hash(id), raw_len: word(32), stored_len: word(36), codec: bytes[40], sum: u64::from_le_bytes(sum) };
        let sane = header.raw_len as usize <= CHUNK_BYTES_MAX
            && header.stored_len as usize <= CHUNK_BYTES_MAX
            && matches!(header.codec, RAW | ZSTD | FAULT)
            && bytes[41..44] == [0; 3];
        if sane { Ok(header) } else { Err(FrameError::Malformed) }
    }

    /// Header and stored bytes together.
    pub fn frame_len(&self) -> usize {
        HEADER_BYTES + self.stored_len as usize
    }
}

/// A whole frame whose sum is right; its BLAKE3 is not checked yet.
#[derive(Debug, Clone)]
pub struct Frame {
    header: Header,
    bytes: Bytes,
}

impl Frame {
    /// Squeezes a chunk when a sample says that it pays.
    pub fn encode(chunk: &Verified) -> Self {
        let raw = &chunk.bytes;
        if raw.len() > 128 && !looks_random(raw) {
            let mut out = BytesMut::zeroed(HEADER_BYTES + raw.len());
            // A buffer of the raw size cannot hold what does not shrink; that error means: keep it raw.
            if let Ok(n) = zstd::bulk::compress_to_buffer(raw, &mut out[HEADER_BYTES..], ZSTD_LEVEL)
                && n * WORTH_DENOMINATOR < raw.len() * WORTH_NUMERATOR
            {
                out.truncate(HEADER_BYTES + n);
                return Self::seal(chunk.id, raw.len(), ZSTD, out);
            }
        }
        let mut out = BytesMut::with_capacity(HEADER_BYTES + raw.len());
        out.resize(HEADER_BYTES, 0);
        out.extend_from_slice(raw);
        Self::seal(chunk.id, raw.len(), RAW, out)
    }

    /// A fault, to be sent in place of the chunk that could not be.
    pub fn fault(fault: &Fault) -> Self {
        let text = serde_json::to_vec(fault).unwrap_or_default();
        let mut out = BytesMut::zeroed(HEADER_BYTES);
        out.extend_from_slice(&text);
        Self::seal(Hash([0; 32]), 0, FAULT, out)
    }

    fn seal(id: Hash, raw_len: usize, codec: u8, mut out: BytesMut) -> Self {
        let (raw_len, stored_len) = (raw_len as u32, (out.len() - HEADER_BYTES) as u32);
        out[..32].copy_from_slice(&id.0);
        out[32..36].copy_from_slice(&raw_len.to_le_bytes());
        out[36..40].copy_from_slice(&stored_len.to_le_bytes());
        out[40] = codec;
        let sum = sum(&out);
        out[44..52].copy_from_slice(&sum.to_le_bytes());
        Self { header: Header { id, raw_len, stored_len, codec, sum }, bytes: out.freeze() }
    }

    /// A frame from its bytes, if its sum is right.
    pub fn parse(bytes: Bytes) -> Result<Self, FrameError> {
        let Some(head) = bytes.first_chunk::<HEADER_BYTES>() else { return Err(FrameError::Malformed) };
        let header = Header::parse(head)?;
        if bytes.len() != header.frame_len() {
            return Err(FrameError::Malformed);
        }
        if sum(&bytes) != header.sum {
            return Err(FrameError::Damaged(header.id));
        }
        Ok(Self { header, bytes })
    }

    /// A frame that came over the line, whose sum need not be checked because [`Frame::verify`] will be: a fault that
    /// stands for it is an error at once.
    pub fn from_line(header: Header, bytes: Bytes) -> Result<Self, FrameError> {
        if bytes.len() != header.frame_len() {
            return Err(FrameError::Malformed);
        }
        let frame = Self { header, bytes };
        if header.codec == FAULT {
            frame.verify(header.id, header.raw_len)?;
        }
        Ok(frame)
    }

    /// The chunk's name, as the frame claims it.
    pub fn id(&self) -> Hash {
        self.header.id
    }

    /// Raw bytes, as the frame claims them.
    pub fn raw_len(&self) -> u32 {
        self.header.raw_len
    }

    /// The frame as it is stored and sent.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The raw bytes, if they are those of the chunk `expected` of `len` bytes.
    pub fn verify(&self, expected: Hash, len: u32) -> Result<Verified, FrameError> {
        let stored = self.bytes.slice(HEADER_BYTES..);
        match self.header.codec {
            FAULT => Err(FrameError::Fault(serde_json::from_slice(&stored).map_err(|_| FrameError::Malformed)?)),
            _ if self.header.id != expected || self.header.raw_len != len => Err(FrameError::Mismatch { expected }),
            RAW if stored.len() == len as usize => Verified::check(expected, stored),
            ZSTD => {
                let raw = zstd::bulk::decompress(&stored, len as usize).map_err(|_| FrameError::Mismatch { expected })?;
                Verified::check(expected, raw.into())
            }
            _ => Err(FrameError::Malformed),
        }
    }
}

fn sum(frame: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(&frame[..44]);
    hasher.update(&frame[HEADER_BYTES..]);
    hasher.digest()
}

/// Whether a sample's bytes are as good as evenly spread (order-0 entropy above 7.6 of 8 bits), as in JPEG, weights'
/// mantissas or compressed layers: zstd would burn time and gain nothing.
fn looks_random(raw: &[u8]) -> bool {
    if raw.len() < SAMPLE_BYTES {
        return false;
    }
    let mut counts = [0u32; 256];
    // Eight runs over the whole chunk, so that a header of another nature does not decide.
    let run = SAMPLE_BYTES / 8;
    let stride = raw.len() / 8;
    for part in 0..8 {
        for &byte in &raw[part * stride..part * stride + run] {
            counts[byte as usize] += 1;
        }
    }
    let total = SAMPLE_BYTES as f32;
    let entropy: f32 = counts.iter().filter(|&&n| n > 0).map(|&n| (n as f32 / total) * (total / n as f32).log2()).sum();
    entropy > 7.6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(len: usize) -> Bytes {
        let mut out = vec![0; len];
        blake3::Hasher::new().update(b"seed").finalize_xof().fill(&mut out);
        out.into()
    }

    #[test]
    fn frames_come_back() {
        for raw in [Bytes::new(), Bytes::from_static(b"x"), random(40_000), Bytes::from(b"abcdefgh".repeat(5000))] {
            let chunk = Verified::new(raw.clone());
            let frame = Frame::encode(&chunk);
            let back = Frame::parse(frame.bytes().clone()).unwrap().verify(chunk.id, raw.len() as u32).unwrap();
            assert_eq!(back.bytes, raw);
        }
        assert!(Frame::encode(&Verified::new(Bytes::from(b"abcdefgh".repeat(5000)))).bytes().len() < 1000, "repeats shrink");
        assert_eq!(Frame::encode(&Verified::new(random(40_000))).bytes().len(), 40_000 + HEADER_BYTES, "noise stays as it is");
    }

    #[test]
    fn a_flipped_bit_is_noticed_wherever_it_is() {
        let frame = Frame::encode(&Verified::new(random(5000)));
        for at in 0..frame.bytes().len() {
            let mut bytes = frame.bytes().to_vec();
            bytes[at] ^= 1;
            assert!(Frame::parse(bytes.into()).is_err(), "bit at {at}");
        }
    }

    #[test]
    fn a_bomb_is_refused() {
        let mut out = BytesMut::zeroed(HEADER_BYTES);
        out.extend_from_slice(&zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap());
        let frame = Frame::seal(Hash([1; 32]), 10, ZSTD, out);
        assert!(matches!(frame.verify(Hash([1; 32]), 10), Err(FrameError::Mismatch { .. })));
    }
}

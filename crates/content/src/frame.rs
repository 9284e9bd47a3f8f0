//! Frames: the form in which a chunk is stored and sent. A pack and a connection carry the same
//! bytes.
//!
//! ```text
//! offset  size  field
//!      0    32  id: BLAKE3 of the raw bytes
//!     32     4  raw length, little endian
//!     36     4  stored length, little endian
//!     40     1  codec: 0 raw, 1 zstd, 2 byte stream split (see `byte_stream_split`);
//!               only on a connection: 254 delta (of manifest pages, see `manifest::delta`),
//!               255 fault (stored bytes are a JSON fault)
//!     41     3  zero
//!     44     8  XXH3-64 of bytes 0..44 and the stored bytes, little endian
//!     52     …  stored bytes
//! ```
//!
//! The XXH3 checksum detects a flipped bit on a disk at a tenth of the cost of BLAKE3. It is checked
//! where no receiver verifies the frame: in a bundle, in a collection, and in the tail of a pack
//! after a crash. A frame that is sent to a peer is not summed, because the peer verifies it. Only
//! [`Frame::verify`] converts stored bytes to raw bytes: it decodes them and compares the id, the
//! raw length and the BLAKE3. It rejects a frame if any field differs from what the stored bytes
//! decode to.

mod byte_stream_split;

use std::cell::RefCell;

use bytes::{Bytes, BytesMut};
use thiserror::Error;
use xxhash_rust::xxh3::Xxh3;

use crate::chunk::Hash;
use base::fault::Fault;
use base::limits::CHUNK_BYTES_MAX;

use byte_stream_split::{Nature, nature};

/// The size of the header.
pub const HEADER_BYTES: usize = 52;
const RAW: u8 = 0;
const ZSTD: u8 = 1;
const BYTE_STREAM_SPLIT: u8 = 2;
const DELTA: u8 = 254;
const FAULT: u8 = 255;
/// The zstd level. It is almost the fastest, and its result is 2.6 % smaller than level 1 on a
/// system tree. Levels 3 and 4 save 1 % and 3 % more and take half as long again, which slows down
/// a publish (BENCHMARKS.md).
const ZSTD_LEVEL: i32 = 2;
/// A chunk is stored compressed only if the result is smaller than this share of the raw bytes.
const WORTH_NUMERATOR: usize = 15;
const WORTH_DENOMINATOR: usize = 16;

/// Why a frame is rejected.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The frame is too short, or its lengths are invalid.
    #[error("a frame is truncated or malformed")]
    Malformed,
    /// The checksum does not match: the disk or the sender changed the frame.
    #[error("the stored bytes of chunk {0} are damaged")]
    Damaged(Hash),
    /// The content does not match the id.
    #[error("the content of chunk {expected} does not match its hash")]
    Mismatch {
        /// The id of the requested chunk.
        expected: Hash,
    },
    /// The sender could not send the chunk, with its reason.
    #[error("{0}")]
    Fault(Fault),
}

impl From<FrameError> for Fault {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Fault(fault) => fault,
            other => Fault::integrity(other.to_string()).with_next(
                "at the hub, run 'packhorse verify' on the artifact and publish the same content again; then run 'packhorse retry'",
            ),
        }
    }
}

/// Raw bytes whose BLAKE3 matches their id.
#[derive(Debug, Clone)]
pub struct Verified {
    pub id: Hash,
    pub bytes: Bytes,
}

impl Verified {
    /// Hashes raw bytes.
    pub fn new(bytes: Bytes) -> Self {
        Self {
            id: Hash::of(&bytes),
            bytes,
        }
    }

    /// Checks that raw bytes match this id.
    pub fn check(id: Hash, bytes: Bytes) -> Result<Self, FrameError> {
        if Hash::of(&bytes) == id {
            Ok(Self { id, bytes })
        } else {
            Err(FrameError::Mismatch { expected: id })
        }
    }
}

/// The fixed part of a frame.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    pub id: Hash,
    pub raw_len: u32,
    /// The number of stored bytes after the header.
    pub stored_len: u32,
    codec: u8,
    sum: u64,
}

impl Header {
    /// Parses a header. Rejects lengths beyond the limits, so that a peer cannot cause large
    /// allocations.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let mut id = [0; 32];
        id.copy_from_slice(&bytes[..32]);
        let mut sum = [0; 8];
        sum.copy_from_slice(&bytes[44..52]);
        let header = Self {
            id: Hash(id),
            raw_len: word(32),
            stored_len: word(36),
            codec: bytes[40],
            sum: u64::from_le_bytes(sum),
        };
        let is_valid = header.raw_len as usize <= CHUNK_BYTES_MAX
            && header.stored_len as usize <= CHUNK_BYTES_MAX
            && matches!(header.codec, RAW | ZSTD | BYTE_STREAM_SPLIT | DELTA | FAULT)
            && (header.codec != RAW || header.raw_len == header.stored_len)
            && bytes[41..44] == [0; 3];
        if is_valid {
            Ok(header)
        } else {
            Err(FrameError::Malformed)
        }
    }

    /// Whether the frame carries a fault instead of a chunk.
    pub fn is_fault(&self) -> bool {
        self.codec == FAULT
    }

    /// The size of header and stored bytes.
    pub fn frame_len(&self) -> usize {
        HEADER_BYTES + self.stored_len as usize
    }
}

/// A complete frame whose checksum matches. Its BLAKE3 is not checked yet.
#[derive(Debug, Clone)]
pub struct Frame {
    header: Header,
    head: Bytes,
    stored: Bytes,
    /// The complete frame in one buffer, if it was received that way.
    whole: Option<Bytes>,
}

thread_local! {
    /// The zstd tables and an output buffer. Creating them for each chunk would take a third of its
    /// compression time.
    static SQUEEZER: RefCell<Option<(zstd::bulk::Compressor<'static>, Vec<u8>)>> = const { RefCell::new(None) };
}

/// Stored bytes are only kept if they are fewer than this.
fn stored_len_max(raw: &[u8]) -> usize {
    raw.len() * WORTH_NUMERATOR / WORTH_DENOMINATOR
}

/// Compresses a chunk. Returns `None` if that saves less than a sixteenth.
fn compress(raw: &[u8]) -> Option<Bytes> {
    SQUEEZER.with_borrow_mut(|kept| {
        if kept.is_none() {
            *kept = Some((zstd::bulk::Compressor::new(ZSTD_LEVEL).ok()?, Vec::new()));
        }
        let (squeezer, out) = kept.as_mut()?;
        // The buffer is too small for a result that is not worth keeping; zstd then fails, and the
        // chunk stays raw.
        out.clear();
        out.reserve(stored_len_max(raw));
        squeezer
            .compress_to_buffer(raw, out)
            .ok()
            .filter(|&n| n < stored_len_max(raw))?;
        Some(Bytes::copy_from_slice(out))
    })
}

impl Frame {
    /// Compresses a chunk if a sample shows that it is worthwhile. A chunk that stays raw is not
    /// copied.
    pub fn encode(chunk: &Verified) -> Self {
        let raw = &chunk.bytes;
        let (codec, compressed) = match nature(raw) {
            Nature::Random => (RAW, None),
            Nature::Numbers(stride) => (
                BYTE_STREAM_SPLIT,
                byte_stream_split::compress(raw, stride)
                    .filter(|stored| stored.len() < stored_len_max(raw))
                    .map(Bytes::from),
            ),
            Nature::Other if raw.len() <= 128 => (RAW, None),
            Nature::Other => (ZSTD, compress(raw)),
        };
        match compressed {
            Some(stored) => Self::seal(chunk.id, raw.len(), codec, stored),
            None => Self::seal(chunk.id, raw.len(), RAW, raw.clone()),
        }
    }

    /// Creates a frame with a fault, which is sent instead of a chunk.
    pub fn fault(fault: &Fault) -> Result<Self, Fault> {
        let text = serde_json::to_vec(fault)
            .map_err(|e| Fault::internal(format!("the fault '{fault}' has no JSON form: {e}")))?;
        Ok(Self::seal(Hash([0; 32]), 0, FAULT, text.into()))
    }

    /// Creates a frame for manifest pages of `raw_len` bytes in total, compressed against other
    /// pages.
    pub fn delta(raw_len: usize, compressed: Vec<u8>) -> Self {
        Self::seal(Hash([0; 32]), raw_len, DELTA, compressed.into())
    }

    /// The bytes of a delta frame, if it is for pages of `raw_len` bytes in total.
    pub fn compressed(&self, raw_len: usize) -> Result<Bytes, FrameError> {
        let matches = self.header.codec == DELTA && self.header.raw_len as usize == raw_len;
        if matches {
            Ok(self.stored.clone())
        } else {
            Err(FrameError::Malformed)
        }
    }

    fn seal(id: Hash, raw_len: usize, codec: u8, stored: Bytes) -> Self {
        let (raw_len, stored_len) = (raw_len as u32, stored.len() as u32);
        let mut head = BytesMut::zeroed(HEADER_BYTES);
        head[..32].copy_from_slice(&id.0);
        head[32..36].copy_from_slice(&raw_len.to_le_bytes());
        head[36..40].copy_from_slice(&stored_len.to_le_bytes());
        head[40] = codec;
        let sum = sum(&head, &stored);
        head[44..52].copy_from_slice(&sum.to_le_bytes());
        Self {
            header: Header {
                id,
                raw_len,
                stored_len,
                codec,
                sum,
            },
            head: head.freeze(),
            stored,
            whole: None,
        }
    }

    /// A frame of a valid chunk with a wrong raw length, as earlier versions accepted it.
    #[cfg(any(test, feature = "testing"))]
    pub fn lying(chunk: &Verified, raw_len: usize) -> Self {
        let stored = zstd::bulk::compress(&chunk.bytes, ZSTD_LEVEL).unwrap_or_default();
        Self::seal(chunk.id, raw_len, ZSTD, stored.into())
    }

    /// Parses a complete frame and checks its checksum.
    pub fn parse(bytes: Bytes) -> Result<Self, FrameError> {
        let Some(head) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(FrameError::Malformed);
        };
        let header = Header::parse(head)?;
        let frame = Self::split(header, bytes)?;
        if sum(&frame.head, &frame.stored) != header.sum {
            return Err(FrameError::Damaged(header.id));
        }
        Ok(frame)
    }

    fn split(header: Header, mut bytes: Bytes) -> Result<Self, FrameError> {
        if bytes.len() != header.frame_len() {
            return Err(FrameError::Malformed);
        }
        let whole = Some(bytes.clone());
        Ok(Self {
            header,
            head: bytes.split_to(HEADER_BYTES),
            stored: bytes,
            whole,
        })
    }

    /// A frame received from a peer. Its checksum is not checked here because [`Frame::verify`]
    /// must follow. Returns the fault if the frame carries one.
    pub fn from_line(header: Header, bytes: Bytes) -> Result<Self, FrameError> {
        let frame = Self::split(header, bytes)?;
        if header.codec == FAULT {
            frame.verify(header.id, header.raw_len)?;
        }
        Ok(frame)
    }

    /// Prepares a frame that was received and verified for storing. If the checksum of the sender
    /// is wrong, the chunk is encoded again, because the store detects damage by the checksum.
    pub fn fit_to_store(self, chunk: &Verified) -> Self {
        if sum(&self.head, &self.stored) == self.header.sum {
            self
        } else {
            Self::encode(chunk)
        }
    }

    /// The id of the chunk as stated by the frame.
    pub fn id(&self) -> Hash {
        self.header.id
    }

    /// The number of raw bytes as stated by the frame.
    pub fn raw_len(&self) -> u32 {
        self.header.raw_len
    }

    /// The frame as it is stored and sent, in two slices.
    pub fn pieces(&self) -> [&[u8]; 2] {
        [&self.head, &self.stored]
    }

    /// The frame as it is stored and sent, in two buffers.
    pub fn into_pieces(self) -> [Bytes; 2] {
        [self.head, self.stored]
    }

    /// The frame as it is stored and sent, in one buffer. Copies, unless it was received in one
    /// buffer.
    pub fn to_bytes(&self) -> Bytes {
        self.whole
            .clone()
            .unwrap_or_else(|| self.pieces().concat().into())
    }

    /// The size of the complete frame.
    #[expect(clippy::len_without_is_empty, reason = "a frame is never empty")]
    pub fn len(&self) -> usize {
        self.header.frame_len()
    }

    /// Decodes the frame. Fails unless the result is the chunk `expected` of `len` bytes.
    pub fn verify(&self, expected: Hash, len: u32) -> Result<Verified, FrameError> {
        let mismatch = || FrameError::Mismatch { expected };
        let stored = self.stored.clone();
        let raw: Bytes = match self.header.codec {
            FAULT => {
                return Err(FrameError::Fault(
                    serde_json::from_slice(&stored).map_err(|_| FrameError::Malformed)?,
                ));
            }
            _ if self.header.id != expected || self.header.raw_len != len => return Err(mismatch()),
            RAW => stored,
            ZSTD => zstd::bulk::decompress(&stored, len as usize)
                .map_err(|_| mismatch())?
                .into(),
            BYTE_STREAM_SPLIT => byte_stream_split::restore(&stored, len as usize)
                .ok_or_else(mismatch)?
                .into(),
            _ => return Err(FrameError::Malformed),
        };
        // A decoder may return fewer bytes than the header states, and the hash does not cover the
        // header.
        if raw.len() != len as usize {
            return Err(mismatch());
        }
        Verified::check(expected, raw)
    }
}

fn sum(head: &[u8], stored: &[u8]) -> u64 {
    let mut hasher = Xxh3::new();
    hasher.update(&head[..44]);
    hasher.update(stored);
    hasher.digest()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(len: usize) -> Bytes {
        let mut out = vec![0; len];
        blake3::Hasher::new()
            .update(b"seed")
            .finalize_xof()
            .fill(&mut out);
        out.into()
    }

    #[test]
    fn frames_round_trip() {
        for raw in [
            Bytes::new(),
            Bytes::from_static(b"x"),
            random(40_000),
            Bytes::from(b"abcdefgh".repeat(5000)),
        ] {
            let chunk = Verified::new(raw.clone());
            let frame = Frame::encode(&chunk);
            let back = Frame::parse(frame.to_bytes())
                .unwrap()
                .verify(chunk.id, raw.len() as u32)
                .unwrap();
            assert_eq!(back.bytes, raw);
        }
        assert!(
            Frame::encode(&Verified::new(Bytes::from(b"abcdefgh".repeat(5000)))).len() < 1000,
            "repeats shrink"
        );
        assert_eq!(
            Frame::encode(&Verified::new(random(40_000))).len(),
            40_000 + HEADER_BYTES,
            "random bytes stay raw"
        );
    }

    #[test]
    fn weights_round_trip_and_are_smaller() {
        for (name, _, raw) in byte_stream_split::tests::forms() {
            let chunk = Verified::new(raw.clone().into());
            let frame = Frame::encode(&chunk);
            assert_eq!(frame.header.codec, BYTE_STREAM_SPLIT, "{name}");
            assert!(
                frame.len() < zstd::bulk::compress(&raw, 1).unwrap().len() * 95 / 100,
                "{name}: {} of {}",
                frame.len(),
                raw.len()
            );
            let back = Frame::parse(frame.to_bytes())
                .unwrap()
                .verify(chunk.id, raw.len() as u32)
                .unwrap();
            assert_eq!(back.bytes, raw);
        }
    }

    #[test]
    fn every_flipped_bit_is_detected() {
        let frame = Frame::encode(&Verified::new(random(5000)));
        for at in 0..frame.len() {
            let mut bytes = frame.to_bytes().to_vec();
            bytes[at] ^= 1;
            assert!(Frame::parse(bytes.into()).is_err(), "bit at {at}");
        }
    }

    /// Content that is stored with the byte stream split codec.
    static NUMBERS: std::sync::LazyLock<Bytes> =
        std::sync::LazyLock::new(|| byte_stream_split::tests::forms()[0].2.clone().into());

    #[test]
    fn a_frame_with_a_wrong_raw_length_is_refused() {
        for raw in [
            Bytes::new(),
            Bytes::from_static(b"x"),
            random(4000),
            Bytes::from(b"abcdefgh".repeat(5000)),
            NUMBERS.clone(),
        ] {
            let chunk = Verified::new(raw.clone());
            let honest = Frame::encode(&chunk);
            for len in [
                0,
                raw.len().wrapping_sub(1),
                raw.len() + 1,
                raw.len() + 777,
                CHUNK_BYTES_MAX,
            ] {
                if len == raw.len() || len > CHUNK_BYTES_MAX {
                    continue;
                }
                let inconsistent =
                    Frame::seal(chunk.id, len, honest.header.codec, honest.stored.clone());
                let result = Frame::parse(inconsistent.to_bytes())
                    .map(|frame| frame.verify(chunk.id, len as u32));
                assert!(
                    !matches!(result, Ok(Ok(_))),
                    "codec {}: {} bytes named as {len}",
                    honest.header.codec,
                    raw.len()
                );
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn a_changed_frame_gives_no_other_bytes(seed in 0usize..4, at in 0usize..400, with in proptest::num::u8::ANY, reseal in proptest::bool::ANY) {
            let raw = [Bytes::new(), random(300), Bytes::from(b"abcdefgh".repeat(500)), NUMBERS.clone()];
            let chunk = Verified::new(raw[seed].clone());
            let mut bytes = Frame::encode(&chunk).to_bytes().to_vec();
            let at = at % bytes.len();
            bytes[at] ^= with;
            if reseal {
                let new = sum(&bytes[..HEADER_BYTES], &bytes[HEADER_BYTES..]);
                bytes[44..52].copy_from_slice(&new.to_le_bytes());
            }
            if let Ok(frame) = Frame::parse(bytes.into()) && let Ok(back) = frame.verify(frame.id(), frame.raw_len()) {
                proptest::prop_assert_eq!(back.bytes.len(), frame.raw_len() as usize);
                proptest::prop_assert_eq!(Hash::of(&back.bytes), frame.id());
                proptest::prop_assert_eq!(back.bytes, chunk.bytes);
            }
        }

        #[test]
        fn any_bytes_are_a_frame_or_refused(head in proptest::collection::vec(proptest::num::u8::ANY, HEADER_BYTES), codec in 0u8..4, stored in proptest::collection::vec(proptest::num::u8::ANY, 0..200), raw_len in 0u32..3000) {
            let id = Hash::of(&head);
            let frame = Frame::seal(id, raw_len as usize, codec, stored.into());
            if let Ok(frame) = Frame::parse(frame.to_bytes()) {
                proptest::prop_assert!(frame.verify(id, raw_len).is_err());
            }
            let _ = Frame::parse(head.into());
        }
    }

    #[test]
    fn a_bomb_is_refused() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
        let frame = Frame::seal(Hash([1; 32]), 10, ZSTD, bomb.into());
        assert!(matches!(
            frame.verify(Hash([1; 32]), 10),
            Err(FrameError::Mismatch { .. })
        ));
    }
}

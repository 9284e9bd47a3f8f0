//! Byte stream split: compresses numbers of two or four bytes in separate streams, one for each
//! byte of a number.
//!
//! In a weight (fp16, bf16, fp32), the low bytes of the mantissa are random, but the byte with the
//! exponent is not. zstd uses one entropy code for all bytes of a chunk, so it saves little on the
//! mixture. For a separate stream of each byte it saves what is possible. Weights contain no
//! repeated sequences, so only the entropy coder runs. This saves 7 to 14 % (BENCHMARKS.md).
//!
//! ```text
//! stored   = stride (1 byte: 2 or 4), then for each of `stride` streams: length (u32 LE), bytes
//! stream n = bytes n, n + stride, n + 2 × stride … of the chunk; zstd, or raw if the length is that of the raw stream
//! ```

use std::sync::LazyLock;

use zstd::zstd_safe::{CParameter, ParamSwitch};

/// The size of a sample.
pub(super) const SAMPLE_BYTES: usize = 4096;
/// Bits per byte above which content counts as random; a sample of a random chunk has 7.95.
const RANDOM_BITS: f32 = 7.6;
/// At least one stream must be random. Otherwise repeated sequences are likely, which a split would
/// hide.
const NOISE_BITS: f32 = 7.5;
/// The streams must have at least this many bits per byte less than the mixture.
const GAIN_BITS: f32 = 0.25;
/// A zstd level without a search for repeated sequences.
const ENTROPY_ONLY_LEVEL: i32 = -100;

/// The type of content that a sample indicates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nature {
    /// Not compressible: JPEG, compressed layers, evenly distributed integers.
    Random,
    /// Numbers of this many bytes.
    Numbers(usize),
    /// Anything else.
    Other,
}

/// n × log2(n) for every count that a sample can contain.
static N_LOG_N: LazyLock<Vec<f32>> = LazyLock::new(|| {
    (0..=SAMPLE_BYTES)
        .map(|n| {
            if n == 0 {
                0.0
            } else {
                n as f32 * (n as f32).log2()
            }
        })
        .collect()
});

/// The order-0 entropy in bits per byte, corrected for the bias of small samples.
fn bits(counts: &[u16; 256]) -> f32 {
    let (mut total, mut seen, mut sum) = (0usize, 0usize, 0.0);
    for &n in counts {
        total += usize::from(n);
        seen += usize::from(n > 0);
        sum += N_LOG_N[usize::from(n)];
    }
    let total = total.max(1) as f32;
    total.log2() - sum / total
        + seen.saturating_sub(1) as f32 / (2.0 * total) * std::f32::consts::LOG2_E
}

/// Samples eight runs spread over the chunk, so that a header of another type does not decide.
pub(super) fn nature(raw: &[u8]) -> Nature {
    if raw.len() < SAMPLE_BYTES {
        return Nature::Other;
    }
    let mut lanes = [[0u16; 256]; 4];
    let (run, step) = (SAMPLE_BYTES / 8, raw.len() / 8);
    for from in (0..8).map(|part| part * step) {
        for (at, &byte) in raw[from..from + run].iter().enumerate() {
            lanes[(from + at) % 4][usize::from(byte)] += 1;
        }
    }
    let add = |selected: &[usize]| -> [u16; 256] {
        std::array::from_fn(|byte| selected.iter().map(|&lane| lanes[lane][byte]).sum())
    };
    let mixed = bits(&add(&[0, 1, 2, 3]));
    if mixed > RANDOM_BITS {
        return Nature::Random;
    }
    let twos = [bits(&add(&[0, 2])), bits(&add(&[1, 3]))];
    let fours: [f32; 4] = std::array::from_fn(|lane| bits(&lanes[lane]));
    let mean = |lanes: &[f32]| lanes.iter().sum::<f32>() / lanes.len() as f32;
    let noise = |lanes: &[f32]| lanes.iter().any(|&bits| bits > NOISE_BITS);
    // For numbers of two bytes, four streams would give the same result with more overhead.
    let (stride, lanes) = if mean(&fours) + 0.1 < mean(&twos) {
        (4, &fours[..])
    } else {
        (2, &twos[..])
    };
    if noise(lanes) && mixed - mean(lanes) > GAIN_BITS {
        Nature::Numbers(stride)
    } else {
        Nature::Other
    }
}

/// Splits a chunk into streams and compresses each. Returns `None` if zstd fails.
pub(super) fn compress(raw: &[u8], stride: usize) -> Option<Vec<u8>> {
    let mut squeezer = zstd::bulk::Compressor::new(ENTROPY_ONLY_LEVEL).ok()?;
    squeezer
        .set_parameter(CParameter::LiteralCompressionMode(ParamSwitch::Enable))
        .ok()?;
    let mut out = vec![stride as u8];
    let mut small = Vec::new();
    for first in 0..stride {
        let lane: Vec<u8> = raw.iter().skip(first).step_by(stride).copied().collect();
        small.clear();
        small.reserve(lane.len());
        // A stream that zstd does not make smaller stays raw.
        let lane = match squeezer.compress_to_buffer(&lane[..], &mut small) {
            Ok(n) if n < lane.len() => &small,
            _ => &lane,
        };
        out.extend_from_slice(&(lane.len() as u32).to_le_bytes());
        out.extend_from_slice(lane);
    }
    Some(out)
}

/// Restores the chunk of `len` bytes from the split form. Returns `None` if the form is invalid.
pub(super) fn restore(stored: &[u8], len: usize) -> Option<Vec<u8>> {
    let (&stride, mut rest) = stored.split_first()?;
    let stride = usize::from(stride);
    if stride != 2 && stride != 4 {
        return None;
    }
    let mut out = vec![0; len];
    for first in 0..stride {
        let (head, tail) = rest.split_first_chunk::<4>()?;
        let (lane, tail) = tail.split_at_checked(u32::from_le_bytes(*head) as usize)?;
        rest = tail;
        let stream_len = len.saturating_sub(first).div_ceil(stride);
        let restored;
        let lane = if lane.len() == stream_len {
            lane
        } else {
            restored = zstd::bulk::decompress(lane, stream_len)
                .ok()
                .filter(|lane| lane.len() == stream_len)?;
            &restored
        };
        for (to, &byte) in out.iter_mut().skip(first).step_by(stride).zip(lane) {
            *to = byte;
        }
    }
    rest.is_empty().then_some(out)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Normally distributed numbers, as weights are.
    pub(crate) fn weights(count: usize) -> Vec<f32> {
        let mut noise = vec![0; count * 8];
        blake3::Hasher::new()
            .update(b"weights")
            .finalize_xof()
            .fill(&mut noise);
        let unit = |bytes: &[u8]| {
            (u32::from_le_bytes(bytes.try_into().unwrap()) as f32 + 1.0) / 4_294_967_296.0
        };
        noise
            .chunks(8)
            .map(|b| {
                0.02 * (-2.0 * unit(&b[..4]).ln()).sqrt()
                    * (std::f32::consts::TAU * unit(&b[4..])).cos()
            })
            .collect()
    }

    /// Converts to IEEE half precision, for numbers of the size of weights.
    fn half(x: f32) -> u16 {
        let bits = x.to_bits();
        let exponent = (bits >> 23 & 255) as i32 - 112;
        let sign = (bits >> 16) as u16 & 0x8000;
        if exponent <= 0 {
            sign
        } else {
            sign | ((exponent as u32) << 10 | (bits >> 13) & 0x3ff) as u16
        }
    }

    pub(crate) fn forms() -> [(&'static str, usize, Vec<u8>); 3] {
        let weights = weights(20_000);
        [
            (
                "fp16",
                2,
                weights
                    .iter()
                    .flat_map(|w| half(*w).to_le_bytes())
                    .collect(),
            ),
            (
                "bf16",
                2,
                weights
                    .iter()
                    .flat_map(|w| ((w.to_bits() >> 16) as u16).to_le_bytes())
                    .collect(),
            ),
            (
                "fp32",
                4,
                weights.iter().flat_map(|w| w.to_le_bytes()).collect(),
            ),
        ]
    }

    #[test]
    fn weights_are_recognised_at_every_alignment() {
        for (name, stride, bytes) in forms() {
            for from in 0..4 {
                assert_eq!(
                    nature(&bytes[from..]),
                    Nature::Numbers(stride),
                    "{name} from {from}"
                );
            }
        }
        let mut noise = vec![0; 40_000];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        assert_eq!(nature(&noise), Nature::Random);
        assert_eq!(
            nature(&b"fn main() { println!(\"{}\", 1 + 2); }\n".repeat(1000)),
            Nature::Other
        );
        assert_eq!(
            nature(&std::fs::read(std::env::current_exe().unwrap()).unwrap()[..60_000]),
            Nature::Other,
            "a program"
        );
    }

    #[test]
    fn streams_round_trip_and_invalid_input_is_refused() {
        for (name, stride, bytes) in forms() {
            for len in [0, 1, 2, 3, 5, 4096, 34_001, 40_000] {
                let raw = &bytes[..len];
                let stored = compress(raw, stride).unwrap();
                assert_eq!(
                    restore(&stored, len).as_deref(),
                    Some(raw),
                    "{name}, {len} bytes"
                );
                assert!(restore(&stored[..stored.len() - 1], len).is_none());
                assert!(restore(&[&stored[..], &[0]].concat(), len).is_none());
            }
        }
        assert!(
            restore(&[], 10).is_none()
                && restore(&[3, 0, 0, 0, 0], 10).is_none()
                && restore(&[2, 255, 255, 255, 255], 10).is_none()
        );
    }

    /// `cargo test -p content --release --lib -- --ignored --nocapture weights_by_lane`.
    #[test]
    #[ignore = "measures the sizes of weights in BENCHMARKS.md"]
    fn weights_by_lane() {
        for (name, stride, bytes) in forms() {
            let share = |len: usize| len as f64 * 100.0 / bytes.len() as f64;
            let plain = |level| {
                bytes
                    .chunks(34_000)
                    .map(|c| zstd::bulk::compress(c, level).unwrap().len())
                    .sum::<usize>()
            };
            let lanes: usize = bytes
                .chunks(34_000)
                .map(|c| compress(c, stride).unwrap().len())
                .sum();
            println!(
                "{name}: zstd -1 {:.1} %, zstd -4 {:.1} %, lanes {:.1} %",
                share(plain(1)),
                share(plain(4)),
                share(lanes)
            );
        }
    }
}

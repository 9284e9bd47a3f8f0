//! Lanes: numbers of two or four bytes, taken apart before they are compressed.
//!
//! Of a weight (fp16, bf16, fp32) the mantissa's low bytes are noise and the byte with the exponent
//! is not. zstd makes one code for all bytes of a chunk, and so gains little on the mixture; of
//! each lane by itself it gains what there is. There are no repeats to be found in weights: only
//! the entropy coder runs. A gain of 7 to 14 % (BENCHMARKS.md).
//!
//! ```text
//! stored = stride (1 byte: 2 or 4), then for each of as many lanes: length (u32 LE), bytes
//! lane n = bytes n, n + stride, n + 2 × stride … of the chunk; zstd, or as they are where the length is the lane's own
//! ```

use std::sync::LazyLock;

use zstd::zstd_safe::{CParameter, ParamSwitch};

/// Bytes of a sample.
pub(super) const SAMPLE_BYTES: usize = 4096;
/// Bits of a byte that is as good as random; the sample of a random chunk has 7.95.
const RANDOM_BITS: f32 = 7.6;
/// One lane must be noise: else there are likely repeats, which lanes would hide…
const NOISE_BITS: f32 = 7.5;
/// …and the lanes must hold fewer bits a byte than their mixture by this.
const GAIN_BITS: f32 = 0.25;
/// zstd without a search for repeats.
const ENTROPY_ONLY_LEVEL: i32 = -100;

/// What a sample says of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nature {
    /// Nothing can be gained: JPEG, compressed layers, integers that are spread evenly.
    Random,
    /// Numbers of so many bytes.
    Numbers(usize),
    /// Anything else.
    Other,
}

/// n × log2(n) of the counts that a sample can have.
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

/// Order-0 entropy in bits a byte, without the bias that a small sample has.
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

/// Looks at eight runs over the whole chunk, so that a header of another nature does not decide.
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
    let add = |some: &[usize]| -> [u16; 256] {
        std::array::from_fn(|byte| some.iter().map(|&lane| lanes[lane][byte]).sum())
    };
    let mixed = bits(&add(&[0, 1, 2, 3]));
    if mixed > RANDOM_BITS {
        return Nature::Random;
    }
    let twos = [bits(&add(&[0, 2])), bits(&add(&[1, 3]))];
    let fours: [f32; 4] = std::array::from_fn(|lane| bits(&lanes[lane]));
    let mean = |lanes: &[f32]| lanes.iter().sum::<f32>() / lanes.len() as f32;
    let noise = |lanes: &[f32]| lanes.iter().any(|&bits| bits > NOISE_BITS);
    // Four lanes of numbers of two bytes would say the same with more overhead.
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

/// Takes a chunk apart and squeezes each lane. `None` when zstd fails.
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
        // What does not fit into the lane's own room stays as it is.
        let lane = match squeezer.compress_to_buffer(&lane[..], &mut small) {
            Ok(n) if n < lane.len() => &small,
            _ => &lane,
        };
        out.extend_from_slice(&(lane.len() as u32).to_le_bytes());
        out.extend_from_slice(lane);
    }
    Some(out)
}

/// The chunk of `len` bytes that [`compress`] took apart. `None` when it is none.
pub(super) fn restore(stored: &[u8], len: usize) -> Option<Vec<u8>> {
    let (&stride, mut rest) = stored.split_first()?;
    let stride = usize::from(stride);
    if stride != 2 && stride != 4 {
        return None;
    }
    let mut out = vec![0; len];
    for first in 0..stride {
        let (head, behind) = rest.split_first_chunk::<4>()?;
        let (lane, behind) = behind.split_at_checked(u32::from_le_bytes(*head) as usize)?;
        rest = behind;
        let own = len.saturating_sub(first).div_ceil(stride);
        let restored;
        let lane = if lane.len() == own {
            lane
        } else {
            restored = zstd::bulk::decompress(lane, own)
                .ok()
                .filter(|lane| lane.len() == own)?;
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

    /// As IEEE half precision, for numbers of the size of weights.
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
    fn weights_are_known_by_a_sample_wherever_they_are_cut() {
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
    fn lanes_come_back_and_anything_else_is_refused() {
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

    /// The figures of BENCHMARKS.md: `cargo test --lib -- --ignored --nocapture weights_by_lane`.
    #[test]
    #[ignore = "prints figures"]
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

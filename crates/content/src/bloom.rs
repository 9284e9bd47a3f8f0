//! A Bloom filter of chunks: it remembers which chunks were seen, in a fixed amount of memory.
//!
//! For estimates only. The filter can take a new chunk for one that it has seen (about 1 % of the
//! chunks after 8 million), but never the reverse. Therefore the count of new chunks can be too
//! low, but never too high.

use crate::chunk::Hash;

/// The number of bits, a power of two: 16 MiB of memory.
const BITS: u64 = 1 << 27;

/// The filter.
pub struct BloomFilter(Vec<u64>);

impl Default for BloomFilter {
    fn default() -> Self {
        Self(vec![0; (BITS / 64) as usize])
    }
}

impl BloomFilter {
    /// Adds the chunk. Returns `true` if it was not in the filter.
    pub fn is_new(&mut self, id: &Hash) -> bool {
        let word =
            |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| id.0[at + i])) % BITS;
        let mut is_new = false;
        for bit in [word(0), word(8)] {
            let (place, mask) = ((bit / 64) as usize, 1 << (bit % 64));
            is_new |= self.0[place] & mask == 0;
            self.0[place] |= mask;
        }
        is_new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_new_once() {
        let mut seen = BloomFilter::default();
        let ids: Vec<Hash> = (0..10_000u32).map(|n| Hash::of(&n.to_le_bytes())).collect();
        let new = ids.iter().filter(|id| seen.is_new(id)).count();
        assert!(new > 9_990, "only {new} of 10,000 were recognised as new");
        assert!(!ids.iter().any(|id| seen.is_new(id)));
    }
}

//! Which chunks were met before, in the same memory however many there are.
//!
//! For reckoning only: a chunk may be taken for one that was met before though it was not, of eight
//! million one in a hundred. So what is counted of those that are new is never too much.

use crate::chunk::Hash;

/// A power of two: 16 MiB.
const BITS: u64 = 1 << 27;

/// The chunks that were met.
pub struct BloomFilter(Vec<u64>);

impl Default for BloomFilter {
    fn default() -> Self {
        Self(vec![0; (BITS / 64) as usize])
    }
}

impl BloomFilter {
    /// Notes the chunk; `true` when it was not met before.
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
        assert!(new > 9_990, "{new} of 10,000 were taken for new");
        assert!(!ids.iter().any(|id| seen.is_new(id)));
    }
}

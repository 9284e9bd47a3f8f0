//! Recently requested chunks, in bounded memory.

use std::collections::HashSet;

use content::chunk::Hash;

/// Hashes in each of two generations: more than are requested until the index has them. About 5 MB
/// of memory each.
const GENERATION: usize = 224 << 10;

/// The chunks among at least the last [`GENERATION`] ones, by eight bytes of their hashes: one may
/// be taken for another.
#[derive(Debug, Default)]
pub(super) struct Recent {
    young: HashSet<u64>,
    old: HashSet<u64>,
}

impl Recent {
    /// Adds a chunk. Returns whether it is new, as far as is known.
    pub(super) fn insert(&mut self, id: Hash) -> bool {
        let [a, b, c, d, e, f, g, h, ..] = id.0;
        let key = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        if self.old.contains(&key) || !self.young.insert(key) {
            return false;
        }
        if self.young.len() == GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: usize) -> Hash {
        Hash::of(&n.to_le_bytes())
    }

    #[test]
    fn the_last_are_remembered_and_memory_is_bounded() {
        let mut recent = Recent::default();
        for n in 0..3 * GENERATION {
            assert!(recent.insert(id(n)), "{n} is new");
            assert!(
                !recent.insert(id(n.saturating_sub(GENERATION - 1))),
                "{n}: what was named a generation ago is not"
            );
        }
        assert!(recent.young.len() + recent.old.len() <= 2 * GENERATION);
        assert!(recent.insert(id(0)), "old chunks are removed");
    }
}

//! The journals of transfers: one bit for each chunk of a staged artifact, set when the chunk is
//! durable.
//!
//! [`ChunkIndex::commit`] writes the bits of a group commit in the same transaction as its rows. A
//! transfer reads its journal when it begins, and clears the bits of files that it must write
//! again. After a crash the bits are those of the last commit.

use std::collections::BTreeSet;

use parking_lot::RwLock;
use redb::{TableDefinition, WriteTransaction};
use xxhash_rust::xxh3::Xxh3;

use super::ChunkIndex;
use base::fault::Fault;

/// Journal bits in one row.
const SEGMENT_BITS: u64 = 1 << 16;
const SEGMENT_WORDS: usize = (SEGMENT_BITS / 64) as usize;

/// Location and segment → the bits of the segment in words of 64, little endian, and their XXH3-64
/// with location and segment before them (8 bytes, little endian; rows of older versions have no
/// checksum). A wrong bit would mark a chunk as written that is not.
const JOURNAL: TableDefinition<'_, (u32, u32), &[u8]> = TableDefinition::new("journal");

fn segment_sum(place: u32, segment: u32, bits: &[u8]) -> u64 {
    let mut sum = Xxh3::new();
    sum.update(&place.to_le_bytes());
    sum.update(&segment.to_le_bytes());
    sum.update(bits);
    sum.digest()
}

pub(super) fn with_sum(place: u32, segment: u32, mut bits: Vec<u8>) -> Vec<u8> {
    let sum = segment_sum(place, segment, &bits);
    bits.extend_from_slice(&sum.to_le_bytes());
    bits
}

/// The bits of a journal row that should have so many words; `None`: the row is damaged.
pub(super) fn sound_segment(place: u32, segment: u32, row: &[u8], words: usize) -> Option<&[u8]> {
    if row.len() == words * 8 {
        return Some(row);
    }
    let (bits, sum) = row.split_last_chunk::<8>()?;
    (bits.len() == words * 8 && segment_sum(place, segment, bits) == u64::from_le_bytes(*sum))
        .then_some(bits)
}

/// A transfer's journal: one bit for each chunk of the artifact.
#[derive(Debug)]
pub struct Journal {
    bits: Vec<u64>,
    set: u64,
}

impl Journal {
    /// Whether the chunk of this ordinal is durable.
    pub fn has(&self, ordinal: u64) -> bool {
        self.bits
            .get((ordinal / 64) as usize)
            .is_some_and(|word| word >> (ordinal % 64) & 1 == 1)
    }

    pub(super) fn set(&mut self, ordinal: u64) {
        if let Some(word) = self.bits.get_mut((ordinal / 64) as usize) {
            self.set += u64::from(*word >> (ordinal % 64) & 1 == 0);
            *word |= 1 << (ordinal % 64);
        }
    }

    fn clear(&mut self, ordinal: u64) {
        if let Some(word) = self.bits.get_mut((ordinal / 64) as usize) {
            self.set -= *word >> (ordinal % 64) & 1;
            *word &= !(1 << (ordinal % 64));
        }
    }

    /// The number of durable chunks.
    pub fn count(&self) -> u64 {
        self.set
    }

    fn segment(&self, number: u64) -> Vec<u8> {
        let start = number as usize * SEGMENT_WORDS;
        self.bits[start..(start + SEGMENT_WORDS).min(self.bits.len())]
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .collect()
    }
}

/// Creates the table of journals.
pub(super) fn create(write: &WriteTransaction) -> Result<(), redb::Error> {
    write.open_table(JOURNAL).map(drop).map_err(Into::into)
}

/// Removes the journal of a location.
pub(super) fn remove(write: &WriteTransaction, place: u32) -> Result<(), redb::Error> {
    let mut table = write.open_table(JOURNAL)?;
    table.retain_in((place, 0)..(place, u32::MAX), |_, _| false)?;
    Ok(())
}

/// Writes the rows of a journal that contain the bits of these chunks.
pub(super) fn write_bits(
    write: &WriteTransaction,
    place: u32,
    journal: &Journal,
    ordinals: &[u64],
) -> Result<(), redb::Error> {
    let segments: BTreeSet<u64> = ordinals
        .iter()
        .map(|ordinal| ordinal / SEGMENT_BITS)
        .collect();
    let mut table = write.open_table(JOURNAL)?;
    for segment in segments {
        let number = segment as u32;
        let row = with_sum(place, number, journal.segment(segment));
        table.insert((place, number), row.as_slice())?;
    }
    Ok(())
}

impl ChunkIndex {
    /// A transfer's journal as of its last commit. A damaged part counts as empty: its chunks are
    /// fetched again.
    pub fn journal(&self, place: u32, chunks: u64) -> Result<Journal, Fault> {
        let rows: Vec<(u32, Vec<u8>)> = self.tree.read(|read| {
            let journal = read.open_table(JOURNAL)?;
            let rows = journal.range((place, 0)..(place, u32::MAX))?;
            rows.map(|row| {
                row.map(|(key, value)| (key.value().1, value.value().to_vec()))
                    .map_err(Into::into)
            })
            .collect()
        })?;
        let mut bits = vec![0u64; chunks.div_ceil(64) as usize];
        for (segment, value) in rows {
            let start = (segment as usize).saturating_mul(SEGMENT_WORDS);
            let words = bits.len().saturating_sub(start).min(SEGMENT_WORDS);
            let Some(sound) = sound_segment(place, segment, &value, words) else {
                tracing::error!(
                    place,
                    segment,
                    "a part of a transfer's journal is damaged: its chunks are fetched again"
                );
                continue;
            };
            for (word, bytes) in bits.iter_mut().skip(start).zip(sound.chunks_exact(8)) {
                let mut out = [0; 8];
                out.copy_from_slice(bytes);
                *word = u64::from_le_bytes(out);
            }
        }
        let set = bits.iter().map(|w| u64::from(w.count_ones())).sum();
        Ok(Journal { bits, set })
    }

    /// Clears the bits of these chunks: their file must be written again.
    pub fn uncommit(
        &self,
        place: u32,
        journal: &RwLock<Journal>,
        ordinals: &[u64],
    ) -> Result<(), Fault> {
        let mut journal = journal.write();
        ordinals.iter().for_each(|ordinal| journal.clear(*ordinal));
        self.tree
            .write(|write| write_bits(write, place, &journal, ordinals))
    }
}

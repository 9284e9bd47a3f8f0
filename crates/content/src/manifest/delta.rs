//! Deltas: manifest pages compressed against the pages of another version that the receiver has.
//!
//! A page lists about 250 chunks by their hashes, which are not compressible. If changes are spread
//! over a whole artifact, each page contains one of them. Compressed against the old pages, only
//! the new hashes cost bytes. Both sides identify the old pages by their numbers in the list of
//! entry pages of the old version. The receiver, which knows what it has, chooses them
//! ([`Alignment`]).

use std::collections::HashMap;
use std::ops::Range;

use bytes::Bytes;
use zstd::zstd_safe::CParameter;

use base::fault::Fault;
use base::limits::{CHUNK_BYTES_MAX, DIFFERENCE_BASE_BYTES_MAX};

use super::PageRef;

/// The zstd level: there are few pages, and a connection is slower than this level.
const LEVEL: i32 = 6;
/// Twice the size of the old pages and the new ones, so that a match can reach all of them.
const WINDOW_LOG: u32 = 22;
/// About one slot for each record of the old pages.
const TABLE_LOG: u32 = 20;
/// Old pages on each side of the estimated position of the new ones, in bytes.
const SLACK_BYTES: u64 = (DIFFERENCE_BASE_BYTES_MAX - CHUNK_BYTES_MAX as u64) / 2;

/// Compresses pages against old pages.
pub fn compress(old: &[Bytes], pages: &[Bytes]) -> Result<Vec<u8>, Fault> {
    let error = |e: std::io::Error| Fault::internal(format!("compress manifest pages: {e}"));
    let mut squeezer = zstd::bulk::Compressor::new(LEVEL).map_err(error)?;
    for parameter in [
        CParameter::WindowLog(WINDOW_LOG),
        CParameter::HashLog(TABLE_LOG),
        CParameter::ChainLog(TABLE_LOG),
    ] {
        squeezer.set_parameter(parameter).map_err(error)?;
    }
    squeezer
        .set_dictionary(LEVEL, &old.concat())
        .map_err(error)?;
    squeezer.compress(&pages.concat()).map_err(error)
}

/// Restores the pages of these lengths, compressed against the same old pages. The result is not
/// verified.
pub fn restore(old: &[Bytes], compressed: &[u8], lens: &[u32]) -> Result<Vec<Bytes>, Fault> {
    let total = lens.iter().map(|&len| len as usize).sum();
    let error = |why: &str| {
        Fault::integrity(format!(
            "a difference of manifest pages is malformed: {why}"
        ))
    };
    if total > CHUNK_BYTES_MAX {
        return Err(error("it is too large"));
    }
    let mut restorer = zstd::bulk::Decompressor::with_dictionary(&old.concat())
        .map_err(|e| error(&e.to_string()))?;
    let mut all = Bytes::from(
        restorer
            .decompress(compressed, total)
            .map_err(|e| error(&e.to_string()))?,
    );
    if all.len() != total {
        return Err(error("it is too short"));
    }
    Ok(lens.iter().map(|&len| all.split_to(len as usize)).collect())
}

/// Maps positions in the entry pages of a new version to positions in an old version.
#[derive(Debug)]
pub struct Alignment {
    /// The offset of each page from the first page in bytes, and one more for the end.
    old: Vec<u64>,
    new: Vec<u64>,
    /// Corresponding positions (new, old), ascending in both: pages that both versions have, the
    /// start and the end.
    anchors: Vec<(u64, u64)>,
}

fn offsets(pages: &[PageRef]) -> Vec<u64> {
    let mut at = 0;
    let mut out = vec![0];
    for page in pages {
        at += u64::from(page.len);
        out.push(at);
    }
    out
}

impl Alignment {
    /// Compares the lists of two versions.
    pub fn new(old: &[PageRef], new: &[PageRef]) -> Self {
        let numbers: HashMap<_, _> = old
            .iter()
            .enumerate()
            .map(|(number, page)| (page.id, number))
            .collect();
        let (old, starts) = (offsets(old), offsets(new));
        let mut anchors = vec![(0, 0)];
        for (page, &at) in new.iter().zip(&starts) {
            let Some(&number) = numbers.get(&page.id) else {
                continue;
            };
            if anchors.last().is_none_or(|last| last.1 < old[number]) {
                anchors.push((at, old[number]));
            }
        }
        let end = |offsets: &[u64]| offsets.last().copied().unwrap_or(0);
        anchors.push((end(&starts), end(&old)));
        Self {
            old,
            new: starts,
            anchors,
        }
    }

    /// Estimates the position in the old version by linear interpolation between the nearest
    /// anchors.
    fn guess(&self, at: u64) -> u64 {
        let next = self
            .anchors
            .partition_point(|anchor| anchor.0 <= at)
            .clamp(1, self.anchors.len() - 1);
        let (from, to) = (self.anchors[next - 1], self.anchors[next]);
        let (new_len, old_len) = (to.0 - from.0, to.1.saturating_sub(from.1));
        let old_offset = u128::from(at.saturating_sub(from.0)) * u128::from(old_len)
            / u128::from(new_len.max(1));
        from.1 + (old_offset as u64).min(old_len)
    }

    /// The old pages against which these new pages are compressed best: at most
    /// [`DIFFERENCE_BASE_BYTES_MAX`] of them.
    pub fn beside(&self, pages: &Range<usize>) -> Range<usize> {
        if self
            .old
            .last()
            .is_some_and(|&all| all <= DIFFERENCE_BASE_BYTES_MAX)
        {
            return 0..self.old.len() - 1;
        }
        let (from, to) = (
            self.guess(self.new[pages.start]),
            self.guess(self.new[pages.end]),
        );
        let (from, to) = (from.saturating_sub(SLACK_BYTES), to + SLACK_BYTES);
        let first = self.old.partition_point(|&begin| begin < from);
        let fits = |&end: &u64| end <= to && end - self.old[first] <= DIFFERENCE_BASE_BYTES_MAX;
        first..first + self.old[first + 1..].partition_point(fits)
    }
}

//! Differences: manifest pages compressed against the pages of another version, which the receiver
//! holds.
//!
//! A page names some 250 chunks by their hashes, which nothing squeezes; and where changes are
//! spread over a whole artifact, each page holds one of them. Against the old pages only the names
//! that are new cost anything. Both sides name the old pages by their numbers in the old version's
//! list of entry pages, and the receiver, who knows what he holds, chooses them ([`Alignment`]).

use std::collections::HashMap;
use std::ops::Range;

use bytes::Bytes;
use zstd::zstd_safe::CParameter;

use base::fault::Fault;
use base::limits::{CHUNK_BYTES_MAX, DIFFERENCE_BASE_BYTES_MAX};

use super::PageRef;

/// zstd's level: pages are few, and a line is slower than this.
const LEVEL: i32 = 6;
/// Twice the old pages and the new ones: all of them are in reach of a match.
const WINDOW_LOG: u32 = 22;
/// A slot for about each place of the old pages at which a record begins.
const TABLE_LOG: u32 = 20;
/// Old pages on each side of where the new ones are thought to stand, in bytes.
const SLACK_BYTES: u64 = (DIFFERENCE_BASE_BYTES_MAX - CHUNK_BYTES_MAX as u64) / 2;

/// Squeezes pages against old ones.
pub fn compress(old: &[Bytes], pages: &[Bytes]) -> Result<Vec<u8>, Fault> {
    let wrong = |e: std::io::Error| Fault::internal(format!("compress manifest pages: {e}"));
    let mut squeezer = zstd::bulk::Compressor::new(LEVEL).map_err(wrong)?;
    for parameter in [
        CParameter::WindowLog(WINDOW_LOG),
        CParameter::HashLog(TABLE_LOG),
        CParameter::ChainLog(TABLE_LOG),
    ] {
        squeezer.set_parameter(parameter).map_err(wrong)?;
    }
    squeezer
        .set_dictionary(LEVEL, &old.concat())
        .map_err(wrong)?;
    squeezer.compress(&pages.concat()).map_err(wrong)
}

/// The pages of these lengths, out of what [`compress`] made of them against the same old pages.
/// They are not checked.
pub fn restore(old: &[Bytes], compressed: &[u8], lens: &[u32]) -> Result<Vec<Bytes>, Fault> {
    let total = lens.iter().map(|&len| len as usize).sum();
    let wrong = |why: &str| {
        Fault::integrity(format!(
            "a difference of manifest pages is malformed: {why}"
        ))
    };
    if total > CHUNK_BYTES_MAX {
        return Err(wrong("it is too large"));
    }
    let mut restorer = zstd::bulk::Decompressor::with_dictionary(&old.concat())
        .map_err(|e| wrong(&e.to_string()))?;
    let mut all = Bytes::from(
        restorer
            .decompress(compressed, total)
            .map_err(|e| wrong(&e.to_string()))?,
    );
    if all.len() != total {
        return Err(wrong("it is too short"));
    }
    Ok(lens.iter().map(|&len| all.split_to(len as usize)).collect())
}

/// Where the entry pages of two versions stand beside each other.
#[derive(Debug)]
pub struct Alignment {
    /// Where each page begins, bytes from the first; one more for the end.
    old: Vec<u64>,
    new: Vec<u64>,
    /// ChunkIndex that stand beside each other, (new, old), ascending in both: pages that both
    /// have, the begin and the end.
    anchors: Vec<(u64, u64)>,
}

fn begins(pages: &[PageRef]) -> Vec<u64> {
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
        let (old, starts) = (begins(old), begins(new));
        let mut anchors = vec![(0, 0)];
        for (page, &at) in new.iter().zip(&starts) {
            let Some(&number) = numbers.get(&page.id) else {
                continue;
            };
            if anchors.last().is_none_or(|last| last.1 < old[number]) {
                anchors.push((at, old[number]));
            }
        }
        let end = |begins: &[u64]| begins.last().copied().unwrap_or(0);
        anchors.push((end(&starts), end(&old)));
        Self {
            old,
            new: starts,
            anchors,
        }
    }

    /// Where a place of the new version would stand in the old one: evenly between the anchors
    /// around it.
    fn guess(&self, at: u64) -> u64 {
        let next = self
            .anchors
            .partition_point(|anchor| anchor.0 <= at)
            .clamp(1, self.anchors.len() - 1);
        let (from, to) = (self.anchors[next - 1], self.anchors[next]);
        let (run, old_run) = (to.0 - from.0, to.1.saturating_sub(from.1));
        let into =
            u128::from(at.saturating_sub(from.0)) * u128::from(old_run) / u128::from(run.max(1));
        from.1 + (into as u64).min(old_run)
    }

    /// The old pages that the new pages of these numbers are best compressed against:
    /// [`DIFFERENCE_BASE_BYTES_MAX`] of them at most.
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

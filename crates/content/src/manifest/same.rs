//! Whether two manifests describe the same content.

use base::fault::Fault;

use super::{KindInfo, Pages, Root, Step, Walk};

/// Whether two artifacts differ only in the modification times of their files.
pub fn same_but_times<P: Pages + ?Sized>(
    one: &Root,
    other: &Root,
    pages: &P,
) -> Result<bool, Fault> {
    let same = |one: &Root, other: &Root| {
        (one.kind, &one.info, one.chunking, one.totals)
            == (other.kind, &other.info, other.chunking, other.totals)
    };
    if !same(one, other) {
        return Ok(false);
    }
    let (mut left, mut right) = (Walk::new(one, pages), Walk::new(other, pages));
    loop {
        match (entry(left.next())?, entry(right.next())?) {
            (None, None) => return Ok(true),
            (Some(left), Some(right)) if left == right => {}
            _ => return Ok(false),
        }
    }
}

/// Whether two artifacts are one image under one name, and differ only in what belongs to it.
pub fn same_but_referrers(one: &Root, other: &Root) -> bool {
    match (&one.info, &other.info) {
        (KindInfo::Image(one), KindInfo::Image(other)) => {
            let mut same = one.clone();
            same.referrers.clone_from(&other.referrers);
            one.referrers != other.referrers && same == *other
        }
        _ => false,
    }
}

/// A step without the time, and without the position of a chunk, which depends on the pages.
fn entry(step: Option<Result<Step, Fault>>) -> Result<Option<Step>, Fault> {
    Ok(match step.transpose()? {
        Some(Step::Entry {
            number,
            mut entry,
            first_ordinal,
        }) => {
            entry.attributes.modified = None;
            Some(Step::Entry {
                number,
                entry,
                first_ordinal,
            })
        }
        Some(Step::Chunk(chunk, mut spot)) => {
            (spot.page, spot.index) = (chunk.id, 0);
            Some(Step::Chunk(chunk, spot))
        }
        None => None,
    })
}

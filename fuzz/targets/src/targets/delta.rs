//! Deltas of manifest pages.

use base::names::Kind;
use bytes::Bytes;
use content::manifest::delta;

use super::manifest::{entries, made};
use super::{Parts, joined};
use crate::Target;
use crate::outcome::taken;

pub(super) const DELTA: Target = Target {
    name: "manifest_delta",
    about: "manifest pages compressed against older pages: the input is the compressed bytes, one older page, and lengths",
    run: delta_of_pages,
    seeds: || {
        let (_, pages) = made(Kind::Dataset, &entries());
        let old: Vec<u8> = pages.concat();
        let new = [&old[..], b"\x01\x00\x01z\x00"].concat();
        let lens = (new.len() as u32).to_le_bytes();
        let made = delta::compress(&[old.clone().into()], &[new.into()]).unwrap_or_default();
        vec![joined(&[], &[&made, &old, &lens])]
    },
    words: &["(\u{b5}/\u{fd}"],
    short: 400,
};

fn delta_of_pages(input: &[u8]) {
    let mut parts = Parts::new(input);
    let (compressed, old) = (parts.part(), Bytes::copy_from_slice(parts.part()));
    let lens: Vec<u32> = parts
        .part()
        .chunks_exact(4)
        .map(|len| u32::from_le_bytes([len[0], len[1], len[2], len[3]]))
        .collect();
    let Some(pages) = taken(delta::restore(
        std::slice::from_ref(&old),
        compressed,
        &lens,
    )) else {
        return;
    };
    assert_eq!(
        pages
            .iter()
            .map(|page| page.len() as u32)
            .collect::<Vec<_>>(),
        lens
    );
    let made = delta::compress(std::slice::from_ref(&old), &pages);
    assert!(
        made.is_ok_and(|made| delta::restore(&[old], &made, &lens) == Ok(pages)),
        "compressed again, it is the same"
    );
}

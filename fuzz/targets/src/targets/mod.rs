//! The targets, and what they share.

mod bundle;
mod delta;
mod folder;
mod frame;
mod http;
mod image;
mod labels;
mod manifest;
mod names;
mod registry;
mod wire;

use std::path::Path;

use crate::Target;

pub(crate) const ALL: &[Target] = &[
    names::NAMES,
    names::IMAGE_REFERENCE,
    manifest::ROOT,
    manifest::PAGES,
    delta::DELTA,
    frame::FRAME,
    wire::MUX,
    wire::CONTROL,
    wire::QUESTION,
    wire::FETCH_REQUEST,
    wire::JOIN,
    bundle::BUNDLE,
    image::IMAGE,
    labels::COCO,
    labels::CSV,
    labels::JSONL,
    labels::LABEL_STUDIO,
    labels::VOC,
    labels::YOLO,
    labels::CVAT,
    labels::DATUMARO,
    labels::KLARF,
    labels::LABELME,
    labels::MASKS,
    labels::VIA,
    labels::CANONICAL,
    registry::ANSWER,
    http::API_BODY,
    http::CONFIG,
];

/// Takes an input apart, for targets that make something of several parts. At its end there are
/// zeros and empty parts.
struct Parts<'a> {
    rest: &'a [u8],
}

impl<'a> Parts<'a> {
    fn new(input: &'a [u8]) -> Self {
        Self { rest: input }
    }

    fn byte(&mut self) -> u8 {
        let Some((&byte, rest)) = self.rest.split_first() else {
            return 0;
        };
        self.rest = rest;
        byte
    }

    /// A part behind its length (u16 LE).
    fn part(&mut self) -> &'a [u8] {
        let len = usize::from(self.byte()) | usize::from(self.byte()) << 8;
        let (part, rest) = self.rest.split_at(len.min(self.rest.len()));
        self.rest = rest;
        part
    }

    /// All parts that are left.
    fn all(mut self) -> Vec<&'a [u8]> {
        let mut parts = Vec::new();
        while !self.rest.is_empty() {
            parts.push(self.part());
        }
        parts
    }
}

/// What [`Parts`] takes apart: these bytes, then these parts.
fn joined(head: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let mut out = head.to_vec();
    for part in parts {
        let part = &part[..part.len().min(usize::from(u16::MAX))];
        out.extend_from_slice(&(part.len() as u16).to_le_bytes());
        out.extend_from_slice(part);
    }
    out
}

/// Writes a file of an input, with the folders above it.
fn write_file(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write as _;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::File::create(path)?.write_all(bytes)
}

/// A temporary directory for one input.
#[expect(clippy::expect_used, reason = "without one nothing can be tested")]
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

/// Seeds that are texts.
fn texts(all: &[&str]) -> Vec<Vec<u8>> {
    all.iter().map(|text| text.as_bytes().to_vec()).collect()
}

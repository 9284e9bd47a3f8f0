//! Artifacts without any checks: manifests that are written byte by byte, and frames with
//! inconsistent fields.

use std::collections::HashMap;

use content::chunk::Hash;
use content::manifest::Digest;
use model::protocol::Wanted;
use serde_json::{Value, json};
use xxhash_rust::xxh3::Xxh3;

/// Files up to this size are one chunk, named by the file's hash.
const WHOLE: u64 = 256 << 10;

fn number(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn text(out: &mut Vec<u8>, bytes: &[u8]) {
    number(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// A page of entries, without checks: paths may be absolute, out of order or not UTF-8.
pub(crate) struct EntryPage {
    bytes: Vec<u8>,
    chunks: Vec<Hash>,
    entries: u64,
}

impl EntryPage {
    pub(crate) fn new() -> Self {
        Self {
            bytes: vec![b'E'],
            chunks: Vec::new(),
            entries: 0,
        }
    }

    fn entry(&mut self, tag: u8, path: &[u8], mode: u64) {
        self.bytes.push(tag);
        number(&mut self.bytes, 0);
        text(&mut self.bytes, path);
        number(&mut self.bytes, mode);
        self.entries += 1;
    }

    pub(crate) fn dir(mut self, path: impl AsRef<[u8]>, mode: u64) -> Self {
        self.entry(1, path.as_ref(), mode);
        self
    }

    pub(crate) fn link(mut self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.entry(2, path.as_ref(), 0o777);
        text(&mut self.bytes, target.as_ref());
        self
    }

    /// A file with the hash of its content.
    pub(crate) fn file(self, path: impl AsRef<[u8]>, content: &[u8], mode: u64) -> Self {
        self.file_as(path, content.len() as u64, Hash::of(content), mode)
    }

    /// A file of any size and hash.
    pub(crate) fn file_as(
        mut self,
        path: impl AsRef<[u8]>,
        size: u64,
        hash: Hash,
        mode: u64,
    ) -> Self {
        self.entry(3, path.as_ref(), mode);
        number(&mut self.bytes, size);
        self.bytes.extend_from_slice(&hash.0);
        if size > 0 && size <= WHOLE {
            self.chunks.push(hash);
        }
        self
    }

    /// The next chunk of the file before.
    pub(crate) fn chunk(mut self, id: Hash, len: u64) -> Self {
        self.bytes.push(4);
        number(&mut self.bytes, len);
        self.bytes.extend_from_slice(&id.0);
        self.chunks.push(id);
        self
    }

    /// Appends any bytes.
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }
}

/// A page of pages.
pub(crate) struct IndexPage {
    bytes: Vec<u8>,
    children: Vec<Hash>,
    chunks: u64,
    entries: u64,
}

impl IndexPage {
    pub(crate) fn new() -> Self {
        Self {
            bytes: vec![b'I'],
            children: Vec::new(),
            chunks: 0,
            entries: 0,
        }
    }

    pub(crate) fn child(mut self, id: Hash, len: u64, chunks: u64, entries: u64) -> Self {
        for n in [len, chunks, entries] {
            number(&mut self.bytes, n);
        }
        self.bytes.extend_from_slice(&id.0);
        self.children.push(id);
        self.chunks = self.chunks.saturating_add(chunks);
        self.entries = self.entries.saturating_add(entries);
        self
    }
}

/// An artifact as a hostile origin sends it.
#[derive(Clone)]
pub(crate) struct Artifact {
    root: Value,
    /// The frame of each page or chunk, by the hash under which it is sent.
    frames: HashMap<Hash, Vec<u8>>,
    children: HashMap<Hash, Vec<Hash>>,
    listed: Vec<Hash>,
}

impl Artifact {
    /// An artifact without pages, whose totals are zero.
    pub(crate) fn new(kind: &str) -> Self {
        let root = json!({
            "format": 1, "kind": kind, "info": {"is": "files"},
            "chunking": {"min": 8192, "avg": 28672, "max": 65536, "whole": WHOLE, "normalization": 2},
            "totals": {"files": 0, "dirs": 0, "symlinks": 0, "bytes": 0, "chunks": 0},
            "depth": 0, "pages": [],
        });
        Self {
            root,
            frames: HashMap::new(),
            children: HashMap::new(),
            listed: Vec::new(),
        }
    }

    /// A valid artifact of these files (paths in the manifest's order).
    pub(crate) fn of_files(kind: &str, files: &[(&str, &[u8])]) -> Self {
        let (mut artifact, mut page) = (Self::new(kind), EntryPage::new());
        for (path, content) in files {
            page = page.file(path, content, 0o644);
            artifact.hold(content);
            artifact.add("files", 1);
            artifact.add("bytes", content.len() as u64);
            artifact.add("chunks", u64::from(!content.is_empty()));
        }
        artifact.list(&page, 1);
        artifact
    }

    /// Adds to one of the totals.
    pub(crate) fn add(&mut self, total: &str, n: u64) {
        let now = self.root["totals"][total]
            .as_u64()
            .expect("a total is a number");
        self.root["totals"][total] = now.saturating_add(n).into();
    }

    /// Changes the root manifest.
    pub(crate) fn set(&mut self, field: &str, value: Value) {
        self.root[field] = value;
    }

    /// Sends these bytes under their own hash.
    pub(crate) fn hold(&mut self, raw: &[u8]) -> Hash {
        let id = Hash::of(raw);
        self.frames.insert(id, frame(id, raw.len() as u32, 0, raw));
        id
    }

    /// Sends this frame under this hash.
    pub(crate) fn hold_frame(&mut self, id: Hash, frame: Vec<u8>) {
        self.frames.insert(id, frame);
    }

    /// Never answers a request for this hash: the peer waits.
    pub(crate) fn withhold(&mut self, id: Hash) {
        self.frames.remove(&id);
    }

    /// Lists a page of entries in the root, any number of times.
    pub(crate) fn list(&mut self, page: &EntryPage, times: usize) -> Hash {
        let id = self.hold(&page.bytes);
        self.children.insert(id, page.chunks.clone());
        self.list_as(
            id,
            page.bytes.len() as u64,
            page.chunks.len() as u64,
            page.entries,
            times,
        );
        id
    }

    /// Lists a page of pages in the root.
    pub(crate) fn list_index(&mut self, page: &IndexPage, times: usize) -> Hash {
        let id = self.hold(&page.bytes);
        self.children.insert(id, page.children.clone());
        self.list_as(
            id,
            page.bytes.len() as u64,
            page.chunks,
            page.entries,
            times,
        );
        id
    }

    /// Sends a page of entries that is listed elsewhere. Returns its hash and length.
    pub(crate) fn hold_page(&mut self, page: &EntryPage) -> (Hash, u64) {
        let id = self.hold(&page.bytes);
        self.children.insert(id, page.chunks.clone());
        (id, page.bytes.len() as u64)
    }

    /// Lists a page with any counts.
    pub(crate) fn list_as(&mut self, id: Hash, len: u64, chunks: u64, entries: u64, times: usize) {
        let page = json!({"id": id.hex(), "len": len, "chunks": chunks, "entries": entries});
        let pages = self.root["pages"].as_array_mut().expect("pages are a list");
        pages.extend(std::iter::repeat_n(page, times));
        self.listed.extend(std::iter::repeat_n(id, times));
    }

    /// The bytes of the root manifest.
    pub(crate) fn root_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(&self.root).expect("JSON")
    }

    /// Its digest.
    pub(crate) fn digest(&self) -> Digest {
        Hash::of(&self.root_bytes())
    }

    /// The answer to a fetch request.
    pub(crate) fn answer(&self, wants: &[Wanted]) -> Vec<u8> {
        let mut out = Vec::new();
        let root = self.root_bytes();
        for want in wants {
            match want {
                Wanted::Root => out.extend(frame(self.digest(), root.len() as u32, 0, &root)),
                Wanted::RootAndPages(_) => {
                    out.extend(frame(self.digest(), root.len() as u32, 0, &root));
                    self.listed.iter().for_each(|id| out.extend(self.give(*id)));
                }
                Wanted::TopPages(ranges) => self.give_of(&self.listed, ranges, &mut out),
                Wanted::Children { page, ranges } | Wanted::Refused { page, ranges } => {
                    let none = Vec::new();
                    self.give_of(self.children.get(page).unwrap_or(&none), ranges, &mut out);
                }
                Wanted::Delta { .. } => out.extend(self.give(Hash([0; 32]))),
            }
        }
        out
    }

    fn give_of(&self, ids: &[Hash], ranges: &[(u32, u32)], out: &mut Vec<u8>) {
        for (first, count) in ranges {
            ids.iter()
                .skip(*first as usize)
                .take(*count as usize)
                .for_each(|id| out.extend(self.give(*id)));
        }
    }

    fn give(&self, id: Hash) -> Vec<u8> {
        let lacks = br#"{"code":"not_found","message":"it lacks this","next":"","reason":"waiting_for_source","retry":"never"}"#;
        self.frames
            .get(&id)
            .cloned()
            .unwrap_or_else(|| frame(Hash([0; 32]), 0, 255, lacks))
    }
}

/// A frame with these fields and the right checksum: `codec` 0 is raw, 1 zstd, 2 byte-stream split,
/// 254 a delta, 255 a fault.
pub(crate) fn frame(id: Hash, raw_len: u32, codec: u8, stored: &[u8]) -> Vec<u8> {
    let mut out = id.0.to_vec();
    out.extend(raw_len.to_le_bytes());
    out.extend((stored.len() as u32).to_le_bytes());
    out.extend([codec, 0, 0, 0]);
    let mut sum = Xxh3::new();
    sum.update(&out);
    sum.update(stored);
    out.extend(sum.digest().to_le_bytes());
    out.extend_from_slice(stored);
    out
}

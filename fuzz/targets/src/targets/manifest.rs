//! Root manifests and manifest pages.

use std::collections::HashMap;
use std::path::Path;

use base::fault::Fault;
use base::names::{ArtifactRef, Kind};
use bytes::Bytes;
use content::chunk::{DEFAULT_CHUNKING, Hash};
use content::manifest::{
    Attributes, Builder, ChunkRef, Entry, EntryBody, FileInfo, ImageInfo, KindInfo, LabelsInfo,
    PageRef, Pages, Root, Step, Totals, Walk, check, children, entry_pages, for_each_page, survey,
};

use super::{Parts, joined};
use crate::Target;
use crate::outcome::{note, taken};

pub(super) const ROOT: Target = Target {
    name: "root_manifest",
    about: "a root manifest: the JSON that names an artifact's pages",
    run: root_manifest,
    seeds: || {
        [Kind::Dataset, Kind::Image, Kind::Labels]
            .map(|kind| made(kind, &entries()).0.to_bytes())
            .to_vec()
    },
    words: &[
        "format", "kind", "files", "image", "labels", "dataset", "model", "totals", "depth",
        "pages", "chunking", "null",
    ],
    short: 1500,
};

fn root_manifest(input: &[u8]) {
    let Some(root) = taken(Root::parse(input, Hash::of(input))) else {
        return;
    };
    assert_eq!(
        root.to_bytes(),
        input,
        "a root manifest is accepted in its canonical form only"
    );
    assert!(root.chunking.is_possible());
    let none = Given::default();
    taken(check(&name(root.kind), &root, &none, &Default::default()));
    taken(entry_pages(&root, &none));
}

/// Pages by their names.
#[derive(Default)]
struct Given(HashMap<Hash, Bytes>);

impl Given {
    fn put(&mut self, bytes: Bytes) -> Hash {
        let id = Hash::of(&bytes);
        self.0.insert(id, bytes);
        id
    }
}

impl Pages for Given {
    fn page(&self, id: Hash) -> Result<Bytes, Fault> {
        self.0
            .get(&id)
            .cloned()
            .ok_or_else(|| Fault::not_found(format!("page {id} is not there")))
    }
}

#[expect(clippy::expect_used, reason = "the name is a constant")]
fn name(kind: Kind) -> ArtifactRef {
    ArtifactRef::new(kind, "x", "v1").expect("a valid reference")
}

fn info(kind: Kind) -> KindInfo {
    match kind {
        Kind::Image => KindInfo::Image(ImageInfo {
            media_type: "application/vnd.oci.image.manifest.v1+json".into(),
            digest: format!("sha256:{}", "ab".repeat(32)),
            size: 5,
            platforms: vec!["linux/amd64".into()],
            absent: Vec::new(),
            repository: None,
            tag: None,
            referrers: Vec::new(),
        }),
        Kind::Labels => KindInfo::Labels(LabelsInfo {
            dataset: None,
            samples: 1,
            annotations: 1,
            classes: 1,
            format: "coco".into(),
        }),
        Kind::Dataset | Kind::Operator | Kind::Model => KindInfo::Files,
    }
}

fn file(path: &str, size: u64) -> Option<Entry> {
    let body = EntryBody::File(FileInfo {
        size,
        hash: Hash::of(path.as_bytes()),
    });
    Some(Entry {
        path: path.parse().ok()?,
        mode: 0o644,
        body,
        attributes: Attributes::default(),
    })
}

pub(super) fn entries() -> Vec<Entry> {
    let other = |path: &str, body: EntryBody| {
        Some(Entry {
            path: path.parse().ok()?,
            mode: 0o755,
            body,
            attributes: Attributes::default(),
        })
    };
    let link = |target: &str| EntryBody::Symlink(target.into());
    let all = [
        other("a", EntryBody::Dir),
        file("a/b.bin", 5),
        file("a/large", 300_000),
        other("a/link", link("../c/d.jpg")),
        other("c", EntryBody::Dir),
        file("c/d.jpg", 70_000),
        file("empty", 0),
        other("link", link("a/./b.bin")),
    ];
    all.into_iter().flatten().collect()
}

/// The entries that an image, or labels, must have.
fn entries_of(kind: Kind) -> Vec<Entry> {
    let dir = |path: &str| {
        Some(Entry {
            path: path.parse().ok()?,
            mode: 0o755,
            body: EntryBody::Dir,
            attributes: Attributes::default(),
        })
    };
    let all = match kind {
        Kind::Image => {
            let blob = format!("blobs/sha256/{}", "ab".repeat(32));
            vec![
                dir("blobs"),
                dir("blobs/sha256"),
                file(&blob, 5),
                file("index.json", 100),
                file("oci-layout", 30),
            ]
        }
        Kind::Labels => ["annotations.jsonl", "classes.jsonl", "samples.jsonl"]
            .into_iter()
            .map(|name| file(name, 100))
            .collect(),
        Kind::Dataset | Kind::Operator | Kind::Model => return entries(),
    };
    all.into_iter().flatten().collect()
}

/// The manifest of these entries, and its pages.
pub(super) fn made(kind: Kind, entries: &[Entry]) -> (Root, Vec<Bytes>) {
    let mut pages = Vec::new();
    let mut sink = |page: content::frame::Verified| {
        pages.push(page.bytes);
        Ok(())
    };
    let mut builder = Builder::new(DEFAULT_CHUNKING, &mut sink);
    for entry in entries {
        let chunks = match &entry.body {
            EntryBody::File(file) if builder.lists_chunks(file.size) => chunks_of(file.size),
            _ => Vec::new(),
        };
        let pushed = builder.push(entry, &chunks);
        assert!(pushed.is_ok(), "{pushed:?}");
    }
    let root = builder.finish(kind, info(kind));
    assert!(root.is_ok());
    (root.unwrap_or_else(|_| empty(kind)), pages)
}

fn empty(kind: Kind) -> Root {
    Root {
        format: 1,
        kind,
        info: info(kind),
        chunking: DEFAULT_CHUNKING,
        totals: Totals::default(),
        depth: 0,
        pages: Vec::new(),
    }
}

fn chunks_of(size: u64) -> Vec<ChunkRef> {
    let whole = u64::from(DEFAULT_CHUNKING.max);
    (0..size.div_ceil(whole))
        .map(|number| ChunkRef {
            id: Hash::of(&number.to_le_bytes()),
            len: whole.min(size - number * whole) as u32,
        })
        .collect()
}

const KINDS: [Kind; 3] = [Kind::Dataset, Kind::Image, Kind::Labels];

pub(super) const PAGES: Target = Target {
    name: "manifest_page",
    about: "entry pages and index pages of a manifest: the input is a kind, how the pages are listed, and the pages",
    run: manifest_page,
    seeds: || {
        let mut all = Vec::new();
        for (number, kind) in (0..).zip(KINDS) {
            let (root, pages) = made(kind, &entries_of(kind));
            let parts: Vec<&[u8]> = pages.iter().map(|page| &page[..]).collect();
            all.push(joined(&[number, 0], &parts));
            all.push(joined(&[number, 1], &parts));
            let index = index_page(&root.pages);
            all.push(joined(&[number, 2], &[&parts[..], &[&index[..]]].concat()));
        }
        all
    },
    words: &[
        "blobs/sha256",
        "index.json",
        "oci-layout",
        "annotations.jsonl",
        "classes.jsonl",
        "samples.jsonl",
        "..",
        "a/b",
        "/",
    ],
    short: 1500,
};

fn number(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn index_page(pages: &[PageRef]) -> Vec<u8> {
    let mut out = vec![b'I'];
    for page in pages {
        number(&mut out, page.len.into());
        number(&mut out, page.chunks);
        number(&mut out, page.entries);
        out.extend_from_slice(&page.id.0);
    }
    out
}

/// Lists the pages as they would have to be listed, so that an input is not refused for its hashes
/// and counts alone.
///
/// `how`: 0 all pages in the root; 1 one index page above all of them; 2 the last page above the
/// others, as it is.
fn manifest_page(input: &[u8]) {
    let mut parts = Parts::new(input);
    let kind = KINDS[usize::from(parts.byte()) % KINDS.len()];
    let how = parts.byte() % 3;
    let pages: Vec<Bytes> = parts
        .all()
        .into_iter()
        .map(Bytes::copy_from_slice)
        .collect();
    let mut given = Given::default();
    let mut root = empty(kind);
    let mut listed = Vec::new();
    for page in &pages {
        let counted = Counted::of(page);
        listed.push(PageRef {
            id: given.put(page.clone()),
            len: page.len() as u32,
            chunks: counted.chunks,
            entries: counted.entries,
        });
        counted.add_to(&mut root.totals);
    }
    if how == 2
        && let Some(last) = listed.pop()
    {
        let counted = Counted::of(&pages[pages.len() - 1]);
        root.totals.chunks = counted.chunks;
        root.pages = vec![last];
        root.depth = 1;
    } else if how == 1 {
        let index = Bytes::from(index_page(&listed));
        let (chunks, entries) = listed.iter().fold((0, 0), |(c, e): (u64, u64), p| {
            (c.saturating_add(p.chunks), e.saturating_add(p.entries))
        });
        root.pages = vec![PageRef {
            len: index.len() as u32,
            id: given.put(index),
            chunks,
            entries,
        }];
        root.depth = 1;
    } else {
        root.pages = listed;
    }
    for page in &pages {
        taken(children(page, &root));
    }
    let mut named = 0;
    taken(survey(
        &root,
        &given,
        &mut std::collections::HashSet::new(),
        &mut |_| named += 1,
    ));
    let first = check(&name(kind), &root, &given, &Default::default());
    let again = check(&name(kind), &root, &given, &Default::default());
    assert_eq!(first, again, "a check gives the same answer each time");
    if taken(first).is_some() {
        accepted(&root, &given);
    }
}

/// What holds for every manifest that was accepted.
fn accepted(root: &Root, given: &Given) {
    let parsed = Root::parse(&root.to_bytes(), root.digest());
    assert_eq!(parsed.as_ref(), Ok(root));
    let (mut totals, mut files) = (Totals::default(), Vec::<(Entry, Vec<ChunkRef>)>::new());
    for step in Walk::new(root, given) {
        let step = step.map_err(|fault| fault.to_string());
        assert!(step.is_ok(), "an accepted manifest can be walked: {step:?}");
        match step {
            Ok(Step::Entry { entry, .. }) => {
                let path = entry.path.in_dir(Path::new("/top"));
                assert!(
                    path.starts_with("/top")
                        && path.components().count() == entry.path.components().count() + 2
                );
                assert!(entry.mode <= 0o777);
                match &entry.body {
                    EntryBody::Dir => totals.dirs += 1,
                    EntryBody::Symlink(target) => {
                        totals.symlinks += 1;
                        assert!(
                            !target.starts_with('/')
                                && !target.contains('\0')
                                && !target.is_empty()
                        );
                    }
                    EntryBody::File(file) => {
                        totals.files += 1;
                        totals.bytes += file.size;
                    }
                }
                files.push((entry, Vec::new()));
            }
            Ok(Step::Chunk(chunk, _)) => {
                totals.chunks += 1;
                if let Some((_, chunks)) = files.last_mut() {
                    chunks.push(chunk);
                }
            }
            Err(_) => {}
        }
    }
    assert_eq!(totals, root.totals);
    for (entry, chunks) in &files {
        if let EntryBody::File(file) = &entry.body {
            assert_eq!(
                chunks.iter().map(|chunk| u64::from(chunk.len)).sum::<u64>(),
                file.size,
                "{:?}",
                entry.path
            );
        }
    }
    let mut pages = 0;
    let counted = for_each_page(root, given, |_| {
        pages += 1;
        Ok(())
    });
    assert!(counted.is_ok(), "{counted:?}");
    assert!(entry_pages(root, given).is_ok_and(|listed| listed.len() <= pages));
    again(root, &files);
}

/// A manifest made of the same entries is accepted too, and walks the same.
fn again(root: &Root, files: &[(Entry, Vec<ChunkRef>)]) {
    let mut given = Given::default();
    let mut sink = |page: content::frame::Verified| {
        given.put(page.bytes);
        Ok(())
    };
    let mut builder = Builder::new(root.chunking, &mut sink);
    for (entry, chunks) in files {
        let lists = matches!(&entry.body, EntryBody::File(file) if builder.lists_chunks(file.size));
        let pushed = builder.push(entry, if lists { chunks } else { &[] });
        assert!(pushed.is_ok(), "{pushed:?}");
    }
    let built = builder.finish(root.kind, root.info.clone());
    assert!(built.is_ok());
    let Ok(built) = built else { return };
    assert_eq!(built.totals, root.totals);
    let checked = check(&name(root.kind), &built, &given, &Default::default());
    assert!(checked.is_ok(), "{checked:?}");
    note("made again");
}

/// What a page holds, as far as it can be read: a reader of its own, which shares no code with the
/// program's.
#[derive(Default)]
struct Counted {
    files: u64,
    dirs: u64,
    symlinks: u64,
    bytes: u64,
    chunks: u64,
    entries: u64,
}

impl Counted {
    fn of(page: &[u8]) -> Self {
        let mut counted = Self::default();
        let mut rest = page.get(1..).unwrap_or_default();
        match page.first() {
            Some(b'E') => while counted.record(&mut rest).is_some() {},
            Some(b'I') => while counted.child(&mut rest).is_some() {},
            _ => {}
        }
        counted
    }

    fn record(&mut self, rest: &mut &[u8]) -> Option<()> {
        let (&tag, after) = rest.split_first()?;
        *rest = after;
        if tag == 4 {
            number_of(rest)?;
            skip(rest, 32)?;
            self.chunks = self.chunks.saturating_add(1);
            return Some(());
        }
        number_of(rest)?;
        let suffix = number_of(rest)?;
        skip(rest, suffix)?;
        number_of(rest)?;
        self.entries += 1;
        match tag {
            1 => self.dirs += 1,
            2 => {
                let len = number_of(rest)?;
                skip(rest, len)?;
                self.symlinks += 1;
            }
            3 => {
                let size = number_of(rest)?;
                skip(rest, 32)?;
                self.files += 1;
                self.bytes = self.bytes.saturating_add(size);
                self.chunks += u64::from(size > 0 && size <= u64::from(DEFAULT_CHUNKING.whole));
            }
            _ => return None,
        }
        Some(())
    }

    fn child(&mut self, rest: &mut &[u8]) -> Option<()> {
        number_of(rest)?;
        self.chunks = self.chunks.saturating_add(number_of(rest)?);
        self.entries = self.entries.saturating_add(number_of(rest)?);
        skip(rest, 32)
    }

    fn add_to(&self, totals: &mut Totals) {
        totals.files = totals.files.saturating_add(self.files);
        totals.dirs += self.dirs;
        totals.symlinks += self.symlinks;
        totals.bytes = totals.bytes.saturating_add(self.bytes);
        totals.chunks = totals.chunks.saturating_add(self.chunks);
    }
}

fn number_of(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, after) = rest.split_first()?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn skip(rest: &mut &[u8], len: u64) -> Option<()> {
    *rest = rest.get(usize::try_from(len).ok()?..)?;
    Some(())
}

//! Tests with manifests written byte by byte: each malformed manifest is refused, and a survey
//! still finds what it names.

use proptest::prelude::*;

use super::super::tests::{Memory, build, numbered};
use super::*;
use crate::chunk::{DEFAULT_CHUNKING, Hash};
use crate::manifest::{
    DatasetBinding, ImageInfo, ImageReferrer, LabelsInfo, Named, PageRef, Totals, survey,
};
use base::fault::Code;
use base::limits::IMAGE_REFERRERS_MAX;

fn number(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push(n as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// An entry page that is not checked, and its contribution to the totals.
#[derive(Clone, Default)]
struct Page {
    bytes: Vec<u8>,
    totals: Totals,
}

impl Page {
    fn entry(mut self, tag: u8, path: impl AsRef<[u8]>, mode: u64) -> Self {
        if self.bytes.is_empty() {
            self.bytes.push(b'E');
        }
        self.bytes.extend([tag, 0]);
        number(&mut self.bytes, path.as_ref().len() as u64);
        self.bytes.extend(path.as_ref());
        number(&mut self.bytes, mode);
        self
    }

    fn dir(mut self, path: &str) -> Self {
        self.totals.dirs += 1;
        self.entry(1, path, 0o755)
    }

    /// So many directories, each in the one before.
    fn nested_dirs(mut self, count: usize) -> Self {
        let mut len = 1;
        self = self.dir("x");
        for _ in 1..count {
            self.totals.dirs += 1;
            self.bytes.push(1);
            number(&mut self.bytes, len);
            number(&mut self.bytes, 2);
            self.bytes.extend(b"/x");
            number(&mut self.bytes, 0o755);
            len += 2;
        }
        self
    }

    fn link(mut self, path: &str, target: impl AsRef<[u8]>) -> Self {
        self.totals.symlinks += 1;
        let mut this = self.entry(2, path, 0o777);
        number(&mut this.bytes, target.as_ref().len() as u64);
        this.bytes.extend(target.as_ref());
        this
    }

    fn file(self, path: impl AsRef<[u8]>, size: u64) -> Self {
        self.file_as(path, size, 0o644)
    }

    fn file_as(mut self, path: impl AsRef<[u8]>, size: u64, mode: u64) -> Self {
        self.totals.files += 1;
        self.totals.bytes = self.totals.bytes.wrapping_add(size);
        self.totals.chunks += u64::from(size > 0 && size <= u64::from(DEFAULT_CHUNKING.whole));
        let hash = Hash::of(path.as_ref());
        let mut this = self.entry(3, path, mode);
        number(&mut this.bytes, size);
        this.bytes.extend(hash.0);
        this
    }

    /// Another name of a file, which is empty.
    fn hard_link(mut self, path: &str, first: &str) -> Self {
        self.totals.files += 1;
        if self.bytes.is_empty() {
            self.bytes.push(b'E');
        }
        self.bytes.push(7);
        number(&mut self.bytes, first.len() as u64);
        self.bytes.extend(first.as_bytes());
        let mut this = self.entry(3, path, 0o644);
        number(&mut this.bytes, 0);
        this.bytes.extend(Hash::of(first.as_bytes()).0);
        this
    }

    fn chunk(mut self, id: &[u8], len: u64) -> Self {
        if self.bytes.is_empty() {
            self.bytes.push(b'E');
        }
        self.totals.chunks += 1;
        self.bytes.push(4);
        number(&mut self.bytes, len);
        self.bytes.extend(Hash::of(id).0);
        self
    }

    fn put(&self, memory: &Memory) -> PageRef {
        let id = Hash::of(&self.bytes);
        memory.0.borrow_mut().insert(id, self.bytes.clone().into());
        let Totals {
            files,
            dirs,
            symlinks,
            chunks,
            ..
        } = self.totals;
        PageRef {
            id,
            len: self.bytes.len() as u32,
            chunks,
            entries: files + dirs + symlinks,
        }
    }

    /// A manifest that lists this page so many times.
    fn times(&self, memory: &Memory, times: u64) -> Root {
        let t = self.totals;
        let totals = Totals {
            files: t.files * times,
            dirs: t.dirs * times,
            symlinks: t.symlinks * times,
            bytes: t.bytes.wrapping_mul(times),
            chunks: t.chunks * times,
        };
        let pages = vec![self.put(memory); times as usize];
        Root {
            format: 1,
            kind: Kind::Dataset,
            info: KindInfo::Files,
            chunking: DEFAULT_CHUNKING,
            totals,
            depth: 0,
            pages,
        }
    }
}

fn page() -> Page {
    Page::default()
}

fn check_all(artifact: &ArtifactRef, root: &Root, pages: &impl Pages) -> Result<(), Fault> {
    check(artifact, root, pages, &Stop::default())
}

fn checked(root: &Root, memory: &Memory) -> Result<(), Fault> {
    check_all(&format!("{}/x:1", root.kind).parse().unwrap(), root, memory)
}

#[track_caller]
fn refused(name: &str, root: &Root, memory: &Memory, why: &str) {
    let fault = checked(root, memory).expect_err(name);
    assert_eq!(fault.code, Code::Integrity, "{name}: {fault}");
    assert!(
        fault.message.starts_with(&format!("{}/x:1: ", root.kind)) && fault.message.contains(why),
        "{name}: {fault}"
    );
    assert!(
        fault.message.len() < 10_000,
        "{name}: {} bytes",
        fault.message.len()
    );
    // A survey still reads the malformed manifest.
    survey(root, memory, &mut Default::default(), &mut |_| ()).unwrap();
}

#[test]
fn malformed_paths_and_orders_are_refused() {
    let memory = Memory::default();
    let deep = vec!["d"; 2040].join("/");
    let long = "a".repeat(256);
    let too_long = vec!["d".repeat(200); 30].join("/");
    for (name, page, why) in [
        ("dotdot", page().file("../evil", 1), "contains \"..\""),
        (
            "inner dotdot",
            page().dir("a").file("a/../../evil", 1),
            "contains \"..\"",
        ),
        ("absolute", page().file("/etc/evil", 1), "absolute"),
        ("nul", page().file("a\0b", 1), "NUL"),
        ("long", page().file(&long, 1), "longer than 255"),
        ("long path", page().file(&too_long, 1), "longer than 4096"),
        ("deep", page().file(&deep, 1), "not inside a directory"),
        ("not utf-8", page().file(b"\xff\xfe", 1), "not UTF-8"),
        ("dot", page().file("a/./b", 1), "contains \".\""),
        ("empty", page().file("", 1), "empty"),
        ("slash at the end", page().file("a/", 1), "empty"),
        (
            "through a link",
            page().link("d", "x").file("d/evil", 1),
            "not inside a directory",
        ),
        (
            "under a file",
            page().file("d", 1).file("d/evil", 1),
            "not inside a directory",
        ),
        ("order", page().file("b", 1).file("a", 1), "out of order"),
        (
            "twice",
            page().file("a", 1).file("a", 1),
            "out of order or listed twice",
        ),
        (
            "folder and file",
            page().dir("a").file("a", 1),
            "out of order or listed twice",
        ),
        ("mode", page().file_as("a", 1, 0o10644), "mode"),
        ("huge mode", page().file_as("a", 1, u64::MAX), "mode"),
    ] {
        refused(name, &page.times(&memory, 1), &memory, why);
    }
    // The same page many times.
    refused(
        "7,800 times",
        &page().file("a", 1).times(&memory, 7_800),
        &memory,
        "out of order or listed twice",
    );
}

#[test]
fn totals_and_sizes_that_do_not_fit_are_refused() {
    let memory = Memory::default();
    let one = page().file("f", 1).times(&memory, 1);
    let with = |change: &dyn Fn(&mut Root)| {
        let mut root = one.clone();
        change(&mut root);
        root
    };
    for (name, root) in [
        ("bytes", with(&|r| r.totals.bytes = 1 << 62)),
        (
            "chunks",
            with(&|r| (r.totals.chunks, r.pages[0].chunks) = (1 << 63, 1 << 63)),
        ),
        (
            "wrong counts of a page",
            with(&|r| (r.totals.chunks, r.pages[0].chunks) = (7, 7)),
        ),
        (
            "entries",
            with(&|r| (r.totals.files, r.pages[0].entries) = (7, 7)),
        ),
        (
            "dirs for files",
            with(&|r| (r.totals.files, r.totals.dirs) = (0, 1)),
        ),
        ("page length", with(&|r| r.pages[0].len += 1)),
        ("large page", with(&|r| r.pages[0].len = 1 << 20)),
        ("depth", with(&|r| r.depth = 255)),
        ("an entry page as an index", with(&|r| r.depth = 1)),
        ("no page", with(&|r| r.pages.clear())),
        (
            "an empty page",
            with(&|r| {
                r.pages.push(PageRef {
                    chunks: 0,
                    entries: 0,
                    ..r.pages[0]
                });
            }),
        ),
    ] {
        refused(name, &root, &memory, "");
    }
    for (name, page, why) in [
        (
            "uncovered",
            page().file("big", 1 << 50).chunk(b"x", 1),
            "fewer bytes than the file",
        ),
        (
            "u64max",
            page().file("max", u64::MAX).chunk(b"x", 1),
            "fewer bytes than the file",
        ),
        (
            "overflow",
            page().file("a", u64::MAX).file("b", u64::MAX),
            "than the file",
        ),
        (
            "chunks of an empty file",
            page().file("a", 0).chunk(b"x", 1),
            "more bytes than the file",
        ),
        (
            "chunk without a file",
            page().chunk(b"x", 1),
            "more bytes than the file",
        ),
        (
            "chunk of a directory",
            page().dir("a").chunk(b"x", 1),
            "more bytes than the file",
        ),
        (
            "empty chunk",
            page().file("a", 300 << 10).chunk(b"x", 0),
            "more bytes than the file",
        ),
        (
            "too much",
            page()
                .file("a", 300 << 10)
                .chunk(b"x", 256 << 10)
                .chunk(b"y", 256 << 10),
            "more bytes than the file",
        ),
        (
            "large chunk",
            page().file("a", 300 << 10).chunk(b"x", 300 << 10),
            "more than 262144",
        ),
        (
            "larger chunk",
            page().file("a", 3 << 20).chunk(b"x", 3 << 20),
            "more than 1048576",
        ),
    ] {
        refused(name, &page.times(&memory, 1), &memory, why);
    }
}

#[test]
fn links_that_leave_the_artifact_or_are_invalid_are_refused() {
    let memory = Memory::default();
    let long = "x".repeat(4096);
    for (name, page, why) in [
        ("absolute", page().link("l", "/etc/passwd"), "absolute path"),
        ("up", page().link("l", "../x"), "leaves the directory"),
        (
            "up from within",
            page().dir("a").link("a/l", "../../x"),
            "leaves the directory",
        ),
        (
            "through a link",
            page().link("k", ".").link("l", "k/../x"),
            "uses '..'",
        ),
        (
            "through nothing",
            page().link("l", "nowhere/../x"),
            "uses '..'",
        ),
        (
            "through a file",
            page().file("a", 1).link("l", "a/../x"),
            "uses '..'",
        ),
        ("no target", page().link("l", ""), "0 bytes"),
        ("nul", page().link("l", "a\0b"), "NUL"),
        ("long", page().link("l", &long), "4096 bytes"),
        ("not utf-8", page().link("l", b"\xff"), "not UTF-8"),
    ] {
        refused(name, &page.times(&memory, 1), &memory, why);
    }
    let fine = page()
        .dir("a")
        .link("a/l", "../z/../a")
        .link("b", "a/l")
        .link("c", "./x\ny")
        .dir("z");
    checked(&fine.times(&memory, 1), &memory).unwrap();
}

/// A manifest of several pages, of format 2.
fn of_pages(pages: &[Page], memory: &Memory) -> Root {
    let mut root = pages[0].times(memory, 1);
    root.format = 2;
    root.pages = pages.iter().map(|page| page.put(memory)).collect();
    root.totals = pages.iter().fold(Totals::default(), |sum, page| Totals {
        files: sum.files + page.totals.files,
        dirs: sum.dirs + page.totals.dirs,
        symlinks: sum.symlinks + page.totals.symlinks,
        bytes: sum.bytes + page.totals.bytes,
        chunks: sum.chunks + page.totals.chunks,
    });
    root
}

#[test]
fn what_links_and_hard_links_require_is_checked_in_parts_of_a_small_table() {
    let memory = Memory::default();
    // 150 hard links and 150 links, each to another file or directory.
    let (mut first, mut second, mut third) = (page(), page(), page());
    for n in 0..150 {
        first = first.dir(&format!("a{n:03}"));
        first = first.file(format!("a{n:03}/f"), 0);
        second = second.hard_link(&format!("b{n:03}"), &format!("a{n:03}/f"));
        third = third.link(&format!("c{n:03}"), format!("a{n:03}/../x"));
    }
    let checked = |pages: &[Page]| {
        let root = of_pages(pages, &memory);
        let walks = std::cell::Cell::new(0);
        let mut expected = Expected::with_table_of(64);
        let walk = |each: &mut dyn FnMut(&Entry) -> Result<bool, Fault>| {
            walks.set(walks.get() + 1);
            each_step(&root, &memory, &Stop::default(), |step| match &step {
                Step::Entry { entry, .. } => each(entry),
                Step::Chunk(..) => Ok(true),
            })
        };
        walk(&mut |entry| expected.note(entry).map(|()| true))?;
        expected.check(walk)?;
        Ok::<u32, Fault>(walks.get())
    };
    let all = [first.clone(), second.clone(), third.clone()];
    let walks = checked(&all).unwrap();
    assert!((8 * 2..=16 * 2).contains(&walks), "{walks}");
    for (name, pages, why) in [
        (
            "a hard link without a file",
            [
                first.clone(),
                second.clone(),
                page().hard_link("d", "a000/e"),
            ],
            "the hard link \"a000/e\"",
        ),
        (
            "a hard link to a directory",
            [first.clone(), second.clone(), page().hard_link("d", "a000")],
            "the hard link \"a000\"",
        ),
        (
            "a hard link to a hard link",
            [first.clone(), second.clone(), page().hard_link("d", "b000")],
            "the hard link \"b000\"",
        ),
        (
            "a hard link and a link that contradict each other",
            [
                first.clone(),
                page().hard_link("b", "a000/f").link("c", "a000/f/../x"),
                page().dir("d"),
            ],
            "the link \"c\" uses '..' after \"a000/f\", which is not a directory",
        ),
        (
            "a link after no directory",
            [
                first.clone(),
                second.clone(),
                third.clone().link("d", "e/../x"),
            ],
            "the link \"d\" uses '..' after \"e\", which is not a directory",
        ),
    ] {
        let fault = checked(&pages).expect_err(name);
        assert!(fault.message.contains(why), "{name}: {fault}");
    }
    let mut more = third;
    for n in 0..2000 {
        more = more.link(&format!("d{n:04}"), format!("e{n:04}/../x"));
    }
    let fault = checked(&[first, second, more]).unwrap_err();
    assert!(fault.message.contains("too many hard links"), "{fault}");
}

/// A path was joined and kept for each `..`, which took a second for 20 links.
#[test]
fn links_that_climb_again_and_again_require_one_directory() {
    let memory = Memory::default();
    let up_and_down = format!("{}{}", "x/".repeat(1000), "../x/".repeat(400));
    let mut links = page();
    for n in 0..20 {
        links = links.link(&format!("z{n:02}"), &up_and_down);
    }
    let root = of_pages(&[page().nested_dirs(1000), links.clone()], &memory);
    let mut expected = Expected::default();
    let mut folders = 0;
    each_step(&root, &memory, &Stop::default(), |step| {
        if let Step::Entry { entry, .. } = &step {
            folders += expected.note(entry).map(|()| 1)?;
        }
        Ok(true)
    })
    .unwrap();
    assert_eq!(
        (folders, expected.len()),
        (1020, 1),
        "all leave one directory"
    );
    checked(&root, &memory).unwrap();
    // Without the deepest directory.
    let root = of_pages(&[page().nested_dirs(999), links], &memory);
    refused(
        "a missing directory",
        &root,
        &memory,
        "uses '..' after \"x/x",
    );
}

#[test]
fn a_check_is_stopped() {
    struct Stopping(Memory, Stop);
    impl Pages for Stopping {
        fn page(&self, id: Hash) -> Result<bytes::Bytes, Fault> {
            assert!(!self.1.is_set(), "no page is read after the stop");
            self.1.set();
            self.0.page(id)
        }
    }
    let memory = Memory::default();
    let root = build(&numbered(5_000), &memory);
    checked(&root, &memory).unwrap();
    assert!(root.pages.len() > 1);
    let pages = Stopping(memory, Stop::default());
    let artifact = "dataset/x:1".parse().unwrap();
    let fault = check(&artifact, &root, &pages, &pages.1).unwrap_err();
    assert_eq!(
        fault.code,
        Code::Partial,
        "it says nothing about the manifest: {fault}"
    );
}

#[test]
fn entries_that_do_not_match_the_kind_are_refused() {
    let memory = Memory::default();
    let as_kind = |page: &Page, kind, info: &KindInfo| Root {
        kind,
        info: info.clone(),
        ..page.times(&memory, 1)
    };
    let top = Sha256::of(b"top");
    let image = |digest: &str, size| {
        KindInfo::Image(ImageInfo {
            media_type: "x".into(),
            digest: digest.into(),
            size,
            platforms: vec![],
            absent: vec![],
            repository: None,
            tag: None,
            referrers: vec![],
        })
    };
    let valid = image(&top.to_string(), 3);
    let blob = |path: &str| {
        page()
            .dir("blobs")
            .dir("blobs/sha256")
            .file(path, 3)
            .file("index.json", 2)
            .file("oci-layout", 2)
    };
    let layout = blob(&top.layout_path());
    checked(&as_kind(&layout, Kind::Image, &valid), &memory).unwrap();
    let other = Sha256::of(b"other").layout_path();
    for (name, page, info) in [
        ("sha256:zz", &layout, image("sha256:zz", 3)),
        ("no digest", &layout, image("", 3)),
        ("no size", &layout, image(&top.to_string(), 0)),
        ("another size", &layout, image(&top.to_string(), 4)),
        ("huge", &layout, image(&top.to_string(), 1 << 40)),
        ("no top manifest", &blob(&other), valid.clone()),
        (
            "an unrelated file",
            &layout.clone().file("z", 1),
            valid.clone(),
        ),
        (
            "a link",
            &layout.clone().link("z", "oci-layout"),
            valid.clone(),
        ),
        ("no blob's name", &blob("blobs/sha256/zz"), valid.clone()),
        ("of files", &layout, KindInfo::Files),
    ] {
        refused(name, &as_kind(page, Kind::Image, &info), &memory, "");
    }
    let labels = |classes, dataset| {
        let format = "csv".to_owned();
        KindInfo::Labels(LabelsInfo {
            dataset,
            samples: 1,
            annotations: 1,
            classes,
            format,
        })
    };
    let bound = |name: &str| {
        Some(DatasetBinding {
            artifact: name.parse().unwrap(),
            digest: Hash::of(b"d"),
        })
    };
    let files = page()
        .file(ANNOTATIONS, 9)
        .file(CLASSES, 9)
        .file(SAMPLES, 9);
    checked(
        &as_kind(&files, Kind::Labels, &labels(1, bound("dataset/d:1"))),
        &memory,
    )
    .unwrap();
    for (name, page, info) in [
        ("bound to a model", &files, labels(1, bound("model/d:1"))),
        ("many classes", &files, labels(1 << 63, None)),
        (
            "two files",
            &page().file(ANNOTATIONS, 9).file(CLASSES, 9),
            labels(1, None),
        ),
        (
            "another file",
            &page().file(ANNOTATIONS, 9).file(CLASSES, 9).file("x", 9),
            labels(1, None),
        ),
        ("of files", &files, KindInfo::Files),
    ] {
        refused(name, &as_kind(page, Kind::Labels, &info), &memory, "");
    }
    for kind in [Kind::Dataset, Kind::Model, Kind::Operator] {
        refused("of an image", &as_kind(&layout, kind, &valid), &memory, "");
        checked(&as_kind(&layout, kind, &KindInfo::Files), &memory).unwrap();
    }
    let dataset = page().file("a", 1).times(&memory, 1);
    let fault = check_all(&"model/x:1".parse().unwrap(), &dataset, &memory).unwrap_err();
    assert!(
        fault.message.contains("manifest is that of a dataset"),
        "{fault}"
    );
}

#[test]
fn a_page_that_is_listed_many_times_is_read_once() {
    struct Counting(Memory, std::cell::Cell<u64>);
    impl Pages for Counting {
        fn page(&self, id: Hash) -> Result<bytes::Bytes, Fault> {
            self.1.set(self.1.get() + 1);
            self.0.page(id)
        }
    }
    let memory = Memory::default();
    let (mut zeros, times) = (page(), 7_800);
    for _ in 0..100 {
        zeros = zeros.chunk(b"zeros", 64 << 10);
    }
    let mut root = zeros.times(&memory, times);
    let size = times * 100 * (64 << 10);
    let first = page().file("zeros", size);
    root.pages.insert(0, first.put(&memory));
    (root.totals.files, root.totals.bytes) = (1, size);
    let pages = Counting(memory, Default::default());
    check_all(&"dataset/x:1".parse().unwrap(), &root, &pages).unwrap();
    assert_eq!(pages.1.get(), 2);
    root.totals.bytes += 1;
    assert!(check_all(&"dataset/x:1".parse().unwrap(), &root, &pages).is_err());
    root.totals.bytes -= 1;
    root.pages.pop();
    root.totals.chunks -= 100;
    let fault = check_all(&"dataset/x:1".parse().unwrap(), &root, &pages).unwrap_err();
    assert!(
        fault.message.contains("fewer bytes than the file"),
        "{fault}"
    );
}

#[test]
fn only_the_permission_bits_of_a_mode_are_read() {
    let memory = Memory::default();
    let root = page()
        .file_as("a", 1, 0o6755)
        .file_as("b", 1, 0o7777)
        .times(&memory, 1);
    checked(&root, &memory).unwrap();
    let modes = Walk::new(&root, &memory).filter_map(|step| match step.unwrap() {
        Step::Entry { entry, .. } => Some(entry.mode),
        Step::Chunk(..) => None,
    });
    assert_eq!(modes.collect::<Vec<_>>(), [0o755, 0o777]);
}

#[test]
fn a_survey_finds_what_malformed_and_truncated_pages_name() {
    let memory = Memory::default();
    let named = |root: &Root| {
        let mut out = Vec::new();
        let faults = survey(root, &memory, &mut Default::default(), &mut |named| {
            out.push(named);
        })
        .unwrap();
        (out, faults)
    };
    let bad = page()
        .file("../evil", 300 << 10)
        .chunk(b"1", 1)
        .chunk(b"2", 2)
        .link("a", "/")
        .file("/", 7);
    let root = bad.times(&memory, 1);
    let (found, faults) = named(&root);
    let chunk = |id: &[u8], len| {
        Named::Chunk(super::super::ChunkRef {
            id: Hash::of(id),
            len,
        })
    };
    let file = |path: &[u8], size| Named::File {
        hash: Hash::of(path),
        size,
    };
    let all = [
        Named::Page(root.pages[0].id),
        file(b"../evil", 300 << 10),
        chunk(b"1", 1),
        chunk(b"2", 2),
        file(b"/", 7),
    ];
    assert_eq!((found.as_slice(), faults.len()), (&all[..], 0));
    // A truncated page, a missing page, and a page after them.
    let mut torn = bad;
    torn.bytes.extend([3, 0, 9]);
    let mut root = torn.times(&memory, 1);
    root.pages.push(PageRef {
        id: Hash::of(b"gone"),
        ..root.pages[0]
    });
    root.pages.push(page().chunk(b"3", 3).put(&memory));
    let (found, faults) = named(&root);
    assert_eq!((&found[1..5], faults.len()), (&all[1..], 2));
    assert_eq!(
        found[5..],
        [
            Named::Page(Hash::of(b"gone")),
            Named::Page(root.pages[2].id),
            chunk(b"3", 3)
        ]
    );
    // Pages that were read before are not read again. A disk error is returned.
    let mut seen = root.pages.iter().map(|page| page.id).collect();
    let mut again = 0;
    survey(&root, &memory, &mut seen, &mut |_| again += 1).unwrap();
    assert_eq!(again, 0);
    struct Broken;
    impl Pages for Broken {
        fn page(&self, _: Hash) -> Result<bytes::Bytes, Fault> {
            Err(Fault::internal("the disk fails"))
        }
    }
    assert!(survey(&root, &Broken, &mut Default::default(), &mut |_| ()).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn a_changed_manifest_is_valid_or_refused(
        files in 1u64..400,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let memory = Memory::default();
        let mut root = build(&numbered(files), &memory);
        for (page, at, with) in changes {
            // The page is stored under the id of its new bytes.
            let which = page.index(root.pages.len());
            let mut bytes = memory.page(root.pages[which].id).unwrap().to_vec();
            let at = at.index(bytes.len());
            bytes[at] = with;
            if let Some(cut) = &cut {
                bytes.truncate(cut.index(bytes.len()) + 1);
            }
            root.pages[which].id = Hash::of(&bytes);
            root.pages[which].len = bytes.len() as u32;
            memory.0.borrow_mut().insert(root.pages[which].id, bytes.into());
        }
        if let Err(fault) = checked(&root, &memory) {
            prop_assert_eq!(fault.code, Code::Integrity);
        } else {
            prop_assert!(Walk::new(&root, &memory).all(|step| step.is_ok()), "a site accepts what the hub accepts");
        }
        let mut count = 0u64;
        survey(&root, &memory, &mut Default::default(), &mut |_| count += 1).unwrap();
        prop_assert!(count <= 3 * files + 64, "{count}");
    }
}

#[test]
fn referrers_of_an_image_name_what_is_there() {
    let memory = Memory::default();
    let [top, sig, sbom] = [b"top", b"sig", b"sbo"].map(|bytes| Sha256::of(bytes));
    let referrer = |own: &Sha256, about: &Sha256, tag: Option<&str>| ImageReferrer {
        media_type: "application/vnd.oci.image.manifest.v1+json".into(),
        digest: own.to_string(),
        size: 3,
        about: about.to_string(),
        tag: tag.map(|suffix| ImageReferrer::cosign_tag(about, suffix)),
    };
    let mut layout = page().dir("blobs").dir("blobs/sha256");
    let mut paths = [&top, &sig, &sbom].map(Sha256::layout_path);
    paths.sort();
    for path in &paths {
        layout = layout.file(path, 3);
    }
    let layout = layout.file("index.json", 2).file("oci-layout", 2);
    let root = |format: u32, referrers: Vec<ImageReferrer>| Root {
        format,
        kind: Kind::Image,
        info: KindInfo::Image(ImageInfo {
            media_type: "x".into(),
            digest: top.to_string(),
            size: 3,
            platforms: vec![],
            absent: vec![],
            repository: None,
            tag: None,
            referrers,
        }),
        ..layout.times(&memory, 1)
    };
    let valid = vec![
        referrer(&sig, &top, Some("sig")),
        referrer(&sbom, &sig, None),
    ];
    let fine = root(3, valid.clone());
    checked(&fine, &memory).unwrap();
    let parsed = Root::parse(&fine.to_bytes(), fine.digest()).unwrap();
    assert_eq!(parsed, fine);
    let with = |change: &dyn Fn(&mut ImageReferrer)| {
        let mut all = valid.clone();
        change(&mut all[0]);
        root(3, all)
    };
    let gone = Sha256::of(b"gone");
    let many = vec![valid[0].clone(); IMAGE_REFERRERS_MAX + 1];
    let other_tag = ImageReferrer {
        tag: valid[0].tag.clone(),
        ..referrer(&sbom, &top, None)
    };
    for (name, root, why) in [
        ("old format", root(2, valid.clone()), "format"),
        ("too many", root(3, many), "are allowed"),
        (
            "no digest",
            with(&|r| r.digest = "sha256:x".into()),
            "digest",
        ),
        ("no subject", with(&|r| r.about = String::new()), "digest"),
        (
            "media type",
            with(&|r| r.media_type = "a\r\nb".into()),
            "media",
        ),
        ("no size", with(&|r| r.size = 0), "size"),
        ("huge", with(&|r| r.size = 1 << 40), "size"),
        ("another size", with(&|r| r.size = 4), "not allowed"),
        (
            "a path as tag",
            with(&|r| r.tag = Some("../x".into())),
            "tag",
        ),
        (
            "tag of another",
            with(&|r| r.tag = Some(ImageReferrer::cosign_tag(&gone, "sig"))),
            "tag",
        ),
        (
            "tag without suffix",
            with(&|r| r.tag = Some(format!("sha256-{}", top.hex()))),
            "tag",
        ),
        (
            "the image",
            root(3, vec![referrer(&top, &sig, None)]),
            "image itself",
        ),
        (
            "itself",
            root(3, vec![referrer(&sig, &sig, None)]),
            "before",
        ),
        (
            "a cycle",
            root(
                3,
                vec![referrer(&sig, &sbom, None), referrer(&sbom, &sig, None)],
            ),
            "before",
        ),
        (
            "not there",
            root(3, vec![referrer(&gone, &top, None)]),
            "does not contain",
        ),
        (
            "one tag for two",
            root(3, vec![valid[0].clone(), other_tag]),
            "its tag",
        ),
    ] {
        refused(name, &root, &memory, why);
    }
    // A program of an earlier version refuses the format before it looks at the rest.
    let later = root(4, valid);
    let fault = Root::parse(&later.to_bytes(), later.digest()).unwrap_err();
    assert!(fault.message.contains("formats up to 3"), "{fault}");
}

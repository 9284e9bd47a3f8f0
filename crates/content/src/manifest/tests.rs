use std::cell::RefCell;
use std::collections::HashMap;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::chunk::DEFAULT_CHUNKING;
use base::fault::Code;

#[derive(Default)]
pub(super) struct Memory(pub(super) RefCell<HashMap<Hash, Bytes>>);

impl Pages for Memory {
    fn page(&self, id: Hash) -> Result<Bytes, Fault> {
        self.0
            .borrow()
            .get(&id)
            .cloned()
            .ok_or_else(|| Fault::not_found("page"))
    }
}

pub(super) type File = (String, u64, u64);

/// A flat directory of files: (name, size, seed).
pub(super) fn build(files: &[File], memory: &Memory) -> Root {
    let mut sink = |page: crate::frame::Verified| {
        memory.0.borrow_mut().insert(page.id, page.bytes);
        Ok(())
    };
    let mut builder = Builder::new(DEFAULT_CHUNKING, &mut sink);
    for (name, size, seed) in files {
        let hash = Hash::of(&[&seed.to_le_bytes()[..], &size.to_le_bytes()[..]].concat());
        let mut chunks = Vec::new();
        if builder.lists_chunks(*size) {
            let mut left = *size;
            while left > 0 {
                let len = left.min(30_000);
                chunks.push(ChunkRef {
                    id: Hash::of(&[hash.0, Hash::of(&left.to_le_bytes()).0].concat()),
                    len: len as u32,
                });
                left -= len;
            }
        }
        let entry = Entry {
            path: name.parse().unwrap(),
            mode: 0o644,
            body: EntryBody::File(FileInfo { size: *size, hash }),
            attributes: Attributes::default(),
        };
        builder.push(&entry, &chunks).unwrap();
    }
    builder.finish(Kind::Dataset, KindInfo::Files).unwrap()
}

pub(super) fn numbered(n: u64) -> Vec<File> {
    (0..n)
        .map(|i| (format!("img_{i:07}.png"), 40_000, i))
        .collect()
}

#[test]
fn a_walk_returns_what_was_built() {
    let memory = Memory::default();
    let mut files = numbered(5_000);
    files.push(("z-large".into(), 30_000 * 60_000, 7));
    let root = build(&files, &memory);
    assert!(root.depth >= 1, "enough pages for an index level");
    let (mut names, mut ordinals) = (Vec::new(), 0);
    // Of each page only once: that costs most of this test.
    let mut pages = HashMap::new();
    for step in Walk::new(&root, &memory) {
        match step.unwrap() {
            Step::Entry { entry, number, .. } => {
                assert_eq!(number, names.len() as u64);
                names.push(entry.path.to_string());
            }
            Step::Chunk(chunk, spot) => {
                assert_eq!(spot.ordinal, ordinals);
                ordinals += 1;
                let chunks = pages.entry(spot.page).or_insert_with(|| {
                    let page = memory.page(spot.page).unwrap();
                    children(&page, &root).unwrap()
                });
                assert_eq!(chunks[spot.index as usize], chunk, "a spot names its chunk");
            }
        }
    }
    assert_eq!(names, files.iter().map(|f| f.0.clone()).collect::<Vec<_>>());
    assert_eq!(ordinals, root.totals.chunks);
    assert_eq!(Root::parse(&root.to_bytes(), root.digest()).unwrap(), root);
}

#[test]
fn a_small_change_shares_most_pages() {
    let memory = Memory::default();
    let mut files = numbered(20_000);
    build(&files, &memory);
    let before = memory.0.borrow().len();
    files[10_000].2 = 999_999;
    files.remove(3);
    build(&files, &memory);
    let new = memory.0.borrow().len() - before;
    assert!(new <= 6, "two changes made {new} new pages of {before}");
}

/// The size of the new pages of the second manifest as deltas against the first, and uncompressed.
fn differences(old: &[File], new: &[File]) -> (usize, usize) {
    use super::delta::{Alignment, compress, restore};
    let memory = Memory::default();
    let list = |files| entry_pages(&build(files, &memory), &memory).unwrap();
    let (old, new) = (list(old), list(new));
    let alignment = Alignment::new(&old, &new);
    let read = |pages: &[PageRef]| {
        pages
            .iter()
            .map(|p| memory.page(p.id).unwrap())
            .collect::<Vec<_>>()
    };
    let (mut compressed, mut plain) = (0, 0);
    for first in (0..new.len()).step_by(8) {
        let span = first..new.len().min(first + 8);
        let beside = read(&old[alignment.beside(&span)]);
        let bytes: usize = beside.iter().map(Bytes::len).sum();
        assert!(bytes as u64 <= base::limits::DIFFERENCE_BASE_BYTES_MAX);
        let pages = read(&new[span.clone()]);
        let made = compress(&beside, &pages).unwrap();
        let lens: Vec<u32> = new[span].iter().map(|p| p.len).collect();
        assert_eq!(restore(&beside, &made, &lens).unwrap(), pages);
        assert!(restore(&beside, &made[..made.len() / 2], &lens).is_err());
        assert!(
            restore(&beside, &made, &lens[1..]).is_err(),
            "more than the delta contains"
        );
        compressed += made.len();
        plain += lens.iter().sum::<u32>() as usize;
    }
    println!(
        "{} pages: {plain} bytes, as differences {compressed}",
        new.len()
    );
    (compressed, plain)
}

#[test]
fn scattered_changes_cost_what_they_are_as_differences() {
    let old = numbered(20_000);
    let mut new = old.clone();
    new.iter_mut()
        .step_by(20)
        .for_each(|file| file.2 += 1_000_000);
    new.retain(|file| file.2 % 40 != 7);
    let (compressed, plain) = differences(&old, &new);
    assert!(
        compressed < 1_000 * 64 + 500 * 16,
        "{compressed} of {plain} bytes for 1,000 changes and 500 gaps"
    );
    // A large file, whose pages contain only chunks.
    let large = |seed| vec![("model.bin".to_owned(), 30_000 * 40_000, seed)];
    let (compressed, plain) = differences(&large(1), &large(1));
    assert!(
        compressed * 100 < plain,
        "{compressed} of {plain} bytes for no change"
    );
    let (compressed, plain) = differences(&large(1), &large(2));
    assert!(
        compressed < plain + plain / 100,
        "{compressed} of {plain} bytes where nothing is alike"
    );
    differences(&[], &numbered(10));
    differences(&numbered(10), &[]);
}

#[test]
fn differences_find_their_old_pages_in_a_long_list() {
    // More pages than one delta can use, shifted by insertions and deletions.
    let old = numbered(150_000);
    let mut new: Vec<File> = (0..30_000)
        .map(|i| (format!("a_{i:07}.png"), 50_000, 5_000_000 + i))
        .collect();
    new.extend(
        old.iter()
            .filter(|file| !(60_000..80_000).contains(&file.2))
            .cloned(),
    );
    new[30_000..]
        .iter_mut()
        .step_by(100)
        .for_each(|file| file.2 += 1_000_000);
    let (compressed, plain) = differences(&old, &new);
    let fresh = 31_300 * 50;
    assert!(
        compressed < fresh + (plain - fresh) / 10,
        "{compressed} of {plain} bytes, {fresh} of them are new"
    );
}

#[test]
fn an_inconsistent_manifest_is_refused() {
    let memory = Memory::default();
    let mut root = build(&numbered(10), &memory);
    root.totals.bytes += 1;
    assert!(Walk::new(&root, &memory).any(|s| s.is_err()));
    let mut sink = |_| Ok(());
    let mut builder = Builder::new(DEFAULT_CHUNKING, &mut sink);
    let entry = |path: &str, body| Entry {
        path: path.parse().unwrap(),
        mode: 0o755,
        body,
        attributes: Attributes::default(),
    };
    builder
        .push(&entry("a", EntryBody::Symlink("/etc".into())), &[])
        .unwrap();
    assert!(
        builder
            .push(&entry("a/passwd", EntryBody::Dir), &[])
            .is_err(),
        "no entry below a link"
    );
    assert!(
        builder.push(&entry("a", EntryBody::Dir), &[]).is_err(),
        "duplicate names are refused"
    );
}

#[test]
fn a_manifest_that_expands_too_much_is_refused() {
    let memory = Memory::default();
    let honest = build(&numbered(1), &memory);
    let with = |page: PageRef, depth: u8| {
        let totals = Totals {
            files: page.entries,
            chunks: page.chunks,
            ..Totals::default()
        };
        Root {
            depth,
            totals,
            pages: vec![page],
            ..honest.clone()
        }
    };
    // Index pages that list one page many times, on several levels. All counts are consistent.
    let mut tower = vec![honest.pages[0]];
    for level in 0..3 {
        let mut index = page::PageWriter::default();
        for _ in 0..1_500 {
            index.child(&tower[level]);
        }
        let (chunks, entries) = (index.chunks, index.entries);
        let made = crate::frame::Verified::new(index.bytes.into());
        tower.push(PageRef {
            id: made.id,
            len: made.bytes.len() as u32,
            chunks,
            entries,
        });
        memory.0.borrow_mut().insert(made.id, made.bytes);
    }
    assert_eq!(
        entry_pages(&with(tower[1], 1), &memory).unwrap().len(),
        1_500,
        "a page may be listed many times"
    );
    let bomb = with(tower[3], 3);
    assert_eq!(
        entry_pages(&bomb, &memory).unwrap_err().code,
        Code::Integrity
    );
    assert_eq!(
        for_each_page(&bomb, &memory, |_| Ok(())).unwrap_err().code,
        Code::Integrity
    );
    // Invalid depth; counts that do not add up; a page whose content differs from its listing.
    let inconsistent = [
        with(tower[1], 200),
        Root {
            totals: honest.totals,
            ..with(tower[1], 1)
        },
        with(
            PageRef {
                chunks: 7,
                ..tower[0]
            },
            0,
        ),
    ];
    for root in &inconsistent {
        assert!(
            Walk::new(root, &memory).any(|s| s.is_err_and(|fault| fault.code == Code::Integrity))
        );
    }
    for root in &inconsistent[..2] {
        assert_eq!(
            entry_pages(root, &memory).unwrap_err().code,
            Code::Integrity
        );
    }
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        for kind in [b'E', b'I'] {
            let page: Vec<u8> = std::iter::once(kind).chain(bytes.iter().copied()).collect();
            let _ = read_children(&page);
            if let Ok(mut records) = page::Records::new(page.into()) {
                while let Ok(Some(_)) = records.next() {}
            }
        }
    }

    #[test]
    fn any_tree_round_trips(mut names in proptest::collection::btree_set("[a-z]{1,3}(\\.[a-z])?", 1..60), size in 0u64..400_000) {
        let memory = Memory::default();
        let names = std::mem::take(&mut names);
        let mut files: Vec<File> = names.into_iter().enumerate().map(|(i, n)| (n, size + i as u64, i as u64)).collect();
        files.sort_by_key(|f| f.0.parse::<RelPath>().unwrap());
        let root = build(&files, &memory);
        let walked: Vec<String> = Walk::new(&root, &memory)
            .filter_map(|s| match s.unwrap() { Step::Entry { entry, .. } => Some(entry.path.to_string()), Step::Chunk(..) => None })
            .collect();
        prop_assert_eq!(walked, files.into_iter().map(|f| f.0).collect::<Vec<_>>());
    }
}

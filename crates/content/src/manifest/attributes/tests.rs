//! Manifests of format 2, and that those of format 1 are as they were.

use proptest::prelude::*;

use super::super::page::{PageWriter, Records};
use super::super::tests::Memory;
use super::super::{
    Builder, EntryBody, FileInfo, KindInfo, PageRef, Root, Step, Totals, Walk, check, children,
    same_but_times,
};
use super::*;
use crate::chunk::{DEFAULT_CHUNKING, Hash};
use base::fault::Code;
use base::names::Kind;

fn file(path: &str, content: &str, attributes: Attributes) -> Entry {
    Entry {
        path: path.parse().unwrap(),
        mode: 0o644,
        body: EntryBody::File(FileInfo {
            size: content.len() as u64,
            hash: Hash::of(content.as_bytes()),
        }),
        attributes,
    }
}

fn dir(path: &str, attributes: Attributes) -> Entry {
    Entry {
        path: path.parse().unwrap(),
        mode: 0o755,
        body: EntryBody::Dir,
        attributes,
    }
}

fn build(entries: &[Entry], memory: &Memory) -> Root {
    let mut sink = |page: crate::frame::Verified| {
        memory.0.borrow_mut().insert(page.id, page.bytes);
        Ok(())
    };
    let mut builder = Builder::new(DEFAULT_CHUNKING, &mut sink);
    for entry in entries {
        builder.push(entry, &[]).unwrap();
    }
    builder.finish(Kind::Dataset, KindInfo::Files).unwrap()
}

fn walked(root: &Root, memory: &Memory) -> Result<Vec<Entry>, Fault> {
    let mut entries = Vec::new();
    for step in Walk::new(root, memory) {
        if let Step::Entry { entry, .. } = step? {
            entries.push(entry);
        }
    }
    Ok(entries)
}

fn time(seconds: i64) -> Attributes {
    Attributes {
        modified: FileTime::new(seconds, 123_456_789),
        ..Attributes::default()
    }
}

fn link(to: &str) -> Attributes {
    Attributes {
        hard_link: Some(to.parse().unwrap()),
        ..Attributes::default()
    }
}

fn xattrs(list: &[(&str, &[u8])]) -> Attributes {
    Attributes {
        xattrs: list
            .iter()
            .map(|(name, value)| Xattr::new(name, value).unwrap())
            .collect(),
        ..Attributes::default()
    }
}

fn checked(root: &Root, memory: &Memory) -> Result<(), Fault> {
    check(
        &"dataset/x:1".parse().unwrap(),
        root,
        memory,
        &Default::default(),
    )
}

#[test]
fn attributes_round_trip() {
    let memory = Memory::default();
    let all = Attributes {
        modified: FileTime::new(-1, 999_999_999),
        ..xattrs(&[("user.a", b""), ("user.b", &[0, 255]), ("user.线", b"v")])
    };
    let entries = [
        dir("d", xattrs(&[("user.k", b"v")])),
        file("d/a", "one", all),
        file("d/b", "one", link("d/a")),
        file("d/c", "", time(1_700_000_000)),
        file("e", "two", Attributes::default()),
    ];
    let root = build(&entries, &memory);
    assert_eq!(root.format, 2);
    assert_eq!(walked(&root, &memory).unwrap(), entries);
    checked(&root, &memory).unwrap();
    assert_eq!(Root::parse(&root.to_bytes(), root.digest()).unwrap(), root);
    // Requests count chunks as before.
    let page = memory.0.borrow()[&root.pages[0].id].clone();
    assert_eq!(children(&page, &root).unwrap().len(), 3);
    // The same input has the same digest.
    assert_eq!(build(&entries, &Memory::default()).digest(), root.digest());
}

/// The bytes that the previous revision wrote.
#[test]
fn without_attributes_a_manifest_is_as_in_format_1() {
    let memory = Memory::default();
    let root = build(
        &[
            dir("d", Attributes::default()),
            file("d/a", "one", Attributes::default()),
        ],
        &memory,
    );
    let hash = Hash::of(b"one");
    let mut page = b"E\x01\x00\x01d\xed\x03\x03\x01\x02/a\xa4\x03\x03".to_vec();
    page.extend(hash.0);
    let id = Hash::of(&page);
    assert_eq!(memory.0.borrow()[&id], page);
    let text = format!(
        r#"{{"format":1,"kind":"dataset","info":{{"is":"files"}},"chunking":{{"min":8192,"avg":28672,"max":65536,"whole":262144,"normalization":2}},"totals":{{"files":1,"dirs":1,"symlinks":0,"bytes":3,"chunks":1}},"depth":0,"pages":[{{"id":"{id}","len":{},"chunks":1,"entries":2}}]}}"#,
        page.len()
    );
    assert_eq!(String::from_utf8(root.to_bytes()).unwrap(), text);
    // An earlier version parses the JSON of format 2, and refuses its number.
    let newer = build(&[file("a", "one", time(1))], &memory);
    let text = String::from_utf8(newer.to_bytes()).unwrap();
    assert!(
        text.starts_with(r#"{"format":2,"kind":"dataset","info":{"is":"files"},"chunking":"#),
        "{text}"
    );
    let future = Root { format: 4, ..newer };
    let fault = Root::parse(&future.to_bytes(), future.digest()).unwrap_err();
    assert!(
        fault.message.contains("has format 4") && fault.next.contains("upgrade"),
        "{fault:?}"
    );
}

#[test]
fn only_format_2_has_attributes_and_only_of_the_right_entries() {
    let memory = Memory::default();
    let fine = build(&[file("a", "one", time(1))], &memory);
    let old = Root {
        format: 1,
        ..fine.clone()
    };
    assert!(
        walked(&old, &memory)
            .unwrap_err()
            .message
            .contains("format")
    );
    let image = Root {
        kind: Kind::Labels,
        ..fine
    };
    checked(&image, &memory).unwrap_err();
    let symlink = |attributes| Entry {
        body: EntryBody::Symlink("a".into()),
        mode: 0o777,
        ..file("l", "", attributes)
    };
    for wrong in [
        dir("d", time(1)),
        dir("d", link("a")),
        symlink(time(1)),
        symlink(xattrs(&[("user.k", b"v")])),
        file("a", "", link("a")),
        file("a", "", link("b")),
    ] {
        let root = build(std::slice::from_ref(&wrong), &memory);
        let fault = walked(&root, &memory).unwrap_err();
        assert_eq!(fault.code, Code::Integrity, "{wrong:?}");
    }
}

#[test]
fn a_hard_link_has_the_content_of_a_file_before_it() {
    let plain = Attributes::default;
    let refused = |entries: &[Entry]| {
        let memory = Memory::default();
        let root = build(entries, &memory);
        let fault = checked(&root, &memory).unwrap_err();
        assert!(fault.message.contains("hard link"), "{fault}");
    };
    refused(&[file("b", "one", link("a"))]);
    refused(&[file("a", "two", plain()), file("b", "one", link("a"))]);
    refused(&[dir("a", plain()), file("b", "one", link("a"))]);
    refused(&[
        file("a", "one", plain()),
        file("b", "one", link("a")),
        file("c", "one", link("b")),
    ]);
    refused(&[
        file("a", "one", plain()),
        file("b", "one", link("a")),
        file("c", "two", link("a")),
    ]);
    let memory = Memory::default();
    let root = build(
        &[
            file("a", "one", plain()),
            file("b", "one", link("a")),
            file("c", "one", link("a")),
        ],
        &memory,
    );
    checked(&root, &memory).unwrap();
}

#[test]
fn malformed_attribute_records_are_refused() {
    let entry = |page: &mut PageWriter| {
        page.entry(&file("a", "one", Attributes::default()), &DEFAULT_CHUNKING);
    };
    let xattr = |name: &[u8], value: &[u8]| {
        let mut out = vec![XATTR];
        put_bytes(&mut out, name);
        put_bytes(&mut out, value);
        out
    };
    let (one, two) = (xattr(b"user.a", b"1"), xattr(b"user.b", b"2"));
    let large = xattr(b"user.c", &vec![0; XATTRS_BYTES_MAX]);
    let mut too_late = vec![TIME];
    put_number(&mut too_late, zigzag(SECONDS_MAX + 1));
    too_late.push(0);
    let fine: Vec<Vec<u8>> = vec![
        vec![TIME, 2, 0],
        one.clone(),
        [&one[..], &two].concat(),
        vec![HARD_LINK, 1, b'0'],
    ];
    let wrong: Vec<Vec<u8>> = vec![
        vec![TIME, 2, 0, TIME, 2, 0],
        [&one[..], &[TIME, 2, 0]].concat(),
        vec![TIME, 2, 0x80, 0x94, 0xeb, 0xdc, 0x03], // 10^9 nanoseconds
        too_late,
        [&two[..], &one].concat(),
        [&one[..], &one].concat(),
        large,
        xattr(b"security.selinux", b""),
        xattr(b"user.", b""),
        xattr(b"user.\0", b""),
        xattr(b"user.\xff", b""),
        xattr(&[&b"user."[..], &[b'x'; 255]].concat(), b""),
        vec![HARD_LINK, 2, b'.', b'.'],
        vec![HARD_LINK, 1, b'0', HARD_LINK, 1, b'0'],
        vec![8, 1, b'0'],
    ];
    let read = |attributes: &[u8]| {
        let mut page = PageWriter::default();
        entry(&mut page);
        page.bytes.splice(1..1, attributes.iter().copied());
        Records::new(page.bytes.into()).unwrap().next()
    };
    for attributes in &fine {
        read(attributes).unwrap().unwrap();
    }
    for attributes in &wrong {
        assert!(read(attributes).is_err(), "{attributes:?}");
    }
    // At the end of a page, and before a chunk.
    let mut page = PageWriter::default();
    entry(&mut page);
    page.bytes.extend([TIME, 2, 0]);
    let mut records = Records::new(page.bytes.clone().into()).unwrap();
    records.next().unwrap();
    assert!(records.next().is_err());
    page.bytes.push(4);
    page.bytes.push(1);
    page.bytes.extend([0; 32]);
    let mut records = Records::new(page.bytes.into()).unwrap();
    records.next().unwrap();
    assert!(records.next().is_err());
}

#[test]
fn artifacts_are_compared_without_their_times() {
    let memory = Memory::default();
    let tree = |seconds: i64, content: &str, xattr: &[u8]| {
        let mut entries = vec![dir("d", Attributes::default())];
        for n in 0..2_000 {
            let attributes = Attributes {
                modified: FileTime::new(seconds + n, 0),
                ..xattrs(&[("user.k", xattr)])
            };
            entries.push(file(&format!("d/{n:05}"), content, attributes));
        }
        build(&entries, &memory)
    };
    let one = tree(1_000, "x", b"v");
    let same = |other: &Root| same_but_times(&one, other, &memory).unwrap();
    let later = tree(2_000, "x", b"v");
    assert_ne!(one.digest(), later.digest());
    assert!(same(&later));
    assert!(!same(&tree(1_000, "y", b"v")));
    assert!(!same(&tree(1_000, "x", b"w")));
    let without = Root {
        totals: Totals {
            files: 1,
            ..one.totals
        },
        ..one.clone()
    };
    assert!(!same(&without));
    assert!(one.pages.iter().all(|page: &PageRef| page.len < 128 << 10));
}

proptest! {
    #[test]
    fn any_time_round_trips(seconds in -(1i64 << 38)..(1i64 << 38), nanoseconds in 0i64..1_000_000_000) {
        let time = FileTime::new(seconds, nanoseconds).unwrap();
        let attributes = Attributes { modified: Some(time), ..Attributes::default() };
        let memory = Memory::default();
        let entries = [file("a", "x", attributes)];
        let root = build(&entries, &memory);
        prop_assert_eq!(&walked(&root, &memory).unwrap()[..], &entries[..]);
        prop_assert!(time.is_near(time.system_time()));
    }
}

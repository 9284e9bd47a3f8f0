//! Bundles: artifacts in one file.

use std::cell::RefCell;
use std::path::Path;

use base::job_progress::JobProgress;
use base::names::{ArtifactRef, Kind};
use bytes::Bytes;
use content::bundle::{Member, export, import};
use content::chunk::{DEFAULT_CHUNKING, Hash};
use content::frame::{Frame, Verified};
use content::manifest::{Attributes, Builder, Entry, EntryBody, FileInfo, KindInfo, check};
use content::store::Store;

use super::{Parts, joined, scratch, write_file};
use crate::Target;
use crate::outcome::{note, taken};

pub(super) const BUNDLE: Target = Target {
    name: "bundle",
    about: "a bundle file: as it is (first byte 0), or made of the given files and then changed at some places",
    run: bundle,
    seeds: || {
        let whole = made(&[
            b"content of a file",
            b"another content, another content, another content",
        ])
        .concat();
        vec![
            [&[0][..], &whole[..]].concat(),
            joined(&[1], &[b"", b"content of a file", b"more"]),
            joined(
                &[1],
                &[b"\x0a\x00\x00\x00\xff", b"content of a file", b"more"],
            ),
            joined(
                &[1],
                &[
                    b"\x30\x01\x00\x00\x01\x31\x01\x00\x00\x01",
                    b"content of a file",
                ],
            ),
        ]
    },
    words: &[
        "PHBUNDL1",
        "artifact",
        "digest",
        "root",
        "model/x:v1",
        "dataset/",
        "format",
        "totals",
        "pages",
        "chunks",
        "entries",
    ],
    short: 60,
};

/// Inputs that one store takes before it is made anew.
const INPUTS_OF_A_STORE: u32 = 500;

struct Place {
    dir: tempfile::TempDir,
    store: Store,
    inputs: u32,
}

thread_local! {
    static PLACE: RefCell<Option<Place>> = const { RefCell::new(None) };
}

fn open(dir: &Path) -> Option<Store> {
    let store = Store::open(dir);
    assert!(store.is_ok(), "{:?}", store.err());
    store.ok()
}

fn bundle(input: &[u8]) {
    let mut parts = Parts::new(input);
    let bytes = if parts.byte().is_multiple_of(2) {
        parts.rest.to_vec()
    } else {
        let changes = parts.part();
        let contents = parts.all();
        let mut bytes = made(&contents).concat();
        // Each change: where (u32 LE), and by what the byte is changed.
        for change in changes.chunks_exact(5) {
            let at = u32::from_le_bytes([change[0], change[1], change[2], change[3]]) as usize
                % bytes.len();
            bytes[at] ^= change[4];
        }
        let is_whole = changes.chunks_exact(5).all(|change| change[4] == 0);
        if is_whole {
            note("whole");
        }
        bytes
    };
    PLACE.with_borrow_mut(|place| {
        if place
            .as_ref()
            .is_some_and(|place| place.inputs >= INPUTS_OF_A_STORE)
        {
            *place = None;
        }
        if place.is_none() {
            let dir = scratch();
            let Some(store) = open(&dir.path().join("store")) else {
                return;
            };
            *place = Some(Place {
                dir,
                store,
                inputs: 0,
            });
        }
        let Some(place) = place else { return };
        place.inputs += 1;
        imported(place.dir.path(), &place.store, &bytes);
    });
}

fn imported(dir: &Path, store: &Store, bytes: &[u8]) {
    let file = dir.join("in.ph");
    assert!(write_file(&file, bytes).is_ok());
    let Some(members) = taken(import(&file, store, &JobProgress::default())) else {
        return;
    };
    for member in &members {
        let root = member.root();
        assert!(
            root.as_ref().is_ok_and(|root| check(
                &member.artifact,
                root,
                store,
                &Default::default()
            )
            .is_ok()),
            "{:?}",
            member.artifact
        );
    }
    let out = dir.join("out.ph");
    let exported = export(&members, store, &out, &JobProgress::default());
    assert!(
        exported.is_ok(),
        "what was imported can be exported: {exported:?}"
    );
    let again = import(&out, store, &JobProgress::default());
    assert!(again.is_ok_and(|again| again.len() == members.len()));
    assert!(std::fs::remove_file(out).is_ok());
}

/// The pieces of a bundle of one artifact with these files.
fn made(contents: &[&[u8]]) -> Vec<Bytes> {
    let mut frames = Vec::new();
    let mut pages = Vec::new();
    let mut sink = |page: Verified| {
        pages.push(Frame::encode(&page).to_bytes());
        Ok(())
    };
    let mut builder = Builder::new(DEFAULT_CHUNKING, &mut sink);
    for (number, content) in contents.iter().enumerate() {
        let chunk = Verified::new(Bytes::copy_from_slice(content));
        let body = EntryBody::File(FileInfo {
            size: content.len() as u64,
            hash: chunk.id,
        });
        let Ok(path) = format!("f{number:05}").parse() else {
            continue;
        };
        assert!(
            builder
                .push(
                    &Entry {
                        path,
                        mode: 0o644,
                        body,
                        attributes: Attributes::default(),
                    },
                    &[]
                )
                .is_ok()
        );
        if !content.is_empty() {
            frames.push(Frame::encode(&chunk).to_bytes());
        }
    }
    let Ok(root) = builder.finish(Kind::Model, KindInfo::Files) else {
        return Vec::new();
    };
    let Ok(artifact) = ArtifactRef::new(Kind::Model, "x", "v1") else {
        return Vec::new();
    };
    let list = serde_json::to_vec(&[Member::new(artifact, &root)]).unwrap_or_default();
    assert_eq!(root.digest(), Hash::of(&root.to_bytes()));
    let mut pieces = vec![
        Bytes::from_static(b"PHBUNDL1"),
        Bytes::copy_from_slice(&(list.len() as u32).to_le_bytes()),
        list.into(),
    ];
    pieces.extend(pages.into_iter().chain(frames));
    pieces
}

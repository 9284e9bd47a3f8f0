//! The store as one: what is put is found, crashes and damage. `collect`, `index` and `sync` have
//! the rest.

mod collect;
mod index;
mod sync;

use std::os::unix::fs::FileExt;

use super::*;
use crate::frame::{Frame, Header, Verified};
use crate::manifest::ChunkRef;
use base::fault::Code;

fn chunk(seed: u64, len: usize) -> Verified {
    let mut out = vec![0; len];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut out);
    Verified::new(out.into())
}

fn fill(store: &Store, seeds: std::ops::Range<u64>) -> Vec<Verified> {
    seeds
        .map(|seed| {
            let chunk = chunk(seed, 10_000);
            store.put(&Frame::encode(&chunk)).unwrap();
            chunk
        })
        .collect()
}

#[test]
fn chunks_are_kept_once_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let chunks = fill(&store, 0..50);
    assert_eq!(
        store.put(&Frame::encode(&chunks[3])).unwrap(),
        0,
        "a second put stores nothing"
    );
    assert_eq!(
        store.read(chunks[7].id).unwrap().bytes,
        chunks[7].bytes,
        "readable before the flush"
    );
    store.flush().unwrap();
    assert_eq!(store.put(&Frame::encode(&chunks[3])).unwrap(), 0);
    let ids: Vec<Hash> = chunks.iter().map(|c| c.id).collect();
    assert_eq!(
        store.read_frames(&ids).unwrap().len(),
        1,
        "consecutive frames are returned in one buffer"
    );
    let odd: Vec<Hash> = ids.iter().copied().step_by(2).collect();
    assert_eq!(store.read_frames(&odd).unwrap().len(), 25);
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert!(store.has_many(&ids).unwrap().into_iter().all(|here| here));
}

#[test]
fn existing_chunks_are_not_compressed_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let chunks: Vec<Verified> = (0..10).map(|seed| chunk(seed, 10_000)).collect();
    let ids: Vec<Hash> = chunks.iter().map(|c| c.id).collect();
    let put = |some: std::ops::Range<usize>| {
        let mut compressed = Vec::new();
        let bytes = store.put_lacking(&ids[some.clone()], |place| {
            compressed.push(some.start + place);
            Frame::encode(&chunks[some.start + place])
        });
        (compressed, bytes.unwrap())
    };
    assert_eq!(put(2..5).0, [2, 3, 4]);
    assert_eq!(put(0..8).0, [0, 1, 5, 6, 7]);
    store.flush().unwrap();
    assert_eq!(
        put(0..8),
        (vec![], 0),
        "publishing again only reads and hashes"
    );
    assert_eq!(put(0..10).0, [8, 9]);
    assert!(
        chunks
            .iter()
            .all(|c| store.read(c.id).unwrap().bytes == c.bytes)
    );
}

#[test]
fn a_pack_without_content_after_a_power_failure_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let chunks = fill(&store, 0..3);
    store.flush().unwrap();
    drop(store);
    let left = dir.path().join("packs/00000002.pack");
    for bytes in [
        &[0u8; 4096][..],
        b"",
        b"PHP",
        b"\0\0\0",
        b"PHPACK01",
        b"PHPACK01\0\0\0",
    ] {
        durable::replace(&left, bytes).unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert!(!left.exists(), "{} bytes are still there", bytes.len());
        assert!(chunks.iter().all(|c| store.read(c.id).is_ok()));
    }
    let store = Store::open(dir.path()).unwrap();
    let more = fill(&store, 3..6);
    store.flush().unwrap();
    drop(store);
    // A file that is not a pack is neither removed nor a problem.
    let left = dir.path().join("packs/00000009.pack");
    durable::replace(&left, b"GIF89a, perhaps").unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert!(!left.exists());
    let names = std::fs::read_dir(dir.path().join("packs"))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let aside: Vec<PathBuf> = names
        .filter(|path| path.to_string_lossy().contains("00000009.no-pack-"))
        .collect();
    assert_eq!(std::fs::read(&aside[0]).unwrap(), b"GIF89a, perhaps");
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert!(chunks.iter().chain(&more).all(|c| store.read(c.id).is_ok()));
}

#[test]
fn a_crash_loses_at_most_the_incomplete_tail() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let first = fill(&store, 0..10);
    store.flush().unwrap();
    let second = fill(&store, 10..20);
    drop(store); // never flushed: as after kill -9
    let pack = dir.path().join("packs/00000001.pack");
    let file = std::fs::File::options().write(true).open(&pack).unwrap();
    file.set_len(file.metadata().unwrap().len() - 5).unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert!(
        first
            .iter()
            .chain(&second[..9])
            .all(|c| store.read(c.id).is_ok()),
        "complete frames are kept"
    );
    assert!(
        !store.has(second[9].id).unwrap(),
        "the incomplete frame is removed"
    );
    fill(&store, 19..25);
    store.flush().unwrap();
    assert!(store.read(second[9].id).is_ok());
}

#[test]
fn packs_that_are_not_in_the_index_are_scanned() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let frames: Vec<Frame> = (0..80)
        .map(|seed| Frame::encode(&chunk(seed, 1_000_000)))
        .collect();
    for some in frames.chunks(3) {
        let bytes: usize = some.iter().map(Frame::len).sum();
        assert_eq!(store.append_all(some).unwrap(), bytes as u64);
        assert_eq!(store.append_all(some).unwrap(), 0);
    }
    drop(store); // never flushed: as after kill -9
    assert_eq!(
        std::fs::read_dir(dir.path().join("packs")).unwrap().count(),
        3
    );
    let store = Store::open(dir.path()).unwrap();
    for frame in &frames {
        assert_eq!(store.read(frame.id()).unwrap().id, frame.id());
    }
    assert_eq!(store.put(&frames[0]).unwrap(), 0);
}

#[test]
fn damage_is_detected_and_never_returned() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let chunks = fill(&store, 0..3);
    store.flush().unwrap();
    let pack = dir.path().join("packs/00000001.pack");
    let mut bytes = std::fs::read(&pack).unwrap();
    bytes[15_000] ^= 1;
    #[expect(clippy::disallowed_methods, reason = "damage is what this test makes")]
    std::fs::write(&pack, &bytes).unwrap();
    let fault = store.read_frames(&[chunks[1].id]).unwrap_err();
    assert_eq!(fault.code, Code::Integrity);
    assert!(fault.message.contains("00000001.pack"), "{fault}");
    assert!(store.read(chunks[0].id).is_ok());
    let file = std::fs::File::options().write(true).open(&pack).unwrap();
    file.set_len(12_000).unwrap();
    assert_eq!(store.read(chunks[2].id).unwrap_err().code, Code::Integrity);
}

#[test]
fn the_receiver_finds_damage_in_what_is_read_to_send_and_recheck_removes_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let chunks = fill(&store, 0..3);
    store.flush().unwrap();
    let listed: Vec<ChunkRef> = chunks
        .iter()
        .map(|chunk| ChunkRef {
            id: chunk.id,
            len: chunk.bytes.len() as u32,
        })
        .collect();
    let pack = dir.path().join("packs/00000001.pack");
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&pack)
        .unwrap();
    let flip = |at: u64| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    };
    let of_second = 15_000;
    flip(of_second);
    let mut sent = store.read_to_send(&listed).unwrap().concat();
    let mut refused = Vec::new();
    for chunk in &listed {
        let header = Header::parse(sent.first_chunk().unwrap()).unwrap();
        let rest = sent.split_off(header.frame_len());
        let frame = Frame::from_line(header, std::mem::replace(&mut sent, rest).into()).unwrap();
        refused.extend(frame.verify(chunk.id, chunk.len).err().map(|_| chunk.id));
    }
    assert_eq!(refused, [chunks[1].id]);
    assert!(store.has(chunks[1].id).unwrap(), "nobody has read it");
    let ids: Vec<Hash> = listed.iter().map(|chunk| chunk.id).collect();
    assert_eq!(store.recheck(&ids).unwrap(), 1);
    assert_eq!(store.has_many(&ids).unwrap(), [true, false, true]);
    // A damaged header is found before anything is sent.
    flip(8);
    let fault = store.read_to_send(&listed[..1]).unwrap_err();
    assert_eq!(fault.code, Code::Integrity, "{fault}");
    assert!(!store.has(chunks[0].id).unwrap());
}

#[test]
fn content_of_a_lost_pack_is_stored_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let chunks = fill(&store, 0..3);
    store.flush().unwrap();
    drop(store);
    std::fs::remove_file(dir.path().join("packs/00000001.pack")).unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.read(chunks[0].id).unwrap_err().code, Code::Integrity);
    assert_eq!(
        store
            .read_frames(&[chunks[1].id, chunks[2].id])
            .unwrap_err()
            .code,
        Code::Integrity
    );
    for chunk in &chunks {
        assert!(store.put(&Frame::encode(chunk)).unwrap() > 0);
        assert_eq!(store.read(chunk.id).unwrap().bytes, chunk.bytes);
    }
}

/// Measures the index for BENCHMARKS.md: `cargo test -p content --release --lib -- --ignored
/// --nocapture index_of_millions`.
#[test]
#[ignore = "measures the size of the index in BENCHMARKS.md"]
fn index_of_millions() {
    use std::time::Instant;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index.redb");
    let id = |n: u64| Hash::of(&n.to_le_bytes());
    let index = Index::open(&path).unwrap();
    let (rows, together) = (2_000_000u64, 8_000);
    let begin = Instant::now();
    for pack in 0..rows / together {
        let at = |n: u64| Location {
            pack: pack as u32,
            offset: n as u32,
            frame_len: 34_000,
        };
        let found: Vec<(Hash, Location)> = (pack * together..(pack + 1) * together)
            .map(|n| (id(n), at(n)))
            .collect();
        index.commit(&found, &[(pack as u32, 1)]).unwrap();
    }
    let took = begin.elapsed();
    // A copy of the open file is what a crash leaves.
    let crashed = dir.path().join("crashed.redb");
    std::fs::copy(&path, &crashed).unwrap();
    let begin = Instant::now();
    drop(Index::open(&crashed).unwrap());
    let recovered = begin.elapsed();
    drop(index);
    let bytes = std::fs::metadata(&path).unwrap().len();
    let begin = Instant::now();
    let index = Index::open(&path).unwrap();
    let open = begin.elapsed();
    let begin = Instant::now();
    for n in 0..1000 {
        let ids: Vec<Hash> = (0..32).map(|k| id((n * 1013 + k * 977) % rows)).collect();
        assert!(index.get_many(&ids).unwrap().iter().all(Option::is_some));
    }
    let look = begin.elapsed() / 32_000;
    println!(
        "{rows} rows: {} bytes each, written in {took:?}, opened in {open:?}, after a crash in {recovered:?}, {look:?} a look",
        bytes / rows
    );
}

#[test]
fn a_chunk_with_a_wrong_raw_length_is_stored_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    for (seed, flushed) in [(1, true), (2, false)] {
        let chunk = chunk(seed, 10_000);
        let listed = ChunkRef {
            id: chunk.id,
            len: 10_000,
        };
        let wrong_frame = Frame::lying(&chunk, 10_777);
        let poison = || {
            store.append(&wrong_frame).unwrap();
            if flushed {
                store.flush().unwrap();
            }
        };
        poison();
        assert_eq!(store.raw_len(chunk.id).unwrap(), Some(10_777));
        assert_eq!(
            store.put(&Frame::encode(&chunk)).unwrap(),
            0,
            "the chunk has not been read yet"
        );
        assert_eq!(
            store.read_listed(&[listed]).unwrap_err().code,
            Code::Integrity,
            "a delivery detects it"
        );
        assert!(
            store.put(&Frame::encode(&chunk)).unwrap() > 0,
            "flushed: {flushed}"
        );
        assert_eq!(store.read_chunk(listed).unwrap().bytes, chunk.bytes);
        assert!(
            store.put_over(&Frame::encode(&chunk)).unwrap() == 0
                && store.recheck(&[chunk.id]).unwrap() == 0
        );
    }
    // The manifest of the malicious publisher names the length of the frame. The hub sends the
    // bytes; the receiver rejects and reports them.
    let chunk = chunk(3, 10_000);
    store.append(&Frame::lying(&chunk, 10_777)).unwrap();
    store
        .read_listed(&[ChunkRef {
            id: chunk.id,
            len: 10_777,
        }])
        .unwrap();
    assert_eq!(
        store.recheck(&[chunk.id, Hash::of(b"not here")]).unwrap(),
        1
    );
    assert!(!store.has(chunk.id).unwrap());
    store.append(&Frame::lying(&chunk, 10_777)).unwrap();
    assert!(
        store.put_over(&Frame::encode(&chunk)).unwrap() > 0,
        "an import repairs"
    );
    // A manifest that names a wrong length for a valid chunk does not affect that chunk.
    for read in [
        store
            .read_listed(&[ChunkRef {
                id: chunk.id,
                len: 9,
            }])
            .map(|_| ()),
        store
            .read_chunk(ChunkRef {
                id: chunk.id,
                len: 9,
            })
            .map(|_| ()),
    ] {
        let fault = read.unwrap_err();
        assert!(
            fault.code == Code::Integrity
                && fault
                    .message
                    .contains("has 10000 bytes, but the manifest states 9"),
            "{fault}"
        );
    }
    assert!(store.read(chunk.id).is_ok());
}

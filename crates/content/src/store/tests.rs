use std::collections::HashSet;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::*;
use crate::chunk::ShortHash;
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
fn a_collection_frees_unreferenced_chunks() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let chunks = fill(&store, 0..100);
    store.flush().unwrap();
    let keep: Vec<Hash> = chunks[..10].iter().map(|c| c.id).collect();
    let freed = store
        .collect(&|id| keep.iter().any(|k| k.short() == id))
        .unwrap();
    assert!(freed > 800_000, "{freed}");
    assert!(keep.iter().all(|id| store.read(*id).is_ok()));
    assert!(!store.has(chunks[50].id).unwrap());
    drop(store);
    assert!(Store::open(dir.path()).unwrap().read(keep[0]).is_ok());
}

#[test]
fn a_put_during_a_collection_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let chunks = fill(&store, 0..100);
    store.flush().unwrap();
    let keep: Vec<Hash> = chunks[..10].iter().map(|c| c.id).collect();
    let stray = chunk(1_000, 10_000);
    let freed = store.collect(&|id| {
        store.put(&Frame::encode(&stray)).unwrap();
        keep.iter().any(|k| k.short() == id)
    });
    assert!(freed.unwrap() > 700_000);
    store.flush().unwrap();
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert!(
        keep.iter()
            .chain([&stray.id])
            .all(|id| store.read(*id).is_ok())
    );
}

#[test]
fn leased_content_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let chunks = fill(&store, 0..100);
    store.flush().unwrap();
    let frames = |chunk: &Verified| Frame::encode(chunk);
    // Found and put by a publish that is still running, and by one that ended after the start of
    // the collection.
    let (running, ending) = (store.leased(), store.leased());
    assert!(running.has(chunks[3].id).unwrap());
    let put = chunk(1_000, 10_000);
    assert!(running.put(&frames(&put)).unwrap() > 0);
    let collection = store.begin_collection().unwrap();
    assert_eq!(ending.put(&frames(&chunks[5])).unwrap(), 0, "it is here");
    drop(ending);
    assert_eq!(
        collection.sweep(&|_| false, &|| Ok(())).unwrap(),
        0,
        "all of it is in pinned packs"
    );
    assert!(
        [&chunks[3], &chunks[5], &put]
            .iter()
            .all(|chunk| store.read(chunk.id).is_ok())
    );
    drop(running);
    assert!(
        store.collect(&|_| false).unwrap() > 900_000,
        "nothing is pinned any more"
    );
    assert!(!store.has(put.id).unwrap());
}

#[test]
fn content_of_selected_packs_is_put_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let chunks = fill(&store, 0..100);
    store.flush().unwrap();
    let stored = std::cell::Cell::new(0);
    let late = std::cell::RefCell::new(None);
    let collection = store.begin_collection().unwrap();
    // The pack is already selected, so the first lookup of its chunk comes too late.
    let go_on = || {
        if late.borrow().is_none() {
            let lease = store.leased();
            stored.set(lease.put(&Frame::encode(&chunks[7])).unwrap());
            *late.borrow_mut() = Some(lease);
        }
        Ok(())
    };
    collection.sweep(&|_| false, &go_on).unwrap();
    assert!(
        stored.get() > 0,
        "the chunk was missing and is stored again"
    );
    assert!(store.read(chunks[7].id).is_ok());
    store.flush().unwrap();
    assert!(store.read(chunks[7].id).is_ok() && !store.has(chunks[8].id).unwrap());
}

#[test]
fn a_cancelled_collection_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let chunks = fill(&store, 0..20);
    store.flush().unwrap();
    let stop = || Err(Fault::conflict("enough"));
    store
        .begin_collection()
        .unwrap()
        .sweep(&|_| false, &stop)
        .unwrap_err();
    let lease = store.leased();
    assert!(
        chunks
            .iter()
            .all(|chunk| lease.has(chunk.id).unwrap() && store.read(chunk.id).is_ok())
    );
}

/// Publishers put and find the same chunks again and again, each with its own lease, while
/// collections run.
#[test]
fn content_of_a_running_publish_is_never_collected() {
    use std::sync::atomic::AtomicBool;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_with(dir.path(), 64 << 10).unwrap();
    let named = Mutex::new(HashSet::new());
    let over = AtomicBool::new(false);
    let publish = |who: u64| {
        for round in 0..40 {
            let store = store.leased();
            // Half of the chunks are shared, so that they are found as often as they are put.
            let shared = (0..10).map(|n| (round % 5) * 10 + n);
            let chunks: Vec<Verified> = shared
                .chain((0..10).map(|n| 1_000 * (who + 1) + round * 10 + n))
                .map(|n| chunk(n, 4_000))
                .collect();
            for chunk in &chunks {
                store.put(&Frame::encode(chunk)).unwrap();
            }
            store.flush().unwrap();
            // Only some publishes become artifacts; the content of the others is garbage.
            if round % 3 == 0 {
                named.lock().extend(chunks.iter().map(|chunk| chunk.id));
            }
            for chunk in &chunks {
                assert!(store.read(chunk.id).is_ok(), "publish {who}, round {round}");
            }
        }
    };
    let freed = std::thread::scope(|scope| {
        let publishes: Vec<_> = (0..3)
            .map(|who| scope.spawn(move || publish(who)))
            .collect();
        let collecting = scope.spawn(|| {
            let mut freed = 0;
            while !over.load(Ordering::Relaxed) {
                let collection = store.begin_collection().unwrap();
                let live: HashSet<ShortHash> =
                    named.lock().iter().map(|id: &Hash| id.short()).collect();
                freed += collection
                    .sweep(&|id| live.contains(&id), &|| Ok(()))
                    .unwrap();
            }
            freed
        });
        let ended: Vec<_> = publishes
            .into_iter()
            .map(|publish| publish.join())
            .collect();
        over.store(true, Ordering::Relaxed);
        let freed = collecting.join().unwrap();
        ended.into_iter().for_each(|end| end.unwrap());
        freed
    });
    let live: HashSet<ShortHash> = named.lock().iter().map(|id| id.short()).collect();
    let freed = freed + store.collect(&|id| live.contains(&id)).unwrap();
    assert!(freed > 0, "there is garbage");
    for id in named.lock().iter() {
        store.read(*id).unwrap();
    }
}

#[test]
fn a_damaged_chunk_does_not_stop_a_collection() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let chunks = fill(&store, 0..100);
    store.flush().unwrap();
    let file = std::fs::File::options()
        .write(true)
        .open(dir.path().join("packs/00000001.pack"))
        .unwrap();
    file.write_all_at(b"damage", 35_000).unwrap();
    let keep: Vec<Hash> = chunks[..10].iter().map(|c| c.id).collect();
    store
        .collect(&|id| keep.iter().any(|k| k.short() == id))
        .unwrap();
    assert!(!store.has(keep[3]).unwrap());
    assert!(
        keep.iter()
            .enumerate()
            .all(|(n, id)| n == 3 || store.read(*id).is_ok())
    );
    assert!(store.put(&Frame::encode(&chunks[3])).unwrap() > 0);
    assert!(store.read(keep[3]).is_ok());
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

#[test]
fn all_who_put_learn_of_a_failed_sync() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let before = store.losses();
    let chunks = fill(&store, 0..3);
    store.inner.open.lock().writer_mut().break_sync().unwrap();
    assert!(store.flush().is_err(), "the flush of another thread");
    store.flush().unwrap();
    assert_eq!(store.flush_since(before).unwrap_err().code, Code::Internal);
    assert!(!store.has(chunks[0].id).unwrap());
    let before = store.losses();
    fill(&store, 0..3);
    store.flush_since(before).unwrap();
    assert!(chunks.iter().all(|c| store.read(c.id).is_ok()));
}

/// Another thread fills and syncs packs all the time. What was put before a flush is durable after
/// it.
#[test]
fn a_flush_covers_earlier_puts_even_if_another_thread_syncs() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_with(dir.path(), 300).unwrap();
    let ends = AtomicU64::new(0);
    let put = |n: u64| {
        let chunk = chunk(n, 100);
        store.append(&Frame::encode(&chunk)).unwrap();
        chunk.id
    };
    std::thread::scope(|scope| {
        for who in 1..3u64 {
            let (put, ends) = (&put, &ends);
            scope.spawn(move || {
                for n in who << 32.. {
                    put(n);
                    if ends.load(Ordering::SeqCst) > 0 {
                        break;
                    }
                }
            });
        }
        // Stop the other threads before any assertion can panic.
        let unknown = (0..300).find(|n| {
            let id = put(*n);
            store
                .flush()
                .and_then(|()| store.inner.index.get(id))
                .ok()
                .flatten()
                .is_none()
        });
        ends.store(1, Ordering::SeqCst);
        assert_eq!(
            unknown, None,
            "the index lacks chunks that were put before a flush"
        );
    });
    assert_eq!(store.lost_packs().unwrap(), Vec::<u32>::new());
}

/// The thread that starts the next pack learns that the last pack is lost, and so do those that put
/// into that pack.
#[test]
fn all_who_put_into_a_full_pack_learn_that_it_cannot_be_synced() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_with(dir.path(), 100).unwrap();
    let before = store.losses();
    let mine = fill(&store, 0..1);
    store.inner.open.lock().writer_mut().break_sync().unwrap();
    let other = Verified::new(Bytes::from("other ".repeat(50)));
    assert!(store.put(&Frame::encode(&other)).is_err());
    assert_eq!(store.flush_since(before).unwrap_err().code, Code::Internal);
    assert_eq!(
        store.has_many(&[mine[0].id, other.id]).unwrap(),
        [false, true]
    );
    // The next start does not accept bytes that may be only in memory.
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(
        store.has_many(&[mine[0].id, other.id]).unwrap(),
        [false, true]
    );
}

/// Measures the index for BENCHMARKS.md: `cargo test --release --lib -- --ignored --nocapture
/// index_of_millions`.
#[test]
#[ignore = "prints figures"]
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
fn chunks_are_found_during_a_flush() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    for round in 0..60u32 {
        let chunks: Vec<Verified> = (0..20u32)
            .map(|i| Verified::new([round.to_le_bytes(), i.to_le_bytes()].concat().into()))
            .collect();
        let ids: Vec<Hash> = chunks.iter().map(|c| c.id).collect();
        chunks
            .iter()
            .for_each(|chunk| assert!(store.put(&Frame::encode(chunk)).unwrap() > 0));
        let flushing = std::thread::spawn({
            let store = store.clone();
            move || store.flush().unwrap()
        });
        while !flushing.is_finished() {
            assert_eq!(store.has_many(&ids).unwrap(), [true; 20], "round {round}");
            store.read_frames(&ids).unwrap();
        }
        flushing.join().unwrap();
    }
}

/// A closed store with some chunks in several packs.
fn closed_store(dir: &Path) -> Vec<Verified> {
    let store = Store::open_with(dir, 40_000).unwrap();
    let chunks = fill(&store, 0..20);
    store.flush().unwrap();
    assert!(store.inner.packs.list().unwrap().len() > 2, "several packs");
    chunks
}

fn all_here(dir: &Path, chunks: &[Verified]) {
    let store = Store::open(dir).unwrap();
    for chunk in chunks {
        assert_eq!(store.read(chunk.id).unwrap().bytes, chunk.bytes);
    }
    // New chunks go to a new pack and damage none of the old ones.
    let more = fill(&store, 100..103);
    store.flush().unwrap();
    assert!(
        chunks
            .iter()
            .chain(&more)
            .all(|chunk| store.read(chunk.id).is_ok())
    );
}

#[test]
fn a_missing_index_is_reported_and_can_be_rebuilt() {
    let dir = tempfile::tempdir().unwrap();
    let chunks = closed_store(dir.path());
    std::fs::remove_file(dir.path().join(INDEX)).unwrap();
    let fault = Store::open(dir.path()).err().unwrap();
    assert!(
        fault.message.contains("index.redb is missing")
            && fault.next.contains("packhorse store rebuild-index"),
        "{fault:?}"
    );
    assert!(
        !dir.path().join(INDEX).exists(),
        "no empty index is created"
    );
    let rebuilt = rebuild_index(dir.path()).unwrap();
    assert_eq!(
        (rebuilt.chunks, rebuilt.damaged_bytes, rebuilt.kept),
        (20, 0, None)
    );
    all_here(dir.path(), &chunks);
}

#[test]
fn a_damaged_index_never_panics_and_can_be_rebuilt() {
    let dir = tempfile::tempdir().unwrap();
    let chunks = closed_store(dir.path());
    let index = dir.path().join(INDEX);
    let intact = std::fs::read(&index).unwrap();
    let mut refused = 0;
    for page in 0..intact.len() / 4096 {
        let mut bytes = intact.clone();
        bytes[page * 4096..(page + 1) * 4096].copy_from_slice(&chunk(page as u64, 4096).bytes);
        std::fs::File::create(&index)
            .unwrap()
            .write_all(&bytes)
            .unwrap();
        if let Err(fault) = Store::open(dir.path()) {
            assert!(
                fault.message.contains("index.redb")
                    && fault.next.contains("packhorse store rebuild-index"),
                "{fault:?}"
            );
            refused += 1;
        }
    }
    assert!(refused > 0, "at least one damaged page is detected");
    std::fs::File::create(&index)
        .unwrap()
        .write_all(&intact[..intact.len() / 3])
        .unwrap();
    let fault = Store::open(dir.path()).err().unwrap();
    assert!(
        fault.next.contains("packhorse store rebuild-index"),
        "{fault:?}"
    );
    let cut = std::fs::read(&index).unwrap();
    let rebuilt = rebuild_index(dir.path()).unwrap();
    assert_eq!(
        std::fs::read(rebuilt.kept.unwrap()).unwrap(),
        cut,
        "the damaged file is kept"
    );
    all_here(dir.path(), &chunks);
}

#[test]
fn a_rebuild_finds_the_chunks_on_both_sides_of_damage() {
    let dir = tempfile::tempdir().unwrap();
    let chunks = closed_store(dir.path());
    let pack = dir.path().join("packs/00000001.pack");
    let mut bytes = std::fs::read(&pack).unwrap();
    // Damages the length in the header of the second frame, so that the start of the third is
    // unknown.
    let second = 8 + 10_000 + HEADER_BYTES + 36;
    bytes[second] ^= 0xff;
    std::fs::File::create(&pack)
        .unwrap()
        .write_all(&bytes)
        .unwrap();
    std::fs::remove_file(dir.path().join(INDEX)).unwrap();
    let rebuilt = rebuild_index(dir.path()).unwrap();
    assert_eq!(
        (rebuilt.chunks, rebuilt.damaged_bytes),
        (19, (10_000 + HEADER_BYTES) as u64)
    );
    let others: Vec<Verified> = chunks
        .iter()
        .enumerate()
        .filter(|(n, _)| *n != 1)
        .map(|(_, chunk)| chunk.clone())
        .collect();
    all_here(dir.path(), &others);
    let store = Store::open(dir.path()).unwrap();
    assert!(
        !store.has(chunks[1].id).unwrap(),
        "so that a new publish stores it again"
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

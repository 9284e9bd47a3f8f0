//! Flushes, and syncs that fail.

use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::*;

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

//! Collections, beside publishes and leases.

use std::collections::HashSet;
use std::sync::atomic::Ordering;

use super::*;
use crate::chunk::ShortHash;

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

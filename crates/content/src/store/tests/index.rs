//! A missing or damaged index, and its rebuild.

use std::io::Write;

use super::*;

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

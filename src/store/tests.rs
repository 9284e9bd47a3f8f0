use super::*;

fn chunk(seed: u64, len: usize) -> Verified {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
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
    assert_eq!(store.put(&Frame::encode(&chunks[3])).unwrap(), 0, "a second put takes no room");
    assert_eq!(store.read(chunks[7].id).unwrap().bytes, chunks[7].bytes, "readable before the flush");
    store.flush().unwrap();
    assert_eq!(store.put(&Frame::encode(&chunks[3])).unwrap(), 0);
    let ids: Vec<Hash> = chunks.iter().map(|c| c.id).collect();
    assert_eq!(store.read_frames(&ids).unwrap().len(), 1, "neighbours come in one piece");
    let odd: Vec<Hash> = ids.iter().copied().step_by(2).collect();
    assert_eq!(store.read_frames(&odd).unwrap().len(), 25);
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert!(store.has_many(&ids).unwrap().into_iter().all(|here| here));
}

#[test]
fn a_crash_loses_at_most_the_torn_tail() {
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
    assert!(first.iter().chain(&second[..9]).all(|c| store.read(c.id).is_ok()), "whole frames are kept");
    assert!(!store.has(second[9].id).unwrap(), "the torn one is gone");
    fill(&store, 19..25);
    store.flush().unwrap();
    assert!(store.read(second[9].id).is_ok());
}

#[test]
fn damage_is_noticed_and_never_given_out() {
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
fn collecting_frees_what_nothing_names() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let chunks = fill(&store, 0..100);
    store.flush().unwrap();
    let keep: Vec<Hash> = chunks[..10].iter().map(|c| c.id).collect();
    let freed = store.collect(&|id| keep.contains(&id)).unwrap();
    assert!(freed > 800_000, "{freed}");
    assert!(keep.iter().all(|id| store.read(*id).is_ok()));
    assert!(!store.has(chunks[50].id).unwrap());
    drop(store);
    assert!(Store::open(dir.path()).unwrap().read(keep[0]).is_ok());
}

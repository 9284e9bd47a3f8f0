//! Commits, journals and the loss of the file.

use super::journal::{sound_segment, with_sum};
use super::*;

/// A location where a transfer stages.
fn staging() -> LocationInfo {
    LocationInfo {
        place: StorageLocation::Folder { path: "/x".into() },
        digest: Hash([1; 32]),
        transfer: Some("t-1".into()),
        foreign: false,
        adopting: false,
    }
}

#[test]
fn a_commit_survives_and_a_removed_place_is_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let index = ChunkIndex::open(dir.path()).unwrap();
    let place = index.put(None, staging()).unwrap();
    let journal = RwLock::new(index.journal(place, 200_000).unwrap());
    let file = FileInfo {
        size: 5,
        hash: Hash([2; 32]),
    };
    let at = At {
        place,
        entry: 7,
        offset: 0,
        len: 5,
    };
    let mut commit = Commit {
        chunks: vec![(Hash([3; 32]), at)],
        entries: vec![(7, "a/b".parse().unwrap(), file)],
        ordinals: vec![0, 70_000, 199_999],
        ..Commit::default()
    };
    index.commit(place, &journal, &mut commit).unwrap();
    drop(index);
    let index = ChunkIndex::open(dir.path()).unwrap();
    assert_eq!(index.staged_by("t-1"), Some(place));
    let journal = index.journal(place, 200_000).unwrap();
    assert_eq!(journal.count(), 3);
    assert!(journal.has(70_000) && journal.has(199_999) && !journal.has(1));
    let journal = RwLock::new(journal);
    index.uncommit(place, &journal, &[70_000, 70_001]).unwrap();
    for journal in [journal.into_inner(), index.journal(place, 200_000).unwrap()] {
        assert!(
            journal.count() == 2 && !journal.has(70_000) && journal.has(0) && journal.has(199_999)
        );
    }
    assert_eq!(
        index.find(&[Hash([3; 32]), Hash([4; 32])]).unwrap(),
        [Some(at), None]
    );
    assert_eq!(index.entry(place, 7).unwrap().unwrap().1, file);
    index.remove(place).unwrap();
    assert_eq!(index.find(&[Hash([3; 32])]).unwrap(), [None]);
}

#[test]
fn a_location_is_behind_until_its_rows_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let index = ChunkIndex::open(dir.path()).unwrap();
    let place = index.put(None, staging()).unwrap();
    let journal = RwLock::new(index.journal(place, 2).unwrap());
    let row = |n: u8| {
        (
            Hash([n; 32]),
            At {
                place,
                entry: 0,
                offset: 0,
                len: 5,
            },
        )
    };
    assert!(!index.is_behind(place));
    index
        .commit(
            place,
            &journal,
            &mut Commit {
                ordinals: vec![0],
                ..Commit::default()
            },
        )
        .unwrap();
    assert!(index.is_behind(place));
    let both = Commit {
        chunks: vec![row(1), row(2)],
        ordinals: vec![1],
        ..Commit::default()
    };
    index.commit(place, &journal, &mut { both }).unwrap();
    assert!(!index.is_behind(place));
    drop(index);
    let index = ChunkIndex::open(dir.path()).unwrap();
    assert!(
        index.is_behind(place),
        "it is unknown what the previous process had not written"
    );
    index
        .note(&mut vec![row(1), row(2)], &mut Vec::new(), false)
        .unwrap();
    index.caught_up(place);
    assert!(!index.is_behind(place) && index.find(&[row(2).0]).unwrap()[0].is_some());
}

fn staged(dir: &Path) -> u32 {
    let index = ChunkIndex::open(dir).unwrap();
    let place = index.put(None, staging()).unwrap();
    let journal = RwLock::new(index.journal(place, 100).unwrap());
    index
        .commit(
            place,
            &journal,
            &mut Commit {
                ordinals: vec![3, 64],
                ..Commit::default()
            },
        )
        .unwrap();
    place
}

#[test]
fn a_damaged_or_missing_file_is_recreated_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    staged(dir.path());
    let path = dir.path().join(FILE);
    let sound = std::fs::read(&path).unwrap();
    std::fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(sound.len() as u64 / 2)
        .unwrap();
    let index = ChunkIndex::open(dir.path()).unwrap();
    let loss = index.loss().unwrap();
    assert_eq!(
        index.staged_by("t-1"),
        None,
        "nothing of the damaged file is used"
    );
    assert_eq!(
        std::fs::read(loss.aside.as_ref().unwrap()).unwrap(),
        sound[..sound.len() / 2],
        "it is kept"
    );
    assert!(
        loss.report(dir.path())
            .starts_with("fault chunk index: being rebuilt"),
        "{}",
        loss.report(dir.path())
    );
    drop(index);
    let index = ChunkIndex::open(dir.path()).unwrap();
    assert_eq!(
        index.loss().unwrap().artifacts,
        None,
        "a restart does not forget that rows lack"
    );
    index.rebuilt(7).unwrap();
    drop(index);
    let report = ChunkIndex::open(dir.path())
        .unwrap()
        .loss()
        .unwrap()
        .report(dir.path());
    assert!(
        report.starts_with("ok chunk index: rebuilt on") && report.contains("7 artifacts"),
        "{report}"
    );

    let dir = tempfile::tempdir().unwrap();
    assert_eq!(
        ChunkIndex::open_expected(dir.path(), false).unwrap().loss(),
        None,
        "a new site has lost nothing"
    );
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    let loss = ChunkIndex::open_expected(dir.path(), true)
        .unwrap()
        .loss()
        .unwrap();
    assert!(
        loss.why.contains("missing") && loss.aside.is_none(),
        "{loss:?}"
    );
}

#[test]
fn a_journal_row_with_a_flipped_bit_is_rejected() {
    let sum = with_sum(7, 0, vec![0; 16]);
    assert_eq!(sound_segment(7, 0, &sum, 2), Some(&[0; 16][..]));
    assert_eq!(
        sound_segment(7, 0, &[0; 16], 2),
        Some(&[0; 16][..]),
        "a row of an older version"
    );
    for bit in 0..sum.len() * 8 {
        let mut flipped = sum.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(sound_segment(7, 0, &flipped, 2), None, "bit {bit}");
    }
    assert_eq!(
        sound_segment(8, 0, &sum, 2),
        None,
        "the journal of another transfer"
    );
    assert_eq!(sound_segment(7, 0, &sum, 1), None);
    let dir = tempfile::tempdir().unwrap();
    let place = staged(dir.path());
    let index = ChunkIndex::open(dir.path()).unwrap();
    let journal = index.journal(place, 100).unwrap();
    assert!(journal.has(3) && journal.has(64) && journal.count() == 2);
}

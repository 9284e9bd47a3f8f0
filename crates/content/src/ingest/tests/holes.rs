//! Sparse files: their holes have the same chunks as zeros.

use super::super::holes::Holes;
use super::*;

/// Data and its offset.
type Piece<'a> = (u64, &'a [u8]);

/// A sparse file with these pieces of data.
fn sparse(path: &Path, size: u64, pieces: &[Piece<'_>]) {
    use std::os::unix::fs::FileExt;
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for (offset, bytes) in pieces {
        file.write_all_at(bytes, *offset).unwrap();
    }
}

#[test]
fn a_hole_has_the_chunks_of_its_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    let piece = noise("piece", 300_001);
    let (mib, last) = (1 << 20, [7]);
    let sets: [(u64, Vec<Piece<'_>>); 7] = [
        (64 * mib, vec![]),
        (40 * mib + 5, vec![(0, &piece)]),
        (40 * mib, vec![(20 * mib + 1234, &piece)]),
        (40 * mib, vec![(40 * mib - 1, &last)]),
        (
            40 * mib,
            vec![(40 * mib - 300_001, &piece), (7 * mib, &last)],
        ),
        (mib + 4096, vec![(0, &last)]),
        // More chunks than one batch has.
        (600 * mib, vec![(500 * mib, &piece)]),
    ];
    for (size, pieces) in sets {
        let (holes, full) = (dir.path().join("holes"), dir.path().join("full"));
        sparse(&holes.join("f"), size, &pieces);
        // Without a hole: each block is allocated, so that every byte is read and cut.
        std::fs::create_dir_all(&full).unwrap();
        let mut bytes = vec![0; size as usize];
        for (offset, piece) in &pieces {
            bytes[*offset as usize..][..piece.len()].copy_from_slice(piece);
        }
        put(&full.join("f"), &bytes);
        drop(bytes);
        let progress = Progress::default();
        let published = ingest_as(
            DEFAULT_CHUNKING,
            &mut Folder::open(&holes),
            Kind::Dataset,
            &store,
            &store,
            &progress,
        )
        .unwrap();
        assert_eq!(progress.read.load(Ordering::Relaxed), size);
        let expected = publish(DEFAULT_CHUNKING, &full, &store);
        assert_eq!(published.digest, expected.digest, "{size} {}", pieces.len());
        assert_eq!(expected.stored, 0, "every chunk is stored already");
        std::fs::remove_dir_all(&holes).unwrap();
        std::fs::remove_dir_all(&full).unwrap();
    }
}

#[test]
fn a_hole_of_many_gigabytes_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    let file = dir.path().join("set/f");
    sparse(&file, 1 << 40, &[(5 << 20, b"data")]);
    let content = Content::File(file);
    let mut from = reading::open(&content, 1 << 40, |_| Ok(())).unwrap();
    let mut holes = Holes::new(DEFAULT_CHUNKING);
    let (data, size) = (5 << 20, 1u64 << 40);
    let before = holes.chunks_at(&mut *from, 0, 0, size).unwrap();
    let max = u64::from(DEFAULT_CHUNKING.max);
    assert!(before * max < data && before * max + 2 * max >= data);
    assert_eq!(holes.chunks_at(&mut *from, data, data, size), None);
    let behind = data + 4096;
    let count = holes.chunks_at(&mut *from, behind, behind, size).unwrap();
    assert!(count > (1 << 24) - 100, "{count}");
    // A file that became shorter has no hole there: the reader finds its end.
    File::options()
        .write(true)
        .open(dir.path().join("set/f"))
        .unwrap()
        .set_len(6 << 20)
        .unwrap();
    let mut again = Holes::new(DEFAULT_CHUNKING);
    assert_eq!(again.chunks_at(&mut *from, behind, behind, size), None);
    drop(store);
}

#[test]
fn a_file_that_shrinks_or_grows_in_its_hole_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    for other in [20 << 20, 60 << 20] {
        let tree = dir.path().join("tree");
        sparse(&tree.join("f"), 40 << 20, &[(0, b"data")]);
        let mut source = Folder::open(&tree);
        File::options()
            .write(true)
            .open(tree.join("f"))
            .unwrap()
            .set_len(other)
            .unwrap();
        let fault = ingest_as(
            DEFAULT_CHUNKING,
            &mut source,
            Kind::Dataset,
            &store,
            &store,
            &Progress::default(),
        )
        .unwrap_err();
        assert!(fault.message.contains("changed"), "{fault}");
    }
}

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::*;
use crate::manifest::{Attributes, Entry, EntryBody, Step, Walk};
use crate::source::{Content, SourceBody, SourceEntry};
use crate::testing::Folder;

mod holes;

fn noise(seed: &str, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new()
        .update(seed.as_bytes())
        .finalize_xof()
        .fill(&mut out);
    out
}

fn put(path: &Path, bytes: &[u8]) {
    use std::io::Write;
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    File::create(path).unwrap().write_all(bytes).unwrap();
}

fn publish(chunking: Chunking, path: &Path, store: &Store) -> Ingested {
    let mut source = Folder::open(path);
    ingest_as(
        chunking,
        &mut source,
        Kind::Dataset,
        store,
        store,
        &Progress::default(),
    )
    .unwrap()
}

#[test]
fn files_of_every_size_round_trip_and_a_second_publish_stores_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, store) = (
        dir.path().join("tree"),
        Store::open(&dir.path().join("store")).unwrap(),
    );
    let whole = DEFAULT_CHUNKING.whole as usize;
    let mib = INGEST_BATCH_BYTES;
    let sizes = [
        0,
        1,
        5_000,
        whole - 1,
        whole,
        whole + 1,
        whole + 7,
        mib - 1,
        mib,
        mib + 1,
        2 * mib,
        3 * mib + 7,
        100,
        0,
        whole,
        whole,
        9,
    ];
    for (i, &size) in sizes.iter().enumerate() {
        put(&tree.join(format!("f{i:02}")), &noise(&i.to_string(), size));
    }
    let first = publish(DEFAULT_CHUNKING, &tree, &store);
    let mut found: Vec<(Hash, Vec<u8>)> = Vec::new();
    for step in Walk::new(&first.root, &store) {
        match step.unwrap() {
            Step::Entry {
                entry:
                    Entry {
                        body: EntryBody::File(file),
                        ..
                    },
                ..
            } => found.push((file.hash, Vec::new())),
            Step::Entry { .. } => {}
            Step::Chunk(chunk, spot) => {
                let (_, bytes) = found.last_mut().unwrap();
                assert_eq!(bytes.len() as u64, spot.offset);
                bytes.extend_from_slice(&store.read(chunk.id).unwrap().bytes);
            }
        }
    }
    assert_eq!(found.len(), sizes.len());
    for (i, (hash, bytes)) in found.iter().enumerate() {
        assert_eq!(
            *bytes,
            noise(&i.to_string(), sizes[i]),
            "file {i} of {} bytes",
            sizes[i]
        );
        assert_eq!(*hash, Hash::of(bytes));
    }
    let before = store.stored_bytes().unwrap();
    let again = publish(DEFAULT_CHUNKING, &tree, &store);
    assert_eq!((again.digest, again.stored), (first.digest, 0));
    assert_eq!(store.stored_bytes().unwrap(), before);
}

#[test]
fn content_that_differs_from_its_listing_is_refused() {
    struct One(Option<SourceEntry>);
    impl Source for One {
        fn next(&mut self) -> Result<Option<SourceEntry>, Fault> {
            Ok(self.0.take())
        }
        fn info(&self) -> crate::manifest::KindInfo {
            crate::manifest::KindInfo::Files
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    for (size, there) in [
        (10, 9),
        (10, 11),
        (0, 1),
        (3 << 20, (3 << 20) - 1),
        (3 << 20, (3 << 20) + 1),
        (300_000, 0),
    ] {
        let body = SourceBody::File {
            size,
            content: Content::Memory(noise("x", there).into()),
        };
        let mut source = One(Some(SourceEntry {
            path: "f".parse().unwrap(),
            mode: 0o644,
            body,
            identity: None,
            attributes: Attributes::default(),
        }));
        let fault = ingest(
            &mut source,
            Kind::Model,
            &store,
            &store,
            &Progress::default(),
        )
        .unwrap_err();
        assert!(
            fault.message.contains("changed while it was read"),
            "{size} {there}: {fault}"
        );
    }
}

#[test]
fn a_file_that_changes_between_its_listing_and_its_end_is_refused() {
    struct Meddled(Folder, PathBuf);
    impl Source for Meddled {
        fn next(&mut self) -> Result<Option<SourceEntry>, Fault> {
            let entry = self.0.next()?;
            base::testing::wait_for_file_clock();
            put(&self.1, b"other");
            Ok(entry)
        }
        fn info(&self) -> crate::manifest::KindInfo {
            self.0.info()
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let (tree, store) = (
        dir.path().join("tree"),
        Store::open(&dir.path().join("store")).unwrap(),
    );
    put(&tree.join("a"), b"first");
    let mut source = Meddled(Folder::open(&tree), tree.join("a"));
    let fault = ingest(
        &mut source,
        Kind::Dataset,
        &store,
        &store,
        &Progress::default(),
    )
    .unwrap_err();
    assert!(
        fault.message.contains("\"a\" changed while it was read"),
        "{fault}"
    );
}

#[test]
fn a_change_of_permissions_or_links_during_the_read_is_no_change() {
    use std::os::unix::fs::{FileExt, PermissionsExt};
    /// Calls `change` when the file is open.
    struct Disturbed<'a>(Folder, &'a (dyn Fn(&Path) + Sync), PathBuf, bool);
    impl Source for Disturbed<'_> {
        fn next(&mut self) -> Result<Option<SourceEntry>, Fault> {
            let mut entry = self.0.next()?;
            if let Some(SourceEntry {
                body: SourceBody::File { content, .. },
                ..
            }) = entry.as_mut().filter(|_| self.3)
            {
                let copy = self.2.parent().unwrap().with_extension("copy");
                std::fs::copy(&self.2, &copy).unwrap();
                *content = Content::File(copy);
            }
            Ok(entry)
        }
        fn opened(&mut self, _: &File) -> Result<(), Fault> {
            // The resolution of timestamps is the tick of the kernel.
            std::thread::sleep(Duration::from_millis(30));
            self.1(&self.2);
            Ok(())
        }
        fn info(&self) -> crate::manifest::KindInfo {
            self.0.info()
        }
    }
    for size in [10, 300_000, 3 << 20] {
        let dir = tempfile::tempdir().unwrap();
        let (tree, file) = (dir.path().join("tree"), dir.path().join("tree/f"));
        let store = Store::open(&dir.path().join("store")).unwrap();
        put(&file, &noise("x", size));
        let publish_as = |change: &(dyn Fn(&Path) + Sync), from_copy| {
            let mut source = Disturbed(Folder::open(&tree), change, file.clone(), from_copy);
            ingest_as(
                DEFAULT_CHUNKING,
                &mut source,
                Kind::Dataset,
                &store,
                &store,
                &Progress::default(),
            )
        };
        let publish = |change: &(dyn Fn(&Path) + Sync)| publish_as(change, false);
        let plain = publish(&|_| {}).unwrap().digest;
        let link = dir.path().join("snapshot");
        let linked = publish(&|file| std::fs::hard_link(file, &link).unwrap()).unwrap();
        assert_eq!(linked.digest, plain, "a new hard link");
        publish(&|file| {
            std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o600)).unwrap();
        })
        .unwrap();
        // The copy has what was there before somebody wrote to the file and restored its time.
        let written = |path: &Path| {
            let time = std::fs::metadata(path).unwrap().modified().unwrap();
            let file = File::options().write(true).open(path).unwrap();
            file.write_all_at(b"!", size as u64 - 1).unwrap();
            file.set_modified(time).unwrap();
        };
        let fault = publish_as(&written, true).unwrap_err();
        assert!(
            fault.message.contains("changed while it was read"),
            "{fault}"
        );
        let replaced = publish(&|path| {
            std::fs::remove_file(path).unwrap();
            put(path, &noise("y", size + 1));
        });
        let fault = replaced.unwrap_err();
        assert!(
            fault.message.contains("changed while it was read"),
            "{fault}"
        );
    }
}

#[test]
fn a_scratch_file_is_removed_after_it_was_read() {
    struct Pair(Vec<PathBuf>);
    impl Source for Pair {
        fn next(&mut self) -> Result<Option<SourceEntry>, Fault> {
            let Some(file) = self.0.pop() else {
                return Ok(None);
            };
            let path = file.file_name().unwrap().to_str().unwrap().parse()?;
            // The file that was read before this one is no longer on the disk.
            assert!(self.0.iter().all(|later| later.exists()));
            if path == "b".parse().unwrap() {
                assert!(
                    !file.with_file_name("a").exists(),
                    "both copies exist at the same time"
                );
            }
            let body = SourceBody::File {
                size: 300_000,
                content: Content::Scratch(file),
            };
            Ok(Some(SourceEntry {
                path,
                mode: 0o644,
                body,
                identity: None,
                attributes: Attributes::default(),
            }))
        }
        fn info(&self) -> crate::manifest::KindInfo {
            crate::manifest::KindInfo::Files
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let files = ["b", "a"].map(|name| dir.path().join(name));
    for file in &files {
        put(file, &noise(file.to_str().unwrap(), 300_000));
    }
    let store = Store::open(&dir.path().join("store")).unwrap();
    let mut source = Pair(files.to_vec());
    ingest_as(
        DEFAULT_CHUNKING,
        &mut source,
        Kind::Dataset,
        &store,
        &store,
        &Progress::default(),
    )
    .unwrap();
    assert!(files.iter().all(|file| !file.exists()));
}

/// Measures chunk sizes for the table in BENCHMARKS.md, on a system tree and on generated data:
/// `cargo test -p content --release --lib -- --ignored --nocapture chunk_sizes`.
#[test]
#[ignore = "measures the chunk sizes in BENCHMARKS.md, for minutes"]
fn chunk_sizes() {
    const KIB: u32 = 1 << 10;
    let of = |min, avg, max, whole, normalization| Chunking {
        min: min * KIB,
        avg: avg * KIB,
        max: max * KIB,
        whole: whole * KIB,
        normalization,
    };
    let candidates = [
        of(4, 16, 64, 64, 2),
        of(8, 24, 64, 256, 2),
        of(8, 28, 64, 64, 2),
        of(8, 28, 64, 256, 2),
        of(8, 32, 128, 64, 1),
        of(16, 32, 64, 256, 2),
        of(16, 64, 256, 256, 1),
        of(64, 256, 1024, 256, 1),
    ];
    let dir = tempfile::tempdir().unwrap();
    let sets = [
        model(dir.path()),
        layer(dir.path()),
        code(dir.path()),
        photos(dir.path()),
    ];
    println!(
        "| data | least, aim, most, whole; level | stored | chunks | a changed version adds | index |"
    );
    println!("|---|---|---|---|---|---|");
    for (name, old, new) in &sets {
        for chunking in candidates {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(dir.path()).unwrap();
            let first = publish(chunking, old, &store);
            let stored = store.stored_bytes().unwrap();
            let index = std::fs::metadata(dir.path().join("index.redb"))
                .unwrap()
                .len();
            publish(chunking, new, &store);
            let added = store.stored_bytes().unwrap() - stored;
            let Chunking {
                min,
                avg,
                max,
                whole,
                normalization,
            } = chunking;
            let (mb, chunks) = (
                first.root.totals.bytes as f64 / 1e6,
                first.root.totals.chunks,
            );
            println!(
                "| {name}, {mb:.0} MB | {}, {}, {}, {} KiB; {normalization} | {:.2} MB | {chunks} | {:.0} KB | {:.0} KB |",
                min / KIB,
                avg / KIB,
                max / KIB,
                whole / KIB,
                stored as f64 / 1e6,
                added as f64 / 1e3,
                index as f64 / 1e3,
            );
        }
    }
}

type Set = (&'static str, PathBuf, PathBuf);

/// Half-precision weights with a header. In the next version, one tensor in twelve has changed.
fn model(dir: &Path) -> Set {
    let tensor = |seed: &str| -> Vec<u8> {
        let mut bytes = noise(seed, 4 << 20);
        // The byte of the exponent has few different values.
        bytes
            .iter_mut()
            .skip(1)
            .step_by(2)
            .for_each(|byte| *byte = 0x20 + (byte.leading_zeros() as u8) * 4 + (*byte & 0x83));
        bytes
    };
    for (version, trained) in [("old", 99), ("new", 5)] {
        let mut file = format!("{{\"__metadata__\":{{\"version\":\"{version}\"}}}}").into_bytes();
        (0..12).for_each(|n| {
            file.extend(tensor(&if n == trained {
                format!("{n} {version}")
            } else {
                n.to_string()
            }));
        });
        put(
            &dir.join("model").join(version).join("model.safetensors"),
            &file,
        );
    }
    ("model", dir.join("model/old"), dir.join("model/new"))
}

/// The files below a directory, by name, up to `most` bytes in total.
fn files(root: &str, most: u64, wanted: impl Fn(&Path) -> bool) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut found, mut total, mut folders) = (BTreeMap::new(), 0, vec![PathBuf::from(root)]);
    while let Some(folder) = folders.pop() {
        let mut entries: Vec<PathBuf> = std::fs::read_dir(&folder)
            .into_iter()
            .flatten()
            .flatten()
            .map(|e| e.path())
            .collect();
        entries.sort();
        for path in entries {
            let meta = path.symlink_metadata().unwrap();
            if meta.is_dir() {
                folders.push(path);
            } else if meta.is_file() && wanted(&path) && total < most {
                total += meta.len();
                found.insert(
                    path.strip_prefix("/").unwrap().to_owned(),
                    std::fs::read(&path).unwrap(),
                );
            }
        }
    }
    found
}

/// Inserts twenty bytes in one of `every` files.
fn edit(files: &mut BTreeMap<PathBuf, Vec<u8>>, every: usize) {
    for bytes in files
        .values_mut()
        .step_by(every)
        .filter(|bytes| !bytes.is_empty())
    {
        let at =
            u32::from_le_bytes(Hash::of(bytes).0[..4].try_into().unwrap()) as usize % bytes.len();
        bytes.splice(at..at, *b"# edited, as we do.\n");
    }
}

/// A layer of installed files. In the next build, one file in fifty is slightly different.
fn layer(dir: &Path) -> Set {
    let mut tree = files("/usr/lib", 200_000_000, |_| true);
    for version in ["old", "new"] {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, bytes) in &tree {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, path, &bytes[..]).unwrap();
        }
        put(
            &dir.join("layer").join(version).join("layer.tar"),
            &tar.into_inner().unwrap(),
        );
        edit(&mut tree, 50);
    }
    ("image layer", dir.join("layer/old"), dir.join("layer/new"))
}

/// Python sources; one file in twenty is edited.
fn code(dir: &Path) -> Set {
    let mut tree = files("/usr/lib", 100_000_000, |path| {
        path.extension().is_some_and(|e| e == "py")
    });
    for version in ["old", "new"] {
        for (path, bytes) in &tree {
            put(&dir.join("code").join(version).join(path), bytes);
        }
        edit(&mut tree, 20);
    }
    ("code", dir.join("code/old"), dir.join("code/new"))
}

/// Photos as in workload W2; one in a hundred is new, one in twenty was moved.
fn photos(dir: &Path) -> Set {
    for version in ["old", "new"] {
        for i in 0..2000u32 {
            // Log-normal around 40 KB.
            let at = |n: usize| {
                f64::from(u32::from_le_bytes(
                    noise(&i.to_string(), 8)[n..n + 4].try_into().unwrap(),
                )) / 4_294_967_296.0
            };
            let normal =
                (-2.0 * (at(0) + 1e-9).ln()).sqrt() * (std::f64::consts::TAU * at(4)).cos();
            let size = (40_000.0 * (0.9 * normal).exp()) as usize;
            let (folder, seed) = match (version, i % 100) {
                ("new", 3) => ("line", format!("photo {i} new")),
                ("new", n) if n % 20 == 7 => ("moved", format!("photo {i}")),
                _ => ("line", format!("photo {i}")),
            };
            put(
                &dir.join("photos")
                    .join(version)
                    .join(folder)
                    .join(format!("day{}/img_{i:05}.jpg", i % 31)),
                &noise(&seed, size),
            );
        }
    }
    ("photos", dir.join("photos/old"), dir.join("photos/new"))
}

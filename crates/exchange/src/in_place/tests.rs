//! Publishing in place and reading back.
#![expect(
    clippy::disallowed_methods,
    reason = "a fixture need not survive a crash"
)]

use std::fs;

use rustix::io::Errno;
use serde_json::json;

use super::*;
use base::fault::Code;
use base::names::Kind;
use content::ingest::Progress;
use registry::image::{OCI_MANIFEST, Sha256};
use source::Source;
use source::files::FilesSource;
use source::image::{ImageOptions, ImageSource};

mod watch;

struct One(Mutex<Option<(Digest, HeldArtifact)>>);

#[async_trait]
impl Holdings for One {
    async fn held(&self, digest: Digest) -> Result<Option<HeldArtifact>, Fault> {
        Ok(self
            .0
            .lock()
            .as_ref()
            .filter(|(d, _)| *d == digest)
            .map(|(_, held)| held.clone()))
    }
}

struct Fixture {
    dir: tempfile::TempDir,
    origin: InPlaceReader,
    one: Arc<One>,
}

fn random(len: usize, seed: u8) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new()
        .update(&[seed])
        .finalize_xof()
        .fill(&mut out);
    out
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    fs::create_dir_all(&data).unwrap();
    let store = Store::open(&data.join("store")).unwrap();
    let places = Arc::new(ChunkIndex::open(&data).unwrap());
    let one = Arc::new(One(Mutex::default()));
    let origin = InPlaceReader::new(
        store,
        places,
        data.join("published"),
        one.clone(),
        None,
        32 << 20,
    );
    let folder = dir.path().join("set");
    fs::create_dir_all(folder.join("sub")).unwrap();
    fs::write(folder.join("a.bin"), random(300_000, 1)).unwrap();
    fs::write(folder.join("sub/b.bin"), random(5_000, 2)).unwrap();
    fs::write(folder.join("sub/empty"), b"").unwrap();
    Fixture { dir, origin, one }
}

impl Fixture {
    fn publish(&self, path: &Path, base: Option<&StorageLocation>) -> InPlace {
        self.publish_source(Kind::Dataset, &mut FilesSource::open(path).unwrap(), base)
    }

    fn publish_source(
        &self,
        kind: Kind,
        source: &mut dyn Source,
        base: Option<&StorageLocation>,
    ) -> InPlace {
        let published = self
            .origin
            .publish(kind, source, base, &Progress::default())
            .unwrap();
        let held = HeldArtifact {
            root: published.ingested.root.clone(),
            places: vec![published.place.clone()],
        };
        *self.one.0.lock() = Some((published.ingested.digest, held));
        published
    }

    /// Every chunk of the artifact, through the library, hashed.
    fn read_all(&self, digest: Digest) -> Result<u64, Fault> {
        let (_, held) = self.one.0.lock().clone().unwrap();
        let opened = Opened::new(digest, held.root.clone(), &self.origin.inner.store).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let mut bytes = 0;
        for step in Walk::new(&held.root, &self.origin.inner.store) {
            if let Step::Chunk(chunk, _) = step.unwrap() {
                let frames = self.origin.read(&opened, &[chunk], runtime.handle())?;
                bytes += Frame::parse(frames.concat().into())
                    .unwrap()
                    .verify(chunk.id, chunk.len)
                    .unwrap()
                    .bytes
                    .len() as u64;
            }
        }
        Ok(bytes)
    }
}

#[test]
fn a_folder_is_served_from_its_location() {
    let f = fixture();
    let folder = f.dir.path().join("set").canonicalize().unwrap();
    let base = StorageLocation::Folder {
        path: folder.clone(),
    };
    let published = f.publish(&folder, Some(&base));
    assert_eq!(published.place, base);
    assert_eq!(
        fs::read_dir(f.dir.path().join("data/published"))
            .unwrap()
            .count(),
        0,
        "nothing is copied"
    );
    assert_eq!(f.read_all(published.ingested.digest).unwrap(), 305_000);
}

#[test]
fn content_that_exists_nowhere_else_is_stored() {
    let f = fixture();
    let folder = f.dir.path().join("set").canonicalize().unwrap();
    let published = f.publish(&folder, None);
    fs::remove_dir_all(&folder).unwrap();
    assert_eq!(f.read_all(published.ingested.digest).unwrap(), 305_000);
    f.origin.clean(&[published.ingested.digest]).unwrap();
    assert_eq!(f.read_all(published.ingested.digest).unwrap(), 305_000);
    f.origin.clean(&[]).unwrap();
    assert_eq!(
        fs::read_dir(f.dir.path().join("data/published"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn a_changed_file_is_noticed_with_its_path() {
    let f = fixture();
    let folder = f.dir.path().join("set").canonicalize().unwrap();
    let published = f.publish(
        &folder,
        Some(&StorageLocation::Folder {
            path: folder.clone(),
        }),
    );
    // The same size, another content; then shorter; then gone.
    let mut bytes = random(300_000, 1);
    bytes[200_000] ^= 1;
    fs::write(folder.join("a.bin"), &bytes).unwrap();
    let changed = |path: &str| {
        let fault = f.read_all(published.ingested.digest).unwrap_err();
        assert_eq!(
            (fault.code, fault.reason, fault.retry),
            (Code::Integrity, Reason::Integrity, Retry::Never),
            "{fault}"
        );
        assert!(fault.message.contains(path), "{fault}");
    };
    changed("set/a.bin");
    fs::write(folder.join("a.bin"), &bytes[..100]).unwrap();
    changed("set/a.bin");
    fs::remove_file(folder.join("a.bin")).unwrap();
    changed("set/a.bin");
    // A folder where the file was; then a file where its folder was.
    fs::create_dir(folder.join("a.bin")).unwrap();
    changed("set/a.bin");
    fs::remove_dir(folder.join("a.bin")).unwrap();
    fs::write(folder.join("a.bin"), random(300_000, 1)).unwrap();
    fs::remove_dir_all(folder.join("sub")).unwrap();
    fs::write(folder.join("sub"), b"").unwrap();
    changed("set/sub/b.bin");
}

#[test]
fn a_temporary_read_error_is_not_a_change() {
    let path = Path::new("/nas/set/a.bin");
    let of = |errno: Errno| unreadable(path, Fault::io("open a.bin", &errno.into()));
    for errno in [
        Errno::IO,
        Errno::TIMEDOUT,
        Errno::STALE,
        Errno::ACCESS,
        Errno::CONNRESET,
        Errno::MFILE,
        Errno::HOSTDOWN,
    ] {
        let fault = of(errno);
        assert_eq!(
            (fault.reason, fault.retry),
            (Reason::WaitingForSource, Retry::Backoff),
            "{fault}"
        );
        assert!(
            fault
                .message
                .starts_with("/nas/set/a.bin cannot be read now: open a.bin: "),
            "{fault}"
        );
    }
    for fault in [
        of(Errno::NOENT),
        of(Errno::NOTDIR),
        unreadable(
            path,
            Fault::integrity("it is shorter than its recorded size"),
        ),
    ] {
        assert_eq!(
            (fault.reason, fault.retry),
            (Reason::Integrity, Retry::Never),
            "{fault}"
        );
        assert!(
            fault
                .message
                .starts_with("/nas/set/a.bin changed after it was published: "),
            "{fault}"
        );
    }
}

#[test]
fn a_request_waits_for_an_unavailable_folder() {
    let f = fixture();
    let folder = f.dir.path().join("set").canonicalize().unwrap();
    let published = f.publish(
        &folder,
        Some(&StorageLocation::Folder {
            path: folder.clone(),
        }),
    );
    let away = f.dir.path().join("away");
    durable::rename_noreplace(&folder, &away).unwrap();
    let fault = f.read_all(published.ingested.digest).unwrap_err();
    assert_eq!(
        (fault.reason, fault.retry),
        (Reason::WaitingForSource, Retry::Backoff),
        "{fault}"
    );
    durable::rename_noreplace(&away, &folder).unwrap();
    assert_eq!(f.read_all(published.ingested.digest).unwrap(), 305_000);
}

#[test]
fn lost_notes_are_made_anew() {
    let f = fixture();
    let folder = f.dir.path().join("set").canonicalize().unwrap();
    let published = f.publish(
        &folder,
        Some(&StorageLocation::Folder {
            path: folder.clone(),
        }),
    );
    f.origin
        .inner
        .chunk_index
        .remove_digest(published.ingested.digest)
        .unwrap();
    assert_eq!(f.read_all(published.ingested.digest).unwrap(), 305_000);
}

/// An OCI layout of a small image. Its index is not the one that the artifact has.
fn layout(folder: &Path) {
    let put = |media_type: &str, bytes: &[u8]| {
        let digest = Sha256::of(bytes);
        let path = folder.join(digest.layout_path());
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    };
    let layer = random(50_000, 3);
    let config = json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [Sha256::of(&layer)] } });
    let config = put(
        "application/vnd.oci.image.config.v1+json",
        config.to_string().as_bytes(),
    );
    let layers = [put("application/vnd.oci.image.layer.v1.tar", &layer)];
    let manifest = json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers });
    let top = put(OCI_MANIFEST, manifest.to_string().as_bytes());
    fs::write(
        folder.join("index.json"),
        json!({ "schemaVersion": 2, "manifests": [top] }).to_string(),
    )
    .unwrap();
    fs::write(
        folder.join("oci-layout"),
        br#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
}

#[test]
fn the_layout_of_a_received_image_is_created_on_request() {
    let f = fixture();
    let folder = f.dir.path().canonicalize().unwrap().join("images");
    layout(&folder);
    let base = StorageLocation::Folder {
        path: folder.clone(),
    };
    let published = f.publish_source(
        Kind::Image,
        &mut ImageSource::open_layout(&folder, &ImageOptions::default()).unwrap(),
        Some(&base),
    );
    let (digest, bytes) = (
        published.ingested.digest,
        published.ingested.root.totals.bytes,
    );
    assert_eq!(f.read_all(digest).unwrap(), bytes);
    // As it is where it arrived: its blobs lie in a folder of layouts, and nothing was kept.
    let forget = |live: &[Digest]| {
        f.origin.clean(live).unwrap();
        f.origin.inner.chunk_index.remove_digest(digest).unwrap();
        *f.origin.inner.indexed.lock() = ExpiringCache::default();
    };
    forget(&[]);
    assert_eq!(f.read_all(digest).unwrap(), bytes);
    let kept = f.origin.kept_folder(digest);
    assert_eq!(
        fs::read_dir(&kept).unwrap().count(),
        2,
        "the blobs are not copied"
    );
    // What was kept stays as long as the artifact, and is put right if it was damaged.
    fs::write(kept.join("index.json"), b"{}").unwrap();
    forget(&[digest]);
    assert_eq!(f.read_all(digest).unwrap(), bytes);
}

/// Two artifacts, of which the first cannot be looked up until the test allows it.
struct FirstHangs {
    held: [(Digest, HeldArtifact); 2],
    asked: std::sync::mpsc::SyncSender<()>,
    allowed: tokio::sync::Semaphore,
}

#[async_trait]
impl Holdings for FirstHangs {
    async fn held(&self, digest: Digest) -> Result<Option<HeldArtifact>, Fault> {
        let [first, second] = &self.held;
        if digest == first.0 {
            self.asked.send(()).unwrap();
            self.allowed.acquire().await.unwrap().forget();
            return Ok(Some(first.1.clone()));
        }
        Ok(Some(second.1.clone()).filter(|_| digest == second.0))
    }
}

#[test]
fn a_slow_disk_under_one_artifact_does_not_delay_the_readers_of_another() {
    let f = fixture();
    let other = f.dir.path().join("other");
    fs::create_dir_all(&other).unwrap();
    fs::write(other.join("c.bin"), random(100_000, 3)).unwrap();
    let held = [f.dir.path().join("set"), other].map(|folder| {
        let path = folder.canonicalize().unwrap();
        let published = f.publish(&path, Some(&StorageLocation::Folder { path: path.clone() }));
        let digest = published.ingested.digest;
        // The rows of both have to be recreated.
        f.origin.inner.chunk_index.remove_digest(digest).unwrap();
        (digest, f.one.0.lock().clone().unwrap().1)
    });
    let (asked, was_asked) = std::sync::mpsc::sync_channel(1);
    let holdings = Arc::new(FirstHangs {
        held: held.clone(),
        asked,
        allowed: tokio::sync::Semaphore::new(0),
    });
    let (inner, kept) = (&f.origin.inner, f.origin.inner.kept.clone());
    let (store, index) = (inner.store.clone(), inner.chunk_index.clone());
    let origin = InPlaceReader::new(store, index, kept, holdings.clone(), None, 32 << 20);
    // Reads the first chunk of an artifact on a thread of its own.
    let read = |(digest, held): (Digest, HeldArtifact)| {
        let (origin, (done, is_done)) = (origin.clone(), std::sync::mpsc::sync_channel(1));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .build()
                .unwrap();
            let store = &origin.inner.store;
            let opened = Opened::new(digest, held.root.clone(), store).unwrap();
            let chunk = Walk::new(&held.root, store).find_map(|step| match step.unwrap() {
                Step::Chunk(chunk, _) => Some(chunk),
                Step::Entry { .. } => None,
            });
            let frames = origin.read(&opened, &[chunk.unwrap()], runtime.handle());
            done.send(frames.is_ok()).unwrap();
        });
        is_done
    };
    let [first, second] = held;
    let first = read(first);
    was_asked.recv().unwrap();
    let second = read(second).recv_timeout(Duration::from_secs(60));
    assert_eq!(second, Ok(true), "it does not wait for the first");
    holdings.allowed.add_permits(1);
    assert_eq!(first.recv(), Ok(true));
}

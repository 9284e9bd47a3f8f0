//! Publishing in place and reading back.
#![expect(clippy::disallowed_methods, reason = "a fixture need not survive a crash")]

use std::fs;

use super::*;
use crate::fault::Code;
use crate::ingest::Progress;
use crate::names::Kind;
use crate::source::files::FilesSource;

mod watch;

struct One(Mutex<Option<(Digest, Held)>>);

#[async_trait]
impl Holdings for One {
    async fn held(&self, digest: Digest) -> Result<Option<Held>, Fault> {
        Ok(self.0.lock().as_ref().filter(|(d, _)| *d == digest).map(|(_, held)| held.clone()))
    }
}

struct Fixture {
    dir: tempfile::TempDir,
    origin: Origin,
    one: Arc<One>,
}

fn random(len: usize, seed: u8) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut out);
    out
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    fs::create_dir_all(&data).unwrap();
    let store = Store::open(&data.join("store")).unwrap();
    let places = Arc::new(Places::open(&data).unwrap());
    let one = Arc::new(One(Mutex::default()));
    let origin = Origin::new(store, places, data.join("published"), one.clone(), None);
    let folder = dir.path().join("set");
    fs::create_dir_all(folder.join("sub")).unwrap();
    fs::write(folder.join("a.bin"), random(300_000, 1)).unwrap();
    fs::write(folder.join("sub/b.bin"), random(5_000, 2)).unwrap();
    fs::write(folder.join("sub/empty"), b"").unwrap();
    Fixture { dir, origin, one }
}

impl Fixture {
    fn publish(&self, path: &Path, base: Option<&Place>) -> InPlace {
        let mut source = FilesSource::open(path).unwrap();
        let published = self.origin.publish(Kind::Dataset, &mut source, base, &Progress::default()).unwrap();
        let held = Held { root: published.ingested.root.clone(), places: vec![published.place.clone()] };
        *self.one.0.lock() = Some((published.ingested.digest, held));
        published
    }

    /// Every chunk of the artifact, through the library, hashed.
    fn read_all(&self, digest: Digest) -> Result<u64, Fault> {
        let (_, held) = self.one.0.lock().clone().unwrap();
        let opened = Opened::new(digest, held.root.clone(), &self.origin.inner.store).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut bytes = 0;
        for step in Walk::new(&held.root, &self.origin.inner.store) {
            if let Step::Chunk(chunk, _) = step.unwrap() {
                let frames = self.origin.read(&opened, &held, &[chunk], runtime.handle())?;
                bytes += Frame::parse(frames.concat().into()).unwrap().verify(chunk.id, chunk.len).unwrap().bytes.len() as u64;
            }
        }
        Ok(bytes)
    }
}

#[test]
fn a_folder_is_given_out_from_where_it_lies() {
    let f = fixture();
    let folder = f.dir.path().join("set").canonicalize().unwrap();
    let base = Place::Folder { path: folder.clone() };
    let published = f.publish(&folder, Some(&base));
    assert_eq!(published.place, base);
    assert_eq!(fs::read_dir(f.dir.path().join("data/published")).unwrap().count(), 0, "nothing is copied");
    assert_eq!(f.read_all(published.ingested.digest).unwrap(), 305_000);
}

#[test]
fn what_lies_nowhere_is_kept() {
    let f = fixture();
    let folder = f.dir.path().join("set").canonicalize().unwrap();
    let published = f.publish(&folder, None);
    fs::remove_dir_all(&folder).unwrap();
    assert_eq!(f.read_all(published.ingested.digest).unwrap(), 305_000);
    f.origin.clean(&[published.ingested.digest]).unwrap();
    assert_eq!(f.read_all(published.ingested.digest).unwrap(), 305_000);
    f.origin.clean(&[]).unwrap();
    assert_eq!(fs::read_dir(f.dir.path().join("data/published")).unwrap().count(), 0);
}

#[test]
fn a_changed_file_is_noticed_with_its_path() {
    let f = fixture();
    let folder = f.dir.path().join("set").canonicalize().unwrap();
    let published = f.publish(&folder, Some(&Place::Folder { path: folder.clone() }));
    // The same size, another content; then shorter; then gone.
    let mut bytes = random(300_000, 1);
    bytes[200_000] ^= 1;
    fs::write(folder.join("a.bin"), &bytes).unwrap();
    for step in 0..3 {
        let fault = f.read_all(published.ingested.digest).unwrap_err();
        assert_eq!((fault.code, fault.reason, fault.retry), (Code::Integrity, Reason::Integrity, Retry::Never), "{fault}");
        assert!(fault.message.contains("set/a.bin"), "{fault}");
        match step {
            0 => fs::write(folder.join("a.bin"), &bytes[..100]).unwrap(),
            _ => drop(fs::remove_file(folder.join("a.bin"))),
        }
    }
}

#[test]
fn a_folder_that_is_away_is_waited_for() {
    let f = fixture();
    let folder = f.dir.path().join("set").canonicalize().unwrap();
    let published = f.publish(&folder, Some(&Place::Folder { path: folder.clone() }));
    let away = f.dir.path().join("away");
    durable::rename_noreplace(&folder, &away).unwrap();
    let fault = f.read_all(published.ingested.digest).unwrap_err();
    assert_eq!((fault.reason, fault.retry), (Reason::WaitingForSource, Retry::Backoff), "{fault}");
    durable::rename_noreplace(&away, &folder).unwrap();
    assert_eq!(f.read_all(published.ingested.digest).unwrap(), 305_000);
}

#[test]
fn lost_notes_are_made_anew() {
    let f = fixture();
    let folder = f.dir.path().join("set").canonicalize().unwrap();
    let published = f.publish(&folder, Some(&Place::Folder { path: folder.clone() }));
    f.origin.inner.places.remove_digest(published.ingested.digest).unwrap();
    assert_eq!(f.read_all(published.ingested.digest).unwrap(), 305_000);
}

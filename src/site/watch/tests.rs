//! Published content on a filesystem that hangs, and on another one.
#![expect(
    clippy::disallowed_methods,
    reason = "a fixture need not survive a crash"
)]

use std::fs;
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};

use tokio::sync::oneshot;

use super::*;
use base::blocking::blocking;
use base::limits::MOUNT_THREADS_MAX;
use base::names::Kind;
use content::ingest::Progress;
use content::store::Store;
use exchange::chunk_index::ChunkIndex;
use source::files::FilesSource;
use state::Offer;

/// On a filesystem of its own, whose threads the test occupies.
const HANGING: &str = "/proc/1/published";
/// The test fails after this time; it does not wait for it.
const LIMIT: Duration = Duration::from_secs(60);

struct Fixture {
    dir: tempfile::TempDir,
    watch: Watch,
    requests: mpsc::Sender<CheckRequest>,
}

impl Fixture {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().to_owned();
        let catalogue = Catalogue::open(&data).await.unwrap();
        let (store, index) = blocking(move || {
            let store = Store::open(&data.join("store"))?;
            Ok((store, ChunkIndex::open(&data)?))
        })
        .await
        .unwrap();
        let reader = InPlaceReader::new(
            store,
            Arc::new(index),
            dir.path().join("published"),
            Arc::new(catalogue.clone()),
            None,
            32 << 20,
        );
        let (requests, receiver) = mpsc::channel(16);
        let watch = Watch {
            catalogue,
            reader,
            check_every: Duration::from_millis(10),
            last_checks: Arc::default(),
            requests: Arc::new(tokio::sync::Mutex::new(receiver)),
            requested: Arc::default(),
            stop: CancellationToken::new(),
        };
        Self {
            dir,
            watch,
            requests,
        }
    }

    /// Publishes a folder with one file of this content. The catalogue then says that it is at
    /// `place`, if that is given.
    async fn publish(
        &self,
        artifact: &str,
        content: &str,
        place: Option<&str>,
    ) -> (PathBuf, Digest) {
        let artifact: ArtifactRef = artifact.parse().unwrap();
        let folder = self
            .dir
            .path()
            .canonicalize()
            .unwrap()
            .join(artifact.name());
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("file"), content).unwrap();
        let (reader, path) = (self.watch.reader.clone(), folder.clone());
        let published = blocking(move || {
            let mut source = FilesSource::open(&path)?;
            let base = StorageLocation::Folder { path };
            reader.publish(
                Kind::Dataset,
                &mut source,
                Some(&base),
                &Progress::default(),
            )
        });
        let published = published.await.unwrap();
        let place = place.map_or(published.place, |path| StorageLocation::Folder {
            path: path.into(),
        });
        let (catalogue, root) = (&self.watch.catalogue, &published.ingested.root);
        catalogue.add_artifact(&artifact, root, None).await.unwrap();
        let at_ms = base::clock::now_ms();
        catalogue
            .set_published(&artifact, &place, "", at_ms, &Offer::default())
            .await
            .unwrap();
        (folder, published.ingested.digest)
    }

    async fn wait_changed(&self, artifact: &str, expected: bool) {
        let artifact = artifact.parse().unwrap();
        let catalogue = &self.watch.catalogue;
        let wait = async {
            while catalogue
                .artifact(&artifact)
                .await
                .unwrap()
                .changed
                .is_some()
                != expected
            {
                tokio::task::yield_now().await;
            }
        };
        let waited = tokio::time::timeout(LIMIT, wait).await;
        waited.expect("the check of the other filesystem does not end");
    }

    async fn request(&self, digest: Digest) -> oneshot::Receiver<Option<String>> {
        let (answer, answered) = oneshot::channel();
        let request = CheckRequest { digest, answer };
        self.requests.send(request).await.unwrap();
        answered
    }
}

/// Occupies all threads of the filesystem of [`HANGING`] until the sender is dropped.
async fn hang() -> SyncSender<()> {
    let (release, held) = sync_channel::<()>(0);
    let held = Arc::new(Mutex::new(held));
    let (started, mut all_started) = mpsc::channel(MOUNT_THREADS_MAX);
    for _ in 0..MOUNT_THREADS_MAX {
        let (held, started) = (held.clone(), started.clone());
        tokio::spawn(blocking_at(Path::new(HANGING), move || {
            started.try_send(()).unwrap();
            let _ = held.lock().recv();
            Ok(())
        }));
    }
    for _ in 0..MOUNT_THREADS_MAX {
        all_started.recv().await.unwrap();
    }
    release
}

#[tokio::test]
async fn a_filesystem_that_hangs_delays_only_the_checks_of_its_own_content() {
    let f = Fixture::new().await;
    // In this order in the catalogue.
    let (_, hanging) = f.publish("dataset/a:1", "first", Some(HANGING)).await;
    let (folder, other) = f.publish("dataset/b:1", "second", None).await;
    assert_ne!(mount_point(Path::new(HANGING)), mount_point(&folder));
    let release = hang().await;
    let workers = Workers::new(f.watch.stop.clone());
    f.watch.start_workers(&workers);

    // More than one round.
    fs::write(folder.join("file"), "another length").unwrap();
    f.wait_changed("dataset/b:1", true).await;
    fs::write(folder.join("file"), "second").unwrap();
    f.wait_changed("dataset/b:1", false).await;

    // A transfer that waits for the hanging content does not delay the answer to another.
    let mut waiting = f.request(hanging).await;
    fs::write(folder.join("file"), "another length").unwrap();
    f.wait_changed("dataset/b:1", true).await;
    let answer = f.request(other).await;
    let answer = tokio::time::timeout(LIMIT, answer).await;
    let how = answer.expect("no answer").unwrap().unwrap();
    assert!(how.contains("file changed after it was published"), "{how}");
    assert!(waiting.try_recv().is_err(), "its filesystem hangs");

    drop(release);
    assert_eq!(waiting.await.unwrap(), None, "its folder is not available");
    f.watch.stop.cancel();
}

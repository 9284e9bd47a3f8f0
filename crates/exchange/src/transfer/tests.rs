//! A runner over real state and a real files sink, whose calls the test holds up.

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Semaphore;

use super::*;
use crate::chunk_index::ChunkIndex;
use base::fault::Reason;
use base::limits::PUSHED_MANIFESTS_MAX;
use base::names::RelPath;
use base::workers::Workers;
use content::chunk::DEFAULT_CHUNKING;
use content::manifest::{FileInfo, KindInfo, Totals};
use content::store::Store;
use model::protocol::PushedManifest;
use sink::files::FilesSink;
use sink::{Committed, StorageLocation, Threads, Verification, images, labels};
use transport::Transport;
use transport::identity::{CertificateRequest, HubIdentity};
use transport::testing::Hub;

/// A files sink whose calls wait for the test, and are counted.
struct Gated {
    sink: FilesSink,
    commits: AtomicU64,
    /// Lets so many commits go on.
    commit: Semaphore,
    looks: AtomicU64,
    /// Lets so many looks at what is there go on.
    look: Semaphore,
    wait_reason: Mutex<Option<Fault>>,
}

async fn pass(gate: &Semaphore, count: &AtomicU64) {
    count.fetch_add(1, Ordering::SeqCst);
    gate.acquire().await.unwrap().forget();
}

#[async_trait]
impl Sink for Gated {
    fn staging_root(&self) -> &Path {
        self.sink.staging_root()
    }

    fn threads(&self) -> &Threads {
        self.sink.threads()
    }

    fn wait_reason(&self) -> Option<Fault> {
        self.wait_reason.lock().clone()
    }

    fn place_of(&self, artifact: &ArtifactRef) -> Option<StorageLocation> {
        self.sink.place_of(artifact)
    }

    async fn check(&self, incoming: &Incoming) -> Result<(), Fault> {
        self.sink.check(incoming).await
    }

    async fn holds(
        &self,
        incoming: &Incoming,
        path: &RelPath,
        file: &FileInfo,
    ) -> Result<bool, Fault> {
        self.sink.holds(incoming, path, file).await
    }

    async fn commit(&self, incoming: &Incoming, staged: &Path) -> Result<Committed, Fault> {
        pass(&self.commit, &self.commits).await;
        self.sink.commit(incoming, staged).await
    }

    async fn activate(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        self.sink.activate(artifact).await
    }

    async fn read_at(
        &self,
        place: &StorageLocation,
        path: &RelPath,
        offset: u64,
        len: u32,
    ) -> Result<bytes::Bytes, Fault> {
        self.sink.read_at(place, path, offset, len).await
    }

    async fn exists_at_target(&self, incoming: &Incoming) -> Result<bool, Fault> {
        if let Some(fault) = self.wait_reason() {
            return Err(fault);
        }
        pass(&self.look, &self.looks).await;
        self.sink.exists_at_target(incoming).await
    }

    async fn verify(
        &self,
        incoming: &Incoming,
        place: &StorageLocation,
        verification: &Verification,
    ) -> Result<Vec<String>, Fault> {
        self.sink.verify(incoming, place, verification).await
    }

    async fn remove(
        &self,
        artifact: &ArtifactRef,
        info: Option<&KindInfo>,
    ) -> Result<Option<String>, Fault> {
        self.sink.remove(artifact, info).await
    }

    async fn probe(&self) -> Result<String, Fault> {
        self.sink.probe().await
    }
}

struct Bench {
    runner: Runner,
    sink: Arc<Gated>,
    link: watch::Sender<Option<Link>>,
    _identity: watch::Sender<Arc<SiteIdentity>>,
    _dir: tempfile::TempDir,
}

const SITE: &str = "chengdu";

impl Bench {
    async fn new() -> Self {
        Self::with(false).await
    }

    /// `lost`: its chunk index was there before, and is gone.
    async fn with(lost: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        base::durable::create_dir_all(&data).unwrap();
        let hub =
            HubIdentity::open_or_create(&dir.path().join("hub"), &"hub".parse().unwrap()).unwrap();
        let request = CertificateRequest::new().unwrap();
        let cert = hub
            .issue_for(&SITE.parse().unwrap(), request.csr_der())
            .unwrap();
        let identity = request.complete(&cert, hub.ca_der()).unwrap();
        let sink = Arc::new(Gated {
            sink: FilesSink::open(None, &data).unwrap(),
            commits: AtomicU64::new(0),
            commit: Semaphore::new(0),
            looks: AtomicU64::new(0),
            look: Semaphore::new(0),
            wait_reason: Mutex::default(),
        });
        let images = images::open(None, &data).unwrap();
        let sinks = Sinks {
            files: sink.clone(),
            labels: labels::open(None, &data).unwrap(),
            images: images.clone(),
        };
        let shared = AssemblyContext {
            trusted_for: Duration::from_secs(3600),
            store: Store::open(&data.join("store")).unwrap(),
            chunk_index: Arc::new(ChunkIndex::open_expected(&data, lost).unwrap()),
            memory: Arc::new(Memory::new(64 << 20)),
            images,
        };
        let (identity, identity_watch) = watch::channel(Arc::new(identity));
        let (link, link_watch) = watch::channel(None);
        let (check_requests, _) = mpsc::channel(1);
        let catalogue = Catalogue::open(&data).await.unwrap();
        let runner = Runner::new(
            catalogue,
            shared,
            sinks,
            identity_watch,
            link_watch,
            check_requests,
            CancellationToken::new(),
        );
        Self {
            runner,
            sink,
            link,
            _identity: identity,
            _dir: dir,
        }
    }

    fn catalogue(&self) -> &Catalogue {
        &self.runner.inner.catalogue
    }

    async fn apply(&self, wanted: &[Desired]) {
        let unapplied = self.runner.apply(wanted.iter()).await;
        let is_wanted = |id: &TransferId| wanted.iter().any(|wanted| wanted.id == *id);
        self.runner.give_up(is_wanted).await.unwrap();
        assert!(unapplied.fault.is_none(), "{unapplied:?}");
    }

    async fn row(&self, id: &str) -> TransferRow {
        self.catalogue().transfer(id).await.unwrap()
    }

    /// Waits until the row is as it should be.
    async fn wait(&self, id: &str, what: &str, is: impl Fn(&TransferRow) -> bool) -> TransferRow {
        for _ in 0..3000 {
            let row = self.row(id).await;
            if is(&row) {
                return row;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        unreachable!("never {what}: {:#?}", self.row(id).await);
    }

    /// A transfer that was committing when the daemon ended.
    async fn committing(&self, id: &str) {
        let root = root();
        self.catalogue()
            .add_artifact(&"dataset/d:v1".parse().unwrap(), &root, None)
            .await
            .unwrap();
        let first = desired(id, 0, Want::Run);
        let row = self
            .runner
            .adopt(&first, &SITE.parse().unwrap())
            .await
            .unwrap();
        self.catalogue()
            .update_transfer(id, 0, State::Committing, &row.body)
            .await
            .unwrap();
        self.runner.start().await.unwrap();
    }

    fn staged(&self, id: &str) -> PathBuf {
        self.sink.staging_root().join(id)
    }

    async fn stop(&self) {
        self.runner.inner.stop.cancel();
        self.sink.commit.add_permits(100);
        self.sink.look.add_permits(100);
        self.runner.drained().await;
    }
}

async fn until(what: &str, is: impl Fn() -> bool) {
    for _ in 0..3000 {
        if is() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    unreachable!("never {what}");
}

/// Of a dataset without a file.
fn root() -> Root {
    Root {
        format: 1,
        kind: Kind::Dataset,
        info: KindInfo::Files,
        chunking: DEFAULT_CHUNKING,
        totals: Totals::default(),
        depth: 0,
        pages: Vec::new(),
    }
}

fn desired(id: &str, generation: i64, want: Want) -> Desired {
    Desired {
        id: id.parse().unwrap(),
        delivery: "d-1".parse().unwrap(),
        artifact: "dataset/d:v1".parse().unwrap(),
        digest: root().digest(),
        want,
        generation,
        total: 0,
        created_ms: 1,
        after: Vec::new(),
        lineage: None,
        known: Default::default(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_begins_only_once_the_one_before_has_ended() {
    let bench = Bench::new().await;
    bench.committing("t-1").await;
    until("it commits", || {
        bench.sink.commits.load(Ordering::SeqCst) == 1
    })
    .await;
    // Cancelled and begun again before the site heard of either. What the second waits for is
    // shown.
    *bench.sink.wait_reason.lock() =
        Some(Fault::unreachable("the NAS of the test does not answer"));
    bench.apply(&[desired("t-1", 1, Want::Run)]).await;
    let waits = bench
        .wait("t-1", "a reason", |row| {
            row.generation == 1 && row.body.reason.is_some()
        })
        .await;
    assert_eq!(
        waits.body.reason,
        Some(Reason::SinkUnavailable),
        "{waits:#?}"
    );
    assert_eq!(
        bench.sink.commits.load(Ordering::SeqCst),
        1,
        "the second has not begun"
    );
    *bench.sink.wait_reason.lock() = None;
    bench.sink.commit.add_permits(1);
    // The first ends. The second finds the transfer committing, and asks the sink whether it is
    // committed.
    until("the second begins", || {
        bench.sink.commits.load(Ordering::SeqCst) == 2
    })
    .await;
    bench.sink.commit.add_permits(1);
    bench
        .wait("t-1", "begun again", |row| {
            row.state == State::Planning && row.body.reason == Some(Reason::HubUnreachable)
        })
        .await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_done_is_not_cancelled_because_its_sink_does_not_answer() {
    let bench = Bench::new().await;
    let (artifact, root) = ("dataset/d:v1".parse().unwrap(), root());
    bench
        .catalogue()
        .add_artifact(&artifact, &root, None)
        .await
        .unwrap();
    bench
        .catalogue()
        .set_place(&artifact, bench.sink.place_of(&artifact).as_ref(), None)
        .await
        .unwrap();
    bench
        .runner
        .adopt(&desired("t-1", 0, Want::Run), &SITE.parse().unwrap())
        .await
        .unwrap();
    let body =
        serde_json::from_str(r#"{"receipt":{"statement":"s","signature":"x","certificate":"y"}}"#)
            .unwrap();
    bench
        .catalogue()
        .update_transfer("t-1", 0, State::Done, &body)
        .await
        .unwrap();
    bench.runner.start().await.unwrap();
    *bench.sink.wait_reason.lock() =
        Some(Fault::unreachable("the NAS of the test does not answer"));
    // Begun again and cancelled before the site heard of either.
    bench.apply(&[desired("t-1", 1, Want::Cancel)]).await;
    let row = bench
        .wait("t-1", "ended", |row| {
            row.generation == 1 && row.state.is_final()
        })
        .await;
    assert!(
        row.state == State::Done && row.body.receipt.is_some() && row.body.reason.is_none(),
        "{row:#?}"
    );
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_that_comes_while_an_earlier_one_ends_the_task_counts() {
    let bench = Bench::new().await;
    bench.committing("t-1").await;
    until("it commits", || {
        bench.sink.commits.load(Ordering::SeqCst) == 1
    })
    .await;
    for want in [Want::Pause, Want::Run, Want::Pause] {
        bench.apply(&[desired("t-1", 0, want)]).await;
    }
    bench.sink.commit.add_permits(1);
    bench
        .wait("t-1", "paused", |row| row.state == State::Paused)
        .await;
    until("no task runs", || {
        bench.runner.task_of(&"t-1".parse().unwrap(), 0).is_none()
    })
    .await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_waits_for_its_turn_is_cancelled_at_once() {
    let hub = Hub::start();
    let (site, _hub) = hub.connect(Transport::Quic).await;
    let bench = Bench::new().await;
    bench.link.send_replace(Some(site));
    let artifact = "dataset/d:v1".parse().unwrap();
    bench
        .catalogue()
        .add_artifact(&artifact, &root(), None)
        .await
        .unwrap();
    bench.apply(&[desired("t-1", 0, Want::Run)]).await;
    // While it looks whether it is there already, somebody else asks to work on the artifact: his
    // turn comes before the commit.
    until("it looks", || bench.sink.looks.load(Ordering::SeqCst) == 1).await;
    let mut turn = std::pin::pin!(bench.runner.alone_with(&artifact));
    assert!(futures::poll!(&mut turn).is_pending());
    bench.sink.look.add_permits(1);
    let turn = turn.await;
    bench
        .wait("t-1", "staged", |row| row.state == State::Committing)
        .await;
    assert!(bench.staged("t-1").is_dir());
    bench.apply(&[desired("t-1", 0, Want::Cancel)]).await;
    bench
        .wait("t-1", "cancelled", |row| row.state == State::Cancelled)
        .await;
    assert!(!bench.staged("t-1").exists());
    drop(turn);
    assert_eq!(
        bench.sink.commits.load(Ordering::SeqCst),
        0,
        "nothing was committed"
    );
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_is_resumed_waits_for_its_turn_as_well() {
    let bench = Bench::new().await;
    let turn = bench
        .runner
        .alone_with(&"dataset/d:v1".parse().unwrap())
        .await;
    *bench.sink.wait_reason.lock() =
        Some(Fault::unreachable("the NAS of the test does not answer"));
    bench.committing("t-1").await;
    bench
        .wait("t-1", "a reason", |row| {
            row.body.reason == Some(Reason::SinkUnavailable)
        })
        .await;
    assert_eq!(
        bench.sink.commits.load(Ordering::SeqCst),
        0,
        "somebody else works on the artifact"
    );
    drop(turn);
    until("it commits", || {
        bench.sink.commits.load(Ordering::SeqCst) == 1
    })
    .await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_that_the_hub_does_not_know_any_more_leaves_nothing() {
    let bench = Bench::new().await;
    let workers = Workers::default();
    bench.runner.start_cleanup_workers(&workers);
    bench.apply(&[desired("t-1", 0, Want::Run)]).await;
    bench
        .wait("t-1", "planning", |row| {
            row.state == State::Planning && row.body.reason == Some(Reason::HubUnreachable)
        })
        .await;
    base::durable::create_dir_all(&bench.staged("t-1")).unwrap();
    // The hub was restored from a backup, and delivers the same artifact again.
    bench
        .runner
        .apply([desired("t-2", 0, Want::Run)].iter())
        .await;
    assert_eq!(bench.row("t-1").await.state, State::Cancelled);
    until("its task has ended", || {
        bench.runner.task_of(&"t-1".parse().unwrap(), 0).is_none()
    })
    .await;
    until("its staging folder is removed", || {
        !bench.staged("t-1").exists()
    })
    .await;
    // Then it turns out to know the first after all.
    bench
        .runner
        .apply([desired("t-1", 1, Want::Run)].iter())
        .await;
    assert_eq!(bench.row("t-2").await.state, State::Cancelled);
    bench
        .wait("t-1", "begun again", |row| row.state == State::Planning)
        .await;
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_written_is_not_hidden_by_what_could_not_be_written_before() {
    let bench = Bench::new().await;
    bench.apply(&[desired("t-1", 0, Want::Run)]).await;
    let row = bench
        .wait("t-1", "planning", |row| row.state == State::Planning)
        .await;
    let full = Fault::no_space("the catalogue: its disk is full");
    for (want, state) in [
        (Want::Pause, State::Paused),
        (Want::Cancel, State::Cancelled),
    ] {
        bench.runner.inner.unwritten.not_saved(
            &TransferRow {
                state: State::Transferring,
                ..row.clone()
            },
            &full,
        );
        bench.apply(&[desired("t-1", 0, want)]).await;
        bench.wait("t-1", "ended", |row| row.state == state).await;
        until("nothing older is shown", || {
            bench.runner.unwritten().is_empty()
        })
        .await;
    }
    bench.stop().await;
}

/// A dataset of one file of several chunks that the site's store knows: its root, and the file's
/// bytes.
fn ingested(bench: &Bench) -> (Root, Vec<u8>) {
    let source = bench._dir.path().join("source");
    base::durable::create_dir_all(&source).unwrap();
    let mut bytes = vec![0; 600_000];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    base::durable::replace(&source.join("large"), &bytes).unwrap();
    let mut source = source::files::FilesSource::open(&source).unwrap();
    let store = &bench.runner.inner.shared.store;
    let root = content::ingest::ingest(
        &mut source,
        Kind::Dataset,
        store,
        store,
        &content::ingest::Progress::default(),
    )
    .unwrap()
    .root;
    assert!(root.totals.chunks > 4);
    (root, bytes)
}

fn assembly(bench: &Bench, root: &Root, link: &Link, stop: &CancellationToken) -> Assembly {
    Assembly {
        shared: bench.runner.inner.shared.clone(),
        sink: bench.sink.clone(),
        incoming: Incoming {
            artifact: "dataset/d:v1".parse().unwrap(),
            digest: root.digest(),
            root: root.clone(),
            transfer: "t-1".parse().unwrap(),
            waits: Default::default(),
        },
        fetcher: crate::fetch::Fetcher::new(link.clone(), root.digest(), Default::default()),
        priority: 0,
        counters: Default::default(),
        stop: stop.clone(),
        staging: None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_staged_is_adopted_even_when_that_is_interrupted() {
    let hub = Hub::start();
    let (link, _hub) = hub.connect(Transport::Quic).await;
    // The chunk index was there, and is lost.
    let bench = Bench::with(true).await;
    let (root, bytes) = ingested(&bench);
    base::durable::create_dir_all(&bench.staged("t-1")).unwrap();
    base::durable::replace(&bench.staged("t-1").join("large"), &bytes).unwrap();
    let stopped = CancellationToken::new();
    stopped.cancel();
    assert!(
        assembly(&bench, &root, &link, &stopped).begin().is_err(),
        "it is stopped before it has hashed anything"
    );
    let (_, journal, _) = assembly(&bench, &root, &link, &CancellationToken::new())
        .begin()
        .unwrap();
    assert_eq!(
        journal.count(),
        root.totals.chunks,
        "all that lies there is used, and nothing is fetched"
    );
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_thrown_away_is_not_committed_any_more() {
    let hub = Hub::start();
    let (link, _hub) = hub.connect(Transport::Quic).await;
    let bench = Bench::with(false).await;
    let (root, bytes) = ingested(&bench);
    let assembly = assembly(&bench, &root, &link, &CancellationToken::new());
    let committed = || assembly.counters.committed.load(Ordering::Relaxed);
    let (place, journal, stage) = assembly.begin().unwrap();
    stage.write_file(&"large".parse().unwrap(), &bytes).unwrap();
    let journal = parking_lot::RwLock::new(journal);
    let mut commit = crate::chunk_index::Commit {
        ordinals: (0..root.totals.chunks).collect(),
        ..Default::default()
    };
    assembly
        .shared
        .chunk_index
        .commit(place, &journal, &mut commit)
        .unwrap();
    let (_, resumed, _) = assembly.begin().unwrap();
    assert_eq!(
        (resumed.count(), committed()),
        (root.totals.chunks, bytes.len() as u64)
    );
    // A sync of the file fails: nobody knows what it holds.
    assembly.counters.damaged.lock().insert(0);
    let (_, left, stage) = assembly.begin().unwrap();
    assert_eq!(
        (left.count(), committed()),
        (0, 0),
        "nothing of it counts, so a transfer that fails like this makes no progress"
    );
    assert_eq!(stage.size(&"large".parse().unwrap()).unwrap(), None);
    // What cannot be removed now is removed later: writes to it could fail for ever.
    let there = stage.path().join("large");
    std::fs::create_dir_all(there.join("not-a-file")).unwrap();
    assembly.counters.damaged.lock().insert(0);
    assert!(assembly.begin().is_err());
    std::fs::remove_dir_all(&there).unwrap();
    stage.write_file(&"large".parse().unwrap(), &bytes).unwrap();
    let (_, _, stage) = assembly.begin().unwrap();
    assert_eq!(stage.size(&"large".parse().unwrap()).unwrap(), None);
    bench.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_whose_time_was_put_back_is_read_and_one_with_another_mode_is_intact() {
    let bench = Bench::new().await;
    let (root, bytes) = ingested(&bench);
    let incoming = Incoming {
        artifact: "dataset/d:v1".parse().unwrap(),
        digest: root.digest(),
        root,
        transfer: "t-1".parse().unwrap(),
        waits: Default::default(),
    };
    let shared = &bench.runner.inner.shared;
    let sink: Arc<dyn Sink> = Arc::new(bench.sink.sink.clone());
    let staged = bench.staged("t-1");
    base::durable::create_dir_all(&staged).unwrap();
    base::durable::replace(&staged.join("large"), &bytes).unwrap();
    let place = sink.commit(&incoming, &staged).await.unwrap().place;
    let large = place.filesystem().join("large");
    let look = async || {
        let until = std::time::Instant::now() + Duration::from_secs(60);
        let (sink, incoming, place) = (sink.clone(), incoming.clone(), place.clone());
        let (store, index) = (shared.store.clone(), shared.chunk_index.clone());
        verify::look(sink, store, index, incoming, place, until)
            .await
            .unwrap()
    };
    let state = || sink::file_state::FileState::of(&std::fs::metadata(&large).unwrap());
    // Each step is later than the commit, by the clock of the files.
    let later = async |step: &dyn Fn()| {
        let before = state();
        until("the change time is later", || {
            step();
            state().changed > before.changed
        })
        .await;
    };
    assert_eq!(look().await, None);
    let mode = |bits| std::os::unix::fs::PermissionsExt::from_mode(bits);
    later(&|| std::fs::set_permissions(&large, mode(0o600)).unwrap()).await;
    assert_eq!(look().await, None, "the same content");
    let modified = std::fs::metadata(&large).unwrap().modified().unwrap();
    let write = |first: u8| {
        let file = std::fs::File::options().write(true).open(&large).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[first], 0).unwrap();
        file.set_modified(modified).unwrap();
    };
    later(&|| write(!bytes[0])).await;
    let found = look().await.unwrap();
    assert!(found.ends_with("was changed since it arrived"), "{found}");

    // With a record of the artifact's location, any other state is found, also before the clock of
    // the files moves on.
    let info = crate::chunk_index::LocationInfo {
        place: place.clone(),
        digest: incoming.digest,
        transfer: None,
        foreign: false,
        adopting: false,
    };
    let number = shared.chunk_index.put(None, info).unwrap();
    let record = |state| {
        let intact = crate::chunk_index::Intact {
            state,
            checked_ms: base::clock::now_ms(),
        };
        let rows = [((number, 0), Some(intact))];
        shared.chunk_index.note_intact(&rows).unwrap();
    };
    record(state());
    assert_eq!(
        look().await,
        None,
        "a file with the recorded state is not read"
    );
    record(sink::file_state::FileState {
        inode: 1,
        ..state()
    });
    assert!(
        look().await.is_some(),
        "its content is not the delivered one"
    );
    write(bytes[0]);
    assert_eq!(look().await, None);
    bench.stop().await;
}

#[tokio::test]
async fn bad_pushed_manifests_write_one_line() {
    let (log, _captured) = base::tally::Log::capture();
    let bench = Bench::new().await;
    for n in 0..100_u32 {
        let bad = (0..1000_u32).map(|m| PushedManifest {
            digest: Digest::of(&[n.to_le_bytes(), m.to_le_bytes()].concat()),
            frames: base::text::Exact::new("!".into()).unwrap(),
        });
        bench.runner.accept_pushed(bad.collect()).await;
    }
    let lines = log.lines_with("a manifest that the hub pushed cannot be used");
    assert_eq!(lines.len(), 1, "{} lines", lines.len());
    // Those beyond the number that is kept are not looked at.
    let waiting = bench.runner.inner.bad_pushed.waiting();
    assert_eq!(waiting, 100 * PUSHED_MANIFESTS_MAX as u64 - 1);
}

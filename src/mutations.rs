//! Changes bytes of state files and bundles at random, opens and uses them as the daemon does: no
//! panic, no hang, and either a fault or the right content. `PACKHORSE_MUTATIONS` sets the number
//! of mutations, `PACKHORSE_MUTATION_FIRST` the number of the first one, so that one which failed
//! can be run alone.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::RwLock;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::api::ApiToken;
use crate::api::types::{State, TransferQuery};
use crate::trainer;
use base::durable;
use base::job_progress::JobProgress;
use base::names::{ArtifactRef, Kind, SiteName};
use content::bundle::{self, Member};
use content::chunk::Hash;
use content::frame::{Frame, Verified};
use content::ingest::{self, Progress};
use content::manifest::{EntryBody, Root, Step, Walk};
use content::redb_file;
use content::store::{Store, rebuild_index};
use exchange::chunk_index::{At, ChunkIndex, Commit, LocationInfo};
use sink::StorageLocation;
use source::files::FilesSource;
use state::{Body, Catalogue, Part};
use transport::identity::{CertificateRequest, HubIdentity, SiteIdentity};

const MUTATIONS: u64 = 2_000;
/// A mutation that takes longer than this hangs.
const HANGS_AFTER: Duration = Duration::from_secs(60);
/// Bits of the journal that are set.
const STAGED: [u64; 4] = [0, 3, 64, 199];
const STAGED_CHUNKS: u64 = 200;

static PANICS: AtomicU64 = AtomicU64::new(0);

/// What a mutation changes.
#[derive(Debug, Clone, Copy)]
enum Target {
    Index { verified: bool },
    Pack,
    ChunkIndex { verified: bool },
    Catalogue,
    Bundle,
    Identity,
    Root,
    Page,
    Record,
}

const TARGETS: [Target; 12] = [
    Target::Index { verified: true },
    Target::Index { verified: false },
    Target::Pack,
    Target::ChunkIndex { verified: true },
    Target::ChunkIndex { verified: false },
    Target::Catalogue,
    Target::Bundle,
    Target::Bundle,
    Target::Identity,
    Target::Root,
    Target::Page,
    Target::Record,
];

/// Valid state, created once.
struct World {
    dir: tempfile::TempDir,
    artifact: ArtifactRef,
    root: Root,
    /// Every chunk and page of the artifact.
    content: HashMap<Hash, Bytes>,
    /// The location of each chunk in the source.
    rows: Vec<(Hash, At)>,
}

/// In memory, which spares the disk.
fn scratch() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() {
        tempfile::tempdir_in(shm).unwrap()
    } else {
        tempfile::tempdir().unwrap()
    }
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::File::create(path)
        .unwrap()
        .write_all(bytes)
        .unwrap();
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

impl World {
    fn new() -> Self {
        let dir = scratch();
        let at = |name: &str| dir.path().join(name);
        let mut rng = StdRng::seed_from_u64(1);
        for n in 0..12 {
            let mut bytes = vec![0; 200 + n * 3000];
            rng.fill(&mut bytes[..]);
            // Half of it can be compressed.
            bytes[100..]
                .iter_mut()
                .step_by(2)
                .for_each(|byte| *byte = b'x');
            write(&at("source").join(format!("f{n:02}")), &bytes);
        }
        let store = Store::open(&at("hub/store")).unwrap();
        let mut source = FilesSource::open(&at("source")).unwrap();
        let root = ingest::ingest(
            &mut source,
            Kind::Dataset,
            &store,
            &store,
            &Progress::default(),
        )
        .unwrap()
        .root;
        let artifact: ArtifactRef = "dataset/d:1".parse().unwrap();
        bundle::export(
            &[Member::new(artifact.clone(), &root)],
            &store,
            &at("bundle"),
            &JobProgress::default(),
        )
        .unwrap();
        let (mut content, mut rows, mut entries, mut entry) =
            (HashMap::new(), Vec::new(), Vec::new(), 0);
        for page in &root.pages {
            content.insert(page.id, store.read(page.id).unwrap().bytes);
        }
        for step in Walk::new(&root, &store) {
            match step.unwrap() {
                Step::Entry {
                    number,
                    entry: found,
                    ..
                } => {
                    entry = number;
                    if let EntryBody::File(file) = found.body {
                        entries.push((1, number, found.path, file));
                    }
                }
                Step::Chunk(chunk, spot) => {
                    content.insert(chunk.id, store.read(chunk.id).unwrap().bytes);
                    rows.push((
                        chunk.id,
                        At {
                            place: 1,
                            entry,
                            offset: spot.offset,
                            len: chunk.len,
                        },
                    ));
                }
            }
        }
        assert!(!root.pages.is_empty() && rows.len() >= 12);
        drop(store);

        std::fs::create_dir_all(at("site")).unwrap();
        let index = ChunkIndex::open(&at("site")).unwrap();
        let landed = LocationInfo {
            place: StorageLocation::Folder { path: at("source") },
            digest: root.digest(),
            transfer: None,
            foreign: false,
            adopting: false,
        };
        assert_eq!(index.put(None, landed.clone()).unwrap(), 1);
        index.note(&mut rows.clone(), &mut entries, false).unwrap();
        let staged = index
            .put(
                None,
                LocationInfo {
                    transfer: Some("t-1".into()),
                    ..landed
                },
            )
            .unwrap();
        let journal = RwLock::new(index.journal(staged, STAGED_CHUNKS).unwrap());
        index
            .commit(
                staged,
                &journal,
                &mut Commit {
                    ordinals: STAGED.to_vec(),
                    ..Commit::default()
                },
            )
            .unwrap();
        drop(index);

        let site: SiteName = "chengdu".parse().unwrap();
        runtime().block_on(async {
            let catalogue = Catalogue::open(&at("hub")).await.unwrap();
            catalogue
                .add_artifact(&artifact, &root, None)
                .await
                .unwrap();
            let row = catalogue.artifact(&artifact).await.unwrap();
            catalogue
                .deliver(
                    &"d-1".parse().unwrap(),
                    None,
                    &[Part::new(&row, std::slice::from_ref(&site))],
                    &[],
                )
                .await
                .unwrap();
            catalogue.close().await;
        });

        let hub = HubIdentity::open_or_create(&at("hub"), &"hub".parse().unwrap()).unwrap();
        let request = CertificateRequest::new().unwrap();
        let certificate = hub.issue_for(&site, request.csr_der()).unwrap();
        request
            .complete(&certificate, hub.ca_der())
            .unwrap()
            .save(&at("site"))
            .unwrap();
        ApiToken::open_or_create(&at("hub")).unwrap();
        write(&at("root"), &root.to_bytes());
        write(&at("page"), &content[&root.pages[0].id]);
        write(
            &at("site/places-rebuilt.json"),
            br#"{"at":"2026-11-30T00:00:00Z","why":"missing","aside":null,"artifacts":3}"#,
        );
        write(
            &at("run/exit.json"),
            br#"{"exit_code":1,"signal":null,"message":"","tail":"","ended_ms":1764460800000}"#,
        );
        Self {
            dir,
            artifact,
            root,
            content,
            rows,
        }
    }

    fn check(&self, store: &Store) {
        for (id, bytes) in &self.content {
            if let Ok(read) = store.read(*id) {
                assert_eq!(read.bytes, *bytes, "wrong content of {id}");
            }
        }
    }

    /// Opens a store, reads all of it, writes to it and collects. Each of these may fail, and none
    /// may return wrong bytes.
    fn use_store(&self, dir: &Path) {
        let Ok(store) = Store::open(dir) else { return };
        self.check(&store);
        let new = Verified::new(Bytes::from_static(b"something that is new to the store"));
        if store.put(&Frame::encode(&new)).is_ok() && store.flush().is_ok() {
            let read = store.read(new.id);
            assert!(
                read.is_ok_and(|read| read.bytes == new.bytes) || store.is_damaged(),
                "what was put and flushed is there"
            );
        }
        let _ = store.collect(&|_| true);
        self.check(&store);
    }

    fn use_places(&self, dir: &Path) {
        let index = ChunkIndex::open(dir).expect("a chunk index that is damaged is made again");
        let ids: Vec<Hash> = self.rows.iter().map(|(id, _)| *id).collect();
        if let Ok(found) = index.find(&ids) {
            for at in found.into_iter().flatten() {
                let _ = index.entry(at.place, at.entry);
            }
        }
        if let Some(place) = index.staged_by("t-1")
            && let Ok(journal) = index.journal(place, STAGED_CHUNKS)
        {
            let wrong = (0..STAGED_CHUNKS)
                .find(|ordinal| journal.has(*ordinal) && !STAGED.contains(ordinal));
            assert_eq!(wrong, None, "a chunk counts as written that is not");
        }
        let _ = index.note(&mut self.rows.clone(), &mut Vec::new(), true);
        let info = LocationInfo {
            place: StorageLocation::Folder { path: "/y".into() },
            digest: Hash([9; 32]),
            transfer: None,
            foreign: false,
            adopting: false,
        };
        if let Ok(number) = index.put(None, info) {
            let _ = index.remove(number);
        }
        drop(index);
        drop(ChunkIndex::open(dir).expect("and opens again"));
    }

    fn use_catalogue(&self, dir: &Path) {
        runtime().block_on(async {
            let Ok(catalogue) = Catalogue::open(dir).await else {
                return;
            };
            if let Ok(row) = catalogue.artifact(&self.artifact).await {
                assert_eq!(
                    row.root.digest(),
                    row.digest,
                    "a manifest that is not the one of its name"
                );
            }
            let _ = catalogue.artifacts().await;
            let _ = catalogue.sites().await;
            if let Ok((rows, _)) = catalogue.transfers(&TransferQuery::default()).await {
                for row in rows {
                    let _ = catalogue
                        .update_transfer(
                            &row.id,
                            row.generation,
                            State::Transferring,
                            &Body::default(),
                        )
                        .await;
                }
            }
            let _ = catalogue.events(0, 100).await;
            let _ = catalogue
                .add_artifact(&"dataset/d:2".parse().unwrap(), &self.root, None)
                .await;
            catalogue.close().await;
        });
    }

    /// One mutation. `dir` is empty.
    fn run(&self, number: u64, dir: &Path) {
        let mut rng = StdRng::seed_from_u64(number);
        let from = |name: &str| self.dir.path().join(name);
        let target = TARGETS[(number % TARGETS.len() as u64) as usize];
        match target {
            Target::Index { verified } => {
                copy_dir(&from("hub/store"), dir);
                mutate(&dir.join("index.redb"), &mut rng);
                redb_file::verified_in_this_thread(verified);
                self.use_store(dir);
                // The packs are complete, whatever the damage of the index.
                let packs = from("hub/store/packs");
                std::fs::remove_dir_all(dir.join("packs")).unwrap();
                copy_dir(&packs, &dir.join("packs"));
                rebuild_index(dir).expect("an index can be made again whatever the old one is");
                let store = Store::open(dir).expect("a new index opens");
                for (id, bytes) in &self.content {
                    assert_eq!(store.read(*id).expect("nothing is lost").bytes, *bytes);
                }
            }
            Target::Pack => {
                copy_dir(&from("hub/store"), dir);
                mutate(&dir.join("packs/00000001.pack"), &mut rng);
                if rng.random() {
                    rebuild_index(dir).expect("a damaged pack is passed over");
                }
                self.use_store(dir);
            }
            Target::ChunkIndex { verified } => {
                write(
                    &dir.join("places.redb"),
                    &std::fs::read(from("site/places.redb")).unwrap(),
                );
                mutate(&dir.join("places.redb"), &mut rng);
                redb_file::verified_in_this_thread(verified);
                self.use_places(dir);
            }
            Target::Catalogue => {
                write(
                    &dir.join("catalogue.db"),
                    &std::fs::read(from("hub/catalogue.db")).unwrap(),
                );
                mutate(&dir.join("catalogue.db"), &mut rng);
                self.use_catalogue(dir);
            }
            Target::Bundle => {
                write(&dir.join("bundle"), &std::fs::read(from("bundle")).unwrap());
                mutate(&dir.join("bundle"), &mut rng);
                let store = Store::open(&dir.join("store")).unwrap();
                if let Ok(members) =
                    bundle::import(&dir.join("bundle"), &store, &JobProgress::default())
                {
                    for member in members {
                        let root = member
                            .root()
                            .expect("what was imported has a sound manifest");
                        for step in Walk::new(&root, &store) {
                            if let Step::Chunk(chunk, _) =
                                step.expect("what was imported has all its pages")
                            {
                                assert_eq!(
                                    store
                                        .read(chunk.id)
                                        .expect("what was imported is whole")
                                        .bytes,
                                    self.content[&chunk.id]
                                );
                            }
                        }
                    }
                }
                self.check(&store);
            }
            Target::Identity => {
                copy_dir(&from("hub/identity"), &dir.join("identity"));
                write(
                    &dir.join("identity/site.pem"),
                    &std::fs::read(SiteIdentity::path(&from("site"))).unwrap(),
                );
                let files: Vec<PathBuf> = std::fs::read_dir(dir.join("identity"))
                    .unwrap()
                    .map(|entry| entry.unwrap().path())
                    .collect();
                mutate(&files[rng.random_range(0..files.len())], &mut rng);
                std::fs::copy(dir.join("identity/site.pem"), SiteIdentity::path(dir)).unwrap();
                if let Ok(Some(identity)) = SiteIdentity::load(dir) {
                    let _ = identity.sign(b"a receipt");
                }
                if let Ok(hub) = HubIdentity::open_or_create(dir, &"hub".parse().unwrap()) {
                    let request = CertificateRequest::new().unwrap();
                    let _ = hub.issue_for(&"wuhan".parse().unwrap(), request.csr_der());
                }
            }
            Target::Root => {
                write(&dir.join("root"), &self.root.to_bytes());
                mutate(&dir.join("root"), &mut rng);
                let bytes = std::fs::read(dir.join("root")).unwrap();
                assert!(
                    bytes == self.root.to_bytes()
                        || Root::parse(&bytes, self.root.digest()).is_err()
                );
                // A peer may send any bytes under their own name.
                if let Ok(root) = Root::parse(&bytes, Hash::of(&bytes)) {
                    let store = Store::open(&dir.join("store")).unwrap();
                    let _ = Walk::new(&root, &store)
                        .take(10_000)
                        .filter(Result::is_err)
                        .count();
                }
            }
            Target::Page => {
                write(&dir.join("page"), &self.content[&self.root.pages[0].id]);
                mutate(&dir.join("page"), &mut rng);
                let page = Verified::new(std::fs::read(dir.join("page")).unwrap().into());
                let store = Store::open(&dir.join("store")).unwrap();
                store.put(&Frame::encode(&page)).unwrap();
                let mut root = self.root.clone();
                root.pages[0].id = page.id;
                // It may be a list of other files; it ends, and does so without a panic.
                let _ = Walk::new(&root, &store)
                    .take(10_000)
                    .filter(Result::is_err)
                    .count();
            }
            Target::Record => {
                let records = ["site/places-rebuilt.json", "run/exit.json", "hub/api-token"];
                let name = records[rng.random_range(0..records.len())];
                let file = dir.join(Path::new(name).file_name().unwrap());
                write(&file, &std::fs::read(from(name)).unwrap());
                mutate(&file, &mut rng);
                let _ = ApiToken::open_or_create(dir);
                let _ = trainer::Folder::new(dir.to_owned()).process();
                let _ =
                    ChunkIndex::open(dir).map(|index| index.loss().map(|loss| loss.report(dir)));
            }
        }
        redb_file::verified_in_this_thread(true);
    }
}

/// Changes a file: single bits and bytes, zeros, noise, cuts, exchanged pages, and bytes after its
/// end.
fn mutate(path: &Path, rng: &mut StdRng) {
    let mut bytes = std::fs::read(path).unwrap();
    for _ in 0..[1, 1, 1, 3][rng.random_range(0..4)] {
        if bytes.is_empty() {
            break;
        }
        let at = rng.random_range(0..bytes.len());
        let page = |at: usize| (at & !4095)..((at & !4095) + 4096).min(bytes.len());
        match rng.random_range(0..9) {
            0 | 1 => bytes[at] ^= 1 << rng.random_range(0..8),
            2 => bytes[at] = rng.random(),
            3 => {
                let end = (at + rng.random_range(1..600)).min(bytes.len());
                bytes[at..end].fill(0);
            }
            4 => {
                let end = (at + rng.random_range(1..64)).min(bytes.len());
                rng.fill(&mut bytes[at..end]);
            }
            5 => {
                let page = page(at);
                rng.fill(&mut bytes[page]);
            }
            6 => bytes.truncate(at),
            7 => {
                let (from, to) = (page(at), page(rng.random_range(0..bytes.len())));
                let len = from.len().min(to.len());
                let (a, b) = (
                    bytes[from.start..from.start + len].to_vec(),
                    bytes[to.start..to.start + len].to_vec(),
                );
                bytes[to.start..to.start + len].copy_from_slice(&a);
                bytes[from.start..from.start + len].copy_from_slice(&b);
            }
            _ => {
                let mut more = vec![0; rng.random_range(1..5000)];
                rng.fill(&mut more[..]);
                bytes.extend_from_slice(&more);
            }
        }
    }
    durable::remove_all(path).unwrap();
    write(path, &bytes);
}

#[test]
fn changed_state_files_and_bundles_do_no_harm() {
    let number = |name: &str, otherwise: u64| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(otherwise)
    };
    let (first, count) = (
        number("PACKHORSE_MUTATION_FIRST", 0),
        number("PACKHORSE_MUTATIONS", MUTATIONS),
    );
    // Panics of library threads too; a caught panic that becomes a fault is not reported here.
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.fetch_add(1, Ordering::SeqCst);
        before(info);
    }));
    let world = Arc::new(World::new());
    let next = Arc::new(AtomicU64::new(first));
    let (send, ended) = sync_channel(16);
    let threads = std::thread::available_parallelism()
        .map_or(2, usize::from)
        .min(8);
    for _ in 0..threads {
        let (world, next, send) = (world.clone(), next.clone(), send.clone());
        std::thread::spawn(move || {
            loop {
                let number = next.fetch_add(1, Ordering::SeqCst);
                if number >= first + count {
                    return;
                }
                let dir = scratch();
                let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    world.run(number, dir.path());
                }));
                if send.send((number, run.is_ok())).is_err() {
                    return;
                }
            }
        });
    }
    drop(send);
    let (mut done, mut failed, mut hangs) = (0, Vec::new(), false);
    loop {
        match ended.recv_timeout(HANGS_AFTER) {
            Ok((_, true)) => done += 1,
            Ok((number, false)) => failed.push(number),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                hangs = true;
                break;
            }
        }
        if failed.len() >= 20 {
            break;
        }
    }
    assert!(
        !hangs,
        "a mutation hangs: one of the {threads} before {}",
        next.load(Ordering::SeqCst)
    );
    let kinds: Vec<String> = failed
        .iter()
        .map(|n| format!("{n} {:?}", TARGETS[(n % TARGETS.len() as u64) as usize]))
        .collect();
    assert!(failed.is_empty(), "these mutations did harm: {kinds:#?}");
    assert_eq!(
        PANICS.load(Ordering::SeqCst),
        0,
        "something panicked beside the mutations: see the output"
    );
    assert_eq!(done, count);
}

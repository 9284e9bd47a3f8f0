//! Files of this site that are taken over as a whole, with and without a record that they are intact.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::chunk_index::ChunkIndex;
use base::blocking::blocking;
use content::manifest::FileInfo;
use content::store::Store;
use sink::stage::{FILE_MODE, Sharing, StagingRoot};
use sink::{Waits, images};
use tokio_util::sync::CancellationToken;

use super::super::super::memory::Memory;

const HOUR: Duration = Duration::from_secs(3600);
const CONTENT: &[u8] = b"what was delivered";

struct Bench {
    worker: Worker,
    delivered: PathBuf,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new(trusted_for: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path();
        let staging = StagingRoot::open(&data.join("staging")).unwrap();
        let images = images::open(None, data).unwrap();
        let shared = AssemblyContext {
            store: Store::open(&data.join("store")).unwrap(),
            chunk_index: Arc::new(ChunkIndex::open(data).unwrap()),
            memory: Arc::new(Memory::new(16 << 20)),
            images: images.clone(),
            trusted_for,
        };
        let (done, _) = std::sync::mpsc::sync_channel(1);
        let worker = Worker {
            stage: Arc::new(staging.stage(&"t-1".parse().unwrap()).unwrap()),
            counters: Arc::default(),
            failure: Arc::new(Failure::new(&CancellationToken::new(), Waits::default())),
            done,
            local: Reader::new(
                shared.chunk_index.clone(),
                Some(images),
                tokio::runtime::Handle::current(),
            ),
            shared,
            buffer: vec![0; READ_BYTES],
        };
        let delivered = data.join("delivered");
        let bench = Self {
            worker,
            delivered,
            _dir: dir,
        };
        bench.deliver(CONTENT);
        bench
    }

    /// Writes the delivered file, long enough ago that its times can be trusted.
    fn deliver(&self, content: &[u8]) {
        durable::replace(&self.delivered, content).unwrap();
        let mode = std::fs::Permissions::from_mode(FILE_MODE);
        std::fs::set_permissions(&self.delivered, mode).unwrap();
        std::thread::sleep(Duration::from_millis(30));
    }

    fn state(&self) -> FileState {
        FileState::of(&std::fs::metadata(&self.delivered).unwrap())
    }

    /// Takes the file over as [`CONTENT`], with this record.
    fn share(&mut self, intact: Option<Intact>) -> Result<Option<Intact>, Fault> {
        let dest = Dest {
            number: 0,
            path: "file".parse().unwrap(),
            wanted: stage::Wanted {
                mode: FILE_MODE,
                ..Default::default()
            },
            file: FileInfo {
                size: CONTENT.len() as u64,
                hash: Hash::of(CONTENT),
            },
            handle: Mutex::default(),
            announced: Default::default(),
            sparse: None,
        };
        let from = Local {
            path: self.delivered.clone(),
            link: true,
            key: (1, 0),
            intact,
        };
        let (how, record) = self.worker.share(&dest, &from)?;
        assert_ne!(how, Sharing::Not);
        Ok(record)
    }
}

fn checked_before(state: FileState, past: Duration) -> Option<Intact> {
    Some(Intact {
        state,
        checked_ms: clock::now_ms() - past.as_millis() as i64,
    })
}

#[tokio::test]
async fn an_untouched_file_is_hashed_once_and_its_record_grows_old() {
    let mut bench = Bench::new(HOUR);
    blocking(move || {
        let begun = clock::now_ms();
        let first = bench.share(None)?.unwrap();
        assert!(first.checked_ms >= begun, "all bytes were verified now");
        assert_eq!(first.state, bench.state(), "the state after the link");
        // The content that a record promises is not read: nothing else tells this apart.
        let minute = Duration::from_secs(60);
        bench.deliver(&CONTENT.to_ascii_uppercase());
        let record = checked_before(bench.state(), minute);
        let second = bench.share(record)?.unwrap();
        assert_eq!(
            (second.state, second.checked_ms),
            (bench.state(), record.unwrap().checked_ms),
            "a use makes a record no younger"
        );
        assert!(bench.share(Some(second)).is_ok(), "the link is known");
        Ok(())
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_touched_file_and_an_old_record_are_hashed() {
    let mut bench = Bench::new(HOUR);
    blocking(move || {
        bench.deliver(&CONTENT.to_ascii_uppercase());
        let good = checked_before(bench.state(), Duration::ZERO);
        let refused = |bench: &mut Bench, record| {
            let fault = bench.share(record).unwrap_err();
            assert_eq!(fault.code, Code::Integrity, "{fault}");
        };
        refused(&mut bench, None);
        let old = checked_before(bench.state(), HOUR);
        refused(&mut bench, old);
        // Another mode, and back: only the change time tells it.
        for mode in [0o600, FILE_MODE] {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(&bench.delivered, mode).unwrap();
        }
        refused(&mut bench, good);
        bench.worker.shared.trusted_for = Duration::ZERO;
        let record = checked_before(bench.state(), Duration::ZERO);
        refused(&mut bench, record);
        Ok(())
    })
    .await
    .unwrap();
}

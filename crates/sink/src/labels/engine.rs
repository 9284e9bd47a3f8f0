//! The interface of the labels sink to a database, and the transport of rows between files and
//! databases.
//!
//! One trait with two implementations, which pass the same contract tests. Files are read and
//! written on blocking threads, databases are accessed on the async runtime. A short queue of
//! batches connects them, so that a slow side delays the other and memory stays bounded.

use async_trait::async_trait;
use std::path::PathBuf;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::canonical::Table;
use crate::{Threads, Waits};
use base::fault::Fault;
use base::limits::{LABEL_BATCH_BYTES, LABEL_BATCHES_QUEUED_MAX};
use base::names::TransferId;
use content::chunk::Hash;
use content::label_rows::{ClassRow, QueryRow};
use content::manifest::{Digest, LabelsInfo};

/// A version to be loaded.
#[derive(Debug, Clone)]
pub(super) struct NewVersion {
    pub(super) set: String,
    pub(super) version: String,
    pub(super) digest: Digest,
    /// The directory with the canonical files.
    pub(super) dir: PathBuf,
    pub(super) info: LabelsInfo,
    /// The transfer that delivers it; ids sort by the time of the request.
    pub(super) transfer: TransferId,
    /// Whether a stored version with the same digest is loaded again. The active version then stays
    /// the same.
    pub(super) replaces: bool,
    /// The load reports here what it waits for.
    pub(super) waits: Waits,
}

impl NewVersion {
    /// The fault of a version that exists with different content.
    pub(super) fn conflict(&self, held: &str) -> Fault {
        Fault::conflict(format!(
            "labels {}:{} exist in the database with a different digest: {held}, not {}",
            self.set, self.version, self.digest
        ))
    }

    /// Rejects files with more or fewer rows than the manifest states.
    pub(super) fn check_count(&self, table: Table, found: u64) -> Result<(), Fault> {
        let stated = match table {
            Table::Classes => self.info.classes,
            Table::Samples => self.info.samples,
            Table::Annotations => self.info.annotations,
        };
        if stated == found {
            return Ok(());
        }
        Err(Fault::integrity(format!(
            "{} has {found} lines, but the manifest of {}:{} states {stated}",
            table.file(),
            self.set,
            self.version
        ))
        .with_next("publish the labels again from their source"))
    }
}

/// A version in the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StoredVersion {
    pub(super) digest: String,
    pub(super) classes: u64,
    pub(super) samples: u64,
    pub(super) annotations: u64,
    pub(super) rows_digest: String,
}

/// Exported rows: canonical lines of one file, each with its number in that file.
#[derive(Debug)]
pub(super) struct Rows {
    pub(super) table: Table,
    pub(super) numbers: Vec<u64>,
    /// The end of each line in `bytes`.
    pub(super) ends: Vec<usize>,
    pub(super) bytes: Vec<u8>,
}

/// A database for label sets. Every call is idempotent.
#[async_trait]
pub(super) trait Engine: Send + Sync {
    /// Checks that the database responds, is new enough and grants the permissions for a commit;
    /// creates the tables. `room_bytes` is the approximate size of the load.
    async fn prepare(&self, room_bytes: u64, waits: &Waits) -> Result<(), Fault>;

    /// One line for `doctor`.
    async fn probe(&self) -> Result<String, Fault>;

    /// The stored version, if readers can see it.
    async fn held(
        &self,
        set: &str,
        version: &str,
        waits: &Waits,
    ) -> Result<Option<StoredVersion>, Fault>;

    /// The classes, samples and annotations whose rows exist, counted.
    async fn count(&self, set: &str, version: &str) -> Result<Option<[u64; 3]>, Fault>;

    /// Loads a version, and makes it the active one unless that one was requested later: both in one
    /// step, whatever else is loaded meanwhile. A stored version with the same digest is not changed,
    /// or is replaced.
    async fn load(&self, new: &NewVersion) -> Result<(), Fault>;

    /// The active version of a set.
    async fn active(&self, set: &str) -> Result<Option<String>, Fault>;

    /// Makes a stored version the active one. Returns `false` if it is not stored.
    async fn activate(&self, set: &str, version: &str) -> Result<bool, Fault>;

    /// Removes a version. If it was the active one, the remaining version that was requested last
    /// becomes active.
    async fn remove(&self, set: &str, version: &str) -> Result<(), Fault>;

    /// Sends every row of a version in canonical order from one consistent snapshot: classes,
    /// samples, annotations.
    async fn export(
        &self,
        set: &str,
        version: &str,
        out: mpsc::Sender<Rows>,
    ) -> Result<StoredVersion, Fault>;

    /// The classes of a stored version; none if it is not stored.
    async fn classes(&self, set: &str, version: &str) -> Result<Vec<ClassRow>, Fault>;

    /// Sends the rows of a query from one consistent snapshot, in any order. The query can only
    /// read.
    async fn query(&self, sql: &str, out: mpsc::Sender<Vec<QueryRow>>) -> Result<(), Fault>;

    /// Keeps the versions readable for others. Called at start and regularly.
    async fn tend(&self) -> Result<(), Fault> {
        Ok(())
    }

    /// Leaves the versions readable for others, before the daemon ends.
    async fn leave(&self) {}

    /// The location of a version for users, without a password.
    fn location(&self, set: &str, version: &str) -> String;
}

/// The fault of a version that is not stored.
pub(super) fn not_held(set: &str, version: &str) -> Fault {
    Fault::not_found(format!(
        "the label database does not contain {set}:{version}"
    ))
}

/// Runs `work` on a thread of the sink. The items that it passes to its argument arrive at the
/// receiver. If the receiver is dropped, the next item fails and the work ends.
pub(super) fn pump<T, R, W>(
    threads: &Threads,
    work: W,
) -> (mpsc::Receiver<T>, JoinHandle<Result<R, Fault>>)
where
    T: Send + 'static,
    R: Send + 'static,
    W: FnOnce(&mut dyn FnMut(T) -> Result<(), Fault>) -> Result<R, Fault> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(LABEL_BATCHES_QUEUED_MAX);
    let task = threads.spawn(move || {
        work(&mut |item| {
            sender
                .blocking_send(item)
                .map_err(|_| Fault::internal("the database accepts no more rows"))
        })
    });
    (receiver, task)
}

/// Waits for a thread of the sink.
pub(super) async fn join_thread<R>(task: JoinHandle<Result<R, Fault>>) -> Result<R, Fault> {
    task.await.map_err(|e| {
        Fault::internal(format!(
            "a thread of the labels sink ended unexpectedly: {e}"
        ))
    })?
}

/// Collects exported rows into batches.
pub(super) struct Batcher {
    out: mpsc::Sender<Rows>,
    rows: Rows,
    /// The hash of the annotation lines.
    hasher: blake3::Hasher,
    counts: [u64; 3],
}

impl Batcher {
    pub(super) fn new(out: mpsc::Sender<Rows>) -> Self {
        Self {
            out,
            rows: Rows::empty(Table::Classes),
            hasher: blake3::Hasher::new(),
            counts: [0; 3],
        }
    }

    /// Adds the line that `write` appends.
    pub(super) async fn push(
        &mut self,
        table: Table,
        number: u64,
        write: impl FnOnce(&mut Vec<u8>),
    ) -> Result<(), Fault> {
        if table != self.rows.table || self.rows.bytes.len() >= LABEL_BATCH_BYTES {
            self.flush(table).await?;
        }
        let start = self.rows.bytes.len();
        write(&mut self.rows.bytes);
        self.rows.numbers.push(number);
        self.rows.ends.push(self.rows.bytes.len());
        self.counts[table as usize] += 1;
        if table == Table::Annotations {
            self.hasher.update(&self.rows.bytes[start..]);
        }
        Ok(())
    }

    async fn flush(&mut self, next: Table) -> Result<(), Fault> {
        let full = std::mem::replace(&mut self.rows, Rows::empty(next));
        if full.numbers.is_empty() {
            return Ok(());
        }
        self.out
            .send(full)
            .await
            .map_err(|_| Fault::internal("the reader of the exported rows ended unexpectedly"))
    }

    /// Sends the rest. Returns the counts in the order of [`Table::ALL`] and the BLAKE3 of the
    /// annotation lines.
    pub(super) async fn finish(mut self) -> Result<([u64; 3], Hash), Fault> {
        self.flush(Table::Classes).await?;
        Ok((self.counts, Hash(*self.hasher.finalize().as_bytes())))
    }
}

impl Rows {
    fn empty(table: Table) -> Self {
        Self {
            table,
            numbers: Vec::new(),
            ends: Vec::new(),
            bytes: Vec::new(),
        }
    }

    /// Each line with its number.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        self.numbers
            .iter()
            .zip(starts.zip(&self.ends))
            .map(|(number, (start, end))| (*number, &self.bytes[start..*end]))
    }
}

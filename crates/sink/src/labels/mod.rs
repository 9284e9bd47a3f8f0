//! The labels sink: stores label sets as rows in a database, and exports rows as label sets.
//!
//! The transfer engine calls it through [`Sink`]; publishing from a database calls
//! [`LabelsSink::export_canonical`]. Two engines implement one trait: `postgres` and `sqlite`, the
//! embedded default. Readers use two views, `annotations` and `current_annotations` (in Postgres in
//! the schema `packhorse`). They see the rows of the old version or of the new one, never a mix.
//!
//! # The tables
//! `label_set`, `label_version`, `label_active` (one row per set: the switch), `label_class`,
//! `version_sample` and `annotation`. Samples belong to a version and are not shared between versions by content hash: two versions may have
//! different metadata for one image, a sample without a dataset has no hash, and with a shared
//! table every commit would write rows that others read, and every removal would search for
//! orphans. An annotation refers to its sample by line number, which one pass over the two sorted
//! files determines without a lookup.
//!
//! # Byte for byte
//! An export reproduces the exact bytes of the canonical files, so that the same rows have the same
//! digest everywhere. JSON values are therefore stored as text: in Postgres in columns of the type
//! `json`, which keeps its input unchanged and still supports `->` and `->>`. `jsonb` would reorder
//! keys, drop repeated keys, change numbers, and reject `\u0000`. A user who needs its operators
//! can cast, or index the cast. In SQLite the columns are `TEXT`, for its JSON functions. Box
//! numbers are doubles, which have exactly one printed form; a line that cannot be reproduced is
//! rejected.
//!
//! # What survives a crash
//! Rows are committed first. Then the staging directory is renamed to
//! `<data_dir>/labels/<name>/<version>/`, where the canonical files are a source of chunks for
//! later transfers. After a crash between the two, the transfer engine calls again; the sink finds
//! the rows with the same digest and only renames. `postgres` describes what a crash leaves in the
//! database; in SQLite it leaves nothing.

mod canonical;
mod compare;
mod copy;
mod engine;
mod postgres;
mod query;
mod row_mapping;
mod sqlite;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{Mutex, mpsc};

use self::canonical::Table;
use self::compare::Compare;
use self::engine::{Engine, NewVersion, Rows, StoredVersion, join_thread, not_held};
use super::{
    Committed, Incoming, Sink, StorageLocation, Threads, Verification, Waits, nothing_staged,
};
use crate::settings;
use base::durable;
use base::fault::{Fault, IoContext};
use base::limits::{LABEL_BATCHES_QUEUED_MAX, LABEL_COUNT_MAX, SINK_THREADS_MAX};
use base::names::{ArtifactRef, Kind, RelPath};
use content::label_rows::{ClassRow, QueryRow};
use content::manifest::{KindInfo, LabelsInfo};

/// Label sets in a database.
pub struct LabelsSink {
    engine: Box<dyn Engine>,
    staging: PathBuf,
    stored_dir: PathBuf,
    threads: Threads,
    /// Held by the thread that changes the directories with stored canonical files.
    change_lock: Arc<Mutex<()>>,
}

/// A version whose canonical files were exported from the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// The digest, in hex, of the artifact as it was committed.
    pub digest: String,
    /// The number of lines of `classes.jsonl`.
    pub classes: u64,
    /// The number of lines of `samples.jsonl`.
    pub samples: u64,
    /// The number of lines of `annotations.jsonl`.
    pub annotations: u64,
}

/// Opens the configured sink, or SQLite at `<data_dir>/labels.db`. Does not connect, so a database
/// that is down does not prevent the start of the daemon; an unreadable password file does.
pub fn open(cfg: Option<&settings::LabelsSink>, data_dir: &Path) -> Result<Arc<LabelsSink>, Fault> {
    let data_dir = std::path::absolute(data_dir).at(format_args!("find {}", data_dir.display()))?;
    let threads = Threads::new("sink labels", SINK_THREADS_MAX);
    let engine: Box<dyn Engine> = match cfg {
        None => Box::new(sqlite::Sqlite::new(
            &data_dir.join("labels.db"),
            threads.clone(),
        )),
        Some(cfg) if cfg.url.starts_with("sqlite:") => Box::new(sqlite::Sqlite::new(
            &sqlite::Sqlite::file_of(&cfg.url)?,
            threads.clone(),
        )),
        Some(cfg) if cfg.url.starts_with("postgres://") || cfg.url.starts_with("postgresql://") => {
            Box::new(postgres::Postgres::new(
                &cfg.url,
                cfg.password_file.as_deref(),
                threads.clone(),
            )?)
        }
        Some(_) => {
            return Err(Fault::config(
                "the url of [sink.labels] must begin with postgres:// or sqlite://",
            )
            .with_next(
                "use postgres://user@host:port/database or sqlite:///absolute/path/labels.db",
            ));
        }
    };
    let (staging, stored_dir) = (
        data_dir.join("staging").join("labels"),
        data_dir.join("labels"),
    );
    durable::create_dir_all(&staging)?;
    Ok(Arc::new(LabelsSink {
        engine,
        staging,
        stored_dir,
        threads,
        change_lock: Arc::default(),
    }))
}

fn labels_info(incoming: &Incoming) -> Result<&LabelsInfo, Fault> {
    match &incoming.root.info {
        KindInfo::Labels(info) if incoming.artifact.kind == Kind::Labels => Ok(info),
        _ => Err(Fault::integrity(format!(
            "the manifest of {} is not that of a label set",
            incoming.artifact
        ))
        .with_next("publish it again with the correct kind")),
    }
}

impl LabelsSink {
    fn dir_of(&self, artifact: &ArtifactRef) -> PathBuf {
        self.stored_dir
            .join(artifact.name())
            .join(artifact.version())
    }

    /// Changes the stored files, one change at a time. The thread holds the lock, because it
    /// continues if its caller is dropped.
    async fn change_stored<R: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<R, Fault> + Send + 'static,
    ) -> Result<R, Fault> {
        let lock = self.change_lock.clone().lock_owned().await;
        let work = move || {
            let _lock = lock;
            work()
        };
        self.threads.run(work).await
    }

    /// Waits for a change that a dropped caller left running: until its end, the staging directory
    /// may disappear. The contract of a sink allows to cancel and repeat a commit; the daemon
    /// cancels one only when it ends.
    async fn wait_for_changes(&self) {
        drop(self.change_lock.lock().await);
    }

    /// The active version of a label set.
    pub async fn active_version(&self, label_set: &str) -> Result<Option<String>, Fault> {
        self.engine.active(label_set).await
    }

    /// The classes of a stored version, also those that no annotation has; none if it is not
    /// stored.
    pub async fn classes(&self, label_set: &str, version: &str) -> Result<Vec<ClassRow>, Fault> {
        self.engine.classes(label_set, version).await
    }

    /// Sends the rows of a query from one consistent snapshot, in any order: `source::labels` sorts
    /// and checks them. The query can only read, and returns columns of
    /// [`content::label_rows::QUERY_COLUMNS`].
    pub async fn query(&self, sql: &str, out: mpsc::Sender<Vec<QueryRow>>) -> Result<(), Fault> {
        self.engine.query(sql, out).await
    }

    /// Writes the canonical files of a stored version to `dir`, from one consistent snapshot: the
    /// same bytes that were loaded. Not synced.
    pub async fn export_canonical(
        &self,
        label_set: &str,
        version: &str,
        dir: &Path,
    ) -> Result<Exported, Fault> {
        let Some(held) = self
            .engine
            .held(label_set, version, &Waits::default())
            .await?
        else {
            return Err(not_held(label_set, version));
        };
        let (sender, mut receiver) = mpsc::channel::<Rows>(LABEL_BATCHES_QUEUED_MAX);
        let dir = dir.to_path_buf();
        let writer = self.threads.spawn(move || {
            std::fs::create_dir_all(&dir)
                .at(format_args!("create the directory {}", dir.display()))?;
            let path = |table: Table| dir.join(table.file());
            let mut files = Vec::with_capacity(Table::ALL.len());
            for table in Table::ALL {
                files.push(BufWriter::new(
                    File::create(path(table))
                        .at(format_args!("create {}", path(table).display()))?,
                ));
            }
            while let Some(rows) = receiver.blocking_recv() {
                files[rows.table as usize]
                    .write_all(&rows.bytes)
                    .at(format_args!("write {}", path(rows.table).display()))?;
            }
            for (table, mut file) in Table::ALL.into_iter().zip(files) {
                file.flush()
                    .at(format_args!("write {}", path(table).display()))?;
            }
            Ok(())
        });
        let exported = self.engine.export(label_set, version, sender).await;
        // If both failed, the error of the writer is the cause, for example a full disk.
        join_thread(writer).await?;
        if exported? != held {
            return Err(Fault::integrity(format!(
                "the rows of {label_set}:{version} were changed since they were committed"
            ))
            .with_next(format!(
                "run 'packhorse verify labels/{label_set}:{version}' to see which rows differ"
            )));
        }
        let StoredVersion {
            digest,
            classes,
            samples,
            annotations,
            ..
        } = held;
        Ok(Exported {
            digest,
            classes,
            samples,
            annotations,
        })
    }

    /// Moves the canonical files to their final directory.
    async fn store_files(
        &self,
        artifact: &ArtifactRef,
        staged: &Path,
    ) -> Result<StorageLocation, Fault> {
        let stored_dir = self.dir_of(artifact);
        let (from, to) = (staged.to_path_buf(), stored_dir.clone());
        self.change_stored(move || {
            if !from.try_exists().at(from.display())? {
                if to.try_exists().at(to.display())? {
                    return Ok(()); // renamed before a crash
                }
                return Err(nothing_staged(&from));
            }
            for table in Table::ALL {
                durable::sync_file(&from.join(table.file()))?;
            }
            durable::sync_dir(&from)?;
            // Files of an earlier commit of this version, whose rows were deleted manually since,
            // are only a copy.
            durable::remove_all(&to)?;
            if let Some(parent) = to.parent() {
                durable::create_dir_all(parent)?;
            }
            durable::rename_noreplace(&from, &to)
        })
        .await?;
        Ok(StorageLocation::Folder { path: stored_dir })
    }
}

#[async_trait]
impl Sink for LabelsSink {
    fn staging_root(&self) -> &Path {
        &self.staging
    }

    fn threads(&self) -> &Threads {
        &self.threads
    }

    async fn check(&self, incoming: &Incoming) -> Result<(), Fault> {
        labels_info(incoming)?;
        let bytes = incoming.root.totals.bytes;
        self.engine.prepare(bytes, &incoming.waits).await?;
        let artifact = &incoming.artifact;
        match self
            .engine
            .held(artifact.name(), artifact.version(), &incoming.waits)
            .await?
        {
            Some(held) if held.digest != incoming.digest.hex() => Err(self
                .new_version(incoming, Path::new(""))?
                .conflict(&held.digest)),
            _ => Ok(()),
        }
    }

    fn refuse_path(&self, path: &RelPath) -> Option<String> {
        let known = Table::ALL.iter().any(|table| table.file() == path.as_str());
        (!known).then(|| {
            "a label set must consist of annotations.jsonl, classes.jsonl and samples.jsonl".into()
        })
    }

    async fn commit(&self, incoming: &Incoming, staged: &Path) -> Result<Committed, Fault> {
        let artifact = &incoming.artifact;
        let mut new = self.new_version(incoming, staged)?;
        self.wait_for_changes().await;
        // Prepare again: the database may have changed since it was checked, possibly hours ago.
        self.engine.prepare(0, &incoming.waits).await?;
        // A version is staged again if some of it was found missing or changed, or after a crash
        // directly after the load. In both cases its rows are loaded again.
        let staged_path = staged.to_owned();
        new.replaces = self
            .threads
            .run(move || staged_path.try_exists().at_sink(staged_path.display()))
            .await?;
        self.engine.load(&new).await?;
        let place = self.store_files(artifact, staged).await?;
        Ok(Committed {
            place,
            location: self.engine.location(artifact.name(), artifact.version()),
            note: None,
        })
    }

    async fn active(&self, artifact: &ArtifactRef) -> Result<Option<String>, Fault> {
        self.engine.active(artifact.name()).await
    }

    async fn activate(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        if self
            .engine
            .activate(artifact.name(), artifact.version())
            .await?
        {
            return Ok(());
        }
        Err(not_held(artifact.name(), artifact.version()))
    }

    async fn read_at(
        &self,
        place: &StorageLocation,
        path: &RelPath,
        offset: u64,
        len: u32,
    ) -> Result<Bytes, Fault> {
        let StorageLocation::Folder { path: folder } = place else {
            return Err(Fault::internal(
                "labels are stored in a directory, not in a registry",
            ));
        };
        let file = path.in_dir(folder);
        let read = move || {
            let what = format!("read {len} bytes at {offset} of {}", file.display());
            let mut bytes = vec![0; len as usize];
            File::open(&file)
                .and_then(|f| f.read_exact_at(&mut bytes, offset))
                .at(what)?;
            Ok(bytes.into())
        };
        self.threads.run(read).await
    }

    async fn exists_at_target(&self, incoming: &Incoming) -> Result<bool, Fault> {
        let (set, version) = (incoming.artifact.name(), incoming.artifact.version());
        let held = self.engine.held(set, version, &incoming.waits).await?;
        let Some(held) = held.filter(|held| held.digest == incoming.digest.hex()) else {
            return Ok(false);
        };
        // Rows that somebody deleted or added. A large version is counted for as long as a quick
        // check may take.
        let count = self.engine.count(set, version);
        match tokio::time::timeout(LABEL_COUNT_MAX, count).await {
            Ok(counted) => Ok(counted? == Some([held.classes, held.samples, held.annotations])),
            Err(_) => Ok(true),
        }
    }

    async fn verify(
        &self,
        incoming: &Incoming,
        place: &StorageLocation,
        verification: &Verification,
    ) -> Result<Vec<String>, Fault> {
        let (set, version) = (incoming.artifact.name(), incoming.artifact.version());
        let Some(held) = self.engine.held(set, version, &incoming.waits).await? else {
            return Ok(vec![format!(
                "the label database does not contain {set}:{version}"
            )]);
        };
        if held.digest != incoming.digest.hex() {
            return Ok(vec![format!(
                "the label database contains {set}:{version} with the digest {}, not {}",
                held.digest, incoming.digest
            )]);
        }
        if verification.quick {
            let info = labels_info(incoming)?;
            let (stored, expected) = (
                [held.classes, held.samples, held.annotations],
                [info.classes, info.samples, info.annotations],
            );
            verification.note("quick check: the version, its digest and its counts were read from the database; no row was read");
            return Ok(if stored == expected {
                Vec::new()
            } else {
                vec![format!(
                    "the label database contains {stored:?} classes, samples and annotations of {set}:{version}, not {expected:?}"
                )]
            });
        }
        let folder = match place {
            StorageLocation::Folder { path } => path.clone(),
            StorageLocation::Registry { .. } => self.dir_of(&incoming.artifact),
        };
        let (sender, mut receiver) = mpsc::channel::<Rows>(LABEL_BATCHES_QUEUED_MAX);
        let comparing = self.threads.spawn(move || {
            let mut compare = Compare::new(&folder);
            while let Some(rows) = receiver.blocking_recv() {
                compare.rows(&rows);
            }
            Ok(compare.finish())
        });
        let exported = self.engine.export(set, version, sender).await;
        let mut found = join_thread(comparing).await?;
        let exported = exported?;
        if exported != held && found.is_empty() {
            found.push(format!(
                "the rows of {set}:{version} were changed since they were committed: the hash of the annotations is {}, not {}",
                exported.rows_digest, held.rows_digest
            ));
        }
        Ok(found)
    }

    async fn remove(
        &self,
        artifact: &ArtifactRef,
        _info: Option<&KindInfo>,
    ) -> Result<Option<String>, Fault> {
        self.engine
            .remove(artifact.name(), artifact.version())
            .await?;
        let stored_dir = self.dir_of(artifact);
        self.change_stored(move || {
            durable::remove_all(&stored_dir)?;
            // The directory of the name is removed with its last version.
            let _ = stored_dir.parent().map(std::fs::remove_dir);
            Ok(None)
        })
        .await
    }

    async fn probe(&self) -> Result<String, Fault> {
        self.engine.probe().await
    }

    async fn tend(&self) -> Result<(), Fault> {
        self.engine.tend().await
    }

    async fn leave(&self) {
        self.engine.leave().await;
    }
}

impl LabelsSink {
    fn new_version(&self, incoming: &Incoming, dir: &Path) -> Result<NewVersion, Fault> {
        Ok(NewVersion {
            set: incoming.artifact.name().into(),
            version: incoming.artifact.version().into(),
            digest: incoming.digest,
            dir: dir.into(),
            info: labels_info(incoming)?.clone(),
            transfer: incoming.transfer.clone(),
            replaces: false,
            waits: incoming.waits.clone(),
        })
    }
}

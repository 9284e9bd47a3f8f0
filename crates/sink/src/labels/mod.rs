//! The labels sink: label sets as rows in a database, and rows as label sets again.
//!
//! Called by the transfer engine through [`Sink`], and by publishing out of a database through
//! [`LabelsSink::export_canonical`]. Two engines stand behind one trait: `postgres` and `sqlite`,
//! the embedded default. Readers use two views, `annotations` and `current_annotations` (in
//! Postgres in the schema `packhorse`), and see the old version's rows or the new one's, never a
//! mix.
//!
//! # The tables
//! `label_set`, `label_version`, `label_active` (one row a set: the switch), `label_class`,
//! `version_sample` and `annotation`; in Postgres the last two are partitioned by version. Samples
//! belong to a version and are not shared between versions by content hash: two versions may say
//! different things of one image, an unbound sample has no hash, and a shared table would make
//! every commit write rows that others read and every removal look for orphans. An annotation names
//! its sample by line number, which a walk over the two sorted files finds without any lookup.
//!
//! # Byte for byte
//! An export gives back the very bytes of the canonical files, so that the same rows have the same
//! digest anywhere. JSON values are therefore kept as text: in Postgres in columns of the type
//! `json`, which keeps its input verbatim and can be queried with `->` and `->>` all the same.
//! `jsonb` would reorder keys, drop repeated ones, rewrite numbers, and refuse `\u0000`; whoever
//! wants its operators casts, or indexes the cast. In SQLite they are `TEXT`, for its JSON
//! functions. Box numbers are doubles, which print in one way only; a line that does not come out
//! the same is refused.
//!
//! # What survives a crash
//! Rows are committed first, then the staged folder is renamed to
//! `<data_dir>/labels/<name>/<version>/`, where the canonical files serve later transfers as a
//! source of chunks. After a crash between the two the engine asks again, finds the rows with the
//! same digest, and only renames. What a crash leaves in the database is described in `postgres`;
//! in SQLite it leaves nothing.

mod canonical;
mod compare;
mod copy;
mod engine;
mod postgres;
mod query;
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
use self::engine::{Engine, NewVersion, Rows, StoredVersion, joined, not_held};
use super::{Incoming, Landed, Look, Sink, StorageLocation, Threads, nothing_staged};
use crate::settings;
use base::durable;
use base::fault::{Fault, IoContext};
use base::limits::LABEL_BATCHES_QUEUED_MAX;
use base::names::{ArtifactRef, Kind, RelPath};
use content::label_rows::QueryRow;
use content::manifest::{KindInfo, LabelsInfo};

/// Label sets in a database.
pub struct LabelsSink {
    engine: Box<dyn Engine>,
    staging: PathBuf,
    kept: PathBuf,
    threads: Threads,
    /// StoredVersion by the thread that changes what lies below `kept`.
    changing: Arc<Mutex<()>>,
}

/// A version whose canonical files were written out of the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// The digest, hex, of the artifact that it was committed as.
    pub digest: String,
    /// Lines of `classes.jsonl`.
    pub classes: u64,
    /// Lines of `samples.jsonl`.
    pub samples: u64,
    /// Lines of `annotations.jsonl`.
    pub annotations: u64,
}

/// Opens the sink that the config names, or SQLite at `<data_dir>/labels.db`. Nothing is connected
/// yet, so a database that is down does not stop the daemon; a password file that cannot be read
/// does.
pub fn open(cfg: Option<&settings::LabelsSink>, data_dir: &Path) -> Result<Arc<LabelsSink>, Fault> {
    let data_dir = std::path::absolute(data_dir).at(format_args!("find {}", data_dir.display()))?;
    let threads = Threads::new("sink labels");
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
                "the url of [sink.labels] begins with neither postgres:// nor sqlite://",
            )
            .with_next(
                "write postgres://user@host:port/database or sqlite:///absolute/path/labels.db",
            ));
        }
    };
    let (staging, kept) = (
        data_dir.join("staging").join("labels"),
        data_dir.join("labels"),
    );
    durable::create_dir_all(&staging)?;
    Ok(Arc::new(LabelsSink {
        engine,
        staging,
        kept,
        threads,
        changing: Arc::default(),
    }))
}

fn labels_info(incoming: &Incoming) -> Result<&LabelsInfo, Fault> {
    match &incoming.root.info {
        KindInfo::Labels(info) if incoming.artifact.kind == Kind::Labels => Ok(info),
        _ => Err(Fault::integrity(format!(
            "the manifest of {} is not that of labels",
            incoming.artifact
        ))
        .with_next("publish it again under its own kind")),
    }
}

impl LabelsSink {
    fn kept_folder(&self, artifact: &ArtifactRef) -> PathBuf {
        self.kept.join(artifact.name()).join(artifact.version())
    }

    /// Changes kept folders, one change at a time. The thread has the lock, because it goes on when
    /// its caller is dropped.
    async fn change_kept<R: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<R, Fault> + Send + 'static,
    ) -> Result<R, Fault> {
        let lock = self.changing.clone().lock_owned().await;
        let work = move || {
            let _lock = lock;
            work()
        };
        self.threads.run(work).await
    }

    /// Waits for the change that a caller left running: until its end the staged folder may go any
    /// moment. A sink promises that a commit may be given up and repeated; the daemon itself gives
    /// one up only when it ends.
    async fn settled(&self) {
        drop(self.changing.lock().await);
    }

    /// The active version of a label set, for publishing "what is current".
    pub async fn active_version(&self, label_set: &str) -> Result<Option<String>, Fault> {
        self.engine.active(label_set).await
    }

    /// Sends the rows of a query from one consistent snapshot, in any order: `source::labels` puts
    /// them in order and checks them. The query can only read, and returns columns of
    /// [`content::label_rows::QUERY_COLUMNS`].
    pub async fn query(&self, sql: &str, out: mpsc::Sender<Vec<QueryRow>>) -> Result<(), Fault> {
        self.engine.query(sql, out).await
    }

    /// Writes the canonical files of a version that the database holds into `dir`, from one
    /// consistent snapshot: the same bytes that were loaded. Not synced.
    pub async fn export_canonical(
        &self,
        label_set: &str,
        version: &str,
        dir: &Path,
    ) -> Result<Exported, Fault> {
        let Some(held) = self.engine.held(label_set, version).await? else {
            return Err(not_held(label_set, version));
        };
        let (sender, mut receiver) = mpsc::channel::<Rows>(LABEL_BATCHES_QUEUED_MAX);
        let dir = dir.to_path_buf();
        let writer = self.threads.spawn(move || {
            std::fs::create_dir_all(&dir).at(format_args!("make the folder {}", dir.display()))?;
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
        // The writer's fault is the cause when both failed: a full disk, say.
        joined(writer).await?;
        if exported? != held {
            return Err(Fault::integrity(format!(
                "the rows of {label_set}:{version} are no longer those that were committed"
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

    /// The canonical files move to where they are kept.
    async fn keep(&self, artifact: &ArtifactRef, staged: &Path) -> Result<StorageLocation, Fault> {
        let kept = self.kept_folder(artifact);
        let (from, to) = (staged.to_path_buf(), kept.clone());
        self.change_kept(move || {
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
            // What an earlier commit of this version kept (its rows were dropped by hand since) is
            // only a copy.
            durable::remove_all(&to)?;
            if let Some(parent) = to.parent() {
                durable::create_dir_all(parent)?;
            }
            durable::rename_noreplace(&from, &to)
        })
        .await?;
        Ok(StorageLocation::Folder { path: kept })
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
        self.engine.prepare(incoming.root.totals.bytes).await?;
        let artifact = &incoming.artifact;
        match self
            .engine
            .held(artifact.name(), artifact.version())
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
        (!known)
            .then(|| "labels consist of annotations.jsonl, classes.jsonl and samples.jsonl".into())
    }

    async fn commit(&self, incoming: &Incoming, staged: &Path) -> Result<Landed, Fault> {
        let artifact = &incoming.artifact;
        let new = self.new_version(incoming, staged)?;
        self.settled().await;
        // Again, because the database may be another than the one that was checked, hours ago.
        self.engine.prepare(0).await?;
        let (set, version) = (artifact.name(), artifact.version());
        // A version is staged again when something of it was found gone or changed, or when a crash
        // came right behind the load. Either way its rows are made anew, and readers of the series
        // stay where they were.
        let looked = staged.to_owned();
        let is_staged = self
            .threads
            .run(move || looked.try_exists().at_sink(looked.display()))
            .await?;
        let stood = is_staged
            && self
                .engine
                .held(set, version)
                .await?
                .is_some_and(|held| held.digest == incoming.digest.hex());
        let active = if stood {
            self.engine.active(set).await?
        } else {
            None
        };
        if stood {
            self.engine.supersede(set, version).await?;
        }
        self.engine.load(&new).await?;
        if let Some(active) = active.filter(|active| active != version) {
            self.engine.activate(set, &active).await?;
        }
        let place = self.keep(artifact, staged).await?;
        Ok(Landed {
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
                "labels are kept in a folder, not in a registry",
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

    async fn stands(&self, incoming: &Incoming) -> Result<bool, Fault> {
        let held = self
            .engine
            .held(incoming.artifact.name(), incoming.artifact.version())
            .await?;
        Ok(held.is_some_and(|held| held.digest == incoming.digest.hex()))
    }

    async fn verify(
        &self,
        incoming: &Incoming,
        place: &StorageLocation,
        look: &Look,
    ) -> Result<Vec<String>, Fault> {
        let (set, version) = (incoming.artifact.name(), incoming.artifact.version());
        let Some(held) = self.engine.held(set, version).await? else {
            return Ok(vec![format!(
                "the label database does not hold {set}:{version}"
            )]);
        };
        if held.digest != incoming.digest.hex() {
            return Ok(vec![format!(
                "the label database holds {set}:{version} with the digest {}, not {}",
                held.digest, incoming.digest
            )]);
        }
        if look.quick {
            let info = labels_info(incoming)?;
            let (holds, says) = (
                [held.classes, held.samples, held.annotations],
                [info.classes, info.samples, info.annotations],
            );
            look.note("quick check: the database was asked for the version, its digest and its counts; no row was read");
            return Ok(if holds == says {
                Vec::new()
            } else {
                vec![format!(
                    "the label database holds {holds:?} classes, samples and annotations of {set}:{version}, not {says:?}"
                )]
            });
        }
        let folder = match place {
            StorageLocation::Folder { path } => path.clone(),
            StorageLocation::Registry { .. } => self.kept_folder(&incoming.artifact),
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
        let mut found = joined(comparing).await?;
        let exported = exported?;
        if exported != held && found.is_empty() {
            found.push(format!(
                "the rows of {set}:{version} are not those that were committed: annotations hash to {}, not {}",
                exported.rows_digest, held.rows_digest
            ));
        }
        Ok(found)
    }

    async fn remove(&self, artifact: &ArtifactRef) -> Result<Option<String>, Fault> {
        self.engine
            .remove(artifact.name(), artifact.version())
            .await?;
        let kept = self.kept_folder(artifact);
        self.change_kept(move || {
            durable::remove_all(&kept)?;
            // The folder of the name goes with its last version.
            let _ = kept.parent().map(std::fs::remove_dir);
            Ok(None)
        })
        .await
    }

    async fn probe(&self) -> Result<String, Fault> {
        self.engine.probe().await
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
            waits: incoming.waits.clone(),
        })
    }
}

//! Labels in an SQLite file: the embedded default.
//!
//! A commit is one transaction (WAL, `synchronous=FULL`): a reader sees the rows of the old version
//! or of the new one, and a crash leaves the old rows. Dirty pages are written to the WAL, so
//! memory stays bounded; afterwards the WAL is truncated. Inside the daemon a mutex allows one
//! writer at a time, between processes the lock of SQLite does; readers never wait. The file must
//! not be on a network filesystem, where the locks and the shared memory of SQLite do not work.

mod connection;
mod insert;

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use futures::TryStreamExt;
use sqlx::migrate::MigrateError;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteRow, SqliteSynchronous};
use sqlx::{
    AssertSqlSafe, Column as _, ConnectOptions, Connection, Executor as _, Row, SqlSafeStr as _,
    SqliteConnection, Statement as _, TypeInfo as _, ValueRef as _,
};
use tokio::sync::mpsc;

use super::canonical::Table;
use super::engine::{Batcher, Engine, NewVersion, Rows, StoredVersion, not_held};
use super::query::{self, Batch};
use super::row_mapping::{self, LabelRow};
use crate::{Threads, Waits};
use base::fault::{Fault, IoContext, Reason, Retry};
use base::limits::LABEL_WRITER_WAIT_MAX;
use connection::FileId;
use content::label_rows::{ClassRow, QueryRow};

const HELD: &str = "SELECT v.manifest_digest, v.n_classes, v.n_samples, v.n_annotations, v.rows_digest, v.id
    FROM label_version v JOIN label_set s ON s.id = v.label_set_id WHERE s.name = ? AND v.version = ?";
const COUNT: &str = "SELECT (SELECT count(*) FROM label_class WHERE version_id = ?1),
    (SELECT count(*) FROM version_sample WHERE version_id = ?1), (SELECT count(*) FROM annotation WHERE version_id = ?1)";
const EXPORT_CLASSES: &str =
    "SELECT class_id, name, attrs FROM label_class WHERE version_id = ? ORDER BY class_id";
const EXPORT_SAMPLES: &str = "SELECT sample_no, path, hash, width, height, split, meta FROM version_sample WHERE version_id = ? ORDER BY sample_no";
const EXPORT_ANNOTATIONS: &str = "SELECT n.ann_no, i.path, n.class_id, n.kind, n.x, n.y, n.w, n.h, n.geom, n.attrs, n.raw
    FROM annotation n JOIN version_sample i ON i.version_id = n.version_id AND i.sample_no = n.sample_no
    WHERE n.version_id = ? ORDER BY n.ann_no";

/// An SQLite file. At most one idle connection is open between two calls.
pub(super) struct Sqlite {
    file: PathBuf,
    options: SqliteConnectOptions,
    writer: tokio::sync::Mutex<()>,
    /// An idle connection to this file: with the last connection, SQLite would remove the files
    /// beside the database, without which a user who may not write there cannot read it.
    keeper: tokio::sync::Mutex<Option<(SqliteConnection, FileId)>>,
    threads: Threads,
}

impl Sqlite {
    /// Sets the path of the file; does not open it.
    pub(super) fn new(file: &Path, threads: Threads) -> Self {
        let options = SqliteConnectOptions::new()
            .filename(file)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(LABEL_WRITER_WAIT_MAX)
            .foreign_keys(false) // the reader of the canonical files checks more
            .disable_statement_logging();
        Self {
            file: file.into(),
            options,
            writer: tokio::sync::Mutex::new(()),
            keeper: tokio::sync::Mutex::new(None),
            threads,
        }
    }

    async fn run(
        &self,
        conn: &mut SqliteConnection,
        what: &str,
        sql: &'static str,
    ) -> Result<(), Fault> {
        sqlx::raw_sql(sql)
            .execute(conn)
            .await
            .map_err(|e| self.fault(what, &e))?;
        Ok(())
    }

    /// Classifies an error by its primary result code (SQLite documentation, "Result and Error
    /// Codes").
    fn fault(&self, what: &str, error: &sqlx::Error) -> Fault {
        let place = self.file.display();
        let Some(database) = error.as_database_error() else {
            return match error {
                sqlx::Error::Io(e) => Fault::io(format_args!("{place} ({what})"), e),
                other => Fault::internal(format!("{place} ({what}): {other}")),
            };
        };
        let message = format!("{place} ({what}): {}", database.message());
        let code: u32 = database.code().and_then(|c| c.parse().ok()).unwrap_or(0);
        match code & 0xff {
            5 | 6 => Fault::unreachable(message)
                .with_next("another program writes to the file; this is retried automatically"),
            3 | 8 | 14 | 23 => Fault::not_allowed(message)
                .with_next("give the daemon's user write permission for the file and its directory"),
            13 => Fault::no_space(message),
            10 => Fault::internal(message).with_reason(Reason::SinkUnavailable),
            11 | 26 => Fault::integrity(message)
                .with_reason(Reason::SinkRefused)
                .with_next("the file is damaged: move it to another location, then deliver the labels again"),
            18..=20 => Fault::integrity(message),
            _ => Fault::internal(format!("{message} ({code})")),
        }
    }

    async fn migrate(&self) -> Result<(), Fault> {
        // The migration lock of sqlx does nothing for SQLite, so a lock file serialises two
        // processes.
        let lock_path = self.file.with_added_extension("migrate-lock");
        let what = format!("lock {} for migrations", self.file.display());
        let lock = move || {
            let file = std::fs::File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&lock_path)
                .at(&what)?;
            rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
                .map_err(std::io::Error::from)
                .at(&what)?;
            Ok(file)
        };
        let lock = self.threads.run(lock).await?;
        let mut conn = self.connect().await?;
        match sqlx::migrate!("../../migrations/labels-sqlite")
            .run_direct(None, &mut conn, false)
            .await
        {
            Ok(()) => {}
            Err(MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) => {
                return Err(self.fault("migrate", &error));
            }
            Err(error) => {
                return Err(Fault::config(format!(
                    "{} was created by another program or by a newer version: {error}",
                    self.file.display()
                ))
                .with_retry(Retry::Never)
                .with_next("run the version of packhorse that created it, or a newer one"));
            }
        }
        self.close(conn).await;
        drop(lock);
        Ok(())
    }

    async fn held_on(
        &self,
        conn: &mut SqliteConnection,
        set: &str,
        version: &str,
    ) -> Result<Option<(i64, StoredVersion)>, Fault> {
        let what = "look up the version";
        let row = sqlx::query(HELD)
            .bind(set)
            .bind(version)
            .fetch_optional(conn)
            .await
            .map_err(|e| self.fault(what, &e))?;
        row.as_ref()
            .map(row_mapping::stored_version)
            .transpose()
            .map_err(|e| self.fault(what, &e))
    }

    async fn load_in(&self, conn: &mut SqliteConnection, new: &NewVersion) -> Result<(), Fault> {
        let what = "add the version";
        let mut replaced = None;
        if let Some((id, held)) = self.held_on(conn, &new.set, &new.version).await? {
            if held.digest != new.digest.hex() {
                return Err(new.conflict(&held.digest));
            }
            if !new.replaces {
                return Ok(());
            }
            let row: (bool, Option<String>) = sqlx::query_as(
                "SELECT EXISTS (SELECT 1 FROM label_active WHERE version_id = ?1),
                 (SELECT transfer FROM label_request WHERE version_id = ?1)",
            )
            .bind(id)
            .fetch_one(&mut *conn)
            .await
            .map_err(|e| self.fault(what, &e))?;
            self.remove_in(conn, id).await?;
            replaced = Some(row);
        }
        let set =
            sqlx::query("INSERT INTO label_set (name) VALUES (?) ON CONFLICT (name) DO NOTHING")
                .bind(&new.set);
        set.execute(&mut *conn)
            .await
            .map_err(|e| self.fault(what, &e))?;
        let id: i64 = sqlx::query_scalar(
            "INSERT INTO label_version (label_set_id, version, manifest_digest)
             SELECT id, ?, ? FROM label_set WHERE name = ? RETURNING id",
        )
        .bind(&new.version)
        .bind(new.digest.hex())
        .bind(&new.set)
        .fetch_one(&mut *conn)
        .await
        .map_err(|e| self.fault(what, &e))?;
        self.fill(conn, new, id).await?;
        let (was_active, requested) = replaced.unzip();
        let transfer = requested.flatten().max(Some(new.transfer.to_string()));
        sqlx::query("INSERT INTO label_request (version_id, transfer) VALUES (?, ?)")
            .bind(id)
            .bind(&transfer)
            .execute(&mut *conn)
            .await
            .map_err(|e| self.fault(what, &e))?;
        // Of two versions, the one that was requested later is active, also if it was loaded first.
        let switch = "INSERT INTO label_active (label_set_id, version_id) SELECT label_set_id, id FROM label_version WHERE id = ?1
             ON CONFLICT (label_set_id) DO UPDATE SET version_id = excluded.version_id
             WHERE coalesce(?2, NOT EXISTS (SELECT 1 FROM label_request r WHERE r.version_id = label_active.version_id AND r.transfer > ?3))";
        sqlx::query(switch)
            .bind(id)
            .bind(was_active)
            .bind(&transfer)
            .execute(&mut *conn)
            .await
            .map_err(|e| self.fault("switch to the new version", &e))?;
        Ok(())
    }

    /// Removes the rows of a version. If it was the active one, the remaining version that was
    /// requested last becomes active.
    async fn remove_in(&self, conn: &mut SqliteConnection, id: i64) -> Result<(), Fault> {
        let statements = [
            "DELETE FROM annotation WHERE version_id = ?",
            "DELETE FROM version_sample WHERE version_id = ?",
            "DELETE FROM label_class WHERE version_id = ?",
            "DELETE FROM label_active WHERE version_id = ?",
            "INSERT INTO label_active (label_set_id, version_id)
             SELECT v.label_set_id, v.id FROM label_version v LEFT JOIN label_request r ON r.version_id = v.id
             WHERE v.id <> ?1 AND v.label_set_id = (SELECT label_set_id FROM label_version WHERE id = ?1)
             ORDER BY coalesce(r.transfer, '') DESC, v.id DESC LIMIT 1 ON CONFLICT (label_set_id) DO NOTHING",
            "DELETE FROM label_request WHERE version_id = ?",
            "DELETE FROM label_version WHERE id = ?",
        ];
        for sql in statements {
            sqlx::query(sql)
                .bind(id)
                .execute(&mut *conn)
                .await
                .map_err(|e| self.fault("remove the rows", &e))?;
        }
        Ok(())
    }

    async fn export_in(
        &self,
        conn: &mut SqliteConnection,
        set: &str,
        version: &str,
        out: mpsc::Sender<Rows>,
    ) -> Result<StoredVersion, Fault> {
        let Some((id, held)) = self.held_on(conn, set, version).await? else {
            return Err(not_held(set, version));
        };
        let read = |e: sqlx::Error| self.fault("read the rows", &e);
        let mut batcher = Batcher::new(out);

        let mut rows = sqlx::query(EXPORT_CLASSES).bind(id).fetch(&mut *conn);
        let mut number = 0;
        while let Some(row) = rows.try_next().await.map_err(read)? {
            let class = row_mapping::class(&row).map_err(read)?;
            batcher
                .push(Table::Classes, number, |out| class.write(out))
                .await?;
            number += 1;
        }
        drop(rows);

        let mut rows = sqlx::query(EXPORT_SAMPLES).bind(id).fetch(&mut *conn);
        while let Some(row) = rows.try_next().await.map_err(read)? {
            let (no, sample) = row_mapping::sample(&row).map_err(read)?;
            batcher
                .push(Table::Samples, no.unsigned_abs(), |out| sample.write(out))
                .await?;
        }
        drop(rows);

        let mut rows = sqlx::query(EXPORT_ANNOTATIONS).bind(id).fetch(&mut *conn);
        while let Some(row) = rows.try_next().await.map_err(read)? {
            let (no, annotation) = row_mapping::annotation(&row).map_err(read)?;
            batcher
                .push(Table::Annotations, no.unsigned_abs(), |out| {
                    annotation.write(out);
                })
                .await?;
        }
        drop(rows);
        let ([classes, samples, annotations], rows_digest) = batcher.finish().await?;
        Ok(StoredVersion {
            digest: held.digest,
            classes,
            samples,
            annotations,
            rows_digest: rows_digest.hex(),
        })
    }
}

// Unchecked: a column may contain other data, and `verify` must report the difference instead of a
// read error.
impl LabelRow for SqliteRow {
    fn int(&self, at: usize) -> sqlx::Result<i64> {
        self.try_get_unchecked(at)
    }

    fn optional_int(&self, at: usize) -> sqlx::Result<Option<i64>> {
        self.try_get_unchecked(at)
    }

    fn optional_float(&self, at: usize) -> sqlx::Result<Option<f64>> {
        self.try_get_unchecked(at)
    }

    fn text(&self, at: usize) -> sqlx::Result<&str> {
        self.try_get_unchecked(at)
    }

    fn optional_text(&self, at: usize) -> sqlx::Result<Option<&str>> {
        self.try_get_unchecked(at)
    }
}

/// A value as JSON, by its own type instead of that of its column: a cast to text would round a
/// number.
fn value_of(row: &SqliteRow, at: usize) -> sqlx::Result<Option<String>> {
    let raw = row.try_get_raw(at)?;
    if raw.is_null() {
        return Ok(None);
    }
    let json = match raw.type_info().name() {
        "INTEGER" => serde_json::to_string(&row.try_get_unchecked::<i64, _>(at)?),
        // A number that is not finite becomes null.
        "REAL" => serde_json::to_string(&row.try_get_unchecked::<f64, _>(at)?),
        _ => serde_json::to_string(row.try_get_unchecked::<&str, _>(at)?),
    };
    json.map(Some).map_err(|e| sqlx::Error::Decode(e.into()))
}

#[async_trait]
impl Engine for Sqlite {
    async fn prepare(&self, room_bytes: u64, _waits: &Waits) -> Result<(), Fault> {
        let file = self.file.clone();
        let prepare_folder = move || {
            Self::check_filesystem(&file)?;
            if let Some(folder) = file.parent() {
                std::fs::create_dir_all(folder)
                    .at(format_args!("create the directory {}", folder.display()))?;
            }
            Self::check_room(&file, room_bytes)
        };
        self.threads.run(prepare_folder).await?;
        self.migrate().await
    }

    async fn probe(&self) -> Result<String, Fault> {
        let file = self.file.clone();
        self.threads
            .run(move || Self::check_filesystem(&file))
            .await?;
        let place = self.file.display();
        let Some(mut conn) = self.connect_existing().await? else {
            return Ok(format!(
                "sqlite://{place}: will be created by the first commit"
            ));
        };
        let query = sqlx::query_scalar::<_, i64>("SELECT count(*) FROM label_version");
        let held = query
            .fetch_one(&mut conn)
            .await
            .map_err(|e| self.fault("count the versions", &e))?;
        self.close(conn).await;
        Ok(format!("sqlite://{place}: {held} label versions stored"))
    }

    async fn tend(&self) -> Result<(), Fault> {
        if let Some(conn) = self.connect_existing().await? {
            self.close(conn).await;
        }
        Ok(())
    }

    async fn leave(&self) {
        let Some((mut conn, _)) = self.keeper.lock().await.take() else {
            return;
        };
        // A file without a WAL can be read by a user who may not write beside it. While somebody
        // reads, the mode cannot change; then the files stay, because that connection is open.
        let _ = self
            .run(
                &mut conn,
                "leave the WAL mode",
                "PRAGMA busy_timeout = 500; PRAGMA journal_mode = DELETE",
            )
            .await;
        let _ = conn.close().await;
    }

    async fn held(
        &self,
        set: &str,
        version: &str,
        _waits: &Waits,
    ) -> Result<Option<StoredVersion>, Fault> {
        let Some(mut conn) = self.connect_existing().await? else {
            return Ok(None);
        };
        let held = self.held_on(&mut conn, set, version).await?;
        self.close(conn).await;
        Ok(held.map(|(_, held)| held))
    }

    async fn count(&self, set: &str, version: &str) -> Result<Option<[u64; 3]>, Fault> {
        let Some(mut conn) = self.connect_existing().await? else {
            return Ok(None);
        };
        let mut counted = None;
        if let Some((id, _)) = self.held_on(&mut conn, set, version).await? {
            let read = |e: sqlx::Error| self.fault("count the rows", &e);
            let row = sqlx::query(COUNT).bind(id).fetch_one(&mut conn).await;
            counted = Some(row_mapping::counts(&row.map_err(read)?).map_err(read)?);
        }
        self.close(conn).await;
        Ok(counted)
    }

    async fn load(&self, new: &NewVersion) -> Result<(), Fault> {
        let _one_writer = self.writer.lock().await;
        let mut conn = self.connect().await?;
        // Dropping it without a commit, after an error or because the caller was dropped, rolls it
        // back.
        let mut transaction = conn
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(|e| self.fault("begin", &e))?;
        if let Err(fault) = self.load_in(&mut transaction, new).await {
            let _ = transaction.rollback().await;
            return Err(fault);
        }
        // Without statistics, a query for one image would walk all annotations of its version.
        self.run(
            &mut transaction,
            "analyse the tables",
            "PRAGMA analysis_limit = 2000; ANALYZE",
        )
        .await?;
        transaction
            .commit()
            .await
            .map_err(|e| self.fault("commit", &e))?;
        // Frees the space of the WAL. If a reader prevents it, a later commit does it.
        let _ = self
            .run(
                &mut conn,
                "truncate the WAL",
                "PRAGMA wal_checkpoint(TRUNCATE)",
            )
            .await;
        self.close(conn).await;
        Ok(())
    }

    async fn active(&self, set: &str) -> Result<Option<String>, Fault> {
        let Some(mut conn) = self.connect_existing().await? else {
            return Ok(None);
        };
        let query = sqlx::query_scalar(
            "SELECT v.version FROM label_active a JOIN label_version v ON v.id = a.version_id
             JOIN label_set s ON s.id = a.label_set_id WHERE s.name = ?",
        );
        let version = query
            .bind(set)
            .fetch_optional(&mut conn)
            .await
            .map_err(|e| self.fault("read the active version", &e))?;
        self.close(conn).await;
        Ok(version)
    }

    async fn activate(&self, set: &str, version: &str) -> Result<bool, Fault> {
        let _one_writer = self.writer.lock().await;
        let Some(mut conn) = self.connect_existing().await? else {
            return Ok(false);
        };
        let query = sqlx::query(
            "UPDATE label_active SET version_id = v.id FROM label_version v, label_set s
             WHERE s.name = ? AND v.version = ? AND v.label_set_id = s.id AND label_active.label_set_id = s.id",
        );
        let done = query
            .bind(set)
            .bind(version)
            .execute(&mut conn)
            .await
            .map_err(|e| self.fault("switch the active version", &e))?;
        self.close(conn).await;
        Ok(done.rows_affected() == 1)
    }

    async fn remove(&self, set: &str, version: &str) -> Result<(), Fault> {
        let _one_writer = self.writer.lock().await;
        let Some(conn) = self.connect_existing().await? else {
            return Ok(());
        };
        self.close(conn).await;
        // An earlier program may have written the rows, and nothing was delivered since.
        self.migrate().await?;
        let mut conn = self.connect().await?;
        let failed = |e: sqlx::Error| self.fault("remove the rows", &e);
        let mut transaction = conn.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
        if let Some((id, _)) = self.held_on(&mut transaction, set, version).await? {
            self.remove_in(&mut transaction, id).await?;
        }
        transaction.commit().await.map_err(failed)?;
        let _ = self
            .run(
                &mut conn,
                "truncate the WAL",
                "PRAGMA wal_checkpoint(TRUNCATE)",
            )
            .await;
        self.close(conn).await;
        Ok(())
    }

    async fn export(
        &self,
        set: &str,
        version: &str,
        out: mpsc::Sender<Rows>,
    ) -> Result<StoredVersion, Fault> {
        let Some(mut conn) = self.connect_existing().await? else {
            return Err(not_held(set, version));
        };
        // One read transaction is one snapshot.
        let mut transaction = conn.begin().await.map_err(|e| self.fault("begin", &e))?;
        let held = self.export_in(&mut transaction, set, version, out).await?;
        transaction
            .commit()
            .await
            .map_err(|e| self.fault("end the export", &e))?;
        self.close(conn).await;
        Ok(held)
    }

    async fn classes(&self, set: &str, version: &str) -> Result<Vec<ClassRow>, Fault> {
        let Some(mut conn) = self.connect_existing().await? else {
            return Ok(Vec::new());
        };
        let mut classes = Vec::new();
        if let Some((id, _)) = self.held_on(&mut conn, set, version).await? {
            let read = |e: sqlx::Error| self.fault("read the classes", &e);
            let mut rows = sqlx::query(EXPORT_CLASSES).bind(id).fetch(&mut conn);
            while let Some(row) = rows.try_next().await.map_err(read)? {
                classes.push(row_mapping::class(&row).map_err(read)?.owned());
            }
        }
        self.close(conn).await;
        Ok(classes)
    }

    async fn query(&self, sql: &str, out: mpsc::Sender<Vec<QueryRow>>) -> Result<(), Fault> {
        match self.connect_existing().await? {
            Some(conn) => self.close(conn).await,
            None => {
                return Err(Fault::not_found(format!(
                    "{} contains no labels yet",
                    self.file.display()
                )));
            }
        }
        // Opened read-only, so that no query can write.
        let options = self
            .options
            .clone()
            .read_only(true)
            .create_if_missing(false);
        let mut conn = options
            .connect()
            .await
            .map_err(|e| self.fault("open", &e))?;
        let query_fault = |e: sqlx::Error| query::as_query_fault(self.fault("run the query", &e));
        // One read transaction is one snapshot.
        let mut transaction = conn.begin().await.map_err(|e| self.fault("begin", &e))?;
        let prepared = (&mut *transaction)
            .prepare(AssertSqlSafe(query::without_semicolon(sql)).into_sql_str())
            .await
            .map_err(query_fault)?;
        let plan = query::plan(
            sql,
            prepared.columns().iter().map(|column| column.name()),
            "",
        )?;
        let mut batch = Batch::default();
        let mut rows = sqlx::query(AssertSqlSafe(plan.sql.as_str())).fetch(&mut *transaction);
        while let Some(row) = rows.try_next().await.map_err(query_fault)? {
            let mut cells = QueryRow::default();
            for (at, column) in plan.columns.iter().enumerate() {
                cells[*column] = value_of(&row, at).map_err(query_fault)?;
            }
            if let Some(full) = batch.push(cells)? {
                out.send(full).await.map_err(|_| query::reader_gone())?;
            }
        }
        drop(rows);
        out.send(batch.finish())
            .await
            .map_err(|_| query::reader_gone())?;
        transaction
            .commit()
            .await
            .map_err(|e| self.fault("end the query", &e))?;
        self.close(conn).await;
        Ok(())
    }

    fn location(&self, set: &str, version: &str) -> String {
        format!(
            "sqlite://{} annotations label_set={set} version={version}",
            self.file.display()
        )
    }
}

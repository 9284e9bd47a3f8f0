//! The SQLite engine: one file, `<data_dir>/catalogue.db`, through sqlx.
//!
//! [`Catalogue::open`](crate::Catalogue::open) opens it. Every write is one transaction, durable
//! when its call returns; after a crash the file holds the last committed transaction (write-ahead
//! log, full sync).
//!
//! The statements are in the common subset of SQLite and PostgreSQL, except for:
//! - `PRAGMA quick_check` and `sqlite_schema` when the file is opened, and `BEGIN IMMEDIATE`:
//!   locking and damage detection are specific to SQLite.
//! - `json_extract` on `run.body`, `transfer.body` and `artifact.place`, with `TOTAL` for sums of
//!   its values: the alternative is one column for each value, written at each progress report.
//! - `json_each` for a list of ids as one parameter (PostgreSQL: `unnest`), and `CROSS JOIN … ON`,
//!   which fixes the order of a join in SQLite.
//! - `WITHOUT ROWID`, `AUTOINCREMENT` and JSON functions in the migrations: each engine has its own
//!   folder of them.

mod access;
mod artifacts;
mod changed;
mod deliveries;
mod events;
mod members;
mod relay;
mod runs;
mod sites;
#[cfg(test)]
mod tests;
mod transfers;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use base::blocking;
use base::clock;
use base::fault::Fault;
use base::space::Space;
use content::chunk::Hash;
use content::manifest::Digest;
use parking_lot::Mutex;
use sqlx::Connection as _;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions,
    SqliteSynchronous,
};

use crate::engine::{Common, Engine};
use crate::events::ArtifactState;
use crate::json;
use crate::malformed::malformed;
use crate::wake::Subject;

/// A file up to this size is checked when it is opened, which reads the complete file.
const CHECKED_BYTES_MAX: u64 = 64 << 20;

/// A catalogue in a SQLite file.
#[derive(Debug)]
pub(crate) struct Sqlite {
    /// One connection: writers wait for it here instead of in SQLite's busy loop.
    write: SqlitePool,
    read: SqlitePool,
    common: Arc<Common>,
    reads: AtomicU64,
}

/// The open catalogues of this process, for messages: an error of SQLite does not name its file. A
/// daemon has one.
static OPENED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
/// A filesystem with less free space than this is full for SQLite, which writes complete pages and
/// extends its log by several pages at a time.
const FULL_BELOW_BYTES: u64 = 256 << 10;

/// The open catalogue whose disk has the least room, and whether that disk is full.
fn fullest() -> Option<(PathBuf, bool)> {
    let room = |path: &PathBuf| {
        path.parent()
            .and_then(|dir| Space::of(dir).ok())
            .and_then(|space| space.bytes)
            .unwrap_or(u64::MAX)
    };
    let files = OPENED.lock();
    // On this thread, because an error is mapped here. It is a local disk (the configuration
    // refuses others), which has just answered SQLite.
    let (room, path) = blocking::may_block(|| files.iter().map(|path| (room(path), path)).min())?;
    Some((path.clone(), room < FULL_BELOW_BYTES))
}

/// An error of the database as a fault. A full disk and a damaged file are distinguished from a
/// defect.
#[expect(
    clippy::needless_pass_by_value,
    reason = "every use is `map_err(fault)`, which gives it by value"
)]
fn fault(error: sqlx::Error) -> Fault {
    let code = match &error {
        sqlx::Error::Database(db) => db
            .code()
            .and_then(|code| code.parse::<i32>().ok())
            .map_or(0, |code| code & 0xff),
        _ => 0,
    };
    if code == 0 {
        return Fault::internal(format!("the catalogue: {error}"));
    }
    let (path, is_full) = fullest().unwrap_or_default();
    let what = format!("the catalogue {}", path.display());
    match code {
        SQLITE_FULL => Fault::no_space(format!("{what}: its disk is full")).with_next(MAKE_ROOM),
        SQLITE_IOERR | SQLITE_CANTOPEN if is_full => {
            Fault::no_space(format!("{what}: its disk is full: {error}")).with_next(MAKE_ROOM)
        }
        SQLITE_CORRUPT | SQLITE_NOTADB => damaged(&path, &error),
        _ => Fault::internal(format!("{what}: {error}")),
    }
}

const MAKE_ROOM: &str =
    "make room on that disk; transfers continue by themselves, a command must be run again";

// Result codes of SQLite, <https://www.sqlite.org/rescode.html>; the low byte of the extended ones.
const SQLITE_IOERR: i32 = 10;
const SQLITE_CORRUPT: i32 = 11;
const SQLITE_FULL: i32 = 13;
const SQLITE_CANTOPEN: i32 = 14;
const SQLITE_NOTADB: i32 = 26;

/// The file is damaged. Its content exists nowhere else, so it cannot be recreated.
fn damaged(path: &Path, why: impl std::fmt::Display) -> Fault {
    let data_dir = path.parent().unwrap_or(path).display();
    Fault::internal(format!("the catalogue {} is damaged: {why}", path.display())).with_next(format!(
        "stop the daemon and restore the complete directory {data_dir} from a backup; without a backup, 'sqlite3 {} .recover' may \
         save most of it into a new file",
        path.display()
    ))
}

/// A digest from a column.
fn digest_of(bytes: Vec<u8>) -> Option<Digest> {
    bytes.try_into().ok().map(Hash)
}

impl Sqlite {
    /// Opens or creates the catalogue. A schema newer than this program's is refused.
    pub(crate) async fn open(data_dir: &Path, common: Arc<Common>) -> Result<Self, Fault> {
        let path = data_dir.join("catalogue.db");
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(10));
        let length = std::fs::metadata(&path).map_or(0, |meta| meta.len());
        {
            let mut opened = OPENED.lock();
            if !opened.contains(&path) {
                opened.push(path.clone());
            }
        }
        let open = |e: sqlx::Error| fault(e);
        let write = SqlitePoolOptions::new()
            .max_connections(1)
            // A failed commit, for example on a full disk, leaves a connection in a transaction
            // that cannot be ended.
            .before_acquire(|connection, _| {
                Box::pin(async move { Ok(!connection.is_in_transaction()) })
            })
            .connect_with(options.clone())
            .await
            .map_err(open)?;
        if (1..=CHECKED_BYTES_MAX).contains(&length) {
            let found: (String,) = sqlx::query_as("PRAGMA quick_check(1)")
                .fetch_one(&write)
                .await
                .map_err(open)?;
            if found.0 != "ok" {
                return Err(damaged(&path, found.0.replace('\n', " ")));
            }
            // sqlx panics on the name of a column that is not UTF-8.
            let schema: Vec<(Option<Vec<u8>>,)> =
                sqlx::query_as("SELECT CAST(sql AS BLOB) FROM sqlite_schema")
                    .fetch_all(&write)
                    .await
                    .map_err(open)?;
            if schema
                .iter()
                .flat_map(|(sql,)| sql)
                .any(|sql| std::str::from_utf8(sql).is_err())
            {
                return Err(damaged(&path, "its schema is not UTF-8"));
            }
        }
        sqlx::migrate!("../../migrations/catalogue")
            .run(&write)
            .await
            .map_err(|e| match e {
                sqlx::migrate::MigrateError::VersionMissing(_)
                | sqlx::migrate::MigrateError::VersionMismatch(_) => Fault::config(format!(
                    "{}: it was written by a newer packhorse",
                    path.display()
                ))
                .with_next("start the newer program"),
                sqlx::migrate::MigrateError::Execute(e)
                | sqlx::migrate::MigrateError::ExecuteMigration(e, _) => open(e),
                other => Fault::internal(format!("{}: {other}", path.display())),
            })?;
        let read = SqlitePoolOptions::new()
            .max_connections(2)
            .connect_with(options.read_only(true))
            .await
            .map_err(open)?;
        Ok(Self {
            write,
            read,
            common,
            reads: AtomicU64::new(0),
        })
    }

    /// The connections for statements that only read.
    fn read(&self) -> &SqlitePool {
        self.reads.fetch_add(1, Ordering::Relaxed);
        &self.read
    }

    /// Begins a transaction that writes. It has no effect unless it is committed.
    async fn begin(&self) -> Result<Write, Fault> {
        let tx = self
            .write
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(fault)?;
        Ok(Write {
            tx,
            common: self.common.clone(),
            changed: Vec::new(),
        })
    }

    /// The row, if it could be read; see
    /// [`MalformedRows::sound`](crate::malformed::MalformedRows::sound).
    fn sound<T>(&self, table: &'static str, key: &str, row: Result<T, Fault>) -> Option<T> {
        self.common.malformed.sound(table, key, row)
    }
}

#[async_trait]
impl Engine for Sqlite {
    async fn close(&self) {
        self.read.close().await;
        self.write.close().await;
    }

    fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }
}

/// A transaction that writes, and what it changed.
struct Write {
    tx: sqlx::Transaction<'static, sqlx::Sqlite>,
    common: Arc<Common>,
    changed: Vec<Subject>,
}

impl Write {
    /// The connection, for a statement.
    fn db(&mut self) -> &mut SqliteConnection {
        &mut self.tx
    }

    /// Takes the next `count` event numbers. Returns the last of them.
    async fn take_numbers(&mut self, count: i64) -> Result<i64, Fault> {
        let (last,): (i64,) = sqlx::query_as(
            "UPDATE counter SET value = value + $1 WHERE name = 'event' RETURNING value",
        )
        .bind(count)
        .fetch_one(self.db())
        .await
        .map_err(fault)?;
        Ok(last)
    }

    /// Records an event, with what its subject is like now. Returns its number.
    async fn note(
        &mut self,
        what: &'static str,
        name: &str,
        state: String,
        subject: Subject,
    ) -> Result<i64, Fault> {
        let seq = self.take_numbers(1).await?;
        self.note_as(seq, what, name, state, subject).await?;
        Ok(seq)
    }

    /// Records an event about an artifact.
    async fn note_artifact(&mut self, name: &str) -> Result<(), Fault> {
        let found: Option<(i64, Option<String>, Option<String>)> =
            sqlx::query_as("SELECT pinned, changed, location FROM artifact WHERE reference = $1")
                .bind(name)
                .fetch_optional(self.db())
                .await
                .map_err(fault)?;
        let (pinned, changed, location) = found.unwrap_or_default();
        let state = ArtifactState {
            pinned: pinned != 0,
            changed,
            location,
        };
        let state = json("the state of an artifact", &state)?;
        self.note("artifact", name, state, Subject::Artifacts)
            .await
            .map(drop)
    }

    /// Records an event under a number that was taken.
    async fn note_as(
        &mut self,
        seq: i64,
        what: &'static str,
        name: &str,
        state: String,
        subject: Subject,
    ) -> Result<(), Fault> {
        sqlx::query(
            "INSERT INTO event (seq, at_ms, what, name, state) VALUES ($1, $2, $3, $4, $5)",
        )
        .bind(seq)
        .bind(clock::now_ms())
        .bind(what)
        .bind(name)
        .bind(state)
        .execute(self.db())
        .await
        .map_err(fault)?;
        self.changes(subject);
        Ok(())
    }

    /// Wakes the tasks that wait for this subject, after the commit.
    fn changes(&mut self, subject: Subject) {
        if !self.changed.contains(&subject) {
            self.changed.push(subject);
        }
    }

    /// Makes the transaction durable, then wakes the tasks that wait for what it changed.
    async fn commit(self) -> Result<(), Fault> {
        self.tx.commit().await.map_err(fault)?;
        self.common.wakes.wake(&self.changed);
        Ok(())
    }
}

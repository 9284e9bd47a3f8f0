//! The catalogue: what exists, who is there, and what is on its way. SQLite by sqlx, one file
//! `<data_dir>/catalogue.db`.
//!
//! Every write is one transaction that is durable when its call returns; [`Catalogue::changed`]
//! wakes whoever waits for news. The catalogue returns rows; the API makes views of them. Hub and
//! site have the same tables: at a site the transfers are its own, as the hub asked for them.

mod artifacts;
mod changed;
mod deliveries;
mod lists;
mod relay;
mod runs;
mod sites;
mod transfers;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use sqlx::Connection as _;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use tokio::sync::Notify;

pub use artifacts::no_artifact;
pub use artifacts::{ArtifactRow, Offer};
pub use changed::{Changed, PublishedInPlace, what_changed};
pub use deliveries::DeliveryRow;
pub use deliveries::no_delivery;
pub use lists::Counted;
pub use relay::{Forbids, RelayedArtifact};
pub use sites::SiteRow;
pub use transfers::{Adopted, Body, Part, TransferRow, Want};
pub use transfers::{new_delivery_id, new_id, new_run_id};

use base::clock;
use base::fault::Fault;
use base::names::SiteSelector;
use base::space::Space;

/// Whoever waits for news looks again after this long, whatever he was told.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// A file up to this size is checked when it is opened: that reads all of it.
const CHECKED_BYTES_MAX: u64 = 64 << 20;

/// The catalogue. Cheap to clone.
#[derive(Clone)]
pub struct Catalogue {
    /// One connection: writers take turns here and not in SQLite's busy loop.
    write: SqlitePool,
    read: SqlitePool,
    changed: Arc<Notify>,
    /// Who may have what sites publish, as the hub's configuration says; `None`: everybody. It is
    /// not in the file: what counts is what the daemon was started with.
    share_policy: Option<Arc<[SiteSelector]>>,
}

/// The catalogues that this process has open, for messages: an error of SQLite does not say of
/// which file it is. A daemon has one.
static OPENED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
/// A filesystem with less than this is full for SQLite: it writes whole pages, and its log grows by
/// some at a time.
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
    let (room, path) = files.iter().map(|path| (room(path), path)).min()?;
    Some((path.clone(), room < FULL_BELOW_BYTES))
}

/// An error of the database as a fault. A full disk and a damaged file are told from a defect.
#[expect(
    clippy::needless_pass_by_value,
    reason = "every use is `map_err(fault)`, which gives it by value"
)]
pub fn fault(error: sqlx::Error) -> Fault {
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

/// The file is damaged. What it holds is nowhere else, so it cannot be made again.
fn damaged(path: &Path, why: impl std::fmt::Display) -> Fault {
    let data_dir = path.parent().unwrap_or(path).display();
    Fault::internal(format!("the catalogue {} is damaged: {why}", path.display())).with_next(format!(
        "stop the daemon and restore the complete directory {data_dir} from a backup; without a backup, 'sqlite3 {} .recover' may \
         save most of it into a new file",
        path.display()
    ))
}

/// Something that changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRow {
    /// Rises from event to event.
    pub seq: u64,
    /// When.
    pub at_ms: i64,
    /// `transfer`, `artifact`, `site` or `run`.
    pub what: String,
    /// The name or id of what changed.
    pub name: String,
}

impl Catalogue {
    /// Opens or makes the catalogue. A schema newer than this program's is refused.
    pub async fn open(data_dir: &Path) -> Result<Self, Fault> {
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
            // A commit that fails, on a full disk say, leaves a connection in a transaction that it
            // cannot end.
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
            changed: Arc::new(Notify::new()),
            share_policy: None,
        })
    }

    /// Closes the file: all of it is in `catalogue.db` then.
    pub async fn close(&self) {
        self.read.close().await;
        self.write.close().await;
    }

    /// A future that ends when something changed after this call (not after its first poll), or
    /// after a while.
    pub fn changed(&self) -> impl Future<Output = ()> + Send + 'static {
        let changed = self.changed.clone().notified_owned();
        async move {
            let _ = tokio::time::timeout(LOOK_AGAIN, changed).await;
        }
    }

    /// Wakes whoever waits for news.
    pub fn notify(&self) {
        self.changed.notify_waiters();
    }

    /// The newest cursor.
    pub async fn cursor(&self) -> Result<u64, Fault> {
        let (seq,): (i64,) = sqlx::query_as("SELECT COALESCE(MAX(seq), 0) FROM event")
            .fetch_one(&self.read)
            .await
            .map_err(fault)?;
        Ok(seq as u64)
    }

    /// What changed after `since`, oldest first.
    pub async fn events(&self, since: u64, limit: u32) -> Result<Vec<EventRow>, Fault> {
        let rows: Vec<(i64, i64, String, String)> = sqlx::query_as(
            "SELECT seq, at_ms, what, name FROM event WHERE seq > ? ORDER BY seq LIMIT ?",
        )
        .bind(since as i64)
        .bind(i64::from(limit))
        .fetch_all(&self.read)
        .await
        .map_err(fault)?;
        Ok(rows
            .into_iter()
            .map(|(seq, at_ms, what, name)| EventRow {
                seq: seq as u64,
                at_ms,
                what,
                name,
            })
            .collect())
    }

    /// Forgets the oldest events beyond [`base::limits::EVENTS_KEPT`].
    pub async fn trim_events(&self) -> Result<(), Fault> {
        sqlx::query("DELETE FROM event WHERE seq <= (SELECT seq FROM event ORDER BY seq DESC LIMIT 1 OFFSET ?)")
            .bind(base::limits::EVENTS_KEPT)
            .execute(&self.write)
            .await
            .map_err(fault)?;
        Ok(())
    }
}

/// Notes an event in the transaction of the change; returns its number.
async fn note(
    connection: &mut sqlx::SqliteConnection,
    what: &'static str,
    name: &str,
) -> Result<i64, Fault> {
    let done = sqlx::query("INSERT INTO event (at_ms, what, name) VALUES (?, ?, ?)")
        .bind(clock::now_unix_ms() as i64)
        .bind(what)
        .bind(name)
        .execute(connection)
        .await
        .map_err(fault)?;
    Ok(done.last_insert_rowid())
}

#[cfg(test)]
mod tests;

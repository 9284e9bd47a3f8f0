//! The catalogue: what exists, who is there, and what is on its way. SQLite by sqlx, one file `<data_dir>/catalogue.db`.
//!
//! Every write is one transaction that is durable when its call returns; [`Catalogue::changed`] wakes whoever waits for
//! news. Hub and site have the same tables: at a site the transfers are its own, as the hub asked for them.

mod artifacts;
mod changed;
mod deliveries;
mod relay;
mod runs;
mod sites;
mod transfers;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sqlx::Connection as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use tokio::sync::Notify;

pub(crate) use artifacts::no_artifact;
pub use artifacts::{ArtifactRow, Offer};
pub use changed::{Changed, what_changed};
pub use deliveries::DeliveryRow;
pub(crate) use deliveries::no_delivery;
pub use relay::{Forbids, Kept};
pub use transfers::{Body, Part, TransferRow, Want};
pub(crate) use transfers::{new_delivery_id, new_id, new_run_id};

use crate::api::types::Event;
use crate::clock;
use crate::fault::Fault;
use crate::names::SiteSelector;

/// Whoever waits for news looks again after this long, whatever he was told.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// The catalogue. Cheap to clone.
#[derive(Clone)]
pub struct Catalogue {
    /// One connection: writers take turns here and not in SQLite's busy loop.
    write: SqlitePool,
    read: SqlitePool,
    changed: Arc<Notify>,
    /// Who may have what sites publish, as the hub's configuration says; `None`: everybody. It is not in the file: what counts is
    /// what the daemon was started with.
    share_policy: Option<Arc<[SiteSelector]>>,
}

/// An error of the database as a fault; a full disk is told from a defect.
#[expect(clippy::needless_pass_by_value, reason = "every use is `map_err(fault)`, which gives it by value")]
pub(crate) fn fault(error: sqlx::Error) -> Fault {
    if let sqlx::Error::Database(db) = &error {
        // SQLITE_FULL
        if db.code().as_deref() == Some("13") {
            return Fault::no_space(format!("the catalogue: {error}"));
        }
    }
    Fault::internal(format!("the catalogue: {error}"))
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
        let open = |e: sqlx::Error| fault(e).context(path.display());
        let write = SqlitePoolOptions::new()
            .max_connections(1)
            // A commit that fails, on a full disk say, leaves a connection in a transaction that it cannot end.
            .before_acquire(|connection, _| Box::pin(async move { Ok(!connection.is_in_transaction()) }))
            .connect_with(options.clone())
            .await
            .map_err(open)?;
        sqlx::migrate!("migrations/catalogue").run(&write).await.map_err(|e| match e {
            sqlx::migrate::MigrateError::VersionMissing(_) | sqlx::migrate::MigrateError::VersionMismatch(_) => {
                Fault::config(format!("{}: it was written by a newer packhorse", path.display())).with_next("start the newer program")
            }
            other => Fault::internal(format!("{}: {other}", path.display())),
        })?;
        let read = SqlitePoolOptions::new().max_connections(2).connect_with(options.read_only(true)).await.map_err(open)?;
        Ok(Self { write, read, changed: Arc::new(Notify::new()), share_policy: None })
    }

    /// A future that ends when something changed after this call (not after its first poll), or after a while.
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
        let (seq,): (i64,) = sqlx::query_as("SELECT COALESCE(MAX(seq), 0) FROM event").fetch_one(&self.read).await.map_err(fault)?;
        Ok(seq as u64)
    }

    /// The names of what changed after `since`, oldest first: `(seq, at, what, name)`.
    pub async fn events(&self, since: u64, limit: u32) -> Result<Vec<(Event, String)>, Fault> {
        let rows: Vec<(i64, i64, String, String)> =
            sqlx::query_as("SELECT seq, at_ms, what, name FROM event WHERE seq > ? ORDER BY seq LIMIT ?")
                .bind(since as i64)
                .bind(i64::from(limit))
                .fetch_all(&self.read)
                .await
                .map_err(fault)?;
        Ok(rows
            .into_iter()
            .map(|(seq, at, what, name)| (Event { seq: seq as u64, at: time(at), what, body: serde_json::Value::Null }, name))
            .collect())
    }

    /// Forgets the oldest events beyond [`crate::limits::EVENTS_KEPT`].
    pub async fn trim_events(&self) -> Result<(), Fault> {
        sqlx::query("DELETE FROM event WHERE seq <= (SELECT MAX(seq) FROM event) - ?")
            .bind(crate::limits::EVENTS_KEPT)
            .execute(&self.write)
            .await
            .map_err(fault)?;
        Ok(())
    }
}

/// Notes an event in the transaction of the change; returns its number.
async fn note(connection: &mut sqlx::SqliteConnection, what: &'static str, name: &str) -> Result<i64, Fault> {
    let done = sqlx::query("INSERT INTO event (at_ms, what, name) VALUES (?, ?, ?)")
        .bind(clock::now_unix_ms() as i64)
        .bind(what)
        .bind(name)
        .execute(connection)
        .await
        .map_err(fault)?;
    Ok(done.last_insert_rowid())
}

/// Unix milliseconds as RFC 3339.
fn time(ms: i64) -> String {
    jiff::Timestamp::from_millisecond(ms).map(clock::rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests;

//! Labels in PostgreSQL ≥ 15: one partition a version, loaded beside the readers and switched to in one row.
//!
//! # A commit
//! 1. A dedicated connection takes the session advisory lock of the label set, so that one commit at a time works on
//!    it, and drops what an earlier one left behind.
//! 2. `label_version` gets a row in the state `loading`; its id names two tables, `version_sample_v<id>` and
//!    `annotation_v<id>`, with a CHECK on that id.
//! 3. One transaction empties them, copies the rows in (binary, frozen), counts, builds the indexes and analyses.
//! 4. A second attaches them as partitions: thanks to the CHECK without a scan. The views do not show them yet.
//! 5. **Readers who planned before step 4 are waited for.** A session that already holds a lock on the partitioned table
//!    does not learn of a new partition before its transaction ends; with a prepared statement it would read the new
//!    version in `label_active` and find no rows of it. Attaching and switching in one transaction shows just that.
//! 6. A third transaction sets the state to `ready` and changes the one row in `label_active`: the switch.
//!
//! A crash before step 4 leaves a `loading` row and tables that the next commit of the set drops; after it, the next
//! commit goes on at step 5. No DEFAULT partition: with one, each attach would scan it.
//!
//! Every operation has a connection of its own, closed afterwards: they are rare, a COPY that fails cannot poison a
//! pool, and a changed password file is read anew. The server ends a session whose network is gone within a minute, so
//! that its advisory lock does not outlive it.
//!
//! Whoever reads needs `USAGE` on the schema `packhorse` and `SELECT` on its two views, nothing more.

use std::collections::HashSet;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::TryStreamExt;
use sqlx::migrate::MigrateError;
use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, Row};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::canonical::{Annotation, Class, Sample, Table, read_annotations, read_classes, read_samples};
use super::copy::CopyRows;
use super::engine::{Batcher, Engine, Held, NewVersion, Rows, joined, not_held, pump};
use crate::fault::{Fault, Reason};
use crate::limits::{
    LABEL_BATCH_BYTES, LABEL_CONNECT_MAX, LABEL_DDL_TRIES_MAX, LABEL_READERS_WAIT_MAX, LABEL_SILENCE_MAX, LABEL_STATEMENT_MAX,
    LABEL_WRITER_WAIT_MAX,
};

/// Any number of our own: the lock under which the schema is made and migrated.
const MIGRATION_LOCK: i64 = 0x7061_636b_686f_7273;
const VERSION_MIN: u32 = 150_000;
const DDL_LOCK_WAIT: Duration = Duration::from_millis(500);
const READERS_POLL: Duration = Duration::from_millis(50);
/// What tables of a version end with is appended to these.
const PARTITIONED: [&str; 2] = ["packhorse.version_sample", "packhorse.annotation"];

const HELD: &str = "SELECT v.manifest_digest, v.n_classes, v.n_samples, v.n_annotations, v.rows_digest, v.id
    FROM packhorse.label_version v JOIN packhorse.label_set s ON s.id = v.label_set_id
    WHERE s.name = $1 AND v.version = $2 AND v.state = 'ready'";
// Which transactions hold a lock on the partitioned tables now. Everybody may read pg_locks.
const READERS: &str = "SELECT DISTINCT virtualtransaction, pid FROM pg_locks
    WHERE locktype = 'relation' AND granted AND pid IS DISTINCT FROM pg_backend_pid()
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND relation IN ('packhorse.annotation'::regclass, 'packhorse.version_sample'::regclass)";
const EXPORT_CLASSES: &str = "SELECT class_id, name, attrs::text FROM packhorse.label_class WHERE version_id = $1 ORDER BY class_id";
const EXPORT_SAMPLES: &str = "SELECT sample_no, path, hash, width, height, split, meta::text
    FROM packhorse.version_sample WHERE version_id = $1 ORDER BY sample_no";
const EXPORT_ANNOTATIONS: &str = "SELECT n.ann_no, i.path, n.class_id, n.kind, n.x, n.y, n.w, n.h, n.geom::text, n.attrs::text, n.raw::text
    FROM packhorse.annotation n JOIN packhorse.version_sample i ON i.sample_no = n.sample_no AND i.version_id = $1
    WHERE n.version_id = $1 ORDER BY n.ann_no";

/// A PostgreSQL database; nothing is open between two calls.
pub(super) struct Postgres {
    options: PgConnectOptions,
    password_file: Option<PathBuf>,
    /// `postgres://host:port/db`, for people.
    place: String,
}

/// Reads the secret that a file holds, without the line end that editors add.
fn password(file: &Path) -> Result<String, Fault> {
    let text = std::fs::read_to_string(file)
        .map_err(|e| Fault::config(format!("the password file of [sink.labels], {}, cannot be read: {e}", file.display())))?;
    Ok(text.trim_end_matches(['\r', '\n']).into())
}

impl Postgres {
    /// Checks the URL and the password file; does not connect.
    pub(super) fn new(url: &str, password_file: Option<&Path>) -> Result<Self, Fault> {
        let authority = url.split_once("://").map_or("", |(_, rest)| rest).split(['/', '?']).next().unwrap_or("");
        let in_url = authority.rsplit_once('@').is_some_and(|(user, _)| user.contains(':')) || url.contains("password=");
        if in_url {
            return Err(Fault::config("the url of [sink.labels] holds a password")
                .with_next("put the password in a file of mode 0600 and name it as password_file"));
        }
        // The parser's own error could repeat the URL.
        let options = PgConnectOptions::from_str(url)
            .map_err(|_| Fault::config("the url of [sink.labels] is not of the form postgres://user@host:port/database"))?
            .application_name("packhorse")
            .disable_statement_logging();
        if let Some(file) = password_file {
            password(file)?;
        }
        let database = options.get_database().unwrap_or(options.get_username());
        let place = match options.get_socket() {
            Some(socket) => format!("postgres:///{database}?host={}", socket.display()),
            None => format!("postgres://{}:{}/{database}", options.get_host(), options.get_port()),
        };
        Ok(Self { place, options, password_file: password_file.map(Into::into) })
    }

    async fn connect(&self) -> Result<PgConnection, Fault> {
        let mut options = self.options.clone();
        if let Some(file) = self.password_file.clone() {
            let secret = joined(tokio::task::spawn_blocking(move || password(&file))).await?;
            options = options.password(&secret);
        }
        let mut conn = match tokio::time::timeout(LABEL_CONNECT_MAX, options.connect()).await {
            Ok(Ok(conn)) => conn,
            Ok(Err(error)) => return Err(self.fault("connect", &error)),
            Err(_) => {
                return Err(Fault::unreachable(format!("{} did not answer in {} s", self.place, LABEL_CONNECT_MAX.as_secs())));
            }
        };
        let version = conn.server_version_num().unwrap_or(0);
        if version < VERSION_MIN {
            return Err(Fault::not_allowed(format!("{} is PostgreSQL {}; 15 or newer is needed", self.place, version / 10_000))
                .with_next("name a newer server in [sink.labels]"));
        }
        let session = format!(
            "SET lock_timeout = {}; SET client_min_messages = warning; SET TimeZone = 'UTC';
             SET tcp_keepalives_idle = 20; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 4",
            LABEL_WRITER_WAIT_MAX.as_millis()
        );
        self.run(&mut conn, "set up the session", session).await?;
        Ok(conn)
    }

    /// A future of the driver, bounded in time, its error classed.
    async fn within<T>(&self, what: &str, limit: Duration, future: impl Future<Output = sqlx::Result<T>>) -> Result<T, Fault> {
        match tokio::time::timeout(limit, future).await {
            Ok(result) => result.map_err(|e| self.fault(what, &e)),
            Err(_) => Err(Fault::unreachable(format!("{} did not answer in {} s ({what})", self.place, limit.as_secs()))),
        }
    }

    /// Runs statements without parameters. Only numbers of our own are ever put into them.
    async fn run(&self, conn: &mut PgConnection, what: &str, sql: String) -> Result<(), Fault> {
        self.within(what, LABEL_STATEMENT_MAX, sqlx::raw_sql(AssertSqlSafe(sql)).execute(conn)).await?;
        Ok(())
    }

    /// Runs a transaction that needs a lock which readers may hold, several times, each time waiting only briefly:
    /// new readers queue up behind whoever waits for such a lock.
    async fn change_tables(&self, conn: &mut PgConnection, what: &str, sql: &str) -> Result<(), Fault> {
        let script = format!("BEGIN; SET LOCAL lock_timeout = {}; {sql}; COMMIT", DDL_LOCK_WAIT.as_millis());
        let mut pause = Duration::from_millis(100);
        for tries in 1.. {
            let result = tokio::time::timeout(LABEL_STATEMENT_MAX, sqlx::raw_sql(AssertSqlSafe(script.clone())).execute(&mut *conn)).await;
            let error = match result {
                Ok(Ok(_)) => break,
                Ok(Err(error)) => error,
                Err(_) => return Err(Fault::unreachable(format!("{} did not answer ({what})", self.place))),
            };
            let locked = error.as_database_error().and_then(|e| e.code()).is_some_and(|code| code == "55P03" || code == "40P01");
            if !locked || tries == LABEL_DDL_TRIES_MAX {
                return Err(self.fault(what, &error));
            }
            self.run(conn, what, "ROLLBACK".into()).await?;
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        Ok(())
    }

    async fn close(&self, conn: PgConnection) {
        // All is committed by now; a connection that cannot say goodbye is no fault.
        let _ = tokio::time::timeout(LABEL_CONNECT_MAX, conn.close()).await;
    }

    /// Classes an error by its SQLSTATE (PostgreSQL documentation, appendix A).
    pub(super) fn fault(&self, what: &str, error: &sqlx::Error) -> Fault {
        let place = &self.place;
        let user = self.options.get_username();
        let Some(database) = error.as_database_error() else {
            return match error {
                sqlx::Error::Io(e) => Fault::unreachable(format!("{place} cannot be reached ({what}): {e}")),
                sqlx::Error::Tls(e) => Fault::unreachable(format!("{place}: no TLS connection ({what}): {e}"))
                    .with_next("check the server's certificate and sslmode/sslrootcert in the url of [sink.labels]"),
                sqlx::Error::Configuration(e) => Fault::config(format!("{place}: {e}")),
                sqlx::Error::Protocol(e) => Fault::unreachable(format!("{place} broke off ({what}): {e}")),
                other => Fault::internal(format!("{place} ({what}): {other}")),
            };
        };
        let code = database.code().unwrap_or_default();
        let message = format!("{place} ({what}): {}", database.message());
        match code.as_ref() {
            "42501" => Fault::not_allowed(message).with_next(format!(
                "as the database's owner: GRANT CREATE ON DATABASE … TO {user}, or make {user} the owner of the schema packhorse"
            )),
            "3D000" => Fault::not_allowed(message).with_next(format!("create it as an administrator: CREATE DATABASE … OWNER {user}")),
            "53100" => Fault::no_space(message).with_next("make room on the database's disk; the transfer goes on by itself"),
            "40001" | "40P01" | "55P03" => Fault::unreachable(message).with_next("others hold locks there; this is tried again by itself"),
            "25006" => Fault::unreachable(message).with_next("this server is read-only now (a standby?); this is tried again by itself"),
            c if c.starts_with("28") => Fault::not_allowed(message)
                .with_next(format!("check the user {user} and the password_file in [sink.labels], and pg_hba.conf on the server")),
            "54001" => Fault::integrity(message),
            c if c.starts_with("22") || c.starts_with("23") => Fault::integrity(message),
            // Insufficient resources, an operator's intervention, a connection's end.
            c if ["53", "57", "58", "08"].iter().any(|class| c.starts_with(class)) => Fault::unreachable(message),
            c => Fault::internal(format!("{message} ({c})")),
        }
    }

    /// Whether the schema is there at all; before the first commit it is not.
    async fn has_schema(&self, conn: &mut PgConnection) -> Result<bool, Fault> {
        // Not to_regclass: that is an error for whoever may not look into the schema.
        let query = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE n.nspname = 'packhorse' AND c.relname = 'label_active')",
        );
        self.within("look for the schema", LABEL_STATEMENT_MAX, query.fetch_one(conn)).await
    }

    async fn rights(&self, conn: &mut PgConnection) -> Result<(), Fault> {
        let query = sqlx::query(
            "SELECT pg_is_in_recovery(), to_regnamespace('packhorse') IS NOT NULL,
             CASE WHEN to_regnamespace('packhorse') IS NULL THEN has_database_privilege(current_database(), 'CREATE')
                  ELSE has_schema_privilege('packhorse', 'CREATE') AND has_schema_privilege('packhorse', 'USAGE') END,
             (SELECT coalesce(bool_and(pg_has_role(c.relowner, 'USAGE')), true)
              FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'packhorse' AND c.relname = 'annotation')",
        );
        let row = self.within("read the rights", LABEL_STATEMENT_MAX, query.fetch_one(conn)).await?;
        let get = |column: usize| row.try_get::<bool, _>(column).map_err(|e| self.fault("read the rights", &e));
        let user = self.options.get_username();
        let (standby, exists, may_create, owns) = (get(0)?, get(1)?, get(2)?, get(3)?);
        if standby {
            return Err(Fault::unreachable(format!("{} is a standby and cannot be written to", self.place))
                .with_next("name the primary in [sink.labels]; this is tried again by itself"));
        }
        if !may_create {
            let (what, grant) = if exists {
                ("in the schema packhorse", format!("GRANT CREATE, USAGE ON SCHEMA packhorse TO {user}"))
            } else {
                ("a schema", format!("GRANT CREATE ON DATABASE … TO {user}"))
            };
            return Err(Fault::not_allowed(format!("{}: the user {user} may not create {what}", self.place))
                .with_next(format!("as the database's owner: {grant}")));
        }
        if !owns {
            return Err(Fault::not_allowed(format!(
                "{}: the tables in the schema packhorse belong to another user than {user}",
                self.place
            ))
            .with_next(format!("use that user in [sink.labels], or GRANT it TO {user}")));
        }
        Ok(())
    }

    async fn migrate(&self, conn: &mut PgConnection) -> Result<(), Fault> {
        let mut migrator = sqlx::migrate!("migrations/labels-postgres");
        // In our own schema, whatever the search path is; two daemons that start at once are kept apart by our own lock,
        // which covers the schema too.
        migrator.set_locking(false);
        migrator.dangerous_set_table_name("packhorse.schema_migration");
        self.run(conn, "take the lock of migrations", format!("SELECT pg_advisory_lock({MIGRATION_LOCK})")).await?;
        // Asked first, because CREATE SCHEMA IF NOT EXISTS wants the right to create one even where it exists.
        let query = sqlx::query_scalar("SELECT to_regnamespace('packhorse') IS NOT NULL");
        let exists: bool = self.within("look for the schema", LABEL_STATEMENT_MAX, query.fetch_one(&mut *conn)).await?;
        if !exists {
            self.run(conn, "create the schema", "CREATE SCHEMA packhorse".into()).await?;
        }
        match tokio::time::timeout(LABEL_STATEMENT_MAX, migrator.run_direct(None, conn, false)).await {
            Ok(Ok(())) => {}
            Ok(Err(MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _))) => {
                return Err(self.fault("migrate the schema", &error));
            }
            Ok(Err(error)) => {
                return Err(Fault::config(format!(
                    "{}: the schema packhorse is not this program's, or newer than it: {error}",
                    self.place
                ))
                .with_next("run the version of packhorse that made it, or a newer one"));
            }
            Err(_) => return Err(Fault::unreachable(format!("{} did not answer (migrate the schema)", self.place))),
        }
        self.run(conn, "give back the lock of migrations", format!("SELECT pg_advisory_unlock({MIGRATION_LOCK})")).await
    }

    /// Takes the lock of a label set for as long as the connection lives.
    async fn lock_set(&self, conn: &mut PgConnection, set: &str) -> Result<(), Fault> {
        let query = sqlx::query("SELECT pg_advisory_lock(hashtextextended($1, 0))").bind(format!("packhorse.labels/{set}"));
        self.within("take the lock of the label set", LABEL_STATEMENT_MAX, query.execute(conn)).await?;
        Ok(())
    }

    async fn held_on(&self, conn: &mut PgConnection, set: &str, version: &str) -> Result<Option<(i64, Held)>, Fault> {
        let query = sqlx::query(HELD).bind(set).bind(version);
        let row = self.within("look for the version", LABEL_STATEMENT_MAX, query.fetch_optional(conn)).await?;
        let held = |row: PgRow| -> sqlx::Result<(i64, Held)> {
            let held = Held {
                digest: row.try_get(0)?,
                classes: row.try_get::<i64, _>(1)?.unsigned_abs(),
                samples: row.try_get::<i64, _>(2)?.unsigned_abs(),
                annotations: row.try_get::<i64, _>(3)?.unsigned_abs(),
                rows_digest: row.try_get(4)?,
            };
            Ok((row.try_get(5)?, held))
        };
        row.map(held).transpose().map_err(|e| self.fault("look for the version", &e))
    }

    /// Drops the tables and the row of a version that the views do not show.
    async fn drop_version(&self, conn: &mut PgConnection, id: i64) -> Result<(), Fault> {
        let sql = format!(
            "DROP TABLE IF EXISTS packhorse.annotation_v{id}, packhorse.version_sample_v{id};
             DELETE FROM packhorse.label_class WHERE version_id = {id};
             DELETE FROM packhorse.label_version WHERE id = {id}"
        );
        self.change_tables(conn, "drop the tables of a version", &sql).await
    }

    /// Drops what earlier commits and removals of this set left behind. Gives back the version that stands attached
    /// with this digest and only waits for its switch.
    async fn clean(&self, conn: &mut PgConnection, new: &NewVersion) -> Result<Option<i64>, Fault> {
        let query = sqlx::query_as::<_, (i64, String, String, String)>(
            "SELECT v.id, v.version, v.manifest_digest, v.state FROM packhorse.label_version v
             JOIN packhorse.label_set s ON s.id = v.label_set_id WHERE s.name = $1 AND v.state <> 'ready'",
        )
        .bind(&new.set);
        let rows = self.within("look for leftovers", LABEL_STATEMENT_MAX, query.fetch_all(&mut *conn)).await?;
        let mut attached = None;
        for (id, version, digest, state) in rows {
            if state == "attached" && version == new.version && digest == new.digest.hex() {
                attached = Some(id);
            } else {
                tracing::info!(label_set = %new.set, version = %version, state = %state, "dropping what an earlier try left in the label database");
                self.drop_version(conn, id).await?;
            }
        }
        Ok(attached)
    }

    /// Steps 2 and 3 of the module's description.
    async fn copy_version(&self, conn: &mut PgConnection, new: &NewVersion) -> Result<i64, Fault> {
        let insert_set = sqlx::query("INSERT INTO packhorse.label_set (name) VALUES ($1) ON CONFLICT (name) DO NOTHING").bind(&new.set);
        self.within("add the label set", LABEL_STATEMENT_MAX, insert_set.execute(&mut *conn)).await?;
        let insert = sqlx::query_scalar(
            "INSERT INTO packhorse.label_version (label_set_id, version, manifest_digest, state)
             SELECT id, $2, $3, 'loading' FROM packhorse.label_set WHERE name = $1 RETURNING id",
        )
        .bind(&new.set)
        .bind(&new.version)
        .bind(new.digest.hex());
        let id: i64 = self.within("add the version", LABEL_STATEMENT_MAX, insert.fetch_one(&mut *conn)).await?;
        // In a transaction of its own: LIKE locks the partitioned table until its end, and the load may take long.
        let create = PARTITIONED.map(|table| {
            format!(
                "CREATE TABLE {table}_v{id} (LIKE {table}, CONSTRAINT one_version CHECK (version_id IS NOT NULL AND version_id = {id}))"
            )
        });
        self.change_tables(conn, "create the staging tables", &create.join("; ")).await?;
        self.fill(conn, new, id).await?;
        Ok(id)
    }

    /// Copies the rows into the empty tables of a version.
    async fn fill(&self, conn: &mut PgConnection, new: &NewVersion, id: i64) -> Result<(), Fault> {
        // Truncated in the same transaction, so that COPY may write rows frozen: nothing has to touch them again later.
        self.run(conn, "begin the load", format!("BEGIN; TRUNCATE packhorse.version_sample_v{id}, packhorse.annotation_v{id}")).await?;

        let dir = new.dir.clone();
        let sql = "COPY packhorse.label_class (version_id, class_id, name, attrs) FROM STDIN WITH (FORMAT binary)";
        let (copied, classes) = self
            .copy(conn, "copy the classes", sql, move |rows, give| {
                read_classes(&dir, &mut |class| {
                    rows.row(4).int(id).int(class.id).text(class.name).opt_text(class.attrs);
                    rows.full().map_or(Ok(()), &mut *give)
                })
            })
            .await?;
        new.check_count(Table::Classes, classes.len() as u64)?;
        self.all_copied(Table::Classes, classes.len() as u64, copied)?;

        let dir = new.dir.clone();
        let sql = format!(
            "COPY packhorse.version_sample_v{id} (version_id, sample_no, path, hash, width, height, split, meta)
             FROM STDIN WITH (FORMAT binary, FREEZE true)"
        );
        let (copied, samples) = self
            .copy(conn, "copy the samples", &sql, move |rows, give| {
                read_samples(&dir, &mut |no, sample| {
                    rows.row(8).int(id).int(no.cast_signed()).text(sample.path).opt_text(sample.hash);
                    rows.opt_int(sample.width).opt_int(sample.height).opt_text(sample.split).opt_text(sample.meta);
                    rows.full().map_or(Ok(()), &mut *give)
                })
            })
            .await?;
        new.check_count(Table::Samples, samples)?;
        self.all_copied(Table::Samples, samples, copied)?;

        let dir = new.dir.clone();
        let sql = format!(
            "COPY packhorse.annotation_v{id} (version_id, ann_no, sample_no, class_id, kind, x, y, w, h, geom, attrs, raw)
             FROM STDIN WITH (FORMAT binary, FREEZE true)"
        );
        let (copied, (annotations, rows_digest)) = self
            .copy(conn, "copy the annotations", &sql, move |rows, give| {
                read_annotations(&dir, &classes, &mut |no, sample_no, row| {
                    rows.row(12).int(id).int(no.cast_signed()).int(sample_no.cast_signed()).opt_int(row.class).text(row.kind);
                    for value in row.bbox {
                        rows.opt_float(value);
                    }
                    rows.opt_text(row.geom).opt_text(row.attrs).text(row.raw);
                    rows.full().map_or(Ok(()), &mut *give)
                })
            })
            .await?;
        new.check_count(Table::Annotations, annotations)?;
        self.all_copied(Table::Annotations, annotations, copied)?;

        let finish = format!(
            "CREATE UNIQUE INDEX ON packhorse.version_sample_v{id} (sample_no);
             CREATE INDEX ON packhorse.version_sample_v{id} (path);
             CREATE UNIQUE INDEX ON packhorse.annotation_v{id} (ann_no);
             CREATE INDEX ON packhorse.annotation_v{id} (sample_no);
             CREATE INDEX ON packhorse.annotation_v{id} (class_id);
             ANALYZE packhorse.version_sample_v{id}, packhorse.annotation_v{id};
             UPDATE packhorse.label_version SET n_classes = {}, n_samples = {samples}, n_annotations = {annotations},
             rows_digest = '{rows_digest}' WHERE id = {id};
             COMMIT",
            new.info.classes
        );
        self.run(conn, "build the indexes", finish).await
    }

    fn all_copied(&self, table: Table, sent: u64, copied: u64) -> Result<(), Fault> {
        if sent == copied {
            return Ok(());
        }
        Err(Fault::integrity(format!("{}: of {sent} rows of {} only {copied} arrived", self.place, table.file())))
    }

    /// One COPY, encoded on a blocking thread. Gives back the rows that the server counted and what `work` did. On any
    /// error the connection must be closed: the driver's COPY cannot be taken up again.
    async fn copy<R, W>(&self, conn: &mut PgConnection, what: &str, sql: &str, work: W) -> Result<(u64, R), Fault>
    where
        R: Send + 'static,
        W: FnOnce(&mut CopyRows, &mut dyn FnMut(Vec<u8>) -> Result<(), Fault>) -> Result<R, Fault> + Send + 'static,
    {
        let mut copy = self.within(what, LABEL_STATEMENT_MAX, conn.copy_in_raw(sql)).await?;
        let (mut batches, task): (mpsc::Receiver<Vec<u8>>, JoinHandle<_>) = pump(move |give| {
            let mut rows = CopyRows::new(LABEL_BATCH_BYTES);
            let result = work(&mut rows, give)?;
            give(rows.finish())?;
            Ok(result)
        });
        while let Some(batch) = batches.recv().await {
            self.within(what, LABEL_SILENCE_MAX, copy.send(batch)).await?;
        }
        let result = joined(task).await?;
        let copied = self.within(what, LABEL_STATEMENT_MAX, copy.finish()).await?;
        Ok((copied, result))
    }

    /// Step 4 of the module's description.
    async fn attach(&self, conn: &mut PgConnection, id: i64) -> Result<(), Fault> {
        let attach = PARTITIONED.map(|table| format!("ALTER TABLE {table} ATTACH PARTITION {table}_v{id} FOR VALUES IN ({id})"));
        let sql = format!("{}; UPDATE packhorse.label_version SET state = 'attached' WHERE id = {id}", attach.join("; "));
        self.change_tables(conn, "attach the partitions", &sql).await
    }

    /// Step 5: waits until every transaction that holds a lock on the partitioned tables now has ended.
    async fn wait_for_readers(&self, conn: &mut PgConnection) -> Result<(), Fault> {
        let began = Instant::now();
        let mut waited_for: Option<HashSet<(String, Option<i32>)>> = None;
        loop {
            let query = sqlx::query_as::<_, (String, Option<i32>)>(READERS);
            let now: HashSet<_> =
                self.within("look for readers", LABEL_STATEMENT_MAX, query.fetch_all(&mut *conn)).await?.into_iter().collect();
            // Whoever came later has seen the new partition.
            let left: HashSet<_> = waited_for.map_or(now.clone(), |before| before.intersection(&now).cloned().collect());
            if left.is_empty() {
                return Ok(());
            }
            if began.elapsed() >= LABEL_READERS_WAIT_MAX {
                let pids: Vec<String> = left.iter().map(|(_, pid)| pid.map_or("prepared".into(), |p| p.to_string())).collect();
                return Err(Fault::unreachable(format!(
                    "{}: the new rows are loaded, but transactions that began before still read the labels (server processes {})",
                    self.place,
                    pids.join(", ")
                ))
                .with_next("end those transactions; see pg_stat_activity. the switch is tried again by itself, without loading again"));
            }
            waited_for = Some(left);
            tokio::time::sleep(READERS_POLL).await;
        }
    }

    /// Step 6: the switch. The small tables are analysed because autovacuum leaves tables of a few rows alone, and without
    /// that the planner does not see that one active version means one partition.
    async fn switch(&self, conn: &mut PgConnection, id: i64) -> Result<(), Fault> {
        let sql = format!(
            "BEGIN; UPDATE packhorse.label_version SET state = 'ready', committed_at = now() WHERE id = {id};
             INSERT INTO packhorse.label_active (label_set_id, version_id)
             SELECT label_set_id, id FROM packhorse.label_version WHERE id = {id}
             ON CONFLICT (label_set_id) DO UPDATE SET version_id = EXCLUDED.version_id; COMMIT;
             ANALYZE packhorse.label_set, packhorse.label_version, packhorse.label_active, packhorse.label_class"
        );
        self.run(conn, "switch to the new version", sql).await
    }

    async fn load_on(&self, conn: &mut PgConnection, new: &NewVersion) -> Result<(), Fault> {
        self.lock_set(conn, &new.set).await?;
        if let Some((_, held)) = self.held_on(conn, &new.set, &new.version).await? {
            return if held.digest == new.digest.hex() { Ok(()) } else { Err(new.conflict(&held.digest)) };
        }
        let id = match self.clean(conn, new).await? {
            Some(id) => id,
            None => {
                let id = self.copy_version(conn, new).await?;
                self.attach(conn, id).await?;
                id
            }
        };
        self.wait_for_readers(conn).await?;
        self.switch(conn, id).await
    }

    /// After a load that failed for good, on a fresh connection. Best effort: what this cannot drop, the next commit will.
    async fn clean_after_failure(&self, new: &NewVersion) -> Result<(), Fault> {
        let mut conn = self.connect().await?;
        self.lock_set(&mut conn, &new.set).await?;
        self.clean(&mut conn, new).await?;
        self.close(conn).await;
        Ok(())
    }

    async fn export_on(&self, conn: &mut PgConnection, set: &str, version: &str, out: mpsc::Sender<Rows>) -> Result<Held, Fault> {
        // The lock comes before the snapshot: so a removal either is seen by it, or waits until the export has ended.
        let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
             LOCK TABLE packhorse.version_sample, packhorse.annotation IN ACCESS SHARE MODE";
        self.run(conn, "begin the export", begin.into()).await?;
        let Some((id, held)) = self.held_on(conn, set, version).await? else { return Err(not_held(set, version)) };
        let mut batcher = Batcher::new(out);

        let mut rows = sqlx::query(EXPORT_CLASSES).bind(id).fetch(&mut *conn);
        let mut number = 0;
        while let Some(row) = self.within("read the classes", LABEL_STATEMENT_MAX, rows.try_next()).await? {
            let class = class_of(&row).map_err(|e| self.fault("read the classes", &e))?;
            batcher.push(Table::Classes, number, |out| class.write(out)).await?;
            number += 1;
        }
        drop(rows);

        let mut rows = sqlx::query(EXPORT_SAMPLES).bind(id).fetch(&mut *conn);
        while let Some(row) = self.within("read the samples", LABEL_STATEMENT_MAX, rows.try_next()).await? {
            let (no, sample) = sample_of(&row).map_err(|e| self.fault("read the samples", &e))?;
            batcher.push(Table::Samples, no.unsigned_abs(), |out| sample.write(out)).await?;
        }
        drop(rows);

        let mut rows = sqlx::query(EXPORT_ANNOTATIONS).bind(id).fetch(&mut *conn);
        while let Some(row) = self.within("read the annotations", LABEL_STATEMENT_MAX, rows.try_next()).await? {
            let (no, annotation) = annotation_of(&row).map_err(|e| self.fault("read the annotations", &e))?;
            batcher.push(Table::Annotations, no.unsigned_abs(), |out| annotation.write(out)).await?;
        }
        drop(rows);
        let (counts, rows_digest) = batcher.finish().await?;
        self.run(conn, "end the export", "COMMIT".into()).await?;
        let [classes, samples, annotations] = counts;
        Ok(Held { digest: held.digest, classes, samples, annotations, rows_digest: rows_digest.hex() })
    }
}

fn class_of(row: &PgRow) -> sqlx::Result<Class<'_>> {
    Ok(Class { id: row.try_get(0)?, name: row.try_get(1)?, attrs: row.try_get(2)? })
}

fn sample_of(row: &PgRow) -> sqlx::Result<(i64, Sample<'_>)> {
    let sample = Sample {
        path: row.try_get(1)?,
        hash: row.try_get(2)?,
        width: row.try_get(3)?,
        height: row.try_get(4)?,
        split: row.try_get(5)?,
        meta: row.try_get(6)?,
    };
    Ok((row.try_get(0)?, sample))
}

fn annotation_of(row: &PgRow) -> sqlx::Result<(i64, Annotation<'_>)> {
    let annotation = Annotation {
        sample: row.try_get(1)?,
        class: row.try_get(2)?,
        kind: row.try_get(3)?,
        bbox: [row.try_get(4)?, row.try_get(5)?, row.try_get(6)?, row.try_get(7)?],
        geom: row.try_get(8)?,
        attrs: row.try_get(9)?,
        raw: row.try_get(10)?,
    };
    Ok((row.try_get(0)?, annotation))
}

#[async_trait]
impl Engine for Postgres {
    async fn prepare(&self, _room_bytes: u64) -> Result<(), Fault> {
        let mut conn = self.connect().await?;
        self.rights(&mut conn).await?;
        self.migrate(&mut conn).await?;
        self.close(conn).await;
        Ok(())
    }

    async fn probe(&self) -> Result<String, Fault> {
        let mut conn = self.connect().await?;
        self.rights(&mut conn).await?;
        let version = conn.server_version_num().unwrap_or(0);
        let held: i64 = if self.has_schema(&mut conn).await? {
            let query = sqlx::query_scalar("SELECT count(*) FROM packhorse.label_version WHERE state = 'ready'");
            self.within("count the versions", LABEL_STATEMENT_MAX, query.fetch_one(&mut conn)).await?
        } else {
            0
        };
        self.close(conn).await;
        Ok(format!("{}: PostgreSQL {}.{}, {held} label versions held", self.place, version / 10_000, version % 10_000))
    }

    async fn held(&self, set: &str, version: &str) -> Result<Option<Held>, Fault> {
        let mut conn = self.connect().await?;
        let held = if self.has_schema(&mut conn).await? { self.held_on(&mut conn, set, version).await? } else { None };
        self.close(conn).await;
        Ok(held.map(|(_, held)| held))
    }

    async fn load(&self, new: &NewVersion) -> Result<(), Fault> {
        let mut conn = self.connect().await?;
        match self.load_on(&mut conn, new).await {
            Ok(()) => {
                self.close(conn).await;
                Ok(())
            }
            Err(fault) => {
                drop(conn);
                let down = fault.reason == Reason::SinkUnavailable;
                if !down && let Err(left) = self.clean_after_failure(new).await {
                    tracing::warn!(error = %left, "what a failed load left in the label database is dropped at the next commit");
                }
                Err(fault)
            }
        }
    }

    async fn active(&self, set: &str) -> Result<Option<String>, Fault> {
        let mut conn = self.connect().await?;
        if !self.has_schema(&mut conn).await? {
            return Ok(None);
        }
        let query = sqlx::query_scalar(
            "SELECT v.version FROM packhorse.label_active a JOIN packhorse.label_version v ON v.id = a.version_id
             JOIN packhorse.label_set s ON s.id = a.label_set_id WHERE s.name = $1",
        )
        .bind(set);
        let version = self.within("read the active version", LABEL_STATEMENT_MAX, query.fetch_optional(&mut conn)).await?;
        self.close(conn).await;
        Ok(version)
    }

    async fn activate(&self, set: &str, version: &str) -> Result<bool, Fault> {
        let mut conn = self.connect().await?;
        if !self.has_schema(&mut conn).await? {
            return Ok(false);
        }
        self.lock_set(&mut conn, set).await?;
        let query = sqlx::query(
            "UPDATE packhorse.label_active a SET version_id = v.id FROM packhorse.label_version v, packhorse.label_set s
             WHERE s.name = $1 AND v.label_set_id = s.id AND v.version = $2 AND v.state = 'ready' AND a.label_set_id = s.id",
        )
        .bind(set)
        .bind(version);
        let done = self.within("switch the active version", LABEL_STATEMENT_MAX, query.execute(&mut conn)).await?;
        self.close(conn).await;
        Ok(done.rows_affected() == 1)
    }

    async fn remove(&self, set: &str, version: &str) -> Result<(), Fault> {
        let mut conn = self.connect().await?;
        if !self.has_schema(&mut conn).await? {
            return Ok(());
        }
        self.lock_set(&mut conn, set).await?;
        let query = sqlx::query_scalar::<_, i64>(
            "SELECT v.id FROM packhorse.label_version v JOIN packhorse.label_set s ON s.id = v.label_set_id
             WHERE s.name = $1 AND v.version = $2",
        )
        .bind(set)
        .bind(version);
        let id = self.within("look for the version", LABEL_STATEMENT_MAX, query.fetch_optional(&mut conn)).await?;
        if let Some(id) = id {
            // Hidden first, in one small transaction that no reader can hold up; then dropped.
            let hide = format!(
                "BEGIN; UPDATE packhorse.label_version SET state = 'removing' WHERE id = {id};
                 DELETE FROM packhorse.label_active WHERE version_id = {id};
                 INSERT INTO packhorse.label_active (label_set_id, version_id)
                 SELECT label_set_id, max(id) FROM packhorse.label_version WHERE state = 'ready'
                 AND label_set_id = (SELECT label_set_id FROM packhorse.label_version WHERE id = {id})
                 GROUP BY label_set_id ON CONFLICT (label_set_id) DO NOTHING; COMMIT"
            );
            self.run(&mut conn, "hide the version", hide).await?;
            self.drop_version(&mut conn, id).await?;
        }
        self.close(conn).await;
        Ok(())
    }

    async fn export(&self, set: &str, version: &str, out: mpsc::Sender<Rows>) -> Result<Held, Fault> {
        let mut conn = self.connect().await?;
        if !self.has_schema(&mut conn).await? {
            return Err(not_held(set, version));
        }
        let held = self.export_on(&mut conn, set, version, out).await?;
        self.close(conn).await;
        Ok(held)
    }

    fn location(&self, set: &str, version: &str) -> String {
        format!("{} packhorse.annotations label_set={set} version={version}", self.place)
    }
}

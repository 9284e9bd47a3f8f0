//! Labels in PostgreSQL ≥ 15: the rows of all versions are in two tables, whose indexes begin with
//! the version. A version is loaded while readers use other versions, and activated by changing one
//! row.
//!
//! # A commit
//! 1. A dedicated connection takes the session advisory lock of the label set, so that only one
//!    commit at a time works on it, and deletes the leftovers of earlier commits.
//! 2. `label_version` gets a row in the state `loading`. One transaction copies the rows (binary),
//!    counts, and sets the state to `attached`. The views do not show them yet.
//! 3. The tables are analysed.
//! 4. A last transaction sets the state to `ready` and changes the one row in `label_active`: the
//!    switch. In `label_switch` it ends the period of the old version and starts that of the new
//!    one. There is no switch if the active version was requested later (`label_request`).
//!
//! **No commit and no removal waits for readers, and none delays them.** A reader sees the rows of its
//! snapshot. The view of active versions compares the periods in `label_switch` with the start of
//! the reader's transaction, so that all statements of a transaction read the same version.
//!
//! **A query holds few locks.** It locks both tables with their indexes, whatever the number of
//! versions. With one partition per version, it locked every partition with its indexes, because the
//! version comes out of a join: 30 readers of 150 versions exhausted the lock table of a server with
//! default settings. `layout` moves the rows of such databases.
//!
//! A crash in step 2 leaves a `loading` row, which the next commit of the set deletes. After a crash
//! later than that, the next commit continues with step 3.
//!
//! Every operation uses its own connection and closes it: operations are rare, a failed COPY cannot
//! damage a pool, and a changed password file is read. The server ends a session whose network is
//! lost within a minute, so that its advisory lock is released.
//!
//! A reader needs only `USAGE` on the schema `packhorse` and `SELECT` on its two views.

mod connect;
mod layout;
mod load;
mod locks;

use std::path::{Path, PathBuf};
use std::str::FromStr;

use async_trait::async_trait;
use futures::TryStreamExt;
use sqlx::postgres::{PgConnectOptions, PgRow};
use sqlx::{
    AssertSqlSafe, Column as _, ConnectOptions, Executor as _, PgConnection, Row, SqlSafeStr as _,
    Statement as _,
};
use tokio::sync::mpsc;

use self::connect::NO_TIME_LIMITS_HERE;
use super::canonical::Table;
use super::engine::{Batcher, Engine, NewVersion, Rows, StoredVersion, not_held};
use super::query::{self, Batch};
use super::row_mapping::{self, LabelRow};
use crate::{Threads, Waits};
use base::fault::{Fault, Reason};
use base::limits::LABEL_STATEMENT_MAX;
use content::label_rows::{ClassRow, QueryRow};

const HELD: &str =
    "SELECT v.manifest_digest, v.n_classes, v.n_samples, v.n_annotations, v.rows_digest, v.id
    FROM packhorse.label_version v JOIN packhorse.label_set s ON s.id = v.label_set_id
    WHERE s.name = $1 AND v.version = $2 AND v.state = 'ready'";
const COUNT: &str = "SELECT (SELECT count(*) FROM packhorse.label_class WHERE version_id = $1),
    (SELECT count(*) FROM packhorse.version_sample WHERE version_id = $1),
    (SELECT count(*) FROM packhorse.annotation WHERE version_id = $1)";
const EXPORT_CLASSES: &str = "SELECT class_id, name, attrs::text FROM packhorse.label_class WHERE version_id = $1 ORDER BY class_id";
const EXPORT_SAMPLES: &str = "SELECT sample_no, path, hash, width, height, split, meta::text
    FROM packhorse.version_sample WHERE version_id = $1 ORDER BY sample_no";
const EXPORT_ANNOTATIONS: &str = "SELECT n.ann_no, i.path, n.class_id, n.kind, n.x, n.y, n.w, n.h, n.geom::text, n.attrs::text, n.raw::text
    FROM packhorse.annotation n JOIN packhorse.version_sample i ON i.sample_no = n.sample_no AND i.version_id = $1
    WHERE n.version_id = $1 ORDER BY n.ann_no";

/// A PostgreSQL database. No connection is open between two calls.
pub(super) struct Postgres {
    options: PgConnectOptions,
    password_file: Option<PathBuf>,
    /// `postgres://host:port/db`, for messages.
    place: String,
    threads: Threads,
}

/// Reads the secret in a file, without the line end that editors add.
fn password(file: &Path) -> std::io::Result<String> {
    Ok(
        base::durable::read_regular_text(file, base::limits::SECRET_BYTES_MAX)?
            .trim_end_matches(['\r', '\n'])
            .into(),
    )
}

impl Postgres {
    /// Checks the URL and the password file; does not connect.
    pub(super) fn new(
        url: &str,
        password_file: Option<&Path>,
        threads: Threads,
    ) -> Result<Self, Fault> {
        let authority = url
            .split_once("://")
            .map_or("", |(_, rest)| rest)
            .split(['/', '?'])
            .next()
            .unwrap_or("");
        let in_url = authority
            .rsplit_once('@')
            .is_some_and(|(user, _)| user.contains(':'))
            || url.contains("password=");
        if in_url {
            return Err(
                Fault::config("the url of [sink.labels] contains a password").with_next(
                    "write the password to a file with mode 0600 and set password_file to its path",
                ),
            );
        }
        // The error of the parser could contain the URL.
        let options = PgConnectOptions::from_str(url)
            .map_err(|_| Fault::config("the url of [sink.labels] does not have the form postgres://user@host:port/database"))?
            .application_name("packhorse")
            // Connection pools refuse it as a parameter of the connection; it is set later.
            .extra_float_digits(None)
            .disable_statement_logging();
        if let Some(file) = password_file {
            password(file).map_err(|e| {
                Fault::config(format!(
                    "the password file of [sink.labels], {}, cannot be read: {e}",
                    file.display()
                ))
            })?;
        }
        let database = options.get_database().unwrap_or(options.get_username());
        let place = match options.get_socket() {
            Some(socket) => format!("postgres:///{database}?host={}", socket.display()),
            None => format!(
                "postgres://{}:{}/{database}",
                options.get_host(),
                options.get_port()
            ),
        };
        Ok(Self {
            place,
            options,
            password_file: password_file.map(Into::into),
            threads,
        })
    }

    async fn held_on(
        &self,
        conn: &mut PgConnection,
        set: &str,
        version: &str,
    ) -> Result<Option<(i64, StoredVersion)>, Fault> {
        let query = sqlx::query(HELD).bind(set).bind(version);
        let row = self
            .within(
                "look up the version",
                LABEL_STATEMENT_MAX,
                query.fetch_optional(conn),
            )
            .await?;
        row.as_ref()
            .map(row_mapping::stored_version)
            .transpose()
            .map_err(|e| self.fault("look up the version", &e))
    }

    async fn export_on(
        &self,
        conn: &mut PgConnection,
        set: &str,
        version: &str,
        out: mpsc::Sender<Rows>,
    ) -> Result<StoredVersion, Fault> {
        let begin =
            format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {NO_TIME_LIMITS_HERE}");
        self.run(conn, "start the export", begin).await?;
        let Some((id, held)) = self.held_on(conn, set, version).await? else {
            return Err(not_held(set, version));
        };
        let mut batcher = Batcher::new(out);

        let mut rows = sqlx::query(EXPORT_CLASSES).bind(id).fetch(&mut *conn);
        let mut number = 0;
        while let Some(row) = self
            .within("read the classes", LABEL_STATEMENT_MAX, rows.try_next())
            .await?
        {
            let class = row_mapping::class(&row).map_err(|e| self.fault("read the classes", &e))?;
            batcher
                .push(Table::Classes, number, |out| class.write(out))
                .await?;
            number += 1;
        }
        drop(rows);

        let mut rows = sqlx::query(EXPORT_SAMPLES).bind(id).fetch(&mut *conn);
        while let Some(row) = self
            .within("read the samples", LABEL_STATEMENT_MAX, rows.try_next())
            .await?
        {
            let (no, sample) =
                row_mapping::sample(&row).map_err(|e| self.fault("read the samples", &e))?;
            batcher
                .push(Table::Samples, no.unsigned_abs(), |out| sample.write(out))
                .await?;
        }
        drop(rows);

        let mut rows = sqlx::query(EXPORT_ANNOTATIONS).bind(id).fetch(&mut *conn);
        while let Some(row) = self
            .within("read the annotations", LABEL_STATEMENT_MAX, rows.try_next())
            .await?
        {
            let (no, annotation) = row_mapping::annotation(&row)
                .map_err(|e| self.fault("read the annotations", &e))?;
            batcher
                .push(Table::Annotations, no.unsigned_abs(), |out| {
                    annotation.write(out);
                })
                .await?;
        }
        drop(rows);
        let (counts, rows_digest) = batcher.finish().await?;
        self.run(conn, "end the export", "COMMIT".into()).await?;
        let [classes, samples, annotations] = counts;
        Ok(StoredVersion {
            digest: held.digest,
            classes,
            samples,
            annotations,
            rows_digest: rows_digest.hex(),
        })
    }
}

impl Postgres {
    async fn query_on(
        &self,
        conn: &mut PgConnection,
        sql: &str,
        out: mpsc::Sender<Vec<QueryRow>>,
    ) -> Result<(), Fault> {
        let what = "run the query";
        self.run(
            conn,
            "start the query",
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY".into(),
        )
        .await?;
        let prepare =
            (&mut *conn).prepare(AssertSqlSafe(query::without_semicolon(sql)).into_sql_str());
        let prepared = match tokio::time::timeout(LABEL_STATEMENT_MAX, prepare).await {
            Ok(prepared) => prepared.map_err(|e| self.fault_of_query(&e))?,
            Err(_) => {
                return Err(Fault::unreachable(format!(
                    "{} did not respond ({what})",
                    self.place
                )));
            }
        };
        // As text, which is exact for every type, including numbers.
        let plan = query::plan(
            sql,
            prepared.columns().iter().map(|column| column.name()),
            "::text",
        )?;
        let mut batch = Batch::default();
        let mut rows = sqlx::query(AssertSqlSafe(plan.sql.as_str())).fetch(&mut *conn);
        loop {
            let row = match tokio::time::timeout(LABEL_STATEMENT_MAX, rows.try_next()).await {
                Ok(row) => row.map_err(|e| self.fault_of_query(&e))?,
                Err(_) => {
                    return Err(Fault::unreachable(format!(
                        "{} did not respond ({what})",
                        self.place
                    )));
                }
            };
            let Some(row) = row else { break };
            let mut cells = QueryRow::default();
            for (at, column) in plan.columns.iter().enumerate() {
                let text: Option<&str> = row.try_get(at).map_err(|e| self.fault(what, &e))?;
                cells[*column] = text.and_then(|text| serde_json::to_string(text).ok());
            }
            if let Some(full) = batch.push(cells)? {
                out.send(full).await.map_err(|_| query::reader_gone())?;
            }
        }
        drop(rows);
        out.send(batch.finish())
            .await
            .map_err(|_| query::reader_gone())?;
        self.run(conn, "end the query", "COMMIT".into()).await
    }

    /// Errors of the user's own statement are not errors of the server: syntax, names and
    /// permissions (42), values (22), writing (25006, 0A000), several statements in one (42601).
    fn fault_of_query(&self, error: &sqlx::Error) -> Fault {
        let code = error
            .as_database_error()
            .and_then(|e| e.code())
            .unwrap_or_default()
            .into_owned();
        let fault = self.fault("run the query", error);
        if ["42", "22", "0A"]
            .iter()
            .any(|class| code.starts_with(class))
            || code == "25006"
        {
            query::as_query_fault(fault)
        } else {
            fault
        }
    }
}

impl LabelRow for PgRow {
    fn int(&self, at: usize) -> sqlx::Result<i64> {
        self.try_get(at)
    }

    fn optional_int(&self, at: usize) -> sqlx::Result<Option<i64>> {
        self.try_get(at)
    }

    fn optional_float(&self, at: usize) -> sqlx::Result<Option<f64>> {
        self.try_get(at)
    }

    fn text(&self, at: usize) -> sqlx::Result<&str> {
        self.try_get(at)
    }

    fn optional_text(&self, at: usize) -> sqlx::Result<Option<&str>> {
        self.try_get(at)
    }
}

#[async_trait]
impl Engine for Postgres {
    async fn prepare(&self, _room_bytes: u64, waits: &Waits) -> Result<(), Fault> {
        self.check_sessions().await?;
        let mut conn = self.connect().await?;
        self.rights(&mut conn).await?;
        let pid = self.pid(&mut conn).await?;
        self.watched(pid, waits, self.migrate(&mut conn)).await?;
        self.close(conn).await;
        Ok(())
    }

    async fn probe(&self) -> Result<String, Fault> {
        self.check_sessions().await?;
        let mut conn = self.connect().await?;
        self.rights(&mut conn).await?;
        let version = conn.server_version_num().unwrap_or(0);
        let held: i64 = if self.has_schema(&mut conn).await? {
            let query = sqlx::query_scalar(
                "SELECT count(*) FROM packhorse.label_version WHERE state = 'ready'",
            );
            self.within(
                "count the versions",
                LABEL_STATEMENT_MAX,
                query.fetch_one(&mut conn),
            )
            .await?
        } else {
            0
        };
        self.close(conn).await;
        Ok(format!(
            "{}: PostgreSQL {}.{}, {held} label versions stored",
            self.place,
            version / 10_000,
            version % 10_000
        ))
    }

    async fn held(
        &self,
        set: &str,
        version: &str,
        waits: &Waits,
    ) -> Result<Option<StoredVersion>, Fault> {
        let mut conn = self.connect().await?;
        let held = if self.has_schema(&mut conn).await? {
            let pid = self.pid(&mut conn).await?;
            let look = self.held_on(&mut conn, set, version);
            self.watched(pid, waits, look).await?
        } else {
            None
        };
        self.close(conn).await;
        Ok(held.map(|(_, held)| held))
    }

    async fn count(&self, set: &str, version: &str) -> Result<Option<[u64; 3]>, Fault> {
        let mut conn = self.connect().await?;
        let mut counted = None;
        if self.has_schema(&mut conn).await?
            && let Some((id, _)) = self.held_on(&mut conn, set, version).await?
        {
            let what = "count the rows";
            let query = sqlx::query(COUNT).bind(id).fetch_one(&mut conn);
            let row = self.within(what, LABEL_STATEMENT_MAX, query).await?;
            counted = Some(row_mapping::counts(&row).map_err(|e| self.fault(what, &e))?);
        }
        self.close(conn).await;
        Ok(counted)
    }

    async fn load(&self, new: &NewVersion) -> Result<(), Fault> {
        let mut conn = self.connect().await?;
        let pid = self.pid(&mut conn).await?;
        match self
            .watched(pid, &new.waits, self.load_on(&mut conn, new))
            .await
        {
            Ok(()) => {
                self.close(conn).await;
                Ok(())
            }
            Err(fault) => {
                drop(conn);
                let is_unavailable = fault.reason == Reason::SinkUnavailable;
                if !is_unavailable
                    && let Err(cleanup_fault) = self.drop_leftovers_after_failure(new).await
                {
                    tracing::warn!(error = %cleanup_fault, "the next commit drops the leftovers of a failed load in the label database");
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
        let version = self
            .within(
                "read the active version",
                LABEL_STATEMENT_MAX,
                query.fetch_optional(&mut conn),
            )
            .await?;
        self.close(conn).await;
        Ok(version)
    }

    async fn activate(&self, set: &str, version: &str) -> Result<bool, Fault> {
        let mut conn = self.connect().await?;
        if !self.has_schema(&mut conn).await? {
            return Ok(false);
        }
        self.lock_set(&mut conn, set).await?;
        let held = self.held_on(&mut conn, set, version).await?;
        if let Some((id, _)) = &held {
            self.activate_version(&mut conn, *id).await?;
        }
        self.close(conn).await;
        Ok(held.is_some())
    }

    async fn remove(&self, set: &str, version: &str) -> Result<(), Fault> {
        let mut conn = self.connect().await?;
        if !self.has_schema(&mut conn).await? {
            return Ok(());
        }
        // An earlier program may have written the rows, and nothing was delivered since.
        self.migrate(&mut conn).await?;
        self.lock_set(&mut conn, set).await?;
        // An earlier removal may have hidden and therefore renamed it.
        let query = sqlx::query_as::<_, (i64, String)>(
            "SELECT v.id, v.state FROM packhorse.label_version v JOIN packhorse.label_set s ON s.id = v.label_set_id
             WHERE s.name = $1 AND split_part(v.version, '~', 1) = $2",
        )
        .bind(set)
        .bind(version);
        for (id, state) in self
            .within(
                "look up the version",
                LABEL_STATEMENT_MAX,
                query.fetch_all(&mut conn),
            )
            .await?
        {
            if state != "removing" {
                self.hide_version(&mut conn, id).await?;
            }
            self.drop_version(&mut conn, id).await?;
        }
        self.close(conn).await;
        Ok(())
    }

    async fn export(
        &self,
        set: &str,
        version: &str,
        out: mpsc::Sender<Rows>,
    ) -> Result<StoredVersion, Fault> {
        let mut conn = self.connect().await?;
        if !self.has_schema(&mut conn).await? {
            return Err(not_held(set, version));
        }
        let held = self.export_on(&mut conn, set, version, out).await?;
        self.close(conn).await;
        Ok(held)
    }

    async fn classes(&self, set: &str, version: &str) -> Result<Vec<ClassRow>, Fault> {
        let mut conn = self.connect().await?;
        let mut classes = Vec::new();
        if self.has_schema(&mut conn).await?
            && let Some((id, _)) = self.held_on(&mut conn, set, version).await?
        {
            let what = "read the classes";
            let mut rows = sqlx::query(EXPORT_CLASSES).bind(id).fetch(&mut conn);
            while let Some(row) = self
                .within(what, LABEL_STATEMENT_MAX, rows.try_next())
                .await?
            {
                let class = row_mapping::class(&row).map_err(|e| self.fault(what, &e))?;
                classes.push(class.owned());
            }
        }
        self.close(conn).await;
        Ok(classes)
    }

    async fn query(&self, sql: &str, out: mpsc::Sender<Vec<QueryRow>>) -> Result<(), Fault> {
        let mut conn = self.connect().await?;
        self.query_on(&mut conn, sql, out).await?;
        self.close(conn).await;
        Ok(())
    }

    fn location(&self, set: &str, version: &str) -> String {
        format!(
            "{} packhorse.annotations label_set={set} version={version}",
            self.place
        )
    }
}

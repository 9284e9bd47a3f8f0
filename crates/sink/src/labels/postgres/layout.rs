//! The layout of the tables: migrations, and the move of rows out of the partitions that earlier
//! revisions made, one pair for each version.
//!
//! # The move
//! Migration 4 creates the tables for all versions. Then the rows of each version are copied into
//! them, a transaction for each version, while readers use the partitions. Migration 5 lets the views
//! show the tables. It is short, and tried again if a reader is in its way; no reader waits for longer
//! than its lock timeout. Then the partitions are dropped, a few at a time, because each takes locks
//! too. An interrupted move continues with the versions that are not copied. It needs space for all
//! rows a second time until the partitions are dropped.

use std::time::Duration;

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::{PgConnection, Row};

use super::Postgres;
use super::connect::NO_TIME_LIMITS_HERE;
use base::fault::Fault;
use base::limits::{LABEL_DDL_TRIES_MAX, LABEL_STATEMENT_MAX};

/// An arbitrary number of our own: the advisory lock for creating and migrating the schema.
const MIGRATION_LOCK: i64 = 0x7061_636b_686f_7273;
/// The migration that creates the tables for all versions. The next one shows them to readers.
const TABLES_FOR_ALL_VERSIONS: i64 = 4;
/// The partitions that one transaction drops. Each has up to seven relations to lock.
const DROPPED_AT_ONCE: usize = 20;
/// How long dropping waits for a lock; new readers queue behind it.
const DROP_LOCK_WAIT: Duration = Duration::from_millis(500);
/// The pause before a migration is tried again; it doubles.
const PAUSE: Duration = Duration::from_millis(100);

/// The versions whose rows are in partitions only.
const NOT_MOVED: &str = "SELECT v.id FROM packhorse.label_version v
    WHERE v.state = 'ready' AND v.n_samples + v.n_annotations > 0
    AND NOT EXISTS (SELECT FROM packhorse.version_sample_of_all i WHERE i.version_id = v.id)
    AND NOT EXISTS (SELECT FROM packhorse.annotation_of_all n WHERE n.version_id = v.id) ORDER BY v.id";
/// The partitions, and the staging tables of loads that were interrupted.
const OF_VERSIONS: &str = "SELECT quote_ident(c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = 'packhorse' AND c.relkind = 'r' AND c.relname ~ '^(annotation|version_sample)_v[0-9]+$'
    AND to_regclass('packhorse.annotation_by_version') IS NOT NULL ORDER BY c.relname";
/// Who holds locks of our tables and views.
const HOLDERS: &str = "SELECT DISTINCT l.pid, coalesce(a.application_name, ''), coalesce(a.state, '')
    FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_namespace n ON n.oid = c.relnamespace
    LEFT JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE n.nspname = 'packhorse' AND l.granted AND l.pid <> pg_backend_pid()
    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) ORDER BY 1";

impl Postgres {
    /// Creates the schema, or brings it to this revision.
    pub(super) async fn migrate(&self, conn: &mut PgConnection) -> Result<(), Fault> {
        let mut migrator = sqlx::migrate!("../../migrations/labels-postgres");
        // The schema does not depend on the search path. Two daemons that start at once are
        // serialised by our own lock, which also covers the schema.
        migrator.set_locking(false);
        migrator.dangerous_set_table_name("packhorse.schema_migration");
        self.run(
            conn,
            "take the lock of migrations",
            format!("SELECT pg_advisory_lock({MIGRATION_LOCK})"),
        )
        .await?;
        // Checked first, because CREATE SCHEMA IF NOT EXISTS requires the permission to create a
        // schema even if it exists.
        let query = sqlx::query_scalar("SELECT to_regnamespace('packhorse') IS NOT NULL");
        let exists: bool = self
            .within(
                "look up the schema",
                LABEL_STATEMENT_MAX,
                query.fetch_one(&mut *conn),
            )
            .await?;
        if !exists {
            self.run(conn, "create the schema", "CREATE SCHEMA packhorse".into())
                .await?;
        }
        self.migrate_to(conn, &migrator, Some(TABLES_FOR_ALL_VERSIONS))
            .await?;
        self.move_rows(conn).await?;
        self.migrate_to(conn, &migrator, None).await?;
        self.drop_partitions(conn).await?;
        self.run(
            conn,
            "release the lock of migrations",
            format!("SELECT pg_advisory_unlock({MIGRATION_LOCK})"),
        )
        .await
    }

    /// Runs the migrations up to `target`. One that needs a lock of readers waits only briefly for
    /// it, and is tried several times, because new readers queue behind a waiting lock.
    async fn migrate_to(
        &self,
        conn: &mut PgConnection,
        migrator: &Migrator,
        target: Option<i64>,
    ) -> Result<(), Fault> {
        let what = "migrate the schema";
        let mut pause = PAUSE;
        for tries in 1.. {
            let run = migrator.run_direct(target, &mut *conn, false);
            let error = match tokio::time::timeout(LABEL_STATEMENT_MAX, run).await {
                Ok(Ok(())) => break,
                Ok(Err(
                    MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _),
                )) => error,
                Ok(Err(error)) => {
                    return Err(Fault::config(format!(
                        "{}: the schema packhorse was created by another program or by a newer version: {error}",
                        self.place
                    ))
                    .with_next("run the version of packhorse that created it, or a newer one"));
                }
                Err(_) => {
                    return Err(Fault::unreachable(format!(
                        "{} did not answer ({what})",
                        self.place
                    )));
                }
            };
            let code = error
                .as_database_error()
                .and_then(|e| e.code())
                .unwrap_or_default();
            if !["55P03", "40P01"].contains(&code.as_ref()) {
                return Err(self.fault(what, &error));
            }
            if tries == LABEL_DDL_TRIES_MAX {
                let query = sqlx::query_as(HOLDERS).fetch_all(&mut *conn);
                let holders = self.within(what, LABEL_STATEMENT_MAX, query).await?;
                return Err(if holders.is_empty() {
                    self.fault(what, &error)
                } else {
                    self.blocked_by(&holders)
                });
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        Ok(())
    }

    /// Copies the rows of each version out of its partitions.
    async fn move_rows(&self, conn: &mut PgConnection) -> Result<(), Fault> {
        let waits = "SELECT to_regclass('packhorse.annotation_of_all') IS NOT NULL";
        let query = sqlx::query_scalar(waits).fetch_one(&mut *conn);
        let waits: bool = self
            .within("look up the tables", LABEL_STATEMENT_MAX, query)
            .await?;
        if !waits {
            return Ok(());
        }
        let query = sqlx::query_scalar(NOT_MOVED).fetch_all(&mut *conn);
        let versions: Vec<i64> = self
            .within("look up the versions", LABEL_STATEMENT_MAX, query)
            .await?;
        for (at, id) in versions.iter().enumerate() {
            tracing::info!(
                version = at + 1,
                of = versions.len(),
                "the rows of a label version are copied into the tables for all versions"
            );
            let copy = format!(
                "BEGIN; {NO_TIME_LIMITS_HERE};
                 INSERT INTO packhorse.version_sample_of_all (version_id, sample_no, path, hash, width, height, split, meta)
                 SELECT version_id, sample_no, path, hash, width, height, split, meta
                 FROM packhorse.version_sample WHERE version_id = {id} ORDER BY sample_no;
                 INSERT INTO packhorse.annotation_of_all (version_id, ann_no, sample_no, class_id, kind, x, y, w, h, geom, attrs, raw)
                 SELECT version_id, ann_no, sample_no, class_id, kind, x, y, w, h, geom, attrs, raw
                 FROM packhorse.annotation WHERE version_id = {id} ORDER BY ann_no;
                 COMMIT"
            );
            self.run(conn, "copy the rows of a version", copy).await?;
        }
        let analyse =
            "ANALYZE (SKIP_LOCKED) packhorse.version_sample_of_all, packhorse.annotation_of_all";
        self.run(conn, "analyse the rows", analyse.into()).await
    }

    /// Drops the partitions after the move. What somebody else uses stays until a later delivery.
    async fn drop_partitions(&self, conn: &mut PgConnection) -> Result<(), Fault> {
        let what = "drop the partitions";
        let query = sqlx::query("SELECT to_regclass('packhorse.annotation_by_version') IS NULL");
        let row = self
            .within(what, LABEL_STATEMENT_MAX, query.fetch_one(&mut *conn))
            .await?;
        if row.try_get(0).map_err(|e| self.fault(what, &e))? {
            return Ok(());
        }
        let query = sqlx::query_scalar(OF_VERSIONS).fetch_all(&mut *conn);
        let tables: Vec<String> = self.within(what, LABEL_STATEMENT_MAX, query).await?;
        let parents = ["annotation_by_version", "version_sample_by_version"].map(String::from);
        for some in tables.chunks(DROPPED_AT_ONCE).chain([&parents[..]]) {
            let names: Vec<String> = some.iter().map(|t| format!("packhorse.{t}")).collect();
            let drop = format!(
                "BEGIN; SET LOCAL lock_timeout = {}; DROP TABLE {}; COMMIT",
                DROP_LOCK_WAIT.as_millis(),
                names.join(", ")
            );
            if let Err(fault) = self.run(conn, what, drop).await {
                self.run(conn, what, "ROLLBACK".into()).await?;
                tracing::warn!(error = %fault, "partitions of label versions that are no longer used cannot be dropped now; a later delivery tries again");
                break;
            }
        }
        Ok(())
    }
}

//! The connection to the server: sessions, time limits, the classes of its errors, permissions and
//! migrations.

use std::future::Future;
use std::time::Duration;

use sqlx::migrate::MigrateError;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, Row};

use super::{Postgres, password};
use base::fault::{Fault, Reason};
use base::limits::{LABEL_CONNECT_MAX, LABEL_LOCK_WAIT_MAX, LABEL_STATEMENT_MAX};

/// An arbitrary number of our own: the advisory lock for creating and migrating the schema.
const MIGRATION_LOCK: i64 = 0x7061_636b_686f_7273;
const VERSION_MIN: u32 = 150_000;
const DDL_LOCK_WAIT: Duration = Duration::from_millis(500);

/// The settings of our sessions, which override those of the role and the database. A time limit
/// for statements or transactions would abort a long copy each time at the same place; all our
/// waits have their own limits. A commit must be durable when it returns.
fn session_settings(version: u32) -> String {
    let transaction_timeout = if version >= 170_000 {
        "SET transaction_timeout = 0;"
    } else {
        ""
    };
    format!(
        "SET lock_timeout = {}; {NO_TIME_LIMITS}; SET idle_session_timeout = 0; {transaction_timeout}
         SET default_transaction_read_only = off; SET default_transaction_isolation = 'read committed';
         SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') IN ('off', 'local');
         SET client_min_messages = warning; SET TimeZone = 'UTC';
         SET tcp_keepalives_idle = 20; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 4",
        LABEL_LOCK_WAIT_MAX.as_millis()
    )
}

const NO_TIME_LIMITS: &str =
    "SET statement_timeout = 0; SET idle_in_transaction_session_timeout = 0";
/// The same for one transaction: a connection pool may run each transaction in another session.
pub(super) const NO_TIME_LIMITS_HERE: &str =
    "SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction_session_timeout = 0";

impl Postgres {
    pub(super) async fn connect(&self) -> Result<PgConnection, Fault> {
        let mut options = self.options.clone();
        if let Some(file) = self.password_file.clone() {
            let read = move || password(&file).map_err(|e| Fault::secret_unreadable(&file, &e));
            let secret = self.threads.run(read).await?;
            options = options.password(&secret);
        }
        let mut conn = match tokio::time::timeout(LABEL_CONNECT_MAX, options.connect()).await {
            Ok(Ok(conn)) => conn,
            Ok(Err(error)) => return Err(self.fault("connect", &error)),
            Err(_) => {
                return Err(Fault::unreachable(format!(
                    "{} did not respond within {} s",
                    self.place,
                    LABEL_CONNECT_MAX.as_secs()
                )));
            }
        };
        let version = conn.server_version_num().unwrap_or(0);
        if version < VERSION_MIN {
            return Err(Fault::not_allowed(format!(
                "{} is PostgreSQL {}; version 15 or newer is required",
                self.place,
                version / 10_000
            ))
            .with_next("configure a newer server in [sink.labels]"));
        }
        self.run(&mut conn, "set up the session", session_settings(version))
            .await?;
        Ok(conn)
    }

    /// Waits for a future of the driver with a time limit, and classifies its error.
    pub(super) async fn within<T>(
        &self,
        what: &str,
        limit: Duration,
        future: impl Future<Output = sqlx::Result<T>>,
    ) -> Result<T, Fault> {
        match tokio::time::timeout(limit, future).await {
            Ok(result) => result.map_err(|e| self.fault(what, &e)),
            Err(_) => Err(Fault::unreachable(format!(
                "{} did not respond within {} s ({what})",
                self.place,
                limit.as_secs()
            ))),
        }
    }

    /// Runs statements without parameters. Only internal numbers are ever inserted into them.
    pub(super) async fn run(
        &self,
        conn: &mut PgConnection,
        what: &str,
        sql: String,
    ) -> Result<(), Fault> {
        self.within(
            what,
            LABEL_STATEMENT_MAX,
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(conn),
        )
        .await?;
        Ok(())
    }

    /// Runs a transaction that needs a lock which others may hold. Tries it up to `tries_max` times
    /// and waits only briefly each time, because new readers queue behind a waiting lock.
    pub(super) async fn change_tables(
        &self,
        conn: &mut PgConnection,
        what: &str,
        sql: &str,
        tries_max: u32,
    ) -> Result<(), Fault> {
        let script = format!(
            "BEGIN; SET LOCAL lock_timeout = {}; {sql}; COMMIT",
            DDL_LOCK_WAIT.as_millis()
        );
        let mut pause = Duration::from_millis(100);
        for tries in 1.. {
            let result = tokio::time::timeout(
                LABEL_STATEMENT_MAX,
                sqlx::raw_sql(AssertSqlSafe(script.clone())).execute(&mut *conn),
            )
            .await;
            let error = match result {
                Ok(Ok(_)) => break,
                Ok(Err(error)) => error,
                Err(_) => {
                    return Err(Fault::unreachable(format!(
                        "{} did not respond ({what})",
                        self.place
                    )));
                }
            };
            let locked = error
                .as_database_error()
                .and_then(|e| e.code())
                .is_some_and(|code| code == "55P03" || code == "40P01");
            if !locked {
                return Err(self.fault(what, &error));
            }
            self.run(conn, what, "ROLLBACK".into()).await?;
            if tries == tries_max {
                return Err(self.fault(what, &error));
            }
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
        Ok(())
    }

    pub(super) async fn close(&self, conn: PgConnection) {
        // Everything is committed; an error while closing the connection is ignored.
        let _ = tokio::time::timeout(LABEL_CONNECT_MAX, conn.close()).await;
    }

    /// Classifies an error by its SQLSTATE (PostgreSQL documentation, appendix A).
    pub(in crate::labels) fn fault(&self, what: &str, error: &sqlx::Error) -> Fault {
        let place = &self.place;
        let user = self.options.get_username();
        let Some(database) = error.as_database_error() else {
            return match error {
                sqlx::Error::Io(e) => Fault::unreachable(format!("{place} cannot be reached ({what}): {e}")),
                sqlx::Error::Tls(e) => Fault::unreachable(format!("{place}: the TLS connection failed ({what}): {e}"))
                    .with_next("check the server's certificate and sslmode/sslrootcert in the url of [sink.labels]"),
                sqlx::Error::Configuration(e) => Fault::config(format!("{place}: {e}")),
                sqlx::Error::Protocol(e) => Fault::unreachable(format!("{place} closed the connection ({what}): {e}")),
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
            "53100" => Fault::no_space(message).with_next("free space on the database's disk; the transfer resumes automatically"),
            "40001" | "40P01" | "55P03" => Fault::unreachable(message).with_next("other sessions hold locks; this is retried automatically"),
            "42P05" | "26000" => Fault::config(message)
                .with_reason(Reason::SinkUnavailable)
                .with_next("this is a connection pool in transaction mode: configure the server itself or a pool in session mode in [sink.labels]"),
            "25006" => Fault::unreachable(message).with_next("this server is read-only (possibly a standby); this is retried automatically"),
            c if c.starts_with("28") => Fault::not_allowed(message)
                .with_next(format!("check the user {user} and the password_file in [sink.labels], and pg_hba.conf on the server")),
            "54001" => Fault::integrity(message),
            c if c.starts_with("22") || c.starts_with("23") => Fault::integrity(message),
            // Insufficient resources, operator intervention, a lost connection, a time limit of the
            // server.
            c if ["53", "57", "58", "08", "25P"].iter().any(|class| c.starts_with(class)) => Fault::unreachable(message),
            c => Fault::internal(format!("{message} ({c})")),
        }
    }

    /// Whether the schema exists; it does not before the first commit.
    pub(super) async fn has_schema(&self, conn: &mut PgConnection) -> Result<bool, Fault> {
        // `to_regclass` would fail for a role without access to the schema.
        let query = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE n.nspname = 'packhorse' AND c.relname = 'label_active')",
        );
        self.within(
            "look up the schema",
            LABEL_STATEMENT_MAX,
            query.fetch_one(conn),
        )
        .await
    }

    pub(super) async fn rights(&self, conn: &mut PgConnection) -> Result<(), Fault> {
        let query = sqlx::query(
            "SELECT pg_is_in_recovery(), to_regnamespace('packhorse') IS NOT NULL,
             CASE WHEN to_regnamespace('packhorse') IS NULL THEN has_database_privilege(current_database(), 'CREATE')
                  ELSE has_schema_privilege('packhorse', 'CREATE') AND has_schema_privilege('packhorse', 'USAGE') END,
             (SELECT coalesce(bool_and(pg_has_role(c.relowner, 'USAGE')), true)
              FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'packhorse' AND c.relname = 'annotation')",
        );
        let row = self
            .within(
                "read the permissions",
                LABEL_STATEMENT_MAX,
                query.fetch_one(conn),
            )
            .await?;
        let column_value = |column: usize| {
            row.try_get::<bool, _>(column)
                .map_err(|e| self.fault("read the permissions", &e))
        };
        let user = self.options.get_username();
        let (standby, exists, may_create, owns_tables) = (
            column_value(0)?,
            column_value(1)?,
            column_value(2)?,
            column_value(3)?,
        );
        if standby {
            return Err(Fault::unreachable(format!(
                "{} is a standby and is read-only",
                self.place
            ))
            .with_next("configure the primary in [sink.labels]; this is retried automatically"));
        }
        if !may_create {
            let (what, grant) = if exists {
                (
                    "in the schema packhorse",
                    format!("GRANT CREATE, USAGE ON SCHEMA packhorse TO {user}"),
                )
            } else {
                ("a schema", format!("GRANT CREATE ON DATABASE … TO {user}"))
            };
            return Err(Fault::not_allowed(format!(
                "{}: the user {user} may not create {what}",
                self.place
            ))
            .with_next(format!("as the database's owner: {grant}")));
        }
        if !owns_tables {
            return Err(Fault::not_allowed(format!(
                "{}: the tables in the schema packhorse do not belong to {user}",
                self.place
            ))
            .with_next(format!(
                "use their owner in [sink.labels], or GRANT that role TO {user}"
            )));
        }
        Ok(())
    }

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
        match tokio::time::timeout(LABEL_STATEMENT_MAX, migrator.run_direct(None, conn, false))
            .await
        {
            Ok(Ok(())) => {}
            Ok(Err(MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _))) => {
                return Err(self.fault("migrate the schema", &error));
            }
            Ok(Err(error)) => {
                return Err(Fault::config(format!(
                    "{}: the schema packhorse was created by another program or by a newer version: {error}",
                    self.place
                ))
                .with_next("run the version of packhorse that created it, or a newer one"));
            }
            Err(_) => {
                return Err(Fault::unreachable(format!(
                    "{} did not answer (migrate the schema)",
                    self.place
                )));
            }
        }
        self.run(
            conn,
            "release the lock of migrations",
            format!("SELECT pg_advisory_unlock({MIGRATION_LOCK})"),
        )
        .await
    }

    /// Takes the lock of a label set for the lifetime of the connection.
    pub(super) async fn lock_set(&self, conn: &mut PgConnection, set: &str) -> Result<(), Fault> {
        let query = sqlx::query("SELECT pg_advisory_lock(hashtextextended($1, 0))")
            .bind(format!("packhorse.labels/{set}"));
        self.within(
            "take the lock of the label set",
            LABEL_STATEMENT_MAX,
            query.execute(conn),
        )
        .await?;
        Ok(())
    }
}

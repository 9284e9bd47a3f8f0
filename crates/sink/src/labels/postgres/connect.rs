//! Speaking to the server: sessions, bounded waits, the classes of its errors, rights and
//! migrations.

use std::future::Future;
use std::time::Duration;

use sqlx::migrate::MigrateError;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, Row};

use super::{Postgres, password};
use base::fault::{Fault, Reason};
use base::limits::{LABEL_CONNECT_MAX, LABEL_LOCK_WAIT_MAX, LABEL_STATEMENT_MAX};

/// Any number of our own: the lock under which the schema is made and migrated.
const MIGRATION_LOCK: i64 = 0x7061_636b_686f_7273;
const VERSION_MIN: u32 = 150_000;
const DDL_LOCK_WAIT: Duration = Duration::from_millis(500);

/// What holds in our sessions whatever the role or the database sets. A limit on a statement's or a
/// transaction's time would end a long copy each time at the same place; every wait of ours has a
/// limit of its own. A commit must be durable when it returns.
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
/// The same for one transaction: a pool between may give each transaction another session.
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
                    "{} did not answer in {} s",
                    self.place,
                    LABEL_CONNECT_MAX.as_secs()
                )));
            }
        };
        let version = conn.server_version_num().unwrap_or(0);
        if version < VERSION_MIN {
            return Err(Fault::not_allowed(format!(
                "{} is PostgreSQL {}; 15 or newer is needed",
                self.place,
                version / 10_000
            ))
            .with_next("name a newer server in [sink.labels]"));
        }
        self.run(&mut conn, "set up the session", session_settings(version))
            .await?;
        Ok(conn)
    }

    /// A future of the driver, bounded in time, its error classed.
    pub(super) async fn within<T>(
        &self,
        what: &str,
        limit: Duration,
        future: impl Future<Output = sqlx::Result<T>>,
    ) -> Result<T, Fault> {
        match tokio::time::timeout(limit, future).await {
            Ok(result) => result.map_err(|e| self.fault(what, &e)),
            Err(_) => Err(Fault::unreachable(format!(
                "{} did not answer in {} s ({what})",
                self.place,
                limit.as_secs()
            ))),
        }
    }

    /// Runs statements without parameters. Only numbers of our own are ever put into them.
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

    /// Runs a transaction that needs a lock which others may hold, so many times, each time waiting
    /// only briefly: new readers queue up behind whoever waits for such a lock.
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
                        "{} did not answer ({what})",
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
        // All is committed by now; a connection that cannot say goodbye is no fault.
        let _ = tokio::time::timeout(LABEL_CONNECT_MAX, conn.close()).await;
    }

    /// Classes an error by its SQLSTATE (PostgreSQL documentation, appendix A).
    pub(in crate::labels) fn fault(&self, what: &str, error: &sqlx::Error) -> Fault {
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
            "42P05" | "26000" => Fault::config(message)
                .with_reason(Reason::SinkUnavailable)
                .with_next("this is a pool in transaction mode: name the server itself in [sink.labels], or a pool in session mode"),
            "25006" => Fault::unreachable(message).with_next("this server is read-only now (a standby?); this is tried again by itself"),
            c if c.starts_with("28") => Fault::not_allowed(message)
                .with_next(format!("check the user {user} and the password_file in [sink.labels], and pg_hba.conf on the server")),
            "54001" => Fault::integrity(message),
            c if c.starts_with("22") || c.starts_with("23") => Fault::integrity(message),
            // Insufficient resources, an operator's intervention, a connection's end, a time limit
            // of the server's.
            c if ["53", "57", "58", "08", "25P"].iter().any(|class| c.starts_with(class)) => Fault::unreachable(message),
            c => Fault::internal(format!("{message} ({c})")),
        }
    }

    /// Whether the schema is there at all; before the first commit it is not.
    pub(super) async fn has_schema(&self, conn: &mut PgConnection) -> Result<bool, Fault> {
        // Not to_regclass: that is an error for whoever may not look into the schema.
        let query = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE n.nspname = 'packhorse' AND c.relname = 'label_active')",
        );
        self.within(
            "look for the schema",
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
                "read the rights",
                LABEL_STATEMENT_MAX,
                query.fetch_one(conn),
            )
            .await?;
        let get = |column: usize| {
            row.try_get::<bool, _>(column)
                .map_err(|e| self.fault("read the rights", &e))
        };
        let user = self.options.get_username();
        let (standby, exists, may_create, owns) = (get(0)?, get(1)?, get(2)?, get(3)?);
        if standby {
            return Err(Fault::unreachable(format!(
                "{} is a standby and cannot be written to",
                self.place
            ))
            .with_next("name the primary in [sink.labels]; this is tried again by itself"));
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
        if !owns {
            return Err(Fault::not_allowed(format!(
                "{}: the tables in the schema packhorse belong to another user than {user}",
                self.place
            ))
            .with_next(format!(
                "use that user in [sink.labels], or GRANT it TO {user}"
            )));
        }
        Ok(())
    }

    pub(super) async fn migrate(&self, conn: &mut PgConnection) -> Result<(), Fault> {
        let mut migrator = sqlx::migrate!("../../migrations/labels-postgres");
        // In our own schema, whatever the search path is; two daemons that start at once are kept
        // apart by our own lock, which covers the schema too.
        migrator.set_locking(false);
        migrator.dangerous_set_table_name("packhorse.schema_migration");
        self.run(
            conn,
            "take the lock of migrations",
            format!("SELECT pg_advisory_lock({MIGRATION_LOCK})"),
        )
        .await?;
        // Asked first, because CREATE SCHEMA IF NOT EXISTS wants the right to create one even where
        // it exists.
        let query = sqlx::query_scalar("SELECT to_regnamespace('packhorse') IS NOT NULL");
        let exists: bool = self
            .within(
                "look for the schema",
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
                    "{}: the schema packhorse is not this program's, or newer than it: {error}",
                    self.place
                ))
                .with_next("run the version of packhorse that made it, or a newer one"));
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
            "give back the lock of migrations",
            format!("SELECT pg_advisory_unlock({MIGRATION_LOCK})"),
        )
        .await
    }

    /// Takes the lock of a label set for as long as the connection lives.
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

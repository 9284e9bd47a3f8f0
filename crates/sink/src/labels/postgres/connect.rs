//! The connection to the server: sessions, time limits, the classes of its errors, and permissions.

use std::future::Future;
use std::time::Duration;

use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection, Row};

use super::{Postgres, password};
use base::fault::{Fault, Reason};
use base::limits::{LABEL_CONNECT_MAX, LABEL_LOCK_WAIT_MAX, LABEL_STATEMENT_MAX};

const VERSION_MIN: u32 = 150_000;

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
         SET client_min_messages = warning; SET TimeZone = 'UTC'; SET extra_float_digits = 1;
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
        let mut conn = self.open().await?;
        let version = conn.server_version_num().unwrap_or(0);
        self.run(&mut conn, "set up the session", session_settings(version))
            .await?;
        Ok(conn)
    }

    /// A connection without the settings of our sessions.
    async fn open(&self) -> Result<PgConnection, Fault> {
        let mut options = self.options.clone();
        if let Some(file) = self.password_file.clone() {
            let read = move || password(&file).map_err(|e| Fault::secret_unreadable(&file, &e));
            let secret = self.threads.run(read).await?;
            options = options.password(&secret);
        }
        let conn = match tokio::time::timeout(LABEL_CONNECT_MAX, options.connect()).await {
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
        Ok(conn)
    }

    /// Refuses a connection pool in transaction mode, which gives the server's session of one
    /// connection to another between two transactions: settings, locks and prepared statements of
    /// a session do not work there. Two open connections with one session, or one connection that
    /// changes its session, give it away.
    pub(super) async fn check_sessions(&self) -> Result<(), Fault> {
        let (mut first, mut second) = (self.open().await?, self.open().await?);
        let once = format!("BEGIN; {NO_TIME_LIMITS_HERE}; SELECT pg_backend_pid(); COMMIT");
        let before = self.session(&mut first, once.clone()).await?;
        // The second connection keeps its transaction open, and with it a session.
        let held = format!("BEGIN; {NO_TIME_LIMITS_HERE}; SELECT pg_backend_pid()");
        let other = self.session(&mut second, held).await?;
        // A pool of one session would not answer the first connection now, which is asked last.
        let shared = other == before || self.session(&mut first, once).await? != before;
        self.close(second).await;
        self.close(first).await;
        if shared {
            return Err(self.pooled(format!(
                "{} is a connection pool in transaction mode",
                self.place
            )));
        }
        Ok(())
    }

    /// The server's process of a connection, without a prepared statement.
    async fn session(&self, conn: &mut PgConnection, sql: String) -> Result<i32, Fault> {
        let what = "look up the session";
        let query = sqlx::raw_sql(AssertSqlSafe(sql));
        let rows = self
            .within(what, LABEL_CONNECT_MAX, query.fetch_all(conn))
            .await?;
        let row = rows.first().ok_or_else(|| {
            Fault::unreachable(format!("{} did not name its session", self.place))
        })?;
        row.try_get(0).map_err(|e| self.fault(what, &e))
    }

    fn pooled(&self, message: String) -> Fault {
        Fault::config(message)
            .with_reason(Reason::SinkUnavailable)
            .with_next("name the server itself in [sink.labels], or a pool in session mode (PgBouncer: pool_mode = session)")
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
                sqlx::Error::Io(e) if self.is_tls(e) => self.tls_fault(what, &e.to_string()),
                sqlx::Error::Io(e) => {
                    Fault::unreachable(format!("{place} cannot be reached ({what}): {e}"))
                }
                sqlx::Error::Tls(e) => self.tls_fault(what, &e.to_string()),
                sqlx::Error::Configuration(e) => Fault::config(format!("{place}: {e}")),
                sqlx::Error::Protocol(e) => {
                    Fault::unreachable(format!("{place} closed the connection ({what}): {e}"))
                }
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
            "42P05" | "26000" => self.pooled(format!("{message}: this is a connection pool in transaction mode")),
            "08P01" if database.message().contains("startup parameter") => Fault::config(message)
                .with_reason(Reason::SinkUnavailable)
                .with_next("name the server itself in [sink.labels], or let the pool accept this parameter (PgBouncer: ignore_startup_parameters)"),
            _ if database.message().contains("pooling mode") => self.pooled(message),
            "28000" if database.message().contains("no encryption") => self.tls_fault(what, database.message()),
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

    /// Whether an error of a connection over TCP is one of TLS. The driver gives those of the
    /// handshake, and those of the file of `sslrootcert`, as errors of input and output.
    fn is_tls(&self, error: &std::io::Error) -> bool {
        use std::io::ErrorKind;
        const WORDS: [&str; 6] = [
            "certificate",
            "fatal alert",
            "peer is incompatible",
            "peer misbehaved",
            "corrupt message",
            "tls",
        ];
        let is_file = matches!(
            error.kind(),
            ErrorKind::NotFound | ErrorKind::PermissionDenied
        );
        let text = error.to_string();
        self.options.get_socket().is_none()
            && (is_file || WORDS.iter().any(|word| text.contains(word)))
    }

    /// A fault of TLS, with what to do about its cause.
    fn tls_fault(&self, what: &str, why: &str) -> Fault {
        let has = |words: &[&str]| words.iter().any(|word| why.contains(word));
        let next = if has(&["NotValidForName", "not valid for name", "certificate name"]) {
            "the server's certificate is for another name: use that name as the host in the url of [sink.labels], or sslmode=verify-ca"
        } else if has(&["Expired", "expired", "NotValidYet", "not valid yet"]) {
            "the server's certificate is outside of its time: renew it, and check both clocks"
        } else if has(&[
            "UnknownIssuer",
            "CaUsedAsEndEntity",
            "BadSignature",
            "self-signed",
            "self signed",
        ]) {
            "the server's certificate is not signed by a known CA: set sslrootcert in the url of [sink.labels] to the certificate of its CA"
        } else if has(&["CertificateRequired", "certificate required"]) {
            "the server asks for a certificate of the client: set sslcert and sslkey in the url of [sink.labels]"
        } else if has(&["does not support"]) {
            "the server has no TLS: set ssl = on there, or sslmode=disable in the url of [sink.labels]"
        } else if has(&["no encryption"]) {
            "the server demands TLS: set sslmode=require (or verify-full) in the url of [sink.labels]"
        } else {
            "check the server's certificate, and sslmode, sslrootcert, sslcert and sslkey in the url of [sink.labels]"
        };
        Fault::unreachable(format!(
            "{}: the TLS connection failed ({what}): {why}",
            self.place
        ))
        .with_next(next)
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
              FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'packhorse' AND c.relname = 'annotation'),
             current_setting('server_encoding')",
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
        let encoding: String = row
            .try_get(4)
            .map_err(|e| self.fault("read the permissions", &e))?;
        if encoding != "UTF8" {
            return Err(Fault::not_allowed(format!(
                "{} has the encoding {encoding}, which cannot store every text",
                self.place
            ))
            .with_next("create a database with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0, and name it in [sink.labels]"));
        }
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

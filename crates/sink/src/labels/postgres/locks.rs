//! Waiting for locks of other sessions: a second session checks who holds them, and whether our
//! session still exists.
//!
//! A statement that waits for a lock reports nothing, and an error after the wait names no session.
//! Therefore, while a call takes longer than a moment, a second session asks the server which
//! sessions block ours, and reports them with their applications.

use std::fmt::Write as _;
use std::future::Future;
use std::time::Duration;

use sqlx::PgConnection;
use tokio::time::{Instant, sleep, timeout};

use super::Postgres;
use crate::Waits;
use base::fault::{Fault, Reason};
use base::limits::{
    LABEL_BLOCKED_REPORT_AFTER, LABEL_CONNECT_MAX, LABEL_UNREACHABLE_MAX, OFFENDERS_LISTED_MAX,
};

/// The interval of the checks.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A call that was not blocked for this long is considered running again. Longer than the pause
/// between two attempts for one lock.
const UNBLOCKED_AFTER: Duration = Duration::from_secs(5);

/// The sessions that hold what `$1` waits for, and whether `$1` exists. Every role can read the
/// application name.
const BLOCKERS: &str = "SELECT DISTINCT b.pid, coalesce(a.application_name, ''), coalesce(a.state, '')
    FROM unnest(pg_blocking_pids($1)) AS b(pid) LEFT JOIN pg_stat_activity a ON a.pid = b.pid ORDER BY 1";
const ALIVE: &str = "SELECT EXISTS (SELECT 1 FROM pg_stat_activity WHERE pid = $1)";

pub(super) type Blocker = (i32, String, String);

impl Postgres {
    /// The process id of a session at the server.
    pub(super) async fn pid(&self, conn: &mut PgConnection) -> Result<i32, Fault> {
        self.within(
            "read the session's process id",
            LABEL_CONNECT_MAX,
            sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(conn),
        )
        .await
    }

    /// Runs `work` in the session `pid`. Reports meanwhile which sessions block it; the fault of a
    /// wait that was too long also names them. Fails if the server has lost the session or is no
    /// longer reachable.
    pub(super) async fn watched<T>(
        &self,
        pid: i32,
        waits: &Waits,
        work: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        tokio::pin!(work);
        let ended = tokio::select! {
            ended = &mut work => ended,
            lost = self.watch(pid, waits) => Err(lost),
        };
        match (ended, waits.now()) {
            // The call failed because of the wait, and the report contains more details.
            (Err(fault), Some(report)) if fault.reason == Reason::SinkUnavailable => Err(report),
            (ended, _) => {
                waits.clear();
                ended
            }
        }
    }

    /// Checks until the session is lost. Returns the reason.
    async fn watch(&self, pid: i32, waits: &Waits) -> Fault {
        sleep(LABEL_BLOCKED_REPORT_AFTER).await;
        let mut second_session: Option<PgConnection> = None;
        let mut last_answer = Instant::now();
        let mut blocked: Option<Instant> = None;
        loop {
            let found = match self.look(&mut second_session, pid).await {
                Ok(None) => {
                    return Fault::unreachable(format!(
                        "{}: the server terminated the session of this delivery",
                        self.place
                    ));
                }
                Ok(Some(found)) => {
                    last_answer = Instant::now();
                    found
                }
                Err(fault) => {
                    second_session = None;
                    // A server without a free session for us may still process the first one.
                    if fault.reason == Reason::SinkUnavailable {
                        if last_answer.elapsed() >= LABEL_UNREACHABLE_MAX {
                            return fault;
                        }
                        waits.report(fault);
                    }
                    sleep(LABEL_BLOCKED_REPORT_AFTER).await;
                    continue;
                }
            };
            if !found.is_empty() {
                blocked = Some(Instant::now());
                waits.report(self.blocked_by(&found));
            } else if blocked.is_none_or(|at| at.elapsed() >= UNBLOCKED_AFTER) {
                blocked = None;
                waits.clear();
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// The sessions that block the session; `None` if the server does not have it.
    async fn look(
        &self,
        second_session: &mut Option<PgConnection>,
        pid: i32,
    ) -> Result<Option<Vec<Blocker>>, Fault> {
        let conn = match second_session {
            Some(conn) => conn,
            None => second_session.insert(self.connect().await?),
        };
        let look = async {
            let alive: bool = sqlx::query_scalar(ALIVE)
                .bind(pid)
                .fetch_one(&mut *conn)
                .await?;
            let found = sqlx::query_as::<_, Blocker>(BLOCKERS)
                .bind(pid)
                .fetch_all(&mut *conn)
                .await?;
            sqlx::Result::Ok(alive.then_some(found))
        };
        match timeout(LABEL_CONNECT_MAX, look).await {
            Ok(result) => result.map_err(|e| self.fault("look up locks", &e)),
            Err(_) => Err(Fault::unreachable(format!(
                "{} did not respond within {} s (look up locks)",
                self.place,
                LABEL_CONNECT_MAX.as_secs()
            ))),
        }
    }

    pub(super) fn blocked_by(&self, found: &[Blocker]) -> Fault {
        let mut who = String::new();
        for (pid, application, state) in found.iter().take(OFFENDERS_LISTED_MAX) {
            if !who.is_empty() {
                who.push_str(", ");
            }
            let _ = match pid {
                0 => write!(who, "a prepared transaction"),
                pid => write!(who, "server process {pid}"),
            };
            let application: String = application
                .chars()
                .filter(|c| !c.is_control())
                .take(64)
                .collect();
            let more: Vec<&str> = [application.as_str(), state.as_str()]
                .into_iter()
                .filter(|text| !text.is_empty())
                .collect();
            if !more.is_empty() {
                let _ = write!(who, " ({})", more.join(", "));
            }
        }
        let pid = found.iter().map(|(pid, ..)| *pid).find(|pid| *pid != 0);
        let end = pid.map_or("see pg_prepared_xacts".to_owned(), |pid| {
            format!("SELECT pg_terminate_backend({pid})")
        });
        Fault::unreachable(format!("{}: the delivery waits for a lock that another session holds: {who}", self.place)).with_next(format!(
            "end that transaction, or as an administrator of the database: {end}; then the delivery resumes automatically"
        ))
    }
}

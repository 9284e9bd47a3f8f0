//! Waiting for the locks of others: a second session looks who holds them, and whether ours is
//! still alive.
//!
//! A statement that waits for a lock says nothing, and an error after the wait names nobody. So
//! while a call runs longer than a moment, a session beside it asks the server by which sessions
//! ours is blocked, and reports them with their application.

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

/// How often the second session looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A call that was not blocked for this long continues. Longer than the pause between two tries for
/// one lock.
const CALM: Duration = Duration::from_secs(5);

/// The sessions that hold what `$1` waits for, and whether `$1` is there at all. The application's
/// name may be read by everybody.
const BLOCKERS: &str = "SELECT DISTINCT b.pid, coalesce(a.application_name, ''), coalesce(a.state, '')
    FROM unnest(pg_blocking_pids($1)) AS b(pid) LEFT JOIN pg_stat_activity a ON a.pid = b.pid ORDER BY 1";
const ALIVE: &str = "SELECT EXISTS (SELECT 1 FROM pg_stat_activity WHERE pid = $1)";

type Blocker = (i32, String, String);

impl Postgres {
    /// The server process of a session.
    pub(super) async fn pid(&self, conn: &mut PgConnection) -> Result<i32, Fault> {
        self.within(
            "read the session's number",
            LABEL_CONNECT_MAX,
            sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(conn),
        )
        .await
    }

    /// Does `work` in the session `pid`. Reports meanwhile who blocks it; the fault of a wait that
    /// was too long names them too. Ends with a fault when the server has lost the session, or
    /// cannot be reached any more.
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
            // What it ended with is the wait itself, and the report says more of it.
            (Err(fault), Some(report)) if fault.reason == Reason::SinkUnavailable => Err(report),
            (ended, _) => {
                waits.clear();
                ended
            }
        }
    }

    /// Looks until the session is lost; returns why.
    async fn watch(&self, pid: i32, waits: &Waits) -> Fault {
        sleep(LABEL_BLOCKED_REPORT_AFTER).await;
        let mut beside: Option<PgConnection> = None;
        let mut answered = Instant::now();
        let mut blocked: Option<Instant> = None;
        loop {
            let found = match self.look(&mut beside, pid).await {
                Ok(None) => {
                    return Fault::unreachable(format!(
                        "{}: the server ended the session of this delivery",
                        self.place
                    ));
                }
                Ok(Some(found)) => {
                    answered = Instant::now();
                    found
                }
                Err(fault) => {
                    beside = None;
                    // One that has no session left for us may still work on the first.
                    if fault.reason == Reason::SinkUnavailable {
                        if answered.elapsed() >= LABEL_UNREACHABLE_MAX {
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
            } else if blocked.is_none_or(|at| at.elapsed() >= CALM) {
                blocked = None;
                waits.clear();
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Who blocks the session; `None` when the server does not have it.
    async fn look(
        &self,
        beside: &mut Option<PgConnection>,
        pid: i32,
    ) -> Result<Option<Vec<Blocker>>, Fault> {
        let conn = match beside {
            Some(conn) => conn,
            None => beside.insert(self.connect().await?),
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
            Ok(result) => result.map_err(|e| self.fault("look for locks", &e)),
            Err(_) => Err(Fault::unreachable(format!(
                "{} did not answer in {} s (look for locks)",
                self.place,
                LABEL_CONNECT_MAX.as_secs()
            ))),
        }
    }

    fn blocked_by(&self, found: &[Blocker]) -> Fault {
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
            "end that transaction, or as an administrator of the database: {end}; then the delivery continues on its own"
        ))
    }
}

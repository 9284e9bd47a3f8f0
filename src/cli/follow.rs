//! Waiting: for a job, for transfers; with a bar on a terminal and a line now and then elsewhere.
//!
//! A daemon that goes away meanwhile (a restart) is waited for: transfers outlive it. Jobs do not, and that is said.

use std::future::Future;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::Instant;

use super::client::Client;
use super::human;
use super::tracker::Tracker;
use crate::api::types::{Job, Transfer, TransferQuery};
use base::fault::{Code, Fault};
use base::limits::{API_IDS_MAX, API_ROWS_MAX, DAEMON_AWAY_MAX, JOB_AWAY_MAX, PROGRESS_LINE_EVERY};

/// Between two looks at least, however fast things change.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Between two tries while the daemon is away.
const TRY_EVERY: Duration = Duration::from_secs(1);

/// How far something is, on stderr.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    next_line: Instant,
}

impl Progress {
    pub(super) fn new() -> Self {
        let terminal = std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let bar = terminal.then(|| {
            let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("[{bar:24}] {wide_msg}").unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.with_style(style.progress_chars("=> "))
        });
        // The first line comes after the pause: what ends at once says nothing.
        Self { bar, next_line: Instant::now() + PROGRESS_LINE_EVERY }
    }

    /// Shows how far it is; off a terminal only now and then.
    pub(super) fn update(&mut self, done: u64, total: u64, text: impl FnOnce() -> String) {
        if let Some(bar) = &self.bar {
            bar.set_message(text());
            bar.set_length(total.max(1));
            bar.set_position(done.min(total));
        } else if Instant::now() >= self.next_line {
            self.next_line = Instant::now() + PROGRESS_LINE_EVERY;
            eprintln!("{}", text());
        }
    }

    /// Says something that must be seen now.
    pub(super) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }

    /// How long to wait for an answer without having anything to show.
    fn pause(&self) -> Duration {
        if self.bar.is_some() { Duration::from_secs(1) } else { PROGRESS_LINE_EVERY }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Until when a command waits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(Option<Instant>);

impl Deadline {
    pub(super) fn after(timeout: Option<Duration>) -> Self {
        Self(timeout.map(|t| Instant::now() + t))
    }

    /// At most `longest`, and no longer than there is time.
    pub(super) fn cap(self, longest: Duration) -> Duration {
        self.0.map_or(longest, |at| at.saturating_duration_since(Instant::now()).min(longest))
    }

    pub(super) fn passed(self) -> bool {
        self.0.is_some_and(|at| Instant::now() >= at)
    }
}

/// Asks again while the daemon does not answer, up to `away_max` and the deadline.
pub(super) async fn patiently<T, F: Future<Output = Result<T, Fault>>>(
    progress: &Progress,
    deadline: Deadline,
    away_max: Duration,
    mut ask: impl FnMut() -> F,
) -> Result<T, Fault> {
    let mut away_since = None;
    loop {
        let fault = match ask().await {
            Err(fault) if fault.code == Code::Unreachable => fault,
            other => {
                if away_since.is_some() {
                    progress.say("the daemon answers again");
                }
                return other;
            }
        };
        let since = *away_since.get_or_insert_with(|| {
            progress.say(&format!("{}; waiting for it", human::clean(&fault.message)));
            Instant::now()
        });
        if deadline.passed() {
            return Err(Fault::deadline(format!("the time is over, and {}", fault.message)));
        }
        if since.elapsed() >= away_max {
            return Err(fault);
        }
        tokio::time::sleep(deadline.cap(TRY_EVERY).max(Duration::from_millis(10))).await;
    }
}

/// Follows a job to its end and returns it as it is then: done.
pub(super) async fn job(client: &Client, mut job: Job, deadline: Deadline, progress: &mut Progress) -> Result<Job, Fault> {
    loop {
        match job.state.as_str() {
            "running" => {}
            "done" => return Ok(job),
            _ => return Err(job.error.unwrap_or_else(|| Fault::internal(format!("job {} failed and does not say why", job.id)))),
        }
        if deadline.passed() {
            return Err(Fault::deadline(format!("job {} still runs: {}", job.id, job.doing))
                .with_next("run the command again to go on waiting; the work goes on"));
        }
        progress.update(job.bytes, job.total.unwrap_or(0), || job_line(&job));
        let wait = deadline.cap(progress.pause());
        let asked = patiently(progress, deadline, JOB_AWAY_MAX, || client.job(&job.id, wait)).await;
        job = asked.map_err(|fault| match fault.code {
            Code::NotFound => Fault::unreachable(format!("the daemon was restarted and no longer knows job {}", job.id))
                .with_next("run the command again: what was done is not done twice"),
            _ => fault,
        })?;
        // `wait` has whole seconds: near the deadline it is 0, which must not spin.
        if job.state == "running" {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

fn job_line(job: &Job) -> String {
    let doing = human::clean(&job.doing);
    match job.total.and_then(|total| Some((human::share(job.bytes, total)?, total))) {
        Some((percent, total)) => format!("{doing}: {percent} % of {}", human::bytes(total)),
        None => format!("{doing}: {}", human::bytes(job.bytes)),
    }
}

/// Follows transfers until each has ended. Returns them as they are then; [`Tracker::verdict`] says how it went.
pub(super) async fn transfers(client: &Client, ids: &[String], deadline: Deadline, progress: &mut Progress) -> Result<Tracker, Fault> {
    let mut tracker = Tracker::new(ids);
    loop {
        tracker.set_firsts(Vec::new());
        let open = tracker.open();
        // What stands now, not what changed: whatever was missed meanwhile is in it.
        let cursor = snapshot(client, &open, deadline, progress, &mut tracker).await?;
        look_at_firsts(client, &mut tracker).await;
        if let Some(id) = tracker.unseen() {
            return Err(Fault::not_found(format!("the daemon does not know transfer {id:?}")));
        }
        let (done, total) = tracker.bytes();
        progress.update(done, total, || tracker.summary());
        let open = tracker.open();
        if open.is_empty() {
            return Ok(tracker);
        }
        if deadline.passed() {
            return Err(Fault::deadline(format!("the time is over: {}", tracker.summary())));
        }
        let query = TransferQuery {
            id: (open.len() <= API_IDS_MAX).then(|| open.join(",")),
            since: Some(cursor),
            wait: Some(deadline.cap(progress.pause()).as_secs()),
            limit: Some(API_ROWS_MAX),
        };
        let (changed, _) = patiently(progress, deadline, DAEMON_AWAY_MAX, || client.transfers(&query)).await?;
        take(&mut tracker, changed, progress);
        // The last one to end is the end: nothing more can change.
        if !tracker.open().is_empty() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

async fn snapshot(client: &Client, ids: &[String], deadline: Deadline, progress: &Progress, tracker: &mut Tracker) -> Result<u64, Fault> {
    let mut first_cursor = None;
    for some in ids.chunks(API_IDS_MAX) {
        let query = TransferQuery { id: Some(some.join(",")), limit: Some(API_ROWS_MAX), ..TransferQuery::default() };
        let (found, cursor) = patiently(progress, deadline, DAEMON_AWAY_MAX, || client.transfers(&query)).await?;
        // The first: what changed while the others were asked must still come.
        first_cursor.get_or_insert(cursor);
        take(tracker, found, progress);
    }
    Ok(first_cursor.unwrap_or(0))
}

/// Sees how those stand that must come first and that nobody waits for here. A daemon may not know one; then it is waited for.
pub(super) async fn look_at_firsts(client: &Client, tracker: &mut Tracker) {
    let mut firsts = Vec::new();
    // One by one: a daemon that does not know one of many answers for none.
    for id in tracker.unknown_firsts() {
        if let Ok((found, _)) = client.transfers(&TransferQuery { id: Some(id), ..TransferQuery::default() }).await {
            firsts.extend(found);
        }
    }
    tracker.set_firsts(firsts);
}

fn take(tracker: &mut Tracker, transfers: Vec<Transfer>, progress: &Progress) {
    for transfer in transfers {
        if let Some(line) = tracker.absorb(transfer) {
            progress.say(&line);
        }
    }
}

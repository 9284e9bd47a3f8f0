//! Waiting for a job or for transfers, with a progress bar on a terminal and a line at intervals
//! elsewhere.
//!
//! A command waits for a daemon that restarts: transfers survive a restart. Jobs do not, and the
//! command reports this.

use std::future::Future;
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::Instant;

use super::client::Client;
use super::tracker::Tracker;
use super::{human, output};
use crate::api::types::{Job, Transfer, TransferQuery};
use base::fault::{Code, Fault};
use base::limits::{API_IDS_MAX, API_ROWS_MAX, DAEMON_AWAY_MAX, JOB_AWAY_MAX, PROGRESS_LINE_EVERY};

/// The shortest time between two requests.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The time between two attempts while the daemon does not answer.
const TRY_EVERY: Duration = Duration::from_secs(1);

/// The progress display on stderr.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    next_line: Instant,
}

impl Progress {
    pub(super) fn new() -> Self {
        let terminal = std::io::stderr().is_terminal()
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let bar = terminal.then(|| {
            let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("[{bar:24}] {wide_msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.with_style(style.progress_chars("=> "))
        });
        // The first line appears after one interval: short work prints no progress.
        Self {
            bar,
            next_line: Instant::now() + PROGRESS_LINE_EVERY,
        }
    }

    /// Shows the progress; without a terminal, once per interval.
    pub(super) fn update(&mut self, done: u64, total: u64, text: impl FnOnce() -> String) {
        if let Some(bar) = &self.bar {
            bar.set_message(text());
            bar.set_length(total.max(1));
            bar.set_position(done.min(total));
        } else if Instant::now() >= self.next_line {
            self.next_line = Instant::now() + PROGRESS_LINE_EVERY;
            output::note(&text());
        }
    }

    /// Prints a line at once.
    pub(super) fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| output::note(line)),
            None => output::note(line),
        }
    }

    /// The longest wait for an answer before the display is updated.
    fn pause(&self) -> Duration {
        if self.bar.is_some() {
            Duration::from_secs(1)
        } else {
            PROGRESS_LINE_EVERY
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The time at which a command stops waiting.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(Option<Instant>);

impl Deadline {
    pub(super) fn after(timeout: Option<Duration>) -> Self {
        Self(timeout.map(|t| Instant::now() + t))
    }

    /// `longest`, or the remaining time if that is shorter.
    pub(super) fn cap(self, longest: Duration) -> Duration {
        self.0.map_or(longest, |at| {
            at.saturating_duration_since(Instant::now()).min(longest)
        })
    }

    pub(super) fn passed(self) -> bool {
        self.0.is_some_and(|at| Instant::now() >= at)
    }
}

/// Repeats a request while the daemon does not answer, for at most `away_max` and until the
/// deadline.
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
            progress.say(&format!(
                "{}; waiting for the daemon",
                human::clean(&fault.message)
            ));
            Instant::now()
        });
        if deadline.passed() {
            return Err(Fault::deadline(format!(
                "the time is over: {}",
                fault.message
            )));
        }
        if since.elapsed() >= away_max {
            return Err(fault);
        }
        tokio::time::sleep(deadline.cap(TRY_EVERY).max(Duration::from_millis(10))).await;
    }
}

/// Waits for the end of a job. Returns the job if it succeeded, else its fault.
pub(super) async fn job(
    client: &Client,
    mut job: Job,
    deadline: Deadline,
    progress: &mut Progress,
) -> Result<Job, Fault> {
    loop {
        match job.state.as_str() {
            "running" => {}
            "done" => return Ok(job),
            _ => {
                return Err(job.error.unwrap_or_else(|| {
                    Fault::internal(format!("job {} failed without a message", job.id))
                }));
            }
        }
        if deadline.passed() {
            return Err(
                Fault::deadline(format!("job {} is still running: {}", job.id, job.doing))
                    .with_next("run the command again to continue waiting; the job continues"),
            );
        }
        progress.update(job.bytes, job.total.unwrap_or(0), || job_line(&job));
        let wait = deadline.cap(progress.pause());
        let asked = patiently(progress, deadline, JOB_AWAY_MAX, || {
            client.job(&job.id, wait)
        })
        .await;
        job = asked.map_err(|fault| match fault.code {
            Code::NotFound => Fault::unreachable(format!(
                "the daemon was restarted and no longer knows job {}",
                job.id
            ))
            .with_next("run the command again; completed work is not repeated"),
            _ => fault,
        })?;
        // `wait` has whole seconds. Near the deadline it is 0: without this pause the loop would
        // spin.
        if job.state == "running" {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

fn job_line(job: &Job) -> String {
    let doing = human::clean(&job.doing);
    match job
        .total
        .and_then(|total| Some((human::share(job.bytes, total)?, total)))
    {
        Some((percent, total)) => format!("{doing}: {percent} % of {}", human::bytes(total)),
        None => format!("{doing}: {}", human::bytes(job.bytes)),
    }
}

/// Waits until all transfers have ended, and returns their last state. [`Tracker::verdict`] gives
/// the result.
pub(super) async fn transfers(
    client: &Client,
    ids: &[String],
    deadline: Deadline,
    progress: &mut Progress,
) -> Result<Tracker, Fault> {
    let mut tracker = Tracker::new(ids);
    loop {
        tracker.set_firsts(Vec::new());
        let open = tracker.open();
        // The present state and not the changes, so that no change is missed.
        let cursor = snapshot(client, &open, deadline, progress, &mut tracker).await?;
        look_at_firsts(client, &mut tracker).await;
        if let Some(id) = tracker.unseen() {
            return Err(Fault::not_found(format!(
                "the daemon does not know transfer {id:?}"
            )));
        }
        let (done, total) = tracker.bytes();
        progress.update(done, total, || tracker.summary());
        let open = tracker.open();
        if open.is_empty() {
            return Ok(tracker);
        }
        if deadline.passed() {
            return Err(Fault::deadline(format!(
                "the time is over: {}",
                tracker.summary()
            )));
        }
        let query = TransferQuery {
            id: (open.len() <= API_IDS_MAX).then(|| open.join(",")),
            since: Some(cursor),
            wait: Some(deadline.cap(progress.pause()).as_secs()),
            limit: Some(API_ROWS_MAX),
        };
        let (changed, _) = patiently(progress, deadline, DAEMON_AWAY_MAX, || {
            client.transfers(&query)
        })
        .await?;
        take(&mut tracker, changed, progress);
        // When the last one has ended, nothing more can change.
        if !tracker.open().is_empty() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

async fn snapshot(
    client: &Client,
    ids: &[String],
    deadline: Deadline,
    progress: &Progress,
    tracker: &mut Tracker,
) -> Result<u64, Fault> {
    let mut first_cursor = None;
    for some in ids.chunks(API_IDS_MAX) {
        let query = TransferQuery {
            id: Some(some.join(",")),
            limit: Some(API_ROWS_MAX),
            ..TransferQuery::default()
        };
        let (found, cursor) = patiently(progress, deadline, DAEMON_AWAY_MAX, || {
            client.transfers(&query)
        })
        .await?;
        // The first cursor: changes during the later requests must still be reported.
        first_cursor.get_or_insert(cursor);
        take(tracker, found, progress);
    }
    Ok(first_cursor.unwrap_or(0))
}

/// Fetches the state of the transfers on which these depend. A daemon may not know one of them; the
/// command then keeps waiting.
pub(super) async fn look_at_firsts(client: &Client, tracker: &mut Tracker) {
    let mut firsts = Vec::new();
    // One request each: a daemon that does not know one of several ids answers with none.
    for id in tracker.unknown_firsts() {
        if let Ok((found, _)) = client
            .transfers(&TransferQuery {
                id: Some(id),
                ..TransferQuery::default()
            })
            .await
        {
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

//! The background work of a daemon: each piece of it is a named, supervised worker.
//!
//! Owns the list of workers with their state, the time of the last iteration, the last error and
//! the counts. `hub`, `site`, `serve`, `transport` and `exchange` start workers here; the API (`GET
//! /v1/workers`) and `doctor` report them. A worker that panics or ends unexpectedly is restarted
//! after a pause, which doubles up to [`BACKOFF_MAX`]. No worker affects another one. Nothing
//! survives a crash: all counts begin at 0 when the daemon starts.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clock;
use crate::fault::Fault;
use crate::limits::{
    BACKOFF_MAX, DRAIN_MAX, WORKER_BUSY_MAX, WORKER_ERROR_BYTES_MAX, WORKER_LATE_AFTER,
    WORKER_RESTART_FIRST, WORKER_STOP_MAX,
};
use crate::text;

/// What a worker does now, as operators see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It serves requests as they arrive and has no separate iterations.
    Running,
    /// It waits for its next iteration.
    Idle,
    /// An iteration is in progress.
    Busy,
    /// Its last iteration failed, or it ended unexpectedly and is about to be restarted.
    Failed,
    /// Its work is complete, or the daemon stops.
    Ended,
}

impl State {
    /// The name that the API uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Idle => "idle",
            Self::Busy => "busy",
            Self::Failed => "failed",
            Self::Ended => "ended",
        }
    }
}

/// How a worker divides its work, and when it is late.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// No separate iterations: it is never late. When the daemon stops, it ends by itself.
    Continuous,
    /// One iteration after the other. When the daemon stops, it is ended between two iterations.
    Iterations {
        /// The longest pause between two iterations; `None` if it waits for requests.
        idle_max: Option<Duration>,
        /// The longest iteration; `None` if its duration depends on the amount of content.
        busy_max: Option<Duration>,
    },
}

impl Pace {
    /// Iterations with a pause of at most `idle_max` between them, none of which takes long.
    pub const fn every(idle_max: Duration) -> Self {
        Self::Iterations {
            idle_max: Some(idle_max),
            busy_max: Some(WORKER_BUSY_MAX),
        }
    }

    /// Iterations at each request, none of which takes long.
    pub const fn on_request() -> Self {
        Self::Iterations {
            idle_max: None,
            busy_max: Some(WORKER_BUSY_MAX),
        }
    }

    /// The same pace, where an iteration may take any time.
    pub const fn long(self) -> Self {
        match self {
            Self::Iterations { idle_max, .. } => Self::Iterations {
                idle_max,
                busy_max: None,
            },
            Self::Continuous => Self::Continuous,
        }
    }
}

/// The last error of a worker.
#[derive(Debug, Clone)]
pub struct LastError {
    /// When, in milliseconds since 1970.
    pub at_ms: i64,
    /// What happened, and what to do next.
    pub fault: Fault,
}

/// The report about one worker.
#[derive(Debug, Clone)]
pub struct Report {
    /// Its name, for example `relay-flush`.
    pub name: &'static str,
    /// What it does now.
    pub state: State,
    /// When its last iteration ended, in milliseconds since 1970.
    pub last_iteration_ms: Option<i64>,
    /// Iterations that ended, whether they succeeded or failed.
    pub iterations: u64,
    /// Errors, including panics.
    pub errors: u64,
    /// How often it was restarted.
    pub restarts: u64,
    /// The newest error, which may be in the past.
    pub last_error: Option<LastError>,
    /// What is wrong with it now and what to do, in one line; `None` if it works.
    pub problem: Option<String>,
}

/// What a worker does, in more detail than [`State`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    Idle,
    Busy,
    Restarting,
    Ended,
}

#[derive(Debug)]
struct Progress {
    phase: Phase,
    /// When the phase began.
    since: Instant,
    /// Whether the last iteration failed.
    is_failing: bool,
    last_iteration_ms: Option<i64>,
    iterations: u64,
    errors: u64,
    restarts: u64,
    last_error: Option<LastError>,
}

#[derive(Debug)]
struct Entry {
    name: &'static str,
    pace: Pace,
    progress: Mutex<Progress>,
    /// Notified at the end of each iteration.
    rested: Notify,
}

impl Entry {
    fn enter(&self, phase: Phase) {
        let mut progress = self.progress.lock();
        progress.phase = phase;
        progress.since = Instant::now();
    }

    /// The phase between two iterations.
    fn waiting(&self) -> Phase {
        if matches!(self.pace, Pace::Continuous) {
            Phase::Running
        } else {
            Phase::Idle
        }
    }

    /// Counts an error and logs it, unless it is the same as the one before.
    fn fail(&self, fault: &Fault) {
        let message = text::prefix(&fault.message, WORKER_ERROR_BYTES_MAX).to_owned();
        let next = text::prefix(&fault.next, WORKER_ERROR_BYTES_MAX).to_owned();
        let fault = Fault {
            message,
            next,
            ..fault.clone()
        };
        let mut progress = self.progress.lock();
        progress.errors += 1;
        let is_new = !progress.is_failing
            || progress
                .last_error
                .as_ref()
                .is_none_or(|last| last.fault.message != fault.message);
        if is_new {
            tracing::warn!(worker = self.name, error = %fault, next = %fault.next, "a background worker failed; it tries again");
        }
        progress.last_error = Some(LastError {
            at_ms: clock::now_ms(),
            fault,
        });
    }

    /// Ends an iteration.
    fn finish(&self, failed: Option<&Fault>) {
        if let Some(fault) = failed {
            self.fail(fault);
        }
        let mut progress = self.progress.lock();
        if progress.is_failing && failed.is_none() {
            tracing::info!(
                worker = self.name,
                "a background worker that had failed works again"
            );
        }
        progress.is_failing = failed.is_some();
        progress.iterations += 1;
        progress.last_iteration_ms = Some(clock::now_ms());
    }

    /// Waits until no iteration is in progress.
    async fn rests(&self) {
        loop {
            let rested = self.rested.notified();
            if self.progress.lock().phase != Phase::Busy {
                return;
            }
            rested.await;
        }
    }

    fn report(&self, now: Instant) -> Report {
        let progress = self.progress.lock();
        let state = match progress.phase {
            Phase::Busy => State::Busy,
            Phase::Ended => State::Ended,
            Phase::Restarting => State::Failed,
            Phase::Running | Phase::Idle if progress.is_failing => State::Failed,
            Phase::Running => State::Running,
            Phase::Idle => State::Idle,
        };
        Report {
            name: self.name,
            state,
            last_iteration_ms: progress.last_iteration_ms,
            iterations: progress.iterations,
            errors: progress.errors,
            restarts: progress.restarts,
            last_error: progress.last_error.clone(),
            problem: self.problem(&progress, now),
        }
    }

    /// What is wrong with the worker, in words, and what to do.
    fn problem(&self, progress: &Progress, now: Instant) -> Option<String> {
        let spent = now.saturating_duration_since(progress.since);
        let (idle_max, busy_max) = match self.pace {
            Pace::Continuous => (None, None),
            Pace::Iterations { idle_max, busy_max } => (idle_max, busy_max),
        };
        match progress.phase {
            Phase::Ended => return None,
            Phase::Busy if busy_max.is_some_and(|max| spent > max) => {
                return Some(format!(
                    "its current iteration has not ended for {}; check that the disks and servers of this daemon answer, \
                     then restart the daemon",
                    clock::span(spent)
                ));
            }
            Phase::Idle => {
                if let Some(max) = idle_max.filter(|max| spent > *max + WORKER_LATE_AFTER) {
                    return Some(format!(
                        "it has not started an iteration for {}, and should at least every {}; restart the daemon, and \
                         report this with the daemon's log",
                        clock::span(spent),
                        clock::span(max)
                    ));
                }
            }
            Phase::Running | Phase::Busy | Phase::Restarting => {}
        }
        if !progress.is_failing && progress.phase != Phase::Restarting {
            return None;
        }
        let last = progress.last_error.as_ref()?;
        let ago = clock::span(Duration::from_millis(
            clock::now_unix_ms().saturating_sub(last.at_ms.unsigned_abs()),
        ));
        let what = if progress.is_failing {
            "its last iteration failed"
        } else {
            "it ended"
        };
        Some(format!(
            "{what} {ago} ago and it tries again: {}; {}",
            last.fault.message, last.fault.next
        ))
    }
}

/// An iteration in progress. If it is dropped before its end, it does not count.
struct Iteration<'a>(&'a Entry);

impl<'a> Iteration<'a> {
    fn begin(entry: &'a Entry) -> Self {
        if !matches!(entry.pace, Pace::Continuous) {
            entry.enter(Phase::Busy);
        }
        Self(entry)
    }

    fn end<T>(self, result: Result<T, Fault>) -> Result<T, Fault> {
        self.0.finish(result.as_ref().err());
        result
    }
}

impl Drop for Iteration<'_> {
    fn drop(&mut self) {
        self.0.enter(self.0.waiting());
        self.0.rested.notify_waiters();
    }
}

/// What a worker reports to. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Worker {
    entry: Arc<Entry>,
    stop: CancellationToken,
}

impl Worker {
    /// Does one iteration: the worker is busy until `work` ends. A fault is counted, logged, and
    /// returned. Once the daemon stops no iteration begins, and this never returns.
    pub async fn iterate<T>(
        &self,
        work: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        if self.stop.is_cancelled() && !matches!(self.entry.pace, Pace::Continuous) {
            std::future::pending::<()>().await;
        }
        let iteration = Iteration::begin(&self.entry);
        let result = work.await;
        iteration.end(result)
    }

    /// The same for a worker that is a thread. A panic in `work` is counted as a fault.
    pub fn iterate_blocking<T>(&self, work: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
        let iteration = Iteration::begin(&self.entry);
        let result = catch_unwind(AssertUnwindSafe(work))
            .unwrap_or_else(|payload| Err(panicked(payload.as_ref())));
        iteration.end(result)
    }

    /// Counts what a worker without separate iterations has done.
    pub fn count(&self) {
        self.entry.finish(None);
    }

    /// Counts an error of a worker without separate iterations, which continues and has its own way
    /// to report the error. It is not logged here.
    pub fn count_error(&self, fault: &Fault) {
        let mut progress = self.entry.progress.lock();
        progress.errors += 1;
        let message = text::prefix(&fault.message, WORKER_ERROR_BYTES_MAX).to_owned();
        progress.last_error = Some(LastError {
            at_ms: clock::now_ms(),
            fault: Fault {
                message,
                ..fault.clone()
            },
        });
    }

    /// Cancelled when the daemon stops.
    pub fn stop(&self) -> &CancellationToken {
        &self.stop
    }

    /// The work of a worker that is a thread has ended.
    pub fn end(&self) {
        self.entry.enter(Phase::Ended);
    }

    /// Ends the worker's task because the daemon stops: at once between two iterations, else at the
    /// end of the current one.
    async fn wind_up(&self, task: &mut JoinHandle<Result<(), Fault>>) {
        let finished = async {
            match self.entry.pace {
                Pace::Continuous => _ = timeout(DRAIN_MAX, &mut *task).await,
                Pace::Iterations { .. } => tokio::select! {
                    _ = &mut *task => {}
                    _ = timeout(WORKER_STOP_MAX, self.entry.rests()) => {}
                },
            }
        };
        finished.await;
        if !task.is_finished() {
            task.abort();
            let _ = task.await;
        }
    }
}

/// All workers of a daemon. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Workers {
    inner: Arc<Registry>,
}

#[derive(Debug)]
struct Registry {
    entries: Mutex<Vec<Arc<Entry>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// When the work of a worker is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    /// Not before the daemon stops.
    Stopped,
    /// When it returns without a fault.
    Done,
}

impl Default for Workers {
    /// Workers that only end with their work.
    fn default() -> Self {
        Self::new(CancellationToken::new())
    }
}

impl Workers {
    /// No workers yet. All of them end when `stop` is cancelled.
    pub fn new(stop: CancellationToken) -> Self {
        Self {
            inner: Arc::new(Registry {
                entries: Mutex::default(),
                tasks: TaskTracker::new(),
                stop,
            }),
        }
    }

    /// Starts a worker that works until the daemon stops. `work` gets a clone of `of`; it is called
    /// again whenever it panicked or returned.
    pub fn start<C, F>(
        &self,
        name: &'static str,
        pace: Pace,
        of: &C,
        work: impl Fn(C, Worker) -> F + Send + Sync + 'static,
    ) where
        C: Clone + Send + Sync + 'static,
        F: Future<Output = Result<(), Fault>> + Send + 'static,
    {
        self.supervise(name, pace, Until::Stopped, of, work);
    }

    /// Starts a worker whose work is complete when it returns without a fault. `work` is called
    /// again whenever it panicked or failed.
    pub fn start_until_done<C, F>(
        &self,
        name: &'static str,
        pace: Pace,
        of: &C,
        work: impl Fn(C) -> F + Send + Sync + 'static,
    ) where
        C: Clone + Send + Sync + 'static,
        F: Future<Output = Result<(), Fault>> + Send + 'static,
    {
        let work = Arc::new(work);
        self.supervise(name, pace, Until::Done, of, move |of, worker| {
            let work = work.clone();
            async move { worker.iterate(work(of)).await }
        });
    }

    /// Starts a worker with an iteration at once, and another one `every` so long after the end of
    /// the one before.
    pub fn repeat<C, F>(
        &self,
        name: &'static str,
        every: Duration,
        of: &C,
        work: impl Fn(C) -> F + Send + Sync + 'static,
    ) where
        C: Clone + Send + Sync + 'static,
        F: Future<Output = Result<(), Fault>> + Send + 'static,
    {
        let work = Arc::new(work);
        self.start(name, Pace::every(every), of, move |of, worker| {
            let work = work.clone();
            async move {
                loop {
                    // A fault is reported by the worker, and the work is tried again at the next
                    // iteration.
                    let _ = worker.iterate(work(of.clone())).await;
                    sleep(every).await;
                }
            }
        });
    }

    /// Adds a worker that is a thread, which its owner starts and ends. It reports through the
    /// handle, and must not end by a panic.
    pub fn register(&self, name: &'static str, pace: Pace) -> Worker {
        let phase = if matches!(pace, Pace::Continuous) {
            Phase::Running
        } else {
            Phase::Idle
        };
        let progress = Progress {
            phase,
            since: Instant::now(),
            is_failing: false,
            last_iteration_ms: None,
            iterations: 0,
            errors: 0,
            restarts: 0,
            last_error: None,
        };
        let entry = Arc::new(Entry {
            name,
            pace,
            progress: Mutex::new(progress),
            rested: Notify::new(),
        });
        self.inner.entries.lock().push(entry.clone());
        Worker {
            entry,
            stop: self.inner.stop.clone(),
        }
    }

    fn supervise<C, F>(
        &self,
        name: &'static str,
        pace: Pace,
        until: Until,
        of: &C,
        work: impl Fn(C, Worker) -> F + Send + Sync + 'static,
    ) where
        C: Clone + Send + Sync + 'static,
        F: Future<Output = Result<(), Fault>> + Send + 'static,
    {
        let (worker, of, work) = (self.register(name, pace), of.clone(), Arc::new(work));
        self.inner.tasks.spawn(async move {
            let (entry, stop) = (&worker.entry, &worker.stop);
            let mut pause = WORKER_RESTART_FIRST;
            while !stop.is_cancelled() {
                let began = Instant::now();
                let (work, of, reporter) = (work.clone(), of.clone(), worker.clone());
                // In a task of its own: a panic ends that task only.
                let mut task = tokio::spawn(async move { work(of, reporter).await });
                let ended = tokio::select! {
                    biased;
                    ended = &mut task => ended,
                    () = stop.cancelled() => {
                        worker.wind_up(&mut task).await;
                        break;
                    }
                };
                match ended {
                    Ok(Ok(())) if until == Until::Done || stop.is_cancelled() => break,
                    Ok(Ok(())) => {
                        entry.fail(&defect("it returned, although its work is not complete"));
                    }
                    // Its iteration has counted the fault.
                    Ok(Err(_)) if until == Until::Done => {}
                    Ok(Err(fault)) => entry.fail(&fault),
                    Err(error) => match error.try_into_panic() {
                        Ok(payload) => entry.fail(&panicked(payload.as_ref())),
                        Err(error) => entry.fail(&defect(error)),
                    },
                }
                entry.enter(Phase::Restarting);
                if began.elapsed() >= BACKOFF_MAX {
                    pause = WORKER_RESTART_FIRST;
                }
                if stop.run_until_cancelled(sleep(pause)).await.is_some() {
                    entry.progress.lock().restarts += 1;
                    entry.enter(entry.waiting());
                }
                pause = (pause * 2).min(BACKOFF_MAX);
            }
            worker.end();
        });
    }

    /// The report about each worker, in the order in which they were started.
    pub fn list(&self) -> Vec<Report> {
        let now = Instant::now();
        self.inner
            .entries
            .lock()
            .iter()
            .map(|entry| entry.report(now))
            .collect()
    }

    /// What `doctor` reports: a line for each worker with a problem, and one line with the state of
    /// all others.
    pub fn doctor(&self) -> Vec<String> {
        let (faults, good): (Vec<Report>, Vec<Report>) = self
            .list()
            .into_iter()
            .partition(|worker| worker.problem.is_some());
        let mut lines: Vec<String> = faults
            .iter()
            .filter_map(|worker| {
                Some(format!(
                    "fault worker {}: {}",
                    worker.name,
                    worker.problem.as_ref()?
                ))
            })
            .collect();
        let states: Vec<String> = good
            .iter()
            .map(|worker| format!("{} {}", worker.name, worker.state.as_str()))
            .collect();
        if !good.is_empty() {
            lines.push(format!(
                "ok workers: {} background workers: {}",
                good.len(),
                states.join(", ")
            ));
        }
        lines
    }

    /// Waits until every worker has ended, once the daemon stops. The caller sets the deadline.
    pub async fn stopped(&self) {
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    /// The workers that have not ended yet.
    pub fn unfinished(&self) -> Vec<&'static str> {
        self.list()
            .into_iter()
            .filter(|worker| worker.state != State::Ended)
            .map(|worker| worker.name)
            .collect()
    }
}

fn defect(what: impl std::fmt::Display) -> Fault {
    Fault::internal(what.to_string())
        .with_next("report this defect with the daemon's log; the worker is restarted by itself")
}

/// A panic as a fault.
fn panicked(payload: &(dyn std::any::Any + Send)) -> Fault {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    defect(format_args!(
        "it panicked: {}",
        text.unwrap_or("without a message")
    ))
}

#[cfg(test)]
mod tests;

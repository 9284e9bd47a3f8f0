//! Jobs: work that a request started and that continues after the response 202. They are in memory:
//! a restart forgets them. Every command may be repeated, so a client whose job was lost runs its
//! command again.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;
use tracing::Instrument as _;

use crate::api::types::Job;
use base::blocking::blocking;
use base::fault::{Code, Fault, Reason};
use base::job_progress::{JobProgress, cancelled};
use base::limits::{JOB_CANCEL_MAX, JOB_RESULT_BYTES_MAX, ROOM_LOOK_EVERY};
use base::spans;
use content::store::Store;
use model::paging::{self, Page, Pager, Room};
use state::{Catalogue, new_id};

/// Jobs in memory; the oldest ended one is removed first.
const JOBS_KEPT: usize = 256;
/// Jobs that may run at once; a garbage collection may run in addition.
const JOBS_RUNNING_MAX: usize = 32;

/// Runs `work`; when the store's disk is full, waits for room and runs it again. No lock is held
/// while waiting, so that any command can make room. Ends with the fault after `patience`.
pub async fn until_room<T, F>(
    store: &Store,
    progress: &JobProgress,
    patience: Duration,
    mut work: impl FnMut() -> F,
) -> Result<T, Fault>
where
    F: Future<Output = Result<T, Fault>>,
{
    let has_room = || {
        let (store, wanted) = (store.clone(), progress.wanted.load(Ordering::Relaxed));
        blocking(move || {
            store
                .check_room()
                .and_then(|()| store.check_room_for(wanted))
        })
    };
    loop {
        let fault = match work().await {
            // If the store has room, another disk is full, or the job needs more than there will
            // be.
            Err(fault) if fault.code == Code::NoSpace && has_room().await.is_err() => fault,
            end => return end,
        };
        tracing::warn!(error = %fault, "a job waits for room on the disk");
        progress.doing(format!(
            "waiting for room on a full disk: {}",
            fault.message
        ));
        let full_since = Instant::now();
        loop {
            progress.check()?;
            if full_since.elapsed() >= patience {
                return Err(fault);
            }
            tokio::time::sleep(ROOM_LOOK_EVERY.min(patience)).await;
            if has_room().await.is_ok() {
                break;
            }
        }
        progress.bytes.store(0, Ordering::Relaxed);
    }
}

/// Returns some time after the cancellation of a job that does not end by itself.
async fn given_up(progress: &JobProgress) {
    progress.cancelled().await;
    tokio::time::sleep(JOB_CANCEL_MAX).await;
    while progress.is_ending() {
        // It finished before the cancellation, and ends soon.
        tokio::time::sleep(JOB_CANCEL_MAX).await;
    }
}

/// A job result of bounded size: only the first rows of a longer list are kept.
fn bounded(mut result: serde_json::Value) -> serde_json::Value {
    let serde_json::Value::Array(rows) = &mut result else {
        return result;
    };
    let all = rows.len();
    let kept = paging::fitting(rows, JOB_RESULT_BYTES_MAX);
    if kept < all {
        rows.truncate(kept);
        rows.push(format!("{} more are not listed", all - kept).into());
    }
    result
}

struct Entry {
    id: String,
    /// The request, if an equal one joins this job while it runs.
    request: Option<String>,
    progress: Arc<JobProgress>,
    end: Option<Result<serde_json::Value, Fault>>,
}

impl Entry {
    fn view(&self) -> Job {
        let (state, result, error) = match &self.end {
            None => ("running", None, None),
            Some(Ok(value)) => ("done", Some(value.clone()), None),
            Some(Err(fault)) if fault.reason == Reason::CancelledByUser => {
                ("cancelled", None, Some(fault.clone()))
            }
            Some(Err(fault)) => ("failed", None, Some(fault.clone())),
        };
        Job {
            id: self.id.clone(),
            state: state.into(),
            bytes: self.progress.bytes.load(Ordering::Relaxed),
            total: Some(self.progress.total.load(Ordering::Relaxed)).filter(|total| *total > 0),
            doing: self.progress.what(),
            notes: self.progress.notes(),
            result,
            error,
        }
    }
}

/// The fault for a job that does not exist.
pub(crate) fn no_such_job(id: &str) -> Fault {
    Fault::not_found(format!("there is no job {id}"))
        .with_next("the daemon may have been restarted: run the command again")
}

/// All jobs of a daemon.
#[derive(Clone)]
pub struct Jobs {
    entries: Arc<Mutex<VecDeque<Entry>>>,
    catalogue: Catalogue,
}

impl Jobs {
    /// No jobs; changes wake the tasks that wait for the catalogue.
    pub fn new(catalogue: Catalogue) -> Self {
        Self {
            entries: Arc::default(),
            catalogue,
        }
    }

    /// Starts a job.
    pub fn start<T, F>(&self, work: impl FnOnce(Arc<JobProgress>) -> F) -> Result<Job, Fault>
    where
        T: Serialize + Send + 'static,
        F: Future<Output = Result<T, Fault>> + Send + 'static,
    {
        self.start_beside(JOBS_RUNNING_MAX - 1, None, work)
    }

    /// Starts a job, or returns the one that runs for an equal request: a client that has lost the
    /// answer sends its request again. A job that is being cancelled is not joined.
    pub fn start_once<T, F>(
        &self,
        what: &str,
        request: &impl Serialize,
        work: impl FnOnce(Arc<JobProgress>) -> F,
    ) -> Result<Job, Fault>
    where
        T: Serialize + Send + 'static,
        F: Future<Output = Result<T, Fault>> + Send + 'static,
    {
        let request = serde_json::to_string(&(what, request))
            .map_err(|e| Fault::internal(format!("a job's request: {e}")))?;
        self.start_beside(JOBS_RUNNING_MAX - 1, Some(request), work)
    }

    /// Starts a job that makes room: it runs even if all other jobs wait for room.
    pub fn start_collection<T, F>(
        &self,
        work: impl FnOnce(Arc<JobProgress>) -> F,
    ) -> Result<Job, Fault>
    where
        T: Serialize + Send + 'static,
        F: Future<Output = Result<T, Fault>> + Send + 'static,
    {
        self.start_beside(JOBS_RUNNING_MAX, None, work)
    }

    /// Starts a job if at most so many others run, and none for an equal request.
    fn start_beside<T, F>(
        &self,
        others_max: usize,
        request: Option<String>,
        work: impl FnOnce(Arc<JobProgress>) -> F,
    ) -> Result<Job, Fault>
    where
        T: Serialize + Send + 'static,
        F: Future<Output = Result<T, Fault>> + Send + 'static,
    {
        let progress = Arc::new(JobProgress::default());
        let id = new_id("j");
        {
            let mut entries = self.entries.lock();
            let equal =
                |e: &&Entry| e.end.is_none() && !e.progress.is_cancelled() && e.request == request;
            if request.is_some()
                && let Some(same) = entries.iter().find(equal)
            {
                tracing::info!(job = %same.id, "an equal request joins the job that runs");
                return Ok(same.view());
            }
            let running = entries.iter().filter(|e| e.end.is_none()).count();
            if running > others_max {
                return Err(Fault::conflict(format!("{running} jobs run already"))
                    .with_next("wait until one of them ends"));
            }
            if entries.len() >= JOBS_KEPT
                && let Some(at) = entries.iter().position(|e| e.end.is_some())
            {
                entries.remove(at);
            }
            entries.push_back(Entry {
                id: id.clone(),
                request,
                progress: progress.clone(),
                end: None,
            });
        }
        let work = work(progress.clone());
        let (jobs, job) = (self.clone(), id.clone());
        let span = spans::job(&id);
        let inside = span.clone();
        let all = async move {
            // In its own task, so that a panic ends the job and does not leave it running for ever.
            let mut task = tokio::spawn(work.instrument(inside));
            let ended = tokio::select! {
                ended = &mut task => ended,
                () = given_up(&progress) => {
                    // A thread may hang in a read that never returns: it is not waited for. It ends
                    // at its next check.
                    task.abort();
                    task.await
                }
            };
            let end = match ended {
                Ok(result) => result
                    .and_then(|v| {
                        serde_json::to_value(v)
                            .map_err(|e| Fault::internal(format!("a job's result: {e}")))
                    })
                    .map(bounded),
                Err(error) if error.is_cancelled() => Err(cancelled()),
                Err(error) => Err(Fault::internal(format!("the job ended: {error}"))),
            };
            if let Err(fault) = &end {
                tracing::warn!(error = %fault, "a job failed");
            }
            if let Some(entry) = jobs.entries.lock().iter_mut().find(|e| e.id == job) {
                entry.end = Some(end);
            }
            jobs.catalogue.notify();
        };
        tokio::spawn(all.instrument(span));
        self.get(&id)
    }

    /// One job.
    pub fn get(&self, id: &str) -> Result<Job, Fault> {
        let entries = self.entries.lock();
        let Some(entry) = entries.iter().find(|e| e.id == id) else {
            return Err(no_such_job(id));
        };
        Ok(entry.view())
    }

    /// Cancels a job: its work stops, and its unpublished data is removed. A job whose result is
    /// becoming visible finishes.
    pub fn cancel(&self, id: &str) -> Result<Job, Fault> {
        {
            let entries = self.entries.lock();
            let entry = entries.iter().find(|e| e.id == id);
            if let Some(entry) = entry.filter(|e| e.end.is_some() || e.progress.is_ending()) {
                let state = if entry.end.is_some() {
                    "has ended"
                } else {
                    "is about to end"
                };
                return Err(Fault::conflict(format!(
                    "job {id} {state}: there is nothing to cancel"
                ))
                .with_next("run the command again to see its result"));
            }
            if let Some(entry) = entry {
                spans::job(id).in_scope(|| tracing::info!("a job is cancelled"));
                entry.progress.cancel();
            }
        }
        self.get(id)
    }

    /// A page of the jobs in memory, the newest first, after this one.
    pub fn list(&self, behind: Option<&str>, room: Room) -> Page<Job> {
        let ids: Vec<String> = self
            .entries
            .lock()
            .iter()
            .rev()
            .map(|entry| entry.id.clone())
            .collect();
        // A job that was removed in the meantime was the oldest: nothing follows.
        let from = match behind {
            Some(behind) => ids
                .iter()
                .position(|id| id == behind)
                .map_or(ids.len(), |at| at + 1),
            None => 0,
        };
        let mut pager = Pager::new(room);
        for id in &ids[from..] {
            if let Ok(job) = self.get(id)
                && !pager.put(job, id.as_str())
            {
                break;
            }
        }
        pager.page()
    }

    /// Jobs that run.
    pub fn running(&self) -> usize {
        self.entries
            .lock()
            .iter()
            .filter(|e| e.end.is_none())
            .count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::limits::JOB_NOTES_MAX;

    #[tokio::test]
    async fn a_collection_finds_a_place_where_all_others_wait() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs::new(Catalogue::open(dir.path()).await.unwrap());
        let waiting = || jobs.start(|_| std::future::pending::<Result<(), Fault>>());
        for _ in 0..JOBS_RUNNING_MAX {
            waiting().unwrap();
        }
        assert_eq!(waiting().unwrap_err().code, Code::Conflict);
        let collection = || jobs.start_collection(|_| std::future::pending::<Result<(), Fault>>());
        collection().unwrap();
        assert_eq!(collection().unwrap_err().code, Code::Conflict);
        assert_eq!(jobs.running(), JOBS_RUNNING_MAX + 1);
    }

    #[tokio::test]
    async fn an_equal_request_joins_the_job_that_runs_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs::new(Catalogue::open(dir.path()).await.unwrap());
        let (go, waits) = tokio::sync::watch::channel(false);
        let begun = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let ask = |what: &str, request: &str| {
            let (mut waits, begun) = (waits.clone(), begun.clone());
            let work = move |progress: Arc<JobProgress>| async move {
                begun.fetch_add(1, Ordering::SeqCst);
                progress
                    .or_cancelled(async {
                        waits
                            .wait_for(|go| *go)
                            .await
                            .map(drop)
                            .map_err(|_| cancelled())
                    })
                    .await
            };
            jobs.start_once(what, &request, work).unwrap().id
        };
        let first = ask("publish", "a");
        assert_eq!(ask("publish", "a"), first);
        assert_ne!(ask("publish", "b"), first);
        assert_ne!(ask("verify", "a"), first);
        // One that is being cancelled will not do the work.
        jobs.cancel(&first).unwrap();
        let second = ask("publish", "a");
        assert_ne!(second, first);
        go.send(true).unwrap();
        ended(&jobs, &second).await;
        let third = ask("publish", "a");
        assert_ne!(third, second, "a job that has ended is not joined");
        ended(&jobs, &third).await;
        assert_eq!(begun.load(Ordering::SeqCst), 5);
    }

    #[tokio::test]
    async fn the_stored_result_of_a_job_is_bounded_and_the_list_is_paged() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs::new(Catalogue::open(dir.path()).await.unwrap());
        let mut newest_first = Vec::new();
        for _ in 0..3 {
            let job = jobs.start(|progress| async move {
                (0..2 * JOB_NOTES_MAX).for_each(|n| progress.note(format!("note {n}")));
                Ok(vec!["x".repeat(1000); 1000])
            });
            newest_first.insert(0, job.unwrap().id);
        }
        let job = ended(&jobs, &newest_first[0]).await;
        let result = job.result.clone().unwrap();
        assert!(
            paging::json_bytes(&result) < JOB_RESULT_BYTES_MAX + 100
                && result.to_string().contains("more are not listed")
        );
        assert_eq!(job.notes.len(), JOB_NOTES_MAX + 1);
        for id in &newest_first {
            ended(&jobs, id).await;
        }
        let (mut listed, mut behind) = (Vec::new(), None);
        loop {
            let page = jobs.list(
                behind.as_deref(),
                Room {
                    rows: 10,
                    bytes: 1000,
                },
            );
            assert_eq!(page.rows.len(), 1, "each is larger than a page");
            listed.extend(page.rows.into_iter().map(|job| job.id));
            let Some(next) = page.next else { break };
            behind = Some(next);
        }
        assert_eq!(listed, newest_first);
    }

    async fn ended(jobs: &Jobs, id: &str) -> Job {
        loop {
            match jobs.get(id).unwrap() {
                job if job.state == "running" => tokio::time::sleep(Duration::from_millis(5)).await,
                job => return job,
            }
        }
    }

    #[tokio::test]
    async fn a_job_that_is_cancelled_stops_and_cleans_up() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs::new(Catalogue::open(dir.path()).await.unwrap());
        let data = dir.path().to_owned();
        let job = jobs.start(move |progress| async move {
            let watched = progress.clone();
            crate::open_source::with_scratch(&data, "/source", &watched, move |scratch, _| {
                base::durable::replace(&scratch.folder.join("spilled"), b"much")?;
                loop {
                    progress.check()?;
                    std::thread::sleep(Duration::from_millis(2));
                }
                #[expect(unreachable_code, reason = "says the type")]
                Ok::<(), Fault>(())
            })
            .await
        });
        let id = job.unwrap().id;
        assert_eq!(
            jobs.list(
                None,
                Room {
                    rows: 9,
                    bytes: 1 << 20
                }
            )
            .rows[0]
                .id,
            id
        );
        jobs.cancel(&id).unwrap();
        let job = ended(&jobs, &id).await;
        assert_eq!(
            (job.state.as_str(), job.error.unwrap().code),
            ("cancelled", Code::Partial)
        );
        assert_eq!(
            std::fs::read_dir(dir.path().join("scratch"))
                .unwrap()
                .count(),
            0,
            "nothing of it is left"
        );
        assert_eq!(jobs.cancel(&id).unwrap_err().code, Code::Conflict);
        assert_eq!(jobs.cancel("j-0").unwrap_err().code, Code::NotFound);
    }

    #[tokio::test]
    async fn a_cancelled_job_that_hangs_is_abandoned_and_others_may_end() {
        let dir = tempfile::tempdir().unwrap();
        let jobs = Jobs::new(Catalogue::open(dir.path()).await.unwrap());
        let (release, hang) = std::sync::mpsc::sync_channel::<()>(1);
        let hanging = jobs
            .start(|_| blocking(move || hang.recv().map_err(|e| Fault::internal(e.to_string()))))
            .unwrap()
            .id;
        let (end, ends) = tokio::sync::oneshot::channel::<()>();
        let (begun, begins) = tokio::sync::oneshot::channel::<()>();
        let ending = jobs.start(|progress| async move {
            progress.end()?;
            let _ = begun.send(());
            ends.await.map_err(|e| Fault::internal(e.to_string()))
        });
        let ending = ending.unwrap().id;
        begins.await.unwrap();
        assert_eq!(jobs.cancel(&ending).unwrap_err().code, Code::Conflict);
        end.send(()).unwrap();
        assert_eq!(ended(&jobs, &ending).await.state, "done");
        jobs.cancel(&hanging).unwrap();
        assert_eq!(ended(&jobs, &hanging).await.state, "cancelled");
        drop(release);
    }
}

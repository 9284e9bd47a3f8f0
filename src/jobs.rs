//! Jobs: work that a request began and that goes on after its 202. Kept in memory: a restart forgets them, and since
//! every command may be run again, whoever waited for one runs it again.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;

use crate::api::types::Job;
use crate::catalogue::{Catalogue, new_id};
use crate::fault::{Code, Fault};
use crate::fetch::blocking;
use crate::limits::ROOM_LOOK_EVERY;
use crate::store::Store;

/// Jobs remembered; the oldest ended one is forgotten first.
const JOBS_KEPT: usize = 256;
/// Jobs that may run at once; where all places are taken, a collection gets one more.
const JOBS_RUNNING_MAX: usize = 32;

/// One job's progress, shared with its work.
#[derive(Debug, Default)]
pub struct JobProgress {
    /// Bytes worked through.
    pub bytes: AtomicU64,
    /// Bytes that were new to the store, as stored, of all tries.
    pub stored: AtomicU64,
    /// Bytes that the store was found to have no room for; 0: no more than any pack needs.
    pub wanted: AtomicU64,
    doing: Mutex<String>,
    notes: Mutex<Vec<String>>,
}

impl JobProgress {
    /// Says what it does now.
    pub fn doing(&self, what: impl Into<String>) {
        *self.doing.lock() = what.into();
    }

    /// Says something that is to be known beside the answer.
    pub fn note(&self, what: impl Into<String>) {
        self.notes.lock().push(what.into());
    }

    /// What it does now.
    pub fn what(&self) -> String {
        self.doing.lock().clone()
    }
}

/// Does `work`; where the store's disk is full it waits for room and does it again. No lock is held meanwhile, so that room can
/// be made by whatever means. It ends with the fault when there was none for `patience`.
pub async fn until_room<T, F>(store: &Store, progress: &JobProgress, patience: Duration, mut work: impl FnMut() -> F) -> Result<T, Fault>
where
    F: Future<Output = Result<T, Fault>>,
{
    let has_room = || {
        let (store, wanted) = (store.clone(), progress.wanted.load(Ordering::Relaxed));
        blocking(move || store.check_room().and_then(|()| store.check_room_for(wanted)))
    };
    loop {
        let fault = match work().await {
            // Where the store has room, another disk is full, or more is wanted at once than there will be.
            Err(fault) if fault.code == Code::NoSpace && has_room().await.is_err() => fault,
            end => return end,
        };
        tracing::warn!(error = %fault, "a job waits for room on the disk");
        progress.doing(format!("waiting for room on a full disk: {}", fault.message));
        let full_since = Instant::now();
        loop {
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

struct Entry {
    id: String,
    progress: Arc<JobProgress>,
    end: Option<Result<serde_json::Value, Fault>>,
}

/// All jobs of a daemon.
#[derive(Clone)]
pub struct Jobs {
    entries: Arc<Mutex<VecDeque<Entry>>>,
    catalogue: Catalogue,
}

impl Jobs {
    /// No jobs yet; news of them wake whoever waits for the catalogue.
    pub fn new(catalogue: Catalogue) -> Self {
        Self { entries: Arc::default(), catalogue }
    }

    /// Begins a job.
    pub fn start<T, F>(&self, work: impl FnOnce(Arc<JobProgress>) -> F) -> Result<Job, Fault>
    where
        T: Serialize + Send + 'static,
        F: Future<Output = Result<T, Fault>> + Send + 'static,
    {
        self.start_beside(JOBS_RUNNING_MAX - 1, work)
    }

    /// Begins a job that makes room: it finds a place where all others wait for that.
    pub fn start_collection<T, F>(&self, work: impl FnOnce(Arc<JobProgress>) -> F) -> Result<Job, Fault>
    where
        T: Serialize + Send + 'static,
        F: Future<Output = Result<T, Fault>> + Send + 'static,
    {
        self.start_beside(JOBS_RUNNING_MAX, work)
    }

    /// Begins a job where no more than so many others run.
    fn start_beside<T, F>(&self, others_max: usize, work: impl FnOnce(Arc<JobProgress>) -> F) -> Result<Job, Fault>
    where
        T: Serialize + Send + 'static,
        F: Future<Output = Result<T, Fault>> + Send + 'static,
    {
        let progress = Arc::new(JobProgress::default());
        let id = new_id("j");
        {
            let mut entries = self.entries.lock();
            let running = entries.iter().filter(|e| e.end.is_none()).count();
            if running > others_max {
                return Err(Fault::conflict(format!("{running} jobs run already")).with_next("wait until one of them ends"));
            }
            if entries.len() >= JOBS_KEPT
                && let Some(at) = entries.iter().position(|e| e.end.is_some())
            {
                entries.remove(at);
            }
            entries.push_back(Entry { id: id.clone(), progress: progress.clone(), end: None });
        }
        let work = work(progress);
        let (jobs, job) = (self.clone(), id.clone());
        tokio::spawn(async move {
            // In a task of its own, so that a defect in the work ends the job and does not leave it running for ever.
            let end = match tokio::spawn(work).await {
                Ok(result) => result.and_then(|v| serde_json::to_value(v).map_err(|e| Fault::internal(format!("a job's result: {e}")))),
                Err(error) => Err(Fault::internal(format!("the job ended: {error}"))),
            };
            if let Err(fault) = &end {
                tracing::warn!(%job, error = %fault, "a job failed");
            }
            if let Some(entry) = jobs.entries.lock().iter_mut().find(|e| e.id == job) {
                entry.end = Some(end);
            }
            jobs.catalogue.notify();
        });
        self.get(&id)
    }

    /// One job.
    pub fn get(&self, id: &str) -> Result<Job, Fault> {
        let entries = self.entries.lock();
        let Some(entry) = entries.iter().find(|e| e.id == id) else {
            return Err(
                Fault::not_found(format!("there is no job {id}")).with_next("the daemon may have been restarted: run the command again")
            );
        };
        let (state, result, error) = match &entry.end {
            None => ("running", None, None),
            Some(Ok(value)) => ("done", Some(value.clone()), None),
            Some(Err(fault)) => ("failed", None, Some(fault.clone())),
        };
        Ok(Job {
            id: id.into(),
            state: state.into(),
            bytes: entry.progress.bytes.load(Ordering::Relaxed),
            total: None,
            doing: entry.progress.doing.lock().clone(),
            notes: entry.progress.notes.lock().clone(),
            result,
            error,
        })
    }

    /// Jobs that run.
    pub fn running(&self) -> usize {
        self.entries.lock().iter().filter(|e| e.end.is_none()).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}

//! Waits until nobody writes to a file any more (`publish --settle`).
//!
//! A file has settled when its modification time is old enough, or when its size and times did not
//! change for as long while it was watched: the clock of a NAS may be ahead of the local clock.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base::clock;
use base::fault::{Fault, IoContext};
use base::job_progress::JobProgress;
use base::limits::SETTLE_WAIT_MAX;

/// How often a file is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The rule for one publish.
#[derive(Debug, Clone)]
pub(super) struct Settle {
    time: Duration,
    /// When the publish stops waiting.
    until: Instant,
    job: Option<Arc<JobProgress>>,
}

impl Settle {
    pub(super) fn new(time: Duration, job: Option<Arc<JobProgress>>) -> Self {
        Self {
            time: time.min(SETTLE_WAIT_MAX),
            until: Instant::now() + SETTLE_WAIT_MAX,
            job,
        }
    }

    /// Whether a file was not written to for long enough, by its time.
    fn is_old(&self, meta: &Metadata) -> bool {
        let written = i128::from(meta.mtime()) * 1000 + i128::from(meta.mtime_nsec()) / 1_000_000;
        i128::from(clock::now_ms()) - written >= self.time.as_millis() as i128
    }

    /// Waits for one file. Returns its metadata.
    pub(super) fn wait(&self, path: &Path, first: Metadata) -> Result<Metadata, Fault> {
        let (mut meta, mut since) = (first, Instant::now());
        let doing = self.job.as_ref().map(|job| job.what());
        while !self.is_old(&meta) && since.elapsed() < self.time {
            if Instant::now() >= self.until {
                return Err(Fault::integrity(format!(
                    "{} is still written to: it did not stay unchanged for {} s",
                    path.display(),
                    self.time.as_secs()
                ))
                .with_next("publish again after its writer has finished, or exclude it"));
            }
            if let Some(job) = &self.job {
                job.check()?;
                job.doing(format!("waiting until nobody writes to {}", path.display()));
            }
            std::thread::sleep(LOOK_EVERY.min(self.time));
            let now = fs::symlink_metadata(path).at(format_args!("read {}", path.display()))?;
            let same = |of: &Metadata| (of.len(), of.mtime(), of.mtime_nsec(), of.ino());
            if same(&now) != same(&meta) {
                since = Instant::now();
            }
            meta = now;
        }
        if let Some((job, doing)) = self.job.as_ref().zip(doing) {
            job.doing(doing);
        }
        Ok(meta)
    }
}

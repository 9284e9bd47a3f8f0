//! Checks the content that was published in place at this site: all of it at intervals, and the
//! content that a transfer waits for at once.
//!
//! The result is stored in the catalogue, and the connection reports it to the hub. `in_place`
//! implements the check. Nothing else survives a restart. Each filesystem is checked separately: one
//! that hangs delays only the checks of its own content.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use super::Opened;
use base::blocking::blocking_at;
use base::fault::Fault;
use base::locks::Locks;
use base::mounts::mount_point;
use base::names::ArtifactRef;
use base::workers::{Pace, Worker, Workers};
use content::manifest::Digest;
use exchange::in_place::{InPlaceReader, Mark, RESTS};
use exchange::transfer::CheckRequest;
use sink::StorageLocation;
use state::{ArtifactRow, Catalogue, Changed, what_changed};

/// The longest wait of a round for its checks; those that take longer continue without it.
const ROUND_WAIT_MAX: Duration = Duration::from_secs(10);

/// Checks the content that was published in place at this site. The results of the last checks are
/// kept in memory. Cheap to clone.
#[derive(Clone)]
pub(super) struct Watch {
    catalogue: Catalogue,
    reader: InPlaceReader,
    check_every: Duration,
    last_checks: Arc<Mutex<HashMap<ArtifactRef, LastCheck>>>,
    /// Requests of transfers.
    requests: Arc<tokio::sync::Mutex<mpsc::Receiver<CheckRequest>>>,
    /// Held during a requested check of content on this filesystem.
    requested: Arc<Locks<PathBuf>>,
    stop: CancellationToken,
}

/// The last check of an artifact; valid while its location is the same.
#[derive(Clone)]
struct LastCheck {
    place: StorageLocation,
    published_ms: i64,
    mark: Mark,
    /// Until then, a waiting transfer gets the result "unchanged" without another check.
    rests_until: Instant,
}

/// The result of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum WatchResult {
    /// The content is unchanged.
    Unchanged,
    /// The content changed, as described.
    Changed(String),
    /// Not known: the folder is not available, or the artifact was withdrawn.
    Unknown,
}

impl WatchResult {
    fn of(changed: Option<String>) -> Self {
        changed.map_or(Self::Unchanged, Self::Changed)
    }
}

/// The checks at intervals: one task for each filesystem, so that a filesystem that hangs delays
/// only the checks of its own content. Dropping it ends the tasks.
#[derive(Default)]
struct Rounds {
    tasks: JoinSet<()>,
    /// The filesystems whose task has not ended.
    running: Arc<Mutex<HashSet<PathBuf>>>,
}

/// A filesystem whose task has not ended, until this is dropped.
struct Running(Arc<Mutex<HashSet<PathBuf>>>, PathBuf);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.lock().remove(&self.1);
    }
}

impl Rounds {
    /// Marks a filesystem as checked by a task; `None`: its last task has not ended.
    fn enter(&self, filesystem: PathBuf) -> Option<Running> {
        let is_new = self.running.lock().insert(filesystem.clone());
        is_new.then(|| Running(self.running.clone(), filesystem))
    }
}

fn panicked(error: &JoinError) -> Fault {
    Fault::internal(format!("a check of published content ended early: {error}"))
}

impl Watch {
    /// Creates it without results. Transfers send their requests to `requests`.
    pub(super) fn new(opened: &Opened, requests: mpsc::Receiver<CheckRequest>) -> Self {
        Self {
            catalogue: opened.catalogue.clone(),
            reader: opened.reader.clone(),
            check_every: opened.config.share.check_every,
            last_checks: Arc::default(),
            requests: Arc::new(tokio::sync::Mutex::new(requests)),
            requested: Arc::default(),
            stop: opened.stop.clone(),
        }
    }

    /// Starts the workers that check published content: all of it at intervals, and the content
    /// that a transfer waits for at once.
    pub(super) fn start_workers(&self, workers: &Workers) {
        workers.start(
            "watch",
            Pace::every(self.check_every).long(),
            self,
            |this, worker| async move { this.keep_checking(&worker).await },
        );
        workers.start(
            "watch-requests",
            Pace::on_request().long(),
            self,
            |this, worker| async move { this.keep_answering(&worker).await },
        );
    }

    async fn keep_checking(&self, worker: &Worker) -> Result<(), Fault> {
        let mut rounds = Rounds::default();
        loop {
            // The worker reports a fault, and tries again.
            let _ = worker
                .iterate(self.check_published(&mut rounds, worker))
                .await;
            tokio::time::sleep(self.check_every).await;
        }
    }

    /// Starts the checks of all published artifacts. Returns when they have ended, or after
    /// [`ROUND_WAIT_MAX`]: those that still run continue, and the next round leaves out their
    /// filesystems.
    async fn check_published(&self, rounds: &mut Rounds, worker: &Worker) -> Result<(), Fault> {
        let all = self.catalogue.published().await;
        let all =
            all.map_err(|fault| fault.context("list the artifacts that were published in place"))?;
        {
            let published: HashSet<&ArtifactRef> =
                all.iter().map(|(artifact, _)| artifact).collect();
            self.last_checks
                .lock()
                .retain(|artifact, _| published.contains(artifact));
        }
        let mut by_filesystem: HashMap<PathBuf, Vec<ArtifactRef>> = HashMap::new();
        for (artifact, place) in all {
            let filesystem = mount_point(place.filesystem());
            by_filesystem.entry(filesystem).or_default().push(artifact);
        }
        for (filesystem, artifacts) in by_filesystem {
            let Some(running) = rounds.enter(filesystem.clone()) else {
                tracing::warn!(filesystem = %filesystem.display(), "the last check of the content published on this filesystem has not ended; it continues");
                continue;
            };
            let (this, worker) = (self.clone(), worker.clone());
            rounds.tasks.spawn(async move {
                this.check_each(&artifacts, &worker).await;
                drop(running);
            });
        }
        let ended = async {
            let mut result = Ok(());
            while let Some(ended) = rounds.tasks.join_next().await {
                result = result.and(ended.map_err(|e| panicked(&e)));
            }
            result
        };
        tokio::time::timeout(self.check_every.min(ROUND_WAIT_MAX), ended)
            .await
            .unwrap_or(Ok(()))
    }

    /// Checks these artifacts one after the other. A failed check does not prevent the others.
    async fn check_each(&self, artifacts: &[ArtifactRef], worker: &Worker) {
        for artifact in artifacts {
            if let Err(fault) = self.check(artifact, false).await {
                worker.count_error(&fault.clone().context(artifact));
                tracing::warn!(%artifact, error = %fault, "an artifact that was published in place could not be checked");
            }
        }
    }

    /// Answers the requests of transfers, each in a task of its own. A transfer waits for one
    /// request at a time, so there are at most as many tasks as transfers.
    async fn keep_answering(&self, worker: &Worker) -> Result<(), Fault> {
        let mut requests = self.requests.lock().await;
        let mut tasks = JoinSet::new();
        loop {
            tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => drop(tasks.spawn(self.clone().answer(request))),
                    None => return Ok(()),
                },
                Some(ended) = tasks.join_next() => {
                    let ended = ended.map_err(|e| panicked(&e)).and_then(|result| result);
                    // The worker reports a fault.
                    let _ = worker.iterate(async { ended }).await;
                }
            }
        }
    }

    /// Answers one request. Ends without an answer when the transfer does not wait any more.
    async fn answer(self, request: CheckRequest) -> Result<(), Fault> {
        let CheckRequest { digest, mut answer } = request;
        let changed = tokio::select! {
            changed = self.check_everywhere(digest) => changed,
            () = answer.closed() => return Ok(()),
        };
        let changed =
            changed.map_err(|fault| fault.context(format_args!("check the content {digest}")));
        let (sent, result) = match changed {
            Ok(changed) => (changed, Ok(())),
            Err(fault) => (None, Err(fault)),
        };
        // The transfer may have ended in the meantime.
        let _ = answer.send(sent);
        result
    }

    /// Checks a content at all locations where it was published. If it is unchanged at one of them,
    /// it is unchanged. The locations do not wait for each other; on one filesystem, requested
    /// checks run one after the other.
    async fn check_everywhere(&self, digest: Digest) -> Result<Option<String>, Fault> {
        let rows = self.catalogue.all_by_digest(digest).await?;
        let mut checks: FuturesUnordered<_> = rows
            .iter()
            .filter(|row| row.published)
            .map(|row| async {
                let place = row.place.as_ref();
                let filesystem = place.map(|place| mount_point(place.filesystem()));
                let _turn = match &filesystem {
                    Some(filesystem) => Some(self.requested.lock(filesystem).await),
                    None => None,
                };
                self.check(&row.artifact, true).await
            })
            .collect();
        let mut first = None;
        while let Some(checked) = checks.next().await {
            match checked? {
                WatchResult::Unchanged | WatchResult::Unknown => return Ok(None),
                WatchResult::Changed(how) => first = first.or(Some(how)),
            }
        }
        Ok(first)
    }

    /// Checks an artifact, and stores and returns the result. `hurry`: somebody waits for it.
    pub(super) async fn check(
        &self,
        artifact: &ArtifactRef,
        hurry: bool,
    ) -> Result<WatchResult, Fault> {
        // It may have been withdrawn since it was listed.
        let Ok(row) = self.catalogue.artifact(artifact).await else {
            return Ok(WatchResult::Unknown);
        };
        let Some(place) = row.place.clone() else {
            return Ok(WatchResult::Unknown);
        };
        let same = |last: &&LastCheck| last.place == place && last.published_ms == row.published_ms;
        let last = self.last_checks.lock().get(artifact).filter(same).cloned();
        if hurry
            && last
                .as_ref()
                .is_some_and(|last| last.rests_until > Instant::now())
        {
            return Ok(WatchResult::Unchanged);
        }
        let mut mark = last.map_or_else(|| Mark::new(row.published_ms), |last| last.mark);
        let began = Instant::now();
        let (reader, stop, root, at) = (
            self.reader.clone(),
            self.stop.clone(),
            row.root.clone(),
            place.clone(),
        );
        let path = place.filesystem().to_owned();
        let (checked, mark) = blocking_at(&path, move || {
            let checked = reader.check(row.digest, &root, &at, &mut mark, hurry, &stop)?;
            Ok((checked, mark))
        })
        .await?;
        let Some(checked) = checked else {
            return Ok(WatchResult::Unknown);
        };
        let changed = checked.message();
        let mut rests_until = Instant::now();
        if hurry && changed.is_none() {
            rests_until += began.elapsed() * RESTS;
        }
        let last = LastCheck {
            place: place.clone(),
            published_ms: row.published_ms,
            mark,
            rests_until,
        };
        self.last_checks.lock().insert(artifact.clone(), last);
        // A result that was stored during this check is newer: a complete check takes long.
        match self.catalogue.artifact(artifact).await {
            Ok(now)
                if now.place.as_ref() == Some(&place)
                    && now.published_ms == row.published_ms
                    && (hurry || now.changed == row.changed) => {}
            Ok(now) => return Ok(WatchResult::of(now.changed)),
            Err(_) => return Ok(WatchResult::Unknown),
        }
        self.note_changed(row, place, changed.as_deref(), hurry)
            .await?;
        Ok(WatchResult::of(changed))
    }

    async fn note_changed(
        &self,
        row: ArtifactRow,
        place: StorageLocation,
        changed: Option<&str>,
        asked: bool,
    ) -> Result<(), Fault> {
        if self.catalogue.set_changed(&row.artifact, changed).await? {
            match changed {
                Some(how) => {
                    tracing::warn!(artifact = %row.artifact, how, "files that were published in place changed");
                }
                None => {
                    tracing::info!(artifact = %row.artifact, "files that were published in place have their original content again");
                }
            }
        }
        if changed.is_none() && (asked || row.changed.is_some()) {
            // A reader removes the chunk rows of missing content: they are added again.
            let reader = self.reader.clone();
            let path = place.filesystem().to_owned();
            blocking_at(&path, move || {
                reader.index(row.digest, &row.root, &[place], true)
            })
            .await?;
        }
        Ok(())
    }

    /// The lines of `doctor` about changed content: one for each artifact.
    pub(super) async fn changed_lines(&self) -> Result<Vec<String>, Fault> {
        let published = self.catalogue.published_here().await?.into_iter();
        let lines = what_changed(published).into_iter().map(|Changed { artifact, how, newer, .. }| match newer {
            Some(newer) => format!("ok {artifact}: {how}; the current content was published as {newer}"),
            None => format!("fault {artifact}: {how}; restore the original content, or publish the current content as a new version"),
        });
        Ok(lines.collect())
    }
}

#[cfg(test)]
mod tests;

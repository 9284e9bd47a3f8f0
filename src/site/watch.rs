//! Checks the content that was published in place at this site: all of it at intervals, and the
//! content that a transfer waits for at once.
//!
//! The result is stored in the catalogue, and the connection reports it to the hub. `in_place`
//! implements the check.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Opened;
use base::blocking::blocking_at;
use base::fault::Fault;
use base::names::ArtifactRef;
use base::workers::{Pace, Worker, Workers};
use content::manifest::Digest;
use exchange::in_place::{InPlaceReader, Mark, RESTS};
use exchange::transfer::AskLook;
use sink::StorageLocation;
use state::{ArtifactRow, Catalogue, Changed, what_changed};

/// Checks the content that was published in place at this site. The results of the last checks are
/// kept in memory.
#[derive(Clone)]
pub(super) struct Watch {
    catalogue: Catalogue,
    reader: InPlaceReader,
    check_every: Duration,
    looked: Arc<Mutex<HashMap<ArtifactRef, Looked>>>,
    /// Requests of transfers.
    asked: Arc<tokio::sync::Mutex<mpsc::Receiver<AskLook>>>,
    stop: CancellationToken,
}

/// The last check of an artifact; valid while its location is the same.
#[derive(Clone)]
struct Looked {
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
    Sound,
    /// The content changed, as described.
    Changed(String),
    /// Not known: the folder is not available, or the artifact was withdrawn.
    Unknown,
}

impl WatchResult {
    fn of(changed: Option<String>) -> Self {
        changed.map_or(Self::Sound, Self::Changed)
    }
}

impl Watch {
    /// Creates it without results. Transfers send their requests to `asked`.
    pub(super) fn new(opened: &Opened, asked: mpsc::Receiver<AskLook>) -> Self {
        Self {
            catalogue: opened.catalogue.clone(),
            reader: opened.reader.clone(),
            check_every: opened.config.share.check_every,
            looked: Arc::default(),
            asked: Arc::new(tokio::sync::Mutex::new(asked)),
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
            |this, worker| async move { this.keep_looking(&worker).await },
        );
        workers.start(
            "watch-requests",
            Pace::on_request().long(),
            self,
            |this, worker| async move { this.keep_answering(&worker).await },
        );
    }

    async fn keep_looking(&self, worker: &Worker) -> Result<(), Fault> {
        loop {
            // The worker reports a fault, and tries again.
            let _ = worker.iterate(self.look_at_published(worker)).await;
            tokio::time::sleep(self.check_every).await;
        }
    }

    /// Checks all published artifacts. A failed check does not prevent the others.
    async fn look_at_published(&self, worker: &Worker) -> Result<(), Fault> {
        let all = self.catalogue.published().await;
        let all =
            all.map_err(|fault| fault.context("list the artifacts that were published in place"))?;
        {
            let there: HashSet<&ArtifactRef> = all.iter().collect();
            self.looked
                .lock()
                .retain(|artifact, _| there.contains(artifact));
        }
        for artifact in &all {
            if let Err(fault) = self.look_over(artifact, false).await {
                worker.count_error(&fault.clone().context(artifact));
                tracing::warn!(%artifact, error = %fault, "an artifact that was published in place could not be checked");
            }
        }
        Ok(())
    }

    /// Answers the requests of transfers.
    async fn keep_answering(&self, worker: &Worker) -> Result<(), Fault> {
        let mut asked = self.asked.lock().await;
        while let Some(AskLook { digest, answer }) = asked.recv().await {
            let looked = worker.iterate(async {
                let looked = self.look_at_all(digest).await;
                looked.map_err(|fault| fault.context(format_args!("check the content {digest}")))
            });
            // The requester may have ended. The worker reports a fault.
            let _ = answer.send(looked.await.unwrap_or_default());
        }
        Ok(())
    }

    /// Checks a content at all locations where it was published; if it is unchanged at one of them,
    /// it is unchanged.
    async fn look_at_all(&self, digest: Digest) -> Result<Option<String>, Fault> {
        let mut first = None;
        for row in self
            .catalogue
            .all_by_digest(digest)
            .await?
            .into_iter()
            .filter(|row| row.published)
        {
            match self.look_over(&row.artifact, true).await? {
                WatchResult::Sound | WatchResult::Unknown => return Ok(None),
                WatchResult::Changed(how) => first = first.or(Some(how)),
            }
        }
        Ok(first)
    }

    /// Checks an artifact, and stores and returns the result.
    pub(super) async fn look_over(
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
        let same = |last: &&Looked| last.place == place && last.published_ms == row.published_ms;
        let last = self.looked.lock().get(artifact).filter(same).cloned();
        if hurry
            && last
                .as_ref()
                .is_some_and(|last| last.rests_until > Instant::now())
        {
            return Ok(WatchResult::Sound);
        }
        let mut mark = last.map_or_else(|| Mark::new(row.published_ms), |last| last.mark);
        let began = Instant::now();
        let (origin, stop, root, at) = (
            self.reader.clone(),
            self.stop.clone(),
            row.root.clone(),
            place.clone(),
        );
        let path = place.filesystem().to_owned();
        let (look, mark) = blocking_at(&path, move || {
            let look = origin.look(row.digest, &root, &at, &mut mark, hurry, &stop)?;
            Ok((look, mark))
        })
        .await?;
        let Some(look) = look else {
            return Ok(WatchResult::Unknown);
        };
        let changed = look.message();
        let mut rests_until = Instant::now();
        if hurry && changed.is_none() {
            rests_until += began.elapsed() * RESTS;
        }
        let looked = Looked {
            place: place.clone(),
            published_ms: row.published_ms,
            mark,
            rests_until,
        };
        self.looked.lock().insert(artifact.clone(), looked);
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
            let origin = self.reader.clone();
            let path = place.filesystem().to_owned();
            blocking_at(&path, move || {
                origin.index(row.digest, &row.root, &[place], true)
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

//! The watch over what was published here in place: looks at all of it every so often, and at once
//! at what a transfer waits for.
//!
//! What a look finds is noted in the catalogue, where the line takes it from for the hub. How to
//! look, see `origin`.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Opened;
use base::blocking::blocking;
use base::fault::Fault;
use base::names::ArtifactRef;
use base::workers::{Pace, Worker, Workers};
use content::manifest::Digest;
use exchange::in_place::{InPlaceReader, Mark, RESTS};
use exchange::transfer::AskLook;
use sink::StorageLocation;
use state::{ArtifactRow, Catalogue, Changed, what_changed};

/// Checks what was published in place at this site. What it knows of the last looks lives as long as the daemon.
#[derive(Clone)]
pub(super) struct Watch {
    catalogue: Catalogue,
    reader: InPlaceReader,
    check_every: Duration,
    looked: Arc<Mutex<HashMap<ArtifactRef, Looked>>>,
    /// What transfers ask.
    asked: Arc<tokio::sync::Mutex<mpsc::Receiver<AskLook>>>,
    stop: CancellationToken,
}

/// The last look at an artifact; good as long as it lies where it lay.
#[derive(Clone)]
struct Looked {
    place: StorageLocation,
    published_ms: i64,
    mark: Mark,
    /// Until then a transfer that waits is told that it is sound, without a look.
    rests_until: Instant,
}

/// What a look at an artifact says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum WatchResult {
    /// It is what was published.
    Sound,
    /// It is another, in this way.
    Changed(String),
    /// Nothing: its folder is away, or it was withdrawn.
    Unknown,
}

impl WatchResult {
    fn of(changed: Option<String>) -> Self {
        changed.map_or(Self::Sound, Self::Changed)
    }
}

impl Watch {
    /// Nothing was looked at yet; transfers ask here.
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

    /// Starts the workers that check what was published here: all of it from time to time, and what
    /// a transfer waits for at once.
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

    /// Looks at all that was published here. What cannot be looked at keeps the rest from nothing.
    async fn look_at_published(&self, worker: &Worker) -> Result<(), Fault> {
        let all = self.catalogue.published().await;
        let all = all.map_err(|fault| fault.context("list what was published in place"))?;
        {
            let there: HashSet<&ArtifactRef> = all.iter().collect();
            self.looked
                .lock()
                .retain(|artifact, _| there.contains(artifact));
        }
        for artifact in &all {
            if let Err(fault) = self.look_over(artifact, false).await {
                worker.count_error(&fault.clone().context(artifact));
                tracing::warn!(%artifact, error = %fault, "what was published in place could not be looked at");
            }
        }
        Ok(())
    }

    /// Tells transfers what changed of what they wait for.
    async fn keep_answering(&self, worker: &Worker) -> Result<(), Fault> {
        let mut asked = self.asked.lock().await;
        while let Some(AskLook { digest, answer }) = asked.recv().await {
            let looked = worker.iterate(async {
                let looked = self.look_at_all(digest).await;
                looked.map_err(|fault| fault.context(format_args!("look at the content {digest}")))
            });
            // Whoever asked may be gone. A fault is reported by the worker.
            let _ = answer.send(looked.await.unwrap_or_default());
        }
        Ok(())
    }

    /// What changed of a content wherever it was published here; whole under one name is whole.
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

    /// Looks at an artifact, and notes what changed, which is also the answer.
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
        let (look, mark) = blocking(move || {
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
        // What was noted while this looked is newer: a look without haste takes long.
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
                    tracing::warn!(artifact = %row.artifact, how, "what was published in place changed");
                }
                None => {
                    tracing::info!(artifact = %row.artifact, "what was published in place is what it was again");
                }
            }
        }
        if changed.is_none() && (asked || row.changed.is_some()) {
            // Who read it meanwhile forgot where that lay which was not there.
            let origin = self.reader.clone();
            blocking(move || origin.index(row.digest, &row.root, &[place], true)).await?;
        }
        Ok(())
    }

    /// What `doctor` says of what changed: one line each.
    pub(super) async fn changed_lines(&self) -> Result<Vec<String>, Fault> {
        let published = self.catalogue.published_here().await?.into_iter();
        let lines = what_changed(published).into_iter().map(|Changed { artifact, how, newer, .. }| match newer {
            Some(newer) => format!("ok {artifact}: {how}; what is there now was published as {newer}"),
            None => format!("fault {artifact}: {how}; put the old content back, or publish what is there now as a new version"),
        });
        Ok(lines.collect())
    }
}

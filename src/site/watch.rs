//! The watch over what was published here in place: looks at all of it every so often, and at once
//! at what a transfer waits for.
//!
//! What a look finds is noted in the catalogue, where the line takes it from for the hub. How to
//! look, see `origin`.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::Site;
use base::blocking::blocking;
use base::fault::Fault;
use base::names::ArtifactRef;
use content::manifest::Digest;
use exchange::in_place::{Mark, RESTS};
use exchange::transfer::AskLook;
use sink::StorageLocation;
use state::{ArtifactRow, Changed, what_changed};

/// What the watch knows only while the daemon lives.
pub(super) struct WatchState {
    looked: Mutex<HashMap<ArtifactRef, Looked>>,
    /// What transfers ask.
    asked: tokio::sync::Mutex<mpsc::Receiver<AskLook>>,
}

impl WatchState {
    /// Nothing was looked at yet; transfers ask here.
    pub(super) fn new(asked: mpsc::Receiver<AskLook>) -> Self {
        Self {
            looked: Mutex::default(),
            asked: tokio::sync::Mutex::new(asked),
        }
    }
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

impl Site {
    /// Watches until the daemon stops.
    pub(super) async fn keep_watch(&self) {
        tokio::select! {
            () = self.keep_looking() => {}
            () = self.keep_answering() => {}
            () = self.inner.stop.cancelled() => {}
        }
    }

    async fn keep_looking(&self) {
        loop {
            match self.inner.catalogue.published().await {
                Ok(all) => {
                    {
                        let there: HashSet<&ArtifactRef> = all.iter().collect();
                        self.inner
                            .watch
                            .looked
                            .lock()
                            .retain(|artifact, _| there.contains(artifact));
                    }
                    for artifact in &all {
                        if let Err(fault) = self.look_over(artifact, false).await {
                            tracing::warn!(%artifact, error = %fault, "what was published in place could not be looked at");
                        }
                    }
                }
                Err(fault) => {
                    tracing::error!(error = %fault, "what was published in place cannot be listed");
                }
            }
            tokio::time::sleep(self.inner.config.share.check_every).await;
        }
    }

    /// Tells transfers what changed of what they wait for.
    async fn keep_answering(&self) {
        let mut asked = self.inner.watch.asked.lock().await;
        while let Some(AskLook { digest, answer }) = asked.recv().await {
            let changed = match self.look_at_all(digest).await {
                Ok(changed) => changed,
                Err(fault) => {
                    tracing::warn!(%digest, error = %fault, "what a transfer waits for could not be looked at");
                    None
                }
            };
            // Whoever asked may be gone.
            let _ = answer.send(changed);
        }
    }

    /// What changed of a content wherever it was published here; whole under one name is whole.
    async fn look_at_all(&self, digest: Digest) -> Result<Option<String>, Fault> {
        let mut first = None;
        for row in self
            .inner
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
        let inner = &self.inner;
        // It may have been withdrawn since it was listed.
        let Ok(row) = inner.catalogue.artifact(artifact).await else {
            return Ok(WatchResult::Unknown);
        };
        let Some(place) = row.place.clone() else {
            return Ok(WatchResult::Unknown);
        };
        let same = |last: &&Looked| last.place == place && last.published_ms == row.published_ms;
        let last = inner
            .watch
            .looked
            .lock()
            .get(artifact)
            .filter(same)
            .cloned();
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
            inner.origin.clone(),
            inner.stop.clone(),
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
        inner.watch.looked.lock().insert(artifact.clone(), looked);
        // What was noted while this looked is newer: a look without haste takes long.
        match inner.catalogue.artifact(artifact).await {
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
        if self
            .inner
            .catalogue
            .set_changed(&row.artifact, changed)
            .await?
        {
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
            let origin = self.inner.origin.clone();
            blocking(move || origin.index(row.digest, &row.root, &[place], true)).await?;
        }
        Ok(())
    }

    /// What `doctor` says of what changed: one line each.
    pub(super) async fn changed_lines(&self) -> Result<Vec<String>, Fault> {
        let published = self.inner.catalogue.published_here().await?.into_iter();
        let lines = what_changed(published).into_iter().map(|Changed { artifact, how, newer, .. }| match newer {
            Some(newer) => format!("ok {artifact}: {how}; what is there now was published as {newer}"),
            None => format!("fault {artifact}: {how}; put the old content back, or publish what is there now as a new version"),
        });
        Ok(lines.collect())
    }
}

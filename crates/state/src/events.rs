//! Events: what changed, in the order of their numbers.

use async_trait::async_trait;
use base::fault::Fault;

use model::transfer::State;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{ArtifactRow, Body, Catalogue, TransferRow, Want};

/// Something that changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRow {
    /// The event number, which increases from event to event.
    pub seq: u64,
    /// When, in Unix milliseconds.
    pub at_ms: i64,
    /// `transfer`, `artifact`, `site` or `run`.
    pub what: String,
    /// The name or id of what changed.
    pub name: String,
    /// What it was like at the event, as far as that may change later, as JSON; `None`: an earlier
    /// version recorded the event.
    pub state: Option<String>,
}

/// What an event keeps of a transfer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct TransferState {
    pub(crate) want: Want,
    pub(crate) generation: i64,
    pub(crate) state: State,
    pub(crate) body: Body,
    pub(crate) updated_ms: i64,
    pub(crate) finished_ms: Option<i64>,
    pub(crate) removed_ms: Option<i64>,
}

impl TransferState {
    pub(crate) fn of(row: &TransferRow) -> Self {
        Self {
            want: row.want,
            generation: row.generation,
            state: row.state,
            body: row.body.clone(),
            updated_ms: row.updated_ms,
            finished_ms: row.finished_ms,
            removed_ms: row.removed_ms,
        }
    }
}

/// What an event keeps of an artifact.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ArtifactState {
    pub(crate) pinned: bool,
    pub(crate) changed: Option<String>,
    pub(crate) location: Option<String>,
}

/// What an event keeps of a site.
#[derive(Debug, Serialize, Deserialize)]
pub struct SiteState {
    /// Whether it was connected.
    pub online: bool,
    /// When something was last received from it.
    pub seen_ms: Option<i64>,
    /// The program version that it ran.
    pub version: Option<String>,
}

impl EventRow {
    fn kept<T: DeserializeOwned>(&self) -> Option<T> {
        serde_json::from_str(self.state.as_deref()?).ok()
    }

    /// Whether nothing changed about a transfer since this event.
    pub fn is_newest_of(&self, now: &TransferRow) -> bool {
        now.cursor == self.seq as i64
    }

    /// A transfer as it was at this event, out of what it is now.
    pub fn transfer(&self, now: TransferRow) -> TransferRow {
        let Some(then) = self.kept::<TransferState>() else {
            return now;
        };
        TransferRow {
            want: then.want,
            generation: then.generation,
            state: then.state,
            body: then.body,
            updated_ms: then.updated_ms,
            finished_ms: then.finished_ms,
            removed_ms: then.removed_ms,
            cursor: self.seq as i64,
            ..now
        }
    }

    /// The same of an artifact.
    pub fn artifact(&self, now: ArtifactRow) -> ArtifactRow {
        let Some(then) = self.kept::<ArtifactState>() else {
            return now;
        };
        ArtifactRow {
            pinned: then.pinned,
            changed: then.changed,
            location: then.location,
            ..now
        }
    }

    /// A run as it was at this event.
    pub fn run<T: DeserializeOwned>(&self) -> Option<T> {
        self.kept()
    }

    /// A site as it was at this event.
    pub fn site(&self) -> Option<SiteState> {
        self.kept()
    }
}

impl Catalogue {
    /// Refuses a cursor from which a reader would miss changes without a report: it is newer than
    /// the newest event, because the catalogue was restored from a backup or is another one.
    pub async fn check_cursor(&self, since: u64) -> Result<(), Fault> {
        let newest = self.cursor().await?;
        if since > newest {
            return Err(begin_again(format!(
                "cursor {since} is newer than the newest event of this daemon, {newest}: its catalogue was restored from a backup, or the cursor is of another daemon"
            )));
        }
        Ok(())
    }

    /// The same for a reader of events, which are removed when there are too many. A reader without
    /// a cursor (0) gets what there is.
    pub async fn check_event_cursor(&self, since: u64) -> Result<(), Fault> {
        self.check_cursor(since).await?;
        match self.oldest_event().await? {
            Some(oldest) if since > 0 && since + 1 < oldest => Err(begin_again(format!(
                "the events after {since} are no longer stored; the oldest one is {oldest}"
            ))),
            _ => Ok(()),
        }
    }
}

fn begin_again(message: String) -> Fault {
    Fault::conflict(message).with_next(
        "read the complete list of transfers, then continue from the cursor of that answer",
    )
}

/// Events, and the cursors of their readers.
#[async_trait]
pub trait Events: Send + Sync {
    /// The newest event number.
    async fn cursor(&self) -> Result<u64, Fault>;

    /// The number of the oldest event that is still stored.
    async fn oldest_event(&self) -> Result<Option<u64>, Fault>;

    /// The events after `since`, oldest first.
    async fn events(&self, since: u64, limit: u32) -> Result<Vec<EventRow>, Fault>;

    /// Removes the oldest events beyond [`base::limits::EVENTS_KEPT`].
    async fn trim_events(&self) -> Result<(), Fault>;
}

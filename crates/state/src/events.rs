//! Events: what changed, in the order of their numbers.

use async_trait::async_trait;
use base::fault::Fault;

use crate::Catalogue;

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

//! Events: what changed, in the order of their numbers.

use async_trait::async_trait;
use base::fault::Fault;

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

/// Events, and the cursors of their readers.
#[async_trait]
pub trait Events: Send + Sync {
    /// The newest event number.
    async fn cursor(&self) -> Result<u64, Fault>;

    /// The events after `since`, oldest first.
    async fn events(&self, since: u64, limit: u32) -> Result<Vec<EventRow>, Fault>;

    /// Removes the oldest events beyond [`base::limits::EVENTS_KEPT`].
    async fn trim_events(&self) -> Result<(), Fault>;
}

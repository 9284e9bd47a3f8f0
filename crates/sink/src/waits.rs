//! What a running sink call waits for, so that `status` can report it before the call ends.

use std::sync::Arc;

use tokio::sync::watch;

use base::fault::Fault;

/// A sink call reports here what it waits for. Cheap to clone; a report without a reader is
/// discarded.
#[derive(Debug, Clone)]
pub struct Waits(Arc<watch::Sender<Option<Fault>>>);

impl Default for Waits {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(None)))
    }
}

impl Waits {
    /// Reports that the call waits: `fault` states for what, and what the user can do.
    pub fn report(&self, fault: Fault) {
        self.set(Some(fault));
    }

    /// Reports that the call continues.
    pub fn clear(&self) {
        self.set(None);
    }

    /// The current report.
    pub fn now(&self) -> Option<Fault> {
        self.0.borrow().clone()
    }

    /// Subscribes to the reports.
    pub fn subscribe(&self) -> watch::Receiver<Option<Fault>> {
        self.0.subscribe()
    }

    fn set(&self, new: Option<Fault>) {
        self.0.send_if_modified(|now| {
            let changed = *now != new;
            *now = new;
            changed
        });
    }
}

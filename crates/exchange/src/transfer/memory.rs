//! The memory of bytes in flight at a site: a pool for all transfers, and a small reserve for each
//! sink.
//!
//! A sink that hangs keeps the part of the pool that its transfers have taken, perhaps all of it.
//! The transfers of the other sinks then use their reserves.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{SINKS, sink_number};
use base::limits::SINK_OWN_BYTES;
use base::names::Kind;

/// Bytes of a unit of the memory.
pub(super) const UNIT_BYTES: u64 = 4 << 10;

/// The memory; see the module.
pub struct Memory {
    common: Arc<Semaphore>,
    own: [Arc<Semaphore>; SINKS],
}

impl Memory {
    /// A total of so many bytes.
    pub fn new(bytes: u64) -> Self {
        let units = |bytes: u64| Arc::new(Semaphore::new((bytes / UNIT_BYTES) as usize));
        let common = bytes
            .saturating_sub(SINK_OWN_BYTES * SINKS as u64)
            .max(SINK_OWN_BYTES);
        Self {
            common: units(common),
            own: std::array::from_fn(|_| units(SINK_OWN_BYTES)),
        }
    }

    /// Units for a batch for the sink of this kind: from the pool, or from the sink's reserve.
    pub(super) async fn take(&self, kind: Kind, units: u32) -> Option<OwnedSemaphorePermit> {
        if let Ok(taken) = self.common.clone().try_acquire_many_owned(units) {
            return Some(taken);
        }
        tokio::select! {
            taken = self.common.clone().acquire_many_owned(units) => taken.ok(),
            taken = self.own[sink_number(kind)].clone().acquire_many_owned(units) => taken.ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_sink_that_hangs_leaves_something_to_the_others() {
        let memory = Memory::new(16 << 20);
        let batch = (1 << 20) / UNIT_BYTES as u32;
        let mut held = Vec::new();
        while let Ok(taken) = tokio::time::timeout(
            std::time::Duration::from_millis(20),
            memory.take(Kind::Dataset, batch),
        )
        .await
        {
            held.push(taken.unwrap());
        }
        assert_eq!(held.len(), 12, "all but the reserves of the others");
        assert!(memory.take(Kind::Labels, batch).await.is_some());
        assert!(memory.take(Kind::Image, batch).await.is_some());
    }
}

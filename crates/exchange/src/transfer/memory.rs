//! The memory that bytes in flight take at a site: a pool for all transfers, and a little for each
//! sink alone.
//!
//! A sink that hangs keeps what its transfers have taken of the pool, perhaps all of it. The
//! transfers of the other sinks then go on with what is theirs alone.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{SINKS, sink_number};
use base::limits::SINK_OWN_BYTES;
use base::names::Kind;

/// Bytes of a unit of the memory.
pub(super) const UNIT_BYTES: u64 = 4 << 10;

/// See the module.
pub struct Memory {
    common: Arc<Semaphore>,
    own: [Arc<Semaphore>; SINKS],
}

impl Memory {
    /// So many bytes in all.
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

    /// Units for a batch on its way to the sink of this kind: of the pool, or of what is the sink's
    /// alone.
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
        assert_eq!(held.len(), 12, "all but what is the others' alone");
        assert!(memory.take(Kind::Labels, batch).await.is_some());
        assert!(memory.take(Kind::Image, batch).await.is_some());
    }
}

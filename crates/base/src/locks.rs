//! Locks by name: one task at a time works on one object; tasks of other objects do not wait.
//!
//! `exchange` uses them for transfers and artifacts, the site for filesystems. Nothing survives a
//! crash.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;

/// One fair lock for each name that is in use.
#[derive(Debug)]
pub struct Locks<K>(Mutex<HashMap<K, Arc<tokio::sync::Mutex<()>>>>);

impl<K> Default for Locks<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Clone + Eq + Hash> Locks<K> {
    /// Waits for the lock of this name.
    pub async fn lock(&self, name: &K) -> OwnedMutexGuard<()> {
        let lock = {
            let mut all = self.0.lock();
            all.retain(|_, lock| Arc::strong_count(lock) > 1);
            all.entry(name.clone()).or_default().clone()
        };
        lock.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_lock_delays_only_the_tasks_of_its_own_name() {
        let locks = Locks::default();
        let first = locks.lock(&1).await;
        assert!(locks.lock(&1).now_or_never().is_none());
        let other = locks.lock(&2).now_or_never();
        assert!(other.is_some());
        drop((first, other));
        let _again = locks.lock(&1).now_or_never().expect("it is free again");
        assert_eq!(
            locks.0.lock().len(),
            1,
            "a name that is not in use is forgotten"
        );
    }
}

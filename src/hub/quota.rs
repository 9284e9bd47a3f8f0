//! What one site and one publisher may take of the hub: quotas on what they publish, and a pace for what they change.
//!
//! A quota is checked when the root manifest is known, before any of the content is asked for. What is being published at the moment is
//! *reserved*, so that many publishes at once take no more than one after the other. The pace delays and never refuses: a peer that
//! floods the hub with reports or requests slows down itself, and the catalogue grows no faster. Nothing here survives a crash but what
//! the catalogue says of what was published.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::Hub;
use crate::config::Quota;
use base::fault::Fault;
use base::names::{ArtifactRef, SiteName};
use content::manifest::Root;
use transport::identity::Holder;

/// Peers whose pace is remembered; those that have been quiet are forgotten first.
const PACED_MAX: usize = 4096;

/// What is being published: artifacts and bytes of each site and publisher.
pub(super) type Reserved = Mutex<HashMap<Holder, (u64, u64)>>;

/// A part of a quota, taken until the artifact is in the catalogue or given up.
pub(super) struct Reservation<'a> {
    hub: &'a Hub,
    who: Holder,
    bytes: u64,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut reserved = self.hub.inner.reserved.lock();
        if let Some((artifacts, bytes)) = reserved.get_mut(&self.who) {
            (*artifacts, *bytes) = (artifacts.saturating_sub(1), bytes.saturating_sub(self.bytes));
            if *artifacts == 0 {
                reserved.remove(&self.who);
            }
        }
    }
}

impl Hub {
    /// Takes a part of the quota of whoever publishes this artifact, or says why it does not fit. What is in the catalogue already costs
    /// nothing again.
    pub(super) async fn reserve<'a>(&'a self, who: &Holder, artifact: &ArtifactRef, root: &Root) -> Result<Reservation<'a>, Fault> {
        let catalogue = &self.inner.catalogue;
        let known = catalogue.artifact(artifact).await.is_ok_and(|row| row.digest == root.digest());
        let bytes = if known { 0 } else { root.totals.bytes };
        let quota = match who {
            Holder::Publisher(_) => &self.inner.config.quota.publisher,
            Holder::Site(_) | Holder::Hub(_) => &self.inner.config.quota.site,
        };
        let used = match who {
            Holder::Publisher(name) => catalogue.published_by(None, Some(name)).await?,
            Holder::Site(name) | Holder::Hub(name) => catalogue.published_by(Some(name), None).await?,
        };
        let mut reserved = self.inner.reserved.lock();
        let taken = reserved.entry(who.clone()).or_default();
        if !known {
            let used = (used.0.saturating_add(taken.0), used.1.saturating_add(taken.1));
            if let Err(fault) = fits(quota, who, artifact, root, used) {
                if *taken == (0, 0) {
                    reserved.remove(who);
                }
                return Err(fault);
            }
        }
        *taken = (taken.0 + 1, taken.1.saturating_add(bytes));
        Ok(Reservation { hub: self, who: who.clone(), bytes })
    }
}

/// Whether an artifact fits beside what was published before: `(artifacts, bytes)`.
fn fits(quota: &Quota, who: &Holder, artifact: &ArtifactRef, root: &Root, used: (u64, u64)) -> Result<(), Fault> {
    let table = if matches!(who, Holder::Publisher(_)) { "quota.publisher" } else { "quota.site" };
    let refuse = |what: String, key: &str| {
        Err(Fault::not_allowed(format!("{artifact} exceeds the quota of {who}: {what}"))
            .with_next(format!("publish less, or ask the operator of the hub to raise [{table}] {key}")))
    };
    let totals = root.totals;
    let entries = totals.files.saturating_add(totals.dirs).saturating_add(totals.symlinks);
    if entries > quota.entries_per_artifact {
        return refuse(
            format!("it has {entries} files, folders and links, and {} are allowed", quota.entries_per_artifact),
            "entries_per_artifact",
        );
    }
    if used.0 >= quota.artifacts {
        return refuse(format!("{} artifacts are published, and {} are allowed", used.0, quota.artifacts), "artifacts");
    }
    if used.1.saturating_add(totals.bytes) > quota.bytes {
        let (all, each) = (used.1, totals.bytes);
        return refuse(format!("{all} bytes are published, it has {each}, and {} are allowed", quota.bytes), "bytes");
    }
    Ok(())
}

/// How fast each peer may go on: so many steps a second, and as many as a burst at once. Cheap to ask.
pub(super) struct Pace {
    per_second: f64,
    burst: f64,
    /// Since when each peer has this many steps in hand; below 0 it waits.
    peers: Mutex<HashMap<SiteName, (Instant, f64)>>,
}

impl Pace {
    pub(super) fn new(per_second: u32, burst: u32) -> Self {
        Self { per_second: per_second.into(), burst: burst.into(), peers: Mutex::default() }
    }

    /// Takes so many steps; waits until the peer has earned them.
    pub(super) async fn go(&self, peer: &SiteName, steps: usize) {
        let wait = self.take(peer, steps, Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// Takes so many steps, and says how long the peer waits for them.
    fn take(&self, peer: &SiteName, steps: usize, now: Instant) -> Duration {
        let mut peers = self.peers.lock();
        let earned = |since: Instant, left: f64| (left + now.duration_since(since).as_secs_f64() * self.per_second).min(self.burst);
        if peers.len() >= PACED_MAX {
            peers.retain(|_, (since, left)| earned(*since, *left) < self.burst);
        }
        let (since, left) = peers.entry(peer.clone()).or_insert((now, self.burst));
        (*since, *left) = (now, earned(*since, *left) - steps as f64);
        Duration::from_secs_f64((-*left / self.per_second).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::upload::tests::Bench;
    use base::fault::Code;

    #[test]
    fn a_peer_that_floods_slows_down_itself_only() {
        let pace = Pace::new(10, 20);
        let (loud, calm) = ("loud".parse().unwrap(), "calm".parse().unwrap());
        let now = Instant::now();
        assert_eq!(pace.take(&loud, 20, now), Duration::ZERO, "a burst is free");
        assert_eq!(pace.take(&loud, 30, now), Duration::from_secs(3));
        assert_eq!(pace.take(&calm, 20, now), Duration::ZERO, "another peer has its own");
        assert_eq!(pace.take(&loud, 10, now + Duration::from_secs(4)), Duration::ZERO, "it earned ten in the second after");
        assert_eq!(pace.take(&loud, 20, now + Duration::from_secs(3600)), Duration::ZERO, "and no more than a burst in an hour");
        assert_eq!(pace.take(&loud, 10, now + Duration::from_secs(3600)), Duration::from_secs(1));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_publisher_that_has_its_quota_brings_no_more() {
        let bench = Bench::start_with("[quota.publisher]\nartifacts = 2\nbytes = \"3MiB\"\nentries_per_artifact = 10\n").await;
        let token = bench.token(None, Some("office")).await;
        let first = bench.source("a", 2 << 20, 1);
        bench.publish(&first, "model/a:v1", Some(&token)).await.unwrap();
        let stored = || bench.hub.inner.store.stored_bytes().unwrap();
        let before = stored();
        let large = bench.source("b", 2 << 20, 2);
        let fault = bench.publish(&large, "model/b:v1", None).await.unwrap_err();
        assert_eq!(fault.code, Code::NotAllowed, "{fault}");
        assert!(fault.message.contains("quota") && fault.next.contains("[quota.publisher] bytes"), "{fault}: {}", fault.next);
        assert_eq!(stored(), before, "nothing of it was stored");
        assert!(bench.hub.inner.reserved.lock().is_empty());
        // What is there already costs nothing again; one small artifact more fits, and then there are two.
        assert!(bench.publish(&first, "model/a:v1", None).await.unwrap().published.unchanged);
        bench.publish(&bench.source("c", 1 << 10, 3), "model/c:v1", None).await.unwrap();
        let fault = bench.publish(&bench.source("d", 1 << 10, 4), "model/d:v1", None).await.unwrap_err();
        assert!(fault.next.contains("[quota.publisher] artifacts"), "{fault}: {}", fault.next);
        let many = bench.source("e", 1 << 10, 5);
        (0..20).for_each(|n| base::durable::replace(&many.join(format!("{n}")), b"x").unwrap());
        let fault = bench.publish(&many, "model/e:v1", None).await.unwrap_err();
        assert!(fault.next.contains("[quota.publisher] entries_per_artifact"), "{fault}: {}", fault.next);
    }
}

//! Quotas on the content that a site or a publisher publishes.
//!
//! A quota is checked when the root manifest is known, before any of the content is fetched. The
//! size of a running publish is *reserved*, so that concurrent publishes take no more than
//! consecutive ones. The meter of the publish's lease counts every stored byte. If a publish stores
//! more than its manifest announced, for example pages, it takes more of the quota, and is refused
//! when the quota is used up. The stored content of an incomplete publish counts as *unfinished*
//! until the same artifact is published or a garbage collection (`gc`) removes it. So the hub never
//! stores more of a peer than its quota and [`UNCOUNTED_BYTES`] for each running publish.
//!
//! Sessions, uploads and the collection call it. Nothing here survives a restart except the
//! published artifacts in the catalogue.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::config::{Quota, Quotas};
use base::fault::Fault;
use base::names::ArtifactRef;
use base::peer::Peer;
use content::manifest::{Digest, Root};
use content::store::Meter;
use state::Catalogue;

/// Stored bytes of a publish that may exceed its announced totals, in addition to a sixteenth of
/// the totals: for its manifest and the headers of its chunks.
const UNCOUNTED_BYTES: u64 = 1 << 20;

/// The part of each peer's quota that is used in addition to the catalogue.
type Reserved = Arc<Mutex<HashMap<Peer, Taken>>>;

/// The used part of one peer's quota.
#[derive(Default)]
struct Taken {
    /// Running publishes…
    artifacts: u64,
    /// …and the bytes that are reserved for them.
    bytes: u64,
    /// Stored bytes of unfinished publishes. Each counts as an artifact, so the quota bounds this
    /// list.
    unfinished: HashMap<Digest, u64>,
}

impl Taken {
    fn total(&self) -> (u64, u64) {
        let unfinished = self
            .unfinished
            .values()
            .fold(0, |sum: u64, bytes| sum.saturating_add(*bytes));
        (
            self.artifacts.saturating_add(self.unfinished.len() as u64),
            self.bytes.saturating_add(unfinished),
        )
    }
}

/// A reserved part of a quota, until the artifact is in the catalogue or the publish ends without
/// it. It is the meter of the publish's lease, and ends with the lease's last handle.
pub(super) struct Reservation {
    reserved: Reserved,
    who: Peer,
    artifact: ArtifactRef,
    digest: Digest,
    quota: Quota,
    /// The artifact is in the catalogue already, so nothing is counted.
    known: bool,
    /// The size of this peer's artifacts in the catalogue, in bytes.
    published: u64,
    /// The size in the manifest, in bytes.
    announced: u64,
    /// Only used while `reserved` is locked.
    counted: Mutex<Counted>,
    finished: AtomicBool,
}

struct Counted {
    /// Stored bytes, including those of earlier attempts.
    stored: u64,
    /// Bytes of the quota that are used: the announced ones, or more.
    charged: u64,
}

impl Reservation {
    /// Marks the publish as complete: the artifact is in the catalogue.
    pub(super) fn finish(&self) {
        self.finished.store(true, Ordering::Relaxed);
    }
}

impl Meter for Reservation {
    fn take(&self, bytes: u64) -> Result<(), Fault> {
        if self.known {
            return Ok(());
        }
        let mut reserved = self.reserved.lock();
        let mut counted = self.counted.lock();
        let taken = reserved.entry(self.who.clone()).or_default();
        let stored = counted.stored.saturating_add(bytes);
        let more = stored
            .saturating_sub(UNCOUNTED_BYTES + self.announced / 16)
            .saturating_sub(counted.charged);
        let used = self.published.saturating_add(taken.total().1);
        if more > 0 && used.saturating_add(more) > self.quota.bytes {
            let all = self.quota.bytes;
            let what = format!(
                "its manifest needs more than the {all} bytes that are allowed for all artifacts"
            );
            return Err(exceeds(&self.artifact, &self.who, &what, "bytes", 0));
        }
        taken.bytes = taken.bytes.saturating_add(more);
        (counted.charged, counted.stored) = (counted.charged + more, stored);
        Ok(())
    }

    fn release(&self, bytes: u64) {
        // The used part of the quota does not decrease until the end.
        let mut counted = self.counted.lock();
        counted.stored = counted.stored.saturating_sub(bytes);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut reserved = self.reserved.lock();
        let Some(taken) = reserved.get_mut(&self.who) else {
            return;
        };
        let Counted { stored, charged } = *self.counted.get_mut();
        (taken.artifacts, taken.bytes) = (
            taken.artifacts.saturating_sub(1),
            taken.bytes.saturating_sub(charged),
        );
        if *self.finished.get_mut() || self.known {
            taken.unfinished.remove(&self.digest);
        } else if stored > 0 {
            let unfinished = taken.unfinished.entry(self.digest).or_default();
            *unfinished = unfinished.saturating_add(stored);
        }
        if taken.artifacts == 0 && taken.unfinished.is_empty() {
            reserved.remove(&self.who);
        }
    }
}

/// What all peers have taken of their quotas. Cheap to clone.
#[derive(Clone)]
pub(super) struct QuotaLedger {
    catalogue: Catalogue,
    quotas: Arc<Quotas>,
    reserved: Reserved,
}

impl QuotaLedger {
    /// Nothing is reserved yet.
    pub(super) fn new(catalogue: Catalogue, quotas: Quotas) -> Self {
        Self {
            catalogue,
            quotas: Arc::new(quotas),
            reserved: Reserved::default(),
        }
    }

    /// Reserves a part of the quota of the peer that publishes this artifact, or fails with the
    /// exceeded limit. Content that is in the catalogue already costs nothing again, and content
    /// that an earlier attempt stored is counted once.
    pub(super) async fn reserve(
        &self,
        who: &Peer,
        artifact: &ArtifactRef,
        root: &Root,
    ) -> Result<Arc<Reservation>, Fault> {
        let catalogue = &self.catalogue;
        let digest = root.digest();
        let known = catalogue
            .artifact(artifact)
            .await
            .is_ok_and(|row| row.digest == digest);
        let announced = if known { 0 } else { root.totals.bytes };
        let quota = match who {
            Peer::Publisher(_) => &self.quotas.publisher,
            Peer::Site(_) | Peer::Hub(_) => &self.quotas.site,
        };
        let published = catalogue.published_by(who).await?;
        let mut reserved = self.reserved.lock();
        let taken = reserved.entry(who.clone()).or_default();
        let before = taken.unfinished.remove(&digest);
        if !known {
            let beside = taken.total();
            let used = (
                published.0.saturating_add(beside.0),
                published.1.saturating_add(beside.1),
            );
            let unfinished = taken.unfinished.len();
            if let Err(fault) = fits(quota, who, artifact, root, used, unfinished) {
                taken.unfinished.extend(before.map(|bytes| (digest, bytes)));
                if taken.artifacts == 0 && taken.unfinished.is_empty() {
                    reserved.remove(who);
                }
                return Err(fault);
            }
        }
        (taken.artifacts, taken.bytes) =
            (taken.artifacts + 1, taken.bytes.saturating_add(announced));
        drop(reserved);
        Ok(Arc::new(Reservation {
            reserved: self.reserved.clone(),
            who: who.clone(),
            artifact: artifact.clone(),
            digest,
            quota: quota.clone(),
            known,
            published: published.1,
            announced,
            counted: Mutex::new(Counted {
                stored: before.unwrap_or(0),
                charged: announced,
            }),
            finished: AtomicBool::new(false),
        }))
    }

    /// The unfinished publishes. To be read before a garbage collection starts.
    pub(super) fn unfinished(&self) -> Vec<(Peer, Digest, u64)> {
        let reserved = self.reserved.lock();
        let of = |(who, taken): (&Peer, &Taken)| {
            taken
                .unfinished
                .iter()
                .map(|(d, bytes)| (who.clone(), *d, *bytes))
                .collect::<Vec<_>>()
        };
        reserved.iter().flat_map(of).collect()
    }

    /// Removes the entries of publishes that were unfinished at the start of a completed garbage
    /// collection.
    pub(super) fn forget_collected(&self, collected: Vec<(Peer, Digest, u64)>) {
        let mut reserved = self.reserved.lock();
        for (who, digest, bytes) in collected {
            let Some(taken) = reserved.get_mut(&who) else {
                continue;
            };
            if let Some(left) = taken.unfinished.get_mut(&digest) {
                *left = left.saturating_sub(bytes);
                if *left == 0 {
                    taken.unfinished.remove(&digest);
                }
            }
            if taken.artifacts == 0 && taken.unfinished.is_empty() {
                reserved.remove(&who);
            }
        }
    }
}

fn exceeds(artifact: &ArtifactRef, who: &Peer, what: &str, key: &str, unfinished: usize) -> Fault {
    let table = if matches!(who, Peer::Publisher(_)) {
        "quota.publisher"
    } else {
        "quota.site"
    };
    let mut message = format!("{artifact} exceeds the quota of {who}: {what}");
    let mut next =
        format!("publish less, or ask the operator of the hub to increase [{table}] {key}");
    if unfinished > 0 {
        message.push_str(&format!(
            "; this includes {unfinished} publishes that did not finish"
        ));
        next.push_str(
            ", or to run 'packhorse gc', which removes the content of unfinished publishes",
        );
    }
    Fault::not_allowed(message).with_next(next)
}

/// Whether an artifact fits in the quota, in addition to the earlier publishes: `(artifacts,
/// bytes)`.
fn fits(
    quota: &Quota,
    who: &Peer,
    artifact: &ArtifactRef,
    root: &Root,
    used: (u64, u64),
    unfinished: usize,
) -> Result<(), Fault> {
    let refuse = |what: &str, key: &str, unfinished: usize| {
        Err(exceeds(artifact, who, what, key, unfinished))
    };
    let totals = root.totals;
    let entries = totals
        .files
        .saturating_add(totals.dirs)
        .saturating_add(totals.symlinks);
    if entries > quota.entries_per_artifact {
        let allowed = quota.entries_per_artifact;
        return refuse(
            &format!("it has {entries} files, folders and links, and {allowed} are allowed"),
            "entries_per_artifact",
            0,
        );
    }
    if used.0 >= quota.artifacts {
        return refuse(
            &format!(
                "{} artifacts are published, and {} are allowed",
                used.0, quota.artifacts
            ),
            "artifacts",
            unfinished,
        );
    }
    if used.1.saturating_add(totals.bytes) > quota.bytes {
        let (all, each) = (used.1, totals.bytes);
        return refuse(
            &format!(
                "{all} bytes are published, it has {each}, and {} are allowed",
                quota.bytes
            ),
            "bytes",
            unfinished,
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::hub::upload::tests::Bench;
    use base::fault::Code;
    use exchange::wire;
    use model::actor::Actor;
    use model::protocol::AskHub;
    use transport::identity::Claim;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_publisher_with_a_used_quota_is_refused() {
        let bench = Bench::start_with(
            "[quota.publisher]\nartifacts = 2\nbytes = \"3MiB\"\nentries_per_artifact = 10\n",
        )
        .await;
        let token = bench.token(None, Some("office")).await;
        let first = bench.source("a", 2 << 20, 1);
        bench
            .publish(&first, "model/a:v1", Some(&token))
            .await
            .unwrap();
        let stored = || bench.hub.inner.store.stored_bytes().unwrap();
        let before = stored();
        let large = bench.source("b", 2 << 20, 2);
        let fault = bench.publish(&large, "model/b:v1", None).await.unwrap_err();
        assert_eq!(fault.code, Code::NotAllowed, "{fault}");
        assert!(
            fault.message.contains("quota") && fault.next.contains("[quota.publisher] bytes"),
            "{fault}: {}",
            fault.next
        );
        assert_eq!(stored(), before, "none of its content was stored");
        assert!(bench.hub.inner.quotas.reserved.lock().is_empty());
        // Content that the hub has costs nothing again. One more small artifact fits, and then
        // there are two.
        assert!(
            bench
                .publish(&first, "model/a:v1", None)
                .await
                .unwrap()
                .published
                .unchanged
        );
        bench
            .publish(&bench.source("c", 1 << 10, 3), "model/c:v1", None)
            .await
            .unwrap();
        let fault = bench
            .publish(&bench.source("d", 1 << 10, 4), "model/d:v1", None)
            .await
            .unwrap_err();
        assert!(
            fault.next.contains("[quota.publisher] artifacts"),
            "{fault}: {}",
            fault.next
        );
        let many = bench.source("e", 1 << 10, 5);
        (0..20).for_each(|n| base::durable::replace(&many.join(format!("{n}")), b"x").unwrap());
        let fault = bench.publish(&many, "model/e:v1", None).await.unwrap_err();
        assert!(
            fault
                .next
                .contains("[quota.publisher] entries_per_artifact"),
            "{fault}: {}",
            fault.next
        );
    }

    /// A publisher with its own connection, which serves the content of another hub, and stops
    /// after so many fetches.
    async fn upload_in_part(
        bench: &Bench,
        there: &Bench,
        link: &transport::Link,
        reference: &str,
        fetches: usize,
    ) -> Result<(), Fault> {
        let artifact: ArtifactRef = reference.parse().unwrap();
        let digest = there
            .hub
            .inner
            .catalogue
            .artifact(&artifact)
            .await
            .unwrap()
            .digest;
        let question = AskHub::Upload {
            artifact,
            digest,
            to: None,
            omitted: Default::default(),
        };
        let serve = async {
            for _ in 0..fetches {
                let (send, mut recv) = link.accept().await.unwrap();
                recv.read_exact(&mut [0]).await.unwrap();
                let west = Peer::Site("west".parse().unwrap());
                exchange::fetch::serve(send, recv, link, &west, there.hub.inner.uploads.library())
                    .await;
            }
            // The next request is answered with bytes that are not a frame.
            while let Some((mut send, _recv)) = link.accept().await {
                let _ = send.finish();
            }
        };
        let answer = tokio::select! {
            answer = wire::ask::<_, serde_json::Value>(link, &question) => answer.map(|_| ()),
            () = serve => unreachable!("the connection ended"),
        };
        // Content that was in flight at the end is stored and counted a moment later.
        while bench
            .hub
            .inner
            .quotas
            .reserved
            .lock()
            .values()
            .any(|taken| taken.artifacts > 0)
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        answer
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn content_of_unfinished_uploads_is_counted_until_it_is_collected() {
        let bench = Bench::start_with("[quota.publisher]\nbytes = \"20MiB\"\n").await;
        let there = Bench::start().await;
        let token = there.token(None, Some("office")).await;
        there
            .join(
                &there.token(Some("west"), None).await,
                &Claim::Site("west".parse().unwrap()),
            )
            .await;
        for (name, seed) in [("model/a:v1", 1), ("model/b:v1", 2)] {
            there
                .publish(
                    &there.source(&format!("source-{seed}"), 18 << 20, seed),
                    name,
                    Some(&token),
                )
                .await
                .unwrap();
            there
                .hub
                .inner
                .deliveries
                .deliver(
                    &Actor::Admin,
                    &[name.parse().unwrap()],
                    &"west".parse().unwrap(),
                    false,
                )
                .await
                .unwrap();
        }
        let publisher = bench
            .join(&bench.token(None, Some("lab")).await, &Claim::Publisher)
            .await;
        let link = bench.dial(&publisher).await;
        let stored = || bench.hub.inner.store.stored_bytes().unwrap();
        // How much of an upload is stored before it ends depends on the order of its requests: more
        // than the space that the second artifact needs is enough.
        while stored() <= 2 << 20 {
            upload_in_part(&bench, &there, &link, "model/a:v1", 8)
                .await
                .unwrap_err();
        }
        let kept = stored();
        for _ in 0..2 {
            let fault = upload_in_part(&bench, &there, &link, "model/b:v1", 8)
                .await
                .unwrap_err();
            assert_eq!(fault.code, Code::NotAllowed, "{fault}");
            assert!(
                fault.message.contains("did not finish") && fault.next.contains("packhorse gc"),
                "{fault}: {}",
                fault.next
            );
        }
        assert_eq!(stored(), kept, "no content of another artifact was stored");
        // The stored content is not counted twice when the same publish continues, and still counts
        // when that one stops too.
        upload_in_part(&bench, &there, &link, "model/a:v1", 8)
            .await
            .unwrap_err();
        assert!(stored() >= kept && stored() < 19 << 20, "{}", stored());
        bench
            .hub
            .inner
            .jobs
            .collect_now(Arc::default())
            .await
            .unwrap();
        assert!(bench.hub.inner.quotas.reserved.lock().is_empty());
        upload_in_part(&bench, &there, &link, "model/b:v1", usize::MAX)
            .await
            .unwrap();
        assert!(
            bench.hub.inner.quotas.reserved.lock().is_empty(),
            "artifacts in the catalogue are counted there"
        );
    }

    #[tokio::test]
    async fn the_pages_of_a_manifest_use_the_quota() {
        let bench = Bench::start_with("[quota.site]\nbytes = \"4MiB\"\n").await;
        let token = bench.token(None, Some("office")).await;
        bench
            .publish(&bench.source("a", 100, 1), "model/a:v1", Some(&token))
            .await
            .unwrap();
        let mut root = bench
            .hub
            .inner
            .catalogue
            .artifact(&"model/a:v1".parse().unwrap())
            .await
            .unwrap()
            .root;
        let who = Peer::Site("west".parse().unwrap());
        let mut kept = 0;
        for offer in 0..4 {
            root.totals.chunks += 1;
            let Ok(reservation) = bench
                .hub
                .inner
                .quotas
                .reserve(&who, &"model/b:v1".parse().unwrap(), &root)
                .await
            else {
                assert!(offer > 0, "only one offer fits");
                continue;
            };
            let store = bench.hub.inner.store.leased_with(reservation);
            for page in 0..32_u8 {
                let mut noise = vec![0; 128 << 10];
                blake3::Hasher::new()
                    .update(&[offer, page])
                    .finalize_xof()
                    .fill(&mut noise);
                let frame =
                    content::frame::Frame::encode(&content::frame::Verified::new(noise.into()));
                match store.put(&frame) {
                    Ok(_) => kept += 1,
                    Err(fault) => assert_eq!(fault.code, Code::NotAllowed, "{fault}"),
                }
            }
        }
        // 4 MiB, and 1 MiB by which the first offer may exceed its totals.
        assert!(
            (32..=40).contains(&kept),
            "{kept} pages of 128 KiB were stored"
        );
    }
}

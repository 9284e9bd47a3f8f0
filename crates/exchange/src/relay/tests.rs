//! Single flight, what is kept, what happens when a source goes away; the source is a list of
//! chunks in memory.

use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;

use parking_lot::Mutex;

use super::*;
use content::frame::Verified;
use content::manifest::ChunkRef;

/// A site that has some chunks on one page, by their index, and counts what it is asked for. It may
/// stand for more than one.
#[derive(Default)]
struct Site {
    chunks: Vec<Verified>,
    /// The sites that have them, the best first.
    holders: Vec<Holder>,
    /// What those of them answer, each time, where the chunks have only arrived.
    arrived_says: Option<Fault>,
    asked: Mutex<Vec<u32>>,
    away: AtomicBool,
    /// What it answers instead of chunks, one after the other.
    faults: Mutex<VecDeque<Fault>>,
    /// Frames that it sends before each fault.
    before_fault: usize,
    delay: Duration,
}

#[async_trait]
impl Upstream for Site {
    async fn sources(&self, _: Digest, but: Option<&SiteName>) -> Result<Vec<Holder>, Fault> {
        assert_ne!(but.map(SiteName::as_str), Some("a"));
        Ok(if self.away.load(Ordering::Relaxed) {
            vec![]
        } else {
            self.holders.clone()
        })
    }

    async fn is_elsewhere(&self, _: Digest, _: Option<&SiteName>) -> Result<bool, Fault> {
        Ok(true)
    }

    async fn ask(
        &self,
        source: &SiteName,
        of: Of,
        wants: Vec<Wanted>,
        _: usize,
        _: &Buffers,
    ) -> Result<Sent, Fault> {
        assert_eq!(
            of.priority, OF.priority,
            "a source is asked as urgently as the hub was"
        );
        let arrived = self
            .holders
            .iter()
            .any(|holder| holder.site == *source && !holder.origin);
        if let Some(fault) = self.arrived_says.as_ref().filter(|_| arrived) {
            return Err(fault.clone());
        }
        let mut out: Vec<Result<Frame, Fault>> = Vec::new();
        for want in wants {
            let Wanted::Children { ranges, .. } = want else {
                unreachable!("chunks only")
            };
            for (first, count) in ranges {
                for index in first..first + count {
                    self.asked.lock().push(index);
                    out.push(Ok(Frame::encode(&self.chunks[index as usize])));
                }
            }
        }
        if let Some(fault) = self.faults.lock().pop_front() {
            out.truncate(self.before_fault);
            out.push(Err(fault));
        }
        let delay = self.delay;
        Ok(stream::iter(out)
            .then(move |frame| async move {
                tokio::time::sleep(delay).await;
                frame.map(|frame| vec![frame])
            })
            .boxed())
    }
}

fn holder(site: &str, origin: bool) -> Holder {
    Holder {
        site: site.parse().unwrap(),
        origin,
    }
}

fn site(count: usize) -> Site {
    let chunk = |i: usize| {
        let mut out = vec![0; 20_000];
        blake3::Hasher::new()
            .update(&i.to_le_bytes())
            .finalize_xof()
            .fill(&mut out);
        Verified::new(out.into())
    };
    Site {
        chunks: (0..count).map(chunk).collect(),
        holders: vec![holder("a", true)],
        before_fault: 1,
        ..Site::default()
    }
}

struct Fixture {
    dir: tempfile::TempDir,
    site: Arc<Site>,
    main: Store,
    relay: Relay,
}

fn fixture(site: Site, budget: u64) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let site = Arc::new(site);
    let main = Store::open(&dir.path().join("store")).unwrap();
    let relay = Relay::open(
        dir.path(),
        main.clone(),
        site.clone(),
        budget,
        &Workers::default(),
    )
    .unwrap();
    Fixture {
        dir,
        site,
        main,
        relay,
    }
}

const OF: Of = Of {
    digest: Hash([1; 32]),
    page: Hash([2; 32]),
    priority: 10,
};

impl Fixture {
    fn children(&self, which: impl IntoIterator<Item = usize>) -> Vec<Child> {
        let child = |i: usize| {
            let chunk = &self.site.chunks[i];
            Child {
                index: i as u32,
                chunk: ChunkRef {
                    id: chunk.id,
                    len: chunk.bytes.len() as u32,
                },
            }
        };
        which.into_iter().map(child).collect()
    }

    /// Asks as site `peer` and checks every frame.
    async fn ask(
        &self,
        peer: &str,
        which: impl IntoIterator<Item = usize>,
    ) -> Result<usize, Fault> {
        let children = self.children(which);
        let mut pieces = self
            .relay
            .frames(&Peer::Site(peer.parse().unwrap()), OF, children.clone())
            .await?;
        let mut bytes = Vec::new();
        while let Some(piece) = pieces.next().await {
            bytes.extend_from_slice(&piece?);
        }
        let mut rest = Bytes::from(bytes);
        for child in &children {
            let header = content::frame::Header::parse(rest.first_chunk().unwrap()).unwrap();
            let frame = Frame::parse(rest.split_to(header.frame_len())).unwrap();
            frame.verify(child.chunk.id, child.chunk.len).unwrap();
        }
        assert!(rest.is_empty());
        Ok(children.len())
    }

    /// Waits until nothing is on its way any more.
    async fn keeps_up(&self) {
        while !self.relay.inner.flights.lock().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn asked(&self) -> Vec<u32> {
        let mut asked = self.site.asked.lock().clone();
        asked.sort_unstable();
        asked
    }
}

#[tokio::test]
async fn many_who_wait_for_one_chunk_are_one_fetch() {
    let f = fixture(
        Site {
            delay: Duration::from_millis(5),
            ..site(40)
        },
        1 << 30,
    );
    // Overlapping and in another order, some before and some while the first is on its way.
    let (one, two, three) = tokio::join!(
        f.ask("b", 0..40),
        f.ask("c", (10..40).step_by(3)),
        f.ask("d", [39, 0, 17, 0])
    );
    assert_eq!((one.unwrap(), two.unwrap(), three.unwrap()), (40, 10, 4));
    assert_eq!(
        f.asked(),
        (0..40).collect::<Vec<u32>>(),
        "each chunk left the source once"
    );
    f.ask("e", 0..40).await.unwrap();
    assert_eq!(f.asked().len(), 40, "what was kept is not asked for again");
    f.keeps_up().await;
}

#[tokio::test]
async fn what_was_flushed_survives_and_the_own_store_is_used() {
    let mut f = fixture(site(10), 1 << 30);
    for chunk in &f.site.chunks[..3] {
        f.main.put(&Frame::encode(chunk)).unwrap();
    }
    f.ask("b", 0..10).await.unwrap();
    assert_eq!(f.asked(), (3..10).collect::<Vec<u32>>());
    f.keeps_up().await;
    f.relay.flush().unwrap();
    drop(f.relay);
    f.relay = Relay::open(
        f.dir.path(),
        f.main.clone(),
        f.site.clone(),
        1 << 30,
        &Workers::default(),
    )
    .unwrap();
    f.ask("c", 0..10).await.unwrap();
    assert_eq!(f.asked().len(), 7);
}

#[tokio::test]
async fn over_budget_chunks_are_passed_on_and_not_stored() {
    let f = fixture(site(20), 100_000);
    f.ask("b", 0..20).await.unwrap();
    f.keeps_up().await;
    assert!(
        f.relay.is_full() && f.relay.kept_bytes() < 300_000,
        "{}",
        f.relay.kept_bytes()
    );
    assert!(f.relay.unkept_bytes() > 100_000);
    f.ask("c", 0..20).await.unwrap();
    assert!(f.asked().len() > 20, "what was not kept is fetched again");
    let freed = f
        .relay
        .evict(|| async { Ok(|_: ShortHash| false) })
        .await
        .unwrap();
    assert!(freed > 0 && !f.relay.is_full());
    f.ask("d", 0..20).await.unwrap();
}

#[tokio::test]
async fn the_rest_is_requested_from_a_source_that_reconnects() {
    let f = fixture(site(10), 1 << 30);
    f.site
        .faults
        .lock()
        .push_back(Fault::unreachable("the line broke"));
    f.ask("b", 0..10).await.unwrap();
    assert_eq!(
        f.asked(),
        [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9],
        "the first had come"
    );
}

#[tokio::test(start_paused = true)]
async fn another_task_waits_for_a_source_that_stays_offline() {
    let f = fixture(site(2), 1 << 30);
    f.site.away.store(true, Ordering::Relaxed);
    let peer = Peer::Site("b".parse().unwrap());
    let fault = f
        .relay
        .ready(&peer, OF.digest, &f.children(0..2))
        .await
        .unwrap_err();
    assert_eq!(
        (fault.reason, fault.retry),
        (Reason::WaitingForSource, Retry::Backoff)
    );
    let fault = f.ask("b", 0..2).await.unwrap_err();
    assert_eq!(
        (fault.reason, fault.retry),
        (Reason::WaitingForSource, Retry::Backoff)
    );
    assert!(
        f.relay.inner.flights.lock().is_empty(),
        "nobody waits for a flight that ended"
    );
    f.site.away.store(false, Ordering::Relaxed);
    f.ask("b", 0..2).await.unwrap();
}

#[tokio::test]
async fn the_fault_of_a_changed_file_reaches_the_requester() {
    let f = fixture(site(4), 1 << 30);
    f.site.faults.lock().push_back(Fault::integrity(
        "/nas/x.png changed after it was published",
    ));
    let fault = f.ask("b", 0..4).await.unwrap_err();
    assert_eq!(
        (fault.code, fault.reason, fault.retry),
        (Code::Integrity, Reason::Integrity, Retry::Never)
    );
    assert!(fault.message.contains("/nas/x.png"), "{fault}");
}

#[tokio::test]
async fn wrong_content_from_a_source_is_rejected() {
    let mut other = site(2);
    let truth = other.chunks[1].clone();
    other.chunks[1] = Verified::new(Bytes::from_static(b"something else"));
    let f = fixture(other, 1 << 30);
    let asked = Child {
        index: 1,
        chunk: ChunkRef {
            id: truth.id,
            len: truth.bytes.len() as u32,
        },
    };
    let fault = f.relay.fetch_and_keep(OF, vec![asked]).await.unwrap_err();
    assert_eq!(fault.code, Code::Integrity);
    assert!(!f.relay.inner.kept.store.has(truth.id).unwrap());
}

/// Chunks that were published at one site and have arrived at another, which always answers this.
fn at_two(origin_first: bool, arrived_says: Fault) -> Fixture {
    let mut holders = vec![holder("a", true), holder("z", false)];
    if !origin_first {
        holders.reverse();
    }
    fixture(
        Site {
            holders,
            arrived_says: Some(arrived_says),
            ..site(4)
        },
        1 << 30,
    )
}

#[tokio::test]
async fn content_that_a_receiving_site_lost_is_fetched_from_its_origin() {
    for origin_first in [true, false] {
        let f = at_two(origin_first, Fault::integrity("/nas/copy.png changed"));
        // The origin's line breaks once, so that both have said why not before it is asked again.
        f.site
            .faults
            .lock()
            .push_back(Fault::unreachable("the line broke"));
        let brought = f.ask("b", 0..4).await;
        assert!(brought.is_ok(), "origin first: {origin_first}: {brought:?}");
    }
}

#[tokio::test]
async fn the_fault_of_a_changed_file_at_the_origin_takes_precedence_over_an_offline_site() {
    for origin_first in [true, false] {
        let f = at_two(origin_first, Fault::unreachable("site z is not connected"));
        f.site.faults.lock().push_back(Fault::integrity(
            "/nas/x.png changed after it was published",
        ));
        let fault = f.ask("b", 0..4).await.unwrap_err();
        assert_eq!(
            (fault.reason, fault.retry),
            (Reason::Integrity, Retry::Never),
            "origin first: {origin_first}"
        );
        assert!(fault.message.contains("/nas/x.png"), "{fault}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_site_where_it_only_arrived_never_has_the_last_word() {
    let alone = Site {
        holders: vec![holder("z", false)],
        arrived_says: Some(Fault::integrity("/nas/copy.png changed")),
        ..site(2)
    };
    let f = fixture(alone, 1 << 30);
    let fault = f.ask("b", 0..2).await.unwrap_err();
    assert_eq!(
        (fault.reason, fault.retry),
        (Reason::WaitingForSource, Retry::Backoff),
        "its origin may come back: {fault}"
    );
}

#[tokio::test]
async fn a_chunk_that_the_hub_lost_is_stored_again_from_another_site() {
    let f = fixture(site(5), 1 << 30);
    let peer = Peer::Site("b".parse().unwrap());
    for chunk in [&f.site.chunks[0], &f.site.chunks[2]] {
        f.main.put(&Frame::encode(chunk)).unwrap();
    }
    let children = f.children(0..4);
    f.site.away.store(true, Ordering::Relaxed);
    assert_eq!(
        f.relay.restore(&peer, OF, &children).await.unwrap(),
        0,
        "no site is there"
    );
    f.site.away.store(false, Ordering::Relaxed);
    assert_eq!(f.relay.restore(&peer, OF, &children).await.unwrap(), 2);
    assert_eq!(f.asked(), [1, 3]);
    for chunk in &f.site.chunks[..4] {
        assert_eq!(f.main.read(chunk.id).unwrap().bytes, chunk.bytes);
    }
    assert!(!f.main.has(f.site.chunks[4].id).unwrap());
    assert_eq!(f.relay.restore(&peer, OF, &children).await.unwrap(), 0);
}

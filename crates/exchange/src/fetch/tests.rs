use tokio::time::Instant;

use super::frames::CHECK_EVERY;
use super::*;
use base::budget::Share;
use base::fault::{Code, Reason};
use base::limits::SILENCE_MAX;
use base::peer::Peer;
use content::chunk::Hash;
use content::frame::Verified;
use transport::Transport;
use transport::testing::Hub;

fn fetcher(link: &Link) -> Fetcher {
    Fetcher::new(link.clone(), Hash::of(b"an artifact"), Arc::default())
}

/// Asks at the site's end, where the hub took the question and says nothing; its end of the line
/// lives as long as this.
async fn ask_in_vain((site, hub): (Link, Link)) {
    let begun = Instant::now();
    let fetcher = fetcher(&site);
    let (answer, _held) = tokio::join!(fetcher.root(), hub.accept());
    let (fault, took, over) = (answer.unwrap_err(), begun.elapsed(), site.transport());
    assert_eq!(
        (fault.code, fault.reason),
        (Code::Unreachable, Reason::HubUnreachable),
        "{over}: {fault}"
    );
    assert!(
        took >= SILENCE_MAX && took < SILENCE_MAX + Duration::from_secs(10),
        "{over}: after {took:?}"
    );
    assert!(
        site.is_closed(),
        "{over}: whoever needs a line has to dial a new one"
    );
}

/// As above, but of the answer a part comes.
async fn ask_and_get_a_part((site, hub): (Link, Link)) {
    let begun = Instant::now();
    let part = async {
        let (mut send, _recv) = hub.accept().await.unwrap();
        let mut noise = vec![0; 60_000];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let frame = Frame::encode(&Verified::new(noise.into())).to_bytes();
        send.write_bytes(frame.slice(..50_000)).await.unwrap();
        std::future::pending::<()>().await;
    };
    let fetcher = fetcher(&site);
    tokio::select! {
        answer = fetcher.root() => assert_eq!(answer.unwrap_err().reason, Reason::HubUnreachable),
        () = part => unreachable!("it waits for ever"),
    }
    let took = begun.elapsed();
    assert!(
        took >= SILENCE_MAX && took < SILENCE_MAX + Duration::from_secs(10),
        "after {took:?}"
    );
}

/// As above, while other streams of the line bring something.
async fn ask_on_a_busy_line((site, hub): (Link, Link)) {
    let busy = async {
        let (mut send, _recv) = hub.open(0).await.unwrap();
        loop {
            send.write_bytes(Bytes::from(vec![0; 1])).await.unwrap();
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
    };
    let read = async {
        let (_send, mut recv) = site.accept().await.unwrap();
        while recv.read_chunk(64 << 10).await.unwrap().is_some() {}
    };
    let fetcher = fetcher(&site);
    tokio::select! {
        (answer, _held) = async { tokio::join!(fetcher.root(), hub.accept()) } => panic!("its turn may still come: {answer:?}"),
        () = busy => {}
        () = read => panic!("the line ended"),
        () = tokio::time::sleep(SILENCE_MAX + 3 * CHECK_EVERY) => assert!(!site.is_closed()),
    }
}

/// As above, and the answer that brings nothing of its own is given up alone.
#[tokio::test(start_paused = true)]
async fn an_answer_without_progress_is_abandoned_while_others_arrive() {
    let hub = Hub::start();
    let (site, hub) = hub.connect(Transport::Quic).await;
    let busy = async {
        let (mut send, _recv) = hub.open(0).await.unwrap();
        loop {
            send.write_bytes(Bytes::from(vec![0; 1 << 10]))
                .await
                .unwrap();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let read = async {
        let (_send, mut recv) = site.accept().await.unwrap();
        while recv.read_chunk(64 << 10).await.unwrap().is_some() {}
    };
    let fetcher = fetcher(&site).with_idle_max(Duration::from_millis(300));
    tokio::select! {
        (answer, _held) = async { tokio::join!(fetcher.root(), hub.accept()) } => {
            assert_eq!(answer.unwrap_err().code, Code::Unreachable);
            assert!(!site.is_closed(), "the line serves others");
        }
        () = busy => {}
        () = read => panic!("the line ended"),
    }
}

/// Both ends answer packets all the while, so neither QUIC nor TCP finds anything wrong.
#[tokio::test(start_paused = true)]
async fn a_connection_without_progress_is_closed_although_it_responds() {
    let hub = Hub::start();
    let (quic, tcp) = (
        hub.connect(Transport::Quic).await,
        hub.connect(Transport::Tcp).await,
    );
    let (part, busy) = (
        hub.connect(Transport::Quic).await,
        hub.connect(Transport::Quic).await,
    );
    tokio::join!(
        ask_in_vain(quic),
        ask_in_vain(tcp),
        ask_and_get_a_part(part),
        ask_on_a_busy_line(busy)
    );
}

/// A library whose content does not arrive: its source is connected and sends nothing of use.
struct Waiting;

#[async_trait::async_trait]
impl Library for Waiting {
    async fn open(&self, _: &Peer, _: Digest) -> Result<Arc<Opened>, Fault> {
        std::future::pending().await
    }

    async fn share(&self, _: &Peer, _: u64, _: i32) -> Result<Share, Fault> {
        unreachable!("nothing is opened")
    }

    async fn page(&self, _: &Opened, _: Hash) -> Result<Bytes, Fault> {
        unreachable!("nothing is opened")
    }

    async fn frames(
        &self,
        _: &Peer,
        _: &Arc<Opened>,
        _: &Wanted,
        _: Vec<Child>,
        _: i32,
    ) -> Result<Pieces, Fault> {
        unreachable!("nothing is opened")
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_waits_for_its_source_ends_before_the_connection_is_closed() {
    let hub = Hub::start();
    for transport in [Transport::Quic, Transport::Tcp] {
        let (site, hub) = hub.connect(transport).await;
        let serve = async {
            let (send, mut recv) = hub.accept().await.unwrap();
            recv.read_exact(&mut [0]).await.unwrap();
            let peer = Peer::Site("east".parse().unwrap());
            serve(send, recv, &hub, &peer, &Waiting).await;
        };
        let fetcher = fetcher(&site);
        let (answer, ()) = tokio::join!(fetcher.root(), serve);
        assert_eq!(answer.unwrap_err().reason, Reason::WaitingForSource);
        assert!(
            !site.is_closed(),
            "{transport:?}: the connection serves others"
        );
    }
}

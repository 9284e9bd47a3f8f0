//! Tests of who may enter, and of the end of connections of a peer that may not any more.

use std::time::Duration;

use base::fault::Code;
use base::workers::Workers;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::testing::{Hub, MEMORY, loopback, name, settings, site_of};
use crate::*;

const BOTH: [Transport; 2] = [Transport::Quic, Transport::Tcp];

/// A gate whose answer the test sets, and which records what it was asked.
struct TestGate {
    verdict: Mutex<Verdict>,
    asked: Mutex<Vec<(Peer, Certificate)>>,
}

#[async_trait::async_trait]
impl Gate for TestGate {
    async fn admit(&self, who: &Peer, certificate: &Certificate) -> Verdict {
        self.asked.lock().push((who.clone(), certificate.clone()));
        self.verdict.lock().clone()
    }
}

fn gated(verdict: Verdict) -> (Hub, Arc<TestGate>) {
    let gate = Arc::new(TestGate {
        verdict: Mutex::new(verdict),
        asked: Mutex::default(),
    });
    let guard = gate.clone();
    let hub = Hub::start_with(|identity| {
        let line = settings(Transport::Auto);
        Listener::bind(
            loopback(),
            identity,
            guard,
            &line,
            128 << 20,
            &Workers::default(),
        )
    });
    (hub, gate)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_gate_decides_before_the_welcome_and_the_peer_learns_why() {
    let (hub, gate) = gated(Verdict::Welcome);
    let site = site_of(&hub.identity, "chengdu");
    let who = Peer::Site(name("chengdu"));
    let cases = [
        (
            Verdict::Refused(format!("site chengdu {REVOKED} on Monday")),
            Code::NotAllowed,
            "rejected this site: site chengdu was revoked at the hub on Monday",
            "packhorse site restore NAME",
        ),
        (
            Verdict::Refused("a newer certificate was issued".into()),
            Code::NotAllowed,
            "a newer certificate was issued",
            "join again",
        ),
        (
            Verdict::Busy("the disk is slow".into()),
            Code::Unreachable,
            "the disk is slow",
            "",
        ),
    ];
    for transport in BOTH {
        for (verdict, code, message, next) in &cases {
            *gate.verdict.lock() = verdict.clone();
            let fault = dial(&hub.address, &site, &settings(transport), MEMORY)
                .await
                .unwrap_err();
            assert!(
                fault.code == *code && fault.message.contains(message),
                "{fault}"
            );
            assert!(fault.next.contains(next), "{}", fault.next);
        }
        *gate.verdict.lock() = Verdict::Welcome;
        let wanted = settings(transport);
        let (link, (arrived, at_hub, _)) =
            tokio::join!(dial(&hub.address, &site, &wanted, MEMORY), hub.next_site());
        assert!(arrived == name("chengdu") && !link.unwrap().is_for_renewal());
        let serial = &at_hub.certificate().unwrap().serial;
        assert_eq!(*serial, site.serial().unwrap());
    }
    let asked = gate.asked.lock().clone();
    assert!(asked.len() >= 2 * (cases.len() + 1));
    let certificate = Certificate {
        serial: site.serial().unwrap(),
        expired: None,
    };
    assert!(
        asked
            .iter()
            .all(|of| *of == (who.clone(), certificate.clone())),
        "{asked:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_certificate_that_is_admitted_is_for_a_renewal_only() {
    let (hub, gate) = gated(Verdict::Welcome);
    let day = Duration::from_secs(86_400);
    let now = Duration::from_millis(base::clock::now_unix_ms());
    let request = identity::CertificateRequest::new().unwrap();
    let lifetime = (now - 3 * day, now - 2 * day);
    let cert = hub
        .identity
        .issue_between(&name("chengdu"), request.csr_der(), lifetime)
        .unwrap();
    let expired = request.complete(&cert, hub.identity.ca_der()).unwrap();
    for transport in BOTH {
        *gate.verdict.lock() = Verdict::Welcome;
        let wanted = settings(transport);
        let (link, (_, at_hub, _)) = tokio::join!(
            dial(&hub.address, &expired, &wanted, MEMORY),
            hub.next_site()
        );
        assert!(link.unwrap().is_for_renewal() && at_hub.is_for_renewal());
        let until = at_hub.certificate().unwrap().expired.unwrap();
        assert_eq!(until.as_second(), (now - 2 * day).as_secs() as i64);
        *gate.verdict.lock() = Verdict::Expired;
        let fault = dial(&hub.address, &expired, &settings(transport), MEMORY)
            .await
            .unwrap_err();
        assert!(fault.message.contains("has expired"), "{fault}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_connections_of_a_peer_are_closed_and_no_others() {
    let hub = Hub::start();
    let (old, new) = (
        site_of(&hub.identity, "chengdu"),
        site_of(&hub.identity, "chengdu"),
    );
    let other = site_of(&hub.identity, "xian");
    let mut links = Vec::new();
    for transport in BOTH {
        for site in [&old, &new, &other] {
            let wanted = settings(transport);
            let (link, (_, at_hub, _)) =
                tokio::join!(dial(&hub.address, site, &wanted, MEMORY), hub.next_site());
            links.push((link.unwrap(), at_hub));
        }
    }
    let who = Peer::Site(name("chengdu"));
    let limit = Duration::from_secs(1);
    let serial = new.serial().unwrap();
    assert_eq!(
        hub.listener.disconnect(&who, Some(&serial), "an older one"),
        2
    );
    for (at, (link, _)) in links.iter().enumerate() {
        if at % 3 == 0 {
            let closed = tokio::time::timeout(limit, link.closed()).await;
            assert_eq!(closed.unwrap(), "an older one");
            assert_eq!(link.refusal().as_deref(), Some("an older one"));
        } else {
            assert!(!link.is_closed(), "{at}");
        }
    }
    assert_eq!(hub.listener.disconnect(&who, None, "revoked"), 2);
    for (at, (link, at_hub)) in links.iter().enumerate() {
        if at % 3 == 1 {
            let closed = tokio::time::timeout(limit, link.closed()).await;
            assert_eq!(closed.unwrap(), "revoked");
            assert!(at_hub.open(PRIORITY_BULK).await.is_err());
        } else {
            assert_eq!(link.is_closed(), at % 3 == 0, "{at}");
        }
    }
    assert_eq!(hub.listener.disconnect(&who, None, "revoked"), 0);
}

/// A peer behind a path that takes nothing: the kernel of the hub holds bytes for it, and would send
/// them as soon as the path takes them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_kernel_holds_for_a_severed_peer_is_discarded() {
    let hub = Hub::start();
    let middle = TcpListener::bind(loopback()).await.unwrap();
    let address = middle.local_addr().unwrap().to_string();
    let (stop, to_hub) = (CancellationToken::new(), hub.address.clone());
    let stopped = stop.clone();
    let middle = tokio::spawn(async move {
        let (site, _) = middle.accept().await.unwrap();
        let hub = TcpStream::connect(to_hub).await.unwrap();
        let (mut from_site, mut to_site) = site.into_split();
        let (mut from_hub, mut to_hub) = hub.into_split();
        let both = async {
            let (a, b) = tokio::join!(
                tokio::io::copy(&mut from_site, &mut to_hub),
                tokio::io::copy(&mut from_hub, &mut to_site)
            );
            drop((a, b));
        };
        stopped.run_until_cancelled(both).await;
        from_hub.reunite(to_hub).unwrap()
    });
    let site = site_of(&hub.identity, "chengdu");
    let wanted = settings(Transport::Tcp);
    let (link, (_, at_hub, _)) =
        tokio::join!(dial(&address, &site, &wanted, MEMORY), hub.next_site());
    let link = link.unwrap();
    let reader = tokio::spawn(async move {
        while let Some((_, mut recv)) = link.accept().await {
            while let Ok(Some(_)) = recv.read_chunk(1 << 16).await {}
        }
    });
    // More streams than the kernels of both ends hold windows.
    for _ in 0..32 {
        let (mut send, recv) = at_hub.open(PRIORITY_BULK).await.unwrap();
        tokio::spawn(async move {
            let data = vec![0; 1 << 16];
            while send.write_all(&data).await.is_ok() {}
            drop(recv);
        });
    }
    while at_hub.bytes().0 < 16 << 20 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    stop.cancel();
    let stalled = middle.await.unwrap();
    // Until the hub can write nothing more.
    let mut sent = 0;
    while at_hub.bytes().0 > sent {
        sent = at_hub.bytes().0;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    hub.listener
        .disconnect(&Peer::Site(name("chengdu")), None, "revoked");
    let began = std::time::Instant::now();
    let reset = loop {
        match socket2::SockRef::from(&stalled).take_error().unwrap() {
            Some(error) => break error,
            None => tokio::time::sleep(Duration::from_millis(10)).await,
        }
        assert!(
            began.elapsed() < Duration::from_secs(1),
            "the kernel goes on"
        );
    };
    assert_eq!(reset.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(at_hub.is_closed() && at_hub.bytes().0 <= sent + (1 << 20));
    reader.abort();
}

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::io::AsyncWriteExt;

use super::*;
use crate::identity::{
    CertificateRequest, Claim, HubIdentity, JoinToken, Redeemer, Serial, SiteIdentity,
};
use crate::testing::{Hub, MEMORY, loopback, name, settings, site_of};
use crate::{Congestion, Transport};
use base::fault::Code;
use base::names::SiteName;
use base::peer::Peer;

impl Hub {
    fn serve_joins(&self, tokens: Arc<Tokens>) {
        let listener = self.listener.clone();
        tokio::spawn(async move {
            while let Some(arrival) = listener.accept().await {
                if let Arrival::Join(request) = arrival {
                    let _ = request.redeem(&*tokens).await;
                }
            }
        });
    }
}

/// A minimal token store of a hub.
#[derive(Default)]
struct Tokens(Mutex<HashMap<String, Stored>>);

/// The hash, the site, and whether the token was used.
type Stored = ([u8; 32], SiteName, bool);

impl Tokens {
    fn make(&self, hub: &HubIdentity, site: &str) -> JoinToken {
        let token = JoinToken::generate(hub);
        self.0
            .lock()
            .insert(token.id().into(), (token.secret_hash(), name(site), false));
        token
    }
}

#[async_trait::async_trait]
impl Redeemer for Tokens {
    async fn redeem(
        &self,
        id: &str,
        secret_hash: &[u8; 32],
        claim: &Claim,
        _key_hash: &[u8; 32],
    ) -> Result<(Peer, Serial), Fault> {
        match self.0.lock().get_mut(id) {
            Some((hash, bound, used)) if hash == secret_hash => {
                match claim {
                    Claim::Site(site) if site == bound => {}
                    Claim::Site(site) => {
                        return Err(Fault::not_allowed(format!(
                            "the token is for site {bound}, not for {site}"
                        )));
                    }
                    Claim::Publisher => {
                        return Err(Fault::not_allowed(format!("the token is for site {bound}")));
                    }
                }
                if std::mem::replace(used, true) {
                    return Err(Fault::not_allowed("the token was used before"));
                }
                let serial = Serial::next(None, base::clock::now_unix_ms());
                Ok((Peer::Site(bound.clone()), serial))
            }
            _ => Err(Fault::not_allowed("the token is not known here")),
        }
    }
}

const BOTH: [Transport; 2] = [Transport::Quic, Transport::Tcp];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_joins_once_and_then_connects() {
    let hub = Hub::start();
    for transport in BOTH {
        let hub_line = settings(transport);
        let tokens = Arc::new(Tokens::default());
        let token = tokens.make(&hub.identity, "chengdu");
        let claim = Claim::Site(name("chengdu"));
        let request = async {
            match hub.listener.accept().await {
                Some(Arrival::Join(request)) => {
                    assert_eq!(
                        (request.token_id(), request.claim()),
                        (token.id(), &Claim::Site(name("chengdu")))
                    );
                    request.redeem(&*tokens).await
                }
                _ => unreachable!("no join request"),
            }
        };
        let (joined, answered) = tokio::join!(
            join(
                &hub.address,
                &token,
                &claim,
                &hub_line,
                CertificateRequest::new().unwrap()
            ),
            request
        );
        let site = joined.unwrap();
        assert_eq!(
            (site.holder(), &answered.unwrap()),
            (&Peer::Site(name("chengdu")), &Peer::Site(name("chengdu")))
        );
        assert_eq!(
            hub.identity.verify_site(site.cert_der()).unwrap(),
            name("chengdu")
        );

        let (link, (arrived, hub_end, _)) = tokio::join!(
            dial(&hub.address, &site, &hub_line, MEMORY),
            hub.next_site()
        );
        let link = link.unwrap();
        assert_eq!(arrived, name("chengdu"));
        assert_eq!(link.peer(), Some(&Peer::Hub(name("hub"))));
        assert_eq!(hub_end.peer(), Some(&Peer::Site(name("chengdu"))));
        assert_eq!(
            (link.transport(), hub_end.transport()),
            if transport == Transport::Tcp {
                ("tcp", "tcp")
            } else {
                ("quic", "quic")
            }
        );
        assert!(link.rtt() < Duration::from_secs(1));

        let (mut send, mut recv) = link.open(PRIORITY_CONTROL).await.unwrap();
        send.write_all(b"what should i store?").await.unwrap();
        send.finish().unwrap();
        let (mut answer, mut question) = hub_end.accept().await.unwrap();
        assert_eq!(
            question.read_to_end(100).await.unwrap(),
            b"what should i store?"
        );
        answer
            .write_bytes(Bytes::from_static(b"nothing"))
            .await
            .unwrap();
        answer.finish().unwrap();
        let mut buffer = [0; 7];
        recv.read_exact(&mut buffer).await.unwrap();
        assert_eq!(&buffer, b"nothing");
        assert_eq!(recv.read_chunk(10).await.unwrap(), None);
        assert_eq!(
            recv.read_exact(&mut buffer).await.unwrap_err().code,
            Code::Unreachable
        );
        let ((sent, received), (hub_sent, _)) = (link.bytes(), hub_end.bytes());
        assert!(sent > 100 && received > 100 && hub_sent > 100);
        link.close("done");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_tokens_are_rejected_with_a_reason() {
    let (hub, other) = (Hub::start(), Hub::start());
    let tokens = Arc::new(Tokens::default());
    hub.serve_joins(tokens.clone());
    for transport in BOTH {
        let wanted = settings(transport);
        let token = tokens.make(&hub.identity, "chengdu");

        let fault = join(
            &hub.address,
            &token,
            &Claim::Site(name("xian")),
            &wanted,
            CertificateRequest::new().unwrap(),
        )
        .await
        .unwrap_err();
        assert_eq!(
            (fault.code, fault.message.as_str()),
            (
                Code::NotAllowed,
                "the token is for site chengdu, not for xian"
            )
        );
        // The failed attempt did not use the token.
        join(
            &hub.address,
            &token,
            &Claim::Site(name("chengdu")),
            &wanted,
            CertificateRequest::new().unwrap(),
        )
        .await
        .unwrap();
        let fault = join(
            &hub.address,
            &token,
            &Claim::Site(name("chengdu")),
            &wanted,
            CertificateRequest::new().unwrap(),
        )
        .await
        .unwrap_err();
        assert_eq!(
            (fault.code, fault.message.as_str()),
            (Code::NotAllowed, "the token was used before")
        );

        let unknown = JoinToken::generate(&hub.identity);
        let fault = join(
            &hub.address,
            &unknown,
            &Claim::Site(name("chengdu")),
            &wanted,
            CertificateRequest::new().unwrap(),
        )
        .await
        .unwrap_err();
        assert_eq!(
            (fault.code, fault.message.as_str()),
            (Code::NotAllowed, "the token is not known here")
        );

        // A token of another hub: the secret is never sent.
        let foreign = tokens.make(&other.identity, "chengdu");
        let fault = join(
            &hub.address,
            &foreign,
            &Claim::Site(name("chengdu")),
            &wanted,
            CertificateRequest::new().unwrap(),
        )
        .await
        .unwrap_err();
        assert_eq!(fault.code, Code::NotAllowed, "{fault}");
        assert!(
            fault.message.contains("did not create this token"),
            "{fault}"
        );
        assert!(!tokens.0.lock()[foreign.id()].2);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_of_another_ca_are_refused_on_both_sides() {
    let (hub, other) = (Hub::start(), Hub::start());
    for transport in BOTH {
        let wanted = settings(transport);
        // The site trusts only its own hub.
        let other_site = site_of(&other.identity, "chengdu");
        let fault = dial(&hub.address, &other_site, &wanted, MEMORY)
            .await
            .unwrap_err();
        assert_eq!(fault.code, Code::NotAllowed, "{fault}");
        assert!(fault.message.contains("was rejected"), "{fault}");

        // A site that trusts this hub but has a certificate of another hub.
        let site = site_of(&hub.identity, "chengdu");
        let mut tls = tls::client(&site).unwrap();
        let forged = rustls::sign::CertifiedKey::from_der(
            other_site.chain(),
            other_site.key(),
            tls.crypto_provider(),
        )
        .unwrap();
        tls.client_auth_cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(forged));
        let fault = dial::call_for_test(&hub.address, tls, &wanted)
            .await
            .unwrap_err();
        assert_eq!(fault.code, Code::NotAllowed, "{fault}");
        assert!(fault.message.contains("rejected this site"), "{fault}");

        // A site without a certificate.
        let mut tls = tls::joining_client(hub.identity.ca_hash()).unwrap();
        tls.alpn_protocols = vec![tls::ALPN.to_vec()];
        let fault = dial::call_for_test(&hub.address, tls, &wanted)
            .await
            .unwrap_err();
        assert_eq!(fault.code, Code::NotAllowed, "{fault}");
        assert!(
            fault.message.contains("no certificate was presented"),
            "{fault}"
        );

        // A hub certificate must not work as a site certificate, nor the reverse.
        let mut tls = tls::client(&site).unwrap();
        let hubs = rustls::sign::CertifiedKey::from_der(
            hub.identity.chain(),
            hub.identity.key(),
            tls.crypto_provider(),
        )
        .unwrap();
        tls.client_auth_cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(hubs));
        let fault = dial::call_for_test(&hub.address, tls, &wanted)
            .await
            .unwrap_err();
        assert_eq!(fault.code, Code::NotAllowed, "{fault}");
    }
    // An accepted connection would have arrived before this one.
    let site = site_of(&hub.identity, "honest");
    let wanted = settings(Transport::Quic);
    let (dialled, (first, ..)) =
        tokio::join!(dial(&hub.address, &site, &wanted, MEMORY), hub.next_site());
    dialled.unwrap();
    assert_eq!(first, name("honest"), "a connection was accepted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_certificate_is_rejected_with_both_clocks() {
    let hub = Hub::start();
    let day = Duration::from_secs(86400);
    let now = Duration::from_millis(base::clock::now_unix_ms());
    let site_between = |from, until| {
        let request = CertificateRequest::new().unwrap();
        let cert = hub
            .identity
            .issue_between(&name("chengdu"), request.csr_der(), (from, until))
            .unwrap();
        request.complete(&cert, hub.identity.ca_der()).unwrap()
    };
    let expired = site_between(now - 3 * day, now - 2 * day);
    // The certificate begins in the future. The hub never issues such certificates, so its clock
    // was set back, and the site is not rejected.
    let early = site_between(now + day, now + 2 * day);
    assert!(early.needs_renewal());
    for transport in BOTH {
        let fault = dial(&hub.address, &expired, &settings(transport), MEMORY)
            .await
            .unwrap_err();
        assert!(
            fault.code == Code::NotAllowed
                && fault.message.contains("has expired")
                && fault.message.contains("clock of the hub"),
            "{fault}"
        );
        assert!(
            fault.next.contains("join again"),
            "both clocks show the same time: {}",
            fault.next
        );
        let wanted = settings(transport);
        let (link, (arrived, ..)) =
            tokio::join!(dial(&hub.address, &early, &wanted, MEMORY), hub.next_site());
        assert_eq!(arrived, name("chengdu"));
        assert_eq!(clock_difference(&link.unwrap()), None);
    }
}

#[test]
fn a_wrong_clock_is_reported_without_advice_to_join_again() {
    let reason = "the certificate of site a has expired: it ended at 2027-01-01T00:00:00.000Z, and the clock of the hub shows 2027-06-01T00:00:00.000Z";
    let ended = Ended::by_peer(CLOSE_CLOCK, reason.as_bytes());
    let fault = dial::refusal_for_test(&ended, "hub:7443");
    assert!(
        fault.message.contains(reason)
            && fault
                .message
                .contains("the clock of this machine differs by"),
        "{fault}"
    );
    assert!(
        fault.next.contains("NTP")
            && fault.next.contains("automatically")
            && !fault.next.contains("join"),
        "{}",
        fault.next
    );
}

/// Waits until the hub has closed this number of connections.
async fn wait_closed(sockets: &mut [tokio::net::TcpStream], wanted: usize) {
    use tokio::io::AsyncReadExt as _;
    let all = async {
        let mut reads: futures::stream::FuturesUnordered<_> = sockets
            .iter_mut()
            .map(|socket| async { socket.read(&mut [0; 1]).await.unwrap_or(0) })
            .collect();
        for _ in 0..wanted {
            assert_eq!(
                futures::StreamExt::next(&mut reads).await,
                Some(0),
                "the hub sends nothing to an unauthenticated peer"
            );
        }
    };
    tokio::time::timeout(Duration::from_secs(20), all)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connections_block_no_other_peer() {
    let hub = Hub::start();
    let tokens = Arc::new(Tokens::default());
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(tokio::net::TcpStream::connect(&hub.address).await.unwrap());
    }
    // From the same address, over both transports, and also a new site.
    let links = [
        hub.connect(Transport::Tcp).await,
        hub.connect(Transport::Quic).await,
    ];
    let token = tokens.make(&hub.identity, "wuhan");
    hub.serve_joins(tokens);
    join(
        &hub.address,
        &token,
        &Claim::Site(name("wuhan")),
        &settings(Transport::Tcp),
        CertificateRequest::new().unwrap(),
    )
    .await
    .unwrap();
    wait_closed(
        &mut silent,
        300 - base::limits::CONNECTION_HANDSHAKES_PER_ADDRESS_MAX,
    )
    .await;
    assert!(
        links
            .iter()
            .all(|(site, hub)| !site.is_closed() && !hub.is_closed())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_sites_behind_one_address_can_connect_at_once() {
    const SITES: usize = 40;
    let hub = Hub::start();
    let sites: Vec<SiteIdentity> = (0..SITES)
        .map(|n| site_of(&hub.identity, &format!("s{n}")))
        .collect();
    let wanted = settings(Transport::Quic);
    let dialled = futures::future::join_all(
        sites
            .iter()
            .map(|site| dial(&hub.address, site, &wanted, MEMORY)),
    );
    let arrived = async {
        let mut links = Vec::new();
        while links.len() < SITES {
            links.push(hub.next_site().await);
        }
        links
    };
    let (dialled, _arrived) = tokio::join!(dialled, arrived);
    // With the first attempt: no connection was evicted.
    let refused: Vec<String> = dialled
        .iter()
        .filter_map(|link| Some(link.as_ref().err()?.to_string()))
        .collect();
    assert!(refused.is_empty(), "{refused:?}");
}

/// Opens streams that nobody accepts and writes to each as long as possible.
fn send_unasked(link: &Link, streams: usize) -> tokio::task::JoinHandle<()> {
    let link = link.clone();
    tokio::spawn(async move {
        let writers = (0..streams).map(|_| async {
            let (mut send, _recv) = link.open(PRIORITY_BULK).await?;
            for _ in 0..16 {
                send.write_bytes(vec![7; 64 << 10].into()).await?;
            }
            std::future::pending::<Result<(), Fault>>().await
        });
        futures::future::join_all(writers).await;
    })
}

#[tokio::test(start_paused = true)]
async fn unrequested_data_fills_only_a_small_window() {
    let hub = Hub::start();
    let (site, at_hub) = hub.connect(Transport::Quic).await;
    let sender = send_unasked(&site, 64);
    let received = || at_hub.bytes().1;
    // It sends 64 MiB. The clock advances only when no end can send or receive any more.
    let _ = tokio::time::timeout(Duration::from_secs(2), at_hub.closed()).await;
    assert!(
        !at_hub.is_closed() && received() < 10 << 20,
        "{} bytes",
        received()
    );
    // While the hub requests something, the window is larger.
    let want = at_hub.want();
    let more = async {
        while received() < 12 << 20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), more)
        .await
        .unwrap();
    let _ = tokio::time::timeout(Duration::from_secs(1), at_hub.closed()).await;
    assert!(received() < 24 << 20, "{} bytes", received());
    drop(want);
    sender.abort();
}

#[tokio::test(start_paused = true)]
async fn a_slow_handshake_has_a_deadline() {
    let hub = Hub::start();
    let stream = tokio::net::TcpStream::connect(&hub.address).await.unwrap();
    let (mut read, mut write) = stream.into_split();
    // The head of a TLS record of 512 bytes, sent byte by byte with pauses.
    write
        .write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252])
        .await
        .unwrap();
    let trickle = async {
        while write.write_all(&[0]).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let mut answer = Vec::new();
    let closed = tokio::io::AsyncReadExt::read_to_end(&mut read, &mut answer);
    let both = async {
        tokio::select! { () = trickle => {} _ = closed => {} }
    };
    tokio::time::timeout(base::limits::CONNECTION_TLS_MAX * 2, both)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publisher_has_a_bounded_number_of_connections() {
    let hub = Hub::start();
    let request = CertificateRequest::new().unwrap();
    let cert = hub
        .identity
        .issue_as(
            &Peer::Publisher("pub".parse().unwrap()),
            request.csr_der(),
            &Serial::next(None, 1),
        )
        .unwrap();
    let publisher = request.complete(&cert, hub.identity.ca_der()).unwrap();
    let mut links = Vec::new();
    for n in 0..base::limits::CONNECTIONS_PER_PUBLISHER_MAX {
        let wanted = settings(BOTH[n % 2]);
        let (link, arrival) = tokio::join!(
            dial(&hub.address, &publisher, &wanted, MEMORY),
            hub.listener.accept()
        );
        assert!(matches!(arrival, Some(Arrival::Publisher { .. })));
        links.push((link.unwrap(), arrival));
    }
    for transport in BOTH {
        let fault = dial(&hub.address, &publisher, &settings(transport), MEMORY)
            .await
            .unwrap_err();
        assert!(
            fault.code == Code::Unreachable
                && fault.message.contains("publisher pub has 16 connections"),
            "the peer may retry: {fault}"
        );
        hub.connect(transport).await;
    }
    drop(links.pop());
    let again = async {
        while let Err(fault) =
            dial(&hub.address, &publisher, &settings(Transport::Quic), MEMORY).await
        {
            assert_eq!(fault.code, Code::Unreachable, "{fault}");
        }
    };
    tokio::time::timeout(Duration::from_secs(10), again)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_streams_keep_their_bytes_separate() {
    const STREAMS: u64 = 64;
    const BYTES: usize = 3 << 20;
    /// Bytes that depend on the stream and the position.
    fn content(stream: u64) -> Bytes {
        let mut bytes = vec![0; BYTES];
        blake3::Hasher::new()
            .update(&stream.to_be_bytes())
            .finalize_xof()
            .fill(&mut bytes);
        bytes.into()
    }
    let hub = Hub::start();
    for transport in BOTH {
        let (site_end, hub_end) = hub.connect(transport).await;
        tokio::spawn(async move {
            while let Some((mut send, mut recv)) = hub_end.accept().await {
                tokio::spawn(async move {
                    let mut pieces = vec![Bytes::new(); 32];
                    while let Some(count) = recv.read_chunks(&mut pieces).await.unwrap() {
                        for piece in &mut pieces[..count] {
                            send.write_bytes(std::mem::take(piece)).await.unwrap();
                        }
                    }
                    send.finish().unwrap();
                });
            }
        });
        let echoes = (0..STREAMS).map(|n| {
            let link = site_end.clone();
            tokio::spawn(async move {
                let sent = content(n);
                let (mut send, mut recv) = link.open((n % 3) as i32).await.unwrap();
                let writing = async {
                    for piece in sent.chunks(100_000) {
                        send.write_bytes(sent.slice_ref(piece)).await.unwrap();
                    }
                    send.finish().unwrap();
                };
                let reading = async {
                    let mut at = 0;
                    while let Some(bytes) = recv.read_chunk(70_001).await.unwrap() {
                        assert_eq!(bytes, sent[at..at + bytes.len()], "stream {n} at {at}");
                        at += bytes.len();
                    }
                    assert_eq!(at, BYTES, "stream {n}");
                };
                tokio::join!(writing, reading);
            })
        });
        for echo in futures::future::join_all(echoes).await {
            echo.unwrap();
        }
        let (sent, received) = site_end.bytes();
        let moved = STREAMS * BYTES as u64;
        assert!(
            sent > moved && received > moved && sent < moved * 5 / 4,
            "{sent} {received}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unread_stream_does_not_block_others() {
    let hub = Hub::start();
    for transport in [Transport::Quic, Transport::Tcp] {
        let (site_end, hub_end) = hub.connect(transport).await;
        // More than its window holds, with the highest priority.
        let (mut unread, _recv) = hub_end.open(PRIORITY_CONTROL).await.unwrap();
        let stuck =
            tokio::spawn(async move { unread.write_bytes(Bytes::from(vec![1; 4 << 20])).await });
        let _unread = site_end.accept().await.unwrap();
        let (mut send, _recv) = hub_end.open(PRIORITY_BULK).await.unwrap();
        let write = async {
            for _ in 0..16 {
                send.write_bytes(Bytes::from(vec![2; 1 << 20]))
                    .await
                    .unwrap();
            }
            send.finish().unwrap();
        };
        let read = async {
            let (_send, mut recv) = site_end.accept().await.unwrap();
            recv.read_to_end(16 << 20).await.unwrap().len()
        };
        let both = async { tokio::join!(write, read) };
        let ((), came) = tokio::time::timeout(Duration::from_secs(20), both)
            .await
            .expect("the transfer continues");
        assert_eq!(came, 16 << 20, "{}", site_end.transport());
        // On TCP a complete piece is queued.
        assert!(stuck.is_finished() == (transport == Transport::Tcp));
        stuck.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn tcp_is_used_while_udp_is_blocked_and_quic_later() {
    // Its packets are received, but nobody answers.
    let mut hole = None;
    let hub = Hub::start_with(|identity| {
        let (listener, udp) =
            Listener::bind_tcp_only(loopback(), identity, &settings(Transport::Auto))?;
        hole = Some(udp);
        Ok(listener)
    });
    let site = site_of(&hub.identity, "chengdu");
    let wanted = settings(Transport::Auto);
    let begun = tokio::time::Instant::now();
    let (link, (_, hub_end, _)) =
        tokio::join!(dial(&hub.address, &site, &wanted, MEMORY), hub.next_site());
    let took = begun.elapsed();
    let link = link.unwrap();
    assert_eq!((link.transport(), hub_end.transport()), ("tcp", "tcp"));
    assert!(
        took >= Duration::from_secs(4) && took < Duration::from_secs(8),
        "{took:?}"
    );
    let fault = probe(Transport::Quic, &hub.address, &site, &wanted, MEMORY)
        .await
        .unwrap_err();
    assert_eq!(
        (fault.code, fault.reason),
        (Code::Unreachable, Reason::HubUnreachable)
    );

    // UDP works again.
    let hole = hole.unwrap();
    hole.set_nonblocking(true).unwrap();
    while hole.recv(&mut [0; 2000]).is_ok() {}
    let tls = tls::server(&hub.identity).unwrap();
    let (endpoint, config) = quic::listen(hole, tls, [0; 32]).unwrap();
    let choice = congestion::Choice::new(Congestion::Auto);
    let welcome = async {
        // The close message of the cancelled attempt may come first.
        let connection = loop {
            if let Ok(connection) =
                quic::accept(endpoint.accept().await.unwrap(), &config, &choice).await
            {
                break connection;
            }
        };
        let endpoint = None;
        let send_room = quic::SendRoom::keep(connection.clone(), choice.pace(), || MEMORY, ());
        let link = Link::new(
            Wire::Quic {
                connection,
                endpoint,
                choice,
                send_room,
            },
            None,
            loopback(),
        );
        let (mut send, _) = link.open(0).await.unwrap();
        let welcome = hello::Welcome {
            hub: name("hub"),
            time_ms: base::clock::now_unix_ms(),
            manifest_format: 1,
            renew_only: false,
        };
        hello::send(&mut send, &welcome).await.unwrap();
        link
    };
    let (moved, _held) = tokio::join!(
        probe(Transport::Quic, &hub.address, &site, &wanted, MEMORY),
        welcome
    );
    assert_eq!(moved.unwrap().transport(), "quic");
    assert!(!link.is_closed());
}

#[tokio::test(start_paused = true)]
async fn a_missing_hub_is_unreachable() {
    let hub = Hub::start();
    let site = site_of(&hub.identity, "chengdu");
    let token = JoinToken::generate(&hub.identity);
    // A socket that does not listen: a connection is refused, and no other program takes the port.
    let silent = tokio::net::TcpSocket::new_v4().unwrap();
    silent.bind(loopback()).unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let fault = dial(&address, &site, &settings(Transport::Auto), MEMORY)
        .await
        .unwrap_err();
    assert_eq!(
        (fault.code, fault.code.exit(), fault.reason),
        (Code::Unreachable, 10, Reason::HubUnreachable)
    );
    assert!(
        fault.message.contains("QUIC") && fault.message.contains("TCP"),
        "{fault}"
    );
    let fault = join(
        &address,
        &token,
        &Claim::Site(name("chengdu")),
        &settings(Transport::Tcp),
        CertificateRequest::new().unwrap(),
    )
    .await
    .unwrap_err();
    assert_eq!(fault.code, Code::Unreachable, "{fault}");
    let fault = dial(
        "hub.invalid:7443",
        &site,
        &settings(Transport::Auto),
        MEMORY,
    )
    .await
    .unwrap_err();
    assert_eq!(fault.code, Code::Unreachable, "{fault}");
    for bad in ["hub", ":7443", "hub:", "hub:port", ""] {
        assert_eq!(
            dial(bad, &site, &settings(Transport::Auto), MEMORY)
                .await
                .unwrap_err()
                .code,
            Code::Config,
            "{bad}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_end_closes_with_a_reason() {
    let hub = Hub::start();
    for transport in BOTH {
        let (site_end, hub_end) = hub.connect(transport).await;
        let (_send, mut recv) = site_end.open(0).await.unwrap();
        hub_end.close("the hub is stopping\u{1b}[31m");
        assert_eq!(site_end.closed().await, "the hub is stopping?[31m");
        assert_eq!(hub_end.closed().await, "the hub is stopping?[31m");
        let fault = recv.read_chunk(1).await.unwrap_err();
        assert_eq!(
            (fault.code, fault.reason),
            (Code::Unreachable, Reason::HubUnreachable)
        );
        assert_eq!(
            fault.message,
            "the connection to hub hub is closed: the hub is stopping?[31m"
        );
        assert!(site_end.accept().await.is_none());
        assert_eq!(
            hub_end.open(0).await.err().unwrap().reason,
            Reason::SiteOffline
        );

        // The connection also ends when its handle is dropped.
        let (site_end, hub_end) = hub.connect(transport).await;
        drop(site_end);
        assert_eq!(hub_end.closed().await, "no longer used");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_halves_are_not_normal_ends() {
    let hub = Hub::start();
    for transport in BOTH {
        let (site_end, hub_end) = hub.connect(transport).await;
        let (mut send, recv) = site_end.open(0).await.unwrap();
        send.write_all(b"half").await.unwrap();
        let (mut answer, mut question) = hub_end.accept().await.unwrap();
        let mut half = [0; 4];
        question.read_exact(&mut half).await.unwrap();
        drop(send);
        let fault = question.read_chunk(10).await.unwrap_err();
        assert!(fault.message.contains("reset this stream"), "{fault}");
        drop(recv);
        let stopped = async {
            loop {
                if let Err(fault) = answer.write_bytes(Bytes::from(vec![0; 1 << 20])).await {
                    return fault;
                }
            }
        };
        let fault = tokio::time::timeout(Duration::from_secs(5), stopped)
            .await
            .unwrap();
        assert!(fault.message.contains("no longer reads"), "{fault}");

        let (mut send, _recv) = site_end.open(0).await.unwrap();
        send.write_all(&[0; 200]).await.unwrap();
        send.finish().unwrap();
        let (_answer, mut question) = hub_end.accept().await.unwrap();
        assert_eq!(
            question.read_to_end(199).await.unwrap_err().code,
            Code::Integrity
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_continue_after_the_listener_closes() {
    let hub = Hub::start();
    let (site_end, hub_end) = hub.connect(Transport::Quic).await;
    let (tcp_site_end, tcp_hub_end) = hub.connect(Transport::Tcp).await;
    hub.listener.close();
    assert!(hub.listener.accept().await.is_none());
    for (a, b) in [(&site_end, &hub_end), (&tcp_site_end, &tcp_hub_end)] {
        let (mut send, _recv) = a.open(0).await.unwrap();
        send.write_all(b"still here").await.unwrap();
        send.finish().unwrap();
        assert_eq!(
            b.accept().await.unwrap().1.read_to_end(100).await.unwrap(),
            b"still here"
        );
    }
    let site = site_of(&hub.identity, "chengdu");
    let fault = dial(&hub.address, &site, &settings(Transport::Tcp), MEMORY)
        .await
        .unwrap_err();
    assert_eq!(fault.code, Code::Unreachable, "{fault}");
    hub_end.close("stopping");
    tcp_hub_end.close("stopping");
    hub.listener.wait_idle().await;
    assert_eq!(
        (site_end.closed().await, tcp_site_end.closed().await),
        ("stopping".into(), "stopping".into())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_silence_affect_no_other_connection() {
    let hub = Hub::start();
    let udp = tokio::net::UdpSocket::bind(loopback()).await.unwrap();
    for size in [1, 20, 1200, 1500] {
        udp.send_to(&vec![0xc3; size], &hub.address).await.unwrap();
    }
    let mut silent = Vec::new();
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0; 100],
        &[0x16, 3, 1, 0xff, 0xff],
        b"",
    ] {
        let mut socket = tokio::net::TcpStream::connect(&hub.address).await.unwrap();
        socket.write_all(garbage).await.unwrap();
        silent.push(socket);
    }
    // A client that sends an invalid join request is rejected and gets the reason.
    for transport in BOTH {
        let tls = tls::joining_client(hub.identity.ca_hash()).unwrap();
        let link = dial::join_link_for_test(&hub.address, tls, &settings(transport))
            .await
            .unwrap();
        let (mut send, mut recv) = link.open(0).await.unwrap();
        send.write_all(b"{\"token_id\":1}").await.unwrap();
        send.finish().unwrap();
        let answer: hello::Answer = hello::receive(&mut recv).await.unwrap();
        assert!(matches!(answer, hello::Answer::Refused(fault) if fault.code == Code::NotAllowed));

        let tls = tls::joining_client(hub.identity.ca_hash()).unwrap();
        let link = dial::join_link_for_test(&hub.address, tls, &settings(transport))
            .await
            .unwrap();
        let (mut send, mut recv) = link.open(0).await.unwrap();
        let _ = send
            .write_all(&vec![b' '; base::limits::CONNECTION_HELLO_BYTES_MAX + 1])
            .await;
        let _ = send.finish();
        let _ = recv.read_chunk(10).await;
    }
    for transport in BOTH {
        hub.connect(transport).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_port_number_serves_both_and_only_once() {
    let hub = Hub::start();
    let taken = Listener::bind(
        hub.listener.local_addr(),
        hub.identity.clone(),
        Arc::new(testing::AdmitAll),
        &settings(Transport::Auto),
        128 << 20,
        &base::workers::Workers::default(),
    );
    let fault = taken.err().unwrap();
    assert_eq!(fault.code, Code::Config);
    assert!(fault.next.contains("port"), "{fault:?}");
}

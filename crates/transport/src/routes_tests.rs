//! Ways to the hub: proxies, several addresses, and a path whose addresses change.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::testing::proxy::{Speaks, TestProxy};
use crate::testing::{Hub, MEMORY, settings, site_of};
use crate::{ConnectionSettings, Link, PRIORITY_BULK, Proxy, ProxySettings, Transport, dial};
use base::fault::{Code, Fault};

/// The name of the hub that only the proxy resolves.
const NAME: &str = "hub.test.invalid:7443";

fn through(url: &str) -> ConnectionSettings {
    ConnectionSettings {
        proxy: ProxySettings::of(Proxy::parse(url).unwrap()),
        ..settings(Transport::Tcp)
    }
}

async fn dial_with(
    hub: &Hub,
    address: &str,
    settings: &ConnectionSettings,
) -> Result<(Link, Link), Fault> {
    let site = site_of(&hub.identity, "chengdu");
    let (link, (_, hub_end, _)) =
        tokio::try_join!(dial(address, &site, settings, MEMORY), async {
            Ok::<_, Fault>(hub.next_site().await)
        })?;
    Ok((link, hub_end))
}

/// Sends some bytes over the connection, and receives them.
async fn carries(from: &Link, to: &Link, bytes: &[u8]) {
    let work = async {
        let (mut send, _recv) = from.open(PRIORITY_BULK).await.unwrap();
        send.write_all(bytes).await.unwrap();
        send.finish().unwrap();
        let (_send, mut recv) = to.accept().await.unwrap();
        assert_eq!(recv.read_to_end(1 << 20).await.unwrap(), bytes);
    };
    tokio::time::timeout(Duration::from_secs(30), work)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_site_connects_through_a_proxy_which_resolves_the_name() {
    let hub = Hub::start();
    let to: SocketAddr = hub.address.parse().unwrap();
    for (speaks, scheme) in [(Speaks::Http, "http"), (Speaks::Socks5, "socks5")] {
        for password in [None, Some(("user", "p:w"))] {
            let proxy = TestProxy::start(speaks, password, &[(NAME, to)]);
            let address = proxy.address();
            let url = match password {
                None => format!("{scheme}://{address}"),
                Some(_) => format!("{scheme}://user:p%3Aw@{address}"),
            };
            let (link, hub_end) = dial_with(&hub, NAME, &through(&url)).await.unwrap();
            assert_eq!((link.transport(), link.remote_address()), ("tcp", address));
            carries(&link, &hub_end, b"content").await;
            assert_eq!(proxy.opened(), 1);
            link.close("the test continues");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_a_proxy_is_named() {
    let hub = Hub::start();
    let site = site_of(&hub.identity, "chengdu");
    let why = async |url: String, address: &str| {
        let fault = dial(address, &site, &through(&url), MEMORY).await;
        let fault = fault.map(drop).unwrap_err();
        assert_eq!(fault.code, Code::Unreachable, "{fault}");
        assert!(
            !format!("{fault} {}", fault.next).contains("secret"),
            "{fault}"
        );
        (fault.message, fault.next)
    };
    let (message, next) = why("http://127.0.0.1:1".into(), NAME).await;
    assert!(
        message.contains("the proxy http://127.0.0.1:1 cannot be reached: Connection refused"),
        "{message}"
    );
    assert!(next.contains("[hub] proxy"), "{next}");
    let (message, _) = why("http://no.such.proxy.invalid:1".into(), NAME).await;
    assert!(
        message.contains("cannot be reached: the host name"),
        "{message}"
    );
    for (speaks, scheme) in [(Speaks::Http, "http"), (Speaks::Socks5, "socks5")] {
        let proxy = TestProxy::start(speaks, Some(("user", "right")), &[]);
        let address = proxy.address();
        let (message, next) = why(format!("{scheme}://{address}"), NAME).await;
        assert!(
            message.contains("requires a user name and a password"),
            "{message}"
        );
        assert!(next.contains("proxy_password_file"), "{next}");
        let (message, _) = why(format!("{scheme}://user:secret@{address}"), NAME).await;
        assert!(
            message.contains("rejected the user name or the password"),
            "{message}"
        );
        let (message, next) = why(format!("{scheme}://user:right@{address}"), NAME).await;
        assert!(message.contains(NAME), "{message}");
        assert!(next.contains("allow this destination"), "{next}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_address_that_answers_is_used() {
    let hub = Hub::start();
    // Bound and never read: a name whose packets vanish.
    let silent = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let silent = silent.local_addr().unwrap();
    for (transport, dead) in [
        (Transport::Quic, silent.to_string()),
        (Transport::Tcp, "127.0.0.1:1".to_owned()),
        (Transport::Tcp, "no.such.name.invalid:1".to_owned()),
    ] {
        let addresses = format!("{dead},{}", hub.address);
        let (link, _) = dial_with(&hub, &addresses, &settings(transport))
            .await
            .unwrap();
        assert_eq!(
            link.remote_address().to_string(),
            hub.address,
            "{addresses}"
        );
        link.close("the test continues");
    }
}

/// A balancer for UDP between one site and the hub. When its entry for the flow expires, the hub
/// sees the site's packets with another port.
struct Balancer {
    address: SocketAddr,
    ports: Arc<AtomicUsize>,
    expires: Arc<AtomicBool>,
    is_closed: Arc<AtomicBool>,
}

impl Balancer {
    fn to(hub: SocketAddr) -> Self {
        let front = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        front
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let this = Self {
            address: front.local_addr().unwrap(),
            ports: Arc::default(),
            expires: Arc::new(AtomicBool::new(true)),
            is_closed: Arc::default(),
        };
        let (ports, expires, is_closed) = (
            this.ports.clone(),
            this.expires.clone(),
            this.is_closed.clone(),
        );
        std::thread::spawn(move || {
            let mut back: Option<UdpSocket> = None;
            let mut datagram = vec![0; 65_536];
            while !is_closed.load(Ordering::Relaxed) {
                let Ok((len, site)) = front.recv_from(&mut datagram) else {
                    continue;
                };
                if expires.swap(false, Ordering::Relaxed) {
                    // The earlier socket is not read any more: answers to its port are lost.
                    let new = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
                    new.connect(hub).unwrap();
                    new.set_read_timeout(Some(Duration::from_millis(100)))
                        .unwrap();
                    let number = ports.fetch_add(1, Ordering::Relaxed) + 1;
                    let (answers, front) = (new.try_clone().unwrap(), front.try_clone().unwrap());
                    let (ports, is_closed) = (ports.clone(), is_closed.clone());
                    std::thread::spawn(move || {
                        let mut datagram = vec![0; 65_536];
                        while ports.load(Ordering::Relaxed) == number
                            && !is_closed.load(Ordering::Relaxed)
                        {
                            if let Ok(len) = answers.recv(&mut datagram) {
                                let _ = front.send_to(&datagram[..len], site);
                            }
                        }
                    });
                    back = Some(new);
                }
                if let Some(back) = &back {
                    let _ = back.send(&datagram[..len]);
                }
            }
        });
        this
    }

    /// The entry of the flow expires with the next packet of the site.
    async fn expire(&self) {
        let before = self.ports.load(Ordering::Relaxed);
        self.expires.store(true, Ordering::Relaxed);
        let changed = async {
            while self.ports.load(Ordering::Relaxed) == before {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), changed)
            .await
            .unwrap();
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.is_closed.store(true, Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_survives_the_expiry_of_its_entry_in_a_balancer() {
    let hub = Hub::start();
    let balancer = Balancer::to(hub.address.parse().unwrap());
    let address = balancer.address.to_string();
    let (link, hub_end) = dial_with(&hub, &address, &settings(Transport::Quic))
        .await
        .unwrap();
    carries(&link, &hub_end, b"before").await;
    for round in 0..3 {
        // A keep-alive packet of the site arrives from another port: the connection id names the
        // connection.
        balancer.expire().await;
        carries(&hub_end, &link, format!("down {round}").as_bytes()).await;
        carries(&link, &hub_end, format!("up {round}").as_bytes()).await;
        assert!(!link.is_closed() && !hub_end.is_closed());
    }
    assert_eq!(balancer.ports.load(Ordering::Relaxed), 4);
}

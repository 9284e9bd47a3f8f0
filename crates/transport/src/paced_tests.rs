//! A connection over a slow path, with real sockets.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use super::*;
use crate::testing::{Hub, MEMORY, settings, site_of};

/// 2 Mbit/s.
const BYTES_PER_SECOND: f64 = 250_000.0;
const DELAY: Duration = Duration::from_millis(10);
const QUEUE: Duration = Duration::from_millis(50);
const PACKET_BYTES_MAX: usize = 1500;

/// Sends what arrives after the delay of the path.
fn delayed(
    socket: Arc<UdpSocket>,
    to: Arc<OnceLock<SocketAddr>>,
) -> mpsc::Sender<(Instant, Vec<u8>)> {
    let (send, mut receive) = mpsc::channel::<(Instant, Vec<u8>)>(1000);
    tokio::spawn(async move {
        while let Some((at, packet)) = receive.recv().await {
            sleep_until(at).await;
            if let Some(to) = to.get() {
                let _ = socket.send_to(&packet, *to).await;
            }
        }
    });
    send
}

/// A slow path to the hub. Returns its address for the site.
async fn slow_path(hub: SocketAddr) -> SocketAddr {
    let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let back = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let address = front.local_addr().unwrap();
    tokio::spawn(async move {
        let site = Arc::new(OnceLock::new());
        let (mut up, mut down) = ([0; 65_536], [0; 65_536]);
        let to_hub = delayed(back.clone(), Arc::new(OnceLock::from(hub)));
        let to_site = delayed(front.clone(), site.clone());
        let mut free_at = Instant::now();
        loop {
            tokio::select! {
                packet = front.recv_from(&mut up) => {
                    let Ok((bytes, from)) = packet else { return };
                    let _ = site.set(from);
                    let _ = to_hub.try_send((Instant::now() + DELAY, up[..bytes].to_vec()));
                }
                packet = back.recv(&mut down) => {
                    let Ok(bytes) = packet else { return };
                    let start = free_at.max(Instant::now());
                    if bytes > PACKET_BYTES_MAX || start > Instant::now() + QUEUE {
                        continue;
                    }
                    free_at = start + Duration::from_secs_f64(bytes as f64 / BYTES_PER_SECOND);
                    let _ = to_site.try_send((free_at + DELAY, down[..bytes].to_vec()));
                }
            }
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_connection_is_woken_at_its_pace() {
    const BYTES: usize = 512 << 10;
    let hub = Hub::start();
    let site = site_of(&hub.identity, "chengdu");
    let address = slow_path(hub.listener.local_addr()).await.to_string();
    let wanted = settings(Transport::Quic);
    let (dialled, (_, link, _)) =
        tokio::join!(dial(&address, &site, &wanted, MEMORY), hub.next_site());
    let dialled = dialled.unwrap();
    let (mut send, _recv) = link.open(PRIORITY_BULK).await.unwrap();
    let sent = tokio::spawn(async move {
        send.write_all(&vec![7; BYTES]).await.unwrap();
        send.finish().unwrap();
        send.delivered().await;
    });
    let (_send, mut recv) = dialled.accept().await.unwrap();
    let all = timeout(Duration::from_secs(60), recv.read_to_end(BYTES + 1));
    assert_eq!(all.await.unwrap().unwrap().len(), BYTES);
    sent.await.unwrap();
    let Wire::Quic { choice, .. } = &link.inner.wire else {
        unreachable!("the connection uses QUIC")
    };
    assert!(choice.pace().allows().is_some(), "the path is paced");
}

//! What happens to data that a peer no longer wants, and how much is buffered.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::time::timeout;

use crate::quic::send_buffer;
use crate::testing::{Hub, MEMORY, loopback, settings, site_of};
use crate::{PRIORITY_BULK, Transport, Wire, dial};

/// Passes packets between a site and the hub. While `is_cut`, none of the hub's arrive.
async fn relay(hub: SocketAddr, is_cut: Arc<AtomicBool>) -> SocketAddr {
    let front = UdpSocket::bind(loopback()).await.unwrap();
    let back = UdpSocket::bind(loopback()).await.unwrap();
    back.connect(hub).await.unwrap();
    let address = front.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut up, mut down) = (vec![0; 65_536], vec![0; 65_536]);
        let mut site = None;
        loop {
            tokio::select! {
                packet = front.recv_from(&mut up) => {
                    let Ok((bytes, from)) = packet else { return };
                    site = Some(from);
                    let _ = back.send(&up[..bytes]).await;
                }
                packet = back.recv(&mut down) => {
                    let Ok(bytes) = packet else { return };
                    if let Some(site) = site.filter(|_| !is_cut.load(Ordering::Relaxed)) {
                        let _ = front.send_to(&down[..bytes], site).await;
                    }
                }
            }
        }
    });
    address
}

#[tokio::test]
async fn a_finished_stream_is_reset_when_the_peer_stops_reading() {
    const DEADLINE: Duration = Duration::from_secs(20);
    let hub = Hub::start();
    let site = site_of(&hub.identity, "chengdu");
    let is_cut = Arc::new(AtomicBool::new(false));
    let address = relay(hub.listener.local_addr(), is_cut.clone()).await;
    let (address, wanted) = (address.to_string(), settings(Transport::Quic));
    let (dialled, (_, link, _)) =
        tokio::join!(dial(&address, &site, &wanted, MEMORY), hub.next_site());
    let dialled = dialled.unwrap();
    let (mut request, answer) = dialled.open(PRIORITY_BULK).await.unwrap();
    request.write_all(b"request").await.unwrap();
    request.finish().unwrap();
    let (mut send, _recv) = link.accept().await.unwrap();
    // The whole answer is buffered, and the site has received none of it.
    is_cut.store(true, Ordering::Relaxed);
    send.write_all(&vec![0; 1 << 20]).await.unwrap();
    send.finish().unwrap();
    let delivered = tokio::spawn(send.delivered());
    drop(answer);
    timeout(DEADLINE, delivered).await.unwrap().unwrap();
    // The rest is not sent.
    is_cut.store(false, Ordering::Relaxed);
    let Wire::Quic { connection, .. } = &link.inner.wire else {
        unreachable!("the connection uses QUIC")
    };
    let reset = async {
        while connection.stats().frame_tx.reset_stream == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(DEADLINE, reset).await.unwrap();
}

#[test]
fn a_slow_connection_buffers_a_second() {
    const ROOM: u64 = 96 << 20;
    let of = |rtt_ms, window| send_buffer(Duration::from_millis(rtt_ms), window, ROOM);
    // 2 Mbit/s and 100 ms.
    assert_eq!(of(100, 25_000), 250_000);
    // 64 kbit/s.
    assert_eq!(of(500, 4_000), 32 << 10);
    // 200 Mbit/s and 100 ms: four windows, so that a lost packet does not hold back the sender.
    assert_eq!(of(100, 2_500_000), 10_000_000);
    assert_eq!(of(10, 250_000), 8 << 20);
    // A loopback.
    assert_eq!(of(0, 10_000), 8 << 20);
    // Many connections share the memory.
    assert_eq!(
        send_buffer(Duration::from_millis(100), 2_500_000, 1 << 20),
        1 << 20
    );
    assert_eq!(
        send_buffer(Duration::from_millis(100), 2_500_000, 0),
        256 << 10
    );
}

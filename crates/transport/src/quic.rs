//! QUIC: sockets, transport settings, and the meaning of quinn's errors.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn::{
    ConnectionError, Endpoint, EndpointConfig, MtuDiscoveryConfig, Runtime, TransportConfig, VarInt,
};
use rustls::pki_types::CertificateDer;

use super::congestion::{self, Choice};
use super::pace::Pace;
use super::path::{self, Path};
use super::socket::Socket;
use super::tls::Shown;
use super::{CLOSE_REFUSED, CLOSE_VIOLATION, Ended};
use base::fault::{Fault, IoContext};
use base::limits::{
    CONNECTION_FIT_EVERY, CONNECTION_HANDSHAKES_MAX, CONNECTION_KEEP_ALIVE,
    CONNECTION_PACKET_BYTES_MAX, CONNECTION_SEND_BYTES_LEAST, CONNECTION_SEND_BYTES_MIN,
    CONNECTION_SEND_BYTES_SLOW, CONNECTION_SEND_FIT_EVERY, CONNECTION_SOCKET_BUFFER_BYTES,
    CONNECTION_STREAM_WINDOW_BYTES, CONNECTION_STREAMS_MAX, CONNECTION_WINDOW_BYTES,
    CONNECTION_WINDOW_FIRST_BYTES, SILENCE_MAX,
};

/// The packet size that QUIC requires of every path.
const PACKET_BYTES_MIN: u16 = 1200;
/// The MTU search stops when the remaining gain is not larger than this.
const PACKET_BYTES_STEP: u16 = 8;
/// The same, if the interface allows the largest packets, as only a loopback does. Each probe costs
/// many bytes, and sizes in between are unlikely. The search finds 12,487 bytes, so five packets
/// fit one segmented send.
const PACKET_BYTES_LARGE_STEP: u16 = CONNECTION_PACKET_BYTES_MAX / 5;

/// The largest packet size to probe: at most the MTU of the interface towards `remote`. On a
/// connection with a long round trip, a search that starts far above the MTU takes seconds, because
/// each failing size is probed three times.
fn packet_bytes_max(remote: SocketAddr) -> u16 {
    use rustix::net::sockopt;
    let any = if remote.is_ipv4() {
        SocketAddr::from(([0; 4], 0))
    } else {
        SocketAddr::from(([0u16; 8], 0))
    };
    let route = UdpSocket::bind(any).and_then(|probe| {
        // Sends nothing: the kernel only looks up the route.
        probe.connect(remote)?;
        Ok(if remote.is_ipv4() {
            sockopt::ip_mtu(&probe)?.saturating_sub(28)
        } else {
            sockopt::ipv6_mtu(&probe)?.saturating_sub(48)
        })
    });
    route
        .ok()
        .and_then(|bytes| u16::try_from(bytes).ok())
        .unwrap_or(u16::MAX)
        .clamp(PACKET_BYTES_MIN, CONNECTION_PACKET_BYTES_MAX)
}

/// The settings of a connection over `path`, on which packets of `largest` bytes are tried.
pub(super) fn transport(
    choice: &Choice,
    path: &Path,
    largest: u16,
    window: u64,
) -> Result<Arc<TransportConfig>, Fault> {
    let step = if largest == CONNECTION_PACKET_BYTES_MAX {
        PACKET_BYTES_LARGE_STEP
    } else {
        PACKET_BYTES_STEP
    };
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(largest).minimum_change(step);
    let idle = SILENCE_MAX
        .try_into()
        .map_err(|e| Fault::internal(format!("set up QUIC: the idle timeout: {e}")))?;
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(CONNECTION_STREAMS_MAX.into())
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(CONNECTION_STREAM_WINDOW_BYTES.into())
        .receive_window(VarInt::from_u64(window).unwrap_or(VarInt::MAX))
        .send_window(CONNECTION_SEND_BYTES_MIN)
        .mtu_discovery_config(Some(mtu))
        .initial_rtt(congestion::UNKNOWN_RTT)
        .keep_alive_interval(Some(CONNECTION_KEEP_ALIVE))
        .max_idle_timeout(Some(idle))
        .congestion_controller_factory(congestion::factory(choice, path));
    Ok(Arc::new(config))
}

fn endpoint_config(reset_key: Option<[u8; 32]>) -> Result<EndpointConfig, Fault> {
    // The key survives a restart. A restarted hub can therefore answer the next packet of a site
    // with a stateless reset, and the site reconnects immediately instead of after the idle
    // timeout.
    let mut config = match reset_key {
        Some(key) => {
            let mut config = EndpointConfig::new(Arc::new(ring::hmac::Key::new(
                ring::hmac::HMAC_SHA256,
                &key,
            )));
            // A stateless reset is only sent for a connection id that the endpoint recognises as
            // its own.
            let ids = u64::from_le_bytes([
                key[0], key[1], key[2], key[3], key[4], key[5], key[6], key[7],
            ]);
            config.cid_generator(move || {
                Box::new(quinn_proto::HashedConnectionIdGenerator::from_key(ids))
            });
            config
        }
        None => {
            // A connecting end has one socket per connection, so its packets need no connection id.
            let mut config = EndpointConfig::default();
            config.cid_generator(|| Box::new(quinn_proto::RandomConnectionIdGenerator::new(0)));
            config
        }
    };
    config
        .max_udp_payload_size(CONNECTION_PACKET_BYTES_MAX)
        .map_err(|e| Fault::internal(format!("set up QUIC: the packet size: {e}")))?;
    Ok(config)
}

/// Requests large socket buffers: packets that do not fit while the daemon is busy are lost, which
/// slows down the connection.
fn enlarge_buffers(socket: &UdpSocket) {
    use rustix::net::sockopt;
    let wanted = CONNECTION_SOCKET_BUFFER_BYTES;
    // The kernel reports twice the requested size, because it includes its bookkeeping.
    let granted = |size: rustix::io::Result<usize>| size.unwrap_or(0) / 2;
    let _ = sockopt::set_socket_recv_buffer_size(socket, wanted);
    if granted(sockopt::socket_recv_buffer_size(socket)) < wanted {
        // With CAP_NET_ADMIN the buffer may exceed the system limit.
        let _ = sockopt::set_socket_recv_buffer_size_force(socket, wanted);
    }
    let _ = sockopt::set_socket_send_buffer_size(socket, wanted);
    if granted(sockopt::socket_send_buffer_size(socket)) < wanted {
        let _ = sockopt::set_socket_send_buffer_size_force(socket, wanted);
    }
    let receive = granted(sockopt::socket_recv_buffer_size(socket));
    let send = granted(sockopt::socket_send_buffer_size(socket));
    if receive < wanted || send < wanted {
        tracing::info!(
            wanted,
            receive,
            send,
            "the kernel grants smaller UDP buffers than requested; raise net.core.rmem_max and net.core.wmem_max for fast connections"
        );
    } else {
        tracing::debug!(receive, send, "UDP buffers granted");
    }
}

fn endpoint(
    socket: UdpSocket,
    server: Option<quinn::ServerConfig>,
    reset_key: Option<[u8; 32]>,
) -> Result<Endpoint, Fault> {
    enlarge_buffers(&socket);
    let endpoint_config = endpoint_config(reset_key)?;
    let runtime = Arc::new(quinn::TokioRuntime);
    let endpoint = runtime.wrap_udp_socket(socket).and_then(|socket| {
        Endpoint::new_with_abstract_socket(
            endpoint_config,
            server,
            Arc::new(Socket::new(socket)),
            runtime,
        )
    });
    endpoint.at("set up the QUIC endpoint")
}

/// The endpoint of the hub, and the configuration of its connections.
pub(super) fn listen(
    socket: UdpSocket,
    tls: rustls::ServerConfig,
    reset_key: [u8; 32],
) -> Result<(Endpoint, quinn::ServerConfig), Fault> {
    let crypto = QuicServerConfig::try_from(tls)
        .map_err(|e| Fault::internal(format!("set up QUIC: {e}")))?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config
        .max_incoming(CONNECTION_HANDSHAKES_MAX)
        .incoming_buffer_size(64 << 10)
        .incoming_buffer_size_total(8 << 20);
    Ok((
        endpoint(socket, Some(config.clone()), Some(reset_key))?,
        config,
    ))
}

/// Accepts a connection whose congestion control can be set with `choice`.
pub(super) async fn accept(
    incoming: quinn::Incoming,
    config: &quinn::ServerConfig,
    choice: &Choice,
) -> Result<quinn::Connection, Fault> {
    let mut config = config.clone();
    config.transport_config(transport(
        choice,
        &path::to(incoming.remote_address().ip()),
        packet_bytes_max(incoming.remote_address()),
        CONNECTION_WINDOW_FIRST_BYTES,
    )?);
    let lost = |e: ConnectionError| Fault::unreachable(e.to_string());
    incoming
        .accept_with(Arc::new(config))
        .map_err(lost)?
        .await
        .map_err(lost)
}

/// Connects to one address. Returns when the handshake is complete on this side.
pub(super) async fn connect(
    remote: SocketAddr,
    tls: rustls::ClientConfig,
    choice: &Choice,
) -> Result<Connected, Ended> {
    let lost = |e: &dyn std::fmt::Display| Ended::lost(&e.to_string());
    let any = if remote.is_ipv4() {
        SocketAddr::from(([0; 4], 0))
    } else {
        SocketAddr::from(([0u16; 8], 0))
    };
    let socket = UdpSocket::bind(any).map_err(|e| lost(&e))?;
    let endpoint = endpoint(socket, None, None).map_err(|e| lost(&e))?;
    let crypto = QuicClientConfig::try_from(tls).map_err(|e| lost(&e))?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(
        transport(
            choice,
            &path::to(remote.ip()),
            packet_bytes_max(remote),
            CONNECTION_WINDOW_BYTES.into(),
        )
        .map_err(|e| lost(&e))?,
    );
    let connecting = endpoint
        .connect_with(config, remote, crate::identity::HUB_DNS_NAME)
        .map_err(|e| lost(&e))?;
    let connection = connecting.await.map_err(|e| ended(&e))?;
    let shown = shown(&connection);
    Ok(Connected {
        connection,
        shown,
        endpoint,
    })
}

/// A connection that this end opened, after its handshake.
pub(super) struct Connected {
    pub(super) connection: quinn::Connection,
    pub(super) shown: Shown,
    pub(super) endpoint: Endpoint,
}

/// The ALPN and the certificates from the handshake.
pub(super) fn shown(connection: &quinn::Connection) -> Shown {
    let data = connection
        .handshake_data()
        .and_then(|data| data.downcast::<HandshakeData>().ok());
    let chain = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok());
    Shown {
        alpn: data.and_then(|d| d.protocol).unwrap_or_default(),
        chain: chain.map(|c| *c).unwrap_or_default(),
    }
}

/// The size of the send buffer for this round trip and this congestion window; `room` is its limit.
///
/// It holds the data in flight and the data that is sent next, at most one second of it: what is
/// buffered is sent before anything more urgent that needs the same room.
pub(super) fn send_buffer(rtt: Duration, window: u64, room: u64) -> u64 {
    // On a short connection, a larger buffer would not fit the CPU caches.
    if rtt < congestion::LONG_RTT {
        return CONNECTION_SEND_BYTES_MIN.min(room.max(CONNECTION_SEND_BYTES_LEAST));
    }
    let second = u128::from(window) * 1000 / rtt.as_millis().max(1);
    // A lost packet of an answer holds back the rest of the answer for two more round trips.
    (4 * window)
        .max(CONNECTION_SEND_BYTES_MIN.min(u64::try_from(second).unwrap_or(u64::MAX)))
        .max(CONNECTION_SEND_BYTES_SLOW)
        .min(room.max(CONNECTION_SEND_BYTES_LEAST))
}

/// The send buffer of a connection. It must hold the data in flight and the data that is sent next;
/// a larger one would use memory, and delay what is more urgent.
pub(super) struct SendRoom {
    connection: quinn::Connection,
    room: Box<dyn Fn() -> u64 + Send + Sync>,
    /// The current size, and when it was adjusted.
    current: Mutex<(u64, Instant)>,
}

impl SendRoom {
    /// Adjusts the buffer to the bandwidth until the connection ends, and at each call of
    /// [`SendRoom::fit`]. Also wakes the connection at its pace. `room` returns the current limit and is called often. `guard` is dropped
    /// when the connection ends.
    pub(super) fn keep(
        connection: quinn::Connection,
        pace: &Pace,
        room: impl Fn() -> u64 + Send + Sync + 'static,
        guard: impl Send + 'static,
    ) -> Arc<Self> {
        let this = Arc::new(Self {
            connection,
            room: Box::new(room),
            current: Mutex::new((CONNECTION_SEND_BYTES_MIN, Instant::now())),
        });
        let (kept, pace) = (this.clone(), pace.clone());
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(CONNECTION_FIT_EVERY);
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    _ = kept.connection.closed() => break,
                    _ = tick.tick() => kept.adjust(),
                    () = pace.filled() => kept.wake(),
                }
            }
            drop(guard);
        });
        this
    }

    /// Adjusts the buffer if that was not done recently. Called before each write.
    pub(super) fn fit(&self) {
        if self.current.lock().1.elapsed() >= CONNECTION_SEND_FIT_EVERY {
            self.adjust();
        }
    }

    /// Lets the connection send what its congestion control allows by now.
    fn wake(&self) {
        // Setting the size wakes the connection.
        let current = self.current.lock().0;
        self.connection.set_send_window(current);
    }

    fn adjust(&self) {
        let stats = self.connection.stats().path;
        let adjusted = send_buffer(stats.rtt, stats.cwnd, (self.room)());
        let mut current = self.current.lock();
        current.1 = Instant::now();
        if adjusted != current.0 {
            self.connection.set_send_window(adjusted);
            current.0 = adjusted;
        }
    }
}

/// Converts an error of a connection.
pub(super) fn ended(error: &ConnectionError) -> Ended {
    match error {
        ConnectionError::ApplicationClosed(close) => Ended::by_peer(
            u32::try_from(close.error_code.into_inner()).unwrap_or(CLOSE_VIOLATION),
            &close.reason,
        ),
        ConnectionError::LocallyClosed => {
            Ended::by_us(super::CLOSE_DONE, "it was closed by this end")
        }
        // A TLS alert: the codes start at 0x100.
        ConnectionError::ConnectionClosed(close) if u64::from(close.error_code) >> 8 == 1 => {
            let reason = format!(
                "the TLS handshake was refused: {}",
                String::from_utf8_lossy(&close.reason)
            );
            Ended::by_peer(CLOSE_REFUSED, reason.as_bytes())
        }
        // This end rejected the certificate of the peer.
        ConnectionError::TransportError(error) if u64::from(error.code) >> 8 == 1 => {
            Ended::by_us(CLOSE_REFUSED, &error.reason)
        }
        ConnectionError::TimedOut => Ended::lost("no answer for too long"),
        ConnectionError::Reset => Ended::lost("the peer was restarted"),
        other => Ended::lost(&other.to_string()),
    }
}

//! TCP + TLS below the multiplexer: sockets, their options, the handshake.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};

use super::congestion::LONG_RTT;
use super::tls::Shown;
use crate::Congestion;
use base::limits::{CONNECTION_KEEP_ALIVE, MUX_BATCH_BYTES, SILENCE_MAX};

/// rustls reads 4 KiB at a time; this many bytes are read from the kernel at once.
const READ_BYTES: usize = 128 << 10;

/// The bytes that the kernel takes in addition to the data in flight, on a connection with a long
/// round trip.
const UNSENT_BYTES_MAX: u32 = 128 << 10;

/// The bytes of one TCP connection.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    sent: AtomicU64,
    received: AtomicU64,
    severed: AtomicBool,
}

impl Traffic {
    pub(super) fn bytes(&self) -> (u64, u64) {
        (
            self.sent.load(Ordering::Relaxed),
            self.received.load(Ordering::Relaxed),
        )
    }

    /// When the socket is closed, the kernel discards what it has not sent.
    pub(super) fn sever(&self) {
        self.severed.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_severed(&self) -> bool {
        self.severed.load(Ordering::Relaxed)
    }
}

/// A socket that counts bytes.
pub(super) struct Counted {
    socket: TcpStream,
    traffic: Arc<Traffic>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        if self.traffic.is_severed() {
            let socket = socket2::SockRef::from(&self.socket);
            let _ = socket.set_linger(Some(Duration::ZERO));
        }
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let filled_before = buf.filled().len();
        let result = Pin::new(&mut self.socket).poll_read(cx, buf);
        self.traffic.received.fetch_add(
            (buf.filled().len() - filled_before) as u64,
            Ordering::Relaxed,
        );
        result
    }
}

impl Counted {
    fn count_sent(&self, result: Poll<std::io::Result<usize>>) -> Poll<std::io::Result<usize>> {
        if let Poll::Ready(Ok(sent)) = &result {
            self.traffic.sent.fetch_add(*sent as u64, Ordering::Relaxed);
        }
        result
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let result = Pin::new(&mut self.socket).poll_write(cx, buf);
        self.count_sent(result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let result = Pin::new(&mut self.socket).poll_write_vectored(cx, bufs);
        self.count_sent(result)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

/// A connection after its TLS handshake.
pub(super) struct Secured<T> {
    pub(super) io: T,
    pub(super) traffic: Arc<Traffic>,
    pub(super) shown: Shown,
    /// The duration of the handshake, about one round trip.
    pub(super) handshake: Duration,
}

pub(super) type ServerIo = tokio_rustls::server::TlsStream<BufReader<Counted>>;
pub(super) type ClientIo = tokio_rustls::client::TlsStream<BufReader<Counted>>;

fn prepare(socket: TcpStream) -> (BufReader<Counted>, Arc<Traffic>) {
    use rustix::net::sockopt;
    let _ = socket.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(&socket, true);
    let _ = sockopt::set_tcp_keepidle(&socket, CONNECTION_KEEP_ALIVE);
    let _ = sockopt::set_tcp_user_timeout(&socket, SILENCE_MAX.as_millis() as u32);
    let traffic = Arc::new(Traffic::default());
    (
        BufReader::with_capacity(
            READ_BYTES,
            Counted {
                socket,
                traffic: traffic.clone(),
            },
        ),
        traffic,
    )
}

/// Chooses the congestion control of the kernel after the round trip is known. If the kernel does
/// not have it, its default is kept. On a connection with a long round trip, limits what the kernel
/// holds in addition to the data in flight: it would delay what is more urgent, and is sent even
/// after a transfer was stopped.
fn choose_congestion(io: &BufReader<Counted>, choice: Congestion, rtt: Duration) {
    if rtt >= LONG_RTT {
        let socket = socket2::SockRef::from(&io.get_ref().socket);
        let _ = socket.set_tcp_notsent_lowat(UNSENT_BYTES_MAX);
    }
    let name = match choice {
        Congestion::Auto if rtt < LONG_RTT => return,
        Congestion::Auto | Congestion::Bbr => "bbr",
        Congestion::Cubic => "cubic",
    };
    if let Err(error) = rustix::net::sockopt::set_tcp_congestion(&io.get_ref().socket, name) {
        tracing::debug!(%error, name, "the kernel does not support this congestion control");
    }
}

fn shown(connection: &rustls::CommonState) -> Shown {
    Shown {
        alpn: connection.alpn_protocol().unwrap_or_default().to_vec(),
        chain: connection
            .peer_certificates()
            .unwrap_or_default()
            .iter()
            .map(|c| c.clone().into_owned())
            .collect(),
    }
}

/// The handshake at the hub.
pub(super) async fn accept(
    socket: TcpStream,
    tls: Arc<rustls::ServerConfig>,
    congestion: Congestion,
) -> std::io::Result<Secured<ServerIo>> {
    let (io, traffic) = prepare(socket);
    let started = Instant::now();
    let mut io = tokio_rustls::TlsAcceptor::from(tls).accept(io).await?;
    io.get_mut().1.set_buffer_limit(Some(MUX_BATCH_BYTES));
    let handshake = started.elapsed();
    choose_congestion(io.get_ref().0, congestion, handshake);
    let shown = shown(io.get_ref().1);
    Ok(Secured {
        io,
        traffic,
        shown,
        handshake,
    })
}

/// Connects. Both ends send segments of at most `segment` bytes: the kernel tells the peer while it
/// connects.
pub(super) async fn open(remote: SocketAddr, segment: Option<u32>) -> std::io::Result<TcpStream> {
    let socket = if remote.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    if let Some(bytes) = segment {
        socket2::SockRef::from(&socket).set_tcp_mss(bytes)?;
    }
    socket.connect(remote).await
}

/// Performs the handshake with the hub on a connection to it, which may lead through a proxy.
pub(super) async fn secure(
    socket: TcpStream,
    tls: Arc<rustls::ClientConfig>,
    name: rustls::pki_types::ServerName<'static>,
    congestion: Congestion,
) -> std::io::Result<Secured<ClientIo>> {
    let (io, traffic) = prepare(socket);
    let started = Instant::now();
    let mut io = tokio_rustls::TlsConnector::from(tls)
        .connect(name, io)
        .await?;
    io.get_mut().1.set_buffer_limit(Some(MUX_BATCH_BYTES));
    let handshake = started.elapsed();
    choose_congestion(io.get_ref().0, congestion, handshake);
    let shown = shown(io.get_ref().1);
    Ok(Secured {
        io,
        traffic,
        shown,
        handshake,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn both_ends_send_segments_of_the_requested_size() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = tokio::net::TcpListener::bind(address).await else {
                continue; // This machine has no IPv6.
            };
            let remote = listener.local_addr().unwrap();
            for (segment, largest) in [(None, 65_535), (Some(1160), 1160), (Some(536), 536)] {
                let (dialled, accepted) = tokio::join!(open(remote, segment), listener.accept());
                for end in [&dialled.unwrap(), &accepted.unwrap().0] {
                    let bytes = socket2::SockRef::from(end).tcp_mss().unwrap();
                    assert!(bytes <= largest, "{remote}, {segment:?}: {bytes}");
                    assert!(segment.is_some() || bytes > 1160, "{remote}: {bytes}");
                }
            }
        }
    }
}

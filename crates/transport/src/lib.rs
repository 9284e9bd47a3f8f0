//! The connection between a hub and a site: one connection with many streams, over QUIC or, if UDP
//! is blocked, over TCP + TLS.
//!
//! The hub binds a [`Listener`] (UDP and TCP with the same port number) and receives [`Arrival`]s.
//! A site [`join`]s once and then [`dial`]s. Both ends hold a [`Link`], which opens and accepts
//! streams of a [`SendHalf`] and a [`RecvHalf`]. Certificates of the hub's CA authenticate both
//! ends, with TLS 1.3 only, without 0-RTT and session tickets. This crate does not interpret the
//! content of streams.
//!
//! ALPN `packhorse/1` requires the certificate of a site. `packhorse-join/1` requires none: it
//! carries one request with a join token, and the answer is a certificate. After the handshake of
//! `packhorse/1`, the hub sends a `hello::Welcome` on its own stream, so that a rejected site
//! learns the reason before it does anything.
//!
//! The windows in [`base::limits`] limit the memory for every peer. No state of a connection
//! survives a crash. [`identity`] stores keys and certificates on disk and replaces each file
//! atomically.

mod addresses;
mod bbr;
mod congestion;
mod dial;
#[cfg(test)]
mod emulation;
mod gate;
mod hello;
pub mod identity;
mod limited;
mod listen;
mod mux;
mod pace;
mod path;
mod proxy;
mod quic;
mod redial;
mod seats;
mod settings;
mod socket;
mod stream;
mod tcp;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod tls;
mod window;
mod write_order;

pub use addresses::check as check_addresses;
pub use dial::{REVOKED, clock_difference, dial, join, next_after_refusal, probe};
pub use gate::{Certificate, Gate, Verdict};
pub use listen::{Arrival, JoinRequest, Listener};
pub use proxy::{Proxy, ProxySettings};
pub use redial::Redial;
pub use settings::{Congestion, ConnectionSettings, Transport};
pub use stream::{RecvHalf, SendHalf};
use stream::{RecvWire, SendWire};
use write_order::WriteOrder;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;

use base::fault::{Fault, Reason};
use base::limits::CONNECTION_REASON_BYTES_MAX;
use base::peer::Peer;
use base::spans;
use base::text;
use tracing::Span;

/// The work is done.
pub(crate) const CLOSE_DONE: u32 = 0;
/// The peer is not allowed; the reason states why.
pub(crate) const CLOSE_REFUSED: u32 = 1;
/// The peer violated the protocol.
pub(crate) const CLOSE_VIOLATION: u32 = 2;
/// There is no free slot for this connection at the moment; the peer may retry.
pub(crate) const CLOSE_BUSY: u32 = 3;
/// The certificate of the peer is expired according to the clock of this end. The reason ends with
/// the time of that clock.
pub(crate) const CLOSE_CLOCK: u32 = 4;

/// The priority of streams with control messages, which are sent before all others.
pub const PRIORITY_CONTROL: i32 = 100;
/// The priority of streams with bulk data.
pub const PRIORITY_BULK: i32 = 0;

/// The number of positions in the order of streams of one priority. After this many streams the
/// numbering restarts, and a newer stream is sent first once.
const PLACES: u32 = 1 << 24;

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ended {
    by_peer: bool,
    /// `None`: the connection was lost, nobody closed it.
    code: Option<u32>,
    reason: String,
}

impl Ended {
    fn by_us(code: u32, reason: &str) -> Self {
        Self {
            by_peer: false,
            code: Some(code),
            reason: clean(reason),
        }
    }

    fn by_peer(code: u32, reason: &[u8]) -> Self {
        Self {
            by_peer: true,
            code: Some(code),
            reason: clean(&String::from_utf8_lossy(reason)),
        }
    }

    fn lost(reason: &str) -> Self {
        Self {
            by_peer: false,
            code: None,
            reason: clean(reason),
        }
    }

    fn from_io(error: &std::io::Error) -> Self {
        match error
            .get_ref()
            .and_then(|e| e.downcast_ref::<rustls::Error>())
        {
            Some(rustls::Error::AlertReceived(alert)) => Self::by_peer(
                CLOSE_REFUSED,
                format!("the TLS handshake was refused: {alert:?}").as_bytes(),
            ),
            _ => Self::lost(&error.to_string()),
        }
    }
}

/// Prepares text of a peer for a log or terminal: limits the length and replaces control
/// characters.
fn clean(text: &str) -> String {
    let text: String = text
        .chars()
        .map(|c| if text::is_unsafe(c) { '?' } else { c })
        .collect();
    text::prefix(&text, CONNECTION_REASON_BYTES_MAX).into()
}

/// Why a half of a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamEnd {
    /// The connection ended.
    LineGone,
    /// The peer no longer reads the stream.
    Stopped,
    /// This end finished or reset the stream before.
    Finished,
    /// The writing end reset the stream.
    Reset,
}

/// How long a severed connection may still send: the close message, and before it what the kernel
/// holds.
pub(crate) const SEVER_MAX: Duration = Duration::from_millis(300);
/// The longest wait until a close message has been sent.
const FLUSH_MAX: Duration = Duration::from_secs(1);

enum Wire {
    /// A connection that this end opened has its own endpoint.
    Quic {
        connection: quinn::Connection,
        endpoint: Option<quinn::Endpoint>,
        choice: congestion::Choice,
        send_room: Arc<quic::SendRoom>,
    },
    Tcp {
        mux: mux::Mux,
        traffic: Arc<tcp::Traffic>,
    },
}

impl Wire {
    fn name(&self) -> &'static str {
        match self {
            Self::Quic { .. } => "quic",
            Self::Tcp { .. } => "tcp",
        }
    }
}

struct Inner {
    wire: Wire,
    /// `None`: a site that has not joined yet.
    peer: Option<Peer>,
    remote: SocketAddr,
    /// The span of the log for the work on this connection.
    span: Span,
    /// The number of streams that have a priority.
    ordered: AtomicU32,
    /// The write order on QUIC.
    write_order: WriteOrder,
    /// The clock of the hub at its welcome, in milliseconds since 1970, and the local time of that
    /// moment.
    hub_clock: OnceLock<(u64, std::time::Instant)>,
    /// The newest format of manifests that the hub and all its sites read, according to its welcome.
    manifest_format: AtomicU32,
    /// At the hub: the certificate of the peer.
    certificate: Option<Certificate>,
    /// At the other end: the hub said that this connection is for a renewal only.
    renew_only: AtomicBool,
    /// Why the connection is over TCP, if it may be over QUIC.
    reason: Mutex<Option<String>>,
    /// The reason with which this end closed a QUIC connection; quinn does not store it.
    last_words: Mutex<Option<String>>,
    /// Bytes of streams that this end wrote.
    written: AtomicU64,
    /// Bytes of streams that this end read.
    read: Arc<AtomicU64>,
    /// The receive window; `None`: the fixed default.
    window: Option<Arc<window::Window>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Wire::Quic { connection, .. } = &self.wire {
            connection.close(CLOSE_DONE.into(), b"no longer used");
        }
    }
}

impl Inner {
    fn ended(&self) -> Option<Ended> {
        match &self.wire {
            Wire::Quic { connection, .. } => connection.close_reason().map(|e| self.translate(&e)),
            Wire::Tcp { mux, .. } => mux.ended(),
        }
    }

    /// The quinn priority of the next stream with this priority. Streams of one priority are sent
    /// one after the other. If 32 answers were interleaved packet by packet, each packet would wake
    /// another task, and a lost packet of an old answer would be resent after all newer ones.
    fn position_of(&self, priority: i32) -> i32 {
        let position = self.ordered.fetch_add(1, Ordering::Relaxed) % PLACES;
        priority.clamp(0, PRIORITY_CONTROL) * PLACES as i32 - position as i32
    }

    /// Adjusts the send buffer of a QUIC connection to what was measured.
    fn fit_send_room(&self) {
        if let Wire::Quic { send_room, .. } = &self.wire {
            send_room.fit();
        }
    }

    fn translate(&self, error: &quinn::ConnectionError) -> Ended {
        match (error, &*self.last_words.lock()) {
            (quinn::ConnectionError::LocallyClosed, Some(words)) => Ended::by_us(CLOSE_DONE, words),
            _ => quic::ended(error),
        }
    }

    fn peer_name(&self) -> String {
        self.peer
            .as_ref()
            .map_or_else(|| format!("{}", self.remote), Peer::to_string)
    }

    fn fault(&self, end: StreamEnd) -> Fault {
        let peer = self.peer_name();
        let fault = match end {
            StreamEnd::LineGone => {
                let why = self
                    .ended()
                    .map_or_else(|| "it is closing".to_owned(), |ended| ended.reason);
                Fault::unreachable(format!("the connection to {peer} is closed: {why}"))
            }
            StreamEnd::Stopped => Fault::unreachable(format!("{peer} no longer reads this stream")),
            StreamEnd::Reset => Fault::unreachable(format!("{peer} reset this stream")),
            StreamEnd::Finished => {
                Fault::internal(format!("write to a stream to {peer} after its end"))
            }
        };
        fault.with_reason(match self.peer {
            Some(Peer::Hub(_)) => Reason::HubUnreachable,
            Some(Peer::Site(_) | Peer::Publisher(_)) | None => Reason::SiteOffline,
        })
    }
}

/// A pending request over a connection, whose answer is not read yet.
pub struct Want {
    _wanted: Option<window::Wanted>,
}

/// One connection. Cheap to clone. It closes when the last clone and the last half of a stream are
/// dropped.
#[derive(Clone)]
pub struct Link {
    inner: Arc<Inner>,
}

impl PartialEq for Link {
    /// Whether both are the same connection.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("peer", &self.inner.peer)
            .field("transport", &self.transport())
            .finish_non_exhaustive()
    }
}

impl Link {
    fn new(wire: Wire, peer: Option<Peer>, remote: SocketAddr) -> Self {
        Self::made(wire, peer, remote, None, None)
    }

    /// A connection of the hub to a peer that has shown this certificate, with an adjustable receive
    /// window.
    fn windowed(
        wire: Wire,
        (peer, certificate): (Peer, Certificate),
        remote: SocketAddr,
        window: Arc<window::Window>,
    ) -> Self {
        Self::made(wire, Some(peer), remote, Some(window), Some(certificate))
    }

    fn made(
        wire: Wire,
        peer: Option<Peer>,
        remote: SocketAddr,
        window: Option<Arc<window::Window>>,
        certificate: Option<Certificate>,
    ) -> Self {
        let span = spans::connection(remote, peer.as_ref(), wire.name());
        Self {
            inner: Arc::new(Inner {
                wire,
                peer,
                remote,
                span,
                ordered: AtomicU32::new(0),
                write_order: WriteOrder::default(),
                hub_clock: OnceLock::new(),
                manifest_format: AtomicU32::new(1),
                certificate,
                renew_only: AtomicBool::new(false),
                reason: Mutex::new(None),
                last_words: Mutex::new(None),
                written: AtomicU64::new(0),
                read: window
                    .as_ref()
                    .map_or_else(Arc::default, |window| window.read.clone()),
                window,
            }),
        }
    }

    /// Opens a stream. Streams of a higher priority are sent first. Among equal priorities, QUIC
    /// sends the stream first that got its priority first, and TCP alternates. Waits while 256
    /// streams are open. The peer may learn of the stream only with its first byte.
    pub async fn open(&self, priority: i32) -> Result<(SendHalf, RecvHalf), Fault> {
        match &self.inner.wire {
            Wire::Quic { connection, .. } => {
                let (send, recv) = connection
                    .open_bi()
                    .await
                    .map_err(|_| self.inner.fault(StreamEnd::LineGone))?;
                let position = self.inner.position_of(priority);
                let _ = send.set_priority(position);
                Ok(self.halves(SendWire::Quic(send), RecvWire::Quic(recv), position))
            }
            Wire::Tcp { mux, .. } => {
                let (send, recv) = mux.open(priority).await.map_err(|e| self.inner.fault(e))?;
                Ok(self.halves(SendWire::Tcp(send), RecvWire::Tcp(recv), 0))
            }
        }
    }

    /// Records a request over this connection. While the returned value exists, the peer may send
    /// more.
    pub fn want(&self) -> Want {
        Want {
            _wanted: self.inner.window.as_ref().map(window::Window::want),
        }
    }

    /// The next stream that the peer opened; `None` after the end of the connection.
    pub async fn accept(&self) -> Option<(SendHalf, RecvHalf)> {
        match &self.inner.wire {
            Wire::Quic { connection, .. } => {
                let (send, recv) = connection.accept_bi().await.ok()?;
                Some(self.halves(SendWire::Quic(send), RecvWire::Quic(recv), 0))
            }
            Wire::Tcp { mux, .. } => {
                let (send, recv) = mux.accept().await?;
                Some(self.halves(SendWire::Tcp(send), RecvWire::Tcp(recv), 0))
            }
        }
    }

    fn halves(&self, send: SendWire, recv: RecvWire, position: i32) -> (SendHalf, RecvHalf) {
        (
            SendHalf {
                wire: send,
                link: self.inner.clone(),
                position,
                is_over: false,
            },
            RecvHalf {
                wire: recv,
                link: self.inner.clone(),
            },
        )
    }

    /// Closes the connection immediately and discards data in flight. The peer receives the reason.
    pub fn close(&self, reason: &str) {
        self.close_with(CLOSE_DONE, reason);
    }

    /// Closes the connection, and tells the peer that it is not allowed, and why.
    pub fn refuse(&self, reason: &str) {
        self.close_with(CLOSE_REFUSED, reason);
    }

    /// Like [`Link::refuse`], but what the kernel holds for a slow peer is discarded after
    /// 0.3 s, with the reason if the peer has not taken it.
    pub fn sever(&self, reason: &str) {
        if let Wire::Tcp { traffic, .. } = &self.inner.wire {
            traffic.sever();
        }
        self.refuse(reason);
    }

    /// At the hub: the certificate of the peer; `None` for a joining one.
    pub fn certificate(&self) -> Option<&Certificate> {
        self.inner.certificate.as_ref()
    }

    /// Whether the certificate of the connecting end is expired, so that it may only renew it over
    /// this connection.
    pub fn is_for_renewal(&self) -> bool {
        let expired = |certificate: &Certificate| certificate.expired.is_some();
        self.inner.certificate.as_ref().is_some_and(expired)
            || self.inner.renew_only.load(Ordering::Relaxed)
    }

    /// The reason with which the peer refused this end after the welcome.
    pub fn refusal(&self) -> Option<String> {
        self.inner
            .ended()
            .filter(|ended| ended.by_peer && ended.code == Some(CLOSE_REFUSED))
            .map(|ended| ended.reason)
    }

    fn close_with(&self, code: u32, reason: &str) {
        let reason = clean(reason);
        match &self.inner.wire {
            Wire::Quic { connection, .. } => {
                self.inner
                    .last_words
                    .lock()
                    .get_or_insert_with(|| reason.clone());
                connection.close(code.into(), reason.as_bytes());
            }
            Wire::Tcp { mux, traffic } => mux.close(code, &reason, traffic.is_severed()),
        }
    }

    /// By how many milliseconds the clock of the hub is ahead of this machine, according to the
    /// welcome of the hub.
    pub fn hub_clock_ahead_ms(&self) -> Option<i64> {
        let (hub_ms, at) = self.inner.hub_clock.get()?;
        let hub_now_ms = hub_ms.saturating_add(at.elapsed().as_millis() as u64);
        Some(i64::try_from(hub_now_ms).ok()? - i64::try_from(base::clock::now_unix_ms()).ok()?)
    }

    /// The newest format of manifests that the hub and all its sites read, according to the welcome
    /// of the hub. A hub of an earlier version reads the first format.
    pub fn manifest_format(&self) -> u32 {
        self.inner.manifest_format.load(Ordering::Relaxed)
    }

    /// The rate above which the path drops what this end sends, in bytes per second; `None` if it
    /// does not, and on TCP.
    pub fn limited_rate(&self) -> Option<u64> {
        match &self.inner.wire {
            Wire::Quic { choice, .. } => choice.limited(std::time::Instant::now()),
            Wire::Tcp { .. } => None,
        }
    }

    /// Why the connection is over TCP although QUIC is allowed.
    pub fn reason(&self) -> Option<String> {
        self.inner.reason.lock().clone()
    }

    /// Sets [`Link::reason`]. The end that dials knows it.
    pub fn set_reason(&self, reason: impl Into<String>) {
        *self.inner.reason.lock() = Some(reason.into());
    }

    /// Closes the connection and waits briefly until the close message is sent. The connecting side
    /// calls this before the process ends; the hub has [`Listener::wait_idle`].
    pub async fn close_and_flush(&self, reason: &str) {
        self.close(reason);
        if let Wire::Quic {
            endpoint: Some(endpoint),
            ..
        } = &self.inner.wire
        {
            let _ = tokio::time::timeout(FLUSH_MAX, endpoint.wait_idle()).await;
        }
    }

    /// Sets the congestion control for sending on an open connection. On TCP the congestion control
    /// of the kernel does not change.
    pub fn set_congestion(&self, congestion: Congestion) {
        if let Wire::Quic { choice, .. } = &self.inner.wire {
            choice.set(congestion);
        }
    }

    /// The current setting of [`Link::set_congestion`]; `None` on TCP.
    #[cfg(any(test, feature = "testing"))]
    pub fn congestion(&self) -> Option<Congestion> {
        match &self.inner.wire {
            Wire::Quic { choice, .. } => Some(choice.get()),
            Wire::Tcp { .. } => None,
        }
    }

    /// Waits for the end of the connection. Returns the reason.
    pub async fn closed(&self) -> String {
        self.wait_ended().await.reason
    }

    async fn wait_ended(&self) -> Ended {
        match &self.inner.wire {
            Wire::Quic { connection, .. } => {
                let error = connection.closed().await;
                self.inner.translate(&error)
            }
            Wire::Tcp { mux, .. } => mux.closed().await,
        }
    }

    pub fn is_closed(&self) -> bool {
        self.inner.ended().is_some()
    }

    /// The peer according to its certificate; `None` for a site that has not joined yet.
    pub fn peer(&self) -> Option<&Peer> {
        self.inner.peer.as_ref()
    }

    /// `quic` or `tcp`.
    pub fn transport(&self) -> &'static str {
        self.inner.wire.name()
    }

    /// The span of the log for what is done over this line.
    pub fn span(&self) -> Span {
        self.inner.span.clone()
    }

    /// The round trip time: smoothed on QUIC; on TCP from one ping every 5 s, which waits behind
    /// queued data.
    pub fn rtt(&self) -> Duration {
        match &self.inner.wire {
            Wire::Quic { connection, .. } => connection.rtt(),
            Wire::Tcp { mux, .. } => mux.rtt(),
        }
    }

    /// The current address of the peer; a QUIC connection survives a change of address.
    pub fn remote_address(&self) -> SocketAddr {
        match &self.inner.wire {
            Wire::Quic { connection, .. } => connection.remote_address(),
            Wire::Tcp { .. } => self.inner.remote,
        }
    }

    /// Bytes (sent, received) over UDP or TCP so far, including TLS, framing and QUIC
    /// retransmissions.
    pub fn bytes(&self) -> (u64, u64) {
        match &self.inner.wire {
            Wire::Quic { connection, .. } => {
                let stats = connection.stats();
                (stats.udp_tx.bytes, stats.udp_rx.bytes)
            }
            Wire::Tcp { traffic, .. } => traffic.bytes(),
        }
    }

    /// Bytes of streams (written, read) at this end so far. Unlike [`Link::bytes`], this excludes
    /// keep-alive packets and data that was not read.
    pub fn stream_bytes(&self) -> (u64, u64) {
        (
            self.inner.written.load(Ordering::Relaxed),
            self.inner.read.load(Ordering::Relaxed),
        )
    }
}

#[cfg(test)]
mod gate_tests;
#[cfg(test)]
mod paced_tests;
#[cfg(test)]
mod routes_tests;
#[cfg(test)]
mod stopped_tests;
#[cfg(test)]
pub(crate) mod tests;

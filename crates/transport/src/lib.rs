//! The line between a hub and a site: one connection with many streams, QUIC or, where UDP is
//! blocked, TCP + TLS.
//!
//! The hub binds a [`Listener`] (UDP and TCP on one port number) and takes [`Arrival`]s; a site
//! [`join`]s once and then [`dial`]s. Either way both hold a [`Link`], which opens and accepts
//! streams of a [`SendHalf`] and a [`RecvHalf`]. Both ends are authenticated by certificates of the
//! hub's CA, TLS 1.3 only, without 0-RTT or session tickets. What the streams carry is not known
//! here.
//!
//! ALPN `packhorse/1` wants a site's certificate. `packhorse-join/1` wants none: it carries one
//! request with a join token and is answered with a certificate. After the handshake of
//! `packhorse/1` the hub sends a `hello::Welcome` on a stream of its own, so that a site that was
//! refused learns why before it does anything.
//!
//! Memory is bounded by the windows in [`base::limits`] whatever the peer does. Nothing of a
//! connection survives a crash, nor has to; [`identity`] keeps keys and certificates on disk, each
//! replaced as a whole.

mod bbr;
mod congestion;
mod dial;
mod hello;
pub mod identity;
mod listen;
mod mux;
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

pub use dial::{clock_difference, dial, join, probe_quic};
pub use listen::{Arrival, JoinRequest, Listener};
pub use redial::Redial;
pub use settings::{Congestion, ConnectionSettings, Transport};
pub use stream::{RecvHalf, SendHalf};
use stream::{RecvWire, SendWire};
use write_order::WriteOrder;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;

use crate::identity::Holder;
use base::fault::{Fault, Reason};
use base::limits::CONNECTION_REASON_BYTES_MAX;
use base::text;

/// Ended because the work is done.
pub(crate) const CLOSE_DONE: u32 = 0;
/// The peer is not allowed here; the reason says why.
pub(crate) const CLOSE_REFUSED: u32 = 1;
/// The peer broke the protocol.
pub(crate) const CLOSE_VIOLATION: u32 = 2;
/// There is no room for this connection now; the peer may try again.
pub(crate) const CLOSE_BUSY: u32 = 3;
/// The peer's certificate has expired by the clock of this end; the reason ends with the time of
/// that clock.
pub(crate) const CLOSE_CLOCK: u32 = 4;

/// Priority of streams that carry control messages: they go before everything else.
pub const PRIORITY_CONTROL: i32 = 100;
/// Priority of streams that carry bulk data.
pub const PRIORITY_BULK: i32 = 0;

/// ChunkIndex in the order of streams of one priority; after so many it begins anew, and once a
/// young stream goes first.
const PLACES: u32 = 1 << 24;

/// How a line ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ended {
    by_peer: bool,
    /// `None`: nobody closed it, it broke.
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

/// A peer's words may go to a log or a terminal: no control characters, and not many.
fn clean(text: &str) -> String {
    let text: String = text
        .chars()
        .map(|c| if text::is_unsafe(c) { '?' } else { c })
        .collect();
    text::prefix(&text, CONNECTION_REASON_BYTES_MAX).into()
}

/// Why a half of a stream goes no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamEnd {
    /// The whole line is over.
    LineGone,
    /// Nobody reads it any more.
    Stopped,
    /// It was finished or reset by this end before.
    Finished,
    /// The writing end gave it up.
    Reset,
}

/// The longest wait for a goodbye to leave this machine.
const FLUSH_MAX: Duration = Duration::from_secs(1);

enum Wire {
    /// A dialled line has an endpoint to itself.
    Quic {
        connection: quinn::Connection,
        endpoint: Option<quinn::Endpoint>,
        choice: congestion::Choice,
    },
    Tcp {
        mux: mux::Mux,
        traffic: Arc<tcp::Traffic>,
    },
}

struct Inner {
    wire: Wire,
    /// `None`: a site that has not joined yet.
    peer: Option<Holder>,
    remote: SocketAddr,
    /// How many streams were given a priority.
    ordered: AtomicU32,
    /// Whose turn it is to write, on QUIC.
    write_order: WriteOrder,
    /// The hub's clock when it welcomed this end, in milliseconds since 1970, and that moment.
    hub_clock: OnceLock<(u64, std::time::Instant)>,
    /// What this end said when it closed a QUIC connection, which quinn does not keep.
    last_words: Mutex<Option<String>>,
    /// Bytes of streams that this end wrote…
    written: AtomicU64,
    /// …and that it read.
    read: Arc<AtomicU64>,
    /// How much may lie unread; `None`: no more than is the same for all.
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

    /// quinn's priority for the next stream of this one. Streams of one priority are sent one
    /// behind the other: a packet from each of 32 answers in turn would wake 32 tasks for a packet
    /// each, and what is lost of an old answer would have to wait behind all the younger ones.
    fn place_of(&self, priority: i32) -> i32 {
        let place = self.ordered.fetch_add(1, Ordering::Relaxed) % PLACES;
        priority.clamp(0, PRIORITY_CONTROL) * PLACES as i32 - place as i32
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
            .map_or_else(|| format!("{}", self.remote), Holder::to_string)
    }

    fn fault(&self, end: StreamEnd) -> Fault {
        let peer = self.peer_name();
        let fault = match end {
            StreamEnd::LineGone => {
                let why = self
                    .ended()
                    .map_or_else(|| "it is closing".to_owned(), |ended| ended.reason);
                Fault::unreachable(format!("the line to {peer} is gone: {why}"))
            }
            StreamEnd::Stopped => {
                Fault::unreachable(format!("{peer} does not read this stream any more"))
            }
            StreamEnd::Reset => Fault::unreachable(format!("{peer} gave this stream up")),
            StreamEnd::Finished => {
                Fault::internal(format!("a stream to {peer} is written to after its end"))
            }
        };
        fault.with_reason(match self.peer {
            Some(Holder::Hub(_)) => Reason::HubUnreachable,
            Some(Holder::Site(_) | Holder::Publisher(_)) | None => Reason::SiteOffline,
        })
    }
}

/// Something that was asked for over a line, whose answer is not read yet.
pub struct Want {
    _wanted: Option<window::Wanted>,
}

/// One line. Cheap to clone; the line closes when the last clone and the last half of a stream are
/// gone.
#[derive(Clone)]
pub struct Link {
    inner: Arc<Inner>,
}

impl PartialEq for Link {
    /// Whether both are the same line.
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
    fn new(wire: Wire, peer: Option<Holder>, remote: SocketAddr) -> Self {
        Self::made(wire, peer, remote, None)
    }

    /// A line of a hub.
    fn windowed(
        wire: Wire,
        peer: Holder,
        remote: SocketAddr,
        window: Option<Arc<window::Window>>,
    ) -> Self {
        Self::made(wire, Some(peer), remote, window)
    }

    fn made(
        wire: Wire,
        peer: Option<Holder>,
        remote: SocketAddr,
        window: Option<Arc<window::Window>>,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                wire,
                peer,
                remote,
                ordered: AtomicU32::new(0),
                write_order: WriteOrder::default(),
                hub_clock: OnceLock::new(),
                last_words: Mutex::new(None),
                written: AtomicU64::new(0),
                read: window
                    .as_ref()
                    .map_or_else(Arc::default, |window| window.read.clone()),
                window,
            }),
        }
    }

    /// Opens a stream. Streams of a higher priority are sent first; of equal ones, on QUIC the one
    /// that was given its priority first, while on TCP they take turns. Waits while 256 are open.
    /// The peer may learn of the stream only with its first byte.
    pub async fn open(&self, priority: i32) -> Result<(SendHalf, RecvHalf), Fault> {
        match &self.inner.wire {
            Wire::Quic { connection, .. } => {
                let (send, recv) = connection
                    .open_bi()
                    .await
                    .map_err(|_| self.inner.fault(StreamEnd::LineGone))?;
                let place = self.inner.place_of(priority);
                let _ = send.set_priority(place);
                Ok(self.halves(SendWire::Quic(send), RecvWire::Quic(recv), place))
            }
            Wire::Tcp { mux, .. } => {
                let (send, recv) = mux.open(priority).await.map_err(|e| self.inner.fault(e))?;
                Ok(self.halves(SendWire::Tcp(send), RecvWire::Tcp(recv), 0))
            }
        }
    }

    /// Notes that something is asked for over this line, for as long as what is returned is kept:
    /// its peer may send more meanwhile.
    pub fn want(&self) -> Want {
        Want {
            _wanted: self.inner.window.as_ref().map(window::Window::want),
        }
    }

    /// The next stream that the peer opened; `None` when the line is over.
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

    fn halves(&self, send: SendWire, recv: RecvWire, place: i32) -> (SendHalf, RecvHalf) {
        (
            SendHalf {
                wire: send,
                link: self.inner.clone(),
                place,
                over: false,
            },
            RecvHalf {
                wire: recv,
                link: self.inner.clone(),
            },
        )
    }

    /// Closes the line at once, whatever is on its way; the peer is told the reason.
    pub fn close(&self, reason: &str) {
        self.close_with(CLOSE_DONE, reason);
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
            Wire::Tcp { mux, .. } => mux.close(code, &reason),
        }
    }

    /// By how many milliseconds the hub's clock is ahead of this machine's, as far as the hub's
    /// welcome tells.
    pub fn hub_clock_ahead_ms(&self) -> Option<i64> {
        let (hub_ms, at) = self.inner.hub_clock.get()?;
        let hub_now_ms = hub_ms.saturating_add(at.elapsed().as_millis() as u64);
        Some(i64::try_from(hub_now_ms).ok()? - i64::try_from(base::clock::now_unix_ms()).ok()?)
    }

    /// Closes the line, and waits a moment for the goodbye to leave: to be called by the dialling
    /// side before the process ends (the hub has [`Listener::wait_idle`]).
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

    /// Sets the congestion control of what this end sends, while the line stands. On TCP the
    /// kernel's stays as it was chosen.
    pub fn set_congestion(&self, congestion: Congestion) {
        if let Wire::Quic { choice, .. } = &self.inner.wire {
            choice.set(congestion);
        }
    }

    /// What [`Link::set_congestion`] has set; `None` on TCP.
    #[cfg(any(test, feature = "testing"))]
    pub fn congestion(&self) -> Option<Congestion> {
        match &self.inner.wire {
            Wire::Quic { choice, .. } => Some(choice.get()),
            Wire::Tcp { .. } => None,
        }
    }

    /// Waits for the end of the line; says why it ended.
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

    /// Whether the line is over.
    pub fn is_closed(&self) -> bool {
        self.inner.ended().is_some()
    }

    /// Who is at the other end, as its certificate says; `None` for a site that has not joined yet.
    pub fn peer(&self) -> Option<&Holder> {
        self.inner.peer.as_ref()
    }

    /// `quic` or `tcp`.
    pub fn transport(&self) -> &'static str {
        match &self.inner.wire {
            Wire::Quic { .. } => "quic",
            Wire::Tcp { .. } => "tcp",
        }
    }

    /// The round trip: smoothed on QUIC; on TCP the last of one ping each 5 s, which waits behind
    /// what is being sent.
    pub fn rtt(&self) -> Duration {
        match &self.inner.wire {
            Wire::Quic { connection, .. } => connection.rtt(),
            Wire::Tcp { mux, .. } => mux.rtt(),
        }
    }

    /// Where the other end is now; a QUIC line survives a change of it.
    pub fn remote_address(&self) -> SocketAddr {
        match &self.inner.wire {
            Wire::Quic { connection, .. } => connection.remote_address(),
            Wire::Tcp { .. } => self.inner.remote,
        }
    }

    /// Bytes (sent, received) so far as UDP or TCP carried them: TLS, framing and what was sent
    /// again by QUIC included.
    pub fn bytes(&self) -> (u64, u64) {
        match &self.inner.wire {
            Wire::Quic { connection, .. } => {
                let stats = connection.stats();
                (stats.udp_tx.bytes, stats.udp_rx.bytes)
            }
            Wire::Tcp { traffic, .. } => traffic.bytes(),
        }
    }

    /// Bytes of streams (written, read) at this end so far. Unlike [`Link::bytes`] it counts no
    /// packets that only keep the connection open, and no data that nobody asked for.
    pub fn stream_bytes(&self) -> (u64, u64) {
        (
            self.inner.written.load(Ordering::Relaxed),
            self.inner.read.load(Ordering::Relaxed),
        )
    }
}

#[cfg(test)]
pub(crate) mod tests;

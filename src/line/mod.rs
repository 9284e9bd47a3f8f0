//! The line between a hub and a site: one connection with many streams, QUIC or, where UDP is blocked, TCP + TLS.
//!
//! The hub binds a [`Listener`] (UDP and TCP on one port number) and takes [`Arrival`]s; a site [`join`]s once and then
//! [`dial`]s. Either way both hold a [`Link`], which opens and accepts streams of a [`SendHalf`] and a [`RecvHalf`]. Both
//! ends are authenticated by certificates of the hub's CA, TLS 1.3 only, without 0-RTT or session tickets. What the streams carry
//! is not known here.
//!
//! ALPN `packhorse/1` wants a site's certificate. `packhorse-join/1` wants none: it carries one request with a join token and
//! is answered with a certificate. After the handshake of `packhorse/1` the hub sends a [`hello::Welcome`] on a stream of its
//! own, so that a site that was refused learns why before it does anything.
//!
//! Memory is bounded by the windows in [`crate::limits`] whatever the peer does. Nothing here survives a crash, nor has to.

mod congestion;
mod dial;
mod hello;
mod listen;
mod mux;
mod quic;
mod tcp;
mod tls;

pub use dial::{dial, join, probe_quic};
pub use listen::{Arrival, JoinRequest, Listener};

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::fault::{Fault, Reason};
use crate::identity::Holder;
use crate::limits::LINE_REASON_BYTES_MAX;

/// Ended because the work is done.
pub(crate) const CLOSE_DONE: u32 = 0;
/// The peer is not allowed here; the reason says why.
pub(crate) const CLOSE_REFUSED: u32 = 1;
/// The peer broke the protocol.
pub(crate) const CLOSE_VIOLATION: u32 = 2;

/// Priority of streams that carry control messages: they go before everything else.
pub const PRIORITY_CONTROL: i32 = 100;
/// Priority of streams that carry bulk data.
pub const PRIORITY_BULK: i32 = 0;

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
        Self { by_peer: false, code: Some(code), reason: clean(reason) }
    }

    fn by_peer(code: u32, reason: &[u8]) -> Self {
        Self { by_peer: true, code: Some(code), reason: clean(&String::from_utf8_lossy(reason)) }
    }

    fn lost(reason: &str) -> Self {
        Self { by_peer: false, code: None, reason: clean(reason) }
    }

    fn from_io(error: &std::io::Error) -> Self {
        match error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::AlertReceived(alert)) => {
                Self::by_peer(CLOSE_REFUSED, format!("the TLS handshake was refused: {alert:?}").as_bytes())
            }
            _ => Self::lost(&error.to_string()),
        }
    }
}

/// A peer's words may go to a log or a terminal: no control characters, and not many.
fn clean(text: &str) -> String {
    let mut out: String = text.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    let mut end = out.len().min(LINE_REASON_BYTES_MAX);
    while !out.is_char_boundary(end) {
        end -= 1;
    }
    out.truncate(end);
    out
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
    /// What this end said when it closed a QUIC connection, which quinn does not keep.
    last_words: Mutex<Option<String>>,
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

    fn translate(&self, error: &quinn::ConnectionError) -> Ended {
        match (error, &*self.last_words.lock()) {
            (quinn::ConnectionError::LocallyClosed, Some(words)) => Ended::by_us(CLOSE_DONE, words),
            _ => quic::ended(error),
        }
    }

    fn peer_name(&self) -> String {
        self.peer.as_ref().map_or_else(|| format!("{}", self.remote), Holder::to_string)
    }

    fn fault(&self, end: StreamEnd) -> Fault {
        let peer = self.peer_name();
        let fault = match end {
            StreamEnd::LineGone => {
                let why = self.ended().map_or_else(|| "it is closing".to_owned(), |ended| ended.reason);
                Fault::unreachable(format!("the line to {peer} is gone: {why}"))
            }
            StreamEnd::Stopped => Fault::unreachable(format!("{peer} does not read this stream any more")),
            StreamEnd::Reset => Fault::unreachable(format!("{peer} gave this stream up")),
            StreamEnd::Finished => Fault::internal(format!("a stream to {peer} is written to after its end")),
        };
        fault.with_reason(match self.peer {
            Some(Holder::Hub(_)) => Reason::HubUnreachable,
            Some(Holder::Site(_)) | None => Reason::SiteOffline,
        })
    }
}

/// One line. Cheap to clone; the line closes when the last clone and the last half of a stream are gone.
#[derive(Clone)]
pub struct Link {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("peer", &self.inner.peer).field("transport", &self.transport()).finish_non_exhaustive()
    }
}

impl Link {
    fn new(wire: Wire, peer: Option<Holder>, remote: SocketAddr) -> Self {
        Self { inner: Arc::new(Inner { wire, peer, remote, last_words: Mutex::new(None) }) }
    }

    /// Opens a stream. Streams of a higher priority are sent first; equal ones take turns. Waits while 256 are open. The peer
    /// may learn of the stream only with its first byte.
    pub async fn open(&self, priority: i32) -> Result<(SendHalf, RecvHalf), Fault> {
        match &self.inner.wire {
            Wire::Quic { connection, .. } => {
                let (send, recv) = connection.open_bi().await.map_err(|_| self.inner.fault(StreamEnd::LineGone))?;
                let _ = send.set_priority(priority);
                Ok(self.halves(SendWire::Quic(send), RecvWire::Quic(recv)))
            }
            Wire::Tcp { mux, .. } => {
                let (send, recv) = mux.open(priority).await.map_err(|e| self.inner.fault(e))?;
                Ok(self.halves(SendWire::Tcp(send), RecvWire::Tcp(recv)))
            }
        }
    }

    /// The next stream that the peer opened; `None` when the line is over.
    pub async fn accept(&self) -> Option<(SendHalf, RecvHalf)> {
        match &self.inner.wire {
            Wire::Quic { connection, .. } => {
                let (send, recv) = connection.accept_bi().await.ok()?;
                Some(self.halves(SendWire::Quic(send), RecvWire::Quic(recv)))
            }
            Wire::Tcp { mux, .. } => {
                let (send, recv) = mux.accept().await?;
                Some(self.halves(SendWire::Tcp(send), RecvWire::Tcp(recv)))
            }
        }
    }

    fn halves(&self, send: SendWire, recv: RecvWire) -> (SendHalf, RecvHalf) {
        (SendHalf { wire: send, link: self.inner.clone(), over: false }, RecvHalf { wire: recv, link: self.inner.clone() })
    }

    /// Closes the line at once, whatever is on its way; the peer is told the reason.
    pub fn close(&self, reason: &str) {
        self.close_with(CLOSE_DONE, reason);
    }

    fn close_with(&self, code: u32, reason: &str) {
        let reason = clean(reason);
        match &self.inner.wire {
            Wire::Quic { connection, .. } => {
                self.inner.last_words.lock().get_or_insert_with(|| reason.clone());
                connection.close(code.into(), reason.as_bytes());
            }
            Wire::Tcp { mux, .. } => mux.close(code, &reason),
        }
    }

    /// Closes the line, and waits a moment for the goodbye to leave: to be called by the dialling side before the process ends (the
    /// hub has [`Listener::wait_idle`]).
    pub async fn close_and_flush(&self, reason: &str) {
        self.close(reason);
        if let Wire::Quic { endpoint: Some(endpoint), .. } = &self.inner.wire {
            let _ = tokio::time::timeout(FLUSH_MAX, endpoint.wait_idle()).await;
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

    /// The round trip: smoothed on QUIC; on TCP the last of one ping each 5 s, which waits behind what is being sent.
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

    /// Bytes (sent, received) so far as UDP or TCP carried them: TLS, framing and what was sent again by QUIC included.
    pub fn bytes(&self) -> (u64, u64) {
        match &self.inner.wire {
            Wire::Quic { connection, .. } => {
                let stats = connection.stats();
                (stats.udp_tx.bytes, stats.udp_rx.bytes)
            }
            Wire::Tcp { traffic, .. } => traffic.bytes(),
        }
    }
}

enum SendWire {
    Quic(quinn::SendStream),
    Tcp(mux::SendStream),
}

/// The writing half of a stream. Dropped unfinished it is reset, so that the peer cannot take a part for the whole.
pub struct SendHalf {
    wire: SendWire,
    link: Arc<Inner>,
    over: bool,
}

impl SendHalf {
    /// Writes all of it, copying.
    pub async fn write_all(&mut self, data: &[u8]) -> Result<(), Fault> {
        let result = match &mut self.wire {
            SendWire::Quic(stream) => stream.write_all(data).await.map_err(write_end),
            SendWire::Tcp(stream) => stream.write_all(data).await,
        };
        result.map_err(|e| self.link.fault(e))
    }

    /// Writes all of it without copying.
    pub async fn write_bytes(&mut self, data: Bytes) -> Result<(), Fault> {
        let result = match &mut self.wire {
            SendWire::Quic(stream) => stream.write_chunk(data).await.map_err(write_end),
            SendWire::Tcp(stream) => stream.write_bytes(data).await,
        };
        result.map_err(|e| self.link.fault(e))
    }

    /// Says that nothing more comes. What was written is still delivered, as long as the line stands.
    pub fn finish(&mut self) -> Result<(), Fault> {
        self.over = true;
        let result = match &mut self.wire {
            SendWire::Quic(stream) => stream.finish().map_err(|_| StreamEnd::Finished),
            SendWire::Tcp(stream) => stream.finish(),
        };
        result.map_err(|e| self.link.fault(e))
    }

    /// Gives the stream up: the peer's next read fails.
    pub fn reset(&mut self) {
        self.over = true;
        match &mut self.wire {
            SendWire::Quic(stream) => {
                let _ = stream.reset(CLOSE_DONE.into());
            }
            SendWire::Tcp(stream) => stream.reset(),
        }
    }

    /// Changes the priority; an accepted stream begins with 0.
    pub fn set_priority(&self, priority: i32) {
        match &self.wire {
            SendWire::Quic(stream) => {
                let _ = stream.set_priority(priority);
            }
            SendWire::Tcp(stream) => stream.set_priority(priority),
        }
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        // quinn would finish the stream in good order here.
        if !self.over {
            self.reset();
        }
    }
}

fn write_end(error: quinn::WriteError) -> StreamEnd {
    match error {
        quinn::WriteError::Stopped(_) => StreamEnd::Stopped,
        quinn::WriteError::ConnectionLost(_) | quinn::WriteError::ZeroRttRejected => StreamEnd::LineGone,
        quinn::WriteError::ClosedStream => StreamEnd::Finished,
    }
}

enum RecvWire {
    Quic(quinn::RecvStream),
    Tcp(mux::RecvStream),
}

/// The reading half of a stream. Dropped before the end, it tells the peer to stop.
pub struct RecvHalf {
    wire: RecvWire,
    link: Arc<Inner>,
}

impl RecvHalf {
    /// Fills the whole buffer; an end before that is a fault.
    pub async fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), Fault> {
        let mut filled = 0;
        while filled < buffer.len() {
            let rest = &mut buffer[filled..];
            let read = match &mut self.wire {
                RecvWire::Quic(stream) => stream.read(rest).await.map_err(read_end),
                RecvWire::Tcp(stream) => {
                    let chunk = stream.read_chunk(rest.len()).await;
                    chunk.map(|chunk| {
                        chunk.map(|bytes| {
                            rest[..bytes.len()].copy_from_slice(&bytes);
                            bytes.len()
                        })
                    })
                }
            };
            match read.map_err(|e| self.link.fault(e))? {
                Some(read) => filled += read,
                None => {
                    let message = format!("{} ended a stream {} bytes too early", self.link.peer_name(), buffer.len() - filled);
                    return Err(Fault::unreachable(message).with_reason(self.link.fault(StreamEnd::Reset).reason));
                }
            }
        }
        Ok(())
    }

    /// The next bytes as they came, at most `max`, without copying; `None` at the end.
    pub async fn read_chunk(&mut self, max: usize) -> Result<Option<Bytes>, Fault> {
        let result = match &mut self.wire {
            RecvWire::Quic(stream) => match stream.read_chunk(max, true).await {
                Ok(chunk) => Ok(chunk.map(|c| c.bytes)),
                Err(error) => Err(read_end(error)),
            },
            RecvWire::Tcp(stream) => stream.read_chunk(max).await,
        };
        result.map_err(|e| self.link.fault(e))
    }

    /// The next pieces as they came, as many as there are and as `pieces` has places, without copying; `None` at the end.
    /// On QUIC a piece is at most a packet, so this is much cheaper than [`RecvHalf::read_chunk`] in a loop.
    pub async fn read_chunks(&mut self, pieces: &mut [Bytes]) -> Result<Option<usize>, Fault> {
        let result = match &mut self.wire {
            RecvWire::Quic(stream) => stream.read_chunks(pieces).await.map_err(read_end),
            RecvWire::Tcp(stream) => match (pieces, stream.read_chunk(usize::MAX).await) {
                ([first, ..], Ok(Some(bytes))) => {
                    *first = bytes;
                    Ok(Some(1))
                }
                ([], Ok(Some(_))) => Ok(Some(0)),
                (_, Ok(None)) => Ok(None),
                (_, Err(error)) => Err(error),
            },
        };
        result.map_err(|e| self.link.fault(e))
    }

    /// Everything up to the end, which must come within `limit` bytes.
    pub async fn read_to_end(&mut self, limit: usize) -> Result<Vec<u8>, Fault> {
        let mut all = Vec::new();
        while let Some(bytes) = self.read_chunk(limit + 1 - all.len()).await? {
            all.extend_from_slice(&bytes);
            if all.len() > limit {
                self.stop();
                return Err(Fault::integrity(format!("{} sent a message of more than {limit} bytes", self.link.peer_name()))
                    .with_next("make sure that both ends run the same version"));
            }
        }
        Ok(all)
    }

    /// Reads no more and tells the peer so.
    pub fn stop(&mut self) {
        match &mut self.wire {
            RecvWire::Quic(stream) => {
                let _ = stream.stop(CLOSE_DONE.into());
            }
            RecvWire::Tcp(stream) => stream.stop(),
        }
    }
}

fn read_end(error: quinn::ReadError) -> StreamEnd {
    match error {
        quinn::ReadError::Reset(_) => StreamEnd::Reset,
        quinn::ReadError::ConnectionLost(_) | quinn::ReadError::ZeroRttRejected => StreamEnd::LineGone,
        quinn::ReadError::ClosedStream | quinn::ReadError::IllegalOrderedRead => StreamEnd::Stopped,
    }
}

#[cfg(test)]
mod tests;

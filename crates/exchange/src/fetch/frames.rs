//! The answer to a fetch request: frames, received from a peer and not verified yet.
//!
//! [`Fetcher::ask`](super::Fetcher::ask) creates it. An answer that makes no progress is abandoned;
//! a connection on which no stream makes progress is closed.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::time::{Instant, timeout};

use super::PIECES;
use base::buffers::Buffers;
use base::fault::{Fault, Reason, Retry};
use base::limits::{FETCH_PROGRESS_BYTES, SILENCE_MAX};
use content::frame::{Frame, FrameError, HEADER_BYTES, Header};
use transport::{Link, RecvHalf, SendHalf, Want};

/// How often a connection with an overdue answer is checked.
pub(super) const CHECK_EVERY: Duration = Duration::from_secs(5);
/// Room for the frame that exceeds the requested bytes.
const FRAME_BYTES_USUAL: usize = HEADER_BYTES + (128 << 10);
/// Frame buffers that are kept while a transfer runs…
const BUFFERS_KEPT: usize = 16;
/// …each of at most this size.
const BUFFER_BYTES_MAX: usize = 2 << 20;

/// The frames of one request, one by one or several at a time.
pub struct Frames {
    link: Link,
    recv: RecvHalf,
    wire: Arc<AtomicU64>,
    /// How long this stream may deliver less than [`FETCH_PROGRESS_BYTES`] while it is awaited…
    idle_max: Duration,
    /// …how long it was awaited since its last progress, and the bytes since then.
    waited: Duration,
    received: u64,
    /// Received bytes that are not part of a frame yet.
    pieces: VecDeque<Bytes>,
    /// Why the answer ended early, reported after the frames before it were taken.
    ended: Option<Fault>,
    /// Holds the request's stream until the answer is read…
    _send: SendHalf,
    /// …and its permit.
    _want: Want,
}

/// The ends of a request that was sent.
pub(super) struct Stream {
    pub(super) link: Link,
    pub(super) send: SendHalf,
    pub(super) recv: RecvHalf,
    pub(super) want: Want,
}

fn silent() -> Fault {
    Fault::unreachable(format!(
        "the connection was silent for {} s",
        SILENCE_MAX.as_secs()
    ))
    .with_reason(Reason::HubUnreachable)
}

fn stalled(idle_max: Duration) -> Fault {
    broken(Fault::unreachable(format!(
        "an answer made no progress for {} s, although the connection works",
        idle_max.as_secs()
    )))
}

/// A broken connection is not a fault of the transfer, which resumes over the next one.
pub(super) fn broken(fault: Fault) -> Fault {
    Fault {
        retry: Retry::Backoff,
        ..fault.with_reason(Reason::HubUnreachable)
    }
}

impl Frames {
    /// Nothing was received yet. `wire` counts the transmitted bytes.
    pub(super) fn new(stream: Stream, wire: Arc<AtomicU64>, idle_max: Duration) -> Self {
        Self {
            link: stream.link,
            recv: stream.recv,
            wire,
            idle_max,
            waited: Duration::ZERO,
            received: 0,
            pieces: VecDeque::new(),
            ended: None,
            _send: stream.send,
            _want: stream.want,
        }
    }

    /// The next frame as the peer sent it: its checksum and its hash are not verified yet;
    /// [`Frame::verify`] does that.
    pub async fn next(&mut self) -> Result<Frame, Fault> {
        let mut bytes = Vec::new();
        let (header, _) = self.append(&mut bytes).await?;
        frame(header, bytes.into())
    }

    /// The next frames, up to `bytes` and at most `count`, in one buffer of `buffers`. When the
    /// answer ends early, the frames before the end are returned first.
    pub async fn some(
        &mut self,
        count: usize,
        bytes: usize,
        buffers: &Buffers,
    ) -> Result<Vec<Frame>, Fault> {
        if let Some(fault) = self.ended.take() {
            return Err(fault);
        }
        let mut buffer = buffers.take(bytes + FRAME_BYTES_USUAL);
        buffer.clear();
        buffer.reserve(bytes + FRAME_BYTES_USUAL);
        let mut found: Vec<(Header, Range<usize>)> = Vec::new();
        while found.len() < count && buffer.len() < bytes {
            match self.append(&mut buffer).await {
                Ok(frame) => found.push(frame),
                Err(fault) if found.is_empty() => return Err(fault),
                Err(fault) => {
                    self.ended = Some(fault);
                    break;
                }
            }
        }
        let all = buffers.lend(buffer);
        found
            .into_iter()
            .map(|(header, range)| frame(header, all.slice(range)))
            .collect()
    }

    /// Appends one frame to the buffer.
    async fn append(&mut self, buffer: &mut Vec<u8>) -> Result<(Header, Range<usize>), Fault> {
        let start = buffer.len();
        let mut head = [0; HEADER_BYTES];
        self.take(HEADER_BYTES, buffer).await?;
        head.copy_from_slice(&buffer[start..]);
        let header = Header::parse(&head).map_err(Fault::from)?;
        buffer.reserve(header.stored_len as usize);
        self.take(header.stored_len as usize, buffer).await?;
        self.wire
            .fetch_add(header.frame_len() as u64, Ordering::Relaxed);
        if header.is_fault() {
            // It ends the answer.
            frame(header, Bytes::copy_from_slice(&buffer[start..]))?;
        }
        Ok((header, start..buffer.len()))
    }

    /// Moves exactly `len` bytes from the connection to the end of the buffer: one copy, without
    /// zeroing before.
    async fn take(&mut self, mut len: usize, buffer: &mut Vec<u8>) -> Result<(), Fault> {
        while len > 0 {
            let Some(first) = self.pieces.front_mut() else {
                self.read().await?;
                continue;
            };
            let part = first.len().min(len);
            buffer.extend_from_slice(&first[..part]);
            first.advance(part);
            len -= part;
            if first.is_empty() {
                self.pieces.pop_front();
            }
        }
        Ok(())
    }

    async fn read(&mut self) -> Result<(), Fault> {
        let mut pieces = [const { Bytes::new() }; PIECES];
        let begun = Instant::now();
        let count = {
            let read = self.recv.read_chunks(&mut pieces);
            tokio::pin!(read);
            // The bytes of all streams of the connection at their last progress, and the time of
            // that.
            let mut seen: Option<(u64, Instant)> = None;
            loop {
                let check_after =
                    CHECK_EVERY.min(self.idle_max.saturating_sub(self.waited + begun.elapsed()));
                if let Ok(result) = timeout(check_after, &mut read).await {
                    break result.map_err(broken)?;
                }
                if self.waited + begun.elapsed() >= self.idle_max {
                    // Only this answer is given up: the connection may serve others.
                    return Err(stalled(self.idle_max));
                }
                // On a slow connection this stream may wait long for others: a connection is
                // silent only if none of its streams delivers.
                let received = self.link.stream_bytes().1;
                match seen {
                    Some((before, since)) if received == before => {
                        if since.elapsed() >= SILENCE_MAX {
                            // Packets may still be answered; the next request opens a new
                            // connection.
                            self.link.close("it made no progress for too long");
                            return Err(silent());
                        }
                    }
                    _ => seen = Some((received, Instant::now())),
                }
            }
        };
        let Some(count) = count else {
            return Err(broken(Fault::unreachable(
                "the answer to a fetch ended too early",
            )));
        };
        self.waited += begun.elapsed();
        self.received += pieces
            .iter()
            .take(count)
            .map(|piece| piece.len() as u64)
            .sum::<u64>();
        if self.received >= FETCH_PROGRESS_BYTES {
            (self.waited, self.received) = (Duration::ZERO, 0);
        }
        self.pieces.extend(
            pieces
                .into_iter()
                .take(count)
                .filter(|piece| !piece.is_empty()),
        );
        Ok(())
    }
}

/// Parses a frame. A frame that carries a fault becomes that fault.
pub(super) fn frame(header: Header, bytes: Bytes) -> Result<Frame, Fault> {
    match Frame::from_line(header, bytes) {
        Err(FrameError::Fault(fault)) => Err(fault),
        other => Ok(other?),
    }
}

/// Frame buffers of one transfer.
pub fn buffers() -> Buffers {
    Buffers::new(BUFFERS_KEPT, FRAME_BYTES_USUAL, BUFFER_BYTES_MAX)
}

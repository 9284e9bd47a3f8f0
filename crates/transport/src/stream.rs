//! The two halves of a stream, with the same interface over QUIC and TCP.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::{CLOSE_DONE, Inner, StreamEnd, mux};
use base::fault::Fault;

pub(super) enum SendWire {
    Quic(quinn::SendStream),
    Tcp(mux::SendStream),
}

/// The writing half of a stream. Dropping it before `finish` resets the stream, so that the peer
/// never takes a part for the whole.
pub struct SendHalf {
    pub(super) wire: SendWire,
    pub(super) link: Arc<Inner>,
    /// The position in the write order, on QUIC.
    pub(super) position: i32,
    pub(super) is_over: bool,
}

impl SendHalf {
    /// Copies and writes all of `data`.
    pub async fn write_all(&mut self, data: &[u8]) -> Result<(), Fault> {
        let result = match &mut self.wire {
            SendWire::Quic(_) => return self.write_bytes(Bytes::copy_from_slice(data)).await,
            SendWire::Tcp(stream) => stream.write_all(data).await,
        };
        self.link
            .written
            .fetch_add(data.len() as u64, Ordering::Relaxed);
        result.map_err(|e| self.link.fault(e))
    }

    /// Writes all of `data`, without a copy unless much data is queued on a TCP connection.
    pub async fn write_bytes(&mut self, data: Bytes) -> Result<(), Fault> {
        let len = data.len() as u64;
        let result = match &mut self.wire {
            SendWire::Quic(_) => return self.write_many(&mut [data]).await,
            SendWire::Tcp(stream) => stream.write_bytes(data).await,
        };
        self.link.written.fetch_add(len, Ordering::Relaxed);
        result.map_err(|e| self.link.fault(e))
    }

    /// Like [`SendHalf::write_bytes`], for consecutive pieces.
    pub async fn write_many(&mut self, pieces: &mut [Bytes]) -> Result<(), Fault> {
        let len: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        let result = match &mut self.wire {
            SendWire::Quic(stream) => self
                .link
                .write_order
                .write(stream, self.position, pieces, || self.link.fit_send_room())
                .await
                .map_err(|e| write_end(&e)),
            SendWire::Tcp(stream) => stream.write_many(pieces).await,
        };
        self.link.written.fetch_add(len, Ordering::Relaxed);
        result.map_err(|e| self.link.fault(e))
    }

    /// Ends the stream. Written data is still delivered while the connection is open, on QUIC even
    /// if the peer stops reading; [`SendHalf::delivered`] prevents that.
    pub fn finish(&mut self) -> Result<(), Fault> {
        self.is_over = true;
        let result = match &mut self.wire {
            SendWire::Quic(stream) => stream.finish().map_err(|_| StreamEnd::Finished),
            SendWire::Tcp(stream) => stream.finish(),
        };
        result.map_err(|e| self.link.fault(e))
    }

    /// Keeps a finished stream until the peer has received everything or stops reading. quinn
    /// sends what it has buffered even if the peer stops reading, unless the stream is reset.
    pub async fn delivered(mut self) {
        let SendWire::Quic(stream) = &mut self.wire else {
            return;
        };
        if let Ok(Some(_)) = stream.stopped().await {
            let _ = stream.reset(CLOSE_DONE.into());
        }
    }

    /// Resets the stream: the next read of the peer fails.
    pub fn reset(&mut self) {
        self.is_over = true;
        match &mut self.wire {
            SendWire::Quic(stream) => {
                let _ = stream.reset(CLOSE_DONE.into());
            }
            SendWire::Tcp(stream) => stream.reset(),
        }
    }

    /// Changes the priority. An accepted stream starts with 0.
    pub fn set_priority(&mut self, priority: i32) {
        match &self.wire {
            SendWire::Quic(stream) => {
                self.position = self.link.position_of(priority);
                let _ = stream.set_priority(self.position);
            }
            SendWire::Tcp(stream) => stream.set_priority(priority),
        }
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        // quinn would finish the stream normally here.
        if !self.is_over {
            self.reset();
        }
    }
}

fn write_end(error: &quinn::WriteError) -> StreamEnd {
    match error {
        quinn::WriteError::Stopped(_) => StreamEnd::Stopped,
        quinn::WriteError::ConnectionLost(_) | quinn::WriteError::ZeroRttRejected => {
            StreamEnd::LineGone
        }
        quinn::WriteError::ClosedStream => StreamEnd::Finished,
    }
}

pub(super) enum RecvWire {
    Quic(quinn::RecvStream),
    Tcp(mux::RecvStream),
}

/// The reading half of a stream. Dropping it before the end asks the peer to stop.
pub struct RecvHalf {
    pub(super) wire: RecvWire,
    pub(super) link: Arc<Inner>,
}

impl RecvHalf {
    /// Fills the complete buffer. An earlier end is a fault.
    pub async fn read_exact(&mut self, buffer: &mut [u8]) -> Result<(), Fault> {
        let mut filled = 0;
        while filled < buffer.len() {
            let rest = &mut buffer[filled..];
            let read = match &mut self.wire {
                RecvWire::Quic(stream) => stream.read(rest).await.map_err(|e| read_end(&e)),
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
                Some(read) => {
                    filled += read;
                    self.link.read.fetch_add(read as u64, Ordering::Relaxed);
                }
                None => {
                    let message = format!(
                        "{} ended a stream {} bytes before its expected end",
                        self.link.peer_name(),
                        buffer.len() - filled
                    );
                    return Err(Fault::unreachable(message)
                        .with_reason(self.link.fault(StreamEnd::Reset).reason));
                }
            }
        }
        Ok(())
    }

    /// The next received bytes, at most `max`, without a copy; `None` at the end.
    pub async fn read_chunk(&mut self, max: usize) -> Result<Option<Bytes>, Fault> {
        let result = match &mut self.wire {
            RecvWire::Quic(stream) => match stream.read_chunk(max, true).await {
                Ok(chunk) => Ok(chunk.map(|c| c.bytes)),
                Err(error) => Err(read_end(&error)),
            },
            RecvWire::Tcp(stream) => stream.read_chunk(max).await,
        };
        if let Ok(Some(bytes)) = &result {
            self.link
                .read
                .fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        result.map_err(|e| self.link.fault(e))
    }

    /// The next received pieces, as many as are available and as fit in `pieces`, without a copy;
    /// `None` at the end. On QUIC a piece is at most one packet, so this is much cheaper than
    /// calling [`RecvHalf::read_chunk`] repeatedly.
    pub async fn read_chunks(&mut self, pieces: &mut [Bytes]) -> Result<Option<usize>, Fault> {
        let result = match &mut self.wire {
            RecvWire::Quic(stream) => stream.read_chunks(pieces).await.map_err(|e| read_end(&e)),
            RecvWire::Tcp(stream) => match (&mut *pieces, stream.read_chunk(usize::MAX).await) {
                ([first, ..], Ok(Some(bytes))) => {
                    *first = bytes;
                    Ok(Some(1))
                }
                ([], Ok(Some(_))) => Ok(Some(0)),
                (_, Ok(None)) => Ok(None),
                (_, Err(error)) => Err(error),
            },
        };
        if let Ok(Some(count)) = result {
            let read: u64 = pieces
                .iter()
                .take(count)
                .map(|piece| piece.len() as u64)
                .sum();
            self.link.read.fetch_add(read, Ordering::Relaxed);
        }
        result.map_err(|e| self.link.fault(e))
    }

    /// All bytes up to the end, which may be at most `limit`.
    pub async fn read_to_end(&mut self, limit: usize) -> Result<Vec<u8>, Fault> {
        let mut all = Vec::new();
        while let Some(bytes) = self.read_chunk(limit + 1 - all.len()).await? {
            all.extend_from_slice(&bytes);
            if all.len() > limit {
                self.stop();
                return Err(Fault::integrity(format!(
                    "{} sent a message of more than {limit} bytes",
                    self.link.peer_name()
                ))
                .with_next("make sure that both ends run the same version"));
            }
        }
        Ok(all)
    }

    /// Stops reading and informs the peer.
    pub fn stop(&mut self) {
        match &mut self.wire {
            RecvWire::Quic(stream) => {
                let _ = stream.stop(CLOSE_DONE.into());
            }
            RecvWire::Tcp(stream) => stream.stop(),
        }
    }
}

fn read_end(error: &quinn::ReadError) -> StreamEnd {
    match error {
        quinn::ReadError::Reset(_) => StreamEnd::Reset,
        quinn::ReadError::ConnectionLost(_) | quinn::ReadError::ZeroRttRejected => {
            StreamEnd::LineGone
        }
        quinn::ReadError::ClosedStream | quinn::ReadError::IllegalOrderedRead => StreamEnd::Stopped,
    }
}

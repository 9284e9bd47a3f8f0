//! The receiving side: unread data of each stream, and the windows that limit it.
//!
//! `on_frame` adds the data of the peer; the reading halves take it ([`State::poll_read`]). A peer
//! may send [`CONNECTION_STREAM_WINDOW_BYTES`] per stream and [`CONNECTION_WINDOW_BYTES`] in total
//! before anything is read. Small pieces are joined, so that their bookkeeping stays small.
//!
//! Credit that was granted cannot be taken back, and every peer begins with the complete window.
//! The memory is therefore limited in another way: while the unread data of the connection exceeds
//! its limit, the driver reads nothing from the socket ([`State::is_full`]), and TCP stops the peer.

use std::collections::VecDeque;
use std::task::{Poll, Waker};

use bytes::{BufMut, Bytes, BytesMut};

use super::{State, Stream};
use crate::StreamEnd;
use crate::mux::frame::{Kind, put_header};
use base::limits::{CONNECTION_STREAM_WINDOW_BYTES, CONNECTION_WINDOW_BYTES};

/// Received pieces smaller than this are joined, because each piece has an overhead of about a
/// hundred bytes.
const SMALL_PIECE_BYTES: usize = 2048;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Receiving {
    Open,
    Finished,
    Reset,
}

/// The direction of a stream that this end reads.
pub(super) struct Incoming {
    receiving: Receiving,
    pieces: VecDeque<Bytes>,
    /// Small pieces that come after `pieces`, joined.
    tail: BytesMut,
    buffered: usize,
    /// The number of bytes that the peer may still send.
    window: u32,
    /// Bytes that were read but not yet returned to the peer as credit.
    unannounced: u32,
    /// Whether further data is discarded, because there is no reader.
    discarding: bool,
    reader_gone: bool,
    reader: Option<Waker>,
}

impl Incoming {
    pub(super) fn new() -> Self {
        Self {
            receiving: Receiving::Open,
            pieces: VecDeque::new(),
            tail: BytesMut::new(),
            buffered: 0,
            window: CONNECTION_STREAM_WINDOW_BYTES,
            unannounced: 0,
            discarding: false,
            reader_gone: false,
            reader: None,
        }
    }

    /// Whether the peer may still send on the stream.
    pub(super) fn is_open(&self) -> bool {
        self.receiving == Receiving::Open
    }

    /// Whether the reading half still exists.
    pub(super) fn has_reader(&self) -> bool {
        !self.reader_gone
    }

    /// Discards unread data. Returns its size.
    pub(super) fn clear(&mut self) -> usize {
        // Their capacity is memory too, and the stream may exist for a while.
        self.pieces = VecDeque::new();
        self.tail = BytesMut::new();
        std::mem::take(&mut self.buffered)
    }

    pub(super) fn wake(&mut self) {
        if let Some(waker) = self.reader.take() {
            waker.wake();
        }
    }

    fn push(&mut self, body: Bytes) {
        self.buffered += body.len();
        if body.len() < SMALL_PIECE_BYTES {
            self.tail.extend_from_slice(&body);
            return;
        }
        if !self.tail.is_empty() {
            self.pieces.push_back(self.tail.split().freeze());
        }
        self.pieces.push_back(body);
    }

    fn pop(&mut self, max: usize) -> Option<Bytes> {
        let taken = match self.pieces.front_mut() {
            Some(piece) if piece.len() > max => piece.split_to(max),
            Some(_) => self.pieces.pop_front()?,
            None if self.tail.is_empty() => return None,
            None if self.tail.len() <= max => std::mem::take(&mut self.tail).freeze(),
            None => self.tail.split_to(max).freeze(),
        };
        self.buffered -= taken.len();
        Some(taken)
    }
}

impl State {
    pub(in crate::mux) fn poll_read(
        &mut self,
        id: u32,
        max: usize,
        waker: &Waker,
    ) -> Poll<Result<Option<Bytes>, StreamEnd>> {
        if self.ended.is_some() {
            return Poll::Ready(Err(StreamEnd::LineGone));
        }
        let Some(Stream { incoming, .. }) = self.streams.get_mut(&id) else {
            return Poll::Ready(Err(StreamEnd::Stopped));
        };
        if incoming.discarding {
            return Poll::Ready(Err(StreamEnd::Stopped));
        }
        if let Some(bytes) = incoming.pop(max.max(1)) {
            incoming.unannounced += bytes.len() as u32;
            let credit_is_due =
                incoming.is_open() && incoming.unannounced >= CONNECTION_STREAM_WINDOW_BYTES / 2;
            if credit_is_due {
                let credit = std::mem::take(&mut incoming.unannounced);
                incoming.window += credit;
                self.put_credit(id, credit);
            }
            self.release(bytes.len());
            return Poll::Ready(Ok(Some(bytes)));
        }
        match incoming.receiving {
            Receiving::Finished => Poll::Ready(Ok(None)),
            Receiving::Reset => Poll::Ready(Err(StreamEnd::Reset)),
            Receiving::Open => {
                incoming.reader = Some(waker.clone());
                Poll::Pending
            }
        }
    }

    /// Stops reading: discards unread data and asks the peer to stop.
    pub(in crate::mux) fn stop(&mut self, id: u32) {
        let Some(Stream { incoming, .. }) = self.streams.get_mut(&id) else {
            return;
        };
        if incoming.discarding {
            return;
        }
        incoming.discarding = true;
        let dropped = incoming.clear();
        if incoming.is_open() {
            self.put_control(Kind::Stop, id);
        }
        self.release(dropped);
    }

    /// Called when the reading half was dropped.
    pub(in crate::mux) fn reader_gone(&mut self, id: u32) {
        self.stop(id);
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.incoming.reader_gone = true;
        }
        self.settle(id);
    }

    pub(super) fn on_data(&mut self, id: u32, body: Bytes, is_last: bool) -> Result<(), String> {
        let len = body.len() as u32;
        let Some(Stream { incoming, .. }) =
            self.streams.get_mut(&id).filter(|s| s.incoming.is_open())
        else {
            return Err(format!("data for stream {id}, which is not open"));
        };
        if len > incoming.window || len > self.window {
            return Err(format!("more data than its credit on stream {id}"));
        }
        incoming.window -= len;
        self.window -= len;
        let dropped = if incoming.discarding { body.len() } else { 0 };
        if !incoming.discarding && len > 0 {
            self.unread += body.len();
            incoming.push(body);
        }
        if is_last {
            incoming.receiving = Receiving::Finished;
        }
        incoming.wake();
        self.consumed(dropped);
        if is_last {
            self.settle(id);
        }
        Ok(())
    }

    pub(super) fn on_reset(&mut self, id: u32) -> Result<(), String> {
        self.check_known(id)?;
        let Some(Stream { incoming, .. }) =
            self.streams.get_mut(&id).filter(|s| s.incoming.is_open())
        else {
            return Ok(());
        };
        incoming.receiving = Receiving::Reset;
        incoming.wake();
        let dropped = incoming.clear();
        self.release(dropped);
        self.settle(id);
        Ok(())
    }

    /// Sets the number of unread bytes from which nothing more is read from the socket.
    pub(in crate::mux) fn set_unread_limit(&mut self, bytes: u64) {
        self.unread_limit = usize::try_from(bytes).unwrap_or(usize::MAX);
        self.effects.read |= !self.is_full();
    }

    /// Whether the driver must not read from the socket.
    pub(in crate::mux) fn is_full(&self) -> bool {
        self.unread >= self.unread_limit
    }

    #[cfg(test)]
    pub(in crate::mux) fn unread(&self) -> usize {
        self.unread
    }

    /// Records that unread bytes left the buffers.
    fn release(&mut self, bytes: usize) {
        let was_full = self.is_full();
        self.unread -= bytes;
        self.effects.read |= was_full && !self.is_full();
        self.consumed(bytes);
    }

    /// Records that bytes were taken from the window. Sends credit to the peer after a quarter of
    /// it.
    fn consumed(&mut self, bytes: usize) {
        self.unannounced += bytes as u32;
        if self.unannounced >= CONNECTION_WINDOW_BYTES / 4 {
            let credit = std::mem::take(&mut self.unannounced);
            self.window += credit;
            self.put_credit(0, credit);
        }
    }

    fn put_credit(&mut self, id: u32, credit: u32) {
        put_header(&mut self.control, Kind::Credit, id, 4);
        self.control.put_u32(credit);
        self.effects.write = true;
    }
}

#[cfg(test)]
mod tests {
    use super::{Bytes, Incoming};

    #[test]
    fn data_that_was_read_or_discarded_leaves_no_memory() {
        for discard in [false, true] {
            let mut incoming = Incoming::new();
            for _ in 0..100 {
                incoming.push(Bytes::from_static(&[7; 1000]));
            }
            assert!(incoming.tail.capacity() >= 100_000);
            if discard {
                assert_eq!(incoming.clear(), 100_000);
            } else {
                let mut read = 0;
                while let Some(piece) = incoming.pop(64 << 10) {
                    read += piece.len();
                }
                assert_eq!(read, 100_000);
            }
            assert_eq!((incoming.tail.capacity(), incoming.buffered), (0, 0));
        }
    }
}

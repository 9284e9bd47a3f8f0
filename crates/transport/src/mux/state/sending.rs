//! The sending side: the queue of each stream, the credit from the peer, and which stream sends
//! next.
//!
//! The writing halves add pieces ([`State::poll_write`]); the driver takes batches
//! ([`State::take_batch`]); `on_frame` processes the answers of the peer. While the connection
//! holds less than its limit, a complete piece is queued. Above the limit, at most
//! [`MUX_STREAM_QUEUE_BYTES`] are queued per stream, so no stream waits for the queue of another.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::task::{Poll, Waker};

use bytes::Bytes;

use super::{State, Stream};
use crate::StreamEnd;
use crate::mux::frame::{HEADER_BYTES, Kind, put_header};
use base::limits::{
    CONNECTION_STREAM_WINDOW_BYTES, MUX_BATCH_BYTES, MUX_FRAME_BYTES_MAX, MUX_STREAM_QUEUE_BYTES,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sending {
    Open,
    Finishing,
    Finished,
    Reset,
    /// The peer no longer reads. The reset is sent when this end accepts the stream.
    StopAsked,
    Stopped,
}

/// The direction of a stream that this end writes.
pub(super) struct Outgoing {
    priority: i32,
    sending: Sending,
    queue: VecDeque<Bytes>,
    queued: usize,
    /// The bytes taken from the first piece of the queue. Its memory is held until the rest is
    /// taken.
    taken_of_front: usize,
    credit: u64,
    scheduled: bool,
    writer: Option<Waker>,
}

impl Outgoing {
    pub(super) fn new(priority: i32) -> Self {
        Self {
            priority,
            sending: Sending::Open,
            queue: VecDeque::new(),
            queued: 0,
            taken_of_front: 0,
            credit: CONNECTION_STREAM_WINDOW_BYTES.into(),
            scheduled: false,
            writer: None,
        }
    }

    /// Whether the end of the stream was sent to the peer.
    pub(super) fn is_over(&self) -> bool {
        matches!(
            self.sending,
            Sending::Finished | Sending::Reset | Sending::Stopped
        )
    }

    /// Discards the queue. Returns by how much the held memory decreases.
    pub(super) fn clear(&mut self) -> usize {
        self.queue.clear();
        std::mem::take(&mut self.queued) + std::mem::take(&mut self.taken_of_front)
    }

    pub(super) fn wake(&mut self) {
        if let Some(waker) = self.writer.take() {
            waker.wake();
        }
    }

    /// Moves `len` bytes from the front of the queue to `out` without copying. Returns by how much
    /// the held memory decreases.
    fn take_queued(&mut self, mut len: usize, out: &mut VecDeque<Bytes>) -> usize {
        let mut freed = 0;
        self.queued -= len;
        while len > 0 {
            let Some(front) = self.queue.front_mut() else {
                break;
            };
            let piece = if front.len() > len {
                front.split_to(len)
            } else {
                std::mem::take(front)
            };
            self.taken_of_front += piece.len();
            if front.is_empty() {
                self.queue.pop_front();
                freed += std::mem::take(&mut self.taken_of_front);
            }
            len -= piece.len();
            out.push_back(piece);
        }
        freed
    }

    fn has_to_send(&self) -> bool {
        match self.sending {
            Sending::Open => self.queued > 0 && self.credit > 0,
            Sending::Finishing => self.queued == 0 || self.credit > 0,
            Sending::Finished | Sending::Reset | Sending::StopAsked | Sending::Stopped => false,
        }
    }
}

impl State {
    pub(in crate::mux) fn set_priority(&mut self, id: u32, priority: i32) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.outgoing.priority = priority;
        }
    }

    /// Queues `data` when the queue of the stream is short enough: all of it, or in parts if the
    /// connection is at its limit.
    pub(in crate::mux) fn poll_write(
        &mut self,
        id: u32,
        data: &mut Bytes,
        waker: &Waker,
    ) -> Poll<Result<(), StreamEnd>> {
        if self.ended.is_some() {
            return Poll::Ready(Err(StreamEnd::LineGone));
        }
        let Some(Stream { outgoing, .. }) = self.streams.get_mut(&id) else {
            return Poll::Ready(Err(StreamEnd::Stopped));
        };
        match outgoing.sending {
            Sending::Open => {}
            Sending::StopAsked | Sending::Stopped => return Poll::Ready(Err(StreamEnd::Stopped)),
            Sending::Finishing | Sending::Finished | Sending::Reset => {
                return Poll::Ready(Err(StreamEnd::Finished));
            }
        }
        if data.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let room = MUX_STREAM_QUEUE_BYTES.saturating_sub(outgoing.queued);
        let piece = if room > 0 && self.held < self.queue_limit {
            std::mem::take(data)
        } else if room >= data.len().min(MUX_STREAM_QUEUE_BYTES / 2) {
            // Copy: a slice would keep the memory of the complete piece after the writer has
            // continued.
            Bytes::copy_from_slice(&data.split_to(room.min(data.len())))
        } else {
            Bytes::new()
        };
        if !data.is_empty() {
            outgoing.writer = Some(waker.clone());
        }
        if !piece.is_empty() {
            outgoing.queued += piece.len();
            self.held += piece.len();
            outgoing.queue.push_back(piece);
            self.schedule(id);
        }
        if data.is_empty() {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    }

    pub(in crate::mux) fn finish(&mut self, id: u32) -> Result<(), StreamEnd> {
        if self.ended.is_some() {
            return Err(StreamEnd::LineGone);
        }
        let Some(Stream { outgoing, .. }) = self.streams.get_mut(&id) else {
            return Err(StreamEnd::Stopped);
        };
        match outgoing.sending {
            Sending::Open => outgoing.sending = Sending::Finishing,
            Sending::Stopped => return Err(StreamEnd::Stopped),
            Sending::Finishing | Sending::Finished | Sending::Reset | Sending::StopAsked => {
                return Err(StreamEnd::Finished);
            }
        }
        self.schedule(id);
        Ok(())
    }

    /// Aborts the stream and discards unsent data. Does nothing if all data was sent.
    pub(in crate::mux) fn reset(&mut self, id: u32) {
        self.abort(id, Sending::Reset);
    }

    fn abort(&mut self, id: u32, how: Sending) {
        let Some(Stream { outgoing, .. }) = self.streams.get_mut(&id) else {
            return;
        };
        if outgoing.is_over() {
            return;
        }
        outgoing.sending = how;
        self.held -= outgoing.clear();
        outgoing.wake();
        self.put_control(Kind::Reset, id);
        self.settle(id);
    }

    /// A stream that was not accepted keeps its slot until then, at both ends. Otherwise a peer
    /// could fill the accept queue.
    pub(super) fn on_stop(&mut self, id: u32) -> Result<(), String> {
        self.check_known(id)?;
        match self.streams.get_mut(&id) {
            Some(stream) if !stream.is_taken => stream.outgoing.sending = Sending::StopAsked,
            _ => self.abort(id, Sending::Stopped),
        }
        Ok(())
    }

    /// Called when a stream was accepted: sends the reset if the peer asked to stop before.
    pub(super) fn answer_stop(&mut self, id: u32) {
        if self
            .streams
            .get(&id)
            .is_some_and(|stream| stream.outgoing.sending == Sending::StopAsked)
        {
            self.abort(id, Sending::Stopped);
        }
    }

    /// Adds credit from the peer, for a stream or for the connection (stream 0).
    pub(super) fn on_credit(&mut self, id: u32, credit: u32) -> Result<(), String> {
        if id == 0 {
            self.send_credit = self.send_credit.saturating_add(credit.into());
            self.effects.write = true;
            return Ok(());
        }
        self.check_known(id)?;
        if let Some(Stream { outgoing, .. }) = self.streams.get_mut(&id) {
            outgoing.credit = outgoing.credit.saturating_add(credit.into());
            self.schedule(id);
        }
        Ok(())
    }

    /// Takes the next data to send: control frames, then data by priority, up to about
    /// [`MUX_BATCH_BYTES`].
    pub(in crate::mux) fn take_batch(&mut self, out: &mut VecDeque<Bytes>) {
        if !self.control.is_empty() {
            out.push_back(self.control.split().freeze());
        }
        let mut room = MUX_BATCH_BYTES;
        while room > 0 && self.send_credit > 0 {
            let Some(mut streams) = self.ready.first_entry() else {
                break;
            };
            let next = streams.get_mut().pop_front();
            if streams.get().is_empty() {
                streams.remove();
            }
            let Some(id) = next else { continue };
            let Some(Stream { outgoing, .. }) = self.streams.get_mut(&id) else {
                continue;
            };
            outgoing.scheduled = false;
            if !outgoing.has_to_send() {
                continue;
            }
            let allowed = outgoing
                .credit
                .min(self.send_credit)
                .min(MUX_FRAME_BYTES_MAX as u64) as usize;
            let len = outgoing.queued.min(allowed);
            let is_last = outgoing.sending == Sending::Finishing && len == outgoing.queued;
            self.headers.reserve(HEADER_BYTES);
            put_header(
                &mut self.headers,
                if is_last { Kind::End } else { Kind::Data },
                id,
                len,
            );
            out.push_back(self.headers.split().freeze());
            self.held -= outgoing.take_queued(len, out);
            outgoing.credit -= len as u64;
            self.send_credit -= len as u64;
            room = room.saturating_sub(len + HEADER_BYTES);
            if is_last {
                outgoing.sending = Sending::Finished;
            } else if outgoing.queued < MUX_STREAM_QUEUE_BYTES {
                outgoing.wake();
            }
            if is_last {
                self.settle(id);
            } else {
                self.schedule(id);
            }
        }
    }

    fn schedule(&mut self, id: u32) {
        let Some(Stream { outgoing, .. }) = self.streams.get_mut(&id) else {
            return;
        };
        if !outgoing.scheduled && outgoing.has_to_send() {
            outgoing.scheduled = true;
            self.ready
                .entry(Reverse(outgoing.priority))
                .or_default()
                .push_back(id);
            self.effects.write = true;
        }
    }
}

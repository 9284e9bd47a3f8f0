//! What goes out: the queue of each stream, what the peer allows, and which stream goes next.
//!
//! The writing halves put pieces in ([`State::poll_write`]), the driver takes batches out
//! ([`State::take_batch`]), and `on_frame` brings what the peer says of it. A piece is taken whole
//! while the line holds less than what it may hold, and beyond that [`MUX_STREAM_QUEUE_BYTES`] a
//! stream: no stream waits for what another has queued.

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
    /// The peer reads no more, and will be answered with a reset once somebody here takes the
    /// stream.
    StopAsked,
    Stopped,
}

/// The direction of a stream that this end writes.
pub(super) struct Outgoing {
    priority: i32,
    sending: Sending,
    queue: VecDeque<Bytes>,
    queued: usize,
    /// What was taken of the first piece in the queue; its memory is held until the rest is taken.
    begun: usize,
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
            begun: 0,
            credit: CONNECTION_STREAM_WINDOW_BYTES.into(),
            scheduled: false,
            writer: None,
        }
    }

    /// Whether the peer has heard the end of it.
    pub(super) fn is_over(&self) -> bool {
        matches!(
            self.sending,
            Sending::Finished | Sending::Reset | Sending::Stopped
        )
    }

    /// Drops what is queued. Returns how much less is held.
    pub(super) fn clear(&mut self) -> usize {
        self.queue.clear();
        std::mem::take(&mut self.queued) + std::mem::take(&mut self.begun)
    }

    pub(super) fn wake(&mut self) {
        if let Some(waker) = self.writer.take() {
            waker.wake();
        }
    }

    /// Moves `len` bytes from the queue's front to `out` without copying. Returns how much less is
    /// held.
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
            self.begun += piece.len();
            if front.is_empty() {
                self.queue.pop_front();
                freed += std::mem::take(&mut self.begun);
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

    /// Takes `data` into the stream's queue once that is short enough: all of it, or a part at a
    /// time where the line holds much.
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
        let piece = if room > 0 && self.held < self.hold_max {
            std::mem::take(data)
        } else if room >= data.len().min(MUX_STREAM_QUEUE_BYTES / 2) {
            // A copy: as small as it is, a part of the piece would hold the memory of all of it
            // after its writer has gone on.
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

    /// Gives up what was not sent yet; nothing happens when all was.
    pub(in crate::mux) fn reset(&mut self, id: u32) {
        self.give_up(id, Sending::Reset);
    }

    fn give_up(&mut self, id: u32, how: Sending) {
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

    /// A stream that waits to be taken keeps its place until then, at both ends: else a peer could
    /// fill the queue of those that wait.
    pub(super) fn on_stop(&mut self, id: u32) -> Result<(), String> {
        self.check_known(id)?;
        match self.streams.get_mut(&id) {
            Some(stream) if !stream.taken => stream.outgoing.sending = Sending::StopAsked,
            _ => self.give_up(id, Sending::Stopped),
        }
        Ok(())
    }

    /// The stream was taken: if the peer asked meanwhile to stop, it hears the answer now.
    pub(super) fn answer_stop(&mut self, id: u32) {
        if self
            .streams
            .get(&id)
            .is_some_and(|stream| stream.outgoing.sending == Sending::StopAsked)
        {
            self.give_up(id, Sending::Stopped);
        }
    }

    /// The peer makes room: in its window of this stream, or of the line (stream 0).
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

    /// Takes what is to be sent next: control frames, then data by priority, up to about
    /// [`MUX_BATCH_BYTES`].
    pub(in crate::mux) fn take_batch(&mut self, out: &mut VecDeque<Bytes>) {
        if !self.control.is_empty() {
            out.push_back(self.control.split().freeze());
        }
        let mut room = MUX_BATCH_BYTES;
        while room > 0 && self.send_credit > 0 {
            let Some(mut lane) = self.ready.first_entry() else {
                break;
            };
            let next = lane.get_mut().pop_front();
            if lane.get().is_empty() {
                lane.remove();
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
            let last = outgoing.sending == Sending::Finishing && len == outgoing.queued;
            self.headers.reserve(HEADER_BYTES);
            put_header(
                &mut self.headers,
                if last { Kind::End } else { Kind::Data },
                id,
                len,
            );
            out.push_back(self.headers.split().freeze());
            self.held -= outgoing.take_queued(len, out);
            outgoing.credit -= len as u64;
            self.send_credit -= len as u64;
            room = room.saturating_sub(len + HEADER_BYTES);
            if last {
                outgoing.sending = Sending::Finished;
            } else if outgoing.queued < MUX_STREAM_QUEUE_BYTES {
                outgoing.wake();
            }
            if last {
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

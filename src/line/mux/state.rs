//! The core of the TCP line: streams, windows and priorities, without any I/O.
//!
//! Frames go in by [`State::on_frame`] and come out by [`State::take_batch`]; the halves of streams call the rest. What must
//! happen outside (wake the writer, wake an acceptor, free a place) is gathered in [`Effects`].
//!
//! Memory is bounded: a peer may send [`LINE_STREAM_WINDOW_BYTES`] a stream and [`LINE_WINDOW_BYTES`] in all before the
//! reader takes something, small pieces are joined so that their bookkeeping cannot outgrow them, and control frames that a
//! peer provokes without reading end the line. What is to be sent is taken in whole pieces while the line holds less than
//! [`MUX_LINE_QUEUE_BYTES`], and beyond that [`MUX_STREAM_QUEUE_BYTES`] a stream: no stream waits for what another has queued.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::frame::{HEADER_BYTES, Header, Kind, put_header};
use crate::limits::{
    LINE_STREAM_WINDOW_BYTES, LINE_STREAMS_MAX, LINE_WINDOW_BYTES, MUX_BATCH_BYTES, MUX_CONTROL_BYTES_MAX, MUX_FRAME_BYTES_MAX,
    MUX_LINE_QUEUE_BYTES, MUX_STREAM_QUEUE_BYTES, SILENCE_MAX,
};
use crate::line::{Ended, StreamEnd};

/// Received pieces smaller than this are copied together: each piece costs some hundred bytes besides its content.
const SMALL_PIECE_BYTES: usize = 2048;

/// Which end this is, which decides the stream ids it gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Dialling,
    Listening,
}

/// What the shell around the state has to do.
#[derive(Debug, Default)]
pub(super) struct Effects {
    pub(super) write: bool,
    pub(super) accepted: usize,
    pub(super) places_freed: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sending {
    Open,
    Finishing,
    Finished,
    Reset,
    /// The peer reads no more, and will be answered with a reset once somebody here takes the stream.
    StopAsked,
    Stopped,
}

impl Sending {
    fn is_over(self) -> bool {
        matches!(self, Sending::Finished | Sending::Reset | Sending::Stopped)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Receiving {
    Open,
    Finished,
    Reset,
}

struct Stream {
    priority: i32,
    sending: Sending,
    queue: VecDeque<Bytes>,
    queued: usize,
    /// What was taken of the first piece in the queue; its memory is held until the rest is taken.
    begun: usize,
    credit: u64,
    scheduled: bool,
    writer: Option<Waker>,

    receiving: Receiving,
    pieces: VecDeque<Bytes>,
    /// Small pieces behind `pieces`, joined.
    tail: BytesMut,
    buffered: usize,
    /// What the peer may still send.
    window: u32,
    /// What was read and not yet announced to the peer as room.
    unannounced: u32,
    /// Nobody reads any more.
    discarding: bool,
    reader_gone: bool,
    reader: Option<Waker>,

    /// Whether this end knows of it: it opened it or took it.
    taken: bool,
    /// Whether it takes one of the places of [`LINE_STREAMS_MAX`].
    counted: bool,
}

impl Stream {
    fn new(priority: i32, taken: bool) -> Self {
        Self {
            priority,
            sending: Sending::Open,
            queue: VecDeque::new(),
            queued: 0,
            begun: 0,
            credit: LINE_STREAM_WINDOW_BYTES.into(),
            scheduled: false,
            writer: None,
            receiving: Receiving::Open,
            pieces: VecDeque::new(),
            tail: BytesMut::new(),
            buffered: 0,
            window: LINE_STREAM_WINDOW_BYTES,
            unannounced: 0,
            discarding: false,
            reader_gone: false,
            reader: None,
            taken,
            counted: true,
        }
    }

    /// Returns how much less is held.
    fn clear_queue(&mut self) -> usize {
        self.queue.clear();
        std::mem::take(&mut self.queued) + std::mem::take(&mut self.begun)
    }

    /// Moves `len` bytes from the queue's front to `out` without copying. Returns how much less is held.
    fn take_queued(&mut self, mut len: usize, out: &mut VecDeque<Bytes>) -> usize {
        let mut freed = 0;
        self.queued -= len;
        while len > 0 {
            let Some(front) = self.queue.front_mut() else { break };
            let piece = if front.len() > len { front.split_to(len) } else { std::mem::take(front) };
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

    fn clear_received(&mut self) -> usize {
        self.pieces.clear();
        self.tail.clear();
        std::mem::take(&mut self.buffered)
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
            None => self.tail.split_to(self.tail.len().min(max)).freeze(),
        };
        self.buffered -= taken.len();
        Some(taken)
    }

    fn wake_reader(&mut self) {
        if let Some(waker) = self.reader.take() {
            waker.wake();
        }
    }

    fn wake_writer(&mut self) {
        if let Some(waker) = self.writer.take() {
            waker.wake();
        }
    }

    fn has_to_send(&self) -> bool {
        match self.sending {
            Sending::Open => self.queued > 0 && self.credit > 0,
            Sending::Finishing => self.queued == 0 || self.credit > 0,
            Sending::Finished | Sending::Reset | Sending::StopAsked | Sending::Stopped => false,
        }
    }
}

pub(super) struct State {
    end: End,
    streams: HashMap<u32, Stream>,
    next_local: u32,
    next_remote: u32,
    remote_open: u32,
    accepts: VecDeque<u32>,
    /// Streams with something to send and room for it, by priority; within one priority they take turns.
    ready: BTreeMap<Reverse<i32>, VecDeque<u32>>,
    control: BytesMut,
    headers: BytesMut,
    /// What the pieces in the queues of all streams hold in memory.
    held: usize,
    send_credit: u64,
    window: u32,
    unannounced: u32,
    last_heard: Instant,
    ping_sent: Option<Instant>,
    rtt: Duration,
    pub(super) ended: Option<Ended>,
    pub(super) effects: Effects,
}

impl State {
    pub(super) fn new(end: End, rtt: Duration, now: Instant) -> Self {
        let (next_local, next_remote) = match end {
            End::Dialling => (1, 2),
            End::Listening => (2, 1),
        };
        Self {
            end,
            streams: HashMap::new(),
            next_local,
            next_remote,
            remote_open: 0,
            accepts: VecDeque::new(),
            ready: BTreeMap::new(),
            control: BytesMut::new(),
            headers: BytesMut::new(),
            held: 0,
            send_credit: LINE_WINDOW_BYTES.into(),
            window: LINE_WINDOW_BYTES,
            unannounced: 0,
            last_heard: now,
            ping_sent: None,
            rtt,
            ended: None,
            effects: Effects::default(),
        }
    }

    pub(super) fn rtt(&self) -> Duration {
        self.rtt
    }

    // What the halves of streams call.

    /// Opens a stream; the caller holds one of the places. `None`: every id was used, and the line must be dialled anew.
    pub(super) fn open(&mut self, priority: i32) -> Option<u32> {
        let id = self.next_local;
        self.next_local = id.checked_add(2)?;
        self.streams.insert(id, Stream::new(priority, true));
        self.put_control(Kind::Open, id);
        Some(id)
    }

    pub(super) fn accept(&mut self) -> Option<u32> {
        let id = self.accepts.pop_front()?;
        let stream = self.streams.get_mut(&id)?;
        stream.taken = true;
        if stream.sending == Sending::StopAsked {
            self.give_up(id, Sending::Stopped);
        }
        Some(id)
    }

    pub(super) fn set_priority(&mut self, id: u32, priority: i32) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.priority = priority;
        }
    }

    /// Takes `data` into the stream's queue once that is short enough: all of it, or a part at a time where the line holds much.
    pub(super) fn poll_write(&mut self, id: u32, data: &mut Bytes, waker: &Waker) -> Poll<Result<(), StreamEnd>> {
        if self.ended.is_some() {
            return Poll::Ready(Err(StreamEnd::LineGone));
        }
        let Some(stream) = self.streams.get_mut(&id) else { return Poll::Ready(Err(StreamEnd::Stopped)) };
        match stream.sending {
            Sending::Open => {}
            Sending::StopAsked | Sending::Stopped => return Poll::Ready(Err(StreamEnd::Stopped)),
            Sending::Finishing | Sending::Finished | Sending::Reset => return Poll::Ready(Err(StreamEnd::Finished)),
        }
        if data.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let room = MUX_STREAM_QUEUE_BYTES.saturating_sub(stream.queued);
        let piece = if room > 0 && self.held < MUX_LINE_QUEUE_BYTES {
            std::mem::take(data)
        } else if room >= data.len().min(MUX_STREAM_QUEUE_BYTES / 2) {
            // A copy: as small as it is, a part of the piece would hold the memory of all of it after its writer has gone on.
            Bytes::copy_from_slice(&data.split_to(room.min(data.len())))
        } else {
            Bytes::new()
        };
        if !data.is_empty() {
            stream.writer = Some(waker.clone());
        }
        if !piece.is_empty() {
            stream.queued += piece.len();
            self.held += piece.len();
            stream.queue.push_back(piece);
            self.schedule(id);
        }
        if data.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    pub(super) fn finish(&mut self, id: u32) -> Result<(), StreamEnd> {
        if self.ended.is_some() {
            return Err(StreamEnd::LineGone);
        }
        match self.streams.get_mut(&id) {
            Some(stream) if stream.sending == Sending::Open => stream.sending = Sending::Finishing,
            Some(stream) if stream.sending != Sending::Stopped => return Err(StreamEnd::Finished),
            _ => return Err(StreamEnd::Stopped),
        }
        self.schedule(id);
        Ok(())
    }

    /// Gives up what was not sent yet; nothing happens when all was.
    pub(super) fn reset(&mut self, id: u32) {
        self.give_up(id, Sending::Reset);
    }

    fn give_up(&mut self, id: u32, how: Sending) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.sending.is_over() {
            return;
        }
        stream.sending = how;
        self.held -= stream.clear_queue();
        stream.wake_writer();
        self.put_control(Kind::Reset, id);
        self.settle(id);
    }

    pub(super) fn poll_read(&mut self, id: u32, max: usize, waker: &Waker) -> Poll<Result<Option<Bytes>, StreamEnd>> {
        if self.ended.is_some() {
            return Poll::Ready(Err(StreamEnd::LineGone));
        }
        let Some(stream) = self.streams.get_mut(&id) else { return Poll::Ready(Err(StreamEnd::Stopped)) };
        if stream.discarding {
            return Poll::Ready(Err(StreamEnd::Stopped));
        }
        if let Some(bytes) = stream.pop(max.max(1)) {
            stream.unannounced += bytes.len() as u32;
            let due = stream.receiving == Receiving::Open && stream.unannounced >= LINE_STREAM_WINDOW_BYTES / 2;
            if due {
                let credit = std::mem::take(&mut stream.unannounced);
                stream.window += credit;
                self.put_credit(id, credit);
            }
            self.consumed(bytes.len());
            return Poll::Ready(Ok(Some(bytes)));
        }
        match stream.receiving {
            Receiving::Finished => Poll::Ready(Ok(None)),
            Receiving::Reset => Poll::Ready(Err(StreamEnd::Reset)),
            Receiving::Open => {
                stream.reader = Some(waker.clone());
                Poll::Pending
            }
        }
    }

    /// Reads no more: what has come is dropped, and the peer is asked to stop.
    pub(super) fn stop(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.discarding {
            return;
        }
        stream.discarding = true;
        let dropped = stream.clear_received();
        if stream.receiving == Receiving::Open {
            self.put_control(Kind::Stop, id);
        }
        self.consumed(dropped);
    }

    /// The reading half is gone.
    pub(super) fn reader_gone(&mut self, id: u32) {
        self.stop(id);
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.reader_gone = true;
        }
        self.settle(id);
    }

    // What the driver calls.

    /// Takes in one frame. `Ok(Some)`: the peer closed the line. `Err`: the peer broke the protocol, and how.
    pub(super) fn on_frame(&mut self, header: Header, mut body: Bytes, now: Instant) -> Result<Option<Ended>, String> {
        self.last_heard = now;
        let id = header.stream;
        match header.kind {
            Kind::Open => self.on_open(id)?,
            Kind::Data => self.on_data(id, body, false)?,
            Kind::End => self.on_data(id, body, true)?,
            Kind::Reset => self.on_reset(id)?,
            Kind::Stop => self.on_stop(id)?,
            Kind::Credit => self.on_credit(id, body.get_u32())?,
            Kind::Ping => {
                put_header(&mut self.control, Kind::Pong, 0, body.len());
                self.control.put(body);
                self.effects.write = true;
            }
            Kind::Pong => {
                if let Some(sent) = self.ping_sent.take() {
                    self.rtt = now.saturating_duration_since(sent);
                }
            }
            Kind::Close => {
                let code = body.get_u32();
                return Ok(Some(Ended::by_peer(code, &body)));
            }
        }
        if self.control.len() > MUX_CONTROL_BYTES_MAX {
            return Err("it asks for answers and does not read them".into());
        }
        Ok(None)
    }

    fn is_local(&self, id: u32) -> bool {
        (id % 2 == 1) == (self.end == End::Dialling)
    }

    /// A frame may be about a stream that is forgotten already, but not about one that never was.
    fn check_known(&self, id: u32) -> Result<(), String> {
        let next = if self.is_local(id) { self.next_local } else { self.next_remote };
        if id == 0 || id >= next { Err(format!("a frame about stream {id}, which never was")) } else { Ok(()) }
    }

    fn on_open(&mut self, id: u32) -> Result<(), String> {
        if id != self.next_remote {
            return Err(format!("it opened stream {id} where {} is next", self.next_remote));
        }
        if self.remote_open >= LINE_STREAMS_MAX {
            return Err(format!("it opened more than {LINE_STREAMS_MAX} streams"));
        }
        self.next_remote = id.checked_add(2).ok_or("it has used up every stream id")?;
        self.remote_open += 1;
        self.streams.insert(id, Stream::new(0, false));
        self.accepts.push_back(id);
        self.effects.accepted += 1;
        Ok(())
    }

    fn on_data(&mut self, id: u32, body: Bytes, last: bool) -> Result<(), String> {
        let len = body.len() as u32;
        let Some(stream) = self.streams.get_mut(&id).filter(|s| s.receiving == Receiving::Open) else {
            return Err(format!("data for stream {id}, which is not open"));
        };
        if len > stream.window || len > self.window {
            return Err(format!("more data than it was allowed on stream {id}"));
        }
        stream.window -= len;
        self.window -= len;
        let dropped = if stream.discarding { body.len() } else { 0 };
        if !stream.discarding && len > 0 {
            stream.push(body);
        }
        if last {
            stream.receiving = Receiving::Finished;
        }
        stream.wake_reader();
        self.consumed(dropped);
        if last {
            self.settle(id);
        }
        Ok(())
    }

    fn on_reset(&mut self, id: u32) -> Result<(), String> {
        self.check_known(id)?;
        let Some(stream) = self.streams.get_mut(&id).filter(|s| s.receiving == Receiving::Open) else { return Ok(()) };
        stream.receiving = Receiving::Reset;
        stream.wake_reader();
        let dropped = stream.clear_received();
        self.consumed(dropped);
        self.settle(id);
        Ok(())
    }

    /// A stream that waits to be taken keeps its place until then, at both ends: else a peer could fill the queue of those that wait.
    fn on_stop(&mut self, id: u32) -> Result<(), String> {
        self.check_known(id)?;
        match self.streams.get_mut(&id) {
            Some(stream) if !stream.taken => stream.sending = Sending::StopAsked,
            _ => self.give_up(id, Sending::Stopped),
        }
        Ok(())
    }

    fn on_credit(&mut self, id: u32, credit: u32) -> Result<(), String> {
        if id == 0 {
            self.send_credit = self.send_credit.saturating_add(credit.into());
            self.effects.write = true;
            return Ok(());
        }
        self.check_known(id)?;
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.credit = stream.credit.saturating_add(credit.into());
            self.schedule(id);
        }
        Ok(())
    }

    /// Takes what is to be sent next: control frames, then data by priority, up to about [`MUX_BATCH_BYTES`].
    pub(super) fn take_batch(&mut self, out: &mut VecDeque<Bytes>) {
        if !self.control.is_empty() {
            out.push_back(self.control.split().freeze());
        }
        let mut room = MUX_BATCH_BYTES;
        while room > 0 && self.send_credit > 0 {
            let Some(mut lane) = self.ready.first_entry() else { break };
            let next = lane.get_mut().pop_front();
            if lane.get().is_empty() {
                lane.remove();
            }
            let Some(id) = next else { continue };
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            stream.scheduled = false;
            if !stream.has_to_send() {
                continue;
            }
            let allowed = stream.credit.min(self.send_credit).min(MUX_FRAME_BYTES_MAX as u64) as usize;
            let len = stream.queued.min(allowed);
            let last = stream.sending == Sending::Finishing && len == stream.queued;
            self.headers.reserve(HEADER_BYTES);
            put_header(&mut self.headers, if last { Kind::End } else { Kind::Data }, id, len);
            out.push_back(self.headers.split().freeze());
            self.held -= stream.take_queued(len, out);
            stream.credit -= len as u64;
            self.send_credit -= len as u64;
            room = room.saturating_sub(len + HEADER_BYTES);
            if last {
                stream.sending = Sending::Finished;
            } else if stream.queued < MUX_STREAM_QUEUE_BYTES {
                stream.wake_writer();
            }
            if last { self.settle(id) } else { self.schedule(id) }
        }
    }

    /// To be called every few seconds: measures the round trip, and says so when the peer has been silent too long.
    pub(super) fn on_tick(&mut self, now: Instant) -> Result<(), String> {
        let silence = now.saturating_duration_since(self.last_heard);
        if silence >= SILENCE_MAX {
            return Err(format!("nothing was heard for {} s", silence.as_secs()));
        }
        if self.ping_sent.is_none() {
            self.ping_sent = Some(now);
            put_header(&mut self.control, Kind::Ping, 0, 8);
            self.control.put_u64(0);
            self.effects.write = true;
        }
        Ok(())
    }

    /// Bytes came in, though no frame is complete yet.
    pub(super) fn on_bytes(&mut self, now: Instant) {
        self.last_heard = now;
    }

    /// The line is over: everything buffered is dropped, everybody who waits is woken.
    pub(super) fn end(&mut self, ended: Ended) -> bool {
        if self.ended.is_some() {
            return false;
        }
        self.ended = Some(ended);
        for stream in self.streams.values_mut() {
            self.held -= stream.clear_queue();
            stream.clear_received();
            stream.wake_reader();
            stream.wake_writer();
        }
        self.accepts.clear();
        self.ready.clear();
        self.control.clear();
        self.effects.write = true;
        true
    }

    fn put_control(&mut self, kind: Kind, id: u32) {
        put_header(&mut self.control, kind, id, 0);
        self.effects.write = true;
    }

    fn put_credit(&mut self, id: u32, credit: u32) {
        put_header(&mut self.control, Kind::Credit, id, 4);
        self.control.put_u32(credit);
        self.effects.write = true;
    }

    /// Bytes left the buffers of the whole line; the peer hears of it a quarter of the window at a time.
    fn consumed(&mut self, bytes: usize) {
        self.unannounced += bytes as u32;
        if self.unannounced >= LINE_WINDOW_BYTES / 4 {
            let credit = std::mem::take(&mut self.unannounced);
            self.window += credit;
            self.put_credit(0, credit);
        }
    }

    fn schedule(&mut self, id: u32) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if !stream.scheduled && stream.has_to_send() {
            stream.scheduled = true;
            self.ready.entry(Reverse(stream.priority)).or_default().push_back(id);
            self.effects.write = true;
        }
    }

    /// Frees the stream's place once both directions are over on the wire, and forgets it once nobody reads it either.
    ///
    /// Both ends count by frames alone and frames keep their order, so a peer that opens a stream as soon as it sees one
    /// end never finds more than [`LINE_STREAMS_MAX`] counted here.
    fn settle(&mut self, id: u32) {
        let local = self.is_local(id);
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if !stream.sending.is_over() || stream.receiving == Receiving::Open {
            return;
        }
        if std::mem::take(&mut stream.counted) {
            if local {
                self.effects.places_freed += 1;
            } else {
                self.remote_open -= 1;
            }
        }
        if stream.reader_gone {
            self.streams.remove(&id);
        }
    }
}

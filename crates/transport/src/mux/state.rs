//! The core of the TCP connection: streams, windows and priorities, without I/O.
//!
//! Frames enter by [`State::on_frame`] and leave by [`State::take_batch`]; the halves of streams
//! call the other methods. [`Effects`] collects the actions for the caller: wake the writer, wake
//! an acceptor, free a slot.
//!
//! This file contains the connection and the life cycle of a stream, from its opening until both
//! directions have ended. `sending` contains the direction that this end writes, `receiving` the
//! other. Both limit their memory. If a peer causes many control frames and does not read them, the
//! connection ends.

mod receiving;
mod sending;

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::frame::{Header, Kind, put_header};
use crate::Ended;
use base::limits::{
    CONNECTION_SEND_BYTES_LEAST, CONNECTION_STREAMS_MAX, CONNECTION_WINDOW_BYTES,
    MUX_CONTROL_BYTES_MAX, MUX_QUEUE_BYTES, SILENCE_MAX,
};

use receiving::Incoming;
use sending::Outgoing;

/// Which end this is. It determines whether this end opens streams with odd or even ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Dialling,
    Listening,
}

/// The actions that the caller of the state must perform.
#[derive(Debug, Default)]
pub(super) struct Effects {
    pub(super) write: bool,
    pub(super) accepted: usize,
    pub(super) slots_freed: usize,
    /// The driver may read from the socket again.
    pub(super) read: bool,
}

struct Stream {
    outgoing: Outgoing,
    incoming: Incoming,
    /// Whether this end has the stream: it opened or accepted it.
    is_taken: bool,
    /// Whether the stream occupies one of the [`CONNECTION_STREAMS_MAX`] slots.
    has_slot: bool,
}

impl Stream {
    fn new(priority: i32, is_taken: bool) -> Self {
        Self {
            outgoing: Outgoing::new(priority),
            incoming: Incoming::new(),
            is_taken,
            has_slot: true,
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
    /// Streams that have data and credit, by priority. Streams of one priority alternate.
    ready: BTreeMap<Reverse<i32>, VecDeque<u32>>,
    control: BytesMut,
    headers: BytesMut,
    /// The memory of all queued pieces.
    held: usize,
    /// The value of `held` from which a stream queues only a limited amount.
    queue_limit: usize,
    send_credit: u64,
    window: u32,
    unannounced: u32,
    /// The bytes that were received and not read yet, of all streams.
    unread: usize,
    unread_limit: usize,
    last_received: Instant,
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
            queue_limit: MUX_QUEUE_BYTES,
            send_credit: CONNECTION_WINDOW_BYTES.into(),
            window: CONNECTION_WINDOW_BYTES,
            unannounced: 0,
            unread: 0,
            unread_limit: CONNECTION_WINDOW_BYTES as usize,
            last_received: now,
            ping_sent: None,
            rtt,
            ended: None,
            effects: Effects::default(),
        }
    }

    /// Sets the limit on queued bytes; never more than [`MUX_QUEUE_BYTES`].
    pub(super) fn set_queue_limit(&mut self, bytes: u64) {
        self.queue_limit = usize::try_from(bytes)
            .unwrap_or(usize::MAX)
            .clamp(CONNECTION_SEND_BYTES_LEAST as usize, MUX_QUEUE_BYTES);
    }

    pub(super) fn rtt(&self) -> Duration {
        self.rtt
    }

    /// Opens a stream; the caller has a slot for it. `None`: all ids are used, and a new connection
    /// is needed.
    pub(super) fn open(&mut self, priority: i32) -> Option<u32> {
        let id = self.next_local;
        self.next_local = id.checked_add(2)?;
        self.streams.insert(id, Stream::new(priority, true));
        self.put_control(Kind::Open, id);
        Some(id)
    }

    pub(super) fn accept(&mut self) -> Option<u32> {
        let id = self.accepts.pop_front()?;
        self.streams.get_mut(&id)?.is_taken = true;
        self.answer_stop(id);
        Some(id)
    }

    /// Processes one frame. `Ok(Some)`: the peer closed the connection. `Err`: the peer violated
    /// the protocol, with the reason.
    pub(super) fn on_frame(
        &mut self,
        header: Header,
        mut body: Bytes,
        now: Instant,
    ) -> Result<Option<Ended>, String> {
        self.last_received = now;
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
            return Err("it requests answers but does not read them".into());
        }
        Ok(None)
    }

    fn is_local(&self, id: u32) -> bool {
        (id % 2 == 1) == (self.end == End::Dialling)
    }

    /// A frame may refer to a stream that was removed, but not to one that never existed.
    fn check_known(&self, id: u32) -> Result<(), String> {
        let next = if self.is_local(id) {
            self.next_local
        } else {
            self.next_remote
        };
        if id == 0 || id >= next {
            Err(format!("a frame for stream {id}, which never existed"))
        } else {
            Ok(())
        }
    }

    fn on_open(&mut self, id: u32) -> Result<(), String> {
        if id != self.next_remote {
            return Err(format!(
                "it opened stream {id}, but {} is next",
                self.next_remote
            ));
        }
        if self.remote_open >= CONNECTION_STREAMS_MAX {
            return Err(format!(
                "it opened more than {CONNECTION_STREAMS_MAX} streams"
            ));
        }
        self.next_remote = id.checked_add(2).ok_or("it has used all stream ids")?;
        self.remote_open += 1;
        self.streams.insert(id, Stream::new(0, false));
        self.accepts.push_back(id);
        self.effects.accepted += 1;
        Ok(())
    }

    /// Frees the slot of the stream when both directions have ended on the wire, and removes the
    /// stream when it has no reader.
    ///
    /// Both ends count by frames only, and frames keep their order. Therefore a peer that opens a
    /// stream as soon as it sees the end of another never exceeds [`CONNECTION_STREAMS_MAX`] here.
    fn settle(&mut self, id: u32) {
        let local = self.is_local(id);
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if !stream.outgoing.is_over() || stream.incoming.is_open() {
            return;
        }
        if std::mem::take(&mut stream.has_slot) {
            if local {
                self.effects.slots_freed += 1;
            } else {
                self.remote_open -= 1;
            }
        }
        if !stream.incoming.has_reader() {
            self.streams.remove(&id);
        }
    }

    /// Called every few seconds. Measures the round trip time, and fails if the peer was silent for
    /// too long.
    pub(super) fn on_tick(&mut self, now: Instant) -> Result<(), String> {
        if self.is_full() {
            // Nothing is read, so nothing is known about the peer.
            self.last_received = now;
        }
        let silence = now.saturating_duration_since(self.last_received);
        if silence >= SILENCE_MAX {
            return Err(format!("nothing was received for {} s", silence.as_secs()));
        }
        if self.ping_sent.is_none() {
            self.ping_sent = Some(now);
            put_header(&mut self.control, Kind::Ping, 0, 8);
            self.control.put_u64(0);
            self.effects.write = true;
        }
        Ok(())
    }

    /// Called when bytes were received but no frame is complete.
    pub(super) fn on_bytes(&mut self, now: Instant) {
        self.last_received = now;
    }

    /// Ends the connection: discards all buffers and wakes all waiting tasks.
    pub(super) fn end(&mut self, ended: Ended) -> bool {
        if self.ended.is_some() {
            return false;
        }
        self.ended = Some(ended);
        for stream in self.streams.values_mut() {
            self.held -= stream.outgoing.clear();
            stream.incoming.clear();
            stream.incoming.wake();
            stream.outgoing.wake();
        }
        self.unread = 0;
        self.effects.read = true;
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
}

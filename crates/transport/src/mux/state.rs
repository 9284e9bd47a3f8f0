//! The core of the TCP line: streams, windows and priorities, without any I/O.
//!
//! Frames go in by [`State::on_frame`] and come out by [`State::take_batch`]; the halves of streams
//! call the rest. What must happen outside (wake the writer, wake an acceptor, free a place) is
//! gathered in [`Effects`].
//!
//! Here stand the line itself and the life of a stream, from its opening until both directions are
//! over; `sending` has the direction that this end writes, `receiving` the other. Each bounds the
//! memory it takes, and control frames that a peer provokes without reading end the line.

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

struct Stream {
    outgoing: Outgoing,
    incoming: Incoming,
    /// Whether this end knows of it: it opened it or took it.
    taken: bool,
    /// Whether it takes one of the places of [`CONNECTION_STREAMS_MAX`].
    counted: bool,
}

impl Stream {
    fn new(priority: i32, taken: bool) -> Self {
        Self {
            outgoing: Outgoing::new(priority),
            incoming: Incoming::new(),
            taken,
            counted: true,
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
    /// Streams with something to send and room for it, by priority; within one priority they take
    /// turns.
    ready: BTreeMap<Reverse<i32>, VecDeque<u32>>,
    control: BytesMut,
    headers: BytesMut,
    /// What the pieces in the queues of all streams hold in memory.
    held: usize,
    /// From which number of these on a stream takes no more than it needs.
    hold_max: usize,
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
            hold_max: MUX_QUEUE_BYTES,
            send_credit: CONNECTION_WINDOW_BYTES.into(),
            window: CONNECTION_WINDOW_BYTES,
            unannounced: 0,
            last_heard: now,
            ping_sent: None,
            rtt,
            ended: None,
            effects: Effects::default(),
        }
    }

    /// Says what the streams may hold to be sent; never more than [`MUX_QUEUE_BYTES`].
    pub(super) fn hold_at_most(&mut self, bytes: u64) {
        self.hold_max = usize::try_from(bytes)
            .unwrap_or(usize::MAX)
            .clamp(CONNECTION_SEND_BYTES_LEAST as usize, MUX_QUEUE_BYTES);
    }

    pub(super) fn rtt(&self) -> Duration {
        self.rtt
    }

    /// Opens a stream; the caller holds one of the places. `None`: every id was used, and the line
    /// must be dialled anew.
    pub(super) fn open(&mut self, priority: i32) -> Option<u32> {
        let id = self.next_local;
        self.next_local = id.checked_add(2)?;
        self.streams.insert(id, Stream::new(priority, true));
        self.put_control(Kind::Open, id);
        Some(id)
    }

    pub(super) fn accept(&mut self) -> Option<u32> {
        let id = self.accepts.pop_front()?;
        self.streams.get_mut(&id)?.taken = true;
        self.answer_stop(id);
        Some(id)
    }

    /// Takes in one frame. `Ok(Some)`: the peer closed the line. `Err`: the peer broke the
    /// protocol, and how.
    pub(super) fn on_frame(
        &mut self,
        header: Header,
        mut body: Bytes,
        now: Instant,
    ) -> Result<Option<Ended>, String> {
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
        let next = if self.is_local(id) {
            self.next_local
        } else {
            self.next_remote
        };
        if id == 0 || id >= next {
            Err(format!("a frame about stream {id}, which never was"))
        } else {
            Ok(())
        }
    }

    fn on_open(&mut self, id: u32) -> Result<(), String> {
        if id != self.next_remote {
            return Err(format!(
                "it opened stream {id} where {} is next",
                self.next_remote
            ));
        }
        if self.remote_open >= CONNECTION_STREAMS_MAX {
            return Err(format!(
                "it opened more than {CONNECTION_STREAMS_MAX} streams"
            ));
        }
        self.next_remote = id.checked_add(2).ok_or("it has used up every stream id")?;
        self.remote_open += 1;
        self.streams.insert(id, Stream::new(0, false));
        self.accepts.push_back(id);
        self.effects.accepted += 1;
        Ok(())
    }

    /// Frees the stream's place once both directions are over on the wire, and forgets it once
    /// nobody reads it either.
    ///
    /// Both ends count by frames alone and frames keep their order, so a peer that opens a stream
    /// as soon as it sees one end never finds more than [`CONNECTION_STREAMS_MAX`] counted here.
    fn settle(&mut self, id: u32) {
        let local = self.is_local(id);
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if !stream.outgoing.is_over() || stream.incoming.is_open() {
            return;
        }
        if std::mem::take(&mut stream.counted) {
            if local {
                self.effects.places_freed += 1;
            } else {
                self.remote_open -= 1;
            }
        }
        if !stream.incoming.has_reader() {
            self.streams.remove(&id);
        }
    }

    /// To be called every few seconds: measures the round trip, and says so when the peer has been
    /// silent too long.
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
            self.held -= stream.outgoing.clear();
            stream.incoming.clear();
            stream.incoming.wake();
            stream.outgoing.wake();
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
}

//! What the two ends of an emulated connection send: the hub announces artifacts, the site requests
//! them, the hub answers, the site reports.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use quinn_proto::{Connection, Dir, Event, StreamEvent, StreamId, WriteError};

/// The size of an announcement with its manifest.
const ANNOUNCEMENT: usize = 2048;
const REQUEST: usize = 600;
const REPORT: usize = 600;
static ZEROS: [u8; 65_536] = [0; 65_536];

/// An answer that the hub writes, or that the site reads.
struct Answer {
    left: u64,
    is_delivery: bool,
}

/// One end.
pub(super) struct App {
    is_hub: bool,
    is_dirty: bool,
    control: Option<StreamId>,
    /// Bytes to write to the control stream.
    outbox: VecDeque<u8>,
    inbox: Vec<u8>,
    answers: BTreeMap<StreamId, Answer>,
    requests: BTreeMap<StreamId, Vec<u8>>,
    /// Streams that may have data to read.
    readable: BTreeSet<StreamId>,
    /// Requests to make: the bytes of the answer, and whether a report follows.
    wanted: VecDeque<(u64, bool)>,
    at_once: usize,
    fetched: u64,
    reports: u64,
}

impl App {
    fn new(is_hub: bool) -> Self {
        Self {
            is_hub,
            is_dirty: false,
            control: None,
            outbox: VecDeque::new(),
            inbox: Vec::new(),
            answers: BTreeMap::new(),
            requests: BTreeMap::new(),
            readable: BTreeSet::new(),
            wanted: VecDeque::new(),
            at_once: 60,
            fetched: 0,
            reports: 0,
        }
    }

    pub(super) fn hub() -> Self {
        Self::new(true)
    }

    pub(super) fn site() -> Self {
        Self::new(false)
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.is_dirty
    }

    pub(super) fn reports(&self) -> u64 {
        self.reports
    }

    pub(super) fn fetched(&self) -> u64 {
        self.fetched
    }

    pub(super) fn announce(&mut self, bytes: u64) {
        let mut message = bytes.to_be_bytes().to_vec();
        message.resize(ANNOUNCEMENT, 0);
        self.outbox.extend(message);
        self.is_dirty = true;
    }

    pub(super) fn fetch(&mut self, answers: u64, bytes: u64, at_once: usize) {
        self.wanted.extend((0..answers).map(|_| (bytes, false)));
        self.at_once = at_once;
        self.is_dirty = true;
    }

    pub(super) fn note(&mut self, event: &Event) {
        if let Event::Stream(StreamEvent::Readable { id }) = event {
            self.readable.insert(*id);
        }
    }

    /// Reads and writes as much as possible.
    pub(super) fn work(&mut self, connection: &mut Connection) {
        if connection.is_handshaking() {
            return;
        }
        self.is_dirty = false;
        if self.is_hub && self.control.is_none() {
            self.control = connection.streams().open(Dir::Bi);
            if let Some(control) = self.control {
                let _ = connection.send_stream(control).set_priority(100 << 24);
                self.outbox.extend([0; 1]);
            }
        }
        while let Some(stream) = connection.streams().accept(Dir::Bi) {
            self.readable.insert(stream);
            if self.is_hub {
                self.requests.insert(stream, Vec::new());
            } else {
                self.control = Some(stream);
            }
        }
        self.read_control(connection);
        if self.is_hub {
            self.read_requests(connection);
            self.write_control(connection);
            self.write_answers(connection);
        } else {
            self.read_answers(connection);
            self.write_control(connection);
            self.make_requests(connection);
        }
    }

    fn read_control(&mut self, connection: &mut Connection) {
        let Some(control) = self.control.filter(|c| self.readable.remove(c)) else {
            return;
        };
        self.inbox.extend(read(connection, control).0);
        if self.is_hub {
            self.reports += (self.inbox.len() / REPORT) as u64;
            self.inbox.drain(..self.inbox.len() / REPORT * REPORT);
            return;
        }
        // The first byte opened the stream.
        while self.inbox.len() > ANNOUNCEMENT {
            let bytes: [u8; 8] = self.inbox[1..9].try_into().unwrap();
            self.wanted.push_back((u64::from_be_bytes(bytes), true));
            self.inbox.drain(1..=ANNOUNCEMENT);
        }
    }

    fn write_control(&mut self, connection: &mut Connection) {
        let Some(control) = self.control else { return };
        while !self.outbox.is_empty() {
            match connection
                .send_stream(control)
                .write(self.outbox.make_contiguous())
            {
                Ok(written) => drop(self.outbox.drain(..written)),
                Err(_) => return,
            }
        }
    }

    fn read_requests(&mut self, connection: &mut Connection) {
        for stream in std::mem::take(&mut self.readable) {
            let (bytes, is_over) = read(connection, stream);
            let request = self.requests.entry(stream).or_default();
            request.extend(bytes);
            if is_over {
                let bytes: [u8; 8] = request[..8].try_into().unwrap();
                self.requests.remove(&stream);
                let place = (stream.index() % (1 << 24)) as i32;
                let _ = connection.send_stream(stream).set_priority(-place);
                let left = u64::from_be_bytes(bytes);
                self.answers.insert(
                    stream,
                    Answer {
                        left,
                        is_delivery: false,
                    },
                );
            }
        }
    }

    fn write_answers(&mut self, connection: &mut Connection) {
        while let Some((&stream, answer)) = self.answers.iter_mut().next() {
            while answer.left > 0 {
                let piece = answer.left.min(ZEROS.len() as u64) as usize;
                let mut send = connection.send_stream(stream);
                match send.write_chunks(&mut [Bytes::from_static(&ZEROS[..piece])]) {
                    Ok(written) => answer.left -= written.bytes as u64,
                    Err(WriteError::Blocked) => return,
                    Err(error) => unreachable!("{error}"),
                }
            }
            connection.send_stream(stream).finish().unwrap();
            self.answers.remove(&stream);
        }
    }

    fn make_requests(&mut self, connection: &mut Connection) {
        while self.answers.len() < self.at_once {
            let Some((bytes, is_delivery)) = self.wanted.pop_front() else {
                return;
            };
            let stream = connection.streams().open(Dir::Bi).unwrap();
            let mut request = bytes.to_be_bytes().to_vec();
            request.resize(REQUEST, 0);
            let written = connection.send_stream(stream).write(&request).unwrap();
            assert_eq!(written, REQUEST);
            connection.send_stream(stream).finish().unwrap();
            self.answers.insert(
                stream,
                Answer {
                    left: bytes,
                    is_delivery,
                },
            );
        }
    }

    fn read_answers(&mut self, connection: &mut Connection) {
        for stream in std::mem::take(&mut self.readable) {
            let (bytes, is_over) = count(connection, stream);
            self.fetched += bytes;
            let Some(answer) = self.answers.get_mut(&stream) else {
                continue;
            };
            answer.left -= bytes;
            if is_over {
                assert_eq!(answer.left, 0);
                if answer.is_delivery {
                    self.outbox.extend([0; REPORT]);
                }
                self.answers.remove(&stream);
            }
        }
    }
}

/// Reads what arrived, without a copy. Returns its bytes, and whether the stream ended.
fn count(connection: &mut Connection, stream: StreamId) -> (u64, bool) {
    let mut bytes = 0;
    let is_over = each(connection, stream, |chunk| bytes += chunk.len() as u64);
    (bytes, is_over)
}

fn read(connection: &mut Connection, stream: StreamId) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let is_over = each(connection, stream, |chunk| bytes.extend_from_slice(chunk));
    (bytes, is_over)
}

fn each(connection: &mut Connection, stream: StreamId, mut take: impl FnMut(&[u8])) -> bool {
    let mut recv = connection.recv_stream(stream);
    let Ok(mut chunks) = recv.read(true) else {
        return false;
    };
    let is_over = loop {
        match chunks.next(usize::MAX) {
            Ok(Some(chunk)) => take(&chunk.bytes),
            Ok(None) => break true,
            Err(_) => break false,
        }
    };
    let _ = chunks.finalize();
    is_over
}

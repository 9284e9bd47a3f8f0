//! Two ends of QUIC connections over an emulated path, in virtual time, for the tests of the
//! congestion control.
//!
//! The ends are those of `quinn-proto` with the transport settings of this crate, its congestion
//! control and its certificates. The path has a rate, a delay, a queue that drops at its end,
//! random loss, duplicates, reordering and a policer. An emulation of one minute takes a part of a
//! second, and its result does not depend on the load of the machine.

mod app;
mod path;
mod tests;

use std::collections::BinaryHeap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn_proto::{
    ClientConfig, Connection, ConnectionHandle, DatagramEvent, Endpoint, EndpointConfig, Event,
    ServerConfig, TransportConfig,
};

use crate::congestion::Choice;
use crate::pace::Pace;
use crate::quic;
use crate::testing::{hub_in, site_of};
use app::App;
use path::{Direction, Flight};
pub(crate) use path::{Line, Seen};

/// How many bytes IPv4 and UDP add to a packet.
const HEADERS: usize = 28;
/// The largest packet of the path, without these bytes.
const PACKET: u16 = 1472;

/// One end of a connection.
struct End {
    endpoint: Endpoint,
    connection: Option<(ConnectionHandle, Connection)>,
    server: Option<Arc<ServerConfig>>,
    remote: SocketAddr,
    adjusted: Instant,
    pace: Pace,
}

impl End {
    fn receive(&mut self, now: Instant, packet: &[u8], out: &mut Vec<Vec<u8>>) {
        let mut answer = Vec::new();
        let event = self.endpoint.handle(
            now,
            self.remote,
            None,
            None,
            BytesMut::from(packet),
            &mut answer,
        );
        match event {
            Some(DatagramEvent::ConnectionEvent(_, event)) => {
                if let Some((_, connection)) = &mut self.connection {
                    connection.handle_event(event);
                }
            }
            Some(DatagramEvent::NewConnection(incoming)) => {
                let accepted =
                    self.endpoint
                        .accept(incoming, now, &mut answer, self.server.clone());
                self.connection = Some(accepted.map_err(|e| e.cause).unwrap());
            }
            Some(DatagramEvent::Response(transmit)) => out.push(answer[..transmit.size].to_vec()),
            None => {}
        }
    }

    fn drive(&mut self, now: Instant, app: &mut App, out: &mut Vec<Vec<u8>>) {
        let Some((handle, connection)) = &mut self.connection else {
            return;
        };
        if connection.poll_timeout().is_some_and(|at| at <= now) {
            connection.handle_timeout(now);
        }
        while let Some(event) = connection.poll_endpoint_events() {
            if let Some(event) = self.endpoint.handle_event(*handle, event) {
                connection.handle_event(event);
            }
        }
        while let Some(event) = connection.poll() {
            assert!(
                !matches!(event, Event::ConnectionLost { .. }),
                "lost: {event:?}"
            );
            app.note(&event);
        }
        if now >= self.adjusted + base::limits::CONNECTION_SEND_FIT_EVERY {
            self.adjusted = now;
            connection.set_send_window(quic::send_buffer(
                connection.rtt(),
                connection.stats().path.cwnd,
                u64::MAX,
            ));
        }
        app.work(connection);
        self.pace.fill(now);
        let mut buffer = Vec::new();
        while let Some(transmit) = connection.poll_transmit(now, 10, &mut buffer) {
            let segment = transmit.segment_size.unwrap_or(transmit.size);
            out.extend(buffer[..transmit.size].chunks(segment).map(<[u8]>::to_vec));
            buffer.clear();
        }
    }

    /// When the end wants to act next.
    fn wants(&mut self) -> Option<Instant> {
        let timer = self.connection.as_mut().and_then(|(_, c)| c.poll_timeout());
        timer.into_iter().chain(self.pace.due()).min()
    }
}

/// A connection: the hub is end 0, the site end 1.
struct Pair {
    ends: [End; 2],
    apps: [App; 2],
}

/// Several connections over one path.
pub(crate) struct Emulation {
    now: Instant,
    /// From the hub to the site, and back.
    path: [Direction; 2],
    flying: BinaryHeap<Flight>,
    pairs: Vec<Pair>,
    random: u64,
    number: u64,
}

/// The transport settings of one end of an emulated connection, and the pace that they set.
#[derive(Clone)]
pub(crate) struct Settings {
    transport: Arc<TransportConfig>,
    pace: Pace,
}

impl Settings {
    pub(crate) fn new(choice: &Choice, path: &crate::path::Path, window: u64) -> Self {
        Self {
            transport: quic::transport(choice, path, PACKET, window).unwrap(),
            pace: choice.pace().clone(),
        }
    }
}

impl Emulation {
    pub(crate) fn new(down: Line, up: Line) -> Self {
        let now = Instant::now();
        Self {
            now,
            path: [Direction::new(down, now), Direction::new(up, now)],
            flying: BinaryHeap::new(),
            pairs: Vec::new(),
            random: 0x9e37_79b9_7f4a_7c15,
            number: 0,
        }
    }

    /// Adds a connection with these settings at the hub and at the site, and completes its
    /// handshake. Returns its number.
    pub(crate) fn connect(&mut self, hub: Settings, site: Settings) -> usize {
        let number = self.pairs.len();
        let dir = tempfile::tempdir().unwrap();
        let identity = hub_in(dir.path());
        let site_identity = site_of(&identity, "chengdu");
        let tls = crate::tls::server(&identity).unwrap();
        let mut server =
            ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).unwrap()));
        server.transport_config(hub.transport);
        let server = Arc::new(server);
        let tls = crate::tls::client(&site_identity).unwrap();
        let mut client = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
        client.transport_config(site.transport);
        let seed = Some([number as u8 + 1; 32]);
        let address = |port| SocketAddr::from(([10, 0, 0, 1], port));
        let end = |server: Option<Arc<ServerConfig>>, remote, pace| End {
            endpoint: Endpoint::new(
                Arc::new(EndpointConfig::default()),
                server.clone(),
                true,
                seed,
            ),
            connection: None,
            server,
            remote: address(remote),
            adjusted: self.now,
            pace,
        };
        let mut site_end = end(None, 1, site.pace);
        site_end.connection = Some(
            site_end
                .endpoint
                .connect(
                    self.now,
                    client,
                    site_end.remote,
                    crate::identity::HUB_DNS_NAME,
                )
                .unwrap(),
        );
        self.pairs.push(Pair {
            ends: [end(Some(server), 2, hub.pace), site_end],
            apps: [App::hub(), App::site()],
        });
        self.drive(number, 1);
        let limit = self.now + Duration::from_secs(20);
        while self.now < limit {
            let ready = self.pairs[number].ends.iter().all(|end| {
                end.connection
                    .as_ref()
                    .is_some_and(|(_, c)| !c.is_handshaking())
            });
            if ready {
                return number;
            }
            self.step(limit);
        }
        unreachable!("no handshake within 20 s")
    }

    fn drive(&mut self, pair: usize, end: usize) {
        let mut out = Vec::new();
        let Pair { ends, apps } = &mut self.pairs[pair];
        ends[end].drive(self.now, &mut apps[end], &mut out);
        self.send(pair, end, out);
    }

    fn send(&mut self, pair: usize, end: usize, packets: Vec<Vec<u8>>) {
        for packet in packets {
            let ways = self.path[end].pass(self.now, packet.len() + HEADERS, &mut self.random);
            for at in ways.into_iter().flatten() {
                self.number += 1;
                self.flying.push(Flight {
                    at,
                    number: self.number,
                    pair,
                    end: 1 - end,
                    packet: packet.clone(),
                });
            }
        }
    }

    /// Goes to the next event, or to `limit`.
    fn step(&mut self, limit: Instant) {
        let mut next = limit;
        if let Some(flight) = self.flying.peek() {
            next = next.min(flight.at);
        }
        for pair in 0..self.pairs.len() {
            for end in 0..2 {
                if let Some(at) = self.pairs[pair].ends[end].wants() {
                    next = next.min(at);
                }
            }
        }
        self.now = self.now.max(next);
        let mut touched = vec![[false; 2]; self.pairs.len()];
        while self.flying.peek().is_some_and(|f| f.at <= self.now) {
            let Some(flight) = self.flying.pop() else {
                break;
            };
            let mut out = Vec::new();
            self.pairs[flight.pair].ends[flight.end].receive(self.now, &flight.packet, &mut out);
            self.send(flight.pair, flight.end, out);
            touched[flight.pair][flight.end] = true;
        }
        for (pair, ends) in touched.into_iter().enumerate() {
            for (end, touched) in ends.into_iter().enumerate() {
                let due = self.pairs[pair].ends[end]
                    .wants()
                    .is_some_and(|at| at <= self.now);
                if touched || due || self.pairs[pair].apps[end].is_dirty() {
                    self.drive(pair, end);
                }
            }
        }
    }

    /// Emulates until `done`, for `limit` at most. Returns the time that passed.
    pub(crate) fn run_until(
        &mut self,
        limit: Duration,
        mut done: impl FnMut(&Self) -> bool,
    ) -> Option<Duration> {
        let began = self.now;
        while self.now < began + limit {
            if done(self) {
                return Some(self.now - began);
            }
            self.step(began + limit);
        }
        None
    }

    pub(crate) fn run_for(&mut self, time: Duration) {
        self.run_until(time, |_| false);
    }

    /// Delivers an artifact of this size: a message, a request, an answer and a report. Returns the
    /// time until the hub has the report.
    pub(crate) fn deliver(&mut self, pair: usize, bytes: u64, limit: Duration) -> Option<Duration> {
        let before = self.pairs[pair].apps[0].reports();
        self.pairs[pair].apps[0].announce(bytes);
        self.drive(pair, 0);
        self.run_until(limit, |this| this.pairs[pair].apps[0].reports() > before)
    }

    /// Begins to fetch `answers` answers of `bytes`, `at_once` at a time.
    pub(crate) fn fetch(&mut self, pair: usize, answers: u64, bytes: u64, at_once: usize) {
        self.pairs[pair].apps[1].fetch(answers, bytes, at_once);
        self.drive(pair, 1);
    }

    /// The bytes of answers that the site has read.
    pub(crate) fn fetched(&self, pair: usize) -> u64 {
        self.pairs[pair].apps[1].fetched()
    }

    /// What the path from the hub (0) or from the site (1) has seen.
    pub(crate) fn seen(&self, way: usize) -> Seen {
        self.path[way].seen
    }
}

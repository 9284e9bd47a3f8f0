//! The accepting side of the hub: one UDP and one TCP socket with the same port number, and the
//! connections they accept.

use std::net::{SocketAddr, TcpListener as StdTcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use quinn::Endpoint;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::congestion::Choice;
use super::gate::{Certificate, Gate, Roster, Verdict};
use super::mux::{End, Mux};
use super::seats::{Seat, Seats};
use super::tls::{self, Shown};
use super::window::{self, Window, Windows};
use super::{
    CLOSE_BUSY, CLOSE_CLOCK, CLOSE_REFUSED, FLUSH_MAX, Link, PRIORITY_CONTROL, SendHalf, Wire,
    hello, quic, tcp,
};
use crate::identity::{Claim, HubIdentity, Redeemer, Serial, secret_hash, validity};
use crate::{Congestion, ConnectionSettings};
use base::admission::{Network, Permit, Pool};
use base::fault::{Fault, IoContext};
use base::limits::{
    CONNECTION_ARRIVALS_WAITING_MAX, CONNECTION_HANDSHAKE_MAX, CONNECTION_HANDSHAKES_EASY,
    CONNECTION_HANDSHAKES_MAX, CONNECTION_HANDSHAKES_PER_ADDRESS_MAX,
    CONNECTION_HANDSHAKES_PROVED_MAX, CONNECTION_JOINS_MAX, CONNECTION_SEND_BYTES_MAX,
    CONNECTION_STATE_BYTES, CONNECTION_TLS_MAX, SITE_CONNECTIONS_MAX,
};
use base::names::{PublisherName, SiteName};
use base::peer::Peer;
use base::tally::Tally;
use base::workers::{Pace, Workers};
use base::{clock, open_files};

/// How long a joining client may take to close after it was answered.
const PARTING_MAX: Duration = Duration::from_secs(5);
/// The pause after a failed accept (too many open files).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// The number of attempts to find a port that is free for both UDP and TCP, if any port is allowed.
const PORT_TRIES_MAX: usize = 16;

/// A new connection at the hub.
pub enum Arrival {
    /// A site with a certificate of this hub, which the [`Gate`] admitted. [`Listener::disconnect`]
    /// reaches the connection from before the gate decided. If [`Link::is_for_renewal`], the site may
    /// only renew its certificate. A second connection of a site usually means that the first one is
    /// dead and not detected yet, or that the site changed to QUIC.
    Site {
        /// The name in the certificate.
        name: SiteName,
        /// The connection, after the welcome.
        link: Link,
        /// The certificate, DER, which verifies the receipts of the site.
        cert_der: Vec<u8>,
    },
    /// A publisher with a certificate of this hub, as above. A publisher may have several connections.
    Publisher {
        /// The name in the certificate.
        name: PublisherName,
        /// The connection, after the welcome.
        link: Link,
    },
    /// A client with a join token.
    Join(JoinRequest),
}

/// A request to join, which must be answered once.
pub struct JoinRequest {
    hub: Arc<HubIdentity>,
    link: Link,
    send: SendHalf,
    token_id: String,
    secret_hash: [u8; 32],
    claim: Claim,
    csr: Vec<u8>,
    /// The hash of the key in the request.
    key_hash: [u8; 32],
    permit: Permit,
}

impl JoinRequest {
    pub fn token_id(&self) -> &str {
        &self.token_id
    }

    /// The hash of the token's secret, as it is stored.
    pub fn secret_hash(&self) -> &[u8; 32] {
        &self.secret_hash
    }

    /// The unverified claim of the client.
    pub fn claim(&self) -> &Claim {
        &self.claim
    }

    /// The address of the client.
    pub fn remote_address(&self) -> SocketAddr {
        self.link.remote_address()
    }

    /// Redeems the token and sends a certificate or the rejection. Returns the holder of the new
    /// certificate.
    pub async fn redeem(self, redeemer: &dyn Redeemer) -> Result<Peer, Fault> {
        let verdict = redeemer
            .redeem(
                &self.token_id,
                &self.secret_hash,
                &self.claim,
                &self.key_hash,
            )
            .await;
        self.answer(verdict).await
    }

    /// Answers the request: issues a certificate with this serial for the holder, or sends the fault
    /// as the rejection and returns it.
    async fn answer(mut self, verdict: Result<(Peer, Serial), Fault>) -> Result<Peer, Fault> {
        let issued = verdict.and_then(|(holder, serial)| {
            Ok((self.hub.issue_as(&holder, &self.csr, &serial)?, holder))
        });
        let answer = match &issued {
            Ok((cert, _)) => hello::Answer::Certificate(hello::encode(cert)),
            Err(fault) => hello::Answer::refused(fault.clone()),
        };
        if issued.is_err() {
            self.permit.reopen();
        }
        let send_and_wait = async {
            let sent = hello::send(&mut self.send, &answer).await;
            // The site closes the connection after it has received the answer. If the hub closed
            // first, the close could overtake the answer.
            self.link.closed().await;
            sent
        };
        let sent = tokio::select! {
            sent = tokio::time::timeout(PARTING_MAX, send_and_wait) => sent.unwrap_or(Ok(())),
            () = self.permit.evicted() => Ok(()),
        };
        let (_, holder) = issued?;
        sent.map_err(|f| {
            f.context(format_args!(
                "{holder} joined but did not receive the answer; the same command can be run again"
            ))
        })?;
        Ok(holder)
    }
}

/// The sockets of the hub. Dropping it stops accepting; open connections continue.
pub struct Listener {
    arrivals: tokio::sync::Mutex<mpsc::Receiver<Arrival>>,
    endpoint: Option<Endpoint>,
    local: SocketAddr,
    manifest_format: Arc<AtomicU32>,
    roster: Arc<Roster>,
    stop: CancellationToken,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
    }
}

impl Listener {
    /// Listens on UDP (QUIC) and TCP (TLS) with the same port number, and lets in whom the `gate`
    /// admits. All connections together buffer about `memory` bytes for sending. Must be called in a
    /// tokio runtime. Two of the daemon's `workers` accept the connections.
    pub fn bind(
        addr: SocketAddr,
        identity: Arc<HubIdentity>,
        gate: Arc<dyn Gate>,
        settings: &ConnectionSettings,
        memory: u64,
        workers: &Workers,
    ) -> Result<Self, Fault> {
        let (tcp, udp) = bind_pair(addr)?;
        let of_hub = (identity, gate);
        Self::start(Some(udp), tcp, of_hub, settings, memory, workers)
    }

    /// Simulates a firewall that drops UDP: returns the UDP socket, which never answers.
    #[cfg(test)]
    pub(super) fn bind_tcp_only(
        addr: SocketAddr,
        identity: Arc<HubIdentity>,
        settings: &ConnectionSettings,
    ) -> Result<(Self, UdpSocket), Fault> {
        let (tcp, udp) = bind_pair(addr)?;
        Ok((
            Self::start(
                None,
                tcp,
                (identity, Arc::new(crate::testing::AdmitAll)),
                settings,
                CONNECTION_SEND_BYTES_MAX,
                &Workers::default(),
            )?,
            udp,
        ))
    }

    fn start(
        udp: Option<UdpSocket>,
        tcp: StdTcpListener,
        (identity, gate): (Arc<HubIdentity>, Arc<dyn Gate>),
        settings: &ConnectionSettings,
        memory: u64,
        workers: &Workers,
    ) -> Result<Self, Fault> {
        let local = tcp.local_addr().at("listen")?;
        let tls = tls::server(&identity)?;
        let (send, receive) = mpsc::channel(CONNECTION_ARRIVALS_WAITING_MAX);
        let stop = CancellationToken::new();
        let reset_key = identity.reset_key();
        let manifest_format = Arc::new(AtomicU32::new(1));
        let roster = Arc::<Roster>::default();
        let admission = Arc::new(Admission {
            hub: identity,
            gate,
            roster: roster.clone(),
            manifest_format: manifest_format.clone(),
            arrivals: send,
            tcp: Pool::new(open_files::share(CONNECTION_HANDSHAKES_MAX, 16)),
            quic: Pool::new(CONNECTION_HANDSHAKES_MAX),
            joins: Pool::new(open_files::share(CONNECTION_JOINS_MAX, 16)),
            seats: Seats::new(
                SITE_CONNECTIONS_MAX,
                open_files::share(SITE_CONNECTIONS_MAX, 2),
            ),
            congestion: settings.congestion,
            memory,
            windows: Windows::new(memory / 4, memory / 4 * 3),
            refused: Tally::new("refused a connection"),
            unfinished: Tally::new("a handshake was not completed"),
            not_accepted: Tally::new("accepting a TCP connection failed"),
            not_yet_valid: Tally::new(
                "a certificate is not valid yet: the clock of this machine is behind, or was ahead when it issued the certificate",
            ),
        });
        let quic = udp
            .map(|udp| quic::listen(udp, tls.clone(), reset_key))
            .transpose()?;
        tcp.set_nonblocking(true).at("listen")?;
        let tcp = TcpListener::from_std(tcp).at("listen")?;
        let endpoint = quic.as_ref().map(|(endpoint, _)| endpoint.clone());
        let accepts = Pace::Continuous;
        if let Some((endpoint, config)) = quic {
            let of = (endpoint, Arc::new(config), admission.clone(), stop.clone());
            workers.start_until_done(
                "accept-quic",
                accepts,
                &of,
                |(endpoint, config, admission, stop)| async move {
                    let accepting = accept_quic(endpoint, config, admission);
                    stop.run_until_cancelled(accepting).await;
                    Ok(())
                },
            );
        }
        let of = (Arc::new(tcp), Arc::new(tls), admission, stop.clone());
        workers.start_until_done(
            "accept-tcp",
            accepts,
            &of,
            |(listener, tls, admission, stop)| async move {
                let accepting = accept_tcp(&listener, tls, admission);
                stop.run_until_cancelled(accepting).await;
                Ok(())
            },
        );
        Ok(Self {
            arrivals: tokio::sync::Mutex::new(receive),
            endpoint,
            local,
            manifest_format,
            roster,
            stop,
        })
    }

    /// Closes the connections of a peer, so that no byte is sent to it any more after a second;
    /// `spare`: except those with this certificate. Returns how many were open. The gate must refuse
    /// the peer before this is called.
    pub fn disconnect(&self, who: &Peer, spare: Option<&Serial>, reason: &str) -> usize {
        let mut open = 0;
        for link in self.roster.of(who) {
            let serial = link.certificate().map(|certificate| &certificate.serial);
            if spare.is_none() || serial != spare {
                open += usize::from(!link.is_closed());
                link.sever(reason);
            }
        }
        open
    }

    /// The next new connection; `None` after [`Listener::close`].
    pub async fn accept(&self) -> Option<Arrival> {
        let mut arrivals = self.arrivals.lock().await;
        tokio::select! {
            biased;
            () = self.stop.cancelled() => None,
            arrival = arrivals.recv() => arrival,
        }
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// The newest format of manifests that the hub announces to its peers; 1 until the owner sets
    /// it.
    pub fn manifest_format(&self) -> Arc<AtomicU32> {
        self.manifest_format.clone()
    }

    /// Stops accepting. Open connections continue; their holders close them.
    pub fn close(&self) {
        self.stop.cancel();
        if let Some(endpoint) = &self.endpoint {
            endpoint.set_server_config(None);
        }
    }

    /// Waits briefly until the close messages of closed connections are sent. Call this last,
    /// before the process ends.
    pub async fn wait_idle(&self) {
        if let Some(endpoint) = &self.endpoint {
            let _ = tokio::time::timeout(FLUSH_MAX, endpoint.wait_idle()).await;
        }
    }
}

fn bind_pair(addr: SocketAddr) -> Result<(StdTcpListener, UdpSocket), Fault> {
    let refused = |what: &str, error: &std::io::Error| {
        let message = format!("listen on {addr} ({what}): {error}");
        match error.kind() {
            std::io::ErrorKind::AddrInUse => Fault::config(message).with_next(
                "stop the program that uses this port, or choose another port under [listen]",
            ),
            _ => Fault::config(message).with_next("correct the address under [listen]"),
        }
    };
    let mut tries = 0;
    loop {
        let tcp = StdTcpListener::bind(addr).map_err(|e| refused("TCP", &e))?;
        let chosen = tcp.local_addr().map_err(|e| refused("TCP", &e))?;
        match UdpSocket::bind(chosen) {
            Ok(udp) => return Ok((tcp, udp)),
            Err(_) if addr.port() == 0 && tries < PORT_TRIES_MAX => tries += 1,
            Err(error) => return Err(refused("UDP", &error)),
        }
    }
}

/// Decides which connections are accepted; shared by all handshakes.
struct Admission {
    hub: Arc<HubIdentity>,
    gate: Arc<dyn Gate>,
    roster: Arc<Roster>,
    manifest_format: Arc<AtomicU32>,
    arrivals: mpsc::Sender<Arrival>,
    /// TCP connections until the peer has presented its certificate.
    tcp: Pool,
    /// QUIC connections until the peer has presented its certificate.
    quic: Pool,
    /// Join requests until they are answered.
    joins: Pool,
    /// Authenticated connections.
    seats: Seats,
    congestion: Congestion,
    /// The bytes that all connections may buffer for sending.
    memory: u64,
    /// The receive windows of all connections.
    windows: Arc<Windows>,
    refused: Tally,
    unfinished: Tally,
    not_accepted: Tally,
    not_yet_valid: Tally,
}

/// The type of a peer after the TLS handshake.
enum Newcomer {
    /// A site or a publisher, with its certificate, also as DER.
    Known(Peer, Certificate, Vec<u8>),
    /// A client that asks to join.
    Joining(Permit),
    /// A rejected peer, with the close code and the reason.
    Refused(u32, Fault),
}

impl Newcomer {
    fn holder(&self) -> Option<Peer> {
        match self {
            Self::Known(who, ..) => Some(who.clone()),
            Self::Joining(_) | Self::Refused(..) => None,
        }
    }
}

impl Admission {
    /// The bytes that each connection may buffer for sending, given the current number of
    /// connections.
    fn send_room(&self) -> u64 {
        let connections = self.seats.used().max(1) as u64;
        (self.memory / connections)
            .saturating_sub(CONNECTION_STATE_BYTES)
            .min(CONNECTION_SEND_BYTES_MAX)
    }

    /// The number of unfinished handshakes allowed for one address. The limit grows with the
    /// connections of that address, so that many sites behind one address can reconnect after a
    /// restart of the hub.
    fn own_max(&self, network: Network) -> usize {
        self.seats.used_by(network).clamp(
            CONNECTION_HANDSHAKES_PER_ADDRESS_MAX,
            CONNECTION_HANDSHAKES_MAX / 4,
        )
    }

    /// Takes a slot for a handshake. `None` if every slot is used by a peer that is already
    /// authenticated.
    fn take_slot(&self, pool: &Pool, remote: SocketAddr, own_max: usize) -> Option<Permit> {
        let permit = pool.enter(Some(remote.ip().into()), own_max);
        if permit.is_none() {
            self.unfinished
                .note(format_args!("{remote}: all handshake slots are in use"));
        }
        permit
    }

    /// Whether a QUIC peer must first prove its address with a Retry, which costs the hub nothing:
    /// if many handshakes are running in total or from that address.
    fn wants_proof(&self, remote: SocketAddr) -> bool {
        let network = remote.ip().into();
        self.quic.used() >= CONNECTION_HANDSHAKES_EASY
            || self.quic.unfinished_of(network) >= self.own_max(network) / 2
    }

    /// Classifies a peer after its handshake, and takes a seat for a known peer.
    fn admit(&self, shown: &Shown, remote: SocketAddr, over_tcp: bool) -> (Newcomer, Option<Seat>) {
        let network = remote.ip().into();
        if shown.alpn == tls::ALPN_JOIN {
            return match self
                .joins
                .enter(Some(network), CONNECTION_HANDSHAKES_PER_ADDRESS_MAX)
            {
                Some(permit) => (Newcomer::Joining(permit), None),
                None => (
                    Newcomer::Refused(
                        CLOSE_BUSY,
                        Fault::unreachable("the hub is processing too many join requests"),
                    ),
                    None,
                ),
            };
        }
        let (who, cert_der) = match tls::check_site(shown) {
            Ok(checked) => checked,
            Err(fault) => return (Newcomer::Refused(CLOSE_REFUSED, fault), None),
        };
        let certificate = match self.certificate(&who, &cert_der) {
            Ok(certificate) => certificate,
            Err(fault) => return (Newcomer::Refused(CLOSE_REFUSED, fault), None),
        };
        match self.seats.take(&who, network, over_tcp) {
            Ok(seat) => (Newcomer::Known(who, certificate, cert_der), Some(seat)),
            Err(fault) => (Newcomer::Refused(CLOSE_BUSY, fault), None),
        }
    }

    /// What the gate must know of a certificate.
    fn certificate(&self, who: &Peer, cert_der: &[u8]) -> Result<Certificate, Fault> {
        let (validity, now) = (validity(cert_der)?, clock::now());
        if let Some(not_yet_valid) = validity.early(who, "the hub", now) {
            self.not_yet_valid.note(not_yet_valid);
        }
        Ok(Certificate {
            serial: Serial::of(cert_der)?,
            expired: (now > validity.until).then_some(validity.until),
        })
    }

    /// Asks the gate. `Err`: the code and the reason with which the connection is closed.
    async fn ask_gate(
        &self,
        who: &Peer,
        certificate: &Certificate,
        cert_der: &[u8],
    ) -> Result<(), (u32, Fault)> {
        match self.gate.admit(who, certificate).await {
            Verdict::Welcome => Ok(()),
            Verdict::Expired => match tls::check_time(cert_der, who, "the hub") {
                Err(fault) => Err((CLOSE_CLOCK, fault)),
                // Its last moment is now.
                Ok(_) => Ok(()),
            },
            Verdict::Refused(why) => Err((CLOSE_REFUSED, Fault::not_allowed(why))),
            Verdict::Busy(why) => Err((CLOSE_BUSY, Fault::unreachable(why))),
        }
    }

    /// Completes the handshake: welcomes a site, reads a join request, or sends the reason of a
    /// rejection.
    async fn enter(
        &self,
        newcomer: Newcomer,
        wire: Wire,
        remote: SocketAddr,
        window: Arc<Window>,
    ) -> Result<(), Fault> {
        match newcomer {
            Newcomer::Refused(code, fault) => {
                let link = Link::new(wire, None, remote);
                link.close_with(code, &fault.message);
                link.closed().await;
                Err(fault.with_next(String::new()))
            }
            Newcomer::Joining(permit) => {
                let request = self
                    .read_join(Link::new(wire, None, remote), permit)
                    .await?;
                let _ = self.arrivals.send(Arrival::Join(request)).await;
                Ok(())
            }
            Newcomer::Known(who, certificate, cert_der) => {
                let holder = (who.clone(), certificate.clone());
                let link = Link::windowed(wire, holder, remote, window);
                self.roster.enter(&who, &link);
                let asked = self.ask_gate(&who, &certificate, &cert_der).await;
                if let Err((code, fault)) = asked {
                    link.close_with(code, &fault.message);
                    link.closed().await;
                    return Err(fault.with_next(String::new()));
                }
                let (mut send, _) = link.open(PRIORITY_CONTROL).await?;
                hello::send(
                    &mut send,
                    &hello::Welcome {
                        hub: self.hub.name().clone(),
                        time_ms: clock::now_unix_ms(),
                        manifest_format: self.manifest_format.load(Ordering::Relaxed),
                        renew_only: certificate.expired.is_some(),
                    },
                )
                .await?;
                link.span().in_scope(|| tracing::info!("connected"));
                let arrival = match who {
                    Peer::Publisher(name) => Arrival::Publisher { name, link },
                    Peer::Site(name) | Peer::Hub(name) => Arrival::Site {
                        name,
                        link,
                        cert_der,
                    },
                };
                let _ = self.arrivals.send(arrival).await;
                Ok(())
            }
        }
    }

    /// Reads a join request. An invalid request is rejected here, before it can use a token.
    async fn read_join(&self, link: Link, permit: Permit) -> Result<JoinRequest, Fault> {
        let asked = tokio::select! {
            asked = self.read_request(&link) => asked?,
            () = permit.evicted() => return Err(Fault::unreachable("the connection was closed in favour of newer join requests")),
        };
        let (mut send, request) = asked;
        match request {
            Ok(asked) => {
                // The token may be used from here on, so the answer must be delivered.
                permit.finish();
                let secret_hash = secret_hash(&asked.token_id, &asked.secret);
                let claim = asked.site.map_or(Claim::Publisher, Claim::Site);
                Ok(JoinRequest {
                    hub: self.hub.clone(),
                    link,
                    send,
                    token_id: asked.token_id,
                    secret_hash,
                    claim,
                    csr: asked.csr,
                    key_hash: asked.key_hash,
                    permit,
                })
            }
            Err(fault) => {
                let refusal = Fault::not_allowed(fault.message.clone())
                    .with_next("make sure that both ends run the same version");
                hello::send(&mut send, &hello::Answer::refused(refusal)).await?;
                let _ = tokio::time::timeout(PARTING_MAX, link.closed()).await;
                Err(fault)
            }
        }
    }

    async fn read_request(
        &self,
        link: &Link,
    ) -> Result<(SendHalf, Result<hello::Asked, Fault>), Fault> {
        let (send, mut recv) = link.accept().await.ok_or_else(|| {
            Fault::unreachable("a joining site disconnected before it sent its request")
        })?;
        let read = async { hello::receive::<hello::Ask>(&mut recv).await?.read() };
        Ok((send, read.await))
    }

    /// Handles a QUIC connection from its first packet until it is passed on.
    async fn take_quic(
        self: &Arc<Self>,
        incoming: quinn::Incoming,
        config: &quinn::ServerConfig,
        permit: &Permit,
    ) -> Result<(), Fault> {
        let remote = incoming.remote_address();
        let choice = Choice::new(self.congestion);
        let connection = in_time(quic::accept(incoming, config, &choice)).await??;
        let shown = quic::shown(&connection);
        let (newcomer, seat) = self.admit(&shown, remote, false);
        if matches!(newcomer, Newcomer::Known(..)) {
            permit.finish();
        }
        let window = Window::new(
            &self.windows,
            newcomer.holder(),
            window::Of::Quic(connection.clone()),
        );
        let (this, current_window) = (self.clone(), window.clone());
        let room = move || {
            current_window.fit();
            this.send_room()
        };
        let send_room = quic::SendRoom::keep(connection.clone(), choice.pace(), room, seat);
        self.enter(
            newcomer,
            Wire::Quic {
                connection,
                endpoint: None,
                choice,
                send_room,
            },
            remote,
            window,
        )
        .await
    }

    /// Handles a TCP connection from its start until it is passed on.
    async fn take_tcp(
        self: &Arc<Self>,
        socket: TcpStream,
        remote: SocketAddr,
        tls: Arc<rustls::ServerConfig>,
        permit: &Permit,
    ) -> Result<(), Fault> {
        let secured = in_time(tcp::accept(socket, tls, self.congestion)).await?;
        let secured = secured.map_err(|e| Fault::unreachable(e.to_string()))?;
        let (newcomer, seat) = self.admit(&secured.shown, remote, true);
        if matches!(newcomer, Newcomer::Known(..)) {
            permit.finish();
        }
        let mux = Mux::start(secured.io, End::Listening, secured.handshake, seat);
        let window = Window::new(
            &self.windows,
            newcomer.holder(),
            window::Of::Tcp(mux.unread_limit()),
        );
        let (this, current_window) = (self.clone(), window.clone());
        mux.adjust_limit(move || {
            current_window.fit();
            this.send_room()
        });
        self.enter(
            newcomer,
            Wire::Tcp {
                mux,
                traffic: secured.traffic,
            },
            remote,
            window,
        )
        .await
    }

    /// Runs `work` until its end, its deadline, or the eviction of its connection.
    async fn conclude(
        &self,
        work: impl Future<Output = Result<(), Fault>>,
        permit: &Permit,
        remote: SocketAddr,
    ) {
        let result = tokio::select! {
            biased;
            () = permit.evicted() => Err(Fault::unreachable("the connection was closed in favour of newer connections")),
            result = tokio::time::timeout(CONNECTION_HANDSHAKE_MAX, work) => result.unwrap_or_else(|_| Err(too_slow())),
        };
        match result {
            Ok(()) => {}
            Err(fault) if fault.code == base::fault::Code::NotAllowed => {
                self.refused.note(format_args!("{remote}: {fault}"));
            }
            Err(fault) => self.unfinished.note(format_args!("{remote}: {fault}")),
        }
    }
}

fn too_slow() -> Fault {
    Fault::unreachable("the handshake took too long")
}

/// The TLS handshake has its own deadline, which incoming bytes do not extend.
async fn in_time<T>(handshake: impl Future<Output = T>) -> Result<T, Fault> {
    tokio::time::timeout(CONNECTION_TLS_MAX, handshake)
        .await
        .map_err(|_| too_slow())
}

async fn accept_quic(
    endpoint: Endpoint,
    config: Arc<quinn::ServerConfig>,
    admission: Arc<Admission>,
) {
    while let Some(incoming) = endpoint.accept().await {
        let remote = incoming.remote_address();
        if !incoming.remote_address_validated()
            && admission.wants_proof(remote)
            && incoming.may_retry()
        {
            let _ = incoming.retry();
            continue;
        }
        // After a restart of the hub, many sites behind one address connect at once. An address
        // that was proved with a Retry may have more handshakes.
        let own_max = match incoming.remote_address_validated() {
            true => CONNECTION_HANDSHAKES_PROVED_MAX,
            false => admission.own_max(remote.ip().into()),
        };
        let Some(permit) = admission.take_slot(&admission.quic, remote, own_max) else {
            incoming.refuse();
            continue;
        };
        let (admission, config) = (admission.clone(), config.clone());
        tokio::spawn(async move {
            admission
                .conclude(
                    admission.take_quic(incoming, &config, &permit),
                    &permit,
                    remote,
                )
                .await;
        });
    }
}

async fn accept_tcp(
    listener: &TcpListener,
    tls: Arc<rustls::ServerConfig>,
    admission: Arc<Admission>,
) {
    loop {
        admission.tcp.ready().await;
        let (socket, remote) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                admission
                    .not_accepted
                    .note(Fault::io("accept a TCP connection", &error));
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let own_max = admission.own_max(remote.ip().into());
        let Some(permit) = admission.take_slot(&admission.tcp, remote, own_max) else {
            continue;
        };
        let (admission, tls) = (admission.clone(), tls.clone());
        tokio::spawn(async move {
            admission
                .conclude(
                    admission.take_tcp(socket, remote, tls, &permit),
                    &permit,
                    remote,
                )
                .await;
        });
    }
}

//! The hub's side: one UDP and one TCP socket on the same port number, and what arrives there.

use std::net::{SocketAddr, TcpListener as StdTcpListener, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::Endpoint;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::congestion::Choice;
use super::mux::{End, Mux};
use super::seats::{Seat, Seats};
use super::tls::{self, Shown};
use super::window::{self, Window, Windows};
use super::{
    CLOSE_BUSY, CLOSE_CLOCK, CLOSE_REFUSED, FLUSH_MAX, Link, PRIORITY_CONTROL, SendHalf, Wire,
    hello, quic, tcp,
};
use crate::identity::{Claim, Holder, HubIdentity, Redeemer, secret_hash};
use crate::{Congestion, ConnectionSettings};
use base::admission::{Network, Permit, Pool};
use base::fault::{Fault, IoContext};
use base::limits::{
    CONNECTION_ARRIVALS_WAITING_MAX, CONNECTION_HANDSHAKE_MAX, CONNECTION_HANDSHAKES_EASY,
    CONNECTION_HANDSHAKES_MAX, CONNECTION_HANDSHAKES_PER_ADDRESS_MAX,
    CONNECTION_HANDSHAKES_PROVED_MAX, CONNECTION_JOINS_MAX, CONNECTION_SEND_BYTES_MAX,
    CONNECTION_TLS_MAX, SITE_CONNECTIONS_MAX,
};
use base::names::SiteName;
use base::tally::Tally;
use base::{clock, open_files};

/// How long a site that was answered may take to go.
const PARTING_MAX: Duration = Duration::from_secs(5);
/// After a failed accept (too many open files), the pause before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Tries to find a port number that is free for both UDP and TCP, when any port will do.
const PORT_TRIES_MAX: usize = 16;

/// What comes to the hub.
pub enum Arrival {
    /// A site with a certificate of this hub, good by the hub's clock. Whether the hub still knows
    /// the site is the taker's to check. A second line of a site usually means that the first is
    /// dead and not yet noticed, or that the site moved over to QUIC.
    Site {
        /// The name in the certificate.
        name: SiteName,
        /// The line, which stands and has been welcomed.
        link: Link,
        /// The certificate, DER, with which the site's receipts are checked.
        cert_der: Vec<u8>,
    },
    /// A publisher with a certificate of this hub; several lines of one publisher may stand.
    Publisher {
        /// The name in the certificate.
        name: SiteName,
        /// The line, which stands and has been welcomed.
        link: Link,
    },
    /// Somebody with a join token.
    Join(JoinRequest),
}

/// A request to join, to be answered once.
pub struct JoinRequest {
    hub: Arc<HubIdentity>,
    link: Link,
    send: SendHalf,
    token_id: String,
    secret_hash: [u8; 32],
    claim: Claim,
    csr: Vec<u8>,
    /// The hash of the key that the request is for.
    key_hash: [u8; 32],
    place: Permit,
}

impl JoinRequest {
    /// The token's id.
    pub fn token_id(&self) -> &str {
        &self.token_id
    }

    /// The hash of the token's secret, as it is stored.
    pub fn secret_hash(&self) -> &[u8; 32] {
        &self.secret_hash
    }

    /// Who it says that it is, which proves nothing.
    pub fn claim(&self) -> &Claim {
        &self.claim
    }

    /// Where the request comes from.
    pub fn remote_address(&self) -> SocketAddr {
        self.link.remote_address()
    }

    /// Redeems the token and answers with a certificate or the refusal. Returns who joined.
    pub async fn redeem(self, redeemer: &dyn Redeemer) -> Result<Holder, Fault> {
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

    /// Answers: a holder gets a certificate of his name, a fault is sent as the refusal (and
    /// returned).
    pub async fn answer(mut self, verdict: Result<Holder, Fault>) -> Result<Holder, Fault> {
        let issued =
            verdict.and_then(|holder| Ok((self.hub.issue_as(&holder, &self.csr)?, holder)));
        let answer = match &issued {
            Ok((cert, _)) => hello::Answer::Certificate(hello::encode(cert)),
            Err(fault) => hello::Answer::refused(fault.clone()),
        };
        if issued.is_err() {
            self.place.reopen();
        }
        let send_and_part = async {
            let sent = hello::send(&mut self.send, &answer).await;
            // The site closes once it has the answer; closing first could overtake it.
            self.link.closed().await;
            sent
        };
        let sent = tokio::select! {
            sent = tokio::time::timeout(PARTING_MAX, send_and_part) => sent.unwrap_or(Ok(())),
            () = self.place.evicted() => Ok(()),
        };
        let (_, holder) = issued?;
        sent.map_err(|f| {
            f.context(format_args!(
                "{holder} was not told that it joined; the same command can be run again"
            ))
        })?;
        Ok(holder)
    }
}

/// The hub's sockets. Dropped, it accepts no more; lines that stand go on.
pub struct Listener {
    arrivals: tokio::sync::Mutex<mpsc::Receiver<Arrival>>,
    endpoint: Option<Endpoint>,
    local: SocketAddr,
    stop: CancellationToken,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
    }
}

impl Listener {
    /// Listens on UDP (QUIC) and TCP (TLS) at the same port number. All lines together buffer about
    /// `memory` bytes for sending. Must be called within a tokio runtime.
    pub fn bind(
        addr: SocketAddr,
        identity: Arc<HubIdentity>,
        settings: &ConnectionSettings,
        memory: u64,
    ) -> Result<Self, Fault> {
        let (tcp, udp) = bind_pair(addr)?;
        Self::start(Some(udp), tcp, identity, settings, memory)
    }

    /// As where a firewall drops UDP: the UDP socket is handed out and answers nothing.
    #[cfg(test)]
    pub(super) fn bind_tcp_only(
        addr: SocketAddr,
        identity: Arc<HubIdentity>,
        settings: &ConnectionSettings,
    ) -> Result<(Self, UdpSocket), Fault> {
        let (tcp, udp) = bind_pair(addr)?;
        Ok((
            Self::start(None, tcp, identity, settings, CONNECTION_SEND_BYTES_MAX)?,
            udp,
        ))
    }

    fn start(
        udp: Option<UdpSocket>,
        tcp: StdTcpListener,
        identity: Arc<HubIdentity>,
        settings: &ConnectionSettings,
        memory: u64,
    ) -> Result<Self, Fault> {
        let local = tcp.local_addr().at("listen")?;
        let tls = tls::server(&identity)?;
        let (send, receive) = mpsc::channel(CONNECTION_ARRIVALS_WAITING_MAX);
        let stop = CancellationToken::new();
        let reset_key = identity.reset_key();
        let admission = Arc::new(Admission {
            hub: identity,
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
            early: Tally::new(
                "a certificate is not valid yet: the clock of this machine is behind, or was ahead when it issued the certificate",
            ),
        });
        let quic = udp
            .map(|udp| quic::listen(udp, tls.clone(), reset_key))
            .transpose()?;
        tcp.set_nonblocking(true).at("listen")?;
        let tcp = TcpListener::from_std(tcp).at("listen")?;
        let endpoint = quic.as_ref().map(|(endpoint, _)| endpoint.clone());
        if let Some((endpoint, config)) = quic {
            tokio::spawn(stop.clone().run_until_cancelled_owned(accept_quic(
                endpoint,
                config,
                admission.clone(),
            )));
        }
        tokio::spawn(stop.clone().run_until_cancelled_owned(accept_tcp(
            tcp,
            Arc::new(tls),
            admission,
        )));
        Ok(Self {
            arrivals: tokio::sync::Mutex::new(receive),
            endpoint,
            local,
            stop,
        })
    }

    /// The next arrival; `None` after [`Listener::close`].
    pub async fn accept(&self) -> Option<Arrival> {
        let mut arrivals = self.arrivals.lock().await;
        tokio::select! {
            biased;
            () = self.stop.cancelled() => None,
            arrival = arrivals.recv() => arrival,
        }
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Accepts no more. Lines that stand go on; their holders close them.
    pub fn close(&self) {
        self.stop.cancel();
        if let Some(endpoint) = &self.endpoint {
            endpoint.set_server_config(None);
        }
    }

    /// Waits a moment for the goodbyes of closed lines to leave: to be called last, before the
    /// process ends.
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
                "stop the program that uses this port, or choose another under [listen]",
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

/// Who may connect, and what all handshakes share.
struct Admission {
    hub: Arc<HubIdentity>,
    arrivals: mpsc::Sender<Arrival>,
    /// TCP connections until the peer has shown its certificate.
    tcp: Pool,
    /// QUIC connections until then.
    quic: Pool,
    /// Connections that ask to join, until they are answered.
    joins: Pool,
    /// Authenticated connections.
    seats: Seats,
    congestion: Congestion,
    /// Bytes that all lines may buffer for sending.
    memory: u64,
    /// What they may hold that nobody reads yet.
    windows: Arc<Windows>,
    refused: Tally,
    unfinished: Tally,
    not_accepted: Tally,
    early: Tally,
}

/// What a peer turned out to be, once TLS is done.
enum Newcomer {
    /// A site or a publisher, with its certificate (DER).
    Known(Holder, Vec<u8>),
    /// Somebody who asks to join.
    Joining(Permit),
    /// Somebody who is told why not, with this code.
    Refused(u32, Fault),
}

impl Newcomer {
    fn holder(&self) -> Option<Holder> {
        match self {
            Self::Known(who, _) => Some(who.clone()),
            Self::Joining(_) | Self::Refused(..) => None,
        }
    }
}

impl Admission {
    /// What one line may buffer for sending, as many as there are now.
    fn send_room(&self) -> u64 {
        (self.memory / self.seats.used().max(1) as u64).min(CONNECTION_SEND_BYTES_MAX)
    }

    /// Unfinished handshakes that one address may have. Many sites behind one address, which a
    /// restarted hub has to take in again, get more as they come.
    fn own_max(&self, network: Network) -> usize {
        self.seats.used_by(network).clamp(
            CONNECTION_HANDSHAKES_PER_ADDRESS_MAX,
            CONNECTION_HANDSHAKES_MAX / 4,
        )
    }

    /// A place for a handshake. `None` if every place is taken by a peer that is being welcomed.
    fn begin(&self, pool: &Pool, remote: SocketAddr, own_max: usize) -> Option<Permit> {
        let place = pool.enter(Some(remote.ip().into()), own_max);
        if place.is_none() {
            self.unfinished
                .note(format_args!("{remote}: no room for another handshake"));
        }
        place
    }

    /// Whether a QUIC peer has to prove its address first, which costs the hub nothing: many
    /// handshakes run, in all or from there.
    fn wants_proof(&self, remote: SocketAddr) -> bool {
        let network = remote.ip().into();
        self.quic.used() >= CONNECTION_HANDSHAKES_EASY
            || self.quic.unfinished_of(network) >= self.own_max(network) / 2
    }

    /// Decides about a peer whose handshake is done, and takes the seat of one that is known.
    fn admit(&self, shown: &Shown, remote: SocketAddr, over_tcp: bool) -> (Newcomer, Option<Seat>) {
        let network = remote.ip().into();
        if shown.alpn == tls::ALPN_JOIN {
            return match self
                .joins
                .enter(Some(network), CONNECTION_HANDSHAKES_PER_ADDRESS_MAX)
            {
                Some(place) => (Newcomer::Joining(place), None),
                None => (
                    Newcomer::Refused(
                        CLOSE_BUSY,
                        Fault::unreachable("the hub answers too many join requests now"),
                    ),
                    None,
                ),
            };
        }
        let (who, cert_der) = match tls::check_site(shown) {
            Ok(checked) => checked,
            Err(fault) => return (Newcomer::Refused(CLOSE_REFUSED, fault), None),
        };
        match tls::check_time(&cert_der, &who, "the hub") {
            Ok(None) => {}
            Ok(Some(early)) => self.early.note(early),
            Err(fault) => return (Newcomer::Refused(CLOSE_CLOCK, fault), None),
        }
        match self.seats.take(&who, network, over_tcp) {
            Ok(seat) => (Newcomer::Known(who, cert_der), Some(seat)),
            Err(fault) => (Newcomer::Refused(CLOSE_BUSY, fault), None),
        }
    }

    /// After the handshake: welcomes a site, hears a join request, or says why not.
    async fn enter(
        &self,
        newcomer: Newcomer,
        wire: Wire,
        remote: SocketAddr,
        window: Option<Arc<Window>>,
    ) -> Result<(), Fault> {
        match newcomer {
            Newcomer::Refused(code, fault) => {
                let link = Link::new(wire, None, remote);
                link.close_with(code, &fault.message);
                link.closed().await;
                Err(fault.with_next(String::new()))
            }
            Newcomer::Joining(place) => {
                let request = self.hear(Link::new(wire, None, remote), place).await?;
                let _ = self.arrivals.send(Arrival::Join(request)).await;
                Ok(())
            }
            Newcomer::Known(who, cert_der) => {
                let link = Link::windowed(wire, who.clone(), remote, window);
                let (mut send, _) = link.open(PRIORITY_CONTROL).await?;
                hello::send(
                    &mut send,
                    &hello::Welcome {
                        hub: self.hub.name().clone(),
                        time_ms: clock::now_unix_ms(),
                    },
                )
                .await?;
                tracing::info!(%who, %remote, transport = link.transport(), "connected");
                let arrival = match who {
                    Holder::Publisher(name) => Arrival::Publisher { name, link },
                    Holder::Site(name) | Holder::Hub(name) => Arrival::Site {
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

    /// Reads a join request. A request that could not be granted anyhow is refused here, before it
    /// can use up a token.
    async fn hear(&self, link: Link, place: Permit) -> Result<JoinRequest, Fault> {
        let asked = tokio::select! {
            asked = self.read_request(&link) => asked?,
            () = place.evicted() => return Err(Fault::unreachable("newer join requests took its place")),
        };
        let (mut send, request) = asked;
        match request {
            Ok(asked) => {
                // From here on the token may be used up: the answer must arrive.
                place.finish();
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
                    place,
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
        let (send, mut recv) = link
            .accept()
            .await
            .ok_or_else(|| Fault::unreachable("a joining site went away before it asked"))?;
        let read = async { hello::receive::<hello::Ask>(&mut recv).await?.read() };
        Ok((send, read.await))
    }

    /// A QUIC connection from its first packet to its arrival.
    async fn take_quic(
        self: &Arc<Self>,
        incoming: quinn::Incoming,
        config: &quinn::ServerConfig,
        place: &Permit,
    ) -> Result<(), Fault> {
        let remote = incoming.remote_address();
        let choice = Choice::new(self.congestion);
        let connection = in_time(quic::accept(incoming, config, &choice)).await??;
        let shown = quic::shown(&connection);
        let (newcomer, seat) = self.admit(&shown, remote, false);
        if matches!(newcomer, Newcomer::Known(..)) {
            place.finish();
        }
        let window = Window::new(
            &self.windows,
            newcomer.holder(),
            window::Of::Quic(connection.clone()),
        );
        let (own, fitted) = (self.clone(), window.clone());
        let room = move || {
            fitted.fit();
            own.send_room()
        };
        quic::tend(connection.clone(), room, seat);
        self.enter(
            newcomer,
            Wire::Quic {
                connection,
                endpoint: None,
                choice,
            },
            remote,
            Some(window),
        )
        .await
    }

    /// A TCP connection from its beginning to its arrival.
    async fn take_tcp(
        self: &Arc<Self>,
        socket: TcpStream,
        remote: SocketAddr,
        tls: Arc<rustls::ServerConfig>,
        place: &Permit,
    ) -> Result<(), Fault> {
        let secured = in_time(tcp::accept(socket, tls, self.congestion)).await?;
        let secured = secured.map_err(|e| Fault::unreachable(e.to_string()))?;
        let (newcomer, seat) = self.admit(&secured.shown, remote, true);
        if matches!(newcomer, Newcomer::Known(..)) {
            place.finish();
        }
        let mux = Mux::start(secured.io, End::Listening, secured.handshake, seat);
        let own = self.clone();
        mux.tend(move || own.send_room());
        self.enter(
            newcomer,
            Wire::Tcp {
                mux,
                traffic: secured.traffic,
            },
            remote,
            None,
        )
        .await
    }

    /// Runs what takes a connection until its end, its deadline, or the moment that a newer
    /// connection takes its place.
    async fn conclude(
        &self,
        work: impl Future<Output = Result<(), Fault>>,
        place: &Permit,
        remote: SocketAddr,
    ) {
        let result = tokio::select! {
            biased;
            () = place.evicted() => Err(Fault::unreachable("newer connections took its place")),
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

/// The TLS handshake has a deadline of its own, however many bytes trickle in.
async fn in_time<T>(handshake: impl Future<Output = T>) -> Result<T, Fault> {
    tokio::time::timeout(CONNECTION_TLS_MAX, handshake)
        .await
        .map_err(|_| too_slow())
}

async fn accept_quic(endpoint: Endpoint, config: quinn::ServerConfig, admission: Arc<Admission>) {
    let config = Arc::new(config);
    while let Some(incoming) = endpoint.accept().await {
        let remote = incoming.remote_address();
        if !incoming.remote_address_validated()
            && admission.wants_proof(remote)
            && incoming.may_retry()
        {
            let _ = incoming.retry();
            continue;
        }
        // Sites behind one address come together after a restart of the hub: whoever has proved
        // that the address is his may have more.
        let own_max = match incoming.remote_address_validated() {
            true => CONNECTION_HANDSHAKES_PROVED_MAX,
            false => admission.own_max(remote.ip().into()),
        };
        let Some(place) = admission.begin(&admission.quic, remote, own_max) else {
            incoming.refuse();
            continue;
        };
        let (admission, config) = (admission.clone(), config.clone());
        tokio::spawn(async move {
            admission
                .conclude(
                    admission.take_quic(incoming, &config, &place),
                    &place,
                    remote,
                )
                .await;
        });
    }
}

async fn accept_tcp(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    admission: Arc<Admission>,
) {
    loop {
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
        let Some(place) = admission.begin(&admission.tcp, remote, own_max) else {
            continue;
        };
        let (admission, tls) = (admission.clone(), tls.clone());
        tokio::spawn(async move {
            admission
                .conclude(
                    admission.take_tcp(socket, remote, tls, &place),
                    &place,
                    remote,
                )
                .await;
        });
    }
}

//! The hub's side: one UDP and one TCP socket on the same port number, and what arrives there.

use std::net::{SocketAddr, TcpListener as StdTcpListener, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::Endpoint;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::congestion::Choice;
use super::mux::{End, Mux};
use super::tls::{self, Shown};
use super::{CLOSE_REFUSED, FLUSH_MAX, Link, PRIORITY_CONTROL, SendHalf, Wire, hello, quic, tcp};
use crate::clock;
use crate::config::{Congestion, Line};
use crate::fault::{Fault, IoContext};
use crate::identity::{Claim, Holder, HubIdentity, Redeemer, read_csr, secret_hash};
use crate::limits::{
    LINE_ARRIVALS_WAITING_MAX, LINE_HANDSHAKE_MAX, LINE_HANDSHAKES_EASY, LINE_HANDSHAKES_MAX, LINE_SEND_BYTES_MAX, SITE_CONNECTIONS_MAX,
};
use crate::names::SiteName;

/// How long a site that was answered may take to go.
const PARTING_MAX: Duration = Duration::from_secs(5);
/// After a failed accept (too many open files), the pause before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Tries to find a port number that is free for both UDP and TCP, when any port will do.
const PORT_TRIES_MAX: usize = 16;

/// What comes to the hub.
pub enum Arrival {
    /// A site with a certificate of this hub, good by the hub's clock. Whether the hub still knows the site is the taker's to check. A
    /// second line of a site usually means that the first is dead and not yet noticed, or that the site moved over to QUIC.
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
        let verdict = redeemer.redeem(&self.token_id, &self.secret_hash, &self.claim).await;
        self.answer(verdict).await
    }

    /// Answers: a holder gets a certificate of his name, a fault is sent as the refusal (and returned).
    pub async fn answer(mut self, verdict: Result<Holder, Fault>) -> Result<Holder, Fault> {
        let issued = verdict.and_then(|holder| Ok((self.hub.issue_as(&holder, &self.csr)?, holder)));
        let answer = match &issued {
            Ok((cert, _)) => hello::Answer::Certificate(hello::encode(cert)),
            Err(fault) => hello::Answer::refused(fault.clone()),
        };
        let sent = hello::send(&mut self.send, &answer).await;
        // The site closes once it has the answer; closing first could overtake it.
        let _ = tokio::time::timeout(PARTING_MAX, self.link.closed()).await;
        let (_, holder) = issued?;
        sent.map_err(|f| f.context(format_args!("{holder} was not told that it joined, and needs a new token")))?;
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
    /// Listens on UDP (QUIC) and TCP (TLS) at the same port number. All lines together buffer about `memory` bytes for sending.
    /// Must be called within a tokio runtime.
    pub fn bind(addr: SocketAddr, identity: Arc<HubIdentity>, line: &Line, memory: u64) -> Result<Self, Fault> {
        let (tcp, udp) = bind_pair(addr)?;
        Self::start(Some(udp), tcp, identity, line, memory)
    }

    /// As where a firewall drops UDP: the UDP socket is handed out and answers nothing.
    #[cfg(test)]
    pub(super) fn bind_tcp_only(addr: SocketAddr, identity: Arc<HubIdentity>, line: &Line) -> Result<(Self, UdpSocket), Fault> {
        let (tcp, udp) = bind_pair(addr)?;
        Ok((Self::start(None, tcp, identity, line, LINE_SEND_BYTES_MAX)?, udp))
    }

    fn start(udp: Option<UdpSocket>, tcp: StdTcpListener, identity: Arc<HubIdentity>, line: &Line, memory: u64) -> Result<Self, Fault> {
        let local = tcp.local_addr().at("listen")?;
        let tls = tls::server(&identity)?;
        let (send, receive) = mpsc::channel(LINE_ARRIVALS_WAITING_MAX);
        let stop = CancellationToken::new();
        let reset_key = identity.reset_key();
        let door = Arc::new(Door {
            hub: identity,
            arrivals: send,
            handshakes: Arc::new(Semaphore::new(LINE_HANDSHAKES_MAX)),
            seats: Arc::new(Semaphore::new(SITE_CONNECTIONS_MAX)),
            congestion: line.congestion,
            memory,
        });
        let quic = udp.map(|udp| quic::listen(udp, tls.clone(), reset_key)).transpose()?;
        tcp.set_nonblocking(true).at("listen")?;
        let tcp = TcpListener::from_std(tcp).at("listen")?;
        let endpoint = quic.as_ref().map(|(endpoint, _)| endpoint.clone());
        if let Some((endpoint, config)) = quic {
            tokio::spawn(stop.clone().run_until_cancelled_owned(accept_quic(endpoint, config, door.clone())));
        }
        tokio::spawn(stop.clone().run_until_cancelled_owned(accept_tcp(tcp, Arc::new(tls), door)));
        Ok(Self { arrivals: tokio::sync::Mutex::new(receive), endpoint, local, stop })
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

    /// Waits a moment for the goodbyes of closed lines to leave: to be called last, before the process ends.
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
            std::io::ErrorKind::AddrInUse => {
                Fault::config(message).with_next("stop the program that uses this port, or choose another under [listen]")
            }
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

/// What all handshakes share.
struct Door {
    hub: Arc<HubIdentity>,
    arrivals: mpsc::Sender<Arrival>,
    handshakes: Arc<Semaphore>,
    /// Places for connections.
    seats: Arc<Semaphore>,
    congestion: Congestion,
    /// Bytes that all lines may buffer for sending.
    memory: u64,
}

impl Door {
    /// What one line may buffer for sending, as many as there are now.
    fn send_room(&self) -> u64 {
        let lines = SITE_CONNECTIONS_MAX - self.seats.available_permits();
        (self.memory / lines.max(1) as u64).min(LINE_SEND_BYTES_MAX)
    }

    /// A place for the handshake and one for the connection, or none.
    fn admit(&self) -> Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)> {
        let handshake = self.handshakes.clone().try_acquire_owned().ok()?;
        let seat = self.seats.clone().try_acquire_owned().ok()?;
        Some((handshake, seat))
    }

    fn is_busy(&self) -> bool {
        self.handshakes.available_permits() < LINE_HANDSHAKES_MAX - LINE_HANDSHAKES_EASY
    }

    /// After the handshake: welcomes a site, hears a join request, or says why not.
    async fn enter(&self, wire: Wire, shown: Shown, remote: SocketAddr) -> Result<(), Fault> {
        if shown.alpn == tls::ALPN_JOIN {
            let link = Link::new(wire, None, remote);
            let request = self.hear(link).await?;
            let _ = self.arrivals.send(Arrival::Join(request)).await;
            return Ok(());
        }
        let (who, cert_der) = match tls::check_site(&shown) {
            Ok(checked) => checked,
            Err(fault) => {
                Link::new(wire, None, remote).close_with(CLOSE_REFUSED, &fault.message);
                return Err(fault);
            }
        };
        let (name, publishes) = (who.name().clone(), matches!(who, Holder::Publisher(_)));
        let link = Link::new(wire, Some(who.clone()), remote);
        let (mut send, _) = link.open(PRIORITY_CONTROL).await?;
        hello::send(&mut send, &hello::Welcome { hub: self.hub.name().clone(), time_ms: clock::now_unix_ms() }).await?;
        tracing::info!(%who, %remote, transport = link.transport(), "connected");
        let arrival = if publishes { Arrival::Publisher { name, link } } else { Arrival::Site { name, link, cert_der } };
        let _ = self.arrivals.send(arrival).await;
        Ok(())
    }

    /// Reads a join request. A request that could not be granted anyhow is refused here, before it can use up a token.
    async fn hear(&self, link: Link) -> Result<JoinRequest, Fault> {
        let (mut send, mut recv) = link.accept().await.ok_or_else(|| Fault::unreachable("a joining site went away before it asked"))?;
        let read = async {
            let ask: hello::Ask = hello::receive(&mut recv).await?;
            let csr = hello::decode(&ask.csr)?;
            read_csr(&csr)?;
            let secret =
                <[u8; 32]>::try_from(hello::decode(&ask.secret)?).map_err(|_| Fault::integrity("the token's secret is not 32 bytes"))?;
            Ok::<_, Fault>((ask, csr, secret))
        };
        match read.await {
            Ok((ask, csr, secret)) => {
                let secret_hash = secret_hash(&ask.token_id, &secret);
                let claim = ask.site.map_or(Claim::Publisher, Claim::Site);
                Ok(JoinRequest { hub: self.hub.clone(), link, send, token_id: ask.token_id, secret_hash, claim, csr })
            }
            Err(fault) => {
                let refusal = Fault::not_allowed(fault.message.clone()).with_next("make sure that both ends run the same version");
                hello::send(&mut send, &hello::Answer::refused(refusal)).await?;
                let _ = tokio::time::timeout(PARTING_MAX, link.closed()).await;
                Err(fault)
            }
        }
    }
}

async fn accept_quic(endpoint: Endpoint, config: quinn::ServerConfig, door: Arc<Door>) {
    let config = Arc::new(config);
    while let Some(incoming) = endpoint.accept().await {
        let Some((handshake, seat)) = door.admit() else {
            tracing::warn!(remote = %incoming.remote_address(), "no room for another connection");
            incoming.refuse();
            continue;
        };
        if door.is_busy() && !incoming.remote_address_validated() && incoming.may_retry() {
            let _ = incoming.retry();
            continue;
        }
        let (door, config) = (door.clone(), config.clone());
        tokio::spawn(async move {
            let remote = incoming.remote_address();
            let work = async {
                let choice = Choice::new(door.congestion);
                let connection = quic::accept(incoming, &config, &choice).await?;
                let own = door.clone();
                quic::tend(connection.clone(), move || own.send_room(), seat);
                let shown = quic::shown(&connection);
                let endpoint = None;
                door.enter(Wire::Quic { connection, endpoint, choice }, shown, remote).await
            };
            conclude(tokio::time::timeout(LINE_HANDSHAKE_MAX, work).await, remote);
            drop(handshake);
        });
    }
}

async fn accept_tcp(listener: TcpListener, tls: Arc<rustls::ServerConfig>, door: Arc<Door>) {
    loop {
        let (socket, remote) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accepting a TCP connection failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some((handshake, seat)) = door.admit() else {
            tracing::warn!(%remote, "no room for another connection");
            continue;
        };
        let (door, tls) = (door.clone(), tls.clone());
        tokio::spawn(async move {
            let work = async {
                let secured = tcp::accept(socket, tls, door.congestion).await;
                let secured = secured.map_err(|e| Fault::unreachable(e.to_string()))?;
                let mux = Mux::start(secured.io, End::Listening, secured.handshake, seat);
                let own = door.clone();
                mux.tend(move || own.send_room());
                door.enter(Wire::Tcp { mux, traffic: secured.traffic }, secured.shown, remote).await
            };
            conclude(tokio::time::timeout(LINE_HANDSHAKE_MAX, work).await, remote);
            drop(handshake);
        });
    }
}

/// Strangers knock on every open port, so a failed handshake is worth a line of debugging and no more; a refusal is worth one of info.
fn conclude(result: Result<Result<(), Fault>, tokio::time::error::Elapsed>, remote: SocketAddr) {
    match result {
        Ok(Ok(())) => {}
        Ok(Err(fault)) if fault.code == crate::fault::Code::NotAllowed => {
            tracing::info!(%remote, why = %fault, "refused a connection");
        }
        Ok(Err(fault)) => tracing::debug!(%remote, why = %fault, "a handshake failed"),
        Err(_) => tracing::debug!(%remote, "a handshake took too long"),
    }
}

//! The connecting side: a site or publisher opens a connection to the hub, or joins it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::net::TcpStream;

use super::addresses::{self, Route};
use super::congestion::Choice;
use super::mux::{End, Mux};
use super::tls::{self, Shown};
use super::{
    CLOSE_CLOCK, CLOSE_REFUSED, Ended, Link, PRIORITY_CONTROL, Wire, clean, hello, quic, tcp,
};
use crate::identity::{CertificateRequest, Claim, JoinToken, SiteIdentity};
use crate::{ConnectionSettings, ProxySettings, Transport};
use base::clock;
use base::fault::{Code, Fault, Reason};
use base::limits::{
    CONNECTION_HANDSHAKE_MAX, CONNECTION_QUIC_ANSWER_MAX, CONNECTION_SEND_BYTES_MAX,
    CONNECTION_SEND_BYTES_MIN,
};
use base::peer::Peer;

/// The delay before the next address is tried, while the one before has not failed.
const HEAD_START: Duration = Duration::from_millis(250);
/// If a TCP handshake is not complete after this time, smaller segments are tried, and after twice
/// this time even smaller ones.
const TCP_SEGMENT_AFTER: Duration = Duration::from_secs(3);
/// Segments for IP packets of 1,200 bytes, and for the 576 bytes that every IPv4 path carries.
const TCP_SEGMENT_BYTES: [u32; 2] = [1160, 536];
/// The difference of the two clocks from which a warning is logged.
pub(crate) const CLOCK_DIFFERENCE_MAX: Duration = Duration::from_secs(60);

/// Why an attempt to connect failed.
enum Failure {
    /// No answer: another address or transport may work.
    NoAnswer(String),
    /// A proxy answered that it does not connect; another address may work.
    Blocked(Fault),
    /// The hub answered, and a retry with another address or transport is useless.
    Refused(Fault),
}

impl Failure {
    fn of(ended: &Ended, address: &str) -> Self {
        let reason = &ended.reason;
        if ended.code == Some(CLOSE_CLOCK) {
            return Failure::Refused(refused_by_clock(address, reason, clock::now()));
        }
        if ended.code != Some(CLOSE_REFUSED) {
            return Failure::NoAnswer(reason.clone());
        }
        Failure::Refused(if reason.contains(tls::PIN_MISMATCH) {
            Fault::not_allowed(format!("the hub at {address} did not create this token: the hash of its CA differs")).with_next(
                "check the address; if it is correct, create a new token at that hub, or omit the token if this machine has already joined the hub",
            )
        } else if ended.by_peer {
            Fault::not_allowed(format!("the hub at {address} rejected this site: {reason}"))
                .with_next(next_after_refusal(reason))
        } else {
            Fault::not_allowed(format!(
                "the certificate of the hub at {address} was rejected: {reason}"
            ))
            .with_next("check the address; if the hub was reinstalled, join again with a new token")
        })
    }

    fn of_io(error: &std::io::Error, address: &str) -> Self {
        match error
            .get_ref()
            .and_then(|e| e.downcast_ref::<rustls::Error>())
        {
            Some(rustls::Error::AlertReceived(_)) => Self::of(&Ended::from_io(error), address),
            Some(refused @ (rustls::Error::InvalidCertificate(_) | rustls::Error::General(_))) => {
                Self::of(&Ended::by_us(CLOSE_REFUSED, &refused.to_string()), address)
            }
            _ => Failure::NoAnswer(error.to_string()),
        }
    }

    /// The failure to report of two, of which `later` is the second.
    fn or(self, later: Self) -> Self {
        match (&self, &later) {
            (Failure::Refused(_), _) => self,
            (_, Failure::NoAnswer(_)) if matches!(self, Failure::Blocked(_)) => self,
            _ => later,
        }
    }

    fn into_fault(self, address: &str) -> Fault {
        match self {
            Failure::Refused(fault) | Failure::Blocked(fault) => fault,
            Failure::NoAnswer(why) => unreachable(address, &why),
        }
    }
}

/// The words by which a site recognises that it was revoked at the hub: QUIC and TCP pass the reason
/// of a refusal as text.
pub const REVOKED: &str = "was revoked at the hub";

/// What to do after the hub refused this site, or this publisher, for this reason.
pub fn next_after_refusal(reason: &str) -> &'static str {
    if reason.contains(REVOKED) {
        "ask the administrator of the hub: 'packhorse site restore NAME' there, or 'packhorse publisher restore NAME', lets it in again; the connection is then made automatically"
    } else {
        "if the hub or this site was reinstalled, join again with a new token: at the hub 'packhorse token create', then here 'packhorse join'"
    }
}

fn unreachable(address: &str, why: &str) -> Fault {
    Fault::unreachable(format!("the hub at {address} does not answer: {why}"))
        .with_reason(Reason::HubUnreachable)
}

/// The fault if the hub considers this certificate expired. The reason of the hub ends with its
/// time. If this machine has the same time, the certificate is really expired; otherwise the clocks
/// differ.
fn refused_by_clock(address: &str, reason: &str, now: jiff::Timestamp) -> Fault {
    let hub_time = reason
        .rsplit(' ')
        .next()
        .and_then(|last| last.parse::<jiff::Timestamp>().ok());
    let difference = hub_time
        .map(|hub| hub.duration_since(now).unsigned_abs())
        .filter(|d| *d > CLOCK_DIFFERENCE_MAX);
    let message = format!("the hub at {address} rejected this site: {reason}");
    match difference {
        Some(difference) => {
            Fault::not_allowed(format!("{message}; the clock of this machine differs by {}", clock::span(difference)))
                .with_next("correct the clocks of both machines (NTP); the connection is then retried automatically")
        }
        None => Fault::not_allowed(message)
            .with_next("create a new token at the hub with 'packhorse token create' and join again, or correct the clocks if both are wrong"),
    }
}

/// One attempt to connect.
struct Call<'a> {
    address: &'a str,
    tls: rustls::ClientConfig,
    settings: &'a ConnectionSettings,
    /// The bytes that the connection may buffer for sending.
    memory: u64,
    /// Whether the hub sends a welcome. It does not send one to a joining site.
    welcomed: bool,
}

impl Call<'_> {
    /// Connects over the configured transport, or over QUIC and then TCP.
    async fn connect(&self) -> Result<(Link, Shown), Fault> {
        addresses::check(self.address)?;
        let quic = |limit| self.over(Transport::Quic, limit);
        let tcp = || self.over(Transport::Tcp, CONNECTION_HANDSHAKE_MAX);
        match self.settings.transport {
            Transport::Quic => quic(CONNECTION_HANDSHAKE_MAX)
                .await
                .map_err(|e| e.into_fault(self.address)),
            Transport::Tcp => tcp().await.map_err(|e| e.into_fault(self.address)),
            Transport::Auto => {
                let over_quic = match quic(CONNECTION_QUIC_ANSWER_MAX).await {
                    Ok(reached) => return Ok(reached),
                    Err(Failure::Refused(fault)) => return Err(fault),
                    Err(Failure::Blocked(fault)) => fault.message,
                    Err(Failure::NoAnswer(why)) => why,
                };
                tracing::info!(
                    hub = self.address,
                    why = over_quic,
                    "no answer over QUIC; trying TCP"
                );
                match tcp().await {
                    Ok((link, shown)) => {
                        link.set_reason(clean(&format!("QUIC: {over_quic}")));
                        Ok((link, shown))
                    }
                    Err(Failure::NoAnswer(why)) => Err(unreachable(
                        self.address,
                        &format!("QUIC: {over_quic}; TCP: {why}"),
                    )),
                    Err(Failure::Blocked(fault)) => Err(Fault {
                        message: format!("{}; QUIC: {over_quic}", fault.message),
                        ..fault
                    }),
                    Err(failure) => Err(failure.into_fault(self.address)),
                }
            }
        }
    }

    /// Tries every route, the next one when the one before has failed or has not succeeded soon.
    /// The first success wins.
    async fn over(&self, transport: Transport, limit: Duration) -> Result<(Link, Shown), Failure> {
        let deadline = tokio::time::sleep(limit);
        tokio::pin!(deadline);
        let proxy = match transport {
            Transport::Tcp => &self.settings.proxy,
            Transport::Auto | Transport::Quic => &ProxySettings::default(),
        };
        let routes = tokio::select! {
            routes = addresses::routes(self.address, proxy) => routes,
            () = &mut deadline => Err("the host name was not resolved in time".into()),
        };
        let mut waiting = routes.map_err(Failure::NoAnswer)?.into_iter();
        let mut tries = FuturesUnordered::new();
        let mut failure: Option<Failure> = None;
        loop {
            let next = waiting.next();
            let has_more = next.is_some();
            tries.extend(next.map(|route| self.one(transport, route)));
            tokio::select! {
                ended = tries.next() => match ended {
                    Some(Ok(reached)) => return Ok(reached),
                    Some(Err(failed)) => failure = Some(match failure {
                        Some(before) => before.or(failed),
                        None => failed,
                    }),
                    None => break,
                },
                () = tokio::time::sleep(HEAD_START), if has_more => {}
                () = &mut deadline => {
                    let late = format!("no response within {} s", limit.as_secs());
                    let late = Failure::NoAnswer(late);
                    failure = Some(match failure {
                        Some(before) => before.or(late),
                        None => late,
                    });
                    break;
                }
            }
        }
        Err(failure.unwrap_or_else(|| Failure::NoAnswer("the host name has no address".into())))
    }

    async fn one(&self, transport: Transport, route: Route<'_>) -> Result<(Link, Shown), Failure> {
        match (transport, route) {
            (Transport::Tcp, route) => self.one_tcp(route).await,
            (_, Route::Direct(address)) => self.one_quic(address).await,
            (_, Route::Proxy { proxy, .. }) => Err(Failure::NoAnswer(format!(
                "the proxy {proxy} is for TCP only"
            ))),
        }
    }

    /// A TCP connection to the hub, and the address of its other end: of the hub, or of a proxy. Both
    /// ends send segments of at most `segment` bytes.
    async fn socket(
        &self,
        route: Route<'_>,
        segment: Option<u32>,
    ) -> Result<(TcpStream, SocketAddr), Failure> {
        let no_answer = |e: std::io::Error| Failure::NoAnswer(e.to_string());
        match route {
            Route::Direct(address) => {
                let socket = tcp::open(address, segment).await.map_err(no_answer)?;
                Ok((socket, address))
            }
            Route::Proxy { hub, proxy } => {
                let blocked = |why: &str| Failure::Blocked(proxy.unreachable(why));
                let addresses = addresses::of_host(proxy.address())
                    .await
                    .map_err(|why| blocked(&why))?;
                let mut opened = Err(blocked("its host name has no address"));
                for address in addresses {
                    opened = tcp::open(address, segment)
                        .await
                        .map_err(|e| blocked(&e.to_string()));
                    if opened.is_ok() {
                        break;
                    }
                }
                let mut socket = opened?;
                let remote = socket.peer_addr().map_err(no_answer)?;
                proxy
                    .open(&mut socket, hub)
                    .await
                    .map_err(Failure::Blocked)?;
                Ok((socket, remote))
            }
        }
    }

    async fn one_quic(&self, address: SocketAddr) -> Result<(Link, Shown), Failure> {
        let choice = Choice::new(self.settings.congestion);
        let connecting = quic::connect(address, self.tls.clone(), &choice).await;
        let quic::Connected {
            connection,
            shown,
            endpoint,
        } = connecting.map_err(|e| Failure::of(&e, self.address))?;
        let room = self.memory.min(CONNECTION_SEND_BYTES_MAX);
        let send_room = quic::SendRoom::keep(connection.clone(), choice.pace(), move || room, ());
        self.reached(
            Wire::Quic {
                connection,
                endpoint: Some(endpoint),
                choice,
                send_room,
            },
            shown,
            address,
        )
        .await
    }

    async fn one_tcp(&self, route: Route<'_>) -> Result<(Link, Shown), Failure> {
        let name = tls::hub_name().map_err(Failure::Refused)?;
        let tls = Arc::new(self.tls.clone());
        let connecting = tcp_in_segments(|segment| {
            let (tls, name) = (tls.clone(), name.clone());
            async move {
                let (socket, address) = self.socket(route, segment).await?;
                let secured = tcp::secure(socket, tls, name, self.settings.congestion).await;
                match secured {
                    Ok(secured) => Ok((secured, address)),
                    Err(error) => Err(Failure::of_io(&error, self.address)),
                }
            }
        });
        let (segment, (secured, address)) = connecting.await?;
        if let Some(bytes) = segment {
            tracing::warn!(
                hub = self.address,
                segment_bytes = bytes,
                "large packets are lost on the path to the hub, and the sender is not told: this connection uses smaller TCP segments. Set the MTU of this machine's interface to what the path carries (for a VPN often 1,400), or let the firewall pass ICMP 'fragmentation needed'. QUIC needs a path for packets of 1,280 bytes"
            );
        }
        let mux = Mux::start(secured.io, End::Dialling, secured.handshake, ());
        mux.set_queue_limit(self.memory);
        self.reached(
            Wire::Tcp {
                mux,
                traffic: secured.traffic,
            },
            secured.shown,
            address,
        )
        .await
    }

    async fn reached(
        &self,
        wire: Wire,
        shown: Shown,
        address: SocketAddr,
    ) -> Result<(Link, Shown), Failure> {
        let hub = tls::check_hub(&shown).map_err(|f| {
            Failure::Refused(f.context(format_args!("the hub at {}", self.address)))
        })?;
        let link = Link::new(wire, Some(hub), address);
        if self.welcomed {
            self.welcome(&link).await?;
        }
        Ok((link, shown))
    }

    /// Waits for the welcome of the hub.
    async fn welcome(&self, link: &Link) -> Result<(), Failure> {
        let closed = async || Failure::of(&link.wait_ended().await, self.address);
        let Some((_, mut stream)) = link.accept().await else {
            return Err(closed().await);
        };
        let welcome: hello::Welcome = match hello::receive(&mut stream).await {
            Ok(welcome) => welcome,
            Err(_) if link.is_closed() => return Err(closed().await),
            Err(fault) => return Err(Failure::Refused(fault)),
        };
        let _ = link.inner.hub_clock.set((welcome.time_ms, Instant::now()));
        let format = welcome.manifest_format;
        link.inner.manifest_format.store(format, Ordering::Relaxed);
        let renew_only = welcome.renew_only;
        link.inner.renew_only.store(renew_only, Ordering::Relaxed);
        if let Some(text) = clock_difference(link) {
            link.span().in_scope(|| tracing::warn!("{text}"));
        }
        Ok(())
    }
}

/// Connects with segments of the usual size. If the handshake makes no progress, tries smaller
/// segments beside it: a router may drop large packets without a report. Returns the first
/// connection, and its segment size if that is not the usual one.
async fn tcp_in_segments<T, E, F>(connect: impl Fn(Option<u32>) -> F) -> Result<(Option<u32>, T), E>
where
    F: Future<Output = Result<T, E>>,
{
    let sizes = std::iter::once(None).chain(TCP_SEGMENT_BYTES.map(Some));
    let mut tries: FuturesUnordered<_> = sizes
        .zip(0u32..)
        .map(|(segment, position)| {
            let connect = &connect;
            async move {
                tokio::time::sleep(TCP_SEGMENT_AFTER * position).await;
                (segment, connect(segment).await)
            }
        })
        .collect();
    loop {
        match tries.next().await {
            Some((segment, Ok(connection))) => return Ok((segment, connection)),
            // An answer to the usual segments counts; a failure of the others shows nothing.
            Some((segment, Err(error))) if segment.is_none() || tries.is_empty() => {
                return Err(error);
            }
            Some((_, Err(_))) => {}
            // The last one returned its error.
            None => std::future::pending().await,
        }
    }
}

/// Returns a message if the clocks of this machine and of the hub differ.
pub fn clock_difference(link: &Link) -> Option<String> {
    let ahead_ms = link.hub_clock_ahead_ms()?;
    let difference = Duration::from_millis(ahead_ms.unsigned_abs());
    let word = if ahead_ms > 0 { "behind" } else { "ahead of" };
    (difference > CLOCK_DIFFERENCE_MAX).then(|| {
        format!(
            "this machine's clock is {} {word} the hub's clock: correct the clocks of both machines (NTP)",
            clock::span(difference)
        )
    })
}

/// Connects to the hub at `HOST:PORT`, or at the first of several addresses, separated by commas,
/// that answers. The connection buffers at most `memory` bytes for sending.
/// Returns after the welcome of the hub. If the hub rejects the site, the fault is `not_allowed`
/// with the reason of the hub.
pub async fn dial(
    address: &str,
    identity: &SiteIdentity,
    settings: &ConnectionSettings,
    memory: u64,
) -> Result<Link, Fault> {
    let call = Call {
        address,
        tls: tls::client(identity)?,
        settings,
        memory,
        welcomed: true,
    };
    let (link, _) = call.connect().await?;
    let rtt_ms = link.rtt().as_millis() as u64;
    link.span()
        .in_scope(|| tracing::info!(address, rtt_ms, "connected to the hub"));
    Ok(link)
}

/// Connects over this transport only, within 4 s. A site with a connection over the other transport
/// calls this, and changes to the new connection if it succeeds.
pub async fn probe(
    transport: Transport,
    address: &str,
    identity: &SiteIdentity,
    settings: &ConnectionSettings,
    memory: u64,
) -> Result<Link, Fault> {
    let call = Call {
        address,
        tls: tls::client(identity)?,
        settings,
        memory,
        welcomed: true,
    };
    let (link, _) = call
        .over(transport, CONNECTION_QUIC_ANSWER_MAX)
        .await
        .map_err(|e| e.into_fault(address))?;
    Ok(link)
}

/// Joins the hub at `HOST:PORT`: verifies the hub with the hash in the token, sends the secret of
/// the token, and returns the new identity, which the caller saves.
pub async fn join(
    address: &str,
    token: &JoinToken,
    claim: &Claim,
    settings: &ConnectionSettings,
    request: CertificateRequest,
) -> Result<SiteIdentity, Fault> {
    let call = Call {
        address,
        tls: tls::joining_client(*token.ca_hash())?,
        settings,
        memory: CONNECTION_SEND_BYTES_MIN,
        welcomed: false,
    };
    let (link, shown) = call.connect().await.map_err(|fault| match fault.code {
        // Unlike a connection, a join is not retried automatically.
        Code::Unreachable => fault.with_next("check the address, that the hub is running, and that the network allows the connection; then join again"),
        _ => fault,
    })?;
    // The handshake has checked this. The CA is stored from here, so it is checked again.
    let ca = tls::pinned_ca(&shown.chain, token.ca_hash())
        .ok_or_else(|| Fault::not_allowed(tls::PIN_MISMATCH))?;
    let leaf = shown
        .chain
        .first()
        .ok_or_else(|| Fault::not_allowed("the hub presented no certificate"))?;
    tls::check_hub_chain(leaf, ca)?;

    let ask = hello::Ask {
        token_id: token.id().into(),
        secret: hello::encode(token.secret()),
        site: match claim {
            Claim::Site(name) => Some(name.clone()),
            Claim::Publisher => None,
        },
        csr: hello::encode(request.csr_der()),
    };
    let answer = tokio::time::timeout(CONNECTION_HANDSHAKE_MAX, exchange(&link, &ask)).await;
    let answer = answer
        .map_err(|_| unreachable(address, "it received the join request but sent no answer"))?;
    let cert = match answer? {
        hello::Answer::Certificate(cert) => hello::decode(&cert)?,
        hello::Answer::Refused(fault) => {
            return Err(Fault {
                message: clean(&fault.message),
                next: clean(&fault.next),
                ..fault
            });
        }
    };
    let identity = request.complete(&cert, ca)?;
    link.close_and_flush("joined").await;
    let is_expected = match (claim, identity.holder()) {
        (Claim::Site(name), Peer::Site(given)) => name == given,
        (Claim::Publisher, Peer::Publisher(_)) => true,
        _ => false,
    };
    if !is_expected {
        return Err(Fault::not_allowed(format!(
            "the token is for {}, not for this machine",
            identity.holder()
        )));
    }
    let hub = link.peer().map(Peer::to_string).unwrap_or_default();
    tracing::info!(hub, who = %identity.holder(), "joined");
    Ok(identity)
}

async fn exchange(link: &Link, ask: &hello::Ask) -> Result<hello::Answer, Fault> {
    let (mut send, mut recv) = link.open(PRIORITY_CONTROL).await?;
    hello::send(&mut send, ask).await?;
    hello::receive(&mut recv).await
}

/// The fault of a site for a connection that ended like this.
#[cfg(test)]
pub(super) fn refusal_for_test(ended: &Ended, address: &str) -> Fault {
    Failure::of(ended, address).into_fault(address)
}

/// Connects with a TLS setup of the test, and waits for the welcome.
#[cfg(test)]
pub(super) async fn call_for_test(
    address: &str,
    tls: rustls::ClientConfig,
    settings: &ConnectionSettings,
) -> Result<Link, Fault> {
    Ok(Call {
        address,
        tls,
        settings,
        memory: CONNECTION_SEND_BYTES_MIN,
        welcomed: true,
    }
    .connect()
    .await?
    .0)
}

/// The connection of a joining site, before the request.
#[cfg(test)]
pub(super) async fn join_link_for_test(
    address: &str,
    tls: rustls::ClientConfig,
    settings: &ConnectionSettings,
) -> Result<Link, Fault> {
    Ok(Call {
        address,
        tls,
        settings,
        memory: CONNECTION_SEND_BYTES_MIN,
        welcomed: false,
    }
    .connect()
    .await?
    .0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn smaller_segments_are_tried_when_the_usual_ones_are_lost() {
        // A path that carries segments up to this size.
        let path = |largest: u32| {
            tcp_in_segments(move |segment| async move {
                if segment.unwrap_or(1460) > largest {
                    std::future::pending::<()>().await;
                }
                Ok::<_, std::io::Error>(())
            })
        };
        let started = tokio::time::Instant::now();
        assert_eq!(path(1460).await.unwrap(), (None, ()));
        assert!(started.elapsed() < TCP_SEGMENT_AFTER);
        assert_eq!(path(1360).await.unwrap(), (Some(1160), ()));
        assert_eq!(path(960).await.unwrap(), (Some(536), ()));
        assert!(started.elapsed() < CONNECTION_HANDSHAKE_MAX);
        // A refusal is reported at once.
        let refused = tcp_in_segments(|_| async {
            Err::<(), _>(std::io::Error::from(std::io::ErrorKind::ConnectionRefused))
        });
        let started = tokio::time::Instant::now();
        assert!(refused.await.is_err() && started.elapsed() < TCP_SEGMENT_AFTER);
    }
}

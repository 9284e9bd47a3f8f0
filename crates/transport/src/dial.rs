//! The connecting side: a site or publisher opens a connection to the hub, or joins it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;

use super::congestion::Choice;
use super::mux::{End, Mux};
use super::tls::{self, Shown};
use super::{
    CLOSE_CLOCK, CLOSE_REFUSED, Ended, Link, PRIORITY_CONTROL, Wire, clean, hello, quic, tcp,
};
use crate::identity::{CertificateRequest, Claim, JoinToken, SiteIdentity};
use crate::{ConnectionSettings, Transport};
use base::clock;
use base::fault::{Code, Fault, Reason};
use base::limits::{
    CONNECTION_ADDRESSES_MAX, CONNECTION_HANDSHAKE_MAX, CONNECTION_QUIC_ANSWER_MAX,
    CONNECTION_SEND_BYTES_MAX, CONNECTION_SEND_BYTES_MIN,
};
use base::peer::Peer;

/// The delay before the next address of a host name is tried.
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
                .with_next("if the hub or this site was reinstalled, join again with a new token")
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

    fn into_fault(self, address: &str) -> Fault {
        match self {
            Failure::Refused(fault) => fault,
            Failure::NoAnswer(why) => unreachable(address, &why),
        }
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
        let addresses = resolve(self.address).await?;
        let quic = |limit| self.over(Transport::Quic, &addresses, limit);
        let tcp = || self.over(Transport::Tcp, &addresses, CONNECTION_HANDSHAKE_MAX);
        match self.settings.transport {
            Transport::Quic => quic(CONNECTION_HANDSHAKE_MAX)
                .await
                .map_err(|e| e.into_fault(self.address)),
            Transport::Tcp => tcp().await.map_err(|e| e.into_fault(self.address)),
            Transport::Auto => {
                let over_quic = match quic(CONNECTION_QUIC_ANSWER_MAX).await {
                    Ok(reached) => return Ok(reached),
                    Err(Failure::Refused(fault)) => return Err(fault),
                    Err(Failure::NoAnswer(why)) => why,
                };
                tracing::info!(
                    hub = self.address,
                    why = over_quic,
                    "no answer over QUIC; trying TCP"
                );
                match tcp().await {
                    Err(Failure::NoAnswer(why)) => Err(unreachable(
                        self.address,
                        &format!("QUIC: {over_quic}; TCP: {why}"),
                    )),
                    other => other.map_err(|e| e.into_fault(self.address)),
                }
            }
        }
    }

    /// Tries every address, each a little later than the previous one. The first success wins.
    async fn over(
        &self,
        transport: Transport,
        addresses: &[SocketAddr],
        limit: Duration,
    ) -> Result<(Link, Shown), Failure> {
        let mut tries: FuturesUnordered<_> = addresses
            .iter()
            .zip(0u32..)
            .map(|(address, position)| async move {
                tokio::time::sleep(HEAD_START * position).await;
                match transport {
                    Transport::Tcp => self.one_tcp(*address).await,
                    Transport::Auto | Transport::Quic => self.one_quic(*address).await,
                }
            })
            .collect();
        let all = async {
            let mut best_failure = Failure::NoAnswer("the host name has no address".into());
            while let Some(result) = tries.next().await {
                match result {
                    Ok(reached) => return Ok(reached),
                    Err(failure) if matches!(best_failure, Failure::NoAnswer(_)) => {
                        best_failure = failure;
                    }
                    Err(_) => {}
                }
            }
            Err(best_failure)
        };
        match tokio::time::timeout(limit, all).await {
            Ok(result) => result,
            Err(_) => Err(Failure::NoAnswer(format!(
                "no response within {} s",
                limit.as_secs()
            ))),
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
        quic::adjust_send_buffer(connection.clone(), move || room, ());
        self.reached(
            Wire::Quic {
                connection,
                endpoint: Some(endpoint),
                choice,
            },
            shown,
            address,
        )
        .await
    }

    async fn one_tcp(&self, address: SocketAddr) -> Result<(Link, Shown), Failure> {
        let name = tls::hub_name().map_err(Failure::Refused)?;
        let tls = Arc::new(self.tls.clone());
        let connecting = tcp_in_segments(|segment| {
            let (tls, name) = (tls.clone(), name.clone());
            tcp::connect(address, segment, tls, name, self.settings.congestion)
        });
        let (segment, secured) = connecting
            .await
            .map_err(|e| Failure::of_io(&e, self.address))?;
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
        if let Some(text) = clock_difference(link) {
            link.span().in_scope(|| tracing::warn!("{text}"));
        }
        Ok(())
    }
}

/// Connects with segments of the usual size. If the handshake makes no progress, tries smaller
/// segments beside it: a router may drop large packets without a report. Returns the first
/// connection, and its segment size if that is not the usual one.
async fn tcp_in_segments<T, F>(
    connect: impl Fn(Option<u32>) -> F,
) -> std::io::Result<(Option<u32>, T)>
where
    F: Future<Output = std::io::Result<T>>,
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
    while let Some((segment, result)) = tries.next().await {
        match result {
            Ok(connection) => return Ok((segment, connection)),
            // An answer to the usual segments counts; a failure of the others shows nothing.
            Err(error) if segment.is_none() || tries.is_empty() => return Err(error),
            Err(_) => {}
        }
    }
    Err(std::io::ErrorKind::TimedOut.into())
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

async fn resolve(address: &str) -> Result<Vec<SocketAddr>, Fault> {
    if address
        .rsplit_once(':')
        .is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err())
    {
        return Err(Fault::config(format!(
            "the hub's address {address:?} is not HOST:PORT"
        )));
    }
    let found = tokio::net::lookup_host(address)
        .await
        .map_err(|e| unreachable(address, &format!("the host name cannot be resolved: {e}")))?;
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for address in found {
        if !addresses.contains(&address) && addresses.len() < CONNECTION_ADDRESSES_MAX {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

/// Connects to the hub at `HOST:PORT`. The connection buffers at most `memory` bytes for sending.
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

/// Connects over QUIC only, within 4 s. A site with a TCP connection calls this periodically, and
/// changes to the QUIC connection if it succeeds.
pub async fn probe_quic(
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
    let addresses = resolve(address).await?;
    let (link, _) = call
        .over(Transport::Quic, &addresses, CONNECTION_QUIC_ANSWER_MAX)
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
                Ok(())
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

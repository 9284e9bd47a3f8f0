//! The site's side: dialling the hub, and joining it.

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
use crate::identity::{CertificateRequest, Claim, Holder, JoinToken, SiteIdentity};
use crate::{ConnectionSettings, Transport};
use base::clock;
use base::fault::{Code, Fault, Reason};
use base::limits::{
    CONNECTION_ADDRESSES_MAX, CONNECTION_HANDSHAKE_MAX, CONNECTION_QUIC_ANSWER_MAX,
    CONNECTION_SEND_BYTES_MAX, CONNECTION_SEND_BYTES_MIN,
};

/// How long an address of a name has a head start over the next.
const HEAD_START: Duration = Duration::from_millis(250);
/// From this difference on the two clocks are worth a warning.
pub(crate) const CLOCK_DIFFERENCE_MAX: Duration = Duration::from_secs(60);

/// Why a call came to nothing.
enum Failure {
    /// Nobody answered: another address or transport may work.
    NoAnswer(String),
    /// Somebody answered, and it is over: nothing else can work.
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
            Fault::not_allowed(format!("the hub at {address} is not the one that made the token: its CA has another hash")).with_next(
                "check the address; if it is right, make a new token at that hub, or leave the token out where this has joined it already",
            )
        } else if ended.by_peer {
            Fault::not_allowed(format!("the hub at {address} refused this site: {reason}"))
                .with_next("if the hub or this site was set up anew, join again with a new token")
        } else {
            Fault::not_allowed(format!("the hub at {address} cannot be trusted: {reason}"))
                .with_next(
                    "check the address; if the hub was set up anew, join again with a new token",
                )
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

/// The hub finds this end's certificate expired. Its reason ends with the time of its clock: if
/// that is also the time here, the certificate has expired indeed.
fn refused_by_clock(address: &str, reason: &str, now: jiff::Timestamp) -> Fault {
    let hub_time = reason
        .rsplit(' ')
        .next()
        .and_then(|last| last.parse::<jiff::Timestamp>().ok());
    let difference = hub_time
        .map(|hub| hub.duration_since(now).unsigned_abs())
        .filter(|d| *d > CLOCK_DIFFERENCE_MAX);
    let message = format!("the hub at {address} refused this site: {reason}");
    match difference {
        Some(difference) => {
            Fault::not_allowed(format!("{message}; the clock of this machine differs from it by {}", clock::span(difference)))
                .with_next("set the clocks of both machines (NTP); the connection is then tried again automatically")
        }
        None => Fault::not_allowed(message)
            .with_next("make a new token at the hub with 'packhorse token create' and join again, or set the clocks if both are wrong"),
    }
}

/// One call to the hub: whom, and as whom.
struct Call<'a> {
    address: &'a str,
    tls: rustls::ClientConfig,
    settings: &'a ConnectionSettings,
    /// Bytes that the line may buffer for sending.
    memory: u64,
    /// Whether the hub says welcome (it does not to a site that joins).
    welcomed: bool,
}

impl Call<'_> {
    /// Calls by the transport that the config names, or by QUIC and then TCP.
    async fn place(&self) -> Result<(Link, Shown), Fault> {
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

    /// Tries every address, each a little after the one before; the first that works wins.
    async fn over(
        &self,
        transport: Transport,
        addresses: &[SocketAddr],
        limit: Duration,
    ) -> Result<(Link, Shown), Failure> {
        let mut tries: FuturesUnordered<_> = addresses
            .iter()
            .zip(0u32..)
            .map(|(address, place)| async move {
                tokio::time::sleep(HEAD_START * place).await;
                match transport {
                    Transport::Tcp => self.one_tcp(*address).await,
                    Transport::Auto | Transport::Quic => self.one_quic(*address).await,
                }
            })
            .collect();
        let all = async {
            let mut worst = Failure::NoAnswer("its name has no address".into());
            while let Some(result) = tries.next().await {
                match result {
                    Ok(reached) => return Ok(reached),
                    Err(failure) if matches!(worst, Failure::NoAnswer(_)) => worst = failure,
                    Err(_) => {}
                }
            }
            Err(worst)
        };
        match tokio::time::timeout(limit, all).await {
            Ok(result) => result,
            Err(_) => Err(Failure::NoAnswer(format!(
                "nothing came back within {} s",
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
        quic::tend(connection.clone(), move || room, ());
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
        let connecting = tcp::connect(
            address,
            Arc::new(self.tls.clone()),
            name,
            self.settings.congestion,
        )
        .await;
        let secured = connecting.map_err(|e| Failure::of_io(&e, self.address))?;
        let mux = Mux::start(secured.io, End::Dialling, secured.handshake, ());
        mux.hold_at_most(self.memory);
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

    /// Waits for the hub's word that this site is welcome.
    async fn welcome(&self, link: &Link) -> Result<(), Failure> {
        let gone = async || Failure::of(&link.wait_ended().await, self.address);
        let Some((_, mut stream)) = link.accept().await else {
            return Err(gone().await);
        };
        let welcome: hello::Welcome = match hello::receive(&mut stream).await {
            Ok(welcome) => welcome,
            Err(_) if link.is_closed() => return Err(gone().await),
            Err(fault) => return Err(Failure::Refused(fault)),
        };
        let _ = link.inner.hub_clock.set((welcome.time_ms, Instant::now()));
        if let Some(text) = clock_difference(link) {
            tracing::warn!(hub = %welcome.hub, "{text}");
        }
        Ok(())
    }
}

/// Says that this machine's clock and the hub's differ, if they do.
pub fn clock_difference(link: &Link) -> Option<String> {
    let ahead_ms = link.hub_clock_ahead_ms()?;
    let difference = Duration::from_millis(ahead_ms.unsigned_abs());
    let word = if ahead_ms > 0 { "behind" } else { "ahead of" };
    (difference > CLOCK_DIFFERENCE_MAX).then(|| {
        format!(
            "this machine's clock is {} {word} the hub's: set the clocks of both machines (NTP)",
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
        .map_err(|e| unreachable(address, &format!("its name is not found: {e}")))?;
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for one in found {
        if !addresses.contains(&one) && addresses.len() < CONNECTION_ADDRESSES_MAX {
            addresses.push(one);
        }
    }
    Ok(addresses)
}

/// Dials the hub at `HOST:PORT`; the line buffers at most `memory` bytes for sending. Returns once
/// the hub said welcome; a site that is refused gets `not_allowed` with the reason.
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
    let (link, _) = call.place().await?;
    tracing::info!(
        hub = address,
        transport = link.transport(),
        rtt_ms = link.rtt().as_millis() as u64,
        "connected to the hub"
    );
    Ok(link)
}

/// Dials by QUIC alone, for at most 4 s: a site whose line is on TCP asks now and then, and moves
/// over to the link it gets.
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

/// Joins the hub at `HOST:PORT`: recognises it by the hash in the token, proves with the secret
/// that it may, and comes back with the identity, which the caller saves.
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
    let (link, shown) = call.place().await.map_err(|fault| match fault.code {
        // Unlike a line, nobody tries it again.
        Code::Unreachable => fault.with_next("check the address, that the hub runs, and that the network lets it through; then join again"),
        _ => fault,
    })?;
    // The handshake has checked this; the CA is taken from here to be kept, so it is checked once
    // more.
    let ca = tls::pinned_ca(&shown.chain, token.ca_hash())
        .ok_or_else(|| Fault::not_allowed(tls::PIN_MISMATCH))?;
    let leaf = shown
        .chain
        .first()
        .ok_or_else(|| Fault::not_allowed("the hub showed no certificate"))?;
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
    let answer =
        answer.map_err(|_| unreachable(address, "it took the join request and sent no answer"))?;
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
    let fits = match (claim, identity.holder()) {
        (Claim::Site(name), Holder::Site(given)) => name == given,
        (Claim::Publisher, Holder::Publisher(_)) => true,
        _ => false,
    };
    if !fits {
        return Err(Fault::not_allowed(format!(
            "the token is for {}, which this is not",
            identity.holder()
        )));
    }
    let hub = link.peer().map(Holder::to_string).unwrap_or_default();
    tracing::info!(hub, who = %identity.holder(), "joined");
    Ok(identity)
}

async fn exchange(link: &Link, ask: &hello::Ask) -> Result<hello::Answer, Fault> {
    let (mut send, mut recv) = link.open(PRIORITY_CONTROL).await?;
    hello::send(&mut send, ask).await?;
    hello::receive(&mut recv).await
}

/// What a site says of a call that ended like this.
#[cfg(test)]
pub(super) fn refusal_for_test(ended: &Ended, address: &str) -> Fault {
    Failure::of(ended, address).into_fault(address)
}

/// A welcomed call with a TLS setup of the test's choice.
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
    .place()
    .await?
    .0)
}

/// The bare line of a joining site.
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
    .place()
    .await?
    .0)
}

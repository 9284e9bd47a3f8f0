//! Who may enter: the gate of the listener, the renewal of certificates, and what a peer is told that
//! may not enter.
//!
//! The catalogue has the serial of the newest certificate of each site and publisher, and whether it
//! is revoked; [`policy::may`] decides. A serial is stored before its certificate is issued, so a
//! crash between the two locks nobody out: a renewal keeps the certificate before it valid until the
//! new one was seen, and a join may be repeated with the same key.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::answers;
use super::peer_budgets::PeerBudgets;
use base::clock::{self, rfc3339_ms};
use base::fault::Fault;
use base::limits::SILENCE_MAX;
use base::peer::Peer;
use exchange::wire;
use model::actor::Actor;
use model::policy::{self, Object, Refusal, Standing, Verb};
use model::protocol::{AskHub, QUESTION};
use state::{Catalogue, Member};
use transport::identity::{HubIdentity, check_request};
use transport::{Certificate, Gate, Link, REVOKED, Verdict};

/// How long a connection for a renewal may take.
const RENEWAL_MAX: Duration = Duration::from_secs(30);
/// How long the peer may take to close that connection after it has the answer.
const PARTING_MAX: Duration = Duration::from_secs(5);
/// Streams of such a connection that are kept open, so that a site of an earlier version does not
/// close it before it has asked.
const STREAMS_HELD_MAX: usize = 16;

/// Who may enter. Cheap to clone.
#[derive(Clone)]
pub(super) struct Membership {
    inner: Arc<Inner>,
}

struct Inner {
    catalogue: Catalogue,
    identity: Arc<HubIdentity>,
    /// How long an expired certificate can be renewed.
    grace: Duration,
}

impl Membership {
    pub(super) fn new(catalogue: Catalogue, identity: Arc<HubIdentity>, grace: Duration) -> Self {
        Self {
            inner: Arc::new(Inner {
                catalogue,
                identity,
                grace,
            }),
        }
    }

    /// Whether a peer with this certificate may do this now, and what the catalogue has of it.
    async fn decide(
        &self,
        who: &Peer,
        verb: Verb,
        certificate: &Certificate,
    ) -> Result<(Result<(), Refusal>, Option<Member>), Fault> {
        let member = self.inner.catalogue.member(who).await?;
        let now = clock::now();
        let standing = member.as_ref().map_or(Standing::Unknown, |member| {
            member.standing(&certificate.serial, now.as_millisecond())
        });
        let expired = certificate.expired.map(|until| {
            // A clock that was set back since: it is not expired for long.
            Duration::try_from(now.duration_since(until)).unwrap_or_default()
        });
        let object = Object::Membership {
            standing,
            expired,
            grace: self.inner.grace,
        };
        Ok((policy::may(&Actor::from(who), verb, &object), member))
    }

    /// Whether a peer may enter over this connection.
    pub(super) async fn may_enter(
        &self,
        who: &Peer,
        link: &Link,
    ) -> Result<Result<(), Refusal>, Fault> {
        match link.certificate() {
            Some(certificate) => {
                let decided = self.decide(who, Verb::Connect, certificate).await?;
                Ok(decided.0)
            }
            None => Err(Fault::internal("a connection without a certificate")),
        }
    }

    /// Why a peer may not enter over this connection, if it may not.
    pub(super) async fn refusal(&self, who: &Peer, link: &Link) -> Result<Option<String>, Fault> {
        let Some(certificate) = link.certificate() else {
            return Err(Fault::internal("a connection without a certificate"));
        };
        let (decided, member) = self.decide(who, Verb::Connect, certificate).await?;
        Ok(decided
            .err()
            .map(|refusal| refusal_text(who, &refusal, member.as_ref())))
    }

    /// What a revoked peer is told.
    pub(super) async fn why_revoked(&self, who: &Peer) -> Result<String, Fault> {
        let member = self.inner.catalogue.member(who).await?;
        Ok(refusal_text(who, &Refusal::Revoked, member.as_ref()))
    }

    /// Issues a new certificate to a peer over its connection. The current one stays valid until the
    /// hub has seen the new one.
    pub(super) async fn renew(
        &self,
        who: &Peer,
        link: &Link,
        request: &str,
    ) -> Result<serde_json::Value, Fault> {
        let certificate = link
            .certificate()
            .ok_or_else(|| Fault::internal("a connection without a certificate"))?;
        let request = hex::decode(request)
            .map_err(|_| Fault::integrity("a malformed certificate request"))?;
        check_request(&request)?;
        let (decided, _) = self.decide(who, Verb::Renew, certificate).await?;
        decided?;
        let serial = self.inner.catalogue.renew(who, &certificate.serial).await?;
        let issued = self.inner.identity.issue_as(who, &request, &serial)?;
        tracing::info!(%who, %serial, "renewed a certificate");
        Ok(serde_json::Value::String(hex::encode(issued)))
    }

    /// Serves a peer whose certificate is expired: it may renew it, and nothing else.
    pub(super) async fn serve_renewal(
        &self,
        who: &Peer,
        link: &Link,
        budgets: &PeerBudgets,
        stop: &CancellationToken,
    ) {
        tracing::info!("the certificate of this peer is expired; it may only renew it");
        let work = timeout(RENEWAL_MAX, self.answer_renewals(who, link, budgets));
        tokio::select! {
            served = work => if let Ok(Err(fault)) = served {
                tracing::debug!(error = %fault, "a renewal ended");
            },
            () = stop.cancelled() => {}
        }
        link.close("connect again with the new certificate");
    }

    async fn answer_renewals(
        &self,
        who: &Peer,
        link: &Link,
        budgets: &PeerBudgets,
    ) -> Result<(), Fault> {
        let mut held = Vec::new();
        while let Some((mut send, mut recv)) = link.accept().await {
            let mut kind = [0];
            let read = timeout(SILENCE_MAX, recv.read_exact(&mut kind)).await;
            if !matches!(read, Ok(Ok(()))) {
                continue;
            }
            if kind[0] != QUESTION {
                if held.len() == STREAMS_HELD_MAX {
                    return Err(Fault::integrity("too many streams for a renewal"));
                }
                held.push((send, recv));
                continue;
            }
            budgets.change(who).await;
            let (question, share) =
                wire::receive_question(&mut recv, budgets.questions(), who).await?;
            let answer = match question {
                AskHub::Renew { request } => self.renew(who, link, request.as_str()).await,
                _ => Err(Refusal::Expired.into()),
            };
            drop(share);
            let is_renewed = answer.is_ok();
            answers::send(budgets, &mut send, who, answer).await?;
            if is_renewed {
                let _ = timeout(PARTING_MAX, link.closed()).await;
                return Ok(());
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Gate for Membership {
    async fn admit(&self, who: &Peer, certificate: &Certificate) -> Verdict {
        let verb = match certificate.expired {
            None => Verb::Connect,
            Some(_) => Verb::Renew,
        };
        let (decided, member) = match self.decide(who, verb, certificate).await {
            Ok(decided) => decided,
            Err(fault) => {
                tracing::error!(error = %fault, "the catalogue cannot be read");
                return Verdict::Busy("the hub cannot read its catalogue".into());
            }
        };
        match decided {
            Ok(()) => {}
            // After the welcome it is told that it must join again.
            Err(Refusal::Unknown) if certificate.expired.is_none() => return Verdict::Welcome,
            Err(Refusal::Unknown | Refusal::Expired) => return Verdict::Expired,
            Err(refusal) => {
                return Verdict::Refused(refusal_text(who, &refusal, member.as_ref()));
            }
        }
        if member.is_some_and(|member| member.is_news(&certificate.serial))
            && let Err(fault) = self.inner.catalogue.confirm(who, &certificate.serial).await
        {
            tracing::error!(error = %fault, "the catalogue cannot be written");
            return Verdict::Busy("the hub cannot write its catalogue".into());
        }
        Verdict::Welcome
    }
}

/// What a peer is told that may not enter.
fn refusal_text(who: &Peer, refusal: &Refusal, member: Option<&Member>) -> String {
    match refusal {
        Refusal::Revoked => {
            let revoked = member.and_then(|member| member.revoked.as_ref());
            let when = revoked.map(|revoked| {
                let why = revoked.why.as_deref();
                let why = why.map_or_else(String::new, |why| format!(": {why}"));
                format!(" at {} by {}{why}", rfc3339_ms(revoked.at_ms), revoked.by)
            });
            format!("{who} {REVOKED}{}", when.unwrap_or_default())
        }
        Refusal::Superseded => {
            let issued = member.and_then(|member| member.issued_ms);
            let when = issued.map_or_else(String::new, |at| format!(" at {}", rfc3339_ms(at)));
            format!(
                "a newer certificate was issued for {who}{when}; this one is not accepted any more"
            )
        }
        Refusal::Expired => format!("the certificate of {who} has expired"),
        _ => "the hub does not know this site".into(),
    }
}

#[cfg(test)]
mod tests;

//! What the hub keeps of the certificates of sites and publishers, and who revoked or changed one.
//!
//! [`Member::standing`] decides whether a certificate is the one that its holder must use; it is pure.
//! The hub asks it for each connection.

use std::collections::BTreeMap;

use async_trait::async_trait;
use base::fault::Fault;
use base::names::{PublisherName, SiteName};
use base::peer::Peer;
use model::policy::Standing;
use transport::identity::Serial;

/// How long the certificate before a renewal is accepted, while the hub has not seen the new one: the
/// answer may have been lost.
pub(crate) const PREVIOUS_ACCEPTED_MS: i64 = 7 * 24 * 3600 * 1000;

/// A revocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    pub at_ms: i64,
    /// Who revoked it.
    pub by: String,
    /// Why, if that was said.
    pub why: Option<String>,
}

/// The last change of a site or publisher that a person made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberChange {
    /// `set`, `revoked` or `restored`.
    pub what: String,
    pub at_ms: i64,
    pub by: String,
}

/// The certificates of a site or publisher. All fields are empty for one that joined at an earlier
/// version.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Member {
    /// Of the newest certificate.
    pub serial: Option<Serial>,
    pub issued_ms: Option<i64>,
    pub expires_ms: Option<i64>,
    /// When the newest certificate was first seen in a handshake.
    pub confirmed_ms: Option<i64>,
    /// The certificate before a renewal, and until when it is accepted.
    pub previous: Option<(Serial, i64)>,
    pub revoked: Option<Revocation>,
    pub changed: Option<MemberChange>,
}

impl Member {
    /// What a certificate of this holder is worth now.
    ///
    /// A serial that is newer than the newest recorded one was issued after a backup from which this
    /// hub was restored: the hub records each serial before it issues the certificate.
    pub fn standing(&self, presented: &Serial, now_ms: i64) -> Standing {
        if self.revoked.is_some() {
            return Standing::Revoked;
        }
        let Some(newest) = &self.serial else {
            return Standing::Current;
        };
        let is_previous = self
            .previous
            .as_ref()
            .is_some_and(|(serial, until_ms)| serial == presented && now_ms < *until_ms);
        if presented == newest || presented.is_newer_than(newest) || is_previous {
            Standing::Current
        } else {
            Standing::Superseded
        }
    }

    /// Whether a handshake with this certificate is news: the newest one is seen for the first time.
    pub fn is_news(&self, presented: &Serial) -> bool {
        self.serial.as_ref().is_some_and(|newest| {
            presented.is_newer_than(newest) || (presented == newest && self.confirmed_ms.is_none())
        })
    }
}

/// A publisher.
#[derive(Debug, Clone, PartialEq)]
pub struct PublisherRow {
    pub name: PublisherName,
    pub joined_ms: i64,
    /// When it last asked something.
    pub seen_ms: Option<i64>,
    /// What it may do, as JSON; `None`: no limit.
    pub scope: Option<String>,
    pub member: Member,
}

/// What would be lost with a site.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Losses {
    /// Its transfers that have not ended.
    pub open_transfers: u64,
    /// The first artifacts of which no other place has the content.
    pub last_copies: Vec<String>,
    /// The first training runs that have not ended and involve it.
    pub runs: Vec<String>,
}

/// How many names [`Losses`] lists of each kind.
pub(crate) const LOSSES_NAMED_MAX: i64 = 5;

/// The members of a hub: its sites and publishers.
#[async_trait]
pub trait Members: Send + Sync {
    /// The certificates of a site or publisher; `None`: there is none of this name.
    async fn member(&self, who: &Peer) -> Result<Option<Member>, Fault>;

    /// Records that the newest certificate of a peer was seen in a handshake: the one before it is not
    /// accepted any more.
    async fn confirm(&self, who: &Peer, presented: &Serial) -> Result<(), Fault>;

    /// Takes the serial of a new certificate for a peer that presents this one. It is the newest from
    /// now on; the presented one is accepted until the new one was seen. A peer whose certificate is
    /// not accepted gets none.
    async fn renew(&self, who: &Peer, presented: &Serial) -> Result<Serial, Fault>;

    /// Revokes a site or publisher, and its unused join tokens. One that is revoked already stays as it
    /// is. `online`: whether it is connected, for the event.
    async fn revoke(
        &self,
        who: &Peer,
        by: &str,
        why: Option<&str>,
        online: bool,
    ) -> Result<(), Fault>;

    /// Ends a revocation.
    async fn restore(&self, who: &Peer, by: &str) -> Result<(), Fault>;

    /// Sets labels of a site, and removes others.
    async fn set_labels(
        &self,
        site: &SiteName,
        set: &BTreeMap<String, String>,
        unset: &[String],
        by: &str,
        online: bool,
    ) -> Result<(), Fault>;

    /// What would be lost with a site.
    async fn losses(&self, site: &SiteName) -> Result<Losses, Fault>;

    /// Removes a site or publisher, and its join tokens. Its transfers and their receipts stay. `force`:
    /// also if something would be lost; else [`Losses`] must be empty.
    async fn remove_member(&self, who: &Peer, by: &str, force: bool) -> Result<(), Fault>;

    /// Passes `rows` publishers to `see`, by name, beginning after this one.
    async fn publishers(&self, behind: Option<&str>, rows: i64)
    -> Result<Vec<PublisherRow>, Fault>;

    /// One publisher.
    async fn publisher(&self, name: &str) -> Result<Option<PublisherRow>, Fault>;
}

/// The fault for a site or publisher that does not exist.
pub fn no_member(who: &Peer) -> Fault {
    let next = match who {
        Peer::Publisher(_) => "'packhorse publisher list' lists them",
        Peer::Site(_) | Peer::Hub(_) => "'packhorse site list' lists them",
    };
    Fault::not_found(format!("there is no {who}")).with_next(next)
}

/// The fault for a site that cannot be removed, or `None`.
pub(crate) fn refuse_removal(who: &Peer, losses: &Losses) -> Option<Fault> {
    let mut why = Vec::new();
    if losses.open_transfers > 0 {
        why.push(format!(
            "{} transfers to it have not ended",
            losses.open_transfers
        ));
    }
    if !losses.last_copies.is_empty() {
        why.push(format!(
            "no other place has the content of {}",
            names(&losses.last_copies)
        ));
    }
    if !losses.runs.is_empty() {
        why.push(format!(
            "training runs that involve it have not ended: {}",
            names(&losses.runs)
        ));
    }
    (!why.is_empty()).then(|| {
        Fault::conflict(format!("{who} cannot be removed: {}", why.join("; "))).with_next(
            "cancel the transfers and runs, and deliver the artifacts to another site; 'packhorse site revoke NAME' keeps everything; --force cancels the transfers and gives the rest up",
        )
    })
}

fn names(list: &[String]) -> String {
    let more = if list.len() as i64 == LOSSES_NAMED_MAX {
        " and perhaps others"
    } else {
        ""
    };
    format!("{}{more}", list.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(newest: Option<&Serial>) -> Member {
        Member {
            serial: newest.cloned(),
            ..Member::default()
        }
    }

    #[test]
    fn only_the_newest_certificate_is_current() {
        let first = Serial::next(None, 1_000);
        let second = Serial::next(Some(&first), 2_000);
        let old = Serial::from_bytes(&[9; 20]).unwrap();
        // It joined at an earlier version, which recorded nothing.
        let earlier = member(None);
        assert_eq!(earlier.standing(&old, 0), Standing::Current);
        assert!(!earlier.is_news(&old));
        let enrolled = member(Some(&second));
        assert_eq!(enrolled.standing(&second, 0), Standing::Current);
        assert_eq!(enrolled.standing(&first, 0), Standing::Superseded);
        assert_eq!(enrolled.standing(&old, 0), Standing::Superseded);
        assert!(enrolled.is_news(&second) && !enrolled.is_news(&first));
        // The hub was restored from a backup of the time before the second was issued.
        let restored = member(Some(&first));
        assert_eq!(restored.standing(&second, 0), Standing::Current);
        assert!(restored.is_news(&second));
    }

    #[test]
    fn after_a_renewal_the_previous_one_is_current_for_a_while() {
        let first = Serial::next(None, 1_000);
        let second = Serial::next(Some(&first), 2_000);
        let renewed = Member {
            previous: Some((first.clone(), 10_000)),
            ..member(Some(&second))
        };
        assert_eq!(renewed.standing(&first, 9_999), Standing::Current);
        assert_eq!(renewed.standing(&first, 10_000), Standing::Superseded);
        assert_eq!(renewed.standing(&second, i64::MAX), Standing::Current);
        // The clock was set back: nobody is locked out.
        assert_eq!(renewed.standing(&first, i64::MIN), Standing::Current);
        let revoked = Member {
            revoked: Some(Revocation {
                at_ms: 1,
                by: "admin".into(),
                why: None,
            }),
            ..renewed
        };
        assert_eq!(revoked.standing(&second, 0), Standing::Revoked);
    }
}

//! Who may enter: the question that the listener asks about each peer with a valid certificate, and
//! the open connections of each peer, so that they can be closed when the answer changes.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use async_trait::async_trait;
use parking_lot::Mutex;

use crate::identity::Serial;
use crate::{Inner, Link};
use base::peer::Peer;

/// The certificate of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    pub serial: Serial,
    /// Since when it has been expired, according to the clock of this machine.
    pub expired: Option<jiff::Timestamp>,
}

/// Whether a peer may enter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It may. With an expired certificate it may only renew it; the owner of the listener ensures
    /// that.
    Welcome,
    /// Its certificate has been expired for too long.
    Expired,
    /// It may not, for this reason.
    Refused(String),
    /// It cannot be decided now; the peer may retry.
    Busy(String),
}

/// Decides who may enter. The signature and the chain of the certificate were checked.
#[async_trait]
pub trait Gate: Send + Sync {
    async fn admit(&self, who: &Peer, certificate: &Certificate) -> Verdict;
}

/// The open connections of each peer. A peer is here before the gate decides about it, so that a
/// change of the decision reaches every connection.
#[derive(Default)]
pub(crate) struct Roster {
    inner: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    of: HashMap<Peer, Vec<Weak<Inner>>>,
    /// Entries since the last removal of ended connections.
    added: usize,
}

impl Roster {
    pub(crate) fn enter(&self, who: &Peer, link: &Link) {
        let mut entries = self.inner.lock();
        // Ended connections are removed when they may be half of the entries.
        if entries.added > entries.of.len() {
            entries.of.retain(|_, links| {
                links.retain(|link| link.strong_count() > 0);
                !links.is_empty()
            });
            entries.added = 0;
        }
        entries.added += 1;
        let links = entries.of.entry(who.clone()).or_default();
        links.retain(|link| link.strong_count() > 0);
        links.push(Arc::downgrade(&link.inner));
    }

    /// The connections of a peer, also those that are being closed.
    pub(crate) fn of(&self, who: &Peer) -> Vec<Link> {
        let entries = self.inner.lock();
        let links = entries.of.get(who).into_iter().flatten();
        links
            .filter_map(Weak::upgrade)
            .map(|inner| Link { inner })
            .collect()
    }
}

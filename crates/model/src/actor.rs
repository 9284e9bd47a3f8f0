//! Who asks for something. Every request that reaches a daemon has exactly one actor;
//! [`crate::policy::may`] decides what it may do.
//!
//! The shells make the actor where they authenticate: the API from the token of a request, a
//! connection from the certificate of its peer. All other code passes the actor on. Nothing is
//! stored.

use std::fmt;
use std::sync::Arc;

use base::names::{PublisherName, RunName, SiteName};
use base::peer::Peer;

use crate::grant::Grant;

/// Who asks for something.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Actor {
    /// The administrator of this daemon: holder of its admin token, over HTTP or the local socket.
    Admin,
    /// The holder of an access token of this daemon.
    Token(Arc<Grant>),
    /// The trainer of a run: holder of the token of that run, at the API of the site that trains.
    Trainer(RunName),
    /// A site, by its certificate.
    Site(SiteName),
    /// A publisher, by its certificate.
    Publisher(PublisherName),
    /// The hub, by its certificate, at a site or a publisher.
    Hub,
}

impl Actor {
    /// The site that asks, if a site does.
    pub fn site(&self) -> Option<&SiteName> {
        match self {
            Self::Site(site) => Some(site),
            Self::Admin | Self::Token(_) | Self::Trainer(_) | Self::Publisher(_) | Self::Hub => {
                None
            }
        }
    }
}

impl From<&Peer> for Actor {
    fn from(peer: &Peer) -> Self {
        match peer {
            Peer::Hub(_) => Self::Hub,
            Peer::Site(name) => Self::Site(name.clone()),
            Peer::Publisher(name) => Self::Publisher(name.clone()),
        }
    }
}

/// As logs name it.
impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Admin => f.write_str("admin"),
            Self::Token(grant) => grant.fmt(f),
            Self::Trainer(run) => write!(f, "trainer of run {run}"),
            Self::Site(name) => write!(f, "site {name}"),
            Self::Publisher(name) => write!(f, "publisher {name}"),
            Self::Hub => f.write_str("hub"),
        }
    }
}

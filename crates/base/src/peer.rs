//! Who is at the other end of a connection, as its certificate names it.
//!
//! `transport` makes a [`Peer`] from a certificate that it has verified. Budgets, quotas and rates
//! are kept by it: a site and a publisher of the same name are two peers.

use std::fmt;

use crate::names::{PublisherName, SiteName};

/// The other end of a connection; whom a certificate is issued to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    /// The hub of this name.
    Hub(SiteName),
    /// The site of this name.
    Site(SiteName),
    /// A program that publishes at the hub from another machine, and may do nothing else.
    Publisher(PublisherName),
}

impl Peer {
    /// The name without the role.
    pub fn name(&self) -> &str {
        match self {
            Self::Hub(name) | Self::Site(name) => name.as_str(),
            Self::Publisher(name) => name.as_str(),
        }
    }

    /// The name of a site; `None` for a hub or a publisher.
    pub fn site(&self) -> Option<&SiteName> {
        match self {
            Self::Site(name) => Some(name),
            Self::Hub(_) | Self::Publisher(_) => None,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let role = match self {
            Self::Hub(_) => "hub",
            Self::Site(_) => "site",
            Self::Publisher(_) => "publisher",
        };
        write!(f, "{role} {}", self.name())
    }
}

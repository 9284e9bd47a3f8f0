//! Which sites are connected, and how a question reaches one of them.
//!
//! Sessions register and remove their connections; every question to a site goes through here.
//! Nothing is stored: after a restart the sites connect again.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use serde::de::DeserializeOwned;

use base::clock;
use base::fault::Fault;
use base::names::SiteName;
use exchange::wire;
use model::protocol::AskSite;
use transport::Link;

/// The connections of the sites. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Links {
    connected: Arc<RwLock<HashMap<SiteName, Connected>>>,
}

/// A connection, and when something was received over it.
struct Connected {
    link: Link,
    heard: Mutex<Heard>,
}

struct Heard {
    /// The bytes that had been received at the last look.
    bytes: u64,
    at_ms: i64,
}

impl Connected {
    fn new(link: Link) -> Self {
        let heard = Heard {
            bytes: link.bytes().1,
            at_ms: clock::now_ms(),
        };
        Self {
            link,
            heard: Mutex::new(heard),
        }
    }

    /// When something was last received, as far as was looked.
    fn heard_ms(&self) -> i64 {
        let bytes = self.link.bytes().1;
        let mut heard = self.heard.lock();
        if bytes != heard.bytes {
            *heard = Heard {
                bytes,
                at_ms: clock::now_ms(),
            };
        }
        heard.at_ms
    }
}

impl Links {
    /// The site uses this connection from now on. An older one of the same site is closed.
    pub(super) fn enter(&self, site: &SiteName, link: &Link) {
        let new = Connected::new(link.clone());
        let old = self.connected.write().insert(site.clone(), new);
        let Some(Connected { link: old, .. }) = old else {
            return;
        };
        if !old.is_closed() && old.remote_address().ip() != link.remote_address().ip() {
            let (old, new) = (old.remote_address(), link.remote_address());
            tracing::warn!(%old, %new, "a site connected from another address while its connection was open: do two machines use its name?");
        }
        old.close("the site has a newer connection");
    }

    /// The site does not use this connection any more. A newer one of the same site stays.
    pub(super) fn leave(&self, site: &SiteName, link: &Link) {
        let mut connected = self.connected.write();
        if connected.get(site).map(|connected| &connected.link) == Some(link) {
            connected.remove(site);
        }
    }

    /// The connection of a site; `None`: it is not connected.
    pub(super) fn of(&self, site: &SiteName) -> Option<Link> {
        let connected = self.connected.read();
        connected.get(site).map(|connected| connected.link.clone())
    }

    /// When something was last received from a connected site. Keep-alive packets count. It is exact
    /// to the interval of [`Links::look`].
    pub(super) fn heard_ms(&self, site: &SiteName) -> Option<i64> {
        self.connected.read().get(site).map(Connected::heard_ms)
    }

    /// Notes from which sites something was received since the last look. Returns when that was, for
    /// each connected site.
    pub(super) fn look(&self) -> Vec<(SiteName, i64)> {
        let connected = self.connected.read();
        let each = connected.iter();
        each.map(|(site, connected)| (site.clone(), connected.heard_ms()))
            .collect()
    }

    /// Whether a site is connected.
    pub(super) fn is_online(&self, site: &SiteName) -> bool {
        self.connected.read().contains_key(site)
    }

    /// How many sites are connected.
    pub(super) fn count(&self) -> usize {
        self.connected.read().len()
    }

    /// Closes all connections.
    pub(super) fn close_all(&self, why: &str) {
        let connected = self.connected.read();
        let all: Vec<Link> = connected.values().map(|c| c.link.clone()).collect();
        drop(connected);
        all.iter().for_each(|link| link.close(why));
    }

    /// Asks a site, and waits for its answer.
    pub(super) async fn ask<T: DeserializeOwned + Send + 'static>(
        &self,
        site: &SiteName,
        question: &AskSite,
    ) -> Result<T, Fault> {
        let link = self
            .of(site)
            .ok_or_else(|| Fault::unreachable(format!("site {site} is not connected")))?;
        wire::ask(&link, question).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::upload::tests::Bench;
    use base::fault::Code;
    use transport::identity::Claim;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_newer_connection_of_a_site_replaces_the_older_and_outlives_it() {
        let bench = Bench::start().await;
        let site: SiteName = "west".parse().unwrap();
        // At the hub they belong to two sites, so that it closes neither.
        let mut dialled = Vec::new();
        for name in ["a", "b"] {
            let token = bench.token(Some(name), None).await;
            let claim = Claim::Site(name.parse().unwrap());
            dialled.push(bench.dial(&bench.join(&token, &claim).await).await);
        }
        let [first, second] = <[Link; 2]>::try_from(dialled).unwrap();
        let (links, other) = (Links::default(), "east".parse().unwrap());
        links.enter(&site, &first);
        links.enter(&site, &second);
        assert!(first.is_closed() && !second.is_closed());
        links.leave(&site, &first);
        assert!(links.of(&site) == Some(second.clone()) && links.is_online(&site));
        assert!(!links.is_online(&other) && links.count() == 1);
        let question = AskSite::Holds {
            artifact: "model/m:1".parse().unwrap(),
            digest: content::manifest::Digest::of(b"m"),
        };
        let fault = links.ask::<bool>(&other, &question).await.unwrap_err();
        assert_eq!(fault.code, Code::Unreachable);
        links.close_all("the test ends");
        assert!(second.is_closed());
        links.leave(&site, &second);
        assert!(!links.is_online(&site));
    }
}

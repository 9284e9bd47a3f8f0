//! The hub's end of connections, for the tests of this crate and of crates that use it.

#![expect(clippy::unwrap_used, reason = "tests only")]

mod join;
pub mod proxy;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base::fault::Fault;
use base::names::SiteName;
use base::peer::Peer;
use base::workers::Workers;

use crate::identity::{CertificateRequest, HubIdentity, SiteIdentity};
use crate::{
    Arrival, Certificate, Congestion, ConnectionSettings, Gate, Link, Listener, Transport, Verdict,
    dial,
};

pub use crate::mux::drive as drive_mux;
pub use join::parse_join;

/// The number of bytes that a connection may buffer for sending.
pub(crate) const MEMORY: u64 = 32 << 20;

pub(crate) fn name(s: &str) -> SiteName {
    s.parse().unwrap()
}

pub(crate) fn settings(transport: Transport) -> ConnectionSettings {
    ConnectionSettings {
        congestion: Congestion::Auto,
        transport,
        ..ConnectionSettings::default()
    }
}

pub(crate) fn hub_in(dir: &Path) -> Arc<HubIdentity> {
    Arc::new(HubIdentity::open_or_create(dir, &name("hub")).unwrap())
}

pub(crate) fn site_of(hub: &HubIdentity, site: &str) -> SiteIdentity {
    let request = CertificateRequest::new().unwrap();
    let cert = hub.issue_for(&name(site), request.csr_der()).unwrap();
    request.complete(&cert, hub.ca_der()).unwrap()
}

pub(crate) fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// Admits every peer whose certificate is not expired.
pub struct AdmitAll;

#[async_trait::async_trait]
impl Gate for AdmitAll {
    async fn admit(&self, _: &Peer, certificate: &Certificate) -> Verdict {
        match certificate.expired {
            Some(_) => Verdict::Expired,
            None => Verdict::Welcome,
        }
    }
}

/// A hub on a free port.
pub struct Hub {
    pub(crate) identity: Arc<HubIdentity>,
    pub(crate) listener: Arc<Listener>,
    pub(crate) address: String,
    _dir: tempfile::TempDir,
}

impl Hub {
    pub fn start() -> Self {
        Self::start_with(|identity| {
            Listener::bind(
                loopback(),
                identity,
                Arc::new(AdmitAll),
                &settings(Transport::Auto),
                128 << 20,
                &Workers::default(),
            )
        })
    }

    pub(crate) fn start_with(
        bind: impl FnOnce(Arc<HubIdentity>) -> Result<Listener, Fault>,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let identity = hub_in(dir.path());
        let listener = Arc::new(bind(identity.clone()).unwrap());
        let address = listener.local_addr().to_string();
        Self {
            identity,
            listener,
            address,
            _dir: dir,
        }
    }

    pub(crate) async fn next_site(&self) -> (SiteName, Link, Vec<u8>) {
        match tokio::time::timeout(Duration::from_secs(10), self.listener.accept())
            .await
            .unwrap()
            .unwrap()
        {
            Arrival::Site {
                name,
                link,
                cert_der,
            } => (name, link, cert_der),
            Arrival::Join(_) | Arrival::Publisher { .. } => {
                unreachable!("something else where a site was expected")
            }
        }
    }

    /// Connects a site. Returns the end of the site and the end of the hub.
    pub async fn connect(&self, transport: Transport) -> (Link, Link) {
        let site = site_of(&self.identity, "chengdu");
        let wanted = settings(transport);
        let (dialled, (arrived, link, cert)) = tokio::join!(
            dial(&self.address, &site, &wanted, MEMORY),
            self.next_site()
        );
        assert_eq!(arrived, name("chengdu"));
        assert_eq!(cert, site.cert_der());
        (dialled.unwrap(), link)
    }
}

//! The connection to the hub, as the other components of a site use it.
//!
//! Owns the current connection, the reason why there is none, and the certificate of this site.
//! `connection` sets them. All questions to the hub go through this module. Only the certificate
//! survives a crash.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use jiff::SignedDuration;
use parking_lot::Mutex;
use tokio::sync::watch;

use base::blocking::blocking;
use base::clock;
use base::fault::{Fault, Retry};
use exchange::wire;
use model::protocol::{AskHub, renewal};
use transport::Link;
use transport::identity::SiteIdentity;

/// The connection to the hub.
pub(super) struct HubLink {
    identity: watch::Sender<Arc<SiteIdentity>>,
    link: watch::Sender<Option<Link>>,
    /// Why there is no connection: the fault of the last attempt.
    fault: Mutex<Option<Fault>>,
    /// The newest format of manifests that the hub and all its sites read, according to the last
    /// connection; the first one until there was a connection.
    manifest_format: AtomicU32,
    data_dir: PathBuf,
}

impl HubLink {
    /// Creates it without a connection.
    pub(super) fn new(identity: SiteIdentity, data_dir: PathBuf) -> Self {
        Self {
            identity: watch::Sender::new(Arc::new(identity)),
            link: watch::Sender::new(None),
            fault: Mutex::default(),
            manifest_format: AtomicU32::new(1),
            data_dir,
        }
    }

    /// The certificate of this site.
    pub(super) fn identity(&self) -> Arc<SiteIdentity> {
        self.identity.borrow().clone()
    }

    /// Watches the current value and each later one.
    pub(super) fn watch_identity(&self) -> watch::Receiver<Arc<SiteIdentity>> {
        self.identity.subscribe()
    }

    /// The current connection.
    pub(super) fn link(&self) -> Option<Link> {
        self.link.borrow().clone()
    }

    /// Watches the current value and each later one.
    pub(super) fn watch_link(&self) -> watch::Receiver<Option<Link>> {
        self.link.subscribe()
    }

    /// The newest format of manifests that the hub and all its sites read.
    pub(super) fn manifest_format(&self) -> u32 {
        self.manifest_format.load(Ordering::Relaxed)
    }

    /// Why there is no connection, if an attempt failed.
    pub(super) fn fault(&self) -> Option<Fault> {
        self.fault.lock().clone()
    }

    /// Sets the connection; it replaces an earlier one. The fault of the last attempt stays: a hub
    /// may refuse a site after its welcome, each time.
    pub(super) fn connected(&self, link: Link) {
        let format = link.manifest_format();
        self.manifest_format.store(format, Ordering::Relaxed);
        self.link.send_replace(Some(link));
    }

    /// The last connection was not refused.
    pub(super) fn ended_well(&self) {
        *self.fault.lock() = None;
    }

    /// Removes the connection. Returns the last one, which the caller closes.
    pub(super) fn disconnected(&self) -> Option<Link> {
        self.link.send_replace(None)
    }

    /// Records a failed attempt to connect. Returns whether its reason differs from the last one.
    pub(super) fn failed(&self, fault: &Fault) -> bool {
        let before = self.fault.lock().replace(fault.clone());
        !before.is_some_and(|before| says_the_same(&before.message, &fault.message))
    }

    /// Sends a question to the hub.
    pub(super) async fn ask<T: serde::de::DeserializeOwned + Send + 'static>(
        &self,
        question: &AskHub,
    ) -> Result<T, Fault> {
        match self.link() {
            Some(link) if matches!(question, AskHub::Publish { .. }) => {
                wire::ask_to_move(&link, question).await
            }
            Some(link) => wire::ask(&link, question).await,
            None => {
                let fault = Fault::unreachable("there is no connection to the hub")
                    .with_retry(Retry::Never);
                Err(match self.fault() {
                    Some(why) => fault.with_next(why.next).context(why.message),
                    None => fault,
                })
            }
        }
    }

    /// Reads the certificate of this site again. Returns whether it changed.
    pub(super) async fn reload_certificate(&self) -> Result<bool, Fault> {
        let data_dir = self.data_dir.clone();
        let read = blocking(move || SiteIdentity::load(&data_dir)).await?;
        let read = read.ok_or_else(|| Fault::not_found("there is no certificate in data_dir"))?;
        let before = self.identity();
        if read.cert_der() == before.cert_der() {
            return Ok(false);
        }
        if read.holder() != before.holder() {
            return Err(Fault::not_allowed(format!(
                "the certificate is for {}, not for {}",
                read.holder(),
                before.holder()
            )));
        }
        self.identity.send_replace(Arc::new(read));
        Ok(true)
    }

    /// Requests a new certificate over `link` when the current one is old, by the clock of the hub: it
    /// is the one that counts.
    pub(super) async fn renew_if_due(&self, link: &Link) {
        let ahead = SignedDuration::from_millis(link.hub_clock_ahead_ms().unwrap_or(0));
        let now = clock::now()
            .saturating_add(ahead)
            .unwrap_or_else(|_| clock::now());
        if !self.identity().needs_renewal_at(now) {
            return;
        }
        if let Err(fault) = self.renew(link).await {
            tracing::warn!(error = %fault, "the certificate could not be renewed; retrying in an hour");
        }
    }

    /// Requests a new certificate over `link`. It is stored before it is used.
    pub(super) async fn renew(&self, link: &Link) -> Result<(), Fault> {
        self.request_renewal(&self.identity(), link).await?;
        tracing::info!("the certificate was renewed");
        Ok(())
    }

    async fn request_renewal(&self, identity: &SiteIdentity, link: &Link) -> Result<(), Fault> {
        let request = identity.make_renewal_request()?;
        let question = AskHub::Renew {
            request: renewal(request.csr_der())?,
        };
        let answer: String = wire::ask(link, &question).await?;
        let malformed = |_| Fault::integrity("the hub sent a malformed certificate");
        let cert = hex::decode(answer).map_err(malformed)?;
        let renewed = request.complete(&cert, identity.ca_der())?;
        let renewed = Arc::new(renewed);
        let (saved, data_dir) = (renewed.clone(), self.data_dir.clone());
        blocking(move || saved.save(&data_dir)).await?;
        self.identity.send_replace(renewed);
        Ok(())
    }
}

/// Whether two messages differ only in their numbers: in a time, or in a number of attempts.
fn says_the_same(a: &str, b: &str) -> bool {
    fn words(text: &str) -> impl Iterator<Item = char> {
        text.chars().filter(|c| !c.is_ascii_digit())
    }
    words(a).eq(words(b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::fault::Code;
    use transport::identity::{CertificateRequest, HubIdentity};

    fn hub_link(dir: &std::path::Path) -> HubLink {
        let hub = HubIdentity::open_or_create(&dir.join("hub"), &"hub".parse().unwrap()).unwrap();
        let request = CertificateRequest::new().unwrap();
        let cert = hub
            .issue_for(&"east".parse().unwrap(), request.csr_der())
            .unwrap();
        HubLink::new(
            request.complete(&cert, hub.ca_der()).unwrap(),
            dir.to_owned(),
        )
    }

    #[test]
    fn a_repeated_refusal_with_another_time_is_not_new() {
        let dir = tempfile::tempdir().unwrap();
        let hub = hub_link(dir.path());
        let refusal = |time: &str, why: &str| {
            Fault::unreachable(format!(
                "the hub refused this site: the certificate {why}, and the clock of the hub says {time}"
            ))
        };
        assert!(hub.failed(&refusal("2028-01-04T08:28:21.142Z", "has expired")));
        assert!(!hub.failed(&refusal("2028-01-04T08:28:36.09Z", "has expired")));
        assert!(hub.failed(&refusal("2028-01-04T08:28:36.09Z", "is another site's")));
    }

    #[tokio::test]
    async fn without_a_connection_a_question_fails_at_once_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let hub = hub_link(dir.path());
        let ask = async || {
            hub.ask::<()>(&AskHub::ShowRun("r".parse().unwrap()))
                .await
                .unwrap_err()
        };
        assert_eq!(ask().await.message, "there is no connection to the hub");
        hub.failed(&Fault::unreachable("hub:7443 does not answer").with_next("start the hub"));
        let fault = ask().await;
        assert_eq!((fault.code, fault.retry), (Code::Unreachable, Retry::Never));
        assert_eq!(
            fault.message,
            "hub:7443 does not answer: there is no connection to the hub"
        );
        assert_eq!(fault.next, "start the hub");
        assert!(hub.link().is_none() && hub.disconnected().is_none());
    }
}

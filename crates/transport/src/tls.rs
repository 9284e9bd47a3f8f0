//! TLS for both transports: which certificates are trusted, and the result of a handshake.
//!
//! TLS 1.3 only, no 0-RTT, no tickets: every connection is authenticated by its own handshake. The
//! verifiers check chains at a time within the validity of the leaf. The clock is checked directly
//! after the handshake, where the fault can name both clocks.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig,
    SignatureScheme,
};

use crate::identity::{
    HUB_DNS_NAME, HubIdentity, Role, SiteIdentity, clamp_to_validity, crypto_provider, fingerprint,
    holder, roots_of, validity, verify_chain,
};
use base::clock;
use base::fault::Fault;
use base::peer::Peer;

pub(super) const ALPN: &[u8] = b"packhorse/1";
pub(super) const ALPN_JOIN: &[u8] = b"packhorse-join/1";

fn setup_error(what: &str, error: &dyn std::fmt::Display) -> Fault {
    Fault::internal(format!("set up TLS: {what}: {error}"))
}

/// The configuration of the hub. A client certificate is verified if one is presented;
/// [`check_site`] requires one where it is needed.
pub(super) fn server(hub: &HubIdentity) -> Result<ServerConfig, Fault> {
    let inner =
        WebPkiClientVerifier::builder_with_provider(roots_of(hub.ca_der())?, crypto_provider())
            .allow_unauthenticated()
            .build()
            .map_err(|e| setup_error("the sites' verifier", &e))?;
    let mut config = ServerConfig::builder_with_provider(crypto_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| setup_error("the version", &e))?
        .with_client_cert_verifier(Arc::new(SiteVerifier { inner }))
        .with_cert_resolver(hub.presented());
    config.alpn_protocols = vec![ALPN.to_vec(), ALPN_JOIN.to_vec()];
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(config)
}

/// The configuration of a site that has joined.
pub(super) fn client(site: &SiteIdentity) -> Result<ClientConfig, Fault> {
    let mut config = client_builder(HubVerifier::Ca(site.ca_der().to_vec()))?
        .with_client_auth_cert(site.chain(), site.key())
        .map_err(|e| setup_error("the site's certificate", &e))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// The configuration of a joining site, which knows only the CA hash in its token.
pub(super) fn joining_client(ca_hash: [u8; 32]) -> Result<ClientConfig, Fault> {
    let mut config = client_builder(HubVerifier::Pin(ca_hash))?.with_no_client_auth();
    config.alpn_protocols = vec![ALPN_JOIN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

fn client_builder(
    verifier: HubVerifier,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, Fault> {
    Ok(ClientConfig::builder_with_provider(crypto_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| setup_error("the version", &e))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier)))
}

/// The result of a handshake.
pub(super) struct Shown {
    pub(super) alpn: Vec<u8>,
    /// The certificates of the peer, leaf first; empty if it presented none.
    pub(super) chain: Vec<CertificateDer<'static>>,
}

/// The site or publisher of a handshake with `packhorse/1`. The listener checks the clock, and who may
/// enter.
pub(super) fn check_site(shown: &Shown) -> Result<(Peer, Vec<u8>), Fault> {
    let Some(leaf) = shown.chain.first() else {
        return Err(Fault::not_allowed("no certificate was presented")
            .with_next("join first: 'packhorse join' with a token from the hub"));
    };
    let who = holder(leaf)?;
    if !matches!(who, Peer::Site(_) | Peer::Publisher(_)) {
        return Err(Fault::not_allowed(format!(
            "the certificate of {who} is not for a site"
        )));
    }
    Ok((who, leaf.to_vec()))
}

/// Rejects a certificate that is expired according to `clock`. Returns a message if the certificate
/// is not valid yet.
pub(super) fn check_time(leaf: &[u8], who: &Peer, clock: &str) -> Result<Option<String>, Fault> {
    let (validity, now) = (validity(leaf)?, clock::now());
    validity.check(who, clock, now)?;
    Ok(validity.early(who, clock, now))
}

/// The hub of a handshake, checked against the clock of this site. The handshake has checked the
/// chain.
pub(super) fn check_hub(shown: &Shown) -> Result<Peer, Fault> {
    let leaf = shown
        .chain
        .first()
        .ok_or_else(|| Fault::not_allowed("the hub presented no certificate"))?;
    let who = holder(leaf)?;
    if !matches!(who, Peer::Hub(_)) {
        return Err(Fault::not_allowed(format!(
            "the certificate of {who} is not for a hub"
        )));
    }
    if let Some(early) = check_time(leaf, &who, "this machine")? {
        tracing::warn!(early, "the hub's certificate is not valid yet");
    }
    Ok(who)
}

/// The CA with this hash in a presented chain.
pub(super) fn pinned_ca<'a>(
    chain: &'a [CertificateDer<'_>],
    ca_hash: &[u8; 32],
) -> Option<&'a [u8]> {
    chain
        .iter()
        .map(|cert| &**cert)
        .find(|cert| fingerprint(cert) == *ca_hash)
}

/// How a site verifies the hub.
#[derive(Debug)]
enum HubVerifier {
    /// By the CA that it received when it joined.
    Ca(Vec<u8>),
    /// By the hash of the CA; the CA itself must be in the chain.
    Pin([u8; 32]),
}

/// The error of a handshake with a CA other than that of the token. It is recognised by its text,
/// because quinn passes errors as text.
pub(super) const PIN_MISMATCH: &str = "the CA differs from the CA in the token";

impl HubVerifier {
    fn general(error: impl std::fmt::Display) -> Error {
        Error::General(error.to_string())
    }
}

impl ServerCertVerifier for HubVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let ca = match self {
            HubVerifier::Ca(ca) => ca.as_slice(),
            HubVerifier::Pin(hash) => {
                pinned_ca(intermediates, hash).ok_or_else(|| Self::general(PIN_MISMATCH))?
            }
        };
        let inner = WebPkiServerVerifier::builder_with_provider(
            roots_of(ca).map_err(Self::general)?,
            crypto_provider(),
        )
        .build()
        .map_err(Self::general)?;
        inner.verify_server_cert(
            end_entity,
            &[],
            server_name,
            ocsp_response,
            clamp_to_validity(end_entity, now),
        )
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not used".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            cert,
            dss,
            &crypto_provider().signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        crypto_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// How the hub verifies a site: with the verifier of webpki. The listener checks the clock.
#[derive(Debug)]
struct SiteVerifier {
    inner: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for SiteVerifier {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Without hints a client presents its only certificate, so a wrong certificate is rejected
        // as such instead of being reported as missing.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        if intermediates.len() > 1 {
            return Err(Error::InvalidCertificate(CertificateError::BadEncoding));
        }
        self.inner.verify_client_cert(
            end_entity,
            intermediates,
            clamp_to_validity(end_entity, now),
        )
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not used".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// The DNS name of every hub.
pub(super) fn hub_name() -> Result<ServerName<'static>, Fault> {
    ServerName::try_from(HUB_DNS_NAME).map_err(|e| setup_error("the hub's name", &e))
}

/// Checks the leaf of a hub against a CA again, for [`super::join`], which stores the CA.
pub(super) fn check_hub_chain(leaf: &[u8], ca: &[u8]) -> Result<(), Fault> {
    verify_chain(leaf, ca, Role::Hub)
}

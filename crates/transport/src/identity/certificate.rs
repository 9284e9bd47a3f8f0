//! Reads and checks certificates: the name of the holder, the validity, the chain, a signature.
//! Pure functions.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use jiff::Timestamp;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use sha2::{Digest, Sha256};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::HUB_DNS_NAME;
use base::clock;
use base::fault::Fault;
use base::peer::Peer;

/// The URI by which a certificate names its holder.
pub(super) fn uri_of(holder: &Peer) -> String {
    match holder {
        Peer::Hub(name) => format!("packhorse:hub:{name}"),
        Peer::Site(name) => format!("packhorse:site:{name}"),
        Peer::Publisher(name) => format!("packhorse:publisher:{name}"),
    }
}

fn parse_uri(uri: &str) -> Result<Peer, Fault> {
    let unknown = || {
        Fault::not_allowed(format!(
            "the certificate names {uri:?}, which is neither a hub nor a site nor a publisher"
        ))
    };
    let rest = uri.strip_prefix("packhorse:").ok_or_else(unknown)?;
    let (what, name) = rest.split_once(':').ok_or_else(unknown)?;
    match what {
        "hub" => name.parse().map(Peer::Hub).map_err(|_| unknown()),
        "site" => name.parse().map(Peer::Site).map_err(|_| unknown()),
        "publisher" => name.parse().map(Peer::Publisher).map_err(|_| unknown()),
        _ => Err(unknown()),
    }
}

pub(super) fn parse(cert_der: &[u8]) -> Result<X509Certificate<'_>, Fault> {
    match X509Certificate::from_der(cert_der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(Fault::not_allowed("the certificate is malformed")),
    }
}

/// The holder that a certificate names. Does not check who issued it.
pub fn holder(cert_der: &[u8]) -> Result<Peer, Fault> {
    let certificate = parse(cert_der)?;
    let names = certificate.subject_alternative_name().ok().flatten();
    let mut uris = names
        .iter()
        .flat_map(|n| &n.value.general_names)
        .filter_map(|n| match n {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
    match (uris.next(), uris.next()) {
        (Some(uri), None) => parse_uri(uri),
        _ => Err(Fault::not_allowed(
            "the certificate does not name exactly one holder",
        )),
    }
}

/// The validity period of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first moment.
    pub from: Timestamp,
    /// The last moment.
    pub until: Timestamp,
}

impl Validity {
    /// Rejects a time after the end. The fault names the end of the certificate and the clock that
    /// was used.
    ///
    /// `whose` is the holder (`site chengdu`), `clock` the machine whose time `now` is (`this
    /// machine`). A time before the beginning is not rejected: the hub never issues certificates
    /// for the future, so this only means that one of the clocks is wrong. See [`Validity::early`].
    pub fn check(
        &self,
        whose: &impl std::fmt::Display,
        clock: &str,
        now: Timestamp,
    ) -> Result<(), Fault> {
        if now <= self.until {
            return Ok(());
        }
        let (until, now_text) = (clock::rfc3339(self.until), clock::rfc3339(now));
        let message = format!(
            "the certificate of {whose} has expired: it ended at {until}, and the clock of {clock} shows {now_text}"
        );
        Err(Fault::not_allowed(message)
            .with_next("if the clocks are correct, create a new token at the hub with 'packhorse token create' and join again"))
    }

    /// Returns a message if `now` is before the beginning: the clock of `clock` is behind, or the
    /// clock of the hub was ahead when it issued the certificate.
    pub fn early(
        &self,
        whose: &impl std::fmt::Display,
        clock: &str,
        now: Timestamp,
    ) -> Option<String> {
        let early = self.from.duration_since(now);
        (early.is_positive()).then(|| {
            let (from, now) = (clock::rfc3339(self.from), clock::rfc3339(now));
            let by = clock::span(early.unsigned_abs());
            format!(
                "the certificate of {whose} begins at {from}, {by} after the time of {clock}, {now}: correct the clocks of both machines (NTP)"
            )
        })
    }

    /// Whether more than this part of the validity period is over at `now`.
    pub fn has_used(&self, part: f64, now: Timestamp) -> bool {
        let whole = self.until.as_second() - self.from.as_second();
        let used = now.as_second() - self.from.as_second();
        used as f64 > whole as f64 * part
    }
}

/// The validity period of a certificate.
pub fn validity(cert_der: &[u8]) -> Result<Validity, Fault> {
    let certificate = parse(cert_der)?;
    let at = |seconds: i64| {
        Timestamp::from_second(seconds)
            .map_err(|_| Fault::not_allowed("the certificate's validity is outside the calendar"))
    };
    Ok(Validity {
        from: at(certificate.validity().not_before.timestamp())?,
        until: at(certificate.validity().not_after.timestamp())?,
    })
}

/// The time nearest to `now` at which the certificate is valid.
///
/// Chains are checked at this time, so that a wrong clock is not reported as a wrong certificate.
/// The caller also checks [`Validity`] and can then name both clocks.
pub(crate) fn clamp_to_validity(cert_der: &[u8], now: UnixTime) -> UnixTime {
    let Ok(Validity { from, until }) = validity(cert_der) else {
        return now;
    };
    let seconds =
        (now.as_secs() as i64).clamp(from.as_second(), until.as_second().max(from.as_second()));
    UnixTime::since_unix_epoch(Duration::from_secs(seconds.max(0) as u64))
}

/// Ring with TLS 1.3 only. AES-128-GCM comes first because it is fastest on every machine with AES
/// instructions.
pub(crate) fn crypto_provider() -> Arc<CryptoProvider> {
    use rustls::crypto::ring::cipher_suite::{
        TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
    };
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let create = || {
        let mut provider = rustls::crypto::ring::default_provider();
        provider.cipher_suites = vec![
            TLS13_AES_128_GCM_SHA256,
            TLS13_CHACHA20_POLY1305_SHA256,
            TLS13_AES_256_GCM_SHA384,
        ];
        Arc::new(provider)
    };
    PROVIDER.get_or_init(create).clone()
}

/// The use of a leaf certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// A hub, with the name [`HUB_DNS_NAME`].
    Hub,
    /// A site or a publisher, which open connections.
    Site,
}

/// A root store that trusts only this CA.
pub(crate) fn roots_of(ca_der: &[u8]) -> Result<Arc<rustls::RootCertStore>, Fault> {
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from(ca_der.to_vec()))
        .map_err(|e| Fault::not_allowed(format!("the hub's CA certificate cannot be used: {e}")))?;
    Ok(Arc::new(roots))
}

/// Checks that the CA signed this certificate for this use. [`Validity::check`] checks the clock.
pub(crate) fn verify_chain(cert_der: &[u8], ca_der: &[u8], role: Role) -> Result<(), Fault> {
    let cert = CertificateDer::from(cert_der);
    let now = clamp_to_validity(
        cert_der,
        UnixTime::since_unix_epoch(Duration::from_millis(clock::now_unix_ms())),
    );
    let roots = roots_of(ca_der)?;
    let unusable = |e: &dyn std::fmt::Display| {
        Fault::not_allowed(format!("the hub's CA certificate cannot be used: {e}"))
    };
    let result = match role {
        Role::Hub => {
            let verifier = WebPkiServerVerifier::builder_with_provider(roots, crypto_provider())
                .build()
                .map_err(|e| unusable(&e))?;
            let name = ServerName::try_from(HUB_DNS_NAME).map_err(|e| unusable(&e))?;
            verifier
                .verify_server_cert(&cert, &[], &name, &[], now)
                .map(|_| ())
        }
        Role::Site => {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, crypto_provider())
                .build()
                .map_err(|e| unusable(&e))?;
            verifier.verify_client_cert(&cert, &[], now).map(|_| ())
        }
    };
    result.map_err(|e| {
        Fault::not_allowed(format!(
            "the certificate was not issued by the hub's CA: {e}"
        ))
    })
}

/// Checks that the holder of the certificate signed `message` (ECDSA P-256, SHA-256). Does not
/// check who issued the certificate.
pub fn verify_signature(cert_der: &[u8], message: &[u8], signature: &[u8]) -> Result<(), Fault> {
    let certificate = parse(cert_der)?;
    let key = &certificate.public_key().subject_public_key.data;
    ring::signature::UnparsedPublicKey::new(&ring::signature::ECDSA_P256_SHA256_ASN1, key)
        .verify(message, signature)
        .map_err(|_| {
            Fault::integrity("the signature does not match the certificate and the signed bytes")
        })
}

/// The SHA-256 of a certificate, by which a join token pins the CA.
pub fn fingerprint(cert_der: &[u8]) -> [u8; 32] {
    Sha256::digest(cert_der).into()
}

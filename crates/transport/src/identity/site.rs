//! The identity of a site or publisher: its key, its certificate, and the CA of the hub that it
//! joined.

use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData, SigningKey};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::hub::{generate_key, pem};
use super::{Role, Serial, Validity, holder, identity_dir, read_if_exists, validity, verify_chain};
use base::fault::Fault;
use base::peer::Peer;
use base::{clock, durable};

const FILE: &str = "site.pem";
/// The file with the key of an unfinished join.
const JOINING: &str = "joining.pem";

/// The identity of a site or publisher.
pub struct SiteIdentity {
    holder: Peer,
    key: KeyPair,
    cert_der: CertificateDer<'static>,
    ca_der: CertificateDer<'static>,
}

impl std::fmt::Debug for SiteIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SiteIdentity")
            .field("holder", &self.holder)
            .finish_non_exhaustive()
    }
}

impl SiteIdentity {
    /// The path of the identity.
    pub fn path(data_dir: &Path) -> PathBuf {
        data_dir.join("identity").join(FILE)
    }

    /// Reads the identity; `None` if this site has not joined.
    pub fn load(data_dir: &Path) -> Result<Option<Self>, Fault> {
        let path = Self::path(data_dir);
        let Some(bytes) = read_if_exists(&path)? else {
            return Ok(None);
        };
        let invalid = |why: &dyn std::fmt::Display| {
            Fault::config(format!("read {}: {why}", path.display()))
                .with_next("remove this file and join again with a new token")
        };
        let key_der = PrivatePkcs8KeyDer::from_pem_slice(&bytes).map_err(|e| invalid(&e))?;
        let certs: Vec<_> = CertificateDer::pem_slice_iter(&bytes)
            .collect::<Result<_, _>>()
            .map_err(|e| invalid(&e))?;
        let [cert_der, ca_der] = <[_; 2]>::try_from(certs)
            .map_err(|_| invalid(&"it does not contain exactly two certificates"))?;
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key_der, &PKCS_ECDSA_P256_SHA256)
            .map_err(|e| invalid(&e))?;
        Self::assemble(key, cert_der, ca_der)
            .map(Some)
            .map_err(|fault| fault.context(path.display()))
    }

    /// Writes the identity atomically.
    pub fn save(&self, data_dir: &Path) -> Result<(), Fault> {
        let path = identity_dir(data_dir)?.join(FILE);
        let text = pem("PRIVATE KEY", self.key.serialized_der())
            + &pem("CERTIFICATE", &self.cert_der)
            + &pem("CERTIFICATE", &self.ca_der);
        durable::replace_secret(&path, text.as_bytes())?;
        // The key of the finished join is no longer needed and must not be reused.
        let _ = std::fs::remove_file(path.with_file_name(JOINING));
        Ok(())
    }

    fn assemble(
        key: KeyPair,
        cert_der: CertificateDer<'static>,
        ca_der: CertificateDer<'static>,
    ) -> Result<Self, Fault> {
        verify_chain(&cert_der, &ca_der, Role::Site)?;
        let holder = holder(&cert_der)?;
        if matches!(holder, Peer::Hub(_)) {
            return Err(Fault::not_allowed(
                "the certificate is for a hub, not for a site",
            ));
        }
        if !is_for_key(&cert_der, &key) {
            return Err(Fault::not_allowed(format!(
                "the certificate of {holder} is for a different key"
            )));
        }
        Ok(Self {
            holder,
            key,
            cert_der,
            ca_der,
        })
    }

    /// A site or a publisher.
    pub fn holder(&self) -> &Peer {
        &self.holder
    }

    /// The certificate, DER. It accompanies every signature.
    pub fn cert_der(&self) -> &[u8] {
        &self.cert_der
    }

    /// The CA of the hub, DER.
    pub fn ca_der(&self) -> &[u8] {
        &self.ca_der
    }

    pub fn validity(&self) -> Result<Validity, Fault> {
        validity(&self.cert_der)
    }

    pub fn serial(&self) -> Result<Serial, Fault> {
        Serial::of(&self.cert_der)
    }

    /// Whether to renew the certificate: half of its validity period is over, more or less, or it
    /// begins after the time of this machine.
    pub fn needs_renewal(&self) -> bool {
        self.needs_renewal_at(clock::now())
    }

    /// The same at the time `now`.
    pub fn needs_renewal_at(&self, now: jiff::Timestamp) -> bool {
        let part = renewal_part(&self.cert_der);
        self.validity()
            .is_ok_and(|v| v.has_used(part, now) || now < v.from)
    }

    /// A new key with a certificate request, which is sent to the hub. Pass the answer to
    /// [`CertificateRequest::complete`] with [`SiteIdentity::ca_der`].
    pub fn make_renewal_request(&self) -> Result<CertificateRequest, Fault> {
        CertificateRequest::new()
    }

    /// Signs with the key of the certificate: ECDSA P-256 over SHA-256, ASN.1.
    /// [`super::verify_signature`] checks it.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Fault> {
        self.key
            .sign(message)
            .map_err(|e| Fault::internal(format!("sign as {}: {e}", self.holder)))
    }

    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.cert_der.clone()]
    }

    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()))
    }
}

/// The part of its validity period after which a certificate is renewed: 0.4 to 0.6. It depends on the
/// certificate only, so that sites that joined together do not all renew at once.
fn renewal_part(cert_der: &[u8]) -> f64 {
    let hash = super::fingerprint(cert_der);
    let tenth = f64::from(u16::from_be_bytes([hash[0], hash[1]])) / f64::from(u16::MAX);
    0.4 + 0.2 * tenth
}

fn is_for_key(cert_der: &[u8], key: &KeyPair) -> bool {
    use x509_parser::prelude::FromDer;
    x509_parser::certificate::X509Certificate::from_der(cert_der)
        .is_ok_and(|(_, cert)| *cert.public_key().subject_public_key.data == *key.der_bytes())
}

/// A new key that waits for its certificate. The key never leaves this machine.
pub struct CertificateRequest {
    key: KeyPair,
    csr_der: Vec<u8>,
}

impl CertificateRequest {
    /// Creates a key and its request.
    pub fn new() -> Result<Self, Fault> {
        Self::of(generate_key()?)
    }

    /// The request of an unfinished join, or a new one. Its key is stored until
    /// [`SiteIdentity::save`]: if the answer of the hub is lost, the same token still works for the
    /// same key.
    pub fn kept(data_dir: &Path) -> Result<Self, Fault> {
        let path = identity_dir(data_dir)?.join(JOINING);
        let kept = read_if_exists(&path)?
            .and_then(|bytes| PrivatePkcs8KeyDer::from_pem_slice(&bytes).ok());
        if let Some(key) = kept.and_then(|der| {
            KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ECDSA_P256_SHA256).ok()
        }) {
            return Self::of(key);
        }
        let key = generate_key()?;
        durable::replace_secret(&path, pem("PRIVATE KEY", key.serialized_der()).as_bytes())?;
        Self::of(key)
    }

    fn of(key: KeyPair) -> Result<Self, Fault> {
        // The hub uses only the key of a request, so the request contains no name.
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let csr = params
            .serialize_request(&key)
            .map_err(|e| Fault::internal(format!("create a certificate request: {e}")))?;
        Ok(Self {
            csr_der: csr.der().to_vec(),
            key,
        })
    }

    /// The certificate request, DER.
    pub fn csr_der(&self) -> &[u8] {
        &self.csr_der
    }

    /// Builds the identity from the answer of the hub. Fails unless the certificate is for this key
    /// and was issued by this CA.
    pub fn complete(self, cert_der: &[u8], ca_der: &[u8]) -> Result<SiteIdentity, Fault> {
        SiteIdentity::assemble(
            self.key,
            CertificateDer::from(cert_der.to_vec()),
            CertificateDer::from(ca_der.to_vec()),
        )
    }
}

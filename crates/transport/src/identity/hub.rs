//! The identity of the hub: its CA and its own certificate.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use rand::Rng as _;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{
    CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer,
};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::certificate::{crypto_provider, uri_of};
use super::{
    HUB_DNS_NAME, Role, Serial, Validity, fingerprint, holder, identity_dir, read_if_exists,
    validity, verify_chain,
};
use base::fault::Fault;
use base::names::SiteName;
use base::peer::Peer;
use base::{clock, durable};

const DAY: Duration = Duration::from_secs(24 * 3600);
const CA_DAYS: u32 = 20 * 365;
/// Sites whose clock is ahead by months can still connect. The hub replaces the certificate after
/// half of this time.
const HUB_DAYS: u32 = 365;
const HUB_RENEWED_AFTER: f64 = 0.5;
const LEAF_DAYS: u32 = 30;
/// The validity of the certificate of a site or publisher.
pub const LEAF_VALIDITY: Duration = Duration::from_secs(LEAF_DAYS as u64 * 24 * 3600);
/// Certificates begin this long before they are created, because the clock of a factory may be
/// behind by a wrong time zone.
const BACKDATED: Duration = DAY;
/// 2026-01-01: no hub is older. A machine without a clock battery starts in 1970, and a CA with
/// that date would be expired later.
const EARLIEST: Duration = Duration::from_secs(1_767_225_600);

/// The file with the key of stateless resets, which outlives the certificates of the hub.
const RESET_KEY: &str = "reset.key";

/// The CA of the hub and its own certificate, as stored under `<data_dir>/identity/`.
pub struct HubIdentity {
    name: SiteName,
    ca_der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    /// The file of the certificate.
    path: PathBuf,
    reset_key: [u8; 32],
    presented: Arc<Presented>,
}

/// The hub's own key and certificate.
struct Leaf {
    key_der: PrivatePkcs8KeyDer<'static>,
    cert_der: CertificateDer<'static>,
}

impl Leaf {
    /// Whether it can be used, and is not to be renewed.
    fn is_current(&self, ca_der: &[u8], name: &SiteName) -> bool {
        let now = issuing_time(ca_der);
        let is_in_time = validity(&self.cert_der).is_ok_and(|v| {
            !v.has_used(HUB_RENEWED_AFTER, clock::now())
                && v.from.as_second() <= now.as_secs() as i64
        });
        is_in_time
            && holder(&self.cert_der).ok() == Some(Peer::Hub(name.clone()))
            && verify_chain(&self.cert_der, ca_der, Role::Hub).is_ok()
    }

    /// What a TLS handshake needs: the key, and the chain of its certificate and the CA, so that a
    /// joining site can compare the CA with its token.
    fn certified(&self, ca_der: &CertificateDer<'static>) -> Result<Arc<CertifiedKey>, Fault> {
        let key = PrivateKeyDer::Pkcs8(self.key_der.clone_key());
        let key = crypto_provider()
            .key_provider
            .load_private_key(key)
            .map_err(|e| Fault::internal(format!("use the hub's key: {e}")))?;
        let chain = vec![self.cert_der.clone(), ca_der.clone()];
        Ok(Arc::new(CertifiedKey::new(chain, key)))
    }
}

/// The certificate of the hub in new handshakes. It changes when the hub renews it.
struct Presented {
    leaf: RwLock<(Arc<Leaf>, Arc<CertifiedKey>)>,
}

impl std::fmt::Debug for Presented {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Presented").finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Presented {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.leaf.read().1.clone())
    }
}

impl std::fmt::Debug for HubIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubIdentity")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl HubIdentity {
    /// Reads the identity and creates what is missing: the CA only if there is none; the
    /// certificate of the hub also if it has a different name or is in the last third of its
    /// validity.
    pub fn open_or_create(data_dir: &Path, name: &SiteName) -> Result<Self, Fault> {
        let dir = identity_dir(data_dir)?;
        let ca_path = dir.join("ca.pem");
        let (ca_key, ca_der) = match read_if_exists(&ca_path)? {
            Some(pem) => read_pair(&ca_path, &pem)?,
            None => {
                let (key, cert) = create_ca(name)?;
                durable::replace_secret(&ca_path, &write_pair(&key, &cert))?;
                tracing::info!(path = %ca_path.display(), "created the hub's certificate authority");
                (key, cert)
            }
        };
        let ca_key = KeyPair::from_pkcs8_der_and_sign_algo(&ca_key, &PKCS_ECDSA_P256_SHA256)
            .map_err(|e| Fault::config(format!("read the key in {}: {e}", ca_path.display())))?;
        let issuer = Issuer::from_ca_cert_der(&ca_der, ca_key).map_err(|e| {
            Fault::config(format!(
                "read the certificate in {}: {e}",
                ca_path.display()
            ))
        })?;

        let path = dir.join("hub.pem");
        let stored = read_if_exists(&path)?
            .and_then(|pem| read_pair(&path, &pem).ok())
            .map(|(key_der, cert_der)| Leaf { key_der, cert_der });
        let reset_key = reset_key(&dir.join(RESET_KEY), stored.as_ref())?;
        let leaf = match stored.filter(|leaf| leaf.is_current(&ca_der, name)) {
            Some(leaf) => leaf,
            None => create_leaf(&issuer, &ca_der, name, &path)?,
        };
        let certified = leaf.certified(&ca_der)?;
        let presented = Presented {
            leaf: RwLock::new((Arc::new(leaf), certified)),
        };
        Ok(Self {
            name: name.clone(),
            ca_der,
            issuer,
            path,
            reset_key,
            presented: Arc::new(presented),
        })
    }

    /// Replaces the certificate of the hub and its key if half of its validity is over. New handshakes
    /// use the new one; open connections continue. Returns whether it was replaced. Blocks.
    pub fn renew_if_due(&self) -> Result<bool, Fault> {
        if self.leaf().is_current(&self.ca_der, &self.name) {
            return Ok(false);
        }
        let leaf = create_leaf(&self.issuer, &self.ca_der, &self.name, &self.path)?;
        let certified = leaf.certified(&self.ca_der)?;
        *self.presented.leaf.write() = (Arc::new(leaf), certified);
        Ok(true)
    }

    /// Replaces the hub's certificate by one that was issued this long ago.
    #[cfg(test)]
    pub(crate) fn age(&self, age: Duration) {
        let key = generate_key().unwrap();
        let holder = Peer::Hub(self.name.clone());
        let (serial, lifetime) = (
            Serial::next(None, 1),
            validity_from(now_or_earliest() - age, HUB_DAYS),
        );
        let cert_der = issue(&self.issuer, &key, &holder, &serial, lifetime).unwrap();
        let key_der = PrivatePkcs8KeyDer::from(key.serialize_der());
        let leaf = Leaf { key_der, cert_der };
        let certified = leaf.certified(&self.ca_der).unwrap();
        *self.presented.leaf.write() = (Arc::new(leaf), certified);
    }

    fn leaf(&self) -> Arc<Leaf> {
        self.presented.leaf.read().0.clone()
    }

    /// A secret that stays the same across restarts. The endpoint of the hub uses it for stateless
    /// resets.
    pub fn reset_key(&self) -> [u8; 32] {
        self.reset_key
    }

    pub fn name(&self) -> &SiteName {
        &self.name
    }

    /// The certificate of the CA, DER.
    pub fn ca_der(&self) -> &[u8] {
        &self.ca_der
    }

    /// The certificate of the hub, DER.
    pub fn cert_der(&self) -> CertificateDer<'static> {
        self.leaf().cert_der.clone()
    }

    /// The SHA-256 of the CA certificate, which join tokens contain.
    pub fn ca_hash(&self) -> [u8; 32] {
        fingerprint(&self.ca_der)
    }

    /// Returns a message if the clock of this machine shows a time before the beginning of the
    /// hub's own certificate or of its CA.
    pub fn clock_fault(&self) -> Option<String> {
        let now = clock::now();
        let early =
            |cert: &[u8], what: &str| validity(cert).ok()?.early(&what, "this machine", now);
        early(&self.cert_der(), "this hub").or_else(|| early(&self.ca_der, "this hub's CA"))
    }

    /// The validity period of the hub's own certificate.
    pub fn validity(&self) -> Result<Validity, Fault> {
        validity(&self.cert_der())
    }

    /// The certificate that the hub presents in a handshake: the current one at that time.
    pub(crate) fn presented(&self) -> Arc<dyn ResolvesServerCert> {
        self.presented.clone()
    }

    /// The certificates that the hub presents: its own, then the CA.
    #[cfg(test)]
    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.cert_der(), self.ca_der.clone()]
    }

    #[cfg(test)]
    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.leaf().key_der.clone_key())
    }

    /// Like [`HubIdentity::issue_as`], for a site.
    #[cfg(any(test, feature = "testing"))]
    pub fn issue_for(&self, site: &SiteName, csr_der: &[u8]) -> Result<Vec<u8>, Fault> {
        let serial = Serial::next(None, clock::now_unix_ms());
        self.issue_as(&Peer::Site(site.clone()), csr_der, &serial)
    }

    /// Issues a certificate to a site or a publisher, for the key in the request, valid for
    /// [`LEAF_VALIDITY`]. Only the key is taken from the request, which must be signed with it. The
    /// caller provides the name, from a redeemed token or from the certificate being renewed, and the
    /// serial, which it has stored as the newest of this holder.
    pub fn issue_as(
        &self,
        holder: &Peer,
        csr_der: &[u8],
        serial: &Serial,
    ) -> Result<Vec<u8>, Fault> {
        let request = read_csr(csr_der)?;
        Ok(issue(
            &self.issuer,
            &request.public_key,
            holder,
            serial,
            validity_from(issuing_time(&self.ca_der), LEAF_DAYS),
        )?
        .to_vec())
    }

    /// Issues a certificate to a site with any validity period (since 1970).
    #[cfg(any(test, feature = "testing"))]
    pub fn issue_between(
        &self,
        site: &SiteName,
        csr_der: &[u8],
        lifetime: (Duration, Duration),
    ) -> Result<Vec<u8>, Fault> {
        self.issue_to(&Peer::Site(site.clone()), csr_der, lifetime)
    }

    /// The same to any holder. Its serial is newer than all that were issued before.
    #[cfg(any(test, feature = "testing"))]
    pub fn issue_to(
        &self,
        holder: &Peer,
        csr_der: &[u8],
        lifetime: (Duration, Duration),
    ) -> Result<Vec<u8>, Fault> {
        use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
        static NEXT: AtomicU64 = AtomicU64::new(60_000);
        let request = read_csr(csr_der)?;
        Ok(issue(
            &self.issuer,
            &request.public_key,
            holder,
            &Serial::next(None, clock::now_unix_ms() + NEXT.fetch_add(60_000, Relaxed)),
            lifetime,
        )?
        .to_vec())
    }

    /// The site of a certificate, if the CA of this hub issued it. Ignores the validity period: a
    /// receipt stays valid after its certificate has expired.
    pub fn verify_site(&self, cert_der: &[u8]) -> Result<SiteName, Fault> {
        verify_chain(cert_der, &self.ca_der, Role::Site)?;
        match holder(cert_der)? {
            Peer::Site(name) => Ok(name),
            other => Err(Fault::not_allowed(format!(
                "the certificate is for {other}, not for a site"
            ))),
        }
    }
}

/// A hash that identifies the key of a certificate request.
pub(crate) fn key_hash(request: &CertificateSigningRequestParams) -> [u8; 32] {
    *blake3::hash(request.public_key.der_bytes()).as_bytes()
}

/// Refuses a certificate request that [`HubIdentity::issue_as`] would refuse.
pub fn check_request(csr_der: &[u8]) -> Result<(), Fault> {
    read_csr(csr_der).map(drop)
}

/// Parses a certificate request and checks that it is signed with its own key, which must be ECDSA
/// P-256.
pub(crate) fn read_csr(csr_der: &[u8]) -> Result<CertificateSigningRequestParams, Fault> {
    let refuse =
        |why: String| Fault::not_allowed(format!("the certificate request is invalid: {why}"));
    let request =
        CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr_der))
            .map_err(|e| refuse(e.to_string()))?;
    if PublicKeyData::algorithm(&request.public_key) != &PKCS_ECDSA_P256_SHA256 {
        return Err(refuse("its key is not ECDSA P-256".into()));
    }
    Ok(request)
}

pub(super) fn generate_key() -> Result<KeyPair, Fault> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)
        .map_err(|e| Fault::internal(format!("generate a key: {e}")))
}

fn create_ca(
    name: &SiteName,
) -> Result<(PrivatePkcs8KeyDer<'static>, CertificateDer<'static>), Fault> {
    let key = generate_key()?;
    let mut params = params(
        &format!("packhorse CA of {name}"),
        validity_from(now_or_earliest(), CA_DAYS),
    );
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let cert = params
        .self_signed(&key)
        .map_err(|e| Fault::internal(format!("create the CA certificate: {e}")))?;
    Ok((
        PrivatePkcs8KeyDer::from(key.serialize_der()),
        cert.der().clone(),
    ))
}

fn issue(
    issuer: &Issuer<'_, KeyPair>,
    key: &impl PublicKeyData,
    holder: &Peer,
    serial: &Serial,
    lifetime: (Duration, Duration),
) -> Result<CertificateDer<'static>, Fault> {
    let error = |e: rcgen::Error| Fault::internal(format!("issue a certificate for {holder}: {e}"));
    let mut params = params(&holder.to_string(), lifetime);
    params.serial_number = Some(SerialNumber::from_slice(serial.as_bytes()));
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params
        .subject_alt_names
        .push(SanType::URI(uri_of(holder).try_into().map_err(error)?));
    match holder {
        Peer::Hub(_) => {
            params
                .subject_alt_names
                .push(SanType::DnsName(HUB_DNS_NAME.try_into().map_err(error)?));
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        }
        Peer::Site(_) | Peer::Publisher(_) => {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        }
    }
    Ok(params.signed_by(key, issuer).map_err(error)?.der().clone())
}

/// Creates the hub's own key and certificate, and stores them.
fn create_leaf(
    issuer: &Issuer<'static, KeyPair>,
    ca_der: &[u8],
    name: &SiteName,
    path: &Path,
) -> Result<Leaf, Fault> {
    let key = generate_key()?;
    let cert_der = issue(
        issuer,
        &key,
        &Peer::Hub(name.clone()),
        &Serial::next(None, clock::now_unix_ms()),
        validity_from(issuing_time(ca_der), HUB_DAYS),
    )?;
    let key_der = PrivatePkcs8KeyDer::from(key.serialize_der());
    durable::replace_secret(path, &write_pair(&key_der, &cert_der))?;
    tracing::info!(path = %path.display(), "created the hub's certificate");
    Ok(Leaf { key_der, cert_der })
}

/// The stored key of stateless resets; created if there is none. A hub of an earlier version derived
/// it from the key of its certificate: the sites that are connected to that one know this key.
fn reset_key(path: &Path, earlier: Option<&Leaf>) -> Result<[u8; 32], Fault> {
    let mut key = [0; 32];
    if let Some(stored) = read_if_exists(path)?
        && hex::decode_to_slice(stored.trim_ascii(), &mut key).is_ok()
    {
        return Ok(key);
    }
    key = match earlier {
        Some(leaf) => blake3::derive_key(
            "packhorse QUIC stateless reset v1",
            leaf.key_der.secret_pkcs8_der(),
        ),
        None => rand::rng().random(),
    };
    durable::replace_secret(path, format!("{}\n", hex::encode(key)).as_bytes())?;
    Ok(key)
}

/// The current time (since 1970). If the clock of this machine is before the creation of the CA,
/// the creation time of the CA.
fn issuing_time(ca_der: &[u8]) -> Duration {
    let made = validity(ca_der).map_or(0, |v| v.from.as_second().max(0).unsigned_abs());
    now_or_earliest().max(Duration::from_secs(made) + BACKDATED)
}

fn now_or_earliest() -> Duration {
    Duration::from_millis(clock::now_unix_ms()).max(EARLIEST)
}

/// The period from a little before `now`, for this number of days (since 1970).
fn validity_from(now: Duration, days: u32) -> (Duration, Duration) {
    (now.saturating_sub(BACKDATED), now + DAY * days)
}

fn params(common_name: &str, (from, until): (Duration, Duration)) -> CertificateParams {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let mut params = CertificateParams::default();
    params.not_before = epoch + from;
    params.not_after = epoch + until;
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    params
}

/// A key and a certificate as PEM, in this order.
fn write_pair(key: &PrivatePkcs8KeyDer<'_>, cert: &CertificateDer<'_>) -> Vec<u8> {
    let mut out = pem("PRIVATE KEY", key.secret_pkcs8_der());
    out.push_str(&pem("CERTIFICATE", cert));
    out.into_bytes()
}

fn read_pair(
    path: &Path,
    bytes: &[u8],
) -> Result<(PrivatePkcs8KeyDer<'static>, CertificateDer<'static>), Fault> {
    let error = |e: rustls::pki_types::pem::Error| {
        Fault::config(format!("read {}: {e}", path.display()))
            .with_next("restore this file from a backup; with a new file, no site could connect")
    };
    Ok((
        PrivatePkcs8KeyDer::from_pem_slice(bytes).map_err(error)?,
        CertificateDer::from_pem_slice(bytes).map_err(error)?,
    ))
}

/// One PEM section: base64 in lines of 64 characters.
pub(super) fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let mut out = format!("-----BEGIN {label}-----\n");
    for line in text.as_bytes().chunks(64) {
        out.push_str(&String::from_utf8_lossy(line));
        out.push('\n');
    }
    out + &format!("-----END {label}-----\n")
}

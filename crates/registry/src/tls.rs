//! TLS to a registry with certificates of its own: `ca_file`.
//!
//! A certificate in `ca_file` is trusted as an authority, and also as the certificate of the
//! registry itself. The common command `openssl req -x509` makes a certificate that is its own
//! authority; OpenSSL and Go accept it as the certificate of a server, `webpki` does not. Its name
//! and validity are checked as usual.

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls_platform_verifier::Verifier;

use base::durable;
use base::fault::Fault;
use base::limits;

/// The TLS configuration that trusts the certificates of the system and those in this file.
pub(crate) fn config(ca_file: &Path) -> Result<ClientConfig, Fault> {
    let pem = durable::read_regular(ca_file, limits::SECRET_BYTES_MAX)
        .map_err(|e| Fault::config(format!("read ca_file {}: {e}", ca_file.display())))?;
    let listed: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .unwrap_or_default();
    if listed.is_empty() {
        return Err(Fault::config(format!(
            "ca_file {} contains no PEM certificate",
            ca_file.display()
        )));
    }
    let invalid = |e: rustls::Error| {
        Fault::config(format!("ca_file {}: {e}", ca_file.display()))
            .with_next("set ca_file to a file with valid PEM certificates")
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let usual = Verifier::new_with_extra_roots(listed.iter().cloned(), provider.clone())
        .map_err(invalid)?;
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(invalid)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Listed { usual, listed }))
        .with_no_client_auth())
}

/// Accepts what the usual verifier accepts, and the listed certificates themselves.
#[derive(Debug)]
struct Listed {
    usual: Verifier,
    listed: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for Listed {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let error = match self.usual.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        ) {
            Err(error) if self.listed.iter().any(|listed| listed == end_entity) => error,
            result => return result,
        };
        match error {
            // The verifier checks the validity first, then that the certificate is not one of an
            // authority (`Other`), then its issuer, which another certificate may have the name of
            // (`BadSignature`). A certificate that is listed needs no issuer.
            rustls::Error::InvalidCertificate(
                CertificateError::Other(_)
                | CertificateError::UnknownIssuer
                | CertificateError::BadSignature,
            ) => {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            error => Err(error),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual
            .verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.usual
            .verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}

//! Authentication of connections: the CA of the hub, the certificates that it issues, and the join
//! tokens.
//!
//! The hub creates its CA at the first start ([`HubIdentity`]). A site gets its certificate once,
//! with a [`JoinToken`], and renews it over its connection ([`SiteIdentity`]). A *publisher*, a
//! client that may only publish from another machine, gets its certificate in the same way. Each
//! certificate has a [`Serial`], so that the hub accepts only the newest one of a holder. A
//! certificate names its holder in a URI (`packhorse:site:chengdu`). This name comes from the token
//! or from the renewed certificate, never from the request.
//!
//! On disk, under `<data_dir>/identity/` (mode 0700, files 0600), PEM:
//! - `ca.pem` at the hub: the key of the CA, then its certificate.
//! - `hub.pem`: the key of the hub, then its certificate. The hub creates it again if it is
//!   missing or has a different name, and replaces it at half of its validity, while it runs.
//! - `reset.key` at the hub: the key of stateless resets, in hex.
//! - `site.pem`: the key of the site, its certificate, then the CA of the hub.
//!
//! A key and its certificate are in the same file, and a file is replaced atomically. A crash
//! therefore leaves a complete identity or none.

mod certificate;
mod hub;
mod serial;
mod site;
mod token;

pub(crate) use certificate::{Role, clamp_to_validity, crypto_provider, roots_of, verify_chain};
pub use certificate::{Validity, fingerprint, holder, validity, verify_signature};
pub use hub::{HubIdentity, LEAF_VALIDITY, check_request};
pub(crate) use hub::{key_hash, read_csr};
pub use serial::Serial;
pub use site::{CertificateRequest, SiteIdentity};
pub use token::{Claim, JoinToken, Redeemer, secret_hash};

use std::path::{Path, PathBuf};

use base::durable;
use base::fault::{Fault, IoContext};

/// The DNS name in the certificate of every hub. Sites connect by address, so this name only states
/// that the certificate is for a hub.
pub const HUB_DNS_NAME: &str = "hub.packhorse";

/// The directory of the identity, created with mode 0700.
fn identity_dir(data_dir: &Path) -> Result<PathBuf, Fault> {
    use std::os::unix::fs::PermissionsExt;
    let dir = data_dir.join("identity");
    durable::create_dir_all(&dir)?;
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700))
        .at(format_args!("change the mode of {} to 0700", dir.display()))?;
    Ok(dir)
}

/// Reads a file of the identity; `None` if it does not exist.
fn read_if_exists(path: &Path) -> Result<Option<Vec<u8>>, Fault> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Fault::io(format_args!("read {}", path.display()), &error)),
    }
}

#[cfg(test)]
mod tests;

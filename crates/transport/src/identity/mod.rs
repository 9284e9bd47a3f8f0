//! Who is who on the line: the hub's CA, the certificates it issues, and the tokens that let a site
//! join.
//!
//! The hub makes its CA on first start ([`HubIdentity`]); a site gets its certificate once, by a
//! [`JoinToken`], and renews it over the line ([`SiteIdentity`]); so does a *publisher*, who may
//! publish from another machine and do nothing else. A certificate names its holder in a URI
//! (`packhorse:site:chengdu`), and that name comes from the token or from the certificate renewed,
//! never from what the asking side wrote.
//!
//! On disk, under `<data_dir>/identity/` (mode 0700, files 0600), PEM:
//! - `ca.pem` at the hub: the CA's key, then its certificate;
//! - `hub.pem`: the hub's key, then its certificate (made anew from the CA when lost, old or of
//!   another name);
//! - `site.pem`: the site's key, its certificate, then the hub's CA.
//!
//! A key and its certificate share one file, and a file is replaced whole, so a crash leaves a
//! complete identity or none.

mod certificate;
mod hub;
mod site;
mod token;

pub use certificate::{Holder, Validity, fingerprint, holder, validity, verify_signature};
pub(crate) use certificate::{Role, clamp_to_validity, crypto_provider, roots_of, verify_chain};
pub use hub::HubIdentity;
pub(crate) use hub::{key_hash, read_csr};
pub use site::{CertificateRequest, SiteIdentity};
pub use token::{Claim, JoinToken, Redeemer, secret_hash};

use std::path::{Path, PathBuf};

use base::durable;
use base::fault::{Fault, IoContext};

/// The DNS name in every hub's certificate: sites dial by address, so the name says only "this is a
/// hub".
pub const HUB_DNS_NAME: &str = "hub.packhorse";

/// The folder that holds the identity, made with mode 0700.
fn identity_dir(data_dir: &Path) -> Result<PathBuf, Fault> {
    use std::os::unix::fs::PermissionsExt;
    let dir = data_dir.join("identity");
    durable::create_dir_all(&dir)?;
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o700))
        .at(format_args!("protect {}", dir.display()))?;
    Ok(dir)
}

/// Reads a file of the identity; `None` when there is none.
fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, Fault> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Fault::io(format_args!("read {}", path.display()), &error)),
    }
}

#[cfg(test)]
mod tests;

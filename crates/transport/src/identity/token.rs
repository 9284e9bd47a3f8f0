//! Join tokens: what an operator carries from the hub to a new site.
//!
//! Printed as `<id>.<secret>.<ca_hash>`: the id (10 letters and digits) finds the token at the hub,
//! the secret (32 random bytes) proves that the site was given it, and the hash (SHA-256 of the
//! CA's certificate) lets the site recognise the hub before it says the secret. The hub keeps the
//! id and [`secret_hash`], never the secret.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::Rng as _;

use super::{Holder, HubIdentity};
use base::fault::Fault;
use base::names::SiteName;

const ID_CHARS: usize = 10;

/// A join token. `Display` prints the secret, `Debug` does not.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    id: String,
    secret: [u8; 32],
    ca_hash: [u8; 32],
}

impl JoinToken {
    /// A new token for this hub. It is good for nothing until the hub has stored its id and
    /// [`JoinToken::secret_hash`].
    pub fn generate(hub: &HubIdentity) -> Self {
        // No '-' in the id: a token that began with one would be taken for an option on a command
        // line.
        const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
        let mut rng = rand::rng();
        let id = (0..ID_CHARS)
            .map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())]))
            .collect();
        Self {
            id,
            secret: rng.random(),
            ca_hash: hub.ca_hash(),
        }
    }

    /// What finds the token at the hub.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What the hub stores in place of the secret.
    pub fn secret_hash(&self) -> [u8; 32] {
        secret_hash(&self.id, &self.secret)
    }

    /// The SHA-256 of the CA's certificate.
    pub fn ca_hash(&self) -> &[u8; 32] {
        &self.ca_hash
    }

    pub(crate) fn secret(&self) -> &[u8; 32] {
        &self.secret
    }
}

/// The hash under which a token's secret is stored (BLAKE3 in key derivation mode, over id and
/// secret). The secret has 256 random bits, so no slow hash is needed, and comparing hashes for
/// equality leaks nothing of use.
pub fn secret_hash(id: &str, secret: &[u8; 32]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("packhorse join token v1");
    hasher.update(secret);
    hasher.update(id.as_bytes());
    *hasher.finalize().as_bytes()
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}.{}.{}",
            self.id,
            URL_SAFE_NO_PAD.encode(self.secret),
            URL_SAFE_NO_PAD.encode(self.ca_hash)
        )
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl FromStr for JoinToken {
    type Err = Fault;
    fn from_str(text: &str) -> Result<Self, Fault> {
        // The text is never quoted back: it holds the secret.
        let wrong = |why: &str| {
            Fault::not_allowed(format!("the join token is not whole: {why}"))
                .with_next("copy the whole line that 'packhorse token create' printed at the hub")
        };
        let parts: Vec<&str> = text.trim().split('.').collect();
        let [id, secret, ca_hash] = parts[..] else {
            return Err(wrong(&format!(
                "it has {} parts where three are joined by '.'",
                parts.len()
            )));
        };
        if id.len() != ID_CHARS || !id.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(wrong(&format!(
                "its first part is not {ID_CHARS} letters and digits"
            )));
        }
        let decode = |part: &str, which: &str| -> Result<[u8; 32], Fault> {
            let bytes = URL_SAFE_NO_PAD
                .decode(part)
                .map_err(|_| wrong(&format!("its {which} part is not url-safe base64")))?;
            <[u8; 32]>::try_from(bytes).map_err(|b| {
                wrong(&format!(
                    "its {which} part holds {} bytes where it should hold 32",
                    b.len()
                ))
            })
        };
        Ok(Self {
            id: id.into(),
            secret: decode(secret, "second")?,
            ca_hash: decode(ca_hash, "third")?,
        })
    }
}

/// The hub's store of tokens, as the line sees it.
#[async_trait::async_trait]
pub trait Redeemer: Send + Sync {
    /// Uses up the token, in one transaction: it must exist with this hash, be unused, unexpired,
    /// and be bound to whom asks; a mismatch is refused without using the token up. Used by the key
    /// of this hash, it is good for that key still until its holder has connected: the answer may
    /// have been lost. Returns whom the token is bound to; refuses with `not_allowed` and the
    /// reason.
    async fn redeem(
        &self,
        id: &str,
        secret_hash: &[u8; 32],
        claim: &Claim,
        key_hash: &[u8; 32],
    ) -> Result<Holder, Fault>;
}

/// Who asks to join, as he says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    /// The site of this name, as its config says.
    Site(SiteName),
    /// A publisher, who goes by the name in his token.
    Publisher,
}

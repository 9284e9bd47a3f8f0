//! Join tokens: an operator copies a token from the hub to a new site.
//!
//! Printed as `<id>.<secret>.<ca_hash>`. The id (10 letters and digits) identifies the token at the
//! hub. The secret (32 random bytes) proves that the site received the token. The hash (SHA-256 of
//! the CA certificate) lets the site verify the hub before it sends the secret. The hub stores the
//! id and [`secret_hash`], never the secret.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::Rng as _;

use super::{HubIdentity, Serial};
use base::fault::Fault;
use base::names::SiteName;
use base::peer::Peer;

const ID_CHARS: usize = 10;

/// A join token. `Display` prints the secret, `Debug` does not.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    id: String,
    secret: [u8; 32],
    ca_hash: [u8; 32],
}

impl JoinToken {
    /// Creates a token for this hub. It becomes valid when the hub has stored its id and
    /// [`JoinToken::secret_hash`].
    pub fn generate(hub: &HubIdentity) -> Self {
        // The id contains no '-': a command line would parse a token that starts with '-' as an
        // option.
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

    /// Identifies the token at the hub.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The value that the hub stores instead of the secret.
    pub fn secret_hash(&self) -> [u8; 32] {
        secret_hash(&self.id, &self.secret)
    }

    /// The SHA-256 of the CA certificate.
    pub fn ca_hash(&self) -> &[u8; 32] {
        &self.ca_hash
    }

    pub(crate) fn secret(&self) -> &[u8; 32] {
        &self.secret
    }
}

/// The hash under which the secret of a token is stored (BLAKE3 in key derivation mode, over the id
/// and the secret). The secret has 256 random bits, so no slow hash is needed, and a comparison of
/// hashes reveals nothing useful.
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
        // Errors never contain the token, because it includes the secret.
        let invalid = |why: &str| {
            Fault::not_allowed(format!("the join token is incomplete: {why}")).with_next(
                "copy the complete line that 'packhorse token create' printed at the hub",
            )
        };
        let parts: Vec<&str> = text.trim().split('.').collect();
        let [id, secret, ca_hash] = parts[..] else {
            return Err(invalid(&format!(
                "it has {} parts separated by '.' instead of three",
                parts.len()
            )));
        };
        if id.len() != ID_CHARS || !id.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(invalid(&format!(
                "its first part is not {ID_CHARS} letters and digits"
            )));
        }
        let decode = |part: &str, which: &str| -> Result<[u8; 32], Fault> {
            let bytes = URL_SAFE_NO_PAD
                .decode(part)
                .map_err(|_| invalid(&format!("its {which} part is not url-safe base64")))?;
            <[u8; 32]>::try_from(bytes).map_err(|b| {
                invalid(&format!(
                    "its {which} part has {} bytes instead of 32",
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

/// The token store of the hub.
#[async_trait::async_trait]
pub trait Redeemer: Send + Sync {
    /// Uses the token in one transaction. The token must exist with this hash, must be unused and
    /// not expired, and must be for the holder that asks. A request that does not match does not
    /// use the token. The key that used a token may use it again until its holder has connected,
    /// because the answer may have been lost. Returns the holder of the token and the serial of its
    /// certificate, which is stored as the newest of the holder, or `not_allowed` with the reason.
    async fn redeem(
        &self,
        id: &str,
        secret_hash: &[u8; 32],
        claim: &Claim,
        key_hash: &[u8; 32],
    ) -> Result<(Peer, Serial), Fault>;
}

/// The unverified claim of a joining client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    /// The site with this name in its configuration.
    Site(SiteName),
    /// A publisher, whose name is in its token.
    Publisher,
}

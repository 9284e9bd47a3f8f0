//! How a daemon proves that it holds the admin token, before a client sends it.
//!
//! The client sends 32 random bytes. The daemon answers with a keyed hash of them and of the
//! address of the request. A program that listens on the daemon's port in its place cannot answer,
//! because the key is derived from the token. The answer reveals nothing about the token.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::tokens::TokenText;
use super::{ApiToken, RunToken};

/// The client's request.
#[derive(Debug, Clone, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ProofQuery {
    /// 32 random bytes, hex.
    pub challenge: String,
    /// The training run whose token the client holds, instead of the admin token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// The id of the access token that the client holds, instead of the admin token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

/// The daemon's answer.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub(crate) struct Proof {
    /// `HOST:PORT` at which this connection reached the daemon; empty on the local socket.
    pub address: String,
    /// BLAKE3 with a key from the token, over the challenge and the address; hex.
    pub proof: String,
}

impl Proof {
    /// The proof for this challenge. `None` if it is not 32 bytes in hex.
    pub(super) fn make(token: &ApiToken, query: &ProofQuery, address: String) -> Option<Self> {
        let challenge = challenge_of(&query.challenge)?;
        let proof = hash(token, &challenge, &address).to_hex().to_string();
        Some(Self { address, proof })
    }

    /// Whether a holder of this token created it for this challenge.
    pub(crate) fn is_by(&self, token: &ApiToken, query: &ProofQuery) -> bool {
        let (Some(challenge), Ok(proof)) = (
            challenge_of(&query.challenge),
            blake3::Hash::from_hex(&self.proof),
        ) else {
            return false;
        };
        // In constant time.
        hash(token, &challenge, &self.address) == proof
    }

    /// Whether the request reached the daemon at this address.
    pub(crate) fn is_of(&self, address: SocketAddr) -> bool {
        let canonical = |address: SocketAddr| (address.ip().to_canonical(), address.port());
        self.address
            .parse()
            .is_ok_and(|theirs| canonical(theirs) == canonical(address))
    }
}

impl ProofQuery {
    /// A new challenge for the daemon that this token is for.
    pub(crate) fn random(token: &ApiToken) -> Self {
        let secret = token.secret();
        let run = RunToken::parse(secret.as_bytes()).map(|token| token.run().to_string());
        let token = TokenText::parse(secret.as_bytes()).map(|token| token.id().to_owned());
        Self {
            challenge: hex::encode(rand::random::<[u8; 32]>()),
            run,
            token,
        }
    }
}

fn challenge_of(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes).ok()?;
    Some(bytes)
}

fn hash(token: &ApiToken, challenge: &[u8; 32], address: &str) -> blake3::Hash {
    // Of an access token the daemon has only a hash.
    let secret = match TokenText::parse(token.secret().as_bytes()) {
        Some(text) => text.hash().to_hex().as_str().into(),
        None => token.secret(),
    };
    let key = blake3::derive_key("packhorse API daemon proof v1", secret.as_bytes());
    let mut hasher = blake3::Hasher::new_keyed(&key);
    hasher.update(challenge);
    hasher.update(address.as_bytes());
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_holder_of_the_token_can_answer_a_challenge() {
        let token = |c: &str| ApiToken::parse(&c.repeat(64)).unwrap();
        let (own, other, query) = (token("a"), token("b"), ProofQuery::random(&token("a")));
        let proof = Proof::make(&own, &query, "127.0.0.1:7480".into()).unwrap();
        assert!(
            proof.is_by(&own, &query)
                && !proof.is_by(&other, &query)
                && !proof.is_by(&own, &ProofQuery::random(&own))
        );
        let elsewhere = Proof {
            address: "127.0.0.1:1".into(),
            ..proof
        };
        assert!(!elsewhere.is_by(&own, &query), "it is bound to the address");
        for challenge in ["", "zz", &"0".repeat(63), &"0".repeat(66)] {
            assert!(
                Proof::make(
                    &own,
                    &ProofQuery {
                        challenge: challenge.into(),
                        run: None,
                        token: None
                    },
                    String::new()
                )
                .is_none()
            );
            assert!(
                !Proof {
                    address: String::new(),
                    proof: challenge.into()
                }
                .is_by(&own, &query)
            );
        }
    }
}

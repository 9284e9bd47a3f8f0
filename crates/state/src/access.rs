//! Access tokens of the API: their rows. The secrets are not stored, only hashes of them.

use async_trait::async_trait;
use base::fault::Fault;
use model::grant::{GrantScope, Role};

/// Tokens that a daemon holds, the revoked ones included.
pub(crate) const ACCESS_TOKENS_MAX: i64 = 10_000;

/// An access token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessRow {
    /// Its id, which is a part of its text. A rotation changes it.
    pub id: String,
    /// Its name, which is unique.
    pub name: String,
    /// The hash of its secret.
    pub secret_hash: [u8; 32],
    /// Its role.
    pub role: Role,
    /// Its scope.
    pub scope: GrantScope,
    /// When it was created, in Unix milliseconds.
    pub created_ms: i64,
    /// Who created it, as logs name the actor.
    pub created_by: String,
    /// When its secret was replaced last.
    pub rotated_ms: Option<i64>,
    /// When it expires; `None`: never.
    pub expires_ms: Option<i64>,
    /// When it was used last; exact to a minute.
    pub used_ms: Option<i64>,
    /// When it was revoked.
    pub revoked_ms: Option<i64>,
}

/// The fault for a name that no token has.
pub(crate) fn no_access_token(name: &str) -> Fault {
    Fault::not_found(format!("there is no access token {name}"))
        .with_next("'packhorse access list' lists them")
}

/// Access tokens.
#[async_trait]
pub trait Access: Send + Sync {
    /// All tokens, by name. Fails if one cannot be read: a daemon that does not know a token that
    /// was revoked must not start.
    async fn access_tokens(&self) -> Result<Vec<AccessRow>, Fault>;

    /// Stores a new token. It replaces a revoked one of the same name; any other is a conflict.
    async fn add_access_token(&self, row: &AccessRow) -> Result<(), Fault>;

    /// Replaces the id and the secret of a token, and its expiry. Returns the row after that.
    async fn rotate_access_token(
        &self,
        name: &str,
        id: &str,
        secret_hash: &[u8; 32],
        expires_ms: Option<i64>,
    ) -> Result<AccessRow, Fault>;

    /// Revokes a token. Returns the row after that. Revoking it again changes nothing.
    async fn revoke_access_token(&self, name: &str) -> Result<AccessRow, Fault>;

    /// Stores when tokens were used: ids and Unix milliseconds.
    async fn access_tokens_used(&self, used: &[(String, i64)]) -> Result<(), Fault>;
}

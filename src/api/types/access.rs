//! Access tokens of the API.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use model::grant::Role;

/// An access token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AccessToken {
    /// Its name.
    pub name: String,
    /// Its id, which is a part of its text. A rotation changes it.
    pub id: String,
    /// Its role.
    pub role: Role,
    /// The artifacts that it is limited to: patterns such as `dataset/line3-*`; empty: any.
    #[serde(default)]
    pub artifacts: Vec<String>,
    /// The sites that it is limited to; absent: any.
    #[serde(default)]
    pub sites: Option<String>,
    /// `valid`, `expired` or `revoked`.
    pub state: String,
    /// When it was created.
    pub created_at: String,
    /// Who created it.
    pub created_by: String,
    /// When its secret was replaced last.
    pub rotated_at: Option<String>,
    /// When it expires; absent: never.
    pub expires_at: Option<String>,
    /// When it was used last. After a restart, exact to a minute.
    pub last_used: Option<String>,
    /// When it was revoked.
    pub revoked_at: Option<String>,
}

/// A request for an access token.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AccessTokenRequest {
    /// Its name, unique: `[a-z0-9][a-z0-9._-]*`.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// The artifacts that it is limited to: patterns such as `dataset/line3-*`; empty: any.
    #[serde(default)]
    pub artifacts: Vec<String>,
    /// The sites that it is limited to: a selection of sites; absent: any.
    #[serde(default)]
    pub sites: Option<String>,
    /// How long it is valid, seconds; absent: 90 days.
    #[serde(default)]
    pub ttl_seconds: Option<u64>,
    /// It never expires; only for the role `wall`.
    #[serde(default)]
    pub no_expiry: bool,
}

/// A token with its secret, which is shown this once.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct AccessTokenReply {
    /// The token.
    pub token: String,
    /// What it permits.
    pub access: AccessToken,
}

/// A request for a new secret.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AccessRotateRequest {
    /// The name of the token.
    pub name: String,
    /// How long the new secret is valid, seconds; absent: 90 days, or without expiry if the token
    /// has none.
    #[serde(default)]
    pub ttl_seconds: Option<u64>,
}

/// The selection of a token.
#[derive(Debug, Clone, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct AccessQuery {
    /// Its name.
    pub name: String,
}

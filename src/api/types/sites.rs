//! Sites, and the tokens with which they and publishers join.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use base::names::SiteName;

/// One site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Site {
    /// Its name.
    #[schema(value_type = String)]
    pub name: SiteName,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Whether it is connected now.
    pub online: bool,
    /// `quic` or `tcp`, while connected.
    pub line: Option<String>,
    /// Round trip, milliseconds, while connected.
    pub rtt_ms: Option<f64>,
    /// When it joined.
    pub joined_at: String,
    /// When it was last heard of.
    pub last_seen: Option<String>,
    /// The program version it runs.
    pub version: Option<String>,
    /// Transfers not yet ended.
    pub open_transfers: u64,
}

/// A join token, made for one site or one publisher.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// The site it is for.
    #[serde(default)]
    pub site: Option<String>,
    /// The publisher it is for: whoever publishes at the hub from another machine, and may do
    /// nothing else.
    #[serde(default)]
    pub publisher: Option<String>,
    /// The labels that the site will have.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// How long it is good, seconds.
    pub ttl_seconds: u64,
}

/// A join token, to be given to `packhorse join` at the site, or to `packhorse publish --hub`. It
/// works once.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TokenReply {
    /// The token.
    pub token: String,
}

//! Sites, and the join tokens of sites and publishers.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{MemberCertificate, MemberChange, MemberRevocation};
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
    /// Why the connection is over TCP although QUIC is allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line_reason: Option<String>,
    /// Round trip, milliseconds, while connected.
    pub rtt_ms: Option<f64>,
    /// When it joined.
    pub joined_at: String,
    /// When the hub last received anything from it; exact to 5 s.
    pub last_seen: Option<String>,
    /// The program version it runs.
    pub version: Option<String>,
    /// Transfers that have not ended.
    pub open_transfers: u64,
    /// Its newest certificate (at the hub); absent: an earlier version issued it, and recorded nothing.
    #[serde(default)]
    pub certificate: Option<MemberCertificate>,
    /// Its revocation, if it is revoked.
    #[serde(default)]
    pub revoked: Option<MemberRevocation>,
    /// The last change by a person.
    #[serde(default)]
    pub changed: Option<MemberChange>,
}

/// A request for a join token for one site or one publisher.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// The site it is for.
    #[serde(default)]
    pub site: Option<String>,
    /// The publisher: may publish at the hub from another machine, and nothing else.
    #[serde(default)]
    pub publisher: Option<String>,
    /// The labels that the site will have.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What the publisher may publish: patterns such as `dataset/line3-*`; empty: what it may publish
    /// already, and anything if it is new. `*/*` lifts a limit.
    #[serde(default)]
    pub artifacts: Vec<String>,
    /// Where the publisher may deliver what it publishes: a selection of sites, or `none`; absent: where
    /// it may deliver already, and to all sites if it is new.
    #[serde(default)]
    pub deliver_to: Option<String>,
    /// How long it is valid, seconds.
    pub ttl_seconds: u64,
}

/// A join token, for `packhorse join` at the site, or for `packhorse publish --hub`. It works once.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TokenReply {
    /// The token.
    pub token: String,
    /// What the publisher may do after it used the token; absent for a site.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<TokenLimits>,
    /// What may be a mistake in the request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// What a publisher may publish, and where it may deliver that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenLimits {
    /// Patterns of artifacts; absent: any artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifacts: Option<Vec<String>>,
    /// A selection of sites, or `none`; absent: all sites.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deliver_to: Option<String>,
}

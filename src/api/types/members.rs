//! Sites and publishers as members of a hub: their certificates, and what a person changed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// The newest certificate of a site or publisher.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MemberCertificate {
    /// Its serial number, in hex.
    pub serial: String,
    /// When it was issued.
    pub issued_at: String,
    /// When it ends. It is renewed after about half of its validity.
    pub expires_at: String,
    /// When it was first used; absent: not yet.
    pub used_at: Option<String>,
    /// Until when the certificate before it is accepted, unless the new one is used first; absent: it
    /// is not.
    pub previous_until: Option<String>,
}

/// A revocation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MemberRevocation {
    /// When.
    pub at: String,
    /// Who revoked it.
    pub by: String,
    /// Why, if that was said.
    pub why: Option<String>,
}

/// The last change by a person.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MemberChange {
    /// `set`, `revoked` or `restored`.
    pub what: String,
    /// When.
    pub at: String,
    /// Who.
    pub by: String,
}

/// One publisher: it may publish at the hub from another machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Publisher {
    /// Its name.
    pub name: String,
    /// When it joined.
    pub joined_at: String,
    /// When it last asked something.
    pub last_seen: Option<String>,
    /// What it may publish: patterns; absent: anything.
    pub artifacts: Option<Vec<String>>,
    /// Where it may deliver what it publishes; absent: to all sites.
    pub deliver_to: Option<String>,
    /// Its newest certificate; absent: an earlier version issued it, and recorded nothing.
    pub certificate: Option<MemberCertificate>,
    /// Its revocation, if it is revoked.
    pub revoked: Option<MemberRevocation>,
    /// The last change by a person.
    pub changed: Option<MemberChange>,
}

/// The selection of one site or publisher.
#[derive(Debug, Clone, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct MemberQuery {
    /// Its name.
    pub name: String,
}

/// A change of a site.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetSiteRequest {
    /// The site.
    pub name: String,
    /// Labels to set.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The keys of labels to remove.
    #[serde(default)]
    pub remove_labels: Vec<String>,
}

/// What is done with a site or publisher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum MemberAction {
    /// Close its connections and refuse new ones. Everything about it is kept.
    Revoke,
    /// Let it in again.
    Restore,
    /// Forget it. Its transfers and their receipts stay.
    Remove,
}

/// An action on a site or publisher.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemberActionRequest {
    /// Its name.
    pub name: String,
    /// The action.
    pub action: MemberAction,
    /// With `revoke`: why; the site is told.
    #[serde(default)]
    pub why: Option<String>,
    /// With `remove` of a site: also if something is lost with it. Its open transfers are cancelled.
    #[serde(default)]
    pub force: bool,
}

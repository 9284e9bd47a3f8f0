//! Deliveries: requests, costs and states.

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{Bytes, State, Transfer};
use base::fault::Reason;
use base::limits::{MESSAGE_BYTES_MAX, NEXT_BYTES_MAX};
use base::text;

/// A delivery: the whole, and each of its parts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Delivery {
    /// Its id: `[A-Za-z0-9._-]`.
    pub id: String,
    /// The state of the whole: that of the part that is furthest behind; `failed` when all ended
    /// and one failed.
    pub state: State,
    /// The reason, if a part is stalled.
    #[schema(value_type = Option<String>)]
    pub reason: Option<Reason>,
    /// A description of the reason.
    #[serde(default, deserialize_with = "text::optional::<_, MESSAGE_BYTES_MAX>")]
    pub message: Option<String>,
    /// The next step for the user.
    #[serde(default, deserialize_with = "text::optional::<_, NEXT_BYTES_MAX>")]
    pub next: Option<String>,
    /// Bytes of all parts together.
    pub bytes: Bytes,
    /// Parts that are done.
    pub done: u64,
    /// The artifacts, each once.
    pub artifacts: Vec<String>,
    /// The sites, each once.
    pub sites: Vec<String>,
    /// The training run that requested it, if any.
    pub run: Option<String>,
    /// The time of the request.
    pub created_at: String,
    /// The time of the end of its last part.
    pub finished_at: Option<String>,
    /// A note: at a site, that these are only the parts for this site, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// The number of parts, if `parts` does not list all: `/v1/transfers` with the delivery's id
    /// lists them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parts_total: Option<u64>,
    /// Its transfers, including those that existed at the time of the request.
    pub parts: Vec<Transfer>,
}

/// The selection of a delivery.
#[derive(Debug, Clone, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct DeliveryQuery {
    /// Its id.
    pub id: String,
    /// Wait up to this many seconds for its end.
    pub wait: Option<u64>,
}

/// A request to deliver.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DeliverRequest {
    /// `kind/name:version`, one or more.
    pub artifacts: Vec<String>,
    /// Names, `all`, or a selector.
    pub to: String,
}

/// The result of a deliver request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Delivered {
    /// The requested references.
    pub artifact: String,
    /// The digest (of the first artifact).
    pub digest: String,
    /// The delivery's id.
    pub delivery: String,
    /// Ids of its transfers.
    pub transfers: Vec<String>,
    /// Selected sites that receive nothing (only reported at the hub).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
    /// Findings at sites that already held it: what is delivered again and why, and versions that
    /// are held but not active.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// A site that is excluded from an artifact by `[share] allow`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeftOut {
    /// `kind/name:version`.
    pub artifact: String,
    /// The site.
    pub site: String,
    /// The owner of the list: `hub`, or `origin` for the site that published the artifact.
    pub by: String,
    /// A description of the reason.
    pub why: String,
}

/// The cost of a delivery, for one artifact and site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlanRow {
    /// `kind/name:version`.
    pub artifact: String,
    /// The site.
    pub site: String,
    /// Whether the site answered; otherwise the numbers assume that it has nothing.
    pub asked: bool,
    /// Bytes of the artifact.
    pub total: u64,
    /// Bytes that would be transferred.
    pub missing: u64,
    /// Bytes that would be written at the site: transferred bytes, and local content that cannot be
    /// shared.
    #[serde(default)]
    pub needs: u64,
    /// Free room at the site, bytes: of the filesystem that lacks most, if it writes to two.
    pub free: Option<u64>,
    /// Files and directories that would be created at the site.
    #[serde(default)]
    pub inodes: Option<u64>,
    /// How many of them the filesystem has room for.
    #[serde(default)]
    pub free_inodes: Option<u64>,
    /// Estimated seconds at the connection's current or last rate.
    pub seconds: Option<u64>,
    /// In the first row of an artifact: selected sites that would receive nothing of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
}

//! Deliveries: what is asked for as one, what that would cost, and how it stands.

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
    /// Where the whole is: what the parts that are furthest behind do, `failed` once all ended and
    /// one failed.
    pub state: State,
    /// Why it stands, if a part does.
    #[schema(value_type = Option<String>)]
    pub reason: Option<Reason>,
    /// The same in words.
    #[serde(default, deserialize_with = "text::optional::<_, MESSAGE_BYTES_MAX>")]
    pub message: Option<String>,
    /// What to do next about it.
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
    /// The training run that asked for it, if one did.
    pub run: Option<String>,
    /// When it was asked for.
    pub created_at: String,
    /// When its last part ended.
    pub finished_at: Option<String>,
    /// What there is to know beside that: at a site, that these are only the parts that go there,
    /// and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// How many parts there are, where not all have room in `parts`: `/v1/transfers` with the
    /// delivery's id lists them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parts_total: Option<u64>,
    /// Its transfers, those that stood already when it was asked for with them.
    pub parts: Vec<Transfer>,
}

/// Which delivery.
#[derive(Debug, Clone, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct DeliveryQuery {
    /// Its id.
    pub id: String,
    /// Wait up to this many seconds for its end.
    pub wait: Option<u64>,
}

/// Ask to deliver.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DeliverRequest {
    /// `kind/name:version`, one or more.
    pub artifacts: Vec<String>,
    /// Names, `all`, or a selector.
    pub to: String,
}

/// Delivered, or on the way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Delivered {
    /// The references, as asked.
    pub artifact: String,
    /// The digest (of the first, where several were asked).
    pub digest: String,
    /// The delivery's id.
    pub delivery: String,
    /// Ids of its transfers.
    pub transfers: Vec<String>,
    /// The sites that the selection means too and that get nothing (told at the hub only).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
    /// What was found at sites that had it already: what is delivered again and why, and what is
    /// held but not active.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// A site that does not get an artifact, because `[share] allow` leaves it out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeftOut {
    /// `kind/name:version`.
    pub artifact: String,
    /// The site.
    pub site: String,
    /// Whose list it is: `hub`, or `origin` for the site where the artifact was published.
    pub by: String,
    /// The same in words.
    pub why: String,
}

/// What a delivery would cost, for one artifact and site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlanRow {
    /// `kind/name:version`.
    pub artifact: String,
    /// The site.
    pub site: String,
    /// Whether the site answered; if not the numbers assume that it has nothing.
    pub asked: bool,
    /// Bytes of the artifact.
    pub total: u64,
    /// Bytes that would cross the line.
    pub missing: u64,
    /// Bytes that would be written at the site: what crosses the line, and what lies there and
    /// cannot be shared.
    #[serde(default)]
    pub needs: u64,
    /// Room at the site, bytes.
    pub free: Option<u64>,
    /// Seconds at the line's present or last rate.
    pub seconds: Option<u64>,
    /// In the first row of an artifact: the sites that the selection means too and that would get
    /// nothing of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<LeftOut>,
}

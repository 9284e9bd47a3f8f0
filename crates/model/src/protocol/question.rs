//! Questions: what a site or a publisher asks the hub, what the hub asks a site, and the answers.
//!
//! Each is one JSON object with one member, the name of the question, or its name alone where it
//! has no content. A question has [`base::limits::QUESTION_BYTES_MAX`] bytes at most. An answer is
//! `{"Ok":…}` or `{"Err":fault}`; it has at most [`base::limits::CONTROL_FRAME_BYTES_MAX`] bytes.

use base::fault::Fault;
use base::limits::{PRESENCE_TEXT_BYTES_MAX, RENEWAL_BYTES_MAX};
use base::names::{ArtifactRef, DeliveryId, RunName, SiteSelector, WorkId, WorkIds};
use base::number;
use base::omitted::Omitted;
use base::text::{Exact, Text};
use content::manifest::Digest;
use serde::{Deserialize, Serialize};

use crate::run::{RunAct, RunOrder};
use crate::transfer::Action;

/// A site asks the hub.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AskHub {
    /// Act on one of the site's transfers.
    Act {
        /// The transfer, or the delivery.
        id: WorkId,
        /// The action.
        action: Action,
    },
    /// Deliver artifacts to sites.
    Deliver {
        /// References.
        artifacts: Vec<ArtifactRef>,
        /// Names, `all`, or a selector.
        to: SiteSelector,
    },
    /// A new certificate for the key of this request.
    Renew {
        /// The signing request, DER in hex.
        request: Exact<RENEWAL_BYTES_MAX>,
    },
    /// Begin a training run for this site.
    StartRun(RunOrder),
    /// Finish or cancel a run that this site takes part in.
    ActOnRun(RunAct),
    /// One run that this site takes part in.
    ShowRun(RunName),
    /// The runs that this site takes part in.
    ListRuns {
        /// At most this many.
        limit: u32,
        /// After so many of them: an answer holds as many as fit.
        #[serde(default)]
        from: u32,
    },
    /// An artifact was published at the site; the answer is a `Published` of the API. The hub
    /// fetches the manifest over the same connection before it answers.
    Publish {
        /// Its name.
        artifact: ArtifactRef,
        /// Its digest.
        digest: Digest,
        /// Sites to deliver to at once.
        #[serde(default)]
        to: Option<SiteSelector>,
        /// The training run that made it.
        #[serde(default)]
        run: Option<RunName>,
        /// What its publish left out.
        #[serde(default)]
        omitted: Omitted,
    },
    /// A publisher has an artifact, which the hub fetches over the same connection into its own
    /// store before it answers with a `Published` of the API.
    Upload {
        /// Its name.
        artifact: ArtifactRef,
        /// Its digest.
        digest: Digest,
        /// Sites to deliver to at once.
        #[serde(default)]
        to: Option<SiteSelector>,
        /// What its publish left out.
        #[serde(default)]
        omitted: Omitted,
    },
    /// A whole delivery, if each of its parts is the site's own or of an artifact that it holds;
    /// the answer is a `Delivery` of the API.
    Delivery(DeliveryId),
    /// The state of transfers, each the site's own or of an artifact that it holds; the answer is a
    /// list and a cursor.
    Transfers {
        /// Ids of transfers or deliveries, separated by commas.
        id: WorkIds,
        /// Only what changed after this cursor.
        since: Option<u64>,
        /// Wait so many seconds for that.
        wait: u64,
    },
    /// The rate above which the path drops what the hub sends to the site over QUIC, in bytes per
    /// second, or `null`.
    LimitedRate,
}

/// A certificate request, DER, in the form of [`AskHub::Renew`].
pub fn renewal(csr_der: &[u8]) -> Result<Exact<RENEWAL_BYTES_MAX>, Fault> {
    Exact::new(hex::encode(csr_der))
        .ok_or_else(|| Fault::internal("the certificate request is too long"))
}

/// The hub asks a site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AskSite {
    /// What a delivery of this artifact would transfer; the answer is [`Planned`].
    Plan {
        /// The artifact.
        artifact: ArtifactRef,
        /// Its digest.
        digest: Digest,
    },
    /// Whether the site still has this artifact, by a check that reads no content; the answer is a
    /// `bool`.
    Holds {
        /// The artifact.
        artifact: ArtifactRef,
        /// Its digest.
        digest: Digest,
    },
    /// The condition of this artifact at the site, by a check that reads no content; the answer is
    /// [`Presence`].
    #[serde(rename = "stands")]
    CheckPresence {
        /// The artifact.
        artifact: ArtifactRef,
        /// Its digest.
        digest: Digest,
    },
}

/// A site's answer to [`AskSite::CheckPresence`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Presence {
    /// The condition.
    pub state: PresenceState,
    /// The first fault that was found, in words.
    pub detail: Option<Text<PRESENCE_TEXT_BYTES_MAX>>,
    /// The active version of its series, where the sink has one and it is known.
    pub active: Option<Text<PRESENCE_TEXT_BYTES_MAX>>,
}

/// The condition of an artifact at a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PresenceState {
    /// It exists, and nothing shows that it was changed.
    #[serde(rename = "sound")]
    Intact,
    /// Part of it is missing or was changed.
    Damaged,
    /// It does not exist.
    Missing,
    /// The site cannot check now.
    Unavailable,
}

/// A site's answer to [`AskSite::Plan`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Planned {
    /// Bytes that would be transferred.
    #[serde(deserialize_with = "number::count")]
    pub missing: u64,
    /// Bytes that would be written.
    #[serde(deserialize_with = "number::count")]
    pub needs: u64,
    /// Free bytes at the site, on the filesystem that lacks most of them.
    #[serde(deserialize_with = "number::optional_count")]
    pub free: Option<u64>,
    /// Files and directories that would be created; `None` from a site of an earlier version.
    #[serde(default, deserialize_with = "number::optional_count")]
    pub inodes: Option<u64>,
    /// How many can be created.
    #[serde(default, deserialize_with = "number::optional_count")]
    pub free_inodes: Option<u64>,
    /// Bytes a second, as last measured on the connection; 0 when it is not known.
    #[serde(deserialize_with = "number::count")]
    pub rate: u64,
}

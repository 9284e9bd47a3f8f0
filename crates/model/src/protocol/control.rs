//! Messages of the control stream: what a site reports, and what the hub wants of it.
//!
//! Each is one JSON object with one member, the name of the message: `{"hello":{…}}`,
//! `{"reports":{…}}`, `{"changes":{…}}`. A message has [`base::limits::CONTROL_FRAME_BYTES_MAX`]
//! bytes at most. Nothing depends on one of them: a site without the hub's revision asks for the
//! complete list, and a report is repeated until the hub has stored it.
//!
//! A site whose hello has `changes` receives [`FromHub::Changes`] and [`FromHub::Stored`], and from
//! then on sends [`FromSite::Reports`]. Every other site receives [`FromHub::Desired`], the complete
//! list at each change; to such a hub a site sends [`FromSite::Report`].

use base::congestion::Congestion;
use base::fault::Reason;
use base::limits::{ALLOW_ENTRIES_MAX, CONTROL_FRAME_BYTES_MAX, DELIVERY_ARTIFACTS_MAX};
use base::list;
use base::names::{ArtifactRef, DeliveryId, SiteSelector, TransferId};
use base::number;
use base::text::{Exact, Lenient, Message, Version};
use content::manifest::Digest;
use serde::{Deserialize, Serialize};

use super::changes::{Changes, ReportBatch};
use crate::run::{DesiredRun, Lineage, RunReport};
use crate::transfer::{Body, State, Want};

/// From a site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromSite {
    /// The first message of a connection.
    Hello {
        /// The version of the site's program.
        version: Version,
        /// The sites with which this site shares what is published at it: names or selectors;
        /// `None`: all sites.
        #[serde(default)]
        share: Option<AllowList>,
        /// The sites that this site trains for: names, or `all`. `None`: an older site, which
        /// decides by itself.
        #[serde(default)]
        train: Option<AllowList>,
        /// The congestion control that the site's connection is set to; the hub sends with it too.
        #[serde(default)]
        congestion: Congestion,
        /// Whether the site understands [`FromHub::Changes`].
        #[serde(default)]
        changes: bool,
        /// The newest format of manifests that the site reads.
        #[serde(default = "first_format")]
        manifest_format: u32,
        /// Why the connection is over TCP although QUIC is allowed.
        #[serde(default)]
        reason: Option<Message>,
    },
    /// The state of transfers, to a hub that sends complete lists; any number of times for each.
    Report(Vec<Report>),
    /// The state of transfers, to a hub that sends changes.
    Reports(ReportBatch),
    /// The site does not have the revision that the hub's last message continues: the hub sends the
    /// complete list.
    List,
    /// The state of training runs at this site; any number of times for each.
    Runs(Vec<RunReport>),
    /// Every artifact that was published here in place and whose files have changed, and how; sent
    /// whole on connecting and whenever it differs.
    Changed(Vec<(ArtifactRef, Message)>),
}

/// The format of manifests that a site of an earlier version reads.
fn first_format() -> u32 {
    1
}

/// An `allow` list of a site: the sites that it shares with, or that it trains for. An entry that
/// is not a selection of sites is left out, and allows no site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Lenient<SiteSelector>>")]
pub struct AllowList(Vec<SiteSelector>);

impl AllowList {
    /// The list in a configuration.
    pub fn of(allow: &[String]) -> Self {
        Self(allow.iter().filter_map(|text| text.parse().ok()).collect())
    }

    /// Each entry as text.
    pub fn texts(&self) -> Vec<String> {
        self.0.iter().map(ToString::to_string).collect()
    }
}

impl From<Vec<Lenient<SiteSelector>>> for AllowList {
    fn from(list: Vec<Lenient<SiteSelector>>) -> Self {
        Self(
            list.into_iter()
                .filter_map(|entry| entry.0)
                .take(ALLOW_ENTRIES_MAX)
                .collect(),
        )
    }
}

/// The state of a transfer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The transfer.
    pub id: TransferId,
    /// The attempt that it is about.
    #[serde(deserialize_with = "number::generation")]
    pub generation: i64,
    /// The state.
    pub state: State,
    /// Everything else.
    #[serde(default)]
    pub body: Body,
}

/// From the hub.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromHub {
    /// What changed of the desired state of the site, or a part of the complete list.
    Changes(Changes),
    /// An answer to [`FromSite::Reports`].
    Stored {
        /// The batches up to this number were processed.
        number: u64,
        /// The transfers whose reports in these batches could not be stored. The site sends them
        /// again.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        unstored: Vec<TransferId>,
    },
    /// The desired state of a site of an earlier version; sent whole whenever it changes.
    Desired {
        /// Increases with every change.
        revision: u64,
        /// The transfers that have not ended.
        transfers: Vec<Desired>,
        /// The training runs that this site trains, or has to clean up after.
        #[serde(default)]
        runs: Vec<DesiredRun>,
        /// Manifests of new artifacts, if they are small, so that the site need not request them:
        /// this saves a round trip.
        #[serde(default)]
        manifests: Vec<PushedManifest>,
    },
}

/// A manifest that the hub sends without a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PushedManifest {
    /// The artifact.
    pub digest: Digest,
    /// The frames of the root manifest and of the pages that it lists, one after the other, in
    /// base64.
    pub frames: Exact<CONTROL_FRAME_BYTES_MAX>,
}

/// A transfer that the hub wants.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Desired {
    /// Its id.
    pub id: TransferId,
    /// Its delivery.
    pub delivery: DeliveryId,
    /// The artifact.
    pub artifact: ArtifactRef,
    /// Its digest.
    pub digest: Digest,
    /// Run, pause or cancel.
    pub want: Want,
    /// Increased by every retry.
    #[serde(deserialize_with = "number::generation")]
    pub generation: i64,
    /// Bytes of the artifact.
    #[serde(deserialize_with = "number::count")]
    pub total: u64,
    /// When it was requested.
    pub created_ms: i64,
    /// The transfers to this site that go first: labels come after their dataset.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "list::at_most::<_, _, DELIVERY_ARTIFACTS_MAX>"
    )]
    pub after: Vec<TransferId>,
    /// What the artifact was made of, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage: Option<Lineage>,
    /// What the hub has stored of the transfer.
    #[serde(default, skip_serializing_if = "Known::is_default")]
    pub known: Known,
}

/// What the hub has stored of a transfer. A site does not report a waiting transfer of which the hub
/// knows this already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Known {
    /// The state.
    pub state: State,
    /// The reason.
    pub reason: Option<Reason>,
}

impl Default for Known {
    fn default() -> Self {
        Self {
            state: State::Queued,
            reason: None,
        }
    }
}

impl Known {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

//! What the hub knows about artifacts whose content is at sites: which sites have it, with which
//! sites it is shared, and what the relay cache stores.

use std::collections::BTreeMap;

use async_trait::async_trait;
use base::fault::Fault;
use base::names::{ArtifactRef, SiteName, SiteSelector};
use content::manifest::Digest;

use crate::Catalogue;

/// A relayed artifact of which the relay cache may store content. Its root manifest is read only
/// when it is needed, because all of them together can be large.
#[derive(Debug, Clone)]
pub struct RelayedArtifact {
    /// Its name.
    pub artifact: ArtifactRef,
    /// Its digest.
    pub digest: Digest,
    /// Whether it is pinned: kept at any age.
    pub pinned: bool,
    /// Whether a transfer of it is open.
    pub open: bool,
    /// When it was last requested.
    pub used_ms: i64,
}

/// The stored facts that decide whether a site may receive an artifact of another site.
#[derive(Debug, Clone, Default)]
pub struct ShareTerms {
    /// The sites that the origin shares with (a JSON list); `None`: all sites.
    pub share: Option<String>,
    /// The labels of the site (a JSON object).
    pub labels: Option<String>,
}

/// Relayed artifacts, and the sharing lists of sites.
#[async_trait]
pub trait Relay: Send + Sync {
    /// Records the sites that a site shares with; `None`: all sites.
    async fn set_share(&self, site: &SiteName, share: Option<&[String]>) -> Result<(), Fault>;

    /// The facts that decide whether `site` may receive what was published at `origin`.
    async fn share_terms(&self, origin: &SiteName, site: &SiteName) -> Result<ShareTerms, Fault>;

    /// The origins of the artifacts with this content that a site has or waits for; `None`: the
    /// hub.
    async fn origins_for(
        &self,
        site: &SiteName,
        digest: Digest,
    ) -> Result<Vec<Option<SiteName>>, Fault>;

    /// The sites that have this content, and whether it was published there. Sites that published
    /// it come first, then sites that received it.
    async fn sources(&self, digest: Digest) -> Result<Vec<(SiteName, bool)>, Fault>;

    /// The artifacts of sites that are being transferred: each digest with a site that waits for
    /// it.
    async fn relayed_open(&self) -> Result<Vec<(Digest, SiteName)>, Fault>;

    /// Records that relayed content with this digest was requested.
    async fn relay_used(&self, digest: Digest) -> Result<(), Fault>;

    /// Relayed artifacts of which the cache may store content; the longest unused first.
    async fn relay_kept(&self) -> Result<Vec<RelayedArtifact>, Fault>;

    /// Records that the cache stores nothing for this name any more. The same content may stay
    /// under another name that is pinned or has an open transfer.
    async fn relay_evicted(&self, artifact: &ArtifactRef) -> Result<(), Fault>;

    /// Records whether an artifact's relayed content is pinned.
    async fn set_pinned(&self, artifact: &ArtifactRef, pinned: bool) -> Result<(), Fault>;

    /// Records that the hub now stores the content of this artifact itself.
    async fn take_over(&self, artifact: &ArtifactRef) -> Result<(), Fault>;
}

/// The parsed facts that decide whether a site may receive an artifact of another site.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SharingRow {
    /// The `[share] allow` of the publishing site, as it reported it; `None`: every site. An entry
    /// that cannot be parsed allows no site.
    pub share: Option<Vec<SiteSelector>>,
    /// The labels of the receiving site.
    pub labels: BTreeMap<String, String>,
}

impl Catalogue {
    /// The facts that decide whether `site` may receive what `origin` published.
    pub async fn sharing(&self, origin: &SiteName, site: &SiteName) -> Result<SharingRow, Fault> {
        let ShareTerms { share, labels } = self.share_terms(origin, site).await?;
        let labels = labels
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or_default();
        let share = share.map(|share| {
            let list: Vec<String> = serde_json::from_str(&share).unwrap_or_default();
            list.iter().filter_map(|text| text.parse().ok()).collect()
        });
        Ok(SharingRow { share, labels })
    }
}

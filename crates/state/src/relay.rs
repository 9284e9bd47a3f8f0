//! What the hub knows of artifacts whose bytes are at sites: who has them, whom they are shared
//! with, what the relay cache keeps.

use std::collections::BTreeMap;

use async_trait::async_trait;
use base::fault::Fault;
use base::names::{ArtifactRef, SiteName, SiteSelector};
use content::manifest::Digest;

use crate::Catalogue;

/// A relayed artifact of which the relay cache may hold something. Its root manifest is read when
/// it is needed: all of them together may be large.
#[derive(Debug, Clone)]
pub struct RelayedArtifact {
    /// Its name.
    pub artifact: ArtifactRef,
    /// Its digest.
    pub digest: Digest,
    /// Whether it stays whatever its age.
    pub pinned: bool,
    /// Whether a transfer of it is open.
    pub open: bool,
    /// When it was last asked for.
    pub used_ms: i64,
}

/// What decides whether a site may have what another published.
#[derive(Debug, Clone, Default)]
pub struct ShareTerms {
    /// Whom the origin shares with (a JSON list); `None`: everybody.
    pub share: Option<String>,
    /// The labels of the site (a JSON object).
    pub labels: Option<String>,
}

/// Relayed artifacts, and whom sites share with.
#[async_trait]
pub trait Relay: Send + Sync {
    /// Records whom a site shares with; `None`: everybody.
    async fn set_share(&self, site: &SiteName, share: Option<&[String]>) -> Result<(), Fault>;

    /// What decides whether `site` may have what is published at `origin`.
    async fn share_terms(&self, origin: &SiteName, site: &SiteName) -> Result<ShareTerms, Fault>;

    /// Where the artifacts are from that a site has, or waits for, with this content; `None`: the
    /// hub's own.
    async fn origins_for(
        &self,
        site: &SiteName,
        digest: Digest,
    ) -> Result<Vec<Option<SiteName>>, Fault>;

    /// The sites that have this content, and whether it was published there: those first, then
    /// those where it has arrived.
    async fn sources(&self, digest: Digest) -> Result<Vec<(SiteName, bool)>, Fault>;

    /// Which artifacts of sites are on their way to which sites: each digest with a site that waits
    /// for it.
    async fn relayed_open(&self) -> Result<Vec<(Digest, SiteName)>, Fault>;

    /// Records that relayed bytes of this content were asked for.
    async fn relay_used(&self, digest: Digest) -> Result<(), Fault>;

    /// Relayed artifacts of which the cache may hold something, the longest unused first.
    async fn relay_kept(&self) -> Result<Vec<RelayedArtifact>, Fault>;

    /// Records that the cache holds nothing under this name any more. The same content may stay
    /// under another name, pinned or open.
    async fn relay_evicted(&self, artifact: &ArtifactRef) -> Result<(), Fault>;

    /// Records whether an artifact's relayed bytes stay whatever their age.
    async fn set_pinned(&self, artifact: &ArtifactRef, pinned: bool) -> Result<(), Fault>;

    /// Records that the hub holds the bytes of this artifact itself now.
    async fn take_over(&self, artifact: &ArtifactRef) -> Result<(), Fault>;
}

/// What decides whether a site may receive what another published.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SharingRow {
    /// `[share] allow` of the site that published, as it reported; `None`: every site. An entry
    /// that cannot be parsed allows no site.
    pub share: Option<Vec<SiteSelector>>,
    /// The labels of the site that would receive.
    pub labels: BTreeMap<String, String>,
}

impl Catalogue {
    /// What decides whether `site` may receive what `origin` published.
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

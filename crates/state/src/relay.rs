//! What the hub knows of artifacts whose bytes are at sites: who has them, whom they are shared
//! with, what the relay cache keeps.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use base::fault::Fault;
use base::names::{ArtifactRef, SiteName, SiteSelector};
use content::manifest::Digest;

use crate::Catalogue;

/// Who forbids that a site has what another published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forbids {
    /// The hub's policy.
    Hub,
    /// The site where it was published.
    Origin,
}

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

impl Catalogue {
    /// Sets the hub's policy of who may have what sites publish, which a site can only narrow;
    /// `None`: everybody. Clones that were made before do not know it.
    #[must_use]
    pub fn with_share_policy(self, policy: Option<Vec<SiteSelector>>) -> Self {
        Self {
            share_policy: policy.map(Arc::from),
            ..self
        }
    }

    /// Whether `site` may have what is published at `origin`, by the hub's policy and by the list
    /// of `origin`.
    pub async fn shares_with(&self, origin: &SiteName, site: &SiteName) -> Result<bool, Fault> {
        Ok(self.forbidden_by(origin, site).await?.is_none())
    }

    /// Who forbids that `site` has what is published at `origin`; if both do, the hub. A site may
    /// always have what is its own.
    pub async fn forbidden_by(
        &self,
        origin: &SiteName,
        site: &SiteName,
    ) -> Result<Option<Forbids>, Fault> {
        if origin == site {
            return Ok(None);
        }
        let ShareTerms { share, labels } = self.share_terms(origin, site).await?;
        let labels: BTreeMap<String, String> = labels
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or_default();
        let allowed_by =
            |list: &[SiteSelector]| list.iter().any(|selector| selector.includes(site, &labels));
        if self
            .share_policy
            .as_deref()
            .is_some_and(|policy| !allowed_by(policy))
        {
            return Ok(Some(Forbids::Hub));
        }
        let Some(share) = share else { return Ok(None) };
        // A list that cannot be read allows nobody.
        let list: Vec<String> = serde_json::from_str(&share).unwrap_or_default();
        let list: Vec<SiteSelector> = list.iter().filter_map(|text| text.parse().ok()).collect();
        Ok(if allowed_by(&list) {
            None
        } else {
            Some(Forbids::Origin)
        })
    }

    /// Whether the hub's policy and the origins of this content let a site that has a transfer of
    /// it have it: under one of its names at least.
    pub async fn is_shared(&self, site: &SiteName, digest: Digest) -> Result<bool, Fault> {
        for origin in self.origins_for(site, digest).await? {
            match origin {
                None => return Ok(true),
                Some(origin) if self.shares_with(&origin, site).await? => return Ok(true),
                Some(_) => {}
            }
        }
        Ok(false)
    }
}

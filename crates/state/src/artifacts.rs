//! Artifacts: the rows of the artifacts that this daemon knows.

use async_trait::async_trait;
use base::fault::Fault;
use base::names::{ArtifactRef, PublisherName, RunName, SiteName, SiteSelector};
use base::omitted::Omitted;
use base::peer::Peer;
use content::manifest::{Digest, Root};
use serde::{Deserialize, Serialize};
use sink::StorageLocation;

use crate::engine::See;

/// One artifact.
#[derive(Debug, Clone)]
pub struct ArtifactRow {
    /// Its name.
    pub artifact: ArtifactRef,
    /// The BLAKE3 of its root manifest.
    pub digest: Digest,
    /// The root manifest.
    pub root: Root,
    /// The site that published it and stores its content; `None`: this daemon.
    pub origin: Option<SiteName>,
    /// Its location for users on this daemon's sinks.
    pub location: Option<String>,
    /// Where the daemon reads its files, if it holds them.
    pub place: Option<StorageLocation>,
    /// When it was recorded.
    pub created_ms: i64,
    /// Whether it was published in place at this site.
    pub published: bool,
    /// When the publish began to read its source; 0 if it was not published here.
    pub published_ms: i64,
    /// How its files changed after it was published in place, here or at its site; `None`: no
    /// change is known.
    pub changed: Option<String>,
    /// The offer that the hub has not confirmed yet (at a site).
    pub offer: Option<Offer>,
    /// Whether its relayed content is pinned: kept at any age (at the hub).
    pub pinned: bool,
    /// When its relayed content was last requested (at the hub).
    pub used_ms: i64,
    /// What its publish left out.
    pub omitted: Omitted,
}

/// The offer of an artifact that was published at a site. The site sends it to the hub until the
/// hub has confirmed it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Offer {
    /// The sites to which the hub delivers it immediately.
    pub to: Option<SiteSelector>,
    /// The training run that made it.
    pub run: Option<RunName>,
    /// Whether the hub has never received this artifact name.
    pub new: bool,
}

/// The fault for an artifact that does not exist. An artifact that the caller may not see gets the
/// same fault.
pub fn no_artifact(artifact: &ArtifactRef) -> Fault {
    Fault::not_found(format!("there is no artifact {artifact}"))
        .with_next("'packhorse artifacts' lists what there is")
}

/// The fault for different content under an existing name.
pub(crate) fn other_content(artifact: &ArtifactRef, there: &[u8], new: Digest) -> Fault {
    Fault::conflict(format!(
        "{artifact} is published already with other content: {} there, {new} now",
        hex::encode(there)
    ))
    .with_next("an artifact never changes: publish this under a new version")
}

/// Artifacts.
#[async_trait]
pub trait Artifacts: Send + Sync {
    /// Records a published or arriving artifact. Returns `false` if the name exists with the same
    /// content; different content is a conflict.
    async fn add_artifact(
        &self,
        artifact: &ArtifactRef,
        root: &Root,
        origin: Option<&SiteName>,
    ) -> Result<bool, Fault>;

    /// Records which publisher published an artifact.
    async fn set_publisher(
        &self,
        artifact: &ArtifactRef,
        publisher: &PublisherName,
    ) -> Result<(), Fault>;

    /// The publisher that uploaded an artifact, if one did.
    async fn publisher_of(&self, artifact: &ArtifactRef) -> Result<Option<PublisherName>, Fault>;

    /// How many artifacts a site or a publisher published, and the sum of their bytes.
    async fn published_by(&self, peer: &Peer) -> Result<(u64, u64), Fault>;

    /// Records where an artifact is on this daemon, or that it no longer is.
    async fn set_place(
        &self,
        artifact: &ArtifactRef,
        place: Option<&StorageLocation>,
        location: Option<&str>,
    ) -> Result<(), Fault>;

    /// Records that an artifact was published here: its storage location, when its source began to
    /// be read, and the offer for the hub. The location of content that was received before stays.
    async fn set_published(
        &self,
        artifact: &ArtifactRef,
        place: &StorageLocation,
        location: &str,
        since_ms: i64,
        offer: &Offer,
    ) -> Result<(), Fault>;

    /// Records what the last publish of an artifact left out: the same content may come from
    /// another source.
    async fn set_omitted(&self, artifact: &ArtifactRef, omitted: &Omitted) -> Result<(), Fault>;

    /// Records that the hub has confirmed the offer of an artifact.
    async fn offered(&self, artifact: &ArtifactRef) -> Result<(), Fault>;

    /// The offers that the hub has not confirmed, oldest first, each with the name of its artifact.
    async fn offers(&self) -> Result<Vec<(ArtifactRef, Offer)>, Fault>;

    /// All artifacts with this digest; those that this daemon stores come first.
    async fn all_by_digest(&self, digest: Digest) -> Result<Vec<ArtifactRow>, Fault>;

    /// One artifact by name.
    async fn artifact(&self, artifact: &ArtifactRef) -> Result<ArtifactRow, Fault>;

    /// The newest other version of this artifact that this daemon stores.
    async fn previous_version(&self, of: &ArtifactRef) -> Result<Option<ArtifactRow>, Fault>;

    /// Whether a site has, or published, any version of this artifact.
    async fn has_previous_version_at(
        &self,
        site: &SiteName,
        of: &ArtifactRef,
    ) -> Result<bool, Fault>;

    /// The digests of all artifacts. Fails if one cannot be read, because callers remove the
    /// content of artifacts that are not in the list.
    async fn digests(&self) -> Result<Vec<Digest>, Fault>;

    /// Whether there is any artifact.
    async fn any_artifact(&self) -> Result<bool, Fault>;

    /// The names of all artifacts, in order. Fails if one cannot be read.
    async fn artifact_names(&self) -> Result<Vec<ArtifactRef>, Fault>;

    /// The same, after every open transaction was committed or rolled back, so that the list
    /// includes artifacts that were being added.
    async fn artifact_names_settled(&self) -> Result<Vec<ArtifactRef>, Fault>;

    /// The names and digests of all artifacts, in order. Fails if one cannot be read.
    async fn artifacts_by_digest(&self) -> Result<Vec<(ArtifactRef, Digest)>, Fault>;

    /// Passes `rows` artifacts to `see`, by name, beginning after this one.
    async fn each_artifact(
        &self,
        behind: Option<&str>,
        rows: i64,
        see: See<'_, ArtifactRow>,
    ) -> Result<(), Fault>;

    /// Records that received content is being removed. Returns `false` if the artifact is published
    /// here or is being published: then it stays.
    async fn leave(&self, artifact: &ArtifactRef) -> Result<bool, Fault>;

    /// Removes the row of removed content, unless the artifact was published or received again
    /// after [`Artifacts::leave`].
    async fn remove_left(&self, artifact: &ArtifactRef) -> Result<(), Fault>;

    /// Removes an artifact's row.
    async fn remove_artifact(&self, artifact: &ArtifactRef) -> Result<(), Fault>;
}

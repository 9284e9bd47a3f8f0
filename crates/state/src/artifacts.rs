//! Artifacts: what is known of each by its name, and which of them there are.

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
    /// The site whose bytes these are; `None`: this daemon's own.
    pub origin: Option<SiteName>,
    /// Where people find it on this daemon's sinks.
    pub location: Option<String>,
    /// Where the daemon reads its files, if it holds them.
    pub place: Option<StorageLocation>,
    /// When it was recorded.
    pub created_ms: i64,
    /// Whether it was published here, at this site, and is where it was published.
    pub published: bool,
    /// When its source began to be read for that; 0 if it was not.
    pub published_ms: i64,
    /// How it changed since it was published, in place here or at its site; `None`: no change is
    /// known.
    pub changed: Option<String>,
    /// What the hub has still to be told of it (at a site).
    pub offer: Option<Offer>,
    /// Whether its relayed bytes stay whatever their age (at the hub).
    pub pinned: bool,
    /// When its relayed bytes were last asked for (at the hub).
    pub used_ms: i64,
    /// What its publish left out.
    pub omitted: Omitted,
}

/// What a site tells the hub of an artifact that was published there, until the hub has confirmed
/// it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Offer {
    /// Sites to deliver to at once.
    pub to: Option<SiteSelector>,
    /// The training run that made it.
    pub run: Option<RunName>,
    /// Whether the hub has never heard of the artifact.
    pub new: bool,
}

/// The answer for an artifact that does not exist, and for one that the caller may not see.
pub fn no_artifact(artifact: &ArtifactRef) -> Fault {
    Fault::not_found(format!("there is no artifact {artifact}"))
        .with_next("'packhorse artifacts' lists what there is")
}

/// The refusal of other content under a name.
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
    /// Records a published or arriving artifact. `false` when the same content has this name
    /// already; other content is a conflict.
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

    /// Records that an artifact was published here, where it is, when its source began to be read,
    /// and what the hub has to be told of it. The location of what was received before stays.
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

    /// Records that the hub knows an artifact that was published here.
    async fn offered(&self, artifact: &ArtifactRef) -> Result<(), Fault>;

    /// What the hub has still to be told of, oldest first: the names, and what to tell.
    async fn offers(&self) -> Result<Vec<(ArtifactRef, Offer)>, Fault>;

    /// All artifacts of this digest, those that this daemon holds first.
    async fn all_by_digest(&self, digest: Digest) -> Result<Vec<ArtifactRow>, Fault>;

    /// One artifact by name.
    async fn artifact(&self, artifact: &ArtifactRef) -> Result<ArtifactRow, Fault>;

    /// The newest other version of this artifact that this daemon holds.
    async fn kin(&self, of: &ArtifactRef) -> Result<Option<ArtifactRow>, Fault>;

    /// Whether a site has, or published, any version of this artifact.
    async fn has_kin_at(&self, site: &SiteName, of: &ArtifactRef) -> Result<bool, Fault>;

    /// The digests of all artifacts. Fails if one cannot be read: content of an artifact that is
    /// missing here is removed.
    async fn digests(&self) -> Result<Vec<Digest>, Fault>;

    /// Whether there is any artifact.
    async fn any_artifact(&self) -> Result<bool, Fault>;

    /// The names of all artifacts, in order. Fails if one cannot be read.
    async fn artifact_names(&self) -> Result<Vec<ArtifactRef>, Fault>;

    /// The same, after every transaction that has begun is committed or rolled back: an artifact
    /// that is about to become visible is among them.
    async fn artifact_names_settled(&self) -> Result<Vec<ArtifactRef>, Fault>;

    /// The names and digests of all artifacts, in order. Fails if one cannot be read.
    async fn artifacts_by_digest(&self) -> Result<Vec<(ArtifactRef, Digest)>, Fault>;

    /// Shows `rows` artifacts behind this one, by name.
    async fn each_artifact(
        &self,
        behind: Option<&str>,
        rows: i64,
        see: See<'_, ArtifactRow>,
    ) -> Result<(), Fault>;

    /// Records that what arrived here is being removed. `false`: it is published here, or is being
    /// published, and stays.
    async fn leave(&self, artifact: &ArtifactRef) -> Result<bool, Fault>;

    /// Removes the row of what was removed, unless it came here in another way since
    /// [`Artifacts::leave`].
    async fn remove_left(&self, artifact: &ArtifactRef) -> Result<(), Fault>;

    /// Removes an artifact's row.
    async fn remove_artifact(&self, artifact: &ArtifactRef) -> Result<(), Fault>;
}

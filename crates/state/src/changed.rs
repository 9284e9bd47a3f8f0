//! Artifacts that were published in place and whose files changed since: at the site as its checks
//! found them, at the hub as the site reported them.

use std::collections::HashMap;
use std::hash::Hash;
use std::path::Path;

use async_trait::async_trait;
use base::fault::Fault;
use base::names::{ArtifactRef, SiteName};
use base::text::Message;
use sink::StorageLocation;

/// An artifact that changed after it was published in place.
pub struct Changed<P> {
    /// Its name.
    pub artifact: ArtifactRef,
    /// Where it was published.
    pub place: P,
    /// How it changed.
    pub how: String,
    /// The newest version that was published from the same location later and is unchanged.
    pub newer: Option<ArtifactRef>,
}

/// An artifact that was published in place: its location, the time of the publish, its name, and
/// how it changed since.
pub type PublishedInPlace<P> = (P, i64, ArtifactRef, Option<String>);

/// Selects the changed artifacts.
pub fn what_changed<P: Eq + Hash>(
    published: impl Iterator<Item = PublishedInPlace<P>>,
) -> Vec<Changed<P>> {
    let (mut changed, mut sound) = (
        Vec::new(),
        HashMap::<(String, P), (i64, ArtifactRef)>::new(),
    );
    for (place, at_ms, artifact, how) in published {
        let of = (artifact.series(), place);
        match how {
            Some(how) => changed.push((artifact, of, at_ms, how)),
            None if sound.get(&of).is_none_or(|(newest, _)| *newest < at_ms) => {
                sound.insert(of, (at_ms, artifact));
            }
            None => {}
        }
    }
    let changed = changed.into_iter().map(|(artifact, of, at_ms, how)| {
        let newer = sound
            .get(&of)
            .filter(|(later, _)| *later > at_ms)
            .map(|(_, newer)| newer.clone());
        Changed {
            artifact,
            place: of.1,
            how,
            newer,
        }
    });
    changed.collect()
}

/// Artifacts that were published in place, here or at a site, and their changes.
#[async_trait]
pub trait InPlace: Send + Sync {
    /// The artifacts that were published in place here, with their storage locations.
    async fn published(&self) -> Result<Vec<(ArtifactRef, StorageLocation)>, Fault>;

    /// The artifacts that were published at sites, as far as this hub knows.
    async fn published_at_sites(&self) -> Result<Vec<PublishedInPlace<SiteName>>, Fault>;

    /// The artifacts that were published in place here, with the storage location as it is in the
    /// row.
    async fn published_here(&self) -> Result<Vec<PublishedInPlace<Option<String>>>, Fault>;

    /// An artifact that was published here and whose storage location is this folder or is below
    /// it. The folder must be resolved, as storage locations are.
    async fn published_in(&self, folder: &Path) -> Result<Option<ArtifactRef>, Fault>;

    /// Records how the files of an artifact changed after it was published here; `None`: they are
    /// unchanged. Returns whether this differs from the recorded state.
    async fn set_changed(
        &self,
        artifact: &ArtifactRef,
        changed: Option<&str>,
    ) -> Result<bool, Fault>;

    /// The changes to report to the hub: artifacts whose offer the hub confirmed, and how each
    /// changed.
    async fn changed_here(&self) -> Result<Vec<(ArtifactRef, Message)>, Fault>;

    /// Records the changes that a site reported, at the hub: `all` is the complete list, so other
    /// artifacts of this site are unchanged. Returns whether anything differs from the recorded
    /// state.
    async fn set_changed_at(
        &self,
        site: &SiteName,
        all: &[(ArtifactRef, Message)],
    ) -> Result<bool, Fault>;
}

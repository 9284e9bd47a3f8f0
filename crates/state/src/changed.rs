//! What was published in place and is no longer what it was: at its site as the watch found it, at
//! the hub as the site tells it.

use std::collections::HashMap;
use std::hash::Hash;
use std::path::Path;

use async_trait::async_trait;
use base::fault::Fault;
use base::names::{ArtifactRef, SiteName};
use base::text::Message;

/// An artifact that changed after it was published in place.
pub struct Changed<P> {
    /// Its name.
    pub artifact: ArtifactRef,
    /// Where it was published.
    pub place: P,
    /// How it changed.
    pub how: String,
    /// The newest version that was published there since, and is sound.
    pub newer: Option<ArtifactRef>,
}

/// What was published in place: where, when, its name, and how it changed since.
pub type PublishedInPlace<P> = (P, i64, ArtifactRef, Option<String>);

/// What changed of what was published in place.
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

/// What was published in place, here or at a site, and how it changed since.
#[async_trait]
pub trait InPlace: Send + Sync {
    /// The names of what was published here, in place.
    async fn published(&self) -> Result<Vec<ArtifactRef>, Fault>;

    /// What was published at sites, as far as this hub knows.
    async fn published_at_sites(&self) -> Result<Vec<PublishedInPlace<SiteName>>, Fault>;

    /// What was published here, in place; the place as it is stored.
    async fn published_here(&self) -> Result<Vec<PublishedInPlace<Option<String>>>, Fault>;

    /// An artifact that was published here and is read in this folder, or below it. The folder is
    /// resolved, as places are.
    async fn published_in(&self, folder: &Path) -> Result<Option<ArtifactRef>, Fault>;

    /// Records how an artifact of this daemon changed since it was published; `None`: it is as it
    /// was. Returns whether that is new.
    async fn set_changed(
        &self,
        artifact: &ArtifactRef,
        changed: Option<&str>,
    ) -> Result<bool, Fault>;

    /// What the hub has to know of the changes here: what it knows the artifact of, and how that
    /// changed.
    async fn changed_here(&self) -> Result<Vec<(ArtifactRef, Message)>, Fault>;

    /// Records what changed at a site, at the hub: `all` of what is published there, and nothing
    /// else of it. Returns whether anything of it is new.
    async fn set_changed_at(
        &self,
        site: &SiteName,
        all: &[(ArtifactRef, Message)],
    ) -> Result<bool, Fault>;
}

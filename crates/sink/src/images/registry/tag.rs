//! The image that a tag of the registry refers to, also where a policy hides it.
//!
//! `push` and the checks of [`super::RegistrySink`] call it.

use super::RegistrySink;
use crate::images::{ImageName, taken};
use base::fault::Fault;
use registry::Error;
use registry::image::Sha256;

/// The image that a tag refers to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Tag {
    Absent,
    Is(Sha256),
    /// An image exists, but a policy of the registry blocks it. Contains its digest if the registry
    /// reports it in another way; otherwise it may be ours.
    Blocked(Option<Sha256>),
    /// The same, and the image is not ours, because the registry does not have ours.
    BlockedOther,
}

impl Tag {
    /// The digest of the image, if it is known.
    pub(super) fn digest(&self) -> Option<Sha256> {
        match self {
            Tag::Is(digest) => Some(*digest),
            Tag::Blocked(digest) => *digest,
            Tag::Absent | Tag::BlockedOther => None,
        }
    }

    /// The fault of a tag that certainly refers to a different image.
    pub(super) fn conflict(&self, location: &str, ours: &Sha256) -> Option<Fault> {
        match (self, self.digest()) {
            (Tag::BlockedOther, _) => Some(
                Fault::conflict(format!(
                    "{location} already exists with a different image, which a policy of the registry blocks"
                ))
                .with_next("publish under another version, then deliver that version"),
            ),
            (_, Some(theirs)) if theirs != *ours => Some(taken(location, &theirs, ours)),
            _ => None,
        }
    }
}

impl RegistrySink {
    /// What the tag of an artifact refers to. `ours` is the digest of the image that this sink
    /// stores there.
    pub(super) async fn tag(&self, image: &ImageName, ours: &Sha256) -> Result<Tag, Fault> {
        let repository = self.repository(image);
        match self.registry.head_manifest(&repository, &image.tag).await {
            Ok(None) => Ok(Tag::Absent),
            Ok(Some(digest)) => Ok(Tag::Is(digest)),
            Err(Error::Answer(answer)) if answer.is_policy() => {
                let (project, name) = repository.split_once('/').unwrap_or(("", &repository));
                if let Some(digest) = self
                    .registry
                    .artifact_digest(project, name, &image.tag)
                    .await
                {
                    return Ok(Tag::Blocked(Some(digest)));
                }
                // By its digest, our image is blocked too, if it exists.
                let has_ours = self
                    .registry
                    .head_manifest(&repository, &ours.to_string())
                    .await;
                Ok(if matches!(has_ours, Ok(None)) {
                    Tag::BlockedOther
                } else {
                    Tag::Blocked(None)
                })
            }
            Err(error) => Err(error.fault(format_args!("look up {}", self.location(image)))),
        }
    }
}

//! What is carried with an image in the registry: pushed after the image, checked, and removed with
//! it.
//!
//! A referrer is stored under cosign's tag or by its digest. If the registry does not list it among
//! the referrers of its subject itself, it is added to the list of the fallback tag. A crash leaves
//! a part of them: the next attempt pushes all again.

use std::collections::HashSet;
use std::path::Path;

use super::{RegistrySink, Verification};
use crate::Incoming;
use crate::images::{Attached, attached, image_info, not_staged, other_tag};
use base::fault::{Code, Fault};
use content::manifest::{ImageInfo, ImageReferrer};
use registry::image::{Document, Sha256};
use registry::{Deleted, Error, subject_of};

impl RegistrySink {
    /// What is carried with an image, from the staging directory or from the registry.
    pub(super) async fn attached(
        &self,
        repository: &str,
        staged: Option<&Path>,
        incoming: &Incoming,
    ) -> Result<Vec<Attached>, Fault> {
        attached(image_info(incoming)?, |wanted| async move {
            self.manifest(repository, staged, &wanted.digest).await
        })
        .await
    }

    /// Pushes what is carried with an image, which exists in the registry. Returns notes.
    pub(super) async fn push_attached(
        &self,
        repository: &str,
        incoming: &Incoming,
        staged: &Path,
    ) -> Result<Vec<String>, Fault> {
        let mut notes = Vec::new();
        let all = self.attached(repository, Some(staged), incoming).await;
        let at = format!("{}/{repository}", self.registry.origin());
        for one in all.map_err(|fault| not_staged(fault, &at))? {
            let doing = || format!("push {} of {at}", one.name());
            let mut is_retry = false;
            loop {
                self.push_blobs(repository, &one.tree, staged).await?;
                match self.push_one(repository, &one, &mut notes).await {
                    Ok(()) => break,
                    // A blob was removed after it was checked.
                    Err(Error::Answer(answer)) if answer.is_blob_unknown() && !is_retry => {
                        is_retry = true;
                    }
                    Err(error) => return Err(error.fault(doing())),
                }
            }
        }
        Ok(notes)
    }

    async fn push_one(
        &self,
        repository: &str,
        one: &Attached,
        notes: &mut Vec<String>,
    ) -> Result<(), Error> {
        let digest = one.top.digest.to_string();
        let theirs = match &one.tag {
            None => None,
            Some(tag) => match self.registry.head_manifest(repository, tag).await {
                // A policy hides what is there.
                Err(Error::Answer(answer)) if answer.is_policy() => Some(one.top.digest),
                found => found?,
            },
        };
        let reference = match &one.tag {
            Some(tag) if theirs.is_none() => tag,
            _ => &digest,
        };
        if let (Some(tag), Some(_)) = (&one.tag, theirs.filter(|theirs| *theirs != one.top.digest))
        {
            // Signed again at this site: what the site uses stays.
            let note = other_tag(tag, &digest);
            if !notes.contains(&note) {
                notes.push(note);
            }
        }
        let Some(manifest) = one.manifest() else {
            // The same as a referrer before it, under another tag.
            let found = self
                .registry
                .get_manifest(repository, &digest, "pull,push")
                .await?;
            let Some(found) = found else {
                return Err(Fault::unreachable(format!(
                    "manifest {digest} was pushed but is missing"
                ))
                .into());
            };
            return self
                .registry
                .put_manifest(
                    repository,
                    reference,
                    &one.top.media_type,
                    &found.bytes,
                    &one.top.digest,
                )
                .await
                .map(|_| ());
        };
        let mut is_listed = false;
        for node in &one.tree.manifests {
            let (own, reference) = (node.digest.to_string(), reference.as_str());
            let reference = if node.digest == one.top.digest {
                reference
            } else {
                &own
            };
            is_listed = self
                .registry
                .put_manifest(
                    repository,
                    reference,
                    &node.media_type,
                    &node.bytes,
                    &node.digest,
                )
                .await?;
        }
        match subject_of(manifest) {
            Some(subject) if !is_listed => {
                self.registry
                    .add_to_fallback(repository, &subject, &one.top, manifest)
                    .await
            }
            _ => Ok(()),
        }
    }

    /// Whether the registry has a manifest for each referrer of the image.
    pub(super) async fn has_attached(
        &self,
        repository: &str,
        info: &ImageInfo,
    ) -> Result<bool, Fault> {
        for referrer in &info.referrers {
            let reference = referrer.tag.as_ref().unwrap_or(&referrer.digest);
            match self.registry.head_manifest(repository, reference).await {
                Ok(None) => return Ok(false),
                Ok(Some(_)) => {}
                // A blocked manifest is not lost.
                Err(Error::Answer(answer)) if answer.is_policy() => {}
                Err(error) => {
                    return Err(error.fault(format_args!("look up {reference} of {repository}")));
                }
            }
        }
        Ok(true)
    }

    /// Reads what is carried with an image, and adds what is wrong with it to `out`.
    pub(super) async fn verify_attached(
        &self,
        repository: &str,
        incoming: &Incoming,
        verification: &Verification,
        out: &mut Vec<String>,
    ) -> Result<(), Fault> {
        let doing = |name: &str| format!("look up {name} of {repository}");
        // A referrer whose tag was replaced at the site need not exist any more.
        let mut expected = Vec::new();
        let info = image_info(incoming)?;
        for referrer in &info.referrers {
            if let Some(tag) = &referrer.tag {
                let found = self.registry.head_manifest(repository, tag).await;
                match found.map_err(|error| error.fault(doing(tag)))? {
                    None => {
                        out.push(format!("the tag {tag} is missing"));
                    }
                    Some(theirs) if theirs.to_string() != referrer.digest => {
                        verification.note(other_tag(tag, &referrer.digest));
                        continue;
                    }
                    Some(_) => {}
                }
            }
            expected.push(referrer.clone());
        }
        let expected = ImageInfo {
            referrers: expected,
            ..info.clone()
        };
        let read = attached(&expected, |wanted| async move {
            self.manifest(repository, None, &wanted.digest).await
        });
        let all = match read.await {
            Err(fault) if matches!(fault.code, Code::Integrity | Code::NotFound) => {
                out.push(fault.to_string());
                return Ok(());
            }
            read => read?,
        };
        for one in all {
            for blob in &one.tree.blobs {
                let found = self.blob_fault(repository, blob, verification).await?;
                out.extend(found.map(|why| format!("{}: {why}", one.name())));
            }
            let subject = one.manifest().and_then(|manifest| subject_of(manifest));
            if let Some(subject) = subject {
                let listed = self
                    .registry
                    .lists_referrer(repository, &subject, &one.top.digest)
                    .await;
                if !listed.map_err(|error| error.fault(doing(&one.name())))? {
                    out.push(format!(
                        "{}: the registry does not list it among the referrers of {subject}",
                        one.name()
                    ));
                }
            }
        }
        Ok(())
    }

    /// Removes what was carried with an image that was removed from the tag `tag`, except what
    /// describes a manifest of another image in the repository. Returns the reason if this registry
    /// does not support it.
    pub(super) async fn delete_attached(
        &self,
        repository: &str,
        tag: &str,
        info: &ImageInfo,
    ) -> Result<Option<String>, Error> {
        if info.referrers.is_empty() {
            return Ok(None);
        }
        let mut needed = self.subjects(repository, tag).await?;
        let (mut gone, mut kept) = (Vec::new(), HashSet::new());
        for referrer in &info.referrers {
            let (Ok(digest), Ok(about)) = (
                referrer.digest.parse::<Sha256>(),
                referrer.about.parse::<Sha256>(),
            ) else {
                continue; // refused when it was delivered
            };
            if needed.contains(&about) {
                // What describes it is needed too.
                needed.insert(digest);
                kept.insert(digest);
            } else {
                gone.push((digest, about, referrer));
            }
        }
        gone.retain(|(digest, ..)| !kept.contains(digest));
        let mut reason = None;
        for (digest, about, referrer) in gone.into_iter().rev() {
            self.registry
                .remove_from_fallback(repository, &about, &[digest])
                .await?;
            if self.is_replaced(repository, referrer, &digest).await? {
                continue;
            }
            if self.registry.delete_manifest(repository, &digest).await? == Deleted::Unsupported {
                reason = Some("the registry does not allow deletion".to_owned());
            }
        }
        Ok(reason)
    }

    /// Whether the tag of a referrer was given to something else, which stays.
    async fn is_replaced(
        &self,
        repository: &str,
        referrer: &ImageReferrer,
        ours: &Sha256,
    ) -> Result<bool, Error> {
        let Some(tag) = &referrer.tag else {
            return Ok(false);
        };
        let theirs = self.registry.head_manifest(repository, tag).await?;
        Ok(theirs.is_some_and(|theirs| theirs != *ours))
    }

    /// The manifests of all images of a repository, except that with the tag `but`: those that have
    /// a tag, and those that a tagged index lists.
    async fn subjects(&self, repository: &str, but: &str) -> Result<HashSet<Sha256>, Error> {
        let mut all = HashSet::new();
        for tag in self.registry.tags(repository).await? {
            if tag == but || tag.starts_with("sha256-") {
                continue;
            }
            let found = self.registry.get_manifest(repository, &tag, "pull").await?;
            let Some(found) = found else { continue };
            all.insert(found.descriptor.digest);
            if let Ok(document) = Document::parse(&found.bytes, &found.descriptor.digest) {
                all.extend(document.manifests.iter().map(|child| child.digest));
            }
        }
        Ok(all)
    }
}

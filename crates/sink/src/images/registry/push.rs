//! Pushes an image: its blobs, then the lower manifests, and last the top manifest under the tag;
//! then what is carried with it (`referrers`).
//!
//! [`super::RegistrySink`] calls it for a commit. A crash leaves unreferenced blobs, which the next
//! attempt uses.

use std::path::Path;

use futures::TryStreamExt;

use super::tag::Tag;
use super::{BLOCKED, RegistrySink, wrong_size};
use crate::images::{ImageName, image_info, lost, not_staged, top_of};
use crate::{Committed, Incoming, StorageLocation};
use base::durable;
use base::fault::Fault;
use base::limits;
use registry::image::{Descriptor, Sha256, Tree};
use registry::{Error, LocalBlob};

impl RegistrySink {
    pub(super) fn note_sent(&self, key: (String, Sha256)) {
        let mut sent = self.sent.lock();
        if sent.len() >= limits::REGISTRY_MOUNTS_KEPT_MAX {
            sent.clear();
        }
        sent.insert(key);
    }

    pub(super) fn is_damaged(&self, repository: &str, digest: &Sha256) -> bool {
        self.damaged
            .lock()
            .contains(&(repository.to_owned(), *digest))
    }

    pub(super) async fn push_blobs(
        &self,
        repository: &str,
        tree: &Tree,
        staged: &Path,
    ) -> Result<(), Fault> {
        futures::stream::iter(tree.blobs.iter().map(Ok))
            .try_for_each_concurrent(limits::REGISTRY_BLOBS_IN_FLIGHT_MAX, |blob| {
                self.push_blob(repository, blob, staged)
            })
            .await
    }

    async fn push_blob(
        &self,
        repository: &str,
        blob: &Descriptor,
        staged: &Path,
    ) -> Result<(), Fault> {
        let file = staged.join(blob.digest.layout_path());
        if self.is_staged(&file).await? {
            let local = LocalBlob {
                digest: blob.digest,
                size: blob.size,
                file,
            };
            let key = (repository.to_owned(), blob.digest);
            if self.is_damaged(repository, &blob.digest) {
                self.replace_blob(repository, blob, &local).await?;
            } else if self.registry.push_blob(repository, &local).await? {
                self.note_sent(key);
            } else if !self.sent.lock().contains(&key) {
                // The blob was staged because the registry lacked it or had it damaged. It exists
                // now, but this process did not send it, so it is read.
                let doing = || {
                    format!(
                        "read blob {} of {}/{repository}",
                        blob.digest,
                        self.registry.origin()
                    )
                };
                if self
                    .registry
                    .check_blob(repository, blob, &|_| {})
                    .await
                    .map_err(|e| e.fault(doing()))?
                    .is_some()
                {
                    self.replace_blob(repository, blob, &local).await?;
                }
            }
        } else {
            let held = self.registry.blob_size(repository, &blob.digest).await;
            match held.map_err(|e| e.fault(format_args!("look up blob {}", blob.digest)))? {
                Some(size) if size == blob.size => {}
                Some(size) => return Err(wrong_size(blob, size)),
                None if blob.is_foreign() => return Ok(()), // such layers are not in registries by design
                None => {
                    return Err(lost(
                        &format!("blob {}", blob.digest),
                        &format!("{}/{repository}", self.registry.origin()),
                    ));
                }
            }
        }
        self.remember_repository(blob.digest, repository);
        Ok(())
    }

    /// Sends a blob again that is damaged in the registry, and then reads it, because some
    /// registries keep the old content.
    async fn replace_blob(
        &self,
        repository: &str,
        blob: &Descriptor,
        local: &LocalBlob,
    ) -> Result<(), Fault> {
        let doing = || {
            format!(
                "replace the damaged blob {} of {}/{repository}",
                blob.digest,
                self.registry.origin()
            )
        };
        let deleted = self.registry.delete_blob(repository, &blob.digest).await;
        tracing::info!(blob = %blob.digest, repository, deleted = ?deleted.ok(), "sending a damaged blob again");
        self.registry.push_again(repository, local).await?;
        match self.registry.check_blob(repository, blob, &|_| {}).await.map_err(|e| e.fault(doing()))? {
            None => {
                self.damaged.lock().remove(&(repository.to_owned(), blob.digest));
                Ok(())
            }
            Some(why) => Err(Fault::integrity(format!("{}: it was sent again, but the registry kept the damaged content: {why}", doing())).with_next(
                "delete every image that uses this blob at the registry, run its garbage collection to remove the blob from its storage, then run 'packhorse retry'",
            )),
        }
    }

    pub(super) fn remember_repository(&self, digest: Sha256, repository: &str) {
        let mut seen = self.seen.lock();
        if seen.len() >= limits::REGISTRY_MOUNTS_KEPT_MAX {
            seen.clear();
        }
        seen.insert(digest, repository.to_owned());
    }

    /// Pushes the manifests, the top one last and under the tag.
    async fn push_manifests(&self, repository: &str, tree: &Tree, tag: &str) -> Result<(), Error> {
        let last = tree.manifests.len().saturating_sub(1);
        for (at, node) in tree.manifests.iter().enumerate() {
            let digest = node.digest.to_string();
            let reference = if at == last { tag } else { digest.as_str() };
            self.registry
                .put_manifest(
                    repository,
                    reference,
                    &node.media_type,
                    &node.bytes,
                    &node.digest,
                )
                .await?;
        }
        Ok(())
    }

    async fn push(
        &self,
        repository: &str,
        incoming: &Incoming,
        staged: &Path,
    ) -> Result<(), Fault> {
        let name = ImageName::of(incoming)?;
        let location = self.location(&name);
        let ours = top_of(image_info(incoming)?)?.digest;
        let tree = self
            .tree(repository, Some(staged), incoming)
            .await
            .map_err(|fault| not_staged(fault, &location))?;
        let mut is_retry = false;
        loop {
            self.push_blobs(repository, &tree, staged).await?;
            let error = match self.push_manifests(repository, &tree, &name.tag).await {
                Ok(()) => break,
                Err(error) => error,
            };
            let blob_unknown = matches!(&error, Error::Answer(answer) if answer.is_blob_unknown());
            if blob_unknown && !is_retry {
                is_retry = true; // a blob was removed after it was checked
                continue;
            }
            // An immutable tag, or a concurrent push by another client. Both are acceptable if it
            // is the same image.
            if matches!(error.status(), Some(409 | 412)) || error.is_transient() {
                match self.tag(&name, &ours).await {
                    Ok(tag) if tag.digest() == Some(ours) => break,
                    Ok(tag) if error.status() == Some(412) => {
                        match tag.conflict(&location, &ours) {
                            Some(fault) => return Err(fault),
                            None if tag == Tag::Blocked(None) => {
                                return Err(unknown_tag(&location, error));
                            }
                            None => {}
                        }
                    }
                    _ => {}
                }
            }
            let refuses_urls =
                error.status() == Some(500) && tree.blobs.iter().any(Descriptor::is_foreign);
            let fault = error.fault(format_args!("push {location}"));
            if refuses_urls {
                // docker-registry answers so to a manifest with addresses that it does not allow.
                return Err(Fault::conflict(fault.message).with_next(
                    "the image has layers at other addresses (urls); allow them at the registry (distribution: validation.manifests.urls.allow), then run 'packhorse retry'",
                ));
            }
            return Err(fault);
        }
        let tag = self.tag(&name, &ours).await?;
        if let Some(theirs) = tag.digest().filter(|theirs| *theirs != ours) {
            return Err(Fault::integrity(format!("{location} was stored as {theirs}, not {ours}"))
                .with_next("a proxy in front of the registry changes the content, or another client pushes the same tag"));
        }
        // If a policy blocks the image, the answer to the push stated the stored digest.
        if tag == Tag::Absent {
            Err(Fault::unreachable(format!(
                "{location} was pushed but does not exist"
            )))
        } else {
            Ok(())
        }
    }

    /// Commits. Every step may be repeated and is skipped if it is done.
    pub(super) async fn commit_now(
        &self,
        incoming: &Incoming,
        staged: &Path,
    ) -> Result<Committed, Fault> {
        let name = ImageName::of(incoming)?;
        let repository = self.repository(&name);
        let ours = top_of(image_info(incoming)?)?.digest;
        let found = match self.tag(&name, &ours).await {
            Ok(found) => found,
            Err(fault) => return Err(self.explain_denied(fault, &repository).await),
        };
        if let Some(fault) = found.conflict(&self.location(&name), &ours) {
            return Err(fault);
        }
        let mut notes = Vec::new();
        match found {
            // Committed and cleaned up before a crash.
            Tag::Is(_) | Tag::Blocked(_) if !self.is_staged(staged).await? => {}
            _ => {
                let push = async {
                    self.push(&repository, incoming, staged).await?;
                    self.push_attached(&repository, incoming, staged).await
                };
                match push.await {
                    Ok(of_referrers) => notes = of_referrers,
                    Err(fault) => return Err(self.explain_denied(fault, &repository).await),
                }
                let staged = staged.to_owned();
                self.threads
                    .run(move || durable::remove_all(&staged))
                    .await?;
            }
        }
        if matches!(self.tag(&name, &ours).await, Ok(Tag::Blocked(_))) {
            notes.insert(0, BLOCKED.to_owned());
        }
        Ok(Committed {
            place: StorageLocation::Registry { repository },
            location: format!("{}@{ours}", self.location(&name)),
            note: (!notes.is_empty()).then(|| notes.join("; ")),
        })
    }
}

/// The fault of an immutable tag whose image the registry does not report.
fn unknown_tag(location: &str, error: Error) -> Fault {
    let fault = error.fault(format_args!("push {location}"));
    Fault { message: format!("{}; an image exists, but a policy of the registry hides which one", fault.message), ..fault }.with_next(
        "give the registry user permission to list artifacts (Harbor: 'List Artifact' and 'Read Artifact'), then run 'packhorse retry'",
    )
}

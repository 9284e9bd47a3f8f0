//! The tag `sha256-<hex>` of a registry without the referrers API (OCI 1.1): an index of the objects
//! that refer to the manifest with this digest.
//!
//! Clients keep this index. Entries of other clients stay. The image sink changes it after it has
//! stored or before it removes a referrer.

use bytes::Bytes;
use serde_json::{Value, json};

use crate::image::{Descriptor, OCI_INDEX, Sha256};
use crate::{Deleted, Error, Registry};
use base::fault::{Fault, Reason, Retry};
use base::limits::{IMAGE_MANIFEST_BYTES_MAX, REGISTRY_FALLBACK_TRIES_MAX};

/// An index of referrers, as JSON, so that what other clients wrote is kept.
struct List(Value);

impl List {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let value: Value = serde_json::from_slice(bytes).ok()?;
        value["manifests"].is_array().then_some(Self(value))
    }

    fn empty() -> Self {
        Self(json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [] }))
    }

    fn entries(&mut self) -> Option<&mut Vec<Value>> {
        self.0["manifests"].as_array_mut()
    }

    fn has(&self, digest: &Sha256) -> bool {
        let digest = digest.to_string();
        let mut entries = self.0["manifests"].as_array().into_iter().flatten();
        entries.any(|entry| entry["digest"] == digest)
    }
}

fn tag(subject: &Sha256) -> String {
    format!("sha256-{}", subject.hex())
}

/// The entry of a manifest in a list of referrers.
fn entry(descriptor: &Descriptor, manifest: &[u8]) -> Value {
    let manifest: Value = serde_json::from_slice(manifest).unwrap_or_default();
    let mut entry = json!({
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
    });
    let artifact_type = manifest["artifactType"].as_str().filter(|t| !t.is_empty());
    if let Some(what) = artifact_type.or(manifest["config"]["mediaType"].as_str()) {
        entry["artifactType"] = what.into();
    }
    if manifest["annotations"].is_object() {
        entry["annotations"] = manifest["annotations"].clone();
    }
    entry
}

/// The manifest that a manifest names as its subject.
pub fn subject_of(manifest: &[u8]) -> Option<Sha256> {
    let manifest: Value = serde_json::from_slice(manifest).ok()?;
    manifest["subject"]["digest"].as_str()?.parse().ok()
}

impl Registry {
    /// Whether the list of the fallback tag contains a referrer.
    pub async fn is_in_fallback(
        &self,
        repository: &str,
        subject: &Sha256,
        digest: &Sha256,
    ) -> Result<bool, Error> {
        let found = self.get_manifest(repository, &tag(subject), "pull").await?;
        Ok(found
            .and_then(|found| List::parse(&found.bytes))
            .is_some_and(|list| list.has(digest)))
    }

    /// Adds a stored referrer to the list of the fallback tag. Repeats it if another client changes
    /// the list at the same time.
    pub async fn add_to_fallback(
        &self,
        repository: &str,
        subject: &Sha256,
        descriptor: &Descriptor,
        manifest: &[u8],
    ) -> Result<(), Error> {
        let _alone = self.fallback.lock().await;
        for _ in 0..REGISTRY_FALLBACK_TRIES_MAX {
            let found = self
                .get_manifest(repository, &tag(subject), "pull,push")
                .await?;
            let mut list = match found {
                None => List::empty(),
                Some(found) => match List::parse(&found.bytes) {
                    Some(list) if list.has(&descriptor.digest) => return Ok(()),
                    Some(list) => list,
                    None => return Err(not_a_list(repository, subject).into()),
                },
            };
            if let Some(entries) = list.entries() {
                entries.push(entry(descriptor, manifest));
            }
            self.put_list(repository, subject, &list).await?;
        }
        // What was written is read before it counts.
        if self
            .is_in_fallback(repository, subject, &descriptor.digest)
            .await?
        {
            return Ok(());
        }
        Err(Fault::unreachable(format!(
            "the list of referrers {repository}:{} is changed by other clients all the time",
            tag(subject)
        ))
        .with_reason(Reason::SinkUnavailable)
        .with_retry(Retry::Backoff)
        .into())
    }

    /// Removes referrers from the list of the fallback tag, and the list with its last entry.
    pub async fn remove_from_fallback(
        &self,
        repository: &str,
        subject: &Sha256,
        digests: &[Sha256],
    ) -> Result<(), Error> {
        let _alone = self.fallback.lock().await;
        for _ in 0..REGISTRY_FALLBACK_TRIES_MAX {
            let found = self
                .get_manifest(repository, &tag(subject), "pull,push")
                .await?;
            let Some((found, mut list)) =
                found.and_then(|found| List::parse(&found.bytes).map(|list| (found, list)))
            else {
                return Ok(());
            };
            if !digests.iter().any(|digest| list.has(digest)) {
                return Ok(());
            }
            let is_ours = |entry: &Value| {
                let digest = entry["digest"].as_str().and_then(|text| text.parse().ok());
                digest.is_some_and(|digest: Sha256| digests.contains(&digest))
            };
            let is_empty = list.entries().is_none_or(|entries| {
                entries.retain(|entry| !is_ours(entry));
                entries.is_empty()
            });
            let is_deleted = is_empty
                && self
                    .delete_manifest(repository, &found.descriptor.digest)
                    .await?
                    != Deleted::Unsupported;
            if !is_deleted {
                self.put_list(repository, subject, &list).await?;
            }
        }
        Ok(())
    }

    async fn put_list(&self, repository: &str, subject: &Sha256, list: &List) -> Result<(), Error> {
        let bytes = Bytes::from(list.0.to_string());
        if bytes.len() > IMAGE_MANIFEST_BYTES_MAX {
            return Err(Fault::conflict(format!(
                "the list of referrers {repository}:{} is larger than registries accept",
                tag(subject)
            ))
            .with_next("remove old signatures and SBOMs of this image from the registry")
            .into());
        }
        let digest = Sha256::of(&bytes);
        self.put_manifest(repository, &tag(subject), OCI_INDEX, &bytes, &digest)
            .await
            .map(|_| ())
    }
}

fn not_a_list(repository: &str, subject: &Sha256) -> Fault {
    Fault::conflict(format!(
        "{repository}:{} exists and is not a list of referrers",
        tag(subject)
    ))
    .with_next("remove that tag, or publish the image with --no-referrers under another version")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_states_the_type_and_the_annotations_of_its_manifest() {
        let descriptor = Descriptor {
            media_type: OCI_INDEX.into(),
            digest: Sha256::of(b"x"),
            size: 1,
            urls: None,
            platform: None,
        };
        let of = |manifest: Value| entry(&descriptor, manifest.to_string().as_bytes());
        let config = json!({ "mediaType": "application/x" });
        let made = of(json!({ "config": config, "artifactType": "", "annotations": { "a": "b" } }));
        assert_eq!(
            (&made["artifactType"], &made["annotations"]["a"]),
            (&json!("application/x"), &json!("b"))
        );
        let made = of(json!({ "config": config, "artifactType": "application/y" }));
        assert_eq!(made["artifactType"], "application/y");
        assert!(made.get("annotations").is_none());
        assert!(of(json!([])).get("artifactType").is_none());
        assert!(List::parse(b"{}").is_none());
        assert!(List::parse(br#"{"manifests":[{}]}"#).is_some());
    }
}

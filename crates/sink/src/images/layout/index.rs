//! The `index.json` of an image directory: the versions by their names, and what is carried with
//! them. Entries of other programs are kept.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::images::{Attached, other_tag};
use base::durable;
use base::fault::Fault;
use registry::image::{Descriptor, REF_NAME, Sha256};

/// The annotation of an entry that this sink added for a referrer: the digest that it describes.
/// Such an entry is removed with the last version that has what it describes.
const ABOUT: &str = "dev.packhorse.about";

/// The content of a layout's `index.json` as JSON.
pub(super) struct Index(Value);

impl Index {
    pub(super) fn read(layout: &Path) -> Result<Self, Fault> {
        let path = layout.join("index.json");
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Self).map_err(|e| {
                Fault::integrity(format!("{}: {e}", path.display())).with_next(
                    "repair the file manually, or move the directory to another location",
                )
            }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self(json!({ "schemaVersion": 2, "manifests": [] })))
            }
            Err(e) => Err(Fault::io(format_args!("read {}", path.display()), &e)),
        }
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &Value> {
        self.0["manifests"].as_array().into_iter().flatten()
    }

    fn is_named(entry: &Value, name: &str) -> bool {
        entry["annotations"][REF_NAME] == name
    }

    pub(super) fn digest_of(&self, version: &str) -> Result<Option<Sha256>, Fault> {
        let Some(entry) = self.entries().find(|e| Self::is_named(e, version)) else {
            return Ok(None);
        };
        let digest = entry["digest"].as_str().unwrap_or_default();
        digest.parse().map(Some).map_err(|why| {
            Fault::integrity(format!(
                "the entry {version} in the index.json of an image directory: {why}"
            ))
        })
    }

    /// Removes a version. Returns whether it existed.
    pub(super) fn drop_version(&mut self, version: &str) -> bool {
        let Some(entries) = self.0["manifests"].as_array_mut() else {
            return false;
        };
        let before = entries.len();
        entries.retain(|e| !Self::is_named(e, version));
        entries.len() < before
    }

    pub(super) fn add(&mut self, version: &str, top: &Descriptor) {
        self.drop_version(version);
        self.push(top, &json!({ REF_NAME: version }));
    }

    fn push(&mut self, top: &Descriptor, annotations: &Value) {
        let entry = json!({
            "mediaType": top.media_type,
            "digest": top.digest,
            "size": top.size,
            "annotations": annotations,
        });
        match self.0["manifests"].as_array_mut() {
            Some(entries) => entries.push(entry),
            None => self.0["manifests"] = json!([entry]),
        }
    }

    /// What an entry describes, if this sink added it for a referrer.
    pub(super) fn about(entry: &Value) -> Option<&str> {
        entry["annotations"][ABOUT].as_str()
    }

    /// Whether the entry of this name was added for a referrer.
    pub(super) fn is_attached(&self, name: &str) -> bool {
        let mut entries = self.entries();
        entries.any(|entry| Self::is_named(entry, name) && Self::about(entry).is_some())
    }

    /// Whether an entry has this digest.
    pub(super) fn lists(&self, digest: &str) -> bool {
        self.entries().any(|entry| entry["digest"] == digest)
    }

    /// Adds a referrer. Returns whether something was changed.
    pub(super) fn attach(&mut self, attached: &Attached, notes: &mut Vec<String>) -> bool {
        let (digest, about) = (attached.top.digest.to_string(), attached.about.to_string());
        let mut annotations = json!({ ABOUT: about });
        let is_there = |entry: &&Value| match &attached.tag {
            Some(tag) => Self::is_named(entry, tag) || Self::about(entry) == Some(&about),
            None => true,
        };
        if self
            .entries()
            .any(|entry| entry["digest"] == digest && is_there(&entry))
        {
            return false;
        }
        if let Some(tag) = &attached.tag {
            if self.entries().any(|entry| Self::is_named(entry, tag)) {
                // Signed again at this site: what the site uses stays.
                notes.push(other_tag(tag, &digest));
            } else {
                annotations[REF_NAME] = tag.as_str().into();
            }
        }
        self.push(&attached.top, &annotations);
        true
    }

    /// Removes the entries of referrers for which `is_needed` returns false. It gets each entry
    /// after the entries that it may describe, with the digest that the entry describes.
    pub(super) fn drop_attached(
        &mut self,
        mut is_needed: impl FnMut(&Value, Option<Sha256>) -> Result<bool, Fault>,
    ) -> Result<(), Fault> {
        let Some(entries) = self.0["manifests"].as_array_mut() else {
            return Ok(());
        };
        // They were added in this order.
        let mut kept = Vec::with_capacity(entries.len());
        for entry in entries.drain(..) {
            let about = Self::about(&entry).map(|about| about.parse().ok());
            let is_kept = match about {
                None => true,
                Some(about) => is_needed(&entry, about)?,
            };
            if is_kept {
                kept.push(entry);
            }
        }
        *entries = kept;
        Ok(())
    }

    pub(super) fn write(&self, layout: &Path) -> Result<(), Fault> {
        durable::replace(&layout.join("index.json"), self.0.to_string().as_bytes())
    }
}

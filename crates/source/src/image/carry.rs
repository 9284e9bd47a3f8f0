//! Adds signatures, attestations and SBOMs to the image that they describe: each with everything
//! below its manifest.
//!
//! [`super::referrers`] finds them and calls [`add`]. A referrer that the source does not hold
//! completely, or whose form a registry would not take, is not added. A part that is there and
//! damaged is a fault. Only reads.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::holder::{BlobDigest, Check, Holder, Piece};
use super::oci::{Descriptor, Image};
use super::referrers::Referrer;
use base::fault::Fault;
use base::limits::{
    IMAGE_INDEX_DEPTH_MAX, IMAGE_MANIFEST_BYTES_MAX, IMAGE_MANIFESTS_BYTES_MAX,
    IMAGE_MANIFESTS_MAX, IMAGE_REFERRERS_MAX,
};
use content::manifest::ImageReferrer;

/// A manifest or an index.
#[derive(Deserialize)]
struct Document {
    #[serde(rename = "schemaVersion")]
    schema: u32,
    #[serde(rename = "mediaType")]
    media_type: Option<String>,
    subject: Option<Descriptor>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    blobs: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

/// The parts of one referrer.
#[derive(Default)]
struct Parts {
    manifests: BTreeMap<BlobDigest, Piece>,
    blobs: BTreeMap<BlobDigest, Check>,
    /// The manifest that it names as its subject.
    subject: Option<BlobDigest>,
}

impl Parts {
    fn bytes(&self) -> u64 {
        self.manifests.values().map(|piece| piece.size).sum()
    }
}

/// Reads referrers, and counts what they have together.
struct Reader<'a> {
    holder: &'a Holder,
    manifests: usize,
    bytes: u64,
}

/// Adds each of these referrers to the image that describes one of its manifests or another added
/// referrer, those that are described first. `about` is what a referrer describes. Returns the
/// digests of those that are part of the image now.
pub(super) fn add(
    holder: &Holder,
    image: &mut Image,
    referrers: &[&Referrer],
    about: impl Fn(&Referrer) -> Option<BlobDigest>,
) -> Result<BTreeSet<String>, Fault> {
    let mut reader = Reader {
        holder,
        manifests: 0,
        bytes: 0,
    };
    // Sorted, so that the same image is the same artifact whatever the order in its source.
    let mut waiting = BTreeMap::new();
    for referrer in referrers {
        if let (Some(entry), Some(about)) = (&referrer.entry, about(referrer)) {
            let tag = referrer.suffix.map(|suffix| tag(&about, suffix));
            waiting.insert((entry.digest.clone(), about, tag), entry);
        }
    }
    // A manifest may be found by its tag and by its subject.
    let tagged: BTreeSet<(BlobDigest, BlobDigest)> = waiting
        .keys()
        .filter(|(_, _, tag)| tag.is_some())
        .map(|(digest, about, _)| (digest.clone(), about.clone()))
        .collect();
    waiting.retain(|(digest, about, tag), _| {
        tag.is_some() || !tagged.contains(&(digest.clone(), about.clone()))
    });
    let (mut described, mut tags) = (image.manifests.clone(), BTreeSet::new());
    let mut added = BTreeSet::new();
    while image.referrers.len() < IMAGE_REFERRERS_MAX {
        let (ready, others): (BTreeMap<_, _>, BTreeMap<_, _>) = waiting
            .into_iter()
            .partition(|((_, about, _), _)| described.contains(about));
        waiting = others;
        if ready.is_empty() {
            break;
        }
        for ((digest, about, tag), entry) in ready {
            let is_taken = tag.as_ref().is_some_and(|tag| tags.contains(tag));
            if is_taken || image.referrers.len() >= IMAGE_REFERRERS_MAX {
                continue;
            }
            let Some(parts) = reader.read(entry).map_err(damaged)? else {
                continue;
            };
            // Without a tag only the subject names what it describes.
            if tag.is_none() && parts.subject.as_ref() != Some(&about) {
                continue;
            }
            tags.extend(tag.clone());
            described.insert(digest.clone());
            added.insert(digest.to_string());
            image.referrers.push(ImageReferrer {
                media_type: entry.media_type.clone(),
                digest: digest.to_string(),
                size: entry.size,
                about: about.to_string(),
                tag,
            });
            for (digest, piece) in parts.manifests {
                image.blobs.entry(digest).or_insert(piece);
            }
            for (digest, check) in parts.blobs {
                if let Entry::Vacant(free) = image.blobs.entry(digest) {
                    free.insert(check.piece.clone());
                    image.checks.push(check);
                }
            }
        }
    }
    Ok(added)
}

fn tag(about: &BlobDigest, suffix: &str) -> String {
    format!("{}.{suffix}", about.to_string().replace(':', "-"))
}

fn damaged(fault: Fault) -> Fault {
    fault
        .context("a signature or SBOM of the image")
        .with_next("create the source again, or publish the image without them: --no-referrers")
}

impl Reader<'_> {
    /// Reads a referrer; `None` if it is not complete or has another form than those of images.
    fn read(&mut self, top: &Descriptor) -> Result<Option<Parts>, Fault> {
        let mut parts = Parts::default();
        if !self.manifest(top, 0, &mut parts)? {
            return Ok(None);
        }
        self.manifests += parts.manifests.len();
        self.bytes += parts.bytes();
        Ok(Some(parts))
    }

    fn manifest(
        &self,
        descriptor: &Descriptor,
        depth: usize,
        parts: &mut Parts,
    ) -> Result<bool, Fault> {
        if parts.manifests.contains_key(&descriptor.digest) {
            return Ok(true);
        }
        let is_supported = descriptor.is_manifest() || descriptor.is_index();
        let is_small = (1..=IMAGE_MANIFEST_BYTES_MAX as u64).contains(&descriptor.size);
        if !is_supported || !is_small || depth > IMAGE_INDEX_DEPTH_MAX {
            return Ok(false);
        }
        let is_over = self.manifests + parts.manifests.len() >= IMAGE_MANIFESTS_MAX
            || self.bytes + parts.bytes() + descriptor.size > IMAGE_MANIFESTS_BYTES_MAX as u64;
        let Some(piece) = self.find(descriptor)?.filter(|_| !is_over) else {
            return Ok(false);
        };
        let bytes = self.holder.read_small(&piece)?;
        let digest = BlobDigest::of(&bytes);
        if digest != descriptor.digest {
            return Err(self.holder.refuse(
                &piece.name,
                format!(
                    "wrong digest: expected {}, found {digest}",
                    descriptor.digest
                ),
            ));
        }
        let Ok(document) = serde_json::from_slice::<Document>(&bytes) else {
            return Ok(false);
        };
        let is_index = document.manifests.is_some();
        let is_manifest = document.config.is_some();
        let is_stated = document
            .media_type
            .as_ref()
            .is_none_or(|own| *own == descriptor.media_type);
        if document.schema != 2
            || !is_stated
            || is_index == is_manifest
            || is_index != descriptor.is_index()
        {
            return Ok(false);
        }
        parts.manifests.insert(descriptor.digest.clone(), piece);
        if depth == 0 {
            parts.subject = document.subject.map(|subject| subject.digest);
        }
        let layers = document.layers.into_iter().chain(document.blobs).flatten();
        for blob in document.config.into_iter().chain(layers) {
            if !self.blob(&blob, parts)? {
                return Ok(false);
            }
        }
        for child in document.manifests.into_iter().flatten() {
            let is_complete = if child.is_manifest() || child.is_index() {
                self.manifest(&child, depth + 1, parts)?
            } else {
                self.blob(&child, parts)?
            };
            if !is_complete {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn blob(&self, descriptor: &Descriptor, parts: &mut Parts) -> Result<bool, Fault> {
        let Some(piece) = self.find(descriptor)? else {
            return Ok(descriptor.is_foreign());
        };
        let check = Check {
            piece,
            digest: Some(descriptor.digest.clone()),
            diff_id: None,
        };
        parts.blobs.insert(descriptor.digest.clone(), check);
        Ok(true)
    }

    fn find(&self, descriptor: &Descriptor) -> Result<Option<Piece>, Fault> {
        let Some(piece) = self.holder.find(&descriptor.digest.member())? else {
            return Ok(None);
        };
        if piece.size != descriptor.size {
            let why = format!(
                "wrong size: it has {} bytes, but its listing states {}",
                piece.size, descriptor.size
            );
            return Err(self.holder.refuse(&piece.name, why));
        }
        Ok(Some(piece))
    }
}

//! What belongs to an image and is carried with it: signatures, attestations and SBOMs (referrers,
//! OCI 1.1, and what cosign names by a tag).

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::ImageInfo;
use super::walk::malformed_manifest;
use base::fault::Fault;
use base::limits::{IMAGE_MANIFEST_BYTES_MAX, IMAGE_REFERRERS_MAX};
use base::sha256::Sha256;

/// The media types of manifests and indexes.
const MEDIA_TYPES: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// The suffixes of cosign's tags.
const SUFFIXES: [&str; 3] = ["sig", "att", "sbom"];

/// A manifest or an index that describes an image, one of its manifests or another referrer. Its
/// content is among the blobs of the artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageReferrer {
    pub media_type: String,
    /// `sha256:<hex>` of its manifest or index.
    pub digest: String,
    /// The size of its manifest or index in bytes.
    pub size: u64,
    /// `sha256:<hex>` of the manifest that it describes.
    pub about: String,
    /// The tag of cosign, `sha256-<hex>.sig`, `.att` or `.sbom`, which names what it describes.
    /// Without a tag, its manifest names that as its `subject`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
}

impl ImageReferrer {
    /// The tag of cosign for what describes `about`.
    pub fn cosign_tag(about: &Sha256, suffix: &str) -> String {
        format!("sha256-{}.{suffix}", about.hex())
    }
}

/// Checks the referrers of an image whose top manifest is `top`. Returns the paths of their
/// manifests and the sizes that these must have.
pub(super) fn check(image: &ImageInfo, top: &Sha256) -> Result<HashMap<String, u64>, Fault> {
    let refuse = |why: String| {
        Err(malformed_manifest(&format!(
            "a referrer of the image: {why}"
        )))
    };
    if image.referrers.len() > IMAGE_REFERRERS_MAX {
        return Err(malformed_manifest(&format!(
            "the image has {} referrers; {IMAGE_REFERRERS_MAX} are allowed",
            image.referrers.len()
        )));
    }
    let digest = |text: &str| text.parse::<Sha256>();
    let mut all = HashSet::new();
    for referrer in &image.referrers {
        match digest(&referrer.digest) {
            Ok(own) if own == *top => return refuse("it is the image itself".into()),
            Ok(own) => all.insert(own),
            Err(why) => return refuse(why),
        };
    }
    let (mut paths, mut tags) = (HashMap::new(), HashMap::new());
    let mut seen = HashSet::new();
    for referrer in &image.referrers {
        let (own, about) = match (digest(&referrer.digest), digest(&referrer.about)) {
            (Ok(own), Ok(about)) => (own, about),
            (Err(why), _) | (_, Err(why)) => return refuse(why),
        };
        if !MEDIA_TYPES.contains(&referrer.media_type.as_str()) {
            return refuse("its media type is not that of a manifest or an index".into());
        }
        if referrer.size == 0 || referrer.size > IMAGE_MANIFEST_BYTES_MAX as u64 {
            return refuse(format!("its size is {} bytes", referrer.size));
        }
        // In this order none describes itself through others.
        if all.contains(&about) && !seen.contains(&about) {
            return refuse("it comes before what it describes".into());
        }
        let is_of_cosign = |tag: &str| {
            SUFFIXES
                .iter()
                .any(|suffix| tag == ImageReferrer::cosign_tag(&about, suffix))
        };
        if referrer
            .tag
            .as_deref()
            .is_some_and(|tag| !is_of_cosign(tag))
        {
            return refuse("its tag is not one of cosign for what it describes".into());
        }
        if let Some(tag) = &referrer.tag
            && tags.insert(tag, own).is_some_and(|other| other != own)
        {
            return refuse("another one has its tag".into());
        }
        seen.insert(own);
        let stated = paths.insert(own.layout_path(), referrer.size);
        if stated.is_some_and(|stated| stated != referrer.size) {
            return refuse("it is listed with two sizes".into());
        }
    }
    Ok(paths)
}

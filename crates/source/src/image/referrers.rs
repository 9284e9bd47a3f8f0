//! Objects in a layout that refer to an image: signatures, SBOMs and attestations. An artifact does
//! not contain them.
//!
//! `index.json` lists them like images. [`Referrers::find`] distinguishes them, so that a layout
//! with one image and its signatures counts as one image, and [`Referrers::note`] counts those that
//! refer to the selected image. The following are recognised:
//! - manifests with a `subject` (OCI 1.1);
//! - the tags of cosign, `sha256-<hex>.sig`, `.att` and `.sbom`, and the kinds that `cosign save`
//!   and hauler annotate;
//! - the tag `sha256-<hex>` (OCI 1.1 for registries without the referrers API), an index that lists
//!   referrers.
//!
//! Only reads. An unreadable document is treated as an image here: a user who selects it gets the
//! error.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::holder::{BlobDigest, Holder};
use super::listing;
use super::oci::{Descriptor, Image, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST};
use base::limits::IMAGE_REFERRERS_JSON_BYTES_MAX;
use base::omitted::{Category, Omitted};

/// The annotation by which `cosign save` and hauler distinguish signatures from images.
const KIND: &str = "kind";

/// One referrer.
#[derive(Debug)]
struct Referrer {
    digest: String,
    /// Its type: `signature`, `SBOM`, or its own media type.
    what: String,
    /// The manifest that it describes, if it is stated.
    about: Option<BlobDigest>,
    /// The names of its entry in `index.json`.
    names: Vec<String>,
}

/// All referrers that a layout lists.
#[derive(Debug, Default)]
pub(super) struct Referrers {
    /// Entries of `index.json` that are not images.
    entries: BTreeSet<BlobDigest>,
    found: Vec<Referrer>,
}

/// The fields of a manifest or index with which it refers to another one.
#[derive(Debug, Deserialize)]
struct Document {
    #[serde(rename = "artifactType")]
    artifact_type: Option<String>,
    subject: Option<Subject>,
    config: Option<Typed>,
    manifests: Option<Vec<Listed>>,
}

#[derive(Debug, Deserialize)]
struct Subject {
    digest: String,
}

#[derive(Debug, Deserialize)]
struct Typed {
    #[serde(rename = "mediaType", default)]
    media_type: String,
}

/// An entry of an index of referrers.
#[derive(Debug, Deserialize)]
struct Listed {
    digest: String,
    #[serde(rename = "artifactType")]
    artifact_type: Option<String>,
}

impl Document {
    fn what(&self) -> String {
        let config = self
            .config
            .as_ref()
            .map(|config| config.media_type.as_str())
            .filter(|media_type| *media_type != OCI_CONFIG);
        self.artifact_type
            .as_deref()
            .or(config)
            .unwrap_or("artifact")
            .to_owned()
    }
}

impl Referrers {
    /// Finds the referrers among the entries of `index.json`. A single entry is always the image.
    pub(super) fn find(holder: &Holder, tops: &[Descriptor]) -> Self {
        let mut referrers = Self::default();
        if tops.len() < 2 {
            return referrers;
        }
        let mut bytes_left = IMAGE_REFERRERS_JSON_BYTES_MAX;
        for top in tops {
            referrers.examine(holder, top, &mut bytes_left);
        }
        referrers
    }

    fn examine(&mut self, holder: &Holder, top: &Descriptor, bytes_left: &mut u64) {
        let names: Vec<String> = top.names().map(str::to_owned).collect();
        let tag = names.iter().find_map(|name| tag_of_referrer(name));
        let kind = top.annotation(KIND).and_then(kind_of_referrer);
        let document = document(holder, top, bytes_left);
        let subject = document
            .as_ref()
            .and_then(|document| document.subject.as_ref());
        if tag.is_none() && kind.is_none() && subject.is_none() {
            return;
        }
        self.entries.insert(top.digest.clone());
        let about = subject
            .and_then(|subject| subject.digest.parse().ok())
            .or_else(|| tag.as_ref().map(|(about, _)| about.clone()));
        let listed = document
            .as_ref()
            .filter(|_| matches!(tag, Some((_, None))))
            .and_then(|document| document.manifests.as_ref());
        if let Some(listed) = listed {
            // The fallback tag: not a referrer itself, but a list of referrers.
            self.found.extend(listed.iter().map(|entry| {
                Referrer {
                    digest: entry.digest.clone(),
                    what: entry
                        .artifact_type
                        .clone()
                        .unwrap_or_else(|| "artifact".to_owned()),
                    about: about.clone(),
                    names: Vec::new(),
                }
            }));
            return;
        }
        let what = tag.and_then(|(_, what)| what).or(kind).map(str::to_owned);
        let what = what
            .or_else(|| document.as_ref().map(Document::what))
            .unwrap_or_else(|| "artifact".to_owned());
        self.found.push(Referrer {
            digest: top.digest.to_string(),
            what,
            about,
            names,
        });
    }

    /// Whether an entry of `index.json` is a referrer.
    pub(super) fn has(&self, entry: &Descriptor) -> bool {
        self.entries.contains(&entry.digest)
    }

    /// Counts the referrers that are not part of the image. If the complete layout is published
    /// (`tag` is `None`), all count; otherwise those that refer to the image, to one of its
    /// manifests, or to another counted referrer. `chosen` is the entry of the image in
    /// `index.json`.
    pub(super) fn note(&self, image: &mut Image, chosen: Option<&Descriptor>, tag: Option<&str>) {
        let mut about: BTreeSet<String> = image
            .blobs
            .keys()
            .map(ToString::to_string)
            .chain(image.absent.iter().cloned())
            .collect();
        about.extend(chosen.map(|chosen| chosen.digest.to_string()));
        let shares_a_name = |referrer: &Referrer| {
            let of_image = || chosen.into_iter().flat_map(Descriptor::names);
            referrer.names.is_empty()
                || referrer
                    .names
                    .iter()
                    .any(|name| of_image().any(|own| listing::same_image(name, own)))
        };
        let is_part_of_image = |digest: &str| {
            digest
                .parse()
                .is_ok_and(|digest: BlobDigest| image.blobs.contains_key(&digest))
        };
        let mut remaining: Vec<&Referrer> = self
            .found
            .iter()
            .filter(|referrer| !is_part_of_image(&referrer.digest))
            .collect();
        let (mut counted, mut omitted) = (BTreeSet::new(), Omitted::default());
        loop {
            let (of_image, others): (Vec<&Referrer>, Vec<&Referrer>) = remaining
                .into_iter()
                .partition(|referrer| match &referrer.about {
                    _ if tag.is_none() => true,
                    Some(digest) => about.contains(&digest.to_string()),
                    None => shares_a_name(referrer),
                });
            if of_image.is_empty() {
                break;
            }
            for referrer in of_image {
                about.insert(referrer.digest.clone());
                // The same object may be listed directly and by the fallback tag.
                if counted.insert(&referrer.digest) {
                    omitted.add(
                        Category::Referrers,
                        format!("{} {}", referrer.what, referrer.digest),
                    );
                }
            }
            remaining = others;
        }
        image.omitted.merge(omitted);
    }
}

fn document(holder: &Holder, top: &Descriptor, bytes_left: &mut u64) -> Option<Document> {
    if !matches!(top.media_type.as_str(), OCI_MANIFEST | OCI_INDEX) {
        return None; // Docker's own formats have no subject
    }
    let piece = holder.find(&top.digest.member()).ok()??;
    *bytes_left = bytes_left.checked_sub(piece.size)?;
    holder.json(&piece).ok()
}

/// Parses the name of a referrer: the manifest that it describes, and its type. Type `None`: a list
/// of referrers.
fn tag_of_referrer(name: &str) -> Option<(BlobDigest, Option<&'static str>)> {
    let tag = name
        .rsplit_once(':')
        .map_or(name, |(_, tag)| tag)
        .strip_prefix("sha256-")?;
    let (hex, suffix) = tag
        .split_once('.')
        .map_or((tag, None), |(hex, suffix)| (hex, Some(suffix)));
    let what = match suffix {
        None => None,
        Some("sig") => Some("signature"),
        Some("att") => Some("attestation"),
        Some("sbom") => Some("SBOM"),
        Some(_) => return None,
    };
    Some((format!("sha256:{hex}").parse().ok()?, what))
}

fn kind_of_referrer(kind: &str) -> Option<&'static str> {
    let (program, what) = kind.rsplit_once('/')?;
    match what {
        _ if !matches!(program, "dev.cosignproject.cosign" | "dev.hauler") => None,
        "sigs" => Some("signature"),
        "atts" => Some("attestation"),
        "sboms" => Some("SBOM"),
        "referrers" => Some("artifact"),
        _ => None,
    }
}

//! Objects in a layout that refer to an image: signatures, SBOMs and attestations.
//!
//! `index.json` lists them like images. [`Referrers::find`] distinguishes them, so that a layout
//! with one image and its signatures counts as one image. [`Referrers::settle`] adds those that
//! refer to the selected image to it (`carry`), and counts those that it cannot add. The following
//! are recognised:
//! - manifests with a `subject` (OCI 1.1);
//! - the tags of cosign, `sha256-<hex>.sig`, `.att` and `.sbom`, and the kinds that `cosign save`
//!   and hauler annotate;
//! - the tag `sha256-<hex>` (OCI 1.1 for registries without the referrers API), an index that lists
//!   referrers.
//!
//! Only reads. An unreadable document is treated as an image here: a user who selects it gets the
//! error.

use std::collections::{BTreeSet, HashMap};

use serde::Deserialize;

use super::carry;
use super::holder::{BlobDigest, Holder, distinct};
use super::listing;
use super::oci::{Descriptor, Image, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST};
use base::fault::Fault;
use base::limits::IMAGE_REFERRERS_JSON_BYTES_MAX;
use base::omitted::Category;

/// The annotation by which `cosign save` and hauler distinguish signatures from images.
const KIND: &str = "kind";

/// One referrer.
#[derive(Debug)]
pub(super) struct Referrer {
    pub(super) digest: String,
    /// Its manifest or index, if its entry states a digest that is supported.
    pub(super) entry: Option<Descriptor>,
    /// Its type: `signature`, `SBOM`, or its own media type.
    what: String,
    /// The manifest that it describes, if it is stated.
    pub(super) about: Option<BlobDigest>,
    /// The suffix of cosign's tag, if it has such a tag or would have it in a registry.
    pub(super) suffix: Option<&'static str>,
    /// The names of its entry in `index.json`.
    names: Vec<String>,
}

/// All referrers that a layout lists.
#[derive(Debug, Default)]
pub(super) struct Referrers {
    /// Entries of `index.json` that are not images.
    entries: BTreeSet<BlobDigest>,
    found: Vec<Referrer>,
    /// Whether `index.json` lists exactly one image.
    is_one_image: bool,
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

/// An entry of an index of referrers. Lenient, because only those that are carried must be complete.
#[derive(Debug, Deserialize)]
struct Listed {
    #[serde(rename = "mediaType", default)]
    media_type: String,
    digest: String,
    #[serde(default)]
    size: u64,
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
        let images = tops.iter().filter(|top| !referrers.has(top));
        referrers.is_one_image = distinct(images.map(|image| &image.digest)).len() == 1;
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
                let of = |digest| Descriptor::of(entry.media_type.clone(), digest, entry.size);
                Referrer {
                    digest: entry.digest.clone(),
                    entry: entry.digest.parse().ok().map(of),
                    what: entry
                        .artifact_type
                        .clone()
                        .unwrap_or_else(|| "artifact".to_owned()),
                    about: about.clone(),
                    suffix: None,
                    names: Vec::new(),
                }
            }));
            return;
        }
        let suffix = match &tag {
            Some((of_tag, suffix)) if about.as_ref() == Some(of_tag) => *suffix,
            None if subject.is_none() => kind,
            _ => None,
        };
        let of_cosign = tag.and_then(|(_, suffix)| suffix).or(kind).map(meaning);
        let what = of_cosign
            .map(str::to_owned)
            .or_else(|| document.as_ref().map(Document::what))
            .unwrap_or_else(|| "artifact".to_owned());
        self.found.push(Referrer {
            digest: top.digest.to_string(),
            entry: Some(top.clone()),
            what,
            about,
            suffix: suffix.filter(|suffix| *suffix != OTHER),
            names,
        });
    }

    /// Whether an entry of `index.json` is a referrer.
    pub(super) fn has(&self, entry: &Descriptor) -> bool {
        self.entries.contains(&entry.digest)
    }

    /// Adds the referrers of the image to it if `holder` is given, and counts those that are not
    /// added. If the complete layout is published (`tag` is `None`), all count; otherwise those that
    /// refer to the image, to one of its manifests, or to another counted referrer. `chosen` is the
    /// entry of the image in `index.json`.
    pub(super) fn settle(
        &self,
        holder: Option<&Holder>,
        image: &mut Image,
        chosen: Option<&Descriptor>,
        tag: Option<&str>,
    ) -> Result<(), Fault> {
        let of_image = self.of_image(image, chosen, tag);
        let mut settled = BTreeSet::new();
        if let Some(holder) = holder {
            // A signature without a digest describes the image as it is in the source.
            let top = chosen
                .map(|chosen| &chosen.digest)
                .filter(|digest| **digest == image.top.digest)
                .cloned();
            let about = |referrer: &Referrer| {
                referrer.about.clone().or_else(|| {
                    let is_named = !referrer.names.is_empty() && shares_a_name(referrer, chosen);
                    top.clone().filter(|_| is_named || self.is_one_image)
                })
            };
            settled = carry::add(holder, image, &of_image, about)?;
        }
        // The same object may be listed directly and by the fallback tag.
        for referrer in of_image {
            if settled.insert(referrer.digest.clone()) {
                image.omitted.add(
                    Category::Referrers,
                    format!("{} {}", referrer.what, referrer.digest),
                );
            }
        }
        Ok(())
    }

    /// The referrers that count for the image and are not part of it.
    fn of_image(
        &self,
        image: &Image,
        chosen: Option<&Descriptor>,
        tag: Option<&str>,
    ) -> Vec<&Referrer> {
        let is_part = |digest: &str| {
            digest
                .parse()
                .is_ok_and(|digest: BlobDigest| image.blobs.contains_key(&digest))
        };
        let all = self.found.iter().filter(|found| !is_part(&found.digest));
        if tag.is_none() {
            return all.collect();
        }
        let is_described = |about: &BlobDigest| {
            image.blobs.contains_key(about)
                || chosen.is_some_and(|chosen| chosen.digest == *about)
                || image.absent.contains(&about.to_string())
        };
        let (mut counted, mut others) = (Vec::new(), HashMap::<String, Vec<&Referrer>>::new());
        for referrer in all {
            match &referrer.about {
                Some(about) if is_described(about) => counted.push(referrer),
                Some(about) => others.entry(about.to_string()).or_default().push(referrer),
                None if referrer.names.is_empty() || shares_a_name(referrer, chosen) => {
                    counted.push(referrer);
                }
                None => {}
            }
        }
        let mut at = 0;
        while let Some(referrer) = counted.get(at) {
            counted.extend(others.remove(&referrer.digest).unwrap_or_default());
            at += 1;
        }
        counted
    }
}

fn shares_a_name(referrer: &Referrer, chosen: Option<&Descriptor>) -> bool {
    let of_image = || chosen.into_iter().flat_map(Descriptor::names);
    referrer
        .names
        .iter()
        .any(|name| of_image().any(|own| listing::same_image(name, own)))
}

fn document(holder: &Holder, top: &Descriptor, bytes_left: &mut u64) -> Option<Document> {
    if !matches!(top.media_type.as_str(), OCI_MANIFEST | OCI_INDEX) {
        return None; // Docker's own formats have no subject
    }
    let piece = holder.find(&top.digest.member()).ok()??;
    *bytes_left = bytes_left.checked_sub(piece.size)?;
    holder.json(&piece).ok()
}

/// The kind of hauler for a referrer that cosign does not know.
const OTHER: &str = "referrers";

/// Parses the name of a referrer: the manifest that it describes, and the suffix of cosign's tag.
/// Suffix `None`: a list of referrers.
fn tag_of_referrer(name: &str) -> Option<(BlobDigest, Option<&'static str>)> {
    let tag = name
        .rsplit_once(':')
        .map_or(name, |(_, tag)| tag)
        .strip_prefix("sha256-")?;
    let (hex, suffix) = tag
        .split_once('.')
        .map_or((tag, None), |(hex, suffix)| (hex, Some(suffix)));
    let suffix = match suffix {
        None => None,
        Some(suffix) => Some(SUFFIXES.into_iter().find(|known| *known == suffix)?),
    };
    Some((format!("sha256:{hex}").parse().ok()?, suffix))
}

/// The suffixes of cosign's tags.
const SUFFIXES: [&str; 3] = ["sig", "att", "sbom"];

/// The suffix that cosign gives to a referrer of this kind.
fn kind_of_referrer(kind: &str) -> Option<&'static str> {
    let (program, what) = kind.rsplit_once('/')?;
    match what {
        _ if !matches!(program, "dev.cosignproject.cosign" | "dev.hauler") => None,
        "sigs" => Some("sig"),
        "atts" => Some("att"),
        "sboms" => Some("sbom"),
        "referrers" => Some(OTHER),
        _ => None,
    }
}

/// What a suffix means.
fn meaning(suffix: &str) -> &'static str {
    match suffix {
        "sig" => "signature",
        "att" => "attestation",
        "sbom" => "SBOM",
        _ => "artifact",
    }
}

//! OCI image layouts: from `index.json` to the layers of every platform.
//!
//! This module determines which blobs belong to an image, and checks that they are consistent: the
//! digest and size of every descriptor, the layer count of a config, and the order of its layers.
//! Platforms that an index lists and the source does not contain are left out and counted; the
//! indexes above them are rewritten. If nothing is left out, all bytes stay unchanged.
//! [`super::ImageSource`] calls this module. Only reads.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::mem::take;

use serde::Deserialize;
use serde_json::Value;

use super::decompress::Compression;
use super::holder::{BlobDigest, Check, Holder, Piece, distinct};
use super::listing;
use super::referrers::Referrers;
use base::fault::Fault;
use base::limits::{IMAGE_INDEX_DEPTH_MAX, IMAGE_JSON_TOTAL_BYTES_MAX, OFFENDERS_LISTED_MAX};
use base::omitted::{Category, Omitted};
use base::platform::Platform as Wanted;
use content::manifest::ImageReferrer;

pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// The annotations with the name of an image in `index.json`.
const NAME_ANNOTATIONS: [&str; 2] = ["io.containerd.image.name", REF_NAME];
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The annotation of an attestation with the digest of the manifest that it describes.
const ATTESTED: &str = "vnd.docker.reference.digest";

/// Why an image cannot be used unchanged.
#[derive(Debug)]
pub(super) enum ImageError {
    /// The image is rejected.
    Refused(Fault),
    /// The source does not contain what is selected.
    Absent(Fault),
    /// The OCI parts contradict each other in the way Docker 25 wrote them; `manifest.json` may
    /// still be correct.
    Disagrees(Fault),
}

impl From<Fault> for ImageError {
    fn from(fault: Fault) -> Self {
        Self::Refused(fault)
    }
}

impl ImageError {
    pub(super) fn fault(self) -> Fault {
        match self {
            Self::Refused(fault) | Self::Absent(fault) | Self::Disagrees(fault) => fault,
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Descriptor {
    #[serde(rename = "mediaType", default)]
    pub(super) media_type: String,
    pub(super) digest: BlobDigest,
    pub(super) size: u64,
    platform: Option<Platform>,
    annotations: Option<BTreeMap<String, String>>,
    /// Other locations of the content; such layers are often in no source by design.
    urls: Option<Vec<String>>,
}

impl Descriptor {
    pub(super) fn of(media_type: String, digest: BlobDigest, size: u64) -> Self {
        Self {
            media_type,
            digest,
            size,
            platform: None,
            annotations: None,
            urls: None,
        }
    }

    pub(super) fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.as_ref()?.get(key).map(String::as_str)
    }

    pub(super) fn is_index(&self) -> bool {
        matches!(self.media_type.as_str(), OCI_INDEX | DOCKER_LIST)
    }

    pub(super) fn is_manifest(&self) -> bool {
        matches!(self.media_type.as_str(), OCI_MANIFEST | DOCKER_MANIFEST)
    }

    pub(super) fn is_foreign(&self) -> bool {
        self.urls.as_ref().is_some_and(|urls| !urls.is_empty())
    }

    /// Whether it is a layer of an image whose uncompressed content the config describes.
    fn is_image_layer(&self) -> bool {
        self.media_type
            .starts_with("application/vnd.oci.image.layer.")
            || self
                .media_type
                .starts_with("application/vnd.docker.image.rootfs.")
    }

    /// Whether nobody without the key can read its content.
    fn is_encrypted(&self) -> bool {
        self.media_type.ends_with("+encrypted")
    }

    /// Whether the user selected another platform than that of this manifest.
    fn is_deselected(&self, wanted: &[Wanted]) -> bool {
        let Some(platform) = self.platform.as_ref().filter(|_| !wanted.is_empty()) else {
            return false;
        };
        !self.is_attestation() && !platform.is_selected(wanted)
    }

    /// Whether it is an attestation of Docker: a manifest next to the manifest that it describes.
    fn is_attestation(&self) -> bool {
        self.annotation(ATTESTED).is_some()
            || self
                .platform
                .as_ref()
                .is_some_and(|platform| platform.os == "unknown")
    }

    /// The names of this image in `index.json`.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        NAME_ANNOTATIONS
            .into_iter()
            .filter_map(|key| self.annotation(key))
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
}

impl Platform {
    fn is_selected(&self, wanted: &[Wanted]) -> bool {
        wanted
            .iter()
            .any(|wanted| wanted.selects(&self.os, &self.architecture, &self.variant))
    }

    fn text(&self) -> Option<String> {
        let known = |s: &str| !s.is_empty() && s != "unknown";
        if !known(&self.os) || !known(&self.architecture) {
            return None; // an attestation
        }
        let variant = if self.variant.is_empty() {
            String::new()
        } else {
            format!("/{}", self.variant)
        };
        Some(format!("{}/{}{variant}", self.os, self.architecture))
    }
}

/// The relevant fields of an image's config.
#[derive(Debug, Deserialize)]
pub(super) struct Config {
    #[serde(flatten)]
    platform: Platform,
    rootfs: Option<RootFs>,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    diff_ids: Option<Vec<BlobDigest>>,
}

impl Config {
    pub(super) fn platform(&self) -> Option<String> {
        self.platform.text()
    }

    pub(super) fn is_selected(&self, wanted: &[Wanted]) -> bool {
        // The config of an attestation states no known platform.
        wanted.is_empty() || self.platform.text().is_none() || self.platform.is_selected(wanted)
    }

    /// The digests of the uncompressed layers, if the config lists them.
    pub(super) fn diff_ids(&self) -> Option<&[BlobDigest]> {
        self.rootfs
            .as_ref()
            .map(|r| r.diff_ids.as_deref().unwrap_or_default())
    }
}

/// A manifest or an index; its media type and members determine which.
#[derive(Debug, Deserialize)]
struct Document {
    #[serde(rename = "schemaVersion")]
    schema: Option<u64>,
    #[serde(rename = "mediaType")]
    media_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
    #[serde(rename = "fsLayers")]
    schema1: Option<serde::de::IgnoredAny>,
}

/// `index.json`.
#[derive(Debug, Deserialize)]
pub(super) struct TopIndex {
    #[serde(rename = "schemaVersion")]
    schema: Option<u64>,
    manifests: Option<Vec<Descriptor>>,
}

#[derive(Debug, Deserialize)]
struct LayoutFile {
    #[serde(rename = "imageLayoutVersion")]
    version: String,
}

/// The top manifest or index of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Top {
    pub(super) media_type: String,
    pub(super) digest: BlobDigest,
    pub(super) size: u64,
}

/// All parts of one image. The layers must still be read: `checks`.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) top: Top,
    pub(super) blobs: BTreeMap<BlobDigest, Piece>,
    /// Its manifests and indexes, which referrers may describe.
    pub(super) manifests: BTreeSet<BlobDigest>,
    pub(super) platforms: Vec<String>,
    pub(super) absent: Vec<String>,
    pub(super) checks: Vec<Check>,
    /// What is carried with it; their blobs are among [`Image::blobs`].
    pub(super) referrers: Vec<ImageReferrer>,
    /// What the source contains of this image and the artifact does not.
    pub(super) omitted: Omitted,
    /// Whether a config is for another platform than the selected ones.
    pub(super) is_deselected: bool,
}

/// The descriptors of `index.json`; `None` if the source has none.
pub(super) fn top_descriptors(holder: &Holder) -> Result<Option<Vec<Descriptor>>, Fault> {
    let Some(piece) = holder.find("index.json")? else {
        return Ok(None);
    };
    let index: TopIndex = holder.json(&piece)?;
    if index.schema != Some(2) {
        return Err(holder.refuse("index.json", "unknown schema: its schemaVersion is not 2"));
    }
    let Some(layout) = holder.find("oci-layout")? else {
        return Err(holder.refuse(
            "oci-layout",
            "it is missing: index.json alone does not make an OCI layout",
        ));
    };
    let layout: LayoutFile = holder.json(&layout)?;
    if !layout.version.starts_with("1.") {
        return Err(holder.refuse(
            "oci-layout",
            format!("unknown layout version {:?}", layout.version),
        ));
    }
    Ok(Some(index.manifests.unwrap_or_default()))
}

/// Selects the image of `index.json`. A referrer is selected only if no image matches.
pub(super) fn choose(
    holder: &Holder,
    all: &[Descriptor],
    tag: Option<&str>,
    referrers: &Referrers,
) -> Result<Chosen, Fault> {
    // Positions count the images only.
    let position = |d: &Descriptor| {
        let images = all.iter().filter(|other| !referrers.has(other));
        distinct(images.map(|other| &other.digest))
            .into_iter()
            .position(|digest| *digest == d.digest)
    };
    let label = |d: &Descriptor| listing::label(d.names().last(), position(d));
    let of_tag = |d: &&Descriptor| {
        tag.is_none_or(|tag| {
            d.names().any(|n| listing::matches(n, tag))
                || d.digest.to_string() == tag
                || listing::position(tag).is_some_and(|wanted| position(d) == Some(wanted))
                || listing::is_digest(tag)
                    && config_digest(holder, d).is_some_and(|digest| digest.to_string() == tag)
        })
    };
    let (others, images): (Vec<&Descriptor>, Vec<&Descriptor>) =
        all.iter().filter(of_tag).partition(|d| referrers.has(d));
    let matching = if images.is_empty() { others } else { images };
    match (
        distinct(matching.iter().map(|d| &d.digest)).len(),
        matching.first(),
    ) {
        (0, _) | (_, None) => Err(match tag {
            Some(tag) => {
                let images = all.iter().filter(|d| !referrers.has(d));
                listing::unknown(&holder.shown, tag, images.map(label))
            }
            None => holder.refuse("index.json", "it contains no image"),
        }),
        (1, Some(one)) => Ok(Chosen::One((*one).clone())),
        _ if are_platforms(&matching) => Ok(Chosen::Platforms(distinct_descriptors(&matching))),
        _ => Err(listing::several(
            &holder.shown,
            matching.into_iter().map(label),
        )),
    }
}

/// Whether these are the platforms of one image, listed at the top instead of in their own index.
pub(super) fn are_platforms(all: &[&Descriptor]) -> bool {
    let names: BTreeSet<&str> = all.iter().flat_map(|d| d.names().last()).collect();
    names.len() < 2 && all.iter().all(|d| d.platform.is_some())
}

/// The digest of an image's config, which `docker images` shows as the image ID.
fn config_digest(holder: &Holder, top: &Descriptor) -> Option<BlobDigest> {
    let piece = top
        .is_manifest()
        .then(|| holder.find(&top.digest.member()).ok())??;
    let document: Document = holder.json(&piece?).ok()?;
    Some(document.config?.digest)
}

/// The result of [`choose`].
#[derive(Debug)]
pub(super) enum Chosen {
    One(Descriptor),
    /// Manifests for which an index must be created.
    Platforms(Vec<Descriptor>),
}

impl Chosen {
    /// The entry of the image in `index.json`.
    pub(super) fn entry(&self) -> Option<&Descriptor> {
        match self {
            Self::One(one) => Some(one),
            Self::Platforms(_) => None,
        }
    }
}

fn distinct_descriptors(matching: &[&Descriptor]) -> Vec<Descriptor> {
    let mut seen = BTreeSet::new();
    matching
        .iter()
        .filter(|d| seen.insert(&d.digest))
        .map(|d| (*d).clone())
        .collect()
}

/// The image below a descriptor of `index.json`. If `platforms` are stated, others are left out; if
/// exactly one manifest remains, it is the image, so that its digest is that of the source.
pub(super) fn image(
    holder: &Holder,
    chosen: &Chosen,
    platforms: &[Wanted],
) -> Result<Image, ImageError> {
    if platforms.is_empty() {
        return whole_image(holder, chosen, platforms);
    }
    let tops = match chosen {
        Chosen::One(top) => vec![top.clone()],
        Chosen::Platforms(all) => all.clone(),
    };
    let mut found = Vec::new();
    for top in &tops {
        find_selected(holder, top, platforms, 0, &mut found)?;
    }
    let image = match found.as_slice() {
        [one] => whole_image(holder, &Chosen::One(one.clone()), platforms),
        [] => return Err(no_such_platform(holder, &tops, platforms)?.into()),
        _ => match chosen {
            Chosen::One(_) => whole_image(holder, chosen, platforms),
            Chosen::Platforms(_) => whole_image(holder, &Chosen::Platforms(found), platforms),
        },
    };
    let image = match image {
        Err(ImageError::Absent(_)) => {
            // Damage of the whole image is reported as that.
            let whole = whole_image(holder, chosen, &[])?;
            return Err(absent_platform(holder, platforms, &whole.platforms).into());
        }
        image => image?,
    };
    if image.is_deselected {
        return Err(no_such_platform(holder, &tops, platforms)?.into());
    }
    Ok(image)
}

/// The manifests below a descriptor that may be of a selected platform.
fn find_selected(
    holder: &Holder,
    descriptor: &Descriptor,
    platforms: &[Wanted],
    depth: usize,
    found: &mut Vec<Descriptor>,
) -> Result<(), Fault> {
    if descriptor.is_manifest() {
        let is_new = !found.iter().any(|other| other.digest == descriptor.digest);
        if is_new && !descriptor.is_attestation() && !descriptor.is_deselected(platforms) {
            found.push(descriptor.clone());
        }
        return Ok(());
    }
    for child in children(holder, descriptor, depth)? {
        find_selected(holder, &child, platforms, depth + 1, found)?;
    }
    Ok(())
}

/// The entries of an index in the source; none if it is missing or malformed, which is reported when
/// the image is read.
fn children(
    holder: &Holder,
    descriptor: &Descriptor,
    depth: usize,
) -> Result<Vec<Descriptor>, Fault> {
    if !descriptor.is_index() || depth >= IMAGE_INDEX_DEPTH_MAX {
        return Ok(Vec::new());
    }
    let Some(piece) = holder.find(&descriptor.digest.member())? else {
        return Ok(Vec::new());
    };
    let document: Document = holder.json(&piece)?;
    Ok(document.manifests.unwrap_or_default())
}

/// The fault of a selection that matches nothing.
fn no_such_platform(
    holder: &Holder,
    tops: &[Descriptor],
    platforms: &[Wanted],
) -> Result<Fault, Fault> {
    let mut listed = BTreeSet::new();
    let mut level = tops.to_vec();
    for depth in 0..IMAGE_INDEX_DEPTH_MAX {
        let mut next = Vec::new();
        for descriptor in &level {
            listed.extend(descriptor.platform.as_ref().and_then(Platform::text));
            next.extend(children(holder, descriptor, depth)?);
        }
        level = next;
    }
    Ok(other_platforms(
        holder,
        platforms,
        listed.iter().map(String::as_str),
    ))
}

/// The fault of a selection of platforms that the image lists and the source does not contain.
fn absent_platform(holder: &Holder, platforms: &[Wanted], contained: &[String]) -> Fault {
    let wanted: Vec<String> = platforms.iter().map(ToString::to_string).collect();
    Fault::not_found(format!(
        "image {}: it lists the platform {} but does not contain it, only: {}",
        holder.shown.display(),
        wanted.join(", "),
        contained.join(", ")
    ))
    .with_next("create it again with this platform, choose another one with --platform, or leave --platform out")
}

/// The fault of a selection that matches none of these platforms.
pub(super) fn other_platforms<'a>(
    holder: &Holder,
    platforms: &[Wanted],
    listed: impl Iterator<Item = &'a str>,
) -> Fault {
    let wanted: Vec<String> = platforms.iter().map(ToString::to_string).collect();
    let listed: Vec<&str> = listed.take(OFFENDERS_LISTED_MAX).collect();
    let listed = if listed.is_empty() {
        "another one".to_owned()
    } else {
        listed.join(", ")
    };
    Fault::not_found(format!(
        "image {}: it is not for the platform {}, only for: {listed}",
        holder.shown.display(),
        wanted.join(", ")
    ))
    .with_next("choose one of these with --platform, or leave --platform out")
}

fn whole_image(
    holder: &Holder,
    chosen: &Chosen,
    platforms: &[Wanted],
) -> Result<Image, ImageError> {
    let mut graph = Graph::new(holder, platforms);
    let top = match chosen {
        Chosen::One(top) => match graph.add(top, 0)? {
            Resolution::Complete => Top {
                media_type: top.media_type.clone(),
                digest: top.digest.clone(),
                size: top.size,
            },
            Resolution::Rewritten(new) => {
                graph.omitted.add(
                    Category::ImageDigest,
                    format!("{}, published as {}", top.digest, new.digest),
                );
                new
            }
            Resolution::Absent => return Err(ImageError::Absent(graph.nothing_found(top))),
        },
        Chosen::Platforms(all) => {
            let mut entries = Vec::new();
            for descriptor in all {
                match graph.add(descriptor, 1)? {
                    Resolution::Absent => graph.leave_out(descriptor),
                    Resolution::Complete => entries.push(index_entry(descriptor, None)),
                    Resolution::Rewritten(new) => entries.push(index_entry(descriptor, Some(&new))),
                }
            }
            if entries.is_empty() {
                return Err(ImageError::Absent(
                    holder.refuse("index.json", "none of the listed platforms exists"),
                ));
            }
            graph.add_created(OCI_INDEX, index_bytes(&entries)?)
        }
    };
    graph.finish(top).map_err(ImageError::from)
}

fn index_entry(descriptor: &Descriptor, new: Option<&Top>) -> Value {
    let mut entry = serde_json::Map::new();
    entry.insert("mediaType".into(), descriptor.media_type.clone().into());
    entry.insert(
        "digest".into(),
        new.map_or(&descriptor.digest, |n| &n.digest)
            .to_string()
            .into(),
    );
    entry.insert(
        "size".into(),
        new.map_or(descriptor.size, |n| n.size).into(),
    );
    if let Some(p) = &descriptor.platform {
        let mut platform = serde_json::Map::new();
        platform.insert("architecture".into(), p.architecture.clone().into());
        platform.insert("os".into(), p.os.clone().into());
        if !p.variant.is_empty() {
            platform.insert("variant".into(), p.variant.clone().into());
        }
        entry.insert("platform".into(), platform.into());
    }
    entry.into()
}

fn index_bytes(manifests: &[Value]) -> Result<Vec<u8>, Fault> {
    to_bytes(
        &serde_json::json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests }),
    )
}

/// The bytes of JSON that this program creates: compact, keys in insertion order.
pub(super) fn to_bytes(value: &Value) -> Result<Vec<u8>, Fault> {
    serde_json::to_vec(value)
        .map_err(|e| Fault::internal(format!("serialise the JSON of an image: {e}")))
}

/// The result for a descriptor.
#[derive(Debug, Clone)]
enum Resolution {
    /// Everything below it exists.
    Complete,
    /// An index that lost platforms, and its replacement.
    Rewritten(Top),
    /// The source does not contain it.
    Absent,
}

/// An existing manifest with a missing blob.
#[derive(Debug)]
struct Partial {
    manifest: BlobDigest,
    missing: BlobDigest,
    layers_there: Vec<BlobDigest>,
}

struct Graph<'a> {
    holder: &'a Holder,
    /// The platforms that the user selected; all if empty.
    selected: &'a [Wanted],
    /// Whether the config of a manifest is for another platform than the selected ones.
    is_deselected: bool,
    blobs: BTreeMap<BlobDigest, Piece>,
    manifests: BTreeSet<BlobDigest>,
    platforms: Vec<String>,
    absent: BTreeSet<BlobDigest>,
    omitted: Omitted,
    checks: BTreeMap<(BlobDigest, Option<BlobDigest>), Check>,
    partials: Vec<Partial>,
    seen: HashMap<BlobDigest, Resolution>,
    json_bytes: u64,
}

impl<'a> Graph<'a> {
    fn new(holder: &'a Holder, selected: &'a [Wanted]) -> Self {
        Self {
            holder,
            selected,
            is_deselected: false,
            blobs: BTreeMap::new(),
            manifests: BTreeSet::new(),
            platforms: Vec::new(),
            absent: BTreeSet::new(),
            omitted: Omitted::default(),
            checks: BTreeMap::new(),
            partials: Vec::new(),
            seen: HashMap::new(),
            json_bytes: 0,
        }
    }

    /// Adds a manifest or an index, and everything below it.
    fn add(&mut self, descriptor: &Descriptor, depth: usize) -> Result<Resolution, ImageError> {
        if let Some(found) = self.seen.get(&descriptor.digest) {
            return Ok(found.clone());
        }
        let Some(piece) = self.find(descriptor)? else {
            return Ok(Resolution::Absent);
        };
        let bytes = self.read_verified(&piece, descriptor)?;
        let document: Document = self.holder.parse(&piece.name, &bytes)?;
        self.check_document(&piece, descriptor, &document)?;
        let found = match descriptor.media_type.as_str() {
            OCI_INDEX | DOCKER_LIST if depth < IMAGE_INDEX_DEPTH_MAX => self.index(
                &piece,
                &bytes,
                document.manifests.as_deref().unwrap_or_default(),
                depth,
            )?,
            OCI_INDEX | DOCKER_LIST => {
                return Err(self
                    .holder
                    .refuse(
                        &piece.name,
                        format!("indexes are nested deeper than {IMAGE_INDEX_DEPTH_MAX}"),
                    )
                    .into());
            }
            OCI_MANIFEST | DOCKER_MANIFEST => self.manifest(&piece, descriptor, document)?,
            other => {
                return Err(self
                    .holder
                    .refuse(&piece.name, format!("unknown media type {other:?}"))
                    .into());
            }
        };
        if matches!(found, Resolution::Complete) {
            self.blobs.insert(descriptor.digest.clone(), piece);
            self.manifests.insert(descriptor.digest.clone());
        }
        self.seen.insert(descriptor.digest.clone(), found.clone());
        Ok(found)
    }

    /// Adds an entry of an index. An entry that is no manifest is a blob: the indexes of BuildKit's
    /// caches list layers.
    fn add_child(
        &mut self,
        descriptor: &Descriptor,
        depth: usize,
    ) -> Result<Resolution, ImageError> {
        if descriptor.is_manifest() || descriptor.is_index() || descriptor.media_type.is_empty() {
            return self.add(descriptor, depth);
        }
        let Some(piece) = self.find(descriptor)? else {
            return Ok(Resolution::Absent);
        };
        self.blob(descriptor, &piece, None);
        Ok(Resolution::Complete)
    }

    fn check_document(
        &self,
        piece: &Piece,
        descriptor: &Descriptor,
        document: &Document,
    ) -> Result<(), Fault> {
        let refuse = |why: String| Err(self.holder.refuse(&piece.name, why));
        if document.schema == Some(1) || document.schema1.is_some() {
            return refuse(
                "it is a Docker schema 1 manifest, which is not supported: build or push the image again with a current tool".into(),
            );
        }
        if document.schema != Some(2) {
            return refuse("unknown schema: its schemaVersion is not 2".into());
        }
        if document.manifests.is_some() && (document.layers.is_some() || document.config.is_some())
        {
            return refuse("it is declared as both a manifest and an index".into());
        }
        match document.media_type.as_deref() {
            Some(own) if own != descriptor.media_type => refuse(format!(
                "it is declared as {own:?} but listed as {:?}",
                descriptor.media_type
            )),
            _ => Ok(()),
        }
    }

    fn index(
        &mut self,
        piece: &Piece,
        bytes: &[u8],
        children: &[Descriptor],
        depth: usize,
    ) -> Result<Resolution, ImageError> {
        // Attestations come last: an attestation of a missing image is left out with it.
        let mut states = vec![Resolution::Absent; children.len()];
        let (attestations, images): (Vec<usize>, Vec<usize>) =
            (0..children.len()).partition(|i| children[*i].annotation(ATTESTED).is_some());
        for i in images {
            if !children[i].is_deselected(self.selected) {
                states[i] = self.add_child(&children[i], depth + 1)?;
            }
        }
        let is_absent = |states: &[Resolution], digest: &str| {
            children.iter().zip(states).any(|(c, f)| {
                matches!(f, Resolution::Absent)
                    && c.annotation(ATTESTED).is_none()
                    && c.digest.to_string() == digest
            })
        };
        for i in attestations {
            if !children[i]
                .annotation(ATTESTED)
                .is_some_and(|about| is_absent(&states, about))
            {
                states[i] = self.add_child(&children[i], depth + 1)?;
            }
        }
        let is_deselected = |child: &Descriptor| {
            let about = child.annotation(ATTESTED);
            child.is_deselected(self.selected)
                || children.iter().any(|other| {
                    other.is_deselected(self.selected)
                        && about == Some(other.digest.to_string().as_str())
                })
        };
        let left_out: Vec<&Descriptor> = children
            .iter()
            .zip(&states)
            .filter(|(child, state)| matches!(state, Resolution::Absent) && !is_deselected(child))
            .map(|(child, _)| child)
            .collect();
        for child in left_out {
            self.leave_out(child);
        }
        if states.iter().all(|f| matches!(f, Resolution::Complete)) {
            return Ok(if children.is_empty() {
                Resolution::Absent
            } else {
                Resolution::Complete
            });
        }
        if states.iter().all(|f| matches!(f, Resolution::Absent)) {
            return Ok(Resolution::Absent);
        }
        let mut value: Value = self.holder.parse(&piece.name, bytes)?;
        let media_type = value
            .get("mediaType")
            .and_then(Value::as_str)
            .unwrap_or(OCI_INDEX)
            .to_owned();
        if let Some(Value::Array(entries)) = value.get_mut("manifests") {
            *entries = take(entries)
                .into_iter()
                .zip(&states)
                .filter_map(|(entry, state)| rewritten(entry, state))
                .collect();
        }
        Ok(Resolution::Rewritten(
            self.add_created(&media_type, to_bytes(&value)?),
        ))
    }

    /// Records a manifest or an index that is left out.
    fn leave_out(&mut self, child: &Descriptor) {
        // For an existing index without content, its children are counted instead.
        let is_counted = matches!(child.media_type.as_str(), OCI_INDEX | DOCKER_LIST)
            && self.seen.contains_key(&child.digest);
        if !self.absent.insert(child.digest.clone()) || is_counted {
            return;
        }
        if child.is_attestation() {
            return self
                .omitted
                .add(Category::Referrers, format!("attestation {}", child.digest));
        }
        let platform = child.platform.as_ref().and_then(Platform::text);
        self.omitted.add(
            Category::Platforms,
            platform.unwrap_or_else(|| child.digest.to_string()),
        );
    }

    fn manifest(
        &mut self,
        piece: &Piece,
        descriptor: &Descriptor,
        document: Document,
    ) -> Result<Resolution, ImageError> {
        let Some(config) = document.config else {
            return Err(self
                .holder
                .refuse(&piece.name, "the manifest contains no config")
                .into());
        };
        let layers = document.layers.unwrap_or_default();
        let config_piece = self.find(&config)?;
        let mut pieces = Vec::with_capacity(layers.len());
        for layer in &layers {
            pieces.push(self.find(layer)?);
        }
        let missing = if config_piece.is_none() {
            Some(&config.digest)
        } else {
            layers
                .iter()
                .zip(&pieces)
                .find(|(layer, piece)| piece.is_none() && !layer.is_foreign())
                .map(|(l, _)| &l.digest)
        };
        let (Some(config_piece), None) = (&config_piece, missing) else {
            let missing = missing.unwrap_or(&config.digest).clone();
            let layers_there = layers
                .iter()
                .zip(&pieces)
                .filter(|(_, p)| p.is_some())
                .map(|(l, _)| l.digest.clone())
                .collect();
            self.partials.push(Partial {
                manifest: descriptor.digest.clone(),
                missing,
                layers_there,
            });
            return Ok(Resolution::Absent);
        };
        let mut diff_ids = vec![None; layers.len()];
        let mut platform = descriptor.platform.as_ref().and_then(Platform::text);
        if matches!(config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG) {
            let bytes = self.read_verified(config_piece, &config)?;
            let parsed: Config = self.holder.parse(&config_piece.name, &bytes)?;
            // An artifact may have the config of an image that describes no layers.
            let describes_layers = |listed: &&[BlobDigest]| {
                !listed.is_empty() || layers.iter().any(Descriptor::is_image_layer)
            };
            if let Some(listed) = parsed.diff_ids().filter(describes_layers) {
                self.check_layers_match(piece, &layers, &pieces, listed)?;
                diff_ids = listed
                    .iter()
                    .zip(&layers)
                    .map(|(id, layer)| (!layer.is_encrypted()).then(|| id.clone()))
                    .collect();
            }
            self.is_deselected |= !parsed.is_selected(self.selected);
            platform = parsed.platform().or(platform);
        } else {
            // Not the config of an image (a chart, a signature…): an ordinary blob.
            self.blob(&config, config_piece, None);
        }
        self.blobs
            .insert(config.digest.clone(), config_piece.clone());
        for ((layer, piece), diff_id) in layers.iter().zip(&pieces).zip(diff_ids) {
            match piece {
                Some(piece) => self.blob(layer, piece, diff_id),
                None => {
                    let layer = layer.digest.to_string();
                    self.omitted.add(Category::ForeignLayers, layer);
                }
            }
        }
        if let Some(platform) = platform.filter(|p| !self.platforms.contains(p)) {
            self.platforms.push(platform);
        }
        Ok(Resolution::Complete)
    }

    /// Checks the layers against the config, as far as possible without reading them.
    fn check_layers_match(
        &self,
        manifest: &Piece,
        layers: &[Descriptor],
        pieces: &[Option<Piece>],
        diff_ids: &[BlobDigest],
    ) -> Result<(), ImageError> {
        let disagree = |why: String| {
            Err(ImageError::Disagrees(
                self.holder.refuse(&manifest.name, why),
            ))
        };
        if layers.len() != diff_ids.len() {
            return disagree(format!(
                "it has {} layers, but the config lists {} (diff_ids)",
                layers.len(),
                diff_ids.len()
            ));
        }
        for (i, ((layer, piece), diff_id)) in layers.iter().zip(pieces).zip(diff_ids).enumerate() {
            let Some(piece) = piece.as_ref().filter(|_| !layer.is_encrypted()) else {
                continue;
            };
            if &layer.digest != diff_id && self.holder.compression(piece)? == Compression::None {
                return disagree(format!(
                    "layer {} is {}, but the config lists {diff_id}",
                    i + 1,
                    layer.digest
                ));
            }
        }
        Ok(())
    }

    fn blob(&mut self, descriptor: &Descriptor, piece: &Piece, diff_id: Option<BlobDigest>) {
        self.blobs.insert(descriptor.digest.clone(), piece.clone());
        let check = Check {
            piece: piece.clone(),
            digest: Some(descriptor.digest.clone()),
            diff_id: diff_id.clone(),
        };
        self.checks
            .insert((descriptor.digest.clone(), diff_id), check);
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

    /// The bytes of a JSON blob, after its digest was checked.
    fn read_verified(&mut self, piece: &Piece, descriptor: &Descriptor) -> Result<Vec<u8>, Fault> {
        self.json_bytes += piece.size;
        if self.json_bytes > IMAGE_JSON_TOTAL_BYTES_MAX {
            let why = format!(
                "the manifests and configs of the image have more than {IMAGE_JSON_TOTAL_BYTES_MAX} bytes"
            );
            return Err(self.holder.refuse(&piece.name, why));
        }
        let bytes = self.holder.read_small(piece)?;
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
        Ok(bytes)
    }

    fn add_created(&mut self, media_type: &str, bytes: Vec<u8>) -> Top {
        let top = Top {
            media_type: media_type.into(),
            digest: BlobDigest::of(&bytes),
            size: bytes.len() as u64,
        };
        self.blobs.insert(
            top.digest.clone(),
            Piece::created(top.digest.member(), bytes),
        );
        self.manifests.insert(top.digest.clone());
        top
    }

    fn nothing_found(&self, top: &Descriptor) -> Fault {
        match self.partials.first() {
            Some(p) => self.holder.refuse(
                &p.missing.member(),
                format!("it is missing: manifest {} needs it", p.manifest),
            ),
            None if self.absent.is_empty() => self
                .holder
                .refuse(&top.digest.member(), "it is missing: index.json lists it"),
            None => self
                .holder
                .refuse(&top.digest.member(), "none of the listed platforms exists"),
        }
    }

    fn finish(self, top: Top) -> Result<Image, Fault> {
        // A platform that was left out intentionally has only layers that it shares. A platform
        // with its own layer is damaged.
        for partial in &self.partials {
            if let Some(own) = partial
                .layers_there
                .iter()
                .find(|l| !self.blobs.contains_key(l))
            {
                let why = format!(
                    "it is missing: manifest {} needs it, and its layer {own} exists",
                    partial.manifest
                );
                return Err(self.holder.refuse(&partial.missing.member(), why));
            }
        }
        Ok(Image {
            top,
            blobs: self.blobs,
            manifests: self.manifests,
            platforms: self.platforms,
            absent: self.absent.iter().map(ToString::to_string).collect(),
            checks: self.checks.into_values().collect(),
            referrers: Vec::new(),
            omitted: self.omitted,
            is_deselected: self.is_deselected,
        })
    }
}

fn rewritten(mut entry: Value, state: &Resolution) -> Option<Value> {
    match state {
        Resolution::Complete => Some(entry),
        Resolution::Absent => None,
        Resolution::Rewritten(new) => {
            entry["digest"] = new.digest.to_string().into();
            entry["size"] = new.size.into();
            Some(entry)
        }
    }
}

//! `docker save` archives: `manifest.json`, a config and `layer.tar` files, without a registry
//! manifest.
//!
//! If the archive also contains OCI parts (Docker 25 and later), those are used, unless they
//! contradict the config. Otherwise an OCI manifest is created from the unchanged config and
//! layers: the same archive always gives the same bytes and the same digest. [`super::ImageSource`]
//! calls this module. Only reads.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;

use super::all::ContainedImage;
use super::decompress::{Caps, Compression};
use super::holder::{BlobDigest, Check, Holder, Piece};
use super::listing;
use super::oci::{Config, Descriptor, Image, OCI_CONFIG, OCI_MANIFEST, Top, to_bytes};
use base::fault::Fault;
use base::omitted::Omitted;
use base::platform::Platform;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// One image of `manifest.json`.
#[derive(Debug, Deserialize)]
pub(super) struct Listed {
    #[serde(rename = "Config", alias = "config")]
    config: String,
    #[serde(rename = "RepoTags", alias = "repoTags", alias = "repotags")]
    tags: Option<Vec<String>>,
    #[serde(rename = "Layers", alias = "layers")]
    layers: Option<Vec<String>>,
}

impl Listed {
    pub(super) fn tags(&self) -> impl Iterator<Item = &str> {
        self.tags.iter().flatten().map(String::as_str)
    }

    /// Whether this is the config with this digest, by its name.
    fn has_config(&self, digest: &str) -> bool {
        let file = self.config.rsplit('/').next().unwrap_or_default();
        let stem = file.strip_suffix(".json").unwrap_or(file);
        digest.strip_prefix("sha256:") == Some(stem)
    }
}

/// How the layers of an archive are stored in the artifact.
#[derive(Debug, Clone, Copy)]
pub(super) enum Layers<'a> {
    AsTheyAre,
    /// Compressed with gzip, into this directory.
    Compressed(&'a Path),
}

/// The selected image of `manifest.json`, with its config read and checked.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) config_digest: BlobDigest,
    /// The names of the image.
    pub(super) tags: Vec<String>,
    config_piece: Piece,
    config: Config,
    layers: Vec<String>,
}

/// Reads `manifest.json` and selects an image. Returns `None` if the archive has no
/// `manifest.json`, or if its config is missing and there are OCI parts (`has_oci`): then the
/// platform of that config was left out. `None` also if only an OCI part has the selected digest.
pub(super) fn saved(
    holder: &Holder,
    tag: Option<&str>,
    tops: Option<&[Descriptor]>,
) -> Result<Option<Saved>, Fault> {
    let Some(piece) = holder.find("manifest.json")? else {
        return Ok(None);
    };
    let all: Vec<Listed> = holder.json(&piece)?;
    let is_chosen = |at: usize, listed: &Listed, tag: &str| {
        listed.tags().any(|own| listing::matches(own, tag))
            || listing::position(tag) == Some(at)
            || listed.has_config(tag)
    };
    let mut matching: Vec<(usize, &Listed)> = all
        .iter()
        .enumerate()
        .filter(|(at, listed)| tag.is_none_or(|tag| is_chosen(*at, listed, tag)))
        .collect();
    let tags: Vec<String> = matching
        .iter()
        .flat_map(|(_, listed)| listed.tags())
        .map(str::to_owned)
        .collect();
    // The same image may be listed again with another name.
    matching.dedup_by(|(_, a), (_, b)| a.config == b.config && a.layers == b.layers);
    // All names of an image, or its position.
    let labels = |(at, listed): (usize, &Listed)| {
        let mut labels: Vec<String> = listed.tags().map(str::to_owned).collect();
        if labels.is_empty() {
            labels.push(listing::label(None, Some(at)));
        }
        labels
    };
    let is_oci =
        |tag: &str| tops.is_some_and(|tops| tops.iter().any(|top| top.digest.to_string() == tag));
    let chosen = match matching.as_slice() {
        [(_, one)] => *one,
        [] if tag.is_some_and(is_oci) => return Ok(None),
        [] => {
            return Err(match tag {
                Some(tag) => {
                    listing::unknown(&holder.shown, tag, all.iter().enumerate().flat_map(labels))
                }
                None => holder.refuse("manifest.json", "it contains no image"),
            });
        }
        _ => {
            return Err(listing::several(
                &holder.shown,
                matching.into_iter().flat_map(labels),
            ));
        }
    };
    if tops.is_some() && holder.find(&chosen.config)?.is_none() {
        return Ok(None);
    }
    let config_piece = require(holder, &chosen.config)?;
    let bytes = holder.read_small(&config_piece)?;
    let config_digest = BlobDigest::of(&bytes);
    check_name(holder, &config_piece, &config_digest)?;
    let config = holder.parse(&config_piece.name, &bytes)?;
    let layers = chosen.layers.clone().unwrap_or_default();
    Ok(Some(Saved {
        config_digest,
        tags,
        config_piece,
        config,
        layers,
    }))
}

/// All images of `manifest.json`, which lists an image again for another name; `None`: the archive has
/// no `manifest.json`.
pub(super) fn all(holder: &Holder) -> Result<Option<Vec<ContainedImage>>, Fault> {
    let Some(piece) = holder.find("manifest.json")? else {
        return Ok(None);
    };
    let all: Vec<Listed> = holder.json(&piece)?;
    let mut images: Vec<ContainedImage> = Vec::new();
    for (position, listed) in all.iter().enumerate() {
        let same = all[..position]
            .iter()
            .position(|other| other.config == listed.config && other.layers == listed.layers);
        let same = same.map(|other| listing::label(None, Some(other)));
        let known = images
            .iter_mut()
            .find(|image| same.is_some() && image.selection == same);
        if let Some(image) = known {
            image.names.extend(listed.tags().map(str::to_owned));
            continue;
        }
        // With OCI parts, an image whose config is missing is of a platform that was left out.
        let digest = match holder.find(&listed.config)? {
            Some(config) => BlobDigest::of(&holder.read_small(&config)?),
            None => continue,
        };
        images.push(listed.contained(position, &digest));
    }
    Ok(Some(images))
}

fn require(holder: &Holder, name: &str) -> Result<Piece, Fault> {
    holder
        .find(name)?
        .ok_or_else(|| holder.refuse(name, "it is missing: manifest.json lists it"))
}

/// A config is named by its digest, `<hex>.json` or `blobs/sha256/<hex>`. Other names are not
/// checked.
fn check_name(holder: &Holder, piece: &Piece, digest: &BlobDigest) -> Result<(), Fault> {
    let file = piece.name.rsplit('/').next().unwrap_or_default();
    let stem = file.strip_suffix(".json").unwrap_or(file);
    match format!("sha256:{stem}").parse::<BlobDigest>() {
        Ok(named) if named != *digest => Err(holder.refuse(
            &piece.name,
            format!("wrong digest: its name states {named}, but it is {digest}"),
        )),
        _ => Ok(()),
    }
}

impl Saved {
    pub(super) fn platform(&self) -> Option<String> {
        self.config.platform()
    }

    pub(super) fn is_selected(&self, platforms: &[Platform]) -> bool {
        self.config.is_selected(platforms)
    }

    /// Converts it to an OCI image. Reads all layers and compares them with the config.
    pub(super) fn image(
        self,
        holder: &Holder,
        caps: Caps,
        stored: Layers<'_>,
    ) -> Result<Image, Fault> {
        let Some(diff_ids) = self.config.diff_ids() else {
            return Err(holder.refuse(
                &self.config_piece.name,
                "the config lists no layers (rootfs.diff_ids)",
            ));
        };
        if diff_ids.len() != self.layers.len() {
            let why = format!(
                "it lists {} layers, but the config lists {} (diff_ids)",
                self.layers.len(),
                diff_ids.len()
            );
            return Err(holder.refuse("manifest.json", why));
        }
        let pieces = self
            .layers
            .iter()
            .map(|name| require(holder, name))
            .collect::<Result<Vec<_>, _>>()?;
        let checks: Vec<Check> = pieces
            .iter()
            .zip(diff_ids)
            .map(|(piece, diff_id)| Check {
                piece: piece.clone(),
                digest: None,
                diff_id: Some(diff_id.clone()),
            })
            .collect();
        let digests = holder.check_all(&checks, caps)?;
        let mut blobs = BTreeMap::new();
        let mut layers = Vec::with_capacity(digests.len());
        let mut compressed: BTreeMap<BlobDigest, (BlobDigest, Piece)> = BTreeMap::new();
        for (mut piece, mut digest) in pieces.into_iter().zip(digests) {
            if let Layers::Compressed(folder) = stored
                && holder.compression(&piece)? == Compression::None
            {
                let (new, made) = match compressed.get(&digest) {
                    Some(made) => made.clone(),
                    None => {
                        let file = folder.join(format!("layer-{}.tar.gz", compressed.len()));
                        let made = holder.compress(&piece, &file)?;
                        compressed.insert(digest.clone(), made.clone());
                        made
                    }
                };
                (digest, piece) = (new, made);
            }
            let suffix = match holder.compression(&piece)? {
                Compression::Gzip => "+gzip",
                Compression::Zstd => "+zstd",
                // A layer in another form was refused.
                _ => "",
            };
            layers.push(serde_json::json!({ "mediaType": format!("{LAYER}{suffix}"), "digest": digest.to_string(), "size": piece.size }));
            blobs.insert(digest.clone(), piece);
        }
        let bytes = to_bytes(&serde_json::json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": { "mediaType": OCI_CONFIG, "digest": self.config_digest.to_string(), "size": self.config_piece.size },
            "layers": layers,
        }))?;
        blobs.insert(self.config_digest, self.config_piece);
        let top = Top {
            media_type: OCI_MANIFEST.into(),
            digest: BlobDigest::of(&bytes),
            size: bytes.len() as u64,
        };
        blobs.insert(
            top.digest.clone(),
            Piece::created(top.digest.member(), bytes),
        );
        let platforms: Vec<String> = self.config.platform().into_iter().collect();
        Ok(Image {
            manifests: BTreeSet::from([top.digest.clone()]),
            top,
            blobs,
            platforms,
            absent: Vec::new(),
            checks: Vec::new(),
            referrers: Vec::new(),
            omitted: Omitted::default(),
            is_deselected: false,
        })
    }
}

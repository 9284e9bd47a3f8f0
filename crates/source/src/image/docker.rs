//! `docker save` archives: `manifest.json`, a config and `layer.tar`s, with no registry manifest
//! inside.
//!
//! Where the archive has OCI parts beside it (Docker 25 and later) those are taken, unless they
//! contradict the config. Else an OCI manifest is made from the config and the layers as they are:
//! the same archive gives the same bytes, and so the same digest, every time. Called by
//! [`super::ImageSource`]; reads only.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::decompress::{Caps, Compression};
use super::holder::{BlobDigest, Check, Holder, Piece};
use super::listing;
use super::oci::{Config, Image, OCI_CONFIG, OCI_MANIFEST, Top, to_bytes};
use base::fault::Fault;
use base::omitted::Omitted;

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// One image of `manifest.json`.
#[derive(Debug, Deserialize)]
struct Listed {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "RepoTags")]
    tags: Option<Vec<String>>,
    #[serde(rename = "Layers")]
    layers: Option<Vec<String>>,
}

impl Listed {
    fn tags(&self) -> impl Iterator<Item = &str> {
        self.tags.iter().flatten().map(String::as_str)
    }
}

/// The image of `manifest.json` that is meant, its config read and checked.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) config_digest: BlobDigest,
    /// The names it goes by.
    pub(super) tags: Vec<String>,
    config_piece: Piece,
    config: Config,
    layers: Vec<String>,
}

/// Reads `manifest.json` and chooses from it; `None` when the archive has none, or when it names a
/// config that is not there while there are OCI parts (`has_oci`): the platform it speaks of was
/// left out.
pub(super) fn saved(
    holder: &Holder,
    tag: Option<&str>,
    has_oci: bool,
) -> Result<Option<Saved>, Fault> {
    let Some(piece) = holder.find("manifest.json")? else {
        return Ok(None);
    };
    let all: Vec<Listed> = holder.json(&piece)?;
    let mut some: Vec<&Listed> = all
        .iter()
        .filter(|l| tag.is_none_or(|tag| l.tags().any(|t| listing::matches(t, tag))))
        .collect();
    let tags: Vec<String> = some
        .iter()
        .flat_map(|listed| listed.tags())
        .map(str::to_owned)
        .collect();
    // The same image listed again under another name.
    some.dedup_by(|a, b| a.config == b.config && a.layers == b.layers);
    let chosen = match some.as_slice() {
        [one] => *one,
        [] => {
            return Err(match tag {
                Some(tag) => {
                    listing::unknown(&holder.shown, tag, all.iter().flat_map(Listed::tags))
                }
                None => holder.refuse("manifest.json", "it lists no image"),
            });
        }
        _ => {
            return Err(listing::several(
                &holder.shown,
                some.iter().flat_map(|l| l.tags()),
            ));
        }
    };
    if has_oci && holder.find(&chosen.config)?.is_none() {
        return Ok(None);
    }
    let config_piece = needed(holder, &chosen.config)?;
    let bytes = holder.read_small(&config_piece)?;
    let config_digest = BlobDigest::of(&bytes);
    named_right(holder, &config_piece, &config_digest)?;
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

fn needed(holder: &Holder, name: &str) -> Result<Piece, Fault> {
    holder
        .find(name)?
        .ok_or_else(|| holder.refuse(name, "it is missing: manifest.json lists it"))
}

/// A config is named by its digest, `<hex>.json` or `blobs/sha256/<hex>`; another name says
/// nothing.
fn named_right(holder: &Holder, piece: &Piece, digest: &BlobDigest) -> Result<(), Fault> {
    let file = piece.name.rsplit('/').next().unwrap_or_default();
    let stem = file.strip_suffix(".json").unwrap_or(file);
    match format!("sha256:{stem}").parse::<BlobDigest>() {
        Ok(named) if named != *digest => Err(holder.refuse(
            &piece.name,
            format!("wrong digest: by its name it should be {named} and is {digest}"),
        )),
        _ => Ok(()),
    }
}

impl Saved {
    /// Makes an OCI image of it. All layers are read and compared with the config.
    pub(super) fn image(self, holder: &Holder, caps: Caps) -> Result<Image, Fault> {
        let Some(diff_ids) = self.config.diff_ids() else {
            return Err(holder.refuse(
                &self.config_piece.name,
                "the config lists no layers (rootfs.diff_ids)",
            ));
        };
        if diff_ids.len() != self.layers.len() {
            let why = format!(
                "it lists {} layers and the config {} (diff_ids)",
                self.layers.len(),
                diff_ids.len()
            );
            return Err(holder.refuse("manifest.json", why));
        }
        let pieces = self
            .layers
            .iter()
            .map(|name| needed(holder, name))
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
        for (piece, digest) in pieces.into_iter().zip(&digests) {
            let suffix = match holder.compression(&piece)? {
                Compression::Gzip => "+gzip",
                Compression::Zstd => "+zstd",
                Compression::None | Compression::Foreign(_) => "",
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
        blobs.insert(top.digest.clone(), Piece::made(top.digest.member(), bytes));
        let platforms = self.config.platform().into_iter().collect();
        Ok(Image {
            top,
            blobs,
            platforms,
            absent: Vec::new(),
            checks: Vec::new(),
            omitted: Omitted::default(),
        })
    }
}

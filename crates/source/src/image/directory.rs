//! The directory of `skopeo copy … dir:` and `podman save --format docker-dir`: `version`,
//! `manifest.json`, and one file for each blob, named by the hex digits of its digest.

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::holder::{BlobDigest, Holder};
use super::oci::{Descriptor, OCI_INDEX, OCI_MANIFEST};
use base::fault::Fault;

/// The start of the file `version`.
const VERSION: &[u8] = b"Directory Transport Version: 1.";

#[derive(Deserialize)]
struct Manifest {
    #[serde(rename = "mediaType")]
    media_type: Option<String>,
    manifests: Option<IgnoredAny>,
}

/// The top manifest of such a directory; `None` if it is not one.
pub(super) fn top(holder: &Holder) -> Result<Option<(BlobDigest, Descriptor)>, Fault> {
    let Some(version) = holder.find("version")? else {
        return Ok(None);
    };
    let Some(manifest) = holder.find("manifest.json")? else {
        return Ok(None);
    };
    if version.size > 1024 || !holder.read_small(&version)?.starts_with(VERSION) {
        return Ok(None);
    }
    let bytes = holder.read_small(&manifest)?;
    let parsed: Manifest = holder.parse("manifest.json", &bytes)?;
    let of_shape = if parsed.manifests.is_some() {
        OCI_INDEX
    } else {
        OCI_MANIFEST
    };
    let media_type = parsed.media_type.unwrap_or_else(|| of_shape.to_owned());
    let digest = BlobDigest::of(&bytes);
    let descriptor = Descriptor::of(media_type, digest.clone(), bytes.len() as u64);
    Ok(Some((digest, descriptor)))
}

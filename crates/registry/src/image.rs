//! The parts of an OCI image: digests, descriptors, manifests and indexes, and the walk from the
//! top manifest to every blob.
//!
//! Pure except [`walk`], which asks its caller for the bytes. Supports the media types of OCI and
//! of Docker.

use std::collections::HashSet;
use std::future::Future;

use bytes::Bytes;
use serde::Deserialize;

use base::fault::Fault;
use base::limits::{self, IMAGE_JSON_VALUES_MAX};
use base::platform::Platform;
pub use base::sha256::Sha256;
use base::text::check_values;

/// The media type of an OCI index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// The media type of an OCI manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// The media type of a Docker index.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// The media type of a Docker manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// The annotation with the name of an image in an OCI layout.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// A reference to a blob or manifest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Sha256,
    /// In bytes.
    pub size: u64,
    /// Other locations of the content; such layers are often not in any registry.
    #[serde(default)]
    pub urls: Option<Vec<String>>,
    /// The platform of a manifest, as its index states it.
    #[serde(default)]
    pub platform: Option<StatedPlatform>,
}

/// A platform in an index.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct StatedPlatform {
    pub os: Option<String>,
    pub architecture: Option<String>,
    pub variant: Option<String>,
}

impl Descriptor {
    /// Whether it refers to a manifest or index, which is pushed as such.
    pub fn is_manifest(&self) -> bool {
        [OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST].contains(&self.media_type.as_str())
    }

    /// Whether it is a manifest for none of these platforms; of an attestation, `unknown` is stated.
    pub fn is_deselected(&self, platforms: &[Platform]) -> bool {
        let Some(stated) = self.platform.as_ref().filter(|_| !platforms.is_empty()) else {
            return false;
        };
        let [os, architecture, variant] = [&stated.os, &stated.architecture, &stated.variant]
            .map(|text| text.as_deref().unwrap_or_default());
        os != "unknown"
            && !platforms
                .iter()
                .any(|wanted| wanted.selects(os, architecture, variant))
    }

    /// Whether registries may lack it by design.
    pub fn is_foreign(&self) -> bool {
        self.urls.as_ref().is_some_and(|urls| !urls.is_empty())
    }
}

/// A manifest or index, reduced to its references.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// The stated media type, or the one implied by the fields.
    pub media_type: String,
    /// References to manifests and indexes.
    pub manifests: Vec<Descriptor>,
    /// References to blobs: the configuration and the layers.
    pub blobs: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: u32,
    media_type: Option<String>,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    blobs: Option<Vec<Descriptor>>,
}

impl Document {
    /// Parses a document. `digest` is only for messages.
    pub fn parse(bytes: &[u8], digest: &Sha256) -> Result<Self, Fault> {
        check_values(bytes, IMAGE_JSON_VALUES_MAX).map_err(|values| {
            Fault::integrity(format!(
                "image manifest {digest} has {values} values; {IMAGE_JSON_VALUES_MAX} are allowed"
            ))
        })?;
        let raw: Raw = serde_json::from_slice(bytes)
            .map_err(|e| Fault::integrity(format!("image manifest {digest}: {e}")))?;
        if raw.schema_version != 2 {
            return Err(Fault::integrity(format!(
                "image manifest {digest}: schema version {} is not supported",
                raw.schema_version
            ))
            .with_next("push the image again with a current tool, which writes schema version 2"));
        }
        let shape = if raw.manifests.is_some() {
            OCI_INDEX
        } else {
            OCI_MANIFEST
        };
        if raw.manifests.is_none() && raw.config.is_none() && raw.blobs.is_none() {
            return Err(Fault::integrity(format!(
                "image manifest {digest}: it is neither a manifest nor an index"
            )));
        }
        let (manifests, others): (Vec<_>, Vec<_>) = raw
            .manifests
            .unwrap_or_default()
            .into_iter()
            .partition(Descriptor::is_manifest);
        let layers = raw
            .layers
            .unwrap_or_default()
            .into_iter()
            .chain(raw.blobs.unwrap_or_default());
        let blobs = others.into_iter().chain(raw.config).chain(layers).collect();
        Ok(Self {
            media_type: raw.media_type.unwrap_or_else(|| shape.into()),
            manifests,
            blobs,
        })
    }
}

/// One manifest or index with its original bytes.
#[derive(Debug, Clone)]
pub struct Node {
    pub digest: Sha256,
    /// The media type for the registry.
    pub media_type: String,
    /// The original bytes.
    pub bytes: Bytes,
}

/// All parts of an image.
#[derive(Debug, Clone)]
pub struct Tree {
    /// Every manifest after those that it references; the top manifest is last.
    pub manifests: Vec<Node>,
    /// Every blob once.
    pub blobs: Vec<Descriptor>,
    /// Manifests that are listed but do not exist.
    pub absent: Vec<Sha256>,
}

/// Collects an image from its top manifest to its last blob. `load` returns the bytes of a
/// manifest, or `None` if it does not exist, which is allowed only below the top. Checks the
/// digests and sizes of manifests.
pub async fn walk<F, Fut>(top: &Descriptor, load: F) -> Result<Tree, Fault>
where
    F: FnMut(Descriptor) -> Fut,
    Fut: Future<Output = Result<Option<Bytes>, Fault>>,
{
    Walker::default().walk(top, load).await
}

/// Collects several images like [`walk`]. The limits hold for all of them together, and a part that
/// several have is only in the tree of the first.
#[derive(Debug, Default)]
pub struct Walker {
    seen: HashSet<Sha256>,
    blobs_seen: HashSet<Sha256>,
    bytes: usize,
}

enum Step {
    Enter(Descriptor),
    Leave(Node),
}

impl Walker {
    /// Collects the next image.
    pub async fn walk<F, Fut>(&mut self, top: &Descriptor, mut load: F) -> Result<Tree, Fault>
    where
        F: FnMut(Descriptor) -> Fut,
        Fut: Future<Output = Result<Option<Bytes>, Fault>>,
    {
        let mut tree = Tree {
            manifests: Vec::new(),
            blobs: Vec::new(),
            absent: Vec::new(),
        };
        let mut stack = vec![Step::Enter(top.clone())];
        while let Some(step) = stack.pop() {
            let descriptor = match step {
                Step::Leave(node) => {
                    tree.manifests.push(node);
                    continue;
                }
                Step::Enter(descriptor) if self.seen.insert(descriptor.digest) => descriptor,
                Step::Enter(_) => continue,
            };
            let digest = descriptor.digest;
            if self.seen.len() > limits::IMAGE_MANIFESTS_MAX {
                return Err(Fault::integrity(format!(
                    "image {}: more than {} manifests",
                    top.digest,
                    limits::IMAGE_MANIFESTS_MAX
                )));
            }
            if descriptor.size > limits::IMAGE_MANIFEST_BYTES_MAX as u64 {
                return Err(too_large(&digest));
            }
            let Some(bytes) = load(descriptor.clone()).await? else {
                if digest == top.digest {
                    return Err(Fault::not_found(format!(
                        "image {digest}: its top manifest does not exist"
                    )));
                }
                tree.absent.push(digest);
                continue;
            };
            if bytes.len() > limits::IMAGE_MANIFEST_BYTES_MAX {
                return Err(too_large(&digest));
            }
            self.bytes += bytes.len();
            if self.bytes > limits::IMAGE_MANIFESTS_BYTES_MAX {
                return Err(Fault::integrity(format!(
                    "image {}: its manifests have more than {} bytes in total",
                    top.digest,
                    limits::IMAGE_MANIFESTS_BYTES_MAX
                )));
            }
            if bytes.len() as u64 != descriptor.size || Sha256::of(&bytes) != digest {
                return Err(Fault::integrity(format!(
                    "image manifest {digest}: the content does not match its digest and size ({} bytes, {} expected)",
                    bytes.len(),
                    descriptor.size
                )));
            }
            let document = Document::parse(&bytes, &digest)?;
            tree.blobs.extend(
                document
                    .blobs
                    .into_iter()
                    .filter(|blob| self.blobs_seen.insert(blob.digest)),
            );
            // The media type of the descriptor takes precedence, because the registry must get what the
            // index states.
            let media_type = if descriptor.is_manifest() {
                descriptor.media_type
            } else {
                document.media_type
            };
            stack.push(Step::Leave(Node {
                digest,
                media_type,
                bytes,
            }));
            stack.extend(document.manifests.into_iter().rev().map(Step::Enter));
        }
        Ok(tree)
    }
}

fn too_large(digest: &Sha256) -> Fault {
    Fault::integrity(format!(
        "image manifest {digest}: larger than {} bytes, the limit of registries",
        limits::IMAGE_MANIFEST_BYTES_MAX
    ))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn descriptor(media_type: &str, bytes: &[u8]) -> String {
        format!(
            r#"{{"mediaType":"{media_type}","digest":"{}","size":{}}}"#,
            Sha256::of(bytes),
            bytes.len()
        )
    }

    #[tokio::test]
    async fn children_come_first_and_shared_parts_once() {
        let config = descriptor("application/vnd.oci.image.config.v1+json", b"{}");
        let layer = descriptor("application/vnd.oci.image.layer.v1.tar", b"layer");
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","config":{config},"layers":[{layer},{layer}]}}"#
        );
        let inner = format!(
            r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
            descriptor(OCI_MANIFEST, manifest.as_bytes())
        );
        let gone = descriptor(OCI_MANIFEST, b"gone");
        let top = format!(
            r#"{{"schemaVersion":2,"manifests":[{},{},{gone}]}}"#,
            descriptor(OCI_MANIFEST, manifest.as_bytes()),
            descriptor(OCI_INDEX, inner.as_bytes()),
        );
        let held: HashMap<Sha256, Bytes> = [&manifest, &inner, &top]
            .iter()
            .map(|s| (Sha256::of(s.as_bytes()), Bytes::from((*s).clone())))
            .collect();
        let descriptor: Descriptor =
            serde_json::from_str(&descriptor(OCI_INDEX, top.as_bytes())).unwrap();
        let tree = walk(&descriptor, |d| {
            std::future::ready(Ok(held.get(&d.digest).cloned()))
        })
        .await
        .unwrap();
        let order: Vec<_> = tree.manifests.iter().map(|n| n.digest).collect();
        assert_eq!(
            order,
            [
                Sha256::of(manifest.as_bytes()),
                Sha256::of(inner.as_bytes()),
                Sha256::of(top.as_bytes())
            ]
        );
        assert_eq!(tree.blobs.len(), 2);
        assert_eq!(tree.absent, [Sha256::of(b"gone")]);

        let wrong_descriptor = Descriptor {
            size: 1,
            ..descriptor.clone()
        };
        assert!(
            walk(&wrong_descriptor, |d| std::future::ready(Ok(held
                .get(&d.digest)
                .cloned())))
            .await
            .is_err()
        );
        assert!(
            walk(&descriptor, |_| std::future::ready(Ok(None)))
                .await
                .is_err()
        );
    }

    #[test]
    fn odd_documents() {
        let of = |text: &str| Document::parse(text.as_bytes(), &Sha256::of(b""));
        assert!(of(r#"{"schemaVersion":1,"fsLayers":[]}"#).is_err());
        assert!(of(r#"{"schemaVersion":2}"#).is_err());
        assert!(of("[]").is_err());
        let config = descriptor("x", b"");
        assert_eq!(
            of(&format!(
                r#"{{"schemaVersion":2,"config":{config},"layers":null}}"#
            ))
            .unwrap()
            .blobs
            .len(),
            1
        );
    }

    #[test]
    fn digests() {
        let digest = Sha256::of(b"x");
        assert_eq!(
            Sha256::from_layout_path(&digest.layout_path()),
            Some(digest)
        );
        assert_eq!(Sha256::from_layout_path("index.json"), None);
        assert!(digest.to_string().to_uppercase().parse::<Sha256>().is_err());
        assert!(
            format!("sha512:{}", digest.hex())
                .parse::<Sha256>()
                .is_err()
        );
    }
}

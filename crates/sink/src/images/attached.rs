//! What is carried with an image: signatures, attestations and SBOMs, each with everything below its
//! manifest. Both sinks read it in the same way, and the hub when it verifies an image.

use std::future::Future;

use bytes::Bytes;

use base::fault::{Code, Fault};
use content::manifest::ImageInfo;
use registry::image::{Descriptor, Sha256, Tree, Walker};

/// One referrer of an image.
#[derive(Debug, Clone)]
pub struct Attached {
    /// Its manifest or index.
    pub top: Descriptor,
    /// The manifest that it describes.
    pub about: Sha256,
    /// Cosign's tag, if it has one.
    pub tag: Option<String>,
    /// Its parts, except those of the referrers before it.
    pub tree: Tree,
}

impl Attached {
    /// What it is called in messages: its tag, or its digest.
    pub fn name(&self) -> String {
        let digest = || self.top.digest.to_string();
        self.tag.clone().unwrap_or_else(digest)
    }

    /// The bytes of its own manifest, unless a referrer before it is the same.
    pub fn manifest(&self) -> Option<&Bytes> {
        let last = self.tree.manifests.last()?;
        (last.digest == self.top.digest).then_some(&last.bytes)
    }
}

/// Collects what is carried with an image, in order: what is described comes before what describes
/// it. `load` returns the bytes of a manifest, or `None` if it does not exist, which is a fault of
/// the code `not_found`.
pub async fn attached<F, Fut>(info: &ImageInfo, mut load: F) -> Result<Vec<Attached>, Fault>
where
    F: FnMut(Descriptor) -> Fut,
    Fut: Future<Output = Result<Option<Bytes>, Fault>>,
{
    let mut walker = Walker::default();
    let mut all = Vec::with_capacity(info.referrers.len());
    for referrer in &info.referrers {
        let digest = |text: &str| text.parse::<Sha256>().map_err(Fault::integrity);
        let top = Descriptor {
            media_type: referrer.media_type.clone(),
            digest: digest(&referrer.digest)?,
            size: referrer.size,
            urls: None,
            platform: None,
        };
        let missing = |digest| Fault::not_found(format!("manifest {digest} is missing"));
        let tree = match walker.walk(&top, &mut load).await {
            Err(fault) if fault.code == Code::NotFound => Err(missing(top.digest)),
            Ok(Tree { absent, .. }) if !absent.is_empty() => Err(missing(absent[0])),
            tree => tree,
        };
        let name = referrer.tag.as_deref().unwrap_or(&referrer.digest);
        all.push(Attached {
            tree: tree.map_err(|fault| fault.context(format_args!("{name} of the image")))?,
            about: digest(&referrer.about)?,
            tag: referrer.tag.clone(),
            top,
        });
    }
    Ok(all)
}

/// The note about a referrer whose tag has other content at the site.
pub(super) fn other_tag(tag: &str, ours: &str) -> String {
    format!("the tag {tag} has other content here and stays as it is; what was published is {ours}")
}

//! The sinks of images: an OCI registry, or a directory of OCI layouts if there is no registry.
//!
//! The engine stages an OCI layout directory, which may lack blobs that the target already has.
//! Both sinks follow the image from its top manifest down, write blobs first and the top manifest
//! last, and change no byte. What is carried with the image (signatures, attestations, SBOMs)
//! follows it in the same way (`attached`).

mod attached;
mod layout;
mod registry;
mod shared_blobs;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use attached::other_tag;
pub use attached::{Attached, attached};
pub use layout::LayoutSink;
pub use registry::RegistrySink;

use crate::settings;
use crate::{Incoming, Sink};
use ::registry::image::{Descriptor, Sha256};
use ::registry::reference::{check_repository, check_tag};
use base::fault::{Fault, IoContext};
use base::limits;
use base::names::ArtifactRef;
use content::manifest::{ImageInfo, KindInfo};

/// The configured sink; without configuration, OCI layouts in `<data_dir>/images`.
pub fn open(cfg: Option<&settings::ImagesSink>, data_dir: &Path) -> Result<Arc<dyn Sink>, Fault> {
    let layout_path = match cfg {
        None => Some(data_dir.join("images")),
        Some(cfg) => cfg.url.strip_prefix("oci-layout:").map(PathBuf::from),
    };
    match (layout_path, cfg) {
        (Some(path), _) => {
            let staging = path.join(".packhorse-staging"); // inside, so that blobs can be renamed instead of copied
            Ok(Arc::new(LayoutSink::new(path, staging, cfg.is_some())?))
        }
        (None, Some(cfg)) => Ok(Arc::new(RegistrySink::new(
            cfg,
            data_dir.join("staging").join("images"),
        )?)),
        (None, None) => Err(Fault::internal("no image sink is configured")),
    }
}

fn image_info(incoming: &Incoming) -> Result<&ImageInfo, Fault> {
    match &incoming.root.info {
        KindInfo::Image(info) => Ok(info),
        _ => Err(Fault::internal(format!(
            "{} is not an image but was sent to the image sink",
            incoming.artifact
        ))),
    }
}

/// The name of an image at its destination: that of the artifact, unless the artifact states another
/// one.
#[derive(Debug, Clone, PartialEq, Eq)]
struct ImageName {
    repository: String,
    tag: String,
}

impl ImageName {
    fn of(incoming: &Incoming) -> Result<Self, Fault> {
        Self::new(&incoming.artifact, Some(&incoming.root.info))
    }

    /// Checks a stated name, which comes from a peer.
    fn new(artifact: &ArtifactRef, info: Option<&KindInfo>) -> Result<Self, Fault> {
        let (repository, tag) = match info {
            Some(KindInfo::Image(info)) => (info.repository.as_deref(), info.tag.as_deref()),
            _ => (None, None),
        };
        let invalid = |what: &str, why: String| {
            Fault::integrity(format!("{artifact}: it states an invalid {what}: {why}"))
                .with_next("publish it again with another --repository and --tag")
        };
        if let Some(repository) = repository {
            check_repository(repository).map_err(|why| invalid("repository", why))?;
        }
        if let Some(tag) = tag.filter(|tag| !check_tag(tag)) {
            let tag: String = tag.chars().take(128).collect();
            return Err(invalid("tag", format!("{tag:?}")));
        }
        Ok(Self {
            repository: repository.unwrap_or(artifact.name()).to_owned(),
            tag: tag.unwrap_or(artifact.version()).to_owned(),
        })
    }
}

/// The descriptor of the top manifest.
fn top_of(info: &ImageInfo) -> Result<Descriptor, Fault> {
    let digest = info
        .digest
        .parse::<Sha256>()
        .map_err(|why| Fault::integrity(format!("the artifact's image digest: {why}")))?;
    Ok(Descriptor {
        media_type: info.media_type.clone(),
        digest,
        size: info.size,
        urls: None,
        platform: None,
    })
}

/// The content of a small file; `None` if it does not exist. A manifest that is too large is not
/// read.
fn read_small(path: &Path) -> Result<Option<Bytes>, Fault> {
    let what = || format!("read {}", path.display());
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Fault::io(what(), &e)),
        Ok(meta) if meta.len() > limits::IMAGE_MANIFEST_BYTES_MAX as u64 => {
            return Err(Fault::integrity(format!(
                "{}: {} bytes are too large for an image manifest",
                what(),
                meta.len()
            )));
        }
        Ok(_) => {}
    }
    std::fs::read(path)
        .at(what())
        .map(|bytes| Some(bytes.into()))
}

fn file_size(path: &Path) -> Result<Option<u64>, Fault> {
    match std::fs::metadata(path) {
        Ok(meta) => Ok(Some(meta.len())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Fault::io(
            format_args!("read the metadata of {}", path.display()),
            &e,
        )),
    }
}

/// The fault for content that the target had when the transfer was planned and no longer has.
fn lost(what: &str, at: &str) -> Fault {
    Fault::conflict(format!(
        "{what} existed at {at} when the transfer was planned and is now missing"
    ))
    .with_reason(base::fault::Reason::SinkUnavailable)
    .with_retry(base::fault::Retry::Backoff)
    .with_next(
        "a garbage collection or a person removes images there; the missing content is fetched automatically",
    )
}

/// A manifest that is neither staged nor at the target was lost; the user did not misspell it.
fn not_staged(fault: Fault, location: &str) -> Fault {
    if fault.code == base::fault::Code::NotFound {
        lost("a manifest of the image", location)
    } else {
        fault
    }
}

/// The fault for a name that already has different content.
fn taken(location: &str, theirs: &Sha256, ours: &Sha256) -> Fault {
    Fault::conflict(format!(
        "{location} already exists with a different image ({theirs}, not {ours})"
    ))
    .with_next("remove that tag, or publish under another version; then run 'packhorse retry'")
}

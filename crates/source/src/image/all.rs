//! All images of an archive or layout directory, for a user who publishes each of them.
//!
//! Reads only what lists the images; [`super::ImageSource`] reads an image and checks it. Only reads,
//! except that a compressed archive is decompressed into the scratch directory.

use std::path::Path;
use std::sync::Arc;

use super::docker;
use super::holder::{BlobDigest, Holder, distinct};
use super::listing;
use super::oci::{self, Descriptor};
use super::referrers::Referrers;
use super::{ImageOptions, Reading, holder_of};
use base::fault::Fault;

/// One image of an archive or layout directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainedImage {
    /// What selects it after the `#`; `None`: nothing is needed.
    pub selection: Option<String>,
    /// Its names: complete ones, or only tags.
    pub names: Vec<String>,
    /// The digest of its manifest, or of its config if the archive has no manifest.
    pub digest: String,
}

/// The images of the archive or layout directory at `path`, in its order. Referrers are not images.
pub fn images(path: &Path, scratch: &Path) -> Result<Vec<ContainedImage>, Fault> {
    let options = ImageOptions::default();
    let reading = Reading::new(&options, scratch);
    let mut holder = holder_of(path, scratch, reading, &Arc::default())?;
    let images = match super::top_of_directory(&mut holder)? {
        Some(top) => vec![contained(None, &top)],
        None => match docker::all(&holder)? {
            Some(images) => images,
            None => match oci::top_descriptors(&holder)? {
                Some(tops) => of_layout(&holder, &tops),
                None => return Err(holder.refuse("index.json", holder.why_no_image())),
            },
        },
    };
    match images.as_slice() {
        [] => Err(holder.refuse("the archive", "it contains no image")),
        _ => Ok(images),
    }
}

fn contained(selection: Option<String>, top: &Descriptor) -> ContainedImage {
    ContainedImage {
        selection,
        names: top.names().next().map(str::to_owned).into_iter().collect(),
        digest: top.digest.to_string(),
    }
}

fn of_layout(holder: &Holder, tops: &[Descriptor]) -> Vec<ContainedImage> {
    let referrers = Referrers::find(holder, tops);
    let images: Vec<&Descriptor> = tops.iter().filter(|top| !referrers.has(top)).collect();
    if oci::are_platforms(&images) {
        return images
            .first()
            .map(|one| contained(None, one))
            .into_iter()
            .collect();
    }
    distinct(images.iter().map(|top| &top.digest))
        .into_iter()
        .enumerate()
        .map(|(position, digest)| {
            let mut names: Vec<String> = images
                .iter()
                .filter(|top| top.digest == *digest)
                .filter_map(|top| top.names().next())
                .map(str::to_owned)
                .collect();
            names.sort();
            names.dedup();
            ContainedImage {
                selection: Some(listing::label(None, Some(position))),
                names,
                digest: digest.to_string(),
            }
        })
        .collect()
}

impl docker::Listed {
    /// The image as it is listed at a position.
    pub(super) fn contained(&self, position: usize, config: &BlobDigest) -> ContainedImage {
        ContainedImage {
            selection: Some(listing::label(None, Some(position))),
            names: self.tags().map(str::to_owned).collect(),
            digest: config.to_string(),
        }
    }
}

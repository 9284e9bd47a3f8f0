//! The complete check of a manifest before it is used.
//!
//! A manifest must pass [`check`] wherever it enters: offered by a site, uploaded by a publisher,
//! imported from a bundle, or received by a site. A walk checks each path, the order, that each
//! entry is inside a directory of the artifact, and that pages, chunks and totals are consistent.
//! This module adds the rules for the kind, for link targets and for chunk sizes.
//!
//! Memory does not grow with the manifest: a check holds at most 4 MiB. A page that is listed many
//! times is read once. The cost is linear in the size of the manifest, times the number of parts in
//! which [`expected`] looks at what links refer to: one for all but a few manifests.

use std::collections::HashMap;

use super::walk::{DIFFERENT_PAGES_KNOWN_MAX, malformed_manifest};
use super::{
    Entry, EntryBody, FORMAT_REFERRERS, KindInfo, Pages, Root, Step, Until, Walk, referrers,
};
use crate::label_rows::{ANNOTATIONS, CLASSES, SAMPLES};
use base::blocking::Stop;
use base::fault::Fault;
use base::limits::IMAGE_MANIFEST_BYTES_MAX;
use base::names::{ArtifactRef, Kind};
use base::sha256::Sha256;
use expected::Expected;

mod expected;

/// The steps after which the check looks whether it should stop: a page of long paths takes a
/// second in a debug build.
const STEPS_TOGETHER: u32 = 1024;

/// Checks a complete manifest. A violation is an `integrity` fault that names the artifact. `stop`
/// ends the check early, with a fault that is none of the manifest.
pub fn check<P: Pages + ?Sized>(
    artifact: &ArtifactRef,
    root: &Root,
    pages: &P,
    stop: &Stop,
) -> Result<(), Fault> {
    let checked = Rules::new(artifact.kind, root).and_then(|mut rules| {
        let mut expected = Expected::default();
        each_step(root, pages, stop, |step| {
            rules.see(&step)?;
            if let Step::Entry { entry, .. } = &step {
                expected.note(entry)?;
            }
            Ok(true)
        })?;
        rules.end()?;
        expected.check(|each| {
            each_step(root, pages, stop, |step| match &step {
                Step::Entry { entry, .. } => each(entry),
                Step::Chunk(..) => Ok(true),
            })
        })
    });
    checked.map_err(|fault| fault.context(artifact))
}

/// Passes each step of a walk to `each`, until it returns `false`.
fn each_step<P: Pages + ?Sized>(
    root: &Root,
    pages: &P,
    stop: &Stop,
    mut each: impl FnMut(Step) -> Result<bool, Fault>,
) -> Result<(), Fault> {
    let pages = Until::new(pages, stop);
    let mut steps = 0;
    for step in Walk::once_each(root, &pages, DIFFERENT_PAGES_KNOWN_MAX) {
        steps = (steps + 1) % STEPS_TOGETHER;
        if steps == 0 {
            stop.check()?;
        }
        if !each(step?)? {
            break;
        }
    }
    Ok(())
}

/// The rules beyond those of the walk.
struct Rules<'a> {
    root: &'a Root,
    kind: Kinds,
}

/// The rules of an artifact's kind for its entries.
enum Kinds {
    Files,
    /// The blob of the top manifest, and whether it was found.
    Image {
        top: String,
        size: u64,
        seen: bool,
        /// The manifests of its referrers that were not found yet, and their sizes.
        referrers: HashMap<String, u64>,
    },
    /// The largest number of lines of each file.
    Labels {
        samples: u64,
        annotations: u64,
        classes: u64,
    },
}

impl<'a> Rules<'a> {
    fn new(kind: Kind, root: &'a Root) -> Result<Self, Fault> {
        if root.kind != kind {
            return Err(Fault::integrity(format!(
                "its manifest is that of {}",
                root.kind.with_article()
            ))
            .with_next("publish the artifact again"));
        }
        let kind = match &root.info {
            KindInfo::Files if kind.is_files() => Kinds::Files,
            KindInfo::Image(image) if kind == Kind::Image => {
                let top: Sha256 = image.digest.parse().map_err(|why| {
                    malformed_manifest(&format!("the digest of the image: {why}"))
                })?;
                if image.size == 0 || image.size > IMAGE_MANIFEST_BYTES_MAX as u64 {
                    return Err(malformed_manifest(&format!(
                        "the size of the image's top manifest is {} bytes, which is not allowed",
                        image.size
                    )));
                }
                if !image.referrers.is_empty() && root.format < FORMAT_REFERRERS {
                    return Err(malformed_manifest("its format does not have referrers"));
                }
                Kinds::Image {
                    top: top.layout_path(),
                    size: image.size,
                    seen: false,
                    referrers: referrers::check(image, &top)?,
                }
            }
            KindInfo::Labels(labels) if kind == Kind::Labels => {
                if labels
                    .dataset
                    .as_ref()
                    .is_some_and(|dataset| dataset.artifact.kind != Kind::Dataset)
                {
                    return Err(malformed_manifest(
                        "its labels are bound to an artifact that is not a dataset",
                    ));
                }
                if (root.totals.files, root.totals.dirs, root.totals.symlinks) != (3, 0, 0) {
                    return Err(malformed_manifest(&format!(
                        "a label set must consist of {ANNOTATIONS}, {CLASSES} and {SAMPLES}"
                    )));
                }
                Kinds::Labels {
                    samples: labels.samples,
                    annotations: labels.annotations,
                    classes: labels.classes,
                }
            }
            _ => {
                return Err(malformed_manifest(&format!(
                    "its metadata is not that of {}",
                    kind.with_article()
                )));
            }
        };
        Ok(Self { root, kind })
    }

    fn see(&mut self, step: &Step) -> Result<(), Fault> {
        match step {
            Step::Entry { entry, .. } => self.entry(entry),
            Step::Chunk(chunk, _) => {
                let len_max = self.root.chunking.max.max(self.root.chunking.whole);
                let is_allowed = chunk.len <= len_max;
                if is_allowed {
                    Ok(())
                } else {
                    Err(malformed_manifest(&format!(
                        "chunk {} has {} bytes, more than {len_max}",
                        chunk.id, chunk.len
                    )))
                }
            }
        }
    }

    fn entry(&mut self, entry: &Entry) -> Result<(), Fault> {
        if !matches!(self.kind, Kinds::Files) && !entry.attributes.is_empty() {
            return Err(malformed_manifest("only files have attributes"));
        }
        let path = entry.path.as_str();
        let size = if let EntryBody::File(file) = &entry.body {
            Some(file.size)
        } else {
            None
        };
        let is_allowed = match &mut self.kind {
            Kinds::Files => true,
            Kinds::Image {
                top,
                size: top_size,
                seen,
                referrers,
            } => match (path, size) {
                ("blobs" | "blobs/sha256", None) => entry.body == EntryBody::Dir,
                ("index.json" | "oci-layout", Some(_)) => true,
                (path, Some(size)) if path == top => {
                    *seen = true;
                    size == *top_size
                }
                (path, Some(size)) => match referrers.remove(path) {
                    Some(stated) => stated == size,
                    None => Sha256::from_layout_path(path).is_some(),
                },
                _ => false,
            },
            // A line has at least one byte.
            Kinds::Labels {
                samples,
                annotations,
                classes,
            } => match (path, size) {
                (ANNOTATIONS, Some(size)) => *annotations <= size,
                (SAMPLES, Some(size)) => *samples <= size,
                (CLASSES, Some(size)) => *classes <= size,
                _ => false,
            },
        };
        if is_allowed {
            Ok(())
        } else {
            Err(malformed_manifest(&format!(
                "the entry {path:?} is not allowed in {}",
                self.root.kind.with_article()
            )))
        }
    }

    fn end(self) -> Result<(), Fault> {
        match self.kind {
            Kinds::Image {
                top, seen: false, ..
            } => Err(malformed_manifest(&format!(
                "it does not contain the image's top manifest {top}"
            ))),
            Kinds::Image { referrers, .. } => match referrers.keys().min() {
                None => Ok(()),
                Some(missing) => Err(malformed_manifest(&format!(
                    "it does not contain {missing}, the manifest of a referrer"
                ))),
            },
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;

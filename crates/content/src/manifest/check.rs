//! The complete check of a manifest before it is used.
//!
//! A manifest must pass [`check`] wherever it enters: offered by a site, uploaded by a publisher,
//! imported from a bundle, or received by a site. A walk checks each path, the order, that each
//! entry is inside a directory of the artifact, and that pages, chunks and totals are consistent.
//! This module adds the rules for the kind, for link targets and for chunk sizes. Memory does not
//! grow with the manifest, and a page that is listed many times is read once.

use std::collections::HashMap;

use super::walk::{DIFFERENT_PAGES_KNOWN_MAX, malformed_manifest};
use super::{
    Entry, EntryBody, FORMAT_REFERRERS, FileInfo, KindInfo, Pages, Root, Step, Walk, referrers,
};
use crate::label_rows::{ANNOTATIONS, CLASSES, SAMPLES};
use base::fault::Fault;
use base::limits::{HARD_LINK_BYTES_MAX, IMAGE_MANIFEST_BYTES_MAX, LINK_FOLDERS_BYTES_MAX};
use base::names::{ArtifactRef, Kind, RelPath, stays_inside};
use base::sha256::Sha256;

/// Checks a complete manifest. A violation is an `integrity` fault that names the artifact.
pub fn check<P: Pages + ?Sized>(
    artifact: &ArtifactRef,
    root: &Root,
    pages: &P,
) -> Result<(), Fault> {
    let checked = Rules::new(artifact.kind, root).and_then(|mut rules| {
        for step in Walk::once_each(root, pages, DIFFERENT_PAGES_KNOWN_MAX) {
            rules.see(&step?)?;
        }
        rules.end(pages)
    });
    checked.map_err(|fault| fault.context(artifact))
}

fn wrong_hard_link(path: &str) -> Fault {
    malformed_manifest(&format!(
        "the hard link {path:?} does not have the content of a file of the artifact"
    ))
}

/// The rules beyond those of the walk.
struct Rules<'a> {
    root: &'a Root,
    kind: Kinds,
    /// The directories from which a link goes up by `..`, each with one such link. Each of them
    /// must be a directory.
    parents_of_dotdot: HashMap<String, RelPath>,
    bytes: usize,
    /// The files that have other names, each with the content that these names have.
    linked: HashMap<RelPath, FileInfo>,
    linked_bytes: usize,
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
            return Err(
                Fault::integrity(format!("its manifest is that of a {}", root.kind))
                    .with_next("publish the artifact again"),
            );
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
                    "its metadata is not that of a {kind}"
                )));
            }
        };
        Ok(Self {
            root,
            kind,
            parents_of_dotdot: HashMap::new(),
            bytes: 0,
            linked: HashMap::new(),
            linked_bytes: 0,
        })
    }

    fn see(&mut self, step: &Step) -> Result<(), Fault> {
        match step {
            Step::Entry { entry, .. } => {
                self.entry(entry)?;
                if let EntryBody::Symlink(target) = &entry.body {
                    self.link(&entry.path, target)
                } else {
                    Ok(())
                }
            }
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
        if let (Some(first), EntryBody::File(file)) = (&entry.attributes.hard_link, &entry.body) {
            self.hard_link(entry, first, *file)?;
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
                "the entry {path:?} is not allowed in a {}",
                self.root.kind
            )))
        }
    }

    /// Another name of a file has the content of the file, which the second walk finds.
    fn hard_link(&mut self, entry: &Entry, first: &RelPath, file: FileInfo) -> Result<(), Fault> {
        let known = self.linked.get(first).copied();
        if known.is_none() {
            self.linked_bytes += first.as_str().len() + size_of::<(RelPath, FileInfo)>();
            self.linked.insert(first.clone(), file);
        }
        if known.is_some_and(|known| known != file) {
            return Err(wrong_hard_link(entry.path.as_str()));
        }
        if self.linked_bytes > HARD_LINK_BYTES_MAX {
            return Err(malformed_manifest("it has too many hard links"));
        }
        Ok(())
    }

    fn link(&mut self, path: &RelPath, target: &str) -> Result<(), Fault> {
        let (folders, bytes) = (&mut self.parents_of_dotdot, &mut self.bytes);
        let inside = stays_inside(path, target, |folder| {
            // Whether it is a directory is known after all entries were seen.
            if !folders.contains_key(folder) {
                *bytes += folder.len() + path.as_str().len();
                folders.insert(folder.to_owned(), path.clone());
            }
            true
        });
        inside.map_err(|why| {
            malformed_manifest(&format!(
                "the target {target:?} of the link {:?} {why}",
                path.as_str()
            ))
        })?;
        if self.bytes > LINK_FOLDERS_BYTES_MAX {
            return Err(malformed_manifest("too many of its links use '..'"));
        }
        Ok(())
    }

    fn end<P: Pages + ?Sized>(mut self, pages: &P) -> Result<(), Fault> {
        if let Kinds::Image {
            top, seen: false, ..
        } = &self.kind
        {
            return Err(malformed_manifest(&format!(
                "it does not contain the image's top manifest {top}"
            )));
        }
        if let Kinds::Image { referrers, .. } = &self.kind
            && let Some(missing) = referrers.keys().min()
        {
            return Err(malformed_manifest(&format!(
                "it does not contain {missing}, the manifest of a referrer"
            )));
        }
        if self.parents_of_dotdot.is_empty() && self.linked.is_empty() {
            return Ok(());
        }
        for step in Walk::once_each(self.root, pages, DIFFERENT_PAGES_KNOWN_MAX) {
            let Step::Entry { entry, .. } = step? else {
                continue;
            };
            match &entry.body {
                EntryBody::Dir => {
                    self.parents_of_dotdot.remove(entry.path.as_str());
                }
                EntryBody::File(file) if entry.attributes.hard_link.is_none() => {
                    if let Some(expected) = self.linked.remove(&entry.path)
                        && expected != *file
                    {
                        return Err(wrong_hard_link(entry.path.as_str()));
                    }
                }
                EntryBody::File(_) | EntryBody::Symlink(_) => {}
            }
        }
        if let Some(first) = self.linked.into_keys().next() {
            return Err(wrong_hard_link(first.as_str()));
        }
        match self.parents_of_dotdot.into_iter().next() {
            None => Ok(()),
            Some((folder, link)) => Err(malformed_manifest(&format!(
                "the link {:?} uses '..' after {folder:?}, which is not a directory",
                link.as_str()
            ))),
        }
    }
}

#[cfg(test)]
mod tests;

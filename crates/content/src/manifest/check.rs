//! The complete check of a manifest, before anybody relies on it.
//!
//! [`check`] is what a manifest must pass wherever it enters: offered by a site, uploaded by a
//! publisher, imported from a bundle, pushed or fetched at a site. A walk checks each path, the
//! order, that each entry is inside a folder of the artifact, and that pages, chunks and totals fit
//! together. On top of that stand the rules here: what the kind needs, where links may lead, and
//! how large a chunk may be. Memory does not grow with the manifest, and a page that is listed many
//! times is read once.

use std::collections::HashMap;

use super::walk::{DIFFERENT_PAGES_KNOWN_MAX, impossible};
use super::{Entry, EntryBody, KindInfo, Pages, Root, Step, Walk};
use crate::label_rows::{ANNOTATIONS, CLASSES, SAMPLES};
use base::fault::Fault;
use base::limits::{IMAGE_MANIFEST_BYTES_MAX, LINK_FOLDERS_BYTES_MAX};
use base::names::{ArtifactRef, Kind, RelPath, stays_inside};
use base::sha256::Sha256;

/// Checks all of a manifest. What is wrong with it is an `integrity` fault that names the artifact.
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

/// What holds beside the walk's own rules.
struct Rules<'a> {
    root: &'a Root,
    kind: Kinds,
    /// Folders that a link steps back from by `..`, each with the link: none of them may be
    /// anything else than a folder.
    stepped_back_from: HashMap<String, RelPath>,
    bytes: usize,
}

/// What an artifact's kind asks of its entries.
enum Kinds {
    Files,
    /// The blob of the top manifest, and whether it was seen.
    Image {
        top: String,
        size: u64,
        seen: bool,
    },
    /// The lines of each file at the most.
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
                Fault::integrity(format!("it has the manifest of a {}", root.kind))
                    .with_next("publish the artifact again"),
            );
        }
        let kind = match &root.info {
            KindInfo::Files if kind.is_files() => Kinds::Files,
            KindInfo::Image(image) if kind == Kind::Image => {
                let top: Sha256 = image
                    .digest
                    .parse()
                    .map_err(|why| impossible(&format!("the digest of the image: {why}")))?;
                if image.size == 0 || image.size > IMAGE_MANIFEST_BYTES_MAX as u64 {
                    return Err(impossible(&format!(
                        "the image's top manifest cannot have {} bytes",
                        image.size
                    )));
                }
                Kinds::Image {
                    top: top.layout_path(),
                    size: image.size,
                    seen: false,
                }
            }
            KindInfo::Labels(labels) if kind == Kind::Labels => {
                if labels
                    .dataset
                    .as_ref()
                    .is_some_and(|dataset| dataset.artifact.kind != Kind::Dataset)
                {
                    return Err(impossible(
                        "its labels are bound to something that is no dataset",
                    ));
                }
                if (root.totals.files, root.totals.dirs, root.totals.symlinks) != (3, 0, 0) {
                    return Err(impossible(&format!(
                        "labels consist of {ANNOTATIONS}, {CLASSES} and {SAMPLES}"
                    )));
                }
                Kinds::Labels {
                    samples: labels.samples,
                    annotations: labels.annotations,
                    classes: labels.classes,
                }
            }
            _ => {
                return Err(impossible(&format!(
                    "what it says of itself is not of a {kind}"
                )));
            }
        };
        Ok(Self {
            root,
            kind,
            stepped_back_from: HashMap::new(),
            bytes: 0,
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
                let most = self.root.chunking.max.max(self.root.chunking.whole);
                let fits = chunk.len <= most;
                if fits {
                    Ok(())
                } else {
                    Err(impossible(&format!(
                        "chunk {} has {} bytes, over {most}",
                        chunk.id, chunk.len
                    )))
                }
            }
        }
    }

    fn entry(&mut self, entry: &Entry) -> Result<(), Fault> {
        let path = entry.path.as_str();
        let size = if let EntryBody::File(file) = &entry.body {
            Some(file.size)
        } else {
            None
        };
        let fits = match &mut self.kind {
            Kinds::Files => true,
            Kinds::Image {
                top,
                size: top_size,
                seen,
            } => match (path, size) {
                ("blobs" | "blobs/sha256", None) => entry.body == EntryBody::Dir,
                ("index.json" | "oci-layout", Some(_)) => true,
                (path, Some(size)) if path == top => {
                    *seen = true;
                    size == *top_size
                }
                (path, Some(_)) => Sha256::from_layout_path(path).is_some(),
                _ => false,
            },
            // A line has a byte at least.
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
        if fits {
            Ok(())
        } else {
            Err(impossible(&format!(
                "a {} has no such entry as {path:?}",
                self.root.kind
            )))
        }
    }

    fn link(&mut self, path: &RelPath, target: &str) -> Result<(), Fault> {
        let (folders, bytes) = (&mut self.stepped_back_from, &mut self.bytes);
        let inside = stays_inside(path, target, |folder| {
            // Whether it is one is known once all entries were seen.
            if !folders.contains_key(folder) {
                *bytes += folder.len() + path.as_str().len();
                folders.insert(folder.to_owned(), path.clone());
            }
            true
        });
        inside.map_err(|why| {
            impossible(&format!(
                "the link {:?} leads to {target:?}, which {why}",
                path.as_str()
            ))
        })?;
        if self.bytes > LINK_FOLDERS_BYTES_MAX {
            return Err(impossible("too many of its links step back from folders"));
        }
        Ok(())
    }

    fn end<P: Pages + ?Sized>(mut self, pages: &P) -> Result<(), Fault> {
        if let Kinds::Image {
            top, seen: false, ..
        } = &self.kind
        {
            return Err(impossible(&format!(
                "the image's top manifest {top} is not in it"
            )));
        }
        if self.stepped_back_from.is_empty() {
            return Ok(());
        }
        for step in Walk::once_each(self.root, pages, DIFFERENT_PAGES_KNOWN_MAX) {
            if let Step::Entry {
                entry:
                    Entry {
                        path,
                        body: EntryBody::Dir,
                        ..
                    },
                ..
            } = step?
            {
                self.stepped_back_from.remove(path.as_str());
            }
        }
        match self.stepped_back_from.into_iter().next() {
            None => Ok(()),
            Some((folder, link)) => Err(impossible(&format!(
                "the link {:?} steps back from {folder:?}, which is not a folder",
                link.as_str()
            ))),
        }
    }
}

#[cfg(test)]
mod tests;

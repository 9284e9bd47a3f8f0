//! Manifests: the sorted entries of an artifact, and the metadata of its kind.
//!
//! A manifest is a tree. The root manifest lists pages. These contain entries and chunk references
//! or, if [`Root::depth`] is not 0, more pages. Pages are chunks: their id is their BLAKE3, they
//! are kept in the store, and missing ones are fetched. This module does no I/O: [`Builder`] passes
//! finished pages to a closure, and [`Walk`] requests pages through [`Pages`]. Both hold at most
//! one page of each level in memory.

mod attributes;
mod build;
mod check;
pub mod delta;
mod page;
mod referrers;
mod same;
mod survey;
mod walk;

pub use attributes::{Attributes, FileTime, XATTR_PREFIX, Xattr};
pub use build::Builder;
pub use check::check;
pub use page::{ChunkRef, read_children};
pub use referrers::ImageReferrer;
pub use same::{same_but_referrers, same_but_times};
pub use survey::{Named, survey};
pub use walk::{
    ChunkPosition, Listed, Pages, Step, Until, Walk, children, entry_pages, for_each_page,
    level_below, top_level,
};

use serde::{Deserialize, Serialize};

pub use crate::chunk::Chunking;
use crate::chunk::Hash;
use base::fault::Fault;
use base::limits::ROOT_VALUES_MAX;
use base::names::{ArtifactRef, Kind, RelPath};
use base::text::check_values;

/// The first format of manifests whose entries may have [`Attributes`].
pub const FORMAT_ATTRIBUTES: u32 = 2;

/// The first format of manifests whose image may have [`ImageReferrer`]s.
pub const FORMAT_REFERRERS: u32 = 3;

/// The newest format of manifests. A program of an earlier version refuses it and says so. A
/// manifest has the first format that has all that it contains.
pub const FORMAT_MAX: u32 = FORMAT_REFERRERS;

/// The BLAKE3 of a root manifest, which identifies an artifact.
pub type Digest = Hash;

/// One entry of an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub path: RelPath,
    /// Unix permission bits; at most 0777 in an entry that was read.
    pub mode: u32,
    pub body: EntryBody,
    /// In a manifest of format 2.
    pub attributes: Attributes,
}

/// The type of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryBody {
    Dir,
    /// A symbolic link with its target.
    Symlink(String),
    File(FileInfo),
}

/// The content of a regular file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileInfo {
    /// In bytes.
    pub size: u64,
    /// BLAKE3 of the complete content.
    pub hash: Hash,
}

/// Counts over all entries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    pub files: u64,
    pub dirs: u64,
    pub symlinks: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Chunks of all files, including repeated ones.
    pub chunks: u64,
}

/// The metadata of an artifact's kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum KindInfo {
    /// A directory of files, without metadata.
    Files,
    /// The entries are an OCI image layout: `oci-layout`, `index.json`, `blobs/sha256/…`.
    Image(ImageInfo),
    /// The entries are the canonical label files.
    Labels(LabelsInfo),
}

/// The metadata of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Media type of the top manifest or index.
    pub media_type: String,
    /// `sha256:<hex>` of the top manifest or index; the registry of every site must return the same
    /// digest.
    pub digest: String,
    /// The size of the top manifest or index in bytes.
    pub size: u64,
    /// `os/arch[/variant]` of each included image.
    pub platforms: Vec<String>,
    /// `sha256:<hex>` of manifests that the source listed without their content; they are left out.
    pub absent: Vec<String>,
    /// The repository at the destination, if it is not the name of the artifact. A daemon that does
    /// not know this field refuses the artifact as one of a later version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repository: Option<String>,
    /// The tag at the destination, if it is not the version of the artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// What belongs to the image and is carried with it: signatures, attestations, SBOMs. Each
    /// comes after those that it describes. In a manifest of format 3.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub referrers: Vec<ImageReferrer>,
}

/// The metadata of a label set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelsInfo {
    /// The dataset version of these labels.
    pub dataset: Option<DatasetBinding>,
    pub samples: u64,
    pub annotations: u64,
    pub classes: u64,
    /// The source format: `coco`, `csv`, `jsonl`, `label_studio`, `voc`, `yolo`, `database`.
    pub format: String,
}

/// The dataset version that labels belong to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetBinding {
    pub artifact: ArtifactRef,
    /// The digest at the time when the labels were published.
    pub digest: Digest,
}

/// The root manifest. Its canonical bytes are the JSON of this struct with the fields in this order
/// and without white space. Their BLAKE3 is the digest of the artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// 3 if an image has referrers, 2 if entries have [`Attributes`], otherwise 1, which programs of
    /// every version read.
    pub format: u32,
    pub kind: Kind,
    /// The metadata of the kind.
    pub info: KindInfo,
    /// The parameters with which the content was cut.
    pub chunking: Chunking,
    pub totals: Totals,
    /// The number of levels of index pages between this list and the entry pages. 0: the list
    /// contains entry pages.
    pub depth: u8,
    /// The pages in order.
    pub pages: Vec<PageRef>,
}

impl Root {
    pub fn to_bytes(&self) -> Vec<u8> {
        #[expect(
            clippy::expect_used,
            reason = "a struct of strings and numbers always has a JSON form"
        )]
        serde_json::to_vec(self).expect("a root manifest as JSON")
    }

    /// The BLAKE3 of the canonical bytes, which identifies the artifact.
    pub fn digest(&self) -> Digest {
        Hash::of(&self.to_bytes())
    }

    /// Parses the bytes of a root manifest and checks that they hash to `digest`.
    pub fn parse(bytes: &[u8], digest: Digest) -> Result<Self, Fault> {
        if Hash::of(bytes) != digest {
            return Err(Fault::integrity(format!(
                "the content of the root manifest {digest} does not match its hash"
            )));
        }
        check_values(bytes, ROOT_VALUES_MAX).map_err(|values| {
            Fault::integrity(format!(
                "the root manifest {digest} has {values} values; {ROOT_VALUES_MAX} are allowed"
            ))
        })?;
        let root: Self = serde_json::from_slice(bytes).map_err(|e| {
            Fault::integrity(format!("the root manifest {digest} is malformed: {e}"))
        })?;
        if !(1..=FORMAT_MAX).contains(&root.format) {
            let format = root.format;
            return Err(Fault::integrity(format!(
                "the root manifest {digest} has format {format}; this version reads formats up to {FORMAT_MAX}"
            ))
            .with_next("upgrade packhorse on this machine"));
        }
        if root.to_bytes() != bytes {
            return Err(Fault::integrity(format!(
                "the root manifest {digest} is not in canonical form"
            ))
            .with_next("upgrade packhorse on this machine"));
        }
        if !root.chunking.is_possible() {
            return Err(Fault::integrity(format!(
                "the root manifest {digest} has invalid chunk sizes"
            )));
        }
        Ok(root)
    }
}

/// A reference to a manifest page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRef {
    /// BLAKE3 of the raw bytes of the page.
    pub id: Hash,
    /// The number of raw bytes.
    pub len: u32,
    /// The number of chunk references in the page and below it.
    pub chunks: u64,
    /// The number of entries that start in the page and below it.
    pub entries: u64,
}

#[cfg(test)]
mod tests;

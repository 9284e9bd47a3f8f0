//! Manifests: the sorted entries of an artifact and what its kind needs.
//!
//! A manifest is a tree: the root manifest lists pages, which hold entries and chunk references
//! (or, above [`Root::depth`] 0, further pages). Pages are chunks like any other: named by their
//! BLAKE3, kept in the store, fetched when lacking. Nothing here does I/O; [`Builder`] hands
//! finished pages to a closure, [`Walk`] asks for them through [`Pages`], and neither holds more
//! than a page of each level.

mod build;
mod check;
pub mod delta;
mod page;
mod survey;
mod walk;

pub use build::Builder;
pub use check::check;
pub use page::{ChunkRef, read_children};
pub use survey::{Named, survey};
pub use walk::{
    ChunkPosition, Listed, Pages, Step, Walk, children, entry_pages, for_each_page, level_below,
    top_level,
};

use serde::{Deserialize, Serialize};

pub use crate::chunk::Chunking;
use crate::chunk::Hash;
use base::fault::Fault;
use base::names::{ArtifactRef, Kind, RelPath};

/// The BLAKE3 of a root manifest: what an artifact *is*.
pub type Digest = Hash;

/// One entry of an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it stands.
    pub path: RelPath,
    /// Unix permission bits; of an entry that was read, no more than 0777.
    pub mode: u32,
    /// What it is.
    pub body: EntryBody,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryBody {
    /// A folder.
    Dir,
    /// A symbolic link.
    Symlink(String),
    /// A regular file.
    File(FileInfo),
}

/// A regular file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileInfo {
    /// Bytes.
    pub size: u64,
    /// BLAKE3 of the whole content.
    pub hash: Hash,
}

/// Counts over all entries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Regular files.
    pub files: u64,
    /// Folders.
    pub dirs: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// Chunks of all files, repeats counted.
    pub chunks: u64,
}

/// What an artifact's kind needs beside its entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum KindInfo {
    /// A folder of files: nothing more.
    Files,
    /// The entries are an OCI image layout folder: `oci-layout`, `index.json`, `blobs/sha256/…`.
    Image(ImageInfo),
    /// The entries are the canonical label files.
    Labels(LabelsInfo),
}

/// What is known of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// Media type of the top manifest or index.
    pub media_type: String,
    /// `sha256:<hex>` of the top manifest or index: what every site's registry must answer with.
    pub digest: String,
    /// Its size in bytes.
    pub size: u64,
    /// `os/arch[/variant]` of each image held.
    pub platforms: Vec<String>,
    /// `sha256:<hex>` of manifests that the source listed but did not hold; they were left out.
    pub absent: Vec<String>,
}

/// What is known of a label set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelsInfo {
    /// The dataset version these labels are for.
    pub dataset: Option<DatasetBinding>,
    /// Samples named.
    pub samples: u64,
    /// Annotations.
    pub annotations: u64,
    /// Classes.
    pub classes: u64,
    /// The format they came in: `coco`, `csv`, `jsonl`, `label_studio`, `voc`, `yolo`, `database`.
    pub format: String,
}

/// A dataset version that labels belong to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatasetBinding {
    /// Its reference.
    pub artifact: ArtifactRef,
    /// Its digest when the labels were published.
    pub digest: Digest,
}

/// The root manifest. Its canonical bytes are the JSON of this struct, fields in this order, no
/// white space; their BLAKE3 is the artifact's digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// 1.
    pub format: u32,
    /// The artifact's kind.
    pub kind: Kind,
    /// What the kind needs.
    pub info: KindInfo,
    /// How content was cut.
    pub chunking: Chunking,
    /// Counts.
    pub totals: Totals,
    /// How many levels of index pages stand between this list and the entry pages (0: these are
    /// entry pages).
    pub depth: u8,
    /// The pages, in order.
    pub pages: Vec<PageRef>,
}

impl Root {
    /// The canonical bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        #[expect(
            clippy::expect_used,
            reason = "a struct of strings and numbers always has a JSON form"
        )]
        serde_json::to_vec(self).expect("a root manifest as JSON")
    }

    /// Their BLAKE3: what the artifact is.
    pub fn digest(&self) -> Digest {
        Hash::of(&self.to_bytes())
    }

    /// A root manifest from bytes that hash to `digest`.
    pub fn parse(bytes: &[u8], digest: Digest) -> Result<Self, Fault> {
        if Hash::of(bytes) != digest {
            return Err(Fault::integrity(format!(
                "the root manifest {digest} does not hash to its name"
            )));
        }
        let root: Self = serde_json::from_slice(bytes).map_err(|e| {
            Fault::integrity(format!("the root manifest {digest} is malformed: {e}"))
        })?;
        if root.format != 1 {
            let format = root.format;
            return Err(Fault::integrity(format!(
                "the root manifest {digest} has format {format}; this program reads 1"
            ))
            .with_next("upgrade packhorse here"));
        }
        if root.to_bytes() != bytes {
            return Err(Fault::integrity(format!(
                "the root manifest {digest} is not in canonical form"
            ))
            .with_next("upgrade packhorse here"));
        }
        if !root.chunking.is_possible() {
            return Err(Fault::integrity(format!(
                "the root manifest {digest} has impossible chunk sizes"
            )));
        }
        Ok(root)
    }
}

/// One manifest page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRef {
    /// BLAKE3 of the page's raw bytes.
    pub id: Hash,
    /// Raw bytes.
    pub len: u32,
    /// Chunk references in it, or below it.
    pub chunks: u64,
    /// Entries that begin in it, or below it.
    pub entries: u64,
}

#[cfg(test)]
mod tests;

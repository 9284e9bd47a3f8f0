//! What `ingest` reads from: the trait that every reader of an input format implements, and what it
//! yields.
//!
//! The readers are in the crate `source`.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use base::fault::Fault;
use base::names::RelPath;
use bytes::Bytes;

pub use crate::file_identity::FileIdentity;
use crate::manifest::KindInfo;
use base::omitted::Omitted;

/// One entry as a source names it.
#[derive(Debug, Clone)]
pub struct SourceEntry {
    /// Where it stands in the artifact.
    pub path: RelPath,
    /// Unix permission bits (`0o7777` at most).
    pub mode: u32,
    /// What it is.
    pub body: SourceBody,
    /// The file that the content is in, as it was before the source looked at it: once the content
    /// is read it must still hold. `None` where nothing was read of any file.
    pub identity: Option<FileIdentity>,
}

/// What a source entry is.
#[derive(Debug, Clone)]
pub enum SourceBody {
    /// A folder.
    Dir,
    /// A symbolic link whose target stays inside the artifact.
    Symlink(String),
    /// A regular file of `size` bytes.
    File {
        /// Bytes that must come out of `content`; fewer or more means that it changed while it was
        /// read.
        size: u64,
        /// Where they are.
        content: Content,
    },
}

/// Where a file's bytes are.
#[derive(Debug, Clone)]
pub enum Content {
    /// The whole of this file.
    File(PathBuf),
    /// The whole of this file in the scratch folder. Whoever has read all of it may remove it, so
    /// that its bytes are not on the disk twice.
    Scratch(PathBuf),
    /// A range of this file (a member of an uncompressed tar), from `offset` on.
    Range {
        /// The file that holds it.
        file: Arc<PathBuf>,
        /// Where it begins, in bytes.
        offset: u64,
    },
    /// Here (small things that a source made itself).
    Memory(Bytes),
}

/// Reads an artifact in.
pub trait Source: Send {
    /// The next entry in manifest order (component-wise by path, a folder before what it holds);
    /// `None` at the end.
    fn next(&mut self) -> Result<Option<SourceEntry>, Fault>;

    /// Tells it that the file of the last entry ([`Content::File`], as it gave it) is open now: it
    /// may look at it, and may not read it.
    fn opened(&mut self, _file: &File) {}

    /// What the artifact's kind needs beside its entries. Asked after the last entry.
    fn info(&self) -> KindInfo;

    /// What is left out of the artifact, as far as the source has been read: complete after the
    /// last entry.
    fn omitted(&self) -> Omitted {
        Omitted::default()
    }
}

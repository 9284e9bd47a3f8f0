//! The input of `ingest`: the trait that every reader of an input format implements, and its
//! entries.
//!
//! The readers are in the crate `source`.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use base::fault::Fault;
use base::names::RelPath;
use bytes::Bytes;

pub use crate::file_identity::FileIdentity;
use crate::manifest::{Attributes, KindInfo};
use base::omitted::Omitted;

/// One entry of a source.
#[derive(Debug, Clone)]
pub struct SourceEntry {
    /// The path in the artifact.
    pub path: RelPath,
    /// Unix permission bits (at most `0o7777`).
    pub mode: u32,
    pub body: SourceBody,
    /// The identity of the file with the content before the source examined it. After the content
    /// is read, the file must still have this identity. `None` if no file was read.
    pub identity: Option<FileIdentity>,
    /// What the entry has beside its content.
    pub attributes: Attributes,
}

/// The type of a source entry.
#[derive(Debug, Clone)]
pub enum SourceBody {
    Dir,
    /// A symbolic link whose target stays inside the artifact.
    Symlink(String),
    /// A regular file of `size` bytes.
    File {
        /// The exact number of bytes in `content`; a different number means that the file changed
        /// while it was read.
        size: u64,
        content: Content,
    },
}

impl SourceEntry {
    /// The bytes of its content.
    pub fn bytes(&self) -> u64 {
        match &self.body {
            SourceBody::File { size, .. } => *size,
            SourceBody::Dir | SourceBody::Symlink(_) => 0,
        }
    }
}

/// The location of the content of a file.
#[derive(Debug, Clone)]
pub enum Content {
    /// A complete file.
    File(PathBuf),
    /// A complete file in the scratch directory. The reader may remove it after reading it, so that
    /// the disk does not hold its content twice.
    Scratch(PathBuf),
    /// A range of a file, such as a member of an uncompressed tar.
    Range {
        /// The file that contains the range.
        file: Arc<PathBuf>,
        /// The start of the range, in bytes.
        offset: u64,
    },
    /// Small content that the source created itself.
    Memory(Bytes),
}

/// Reads an artifact.
pub trait Source: Send {
    /// The next entry in manifest order: by path component, a directory before its content. `None`
    /// at the end.
    fn next(&mut self) -> Result<Option<SourceEntry>, Fault>;

    /// Called when the file of the last entry ([`Content::File`]) is open. The source may inspect
    /// the file but must not read it; it refuses a file that must not be read.
    fn opened(&mut self, _file: &File) -> Result<(), Fault> {
        Ok(())
    }

    /// The bytes of all its files, if that is known before the first entry.
    fn total(&self) -> Option<u64> {
        None
    }

    /// The metadata of the artifact's kind. Called after the last entry.
    fn info(&self) -> KindInfo;

    /// The content that was left out so far; complete after the last entry.
    fn omitted(&self) -> Omitted {
        Omitted::default()
    }
}

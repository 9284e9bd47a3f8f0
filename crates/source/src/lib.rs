//! Readers of input formats: directories and files, images, labels.
//!
//! A source lists entries and the locations of their bytes; it does not chunk, hash or store.
//! `content::ingest` drives it on a blocking thread. Temporary data of a source (a decompressed
//! tar, sorted label rows) goes to the scratch directory that it receives. `ingest` removes that
//! directory afterwards; after a crash, the next start removes it.

pub mod files;
pub mod image;
pub mod image_list;
mod inside;
pub mod labels;
pub mod own;

pub use content::source::{Content, FileIdentity, Source, SourceBody, SourceEntry};

//! Readers of input formats: folders and files, images, labels.
//!
//! A source names things and says where their bytes are; it does not chunk, hash or store.
//! `content::ingest` drives it on a blocking thread. What a source has to spill (a decompressed
//! tar, sorted label rows) goes to the scratch folder it was given, which `ingest` removes
//! afterwards, so a crash leaves nothing but a folder that the next start cleans.

pub mod files;
pub mod image;
mod inside;
pub mod labels;
pub mod own;

pub use content::source::{Content, FileIdentity, Source, SourceBody, SourceEntry};

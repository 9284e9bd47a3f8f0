//! Content: chunks, frames, manifests, the store that holds them, and the ingest that fills it.
//!
//! This crate owns the on-disk formats of packs, their index, manifests and bundles. The hub, the
//! relay, sites (for manifest pages) and publishers call it. A crash loses at most what
//! [`store::Store::flush`] has not synced: the index names only synced bytes.

pub mod bloom;
pub mod bundle;
pub mod chunk;
mod file_identity;
pub mod frame;
pub mod ingest;
pub mod label_rows;
pub mod manifest;
pub mod redb_file;
pub mod source;
pub mod store;
#[cfg(test)]
mod testing;

//! `verify` at the hub: reads an artifact as a delivery would send it, and checks all that a site would check.
//!
//! The manifest is walked with the same checks as at a site. Each chunk is read, decoded and hashed, and compared with the length that
//! the manifest names; each file is compared with its hash, and a blob of an image with the SHA-256 in its name as well. Of an artifact
//! that lives at a site only that is read which the hub holds. What does not verify is removed from the index of its store, so that
//! publishing the content again stores it anew.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sha2::Digest as _;

use super::Hub;
use crate::catalogue::ArtifactRow;
use crate::chunk::Hash;
use crate::fault::Fault;
use crate::fetch::blocking;
use crate::frame::Verified;
use crate::jobs::JobProgress;
use crate::manifest::{ChunkRef, EntryBody, FileInfo, Step, Walk};
use crate::names::{ArtifactRef, Kind, RelPath};
use crate::registry::image::Sha256;
use crate::relay::Relay;
use crate::store::Store;

impl Hub {
    /// Re-reads every page and chunk of an artifact. One line a fault.
    pub(super) async fn verify_now(&self, artifact: ArtifactRef, progress: Arc<JobProgress>) -> Result<Vec<String>, Fault> {
        let row = self.inner.catalogue.artifact(&artifact).await?;
        let others = self.inner.catalogue.artifacts().await?;
        let (store, relay) = (self.inner.store.clone(), self.inner.relay.clone());
        progress.doing(format!("re-reading {artifact}"));
        blocking(move || {
            let mut verify =
                Verify { row: &row, store: &store, relay: &relay, progress: &progress, found: Vec::new(), damaged: HashSet::new() };
            verify.read_all();
            let Verify { mut found, damaged, .. } = verify;
            for other in others.iter().filter(|other| !damaged.is_empty() && other.artifact != artifact) {
                // A manifest that cannot be read is found by the verify of its own artifact.
                let chunks = Walk::new(&other.root, &store).filter_map(|step| match step {
                    Ok(Step::Chunk(chunk, _)) => Some(chunk.id),
                    _ => None,
                });
                let hit = chunks.filter(|id| damaged.contains(id)).count();
                if hit > 0 {
                    found.push(format!("{}: {hit} of the damaged chunks are its too", other.artifact));
                }
            }
            Ok(found)
        })
        .await
    }
}

struct Verify<'a> {
    row: &'a ArtifactRow,
    store: &'a Store,
    relay: &'a Relay,
    progress: &'a JobProgress,
    /// One line for each fault.
    found: Vec<String>,
    damaged: HashSet<Hash>,
}

impl Verify<'_> {
    fn read_all(&mut self) {
        let mut file: Option<OpenFile> = None;
        for step in Walk::new(&self.row.root, self.store) {
            match step {
                Err(fault) => {
                    self.found.push(format!("{}: {fault}", self.row.artifact));
                    return;
                }
                Ok(Step::Entry { entry, .. }) => {
                    self.end(file.take());
                    if let EntryBody::File(info) = entry.body {
                        file = Some(OpenFile::new(self.row.artifact.kind, entry.path, info));
                    }
                }
                Ok(Step::Chunk(chunk, _)) => {
                    self.progress.bytes.fetch_add(u64::from(chunk.len), Ordering::Relaxed);
                    let Some(file) = &mut file else { continue };
                    match self.read(chunk) {
                        Ok(Some(chunk)) => file.take(&chunk),
                        Ok(None) => file.is_whole = false,
                        Err(fault) => {
                            file.is_whole = false;
                            self.found.push(format!("{}: {}: {fault}", self.row.artifact, file.path));
                            self.damaged.insert(chunk.id);
                        }
                    }
                }
            }
        }
        self.end(file);
    }

    /// `None`: the hub does not hold it, and need not.
    fn read(&self, chunk: ChunkRef) -> Result<Option<Verified>, Fault> {
        if self.row.origin.is_some() { self.relay.read(chunk) } else { self.store.read_chunk(chunk).map(Some) }
    }

    fn end(&mut self, file: Option<OpenFile>) {
        let Some(file) = file else { return };
        let path = file.path.clone();
        self.found.extend(file.faults().into_iter().map(|why| format!("{}: {path}: {why}", self.row.artifact)));
    }
}

/// A file whose chunks are being read.
struct OpenFile {
    path: RelPath,
    info: FileInfo,
    content: blake3::Hasher,
    /// Of a blob of an image.
    blob: Option<(Sha256, sha2::Sha256)>,
    /// Whether all of it was there and sound so far.
    is_whole: bool,
}

impl OpenFile {
    fn new(kind: Kind, path: RelPath, info: FileInfo) -> Self {
        let blob = Sha256::from_layout_path(path.as_str()).filter(|_| kind == Kind::Image).map(|name| (name, sha2::Sha256::new()));
        Self { path, info, content: blake3::Hasher::new(), blob, is_whole: true }
    }

    fn take(&mut self, chunk: &Verified) {
        // A file of one chunk is named by its hash: that was compared.
        if chunk.id != self.info.hash {
            self.content.update(&chunk.bytes);
        }
        if let Some((_, content)) = &mut self.blob {
            content.update(&chunk.bytes);
        }
    }

    fn faults(self) -> Vec<String> {
        let mut out = Vec::new();
        if !self.is_whole {
            return out;
        }
        let content = self.content.finalize();
        let is_one_chunk = self.content.count() == 0 && self.info.size > 0;
        if !is_one_chunk && *content.as_bytes() != self.info.hash.0 {
            out.push(format!("its content does not match the hash in the manifest, {}", self.info.hash));
        }
        if let Some((name, content)) = self.blob {
            let found = Sha256(content.finalize().into());
            if found != name {
                out.push(format!("it is an image blob, and its content is {found}"));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests;

//! `verify` at the hub: reads an artifact as a delivery would send it, and performs all checks that
//! a site would perform.
//!
//! The manifest is walked with the same checks as at a site. Each chunk is read, decoded, hashed,
//! and compared with the length in the manifest. Each file is compared with its hash; a blob of an
//! image is also compared with the SHA-256 in its name. An image must have everything that its
//! manifests name. If the content of an artifact is at a site, only the part that the hub holds is
//! read. Content that does not verify is removed from the index of its store, so that publishing it
//! again stores it again.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use sha2::Digest as _;

use super::HubJobs;
use crate::hub::manifests::{AllArtifacts, fault_of};
use base::blocking::blocking;
use base::fault::{Code, Fault};
use base::job_progress::JobProgress;
use base::limits::{IMAGE_MANIFEST_BYTES_MAX, OFFENDERS_LISTED_MAX};
use base::names::{ArtifactRef, Kind, RelPath};
use content::chunk::Hash;
use content::frame::Verified;
use content::manifest::{
    self, ChunkRef, Entry, EntryBody, FileInfo, ImageInfo, KindInfo, Named, Step, Walk,
};
use content::store::Store;
use exchange::relay::Relay;
use registry::image::{Descriptor, Sha256, walk};
use sink::images::attached;
use state::ArtifactRow;

impl HubJobs {
    /// Reads every page and chunk of an artifact, or with `quick` only the pages. Returns one line
    /// for each fault.
    pub(in crate::hub) async fn verify_now(
        &self,
        artifact: ArtifactRef,
        quick: bool,
        progress: Arc<JobProgress>,
    ) -> Result<Vec<String>, Fault> {
        let row = self.parts.catalogue.artifact(&artifact).await?;
        let others = self.parts.catalogue.artifact_names().await?;
        let all = AllArtifacts::of(&self.parts.catalogue);
        let (store, relay) = (self.parts.store.clone(), self.parts.relay.relay().clone());
        progress.doing(format!("re-reading {artifact}"));
        if !quick {
            let total = row.root.totals.bytes;
            progress.total.store(total, Ordering::Relaxed);
        }
        blocking(move || {
            let mut verify =
                Verify { row: &row, quick, store: &store, relay: &relay, progress: &progress, found: Vec::new(), damaged: HashSet::new() };
            verify.read_all()?;
            if quick {
                progress.note("quick check: the manifest was read, and each chunk was looked up in the index; no chunk was read");
            }
            let Verify { mut found, damaged, .. } = verify;
            for name in others.iter().filter(|other| !damaged.is_empty() && **other != artifact) {
                let Some(other) = all.row(name)? else { continue };
                // An unreadable manifest is reported when its own artifact is verified.
                let mut hit = 0;
                let mut take = |named| {
                    hit += usize::from(match named {
                        Named::Chunk(ChunkRef { id, .. }) | Named::File { hash: id, .. } => damaged.contains(&id),
                        Named::Page(_) => false,
                    });
                };
                manifest::survey(&other.root, &store, &mut HashSet::new(), &mut take)?;
                if hit > 0 {
                    found.push(format!("{}: it contains {hit} of the damaged chunks too", other.artifact));
                }
            }
            Ok(found)
        })
        .await
    }
}

struct Verify<'a> {
    row: &'a ArtifactRow,
    /// Whether each chunk is only looked up in the index and not read.
    quick: bool,
    store: &'a Store,
    relay: &'a Relay,
    progress: &'a JobProgress,
    /// One line for each fault.
    found: Vec<String>,
    damaged: HashSet<Hash>,
}

impl Verify<'_> {
    /// Records the fault of a malformed manifest, and reads the chunks that it names.
    fn read_malformed(&mut self, fault: &Fault) -> Result<(), Fault> {
        self.found.push(fault.to_string());
        let (row, store) = (self.row, self.store);
        let whole = u64::from(row.root.chunking.whole);
        let mut take = |named| {
            let chunk = match named {
                Named::Chunk(chunk) => chunk,
                Named::File { hash, size } if size > 0 && size <= whole => ChunkRef {
                    id: hash,
                    len: size as u32,
                },
                Named::File { .. } | Named::Page(_) => return,
            };
            if let Err(fault) = self.read(chunk) {
                self.found.push(format!("{}: {fault}", row.artifact));
                self.damaged.insert(chunk.id);
            }
        };
        let lost = manifest::survey(&row.root, store, &mut HashSet::new(), &mut take)?;
        let new = lost
            .iter()
            .filter(|lost| !fault.message.ends_with(&lost.message));
        self.found
            .extend(new.map(|lost| format!("{}: {lost}", row.artifact)));
        Ok(())
    }

    fn read_all(&mut self) -> Result<(), Fault> {
        let stop = self.progress.stop();
        let checked = fault_of(&self.row.artifact, &self.row.root, self.store, &stop);
        self.progress.check()?;
        if let Some(fault) = checked? {
            return self.read_malformed(&fault);
        }
        let mut file: Option<OpenFile> = None;
        for step in Walk::new(&self.row.root, self.store) {
            self.progress.check()?;
            match step {
                Err(fault) => return Err(fault),
                Ok(Step::Entry { entry, .. }) => {
                    self.end(file.take());
                    if let EntryBody::File(info) = entry.body {
                        file = Some(OpenFile::new(self.row.artifact.kind, entry.path, info));
                    }
                }
                Ok(Step::Chunk(chunk, _)) => {
                    let Some(file) = &mut file else { continue };
                    match self.read(chunk) {
                        Ok(Some(chunk)) => file.take(&chunk),
                        Ok(None) => file.is_whole = false,
                        Err(fault) => {
                            file.is_whole = false;
                            self.found
                                .push(format!("{}: {}: {fault}", self.row.artifact, file.path));
                            self.damaged.insert(chunk.id);
                        }
                    }
                }
            }
        }
        self.end(file);
        match &self.row.root.info {
            // If the content is at a site, the hub may hold only a part of it.
            KindInfo::Image(info)
                if self.found.is_empty() && self.row.origin.is_none() && !self.quick =>
            {
                self.check_image(info)
            }
            _ => Ok(()),
        }
    }

    /// Checks an image from its top manifest to its blobs, as a site does.
    fn check_image(&mut self, info: &ImageInfo) -> Result<(), Fault> {
        let digest = info.digest.parse().map_err(Fault::integrity)?;
        let top = Descriptor {
            media_type: info.media_type.clone(),
            digest,
            size: info.size,
            urls: None,
            platform: None,
        };
        let walked = {
            let this = &*self;
            let load = |wanted: Descriptor| {
                std::future::ready(this.small_file(&wanted.digest.layout_path()))
            };
            tokio::runtime::Handle::current().block_on(async {
                Ok::<_, Fault>((walk(&top, load).await?, attached(info, load).await?))
            })
        };
        let (tree, attached) = match walked {
            Ok(walked) => walked,
            Err(fault) if matches!(fault.code, Code::Integrity | Code::NotFound) => {
                self.found.push(format!("{}: {fault}", self.row.artifact));
                return Ok(());
            }
            Err(fault) => return Err(fault),
        };
        let absent = tree
            .absent
            .iter()
            .filter(|digest| !info.absent.contains(&digest.to_string()));
        self.found.extend(
            absent.map(|digest| format!("{}: manifest {digest} is missing", self.row.artifact)),
        );
        let trees = std::iter::once(&tree).chain(attached.iter().map(|one| &one.tree));
        let needed = trees
            .flat_map(|tree| &tree.blobs)
            .filter(|blob| !blob.is_foreign());
        let mut needed: HashMap<String, u64> = needed
            .map(|blob| (blob.digest.layout_path(), blob.size))
            .collect();
        for step in Walk::new(&self.row.root, self.store) {
            if let Step::Entry {
                entry:
                    Entry {
                        path,
                        body: EntryBody::File(file),
                        ..
                    },
                ..
            } = step?
                && needed.get(path.as_str()) == Some(&file.size)
            {
                needed.remove(path.as_str());
            }
        }
        let lacking = needed.into_iter().map(|(path, size)| {
            format!(
                "{}: the file {path} of {size} bytes, which its manifests name, is missing",
                self.row.artifact
            )
        });
        self.found.extend(lacking.take(OFFENDERS_LISTED_MAX));
        Ok(())
    }

    /// The content of a file of the artifact, which must not be larger than an image manifest may
    /// be. `None`: there is no file at this path.
    fn small_file(&self, wanted: &str) -> Result<Option<Bytes>, Fault> {
        let (mut out, mut found) = (Vec::new(), false);
        for step in Walk::new(&self.row.root, self.store) {
            match step? {
                Step::Entry { .. } if found => break,
                Step::Entry {
                    entry:
                        Entry {
                            path,
                            body: EntryBody::File(file),
                            ..
                        },
                    ..
                } if path.as_str() == wanted => {
                    if file.size > IMAGE_MANIFEST_BYTES_MAX as u64 {
                        return Err(Fault::integrity(format!(
                            "{wanted}: an image manifest of {} bytes is too large",
                            file.size
                        )));
                    }
                    found = true;
                }
                Step::Chunk(chunk, _) if found => {
                    out.extend_from_slice(&self.store.read_chunk(chunk)?.bytes);
                }
                _ => {}
            }
        }
        Ok(found.then(|| out.into()))
    }

    /// Reads a chunk, or with `quick` looks it up. `None`: the chunk was not read; the hub need not
    /// hold it, or this is a quick check.
    fn read(&self, chunk: ChunkRef) -> Result<Option<Verified>, Fault> {
        match (self.quick, self.row.origin.is_some()) {
            (true, true) => return Ok(None),
            (true, false) if self.store.has(chunk.id)? => return Ok(None),
            (true, false) => {
                return Err(Fault::integrity(format!(
                    "chunk {} is not in the store",
                    chunk.id
                )));
            }
            (false, _) => {}
        }
        self.progress
            .bytes
            .fetch_add(u64::from(chunk.len), Ordering::Relaxed);
        if self.row.origin.is_some() {
            self.relay.read(chunk)
        } else {
            self.store.read_chunk(chunk).map(Some)
        }
    }

    fn end(&mut self, file: Option<OpenFile>) {
        let Some(file) = file else { return };
        let path = file.path.clone();
        self.found.extend(
            file.faults()
                .into_iter()
                .map(|why| format!("{}: {path}: {why}", self.row.artifact)),
        );
    }
}

/// A file whose chunks are being read.
struct OpenFile {
    path: RelPath,
    info: FileInfo,
    content: blake3::Hasher,
    /// The expected SHA-256 and the hasher, for a blob of an image.
    blob: Option<(Sha256, sha2::Sha256)>,
    /// Whether every chunk so far was read and verified.
    is_whole: bool,
}

impl OpenFile {
    fn new(kind: Kind, path: RelPath, info: FileInfo) -> Self {
        let blob = Sha256::from_layout_path(path.as_str())
            .filter(|_| kind == Kind::Image)
            .map(|name| (name, sha2::Sha256::new()));
        Self {
            path,
            info,
            content: blake3::Hasher::new(),
            blob,
            is_whole: true,
        }
    }

    fn take(&mut self, chunk: &Verified) {
        // The hash of a file of one chunk is the chunk's hash, which was compared.
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
            out.push(format!(
                "its content does not match the hash in the manifest, {}",
                self.info.hash
            ));
        }
        if let Some((name, content)) = self.blob {
            let found = Sha256(content.finalize().into());
            if found != name {
                out.push(format!(
                    "the digest of this image blob is {found}, which differs from its name"
                ));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests;

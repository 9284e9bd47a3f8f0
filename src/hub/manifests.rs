//! The manifests of the catalogue as a whole: which of them are malformed, and what all of them
//! name.
//!
//! An earlier version took malformed manifests into the catalogue. Whoever works on all of them
//! (`gc`, eviction, `doctor`) reports such an artifact by its name and goes on: it counts as
//! holding all that can be read of it.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use super::{Hub, short};
use base::blocking::blocking;
use base::fault::{Code, Fault};
use base::limits::DOCTOR_MANIFESTS_MAX;
use base::names::ArtifactRef;
use content::chunk::Hash;
use content::manifest::{self, Digest, Named, Root};
use content::store::Store;
use state::{ArtifactRow, Catalogue};

/// What is alive of a store: eight bytes of each name.
pub(super) type Live = HashSet<u64>;
/// Manifests that were checked, and whether they were sound.
pub(super) type Checked = HashMap<Digest, bool>;

impl Hub {
    /// Refuses a manifest whose pages are in the store and that is malformed.
    pub(super) async fn check_manifest(
        &self,
        artifact: &ArtifactRef,
        root: &Root,
    ) -> Result<(), Fault> {
        let (artifact, root, store) = (artifact.clone(), root.clone(), self.inner.store.clone());
        blocking(move || manifest::check(&artifact, &root, &store)).await
    }

    /// What `doctor` says of the manifests. Each is checked once while the daemon runs; a long list
    /// takes more than one call.
    pub(super) async fn manifest_lines(&self) -> Result<Vec<String>, Fault> {
        let names = self.inner.catalogue.artifacts_by_digest().await?;
        let all = AllArtifacts::of(&self.inner.catalogue);
        let (store, checked) = (
            self.inner.store.clone(),
            self.inner.checked_manifests.clone(),
        );
        blocking(move || {
            let (mut out, mut left, begun) = (Vec::new(), 0, Instant::now());
            let there: HashSet<Digest> = names.iter().map(|(_, digest)| *digest).collect();
            checked.lock().retain(|digest, _| there.contains(digest));
            for (name, digest) in &names {
                // One that was not may have been repaired.
                if checked.lock().get(digest) == Some(&true) {
                    continue;
                }
                if begun.elapsed() >= DOCTOR_MANIFESTS_MAX {
                    left += 1;
                    continue;
                }
                let Some(row) = all.row(name)? else { continue };
                let fault = fault_of(&row.artifact, &row.root, &store)?;
                checked.lock().insert(row.digest, fault.is_none());
                out.extend(
                    fault.map(|fault| format!("fault manifest {}", malformed_line(&row, &fault))),
                );
            }
            if left > 0 {
                out.push(format!(
                    "ok manifests: {left} of {} are not checked yet; run 'packhorse doctor' again",
                    names.len()
                ));
            }
            Ok(out)
        })
        .await
    }
}

/// Reads the artifacts of the catalogue one by one where it may block, so that their root manifests
/// are not in memory together.
pub(super) struct AllArtifacts {
    catalogue: Catalogue,
    runtime: tokio::runtime::Handle,
}

impl AllArtifacts {
    /// To be called within the runtime.
    pub(super) fn of(catalogue: &Catalogue) -> Self {
        Self {
            catalogue: catalogue.clone(),
            runtime: tokio::runtime::Handle::current(),
        }
    }

    /// One of them; `None`: it was removed meanwhile. Blocks.
    pub(super) fn row(&self, name: &ArtifactRef) -> Result<Option<ArtifactRow>, Fault> {
        match self.runtime.block_on(self.catalogue.artifact(name)) {
            Ok(row) => Ok(Some(row)),
            Err(fault) if fault.code == Code::NotFound => Ok(None),
            Err(fault) => Err(fault),
        }
    }

    /// The root manifest of this digest; `None`: no artifact has it any more, or none whose row can
    /// be read. Blocks.
    pub(super) fn root(&self, digest: Digest) -> Result<Option<Root>, Fault> {
        let row = self.runtime.block_on(self.catalogue.by_digest(digest))?;
        Ok(row.map(|row| row.root))
    }
}

/// What is wrong with an artifact's manifest. Only a store that cannot be read at all is an error.
pub(super) fn fault_of(
    artifact: &ArtifactRef,
    root: &Root,
    store: &Store,
) -> Result<Option<Fault>, Fault> {
    match manifest::check(artifact, root, store) {
        Ok(()) => Ok(None),
        Err(fault) if matches!(fault.code, Code::Integrity | Code::NotFound) => Ok(Some(fault)),
        Err(fault) => Err(fault),
    }
}

/// One line for people: the fault names the artifact.
pub(super) fn malformed_line(row: &ArtifactRow, fault: &Fault) -> String {
    let what = match &row.origin {
        Some(site) => format!(
            "publish its content again at site {site}; if the manifest is malformed, under a new version"
        ),
        None => "publish its content again; if the manifest is malformed, under a new version"
            .to_owned(),
    };
    format!("{fault}; it cannot be delivered; {what}")
}

/// Marks all that can be read of a manifest. `pages`: the pages that were read before, of this
/// manifest or of another.
pub(super) fn mark(
    root: &Root,
    store: &Store,
    pages: &mut HashSet<Hash>,
    live: &mut Live,
) -> Result<(), Fault> {
    manifest::survey(root, store, pages, &mut |named| {
        let id = match named {
            Named::Page(id) | Named::File { hash: id, .. } => id,
            Named::Chunk(chunk) => chunk.id,
        };
        live.insert(short(id.short()));
    })
    .map(|_| ())
}

#[cfg(test)]
mod tests;

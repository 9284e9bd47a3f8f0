//! All manifests of the catalogue: finds the malformed ones, and collects the names of all content
//! that they use.
//!
//! An earlier version accepted malformed manifests. Each task that reads all manifests (`gc`,
//! eviction, `doctor`) reports such an artifact by name and continues. Everything that can be read
//! from such a manifest counts as in use.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::short;
use base::blocking::{Stop, cancellable};
use base::fault::{Code, Fault};
use base::limits::DOCTOR_MANIFESTS_MAX;
use base::names::ArtifactRef;
use content::chunk::Hash;
use content::manifest::{self, Digest, Named, Root};
use content::store::Store;
use state::{ArtifactRow, Catalogue};

/// The content of a store that is in use: eight bytes of each hash.
pub(super) type Live = HashSet<u64>;
/// Which manifests of the catalogue are malformed. Cheap to clone.
#[derive(Clone)]
pub(super) struct Manifests {
    catalogue: Catalogue,
    store: Store,
    /// Those that were checked since the daemon started, and whether they were sound.
    checked: Arc<Mutex<HashMap<Digest, bool>>>,
}

impl Manifests {
    /// Nothing is checked yet.
    pub(super) fn new(catalogue: Catalogue, store: Store) -> Self {
        Self {
            catalogue,
            store,
            checked: Arc::default(),
        }
    }

    /// Refuses a manifest whose pages are in the store and that is malformed. `places` are those of
    /// the peer for one check ([`super::peer_budgets::PeerBudgets::check`]). When the peer has gone,
    /// the check is stopped.
    pub(super) async fn check(
        &self,
        artifact: &ArtifactRef,
        root: &Root,
        places: impl Send + 'static,
    ) -> Result<(), Fault> {
        let (artifact, root, store) = (artifact.clone(), root.clone(), self.store.clone());
        let check = move |stop: &Stop| manifest::check(&artifact, &root, &store, stop);
        cancellable(places, check).await
    }

    /// Logs a manifest that cannot be used, once while the daemon runs. Blocks.
    pub(super) fn warn_once(
        &self,
        artifact: &ArtifactRef,
        digest: Digest,
        root: &Root,
    ) -> Result<(), Fault> {
        if self.checked.lock().contains_key(&digest) {
            return Ok(());
        }
        let fault = fault_of(artifact, root, &self.store, &Stop::default())?;
        self.checked.lock().insert(digest, fault.is_none());
        if let Some(fault) = fault {
            tracing::warn!(%artifact, error = %fault, "the manifest of an artifact cannot be used");
        }
        Ok(())
    }

    /// The lines of `doctor` about the manifests. A valid manifest is checked once while the daemon
    /// runs. One call checks for a limited time, so a long list needs several calls.
    pub(super) async fn doctor_lines(&self) -> Result<Vec<String>, Fault> {
        let names = self.catalogue.artifacts_by_digest().await?;
        let all = AllArtifacts::of(&self.catalogue);
        let (store, checked) = (self.store.clone(), self.checked.clone());
        cancellable((), move |stop| {
            let (mut out, mut left, begun) = (Vec::new(), 0, Instant::now());
            let there: HashSet<Digest> = names.iter().map(|(_, digest)| *digest).collect();
            checked.lock().retain(|digest, _| there.contains(digest));
            for (name, digest) in &names {
                // A manifest that was invalid is checked again: it may have been repaired.
                if checked.lock().get(digest) == Some(&true) {
                    continue;
                }
                if begun.elapsed() >= DOCTOR_MANIFESTS_MAX {
                    left += 1;
                    continue;
                }
                let Some(row) = all.row(name)? else { continue };
                let fault = fault_of(&row.artifact, &row.root, &store, stop)?;
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

/// Reads the artifacts of the catalogue one by one on a blocking thread, so that memory never holds
/// all root manifests.
pub(super) struct AllArtifacts {
    catalogue: Catalogue,
    runtime: tokio::runtime::Handle,
}

impl AllArtifacts {
    /// Must be called within the tokio runtime.
    pub(super) fn of(catalogue: &Catalogue) -> Self {
        Self {
            catalogue: catalogue.clone(),
            runtime: tokio::runtime::Handle::current(),
        }
    }

    /// The row of an artifact. `None`: it was removed since the names were listed. Blocks.
    pub(super) fn row(&self, name: &ArtifactRef) -> Result<Option<ArtifactRow>, Fault> {
        match self.runtime.block_on(self.catalogue.artifact(name)) {
            Ok(row) => Ok(Some(row)),
            Err(fault) if fault.code == Code::NotFound => Ok(None),
            Err(fault) => Err(fault),
        }
    }

    /// The root manifest with this digest. `None`: no artifact has this digest, or its row cannot
    /// be read. Blocks.
    pub(super) fn root(&self, digest: Digest) -> Result<Option<Root>, Fault> {
        let row = self.runtime.block_on(self.catalogue.by_digest(digest))?;
        Ok(row.map(|row| row.root))
    }
}

/// The fault of an artifact's manifest, if it has one. Returns an error only if the store cannot be
/// read, or if the check is stopped.
pub(super) fn fault_of(
    artifact: &ArtifactRef,
    root: &Root,
    store: &Store,
    stop: &Stop,
) -> Result<Option<Fault>, Fault> {
    match manifest::check(artifact, root, store, stop) {
        Ok(()) => Ok(None),
        Err(fault) if matches!(fault.code, Code::Integrity | Code::NotFound) => Ok(Some(fault)),
        Err(fault) => Err(fault),
    }
}

/// One line for a user. The text of the fault names the artifact.
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

/// Marks everything that can be read from a manifest as in use. `pages`: the pages that were read
/// before, for this manifest or another.
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

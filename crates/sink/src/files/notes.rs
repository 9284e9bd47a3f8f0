//! The notes of versions: the digest of a version, and the transfer that delivered it.
//!
//! `<root>/.packhorse/versions/<kind>/<name>/<version>.json` is durable before the version appears.
//! It is created exclusively: if two sites commit different content under one version, only one
//! proceeds. A note whose version neither exists nor is staged belongs to an abandoned commit.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::versions::read_if_exists;
use super::{FilesSink, HIDDEN};
use crate::Incoming;
use base::durable;
use base::fault::{Fault, IoContext, Reason, Retry};
use base::names::{ArtifactRef, TransferId};
use content::manifest::Digest;

/// How often a commit tries to create its note while other commits create and remove theirs.
const CLAIM_TRIES: usize = 3;

/// The content of a version.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Note {
    pub(super) digest: Digest,
    /// The transfer that delivered it; ids sort by time.
    pub(super) transfer: String,
}

impl FilesSink {
    pub(super) fn note_path(&self, artifact: &ArtifactRef) -> PathBuf {
        let folder = self
            .root
            .path()
            .join(HIDDEN)
            .join("versions")
            .join(artifact.kind.as_str())
            .join(artifact.name());
        folder.join(format!("{}.json", artifact.version()))
    }

    /// The note of a version; a malformed note is ignored. A failing NAS is an error.
    pub(super) fn note(&self, artifact: &ArtifactRef) -> Result<Option<Note>, Fault> {
        Ok(read_if_exists(&self.note_path(artifact))?
            .and_then(|text| serde_json::from_str(&text).ok()))
    }

    pub(super) fn write_note(&self, incoming: &Incoming) -> Result<(), Fault> {
        let path = self.note_path(&incoming.artifact);
        durable::create_dir_all(path.parent().unwrap_or(self.root.path()))?;
        // The latest transfer counts: a repair by an older transfer does not make the version
        // older.
        let existing = self
            .note(&incoming.artifact)?
            .filter(|existing| existing.digest == incoming.digest);
        let transfer = existing
            .map(|existing| existing.transfer)
            .max(Some(incoming.transfer.to_string()))
            .unwrap_or_default();
        durable::replace(&path, &note_text(incoming.digest, transfer)?)
    }

    /// Creates the note of a version that is about to appear, before another site creates one. A
    /// note of other content whose version neither exists nor is staged belongs to an abandoned
    /// commit and is removed.
    pub(super) fn claim(&self, incoming: &Incoming) -> Result<(), Fault> {
        let path = self.note_path(&incoming.artifact);
        durable::create_dir_all(path.parent().unwrap_or(self.root.path()))?;
        for _ in 0..CLAIM_TRIES {
            if durable::create(
                &path,
                &note_text(incoming.digest, incoming.transfer.to_string())?,
            )? {
                return Ok(());
            }
            match self.note(&incoming.artifact)? {
                Some(existing) if existing.digest == incoming.digest => {
                    return self.write_note(incoming);
                }
                Some(existing) => {
                    let staged = existing
                        .transfer
                        .parse::<TransferId>()
                        .ok()
                        .map(|id| id.in_dir(&self.staging));
                    if let Some(staged) = staged
                        && staged.try_exists().at(staged.display())?
                    {
                        break;
                    }
                    // The version may have appeared meanwhile, which is a conflict.
                    if self.is_committed(incoming)? {
                        return Ok(());
                    }
                }
                None => {}
            }
            durable::remove_all(&path)?;
        }
        Err(Fault::conflict(format!(
            "another site is committing different content of {} to {}",
            incoming.artifact,
            self.root.path().display()
        ))
        .with_reason(Reason::SinkUnavailable)
        .with_retry(Retry::Backoff)
        .with_next(format!(
            "publish one of the two under another version; see {}",
            path.display()
        )))
    }
}

fn note_text(digest: Digest, transfer: String) -> Result<Vec<u8>, Fault> {
    serde_json::to_vec(&Note { digest, transfer }).map_err(|e| Fault::internal(e.to_string()))
}

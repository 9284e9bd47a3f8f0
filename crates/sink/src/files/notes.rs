//! The notes of versions: which content stands under a version, and which transfer brought it.
//!
//! `<root>/.packhorse/versions/<kind>/<name>/<version>.json` is durable before the version appears.
//! It is created exclusively, so of two sites that commit different contents under one version only
//! one goes on. A note whose version is neither there nor staged was given up.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{FilesSink, HIDDEN, read_if_there};
use crate::Incoming;
use base::durable;
use base::fault::{Fault, IoContext, Reason, Retry};
use base::names::{ArtifactRef, TransferId};
use content::manifest::Digest;

/// How often a commit tries to create its note while others do.
const CLAIM_TRIES: usize = 3;

/// What stands under a version.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Note {
    pub(super) digest: Digest,
    /// The transfer that brought it; ids sort by time.
    pub(super) transfer: String,
}

impl FilesSink {
    pub(super) fn note_path(&self, artifact: &ArtifactRef) -> PathBuf {
        let folder = self
            .root
            .join(HIDDEN)
            .join("versions")
            .join(artifact.kind.as_str())
            .join(artifact.name());
        folder.join(format!("{}.json", artifact.version()))
    }

    /// What is noted of a version; a note that is malformed is none. A NAS that fails says nothing
    /// of what it holds.
    pub(super) fn note(&self, artifact: &ArtifactRef) -> Result<Option<Note>, Fault> {
        Ok(read_if_there(&self.note_path(artifact))?
            .and_then(|text| serde_json::from_str(&text).ok()))
    }

    pub(super) fn write_note(&self, incoming: &Incoming) -> Result<(), Fault> {
        let path = self.note_path(&incoming.artifact);
        durable::create_dir_all(path.parent().unwrap_or(&self.root))?;
        // Who asked last counts: a repair by an older transfer makes the version no older.
        let before = self
            .note(&incoming.artifact)?
            .filter(|before| before.digest == incoming.digest);
        let transfer = before
            .map(|before| before.transfer)
            .max(Some(incoming.transfer.to_string()))
            .unwrap_or_default();
        durable::replace(&path, &note_text(incoming.digest, transfer)?)
    }

    /// Notes the digest of a version that is about to appear, before anybody else notes another
    /// one. A note of another content whose version is neither there nor staged was given up.
    pub(super) fn claim(&self, incoming: &Incoming) -> Result<(), Fault> {
        let path = self.note_path(&incoming.artifact);
        durable::create_dir_all(path.parent().unwrap_or(&self.root))?;
        for _ in 0..CLAIM_TRIES {
            if durable::create(
                &path,
                &note_text(incoming.digest, incoming.transfer.to_string())?,
            )? {
                return Ok(());
            }
            match self.note(&incoming.artifact)? {
                Some(there) if there.digest == incoming.digest => return self.write_note(incoming),
                Some(there) => {
                    let staged = there
                        .transfer
                        .parse::<TransferId>()
                        .ok()
                        .map(|id| id.in_dir(&self.staging));
                    if let Some(staged) = staged
                        && staged.try_exists().at(staged.display())?
                    {
                        break;
                    }
                    // It may have appeared in between, which is a conflict.
                    if self.is_there(incoming)? {
                        return Ok(());
                    }
                }
                None => {}
            }
            durable::remove_all(&path)?;
        }
        Err(Fault::conflict(format!(
            "another site commits another content of {} to {} now",
            incoming.artifact,
            self.root.display()
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

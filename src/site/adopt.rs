//! Takes up the content that the NAS of a site already holds (`adopt`): after its records were lost,
//! or after somebody copied versions there. Fetches nothing.
//!
//! A version that the catalogue knows and whose note is lost is hashed and registered again. A
//! version that the catalogue does not know is hashed, and its chunks are recorded: a delivery then
//! needs to fetch only what is missing. Everything may be repeated; a crash loses only rows of the
//! chunk index, which are hints.

use std::sync::Arc;

use serde::Serialize;

use super::Opened;
use base::blocking::blocking_at;
use base::fault::{Code, Fault};
use base::job_progress::JobProgress;
use base::limits::ADOPT_LISTED_MAX;
use base::names::{ArtifactRef, TransferId};
use content::ingest;
use exchange::transfer::Registered;
use sink::{Incoming, StorageLocation};
use source::files::FilesSource;

/// What was found.
#[derive(Debug, Default, Serialize)]
pub(super) struct Adopted {
    /// Versions whose record exists.
    known: u64,
    /// Versions that were registered again.
    registered: Vec<String>,
    /// Versions whose content is not that of the artifact.
    differs: Vec<String>,
    /// Versions that this site did not know and whose content is used from now on.
    recorded: Vec<String>,
    /// Versions that could not be read, with the reason.
    unread: Vec<String>,
}

fn list(to: &mut Vec<String>, line: impl Into<String>) {
    if to.len() < ADOPT_LISTED_MAX {
        to.push(line.into());
    }
}

/// Checks the versions on the NAS one after the other.
pub(super) async fn adopt(opened: &Opened, progress: Arc<JobProgress>) -> Result<Adopted, Fault> {
    let (mut adopted, sink) = (Adopted::default(), opened.sinks.files.clone());
    for artifact in sink.versions().await? {
        progress.check()?;
        progress.doing(format!("checking {artifact}"));
        let done = match opened.catalogue.artifact(&artifact).await {
            Ok(row) if !row.published => {
                let transfer = opened
                    .catalogue
                    .current_transfer(&artifact, &opened.config.name);
                let incoming = Incoming {
                    artifact: artifact.clone(),
                    digest: row.digest,
                    root: row.root,
                    transfer: transfer.await?.map_or_else(TransferId::none, |row| row.id),
                    waits: Default::default(),
                };
                match opened.runner.register(&incoming).await {
                    Ok(Registered::Before) => {
                        adopted.known += 1;
                        Ok(())
                    }
                    Ok(Registered::Now) => {
                        list(&mut adopted.registered, artifact.to_string());
                        Ok(())
                    }
                    Ok(Registered::Differs) => {
                        list(&mut adopted.differs, artifact.to_string());
                        Ok(())
                    }
                    Err(fault) => Err(fault),
                }
            }
            Err(fault) if fault.code == Code::NotFound => {
                let recorded = record(opened, &artifact, &progress).await;
                recorded.map(|()| list(&mut adopted.recorded, artifact.to_string()))
            }
            other => other.map(drop),
        };
        progress.check()?;
        // One version that cannot be read must not prevent the others.
        if let Err(fault) = done {
            list(&mut adopted.unread, format!("{artifact}: {fault}"));
        }
    }
    Ok(adopted)
}

/// Hashes a version that the catalogue does not know, and records its chunks.
async fn record(
    opened: &Opened,
    artifact: &ArtifactRef,
    progress: &Arc<JobProgress>,
) -> Result<(), Fault> {
    let Some(place) = opened.sinks.files.place_of(artifact) else {
        return Ok(());
    };
    let path = place.filesystem().to_owned();
    let (reader, kind, progress) = (opened.reader.clone(), artifact.kind, progress.clone());
    blocking_at(&path.clone(), move || {
        let mut source = FilesSource::open(&path)?;
        let place = StorageLocation::Folder { path };
        ingest::reported(&progress, |counted| {
            reader.publish(kind, &mut source, Some(&place), counted)
        })
        .map(drop)
    })
    .await
}

//! The versions in the root: their directories, the active version of each series, commits and
//! removals.
//!
//! [`super::FilesSink`] calls this on its threads. A version appears and disappears by one rename.
//! Every step of a commit may be repeated after a crash, and is skipped if it is done.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{FilesSink, repair};
use crate::{Committed, Incoming, Sink, StorageLocation, nothing_staged};
use base::durable;
use base::fault::{Fault, IoContext, Reason};
use base::names::ArtifactRef;

impl FilesSink {
    pub(super) fn series(&self, artifact: &ArtifactRef) -> PathBuf {
        self.root
            .path()
            .join(artifact.kind.as_str())
            .join(artifact.name())
    }

    pub(super) fn folder(&self, artifact: &ArtifactRef) -> PathBuf {
        self.series(artifact).join(artifact.version())
    }

    /// The active version according to `CURRENT`. A link or directory of that name is ignored.
    pub(super) fn current(&self, artifact: &ArtifactRef) -> Result<Option<String>, Fault> {
        let file = self.series(artifact).join("CURRENT");
        if std::fs::symlink_metadata(&file).is_ok_and(|meta| !meta.is_file()) {
            return Ok(None);
        }
        Ok(read_if_exists(&file)?.map(|text| text.trim().to_owned()))
    }

    /// Whether the version exists with the same content. Other content is a fault.
    pub(super) fn is_committed(&self, incoming: &Incoming) -> Result<bool, Fault> {
        let folder = self.folder(&incoming.artifact);
        match std::fs::symlink_metadata(&folder) {
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(false);
            }
            // A NAS that fails temporarily does not report what it holds.
            Err(e) => {
                return Err(Fault::io(
                    format_args!("read the metadata of {}", folder.display()),
                    &e,
                ));
            }
        }
        match self.note(&incoming.artifact)? {
            Some(note) if note.digest == incoming.digest => Ok(true),
            Some(note) => Err(Fault::conflict(format!(
                "{} already exists with different content of {}: the existing digest is {}, the new digest is {}",
                folder.display(),
                incoming.artifact,
                note.digest,
                incoming.digest
            ))
            .with_next("publish it under another version, or move that directory to another location, then retry the transfer")),
            None => {
                Err(Fault::conflict(format!("{} already exists, but packhorse did not create it for {}", folder.display(), incoming.artifact))
                    .with_reason(Reason::SinkRefused)
                    .with_next("move that directory to another location, then retry the transfer"))
            }
        }
    }

    pub(super) fn landed(&self, artifact: &ArtifactRef) -> Committed {
        let path = self.folder(artifact);
        Committed {
            location: path.display().to_string(),
            place: StorageLocation::Folder { path },
            note: None,
        }
    }

    /// Whether this version was requested after the active one. A large old version that arrives
    /// late, or one that is delivered again, must not become the active version.
    pub(super) fn is_newest(&self, artifact: &ArtifactRef) -> Result<bool, Fault> {
        let current = self.current(artifact)?.unwrap_or_default();
        let Ok(active) = ArtifactRef::new(artifact.kind, artifact.name(), &current) else {
            return Ok(true);
        };
        Ok(match (self.note(&active)?, self.note(artifact)?) {
            (Some(active), Some(this)) => active.transfer <= this.transfer,
            _ => true,
        })
    }

    pub(super) fn set_current(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        let series = self.series(artifact);
        let (file, link) = (series.join("CURRENT"), series.join("current"));
        let write = || durable::replace(&file, format!("{}\n", artifact.version()).as_bytes());
        if self.current(artifact)?.as_deref() != Some(artifact.version()) {
            write()?;
        }
        // If names fold case, the link would replace the file.
        if self.folding().case || is_same_entry(&file, &link)? {
            return Ok(());
        }
        durable::replace_symlink(&link, artifact.version())?;
        if std::fs::symlink_metadata(&file)
            .at(file.display())?
            .is_symlink()
        {
            write()
        } else {
            Ok(())
        }
    }

    /// Commits. Every step may be repeated and is skipped if it is done. Succeeds only after
    /// `CURRENT` names the correct version.
    pub(super) fn commit_blocking(
        &self,
        incoming: &Incoming,
        staged: &Path,
    ) -> Result<Committed, Fault> {
        let artifact = &incoming.artifact;
        self.root.ensure_mounted()?;
        let mut exists = self.is_committed(incoming)?;
        if !exists {
            if !staged.try_exists().at(staged.display())? {
                return Err(nothing_staged(staged));
            }
            self.claim(incoming)?;
            durable::create_dir_all(&self.series(artifact))?;
            if let Err(fault) = durable::rename_noreplace(staged, &self.folder(artifact)) {
                // A rename that a network filesystem reports as failed may have succeeded, or
                // another site was faster.
                exists = self.is_committed(incoming)?;
                if !exists {
                    return Err(fault);
                }
            }
        }
        // The staged content is complete and verified. A version is only staged again if the
        // committed one is not intact.
        if exists && staged.try_exists().at(staged.display())? {
            repair::merge(staged, &self.folder(artifact))?;
            self.write_note(incoming)?;
        }
        durable::remove_all(staged)?;
        if exists {
            // An earlier attempt may have renamed the version and stopped before this step.
            durable::sync_dir(&self.series(artifact))?;
        }
        if self.is_newest(artifact)? {
            self.set_current(artifact)?;
        }
        Ok(self.landed(artifact))
    }

    /// Of the existing versions of the same series, the one that was requested last.
    fn newest_remaining(&self, artifact: &ArtifactRef) -> Result<Option<ArtifactRef>, Fault> {
        let path = self.note_path(artifact);
        let notes = path.parent().unwrap_or(self.root.path());
        let mut newest: Option<(String, ArtifactRef)> = None;
        for entry in std::fs::read_dir(notes).at(notes.display())? {
            let name = entry.at(notes.display())?.file_name();
            let version = name.to_str().and_then(|name| name.strip_suffix(".json"));
            let Some(Ok(remaining)) =
                version.map(|version| ArtifactRef::new(artifact.kind, artifact.name(), version))
            else {
                continue;
            };
            if let Some(note) = self.note(&remaining)?
                && is_folder(&self.folder(&remaining))?
                && newest
                    .as_ref()
                    .is_none_or(|(transfer, _)| *transfer < note.transfer)
            {
                newest = Some((note.transfer, remaining));
            }
        }
        Ok(newest.map(|(_, remaining)| remaining))
    }

    /// Hides a version by one rename. Returns its new path, to be removed.
    fn hide(&self, artifact: &ArtifactRef) -> Result<PathBuf, Fault> {
        let hidden = self.root.removed(artifact.version());
        durable::rename_noreplace(&self.folder(artifact), &hidden)?;
        Ok(hidden)
    }

    pub(super) fn remove_blocking(&self, artifact: &ArtifactRef) -> Result<Option<String>, Fault> {
        // Without a mount, everything would be missing and count as removed.
        self.root.ensure_mounted()?;
        let others = self.root.others()?;
        if !others.is_empty() {
            let folder = self.root.sites();
            return Ok(Some(format!(
                "other sites also use {} ({}); {} contains one file for each",
                self.root.path().display(),
                others.join(", "),
                folder.display()
            )));
        }
        let folder = self.folder(artifact);
        let series = self.series(artifact);
        let current = self.current(artifact)?;
        if self.note(artifact)?.is_some() && folder.try_exists().at(folder.display())? {
            let hidden = self.hide(artifact)?;
            // The version is hidden; a failed removal is retried later.
            if let Err(fault) = durable::remove_all(&hidden) {
                tracing::warn!(error = %fault, "a removed version could not be deleted completely yet; this is retried");
            }
        }
        durable::remove_all(&self.note_path(artifact))?;
        if current.as_deref() == Some(artifact.version()) {
            match self.newest_remaining(artifact)? {
                Some(remaining) => self.set_current(&remaining)?,
                None => {
                    durable::remove_all(&series.join("CURRENT"))?;
                    durable::remove_all(&series.join("current"))?;
                }
            }
        }
        Ok(None)
    }
}

/// Whether this is a directory, or a link to one. A failing NAS is an error, not a missing
/// directory.
pub(super) fn is_folder(path: &Path) -> Result<bool, Fault> {
    match std::fs::metadata(path) {
        Ok(meta) => Ok(meta.is_dir()),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(false),
        Err(e) => Err(Fault::io(
            format_args!("read the metadata of {}", path.display()),
            &e,
        )),
    }
}

/// Whether two names refer to one entry. A missing entry equals no other.
pub(super) fn is_same_entry(one: &Path, other: &Path) -> Result<bool, Fault> {
    let entry = |path: &Path| match std::fs::symlink_metadata(path) {
        Ok(meta) => Ok(Some((meta.dev(), meta.ino()))),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Fault::io(
            format_args!("read the metadata of {}", path.display()),
            &e,
        )),
    };
    Ok(entry(other)?.is_some_and(|existing| entry(one).is_ok_and(|one| one == Some(existing))))
}

/// The text of a small file; `None` if it does not exist.
pub(super) fn read_if_exists(path: &Path) -> Result<Option<String>, Fault> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(e) if e.kind() == ErrorKind::InvalidData => Ok(Some(String::new())),
        Err(e) => Err(Fault::io(format_args!("read {}", path.display()), &e)),
    }
}

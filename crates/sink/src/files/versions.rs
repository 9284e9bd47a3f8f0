//! The versions in the root: their directories, the active version of each series, commits and
//! removals.
//!
//! [`super::FilesSink`] calls this on its threads. A version appears and disappears by one rename.
//! Every step of a commit may be repeated after a crash, and is skipped if it is done.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{FilesSink, copy, repair};
use crate::{Committed, Incoming, Sink, StorageLocation, nothing_staged};
use base::durable;
use base::fault::{Fault, IoContext, Reason};
use base::limits::ADOPT_VERSIONS_MAX;
use base::names::{ArtifactRef, Kind};

/// No replacement of `CURRENT` takes as long.
const SWITCH_MAX: Duration = Duration::from_secs(600);
/// `CURRENT` holds the name of a version.
const CURRENT_BYTES_MAX: u64 = 4096;

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

    /// Whether `CURRENT` was replaced for this version, which was requested last, but the
    /// replacement was lost: there is no `CURRENT`, or the new file still has its temporary name.
    pub(super) fn is_switch_lost(&self, artifact: &ArtifactRef) -> Result<bool, Fault> {
        let current = self.current(artifact)?;
        if current.as_deref() == Some(artifact.version()) {
            return Ok(false);
        }
        let mut left = self.left_of_switches(artifact)?.into_iter();
        let names_this = |path: PathBuf| {
            let text = durable::read_regular_text(&path, CURRENT_BYTES_MAX);
            text.is_ok_and(|text| text.trim() == artifact.version())
        };
        let is_lost = current.is_none() || left.any(names_this);
        Ok(is_lost && self.newest_remaining(artifact)?.as_ref() == Some(artifact))
    }

    /// The temporary files of replacements of `CURRENT` that did not end.
    fn left_of_switches(&self, artifact: &ArtifactRef) -> Result<Vec<PathBuf>, Fault> {
        let series = self.series(artifact);
        let entries = match std::fs::read_dir(&series) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.at(series.display())?,
        };
        let mut left = Vec::new();
        for entry in entries {
            let entry = entry.at(series.display())?;
            if durable::is_temporary_of(&entry.file_name(), "CURRENT") {
                left.push(entry.path());
            }
        }
        Ok(left)
    }

    /// Removes such files, unless another site may be about to rename one.
    fn clear_switches(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        for path in self.left_of_switches(artifact)? {
            let age = std::fs::metadata(&path)
                .and_then(|meta| meta.modified())
                .ok()
                .and_then(|at| at.elapsed().ok());
            if age.is_some_and(|age| age > SWITCH_MAX) {
                durable::remove_all(&path)?;
            }
        }
        Ok(())
    }

    pub(super) fn set_current(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        let series = self.series(artifact);
        let (file, link) = (series.join("CURRENT"), series.join("current"));
        let write = || durable::replace(&file, format!("{}\n", artifact.version()).as_bytes());
        if self.current(artifact)?.as_deref() != Some(artifact.version()) {
            write()?;
            self.clear_switches(artifact)?;
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
            if let Err(fault) = self.place(incoming, staged) {
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
        let _switching = self.switching.lock();
        if self.is_newest(artifact)? {
            self.set_current(artifact)?;
        }
        Ok(self.landed(artifact))
    }

    /// Gives the staged version its name: by one rename, after a copy if it is on another mount.
    fn place(&self, incoming: &Incoming, staged: &Path) -> Result<(), Fault> {
        let folder = self.folder(&incoming.artifact);
        if durable::rename_within(staged, &folder)? {
            return Ok(());
        }
        let series = self.series(&incoming.artifact);
        let near = series.join(format!(
            "{}{:08x}",
            self.own_copies(),
            rand::random::<u32>()
        ));
        self.copying.lock().insert(near.clone());
        let placed = || {
            self.remove_left_copies(&series)?;
            copy::tree(staged, &near)
                .and_then(|()| durable::rename_noreplace(&near, &folder))
                .inspect_err(|_| drop(durable::remove_all(&near)))
        };
        let placed = placed();
        self.copying.lock().remove(&near);
        placed
    }

    /// How the names of copies of this daemon begin that are not complete.
    fn own_copies(&self) -> String {
        format!(".packhorse-{}-", self.root.owner())
    }

    /// Removes the copies that an attempt left that a crash ended, of all versions of a series.
    pub(super) fn remove_left_copies(&self, series: &Path) -> Result<(), Fault> {
        let own = self.own_copies();
        let entries = match std::fs::read_dir(series) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            entries => entries.at(series.display())?,
        };
        for entry in entries {
            let entry = entry.at(series.display())?;
            let path = entry.path();
            let is_left = entry.file_name().to_string_lossy().starts_with(&own)
                && !self.copying.lock().contains(&path);
            if is_left {
                durable::remove_all(&path)?;
            }
        }
        Ok(())
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

    /// The directories below the root that have the names of versions.
    pub(super) fn list_versions(&self) -> Result<Vec<ArtifactRef>, Fault> {
        let mut versions = Vec::new();
        for kind in [Kind::Dataset, Kind::Operator, Kind::Model] {
            for name in names_in(&self.root.path().join(kind.as_str()))? {
                let series = self.root.path().join(kind.as_str()).join(&name);
                for version in names_in(&series)? {
                    let Ok(artifact) = ArtifactRef::new(kind, &name, &version) else {
                        continue;
                    };
                    let is_dir = std::fs::symlink_metadata(series.join(&version))
                        .is_ok_and(|meta| meta.is_dir());
                    if is_dir && versions.len() < ADOPT_VERSIONS_MAX {
                        versions.push(artifact);
                    }
                }
            }
        }
        versions.sort_by_key(ToString::to_string);
        Ok(versions)
    }

    /// Hides a version by one rename. Returns its new path, to be removed.
    fn hide(&self, artifact: &ArtifactRef) -> Result<PathBuf, Fault> {
        let (folder, hidden) = (self.folder(artifact), self.root.removed(artifact.version()));
        if durable::rename_within(&folder, &hidden)? {
            return Ok(hidden);
        }
        // On another mount: a later copy to this series removes what stays of it.
        let name = format!(
            ".packhorse-{}-removed-{:08x}",
            self.root.owner(),
            rand::random::<u32>()
        );
        let hidden = self.series(artifact).join(name);
        durable::rename_noreplace(&folder, &hidden)?;
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

/// The names in a directory; none if it is no directory.
fn names_in(folder: &Path) -> Result<Vec<String>, Fault> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(e) => return Err(Fault::io(format_args!("list {}", folder.display()), &e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.at(folder.display())?.file_name();
        names.extend(name.into_string());
    }
    Ok(names)
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;
    use crate::settings;
    use content::chunk::{DEFAULT_CHUNKING, Hash};
    use content::manifest::{KindInfo, Root, Totals};

    fn incoming(version: &str) -> Incoming {
        Incoming {
            artifact: ArtifactRef::new(Kind::Dataset, "d", version).unwrap(),
            digest: Hash::of(version.as_bytes()),
            root: Root {
                format: 1,
                kind: Kind::Dataset,
                info: KindInfo::Files,
                chunking: DEFAULT_CHUNKING,
                totals: Totals::default(),
                depth: 0,
                pages: Vec::new(),
            },
            transfer: format!("t-{version}").parse().unwrap(),
            waits: Default::default(),
        }
    }

    fn sink(dir: &Path) -> FilesSink {
        let [nas, data] = ["nas", "data"].map(|name| dir.join(name));
        fs::create_dir_all(&nas).unwrap();
        fs::create_dir_all(&data).unwrap();
        FilesSink::open(Some(&settings::FilesSink { root: nas }), &data).unwrap()
    }

    fn stage(sink: &FilesSink, version: &str, text: &str) -> PathBuf {
        let staged = sink.staging_root().join(format!("t-{version}"));
        durable::create_dir_all(&staged.join("sub")).unwrap();
        durable::replace(&staged.join("sub/a"), text.as_bytes()).unwrap();
        staged
    }

    #[tokio::test]
    async fn a_kind_on_another_filesystem_is_committed_repaired_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let other = match tempfile::tempdir_in("/dev/shm") {
            Ok(other) => other,
            Err(error) => {
                eprintln!("skipped: no second filesystem: {error}");
                return;
            }
        };
        let device = |path: &Path| fs::metadata(path).unwrap().dev();
        if device(dir.path()) == device(other.path()) {
            eprintln!("skipped: /dev/shm is on the same filesystem");
            return;
        }
        let sink = sink(dir.path());
        let series = dir.path().join("nas/dataset/d");
        std::os::unix::fs::symlink(other.path(), dir.path().join("nas/dataset")).unwrap();
        let one = incoming("v1");
        sink.check(&one).await.unwrap();
        let staged = stage(&sink, "v1", "one");
        // What a crash left of an earlier copy.
        let left = series.join(format!(".packhorse-{}-t-0", sink.root.owner()));
        fs::create_dir_all(&left).unwrap();
        sink.commit(&one, &staged).await.unwrap();
        assert_eq!(fs::read(series.join("v1/sub/a")).unwrap(), b"one");
        assert_eq!(device(&series.join("v1")), device(other.path()));
        assert!(!staged.exists() && !left.exists());
        assert_eq!(fs::read_to_string(series.join("CURRENT")).unwrap(), "v1\n");

        fs::remove_dir_all(series.join("v1/sub")).unwrap();
        let staged = stage(&sink, "v1", "one");
        sink.commit(&one, &staged).await.unwrap();
        assert_eq!(fs::read(series.join("v1/sub/a")).unwrap(), b"one");
        durable::replace(&series.join("v1/sub/a"), b"two").unwrap();
        let staged = stage(&sink, "v1", "one");
        sink.commit(&one, &staged).await.unwrap();
        assert_eq!(fs::read(series.join("v1/sub/a")).unwrap(), b"one");
        assert_eq!(fs::read_dir(series.join("v1/sub")).unwrap().count(), 1);

        sink.remove(&one.artifact, None).await.unwrap();
        assert!(!series.join("v1").exists());
        let names: Vec<_> = fs::read_dir(&series).unwrap().flatten().collect();
        assert!(names.is_empty(), "{names:?}");
    }

    #[tokio::test]
    async fn a_lost_switch_is_reported_and_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let sink = sink(dir.path());
        let [one, two] = ["v1", "v2"].map(incoming);
        sink.check(&one).await.unwrap();
        let place = StorageLocation::Folder {
            path: dir.path().into(),
        };
        for version in [&one, &two] {
            let staged = stage(&sink, version.artifact.version(), "text");
            sink.commit(version, &staged).await.unwrap();
        }
        let series = dir.path().join("nas/dataset/d");
        let current = || fs::read_to_string(series.join("CURRENT")).ok();
        let verify = async || {
            let quick = crate::Verification::new(true, |_| {});
            sink.verify(&two, &place, &quick).await.unwrap()
        };
        assert!(verify().await.is_empty());
        // A file server that loses power returns to the state before the rename.
        let left = series.join(".CURRENT.0123456789abcdef.tmp");
        for lost in [Some("v1\n"), None] {
            durable::rename_over(&series.join("CURRENT"), &left).unwrap();
            if let Some(text) = lost {
                durable::replace(&series.join("CURRENT"), text.as_bytes()).unwrap();
            }
            assert!(verify().await[0].contains("CURRENT does not name v2"));
            sink.restore_switch(&one.artifact).await.unwrap();
            assert_eq!(current().as_deref(), lost, "v1 is not the newest");
            sink.restore_switch(&two.artifact).await.unwrap();
            assert_eq!(current().as_deref(), Some("v2\n"));
            assert!(verify().await.is_empty());
        }
        // A user who replaced it chose the other version.
        durable::remove_all(&left).unwrap();
        durable::replace(&series.join("CURRENT"), b"v1\n").unwrap();
        sink.restore_switch(&two.artifact).await.unwrap();
        assert_eq!(current().as_deref(), Some("v1\n"));
        // What a lost switch left is removed by a later one.
        durable::replace(&left, b"v0\n").unwrap();
        let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
        let file = fs::File::options().write(true).open(&left).unwrap();
        file.set_modified(hour_ago).unwrap();
        sink.activate(&two.artifact).await.unwrap();
        assert!(!left.exists());
    }

    #[tokio::test]
    async fn a_folder_without_a_note_can_be_registered() {
        let dir = tempfile::tempdir().unwrap();
        let sink = sink(dir.path());
        let one = incoming("v1");
        sink.check(&one).await.unwrap();
        assert_eq!(sink.unregistered(&one).await.unwrap(), None);
        let staged = stage(&sink, "v1", "one");
        sink.commit(&one, &staged).await.unwrap();
        assert_eq!(sink.unregistered(&one).await.unwrap(), None);
        durable::remove_all(&sink.note_path(&one.artifact)).unwrap();
        let folder = dir.path().join("nas/dataset/d/v1");
        assert_eq!(sink.unregistered(&one).await.unwrap(), Some(folder.clone()));
        fs::create_dir_all(dir.path().join("nas/model/m/2.0")).unwrap();
        fs::create_dir_all(dir.path().join("nas/model/m/Not a version")).unwrap();
        fs::create_dir_all(dir.path().join("nas/users/m/v1")).unwrap();
        let versions = sink.versions().await.unwrap();
        let versions: Vec<_> = versions.iter().map(ToString::to_string).collect();
        assert_eq!(versions, ["dataset/d:v1", "model/m:2.0"]);
        sink.check(&one).await.unwrap_err();
        sink.register(&one).await.unwrap();
        assert_eq!(sink.unregistered(&one).await.unwrap(), None);
        sink.check(&one).await.unwrap();
        assert!(sink.commit(&one, &staged).await.is_ok());
        // What is not a directory is not a version.
        fs::remove_dir_all(&folder).unwrap();
        durable::remove_all(&sink.note_path(&one.artifact)).unwrap();
        durable::replace(&folder, b"a file").unwrap();
        assert_eq!(sink.unregistered(&one).await.unwrap(), None);
    }

    /// The decision of v1 is held: it has read which version is active, and not yet switched.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_version_that_overtakes_another_stays_active() {
        let dir = tempfile::tempdir().unwrap();
        let sink = sink(dir.path());
        for version in ["v0", "v1", "v2"] {
            sink.check(&incoming(version)).await.unwrap();
            stage(&sink, version, version);
        }
        let commit = |version: &'static str| {
            let sink = sink.clone();
            tokio::spawn(async move {
                let staged = sink.staging_root().join(format!("t-{version}"));
                sink.commit(&incoming(version), &staged).await
            })
        };
        commit("v0").await.unwrap().unwrap();

        // The note of the active version is a pipe, from which nothing comes.
        let note = sink.note_path(&incoming("v0").artifact);
        let [text, pipe] = [&note.with_extension("text"), &note];
        durable::rename_noreplace(&note, text).unwrap();
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, pipe, kind, mode, 0).unwrap();
        let first = commit("v1");
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        let mut writer = loop {
            // Succeeds when somebody reads.
            let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
            match fs::File::options()
                .write(true)
                .custom_flags(flags)
                .open(pipe)
            {
                Ok(writer) => break writer,
                Err(e) => assert!(std::time::Instant::now() < deadline, "{e}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        let text = fs::read(text).unwrap();
        durable::replace(&note, &text).unwrap();

        // v2 either waits for v1, or ends now.
        let mut second = commit("v2");
        let limit = Duration::from_secs(1);
        let overtook = tokio::time::timeout(limit, &mut second).await.is_ok();
        std::io::Write::write_all(&mut writer, &text).unwrap();
        drop(writer);
        first.await.unwrap().unwrap();
        if !overtook {
            second.await.unwrap().unwrap();
        }
        let active = sink.current(&incoming("v2").artifact).unwrap();
        assert_eq!(active.as_deref(), Some("v2"));
    }
}

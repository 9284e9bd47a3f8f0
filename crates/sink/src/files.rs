//! Files on the NAS: one immutable directory per version, and a small text file that names the
//! active version.
//!
//! ```text
//! <root>/<kind>/<name>/<version>/…           appears by one rename, never changes
//! <root>/<kind>/<name>/CURRENT               "<version>\n", replaced by rename
//! <root>/<kind>/<name>/current               a link to the active version, if the filesystem has links and does not fold case
//! <root>/.packhorse/staging/<transfer>/…     incoming files (same mount)
//! <root>/.packhorse/sites/<owner>            one file for each daemon that uses the root
//! <root>/.packhorse/versions/<kind>/<name>/<version>.json    the note: the digest of a version
//! ```
//! The note is durable before the rename. After a crash between the two, a repeated commit finds
//! either the staged directory or its own finished one, and can distinguish them. The note is
//! created exclusively: if two sites commit different content under one version, only one creates
//! it, and the other does not proceed. If content of a committed version is missing or damaged,
//! only that content is replaced, file by file (see `repair`). Several sites may use one root. Each
//! site removes only what it staged itself. A site uses a version that another site committed, and
//! no site removes a version from a shared root.

mod mount;
mod notes;
mod repair;

use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use super::{
    Folding, Heartbeat, Incoming, Landed, Look, Sink, StorageLocation, Threads, nothing_staged,
    rounded_secs,
};
use crate::settings;
use crate::stage::StagingRoot;
use base::durable;
use base::fault::{Code, Fault, IoContext, Reason};
use base::limits::{ROOT_USE_ENDS_AFTER, ROOT_USE_SAID_EVERY, SINK_ANSWER_MAX, SINK_THREADS_MAX};
use base::names::{ArtifactRef, RelPath};
use base::space::Space;
use base::text;

pub use mount::Mount;
pub(crate) use mount::trial;

/// The directory in a root for the files of Packhorse itself.
pub const HIDDEN: &str = ".packhorse";
/// The directory in [`HIDDEN`] with one file for each daemon that uses the root.
const SITES: &str = "sites";
/// The second line of such a file, which states that the daemon rewrites the file each day. The
/// text is part of the on-disk format and must not change.
const REWRITTEN_DAILY: &str = "written anew each day";
/// The directory in [`HIDDEN`] for incoming files.
const STAGING: &str = "staging";
/// The number of other daemons that a message names, and the size limit of the file of each.
const SITES_LISTED_MAX: usize = 16;
const SITE_BYTES_MAX: u64 = 256;

/// Writes datasets, operators and models. Cheap to clone.
#[derive(Clone)]
pub struct FilesSink {
    root: PathBuf,
    staging: PathBuf,
    /// Whether the configuration names the root. Then it may be a mount, and other daemons may use
    /// it.
    configured: bool,
    /// The file with the id of the root.
    id_file: PathBuf,
    /// Identifies this daemon among those that use the root.
    owner: String,
    /// The expected content of `<root>/.packhorse/id`, after the root was seen once.
    id: Arc<Mutex<Option<String>>>,
    /// When this daemon last registered in the root.
    registered: Arc<Mutex<Option<Instant>>>,
    /// Set by the first check, because the NAS may not be mounted at the start.
    mount: Arc<OnceLock<Mount>>,
    threads: Threads,
    heartbeat: Heartbeat,
}

impl FilesSink {
    /// Fails if the root does not exist. It is not created, because a missing root means a NAS that
    /// is not mounted, and the wrong disk would be filled.
    pub fn check_root(root: &Path) -> Result<(), Fault> {
        if root.is_dir() {
            return Ok(());
        }
        Err(Fault::config(format!(
            "[sink.files] root {} is not a directory",
            root.display()
        ))
        .with_next("mount the NAS there, or create the directory"))
    }

    /// Fails if the current user cannot write to the root.
    pub fn check_writable(root: &Path) -> Result<(), Fault> {
        use rustix::fs::Access;
        rustix::fs::access(root, Access::WRITE_OK | Access::EXEC_OK).map_err(|e| {
            Fault::config(format!("[sink.files] root {} is not writable: {}", root.display(), std::io::Error::from(e)))
                .with_next("mount it writable, give the daemon's user write permission, and repeat the check as that user")
        })
    }

    /// Opens the configured root (default: `<data_dir>/artifacts`). A root that is unavailable now
    /// is used when it becomes available.
    pub fn open(config: Option<&settings::FilesSink>, data_dir: &Path) -> Result<Self, Fault> {
        let root = config.map_or_else(|| data_dir.join("artifacts"), |config| config.root.clone());
        let owner_file = data_dir.join("sink-files-owner");
        let owner = match std::fs::read_to_string(&owner_file) {
            Ok(owner) => owner.trim().to_owned(),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let owner = format!("{:016x}", rand::random::<u64>());
                durable::replace(&owner_file, owner.as_bytes())?;
                owner
            }
            Err(e) => return Err(Fault::io(format_args!("read {}", owner_file.display()), &e)),
        };
        let sink = Self {
            staging: root.join(HIDDEN).join(STAGING),
            root,
            configured: config.is_some(),
            id_file: data_dir.join("sink-files-id"),
            owner,
            id: Arc::default(),
            registered: Arc::default(),
            mount: Arc::default(),
            threads: Threads::new("sink files", SINK_THREADS_MAX),
            heartbeat: Heartbeat::default(),
        };
        if !sink.id_file.exists() {
            // Mark a root that exists at the first start now; later it could be an empty mount
            // point.
            let (this, (marked, seen)) = (sink.clone(), sync_channel(1));
            let mark = move || drop(marked.try_send(this.mounted()));
            std::thread::Builder::new()
                .name("sink files".into())
                .spawn(mark)
                .at("start a thread")?;
            if let Ok(Err(fault)) = seen.recv_timeout(SINK_ANSWER_MAX) {
                tracing::warn!(root = %sink.root.display(), error = %fault, next = %fault.next, "the files sink is not available yet");
            }
        }
        Ok(sink)
    }

    /// Runs a call for a transfer. A missing path or a denied permission in the root is retried.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let this = self.clone();
        self.threads
            .run(move || work(&this).map_err(Fault::of_sink))
            .await
    }

    /// The id of the root. Marks the root with a new id if this site sees it for the first time.
    fn id(&self) -> Result<String, Fault> {
        let mut known = self.id.lock();
        if let Some(id) = &*known {
            return Ok(id.clone());
        }
        let existing = self.root.join(HIDDEN).join("id");
        let id = match std::fs::read_to_string(&self.id_file) {
            Ok(id) => id,
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(Fault::io(
                    format_args!("read {}", self.id_file.display()),
                    &e,
                ));
            }
            Err(_) => {
                if self.configured && !self.root.is_dir() {
                    return Err(self.not_mounted("it is not a directory"));
                }
                let id = match std::fs::read_to_string(&existing) {
                    Ok(id) => id,
                    Err(e) if e.kind() == ErrorKind::NotFound => {
                        durable::create_dir_all(&self.staging)?;
                        // Another site may mark it at the same time; the id in the file is used.
                        durable::create(
                            &existing,
                            format!("{:032x}\n", rand::random::<u128>()).as_bytes(),
                        )?;
                        std::fs::read_to_string(&existing)
                            .at(format_args!("read {}", existing.display()))?
                    }
                    Err(e) => {
                        return Err(Fault::io(format_args!("read {}", existing.display()), &e));
                    }
                };
                durable::replace(&self.id_file, id.as_bytes())?;
                id
            }
        };
        Ok(known.insert(id).clone())
    }

    fn not_mounted(&self, why: &str) -> Fault {
        Fault::unreachable(format!("the NAS is not mounted at {}: {why}", self.root.display())).with_next(
            "mount the NAS there; transfers resume automatically. If the NAS was replaced intentionally, remove sink-files-id from data_dir and restart the daemon",
        )
    }

    /// Registers this daemon in the root, at the start and then each day. A failure is retried at a
    /// later call.
    fn register(&self) {
        let mut last = self.registered.lock();
        if !self.configured || last.is_some_and(|last| last.elapsed() < ROOT_USE_SAID_EVERY) {
            return;
        }
        let mine = self.root.join(HIDDEN).join(SITES).join(&self.owner);
        let (node, data_dir) = (
            rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
            self.id_file.with_file_name(""),
        );
        let text = format!("{node} {}\n{REWRITTEN_DAILY}\n", data_dir.display());
        let result = durable::create_dir_all(mine.parent().unwrap_or(&self.root))
            .and_then(|()| durable::replace(&mine, text.as_bytes()));
        *last = result.is_ok().then(Instant::now);
    }

    /// The other daemons that use this root: the machine and the data directory of each.
    fn others(&self) -> Result<Vec<String>, Fault> {
        let folder = self.root.join(HIDDEN).join(SITES);
        // An unreadable directory does not mean that there are no other daemons.
        let sites: Vec<_> = match std::fs::read_dir(&folder).and_then(Iterator::collect) {
            Ok(sites) => sites,
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Fault::io(folder.display(), &error)),
        };
        let others = sites.into_iter().filter(|entry| {
            !entry.file_name().to_string_lossy().starts_with('.')
                && *entry.file_name() != *self.owner
        });
        // Both times are from the clock of the NAS.
        let written = |path: &Path| {
            std::fs::metadata(path)
                .and_then(|meta| meta.modified())
                .ok()
        };
        let now = written(&folder.join(&self.owner));
        let read = |entry: std::fs::DirEntry| {
            let mut text = Vec::new();
            if let Ok(file) = durable::open_regular_nofollow(&entry.path()) {
                let _ = file.take(SITE_BYTES_MAX).read_to_end(&mut text);
            }
            let text = String::from_utf8_lossy(&text);
            let mut lines = text.trim().lines();
            let who = lines.next().unwrap_or_default();
            // A daemon of an earlier version writes its file only once.
            let silent = now
                .zip(written(&entry.path()))
                .and_then(|(now, written_at)| now.duration_since(written_at).ok());
            let has_ended = lines.next() == Some(REWRITTEN_DAILY)
                && silent.is_some_and(|silent| silent >= ROOT_USE_ENDS_AFTER);
            (!has_ended).then(|| text::line(who, SITE_BYTES_MAX as usize))
        };
        Ok(others.filter_map(read).take(SITES_LISTED_MAX).collect())
    }

    fn mount(&self) -> Mount {
        self.mount.get().copied().unwrap_or_default()
    }

    /// The sink with the properties of such a filesystem.
    #[cfg(any(test, feature = "testing"))]
    pub fn assuming(self, mount: Mount) -> Self {
        Self {
            mount: Arc::new(mount.into()),
            ..self
        }
    }

    fn series(&self, artifact: &ArtifactRef) -> PathBuf {
        self.root.join(artifact.kind.as_str()).join(artifact.name())
    }

    fn folder(&self, artifact: &ArtifactRef) -> PathBuf {
        self.series(artifact).join(artifact.version())
    }

    /// The active version according to `CURRENT`. A link or directory of that name is ignored.
    fn current(&self, artifact: &ArtifactRef) -> Result<Option<String>, Fault> {
        let file = self.series(artifact).join("CURRENT");
        if std::fs::symlink_metadata(&file).is_ok_and(|meta| !meta.is_file()) {
            return Ok(None);
        }
        Ok(read_if_exists(&file)?.map(|text| text.trim().to_owned()))
    }

    /// Whether the version exists with the same content. Other content is a fault.
    fn is_committed(&self, incoming: &Incoming) -> Result<bool, Fault> {
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

    fn landed(&self, artifact: &ArtifactRef) -> Landed {
        let path = self.folder(artifact);
        Landed {
            location: path.display().to_string(),
            place: StorageLocation::Folder { path },
            note: None,
        }
    }

    /// Whether this version was requested after the active one. A large old version that arrives
    /// late, or one that is delivered again, must not become the active version.
    fn is_newest(&self, artifact: &ArtifactRef) -> Result<bool, Fault> {
        let current = self.current(artifact)?.unwrap_or_default();
        let Ok(active) = ArtifactRef::new(artifact.kind, artifact.name(), &current) else {
            return Ok(true);
        };
        Ok(match (self.note(&active)?, self.note(artifact)?) {
            (Some(active), Some(this)) => active.transfer <= this.transfer,
            _ => true,
        })
    }

    /// Checks that the root is the one that this site has always used. An empty mount point must
    /// not be filled.
    fn mounted(&self) -> Result<(), Fault> {
        let id = self.id()?;
        self.is_ours(
            &id,
            std::fs::read_to_string(self.root.join(HIDDEN).join("id")),
        )?;
        self.register();
        Ok(())
    }

    fn is_ours(&self, id: &str, existing: std::io::Result<String>) -> Result<(), Fault> {
        match existing {
            Ok(existing) if existing == id => Ok(()),
            Ok(_) => Err(self.not_mounted(&format!("its {HIDDEN}/id differs"))),
            Err(e) => Err(self.not_mounted(&format!("its {HIDDEN}/id cannot be read: {e}"))),
        }
    }

    fn set_current(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
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
    fn commit_blocking(&self, incoming: &Incoming, staged: &Path) -> Result<Landed, Fault> {
        let artifact = &incoming.artifact;
        self.mounted()?;
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
        let notes = path.parent().unwrap_or(&self.root);
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
        let hidden = self.staging.join(format!(
            "removed-{}-{}-{:08x}",
            self.owner,
            artifact.version(),
            rand::random::<u32>()
        ));
        durable::rename_noreplace(&self.folder(artifact), &hidden)?;
        Ok(hidden)
    }

    fn remove_blocking(&self, artifact: &ArtifactRef) -> Result<Option<String>, Fault> {
        // Without a mount, everything would be missing and count as removed.
        self.mounted()?;
        let others = self.others()?;
        if !others.is_empty() {
            let folder = self.root.join(HIDDEN).join(SITES);
            return Ok(Some(format!(
                "other sites also use {} ({}); {} contains one file for each",
                self.root.display(),
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
fn is_folder(path: &Path) -> Result<bool, Fault> {
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
fn is_same_entry(one: &Path, other: &Path) -> Result<bool, Fault> {
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
fn read_if_exists(path: &Path) -> Result<Option<String>, Fault> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(e) if e.kind() == ErrorKind::InvalidData => Ok(Some(String::new())),
        Err(e) => Err(Fault::io(format_args!("read {}", path.display()), &e)),
    }
}

#[async_trait]
impl Sink for FilesSink {
    fn staging_root(&self) -> &Path {
        &self.staging
    }

    fn staging(&self) -> Result<StagingRoot, Fault> {
        let id = self.id().map_err(Fault::of_sink)?;
        let root = StagingRoot::open_there(&self.root).map_err(|fault| match fault.code {
            Code::NotFound => self.not_mounted("it is not a directory"),
            _ => fault.of_sink(),
        })?;
        self.is_ours(&id, root.read(&format!("{HIDDEN}/id")))?;
        root.folder(HIDDEN)?.folder(STAGING)
    }

    fn threads(&self) -> &Threads {
        &self.threads
    }

    fn held_up(&self) -> Option<Fault> {
        let root = self.root.clone();
        // Calls that the kernel does not answer from its caches: the size of the filesystem, and
        // opening a file.
        let call = move || {
            let _ = rustix::fs::statvfs(&root);
            let _ = std::fs::read(root.join(HIDDEN).join("id"));
        };
        let silent = self.heartbeat.silent_for(&self.threads, call)?;
        let message = format!(
            "the NAS at {} has not answered for {} s",
            self.root.display(),
            rounded_secs(silent)
        );
        Some(Fault::unreachable(message).with_next(
            "check the NAS and the network to it; the transfer resumes automatically when the NAS responds",
        ))
    }

    fn may_remove(&self, name: &str) -> bool {
        // A name without owner, `removed-<version>-<random>`, is from a daemon version that used
        // the root exclusively.
        let is_owned = |rest: &str| {
            let (owner, rest) = rest.split_once('-').unwrap_or((rest, ""));
            owner.len() == self.owner.len()
                && owner
                    .bytes()
                    .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
                && rest.contains('-')
        };
        name.strip_prefix("removed-")
            .is_some_and(|rest| rest.starts_with(&format!("{}-", self.owner)) || !is_owned(rest))
    }

    fn is_shared(&self) -> bool {
        self.configured
    }

    fn renew(&self) -> Result<(), Fault> {
        self.mounted()
    }

    fn place_of(&self, artifact: &ArtifactRef) -> Option<StorageLocation> {
        Some(StorageLocation::Folder {
            path: self.folder(artifact),
        })
    }

    fn fixed_modes(&self) -> bool {
        self.mount().fixed_modes
    }

    async fn trial(&self) -> Result<(), Fault> {
        self.run(|this| {
            this.mounted()?;
            trial(&this.staging.join(format!(
                "removed-{}-trial-{:08x}",
                this.owner,
                rand::random::<u32>()
            )))
        })
        .await
    }

    async fn check(&self, incoming: &Incoming) -> Result<(), Fault> {
        let incoming = incoming.clone();
        self.run(move |this| {
            this.mounted()?;
            durable::create_dir_all(&this.staging)?;
            if this.mount.get().is_none() {
                // Two concurrent probes give the same result.
                let folder = this.staging.join(format!(
                    "removed-{}-probe-{:08x}",
                    this.owner,
                    rand::random::<u32>()
                ));
                let _ = this.mount.set(Mount::probe(&folder)?);
            }
            this.is_committed(&incoming).map(|_| ())
        })
        .await
    }

    fn refuse_path(&self, path: &RelPath) -> Option<String> {
        if !self.mount().windows_names {
            return None;
        }
        path.components().find_map(|name| {
            if let Some(c) = name
                .chars()
                .find(|c| "<>:\"|?*\\".contains(*c) || c.is_control())
            {
                return Some(format!("the NAS does not allow {c:?} in names"));
            }
            let stem = name.split('.').next().unwrap_or(name).to_ascii_uppercase();
            let reserved = matches!(stem.as_str(), "CON" | "PRN" | "AUX" | "NUL")
                || (stem.len() == 4
                    && (stem.starts_with("COM") || stem.starts_with("LPT"))
                    && stem.ends_with(|c: char| c.is_ascii_digit()));
            if name.ends_with(['.', ' ']) || reserved {
                return Some(
                    "the NAS does not allow reserved names or names that end in a dot or a space"
                        .into(),
                );
            }
            None
        })
    }

    fn folding(&self) -> Folding {
        self.mount().folding
    }

    fn takes_links(&self) -> bool {
        !self.mount().no_links
    }

    async fn commit(&self, incoming: &Incoming, staged: &Path) -> Result<Landed, Fault> {
        let (incoming, staged) = (incoming.clone(), staged.to_owned());
        self.run(move |this| this.commit_blocking(&incoming, &staged))
            .await
    }

    async fn activate(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        let (this, artifact) = (self.clone(), artifact.clone());
        self.threads
            .run(move || {
                if this.note(&artifact)?.is_none() || !is_folder(&this.folder(&artifact))? {
                    return Err(Fault::not_found(format!(
                        "{artifact} does not exist in {}",
                        this.root.display()
                    )));
                }
                this.set_current(&artifact)
            })
            .await
    }

    async fn read_at(
        &self,
        place: &StorageLocation,
        path: &RelPath,
        offset: u64,
        len: u32,
    ) -> Result<Bytes, Fault> {
        let StorageLocation::Folder { path: folder } = place else {
            return Err(Fault::internal("a files sink reads folders only"));
        };
        let file = path.in_dir(folder);
        self.threads
            .run(move || {
                use std::os::unix::fs::FileExt;
                let mut out = vec![0; len as usize];
                let what = || format!("read {}", file.display());
                std::fs::File::open(&file)
                    .at(what())?
                    .read_exact_at(&mut out, offset)
                    .at(what())?;
                Ok(out.into())
            })
            .await
    }

    async fn stands(&self, incoming: &Incoming) -> Result<bool, Fault> {
        let incoming = incoming.clone();
        self.run(move |this| this.mounted().and_then(|()| this.is_committed(&incoming)))
            .await
    }

    async fn active(&self, artifact: &ArtifactRef) -> Result<Option<String>, Fault> {
        let (this, artifact) = (self.clone(), artifact.clone());
        self.threads.run(move || this.current(&artifact)).await
    }

    fn committed_at(&self, artifact: &ArtifactRef) -> Option<std::time::SystemTime> {
        std::fs::metadata(self.note_path(artifact))
            .and_then(|meta| meta.modified())
            .ok()
    }

    async fn verify(
        &self,
        incoming: &Incoming,
        _place: &StorageLocation,
        _look: &Look,
    ) -> Result<Vec<String>, Fault> {
        let incoming = incoming.clone();
        self.run(move |this| {
            // Without a mount, everything would be reported missing.
            this.mounted()?;
            let folder = this.folder(&incoming.artifact);
            Ok(match this.note(&incoming.artifact)? {
                _ if !is_folder(&folder)? => vec![format!("{} is missing", folder.display())],
                Some(note) if note.digest == incoming.digest => vec![],
                _ => vec![format!(
                    "the note with the digest of {} is missing",
                    folder.display()
                )],
            })
        })
        .await
    }

    async fn remove(&self, artifact: &ArtifactRef) -> Result<Option<String>, Fault> {
        let (this, artifact) = (self.clone(), artifact.clone());
        self.threads
            .run(move || this.remove_blocking(&artifact))
            .await
    }

    async fn probe(&self) -> Result<String, Fault> {
        let this = self.clone();
        self.threads
            .run(move || {
                this.mounted()?;
                let file = this.staging.join(format!(
                    "removed-{}-probe-{:08x}",
                    this.owner,
                    rand::random::<u32>()
                ));
                durable::replace(&file, b"probe")?;
                durable::remove_all(&file)?;
                // Versions are renamed into the directories of their kinds, which may have other
                // owners than the staging directory.
                let kinds = ["dataset", "operator", "model"].map(|kind| this.root.join(kind));
                for folder in
                    std::iter::once(&this.root).chain(kinds.iter().filter(|kind| kind.exists()))
                {
                    let probe = folder.join(format!(".packhorse-probe-{}", std::process::id()));
                    std::fs::create_dir(&probe)
                        .and_then(|()| std::fs::remove_dir(&probe))
                        .at(format_args!("write to {}", folder.display()))?;
                }
                let space = Space::of(&this.root)?;
                if space.inodes == Some(0) {
                    return Err(Fault::no_space(format!(
                        "files at {}: there are no free inodes",
                        this.root.display()
                    )));
                }
                let free = space.bytes.map_or("free space unknown".into(), |bytes| {
                    format!("{} GiB free", bytes >> 30)
                });
                let others = this.others()?;
                let shared = if others.is_empty() {
                    String::new()
                } else {
                    format!(", also used by other sites ({})", others.join(", "))
                };
                Ok(format!(
                    "files at {}: writable, {free}{shared}",
                    this.root.display()
                ))
            })
            .await
    }
}

#[cfg(test)]
mod tests;

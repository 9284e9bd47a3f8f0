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
//! only that content is replaced, file by file (see `repair`). If the directory of the version is on
//! another mount than the staging directory, the version is first copied to
//! `<root>/<kind>/<name>/.packhorse-<owner>-<transfer>` (see `copy`). Several sites may use one root. Each
//! site removes only what it staged itself. A site uses a version that another site committed, and
//! no site removes a version from a shared root.

mod copy;
mod mount;
mod notes;
mod repair;
mod root;
mod versions;

use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use super::{
    Committed, Folding, Heartbeat, Incoming, Sink, StorageLocation, Threads, Verification,
    rounded_secs,
};
use crate::settings;
use crate::stage::StagingRoot;
use base::durable;
use base::fault::{Code, Fault, IoContext};
use base::limits::{SINK_ANSWER_MAX, SINK_THREADS_MAX};
use base::mounts::are_apart;
use base::names::{ArtifactRef, RelPath};
use base::space::Space;
use content::manifest::KindInfo;
use root::{Root, STAGING};
use versions::is_folder;

pub use mount::Mount;
pub(crate) use mount::trial;

/// The directory in a root for the files of Packhorse itself.
pub const HIDDEN: &str = ".packhorse";
/// Writes datasets, operators and models. Cheap to clone.
#[derive(Clone)]
pub struct FilesSink {
    root: Root,
    staging: PathBuf,
    /// Set by the first check, because the NAS may not be mounted at the start.
    mount: Arc<OnceLock<Mount>>,
    threads: Threads,
    heartbeat: Heartbeat,
    /// Versions that are copied to another mount now.
    copying: Arc<Mutex<HashSet<PathBuf>>>,
    /// Held while `CURRENT` is compared and switched: two versions may be committed at once.
    switching: Arc<Mutex<()>>,
    /// Held while the filesystem is tried: the entries for that have fixed names.
    trying: Arc<Mutex<()>>,
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
        let root = Root::new(root, config.is_some(), data_dir)?;
        let sink = Self {
            staging: root.staging(),
            root,
            mount: Arc::default(),
            threads: Threads::new("sink files", SINK_THREADS_MAX),
            heartbeat: Heartbeat::default(),
            copying: Arc::default(),
            switching: Arc::default(),
            trying: Arc::default(),
        };
        if !sink.root.is_known() {
            // Mark a root that exists at the first start now; later it could be an empty mount
            // point.
            let (this, (marked, seen)) = (sink.clone(), sync_channel(1));
            let mark = move || drop(marked.try_send(this.root.ensure_mounted()));
            std::thread::Builder::new()
                .name("sink files".into())
                .spawn(mark)
                .at("start a thread")?;
            if let Ok(Err(fault)) = seen.recv_timeout(SINK_ANSWER_MAX) {
                tracing::warn!(root = %sink.root.path().display(), error = %fault, next = %fault.next, "the files sink is not available yet");
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

    /// The properties of the filesystem, by trying if it was not done before. Blocks.
    fn probed(&self) -> Mount {
        if self.mount.get().is_none() && self.root.ensure_mounted().is_ok() {
            let probe = || {
                durable::create_dir_all(&self.staging)?;
                self.probe_mount()
            };
            // The next check reports why it fails.
            let _ = probe();
        }
        self.mount()
    }

    /// Determines the properties of the filesystem. Blocks.
    fn probe_mount(&self) -> Result<(), Fault> {
        let _trying = self.trying.lock();
        if self.mount.get().is_none() {
            let folder = self.root.tried("probe");
            // What a crash left, or a filesystem on which nothing can be removed: that is the fault.
            durable::remove_all(&folder)?;
            let _ = self.mount.set(Mount::probe(&folder)?);
        }
        Ok(())
    }

    /// Writes a small file, syncs it, reads it back and removes it. Blocks.
    fn try_to_write(&self) -> Result<(), Fault> {
        let _trying = self.trying.lock();
        let file = self.root.tried("trial");
        durable::remove_all(&file)?;
        trial(&file)
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
}

#[async_trait]
impl Sink for FilesSink {
    fn staging_root(&self) -> &Path {
        &self.staging
    }

    fn staging(&self) -> Result<StagingRoot, Fault> {
        let id = self.root.id().map_err(Fault::of_sink)?;
        let root = StagingRoot::open_there(self.root.path()).map_err(|fault| match fault.code {
            Code::NotFound => self.root.not_mounted("it is not a directory"),
            _ => fault.of_sink(),
        })?;
        self.root
            .check_id(&id, root.read(&format!("{HIDDEN}/id")))?;
        root.folder(HIDDEN)?.folder(STAGING)
    }

    fn threads(&self) -> &Threads {
        &self.threads
    }

    fn wait_reason(&self) -> Option<Fault> {
        let (root, id) = (self.root.path().to_owned(), self.root.id_in_root());
        // Calls that the kernel does not answer from its caches: the size of the filesystem, and
        // opening a file.
        let call = move || {
            let _ = rustix::fs::statvfs(&root);
            let _ = std::fs::read(&id);
        };
        let silent = self.heartbeat.silent_for(&self.threads, call)?;
        let message = format!(
            "the NAS at {} has not answered for {} s",
            self.root.path().display(),
            rounded_secs(silent)
        );
        Some(Fault::unreachable(message).with_next(
            "check the NAS and the network to it; the transfer resumes automatically when the NAS responds",
        ))
    }

    fn may_remove(&self, name: &str) -> bool {
        self.root.may_remove(name)
    }

    fn is_shared(&self) -> bool {
        self.root.is_shared()
    }

    fn renew(&self) -> Result<(), Fault> {
        self.root.ensure_mounted()
    }

    fn place_of(&self, artifact: &ArtifactRef) -> Option<StorageLocation> {
        Some(StorageLocation::Folder {
            path: self.folder(artifact),
        })
    }

    fn copies_to(&self, artifact: &ArtifactRef) -> Option<PathBuf> {
        // What is there already is repaired in place.
        if std::fs::symlink_metadata(self.folder(artifact)).is_ok() {
            return None;
        }
        let series = self.series(artifact);
        let target = series
            .ancestors()
            .take_while(|path| *path != self.root.path())
            .find(|path| path.is_dir())?;
        are_apart(target, self.root.path())
            .is_ok_and(|apart| apart)
            .then(|| target.to_owned())
    }

    fn fixed_modes(&self) -> bool {
        self.mount().fixed_modes
    }

    fn fixed_times(&self) -> bool {
        self.mount().fixed_times
    }

    fn shares_files(&self) -> bool {
        !self.probed().no_sharing
    }

    async fn trial(&self) -> Result<(), Fault> {
        self.run(|this| {
            this.root.ensure_mounted()?;
            this.try_to_write()
        })
        .await
    }

    async fn check(&self, incoming: &Incoming) -> Result<(), Fault> {
        let incoming = incoming.clone();
        self.run(move |this| {
            this.root.ensure_mounted()?;
            durable::create_dir_all(&this.staging)?;
            this.probe_mount()?;
            this.is_committed(&incoming)?;
            // They take the room of the copy that is still to be made.
            match this.copies_to(&incoming.artifact) {
                Some(_) => this.remove_left_copies(&this.series(&incoming.artifact)),
                None => Ok(()),
            }
        })
        .await
    }

    fn refuse_path(&self, path: &RelPath) -> Option<String> {
        let Mount {
            windows_names,
            no_backslash,
            renames_reserved,
            ..
        } = self.mount();
        path.components().find_map(|name| {
            let is_refused = |c: &char| match windows_names {
                true => "<>:\"|?*\\".contains(*c) || c.is_control(),
                false => no_backslash && *c == '\\',
            };
            if let Some(c) = name.chars().find(is_refused) {
                return Some(format!("the NAS does not allow {c:?} in names"));
            }
            let stem = name.split('.').next().unwrap_or(name).to_ascii_uppercase();
            let reserved = matches!(stem.as_str(), "CON" | "PRN" | "AUX" | "NUL")
                || (stem.len() == 4
                    && (stem.starts_with("COM") || stem.starts_with("LPT"))
                    && stem.ends_with(|c: char| c.is_ascii_digit()));
            let reserved = reserved && (windows_names || renames_reserved);
            if windows_names && name.ends_with(['.', ' ']) || reserved {
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

    async fn commit(&self, incoming: &Incoming, staged: &Path) -> Result<Committed, Fault> {
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
                        this.root.path().display()
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

    async fn exists_at_target(&self, incoming: &Incoming) -> Result<bool, Fault> {
        let incoming = incoming.clone();
        self.run(move |this| {
            this.root
                .ensure_mounted()
                .and_then(|()| this.is_committed(&incoming))
        })
        .await
    }

    async fn unregistered(&self, incoming: &Incoming) -> Result<Option<PathBuf>, Fault> {
        let incoming = incoming.clone();
        self.run(move |this| {
            this.root.ensure_mounted()?;
            let folder = this.folder(&incoming.artifact);
            let is_plain = match std::fs::symlink_metadata(&folder) {
                Ok(meta) => meta.is_dir(),
                Err(e) if e.kind() == ErrorKind::NotFound => false,
                Err(e) => {
                    let what = format!("read the metadata of {}", folder.display());
                    return Err(Fault::io(what, &e));
                }
            };
            Ok((is_plain && this.note(&incoming.artifact)?.is_none()).then_some(folder))
        })
        .await
    }

    async fn versions(&self) -> Result<Vec<ArtifactRef>, Fault> {
        self.run(|this| {
            this.root.ensure_mounted()?;
            this.list_versions()
        })
        .await
    }

    async fn register(&self, incoming: &Incoming) -> Result<(), Fault> {
        let incoming = incoming.clone();
        self.run(move |this| this.claim(&incoming)).await
    }

    async fn restore_switch(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        let (this, artifact) = (self.clone(), artifact.clone());
        self.threads
            .run(move || {
                let _switching = this.switching.lock();
                if this.is_switch_lost(&artifact)? {
                    tracing::warn!(%artifact, "CURRENT did not name this version, because the file server lost the last change; it does now");
                    this.set_current(&artifact)?;
                }
                Ok(())
            })
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
        _verification: &Verification,
    ) -> Result<Vec<String>, Fault> {
        let incoming = incoming.clone();
        self.run(move |this| {
            // Without a mount, everything would be reported missing.
            this.root.ensure_mounted()?;
            let folder = this.folder(&incoming.artifact);
            let lost = || this.is_switch_lost(&incoming.artifact);
            Ok(match this.note(&incoming.artifact)? {
                _ if !is_folder(&folder)? => vec![format!("{} is missing", folder.display())],
                Some(note) if note.digest == incoming.digest && lost()? => vec![format!(
                    "CURRENT does not name {}, although it was delivered last: the file server lost the last change",
                    incoming.artifact.version()
                )],
                Some(note) if note.digest == incoming.digest => vec![],
                _ => vec![format!(
                    "the note with the digest of {} is missing",
                    folder.display()
                )],
            })
        })
        .await
    }

    async fn remove(
        &self,
        artifact: &ArtifactRef,
        _info: Option<&KindInfo>,
    ) -> Result<Option<String>, Fault> {
        let (this, artifact) = (self.clone(), artifact.clone());
        self.threads
            .run(move || this.remove_blocking(&artifact))
            .await
    }

    async fn probe(&self) -> Result<String, Fault> {
        let this = self.clone();
        self.threads
            .run(move || {
                this.root.ensure_mounted()?;
                this.try_to_write()?;
                // Versions are renamed into the directories of their kinds, which may have other
                // owners than the staging directory.
                let kinds =
                    ["dataset", "operator", "model"].map(|kind| this.root.path().join(kind));
                for folder in std::iter::once(this.root.path()).chain(
                    kinds
                        .iter()
                        .map(PathBuf::as_path)
                        .filter(|kind| kind.exists()),
                ) {
                    let probe = folder.join(format!(".packhorse-probe-{}", this.root.owner()));
                    match std::fs::create_dir(&probe) {
                        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
                        created => created,
                    }
                    .and_then(|()| std::fs::remove_dir(&probe))
                    .at(format_args!("write to {}", folder.display()))?;
                }
                let space = Space::of(this.root.path())?;
                if space.inodes == Some(0) {
                    return Err(Fault::no_space(format!(
                        "files at {}: there are no free inodes",
                        this.root.path().display()
                    )));
                }
                let free = space.bytes.map_or("free space unknown".into(), |bytes| {
                    format!("{} free", base::text::size(bytes))
                });
                let others = this.root.others()?;
                let shared = if others.is_empty() {
                    String::new()
                } else {
                    format!(", also used by other sites ({})", others.join(", "))
                };
                Ok(format!(
                    "files at {}: writable, {free}{shared}",
                    this.root.path().display()
                ))
            })
            .await
    }
}

#[cfg(test)]
mod tests;

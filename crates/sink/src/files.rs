//! Files on the NAS: an immutable folder a version, and a small text file that names the active
//! one.
//!
//! ```text
//! <root>/<kind>/<name>/<version>/…           appears by one rename, never changes
//! <root>/<kind>/<name>/CURRENT               "<version>\n", replaced by rename
//! <root>/<kind>/<name>/current               a link beside it, where there are links and names do not fold case
//! <root>/.packhorse/staging/<transfer>/…     what is on its way in (same mount)
//! <root>/.packhorse/sites/<owner>            one file for each daemon that uses the root
//! <root>/.packhorse/versions/<kind>/<name>/<version>.json    the digest of what stands there
//! ```
//! The note of the digest is durable before the rename: after a crash between the two, a commit
//! that is asked again finds either the staged folder or its own finished one, and knows which. It
//! is created exclusively: of two sites that commit different contents under one version, one
//! creates it, and the other claims nothing. Of a version of which something was found gone or
//! damaged only that is replaced, file by file (see `repair`). Several sites may use one root: each
//! removes only what it staged itself, a version that another one has committed is used as it is,
//! and none removes a version from a shared root.

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
use base::limits::{ROOT_USE_ENDS_AFTER, ROOT_USE_SAID_EVERY, SINK_ANSWER_MAX};
use base::names::{ArtifactRef, RelPath};
use base::space::Space;
use base::text;

pub use mount::Mount;
pub(crate) use mount::trial;

/// The folder of Packhorse's own things in a root.
pub const HIDDEN: &str = ".packhorse";
/// The folder in [`HIDDEN`] with a file for each daemon that uses the root.
const SITES: &str = "sites";
/// What such a file says of a daemon that writes it anew each day.
const SAID_EACH_DAY: &str = "written anew each day";
/// The folder in [`HIDDEN`] that holds what is on its way in.
const STAGING: &str = "staging";
/// Daemons that are named of those that use the same root, and the bytes that each may say of
/// itself.
const SITES_TOLD_MAX: usize = 16;
const SITE_BYTES_MAX: u64 = 256;

/// Writes datasets, operators and models. Cheap to clone.
#[derive(Clone)]
pub struct FilesSink {
    root: PathBuf,
    staging: PathBuf,
    /// Whether the configuration names the root, so that it may be a mount and others may use it.
    configured: bool,
    /// Keeps what the root is known by.
    id_file: PathBuf,
    /// Names this daemon among those that use the root.
    owner: String,
    /// What `<root>/.packhorse/id` must hold, once the root was seen.
    id: Arc<Mutex<Option<String>>>,
    /// When the root was last told that this daemon uses it.
    registered: Arc<Mutex<Option<Instant>>>,
    /// Known from the first check on: at the start the NAS may not be mounted yet.
    mount: Arc<OnceLock<Mount>>,
    threads: Threads,
    heartbeat: Heartbeat,
}

impl FilesSink {
    /// A root that is missing is a NAS that is not mounted: making it would fill the wrong disk.
    pub fn check_root(root: &Path) -> Result<(), Fault> {
        if root.is_dir() {
            return Ok(());
        }
        Err(Fault::config(format!(
            "[sink.files] root {} is not a folder",
            root.display()
        ))
        .with_next("mount the NAS there, or make the folder"))
    }

    /// Whether versions can be put into the root by whoever runs this.
    pub fn check_writable(root: &Path) -> Result<(), Fault> {
        use rustix::fs::Access;
        rustix::fs::access(root, Access::WRITE_OK | Access::EXEC_OK).map_err(|e| {
            Fault::config(format!("[sink.files] root {} cannot be written to: {}", root.display(), std::io::Error::from(e)))
                .with_next("mount it for writing, let the daemon's user write there, and check again as that user")
        })
    }

    /// Opens the root that the config names (default: `<data_dir>/artifacts`). A root that is away
    /// now is waited for.
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
            threads: Threads::new("sink files"),
            heartbeat: Heartbeat::default(),
        };
        if !sink.id_file.exists() {
            // A root that is there at the first start is marked now: later it might be an empty
            // mount point.
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

    /// Runs a call for a transfer. What is missing or refused in the root now is waited for.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let this = self.clone();
        self.threads
            .run(move || work(&this).map_err(Fault::of_sink))
            .await
    }

    /// What the root is known by. Marks it if this site sees it for the first time.
    fn id(&self) -> Result<String, Fault> {
        let mut known = self.id.lock();
        if let Some(id) = &*known {
            return Ok(id.clone());
        }
        let there = self.root.join(HIDDEN).join("id");
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
                    return Err(self.away("it is not a folder"));
                }
                let id = match std::fs::read_to_string(&there) {
                    Ok(id) => id,
                    Err(e) if e.kind() == ErrorKind::NotFound => {
                        durable::create_dir_all(&self.staging)?;
                        // Another site may mark it at the same moment: what is there counts.
                        durable::create(
                            &there,
                            format!("{:032x}\n", rand::random::<u128>()).as_bytes(),
                        )?;
                        std::fs::read_to_string(&there)
                            .at(format_args!("read {}", there.display()))?
                    }
                    Err(e) => return Err(Fault::io(format_args!("read {}", there.display()), &e)),
                };
                durable::replace(&self.id_file, id.as_bytes())?;
                id
            }
        };
        Ok(known.insert(id).clone())
    }

    fn away(&self, why: &str) -> Fault {
        Fault::unreachable(format!("the NAS is not at {}: {why}", self.root.display())).with_next(
            "mount the NAS there; transfers go on by themselves. If the NAS is a new one on purpose, remove sink-files-id from data_dir and restart",
        )
    }

    /// Notes in the root that this daemon uses it, at the start and then each day. Where that fails
    /// it is done at a later call.
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
        let text = format!("{node} {}\n{SAID_EACH_DAY}\n", data_dir.display());
        let noted = durable::create_dir_all(mine.parent().unwrap_or(&self.root))
            .and_then(|()| durable::replace(&mine, text.as_bytes()));
        *last = noted.is_ok().then(Instant::now);
    }

    /// The other daemons that use this root: the machine and the data folder of each.
    fn others(&self) -> Result<Vec<String>, Fault> {
        let folder = self.root.join(HIDDEN).join(SITES);
        // A folder that cannot be read does not say that nobody else is there.
        let sites: Vec<_> = match std::fs::read_dir(&folder).and_then(Iterator::collect) {
            Ok(sites) => sites,
            Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Fault::io(folder.display(), &error)),
        };
        let others = sites.into_iter().filter(|entry| {
            !entry.file_name().to_string_lossy().starts_with('.')
                && *entry.file_name() != *self.owner
        });
        // By the clock of the NAS, which wrote both times.
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
            // One of an earlier revision says it once.
            let silent = now
                .zip(written(&entry.path()))
                .and_then(|(now, said)| now.duration_since(said).ok());
            let has_ended = lines.next() == Some(SAID_EACH_DAY)
                && silent.is_some_and(|silent| silent >= ROOT_USE_ENDS_AFTER);
            (!has_ended).then(|| text::line(who, SITE_BYTES_MAX as usize))
        };
        Ok(others.filter_map(read).take(SITES_TOLD_MAX).collect())
    }

    fn mount(&self) -> Mount {
        self.mount.get().copied().unwrap_or_default()
    }

    /// The sink as it is on such a filesystem.
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

    /// The active version, as `CURRENT` names it. A link or a folder of that name is no such file.
    fn current(&self, artifact: &ArtifactRef) -> Result<Option<String>, Fault> {
        let file = self.series(artifact).join("CURRENT");
        if std::fs::symlink_metadata(&file).is_ok_and(|meta| !meta.is_file()) {
            return Ok(None);
        }
        Ok(read_if_there(&file)?.map(|text| text.trim().to_owned()))
    }

    /// Whether the version stands already: ours or, as a fault, somebody else's.
    fn is_there(&self, incoming: &Incoming) -> Result<bool, Fault> {
        let folder = self.folder(&incoming.artifact);
        match std::fs::symlink_metadata(&folder) {
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(false);
            }
            // A NAS that fails for a moment says nothing of what it holds.
            Err(e) => return Err(Fault::io(format_args!("look at {}", folder.display()), &e)),
        }
        match self.note(&incoming.artifact)? {
            Some(note) if note.digest == incoming.digest => Ok(true),
            Some(note) => Err(Fault::conflict(format!(
                "{} is there already with another content of {}: {} there, {} now",
                folder.display(),
                incoming.artifact,
                note.digest,
                incoming.digest
            ))
            .with_next("publish it under another version, or move that folder away, then retry the transfer")),
            None => {
                Err(Fault::conflict(format!("{} stands in the way: packhorse did not put {} there", folder.display(), incoming.artifact))
                    .with_reason(Reason::SinkRefused)
                    .with_next("move that folder away, then retry the transfer"))
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

    /// Whether this version was asked for after the one that is active: a large old version that
    /// arrives late, or one that is delivered again, must not take readers back.
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

    /// Whether the root is the one that this site has always had. An empty mount point must not be
    /// filled.
    fn mounted(&self) -> Result<(), Fault> {
        let id = self.id()?;
        self.is_ours(
            &id,
            std::fs::read_to_string(self.root.join(HIDDEN).join("id")),
        )?;
        self.register();
        Ok(())
    }

    fn is_ours(&self, id: &str, there: std::io::Result<String>) -> Result<(), Fault> {
        match there {
            Ok(there) if there == id => Ok(()),
            Ok(_) => Err(self.away(&format!("its {HIDDEN}/id is another"))),
            Err(e) => Err(self.away(&format!("its {HIDDEN}/id cannot be read: {e}"))),
        }
    }

    fn set_current(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        let series = self.series(artifact);
        let (file, link) = (series.join("CURRENT"), series.join("current"));
        let write = || durable::replace(&file, format!("{}\n", artifact.version()).as_bytes());
        if self.current(artifact)?.as_deref() != Some(artifact.version()) {
            write()?;
        }
        // Where names fold case the link would replace the file.
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

    /// Every step may be repeated, and is skipped once it is done. It succeeds only after `CURRENT`
    /// names the version that it is to name.
    fn commit_blocking(&self, incoming: &Incoming, staged: &Path) -> Result<Landed, Fault> {
        let artifact = &incoming.artifact;
        self.mounted()?;
        let mut stood = self.is_there(incoming)?;
        if !stood {
            if !staged.try_exists().at(staged.display())? {
                return Err(nothing_staged(staged));
            }
            self.claim(incoming)?;
            durable::create_dir_all(&self.series(artifact))?;
            if let Err(fault) = durable::rename_noreplace(staged, &self.folder(artifact)) {
                // A rename that a network filesystem reports as failed may have happened, or
                // another site was faster.
                stood = self.is_there(incoming)?;
                if !stood {
                    return Err(fault);
                }
            }
        }
        // What is staged is whole and checked: a version is staged again only when the one that
        // stands is not.
        if stood && staged.try_exists().at(staged.display())? {
            repair::merge(staged, &self.folder(artifact))?;
            self.write_note(incoming)?;
        }
        durable::remove_all(staged)?;
        if stood {
            // An earlier try may have renamed it and not got as far as this.
            durable::sync_dir(&self.series(artifact))?;
        }
        if self.is_newest(artifact)? {
            self.set_current(artifact)?;
        }
        Ok(self.landed(artifact))
    }

    /// The version of the same series that was asked for last, of those that stand.
    fn newest_left(&self, artifact: &ArtifactRef) -> Result<Option<ArtifactRef>, Fault> {
        let path = self.note_path(artifact);
        let notes = path.parent().unwrap_or(&self.root);
        let mut newest: Option<(String, ArtifactRef)> = None;
        for entry in std::fs::read_dir(notes).at(notes.display())? {
            let name = entry.at(notes.display())?.file_name();
            let version = name.to_str().and_then(|name| name.strip_suffix(".json"));
            let Some(Ok(left)) =
                version.map(|version| ArtifactRef::new(artifact.kind, artifact.name(), version))
            else {
                continue;
            };
            if let Some(note) = self.note(&left)?
                && is_folder(&self.folder(&left))?
                && newest
                    .as_ref()
                    .is_none_or(|(transfer, _)| *transfer < note.transfer)
            {
                newest = Some((note.transfer, left));
            }
        }
        Ok(newest.map(|(_, left)| left))
    }

    /// Takes a version out of sight by one rename. Returns where it is now, to be removed.
    fn move_away(&self, artifact: &ArtifactRef) -> Result<PathBuf, Fault> {
        let away = self.staging.join(format!(
            "removed-{}-{}-{:08x}",
            self.owner,
            artifact.version(),
            rand::random::<u32>()
        ));
        durable::rename_noreplace(&self.folder(artifact), &away)?;
        Ok(away)
    }

    fn remove_blocking(&self, artifact: &ArtifactRef) -> Result<Option<String>, Fault> {
        // Where nothing is mounted nothing would be found, and all of it be taken for removed.
        self.mounted()?;
        let others = self.others()?;
        if !others.is_empty() {
            let folder = self.root.join(HIDDEN).join(SITES);
            return Ok(Some(format!(
                "other sites use {} too ({}); a file in {} names each",
                self.root.display(),
                others.join(", "),
                folder.display()
            )));
        }
        let folder = self.folder(artifact);
        let series = self.series(artifact);
        let current = self.current(artifact)?;
        if self.note(artifact)?.is_some() && folder.try_exists().at(folder.display())? {
            let away = self.move_away(artifact)?;
            // It is out of sight; what cannot be removed now is tried again.
            if let Err(fault) = durable::remove_all(&away) {
                tracing::warn!(error = %fault, "a version that was removed is not wholly removed yet; tried again");
            }
        }
        durable::remove_all(&self.note_path(artifact))?;
        if current.as_deref() == Some(artifact.version()) {
            match self.newest_left(artifact)? {
                Some(left) => self.set_current(&left)?,
                None => {
                    durable::remove_all(&series.join("CURRENT"))?;
                    durable::remove_all(&series.join("current"))?;
                }
            }
        }
        Ok(None)
    }
}

/// Whether this is a folder, or a link to one. A NAS that fails does not say that it is none.
fn is_folder(path: &Path) -> Result<bool, Fault> {
    match std::fs::metadata(path) {
        Ok(meta) => Ok(meta.is_dir()),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(false),
        Err(e) => Err(Fault::io(format_args!("look at {}", path.display()), &e)),
    }
}

/// Whether two names are of one entry. One that is not there is no other's.
fn is_same_entry(one: &Path, other: &Path) -> Result<bool, Fault> {
    let entry = |path: &Path| match std::fs::symlink_metadata(path) {
        Ok(meta) => Ok(Some((meta.dev(), meta.ino()))),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Fault::io(format_args!("look at {}", path.display()), &e)),
    };
    Ok(entry(other)?.is_some_and(|there| entry(one).is_ok_and(|one| one == Some(there))))
}

/// A small file's text; `None` if it is not there.
fn read_if_there(path: &Path) -> Result<Option<String>, Fault> {
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
            Code::NotFound => self.away("it is not a folder"),
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
        // What the kernel does not answer from its caches: the size of the filesystem, and a file
        // that is opened.
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
            "check the NAS and the network to it; the transfer goes on by itself when it answers",
        ))
    }

    fn may_remove(&self, name: &str) -> bool {
        // Those without an owner, `removed-<version>-<random>`, are of a daemon that had the root
        // to itself.
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
                // Two at once find the same.
                let folder = this.staging.join(format!(
                    "removed-{}-probe-{:08x}",
                    this.owner,
                    rand::random::<u32>()
                ));
                let _ = this.mount.set(Mount::probe(&folder)?);
            }
            this.is_there(&incoming).map(|_| ())
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
                return Some(format!("the NAS takes no {c:?} in names"));
            }
            let stem = name.split('.').next().unwrap_or(name).to_ascii_uppercase();
            let reserved = matches!(stem.as_str(), "CON" | "PRN" | "AUX" | "NUL")
                || (stem.len() == 4
                    && (stem.starts_with("COM") || stem.starts_with("LPT"))
                    && stem.ends_with(|c: char| c.is_ascii_digit()));
            if name.ends_with(['.', ' ']) || reserved {
                return Some(
                    "the NAS takes no reserved names, nor names that end in a dot or a space"
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
                        "{artifact} is not in {}",
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
        self.run(move |this| this.mounted().and_then(|()| this.is_there(&incoming)))
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
            // Where nothing is mounted nothing would be found, and all of it be taken for gone.
            this.mounted()?;
            let folder = this.folder(&incoming.artifact);
            Ok(match this.note(&incoming.artifact)? {
                _ if !is_folder(&folder)? => vec![format!("{} is gone", folder.display())],
                Some(note) if note.digest == incoming.digest => vec![],
                _ => vec![format!("{} has no note of its digest", folder.display())],
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
                // Versions are renamed into folders of their kinds, which may have other owners
                // than the staging.
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
                        "files at {}: no inode is free",
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
                    format!(", used by other sites too ({})", others.join(", "))
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

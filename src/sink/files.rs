//! Files on the NAS: an immutable folder a version, and a small text file that names the active one.
//!
//! ```text
//! <root>/<kind>/<name>/<version>/…           appears by one rename, never changes
//! <root>/<kind>/<name>/CURRENT               "<version>\n", replaced by rename
//! <root>/<kind>/<name>/current               a link beside it, where there are links
//! <root>/.packhorse/staging/<transfer>/…     what is on its way in (same mount)
//! <root>/.packhorse/versions/<kind>/<name>/<version>.json    the digest of what stands there
//! ```
//! The note of the digest is durable before the rename: after a crash between the two, a commit that is asked again
//! finds either the staged folder or its own finished one, and knows which. Only a version of which something was found
//! gone or damaged is ever replaced: it is moved away, then the whole one takes its name.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{Folding, Incoming, Landed, Look, Place, Sink};
use crate::config;
use crate::durable;
use crate::fault::{Fault, IoContext, Reason};
use crate::manifest::Digest;
use crate::names::{ArtifactRef, RelPath};
use crate::space::Space;

/// The folder of Packhorse's own things in a root.
pub const HIDDEN: &str = ".packhorse";

/// Writes datasets, operators and models. Cheap to clone.
#[derive(Clone)]
pub struct FilesSink {
    root: PathBuf,
    staging: PathBuf,
    /// What `<root>/.packhorse/id` must hold.
    id: String,
    /// Known from the first check on: at the start the NAS may not be mounted yet.
    mount: Arc<OnceLock<Mount>>,
}

/// What a filesystem does otherwise than Linux's own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Mount {
    /// It refuses names that Windows refuses (SMB, FAT).
    pub(crate) windows_names: bool,
    /// It takes different names for one.
    pub(crate) folding: Folding,
    /// It has no symbolic links (FAT, SMB without mfsymlinks).
    pub(crate) no_links: bool,
}

impl Mount {
    /// Tries all of it in a new folder below `staging`.
    fn probe(staging: &Path) -> Result<Self, Fault> {
        // The name is of those that the next start takes away, should a crash leave it.
        let folder = staging.join(format!("removed-probe-{:08x}", rand::random::<u32>()));
        let make = |path: &Path| std::fs::create_dir(path).at(format_args!("make the folder {}", path.display()));
        let makes = |name: &str| make(&folder.join(name)).is_ok();
        let finds = |name: &str| std::fs::symlink_metadata(folder.join(name)).is_ok();
        make(&folder)?;
        let mount = Self {
            windows_names: !makes("a:b"),
            folding: Folding { case: makes("Case") && finds("cASE"), unicode: makes("\u{e9}") && finds("e\u{301}") },
            no_links: std::os::unix::fs::symlink("Case", folder.join("link")).is_err(),
        };
        // What it refused tells of it only if it still works: it has not filled up or gone away in between.
        make(&folder.join("last"))?;
        durable::remove_all(&folder)?;
        Ok(mount)
    }
}

/// What stands under a version.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    digest: Digest,
    /// The transfer that brought it; ids sort by time.
    transfer: String,
}

impl FilesSink {
    /// A root that is missing is a NAS that is not mounted: making it would fill the wrong disk.
    pub fn check_root(root: &Path) -> Result<(), Fault> {
        if root.is_dir() {
            return Ok(());
        }
        Err(Fault::config(format!("[sink.files] root {} is not a folder", root.display()))
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

    /// Opens the root that the config names (default: `<data_dir>/artifacts`).
    pub fn open(config: Option<&config::FilesSink>, data_dir: &Path) -> Result<Self, Fault> {
        let root = match config {
            Some(config) => {
                Self::check_root(&config.root)?;
                config.root.clone()
            }
            None => data_dir.join("artifacts"),
        };
        let staging = root.join(HIDDEN).join("staging");
        let id_file = data_dir.join("sink-files-id");
        let there = root.join(HIDDEN).join("id");
        let id = match std::fs::read_to_string(&id_file) {
            Ok(id) => id,
            Err(_) => {
                // The first start with this root: it gets a mark, by which it is known from an empty mount point.
                let id = match std::fs::read_to_string(&there) {
                    Ok(id) => id,
                    Err(_) => {
                        let id = format!("{:032x}\n", rand::random::<u128>());
                        durable::create_dir_all(&staging)?;
                        durable::replace(&there, id.as_bytes())?;
                        id
                    }
                };
                durable::replace(&id_file, id.as_bytes())?;
                id
            }
        };
        Ok(Self { root, staging, id, mount: Arc::default() })
    }

    fn mount(&self) -> Mount {
        self.mount.get().copied().unwrap_or_default()
    }

    /// The sink as it is on such a filesystem.
    #[cfg(test)]
    pub(crate) fn assuming(self, mount: Mount) -> Self {
        Self { mount: Arc::new(mount.into()), ..self }
    }

    fn series(&self, artifact: &ArtifactRef) -> PathBuf {
        self.root.join(artifact.kind.as_str()).join(artifact.name())
    }

    fn folder(&self, artifact: &ArtifactRef) -> PathBuf {
        self.series(artifact).join(artifact.version())
    }

    fn note_path(&self, artifact: &ArtifactRef) -> PathBuf {
        let folder = self.root.join(HIDDEN).join("versions").join(artifact.kind.as_str()).join(artifact.name());
        folder.join(format!("{}.json", artifact.version()))
    }

    fn note(&self, artifact: &ArtifactRef) -> Option<Note> {
        serde_json::from_slice(&std::fs::read(self.note_path(artifact)).ok()?).ok()
    }

    /// Whether the version stands already: ours or, as a fault, somebody else's.
    fn is_there(&self, incoming: &Incoming) -> Result<bool, Fault> {
        let folder = self.folder(&incoming.artifact);
        match std::fs::symlink_metadata(&folder) {
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(false),
            // A NAS that fails for a moment says nothing of what it holds.
            Err(e) => return Err(Fault::io(format_args!("look at {}", folder.display()), &e)),
        }
        match self.note(&incoming.artifact) {
            Some(note) if note.digest == incoming.digest => Ok(true),
            _ => Err(Fault::conflict(format!("{} stands in the way: packhorse did not put {} there", folder.display(), incoming.artifact))
                .with_reason(Reason::SinkRefused)
                .with_next("move that folder away, then retry the transfer")),
        }
    }

    fn landed(&self, artifact: &ArtifactRef) -> Landed {
        let path = self.folder(artifact);
        Landed { location: path.display().to_string(), place: Place::Folder { path }, note: None }
    }

    /// Whether this version was asked for after the one that is active: a large old version that arrives late, or one
    /// that is delivered again, must not take readers back.
    fn is_newest(&self, artifact: &ArtifactRef) -> Result<bool, Fault> {
        let current = std::fs::read_to_string(self.series(artifact).join("CURRENT")).unwrap_or_default();
        let Ok(active) = ArtifactRef::new(artifact.kind, artifact.name(), current.trim()) else { return Ok(true) };
        Ok(match (self.note(&active), self.note(artifact)) {
            (Some(active), Some(this)) => active.transfer <= this.transfer,
            _ => true,
        })
    }

    /// Whether the root is the one that this site has always had. An empty mount point must not be filled.
    fn mounted(&self) -> Result<(), Fault> {
        match std::fs::read_to_string(self.root.join(HIDDEN).join("id")) {
            Ok(id) if id == self.id => Ok(()),
            _ => Err(Fault::unreachable(format!("{} is not the folder that it was: its {HIDDEN}/id is missing or another", self.root.display()))
                .with_next("mount the NAS there; transfers go on by themselves. If the NAS is a new one on purpose, remove sink-files-id from data_dir and restart")),
        }
    }

    fn set_current(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        let series = self.series(artifact);
        durable::replace(&series.join("CURRENT"), format!("{}\n", artifact.version()).as_bytes())?;
        durable::replace_symlink(&series.join("current"), artifact.version())
    }

    fn commit_blocking(&self, incoming: &Incoming, staged: &Path) -> Result<Landed, Fault> {
        let artifact = &incoming.artifact;
        self.mounted()?;
        // What is staged is whole and checked: a version is staged again only when the one that stands is not.
        let stood = self.is_there(incoming)?;
        let replaced = if stood && staged.exists() { Some(self.move_away(artifact)?) } else { None };
        if !stood || replaced.is_some() {
            let note = self.note_path(artifact);
            durable::create_dir_all(note.parent().unwrap_or(&self.root))?;
            let text = serde_json::to_vec(&Note { digest: incoming.digest, transfer: incoming.transfer.to_string() }).unwrap_or_default();
            durable::replace(&note, &text)?;
            durable::create_dir_all(&self.series(artifact))?;
            if let Err(fault) = durable::rename_noreplace(staged, &self.folder(artifact)) {
                // A rename that a network filesystem reports as failed may have happened.
                if staged.exists() || !self.is_there(incoming)? {
                    return Err(fault);
                }
            }
        }
        durable::remove_all(staged)?;
        // Bringing back what was there changes nothing for readers of the series.
        if replaced.is_none() && self.is_newest(artifact)? {
            self.set_current(artifact)?;
        }
        if let Some(old) = replaced {
            // It is out of sight; what cannot be removed now goes at the next start.
            if let Err(fault) = durable::remove_all(&old) {
                tracing::warn!(error = %fault, "a version that was replaced could not be removed yet");
            }
        }
        Ok(self.landed(artifact))
    }

    /// The version of the same series that was asked for last, of those that stand.
    fn newest_left(&self, artifact: &ArtifactRef) -> Option<ArtifactRef> {
        let notes = std::fs::read_dir(self.note_path(artifact).parent()?).ok()?;
        let versions = notes.flatten().filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".json").map(str::to_owned));
        let standing = versions.filter_map(|version| {
            let left = ArtifactRef::new(artifact.kind, artifact.name(), &version).ok()?;
            let note = self.note(&left).filter(|_| self.folder(&left).is_dir())?;
            Some((note.transfer, left))
        });
        standing.max_by(|a, b| a.0.cmp(&b.0)).map(|(_, left)| left)
    }

    /// Takes a version out of sight by one rename. Returns where it is now, to be removed.
    fn move_away(&self, artifact: &ArtifactRef) -> Result<PathBuf, Fault> {
        let away = self.staging.join(format!("removed-{}-{}", artifact.version(), rand::random::<u32>()));
        durable::rename_noreplace(&self.folder(artifact), &away)?;
        Ok(away)
    }

    fn remove_blocking(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        // Where nothing is mounted nothing would be found, and all of it be taken for removed.
        self.mounted()?;
        let folder = self.folder(artifact);
        let series = self.series(artifact);
        let current = std::fs::read_to_string(series.join("CURRENT")).unwrap_or_default();
        if self.note(artifact).is_some() && folder.exists() {
            durable::remove_all(&self.move_away(artifact)?)?;
        }
        durable::remove_all(&self.note_path(artifact))?;
        if current.trim() == artifact.version() {
            match self.newest_left(artifact) {
                Some(left) => self.set_current(&left)?,
                None => {
                    durable::remove_all(&series.join("CURRENT"))?;
                    durable::remove_all(&series.join("current"))?;
                }
            }
        }
        Ok(())
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Fault> + Send + 'static) -> Result<T, Fault> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Fault::internal(format!("a file task ended: {e}")))?
}

#[async_trait]
impl Sink for FilesSink {
    fn staging_root(&self) -> &Path {
        &self.staging
    }

    async fn check(&self, incoming: &Incoming) -> Result<(), Fault> {
        let (this, incoming) = (self.clone(), incoming.clone());
        blocking(move || {
            this.mounted()?;
            durable::create_dir_all(&this.staging)?;
            if this.mount.get().is_none() {
                // Two at once find the same.
                let _ = this.mount.set(Mount::probe(&this.staging)?);
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
            if let Some(c) = name.chars().find(|c| "<>:\"|?*\\".contains(*c) || c.is_control()) {
                return Some(format!("the NAS takes no {c:?} in names"));
            }
            let stem = name.split('.').next().unwrap_or(name).to_ascii_uppercase();
            let reserved = matches!(stem.as_str(), "CON" | "PRN" | "AUX" | "NUL")
                || (stem.len() == 4
                    && (stem.starts_with("COM") || stem.starts_with("LPT"))
                    && stem.ends_with(|c: char| c.is_ascii_digit()));
            if name.ends_with(['.', ' ']) || reserved {
                return Some("the NAS takes no reserved names, nor names that end in a dot or a space".into());
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
        let (this, incoming, staged) = (self.clone(), incoming.clone(), staged.to_owned());
        blocking(move || this.commit_blocking(&incoming, &staged)).await
    }

    async fn activate(&self, artifact: &ArtifactRef) -> Result<(), Fault> {
        let (this, artifact) = (self.clone(), artifact.clone());
        blocking(move || {
            if this.note(&artifact).is_none() || !this.folder(&artifact).is_dir() {
                return Err(Fault::not_found(format!("{artifact} is not in {}", this.root.display())));
            }
            this.set_current(&artifact)
        })
        .await
    }

    async fn read_at(&self, place: &Place, path: &RelPath, offset: u64, len: u32) -> Result<Bytes, Fault> {
        let Place::Folder { path: folder } = place else { return Err(Fault::internal("a files sink reads folders only")) };
        let file = path.in_dir(folder);
        blocking(move || {
            use std::os::unix::fs::FileExt;
            let mut out = vec![0; len as usize];
            let what = || format!("read {}", file.display());
            std::fs::File::open(&file).at(what())?.read_exact_at(&mut out, offset).at(what())?;
            Ok(out.into())
        })
        .await
    }

    async fn stands(&self, incoming: &Incoming) -> Result<bool, Fault> {
        let (this, incoming) = (self.clone(), incoming.clone());
        blocking(move || this.mounted().and_then(|()| this.is_there(&incoming))).await
    }

    async fn verify(&self, incoming: &Incoming, _place: &Place, _look: &Look) -> Result<Vec<String>, Fault> {
        let (this, incoming) = (self.clone(), incoming.clone());
        blocking(move || {
            let folder = this.folder(&incoming.artifact);
            Ok(match this.note(&incoming.artifact) {
                _ if !folder.is_dir() => vec![format!("{} is gone", folder.display())],
                Some(note) if note.digest == incoming.digest => vec![],
                _ => vec![format!("{} has no note of its digest", folder.display())],
            })
        })
        .await
    }

    async fn remove(&self, artifact: &ArtifactRef) -> Result<Option<String>, Fault> {
        let (this, artifact) = (self.clone(), artifact.clone());
        blocking(move || this.remove_blocking(&artifact)).await.map(|()| None)
    }

    async fn probe(&self) -> Result<String, Fault> {
        let this = self.clone();
        blocking(move || {
            this.mounted()?;
            let file = this.staging.join(".probe");
            durable::replace(&file, b"probe")?;
            durable::remove_all(&file)?;
            // Versions are renamed into folders of their kinds, which may have other owners than the staging.
            let kinds = ["dataset", "operator", "model"].map(|kind| this.root.join(kind));
            for folder in std::iter::once(&this.root).chain(kinds.iter().filter(|kind| kind.exists())) {
                let probe = folder.join(format!(".packhorse-probe-{}", std::process::id()));
                std::fs::create_dir(&probe).and_then(|()| std::fs::remove_dir(&probe)).at(format_args!("write to {}", folder.display()))?;
            }
            let space = Space::of(&this.root)?;
            if space.inodes == Some(0) {
                return Err(Fault::no_space(format!("files at {}: no inode is free", this.root.display())));
            }
            let free = space.bytes.map_or("free space unknown".into(), |bytes| format!("{} GiB free", bytes >> 30));
            Ok(format!("files at {}: writable, {free}", this.root.display()))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::{DEFAULT_CHUNKING, Hash};
    use crate::fault::Retry;
    use crate::manifest::{KindInfo, Root, Totals};
    use crate::names::Kind;

    fn incoming(version: &str) -> Incoming {
        let root = Root {
            format: 1,
            kind: Kind::Dataset,
            info: KindInfo::Files,
            chunking: DEFAULT_CHUNKING,
            totals: Totals::default(),
            depth: 0,
            pages: Vec::new(),
        };
        let artifact = ArtifactRef::new(Kind::Dataset, "d", version).unwrap();
        Incoming {
            artifact,
            digest: Hash::of(version.as_bytes()),
            root,
            transfer: format!("t-{version}").parse().unwrap(),
            waits: Default::default(),
        }
    }

    #[test]
    fn names_that_windows_refuses_are_refused_where_the_nas_does() {
        let dir = tempfile::tempdir().unwrap();
        let linux = FilesSink::open(None, dir.path()).unwrap();
        let smb = linux.clone().assuming(Mount { windows_names: true, ..Mount::default() });
        let refused = |sink: &FilesSink, name: &str| sink.refuse_path(&name.parse().unwrap()).is_some();
        for bad in [
            ["CON", "con.txt", "sub/Aux", "nul.tar.gz", "prn/b.png"],
            ["COM1", "lpt9.log", "a.", "a ", "folder./x.png"],
            ["folder /x.png", "a\u{1}b", "tab\there", "new\nline", "del\u{7f}"],
            ["a<b", "a>b", "a:b", "a\"b", "a|b"],
            ["a?b", "a*b", "a\\b", "a/b/c?", "..."],
        ]
        .into_iter()
        .flatten()
        {
            assert!(refused(&smb, bad), "{bad:?}");
            assert!(!refused(&linux, bad), "{bad:?}");
        }
        for good in ["CONSOLE.png", "COM10", "COM", "lpt", "a.b", ".hidden", "a b", "图像/缺陷 1.png"] {
            assert!(!refused(&smb, good), "{good:?}");
        }
    }

    #[test]
    fn a_name_has_255_bytes_at_the_most() {
        let dir = tempfile::tempdir().unwrap();
        let smb = FilesSink::open(None, dir.path()).unwrap().assuming(Mount { windows_names: true, ..Mount::default() });
        for (letter, most) in [("a", 255), ("图", 85)] {
            assert_eq!(smb.refuse_path(&format!("a/{}", letter.repeat(most)).parse().unwrap()), None);
            assert!(format!("a/{}", letter.repeat(most + 1)).parse::<RelPath>().is_err(), "no sink is ever shown it");
        }
    }

    #[test]
    fn a_filesystem_of_linux_is_found_to_be_one() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Mount::probe(dir.path()).unwrap(), Mount::default());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left of it");
        assert!(Mount::probe(&dir.path().join("gone")).is_err(), "one that is away is not one that can do nothing");
    }

    #[tokio::test]
    async fn an_empty_mount_point_is_not_filled() {
        let dir = tempfile::tempdir().unwrap();
        let [nas, away, data] = ["nas", "away", "data"].map(|name| dir.path().join(name));
        std::fs::create_dir(&nas).unwrap();
        std::fs::create_dir(&data).unwrap();
        let config = config::FilesSink { root: nas.clone() };
        let sink = FilesSink::open(Some(&config), &data).unwrap();
        let (one, two) = (incoming("v1"), incoming("v2"));
        sink.check(&one).await.unwrap();
        let staged = sink.staging_root().join("t-v1");
        durable::create_dir_all(&staged).unwrap();
        sink.commit(&one, &staged).await.unwrap();

        // Unmounted, under a daemon that runs and under one that starts.
        durable::rename_noreplace(&nas, &away).unwrap();
        std::fs::create_dir(&nas).unwrap();
        let started = FilesSink::open(Some(&config), &data).unwrap();
        for sink in [&sink, &started] {
            let staged = sink.staging_root().join("t-v2");
            let faults = [
                sink.check(&two).await.unwrap_err(),
                sink.commit(&two, &staged).await.unwrap_err(),
                sink.stands(&one).await.unwrap_err(),
                sink.remove(&one.artifact).await.unwrap_err(),
                sink.probe().await.unwrap_err(),
            ];
            for fault in faults {
                assert_eq!((fault.reason, fault.retry), (Reason::SinkUnavailable, Retry::Backoff), "{fault}");
                assert!(fault.next.contains("mount the NAS there"), "{}", fault.next);
            }
        }
        assert_eq!(std::fs::read_dir(&nas).unwrap().count(), 0, "nothing was made on the disk below the mount");
        assert_eq!(started.mount.get(), None, "what is not there says nothing of the NAS");

        // Mounted again.
        std::fs::remove_dir(&nas).unwrap();
        durable::rename_noreplace(&away, &nas).unwrap();
        for sink in [&sink, &started] {
            sink.check(&two).await.unwrap();
            assert!(sink.stands(&one).await.unwrap());
        }
        assert_eq!(started.mount.get(), Some(&Mount::default()));

        // Another NAS in its place.
        durable::replace(&nas.join(HIDDEN).join("id"), b"another\n").unwrap();
        assert_eq!(sink.check(&two).await.unwrap_err().reason, Reason::SinkUnavailable);
    }
}

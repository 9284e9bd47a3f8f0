//! Images as OCI layouts in a directory, for a site without a registry. `<root>/<name>/`, or the
//! repository that the artifact states, is one layout, whose `index.json` names each version (`org.opencontainers.image.ref.name`), so that
//! `skopeo copy oci:<root>/<name>:<version>` can read it.
//!
//! Blobs are synced and renamed into the layout first. Replacing `index.json` makes a version
//! visible. A crash before that leaves unreferenced blobs, which the next attempt uses or the next
//! removal deletes.

mod index;

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::json;
use sha2::Digest as _;

use super::shared_blobs::SharedBlobs;
use super::{
    Attached, ImageName, attached, file_size, image_info, lost, not_staged, read_small, taken,
    top_of,
};
use crate::{
    Committed, Heartbeat, Incoming, Sink, StorageLocation, Threads, Verification, rounded_secs,
};
use base::durable;
use base::fault::{Code, Fault, IoContext};
use base::limits;
use base::names::{ArtifactRef, RelPath};
use content::manifest::{FileInfo, KindInfo};
use index::Index;
use registry::image::{Descriptor, Sha256, Tree, walk};

/// Writes images to a directory of OCI layouts. All access to the directory runs on threads of this
/// sink, because it may be a NAS.
pub struct LayoutSink {
    root: PathBuf,
    staging_root: PathBuf,
    /// Whether the configuration names the directory. Then other daemons may use it.
    configured: bool,
    threads: Threads,
    heartbeat: Heartbeat,
    shared: Arc<SharedBlobs>,
    /// One lock per name. It is held while `index.json` is replaced or blobs are deleted.
    locks: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl LayoutSink {
    /// Creates a sink with its layouts below `path`. The directory is created at the first use,
    /// because a directory that does not respond must not block the start of the daemon.
    /// `configured`: the configuration names it.
    pub fn new(path: PathBuf, staging_root: PathBuf, configured: bool) -> Result<Self, Fault> {
        if !path.is_absolute() {
            return Err(Fault::config(format!(
                "the image directory {:?} is not an absolute path",
                path.display()
            )));
        }
        let (threads, heartbeat, locks) = (
            Threads::new("sink images", limits::SINK_THREADS_MAX),
            Heartbeat::default(),
            Mutex::default(),
        );
        Ok(Self {
            shared: Arc::new(SharedBlobs::new(path.clone())),
            root: path,
            staging_root,
            configured,
            threads,
            heartbeat,
            locks,
        })
    }

    fn layout(&self, name: &ImageName) -> PathBuf {
        self.root.join(&name.repository)
    }

    fn location(&self, name: &ImageName) -> String {
        format!("oci:{}:{}", self.layout(name).display(), name.tag)
    }

    fn lock(&self, name: &ImageName) -> Arc<tokio::sync::Mutex<()>> {
        self.locks
            .lock()
            .entry(name.repository.clone())
            .or_default()
            .clone()
    }

    async fn current_digest(&self, name: &ImageName) -> Result<Option<Sha256>, Fault> {
        let (layout, version) = (self.layout(name), name.tag.clone());
        self.threads
            .run(move || Index::read(&layout)?.digest_of(&version))
            .await
    }

    /// Changes a layout exclusively: no other task of this daemon, and no other daemon with the
    /// same directory, changes it meanwhile.
    async fn change<T: Send + 'static>(
        &self,
        name: &ImageName,
        work: impl FnOnce() -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        // Two names never share a lock file: a name does not start with a dot and has no plus sign.
        let (staging_root, lock) = (
            self.staging_root.clone(),
            self.staging_root
                .join(format!(".{}.lock", name.repository.replace('/', "+"))),
        );
        let change = move || {
            durable::create_dir_all(&staging_root)?;
            let _lock = lock_file(&lock)?;
            work()
        };
        self.threads.run(change).await
    }

    async fn commit_staged(&self, incoming: &Incoming, staged: &Path) -> Result<Committed, Fault> {
        let name = ImageName::of(incoming)?;
        let layout = self.layout(&name);
        let top = top_of(image_info(incoming)?)?;
        let lock = self.lock(&name);
        let _held = lock.lock().await;
        let staged_path = staged.to_owned();
        let is_staged = self
            .threads
            .run(move || staged_path.try_exists().at(staged_path.display()))
            .await?;
        let mut notes = Vec::new();
        match self.current_digest(&name).await? {
            Some(theirs) if theirs != top.digest => {
                return Err(taken(&self.location(&name), &theirs, &top.digest));
            }
            // Committed and cleaned up before a crash.
            Some(_) if !is_staged => {}
            _ => {
                let tree = self
                    .tree(incoming, &[staged, &layout])
                    .await
                    .map_err(|fault| not_staged(fault, &self.location(&name)))?;
                let attached = self
                    .attached(incoming, &[staged, &layout])
                    .await
                    .map_err(|fault| not_staged(fault, &self.location(&name)))?;
                let (layout, staged, top) = (layout.clone(), staged.to_owned(), top.clone());
                let (version, location) = (name.tag.clone(), self.location(&name));
                let shared = self.shared.clone();
                let move_image = move || {
                    let image = Staged {
                        staged: &staged,
                        shared: &shared,
                        tree: &tree,
                        top: &top,
                        attached: &attached,
                    };
                    let notes = move_image(&layout, &image, &version, &location)?;
                    durable::remove_all(&staged)?;
                    shared.added(&layout);
                    Ok(notes)
                };
                notes = self.change(&name, move_image).await?;
            }
        }
        let location = format!("{}@{}", self.location(&name), top.digest);
        if is_of_docker(&top) {
            notes.push(format!(
                "its media types are those of Docker, which older tools (skopeo of Debian 12) find only without a tag: skopeo copy oci:{} …",
                single_entry(&layout, &name.tag).display()
            ));
        }
        Ok(Committed {
            place: StorageLocation::Folder { path: layout },
            location,
            note: (!notes.is_empty()).then(|| notes.join("; ")),
        })
    }

    /// Reads a manifest from the first of these directories that has it.
    async fn manifest(
        &self,
        wanted: &Descriptor,
        folders: &[&Path],
    ) -> Result<Option<Bytes>, Fault> {
        for folder in folders {
            let file = folder.join(wanted.digest.layout_path());
            if let Some(bytes) = self.threads.run(move || read_small(&file)).await? {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    /// Collects what is carried with the image from the directories, in this order.
    async fn attached(
        &self,
        incoming: &Incoming,
        folders: &[&Path],
    ) -> Result<Vec<Attached>, Fault> {
        attached(image_info(incoming)?, |wanted| async move {
            self.manifest(&wanted, folders).await
        })
        .await
    }

    /// Collects the image from the directories, in this order.
    async fn tree(&self, incoming: &Incoming, folders: &[&Path]) -> Result<Tree, Fault> {
        let info = image_info(incoming)?;
        let tree = walk(&top_of(info)?, |wanted| async move {
            self.manifest(&wanted, folders).await
        })
        .await?;
        match tree
            .absent
            .iter()
            .find(|digest| !info.absent.contains(&digest.to_string()))
        {
            Some(digest) => Err(lost(
                &format!("manifest {digest}"),
                &self.location(&ImageName::of(incoming)?),
            )),
            None => Ok(tree),
        }
    }
}

/// Takes the lock of this file and waits for other daemons. Continues without a lock if the
/// filesystem has none.
fn lock_file(path: &Path) -> Result<File, Fault> {
    use rustix::io::Errno;
    let what = || format!("lock {}", path.display());
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .at(what())?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive) {
        Ok(()) | Err(Errno::NOLCK | Errno::NOSYS | Errno::NOTSUP | Errno::INVAL) => Ok(file),
        Err(error) => Err(Fault::io(what(), &error.into())),
    }
}

/// Moves one verified blob into the layout. Copies only across filesystems.
fn move_in(from: &Path, to: &Path) -> Result<(), Fault> {
    durable::sync_file(from)?;
    let device = |path: &Path| {
        fs::metadata(path)
            .map(|m| m.dev())
            .at(format_args!("read the metadata of {}", path.display()))
    };
    let folder = to.parent().unwrap_or(Path::new("/"));
    if device(from)? == device(folder)? {
        return durable::rename_noreplace(from, to);
    }
    let temporary = to.with_extension("part");
    fs::copy(from, &temporary).at(format_args!(
        "copy {} to {}",
        from.display(),
        temporary.display()
    ))?;
    durable::sync_file(&temporary)?;
    durable::rename_noreplace(&temporary, to)
}

/// An image whose files are staged or in the layout.
struct Staged<'a> {
    staged: &'a Path,
    shared: &'a SharedBlobs,
    tree: &'a Tree,
    top: &'a Descriptor,
    attached: &'a [Attached],
}

/// Moves every staged file of the image into the layout, and then adds its entry and those of what
/// is carried with it. Returns notes about these.
fn move_image(
    layout: &Path,
    image: &Staged<'_>,
    version: &str,
    location: &str,
) -> Result<Vec<String>, Fault> {
    let Staged {
        staged,
        shared,
        top,
        attached,
        ..
    } = *image;
    let current_digest = |index: &Index| match index.digest_of(version)? {
        // Another site with the same directory was faster.
        Some(theirs) if theirs != top.digest => Err(taken(location, &theirs, &top.digest)),
        existing => Ok(existing.is_some()),
    };
    current_digest(&Index::read(layout)?)?;
    durable::create_dir_all(&layout.join("blobs/sha256"))?;
    let trees = || std::iter::once(image.tree).chain(attached.iter().map(|one| &one.tree));
    let manifests = trees()
        .flat_map(|tree| &tree.manifests)
        .map(|node| (node.digest, node.bytes.len() as u64, false));
    let blobs = trees()
        .flat_map(|tree| &tree.blobs)
        .map(|blob| (blob.digest, blob.size, blob.is_foreign()));
    for (digest, size, foreign) in manifests.chain(blobs) {
        let (from, to) = (
            staged.join(digest.layout_path()),
            layout.join(digest.layout_path()),
        );
        // An existing blob was found by its name and size only, and may be damaged.
        if check_blob(&to, &digest, size)?.is_none() {
            continue;
        }
        // The hash of the artifact covers the bytes of the file, but not that they match the digest
        // in the image.
        match fs::metadata(&from) {
            Ok(_) => {
                if let Some(why) = check_blob(&from, &digest, size)? {
                    return Err(Fault::integrity(format!(
                        "image blob {digest} does not match its digest: {why}"
                    ))
                    .with_next(
                        "publish the image again from its original source, under a new version",
                    ));
                }
                durable::remove_all(&to)?;
                move_in(&from, &to)?;
            }
            // A failing NAS is an error, not a missing file.
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Fault::io(
                    format_args!("read the metadata of {}", from.display()),
                    &e,
                ));
            }
            Err(_) => {
                durable::remove_all(&to)?;
                if shared.take(layout, &digest, size)? || foreign {
                    continue;
                }
                return Err(lost(
                    &format!("blob {digest}"),
                    &layout.display().to_string(),
                ));
            }
        }
    }
    let marker = layout.join("oci-layout");
    if !marker.try_exists().at(marker.display())? {
        durable::replace(&marker, LAYOUT_VERSION)?;
    }
    if is_of_docker(top) {
        write_single_entry(&single_entry(layout, version), top)?;
    }
    let mut index = Index::read(layout)?;
    let exists = current_digest(&index)? && !index.is_attached(version);
    if !exists {
        index.add(version, top);
    }
    let (mut notes, mut is_changed) = (Vec::new(), !exists);
    for attached in attached {
        is_changed |= index.attach(attached, &mut notes);
    }
    if is_changed {
        index.write(layout)?;
    }
    Ok(notes)
}

/// Whether older tools do not find it in a layout by its tag.
fn is_of_docker(top: &Descriptor) -> bool {
    top.media_type.starts_with("application/vnd.docker.")
}

/// A layout with only this version and without its name, which older tools can read. Its blobs are a
/// link to those of the layout that it is in.
fn single_entry(layout: &Path, version: &str) -> PathBuf {
    layout.join(BY_VERSION).join(version)
}

fn write_single_entry(folder: &Path, top: &Descriptor) -> Result<(), Fault> {
    durable::create_dir_all(folder)?;
    durable::replace_symlink(&folder.join("blobs"), "../../blobs")?;
    durable::replace(&folder.join("oci-layout"), LAYOUT_VERSION)?;
    let entry = json!({ "mediaType": top.media_type, "digest": top.digest, "size": top.size });
    let index = json!({ "schemaVersion": 2, "manifests": [entry] });
    durable::replace(&folder.join("index.json"), index.to_string().as_bytes())
}

/// The content of `oci-layout`.
const LAYOUT_VERSION: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// The directory of the layouts with one version each.
const BY_VERSION: &str = "by-version";

/// The names in a layout. A repository has none of them below its first part, so that no layout is
/// in the blobs of another one.
pub(super) const OF_LAYOUT: [&str; 4] = ["index.json", "blobs", "oci-layout", BY_VERSION];

/// Deletes an empty layout, but no layout below it, and then the directories above it that are empty.
fn remove_layout(layout: &Path, root: &Path) -> Result<(), Fault> {
    for part in OF_LAYOUT {
        durable::remove_all(&layout.join(part))?;
    }
    for folder in layout.ancestors().take_while(|folder| *folder != root) {
        if fs::remove_dir(folder).is_err() {
            break; // it has other content
        }
    }
    Ok(())
}

/// Deletes the blobs that no version references.
fn delete_unreferenced(layout: &Path, current_digest: &HashSet<Sha256>) -> Result<(), Fault> {
    let folder = layout.join("blobs/sha256");
    for entry in fs::read_dir(&folder).at(format_args!("list {}", folder.display()))? {
        let entry = entry.at(format_args!("list {}", folder.display()))?;
        let name = entry.file_name();
        let digest = name
            .to_str()
            .and_then(|hex| Sha256::from_layout_path(&format!("blobs/sha256/{hex}")));
        if digest.is_none_or(|digest| !current_digest.contains(&digest)) {
            durable::remove_all(&entry.path())?;
        }
    }
    Ok(())
}

/// Deletes the blobs whose content does not match their name.
fn remove_damaged(layout: &Path) -> Result<(), Fault> {
    let folder = layout.join("blobs/sha256");
    let entries = match fs::read_dir(&folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.at(format_args!("list {}", folder.display()))?,
    };
    for entry in entries {
        let entry = entry.at(format_args!("list {}", folder.display()))?;
        let name = entry.file_name();
        let digest = name
            .to_str()
            .and_then(|hex| Sha256::from_layout_path(&format!("blobs/sha256/{hex}")));
        let size = entry
            .metadata()
            .at(format_args!(
                "read the metadata of {}",
                entry.path().display()
            ))?
            .len();
        if let Some(digest) = digest
            && check_blob(&entry.path(), &digest, size)?.is_some()
        {
            durable::remove_all(&entry.path())?;
        }
    }
    Ok(())
}

/// Reads a complete blob. Returns what is wrong with it.
pub(super) fn check_blob(path: &Path, digest: &Sha256, size: u64) -> Result<Option<String>, Fault> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Some(format!("{}: it is missing", path.display())));
        }
        Err(e) => return Err(Fault::io(format_args!("read {}", path.display()), &e)),
    };
    let mut hash = sha2::Sha256::new();
    let mut buffer = vec![0; limits::REGISTRY_READ_BYTES];
    let mut read = 0;
    loop {
        match file
            .read(&mut buffer)
            .at(format_args!("read {}", path.display()))?
        {
            0 => break,
            n => {
                hash.update(&buffer[..n]);
                read += n as u64;
            }
        }
    }
    let found = Sha256(hash.finalize().into());
    Ok((found != *digest || read != size).then(|| {
        format!(
            "{}: it has {read} bytes with the digest {found}, but {size} bytes were expected",
            path.display()
        )
    }))
}

#[async_trait]
impl Sink for LayoutSink {
    fn staging_root(&self) -> &Path {
        &self.staging_root
    }

    fn threads(&self) -> &Threads {
        &self.threads
    }

    fn wait_reason(&self) -> Option<Fault> {
        let (root, staging_root) = (self.root.clone(), self.staging_root.clone());
        // Calls that the kernel does not answer from its caches.
        let call = move || {
            let _ = rustix::fs::statvfs(&root);
            let _ = File::open(&staging_root);
        };
        let silent = self.heartbeat.silent_for(&self.threads, call)?;
        let message = format!(
            "the image directory {} has not answered for {} s",
            self.root.display(),
            rounded_secs(silent)
        );
        Some(
            Fault::unreachable(message).with_next(
                "check that disk or NAS; transfers resume automatically when it responds",
            ),
        )
    }

    fn is_shared(&self) -> bool {
        self.configured
    }

    async fn trial(&self) -> Result<(), Fault> {
        let staging_root = self.staging_root.clone();
        let trial = move || {
            durable::create_dir_all(&staging_root).map_err(Fault::of_sink)?;
            // The name must not be one that another daemon removes as a leftover.
            crate::files::trial(
                &staging_root.join(format!(".trial-{:016x}", rand::random::<u64>())),
            )
            .map_err(Fault::of_sink)
        };
        self.threads.run(trial).await
    }

    async fn check(&self, incoming: &Incoming) -> Result<(), Fault> {
        let ours = top_of(image_info(incoming)?)?.digest;
        let name = ImageName::of(incoming)?;
        let mut below = name.repository.split('/').skip(1);
        if let Some(part) = below.find(|part| OF_LAYOUT.contains(part)) {
            return Err(Fault::conflict(format!(
                "{}: an OCI layout directory cannot have the repository {:?}: {part:?} is a name in a layout",
                incoming.artifact, name.repository
            ))
            .with_next("publish it with another --repository"));
        }
        let staging_root = self.staging_root.clone();
        self.threads
            .run(move || durable::create_dir_all(&staging_root).map_err(Fault::of_sink))
            .await?;
        match self
            .current_digest(&ImageName::of(incoming)?)
            .await
            .map_err(Fault::of_sink)?
        {
            Some(theirs) if theirs != ours => Err(taken(
                &self.location(&ImageName::of(incoming)?),
                &theirs,
                &ours,
            )),
            _ => Ok(()),
        }
    }

    async fn holds(
        &self,
        incoming: &Incoming,
        path: &RelPath,
        file: &FileInfo,
    ) -> Result<bool, Fault> {
        let Some(digest) = Sha256::from_layout_path(path.as_str()) else {
            return Ok(false);
        };
        let layout = self.layout(&ImageName::of(incoming)?);
        let (blob, size, shared) = (path.in_dir(&layout), file.size, self.shared.clone());
        self.threads
            .run(move || Ok(file_size(&blob)? == Some(size) || shared.has(&layout, &digest, size)))
            .await
    }

    async fn commit(&self, incoming: &Incoming, staged: &Path) -> Result<Committed, Fault> {
        self.commit_staged(incoming, staged)
            .await
            .map_err(Fault::of_sink)
    }

    async fn activate(&self, _artifact: &ArtifactRef) -> Result<(), Fault> {
        Ok(()) // every version has its own name; there is no active version
    }

    async fn read_at(
        &self,
        place: &StorageLocation,
        path: &RelPath,
        offset: u64,
        len: u32,
    ) -> Result<Bytes, Fault> {
        let StorageLocation::Folder { path: folder } = place else {
            return Err(Fault::internal(
                "a blob of a registry was requested from an image directory",
            ));
        };
        let path = path.in_dir(folder);
        let read = move || {
            let what = || format!("read {}", path.display());
            let mut out = vec![0; len as usize];
            File::open(&path)
                .and_then(|file| file.read_exact_at(&mut out, offset))
                .at(what())?;
            Ok(out.into())
        };
        self.threads.run(read).await
    }

    async fn exists_at_target(&self, incoming: &Incoming) -> Result<bool, Fault> {
        let (name, info) = (ImageName::of(incoming)?, image_info(incoming)?.clone());
        let (layout, top) = (self.layout(&name), top_of(&info)?.digest);
        let exists = move || {
            let index = Index::read(&layout)?;
            let mut referrers = info.referrers.iter();
            Ok(index.digest_of(&name.tag)? == Some(top)
                && referrers.all(|referrer| index.lists(&referrer.digest)))
        };
        self.threads.run(exists).await
    }

    async fn verify(
        &self,
        incoming: &Incoming,
        _place: &StorageLocation,
        verification: &Verification,
    ) -> Result<Vec<String>, Fault> {
        let (layout, location) = (
            self.layout(&ImageName::of(incoming)?),
            self.location(&ImageName::of(incoming)?),
        );
        let ours = top_of(image_info(incoming)?)?.digest;
        let mut out = Vec::new();
        match self.current_digest(&ImageName::of(incoming)?).await? {
            None => out.push(format!("{location}: index.json does not contain it")),
            Some(theirs) if theirs != ours => {
                out.push(format!(
                    "{location}: index.json refers to {theirs}, not {ours}"
                ));
            }
            Some(_) => {}
        }
        let read = async {
            let tree = self.tree(incoming, &[&layout]).await?;
            Ok::<_, Fault>((tree, self.attached(incoming, &[&layout]).await?))
        };
        let (tree, attached) = match read.await {
            Ok(read) => read,
            Err(fault)
                if matches!(
                    fault.code,
                    Code::NotFound | Code::Integrity | Code::Conflict
                ) =>
            {
                out.push(format!("{location}: {fault}"));
                return Ok(out);
            }
            Err(fault) => return Err(fault),
        };
        let verification = verification.clone();
        if verification.quick {
            verification.note("quick check: the manifests were read and the size of each blob was compared; no blob was read");
        }
        let compare = move || {
            let index = Index::read(&layout)?;
            for one in &attached {
                if !index.lists(&one.top.digest.to_string()) {
                    out.push(format!(
                        "{location}: index.json does not contain {}",
                        one.name()
                    ));
                }
            }
            let trees = std::iter::once(&tree).chain(attached.iter().map(|one| &one.tree));
            for blob in trees.flat_map(|tree| &tree.blobs) {
                let path = layout.join(blob.digest.layout_path());
                let size = file_size(&path)?;
                let wrong = match size {
                    None if blob.is_foreign() => None,
                    None => Some(format!("{}: it is missing", path.display())),
                    Some(size) if verification.quick => (size != blob.size).then(|| {
                        format!(
                            "{}: it has {size} bytes, but {} bytes were expected",
                            path.display(),
                            blob.size
                        )
                    }),
                    Some(_) => {
                        verification.read(blob.size);
                        check_blob(&path, &blob.digest, blob.size)?
                    }
                };
                out.extend(wrong);
            }
            Ok(out)
        };
        self.threads.run(compare).await
    }

    async fn clear(&self, incoming: &Incoming) -> Result<(), Fault> {
        let name = ImageName::of(incoming)?;
        let layout = self.layout(&name);
        let lock = self.lock(&name);
        let _held = lock.lock().await;
        self.change(&name, move || remove_damaged(&layout)).await
    }

    async fn remove(
        &self,
        artifact: &ArtifactRef,
        info: Option<&KindInfo>,
    ) -> Result<Option<String>, Fault> {
        let name = ImageName::new(artifact, info)?;
        let (layout, version, root) = (self.layout(&name), name.tag.clone(), self.root.clone());
        let lock = self.lock(&name);
        let _held = lock.lock().await;
        let runtime = tokio::runtime::Handle::current();
        let remove = move || {
            if file_size(&layout.join("index.json"))?.is_none() {
                return Ok(None);
            }
            let mut index = Index::read(&layout)?;
            if !index.drop_version(&version) {
                return Ok(None);
            }
            durable::remove_all(&single_entry(&layout, &version))?;
            let mut current_digest = HashSet::new();
            let keep = |entry: &serde_json::Value, kept: &mut HashSet<Sha256>| {
                let top: Descriptor = serde_json::from_value(entry.clone()).map_err(|e| {
                    Fault::integrity(format!("an entry of {}/index.json: {e}", layout.display()))
                })?;
                let folder = &layout;
                let read = |wanted: Descriptor| async move {
                    read_small(&folder.join(wanted.digest.layout_path()))
                };
                let tree = runtime.block_on(walk(&top, read))?;
                kept.extend(tree.manifests.iter().map(|node| node.digest));
                kept.extend(tree.blobs.iter().map(|blob| blob.digest));
                Ok::<_, Fault>(())
            };
            for entry in index
                .entries()
                .filter(|entry| Index::about(entry).is_none())
            {
                keep(entry, &mut current_digest)?;
            }
            index.drop_attached(|entry, about| {
                let is_needed = about.is_none_or(|about| current_digest.contains(&about));
                if is_needed {
                    keep(entry, &mut current_digest)?;
                }
                Ok(is_needed)
            })?;
            if index.entries().next().is_none() {
                remove_layout(&layout, &root)?;
            } else {
                index.write(&layout)?; // first, so that no version refers to a missing blob
                delete_unreferenced(&layout, &current_digest)?;
            }
            Ok(None)
        };
        self.change(&name, remove).await
    }

    async fn probe(&self) -> Result<String, Fault> {
        let (root, staging_root) = (self.root.clone(), self.staging_root.clone());
        let probe = move || {
            durable::create_dir_all(&staging_root)?;
            let path = staging_root.join(format!(".probe-{:016x}", rand::random::<u64>()));
            durable::replace(&path, b"")?;
            durable::remove_all(&path)?;
            Ok(format!(
                "images are written to OCI layouts below {}",
                root.display()
            ))
        };
        self.threads.run(probe).await
    }
}

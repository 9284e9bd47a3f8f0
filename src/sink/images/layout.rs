//! Images as OCI layouts in a folder, where a site has no registry: `<root>/<name>/` is one layout, whose `index.json`
//! names each version (`org.opencontainers.image.ref.name`), so that `skopeo copy oci:<root>/<name>:<version>` reads it.
//!
//! Blobs are renamed in from the staged folder and synced first; replacing `index.json` is what makes a version appear.
//! A crash before that leaves blobs that nobody names, which the next try uses or the next removal sweeps away.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::{Value, json};
use sha2::Digest as _;

use super::{blocking, file_size, image_info, lost, not_staged, read_small, taken, top_of};
use crate::durable;
use crate::fault::{Code, Fault, IoContext};
use crate::limits;
use crate::manifest::FileInfo;
use crate::names::{ArtifactRef, RelPath};
use crate::registry::image::{Descriptor, REF_NAME, Sha256, Tree, walk};
use crate::sink::{Incoming, Landed, Look, Place, Sink, Threads};

/// Writes images to a folder of OCI layouts.
pub struct LayoutSink {
    root: PathBuf,
    staging_root: PathBuf,
    threads: Threads,
    /// One lock a name: whoever replaces its `index.json` or sweeps its blobs holds it.
    locks: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl LayoutSink {
    /// A sink that keeps its layouts below `path`, which is made if missing.
    pub fn new(path: PathBuf, staging_root: PathBuf) -> Result<Self, Fault> {
        if !path.is_absolute() {
            return Err(Fault::config(format!("the image folder {:?} is not an absolute path", path.display())));
        }
        durable::create_dir_all(&path)?;
        durable::create_dir_all(&staging_root)?;
        Ok(Self { root: path, staging_root, threads: Threads::new("sink images"), locks: Mutex::default() })
    }

    fn layout(&self, artifact: &ArtifactRef) -> PathBuf {
        self.root.join(artifact.name())
    }

    fn location(&self, artifact: &ArtifactRef) -> String {
        format!("oci:{}:{}", self.layout(artifact).display(), artifact.version())
    }

    fn lock(&self, artifact: &ArtifactRef) -> Arc<tokio::sync::Mutex<()>> {
        self.locks.lock().entry(artifact.name().into()).or_default().clone()
    }

    async fn named(&self, artifact: &ArtifactRef) -> Result<Option<Sha256>, Fault> {
        let (layout, version) = (self.layout(artifact), artifact.version().to_owned());
        blocking(move || Index::read(&layout)?.digest_of(&version)).await
    }

    /// Follows the image through the folders in this order.
    async fn tree(&self, incoming: &Incoming, folders: &[&Path]) -> Result<Tree, Fault> {
        let info = image_info(incoming)?;
        let tree = walk(&top_of(info)?, |wanted| async move {
            for folder in folders {
                if let Some(bytes) = read_small(&folder.join(wanted.digest.layout_path())).await? {
                    return Ok(Some(bytes));
                }
            }
            Ok(None)
        })
        .await?;
        match tree.absent.iter().find(|digest| !info.absent.contains(&digest.to_string())) {
            Some(digest) => Err(lost(&format!("manifest {digest}"), &self.location(&incoming.artifact))),
            None => Ok(tree),
        }
    }
}

/// The bytes of a layout's `index.json`, as JSON, so that what others wrote there stays.
struct Index(Value);

impl Index {
    fn read(layout: &Path) -> Result<Self, Fault> {
        let path = layout.join("index.json");
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Self).map_err(|e| {
                Fault::integrity(format!("{}: {e}", path.display())).with_next("put the file right by hand, or move the folder away")
            }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self(json!({ "schemaVersion": 2, "manifests": [] }))),
            Err(e) => Err(Fault::io(format_args!("read {}", path.display()), &e)),
        }
    }

    fn entries(&self) -> impl Iterator<Item = &Value> {
        self.0["manifests"].as_array().into_iter().flatten()
    }

    fn is_version(entry: &Value, version: &str) -> bool {
        entry["annotations"][REF_NAME] == version
    }

    fn digest_of(&self, version: &str) -> Result<Option<Sha256>, Fault> {
        let Some(entry) = self.entries().find(|e| Self::is_version(e, version)) else { return Ok(None) };
        let digest = entry["digest"].as_str().unwrap_or_default();
        digest.parse().map(Some).map_err(|why| Fault::integrity(format!("the entry {version} of an image folder's index.json: {why}")))
    }

    /// Takes a version out; whether it was there.
    fn drop_version(&mut self, version: &str) -> bool {
        let Some(entries) = self.0["manifests"].as_array_mut() else { return false };
        let before = entries.len();
        entries.retain(|e| !Self::is_version(e, version));
        entries.len() < before
    }

    fn add(&mut self, version: &str, top: &Descriptor) {
        self.drop_version(version);
        let entry = json!({
            "mediaType": top.media_type,
            "digest": top.digest,
            "size": top.size,
            "annotations": { REF_NAME: version },
        });
        match self.0["manifests"].as_array_mut() {
            Some(entries) => entries.push(entry),
            None => self.0["manifests"] = json!([entry]),
        }
    }

    fn write(&self, layout: &Path) -> Result<(), Fault> {
        durable::replace(&layout.join("index.json"), self.0.to_string().as_bytes())
    }
}

/// Moves one blob in, which was checked; a copy is made only across filesystems.
fn move_in(from: &Path, to: &Path) -> Result<(), Fault> {
    durable::sync_file(from)?;
    let device = |path: &Path| fs::metadata(path).map(|m| m.dev()).at(format_args!("look at {}", path.display()));
    let folder = to.parent().unwrap_or(Path::new("/"));
    if device(from)? == device(folder)? {
        return durable::rename_noreplace(from, to);
    }
    let temporary = to.with_extension("part");
    fs::copy(from, &temporary).at(format_args!("copy {} to {}", from.display(), temporary.display()))?;
    durable::sync_file(&temporary)?;
    durable::rename_noreplace(&temporary, to)
}

/// Puts every file of the image that is staged into the layout, and then its entry.
fn land(layout: &Path, staged: &Path, tree: &Tree, top: &Descriptor, version: &str) -> Result<(), Fault> {
    durable::create_dir_all(&layout.join("blobs/sha256"))?;
    let manifests = tree.manifests.iter().map(|node| (node.digest, node.bytes.len() as u64, false));
    let blobs = tree.blobs.iter().map(|blob| (blob.digest, blob.size, blob.is_foreign()));
    for (digest, size, foreign) in manifests.chain(blobs) {
        let (from, to) = (staged.join(digest.layout_path()), layout.join(digest.layout_path()));
        // What stands there was asked for by its name and size only, and may have been damaged since it came.
        if check_blob(&to, &digest, size)?.is_none() {
            continue;
        }
        // The artifact's own hash says what the file's bytes are, not that they are what the image names.
        match fs::metadata(&from) {
            Ok(_) => {
                if let Some(why) = check_blob(&from, &digest, size)? {
                    return Err(Fault::integrity(format!("image blob {digest} does not match its name: {why}"))
                        .with_next("publish the image again from its original source, under a new version"));
                }
                durable::remove_all(&to)?;
                move_in(&from, &to)?;
            }
            Err(_) if foreign => durable::remove_all(&to)?,
            Err(_) => {
                durable::remove_all(&to)?;
                return Err(lost(&format!("blob {digest}"), &layout.display().to_string()));
            }
        }
    }
    let marker = layout.join("oci-layout");
    if !marker.exists() {
        durable::replace(&marker, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    }
    let mut index = Index::read(layout)?;
    if index.digest_of(version)? != Some(top.digest) {
        index.add(version, top);
        index.write(layout)?;
    }
    Ok(())
}

/// Removes the blobs that no version names any more.
fn sweep(layout: &Path, named: &HashSet<Sha256>) -> Result<(), Fault> {
    let folder = layout.join("blobs/sha256");
    for entry in fs::read_dir(&folder).at(format_args!("list {}", folder.display()))? {
        let entry = entry.at(format_args!("list {}", folder.display()))?;
        let name = entry.file_name();
        let digest = name.to_str().and_then(|hex| Sha256::from_layout_path(&format!("blobs/sha256/{hex}")));
        if digest.is_none_or(|digest| !named.contains(&digest)) {
            durable::remove_all(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes the blobs whose content is not what their names say.
fn remove_damaged(layout: &Path) -> Result<(), Fault> {
    let folder = layout.join("blobs/sha256");
    let entries = match fs::read_dir(&folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries.at(format_args!("list {}", folder.display()))?,
    };
    for entry in entries {
        let entry = entry.at(format_args!("list {}", folder.display()))?;
        let name = entry.file_name();
        let digest = name.to_str().and_then(|hex| Sha256::from_layout_path(&format!("blobs/sha256/{hex}")));
        let size = entry.metadata().at(format_args!("look at {}", entry.path().display()))?.len();
        if let Some(digest) = digest
            && check_blob(&entry.path(), &digest, size)?.is_some()
        {
            durable::remove_all(&entry.path())?;
        }
    }
    Ok(())
}

/// Reads a blob again from its first byte to its last; what is wrong with it.
fn check_blob(path: &Path, digest: &Sha256, size: u64) -> Result<Option<String>, Fault> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Some(format!("{}: it is gone", path.display()))),
        Err(e) => return Err(Fault::io(format_args!("read {}", path.display()), &e)),
    };
    let mut hash = sha2::Sha256::new();
    let mut buffer = vec![0; limits::REGISTRY_READ_BYTES];
    let mut read = 0;
    loop {
        match file.read(&mut buffer).at(format_args!("read {}", path.display()))? {
            0 => break,
            n => {
                hash.update(&buffer[..n]);
                read += n as u64;
            }
        }
    }
    let found = Sha256(hash.finalize().into());
    Ok((found != *digest || read != size)
        .then(|| format!("{}: it has {read} bytes of {found}, {size} bytes were expected", path.display())))
}

#[async_trait]
impl Sink for LayoutSink {
    fn staging_root(&self) -> &Path {
        &self.staging_root
    }

    fn threads(&self) -> &Threads {
        &self.threads
    }

    async fn check(&self, incoming: &Incoming) -> Result<(), Fault> {
        let ours = top_of(image_info(incoming)?)?.digest;
        match self.named(&incoming.artifact).await? {
            Some(theirs) if theirs != ours => Err(taken(&self.location(&incoming.artifact), &theirs, &ours)),
            _ => Ok(()),
        }
    }

    async fn holds(&self, incoming: &Incoming, path: &RelPath, file: &FileInfo) -> Result<bool, Fault> {
        if Sha256::from_layout_path(path.as_str()).is_none() {
            return Ok(false);
        }
        Ok(file_size(&path.in_dir(&self.layout(&incoming.artifact))).await? == Some(file.size))
    }

    async fn commit(&self, incoming: &Incoming, staged: &Path) -> Result<Landed, Fault> {
        let layout = self.layout(&incoming.artifact);
        let top = top_of(image_info(incoming)?)?;
        let lock = self.lock(&incoming.artifact);
        let _held = lock.lock().await;
        match self.named(&incoming.artifact).await? {
            Some(theirs) if theirs != top.digest => return Err(taken(&self.location(&incoming.artifact), &theirs, &top.digest)),
            // Committed before a crash, and cleaned up.
            Some(_) if !tokio::fs::try_exists(staged).await.unwrap_or(true) => {}
            _ => {
                let tree =
                    self.tree(incoming, &[staged, &layout]).await.map_err(|fault| not_staged(fault, &self.location(&incoming.artifact)))?;
                let (layout, staged, top, version) =
                    (layout.clone(), staged.to_owned(), top.clone(), incoming.artifact.version().to_owned());
                blocking(move || {
                    land(&layout, &staged, &tree, &top, &version)?;
                    durable::remove_all(&staged)
                })
                .await?;
            }
        }
        let location = format!("{}@{}", self.location(&incoming.artifact), top.digest);
        Ok(Landed { place: Place::Folder { path: layout }, location, note: None })
    }

    async fn activate(&self, _artifact: &ArtifactRef) -> Result<(), Fault> {
        Ok(()) // every version has its name; none is more current than another
    }

    async fn read_at(&self, place: &Place, path: &RelPath, offset: u64, len: u32) -> Result<Bytes, Fault> {
        let Place::Folder { path: folder } = place else { return Err(Fault::internal("an image folder was asked for a registry's blob")) };
        let path = path.in_dir(folder);
        blocking(move || {
            let what = || format!("read {}", path.display());
            let mut out = vec![0; len as usize];
            File::open(&path).and_then(|file| file.read_exact_at(&mut out, offset)).at(what())?;
            Ok(out.into())
        })
        .await
    }

    async fn stands(&self, incoming: &Incoming) -> Result<bool, Fault> {
        Ok(self.named(&incoming.artifact).await? == Some(top_of(image_info(incoming)?)?.digest))
    }

    async fn verify(&self, incoming: &Incoming, _place: &Place, look: &Look) -> Result<Vec<String>, Fault> {
        let (layout, location) = (self.layout(&incoming.artifact), self.location(&incoming.artifact));
        let ours = top_of(image_info(incoming)?)?.digest;
        let mut out = Vec::new();
        match self.named(&incoming.artifact).await? {
            None => out.push(format!("{location}: index.json does not name it")),
            Some(theirs) if theirs != ours => out.push(format!("{location}: index.json names {theirs}, not {ours}")),
            Some(_) => {}
        }
        let tree = match self.tree(incoming, &[&layout]).await {
            Ok(tree) => tree,
            Err(fault) if matches!(fault.code, Code::NotFound | Code::Integrity | Code::Conflict) => {
                out.push(format!("{location}: {fault}"));
                return Ok(out);
            }
            Err(fault) => return Err(fault),
        };
        let look = look.clone();
        if look.quick {
            look.note("quick check: the manifests were read, and the size of each blob was compared; no blob was read");
        }
        blocking(move || {
            for blob in &tree.blobs {
                let path = layout.join(blob.digest.layout_path());
                let wrong = if look.quick {
                    let size = fs::metadata(&path).map(|meta| meta.len());
                    (size.as_ref().ok() != Some(&blob.size)).then(|| match size {
                        Ok(size) => format!("{}: it has {size} bytes, {} bytes were expected", path.display(), blob.size),
                        Err(_) => format!("{}: it is gone", path.display()),
                    })
                } else {
                    look.read(blob.size);
                    check_blob(&path, &blob.digest, blob.size)?
                };
                out.extend(wrong.filter(|_| !blob.is_foreign() || path.exists()));
            }
            Ok(out)
        })
        .await
    }

    async fn clear(&self, incoming: &Incoming) -> Result<(), Fault> {
        let layout = self.layout(&incoming.artifact);
        let lock = self.lock(&incoming.artifact);
        let _held = lock.lock().await;
        blocking(move || remove_damaged(&layout)).await
    }

    async fn remove(&self, artifact: &ArtifactRef) -> Result<Option<String>, Fault> {
        let (layout, version) = (self.layout(artifact), artifact.version().to_owned());
        let lock = self.lock(artifact);
        let _held = lock.lock().await;
        if file_size(&layout.join("index.json")).await?.is_none() {
            return Ok(None);
        }
        let (mut index, layout) = blocking(move || Ok((Index::read(&layout)?, layout))).await?;
        if !index.drop_version(&version) {
            return Ok(None);
        }
        let mut named = HashSet::new();
        for entry in index.entries() {
            let top: Descriptor = serde_json::from_value(entry.clone())
                .map_err(|e| Fault::integrity(format!("an entry of {}/index.json: {e}", layout.display())))?;
            let folder = &layout;
            let tree = walk(&top, |wanted| async move { read_small(&folder.join(wanted.digest.layout_path())).await }).await?;
            named.extend(tree.manifests.iter().map(|node| node.digest));
            named.extend(tree.blobs.iter().map(|blob| blob.digest));
        }
        blocking(move || {
            if index.entries().next().is_none() {
                return durable::remove_all(&layout);
            }
            index.write(&layout)?; // first, so that no version ever names a blob that is gone
            sweep(&layout, &named)
        })
        .await
        .map(|()| None)
    }

    async fn probe(&self) -> Result<String, Fault> {
        let path = self.staging_root.join(".probe");
        let root = self.root.clone();
        blocking(move || {
            durable::replace(&path, b"")?;
            durable::remove_all(&path)?;
            Ok(format!("images go to OCI layouts below {}", root.display()))
        })
        .await
    }
}

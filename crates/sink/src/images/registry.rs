//! Images in an OCI registry: `<url>/<name>:<version>`, or the repository and tag that the artifact
//! states.
//!
//! Blobs are uploaded in parallel, large ones while they arrive; existing blobs are not sent. Then
//! the lower manifests are pushed by digest, and last the top manifest under the tag, which makes
//! the image visible. What is carried with the image follows it. A crash before that leaves unreferenced blobs: the next attempt uses them, or
//! the registry's garbage collection removes them.

mod push;
mod referrers;
mod tag;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{ImageName, image_info, lost, read_small, top_of};
use crate::settings;
use crate::{Committed, Incoming, Sink, StorageLocation, Threads, Verification};
use base::durable;
use base::fault::{Code, Fault, IoContext, Reason};
use base::limits;
use base::names::{ArtifactRef, RelPath};
use content::manifest::{FileInfo, KindInfo};
use registry::image::{Descriptor, Sha256, Tree, walk};
use registry::reference::check_repository;
use registry::{Access, Credentials, Deleted, Error, LocalBlob, Origin, Registry, Settings};
use tag::Tag;

/// Writes images to a registry.
pub struct RegistrySink {
    registry: Registry,
    /// The prefix of image names: a Harbor project, with optional subdirectories; may be empty.
    prefix: String,
    create_project: bool,
    staging_root: PathBuf,
    threads: Threads,
    /// A repository for each known blob, from which another repository can mount it. Only a hint:
    /// lost at a restart.
    seen: Mutex<HashMap<Sha256, String>>,
    /// Blobs that were found damaged, by repository. They are sent again although the registry has
    /// them. Only a hint.
    damaged: Mutex<HashSet<(String, Sha256)>>,
    /// Blobs that this process sent, by repository.
    sent: Mutex<HashSet<(String, Sha256)>>,
}

const BLOCKED: &str = "the registry has the image, but a policy of its project blocks it until it is scanned or signed";

impl RegistrySink {
    /// Creates a sink for the configured registry. Sends no request.
    pub fn new(cfg: &settings::ImagesSink, staging_root: PathBuf) -> Result<Self, Fault> {
        let url = cfg.url.trim_end_matches('/');
        if !url.starts_with("https://") && !url.starts_with("http://") {
            return Err(Fault::config(format!(
                "sink.images.url {url:?}: it must begin with https://, http:// or oci-layout:"
            )));
        }
        let (origin, prefix) = Origin::split(url)?;
        if !prefix.is_empty() {
            check_repository(prefix)
                .map_err(|why| Fault::config(format!("sink.images.url: {prefix:?}: {why}")))?;
        }
        let credentials =
            Credentials::from_config(cfg.username.as_deref(), cfg.password_file.as_ref())?
                .map(|credentials| credentials.with_realm_hosts(&cfg.realm_hosts));
        let access = Access {
            credentials,
            ca_file: cfg.ca_file.clone(),
            insecure: cfg.insecure,
            settings: Settings::Sink,
        };
        let registry = Registry::open(origin, access)?;
        durable::create_dir_all(&staging_root)?;
        Ok(Self {
            registry,
            prefix: prefix.into(),
            create_project: cfg.create_project,
            staging_root,
            threads: Threads::new("sink images", limits::SINK_THREADS_MAX),
            seen: Mutex::default(),
            damaged: Mutex::default(),
            sent: Mutex::default(),
        })
    }

    fn repository(&self, name: &ImageName) -> String {
        if self.prefix.is_empty() {
            name.repository.clone()
        } else {
            format!("{}/{}", self.prefix, name.repository)
        }
    }

    fn project(&self) -> Option<&str> {
        self.prefix.split('/').next().filter(|p| !p.is_empty())
    }

    fn location(&self, name: &ImageName) -> String {
        format!(
            "{}/{}:{}",
            self.registry.origin(),
            self.repository(name),
            name.tag
        )
    }

    /// Explains a denial in more detail for the user.
    async fn explain_denied(&self, fault: Fault, repository: &str) -> Fault {
        if fault.reason == Reason::SinkDenied && fault.code == Code::NotAllowed {
            return self
                .registry
                .explain_denied(self.project(), repository, fault)
                .await;
        }
        fault
    }

    /// Runs `work`, and reports meanwhile if the registry does not respond.
    async fn report_silence<T>(&self, incoming: &Incoming, work: impl Future<Output = T>) -> T {
        tokio::pin!(work);
        let mut look = tokio::time::interval(Duration::from_millis(500));
        loop {
            tokio::select! {
                done = &mut work => {
                    incoming.waits.clear();
                    return done;
                }
                _ = look.tick() => match self.registry.silent_for() {
                    Some(silent) if silent >= limits::REGISTRY_SILENCE_REPORT_AFTER => incoming.waits.report(
                        Fault::unreachable(format!("the registry at {} does not respond", self.registry.origin().base()))
                            .with_next("check the load and the log of the registry; the delivery resumes automatically when the registry responds"),
                    ),
                    _ => incoming.waits.clear(),
                },
            }
        }
    }

    /// The bytes of a manifest, from the staging directory or from the registry.
    async fn manifest(
        &self,
        repository: &str,
        staged: Option<&Path>,
        digest: &Sha256,
    ) -> Result<Option<Bytes>, Fault> {
        if let Some(staged) = staged
            && let Some(bytes) = self.staged_small(staged.join(digest.layout_path())).await?
        {
            return Ok(Some(bytes));
        }
        let got = self
            .registry
            .get_manifest(repository, &digest.to_string(), "pull,push")
            .await;
        Ok(got
            .map_err(|e| e.fault(format_args!("read manifest {digest} of {repository}")))?
            .map(|m| m.bytes))
    }

    async fn staged_small(&self, file: PathBuf) -> Result<Option<Bytes>, Fault> {
        self.threads.run(move || read_small(&file)).await
    }

    /// Whether this file is staged. A failing disk is an error, not a missing file.
    async fn is_staged(&self, path: &Path) -> Result<bool, Fault> {
        let path = path.to_owned();
        self.threads
            .run(move || path.try_exists().at(path.display()))
            .await
    }

    async fn tree(
        &self,
        repository: &str,
        staged: Option<&Path>,
        incoming: &Incoming,
    ) -> Result<Tree, Fault> {
        let info = image_info(incoming)?;
        let tree = walk(&top_of(info)?, |wanted| async move {
            self.manifest(repository, staged, &wanted.digest).await
        })
        .await?;
        match tree
            .absent
            .iter()
            .find(|digest| !info.absent.contains(&digest.to_string()))
        {
            Some(digest) if staged.is_some() => Err(lost(
                &format!("manifest {digest}"),
                &self.location(&ImageName::of(incoming)?),
            )),
            _ => Ok(tree),
        }
    }

    /// Whether another tag of the repository refers to the same manifest, which a deletion would
    /// remove too.
    async fn is_shared(&self, repository: &str, tag: &str, digest: &Sha256) -> Result<bool, Error> {
        for other in self.registry.tags(repository).await? {
            if other != tag
                && self.registry.head_manifest(repository, &other).await? == Some(*digest)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Removes an artifact. Returns the reason if this registry does not support it.
    async fn delete(
        &self,
        image: &ImageName,
        repository: &str,
        info: Option<&KindInfo>,
    ) -> Result<Option<String>, Error> {
        let reason = self.delete_image(image, repository).await?;
        // The image may be gone since an earlier attempt, and what is carried with it is not.
        let of_referrers = match info {
            Some(KindInfo::Image(info)) if reason.is_none() => {
                self.delete_attached(repository, &image.tag, info).await?
            }
            _ => None,
        };
        Ok(reason.or(of_referrers))
    }

    async fn delete_image(
        &self,
        image: &ImageName,
        repository: &str,
    ) -> Result<Option<String>, Error> {
        let Some(digest) = self.registry.head_manifest(repository, &image.tag).await? else {
            return Ok(None);
        };
        if self.is_shared(repository, &image.tag, &digest).await? {
            let name = repository.split_once('/').map_or("", |(_, name)| name);
            let deleted = match self.project() {
                Some(project) => self.registry.delete_tag(project, name, &image.tag).await?,
                None => false,
            };
            return Ok((!deleted).then(|| "another tag refers to the same image, and this registry cannot delete a single tag".into()));
        }
        let deleted = self.registry.delete_manifest(repository, &digest).await?;
        Ok(
            (deleted == Deleted::Unsupported)
                .then(|| "the registry does not allow deletion".into()),
        )
    }

    /// What is wrong with a blob in the registry.
    async fn blob_fault(
        &self,
        repository: &str,
        blob: &Descriptor,
        verification: &Verification,
    ) -> Result<Option<String>, Fault> {
        let doing = || {
            format!(
                "read blob {} of {}/{repository}",
                blob.digest,
                self.registry.origin()
            )
        };
        match self
            .registry
            .blob_size(repository, &blob.digest)
            .await
            .map_err(|e| e.fault(doing()))?
        {
            Some(size) if size != blob.size => return Ok(Some(wrong_size(blob, size).message)),
            Some(_) if verification.quick => return Ok(None),
            Some(_) => {}
            None if blob.is_foreign() => return Ok(None),
            None => return Ok(Some(format!("blob {} is missing", blob.digest))),
        }
        let why = self
            .registry
            .check_blob(repository, blob, &|bytes| verification.read(bytes))
            .await
            .map_err(|e| e.fault(doing()))?;
        let key = (repository.to_owned(), blob.digest);
        let mut damaged = self.damaged.lock();
        if why.is_none() {
            damaged.remove(&key);
        } else if damaged.len() < limits::REGISTRY_MOUNTS_KEPT_MAX {
            damaged.insert(key);
        }
        Ok(why.map(|why| format!("blob {}: {why}", blob.digest)))
    }

    fn repository_of(place: &StorageLocation) -> Result<&str, Fault> {
        match place {
            StorageLocation::Registry { repository } => Ok(repository),
            StorageLocation::Folder { path } => Err(Fault::internal(format!(
                "{} is a directory, not a repository",
                path.display()
            ))),
        }
    }
}

fn wrong_size(blob: &Descriptor, size: u64) -> Fault {
    Fault::integrity(format!(
        "blob {}: the registry has {size} bytes, but the manifest states {}",
        blob.digest, blob.size
    ))
}

#[async_trait]
impl Sink for RegistrySink {
    fn staging_root(&self) -> &Path {
        &self.staging_root
    }

    fn threads(&self) -> &Threads {
        &self.threads
    }

    async fn check(&self, incoming: &Incoming) -> Result<(), Fault> {
        let repository = self.repository(&ImageName::of(incoming)?);
        check_repository(&repository).map_err(|why| {
            Fault::conflict(format!(
                "{}: registries do not accept the repository name {repository:?}: {why}",
                incoming.artifact
            ))
            .with_next("publish it under another name")
        })?;
        let ours = top_of(image_info(incoming)?)?.digest;
        if self.create_project
            && let Some(project) = self.project()
        {
            self.registry.ensure_project(project).await?;
        }
        let found = match self.tag(&ImageName::of(incoming)?, &ours).await {
            Ok(found) => found,
            Err(fault) => return Err(self.explain_denied(fault, &repository).await),
        };
        if let Some(fault) = found.conflict(&self.location(&ImageName::of(incoming)?), &ours) {
            return Err(fault);
        }
        match found.digest() {
            Some(_) => Ok(()),
            None => match self.registry.try_upload(&repository).await {
                Ok(()) => Ok(()),
                Err(error) => {
                    let fault = error.fault(format!(
                        "check the permission to push {}",
                        self.location(&ImageName::of(incoming)?)
                    ));
                    Err(self.explain_denied(fault, &repository).await)
                }
            },
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
        let repository = self.repository(&ImageName::of(incoming)?);
        let doing = || {
            format!(
                "look up blob {digest} at {}/{repository}",
                self.registry.origin()
            )
        };
        if self.is_damaged(&repository, &digest) {
            return Ok(false);
        }
        let size = self
            .report_silence(incoming, self.registry.blob_size(&repository, &digest))
            .await;
        if let Some(size) = size.map_err(|e| e.fault(doing()))? {
            self.remember_repository(digest, &repository);
            return Ok(size == file.size);
        }
        let Some(from) = self
            .seen
            .lock()
            .get(&digest)
            .cloned()
            .filter(|from| *from != repository)
        else {
            return Ok(false);
        };
        // A mount saves an upload. If it fails, the blob is uploaded.
        Ok(self
            .registry
            .mount(&repository, &digest, &from)
            .await
            .unwrap_or(false))
    }

    async fn arriving(
        &self,
        incoming: &Incoming,
        staged: &Path,
        path: &RelPath,
        file: &FileInfo,
        grown: watch::Receiver<u64>,
    ) {
        let Some(digest) = Sha256::from_layout_path(path.as_str()) else {
            return;
        };
        let Ok(name) = ImageName::of(incoming) else {
            return; // the check of the delivery refuses it
        };
        let repository = self.repository(&name);
        if self.is_damaged(&repository, &digest) {
            return; // the commit replaces it
        }
        let blob = LocalBlob {
            digest,
            size: file.size,
            file: path.in_dir(staged),
        };
        match self.registry.push_growing(&repository, &blob, grown).await {
            Ok(sent) => {
                self.remember_repository(digest, &repository);
                if sent {
                    self.note_sent((repository, digest));
                }
            }
            Err(fault) => {
                tracing::debug!(%digest, repository, error = %fault, "a blob could not be sent while it arrived");
            }
        }
    }

    async fn commit(&self, incoming: &Incoming, staged: &Path) -> Result<Committed, Fault> {
        self.report_silence(incoming, self.commit_now(incoming, staged))
            .await
    }

    async fn activate(&self, _artifact: &ArtifactRef) -> Result<(), Fault> {
        Ok(()) // every version has its own tag; there is no active version
    }

    async fn read_at(
        &self,
        place: &StorageLocation,
        path: &RelPath,
        offset: u64,
        len: u32,
    ) -> Result<Bytes, Fault> {
        let repository = Self::repository_of(place)?;
        let doing = || format!("read {path} of {}/{repository}", self.registry.origin());
        let Some(digest) = Sha256::from_layout_path(path.as_str()) else {
            return Err(Fault::not_found(format!(
                "{}: a registry has only blobs",
                doing()
            )));
        };
        let error = match self
            .registry
            .blob_range(repository, &digest, offset, len)
            .await
        {
            Ok(bytes) => return Ok(bytes),
            Err(error) if error.status() == Some(404) => error,
            Err(error) => return Err(error.fault(doing())),
        };
        // Most registries store manifests separately from blobs.
        let got = self
            .registry
            .get_manifest(repository, &digest.to_string(), "pull")
            .await;
        let Some(manifest) = got.map_err(|e| e.fault(doing()))? else {
            // The registry answers, and has the content neither as a blob nor as a manifest: a
            // retry does not help.
            return Err(match error {
                Error::Answer(answer) if answer.is_blob_unknown() => {
                    Fault::not_found(format!("{}: the registry no longer has it", doing()))
                }
                error => error.fault(doing()),
            });
        };
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(len as usize);
        if end > manifest.bytes.len() {
            return Err(Fault::integrity(format!(
                "{}: it ends before byte {end}",
                doing()
            )));
        }
        Ok(manifest.bytes.slice(start..end))
    }

    async fn exists_at_target(&self, incoming: &Incoming) -> Result<bool, Fault> {
        let ours = top_of(image_info(incoming)?)?.digest;
        let tag = self.tag(&ImageName::of(incoming)?, &ours).await?;
        // A blocked image is not lost.
        if tag == Tag::Absent || tag.conflict("", &ours).is_some() {
            return Ok(false);
        }
        let repository = self.repository(&ImageName::of(incoming)?);
        self.has_attached(&repository, image_info(incoming)?).await
    }

    async fn verify(
        &self,
        incoming: &Incoming,
        place: &StorageLocation,
        verification: &Verification,
    ) -> Result<Vec<String>, Fault> {
        let location = self.location(&ImageName::of(incoming)?);
        let StorageLocation::Registry { repository } = place else {
            return Ok(vec![format!(
                "{location}: it was written to a directory before this site had a registry"
            )]);
        };
        let ours = top_of(image_info(incoming)?)?.digest;
        let mut out = Vec::new();
        match self.tag(&ImageName::of(incoming)?, &ours).await? {
            Tag::Absent => out.push(format!("{location}: the tag is missing")),
            Tag::BlockedOther => {
                out.push(format!("{location}: the tag refers to a different image"));
            }
            Tag::Is(theirs) | Tag::Blocked(Some(theirs)) if theirs != ours => {
                out.push(format!(
                    "{location}: the tag refers to {theirs}, not {ours}"
                ));
            }
            Tag::Blocked(_) => {
                verification.cannot_read(format!("{location}: {BLOCKED}; no blob could be read"));
                return Ok(out);
            }
            Tag::Is(_) => {}
        }
        let tree = match self.tree(repository, None, incoming).await {
            Ok(tree) => tree,
            // An answer of the registry about the image is a finding; a missing answer is not.
            Err(fault) if matches!(fault.code, Code::NotFound | Code::Integrity) => {
                out.push(format!("{location}: {fault}"));
                return Ok(out);
            }
            Err(fault) => return Err(fault),
        };
        let allowed = &image_info(incoming)?.absent;
        let missing = tree
            .absent
            .iter()
            .filter(|digest| !allowed.contains(&digest.to_string()));
        out.extend(missing.map(|digest| format!("{location}: manifest {digest} is missing")));
        if verification.quick {
            verification.note("quick check: the manifests and the size of each blob were requested from the registry; no blob was read");
        }
        let found: Vec<Option<String>> = futures::stream::iter(tree.blobs)
            .map(|blob| async move { self.blob_fault(repository, &blob, verification).await })
            .buffered(limits::REGISTRY_BLOBS_IN_FLIGHT_MAX)
            .try_collect()
            .await?;
        out.extend(
            found
                .into_iter()
                .flatten()
                .map(|why| format!("{location}: {why}")),
        );
        let mut of_referrers = Vec::new();
        self.verify_attached(repository, incoming, verification, &mut of_referrers)
            .await?;
        out.extend(
            of_referrers
                .into_iter()
                .map(|why| format!("{location}: {why}")),
        );
        Ok(out)
    }

    async fn remove(
        &self,
        artifact: &ArtifactRef,
        info: Option<&KindInfo>,
    ) -> Result<Option<String>, Fault> {
        let name = ImageName::new(artifact, info)?;
        let (repository, location) = (self.repository(&name), self.location(&name));
        let reason = self
            .delete(&name, &repository, info)
            .await
            .map_err(|e| e.fault(format_args!("remove {location}")))?;
        Ok(reason.map(|why| format!("{location}: {why}")))
    }

    async fn probe(&self) -> Result<String, Fault> {
        let origin = self.registry.origin();
        self.registry
            .ping()
            .await
            .map_err(|e| e.fault(format_args!("query the registry at {origin}")))?;
        let what = if self.registry.is_harbor() {
            "Harbor"
        } else {
            "registry"
        };
        Ok(format!(
            "{what} at {} responds and accepts the credentials",
            origin.base()
        ))
    }
}

//! Images into an OCI registry: `<url>/<name>:<version>`.
//!
//! Blobs go up in parallel, large ones while they come; those that are there are not sent; then the
//! manifests below the top by digest, then the top one under the tag, which is what makes the image
//! appear. A crash before that leaves blobs that nobody names: the next try finds and uses them, or
//! the registry's garbage collection takes them.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{image_info, lost, not_staged, read_small, taken, top_of};
use crate::settings;
use crate::{Incoming, Landed, Look, Sink, StorageLocation, Threads};
use base::durable;
use base::fault::{Code, Fault, IoContext, Reason};
use base::limits;
use base::names::{ArtifactRef, RelPath};
use content::manifest::FileInfo;
use registry::image::{Descriptor, Sha256, Tree, walk};
use registry::reference::check_repository;
use registry::{Credentials, Deleted, Error, LocalBlob, Origin, Registry};

/// Writes images to a registry.
pub struct RegistrySink {
    registry: Registry,
    /// What stands before an image's name: a Harbor project, perhaps with folders; may be empty.
    prefix: String,
    create_project: bool,
    staging_root: PathBuf,
    threads: Threads,
    /// Where blobs are known to lie, so that another repository can mount them. A hint: forgotten
    /// at a restart.
    seen: Mutex<HashMap<Sha256, String>>,
    /// Blobs that were read and are damaged, by repository. They are sent again although the
    /// registry has them. A hint as well.
    damaged: Mutex<HashSet<(String, Sha256)>>,
    /// Blobs that this process sent, by repository.
    sent: Mutex<HashSet<(String, Sha256)>>,
}

/// What a tag names.
#[derive(Debug, PartialEq, Eq)]
enum Tag {
    Absent,
    Is(Sha256),
    /// An image is there, and a policy of the registry does not give it out. Which one, if the
    /// registry says so another way; else it may be ours.
    Held(Option<Sha256>),
    /// The same, and it is not ours: the registry does not have ours at all.
    HeldOther,
}

impl Tag {
    /// Which image it names, as far as that is known.
    fn digest(&self) -> Option<Sha256> {
        match self {
            Tag::Is(digest) => Some(*digest),
            Tag::Held(digest) => *digest,
            Tag::Absent | Tag::HeldOther => None,
        }
    }

    /// The fault of a tag that names another image for certain.
    fn conflict(&self, location: &str, ours: &Sha256) -> Option<Fault> {
        match (self, self.digest()) {
            (Tag::HeldOther, _) => Some(
                Fault::conflict(format!(
                    "{location} is there already with another image, which a policy of the registry does not give out"
                ))
                .with_next("publish under another version, then deliver that"),
            ),
            (_, Some(theirs)) if theirs != *ours => Some(taken(location, &theirs, ours)),
            _ => None,
        }
    }
}

const HELD_BACK: &str = "the registry holds the image, and a policy of its project does not give it out yet: it waits for a scan or a signature";

impl RegistrySink {
    /// A sink for the registry that the configuration names. Asks it nothing yet.
    pub fn new(cfg: &settings::ImagesSink, staging_root: PathBuf) -> Result<Self, Fault> {
        let url = cfg.url.trim_end_matches('/');
        if !url.starts_with("https://") && !url.starts_with("http://") {
            return Err(Fault::config(format!(
                "sink.images.url {url:?}: it begins with none of https://, http://, oci-layout:"
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
        let registry = Registry::new(origin, credentials, cfg.ca_file.as_deref())?;
        durable::create_dir_all(&staging_root)?;
        Ok(Self {
            registry,
            prefix: prefix.into(),
            create_project: cfg.create_project,
            staging_root,
            threads: Threads::new("sink images"),
            seen: Mutex::default(),
            damaged: Mutex::default(),
            sent: Mutex::default(),
        })
    }

    fn repository(&self, artifact: &ArtifactRef) -> String {
        if self.prefix.is_empty() {
            artifact.name().into()
        } else {
            format!("{}/{}", self.prefix, artifact.name())
        }
    }

    fn project(&self) -> Option<&str> {
        self.prefix.split('/').next().filter(|p| !p.is_empty())
    }

    fn location(&self, artifact: &ArtifactRef) -> String {
        format!(
            "{}/{}:{}",
            self.registry.origin(),
            self.repository(artifact),
            artifact.version()
        )
    }

    /// An error as a person is told it, with a closer look at what a refusal means.
    async fn told(&self, fault: Fault, repository: &str) -> Fault {
        if fault.reason == Reason::SinkDenied && fault.code == Code::NotAllowed {
            return self
                .registry
                .explain_denied(self.project(), repository, fault)
                .await;
        }
        fault
    }

    async fn tag(&self, artifact: &ArtifactRef, ours: &Sha256) -> Result<Tag, Fault> {
        let repository = self.repository(artifact);
        match self
            .registry
            .head_manifest(&repository, artifact.version())
            .await
        {
            Ok(None) => Ok(Tag::Absent),
            Ok(Some(digest)) => Ok(Tag::Is(digest)),
            Err(Error::Answer(answer)) if answer.is_policy() => {
                let (project, name) = repository.split_once('/').unwrap_or(("", &repository));
                if let Some(digest) = self
                    .registry
                    .artifact_digest(project, name, artifact.version())
                    .await
                {
                    return Ok(Tag::Held(Some(digest)));
                }
                // By its digest ours is held back too, if it is there.
                let has_ours = self
                    .registry
                    .head_manifest(&repository, &ours.to_string())
                    .await;
                Ok(if matches!(has_ours, Ok(None)) {
                    Tag::HeldOther
                } else {
                    Tag::Held(None)
                })
            }
            Err(error) => Err(error.fault(format_args!("look for {}", self.location(artifact)))),
        }
    }

    /// Does `work`; reports meanwhile that the registry does not answer.
    async fn reporting<T>(&self, incoming: &Incoming, work: impl Future<Output = T>) -> T {
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
                        Fault::unreachable(format!("the registry at {} does not answer", self.registry.origin().base()))
                            .with_next("look at the registry's load and its log; the delivery continues on its own when it answers"),
                    ),
                    _ => incoming.waits.clear(),
                },
            }
        }
    }

    fn note_sent(&self, key: (String, Sha256)) {
        let mut sent = self.sent.lock();
        if sent.len() >= limits::REGISTRY_MOUNTS_KEPT_MAX {
            sent.clear();
        }
        sent.insert(key);
    }

    fn is_damaged(&self, repository: &str, digest: &Sha256) -> bool {
        self.damaged
            .lock()
            .contains(&(repository.to_owned(), *digest))
    }

    /// A manifest's bytes from the staged folder, or from the registry where it was held already.
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

    /// Whether this is staged. A disk that fails does not say that it is not.
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
                &self.location(&incoming.artifact),
            )),
            _ => Ok(tree),
        }
    }

    async fn push_blobs(&self, repository: &str, tree: &Tree, staged: &Path) -> Result<(), Fault> {
        futures::stream::iter(tree.blobs.iter().map(Ok))
            .try_for_each_concurrent(limits::REGISTRY_BLOBS_IN_FLIGHT_MAX, |blob| {
                self.push_blob(repository, blob, staged)
            })
            .await
    }

    async fn push_blob(
        &self,
        repository: &str,
        blob: &Descriptor,
        staged: &Path,
    ) -> Result<(), Fault> {
        let file = staged.join(blob.digest.layout_path());
        if self.is_staged(&file).await? {
            let local = LocalBlob {
                digest: blob.digest,
                size: blob.size,
                file,
            };
            let key = (repository.to_owned(), blob.digest);
            if self.is_damaged(repository, &blob.digest) {
                self.replace_blob(repository, blob, &local).await?;
            } else if self.registry.push_blob(repository, &local).await? {
                self.note_sent(key);
            } else if !self.sent.lock().contains(&key) {
                // It was staged because the registry lacked it, or had it damaged; and it is there,
                // and this process did not send it.
                let doing = || {
                    format!(
                        "read blob {} of {}/{repository}",
                        blob.digest,
                        self.registry.origin()
                    )
                };
                if self
                    .registry
                    .check_blob(repository, blob, &|_| {})
                    .await
                    .map_err(|e| e.fault(doing()))?
                    .is_some()
                {
                    self.replace_blob(repository, blob, &local).await?;
                }
            }
        } else {
            let held = self.registry.blob_size(repository, &blob.digest).await;
            match held.map_err(|e| e.fault(format_args!("look for blob {}", blob.digest)))? {
                Some(size) if size == blob.size => {}
                Some(size) => return Err(wrong_size(blob, size)),
                None if blob.is_foreign() => return Ok(()), // such layers are in no registry by design
                None => {
                    return Err(lost(
                        &format!("blob {}", blob.digest),
                        &format!("{}/{repository}", self.registry.origin()),
                    ));
                }
            }
        }
        self.remember(blob.digest, repository);
        Ok(())
    }

    /// Sends a blob again that the registry has and that is damaged, and reads it again: some keep
    /// what they have.
    async fn replace_blob(
        &self,
        repository: &str,
        blob: &Descriptor,
        local: &LocalBlob,
    ) -> Result<(), Fault> {
        let doing = || {
            format!(
                "replace the damaged blob {} of {}/{repository}",
                blob.digest,
                self.registry.origin()
            )
        };
        let deleted = self.registry.delete_blob(repository, &blob.digest).await;
        tracing::info!(blob = %blob.digest, repository, deleted = ?deleted.ok(), "a damaged blob is sent again");
        self.registry.push_again(repository, local).await?;
        match self.registry.check_blob(repository, blob, &|_| {}).await.map_err(|e| e.fault(doing()))? {
            None => {
                self.damaged.lock().remove(&(repository.to_owned(), blob.digest));
                Ok(())
            }
            Some(why) => Err(Fault::integrity(format!("{}: it was sent again, and the registry keeps what it had: {why}", doing())).with_next(
                "delete every image that uses this blob at the registry, run its garbage collection so that the blob is gone from its storage, then 'packhorse retry'",
            )),
        }
    }

    fn remember(&self, digest: Sha256, repository: &str) {
        let mut seen = self.seen.lock();
        if seen.len() >= limits::REGISTRY_MOUNTS_KEPT_MAX {
            seen.clear();
        }
        seen.insert(digest, repository.to_owned());
    }

    /// Puts the manifests, the top one last and under the tag.
    async fn push_manifests(&self, repository: &str, tree: &Tree, tag: &str) -> Result<(), Error> {
        let last = tree.manifests.len().saturating_sub(1);
        for (at, node) in tree.manifests.iter().enumerate() {
            let digest = node.digest.to_string();
            let reference = if at == last { tag } else { digest.as_str() };
            self.registry
                .put_manifest(
                    repository,
                    reference,
                    &node.media_type,
                    &node.bytes,
                    &node.digest,
                )
                .await?;
        }
        Ok(())
    }

    async fn push(
        &self,
        repository: &str,
        incoming: &Incoming,
        staged: &Path,
    ) -> Result<(), Fault> {
        let location = self.location(&incoming.artifact);
        let ours = top_of(image_info(incoming)?)?.digest;
        let tree = self
            .tree(repository, Some(staged), incoming)
            .await
            .map_err(|fault| not_staged(fault, &location))?;
        let mut again = false;
        loop {
            self.push_blobs(repository, &tree, staged).await?;
            let error = match self
                .push_manifests(repository, &tree, incoming.artifact.version())
                .await
            {
                Ok(()) => break,
                Err(error) => error,
            };
            let blob_unknown = matches!(&error, Error::Answer(answer) if answer.is_blob_unknown());
            if blob_unknown && !again {
                again = true; // a blob went between the look and now
                continue;
            }
            // An immutable tag, or somebody else's push at the same moment: fine if it is the same
            // image.
            if matches!(error.status(), Some(409 | 412)) || error.is_passing() {
                match self.tag(&incoming.artifact, &ours).await {
                    Ok(tag) if tag.digest() == Some(ours) => break,
                    Ok(tag) if error.status() == Some(412) => {
                        match tag.conflict(&location, &ours) {
                            Some(fault) => return Err(fault),
                            None if tag == Tag::Held(None) => {
                                return Err(unknown(&location, error));
                            }
                            None => {}
                        }
                    }
                    _ => {}
                }
            }
            return Err(error.fault(format_args!("push {location}")));
        }
        let tag = self.tag(&incoming.artifact, &ours).await?;
        if let Some(theirs) = tag.digest().filter(|theirs| *theirs != ours) {
            return Err(Fault::integrity(format!("{location} came out as {theirs}, not {ours}"))
                .with_next("something before the registry changes what passes, or somebody pushes the same tag"));
        }
        // Where it is held back, the registry's answer to the push said which digest it stored.
        if tag == Tag::Absent {
            Err(Fault::unreachable(format!(
                "{location} was pushed and is not there"
            )))
        } else {
            Ok(())
        }
    }

    /// Whether another tag of the repository names this manifest too, which deleting it would take
    /// along.
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

    /// Says why it stays, where this registry takes nothing away.
    async fn take_away(
        &self,
        artifact: &ArtifactRef,
        repository: &str,
    ) -> Result<Option<String>, Error> {
        let Some(digest) = self
            .registry
            .head_manifest(repository, artifact.version())
            .await?
        else {
            return Ok(None);
        };
        if self
            .is_shared(repository, artifact.version(), &digest)
            .await?
        {
            let name = repository.split_once('/').map_or("", |(_, name)| name);
            let gone = match self.project() {
                Some(project) => {
                    self.registry
                        .delete_tag(project, name, artifact.version())
                        .await?
                }
                None => false,
            };
            return Ok((!gone).then(|| "another tag names the same image, and this registry cannot delete one tag alone".into()));
        }
        let deleted = self.registry.delete_manifest(repository, &digest).await?;
        Ok(
            (deleted == Deleted::Unsupported)
                .then(|| "the registry does not allow deletion".into()),
        )
    }

    /// What is wrong with a blob that the registry is to hold.
    async fn blob_fault(
        &self,
        repository: &str,
        blob: &Descriptor,
        look: &Look,
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
            Some(_) if look.quick => return Ok(None),
            Some(_) => {}
            None if blob.is_foreign() => return Ok(None),
            None => return Ok(Some(format!("blob {} is gone", blob.digest))),
        }
        let why = self
            .registry
            .check_blob(repository, blob, &|bytes| look.read(bytes))
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

    async fn commit_now(&self, incoming: &Incoming, staged: &Path) -> Result<Landed, Fault> {
        let repository = self.repository(&incoming.artifact);
        let ours = top_of(image_info(incoming)?)?.digest;
        let found = match self.tag(&incoming.artifact, &ours).await {
            Ok(found) => found,
            Err(fault) => return Err(self.told(fault, &repository).await),
        };
        if let Some(fault) = found.conflict(&self.location(&incoming.artifact), &ours) {
            return Err(fault);
        }
        match found {
            // Committed before a crash, and cleaned up.
            Tag::Is(_) | Tag::Held(_) if !self.is_staged(staged).await? => {}
            _ => {
                if let Err(fault) = self.push(&repository, incoming, staged).await {
                    return Err(self.told(fault, &repository).await);
                }
                let staged = staged.to_owned();
                self.threads
                    .run(move || durable::remove_all(&staged))
                    .await?;
            }
        }
        let held = matches!(self.tag(&incoming.artifact, &ours).await, Ok(Tag::Held(_)));
        Ok(Landed {
            place: StorageLocation::Registry { repository },
            location: format!("{}@{ours}", self.location(&incoming.artifact)),
            note: held.then(|| HELD_BACK.to_owned()),
        })
    }

    fn repository_of(place: &StorageLocation) -> Result<&str, Fault> {
        match place {
            StorageLocation::Registry { repository } => Ok(repository),
            StorageLocation::Folder { path } => Err(Fault::internal(format!(
                "{} is a folder, not a repository",
                path.display()
            ))),
        }
    }
}

/// The tag is immutable, and the registry does not say which image it names.
fn unknown(location: &str, error: Error) -> Fault {
    let fault = error.fault(format_args!("push {location}"));
    Fault { message: format!("{}; an image is there, and a policy of the registry does not say which", fault.message), ..fault }.with_next(
        "give the registry user the right to list artifacts (Harbor: 'List Artifact' and 'Read Artifact'), then 'packhorse retry'",
    )
}

fn wrong_size(blob: &Descriptor, size: u64) -> Fault {
    Fault::integrity(format!(
        "blob {}: the registry holds {size} bytes, the manifest says {}",
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
        let repository = self.repository(&incoming.artifact);
        check_repository(&repository).map_err(|why| {
            Fault::conflict(format!(
                "{}: registries do not take the repository name {repository:?}: {why}",
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
        let found = match self.tag(&incoming.artifact, &ours).await {
            Ok(found) => found,
            Err(fault) => return Err(self.told(fault, &repository).await),
        };
        if let Some(fault) = found.conflict(&self.location(&incoming.artifact), &ours) {
            return Err(fault);
        }
        match found.digest() {
            Some(_) => Ok(()),
            None => match self.registry.try_upload(&repository).await {
                Ok(()) => Ok(()),
                Err(error) => {
                    let fault =
                        error.fault(format!("ask to push {}", self.location(&incoming.artifact)));
                    Err(self.told(fault, &repository).await)
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
        let repository = self.repository(&incoming.artifact);
        let doing = || {
            format!(
                "look for blob {digest} at {}/{repository}",
                self.registry.origin()
            )
        };
        if self.is_damaged(&repository, &digest) {
            return Ok(false);
        }
        let size = self
            .reporting(incoming, self.registry.blob_size(&repository, &digest))
            .await;
        if let Some(size) = size.map_err(|e| e.fault(doing()))? {
            self.remember(digest, &repository);
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
        // A mount saves an upload; when it does not work, nothing is lost.
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
        let repository = self.repository(&incoming.artifact);
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
                self.remember(digest, &repository);
                if sent {
                    self.note_sent((repository, digest));
                }
            }
            Err(fault) => {
                tracing::debug!(%digest, repository, error = %fault, "a blob was not taken ahead of the others");
            }
        }
    }

    async fn commit(&self, incoming: &Incoming, staged: &Path) -> Result<Landed, Fault> {
        self.reporting(incoming, self.commit_now(incoming, staged))
            .await
    }

    async fn activate(&self, _artifact: &ArtifactRef) -> Result<(), Fault> {
        Ok(()) // every version has its tag; none is more current than another
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
                "{}: a registry keeps blobs only",
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
        // Most registries keep manifests apart from blobs.
        let got = self
            .registry
            .get_manifest(repository, &digest.to_string(), "pull")
            .await;
        let Some(manifest) = got.map_err(|e| e.fault(doing()))? else {
            // It answers, and has it neither as a blob nor as a manifest: that does not pass by
            // itself.
            return Err(match error {
                Error::Answer(answer) if answer.is_blob_unknown() => Fault::not_found(format!(
                    "{}: the registry does not hold it any more",
                    doing()
                )),
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

    async fn stands(&self, incoming: &Incoming) -> Result<bool, Fault> {
        let ours = top_of(image_info(incoming)?)?.digest;
        let tag = self.tag(&incoming.artifact, &ours).await?;
        // A policy is no loss.
        Ok(tag != Tag::Absent && tag.conflict("", &ours).is_none())
    }

    async fn verify(
        &self,
        incoming: &Incoming,
        place: &StorageLocation,
        look: &Look,
    ) -> Result<Vec<String>, Fault> {
        let location = self.location(&incoming.artifact);
        let StorageLocation::Registry { repository } = place else {
            return Ok(vec![format!(
                "{location}: it was put into a folder, before this site had a registry"
            )]);
        };
        let ours = top_of(image_info(incoming)?)?.digest;
        let mut out = Vec::new();
        match self.tag(&incoming.artifact, &ours).await? {
            Tag::Absent => out.push(format!("{location}: the tag is gone")),
            Tag::HeldOther => out.push(format!("{location}: the tag names another image")),
            Tag::Is(theirs) | Tag::Held(Some(theirs)) if theirs != ours => {
                out.push(format!("{location}: the tag names {theirs}, not {ours}"));
            }
            Tag::Held(_) => {
                look.cannot_read(format!("{location}: {HELD_BACK}; no blob could be read"));
                return Ok(out);
            }
            Tag::Is(_) => {}
        }
        let tree = match self.tree(repository, None, incoming).await {
            Ok(tree) => tree,
            // What the registry says of the image is the finding; that it does not answer is not.
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
        out.extend(missing.map(|digest| format!("{location}: manifest {digest} is gone")));
        if look.quick {
            look.note("quick check: the registry was asked for the manifests and the length of each blob; no blob was read");
        }
        let found: Vec<Option<String>> = futures::stream::iter(tree.blobs)
            .map(|blob| async move { self.blob_fault(repository, &blob, look).await })
            .buffered(limits::REGISTRY_BLOBS_IN_FLIGHT_MAX)
            .try_collect()
            .await?;
        out.extend(
            found
                .into_iter()
                .flatten()
                .map(|why| format!("{location}: {why}")),
        );
        Ok(out)
    }

    async fn remove(&self, artifact: &ArtifactRef) -> Result<Option<String>, Fault> {
        let (repository, location) = (self.repository(artifact), self.location(artifact));
        let stays = self
            .take_away(artifact, &repository)
            .await
            .map_err(|e| e.fault(format_args!("remove {location}")))?;
        Ok(stays.map(|why| format!("{location}: {why}")))
    }

    async fn probe(&self) -> Result<String, Fault> {
        let origin = self.registry.origin();
        self.registry
            .ping()
            .await
            .map_err(|e| e.fault(format_args!("ask the registry at {origin}")))?;
        let what = if self.registry.is_harbor() {
            "Harbor"
        } else {
            "a registry"
        };
        Ok(format!(
            "{what} answers at {} and takes the credentials",
            origin.base()
        ))
    }
}

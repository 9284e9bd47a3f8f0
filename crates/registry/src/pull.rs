//! Pulls an image from a registry into an OCI layout directory, which the image source reads.
//!
//! Blobs are written to disk and hashed while they arrive, with bounded memory. An interrupted blob
//! continues at its last byte. The pull waits if the registry asks for a pause. Blobs are also kept
//! in a directory of the caller, which may survive a failed pull; the next pull fetches only the
//! rest. Nothing is synced: the next start removes what a crash leaves.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::TryStreamExt;
use sha2::Digest as _;
use tokio::sync::{mpsc, oneshot};

use crate::image::{Descriptor, REF_NAME, Sha256, Tree, Walker, walk};
use crate::referrers::Referrer;
use crate::{Access, Manifest, Reference, Registry};
use base::blocking::blocking;
use base::durable;
use base::fault::{Code, Fault, IoContext, Reason, Retry};
use base::limits;
use base::omitted::{Category, Omitted};
use base::platform::Platform;
use base::space::Reservation;

/// Pulls an image (a manifest, or an index with all its platforms) to an OCI layout in `dir`, which
/// is created if it does not exist. The `index.json` of the layout has one entry, the manifest of
/// `reference`. If `platforms` are stated, the manifests of others are not fetched. Platforms that the index lists but the registry does not have are left out; the
/// index is not changed. With `referrers`, what refers to the image (signatures, attestations,
/// SBOMs) is fetched too, and has further entries in `index.json`. The manifests state the size of the image, and its space is reserved
/// before the first byte is written. If there is not enough space, `wanted` is set to the required
/// bytes. Returns the referrers of the image that stay in the registry.
pub async fn pull_to_layout(
    reference: &Reference,
    access: Access,
    what: &Selection<'_>,
    dir: &Path,
    wanted: &AtomicU64,
) -> Result<Omitted, Fault> {
    let kept = dir.join("blobs/sha256");
    pull_keeping(reference, access, what, dir, &kept, wanted).await
}

/// The parts of an image that are pulled.
#[derive(Debug, Clone, Copy, Default)]
pub struct Selection<'a> {
    /// The platforms; all if empty.
    pub platforms: &'a [Platform],
    /// Whether what refers to the image is pulled with it.
    pub referrers: bool,
}

/// Like [`pull_to_layout`], but keeps fetched blobs, and parts of blobs, in `kept` on the same
/// disk. Content from an earlier attempt is not fetched again.
pub async fn pull_keeping(
    reference: &Reference,
    access: Access,
    what: &Selection<'_>,
    dir: &Path,
    kept: &Path,
    wanted: &AtomicU64,
) -> Result<Omitted, Fault> {
    let registry = Registry::of_source(reference.origin.clone(), access)
        .await?
        .with_patience(limits::REGISTRY_PAUSE_OF_PULL_MAX);
    pull(&registry, reference, what, dir, kept, wanted)
        .await
        .map_err(|fault| {
            let reason = match fault.reason {
                Reason::SinkUnavailable | Reason::SinkRefused => Reason::WaitingForSource,
                other => other,
            };
            let fault = match (fault.reason, fault.retry) {
                (Reason::SinkUnavailable, Retry::Backoff | Retry::AfterMs(_)) => Fault {
                    next: format!(
                        "{}; the fetched content is kept: run the command again later",
                        without_retry(&fault.next)
                    ),
                    ..fault
                },
                _ => fault,
            };
            fault
                .with_reason(reason)
                .context(format_args!("pull {reference}"))
        })
}

/// The advice without the promise of an automatic retry: a publish is not repeated automatically.
fn without_retry(next: &str) -> &str {
    next.split_once("; ").map_or(next, |(first, rest)| {
        if rest.contains("automatically") {
            first
        } else {
            next
        }
    })
}

async fn pull(
    registry: &Registry,
    reference: &Reference,
    what: &Selection<'_>,
    dir: &Path,
    kept: &Path,
    wanted: &AtomicU64,
) -> Result<Omitted, Fault> {
    let repository = reference.repository.as_str();
    tokio::fs::create_dir_all(dir.join("blobs/sha256"))
        .await
        .at(format_args!("create {}", dir.display()))?;
    let manifest = registry
        .get_manifest(repository, &reference.pick.to_string(), "pull")
        .await;
    let has_user = registry.auth.has_credentials();
    let credentials = || {
        let host = &reference.origin.authority;
        registry.settings.credentials(host, has_user)
    };
    let top = manifest
        .map_err(|error| match error.status() {
            // Registries answer so for an image that is missing or that the user may not read.
            Some(401 | 403) => error.fault("read the manifest").with_next(credentials()),
            _ => error.fault("read the manifest"),
        })?
        .ok_or_else(|| {
            Fault::not_found("the registry does not have this image").with_next(format!(
                "check the repository and the tag; if the repository is private: {}",
                credentials()
            ))
        })?;
    let tree = walk(&top.descriptor, |wanted| {
        let top = &top;
        async move {
            if wanted.digest == top.descriptor.digest {
                return Ok(Some(top.bytes.clone()));
            }
            if wanted.is_deselected(what.platforms) {
                return Ok(None);
            }
            let manifest = registry
                .get_manifest(repository, &wanted.digest.to_string(), "pull")
                .await;
            Ok(manifest
                .map_err(|e| e.fault(format_args!("read manifest {}", wanted.digest)))?
                .map(|m| m.bytes))
        }
    })
    .await?;
    if !tree.absent.is_empty() {
        tracing::info!(image = %reference, manifests = tree.absent.len(), "the registry does not have some platforms that the index lists");
    }
    let trees = std::slice::from_ref(&tree);
    let to = Target {
        registry,
        repository,
        dir,
        kept,
        wanted,
    };
    let space = to.reserve(trees)?;
    let blobs = futures::stream::iter(tree.blobs.iter().map(Ok::<_, Fault>))
        .try_for_each_concurrent(limits::REGISTRY_BLOBS_IN_FLIGHT_MAX, |blob| {
            to.fetch(blob, &space, blob.is_foreign())
        });
    let subjects: Vec<Sha256> = tree
        .manifests
        .iter()
        .rev()
        .map(|node| node.digest)
        .collect();
    let more = async {
        let found = registry
            .referrers(repository, &subjects, limits::REGISTRY_REFERRERS_MAX)
            .await;
        if what.referrers {
            to.fetch_referrers(found).await
        } else {
            Ok(Referrers::left_out(&found))
        }
    };
    let ((), referrers) = tokio::try_join!(blobs, more)?;
    let (dir, top, name) = (dir.to_owned(), top.descriptor, reference.pick.to_string());
    let Referrers { omitted, entries } = referrers;
    blocking(move || write_layout(&dir, &tree, &top, &name, &entries)).await?;
    Ok(omitted)
}

/// The referrers of an image.
#[derive(Default)]
struct Referrers {
    /// Those that stay in the registry.
    omitted: Omitted,
    /// The others, whose blobs are fetched.
    entries: Vec<Entry>,
}

/// A referrer in the layout.
struct Entry {
    tree: Tree,
    top: Descriptor,
    tag: Option<String>,
}

impl Referrers {
    fn left_out(found: &[Referrer]) -> Self {
        let mut referrers = Self::default();
        let mut counted = HashSet::new();
        for referrer in found {
            if counted.insert(&referrer.digest) {
                referrers.omitted.add(Category::Referrers, referrer.text());
            }
        }
        referrers
    }
}

/// Where an image is pulled from and to.
struct Target<'a> {
    registry: &'a Registry,
    repository: &'a str,
    dir: &'a Path,
    kept: &'a Path,
    wanted: &'a AtomicU64,
}

impl Target<'_> {
    /// Reserves the space for these images.
    fn reserve(&self, trees: &[Tree]) -> Result<Arc<Reservation>, Fault> {
        let needed = space_needed(trees).saturating_sub(bytes_kept(trees, self.kept));
        let space = reserve(trees, needed, self.dir)
            .inspect_err(|_| self.wanted.store(needed, Ordering::Relaxed))?;
        Ok(Arc::new(space))
    }

    /// Fetches referrers. Those that the registry lists and does not have stay out, and those whose
    /// form is not that of an image.
    async fn fetch_referrers(&self, found: Vec<Referrer>) -> Result<Referrers, Fault> {
        let (mut lacking, mut entries) = (Vec::new(), Vec::new());
        let mut walker = Walker::default();
        for referrer in found {
            let is_over = entries.len() >= limits::IMAGE_REFERRERS_MAX;
            let top = match referrer.digest.parse::<Sha256>() {
                Ok(digest) if !is_over => self.manifest(&digest).await?,
                _ => None,
            };
            let Some(top) = top else {
                lacking.push(referrer);
                continue;
            };
            let own = &top;
            let walked = walker.walk(&top.descriptor, |wanted| async move {
                if wanted.digest == own.descriptor.digest {
                    return Ok(Some(own.bytes.clone()));
                }
                let lower = self.manifest(&wanted.digest).await?;
                Ok(lower.map(|manifest| manifest.bytes))
            });
            match walked.await {
                Ok(tree) => entries.push(Entry {
                    tree,
                    top: top.descriptor,
                    tag: referrer.tag,
                }),
                Err(fault) if fault.code == Code::Integrity => {
                    tracing::warn!(referrer = %referrer.text(), error = %fault, "a referrer of the image is not fetched");
                    lacking.push(referrer);
                }
                Err(fault) => return Err(fault),
            }
        }
        let trees: Vec<Tree> = entries.iter().map(|entry| entry.tree.clone()).collect();
        let space = self.reserve(&trees)?;
        let blobs = trees.iter().flat_map(|tree| &tree.blobs);
        futures::stream::iter(blobs.map(Ok::<_, Fault>))
            // What is missing makes the referrer incomplete: it is left out when the layout is read.
            .try_for_each_concurrent(limits::REGISTRY_BLOBS_IN_FLIGHT_MAX, |blob| {
                self.fetch(blob, &space, true)
            })
            .await?;
        Ok(Referrers {
            entries,
            ..Referrers::left_out(&lacking)
        })
    }

    /// A manifest; `None` if the registry does not have it.
    async fn manifest(&self, digest: &Sha256) -> Result<Option<Manifest>, Fault> {
        self.registry
            .get_manifest(self.repository, &digest.to_string(), "pull")
            .await
            .map_err(|error| error.fault(format_args!("read manifest {digest}")))
    }
}

/// The bytes that a pull needs: the image once, plus its largest blob, because each blob is removed
/// after it was read into the store. The overhead of the store is less than 1/256.
fn space_needed(trees: &[Tree]) -> u64 {
    let sizes = || {
        let blobs = trees.iter().flat_map(|tree| &tree.blobs);
        let manifests = trees.iter().flat_map(|tree| &tree.manifests);
        blobs
            .map(|blob| blob.size)
            .chain(manifests.map(|node| node.bytes.len() as u64))
    };
    let total = sizes().fold(0, u64::saturating_add);
    total
        .saturating_add(sizes().max().unwrap_or(0))
        .saturating_add(total / 256)
}

/// The bytes of this image that an earlier attempt left.
fn bytes_kept(trees: &[Tree], kept: &Path) -> u64 {
    let length = |name: String| std::fs::metadata(kept.join(name)).map_or(0, |meta| meta.len());
    let kept_bytes = |blob: &Descriptor| {
        length(blob.digest.hex())
            .max(length(format!("{}.part", blob.digest.hex())))
            .min(blob.size)
    };
    let blobs = trees.iter().flat_map(|tree| &tree.blobs);
    blobs.map(kept_bytes).sum()
}

fn reserve(trees: &[Tree], bytes: u64, dir: &Path) -> Result<Reservation, Fault> {
    let files = trees
        .iter()
        .map(|tree| tree.blobs.len() + tree.manifests.len());
    let inodes = files.sum::<usize>() as u64 + limits::STATE_INODES_SPARE;
    Reservation::take(dir, bytes, limits::SCRATCH_SPARE_BYTES, inodes, "the image")
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    File::create(path)
        .and_then(|mut file| file.write_all(bytes))
        .at(format_args!("write {}", path.display()))
}

fn write_layout(
    dir: &Path,
    tree: &Tree,
    top: &Descriptor,
    name: &str,
    referrers: &[Entry],
) -> Result<(), Fault> {
    let entry = |tree: &Tree, top: &Descriptor, name: Option<&str>| -> Result<_, Fault> {
        for node in &tree.manifests {
            write(&dir.join(node.digest.layout_path()), &node.bytes)?;
        }
        let own = tree.manifests.last();
        let media_type = own
            .filter(|node| node.digest == top.digest)
            .map_or(top.media_type.as_str(), |node| node.media_type.as_str());
        let mut entry = serde_json::json!({
            "mediaType": media_type,
            "digest": top.digest,
            "size": top.size,
        });
        if let Some(name) = name {
            entry["annotations"] = serde_json::json!({ REF_NAME: name });
        }
        Ok(entry)
    };
    let mut entries = vec![entry(tree, top, Some(name))?];
    for one in referrers {
        entries.push(entry(&one.tree, &one.top, one.tag.as_deref())?);
    }
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": entries });
    write(&dir.join("index.json"), index.to_string().as_bytes())?;
    write(
        &dir.join("oci-layout"),
        br#"{"imageLayoutVersion":"1.0.0"}"#,
    )
}

impl Target<'_> {
    /// Fetches one blob into the layout: the part that an earlier attempt kept, and the rest from the
    /// registry, which may lack it if it `may_lack`.
    async fn fetch(
        &self,
        blob: &Descriptor,
        space: &Arc<Reservation>,
        may_lack: bool,
    ) -> Result<(), Fault> {
        let Self {
            registry,
            repository,
            dir,
            kept,
            ..
        } = *self;
        let doing = || format!("fetch blob {}", blob.digest);
        let (whole, part) = (
            kept.join(blob.digest.hex()),
            kept.join(format!("{}.part", blob.digest.hex())),
        );
        let wanted = dir.join(blob.digest.layout_path());
        if tokio::fs::metadata(&whole)
            .await
            .is_ok_and(|meta| meta.len() == blob.size)
        {
            return link_into(&whole, &wanted).await;
        }
        loop {
            let (send, receive) = mpsc::channel::<Bytes>(limits::REGISTRY_READ_AHEAD_MAX * 8); // pieces are of 64 KiB at most
            let (start, started) = oneshot::channel();
            let writer = base::blocking::spawn({
                let (part, size, space) = (part.clone(), blob.size, space.clone());
                move || write_blob(&part, size, start, receive, &space)
            });
            let joined = async || {
                writer
                    .await
                    .unwrap_or_else(|_| Err(Fault::internal("a worker thread ended unexpectedly")))
            };
            let Ok(from) = started.await else {
                return joined().await.map(|_| ());
            };
            let mut offset = from;
            let sent = registry
                .send_blob(repository, blob, &mut offset, &send)
                .await;
            drop(send);
            let written = joined().await;
            match sent {
                Ok(()) => {}
                Err(error) if offset == 0 && error.status() == Some(404) && may_lack => {
                    return tokio::fs::remove_file(&part)
                        .await
                        .at(format_args!("remove {}", part.display()));
                }
                // If both failed, the local error (a full disk) is the cause.
                Err(error) => return Err(written.err().unwrap_or_else(|| error.fault(doing()))),
            }
            let written = written?;
            if written == (blob.size, blob.digest) {
                let (from, to) = (part, whole.clone());
                blocking(move || {
                    durable::remove_all(&to)?;
                    durable::rename_noreplace(&from, &to)
                })
                .await?;
                return link_into(&whole, &wanted).await;
            }
            tokio::fs::remove_file(&part)
                .await
                .at(format_args!("remove {}", part.display()))?;
            if from == 0 {
                return Err(Fault::integrity(format!(
                    "blob {}: the registry sent {} bytes with the digest {}, but {} bytes were expected",
                    blob.digest, written.0, written.1, blob.size
                )));
            }
            // The kept part was not the beginning of the blob, so the complete blob is fetched again,
            // once.
        }
    }
}

/// Links the blob into the layout; both names share one copy on the disk.
async fn link_into(whole: &Path, wanted: &Path) -> Result<(), Fault> {
    match tokio::fs::hard_link(whole, wanted).await {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()), // the two folders are one
        linked => linked.at(format_args!(
            "link {} to {}",
            whole.display(),
            wanted.display()
        )),
    }
}

/// Appends received bytes to the existing part of a blob, and hashes all of it. Sends the number of
/// existing bytes to `begin`.
fn write_blob(
    path: &Path,
    size_max: u64,
    start: oneshot::Sender<u64>,
    mut receive: mpsc::Receiver<Bytes>,
    space: &Reservation,
) -> Result<(u64, Sha256), Fault> {
    let what = || format!("write {}", path.display());
    let mut file = File::options()
        .read(true)
        .append(true)
        .create(true)
        .open(path)
        .at(what())?;
    let mut hash = sha2::Sha256::new();
    if file.metadata().at(what())?.len() > size_max {
        file.set_len(0).at(what())?;
    }
    let mut size = std::io::copy(&mut file, &mut HashWriter(&mut hash))
        .at(format_args!("read {}", path.display()))?;
    let _ = start.send(size);
    while let Some(piece) = receive.blocking_recv() {
        file.write_all(&piece).at(what())?;
        hash.update(&piece);
        size += piece.len() as u64;
        space.used(piece.len() as u64);
    }
    Ok((size, Sha256(hash.finalize().into())))
}

struct HashWriter<'a>(&'a mut sha2::Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

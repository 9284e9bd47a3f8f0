//! Pulls an image from a registry into an OCI layout directory, which the image source reads.
//!
//! Blobs are written to disk and hashed while they arrive, with bounded memory. An interrupted blob
//! continues at its last byte. The pull waits if the registry asks for a pause. Blobs are also kept
//! in a directory of the caller, which may survive a failed pull; the next pull fetches only the
//! rest. Nothing is synced: the next start removes what a crash leaves.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use futures::TryStreamExt;
use sha2::Digest as _;
use tokio::sync::{mpsc, oneshot};

use crate::image::{Descriptor, REF_NAME, Sha256, Tree, walk};
use crate::{Access, Reference, Registry};
use base::blocking::blocking;
use base::durable;
use base::fault::{Fault, IoContext, Reason, Retry};
use base::limits;
use base::omitted::Omitted;
use base::platform::Platform;
use base::space::Reservation;

/// Pulls an image (a manifest, or an index with all its platforms) to an OCI layout in `dir`, which
/// is created if it does not exist. The `index.json` of the layout has one entry, the manifest of
/// `reference`. If `platforms` are stated, the manifests of others are not fetched. Platforms that the index lists but the registry does not have are left out; the
/// index is not changed. The manifests state the size of the image, and its space is reserved
/// before the first byte is written. If there is not enough space, `wanted` is set to the required
/// bytes. Returns the referrers of the image that stay in the registry.
pub async fn pull_to_layout(
    reference: &Reference,
    access: Access,
    platforms: &[Platform],
    dir: &Path,
    wanted: &AtomicU64,
) -> Result<Omitted, Fault> {
    let kept = dir.join("blobs/sha256");
    pull_keeping(reference, access, platforms, dir, &kept, wanted).await
}

/// Like [`pull_to_layout`], but keeps fetched blobs, and parts of blobs, in `kept` on the same
/// disk. Content from an earlier attempt is not fetched again.
pub async fn pull_keeping(
    reference: &Reference,
    access: Access,
    platforms: &[Platform],
    dir: &Path,
    kept: &Path,
    wanted: &AtomicU64,
) -> Result<Omitted, Fault> {
    let registry = Registry::of_source(reference.origin.clone(), access)
        .await?
        .with_patience(limits::REGISTRY_PAUSE_OF_PULL_MAX);
    pull(&registry, reference, platforms, dir, kept, wanted)
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
    platforms: &[Platform],
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
            if wanted.is_deselected(platforms) {
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
    let needed = space_needed(&tree).saturating_sub(bytes_kept(&tree, kept));
    let space = Arc::new(
        reserve(&tree, needed, dir).inspect_err(|_| wanted.store(needed, Ordering::Relaxed))?,
    );
    let blobs = futures::stream::iter(tree.blobs.iter().map(Ok::<_, Fault>))
        .try_for_each_concurrent(limits::REGISTRY_BLOBS_IN_FLIGHT_MAX, |blob| {
            fetch(registry, repository, blob, dir, kept, &space)
        });
    let subjects: Vec<Sha256> = tree
        .manifests
        .iter()
        .rev()
        .map(|node| node.digest)
        .collect();
    let referrers = async {
        Ok(registry
            .referrers(repository, &subjects, limits::REGISTRY_REFERRERS_MAX)
            .await)
    };
    let ((), referrers) = tokio::try_join!(blobs, referrers)?;
    let (dir, top, name) = (dir.to_owned(), top.descriptor, reference.pick.to_string());
    blocking(move || write_layout(&dir, &tree, &top, &name)).await?;
    Ok(referrers)
}

/// The bytes that a pull needs: the image once, plus its largest blob, because each blob is removed
/// after it was read into the store. The overhead of the store is less than 1/256.
fn space_needed(tree: &Tree) -> u64 {
    let sizes = || {
        tree.blobs
            .iter()
            .map(|blob| blob.size)
            .chain(tree.manifests.iter().map(|node| node.bytes.len() as u64))
    };
    let total = sizes().fold(0, u64::saturating_add);
    total
        .saturating_add(sizes().max().unwrap_or(0))
        .saturating_add(total / 256)
}

/// The bytes of this image that an earlier attempt left.
fn bytes_kept(tree: &Tree, kept: &Path) -> u64 {
    let length = |name: String| std::fs::metadata(kept.join(name)).map_or(0, |meta| meta.len());
    let kept_bytes = |blob: &Descriptor| {
        length(blob.digest.hex())
            .max(length(format!("{}.part", blob.digest.hex())))
            .min(blob.size)
    };
    tree.blobs.iter().map(kept_bytes).sum()
}

fn reserve(tree: &Tree, bytes: u64, dir: &Path) -> Result<Reservation, Fault> {
    let inodes = (tree.blobs.len() + tree.manifests.len()) as u64 + limits::STATE_INODES_SPARE;
    Reservation::take(dir, bytes, limits::SCRATCH_SPARE_BYTES, inodes, "the image")
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    File::create(path)
        .and_then(|mut file| file.write_all(bytes))
        .at(format_args!("write {}", path.display()))
}

fn write_layout(dir: &Path, tree: &Tree, top: &Descriptor, name: &str) -> Result<(), Fault> {
    for node in &tree.manifests {
        write(&dir.join(node.digest.layout_path()), &node.bytes)?;
    }
    let media_type = tree
        .manifests
        .last()
        .map_or(top.media_type.as_str(), |node| node.media_type.as_str());
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": media_type,
            "digest": top.digest,
            "size": top.size,
            "annotations": { REF_NAME: name },
        }],
    });
    write(&dir.join("index.json"), index.to_string().as_bytes())?;
    write(
        &dir.join("oci-layout"),
        br#"{"imageLayoutVersion":"1.0.0"}"#,
    )
}

/// Fetches one blob into the layout: the part that an earlier attempt kept, and the rest from the
/// registry.
async fn fetch(
    registry: &Registry,
    repository: &str,
    blob: &Descriptor,
    dir: &Path,
    kept: &Path,
    space: &Arc<Reservation>,
) -> Result<(), Fault> {
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
            Err(error) if offset == 0 && error.status() == Some(404) && blob.is_foreign() => {
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

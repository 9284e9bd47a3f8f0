//! Pulls an image out of a registry into an OCI layout folder, for the image source to normalise.
//!
//! Blobs go to disk as they come, hashed on the way, in bounded memory; one that breaks off goes on where it stood. The
//! folder is scratch: nothing is synced, and a crash leaves it to whoever cleans scratch folders.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::TryStreamExt;
use sha2::Digest as _;
use tokio::sync::mpsc;

use crate::fault::{Fault, IoContext, Reason};
use crate::limits;
use crate::registry::image::{Descriptor, REF_NAME, Sha256, Tree, walk};
use crate::registry::{Credentials, Error, Reference, Registry};

/// Pulls an image (a manifest, or an index with all its platforms) to an OCI layout in `dir`, which is made if missing.
/// The layout's `index.json` has one entry, the manifest that `reference` names. Platforms that the index lists but the
/// registry does not hold are left out; the index stays as it was.
pub async fn pull_to_layout(reference: &Reference, auth: Option<Credentials>, ca: Option<&Path>, dir: &Path) -> Result<(), Fault> {
    let registry = Registry::new(reference.origin.clone(), auth, ca)?;
    pull(&registry, reference, dir).await.map_err(|fault| {
        let reason = match fault.reason {
            Reason::SinkUnavailable | Reason::SinkRefused => Reason::WaitingForSource,
            other => other,
        };
        fault.with_reason(reason).context(format_args!("pull {reference}"))
    })
}

async fn pull(registry: &Registry, reference: &Reference, dir: &Path) -> Result<(), Fault> {
    let repository = reference.repository.as_str();
    tokio::fs::create_dir_all(dir.join("blobs/sha256")).await.at(format_args!("make {}", dir.display()))?;
    let got = registry.get_manifest(repository, &reference.pick.to_string(), "pull").await;
    let top = got.map_err(|e| e.fault("read the manifest"))?.ok_or_else(|| {
        Fault::not_found("the registry holds no such image").with_next("check the repository and the tag; a private one needs credentials")
    })?;
    let tree = walk(&top.descriptor, |wanted| {
        let top = &top;
        async move {
            if wanted.digest == top.descriptor.digest {
                return Ok(Some(top.bytes.clone()));
            }
            let got = registry.get_manifest(repository, &wanted.digest.to_string(), "pull").await;
            Ok(got.map_err(|e| e.fault(format_args!("read manifest {}", wanted.digest)))?.map(|m| m.bytes))
        }
    })
    .await?;
    if !tree.absent.is_empty() {
        tracing::info!(image = %reference, manifests = tree.absent.len(), "the registry lacks some of the platforms that the index lists");
    }
    futures::stream::iter(tree.blobs.iter().map(Ok::<_, Fault>))
        .try_for_each_concurrent(limits::REGISTRY_BLOBS_IN_FLIGHT_MAX, |blob| fetch(registry, repository, blob, dir))
        .await?;
    let (dir, top, name) = (dir.to_owned(), top.descriptor, reference.pick.to_string());
    blocking(move || write_layout(&dir, &tree, &top, &name)).await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Fault> + Send + 'static) -> Result<T, Fault> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(Fault::internal("a worker thread ended early")))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Fault> {
    File::create(path).and_then(|mut file| file.write_all(bytes)).at(format_args!("write {}", path.display()))
}

fn write_layout(dir: &Path, tree: &Tree, top: &Descriptor, name: &str) -> Result<(), Fault> {
    for node in &tree.manifests {
        write(&dir.join(node.digest.layout_path()), &node.bytes)?;
    }
    let media_type = tree.manifests.last().map_or(top.media_type.as_str(), |node| node.media_type.as_str());
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
    write(&dir.join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)
}

/// Fetches one blob, going on after a break while it moves.
async fn fetch(registry: &Registry, repository: &str, blob: &Descriptor, dir: &Path) -> Result<(), Fault> {
    let doing = || format!("fetch blob {}", blob.digest);
    let path = dir.join(blob.digest.layout_path());
    let (send, receive) = mpsc::channel::<Bytes>(limits::REGISTRY_READ_AHEAD_MAX * 8); // pieces are of 64 KiB at most
    let writer = tokio::task::spawn_blocking({
        let path = path.clone();
        move || write_blob(&path, receive)
    });
    let mut offset = 0;
    let mut tries = 1;
    while offset < blob.size {
        let before = offset;
        let error = match copy(registry, repository, blob, &mut offset, &send).await {
            Ok(()) => break,
            Err(error) => error,
        };
        if offset == 0 && error.status() == Some(404) && blob.is_foreign() {
            drop(send);
            let _ = writer.await;
            return tokio::fs::remove_file(&path).await.at(format_args!("remove {}", path.display()));
        }
        tries = if offset > before { 1 } else { tries + 1 };
        if !error.is_passing() || tries > limits::REGISTRY_BLOB_TRIES_MAX {
            return Err(error.fault(doing()));
        }
        tokio::time::sleep(limits::BACKOFF_FIRST * 2u32.pow(tries)).await;
    }
    drop(send);
    let written = writer.await.unwrap_or_else(|_| Err(Fault::internal("a worker thread ended early")))?;
    if written != (blob.size, blob.digest) {
        return Err(Fault::integrity(format!(
            "blob {}: the registry sent {} bytes of {}, {} bytes were expected",
            blob.digest, written.0, written.1, blob.size
        )));
    }
    Ok(())
}

async fn copy(registry: &Registry, repository: &str, blob: &Descriptor, offset: &mut u64, send: &mpsc::Sender<Bytes>) -> Result<(), Error> {
    let mut stream = registry.blob_stream(repository, &blob.digest, *offset).await?;
    while let Some(piece) = stream.next().await? {
        *offset += piece.len() as u64;
        if *offset > blob.size {
            return Err(Fault::integrity(format!("it is larger than the {} bytes that its manifest says", blob.size)).into());
        }
        if send.send(piece).await.is_err() {
            break; // the writer failed, and says why when it is asked
        }
    }
    Ok(())
}

fn write_blob(path: &PathBuf, mut receive: mpsc::Receiver<Bytes>) -> Result<(u64, Sha256), Fault> {
    let what = || format!("write {}", path.display());
    let mut file = File::create(path).at(what())?;
    let mut hash = sha2::Sha256::new();
    let mut size = 0;
    while let Some(piece) = receive.blocking_recv() {
        file.write_all(&piece).at(what())?;
        hash.update(&piece);
        size += piece.len() as u64;
    }
    Ok((size, Sha256(hash.finalize().into())))
}

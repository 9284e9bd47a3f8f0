//! Uploads of blobs from files.
//!
//! An upload uses a few buffers for a blob of any size, and may run while its file is still being
//! written. A blob is sent with one request. If the registry or a proxy rejects that, it is sent in
//! chunks, which are halved until they pass. An interrupted session continues only if the registry
//! reports a position exactly at the end of a chunk. Otherwise the upload first checks whether the
//! blob exists, and then starts again.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, LOCATION, RANGE};
use reqwest::{Body, Method, Response, StatusCode, Url};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

use super::{LocalBlob, header};
use crate::auth::Scope;
use crate::image::Sha256;
use crate::{Answer, Error, Progress, Registry, Wait};
use base::fault::{Fault, IoContext};
use base::limits;

/// An open upload session.
pub(super) struct Session {
    url: Url,
    /// The smallest chunk that the registry accepts, except the last one.
    chunk_bytes_min: u64,
}

pub(super) enum Opened {
    /// The blob exists now, without an upload.
    Mounted,
    Session(Session),
}

impl Registry {
    /// Checks that the repository accepts uploads: opens a session and cancels it.
    pub async fn try_upload(&self, repository: &str) -> Result<(), Error> {
        let session = self.session_for(repository).await?;
        self.cancel(repository, session).await;
        Ok(())
    }

    /// Ensures that a repository has a blob. Returns whether its bytes had to be sent.
    pub async fn push_blob(&self, repository: &str, blob: &LocalBlob) -> Result<bool, Fault> {
        let doing = || format!("push blob {} to {}/{repository}", blob.digest, self.origin);
        match self
            .blob_size(repository, &blob.digest)
            .await
            .map_err(|e| e.fault(doing()))?
        {
            Some(size) if size == blob.size => Ok(false),
            _ => self.push_again(repository, blob).await,
        }
    }

    /// Sends a blob even if the repository has it.
    pub async fn push_again(&self, repository: &str, blob: &LocalBlob) -> Result<bool, Fault> {
        let doing = || format!("push blob {} to {}/{repository}", blob.digest, self.origin);
        self.check_file(blob).await?;
        let mut tries = 1;
        loop {
            let chunk = self.chunk_bytes.load(Ordering::Relaxed);
            let sent = if chunk == 0 {
                self.put_whole(repository, blob, None).await
            } else {
                self.put_chunks(repository, blob, chunk).await
            };
            let Err(error) = sent else { return Ok(true) };
            if self.adapt(&error, chunk, blob.size) {
                continue; // not a failure: the search for an accepted form continues
            }
            let answer = if let Error::Answer(answer) = &error {
                Some(answer)
            } else {
                None
            };
            if let Some(answer) = answer.filter(|a| a.status == 413) {
                return Err(answer.fault_of_blob(doing()));
            }
            let is_session_gone = answer.is_some_and(|a| a.is_session_gone());
            if !is_session_gone && !error.is_transient() {
                return Err(error.fault(doing()));
            }
            if self.exists_now(repository, blob, error.status()).await {
                return Ok(true);
            }
            let pause = error
                .retry_after()
                .unwrap_or(limits::BACKOFF_FIRST * 2u32.pow(tries));
            if tries >= limits::REGISTRY_BLOB_TRIES_MAX
                || pause > limits::REGISTRY_PAUSE_IN_PLACE_MAX
            {
                return Err(error.fault(doing()));
            }
            tracing::debug!(blob = %blob.digest, repository, tries, "upload broke, trying again");
            tokio::time::sleep(pause).await;
            tries += 1;
        }
    }

    /// Like [`Registry::push_blob`], for a file that is still being written: `grown` is the number
    /// of bytes that exist. The blob is sent while it grows, and once more if that fails. Returns
    /// whether its bytes had to be sent.
    pub async fn push_growing(
        &self,
        repository: &str,
        blob: &LocalBlob,
        mut grown: watch::Receiver<u64>,
    ) -> Result<bool, Fault> {
        let doing = || format!("push blob {} to {}/{repository}", blob.digest, self.origin);
        let existing = self
            .blob_size(repository, &blob.digest)
            .await
            .map_err(|e| e.fault(doing()))?;
        // In chunk mode, wait for the complete file: the allowed chunk size is not known before.
        if existing != Some(blob.size) && self.chunk_bytes.load(Ordering::Relaxed) == 0 {
            match self.put_whole(repository, blob, Some(&grown)).await {
                Ok(()) => return Ok(true),
                Err(error) => {
                    self.adapt(&error, 0, blob.size);
                    tracing::debug!(error = %error.fault(doing()), "a blob could not be sent while it arrived");
                }
            }
        }
        let whole = grown
            .wait_for(|grown| *grown == blob.size)
            .await
            .map(|_| ());
        whole.map_err(|_| {
            Fault::unreachable(format!(
                "{}: the rest of the file is not available",
                doing()
            ))
        })?;
        self.push_blob(repository, blob).await
    }

    /// Checks the size, because registries accept a descriptor with a wrong size.
    async fn check_file(&self, blob: &LocalBlob) -> Result<(), Fault> {
        let size = tokio::fs::metadata(&blob.file)
            .await
            .at(format_args!("read the metadata of {}", blob.file.display()))?
            .len();
        if size == blob.size {
            return Ok(());
        }
        Err(Fault::integrity(format!(
            "image blob {}: its manifest states {} bytes, but the file has {size}",
            blob.digest, blob.size
        )))
    }

    /// After a server error: checks whether the blob exists. If a gateway timed out on the closing
    /// request, the registry behind it may still be hashing.
    async fn exists_now(&self, repository: &str, blob: &LocalBlob, status: Option<u16>) -> bool {
        let wait_max = match status {
            Some(502..=504) => Duration::from_secs(blob.size >> 26).min(Duration::from_secs(300)), // at 64 MiB/s
            _ => Duration::ZERO,
        };
        let pause = Duration::from_secs(5);
        let mut waited = Duration::ZERO;
        loop {
            if matches!(self.blob_size(repository, &blob.digest).await, Ok(Some(size)) if size == blob.size)
            {
                return true;
            }
            if waited >= wait_max {
                return false;
            }
            tokio::time::sleep(pause).await;
            waited += pause;
        }
    }

    /// Changes how blobs are sent after a refusal, if there is another way: in (smaller) chunks, or
    /// to the address that the registry gave. `used` is the chunk size of the refused attempt.
    fn adapt(&self, error: &Error, used: u64, blob_bytes: u64) -> bool {
        let Error::Answer(answer) = error else {
            return false;
        };
        // The registry does not know its uploads under its own name.
        let unknown_here = answer.is_session_gone() || matches!(answer.status, 404 | 405);
        if unknown_here
            && self.uploads_renamed.load(Ordering::Relaxed)
            && !self.uploads_elsewhere.swap(true, Ordering::Relaxed)
        {
            tracing::info!(registry = %self.origin, "uploads go to the host that the registry names");
            return true;
        }
        if answer.status == 413 {
            return self.shrink_chunks(used, blob_bytes);
        }
        if used != 0 || blob_bytes == 0 || !answer.refuses_whole_blobs() {
            return false;
        }
        // Another blob may have found this meanwhile.
        let _ = self.chunk_bytes.compare_exchange(
            0,
            limits::REGISTRY_CHUNK_BYTES,
            Ordering::Relaxed,
            Ordering::Relaxed,
        );
        tracing::info!(registry = %self.origin, status = answer.status, "the registry refuses complete blobs, uploading in chunks");
        true
    }

    /// Halves the chunk size after `used` was too large. Returns false at the minimum.
    fn shrink_chunks(&self, used: u64, blob_bytes: u64) -> bool {
        let tried = if used == 0 {
            blob_bytes
        } else {
            used.min(blob_bytes)
        };
        let next = (tried / 2).clamp(
            limits::REGISTRY_CHUNK_BYTES_MIN,
            limits::REGISTRY_CHUNK_BYTES,
        );
        if tried <= limits::REGISTRY_CHUNK_BYTES_MIN {
            return false;
        }
        // Another blob may have found a smaller size meanwhile; then that size is used next.
        if self
            .chunk_bytes
            .compare_exchange(used, next, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
        {
            tracing::info!(registry = %self.origin, bytes = next, "a proxy limits requests, uploading in chunks");
        }
        true
    }

    pub(super) async fn open_session(
        &self,
        repository: &str,
        mount: Option<(&Sha256, &str)>,
    ) -> Result<Opened, Error> {
        let mut url = self.url(&format!("{repository}/blobs/uploads/"))?;
        let mut scope = Self::scope(repository, "pull,push");
        if let Some((digest, from)) = mount {
            url.query_pairs_mut()
                .append_pair("mount", &digest.to_string())
                .append_pair("from", from);
            scope = Scope {
                mount_from: Some(from.into()),
                ..scope
            };
        }
        let response = self
            .send(
                &scope,
                Method::POST,
                url,
                &|r| r.header(CONTENT_LENGTH, 0),
                &Wait::Quick,
            )
            .await?;
        match response.status() {
            StatusCode::CREATED if mount.is_some() => Ok(Opened::Mounted),
            StatusCode::ACCEPTED => Ok(Opened::Session(
                self.session(repository, response.headers())?,
            )),
            _ => Err(Answer::read(response).await.into()),
        }
    }

    async fn session_for(&self, repository: &str) -> Result<Session, Error> {
        match self.open_session(repository, None).await? {
            Opened::Session(session) => Ok(session),
            Opened::Mounted => {
                Err(Fault::unreachable("the registry mounted a blob without a request").into())
            }
        }
    }

    /// The session that an answer describes. If the registry gives it an address under another name,
    /// the name that was configured is used instead: the credentials are for that name only.
    fn session(&self, repository: &str, headers: &HeaderMap) -> Result<Session, Fault> {
        let location = header(headers, LOCATION.as_str()).ok_or_else(|| {
            Fault::unreachable("the registry opened an upload without a Location")
        })?;
        let chunk_bytes_min = header(headers, "oci-chunk-min-length")
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        let own = self.url("")?;
        let uploads = format!("/v2/{repository}/blobs/uploads/");
        if let Ok(named) = own.join(location)
            && named.authority() != own.authority()
            && named.path().starts_with(&uploads)
            && !self.uploads_elsewhere.load(Ordering::Relaxed)
        {
            let mut url = own;
            url.set_path(named.path());
            url.set_query(named.query());
            self.uploads_renamed.store(true, Ordering::Relaxed);
            return Ok(Session {
                url,
                chunk_bytes_min,
            });
        }
        Ok(Session {
            url: self.follow(location)?,
            chunk_bytes_min,
        })
    }

    /// Sends a part of a blob, and sends it again where the registry redirects to. The HTTP client
    /// cannot do this, because the body is a stream.
    async fn send_part(
        &self,
        scope: &Scope,
        method: Method,
        mut url: Url,
        fill: &(dyn Fn(reqwest::RequestBuilder) -> reqwest::RequestBuilder + Sync),
        wait: &Wait,
    ) -> Result<Response, Error> {
        for _ in 0..limits::REGISTRY_REDIRECTS_MAX {
            let response = self
                .send(scope, method.clone(), url.clone(), fill, wait)
                .await?;
            if !matches!(
                response.status(),
                StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT
            ) {
                return Ok(response);
            }
            let Some(location) = header(response.headers(), LOCATION.as_str()) else {
                return Ok(response);
            };
            let target = url.join(location).map_err(|_| {
                Fault::unreachable("the registry redirects an upload to an invalid address")
            })?;
            url = self.follow(target.as_str())?;
        }
        Err(Fault::unreachable("the registry redirects an upload too often").into())
    }

    async fn put_whole(
        &self,
        repository: &str,
        blob: &LocalBlob,
        grown: Option<&watch::Receiver<u64>>,
    ) -> Result<(), Error> {
        let Session { mut url, .. } = self.session_for(repository).await?;
        url.query_pairs_mut()
            .append_pair("digest", &blob.digest.to_string());
        let progress = Arc::new(Progress {
            total: blob.size,
            ..Progress::default()
        });
        let fill = |request: reqwest::RequestBuilder| {
            request
                .header(CONTENT_TYPE, "application/octet-stream")
                .header(CONTENT_LENGTH, blob.size)
                .body(file_body(
                    &blob.file,
                    0,
                    blob.size,
                    grown.cloned(),
                    &progress,
                ))
        };
        let response = self
            .send_part(
                &Self::scope(repository, "pull,push"),
                Method::PUT,
                url,
                &fill,
                &Wait::Upload(progress.clone()),
            )
            .await?;
        closed(response, &blob.digest).await
    }

    async fn put_chunks(
        &self,
        repository: &str,
        blob: &LocalBlob,
        chunk: u64,
    ) -> Result<(), Error> {
        let scope = Self::scope(repository, "pull,push");
        let mut session = self.session_for(repository).await?;
        let chunk = chunk.max(session.chunk_bytes_min);
        let mut offset = 0;
        let mut resumed = false;
        while offset < blob.size {
            let len = chunk.min(blob.size - offset);
            let progress = Arc::new(Progress {
                total: len,
                ..Progress::default()
            });
            let fill = |request: reqwest::RequestBuilder| {
                request
                    .header(CONTENT_TYPE, "application/octet-stream")
                    .header(CONTENT_LENGTH, len)
                    .header(CONTENT_RANGE, format!("{offset}-{}", offset + len - 1))
                    .body(file_body(&blob.file, offset, len, None, &progress))
            };
            let sent = self
                .send_part(
                    &scope,
                    Method::PATCH,
                    session.url.clone(),
                    &fill,
                    &Wait::Upload(progress.clone()),
                )
                .await;
            let sent = match sent {
                Ok(response) if response.status() == StatusCode::ACCEPTED => Ok(response),
                Ok(response) => Err(Answer::read(response).await.into()),
                Err(error) => Err(error),
            };
            match sent {
                Ok(response) => {
                    offset += len;
                    // Missing or unusual ranges are common. A range that contradicts ours means
                    // lost or duplicated bytes.
                    if session_bytes(response.headers()).is_some_and(|bytes| bytes != offset) {
                        return Err(Fault::unreachable(
                            "the registry reports a position in the upload that differs from the sent bytes",
                        )
                        .into());
                    }
                    session = self.session(repository, response.headers())?;
                    resumed = false;
                }
                Err(error) if error.is_transient() && !resumed && offset > 0 => {
                    // The session continues only if not a single byte of the chunk was accepted.
                    session = self
                        .resume_at(repository, &scope, session, offset)
                        .await
                        .ok_or(error)?;
                    resumed = true;
                }
                Err(error) => return Err(error),
            }
        }
        let mut url = session.url;
        url.query_pairs_mut()
            .append_pair("digest", &blob.digest.to_string());
        // Empty body: Harbor uses its length as the size of the blob for the quota.
        let response = self
            .send(
                &scope,
                Method::PUT,
                url,
                &|r| r.header(CONTENT_LENGTH, 0),
                &Wait::Close,
            )
            .await?;
        closed(response, &blob.digest).await
    }

    /// Asks for the position of a session. Returns the session to continue with if the position is
    /// exactly `offset`.
    async fn resume_at(
        &self,
        repository: &str,
        scope: &Scope,
        session: Session,
        offset: u64,
    ) -> Option<Session> {
        let response = self
            .send(
                scope,
                Method::GET,
                session.url.clone(),
                &|r| r,
                &Wait::Quick,
            )
            .await
            .ok()?;
        if response.status() != StatusCode::NO_CONTENT
            || session_bytes(response.headers()) != Some(offset)
        {
            return None;
        }
        Some(
            self.session(repository, response.headers())
                .unwrap_or(session),
        )
    }

    pub(super) async fn cancel(&self, repository: &str, session: Session) {
        // Best effort: registries remove old sessions.
        let _ = self
            .send(
                &Self::scope(repository, "pull,push"),
                Method::DELETE,
                session.url,
                &|r| r,
                &Wait::Quick,
            )
            .await;
    }
}

async fn closed(response: Response, digest: &Sha256) -> Result<(), Error> {
    if !response.status().is_success() {
        return Err(Answer::read(response).await.into());
    }
    match header(response.headers(), "docker-content-digest") {
        Some(stored) if stored != digest.to_string() => Err(Fault::integrity(format!(
            "the registry stored blob {digest} under a different digest"
        ))
        .into()),
        _ => Ok(()),
    }
}

/// The number of bytes that a session has, from `Range: 0-<last>`. `0-0` is ambiguous: it means
/// none or one.
pub(crate) fn session_bytes(headers: &HeaderMap) -> Option<u64> {
    let (_, last) = header(headers, RANGE.as_str())?
        .trim_start_matches("bytes=")
        .split_once('-')?;
    let last = last.trim().parse::<u64>().ok().filter(|last| *last > 0)?;
    // The largest number is not a position in a file.
    last.checked_add(1)
}

/// A part of a file as a request body. A separate thread reads it a few buffers ahead, because it
/// waits for the registry. `grown` is the number of bytes that exist in the file.
fn file_body(
    path: &Path,
    offset: u64,
    len: u64,
    grown: Option<watch::Receiver<u64>>,
    progress: &Arc<Progress>,
) -> Body {
    let (send, receive) = mpsc::channel::<std::io::Result<Bytes>>(limits::REGISTRY_READ_AHEAD_MAX);
    let path = path.to_owned();
    progress.sent.store(0, Ordering::Relaxed);
    let runtime = Handle::current();
    let read_ahead = move || {
        let mut grown = grown;
        let mut read = || -> std::io::Result<()> {
            let mut file = None;
            let mut left = len;
            while left > 0 {
                let wanted = usize::try_from(left)
                    .unwrap_or(usize::MAX)
                    .min(limits::REGISTRY_READ_BYTES);
                let end = offset + len - left + wanted as u64;
                if let Some(grown) = &mut grown
                    && !runtime.block_on(wait_until_grown(grown, end, &send))?
                {
                    return Ok(()); // the request is over
                }
                let file = match &mut file {
                    Some(file) => file,
                    None => file.insert(open_at(&path, offset)?),
                };
                let mut buffer = BytesMut::zeroed(wanted);
                file.read_exact(&mut buffer)?;
                left -= wanted as u64;
                if send.blocking_send(Ok(buffer.freeze())).is_err() {
                    return Ok(()); // the request is over
                }
            }
            Ok(())
        };
        if let Err(error) = read() {
            let _ = send.blocking_send(Err(error));
        }
    };
    if let Err(error) = std::thread::Builder::new()
        .name("registry blob".into())
        .spawn(read_ahead)
    {
        // The body then ends too early, and the request fails.
        tracing::warn!(%error, "the thread that reads a blob could not be started");
    }
    let progress = progress.clone();
    Body::wrap_stream(futures::stream::unfold(
        (receive, progress),
        |(mut receive, progress)| async move {
            let piece = receive.recv().await?;
            if let Ok(bytes) = &piece {
                add(&progress.sent, bytes.len());
            }
            Some((piece, (receive, progress)))
        },
    ))
}

fn open_at(path: &Path, offset: u64) -> std::io::Result<File> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(offset))?;
    Ok(file)
}

/// Waits until a file has grown to `end`. Returns `false` if nobody reads the body any more.
async fn wait_until_grown(
    grown: &mut watch::Receiver<u64>,
    end: u64,
    body: &mpsc::Sender<std::io::Result<Bytes>>,
) -> std::io::Result<bool> {
    tokio::select! {
        reached = grown.wait_for(|grown| *grown >= end) => match reached {
            Ok(_) => Ok(true),
            Err(_) => Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the rest of the file is not available")),
        },
        () = body.closed() => Ok(false),
    }
}

fn add(counter: &AtomicU64, bytes: usize) {
    counter.fetch_add(bytes as u64, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_sessions() {
        let of = |text: &str| {
            let mut map = HeaderMap::new();
            map.insert(RANGE, text.parse().unwrap());
            session_bytes(&map)
        };
        assert_eq!(
            (of("0-9"), of("bytes=0-9"), of("0-0"), of("x")),
            (Some(10), Some(10), None, None)
        );
        assert_eq!(session_bytes(&HeaderMap::new()), None);
        assert_eq!(of("0-18446744073709551615"), None, "not a position");
    }
}

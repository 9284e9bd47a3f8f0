//! Blobs: look up, read, mount and delete. `upload` sends them.

use std::path::PathBuf;

use bytes::{Bytes, BytesMut};
use reqwest::header::{CONTENT_LENGTH, HeaderMap, RANGE};
use reqwest::{Method, Response, StatusCode, Url};

use crate::image::Sha256;
use crate::{Answer, Error, Registry, Wait, next_piece};
use base::fault::Fault;

use upload::Opened;

pub(crate) mod upload;

/// A blob in a local file, to be uploaded.
#[derive(Debug, Clone)]
pub struct LocalBlob {
    /// The digest, which the registry checks.
    pub digest: Sha256,
    /// In bytes.
    pub size: u64,
    /// The path of the file.
    pub file: PathBuf,
}

/// A blob that is being read.
pub struct BlobStream {
    response: Response,
    skip: u64,
}

impl BlobStream {
    /// The next piece; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        while let Some(mut piece) = next_piece(&mut self.response).await? {
            let dropped = usize::try_from(self.skip)
                .unwrap_or(usize::MAX)
                .min(piece.len());
            self.skip -= dropped as u64;
            let piece = piece.split_off(dropped);
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }
}

impl Registry {
    fn blob_url(&self, repository: &str, digest: &Sha256) -> Result<Url, Fault> {
        self.url(&format!("{repository}/blobs/{digest}"))
    }

    /// The size of a blob; `None` if the repository does not have it.
    pub async fn blob_size(&self, repository: &str, digest: &Sha256) -> Result<Option<u64>, Error> {
        // Requests the same access as the upload that may follow, so that one token serves both.
        let scope = Self::scope(repository, "pull,push");
        let response = self
            .send(
                &scope,
                Method::HEAD,
                self.blob_url(repository, digest)?,
                &|r| r,
                &Wait::Quick,
            )
            .await?;
        match response.status() {
            StatusCode::OK => Ok(
                header(response.headers(), CONTENT_LENGTH.as_str()).and_then(|v| v.parse().ok())
            ),
            StatusCode::NOT_FOUND => Ok(None),
            _ => Err(Answer::read(response).await.into()),
        }
    }

    /// Reads a blob from `offset` to its end.
    pub async fn blob_stream(
        &self,
        repository: &str,
        digest: &Sha256,
        offset: u64,
    ) -> Result<BlobStream, Error> {
        self.read_blob(repository, digest, offset, None).await
    }

    /// Reads exactly `len` bytes of a blob from `offset`.
    pub async fn blob_range(
        &self,
        repository: &str,
        digest: &Sha256,
        offset: u64,
        len: u32,
    ) -> Result<Bytes, Error> {
        if len == 0 {
            return Ok(Bytes::new());
        }
        let len = len as usize;
        let mut stream = self
            .read_blob(repository, digest, offset, Some(offset + len as u64 - 1))
            .await?;
        let mut out = BytesMut::with_capacity(len);
        while out.len() < len {
            let Some(piece) = stream.next().await? else {
                return Err(Fault::integrity(format!(
                    "blob {digest} ends before byte {}",
                    offset + len as u64
                ))
                .into());
            };
            out.extend_from_slice(&piece[..piece.len().min(len - out.len())]);
        }
        Ok(out.freeze())
    }

    async fn read_blob(
        &self,
        repository: &str,
        digest: &Sha256,
        offset: u64,
        last: Option<u64>,
    ) -> Result<BlobStream, Error> {
        let range = match last {
            Some(last) => Some(format!("bytes={offset}-{last}")),
            None if offset > 0 => Some(format!("bytes={offset}-")),
            None => None,
        };
        let fill = |request: reqwest::RequestBuilder| match &range {
            Some(range) => request.header(RANGE, range),
            None => request,
        };
        let scope = Self::scope(repository, "pull");
        let response = self
            .send(
                &scope,
                Method::GET,
                self.blob_url(repository, digest)?,
                &fill,
                &Wait::Quick,
            )
            .await?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT => Ok(BlobStream { response, skip: 0 }),
            // The registry does not support ranges and sends everything.
            StatusCode::OK => Ok(BlobStream {
                response,
                skip: offset,
            }),
            _ => Err(Answer::read(response).await.into()),
        }
    }

    /// Makes a blob of another repository available in this one, if the registry supports it. No
    /// bytes are transferred.
    pub async fn mount(
        &self,
        repository: &str,
        digest: &Sha256,
        from: &str,
    ) -> Result<bool, Error> {
        match self.open_session(repository, Some((digest, from))).await? {
            Opened::Mounted => Ok(true),
            Opened::Session(session) => {
                self.cancel(repository, session).await;
                Ok(false)
            }
        }
    }

    /// Deletes a blob from a repository. Returns whether the registry did so. Its storage may keep
    /// the blob for other repositories.
    pub async fn delete_blob(&self, repository: &str, digest: &Sha256) -> Result<bool, Error> {
        let scope = Self::scope(repository, "pull,push,delete");
        let response = self
            .send(
                &scope,
                Method::DELETE,
                self.blob_url(repository, digest)?,
                &|r| r,
                &Wait::Quick,
            )
            .await?;
        Ok(response.status().is_success())
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|v| v.to_str().ok())
}

//! Manifests and tags. Bytes are never changed, so that a digest is the same everywhere.

use bytes::Bytes;
use reqwest::header::{ACCEPT, CONTENT_TYPE, LINK};
use reqwest::{Method, Response, StatusCode};
use serde::Deserialize;

use crate::image::{DOCKER_INDEX, DOCKER_MANIFEST, Descriptor, OCI_INDEX, OCI_MANIFEST, Sha256};
use crate::{Answer, Error, Registry, Wait, answer, read_capped};
use base::fault::Fault;
use base::limits;

/// The header of a registry that has processed the `subject` of a manifest.
const OCI_SUBJECT: &str = "oci-subject";

/// A manifest from a registry.
#[derive(Debug, Clone)]
pub struct Manifest {
    /// The original bytes.
    pub bytes: Bytes,
    /// Its descriptor: the media type that the registry states, and the digest and size of these
    /// bytes.
    pub descriptor: Descriptor,
}

/// The result of a deletion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deleted {
    /// It was deleted.
    Gone,
    /// It did not exist.
    Absent,
    /// The registry does not support deletion.
    Unsupported,
}

#[derive(Deserialize)]
struct Tags {
    tags: Option<Vec<String>>,
}

pub(super) fn accept() -> String {
    [OCI_INDEX, DOCKER_INDEX, OCI_MANIFEST, DOCKER_MANIFEST].join(", ")
}

pub(super) fn digest_header(response: &Response) -> Option<Sha256> {
    response
        .headers()
        .get("docker-content-digest")?
        .to_str()
        .ok()?
        .parse()
        .ok()
}

impl Registry {
    /// Reads the manifest of a tag or digest; `None` if there is none. Checks the digest of what is
    /// read by digest.
    pub async fn get_manifest(
        &self,
        repository: &str,
        reference: &str,
        actions: &'static str,
    ) -> Result<Option<Manifest>, Error> {
        let url = self.url(&format!("{repository}/manifests/{reference}"))?;
        let response = self
            .send(
                &Self::scope(repository, actions),
                Method::GET,
                url,
                &|r| r.header(ACCEPT, accept()),
                &Wait::Quick,
            )
            .await?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Ok(None),
            _ => return Err(Answer::read(response).await.into()),
        }
        let stated = digest_header(&response);
        let media_type = response
            .headers()
            .get(CONTENT_TYPE)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default();
        let media_type = media_type
            .split(';')
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned();
        let html = answer::is_html(response.headers());
        let bytes = read_capped(response, limits::IMAGE_MANIFEST_BYTES_MAX).await?;
        if html || !is_manifest(&bytes) {
            let what = format!("read manifest {reference} of {}/{repository}", self.origin);
            return Err(not_a_manifest(what, html, &media_type, &bytes).into());
        }
        let digest = Sha256::of(&bytes);
        let wanted = reference
            .parse::<Sha256>()
            .ok()
            .or(stated)
            .unwrap_or(digest);
        if wanted != digest {
            return Err(Fault::integrity(format!(
                "the registry's manifest {reference} is {digest}, not {wanted}"
            ))
            .into());
        }
        Ok(Some(Manifest {
            descriptor: Descriptor {
                media_type,
                digest,
                size: bytes.len() as u64,
                urls: None,
                platform: None,
            },
            bytes,
        }))
    }

    /// The digest of the manifest of a tag or digest; `None` if there is none.
    pub async fn head_manifest(
        &self,
        repository: &str,
        reference: &str,
    ) -> Result<Option<Sha256>, Error> {
        let url = self.url(&format!("{repository}/manifests/{reference}"))?;
        let scope = Self::scope(repository, "pull,push");
        let response = self
            .send(
                &scope,
                Method::HEAD,
                url,
                &|r| r.header(ACCEPT, accept()),
                &Wait::Quick,
            )
            .await?;
        match response.status() {
            StatusCode::OK => match digest_header(&response) {
                Some(digest) => Ok(Some(digest)),
                None => Ok(self
                    .get_manifest(repository, reference, "pull,push")
                    .await?
                    .map(|m| m.descriptor.digest)),
            },
            StatusCode::NOT_FOUND => Ok(None),
            _ => Err(Answer::read(response).await.into()),
        }
    }

    /// Stores a manifest under a tag or its digest, and compares the digest that the registry
    /// returns. Returns whether the registry lists it among the referrers of its subject itself.
    pub async fn put_manifest(
        &self,
        repository: &str,
        reference: &str,
        media_type: &str,
        bytes: &Bytes,
        digest: &Sha256,
    ) -> Result<bool, Error> {
        let url = self.url(&format!("{repository}/manifests/{reference}"))?;
        let fill = |request: reqwest::RequestBuilder| {
            request.header(CONTENT_TYPE, media_type).body(bytes.clone())
        };
        let response = self
            .send(
                &Self::scope(repository, "pull,push"),
                Method::PUT,
                url,
                &fill,
                &Wait::Quick,
            )
            .await?;
        if !response.status().is_success() {
            return Err(Answer::read(response).await.into());
        }
        match digest_header(&response) {
            Some(theirs) if theirs != *digest => {
                Err(Fault::integrity(format!("the registry stored manifest {digest} as {theirs}: a proxy or the registry changes the bytes"))
                    .into())
            }
            _ => Ok(response.headers().contains_key(OCI_SUBJECT)),
        }
    }

    /// Deletes a manifest and every tag that refers to it.
    pub async fn delete_manifest(
        &self,
        repository: &str,
        digest: &Sha256,
    ) -> Result<Deleted, Error> {
        let url = self.url(&format!("{repository}/manifests/{digest}"))?;
        let response = self
            .send(
                &Self::scope(repository, "pull,push,delete"),
                Method::DELETE,
                url,
                &|r| r,
                &Wait::Quick,
            )
            .await?;
        match response.status() {
            StatusCode::NOT_FOUND => Ok(Deleted::Absent),
            StatusCode::METHOD_NOT_ALLOWED => Ok(Deleted::Unsupported),
            status if status.is_success() => Ok(Deleted::Gone),
            _ => Err(Answer::read(response).await.into()),
        }
    }

    /// All tags of a repository.
    pub async fn tags(&self, repository: &str) -> Result<Vec<String>, Error> {
        let mut out = Vec::new();
        let mut url = self.url(&format!("{repository}/tags/list?n=1000"))?;
        for _ in 0..limits::REGISTRY_TAG_PAGES_MAX {
            let response = self
                .send(
                    &Self::scope(repository, "pull"),
                    Method::GET,
                    url,
                    &|r| r,
                    &Wait::Quick,
                )
                .await?;
            match response.status() {
                StatusCode::OK => {}
                StatusCode::NOT_FOUND => return Ok(out),
                _ => return Err(Answer::read(response).await.into()),
            }
            let next = response
                .headers()
                .get(LINK)
                .and_then(|v| v.to_str().ok())
                .and_then(next_link)
                .map(str::to_owned);
            let body = read_capped(response, limits::REGISTRY_BODY_BYTES_MAX).await?;
            out.extend(read_tags(&body)?);
            match next {
                Some(next) => url = self.follow(&next)?,
                None => return Ok(out),
            }
        }
        Err(Fault::conflict(format!("{repository} has more tags than can be listed")).into())
    }
}

/// Whether these bytes can be a manifest or an index: a JSON object with a schema version.
fn is_manifest(bytes: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Shape {
        #[serde(rename = "schemaVersion")]
        _schema: serde::de::IgnoredAny,
    }
    serde_json::from_slice::<Shape>(bytes).is_ok()
}

/// The fault of an answer that is not a manifest although its status is 200.
fn not_a_manifest(what: String, html: bool, media_type: &str, bytes: &[u8]) -> Fault {
    let start = String::from_utf8_lossy(&bytes[..bytes.len().min(256)]).to_ascii_lowercase();
    if html || start.trim_start().starts_with('<') {
        return answer::web_page(what);
    }
    let media_type: String = media_type
        .chars()
        .map(|c| if base::text::is_unsafe(c) { ' ' } else { c })
        .take(100)
        .collect();
    Fault::unreachable(format!(
        "{what}: the answer ({media_type:?}, {} bytes) is not a manifest",
        bytes.len()
    ))
    .with_next("check the registry's address: another server or a proxy may answer there")
}

/// The tags on a page of a list of tags.
pub(crate) fn read_tags(body: &[u8]) -> Result<Vec<String>, Fault> {
    let page: Tags = serde_json::from_slice(body)
        .map_err(|_| Fault::unreachable("the registry returned a malformed list of tags"))?;
    Ok(page.tags.unwrap_or_default())
}

/// The target of `<target>; rel="next"`.
pub(super) fn next_link(header: &str) -> Option<&str> {
    let (target, rest) = header.strip_prefix('<')?.split_once('>')?;
    rest.contains("next").then_some(target)
}

#[cfg(test)]
mod tests {
    #[test]
    fn links() {
        assert_eq!(
            super::next_link(r#"</v2/a/tags/list?last=b&n=1>; rel="next""#),
            Some("/v2/a/tags/list?last=b&n=1")
        );
        assert_eq!(super::next_link("nothing"), None);
    }
}

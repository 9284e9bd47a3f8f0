//! Finds the objects that refer to an image in a registry: signatures, SBOMs and attestations.
//!
//! The sources are the referrers API (OCI 1.1), the tag `sha256-<hex>` if the registry has no such
//! API, and the tags of cosign. All requests share one short deadline and run in parallel with the
//! transfer of the blobs, so a registry that does not answer them neither fails nor delays a pull.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use futures::StreamExt as _;
use parking_lot::Mutex;
use reqwest::header::{ACCEPT, LINK};
use reqwest::{Method, StatusCode};
use serde::Deserialize;

use super::manifests::{digest_header, next_link};
use crate::image::{OCI_INDEX, Sha256};
use crate::{Error, Registry, Wait, read_capped};
use base::limits::{
    OMITTED_EXAMPLE_CHARS_MAX, REGISTRY_BODY_BYTES_MAX, REGISTRY_REFERRER_PAGES_MAX,
    REGISTRY_REFERRER_QUESTIONS_MAX, REGISTRY_REFERRER_SUBJECTS_MAX,
    REGISTRY_REFERRERS_COUNTED_MAX,
};

/// The tags that cosign adds to an image, and their meanings.
const COSIGN_TAGS: [(&str, &str); 3] = [
    ("sig", "signature"),
    ("att", "attestation"),
    ("sbom", "SBOM"),
];

/// A page of referrers, reduced to the needed fields. Lenient, because a registry may list digests
/// of any kind.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Page {
    manifests: Option<Vec<Listed>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Listed {
    digest: String,
    #[serde(default)]
    artifact_type: Option<String>,
}

/// The referrers on a page of a list; `None` when it is not such a list.
pub(crate) fn read_page(body: &[u8]) -> Option<Vec<Listed>> {
    serde_json::from_slice::<Page>(body).ok()?.manifests
}

/// An object that refers to an image.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Referrer {
    /// As the registry states it, shortened.
    pub(crate) digest: String,
    /// Cosign's tag, if it was found by it.
    pub(crate) tag: Option<String>,
    /// Its type, shortened.
    pub(crate) what: String,
}

impl Referrer {
    /// How it is reported if it stays in the registry.
    pub(crate) fn text(&self) -> String {
        format!("{} {}", self.what, self.digest)
    }
}

/// The found objects by digest, because one object may be found in several ways: by a tag first.
#[derive(Default)]
struct FoundReferrers(Mutex<BTreeMap<String, Vec<Referrer>>>);

impl FoundReferrers {
    fn add(&self, digest: &str, tag: Option<String>, what: &str) {
        let shorten = |text: &str| {
            text.chars()
                .take(OMITTED_EXAMPLE_CHARS_MAX)
                .collect::<String>()
        };
        let mut found = self.0.lock();
        if found.len() >= REGISTRY_REFERRERS_COUNTED_MAX {
            return;
        }
        let referrer = Referrer {
            digest: shorten(digest),
            tag,
            what: shorten(what),
        };
        let same = found.entry(referrer.digest.clone()).or_default();
        if same.iter().all(|other| other.tag != referrer.tag) {
            same.push(referrer);
        }
    }

    /// All of them, those of one digest by their tags if they have some.
    fn take(self) -> Vec<Referrer> {
        let mut all = Vec::new();
        for mut same in self.0.into_inner().into_values() {
            if same.iter().any(|referrer| referrer.tag.is_some()) {
                same.retain(|referrer| referrer.tag.is_some());
            }
            same.sort();
            all.extend(same);
        }
        all
    }
}

/// One request.
enum Question {
    /// The referrers of a manifest; if the registry has no such list, the fallback tag.
    List(Sha256),
    /// A tag of cosign and its meaning.
    Tag(String, &'static str),
}

impl Question {
    fn about(subject: &Sha256) -> impl Iterator<Item = Self> + use<> {
        let hex = subject.hex();
        COSIGN_TAGS
            .into_iter()
            .map(move |(suffix, what)| Self::Tag(format!("sha256-{hex}.{suffix}"), what))
            .chain([Self::List(*subject)])
    }
}

impl Registry {
    /// Finds the objects that refer to these manifests of a repository, or to each other, and are
    /// not among them. The first manifest is the top manifest of the image. Answers that arrive
    /// after `within` do not count.
    pub(super) async fn referrers(
        &self,
        repository: &str,
        subjects: &[Sha256],
        within: Duration,
    ) -> Vec<Referrer> {
        let found = FoundReferrers::default();
        let all = async {
            let mut asked = HashSet::new();
            let mut next: Vec<Sha256> = subjects.to_vec();
            while !next.is_empty() && asked.len() < REGISTRY_REFERRER_SUBJECTS_MAX {
                next.truncate(REGISTRY_REFERRER_SUBJECTS_MAX - asked.len());
                asked.extend(next.iter().copied());
                let questions = next.iter().flat_map(Question::about);
                futures::stream::iter(questions).for_each_concurrent(REGISTRY_REFERRER_QUESTIONS_MAX, |question| async {
                    if let Err(error) = self.ask(repository, question, &found).await {
                        let why = error.fault("ask for referrers");
                        tracing::debug!(registry = %self.origin, repository, error = %why, "the referrers of the image are unknown");
                    }
                }).await;
                let digests = found
                    .0
                    .lock()
                    .keys()
                    .filter_map(|digest| digest.parse().ok())
                    .collect::<Vec<Sha256>>();
                next = digests
                    .into_iter()
                    .filter(|digest| !asked.contains(digest))
                    .collect();
            }
        };
        if tokio::time::timeout(within, all).await.is_err() {
            tracing::info!(registry = %self.origin, repository, "the registry did not list the referrers of the image in time");
        }
        let is_carried = |digest: &str| {
            digest
                .parse()
                .is_ok_and(|digest: Sha256| subjects.contains(&digest))
        };
        let mut found = found.take();
        found.retain(|referrer| !is_carried(&referrer.digest));
        found
    }

    /// Whether a manifest is among the referrers of another one: according to the referrers API, or
    /// to the fallback tag.
    pub async fn lists_referrer(
        &self,
        repository: &str,
        subject: &Sha256,
        digest: &Sha256,
    ) -> Result<bool, Error> {
        let path = format!("referrers/{subject}");
        let listed = self.read_list(repository, &path).await.ok().flatten();
        let digest_text = digest.to_string();
        let is_listed = listed
            .into_iter()
            .flatten()
            .any(|listed| listed.digest == digest_text);
        Ok(is_listed || self.is_in_fallback(repository, subject, digest).await?)
    }

    async fn ask(
        &self,
        repository: &str,
        question: Question,
        found: &FoundReferrers,
    ) -> Result<(), Error> {
        match question {
            Question::Tag(tag, what) => {
                let url = self.url(&format!("{repository}/manifests/{tag}"))?;
                let fill = |request: reqwest::RequestBuilder| {
                    request.header(ACCEPT, super::manifests::accept())
                };
                let response = self
                    .send(
                        &Self::scope(repository, "pull"),
                        Method::HEAD,
                        url,
                        &fill,
                        &Wait::Quick,
                    )
                    .await?;
                if response.status() == StatusCode::OK {
                    let digest = digest_header(&response)
                        .map_or_else(|| tag.clone(), |digest| digest.to_string());
                    found.add(&digest, Some(tag), what);
                }
                Ok(())
            }
            Question::List(subject) => {
                let listed = self
                    .read_list(repository, &format!("referrers/{subject}"))
                    .await;
                let all = match listed {
                    Ok(Some(all)) => all,
                    listed => {
                        let path = format!("manifests/sha256-{}", subject.hex());
                        let of_tag = self.read_list(repository, &path).await?;
                        if of_tag.is_none() {
                            listed?;
                        }
                        of_tag.unwrap_or_default()
                    }
                };
                for listed in &all {
                    let what = listed
                        .artifact_type
                        .as_deref()
                        .filter(|what| !what.is_empty());
                    found.add(&listed.digest, None, what.unwrap_or("artifact"));
                }
                Ok(())
            }
        }
    }

    /// Reads a list of referrers; `None` if there is none.
    async fn read_list(&self, repository: &str, path: &str) -> Result<Option<Vec<Listed>>, Error> {
        let mut url = self.url(&format!("{repository}/{path}"))?;
        let mut all = Vec::new();
        for page in 0..REGISTRY_REFERRER_PAGES_MAX {
            let scope = Self::scope(repository, "pull");
            let response = self
                .send(
                    &scope,
                    Method::GET,
                    url,
                    &|request| request.header(ACCEPT, OCI_INDEX),
                    &Wait::Quick,
                )
                .await?;
            if response.status() != StatusCode::OK {
                return Ok((page > 0).then_some(all));
            }
            let next = response
                .headers()
                .get(LINK)
                .and_then(|link| link.to_str().ok())
                .and_then(next_link)
                .map(str::to_owned);
            let body = read_capped(response, REGISTRY_BODY_BYTES_MAX).await?;
            let Some(manifests) = read_page(&body) else {
                return Ok((page > 0).then_some(all));
            };
            let left = REGISTRY_REFERRERS_COUNTED_MAX.saturating_sub(all.len());
            all.extend(manifests.into_iter().take(left));
            match next {
                Some(next) => url = self.follow(&next)?,
                None => break,
            }
        }
        Ok(Some(all))
    }
}

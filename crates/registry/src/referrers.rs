//! Counts the objects that refer to an image in a registry: signatures, SBOMs and attestations. A
//! pull does not fetch them.
//!
//! The sources are the referrers API (OCI 1.1), the tag `sha256-<hex>` if the registry has no such
//! API, and the tags of cosign. All requests share one short deadline and run in parallel with the
//! transfer of the blobs, so a registry that does not answer them neither fails nor delays a pull.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt as _;
use parking_lot::Mutex;
use reqwest::header::{ACCEPT, LINK};
use reqwest::{Method, StatusCode};
use serde::Deserialize;

use super::manifests::{digest_header, next_link};
use crate::image::{OCI_INDEX, OCI_MANIFEST, Sha256};
use crate::{Error, Registry, Wait, read_capped};
use base::limits::{
    OMITTED_EXAMPLE_CHARS_MAX, REGISTRY_BODY_BYTES_MAX, REGISTRY_REFERRER_PAGES_MAX,
    REGISTRY_REFERRER_QUESTIONS_MAX, REGISTRY_REFERRER_SUBJECTS_MAX,
    REGISTRY_REFERRERS_COUNTED_MAX,
};
use base::omitted::{Category, Omitted};

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

/// The found objects by digest, because one object may be found in several ways.
#[derive(Default)]
struct FoundReferrers(Mutex<BTreeMap<String, String>>);

impl FoundReferrers {
    fn add(&self, digest: &str, what: &str) {
        let shorten = |text: &str| {
            text.chars()
                .take(OMITTED_EXAMPLE_CHARS_MAX)
                .collect::<String>()
        };
        let mut found = self.0.lock();
        if found.len() < REGISTRY_REFERRERS_COUNTED_MAX {
            found
                .entry(shorten(digest))
                .or_insert_with(|| shorten(what));
        }
    }
}

/// One request.
enum Question {
    /// The referrers of a manifest; if the registry has no such list, the fallback tag.
    List(Sha256, Fallback),
    /// A tag of cosign and its meaning.
    Tag(String, &'static str),
}

#[derive(PartialEq, Eq)]
enum Fallback {
    Tag,
    None,
}

impl Registry {
    /// Counts the objects that refer to these manifests of a repository and are not among them. The
    /// first manifest is the top manifest of the image. Answers that arrive after `within` do not
    /// count.
    pub(super) async fn referrers(
        &self,
        repository: &str,
        subjects: &[Sha256],
        within: Duration,
    ) -> Omitted {
        let found = FoundReferrers::default();
        let lists = subjects
            .iter()
            .take(REGISTRY_REFERRER_SUBJECTS_MAX)
            .enumerate();
        let lists = lists.map(|(position, subject)| {
            Question::List(
                *subject,
                if position == 0 {
                    Fallback::Tag
                } else {
                    Fallback::None
                },
            )
        });
        let tags = subjects.first().into_iter().flat_map(|top| {
            COSIGN_TAGS
                .map(|(suffix, what)| Question::Tag(format!("sha256-{}.{suffix}", top.hex()), what))
        });
        let questions: Vec<Question> = tags.chain(lists).collect();
        let all = futures::stream::iter(questions).for_each_concurrent(REGISTRY_REFERRER_QUESTIONS_MAX, |question| async {
            if let Err(error) = self.ask(repository, question, &found).await {
                let why = error.fault("ask for referrers");
                tracing::debug!(registry = %self.origin, repository, error = %why, "the referrers of the image are unknown");
            }
        });
        if tokio::time::timeout(within, all).await.is_err() {
            tracing::info!(registry = %self.origin, repository, "the registry did not list the referrers of the image in time");
        }
        let mut omitted = Omitted::default();
        let is_carried = |digest: &str| {
            digest
                .parse()
                .is_ok_and(|digest: Sha256| subjects.contains(&digest))
        };
        for (digest, what) in found
            .0
            .into_inner()
            .into_iter()
            .filter(|(digest, _)| !is_carried(digest))
        {
            omitted.add(Category::Referrers, format!("{what} {digest}"));
        }
        omitted
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
                    request.header(ACCEPT, format!("{OCI_MANIFEST}, {OCI_INDEX}"))
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
                    found.add(
                        &digest_header(&response).map_or(tag, |digest| digest.to_string()),
                        what,
                    );
                }
                Ok(())
            }
            Question::List(subject, fallback) => {
                let listed = self
                    .read_list(repository, &format!("referrers/{subject}"), found)
                    .await;
                if !matches!(listed, Ok(true)) && fallback == Fallback::Tag {
                    self.read_list(
                        repository,
                        &format!("manifests/sha256-{}", subject.hex()),
                        found,
                    )
                    .await?;
                }
                listed.map(|_| ())
            }
        }
    }

    /// Reads a list of referrers. Returns `false` if there is none.
    async fn read_list(
        &self,
        repository: &str,
        path: &str,
        found: &FoundReferrers,
    ) -> Result<bool, Error> {
        let mut url = self.url(&format!("{repository}/{path}"))?;
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
                return Ok(page > 0);
            }
            let next = response
                .headers()
                .get(LINK)
                .and_then(|link| link.to_str().ok())
                .and_then(next_link)
                .map(str::to_owned);
            let body = read_capped(response, REGISTRY_BODY_BYTES_MAX).await?;
            let Some(manifests) = read_page(&body) else {
                return Ok(page > 0);
            };
            for listed in &manifests {
                found.add(
                    &listed.digest,
                    listed
                        .artifact_type
                        .as_deref()
                        .filter(|what| !what.is_empty())
                        .unwrap_or("artifact"),
                );
            }
            match next {
                Some(next) => url = self.follow(&next)?,
                None => break,
            }
        }
        Ok(true)
    }
}

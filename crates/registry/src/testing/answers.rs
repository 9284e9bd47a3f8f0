//! Reads an answer by every parser of this crate that an answer reaches, for fuzzing.

use std::time::Instant;

use base::fault::Fault;
use reqwest::header::{HeaderMap, LINK};

use crate::answer::{Answer, retry_after};
use crate::auth::{self, Challenge, Scope};
use crate::blobs;
use crate::image::{Document, Sha256};
use crate::manifests;
use crate::referrers;

/// What the parsers made of an answer.
pub struct Read {
    /// The fault that a person would see.
    pub fault: Fault,
    /// The image manifest that the body is.
    pub manifest: Result<Document, Fault>,
    /// What else was found.
    pub notes: Vec<String>,
}

/// Reads an answer.
pub fn read(status: u16, headers: &HeaderMap, body: &[u8]) -> Read {
    let answer = Answer::from_parts(status, headers, body);
    let challenge = Challenge::parse(headers);
    let scope = Scope {
        repository: "a".into(),
        actions: "pull",
        mount_from: None,
    };
    let mut notes = vec![
        format!("{}", challenge.is_harbor()),
        format!("{}", retry_after(headers).is_some()),
        format!("{} {}", answer.is_proxy_limit(), answer.is_session_gone()),
        format!("{} {}", answer.is_policy(), answer.is_blob_unknown()),
        format!("{}", blobs::upload::session_bytes(headers).is_some()),
        format!(
            "{}",
            manifests::read_tags(body).map_or(0, |tags| tags.len().min(2))
        ),
        format!("{}", referrers::read_page(body).is_some()),
        auth::read_token(body, &scope, Instant::now())
            .err()
            .map_or_else(
                || "a token".to_owned(),
                |error| error.fault("token").message,
            ),
    ];
    notes.extend(
        headers
            .get(LINK)
            .and_then(|link| link.to_str().ok())
            .and_then(manifests::next_link)
            .map(|_| "next".to_owned()),
    );
    Read {
        fault: answer.fault("a request"),
        manifest: Document::parse(body, &Sha256::of(body)),
        notes,
    }
}

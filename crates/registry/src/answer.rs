//! The meaning of a registry's errors and timeouts: converts status, error code and body to a
//! [`Fault`].
//!
//! Registries, Harbor and the proxies in front of them report the same condition in many ways. A
//! caller that needs to branch uses [`Answer`]; all others use its fault. Upload addresses and
//! tokens never appear in a message.

use std::error::Error as _;
use std::fmt;
use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use serde::Deserialize;

use base::fault::{Code, Fault, Reason, Retry};
use base::limits;
use base::text::is_unsafe;

use crate::Settings;

/// A failed request.
#[derive(Debug)]
pub enum Error {
    /// The registry, or a proxy in front of it, returned an error.
    Answer(Box<Answer>),
    /// There was no answer, or a local operation failed.
    Fault(Fault),
}

impl Error {
    /// The fault for a user; `doing` names the operation and its target.
    pub fn fault(self, doing: impl fmt::Display) -> Fault {
        match self {
            Error::Answer(answer) => answer.fault(doing),
            Error::Fault(fault) => fault.context(doing),
        }
    }

    /// The HTTP status, if there was an answer.
    pub fn status(&self) -> Option<u16> {
        match self {
            Error::Answer(answer) => Some(answer.status),
            Error::Fault(_) => None,
        }
    }

    /// The pause that the answer requests.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Error::Answer(answer) => answer.retry_after,
            Error::Fault(_) => None,
        }
    }

    /// Whether the registry asks for a pause.
    pub fn asks_for_pause(&self) -> bool {
        matches!(self.status(), Some(429 | 503))
    }

    /// Whether the same request may succeed a little later: after a server error, or without an
    /// answer.
    pub fn is_transient(&self) -> bool {
        match self {
            Error::Answer(answer) => {
                (answer.status >= 500 || matches!(answer.status, 408 | 425 | 429))
                    && !answer.is_full()
            }
            Error::Fault(fault) => {
                fault.reason == Reason::SinkUnavailable && fault.retry == Retry::Backoff
            }
        }
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Error::Fault(fault)
    }
}

impl From<Answer> for Error {
    fn from(answer: Answer) -> Self {
        Error::Answer(Box::new(answer))
    }
}

/// An unsuccessful answer.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    pub status: u16,
    /// The first error code in the body (`DENIED`, …), or empty.
    pub code: String,
    /// The message in the body, as one short line.
    pub message: String,
    /// Whether the body is an HTML page, which means that a proxy answered.
    pub html: bool,
    /// Whether the storage driver reports a full disk or quota.
    pub storage_full: bool,
    /// The requested pause.
    pub retry_after: Option<Duration>,
}

#[derive(Deserialize)]
struct Body {
    errors: Vec<BodyError>,
}

#[derive(Deserialize)]
struct BodyError {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    detail: serde_json::Value,
}

impl Answer {
    /// Reads the rest of an answer.
    pub async fn read(response: reqwest::Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = super::read_capped(response, limits::REGISTRY_BODY_BYTES_MAX)
            .await
            .unwrap_or_default();
        Self::from_parts(status, &headers, &body)
    }

    /// Creates an answer from its parts.
    pub fn from_parts(status: u16, headers: &HeaderMap, body: &[u8]) -> Self {
        let start = String::from_utf8_lossy(&body[..body.len().min(256)])
            .trim_start()
            .to_ascii_lowercase();
        let html =
            is_html(headers) || start.starts_with("<!doctype html") || start.starts_with("<html");
        let mut answer = Self {
            status,
            html,
            retry_after: retry_after(headers),
            ..Self::default()
        };
        if let Ok(body) = serde_json::from_slice::<Body>(body) {
            if let Some(first) = body.errors.into_iter().next() {
                answer.code = one_line(&first.code, 60);
                answer.message = one_line(&first.message, 300);
                // Only the detail reports a full disk: docker-registry puts the error of its
                // storage driver there.
                if status >= 500 && !first.detail.is_null() {
                    answer.storage_full = names_full_disk(&first.detail);
                    answer.message =
                        one_line(&format!("{}: {}", answer.message, first.detail), 400);
                }
            }
        } else if !html {
            answer.message = one_line(&String::from_utf8_lossy(&body[..body.len().min(1024)]), 200);
        }
        answer
    }

    /// Whether a proxy rejected the request as too large. The registry itself would answer in JSON.
    pub fn is_proxy_limit(&self) -> bool {
        self.status == 413 && self.code.is_empty()
    }

    /// Whether a blob sent with one request was refused in a way that a registry refuses which
    /// accepts only chunks.
    pub fn refuses_whole_blobs(&self) -> bool {
        let of_other_cause = matches!(
            self.code.as_str(),
            "DIGEST_INVALID"
                | "SIZE_INVALID"
                | "NAME_INVALID"
                | "NAME_UNKNOWN"
                | "DENIED"
                | "UNAUTHORIZED"
                | "BLOB_UPLOAD_UNKNOWN"
                | "BLOB_UPLOAD_INVALID"
        );
        matches!(self.status, 400 | 405 | 411 | 415 | 416 | 501)
            && !of_other_cause
            && !self.is_full()
            && !self.is_read_only()
    }

    /// Whether the upload session is gone, so that a new one must start from the first byte.
    pub fn is_session_gone(&self) -> bool {
        self.status == 404
            && matches!(
                self.code.as_str(),
                "BLOB_UPLOAD_UNKNOWN" | "BLOB_UPLOAD_INVALID"
            )
            || self.status == 400 && self.code == "BLOB_UPLOAD_INVALID"
            || self.status == 416
    }

    /// Whether a policy of the registry blocks a read of an existing object. Harbor answers so to
    /// GET and HEAD of an image without a scan report or signature; a HEAD has no message. A PUT on
    /// an immutable tag has a message.
    pub fn is_policy(&self) -> bool {
        self.status == 412 && (self.code == "PROJECTPOLICYVIOLATION" || self.code.is_empty())
    }

    /// Whether a manifest was rejected because a blob or manifest that it references is missing.
    pub fn is_blob_unknown(&self) -> bool {
        matches!(self.code.as_str(), "MANIFEST_BLOB_UNKNOWN" | "BLOB_UNKNOWN")
            && matches!(self.status, 400 | 404)
    }

    fn is_full(&self) -> bool {
        let message = self.message.to_ascii_lowercase();
        self.status == 507
            || self.storage_full
            || message.contains("no space left")
            || message.contains("disk quota exceeded")
            || message.contains("insufficient storage")
            || message.contains("xminiostoragefull") // MinIO below docker-registry
            || self.status != 500
                && message.contains("exceed")
                && (message.contains("upper limit") || message.contains("quota"))
    }

    fn is_read_only(&self) -> bool {
        let message = self.message.to_ascii_lowercase();
        ["read only", "read-only", "readonly"]
            .iter()
            .any(|text| message.contains(text))
    }

    /// The fault of a refused blob: a limit on the size of requests is not one of manifests.
    pub fn fault_of_blob(&self, doing: impl fmt::Display) -> Fault {
        let fault = self.fault(doing);
        if self.status == 413 && !self.is_full() {
            return fault.with_next(
                "raise the limit on the size of requests at the registry and at the proxies in front of it (nginx: client_max_body_size), then run 'packhorse retry'",
            );
        }
        fault
    }

    fn summary(&self) -> String {
        let name = reqwest::StatusCode::from_u16(self.status)
            .ok()
            .and_then(|s| s.canonical_reason())
            .unwrap_or("unknown status");
        let mut out = format!(
            "{} answered {} {name}",
            if self.html && self.status >= 400 {
                "a proxy in front of the registry"
            } else {
                "the registry"
            },
            self.status
        );
        for part in [&self.code, &self.message] {
            if !part.is_empty() {
                out = format!("{out}: {part}");
            }
        }
        out
    }

    /// Converts the answer to a fault.
    pub fn fault(&self, doing: impl fmt::Display) -> Fault {
        let text = format!("{doing}: {}", self.summary());
        let lower = self.message.to_ascii_lowercase();
        let backoff = |fault: Fault| match self.retry_after {
            Some(pause) => fault.with_retry_after(pause),
            None => fault,
        };
        let rejected = |next: &str| Fault::conflict(text.clone()).with_next(next);
        if self.is_full() {
            return backoff(Fault::no_space(text.clone()))
                .with_next("raise the project's quota or free space at the registry; the transfer resumes automatically");
        }
        if self.html && self.status < 400 {
            return web_page(doing);
        }
        if self.is_read_only() {
            return Fault::unreachable(text)
                .with_retry_after(self.retry_after.unwrap_or(limits::REGISTRY_READ_ONLY_PAUSE))
                .with_next("end the registry's read-only mode; this is retried automatically");
        }
        match (self.status, self.code.as_str()) {
            (403, _) if lower.contains("proxy") => rejected("choose a project that is not a proxy cache"),
            (401, _) => Fault::not_allowed(text).with_next(
                "check username and password_file (an expired robot account gives the same error), the permission to push, and that the project exists",
            ),
            (403, _) | (_, "DENIED" | "UNAUTHORIZED") => {
                Fault::not_allowed(text).with_next("give the registry user permission to pull and push there, then run 'packhorse retry'")
            }
            (404, "NAME_UNKNOWN" | "NAME_INVALID") => no_project(text),
            (404, _) if lower.contains("project") => no_project(text),
            (404, _) if self.is_session_gone() => {
                Fault::unreachable(text).with_next("the registry lost the upload; it is restarted automatically")
            }
            (404, _) => backoff(Fault::unreachable(text))
                .with_next("the registry may be collecting garbage, or this is not a registry; this is retried automatically"),
            (405, _) => rejected("allow this operation at the registry, or use another registry"),
            (409, _) => {
                Fault::conflict(text).with_reason(Reason::SinkUnavailable).with_retry(Retry::Backoff).with_next("no action is needed: this is retried automatically")
            }
            (412, _) if self.is_policy() => Fault::not_allowed(text).with_retry(Retry::Backoff).with_next(
                "a policy of the registry blocks the image until it is scanned or signed; the image is complete and must not be deleted; see the project's policies in Harbor",
            ),
            (412, _) => rejected("the tag is immutable and refers to a different image: publish under another version"),
            (413, _) if self.is_proxy_limit() => {
                rejected("raise the proxy's limit on request bodies (nginx: client_max_body_size), then run 'packhorse retry'")
            }
            (413, _) => rejected("the manifest is too large for the registry; build the image with fewer layers or platforms"),
            (400, "DIGEST_INVALID" | "SIZE_INVALID") => Fault::integrity(text).with_next("publish the image again"),
            (400, _) if self.is_blob_unknown() => Fault::conflict(text)
                .with_reason(Reason::SinkUnavailable)
                .with_retry(Retry::Backoff)
                .with_next("the registry removed a blob (garbage collection); it is pushed again automatically"),
            (400, _) if lower.contains("https server") => {
                Fault::config(text).with_reason(Reason::SinkUnavailable).with_next("use https:// in the registry's url")
            }
            (408 | 425 | 429, _) => backoff(Fault::unreachable(text)).with_next("the registry asks for a pause; this is retried automatically"),
            (500.., _) => backoff(Fault::unreachable(text)).with_next("check the registry's log; this is retried automatically"),
            (300..400, _) => {
                Fault::config(text).with_reason(Reason::SinkUnavailable).with_next("use the address that the registry redirects to")
            }
            _ => rejected("check the registry's log, then run 'packhorse retry'"),
        }
    }
}

/// The fault of a web page in place of an answer of the registry: its address is wrong, or a login
/// page answers.
pub(super) fn web_page(doing: impl fmt::Display) -> Fault {
    Fault::unreachable(format!(
        "{doing}: a web page answered, not a registry"
    ))
    .with_next(
        "check the registry's address; a proxy or a login page in front of it must let requests to /v2/ through",
    )
}

/// Whether the body is a web page according to its type.
pub(super) fn is_html(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| {
            value
                .trim_start()
                .to_ascii_lowercase()
                .starts_with("text/html")
        })
}

/// Whether the error of a storage driver contains the number of ENOSPC or EDQUOT: docker-registry
/// writes `"Err":28` without text.
fn names_full_disk(detail: &serde_json::Value) -> bool {
    match detail {
        serde_json::Value::Object(map) => {
            map.get("Err")
                .and_then(serde_json::Value::as_i64)
                .is_some_and(|number| matches!(number, 28 | 122))
                || map.values().any(names_full_disk)
        }
        _ => false,
    }
}

fn no_project(text: String) -> Fault {
    Fault {
        code: Code::Config,
        ..Fault::not_allowed(text)
    }
    .with_next("create the project at the registry, or set create_project = true")
}

/// The pause requested by the headers of an answer.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let pause = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let at = jiff::fmt::rfc2822::DateTimeParser::new()
                .parse_timestamp(text)
                .ok()?;
            let millis = at
                .as_millisecond()
                .saturating_sub(base::clock::now().as_millisecond());
            Duration::from_millis(u64::try_from(millis).unwrap_or(0))
        }
    };
    Some(pause.min(limits::REGISTRY_RETRY_AFTER_MAX))
}

/// Text of a server, safe to print: one line, no control characters, limited length.
fn one_line(text: &str, chars_max: usize) -> String {
    let clean: String = text
        .chars()
        .map(|c| if is_unsafe(c) { ' ' } else { c })
        .collect();
    clean
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .chars()
        .take(chars_max)
        .collect()
}

/// Why a request has no answer.
pub(crate) struct NoAnswer {
    why: String,
    advice: Option<Advice>,
}

/// What the user can do. Some of it depends on where the access is configured.
enum Advice {
    Text(&'static str),
    /// The certificate is not trusted.
    Untrusted,
    /// The server does not use TLS.
    WithoutTls,
}

impl NoAnswer {
    fn new(why: impl Into<String>, advice: impl Into<Option<Advice>>) -> Self {
        Self {
            why: why.into(),
            advice: advice.into(),
        }
    }

    /// The fault for a user who accesses the registry `host` with these settings.
    pub(crate) fn fault(self, settings: &Settings, host: &str) -> Fault {
        let fault = Fault::unreachable(self.why);
        match self.advice {
            None => fault,
            Some(Advice::Text(next)) => fault.with_next(next),
            Some(Advice::Untrusted) => fault.with_next(settings.untrusted(host)),
            Some(Advice::WithoutTls) => fault.with_next(settings.without_tls()),
        }
    }
}

/// `host[:port]` of an address.
pub(crate) fn authority(url: &reqwest::Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port()
        .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// Why a request has no answer.
pub(crate) fn no_answer(error: &reqwest::Error) -> NoAnswer {
    if error.is_timeout() {
        return NoAnswer::new("no answer in time", None);
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
    let mut last = "the request failed".to_owned();
    while let Some(this) = cause {
        last = one_line(&this.to_string(), 300);
        if last.starts_with("dns error") || last.contains("failed to lookup address") {
            let next = "check the registry's host name and this machine's DNS";
            return NoAnswer::new("its host name cannot be resolved", Advice::Text(next));
        }
        if let Some(tls) = this.downcast_ref::<rustls::Error>() {
            return tls_fault(tls);
        }
        if let Some(io) = this.downcast_ref::<std::io::Error>() {
            if let Some(tls) = inner_tls_error(io) {
                return tls_fault(tls);
            }
            if io.kind() == std::io::ErrorKind::ConnectionRefused {
                let next = "check that the registry is running and that the port is correct";
                return NoAnswer::new("connection refused", Advice::Text(next));
            }
        }
        cause = this.source();
    }
    NoAnswer::new(last, None)
}

/// The TLS error inside an I/O error. It may be wrapped several times and is not a `source`.
fn inner_tls_error(error: &std::io::Error) -> Option<&rustls::Error> {
    let inner = error.get_ref()?;
    match inner.downcast_ref::<rustls::Error>() {
        Some(tls) => Some(tls),
        None => inner_tls_error(inner.downcast_ref::<std::io::Error>()?),
    }
}

fn tls_fault(error: &rustls::Error) -> NoAnswer {
    use rustls::CertificateError as C;
    let (why, advice) = match error {
        rustls::Error::InvalidCertificate(C::UnknownIssuer) => (
            "its certificate is not signed by a trusted authority".into(),
            Advice::Untrusted,
        ),
        // webpki: a certificate of an authority, used as that of a server.
        rustls::Error::InvalidCertificate(other)
            if format!("{other:?}").contains("CaUsedAsEndEntity") =>
        {
            (
                "its certificate is one of an authority and is not trusted as the registry's own"
                    .into(),
                Advice::Untrusted,
            )
        }
        rustls::Error::InvalidCertificate(C::Expired | C::ExpiredContext { .. }) => (
            "its certificate has expired".into(),
            Advice::Text("renew the registry's certificate"),
        ),
        rustls::Error::InvalidCertificate(
            C::NotValidForName | C::NotValidForNameContext { .. },
        ) => (
            "its certificate is for a different name".into(),
            Advice::Text("use the name in the registry's certificate"),
        ),
        rustls::Error::InvalidMessage(_) => ("it does not use TLS".into(), Advice::WithoutTls),
        other => (
            one_line(&other.to_string(), 200),
            Advice::Text("check the registry's certificate and TLS settings"),
        ),
    };
    NoAnswer::new(format!("TLS: {why}"), advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, headers: &[(&'static str, &str)], body: &str) -> Answer {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, value.parse().unwrap());
        }
        Answer::from_parts(status, &map, body.as_bytes())
    }

    fn error(code: &str, message: &str) -> String {
        serde_json::json!({"errors": [{"code": code, "message": message}]}).to_string()
    }

    #[test]
    fn answers_become_faults() {
        use Code as C;
        use Reason as R;
        let html = "<html><body>413 Request Entity Too Large</body></html>";
        let cases = [
            (401, error("UNAUTHORIZED", "unauthorized"), C::NotAllowed, R::SinkDenied, Retry::Never),
            (
                403,
                error(
                    "DENIED",
                    "adding 2.0 MiB of storage resource, which when updated to current usage of 9 MiB will exceed the configured upper limit of 10.0 MiB.",
                ),
                C::NoSpace,
                R::NoSpace,
                Retry::Backoff,
            ),
            (
                403,
                error("DENIED", "The system is in read only mode. Any modification is prohibited."),
                C::Unreachable,
                R::SinkUnavailable,
                Retry::AfterMs(60_000),
            ),
            (403, error("DENIED", "can not push artifact to a proxy project"), C::Conflict, R::SinkRefused, Retry::Never),
            (403, error("DENIED", "requested access to the resource is denied"), C::NotAllowed, R::SinkDenied, Retry::Never),
            (404, error("BLOB_UPLOAD_UNKNOWN", ""), C::Unreachable, R::SinkUnavailable, Retry::Backoff),
            (404, error("NOT_FOUND", "blob not found"), C::Unreachable, R::SinkUnavailable, Retry::Backoff),
            (404, error("NOT_FOUND", "project op not found"), C::Config, R::SinkDenied, Retry::Never),
            (409, error("CONFLICT", ""), C::Conflict, R::SinkUnavailable, Retry::Backoff),
            (412, error("PRECONDITION", "configured as immutable"), C::Conflict, R::SinkRefused, Retry::Never),
            (
                412,
                error("PROJECTPOLICYVIOLATION", "current image without vulnerability scanning"),
                C::NotAllowed,
                R::SinkDenied,
                Retry::Backoff,
            ),
            (412, String::new(), C::NotAllowed, R::SinkDenied, Retry::Backoff),
            (413, html.into(), C::Conflict, R::SinkRefused, Retry::Never),
            (413, error("MANIFEST_INVALID", "too large"), C::Conflict, R::SinkRefused, Retry::Never),
            (400, error("MANIFEST_BLOB_UNKNOWN", ""), C::Conflict, R::SinkUnavailable, Retry::Backoff),
            (400, error("DIGEST_INVALID", ""), C::Integrity, R::Integrity, Retry::Never),
            (400, error("MANIFEST_INVALID", ""), C::Conflict, R::SinkRefused, Retry::Never),
            (429, error("TOOMANYREQUESTS", ""), C::Unreachable, R::SinkUnavailable, Retry::Backoff),
            (500, error("UNKNOWN", "unknown error"), C::Unreachable, R::SinkUnavailable, Retry::Backoff),
            (502, "<html>Bad Gateway</html>".into(), C::Unreachable, R::SinkUnavailable, Retry::Backoff),
            (
                500,
                r#"{"errors":[{"code":"UNKNOWN","message":"unknown error","detail":{"Err":"write: no space left on device"}}]}"#.into(),
                C::NoSpace,
                R::NoSpace,
                Retry::Backoff,
            ),
            (
                500,
                r#"{"errors":[{"code":"UNKNOWN","message":"unknown error","detail":{"DriverName":"filesystem","Enclosed":{"Op":"write","Path":"/r","Err":28}}}]}"#.into(),
                C::NoSpace,
                R::NoSpace,
                Retry::Backoff,
            ),
            (
                500,
                r#"{"errors":[{"code":"UNKNOWN","message":"unknown error","detail":{"DriverName":"filesystem","Enclosed":{"Op":"open","Path":"/28","Err":2}}}]}"#.into(),
                C::Unreachable,
                R::SinkUnavailable,
                Retry::Backoff,
            ),
        ];
        for (status, body, code, reason, retry) in cases {
            let fault = answer(status, &[], &body).fault("push");
            assert_eq!(
                (fault.code, fault.reason, fault.retry),
                (code, reason, retry),
                "{status} {body}"
            );
            assert!(!fault.next.is_empty(), "{fault:?}");
            assert!(status != 412 || !fault.next.contains("remove"), "{fault:?}");
        }
    }

    #[test]
    fn retry_after_is_parsed_in_both_forms() {
        assert_eq!(
            answer(429, &[("retry-after", "7")], "").fault("x").retry,
            Retry::AfterMs(7_000)
        );
        assert_eq!(
            answer(503, &[("retry-after", "Fri, 01 Jan 2100 00:00:00 GMT")], "")
                .fault("x")
                .retry,
            Retry::AfterMs(3_600_000)
        );
        assert_eq!(
            answer(429, &[("retry-after", "soon")], "").fault("x").retry,
            Retry::Backoff
        );
    }

    #[test]
    fn html_pages_are_reported_but_not_quoted() {
        let page = answer(
            504,
            &[("content-type", "text/html")],
            "<html>\n<h1>504</h1></html>",
        );
        assert_eq!(
            page.fault("push blob x").message,
            "push blob x: a proxy in front of the registry answered 504 Gateway Timeout"
        );
        assert!(
            answer(413, &[], "<html>").is_proxy_limit()
                && !answer(413, &[], &error("MANIFEST_INVALID", "")).is_proxy_limit()
        );
        assert_eq!(one_line("a\n\u{1b}[31mb", 50), "a [31mb");
    }
}

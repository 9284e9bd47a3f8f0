//! What a registry's refusals and silences mean: the one table from status, error code and body to
//! a [`Fault`].
//!
//! Registries, Harbor and the proxies before them say the same thing in many ways; whoever needs to
//! branch looks at [`Answer`], everybody else takes its fault. Addresses of uploads and tokens
//! never get into a message.

use std::error::Error as _;
use std::fmt;
use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};
use serde::Deserialize;

use base::fault::{Code, Fault, Reason, Retry};
use base::limits;
use base::text::is_unsafe;

/// A request that did not do what was asked.
#[derive(Debug)]
pub enum Error {
    /// The registry, or something before it, answered otherwise.
    Answer(Box<Answer>),
    /// It did not answer, or something here failed.
    Fault(Fault),
}

impl Error {
    /// What a person is told; `doing` says what was tried and where.
    pub fn fault(self, doing: impl fmt::Display) -> Fault {
        match self {
            Error::Answer(answer) => answer.fault(doing),
            Error::Fault(fault) => fault.context(doing),
        }
    }

    /// The answer's status, when there was an answer.
    pub fn status(&self) -> Option<u16> {
        match self {
            Error::Answer(answer) => Some(answer.status),
            Error::Fault(_) => None,
        }
    }

    /// The pause that the answer asks for.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Error::Answer(answer) => answer.retry_after,
            Error::Fault(_) => None,
        }
    }

    /// Whether the registry asks to come back later.
    pub fn asks_for_pause(&self) -> bool {
        matches!(self.status(), Some(429 | 503))
    }

    /// Whether the same request may well succeed a moment later: a server's own error, or no
    /// answer.
    pub fn is_passing(&self) -> bool {
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

/// An answer that is not the one hoped for.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The first error code in the body (`DENIED`, …), or nothing.
    pub code: String,
    /// What the body says, in one short line.
    pub message: String,
    /// Whether the body is a page for people, so it was a proxy that answered.
    pub html: bool,
    /// Whether the storage driver reports that its disk or its quota is full.
    pub storage_full: bool,
    /// The pause that was asked for.
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
    /// Reads what is left of an answer.
    pub async fn read(response: reqwest::Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = super::read_capped(response, limits::REGISTRY_BODY_BYTES_MAX)
            .await
            .unwrap_or_default();
        Self::from_parts(status, &headers, &body)
    }

    /// The same from parts.
    pub fn from_parts(status: u16, headers: &HeaderMap, body: &[u8]) -> Self {
        let content_type = headers
            .get(CONTENT_TYPE)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default();
        let start = String::from_utf8_lossy(&body[..body.len().min(256)])
            .trim_start()
            .to_ascii_lowercase();
        let html = content_type.starts_with("text/html")
            || start.starts_with("<!doctype html")
            || start.starts_with("<html");
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
                // A full disk stands in the detail only, where docker-registry puts what its
                // storage driver said.
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

    /// Whether a proxy before the registry finds the request too large; the registry itself says so
    /// in JSON.
    pub fn is_proxy_limit(&self) -> bool {
        self.status == 413 && self.code.is_empty()
    }

    /// Whether the upload session is gone, so that a new one has to start from the first byte.
    pub fn is_session_gone(&self) -> bool {
        self.status == 404
            && matches!(
                self.code.as_str(),
                "BLOB_UPLOAD_UNKNOWN" | "BLOB_UPLOAD_INVALID"
            )
            || self.status == 400 && self.code == "BLOB_UPLOAD_INVALID"
            || self.status == 416
    }

    /// Whether a read was refused by a policy of the registry, though what was asked for is there:
    /// Harbor answers so to GET and HEAD of an image without a scan report or a signature. To HEAD
    /// without words; a PUT that meets an immutable tag has some.
    pub fn is_policy(&self) -> bool {
        self.status == 412 && (self.code == "PROJECTPOLICYVIOLATION" || self.code.is_empty())
    }

    /// Whether a manifest was refused because something that it names is not there.
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
            || self.status != 500
                && message.contains("exceed")
                && (message.contains("upper limit") || message.contains("quota"))
    }

    fn said(&self) -> String {
        let name = reqwest::StatusCode::from_u16(self.status)
            .ok()
            .and_then(|s| s.canonical_reason())
            .unwrap_or("unknown status");
        let mut out = format!(
            "{} answered {} {name}",
            if self.html {
                "a proxy before the registry"
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

    /// What it means.
    pub fn fault(&self, doing: impl fmt::Display) -> Fault {
        let text = format!("{doing}: {}", self.said());
        let lower = self.message.to_ascii_lowercase();
        let backoff = |fault: Fault| match self.retry_after {
            Some(pause) => fault.with_retry_after(pause),
            None => fault,
        };
        let refused = |next: &str| Fault::conflict(text.clone()).with_next(next);
        if self.is_full() {
            return backoff(Fault::no_space(text.clone()))
                .with_next("raise the project's quota or make room at the registry; the transfer goes on by itself");
        }
        if lower.contains("read only") || lower.contains("read-only") || lower.contains("readonly")
        {
            return Fault::unreachable(text)
                .with_retry_after(self.retry_after.unwrap_or(limits::REGISTRY_READ_ONLY_PAUSE))
                .with_next("end the registry's read-only mode; this is tried again by itself");
        }
        match (self.status, self.code.as_str()) {
            (403, _) if lower.contains("proxy") => refused("choose a project that is not a proxy cache"),
            (401, _) => Fault::not_allowed(text).with_next(
                "check username and password_file (a robot account that expired looks the same), its right to push, and that the project exists",
            ),
            (403, _) | (_, "DENIED" | "UNAUTHORIZED") => {
                Fault::not_allowed(text).with_next("give the registry user the right to pull and push there, then 'packhorse retry'")
            }
            (404, "NAME_UNKNOWN" | "NAME_INVALID") => no_project(text),
            (404, _) if lower.contains("project") => no_project(text),
            (404, _) if self.is_session_gone() => {
                Fault::unreachable(text).with_next("the registry lost the upload; it starts again by itself")
            }
            (404, _) => backoff(Fault::unreachable(text))
                .with_next("the registry may be collecting garbage, or this is no registry; it is tried again by itself"),
            (405, _) => refused("allow this at the registry, or use another one"),
            (409, _) => {
                Fault::conflict(text).with_reason(Reason::SinkUnavailable).with_retry(Retry::Backoff).with_next("it is tried again by itself")
            }
            (412, _) if self.is_policy() => Fault::not_allowed(text).with_retry(Retry::Backoff).with_next(
                "a policy of the registry does not give the image out until it is scanned or signed; it is there: leave it as it is, and see the project's policies in Harbor",
            ),
            (412, _) => refused("the tag is immutable and names another image: publish under another version"),
            (413, _) if self.is_proxy_limit() => {
                refused("raise the proxy's limit on request bodies (nginx: client_max_body_size), then 'packhorse retry'")
            }
            (413, _) => refused("the manifest is larger than the registry takes; make the image of fewer layers or platforms"),
            (400, "DIGEST_INVALID" | "SIZE_INVALID") => Fault::integrity(text).with_next("publish the image again"),
            (400, _) if self.is_blob_unknown() => Fault::conflict(text)
                .with_reason(Reason::SinkUnavailable)
                .with_retry(Retry::Backoff)
                .with_next("the registry lost a blob meanwhile (garbage collection); it is pushed again by itself"),
            (400, _) if lower.contains("https server") => {
                Fault::config(text).with_reason(Reason::SinkUnavailable).with_next("write the registry's url with https://")
            }
            (408 | 425 | 429, _) => backoff(Fault::unreachable(text)).with_next("the registry asks for a pause; it is tried again by itself"),
            (500.., _) => backoff(Fault::unreachable(text)).with_next("look at the registry's log; this is tried again by itself"),
            (300..400, _) => {
                Fault::config(text).with_reason(Reason::SinkUnavailable).with_next("write the address that the registry redirects to")
            }
            _ => refused("look at the registry's log, then 'packhorse retry'"),
        }
    }
}

/// Whether a storage driver's error holds the number of ENOSPC or EDQUOT: docker-registry writes
/// `"Err":28` and no words.
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
    .with_next("make the project at the registry, or set create_project = true")
}

/// The pause that an answer asks for.
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

/// A server's words, safe to print: one line, no control characters, bounded.
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

/// A request that got no answer at all.
pub fn no_answer(error: &reqwest::Error) -> Fault {
    if error.is_timeout() {
        return Fault::unreachable("no answer in time");
    }
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
    let mut last = "the request failed".to_owned();
    while let Some(this) = cause {
        last = one_line(&this.to_string(), 300);
        if last.starts_with("dns error") || last.contains("failed to lookup address") {
            return Fault::unreachable("its name cannot be resolved")
                .with_next("check the registry's host name and this machine's DNS");
        }
        if let Some(tls) = this.downcast_ref::<rustls::Error>() {
            return tls_fault(tls);
        }
        if let Some(io) = this.downcast_ref::<std::io::Error>() {
            if let Some(tls) = tls_inside(io) {
                return tls_fault(tls);
            }
            if io.kind() == std::io::ErrorKind::ConnectionRefused {
                return Fault::unreachable("connection refused")
                    .with_next("check that the registry runs and that the port is right");
            }
        }
        cause = this.source();
    }
    Fault::unreachable(last)
}

/// The TLS error in an I/O error, which may be wrapped more than once and is no `source` of it.
fn tls_inside(error: &std::io::Error) -> Option<&rustls::Error> {
    let inner = error.get_ref()?;
    match inner.downcast_ref::<rustls::Error>() {
        Some(tls) => Some(tls),
        None => tls_inside(inner.downcast_ref::<std::io::Error>()?),
    }
}

fn tls_fault(error: &rustls::Error) -> Fault {
    use rustls::CertificateError as C;
    let (why, next) = match error {
        rustls::Error::InvalidCertificate(C::UnknownIssuer) => (
            "its certificate is signed by nobody this machine trusts".into(),
            "set ca_file to the certificate of the authority that signed it",
        ),
        rustls::Error::InvalidCertificate(C::Expired | C::ExpiredContext { .. }) => (
            "its certificate has expired".into(),
            "renew the registry's certificate",
        ),
        rustls::Error::InvalidCertificate(
            C::NotValidForName | C::NotValidForNameContext { .. },
        ) => (
            "its certificate is for another name".into(),
            "use the name that stands in the registry's certificate",
        ),
        rustls::Error::InvalidMessage(_) => (
            "it does not speak TLS".into(),
            "write the registry's url with http:// if that is meant",
        ),
        other => (
            one_line(&other.to_string(), 200),
            "check the registry's certificate and TLS settings",
        ),
    };
    Fault::unreachable(format!("TLS: {why}")).with_next(next)
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
    fn the_table() {
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
    fn retry_after_is_obeyed_in_both_forms() {
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
    fn pages_are_not_repeated_but_named() {
        let page = answer(
            504,
            &[("content-type", "text/html")],
            "<html>\n<h1>504</h1></html>",
        );
        assert_eq!(
            page.fault("push blob x").message,
            "push blob x: a proxy before the registry answered 504 Gateway Timeout"
        );
        assert!(
            answer(413, &[], "<html>").is_proxy_limit()
                && !answer(413, &[], &error("MANIFEST_INVALID", "")).is_proxy_limit()
        );
        assert_eq!(one_line("a\n\u{1b}[31mb", 50), "a [31mb");
    }
}

//! A client of OCI registries (distribution specification 1.1, and Harbor), optimised for few large
//! blobs: it streams from and to files with bounded memory, checks for existing blobs before it
//! sends them, and returns errors that a user can act on.
//!
//! The image sink pushes with it, the image source pulls with it. It keeps tokens in memory and
//! nothing on disk: after a crash the caller repeats the request, and blobs that the registry has
//! are not sent again.

mod access;
pub mod answer;
mod auth;
mod blobs;
mod docker_config;
mod fallback;
mod harbor;
pub mod image;
mod manifests;
mod pull;
pub mod reference;
mod referrers;
mod silence;
mod stream;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(test)]
mod tests;
mod tls;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use reqwest::header::AUTHORIZATION;
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};

pub use access::{Access, Settings};
pub use answer::{Answer, Error};
pub use auth::Credentials;
pub use blobs::{BlobStream, LocalBlob};
pub use docker_config::{files as docker_config_files, find as docker_config_credentials};
pub use fallback::subject_of;
pub use manifests::{Deleted, Manifest};
pub use pull::{Selection, pull_keeping, pull_to_layout};
pub use reference::{Origin, Reference};

use auth::{Auth, Challenge, Scope};
use base::fault::{Fault, Reason};
use base::limits;
use silence::{Pending, Silence};

/// The requests whose redirects are remembered at once.
const REDIRECTS_KEPT: usize = 64;

/// One registry with one set of credentials. Share it in an `Arc`.
pub struct Registry {
    http: reqwest::Client,
    origin: Origin,
    auth: Auth,
    settings: Settings,
    /// The chunk size of an upload; 0 sends complete blobs, until the registry or a proxy rejects
    /// that.
    chunk_bytes: AtomicU64,
    /// Whether uploads go to another host than the registry, because the registry does not know
    /// them under its own name.
    uploads_elsewhere: AtomicBool,
    /// Whether the registry gave uploads an address under another name, which was replaced with its
    /// own.
    uploads_renamed: AtomicBool,
    /// The longest total wait of one request if the registry asks for pauses.
    pause_max: Duration,
    silence: Silence,
    redirected: RedirectedTo,
    /// Held while the list of a fallback tag is read and written.
    fallback: tokio::sync::Mutex<()>,
}

/// The progress of a request body, which distinguishes a slow upload from a stalled one.
#[derive(Debug, Default)]
struct Progress {
    sent: AtomicU64,
    total: u64,
}

/// How long to wait for an answer.
enum Wait {
    /// For a request without a large body.
    Quick,
    /// For a large body: as long as it makes progress, and then as long as a registry may take to
    /// hash it.
    Upload(Arc<Progress>),
    /// For the closing request of an upload.
    Close,
}

impl Registry {
    /// Creates a client for a registry. `ca` is a file with PEM certificates that are trusted in
    /// addition to those of the system: of authorities, or the registry's own.
    pub fn new(
        origin: Origin,
        credentials: Option<Credentials>,
        ca: Option<&Path>,
    ) -> Result<Self, Fault> {
        let access = Access {
            credentials,
            ca_file: ca.map(Path::to_owned),
            ..Access::default()
        };
        Self::open(origin, access)
    }

    /// Creates a client for a registry.
    pub fn open(origin: Origin, access: Access) -> Result<Self, Fault> {
        // Other parts of the program may have installed the same provider already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let redirected = RedirectedTo::default();
        let builder = || {
            let builder = reqwest::Client::builder()
                .user_agent(concat!("packhorse/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(limits::REGISTRY_CONNECT_MAX)
                .pool_idle_timeout(Duration::from_secs(30))
                .pool_max_idle_per_host(2 * limits::REGISTRY_BLOBS_IN_FLIGHT_MAX)
                .redirect(redirects(redirected.clone()))
                .referer(false);
            if origin.is_loopback() {
                builder.no_proxy()
            } else {
                builder
            }
        };
        let configured = match &access.ca_file {
            _ if access.insecure => builder().tls_danger_accept_invalid_certs(true),
            Some(file) => builder().tls_backend_preconfigured(tls::config(file)?),
            None => builder(),
        };
        let built = match configured.build() {
            // A minimal machine may have no certificates, which only matters for TLS.
            Err(_) if !origin.https => builder().tls_certs_only([]).build(),
            other => other,
        };
        let http = built.map_err(|e| {
            Fault::config(format!("set up TLS for {origin}: {}", e.without_url()))
                .with_next("install the package ca-certificates, or set ca_file to the certificate of the authority")
        })?;
        Ok(Self {
            http,
            origin,
            auth: Auth::new(access.credentials, access.settings),
            settings: access.settings,
            chunk_bytes: AtomicU64::new(0),
            uploads_elsewhere: AtomicBool::new(false),
            uploads_renamed: AtomicBool::new(false),
            pause_max: limits::REGISTRY_PAUSE_IN_PLACE_MAX,
            silence: Silence::default(),
            redirected,
            fallback: tokio::sync::Mutex::default(),
        })
    }

    /// Sends blobs in chunks of this many bytes (0: complete).
    #[cfg(test)]
    pub(crate) fn with_chunk_bytes(self, bytes: u64) -> Self {
        self.chunk_bytes.store(bytes, Ordering::Relaxed);
        self
    }

    /// Sets the longest total wait of one request if the registry asks for pauses (429, 503).
    pub fn with_patience(self, pause_max: Duration) -> Self {
        Self { pause_max, ..self }
    }

    /// How long a request has been waiting for an answer or for progress of its upload.
    pub fn silent_for(&self) -> Option<Duration> {
        self.silence.longest()
    }

    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Whether the registry is Harbor according to its challenge. Known after the first request.
    pub fn is_harbor(&self) -> bool {
        self.auth.challenge().is_some_and(|c| c.is_harbor())
    }

    /// Checks that the registry answers and accepts the credentials.
    pub async fn ping(&self) -> Result<(), Error> {
        let scope = Scope {
            repository: String::new(),
            actions: "pull",
            mount_from: None,
        };
        let response = self
            .send(&scope, Method::GET, self.url("")?, &|r| r, &Wait::Quick)
            .await?;
        if response.status() == StatusCode::OK && !answer::is_html(response.headers()) {
            Ok(())
        } else {
            Err(Answer::read(response).await.into())
        }
    }

    /// The URL `/v2/<path>`.
    fn url(&self, path: &str) -> Result<Url, Fault> {
        let text = format!("{}/v2/{path}", self.origin.base());
        text.parse()
            .map_err(|_| Fault::config(format!("{} is not a valid registry address", self.origin)))
    }

    /// Resolves an address from an answer of the registry. Behind a proxy that terminates TLS, the
    /// registry may send http instead of https.
    fn follow(&self, location: &str) -> Result<Url, Fault> {
        let base = self.url("")?;
        let mut url = base.join(location).map_err(|_| {
            Fault::unreachable("the registry returned a Location that is not a valid address")
        })?;
        if self.origin.https && url.scheme() == "http" && url.host_str() == base.host_str() {
            let _ = url.set_scheme("https");
        }
        if self.origin.https && url.scheme() != "https" {
            return Err(Fault::not_allowed("the registry uses TLS but redirects to an address without TLS")
                .with_next("correct the registry's external address (Harbor: external_url) or that of its storage"));
        }
        Ok(url)
    }

    fn scope(repository: &str, actions: &'static str) -> Scope {
        Scope {
            repository: repository.into(),
            actions,
            mount_from: None,
        }
    }

    /// Sends one authorized request. Waits if the registry asks for a pause, within the limit. Does
    /// not repeat a large body.
    async fn send(
        &self,
        scope: &Scope,
        method: Method,
        url: Url,
        fill: &(dyn Fn(RequestBuilder) -> RequestBuilder + Sync),
        wait: &Wait,
    ) -> Result<Response, Error> {
        let (mut waited, mut pauses) = (Duration::ZERO, 0);
        loop {
            let answered = self.send_now(scope, &method, &url, fill, wait).await;
            let pause = match &answered {
                Ok(response) if matches!(response.status().as_u16(), 429 | 503) => {
                    answer::retry_after(response.headers())
                }
                Err(error) if error.asks_for_pause() => error.retry_after(),
                _ => return answered,
            };
            let pause = pause.unwrap_or_else(|| {
                (limits::BACKOFF_FIRST * 2u32.pow(pauses)).min(limits::REGISTRY_PAUSE_MAX)
            });
            if matches!(wait, Wait::Upload(_)) || waited + pause > self.pause_max {
                return answered;
            }
            tracing::info!(registry = %self.origin, wait_ms = pause.as_millis() as u64, "the registry asks for a pause");
            tokio::time::sleep(pause).await;
            waited += pause.max(limits::BACKOFF_FIRST);
            pauses = (pauses + 1).min(16);
        }
    }

    /// Like `send`, without pauses: repeats the request once with a new authorization after a 401.
    /// `fill` adds headers and the body for each attempt.
    async fn send_now(
        &self,
        scope: &Scope,
        method: &Method,
        url: &Url,
        fill: &(dyn Fn(RequestBuilder) -> RequestBuilder + Sync),
        wait: &Wait,
    ) -> Result<Response, Error> {
        if self.auth.challenge().is_none() {
            self.ask_challenge().await?;
        }
        // An upload may be sent to another host (a storage service), which must not get the
        // credentials.
        let base = self.url("")?;
        let is_registry = url.scheme() == base.scheme() && url.authority() == base.authority();
        let mut is_retry = false;
        loop {
            let mut request = fill(self.http.request(method.clone(), url.clone()));
            if is_registry
                && let Some(header) = self.auth.header(&self.http, &self.origin, scope).await?
            {
                request = request.header(AUTHORIZATION, header);
            }
            let response = wait.answer(request, self).await?;
            if response.status() == StatusCode::UNAUTHORIZED && !is_registry {
                return Err(self.asked_by_other_host(url).into());
            }
            if response.status() != StatusCode::UNAUTHORIZED || is_retry {
                return Ok(response);
            }
            self.auth.on_rejected(scope, response.headers());
            is_retry = true;
        }
    }

    async fn ask_challenge(&self) -> Result<(), Error> {
        let response = Wait::Quick
            .answer(self.http.get(self.url("")?), self)
            .await?;
        match response.status() {
            StatusCode::TOO_MANY_REQUESTS => Err(Answer::read(response).await.into()),
            status if status.is_server_error() => Err(Answer::read(response).await.into()),
            _ => {
                self.auth
                    .set_challenge(Challenge::parse(response.headers()));
                Ok(())
            }
        }
    }

    /// The fault of a request without an answer, with advice that the user can follow.
    /// `redirected`: the host that the request was redirected to.
    fn no_answer(&self, error: &reqwest::Error, redirected: Option<String>) -> Fault {
        let fault = answer::no_answer(error).fault(&self.settings, &self.origin.authority);
        match redirected {
            Some(host) if host != self.origin.without_default_port() => fault
                .context(format_args!("{host}, to which the registry refers"))
                .with_next(format!(
                    "check {host}: the registry {} redirects there, or a login page in front of it does",
                    self.origin
                )),
            _ => fault,
        }
    }

    /// Sends a request to Harbor's API, which accepts only passwords.
    async fn send_basic(&self, request: RequestBuilder) -> Result<Response, Error> {
        let request = match self.auth.basic().await? {
            Some(header) => request.header(AUTHORIZATION, header),
            None => request,
        };
        Wait::Quick.answer(request, self).await
    }

    /// The fault of an upload that another host wants credentials for, which it must not get.
    fn asked_by_other_host(&self, url: &Url) -> Fault {
        let host = answer::authority(url);
        let origin = &self.origin;
        Fault::config(format!(
            "the registry {origin} sends uploads to {host}, which asks for credentials; they are not sent to another host than {origin}"
        ))
        .with_reason(Reason::SinkDenied)
        .with_next(format!(
            "set the registry's external address to the name by which it is used here (Harbor: external_url; distribution: http.host; a proxy in front of it: X-Forwarded-Host and X-Forwarded-Proto), or write {host} instead of {origin} {}; then run 'packhorse retry'",
            self.settings.where_the_address_is()
        ))
    }
}

/// Where running requests were redirected to, by their first address: an error names the first address
/// only.
#[derive(Debug, Clone, Default)]
struct RedirectedTo(Arc<Mutex<HashMap<Url, String>>>);

impl RedirectedTo {
    fn note(&self, first: &Url, to: &Url) {
        let mut hosts = self.0.lock();
        if hosts.len() >= REDIRECTS_KEPT {
            hosts.clear();
        }
        hosts.insert(first.clone(), answer::authority(to));
    }

    /// The host of a request that ended.
    fn take(&self, first: &Url) -> Option<String> {
        self.0.lock().remove(first)
    }
}

/// Follows redirects, but never from TLS to plain HTTP. The HTTP client sends no Authorization
/// header to another host or port.
fn redirects(hosts: RedirectedTo) -> reqwest::redirect::Policy {
    reqwest::redirect::Policy::custom(move |attempt| {
        let had_tls = attempt.previous().iter().any(|url| url.scheme() == "https");
        if had_tls && attempt.url().scheme() != "https" {
            return attempt.error("the registry redirects from https to http");
        }
        if attempt.previous().len() > limits::REGISTRY_REDIRECTS_MAX {
            return attempt.error("the registry redirects too often");
        }
        if let Some(first) = attempt.previous().first() {
            hosts.note(first, attempt.url());
        }
        attempt.follow()
    })
}

impl Wait {
    async fn answer(
        &self,
        request: RequestBuilder,
        registry: &Registry,
    ) -> Result<Response, Error> {
        let (client, request) = request.build_split();
        let request = request.map_err(|e| registry.no_answer(&e, None))?;
        let address = request.url().clone();
        let pending = registry.silence.begin();
        let silence = || Error::Fault(Fault::unreachable("no answer in time"));
        let answer = match self {
            Wait::Quick => {
                tokio::time::timeout(limits::REGISTRY_SILENCE_MAX, client.execute(request))
                    .await
                    .map_err(|_| silence())?
            }
            Wait::Close => {
                tokio::time::timeout(limits::REGISTRY_CLOSE_MAX, client.execute(request))
                    .await
                    .map_err(|_| silence())?
            }
            Wait::Upload(progress) => tokio::select! {
                answer = client.execute(request) => answer,
                () = progress.stalled(&pending) => return Err(silence()),
            },
        };
        let redirected = registry.redirected.take(&address);
        answer.map_err(|e| registry.no_answer(&e, redirected).into())
    }
}

impl Progress {
    /// Returns when there was no progress for too long.
    async fn stalled(&self, pending: &Pending<'_>) {
        let (mut last, mut since) = (0, Instant::now());
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let sent = self.sent.load(Ordering::Relaxed);
            if sent != last {
                (last, since) = (sent, Instant::now());
                pending.progressed();
            }
            let timeout = if sent >= self.total {
                limits::REGISTRY_CLOSE_MAX
            } else {
                limits::REGISTRY_SILENCE_MAX
            };
            if since.elapsed() > timeout {
                return;
            }
        }
    }
}

/// The next piece of a body; `None` at the end. Fails after a timeout.
async fn next_piece(response: &mut Response) -> Result<Option<Bytes>, Fault> {
    tokio::time::timeout(limits::REGISTRY_SILENCE_MAX, response.chunk())
        .await
        .map_err(|_| Fault::unreachable("the answer was interrupted"))?
        .map_err(|e| answer::no_answer(&e).fault(&Settings::default(), ""))
}

/// Reads a complete body of at most this size.
async fn read_capped(mut response: Response, bytes_max: usize) -> Result<Bytes, Fault> {
    let mut out = BytesMut::new();
    while let Some(piece) = next_piece(&mut response).await? {
        if out.len() + piece.len() > bytes_max {
            return Err(Fault::integrity(format!(
                "the registry's answer is larger than {bytes_max} bytes"
            )));
        }
        out.extend_from_slice(&piece);
    }
    Ok(out.freeze())
}

//! The client of the API: finds the daemon, sends the token, and converts every answer to a value
//! or a fault.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use reqwest::header::HeaderMap;
use reqwest::{Method, RequestBuilder, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::args::Global;
use crate::api::types::{Job, Transfer, TransferQuery};
use crate::api::{
    ApiToken, CURSOR_HEADER, ErrorBody, NEXT_HEADER, Proof, ProofQuery, SocketPath, TOKEN_HEADER,
    VERSION, VERSION_HEADER,
};
use crate::config;
use base::fault::{Code, Fault};
use base::limits::{API_CLIENT_IDLE_MAX, API_REPLY_MAX, API_ROWS_DEFAULT, JOB_CANCEL_MAX};

/// A client of one daemon.
pub(crate) struct Client {
    http: reqwest::Client,
    base: String,
    token: ApiToken,
    trust: Trust,
}

/// Why the client may send the token.
enum Trust {
    /// Local socket: only the daemon's user can listen on it.
    Socket(SocketPath),
    /// TLS authenticates the server.
    Tls,
    /// The daemon proves before each request that it holds the token; at this address if it is
    /// known, else at the dialled one if that is of this machine.
    Proof(Option<SocketAddr>),
}

impl Client {
    /// The daemon that the options specify. `--api` takes precedence over `--config`, and
    /// `--token-file` over `<data_dir>/api-token`.
    pub(super) fn new(global: &Global) -> Result<Self, Fault> {
        let config = match global.config_path() {
            Ok(path) => Some(config::read(path)?),
            Err(_) => None,
        };
        let by_url = global.api.as_ref().filter(|url| !url.is_empty());
        let base = match (by_url, &config) {
            (Some(url), _) => url.trim_end_matches('/').to_owned(),
            (None, Some(_)) => String::new(),
            (None, None) => {
                return Err(Fault::usage("no daemon is specified").with_next(
                    "give --config FILE (PACKHORSE_CONFIG) or --api URL (PACKHORSE_API)",
                ));
            }
        };
        if by_url.is_some() && !base.starts_with("http://") && !base.starts_with("https://") {
            return Err(
                Fault::usage(format!("{base:?} is not an http:// or https:// URL"))
                    .with_next("give --api http://HOST:PORT"),
            );
        }
        let token = match (&global.token_file, &config) {
            (Some(path), _) if !path.as_os_str().is_empty() => ApiToken::read(path)?,
            (_, Some(config)) => read_token_of(&config.data_dir)?,
            _ => {
                return Err(Fault::not_allowed("the API requires a token")
                    .with_next("give --token-file FILE, or --config FILE of that daemon"));
            }
        };
        match (by_url, &config) {
            (None, Some(config)) => Self::to_daemon(&config.data_dir, config.listen.api, token),
            _ => {
                let trust = if base.starts_with("https://") {
                    Trust::Tls
                } else {
                    Trust::Proof(None)
                };
                Self::to(base, token, trust)
            }
        }
    }

    /// The daemon on this machine with this state directory, which listens at `api`. Its local
    /// socket is used if the daemon listens there.
    pub(crate) fn to_daemon(
        data_dir: &Path,
        api: SocketAddr,
        token: ApiToken,
    ) -> Result<Self, Fault> {
        match SocketPath::of_running(data_dir) {
            Some(socket) => Self::to("http://localhost".into(), token, Trust::Socket(socket)),
            None => {
                let api = reachable(api);
                Self::to(format!("http://{api}"), token, Trust::Proof(Some(api)))
            }
        }
    }

    fn to(base: String, token: ApiToken, trust: Trust) -> Result<Self, Fault> {
        // Set once per process; every caller sets the same provider.
        let _ = rustls::crypto::ring::default_provider().install_default();
        // The daemon never redirects, and a proxy from the environment would receive the token.
        let mut builder = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy();
        builder = builder.pool_idle_timeout(API_CLIENT_IDLE_MAX);
        if let Trust::Socket(socket) = &trust {
            builder = builder.unix_socket(socket.path());
        }
        let http = builder.build().map_err(|e| {
            Fault::internal(format!("cannot create an HTTP client: {}", innermost(&e)))
        })?;
        Ok(Self {
            http,
            base,
            token,
            trust,
        })
    }

    /// Sends a GET request.
    pub(crate) async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &impl Serialize,
    ) -> Result<T, Fault> {
        self.send(
            self.http.request(Method::GET, self.url(path)).query(query),
            Duration::ZERO,
        )
        .await
        .map(|(value, _)| value)
    }

    /// Sends a GET request that the daemon may take `wait` to answer.
    pub(crate) async fn get_within<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &impl Serialize,
        wait: Duration,
    ) -> Result<T, Fault> {
        self.send(
            self.http.request(Method::GET, self.url(path)).query(query),
            wait,
        )
        .await
        .map(|(value, _)| value)
    }

    /// Sends a POST request.
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Fault> {
        self.send(
            self.http.request(Method::POST, self.url(path)).json(body),
            Duration::ZERO,
        )
        .await
        .map(|(value, _)| value)
    }

    /// Sends a DELETE request.
    pub(crate) async fn delete<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &impl Serialize,
    ) -> Result<T, Fault> {
        let request = self.http.request(Method::DELETE, self.url(path));
        self.send(request.query(query), Duration::ZERO)
            .await
            .map(|(value, _)| value)
    }

    /// Transfers, and the cursor with which to continue. Sends further requests while an answer is
    /// incomplete, up to the number of rows in the query.
    pub(crate) async fn transfers(
        &self,
        query: &TransferQuery,
    ) -> Result<(Vec<Transfer>, u64), Fault> {
        let (mut all, mut cursor, mut more) = self.some_transfers(query).await?;
        while more && all.len() < query.limit.unwrap_or(API_ROWS_DEFAULT) as usize {
            let limit = query
                .limit
                .map(|limit| limit.saturating_sub(u32::try_from(all.len()).unwrap_or(u32::MAX)));
            let rest = TransferQuery {
                since: Some(cursor),
                wait: None,
                limit,
                ..query.clone()
            };
            let (rows, next, still_more) = self.some_transfers(&rest).await?;
            // A transfer that changed between two requests is in both answers.
            all.retain(|row| rows.iter().all(|newer| newer.id != row.id));
            all.extend(rows);
            more = still_more && next > cursor;
            cursor = next.max(cursor);
        }
        Ok((all, cursor))
    }

    /// One answer: transfers, the cursor with which to continue, and whether more transfers have
    /// changed.
    async fn some_transfers(
        &self,
        query: &TransferQuery,
    ) -> Result<(Vec<Transfer>, u64, bool), Fault> {
        let request = self
            .http
            .request(Method::GET, self.url("/v1/transfers"))
            .query(query);
        let (transfers, headers): (Vec<Transfer>, _) = self
            .send(request, Duration::from_secs(query.wait.unwrap_or(0)))
            .await?;
        let sent = headers
            .get(CURSOR_HEADER)
            .and_then(|v| v.to_str().ok()?.parse().ok());
        // A proxy can remove the header; the rows contain the cursor too.
        let highest = transfers.iter().map(|t| t.cursor).max();
        Ok((
            transfers,
            sent.or(highest).or(query.since).unwrap_or(0),
            headers.contains_key(NEXT_HEADER),
        ))
    }

    /// A job: the answer comes when it ends, or after `wait`.
    pub(crate) async fn job(&self, id: &str, wait: Duration) -> Result<Job, Fault> {
        let query = [("id", id.to_owned()), ("wait", wait.as_secs().to_string())];
        self.send(
            self.http
                .request(Method::GET, self.url("/v1/jobs"))
                .query(&query),
            wait,
        )
        .await
        .map(|(job, _)| job)
    }

    /// Cancels a job and waits a limited time for its end.
    pub(crate) async fn cancel_job(&self, id: &str) -> Result<Job, Fault> {
        let wait = JOB_CANCEL_MAX * 2;
        let query = [("id", id.to_owned()), ("wait", wait.as_secs().to_string())];
        self.send(
            self.http
                .request(Method::DELETE, self.url("/v1/jobs"))
                .query(&query),
            wait,
        )
        .await
        .map(|(job, _)| job)
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    async fn send<T: DeserializeOwned>(
        &self,
        request: RequestBuilder,
        wait: Duration,
    ) -> Result<(T, HeaderMap), Fault> {
        self.check_daemon().await?;
        let request = request
            .header(TOKEN_HEADER, &*self.token.secret())
            .timeout(wait + API_REPLY_MAX);
        let response = request.send().await.map_err(|e| self.unreachable(&e))?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body = response.bytes().await.map_err(|e| self.unreachable(&e))?;
        if !status.is_success() {
            return Err(self.refusal(status, &headers, &body));
        }
        match serde_json::from_slice(&body) {
            Ok(value) => Ok((value, headers)),
            Err(error) => Err(self.not_understood(&headers, &error.to_string())),
        }
    }

    /// Does not send the token if another process listens at the daemon's address.
    async fn check_daemon(&self) -> Result<(), Fault> {
        let Trust::Proof(address) = &self.trust else {
            return Ok(());
        };
        let query = ProofQuery::random(&self.token);
        let request = self
            .http
            .request(Method::GET, self.url("/v1/proof"))
            .query(&query)
            .timeout(API_REPLY_MAX);
        let response = request.send().await.map_err(|e| self.unreachable(&e))?;
        let version = response.headers().get(VERSION_HEADER).is_some();
        // Another user's program on this machine must not pass the proof of the daemon on. Between
        // machines the address may be translated on the way.
        let dialled = response
            .remote_addr()
            .filter(|address| address.ip().to_canonical().is_loopback());
        let body = response.bytes().await.map_err(|e| self.unreachable(&e))?;
        let Ok(proof) = serde_json::from_slice::<Proof>(&body) else {
            if version {
                // A daemon before the proof existed, whose program was replaced while it ran.
                return Err(Fault::unreachable(format!(
                    "the daemon at {} is of an earlier revision than this program; the token was not sent to it",
                    self.base
                ))
                .with_next("restart the daemon, so that it runs the same program as this command"));
            }
            return Err(Fault::unreachable(format!(
                "the program that answers at {} is not this daemon; the token was not sent to it",
                self.base
            ))
            .with_next("stop that program and start the daemon with 'packhorse serve --config FILE', or correct the URL"));
        };
        if !proof.is_by(&self.token, &query) {
            return Err(Fault::not_allowed(format!("the API token is wrong, or another daemon answers at {}", self.base))
                .with_next("check the URL, and give the token of that daemon with --token-file or --config; no token was sent"));
        }
        if let Some(address) = address.or(dialled)
            && !proof.is_of(address)
        {
            return Err(Fault::not_allowed(format!(
                "the program that answers at {} is not the daemon, which listens at {}; the token was not sent to it",
                self.base, proof.address
            ))
            .with_next("give --config FILE of the daemon, or --api with the address at which it listens; through a tunnel or a proxy use https://"));
        }
        Ok(())
    }

    fn unreachable(&self, error: &reqwest::Error) -> Fault {
        let place = match &self.trust {
            Trust::Socket(socket) => socket.path().display().to_string(),
            Trust::Tls | Trust::Proof(_) => self.base.clone(),
        };
        Fault::unreachable(format!("the daemon at {place} does not answer: {}", innermost(error)))
            .with_next("start it with 'packhorse serve --config FILE', or select another daemon with --config or --api")
    }

    fn refusal(&self, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Fault {
        if let Ok(body) = serde_json::from_slice::<ErrorBody>(body) {
            return body.into();
        }
        let message = format!(
            "{} answered {status}, but not in the format of Packhorse",
            self.base
        );
        let next = "check the URL, and any proxy between this machine and the daemon";
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Fault::not_allowed(message).with_next(next)
            }
            _ if headers.contains_key(VERSION_HEADER) => Fault::internal(message),
            _ => Fault::unreachable(message).with_next(next),
        }
    }

    fn not_understood(&self, headers: &HeaderMap, why: &str) -> Fault {
        match headers.get(VERSION_HEADER).and_then(|v| v.to_str().ok()) {
            None => Fault::unreachable(format!("the program that answers at {} is not Packhorse", self.base)).with_next("check the URL"),
            Some(theirs) => Fault::internal(format!(
                "cannot read the daemon's answer: {why} (version of the daemon: {theirs}, of this command: {VERSION})"
            ))
            .with_next("run the command with the daemon's version of the program"),
        }
    }
}

fn read_token_of(data_dir: &Path) -> Result<ApiToken, Fault> {
    let path = ApiToken::path(data_dir);
    ApiToken::read(&path).map_err(|fault| match fault.code {
        Code::NotFound => Fault::unreachable(format!(
            "the daemon has never run: {} does not exist",
            path.display()
        ))
        .with_next("start it with 'packhorse serve --config FILE'"),
        _ => fault.with_next("run this as the daemon's user, or give --token-file FILE"),
    })
}

/// The address at which a client reaches a listener; for one on all addresses, the loopback
/// address.
fn reachable(mut listen: SocketAddr) -> SocketAddr {
    if listen.ip().is_unspecified() {
        listen.set_ip(if listen.is_ipv4() {
            IpAddr::V4(Ipv4Addr::LOCALHOST)
        } else {
            IpAddr::V6(Ipv6Addr::LOCALHOST)
        });
    }
    listen
}

/// The innermost cause: the outer ones only repeat the URL.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

//! A registry in memory that answers like Harbor, except where a test scripts the answers.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::State;
use axum::http::{Method, Request, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::json;

use super::fixture::{PASSWORD, USER};
use crate::image::Sha256;

/// One scripted answer for the next `times` requests with this method and a path that contains
/// `path`.
pub struct Scripted {
    pub method: &'static str,
    pub path: &'static str,
    pub status: u16,
    pub headers: Vec<(&'static str, &'static str)>,
    pub body: String,
    pub times: usize,
    /// Requests with a smaller body do not match.
    pub body_bytes_min: usize,
    /// This many matching requests are not affected first.
    pub skip: usize,
    /// Whether the request is also processed.
    pub but_done: bool,
}

impl Scripted {
    pub fn new(method: &'static str, path: &'static str, status: u16, body: String) -> Self {
        Self {
            method,
            path,
            status,
            headers: Vec::new(),
            body,
            times: 1,
            body_bytes_min: 0,
            skip: 0,
            but_done: false,
        }
    }
}

#[derive(Default)]
pub struct Held {
    pub blobs: HashMap<(String, String), Bytes>,
    pub manifests: HashMap<(String, String), Bytes>,
    pub projects: HashSet<String>,
    pub script: Vec<Scripted>,
    /// `METHOD path` of all requests.
    pub log: Vec<String>,
    /// Tokens with a smaller number are no longer accepted.
    pub first_good_token: usize,
    /// A proxy in front answers 413 to larger bodies.
    pub body_bytes_max: Option<usize>,
    /// This many answers with a blob are interrupted in the middle.
    pub cuts: usize,
    /// `OCI-Chunk-Min-Length`: smaller chunks are refused, except the last.
    pub chunk_bytes_min: Option<usize>,
    /// Requests with credentials of any kind.
    pub authorized: usize,
    uploads: HashMap<String, Vec<u8>>,
    tokens: usize,
    sessions: usize,
}

impl Held {
    pub fn count(&self, method: &str, path: &str) -> usize {
        self.log
            .iter()
            .filter(|line| line.starts_with(method) && line.contains(path))
            .count()
    }
}

#[derive(Clone)]
pub struct StandIn {
    pub address: String,
    pub held: Arc<Mutex<Held>>,
}

impl StandIn {
    pub async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stand_in = Self {
            address: listener.local_addr().unwrap().to_string(),
            held: Arc::default(),
        };
        stand_in.held.lock().projects.insert("op".into());
        let app = Router::new().fallback(answer).with_state(stand_in.clone());
        tokio::spawn(async move { axum::serve(listener, app).await });
        stand_in
    }

    pub fn script(
        &self,
        method: &'static str,
        path: &'static str,
        status: u16,
        body: impl Into<String>,
    ) {
        self.held
            .lock()
            .script
            .push(Scripted::new(method, path, status, body.into()));
    }

    pub fn script_always(
        &self,
        method: &'static str,
        path: &'static str,
        status: u16,
        body: impl Into<String>,
    ) {
        self.held.lock().script.push(Scripted {
            times: usize::MAX,
            ..Scripted::new(method, path, status, body.into())
        });
    }
}

pub fn error(code: &str, message: &str) -> String {
    json!({"errors": [{"code": code, "message": message}]}).to_string()
}

fn reply(status: u16, headers: &[(&str, String)], body: impl Into<Body>) -> Response {
    let mut builder = Response::builder().status(status);
    for (name, value) in headers {
        builder = builder.header(*name, value);
    }
    builder.body(body.into()).unwrap()
}

async fn answer(State(this): State<StandIn>, request: Request<Body>) -> Response {
    let (parts, body) = request.into_parts();
    let body = to_bytes(body, usize::MAX).await.unwrap_or_default();
    let mut held = this.held.lock();
    let path = parts.uri.path().to_owned();
    held.log.push(format!("{} {path}", parts.method));
    held.authorized += usize::from(parts.headers.contains_key("authorization"));
    if held.body_bytes_max.is_some_and(|max| body.len() > max) {
        return reply(
            413,
            &[("content-type", "text/html".into())],
            "<html>413 Request Entity Too Large</html>",
        );
    }
    let meant = |s: &&mut Scripted| {
        s.times > 0
            && parts.method == s.method
            && path.contains(s.path)
            && body.len() >= s.body_bytes_min
    };
    let mut scripted = held.script.iter_mut().find(meant);
    let mut forced = None;
    if let Some(waiting) = scripted.as_deref_mut().filter(|s| s.skip > 0) {
        waiting.skip -= 1;
    } else if let Some(scripted) = scripted {
        scripted.times -= 1;
        let headers: Vec<_> = scripted
            .headers
            .iter()
            .map(|(n, v)| (*n, (*v).to_owned()))
            .collect();
        let response = reply(scripted.status, &headers, scripted.body.clone());
        if !scripted.but_done {
            return response;
        }
        forced = Some(response);
    }
    let url = reqwest::Url::parse(&format!(
        "http://x/?{}",
        parts.uri.query().unwrap_or_default()
    ))
    .unwrap();
    let query: HashMap<String, String> = url
        .query_pairs()
        .map(|(k, v)| (k.into_owned(), v.into_owned()))
        .collect();
    let scopes: Vec<String> = url
        .query_pairs()
        .filter(|(k, _)| k == "scope")
        .map(|(_, v)| v.into_owned())
        .collect();
    let authorization = parts
        .headers
        .get("authorization")
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default();
    let played = play(
        &mut held,
        &this.address,
        &parts.method,
        &path,
        &query,
        &scopes,
        authorization,
        &parts.headers,
        body,
    );
    forced.unwrap_or(played)
}

#[expect(clippy::too_many_arguments, reason = "the parts of one request")]
fn play(
    held: &mut Held,
    address: &str,
    method: &Method,
    path: &str,
    query: &HashMap<String, String>,
    scopes: &[String],
    authorization: &str,
    headers: &axum::http::HeaderMap,
    body: Bytes,
) -> Response {
    let basic = authorization == format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
    if path == "/service/token" {
        held.tokens += 1;
        let access: Vec<_> = scopes
            .iter()
            .map(|scope| {
                let name = scope.split(':').nth(1).unwrap_or_default();
                let known = held
                    .projects
                    .contains(name.split('/').next().unwrap_or_default());
                let actions = if basic && known {
                    json!(["pull", "push", "delete"])
                } else {
                    json!([])
                };
                json!({"type": "repository", "name": name, "actions": actions})
            })
            .collect();
        let claims = json!({"n": held.tokens, "access": access});
        let token = format!("h.{}.s", URL_SAFE_NO_PAD.encode(claims.to_string()));
        return json!({"token": token, "expires_in": 1800})
            .to_string()
            .into_response();
    }
    if path == "/api/v2.0/projects" {
        return match *method {
            _ if !basic => StatusCode::UNAUTHORIZED.into_response(),
            Method::HEAD if held.projects.contains(&query["project_name"]) => {
                StatusCode::OK.into_response()
            }
            Method::HEAD => StatusCode::NOT_FOUND.into_response(),
            _ => {
                let wanted: serde_json::Value = serde_json::from_slice(&body).unwrap();
                held.projects
                    .insert(wanted["project_name"].as_str().unwrap().into());
                StatusCode::CREATED.into_response()
            }
        };
    }
    let token = authorization
        .strip_prefix("Bearer h.")
        .and_then(|t| URL_SAFE_NO_PAD.decode(t.trim_end_matches(".s")).ok());
    let number = token
        .and_then(|c| serde_json::from_slice::<serde_json::Value>(&c).ok())
        .and_then(|c| c["n"].as_u64());
    let good =
        number.is_some_and(|n| n as usize >= held.first_good_token) || (basic && path == "/v2/");
    if !good {
        let challenge =
            format!(r#"Bearer realm="http://{address}/service/token",service="harbor-registry""#);
        return reply(
            401,
            &[("www-authenticate", challenge)],
            error("UNAUTHORIZED", "unauthorized to access repository"),
        );
    }
    let Some(rest) = path.strip_prefix("/v2/") else {
        return StatusCode::NOT_FOUND.into_response();
    };
    if rest.is_empty() {
        return "{}".into_response();
    }
    if let Some((repository, session)) = rest.split_once("/blobs/uploads/") {
        let location = |session: &str, bytes: usize| {
            let range = format!("0-{}", bytes.saturating_sub(1));
            [
                (
                    "location",
                    format!("/v2/{repository}/blobs/uploads/{session}?_state=sekret"),
                ),
                ("range", range),
            ]
        };
        return match *method {
            Method::POST => {
                if let (Some(digest), Some(from)) = (query.get("mount"), query.get("from")) {
                    let known = held.blobs.get(&(from.clone(), digest.clone())).cloned();
                    if let Some(bytes) = known {
                        held.blobs
                            .insert((repository.into(), digest.clone()), bytes);
                        return StatusCode::CREATED.into_response();
                    }
                }
                held.sessions += 1;
                let session = format!("s{}", held.sessions);
                held.uploads.insert(session.clone(), Vec::new());
                let mut headers = location(&session, 0).to_vec();
                if let Some(min) = held.chunk_bytes_min {
                    headers.push(("oci-chunk-min-length", min.to_string()));
                }
                reply(202, &headers, "")
            }
            Method::DELETE => StatusCode::NO_CONTENT.into_response(),
            Method::GET => match held.uploads.get(session) {
                Some(bytes) => reply(204, &location(session, bytes.len()), ""),
                None => reply(404, &[], error("BLOB_UPLOAD_UNKNOWN", "")),
            },
            Method::PATCH => {
                let Some(bytes) = held.uploads.get_mut(session) else {
                    return reply(404, &[], error("BLOB_UPLOAD_UNKNOWN", ""));
                };
                if held
                    .chunk_bytes_min
                    .is_some_and(|min| bytes.len() % min != 0)
                {
                    return reply(416, &[], error("SIZE_INVALID", "a chunk was too small"));
                }
                bytes.extend_from_slice(&body);
                let len = bytes.len();
                reply(202, &location(session, len), "")
            }
            _ => {
                let Some(mut bytes) = held.uploads.remove(session) else {
                    return reply(404, &[], error("BLOB_UPLOAD_UNKNOWN", ""));
                };
                bytes.extend_from_slice(&body);
                if Sha256::of(&bytes).to_string() != query["digest"] {
                    return reply(
                        400,
                        &[],
                        error(
                            "DIGEST_INVALID",
                            "provided digest did not match uploaded content",
                        ),
                    );
                }
                held.blobs
                    .insert((repository.into(), query["digest"].clone()), bytes.into());
                StatusCode::CREATED.into_response()
            }
        };
    }
    if let Some((repository, digest)) = rest.split_once("/blobs/") {
        let Some(bytes) = held.blobs.get(&(repository.into(), digest.into())) else {
            return reply(404, &[], error("BLOB_UNKNOWN", ""));
        };
        let bytes = bytes.clone();
        let range = headers
            .get("range")
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.strip_prefix("bytes=")?.split_once('-'));
        let (status, bytes) = match range {
            Some((first, last)) => {
                let first: usize = first.parse().unwrap();
                (
                    206,
                    bytes.slice(
                        first
                            ..last
                                .parse::<usize>()
                                .map_or(bytes.len(), |last| last + 1)
                                .min(bytes.len()),
                    ),
                )
            }
            None => (200, bytes),
        };
        let length = [("content-length", bytes.len().to_string())];
        if *method == Method::GET && held.cuts > 0 {
            held.cuts -= 1;
            let half = bytes.slice(..bytes.len() / 2);
            let pieces = [
                Ok(half),
                Err(std::io::Error::other("the connection is interrupted")),
            ];
            return reply(
                status,
                &length,
                Body::from_stream(futures::stream::iter(pieces)),
            );
        }
        return reply(status, &length, bytes);
    }
    if let Some((repository, reference)) = rest.split_once("/manifests/") {
        let key = (repository.to_owned(), reference.to_owned());
        if *method == Method::PUT {
            let digest = Sha256::of(&body).to_string();
            held.manifests.insert(key, body.clone());
            held.manifests
                .insert((repository.into(), digest.clone()), body);
            return reply(201, &[("docker-content-digest", digest)], "");
        }
        let Some(bytes) = held.manifests.get(&key) else {
            return reply(404, &[], error("MANIFEST_UNKNOWN", ""));
        };
        let media: serde_json::Value = serde_json::from_slice(bytes).unwrap();
        let media = media["mediaType"].as_str().unwrap_or_default().to_owned();
        return reply(
            200,
            &[
                ("docker-content-digest", Sha256::of(bytes).to_string()),
                ("content-type", media),
            ],
            bytes.clone(),
        );
    }
    StatusCode::NOT_FOUND.into_response()
}

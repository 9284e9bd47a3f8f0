//! A simulator of Harbor: a small registry in memory. It answers like Harbor where docker-registry
//! behaves differently (projects, tokens with empty actions, immutable tags), and otherwise as the
//! test has scripted.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, Method, Response, StatusCode, header};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use super::Scratch;
use super::http::{Serving, basic_auth, query_pairs, serve};
use super::images::sha256;

/// The robot account.
pub(crate) const USER: &str = "robot$operators+packhorse";
const PASSWORD: &str = "harbor-secret";

/// One received request.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) body_len: usize,
    pub(crate) at: Instant,
    pub(crate) status: u16,
}

type When = Box<dyn Fn(&Seen) -> bool + Send>;

/// A scripted answer, for a number of matching requests.
struct Rule {
    when: When,
    times: usize,
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: String,
    forget_tokens: bool,
}

#[derive(Default)]
struct State {
    blobs: HashMap<String, Bytes>,
    uploads: HashMap<String, Vec<u8>>,
    manifests: HashMap<String, (String, Bytes)>,
    projects: HashSet<String>,
    tokens: HashSet<String>,
    issued: u64,
    immutable: bool,
    rules: Vec<Rule>,
    seen: Vec<Seen>,
}

/// The simulator.
pub(crate) struct Harbor {
    state: Arc<Mutex<State>>,
    serving: Serving,
}

impl Harbor {
    /// Starts a Harbor with the project `operators`.
    pub(crate) fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        state
            .lock()
            .expect("no holder panics")
            .projects
            .insert("operators".into());
        let serving = serve(|address| {
            let state = Arc::clone(&state);
            Router::new().fallback(move |request: Request| async move {
                answer(&state, address, request).await
            })
        });
        Self { state, serving }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    /// The lines of `[sink.images]` for it.
    pub(crate) fn sink(&self, scratch: &Scratch, project: &str) -> String {
        let file = scratch.join("harbor-password");
        std::fs::write(&file, PASSWORD).expect("write the password");
        format!(
            "url = \"http://{}/{project}\"\nusername = \"{USER}\"\npassword_file = \"{}\"",
            self.serving.address,
            file.display()
        )
    }

    /// Answers matching requests with this from now on, until [`Harbor::heal`].
    pub(crate) fn always(
        &self,
        when: impl Fn(&Seen) -> bool + Send + 'static,
        status: u16,
        body: &str,
    ) {
        self.rule(when, usize::MAX, status, &[], body, false);
    }

    /// Answers the next `times` matching requests with this.
    pub(crate) fn times(
        &self,
        times: usize,
        when: impl Fn(&Seen) -> bool + Send + 'static,
        status: u16,
        headers: &[(&'static str, &str)],
        body: &str,
    ) {
        self.rule(when, times, status, headers, body, false);
    }

    /// At the first matching request, all tokens issued so far expire.
    pub(crate) fn expire_tokens_at(&self, when: impl Fn(&Seen) -> bool + Send + 'static) {
        let challenge = format!(
            "Bearer realm=\"http://{}/service/token\",service=\"harbor-registry\",error=\"invalid_token\"",
            self.serving.address
        );
        self.rule(
            when,
            1,
            401,
            &[("www-authenticate", &challenge)],
            &error("UNAUTHORIZED", "authorize header needed to send HEAD"),
            true,
        );
    }

    fn rule(
        &self,
        when: impl Fn(&Seen) -> bool + Send + 'static,
        times: usize,
        status: u16,
        headers: &[(&'static str, &str)],
        body: &str,
        forget_tokens: bool,
    ) {
        let headers = headers
            .iter()
            .map(|(name, value)| (*name, (*value).to_owned()))
            .collect();
        self.state().rules.push(Rule {
            when: Box::new(when),
            times,
            status,
            headers,
            body: body.into(),
            forget_tokens,
        });
    }

    /// Removes all rules.
    pub(crate) fn heal(&self) {
        self.state().rules.clear();
    }

    /// From now on, tags cannot be overwritten.
    pub(crate) fn make_immutable(&self) {
        self.state().immutable = true;
    }

    /// Stores a manifest under `repository:tag`, as if another client had pushed it.
    pub(crate) fn put_manifest(&self, reference: &str, media_type: &str, bytes: &[u8]) {
        self.state().manifests.insert(
            reference.into(),
            (media_type.into(), Bytes::copy_from_slice(bytes)),
        );
    }

    /// The digest of the manifest under `repository:tag`.
    pub(crate) fn digest(&self, reference: &str) -> Option<String> {
        self.state()
            .manifests
            .get(reference)
            .map(|(_, bytes)| sha256(bytes))
    }

    /// Whether a project exists.
    pub(crate) fn has_project(&self, name: &str) -> bool {
        self.state().projects.contains(name)
    }

    /// The requests so far that `wanted` accepts.
    pub(crate) fn seen(&self, wanted: impl Fn(&Seen) -> bool) -> Vec<Seen> {
        self.state()
            .seen
            .iter()
            .filter(|s| wanted(s))
            .cloned()
            .collect()
    }
}

/// Whether a request changes the registry: it uploads a blob or a manifest.
pub(crate) fn is_push(seen: &Seen) -> bool {
    matches!(seen.method, Method::POST | Method::PATCH | Method::PUT)
        && seen.path.starts_with("/v2/")
}

/// Whether a request puts a manifest.
pub(crate) fn is_manifest_put(seen: &Seen) -> bool {
    seen.method == Method::PUT && seen.path.contains("/manifests/")
}

/// Whether a request reads a manifest or checks that it exists.
pub(crate) fn is_manifest_read(seen: &Seen) -> bool {
    matches!(seen.method, Method::GET | Method::HEAD) && seen.path.contains("/manifests/")
}

/// An error body as Harbor writes it.
pub(crate) fn error(code: &str, message: &str) -> String {
    json!({ "errors": [{ "code": code, "message": message }] }).to_string()
}

fn reply(status: u16, headers: &[(&str, &str)], body: impl Into<Body>) -> Response<Body> {
    let mut builder = Response::builder().status(StatusCode::from_u16(status).expect("a status"));
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(body.into()).expect("a response")
}

fn reply_error(status: u16, code: &str, message: &str) -> Response<Body> {
    reply(
        status,
        &[("content-type", "application/json")],
        error(code, message),
    )
}

async fn answer(state: &Mutex<State>, address: SocketAddr, request: Request) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 30)
        .await
        .unwrap_or_default();
    let mut state = state.lock().expect("no holder panics");
    let mut seen = Seen {
        method: parts.method,
        path: parts.uri.path().to_owned(),
        body_len: body.len(),
        at: Instant::now(),
        status: 0,
    };
    let response = match scripted(&mut state, &seen) {
        Some(response) => response,
        None => usual(
            &mut state,
            address,
            &seen,
            parts.uri.query(),
            &parts.headers,
            &body,
        ),
    };
    seen.status = response.status().as_u16();
    state.seen.push(seen);
    response
}

fn scripted(state: &mut State, seen: &Seen) -> Option<Response<Body>> {
    let rule = state
        .rules
        .iter_mut()
        .find(|rule| rule.times > 0 && (rule.when)(seen))?;
    rule.times -= 1;
    let html = rule.body.starts_with('<');
    let mut headers = vec![(
        "content-type",
        if html {
            "text/html"
        } else {
            "application/json"
        },
    )];
    headers.extend(
        rule.headers
            .iter()
            .map(|(name, value)| (*name, value.as_str())),
    );
    let response = reply(rule.status, &headers, rule.body.clone());
    if rule.forget_tokens {
        state.tokens.clear();
    }
    Some(response)
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name).and_then(|v| v.to_str().ok())
}

fn is_robot(headers: &HeaderMap) -> bool {
    basic_auth(text(headers, header::AUTHORIZATION))
        .is_some_and(|(user, password)| user == USER && password == PASSWORD)
}

fn usual(
    state: &mut State,
    address: SocketAddr,
    seen: &Seen,
    query: Option<&str>,
    headers: &HeaderMap,
    body: &Bytes,
) -> Response<Body> {
    let query = query_pairs(query);
    if seen.path == "/service/token" {
        return token(state, &query, is_robot(headers));
    }
    if let Some(rest) = seen.path.strip_prefix("/api/v2.0/") {
        return projects(state, seen, rest, &query, is_robot(headers), body);
    }
    let challenge =
        format!("Bearer realm=\"http://{address}/service/token\",service=\"harbor-registry\"");
    let unauthorized = |message: &str| {
        reply(
            401,
            &[
                ("content-type", "application/json"),
                ("www-authenticate", &challenge),
            ],
            error("UNAUTHORIZED", message),
        )
    };
    if seen.path == "/v2/" {
        let token = text(headers, header::AUTHORIZATION).and_then(|a| a.strip_prefix("Bearer "));
        let known = is_robot(headers) || token.is_some_and(|t| state.tokens.contains(t));
        return if known {
            reply(200, &[], "{}")
        } else {
            unauthorized("unauthorized")
        };
    }
    let Some(rest) = seen.path.strip_prefix("/v2/") else {
        return reply_error(404, "NOT_FOUND", "no such path");
    };
    let token = text(headers, header::AUTHORIZATION).and_then(|a| a.strip_prefix("Bearer "));
    let project = rest.split('/').next().unwrap_or_default();
    let allowed = is_robot(headers) || token.is_some_and(|t| state.tokens.contains(t));
    if !allowed || !state.projects.contains(project) {
        return unauthorized(&format!(
            "unauthorized to access repository: {rest}, action: push"
        ));
    }
    registry(state, address, seen, rest, &query, headers, body)
}

/// Harbor's token endpoint: it answers 200 even for wrong credentials or a missing project, but
/// then with empty actions.
fn token(state: &mut State, query: &[(String, String)], robot: bool) -> Response<Body> {
    let access: Vec<Value> = query
        .iter()
        .filter(|(name, _)| name == "scope")
        .flat_map(|(_, value)| value.split(' '))
        .filter_map(|scope| {
            let (kind, rest) = scope.split_once(':')?;
            let (name, actions) = rest.rsplit_once(':')?;
            let exists = state
                .projects
                .contains(name.split('/').next().unwrap_or_default());
            let actions: Vec<&str> = if robot && exists {
                actions.split(',').collect()
            } else {
                Vec::new()
            };
            Some(json!({ "type": kind, "name": name, "actions": actions }))
        })
        .collect();
    state.issued += 1;
    let claims = json!({ "iss": "harbor-token-issuer", "aud": "harbor-registry", "jti": state.issued, "access": access });
    let token = format!(
        "{}.{}.c2ln",
        URL_SAFE_NO_PAD.encode(r#"{"alg":"RS256","typ":"JWT"}"#),
        URL_SAFE_NO_PAD.encode(claims.to_string())
    );
    if access
        .iter()
        .all(|a| a["actions"].as_array().is_some_and(|list| !list.is_empty()))
    {
        state.tokens.insert(token.clone());
    }
    let body = json!({ "token": token, "access_token": "", "expires_in": 1800, "issued_at": "2026-01-01T00:00:00Z" });
    reply(
        200,
        &[("content-type", "application/json")],
        body.to_string(),
    )
}

fn projects(
    state: &mut State,
    seen: &Seen,
    rest: &str,
    query: &[(String, String)],
    robot: bool,
    body: &[u8],
) -> Response<Body> {
    let known = |name: &str| state.projects.contains(name);
    let asked = |key: &str| {
        query
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, value)| value.as_str())
    };
    match (seen.method.as_str(), rest) {
        ("HEAD", "projects") => reply(
            if asked("project_name").is_some_and(known) {
                200
            } else {
                404
            },
            &[],
            "",
        ),
        ("POST", "projects") => {
            if !robot {
                return reply_error(401, "UNAUTHORIZED", "unauthorized");
            }
            let request: Value = serde_json::from_slice(body).unwrap_or_default();
            let Some(name) = request["project_name"].as_str() else {
                return reply_error(400, "BAD_REQUEST", "no project_name");
            };
            if state.projects.insert(name.to_owned()) {
                reply(
                    201,
                    &[("location", &format!("/api/v2.0/projects/{name}"))],
                    "",
                )
            } else {
                reply_error(
                    409,
                    "CONFLICT",
                    &format!("The project named {name} already exists"),
                )
            }
        }
        ("GET" | "HEAD", _) => match rest.strip_prefix("projects/") {
            Some(name) if known(name) => reply(
                200,
                &[("content-type", "application/json")],
                json!({ "name": name }).to_string(),
            ),
            _ => reply_error(404, "NOT_FOUND", "not found"),
        },
        _ => reply_error(404, "NOT_FOUND", "not found"),
    }
}

fn registry(
    state: &mut State,
    address: SocketAddr,
    seen: &Seen,
    rest: &str,
    query: &[(String, String)],
    headers: &HeaderMap,
    body: &Bytes,
) -> Response<Body> {
    let method = seen.method.as_str();
    if let Some((repository, id)) = rest.split_once("/blobs/uploads/") {
        return upload(state, address, method, repository, id, query, body);
    }
    if let Some((_, digest)) = rest.split_once("/blobs/") {
        let Some(blob) = state.blobs.get(digest) else {
            return reply_error(404, "BLOB_UNKNOWN", "blob unknown to registry");
        };
        let length = blob.len().to_string();
        let headers = [
            ("content-length", length.as_str()),
            ("docker-content-digest", digest),
        ];
        return reply(
            200,
            &headers,
            if method == "HEAD" {
                Body::empty()
            } else {
                Body::from(blob.clone())
            },
        );
    }
    if let Some((repository, reference)) = rest.split_once("/manifests/") {
        let separator = if reference.starts_with("sha256:") {
            '@'
        } else {
            ':'
        };
        let name = format!("{repository}{separator}{reference}");
        return if method == "PUT" {
            put_manifest(
                state,
                repository,
                reference,
                &name,
                text(headers, header::CONTENT_TYPE).unwrap_or_default(),
                body,
            )
        } else {
            let Some((media_type, bytes)) = state.manifests.get(&name) else {
                return reply_error(404, "MANIFEST_UNKNOWN", "manifest unknown");
            };
            let (digest, length) = (sha256(bytes), bytes.len().to_string());
            let headers = [
                ("content-type", media_type.as_str()),
                ("docker-content-digest", &digest),
                ("content-length", length.as_str()),
            ];
            reply(
                200,
                &headers,
                if method == "HEAD" {
                    Body::empty()
                } else {
                    Body::from(bytes.clone())
                },
            )
        };
    }
    reply_error(404, "NOT_FOUND", "no such path")
}

fn upload(
    state: &mut State,
    address: SocketAddr,
    method: &str,
    repository: &str,
    id: &str,
    query: &[(String, String)],
    body: &Bytes,
) -> Response<Body> {
    let digest = query
        .iter()
        .find(|(name, _)| name == "digest")
        .map(|(_, value)| value.clone());
    let id = if method == "POST" {
        state.issued += 1;
        let id = format!("upload-{}", state.issued);
        state.uploads.insert(id.clone(), Vec::new());
        id
    } else {
        id.to_owned()
    };
    let Some(so_far) = state.uploads.get_mut(&id) else {
        return reply_error(
            404,
            "BLOB_UPLOAD_UNKNOWN",
            "blob upload unknown to registry",
        );
    };
    so_far.extend_from_slice(body);
    let range = format!("0-{}", so_far.len().saturating_sub(1));
    let location = format!(
        "http://{address}/v2/{repository}/blobs/uploads/{id}?_state=s{}",
        so_far.len()
    );
    let Some(digest) = digest.filter(|_| method != "PATCH") else {
        return reply(
            202,
            &[
                ("location", &location),
                ("range", &range),
                ("docker-upload-uuid", &id),
                ("content-length", "0"),
            ],
            "",
        );
    };
    let bytes = state.uploads.remove(&id).unwrap_or_default();
    if sha256(&bytes) != digest {
        return reply_error(
            400,
            "DIGEST_INVALID",
            "provided digest did not match uploaded content",
        );
    }
    state.blobs.insert(digest.clone(), bytes.into());
    let location = format!("http://{address}/v2/{repository}/blobs/{digest}");
    reply(
        201,
        &[
            ("location", &location),
            ("docker-content-digest", &digest),
            ("content-length", "0"),
        ],
        "",
    )
}

fn put_manifest(
    state: &mut State,
    repository: &str,
    reference: &str,
    name: &str,
    media_type: &str,
    body: &Bytes,
) -> Response<Body> {
    let manifest: Value = match serde_json::from_slice(body) {
        Ok(value) => value,
        Err(_) => return reply_error(400, "MANIFEST_INVALID", "manifest invalid"),
    };
    let digests = |value: &Value| -> Vec<String> {
        value
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|d| d["digest"].as_str().map(ToOwned::to_owned))
            .collect()
    };
    let mut blobs = digests(&manifest["layers"]);
    blobs.extend(manifest["config"]["digest"].as_str().map(ToOwned::to_owned));
    let children = digests(&manifest["manifests"]);
    let whole = blobs.iter().all(|b| state.blobs.contains_key(b))
        && children
            .iter()
            .all(|c| state.manifests.contains_key(&format!("{repository}@{c}")));
    if !whole {
        return reply_error(400, "MANIFEST_BLOB_UNKNOWN", "blob unknown to registry");
    }
    if state.immutable && state.manifests.contains_key(name) {
        return reply_error(
            412,
            "PRECONDITION",
            &format!(
                "Failed to process request due to '{repository}:{reference}' configured as immutable."
            ),
        );
    }
    let digest = sha256(body);
    state
        .manifests
        .insert(name.into(), (media_type.into(), body.clone()));
    state.manifests.insert(
        format!("{repository}@{digest}"),
        (media_type.into(), body.clone()),
    );
    reply(
        201,
        &[("docker-content-digest", &digest), ("content-length", "0")],
        "",
    )
}

//! The routes: each handler reads its request, calls the [`Backend`], and returns the answer. A
//! handler does nothing else.

use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{
    DefaultBodyLimit, Extension, FromRequest, FromRequestParts, Query, Request, State,
};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::future::BoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::error::{ApiError, ErrorBody};
use super::proof::{Proof, ProofQuery};
use super::scoped;
use super::server::Connection;
use super::started::StartedJobs;
use super::types::*;
use super::{
    AccessTokens, ApiToken, Backend, CURSOR_HEADER, TOKEN_HEADER, VERSION, VERSION_HEADER,
    access_tokens, body, caller, events, lists, members, openapi, run_token,
};
use crate::reach::Reach;
use base::fault::Fault;
use base::limits::{
    API_AUDIT_CHARS_MAX, API_BODY_BYTES_MAX, API_LOOK_EVERY, API_ROWS_DEFAULT, API_ROWS_MAX,
    LONG_POLL_MAX,
};
use base::tally::Tally;
use model::actor::Actor;

/// The state of every handler.
#[derive(Clone)]
pub(super) struct App {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) token: Arc<ApiToken>,
    /// The query keys of every route.
    pub(super) queries: Arc<openapi::Queries>,
    /// The access tokens.
    pub(super) access: Arc<AccessTokens>,
    /// What the requests of tokens with a scope share.
    pub(super) scoped: Arc<scoped::Shared>,
    /// Who started the jobs.
    pub(super) started: Arc<StartedJobs>,
    /// Cancelled when the daemon stops: waits end early, streams end.
    pub(super) stop: CancellationToken,
    /// Requests with a wrong token.
    pub(super) wrong_tokens: Tally,
    /// Permits for lists in progress: many requests at once take no more memory than a few.
    pub(super) lists: Arc<Semaphore>,
}

impl App {
    /// Creates a list, or a page of one, when a permit is free.
    pub(super) async fn listed<T>(
        &self,
        make: impl Future<Output = Result<T, Fault>>,
    ) -> Result<T, Fault> {
        let _place = self
            .lists
            .acquire()
            .await
            .map_err(|_| Fault::unreachable("the daemon stops"))?;
        make.await
    }
}

/// The daemon for the actor of a request: what it may not see does not exist. [`caller::authenticate`] makes
/// it. The state of the guarded routes is empty, so their handlers reach the daemon through this
/// only.
#[derive(Clone)]
pub(super) struct For(pub(super) App);

impl<S: Send + Sync> FromRequestParts<S> for For {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let own = parts.extensions.get::<Self>().cloned();
        own.ok_or_else(|| Fault::internal("a request without an actor reached a handler").into())
    }
}

/// The change that a request asks for, for the log: set when its body has been read.
#[derive(Clone, Default)]
struct Asked(Arc<OnceLock<String>>);

/// All routes. Everything under `/v1/` and the metrics require a token ([`caller::authenticate`]); the
/// dashboard will replace [`home`].
pub(super) fn router(app: App) -> Router {
    // Without state: a handler of these cannot reach the daemon but through `For`.
    let guarded = Router::<()>::new()
        .route(
            "/v1/access",
            get(access_tokens::list)
                .post(access_tokens::create)
                .delete(access_tokens::revoke),
        )
        .route("/v1/access/show", get(access_tokens::show))
        .route("/v1/access/rotate", post(access_tokens::rotate))
        .route("/v1/artifacts", get(lists::artifacts).post(publish))
        .route("/v1/artifacts/show", get(lists::show))
        .route("/v1/transfers", get(lists::transfers).post(deliver))
        .route("/v1/transfers/action", post(lists::act))
        .route("/v1/deliveries", get(lists::deliveries))
        .route("/v1/deliveries/show", get(lists::delivery))
        .route("/v1/runs", get(lists::runs).post(train))
        .route("/v1/runs/show", get(run))
        .route("/v1/runs/action", post(act_on_run))
        .route("/v1/plan", post(plan))
        .route("/v1/sites", get(lists::sites))
        .route("/v1/sites/show", get(members::site))
        .route("/v1/sites/set", post(members::set_site))
        .route("/v1/sites/action", post(members::act_on_site))
        .route("/v1/publishers", get(lists::publishers))
        .route("/v1/publishers/show", get(members::publisher))
        .route("/v1/publishers/action", post(members::act_on_publisher))
        .route("/v1/tokens", post(token))
        .route("/v1/verify", post(verify))
        .route("/v1/pin", post(pin))
        .route("/v1/labels/export", post(export_labels))
        .route("/v1/export", post(export))
        .route("/v1/import", post(import))
        .route("/v1/adopt", post(adopt))
        .route("/v1/gc", post(gc))
        .route("/v1/doctor", get(doctor))
        .route("/v1/jobs", get(job).delete(cancel_job))
        .route("/v1/jobs/list", get(lists::jobs))
        .route("/v1/workers", get(lists::workers))
        .route("/v1/events", get(events::events))
        .route("/metrics", get(metrics))
        .route_layer(middleware::from_fn_with_state(app.clone(), check_query))
        .route_layer(middleware::from_fn_with_state(
            app.clone(),
            caller::authenticate,
        ));
    Router::new()
        .route("/", get(home))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/v1/proof", get(proof))
        .route("/openapi.json", get(openapi::document))
        .route_layer(middleware::from_fn_with_state(app.clone(), check_query))
        .with_state(app)
        .merge(guarded)
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(API_BODY_BYTES_MAX))
        .layer(middleware::from_fn(stamp))
}

/// Adds the version to every reply, including errors.
pub(super) async fn stamp(request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut response = next.run(request).await;
    response
        .headers_mut()
        .insert(VERSION_HEADER, HeaderValue::from_static(VERSION));
    tracing::debug!(%method, ?path, status = response.status().as_u16(), "answered a request");
    response
}

/// The token of a request, from either header.
pub(super) fn presented(headers: &HeaderMap) -> Option<&[u8]> {
    let own = headers.get(TOKEN_HEADER).map(HeaderValue::as_bytes);
    own.or_else(|| {
        headers
            .get(header::AUTHORIZATION)
            .and_then(|v| v.as_bytes().strip_prefix(b"Bearer "))
    })
}

/// Passes a request on. A change is logged: who requested what from where, and the status.
pub(super) async fn log_change(
    actor: &Actor,
    connection: &Connection,
    mut request: Request,
    next: Next,
) -> Response {
    if ![Method::POST, Method::DELETE].contains(request.method())
        || request.uri().path() == "/v1/plan"
    {
        return next.run(request).await;
    }
    let (path, asked) = (clipped(request.uri().path()), Asked::default());
    // A request without a body names its object in the query, which holds no secret.
    let query = clipped(request.uri().query().unwrap_or_default());
    request.extensions_mut().insert(asked.clone());
    let response = next.run(request).await;
    let request = asked.0.get().map_or(query.as_str(), String::as_str);
    let who = actor.to_string();
    tracing::info!(who, peer = %connection.peer, path, request, status = response.status().as_u16(), "a change over the API");
    response
}

pub(super) fn clipped(text: &str) -> String {
    text.chars().take(API_AUDIT_CHARS_MAX).collect()
}

async fn no_such_route(request: Request) -> ApiError {
    let path: String = request.uri().path().chars().take(200).collect();
    Fault::not_found(format!("there is nothing at {path:?}"))
        .with_next("see openapi.json for what there is")
        .into()
}

async fn no_such_method(request: Request) -> ApiError {
    let fault = Fault::usage(format!(
        "{} is not allowed at {:?}",
        request.method(),
        request.uri().path()
    ));
    ApiError::with_status(
        fault.with_next("see openapi.json for what is"),
        StatusCode::METHOD_NOT_ALLOWED,
    )
}

/// A query; its errors have the usual form.
pub(super) struct Q<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Q<T> {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let Query(query) = Query::from_request_parts(parts, state).await?;
        Ok(Self(query))
    }
}

/// Refuses query keys that the description of the API does not name: a caller that trusts a filter
/// which does not exist would act on too much.
async fn check_query(
    State(app): State<App>,
    Query(keys): Query<Vec<(String, String)>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let known = app.queries.keys(request.method(), request.uri().path());
    match keys.iter().find(|(key, _)| !known.contains(key)) {
        None => Ok(next.run(request).await),
        Some((key, _)) => {
            let fault = Fault::usage(format!("the query has the unknown key {:?}", clipped(key)));
            Err(fault
                .with_next(match known.join(", ") {
                    none if none.is_empty() => "leave the query out".to_owned(),
                    keys => format!("use one of: {keys}"),
                })
                .into())
        }
    }
}

/// A JSON body; its errors have the usual form.
pub(super) struct B<T>(pub(super) T);

impl<T: DeserializeOwned + Serialize, S: Send + Sync> FromRequest<S> for B<T> {
    type Rejection = ApiError;
    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        let asked = parts.extensions.get::<Asked>().cloned();
        let body = Body::from(body::read(body, parts.extensions.get()).await?);
        let Json(body) = Json::from_request(Request::from_parts(parts, body), state).await?;
        if let Some(asked) = asked {
            // No body holds a secret: passwords are in files. A request that cannot be recorded is
            // refused.
            let text = serde_json::to_string(&body)
                .map_err(|e| Fault::internal(format!("the request cannot be recorded: {e}")))?;
            let _ = asked.0.set(clipped(&text));
        }
        Ok(Self(body))
    }
}

/// The limit of rows in a reply.
pub(super) fn rows(asked: Option<u32>) -> u32 {
    asked.unwrap_or(API_ROWS_DEFAULT).clamp(1, API_ROWS_MAX)
}

/// A reply with the next cursor.
pub(super) fn with_cursor(reply: impl IntoResponse, cursor: u64) -> Response {
    ([(CURSOR_HEADER, HeaderValue::from(cursor))], reply).into_response()
}

/// Queries, and queries again after each change, until there is enough, the wait is over or the
/// daemon stops. The last result is the answer.
pub(super) async fn wait_for<'a, T>(
    app: &App,
    wait_seconds: Option<u64>,
    look: impl Fn() -> BoxFuture<'a, Result<T, Fault>>,
    enough: impl Fn(&T) -> bool,
) -> Result<T, Fault> {
    let wait = Duration::from_secs(wait_seconds.unwrap_or(0)).min(LONG_POLL_MAX);
    let deadline = Instant::now() + wait;
    loop {
        // Started before the query: otherwise a change between the query and the wait would be
        // missed.
        let mut changed = app.backend.changed();
        let already = futures::poll!(&mut changed).is_ready();
        let answer = look().await?;
        if enough(&answer) || Instant::now() >= deadline || app.stop.is_cancelled() {
            return Ok(answer);
        }
        if !already {
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep_until(deadline) => {}
                () = app.stop.cancelled() => {}
            }
        }
        tokio::time::sleep(API_LOOK_EVERY).await;
    }
}

fn accepted<T: Serialize>(body: T) -> Response {
    (StatusCode::ACCEPTED, Json(body)).into_response()
}

/// A plain page. The dashboard will be here.
async fn home(State(app): State<App>) -> Html<String> {
    let role = app.backend.role();
    Html(format!(
        "<!doctype html><meta charset=\"utf-8\"><title>Packhorse</title><p>Packhorse {VERSION}, a {role}. \
         The API is described in <a href=\"openapi.json\">openapi.json</a>; this daemon is <a href=\"healthz\">alive</a>, \
         and <a href=\"readyz\">ready</a> or not.\n"
    ))
}

/// Whether the process answers.
#[utoipa::path(get, path = "/healthz", tag = "daemon", security(()), responses((status = 200, description = "`{\"status\":\"ok\"}`")))]
pub(super) async fn healthz() -> Json<serde_json::Value> {
    Json(serde_json::json!({"status": "ok"}))
}

/// Whether it can work.
#[utoipa::path(get, path = "/readyz", tag = "daemon", security(()), responses(
    (status = 200, description = "`{\"status\":\"ready\"}`"),
    (status = 503, description = "what is missing", body = ErrorBody),
))]
pub(super) async fn readyz(State(app): State<App>) -> Result<Json<serde_json::Value>, ApiError> {
    match app.backend.ready().await {
        Ok(()) => Ok(Json(serde_json::json!({"status": "ready"}))),
        Err(fault) => Err(ApiError::with_status(
            fault,
            StatusCode::SERVICE_UNAVAILABLE,
        )),
    }
}

/// The daemon's proof that it holds the token, which a client checks before it sends the token over
/// plain HTTP.
#[utoipa::path(get, path = "/v1/proof", tag = "daemon", security(()), params(ProofQuery), responses(
    (status = 200, description = "the proof", body = Proof),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn proof(
    State(app): State<App>,
    Extension(connection): Extension<Connection>,
    Q(query): Q<ProofQuery>,
) -> Result<Json<Proof>, ApiError> {
    let address = connection
        .local
        .map(|address| address.to_string())
        .unwrap_or_default();
    // A client with another token than the daemon's own requests a proof with that token.
    let other = match &query.token {
        Some(id) => app.access.proof_key(id),
        None => run_token::of_query(&app, &query).await,
    };
    let token = other.as_ref().unwrap_or(&app.token);
    let proof = Proof::make(token, &query, address)
        .ok_or_else(|| Fault::usage("the challenge is not 32 bytes in hex"))?;
    Ok(Json(proof))
}

/// Metrics in Prometheus text form.
#[utoipa::path(get, path = "/metrics", tag = "daemon", responses((status = 200, description = "text", content_type = "text/plain")))]
pub(super) async fn metrics(For(app): For) -> Result<Response, ApiError> {
    let mut text = app.listed(app.backend.metrics()).await?;
    text.push_str(&app.access.metrics());
    Ok((
        [(
            header::CONTENT_TYPE,
            "text/plain; version=0.0.4; charset=utf-8",
        )],
        Body::from(text),
    )
        .into_response())
}

/// Publishes. The job's result is a `Published`.
#[utoipa::path(post, path = "/v1/artifacts", tag = "artifacts", request_body = PublishRequest, responses(
    (status = 202, description = "begun", body = Job),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn publish(
    For(app): For,
    Extension(actor): Extension<Actor>,
    B(request): B<PublishRequest>,
) -> Result<Response, ApiError> {
    Ok(accepted(
        app.backend.publish(request, Reach::of(&actor)).await?,
    ))
}

/// Delivers.
#[utoipa::path(post, path = "/v1/transfers", tag = "transfers", request_body = DeliverRequest, responses(
    (status = 202, description = "begun", body = Delivered),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn deliver(
    For(app): For,
    B(request): B<DeliverRequest>,
) -> Result<Response, ApiError> {
    Ok(accepted(app.backend.deliver(request).await?))
}

/// One training run, at its end or after `wait` seconds (50 at most), whichever is first.
#[utoipa::path(get, path = "/v1/runs/show", tag = "runs", params(RunQuery), responses(
    (status = 200, description = "the run", body = Run),
    (status = 404, description = "there is none", body = ErrorBody),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn run(For(app): For, Q(query): Q<RunQuery>) -> Result<Json<Run>, ApiError> {
    let look = || app.backend.run(&query.name);
    Ok(Json(
        wait_for(&app, query.wait, look, |run: &Run| run.state.is_final()).await?,
    ))
}

/// Starts a training run. An existing run with the same name and the same request is returned.
#[utoipa::path(post, path = "/v1/runs", tag = "runs", request_body = RunRequest, responses(
    (status = 202, description = "begun", body = Run),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn train(For(app): For, B(request): B<RunRequest>) -> Result<Response, ApiError> {
    Ok(accepted(app.backend.train(request).await?))
}

/// Finishes a training run, as a training platform does at its end, or cancels it.
#[utoipa::path(post, path = "/v1/runs/action", tag = "runs", request_body = RunActionRequest, responses(
    (status = 200, description = "the run after it", body = Run),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn act_on_run(
    For(app): For,
    B(request): B<RunActionRequest>,
) -> Result<Json<Run>, ApiError> {
    Ok(Json(app.backend.act_on_run(request).await?))
}

/// The cost of a delivery. Delivers nothing.
#[utoipa::path(post, path = "/v1/plan", tag = "transfers", request_body = DeliverRequest, responses(
    (status = 200, description = "a row for each artifact and site", body = Vec<PlanRow>),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn plan(
    For(app): For,
    B(request): B<DeliverRequest>,
) -> Result<Json<Vec<PlanRow>>, ApiError> {
    Ok(Json(app.backend.plan(request).await?))
}

/// Creates a join token (hub only).
#[utoipa::path(post, path = "/v1/tokens", tag = "sites", request_body = TokenRequest, responses(
    (status = 200, description = "the token, which is shown this once", body = TokenReply),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn token(
    For(app): For,
    B(request): B<TokenRequest>,
) -> Result<Response, ApiError> {
    let reply = app.backend.token(request).await?;
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(reply)).into_response())
}

/// Verifies an artifact. The job's result is an array of findings, empty when it is intact; its
/// `notes` report other differences from the delivered state.
#[utoipa::path(post, path = "/v1/verify", tag = "artifacts", request_body = VerifyRequest, responses(
    (status = 202, description = "begun", body = Job),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn verify(
    For(app): For,
    B(request): B<VerifyRequest>,
) -> Result<Response, ApiError> {
    Ok(accepted(app.backend.verify(request).await?))
}

/// Keeps an artifact's relayed bytes at any age, or ends that (hub only).
#[utoipa::path(post, path = "/v1/pin", tag = "artifacts", request_body = PinRequest, responses(
    (status = 200, description = "the artifact after it", body = Artifact),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn pin(
    For(app): For,
    B(request): B<PinRequest>,
) -> Result<Json<Artifact>, ApiError> {
    Ok(Json(
        app.backend.pin(&request.artifact, request.pinned).await?,
    ))
}

/// Writes labels to a new directory, in a format of annotation tools. The `notes` of the job report
/// what the format cannot hold.
#[utoipa::path(post, path = "/v1/labels/export", tag = "artifacts", request_body = ExportLabelsRequest, responses(
    (status = 202, description = "begun", body = Job),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn export_labels(
    For(app): For,
    Extension(actor): Extension<Actor>,
    B(request): B<ExportLabelsRequest>,
) -> Result<Response, ApiError> {
    Ok(accepted(
        app.backend
            .export_labels(request, Reach::of(&actor))
            .await?,
    ))
}

/// Writes artifacts to one file, for transport by hand.
#[utoipa::path(post, path = "/v1/export", tag = "artifacts", request_body = ExportRequest, responses(
    (status = 202, description = "begun", body = Job),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn export(
    For(app): For,
    Extension(actor): Extension<Actor>,
    B(request): B<ExportRequest>,
) -> Result<Response, ApiError> {
    Ok(accepted(
        app.backend
            .export(request.artifacts, request.out, Reach::of(&actor))
            .await?,
    ))
}

/// Imports such a file.
#[utoipa::path(post, path = "/v1/import", tag = "artifacts", request_body = ImportRequest, responses(
    (status = 202, description = "begun", body = Job),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn import(
    For(app): For,
    Extension(actor): Extension<Actor>,
    B(request): B<ImportRequest>,
) -> Result<Response, ApiError> {
    Ok(accepted(
        app.backend.import(request.file, Reach::of(&actor)).await?,
    ))
}

/// Takes up what the NAS of a site already holds: registers versions without a record, and records
/// the content of others. Transfers nothing.
#[utoipa::path(post, path = "/v1/adopt", tag = "daemon", responses(
    (status = 202, description = "begun", body = Job),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn adopt(For(app): For) -> Result<Response, ApiError> {
    Ok(accepted(app.backend.adopt().await?))
}

/// Frees unreferenced content.
#[utoipa::path(post, path = "/v1/gc", tag = "daemon", responses(
    (status = 202, description = "begun", body = Job),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn gc(For(app): For) -> Result<Response, ApiError> {
    Ok(accepted(app.backend.gc().await?))
}

/// Checks the daemon's surroundings.
#[utoipa::path(get, path = "/v1/doctor", tag = "daemon", responses(
    (status = 200, description = "a line for each check: `ok …` or `fault …`", body = Vec<String>),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn doctor(For(app): For) -> Result<Json<Vec<String>>, ApiError> {
    let mut lines = app.backend.doctor().await?;
    lines.extend(app.access.doctor());
    Ok(Json(lines))
}

/// A job, at its end or after `wait` seconds (50 at most), whichever is first.
#[utoipa::path(get, path = "/v1/jobs", tag = "daemon", params(JobQuery), responses(
    (status = 200, description = "the job", body = Job),
    (status = 404, description = "there is none (a restart forgets them)", body = ErrorBody),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn job(For(app): For, Q(query): Q<JobQuery>) -> Result<Json<Job>, ApiError> {
    let look = || app.backend.job(&query.id);
    Ok(Json(
        wait_for(&app, query.wait, look, |job: &Job| job.state != "running").await?,
    ))
}

/// Cancels a job. The answer is its current state; it may take a moment to stop.
#[utoipa::path(delete, path = "/v1/jobs", tag = "daemon", params(JobQuery), responses(
    (status = 200, description = "the job", body = Job),
    (status = 404, description = "there is none (a restart forgets them)", body = ErrorBody),
    (status = 409, description = "it has ended", body = ErrorBody),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn cancel_job(
    For(app): For,
    Q(query): Q<JobQuery>,
) -> Result<Json<Job>, ApiError> {
    app.backend.cancel_job(&query.id).await?;
    let look = || app.backend.job(&query.id);
    Ok(Json(
        wait_for(&app, query.wait, look, |job: &Job| job.state != "running").await?,
    ))
}

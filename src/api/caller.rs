//! Who makes a request: the holder of the token in its headers.
//!
//! [`authenticate`] runs before every route that needs a token. It finds the actor, asks whether the
//! actor may use the route, and gives the handler the daemon as the actor may see it. What a token
//! waits for ends with the token. Nothing is stored.

use std::sync::Arc;

use axum::body::{Body, HttpBody as _};
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use futures::StreamExt as _;

use super::error::ApiError;
use super::routes::{App, For, clipped, log_change, presented};
use super::scoped::Scoped;
use super::server::Connection;
use super::tokens::{Held, Invalid};
use super::{access, body, run_token};
use base::fault::{Fault, Retry};
use model::actor::Actor;

/// Finds the actor of a request by the token in either header, and lets the request through if the
/// actor has the right.
pub(super) async fn authenticate(
    State(app): State<App>,
    Extension(connection): Extension<Connection>,
    headers: HeaderMap,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let caller = match presented(&headers) {
        None => return Err(no_token("the API wants a token")),
        Some(presented) => caller(&app, presented).await,
    };
    let caller = caller.map_err(|invalid| {
        let (peer, path) = (&connection.peer, clipped(request.uri().path()));
        app.wrong_tokens.note(format_args!(
            "{peer}: {} {path}{}",
            request.method(),
            invalid.for_log()
        ));
        refusal(&app, &invalid)
    })?;
    connection.finish();
    // Held until the response was made: what the body became takes as much memory.
    let memory = body::Memory::default();
    request.extensions_mut().insert(memory.clone());
    let actor = caller.actor;
    let request = access::check(&app, &actor, request).await?;
    let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
    let work = respond(&app, &actor, &connection, request, next);
    let response = match caller.held {
        None => work.await,
        // A change that has begun is not stopped in the middle.
        Some(_) if !is_read => work.await,
        Some(held) => {
            let response = tokio::select! {
                response = work => response,
                () = held.ended() => return Err(no_token("the access token has ended")),
            };
            ending_with(held, response)
        }
    };
    drop(memory);
    Ok(response)
}

/// Passes a request on to its handler, which sees the daemon as the actor may.
async fn respond(
    app: &App,
    actor: &Actor,
    connection: &Connection,
    mut request: Request,
    next: Next,
) -> Response {
    let mut own = app.clone();
    if let Actor::Token(grant) = actor
        && grant.scope.is_limited()
    {
        let (backend, grant) = (app.backend.clone(), grant.clone());
        let (shared, started) = (app.scoped.clone(), app.started.clone());
        own.backend = Arc::new(Scoped::new(backend, grant, shared, started));
    }
    request.extensions_mut().insert(For(own));
    request.extensions_mut().insert(actor.clone());
    let response = log_change(actor, connection, request, next).await;
    match actor {
        Actor::Trainer(_) | Actor::Token(_) => app.started.note_response(actor, response).await,
        _ => response,
    }
}

/// A response that ends with the token, if its body is still being made.
fn ending_with(held: Arc<Held>, response: Response) -> Response {
    if response.body().size_hint().exact().is_some() {
        return response;
    }
    let (parts, body) = response.into_parts();
    let ended = Box::pin(async move { held.ended().await });
    let body = body.into_data_stream().take_until(ended);
    Response::from_parts(parts, Body::from_stream(body))
}

/// Who makes a request.
struct Caller {
    actor: Actor,
    /// The access token that it holds.
    held: Option<Arc<Held>>,
}

/// Who holds this token.
async fn caller(app: &App, presented: &[u8]) -> Result<Caller, Invalid> {
    if app.token.is(presented) {
        return Ok(Caller {
            actor: Actor::Admin,
            held: None,
        });
    }
    if let Some(run) = run_token::run_of(app, presented).await {
        return Ok(Caller {
            actor: Actor::Trainer(run),
            held: None,
        });
    }
    let held = app.access.find(presented)?;
    Ok(Caller {
        actor: Actor::Token(held.grant.clone()),
        held: Some(held),
    })
}

/// The answer to an invalid token.
fn refusal(app: &App, invalid: &Invalid) -> ApiError {
    if let Some(pause) = app.access.refuse(invalid.id()) {
        let ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        let fault = Fault::not_allowed("too many requests with an invalid token")
            .with_next("send requests with a valid token: they are not limited")
            .with_retry(Retry::AfterMs(ms));
        return ApiError::with_status(fault, StatusCode::TOO_MANY_REQUESTS);
    }
    match invalid {
        Invalid::Unknown(_) => no_token("the API token is wrong"),
        Invalid::Expired(_) => no_token("the access token has expired"),
        Invalid::Revoked(_) => no_token("the access token is revoked"),
    }
}

fn no_token(why: &str) -> ApiError {
    let fault = Fault::not_allowed(why).with_next(
        "send the content of <data_dir>/api-token, or an access token, in X-Packhorse-Token, or use --config or --token-file",
    );
    ApiError::with_status(fault, StatusCode::UNAUTHORIZED)
}

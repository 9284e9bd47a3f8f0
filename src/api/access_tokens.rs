//! The routes of access tokens: create, list, show, rotate and revoke them.

use axum::Json;
use axum::extract::Extension;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};

use super::error::{ApiError, ErrorBody};
use super::routes::{B, For, Q};
use super::types::*;
use model::actor::Actor;

/// The access tokens of this daemon, by name, without their secrets.
#[utoipa::path(get, path = "/v1/access", tag = "access", responses(
    (status = 200, description = "the tokens, the expired and the revoked ones included", body = Vec<AccessToken>),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn list(For(app): For) -> Json<Vec<AccessToken>> {
    Json(app.access.list())
}

/// One access token, without its secret.
#[utoipa::path(get, path = "/v1/access/show", tag = "access", params(AccessQuery), responses(
    (status = 200, description = "the token", body = AccessToken),
    (status = 404, description = "there is none", body = ErrorBody),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn show(
    For(app): For,
    Q(query): Q<AccessQuery>,
) -> Result<Json<AccessToken>, ApiError> {
    Ok(Json(app.access.show(&query.name)?))
}

/// Creates an access token.
#[utoipa::path(post, path = "/v1/access", tag = "access", request_body = AccessTokenRequest, responses(
    (status = 200, description = "the token, which is shown this once", body = AccessTokenReply),
    (status = 409, description = "there is one of this name", body = ErrorBody),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn create(
    For(app): For,
    Extension(by): Extension<Actor>,
    B(request): B<AccessTokenRequest>,
) -> Result<Response, ApiError> {
    Ok(once(app.access.create(&by, request).await?))
}

/// Replaces the secret of an access token. The old one ends at once.
#[utoipa::path(post, path = "/v1/access/rotate", tag = "access", request_body = AccessRotateRequest, responses(
    (status = 200, description = "the token with its new secret, which is shown this once", body = AccessTokenReply),
    (status = 404, description = "there is none", body = ErrorBody),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn rotate(
    For(app): For,
    B(request): B<AccessRotateRequest>,
) -> Result<Response, ApiError> {
    let AccessRotateRequest { name, ttl_seconds } = request;
    Ok(once(app.access.rotate(&name, ttl_seconds).await?))
}

/// Revokes an access token: its requests are refused, and its open streams end.
#[utoipa::path(delete, path = "/v1/access", tag = "access", params(AccessQuery), responses(
    (status = 200, description = "the token after it", body = AccessToken),
    (status = 404, description = "there is none", body = ErrorBody),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn revoke(
    For(app): For,
    Q(query): Q<AccessQuery>,
) -> Result<Json<AccessToken>, ApiError> {
    Ok(Json(app.access.revoke(&query.name).await?))
}

/// An answer with a secret, which no proxy keeps.
fn once(reply: AccessTokenReply) -> Response {
    let no_store = HeaderValue::from_static("no-store");
    ([(header::CACHE_CONTROL, no_store)], Json(reply)).into_response()
}

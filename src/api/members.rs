//! The routes of sites and publishers as members of a hub.

use axum::Json;
use axum::extract::Extension;

use super::error::{ApiError, ErrorBody};
use super::routes::{B, For, Q};
use super::types::*;
use model::actor::Actor;

/// One site, with its certificate (hub only).
#[utoipa::path(get, path = "/v1/sites/show", tag = "sites", params(MemberQuery), responses(
    (status = 200, description = "the site", body = Site),
    (status = 404, description = "there is none", body = ErrorBody),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn site(For(app): For, Q(query): Q<MemberQuery>) -> Result<Json<Site>, ApiError> {
    Ok(Json(app.backend.site(&query.name).await?))
}

/// Changes the labels of a site (hub only). Selections of sites use them from then on.
#[utoipa::path(post, path = "/v1/sites/set", tag = "sites", request_body = SetSiteRequest, responses(
    (status = 200, description = "the site after it", body = Site),
    (status = 404, description = "there is none", body = ErrorBody),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn set_site(
    For(app): For,
    Extension(actor): Extension<Actor>,
    B(request): B<SetSiteRequest>,
) -> Result<Json<Site>, ApiError> {
    Ok(Json(app.backend.set_site(&actor, request).await?))
}

/// Revokes, restores or removes a site (hub only). A revocation closes its connections.
#[utoipa::path(post, path = "/v1/sites/action", tag = "sites", request_body = MemberActionRequest, responses(
    (status = 200, description = "the site after it; of a removed one, as it was before", body = Site),
    (status = 404, description = "there is none", body = ErrorBody),
    (status = 409, description = "something would be lost with it", body = ErrorBody),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn act_on_site(
    For(app): For,
    Extension(actor): Extension<Actor>,
    B(request): B<MemberActionRequest>,
) -> Result<Json<Site>, ApiError> {
    Ok(Json(app.backend.act_on_site(&actor, request).await?))
}

/// One publisher, with its certificate (hub only).
#[utoipa::path(get, path = "/v1/publishers/show", tag = "sites", params(MemberQuery), responses(
    (status = 200, description = "the publisher", body = Publisher),
    (status = 404, description = "there is none", body = ErrorBody),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn publisher(
    For(app): For,
    Q(query): Q<MemberQuery>,
) -> Result<Json<Publisher>, ApiError> {
    Ok(Json(app.backend.publisher(&query.name).await?))
}

/// Revokes, restores or removes a publisher (hub only). A revocation closes its connections.
#[utoipa::path(post, path = "/v1/publishers/action", tag = "sites", request_body = MemberActionRequest, responses(
    (status = 200, description = "the publisher after it; of a removed one, as it was before", body = Publisher),
    (status = 404, description = "there is none", body = ErrorBody),
    (status = "default", description = "an error", body = ErrorBody),
))]
pub(super) async fn act_on_publisher(
    For(app): For,
    Extension(actor): Extension<Actor>,
    B(request): B<MemberActionRequest>,
) -> Result<Json<Publisher>, ApiError> {
    Ok(Json(app.backend.act_on_publisher(&actor, request).await?))
}

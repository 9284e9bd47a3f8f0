//! The description of the API, generated from the handlers and types.

use axum::Json;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

use super::{error::ErrorBody, events, lists, routes, types::*};

#[derive(OpenApi)]
#[openapi(
    info(title = "Packhorse", description = "Carries artifacts between a hub and many sites. Every daemon serves this."),
    // Relative to this document, so that it is also valid behind a proxy's prefix.
    servers((url = ".")),
    paths(
        routes::healthz, routes::readyz, routes::proof, routes::metrics, lists::artifacts, lists::show, routes::publish, lists::transfers,
        routes::deliver, lists::act, routes::plan, lists::sites, routes::token, routes::verify, routes::pin, routes::export, routes::import,
        routes::gc, routes::doctor, routes::job, lists::jobs, routes::cancel_job, events::events, lists::deliveries, lists::delivery, lists::runs,
        routes::run, routes::train, routes::act_on_run, lists::workers,
    ),
    components(schemas(ErrorBody, Published, Event, Bytes, State, Action)),
    security(("token" = []), ("bearer" = [])),
    modifiers(&Schemes),
)]
struct Document;

struct Schemes;

impl Modify for Schemes {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let components = document.components.get_or_insert_default();
        components.add_security_scheme(
            "token",
            SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new("X-Packhorse-Token"))),
        );
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
    }
}

/// The document.
pub(super) async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(Document::openapi())
}

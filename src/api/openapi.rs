//! The description of the API, generated from the handlers and types.

use std::collections::HashMap;

use axum::Json;
use axum::http::Method;
use utoipa::openapi::path::ParameterIn;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

use super::{access_tokens, error::ErrorBody, events, lists, members, routes, types::*};

#[derive(OpenApi)]
#[openapi(
    info(title = "Packhorse", description = "Carries artifacts between a hub and many sites. Every daemon serves this."),
    // Relative to this document, so that it is also valid behind a proxy's prefix.
    servers((url = ".")),
    paths(
        access_tokens::list, access_tokens::show, access_tokens::create, access_tokens::rotate, access_tokens::revoke,
        routes::healthz, routes::readyz, routes::proof, routes::metrics, lists::artifacts, lists::show, routes::publish, lists::transfers,
        routes::deliver, lists::act, routes::plan, lists::sites, routes::token, routes::verify, routes::pin, routes::export, routes::import,
        routes::export_labels,
        routes::adopt, routes::gc, routes::doctor, routes::job, lists::jobs, routes::cancel_job, events::events, lists::deliveries, lists::delivery, lists::runs,
        routes::run, routes::train, routes::act_on_run, lists::workers,
        members::site, members::set_site, members::act_on_site, lists::publishers, members::publisher, members::act_on_publisher,
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

/// The query keys of each method and path, by the description.
pub(super) struct Queries(HashMap<(Method, String), Vec<String>>);

impl Queries {
    pub(super) fn documented() -> Self {
        let paths = Document::openapi().paths.paths.into_iter();
        let operations = paths.flat_map(|(path, item)| {
            let of = [
                (Method::GET, item.get),
                (Method::POST, item.post),
                (Method::DELETE, item.delete),
            ];
            of.into_iter()
                .filter_map(move |(method, operation)| Some(((method, path.clone()), operation?)))
        });
        let keys = operations.map(|(route, operation)| {
            let parameters = operation.parameters.unwrap_or_default().into_iter();
            let keys = parameters
                .filter(|parameter| parameter.parameter_in == ParameterIn::Query)
                .map(|parameter| parameter.name);
            (route, keys.collect())
        });
        Self(keys.collect())
    }

    /// The keys that a request may have. HEAD is answered as GET.
    pub(super) fn keys(&self, method: &Method, path: &str) -> &[String] {
        let method = match *method {
            Method::HEAD => Method::GET,
            ref other => other.clone(),
        };
        self.0
            .get(&(method, path.to_owned()))
            .map_or(&[], Vec::as_slice)
    }
}

//! What each route of the API asks for: its verb, and the object as far as a rule needs it.
//!
//! `routes` calls [`check`] for every request that has shown a token; [`model::policy`] decides.
//! Nothing is stored.

use axum::body::Body;
use axum::extract::Request;
use axum::http::{Method, StatusCode};
use serde::de::DeserializeOwned;

use super::error::ApiError;
use super::routes::App;
use super::types::{PublishRequest, RunActionRequest, RunVerb};
use base::fault::Fault;
use model::actor::Actor;
use model::policy::{self, Object, Refusal, Verb};

/// The verb of each route: its method, its path, its verb. A route that is not here is for nobody.
const ROUTES: &[(&str, &str, Verb)] = &[
    ("GET", "/metrics", Verb::Diagnose),
    ("GET", "/v1/access", Verb::ManageAccess),
    ("POST", "/v1/access", Verb::ManageAccess),
    ("DELETE", "/v1/access", Verb::ManageAccess),
    ("POST", "/v1/access/rotate", Verb::ManageAccess),
    ("GET", "/v1/access/show", Verb::ManageAccess),
    // It adds to what the daemon holds, as an import does.
    ("POST", "/v1/adopt", Verb::Import),
    ("GET", "/v1/artifacts", Verb::Read),
    ("POST", "/v1/artifacts", Verb::Publish),
    ("GET", "/v1/artifacts/show", Verb::Read),
    ("GET", "/v1/deliveries", Verb::Watch),
    ("GET", "/v1/deliveries/show", Verb::Read),
    ("GET", "/v1/doctor", Verb::Diagnose),
    ("GET", "/v1/events", Verb::Read),
    ("POST", "/v1/export", Verb::Export),
    ("POST", "/v1/gc", Verb::Collect),
    ("POST", "/v1/import", Verb::Import),
    ("GET", "/v1/jobs", Verb::Read),
    ("DELETE", "/v1/jobs", Verb::CancelJob),
    ("GET", "/v1/jobs/list", Verb::Read),
    ("POST", "/v1/labels/export", Verb::Export),
    ("POST", "/v1/pin", Verb::Pin),
    ("POST", "/v1/plan", Verb::Plan),
    ("GET", "/v1/publishers", Verb::Diagnose),
    ("POST", "/v1/publishers/action", Verb::ManageSites),
    ("GET", "/v1/publishers/show", Verb::Diagnose),
    ("GET", "/v1/runs", Verb::Read),
    ("POST", "/v1/runs", Verb::Train),
    // Or to cancel, which the body says.
    ("POST", "/v1/runs/action", Verb::Finish),
    ("GET", "/v1/runs/show", Verb::Read),
    ("GET", "/v1/sites", Verb::Watch),
    ("POST", "/v1/sites/action", Verb::ManageSites),
    ("POST", "/v1/sites/set", Verb::ManageSites),
    ("GET", "/v1/sites/show", Verb::Read),
    ("POST", "/v1/tokens", Verb::CreateToken),
    ("GET", "/v1/transfers", Verb::Watch),
    ("POST", "/v1/transfers", Verb::Deliver),
    ("POST", "/v1/transfers/action", Verb::Act),
    ("POST", "/v1/verify", Verb::Verify),
    ("GET", "/v1/workers", Verb::Diagnose),
];

/// The verb of a route. `None`: no actor may use it. HEAD is answered as GET.
fn verb_of(method: &Method, path: &str) -> Option<Verb> {
    let method = match method.as_str() {
        "HEAD" => "GET",
        method => method,
    };
    ROUTES
        .iter()
        .find(|(of, at, _)| *of == method && *at == path)
        .map(|(.., verb)| *verb)
}

/// Refuses a request that its actor may not make. Returns it as it was.
pub(super) async fn check(app: &App, actor: &Actor, request: Request) -> Result<Request, ApiError> {
    let path = request.uri().path().to_owned();
    let verb = verb_of(request.method(), &path)
        .ok_or_else(|| Fault::internal(format!("nobody has a right to use {path:?}")))?;
    // The rights of the administrator do not depend on the object: no body is read for them.
    if *actor == Actor::Admin {
        decide(actor, verb, &Object::Daemon)?;
        return Ok(request);
    }
    if matches!(actor, Actor::Token(_)) {
        // No body is read for a request that its role does not permit.
        decide(actor, verb, &Object::Daemon)?;
    }
    let request = match (verb, path.as_str()) {
        (Verb::Publish, _) => {
            let (request, asked) = body::<PublishRequest>(request).await?;
            let publication = Object::Publication {
                reference: &asked.as_ref,
                source: &asked.source,
                run: asked.run.as_deref(),
                delivers: asked.to.is_some(),
            };
            decide(actor, verb, &publication)?;
            request
        }
        (Verb::Finish, _) => {
            let (request, asked) = body::<RunActionRequest>(request).await?;
            let verb = match asked.action {
                RunVerb::Finish => Verb::Finish,
                RunVerb::Cancel => Verb::Cancel,
            };
            decide(actor, verb, &Object::RunByName(&asked.name))?;
            request
        }
        (Verb::Read | Verb::CancelJob, "/v1/jobs") => {
            let id = parameter(&request, "id");
            let is_own = id.is_some_and(|id| app.started.is_by(&id, actor));
            let starter = is_own.then_some(actor);
            match policy::may(actor, verb, &Object::Job { starter }) {
                // The daemon answers as for a job that does not exist.
                Ok(()) | Err(Refusal::Hidden) => {}
                Err(refusal) => return Err(forbidden(refusal)),
            }
            request
        }
        (Verb::Read, "/v1/runs/show") => {
            let name = parameter(&request, "name").unwrap_or_default();
            decide(actor, verb, &Object::RunByName(&name))?;
            request
        }
        _ => {
            decide(actor, verb, &Object::Daemon)?;
            request
        }
    };
    Ok(request)
}

fn decide(actor: &Actor, verb: Verb, object: &Object<'_>) -> Result<(), ApiError> {
    policy::may(actor, verb, object).map_err(forbidden)
}

fn forbidden(refusal: Refusal) -> ApiError {
    ApiError::with_status(refusal.into(), StatusCode::FORBIDDEN)
}

/// The request's body as JSON, and the request as it was.
async fn body<T: DeserializeOwned>(request: Request) -> Result<(Request, T), ApiError> {
    let (parts, body) = request.into_parts();
    let bytes = super::body::read(body, parts.extensions.get()).await?;
    let asked = serde_json::from_slice(&bytes)
        .map_err(|e| Fault::usage(format!("the request's body is malformed: {e}")))?;
    Ok((Request::from_parts(parts, Body::from(bytes)), asked))
}

/// A parameter of the request's query. A value with escapes is none that a trainer needs.
fn parameter(request: &Request, name: &str) -> Option<String> {
    let mut values = request
        .uri()
        .query()?
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .filter(|(key, _)| *key == name);
    let (_, value) = values.next()?;
    // Given twice, the handler might take another one than was checked.
    values.next().is_none().then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_route_of_the_description_has_a_verb() {
        let document = serde_json::to_value(super::super::openapi::document().await.0).unwrap();
        let paths = document["paths"].as_object().unwrap();
        let mut routes = 0;
        for (path, operations) in paths {
            for method in operations.as_object().unwrap().keys() {
                let name = Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
                let is_public = ["/healthz", "/readyz", "/v1/proof"].contains(&path.as_str());
                assert_eq!(
                    verb_of(&name, path).is_some(),
                    !is_public,
                    "{method} {path}"
                );
                routes += 1;
            }
        }
        assert!(routes > 25, "{routes}");
        assert_eq!(verb_of(&Method::POST, "/v1/anything"), None);
    }

    #[test]
    fn a_repeated_parameter_counts_as_missing() {
        let check = |query: &str, expected: Option<&str>| {
            let uri = format!("/v1/jobs?{query}");
            let request = Request::builder().uri(uri).body(Body::empty()).unwrap();
            assert_eq!(parameter(&request, "id").as_deref(), expected, "{query}");
        };
        check("id=j-1", Some("j-1"));
        check("wait=1&id=j-1", Some("j-1"));
        check("id=j-1&id=j-2", None);
        check("wait=1", None);
    }
}

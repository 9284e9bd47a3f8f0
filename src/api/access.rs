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
use model::policy::{self, Object, Verb};

/// The verb of a route. `None`: the route is not in this table, and no actor may use it.
fn verb_of(method: &Method, path: &str) -> Option<Verb> {
    Some(match (method.as_str(), path) {
        ("GET" | "HEAD", _) => Verb::Read,
        ("POST", "/v1/artifacts") => Verb::Publish,
        ("POST", "/v1/transfers") => Verb::Deliver,
        ("POST", "/v1/transfers/action") => Verb::Act,
        ("POST", "/v1/runs") => Verb::Train,
        // Or to cancel, which the body says.
        ("POST", "/v1/runs/action") => Verb::Finish,
        ("POST", "/v1/plan") => Verb::Plan,
        ("POST", "/v1/tokens") => Verb::CreateToken,
        ("POST", "/v1/sites/set" | "/v1/sites/action" | "/v1/publishers/action") => {
            Verb::ManageSites
        }
        ("POST", "/v1/verify") => Verb::Verify,
        ("POST", "/v1/pin") => Verb::Pin,
        ("POST", "/v1/export" | "/v1/labels/export") => Verb::Export,
        ("POST", "/v1/import") => Verb::Import,
        // It adds to what the daemon holds, as an import does.
        ("POST", "/v1/adopt") => Verb::Import,
        ("POST", "/v1/gc") => Verb::Collect,
        ("DELETE", "/v1/jobs") => Verb::CancelJob,
        _ => return None,
    })
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
        (Verb::Read, "/v1/jobs") => {
            let run = parameter(&request, "id").and_then(|id| app.run_jobs.run_of(&id));
            decide(actor, verb, &Object::Job { run: run.as_ref() })?;
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
    policy::may(actor, verb, object)
        .map_err(|refusal| ApiError::with_status(refusal.into(), StatusCode::FORBIDDEN))
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
                assert!(verb_of(&name, path).is_some(), "{method} {path}");
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

//! The API for a trainer, which holds a token of its own run instead of the admin token.
//!
//! The daemon writes a [`RunToken`] to the run's folder when it starts the trainer, and accepts it
//! only while that trainer runs. It may publish the run's model from a path, follow that job, show
//! the run and finish it. [`allow`] refuses everything else.

use std::collections::VecDeque;
use std::fmt;

use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::{Method, StatusCode};
use axum::response::Response;
use parking_lot::Mutex;
use rand::TryRngCore;
use serde::de::DeserializeOwned;

use super::ApiToken;
use super::error::ApiError;
use super::proof::ProofQuery;
use super::routes::App;
use super::types::{Job, PublishRequest, RunActionRequest, RunVerb};
use base::fault::Fault;
use base::limits::{API_BODY_BYTES_MAX, RUN_JOBS_KEPT_MAX};
use base::names::{ArtifactRef, Kind, RunName};

/// The prefix of a token.
const PREFIX: &str = "run.";
/// Random bytes of a token.
const SECRET_BYTES: usize = 32;

/// A token that is valid for one training run: `run.<RUN>.<64 hex digits>`.
#[derive(Clone)]
pub struct RunToken {
    run: RunName,
    secret: [u8; SECRET_BYTES],
}

impl fmt::Debug for RunToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RunToken({}, …)", self.run)
    }
}

impl RunToken {
    /// A new one.
    pub fn new(run: RunName) -> Result<Self, Fault> {
        let mut secret = [0; SECRET_BYTES];
        rand::rngs::OsRng
            .try_fill_bytes(&mut secret)
            .map_err(|e| Fault::internal(format!("no random bits from the system: {e}")))?;
        Ok(Self { run, secret })
    }

    /// Parses a token.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (run, secret) = std::str::from_utf8(text)
            .ok()?
            .strip_prefix(PREFIX)?
            .rsplit_once('.')?;
        let mut bytes = [0; SECRET_BYTES];
        hex::decode_to_slice(secret, &mut bytes).ok()?;
        Some(Self {
            run: run.parse().ok()?,
            secret: bytes,
        })
    }

    /// The text, for the file and for a request's header.
    pub fn text(&self) -> String {
        format!("{PREFIX}{}.{}", self.run, hex::encode(self.secret))
    }

    /// Its run.
    pub fn run(&self) -> &RunName {
        &self.run
    }

    /// Whether both are the same token. Hashes are compared, in constant time.
    pub fn is(&self, other: &Self) -> bool {
        self.run == other.run && blake3::hash(&self.secret) == blake3::hash(&other.secret)
    }
}

/// The newest jobs that trainers started.
#[derive(Default)]
pub(super) struct RunJobs(Mutex<VecDeque<(RunName, String)>>);

impl RunJobs {
    fn note(&self, run: &RunName, job: &str) {
        let mut jobs = self.0.lock();
        if jobs.len() >= RUN_JOBS_KEPT_MAX {
            jobs.pop_front();
        }
        jobs.push_back((run.clone(), job.to_owned()));
    }

    fn has(&self, run: &RunName, job: &str) -> bool {
        self.0
            .lock()
            .iter()
            .any(|(of, known)| of == run && known == job)
    }
}

/// The run whose trainer presents this token, if it runs here now.
pub(super) async fn run_of(app: &App, presented: &[u8]) -> Option<RunName> {
    let presented = RunToken::parse(presented)?;
    let own = app.backend.run_token(presented.run()).await?;
    own.is(&presented).then_some(presented.run)
}

/// The trainer's token that a client requests a proof of.
pub(super) async fn of_query(app: &App, query: &ProofQuery) -> Option<ApiToken> {
    let token = app
        .backend
        .run_token(&query.run.as_ref()?.parse().ok()?)
        .await?;
    ApiToken::parse(&token.text()).ok()
}

/// Refuses a request that a trainer of this run may not make. Returns an allowed request unchanged.
pub(super) async fn allow(app: &App, run: &RunName, request: Request) -> Result<Request, ApiError> {
    let refused = |why: String| {
        let next = format!(
            "ask with the admin token, or leave it to the daemon: this token is good for run {run} only"
        );
        ApiError::with_status(
            Fault::not_allowed(why).with_next(next),
            StatusCode::FORBIDDEN,
        )
    };
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    match (method, path.as_str()) {
        (Method::POST, "/v1/artifacts") => {
            let (request, asked) = body::<PublishRequest>(request).await?;
            may_publish(run, &asked).map_err(refused)?;
            Ok(request)
        }
        (Method::POST, "/v1/runs/action") => {
            let (request, asked) = body::<RunActionRequest>(request).await?;
            if asked.name != run.as_str() || asked.action != RunVerb::Finish {
                return Err(refused(format!(
                    "a trainer finishes its own run {run} only"
                )));
            }
            Ok(request)
        }
        (Method::GET, "/v1/jobs")
            if parameter(&request, "id").is_some_and(|id| app.run_jobs.has(run, &id)) =>
        {
            Ok(request)
        }
        (Method::GET, "/v1/runs/show")
            if parameter(&request, "name").as_deref() == Some(run.as_str()) =>
        {
            Ok(request)
        }
        _ => Err(refused(
            "a trainer publishes the model of its run, finishes that run, and nothing else".into(),
        )),
    }
}

/// Records the job of a trainer's publish, so that the trainer may follow it.
pub(super) async fn note_job(app: &App, run: &RunName, response: Response) -> Response {
    let (parts, body) = response.into_parts();
    let bytes = to_bytes(body, API_BODY_BYTES_MAX).await.unwrap_or_default();
    if let Ok(job) = serde_json::from_slice::<Job>(&bytes) {
        app.run_jobs.note(run, &job.id);
    }
    Response::from_parts(parts, Body::from(bytes))
}

/// A trainer may publish the model of its own run, from a path, without a choice of sites.
fn may_publish(run: &RunName, asked: &PublishRequest) -> Result<(), String> {
    if asked.run.as_deref() != Some(run.as_str()) {
        return Err(format!(
            "a trainer publishes for its own run only: --run {run}"
        ));
    }
    if !asked
        .as_ref
        .parse::<ArtifactRef>()
        .is_ok_and(|artifact| artifact.kind == Kind::Model)
    {
        return Err(format!(
            "a trainer publishes the model of its run, and {} is none",
            asked.as_ref
        ));
    }
    if !asked.source.starts_with('/') {
        return Err("a trainer publishes from a path".into());
    }
    if asked.to.is_some() {
        return Err(
            "the model goes to the site that started the run, and --to names others".into(),
        );
    }
    Ok(())
}

/// The request's body as JSON, and the request as it was.
async fn body<T: DeserializeOwned>(request: Request) -> Result<(Request, T), ApiError> {
    let (parts, body) = request.into_parts();
    let bytes = super::body::read(body).await?;
    let asked = serde_json::from_slice(&bytes)
        .map_err(|e| Fault::usage(format!("the request's body is malformed: {e}")))?;
    Ok((Request::from_parts(parts, Body::from(bytes)), asked))
}

/// A parameter of the request's query; a value with escapes is never one that a trainer needs.
fn parameter(request: &Request, name: &str) -> Option<String> {
    let mut values = request
        .uri()
        .query()?
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .filter(|(key, _)| *key == name);
    let (_, value) = values.next()?;
    // If it is given twice, the handler might use the other one.
    values.next().is_none().then(|| value.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_for_its_run_only() {
        let run: RunName = "line3.v7".parse().unwrap();
        let token = RunToken::new(run.clone()).unwrap();
        let again = RunToken::parse(token.text().as_bytes()).unwrap();
        assert!(token.is(&again) && *again.run() == run);
        assert!(!token.is(&RunToken::new(run).unwrap()));
        assert!(!token.is(&RunToken {
            run: "other".parse().unwrap(),
            ..token.clone()
        }));
        assert!(!format!("{token:?}").contains(&token.text()));
        for bad in [
            "",
            "run.",
            "run.x",
            "run.x.00",
            &token.text()[1..],
            &format!("{}00", token.text()),
            "run.../x.00",
        ] {
            assert!(RunToken::parse(bad.as_bytes()).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_trainer_publishes_its_own_model_only() {
        let run: RunName = "r".parse().unwrap();
        let asked = || PublishRequest {
            source: "/out".into(),
            as_ref: "model/m:1".into(),
            run: Some("r".into()),
            ..PublishRequest::default()
        };
        may_publish(&run, &asked()).unwrap();
        for bad in [
            PublishRequest {
                run: None,
                ..asked()
            },
            PublishRequest {
                run: Some("other".into()),
                ..asked()
            },
            PublishRequest {
                as_ref: "dataset/m:1".into(),
                ..asked()
            },
            PublishRequest {
                source: "registry://h/r:t".into(),
                ..asked()
            },
            PublishRequest {
                to: Some("all".into()),
                ..asked()
            },
        ] {
            assert!(may_publish(&run, &bad).is_err(), "{bad:?}");
        }
    }
}

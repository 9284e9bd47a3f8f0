//! Who started the jobs of the daemon: a trainer and a token with a scope may follow their own.

use std::collections::VecDeque;

use axum::body::{Body, to_bytes};
use axum::http::StatusCode;
use axum::response::Response;
use parking_lot::Mutex;

use super::types::Job;
use base::limits::{API_BODY_BYTES_MAX, JOB_STARTERS_KEPT_MAX};
use model::actor::Actor;

/// The newest jobs that trainers and holders of tokens started.
#[derive(Default)]
pub(super) struct StartedJobs(Mutex<VecDeque<(Actor, String)>>);

impl StartedJobs {
    fn note(&self, by: &Actor, job: &str) {
        let mut jobs = self.0.lock();
        if jobs.iter().any(|(known, id)| known == by && id == job) {
            return;
        }
        if jobs.len() >= JOB_STARTERS_KEPT_MAX {
            jobs.pop_front();
        }
        jobs.push_back((by.clone(), job.to_owned()));
    }

    /// Whether this actor started this job, or made an equal request while it ran.
    pub(super) fn is_by(&self, job: &str, actor: &Actor) -> bool {
        let jobs = self.0.lock();
        jobs.iter().any(|(by, known)| known == job && by == actor)
    }

    /// Records the job that a response announces.
    pub(super) async fn note_response(&self, by: &Actor, response: Response) -> Response {
        if response.status() != StatusCode::ACCEPTED {
            return response;
        }
        let (parts, body) = response.into_parts();
        let bytes = to_bytes(body, API_BODY_BYTES_MAX).await.unwrap_or_default();
        if let Ok(job) = serde_json::from_slice::<Job>(&bytes) {
            self.note(by, &job.id);
        }
        Response::from_parts(parts, Body::from(bytes))
    }
}

//! Harbor's API: projects, which must exist before a push, and the explanation of its ambiguous
//! 401.

use reqwest::StatusCode;
use reqwest::header::CONTENT_TYPE;
use reqwest::{Response, Url};

use crate::image::Sha256;
use crate::{Answer, Error, Registry, read_capped};
use base::fault::{Code, Fault};
use base::limits;

/// The state of a project.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Project {
    Exists,
    Missing,
    /// Not permitted to know, or not Harbor.
    Unknown,
}

impl Registry {
    fn api(&self, path: &str) -> Result<Url, Fault> {
        let text = format!("{}/api/v2.0/{path}", self.origin.base());
        text.parse()
            .map_err(|_| Fault::config(format!("{} is not a valid registry address", self.origin)))
    }

    async fn project(&self, name: &str) -> Result<Project, Error> {
        let mut url = self.api("projects")?;
        url.query_pairs_mut().append_pair("project_name", name);
        let response = self.send_basic(self.http.head(url)).await?;
        match response.status() {
            StatusCode::OK => Ok(Project::Exists),
            StatusCode::NOT_FOUND => Ok(Project::Missing),
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                Err(Answer::read(response).await.into())
            }
            _ => Ok(Project::Unknown),
        }
    }

    /// Creates a Harbor project if it does not exist. Does nothing at a registry without projects.
    pub async fn ensure_project(&self, name: &str) -> Result<(), Fault> {
        let doing = || format!("create project {name:?} at {}", self.origin);
        if self.project(name).await.map_err(|e| e.fault(doing()))? != Project::Missing {
            return Ok(());
        }
        let body =
            serde_json::json!({"project_name": name, "metadata": {"public": "false"}}).to_string();
        let request = self
            .http
            .post(self.api("projects")?)
            .header(CONTENT_TYPE, "application/json")
            .body(body);
        let response = self
            .send_basic(request)
            .await
            .map_err(|e| e.fault(doing()))?;
        let result = match response.status() {
            // Another client may have created it meanwhile.
            StatusCode::CREATED | StatusCode::OK | StatusCode::CONFLICT => Ok(()),
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => {
                tracing::debug!(registry = %self.origin, "the registry has no projects");
                Ok(())
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(Answer::read(response)
                .await
                .fault(doing())
                .with_next("create the project manually, or give the registry user permission to create projects")),
            _ => Err(Answer::read(response).await.fault(doing())),
        };
        self.auth.forget_tokens();
        result
    }

    /// Determines the cause of a 401: a wrong password, a missing project, or a missing permission.
    pub async fn explain_denied(
        &self,
        project: Option<&str>,
        repository: &str,
        fault: Fault,
    ) -> Fault {
        if !self.is_harbor() {
            return fault;
        }
        let Ok(base) = self.url("") else { return fault };
        let status = self
            .send_basic(self.http.get(base))
            .await
            .map(|r: Response| r.status());
        if matches!(status, Ok(StatusCode::UNAUTHORIZED)) && self.auth.credentials.is_some() {
            return Fault {
                next:
                    "check username and password_file; the robot account may be expired or disabled"
                        .into(),
                ..fault
            }
            .context("the registry rejects the credentials");
        }
        let Some(name) = project else { return fault };
        match self.project(name).await {
            Ok(Project::Missing) => Fault {
                code: Code::Config,
                ..fault
            }
            .context(format_args!(
                "project {name:?} does not exist at {}",
                self.origin
            ))
            .with_next(format!(
                "create the project {name:?} in Harbor, or set create_project = true"
            )),
            Ok(Project::Exists) => fault
                .context(format_args!(
                    "the registry user has no permission to push to {repository}"
                ))
                .with_next(format!(
                    "give it permission to pull and push in project {name:?}, then run 'packhorse retry'"
                )),
            _ => fault,
        }
    }

    /// The digest of the image that a tag refers to, from Harbor's API, which is not subject to
    /// pull policies. `None`: unknown.
    pub async fn artifact_digest(&self, project: &str, name: &str, tag: &str) -> Option<Sha256> {
        #[derive(serde::Deserialize)]
        struct Artifact {
            digest: Sha256,
        }
        let name = name.replace('/', "%252F");
        let url = self
            .api(&format!(
                "projects/{project}/repositories/{name}/artifacts/{tag}"
            ))
            .ok()?;
        let response = self.send_basic(self.http.get(url)).await.ok()?;
        if response.status() != StatusCode::OK {
            return None;
        }
        let body = read_capped(response, limits::REGISTRY_BODY_BYTES_MAX)
            .await
            .ok()?;
        serde_json::from_slice::<Artifact>(&body)
            .ok()
            .map(|artifact| artifact.digest)
    }

    /// Deletes one tag and keeps the image for its other tags. Only Harbor's API can do this.
    /// Returns false if it is not possible.
    pub async fn delete_tag(&self, project: &str, name: &str, tag: &str) -> Result<bool, Error> {
        if !self.is_harbor() {
            return Ok(false);
        }
        // Harbor requires the slashes of a repository name to be encoded twice.
        let name = name.replace('/', "%252F");
        let url = self.api(&format!(
            "projects/{project}/repositories/{name}/artifacts/{tag}/tags/{tag}"
        ))?;
        let response = self.send_basic(self.http.delete(url)).await?;
        match response.status() {
            StatusCode::OK | StatusCode::NOT_FOUND => Ok(true),
            _ => Err(Answer::read(response).await.into()),
        }
    }
}

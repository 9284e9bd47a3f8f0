//! The HTTP API that every daemon serves, and the trait that a daemon implements for it.

pub mod types;

use async_trait::async_trait;

use crate::fault::Fault;
use types::*;

/// What a daemon, hub or site, can be asked. The HTTP handlers are a thin shell around it.
#[async_trait]
pub trait Backend: Send + Sync {
    /// `hub` or `site`.
    fn role(&self) -> &'static str;
    /// This daemon's name.
    fn name(&self) -> String;
    /// `Ok` once it can do its work; the fault says what is missing.
    async fn ready(&self) -> Result<(), Fault>;
    /// Begins a publish.
    async fn publish(&self, request: PublishRequest) -> Result<Job, Fault>;
    /// Begins a delivery.
    async fn deliver(&self, request: DeliverRequest) -> Result<Delivered, Fault>;
    /// What a delivery would cost.
    async fn plan(&self, request: DeliverRequest) -> Result<Vec<PlanRow>, Fault>;
    /// Transfers, and the cursor to go on from. Does not wait; the API does.
    async fn transfers(&self, query: &TransferQuery) -> Result<(Vec<Transfer>, u64), Fault>;
    /// Acts on a transfer (or on all of a delivery).
    async fn act(&self, id: &str, action: Action) -> Result<Vec<Transfer>, Fault>;
    /// All artifacts.
    async fn artifacts(&self) -> Result<Vec<Artifact>, Fault>;
    /// One artifact.
    async fn show(&self, artifact: &str) -> Result<ArtifactDetail, Fault>;
    /// All sites (at a site: itself).
    async fn sites(&self) -> Result<Vec<Site>, Fault>;
    /// Makes a join token (hub only).
    async fn token(&self, request: TokenRequest) -> Result<String, Fault>;
    /// Begins a verify; the result is a list of lines, empty when sound.
    async fn verify(&self, artifact: &str, repair: bool) -> Result<Job, Fault>;
    /// Begins an export of these artifacts to a file that the daemon writes.
    async fn export(&self, artifacts: Vec<String>, out: String) -> Result<Job, Fault>;
    /// Begins an import of such a file.
    async fn import(&self, file: String) -> Result<Job, Fault>;
    /// Begins a collection of what nothing refers to.
    async fn gc(&self) -> Result<Job, Fault>;
    /// Checks the daemon's surroundings: one line each, `ok …` or `fault …`.
    async fn doctor(&self) -> Result<Vec<String>, Fault>;
    /// A job's state. Does not wait; the API does.
    async fn job(&self, id: &str) -> Result<Job, Fault>;
    /// Events after `since`, at most `limit`. Does not wait.
    async fn events(&self, since: u64, limit: u32) -> Result<Vec<Event>, Fault>;
    /// Returns after something changed (an event, a job), or after some time: a hint to look again.
    async fn changed(&self);
    /// The metrics in Prometheus text form.
    async fn metrics(&self) -> Result<String, Fault>;
}

//! The HTTP API that every daemon serves, and the trait that a daemon implements for it.
//!
//! [`serve`] is called once by the daemon; the command line (`cli`), the dashboard and the
//! platform, through Karmada's proxy, are its clients. The proxy binds the form: no redirects, no
//! cookies, relative links, references in query or body, work answered by 202 and an id, waits
//! bounded, errors as `{code, message, next}`, a version header on every reply. Nothing here is
//! kept: a crash loses open connections, and a client goes on from its cursor.

mod body;
mod error;
mod events;
mod lists;
mod local;
mod openapi;
mod proof;
mod routes;
mod run_token;
mod server;
mod starting;
mod token;
pub mod types;
mod views;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

pub use error::ErrorBody;
pub use local::LocalSocket;
pub(crate) use local::SocketPath;
pub(crate) use proof::{Proof, ProofQuery};
pub use run_token::RunToken;
pub use starting::serve_starting;
pub use token::ApiToken;
pub use views::View;

use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use futures::future::BoxFuture;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use base::fault::Fault;
use base::limits::{API_LISTS_AT_ONCE_MAX, DRAIN_MAX};
use base::names::RunName;
use base::tally::Tally;
use model::paging::{Page, Room};
use types::*;

/// The header in which every reply says the daemon's version.
pub const VERSION_HEADER: &str = "x-packhorse-version";
/// The header that says from where to go on: the `since` of the next question.
pub const CURSOR_HEADER: &str = "x-packhorse-cursor";
/// The header that says that the answer had no room for all: the `since` that brings the rest.
pub const NEXT_HEADER: &str = "x-packhorse-next";
/// The header that carries the token where a proxy strips `Authorization`.
pub const TOKEN_HEADER: &str = "x-packhorse-token";
/// This program's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

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
    // Of a list a page is asked for: `behind` is the key that the page before gave, and a page has
    // no more than its room.
    /// Transfers, and the cursor to go on from. Does not wait; the API does.
    async fn transfers(
        &self,
        query: &TransferQuery,
        behind: Option<&str>,
        room: Room,
    ) -> Result<(Page<Transfer>, u64), Fault>;
    /// Acts on a transfer (or on all of a delivery). The answer is the first page of those of this
    /// id.
    async fn act(&self, id: &str, action: Action, room: Room) -> Result<Page<Transfer>, Fault>;
    /// The newest deliveries; of one with many parts only some are listed.
    async fn deliveries(&self, behind: Option<&str>, room: Room) -> Result<Page<Delivery>, Fault>;
    /// One delivery, with as many of its parts as `max` bytes hold. Does not wait; the API does.
    async fn delivery(&self, id: &str, max: usize) -> Result<Delivery, Fault>;
    /// The newest training runs.
    async fn runs(&self, behind: Option<&str>, room: Room) -> Result<Page<Run>, Fault>;
    /// One training run. Does not wait; the API does.
    async fn run(&self, name: &str) -> Result<Run, Fault>;
    /// Begins a training run, or finds it.
    async fn train(&self, request: RunRequest) -> Result<Run, Fault>;
    /// Finishes or cancels a training run.
    async fn act_on_run(&self, request: RunActionRequest) -> Result<Run, Fault>;
    /// All artifacts.
    async fn artifacts(&self, behind: Option<&str>, room: Room) -> Result<Page<Artifact>, Fault>;
    /// One artifact, without its transfers…
    async fn show(&self, artifact: &str) -> Result<ArtifactDetail, Fault>;
    /// …and these.
    async fn transfers_of_artifact(
        &self,
        artifact: &str,
        behind: Option<&str>,
        room: Room,
    ) -> Result<Page<Transfer>, Fault>;
    /// All sites (at a site: itself).
    async fn sites(&self, behind: Option<&str>, room: Room) -> Result<Page<Site>, Fault>;
    /// Makes a join token (hub only).
    async fn token(&self, request: TokenRequest) -> Result<String, Fault>;
    /// The token of a training run whose trainer works here now; `None`: there is none.
    async fn run_token(&self, _run: &RunName) -> Option<RunToken> {
        None
    }
    /// Begins a verify; the result is a list of lines, none when sound.
    async fn verify(&self, request: VerifyRequest) -> Result<Job, Fault>;
    /// Keeps an artifact's relayed bytes whatever their age, or no longer (hub only).
    async fn pin(&self, artifact: &str, pinned: bool) -> Result<Artifact, Fault>;
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
    /// The jobs that are remembered, the newest first.
    async fn jobs(&self, behind: Option<&str>, room: Room) -> Result<Page<Job>, Fault>;
    /// Cancels a job.
    async fn cancel_job(&self, id: &str) -> Result<Job, Fault>;
    /// Events after `since`, at most `limit`, in order; `since` 0 means from the oldest kept. Does
    /// not wait.
    async fn events(&self, since: u64, limit: u32) -> Result<Vec<Event>, Fault>;
    /// Ends after something changed since this call (an event, a job), or after some time: a hint
    /// to look again.
    fn changed(&self) -> BoxFuture<'static, ()>;
    /// The metrics in Prometheus text form.
    async fn metrics(&self) -> Result<String, Fault>;
}

/// Serves the API, over TCP and over the local socket if there is one, until `shutdown` is ready:
/// then no new connection is taken, waiting requests are answered, event streams end, and what is
/// left after the drain time is dropped.
pub async fn serve(
    listener: TcpListener,
    local: Option<LocalSocket>,
    backend: Arc<dyn Backend>,
    token: ApiToken,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Fault> {
    let stop = CancellationToken::new();
    let lists = Arc::new(Semaphore::new(API_LISTS_AT_ONCE_MAX));
    let wrong_tokens = Tally::new("refused an API request with a wrong token");
    let router = routes::router(routes::App {
        backend,
        token: Arc::new(token),
        run_jobs: Arc::default(),
        stop: stop.clone(),
        wrong_tokens,
        lists,
    });
    let server = server::Server::new(router, stop.clone());
    tokio::select! {
        () = shutdown => {}
        () = server.accept_tcp(&listener) => {}
        () = server.accept_local(local.as_ref()) => {}
    }
    stop.cancel();
    let _ = tokio::time::timeout(DRAIN_MAX, server.drained()).await;
    Ok(())
}

//! The HTTP API that every daemon serves, and the trait that a daemon implements for it.
//!
//! The daemon calls [`serve`] once. Its clients are the command line (`cli`), the dashboard and the
//! platform, through Karmada's proxy. The proxy determines the form: no redirects, no cookies,
//! relative links, references in query or body, work accepted with 202 and an id, bounded waits,
//! errors as `{code, message, next}`, a version header on every reply. Nothing here is stored: a
//! crash loses open connections, and a client resumes from its cursor.

mod access;
mod access_tokens;
mod body;
mod caller;
mod error;
mod events;
mod lists;
mod local;
mod members;
mod openapi;
mod proof;
mod routes;
mod run_token;
mod scoped;
mod server;
mod started;
mod starting;
mod token;
mod tokens;
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
pub use tokens::{AccessTokens, USE_STORE_EVERY};
pub use views::{View, malformed_lines};

use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use futures::future::BoxFuture;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::reach::Reach;
use base::fault::Fault;
use base::limits::{API_LISTS_AT_ONCE_MAX, DRAIN_MAX};
use base::names::{ArtifactRef, RunName, SiteName};
use base::tally::Tally;
use base::workers::Workers;
use model::actor::Actor;
use model::paging::{Page, Pager, Room};
use types::*;

use crate::serve::wrong_role;

/// The header of every reply with the daemon's version.
pub const VERSION_HEADER: &str = "x-packhorse-version";
/// The header with the cursor: the `since` of the next request.
pub const CURSOR_HEADER: &str = "x-packhorse-cursor";
/// The header of an incomplete answer: the `since` that returns the rest.
pub const NEXT_HEADER: &str = "x-packhorse-next";
/// The header for the token where a proxy removes `Authorization`.
pub const TOKEN_HEADER: &str = "x-packhorse-token";
/// This program's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The operations of a daemon, hub or site. The HTTP handlers are a thin shell around them.
#[async_trait]
pub trait Backend: Send + Sync {
    /// `hub` or `site`.
    fn role(&self) -> &'static str;
    /// This daemon's name.
    fn name(&self) -> String;
    /// `Ok` if it can work; otherwise the fault states what is missing.
    async fn ready(&self) -> Result<(), Fault>;
    /// Starts a publish.
    async fn publish(&self, request: PublishRequest, reach: Reach) -> Result<Job, Fault>;
    /// Starts a delivery.
    async fn deliver(&self, request: DeliverRequest) -> Result<Delivered, Fault>;
    /// The cost of a delivery.
    async fn plan(&self, request: DeliverRequest) -> Result<Vec<PlanRow>, Fault>;
    // A list is requested in pages: `behind` is the key that the previous page returned, and a page
    // has at most its limit.
    /// Transfers, and the next cursor. Does not wait; the API does.
    async fn transfers(
        &self,
        query: &TransferQuery,
        behind: Option<&str>,
        room: Room,
    ) -> Result<(Page<Transfer>, u64), Fault>;
    /// Performs an action on a transfer (or on all of a delivery). The answer is the first page of
    /// the transfers of this id.
    async fn act(&self, id: &str, action: Action, room: Room) -> Result<Page<Transfer>, Fault>;
    /// The newest deliveries; of a long one only some parts are listed.
    async fn deliveries(&self, behind: Option<&str>, room: Room) -> Result<Page<Delivery>, Fault>;
    /// One delivery, with as many of its parts as fit in `max` bytes. Does not wait; the API does.
    async fn delivery(&self, id: &str, max: usize) -> Result<Delivery, Fault>;
    /// The newest training runs.
    async fn runs(&self, behind: Option<&str>, room: Room) -> Result<Page<Run>, Fault>;
    /// One training run. Does not wait; the API does.
    async fn run(&self, name: &str) -> Result<Run, Fault>;
    /// Starts a training run, or finds an equal one.
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
    /// The number of open transfers of each artifact to each site.
    async fn open_by_artifact(&self) -> Result<Vec<(SiteName, ArtifactRef, u64)>, Fault>;
    /// All sites (at a site: itself).
    async fn sites(&self, behind: Option<&str>, room: Room) -> Result<Page<Site>, Fault>;
    /// One site (hub only).
    async fn site(&self, _name: &str) -> Result<Site, Fault> {
        Err(wrong_role("site show", "hub"))
    }
    /// Changes the labels of a site (hub only).
    async fn set_site(&self, _actor: &Actor, _request: SetSiteRequest) -> Result<Site, Fault> {
        Err(wrong_role("site set", "hub"))
    }
    /// Revokes, restores or removes a site (hub only).
    async fn act_on_site(
        &self,
        _actor: &Actor,
        _request: MemberActionRequest,
    ) -> Result<Site, Fault> {
        Err(wrong_role("this action on a site", "hub"))
    }
    /// All publishers (hub only).
    async fn publishers(
        &self,
        _behind: Option<&str>,
        _room: Room,
    ) -> Result<Page<Publisher>, Fault> {
        Err(wrong_role("publisher list", "hub"))
    }
    /// One publisher (hub only).
    async fn publisher(&self, _name: &str) -> Result<Publisher, Fault> {
        Err(wrong_role("publisher show", "hub"))
    }
    /// Revokes, restores or removes a publisher (hub only).
    async fn act_on_publisher(
        &self,
        _actor: &Actor,
        _request: MemberActionRequest,
    ) -> Result<Publisher, Fault> {
        Err(wrong_role("this action on a publisher", "hub"))
    }
    /// Creates a join token (hub only).
    async fn token(&self, request: TokenRequest) -> Result<TokenReply, Fault>;
    /// The token of a training run whose trainer runs here now; `None`: there is none.
    async fn run_token(&self, run: &RunName) -> Option<RunToken>;
    /// Starts a verification; the result is a list of findings, empty when the artifact is intact.
    async fn verify(&self, request: VerifyRequest) -> Result<Job, Fault>;
    /// Keeps an artifact's relayed bytes at any age, or ends that (hub only).
    async fn pin(&self, artifact: &str, pinned: bool) -> Result<Artifact, Fault>;
    /// Starts an export of labels, in a format of annotation tools, to a directory that the daemon
    /// writes.
    async fn export_labels(&self, request: ExportLabelsRequest, reach: Reach)
    -> Result<Job, Fault>;

    /// Starts an export of these artifacts to a file that the daemon writes.
    async fn export(&self, artifacts: Vec<String>, out: String, reach: Reach)
    -> Result<Job, Fault>;
    /// Starts an import of such a file.
    async fn import(&self, file: String, reach: Reach) -> Result<Job, Fault>;
    /// Takes up what the NAS of a site already holds (site only).
    async fn adopt(&self) -> Result<Job, Fault>;
    /// Starts a garbage collection.
    async fn gc(&self) -> Result<Job, Fault>;
    /// Checks the daemon's surroundings: one line each, `ok …` or `fault …`.
    async fn doctor(&self) -> Result<Vec<String>, Fault>;
    /// A job's state. Does not wait; the API does.
    async fn job(&self, id: &str) -> Result<Job, Fault>;
    /// The jobs in memory, the newest first.
    async fn jobs(&self, behind: Option<&str>, room: Room) -> Result<Page<Job>, Fault>;
    /// Cancels a job.
    async fn cancel_job(&self, id: &str) -> Result<Job, Fault>;
    /// The background workers, in the order in which they were started.
    async fn workers(&self, behind: Option<&str>, room: Room) -> Result<Page<Worker>, Fault>;
    /// Events after `since`, at most `limit`, in order; `since` 0 means from the oldest stored one.
    /// Does not wait.
    async fn events(&self, since: u64, limit: u32) -> Result<Vec<Event>, Fault>;
    /// Returns after a change since this call (an event, a job), or after some time: a hint to
    /// query again.
    fn changed(&self) -> BoxFuture<'static, ()>;
    /// The metrics in Prometheus text form.
    async fn metrics(&self) -> Result<String, Fault>;
}

/// Serves the API, over TCP and over the local socket if there is one, until `shutdown` is ready:
/// then no new connection is accepted, waiting requests are answered, event streams end, and
/// everything left after the drain time is closed.
pub async fn serve(
    listener: &TcpListener,
    local: Option<&LocalSocket>,
    backend: Arc<dyn Backend>,
    token: ApiToken,
    access: Arc<AccessTokens>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<(), Fault> {
    let stop = CancellationToken::new();
    let lists = Arc::new(Semaphore::new(API_LISTS_AT_ONCE_MAX));
    let wrong_tokens = Tally::new("refused an API request with a wrong token");
    let router = routes::router(routes::App {
        backend,
        token: Arc::new(token),
        queries: Arc::new(openapi::Queries::documented()),
        access,
        scoped: Arc::default(),
        started: Arc::default(),
        stop: stop.clone(),
        wrong_tokens,
        lists,
    });
    let server = server::Server::new(router, stop.clone());
    tokio::select! {
        () = shutdown => {}
        () = server.accept_tcp(listener) => {}
        () = server.accept_local(local) => {}
    }
    stop.cancel();
    let _ = tokio::time::timeout(DRAIN_MAX, server.drained()).await;
    Ok(())
}

/// A page of the workers after the one with this name.
pub(crate) fn worker_page(workers: &Workers, behind: Option<&str>, room: Room) -> Page<Worker> {
    let all = workers.list();
    let from = behind.and_then(|behind| all.iter().position(|worker| worker.name == behind));
    let mut pager = Pager::new(room);
    for worker in &all[from.map_or(0, |at| at + 1)..] {
        if !pager.put(worker.view(), worker.name) {
            break;
        }
    }
    pager.page()
}

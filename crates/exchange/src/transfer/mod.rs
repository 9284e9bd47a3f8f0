//! Transfers at a site. Each transfer is a task from `queued` to `done`, and survives everything
//! between.
//!
//! The hub sends what it wants ([`Runner::apply`], level-triggered). The
//! catalogue holds the state of each transfer, and is written before anything is reported. An
//! attempt that fails with a temporary fault is repeated after a growing pause; staged content
//! stays.
//!
//! This file holds which transfers have a task; `ending` stops a task; `task` is a task from its
//! start to its end, `attempt` one attempt, `slots` what an attempt waits for first,
//! `pushed_manifest` the manifests that the hub pushed, `finalize` the end: commit, receipt, and
//! later checks.

mod assemble;
mod attempt;
mod ending;
mod finalize;
mod kept;
mod memory;
mod progress_rate;
mod pushed_manifest;
mod scrub;
mod slots;
mod task;
#[cfg(test)]
mod tests;
mod unwritten;
mod verify;
mod waiting;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use base::fault::{Code, Fault};
use base::limits::MANIFEST_CHECKS_MAX;
use base::locks::Locks;
use base::names::{ArtifactRef, Kind, SiteName, TransferId};
use base::spans;
use base::tally::Tally;
use content::manifest::{Digest, Root};
use model::protocol::Desired;
use model::transfer::{Bytes, Effect, State};
use sink::{Incoming, Sink};
use state::{Adopted, Body, Catalogue, TransferRow, Want};
use transport::Link;
use transport::identity::SiteIdentity;

pub use assemble::{Assembly, AssemblyContext, Counters, Estimate, Room};
pub use kept::Registered;
pub use memory::Memory;
pub use scrub::{Scrub, Scrubbed};
use slots::Slots;
use unwritten::Unwritten;
pub use verify::{VerifyReport, beside, verify};

/// The sinks of a site.
pub const SINKS: usize = 3;

/// The number of the sink of a kind.
fn sink_number(kind: Kind) -> usize {
    match kind {
        Kind::Dataset | Kind::Operator | Kind::Model => 0,
        Kind::Labels => 1,
        Kind::Image => 2,
    }
}

/// Queued requests for a check of published content.
pub const CHECK_REQUESTS_MAX: usize = 16;

/// The sinks of a site.
#[derive(Clone)]
pub struct Sinks {
    /// Datasets, operators, models.
    pub files: Arc<dyn Sink>,
    /// Labels.
    pub labels: Arc<dyn Sink>,
    /// Images.
    pub images: Arc<dyn Sink>,
}

impl Sinks {
    /// The sink of a kind.
    pub fn of(&self, kind: Kind) -> &Arc<dyn Sink> {
        self.all()[sink_number(kind)]
    }

    /// All of them.
    pub fn all(&self) -> [&Arc<dyn Sink>; SINKS] {
        [&self.files, &self.labels, &self.images]
    }
}

/// The part of what the hub wants that could not be stored.
#[derive(Debug, Default)]
pub struct Unapplied {
    /// The transfers that were not stored.
    pub transfers: HashSet<TransferId>,
    /// The first fault.
    pub fault: Option<Fault>,
}

/// A request to check content that was published at this site.
pub struct CheckRequest {
    /// Its digest.
    pub digest: Digest,
    /// Receives the change; `None`: unchanged, or unknown.
    pub answer: oneshot::Sender<Option<String>>,
}

/// Runs a site's transfers. Cheap to clone.
#[derive(Clone)]
pub struct Runner {
    inner: Arc<Inner>,
}

struct Inner {
    catalogue: Catalogue,
    shared: AssemblyContext,
    sinks: Sinks,
    identity: watch::Receiver<Arc<SiteIdentity>>,
    link: watch::Receiver<Option<Link>>,
    check_requests: mpsc::Sender<CheckRequest>,
    slots: [Slots; SINKS],
    /// Places for checks of manifests, which the hub chooses.
    checks: Arc<Semaphore>,
    running: Mutex<HashMap<TransferId, Running>>,
    /// Transfers that are being paused or cancelled, each with its generation.
    ending: Mutex<HashMap<(TransferId, i64, Want), JoinHandle<()>>>,
    /// Asks for a cleanup of the staging folders.
    leftovers: Notify,
    /// The user of a transfer's staging folder holds its lock.
    staging: Locks<TransferId>,
    /// A task that commits, checks or removes an artifact holds its lock.
    alone: Locks<ArtifactRef>,
    /// Root manifests that the hub pushed, each with its bytes on the wire.
    pushed: Mutex<Vec<(Digest, Root, u64)>>,
    /// Those that could not be used.
    bad_pushed: Tally,
    /// The last rate of a transfer, bytes per second.
    last_rate: AtomicU64,
    /// Rows that the catalogue could not store.
    unwritten: Unwritten,
    stop: CancellationToken,
}

/// A transfer's newest task.
#[derive(Clone)]
struct Running {
    stop: CancellationToken,
    generation: i64,
    /// Cancelled once this task, and every earlier one of the transfer, has ended.
    ended: CancellationToken,
}

/// Waits for a future that may be dropped at any moment, unless the transfer is stopped first.
async fn unless<T>(
    stop: &CancellationToken,
    work: impl Future<Output = Result<T, Fault>>,
) -> Result<T, Fault> {
    tokio::select! {
        result = work => result,
        () = stop.cancelled() => Err(stopped()),
    }
}

/// The fault that ends an attempt when a user paused or cancelled the transfer or the daemon stops:
/// never shown.
fn stopped() -> Fault {
    Fault::internal("the transfer was stopped")
}

impl Runner {
    /// A runner without transfers. `check_requests` receives requests to check published content; `stop`
    /// ends all work.
    pub fn new(
        catalogue: Catalogue,
        shared: AssemblyContext,
        sinks: Sinks,
        identity: watch::Receiver<Arc<SiteIdentity>>,
        link: watch::Receiver<Option<Link>>,
        check_requests: mpsc::Sender<CheckRequest>,
        stop: CancellationToken,
    ) -> Self {
        let (slots, running, ending, leftovers, staging) = Default::default();
        let (alone, pushed, last_rate, unwritten) = Default::default();
        let inner = Inner {
            catalogue,
            shared,
            sinks,
            identity,
            link,
            check_requests,
            slots,
            checks: Arc::new(Semaphore::new(MANIFEST_CHECKS_MAX)),
            running,
            ending,
            leftovers,
            staging,
            alone,
            pushed,
            bad_pushed: Tally::new("a manifest that the hub pushed cannot be used"),
            last_rate,
            unwritten,
            stop,
        };
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The last rate of the connection, bytes per second; 0 when it is not known.
    pub fn last_rate(&self) -> u64 {
        self.inner.last_rate.load(Ordering::Relaxed)
    }

    /// Transfers whose state is newer than their row, because the catalogue cannot be written, each
    /// with the reason.
    pub fn unwritten(&self) -> Vec<TransferRow> {
        self.inner.unwritten.rows()
    }

    /// The site whose transfers these are.
    fn site(&self) -> Result<SiteName, Fault> {
        let identity = self.inner.identity.borrow();
        let site = identity.holder().site().cloned();
        site.ok_or_else(|| Fault::config(format!("{} receives no transfers", identity.holder())))
    }

    /// Applies what the hub wants of these transfers. A transfer that the catalogue cannot store
    /// does not delay the others.
    pub async fn apply<'a>(&self, desired: impl Iterator<Item = &'a Desired>) -> Unapplied {
        let mut unapplied = Unapplied::default();
        let site = match self.site() {
            Ok(site) => site,
            Err(fault) => {
                unapplied.fault = Some(fault);
                return unapplied;
            }
        };
        for wanted in desired {
            match self.adopt(wanted, &site).await {
                Ok(row) => self.follow(&row),
                Err(fault) => {
                    unapplied.transfers.insert(wanted.id.clone());
                    unapplied.fault.get_or_insert(fault);
                }
            }
        }
        unapplied
    }

    /// Cancels the open transfers of which `is_wanted` says that the hub does not want them: it
    /// does not list them, or has said so.
    pub async fn give_up(&self, is_wanted: impl Fn(&TransferId) -> bool) -> Result<(), Fault> {
        let site = self.site()?;
        for row in self.inner.catalogue.open_transfers(&site).await? {
            if !is_wanted(&row.id) && self.is_open(&row) {
                self.end(&self.inner.catalogue.unlist(&row).await?, Want::Cancel);
            }
        }
        self.inner.unwritten.retain(&is_wanted);
        Ok(())
    }

    /// Whether there is something to cancel of a transfer. A failed one keeps its content.
    fn is_open(&self, row: &TransferRow) -> bool {
        match row.state {
            State::Done | State::Cancelled => {
                row.want == Want::Cancel && self.task_of(&row.id, row.generation).is_some()
            }
            State::Failed => row.want == Want::Cancel,
            _ => true,
        }
    }

    /// Cancels these transfers if they are open: the hub does not want them any more.
    pub async fn give_up_these(&self, ids: &[TransferId]) -> Result<(), Fault> {
        let mut first = Ok(());
        for id in ids {
            let given_up = async {
                let row = self.inner.catalogue.transfer(id).await?;
                if self.is_open(&row) {
                    self.end(&self.inner.catalogue.unlist(&row).await?, Want::Cancel);
                }
                Ok::<(), Fault>(())
            };
            match given_up.await {
                Err(fault) if fault.code != Code::NotFound => first = first.and(Err(fault)),
                _ => {}
            }
        }
        self.inner.unwritten.retain(|id| !ids.contains(id));
        first
    }

    /// Stores a transfer in the catalogue. It replaces an older transfer of the same artifact that
    /// the hub does not know any more.
    async fn adopt(&self, wanted: &Desired, site: &SiteName) -> Result<TransferRow, Fault> {
        let row = TransferRow {
            id: wanted.id.clone(),
            delivery: wanted.delivery.clone(),
            artifact: wanted.artifact.clone(),
            digest: wanted.digest,
            site: site.clone(),
            want: wanted.want,
            generation: wanted.generation,
            state: State::Queued,
            body: Body {
                bytes: Bytes {
                    total: wanted.total,
                    ..Bytes::default()
                },
                ..Body::default()
            },
            created_ms: wanted.created_ms,
            updated_ms: 0,
            finished_ms: None,
            cursor: 0,
            after: wanted.after.clone(),
            removed_ms: None,
        };
        let catalogue = &self.inner.catalogue;
        let work = async {
            if let Some(lineage) = &wanted.lineage {
                catalogue.set_lineage(&wanted.artifact, lineage).await?;
            }
            catalogue.adopt(&row).await
        };
        match work.await {
            Ok(Adopted { row, superseded }) => {
                self.inner.unwritten.adopted(&row.id, row.generation);
                for other in &superseded {
                    spans::transfer(&other.id, &other.artifact, &other.site).in_scope(|| tracing::warn!(by = %row.id, "the hub does not know this transfer any more"));
                    self.end(other, Want::Cancel);
                }
                Ok(row)
            }
            Err(fault) => {
                // The stored row stays as it is.
                let known = catalogue.transfer(&row.id).await;
                if self
                    .inner
                    .unwritten
                    .not_adopted(known.as_ref().unwrap_or(&row), &fault)
                {
                    spans::transfer(&row.id, &row.artifact, &row.site).in_scope(
                        || tracing::error!(error = %fault, "the catalogue cannot be written"),
                    );
                }
                catalogue.notify();
                Err(fault)
            }
        }
    }

    /// Resumes the transfers that were open when the daemon stopped, without waiting for the hub.
    pub async fn start(&self) -> Result<(), Fault> {
        let site = self.site()?;
        for row in self.inner.catalogue.open_transfers(&site).await? {
            self.follow(&row);
        }
        Ok(())
    }

    fn follow(&self, row: &TransferRow) {
        match row.due() {
            Some(Effect::Run) => self.spawn(row),
            Some(Effect::End(want)) => self.end(row, want),
            Some(Effect::SendList) | None => {}
        }
    }

    /// Starts the task of a transfer, unless it runs. An earlier task is stopped, and the new one
    /// begins after it has ended: two tasks never use one staging folder and journal.
    fn spawn(&self, row: &TransferRow) {
        let mut running = self.inner.running.lock();
        running.retain(|_, there| !there.ended.is_cancelled());
        let before = match running.get(&row.id) {
            Some(there) if there.generation >= row.generation && !there.stop.is_cancelled() => {
                return;
            }
            Some(there) => {
                there.stop.cancel();
                Some(there.ended.clone())
            }
            None => None,
        };
        let (stop, ended) = (self.inner.stop.child_token(), CancellationToken::new());
        running.insert(
            row.id.clone(),
            Running {
                stop: stop.clone(),
                generation: row.generation,
                ended: ended.clone(),
            },
        );
        let (this, row) = (self.clone(), row.clone());
        // Dropped at the end of the task, even if it panics.
        let ended = ended.drop_guard();
        let span = spans::transfer(&row.id, &row.artifact, &row.site);
        let work = async move {
            let _ended = ended;
            Box::pin(this.go(row, stop, before)).await;
        };
        tokio::spawn(work.instrument(span));
    }

    /// Waits until nothing runs any more; called after `stop`.
    pub async fn drained(&self) {
        let all: Vec<Running> = self
            .inner
            .running
            .lock()
            .drain()
            .map(|(_, running)| running)
            .collect();
        for running in all {
            running.ended.cancelled().await;
        }
        let ending: Vec<JoinHandle<()>> = self
            .inner
            .ending
            .lock()
            .drain()
            .map(|(_, task)| task)
            .collect();
        for task in ending {
            let _ = task.await;
        }
    }
}

fn incoming(row: &TransferRow, root: &Root) -> Incoming {
    Incoming {
        artifact: row.artifact.clone(),
        digest: row.digest,
        root: root.clone(),
        transfer: row.id.clone(),
        waits: Default::default(),
    }
}

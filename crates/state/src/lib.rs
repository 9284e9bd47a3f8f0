//! The catalogue: the artifacts, sites, transfers and training runs that a daemon knows.
//!
//! The daemons (`hub`, `site`) and `exchange` call it. Every write is one transaction, durable when
//! its call returns: a crash loses nothing that was confirmed to a caller. It returns rows; the API
//! makes views of them. Hub and site have the same tables. At a site, the transfers are those that
//! the hub requested of this site.
//!
//! [`Catalogue`] has what is common to all databases: wake-ups, the calls of the transfer state
//! machine, pages, and the meaning of rows. [`Engine`] is the database below it, one trait for each
//! subject; its methods are those of the catalogue too.

mod access;
mod artifacts;
mod changed;
#[cfg(test)]
mod conformance;
mod deliveries;
mod engine;
mod events;
mod lists;
mod malformed;
mod members;
mod relay;
mod runs;
mod sites;
mod sqlite;
mod transfers;
mod wake;

use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use base::fault::Fault;
use content::manifest::Digest;

pub use access::{Access, AccessRow};
pub use artifacts::{ArtifactRow, Artifacts, Offer, no_artifact};
pub use changed::{Changed, InPlace, PublishedInPlace, what_changed};
pub use deliveries::{Deliveries, DeliveryRow, no_delivery};
pub use engine::{Engine, Listed, See};
pub use events::{EventRow, Events, SiteState};
pub use malformed::MalformedRow;
pub use members::{Losses, Member, MemberChange, Members, PublisherRow, Revocation, no_member};
pub use relay::{Relay, RelayedArtifact, ShareTerms, SharingRow};
pub use runs::{RunRow, Runs};
pub use sites::{AllowLists, SiteRow, Sites, no_site, no_site_selected};
pub use transfers::{
    Adopted, Body, Counted, Difference, Part, TransferChanges, TransferRow, Transfers, Want,
    WorkRow,
};
pub use transfers::{new_delivery_id, new_id, new_run_id, no_work};
use wake::Waits;
pub use wake::{Subject, Watch};

use engine::Common;
use malformed::malformed;
use sqlite::Sqlite;

/// The catalogue. Cheap to clone. It has the methods of its [`Engine`].
#[derive(Clone)]
pub struct Catalogue {
    engine: Arc<dyn Engine>,
    common: Arc<Common>,
}

impl Deref for Catalogue {
    type Target = dyn Engine;

    fn deref(&self) -> &Self::Target {
        &*self.engine
    }
}

impl Catalogue {
    /// Opens or creates the catalogue in `data_dir`. A schema newer than this program's is refused.
    pub async fn open(data_dir: &Path) -> Result<Self, Fault> {
        let common = Arc::<Common>::default();
        let engine = Sqlite::open(data_dir, common.clone()).await?;
        Ok(Self::on(Arc::new(engine), common))
    }

    /// A catalogue on an engine that was opened with `common`.
    fn on(engine: Arc<dyn Engine>, common: Arc<Common>) -> Self {
        Self { engine, common }
    }

    /// A future that ends when anything changed after this call (not after its first poll), or
    /// after a while.
    pub fn changed(&self) -> impl Future<Output = ()> + Send + 'static {
        self.common.wakes.changed()
    }

    /// Watches one subject from now on. A task that reads the catalogue and then waits for the
    /// watch misses no change.
    pub fn watch(&self, subject: Subject) -> Watch {
        self.common.wakes.watch(Waits::One(subject))
    }

    /// Watches everything from now on.
    pub fn watch_all(&self) -> Watch {
        self.common.wakes.watch(Waits::All)
    }

    /// Watches everything but the progress of transfers from now on.
    pub fn watch_decisions(&self) -> Watch {
        self.common.wakes.watch(Waits::Decisions)
    }

    /// Wakes the tasks that wait for any change, after a change outside the catalogue.
    pub fn notify(&self) {
        self.notify_of(Subject::Other);
    }

    /// Wakes the tasks that wait for this subject, after a change of it outside the catalogue.
    pub fn notify_of(&self, subject: Subject) {
        self.common.wakes.wake(&[subject]);
    }

    /// The rows that could not be read since the catalogue was opened.
    pub fn malformed_rows(&self) -> Vec<MalformedRow> {
        self.common.malformed.all()
    }

    /// Any artifact of this digest, if possible one that this daemon holds; the content is the same
    /// under every name.
    pub async fn by_digest(&self, digest: Digest) -> Result<Option<ArtifactRow>, Fault> {
        Ok(self.all_by_digest(digest).await?.into_iter().next())
    }

    /// All artifacts, by name, with their root manifests. For tests only: it can take much memory.
    #[cfg(any(test, feature = "testing"))]
    pub async fn artifacts(&self) -> Result<Vec<ArtifactRow>, Fault> {
        let mut out = Vec::new();
        for name in self.artifact_names().await? {
            out.push(self.artifact(&name).await?);
        }
        Ok(out)
    }
}

/// A value as JSON, for a column.
fn json<T: serde::Serialize + ?Sized>(what: &str, value: &T) -> Result<String, Fault> {
    serde_json::to_string(value).map_err(|e| Fault::internal(format!("{what} as JSON: {e}")))
}

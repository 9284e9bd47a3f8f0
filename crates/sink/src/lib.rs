//! Sinks: write an artifact out at a site.
//!
//! The transfer engine stages an artifact's files in the folder that the sink names, every byte
//! checked against its hash first, and then asks the sink to commit. No sink sees a byte that was
//! not verified. Every call is idempotent: after a crash the engine simply asks again. `stage` owns
//! the staging folder; transfers and the site call this crate.

pub mod files;
pub mod images;
pub mod labels;
mod look;
pub mod settings;
pub mod stage;
pub mod threads;
mod waits;

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use unicode_normalization::UnicodeNormalization;

use crate::stage::StagingRoot;
use base::fault::{Code, Fault, Retry};
use base::names::{ArtifactRef, RelPath, TransferId};
use content::manifest::{Digest, FileInfo, Root};

pub use look::Look;
pub use threads::{Heartbeat, Threads, rounded_secs};
pub use waits::Waits;

/// An artifact on its way in, as a sink is shown it.
#[derive(Debug, Clone)]
pub struct Incoming {
    /// Its name.
    pub artifact: ArtifactRef,
    /// The BLAKE3 of its root manifest.
    pub digest: Digest,
    /// The root manifest: totals and what its kind needs.
    pub root: Root,
    /// The transfer that brings it; names the staging folder.
    pub transfer: TransferId,
    /// Where a call on it reports what it waits for.
    pub waits: Waits,
}

/// Where the files of a committed artifact can be read again, so that later transfers need not
/// fetch their chunks.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "at")]
pub enum StorageLocation {
    /// A folder that holds each file at its path in the artifact.
    Folder {
        /// Absolute.
        path: PathBuf,
    },
    /// The registry: a file `blobs/sha256/<hex>` is the blob of that digest in this repository.
    Registry {
        /// The repository, without host.
        repository: String,
    },
}

/// What a commit left behind.
#[derive(Debug, Clone)]
pub struct Landed {
    /// Where the files can be read from now on.
    pub place: StorageLocation,
    /// Where people find it: a path, `host/repo:tag@digest`, or a table and version.
    pub location: String,
    /// What there is to know about it although it is complete.
    pub note: Option<String>,
}

/// Which names are one name to a sink, though they differ.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Folding {
    /// Those that differ in case only.
    pub case: bool,
    /// Those that differ in their Unicode normalization only: an accent may be a part of its letter
    /// (NFC) or follow it (NFD).
    pub unicode: bool,
}

impl Folding {
    /// What all names have in common that are one name to the sink.
    pub fn fold(self, name: &str) -> String {
        let name: String = if self.unicode {
            name.nfd().collect()
        } else {
            name.to_owned()
        };
        if self.case { name.to_lowercase() } else { name }
    }
}

/// The fault of a commit for which nothing is staged: the artifact must be brought again. See
/// [`must_be_brought_again`].
fn nothing_staged(staged: &Path) -> Fault {
    Fault::integrity(format!("what was staged in {} is gone", staged.display()))
        .with_retry(Retry::Backoff)
        .with_next("no action is needed: it is brought again by itself")
}

/// Whether a commit that failed can succeed only after the artifact was brought again. All else
/// that passes by itself has to be waited for.
pub fn must_be_brought_again(fault: &Fault) -> bool {
    fault.retry == Retry::Never || matches!(fault.code, Code::Integrity | Code::Conflict)
}

/// Writes artifacts of some kinds out.
#[async_trait]
pub trait Sink: Send + Sync {
    /// The folder in which the engine makes `<transfer>/` and stages files, on the same mount as
    /// the end where it matters.
    fn staging_root(&self) -> &Path;

    /// The same folder, held open and made if it is not there: what was mounted when it was opened
    /// is what is written to. May block.
    fn staging(&self) -> Result<StagingRoot, Fault> {
        StagingRoot::open(self.staging_root())
    }

    /// The threads on which all that can block in this sink's folders or far end runs.
    fn threads(&self) -> &Threads;

    /// Why the calls that run now take so long; `None` while the far end answers. Returns at once.
    /// A transfer asks once a second while it waits for a call of the sink, and shows the answer as
    /// its reason until the call returns.
    fn held_up(&self) -> Option<Fault> {
        None
    }

    /// Where a committed artifact is, if that can be told from its name alone.
    fn place_of(&self, _artifact: &ArtifactRef) -> Option<StorageLocation> {
        None
    }

    /// Whether permission bits cannot be changed in the staging folder: then files keep those that
    /// they get there.
    fn fixed_modes(&self) -> bool {
        false
    }

    /// Writes a little, and reads it back. Called after a failure, before bytes are sent again that
    /// could not be stored.
    async fn trial(&self) -> Result<(), Fault> {
        Ok(())
    }

    /// Whether something in [`Sink::staging_root`] was put aside there by this sink, to be removed.
    fn may_remove(&self, name: &str) -> bool {
        name.starts_with("removed-")
    }

    /// Whether other daemons may stage in [`Sink::staging_root`]: then only what this daemon surely
    /// made may be removed there.
    fn is_shared(&self) -> bool {
        false
    }

    /// Says to others that use the same folder that this daemon does. Called at the start and each
    /// day. May block.
    fn renew(&self) -> Result<(), Fault> {
        Ok(())
    }

    /// Refuses early what cannot be committed later: no rights, no room at the far end, an
    /// immutable tag with another digest. Called before any byte moves.
    async fn check(&self, incoming: &Incoming) -> Result<(), Fault>;

    /// Every name the sink cannot hold, with the reason, judged one path at a time. `None` when the
    /// path is fine.
    fn refuse_path(&self, _path: &RelPath) -> Option<String> {
        None
    }

    /// Which names are one name to the sink.
    fn folding(&self) -> Folding {
        Folding::default()
    }

    /// Whether it can hold symbolic links.
    fn takes_links(&self) -> bool {
        true
    }

    /// Whether the far end already holds this very file (an image blob in the registry), so that it
    /// need not be staged at all.
    async fn holds(
        &self,
        _incoming: &Incoming,
        _path: &RelPath,
        _file: &FileInfo,
    ) -> Result<bool, Fault> {
        Ok(false)
    }

    /// A large file begins to grow in the staging folder: what takes long at the far end may begin.
    /// `grown` says how many bytes lie there from its beginning on, and closes too early when the
    /// rest does not come now. A hint, which need not come; what fails is tried again, and told, by
    /// the commit.
    async fn arriving(
        &self,
        _incoming: &Incoming,
        _staged: &Path,
        _path: &RelPath,
        _file: &FileInfo,
        _grown: watch::Receiver<u64>,
    ) {
    }

    /// Makes the staged artifact visible, whole, and durable. `staged` is
    /// `<staging_root>/<transfer>`; files for which [`Sink::holds`] said yes are absent from it. On
    /// success the staged folder is gone.
    async fn commit(&self, incoming: &Incoming, staged: &Path) -> Result<Landed, Fault>;

    /// Makes a committed artifact the active version of its series. Commits do this by themselves;
    /// this is for going back to an older one.
    async fn activate(&self, artifact: &ArtifactRef) -> Result<(), Fault>;

    /// Reads `len` bytes at `offset` of a committed file. Short or failing reads are errors; the
    /// caller verifies.
    async fn read_at(
        &self,
        place: &StorageLocation,
        path: &RelPath,
        offset: u64,
        len: u32,
    ) -> Result<Bytes, Fault>;

    /// Whether a committed artifact is there still, by a quick look.
    async fn stands(&self, incoming: &Incoming) -> Result<bool, Fault>;

    /// The version of this artifact's series that readers use, if that is known.
    async fn active(&self, _artifact: &ArtifactRef) -> Result<Option<String>, Fault> {
        Ok(None)
    }

    /// When a committed artifact was committed, by the clock of its filesystem: what was written to
    /// later was changed. May block.
    fn committed_at(&self, _artifact: &ArtifactRef) -> Option<std::time::SystemTime> {
        None
    }

    /// Compares what lies at the far end with the manifest where the engine cannot do it file by
    /// file (rows, registry manifests and blobs). Returns one line per fault found; empty means
    /// sound.
    async fn verify(
        &self,
        incoming: &Incoming,
        place: &StorageLocation,
        look: &Look,
    ) -> Result<Vec<String>, Fault>;

    /// Takes away what would be taken for sound when an artifact is committed again, of which
    /// [`Sink::verify`] or the engine found something gone or damaged. The commit puts back what
    /// lacks, and replaces the rest.
    async fn clear(&self, _incoming: &Incoming) -> Result<(), Fault> {
        Ok(())
    }

    /// Takes a committed artifact away. Removing what is not there succeeds. Says why it stays
    /// where the far end takes nothing away, however often it is asked.
    async fn remove(&self, artifact: &ArtifactRef) -> Result<Option<String>, Fault>;

    /// Whether the far end answers and the credentials are good; for `doctor` and `/readyz`.
    async fn probe(&self) -> Result<String, Fault>;
}

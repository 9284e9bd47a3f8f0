//! Sinks: write artifacts at a site.
//!
//! The transfer engine stages the files of an artifact in the directory that the sink names. Every
//! byte is checked against its hash first. Then the engine asks the sink to commit. A sink never
//! receives an unverified byte. Every call is idempotent: after a crash the engine repeats it.
//! `stage` owns the staging directory; transfers and the site call this crate.

pub mod file_state;
pub mod files;
pub mod heartbeat;
pub mod images;
pub mod labels;
pub mod settings;
pub mod stage;
mod verification;
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
use content::manifest::{Digest, FileInfo, KindInfo, Root};

pub use base::threads::Threads;
pub use heartbeat::{Heartbeat, rounded_secs};
pub use verification::Verification;
pub use waits::Waits;

impl StorageLocation {
    /// A path on the filesystem that a read of this location may hang in. A registry has none and
    /// is represented by `/`.
    pub fn filesystem(&self) -> &Path {
        match self {
            Self::Folder { path } => path,
            Self::Registry { .. } => Path::new("/"),
        }
    }
}

/// An incoming artifact, as a sink receives it.
#[derive(Debug, Clone)]
pub struct Incoming {
    pub artifact: ArtifactRef,
    /// The BLAKE3 of its root manifest.
    pub digest: Digest,
    /// The root manifest: totals and the metadata of the kind.
    pub root: Root,
    /// The transfer that delivers it; its id is the name of the staging directory.
    pub transfer: TransferId,
    /// A call for this artifact reports here what it waits for.
    pub waits: Waits,
}

/// The location from which the files of a committed artifact can be read, so that later transfers
/// need not fetch their chunks.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "at")]
pub enum StorageLocation {
    /// A directory with each file at its path in the artifact.
    Folder {
        /// An absolute path.
        path: PathBuf,
    },
    /// A repository in the registry: a file `blobs/sha256/<hex>` is the blob with that digest.
    Registry {
        /// The repository, without the host.
        repository: String,
    },
}

/// The result of a commit.
#[derive(Debug, Clone)]
pub struct Committed {
    /// The location from which the files can be read.
    pub place: StorageLocation,
    /// The location for users: a path, `host/repo:tag@digest`, or a table and version.
    pub location: String,
    /// Additional information about the complete artifact.
    pub note: Option<String>,
}

/// Which different names a sink treats as equal.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Folding {
    /// Names that differ only in case.
    pub case: bool,
    /// Names that differ only in their Unicode normalization: an accent may be part of its letter
    /// (NFC) or follow it (NFD).
    pub unicode: bool,
}

impl Folding {
    /// The common form of all names that the sink treats as equal.
    pub fn fold(self, name: &str) -> String {
        let name: String = if self.unicode {
            name.nfd().collect()
        } else {
            name.to_owned()
        };
        if self.case { name.to_lowercase() } else { name }
    }
}

/// The fault of a commit without staged content: the artifact must be delivered again. See
/// [`needs_new_delivery`].
fn nothing_staged(staged: &Path) -> Fault {
    Fault::integrity(format!(
        "the staged content in {} is missing",
        staged.display()
    ))
    .with_retry(Retry::Backoff)
    .with_next("no action is needed: the artifact is delivered again automatically")
}

/// Whether a failed commit can succeed only after the artifact was delivered again. All other
/// temporary failures must be waited for.
pub fn needs_new_delivery(fault: &Fault) -> bool {
    fault.retry == Retry::Never || matches!(fault.code, Code::Integrity | Code::Conflict)
}

/// Writes artifacts of some kinds.
#[async_trait]
pub trait Sink: Send + Sync {
    /// The directory in which the engine creates `<transfer>/` and stages files. It is on the same
    /// mount as the target if that matters.
    fn staging_root(&self) -> &Path;

    /// The same directory, opened and created if necessary: later writes go to what was mounted
    /// when it was opened. May block.
    fn staging(&self) -> Result<StagingRoot, Fault> {
        StagingRoot::open(self.staging_root())
    }

    /// The threads for all calls of this sink that can block in its directories or its target.
    fn threads(&self) -> &Threads;

    /// Why the running calls take so long; `None` while the target responds. Returns immediately. A
    /// transfer calls this once a second while it waits for the sink, and shows the result as its
    /// reason until the call returns.
    fn wait_reason(&self) -> Option<Fault> {
        None
    }

    /// The location of a committed artifact, if its name determines it.
    fn place_of(&self, _artifact: &ArtifactRef) -> Option<StorageLocation> {
        None
    }

    /// The directory into which a commit copies the whole version, because it is on another mount than
    /// the staging directory; `None`: a commit renames it. May block.
    fn copies_to(&self, _artifact: &ArtifactRef) -> Option<PathBuf> {
        None
    }

    /// Whether permission bits cannot be changed in the staging directory; files then keep those
    /// that they get there.
    fn fixed_modes(&self) -> bool {
        false
    }

    /// Whether modification times cannot be set in the staging directory.
    fn fixed_times(&self) -> bool {
        false
    }

    /// Whether a file of an earlier version can become part of a new one without a copy. May block.
    fn shares_files(&self) -> bool {
        true
    }

    /// Writes a small amount of data and reads it back. Called after a failure, before the transfer
    /// sends data again.
    async fn trial(&self) -> Result<(), Fault> {
        Ok(())
    }

    /// Keeps what was committed readable for others. Called at start and regularly.
    async fn tend(&self) -> Result<(), Fault> {
        Ok(())
    }

    /// Leaves what was committed readable for others. Called once, before the daemon ends.
    async fn leave(&self) {}

    /// Whether this sink has set aside the entry of this name in [`Sink::staging_root`] for
    /// removal.
    fn may_remove(&self, name: &str) -> bool {
        name.starts_with("removed-")
    }

    /// Whether other daemons may stage in [`Sink::staging_root`]. Then only what this daemon
    /// certainly created may be removed there.
    fn is_shared(&self) -> bool {
        false
    }

    /// Registers this daemon for other daemons that use the same directory. Called at the start and
    /// each day. May block.
    fn renew(&self) -> Result<(), Fault> {
        Ok(())
    }

    /// Rejects early what cannot be committed later: no permissions, no space at the target, an
    /// immutable tag with a different digest. Called before any byte is transferred.
    async fn check(&self, incoming: &Incoming) -> Result<(), Fault>;

    /// The reason why the sink cannot store this path; `None` if it can.
    fn refuse_path(&self, _path: &RelPath) -> Option<String> {
        None
    }

    /// Which different names the sink treats as equal.
    fn folding(&self) -> Folding {
        Folding::default()
    }

    /// Whether the sink supports symbolic links.
    fn takes_links(&self) -> bool {
        true
    }

    /// Whether the target already has exactly this file (an image blob in the registry), so that it
    /// need not be staged.
    async fn holds(
        &self,
        _incoming: &Incoming,
        _path: &RelPath,
        _file: &FileInfo,
    ) -> Result<bool, Fault> {
        Ok(false)
    }

    /// Called when a large file starts to grow in the staging directory, so that a slow upload can
    /// start early. `grown` is the number of bytes that exist from its beginning; it closes early
    /// if the rest does not arrive. Only a hint, which may be missing; the commit retries and
    /// reports what fails here.
    async fn arriving(
        &self,
        _incoming: &Incoming,
        _staged: &Path,
        _path: &RelPath,
        _file: &FileInfo,
        _grown: watch::Receiver<u64>,
    ) {
    }

    /// Makes the staged artifact visible, complete and durable. `staged` is
    /// `<staging_root>/<transfer>`; it does not contain files for which [`Sink::holds`] returned
    /// true. After a success, the staging directory is removed.
    async fn commit(&self, incoming: &Incoming, staged: &Path) -> Result<Committed, Fault>;

    /// Makes a committed artifact the active version of its series. A commit does this itself; this
    /// call is for activating an older version.
    async fn activate(&self, artifact: &ArtifactRef) -> Result<(), Fault>;

    /// Reads `len` bytes at `offset` of a committed file. A short or failed read is an error; the
    /// caller verifies the bytes.
    async fn read_at(
        &self,
        place: &StorageLocation,
        path: &RelPath,
        offset: u64,
        len: u32,
    ) -> Result<Bytes, Fault>;

    /// Whether a committed artifact still exists, by a quick check.
    async fn exists_at_target(&self, incoming: &Incoming) -> Result<bool, Fault>;

    /// The folder of an artifact that exists although no daemon has registered it. Its content is
    /// unknown.
    async fn unregistered(&self, _incoming: &Incoming) -> Result<Option<PathBuf>, Fault> {
        Ok(None)
    }

    /// The versions that the target holds, registered or not, as far as their names say.
    async fn versions(&self) -> Result<Vec<ArtifactRef>, Fault> {
        Ok(Vec::new())
    }

    /// Registers that folder, whose content was verified.
    async fn register(&self, _incoming: &Incoming) -> Result<(), Fault> {
        Ok(())
    }

    /// Makes this version the active one if its switch was lost: a network filesystem may lose the
    /// last change when its server loses power.
    async fn restore_switch(&self, _artifact: &ArtifactRef) -> Result<(), Fault> {
        Ok(())
    }

    /// The version of this artifact's series that readers use, if it is known.
    async fn active(&self, _artifact: &ArtifactRef) -> Result<Option<String>, Fault> {
        Ok(None)
    }

    /// When a committed artifact was committed, by the clock of its filesystem; files with a later
    /// time were changed. May block.
    fn committed_at(&self, _artifact: &ArtifactRef) -> Option<std::time::SystemTime> {
        None
    }

    /// Compares the target with the manifest if the engine cannot do that file by file (rows,
    /// registry manifests and blobs). Returns one line per problem; an empty list means intact.
    async fn verify(
        &self,
        incoming: &Incoming,
        place: &StorageLocation,
        verification: &Verification,
    ) -> Result<Vec<String>, Fault>;

    /// Removes the content for which [`Sink::verify`] or the engine found a problem, so that a
    /// repeated commit does not accept it. The commit adds what is missing and replaces the rest.
    async fn clear(&self, _incoming: &Incoming) -> Result<(), Fault> {
        Ok(())
    }

    /// Removes a committed artifact. Removing a missing artifact succeeds. Returns the reason if
    /// the target does not support removal. `info` is the metadata of its kind, if it is known: an
    /// image may have another name at the target.
    async fn remove(
        &self,
        artifact: &ArtifactRef,
        info: Option<&KindInfo>,
    ) -> Result<Option<String>, Fault>;

    /// Checks that the target responds and accepts the credentials; for `doctor` and `/readyz`.
    async fn probe(&self) -> Result<String, Fault>;
}

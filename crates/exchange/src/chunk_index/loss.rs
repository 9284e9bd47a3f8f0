//! The record of a lost `places.redb`: the file is rebuilt, and this is reported.
//!
//! A damaged file is moved to `places.redb.damaged-<unix ms>`. The site then adds the rows of each
//! artifact in its catalogue from the manifest, and each transfer hashes its staging folder and
//! adds what it finds. The record is `<data_dir>/places-rebuilt.json`. It is written before the new
//! file, so a crash between the two loses nothing. It stays for `doctor` until an operator removes
//! it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use base::clock;
use base::durable;
use base::fault::Fault;

const FILE: &str = "places-rebuilt.json";
/// The largest record that is read.
const BYTES_MAX: u64 = 64 << 10;

/// One loss of `places.redb`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// When it was found, RFC 3339.
    pub at: String,
    /// What was wrong with the file.
    pub why: String,
    /// Where the damaged file is; `None`: it was missing.
    pub aside: Option<PathBuf>,
    /// The number of artifacts whose rows were rebuilt; `None`: the rebuild is not finished.
    pub artifacts: Option<u64>,
}

impl Loss {
    pub(super) fn begin(data_dir: &Path, why: &str, aside: Option<&Path>) -> Result<(), Fault> {
        let loss = Self {
            at: clock::now_rfc3339(),
            why: why.into(),
            aside: aside.map(Path::to_owned),
            artifacts: None,
        };
        let aside = aside
            .map(|path| path.display().to_string())
            .unwrap_or_default();
        tracing::error!(
            why,
            aside,
            "the chunk index of this site is rebuilt from the artifacts at this site"
        );
        loss.save(data_dir)
    }

    /// The last loss. A record that cannot be read counts as unfinished.
    pub(super) fn load(data_dir: &Path) -> Option<Self> {
        let path = data_dir.join(FILE);
        let meta = std::fs::metadata(&path).ok()?;
        let read = if meta.len() <= BYTES_MAX {
            std::fs::read(&path).ok()
        } else {
            None
        };
        let parsed = read.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Some(parsed.unwrap_or_else(|| Self {
            at: String::new(),
            why: format!("the record {} cannot be read", path.display()),
            aside: None,
            artifacts: None,
        }))
    }

    pub(super) fn end(&mut self, data_dir: &Path, artifacts: u64) -> Result<(), Fault> {
        self.artifacts = Some(artifacts);
        self.save(data_dir)
    }

    fn save(&self, data_dir: &Path) -> Result<(), Fault> {
        let text = serde_json::to_vec(self)
            .map_err(|e| Fault::internal(format!("a record as JSON: {e}")))?;
        durable::replace(&data_dir.join(FILE), &text)
    }

    /// One line for `doctor`.
    pub fn report(&self, data_dir: &Path) -> String {
        let aside = self
            .aside
            .as_ref()
            .map(|path| format!(", and {}", path.display()))
            .unwrap_or_default();
        match self.artifacts {
            Some(count) => format!(
                "ok chunk index: rebuilt on {} for {count} artifacts, because {}; remove {}{aside} to end this line",
                self.at,
                self.why,
                data_dir.join(FILE).display()
            ),
            None => format!(
                "fault chunk index: being rebuilt since {}, because {}; until then chunks that are here may be fetched again",
                self.at, self.why
            ),
        }
    }
}

//! What is known of a lost `places.redb`: it is made again, and that is reported.
//!
//! A damaged file is set aside as `places.redb.damaged-<unix ms>`. The site then notes the rows of
//! each artifact that its catalogue says is here, from its manifest, and each transfer takes what
//! its staging folder holds, after hashing it. The record of that is
//! `<data_dir>/places-rebuilt.json`; it is written before the new file is made, so a crash in
//! between loses nothing of it. It stays for `doctor` until somebody removes it.

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
    /// The artifacts whose rows were made again; `None`: that is still going on.
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
            "the chunk index of this site is made again from the artifacts that are here"
        );
        loss.save(data_dir)
    }

    /// The last one. A record that cannot be read counts as one that is not done.
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
                "ok places: made again on {} for {count} artifacts, because {}; remove {}{aside} to end this line",
                self.at,
                self.why,
                data_dir.join(FILE).display()
            ),
            None => format!(
                "fault places: being made again since {}, because {}; until then chunks that are here may be fetched again",
                self.at, self.why
            ),
        }
    }
}

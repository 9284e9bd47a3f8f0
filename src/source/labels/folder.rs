//! Walks a folder of label files, in no particular order and with few names in memory: rows are sorted later.

use std::fs::ReadDir;
use std::path::{Path, PathBuf};

use crate::fault::{Fault, IoContext};

/// The deepest folder that is entered.
const DEPTH_MAX: usize = 64;

/// The regular files under a folder, hidden ones left out. Links to files are followed, links to folders are not, so
/// that no loop can be walked.
pub(super) struct Walk {
    start: Option<PathBuf>,
    open: Vec<(PathBuf, ReadDir)>,
}

impl Walk {
    pub(super) fn new(root: &Path) -> Self {
        Self { start: Some(root.into()), open: Vec::new() }
    }

    fn enter(&mut self, path: PathBuf) -> Result<(), Fault> {
        if self.open.len() >= DEPTH_MAX {
            return Err(Fault::integrity(format!("{} lies more than {DEPTH_MAX} folders deep", path.display()))
                .with_next("give the folder that holds the labels, not one far above it"));
        }
        let entries = std::fs::read_dir(&path).at(format_args!("list {}", path.display()))?;
        self.open.push((path, entries));
        Ok(())
    }

    fn step(&mut self) -> Result<Option<PathBuf>, Fault> {
        if let Some(start) = self.start.take() {
            self.enter(start)?;
        }
        while let Some((folder, entries)) = self.open.last_mut() {
            let Some(entry) = entries.next() else {
                self.open.pop();
                continue;
            };
            let entry = entry.at(format_args!("list {}", folder.display()))?;
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let path = entry.path();
            let kind = entry.file_type().at(format_args!("read {}", path.display()))?;
            if kind.is_dir() {
                self.enter(path)?;
            } else if kind.is_file() || (kind.is_symlink() && path.is_file()) {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }
}

impl Iterator for Walk {
    type Item = Result<PathBuf, Fault>;
    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step().transpose();
        if matches!(step, Some(Err(_))) {
            self.open.clear();
        }
        step
    }
}

/// Whether the file's name ends in one of these, in any case.
pub(super) fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let found = path.extension().and_then(|e| e.to_str());
    found.is_some_and(|found| extensions.iter().any(|e| found.eq_ignore_ascii_case(e)))
}

/// The path relative to the root, as text with '/'; `None` when it is not UTF-8.
pub(super) fn relative<'a>(path: &'a Path, root: &Path) -> Option<&'a str> {
    path.strip_prefix(root).unwrap_or(path).to_str()
}

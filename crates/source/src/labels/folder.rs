//! What label readers read: one file, or a folder walked in no particular order and with few names
//! in memory (rows are sorted later). Nothing outside of a folder is read: see [`Inside`].

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cap_std::fs::ReadDir;

use crate::inside::Inside;
use crate::own::{self, Own};
use base::fault::{Fault, IoContext};
use base::omitted::{Category, Omitted};

/// The deepest folder that is entered.
const DEPTH_MAX: usize = 64;

/// The labels that somebody named.
pub(super) enum Input {
    /// A file.
    File(PathBuf, Arc<Own>),
    /// A folder.
    Folder(Inside),
}

impl Input {
    /// Opens what is at `path`, which may itself be a link: whoever names it means what it leads
    /// to.
    pub(super) fn open(path: &Path, own: Arc<Own>) -> Result<Self, Fault> {
        let at = || format!("read labels {}", path.display());
        own.check_path(path)?;
        match path.metadata().at(at())?.is_dir() {
            true => Inside::open(path, own).map(Input::Folder),
            false => Ok(Input::File(path.to_owned(), own)),
        }
    }

    /// The one file, for formats that are one.
    pub(super) fn file(&self) -> Result<File, Fault> {
        match self {
            Input::File(path, own) => own.open(path).map_err(|e| own::fault(path, &e)),
            Input::Folder(folder) => Err(Fault::integrity(format!(
                "{} is a folder, and labels of this format are one file",
                folder.full("").display()
            ))
            .with_next("give the file, or name another format")),
        }
    }

    /// The folder, for formats that are one.
    pub(super) fn folder(&self) -> Option<&Inside> {
        match self {
            Input::File(..) => None,
            Input::Folder(folder) => Some(folder),
        }
    }

    /// The files that are never read or written.
    pub(super) fn own(&self) -> &Own {
        match self {
            Input::File(_, own) => own,
            Input::Folder(folder) => folder.own(),
        }
    }

    /// Its path, for messages.
    pub(super) fn shown(&self) -> PathBuf {
        match self {
            Input::File(path, _) => path.clone(),
            Input::Folder(folder) => folder.full(""),
        }
    }
}

/// The regular files under a folder by their paths in it, hidden ones left out. Links to files are
/// given, links to folders are not entered, so that no loop can be walked.
pub(super) struct Walk<'a> {
    inside: &'a Inside,
    start: bool,
    open: Vec<(PathBuf, ReadDir)>,
    /// What it came by and did not give.
    pub(super) omitted: Omitted,
}

impl<'a> Walk<'a> {
    pub(super) fn new(inside: &'a Inside) -> Self {
        Self {
            inside,
            start: true,
            open: Vec::new(),
            omitted: Omitted::default(),
        }
    }

    fn enter(&mut self, path: PathBuf) -> Result<(), Fault> {
        if self.open.len() >= DEPTH_MAX {
            return Err(Fault::integrity(format!(
                "{} lies more than {DEPTH_MAX} folders deep",
                self.inside.full(&path).display()
            ))
            .with_next("give the folder that holds the labels, not one far above it"));
        }
        let entries = self.inside.list(&path)?;
        self.open.push((path, entries));
        Ok(())
    }

    fn step(&mut self) -> Result<Option<PathBuf>, Fault> {
        if std::mem::take(&mut self.start) {
            self.enter(PathBuf::new())?;
        }
        while let Some((folder, entries)) = self.open.last_mut() {
            let Some(entry) = entries.next() else {
                self.open.pop();
                continue;
            };
            let at = |path: &Path| format!("list {}", self.inside.full(path).display());
            let entry = entry.at(at(folder))?;
            let path = folder.join(entry.file_name());
            let kind = entry.file_type().at(at(&path))?;
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                if !kind.is_dir() {
                    self.omitted
                        .add(Category::UnreadFiles, path.display().to_string());
                }
                continue;
            }
            if kind.is_dir() {
                self.enter(path)?;
            } else if kind.is_file() {
                return Ok(Some(path));
            } else if kind.is_symlink() {
                match self.inside.linked_folder(&path) {
                    Some(target) => self.omitted.add(
                        Category::LinkedFolders,
                        format!("{} -> {}", path.display(), target.display()),
                    ),
                    // One that leaves the folder is refused by whoever reads it.
                    None => return Ok(Some(path)),
                }
            }
        }
        Ok(None)
    }
}

impl Iterator for Walk<'_> {
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

//! Which entries of a directory are published: `--exclude`, `.packhorseignore`, and what is never
//! content.
//!
//! All of them are patterns in the syntax of gitignore. Of patterns from several places, the first
//! place with a pattern that matches decides: `--exclude`, then the `.packhorseignore` of the
//! innermost directory, then those of the directories above it, then the defaults. So
//! `--exclude '!.DS_Store'` includes what a default excludes. As in git, nothing below an excluded
//! directory can be included again.

use std::fmt;
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use ignore::gitignore::{Gitignore, GitignoreBuilder};

use crate::own::Own;
use base::durable;
use base::fault::Fault;
use base::limits::{EXCLUDE_PATTERN_BYTES_MAX, EXCLUDE_PATTERNS_MAX, IGNORE_FILE_BYTES_MAX};

/// What a NAS, a desktop or an NFS client leaves between the files.
pub(super) const DEFAULTS: [&str; 4] = ["@eaDir", ".DS_Store", "Thumbs.db", ".nfs*"];
/// Editors write it before the first line.
const BYTE_ORDER_MARK: char = '\u{feff}';
/// The name of the file with patterns, in any directory.
const IGNORE_FILE: &str = ".packhorseignore";

/// Why an entry is excluded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExcludedBy {
    Option,
    File,
    Default,
}

impl fmt::Display for ExcludedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ExcludedBy::Option => "--exclude",
            ExcludedBy::File => IGNORE_FILE,
            ExcludedBy::Default => "by default",
        })
    }
}

/// The patterns that apply to a whole tree.
#[derive(Debug)]
pub(super) struct Selection {
    option: Gitignore,
    defaults: Gitignore,
}

impl Default for Selection {
    fn default() -> Self {
        let mut defaults = GitignoreBuilder::new("");
        for pattern in DEFAULTS {
            // A test checks that each of them is valid.
            let _ = defaults.add_line(None, pattern);
        }
        Self {
            option: Gitignore::empty(),
            defaults: defaults.build().unwrap_or_else(|_| Gitignore::empty()),
        }
    }
}

impl Selection {
    /// With the patterns of `--exclude`.
    pub(super) fn new(exclude: &[String]) -> Result<Self, Fault> {
        if exclude.len() > EXCLUDE_PATTERNS_MAX {
            return Err(Fault::usage(format!(
                "there are {} patterns to exclude; at most {EXCLUDE_PATTERNS_MAX} are allowed",
                exclude.len()
            ))
            .with_next(format!(
                "write them into a file {IGNORE_FILE} in the directory"
            )));
        }
        let mut option = GitignoreBuilder::new("");
        option.allow_unclosed_class(false);
        for pattern in exclude {
            let wrong = |why: String| {
                let shown: String = pattern.chars().take(60).collect();
                Fault::usage(format!("--exclude {shown:?} is not a pattern: {why}"))
                    .with_next("write it in the syntax of gitignore, such as '*.tmp' or '/build/'")
            };
            if pattern.trim().is_empty() {
                return Err(wrong("it is empty".into()));
            }
            if pattern.len() > EXCLUDE_PATTERN_BYTES_MAX || pattern.contains(['\n', '\0']) {
                return Err(wrong("it is too long or has several lines".into()));
            }
            option
                .add_line(None, pattern)
                .map_err(|error| wrong(error.to_string()))?;
        }
        let option = option
            .build()
            .map_err(|error| Fault::usage(format!("--exclude: {error}")))?;
        Ok(Self {
            option,
            ..Self::default()
        })
    }

    /// What excludes an entry; `files` are those of its directory and of the directories above,
    /// the innermost first.
    pub(super) fn excluded_by<'a>(
        &self,
        files: impl Iterator<Item = &'a IgnoreFile>,
        path: &Path,
        is_dir: bool,
    ) -> Option<ExcludedBy> {
        let option = std::iter::once((&self.option, ExcludedBy::Option));
        let files = files.map(|file| (&file.0, ExcludedBy::File));
        let defaults = std::iter::once((&self.defaults, ExcludedBy::Default));
        for (patterns, by) in option.chain(files).chain(defaults) {
            let matched = patterns.matched(path, is_dir);
            if !matched.is_none() {
                return matched.is_ignore().then_some(by);
            }
        }
        None
    }
}

/// The patterns of one `.packhorseignore`.
#[derive(Debug)]
pub(super) struct IgnoreFile(Gitignore);

impl IgnoreFile {
    /// Reads that of a directory, if it has one. The patterns are relative to `rel`.
    pub(super) fn read(folder: &Path, rel: &[u8], own: &Own) -> io::Result<Option<Self>> {
        let path = folder.join(IGNORE_FILE);
        let file = match durable::open_regular_nofollow(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(wrong(&format!("cannot be read: {error}"))),
        };
        own.check_opened(&file)?;
        let mut patterns = GitignoreBuilder::new(Path::new(std::ffi::OsStr::from_bytes(rel)));
        let mut limited = BufReader::new(file.take(IGNORE_FILE_BYTES_MAX + 1));
        let (mut number, mut bytes, mut line) = (0, 0, String::new());
        loop {
            line.clear();
            number += 1;
            let read = limited
                .read_line(&mut line)
                .map_err(|error| match error.kind() {
                    ErrorKind::InvalidData => wrong(&format!("is not UTF-8 text in line {number}")),
                    _ => wrong(&format!("cannot be read: {error}")),
                })?;
            if read == 0 {
                break;
            }
            bytes += read as u64;
            if bytes > IGNORE_FILE_BYTES_MAX || number > EXCLUDE_PATTERNS_MAX {
                return Err(wrong(&format!(
                    "is too large: at most {IGNORE_FILE_BYTES_MAX} bytes and {EXCLUDE_PATTERNS_MAX} lines are read"
                )));
            }
            patterns
                .add_line(
                    None,
                    line.trim_start_matches(BYTE_ORDER_MARK)
                        .trim_end_matches(['\n', '\r']),
                )
                .map_err(|_| wrong(&format!("has no pattern in line {number}")))?;
        }
        let patterns = patterns
            .build()
            .map_err(|error| wrong(&error.to_string()))?;
        Ok(Some(Self(patterns)))
    }
}

/// Whether the patterns of a directory cannot be read, and not the directory.
pub(super) fn is_wrong(error: &io::Error) -> bool {
    error.kind() == ErrorKind::InvalidData
}

fn wrong(why: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("its {IGNORE_FILE} {why}"))
}

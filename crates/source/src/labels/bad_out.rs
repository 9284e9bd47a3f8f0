//! The file of bad records that `--bad-out` names: one JSON object a line, with `reason`, `place`,
//! `detail` and, where it is known, the `record` itself.
//!
//! `Refusals` writes it while labels are read. It is made in the scratch folder, and copied to its
//! place at the end, so that a read that ends early leaves nothing there. An existing file is never
//! replaced; one that has the same content, as after a repeated read, is accepted. Without a bad
//! record there is no file.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::value::RawValue;

use base::fault::{Fault, IoContext};

use crate::own::Own;

/// The file that is being written.
pub(super) struct BadOut {
    out: BufWriter<File>,
    target: PathBuf,
    lines: u64,
    /// The first error of a write; reported at the end.
    error: Option<std::io::Error>,
}

#[derive(Serialize)]
struct Line<'a> {
    reason: &'a str,
    place: &'a str,
    detail: &'a str,
    record: Option<&'a RawValue>,
}

/// Refuses a target that exists, before anything is read.
pub fn check(target: &Path) -> Result<(), Fault> {
    match target.symlink_metadata() {
        Ok(_) => Err(exists(target)),
        Err(_) => Ok(()),
    }
}

fn exists(target: &Path) -> Fault {
    Fault::conflict(format!(
        "the file for bad records {} already exists",
        target.display()
    ))
    .with_next("give --bad-out the name of a new file, or remove that one")
}

impl BadOut {
    /// Begins the file for `target` in the folder `scratch`.
    pub(super) fn create(target: &Path, scratch: &Path, own: &Own) -> Result<Self, Fault> {
        if !target.is_absolute() {
            return Err(Fault::usage(format!(
                "the file for bad records {} is not an absolute path",
                target.display()
            )));
        }
        let folder = target.parent().unwrap_or(target);
        own.check_path(folder)?;
        if !folder.is_dir() {
            return Err(Fault::usage(format!(
                "the file for bad records {} cannot be written: its directory does not exist",
                target.display()
            ))
            .with_next(
                "give --bad-out a file in a directory that exists on the daemon's machine",
            ));
        }
        let path = scratch.join(".bad-records");
        let at = format!("make {}", path.display());
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .at(&at)?;
        // Nobody opens it by its name.
        std::fs::remove_file(&path).at(&at)?;
        Ok(Self {
            out: BufWriter::with_capacity(64 << 10, file),
            target: target.to_owned(),
            lines: 0,
            error: None,
        })
    }

    /// Adds a bad record.
    pub(super) fn write(&mut self, reason: &str, place: &str, detail: &str, record: Option<&str>) {
        self.lines += 1;
        if self.error.is_some() {
            return;
        }
        let line = Line {
            reason,
            place,
            detail,
            record: record.and_then(|text| serde_json::from_str(text).ok()),
        };
        let written = serde_json::to_writer(&mut self.out, &line)
            .map_err(std::io::Error::from)
            .and_then(|()| self.out.write_all(b"\n"));
        self.error = written.err();
    }

    /// Puts the file in its place; gives its path if there is a bad record.
    pub(super) fn finish(mut self) -> Result<Option<PathBuf>, Fault> {
        let at = format!("write bad records to {}", self.target.display());
        if let Some(error) = self.error.take() {
            return Err(error).at(&at);
        }
        if self.lines == 0 {
            return Ok(None);
        }
        let file = self
            .out
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error);
        let mut file = file.at(&at)?;
        file.rewind().at(&at)?;
        match File::create_new(&self.target) {
            Ok(mut target) => {
                let copied = std::io::copy(&mut file, &mut target).and_then(|_| target.sync_all());
                if copied.is_err() {
                    // What is left of it says nothing.
                    drop(std::fs::remove_file(&self.target));
                }
                copied.at(&at)?;
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                if !same(&mut file, &self.target).at(&at)? {
                    return Err(exists(&self.target));
                }
            }
            Err(error) => return Err(error).at(&at),
        }
        Ok(Some(self.target))
    }
}

/// Whether a regular file has this content.
fn same(file: &mut File, other: &Path) -> std::io::Result<bool> {
    let meta = other.symlink_metadata()?;
    if !meta.is_file() || meta.len() != file.metadata()?.len() {
        return Ok(false);
    }
    let (mut left, mut right) = (BufReader::new(file), BufReader::new(File::open(other)?));
    let (mut a, mut b) = ([0; 8 << 10], [0; 8 << 10]);
    loop {
        let count = left.read(&mut a)?;
        if count == 0 {
            return Ok(true);
        }
        right.read_exact(&mut b[..count])?;
        if a[..count] != b[..count] {
            return Ok(false);
        }
    }
}

//! Exports of labels in formats of annotation tools: what is asked for, and the job that writes it.
//!
//! The formats are in [`source::labels::export`]. The hub gives it the canonical files out of its
//! store, a site those that it keeps beside the rows. A crash leaves an incomplete directory, which
//! the user removes.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::api::types::ExportLabelsRequest;
use crate::config::Config;
use base::durable;
use base::fault::{Fault, IoContext};
use base::job_progress::JobProgress;
use base::limits::STATE_ROOM_BYTES_MIN;
use base::names::{ArtifactRef, Kind};
use base::space::Space;
use content::label_rows::{ANNOTATIONS, CLASSES, SAMPLES};
use content::manifest::{EntryBody, Root, Step, Walk};
use content::store::Store;
use source::labels::export::{self, ExportFormat, Exported};

/// An export that was asked for.
#[derive(Debug)]
pub struct LabelExport {
    /// The labels.
    pub artifact: ArtifactRef,
    /// The directory to write.
    pub out: PathBuf,
    format: ExportFormat,
}

impl LabelExport {
    /// Checks a request.
    pub fn parse(request: &ExportLabelsRequest) -> Result<Self, Fault> {
        let artifact: ArtifactRef = request.artifact.parse()?;
        if artifact.kind != Kind::Labels {
            return Err(Fault::usage(format!(
                "{artifact} is {}, and only labels have these formats",
                artifact.kind.with_article()
            )));
        }
        let out = PathBuf::from(&request.out);
        if !out.is_absolute() {
            return Err(Fault::usage(format!(
                "{:?} is not an absolute path",
                request.out
            )));
        }
        Ok(Self {
            artifact,
            out,
            format: request.format.parse()?,
        })
    }

    /// Writes the labels whose canonical files are in `rows`. What the format cannot hold becomes
    /// notes of the job.
    pub fn write(
        &self,
        config: &Config,
        rows: &Path,
        progress: &JobProgress,
    ) -> Result<Exported, Fault> {
        let out = &self.out;
        progress.doing(format!("writing {}", out.display()));
        // It makes a new directory only; but not among the daemon's own.
        config.own().check_path(out.parent().unwrap_or(out))?;
        let exported = export::export(rows, self.format, out, &|| progress.check())?;
        exported.notes.iter().for_each(|note| progress.note(note));
        Ok(exported)
    }
}

/// Writes the canonical files of labels, which a store holds, to a directory.
pub fn unpack(
    root: &Root,
    store: &Store,
    into: &Path,
    progress: &JobProgress,
) -> Result<(), Fault> {
    let needed = root.totals.bytes.saturating_add(STATE_ROOM_BYTES_MIN);
    Space::check(into, needed, 0, "the rows of the labels")?;
    let mut open: Option<(BufWriter<File>, PathBuf)> = None;
    let end = |open: &mut Option<(BufWriter<File>, PathBuf)>| match open.take() {
        Some((file, path)) => file
            .into_inner()
            .map_err(|e| e.into_error())
            .and_then(durable::close)
            .at(format_args!("write {}", path.display())),
        None => Ok(()),
    };
    for step in Walk::new(root, store) {
        progress.check()?;
        match step? {
            Step::Entry { entry, .. } => {
                end(&mut open)?;
                let is_rows = [ANNOTATIONS, CLASSES, SAMPLES].contains(&entry.path.as_str());
                if is_rows && matches!(entry.body, EntryBody::File(_)) {
                    let path = entry.path.in_dir(into);
                    let file =
                        File::create_new(&path).at(format_args!("create {}", path.display()))?;
                    open = Some((BufWriter::new(file), path));
                }
            }
            Step::Chunk(chunk, _) => {
                let Some((file, path)) = &mut open else {
                    continue;
                };
                let chunk = store.read_chunk(chunk)?;
                file.write_all(&chunk.bytes)
                    .at(format_args!("write {}", path.display()))?;
            }
        }
    }
    end(&mut open)
}

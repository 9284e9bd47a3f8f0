//! Labels: reads every format that annotation tools write, and gives the canonical label files
//! (`content::label_rows`).
//!
//! `ingest` opens a [`LabelsSource`] on a blocking thread; all reading, checking and sorting
//! happens in [`LabelsSource::open`], in a fixed amount of memory, with spilled rows and the three
//! finished files in the scratch folder it was given. A crash leaves only that folder, which its
//! owner removes. Input with any fault is refused as a whole, naming the first offenders and the
//! number of each kind (`refuse`).
//!
//! # Formats
//!
//! | word | input | how it is taken |
//! |---|---|---|
//! | `coco` | a JSON object with `images`, `annotations`, `categories` in any order | pixels as they are; kinds bbox, polygon, rle, keypoints, class |
//! | `csv` | delimiter `,` `;` or tab (detected), a header, UTF-8 | columns by name, below |
//! | `jsonl` | one JSON object a line | members by the same names |
//! | `label_studio` | its JSON export | percent to pixels; one row a label of a region; each annotator's apart by `attrs.annotator`; `completions` of old exports are annotations; skipped tasks are left out and reported |
//! | `voc` | a folder of Pascal VOC XML | pixels counted from 1, ends included, become left, top, width, height counted from 0 |
//! | `yolo` | a folder of YOLO text files | normalised centre to pixels; sizes from the images beside, or from `sizes.csv` (path,width,height) |
//!
//! Out of a site's label database come a whole version, byte for byte as it was loaded, or the rows
//! of a query (`sink::labels` reads them from one snapshot). A query returns `sample_path` and any
//! of `sample_hash`, `class`, `class_id`, `kind`, `x`, `y`, `w`, `h`, `geom`, `attrs`, `raw` (the
//! columns of the view `packhorse.annotations`), `width`, `height`, `split`; `label_set` and
//! `version` may come too and must be the same in all rows. Rows may come in any order: those of
//! one sample are put in the order of their content, so that the same rows give the same digest.
//! Without `kind` it is told from what there is; without `raw` the row itself is the record; a row
//! with nothing but its sample names one without annotations.
//!
//! The format is guessed from the name and the first bytes unless it is given;
//! [`LabelsSource::format`] and [`LabelsSource::guessed`] say what was taken.
//!
//! # `columns`
//!
//! For `csv` and `jsonl`, a canonical field to the column that holds it: `sample_path`, `class`,
//! `class_id`, `id`, `x`, `y`, `w`, `h`, `x2`, `y2`, `kind`, `geom`, `split`, `width`, `height`,
//! `attrs` (the names tried without a mapping stand in `table`). A field mapped to the empty name
//! is not taken from any column. For every format also these settings:
//! - `path_strip`: a leading part of sample paths that is taken away (`/data/upload/1/`),
//! - `path_prefix`: the folder of the dataset that sample paths are relative to (`images/train`),
//! - `predictions`: `true` takes the predictions of Label Studio too.
//!
//! Sample paths must equal paths of the dataset after that; a backslash counts as '/'.
//!
//! # Rules
//!
//! - A box may reach one pixel over its image; it is kept as it is. Sizes come from the labels;
//!   where they name none, only the left and upper edges are checked.
//! - Classes that come by name only are numbered from 0 in the order of their names (bytewise).
//! - `geom`: `polygon` is COCO's list of rings `[[x,y,…],…]`; `rle` the object or list that the
//!   format has; `keypoints` is `[x,y,v,…]`; a rotated box is `{"x","y","w","h","rotation"}`
//!   (degrees clockwise around its top left corner), and the row's own x, y, w, h are the upright
//!   box around it. All in pixels.
//! - `attrs`: what the record says beyond the other fields. `raw`: the record itself, compact; JSON
//!   keeps its number spellings, other formats are rendered as JSON.

mod coco;
mod collect;
mod folder;
mod guess;
mod json;
mod label_studio;
mod refuse;
mod size;
mod sort;
mod table;
#[cfg(test)]
mod tests;
mod text;
mod voc;
mod write;
mod xml;
mod yolo;
mod yolo_names;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::own::Own;
use base::fault::{Fault, IoContext};
use base::names::RelPath;
use base::omitted::{Category, Omitted};
use content::label_rows::{ANNOTATIONS, CLASSES, QueryRow, SAMPLES};
use content::manifest::{DatasetBinding, FileInfo, KindInfo, LabelsInfo};

use super::{Content, FileIdentity, Source, SourceBody, SourceEntry};
use collect::{Collector, PathRules};
use folder::Input;
use guess::Format;

/// How labels are read.
#[derive(Debug, Clone, Default)]
pub struct LabelOptions {
    /// `coco`, `csv`, `jsonl`, `label_studio`, `voc` or `yolo`; guessed when absent.
    pub format: Option<String>,
    /// Samples that the dataset does not hold are allowed (their hash stays empty).
    pub allow_missing: bool,
    /// Which column holds a field, and the settings that the module's page lists.
    pub columns: BTreeMap<String, String>,
}

/// A dataset's files in manifest order.
pub type DatasetFiles = Box<dyn Iterator<Item = Result<(RelPath, FileInfo), Fault>> + Send>;

/// The dataset version that labels are published for.
pub struct BoundDataset {
    /// Its reference and digest, kept in the manifest.
    pub binding: DatasetBinding,
    /// Its files, in manifest order.
    pub files: DatasetFiles,
}

/// The format of what comes out of a database.
const DATABASE: &str = "database";

/// The settings among the columns, which are no fields.
const SETTINGS: [&str; 3] = ["path_strip", "path_prefix", "predictions"];

/// Labels in canonical form, from any format.
pub struct LabelsSource {
    format: &'static str,
    guessed: bool,
    info: LabelsInfo,
    omitted: Omitted,
    entries: std::vec::IntoIter<SourceEntry>,
}

impl LabelsSource {
    /// Reads the labels at `path` and writes their canonical form into the folder `scratch`, which
    /// must exist and outlive the entries. Blocking. Fails with everything that is wrong with the
    /// input; nothing is half taken.
    pub fn open(
        path: &Path,
        scratch: &Path,
        options: &LabelOptions,
        dataset: Option<BoundDataset>,
    ) -> Result<Self, Fault> {
        Self::open_for(path, scratch, options, dataset, Arc::default())
    }

    /// The same for a daemon, which publishes nothing that is its own.
    pub fn open_for(
        path: &Path,
        scratch: &Path,
        options: &LabelOptions,
        dataset: Option<BoundDataset>,
        own: Arc<Own>,
    ) -> Result<Self, Fault> {
        let format = options
            .format
            .as_deref()
            .map(str::parse::<Format>)
            .transpose()?;
        let input = Input::open(path, own)?;
        let (format, guessed) = match format {
            Some(format) => (format, false),
            None => (guess::guess(&input)?, true),
        };
        check_columns(format, &options.columns)?;
        let how = if guessed { "guessed" } else { "as asked" };
        let context = |fault: Fault| {
            let fault = fault.context(format_args!("labels {} ({format}, {how})", path.display()));
            if guessed && fault.code == base::fault::Code::Integrity {
                let next = format!("{}; if it is not {format}, name the format", fault.next);
                return fault.with_next(next);
            }
            fault
        };
        let (info, omitted) =
            convert(&input, scratch, format, options, dataset).map_err(context)?;
        Ok(Self {
            format: format.as_str(),
            guessed,
            omitted,
            ..Self::canonical(scratch, info)?
        })
    }

    /// Labels whose canonical files lie in this folder already.
    pub fn canonical(folder: &Path, info: LabelsInfo) -> Result<Self, Fault> {
        let mut entries = Vec::new();
        for name in [ANNOTATIONS, CLASSES, SAMPLES] {
            entries.push(entry(name, folder.join(name))?);
        }
        let mut omitted = Omitted::default();
        note_empty(&info, &mut omitted);
        Ok(Self {
            format: DATABASE,
            guessed: false,
            info,
            omitted,
            entries: entries.into_iter(),
        })
    }

    /// Writes the rows of a database query in canonical form into the folder `scratch`. Rows may
    /// come in any order, and the same rows give the same files. Blocking.
    pub fn from_query(
        rows: impl Iterator<Item = Vec<QueryRow>>,
        scratch: &Path,
        options: &LabelOptions,
        dataset: Option<BoundDataset>,
    ) -> Result<Self, Fault> {
        if let Some(name) = options
            .columns
            .keys()
            .find(|name| !SETTINGS.contains(&name.as_str()))
        {
            return Err(Fault::usage(format!(
                "a query names its columns itself, so {name:?} cannot be mapped"
            ))
            .with_next("rename columns in the query by AS"));
        }
        let mut collector = Collector::new(scratch, rules(options));
        collector.by_content = true;
        let info = table::read_query(rows, &mut collector)
            .and_then(|()| finish(collector, DATABASE, options, dataset));
        let (info, omitted) = info.map_err(|fault| fault.context("labels out of the database"))?;
        Ok(Self {
            omitted,
            ..Self::canonical(scratch, info)?
        })
    }

    /// The format that the labels were read as.
    pub fn format(&self) -> &'static str {
        self.format
    }

    /// Whether that was guessed.
    pub fn guessed(&self) -> bool {
        self.guessed
    }
}

impl Source for LabelsSource {
    fn next(&mut self) -> Result<Option<SourceEntry>, Fault> {
        Ok(self.entries.next())
    }

    fn info(&self) -> KindInfo {
        KindInfo::Labels(self.info.clone())
    }

    fn omitted(&self) -> Omitted {
        self.omitted.clone()
    }
}

fn convert(
    input: &Input,
    scratch: &Path,
    format: Format,
    options: &LabelOptions,
    dataset: Option<BoundDataset>,
) -> Result<(LabelsInfo, Omitted), Fault> {
    let mut collector = Collector::new(scratch, rules(options));
    match format {
        Format::Coco => coco::read(input, &mut collector)?,
        Format::Csv => table::read_csv(input, &options.columns, &mut collector)?,
        Format::Jsonl => table::read_jsonl(input, &options.columns, &mut collector)?,
        Format::LabelStudio => {
            let predictions = match setting(options, "predictions").as_deref() {
                None | Some("false") => false,
                Some("true") => true,
                Some(other) => {
                    return Err(Fault::usage(format!(
                        "predictions is true or false, not {other:?}"
                    )));
                }
            };
            label_studio::read(input, predictions, &mut collector)?;
        }
        Format::Voc => voc::read(input, &mut collector)?,
        Format::Yolo => yolo::read(input, &mut collector)?,
    }
    finish(collector, format.as_str(), options, dataset)
}

fn setting(options: &LabelOptions, name: &str) -> Option<String> {
    options
        .columns
        .get(name)
        .filter(|value| !value.is_empty())
        .cloned()
}

fn rules(options: &LabelOptions) -> PathRules {
    PathRules {
        strip: setting(options, "path_strip"),
        prefix: setting(options, "path_prefix"),
    }
}

/// Writes the files from what was collected.
fn finish(
    mut collector: Collector,
    format: &'static str,
    options: &LabelOptions,
    dataset: Option<BoundDataset>,
) -> Result<(LabelsInfo, Omitted), Fault> {
    let mut omitted = std::mem::take(&mut collector.omitted);
    let (counts, binding) = write::write(collector, dataset, options.allow_missing)?;
    let write::Counts {
        samples,
        annotations,
        classes,
    } = counts;
    let info = LabelsInfo {
        dataset: binding,
        samples,
        annotations,
        classes,
        format: format.into(),
    };
    note_empty(&info, &mut omitted);
    Ok((info, omitted))
}

/// A set without annotations is published, and reported: it may be a mistake, and becomes the
/// active version where it is delivered.
fn note_empty(info: &LabelsInfo, omitted: &mut Omitted) {
    if info.annotations == 0 {
        omitted.add(
            Category::NoAnnotations,
            format!("{} samples, 0 annotations", info.samples),
        );
    }
}

fn check_columns(format: Format, columns: &BTreeMap<String, String>) -> Result<(), Fault> {
    for name in columns.keys().map(String::as_str) {
        if SETTINGS.contains(&name) {
            continue;
        }
        let known = table::field_names();
        if !known.contains(&name) {
            let next = format!("use one of {}, {}", known.join(", "), SETTINGS.join(", "));
            return Err(Fault::usage(format!(
                "labels have no field {name:?} that a column could hold"
            ))
            .with_next(next));
        }
        if !matches!(format, Format::Csv | Format::Jsonl) {
            return Err(Fault::usage(format!(
                "{format} labels have no columns, so {name:?} cannot be taken from one"
            ))
            .with_next("leave the column mapping out, or name the format csv or jsonl"));
        }
    }
    Ok(())
}

fn entry(name: &str, file: PathBuf) -> Result<SourceEntry, Fault> {
    let meta = file
        .metadata()
        .at(format_args!("read {}", file.display()))?;
    let identity = Some(FileIdentity::new(Arc::new(file.clone()), &meta));
    Ok(SourceEntry {
        path: name.parse()?,
        mode: 0o644,
        body: SourceBody::File {
            size: meta.len(),
            content: Content::File(file),
        },
        identity,
    })
}

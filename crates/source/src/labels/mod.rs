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
//! | `cvat` | CVAT's XML 1.1, a file or the folder that holds it | pixels as they are; frames of tracks by their numbers |
//! | `datumaro` | Datumaro's JSON, a file or a folder with one file a subset | pixels as they are |
//! | `klarf` | KLARF 1.1, 1.2, 1.8, a file or a folder of them | boxes by a scale, else none |
//! | `labelme` | a LabelMe file or a folder of them | pixels as they are; masks become runs |
//! | `masks` | a folder of PNG masks with a class map | one row of runs for each class of a mask |
//! | `via` | the JSON of VGG Image Annotator 1 and 2 | pixels as they are |
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

mod bad_out;
mod classes;
mod coco;
mod collect;
mod cvat;
mod datumaro;
mod encoding;
pub mod export;
mod folder;
mod guess;
mod images_beside;
mod json;
mod klarf;
mod klarf_12;
mod klarf_18;
mod klarf_tokens;
mod label_files;
mod label_studio;
mod labelme;
mod masks;
mod masks_map;
mod path_rules;
mod png;
mod polygon;
mod recognise;
mod refuse;
mod rle;
mod settings;
mod shapes;
mod size;
mod sort;
mod split;
mod table;
mod table_boxes;
mod table_csv;
mod table_fields;
mod table_jsonl;
mod table_objects;
mod table_query;
mod table_sizes;
#[cfg(test)]
mod tests;
mod text;
mod via;
mod via_json;
mod voc;
mod voc_base;
mod write;
mod xml;
mod xml_stream;
pub(crate) mod yaml;
mod yolo;
mod yolo_lists;
mod yolo_names;
mod yolo_rows;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::own::Own;
use base::fault::{Fault, IoContext};
use base::names::RelPath;
use base::omitted::{Category, Omitted};
use content::label_rows::{ANNOTATIONS, CLASSES, ClassRow, QueryRow, SAMPLES};
use content::manifest::{Attributes, DatasetBinding, FileInfo, KindInfo, LabelsInfo};

pub use bad_out::check as check_bad_out;

use super::{Content, FileIdentity, Source, SourceBody, SourceEntry};
use bad_out::BadOut;
use collect::Collector;
use folder::Input;
use guess::Format;
use settings::Settings;

/// How labels are read.
#[derive(Debug, Clone, Default)]
pub struct LabelOptions {
    /// One of the words of the module's page; guessed when absent.
    pub format: Option<String>,
    /// Samples that the dataset does not hold are allowed (their hash stays empty).
    pub allow_missing: bool,
    /// Which column holds a field, and the settings that the module's page lists.
    pub columns: BTreeMap<String, String>,
    /// Pascal VOC: `0`, `1`, `0-inclusive` or `1-exclusive`; inferred when absent.
    pub voc_base: Option<String>,
    /// `refuse`, `skip` or `clip`: what is done with bad records; they are refused when absent.
    pub on_bad: Option<String>,
    /// A new file for the bad records, as JSON Lines.
    pub bad_out: Option<PathBuf>,
    /// The encoding of the text; inferred when absent.
    pub encoding: Option<String>,
    /// KLARF: how many micrometres a pixel is wide.
    pub klarf_scale: Option<String>,
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

/// Gives the classes of a label set and version in the database.
pub type ClassesOf<'a> = dyn FnMut(&str, &str) -> Result<Vec<ClassRow>, Fault> + 'a;

/// The format of what comes out of a database.
const DATABASE: &str = "database";

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
        settings::check_columns(Some(format), options)?;
        let settings = Settings::parse(options, Some(format))?;
        let how = if guessed { "guessed" } else { "as asked" };
        let context = |fault: Fault| {
            let fault = fault.context(format_args!("labels {} ({format}, {how})", path.display()));
            if guessed && fault.code == base::fault::Code::Integrity {
                let next = format!("{}; if it is not {format}, name the format", fault.next);
                return fault.with_next(next);
            }
            fault
        };
        let (info, omitted) = convert(&input, scratch, format, &settings, options, dataset)
            .map_err(context)
            .map_err(|fault| guess::name_other(fault, &input, format, guessed))?;
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
    /// come in any order, and the same rows give the same files. If they state their version,
    /// `classes_of` gives the classes of that version: its ids are kept, and classes that no row
    /// has. Blocking.
    pub fn from_query(
        rows: impl Iterator<Item = Vec<QueryRow>>,
        scratch: &Path,
        options: &LabelOptions,
        dataset: Option<BoundDataset>,
        own: &Own,
        classes_of: &mut ClassesOf<'_>,
    ) -> Result<Self, Fault> {
        settings::check_columns(None, options)?;
        let mut collector = Settings::parse(options, None)?.collector(scratch);
        collector.refusals.out = bad_out(options, scratch, own)?;
        collector.by_content = true;
        let info = table_query::read(rows, classes_of, &mut collector)
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

    fn total(&self) -> Option<u64> {
        Some(self.entries.as_slice().iter().map(SourceEntry::bytes).sum())
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
    settings: &Settings,
    options: &LabelOptions,
    dataset: Option<BoundDataset>,
) -> Result<(LabelsInfo, Omitted), Fault> {
    let mut collector = settings.collector(scratch);
    collector.refusals.out = bad_out(options, scratch, input.own())?;
    let columns = &options.columns;
    match format {
        Format::Coco => coco::read(input, settings.table.normalised, &mut collector)?,
        Format::Csv => table::read_csv(input, columns, settings.table, &mut collector)?,
        Format::Cvat => cvat::read(input, &mut collector)?,
        Format::Datumaro => datumaro::read(input, &mut collector)?,
        Format::Klarf => klarf::read(input, settings.klarf, &mut collector)?,
        Format::LabelMe => labelme::read(input, &mut collector)?,
        Format::Masks => masks::read(input, &mut collector)?,
        Format::Via => via_json::read(input, &mut collector)?,
        Format::Jsonl => table_jsonl::read(input, columns, settings.table, &mut collector)?,
        Format::LabelStudio => label_studio::read(input, settings.predictions, &mut collector)?,
        Format::Voc => voc::read(input, settings.voc_base, &mut collector)?,
        Format::Yolo => yolo::read(input, settings.yolo_task, &mut collector)?,
    }
    finish(collector, format.as_str(), options, dataset)
}

/// The file of bad records, where one is asked for.
fn bad_out(options: &LabelOptions, scratch: &Path, own: &Own) -> Result<Option<BadOut>, Fault> {
    let target = options.bad_out.as_deref();
    target
        .map(|target| BadOut::create(target, scratch, own))
        .transpose()
}

/// Writes the files from what was collected.
fn finish(
    collector: Collector,
    format: &'static str,
    options: &LabelOptions,
    dataset: Option<BoundDataset>,
) -> Result<(LabelsInfo, Omitted), Fault> {
    let (counts, binding, mut omitted) = write::write(collector, dataset, options.allow_missing)?;
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
        attributes: Attributes::default(),
    })
}

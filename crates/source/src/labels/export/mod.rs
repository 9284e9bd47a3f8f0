//! Writes a published label set in a format of annotation tools: the canonical files
//! (`content::label_rows`) become a new folder.
//!
//! Reading the folder with this crate gives the same rows, as far as the format can hold them. What it
//! cannot hold is counted, with examples, and reported as notes ([`Exported::notes`]). Rows stream
//! through: memory does not grow with the set. A crash or a fault leaves an incomplete folder; after
//! a fault the caller removes it.
//!
//! Parquet is not written: its crate alone builds longer than this one.

mod coco;
mod csv;
mod voc;
mod yolo;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::value::RawValue;

use base::durable;
use base::fault::{Fault, IoContext};
use base::limits::{LABEL_LINE_BYTES_MAX, OFFENDERS_LISTED_MAX};
use base::names::RelPath;
use content::label_rows::{ANNOTATIONS, AnnotationRow, CLASSES, ClassRow, SAMPLES, SampleRow};

/// A format that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportFormat {
    /// One COCO file, `annotations.json`.
    Coco,
    /// One CSV file, `labels.csv`.
    Csv,
    /// A folder of Pascal VOC XML.
    Voc,
    /// A folder of YOLO text files.
    Yolo,
}

impl ExportFormat {
    /// Their words.
    pub const WORDS: [&str; 4] = ["coco", "yolo", "voc", "csv"];
}

impl FromStr for ExportFormat {
    type Err = Fault;

    fn from_str(word: &str) -> Result<Self, Fault> {
        Ok(match word {
            "coco" => Self::Coco,
            "csv" => Self::Csv,
            "voc" => Self::Voc,
            "yolo" => Self::Yolo,
            other => {
                return Err(
                    Fault::usage(format!("labels cannot be exported as {other:?}"))
                        .with_next(format!("use one of {}", Self::WORDS.join(", "))),
                );
            }
        })
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Exported {
    /// Classes.
    pub classes: u64,
    /// Samples.
    pub samples: u64,
    /// Annotations.
    pub annotations: u64,
    /// What the format cannot hold, a line for each kind.
    #[serde(skip)]
    pub notes: Vec<String>,
}

/// Writes the label set whose canonical files are in `rows` to the new folder `out`. `check` fails
/// when the work is to stop.
pub fn export(
    rows: &Path,
    format: ExportFormat,
    out: &Path,
    check: &dyn Fn() -> Result<(), Fault>,
) -> Result<Exported, Fault> {
    match std::fs::create_dir(out) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(Fault::conflict(format!("{} exists already", out.display()))
                .with_next("name a folder that does not exist"));
        }
        made => made.at(format_args!("create the directory {}", out.display()))?,
    }
    let set = Set {
        rows,
        out,
        check,
        classes: read_classes(rows)?,
    };
    let mut left_out = LeftOut::default();
    let written = match format {
        ExportFormat::Coco => coco::write(&set, &mut left_out),
        ExportFormat::Csv => csv::write(&set, &mut left_out),
        ExportFormat::Voc => voc::write(&set, &mut left_out),
        ExportFormat::Yolo => yolo::write(&set, &mut left_out),
    };
    let (samples, annotations) = written.inspect_err(|_| {
        // Best effort: the folder is new, so nothing of anybody else is in it.
        let _ = durable::remove_all(out);
    })?;
    let folder = File::open(out).at(out.display())?;
    rustix::fs::syncfs(&folder).map_err(|e| Fault::io(out.display(), &e.into()))?;
    Ok(Exported {
        classes: set.classes.len() as u64,
        samples,
        annotations,
        notes: left_out.notes(),
    })
}

/// What is written, and where.
struct Set<'a> {
    rows: &'a Path,
    out: &'a Path,
    check: &'a dyn Fn() -> Result<(), Fault>,
    classes: Vec<ClassRow>,
}

/// A row, with its number.
enum Item<'a> {
    Sample(u64, &'a SampleRow),
    /// An annotation of the last sample.
    Annotation(u64, &'a AnnotationRow),
}

impl Set<'_> {
    /// The name of a class.
    fn class(&self, id: i64) -> Result<&str, Fault> {
        self.classes
            .binary_search_by_key(&id, |class| class.id)
            .map(|at| self.classes[at].name.as_str())
            .map_err(|_| damaged(&self.rows.join(CLASSES), "a class is missing"))
    }

    /// Passes each sample to `see`.
    fn samples(
        &self,
        mut see: impl FnMut(u64, &SampleRow) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let mut samples = Lines::<SampleRow>::open(self.rows, SAMPLES)?;
        while let Some((number, sample)) = samples.next()? {
            (self.check)()?;
            see(number, &sample)?;
        }
        Ok(())
    }

    /// Passes each sample to `see`, and behind it its annotations. Returns how many there were.
    fn each(
        &self,
        mut see: impl FnMut(Item<'_>) -> Result<(), Fault>,
    ) -> Result<(u64, u64), Fault> {
        let mut annotations = Lines::<AnnotationRow>::open(self.rows, ANNOTATIONS)?;
        let mut next = annotations.next()?;
        let (mut sample_count, mut annotation_count) = (0, 0);
        self.samples(|number, sample| {
            sample_count += 1;
            see(Item::Sample(number, sample))?;
            while let Some((number, row)) = next.take_if(|(_, row)| row.sample == sample.path) {
                annotation_count += 1;
                see(Item::Annotation(number, &row))?;
                next = annotations.next()?;
            }
            Ok(())
        })?;
        match next {
            None => Ok((sample_count, annotation_count)),
            Some((number, _)) => Err(damaged(
                &annotations.path,
                &format!("line {} belongs to no sample", number + 1),
            )),
        }
    }

    /// A new file in the folder.
    fn create(&self, path: &RelPath) -> Result<Output, Fault> {
        let path = path.in_dir(self.out);
        if let Some(parent) = path.parent() {
            durable::create_dir_all(parent)?;
        }
        Output::create(path)
    }

    /// A new file at the top of the folder.
    fn create_top(&self, name: &str) -> Result<Output, Fault> {
        Output::create(self.out.join(name))
    }
}

fn damaged(file: &Path, why: &str) -> Fault {
    Fault::integrity(format!("{}: {why}", file.display()))
        .with_next("run 'packhorse verify' on the labels")
}

fn read_classes(rows: &Path) -> Result<Vec<ClassRow>, Fault> {
    let mut lines = Lines::<ClassRow>::open(rows, CLASSES)?;
    let mut classes = Vec::new();
    while let Some((_, class)) = lines.next()? {
        classes.push(class);
    }
    Ok(classes)
}

/// The rows of one canonical file.
struct Lines<T> {
    reader: BufReader<File>,
    path: PathBuf,
    next: u64,
    bytes: Vec<u8>,
    rows: PhantomData<T>,
}

impl<T: DeserializeOwned> Lines<T> {
    fn open(rows: &Path, name: &str) -> Result<Self, Fault> {
        let path = rows.join(name);
        let file = durable::open_regular(&path).at(format_args!("read {}", path.display()))?;
        Ok(Self {
            reader: BufReader::with_capacity(256 << 10, file),
            path,
            next: 0,
            bytes: Vec::new(),
            rows: PhantomData,
        })
    }

    /// The next row, with its number from 0.
    fn next(&mut self) -> Result<Option<(u64, T)>, Fault> {
        self.bytes.clear();
        let limit = LABEL_LINE_BYTES_MAX as u64 + 1;
        let read = (&mut self.reader)
            .take(limit)
            .read_until(b'\n', &mut self.bytes)
            .at(format_args!("read {}", self.path.display()))?;
        if read == 0 {
            return Ok(None);
        }
        let number = self.next;
        self.next += 1;
        let row = serde_json::from_slice(&self.bytes)
            .map_err(|error| damaged(&self.path, &format!("line {}: {error}", number + 1)))?;
        Ok(Some((number, row)))
    }
}

/// A new file that is written.
struct Output {
    file: BufWriter<File>,
    path: PathBuf,
}

impl Output {
    fn create(path: PathBuf) -> Result<Self, Fault> {
        let file = File::options().write(true).create_new(true).open(&path);
        let file = match file {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(Fault::conflict(format!(
                    "two samples would have the same file, {}",
                    path.display()
                ))
                .with_next("export in the format coco or csv"));
            }
            opened => opened.at(format_args!("create {}", path.display()))?,
        };
        Ok(Self {
            file: BufWriter::with_capacity(64 << 10, file),
            path,
        })
    }

    fn put(&mut self, text: &str) -> Result<(), Fault> {
        self.file
            .write_all(text.as_bytes())
            .at(format_args!("write {}", self.path.display()))
    }

    fn end(self) -> Result<(), Fault> {
        let what = format!("write {}", self.path.display());
        let file = self
            .file
            .into_inner()
            .map_err(|e| Fault::io(&what, e.error()))?;
        durable::close(file).at(what)
    }
}

/// What a format cannot hold.
#[derive(Default)]
struct LeftOut {
    kinds: BTreeMap<String, (u64, Vec<String>)>,
}

impl LeftOut {
    /// Counts one, with where it is.
    fn add(&mut self, what: impl Into<String>, place: &str) {
        let (count, examples) = self.kinds.entry(what.into()).or_default();
        *count += 1;
        if examples.len() < OFFENDERS_LISTED_MAX {
            examples.push(place.to_owned());
        }
    }

    fn notes(self) -> Vec<String> {
        self.kinds
            .into_iter()
            .map(|(what, (count, examples))| {
                let more = count - examples.len() as u64;
                let more = if more > 0 {
                    format!(" and {more} more")
                } else {
                    String::new()
                };
                format!("{what}: {count}: {}{more}", examples.join(", "))
            })
            .collect()
    }
}

/// The members of a JSON object as they are written, each with a comma before it, without those of
/// these names. `None`: it is no object.
fn members(json: &RawValue, without: &[&str]) -> Option<Members> {
    let keys: BTreeMap<String, IgnoredAny> = serde_json::from_str(json.get()).ok()?;
    let dropped: Vec<String> = keys
        .keys()
        .filter(|key| without.contains(&key.as_str()))
        .cloned()
        .collect();
    if dropped.is_empty() {
        let inner = json.get().trim().strip_prefix('{')?.strip_suffix('}')?;
        let comma = if inner.is_empty() { "" } else { "," };
        return Some(Members {
            text: format!("{comma}{inner}"),
            keys: keys.into_keys().collect(),
            dropped,
        });
    }
    let kept: BTreeMap<String, Box<RawValue>> = serde_json::from_str(json.get()).ok()?;
    let mut text = String::new();
    for (key, value) in kept.iter().filter(|(key, _)| !dropped.contains(key)) {
        text.push(',');
        text.push_str(&super::text::json_string(key));
        text.push(':');
        text.push_str(value.get());
    }
    Some(Members {
        text,
        keys: keys
            .into_keys()
            .filter(|key| !dropped.contains(key))
            .collect(),
        dropped,
    })
}

struct Members {
    text: String,
    keys: Vec<String>,
    dropped: Vec<String>,
}

/// The rings of a polygon, or the parts of a line.
fn rings(geom: Option<&RawValue>) -> Option<Vec<Vec<f64>>> {
    serde_json::from_str(geom?.get()).ok()
}

/// A turned box: its centre, its sides and its angle in radians, clockwise as y points down.
struct Turned {
    cx: f64,
    cy: f64,
    w: f64,
    h: f64,
    angle: f64,
}

/// The turned box of a row, in either form that rows have.
fn turned(geom: Option<&RawValue>) -> Option<Turned> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Centre {
            cx: f64,
            cy: f64,
            w: f64,
            h: f64,
            angle: f64,
        },
        /// Degrees around the top left corner, as Label Studio writes it.
        Corner {
            x: f64,
            y: f64,
            w: f64,
            h: f64,
            rotation: f64,
        },
    }
    Some(match serde_json::from_str(geom?.get()).ok()? {
        Form::Centre {
            cx,
            cy,
            w,
            h,
            angle,
        } => Turned {
            cx,
            cy,
            w,
            h,
            angle,
        },
        Form::Corner {
            x,
            y,
            w,
            h,
            rotation,
        } => {
            let angle = rotation.to_radians();
            let (sin, cos) = angle.sin_cos();
            Turned {
                cx: x + (w * cos - h * sin) / 2.0,
                cy: y + (w * sin + h * cos) / 2.0,
                w,
                h,
                angle,
            }
        }
    })
}

/// The box of a row: left, top, width, height. A point and a level line have none.
fn boxed(row: &AnnotationRow) -> Option<[f64; 4]> {
    let sides = [row.x?, row.y?, row.w?, row.h?];
    (sides[2] > 0.0 && sides[3] > 0.0).then_some(sides)
}

#[cfg(test)]
mod tests;

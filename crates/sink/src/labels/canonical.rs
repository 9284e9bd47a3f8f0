//! The canonical label files: reads them line by line and checks every row, and writes them from
//! rows.
//!
//! Reading rejects everything that an export could not reproduce byte by byte: each row is written
//! again and compared with its line. Reading also performs the joins that a database would
//! otherwise check after the load: annotations and samples are both sorted by path, so one pass
//! over the two files finds the sample number of each annotation, and every annotation without a
//! sample, in constant memory. Only the class ids are kept in memory. Both engines, `verify` and
//! `export` call this module. It keeps nothing on disk.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::value::RawValue;

use base::fault::{Fault, IoContext};
use base::limits::{LABEL_CLASSES_MAX, LABEL_LINE_BYTES_MAX};
use base::names::RelPath;
use content::chunk::Hash;
use content::label_rows::{ANNOTATIONS, CLASSES, ClassRow, SAMPLES};

const KINDS: [&str; 8] = [
    "bbox",
    "polygon",
    "rle",
    "keypoints",
    "polyline",
    "point",
    "class",
    "other",
];
const READ_BUFFER_BYTES: usize = 256 << 10;

/// The three files, in the order in which they are loaded and exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Table {
    /// `classes.jsonl`
    Classes,
    /// `samples.jsonl`
    Samples,
    /// `annotations.jsonl`
    Annotations,
}

impl Table {
    pub(super) const ALL: [Table; 3] = [Table::Classes, Table::Samples, Table::Annotations];

    pub(super) fn file(self) -> &'static str {
        match self {
            Table::Classes => CLASSES,
            Table::Samples => SAMPLES,
            Table::Annotations => ANNOTATIONS,
        }
    }
}

/// A class, borrowed from its line or row. JSON values are text in the form of the source.
#[derive(Debug, Clone, Copy)]
pub(super) struct Class<'a> {
    pub(super) id: i64,
    pub(super) name: &'a str,
    pub(super) attrs: Option<&'a str>,
}

impl Class<'_> {
    /// The class with its own text.
    pub(super) fn owned(&self) -> ClassRow {
        let attrs = self.attrs.map(str::to_owned);
        ClassRow {
            id: self.id,
            name: self.name.to_owned(),
            attrs: attrs.and_then(|json| RawValue::from_string(json).ok()),
        }
    }
}

/// A sample, borrowed from its line or row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample<'a> {
    pub(super) path: &'a str,
    pub(super) hash: Option<&'a str>,
    pub(super) width: Option<i64>,
    pub(super) height: Option<i64>,
    pub(super) split: Option<&'a str>,
    pub(super) meta: Option<&'a str>,
}

/// An annotation, borrowed from its line or row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Annotation<'a> {
    pub(super) sample: &'a str,
    pub(super) class: Option<i64>,
    pub(super) kind: &'a str,
    /// x, y, w, h.
    pub(super) bbox: [Option<f64>; 4],
    pub(super) geom: Option<&'a str>,
    pub(super) attrs: Option<&'a str>,
    pub(super) raw: &'a str,
}

/// Cannot fail: the output is memory, and strings and numbers always have a JSON form.
fn put<T: serde::Serialize + ?Sized>(out: &mut Vec<u8>, key: &str, value: &T) {
    out.extend_from_slice(key.as_bytes());
    let _ = serde_json::to_writer(out, value);
}

fn put_json(out: &mut Vec<u8>, key: &str, value: Option<&str>) {
    out.extend_from_slice(key.as_bytes());
    out.extend_from_slice(value.unwrap_or("null").as_bytes());
}

impl Class<'_> {
    /// Appends the canonical line with its line end.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        put(out, "{\"id\":", &self.id);
        put(out, ",\"name\":", self.name);
        put_json(out, ",\"attrs\":", self.attrs);
        out.extend_from_slice(b"}\n");
    }
}

impl Sample<'_> {
    /// Appends the canonical line with its line end.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        put(out, "{\"path\":", self.path);
        put(out, ",\"hash\":", &self.hash);
        put(out, ",\"width\":", &self.width);
        put(out, ",\"height\":", &self.height);
        put(out, ",\"split\":", &self.split);
        put_json(out, ",\"meta\":", self.meta);
        out.extend_from_slice(b"}\n");
    }
}

impl Annotation<'_> {
    /// Appends the canonical line with its line end.
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        put(out, "{\"sample\":", self.sample);
        put(out, ",\"class\":", &self.class);
        put(out, ",\"kind\":", self.kind);
        for (key, value) in [",\"x\":", ",\"y\":", ",\"w\":", ",\"h\":"]
            .into_iter()
            .zip(&self.bbox)
        {
            put(out, key, value);
        }
        put_json(out, ",\"geom\":", self.geom);
        put_json(out, ",\"attrs\":", self.attrs);
        put_json(out, ",\"raw\":", Some(self.raw));
        out.extend_from_slice(b"}\n");
    }
}

// The lines as serde reads them. Strings without escapes are borrowed.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClassLine<'a> {
    id: i64,
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow)]
    attrs: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SampleLine<'a> {
    #[serde(borrow)]
    path: Cow<'a, str>,
    #[serde(borrow)]
    hash: Option<Cow<'a, str>>,
    width: Option<i64>,
    height: Option<i64>,
    #[serde(borrow)]
    split: Option<Cow<'a, str>>,
    #[serde(borrow)]
    meta: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AnnotationLine<'a> {
    #[serde(borrow)]
    sample: Cow<'a, str>,
    class: Option<i64>,
    #[serde(borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    x: Option<&'a RawValue>,
    #[serde(borrow)]
    y: Option<&'a RawValue>,
    #[serde(borrow)]
    w: Option<&'a RawValue>,
    #[serde(borrow)]
    h: Option<&'a RawValue>,
    #[serde(borrow)]
    geom: Option<&'a RawValue>,
    #[serde(borrow)]
    attrs: Option<&'a RawValue>,
    #[serde(borrow)]
    raw: &'a RawValue,
}

impl AnnotationLine<'_> {
    /// The parser of serde_json may be wrong in the last bit, unless a feature is enabled for the
    /// whole program. The parser of the standard library is exact.
    fn bbox(&self) -> Option<[Option<f64>; 4]> {
        let mut bbox = [None; 4];
        for (number, text) in bbox.iter_mut().zip([self.x, self.y, self.w, self.h]) {
            *number = match text {
                Some(text) => Some(text.get().parse().ok()?),
                None => None,
            };
        }
        Some(bbox)
    }
}

/// Reads one file line by line, with one line in memory.
pub(super) struct Lines {
    table: Table,
    reader: BufReader<File>,
    path: PathBuf,
    line: Vec<u8>,
    /// The number of lines read.
    count: u64,
}

impl Lines {
    pub(super) fn open(dir: &Path, table: Table) -> Result<Self, Fault> {
        let path = dir.join(table.file());
        let file = File::open(&path).at(format_args!("open {}", path.display()))?;
        Ok(Self {
            table,
            reader: BufReader::with_capacity(READ_BUFFER_BYTES, file),
            path,
            line: Vec::new(),
            count: 0,
        })
    }

    /// The next line with its line end; `None` after the last.
    pub(super) fn next(&mut self) -> Result<Option<&str>, Fault> {
        self.line.clear();
        let limit = LABEL_LINE_BYTES_MAX as u64 + 1;
        let read = (&mut self.reader)
            .take(limit)
            .read_until(b'\n', &mut self.line)
            .at(format_args!("read {}", self.path.display()))?;
        if read == 0 {
            return Ok(None);
        }
        self.count += 1;
        if self.line.last() != Some(&b'\n') {
            let why = if read as u64 == limit {
                "is longer than 12 MiB"
            } else {
                "is truncated"
            };
            return Err(self.refuse(why));
        }
        match std::str::from_utf8(&self.line) {
            Ok(line) => Ok(Some(line)),
            Err(_) => Err(refuse(self.table, self.count, "is not UTF-8")),
        }
    }

    fn refuse(&self, why: impl std::fmt::Display) -> Fault {
        refuse(self.table, self.count, why)
    }
}

fn refuse(table: Table, line: u64, why: impl std::fmt::Display) -> Fault {
    Fault::integrity(format!("{} line {line} {why}", table.file()))
        .with_next("publish the labels again from their source")
}

/// Checks that writing the row reproduces the line.
fn check_same(table: Table, line_no: u64, line: &str, written: &[u8]) -> Result<(), Fault> {
    if line.as_bytes() == written {
        return Ok(());
    }
    Err(refuse(
        table,
        line_no,
        "is not in canonical form (order of keys, white space, or number format)",
    ))
}

/// Reads the classes. Returns their ids.
pub(super) fn read_classes(
    dir: &Path,
    each: &mut dyn FnMut(&Class<'_>) -> Result<(), Fault>,
) -> Result<HashSet<i64>, Fault> {
    let table = Table::Classes;
    let mut lines = Lines::open(dir, table)?;
    let (mut ids, mut names, mut last, mut written, mut no) =
        (HashSet::new(), HashSet::new(), None, Vec::new(), 0);
    while let Some(line) = lines.next()? {
        no += 1;
        let row: ClassLine<'_> = serde_json::from_str(line)
            .map_err(|e| refuse(table, no, format_args!("is not a class: {e}")))?;
        let class = Class {
            id: row.id,
            name: &row.name,
            attrs: row.attrs.map(RawValue::get),
        };
        written.clear();
        class.write(&mut written);
        check_same(table, no, line, &written)?;
        if last.is_some_and(|last| last >= class.id) {
            return Err(refuse(
                table,
                no,
                format_args!("has class {} out of order or repeated", class.id),
            ));
        }
        last = Some(class.id);
        if class.name.contains('\0') {
            return Err(refuse(table, no, "has a NUL in its name"));
        }
        if !names.insert(Hash::of(class.name.as_bytes())) {
            return Err(refuse(
                table,
                no,
                format_args!(
                    "has the name {:?}, which another class also has",
                    class.name
                ),
            ));
        }
        if ids.len() == LABEL_CLASSES_MAX {
            return Err(refuse(
                table,
                no,
                format_args!("is class number {no}; at most {LABEL_CLASSES_MAX} are allowed"),
            ));
        }
        ids.insert(class.id);
        each(&class)?;
    }
    Ok(ids)
}

/// Reads the samples, numbered from 0. Returns their number.
pub(super) fn read_samples(
    dir: &Path,
    each: &mut dyn FnMut(u64, &Sample<'_>) -> Result<(), Fault>,
) -> Result<u64, Fault> {
    let table = Table::Samples;
    let mut lines = Lines::open(dir, table)?;
    let (mut last, mut written, mut no): (Option<RelPath>, _, _) = (None, Vec::new(), 0);
    while let Some(line) = lines.next()? {
        no += 1;
        let row: SampleLine<'_> = serde_json::from_str(line)
            .map_err(|e| refuse(table, no, format_args!("is not a sample: {e}")))?;
        let sample = Sample {
            path: &row.path,
            hash: row.hash.as_deref(),
            width: row.width,
            height: row.height,
            split: row.split.as_deref(),
            meta: row.meta.map(RawValue::get),
        };
        written.clear();
        sample.write(&mut written);
        check_same(table, no, line, &written)?;
        let path: RelPath = sample
            .path
            .parse()
            .map_err(|e| refuse(table, no, format_args!("has an invalid path: {e}")))?;
        if last.is_some_and(|last| last >= path) {
            return Err(refuse(
                table,
                no,
                format_args!("has {:?} out of order or repeated", sample.path),
            ));
        }
        last = Some(path);
        if let Some(hash) = sample.hash
            && (hash.parse::<Hash>().is_err() || hash.bytes().any(|b| b.is_ascii_uppercase()))
        {
            return Err(refuse(
                table,
                no,
                "has a hash that is not 64 lower-case hex digits",
            ));
        }
        if sample.split.is_some_and(|s| s.contains('\0')) {
            return Err(refuse(table, no, "has a NUL in its split"));
        }
        each(no - 1, &sample)?;
    }
    Ok(no)
}

/// Reads the sample paths in parallel with the annotations.
struct SampleWalk {
    lines: Lines,
    path: String,
    /// The number of samples read; the number of the current one is one less.
    count: u64,
}

impl SampleWalk {
    fn next(&mut self) -> Result<bool, Fault> {
        let Some(line) = self.lines.next()? else {
            return Ok(false);
        };
        let row: SampleLine<'_> = serde_json::from_str(line).map_err(|e| {
            refuse(
                Table::Samples,
                self.count + 1,
                format_args!("is not a sample: {e}"),
            )
        })?;
        self.path.clear();
        self.path.push_str(&row.path);
        self.count += 1;
        Ok(true)
    }
}

/// Receives the number of an annotation, the number of its sample, and the row.
pub(super) type EachAnnotation<'a> = dyn FnMut(u64, u64, &Annotation<'_>) -> Result<(), Fault> + 'a;

/// Reads the annotations. Returns their number and the BLAKE3 of the file. `samples.jsonl` was
/// checked before, so it is assumed to be valid.
pub(super) fn read_annotations(
    dir: &Path,
    classes: &HashSet<i64>,
    each: &mut EachAnnotation<'_>,
) -> Result<(u64, Hash), Fault> {
    let table = Table::Annotations;
    let mut lines = Lines::open(dir, table)?;
    let mut samples = SampleWalk {
        lines: Lines::open(dir, Table::Samples)?,
        path: String::new(),
        count: 0,
    };
    let mut hasher = blake3::Hasher::new();
    let (mut written, mut no) = (Vec::new(), 0);
    while let Some(line) = lines.next()? {
        no += 1;
        hasher.update(line.as_bytes());
        let row: AnnotationLine<'_> = serde_json::from_str(line)
            .map_err(|e| refuse(table, no, format_args!("is not an annotation: {e}")))?;
        let annotation = Annotation {
            sample: &row.sample,
            class: row.class,
            kind: &row.kind,
            bbox: row.bbox().ok_or_else(|| {
                refuse(
                    table,
                    no,
                    "is not an annotation: x, y, w and h must be numbers or null",
                )
            })?,
            geom: row.geom.map(RawValue::get),
            attrs: row.attrs.map(RawValue::get),
            raw: row.raw.get(),
        };
        written.clear();
        annotation.write(&mut written);
        check_same(table, no, line, &written)?;
        if !KINDS.contains(&annotation.kind) {
            return Err(refuse(
                table,
                no,
                format_args!("has the unknown kind {:?}", annotation.kind),
            ));
        }
        if let Some(class) = annotation.class
            && !classes.contains(&class)
        {
            return Err(refuse(
                table,
                no,
                format_args!("has class {class}, which is not in {CLASSES}"),
            ));
        }
        while samples.count == 0 || samples.path != annotation.sample {
            let ahead =
                samples.count > 0 && samples.path.split('/').gt(annotation.sample.split('/'));
            if ahead || !samples.next()? {
                let why = format!(
                    "has the sample {:?}, which is not in {SAMPLES} or is out of order",
                    annotation.sample
                );
                return Err(refuse(table, no, why));
            }
        }
        each(no - 1, samples.count - 1, &annotation)?;
    }
    Ok((no, Hash(*hasher.finalize().as_bytes())))
}

//! Tables: CSV, JSON Lines and the rows of a database query, one annotation a row, fields taken by
//! name.
//!
//! A row with a sample and nothing else names a sample without annotations. Edges (`x2`, `y2`) are
//! exclusive and count from 0 like `x` and `y`: the width is `x2 - x`. Columns that stand for no
//! field go into `attrs` unless a column is mapped to that.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};

use csv::{ByteRecord, ReaderBuilder};

use base::fault::{Fault, IoContext};
use base::limits::{LABEL_LINE_BYTES_MAX, LABEL_RECORD_BYTES_MAX};
use base::names::RelPath;
use base::omitted::{Category, Omitted};
use content::chunk::Hash;
use content::label_rows::{QUERY_COLUMNS, QueryRow};

use super::collect::{Annotation, ClassRef, Collector, Extent, Sample};
use super::folder::Input;
use super::json::{self, Fields, JsonReader};
use super::refuse::{Refusals, Why};
use super::text::{json_string, not_utf8, text};

/// The fields, each with the names that are tried in this order when no column is mapped to it.
const FIELDS: [(&str, &[&str]); 16] = [
    (
        "sample_path",
        &[
            "sample_path",
            "sample",
            "path",
            "file_name",
            "filename",
            "file",
            "image_path",
            "image",
            "img_path",
            "image_name",
        ],
    ),
    (
        "class",
        &[
            "class",
            "class_name",
            "label",
            "category",
            "defect_code",
            "defect",
        ],
    ),
    ("class_id", &["class_id", "category_id", "label_id"]),
    ("id", &["id", "annotation_id", "ann_id"]),
    ("x", &["x", "xmin", "x_min", "x1", "left"]),
    ("y", &["y", "ymin", "y_min", "y1", "top"]),
    ("w", &["w", "box_width", "bbox_width", "bbox_w"]),
    ("h", &["h", "box_height", "bbox_height", "bbox_h"]),
    ("x2", &["x2", "xmax", "x_max", "right"]),
    ("y2", &["y2", "ymax", "y_max", "bottom"]),
    ("kind", &["kind", "shape", "shape_type"]),
    ("geom", &["geom", "geometry", "points"]),
    ("split", &["split", "subset", "fold"]),
    ("width", &["width", "image_width", "img_width"]),
    ("height", &["height", "image_height", "img_height"]),
    ("attrs", &["attrs", "attributes"]),
];
const SAMPLE_PATH: usize = 0;
const CLASS: usize = 1;
const CLASS_ID: usize = 2;
const ID: usize = 3;
const X: usize = 4;
const Y: usize = 5;
const W: usize = 6;
const H: usize = 7;
const X2: usize = 8;
const Y2: usize = 9;
const KIND: usize = 10;
const GEOM: usize = 11;
const SPLIT: usize = 12;
const WIDTH: usize = 13;
const HEIGHT: usize = 14;
const ATTRS: usize = 15;

/// The kinds of the canonical form.
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

/// The names of the fields.
pub(super) fn field_names() -> Vec<&'static str> {
    FIELDS.iter().map(|(name, _)| *name).collect()
}

/// A field's value in one row, as JSON (a CSV's cells are JSON strings).
type Cells = [Option<String>; FIELDS.len()];

/// Reads a CSV file.
pub(super) fn read_csv(
    input: &Input,
    columns: &BTreeMap<String, String>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let at = || format!("read {}", input.shown().display());
    let file = input.file()?;
    let mut buffered = BufReader::with_capacity(256 << 10, file);
    let head = buffered.fill_buf().at(at())?;
    let head = &head[..head.len().min(64 << 10)];
    if head.contains(&0) {
        return Err(
            Fault::integrity("the file's beginning holds NULs: it is UTF-16 or no text")
                .with_next(Why::Utf8.advice()),
        );
    }
    let delimiter = delimiter(head);
    let crlf = head
        .split(|b| *b == b'\n')
        .next()
        .is_some_and(|line| line.ends_with(b"\r"));
    let bom = usize::from(head.starts_with(&[0xef, 0xbb, 0xbf])) * 3;
    buffered.consume(bom);
    let allowance = std::rc::Rc::new(std::cell::Cell::new(0));
    let capped = Capped {
        inner: buffered,
        left: allowance.clone(),
    };
    let mut reader = ReaderBuilder::new()
        .delimiter(delimiter)
        .has_headers(false)
        .flexible(true)
        .buffer_capacity(READ_BYTES)
        .from_reader(capped);
    let mut record = ByteRecord::new();
    let mut read = |record: &mut ByteRecord| {
        allowance.set(LABEL_RECORD_BYTES_MAX + READ_BYTES);
        let line = reader.position().line();
        let more = reader
            .read_byte_record(record)
            .map_err(|error| csv_fault(error, line))?;
        // The position of a record lies before empty lines that were skipped, so its line is told
        // from where it ends: behind its newline, or between CR and LF. The last record may have
        // none of these.
        let inside = record.as_slice().iter().filter(|b| **b == b'\n').count() as u64;
        let from_end = reader
            .position()
            .line()
            .saturating_sub(inside + u64::from(!crlf));
        Ok::<_, Fault>((
            more,
            from_end.max(record.position().map_or(line, csv::Position::line)),
        ))
    };
    if !read(&mut record)?.0 {
        return Err(Fault::integrity("it is empty; a header is needed")
            .with_next("put the names of the columns into the first row"));
    }
    let header = header(&record)?;
    let mapping = map_columns(&header, columns)?;
    let field_of: Vec<Option<usize>> = (0..header.len())
        .map(|at| mapping.iter().position(|column| *column == Some(at)))
        .collect();
    let keys: Vec<String> = header.iter().map(|name| json_string(name) + ":").collect();
    let mut state = Rows::default();
    loop {
        let (more, line) = read(&mut record)?;
        if !more {
            return Ok(());
        }
        let place = format!("line {line}");
        if record.len() != header.len() {
            let detail = format!(
                "it has {} columns, the header has {}",
                record.len(),
                header.len()
            );
            collector.refusals.add(Why::ColumnDrift, place, detail);
            continue;
        }
        let Some(cells) = cells_text(&record, &place, &mut collector.refusals) else {
            continue;
        };
        let mut cells_by_field = Cells::default();
        let (mut raw, mut rest) = (String::from("{"), String::new());
        for (at, cell) in cells.iter().enumerate() {
            let value = json_string(cell);
            if at > 0 {
                raw.push(',');
            }
            raw.push_str(&keys[at]);
            raw.push_str(&value);
            match field_of[at] {
                _ if cell.trim().is_empty() => {}
                Some(field) => cells_by_field[field] = Some(value),
                None => {
                    rest.push(if rest.is_empty() { '{' } else { ',' });
                    rest.push_str(&keys[at]);
                    rest.push_str(&value);
                }
            }
        }
        raw.push('}');
        let rest = (!rest.is_empty()).then(|| rest + "}");
        state.row(
            &place,
            &cells_by_field,
            Parts {
                rest: rest.as_deref(),
                raw: &raw,
                hash: None,
            },
            collector,
        )?;
    }
}

/// Reads a JSON Lines file.
pub(super) fn read_jsonl(
    input: &Input,
    columns: &BTreeMap<String, String>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let mut json = JsonReader::new(
        BufReader::with_capacity(256 << 10, input.file()?),
        input.shown().display().to_string(),
    );
    let mut state = Rows::default();
    let mut record = Vec::new();
    let mut number = 0u64;
    while json.peek()?.is_some() {
        number += 1;
        let place = format!("record {number}");
        let flags = json.capture(&mut record)?;
        let Some(text) = json::vet(&record, flags, &place, &mut collector.refusals) else {
            continue;
        };
        let Some(mut fields) = Fields::parse(text, &place, &mut collector.refusals) else {
            continue;
        };
        let mut cells = Cells::default();
        for (cell, (field, names)) in cells.iter_mut().zip(FIELDS) {
            *cell = match columns.get(field) {
                Some(column) => fields.take(column).filter(|_| !column.is_empty()),
                None => names.iter().find_map(|name| fields.take(name)),
            }
            .map(str::to_owned);
        }
        state.row(
            &place,
            &cells,
            Parts {
                rest: fields.rest().as_deref(),
                raw: text,
                hash: None,
            },
            collector,
        )?;
    }
    Ok(())
}

/// A row of a query, so that its canonical line fits too.
const QUERY_ROW_BYTES_MAX: usize = LABEL_LINE_BYTES_MAX - (64 << 10);

/// Reads the rows of a query, in whatever order they come.
pub(super) fn read_query(
    rows: impl Iterator<Item = Vec<QueryRow>>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    const FIELD_OF: [(&str, usize); 13] = [
        ("sample_path", SAMPLE_PATH),
        ("class", CLASS),
        ("class_id", CLASS_ID),
        ("kind", KIND),
        ("x", X),
        ("y", Y),
        ("w", W),
        ("h", H),
        ("geom", GEOM),
        ("attrs", ATTRS),
        ("width", WIDTH),
        ("height", HEIGHT),
        ("split", SPLIT),
    ];
    let column = |name: &str| QUERY_COLUMNS.iter().position(|known| *known == name);
    let fields: Vec<(usize, usize)> = FIELD_OF
        .iter()
        .filter_map(|(name, field)| Some((column(name)?, *field)))
        .collect();
    let (hash_column, raw_column) = (column("sample_hash"), column("raw"));
    let take = |row: &QueryRow, column: Option<usize>| column.and_then(|at| row[at].clone());
    let mut state = Rows::default();
    for row in rows.flatten() {
        // Rows have no numbers: what stands for one is the sample that it speaks of.
        let place = format!("a row of {}", row[0].as_deref().unwrap_or("no sample"));
        let plain = |json: &String| json::as_string(json).map_or(json.len(), |text| text.len());
        if row.iter().flatten().map(String::len).sum::<usize>() > QUERY_ROW_BYTES_MAX
            && row.iter().flatten().map(plain).sum::<usize>() > QUERY_ROW_BYTES_MAX
        {
            collector.refusals.add(
                Why::TooLarge,
                place,
                format!("it is larger than {QUERY_ROW_BYTES_MAX} bytes"),
            );
            continue;
        }
        let mut cells = Cells::default();
        for (from, field) in &fields {
            cells[*field] = row[*from].clone();
        }
        let hash = match take(&row, hash_column) {
            None => None,
            Some(json) => match json::as_string(&json).and_then(|text| text.parse::<Hash>().ok()) {
                Some(hash) => Some(hash),
                None => {
                    collector.refusals.add(
                        Why::Shape,
                        place,
                        format!("sample_hash is {json}, not 64 hex digits"),
                    );
                    continue;
                }
            },
        };
        if let Some(nul) = row.iter().flatten().find(|json| {
            json.contains("\\u0000") && json::as_string(json).is_some_and(|t| t.contains('\0'))
        }) {
            collector
                .refusals
                .add(Why::Nul, place, format!("{nul} holds a NUL"));
            continue;
        }
        let raw = match take(&row, raw_column) {
            Some(json) => json::compact(
                &json::as_string(&json).unwrap_or(json),
                &place,
                &mut collector.refusals,
            ),
            None => Some(rendered(&cells)),
        };
        let Some(raw) = raw else { continue };
        state.row(
            &place,
            &cells,
            Parts {
                rest: None,
                raw: &raw,
                hash,
            },
            collector,
        )?;
    }
    Ok(())
}

/// A row without a record of its own, as an object of its fields.
fn rendered(cells: &Cells) -> String {
    let mut out = String::from("{");
    for ((name, _), json) in FIELDS
        .iter()
        .zip(cells)
        .filter_map(|(field, cell)| Some((field, cell.as_ref()?)))
    {
        if out.len() > 1 {
            out.push(',');
        }
        out.push_str(&json_string(name));
        out.push(':');
        let text = json::as_string(json);
        let number = matches!(
            *name,
            "x" | "y" | "w" | "h" | "width" | "height" | "class_id"
        );
        match text {
            Some(text) if number && text.trim().parse::<f64>().is_ok_and(f64::is_finite) => {
                super::collect::push_number(&mut out, text.trim().parse().unwrap_or_default());
            }
            // Checked as JSON where the field itself is taken.
            Some(text) if matches!(*name, "geom" | "attrs") => out.push_str(&json_string(&text)),
            _ => out.push_str(json),
        }
    }
    out + "}"
}

/// How much the CSV reader takes at once.
const READ_BYTES: usize = 64 << 10;

/// Ends a read once too much was taken for one record: the CSV reader would keep all of an unclosed
/// quote in memory.
struct Capped<R> {
    inner: R,
    left: std::rc::Rc<std::cell::Cell<usize>>,
}

impl<R: Read> Read for Capped<R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let left = self.left.get();
        if left == 0 {
            return Err(std::io::Error::other(TOO_LARGE));
        }
        let n = self.inner.read(buf)?;
        self.left.set(left.saturating_sub(n));
        Ok(n)
    }
}

const TOO_LARGE: &str = "the row is too large: a quote may be open";

fn csv_fault(error: csv::Error, line: u64) -> Fault {
    match error.into_kind() {
        csv::ErrorKind::Io(error) if error.to_string() == TOO_LARGE => {
            Fault::integrity(format!("line {line}: {TOO_LARGE}")).with_next(Why::TooLarge.advice())
        }
        csv::ErrorKind::Io(error) => Fault::io(format_args!("read line {line}"), &error),
        other => {
            Fault::integrity(format!("line {line}: {other:?}")).with_next(Why::Malformed.advice())
        }
    }
}

/// The delimiter that comes most often in the first line, outside of quotes.
fn delimiter(head: &[u8]) -> u8 {
    let mut counts = [(b',', 0), (b';', 0), (b'\t', 0)];
    let mut quoted = false;
    for byte in head {
        match byte {
            b'"' => quoted = !quoted,
            b'\n' if !quoted => break,
            _ if quoted => {}
            _ => {
                for (delimiter, count) in &mut counts {
                    *count += u32::from(delimiter == byte);
                }
            }
        }
    }
    // `max_by_key` gives the last of equals, and the comma is the usual one.
    counts
        .iter()
        .rev()
        .max_by_key(|(_, count)| *count)
        .map_or(b',', |(delimiter, _)| *delimiter)
}

fn header(record: &ByteRecord) -> Result<Vec<String>, Fault> {
    let advice = "put the names of the columns into the first row, each once";
    let mut refusals = Refusals::default();
    let names = cells_text(record, "the header", &mut refusals);
    refusals.check()?;
    let mut out: Vec<String> = Vec::new();
    for name in names.unwrap_or_default() {
        let name = name.trim().to_owned();
        if name.is_empty() {
            return Err(Fault::integrity(format!(
                "column {} of the header has no name",
                out.len() + 1
            ))
            .with_next(advice));
        }
        if out.contains(&name) {
            return Err(
                Fault::integrity(format!("the header names the column {name:?} twice"))
                    .with_next(advice),
            );
        }
        out.push(name);
    }
    Ok(out)
}

/// The cells as text; invalid ones are refused as one row, so that the encoding is judged on all of
/// it.
fn cells_text<'a>(
    record: &'a ByteRecord,
    place: &str,
    refusals: &mut Refusals,
) -> Option<Vec<&'a str>> {
    let whole = record.as_slice();
    if let Err(error) = std::str::from_utf8(whole) {
        refusals.add(Why::Utf8, place, not_utf8(whole, error.valid_up_to()));
        return None;
    }
    record
        .iter()
        .map(|cell| text(cell, place, refusals))
        .collect()
}

/// The column of each field.
fn map_columns(
    header: &[String],
    columns: &BTreeMap<String, String>,
) -> Result<[Option<usize>; FIELDS.len()], Fault> {
    let find = |name: &str| {
        header
            .iter()
            .position(|column| column.eq_ignore_ascii_case(name))
    };
    let mut mapping = [None; FIELDS.len()];
    for (slot, (field, names)) in mapping.iter_mut().zip(FIELDS) {
        *slot = match columns.get(field) {
            Some(name) if name.is_empty() => None,
            Some(name) => Some(find(name).ok_or_else(|| {
                Fault::integrity(format!(
                    "there is no column {name:?} for {field}; the header has {}",
                    header.join(", ")
                ))
                .with_next("correct the column mapping or the header")
            })?),
            None => names.iter().find_map(|name| find(name)),
        };
    }
    if mapping[SAMPLE_PATH].is_none() {
        return Err(Fault::integrity(format!(
            "no column holds the sample's path; the header has {}",
            header.join(", ")
        ))
        .with_next("map one by sample_path=COLUMN; the first row must be the header"));
    }
    let boxed = |a: usize, b: usize| mapping[a].is_some() && mapping[b].is_some();
    if boxed(X, Y) && !boxed(W, H) && !boxed(X2, Y2) && boxed(WIDTH, HEIGHT) {
        return Err(Fault::integrity("there are x and y, but whether width and height are the box's or the image's is not clear")
            .with_next("map them, to the box by w=width and h=height, or to the image by width=width and height=height beside w and h"));
    }
    Ok(mapping)
}

/// Why a row was not taken.
enum Stop {
    /// It is wrong; the next one may be right.
    Refused(Why, String),
    /// Nothing more can be read.
    Fault(Fault),
}

impl From<(Why, String)> for Stop {
    fn from((why, detail): (Why, String)) -> Self {
        Stop::Refused(why, detail)
    }
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Stop::Fault(fault)
    }
}

/// Turns rows into samples and annotations.
#[derive(Default)]
struct Rows {
    /// What the last row said of its sample, so that a run of rows says it once.
    last: Option<Said>,
}

/// What a row says of its sample.
#[derive(PartialEq, Eq)]
struct Said {
    path: RelPath,
    width: Option<i64>,
    height: Option<i64>,
    split: Option<String>,
    hash: Option<Hash>,
}

/// What a row is beside its fields.
#[derive(Clone, Copy)]
struct Parts<'a> {
    /// Its other columns, as an object.
    rest: Option<&'a str>,
    /// All of it, as it came.
    raw: &'a str,
    /// What the sample's file hashes to.
    hash: Option<Hash>,
}

impl Rows {
    fn row(
        &mut self,
        place: &str,
        cells: &Cells,
        parts: Parts<'_>,
        collector: &mut Collector,
    ) -> Result<(), Fault> {
        match self.try_row(place, cells, parts, collector) {
            Err(Stop::Refused(why, detail)) => collector.refusals.add(why, place, detail),
            Err(Stop::Fault(fault)) => return Err(fault),
            Ok(()) => {}
        }
        Ok(())
    }

    fn try_row(
        &mut self,
        place: &str,
        cells: &Cells,
        parts: Parts<'_>,
        collector: &mut Collector,
    ) -> Result<(), Stop> {
        let Parts { rest, raw, hash } = parts;
        let words = |field: usize| -> Result<Option<String>, (Why, String)> {
            let Some(json) = &cells[field] else {
                return Ok(None);
            };
            let wrong = || {
                (
                    Why::Shape,
                    format!("{} is {json}, not text", FIELDS[field].0),
                )
            };
            json::as_string(json)
                .map(|text| Some(text.trim().to_owned()))
                .ok_or_else(wrong)
        };
        let path =
            words(SAMPLE_PATH)?.ok_or_else(|| (Why::Shape, "it names no sample".to_owned()))?;
        let Some(path) = collector.path(place, &path) else {
            return Ok(());
        };
        let (width, height) = (pixels(cells, WIDTH)?, pixels(cells, HEIGHT)?);
        let said = Said {
            path: path.clone(),
            width,
            height,
            split: words(SPLIT)?,
            hash,
        };
        if self.last.as_ref() != Some(&said) {
            let sample = Sample {
                place,
                width,
                height,
                split: said.split.as_deref(),
                hash,
                ..Sample::default()
            };
            collector.sample(&path, &sample)?;
            self.last = Some(said);
        }
        let class = class(place, cells, collector)?;
        let extent = extent(cells)?;
        let geom = structure(cells, GEOM, place, &mut collector.refusals);
        let attrs = structure(cells, ATTRS, place, &mut collector.refusals);
        let (Some(geom), Some(attrs)) = (geom, attrs) else {
            return Ok(());
        };
        if attrs.as_ref().is_some_and(|json| !json.starts_with('{')) {
            return Err(Stop::Refused(
                Why::Shape,
                "attrs is not a JSON object".into(),
            ));
        }
        let kind = match words(KIND)? {
            Some(kind) => KINDS.into_iter().find(|k| *k == kind).ok_or_else(|| {
                let detail = format!("the kind {kind:?} is none of {}", KINDS.join(", "));
                (Why::Shape, detail)
            })?,
            None => match extent {
                _ if geom.is_some() => "other",
                Extent::Box { .. } => "bbox",
                Extent::Point { .. } => "point",
                Extent::None if class.is_some() => "class",
                // Nothing but the sample: it has no annotations. Where other columns are filled,
                // they may be meant as one.
                Extent::None if cells[ID].is_none() => {
                    if let Some(rest) = rest {
                        note_unread(
                            Category::UnknownColumns,
                            place,
                            rest,
                            |_| true,
                            &mut collector.omitted,
                        );
                    }
                    return Ok(());
                }
                Extent::None => "other",
            },
        };
        if let Some(id) = &cells[ID] {
            collector.annotation_id(place, id)?;
        }
        if extent == Extent::None
            && geom.is_none()
            && let Some(rest) = rest
        {
            note_unread(
                Category::UnreadBoxes,
                place,
                rest,
                is_like_a_box,
                &mut collector.omitted,
            );
        }
        let attrs = attrs.as_deref().or(rest);
        collector.annotation(
            &path,
            &Annotation {
                place,
                class,
                kind,
                extent,
                geom: geom.as_deref(),
                attrs,
                raw,
            },
        )?;
        Ok(())
    }
}

/// Counts a row with columns that no field reads, if any of them is `meant`, and names these.
fn note_unread(
    what: Category,
    place: &str,
    rest: &str,
    meant: impl Fn(&str) -> bool,
    omitted: &mut Omitted,
) {
    // It was built, or checked, as an object.
    let Ok(rest) = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(rest) else {
        return;
    };
    let named: Vec<String> = rest.keys().filter(|name| meant(name)).cloned().collect();
    if !named.is_empty() {
        omitted.add(what, format!("{place}: {}", named.join(", ")));
    }
}

/// Whether a column seems to hold a box or another shape.
fn is_like_a_box(name: &str) -> bool {
    const NAMES: [&str; 14] = [
        "cx",
        "cy",
        "xc",
        "yc",
        "x_center",
        "y_center",
        "xcenter",
        "ycenter",
        "xywh",
        "xyxy",
        "objects",
        "region_shape_attributes",
        "coords",
        "coordinates",
    ];
    const PARTS: [&str; 5] = ["bbox", "box", "polygon", "segmentation", "keypoint"];
    let name = name.to_ascii_lowercase();
    NAMES.contains(&name.as_str()) || PARTS.iter().any(|part| name.contains(part))
}

/// The row's class, by number, by name or by both.
fn class(place: &str, cells: &Cells, collector: &mut Collector) -> Result<Option<ClassRef>, Stop> {
    let whole = |field: usize| -> Result<Option<i64>, (Why, String)> {
        let Some(json) = &cells[field] else {
            return Ok(None);
        };
        let text = json::as_string(json).unwrap_or_else(|| json.clone());
        let wrong = || {
            (
                Why::Shape,
                format!("{} is {json}, not a whole number", FIELDS[field].0),
            )
        };
        json::as_integer(text.trim()).map(Some).ok_or_else(wrong)
    };
    // A number in the place of the name (as in the canonical rows) is the class's id.
    let (mut id, mut name) = (whole(CLASS_ID)?, None);
    match &cells[CLASS] {
        None => {}
        Some(json) => match json::as_string(json) {
            Some(text) => name = Some(text.trim().to_owned()),
            None => id = id.or(whole(CLASS)?),
        },
    }
    Ok(match (id, name) {
        (None, None) => None,
        (Some(id), None) => Some(collector.classes.by_id(id)?),
        (None, Some(name)) => collector
            .classes
            .named(place, &name, &mut collector.refusals)?,
        (Some(id), Some(name)) => {
            collector
                .classes
                .declare(place, id, &name, None, true, &mut collector.refusals)?;
            Some(ClassRef::Id(id))
        }
    })
}

fn extent(cells: &Cells) -> Result<Extent, (Why, String)> {
    let [x, y] = [number(cells, X)?, number(cells, Y)?];
    let [w, h] = [number(cells, W)?, number(cells, H)?];
    let [x2, y2] = [number(cells, X2)?, number(cells, Y2)?];
    match (x, y, w, h, x2, y2) {
        (None, None, None, None, None, None) => Ok(Extent::None),
        (Some(x), Some(y), Some(w), Some(h), _, _) => Ok(Extent::Box { x, y, w, h }),
        (Some(x), Some(y), None, None, Some(x2), Some(y2)) => Ok(Extent::Box {
            x,
            y,
            w: x2 - x,
            h: y2 - y,
        }),
        (Some(x), Some(y), None, None, None, None) => Ok(Extent::Point { x, y }),
        _ => Err((
            Why::Shape,
            "of x, y and w, h (or x2, y2) only some are there".into(),
        )),
    }
}

fn number(cells: &Cells, field: usize) -> Result<Option<f64>, (Why, String)> {
    let Some(json) = &cells[field] else {
        return Ok(None);
    };
    let text = json::as_string(json).unwrap_or_else(|| json.clone());
    match text.trim().parse::<f64>() {
        Ok(n) if n.is_finite() => Ok(Some(n)),
        Ok(_) => Err((Why::NotFinite, format!("{} is {json}", FIELDS[field].0))),
        Err(_) => Err((
            Why::Shape,
            format!("{} is {json}, not a number", FIELDS[field].0),
        )),
    }
}

fn pixels(cells: &Cells, field: usize) -> Result<Option<i64>, (Why, String)> {
    match number(cells, field)? {
        None => Ok(None),
        Some(n) if n >= 1.0 && n.fract() == 0.0 && n <= f64::from(i32::MAX) => Ok(Some(n as i64)),
        Some(n) => Err((
            Why::Shape,
            format!("{} is {n}, not a number of pixels", FIELDS[field].0),
        )),
    }
}

/// A field that holds JSON: as it is in JSON Lines, written out in a cell of a CSV. Outer `None`:
/// it was refused.
fn structure(
    cells: &Cells,
    field: usize,
    place: &str,
    refusals: &mut Refusals,
) -> Option<Option<String>> {
    let Some(json) = &cells[field] else {
        return Some(None);
    };
    match json::as_string(json) {
        Some(text) => json::compact(&text, place, refusals).map(Some),
        None => Some(Some(json.clone())),
    }
}

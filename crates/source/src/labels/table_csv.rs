//! The rows of a CSV file, in any of the forms that spreadsheets and pandas write.
//!
//! Delimiter and encoding are detected; Excel's first line `sep=;` sets the delimiter. Empty rows,
//! empty columns without a name and empty cells behind the last column are left out. A column
//! without a name is called `index` if it is the first (pandas writes its index so), else by its
//! number.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::rc::Rc;

use csv::{ByteRecord, ReaderBuilder};

use base::fault::{Fault, IoContext};
use base::limits::LABEL_RECORD_BYTES_MAX;

use super::collect::Collector;
use super::encoding::{Inferred, Utf8Reader};
use super::folder::Input;
use super::refuse::{Refusals, Why};
use super::table_fields::{
    BBOX, BBOX_XYXY, CLASS, CLASS_ID, CX, CY, Cells, FIELD_COUNT, H, HEIGHT, RLE, W, WIDTH, X, X2,
    Y, Y2, map_columns,
};
use super::text::{json_string, not_utf8, text};

/// How much the CSV reader takes at once.
const READ_BYTES: usize = 64 << 10;

/// One row.
pub(super) struct Line {
    pub(super) place: String,
    pub(super) cells: Cells,
    /// Columns that stand for no field, as an object.
    pub(super) rest: Option<String>,
    /// All of it.
    pub(super) raw: String,
}

/// Reads a file row by row.
pub(super) struct CsvRows {
    reader: csv::Reader<Capped<BufReader<Utf8Reader<File>>>>,
    allowance: Rc<Cell<usize>>,
    inferred: Inferred,
    record: ByteRecord,
    crlf: bool,
    /// Lines before those that the CSV reader sees.
    lines_before: u64,
    keys: Vec<String>,
    /// Columns without a name in the header.
    unnamed: Vec<bool>,
    field_of: Vec<Option<usize>>,
    /// Which fields have a column.
    pub(super) has: [bool; FIELD_COUNT],
}

impl CsvRows {
    pub(super) fn open(
        input: &Input,
        columns: &BTreeMap<String, String>,
        collector: &Collector,
    ) -> Result<Self, Fault> {
        let at = || format!("read {}", input.shown().display());
        let decoded = collector.utf8(input.file()?);
        let inferred = decoded.inferred();
        let mut buffered = BufReader::with_capacity(256 << 10, decoded);
        let head = buffered.fill_buf().at(at())?;
        let mark = usize::from(head.starts_with(&[0xef, 0xbb, 0xbf])) * 3;
        buffered.consume(mark);
        let head = buffered.fill_buf().at(at())?;
        let head = &head[..head.len().min(64 << 10)];
        if head.contains(&0) {
            return Err(Fault::integrity(
                "the file's beginning holds NULs: it is UTF-16 or no text",
            )
            .with_next(Why::Utf8.advice()));
        }
        let crlf = head
            .split(|b| *b == b'\n')
            .next()
            .is_some_and(|line| line.ends_with(b"\r"));
        let (delimiter, skip) = match separator_line(head) {
            Some((delimiter, length)) => (delimiter, length),
            None => (delimiter(head), 0),
        };
        buffered.consume(skip);
        let allowance = Rc::new(Cell::new(0));
        let capped = Capped {
            inner: buffered,
            left: allowance.clone(),
        };
        let mut builder = ReaderBuilder::new();
        builder
            .delimiter(delimiter)
            .has_headers(false)
            .flexible(true)
            .buffer_capacity(READ_BYTES);
        let mut rows = Self {
            reader: builder.from_reader(capped),
            allowance,
            inferred,
            record: ByteRecord::new(),
            crlf,
            lines_before: u64::from(skip > 0),
            keys: Vec::new(),
            unnamed: Vec::new(),
            field_of: Vec::new(),
            has: [false; FIELD_COUNT],
        };
        loop {
            if rows.read()?.is_none() {
                return Err(Fault::integrity("it is empty; a header is needed")
                    .with_next("put the names of the columns into the first row"));
            }
            if !is_blank(&rows.record) {
                break;
            }
        }
        rows.header(columns)?;
        Ok(rows)
    }

    /// The encoding that was inferred, once it was.
    pub(super) fn inferred(&self) -> Option<&'static str> {
        self.inferred.name()
    }

    /// The next record, and its line; `None` at the end.
    fn read(&mut self) -> Result<Option<u64>, Fault> {
        self.allowance.set(LABEL_RECORD_BYTES_MAX + READ_BYTES);
        let line = self.reader.position().line();
        let before = self.lines_before;
        let more = self
            .reader
            .read_byte_record(&mut self.record)
            .map_err(|error| csv_fault(error, line + before))?;
        // The position of a record is before empty lines that were skipped, so its line is computed
        // from where it ends: behind its newline, or between CR and LF. The last record may have
        // none of these.
        let inside = self
            .record
            .as_slice()
            .iter()
            .filter(|b| **b == b'\n')
            .count() as u64;
        let from_end = self
            .reader
            .position()
            .line()
            .saturating_sub(inside + u64::from(!self.crlf));
        let line = from_end.max(self.record.position().map_or(line, csv::Position::line));
        Ok(more.then_some(line + before))
    }

    fn header(&mut self, columns: &BTreeMap<String, String>) -> Result<(), Fault> {
        let mut refusals = Refusals::default();
        let cells = cells_text(&self.record, "the header", &mut refusals);
        refusals.check()?;
        let mut names: Vec<String> = Vec::new();
        for (at, name) in cells.unwrap_or_default().into_iter().enumerate() {
            let name = name.trim();
            self.unnamed.push(name.is_empty());
            if !name.is_empty() && names.iter().any(|known| known == name) {
                return Err(Fault::integrity(format!(
                    "the header names the column {name:?} twice"
                ))
                .with_next("put the names of the columns into the first row, each once"));
            }
            names.push(if name.is_empty() {
                format!("column {}", at + 1)
            } else {
                name.to_owned()
            });
        }
        if self.unnamed.first() == Some(&true) && !names.iter().any(|name| name == "index") {
            "index".clone_into(&mut names[0]);
        }
        // What has no name is no field.
        let named: Vec<String> = names
            .iter()
            .zip(&self.unnamed)
            .map(|(name, none)| if *none { String::new() } else { name.clone() })
            .collect();
        let mapping = map_columns(&named, columns)?;
        self.field_of = (0..names.len())
            .map(|at| mapping.iter().position(|column| *column == Some(at)))
            .collect();
        self.keys = names.iter().map(|name| json_string(name) + ":").collect();
        self.has = mapping.map(|column| column.is_some());
        Ok(())
    }

    /// The next row that is not empty; rows that are wrong are refused and passed over.
    pub(super) fn next(&mut self, refusals: &mut Refusals) -> Result<Option<Line>, Fault> {
        while let Some(line) = self.read()? {
            if is_blank(&self.record) {
                continue;
            }
            let place = format!("line {line}");
            let columns = self.keys.len();
            let is_longer_by_nothing = self.record.len() > columns
                && self
                    .record
                    .iter()
                    .skip(columns)
                    .all(|cell| cell.trim_ascii().is_empty());
            if self.record.len() != columns && !is_longer_by_nothing {
                let detail = format!(
                    "it has {} columns, the header has {columns}",
                    self.record.len()
                );
                refusals.add(Why::ColumnDrift, place, detail);
                continue;
            }
            let Some(texts) = cells_text(&self.record, &place, refusals) else {
                continue;
            };
            let mut cells = Cells::default();
            let (mut raw, mut rest) = (String::from("{"), String::new());
            for (at, cell) in texts.into_iter().take(columns).enumerate() {
                if self.unnamed[at] && cell.trim().is_empty() {
                    continue;
                }
                let value = json_string(cell);
                if raw.len() > 1 {
                    raw.push(',');
                }
                raw.push_str(&self.keys[at]);
                raw.push_str(&value);
                match self.field_of[at] {
                    field if is_missing(cell.trim(), field) => {}
                    Some(field) => cells[field] = Some(value),
                    None => {
                        rest.push(if rest.is_empty() { '{' } else { ',' });
                        rest.push_str(&self.keys[at]);
                        rest.push_str(&value);
                    }
                }
            }
            raw.push('}');
            let rest = (!rest.is_empty()).then(|| rest + "}");
            return Ok(Some(Line {
                place,
                cells,
                rest,
                raw,
            }));
        }
        Ok(None)
    }
}

fn is_blank(record: &ByteRecord) -> bool {
    record.iter().all(|cell| cell.trim_ascii().is_empty())
}

/// Whether a cell says that it has no value, as pandas and databases write it. What is no field
/// keeps its text.
fn is_missing(cell: &str, field: Option<usize>) -> bool {
    const NUMBERS: [usize; 14] = [
        X, Y, W, H, X2, Y2, CX, CY, WIDTH, HEIGHT, CLASS_ID, BBOX, BBOX_XYXY, RLE,
    ];
    match cell {
        "" => true,
        "NaN" | "nan" | "<NA>" | "#N/A" => {
            field.is_some_and(|field| field == CLASS || NUMBERS.contains(&field))
        }
        "NULL" | "null" | "None" | "NA" | "N/A" | "n/a" | "-" | "\\N" => {
            field.is_some_and(|field| NUMBERS.contains(&field))
        }
        _ => false,
    }
}

/// Excel's first line `sep=;`: the delimiter, and the length of the line.
fn separator_line(head: &[u8]) -> Option<(u8, usize)> {
    let line = head.split(|byte| *byte == b'\n').next()?;
    let text = line.trim_ascii_end();
    let text = text
        .strip_prefix(b"\"")
        .and_then(|text| text.strip_suffix(b"\""))
        .unwrap_or(text);
    let (word, delimiter) = text.split_at_checked(4)?;
    // A tab at the end of the line is the delimiter itself.
    let delimiter = match delimiter {
        [delimiter] => *delimiter,
        [] if line.trim_ascii_end().len() < line.len() && line.contains(&b'\t') => b'\t',
        _ => return None,
    };
    (word.eq_ignore_ascii_case(b"sep=") && delimiter.is_ascii() && delimiter != b'"')
        .then_some((delimiter, (line.len() + 1).min(head.len())))
}

/// Ends a read once too much was taken for one record: the CSV reader would keep all of an unclosed
/// quote in memory.
struct Capped<R> {
    inner: R,
    left: Rc<Cell<usize>>,
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

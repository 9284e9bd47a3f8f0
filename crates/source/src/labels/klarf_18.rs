//! KLARF 1.8: `Record NAME "id" { … }`, `Field NAME n { … }` and
//! `List NAME { Columns n { type name, … } Data n { row ; … } }`.
//!
//! Commas are optional, and a row may go on over lines. A column of the type `ImageList` holds
//! `Images n { … }` or `N`. Fields of a record count for the lists in it and behind it.

use std::io::BufRead;

use serde_json::Map;

use base::fault::Fault;
use base::limits::LABEL_DEPTH_MAX;

use super::collect::Collector;
use super::klarf::{Defect, Image, Rows};
use super::klarf_tokens::{Word, Words, shown};
use super::refuse::Why;

/// The columns of a list and the values of a field, at most.
const COLUMNS_MAX: usize = 1000;
/// The names of the members of an image, in their order.
const IMAGE_MEMBERS: [&str; 4] = ["file", "format", "index", "type"];

pub(super) fn read<R: BufRead>(
    words: &mut Words<R>,
    rows: &mut Rows<'_>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    // Sizes are whole nanometres.
    rows.unit_um = 0.001;
    words.expect("FileRecord")?;
    let version = words.need()?;
    if version.text != "1.8" {
        return Err(words
            .fault(format!("its version is {:?}", shown(&version.text)))
            .with_next(
                "versions 1.1, 1.2 and 1.8 of KLARF are read: export it again in one of them",
            ));
    }
    words.expect("{")?;
    let mut depth = 1;
    loop {
        let word = words.need()?;
        if word.is("}") {
            depth -= 1;
            if depth == 0 {
                break;
            }
        } else if word.is("Record") {
            depth += 1;
            if depth > LABEL_DEPTH_MAX {
                return Err(words.fault(format!("it is nested deeper than {LABEL_DEPTH_MAX}")));
            }
            record(words, rows)?;
        } else if word.is("Field") {
            field(words, rows)?;
        } else if word.is("List") {
            list(words, rows, collector)?;
        } else if !word.is(";") && !word.is(",") {
            return Err(words.fault(format!(
                "Record, Field or List expected, {:?} found",
                shown(&word.text)
            )));
        }
    }
    words.expect("EndOfFile")
}

/// `NAME "id" {`: lot and wafer are known by the ids of their records.
fn record<R: BufRead>(words: &mut Words<R>, rows: &mut Rows<'_>) -> Result<(), Fault> {
    let name = words.need()?;
    let (mut ids, mut bytes) = (Vec::new(), 0);
    loop {
        let word = words.need()?;
        if word.is("{") {
            break;
        }
        words.keep(&word, &mut bytes)?;
        ids.push(word.text);
        if ids.len() > COLUMNS_MAX {
            return Err(words.fault("a record has no braces"));
        }
    }
    let header = if name.is("LotRecord") {
        "LotID"
    } else if name.is("WaferRecord") {
        // The images of another wafer are not its own.
        rows.remove_header("TiffFileName");
        "WaferID"
    } else {
        return Ok(());
    };
    rows.set_header(header.into(), ids, words)
}

/// Words between braces, without commas.
fn braced<R: BufRead>(words: &mut Words<R>, most: usize) -> Result<Vec<String>, Fault> {
    words.expect("{")?;
    let (mut out, mut bytes) = (Vec::new(), 0);
    loop {
        let word = words.need()?;
        if word.is("}") {
            return Ok(out);
        }
        if !word.is(",") {
            words.keep(&word, &mut bytes)?;
            out.push(word.text);
        }
        if out.len() > most {
            return Err(words.fault(format!("more than {most} values")));
        }
    }
}

fn count<R: BufRead>(words: &mut Words<R>) -> Result<usize, Fault> {
    let word = words.need()?;
    let number = word.text.parse::<usize>().ok();
    number.ok_or_else(|| words.fault(format!("a count expected, {:?} found", shown(&word.text))))
}

fn field<R: BufRead>(words: &mut Words<R>, rows: &mut Rows<'_>) -> Result<(), Fault> {
    let name = words.need()?.text;
    let count = count(words)?;
    let values = braced(words, COLUMNS_MAX)?;
    if values.len() != count {
        return Err(words.fault(format!(
            "the field {} announces {count} values and has {}",
            shown(&name),
            values.len()
        )));
    }
    rows.set_header(name, values, words)
}

fn list<R: BufRead>(
    words: &mut Words<R>,
    rows: &mut Rows<'_>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let name = words.need()?;
    let (is_defects, is_classes) = (name.is("DefectList"), name.is("ClassLookupList"));
    words.expect("{")?;
    words.expect("Columns")?;
    let announced = count(words)?;
    let columns = braced(words, 2 * COLUMNS_MAX)?;
    if columns.len() != 2 * announced {
        return Err(words.fault(format!(
            "the list {} announces {announced} columns and has {} types and names",
            shown(&name.text),
            columns.len()
        )));
    }
    let columns: Vec<(String, String)> = columns
        .chunks_exact(2)
        .map(|pair| (pair[0].clone(), pair[1].to_ascii_uppercase()))
        .collect();
    words.expect("Data")?;
    let announced = count(words)?;
    words.expect("{")?;
    let mut found = 0usize;
    while let Some(row) = row(words)? {
        found += 1;
        let cells = cells(row, &columns);
        if is_defects {
            match cells {
                Ok(defect) => rows.defect(&defect, collector)?,
                Err(detail) => rows.refuse(Why::Malformed, &detail, collector),
            }
        } else if is_classes && let Ok(cells) = cells {
            let get = |name: &str| {
                let cell = cells.columns.iter().find(|(column, _)| column == name);
                cell.map(|(_, text)| text.as_str())
            };
            if let (Some(id), Some(name)) = (get("CLASSNUMBER"), get("CLASSNAME")) {
                rows.class(id, name, collector)?;
            }
        }
    }
    if found != announced {
        return Err(words.fault(format!(
            "the list {} announces {announced} rows and has {found}",
            shown(&name.text)
        )));
    }
    words.expect("}")
}

/// The words of a row up to its `;`; `None` behind the last row.
fn row<R: BufRead>(words: &mut Words<R>) -> Result<Option<Vec<Word>>, Fault> {
    let mut out: Vec<Word> = Vec::new();
    let (mut depth, mut bytes) = (0u32, 0usize);
    loop {
        let word = words.need()?;
        if word.is("{") {
            depth += 1;
        } else if word.is("}") {
            if depth == 0 {
                return match out.is_empty() {
                    true => Ok(None),
                    false => Err(words.fault("a row does not end with ;")),
                };
            }
            depth -= 1;
        } else if word.is(";") && depth == 0 {
            return Ok(Some(out));
        }
        words.keep(&word, &mut bytes)?;
        out.push(word);
    }
}

/// The values of a row by their columns, or what is wrong with it.
fn cells(row: Vec<Word>, columns: &[(String, String)]) -> Result<Defect, String> {
    let mut defect = Defect::default();
    let mut row = row.into_iter().filter(|word| !word.is(",")).peekable();
    for (at, (kind, name)) in columns.iter().enumerate() {
        let Some(word) = row.next() else {
            return Err(format!("it has {at} of {} values", columns.len()));
        };
        if !kind.eq_ignore_ascii_case("ImageList") {
            defect.columns.push((name.clone(), word.text));
            continue;
        }
        if word.is("N") || word.is("NA") {
            continue;
        }
        if !word.is("Images") {
            return Err(format!("its images are {:?}", shown(&word.text)));
        }
        let count = row.next().and_then(|word| word.text.parse::<usize>().ok());
        let Some(count) = count.filter(|_| row.next().is_some_and(|word| word.is("{"))) else {
            return Err("its Images are not Images n { … }".into());
        };
        let mut inner = Vec::new();
        loop {
            match row.next() {
                Some(word) if word.is("}") => break,
                Some(word) => inner.push(word.text),
                None => return Err("its Images have no closing brace".into()),
            }
        }
        if count == 0 || inner.len() % count != 0 {
            if count == 0 && inner.is_empty() {
                continue;
            }
            return Err(format!(
                "it announces {count} images and has {} values",
                inner.len()
            ));
        }
        for image in inner.chunks_exact(inner.len() / count) {
            let mut members = Map::new();
            for (name, text) in IMAGE_MEMBERS.iter().zip(image).skip(1) {
                let value = text
                    .parse::<i64>()
                    .map_or_else(|_| text.as_str().into(), Into::into);
                members.insert((*name).to_owned(), value);
            }
            defect.images.push(Image {
                file: image.first().cloned().filter(|file| !file.is_empty()),
                members,
            });
        }
    }
    match row.next() {
        None => Ok(defect),
        Some(word) => Err(format!("{:?} is behind its last value", shown(&word.text))),
    }
}

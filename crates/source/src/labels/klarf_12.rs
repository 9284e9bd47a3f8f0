//! KLARF 1.1 and 1.2: a keyword, its values, and `;`.
//!
//! Counts come before their lists. A defect has the columns of `DefectRecordSpec`; it may go on
//! over lines, and `IMAGELIST` has a length of its own. `TiffFileName` counts for the defects
//! behind it, and there may be several lists of defects.

use std::io::BufRead;

use serde_json::Map;

use base::fault::Fault;

use super::collect::Collector;
use super::klarf::{Defect, Image, Rows};
use super::klarf_tokens::{Word, Words, shown};
use super::refuse::Why;

/// The columns of a defect, at most.
const COLUMNS_MAX: usize = 1000;
/// The images of a defect, at most.
const IMAGES_MAX: usize = 1000;
/// The values of a statement that are kept.
const VALUES_MAX: usize = 64;

pub(super) fn read<R: BufRead>(
    words: &mut Words<R>,
    rows: &mut Rows<'_>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let version = statement(words, VALUES_MAX)?;
    let version: Vec<&str> = version.iter().map(|word| word.text.as_str()).collect();
    if !matches!(version.as_slice(), ["1", "0" | "1" | "2"]) {
        return Err(words
            .fault(format!(
                "its FileVersion is {:?}",
                shown(&version.join(" "))
            ))
            .with_next(
                "versions 1.1, 1.2 and 1.8 of KLARF are read: export it again in one of them",
            ));
    }
    let mut columns: Vec<String> = Vec::new();
    loop {
        let keyword = words.need()?;
        if keyword.is(";") {
            continue;
        }
        if keyword.is("EndOfFile") {
            return Ok(());
        }
        if keyword.is("DefectRecordSpec") {
            columns = spec(words)?;
        } else if keyword.is("DefectList") {
            if columns.is_empty() {
                return Err(words.fault("a DefectList comes before any DefectRecordSpec"));
            }
            defects(words, &columns, rows, collector)?;
        } else if keyword.is("ClassLookup") {
            classes(words, rows, collector)?;
        } else {
            let values = statement(words, VALUES_MAX)?;
            let mut values: Vec<String> = values.into_iter().map(|word| word.text).collect();
            let mut name = keyword.text;
            if name.eq_ignore_ascii_case("TiffFileName") {
                // A name may have blanks.
                (name, values) = ("TiffFileName".into(), vec![values.join(" ")]);
                values.retain(|file| !file.is_empty());
            }
            rows.set_header(name, values, words)?;
        }
    }
}

/// The values of a statement up to its `;`, of a long one the first.
fn statement<R: BufRead>(words: &mut Words<R>, most: usize) -> Result<Vec<Word>, Fault> {
    let (mut out, mut bytes) = (Vec::new(), 0);
    loop {
        let word = words.need()?;
        if word.is(";") {
            return Ok(out);
        }
        if out.len() < most {
            words.keep(&word, &mut bytes)?;
            out.push(word);
        }
    }
}

/// A count, which comes before a list.
fn count<R: BufRead>(words: &mut Words<R>, of: &str, most: usize) -> Result<usize, Fault> {
    let word = words.need()?;
    let number = word.text.parse::<usize>().ok().filter(|n| *n <= most);
    number.ok_or_else(|| words.fault(format!("the count of {of} is {:?}", shown(&word.text))))
}

fn spec<R: BufRead>(words: &mut Words<R>) -> Result<Vec<String>, Fault> {
    let count = count(words, "DefectRecordSpec", COLUMNS_MAX)?;
    let columns = statement(words, COLUMNS_MAX)?;
    if columns.len() != count {
        return Err(words.fault(format!(
            "DefectRecordSpec announces {count} columns and names {}",
            columns.len()
        )));
    }
    Ok(columns
        .into_iter()
        .map(|word| word.text.to_ascii_uppercase())
        .collect())
}

fn classes<R: BufRead>(
    words: &mut Words<R>,
    rows: &Rows<'_>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let count = count(words, "ClassLookup", base::limits::LABEL_CLASSES_MAX)?;
    for _ in 0..count {
        let id = words.need()?;
        if id.is(";") {
            return Err(words.fault("ClassLookup names fewer classes than it announces"));
        }
        let name = words.need()?;
        rows.class(&id.text, &name.text, collector)?;
    }
    words.expect(";")
}

fn defects<R: BufRead>(
    words: &mut Words<R>,
    columns: &[String],
    rows: &mut Rows<'_>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    loop {
        let first = words.need()?;
        if first.is(";") {
            return Ok(());
        }
        let line = first.line;
        words.push_back(first);
        match defect(words, columns)? {
            Ok(defect) => rows.defect(&defect, collector)?,
            Err(detail) => {
                rows.refuse(Why::Malformed, &detail, collector);
                // The next defect begins on a line of its own.
                loop {
                    let word = words.need()?;
                    if word.line > line || word.is(";") {
                        words.push_back(word);
                        break;
                    }
                }
            }
        }
    }
}

/// One defect, or what is wrong with it.
fn defect<R: BufRead>(
    words: &mut Words<R>,
    columns: &[String],
) -> Result<Result<Defect, String>, Fault> {
    let mut defect = Defect::default();
    let (mut last_line, mut bytes) = (0, 0);
    let mut images = None;
    for (at, column) in columns.iter().enumerate() {
        let word = words.need()?;
        if word.is(";") {
            // Some writers leave an empty list out.
            let may_lack = column == "IMAGELIST" && images == Some(0);
            words.push_back(word);
            if may_lack && at + 1 == columns.len() {
                break;
            }
            return Ok(Err(format!("it has {at} of {} values", columns.len())));
        }
        words.keep(&word, &mut bytes)?;
        if column != "IMAGELIST" {
            if column == "IMAGECOUNT" {
                images = word.text.parse::<usize>().ok();
            }
            if !word.quoted && column == "DEFECTID" && word.text.parse::<i64>().is_err() {
                return Ok(Err(format!("its DEFECTID is {:?}", shown(&word.text))));
            }
            last_line = word.line;
            defect.columns.push((column.clone(), word.text));
            continue;
        }
        if images == Some(0) && word.line > last_line && at + 1 == columns.len() {
            words.push_back(word);
            break;
        }
        let Some(count) = word.text.parse::<usize>().ok().filter(|n| *n <= IMAGES_MAX) else {
            return Ok(Err(format!(
                "the length of its IMAGELIST is {:?}",
                shown(&word.text)
            )));
        };
        for _ in 0..count {
            let mut members = Map::new();
            for name in ["index", "type"] {
                let word = words.need()?;
                if word.is(";") {
                    words.push_back(word);
                    return Ok(Err("its IMAGELIST is shorter than it announces".into()));
                }
                words.keep(&word, &mut bytes)?;
                let number = word.text.parse::<i64>().ok();
                members.insert(
                    name.into(),
                    number.map_or_else(|| word.text.clone().into(), Into::into),
                );
                last_line = word.line;
            }
            defect.images.push(Image {
                file: None,
                members,
            });
        }
    }
    Ok(Ok(defect))
}

//! Which format labels are in, from the names and the first bytes of files (`recognise`).
//!
//! An input that is recognised but not read is named as what it is, with what to export instead.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::str::FromStr;

use crate::inside::Inside;
use base::fault::{Code, Fault, IoContext};

use super::folder::{Input, Walk, has_extension};
use super::klarf;
use super::recognise::{Known, LOOK_BYTES, of_head};

/// How many files of a folder are looked at.
const LOOK_FILES: usize = 10_000;
/// How many of these are opened.
const LOOK_HEADS: usize = 100;

/// A format of labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Format {
    Coco,
    Csv,
    Cvat,
    Datumaro,
    Jsonl,
    Klarf,
    LabelStudio,
    LabelMe,
    Masks,
    Via,
    Voc,
    Yolo,
}

impl Format {
    const ALL: [Format; 12] = [
        Format::Coco,
        Format::Csv,
        Format::Cvat,
        Format::Datumaro,
        Format::Jsonl,
        Format::Klarf,
        Format::LabelStudio,
        Format::LabelMe,
        Format::Masks,
        Format::Via,
        Format::Voc,
        Format::Yolo,
    ];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Format::Coco => "coco",
            Format::Csv => "csv",
            Format::Cvat => "cvat",
            Format::Datumaro => "datumaro",
            Format::Jsonl => "jsonl",
            Format::Klarf => "klarf",
            Format::LabelStudio => "label_studio",
            Format::LabelMe => "labelme",
            Format::Masks => "masks",
            Format::Via => "via",
            Format::Voc => "voc",
            Format::Yolo => "yolo",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Format {
    type Err = Fault;
    fn from_str(word: &str) -> Result<Self, Fault> {
        let found = Format::ALL.into_iter().find(|f| f.as_str() == word);
        found.ok_or_else(|| {
            Fault::usage(format!("there is no label format {word:?}")).with_next(names())
        })
    }
}

fn names() -> String {
    format!(
        "name one of the formats {}",
        Format::ALL.map(Format::as_str).join(", ")
    )
}

/// Guesses the format of labels.
pub(super) fn guess(input: &Input) -> Result<Format, Fault> {
    let path = input.shown();
    match identify(input)? {
        Known::Format(format) => Ok(format),
        Known::Unread(what, instead) => Err(Fault::integrity(format!(
            "the labels {} are {what}, which is not read",
            path.display()
        ))
        .with_next(instead)),
        Known::Unknown(why) => Err(Fault::integrity(format!(
            "the format of the labels {} cannot be guessed: {why}",
            path.display()
        ))
        .with_next(names())),
    }
}

fn identify(input: &Input) -> Result<Known, Fault> {
    if let Some(folder) = input.folder() {
        return identify_folder(folder);
    }
    let path = &input.shown();
    let at = || format!("read labels {}", path.display());
    if !path.metadata().at(at())?.is_file() {
        return Ok(Known::Unknown("it is neither a file nor a folder"));
    }
    let mut head = Vec::new();
    input
        .file()?
        .take(LOOK_BYTES)
        .read_to_end(&mut head)
        .at(at())?;
    if has_extension(path, &["csv", "tsv"]) {
        return Ok(Known::Format(Format::Csv));
    }
    if has_extension(path, &["jsonl", "ndjson"]) {
        return Ok(Known::Format(Format::Jsonl));
    }
    Ok(of_head(&head))
}

/// The formats that are files in a folder, the first that is found counts.
const PREFERRED: [Format; 8] = [
    Format::Voc,
    Format::Cvat,
    Format::Klarf,
    Format::LabelMe,
    Format::Datumaro,
    Format::Via,
    Format::Coco,
    Format::LabelStudio,
];

fn identify_folder(folder: &Inside) -> Result<Known, Fault> {
    let is_names = |name: &Path| {
        has_extension(name, &["yaml", "yml", "names"]) || name.ends_with("classes.txt")
    };
    let (mut names, mut texts, mut pngs, mut map) = (false, false, false, false);
    let mut found = BTreeSet::new();
    let mut unread = None;
    let mut left = LOOK_HEADS;
    for file in Walk::new(folder).take(LOOK_FILES) {
        let file = file?;
        let is_map = super::masks_map::is_map(&file);
        map |= is_map;
        pngs |= has_extension(&file, &["png"]);
        let is_xml = has_extension(&file, &["xml"]);
        let looks = !is_map && (is_xml || has_extension(&file, &["json"]) || klarf::may_be(&file));
        if looks && left > 0 {
            left -= 1;
            match folder.try_file(&file).ok().and_then(look) {
                Some(Known::Format(format)) => {
                    found.insert(format);
                }
                // A file of Pascal VOC is refused alone, and is one of many here. What other XML
                // file it is, is for the reader of VOC to say.
                Some(Known::Unread(..) | Known::Unknown(_)) if is_xml => {
                    found.insert(Format::Voc);
                }
                Some(Known::Unread(what, instead)) => {
                    unread.get_or_insert((what, instead));
                }
                Some(Known::Unknown(_)) | None => {}
            }
        }
        if is_names(&file) {
            names = true;
        } else if !is_map && !klarf::may_be(&file) {
            texts |= has_extension(&file, &["txt"]);
        }
        if found.contains(&Format::Voc) {
            break;
        }
    }
    let format = PREFERRED.into_iter().find(|format| found.contains(format));
    Ok(match format {
        // Beside the files of YOLO there may be one of COCO.
        Some(Format::Coco) if names => Known::Format(Format::Yolo),
        Some(format) => Known::Format(format),
        None => match unread {
            Some((what, instead)) if !names => Known::Unread(what, instead),
            _ if map && pngs && !names => Known::Format(Format::Masks),
            // Text files without names are YOLO that its reader refuses with better advice than
            // "unknown".
            _ if names || texts => Known::Format(Format::Yolo),
            _ => Known::Unknown(
                "the folder holds neither YOLO names and text files, nor VOC XML files, nor JSON files of COCO, LabelMe, Datumaro or VIA, nor KLARF files, nor masks with a class map",
            ),
        },
    })
}

/// What a file is; `None` if it cannot be read.
pub(super) fn look(file: File) -> Option<Known> {
    let mut head = Vec::new();
    file.take(LOOK_BYTES).read_to_end(&mut head).ok()?;
    Some(of_head(&head))
}

/// Names what the input is, where it was read as another format by its name and refused.
pub(super) fn name_other(fault: Fault, input: &Input, format: Format, guessed: bool) -> Fault {
    if guessed || fault.code != Code::Integrity {
        return fault;
    }
    match identify(input) {
        Ok(Known::Format(other)) if other != format => {
            let next = format!(
                "{}; the labels look like {other}: --format {other}",
                fault.next
            );
            fault.with_next(next)
        }
        Ok(Known::Unread(what, instead)) => {
            let next = format!("the labels are {what}, which is not read; {instead}");
            fault.with_next(next)
        }
        _ => fault,
    }
}

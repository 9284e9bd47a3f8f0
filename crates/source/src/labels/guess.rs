//! Which format labels are in, from the name and the first bytes.

use std::fmt;
use std::io::Read;
use std::path::Path;
use std::str::FromStr;

use crate::inside::Inside;
use base::fault::{Fault, IoContext};

use super::folder::{Input, Walk, has_extension};

/// How much of a file is looked at.
const LOOK_BYTES: u64 = 64 << 10;
/// How many files of a folder are looked at.
const LOOK_FILES: usize = 10_000;

/// A format of labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Coco,
    Csv,
    Jsonl,
    LabelStudio,
    Voc,
    Yolo,
}

impl Format {
    const ALL: [Format; 6] = [
        Format::Coco,
        Format::Csv,
        Format::Jsonl,
        Format::LabelStudio,
        Format::Voc,
        Format::Yolo,
    ];

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Format::Coco => "coco",
            Format::Csv => "csv",
            Format::Jsonl => "jsonl",
            Format::LabelStudio => "label_studio",
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

/// Guesses the format of the labels at `path`.
pub(super) fn guess(input: &Input) -> Result<Format, Fault> {
    let path = &input.shown();
    let unknown = |why: &str| {
        Fault::integrity(format!(
            "the format of the labels {} cannot be guessed: {why}",
            path.display()
        ))
        .with_next(names())
    };
    if let Some(folder) = input.folder() {
        return guess_folder(folder)?.ok_or_else(|| {
            unknown("the folder holds neither YOLO names and text files, nor VOC XML files, nor COCO files")
        });
    }
    if !path
        .metadata()
        .at(format_args!("read labels {}", path.display()))?
        .is_file()
    {
        return Err(unknown("it is neither a file nor a folder"));
    }
    let mut head = Vec::new();
    let at = || format!("read labels {}", path.display());
    input
        .file()?
        .take(LOOK_BYTES)
        .read_to_end(&mut head)
        .at(at())?;
    if has_extension(path, &["csv", "tsv"]) {
        return Ok(Format::Csv);
    }
    if has_extension(path, &["jsonl", "ndjson"]) {
        return Ok(Format::Jsonl);
    }
    if head.starts_with(b"PK\x03\x04") || head.starts_with(&[0x1f, 0x8b]) {
        return Err(unknown("it is an archive; unpack it first"));
    }
    let text = head
        .strip_prefix(&[0xef, 0xbb, 0xbf])
        .unwrap_or(&head)
        .trim_ascii_start();
    match text.first() {
        Some(b'[') => Ok(Format::LabelStudio),
        // A whole object on the first line and another one after it: no single document looks like
        // that.
        Some(b'{') => match text.iter().position(|b| *b == b'\n') {
            Some(end)
                if serde_json::from_slice::<serde::de::IgnoredAny>(&text[..end]).is_ok()
                    && text[end..].trim_ascii_start().starts_with(b"{") =>
            {
                Ok(Format::Jsonl)
            }
            _ => Ok(Format::Coco),
        },
        Some(b'<') => Err(unknown(
            "it is one XML file; VOC labels are given as the folder that holds them",
        )),
        None => Err(unknown("it is empty")),
        Some(_) => Err(unknown(
            "it is not JSON and its name does not end in .csv, .tsv, .jsonl or .ndjson",
        )),
    }
}

fn guess_folder(folder: &Inside) -> Result<Option<Format>, Fault> {
    let is_names = |name: &Path| {
        has_extension(name, &["yaml", "yml", "names"]) || name.ends_with("classes.txt")
    };
    let (mut names, mut texts, mut coco) = (false, false, false);
    for file in Walk::new(folder).take(LOOK_FILES) {
        let file = file?;
        if has_extension(&file, &["xml"]) {
            return Ok(Some(Format::Voc));
        }
        if !coco && has_extension(&file, &["json"]) {
            coco = folder.try_file(&file).is_ok_and(super::coco::is_coco);
        }
        if is_names(&file) {
            names = true;
        } else {
            texts |= has_extension(&file, &["txt"]);
        }
    }
    // Beside the files of COCO there are often texts about the set.
    if coco && !names {
        return Ok(Some(Format::Coco));
    }
    // Text files without names are YOLO that its reader refuses with better advice than "unknown".
    Ok((names || texts).then_some(Format::Yolo))
}

//! KLARF 1.1, 1.2 and 1.8: the defects that an inspection tool found on a wafer or a panel.
//!
//! Versions 1.1 and 1.2 are statements that end with `;` (`klarf_12`), version 1.8 is records in
//! braces (`klarf_18`); both hand each defect to [`Rows`]. Numbers are micrometres in 1.1 and 1.2,
//! nanometres in 1.8. `XREL` and `YREL` are the centre of the defect, from the lower left corner of
//! its die, y upwards.
//!
//! The sample of a defect is its first image: of version 1.8 the first of its image list, else the
//! file of `TiffFileName`; without an image it is the KLARF file itself. With a scale, the box of a
//! row is in the pixels of an image of the whole die, or (`klarf_image=defect`) of an image that
//! has the defect in its centre. Without one, the row has no box. All numbers are in `attrs`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde_json::{Map, Number, Value};

use base::fault::Fault;
use base::limits::LABEL_RECORD_BYTES_MAX;

use super::collect::{Collector, Extent, Sample};
use super::folder::{Input, has_extension};
use super::klarf_tokens::Words;
use super::path_rules::is_of_one_machine;
use super::refuse::Why;
use super::shapes::{Checked, Row, Shape};
use super::{klarf_12, klarf_18, label_files, size};

/// How boxes are made.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct KlarfSettings {
    /// How many micrometres a pixel is wide.
    pub(super) scale: Option<f64>,
    /// The image has the defect in its centre; else it shows the whole die.
    pub(super) is_patch: bool,
}

/// The values of a header that rows and samples get.
const CONTEXT: [(&str, &str); 6] = [
    ("LotID", "lot"),
    ("WaferID", "wafer"),
    ("Slot", "slot"),
    ("DeviceID", "device"),
    ("StepID", "step"),
    ("InspectionStationID", "station"),
];

/// How many statements or fields a file may have beside its lists.
const HEADER_MAX: usize = 1000;

/// Whether text begins as a KLARF file does.
pub(super) fn begins(text: &[u8]) -> bool {
    let mut words = text
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty());
    let first = words.next().unwrap_or_default();
    first.eq_ignore_ascii_case(b"FileVersion")
        || (first.eq_ignore_ascii_case(b"Record")
            && words
                .next()
                .is_some_and(|word| word.eq_ignore_ascii_case(b"FileRecord")))
}

/// Whether a file has a name that KLARF files have: `.klarf`, `.kla`, `.001` and the like.
pub(super) fn may_be(file: &Path) -> bool {
    let extension = file
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or_default();
    has_extension(file, &["klarf", "kla", "klf", "krf"])
        || (extension.len() == 3 && extension.bytes().all(|b| b.is_ascii_digit()))
}

pub(super) fn read(
    input: &Input,
    settings: KlarfSettings,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let Some(folder) = input.folder() else {
        let shown = input.shown();
        let name = shown.file_name().unwrap_or_default().to_string_lossy();
        let mut rows = Rows::new(&name, settings, None);
        return one(input.file()?, &mut rows, collector);
    };
    let (mut files, _) = label_files::many(folder, may_be, collector)?;
    let mut count = 0u64;
    while let Some((path, _)) = files.next()? {
        let path = String::from_utf8_lossy(path);
        let mut rows = Rows::new(&path, settings, Some(folder));
        one(folder.file(path.as_ref())?, &mut rows, collector)
            .map_err(|fault| fault.context(&path))?;
        count += 1;
    }
    if count == 0 {
        return Err(Fault::integrity("the folder holds no KLARF file")
            .with_next("give the KLARF file itself"));
    }
    Ok(())
}

fn one(file: File, rows: &mut Rows<'_>, collector: &mut Collector) -> Result<(), Fault> {
    let file = collector.utf8(file);
    let inferred = file.inferred();
    let mut words = Words::new(BufReader::with_capacity(256 << 10, file), &rows.file);
    let first = words.need()?;
    if first.is("FileVersion") {
        klarf_12::read(&mut words, rows, collector)?;
    } else if first.is("Record") {
        words.has_braces = true;
        klarf_18::read(&mut words, rows, collector)?;
    } else {
        return Err(words
            .fault("it begins neither with FileVersion nor with Record FileRecord")
            .with_next("give a KLARF file of version 1.1, 1.2 or 1.8"));
    }
    collector.note_encoding(&rows.file, inferred.name());
    Ok(())
}

/// An image of a defect.
#[derive(Debug, Default, Clone)]
pub(super) struct Image {
    pub(super) file: Option<String>,
    pub(super) members: Map<String, Value>,
}

/// A defect as a file has it: its columns, and its images.
#[derive(Debug, Default)]
pub(super) struct Defect {
    pub(super) columns: Vec<(String, String)>,
    pub(super) images: Vec<Image>,
}

/// What is known of a file so far; takes its defects.
pub(super) struct Rows<'a> {
    pub(super) file: String,
    settings: KlarfSettings,
    folder: Option<&'a crate::inside::Inside>,
    /// Micrometres in one unit of the file.
    pub(super) unit_um: f64,
    /// The values of statements or fields by their names.
    header: BTreeMap<String, Vec<String>>,
    header_bytes: usize,
    count: u64,
}

impl<'a> Rows<'a> {
    fn new(file: &str, settings: KlarfSettings, folder: Option<&'a crate::inside::Inside>) -> Self {
        Self {
            file: file.to_owned(),
            settings,
            folder,
            unit_um: 1.0,
            header: BTreeMap::new(),
            header_bytes: 0,
            count: 0,
        }
    }

    /// The place of the next defect, for messages.
    pub(super) fn place(&self, id: Option<&str>) -> String {
        let id = id.map_or(String::new(), |id| format!(" (DEFECTID {id})"));
        format!("{} defect {}{id}", self.file, self.count)
    }

    /// Notes a defect that cannot be read.
    pub(super) fn refuse(&mut self, why: Why, detail: &str, collector: &mut Collector) {
        collector.refusals.add(why, self.place(None), detail);
        self.count += 1;
    }

    /// A class by its number and name.
    pub(super) fn class(
        &self,
        id: &str,
        name: &str,
        collector: &mut Collector,
    ) -> Result<(), Fault> {
        let place = format!("{} class {id}", self.file);
        match id.parse::<i64>() {
            Ok(id) => {
                let refusals = &mut collector.refusals;
                collector
                    .classes
                    .declare(&place, id, name, None, true, refusals)
            }
            Err(_) => {
                let detail = "its number is not a whole number";
                collector.refusals.add(Why::Shape, place, detail);
                Ok(())
            }
        }
    }

    /// Keeps the values of a statement or field for the defects behind it.
    pub(super) fn set_header<R: BufRead>(
        &mut self,
        name: String,
        values: Vec<String>,
        words: &Words<R>,
    ) -> Result<(), Fault> {
        self.remove_header(&name);
        self.header_bytes += name.len() + values.iter().map(String::len).sum::<usize>();
        self.header.insert(name, values);
        if self.header.len() > HEADER_MAX {
            return Err(words.fault(format!(
                "it has more than {HEADER_MAX} statements or fields"
            )));
        }
        if self.header_bytes > LABEL_RECORD_BYTES_MAX {
            return Err(words.fault(format!(
                "its statements or fields are larger than {LABEL_RECORD_BYTES_MAX} bytes"
            )));
        }
        Ok(())
    }

    /// Forgets the values of a statement or field.
    pub(super) fn remove_header(&mut self, name: &str) {
        if let Some(values) = self.header.remove(name) {
            self.header_bytes -= name.len() + values.iter().map(String::len).sum::<usize>();
        }
    }

    fn pair(&self, name: &str) -> Option<[f64; 2]> {
        let values = self.header.get(name)?;
        Some([values.first()?.parse().ok()?, values.get(1)?.parse().ok()?])
    }

    /// Takes a defect.
    pub(super) fn defect(
        &mut self,
        defect: &Defect,
        collector: &mut Collector,
    ) -> Result<(), Fault> {
        let get = |name: &str| {
            let column = defect.columns.iter().find(|(column, _)| column == name);
            column
                .map(|(_, value)| value.as_str())
                .filter(|value| *value != "NA")
        };
        let place = self.place(get("DEFECTID"));
        self.count += 1;
        let class = match get("CLASSNUMBER").map(str::parse::<i64>) {
            None => None,
            Some(Ok(id)) => Some(collector.classes.by_id(id)?),
            Some(Err(_)) => {
                let detail = "its CLASSNUMBER is not a whole number";
                collector.refusals.add(Why::Shape, place, detail);
                return Ok(());
            }
        };
        let number = |name: &str| -> Checked<Option<f64>> {
            match get(name) {
                None => Ok(None),
                Some(text) => match text.parse::<f64>() {
                    Ok(number) if number.is_finite() => Ok(Some(number)),
                    _ => Err((Why::Shape, format!("its {name} is {text:?}, not a number"))),
                },
            }
        };
        let tiff = self
            .header
            .get("TiffFileName")
            .and_then(|words| words.first());
        let tiff = tiff
            .filter(|_| !defect.images.is_empty() || get("IMAGECOUNT").is_none_or(|n| n != "0"));
        let listed = defect.images.iter().filter_map(|image| image.file.as_ref());
        let files: Vec<String> = match listed.clone().next() {
            Some(_) => listed.map(|file| self.path(file)).collect(),
            None => vec![tiff.map_or_else(|| self.file.clone(), |tiff| self.path(tiff))],
        };
        let has_image = listed_or(tiff, defect);
        let mut members = Map::new();
        for (name, value) in &defect.columns {
            members.insert(name.clone(), json_value(value));
        }
        if !defect.images.is_empty() {
            let images = defect.images.iter().map(|image| {
                let mut members = image.members.clone();
                if let Some(file) = &image.file {
                    members.insert("file".into(), file.as_str().into());
                }
                Value::Object(members)
            });
            members.insert("images".into(), images.collect());
        }
        let raw = Value::Object(members.clone()).to_string();
        let position = (number("XREL"), number("YREL"));
        if let (Ok(Some(x)), Ok(Some(y))) = &position {
            self.wafer_position([*x, *y], [get("XINDEX"), get("YINDEX")], &mut members);
        }
        let unit = if self.unit_um == 1.0 { "um" } else { "nm" };
        members.insert("unit".into(), unit.into());
        for (name, key) in CONTEXT {
            if let Some(words) = self.header.get(name) {
                members.insert(key.into(), words.join(" ").into());
            }
        }
        let attrs = Value::Object(members).to_string();
        let mut path = None;
        for file in &files {
            let Some(found) = collector.path(&place, file) else {
                return Ok(());
            };
            let size = self.size(file).filter(|_| has_image);
            let sample = Sample {
                place: &place,
                width: size.map(|(width, _)| width),
                height: size.map(|(_, height)| height),
                ..Sample::default()
            };
            collector.sample(&found, &sample)?;
            path.get_or_insert((found, size));
        }
        let Some((path, size)) = path else {
            return Ok(());
        };
        let shape = (|| {
            let (x, y) = (position.0?, position.1?);
            self.shape([x, y], [number("XSIZE")?, number("YSIZE")?], size)
        })();
        let row = Row {
            place: &place,
            class,
            attrs: Some(&attrs),
            raw: &raw,
        };
        row.take(&path, shape, collector)
    }

    /// Where the defect is on the wafer, from the centre of the sample.
    fn wafer_position(
        &self,
        rel: [f64; 2],
        index: [Option<&str>; 2],
        members: &mut Map<String, Value>,
    ) {
        let (Some(pitch), Some(centre)) =
            (self.pair("DiePitch"), self.pair("SampleCenterLocation"))
        else {
            return;
        };
        for (axis, name) in ["wafer_x", "wafer_y"].into_iter().enumerate() {
            let Some(Ok(index)) = index[axis].map(str::parse::<f64>) else {
                return;
            };
            let at = index * pitch[axis] + rel[axis] - centre[axis];
            if let Some(number) = Number::from_f64(at) {
                members.insert(name.into(), Value::Number(number));
            }
        }
    }

    fn shape(
        &self,
        position: [Option<f64>; 2],
        size: [Option<f64>; 2],
        image: Option<(i64, i64)>,
    ) -> Checked<Shape> {
        let Some(scale) = self.settings.scale else {
            return Ok(Shape::class());
        };
        let pixels = |value: f64| value * self.unit_um / scale;
        let centre = if self.settings.is_patch {
            let Some((width, height)) = image else {
                let detail = "klarf_image=defect needs the size of its image, which is not beside the KLARF file";
                return Err((Why::NoSize, detail.into()));
            };
            [width as f64 / 2.0, height as f64 / 2.0]
        } else {
            let [Some(x), Some(y)] = position else {
                return Err((Why::Shape, "it has no XREL and YREL".into()));
            };
            let Some([_, pitch]) = self.pair("DiePitch") else {
                return Err((
                    Why::NoSize,
                    "the file has no DiePitch, from which y is counted downwards".into(),
                ));
            };
            [pixels(x), pixels(pitch - y)]
        };
        let [w, h] = size.map(|side| side.map_or(0.0, pixels));
        if w <= 0.0 || h <= 0.0 {
            // A defect without a size is a point.
            let extent = Extent::Point {
                x: centre[0],
                y: centre[1],
            };
            return Ok(Shape::plain("point", extent, None));
        }
        let extent = Extent::Box {
            x: centre[0] - w / 2.0,
            y: centre[1] - h / 2.0,
            w,
            h,
        };
        Ok(Shape::plain("bbox", extent, None))
    }

    /// The path of an image: relative to the folder of the file.
    fn path(&self, name: &str) -> String {
        let name = match is_of_one_machine(name) {
            // Of a path on the machine of the tool only the name says something here.
            true => name.rsplit(['/', '\\']).next().unwrap_or(name),
            false => name,
        };
        let name = name.replace('\\', "/");
        match self.file.rsplit_once('/') {
            Some((folder, _)) => format!("{folder}/{name}"),
            None => name,
        }
    }

    /// The size of an image beside the file.
    fn size(&self, path: &str) -> Option<(i64, i64)> {
        self.folder
            .filter(|_| self.settings.is_patch)
            .and_then(|folder| size::of_file(folder, path))
    }
}

/// Whether a defect has an image.
fn listed_or(tiff: Option<&String>, defect: &Defect) -> bool {
    tiff.is_some() || defect.images.iter().any(|image| image.file.is_some())
}

/// A value as JSON: numbers keep their digits, `NA` is nothing.
fn json_value(text: &str) -> Value {
    if text == "NA" {
        return Value::Null;
    }
    let is_number = text.starts_with(|c: char| c.is_ascii_digit() || c == '-')
        && text.parse::<f64>().is_ok_and(f64::is_finite);
    match serde_json::from_str::<Number>(text) {
        Ok(number) if is_number => Value::Number(number),
        _ => Value::from(text),
    }
}

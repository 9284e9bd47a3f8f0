//! LabelMe (github.com/wkentaro/labelme): one JSON file an image, in a folder or alone.
//!
//! Each file is read twice: for what it says of the image, which may stand behind the shapes, and
//! for its shapes. The embedded image (`imageData`) is passed over. Polygons with the same label
//! and the same `group_id` are one annotation of several rings. The members of X-AnyLabeling
//! (rotated boxes, boxes of four corners, attributes) are read too.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Cursor};
use std::path::Path;

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use base::fault::{Code, Fault};
use base::limits::{LABEL_RECORD_BYTES_MAX, LABEL_TASK_BYTES_MAX};
use base::names::RelPath;
use base::omitted::Category;

use super::collect::{Collector, Extent, Sample};
use super::folder::{Input, has_extension};
use super::images_beside::ImagesBeside;
use super::json::{self, Fields, JsonReader};
use super::label_files;
use super::path_rules::{PathFrom, is_of_one_machine};
use super::png::Png;
use super::refuse::Why;
use super::shapes::{Checked, Patch, Row, Shape};
use super::split;
use super::text::json_string;

/// Folders that stand beside a folder of images.
const LABEL_FOLDERS: [&str; 7] = [
    "labels",
    "label",
    "annotations",
    "annotation",
    "json",
    "jsons",
    "ann",
];
/// The largest member of a file beside its shapes that is kept.
const MEMBER_BYTES_MAX: usize = 64 << 10;

pub(super) fn read(input: &Input, collector: &mut Collector) -> Result<(), Fault> {
    let Some(folder) = input.folder() else {
        let shown = input.shown();
        let name = shown.file_name().unwrap_or_default().to_string_lossy();
        let open = || input.file();
        let read = one(&open, &name, None, collector)?;
        return match read {
            Read::Taken => Ok(()),
            Read::Other => Err(
                Fault::integrity("it has no list \"shapes\", so it is not LabelMe")
                    .with_next("give a LabelMe file or a folder of them, or name another format"),
            ),
        };
    };
    let is_json = |file: &Path| has_extension(file, &["json"]);
    let (mut files, images) = label_files::many(folder, is_json, collector)?;
    let mut taken = 0u64;
    while let Some((place, _)) = files.next()? {
        let place = String::from_utf8_lossy(place);
        let open = || folder.file(place.as_ref());
        match one(&open, &place, Some(&images), collector)? {
            Read::Taken => taken += 1,
            Read::Other => collector.omitted.add(Category::UnreadFiles, place),
        }
    }
    if taken == 0 {
        return Err(Fault::integrity("the folder holds no LabelMe file")
            .with_next("give the folder that holds the JSON files of LabelMe"));
    }
    Ok(())
}

/// What became of a file.
enum Read {
    Taken,
    /// It has no shapes.
    Other,
}

/// Reads one file. What is wrong with its syntax is refused, and the next file can be read.
fn one(
    open: &dyn Fn() -> Result<File, Fault>,
    place: &str,
    images: Option<&ImagesBeside<'_>>,
    collector: &mut Collector,
) -> Result<Read, Fault> {
    let read = head(open()?, place, collector).and_then(|head| {
        if !head.has_shapes {
            return Ok(Read::Other);
        }
        let Some(path) = head.path(place, images, collector) else {
            return Ok(Read::Taken);
        };
        shapes(open()?, place, &path, head.size(), collector)?;
        let meta = format!("{{{}}}", head.meta.join(","));
        let sample = Sample {
            place,
            declared: true,
            width: head.width,
            height: head.height,
            split: split::of_folder(place).or_else(|| split::of_folder(path.as_str())),
            split_from: super::collect::SplitFrom::Folder,
            meta: (!head.meta.is_empty()).then_some(meta.as_str()),
            ..Sample::default()
        };
        collector.sample(&path, &sample)?;
        Ok(Read::Taken)
    });
    match read {
        Err(fault) if fault.code == Code::Integrity => {
            collector.refusals.add(Why::Malformed, place, fault.message);
            Ok(Read::Taken)
        }
        other => other,
    }
}

/// What a file says of its image.
#[derive(Default)]
struct Head {
    has_shapes: bool,
    image: Option<String>,
    width: Option<i64>,
    height: Option<i64>,
    /// Members as JSON.
    meta: Vec<String>,
}

type Json = JsonReader<BufReader<super::encoding::Utf8Reader<File>>>;

fn reader(file: File, place: &str, collector: &Collector) -> (Json, super::encoding::Inferred) {
    let file = collector.utf8(file);
    let inferred = file.inferred();
    let json = JsonReader::new(BufReader::with_capacity(64 << 10, file), place);
    (json, inferred)
}

fn head(file: File, place: &str, collector: &mut Collector) -> Result<Head, Fault> {
    let (mut json, inferred) = reader(file, place, collector);
    let mut head = Head::default();
    let mut record = Vec::new();
    json.expect(b'{')?;
    let mut first = true;
    while json.more(&mut first, b'}')? {
        let key = json.key()?;
        if key == "shapes" {
            head.has_shapes = json.peek()? == Some(b'[');
        }
        let flags = json.capture(&mut record)?;
        if matches!(key.as_str(), "shapes" | "imageData") {
            continue;
        }
        let member = format!("{place} {key}");
        let Some(text) = json::vet(&record, flags, &member, &mut collector.refusals) else {
            continue;
        };
        match key.as_str() {
            "imagePath" => head.image = json::as_string(text),
            "imageWidth" => head.width = json::as_integer(text).filter(|n| *n > 0),
            "imageHeight" => head.height = json::as_integer(text).filter(|n| *n > 0),
            _ => {}
        }
        let is_empty = matches!(text, "null" | "{}" | "[]" | "\"\"");
        if !is_empty && text.len() <= MEMBER_BYTES_MAX && head.meta.len() < 64 {
            head.meta.push(format!("{}:{text}", json_string(&key)));
        }
    }
    json.end()?;
    collector.note_encoding(place, inferred.name());
    Ok(head)
}

impl Head {
    fn size(&self) -> Option<(i64, i64)> {
        self.width.zip(self.height)
    }

    /// The sample: the image that `imagePath` names from the file's folder, or the image that has
    /// the file's name.
    fn path(
        &self,
        place: &str,
        images: Option<&ImagesBeside<'_>>,
        collector: &mut Collector,
    ) -> Option<RelPath> {
        let folder = place.rsplit_once('/').map_or("", |(folder, _)| folder);
        let stem = place.rsplit_once('.').map_or(place, |(stem, _)| stem);
        let named = self.image.as_deref().filter(|name| !name.is_empty());
        let recorded = named.map(|name| match is_of_one_machine(name) {
            // Of a path on the machine of the tool only the name says something here.
            true if images.is_some() => {
                resolve(folder, name.rsplit(['/', '\\']).next().unwrap_or(name))
            }
            true => name.to_owned(),
            false => resolve(folder, name),
        });
        let from = collector.path_from();
        let mut found = None;
        if let Some(images) = images
            && from != PathFrom::Record
            && !recorded.as_deref().is_some_and(|path| images.holds(path))
        {
            found = images.find(stem, named, &LABEL_FOLDERS);
        }
        let chosen = match (found, recorded) {
            (Some(found), _) => found,
            (None, Some(recorded)) if from != PathFrom::Image => recorded,
            _ => {
                let detail = "it has no imagePath, and there is no image of its name";
                collector.refusals.add(Why::Shape, place, detail);
                return None;
            }
        };
        let plain = named.map(|name| name.replace('\\', "/"));
        if plain.as_deref() != Some(chosen.as_str()) && !is_of_one_machine(&chosen) {
            collector.note_path(place, named.unwrap_or("no imagePath"), &chosen);
        }
        collector.path(place, &chosen)
    }
}

/// A relative path from a folder, without `..`. What would leave the root starts there.
fn resolve(folder: &str, name: &str) -> String {
    let name = name.replace('\\', "/");
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in name.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// The parts of one annotation: polygons of one group.
#[derive(Default)]
struct Group {
    rings: Vec<Vec<f64>>,
    raws: Vec<String>,
    attrs: Option<String>,
    place: String,
    bytes: usize,
}

fn shapes(
    file: File,
    place: &str,
    path: &RelPath,
    size: Option<(i64, i64)>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let (mut json, _) = reader(file, place, collector);
    let mut record = Vec::new();
    let mut groups: BTreeMap<(String, String), Group> = BTreeMap::new();
    let mut grouped = 0;
    json.expect(b'{')?;
    let mut first = true;
    while json.more(&mut first, b'}')? {
        if json.key()? != "shapes" {
            json.capture(&mut record)?;
            continue;
        }
        json.expect(b'[')?;
        let (mut first_shape, mut number) = (true, 0u64);
        while json.more(&mut first_shape, b']')? {
            let flags = json.capture(&mut record)?;
            let place = format!("{place} shapes[{number}]");
            number += 1;
            let Some(text) = json::vet(&record, flags, &place, &mut collector.refusals) else {
                continue;
            };
            let Some(fields) = Fields::parse(text, &place, &mut collector.refusals) else {
                continue;
            };
            let Some(mut drawn) = Drawn::of(fields, &place, collector) else {
                continue;
            };
            if let (Some(group), "polygon") = (drawn.group.take(), drawn.kind.as_str()) {
                let group = groups.entry((drawn.label, group)).or_default();
                if group.rings.is_empty() {
                    (group.place, group.attrs) = (place, drawn.attrs);
                }
                group.bytes += text.len();
                grouped += text.len();
                if grouped > LABEL_TASK_BYTES_MAX {
                    return Err(json.fault("its groups are larger than an image's may be"));
                }
                if group.bytes <= LABEL_RECORD_BYTES_MAX {
                    group.rings.push(drawn.points);
                    group.raws.push(text.to_owned());
                }
                continue;
            }
            let Some(class) =
                collector
                    .classes
                    .named(&place, &drawn.label, &mut collector.refusals)?
            else {
                continue;
            };
            let row = Row {
                place: &place,
                class: Some(class),
                attrs: drawn.attrs.as_deref(),
                raw: text,
            };
            row.take(path, drawn.shape(size), collector)?;
        }
    }
    for ((label, _), group) in groups {
        let place = &group.place;
        let Some(class) = collector
            .classes
            .named(place, &label, &mut collector.refusals)?
        else {
            continue;
        };
        let raw = match group.raws.as_slice() {
            [one] => one.clone(),
            several => format!("[{}]", several.join(",")),
        };
        let shape = match group.bytes > LABEL_RECORD_BYTES_MAX {
            true => Err((
                Why::TooLarge,
                "its group is larger than a record may be".to_owned(),
            )),
            false => Shape::rings("polygon", &group.rings),
        };
        let row = Row {
            place,
            class: Some(class),
            attrs: group.attrs.as_deref(),
            raw: &raw,
        };
        row.take(path, shape, collector)?;
    }
    Ok(())
}

/// A shape as the file has it.
struct Drawn {
    label: String,
    kind: String,
    points: Vec<f64>,
    group: Option<String>,
    mask: Option<String>,
    attrs: Option<String>,
}

impl Drawn {
    fn of(mut fields: Fields<'_>, place: &str, collector: &mut Collector) -> Option<Self> {
        let label = fields.take("label").and_then(|json| {
            json::as_string(json).or_else(|| json::as_number(json).map(|_| json.to_owned()))
        });
        let points = fields.take("points").and_then(json::as_numbers);
        let (Some(label), Some(points)) = (label, points) else {
            let detail = "it has no label, or its points are not numbers";
            collector.refusals.add(Why::Shape, place, detail);
            return None;
        };
        let kind = fields.take("shape_type").and_then(json::as_string);
        let mask = fields.take("mask").and_then(json::as_string);
        for (name, empty) in [
            ("flags", "{}"),
            ("description", "\"\""),
            ("attributes", "{}"),
        ] {
            if fields.peek(name).is_none_or(|value| value == empty) {
                fields.take(name);
            }
        }
        let group = fields.peek("group_id").map(str::to_owned);
        if group.is_none() {
            fields.take("group_id");
        }
        Some(Self {
            label,
            // Files of early versions have polygons only.
            kind: kind
                .filter(|kind| !kind.is_empty())
                .unwrap_or_else(|| "polygon".into()),
            points,
            group,
            mask,
            attrs: fields.rest(),
        })
    }

    fn shape(&self, size: Option<(i64, i64)>) -> Checked<Shape> {
        let points = &self.points;
        let wrong = || {
            let detail = format!("its {} has {} numbers", self.kind, points.len());
            (Why::Shape, detail)
        };
        if points.len() % 2 == 1 {
            return Err(wrong());
        }
        let at = |n: usize| [points[2 * n], points[2 * n + 1]];
        match (self.kind.as_str(), points.len() / 2) {
            ("rectangle", 2) => Ok(Shape::corners(at(0), at(1))),
            ("rectangle", 4) => {
                let extent = Extent::around(points).unwrap_or(Extent::None);
                Ok(Shape::plain("bbox", extent, None))
            }
            ("rotation", 4) => {
                let side = |a: [f64; 2], b: [f64; 2]| (b[0] - a[0]).hypot(b[1] - a[1]);
                let (a, b, c) = (at(0), at(1), at(2));
                let centre = [(a[0] + c[0]) / 2.0, (a[1] + c[1]) / 2.0];
                let angle = (b[1] - a[1]).atan2(b[0] - a[0]);
                Shape::turned(centre, side(a, b), side(b, c), angle)
            }
            ("circle", 2) => {
                let radius = (at(1)[0] - at(0)[0]).hypot(at(1)[1] - at(0)[1]);
                Shape::ellipse(at(0), radius, radius, 0.0)
            }
            ("polygon" | "quadrilateral", _) => {
                Shape::rings("polygon", std::slice::from_ref(points))
            }
            ("line" | "linestrip", _) => Shape::rings("polyline", std::slice::from_ref(points)),
            ("point", 1) => Ok(Shape::plain(
                "point",
                Extent::Point {
                    x: points[0],
                    y: points[1],
                },
                None,
            )),
            ("points", 1..) => {
                let marked: Vec<f64> = points
                    .chunks_exact(2)
                    .flat_map(|point| [point[0], point[1], 2.0])
                    .collect();
                Shape::keypoints(&marked)
            }
            ("mask", 2) => self.masked(size),
            ("rectangle" | "rotation" | "circle" | "point" | "points" | "mask", _) => Err(wrong()),
            (other, _) => Err((
                Why::Shape,
                format!("there is no shape {other:?} of LabelMe that is read"),
            )),
        }
    }

    /// A mask: a PNG of the part of the image that begins at the first point.
    fn masked(&self, size: Option<(i64, i64)>) -> Checked<Shape> {
        let Some(size) = size else {
            return Err((
                Why::NoSize,
                "it is a mask, and the size of its image is not given".into(),
            ));
        };
        let bytes = self.mask.as_deref().and_then(base64);
        let Some(bytes) = bytes else {
            return Err((Why::Shape, "its mask is not a PNG in base64".into()));
        };
        let read = || -> std::io::Result<(usize, Vec<u8>)> {
            let png = Png::open(Cursor::new(bytes.as_slice()))?;
            let (width, height) = (png.width as usize, png.height as usize);
            let mut pixels = vec![0u8; width * height];
            png.rows(|y, x, step, values| {
                let row = y as usize * width;
                for (at, value) in values.iter().enumerate() {
                    pixels[row + (x as usize + at * step as usize)] = u8::from(*value != 0);
                }
                Ok(())
            })?;
            Ok((width, pixels))
        };
        let (width, pixels) = read().map_err(|e| (Why::Malformed, format!("its mask: {e}")))?;
        let patch = Patch {
            left: self.points[0].min(self.points[2]).round() as i64,
            top: self.points[1].min(self.points[3]).round() as i64,
            width,
            pixels: &pixels,
        };
        patch.shape(size)
    }
}

/// Bytes in base64, in lines or in one; the padding may be missing.
fn base64(text: &str) -> Option<Vec<u8>> {
    const LENIENT: GeneralPurpose = GeneralPurpose::new(
        &STANDARD,
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
    );
    let text: Vec<u8> = text.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
    LENIENT.decode(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_base64() {
        for (folder, name, path) in [
            ("", "a.png", "a.png"),
            ("json", "..\\图像\\板1.png", "图像/板1.png"),
            ("", "..\\图像\\板1.png", "图像/板1.png"),
            ("x/json", "../a.png", "x/a.png"),
        ] {
            assert_eq!(resolve(folder, name), path);
        }
        assert_eq!(base64("aGVsbG8="), Some(b"hello".to_vec()));
        assert_eq!(base64("aGVsbG8"), Some(b"hello".to_vec()));
        assert_eq!(base64("aGVs\nbG8h"), Some(b"hello!".to_vec()));
        assert_eq!(base64("a*"), None);
    }
}

//! Datumaro's JSON (github.com/openvinotoolkit/datumaro): one file a subset, with `categories` and
//! `items`.
//!
//! A label's number is its place in the list of labels. Each item is read as a whole, which bounds
//! what is in memory. In a folder, the files below `annotations` are the subsets, and images are
//! looked for in `images/SUBSET` and `images`.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use serde_json::{Map, Value};

use base::fault::Fault;
use base::limits::{LABEL_RECORD_BYTES_MAX, LABEL_TASK_BYTES_MAX};
use base::names::RelPath;

use super::collect::{ClassRef, Collector, Extent, Sample};
use super::folder::{Input, has_extension};
use super::images_beside::{IMAGE_EXTENSIONS, ImagesBeside, with_extension};
use super::json::{self, Fields, JsonReader};
use super::label_files;
use super::refuse::Why;
use super::shapes::{Checked, Row, Shape};
use super::split;

pub(super) fn read(input: &Input, collector: &mut Collector) -> Result<(), Fault> {
    let Some(inside) = input.folder() else {
        let shown = input.shown();
        let stem = shown.file_stem().unwrap_or_default().to_string_lossy();
        let file = Subset {
            prefix: String::new(),
            split: split::of_name(&stem).map(str::to_owned),
            images: None,
            folder: String::new(),
            below: Vec::new(),
        };
        return file.read(input.file()?, &shown.display().to_string(), collector);
    };
    let is_json = |file: &Path| Ok(has_extension(file, &["json"]));
    let (files, images) = label_files::few(inside, "JSON", is_json, collector)?;
    for file in &files {
        let shown = file.display().to_string();
        let folder = shown.rsplit_once('/').map_or("", |(folder, _)| folder);
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        let folder = match folder.strip_suffix("annotations") {
            Some(above) => above.trim_end_matches('/'),
            None => folder,
        };
        let named = split::of_name(&stem).unwrap_or(&stem);
        let subset = Subset {
            prefix: if files.len() > 1 {
                format!("{shown} ")
            } else {
                String::new()
            },
            split: (stem != "default").then(|| named.to_owned()),
            images: Some(&images),
            folder: folder.to_owned(),
            below: vec![format!("images/{stem}/"), "images/".into(), String::new()],
        };
        subset.read(inside.file(file)?, &shown, collector)?;
    }
    Ok(())
}

/// A file, and what its place in the set says.
struct Subset<'a> {
    /// What stands before the places of records.
    prefix: String,
    split: Option<String>,
    images: Option<&'a ImagesBeside<'a>>,
    folder: String,
    below: Vec<String>,
}

impl Subset<'_> {
    fn read(&self, file: File, shown: &str, collector: &mut Collector) -> Result<(), Fault> {
        let file = collector.utf8(file);
        let inferred = file.inferred();
        let mut json = JsonReader::new(BufReader::with_capacity(256 << 10, file), shown);
        json.record_bytes_max = LABEL_TASK_BYTES_MAX;
        let mut record = Vec::new();
        let mut has_items = false;
        json.expect(b'{')?;
        let mut first = true;
        while json.more(&mut first, b'}')? {
            let key = json.key()?;
            if key != "items" || json.peek()? != Some(b'[') {
                let flags = json.capture(&mut record)?;
                if key == "categories" {
                    let place = format!("{}categories", self.prefix);
                    let refusals = &mut collector.refusals;
                    if let Some(text) = json::vet(&record, flags, &place, refusals) {
                        self.classes(text, &place, collector)?;
                    }
                }
                continue;
            }
            has_items = true;
            json.expect(b'[')?;
            let (mut first_item, mut number) = (true, 0u64);
            while json.more(&mut first_item, b']')? {
                let flags = json.capture(&mut record)?;
                let place = format!("{}items[{number}]", self.prefix);
                number += 1;
                let refusals = &mut collector.refusals;
                let Some(text) = json::vet(&record, flags, &place, refusals) else {
                    continue;
                };
                if let Some(fields) = Fields::parse(text, &place, refusals) {
                    self.item(fields, place, collector)?;
                }
            }
        }
        json.end()?;
        collector.note_encoding(shown, inferred.name());
        if !has_items {
            return Err(Fault::integrity(format!(
                "{shown} has no list \"items\", so it is not Datumaro"
            ))
            .with_next("give Datumaro's JSON file, or name another format"));
        }
        Ok(())
    }

    fn classes(&self, text: &str, place: &str, collector: &mut Collector) -> Result<(), Fault> {
        let categories: Value = serde_json::from_str(text).unwrap_or_default();
        let labels = categories
            .pointer("/label/labels")
            .and_then(Value::as_array);
        for (at, label) in labels.into_iter().flatten().enumerate() {
            let place = format!("{place} labels[{at}]");
            let Some(name) = label.get("name").and_then(Value::as_str) else {
                collector.refusals.add(Why::Shape, place, "it has no name");
                continue;
            };
            let rest: Map<String, Value> = label
                .as_object()
                .into_iter()
                .flatten()
                .filter(|(key, value)| *key != "name" && !is_empty(value))
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect();
            let attrs = (!rest.is_empty()).then(|| Value::Object(rest).to_string());
            let refusals = &mut collector.refusals;
            collector
                .classes
                .declare(&place, at as i64, name, attrs, true, refusals)?;
        }
        Ok(())
    }

    fn item(
        &self,
        mut fields: Fields<'_>,
        mut place: String,
        collector: &mut Collector,
    ) -> Result<(), Fault> {
        let Some(id) = fields.take("id").and_then(json::as_string) else {
            collector
                .refusals
                .add(Why::Shape, place, "its id is not a string");
            return Ok(());
        };
        place.push_str(&format!(" ({})", id.chars().take(100).collect::<String>()));
        let annotations = fields.take("annotations");
        let image = fields.peek("image").or_else(|| fields.peek("media"));
        let image: Value = image
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default();
        let name = image
            .get("path")
            .and_then(Value::as_str)
            .filter(|path| !path.is_empty());
        let name = name.map_or_else(|| id.clone(), |path| path.replace('\\', "/"));
        let name = match self.images {
            None => name,
            Some(images) => self.locate(&name, images),
        };
        let Some(path) = collector.path(&place, &name) else {
            return Ok(());
        };
        let side = |at: usize| {
            image
                .pointer(&format!("/size/{at}"))
                .and_then(Value::as_i64)
                .filter(|n| *n > 0)
        };
        let meta = fields.rest();
        let sample = Sample {
            place: &place,
            declared: true,
            width: side(1),
            height: side(0),
            split: self.split.as_deref(),
            meta: meta.as_deref(),
            ..Sample::default()
        };
        collector.sample(&path, &sample)?;
        let list: Result<Vec<&serde_json::value::RawValue>, _> =
            serde_json::from_str(annotations.unwrap_or("[]"));
        let Ok(list) = list else {
            let detail = "its annotations are not a list";
            collector.refusals.add(Why::Shape, place, detail);
            return Ok(());
        };
        for (at, raw) in list.iter().enumerate() {
            let place = format!("{place} annotations[{at}]");
            let Some(fields) = Fields::parse(raw.get(), &place, &mut collector.refusals) else {
                continue;
            };
            annotation(fields, raw.get(), &place, &path, collector)?;
        }
        Ok(())
    }

    /// The image's path in the folder of the set. An id has no extension.
    fn locate(&self, name: &str, images: &ImagesBeside<'_>) -> String {
        let has_image = |name: &str| has_extension(name.as_ref(), &IMAGE_EXTENSIONS);
        if !has_image(name) {
            let found = with_extension(name, |name| {
                let path = images.locate(&self.folder, &self.below, name, "");
                images.holds(&path).then_some(path)
            });
            if let Some(found) = found {
                return found;
            }
        }
        images.locate(&self.folder, &self.below, name, "")
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(members) => members.is_empty(),
        _ => false,
    }
}

fn annotation(
    mut fields: Fields<'_>,
    raw: &str,
    place: &str,
    path: &RelPath,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let kind = fields
        .take("type")
        .and_then(json::as_string)
        .unwrap_or_default();
    let shape = shape(&kind, &mut fields);
    let class = match fields.take("label_id") {
        None => None,
        Some(id) => match json::as_integer(id) {
            // Datumaro writes -1 for an annotation without a label.
            Some(id) if id < 0 => None,
            Some(id) => Some(ClassRef::Id(id)),
            None => {
                let detail = "its label_id is not a whole number";
                let refusals = &mut collector.refusals;
                refusals.add_record(Why::Shape, place, detail, Some(raw));
                return Ok(());
            }
        },
    };
    for (name, empty) in [
        ("attributes", "{}"),
        ("group", "0"),
        ("z_order", "0"),
        ("object_id", "-1"),
    ] {
        if fields.peek(name).is_none_or(|value| value == empty) {
            fields.take(name);
        }
    }
    let attrs = fields.rest();
    let row = Row {
        place,
        class,
        attrs: attrs.as_deref(),
        raw,
    };
    row.take(path, shape, collector)
}

fn shape(kind: &str, fields: &mut Fields<'_>) -> Checked<Shape> {
    let mut numbers = |name: &str| {
        let list = fields.take(name).and_then(json::as_numbers);
        list.filter(|list| !list.is_empty())
            .ok_or_else(|| (Why::Shape, format!("its {name} is not a list of numbers")))
    };
    match kind {
        "label" | "caption" => Ok(Shape::class()),
        "bbox" | "rotated_bbox" => {
            let list = numbers("bbox")?;
            match *list.as_slice() {
                [x, y, w, h] => Ok(Shape::plain("bbox", Extent::Box { x, y, w, h }, None)),
                [cx, cy, w, h, r] => Shape::turned([cx, cy], w, h, r.to_radians()),
                _ => Err((Why::Shape, format!("its bbox has {} numbers", list.len()))),
            }
        }
        "polygon" => Shape::rings("polygon", &[numbers("points")?]),
        "polyline" => Shape::rings("polyline", &[numbers("points")?]),
        "points" => {
            let points = numbers("points")?;
            let seen = numbers("visibility").unwrap_or_default();
            let marked: Vec<f64> = points
                .chunks_exact(2)
                .enumerate()
                .flat_map(|(at, point)| [point[0], point[1], seen.get(at).copied().unwrap_or(2.0)])
                .collect();
            Shape::keypoints(&marked)
        }
        "ellipse" => match *numbers("points")?.as_slice() {
            [left, top, right, bottom] => Shape::ellipse(
                [(left + right) / 2.0, (top + bottom) / 2.0],
                (right - left) / 2.0,
                (bottom - top) / 2.0,
                0.0,
            ),
            _ => Err((Why::Shape, "its ellipse does not have four numbers".into())),
        },
        "mask" => {
            let rle = fields.take("rle");
            mask(rle, fields.take("bbox"))
        }
        other => Err((
            Why::Shape,
            format!("there is no annotation of the type {other:?} that is read"),
        )),
    }
}

/// COCO's runs as they are, with the box around them.
fn mask(rle: Option<&str>, boxed: Option<&str>) -> Checked<Shape> {
    let Some(rle) = rle else {
        return Err((Why::Shape, "it is a mask without rle".into()));
    };
    if rle.len() > LABEL_RECORD_BYTES_MAX {
        let detail = format!("its rle is larger than {LABEL_RECORD_BYTES_MAX} bytes");
        return Err((Why::TooLarge, detail));
    }
    let extent = match boxed.and_then(json::as_numbers).as_deref() {
        Some([x, y, w, h]) => Extent::Box {
            x: *x,
            y: *y,
            w: *w,
            h: *h,
        },
        _ => super::rle::extent(rle).map_err(|detail| (Why::Shape, detail))?,
    };
    Ok(Shape::plain("rle", extent, Some(rle.to_owned())))
}

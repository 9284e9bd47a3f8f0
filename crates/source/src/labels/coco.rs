//! COCO JSON (cocodataset.org/#format-data): one object with `images`, `annotations` and
//! `categories`.
//!
//! The three lists may come in any order and be of any length, so images and annotations first go
//! through a sort of their own by image id, which brings each annotation to its image, and only
//! then on to the collector.

use std::io::BufReader;

use base::fault::Fault;
use base::limits::LABEL_SORT_BYTES;
use base::names::RelPath;
use base::omitted::Category;

use super::collect::{
    Annotation, AnnotationRecord, ClassRef, Collector, Extent, Sample, decode, id_text,
};
use super::folder::Input;
use super::json::{self, Fields, JsonReader};
use super::refuse::Why;
use super::sort::Sorter;

/// Behind the image's id in the sort's keys: an image comes before its annotations.
const IMAGE: u8 = 0;
const ANNOTATION: u8 = 1;

/// An image between the sort's ends.
#[derive(serde::Serialize, serde::Deserialize)]
struct ImageRecord<'a> {
    path: &'a str,
    sample: Sample<'a>,
}

pub(super) fn read(input: &Input, collector: &mut Collector) -> Result<(), Fault> {
    let mut json = JsonReader::new(
        BufReader::with_capacity(256 << 10, input.file()?),
        input.shown().display().to_string(),
    );
    let mut by_image = Sorter::new(&collector.scratch, LABEL_SORT_BYTES);
    let mut seen: Vec<String> = Vec::new();
    let mut record = Vec::new();
    json.expect(b'{')?;
    let mut first = true;
    while json.more(&mut first, b'}')? {
        let key = json.key()?;
        if !["images", "annotations", "categories"].contains(&key.as_str()) {
            json.capture(&mut record)?;
            if !matches!(record.as_slice(), b"{}" | b"[]" | b"null" | b"\"\"") {
                collector.omitted.add(Category::UnreadMembers, key);
            }
            continue;
        }
        if seen.contains(&key) {
            return Err(json.fault(format_args!("the list {key:?} comes twice")));
        }
        if json.peek()? != Some(b'[') {
            return Err(json.fault(format_args!("{key:?} is not a list")));
        }
        json.expect(b'[')?;
        let mut first_item = true;
        let mut number = 0u64;
        while json.more(&mut first_item, b']')? {
            let flags = json.capture(&mut record)?;
            let place = format!("{key}[{number}]");
            number += 1;
            let Some(text) = json::vet(&record, flags, &place, &mut collector.refusals) else {
                continue;
            };
            let Some(fields) = Fields::parse(text, &place, &mut collector.refusals) else {
                continue;
            };
            match key.as_str() {
                "images" => image(text, fields, place, collector, &mut by_image)?,
                "annotations" => annotation(text, fields, place, collector, &mut by_image)?,
                _ => category(fields, &place, collector)?,
            }
        }
        seen.push(key);
    }
    json.end()?;
    if !seen.iter().any(|key| key == "images") {
        return Err(
            Fault::integrity("it has no list \"images\", so it is not COCO").with_next(
                "give a COCO file with images, annotations and categories, or name another format",
            ),
        );
    }
    join(by_image, collector)
}

fn image(
    text: &str,
    mut fields: Fields<'_>,
    mut place: String,
    collector: &mut Collector,
    by_image: &mut Sorter,
) -> Result<(), Fault> {
    let Some(id) = fields.take("id").and_then(id_text) else {
        collector.refusals.add(
            Why::Shape,
            place,
            "its id is not a whole number or a string",
        );
        return Ok(());
    };
    place.push_str(&format!(" (id {id})"));
    let mut sample = Sample {
        place: &place,
        declared: true,
        meta: Some(text),
        ..Sample::default()
    };
    let split = fields.take("split").and_then(json::as_string);
    sample.split = split.as_deref();
    let path = image_path(&mut fields, &mut sample, collector);
    // A refused image is kept by its id, so that its annotations are not called orphans on top.
    let record = ImageRecord {
        path: path.as_ref().map_or("", RelPath::as_str),
        sample,
    };
    let record = postcard::to_stdvec(&record)
        .map_err(|error| Fault::internal(format!("encode an image row: {error}")))?;
    by_image.push(&image_key(&id, IMAGE), &record)
}

/// The image's path and size; `None` when one of them was refused.
fn image_path(
    fields: &mut Fields<'_>,
    sample: &mut Sample<'_>,
    collector: &mut Collector,
) -> Option<RelPath> {
    let Some(name) = fields.take("file_name").and_then(json::as_string) else {
        collector
            .refusals
            .add(Why::Shape, sample.place, "its file_name is not a string");
        return None;
    };
    for (slot, name) in [(&mut sample.width, "width"), (&mut sample.height, "height")] {
        let Some(json) = fields.take(name) else {
            continue;
        };
        match json::as_integer(json) {
            Some(n) if n > 0 => *slot = Some(n),
            _ => {
                collector.refusals.add(
                    Why::Shape,
                    sample.place,
                    format_args!("its {name} is {json}, not a number of pixels"),
                );
                return None;
            }
        }
    }
    collector.path(sample.place, &name)
}

fn annotation(
    text: &str,
    mut fields: Fields<'_>,
    mut place: String,
    collector: &mut Collector,
    by_image: &mut Sorter,
) -> Result<(), Fault> {
    if let Some(id) = fields.take("id") {
        let Some(id) = id_text(id) else {
            collector.refusals.add(
                Why::Shape,
                place,
                "its id is not a whole number or a string",
            );
            return Ok(());
        };
        place.push_str(&format!(" (id {id})"));
        collector.annotation_id(&place, &id)?;
    }
    let Some(image) = fields.take("image_id").and_then(id_text) else {
        collector.refusals.add(
            Why::Shape,
            place,
            "its image_id is not a whole number or a string",
        );
        return Ok(());
    };
    let class = match fields.take("category_id") {
        None => None,
        Some(id) => match json::as_integer(id) {
            Some(id) => Some(ClassRef::Id(id)),
            None => {
                collector
                    .refusals
                    .add(Why::Shape, place, "its category_id is not a whole number");
                return Ok(());
            }
        },
    };
    let shape = match shape(&mut fields, class) {
        Ok(shape) => shape,
        Err(problem) => {
            collector.refusals.add(Why::Shape, place, problem);
            return Ok(());
        }
    };
    let attrs = fields.rest();
    let annotation = Annotation {
        place: &place,
        class,
        kind: shape.kind,
        extent: shape.extent,
        geom: shape.geom,
        attrs: attrs.as_deref(),
        raw: text,
    };
    if let Some(record) = collector.encode_annotation(&annotation)? {
        by_image.push(&image_key(&image, ANNOTATION), record)?;
    }
    Ok(())
}

struct Shape<'a> {
    kind: &'static str,
    extent: Extent,
    geom: Option<&'a str>,
}

/// What kind of annotation it is, from the members that it has.
fn shape<'a>(fields: &mut Fields<'a>, class: Option<ClassRef>) -> Result<Shape<'a>, &'static str> {
    let keypoints = fields.take("keypoints").filter(|json| *json != "[]");
    let segmentation = fields
        .take("segmentation")
        .filter(|json| !matches!(*json, "[]" | "[[]]" | "{}"));
    let mut extent = match fields.take("bbox").map(json::as_numbers) {
        None => Extent::None,
        Some(Some(numbers)) => match numbers[..] {
            [] => Extent::None,
            [x, y, w, h] => Extent::Box { x, y, w, h },
            _ => return Err("its bbox is not a list of four numbers"),
        },
        Some(None) => return Err("its bbox is not a list of four numbers"),
    };
    if let Some(json) = keypoints {
        if json::as_numbers(json).is_none_or(|numbers| numbers.len() % 3 != 0) {
            return Err("its keypoints are not a list of x, y, v");
        }
        return Ok(Shape {
            kind: "keypoints",
            extent,
            geom: Some(json),
        });
    }
    match segmentation {
        Some(json) if json.starts_with('{') => Ok(Shape {
            kind: "rle",
            extent,
            geom: Some(json),
        }),
        Some(json) => {
            // The points are only parsed where they are needed: half of the file are points.
            if extent == Extent::None {
                let points = json::as_numbers(json).filter(|points| points.len() % 2 == 0);
                extent = points
                    .and_then(|p| Extent::around(&p))
                    .ok_or("its segmentation is not a list of rings of x, y")?;
            } else if !json.starts_with("[[") {
                return Err("its segmentation is not a list of rings of x, y");
            }
            Ok(Shape {
                kind: "polygon",
                extent,
                geom: Some(json),
            })
        }
        None if extent != Extent::None => Ok(Shape {
            kind: "bbox",
            extent,
            geom: None,
        }),
        None => Ok(Shape {
            kind: if class.is_some() { "class" } else { "other" },
            extent,
            geom: None,
        }),
    }
}

fn category(mut fields: Fields<'_>, place: &str, collector: &mut Collector) -> Result<(), Fault> {
    let Some(id) = fields.take("id").and_then(json::as_integer) else {
        collector
            .refusals
            .add(Why::Shape, place, "its id is not a whole number");
        return Ok(());
    };
    let Some(name) = fields.take("name").and_then(json::as_string) else {
        collector
            .refusals
            .add(Why::Shape, place, "its name is not a string");
        return Ok(());
    };
    collector.classes.declare(
        place,
        id,
        &name,
        fields.rest(),
        false,
        &mut collector.refusals,
    )
}

/// The id, then 0 (which no id's text holds), then what it is.
fn image_key(id: &str, what: u8) -> Vec<u8> {
    let mut key = id.as_bytes().to_vec();
    key.extend([0, what]);
    key
}

/// Brings each annotation to its image and both to the collector.
fn join(by_image: Sorter, collector: &mut Collector) -> Result<(), Fault> {
    let mut rows = by_image.finish()?;
    // The image whose annotations are coming; no path when it was refused.
    let mut image: Option<(Vec<u8>, Option<RelPath>)> = None;
    while let Some((key, record)) = rows.next()? {
        let (id, what) = key.split_at(key.len().saturating_sub(2));
        let known = image.as_ref().filter(|(known, _)| known == id);
        if what == [0, IMAGE] {
            let record: ImageRecord<'_> = decode(record)?;
            if known.is_some() {
                collector.refusals.add(
                    Why::DuplicateImage,
                    record.sample.place,
                    "another image has its id already",
                );
                continue;
            }
            let path = if record.path.is_empty() {
                None
            } else {
                Some(record.path.parse::<RelPath>()?)
            };
            if let Some(path) = &path {
                collector.sample(path, &record.sample)?;
            }
            image = Some((id.to_vec(), path));
            continue;
        }
        match known {
            Some((_, Some(path))) => collector.encoded_annotation(path, record)?,
            Some((_, None)) => {}
            None => {
                let place = decode::<AnnotationRecord<'_>>(record)?.place;
                let id = String::from_utf8_lossy(id);
                collector.refusals.add(
                    Why::Orphan,
                    place,
                    format_args!("there is no image with the id {id}"),
                );
            }
        }
    }
    Ok(())
}

//! Pascal VOC: a folder of XML files, one an image (host.robots.ox.ac.uk/pascal/VOC, the
//! development kit's annotation form).
//!
//! Boxes name their first and last pixel, counted from 1: left is `xmin - 1`, width `xmax - xmin +
//! 1`. The sample is `filename`, below the folder of the XML file relative to the root, where
//! `Annotations` stands for `JPEGImages` when the root has that folder (else it is left out).
//! `ImageSets/Main/{train,val,test}.txt` give the splits.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value};

use crate::inside::Inside;
use base::fault::Fault;
use base::omitted::Category;

use super::collect::{Annotation, Collector, Extent, Sample};
use super::folder::{Input, Walk, has_extension};
use super::refuse::Why;
use super::yolo::IMAGE_EXTENSIONS;
use super::{text, xml};

/// The splits that the development kit names.
const SPLITS: [&str; 3] = ["train", "val", "test"];

pub(super) fn read(input: &Input, collector: &mut Collector) -> Result<(), Fault> {
    let Some(folder) = input.folder() else {
        return Err(Fault::integrity(
            "Pascal VOC labels are a folder of XML files, and this is none",
        )
        .with_next("give the folder"));
    };
    let splits = read_splits(folder)?;
    let has_images = folder.is_dir("JPEGImages");
    let mut files = 0u64;
    let mut walk = Walk::new(folder);
    while let Some(file) = walk.next() {
        let file = file?;
        if !has_extension(&file, &["xml"]) {
            if !is_read(&file) {
                walk.omitted
                    .add(Category::UnreadFiles, file.display().to_string());
            }
            continue;
        }
        files += 1;
        let Some(place) = file.to_str() else {
            collector
                .refusals
                .add(Why::BadPath, file.display(), "the file's name is not UTF-8");
            continue;
        };
        let Some(text) = text::one_of_many(folder, &file, place, &mut collector.refusals)? else {
            continue;
        };
        match xml::parse(&text) {
            Ok((name, value)) if name == "annotation" => {
                image(place, value, has_images, &splits, collector)?;
            }
            Ok((name, _)) => collector.refusals.add(
                Why::Shape,
                place,
                format_args!("its root is <{name}>, not <annotation>"),
            ),
            Err((why, detail)) => collector.refusals.add(why, place, detail),
        }
    }
    collector.omitted.merge(walk.omitted);
    if files == 0 {
        return Err(Fault::integrity("the folder holds no XML file")
            .with_next("give the folder that holds the Pascal VOC XML files"));
    }
    Ok(())
}

/// Whether a file beside the XML files is read, or is an image of the dataset. Masks of the
/// segmentation task are neither.
fn is_read(file: &Path) -> bool {
    let is_mask = file.components().any(|part| {
        part.as_os_str()
            .as_encoded_bytes()
            .starts_with(b"Segmentation")
    });
    let is_split = SPLITS
        .iter()
        .any(|split| file == Path::new("ImageSets/Main").join(format!("{split}.txt")));
    is_split || (!is_mask && has_extension(file, &IMAGE_EXTENSIONS))
}

/// Stem of the image to its split.
fn read_splits(folder: &Inside) -> Result<HashMap<String, &'static str>, Fault> {
    let mut splits = HashMap::new();
    for split in SPLITS {
        let list = Path::new("ImageSets/Main").join(format!("{split}.txt"));
        // A link that leaves the folder is there too, and is refused.
        if folder.exists(&list) {
            let text = text::side_file(folder, &list)?;
            splits.extend(text.split_whitespace().map(|stem| (stem.to_owned(), split)));
        }
    }
    Ok(splits)
}

fn image(
    place: &str,
    annotation: Value,
    has_images: bool,
    splits: &HashMap<String, &'static str>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let Value::Object(mut annotation) = annotation else {
        collector
            .refusals
            .add(Why::Shape, place, "its annotation is empty");
        return Ok(());
    };
    let objects = match annotation.shift_remove("object") {
        None => Vec::new(),
        Some(Value::Array(objects)) => objects,
        Some(object) => vec![object],
    };
    let Some(filename) = annotation
        .get("filename")
        .and_then(Value::as_str)
        .filter(|name| !name.is_empty())
    else {
        collector
            .refusals
            .add(Why::Shape, place, "it has no filename");
        return Ok(());
    };
    let folder = place.rsplit_once('/').map_or("", |(folder, _)| folder);
    let folder = match folder.strip_prefix("Annotations") {
        Some(below) if below.is_empty() || below.starts_with('/') => {
            format!("{}{below}", if has_images { "JPEGImages" } else { "" })
        }
        _ => folder.to_owned(),
    };
    let name = format!("{folder}/{filename}");
    let Some(path) = collector.path(place, name.trim_start_matches('/')) else {
        return Ok(());
    };
    let size = |name: &str| {
        let text = annotation
            .get("size")
            .and_then(|size| size.get(name))
            .and_then(Value::as_str);
        // Many tools write 0 for a size that they do not know.
        text.and_then(|text| text.parse::<f64>().ok())
            .filter(|n| *n >= 1.0 && *n <= f64::from(i32::MAX))
            .map(|n| n as i64)
    };
    let (width, height) = (size("width"), size("height"));
    let stem = place
        .rsplit('/')
        .next()
        .and_then(|name| name.rsplit_once('.'))
        .map_or("", |(stem, _)| stem);
    let meta = Value::Object(annotation).to_string();
    let sample = Sample {
        place,
        declared: true,
        width,
        height,
        split: splits.get(stem).copied(),
        meta: Some(&meta),
        ..Sample::default()
    };
    collector.sample(&path, &sample)?;
    for (at, value) in objects.iter().enumerate() {
        let place = format!("{place} object[{at}]");
        let raw = value.to_string();
        if raw.len() > base::limits::LABEL_RECORD_BYTES_MAX {
            collector.refusals.add(
                Why::TooLarge,
                place,
                "the object is larger than a record may be",
            );
            continue;
        }
        let (name, extent) = match object(value) {
            Ok(found) => found,
            Err((why, detail)) => {
                collector.refusals.add(why, place, detail);
                continue;
            }
        };
        let Some(class) = collector
            .classes
            .named(&place, name, &mut collector.refusals)?
        else {
            continue;
        };
        let rest: Map<String, Value> = value
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(k, _)| *k != "name" && *k != "bndbox")
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        let attrs = (!rest.is_empty()).then(|| Value::Object(rest).to_string());
        let kind = if extent == Extent::None {
            "class"
        } else {
            "bbox"
        };
        let row = Annotation {
            place: &place,
            class: Some(class),
            kind,
            extent,
            geom: None,
            attrs: attrs.as_deref(),
            raw: &raw,
        };
        collector.annotation(&path, &row)?;
    }
    Ok(())
}

/// The class and the box of an object.
fn object(object: &Value) -> Result<(&str, Extent), (Why, String)> {
    let Some(name) = object.get("name").and_then(Value::as_str) else {
        return Err((Why::Shape, "it has no name".into()));
    };
    let Some(bndbox) = object.get("bndbox") else {
        return Ok((name, Extent::None));
    };
    let edge = |edge: &str| {
        let text = bndbox.get(edge).and_then(Value::as_str).unwrap_or_default();
        match text.parse::<f64>() {
            Ok(n) if n.is_finite() => Ok(n),
            Ok(_) => Err((Why::NotFinite, format!("its {edge} is {text}"))),
            Err(_) => Err((Why::Shape, format!("its {edge} is {text:?}, not a number"))),
        }
    };
    let (left, top, right, bottom) = (edge("xmin")?, edge("ymin")?, edge("xmax")?, edge("ymax")?);
    Ok((
        name,
        Extent::Box {
            x: left - 1.0,
            y: top - 1.0,
            w: right - left + 1.0,
            h: bottom - top + 1.0,
        },
    ))
}

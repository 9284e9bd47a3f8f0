//! The JSON of VGG Image Annotator 1 and 2: a project (`_via_img_metadata`), or the annotations
//! alone (one member an image).
//!
//! Each image is read as a whole, which bounds what is in memory. Sizes of images are not in it.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use serde_json::{Map, Value};

use base::fault::Fault;
use base::limits::LABEL_TASK_BYTES_MAX;

use super::collect::{Collector, Sample};
use super::folder::{Input, has_extension};
use super::images_beside::ImagesBeside;
use super::json::{self, Fields, JsonReader};
use super::refuse::Why;
use super::shapes::{Row, Shape};
use super::{label_files, split, via};

type Json = JsonReader<BufReader<super::encoding::Utf8Reader<File>>>;

pub(super) fn read(input: &Input, collector: &mut Collector) -> Result<(), Fault> {
    let Some(inside) = input.folder() else {
        let shown = input.shown().display().to_string();
        return file(input.file()?, &shown, None, collector);
    };
    let is_json = |file: &Path| Ok(has_extension(file, &["json"]));
    let (files, images) = label_files::few(inside, "JSON", is_json, collector)?;
    let path = match files.as_slice() {
        [path] => path,
        [] => {
            return Err(Fault::integrity("the folder holds no JSON file")
                .with_next("give the JSON file of VGG Image Annotator"));
        }
        [first, ..] => {
            return Err(Fault::integrity(format!(
                "the folder holds several JSON files, such as {}",
                first.display()
            ))
            .with_next("give the one file of VGG Image Annotator"));
        }
    };
    let shown = path.display().to_string();
    let folder = shown.rsplit_once('/').map_or("", |(folder, _)| folder);
    file(
        inside.file(path)?,
        &shown,
        Some((&images, folder)),
        collector,
    )
}

/// Where images are looked for: in a folder, below the folder of the file.
type Images<'a> = Option<(&'a ImagesBeside<'a>, &'a str)>;

fn file(
    file: File,
    shown: &str,
    images: Images<'_>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let file = collector.utf8(file);
    let inferred = file.inferred();
    let mut json = JsonReader::new(BufReader::with_capacity(256 << 10, file), shown);
    json.record_bytes_max = LABEL_TASK_BYTES_MAX;
    let mut record = Vec::new();
    json.expect(b'{')?;
    let (mut first, mut taken) = (true, 0u64);
    while json.more(&mut first, b'}')? {
        let key = json.key()?;
        if key == "_via_img_metadata" && json.peek()? == Some(b'{') {
            json.expect(b'{')?;
            let mut first = true;
            while json.more(&mut first, b'}')? {
                let key = json.key()?;
                image(&mut json, &key, &mut record, images, collector)?;
            }
            taken += 1;
        } else if key.starts_with("_via") {
            json.capture(&mut record)?;
        } else {
            image(&mut json, &key, &mut record, images, collector)?;
            taken += 1;
        }
    }
    json.end()?;
    collector.note_encoding(shown, inferred.name());
    if taken == 0 {
        return Err(Fault::integrity(format!(
            "{shown} holds no images, so it is not of VGG Image Annotator"
        ))
        .with_next("save the project again, or export the annotations as JSON"));
    }
    Ok(())
}

fn image(
    json: &mut Json,
    key: &str,
    record: &mut Vec<u8>,
    images: Images<'_>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let flags = json.capture(record)?;
    let place: String = key.chars().take(200).collect();
    let Some(text) = json::vet(record, flags, &place, &mut collector.refusals) else {
        return Ok(());
    };
    let Some(mut fields) = Fields::parse(text, &place, &mut collector.refusals) else {
        return Ok(());
    };
    let Some(name) = fields.take("filename").and_then(json::as_string) else {
        collector
            .refusals
            .add(Why::Shape, place, "its filename is not a string");
        return Ok(());
    };
    let regions = fields.take("regions");
    let found = match images {
        Some((images, folder)) if !super::path_rules::is_of_one_machine(&name) => {
            let name = name.replace('\\', "/");
            images.locate(folder, &["images/".to_owned(), String::new()], &name, "")
        }
        _ => name,
    };
    let Some(path) = collector.path(&place, &found) else {
        return Ok(());
    };
    let meta = fields.rest();
    let sample = Sample {
        place: &place,
        declared: true,
        split: split::of_folder(path.as_str()),
        split_from: super::collect::SplitFrom::Folder,
        meta: meta.as_deref(),
        ..Sample::default()
    };
    collector.sample(&path, &sample)?;
    // Version 2 has a list, version 1 an object of numbered regions.
    let list: Vec<&serde_json::value::RawValue> = match regions {
        None => Vec::new(),
        Some(text) if text.starts_with('[') => serde_json::from_str(text).unwrap_or_default(),
        Some(text) => match Fields::parse(text, &place, &mut collector.refusals) {
            Some(fields) => fields.into_values(),
            None => return Ok(()),
        },
    };
    for (at, raw) in list.iter().enumerate() {
        let place = format!("{place} regions[{at}]");
        let raw = raw.get();
        let Ok(Value::Object(mut region)) = serde_json::from_str(raw) else {
            let detail = "it is not an object";
            let refusals = &mut collector.refusals;
            refusals.add_record(Why::Shape, place, detail, Some(raw));
            continue;
        };
        let mut object = |name: &str| match region.remove(name) {
            Some(Value::Object(members)) => members,
            _ => Map::new(),
        };
        let (drawn, attributes) = (object("shape_attributes"), object("region_attributes"));
        let class = match via::class(&attributes) {
            None => None,
            Some(name) => {
                let refusals = &mut collector.refusals;
                match collector.classes.named(&place, &name, refusals)? {
                    None => continue,
                    class => class,
                }
            }
        };
        let attrs = (!attributes.is_empty()).then(|| Value::Object(attributes).to_string());
        let row = Row {
            place: &place,
            class,
            attrs: attrs.as_deref(),
            raw,
        };
        let shape = via::shape(&drawn).map(|shape| shape.unwrap_or_else(Shape::class));
        row.take(&path, shape, collector)?;
    }
    Ok(())
}

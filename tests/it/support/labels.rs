//! Label files of every format, written from one list of boxes, and the expected rows.

use std::path::Path;

use rand::Rng;
use serde_json::{Map, Value, json};

use super::data::{Photo, rng, write};
use super::postgres::{Postgres, sqlite_rows};

/// The classes of all label fixtures, with their COCO ids.
pub(crate) const CLASSES: [(i64, &str); 3] = [(3, "划伤"), (7, "particle"), (20, "mura")];

/// One box.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Mark {
    pub(crate) photo: Photo,
    /// Index into [`CLASSES`].
    pub(crate) class: usize,
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) w: f64,
    pub(crate) h: f64,
    /// Whether it has a polygon in addition to the box.
    pub(crate) polygon: bool,
}

impl Mark {
    /// The box's corners as a polygon.
    fn corners(&self) -> Value {
        let (right, bottom) = (self.x + self.w, self.y + self.h);
        json!([[self.x, self.y, right, self.y, right, bottom, self.x, bottom]])
    }
}

/// One to `most` boxes for each photo, in whole and half pixels so that no format rounds them; some
/// have a polygon too.
pub(crate) fn marks(photos: &[Photo], most: usize) -> Vec<Mark> {
    let mut rng = rng("marks");
    let mut marks = Vec::new();
    for photo in photos {
        for i in 0..rng.random_range(1..=most) {
            let x = f64::from(rng.random_range(0..photo.width / 2));
            let y = f64::from(rng.random_range(0..photo.height / 2)) + 0.5;
            let w = f64::from(rng.random_range(1..photo.width / 2));
            let h = f64::from(rng.random_range(1..photo.height / 2 - 1));
            marks.push(Mark {
                photo: photo.clone(),
                class: rng.random_range(0..CLASSES.len()),
                x,
                y,
                w,
                h,
                polygon: i == 5,
            });
        }
    }
    marks
}

/// A COCO document.
pub(crate) fn coco(photos: &[Photo], marks: &[Mark]) -> Value {
    let id = |photo: &Photo| {
        photos
            .iter()
            .position(|p| p == photo)
            .expect("a mark is on a photo") as i64
            * 10
            + 5
    };
    let images: Vec<Value> = photos
        .iter()
        .map(|p| json!({ "id": id(p), "file_name": p.path, "width": p.width, "height": p.height }))
        .collect();
    let annotations: Vec<Value> = marks
        .iter()
        .enumerate()
        .map(|(i, m)| {
            let mut annotation = json!({
                "id": i as i64 + 1000, "image_id": id(&m.photo), "category_id": CLASSES[m.class].0,
                "bbox": [m.x, m.y, m.w, m.h], "area": m.w * m.h, "iscrowd": 0,
            });
            if m.polygon {
                annotation["segmentation"] = m.corners();
            }
            annotation
        })
        .collect();
    let categories: Vec<Value> = CLASSES
        .iter()
        .map(|(id, name)| json!({ "id": id, "name": name }))
        .collect();
    json!({ "info": { "description": "缺陷" }, "images": images, "annotations": annotations, "categories": categories })
}

/// Writes a JSON document.
pub(crate) fn write_json(path: &Path, document: &Value) {
    write(path, document.to_string().as_bytes());
}

/// A CSV with a header, one line for each box.
pub(crate) fn csv(marks: &[Mark]) -> String {
    let mut text = String::from("sample_path,class,x,y,w,h\n");
    for m in marks {
        text += &format!(
            "{},{},{},{},{},{}\n",
            m.photo.path, CLASSES[m.class].1, m.x, m.y, m.w, m.h
        );
    }
    text
}

/// The same as JSON Lines.
pub(crate) fn jsonl(marks: &[Mark]) -> String {
    let line = |m: &Mark| {
        json!({ "sample_path": m.photo.path, "class": CLASSES[m.class].1, "x": m.x, "y": m.y, "w": m.w, "h": m.h }).to_string() + "\n"
    };
    marks.iter().map(line).collect()
}

/// A Label Studio export: coordinates are percent of the image.
pub(crate) fn label_studio(photos: &[Photo], marks: &[Mark]) -> Value {
    let tasks = photos.iter().enumerate().map(|(i, photo)| {
        let (width, height) = (f64::from(photo.width), f64::from(photo.height));
        let results: Vec<Value> = marks
            .iter()
            .filter(|m| m.photo == *photo)
            .enumerate()
            .map(|(n, m)| {
                json!({
                    "id": format!("r{i}-{n}"), "type": "rectanglelabels", "from_name": "label", "to_name": "image",
                    "original_width": photo.width, "original_height": photo.height, "image_rotation": 0,
                    "value": {
                        "x": m.x / width * 100.0, "y": m.y / height * 100.0, "width": m.w / width * 100.0, "height": m.h / height * 100.0,
                        "rotation": 0, "rectanglelabels": [CLASSES[m.class].1],
                    },
                })
            })
            .collect();
        json!({ "id": i + 1, "data": { "image": photo.path }, "annotations": [{ "id": i + 100, "completed_by": 1, "result": results }] })
    });
    Value::Array(tasks.collect())
}

/// A Pascal VOC folder: one XML for each image; corners; the first pixel is 1.
pub(crate) fn voc(root: &Path, photos: &[Photo], marks: &[Mark]) {
    for photo in photos {
        let objects: String = marks
            .iter()
            .filter(|m| m.photo == *photo)
            .map(|m| {
                format!(
                    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>",
                    CLASSES[m.class].1,
                    m.x + 1.0,
                    m.y.floor() + 1.0,
                    m.x + m.w,
                    m.y.floor() + m.h
                )
            })
            .collect();
        let name = Path::new(&photo.path)
            .file_name()
            .expect("a photo has a name")
            .to_str()
            .expect("UTF-8");
        let xml = format!(
            "<annotation><folder>x</folder><filename>{}</filename><size><width>{}</width><height>{}</height><depth>1</depth></size>{objects}\
             </annotation>\n",
            photo.path, photo.width, photo.height
        );
        write(
            &root
                .join("Annotations")
                .join(Path::new(name).with_extension("xml")),
            xml.as_bytes(),
        );
    }
}

/// A YOLO folder with its images: centre and size as fractions, the class by its line in the names.
pub(crate) fn yolo(root: &Path, dataset: &Path, photos: &[Photo], marks: &[Mark], names: bool) {
    for photo in photos {
        let (width, height) = (f64::from(photo.width), f64::from(photo.height));
        let lines: String = marks
            .iter()
            .filter(|m| m.photo == *photo)
            .map(|m| {
                let (x, y) = ((m.x + m.w / 2.0) / width, (m.y + m.h / 2.0) / height);
                format!("{} {x} {y} {} {}\n", m.class, m.w / width, m.h / height)
            })
            .collect();
        let name = Path::new(&photo.path)
            .file_name()
            .expect("a photo has a name");
        write(
            &root
                .join("labels/train")
                .join(Path::new(name).with_extension("txt")),
            lines.as_bytes(),
        );
        write(
            &root.join("images/train").join(name),
            &std::fs::read(dataset.join(&photo.path)).expect("read a photo"),
        );
    }
    if names {
        let list: String = CLASSES
            .iter()
            .enumerate()
            .map(|(i, (_, name))| format!("  {i}: {name}\n"))
            .collect();
        write(
            &root.join("data.yaml"),
            format!("path: .\ntrain: images/train\nnames:\n{list}").as_bytes(),
        );
    }
}

/// One row of the views, in the form that tests compare.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    pub(crate) label_set: String,
    pub(crate) version: String,
    pub(crate) sample_path: String,
    pub(crate) sample_hash: Option<String>,
    pub(crate) class: String,
    pub(crate) kind: String,
    pub(crate) bbox: [f64; 4],
    /// The exact shape, as JSON; null: none.
    pub(crate) geom: Value,
    /// Attributes, as JSON; null: none.
    pub(crate) attrs: Value,
    pub(crate) raw: Value,
}

/// The fields of a COCO annotation that have their own column; the other fields are attributes.
const COCO_COLUMNS: [&str; 6] = [
    "id",
    "image_id",
    "category_id",
    "bbox",
    "segmentation",
    "keypoints",
];

/// The attributes of a COCO annotation.
fn coco_attrs(annotation: &Value) -> Value {
    let members = annotation
        .as_object()
        .expect("an annotation is an object")
        .iter();
    let rest: Map<String, Value> = members
        .filter(|(key, _)| !COCO_COLUMNS.contains(&key.as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    if rest.is_empty() {
        Value::Null
    } else {
        Value::Object(rest)
    }
}

/// The rows that a COCO document for a dataset must lead to as this version of a set
/// (`set:version`), in the views' order of samples and boxes.
pub(crate) fn coco_rows(
    document: &Value,
    marks: &[Mark],
    dataset: &Path,
    set_and_version: &str,
) -> Vec<Row> {
    let (label_set, version) = set_and_version.split_once(':').expect("set:version");
    let annotations = document["annotations"]
        .as_array()
        .expect("a COCO document has annotations");
    let mut rows: Vec<Row> = marks
        .iter()
        .zip(annotations)
        .map(|(m, raw)| Row {
            label_set: label_set.into(),
            version: version.into(),
            sample_path: m.photo.path.clone(),
            sample_hash: Some(
                blake3::hash(&std::fs::read(dataset.join(&m.photo.path)).expect("read a photo"))
                    .to_hex()
                    .to_string(),
            ),
            class: CLASSES[m.class].1.into(),
            kind: if m.polygon { "polygon" } else { "bbox" }.into(),
            bbox: [m.x, m.y, m.w, m.h],
            geom: if m.polygon { m.corners() } else { Value::Null },
            attrs: coco_attrs(raw),
            raw: raw.clone(),
        })
        .collect();
    sort(&mut rows);
    rows
}

fn sort(rows: &mut [Row]) {
    rows.sort_by_cached_key(|row| {
        (
            row.sample_path.clone(),
            row.raw["id"].as_i64(),
            row.raw.to_string(),
        )
    });
}

/// The database of a site's labels.
pub(crate) enum Reader<'a> {
    /// A database of a PostgreSQL.
    Postgres(&'a Postgres, &'a str),
    /// The embedded SQLite file.
    Sqlite(&'a Path),
}

impl Reader<'_> {
    /// The result of a query over `annotations` or `current_annotations`; `{}` in it stands for the
    /// schema.
    #[track_caller]
    pub(crate) fn query(&self, sql: &str) -> Vec<Value> {
        match self {
            Reader::Postgres(postgres, database) => {
                postgres.rows(database, &sql.replace("{}", "packhorse."))
            }
            Reader::Sqlite(file) => sqlite_rows(file, &sql.replace("{}", "")),
        }
    }

    /// The rows of one version, from the view of all versions.
    #[track_caller]
    pub(crate) fn version(&self, set: &str, version: &str) -> Vec<Row> {
        self.rows(&format!(
            "{{}}annotations WHERE label_set = '{set}' AND version = '{version}'"
        ))
    }

    /// The rows of the active version.
    #[track_caller]
    pub(crate) fn current(&self, set: &str) -> Vec<Row> {
        self.rows(&format!(
            "{{}}current_annotations WHERE label_set = '{set}'"
        ))
    }

    fn rows(&self, from: &str) -> Vec<Row> {
        let columns = "label_set, version, sample_path, sample_hash, class, kind, x, y, w, h, geom, attrs, raw";
        let mut rows: Vec<Row> = self
            .query(&format!("SELECT {columns} FROM {from}"))
            .iter()
            .map(row)
            .collect();
        sort(&mut rows);
        rows
    }
}

/// PostgreSQL returns JSON columns as JSON, SQLite as text.
fn embedded(value: &Value) -> Value {
    match value {
        Value::String(text) => serde_json::from_str(text).unwrap_or_else(|_| value.clone()),
        other => other.clone(),
    }
}

#[track_caller]
fn row(value: &Value) -> Row {
    let text = |key: &str| {
        value[key]
            .as_str()
            .unwrap_or_else(|| panic!("{key} is not text in {value}"))
            .to_owned()
    };
    let number = |key: &str| {
        value[key]
            .as_f64()
            .unwrap_or_else(|| panic!("{key} is not a number in {value}"))
    };
    Row {
        label_set: text("label_set"),
        version: text("version"),
        sample_path: text("sample_path"),
        // bytea prints as \x…
        sample_hash: value["sample_hash"]
            .as_str()
            .map(|h| h.trim_start_matches("\\x").to_owned()),
        class: text("class"),
        kind: text("kind"),
        bbox: [number("x"), number("y"), number("w"), number("h")],
        geom: embedded(&value["geom"]),
        attrs: embedded(&value["attrs"]),
        raw: embedded(&value["raw"]),
    }
}

/// Checks that rows equal these boxes, with a tolerance in pixels (formats count pixels
/// differently).
#[track_caller]
pub(crate) fn assert_boxes(
    rows: &[Row],
    marks: &[Mark],
    path_of: impl Fn(&Photo) -> String,
    tolerance: f64,
) {
    assert_eq!(rows.len(), marks.len(), "the number of rows");
    let mut left: Vec<&Row> = rows.iter().collect();
    for mark in marks {
        let path = path_of(&mark.photo);
        let bbox = [mark.x, mark.y, mark.w, mark.h];
        let found = left.iter().position(|row| {
            row.sample_path == path
                && row.class == CLASSES[mark.class].1
                && row.kind == "bbox"
                && row
                    .bbox
                    .iter()
                    .zip(bbox)
                    .all(|(a, b)| (a - b).abs() <= tolerance)
        });
        let Some(found) = found else {
            let near: Vec<_> = left.iter().filter(|row| row.sample_path == path).collect();
            panic!("no row for {mark:?}; its sample has {near:#?}");
        };
        left.remove(found);
    }
}

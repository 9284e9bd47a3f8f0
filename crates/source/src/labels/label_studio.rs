//! Label Studio's JSON export (labelstud.io/guide/export): a list of tasks, each with one image and
//! what people drew on it.
//!
//! Positions are percent of the original image. The results of one region (they have the same id)
//! are one: its shape, its labels, and texts and choices in `attrs`; each label becomes a row.
//! Several annotators of one task are kept apart by `attrs`: `annotator`, `annotation`, `region`,
//! `from_name`. The task's image gives the sample's path: `/data/local-files/?d=PATH` gives PATH,
//! `/data/upload/N/HASH-NAME` gives NAME, anything else is read as in every format (`path_rules`).

use std::collections::{BTreeMap, HashMap};
use std::io::BufReader;

use serde_json::value::RawValue;

use base::fault::Fault;
use base::limits::{LABEL_RECORD_BYTES_MAX, LABEL_SORT_BYTES, LABEL_TASK_BYTES_MAX};
use base::names::RelPath;
use base::omitted::Category;

use super::collect::{Annotation, Collector, Extent, Sample, id_text, number_list, push_number};
use super::folder::Input;
use super::json::{self, Fields, JsonReader};
use super::path_rules::decode_percent;
use super::refuse::Why;
use super::text::json_string;

/// The members of `data` that may hold the image, in this order.
const IMAGE_KEYS: [&str; 6] = ["image", "img", "image_url", "url", "picture", "photo"];
/// The types of results that have a shape, without their ending `labels`.
const SHAPES: [&str; 5] = ["rectangle", "polygon", "keypoint", "ellipse", "brush"];

pub(super) fn read(
    input: &Input,
    predictions: bool,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let file = collector.utf8(input.file()?);
    let inferred = file.inferred();
    let shown = input.shown().display().to_string();
    let mut json = JsonReader::new(BufReader::with_capacity(256 << 10, file), shown.clone());
    json.record_bytes_max = LABEL_TASK_BYTES_MAX;
    if json.peek()? != Some(b'[') {
        return Err(json
            .fault("a list of tasks is expected")
            .with_next("export from Label Studio as JSON, or name another format"));
    }
    json.expect(b'[')?;
    let mut tasks = super::sort::Sorter::new(&collector.scratch, LABEL_SORT_BYTES / 4);
    let mut record = Vec::new();
    let (mut first, mut number) = (true, 0u64);
    while json.more(&mut first, b']')? {
        let mut place = format!("task {number}");
        number += 1;
        let flags = json.capture(&mut record)?;
        let Some(text) = json::vet(&record, flags, &place, &mut collector.refusals) else {
            continue;
        };
        let Some(mut fields) = Fields::parse(text, &place, &mut collector.refusals) else {
            continue;
        };
        if let Some(id) = fields.peek("id").and_then(id_text) {
            place.push_str(&format!(" (id {id})"));
            tasks.push(id.as_bytes(), place.as_bytes())?;
        }
        if let Err(problem) = task(&mut fields, &place, predictions, collector)? {
            collector.refusals.add(Why::Shape, place, problem);
        }
    }
    json.end()?;
    collector.note_encoding(&shown, inferred.name());
    let mut last = Vec::new();
    let mut tasks = tasks.finish()?;
    while let Some((id, place)) = tasks.next()? {
        if last == id {
            let place = String::from_utf8_lossy(place);
            collector.refusals.add(
                Why::DuplicateImage,
                place,
                "another task has its id already",
            );
        }
        last = id.to_vec();
    }
    Ok(())
}

/// What is wrong with the shape of a record, or a fault of the machine outside.
type Checked<T> = Result<Result<T, String>, Fault>;

/// Whether somebody skipped this: `was_cancelled`, or `skipped` in exports before 1.0.
fn is_skipped(fields: &Fields<'_>) -> bool {
    let says = |name| matches!(fields.peek(name), Some("true" | "1" | "\"true\""));
    says("was_cancelled") || says("skipped")
}

fn task(
    fields: &mut Fields<'_>,
    place: &str,
    predictions: bool,
    collector: &mut Collector,
) -> Checked<()> {
    let Some(data) = fields.peek("data") else {
        return Ok(Err(
            "it has no data; export from Label Studio as JSON, not as JSON-MIN".into(),
        ));
    };
    let Some(mut data) = Fields::parse(data, place, &mut collector.refusals) else {
        return Ok(Ok(()));
    };
    let Some(image) = IMAGE_KEYS
        .iter()
        .find_map(|key| data.take(key))
        .and_then(json::as_string)
    else {
        return Ok(Err(format!(
            "its data names no image; one of {} is expected",
            IMAGE_KEYS.join(", ")
        )));
    };
    let file = image_file(&image);
    let Some(path) = collector.path(place, &file) else {
        return Ok(Ok(()));
    };
    if file != image {
        collector.note_path(place, &image, path.as_str());
    }
    // Exports before 1.0 name annotations so.
    let mut lists = vec![
        ("annotations", fields.take("annotations")),
        ("completions", fields.take("completions")),
    ];
    let predicted = fields.take("predictions");
    if predictions {
        lists.push(("predictions", predicted));
    } else if predicted.is_some_and(|list| list != "[]") {
        collector.omitted.add(Category::Predictions, place);
    }
    let split = data.take("split").and_then(json::as_string);
    let mut meta = fields.rest();
    if meta
        .as_ref()
        .is_some_and(|meta| meta.len() > LABEL_RECORD_BYTES_MAX)
    {
        collector.omitted.add(
            Category::UnreadMembers,
            format!("{place}: what it holds beside its annotations"),
        );
        meta = None;
    }
    let split = split.as_deref();
    collector.sample(
        &path,
        &Sample {
            place,
            declared: true,
            split,
            meta: meta.as_deref(),
            ..Sample::default()
        },
    )?;
    if is_skipped(fields) {
        collector.omitted.add(Category::SkippedTasks, place);
        return Ok(Ok(()));
    }
    for (list, json) in lists {
        let Some(json) = json else { continue };
        let Ok(items) = serde_json::from_str::<Vec<&RawValue>>(json) else {
            return Ok(Err(format!("its {list} is not a list")));
        };
        for (at, item) in items.into_iter().enumerate() {
            let place = format!("{place} {list}[{at}]");
            let Some(mut item) = Fields::parse(item.get(), &place, &mut collector.refusals) else {
                continue;
            };
            if let Err(problem) = results(&mut item, list, &place, &path, collector)? {
                collector.refusals.add(Why::Shape, place, problem);
            }
        }
    }
    Ok(Ok(()))
}

/// One person's annotation (or one model's prediction) of a task: a list of results.
fn results(
    item: &mut Fields<'_>,
    list: &str,
    place: &str,
    path: &RelPath,
    collector: &mut Collector,
) -> Checked<()> {
    if is_skipped(item) {
        collector.omitted.add(Category::SkippedTasks, place);
        return Ok(Ok(()));
    }
    let mut who = Members::default();
    let id = item.take("id");
    if list == "predictions" {
        who.add("prediction", id);
        who.add("model_version", item.take("model_version"));
        who.add("score", item.take("score"));
    } else {
        if let Some(id) = id {
            let Some(id) = id_text(id) else {
                return Ok(Err("its id is not a whole number or a string".into()));
            };
            // Those of old exports count anew in each task.
            if list == "annotations" {
                collector.annotation_id(place, &id)?;
            }
        }
        who.add("annotator", item.take("completed_by"));
        who.add("annotation", id);
    }
    let Some(results) = item.take("result") else {
        return Ok(Ok(()));
    };
    let Ok(results) = serde_json::from_str::<Vec<&RawValue>>(results) else {
        return Ok(Err("its result is not a list".into()));
    };
    // The results of each region in the order of its first; those without an id are regions of
    // their own.
    let mut regions: Vec<Vec<Part<'_>>> = Vec::new();
    let mut by_id: HashMap<&str, usize> = HashMap::new();
    for (at, result) in results.into_iter().enumerate() {
        let place = format!("{place} result[{at}]");
        let raw = result.get();
        let Some(fields) = Fields::parse(raw, &place, &mut collector.refusals) else {
            continue;
        };
        let id = fields.peek("id");
        let part = Part::new(fields, raw, place);
        match id.and_then(|id| by_id.get(id)) {
            Some(region) => regions[*region].push(part),
            None => {
                by_id.extend(id.map(|id| (id, regions.len())));
                regions.push(vec![part]);
            }
        }
    }
    for parts in regions {
        let place = parts[0].place.clone();
        if let Err(problem) = region(parts, &who, path, collector)? {
            collector.refusals.add(Why::Shape, place, problem);
        }
    }
    Ok(Ok(()))
}

/// The members of a JSON object, as it grows.
#[derive(Default, Clone)]
struct Members(String);

impl Members {
    fn add(&mut self, name: &str, json: Option<&str>) {
        if let Some(json) = json {
            let comma = if self.0.is_empty() { "" } else { "," };
            self.0
                .push_str(&format!("{comma}{}:{json}", json_string(name)));
        }
    }

    fn object(&self) -> Option<String> {
        (!self.0.is_empty()).then(|| format!("{{{}}}", self.0))
    }
}

/// One result: a shape, labels, a text, or several of these.
struct Part<'a> {
    place: String,
    raw: &'a str,
    kind: String,
    fields: Fields<'a>,
}

impl<'a> Part<'a> {
    fn new(mut fields: Fields<'a>, raw: &'a str, place: String) -> Self {
        let kind = fields
            .take("type")
            .and_then(json::as_string)
            .unwrap_or_default();
        Self {
            place,
            raw,
            kind,
            fields,
        }
    }

    /// The type without its ending: what the shape is.
    fn shape(&self) -> &str {
        self.kind.strip_suffix("labels").unwrap_or(&self.kind)
    }
}

/// One region: the results that share its id.
fn region(
    mut parts: Vec<Part<'_>>,
    who: &Members,
    path: &RelPath,
    collector: &mut Collector,
) -> Checked<()> {
    let base = parts
        .iter()
        .position(|part| SHAPES.contains(&part.shape()))
        .unwrap_or(0);
    let is_joined = parts.len() > 1;
    let raw = if is_joined {
        let list: Vec<&str> = parts.iter().map(|part| part.raw).collect();
        format!("[{}]", list.join(","))
    } else {
        parts[0].raw.to_owned()
    };
    let place = parts[base].place.clone();
    if raw.len() > LABEL_RECORD_BYTES_MAX {
        let detail = format!("it is larger than {LABEL_RECORD_BYTES_MAX} bytes");
        collector.refusals.add(Why::TooLarge, place, detail);
        return Ok(Ok(()));
    }
    let mut names: Vec<String> = Vec::new();
    let mut shape = None;
    let mut attrs = who.clone();
    let mut said: BTreeMap<&'static str, Members> = BTreeMap::new();
    let (region_id, from_name, meta) = {
        let fields = &mut parts[base].fields;
        (
            fields.take("id"),
            fields.take("from_name"),
            fields.take("meta"),
        )
    };
    for (at, part) in parts.iter_mut().enumerate() {
        let size = |name: &str, fields: &mut Fields<'_>| {
            fields
                .take(name)
                .and_then(json::as_integer)
                .filter(|n| *n > 0)
        };
        let (width, height) = (
            size("original_width", &mut part.fields),
            size("original_height", &mut part.fields),
        );
        if width.is_some() || height.is_some() {
            collector.sample(
                path,
                &Sample {
                    place: &part.place,
                    width,
                    height,
                    ..Sample::default()
                },
            )?;
        }
        let value = part.fields.take("value").unwrap_or("{}");
        let Some(mut value) = Fields::parse(value, &part.place, &mut collector.refusals) else {
            return Ok(Ok(()));
        };
        let kind = part.kind.as_str();
        let own = value
            .take(kind)
            .or_else(|| value.take("labels"))
            .or_else(|| value.take("choices"));
        // Text areas and ratings hold strings and numbers that are no classes; a choice for a
        // region is a property of it.
        let is_class = kind.ends_with("labels") || (kind == "choices" && !is_joined);
        match own {
            Some(json) if is_class => match serde_json::from_str::<Vec<String>>(json) {
                Ok(found) => {
                    for name in found {
                        // The same label in two results of a region is one; a list of its own is
                        // taken as it is.
                        if !is_joined || !names.contains(&name) {
                            names.push(name);
                        }
                    }
                }
                Err(_) => return Ok(Err(format!("its {kind} is not a list of names"))),
            },
            own if is_joined && at != base => {
                let word = match kind {
                    "textarea" => "text",
                    "choices" => "choices",
                    "taxonomy" => "taxonomy",
                    "rating" => "rating",
                    "number" => "number",
                    "datetime" => "datetime",
                    _ => "other",
                };
                let json = own
                    .or_else(|| value.take("text"))
                    .or_else(|| value.take(kind));
                let name = part.fields.take("from_name").and_then(json::as_string);
                said.entry(word)
                    .or_default()
                    .add(name.as_deref().unwrap_or(kind), json);
            }
            _ => {}
        }
        if at == base {
            let scale = width
                .zip(height)
                .map(|(w, h)| (w as f64 / 100.0, h as f64 / 100.0));
            match shape_of(kind, &mut value, scale) {
                Ok(found) => shape = Some(found),
                Err((why, problem)) => {
                    collector.refusals.add(why, place, problem);
                    return Ok(Ok(()));
                }
            }
        }
    }
    let Some(shape) = shape else {
        return Ok(Ok(()));
    };
    attrs.add("region", region_id);
    attrs.add("from_name", from_name);
    attrs.add("meta", meta);
    for (word, members) in &said {
        attrs.add(word, members.object().as_deref());
    }
    let attrs = attrs.object();
    let mut labels: Vec<Option<String>> = names.into_iter().map(Some).collect();
    if labels.is_empty() {
        labels.push(None);
    }
    for name in labels {
        let class = match name {
            Some(name) => match collector
                .classes
                .named(&place, &name, &mut collector.refusals)?
            {
                Some(class) => Some(class),
                None => continue,
            },
            None => None,
        };
        let row = Annotation {
            place: &place,
            class,
            kind: shape.kind,
            extent: shape.extent,
            is_hull: shape.is_hull,
            geom: shape.geom.as_deref(),
            attrs: attrs.as_deref(),
            raw: &raw,
        };
        collector.annotation(path, &row)?;
    }
    Ok(Ok(()))
}

struct Shape {
    kind: &'static str,
    extent: Extent,
    is_hull: bool,
    geom: Option<String>,
}

fn shape_of(
    kind_of: &str,
    value: &mut Fields<'_>,
    scale: Option<(f64, f64)>,
) -> Result<Shape, (Why, String)> {
    let word = kind_of.strip_suffix("labels").unwrap_or(kind_of);
    let plain = |kind, extent, geom| Shape {
        kind,
        extent,
        is_hull: false,
        geom,
    };
    if !matches!(word, "rectangle" | "polygon" | "keypoint" | "ellipse") {
        let rle = (word == "brush")
            .then(|| value.take("rle"))
            .flatten()
            .map(|rle| format!("{{\"format\":\"label_studio\",\"rle\":{rle}}}"));
        let kind = match word {
            "brush" => "rle",
            "choices" => "class",
            _ => "other",
        };
        return Ok(plain(kind, Extent::None, rle));
    }
    let Some((sx, sy)) = scale else {
        let detail =
            "it has no original_width and original_height, so percent cannot become pixels";
        return Err((Why::NoSize, detail.into()));
    };
    let mut number = |name: &str| {
        let json = value.take(name);
        json.and_then(json::as_number).ok_or_else(|| {
            (
                Why::Shape,
                format!("its {name} is {}, not a number", json.unwrap_or("missing")),
            )
        })
    };
    Ok(match word {
        "rectangle" => {
            let (x, y, w, h) = (
                number("x")? * sx,
                number("y")? * sy,
                number("width")? * sx,
                number("height")? * sy,
            );
            let rotation = number("rotation").unwrap_or(0.0);
            if rotation == 0.0 || w <= 0.0 || h <= 0.0 {
                plain("bbox", Extent::Box { x, y, w, h }, None)
            } else {
                let geom = object(&[
                    ("x", x),
                    ("y", y),
                    ("w", w),
                    ("h", h),
                    ("rotation", rotation),
                ]);
                Shape {
                    kind: "bbox",
                    extent: rotated(x, y, w, h, rotation),
                    is_hull: true,
                    geom: Some(geom),
                }
            }
        }
        "keypoint" => plain(
            "point",
            Extent::Point {
                x: number("x")? * sx,
                y: number("y")? * sy,
            },
            None,
        ),
        "ellipse" => {
            let (x, y) = (number("x")? * sx, number("y")? * sy);
            let (rx, ry) = (number("radiusX")? * sx, number("radiusY")? * sy);
            let rotation = number("rotation").unwrap_or(0.0);
            // The half sides of the box around a turned ellipse (semi-axes rx, ry; angle t):
            // sqrt((rx cos t)² + (ry sin t)²) and the same with sine and cosine changed.
            let (sin, cos) = rotation.to_radians().sin_cos();
            let (half_w, half_h) = ((rx * cos).hypot(ry * sin), (rx * sin).hypot(ry * cos));
            let geom = object(&[
                ("cx", x),
                ("cy", y),
                ("rx", rx),
                ("ry", ry),
                ("rotation", rotation),
            ]);
            let extent = Extent::Box {
                x: x - half_w,
                y: y - half_h,
                w: 2.0 * half_w,
                h: 2.0 * half_h,
            };
            Shape {
                kind: "other",
                extent,
                is_hull: true,
                geom: Some(geom),
            }
        }
        _ => {
            let points = value.take("points").and_then(json::as_numbers);
            let Some(mut points) = points.filter(|p| !p.is_empty() && p.len() % 2 == 0) else {
                return Err((Why::Shape, "its points are not a list of x, y".into()));
            };
            for pair in points.chunks_exact_mut(2) {
                pair[0] *= sx;
                pair[1] *= sy;
            }
            let extent = Extent::around(&points).unwrap_or(Extent::None);
            plain(
                "polygon",
                extent,
                Some(format!("[{}]", number_list(&points))),
            )
        }
    })
}

/// The upright box around a rectangle turned clockwise (y points down) about its top left corner.
fn rotated(x: f64, y: f64, w: f64, h: f64, degrees: f64) -> Extent {
    let (sin, cos) = degrees.to_radians().sin_cos();
    let corner = |a: f64, b: f64| [x + a * cos - b * sin, y + a * sin + b * cos];
    let corners = [[x, y], corner(w, 0.0), corner(w, h), corner(0.0, h)];
    Extent::around(corners.as_flattened()).unwrap_or(Extent::None)
}

fn object(members: &[(&str, f64)]) -> String {
    let mut out = String::new();
    for (name, number) in members {
        out.push_str(&format!(
            "{}\"{name}\":",
            if out.is_empty() { '{' } else { ',' }
        ));
        push_number(&mut out, *number);
    }
    out + "}"
}

/// The image's file from how Label Studio serves it; anything else as it is.
fn image_file(image: &str) -> String {
    if let Some((_, path)) = image.split_once("/data/local-files/?d=") {
        return decode_percent(path);
    }
    if let Some((_, upload)) = image.split_once("/data/upload/") {
        let name = upload.rsplit('/').next().unwrap_or(upload);
        let name = match name.split_once('-') {
            Some((hash, name))
                if hash.len() == 8
                    && hash.bytes().all(|b| b.is_ascii_hexdigit())
                    && !name.is_empty() =>
            {
                name
            }
            _ => name,
        };
        return decode_percent(name);
    }
    image.to_owned()
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn images_are_found_by_the_names_that_tasks_give_them() {
        for (image, file) in [
            ("images/a b.png", "images/a b.png"),
            (
                "/data/local-files/?d=line3/%E5%9B%BE%201.png",
                "line3/图 1.png",
            ),
            ("/data/upload/12/0a1b2c3d-a-b.png", "a-b.png"),
            ("/data/upload/a-b.png", "a-b.png"),
            ("http://host/data/upload/12/0a1b2c3d-b.png", "b.png"),
            ("s3://bucket/line3/a%20b.png", "s3://bucket/line3/a%20b.png"),
        ] {
            assert_eq!(image_file(image), file);
        }
    }

    #[test]
    fn a_turned_box_gets_the_upright_box_around_it() {
        let Extent::Box { x, y, w, h } = rotated(10.0, 10.0, 4.0, 2.0, 90.0) else {
            unreachable!()
        };
        // Clockwise with y down: the width now points down, the height to the left.
        for (found, expected) in [(x, 8.0), (y, 10.0), (w, 2.0), (h, 4.0)] {
            assert!((found - expected).abs() < 1e-9, "{found} is not {expected}");
        }
    }
}

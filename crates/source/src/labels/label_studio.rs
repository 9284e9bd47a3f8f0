//! Label Studio's JSON export (labelstud.io/guide/export): a list of tasks, each with one image and
//! what people drew on it.
//!
//! Positions are percent of the original image. Each label of a region becomes a row. Several
//! annotators of one task are kept apart by `attrs`: `annotator`, `annotation`, `region`,
//! `from_name`. The task's image gives the sample's path: `/data/local-files/?d=PATH` gives PATH,
//! `/data/upload/N/HASH-NAME` gives NAME, `s3://bucket/KEY` and `http://host/KEY` give KEY,
//! anything else stays as it is.

use std::io::BufReader;

use serde_json::value::RawValue;

use base::fault::Fault;
use base::names::RelPath;
use base::omitted::Category;

use super::collect::{Annotation, Collector, Extent, Sample, id_text, number_list, push_number};
use super::folder::Input;
use super::json::{self, Fields, JsonReader};
use super::refuse::Why;
use super::text::json_string;

/// The members of `data` that may hold the image, in this order.
const IMAGE_KEYS: [&str; 6] = ["image", "img", "image_url", "url", "picture", "photo"];

pub(super) fn read(
    input: &Input,
    predictions: bool,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let mut json = JsonReader::new(
        BufReader::with_capacity(256 << 10, input.file()?),
        input.shown().display().to_string(),
    );
    if json.peek()? != Some(b'[') {
        return Err(json
            .fault("a list of tasks is expected")
            .with_next("export from Label Studio as JSON, or name another format"));
    }
    json.expect(b'[')?;
    let mut tasks =
        super::sort::Sorter::new(&collector.scratch, base::limits::LABEL_SORT_BYTES / 4);
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
    let mut last = Vec::new();
    let mut tasks = tasks.finish()?;
    while let Some((id, place)) = tasks.next()? {
        if last == id {
            collector.refusals.add(
                Why::DuplicateImage,
                String::from_utf8_lossy(place),
                "another task has its id already",
            );
        }
        last = id.to_vec();
    }
    Ok(())
}

/// What is wrong with the shape of a record, or a fault of the machine outside.
type Checked<T> = Result<Result<T, String>, Fault>;

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
    let Some(path) = collector.path(place, &image_path(&image)) else {
        return Ok(Ok(()));
    };
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
    let meta = fields.rest();
    collector.sample(
        &path,
        &Sample {
            place,
            declared: true,
            split: split.as_deref(),
            meta: meta.as_deref(),
            ..Sample::default()
        },
    )?;
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

/// One person's annotation (or one model's prediction) of a task: a list of regions.
fn results(
    item: &mut Fields<'_>,
    list: &str,
    place: &str,
    path: &RelPath,
    collector: &mut Collector,
) -> Checked<()> {
    // Exports before 1.0 say `skipped`.
    let (cancelled, skipped) = (item.take("was_cancelled"), item.take("skipped"));
    if cancelled == Some("true") || skipped == Some("true") {
        collector.omitted.add(Category::SkippedTasks, place);
        return Ok(Ok(()));
    }
    let mut who = String::new();
    let mut add = |name: &str, json: Option<&str>| {
        if let Some(json) = json {
            who.push_str(&format!(
                "{}{}:{json}",
                if who.is_empty() { "" } else { "," },
                json_string(name)
            ));
        }
    };
    let id = item.take("id");
    if list == "predictions" {
        add("prediction", id);
        add("model_version", item.take("model_version"));
        add("score", item.take("score"));
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
        add("annotator", item.take("completed_by"));
        add("annotation", id);
    }
    let Some(regions) = item.take("result") else {
        return Ok(Ok(()));
    };
    let Ok(regions) = serde_json::from_str::<Vec<&RawValue>>(regions) else {
        return Ok(Err("its result is not a list".into()));
    };
    for (at, region_json) in regions.into_iter().enumerate() {
        let place = format!("{place} result[{at}]");
        let raw = region_json.get();
        let Some(fields) = Fields::parse(raw, &place, &mut collector.refusals) else {
            continue;
        };
        if let Err(problem) = region(fields, raw, &who, &place, path, collector)? {
            collector.refusals.add(Why::Shape, place, problem);
        }
    }
    Ok(Ok(()))
}

fn region(
    mut fields: Fields<'_>,
    raw: &str,
    who: &str,
    place: &str,
    path: &RelPath,
    collector: &mut Collector,
) -> Checked<()> {
    let kind_of = fields
        .take("type")
        .and_then(json::as_string)
        .unwrap_or_default();
    let size = |name: &str, fields: &mut Fields<'_>| {
        fields
            .take(name)
            .and_then(json::as_integer)
            .filter(|n| *n > 0)
    };
    let (width, height) = (
        size("original_width", &mut fields),
        size("original_height", &mut fields),
    );
    if width.is_some() || height.is_some() {
        collector.sample(
            path,
            &Sample {
                place,
                width,
                height,
                ..Sample::default()
            },
        )?;
    }
    let value = fields.take("value").unwrap_or("{}");
    let Some(mut value) = Fields::parse(value, place, &mut collector.refusals) else {
        return Ok(Ok(()));
    };
    let scale = width
        .zip(height)
        .map(|(w, h)| (w as f64 / 100.0, h as f64 / 100.0));
    let labels = value
        .take(&kind_of)
        .or_else(|| value.take("labels"))
        .or_else(|| value.take("choices"));
    let shape = match shape(&kind_of, &mut value, scale) {
        Ok(shape) => shape,
        Err((why, problem)) => {
            collector.refusals.add(why, place, problem);
            return Ok(Ok(()));
        }
    };
    let mut attrs = String::from(who);
    for (name, json) in [
        ("region", fields.take("id")),
        ("from_name", fields.take("from_name")),
        ("meta", fields.take("meta")),
    ] {
        if let Some(json) = json {
            attrs.push_str(&format!(
                "{}{}:{json}",
                if attrs.is_empty() { "" } else { "," },
                json_string(name)
            ));
        }
    }
    let attrs = (!attrs.is_empty()).then(|| format!("{{{attrs}}}"));
    // Text areas and ratings hold strings and numbers that are no classes.
    let is_class = kind_of.ends_with("labels") || kind_of == "choices";
    let names = match labels {
        Some(json) if is_class => match serde_json::from_str::<Vec<String>>(json) {
            Ok(names) if !names.is_empty() => names.into_iter().map(Some).collect(),
            Ok(_) => vec![None],
            Err(_) => return Ok(Err(format!("its {kind_of} is not a list of names"))),
        },
        _ => vec![None],
    };
    for name in names {
        let class = match name {
            Some(name) => match collector
                .classes
                .named(place, &name, &mut collector.refusals)?
            {
                Some(class) => Some(class),
                None => continue,
            },
            None => None,
        };
        let row = Annotation {
            place,
            class,
            kind: shape.kind,
            extent: shape.extent,
            geom: shape.geom.as_deref(),
            attrs: attrs.as_deref(),
            raw,
        };
        collector.annotation(path, &row)?;
    }
    Ok(Ok(()))
}

struct Shape {
    kind: &'static str,
    extent: Extent,
    geom: Option<String>,
}

fn shape(
    kind_of: &str,
    value: &mut Fields<'_>,
    scale: Option<(f64, f64)>,
) -> Result<Shape, (Why, String)> {
    let word = kind_of.strip_suffix("labels").unwrap_or(kind_of);
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
        return Ok(Shape {
            kind,
            extent: Extent::None,
            geom: rle,
        });
    }
    let Some((sx, sy)) = scale else {
        return Err((
            Why::NoSize,
            "it has no original_width and original_height, so percent cannot become pixels".into(),
        ));
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
                Shape {
                    kind: "bbox",
                    extent: Extent::Box { x, y, w, h },
                    geom: None,
                }
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
                    geom: Some(geom),
                }
            }
        }
        "keypoint" => Shape {
            kind: "point",
            extent: Extent::Point {
                x: number("x")? * sx,
                y: number("y")? * sy,
            },
            geom: None,
        },
        "ellipse" => {
            let (x, y, rx, ry) = (
                number("x")? * sx,
                number("y")? * sy,
                number("radiusX")? * sx,
                number("radiusY")? * sy,
            );
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
                geom: Some(geom),
            }
        }
        _ => {
            let points = value
                .take("points")
                .and_then(json::as_numbers)
                .filter(|p| !p.is_empty() && p.len() % 2 == 0);
            let Some(mut points) = points else {
                return Err((Why::Shape, "its points are not a list of x, y".into()));
            };
            for pair in points.chunks_exact_mut(2) {
                pair[0] *= sx;
                pair[1] *= sy;
            }
            let extent = Extent::around(&points).unwrap_or(Extent::None);
            Shape {
                kind: "polygon",
                extent,
                geom: Some(format!("[{}]", number_list(&points))),
            }
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

/// The image's path from how a task names it.
fn image_path(image: &str) -> String {
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
    if let Some((scheme, rest)) = image.split_once("://")
        && let Some((_, key)) = rest.split_once('/')
    {
        return if scheme.starts_with("http") {
            decode_percent(key.split(['?', '#']).next().unwrap_or(key))
        } else {
            key.to_owned()
        };
    }
    image.to_owned()
}

/// `%E5%9B%BE` as it was meant; what is no such escape stays.
fn decode_percent(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        let escape = (bytes[at] == b'%')
            .then(|| text.get(at + 1..at + 3))
            .flatten();
        match escape.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8(out).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn images_are_found_by_the_names_that_tasks_give_them() {
        for (image, path) in [
            ("images/a b.png", "images/a b.png"),
            (
                "/data/local-files/?d=line3/%E5%9B%BE%201.png",
                "line3/图 1.png",
            ),
            ("/data/upload/12/0a1b2c3d-a-b.png", "a-b.png"),
            ("/data/upload/a-b.png", "a-b.png"),
            ("s3://bucket/line3/a%20b.png", "line3/a%20b.png"),
            ("https://host:80/line3/a.png?sig=1", "line3/a.png"),
            ("100%.png", "100%.png"),
        ] {
            assert_eq!(image_path(image), path);
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

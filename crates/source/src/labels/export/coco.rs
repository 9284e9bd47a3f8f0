//! COCO: one file with the lists `images`, `annotations` and `categories`.
//!
//! The id of an image is its line in `samples.jsonl`, from 1, that of an annotation its line in
//! `annotations.jsonl`, from 1. `area` and `iscrowd`, which tools of COCO expect, are added where the
//! attributes do not have them. An image has the member `split` beside those of COCO.

use base::fault::Fault;
use content::label_rows::{AnnotationRow, SampleRow};

use super::super::collect::{number_list, push_number};
use super::super::text::json_string;
use super::{Item, LeftOut, Output, Set, boxed, members, rings};

/// The members of an annotation that are not attributes.
const OF_ANNOTATION: [&str; 6] = [
    "id",
    "image_id",
    "category_id",
    "bbox",
    "segmentation",
    "keypoints",
];
const OF_IMAGE: [&str; 5] = ["id", "file_name", "width", "height", "split"];
const OF_CATEGORY: [&str; 2] = ["id", "name"];

pub(super) fn write(set: &Set<'_>, left_out: &mut LeftOut) -> Result<(u64, u64), Fault> {
    let mut out = set.create_top("annotations.json")?;
    out.put("{\"images\":[")?;
    set.samples(|number, sample| {
        out.put(if number == 0 { "\n" } else { ",\n" })?;
        image(&mut out, number, sample)
    })?;
    out.put("\n],\"annotations\":[")?;
    let (mut image, mut first) = (0, true);
    let counts = set.each(|item| match item {
        Item::Sample(number, _) => {
            image = number;
            Ok(())
        }
        Item::Annotation(number, row) => match annotation(image, number, row, left_out) {
            None => Ok(()),
            Some(text) => {
                out.put(if std::mem::take(&mut first) {
                    "\n"
                } else {
                    ",\n"
                })?;
                out.put(&text)
            }
        },
    })?;
    out.put("\n],\"categories\":[")?;
    for (at, class) in set.classes.iter().enumerate() {
        let attrs = class
            .attrs
            .as_deref()
            .and_then(|json| members(json, &OF_CATEGORY));
        out.put(&format!(
            "{}{{\"id\":{},\"name\":{}{}}}",
            if at == 0 { "\n" } else { ",\n" },
            class.id,
            json_string(&class.name),
            attrs.map_or(String::new(), |attrs| attrs.text)
        ))?;
    }
    out.put("\n]}\n")?;
    out.end()?;
    Ok(counts)
}

fn image(out: &mut Output, number: u64, sample: &SampleRow) -> Result<(), Fault> {
    let mut text = format!(
        "{{\"id\":{},\"file_name\":{}",
        number + 1,
        json_string(&sample.path)
    );
    for (name, side) in [("width", sample.width), ("height", sample.height)] {
        if let Some(side) = side {
            text.push_str(&format!(",\"{name}\":{side}"));
        }
    }
    if let Some(split) = &sample.split {
        text.push_str(&format!(",\"split\":{}", json_string(split)));
    }
    // What the source's record said beyond that.
    let meta = sample
        .meta
        .as_deref()
        .and_then(|json| members(json, &OF_IMAGE));
    text.push_str(&meta.map_or(String::new(), |meta| meta.text));
    out.put(&text)?;
    out.put("}")
}

/// An annotation; `None`: COCO has no place for it.
fn annotation(
    image: u64,
    number: u64,
    row: &AnnotationRow,
    left_out: &mut LeftOut,
) -> Option<String> {
    let place = format!("{} (annotation {})", row.sample, number + 1);
    let geom = row.geom.as_deref();
    let sides = boxed(row);
    // The shape beside the box.
    let mut area = sides.map(|[_, _, w, h]| w * h);
    let shape = match (row.kind.as_str(), geom) {
        ("polygon", Some(geom)) => {
            area = rings(Some(geom)).map(|rings| rings.iter().map(|ring| area_of(ring)).sum());
            format!(",\"segmentation\":{}", geom.get())
        }
        ("rle", Some(geom)) if geom.get().starts_with('{') => {
            format!(",\"segmentation\":{}", geom.get())
        }
        ("keypoints", Some(geom)) => format!(",\"keypoints\":{}", geom.get()),
        ("bbox" | "class", None) => String::new(),
        (kind, _) if sides.is_some() => {
            let what = match kind {
                "bbox" => "turned boxes are written as the upright boxes around them".to_owned(),
                kind => format!("annotations of the kind {kind} are written as their boxes"),
            };
            left_out.add(what, &place);
            String::new()
        }
        ("other", None) if row.class.is_none() => String::new(),
        (kind, _) => {
            let what = format!("annotations of the kind {kind} without a box are left out");
            left_out.add(what, &place);
            return None;
        }
    };
    let mut text = format!("{{\"id\":{},\"image_id\":{}", number + 1, image + 1);
    if let Some(class) = row.class {
        text.push_str(&format!(",\"category_id\":{class}"));
    }
    if let Some(sides) = sides {
        text.push_str(&format!(",\"bbox\":{}", number_list(&sides)));
    }
    text.push_str(&shape);
    let attrs = row
        .attrs
        .as_deref()
        .and_then(|json| members(json, &OF_ANNOTATION));
    if attrs.is_none() && row.attrs.is_some() {
        left_out.add("attributes that are no JSON object are left out", &place);
    }
    let has = |key: &str| {
        attrs
            .as_ref()
            .is_some_and(|attrs| attrs.keys.iter().any(|k| k == key))
    };
    let (has_area, has_crowd) = (has("area"), has("iscrowd"));
    if let Some(attrs) = &attrs {
        for key in &attrs.dropped {
            let what = format!("attributes named {key}, which COCO uses otherwise, are left out");
            left_out.add(what, &place);
        }
        text.push_str(&attrs.text);
    }
    if let Some(area) = area.filter(|_| !has_area) {
        text.push_str(",\"area\":");
        push_number(&mut text, area);
    }
    if !has_crowd && sides.is_some() {
        text.push_str(",\"iscrowd\":0");
    }
    text.push('}');
    Some(text)
}

/// The area within a ring.
fn area_of(ring: &[f64]) -> f64 {
    let points: Vec<[f64; 2]> = ring.chunks_exact(2).map(|p| [p[0], p[1]]).collect();
    let next = points.iter().cycle().skip(1);
    let doubled: f64 = points
        .iter()
        .zip(next)
        .map(|(a, b)| a[0] * b[1] - b[0] * a[1])
        .sum();
    doubled.abs() / 2.0
}

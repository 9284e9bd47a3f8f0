//! CVAT's XML 1.1 (docs.cvat.ai, "CVAT for image" and "CVAT for video"): images with their shapes,
//! or tracks with their frames.
//!
//! Numbers count from 0; right and bottom are exclusive. Turns are clockwise, in degrees, around
//! the centre. A mask has runs by rows within its own box, the background first. A frame of a track
//! is the sample `frame_NNNNNN.PNG`, as CVAT writes frames out; a box that is `outside` its frame
//! is none.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use serde_json::{Map, Value};

use base::fault::Fault;
use base::limits::LABEL_MASK_PIXELS_MAX;
use base::names::RelPath;
use base::omitted::Category;

use super::collect::{Collector, Extent, Sample};
use super::encoding::Utf8Reader;
use super::folder::{Input, has_extension};
use super::images_beside::ImagesBeside;
use super::label_files;
use super::refuse::Why;
use super::shapes::{Checked, Patch, Row, Shape};
use super::split;
use super::xml::Open;
use super::xml_stream::{Step, XmlStream};

/// The members of an element that give its shape.
const GEOMETRY: [&str; 21] = [
    "@xtl",
    "@ytl",
    "@xbr",
    "@ybr",
    "@rotation",
    "@points",
    "@rle",
    "@left",
    "@top",
    "@width",
    "@height",
    "@cx",
    "@cy",
    "@rx",
    "@ry",
    "@label",
    "@frame",
    "@outside",
    "@keyframe",
    "attribute",
    "points",
];

type Xml = XmlStream<BufReader<Utf8Reader<File>>>;

pub(super) fn read(input: &Input, collector: &mut Collector) -> Result<(), Fault> {
    let Some(inside) = input.folder() else {
        let shown = input.shown().display().to_string();
        return Document::default().read(input.file()?, &shown, collector);
    };
    let is_xml = |file: &Path| Ok(has_extension(file, &["xml"]));
    let (files, images) = label_files::few(inside, "XML", is_xml, collector)?;
    if files.is_empty() {
        return Err(Fault::integrity("the folder holds no XML file")
            .with_next("give CVAT's annotations.xml, or the folder that holds it"));
    }
    for file in &files {
        let shown = file.display().to_string();
        let folder = shown.rsplit_once('/').map_or("", |(folder, _)| folder);
        let document = Document {
            images: Some(&images),
            folder: folder.to_owned(),
            prefix: if files.len() > 1 {
                format!("{shown} ")
            } else {
                String::new()
            },
            ..Document::default()
        };
        document.read(inside.file(file)?, &shown, collector)?;
    }
    Ok(())
}

/// A file, and what is known of it so far.
#[derive(Default)]
struct Document<'a> {
    images: Option<&'a ImagesBeside<'a>>,
    folder: String,
    prefix: String,
    /// The size of a video.
    size: Option<(i64, i64)>,
    classes: i64,
}

impl Document<'_> {
    fn read(mut self, file: File, shown: &str, collector: &mut Collector) -> Result<(), Fault> {
        let file = collector.utf8(file);
        let inferred = file.inferred();
        let mut xml = XmlStream::new(BufReader::with_capacity(256 << 10, file));
        match xml.next()? {
            Step::Start(root) if root.name() == "annotations" => {}
            Step::Start(root) => {
                let detail = format!("its root is <{}>, not <annotations>", root.name());
                return Err(Fault::integrity(detail)
                    .with_next("give CVAT's annotations.xml, or name another format"));
            }
            Step::End => return Err(xml.fault("it holds no element")),
        }
        let (mut images, mut tracks) = (0u64, 0u64);
        while let Step::Start(open) = xml.next()? {
            match open.name() {
                "version" => {
                    let version = xml.capture(open)?;
                    if version.as_str() != Some("1.1") {
                        return Err(Fault::integrity(format!(
                            "it is version {version} of CVAT's XML, and 1.1 is read"
                        ))
                        .with_next(
                            "export it again as CVAT for images 1.1 or CVAT for video 1.1",
                        ));
                    }
                }
                "meta" => {
                    let meta = xml.capture(open)?;
                    self.meta(&meta, collector)?;
                }
                "image" => {
                    let place = format!("{}image[{images}]", self.prefix);
                    images += 1;
                    self.image(&open, place, &mut xml, collector)?;
                }
                "track" => {
                    let place = format!("{}track[{tracks}]", self.prefix);
                    tracks += 1;
                    self.track(&open, &place, &mut xml, collector)?;
                }
                other => {
                    let member = format!("{}<{other}>", self.prefix);
                    collector.omitted.add(Category::UnreadMembers, member);
                    xml.skip()?;
                }
            }
        }
        // Text behind the root is malformed.
        if let Step::Start(_) = xml.next()? {
            return Err(xml.fault("it has two root elements"));
        }
        collector.note_encoding(shown, inferred.name());
        Ok(())
    }

    /// Declares the labels, of a task, a job or a project.
    fn meta(&mut self, meta: &Value, collector: &mut Collector) -> Result<(), Fault> {
        let number = |path: &str| {
            let text = meta.pointer(path).and_then(Value::as_str)?;
            text.parse::<i64>().ok().filter(|n| *n > 0)
        };
        for part in ["task", "job", "project"] {
            let width = number(&format!("/{part}/original_size/width"));
            let height = number(&format!("/{part}/original_size/height"));
            self.size = self.size.or(width.zip(height));
            let Some(labels) = meta.pointer(&format!("/{part}/labels/label")) else {
                continue;
            };
            let labels = match labels {
                Value::Array(list) => list.as_slice(),
                one => std::slice::from_ref(one),
            };
            for label in labels {
                let Some(Value::String(name)) = label.get("name") else {
                    continue;
                };
                // A point of a skeleton is no class.
                let has_parent = matches!(label.get("parent"), Some(Value::String(parent)) if !parent.is_empty());
                if has_parent || name.is_empty() {
                    continue;
                }
                let rest: Map<String, Value> = label
                    .as_object()
                    .into_iter()
                    .flatten()
                    .filter(|(key, value)| {
                        *key != "name" && *key != "svg" && value.as_str() != Some("")
                    })
                    .map(|(key, value)| (key.clone(), value.clone()))
                    .collect();
                let attrs = (!rest.is_empty()).then(|| Value::Object(rest).to_string());
                let place = format!("{}label {name:?}", self.prefix);
                let (id, refusals) = (self.classes, &mut collector.refusals);
                let is_new = collector
                    .classes
                    .declare_name(&place, id, name, attrs, refusals)?;
                self.classes += i64::from(is_new);
            }
        }
        Ok(())
    }

    fn image(
        &self,
        open: &Open,
        mut place: String,
        xml: &mut Xml,
        collector: &mut Collector,
    ) -> Result<(), Fault> {
        let Some(name) = open.attribute("name").filter(|name| !name.is_empty()) else {
            collector.refusals.add(Why::Shape, place, "it has no name");
            return xml.skip();
        };
        place.push_str(&format!(
            " ({})",
            name.chars().take(100).collect::<String>()
        ));
        let size = |name: &str| {
            let number = open.attribute(name)?.parse::<f64>().ok()?;
            (number >= 1.0 && number <= f64::from(i32::MAX)).then_some(number as i64)
        };
        let subset = open.attribute("subset").filter(|subset| !subset.is_empty());
        let found = match self.images {
            Some(images) if !super::path_rules::is_of_one_machine(name) => {
                let below = [
                    format!("images/{}/", subset.unwrap_or("default")),
                    "images/".to_owned(),
                    String::new(),
                ];
                images.locate(&self.folder, &below, &name.replace('\\', "/"), "")
            }
            _ => name.to_owned(),
        };
        let Some(path) = collector.path(&place, &found) else {
            return xml.skip();
        };
        let (width, height) = (size("width"), size("height"));
        let id = open
            .attribute("id")
            .map(|id| serde_json::json!({ "id": id }).to_string());
        let named = subset.filter(|subset| !subset.eq_ignore_ascii_case("default"));
        let split = named.map(|subset| split::of_name(subset).unwrap_or(subset));
        let sample = Sample {
            place: &place,
            declared: true,
            width,
            height,
            split: split.or_else(|| split::of_folder(path.as_str())),
            split_from: match split {
                Some(_) => super::collect::SplitFrom::Record,
                None => super::collect::SplitFrom::Folder,
            },
            meta: id.as_deref(),
            ..Sample::default()
        };
        collector.sample(&path, &sample)?;
        let mut number = 0u64;
        while let Step::Start(open) = xml.next()? {
            let place = format!("{place} {}[{number}]", open.name());
            number += 1;
            let kind = open.name().to_owned();
            let value = xml.capture(open)?;
            take(
                &kind,
                &value,
                None,
                &place,
                &path,
                width.zip(height),
                collector,
            )?;
        }
        Ok(())
    }

    fn track(
        &self,
        open: &Open,
        place: &str,
        xml: &mut Xml,
        collector: &mut Collector,
    ) -> Result<(), Fault> {
        let (id, label) = (
            open.attribute("id").unwrap_or_default().to_owned(),
            open.attribute("label").unwrap_or_default().to_owned(),
        );
        while let Step::Start(open) = xml.next()? {
            let kind = open.name().to_owned();
            let frame = open
                .attribute("frame")
                .and_then(|frame| frame.parse::<u32>().ok());
            let is_outside = open.attribute("outside") == Some("1");
            let value = xml.capture(open)?;
            let Some(frame) = frame else {
                let raw = value.to_string();
                let refusals = &mut collector.refusals;
                refusals.add_record(Why::Shape, place, "a shape has no frame", Some(&raw));
                continue;
            };
            if is_outside {
                continue;
            }
            let place = format!("{place} frame {frame}");
            let Some(path) = collector.path(&place, &format!("frame_{frame:06}.PNG")) else {
                continue;
            };
            let sample = Sample {
                place: &place,
                width: self.size.map(|(width, _)| width),
                height: self.size.map(|(_, height)| height),
                ..Sample::default()
            };
            collector.sample(&path, &sample)?;
            take(
                &kind,
                &value,
                Some((&id, &label)),
                &place,
                &path,
                self.size,
                collector,
            )?;
        }
        Ok(())
    }
}

/// Takes a shape of an image, or of a frame of a track.
fn take(
    kind: &str,
    value: &Value,
    track: Option<(&str, &str)>,
    place: &str,
    path: &RelPath,
    size: Option<(i64, i64)>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let raw = value.to_string();
    let label = value.get("@label").and_then(Value::as_str);
    let label = label.or(track.map(|(_, label)| label)).unwrap_or_default();
    let refusals = &mut collector.refusals;
    let Some(class) = collector.classes.named(place, label, refusals)? else {
        return Ok(());
    };
    let mut attrs = Map::new();
    if let Some((id, _)) = track {
        attrs.insert("track".into(), id.into());
    }
    for (key, member) in value.as_object().into_iter().flatten() {
        let is_default = matches!(
            (key.as_str(), member.as_str()),
            ("@occluded" | "@z_order", Some("0")) | (_, Some(""))
        );
        if !GEOMETRY.contains(&key.as_str()) && !is_default {
            attrs.insert(key.trim_start_matches('@').to_owned(), member.clone());
        }
    }
    let mut named = Map::new();
    for attribute in list(value, "attribute") {
        if let Some(name) = attribute.get("@name").and_then(Value::as_str) {
            let text = attribute.get("#text").cloned().unwrap_or_else(|| "".into());
            named.insert(name.to_owned(), text);
        }
    }
    if !named.is_empty() {
        attrs.insert("attributes".into(), Value::Object(named));
    }
    if kind == "skeleton" {
        let names = list(value, "points")
            .iter()
            .filter_map(|point| point.get("@label").cloned());
        attrs.insert("points".into(), names.collect());
    }
    let attrs = (!attrs.is_empty()).then(|| Value::Object(attrs).to_string());
    let row = Row {
        place,
        class: Some(class),
        attrs: attrs.as_deref(),
        raw: &raw,
    };
    row.take(path, shape(kind, value, size), collector)
}

/// The children of this name: one child is no list.
fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    match value.get(name) {
        None => &[],
        Some(Value::Array(list)) => list,
        Some(one) => std::slice::from_ref(one),
    }
}

fn number(value: &Value, name: &str) -> Checked<f64> {
    let text = value.get(format!("@{name}")).and_then(Value::as_str);
    let text = text.ok_or_else(|| (Why::Shape, format!("it has no {name}")))?;
    match text.trim().parse::<f64>() {
        Ok(n) if n.is_finite() => Ok(n),
        Ok(_) => Err((Why::NotFinite, format!("its {name} is {text}"))),
        Err(_) => Err((Why::Shape, format!("its {name} is {text:?}, not a number"))),
    }
}

/// `x,y;x,y;…`
fn points(value: &Value) -> Checked<Vec<f64>> {
    let text = value
        .get("@points")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let numbers = text
        .split([';', ','])
        .map(|text| text.trim().parse::<f64>());
    let numbers: Result<Vec<f64>, _> = numbers.collect();
    match numbers {
        Ok(numbers) if numbers.len() % 2 == 0 && numbers.iter().all(|n| n.is_finite()) => {
            Ok(numbers)
        }
        _ => {
            let shown: String = text.chars().take(60).collect();
            Err((Why::Shape, format!("its points are {shown:?}, not x,y;x,y")))
        }
    }
}

fn shape(kind: &str, value: &Value, size: Option<(i64, i64)>) -> Checked<Shape> {
    let rotation = match value.get("@rotation") {
        None => 0.0,
        Some(_) => number(value, "rotation")?,
    };
    match kind {
        "box" => {
            let [left, top, right, bottom] =
                ["xtl", "ytl", "xbr", "ybr"].map(|name| number(value, name));
            let (left, top, right, bottom) = (left?, top?, right?, bottom?);
            if rotation == 0.0 {
                let extent = Extent::Box {
                    x: left,
                    y: top,
                    w: right - left,
                    h: bottom - top,
                };
                return Ok(Shape::plain("bbox", extent, None));
            }
            let centre = [(left + right) / 2.0, (top + bottom) / 2.0];
            Shape::turned(centre, right - left, bottom - top, rotation.to_radians())
        }
        "ellipse" => Shape::ellipse(
            [number(value, "cx")?, number(value, "cy")?],
            number(value, "rx")?,
            number(value, "ry")?,
            rotation,
        ),
        "polygon" | "polyline" => {
            let kind = if kind == "polygon" {
                "polygon"
            } else {
                "polyline"
            };
            Shape::rings(kind, &[points(value)?])
        }
        "points" => {
            let points = points(value)?;
            let marked = points
                .chunks_exact(2)
                .flat_map(|point| [point[0], point[1], 2.0]);
            Shape::keypoints(&marked.collect::<Vec<f64>>())
        }
        "skeleton" => {
            let mut marked = Vec::new();
            for point in list(value, "points") {
                let place = points(point)?;
                let says = |name: &str| point.get(name).and_then(Value::as_str) == Some("1");
                let seen = match (says("@outside"), says("@occluded")) {
                    (true, _) => 0.0,
                    (false, true) => 1.0,
                    (false, false) => 2.0,
                };
                match place.as_slice() {
                    [x, y] if seen > 0.0 => marked.extend([*x, *y, seen]),
                    [_, _] => marked.extend([0.0; 3]),
                    _ => return Err((Why::Shape, "a point of it is not x,y".into())),
                }
            }
            Shape::keypoints(&marked)
        }
        "mask" => mask(value, size),
        "cuboid" => cuboid(value),
        "tag" => Ok(Shape::class()),
        other => Err((
            Why::Shape,
            format!("there is no shape <{other}> of CVAT that is read"),
        )),
    }
}

/// The corners of a cuboid, `xtl1`, `ytl1`, and so on.
fn cuboid(value: &Value) -> Checked<Shape> {
    let (mut points, mut geom) = (Vec::new(), Map::new());
    for corner in ["tl1", "bl1", "tr1", "br1", "tl2", "bl2", "tr2", "br2"] {
        for axis in ["x", "y"] {
            let name = format!("{axis}{corner}");
            let at = number(value, &name)?;
            points.push(at);
            geom.insert(name, at.into());
        }
    }
    Ok(Shape {
        kind: "other",
        extent: Extent::around(&points).unwrap_or(Extent::None),
        is_hull: true,
        geom: Some(Value::Object(geom).to_string()),
    })
}

fn mask(value: &Value, size: Option<(i64, i64)>) -> Checked<Shape> {
    let Some(size) = size else {
        return Err((
            Why::NoSize,
            "it is a mask, and the size of its image is not given".into(),
        ));
    };
    let [left, top, width, height] =
        ["left", "top", "width", "height"].map(|name| number(value, name));
    let (left, top, width, height) = (left?, top?, width?, height?);
    let is_side = |n: f64| n >= 1.0 && n <= f64::from(u16::MAX) && n.fract() == 0.0;
    if !is_side(width) || !is_side(height) || width * height > LABEL_MASK_PIXELS_MAX as f64 {
        return Err((Why::TooLarge, format!("its mask is {width} × {height}")));
    }
    if left.abs() > f64::from(i32::MAX) || top.abs() > f64::from(i32::MAX) {
        return Err((Why::OutsideImage, format!("its mask is at {left}, {top}")));
    }
    let text = value
        .get("@rle")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let mut pixels = vec![0u8; (width * height) as usize];
    let mut at = 0usize;
    for (index, run) in text.split(',').enumerate() {
        let run: Option<usize> = run.trim().parse().ok();
        let end = run.and_then(|run| at.checked_add(run));
        let Some(end) = end.filter(|end| *end <= pixels.len()) else {
            let detail = format!("its rle does not fit its {width} × {height} pixels");
            return Err((Why::Shape, detail));
        };
        if index % 2 == 1 {
            pixels[at..end].fill(1);
        }
        at = end;
    }
    let patch = Patch {
        left: left as i64,
        top: top as i64,
        width: width as usize,
        pixels: &pixels,
    };
    patch.shape(size)
}

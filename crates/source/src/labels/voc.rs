//! Pascal VOC: a folder of XML files, one an image (host.robots.ox.ac.uk/pascal/VOC, the
//! development kit's annotation form).
//!
//! Which pixel the numbers count from is a setting, or inferred from all files (`voc_base`); so
//! they are read once, kept sorted, and turned into rows afterwards. Beside `bndbox`, `robndbox`
//! (roLabelImg) and `polygon` are read.
//!
//! The sample is the image that `filename` names, below the folder of the XML file relative to the
//! root, where `Annotations` stands for `JPEGImages` when the root has that folder (else it is left
//! out). Where the folder has no such image, but one with the name of the XML file next to it or in
//! a folder of images, it is that image (`images_beside`). `ImageSets/Main/{train,val,test}.txt`
//! give the splits, else folders named so.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde_json::{Map, Value};

use crate::inside::Inside;
use base::fault::Fault;
use base::limits::{LABEL_RECORD_BYTES_MAX, LABEL_SORT_BYTES};
use base::omitted::Category;

use super::collect::{Annotation, Collector, Extent, Sample, number_list, push_number};
use super::folder::{Input, Walk, has_extension};
use super::images_beside::{IMAGE_EXTENSIONS, ImagesBeside};
use super::path_rules::{PathFrom, is_of_one_machine};
use super::refuse::Why;
use super::sort::Sorter;
use super::voc_base::{Evidence, VocBase, Writer};
use super::{split, text, xml};

/// The splits that the development kit names.
const SPLITS: [&str; 3] = ["train", "val", "test"];

/// Folders that annotations are in, each standing for a folder of images.
const ANNOTATION_FOLDERS: [&str; 8] = [
    "annotations",
    "annotation",
    "labels",
    "label",
    "xml",
    "xmls",
    "ann",
    "anns",
];

pub(super) fn read(
    input: &Input,
    given: Option<VocBase>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let Some(folder) = input.folder() else {
        return Err(Fault::integrity(
            "Pascal VOC labels are a folder of XML files, and this is none",
        )
        .with_next("give the folder"));
    };
    let splits = read_splits(folder, collector)?;
    let mut images = ImagesBeside::new(folder);
    let mut evidence: BTreeMap<Writer, Evidence> = BTreeMap::new();
    let mut parsed = Sorter::new(&collector.scratch, LABEL_SORT_BYTES);
    let mut files = 0u64;
    let mut walk = Walk::new(folder);
    while let Some(file) = walk.next() {
        let file = file?;
        if !has_extension(&file, &["xml"]) {
            images.note(&file);
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
        let Some(text) = text::xml_file(folder, &file, place, collector)? else {
            continue;
        };
        match xml::parse(&text) {
            Ok((name, value)) if name == "annotation" => {
                for edges in objects(&value)
                    .iter()
                    .filter_map(|object| edges(object.get("bndbox")?).ok())
                {
                    let of_writer = evidence.entry(Writer::of(&value)).or_default();
                    of_writer.add(edges, [size_of(&value, "width"), size_of(&value, "height")]);
                }
                parsed.push(place.as_bytes(), value.to_string().as_bytes())?;
            }
            Ok((name, _)) => {
                let detail = format!("its root is <{name}>, not <annotation>");
                collector.refusals.add(Why::Shape, place, detail);
            }
            Err((why, detail)) => collector.refusals.add(why, place, detail),
        }
    }
    collector.omitted.merge(walk.omitted);
    if files == 0 {
        return Err(Fault::integrity("the folder holds no XML file")
            .with_next("give the folder that holds the Pascal VOC XML files"));
    }
    let mut reader = Reader {
        has_images: folder.is_dir("JPEGImages"),
        splits,
        images,
        given,
        bases: BTreeMap::new(),
    };
    for (writer, evidence) in evidence {
        let (base, why) = evidence.infer(writer);
        if given.is_none() {
            let boxes = evidence.boxes();
            let detail = format!("boxes counted as by --voc-base {base} ({boxes} boxes): {why}");
            collector.omitted.add(Category::Inferred, detail);
        }
        reader.bases.insert(writer, given.unwrap_or(base));
    }
    let mut parsed = parsed.finish()?;
    while let Some((place, value)) = parsed.next()? {
        let (Ok(place), Ok(value)) = (std::str::from_utf8(place), serde_json::from_slice(value))
        else {
            return Err(Fault::internal("decode a sorted XML file"));
        };
        reader.image(place, value, collector)?;
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
fn read_splits(
    folder: &Inside,
    collector: &mut Collector,
) -> Result<HashMap<String, &'static str>, Fault> {
    let mut splits = HashMap::new();
    for split in SPLITS {
        let list = Path::new("ImageSets/Main").join(format!("{split}.txt"));
        // A link that leaves the folder is there too, and is refused.
        if folder.exists(&list) {
            let text = text::side_file(folder, &list, collector)?;
            splits.extend(text.split_whitespace().map(|stem| (stem.to_owned(), split)));
        }
    }
    Ok(splits)
}

/// The objects of an annotation: one child is no list.
fn objects(annotation: &Value) -> &[Value] {
    match annotation.get("object") {
        None => &[],
        Some(Value::Array(objects)) => objects,
        Some(object) => std::slice::from_ref(object),
    }
}

/// Many tools write 0 for a size that they do not know.
fn size_of(annotation: &Value, name: &str) -> Option<i64> {
    let text = annotation
        .get("size")
        .and_then(|size| size.get(name))
        .and_then(Value::as_str);
    let number = text.and_then(|text| text.parse::<f64>().ok());
    number
        .filter(|n| *n >= 1.0 && *n <= f64::from(i32::MAX))
        .map(|n| n as i64)
}

/// What the second pass needs to know.
struct Reader<'a> {
    has_images: bool,
    splits: HashMap<String, &'static str>,
    images: ImagesBeside<'a>,
    given: Option<VocBase>,
    bases: BTreeMap<Writer, VocBase>,
}

impl Reader<'_> {
    fn image(
        &self,
        place: &str,
        annotation: Value,
        collector: &mut Collector,
    ) -> Result<(), Fault> {
        let writer = Writer::of(&annotation);
        let base = self.bases.get(&writer).copied().or(self.given);
        // Without any box there are no numbers to judge by, and polygons count as who wrote them
        // does.
        let base = base.unwrap_or_else(|| Evidence::default().infer(writer).0);
        let objects = objects(&annotation).to_vec();
        let (width, height) = (
            size_of(&annotation, "width"),
            size_of(&annotation, "height"),
        );
        let Value::Object(mut annotation) = annotation else {
            collector
                .refusals
                .add(Why::Shape, place, "its annotation is empty");
            return Ok(());
        };
        annotation.shift_remove("object");
        let filename = annotation
            .get("filename")
            .and_then(Value::as_str)
            .filter(|name| !name.is_empty());
        let Some(name) = self.name(place, filename, collector) else {
            return Ok(());
        };
        let Some(path) = collector.path(place, &name) else {
            return Ok(());
        };
        let stem = place
            .rsplit('/')
            .next()
            .and_then(|name| name.rsplit_once('.'))
            .map_or("", |(stem, _)| stem);
        let in_list = self.splits.get(stem).copied();
        let split = in_list.or_else(|| split::of_folder(place).filter(|_| self.splits.is_empty()));
        let meta = Value::Object(annotation).to_string();
        let sample = Sample {
            place,
            declared: true,
            width,
            height,
            split,
            meta: Some(&meta),
            ..Sample::default()
        };
        collector.sample(&path, &sample)?;
        for (at, value) in objects.iter().enumerate() {
            let place = format!("{place} object[{at}]");
            let raw = value.to_string();
            if raw.len() > LABEL_RECORD_BYTES_MAX {
                collector.refusals.add(
                    Why::TooLarge,
                    place,
                    "the object is larger than a record may be",
                );
                continue;
            }
            let Some(name) = value.get("name").and_then(Value::as_str) else {
                collector.refusals.add(Why::Shape, place, "it has no name");
                continue;
            };
            let shape = match shape(value, base) {
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
            let members = value.as_object().into_iter().flatten();
            let rest: Map<String, Value> = members
                .filter(|(key, _)| *key != "name" && !SHAPES.contains(&key.as_str()))
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect();
            if shape.extent == Extent::None {
                let unread: Vec<&str> = rest
                    .iter()
                    .filter(|(key, value)| is_like_a_shape(key, value))
                    .map(|(key, _)| key.as_str())
                    .collect();
                if !unread.is_empty() {
                    collector.omitted.add(
                        Category::UnreadBoxes,
                        format!("{place}: {}", unread.join(", ")),
                    );
                }
            }
            let attrs = (!rest.is_empty()).then(|| Value::Object(rest).to_string());
            let row = Annotation {
                place: &place,
                class: Some(class),
                kind: shape.kind,
                extent: shape.extent,
                is_hull: shape.is_hull,
                geom: shape.geom.as_deref(),
                attrs: attrs.as_deref(),
                raw: &raw,
            };
            collector.annotation(&path, &row)?;
        }
        Ok(())
    }

    /// The sample's path: the image that the record names, or one beside the XML file.
    fn name(
        &self,
        place: &str,
        filename: Option<&str>,
        collector: &mut Collector,
    ) -> Option<String> {
        let folder = place.rsplit_once('/').map_or("", |(folder, _)| folder);
        let home = match folder.strip_prefix("Annotations") {
            Some(below) if below.is_empty() || below.starts_with('/') => {
                format!("{}{below}", if self.has_images { "JPEGImages" } else { "" })
            }
            _ => folder.to_owned(),
        };
        // Of a path on the machine of the tool only the name says something here.
        let name = filename.map(|name| match is_of_one_machine(name) {
            true => name.rsplit(['/', '\\']).next().unwrap_or(name),
            false => name,
        });
        let recorded = name.map(|name| format!("{home}/{name}").trim_start_matches('/').to_owned());
        if name != filename
            && let (Some(filename), Some(recorded)) = (filename, &recorded)
        {
            collector.note_path(place, filename, recorded);
        }
        let from = collector.path_from();
        if let Some(recorded) = &recorded
            && (from == PathFrom::Record || self.images.holds(recorded))
        {
            return Some(recorded.clone());
        }
        let stem = place.rsplit_once('.').map_or(place, |(stem, _)| stem);
        let found = if from == PathFrom::Record {
            None
        } else {
            self.images.find(stem, filename, &ANNOTATION_FOLDERS)
        };
        match (found, recorded) {
            (Some(found), recorded) => {
                let named = recorded.as_deref().unwrap_or("no filename");
                collector.note_path(place, named, &found);
                Some(found)
            }
            (None, Some(recorded)) if from != PathFrom::Image => Some(recorded),
            (None, recorded) => {
                let detail = match recorded {
                    None => "it has no filename, and there is no image of its name".to_owned(),
                    Some(recorded) => {
                        format!("there is neither an image {recorded:?} nor one of its name")
                    }
                };
                collector.refusals.add(Why::Shape, place, detail);
                None
            }
        }
    }
}

/// The members of an object that its shape is read from.
const SHAPES: [&str; 3] = ["bndbox", "robndbox", "polygon"];

/// Whether a member that is not read seems to hold a box or another shape.
fn is_like_a_shape(name: &str, value: &Value) -> bool {
    const PARTS: [&str; 8] = [
        "box", "bbox", "polygon", "points", "mask", "quad", "ellipse", "line",
    ];
    let name = name.to_ascii_lowercase();
    (value.is_object() || value.is_array()) && PARTS.iter().any(|part| name.contains(part))
}

struct Shape {
    kind: &'static str,
    extent: Extent,
    is_hull: bool,
    geom: Option<String>,
}

/// The shape of an object.
fn shape(object: &Value, base: VocBase) -> Result<Shape, (Why, String)> {
    if let Some(rotated) = object.get("robndbox") {
        return robndbox(rotated);
    }
    let upright = match object.get("bndbox") {
        None => None,
        Some(bndbox) => Some(base.extent(edges(bndbox)?)),
    };
    let rings = match object.get("polygon") {
        None => Vec::new(),
        Some(Value::Array(rings)) => rings
            .iter()
            .map(|ring| points(ring, base))
            .collect::<Result<Vec<_>, _>>()?,
        Some(ring) => vec![points(ring, base)?],
    };
    if rings.is_empty() {
        let kind = if upright.is_some() { "bbox" } else { "class" };
        return Ok(Shape {
            kind,
            extent: upright.unwrap_or(Extent::None),
            is_hull: false,
            geom: None,
        });
    }
    let around = Extent::around(&rings.concat()).unwrap_or(Extent::None);
    let lists: Vec<String> = rings.iter().map(|ring| number_list(ring)).collect();
    let geom = Some(format!("[{}]", lists.join(",")));
    Ok(Shape {
        kind: "polygon",
        extent: upright.unwrap_or(around),
        is_hull: false,
        geom,
    })
}

fn number(value: &Value, name: &str) -> Result<f64, (Why, String)> {
    let text = value.get(name).and_then(Value::as_str).unwrap_or_default();
    match text.parse::<f64>() {
        Ok(n) if n.is_finite() => Ok(n),
        Ok(_) => Err((Why::NotFinite, format!("its {name} is {text}"))),
        Err(_) => Err((Why::Shape, format!("its {name} is {text:?}, not a number"))),
    }
}

/// Left, top, right, bottom, as the file has them.
fn edges(bndbox: &Value) -> Result<[f64; 4], (Why, String)> {
    Ok([
        number(bndbox, "xmin")?,
        number(bndbox, "ymin")?,
        number(bndbox, "xmax")?,
        number(bndbox, "ymax")?,
    ])
}

/// A turned box of roLabelImg: its centre, its sides, and the angle in radians, clockwise as y
/// points down. Its numbers count from 0, in whatever way the upright boxes beside it do.
fn robndbox(value: &Value) -> Result<Shape, (Why, String)> {
    let [cx, cy, w, h, angle] = ["cx", "cy", "w", "h", "angle"].map(|name| number(value, name));
    let (cx, cy, w, h, angle) = (cx?, cy?, w?, h?, angle?);
    if w <= 0.0 || h <= 0.0 {
        return Err((
            Why::EmptyBox,
            format!("the turned box is {w} wide and {h} high"),
        ));
    }
    let (sin, cos) = angle.sin_cos();
    let (half_w, half_h) = (
        (w * cos.abs() + h * sin.abs()) / 2.0,
        (w * sin.abs() + h * cos.abs()) / 2.0,
    );
    let mut geom = String::new();
    for (name, value) in [("cx", cx), ("cy", cy), ("w", w), ("h", h), ("angle", angle)] {
        geom.push_str(if geom.is_empty() { "{\"" } else { ",\"" });
        geom.push_str(name);
        geom.push_str("\":");
        push_number(&mut geom, value);
    }
    geom.push('}');
    let extent = Extent::Box {
        x: cx - half_w,
        y: cy - half_h,
        w: 2.0 * half_w,
        h: 2.0 * half_h,
    };
    Ok(Shape {
        kind: "bbox",
        extent,
        is_hull: true,
        geom: Some(geom),
    })
}

/// The points of a polygon: `<x1>`, `<y1>`, `<x2>`… or a list of `<pt>` or `<point>` with `<x>` and
/// `<y>`.
fn points(polygon: &Value, base: VocBase) -> Result<Vec<f64>, (Why, String)> {
    let mut out = Vec::new();
    let mut push = |point: &Value, x: &str, y: &str| -> Result<(), (Why, String)> {
        out.push(base.position(number(point, x)?));
        out.push(base.position(number(point, y)?));
        Ok(())
    };
    let listed = ["pt", "point", "points"]
        .iter()
        .find_map(|name| polygon.get(name));
    match listed {
        Some(Value::Array(points)) => points.iter().try_for_each(|point| push(point, "x", "y"))?,
        Some(point) => push(point, "x", "y")?,
        None => {
            // Some tools count the points from 0.
            let first = u32::from(polygon.get("x0").is_none());
            for at in first.. {
                let (x, y) = (format!("x{at}"), format!("y{at}"));
                if polygon.get(&x).is_none() && polygon.get(&y).is_none() {
                    break;
                }
                push(polygon, &x, &y)?;
            }
        }
    }
    if out.len() < 6 {
        return Err((
            Why::Shape,
            format!("its polygon has {} points; 3 are needed", out.len() / 2),
        ));
    }
    Ok(out)
}

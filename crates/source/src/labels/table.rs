//! Tables: CSV, JSON Lines and the rows of a database query, one annotation a row, fields taken by
//! name.
//!
//! A row with a sample and nothing else names a sample without annotations. Edges (`x2`, `y2`) are
//! exclusive and count from 0 like `x` and `y`: the width is `x2 - x`. Columns that stand for no
//! field go into `attrs` unless a column is mapped to that. Whether boxes are fractions of their
//! images, and what a column with four numbers holds, is a setting, or inferred from all rows
//! before the first is taken (`table_boxes`).

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use base::fault::Fault;
use base::names::RelPath;
use base::omitted::{Category, Omitted};
use content::chunk::Hash;

use super::collect::{Annotation, ClassRef, Collector, Extent, Sample};
use super::folder::Input;
use super::json;
use super::refuse::{Refusals, Why};
use super::rle;
use super::table_boxes::{BoxForm, Evidence, Reading, extents, geom_to_pixels, number, to_pixels};
use super::table_csv::CsvRows;
use super::table_fields::{
    ATTRS, BBOX, CLASS, CLASS_ID, Cells, FIELDS, GEOM, H, HEIGHT, ID, KIND, RLE, SAMPLE_PATH,
    SPLIT, VIA_ATTRIBUTES, VIA_SHAPE, W, WIDTH, X, Y,
};
use super::table_objects::{self, Object};
use super::table_sizes::Sizes;
use super::text::json_string;
use super::via;

/// The kinds of the canonical form.
const KINDS: [&str; 8] = [
    "bbox",
    "polygon",
    "rle",
    "keypoints",
    "polyline",
    "point",
    "class",
    "other",
];

/// The settings of tables; what is not set is inferred.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TableSettings {
    pub(super) form: Option<BoxForm>,
    pub(super) normalised: Option<bool>,
}

/// Reads a CSV file.
pub(super) fn read_csv(
    input: &Input,
    columns: &BTreeMap<String, String>,
    settings: TableSettings,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let mut evidence = Evidence::default();
    let mut first_pass = CsvRows::open(input, columns, collector)?;
    // What is wrong with a row is said in the second pass.
    while let Some(line) = first_pass.next(&mut Refusals::default())? {
        evidence.add_row(&line.cells);
        if evidence.is_decided() {
            break;
        }
    }
    let mut state = Rows::new(settings, &evidence, input, collector);
    let mut rows = CsvRows::open(input, columns, collector)?;
    state.has_rle = rows.has[RLE];
    while let Some(line) = rows.next(&mut collector.refusals)? {
        let parts = Parts {
            rest: line.rest.as_deref(),
            raw: &line.raw,
            hash: None,
        };
        state.row(&line.place, &line.cells, parts, collector)?;
    }
    collector.note_encoding(&input.shown().display().to_string(), rows.inferred());
    Ok(())
}

/// Why a row was not taken.
enum Stop {
    /// It is wrong; the next one may be right.
    Refused(Why, String),
    /// Nothing more can be read.
    Fault(Fault),
}

impl From<(Why, String)> for Stop {
    fn from((why, detail): (Why, String)) -> Self {
        Stop::Refused(why, detail)
    }
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Stop::Fault(fault)
    }
}

/// Turns rows into samples and annotations.
#[derive(Default)]
pub(super) struct Rows {
    reading: Reading,
    /// Where sizes of images are found that the rows do not have; for boxes that are fractions of
    /// them.
    sizes: Option<Sizes>,
    /// There is a column for masks as runs: a row without one marks nothing.
    has_rle: bool,
    /// What the last row said of its sample, so that a run of rows says it once.
    last: Option<Said>,
}

/// What a row says of its sample.
#[derive(PartialEq, Eq)]
struct Said {
    path: RelPath,
    width: Option<i64>,
    height: Option<i64>,
    split: Option<String>,
    hash: Option<Hash>,
}

/// A row's sample, and its size as far as it is known.
type Sampled = (RelPath, Option<(i64, i64)>);

/// What a row is beside its fields.
#[derive(Clone, Copy)]
pub(super) struct Parts<'a> {
    /// Its other columns, as an object.
    pub(super) rest: Option<&'a str>,
    /// All of it, as it came.
    pub(super) raw: &'a str,
    /// What the sample's file hashes to.
    pub(super) hash: Option<Hash>,
}

/// What a row marks.
#[derive(Default)]
struct Shape {
    /// Told by the format; else it follows from what there is.
    kind: Option<&'static str>,
    extent: Option<Extent>,
    is_hull: bool,
    geom: Option<String>,
}

impl Rows {
    /// Decides how boxes are read, by the settings or by what all rows say, and reports what was
    /// inferred.
    pub(super) fn new(
        settings: TableSettings,
        evidence: &Evidence,
        input: &Input,
        collector: &mut Collector,
    ) -> Self {
        let normalised = settings.normalised.unwrap_or(evidence.is_normalised());
        if settings.normalised.is_none() && normalised {
            let detail = format!(
                "boxes are fractions of their images (normalised=true): all numbers of {} boxes lie within 0 and 1",
                evidence.boxes
            );
            collector.omitted.add(Category::Inferred, detail);
        }
        let form = settings.form.unwrap_or(evidence.form());
        if settings.form.is_none() && form == BoxForm::Xyxy {
            let detail = "four numbers of a box are left, top, right, bottom (bbox_format=xyxy): as left, top, width, height some leave their images";
            collector.omitted.add(Category::Inferred, detail);
        }
        let sizes = normalised.then(|| Sizes::beside(input));
        Self {
            reading: Reading { form, normalised },
            sizes,
            ..Self::default()
        }
    }

    pub(super) fn row(
        &mut self,
        place: &str,
        cells: &Cells,
        parts: Parts<'_>,
        collector: &mut Collector,
    ) -> Result<(), Fault> {
        let result = self.try_row(place, cells, parts, collector);
        refuse(result, place, collector)
    }

    /// A row whose annotations are in a list of their own.
    pub(super) fn objects(
        &mut self,
        place: &str,
        cells: &Cells,
        objects: &str,
        collector: &mut Collector,
    ) -> Result<(), Fault> {
        let result = self.try_objects(place, cells, objects, collector);
        refuse(result, place, collector)
    }

    fn try_objects(
        &mut self,
        place: &str,
        cells: &Cells,
        objects: &str,
        collector: &mut Collector,
    ) -> Result<(), Stop> {
        let objects = table_objects::read(objects)?;
        self.sample(place, cells, None, collector)?;
        for (
            at,
            Object {
                cells: of_object,
                rest,
                raw,
            },
        ) in objects.into_iter().enumerate()
        {
            let place = format!("{place} objects[{at}]");
            let mut cells_of_row = cells.clone();
            for (cell, of_object) in cells_of_row.iter_mut().zip(of_object) {
                *cell = of_object.or(cell.take());
            }
            // The record's id is the image's.
            cells_of_row[ID] = None;
            self.row(
                &place,
                &cells_of_row,
                Parts {
                    rest: rest.as_deref(),
                    raw: &raw,
                    hash: None,
                },
                collector,
            )?;
        }
        Ok(())
    }

    /// Takes what the row says of its sample; `None` when its path was refused. With it the size,
    /// as far as it is known.
    fn sample(
        &mut self,
        place: &str,
        cells: &Cells,
        hash: Option<Hash>,
        collector: &mut Collector,
    ) -> Result<Option<Sampled>, Stop> {
        let path = words(cells, SAMPLE_PATH)?
            .ok_or_else(|| (Why::Shape, "it names no sample".to_owned()))?;
        let (mut width, mut height) = (pixels(cells, WIDTH)?, pixels(cells, HEIGHT)?);
        let Some(mut path) = collector.path(place, &path) else {
            return Ok(None);
        };
        if width.is_none() || height.is_none() {
            let found = self
                .sizes
                .as_mut()
                .and_then(|sizes| sizes.find(path.as_str()));
            if let Some((image, w, h)) = found {
                (width, height) = (Some(w), Some(h));
                if image != path.as_str()
                    && let Ok(image) = image.parse::<RelPath>()
                {
                    collector.note_path(place, path.as_str(), image.as_str());
                    path = image;
                }
            }
        }
        let said = Said {
            path: path.clone(),
            width,
            height,
            split: words(cells, SPLIT)?,
            hash,
        };
        if self.last.as_ref() != Some(&said) {
            let sample = Sample {
                place,
                width,
                height,
                split: said.split.as_deref(),
                hash,
                ..Sample::default()
            };
            collector.sample(&path, &sample)?;
            self.last = Some(said);
        }
        Ok(Some((path, width.zip(height))))
    }

    fn try_row(
        &mut self,
        place: &str,
        cells: &Cells,
        parts: Parts<'_>,
        collector: &mut Collector,
    ) -> Result<(), Stop> {
        let Parts { rest, raw, hash } = parts;
        let Some((path, size)) = self.sample(place, cells, hash, collector)? else {
            return Ok(());
        };
        let via_class = |name: &str| json_string(name);
        let mut cells = std::borrow::Cow::Borrowed(cells);
        let mut own_attrs = None;
        let shape = if let Some(json) = &cells[VIA_SHAPE] {
            let found = via::shape(&object_of(json, "region_shape_attributes")?)?;
            let Some(found) = found else { return Ok(()) };
            let of_region = cells[VIA_ATTRIBUTES].clone();
            if let Some(json) = of_region {
                let attributes = object_of(&json, "region_attributes")?;
                if cells[CLASS].is_none() {
                    cells.to_mut()[CLASS] = via::class(&attributes).as_deref().map(via_class);
                }
                own_attrs = (!attributes.is_empty()).then_some(Value::Object(attributes));
            }
            Shape {
                kind: Some(found.kind),
                extent: Some(found.extent),
                is_hull: found.is_hull,
                geom: found.geom,
            }
        } else if let Some(json) = &cells[RLE] {
            runs(json, size)?
        } else if self.has_rle {
            return Ok(());
        } else {
            let found = extents(&cells, self.reading.form)?;
            if cells[BBOX].is_some() && found.len() != 1 {
                return self.several(place, &cells, &found, parts, collector);
            }
            Shape {
                extent: found.into_iter().next(),
                ..Shape::default()
            }
        };
        let class = class(place, &cells, collector)?;
        let mut extent = shape.extent.unwrap_or(Extent::None);
        if self.reading.normalised && extent != Extent::None {
            let Some(size) = size else {
                let detail = "its box is a fraction of its image (normalised), whose width and height are not known";
                return Err(Stop::Refused(Why::NoSize, detail.into()));
            };
            extent = to_pixels(extent, size);
        }
        let geom = structure(&cells, GEOM, place, &mut collector.refusals);
        let attrs = structure(&cells, ATTRS, place, &mut collector.refusals);
        let (Some(geom), Some(attrs)) = (geom, attrs) else {
            return Ok(());
        };
        let geom = shape.geom.or(geom);
        if attrs.as_ref().is_some_and(|json| !json.starts_with('{')) {
            return Err(Stop::Refused(
                Why::Shape,
                "attrs is not a JSON object".into(),
            ));
        }
        let kind = match words(&cells, KIND)? {
            Some(kind) => KINDS.into_iter().find(|k| *k == kind).ok_or_else(|| {
                let detail = format!("the kind {kind:?} is none of {}", KINDS.join(", "));
                (Why::Shape, detail)
            })?,
            None => match (shape.kind, extent) {
                (Some(kind), _) => kind,
                _ if geom.is_some() => "other",
                (_, Extent::Box { .. }) => "bbox",
                (_, Extent::Point { .. }) => "point",
                (_, Extent::None) if class.is_some() => "class",
                // Nothing but the sample: it has no annotations. Where other columns are filled,
                // they may be meant as one.
                (_, Extent::None) if cells[ID].is_none() => {
                    if let Some(rest) = rest {
                        note_unread(
                            Category::UnknownColumns,
                            place,
                            rest,
                            |_| true,
                            &mut collector.omitted,
                        );
                    }
                    return Ok(());
                }
                (_, Extent::None) => "other",
            },
        };
        let has_points = matches!(kind, "polygon" | "polyline" | "keypoints");
        let geom = match (geom, size) {
            (Some(geom), Some(size)) if self.reading.normalised => {
                Some(geom_to_pixels(kind, &geom, size))
            }
            (Some(_), None) if self.reading.normalised && has_points => {
                let detail = "its points are fractions of its image (normalised), whose width and height are not known";
                return Err(Stop::Refused(Why::NoSize, detail.into()));
            }
            (geom, _) => geom,
        };
        if let Some(id) = &cells[ID] {
            collector.annotation_id(place, id)?;
        }
        if extent == Extent::None
            && geom.is_none()
            && let Some(rest) = rest
        {
            note_unread(
                Category::UnreadBoxes,
                place,
                rest,
                is_like_a_box,
                &mut collector.omitted,
            );
        }
        let merged = own_attrs.map(|own| with_member(rest, "region_attributes", &own));
        let attrs = attrs.as_deref().or(merged.as_deref()).or(rest);
        let annotation = Annotation {
            place,
            class,
            kind,
            extent,
            is_hull: shape.is_hull,
            geom: geom.as_deref(),
            attrs,
            raw,
        };
        collector.annotation(&path, &annotation)?;
        Ok(())
    }

    /// A row with a list of boxes, and a class for each or one for all.
    fn several(
        &mut self,
        place: &str,
        cells: &Cells,
        boxes: &[Extent],
        parts: Parts<'_>,
        collector: &mut Collector,
    ) -> Result<(), Stop> {
        let each = |field: usize| -> Result<Option<Vec<Value>>, (Why, String)> {
            let Some(json) = &cells[field] else {
                return Ok(None);
            };
            let text = json::as_string(json).unwrap_or_else(|| json.clone());
            match serde_json::from_str::<Value>(&text.replace('\'', "\"")) {
                Ok(Value::Array(list)) if list.len() == boxes.len() => Ok(Some(list)),
                Ok(Value::Array(list)) => {
                    let detail = format!(
                        "there are {} boxes, and {} in {}",
                        boxes.len(),
                        list.len(),
                        FIELDS[field].0
                    );
                    Err((Why::Shape, detail))
                }
                _ => Ok(None),
            }
        };
        let (classes, ids) = (each(CLASS)?, each(CLASS_ID)?);
        for (at, extent) in boxes.iter().enumerate() {
            let Extent::Box { x, y, w, h } = *extent else {
                continue;
            };
            let mut own = cells.clone();
            own[BBOX] = None;
            own[ID] = None;
            for (field, number) in [(X, x), (Y, y), (W, w), (H, h)] {
                own[field] = Some(number.to_string());
            }
            for (field, list) in [(CLASS, &classes), (CLASS_ID, &ids)] {
                if let Some(value) = list.as_ref().and_then(|list| list.get(at)) {
                    own[field] = (!value.is_null()).then(|| value.to_string());
                }
            }
            self.row(&format!("{place} box[{at}]"), &own, parts, collector)?;
        }
        Ok(())
    }
}

fn refuse(result: Result<(), Stop>, place: &str, collector: &mut Collector) -> Result<(), Fault> {
    match result {
        Err(Stop::Refused(why, detail)) => collector.refusals.add(why, place, detail),
        Err(Stop::Fault(fault)) => return Err(fault),
        Ok(()) => {}
    }
    Ok(())
}

/// A cell's text.
fn words(cells: &Cells, field: usize) -> Result<Option<String>, (Why, String)> {
    let Some(json) = &cells[field] else {
        return Ok(None);
    };
    let wrong = || {
        (
            Why::Shape,
            format!("{} is {json}, not text", FIELDS[field].0),
        )
    };
    json::as_string(json)
        .map(|text| Some(text.trim().to_owned()))
        .ok_or_else(wrong)
}

/// A cell that holds a JSON object.
fn object_of(json: &str, name: &str) -> Result<Map<String, Value>, (Why, String)> {
    let text = json::as_string(json).unwrap_or_else(|| json.to_owned());
    serde_json::from_str(&text).map_err(|error| {
        (
            Why::Shape,
            format!("its {name} is not a JSON object: {error}"),
        )
    })
}

/// The object with one member more.
fn with_member(object: Option<&str>, name: &str, value: &Value) -> String {
    let head = object
        .and_then(|object| object.strip_suffix('}'))
        .unwrap_or("{");
    let comma = if head.len() > 1 { "," } else { "" };
    format!("{head}{comma}{}:{value}}}", json_string(name))
}

/// A mask as Kaggle's competitions have it: pairs of a start, counted from 1 down the columns, and
/// a length.
fn runs(json: &str, size: Option<(i64, i64)>) -> Result<Shape, (Why, String)> {
    let text = json::as_string(json).unwrap_or_else(|| json.to_owned());
    let numbers = rle::kaggle(&text);
    let Some(numbers) = numbers else {
        return Err((
            Why::Shape,
            "its mask is not pairs of a start and a length".into(),
        ));
    };
    let geom = format!(
        "{{\"format\":\"kaggle\",\"counts\":{}}}",
        json_string(text.trim())
    );
    let mut extent = Extent::None;
    if let Some((width, height)) = size {
        let (mut left, mut top, mut right, mut bottom) = (i64::MAX, i64::MAX, 0, 0);
        for pair in numbers.chunks_exact(2) {
            let (first, last) = (pair[0] - 1, pair[0].saturating_add(pair[1]) - 2);
            if last >= width.saturating_mul(height) {
                return Err((
                    Why::OutsideImage,
                    format!("its mask ends at {}, behind its image", last + 1),
                ));
            }
            let (from, to) = (first / height, last / height);
            (left, right) = (left.min(from), right.max(to + 1));
            let whole = from != to;
            (top, bottom) = (
                top.min(if whole { 0 } else { first % height }),
                bottom.max(if whole { height } else { last % height + 1 }),
            );
        }
        let [x, y, w, h] = [left, top, right - left, bottom - top].map(|n| n as f64);
        extent = Extent::Box { x, y, w, h };
    }
    Ok(Shape {
        kind: Some("rle"),
        extent: Some(extent),
        is_hull: false,
        geom: Some(geom),
    })
}

/// Counts a row with columns that no field reads, if any of them is `meant`, and names these.
fn note_unread(
    what: Category,
    place: &str,
    rest: &str,
    meant: impl Fn(&str) -> bool,
    omitted: &mut Omitted,
) {
    // It was built, or checked, as an object.
    let Ok(rest) = serde_json::from_str::<Map<String, Value>>(rest) else {
        return;
    };
    let named: Vec<String> = rest.keys().filter(|name| meant(name)).cloned().collect();
    if !named.is_empty() {
        omitted.add(what, format!("{place}: {}", named.join(", ")));
    }
}

/// Whether a column seems to hold a box or another shape.
fn is_like_a_box(name: &str) -> bool {
    const NAMES: [&str; 6] = [
        "objects",
        "region_shape_attributes",
        "coords",
        "coordinates",
        "xywhn",
        "rect",
    ];
    const PARTS: [&str; 5] = ["bbox", "box", "polygon", "segmentation", "keypoint"];
    let name = name.to_ascii_lowercase();
    NAMES.contains(&name.as_str()) || PARTS.iter().any(|part| name.contains(part))
}

/// The row's class, by number, by name or by both.
fn class(place: &str, cells: &Cells, collector: &mut Collector) -> Result<Option<ClassRef>, Stop> {
    let whole = |field: usize| -> Result<Option<i64>, (Why, String)> {
        let Some(json) = &cells[field] else {
            return Ok(None);
        };
        let text = json::as_string(json).unwrap_or_else(|| json.clone());
        let wrong = || {
            (
                Why::Shape,
                format!("{} is {json}, not a whole number", FIELDS[field].0),
            )
        };
        json::as_integer(text.trim()).map(Some).ok_or_else(wrong)
    };
    // A number in the place of the name (as in the canonical rows) is the class's id.
    let (mut id, mut name) = (whole(CLASS_ID)?, None);
    match &cells[CLASS] {
        None => {}
        Some(json) => match json::as_string(json) {
            Some(text) => name = Some(text.trim().to_owned()),
            None => id = id.or(whole(CLASS)?),
        },
    }
    Ok(match (id, name) {
        (None, None) => None,
        (Some(id), None) => Some(collector.classes.by_id(id)?),
        (None, Some(name)) => collector
            .classes
            .named(place, &name, &mut collector.refusals)?,
        (Some(id), Some(name)) => {
            collector
                .classes
                .declare(place, id, &name, None, true, &mut collector.refusals)?;
            Some(ClassRef::Id(id))
        }
    })
}

fn pixels(cells: &Cells, field: usize) -> Result<Option<i64>, (Why, String)> {
    match number(cells, field)? {
        None => Ok(None),
        Some(n) if n >= 1.0 && n.fract() == 0.0 && n <= f64::from(i32::MAX) => Ok(Some(n as i64)),
        Some(n) => Err((
            Why::Shape,
            format!("{} is {n}, not a number of pixels", FIELDS[field].0),
        )),
    }
}

/// A field that holds JSON: as it is in JSON Lines, written out in a cell of a CSV. Outer `None`:
/// it was refused.
fn structure(
    cells: &Cells,
    field: usize,
    place: &str,
    refusals: &mut Refusals,
) -> Option<Option<String>> {
    let Some(json) = &cells[field] else {
        return Some(None);
    };
    match json::as_string(json) {
        Some(text) => json::compact(&text, place, refusals).map(Some),
        None => Some(Some(json.clone())),
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn masks_as_runs() {
        // 3 wide and 4 high: pixels 2 and 3 of the first column, and all of the second.
        let shape = runs("\"2 2 5 4\"", Some((3, 4))).unwrap();
        assert_eq!(
            shape.extent,
            Some(Extent::Box {
                x: 0.0,
                y: 0.0,
                w: 2.0,
                h: 4.0
            })
        );
        let shape = runs("\"2 2\"", Some((3, 4))).unwrap();
        assert_eq!(
            shape.extent,
            Some(Extent::Box {
                x: 0.0,
                y: 1.0,
                w: 1.0,
                h: 2.0
            })
        );
        assert_eq!(
            shape.geom.as_deref(),
            Some(r#"{"format":"kaggle","counts":"2 2"}"#)
        );
        assert_eq!(runs("\"2 2\"", None).unwrap().extent, Some(Extent::None));
        for bad in ["\"1\"", "\"0 5\"", "\"a b\"", "\"12 2\""] {
            assert!(runs(bad, Some((3, 4))).is_err(), "{bad}");
        }
    }
}

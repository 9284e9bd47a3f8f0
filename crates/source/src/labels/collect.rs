//! What every format reader hands its records to: samples, classes and annotations in any order.
//!
//! Records go into one external sort by sample, so that afterwards each sample comes with all that
//! was said of it, in the order of the manifest and independent of the order in the input. Checks
//! that need only the record happen here; those that need the image's size, the class list or the
//! dataset happen when the rows are written (`write`).

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use base::fault::Fault;
use base::limits::LABEL_SORT_BYTES;
use base::names::RelPath;
use base::omitted::{Category, Omitted};
use content::chunk::Hash;

use super::classes::Classes;
use super::encoding::{TextEncoding, Utf8Reader};
use super::json;
use super::path_rules::{PathFrom, PathRules};
use super::polygon;
use super::refuse::{Refusals, Why};
use super::rle;
use super::sort::Sorter;
use super::text::json_string;

/// The tags that stand behind the path in a sort key: what is said of a sample comes before its
/// annotations.
const TAG_SAMPLE: u8 = 0;
pub(super) const TAG_ANNOTATION: u8 = 1;

/// How an annotation names its class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum ClassRef {
    /// By an id of the class list.
    Id(i64),
    /// By name: the index that [`Classes::named`] gave it.
    Named(u32),
}

/// Where an annotation lies, in absolute pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Extent {
    /// Nowhere in particular: it speaks of the whole image, or its shape has no box.
    None,
    Point {
        x: f64,
        y: f64,
    },
    /// Left, top, width, height.
    Box {
        x: f64,
        y: f64,
        w: f64,
        h: f64,
    },
}

impl Extent {
    /// The box around points given as x, y, x, y…; `None` without any.
    pub(super) fn around(points: &[f64]) -> Option<Self> {
        let mut pairs = points.chunks_exact(2);
        let first = pairs.next()?;
        let (mut left, mut top, mut right, mut bottom) = (first[0], first[1], first[0], first[1]);
        for pair in pairs {
            (left, right) = (left.min(pair[0]), right.max(pair[0]));
            (top, bottom) = (top.min(pair[1]), bottom.max(pair[1]));
        }
        Some(Extent::Box {
            x: left,
            y: top,
            w: right - left,
            h: bottom - top,
        })
    }
}

/// One annotation as a format reader sees it. The JSON texts are compact and valid.
#[derive(Clone, Copy)]
pub(super) struct Annotation<'a> {
    pub(super) place: &'a str,
    pub(super) class: Option<ClassRef>,
    pub(super) kind: &'a str,
    pub(super) extent: Extent,
    /// The extent is the upright box around a shape that is turned or bent: it may reach over the
    /// image where the shape does not.
    pub(super) is_hull: bool,
    pub(super) geom: Option<&'a str>,
    pub(super) attrs: Option<&'a str>,
    pub(super) raw: &'a str,
}

/// What a format reader knows of a sample.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Sample<'a> {
    pub(super) place: &'a str,
    /// The record is the sample's own: a second one is an error. Else it repeats what each row of a
    /// table says.
    pub(super) declared: bool,
    pub(super) width: Option<i64>,
    pub(super) height: Option<i64>,
    pub(super) split: Option<&'a str>,
    pub(super) split_from: SplitFrom,
    pub(super) meta: Option<&'a str>,
    /// What its file hashes to, where a database says it.
    pub(super) hash: Option<Hash>,
}

/// What says which split a sample is in; of two that differ the one that comes first here counts.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum SplitFrom {
    /// The sample's own record. Two that differ are refused.
    #[default]
    Record,
    /// A list of images: the lists in their order.
    List(u8),
    /// The name of a folder.
    Folder,
}

/// An annotation between the sort's ends.
#[derive(Serialize, Deserialize)]
pub(super) struct AnnotationRecord<'a> {
    pub(super) place: &'a str,
    pub(super) class: Option<ClassRef>,
    /// x, y, w, h; a point has no width and height.
    pub(super) extent: Option<[f64; 4]>,
    pub(super) is_hull: bool,
    /// Left, top, right and bottom of its points.
    pub(super) reach: Option<[f64; 4]>,
    /// The width and height of its mask.
    pub(super) mask: Option<[i64; 2]>,
    /// The canonical row from its `kind` on.
    pub(super) tail: &'a str,
}

impl AnnotationRecord<'_> {
    /// The record of the source, as JSON.
    pub(super) fn raw(&self) -> Option<String> {
        #[derive(Deserialize)]
        struct Raw {
            raw: Box<serde_json::value::RawValue>,
        }
        let row = format!("{{{}", self.tail);
        let row: Raw = serde_json::from_str(&row).ok()?;
        Some(row.raw.get().to_owned())
    }
}

/// Takes all records of one label set.
pub(super) struct Collector {
    pub(super) refusals: Refusals,
    /// What is in the input and in none of the records.
    pub(super) omitted: Omitted,
    pub(super) classes: Classes,
    pub(super) scratch: PathBuf,
    pub(super) rows: Sorter,
    /// Annotation ids, each with its place, to find those that come twice.
    pub(super) ids: Sorter,
    /// Annotations of a sample come in the order of their content, because the input has none.
    pub(super) by_content: bool,
    /// What the text is in, where the user names it.
    pub(super) encoding: Option<TextEncoding>,
    rules: PathRules,
    key: Vec<u8>,
    record: Vec<u8>,
}

impl Collector {
    pub(super) fn new(scratch: &Path, rules: PathRules) -> Self {
        Self {
            refusals: Refusals::default(),
            omitted: Omitted::default(),
            classes: Classes::default(),
            scratch: scratch.into(),
            rows: Sorter::new(scratch, LABEL_SORT_BYTES),
            ids: Sorter::new(scratch, LABEL_SORT_BYTES / 4),
            by_content: false,
            encoding: None,
            rules,
            key: Vec::new(),
            record: Vec::new(),
        }
    }

    /// The sample's path in the dataset, by the rules of [`PathRules`].
    pub(super) fn path(&mut self, place: &str, text: &str) -> Option<RelPath> {
        let (path, changed) = self.rules.apply(text);
        if changed {
            self.note_path(place, text, &path);
        }
        match path.parse() {
            Ok(path) => Some(path),
            Err(error) => {
                self.refusals.add(Why::BadPath, place, error);
                None
            }
        }
    }

    /// Where sample paths come from.
    pub(super) fn path_from(&self) -> PathFrom {
        self.rules.from
    }

    /// Reports that a sample has another path than its record says.
    pub(super) fn note_path(&mut self, place: &str, from: &str, to: &str) {
        if self.omitted.wants_example(Category::ChangedPaths) {
            self.omitted
                .add(Category::ChangedPaths, format!("{place}: {from} -> {to}"));
        } else {
            self.omitted.add_many(Category::ChangedPaths, 1, []);
        }
    }

    /// Reports the encoding of a file, if it was inferred.
    pub(super) fn note_encoding(&mut self, file: &str, inferred: Option<&str>) {
        if let Some(name) = inferred {
            self.omitted.add(
                Category::Inferred,
                format!("{file} is read as {name} (--encoding {name})"),
            );
        }
    }

    /// A reader of the file's text as UTF-8.
    pub(super) fn utf8<R: std::io::Read>(&self, file: R) -> Utf8Reader<R> {
        Utf8Reader::new(file, self.encoding)
    }

    /// Takes what is known of a sample.
    pub(super) fn sample(&mut self, path: &RelPath, sample: &Sample<'_>) -> Result<(), Fault> {
        encode(sample, &mut self.record)?;
        row_key(path.as_str(), TAG_SAMPLE, &mut self.key);
        self.rows.push(&self.key, &self.record)
    }

    /// Takes an annotation of a sample.
    pub(super) fn annotation(
        &mut self,
        path: &RelPath,
        annotation: &Annotation<'_>,
    ) -> Result<(), Fault> {
        if self.encode_annotation(annotation)?.is_none() {
            return Ok(());
        }
        row_key(path.as_str(), TAG_ANNOTATION, &mut self.key);
        if self.by_content {
            let record: AnnotationRecord<'_> = decode(&self.record)?;
            self.key.extend_from_slice(record.tail.as_bytes());
            self.key.extend_from_slice(
                record
                    .class
                    .map(|class| self.classes.word(class))
                    .unwrap_or_default()
                    .as_bytes(),
            );
        }
        self.rows.push(&self.key, &self.record)
    }

    /// Takes an annotation that was encoded before, when its sample was not known yet.
    pub(super) fn encoded_annotation(
        &mut self,
        path: &RelPath,
        record: &[u8],
    ) -> Result<(), Fault> {
        row_key(path.as_str(), TAG_ANNOTATION, &mut self.key);
        self.rows.push(&self.key, record)
    }

    /// An annotation's record for the sort; `None` when it was refused.
    pub(super) fn encode_annotation(
        &mut self,
        annotation: &Annotation<'_>,
    ) -> Result<Option<&[u8]>, Fault> {
        let extent = match annotation.extent {
            Extent::None => None,
            // Adding zero makes 0 of -0, which would print otherwise.
            Extent::Point { x, y } => Some([x + 0.0, y + 0.0, 0.0, 0.0]),
            Extent::Box { x, y, w, h } => Some([x + 0.0, y + 0.0, w, h]),
        };
        // The right and lower edges count too.
        let edges = |[x, y, w, h]: [f64; 4]| [x, y, w, h, x + w, y + h];
        if extent.is_some_and(|numbers| edges(numbers).iter().any(|n| !n.is_finite())) {
            let (place, raw) = (annotation.place, Some(annotation.raw));
            self.refusals
                .add_record(Why::NotFinite, place, "its box is not finite", raw);
            return Ok(None);
        }
        if let Extent::Box { w, h, .. } = annotation.extent
            && (w <= 0.0 || h <= 0.0)
            // A level line is no mistake.
            && annotation.kind != "polyline"
        {
            self.refusals.add_record(
                Why::EmptyBox,
                annotation.place,
                format!("the box is {w} wide and {h} high"),
                Some(annotation.raw),
            );
            return Ok(None);
        }
        let geom = match checked_geom(annotation) {
            Ok(geom) => geom,
            Err(detail) => {
                let (place, raw) = (annotation.place, Some(annotation.raw));
                self.refusals.add_record(Why::Shape, place, detail, raw);
                return Ok(None);
            }
        };
        let annotation = &Annotation {
            geom: geom.as_deref(),
            ..*annotation
        };
        let is_point = matches!(annotation.extent, Extent::Point { .. });
        let tail = tail(annotation, extent, is_point);
        let record = AnnotationRecord {
            place: annotation.place,
            class: annotation.class,
            extent,
            is_hull: annotation.is_hull,
            reach: reach(annotation),
            mask: mask(annotation),
            tail: &tail,
        };
        encode(&record, &mut self.record)?;
        Ok(Some(&self.record))
    }

    /// Notes an annotation's id (a JSON number or string), which must be the only one.
    pub(super) fn annotation_id(&mut self, place: &str, id: &str) -> Result<(), Fault> {
        self.ids.push(id.as_bytes(), place.as_bytes())
    }
}

/// The geometry of a polygon or a mask in its canonical form, or what is wrong with it.
fn checked_geom<'a>(annotation: &Annotation<'a>) -> Result<Option<Cow<'a, str>>, String> {
    let Some(geom) = annotation.geom else {
        return Ok(None);
    };
    match annotation.kind {
        "polygon" => {
            let (geom, _) = polygon::rings(geom)
                .map_err(|detail| format!("its polygon cannot be read: {detail}"))?;
            Ok(Some(geom))
        }
        "rle" => rle::check(geom).map(|()| Some(Cow::Borrowed(geom))),
        _ => Ok(Some(Cow::Borrowed(geom))),
    }
}

/// How far the points of a polygon, a line or keypoints reach. Keypoints that are not marked have
/// no position.
fn reach(annotation: &Annotation<'_>) -> Option<[f64; 4]> {
    let numbers = match annotation.kind {
        "polygon" | "polyline" => json::as_numbers(annotation.geom?)?,
        "keypoints" => {
            let numbers = json::as_numbers(annotation.geom?)?;
            let marked = numbers.chunks_exact(3).filter(|point| point[2] > 0.0);
            marked.flat_map(|point| [point[0], point[1]]).collect()
        }
        _ => return None,
    };
    match Extent::around(&numbers)? {
        Extent::Box { x, y, w, h } => Some([x, y, x + w, y + h]),
        Extent::None | Extent::Point { .. } => None,
    }
}

/// The size that a mask as runs states: COCO's `size` is height, width.
fn mask(annotation: &Annotation<'_>) -> Option<[i64; 2]> {
    #[derive(Deserialize)]
    struct Mask {
        size: [i64; 2],
    }
    let geom = annotation.geom.filter(|_| annotation.kind == "rle")?;
    let Mask {
        size: [height, width],
    } = serde_json::from_str(geom).ok()?;
    Some([width, height])
}

/// The canonical row from its `kind` on, as `labels::AnnotationRow` serialises it.
fn tail(annotation: &Annotation<'_>, extent: Option<[f64; 4]>, is_point: bool) -> String {
    let mut out =
        String::with_capacity(96 + annotation.raw.len() + annotation.geom.map_or(0, str::len));
    out.push_str("\"kind\":\"");
    out.push_str(annotation.kind);
    out.push('"');
    for (at, name) in ["x", "y", "w", "h"].into_iter().enumerate() {
        out.push_str(",\"");
        out.push_str(name);
        out.push_str("\":");
        match extent {
            Some(numbers) if !(is_point && at >= 2) => push_number(&mut out, numbers[at]),
            _ => out.push_str("null"),
        }
    }
    for (name, json) in [
        ("geom", annotation.geom),
        ("attrs", annotation.attrs),
        ("raw", Some(annotation.raw)),
    ] {
        out.push_str(",\"");
        out.push_str(name);
        out.push_str("\":");
        out.push_str(json.unwrap_or("null"));
    }
    out.push('}');
    out
}

/// A finite number as `serde_json` prints it.
pub(super) fn push_number(out: &mut String, number: f64) {
    match serde_json::Number::from_f64(number) {
        Some(number) => out.push_str(&number.to_string()),
        None => out.push_str("null"),
    }
}

/// The numbers as a JSON list.
pub(super) fn number_list(numbers: &[f64]) -> String {
    let mut out = String::from("[");
    for (at, number) in numbers.iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        push_number(&mut out, *number);
    }
    out + "]"
}

/// What is sorted, as bytes.
pub(super) fn encode<T: Serialize>(value: &T, out: &mut Vec<u8>) -> Result<(), Fault> {
    let mut buffer = std::mem::take(out);
    buffer.clear();
    *out = postcard::to_extend(value, buffer)
        .map_err(|error| Fault::internal(format!("encode a label row: {error}")))?;
    Ok(())
}

/// What [`Collector`] encoded.
pub(super) fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Fault> {
    postcard::from_bytes(bytes)
        .map_err(|error| Fault::internal(format!("decode a label row: {error}")))
}

/// The sort key of a row: the path with NUL for '/', two NULs, the tag; behind it whatever else
/// orders the rows.
///
/// Paths hold no NUL and no empty component, so keys compare bytewise as paths do in the manifest:
/// component by component, and a path before those that it begins.
pub(super) fn row_key(path: &str, tag: u8, out: &mut Vec<u8>) {
    out.clear();
    out.extend(path.bytes().map(|b| if b == b'/' { 0 } else { b }));
    out.extend([0, 0, tag]);
}

/// The path part of a row's key, and the tag.
pub(super) fn split_key(key: &[u8]) -> (&[u8], u8) {
    // Nothing in a path is two NULs, so the first pair ends it.
    match key.windows(2).position(|pair| pair == [0, 0]) {
        Some(end) => (&key[..end], key.get(end + 2).copied().unwrap_or(0)),
        None => (key, 0),
    }
}

/// The path that a key's path part stands for.
pub(super) fn key_path(part: &[u8]) -> Result<RelPath, Fault> {
    let bytes = part
        .iter()
        .map(|b| if *b == 0 { b'/' } else { *b })
        .collect();
    let path = String::from_utf8(bytes)
        .map_err(|error| Fault::internal(format!("decode a label row's path: {error}")))?;
    Ok(path.parse()?)
}

/// An id (a JSON number or string) in one spelling; `None` when it is neither. `"7"` and 7 are one.
pub(super) fn id_text(json: &str) -> Option<String> {
    if json.starts_with('"') {
        let text = json::as_string(json)?;
        let is_plain = text
            .parse::<i64>()
            .is_ok_and(|number| number.to_string() == text);
        return Some(if is_plain { text } else { json_string(&text) });
    }
    json::as_integer(json).map(|n| n.to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn keys_compare_as_paths_do(a in "[ab\u{1}.-]{1,3}(/[ab!\u{1}]{1,3}){0,3}", b in "[ab\u{1}.-]{1,3}(/[ab!\u{1}]{1,3}){0,3}") {
            let (Ok(left), Ok(right)) = (a.parse::<RelPath>(), b.parse::<RelPath>()) else { return Ok(()) };
            let key = |path: &RelPath, tag| {
                let mut out = Vec::new();
                row_key(path.as_str(), tag, &mut out);
                out
            };
            prop_assert_eq!(key(&left, 1).cmp(&key(&right, 1)), left.cmp(&right));
            if left < right {
                prop_assert!(key(&left, 1) < key(&right, 0));
            }
            let coded = key(&left, 1);
            let (part, tag) = split_key(&coded);
            prop_assert_eq!((key_path(part).unwrap(), tag), (left, 1));
        }
    }
}

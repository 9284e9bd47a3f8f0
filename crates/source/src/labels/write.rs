//! Writes the canonical files from the sorted records, and checks what needs a whole sample in
//! view.
//!
//! One pass over samples in manifest order: it joins them with the dataset's files (which come in
//! the same order), brings together what several records say of one sample, and holds annotations
//! against the image's size and the list of classes.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::value::RawValue;

use base::fault::{Fault, IoContext};
use base::names::RelPath;
use base::omitted::{Category, Omitted};
use content::chunk::Hash;
use content::label_rows::{ANNOTATIONS, AnnotationRow, CLASSES, ClassRow, SAMPLES, SampleRow};
use content::manifest::{DatasetBinding, FileInfo};

use super::classes::ClassTable;
use super::collect::{
    AnnotationRecord, ClassRef, Collector, Extent, Sample, SplitFrom, TAG_ANNOTATION, decode,
    key_path, number_list, split_key,
};
use super::json;
use super::polygon;
use super::refuse::{OnBad, Refusals, Why};
use super::sort::Sorter;
use super::{BoundDataset, DatasetFiles};

/// How far a box may reach over its image, in pixels: tools round, and count from 0 or from 1.
const OUTSIDE_TOLERANCE_PX: f64 = 1.0;

/// How many rows were written.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Counts {
    pub(super) samples: u64,
    pub(super) annotations: u64,
    pub(super) classes: u64,
}

/// Writes the three files into the collector's scratch folder, or says everything that is wrong
/// with the input.
pub(super) fn write(
    collector: Collector,
    dataset: Option<BoundDataset>,
    allow_missing: bool,
) -> Result<(Counts, Option<DatasetBinding>, Omitted), Fault> {
    let Collector {
        mut refusals,
        mut omitted,
        classes,
        scratch,
        rows,
        ids,
        ..
    } = collector;
    let twice = find_duplicate_ids(ids, &mut refusals)?;
    let classes = classes.resolve(&mut refusals);
    let (files, binding) = match dataset {
        Some(BoundDataset { binding, files }) => (Some(files), Some(binding)),
        None => (None, None),
    };
    let mut pass = Pass {
        classes: &classes,
        refusals: &mut refusals,
        omitted: &mut omitted,
        annotations: Lines::create(&scratch, ANNOTATIONS)?,
        samples: Lines::create(&scratch, SAMPLES)?,
        dataset: files.map(|files| Join { files, head: None }),
        dataset_name: binding
            .as_ref()
            .map(|b| b.artifact.to_string())
            .unwrap_or_default(),
        allow_missing,
        twice,
        open: None,
    };
    let mut rows = rows.finish()?;
    let mut key = Vec::new();
    while let Some((row_key, record)) = rows.next()? {
        let (path, tag) = split_key(row_key);
        if key != path || pass.open.is_none() {
            key.clear();
            key.extend_from_slice(path);
            pass.close()?;
            pass.open(path)?;
        }
        if tag == TAG_ANNOTATION {
            pass.annotation(&decode(record)?)?;
        } else {
            pass.sample(&decode(record)?);
        }
    }
    pass.close()?;
    let Pass {
        annotations,
        samples,
        ..
    } = pass;
    let counts = Counts {
        samples: samples.finish()?,
        annotations: annotations.finish()?,
        classes: write_classes(&classes, &scratch)?,
    };
    refusals.check()?;
    refusals.report(&mut omitted);
    Ok((counts, binding, omitted))
}

/// Annotations left out because another has their id, at most.
const TWICE_MAX: usize = 100_000;

/// Refuses annotations whose id came before; gives their places where they are left out.
fn find_duplicate_ids(ids: Sorter, refusals: &mut Refusals) -> Result<HashSet<String>, Fault> {
    let mut ids = ids.finish()?;
    let (mut last, mut first_place) = (Vec::new(), Vec::new());
    let mut twice = HashSet::new();
    while let Some((id, place)) = ids.next()? {
        if last == id {
            let place = String::from_utf8_lossy(place);
            let first = String::from_utf8_lossy(&first_place);
            let detail = format!("its id is that of {first} already");
            refusals.add(Why::DuplicateAnnotation, &place, detail);
            if refusals.on_bad != OnBad::Refuse {
                twice.insert(place.into_owned());
                if twice.len() > TWICE_MAX {
                    return Err(Fault::integrity(format!(
                        "more than {TWICE_MAX} annotations have the id of another"
                    ))
                    .with_next(Why::DuplicateAnnotation.advice()));
                }
            }
            continue;
        }
        last = id.to_vec();
        first_place = place.to_vec();
    }
    Ok(twice)
}

fn write_classes(classes: &ClassTable, scratch: &Path) -> Result<u64, Fault> {
    let mut lines = Lines::create(scratch, CLASSES)?;
    for (id, class) in &classes.rows {
        lines.row(&ClassRow {
            id: *id,
            name: class.name.clone(),
            attrs: raw(class.attrs.as_deref())?,
        })?;
    }
    lines.finish()
}

/// The state of the pass.
struct Pass<'a> {
    classes: &'a ClassTable,
    refusals: &'a mut Refusals,
    omitted: &'a mut Omitted,
    annotations: Lines,
    samples: Lines,
    dataset: Option<Join>,
    dataset_name: String,
    allow_missing: bool,
    /// Places of annotations that are left out for their ids.
    twice: HashSet<String>,
    open: Option<Open>,
}

/// The sample whose records are coming.
struct Open {
    path: RelPath,
    /// The path as JSON, for each annotation's line.
    json: String,
    hash: Option<Hash>,
    /// The sample is left out, and all that is said of it.
    is_dropped: bool,
    declared: bool,
    width: Option<i64>,
    height: Option<i64>,
    split: Option<(String, SplitFrom)>,
    meta: Option<String>,
}

impl Pass<'_> {
    fn open(&mut self, key: &[u8]) -> Result<(), Fault> {
        let path = key_path(key)?;
        let (mut hash, mut is_dropped) = (None, false);
        if let Some(dataset) = &mut self.dataset {
            hash = dataset.find(&path)?;
            if hash.is_none() && !self.allow_missing {
                is_dropped = self.refusals.on_bad != OnBad::Refuse;
                self.refusals.add(
                    Why::MissingSample,
                    &path,
                    format!("{} has no such file", self.dataset_name),
                );
            }
        }
        let json = super::text::json_string(path.as_str());
        self.open = Some(Open {
            path,
            json,
            hash,
            is_dropped,
            declared: false,
            width: None,
            height: None,
            split: None,
            meta: None,
        });
        Ok(())
    }

    fn sample(&mut self, sample: &Sample<'_>) {
        let Some(open) = &mut self.open else { return };
        if sample.declared && open.declared {
            self.refusals.add(
                Why::DuplicateSample,
                sample.place,
                format!("{:?} was named before", open.path.as_str()),
            );
            return;
        }
        open.declared |= sample.declared;
        for (name, known, said) in [
            ("width", &mut open.width, sample.width),
            ("height", &mut open.height, sample.height),
        ] {
            match (*known, said) {
                (Some(known), Some(said)) if known != said => {
                    let detail = format!(
                        "the {name} of {:?} is {said} here and {known} before",
                        open.path.as_str()
                    );
                    self.refusals.add(Why::Conflict, sample.place, detail);
                }
                _ => *known = known.or(said),
            }
        }
        if let Some(said) = sample.split {
            match &open.split {
                Some((known, from)) if known != said && *from == sample.split_from => {
                    let detail = format!(
                        "{:?} is in the split {said:?} here and in {known:?} before",
                        open.path.as_str()
                    );
                    self.refusals.add(Why::Conflict, sample.place, detail);
                }
                Some((known, from)) => {
                    if known != said
                        && [*from, sample.split_from]
                            .iter()
                            .all(|from| matches!(from, SplitFrom::List(_)))
                    {
                        let first = if *from < sample.split_from {
                            known
                        } else {
                            said
                        };
                        let detail = format!(
                            "{} is in the lists of {known} and {said}; {first} counts",
                            open.path
                        );
                        self.omitted.add(Category::Inferred, detail);
                    }
                    if sample.split_from < *from {
                        open.split = Some((said.to_owned(), sample.split_from));
                    }
                }
                None => open.split = Some((said.to_owned(), sample.split_from)),
            }
        }
        match (open.hash, sample.hash) {
            (Some(known), Some(said)) if known != said => {
                let detail = format!(
                    "{:?} hashes to {said} here and to {known} before",
                    open.path.as_str()
                );
                self.refusals.add(Why::Conflict, sample.place, detail);
            }
            (None, Some(said)) if self.dataset.is_none() => open.hash = Some(said),
            _ => {}
        }
        if open.meta.is_none() {
            open.meta = sample.meta.map(str::to_owned);
        }
    }

    fn annotation(&mut self, annotation: &AnnotationRecord<'_>) -> Result<(), Fault> {
        let Some(open) = &self.open else {
            return Ok(());
        };
        if open.is_dropped || self.twice.contains(annotation.place) {
            return Ok(());
        }
        let class = match annotation.class {
            None => "null".to_owned(),
            Some(class) => match self.classes.id(class) {
                Some(id) => id.to_string(),
                None => {
                    let name = if let ClassRef::Id(id) = class {
                        format!("class {id}")
                    } else {
                        "its class".to_owned()
                    };
                    let detail = format!("{name} is not in the list of classes");
                    self.refuse(Why::UnknownClass, annotation, detail);
                    return Ok(());
                }
            },
        };
        let mut cut: Option<String> = None;
        if let Some([x, y, w, h]) = annotation.extent {
            let beyond = |start: f64, length: f64, size: Option<i64>| {
                start < -OUTSIDE_TOLERANCE_PX
                    || size.is_some_and(|size| start + length > size as f64 + OUTSIDE_TOLERANCE_PX)
            };
            // A box around a turned shape may reach over the image, but not lie beside it.
            let beside = |start: f64, length: f64, size: Option<i64>| {
                start + length < 0.0 || size.is_some_and(|size| start > size as f64)
            };
            let is_outside = match annotation.is_hull {
                true => beside(x, w, open.width) || beside(y, h, open.height),
                false => beyond(x, w, open.width) || beyond(y, h, open.height),
            };
            if is_outside {
                cut = clipped(annotation, open, self.refusals.on_bad);
            }
            if is_outside && cut.is_none() {
                let size = |n: Option<i64>| n.map_or("?".to_owned(), |n| n.to_string());
                let detail = format!(
                    "{w} × {h} at {x}, {y} reaches out of {:?} ({} × {})",
                    open.path.as_str(),
                    size(open.width),
                    size(open.height)
                );
                self.refuse(Why::OutsideImage, annotation, detail);
                return Ok(());
            }
        }
        if let Some([left, top, right, bottom]) = annotation.reach
            && cut.is_none()
        {
            let over = |start: f64, end: f64, size: Option<i64>| {
                start < -OUTSIDE_TOLERANCE_PX
                    || size.is_some_and(|size| end > size as f64 + OUTSIDE_TOLERANCE_PX)
            };
            let is_outside = over(left, right, open.width) || over(top, bottom, open.height);
            if is_outside {
                cut = clipped(annotation, open, self.refusals.on_bad);
            }
            if is_outside && cut.is_none() {
                let detail = format!(
                    "its points lie within {left}, {top} and {right}, {bottom}, which reaches out of {:?}",
                    open.path.as_str()
                );
                self.refuse(Why::OutsideImage, annotation, detail);
                return Ok(());
            }
        }
        if let (Some([width, height]), Some(w), Some(h)) =
            (annotation.mask, open.width, open.height)
            && (width, height) != (w, h)
        {
            let detail = format!(
                "its mask is {width} × {height}, and {:?} is {w} × {h}",
                open.path.as_str()
            );
            self.refuse(Why::Conflict, annotation, detail);
            return Ok(());
        }
        if cut.is_some() {
            self.omitted.add(Category::ClippedShapes, annotation.place);
        }
        self.annotations.parts(&[
            "{\"sample\":",
            &open.json,
            ",\"class\":",
            &class,
            ",",
            cut.as_deref().unwrap_or(annotation.tail),
        ])
    }

    fn refuse(&mut self, why: Why, annotation: &AnnotationRecord<'_>, detail: String) {
        let raw = annotation.raw();
        self.refusals
            .add_record(why, annotation.place, detail, raw.as_deref());
    }

    fn close(&mut self) -> Result<(), Fault> {
        let Some(open) = self.open.take() else {
            return Ok(());
        };
        if open.is_dropped {
            return Ok(());
        }
        self.samples.row(&SampleRow {
            path: open.path.into(),
            hash: open.hash,
            width: open.width,
            height: open.height,
            split: open.split.map(|(split, _)| split),
            meta: raw(open.meta.as_deref())?,
        })
    }
}

/// The row of a shape that reaches out of its image, cut at the edges, where that is asked for and
/// something is left.
fn clipped(annotation: &AnnotationRecord<'_>, open: &Open, on_bad: OnBad) -> Option<String> {
    const HEAD: &str = "{\"sample\":\"\",\"class\":null,";
    if on_bad != OnBad::Clip {
        return None;
    }
    let (width, height) = (open.width? as f64, open.height? as f64);
    let row = format!("{HEAD}{}", annotation.tail);
    let mut row: AnnotationRow = serde_json::from_str(&row).ok()?;
    let cut = |start: f64, end: f64, size: f64| (start.clamp(0.0, size), end.clamp(0.0, size));
    if let (Some(x), Some(y)) = (row.x, row.y) {
        let (left, right) = cut(x, x + row.w.unwrap_or(0.0), width);
        let (top, bottom) = cut(y, y + row.h.unwrap_or(0.0), height);
        if row.w.is_some() && (right <= left || bottom <= top) {
            return None;
        }
        (row.x, row.y) = (Some(left), Some(top));
        (row.w, row.h) = (row.w.map(|_| right - left), row.h.map(|_| bottom - top));
    }
    if let Some(geom) = &row.geom {
        let geom = match row.kind.as_str() {
            "polygon" => {
                let (_, rings) = polygon::rings(geom.get()).ok()?;
                let kept = polygon::clipped(&rings, width, height);
                let around = Extent::around(&kept.concat())?;
                // A box that is the one around the polygon stays that.
                if annotation.extent.is_some()
                    && annotation.extent == sides(Extent::around(&rings.concat()))
                {
                    let [x, y, w, h] = sides(Some(around))?.map(Some);
                    (row.x, row.y, row.w, row.h) = (x, y, w, h);
                }
                polygon::list(&kept)
            }
            "keypoints" => clipped_points(geom.get(), width, height)?,
            _ => return None,
        };
        row.geom = Some(RawValue::from_string(geom).ok()?);
    }
    let text = serde_json::to_string(&row).ok()?;
    Some(text.strip_prefix(HEAD)?.to_owned())
}

/// Left, top, width and height of a box.
fn sides(extent: Option<Extent>) -> Option<[f64; 4]> {
    match extent? {
        Extent::Box { x, y, w, h } => Some([x, y, w, h]),
        Extent::None | Extent::Point { .. } => None,
    }
}

/// Keypoints, those outside of the image as not marked.
fn clipped_points(json: &str, width: f64, height: f64) -> Option<String> {
    let mut numbers = json::as_numbers(json)?;
    for point in numbers.chunks_exact_mut(3) {
        if !(0.0..=width).contains(&point[0]) || !(0.0..=height).contains(&point[1]) {
            point.fill(0.0);
        }
    }
    Some(number_list(&numbers))
}

/// JSON text that was checked when it was read, as a value to be written as it is.
fn raw(json: Option<&str>) -> Result<Option<Box<RawValue>>, Fault> {
    let parse = |json: &str| RawValue::from_string(json.to_owned());
    json.map(parse)
        .transpose()
        .map_err(|error| Fault::internal(format!("write a label row: {error}")))
}

/// The dataset's files, walked beside the samples.
struct Join {
    files: DatasetFiles,
    head: Option<(RelPath, FileInfo)>,
}

impl Join {
    /// The hash of this file; paths must be asked for in order.
    fn find(&mut self, path: &RelPath) -> Result<Option<Hash>, Fault> {
        loop {
            match &self.head {
                Some((head, info)) if head >= path => {
                    return Ok((head == path).then_some(info.hash));
                }
                _ => match self.files.next().transpose()? {
                    Some(next) => self.head = Some(next),
                    None => return Ok(None),
                },
            }
        }
    }
}

/// A JSON Lines file that is being written.
struct Lines {
    path: PathBuf,
    out: BufWriter<File>,
    count: u64,
}

impl Lines {
    fn create(scratch: &Path, name: &str) -> Result<Self, Fault> {
        let path = scratch.join(name);
        let file = File::create(&path).at(format!("make {}", path.display()))?;
        Ok(Self {
            path,
            out: BufWriter::with_capacity(256 << 10, file),
            count: 0,
        })
    }

    fn parts(&mut self, parts: &[&str]) -> Result<(), Fault> {
        self.count += 1;
        let mut write = || {
            for part in parts {
                self.out.write_all(part.as_bytes())?;
            }
            self.out.write_all(b"\n")
        };
        write().at(format_args!("write {}", self.path.display()))
    }

    fn row<T: serde::Serialize>(&mut self, row: &T) -> Result<(), Fault> {
        let line = serde_json::to_string(row)
            .map_err(|error| Fault::internal(format!("write a label row: {error}")))?;
        self.parts(&[&line])
    }

    fn finish(mut self) -> Result<u64, Fault> {
        self.out
            .flush()
            .at(format_args!("write {}", self.path.display()))?;
        Ok(self.count)
    }
}

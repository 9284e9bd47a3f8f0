//! COCO JSON (cocodataset.org/#format-data): one object with `images`, `annotations` and
//! `categories`.
//!
//! The three lists may come in any order and be of any length, so images and annotations first go
//! through a sort of their own by image id, which brings each annotation to its image, and only
//! then on to the collector. A folder of such files, one a split, is one set: ids count in each
//! file by themselves, and classes are the same in all.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use base::fault::Fault;
use base::limits::{LABEL_CLASSES_MAX, LABEL_SORT_BYTES};
use base::names::RelPath;
use base::omitted::Category;
use content::label_rows::AnnotationRow;

use super::collect::{
    Annotation, AnnotationRecord, ClassRef, Collector, Extent, Sample, decode, id_text,
};
use super::folder::{Input, has_extension};
use super::guess::{self, Format};
use super::images_beside::ImagesBeside;
use super::json::{self, Fields, JsonReader};
use super::label_files;
use super::polygon;
use super::recognise::Known;
use super::refuse::{OnBad, Why};
use super::rle;
use super::sort::Sorter;
use super::table_boxes::{Evidence, geom_to_pixels, to_pixels};
use super::{collect::SplitFrom, split};

/// Behind the image's id in the sort's keys: an image comes before its annotations.
const IMAGE: u8 = 0;
const ANNOTATION: u8 = 1;

/// An image between the sort's ends.
#[derive(serde::Serialize, serde::Deserialize)]
struct ImageRecord<'a> {
    path: &'a str,
    sample: Sample<'a>,
}

/// Reads a file, or a folder of files. `normalised` says whether boxes are fractions of their
/// images; else it is inferred, for each file.
pub(super) fn read(
    input: &Input,
    normalised: Option<bool>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let mut set = Set {
        normalised,
        ..Set::default()
    };
    let Some(inside) = input.folder() else {
        let shown = input.shown().display().to_string();
        set.file(input.file()?, &shown, collector)?;
        return set.finish(collector);
    };
    let is_coco = |file: &Path| {
        Ok(has_extension(file, &["json"])
            && guess::look(inside.file(file)?) == Some(Known::Format(Format::Coco)))
    };
    let (files, images) = label_files::few(inside, "COCO", is_coco, collector)?;
    if files.is_empty() {
        return Err(Fault::integrity("the folder holds no COCO file")
            .with_next("give the COCO file itself"));
    }
    for file in &files {
        let shown = file.display().to_string();
        set.home = Some(Home::of(file, &images));
        set.file(inside.file(file)?, &shown, collector)?;
    }
    set.finish(collector)
}

/// Where the images of one file of a folder are, and which split they are in.
struct Home<'a> {
    images: &'a ImagesBeside<'a>,
    /// The folders that are tried, with a slash at their end; the last is taken where no image is.
    folders: Vec<String>,
    split: Option<&'static str>,
}

impl<'a> Home<'a> {
    fn of(file: &Path, images: &'a ImagesBeside<'a>) -> Self {
        let shown = file.to_string_lossy();
        let folder = shown.rsplit_once('/').map_or("", |(folder, _)| folder);
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        let mut words = stem.split(['_', '-', '.']);
        let word = words.rfind(|word| split::of_name(word).is_some());
        let above = match folder.rsplit('/').next() {
            Some("annotations" | "Annotations") => {
                folder.rsplit_once('/').map_or("", |(above, _)| above)
            }
            _ => folder,
        };
        let within = |name: &str| match (above, name) {
            ("", "") => String::new(),
            ("", name) => format!("{name}/"),
            (above, "") => format!("{above}/"),
            (above, name) => format!("{above}/{name}/"),
        };
        let mut folders = Vec::new();
        if let Some(word) = word {
            folders.extend([within(word), within(&format!("images/{word}"))]);
        }
        folders.extend([within("images"), within("")]);
        let split = split::of_folder(&shown).or_else(|| word.and_then(split::of_name));
        Self {
            images,
            folders,
            split,
        }
    }

    /// The path of an image in the folder of the set.
    fn path(&self, name: &str) -> String {
        let mut paths = self.folders.iter().map(|folder| format!("{folder}{name}"));
        let found = paths.find(|path| self.images.holds(path));
        let last = self.folders.last().map_or("", String::as_str);
        found.unwrap_or_else(|| format!("{last}{name}"))
    }
}

/// A class as a file lists it.
struct ListedCategory {
    place: String,
    name: String,
    attrs: Option<String>,
    supercategory: Option<String>,
}

/// What all files of a set share.
#[derive(Default)]
struct Set<'a> {
    normalised: Option<bool>,
    home: Option<Home<'a>>,
    /// How many files were read before.
    files: u64,
    /// What stands before the places of records, where there are several files.
    prefix: String,
    boxes: Evidence,
    categories: BTreeMap<i64, Vec<ListedCategory>>,
    used: BTreeSet<i64>,
}

impl Set<'_> {
    fn file(&mut self, file: File, shown: &str, collector: &mut Collector) -> Result<(), Fault> {
        self.prefix = if self.home.is_some() {
            format!("{shown} ")
        } else {
            String::new()
        };
        self.boxes = Evidence::default();
        let file = collector.utf8(file);
        let inferred = file.inferred();
        let mut json = JsonReader::new(BufReader::with_capacity(256 << 10, file), shown.to_owned());
        let mut by_image = Sorter::new(&collector.scratch, LABEL_SORT_BYTES);
        let mut seen: Vec<String> = Vec::new();
        let mut record = Vec::new();
        json.expect(b'{')?;
        let mut first = true;
        while json.more(&mut first, b'}')? {
            let key = json.key()?;
            if !["images", "annotations", "categories"].contains(&key.as_str()) {
                json.capture(&mut record)?;
                if !matches!(record.as_slice(), b"{}" | b"[]" | b"null" | b"\"\"") {
                    let member = format!("{}{key}", self.prefix);
                    collector.omitted.add(Category::UnreadMembers, member);
                }
                continue;
            }
            if seen.contains(&key) {
                return Err(json.fault(format_args!("the list {key:?} comes twice")));
            }
            if json.peek()? != Some(b'[') {
                return Err(json.fault(format_args!("{key:?} is not a list")));
            }
            json.expect(b'[')?;
            let mut first_item = true;
            let mut number = 0u64;
            while json.more(&mut first_item, b']')? {
                let flags = json.capture(&mut record)?;
                let place = format!("{}{key}[{number}]", self.prefix);
                number += 1;
                let Some(text) = json::vet(&record, flags, &place, &mut collector.refusals) else {
                    continue;
                };
                let Some(fields) = Fields::parse(text, &place, &mut collector.refusals) else {
                    continue;
                };
                match key.as_str() {
                    "images" => self.image(text, fields, place, collector, &mut by_image)?,
                    "annotations" => {
                        self.annotation(text, fields, place, collector, &mut by_image)?;
                    }
                    _ => self.category(fields, &place, collector)?,
                }
            }
            seen.push(key);
        }
        json.end()?;
        collector.note_encoding(shown, inferred.name());
        let has_images = seen.iter().any(|key| key == "images");
        if !has_images {
            let what = if self.home.is_some() { shown } else { "it" };
            return Err(Fault::integrity(format!(
                "{what} has no list \"images\", so it is not COCO"
            ))
            .with_next(
                "give a COCO file with images, annotations and categories, or name another format",
            ));
        }
        self.files += 1;
        let is_normalised = self.normalised.unwrap_or(self.boxes.is_normalised());
        if is_normalised && self.normalised.is_none() {
            let detail = format!(
                "{}boxes are fractions of their images (normalised=true): all numbers of {} boxes lie within 0 and 1",
                self.prefix, self.boxes.boxes
            );
            collector.omitted.add(Category::Inferred, detail);
        }
        join(by_image, is_normalised, collector)
    }

    /// Declares the classes. One that no annotation uses, and that another class names as its
    /// supercategory, may have the name of another class: Roboflow writes such a root.
    fn finish(self, collector: &mut Collector) -> Result<(), Fault> {
        // Each class's name and supercategory, with its id.
        let listed: Vec<(i64, String, Option<String>)> = self
            .categories
            .iter()
            .flat_map(|(id, list)| {
                list.iter()
                    .map(|class| (*id, class.name.clone(), class.supercategory.clone()))
            })
            .collect();
        let names: BTreeSet<(&str, i64)> = listed
            .iter()
            .map(|(id, name, _)| (name.as_str(), *id))
            .collect();
        let above: BTreeSet<(&str, i64)> = listed
            .iter()
            .filter_map(|(id, _, above)| Some((above.as_deref()?, *id)))
            .collect();
        // Whether another class than this one has this name.
        let another = |set: &BTreeSet<(&str, i64)>, name: &str, id: i64| {
            set.range((name, i64::MIN)..=(name, i64::MAX))
                .any(|(_, other)| *other != id)
        };
        let several = self.files > 1;
        for (id, list) in self.categories {
            for category in list {
                let ListedCategory {
                    place, name, attrs, ..
                } = category;
                let is_root = another(&names, &name, id) && another(&above, &name, id);
                if is_root && !self.used.contains(&id) {
                    let detail =
                        format!("{place}: the unused class {id} {name:?}, a supercategory");
                    collector.omitted.add(Category::UnreadMembers, detail);
                    continue;
                }
                let refusals = &mut collector.refusals;
                collector
                    .classes
                    .declare(&place, id, &name, attrs, several, refusals)?;
            }
        }
        Ok(())
    }

    fn image(
        &self,
        text: &str,
        mut fields: Fields<'_>,
        mut place: String,
        collector: &mut Collector,
        by_image: &mut Sorter,
    ) -> Result<(), Fault> {
        let Some(id) = fields.take("id").and_then(id_text) else {
            collector.refusals.add(
                Why::Shape,
                place,
                "its id is not a whole number or a string",
            );
            return Ok(());
        };
        place.push_str(&format!(" (id {id})"));
        let mut sample = Sample {
            place: &place,
            declared: true,
            meta: Some(text),
            ..Sample::default()
        };
        let split = fields.take("split").and_then(json::as_string);
        sample.split = split.as_deref();
        if let (None, Some(home)) = (sample.split, &self.home) {
            sample.split = home.split;
            sample.split_from = SplitFrom::Folder;
        }
        let path = self.image_path(&mut fields, &mut sample, collector);
        // A refused image is kept by its id, so that its annotations are not called orphans on top.
        let record = ImageRecord {
            path: path.as_ref().map_or("", RelPath::as_str),
            sample,
        };
        let record = postcard::to_stdvec(&record)
            .map_err(|error| Fault::internal(format!("encode an image row: {error}")))?;
        by_image.push(&image_key(&id, IMAGE), &record)
    }

    /// The image's path and size; `None` when one of them was refused.
    fn image_path(
        &self,
        fields: &mut Fields<'_>,
        sample: &mut Sample<'_>,
        collector: &mut Collector,
    ) -> Option<RelPath> {
        let Some(name) = fields.take("file_name").and_then(json::as_string) else {
            collector
                .refusals
                .add(Why::Shape, sample.place, "its file_name is not a string");
            return None;
        };
        for (slot, name) in [(&mut sample.width, "width"), (&mut sample.height, "height")] {
            let Some(json) = fields.take(name) else {
                continue;
            };
            match json::as_integer(json) {
                Some(n) if n > 0 => *slot = Some(n),
                // VGG Image Annotator writes 0 for a size that it does not know.
                Some(0) => {}
                _ => {
                    collector.refusals.add(
                        Why::Shape,
                        sample.place,
                        format_args!("its {name} is {json}, not a number of pixels"),
                    );
                    return None;
                }
            }
        }
        let name = match &self.home {
            Some(home) => home.path(&name.replace('\\', "/")),
            None => name,
        };
        collector.path(sample.place, &name)
    }

    fn annotation(
        &mut self,
        text: &str,
        mut fields: Fields<'_>,
        mut place: String,
        collector: &mut Collector,
        by_image: &mut Sorter,
    ) -> Result<(), Fault> {
        if let Some(id) = fields.take("id") {
            let Some(id) = id_text(id) else {
                collector.refusals.add_record(
                    Why::Shape,
                    place,
                    "its id is not a whole number or a string",
                    Some(text),
                );
                return Ok(());
            };
            place.push_str(&format!(" (id {id})"));
            // Ids count in each file by themselves.
            let id = match self.files {
                0 => id,
                file => format!("{file} {id}"),
            };
            collector.annotation_id(&place, &id)?;
        }
        let Some(image) = fields.take("image_id").and_then(id_text) else {
            collector.refusals.add_record(
                Why::Shape,
                place,
                "its image_id is not a whole number or a string",
                Some(text),
            );
            return Ok(());
        };
        let class = match fields.take("category_id") {
            None => None,
            Some(id) => match whole(id) {
                Some(id) => {
                    if self.used.len() < LABEL_CLASSES_MAX {
                        self.used.insert(id);
                    }
                    Some(ClassRef::Id(id))
                }
                None => {
                    collector.refusals.add_record(
                        Why::Shape,
                        place,
                        "its category_id is not a whole number",
                        Some(text),
                    );
                    return Ok(());
                }
            },
        };
        let shape = match shape(&mut fields, class) {
            Ok(shape) => shape,
            Err(problem) => {
                let refusals = &mut collector.refusals;
                refusals.add_record(Why::Shape, place, problem, Some(text));
                return Ok(());
            }
        };
        if let Extent::Box { x, y, w, h } = shape.extent {
            self.boxes.add(&[x, y, w, h]);
        }
        let attrs = fields.rest();
        let annotation = Annotation {
            place: &place,
            class,
            kind: shape.kind,
            extent: shape.extent,
            is_hull: false,
            geom: shape.geom.as_deref(),
            attrs: attrs.as_deref(),
            raw: text,
        };
        if let Some(record) = collector.encode_annotation(&annotation)? {
            by_image.push(&image_key(&image, ANNOTATION), record)?;
        }
        Ok(())
    }

    fn category(
        &mut self,
        mut fields: Fields<'_>,
        place: &str,
        collector: &mut Collector,
    ) -> Result<(), Fault> {
        let Some(id) = fields.take("id").and_then(whole) else {
            let refusals = &mut collector.refusals;
            refusals.add(Why::Shape, place, "its id is not a whole number");
            return Ok(());
        };
        let Some(name) = fields.take("name").and_then(json::as_string) else {
            let refusals = &mut collector.refusals;
            refusals.add(Why::Shape, place, "its name is not a string");
            return Ok(());
        };
        if self.categories.len() >= LABEL_CLASSES_MAX {
            return Err(
                Fault::integrity(format!("more than {LABEL_CLASSES_MAX} classes"))
                    .with_next("check that the file is COCO"),
            );
        }
        let supercategory = fields.peek("supercategory").and_then(json::as_string);
        let listed = self.categories.entry(id).or_default();
        // The files of a set list the same classes.
        if self.files > 0 && listed.iter().any(|known| known.name == name) {
            return Ok(());
        }
        listed.push(ListedCategory {
            place: place.to_owned(),
            name,
            attrs: fields.rest(),
            supercategory,
        });
        Ok(())
    }
}

/// A whole number, also one in quotes.
fn whole(json: &str) -> Option<i64> {
    json::as_integer(json).or_else(|| json::as_string(json)?.trim().parse().ok())
}

struct Shape<'a> {
    kind: &'static str,
    extent: Extent,
    geom: Option<std::borrow::Cow<'a, str>>,
}

/// What kind of annotation it is, from the members that it has.
fn shape<'a>(fields: &mut Fields<'a>, class: Option<ClassRef>) -> Result<Shape<'a>, String> {
    let keypoints = fields.take("keypoints").filter(|json| *json != "[]");
    let segmentation = fields
        .take("segmentation")
        .filter(|json| !matches!(*json, "[]" | "[[]]" | "{}"));
    let mut extent = match fields.take("bbox").map(json::as_numbers) {
        None => Extent::None,
        Some(Some(numbers)) => match numbers[..] {
            [] => Extent::None,
            [x, y, w, h] => Extent::Box { x, y, w, h },
            _ => return Err("its bbox is not a list of four numbers".into()),
        },
        Some(None) => return Err("its bbox is not a list of four numbers".into()),
    };
    if let Some(json) = keypoints {
        if json::as_numbers(json).is_none_or(|numbers| numbers.len() % 3 != 0) {
            return Err("its keypoints are not a list of x, y, v".into());
        }
        return Ok(Shape {
            kind: "keypoints",
            extent,
            geom: Some(json.into()),
        });
    }
    match segmentation {
        Some(json) if json.starts_with('{') => {
            rle::check(json)?;
            // Runs of other tools, as this program exported them once, have no size.
            let around = rle::extent(json).unwrap_or(Extent::None);
            Ok(Shape {
                kind: "rle",
                extent: if extent == Extent::None {
                    around
                } else {
                    extent
                },
                geom: Some(json.into()),
            })
        }
        Some(json) => {
            let (geom, rings) = polygon::rings(json)
                .map_err(|detail| format!("its segmentation is not a list of rings: {detail}"))?;
            if extent == Extent::None {
                extent = Extent::around(&rings.concat()).unwrap_or(Extent::None);
            }
            Ok(Shape {
                kind: "polygon",
                extent,
                geom: Some(geom),
            })
        }
        None if extent != Extent::None => Ok(Shape {
            kind: "bbox",
            extent,
            geom: None,
        }),
        None => Ok(Shape {
            kind: if class.is_some() { "class" } else { "other" },
            extent,
            geom: None,
        }),
    }
}

/// The id, then 0 (which no id's text holds), then what it is.
fn image_key(id: &str, what: u8) -> Vec<u8> {
    let mut key = id.as_bytes().to_vec();
    key.extend([0, what]);
    key
}

/// Brings each annotation to its image and both to the collector.
fn join(by_image: Sorter, normalised: bool, collector: &mut Collector) -> Result<(), Fault> {
    let mut rows = by_image.finish()?;
    // The image whose annotations are coming; no path when it was refused.
    let mut image: Option<(Vec<u8>, Option<RelPath>)> = None;
    let mut size = None;
    while let Some((key, record)) = rows.next()? {
        let (id, what) = key.split_at(key.len().saturating_sub(2));
        let known = image.as_ref().filter(|(known, _)| known == id);
        if what == [0, IMAGE] {
            let record: ImageRecord<'_> = decode(record)?;
            if known.is_some() {
                collector.refusals.add(
                    Why::DuplicateImage,
                    record.sample.place,
                    "another image has its id already",
                );
                continue;
            }
            let path = if record.path.is_empty() {
                None
            } else {
                Some(record.path.parse::<RelPath>()?)
            };
            if let Some(path) = &path {
                collector.sample(path, &record.sample)?;
            }
            size = record.sample.width.zip(record.sample.height);
            image = Some((id.to_vec(), path));
            continue;
        }
        match known {
            Some((_, Some(path))) if normalised => scaled(path, size, record, collector)?,
            Some((_, Some(path))) => collector.encoded_annotation(path, record)?,
            Some((_, None)) if collector.refusals.on_bad == OnBad::Refuse => {}
            Some((_, None)) => {
                let record: AnnotationRecord<'_> = decode(record)?;
                collector.refusals.add_record(
                    Why::Orphan,
                    record.place,
                    "its image is left out",
                    record.raw().as_deref(),
                );
            }
            None => {
                let record: AnnotationRecord<'_> = decode(record)?;
                let id = String::from_utf8_lossy(id);
                collector.refusals.add_record(
                    Why::Orphan,
                    record.place,
                    format_args!("there is no image with the id {id}"),
                    record.raw().as_deref(),
                );
            }
        }
    }
    Ok(())
}

/// Takes an annotation whose numbers are fractions of an image of this size.
fn scaled(
    path: &RelPath,
    size: Option<(i64, i64)>,
    record: &[u8],
    collector: &mut Collector,
) -> Result<(), Fault> {
    let record: AnnotationRecord<'_> = decode(record)?;
    let row = format!("{{\"sample\":\"\",\"class\":null,{}", record.tail);
    let row: AnnotationRow = serde_json::from_str(&row)
        .map_err(|error| Fault::internal(format!("decode a label row: {error}")))?;
    let boxed = record.extent.map(|[x, y, w, h]| Extent::Box { x, y, w, h });
    if size.is_none() && boxed.is_some() {
        let detail =
            "its box is a fraction of its image (normalised), whose width and height are not known";
        collector.refusals.add(Why::NoSize, record.place, detail);
        return Ok(());
    }
    let size = size.unwrap_or((1, 1));
    let extent = boxed.map_or(Extent::None, |extent| to_pixels(extent, size));
    let geom = row.geom.map(|geom| match row.kind.as_str() {
        "polygon" | "keypoints" => geom_to_pixels(&row.kind, geom.get(), size),
        _ => geom.get().to_owned(),
    });
    let annotation = Annotation {
        place: record.place,
        class: record.class,
        kind: &row.kind,
        extent,
        is_hull: record.is_hull,
        geom: geom.as_deref(),
        attrs: row.attrs.as_ref().map(|attrs| attrs.get()),
        raw: row.raw.get(),
    };
    collector.annotation(path, &annotation)
}

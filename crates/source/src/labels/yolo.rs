//! YOLO: a folder of text files, one an image, one object a line (docs.ultralytics.com/datasets,
//! darknet before it).
//!
//! A line is a class and fractions of the image: a box, a box with keypoints, or a polygon, with a
//! confidence and a track id behind it or not (`yolo_rows`). Names come from a YAML file, from
//! `classes.txt`, `obj.names` or another `*.names` file (`yolo_names`); the class is the place in
//! that list.
//!
//! `labels/x/a.txt` belongs to `images/x/a.*`; without such folders the image is beside its text
//! file. Images without a text file are samples without annotations. Lists of images give the
//! splits, else folders named so (`yolo_lists`).

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::inside::Inside;
use base::fault::{Fault, IoContext};
use base::limits::{LABEL_RECORD_BYTES_MAX, LABEL_SORT_BYTES};
use base::names::RelPath;
use base::omitted::Category;

use super::collect::{Annotation, ClassRef, Collector, Sample, SplitFrom, decode, encode};
use super::folder::{Input, Walk, has_extension};
use super::images_beside::{IMAGE_EXTENSIONS, exists_in_any_case, with_extension};
use super::refuse::Why;
use super::sort::Sorter;
use super::text::json_string;
use super::yolo_lists::Lists;
use super::yolo_names::{self, Names};
use super::yolo_rows::{Profile, Reading, Row, Task};
use super::{encoding, size, split, text};

const SIZES: &str = "sizes.csv";
/// How deep a folder `labels` is looked for.
const LABELS_DEPTH_MAX: usize = 3;

/// Reads the folder. `task` says what rows of more than five numbers are; without it they are read
/// by `kpt_shape`, or by what all rows say.
pub(super) fn read(
    input: &Input,
    task: Option<Task>,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let Some(inside) = input.folder() else {
        return Err(
            Fault::integrity("YOLO labels are a folder, and this is none")
                .with_next("give the folder with the text files and names"),
        );
    };
    let names = yolo_names::find(inside, collector)?;
    for (id, name) in &names.classes {
        collector
            .classes
            .declare(&names.file, *id, name, None, false, &mut collector.refusals)?;
    }
    let task = task.or(names
        .keypoints
        .map(|(points, values)| Task::Pose(points, values)));
    let mut folder = Folder {
        inside,
        sizes: read_sizes(inside, collector)?,
        in_labels: has_labels_folder(inside)?,
        lists: Lists::find(inside, &names)?,
        names,
        reading: task.map(|task| Reading {
            task,
            five_end_in_id: false,
        }),
        profile: Profile::default(),
        waiting: Sorter::new(&collector.scratch, LABEL_SORT_BYTES),
    };
    folder
        .lists
        .read(inside, &folder.names, &folder.sizes, collector)?;
    let mut walk = Walk::new(inside);
    while let Some(file) = walk.next() {
        let file = file?;
        let Some(name) = file.to_str() else {
            collector
                .refusals
                .add(Why::BadPath, file.display(), "the file's name is not UTF-8");
            continue;
        };
        if has_extension(&file, &IMAGE_EXTENSIONS) {
            folder.background(name, collector)?;
        } else if has_extension(&file, &["txt"]) && folder.is_label(name) {
            folder.label(name, collector)?;
        } else if !folder.is_side_file(name) {
            walk.omitted.add(Category::UnreadFiles, name);
        }
    }
    collector.omitted.merge(walk.omitted);
    folder.finish(collector)
}

struct Folder<'a> {
    inside: &'a Inside,
    names: Names,
    lists: Lists,
    /// From `sizes.csv`: the path without its extension, to the path and its size.
    sizes: HashMap<String, (String, i64, i64)>,
    in_labels: bool,
    /// How rows are read, where the other rows of the set are not needed to know.
    reading: Option<Reading>,
    profile: Profile,
    /// Rows that wait until all rows were seen: from the first such row of a file on, so that their
    /// order stays.
    waiting: Sorter,
}

/// A row that waits.
#[derive(Serialize, Deserialize)]
struct Waiting<'a> {
    path: &'a str,
    line: u64,
    width: i64,
    height: i64,
    text: &'a str,
}

/// The image that a text file belongs to.
enum Image {
    /// Its path and its size.
    Found(String, i64, i64),
    /// It is there, and its size cannot be read.
    Unreadable(String),
    None,
}

impl Folder<'_> {
    /// Whether this text file holds labels and not names or lists.
    fn is_label(&self, name: &str) -> bool {
        let file = name.rsplit('/').next().unwrap_or(name);
        if file == "classes.txt" || self.lists.has(name) {
            return false;
        }
        if self.in_labels {
            return name
                .split('/')
                .rev()
                .skip(1)
                .any(|part| part.eq_ignore_ascii_case("labels"));
        }
        !(file == name && is_list(file))
    }

    /// Whether it says something of the labels: the names of the classes, the sizes, or which
    /// images belong to a split.
    fn is_side_file(&self, name: &str) -> bool {
        let file = name.rsplit('/').next().unwrap_or(name);
        self.lists.has(name)
            || name == "trainval.txt"
            || file == "classes.txt"
            || file == SIZES
            || name == self.names.file
            || has_extension(Path::new(file), &["yaml", "yml", "names"])
    }

    /// An image without a text file is a sample all the same.
    fn background(&self, name: &str, collector: &mut Collector) -> Result<(), Fault> {
        let stem = without_extension(name);
        let labels = if self.in_labels {
            swap_folder(stem, "images", "labels")
        } else {
            vec![stem.to_owned()]
        };
        if labels.is_empty() {
            return Ok(());
        }
        if let Some(label) = labels
            .iter()
            .find(|label| exists_in_any_case(self.inside, label, "txt"))
        {
            // Of two images with one name the labels belong to the first that can be read. For
            // `.jpg`, which is almost always that one, `label` reports it, which looks for it anyway.
            if !name.ends_with(".jpg")
                && let (Image::Found(other, ..), _) = self.image_of(label)
                && other != name
            {
                collector
                    .omitted
                    .add(Category::SameName, format!("{name}: the labels of {other}"));
            }
            return Ok(());
        }
        let Some(path) = collector.path(name, name) else {
            return Ok(());
        };
        let found = self
            .sizes
            .get(stem)
            .map(|(_, w, h)| (*w, *h))
            .or_else(|| size::of_file(self.inside, name));
        let (width, height) = found.unzip();
        collector.sample(&path, &self.sample(name, name, width, height))
    }

    /// What is known of the image of a text file, or of an image without one.
    fn sample<'n>(
        &self,
        name: &'n str,
        image: &str,
        width: Option<i64>,
        height: Option<i64>,
    ) -> Sample<'n> {
        let split = self
            .lists
            .split_of(name)
            .or_else(|| self.lists.split_of(image));
        Sample {
            place: name,
            declared: true,
            width,
            height,
            split,
            split_from: SplitFrom::Folder,
            ..Sample::default()
        }
    }

    fn label(&mut self, name: &str, collector: &mut Collector) -> Result<(), Fault> {
        let (found, passed) = self.image_of(name);
        let (image, width, height) = match found {
            Image::Found(image, width, height) => (image, width, height),
            Image::Unreadable(image) => {
                let detail = format!("the width and height of its image {image} cannot be read");
                collector.refusals.add(Why::NoSize, name, detail);
                return Ok(());
            }
            Image::None => {
                collector
                    .refusals
                    .add(Why::NoSize, name, "no image that it belongs to was found");
                return Ok(());
            }
        };
        if let Some(passed) = passed {
            collector.omitted.add(
                Category::SameName,
                format!("{passed}: the labels of {image}"),
            );
        }
        let Some(path) = collector.path(name, &image) else {
            return Ok(());
        };
        collector.sample(&path, &self.sample(name, &image, Some(width), Some(height)))?;
        let at = || format!("read {}", self.inside.full(name).display());
        let decoded = encoding::Utf8Reader::new(self.inside.file(name)?, collector.encoding);
        let inferred = decoded.inferred();
        let mut reader = BufReader::new(decoded);
        let (mut bytes, mut line, mut waits) = (Vec::new(), 0u64, false);
        loop {
            bytes.clear();
            let limit = LABEL_RECORD_BYTES_MAX as u64 + 1;
            if std::io::Read::take(&mut reader, limit)
                .read_until(b'\n', &mut bytes)
                .at(at())?
                == 0
            {
                break;
            }
            line += 1;
            let place = format!("{name} line {line}");
            if bytes.len() > LABEL_RECORD_BYTES_MAX {
                let detail = format_args!("it is longer than {LABEL_RECORD_BYTES_MAX} bytes");
                collector.refusals.add(Why::TooLarge, place, detail);
                break;
            }
            let Some(text) = text::text(&bytes, &place, &mut collector.refusals) else {
                continue;
            };
            let text = text.trim_start_matches('\u{feff}').trim();
            if text.is_empty() {
                continue;
            }
            let row = match Row::parse(text) {
                Ok(row) => row,
                Err((why, detail)) => {
                    collector.refusals.add(why, place, detail);
                    continue;
                }
            };
            let plain = Reading {
                task: Task::Segment,
                five_end_in_id: false,
            };
            match self.reading.or((!waits && row.is_plain()).then_some(plain)) {
                Some(reading) => {
                    let found = Place {
                        file: name,
                        line,
                        path: &path,
                        size: (width, height),
                    };
                    emit(&found, text, &row, reading, collector)?;
                }
                None => {
                    waits = true;
                    if !row.is_plain() {
                        self.profile.add(&row);
                    }
                    let mut key = name.as_bytes().to_vec();
                    key.push(0);
                    key.extend(line.to_be_bytes());
                    let mut value = Vec::new();
                    encode(
                        &Waiting {
                            path: path.as_str(),
                            line,
                            width,
                            height,
                            text,
                        },
                        &mut value,
                    )?;
                    self.waiting.push(&key, &value)?;
                }
            }
        }
        collector.note_encoding(name, inferred.name());
        Ok(())
    }

    /// All rows were seen: those that waited are read.
    fn finish(self, collector: &mut Collector) -> Result<(), Fault> {
        let (task, why) = self.profile.infer();
        let reading = Reading {
            task,
            five_end_in_id: self.profile.five_end_in_id(),
        };
        let rows = self.profile.rows();
        if rows > 0 {
            collector.omitted.add(
                Category::Inferred,
                format!("{rows} rows of the text files are read as {why}"),
            );
        }
        let mut waiting = self.waiting.finish()?;
        while let Some((key, value)) = waiting.next()? {
            let file = key
                .split(|byte| *byte == 0)
                .next()
                .and_then(|file| std::str::from_utf8(file).ok());
            let Waiting {
                path,
                line,
                width,
                height,
                text,
            } = decode(value)?;
            let (file, path): (&str, RelPath) = (file.unwrap_or_default(), path.parse()?);
            // It was read as a row before.
            let Ok(row) = Row::parse(text) else { continue };
            let found = Place {
                file,
                line,
                path: &path,
                size: (width, height),
            };
            emit(&found, text, &row, reading, collector)?;
        }
        Ok(())
    }

    /// The image that a text file belongs to: of several, the first whose size can be read. And the
    /// `.jpg` of the same name, if it was passed over for another.
    fn image_of(&self, name: &str) -> (Image, Option<String>) {
        let stem = without_extension(name);
        let mut unreadable = None;
        for stem in swap_folder(stem, "labels", "images")
            .into_iter()
            .chain([stem.to_owned()])
        {
            if let Some((path, width, height)) = self.sizes.get(&stem).cloned() {
                let jpg = format!("{stem}.jpg");
                let passed = jpg != path && self.inside.is_file(&jpg);
                return (Image::Found(path, width, height), passed.then_some(jpg));
            }
            let found = with_extension(&stem, |image| {
                let size = size::of_file(self.inside, image);
                if size.is_none() && unreadable.is_none() && self.inside.is_file(image) {
                    unreadable = Some(image.to_owned());
                }
                size.map(|(width, height)| Image::Found(image.to_owned(), width, height))
            });
            if let Some(found) = found {
                return (found, unreadable.filter(|image| image.ends_with(".jpg")));
            }
        }
        (unreadable.map_or(Image::None, Image::Unreadable), None)
    }
}

/// Where a row is, and what it speaks of.
struct Place<'a> {
    file: &'a str,
    line: u64,
    path: &'a RelPath,
    size: (i64, i64),
}

fn emit(
    at: &Place<'_>,
    text: &str,
    row: &Row,
    reading: Reading,
    collector: &mut Collector,
) -> Result<(), Fault> {
    let Place {
        file,
        line,
        path,
        size: (width, height),
    } = *at;
    let place = format!("{file} line {line}");
    let object = match reading.object(row, width as f64, height as f64) {
        Ok(object) => object,
        Err((why, detail)) => {
            collector.refusals.add(why, place, detail);
            return Ok(());
        }
    };
    let raw = format!(
        "{{\"file\":{},\"line\":{line},\"text\":{}}}",
        json_string(file),
        json_string(text)
    );
    let annotation = Annotation {
        place: &place,
        class: Some(ClassRef::Id(row.class)),
        kind: object.kind,
        extent: object.extent,
        is_hull: false,
        geom: object.geom.as_deref(),
        attrs: object.attrs.as_deref(),
        raw: &raw,
    };
    collector.annotation(path, &annotation)
}

/// Whether a text file at the top is one of those that list images or say something.
fn is_list(file: &str) -> bool {
    let stem = without_extension(file).to_ascii_lowercase();
    split::of_name(&stem).is_some()
        || ["trainval", "readme", "license", "labels", "names"].contains(&stem.as_str())
}

/// Whether there is a folder `labels` at the top or a few folders below it.
fn has_labels_folder(inside: &Inside) -> Result<bool, Fault> {
    let mut level = vec![PathBuf::new()];
    for _ in 0..LABELS_DEPTH_MAX {
        let mut below = Vec::new();
        for folder in &level {
            for entry in inside.list(folder)? {
                let name = entry
                    .at(format_args!("list {}", inside.full(folder).display()))?
                    .file_name();
                let path = folder.join(&name);
                if name.as_encoded_bytes().starts_with(b".") || !inside.is_dir(&path) {
                    continue;
                }
                if name.eq_ignore_ascii_case("labels") {
                    return Ok(true);
                }
                below.push(path);
            }
        }
        level = below;
    }
    Ok(false)
}

fn without_extension(name: &str) -> &str {
    match name.rsplit_once('.') {
        Some((stem, extension)) if !extension.contains('/') => stem,
        _ => name,
    }
}

/// The path with its last folder of this name replaced, in the spellings that the other may have;
/// none without one.
fn swap_folder(path: &str, from: &str, to: &str) -> Vec<String> {
    let mut parts: Vec<&str> = path.split('/').collect();
    let Some(folders) = parts.len().checked_sub(1) else {
        return Vec::new();
    };
    let Some(at) = parts[..folders]
        .iter()
        .rposition(|part| part.eq_ignore_ascii_case(from))
    else {
        return Vec::new();
    };
    let capital = to[..1].to_ascii_uppercase() + &to[1..];
    let spellings = match parts[at] == from {
        true => vec![to.to_owned()],
        false => vec![capital, to.to_ascii_uppercase(), to.to_owned()],
    };
    let mut out = Vec::new();
    for spelling in &spellings {
        parts[at] = spelling;
        out.push(parts.join("/"));
    }
    out
}

fn read_sizes(
    inside: &Inside,
    collector: &mut Collector,
) -> Result<HashMap<String, (String, i64, i64)>, Fault> {
    let mut sizes = HashMap::new();
    if !inside.exists(SIZES) {
        return Ok(sizes);
    }
    let text = text::side_file(inside, Path::new(SIZES), collector)?;
    let mut reader = csv::ReaderBuilder::new().from_reader(text.as_bytes());
    for (at, row) in reader.deserialize::<(String, i64, i64)>().enumerate() {
        match row {
            Ok((path, width, height)) if width > 0 && height > 0 => {
                sizes.insert(without_extension(&path).to_owned(), (path, width, height));
            }
            Ok(_) => {
                collector.refusals.add(
                    Why::Shape,
                    format_args!("{SIZES} row {}", at + 1),
                    "a size is not above zero",
                );
            }
            Err(error) => collector.refusals.add(
                Why::Malformed,
                format_args!("{SIZES} row {}", at + 1),
                error,
            ),
        }
    }
    Ok(sizes)
}

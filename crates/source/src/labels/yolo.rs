//! YOLO: a folder of text files, one an image, one object a line (docs.ultralytics.com/datasets,
//! darknet before it).
//!
//! A line is `class cx cy w h`, or `class x1 y1 x2 y2 x3 y3 …` for a polygon, or with `kpt_shape`
//! in the YAML a box and keypoints; a sixth number behind a box is its confidence. All are
//! fractions of the image. Names come from a YAML file's `names`, from `classes.txt`, `obj.names`
//! or another `*.names` file; the class is the place in that list.
//!
//! `labels/x/a.txt` belongs to `images/x/a.*`; without such folders the image stands beside its
//! text file. Images without a text file are samples without annotations. A component `train`,
//! `val` (or `valid`, `validation`) or `test` is the split.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::Path;

use crate::inside::Inside;
use base::fault::{Fault, IoContext};
use base::limits::LABEL_RECORD_BYTES_MAX;
use base::omitted::Category;

use super::collect::{Annotation, ClassRef, Collector, Extent, Sample, number_list};
use super::folder::{Input, Walk, has_extension};
use super::refuse::Why;
use super::text::json_string;
use super::yolo_names::{self, Names};
use super::{size, text};

/// The images that count; those after BMP have no header that is read here.
pub(super) const IMAGE_EXTENSIONS: [&str; 8] =
    ["jpg", "jpeg", "png", "bmp", "tif", "tiff", "webp", "gif"];
const SIZES: &str = "sizes.csv";

pub(super) fn read(input: &Input, collector: &mut Collector) -> Result<(), Fault> {
    let Some(inside) = input.folder() else {
        return Err(
            Fault::integrity("YOLO labels are a folder, and this is none")
                .with_next("give the folder with the text files and names"),
        );
    };
    let names = yolo_names::find(inside)?;
    for (id, name) in &names.classes {
        collector.classes.declare(
            &names.place,
            *id,
            name,
            None,
            false,
            &mut collector.refusals,
        )?;
    }
    let folder = Folder {
        inside,
        sizes: read_sizes(inside, collector)?,
        in_labels: has_labels_folder(inside)?,
        names,
    };
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
    Ok(())
}

struct Folder<'a> {
    inside: &'a Inside,
    names: Names,
    /// From `sizes.csv`: the path without its extension, to the path and its size.
    sizes: HashMap<String, (String, i64, i64)>,
    in_labels: bool,
}

impl Folder<'_> {
    /// Whether this text file holds labels and not names or lists.
    fn is_label(&self, name: &str) -> bool {
        if self.in_labels {
            return name.split('/').rev().skip(1).any(|part| part == "labels")
                && !name.ends_with("/classes.txt");
        }
        let file = name.rsplit('/').next().unwrap_or(name);
        !(file == "classes.txt" || (file == name && is_list(file)))
    }

    /// Whether it says something of the labels: the names of the classes, the sizes, or which
    /// images belong to a split.
    fn is_side_file(&self, name: &str) -> bool {
        let file = name.rsplit('/').next().unwrap_or(name);
        let is_split = [
            "train.txt",
            "val.txt",
            "valid.txt",
            "test.txt",
            "trainval.txt",
        ]
        .contains(&file)
            && file == name;
        is_split
            || file == "classes.txt"
            || file == SIZES
            || file == self.names.place
            || has_extension(Path::new(file), &["yaml", "yml", "names"])
    }

    /// An image without a text file is a sample all the same.
    fn background(&self, name: &str, collector: &mut Collector) -> Result<(), Fault> {
        let stem = without_extension(name);
        let label = if self.in_labels {
            swap_folder(stem, "images", "labels")
        } else {
            Some(stem.to_owned())
        };
        let Some(label) = label else { return Ok(()) };
        if self.inside.is_file(format!("{label}.txt")) {
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
        collector.sample(
            &path,
            &Sample {
                place: name,
                declared: true,
                width,
                height,
                split: split(name),
                ..Sample::default()
            },
        )
    }

    fn label(&self, name: &str, collector: &mut Collector) -> Result<(), Fault> {
        let Some((image, width, height)) = self.image_of(name) else {
            collector.refusals.add(
                Why::NoSize,
                name,
                "no image that it belongs to, or whose size can be read, was found",
            );
            return Ok(());
        };
        let Some(path) = collector.path(name, &image) else {
            return Ok(());
        };
        let sample = Sample {
            place: name,
            declared: true,
            width: Some(width),
            height: Some(height),
            split: split(name),
            ..Sample::default()
        };
        collector.sample(&path, &sample)?;
        let at = || format!("read {}", self.inside.full(name).display());
        let mut reader = BufReader::new(self.inside.file(name)?);
        let (mut line, mut number) = (Vec::new(), 0u64);
        loop {
            line.clear();
            let more = std::io::Read::take(&mut reader, LABEL_RECORD_BYTES_MAX as u64 + 1)
                .read_until(b'\n', &mut line)
                .at(at())?;
            if more == 0 {
                return Ok(());
            }
            number += 1;
            let place = format!("{name} line {number}");
            if line.len() > LABEL_RECORD_BYTES_MAX {
                collector.refusals.add(
                    Why::TooLarge,
                    place,
                    format_args!("it is longer than {LABEL_RECORD_BYTES_MAX} bytes"),
                );
                return Ok(());
            }
            let Some(text) = text::text(&line, &place, &mut collector.refusals) else {
                continue;
            };
            let text = text.trim_start_matches('\u{feff}').trim();
            if text.is_empty() {
                continue;
            }
            let object = match self.object(text, width as f64, height as f64) {
                Ok(object) => object,
                Err((why, detail)) => {
                    collector.refusals.add(why, place, detail);
                    continue;
                }
            };
            let raw = format!(
                "{{\"file\":{},\"line\":{number},\"text\":{}}}",
                json_string(name),
                json_string(text)
            );
            let row = Annotation {
                place: &place,
                class: Some(ClassRef::Id(object.class)),
                kind: object.kind,
                extent: object.extent,
                geom: object.geom.as_deref(),
                attrs: object.attrs.as_deref(),
                raw: &raw,
            };
            collector.annotation(&path, &row)?;
        }
    }

    /// The image that a text file belongs to, and its size.
    fn image_of(&self, name: &str) -> Option<(String, i64, i64)> {
        let stem = without_extension(name);
        let candidates = [swap_folder(stem, "labels", "images"), Some(stem.to_owned())];
        for stem in candidates.into_iter().flatten() {
            if let Some(known) = self.sizes.get(&stem) {
                return Some(known.clone());
            }
            for extension in IMAGE_EXTENSIONS {
                for extension in [extension.to_owned(), extension.to_uppercase()] {
                    let image = format!("{stem}.{extension}");
                    if let Some((width, height)) = size::of_file(self.inside, &image) {
                        return Some((image, width, height));
                    }
                }
            }
        }
        None
    }

    fn object(&self, text: &str, width: f64, height: f64) -> Result<Object, (Why, String)> {
        let mut words = text.split_whitespace();
        let class = words.next().unwrap_or_default();
        let Ok(class) = class.parse::<i64>() else {
            return Err((Why::Shape, format!("its class is {class:?}, not a number")));
        };
        let mut numbers = Vec::new();
        for word in words {
            match word.parse::<f64>() {
                Ok(n) if n.is_finite() => numbers.push(n),
                Ok(_) => return Err((Why::NotFinite, format!("it holds {word}"))),
                Err(_) => return Err((Why::Shape, format!("it holds {word:?}, not a number"))),
            }
        }
        let object = |kind, extent, geom, attrs| {
            Ok(Object {
                class,
                kind,
                extent,
                geom,
                attrs,
            })
        };
        let box_of = |n: &[f64]| {
            let (w, h) = (n[2] * width, n[3] * height);
            Extent::Box {
                x: n[0] * width - w / 2.0,
                y: n[1] * height - h / 2.0,
                w,
                h,
            }
        };
        if let Some((points, values)) = self.names.keypoints
            && numbers.len() == 4 + points * values
        {
            let mut geom = Vec::with_capacity(points * 3);
            for point in numbers[4..].chunks_exact(values) {
                geom.extend([
                    point[0] * width,
                    point[1] * height,
                    point.get(2).copied().unwrap_or(2.0),
                ]);
            }
            return object(
                "keypoints",
                box_of(&numbers),
                Some(number_list(&geom)),
                None,
            );
        }
        match numbers.len() {
            4 => object("bbox", box_of(&numbers), None, None),
            5 => object(
                "bbox",
                box_of(&numbers),
                None,
                Some(format!(
                    "{{\"confidence\":{}}}",
                    number_list(&numbers[4..]).trim_matches(['[', ']'])
                )),
            ),
            n if n >= 6 && n % 2 == 0 => {
                for pair in numbers.chunks_exact_mut(2) {
                    pair[0] *= width;
                    pair[1] *= height;
                }
                let extent = Extent::around(&numbers).unwrap_or(Extent::None);
                object(
                    "polygon",
                    extent,
                    Some(format!("[{}]", number_list(&numbers))),
                    None,
                )
            }
            n => Err((
                Why::ColumnDrift,
                format!("{n} numbers follow the class; a box has 4, a polygon 6 or more in pairs"),
            )),
        }
    }
}

struct Object {
    class: i64,
    kind: &'static str,
    extent: Extent,
    geom: Option<String>,
    attrs: Option<String>,
}

/// Whether a text file at the top is one of those that list images or say something.
fn is_list(file: &str) -> bool {
    let stem = file.trim_end_matches(".txt").to_ascii_lowercase();
    [
        "train", "val", "valid", "test", "trainval", "readme", "license", "labels", "names",
    ]
    .contains(&stem.as_str())
}

/// Whether there is a folder `labels` at the top or one below it.
fn has_labels_folder(inside: &Inside) -> Result<bool, Fault> {
    if inside.is_dir("labels") {
        return Ok(true);
    }
    for entry in inside.list(Path::new(""))? {
        let name = entry
            .at(format_args!("list {}", inside.full("").display()))?
            .file_name();
        if inside.is_dir(&name) && inside.is_dir(Path::new(&name).join("labels")) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn without_extension(name: &str) -> &str {
    match name.rsplit_once('.') {
        Some((stem, extension)) if !extension.contains('/') => stem,
        _ => name,
    }
}

/// The path with its last folder of this name replaced; `None` without one.
fn swap_folder(path: &str, from: &str, to: &str) -> Option<String> {
    let mut parts: Vec<&str> = path.split('/').collect();
    let folders = parts.len().checked_sub(1)?;
    let at = parts[..folders].iter().rposition(|part| *part == from)?;
    parts[at] = to;
    Some(parts.join("/"))
}

fn split(name: &str) -> Option<&'static str> {
    name.split('/').rev().skip(1).find_map(|part| match part {
        "train" => Some("train"),
        "val" | "valid" | "validation" => Some("val"),
        "test" => Some("test"),
        _ => None,
    })
}

fn read_sizes(
    inside: &Inside,
    collector: &mut Collector,
) -> Result<HashMap<String, (String, i64, i64)>, Fault> {
    let mut sizes = HashMap::new();
    if !inside.exists(SIZES) {
        return Ok(sizes);
    }
    let text = text::side_file(inside, Path::new(SIZES))?;
    let mut reader = csv::ReaderBuilder::new().from_reader(text.as_bytes());
    for (at, row) in reader.deserialize::<(String, i64, i64)>().enumerate() {
        match row {
            Ok((path, width, height)) if width > 0 && height > 0 => {
                sizes.insert(without_extension(&path).to_owned(), (path, width, height));
            }
            Ok(_) => collector.refusals.add(
                Why::Shape,
                format_args!("{SIZES} row {}", at + 1),
                "a size is not above zero",
            ),
            Err(error) => collector.refusals.add(
                Why::Malformed,
                format_args!("{SIZES} row {}", at + 1),
                error,
            ),
        }
    }
    Ok(sizes)
}

//! YOLO: a text file for each sample, `data.yaml` with the names, lists of the splits, and
//! `sizes.csv`, by which `publish` reads the folder without its images.
//!
//! The text file of a sample is beside it, or in `labels` where all samples are in `images`, as tools
//! of YOLO look for it. Classes are numbered from 0 without gaps, because these tools demand it.
//! A box is a row of five numbers, a polygon of one ring a row of its points.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use base::fault::Fault;
use base::names::RelPath;
use content::label_rows::{AnnotationRow, SampleRow};

use super::super::text::json_string;
use super::{Item, LeftOut, Output, Set, boxed, rings};

pub(super) fn write(set: &Set<'_>, left_out: &mut LeftOut) -> Result<(u64, u64), Fault> {
    let mut numbers = BTreeMap::new();
    for (number, class) in set.classes.iter().enumerate() {
        if class.id != number as i64 {
            let place = format!("{} {:?} -> {number}", class.id, class.name);
            left_out.add("classes have another number, from 0 without gaps", &place);
        }
        if class.attrs.is_some() {
            left_out.add("attributes of classes are left out", &class.name);
        }
        numbers.insert(class.id, number);
    }
    let (mut below_images, mut elsewhere) = (None, None);
    let mut splits: BTreeMap<String, Output> = BTreeMap::new();
    let mut sizes = set.create_top("sizes.csv")?;
    sizes.put("path,width,height\n")?;
    set.samples(|_, sample| {
        let side = if labels_folder(&sample.path).is_some() {
            &mut below_images
        } else {
            &mut elsewhere
        };
        side.get_or_insert_with(|| sample.path.clone());
        if sample.meta.is_some() {
            left_out.add("metadata of samples is left out", &sample.path);
        }
        if let (Some(width), Some(height)) = (sample.width, sample.height) {
            let path = match sample.path.contains(['"', ',', '\n', '\r']) {
                true => format!("\"{}\"", sample.path.replace('"', "\"\"")),
                false => sample.path.clone(),
            };
            sizes.put(&format!("{path},{width},{height}\n"))?;
        }
        match sample.split.as_deref() {
            None => Ok(()),
            Some(split @ ("train" | "val" | "test")) if !sample.path.contains(['\n', '\r']) => {
                if !splits.contains_key(split) {
                    let list = set.create_top(&format!("{split}.txt"))?;
                    splits.insert(split.to_owned(), list);
                }
                match splits.get_mut(split) {
                    Some(list) => list.put(&format!("./{}\n", sample.path)),
                    None => Ok(()),
                }
            }
            Some(split) => {
                let place = format!("{} ({split})", sample.path);
                left_out.add("splits other than train, val and test are left out", &place);
                Ok(())
            }
        }
    })?;
    sizes.end()?;
    if let (Some(below), Some(other)) = (&below_images, &elsewhere) {
        return Err(Fault::usage(format!(
            "YOLO keeps labels in a folder beside \"images\", or beside each image; this set has both {below} and {other}"
        ))
        .with_next("export in the format coco or csv"));
    }
    let mut yaml = String::from("path: .\n");
    for split in ["train", "val", "test"] {
        if splits.contains_key(split) {
            let _ = writeln!(yaml, "{split}: {split}.txt");
        }
    }
    yaml.push_str("names:\n");
    for (number, class) in set.classes.iter().enumerate() {
        // JSON's strings are YAML's.
        let _ = writeln!(yaml, "  {number}: {}", json_string(&class.name));
    }
    let mut data = set.create_top("data.yaml")?;
    data.put(&yaml)?;
    data.end()?;
    for list in splits.into_values() {
        list.end()?;
    }

    let mut open: Option<File> = None;
    let counts = set.each(|item| match item {
        Item::Sample(_, sample) => {
            if let Some(file) = open.take() {
                file.out.end()?;
            }
            open = File::begin(set, sample)?;
            Ok(())
        }
        Item::Annotation(number, row) => {
            let place = format!("{} (annotation {})", row.sample, number + 1);
            let Some(file) = &mut open else {
                left_out.add(
                    "annotations of samples without width and height are left out",
                    &place,
                );
                return Ok(());
            };
            let Some(number) = row.class.and_then(|class| numbers.get(&class)) else {
                left_out.add("annotations without a class are left out", &place);
                return Ok(());
            };
            if row.attrs.is_some() {
                left_out.add("attributes of annotations are left out", &place);
            }
            match shape(row, file.size, &place, left_out) {
                Some(shape) => file.out.put(&format!("{number}{shape}\n")),
                None => Ok(()),
            }
        }
    })?;
    if let Some(file) = open {
        file.out.end()?;
    }
    Ok(counts)
}

/// The text file of a sample.
struct File {
    out: Output,
    size: [f64; 2],
}

impl File {
    /// `None`: the sample has no size, without which no row can be written.
    fn begin(set: &Set<'_>, sample: &SampleRow) -> Result<Option<Self>, Fault> {
        let (Some(width), Some(height)) = (sample.width, sample.height) else {
            return Ok(None);
        };
        let path = labels_folder(&sample.path).unwrap_or_else(|| sample.path.clone());
        let name = path.rfind('/').map_or(0, |slash| slash + 1);
        let stem = path[name..].rfind('.').map_or(path.len(), |dot| name + dot);
        let path: RelPath = format!("{}.txt", &path[..stem]).parse()?;
        Ok(Some(Self {
            out: set.create(&path)?,
            size: [width as f64, height as f64],
        }))
    }
}

/// The path with its last folder `images` replaced by `labels`.
fn labels_folder(path: &str) -> Option<String> {
    let mut parts: Vec<&str> = path.split('/').collect();
    let folders = parts.len().checked_sub(1)?;
    let at = parts[..folders]
        .iter()
        .rposition(|part| *part == "images")?;
    parts[at] = "labels";
    Some(parts.join("/"))
}

/// The numbers of a row, each with a blank before it; `None`: YOLO has no place for it.
fn shape(
    row: &AnnotationRow,
    [width, height]: [f64; 2],
    place: &str,
    left_out: &mut LeftOut,
) -> Option<String> {
    let mut text = String::new();
    // Always with a point: a last number without one is read as a track id.
    let mut push = |number: f64| {
        let _ = write!(text, " {number:?}");
    };
    if row.kind == "polygon"
        && let Some([ring]) = rings(row.geom.as_deref()).as_deref()
    {
        for point in ring.chunks_exact(2) {
            push(point[0] / width);
            push(point[1] / height);
        }
        return Some(text);
    }
    let Some([x, y, w, h]) = boxed(row) else {
        let what = format!(
            "annotations of the kind {} without a box are left out",
            row.kind
        );
        left_out.add(what, place);
        return None;
    };
    let what = match (row.kind.as_str(), &row.geom) {
        ("bbox", None) => None,
        ("bbox", Some(_)) => {
            Some("turned boxes are written as the upright boxes around them".to_owned())
        }
        ("polygon", _) => Some("polygons of several rings are written as their boxes".to_owned()),
        (kind, _) => Some(format!(
            "annotations of the kind {kind} are written as their boxes"
        )),
    };
    if let Some(what) = what {
        left_out.add(what, place);
    }
    push((x + w / 2.0) / width);
    push((y + h / 2.0) / height);
    push(w / width);
    push(h / height);
    Some(text)
}

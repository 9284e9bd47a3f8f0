//! Pascal VOC: an XML file for each sample in `Annotations`, and the splits in `ImageSets/Main`.
//!
//! Boxes count from 0 and end behind their last pixel (`--voc-base 0`), as most tools write them. The
//! files name packhorse as their source, by which `publish` knows that. Samples in `JPEGImages` have
//! their files in the same folder below `Annotations`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::Value;

use base::durable;
use base::fault::Fault;
use base::names::RelPath;
use content::bloom::BloomFilter;
use content::chunk::Hash;
use content::label_rows::{AnnotationRow, SampleRow};

use super::super::voc_base::OWN_DATABASE;
use super::{Item, LeftOut, Output, Set, boxed, rings, turned};

/// The folder of images of the development kit.
const IMAGES: &str = "JPEGImages/";
/// The members of an object that are not attributes.
const OF_OBJECT: [&str; 4] = ["name", "bndbox", "robndbox", "polygon"];

pub(super) fn write(set: &Set<'_>, left_out: &mut LeftOut) -> Result<(u64, u64), Fault> {
    let mut in_images = true;
    let mut splits: BTreeMap<String, Output> = BTreeMap::new();
    let mut names = BloomFilter::default();
    set.samples(|_, sample| {
        in_images &= sample.path.starts_with(IMAGES);
        let Some(split) = sample.split.as_deref() else {
            return Ok(());
        };
        let stem = stem(&sample.path);
        if !["train", "val", "test"].contains(&split) || stem.contains(char::is_whitespace) {
            let place = format!("{} ({split})", sample.path);
            left_out.add(
                "splits other than train, val and test, and of names with blanks, are left out",
                &place,
            );
            return Ok(());
        }
        // The lists know a sample by the name of its file only.
        if !names.is_new(&Hash::of(stem.as_bytes())) {
            left_out.add(
                "splits are known by the names of files, and several files may have this name",
                &sample.path,
            );
        }
        if !splits.contains_key(split) {
            durable::create_dir_all(&set.out.join("ImageSets/Main"))?;
            let list = set.create_top(&format!("ImageSets/Main/{split}.txt"))?;
            splits.insert(split.to_owned(), list);
        }
        match splits.get_mut(split) {
            Some(list) => list.put(&format!("{stem}\n")),
            None => Ok(()),
        }
    })?;
    for list in splits.into_values() {
        list.end()?;
    }
    if in_images {
        // By this folder the reader knows that the images are in it.
        durable::create_dir_all(&set.out.join(IMAGES))?;
    }
    let mut open: Option<Output> = None;
    let end = |open: &mut Option<Output>| match open.take() {
        Some(mut out) => out.put("</annotation>\n").and_then(|()| out.end()),
        None => Ok(()),
    };
    let mut used = std::collections::BTreeSet::new();
    let counts = set.each(|item| match item {
        Item::Sample(_, sample) => {
            end(&mut open)?;
            if sample.meta.is_some() {
                left_out.add("metadata of samples is left out", &sample.path);
            }
            open = Some(begin(set, sample, in_images)?);
            Ok(())
        }
        Item::Annotation(number, row) => {
            let place = format!("{} (annotation {})", row.sample, number + 1);
            let Some(class) = row.class else {
                left_out.add("annotations without a class are left out", &place);
                return Ok(());
            };
            let Some(text) = object(row, set.class(class)?, &place, left_out) else {
                return Ok(());
            };
            used.insert(class);
            match &mut open {
                Some(out) => out.put(&text),
                None => Ok(()),
            }
        }
    })?;
    end(&mut open)?;
    for class in &set.classes {
        if !used.contains(&class.id) {
            left_out.add("classes without annotations are left out", &class.name);
        }
        if class.attrs.is_some() {
            left_out.add("attributes of classes are left out", &class.name);
        }
    }
    if !set.classes.is_empty() {
        let ids: Vec<String> = set
            .classes
            .iter()
            .map(|class| class.id.to_string())
            .collect();
        left_out.add("classes have no numbers in Pascal VOC", &ids.join(" "));
    }
    Ok(counts)
}

/// The name of a file without its extension.
fn stem(path: &str) -> &str {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.rsplit_once('.').map_or(name, |(stem, _)| stem)
}

fn begin(set: &Set<'_>, sample: &SampleRow, in_images: bool) -> Result<Output, Fault> {
    let path = match in_images {
        true => sample.path.strip_prefix(IMAGES).unwrap_or(&sample.path),
        false => &sample.path,
    };
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    let slash = if folder.is_empty() { "" } else { "/" };
    let file: RelPath = format!("Annotations/{folder}{slash}{}.xml", stem(path)).parse()?;
    let mut out = set.create(&file)?;
    let mut text = format!(
        "<annotation>\n  <filename>{}</filename>\n  <source><database>{OWN_DATABASE}</database></source>\n",
        escaped(name)
    );
    if let (Some(width), Some(height)) = (sample.width, sample.height) {
        let _ = writeln!(
            text,
            "  <size><width>{width}</width><height>{height}</height></size>"
        );
    }
    out.put(&text)?;
    Ok(out)
}

/// An object; `None`: Pascal VOC has no place for it.
fn object(row: &AnnotationRow, class: &str, place: &str, left_out: &mut LeftOut) -> Option<String> {
    let sides = boxed(row);
    let mut shape = String::new();
    if let Some([x, y, w, h]) = sides {
        let _ = writeln!(
            shape,
            "    <bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>",
            x + w,
            y + h
        );
    }
    match row.kind.as_str() {
        "bbox" if row.geom.is_none() => {}
        "class" if sides.is_none() => {}
        "polygon" => {
            for ring in rings(row.geom.as_deref()).unwrap_or_default() {
                shape.push_str("    <polygon>");
                for (at, point) in ring.chunks_exact(2).enumerate() {
                    let (n, x, y) = (at + 1, point[0], point[1]);
                    let _ = write!(shape, "<x{n}>{x}</x{n}><y{n}>{y}</y{n}>");
                }
                shape.push_str("</polygon>\n");
            }
        }
        kind => match (
            turned(row.geom.as_deref()).filter(|_| kind == "bbox"),
            sides,
        ) {
            (Some(t), _) => {
                shape = format!(
                    "    <robndbox><cx>{}</cx><cy>{}</cy><w>{}</w><h>{}</h><angle>{}</angle></robndbox>\n",
                    t.cx, t.cy, t.w, t.h, t.angle
                );
            }
            (None, Some(_)) => {
                let what = format!("annotations of the kind {kind} are written as their boxes");
                left_out.add(what, place);
            }
            (None, None) => {
                let what = format!("annotations of the kind {kind} without a box are left out");
                left_out.add(what, place);
                return None;
            }
        },
    }
    let mut text = format!("  <object>\n    <name>{}</name>\n", escaped(class));
    let attrs: Option<Value> = row
        .attrs
        .as_deref()
        .and_then(|attrs| serde_json::from_str(attrs.get()).ok());
    for (key, value) in attrs.iter().filter_map(Value::as_object).flatten() {
        let scalar = match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(_) | Value::Bool(_) => Some(value.to_string()),
            Value::Null | Value::Array(_) | Value::Object(_) => None,
        };
        match scalar.filter(|_| is_name(key) && !OF_OBJECT.contains(&key.as_str())) {
            Some(value) => {
                let _ = writeln!(text, "    <{key}>{}</{key}>", escaped(&value));
            }
            None => left_out.add(format!("attributes named {key} are left out"), place),
        }
    }
    text.push_str(&shape);
    text.push_str("  </object>\n");
    Some(text)
}

/// Whether this can be the name of an element.
fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'))
}

/// Text for XML. A control character, which XML cannot hold, is replaced.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            c if c.is_control() && c != '\t' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

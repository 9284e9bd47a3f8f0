//! The class map of a folder of masks: which value or colour of a pixel is which class.
//!
//! Read are CVAT's `labelmap.txt`, Roboflow's `_classes.csv`, CamVid's `class_dict.csv`,
//! `class_map.csv` and `class_map.json`, and `classes.txt` with one name a line.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

use crate::inside::Inside;
use base::fault::Fault;
use base::limits::LABEL_CLASSES_MAX;

use super::collect::Collector;
use super::text::side_file;

/// The names of class maps, in the order in which they are preferred.
const MAPS: [&str; 9] = [
    "labelmap.txt",
    "label_map.txt",
    "_classes.csv",
    "class_map.csv",
    "class_dict.csv",
    "class_map.json",
    "classes.json",
    "label_map.json",
    "class_map.txt",
];

/// What a pixel is called by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Pixel {
    /// A grey value, or an index into a palette.
    Value(u32),
    /// A colour, 0xRRGGBB.
    Colour(u32),
}

/// A class map.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ClassMap {
    /// Each class with its id and name.
    pub(super) classes: Vec<(i64, String)>,
    pixels: HashMap<Pixel, i64>,
}

/// Whether a file has the name of a class map. `classes.txt` is one too, where masks are asked for.
pub(super) fn is_map(file: &Path) -> bool {
    rank(file).is_some_and(|rank| rank < MAPS.len())
}

fn rank(file: &Path) -> Option<usize> {
    let name = file.file_name()?.to_str()?.to_ascii_lowercase();
    if name == "classes.txt" {
        return Some(MAPS.len());
    }
    MAPS.iter().position(|map| *map == name)
}

/// The better of two maps: the higher one in the folder, then the order of names.
pub(super) fn prefer(found: &mut Option<std::path::PathBuf>, file: &Path) {
    let Some(new) = rank(file) else { return };
    let key = |file: &Path, rank: usize| (file.components().count(), rank, file.to_owned());
    let is_better = found
        .as_ref()
        .and_then(|old| rank(old).map(|rank| key(old, rank)))
        .is_none_or(|old| key(file, new) < old);
    if is_better {
        *found = Some(file.to_owned());
    }
}

/// Whether masks do not show this class: it stands for no object.
pub(super) fn is_background(name: &str) -> bool {
    let name = name.trim_matches(['_', ' ']).to_ascii_lowercase();
    matches!(
        name.as_str(),
        "background" | "bg" | "ignore" | "void" | "unlabeled" | "unlabelled" | "背景"
    )
}

impl ClassMap {
    pub(super) fn read(
        folder: &Inside,
        file: &Path,
        collector: &mut Collector,
    ) -> Result<Self, Fault> {
        let text = side_file(folder, file, collector)?;
        let shown = folder.full(file).display().to_string();
        let name = file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .to_ascii_lowercase();
        let map = match name.as_str() {
            "labelmap.txt" | "label_map.txt" if text.contains(':') => Self::of_labelmap(&text),
            name if name.ends_with(".csv") => Self::of_csv(&text),
            name if name.ends_with(".json") => Self::of_json(&text),
            _ => Self::of_lines(&text),
        };
        let map = map.map_err(|why| {
            Fault::integrity(format!("the class map {shown} cannot be read: {why}")).with_next(
                "list the classes in class_map.csv with the columns value,name or name,r,g,b",
            )
        })?;
        if map.classes.is_empty() || map.classes.len() > LABEL_CLASSES_MAX {
            return Err(Fault::integrity(format!(
                "the class map {shown} has {} classes",
                map.classes.len()
            ))
            .with_next("give each class a line"));
        }
        Ok(map)
    }

    /// The class of a pixel.
    pub(super) fn class(&self, pixel: Pixel) -> Option<i64> {
        self.pixels.get(&pixel).copied()
    }

    /// Whether pixels are named by their colours.
    pub(super) fn has_colours(&self) -> bool {
        self.pixels
            .keys()
            .any(|pixel| matches!(pixel, Pixel::Colour(_)))
    }

    fn add(&mut self, id: i64, name: &str, pixel: Pixel) -> Result<(), String> {
        let name = name.trim();
        if name.is_empty() {
            return Err(format!("class {id} has no name"));
        }
        if self.pixels.insert(pixel, id).is_some() {
            return Err(format!("two classes have the pixel {pixel:?}"));
        }
        self.classes.push((id, name.to_owned()));
        Ok(())
    }

    /// `name:r,g,b:parts:actions`
    fn of_labelmap(text: &str) -> Result<Self, String> {
        let mut map = Self::default();
        let lines = text.lines().map(str::trim);
        for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let mut parts = line.split(':');
            let (name, colour) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
            let parts: Vec<&str> = colour.split(',').collect();
            let id = map.classes.len() as i64;
            map.add(id, name, Pixel::Colour(colour_of(&parts)?))?;
        }
        Ok(map)
    }

    /// One name a line, in the order of the values.
    fn of_lines(text: &str) -> Result<Self, String> {
        let mut map = Self::default();
        for (at, line) in text.trim_end().lines().enumerate() {
            map.add(at as i64, line, Pixel::Value(at as u32))?;
        }
        Ok(map)
    }

    fn of_csv(text: &str) -> Result<Self, String> {
        let mut rows = csv::ReaderBuilder::new()
            .trim(csv::Trim::All)
            .flexible(true)
            .from_reader(text.as_bytes());
        let header: Vec<String> = rows
            .headers()
            .map_err(|error| error.to_string())?
            .iter()
            .map(str::to_ascii_lowercase)
            .collect();
        let column = |names: &[&str]| {
            header
                .iter()
                .position(|name| names.contains(&name.as_str()))
        };
        let name = column(&["name", "class", "class_name", "label", "类别"]);
        let name = name.ok_or("it has no column name or class")?;
        let value = column(&[
            "value",
            "pixel value",
            "pixel_value",
            "pixel",
            "id",
            "class_id",
            "index",
            "grey",
            "gray",
        ]);
        let colour = [&["r", "red"][..], &["g", "green"], &["b", "blue"]].map(column);
        let mut map = Self::default();
        for row in rows.records() {
            let row = row.map_err(|error| error.to_string())?;
            let cell = |at: usize| row.get(at).unwrap_or("");
            let here = map.classes.len() as i64;
            if let [Some(r), Some(g), Some(b)] = colour {
                let id = match value {
                    Some(at) => cell(at)
                        .parse()
                        .map_err(|_| format!("{:?} is no number", cell(at)))?,
                    None => here,
                };
                let colour = colour_of(&[cell(r), cell(g), cell(b)])?;
                map.add(id, cell(name), Pixel::Colour(colour))?;
            } else {
                let at = value.ok_or("it has neither a column value nor r, g and b")?;
                let value: u32 = cell(at)
                    .parse()
                    .map_err(|_| format!("{:?} is no value", cell(at)))?;
                map.add(value.into(), cell(name), Pixel::Value(value))?;
            }
        }
        Ok(map)
    }

    /// `{"1": "dent"}`, `{"dent": 1}`, `{"dent": [255, 0, 0]}`, `["background", "dent"]`, or a list
    /// of objects with `name` and `id`, `value` or `color`.
    fn of_json(text: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let mut map = Self::default();
        match value {
            Value::Object(members) => {
                for (key, value) in members {
                    let here = map.classes.len() as i64;
                    match (key.parse::<u32>(), &value) {
                        (Ok(pixel), Value::String(name)) => {
                            map.add(pixel.into(), name, Pixel::Value(pixel))?;
                        }
                        (_, Value::Array(_)) => {
                            map.add(here, &key, Pixel::Colour(json_colour(&value)?))?;
                        }
                        (_, Value::Number(_)) => {
                            let pixel = json_value(&value)?;
                            map.add(pixel.into(), &key, Pixel::Value(pixel))?;
                        }
                        _ => {
                            return Err(format!(
                                "{key:?} has neither a name, nor a value, nor a colour"
                            ));
                        }
                    }
                }
            }
            Value::Array(list) => {
                for item in list {
                    let here = map.classes.len() as u32;
                    let get = |names: &[&str]| names.iter().find_map(|name| item.get(name));
                    match (
                        &item,
                        get(&["name", "class", "label"]).and_then(Value::as_str),
                    ) {
                        (Value::String(name), _) => {
                            map.add(here.into(), name, Pixel::Value(here))?;
                        }
                        (_, Some(name)) => {
                            let value =
                                get(&["value", "id", "index"]).map(json_value).transpose()?;
                            match get(&["color", "colour", "rgb"]) {
                                Some(colour) => {
                                    let id = value.unwrap_or(here);
                                    map.add(id.into(), name, Pixel::Colour(json_colour(colour)?))?;
                                }
                                None => {
                                    let value = value.unwrap_or(here);
                                    map.add(value.into(), name, Pixel::Value(value))?;
                                }
                            }
                        }
                        _ => return Err("an entry has no name".into()),
                    }
                }
            }
            _ => return Err("it is neither an object nor a list".into()),
        }
        Ok(map)
    }
}

fn colour_of(parts: &[&str]) -> Result<u32, String> {
    let bytes: Vec<u8> = parts
        .iter()
        .map(|part| part.trim().parse::<u8>())
        .collect::<Result<_, _>>()
        .map_err(|_| format!("{:?} is no colour", parts.join(",")))?;
    match bytes.as_slice() {
        [r, g, b] => Ok(u32::from_be_bytes([0, *r, *g, *b])),
        _ => Err(format!("{:?} is no colour r,g,b", parts.join(","))),
    }
}

fn json_colour(value: &Value) -> Result<u32, String> {
    let parts: Vec<String> = value
        .as_array()
        .into_iter()
        .flatten()
        .map(Value::to_string)
        .collect();
    colour_of(&parts.iter().map(String::as_str).collect::<Vec<_>>())
}

fn json_value(value: &Value) -> Result<u32, String> {
    let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
    number.ok_or_else(|| format!("{value} is no value of a pixel"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_in_each_form() {
        let two = |pixels: [Pixel; 2], ids: [i64; 2]| ClassMap {
            classes: vec![(ids[0], "background".into()), (ids[1], "划痕".into())],
            pixels: pixels.into_iter().zip(ids).collect(),
        };
        let (values, colours) = (
            two([Pixel::Value(0), Pixel::Value(7)], [0, 7]),
            two([Pixel::Colour(0), Pixel::Colour(0x00ff_0001)], [0, 1]),
        );
        assert_eq!(
            ClassMap::of_labelmap(
                "# label:color_rgb:parts:actions\nbackground:0,0,0::\n划痕:255,0,1::\n"
            ),
            Ok(two([Pixel::Colour(0), Pixel::Colour(0x00ff_0001)], [0, 1]))
        );
        assert_eq!(
            ClassMap::of_csv("Pixel Value, Class\n0, background\n7, 划痕\n"),
            Ok(values)
        );
        assert_eq!(
            ClassMap::of_csv("name,r,g,b\nbackground,0,0,0\n划痕,255,0,1\n"),
            Ok(colours)
        );
        for json in [
            r#"{"0":"background","7":"划痕"}"#,
            r#"{"background":0,"划痕":7}"#,
            r#"[{"name":"background","id":0},{"name":"划痕","value":7}]"#,
        ] {
            let expected = two([Pixel::Value(0), Pixel::Value(7)], [0, 7]);
            assert_eq!(ClassMap::of_json(json), Ok(expected), "{json}");
        }
        assert_eq!(
            ClassMap::of_json(r#"{"background":[0,0,0],"划痕":[255,0,1]}"#),
            Ok(two([Pixel::Colour(0), Pixel::Colour(0x00ff_0001)], [0, 1]))
        );
        for bad in [
            "name,r,g,b\na,1,2,256\n",
            "name,value\na,1\nb,1\n",
            "x,y\n1,2\n",
        ] {
            assert!(ClassMap::of_csv(bad).is_err(), "{bad}");
        }
        assert!(
            is_background("__ignore__") && is_background("Background") && !is_background("dent")
        );
    }
}

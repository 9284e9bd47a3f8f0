//! The class names of a YOLO folder, from its YAML or from a list of names; and what else the YAML
//! says.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use crate::inside::Inside;
use base::fault::{Fault, IoContext};

use super::collect::Collector;
use super::folder::has_extension;
use super::split;
use super::text::side_file;
use super::yaml::{self, Yaml};

/// How many folders are looked through for names, and how deep they may be.
const FOLDERS_MAX: usize = 1000;
const DEPTH_MAX: usize = 3;

/// What a YOLO folder says of its classes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Names {
    /// The file they came from, by its path in the folder.
    pub(super) file: String,
    pub(super) classes: Vec<(i64, String)>,
    /// `kpt_shape`: keypoints an object, and numbers a keypoint (2 or 3).
    pub(super) keypoints: Option<(usize, usize)>,
    /// Which lists of images, or folders of them, belong to which split; relative to the YAML's
    /// folder or anything else.
    pub(super) splits: Vec<(&'static str, String)>,
}

impl Names {
    /// The folder of the file.
    pub(super) fn folder(&self) -> &str {
        self.file.rsplit_once('/').map_or("", |(folder, _)| folder)
    }
}

/// Finds the names, at the top or in the folders below it, nearest first; or says where they could
/// be.
pub(super) fn find(inside: &Inside, collector: &mut Collector) -> Result<Names, Fault> {
    let mut looked_at: Vec<String> = Vec::new();
    let mut level: Vec<PathBuf> = vec![PathBuf::new()];
    for depth in 0..DEPTH_MAX {
        let (mut found, mut below) = (Vec::new(), VecDeque::new());
        for folder in &level {
            let Files {
                yaml,
                lists,
                folders,
            } = list(inside, folder)?;
            below.extend(folders);
            found.extend(of_folder(inside, &yaml, &lists, &mut looked_at, collector)?);
        }
        // At the top the first one counts; of several below, none is nearer than another.
        if let Some(other) = found
            .iter()
            .find(|names| depth > 0 && names.classes != found[0].classes)
        {
            let detail = format!(
                "{} and {} name different classes",
                found[0].file, other.file
            );
            return Err(Fault::integrity(detail)
                .with_next("give the folder of one set, or put one data.yaml at the top"));
        }
        if let Some(names) = found.into_iter().next() {
            return Ok(names);
        }
        level = below.into_iter().take(FOLDERS_MAX).collect();
    }
    let files = match looked_at.is_empty() {
        true => "there is no YAML file, no classes.txt and no *.names file".to_owned(),
        false => looked_at.join("; "),
    };
    Err(Fault::integrity(format!("YOLO labels without class names: {files}"))
        .with_next("list the names under names: in a YAML file, or add a classes.txt with one name a line to the folder"))
}

/// What of a folder may hold names.
struct Files {
    yaml: Vec<PathBuf>,
    lists: Vec<PathBuf>,
    folders: Vec<PathBuf>,
}

fn list(inside: &Inside, folder: &Path) -> Result<Files, Fault> {
    let mut files = Files {
        yaml: Vec::new(),
        lists: Vec::new(),
        folders: Vec::new(),
    };
    for entry in inside.list(folder)? {
        let entry = entry.at(format_args!("list {}", inside.full(folder).display()))?;
        let path = folder.join(entry.file_name());
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        if has_extension(&path, &["yaml", "yml"]) {
            files.yaml.push(path);
        } else if has_extension(&path, &["names"]) || path.ends_with("classes.txt") {
            files.lists.push(path);
        } else if inside.is_dir(&path) {
            files.folders.push(path);
        }
    }
    let in_labels = folder.join("labels/classes.txt");
    files
        .lists
        .extend(Some(in_labels).filter(|path| inside.is_file(path)));
    for paths in [&mut files.yaml, &mut files.lists, &mut files.folders] {
        paths.sort();
    }
    Ok(files)
}

/// The names in one folder; files without any are added to `looked_at`, with what is wrong with
/// them.
fn of_folder(
    inside: &Inside,
    yaml: &[PathBuf],
    lists: &[PathBuf],
    looked_at: &mut Vec<String>,
    collector: &mut Collector,
) -> Result<Option<Names>, Fault> {
    for path in yaml {
        let shown = inside.full(path).display().to_string();
        let content = side_file(inside, path, collector)?;
        match parse_yaml(&content) {
            Ok(Some(names)) => {
                return Ok(Some(Names {
                    file: path.display().to_string(),
                    ..names
                }));
            }
            Ok(None) => looked_at.push(format!("{shown} has no names")),
            // It may be of another program; where it speaks of names, it is meant for this one.
            Err(why) if content.contains("names") => {
                return Err(Fault::integrity(format!("{shown}: {why}"))
                    .with_next("list the names under names:, one for each class"));
            }
            Err(why) => looked_at.push(format!("{shown}: {why}")),
        }
    }
    let Some(path) = lists.first() else {
        return Ok(None);
    };
    let content = side_file(inside, path, collector)?;
    // An empty line within the list would shift every class behind it: it stays, and its empty name
    // is refused.
    let lines = content.trim_end().lines().map(str::trim).zip(0..);
    let classes = lines.map(|(name, id)| (id, name.to_owned())).collect();
    Ok(Some(Names {
        file: path.display().to_string(),
        classes,
        ..Names::default()
    }))
}

/// Reads `names`, `nc`, `kpt_shape` and the splits of a data YAML; `None` when it has no names.
fn parse_yaml(text: &str) -> Result<Option<Names>, String> {
    let tree = yaml::parse(text)?;
    let classes = match tree.get("names") {
        None => return Ok(None),
        Some(Yaml::List(items)) => items
            .iter()
            .zip(0..)
            .map(|(item, id)| match item.text() {
                Some(name) => Ok((id, name.to_owned())),
                None => Err(format!("the name of class {id} is no text")),
            })
            .collect::<Result<Vec<_>, _>>()?,
        Some(Yaml::Map(members)) => members
            .iter()
            .map(|(id, name)| {
                let number = id.text().and_then(|id| id.trim().parse().ok());
                match (number, name.text()) {
                    (Some(id), Some(name)) => Ok((id, name.to_owned())),
                    _ => Err("names is not a list, nor numbers with a name each".to_owned()),
                }
            })
            .collect::<Result<Vec<_>, _>>()?,
        Some(Yaml::Scalar(name)) if name.is_empty() => return Ok(None),
        Some(Yaml::Scalar(name)) => return Err(format!("names is {name:?}, not a list")),
        Some(Yaml::Alias) => return Err("names is an alias, which is not followed".to_owned()),
    };
    if classes.is_empty() {
        return Ok(None);
    }
    let count = tree
        .get("nc")
        .and_then(Yaml::text)
        .and_then(|nc| nc.trim().parse::<usize>().ok());
    if let Some(count) = count.filter(|count| *count != classes.len()) {
        return Err(format!(
            "nc is {count}, but there are {} names",
            classes.len()
        ));
    }
    let keypoints = match tree.get("kpt_shape") {
        None => None,
        Some(Yaml::List(items)) => {
            let numbers: Option<Vec<usize>> = items
                .iter()
                .map(|item| item.text()?.trim().parse().ok())
                .collect();
            match numbers.as_deref() {
                Some([points, values @ (2 | 3)]) if *points > 0 => Some((*points, *values)),
                _ => return Err("kpt_shape is not [points, 2 or 3]".into()),
            }
        }
        Some(_) => return Err("kpt_shape is not [points, 2 or 3]".into()),
    };
    Ok(Some(Names {
        file: String::new(),
        classes,
        keypoints,
        splits: splits(&tree),
    }))
}

/// The lists and folders that `train`, `val` and `test` name, in this order.
fn splits(tree: &Yaml) -> Vec<(&'static str, String)> {
    let Yaml::Map(members) = tree else {
        return Vec::new();
    };
    let mut out = Vec::new();
    for wanted in ["train", "val", "test"] {
        for (key, value) in members {
            if key.text().and_then(split::of_name) != Some(wanted) {
                continue;
            }
            let items = if let Yaml::List(items) = value {
                items.as_slice()
            } else {
                std::slice::from_ref(value)
            };
            let named = items
                .iter()
                .filter_map(Yaml::text)
                .filter(|text| !text.trim().is_empty());
            out.extend(named.map(|text| (wanted, text.trim().to_owned())));
        }
    }
    out
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn names_in_every_form() {
        for text in [
            "path: x\nnames: [scratch, 'a, b', \"划痕\"] # three\nnc: 3\n",
            "names:\n  - scratch\n  - 'a, b'\n  # between\n  - 划痕\nnc: 3",
            "nc: 3\nnames:\n- scratch\n- a, b\n- 划痕\ntrain: images",
            "names:\n  0: scratch\n  1: \"a, b\"\n  2: 划痕\n",
            "names: {0: scratch, 1: 'a, b', 2: 划痕}",
            "names: ['scratch',\n  'a, b',\n  '划痕',\n]\n",
            "names:\n- scratch\n- a, b\n- \"\\u5212\\u75D5\"\n",
            "nc : 3\nnames : [scratch, 'a, b', 划痕]\n",
            "\"nc\": 3\n\"names\": [\"scratch\", \"a, b\", \"划痕\"]\n",
            "{\"names\": [\"scratch\", \"a, b\", \"\\u5212\\u75d5\"], \"nc\": 3}",
        ] {
            let names = parse_yaml(text).unwrap().unwrap();
            let expected =
                [(0, "scratch"), (1, "a, b"), (2, "划痕")].map(|(id, name)| (id, name.to_owned()));
            assert_eq!(names.classes, expected, "{text}");
        }
        let pose = parse_yaml("names: {0: panel}\nkpt_shape: [4, 3]")
            .unwrap()
            .unwrap();
        assert_eq!(pose.keypoints, Some((4, 3)));
        let words = parse_yaml("names: [no, null, 1.0, 2]")
            .unwrap()
            .unwrap()
            .classes;
        assert_eq!(
            words
                .iter()
                .map(|(_, name)| name.as_str())
                .collect::<Vec<_>>(),
            ["no", "null", "1.0", "2"]
        );
        for none in ["train: x\n", "", "names:\n", "names: []"] {
            assert_eq!(parse_yaml(none).unwrap(), None, "{none}");
        }
        for bad in [
            "names: [a, b]\nnc: 3",
            "names: [a,\n b",
            "names: a",
            "names:\n  x: a",
            "names: ['a]",
            "names: [[a]]",
            "names: [a]\nkpt_shape: [1]",
            "names: [a]\nkpt_shape: 17",
            "all: &all [a]\nnames: *all",
        ] {
            assert!(parse_yaml(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn splits_by_any_of_their_names() {
        let text = "names: [a]\nTest: t.txt\nval: [images/b, images/c]\nValidation: v.txt\ntrain: images/a\ntest:\n";
        let expected = [
            ("train", "images/a"),
            ("val", "images/b"),
            ("val", "images/c"),
            ("val", "v.txt"),
            ("test", "t.txt"),
        ];
        assert_eq!(
            parse_yaml(text).unwrap().unwrap().splits,
            expected.map(|(split, path)| (split, path.to_owned()))
        );
    }
}

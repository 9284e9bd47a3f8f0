//! Which split the images of a YOLO folder belong to, as its YAML and its lists of images say.
//!
//! A list (`train.txt`, or what the YAML names) has one image a line, by a path that is relative to
//! anything: the longest end of it that is a file here counts. What a list says comes before the
//! name of a folder.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::inside::Inside;
use base::fault::{Fault, IoContext};
use base::limits::LABEL_RECORD_BYTES_MAX;
use base::omitted::Category;

use super::collect::{Collector, Sample, SplitFrom};
use super::folder::has_extension;
use super::yolo_names::Names;
use super::{encoding, split, text};

/// The lists and folders of splits.
#[derive(Debug, Default)]
pub(super) struct Lists {
    /// Each list by its path, in the order train, val, test.
    files: Vec<(&'static str, String)>,
    /// Folders that the YAML names and whose own names say nothing.
    folders: Vec<(&'static str, String)>,
}

impl Lists {
    /// Finds them by the YAML, and by the names of text files beside it and at the top.
    pub(super) fn find(inside: &Inside, names: &Names) -> Result<Self, Fault> {
        let mut lists = Self::default();
        for (split, path) in &names.splits {
            let path = plain(path);
            let is_list = has_extension(Path::new(&path), &["txt"]);
            let ends = Ends::new(&path, names.folder());
            if is_list && let Some(file) = ends.find(|path| inside.is_file(path)) {
                lists.files.push((split, file));
            } else if let Some(folder) = ends.find(|path| inside.is_dir(path))
                && split::of_folder(&format!("{folder}/x")).is_none()
                && !lists.folders.iter().any(|(_, known)| *known == folder)
            {
                lists.folders.push((split, folder));
            }
        }
        let mut beside: Vec<PathBuf> = Vec::new();
        for folder in ["", names.folder()] {
            for entry in inside.list(Path::new(folder))? {
                let entry = entry.at(format_args!("list {}", inside.full(folder).display()))?;
                beside.push(Path::new(folder).join(entry.file_name()));
            }
        }
        beside.sort();
        for wanted in ["train", "val", "test"] {
            for path in beside.iter().filter(|path| has_extension(path, &["txt"])) {
                let stem = path
                    .file_stem()
                    .and_then(|stem| stem.to_str())
                    .unwrap_or_default();
                let stem = stem.strip_prefix("autosplit_").unwrap_or(stem);
                if split::of_name(stem) == Some(wanted)
                    && let Some(path) = path.to_str()
                    && !lists.has(path)
                {
                    lists.files.push((wanted, path.to_owned()));
                }
            }
        }
        lists.files.sort_by_key(|(split, _)| rank(split));
        Ok(lists)
    }

    /// Whether this file is a list.
    pub(super) fn has(&self, path: &str) -> bool {
        self.files.iter().any(|(_, list)| list == path)
    }

    /// The split of an image, or a label file, by the folders that it is in.
    pub(super) fn split_of(&self, path: &str) -> Option<&'static str> {
        let is_in = |folder: &str| {
            path.strip_prefix(folder)
                .is_some_and(|rest| rest.starts_with('/'))
        };
        split::of_folder(path).or_else(|| {
            self.folders
                .iter()
                .find(|(_, folder)| is_in(folder))
                .map(|(split, _)| *split)
        })
    }

    /// Gives the collector the split of each image that a list names.
    pub(super) fn read(
        &self,
        inside: &Inside,
        names: &Names,
        sizes: &HashMap<String, (String, i64, i64)>,
        collector: &mut Collector,
    ) -> Result<(), Fault> {
        for (split, list) in &self.files {
            let at = || format!("read {}", inside.full(list).display());
            let decoded = encoding::Utf8Reader::new(inside.file(list)?, collector.encoding);
            let inferred = decoded.inferred();
            let mut reader = BufReader::with_capacity(64 << 10, decoded);
            let (mut line, mut number, mut usual) = (Vec::new(), 0u64, 0);
            loop {
                line.clear();
                let limit = LABEL_RECORD_BYTES_MAX as u64;
                if (&mut reader)
                    .take(limit)
                    .read_until(b'\n', &mut line)
                    .at(at())?
                    == 0
                {
                    break;
                }
                number += 1;
                let place = format!("{list} line {number}");
                let Some(text) = text::text(&line, &place, &mut collector.refusals) else {
                    continue;
                };
                let named = plain(text.trim_start_matches('\u{feff}').trim());
                if named.is_empty() || !is_image(&named) {
                    continue;
                }
                let is_here = |path: &str| {
                    let stem = path.rsplit_once('.').map_or(path, |(stem, _)| stem);
                    sizes.get(stem).is_some_and(|(known, ..)| known == path) || inside.is_file(path)
                };
                let Some(image) = Ends::new(&named, names.folder()).find_from(&mut usual, is_here)
                else {
                    collector
                        .omitted
                        .add(Category::UnmatchedNames, format!("{place}: {named}"));
                    continue;
                };
                let Some(path) = collector.path(&place, &image) else {
                    continue;
                };
                let split_from = SplitFrom::List(rank(split));
                collector.sample(
                    &path,
                    &Sample {
                        place: &place,
                        split: Some(split),
                        split_from,
                        ..Sample::default()
                    },
                )?;
            }
            collector.note_encoding(list, inferred.name());
            if number == 0 {
                collector
                    .omitted
                    .add(Category::UnreadFiles, format!("{list} is empty"));
            }
        }
        Ok(())
    }
}

/// Lists come in this order; of an image in two of them the first counts.
fn rank(split: &str) -> u8 {
    match split {
        "train" => 0,
        "val" => 1,
        _ => 2,
    }
}

fn is_image(path: &str) -> bool {
    has_extension(Path::new(path), &super::images_beside::IMAGE_EXTENSIONS)
}

/// A path with `/` only, without `./` in front.
fn plain(path: &str) -> String {
    let path = path.trim().replace('\\', "/");
    path.trim_start_matches("./")
        .trim_end_matches('/')
        .to_owned()
}

/// The ends of a path: all of it, without its first component, and so on.
struct Ends<'a> {
    parts: Vec<&'a str>,
    folder: &'a str,
}

impl<'a> Ends<'a> {
    /// The ends of `path`, each tried in `folder` first.
    fn new(path: &'a str, folder: &'a str) -> Self {
        let parts = path
            .split('/')
            .filter(|part| !matches!(*part, "" | "." | ".."))
            .collect();
        Self { parts, folder }
    }

    fn find(&self, found: impl Fn(&str) -> bool) -> Option<String> {
        self.find_from(&mut 0, found)
    }

    /// The same for one of many paths that are written alike: how much was left out of the last one
    /// is tried first.
    fn find_from(&self, usual: &mut usize, found: impl Fn(&str) -> bool) -> Option<String> {
        let starts = std::iter::once(*usual)
            .chain(0..self.parts.len())
            .filter(|start| *start < self.parts.len());
        for start in starts {
            let end = self.parts[start..].join("/");
            let beside = (!self.folder.is_empty()).then(|| format!("{}/{end}", self.folder));
            if let Some(path) = beside.into_iter().chain([end]).find(|path| found(path)) {
                *usual = start;
                return Some(path);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_end_that_is_here() {
        let find = |path: &str, folder: &str, here: &[&str]| {
            Ends::new(&plain(path), folder).find(|path| here.contains(&path))
        };
        let here = ["images/train/a.png", "a.png", "set/b.png"];
        for (path, expected) in [
            ("data/images/train/a.png", Some("images/train/a.png")),
            ("D:\\x\\images\\train\\a.png", Some("images/train/a.png")),
            ("./a.png", Some("a.png")),
            ("../elsewhere/a.png", Some("a.png")),
            ("b.png", None),
        ] {
            assert_eq!(find(path, "", &here).as_deref(), expected, "{path}");
        }
        assert_eq!(find("x/b.png", "set", &here).as_deref(), Some("set/b.png"));
    }
}

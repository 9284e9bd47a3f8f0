//! The image that a label file belongs to, found by its name in the folder of labels.
//!
//! A folder is only asked for images if the walk came by one there, so that labels without images
//! cost no look-ups.

use std::collections::HashSet;
use std::path::Path;

use crate::inside::Inside;

use super::folder::has_extension;

/// The images that count.
pub(super) const IMAGE_EXTENSIONS: [&str; 8] =
    ["jpg", "jpeg", "png", "bmp", "tif", "tiff", "webp", "gif"];

/// Folders that images are in, beside a folder of labels or below it.
const IMAGE_FOLDERS: [&str; 6] = ["JPEGImages", "images", "Images", "image", "imgs", "img"];

/// The folders that hold images.
pub(super) struct ImagesBeside<'a> {
    inside: &'a Inside,
    folders: HashSet<String>,
}

impl<'a> ImagesBeside<'a> {
    pub(super) fn new(inside: &'a Inside) -> Self {
        Self {
            inside,
            folders: HashSet::new(),
        }
    }

    /// Takes notice of a file that the walk came by.
    pub(super) fn note(&mut self, file: &Path) {
        if has_extension(file, &IMAGE_EXTENSIONS)
            && let Some(folder) = file.parent().and_then(Path::to_str)
            && !self.folders.contains(folder)
        {
            self.folders.insert(folder.to_owned());
        }
    }

    /// Whether this is a file in a folder with images.
    pub(super) fn holds(&self, path: &str) -> bool {
        let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
        self.folders.contains(folder) && self.inside.is_file(path)
    }

    /// The path of an image that a label file in `folder` names: in the first of these folders below
    /// it (each with a slash at its end) that has the image, else as `otherwise` says.
    pub(super) fn locate(
        &self,
        folder: &str,
        below: &[String],
        name: &str,
        otherwise: &str,
    ) -> String {
        let within = |below: &str| match folder {
            "" => format!("{below}{name}"),
            folder => format!("{folder}/{below}{name}"),
        };
        let mut paths = below.iter().map(|below| within(below));
        paths
            .find(|path| self.holds(path))
            .unwrap_or_else(|| within(otherwise))
    }

    /// The image of a label file, given without its extension: by the name that the record has,
    /// else by that of the label file; next to it, or in a folder of images that takes the place of
    /// its folder of labels, or lies below it.
    pub(super) fn find(
        &self,
        label: &str,
        recorded: Option<&str>,
        label_folders: &[&str],
    ) -> Option<String> {
        let (folder, stem) = label.rsplit_once('/').unwrap_or(("", label));
        let recorded = recorded
            .and_then(|name| name.rsplit(['/', '\\']).next())
            .filter(|name| !name.is_empty());
        for folder in self.folders_of(folder, label_folders) {
            let within = |name: &str| {
                if folder.is_empty() {
                    name.to_owned()
                } else {
                    format!("{folder}/{name}")
                }
            };
            let by_record = recorded.map(within).filter(|path| {
                has_extension(Path::new(path), &IMAGE_EXTENSIONS) && self.inside.is_file(path)
            });
            let found = by_record.or_else(|| {
                with_extension(&within(stem), |image| {
                    self.inside.is_file(image).then(|| image.to_owned())
                })
            });
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// The folders with images that may belong to this folder of labels, nearest first.
    fn folders_of(&self, folder: &str, label_folders: &[&str]) -> Vec<String> {
        let mut out = vec![folder.to_owned()];
        let parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
        let is_labels = |part: &&str| {
            label_folders
                .iter()
                .any(|name| part.eq_ignore_ascii_case(name))
        };
        if let Some(at) = parts.iter().rposition(is_labels) {
            for name in IMAGE_FOLDERS {
                let mut other = parts.clone();
                other[at] = name;
                out.push(other.join("/"));
            }
            let mut without = parts.clone();
            without.remove(at);
            out.push(without.join("/"));
        }
        out.extend(IMAGE_FOLDERS.map(|name| {
            format!("{folder}/{name}")
                .trim_start_matches('/')
                .to_owned()
        }));
        out.retain(|folder| self.folders.contains(folder));
        out
    }
}

/// The first of `stem.jpg`, `stem.JPG`, `stem.Jpg`… that `look` knows: all extensions in the usual
/// spellings, then in any.
pub(super) fn with_extension<T>(stem: &str, mut look: impl FnMut(&str) -> Option<T>) -> Option<T> {
    let mut each = |usual: bool| {
        IMAGE_EXTENSIONS.iter().find_map(|extension| {
            spellings(extension, usual)
                .iter()
                .find_map(|extension| look(&format!("{stem}.{extension}")))
        })
    };
    each(true).or_else(|| each(false))
}

/// Whether there is a file of this name with an extension in any case.
pub(super) fn exists_in_any_case(inside: &Inside, stem: &str, extension: &str) -> bool {
    [true, false].into_iter().any(|usual| {
        spellings(extension, usual)
            .iter()
            .any(|extension| inside.is_file(format!("{stem}.{extension}")))
    })
}

/// `jpg` as `jpg`, `JPG` and `Jpg`; or in all its other mixtures of small and capital letters.
fn spellings(extension: &str, usual: bool) -> Vec<String> {
    let letters = extension.len().min(8);
    let spelled = |mask: u32| -> String {
        let spell = |(at, c): (usize, char)| {
            if mask >> at & 1 == 1 {
                c.to_ascii_uppercase()
            } else {
                c
            }
        };
        extension.chars().enumerate().map(spell).collect()
    };
    let all = (1u32 << letters) - 1;
    let common = [0, all, 1];
    if usual {
        return common.map(spelled).to_vec();
    }
    (0..all)
        .filter(|mask| !common.contains(mask))
        .map(spelled)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_in_every_case() {
        assert_eq!(spellings("jpg", true), ["jpg", "JPG", "Jpg"]);
        let mut all = [spellings("jpg", true), spellings("jpg", false)].concat();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 8);
        let mut asked = Vec::new();
        assert_eq!(
            with_extension("a", |name| (name == "a.pNG").then_some(1)),
            Some(1)
        );
        assert_eq!(
            with_extension("a", |name| (
                asked.push(name.to_owned()),
                (name == "a.PNG").then_some(1)
            )
                .1),
            Some(1)
        );
        assert_eq!(asked[..4], ["a.jpg", "a.JPG", "a.Jpg", "a.jpeg"]);
    }
}

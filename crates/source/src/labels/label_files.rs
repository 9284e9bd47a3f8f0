//! The label files of a folder, found among its images and other files, in the order of their
//! paths.
//!
//! Readers of formats with several files call it. Files that are neither labels nor images are
//! reported as unread.

use std::path::{Path, PathBuf};

use base::fault::Fault;
use base::limits::LABEL_SORT_BYTES;
use base::omitted::Category;

use crate::inside::Inside;

use super::collect::Collector;
use super::folder::{Walk, has_extension};
use super::images_beside::{IMAGE_EXTENSIONS, ImagesBeside};
use super::sort::{Sorted, Sorter};

/// How many files a set may have whose files are splits or parts of it.
const FILES_MAX: usize = 1000;

/// The files of a set that has few of them, and the images beside them. `kind` names the files in
/// a message.
pub(super) fn few<'a>(
    folder: &'a Inside,
    kind: &str,
    is_label_file: impl Fn(&Path) -> Result<bool, Fault>,
    collector: &mut Collector,
) -> Result<(Vec<PathBuf>, ImagesBeside<'a>), Fault> {
    let mut files = Vec::new();
    let take = |file: &Path| {
        if !is_label_file(file)? {
            return Ok(false);
        }
        if files.len() == FILES_MAX {
            return Err(Fault::integrity(format!(
                "the folder holds more than {FILES_MAX} {kind} files"
            ))
            .with_next("give the folder of one set, in which each split is one file"));
        }
        files.push(file.to_owned());
        Ok(true)
    };
    let images = each(folder, take, collector)?;
    files.sort();
    Ok((files, images))
}

/// The same for a format that has a file for each image: they are sorted on the disk. A file whose
/// path is not UTF-8 is reported as unread.
pub(super) fn many<'a>(
    folder: &'a Inside,
    is_label_file: impl Fn(&Path) -> bool,
    collector: &mut Collector,
) -> Result<(Sorted, ImagesBeside<'a>), Fault> {
    let mut files = Sorter::new(&collector.scratch, LABEL_SORT_BYTES / 4);
    let take = |file: &Path| match file.to_str() {
        Some(path) if is_label_file(file) => files.push(path.as_bytes(), b"").map(|()| true),
        _ => Ok(false),
    };
    let images = each(folder, take, collector)?;
    Ok((files.finish()?, images))
}

/// Passes each file to `take`, which returns whether it is a label file.
fn each<'a>(
    folder: &'a Inside,
    mut take: impl FnMut(&Path) -> Result<bool, Fault>,
    collector: &mut Collector,
) -> Result<ImagesBeside<'a>, Fault> {
    let mut images = ImagesBeside::new(folder);
    let mut walk = Walk::new(folder);
    while let Some(file) = walk.next() {
        let file = file?;
        images.note(&file);
        if !take(&file)? && !has_extension(&file, &IMAGE_EXTENSIONS) {
            walk.omitted
                .add(Category::UnreadFiles, file.display().to_string());
        }
    }
    collector.omitted.merge(walk.omitted);
    Ok(images)
}

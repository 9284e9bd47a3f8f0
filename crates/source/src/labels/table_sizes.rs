//! The sizes of images that a table's rows do not have: from `sizes.csv` (`path,width,height`)
//! beside the table, or from the images beside it. Only boxes that are fractions of their images
//! need them.

use std::collections::HashMap;
use std::io::{BufReader, Read};

use crate::inside::Inside;
use base::limits::LABEL_SIDE_FILE_BYTES_MAX;

use super::folder::Input;
use super::images_beside::with_extension;
use super::size;

/// Folders that images are in, beside the table.
const FOLDERS: [&str; 5] = ["", "images/", "image/", "imgs/", "img/"];
/// Sizes that are remembered; the rows of an image mostly follow one another.
const REMEMBERED_MAX: usize = 10_000;

type Found = Option<(String, i64, i64)>;

/// Finds sizes.
pub(super) struct Sizes {
    inside: Option<Inside>,
    listed: HashMap<String, (i64, i64)>,
    remembered: HashMap<String, Found>,
}

impl Sizes {
    /// Those beside a table. What cannot be read there counts as nothing.
    pub(super) fn beside(input: &Input) -> Self {
        let inside = match input {
            Input::File(path, own) => path
                .parent()
                .and_then(|folder| Inside::open(folder, own.clone()).ok()),
            Input::Folder(_) => None,
        };
        let mut listed = HashMap::new();
        if let Some(file) = inside
            .as_ref()
            .and_then(|inside| inside.try_file("sizes.csv").ok())
        {
            let reader = BufReader::new(file.take(LABEL_SIDE_FILE_BYTES_MAX));
            let mut rows = csv::ReaderBuilder::new().from_reader(reader);
            for (path, width, height) in rows.deserialize::<(String, i64, i64)>().flatten() {
                if width > 0 && height > 0 {
                    listed.insert(path, (width, height));
                }
            }
        }
        Self {
            inside,
            listed,
            remembered: HashMap::new(),
        }
    }

    /// The image's path, with its extension where the table has none, and its size.
    pub(super) fn find(&mut self, path: &str) -> Found {
        if let Some((width, height)) = self.listed.get(path) {
            return Some((path.to_owned(), *width, *height));
        }
        if let Some(found) = self.remembered.get(path) {
            return found.clone();
        }
        if self.remembered.len() >= REMEMBERED_MAX {
            self.remembered.clear();
        }
        let found = self.inside.as_ref().and_then(|inside| look(inside, path));
        self.remembered.insert(path.to_owned(), found.clone());
        found
    }
}

fn look(inside: &Inside, path: &str) -> Found {
    FOLDERS.iter().find_map(|folder| {
        let here = format!("{folder}{path}");
        if let Some((width, height)) = size::of_file(inside, &here) {
            return Some((path.to_owned(), width, height));
        }
        if path
            .rsplit('/')
            .next()
            .is_some_and(|name| name.contains('.'))
        {
            return None;
        }
        // The path stays what the table says, but for the extension.
        with_extension(&here, |image| {
            let (width, height) = size::of_file(inside, image)?;
            Some((image[folder.len()..].to_owned(), width, height))
        })
    })
}

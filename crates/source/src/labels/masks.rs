//! Masks: a folder of PNG files whose pixels are classes, with a class map (`masks_map`).
//!
//! Each class of a mask becomes one annotation, with the runs of all its pixels. A PNG is a mask if
//! it is in a folder for masks (`masks`, `SegmentationClass` and others) or its name ends in
//! `_mask` and the like; where no PNG is, all are. The sample is the image of that name beside the
//! mask or in a folder of images. One mask is in memory at a time, one byte a pixel.

use std::collections::HashMap;
use std::io::{self, BufReader};
use std::path::Path;

use base::fault::Fault;
use base::limits::LABEL_SORT_BYTES;
use base::omitted::Category;

use crate::inside::Inside;

use super::collect::{ClassRef, Collector, Sample};
use super::folder::{Input, Walk, has_extension};
use super::images_beside::{IMAGE_EXTENSIONS, ImagesBeside};
use super::masks_map::{self, ClassMap, Pixel};
use super::png::{Colours, Png};
use super::refuse::Why;
use super::shapes::{Row, Runs};
use super::sort::Sorter;
use super::{split, text};

/// Folders that masks are in.
const MASK_FOLDERS: [&str; 15] = [
    "masks",
    "mask",
    "SegmentationClass",
    "SegmentationClassPNG",
    "segmentation",
    "segmentations",
    "annotations",
    "annotation",
    "labels",
    "label",
    "gt",
    "ground_truth",
    "groundtruth",
    "ann",
    "标注",
];
/// What the names of masks end in beside their images.
const MASK_ENDINGS: [&str; 8] = [
    "_mask", "-mask", ".mask", "_label", "_labels", "_gt", "_L", "_seg",
];
/// The lists of splits of Pascal VOC.
const SPLITS: [&str; 3] = ["train", "val", "test"];
/// The class of a pixel that is none.
const NONE: u8 = 0;
/// Values that one mask may have.
const VALUES_MAX: usize = 254;

pub(super) fn read(input: &Input, collector: &mut Collector) -> Result<(), Fault> {
    let Some(folder) = input.folder() else {
        return Err(
            Fault::integrity("masks are a folder of PNG files, and this is none")
                .with_next("give the folder"),
        );
    };
    let mut images = ImagesBeside::new(folder);
    let mut map = None;
    let (mut by_name, mut all) = sorters(collector);
    let mut walk = Walk::new(folder);
    while let Some(file) = walk.next() {
        let file = file?;
        masks_map::prefer(&mut map, &file);
        let Some(path) = file.to_str() else { continue };
        if path.contains("SegmentationObject/") {
            walk.omitted.add(Category::UnreadFiles, path);
        } else if has_extension(&file, &["png"]) {
            all.push(path.as_bytes(), b"")?;
            match is_mask(path) {
                true => by_name.push(path.as_bytes(), b"")?,
                false => images.note(&file),
            }
        } else if has_extension(&file, &IMAGE_EXTENSIONS) {
            images.note(&file);
        } else if !is_read(&file) {
            walk.omitted.add(Category::UnreadFiles, path);
        }
    }
    collector.omitted.merge(walk.omitted);
    let Some(map) = map else {
        return Err(
            Fault::integrity("the folder of masks has no class map").with_next(
                "add class_map.csv with the columns value,name (or name,r,g,b for colours)",
            ),
        );
    };
    let shown = map.display().to_string();
    let map = ClassMap::read(folder, &map, collector)?;
    for (id, name) in &map.classes {
        let place = format!("{shown} {name:?}");
        let refusals = &mut collector.refusals;
        collector
            .classes
            .declare(&place, *id, name, None, false, refusals)?;
    }
    let reader = Reader {
        folder,
        images,
        splits: splits(folder, collector)?,
        map,
    };
    let mut masks = by_name.finish()?;
    let mut count = 0u64;
    while let Some((path, _)) = masks.next()? {
        reader.mask(&String::from_utf8_lossy(path), collector)?;
        count += 1;
    }
    if count == 0 {
        let mut masks = all.finish()?;
        while let Some((path, _)) = masks.next()? {
            reader.mask(&String::from_utf8_lossy(path), collector)?;
            count += 1;
        }
    }
    if count == 0 {
        return Err(Fault::integrity("the folder holds no PNG file")
            .with_next("give the folder that holds the masks"));
    }
    Ok(())
}

fn sorters(collector: &Collector) -> (Sorter, Sorter) {
    let new = || Sorter::new(&collector.scratch, LABEL_SORT_BYTES / 4);
    (new(), new())
}

/// Whether a file is read, or is a list of a split.
fn is_read(file: &Path) -> bool {
    masks_map::is_map(file)
        || file.ends_with("classes.txt")
        || (has_extension(file, &["txt"]) && file.starts_with("ImageSets"))
}

fn is_mask(path: &str) -> bool {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let in_folder = folder.split('/').any(|part| {
        MASK_FOLDERS
            .iter()
            .any(|name| part.eq_ignore_ascii_case(name))
    });
    in_folder || MASK_ENDINGS.iter().any(|ending| stem.ends_with(ending))
}

fn splits(
    folder: &Inside,
    collector: &mut Collector,
) -> Result<HashMap<String, &'static str>, Fault> {
    let mut splits = HashMap::new();
    for split in SPLITS {
        let list = format!("ImageSets/Segmentation/{split}.txt");
        if folder.exists(&list) {
            let text = text::side_file(folder, Path::new(&list), collector)?;
            splits.extend(text.lines().map(|stem| (stem.trim().to_owned(), split)));
        }
    }
    Ok(splits)
}

struct Reader<'a> {
    folder: &'a Inside,
    images: ImagesBeside<'a>,
    splits: HashMap<String, &'static str>,
    map: ClassMap,
}

impl Reader<'_> {
    fn mask(&self, place: &str, collector: &mut Collector) -> Result<(), Fault> {
        let (name, stem) = self.sample(place);
        if name != place {
            collector.note_path(place, place, &name);
        }
        let Some(path) = collector.path(place, &name) else {
            return Ok(());
        };
        let file = BufReader::with_capacity(64 << 10, self.folder.file(place)?);
        let grid = match Grid::read(file, self.map.has_colours()) {
            Ok(grid) => grid,
            Err(error) => {
                collector.refusals.add(Why::Malformed, place, error);
                return Ok(());
            }
        };
        let in_list = self.splits.get(stem.as_str()).copied();
        let sample = Sample {
            place,
            declared: true,
            width: Some(grid.width.into()),
            height: Some(grid.height.into()),
            split: in_list.or_else(|| split::of_folder(place)),
            ..Sample::default()
        };
        collector.sample(&path, &sample)?;
        for (pixel, runs) in grid.runs() {
            let place = format!("{place} {pixel}");
            let Some(class) = self.map.class(pixel) else {
                // Black is the background, white what no class is known for, unless the map says
                // otherwise.
                if !matches!(pixel, Pixel::Value(0 | 255) | Pixel::Colour(0)) {
                    let detail = "the class map has no class for this pixel";
                    collector.refusals.add(Why::UnknownClass, place, detail);
                }
                continue;
            };
            let name = self.map.classes.iter().find(|(id, _)| *id == class);
            let Some((_, name)) = name.filter(|(_, name)| !masks_map::is_background(name)) else {
                continue;
            };
            let shape = runs.finish(grid.width.into(), grid.height.into());
            let raw = serde_json::json!({"mask": place, "class": name}).to_string();
            let row = Row {
                place: &place,
                class: Some(ClassRef::Id(class)),
                attrs: None,
                raw: &raw,
            };
            match shape.transpose() {
                None => {}
                Some(shape) => row.take(&path, shape, collector)?,
            }
        }
        Ok(())
    }

    /// The path of the image that the mask is for, and its name without extension.
    fn sample(&self, mask: &str) -> (String, String) {
        let stem = mask.rsplit_once('.').map_or(mask, |(stem, _)| stem);
        let ending = MASK_ENDINGS.iter().find(|ending| stem.ends_with(**ending));
        let bare = ending.map_or(stem, |ending| &stem[..stem.len() - ending.len()]);
        let name = bare.rsplit('/').next().unwrap_or(bare).to_owned();
        if let Some(image) = self.images.find(bare, None, &MASK_FOLDERS) {
            return (image, name);
        }
        // Without images, the path is that of the mask, without the folder of masks.
        let mut parts: Vec<&str> = bare.split('/').collect();
        let last = parts.len() - 1;
        let folder = parts[..last].iter().rposition(|part| {
            MASK_FOLDERS
                .iter()
                .any(|name| part.eq_ignore_ascii_case(name))
        });
        if let Some(at) = folder {
            parts.remove(at);
        }
        (format!("{}.png", parts.join("/")), name)
    }
}

impl std::fmt::Display for Pixel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Pixel::Value(value) => write!(f, "value {value}"),
            Pixel::Colour(colour) => {
                let [_, r, g, b] = colour.to_be_bytes();
                write!(f, "colour {r},{g},{b}")
            }
        }
    }
}

/// A mask in memory.
struct Grid {
    width: u32,
    height: u32,
    /// For each pixel one more than the place of its value.
    pixels: Vec<u8>,
    values: Vec<Pixel>,
}

impl Grid {
    fn read(file: impl io::BufRead + io::Seek, by_colour: bool) -> io::Result<Self> {
        let png = Png::open(file)?;
        let (width, height) = (png.width, png.height);
        let colours = png.colours.clone();
        let name = |value: u32| match &colours {
            Colours::Rgb => Pixel::Colour(value),
            Colours::Palette(palette) if by_colour => {
                Pixel::Colour(palette.get(value as usize).copied().unwrap_or(0))
            }
            Colours::Grey if by_colour => Pixel::Colour(value << 16 | value << 8 | value),
            _ => Pixel::Value(value),
        };
        let mut pixels = vec![NONE; width as usize * height as usize];
        let mut values: Vec<Pixel> = Vec::new();
        let mut last = (u32::MAX, NONE);
        png.rows(|y, x, step, row| {
            let start = y as usize * width as usize + x as usize;
            for (at, value) in row.iter().enumerate() {
                if last.0 != *value {
                    let pixel = name(*value);
                    let place = match values.iter().position(|known| *known == pixel) {
                        Some(place) => place,
                        None if values.len() == VALUES_MAX => {
                            return Err(io::Error::new(
                                io::ErrorKind::InvalidData,
                                format!("it has more than {VALUES_MAX} different pixels, so it is an image and no mask"),
                            ));
                        }
                        None => {
                            values.push(pixel);
                            values.len() - 1
                        }
                    };
                    last = (*value, place as u8 + 1);
                }
                pixels[start + at * step as usize] = last.1;
            }
            Ok(())
        })?;
        Ok(Self {
            width,
            height,
            pixels,
            values,
        })
    }

    /// The runs of each value, column by column.
    fn runs(&self) -> Vec<(Pixel, Runs)> {
        let (width, height) = (self.width as usize, self.height as usize);
        let mut all: Vec<(Pixel, Runs)> = self
            .values
            .iter()
            .map(|value| (*value, Runs::default()))
            .collect();
        for x in 0..width {
            let (mut start, mut open) = (0, NONE);
            for y in 0..=height {
                let here = match y < height {
                    true => self.pixels[y * width + x],
                    false => NONE,
                };
                if here == open && y < height {
                    continue;
                }
                if open != NONE
                    && let Some((_, runs)) = all.get_mut(usize::from(open) - 1)
                {
                    runs.add(x as u64, start as u64, (y - start) as u64, height as u64);
                }
                (start, open) = (y, here);
            }
        }
        all.sort_by_key(|(pixel, _)| match pixel {
            Pixel::Value(value) | Pixel::Colour(value) => *value,
        });
        all
    }
}

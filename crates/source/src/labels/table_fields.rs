//! The fields of a table, and which column holds each.

use std::collections::BTreeMap;

use base::fault::Fault;

/// The fields, each with the names that are tried in this order when no column is mapped to it.
pub(super) const FIELDS: [(&str, &[&str]); FIELD_COUNT] = [
    (
        "sample_path",
        &[
            "sample_path",
            "sample",
            "path",
            "file_name",
            "filename",
            "file",
            "image_path",
            "image",
            "img_path",
            "image_name",
            "imageid",
            "image_id",
            "img",
            "image_file",
            "filepath",
            "file_path",
            "图片",
            "图像",
            "图片名",
            "文件名",
            "文件",
        ],
    ),
    (
        "class",
        &[
            "class",
            "class_name",
            "label",
            "category",
            "defect_code",
            "defect",
            "cls",
            "labelname",
            "label_name",
            "category_name",
            "class_label",
            "defect_type",
            "类别",
            "标签",
            "缺陷",
            "缺陷类型",
        ],
    ),
    (
        "class_id",
        &["class_id", "category_id", "label_id", "classid"],
    ),
    ("id", &["id", "annotation_id", "ann_id"]),
    ("x", &["x", "xmin", "x_min", "x1", "left", "左"]),
    ("y", &["y", "ymin", "y_min", "y1", "top", "上"]),
    (
        "w",
        &[
            "w",
            "box_width",
            "bbox_width",
            "bbox_w",
            "bw",
            "box_w",
            "宽",
            "宽度",
        ],
    ),
    (
        "h",
        &[
            "h",
            "box_height",
            "bbox_height",
            "bbox_h",
            "bh",
            "box_h",
            "高",
            "高度",
        ],
    ),
    ("x2", &["x2", "xmax", "x_max", "right", "右"]),
    ("y2", &["y2", "ymax", "y_max", "bottom", "下"]),
    ("kind", &["kind", "shape", "shape_type"]),
    ("geom", &["geom", "geometry", "points"]),
    ("split", &["split", "subset", "fold"]),
    ("width", &["width", "image_width", "img_width"]),
    ("height", &["height", "image_height", "img_height"]),
    ("attrs", &["attrs", "attributes"]),
    (
        "cx",
        &["cx", "x_center", "xc", "center_x", "x_centre", "xcenter"],
    ),
    (
        "cy",
        &["cy", "y_center", "yc", "center_y", "y_centre", "ycenter"],
    ),
    (
        "bbox",
        &[
            "bbox",
            "box",
            "bounding_box",
            "boundingbox",
            "xywh",
            "bbox_xywh",
            "bboxes",
            "boxes",
        ],
    ),
    ("bbox_xyxy", &["bbox_xyxy", "xyxy", "box_xyxy"]),
    ("rle", &["encodedpixels", "encoded_pixels"]),
    ("via_shape", &["region_shape_attributes"]),
    ("via_attributes", &["region_attributes"]),
];
pub(super) const FIELD_COUNT: usize = 23;
pub(super) const SAMPLE_PATH: usize = 0;
pub(super) const CLASS: usize = 1;
pub(super) const CLASS_ID: usize = 2;
pub(super) const ID: usize = 3;
pub(super) const X: usize = 4;
pub(super) const Y: usize = 5;
pub(super) const W: usize = 6;
pub(super) const H: usize = 7;
pub(super) const X2: usize = 8;
pub(super) const Y2: usize = 9;
pub(super) const KIND: usize = 10;
pub(super) const GEOM: usize = 11;
pub(super) const SPLIT: usize = 12;
pub(super) const WIDTH: usize = 13;
pub(super) const HEIGHT: usize = 14;
pub(super) const ATTRS: usize = 15;
pub(super) const CX: usize = 16;
pub(super) const CY: usize = 17;
pub(super) const BBOX: usize = 18;
pub(super) const BBOX_XYXY: usize = 19;
pub(super) const RLE: usize = 20;
pub(super) const VIA_SHAPE: usize = 21;
pub(super) const VIA_ATTRIBUTES: usize = 22;

/// A field's value in one row, as JSON (a CSV's cells are JSON strings).
pub(super) type Cells = [Option<String>; FIELD_COUNT];

/// The names of the fields.
pub(super) fn field_names() -> Vec<&'static str> {
    FIELDS.iter().map(|(name, _)| *name).collect()
}

/// Where each field is, by something that finds a name; explicit mappings are in `columns`. What a
/// box is read from is taken once: fields of another form of it stay in `attrs`.
pub(super) fn choose<T>(
    columns: &BTreeMap<String, String>,
    mut find: impl FnMut(&str) -> Option<T>,
) -> [Option<T>; FIELD_COUNT] {
    let mut chosen: [Option<T>; FIELD_COUNT] = [const { None }; FIELD_COUNT];
    for (at, (field, _)) in FIELDS.iter().enumerate() {
        chosen[at] = columns
            .get(*field)
            .filter(|name| !name.is_empty())
            .and_then(|name| find(name));
    }
    let mapped = |field: usize| columns.contains_key(FIELDS[field].0);
    for at in 0..FIELD_COUNT {
        if mapped(at) || is_spoken_for(at, &chosen) {
            continue;
        }
        chosen[at] = FIELDS[at].1.iter().find_map(|name| find(name));
    }
    chosen
}

/// Whether the box is in other fields already, so that this one is none of it.
fn is_spoken_for<T>(field: usize, chosen: &[Option<T>; FIELD_COUNT]) -> bool {
    let has = |field: usize| chosen[field].is_some();
    match field {
        CX | CY => has(X) || has(Y),
        BBOX | BBOX_XYXY => {
            has(X) || has(Y) || has(CX) || has(CY) || (field == BBOX_XYXY && has(BBOX))
        }
        RLE | VIA_SHAPE => has(X) || has(BBOX),
        _ => false,
    }
}

/// The header as an error shows it. The first line of a file that is no table of labels is not
/// shown: the source may be a link to a file that only the daemon may read.
fn shown(header: &[String]) -> String {
    let is_known = |column: &String| {
        let mut names = FIELDS
            .iter()
            .flat_map(|(field, names)| std::iter::once(*field).chain(names.iter().copied()));
        names.any(|name| column.eq_ignore_ascii_case(name))
    };
    if header.iter().any(is_known) {
        format!("the header has {}", header.join(", "))
    } else {
        format!(
            "none of the {} columns of its first line has a known name",
            header.len()
        )
    }
}

/// The column of each field.
pub(super) fn map_columns(
    header: &[String],
    columns: &BTreeMap<String, String>,
) -> Result<[Option<usize>; FIELD_COUNT], Fault> {
    let find = |name: &str| {
        header
            .iter()
            .position(|column| column.eq_ignore_ascii_case(name))
    };
    for (field, _) in FIELDS {
        if let Some(name) = columns
            .get(field)
            .filter(|name| !name.is_empty() && find(name).is_none())
        {
            let detail = format!("there is no column {name:?} for {field}; {}", shown(header));
            return Err(
                Fault::integrity(detail).with_next("correct the column mapping or the header")
            );
        }
    }
    let mut mapping = choose(columns, find);
    if mapping[SAMPLE_PATH].is_none() {
        let detail = format!("no column holds the sample's path; {}", shown(header));
        return Err(Fault::integrity(detail)
            .with_next("map one by sample_path=COLUMN; the first row must be the header"));
    }
    let boxed = |a: usize, b: usize, mapping: &[Option<usize>; FIELD_COUNT]| {
        mapping[a].is_some() && mapping[b].is_some()
    };
    if boxed(CX, CY, &mapping) && !boxed(W, H, &mapping) && boxed(WIDTH, HEIGHT, &mapping) {
        // Beside a centre, width and height are the box's: a table with the image's names them so.
        let is_plain = |field: usize| {
            mapping[field].is_some_and(|at| header[at].eq_ignore_ascii_case(FIELDS[field].0))
        };
        if is_plain(WIDTH)
            && is_plain(HEIGHT)
            && !columns.contains_key("width")
            && !columns.contains_key("height")
        {
            (mapping[W], mapping[H]) = (mapping[WIDTH].take(), mapping[HEIGHT].take());
        }
    }
    if boxed(X, Y, &mapping)
        && !boxed(W, H, &mapping)
        && !boxed(X2, Y2, &mapping)
        && boxed(WIDTH, HEIGHT, &mapping)
    {
        return Err(Fault::integrity(
            "there are x and y, but whether width and height are the box's or the image's is not clear",
        )
        .with_next("map them, to the box by w=width and h=height, or to the image by width=width and height=height beside w and h"));
    }
    Ok(mapping)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_box_is_taken_from_one_form_of_it() {
        let map = |header: &[&str]| {
            let header: Vec<String> = header.iter().map(|name| (*name).to_owned()).collect();
            map_columns(&header, &BTreeMap::new()).unwrap()
        };
        let mapping = map(&["path", "x", "y", "w", "h", "bbox", "cx", "cy"]);
        assert_eq!((mapping[BBOX], mapping[CX]), (None, None));
        assert_eq!(map(&["path", "bbox"])[BBOX], Some(1));
        assert_eq!(
            map(&["ImageID", "XMin", "LabelName"])[..2],
            [Some(0), Some(2)]
        );
        let mapping = map(&["path", "x_center", "y_center", "width", "height"]);
        assert_eq!(
            (mapping[W], mapping[H], mapping[WIDTH]),
            (Some(3), Some(4), None)
        );
        let mapping = map(&["path", "cx", "cy", "bw", "bh", "width", "height"]);
        assert_eq!((mapping[W], mapping[WIDTH]), (Some(3), Some(5)));
    }
}

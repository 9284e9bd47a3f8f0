//! The canonical form of a label set: three JSON Lines files whose bytes depend on nothing but the
//! labels.
//!
//! Sources convert every format into it at publish, sinks load it into rows, and rows export back
//! to the same bytes. One object a line, keys in the order of the fields here, no white space,
//! absent values as `null`.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::chunk::Hash;

/// Rows of [`AnnotationRow`], sorted by sample path in manifest order, then as the source had them.
pub const ANNOTATIONS: &str = "annotations.jsonl";
/// Rows of [`ClassRow`], sorted by id.
pub const CLASSES: &str = "classes.jsonl";
/// Rows of [`SampleRow`], sorted by path in manifest order.
pub const SAMPLES: &str = "samples.jsonl";

/// The columns that a query may return when its rows are published: those of the view
/// `annotations`, and what the view leaves out. Only `sample_path` must be there.
pub const QUERY_COLUMNS: [&str; 17] = [
    "sample_path",
    "sample_hash",
    "class",
    "class_id",
    "kind",
    "x",
    "y",
    "w",
    "h",
    "geom",
    "attrs",
    "raw",
    "width",
    "height",
    "split",
    "label_set",
    "version",
];

/// One row of such a query: for each of [`QUERY_COLUMNS`] a JSON string or number; `None` where it
/// is null or not returned. JSON columns come as strings that hold JSON.
pub type QueryRow = [Option<String>; QUERY_COLUMNS.len()];

/// One annotation. Its number (`ann_no`) is its 0-based line in the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnnotationRow {
    /// The sample's path.
    pub sample: String,
    /// The class's id; `null` where the format has none.
    pub class: Option<i64>,
    /// `bbox`, `polygon`, `rle`, `keypoints`, `polyline`, `point`, `class` or `other`.
    pub kind: String,
    /// Left of the bounding box, absolute pixels.
    pub x: Option<f64>,
    /// Top of the bounding box, absolute pixels.
    pub y: Option<f64>,
    /// Width of the bounding box, pixels.
    pub w: Option<f64>,
    /// Height of the bounding box, pixels.
    pub h: Option<f64>,
    /// The exact shape, where there is more than a box.
    pub geom: Option<Box<RawValue>>,
    /// Attributes.
    pub attrs: Option<Box<RawValue>>,
    /// The record as the source had it.
    pub raw: Box<RawValue>,
}

/// One class.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassRow {
    /// Its id, unique in the set.
    pub id: i64,
    /// Its name, unique in the set.
    pub name: String,
    /// Attributes.
    pub attrs: Option<Box<RawValue>>,
}

/// One sample: an image that labels speak of.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleRow {
    /// Its path, in the dataset where the labels are bound to one.
    pub path: String,
    /// BLAKE3 of its file, where bound.
    pub hash: Option<Hash>,
    /// Pixels.
    pub width: Option<i64>,
    /// Pixels.
    pub height: Option<i64>,
    /// `train`, `val`, `test`…
    pub split: Option<String>,
    /// What else is known.
    pub meta: Option<Box<RawValue>>,
}

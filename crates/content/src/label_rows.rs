//! The canonical form of a label set: three JSON Lines files whose bytes depend only on the labels.
//!
//! A source converts its format to this form when it is published. Sinks load it into rows, and
//! rows are exported to the same bytes. One object per line; keys in the order of the fields below;
//! no white space; a missing value is `null`.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::chunk::Hash;

/// Rows of [`AnnotationRow`], sorted by sample path in manifest order, then in the order of the
/// source.
pub const ANNOTATIONS: &str = "annotations.jsonl";
/// Rows of [`ClassRow`], sorted by id.
pub const CLASSES: &str = "classes.jsonl";
/// Rows of [`SampleRow`], sorted by path in manifest order.
pub const SAMPLES: &str = "samples.jsonl";

/// The columns that a published query may return: those of the view `annotations`, and those that
/// the view omits. Only `sample_path` is required.
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

/// One row of such a query: for each of [`QUERY_COLUMNS`] a JSON string or number, or `None` if it
/// is null or not returned. JSON columns are strings that contain JSON.
pub type QueryRow = [Option<String>; QUERY_COLUMNS.len()];

/// One annotation. Its number (`ann_no`) is its 0-based line in the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnnotationRow {
    pub sample: String,
    /// The id of the class; `null` if the format has no class.
    pub class: Option<i64>,
    /// `bbox`, `polygon`, `rle`, `keypoints`, `polyline`, `point`, `class` or `other`.
    pub kind: String,
    /// Left edge of the bounding box, in absolute pixels.
    pub x: Option<f64>,
    /// Top edge of the bounding box, in absolute pixels.
    pub y: Option<f64>,
    /// In pixels.
    pub w: Option<f64>,
    /// In pixels.
    pub h: Option<f64>,
    /// The exact shape, if it is more than a box.
    pub geom: Option<Box<RawValue>>,
    pub attrs: Option<Box<RawValue>>,
    /// The record in the form of the source.
    pub raw: Box<RawValue>,
}

/// One class.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassRow {
    /// Unique in the set.
    pub id: i64,
    /// Unique in the set.
    pub name: String,
    pub attrs: Option<Box<RawValue>>,
}

/// One sample: an image to which annotations refer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleRow {
    /// The path; in the dataset, if the labels are bound to one.
    pub path: String,
    /// The BLAKE3 of the file, if the labels are bound to a dataset.
    pub hash: Option<Hash>,
    /// In pixels.
    pub width: Option<i64>,
    /// In pixels.
    pub height: Option<i64>,
    /// `train`, `val`, `test`…
    pub split: Option<String>,
    /// Other metadata.
    pub meta: Option<Box<RawValue>>,
}

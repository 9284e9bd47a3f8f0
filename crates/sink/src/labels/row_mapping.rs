//! Reads the rows of the label tables, for both databases: the order of the columns and their
//! meaning are the same in each.
//!
//! The engines call it with the rows of their queries (`HELD`, `COUNT`, `EXPORT_CLASSES`,
//! `EXPORT_SAMPLES`, `EXPORT_ANNOTATIONS`), whose columns are in the order that each function states.

use super::canonical::{Annotation, Class, Sample};
use super::engine::StoredVersion;

/// A row of a label database. Columns are counted from 0.
pub(super) trait LabelRow {
    fn int(&self, at: usize) -> sqlx::Result<i64>;
    fn optional_int(&self, at: usize) -> sqlx::Result<Option<i64>>;
    fn optional_float(&self, at: usize) -> sqlx::Result<Option<f64>>;
    fn text(&self, at: usize) -> sqlx::Result<&str>;
    fn optional_text(&self, at: usize) -> sqlx::Result<Option<&str>>;
}

/// The columns manifest_digest, n_classes, n_samples, n_annotations, rows_digest and id. Returns
/// the id and the version.
pub(super) fn stored_version(row: &impl LabelRow) -> sqlx::Result<(i64, StoredVersion)> {
    let count = |at| row.int(at).map(i64::unsigned_abs);
    let version = StoredVersion {
        digest: row.text(0)?.into(),
        classes: count(1)?,
        samples: count(2)?,
        annotations: count(3)?,
        rows_digest: row.text(4)?.into(),
    };
    Ok((row.int(5)?, version))
}

/// Three counts: classes, samples and annotations.
pub(super) fn counts(row: &impl LabelRow) -> sqlx::Result<[u64; 3]> {
    let count = |at| row.int(at).map(i64::unsigned_abs);
    Ok([count(0)?, count(1)?, count(2)?])
}

/// The columns class_id, name and attrs.
pub(super) fn class(row: &impl LabelRow) -> sqlx::Result<Class<'_>> {
    Ok(Class {
        id: row.int(0)?,
        name: row.text(1)?,
        attrs: row.optional_text(2)?,
    })
}

/// The columns sample_no, path, hash, width, height, split and meta. Returns the number and the
/// sample.
pub(super) fn sample(row: &impl LabelRow) -> sqlx::Result<(i64, Sample<'_>)> {
    let sample = Sample {
        path: row.text(1)?,
        hash: row.optional_text(2)?,
        width: row.optional_int(3)?,
        height: row.optional_int(4)?,
        split: row.optional_text(5)?,
        meta: row.optional_text(6)?,
    };
    Ok((row.int(0)?, sample))
}

/// The columns ann_no, path, class_id, kind, x, y, w, h, geom, attrs and raw. Returns the number
/// and the annotation.
pub(super) fn annotation(row: &impl LabelRow) -> sqlx::Result<(i64, Annotation<'_>)> {
    let [x, y, w, h] = [4, 5, 6, 7].map(|at| row.optional_float(at));
    let annotation = Annotation {
        sample: row.text(1)?,
        class: row.optional_int(2)?,
        kind: row.text(3)?,
        bbox: [x?, y?, w?, h?],
        geom: row.optional_text(8)?,
        attrs: row.optional_text(9)?,
        raw: row.text(10)?,
    };
    Ok((row.int(0)?, annotation))
}

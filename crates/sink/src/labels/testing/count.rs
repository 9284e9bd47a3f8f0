//! Reads canonical label files without a database.

use std::path::Path;

use base::fault::Fault;

use crate::labels::canonical::{read_annotations, read_classes, read_samples};

/// Reads canonical label files as a load does, and counts samples, annotations and classes.
pub fn count_labels(dir: &Path) -> Result<(u64, u64, u64), Fault> {
    let mut classes = 0;
    let ids = read_classes(dir, &mut |_| {
        classes += 1;
        Ok(())
    })?;
    let samples = read_samples(dir, &mut |_, _| Ok(()))?;
    let (annotations, _) = read_annotations(dir, &ids, &mut |_, _, _| Ok(()))?;
    Ok((samples, annotations, classes))
}

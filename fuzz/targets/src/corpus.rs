//! The first inputs of each target: valid values made by code, and the files of
//! `fuzz/corpus/TARGET`.

use std::path::{Path, PathBuf};

use crate::Target;

/// A folder of a target under `fuzz`.
fn dir(of: &str, target: &Target) -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).join(of).join(target.name)
}

/// The folder with the committed inputs of a target: among them each input that once led to a
/// fault.
fn corpus_dir(target: &Target) -> PathBuf {
    dir("corpus", target)
}

/// The folder in which inputs that led to a fault are saved.
pub fn artifacts_dir(target: &Target) -> PathBuf {
    dir("artifacts", target)
}

/// The valid inputs of a target, then its committed ones in the order of their names.
pub fn first_inputs(target: &Target) -> Vec<Vec<u8>> {
    let mut inputs = (target.seeds)();
    let mut files: Vec<PathBuf> = std::fs::read_dir(corpus_dir(target))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    files.sort();
    inputs.extend(files.iter().filter_map(|file| std::fs::read(file).ok()));
    inputs
}

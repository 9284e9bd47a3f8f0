//! The names of images in an archive with several images, and the selection by `path#tag`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use base::fault::Fault;
use base::limits::OFFENDERS_LISTED_MAX;

/// Splits `path#tag`. If a path with the `#` exists, it is used as a path.
pub fn split_tag(source: &str) -> (PathBuf, Option<&str>) {
    match source.rsplit_once('#') {
        Some((path, tag)) if !tag.is_empty() && !Path::new(source).exists() => {
            (path.into(), Some(tag))
        }
        _ => (source.into(), None),
    }
}

/// Whether the name of an image matches the user's selection: the complete name, with or without the
/// parts that Docker leaves out, or its part after the colon.
pub(super) fn matches(name: &str, tag: &str) -> bool {
    name == tag
        || short(name) == short(tag)
        || name
            .rsplit_once(':')
            .is_some_and(|(_, own)| own == tag && !own.contains('/'))
}

/// A name as Docker shows it: without its own registry, and without the directory of its own images.
fn short(name: &str) -> &str {
    let Some(name) = ["docker.io/", "index.docker.io/"]
        .iter()
        .find_map(|own| name.strip_prefix(own))
    else {
        return name;
    };
    name.strip_prefix("library/")
        .filter(|rest| !rest.contains('/'))
        .unwrap_or(name)
}

/// Whether two names refer to one image: Docker writes `app:v1` in one place and
/// `docker.io/library/app:v1` or `v1` in another.
pub(super) fn same_image(a: &str, b: &str) -> bool {
    let tail = |long: &str, short: &str| {
        long.strip_suffix(short)
            .is_some_and(|rest| rest.ends_with(['/', ':']))
    };
    a == b || tail(a, b) || tail(b, a)
}

/// The position in a selection by position: `@0` is the first image.
pub(super) fn position(tag: &str) -> Option<usize> {
    tag.strip_prefix('@')?.parse().ok()
}

/// Whether a selection is a digest: of a manifest, or the image ID.
pub(super) fn is_digest(tag: &str) -> bool {
    tag.starts_with("sha256:")
}

/// What a user can write after the `#` to select an image: its name, or its position.
pub(super) fn label(name: Option<&str>, position: Option<usize>) -> String {
    match (name, position) {
        (Some(name), _) => name.to_owned(),
        (None, Some(position)) => format!("@{position}"),
        (None, None) => "none with a name".to_owned(),
    }
}

/// The fault of an archive with several images and no selection.
pub(super) fn several(shown: &Path, names: impl Iterator<Item = String>) -> Fault {
    let message = format!(
        "image {}: it contains several images: {}",
        shown.display(),
        list(names)
    );
    Fault::usage(message).with_next(format!(
        "choose one: publish '{0}#TAG', or '{0}#@0' for the first one",
        shown.display()
    ))
}

/// The fault of a tag that the archive does not contain.
pub(super) fn unknown(shown: &Path, tag: &str, names: impl Iterator<Item = String>) -> Fault {
    let message = format!(
        "image {}: it does not contain the image {tag:?}, only: {}",
        shown.display(),
        list(names)
    );
    Fault::not_found(message).with_next("put one of these after the '#'")
}

fn list(names: impl Iterator<Item = String>) -> String {
    let names: BTreeSet<String> = names.collect();
    let mut text = names
        .iter()
        .take(OFFENDERS_LISTED_MAX)
        .cloned()
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > OFFENDERS_LISTED_MAX {
        text.push_str(&format!(" and {} more", names.len() - OFFENDERS_LISTED_MAX));
    }
    if text.is_empty() {
        "none has a name".into()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_selected_after_a_hash() {
        assert_eq!(split_tag("/a/img.tar"), ("/a/img.tar".into(), None));
        assert_eq!(
            split_tag("/a/img.tar#app:v1"),
            ("/a/img.tar".into(), Some("app:v1"))
        );
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("c#x.tar");
        std::fs::File::create(&odd).unwrap();
        assert_eq!(split_tag(odd.to_str().unwrap()), (odd.clone(), None));
    }

    #[test]
    fn names_match_completely_or_by_tag() {
        assert!(matches("host:5000/app:v1", "v1") && matches("app:v1", "app:v1"));
        assert!(!matches("host:5000/app", "5000/app") && !matches("app:v1", "app"));
        for (name, tag, expected) in [
            ("docker.io/ops/app:v1", "ops/app:v1", true),
            ("ops/app:v1", "docker.io/ops/app:v1", true),
            ("docker.io/library/app:v1", "app:v1", true),
            ("docker.io/library/a/app:v1", "a/app:v1", false),
            ("docker.io/ops/app:v1", "app:v1", false),
            ("quay.io/ops/app:v1", "ops/app:v1", false),
        ] {
            assert_eq!(matches(name, tag), expected, "{name} {tag}");
        }
    }
}

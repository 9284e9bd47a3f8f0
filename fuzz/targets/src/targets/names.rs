//! Names, ids, selectors and paths: text becomes a type once, and a path is made of that type only.

use std::fmt::{Debug, Display};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use base::names::{
    ArtifactRef, DeliveryId, Kind, RelPath, RunId, RunName, SiteName, SiteSelector, TransferId,
    WorkId, WorkIds,
};
use base::names::{check_label, stays_inside};
use base::sha256::Sha256;
use base::text::{Message, is_unsafe};
use registry::Reference;
use serde::{Deserialize, Serialize};

use super::texts;
use crate::Target;
use crate::outcome::{note, taken};

pub(super) const NAMES: Target = Target {
    name: "names",
    about: "artifact references, site and run names, ids, selectors, labels, paths and link targets",
    run: names,
    seeds: || {
        texts(&[
            "dataset/line3:v1",
            "model/resnet-50:2026.11",
            "chengdu",
            "all",
            "region=west,line!=3",
            "suzhou, chengdu",
            "t-0190a5b3c7f1a2b3c4d5",
            "t-1,d-2",
            "images/train/001.jpg\0../val/002.jpg",
            "a/b/c\0../../d",
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "line/owner=li",
        ])
    },
    words: &[
        "dataset/",
        "labels/",
        "operator/",
        "image/",
        "model/",
        ":v1",
        "all",
        "current",
        "CURRENT",
        "..",
        "sha256:",
        "=",
        "!=",
        ",",
    ],
    short: 4000,
};

const DIR: &str = "/data/dir";

fn names(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let (first, second) = text.split_once('\0').unwrap_or((&*text, ""));
    // The whole text too: a NUL is a character that every type must refuse.
    for text in [first, &*text] {
        child(text, SiteName::in_dir);
        child(text, RunName::in_dir);
        child(text, TransferId::in_dir);
        child(text, DeliveryId::in_dir);
        child(text, RunId::in_dir);
        child(text, WorkId::in_dir);
        parsed::<Kind>(text);
        parsed::<SiteSelector>(text);
        parsed::<WorkIds>(text);
        if let Some(artifact) = parsed::<ArtifactRef>(text) {
            assert_eq!(artifact.to_string(), text);
            let parts = ArtifactRef::new(artifact.kind, artifact.name(), artifact.version());
            assert_eq!(parts.ok(), Some(artifact));
        }
        if let Some(digest) = taken(Sha256::from_str(text)) {
            assert_eq!(
                Sha256::from_layout_path(&digest.layout_path()),
                Some(digest)
            );
        }
        if let Some((key, value)) = text.split_once('=') {
            taken(check_label(key, value));
        }
        let message = Message::from(text);
        assert!(
            !message
                .chars()
                .any(|c| is_unsafe(c) && !matches!(c, '\n' | '\t'))
        );
    }
    if let Some(path) = parsed::<RelPath>(first) {
        path_is_below(&path);
        link_stays_inside(&path, second);
    }
}

/// Parses, and checks that text and JSON of the value give the value again.
fn parsed<T>(text: &str) -> Option<T>
where
    T: FromStr<Err: Display> + Display + Debug + PartialEq + Serialized,
{
    let value = taken(text.parse::<T>())?;
    assert_eq!(
        value.to_string().parse::<T>().ok().as_ref(),
        Some(&value),
        "{text:?} as text"
    );
    value.check_json();
    Some(value)
}

/// Types that are JSON strings.
trait Serialized {
    fn check_json(&self);
}

impl<T: Serialize + for<'de> Deserialize<'de> + PartialEq + Debug> Serialized for T {
    fn check_json(&self) {
        let json = serde_json::to_string(self).ok();
        let back = json.and_then(|json| serde_json::from_str::<T>(&json).ok());
        assert_eq!(back.as_ref(), Some(self), "as JSON");
    }
}

/// A name that is one component: joined to a folder it is a direct child of it.
fn child<T>(text: &str, in_dir: impl Fn(&T, &Path) -> PathBuf)
where
    T: FromStr<Err: Display> + Display + Debug + PartialEq + Serialized,
{
    let Some(name) = parsed::<T>(text) else {
        return;
    };
    assert_eq!(name.to_string(), text);
    let dir = Path::new(DIR);
    let path = in_dir(&name, dir);
    assert_eq!(path.parent(), Some(dir), "{path:?}");
    assert_eq!(path.file_name().and_then(|name| name.to_str()), Some(text));
    assert_eq!(path.components().count(), dir.components().count() + 1);
    assert!(!text.bytes().any(|byte| byte == 0));
}

fn path_is_below(path: &RelPath) {
    let full = path.in_dir(Path::new(DIR));
    let below = full.strip_prefix(DIR);
    assert!(
        below.is_ok_and(|below| below
            .components()
            .all(|part| matches!(part, Component::Normal(_)))),
        "{full:?}"
    );
    assert_eq!(
        full.components().count(),
        Path::new(DIR).components().count() + path.components().count()
    );
    assert!(full.as_os_str().len() > DIR.len() && !path.as_str().contains('\0'));
}

/// A target that is accepted never leaves the artifact, whatever is a folder: followed by its text
/// it stays below the top.
fn link_stays_inside(path: &RelPath, target: &str) {
    for are_folders in [true, false] {
        let result = stays_inside(path, target, |_, _| are_folders);
        note(result.err().unwrap_or("inside"));
        if result.is_ok() {
            let mut depth = path.components().count() as i64 - 1;
            for component in Path::new(target).components() {
                match component {
                    Component::Normal(_) => depth += 1,
                    Component::ParentDir => depth -= 1,
                    Component::CurDir => {}
                    Component::RootDir | Component::Prefix(_) => {
                        assert!(target.is_empty(), "{target:?} is absolute");
                    }
                }
                assert!(depth >= 0, "{target:?} leaves the artifact from {path:?}");
            }
        }
    }
}

pub(super) const IMAGE_REFERENCE: Target = Target {
    name: "image_reference",
    about: "image references, repository names, and archive names with a tag",
    run: image_reference,
    seeds: || {
        texts(&[
            "registry.example.com/line3/inspect:v2",
            "http://127.0.0.1:5000/a/b@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "https://[::1]:5000/x",
            "localhost:5000/a__b/c--d:latest",
            "/images/inspect.tar#v2",
        ])
    },
    words: &[
        "http://",
        "https://",
        "localhost",
        "[::1]",
        ":5000",
        "@sha256:",
        ":latest",
        "__",
        "--",
        ".",
    ],
    short: 4000,
};

fn image_reference(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    if let Some(reference) = taken(text.parse::<Reference>()) {
        assert!(registry::reference::check_repository(&reference.repository).is_ok());
        // The scheme is not part of the name that is shown.
        let scheme = if reference.origin.https {
            "https"
        } else {
            "http"
        };
        let again = format!("{scheme}://{reference}").parse::<Reference>();
        let parts = |reference: &Reference| {
            let Reference {
                origin,
                repository,
                pick,
                ..
            } = reference.clone();
            (origin, repository, pick)
        };
        assert_eq!(
            again.ok().as_ref().map(parts),
            Some(parts(&reference)),
            "{text:?}"
        );
    }
    taken(registry::reference::check_repository(&text));
    let (path, tag) = source::image::split_tag(&text);
    note(if tag.is_some() { "tag" } else { "no tag" });
    let whole = tag.map_or_else(
        || path.display().to_string(),
        |tag| format!("{}#{tag}", path.display()),
    );
    assert_eq!(whole, text);
}

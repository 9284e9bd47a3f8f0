//! A source for tests: the regular files of a directory.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::vec::IntoIter;

use base::fault::Fault;
use base::names::RelPath;

use crate::manifest::{Attributes, KindInfo};
use crate::source::{Content, FileIdentity, Source, SourceBody, SourceEntry};

/// Lists the entries of a directory in manifest order.
pub(crate) struct Folder(IntoIter<SourceEntry>);

impl Folder {
    pub(crate) fn open(path: &Path) -> Self {
        let mut entries = Vec::new();
        list(path, path, &mut entries);
        Self(entries.into_iter())
    }
}

fn list(root: &Path, folder: &Path, entries: &mut Vec<SourceEntry>) {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    for path in paths {
        let meta = fs::symlink_metadata(&path).unwrap();
        let name: RelPath = path
            .strip_prefix(root)
            .unwrap()
            .to_str()
            .unwrap()
            .parse()
            .unwrap();
        let file = Arc::new(path.clone());
        let body = match meta.is_dir() {
            true => SourceBody::Dir,
            false => SourceBody::File {
                size: meta.len(),
                content: Content::File(path.clone()),
            },
        };
        let identity = meta.is_file().then(|| FileIdentity::new(file, &meta));
        entries.push(SourceEntry {
            path: name,
            mode: meta.permissions().mode() & 0o777,
            body,
            identity,
            attributes: Attributes::default(),
        });
        if meta.is_dir() {
            list(root, &path, entries);
        }
    }
}

impl Source for Folder {
    fn next(&mut self) -> Result<Option<SourceEntry>, Fault> {
        Ok(self.0.next())
    }

    fn info(&self) -> KindInfo {
        KindInfo::Files
    }
}

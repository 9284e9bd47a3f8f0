//! Compares folders: names, kinds, permission bits, link targets, bytes.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The entry at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Node {
    /// A folder with its mode.
    Dir(u32),
    /// A link with its target.
    Link(PathBuf),
    /// A file with its mode, length and BLAKE3.
    File(u32, u64, blake3::Hash),
}

/// All entries below a folder, by relative path, without the folder itself.
pub(crate) fn read(root: &Path) -> BTreeMap<PathBuf, Node> {
    let mut nodes = BTreeMap::new();
    walk(root, Path::new(""), &mut nodes);
    nodes
}

fn walk(root: &Path, inside: &Path, nodes: &mut BTreeMap<PathBuf, Node>) {
    let folder = root.join(inside);
    let entries =
        std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    for entry in entries {
        let entry = entry.expect("read a folder");
        let path = inside.join(entry.file_name());
        let meta = entry.metadata().expect("read an entry's metadata");
        let mode = meta.permissions().mode() & 0o7777;
        let node = if meta.is_dir() {
            walk(root, &path, nodes);
            Node::Dir(mode)
        } else if meta.is_symlink() {
            Node::Link(std::fs::read_link(entry.path()).expect("read a link"))
        } else {
            let mut hasher = blake3::Hasher::new();
            let mut file = std::fs::File::open(entry.path()).expect("open a file");
            std::io::copy(&mut file, &mut hasher).expect("read a file");
            Node::File(mode, meta.len(), hasher.finalize())
        };
        nodes.insert(path, node);
    }
}

/// Checks that two folders have the same content; lists the differences otherwise.
#[track_caller]
pub(crate) fn assert_same(expected: &Path, found: &Path) {
    let (left, right) = (read(expected), read(found));
    assert!(
        !left.is_empty(),
        "{} is empty: nothing is compared",
        expected.display()
    );
    let mut differences = Vec::new();
    for (path, node) in &left {
        match right.get(path) {
            None => differences.push(format!("missing: {}", path.display())),
            Some(other) if other != node => differences.push(format!(
                "differs: {}: {node:?} became {other:?}",
                path.display()
            )),
            Some(_) => {}
        }
    }
    differences.extend(
        right
            .keys()
            .filter(|p| !left.contains_key(*p))
            .map(|p| format!("additional: {}", p.display())),
    );
    differences.truncate(20);
    assert!(
        differences.is_empty(),
        "{} and {} differ:\n{}",
        expected.display(),
        found.display(),
        differences.join("\n")
    );
}

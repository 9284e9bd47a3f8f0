//! Counts the properties of files and directories that an artifact does not contain: everything
//! except names, content, links and permission bits, and what `kept` reads.
//!
//! [`super::FilesSource`] passes every entry that it reads, with its metadata. Memory is bounded
//! for a tree of any size. The extended attributes of a file are listed when its content is open,
//! because listing them by path costs three times as much, which matters for many small files.
//! Holes of sparse files are not counted: they are read as zeros, and long runs of zeros become holes
//! at a site.

use std::collections::HashSet;
use std::fs::{File, Metadata};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::kept::Keeps;
use base::limits::{HARD_LINKED_FILES_KEPT_MAX, XATTR_NAMES_BYTES_MAX};
use base::omitted::{Category, Omitted};
use content::manifest::XATTR_PREFIX;

/// The buffer for the attribute names of a typical file, in bytes.
const NAMES_BYTES: usize = 1 << 10;
/// The set-user-ID, set-group-ID and sticky bits.
const SPECIAL_BITS: u32 = 0o7000;
/// Extended attributes that the system or the filesystem sets itself: labels of SELinux, Smack and
/// AppArmor, the measurements of IMA and EVM, and the metadata of GlusterFS and Lustre.
const SYSTEM_XATTRS: [&str; 9] = [
    "security.selinux",
    "security.ima",
    "security.evm",
    "trusted.gfid",
    "trusted.lov",
    "trusted.lma",
    "trusted.lmv",
    "trusted.link",
    "trusted.fid",
];
/// Prefixes of attributes that NFS, SMB, NTFS, overlayfs, GlusterFS, Lustre, Ceph and Btrfs show on
/// every file or use internally.
const SYSTEM_XATTR_PREFIXES: [&str; 12] = [
    "security.SMACK64",
    "security.apparmor",
    "system.nfs4",
    "system.cifs_",
    "system.smb3_",
    "system.ntfs_",
    "trusted.overlay.",
    "trusted.glusterfs.",
    "trusted.afr.",
    "lustre.",
    "ceph.",
    "btrfs.",
];

/// The counts so far.
#[derive(Debug)]
pub(super) struct Lost {
    omitted: Omitted,
    /// What the artifact contains.
    keeps: Keeps,
    /// Whether a directory is read. A single file has no hard links and one owner.
    in_folder: bool,
    /// The owner and group of the first entry of the directory.
    owner: Option<(u32, u32)>,
    /// Files with several names, by device and inode.
    linked: HashSet<(u64, u64)>,
    /// The device whose filesystem was found to have no extended attributes.
    without_xattrs: Option<u64>,
    names: Vec<u8>,
    /// The entry whose attributes are not listed yet.
    pending: Option<Pending>,
}

#[derive(Debug)]
struct Pending {
    path: String,
    full: PathBuf,
    device: u64,
    /// Whether attributes of users are part of the artifact; not those of the root directory.
    is_kept: bool,
}

impl Lost {
    /// For a single file.
    pub(super) fn of_file(path: &str, full: &Path, meta: &Metadata, keeps: Keeps) -> Self {
        let mut lost = Self {
            omitted: Omitted::default(),
            keeps,
            in_folder: false,
            owner: None,
            linked: HashSet::new(),
            without_xattrs: None,
            names: vec![0; NAMES_BYTES],
            pending: None,
        };
        lost.note(path, full, meta);
        lost.finish_pending();
        lost
    }

    /// For a directory.
    pub(super) fn of_folder(root: &Path, meta: &Metadata, keeps: Keeps) -> Self {
        Self {
            in_folder: true,
            ..Self::of_file(".", root, meta, keeps)
        }
    }

    pub(super) fn omitted(&self) -> &Omitted {
        &self.omitted
    }

    /// Counts the properties of an entry at `path` in the directory. Its extended attributes are
    /// counted by [`Lost::opened`] or [`Lost::settle`].
    pub(super) fn note(&mut self, path: &str, full: &Path, meta: &Metadata) {
        self.finish_pending();
        if meta.is_symlink() {
            return;
        }
        if meta.is_file() {
            // Every file has a modification time, so an example has no value.
            if !self.keeps.times {
                self.omitted.add_many(Category::Times, 1, []);
            }
            self.note_links(path, meta);
        }
        let bits = meta.permissions().mode() & 0o7777;
        if bits & SPECIAL_BITS != 0 {
            self.add(Category::ModeBits, 1, || format!("{path}: mode {bits:04o}"));
        }
        if self.in_folder {
            let owner = (meta.uid(), meta.gid());
            let first = *self.owner.get_or_insert(owner);
            if owner != first {
                self.add(Category::Owners, 1, || {
                    format!(
                        "{path}: {}:{}, but the first entry has {}:{}",
                        owner.0, owner.1, first.0, first.1
                    )
                });
            }
        }
        if self.without_xattrs != Some(meta.dev()) {
            self.pending = Some(Pending {
                path: path.to_owned(),
                full: full.to_owned(),
                device: meta.dev(),
                is_kept: path != ".",
            });
        }
    }

    /// Counts the extended attributes of the last noted file, which is open now.
    pub(super) fn opened(&mut self, file: &File) {
        if let Some(pending) = self.pending.take() {
            self.note_xattrs(&pending, |names| rustix::fs::flistxattr(file, names));
        }
    }

    /// Counts the extended attributes of the last noted entry, if it was not opened.
    pub(super) fn finish_pending(&mut self) {
        if let Some(pending) = self.pending.take() {
            self.note_xattrs(&pending, |names| {
                rustix::fs::llistxattr(&pending.full, names)
            });
        }
    }

    fn add(&mut self, what: Category, count: u64, example: impl FnOnce() -> String) {
        let example = self.omitted.wants_example(what).then(example);
        self.omitted.add_many(what, count, example);
    }

    /// The first name of a file in the tree is not counted: its other names may be outside the
    /// tree.
    fn note_links(&mut self, path: &str, meta: &Metadata) {
        if meta.nlink() < 2 || !self.in_folder || self.keeps.hard_links {
            return;
        }
        let file = (meta.dev(), meta.ino());
        let is_first = if self.linked.len() < HARD_LINKED_FILES_KEPT_MAX {
            self.linked.insert(file)
        } else {
            false // too many to track: count one too many rather than one too few
        };
        if !is_first {
            self.add(Category::HardLinks, 1, || path.to_owned());
        }
    }

    fn note_xattrs(&mut self, of: &Pending, list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) {
        let path = &of.path;
        let mut listed = list(&mut self.names);
        if listed == Err(Errno::RANGE) && self.names.len() < XATTR_NAMES_BYTES_MAX {
            self.names.resize(XATTR_NAMES_BYTES_MAX, 0);
            listed = list(&mut self.names);
        }
        match listed {
            Ok(0) | Err(Errno::NOENT) => {}
            Ok(len) => {
                let list = self.names.get(..len).unwrap_or_default();
                let names: Vec<_> = list
                    .split(|byte| *byte == 0)
                    .filter(|name| !name.is_empty() && !is_system_xattr(name))
                    .filter(|name| !(self.keeps.xattrs && of.is_kept && is_of_users(name)))
                    .collect();
                let count = names.len() as u64;
                let example = || {
                    let names: Vec<_> = names
                        .iter()
                        .map(|name| String::from_utf8_lossy(name))
                        .collect();
                    format!("{path}: {}", names.join(", "))
                };
                // Not with `add`, which would borrow the names a second time.
                let example = self.omitted.wants_example(Category::Xattrs).then(example);
                self.omitted.add_many(Category::Xattrs, count, example);
            }
            Err(Errno::NOTSUP) => self.without_xattrs = Some(of.device),
            Err(error) => self.add(Category::Xattrs, 1, || {
                format!("{path}: its extended attributes cannot be listed: {error}")
            }),
        }
    }
}

fn is_of_users(name: &[u8]) -> bool {
    name.starts_with(XATTR_PREFIX.as_bytes())
}

fn is_system_xattr(name: &[u8]) -> bool {
    SYSTEM_XATTRS.iter().any(|known| known.as_bytes() == name)
        || SYSTEM_XATTR_PREFIXES
            .iter()
            .any(|prefix| name.starts_with(prefix.as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{chown, symlink};
    use std::path::PathBuf;

    use rustix::fs::XattrFlags;

    use super::super::{FilesOptions, FilesSource};
    use super::*;
    use crate::{Content, Source, SourceBody};

    fn set(path: &Path, name: &str) {
        rustix::fs::setxattr(path, name, b"v", XattrFlags::empty())
            .expect("the temporary folder is on a filesystem with user attributes");
    }

    fn put(path: &Path) {
        use std::io::Write;
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        File::create(path).unwrap().write_all(b"content").unwrap();
    }

    /// The omissions, counted before the content is read, while it is read, and without reading it.
    /// All must be equal.
    fn lost(path: &Path) -> Omitted {
        let mut first = FilesSource::open_for(
            path,
            &FilesOptions {
                count_first: true,
                ..FilesOptions::default()
            },
        )
        .unwrap();
        let mut source = FilesSource::open(path).unwrap();
        while let Some(entry) = source.next().unwrap() {
            if let SourceBody::File {
                content: Content::File(file),
                ..
            } = entry.body
            {
                source.opened(&File::open(file).unwrap()).unwrap();
            }
        }
        assert_eq!(first.omitted(), source.omitted());
        while first.next().unwrap().is_some() {}
        assert_eq!(
            first.omitted(),
            source.omitted(),
            "no item is counted twice"
        );
        source.omitted()
    }

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("set");
        for name in ["a", "b", "sub/c"] {
            put(&root.join(name));
        }
        (dir, root)
    }

    fn examples(omitted: &Omitted, what: Category) -> Vec<String> {
        omitted
            .list()
            .into_iter()
            .find(|omission| omission.what == what)
            .map(|omission| omission.examples)
            .unwrap_or_default()
    }

    #[test]
    fn a_plain_directory_loses_only_times() {
        let (_dir, root) = folder();
        symlink("a", root.join("link")).unwrap();
        let omitted = lost(&root);
        assert_eq!(omitted.list().len(), 1, "{omitted:?}");
        assert_eq!(
            (
                omitted.count(Category::Times),
                examples(&omitted, Category::Times).len()
            ),
            (3, 0)
        );
        assert_eq!(lost(&root.join("a")).count(Category::Times), 1);
    }

    #[test]
    fn each_additional_name_of_a_file_is_a_hard_link() {
        let (dir, root) = folder();
        fs::hard_link(root.join("a"), root.join("a2")).unwrap();
        fs::hard_link(root.join("a"), root.join("sub/a3")).unwrap();
        fs::hard_link(root.join("b"), dir.path().join("outside")).unwrap();
        let omitted = lost(&root);
        assert_eq!(omitted.count(Category::HardLinks), 2);
        assert_eq!(examples(&omitted, Category::HardLinks), ["a2", "sub/a3"]);
        assert_eq!(
            lost(&root.join("b")).count(Category::HardLinks),
            0,
            "a single file has one name"
        );
    }

    #[test]
    fn extended_attributes_count_except_those_of_the_system() {
        let (_dir, root) = folder();
        set(&root.join("a"), "user.origin");
        set(&root.join("a"), "user.checked");
        set(&root.join("sub"), "user.k");
        set(&root, "user.root");
        let omitted = lost(&root);
        assert_eq!(omitted.count(Category::Xattrs), 4);
        let found = examples(&omitted, Category::Xattrs);
        assert_eq!(
            (found[0].as_str(), found[2].as_str()),
            (".: user.root", "sub: user.k")
        );
        assert!(
            found[1].starts_with("a: ")
                && found[1].contains("user.origin")
                && found[1].contains("user.checked"),
            "{found:?}"
        );
        // More names than the usual buffer holds.
        for n in 0..8 {
            set(&root.join("b"), &format!("user.{n}{}", "x".repeat(180)));
        }
        assert_eq!(lost(&root).count(Category::Xattrs), 12);
        for (name, of_the_system) in [
            ("security.selinux", true),
            ("system.nfs4_acl", true),
            ("trusted.overlay.opaque", true),
            ("system.posix_acl_access", false),
            ("security.capability", false),
            ("security.selinux2", false),
            ("user.nfs4", false),
        ] {
            assert_eq!(is_system_xattr(name.as_bytes()), of_the_system, "{name}");
        }
    }

    #[test]
    fn special_bits_and_other_owners_count() {
        let (_dir, root) = folder();
        fs::set_permissions(root.join("a"), fs::Permissions::from_mode(0o4755)).unwrap();
        fs::set_permissions(root.join("sub"), fs::Permissions::from_mode(0o1777)).unwrap();
        let omitted = lost(&root);
        assert_eq!(
            examples(&omitted, Category::ModeBits),
            ["a: mode 4755", "sub: mode 1777"]
        );
        assert_eq!(omitted.count(Category::Owners), 0);
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root gives files away");
            return;
        }
        chown(root.join("sub/c"), Some(12345), None).unwrap();
        let omitted = lost(&root);
        assert_eq!(omitted.count(Category::Owners), 1);
        assert!(
            examples(&omitted, Category::Owners)[0].starts_with("sub/c: 12345:"),
            "{omitted:?}"
        );
        for path in ["a", "b", "sub"] {
            chown(root.join(path), Some(12345), None).unwrap();
        }
        assert_eq!(
            lost(&root).count(Category::Owners),
            0,
            "the same owner for all entries is not counted"
        );
    }
}

//! Reads what an artifact contains of a file or directory beside its name and content: the
//! modification time, and if the user asks for them the extended attributes of users and hard links.

use std::collections::HashMap;
use std::fs::Metadata;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{lgetxattr, llistxattr};
use rustix::io::Errno;

use base::fault::Fault;
use base::limits::{HARD_LINK_BYTES_MAX, XATTR_NAMES_BYTES_MAX, XATTRS_BYTES_MAX};
use base::names::RelPath;
use content::manifest::{Attributes, FileTime, XATTR_PREFIX, Xattr};

/// What an artifact contains.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Keeps {
    pub(super) times: bool,
    pub(super) xattrs: bool,
    pub(super) hard_links: bool,
}

/// Reads the attributes of the entries of one publish.
#[derive(Debug)]
pub(super) struct Kept {
    keeps: Keeps,
    /// The first names of files with several names, by device and inode.
    first_names: HashMap<(u64, u64), First>,
    /// Their memory in bytes.
    bytes: usize,
}

#[derive(Debug)]
struct First {
    path: RelPath,
    /// The size and the modification time.
    state: (u64, i64, i64),
}

impl Kept {
    pub(super) fn new(keeps: Keeps) -> Self {
        Self {
            keeps,
            first_names: HashMap::new(),
            bytes: 0,
        }
    }

    /// The attributes of a single file.
    pub(super) fn of_file(&mut self, full: &Path, meta: &Metadata) -> Result<Attributes, Fault> {
        let mut attributes = Attributes::default();
        if self.keeps.times && meta.is_file() {
            attributes.modified = FileTime::new(meta.mtime(), meta.mtime_nsec());
        }
        if self.keeps.xattrs && !meta.is_symlink() {
            attributes.xattrs = xattrs(full)?;
        }
        Ok(attributes)
    }

    /// The attributes of an entry of a directory.
    pub(super) fn of(
        &mut self,
        path: &RelPath,
        full: &Path,
        meta: &Metadata,
    ) -> Result<Attributes, Fault> {
        let mut attributes = self.of_file(full, meta)?;
        if self.keeps.hard_links && meta.is_file() && meta.nlink() > 1 {
            attributes.hard_link = self.first_name(path, meta);
        }
        Ok(attributes)
    }

    fn first_name(&mut self, path: &RelPath, meta: &Metadata) -> Option<RelPath> {
        let id = (meta.dev(), meta.ino());
        let state = (meta.len(), meta.mtime(), meta.mtime_nsec());
        if let Some(first) = self.first_names.get(&id) {
            // Written to since the first name was read: the contents differ.
            return (first.state == state).then(|| first.path.clone());
        }
        let cost = path.as_str().len() + size_of::<((u64, u64), First)>();
        if self.bytes + cost <= HARD_LINK_BYTES_MAX {
            self.bytes += cost;
            let path = path.clone();
            self.first_names.insert(id, First { path, state });
        }
        None
    }
}

/// The extended attributes of users.
fn xattrs(full: &Path) -> Result<Vec<Xattr>, Fault> {
    let shown = full.display();
    let mut names = vec![0; XATTR_NAMES_BYTES_MAX];
    let len = match llistxattr(full, &mut names) {
        Ok(len) => len,
        Err(Errno::NOTSUP | Errno::NOENT) => return Ok(Vec::new()),
        Err(error) => {
            let what = format!("list the extended attributes of {shown}");
            return Err(Fault::io(what, &error.into()));
        }
    };
    let mut names: Vec<&[u8]> = names[..len]
        .split(|byte| *byte == 0)
        .filter(|name| name.starts_with(XATTR_PREFIX.as_bytes()))
        .collect();
    names.sort_unstable();
    let refuse = |name: &[u8], why: &str| {
        Fault::integrity(format!(
            "the extended attribute {:?} of {shown} cannot be published: {why}",
            String::from_utf8_lossy(name)
        ))
        .with_next("remove that attribute, or publish without --xattrs")
    };
    let (mut list, mut bytes) = (Vec::new(), 0);
    for name in names {
        // The size limit of Linux.
        let mut value = vec![0; XATTR_NAMES_BYTES_MAX];
        let len = match lgetxattr(full, std::ffi::OsStr::from_bytes(name), &mut value) {
            Ok(len) => len,
            // Removed in the meantime.
            Err(Errno::NODATA | Errno::NOENT) => continue,
            Err(error) => return Err(refuse(name, &std::io::Error::from(error).to_string())),
        };
        let text = std::str::from_utf8(name).map_err(|_| refuse(name, "its name is not UTF-8"))?;
        let xattr = Xattr::new(text, &value[..len]).map_err(|why| refuse(name, &why))?;
        bytes += name.len() + len;
        if bytes > XATTRS_BYTES_MAX {
            let why = format!("the attributes of one entry have at most {XATTRS_BYTES_MAX} bytes");
            return Err(refuse(name, &why));
        }
        list.push(xattr);
    }
    Ok(list)
}

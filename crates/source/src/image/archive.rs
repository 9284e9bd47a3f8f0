//! An index of the members of a tar, so that nothing needs to be unpacked.
//!
//! Only [`super::holder`] uses it. Every header is read and checked before its name is used.
//! Members that leave the archive, links that form a loop or leave the archive, and truncated
//! archives are rejected with the name of the member. Of members with one name the last counts, as
//! when an archive is unpacked. An archive may end behind a member, without the blocks of zeros.
//! Headers are read directly instead of with `tar::Archive`, which reads a long name of any length
//! into memory. Only reads, except that a sparse member becomes a file in the scratch directory.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tar::{EntryType, Header, PaxExtensions};

use super::decompress::Caps;
use super::{refuse, sparse};
use crate::FileIdentity;
use crate::own::{self, Own};
use base::durable;
use base::fault::{Fault, IoContext};
use base::limits::{ARCHIVE_HEADER_BYTES_MAX, ARCHIVE_MEMBERS_MAX, ARCHIVE_NAMES_BYTES_MAX};

/// The block size of a tar, in bytes.
const BLOCK: u64 = 512;
/// The number of links that are followed to find a member before they count as a loop.
const HOPS_MAX: usize = 40;
/// Names at the top of an image archive; one without them is none.
const OF_IMAGES: [&str; 4] = ["manifest.json", "index.json", "oci-layout", "repositories"];
/// Directories at the top of a root filesystem.
const OF_ROOT_FILESYSTEMS: [&str; 6] = ["bin", "etc", "lib", "sbin", "usr", "var"];

/// The positions of the members of a tar.
#[derive(Debug)]
pub(super) struct TarIndex {
    pub(super) file: Arc<PathBuf>,
    /// The identity of the file before its first header was read.
    pub(super) identity: FileIdentity,
    members: BTreeMap<String, Member>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Member {
    File(Extent),
    /// A sparse member, which was written to this file of this size.
    Expanded(PathBuf, u64),
    /// A symbolic or hard link; its target as a name in the archive.
    Link(String),
    Dir,
}

/// The position of a member's bytes in the tar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) size: u64,
}

/// Where the bytes of a found member are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place<'a> {
    Archive(Extent),
    /// A file in the scratch directory, of this size.
    Scratch(&'a Path, u64),
}

/// The extended headers of the next member.
#[derive(Debug, Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    sparse: sparse::Extended,
}

impl TarIndex {
    /// Reads every header of the tar at `path`. Messages show `shown` instead, because `path` may
    /// be an internal decompressed copy. Sparse members are written to `scratch`. `own`: the files that
    /// are never read; `None` for the copy.
    pub(super) fn open(
        path: &Path,
        shown: &Path,
        scratch: &Path,
        caps: Caps,
        own: Option<&Own>,
    ) -> Result<Self, Fault> {
        let file = durable::open_regular(path).at(format_args!("open {}", path.display()))?;
        if let Some(own) = own {
            own.check_opened(&file)
                .map_err(|error| own::fault(path, &error))?;
        }
        let meta = file
            .metadata()
            .at(format_args!("read {}", path.display()))?;
        let name = Arc::new(path.to_path_buf());
        let identity = FileIdentity::new(Arc::clone(&name), &meta);
        let mut scan = Scan {
            file,
            len: meta.len(),
            shown,
            scratch,
            caps,
            members: BTreeMap::new(),
            names_bytes: 0,
            expanded: 0,
            refused: None,
        };
        scan.run()?;
        let index = Self {
            file: name,
            identity,
            members: scan.members,
        };
        for (name, member) in &index.members {
            if matches!(member, Member::Link(_)) {
                index.follow(name).map_err(|why| refuse(shown, name, why))?;
            }
        }
        Ok(index)
    }

    /// The member with this name, after following links; `None` if there is none or it is a
    /// directory.
    pub(super) fn find(&self, name: &str) -> Option<Place<'_>> {
        self.follow(&normalize(name.as_bytes()).ok()?)
            .ok()
            .flatten()
    }

    /// The directory that contains all members, if there is one. Such an archive was created one
    /// level too high.
    pub(super) fn only_folder(&self) -> Option<&str> {
        let first = self.members.keys().next()?.split('/').next()?;
        self.members
            .keys()
            .all(|name| name.split('/').next() == Some(first))
            .then_some(first)
    }

    fn follow(&self, name: &str) -> Result<Option<Place<'_>>, String> {
        let mut at = name;
        for _ in 0..HOPS_MAX {
            match self.members.get(at) {
                Some(Member::File(extent)) => return Ok(Some(Place::Archive(*extent))),
                Some(Member::Expanded(file, size)) => {
                    return Ok(Some(Place::Scratch(file, *size)));
                }
                Some(Member::Link(target)) => at = target,
                Some(Member::Dir) | None => return Ok(None),
            }
        }
        Err("the links form a loop".into())
    }
}

struct Scan<'a> {
    file: File,
    len: u64,
    shown: &'a Path,
    scratch: &'a Path,
    caps: Caps,
    members: BTreeMap<String, Member>,
    names_bytes: usize,
    /// The number of sparse members.
    expanded: usize,
    /// Why the first member is refused that an image archive may not have.
    refused: Option<Fault>,
}

impl Scan<'_> {
    fn run(&mut self) -> Result<(), Fault> {
        let scanned = self.headers();
        if self.is_root_filesystem() {
            return Err(refuse(
                self.shown,
                "the archive",
                "it is the root filesystem of a container (docker export), not an image",
            )
            .with_next("create the archive with docker save IMAGE, then publish it"));
        }
        scanned?;
        self.refused.take().map_or(Ok(()), Err)
    }

    /// Whether the members are those of `docker export`.
    fn is_root_filesystem(&self) -> bool {
        let has = |name: &str| {
            let below = format!("{name}/");
            let from = self.members.range(below.clone()..).next();
            self.members.contains_key(name) || from.is_some_and(|(n, _)| n.starts_with(&below))
        };
        let of_root = OF_ROOT_FILESYSTEMS.iter().filter(|name| has(name));
        of_root.count() >= 2 && !OF_IMAGES.iter().any(|name| has(name))
    }

    fn headers(&mut self) -> Result<(), Fault> {
        let mut position = 0;
        let mut extended = Extended::default();
        loop {
            // Writers may leave out the blocks that end an archive.
            let is_at_end = position == self.len && position > 0 && extended.is_empty();
            let Some(header) = (match is_at_end {
                true => None,
                false => self.header(position)?,
            }) else {
                return Ok(());
            };
            let kind = header.entry_type();
            let shown_name =
                String::from_utf8_lossy(extended.path.as_deref().unwrap_or(&header.path_bytes()))
                    .into_owned();
            let mut size = header.entry_size().map_err(|e| {
                refuse(
                    self.shown,
                    &shown_name,
                    format!("its header is damaged: {e}"),
                )
            })?;
            let mut data = position + BLOCK;
            if is_extension(kind) {
                let bytes = self.extension(&shown_name, data, size)?;
                extended
                    .take(kind, &bytes)
                    .map_err(|why| refuse(self.shown, &shown_name, why))?;
            } else {
                let mut extended = std::mem::take(&mut extended);
                let content;
                (content, data, size) =
                    self.content(&header, &shown_name, &mut extended, data, size)?;
                if let Err(fault) = self.member(&header, extended, content) {
                    self.refused.get_or_insert(fault);
                }
                self.check_count(&shown_name)?;
            }
            position = size
                .div_ceil(BLOCK)
                .checked_mul(BLOCK)
                .and_then(|padded| data.checked_add(padded))
                .ok_or_else(|| refuse(self.shown, &shown_name, "its size is invalid"))?;
        }
    }

    /// The content of a member, and where its bytes are in the archive.
    fn content(
        &mut self,
        header: &Header,
        name: &str,
        extended: &mut Extended,
        mut data: u64,
        size: u64,
    ) -> Result<(Member, u64, u64), Fault> {
        let kind = header.entry_type();
        let refused = |why: String| refuse(self.shown, name, why);
        let (size, map) = match header.as_gnu() {
            Some(gnu) if kind.is_gnu_sparse() => {
                let (map, behind) =
                    sparse::Map::of_header(gnu, &self.file, data).map_err(refused)?;
                data = behind;
                (extended.size.unwrap_or(size), Some(map))
            }
            _ if kind.is_file() || kind.is_contiguous() => (extended.size.unwrap_or(size), None),
            _ => (0, None),
        };
        self.check_end(name, data, size)?;
        let whole = Extent { offset: data, size };
        let sparse = match map {
            Some(map) => Some((map, whole)),
            None => {
                let sparse = std::mem::take(&mut extended.sparse);
                let own = sparse.name.clone();
                let map = sparse.map(&self.file, whole).map_err(refused)?;
                if let (Some(_), Some(own)) = (&map, own) {
                    extended.path = Some(own);
                }
                map
            }
        };
        let Some((map, of_map)) = sparse else {
            return Ok((Member::File(whole), data, size));
        };
        map.check(of_map.size, self.caps).map_err(refused)?;
        let file = self.scratch.join(format!("sparse-{}", self.expanded));
        self.expanded += 1;
        let expanded = map.expand(&self.file, of_map, &file)?;
        Ok((Member::Expanded(file, expanded), data, size))
    }

    fn check_count(&self, name: &str) -> Result<(), Fault> {
        if self.members.len() <= ARCHIVE_MEMBERS_MAX && self.names_bytes <= ARCHIVE_NAMES_BYTES_MAX
        {
            return Ok(());
        }
        let why = format!(
            "the archive has more than {ARCHIVE_MEMBERS_MAX} members or too many bytes of names"
        );
        Err(refuse(self.shown, name, why))
    }

    /// The header at `pos`; `None` at the block of zeros that ends an archive.
    fn header(&self, position: u64) -> Result<Option<Header>, Fault> {
        if position.saturating_add(BLOCK) > self.len {
            let why = format!(
                "it is truncated: it ends at byte {} without an end-of-archive block",
                self.len
            );
            return Err(refuse(self.shown, "the archive", why));
        }
        let mut block = [0; BLOCK as usize];
        self.file
            .read_exact_at(&mut block, position)
            .at(format_args!("read {}", self.shown.display()))?;
        if block.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let header = Header::from_byte_slice(&block).clone();
        // The checksum field itself (bytes 148 to 155) counts as spaces.
        let sum: u32 = block
            .iter()
            .enumerate()
            .map(|(i, b)| {
                if (148..156).contains(&i) {
                    32
                } else {
                    u32::from(*b)
                }
            })
            .sum();
        if header.cksum().ok() != Some(sum) {
            let why = if position == 0 {
                "it is not a tar archive".into()
            } else {
                format!("it is damaged: the header at byte {position} has a wrong checksum")
            };
            return Err(refuse(self.shown, "the archive", why));
        }
        Ok(Some(header))
    }

    fn check_end(&self, name: &str, data: u64, size: u64) -> Result<(), Fault> {
        if data.checked_add(size).is_some_and(|end| end <= self.len) {
            return Ok(());
        }
        let why = format!(
            "the archive is truncated: this member has {size} bytes, but only {} exist",
            self.len.saturating_sub(data)
        );
        Err(refuse(self.shown, name, why))
    }

    fn extension(&self, name: &str, data: u64, size: u64) -> Result<Vec<u8>, Fault> {
        if size > ARCHIVE_HEADER_BYTES_MAX {
            return Err(refuse(
                self.shown,
                name,
                format!("its extended header is larger than {ARCHIVE_HEADER_BYTES_MAX} bytes"),
            ));
        }
        self.check_end(name, data, size)?;
        let mut bytes = vec![0; size as usize];
        self.file
            .read_exact_at(&mut bytes, data)
            .at(format_args!("read {}", self.shown.display()))?;
        Ok(bytes)
    }

    /// Adds a member. A fault says why an image archive may not have it.
    fn member(
        &mut self,
        header: &Header,
        extended: Extended,
        content: Member,
    ) -> Result<(), Fault> {
        let kind = header.entry_type();
        let raw = extended
            .path
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let shown_name = String::from_utf8_lossy(&raw).into_owned();
        let refused = |why: String| refuse(self.shown, &shown_name, why);
        let name = normalize(&raw).map_err(&refused)?;
        let target = extended
            .link
            .or_else(|| header.link_name_bytes().map(|l| l.into_owned()))
            .unwrap_or_default();
        let member = if kind.is_file() || kind.is_contiguous() || kind.is_gnu_sparse() {
            content
        } else if kind.is_dir() {
            Member::Dir
        } else if kind.is_hard_link() {
            Member::Link(
                normalize(&target)
                    .map_err(|why| refused(format!("it links to an invalid name: {why}")))?,
            )
        } else if kind.is_symlink() {
            Member::Link(resolve(&name, &target).map_err(&refused)?)
        } else {
            return Err(refused(
                "it is neither a file nor a directory nor a link".into(),
            ));
        };
        if name.is_empty() {
            return if member == Member::Dir {
                Ok(())
            } else {
                Err(refused("it has no name".into()))
            };
        }
        let bytes = name.len();
        if self.members.insert(name, member).is_none() {
            self.names_bytes += bytes;
        }
        Ok(())
    }
}

fn is_extension(kind: EntryType) -> bool {
    kind.is_gnu_longname()
        || kind.is_gnu_longlink()
        || kind.is_pax_local_extensions()
        || kind.is_pax_global_extensions()
}

impl Extended {
    /// Whether they say nothing.
    fn is_empty(&self) -> bool {
        self.path.is_none() && self.link.is_none() && self.size.is_none() && self.sparse.is_empty()
    }

    fn take(&mut self, kind: EntryType, bytes: &[u8]) -> Result<(), String> {
        let text = || bytes.split(|b| *b == 0).next().unwrap_or_default().to_vec();
        if kind.is_gnu_longname() {
            self.path = Some(text());
        } else if kind.is_gnu_longlink() {
            self.link = Some(text());
        } else if kind.is_pax_local_extensions() {
            for record in PaxExtensions::new(bytes) {
                let record = record.map_err(|e| format!("its extended header is damaged: {e}"))?;
                match record.key_bytes() {
                    b"path" => self.path = Some(record.value_bytes().to_vec()),
                    b"linkpath" => self.link = Some(record.value_bytes().to_vec()),
                    b"size" => {
                        let size = record.value().ok().and_then(|v| v.parse().ok());
                        self.size =
                            Some(size.ok_or("the size in its extended header is not a number")?);
                    }
                    key => {
                        if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                            self.sparse.take(key, record.value_bytes())?;
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// The name of a member without `.` and empty components; empty for the top directory.
fn normalize(raw: &[u8]) -> Result<String, String> {
    let text = std::str::from_utf8(raw).map_err(|_| "its name is not UTF-8")?;
    if text.starts_with('/') {
        return Err("its name is absolute".into());
    }
    let mut parts = Vec::new();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => return Err("its name contains '..'".into()),
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}

/// Resolves the target of a symbolic link by its text.
fn resolve(name: &str, target: &[u8]) -> Result<String, String> {
    let text = std::str::from_utf8(target).map_err(|_| "it links to a name that is not UTF-8")?;
    if text.starts_with('/') {
        return Err(format!("its link target {text:?} is outside the archive"));
    }
    let mut parts: Vec<&str> = name.split('/').collect();
    parts.pop();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts
                    .pop()
                    .ok_or_else(|| format!("its link target {text:?} is outside the archive"))?;
            }
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}

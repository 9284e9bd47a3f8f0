//! An index of the members of a tar, so that nothing needs to be unpacked.
//!
//! Only [`super::holder`] uses it. Every header is read and checked before its name is used.
//! Members that leave the archive, links that form a loop or leave the archive, repeated names with
//! different content, and truncated archives are rejected with the name of the member. Headers are
//! read directly instead of with `tar::Archive`, which reads a long name of any length into memory.
//! Only reads, so a crash leaves nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tar::{EntryType, Header, PaxExtensions};

use super::refuse;
use crate::FileIdentity;
use crate::own::{self, Own};
use base::durable;
use base::fault::{Fault, IoContext};
use base::limits::{ARCHIVE_HEADER_BYTES_MAX, ARCHIVE_MEMBERS_MAX, ARCHIVE_NAMES_BYTES_MAX};

/// The block size of a tar, in bytes.
const BLOCK: u64 = 512;
/// The number of links that are followed to find a member before they count as a loop.
const HOPS_MAX: usize = 40;

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

/// The extended headers of the next member.
#[derive(Debug, Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

impl TarIndex {
    /// Reads every header of the tar at `path`. Messages show `shown` instead, because `path` may
    /// be an internal decompressed copy.
    pub(super) fn open(path: &Path, shown: &Path, own: Option<&Own>) -> Result<Self, Fault> {
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
            members: BTreeMap::new(),
            names_bytes: 0,
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
    pub(super) fn find(&self, name: &str) -> Option<Extent> {
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

    fn follow<'a>(&'a self, name: &'a str) -> Result<Option<Extent>, String> {
        let mut at = name;
        for _ in 0..HOPS_MAX {
            match self.members.get(at) {
                Some(Member::File(extent)) => return Ok(Some(*extent)),
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
    members: BTreeMap<String, Member>,
    names_bytes: usize,
}

impl Scan<'_> {
    fn run(&mut self) -> Result<(), Fault> {
        let mut position = 0;
        let mut extended = Extended::default();
        loop {
            let Some(header) = self.header(position)? else {
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
            let data = position + BLOCK;
            if is_extension(kind) {
                let bytes = self.extension(&shown_name, data, size)?;
                extended
                    .take(kind, &bytes)
                    .map_err(|why| refuse(self.shown, &shown_name, why))?;
            } else {
                let extended = std::mem::take(&mut extended);
                size = if kind.is_file() || kind.is_contiguous() {
                    extended.size.unwrap_or(size)
                } else {
                    0
                };
                self.check_end(&shown_name, data, size)?;
                self.member(&header, extended, Extent { offset: data, size })?;
            }
            position = size
                .div_ceil(BLOCK)
                .checked_mul(BLOCK)
                .and_then(|padded| data.checked_add(padded))
                .ok_or_else(|| refuse(self.shown, &shown_name, "its size is invalid"))?;
        }
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

    fn member(&mut self, header: &Header, extended: Extended, extent: Extent) -> Result<(), Fault> {
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
        let member = if kind.is_file() || kind.is_contiguous() {
            Member::File(extent)
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
        if let Some(existing) = self.members.get(&name) {
            if !self.has_same_content(existing, &member)? {
                return Err(refused(
                    "the archive contains this name twice with different content".into(),
                ));
            }
            return Ok(());
        }
        self.names_bytes += name.len();
        if self.members.len() >= ARCHIVE_MEMBERS_MAX || self.names_bytes > ARCHIVE_NAMES_BYTES_MAX {
            let why = format!(
                "the archive has more than {ARCHIVE_MEMBERS_MAX} members or too many bytes of names"
            );
            return Err(refused(why));
        }
        self.members.insert(name, member);
        Ok(())
    }

    fn has_same_content(&self, a: &Member, b: &Member) -> Result<bool, Fault> {
        let (Member::File(a), Member::File(b)) = (a, b) else {
            return Ok(a == b);
        };
        if a.size != b.size {
            return Ok(false);
        }
        let (mut left, mut right) = (vec![0; 64 << 10], vec![0; 64 << 10]);
        let mut done = 0;
        while done < a.size {
            let n = (a.size - done).min(left.len() as u64) as usize;
            for (buffer, extent) in [(&mut left, a), (&mut right, b)] {
                self.file
                    .read_exact_at(&mut buffer[..n], extent.offset + done)
                    .at(format_args!("read {}", self.shown.display()))?;
            }
            if left[..n] != right[..n] {
                return Ok(false);
            }
            done += n as u64;
        }
        Ok(true)
    }
}

fn is_extension(kind: EntryType) -> bool {
    kind.is_gnu_longname()
        || kind.is_gnu_longlink()
        || kind.is_pax_local_extensions()
        || kind.is_pax_global_extensions()
}

impl Extended {
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
                    key if key.starts_with(b"GNU.sparse.") => {
                        return Err(
                            "it is a sparse file, which is not allowed in an image archive".into(),
                        );
                    }
                    _ => {}
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

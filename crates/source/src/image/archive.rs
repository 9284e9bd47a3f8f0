//! An index of a tar's members: what lies where, so that nothing is ever unpacked.
//!
//! Used by [`super::holder`] alone. Every header is read here and checked before its name is
//! believed: members that leave the archive, links that go round or out, names that come twice with
//! other content, and an archive that ends too early are refused, each by name. Header by header
//! instead of with `tar::Archive`, because that reads a long name of any length into memory. Reads
//! only, so a crash leaves nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tar::{EntryType, Header, PaxExtensions};

use super::refuse;
use crate::FileIdentity;
use base::durable;
use base::fault::{Fault, IoContext};
use base::limits::{ARCHIVE_HEADER_BYTES_MAX, ARCHIVE_MEMBERS_MAX, ARCHIVE_NAMES_BYTES_MAX};

/// The unit of a tar, in bytes.
const BLOCK: u64 = 512;
/// The links followed to find a member before they are taken to go round.
const HOPS_MAX: usize = 40;

/// Where the members of a tar lie.
#[derive(Debug)]
pub(super) struct TarIndex {
    pub(super) file: Arc<PathBuf>,
    /// The file before its first header was read.
    pub(super) identity: FileIdentity,
    members: BTreeMap<String, Member>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Member {
    File(Extent),
    /// A symbolic or hard link, its target as a name in the archive.
    Link(String),
    Dir,
}

/// A member's bytes in the tar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) size: u64,
}

/// What extended headers say of the member that follows them.
#[derive(Debug, Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

impl TarIndex {
    /// Reads every header of the tar at `path`. `shown` stands for the archive in messages: `path`
    /// may be a decompressed copy that nobody knows.
    pub(super) fn open(path: &Path, shown: &Path) -> Result<Self, Fault> {
        let file = durable::open_regular(path).at(format_args!("open {}", path.display()))?;
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

    /// The member of this name, through links; `None` when there is none or it is a folder.
    pub(super) fn find(&self, name: &str) -> Option<Extent> {
        self.follow(&normal(name.as_bytes()).ok()?).ok().flatten()
    }

    /// The folder that all members lie in, when it is not the top: what a tar made one level too
    /// high has.
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
        Err("the link goes round in a circle".into())
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
        let mut pos = 0;
        let mut extended = Extended::default();
        loop {
            let Some(header) = self.header(pos)? else {
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
            let data = pos + BLOCK;
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
            pos = size
                .div_ceil(BLOCK)
                .checked_mul(BLOCK)
                .and_then(|padded| data.checked_add(padded))
                .ok_or_else(|| refuse(self.shown, &shown_name, "its size is absurd"))?;
        }
    }

    /// The header at `pos`; `None` at the block of zeros that ends an archive.
    fn header(&self, pos: u64) -> Result<Option<Header>, Fault> {
        if pos.saturating_add(BLOCK) > self.len {
            let why = format!(
                "it is truncated: it ends at byte {} without the block that ends an archive",
                self.len
            );
            return Err(refuse(self.shown, "the archive", why));
        }
        let mut block = [0; BLOCK as usize];
        self.file
            .read_exact_at(&mut block, pos)
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
            let why = if pos == 0 {
                "it is not a tar archive".into()
            } else {
                format!("it is damaged: the header at byte {pos} has a wrong checksum")
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
            "the archive is truncated: this member has {size} bytes and {} are there",
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
        let name = normal(&raw).map_err(&refused)?;
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
                normal(&target)
                    .map_err(|why| refused(format!("it links to a name that cannot be: {why}")))?,
            )
        } else if kind.is_symlink() {
            Member::Link(resolve(&name, &target).map_err(&refused)?)
        } else {
            return Err(refused("it is neither a file, a folder nor a link".into()));
        };
        if name.is_empty() {
            return if member == Member::Dir {
                Ok(())
            } else {
                Err(refused("it has no name".into()))
            };
        }
        if let Some(earlier) = self.members.get(&name) {
            if !self.same(earlier, &member)? {
                return Err(refused(
                    "the archive has this name twice with different content".into(),
                ));
            }
            return Ok(());
        }
        self.names_bytes += name.len();
        if self.members.len() >= ARCHIVE_MEMBERS_MAX || self.names_bytes > ARCHIVE_NAMES_BYTES_MAX {
            let why = format!(
                "the archive has more than {ARCHIVE_MEMBERS_MAX} members, which no image archive has"
            );
            return Err(refused(why));
        }
        self.members.insert(name, member);
        Ok(())
    }

    fn same(&self, a: &Member, b: &Member) -> Result<bool, Fault> {
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
                        return Err("it is a sparse file, which no image archive has".into());
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// A member's name without `.` and empty components; empty for the top folder.
fn normal(raw: &[u8]) -> Result<String, String> {
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

/// The member that a symbolic link means, by its text.
fn resolve(name: &str, target: &[u8]) -> Result<String, String> {
    let text = std::str::from_utf8(target).map_err(|_| "it links to a name that is not UTF-8")?;
    if text.starts_with('/') {
        return Err(format!("it links to {text:?}, out of the archive"));
    }
    let mut parts: Vec<&str> = name.split('/').collect();
    parts.pop();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts
                    .pop()
                    .ok_or_else(|| format!("it links to {text:?}, out of the archive"))?;
            }
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}

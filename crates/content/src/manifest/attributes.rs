//! What an entry has beside its content: modification time, extended attributes, hard links.
//!
//! Only a manifest of format 2 contains them. They precede the record of their entry:
//!
//! ```text
//! record = 5 seconds nanoseconds        modification time of the next entry, a file; seconds are zigzag
//!        | 6 len name len value         extended attribute of the next entry, ascending by name
//!        | 7 len path                   the next entry is another name of this file
//! ```

use std::cmp::Ordering;
use std::time::{Duration, SystemTime};

use base::fault::Fault;
use base::limits::{XATTR_NAME_BYTES_MAX, XATTRS_BYTES_MAX};
use base::names::RelPath;

use super::page::{Reader, malformed, put_number};
use super::{Entry, EntryBody};

pub(super) const TIME: u8 = 5;
pub(super) const XATTR: u8 = 6;
pub(super) const HARD_LINK: u8 = 7;

/// The only attributes that are kept: those of users.
pub const XATTR_PREFIX: &str = "user.";
/// The largest distance from 1970 in seconds, about 8,700 years.
const SECONDS_MAX: i64 = 1 << 38;

/// The resolution of the coarsest filesystem (FAT).
const COARSEST: Duration = Duration::from_secs(2);

/// What an entry has beside its content.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    /// The modification time of a file.
    pub modified: Option<FileTime>,
    /// The extended attributes of a file or directory, ascending by name.
    pub xattrs: Vec<Xattr>,
    /// The earlier file of the artifact of which this file is another name.
    pub hard_link: Option<RelPath>,
}

/// A time of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileTime {
    /// Since 1970.
    seconds: i64,
    nanoseconds: u32,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    name: String,
    value: Vec<u8>,
}

impl FileTime {
    /// `None`: no filesystem has such a time.
    pub fn new(seconds: i64, nanoseconds: i64) -> Option<Self> {
        let nanoseconds = u32::try_from(nanoseconds).ok()?;
        (seconds.unsigned_abs() <= SECONDS_MAX as u64 && nanoseconds < 1_000_000_000).then_some(
            Self {
                seconds,
                nanoseconds,
            },
        )
    }

    /// Seconds since 1970, and nanoseconds.
    pub fn parts(&self) -> (i64, u32) {
        (self.seconds, self.nanoseconds)
    }

    /// Whether a filesystem that stores times coarsely may show this time as `other`.
    pub fn is_near(&self, other: SystemTime) -> bool {
        let own = self.system_time();
        let distance = own
            .duration_since(other)
            .or_else(|_| other.duration_since(own));
        distance.is_ok_and(|distance| distance <= COARSEST)
    }

    pub fn system_time(&self) -> SystemTime {
        let seconds = Duration::from_secs(self.seconds.unsigned_abs());
        let start = match self.seconds.cmp(&0) {
            Ordering::Less => SystemTime::UNIX_EPOCH - seconds,
            _ => SystemTime::UNIX_EPOCH + seconds,
        };
        start + Duration::from_nanos(u64::from(self.nanoseconds))
    }
}

impl Xattr {
    /// An attribute that a manifest can contain.
    pub fn new(name: &str, value: &[u8]) -> Result<Self, String> {
        if !name.starts_with(XATTR_PREFIX) || name.len() == XATTR_PREFIX.len() {
            return Err("it is not an attribute of users".into());
        }
        if name.len() > XATTR_NAME_BYTES_MAX || name.contains('\0') {
            return Err("its name is too long or contains a NUL".into());
        }
        Ok(Self {
            name: name.to_owned(),
            value: value.to_vec(),
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn value(&self) -> &[u8] {
        &self.value
    }

    fn cost(&self) -> usize {
        self.name.len() + self.value.len()
    }
}

impl Attributes {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The bytes of all extended attributes; at most [`XATTRS_BYTES_MAX`] are allowed.
    pub fn xattr_bytes(&self) -> usize {
        self.xattrs.iter().map(Xattr::cost).sum()
    }

    pub(super) fn write(&self, out: &mut Vec<u8>) {
        if let Some(time) = self.modified {
            out.push(TIME);
            put_number(out, zigzag(time.seconds));
            put_number(out, u64::from(time.nanoseconds));
        }
        for xattr in &self.xattrs {
            out.push(XATTR);
            put_bytes(out, xattr.name.as_bytes());
            put_bytes(out, &xattr.value);
        }
        if let Some(path) = &self.hard_link {
            out.push(HARD_LINK);
            put_bytes(out, path.as_str().as_bytes());
        }
    }

    /// Reads the record with this tag, which is one of this module.
    pub(super) fn read(&mut self, tag: u8, reader: &mut Reader<'_>) -> Result<(), Fault> {
        match tag {
            TIME if self.modified.is_none()
                && self.xattrs.is_empty()
                && self.hard_link.is_none() =>
            {
                let seconds = unzigzag(reader.number()?);
                let nanoseconds = i64::try_from(reader.number()?).unwrap_or(-1);
                let time = FileTime::new(seconds, nanoseconds);
                self.modified = Some(time.ok_or_else(|| malformed("a time is out of range"))?);
            }
            XATTR if self.hard_link.is_none() => {
                let name = std::str::from_utf8(reader.part()?)
                    .map_err(|_| malformed("the name of an attribute is not UTF-8"))?;
                let xattr = Xattr::new(name, reader.part()?)
                    .map_err(|why| malformed(&format!("an attribute: {why}")))?;
                let is_next = self.xattrs.last().is_none_or(|last| last.name < xattr.name);
                if !is_next || self.xattr_bytes() + xattr.cost() > XATTRS_BYTES_MAX {
                    return Err(malformed("its attributes are too large or out of order"));
                }
                self.xattrs.push(xattr);
            }
            HARD_LINK if self.hard_link.is_none() => {
                let path = std::str::from_utf8(reader.part()?)
                    .map_err(|_| malformed("the path of a hard link is not UTF-8"))?;
                self.hard_link = Some(path.parse().map_err(|e| malformed(&format!("{e}")))?);
            }
            _ => return Err(malformed("its attributes are out of order")),
        }
        Ok(())
    }
}

impl Entry {
    /// Why its attributes are not those of such an entry.
    pub(super) fn wrong_attributes(&self) -> Option<&'static str> {
        let Attributes {
            modified,
            xattrs,
            hard_link,
        } = &self.attributes;
        let is_file = matches!(self.body, EntryBody::File(_));
        if (modified.is_some() || hard_link.is_some()) && !is_file {
            return Some("has attributes of a file");
        }
        if !xattrs.is_empty() && matches!(self.body, EntryBody::Symlink(_)) {
            return Some("is a link with extended attributes");
        }
        hard_link
            .as_ref()
            .is_some_and(|first| *first >= self.path)
            .then_some("is a hard link to a later entry")
    }
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_number(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn zigzag(n: i64) -> u64 {
    ((n << 1) ^ (n >> 63)) as u64
}

fn unzigzag(n: u64) -> i64 {
    (n >> 1) as i64 ^ -((n & 1) as i64)
}

#[cfg(test)]
mod tests;

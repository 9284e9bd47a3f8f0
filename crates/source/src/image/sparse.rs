//! Sparse members of an archive (`tar --sparse`): the map of their data, and their content as a file
//! with holes in the scratch directory.
//!
//! Only [`super::archive`] uses it. GNU tar writes the map in one of four forms: in the header of the
//! member (`S`), in its extended headers (0.0 and 0.1), or before its data (1.0). A map is checked
//! before a byte is written: its parts are in order, inside the file, and as large as the data. The
//! file takes the room of its data only; after a crash, the next start removes it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use tar::{GnuExtSparseHeader, GnuHeader, GnuSparseHeader};

use super::archive::Extent;
use super::decompress::{BUFFER, Caps};
use base::fault::{Fault, IoContext};
use base::limits::{ARCHIVE_SPARSE_PARTS_MAX, SCRATCH_SPARE_BYTES};
use base::space::Reservation;

/// The block size of a tar, in bytes.
const BLOCK: u64 = 512;
/// The longest number of a map before the data.
const DIGITS_MAX: usize = 20;

/// Where the data of a sparse member is in its file, in order.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Map {
    parts: Vec<Extent>,
    /// The size of the file.
    size: u64,
}

impl Map {
    fn push(&mut self, offset: u64, size: u64) -> Result<(), String> {
        if self.parts.len() >= ARCHIVE_SPARSE_PARTS_MAX {
            return Err(format!(
                "it is a sparse file with more than {ARCHIVE_SPARSE_PARTS_MAX} parts"
            ));
        }
        self.parts.push(Extent { offset, size });
        Ok(())
    }

    /// Checks it against the number of bytes that the archive has of the member.
    pub(super) fn check(&self, stored: u64, caps: Caps) -> Result<(), String> {
        let (mut at, mut sum) = (0, 0u64);
        for part in &self.parts {
            let end = part.offset.checked_add(part.size);
            let Some(end) = end.filter(|end| part.offset >= at && *end <= self.size) else {
                return Err("the map of its holes is invalid".into());
            };
            (at, sum) = (end, sum.saturating_add(part.size));
        }
        if sum != stored {
            return Err(format!(
                "the map of its holes states {sum} bytes of data, but it has {stored}"
            ));
        }
        if self.size > caps.bytes && self.size / caps.ratio > stored {
            return Err(format!(
                "it is a sparse file of {} bytes with {stored} bytes of data, more than the allowed {} (image_unpacked in [limits])",
                self.size, caps.bytes
            ));
        }
        Ok(())
    }

    /// The map in the header of a member, and in the blocks behind it, which are read from
    /// `position`. Returns also where the data begins.
    pub(super) fn of_header(
        header: &GnuHeader,
        archive: &File,
        mut position: u64,
    ) -> Result<(Self, u64), String> {
        let mut map = Self {
            size: header.real_size().map_err(|e| damaged(&e))?,
            ..Self::default()
        };
        map.take(&header.sparse)?;
        let (mut goes_on, mut blocks) = (header.is_extended(), 0);
        while goes_on {
            blocks += 1;
            if blocks > ARCHIVE_SPARSE_PARTS_MAX {
                return Err("the map of its holes is too long".into());
            }
            let mut block = GnuExtSparseHeader::new();
            archive
                .read_exact_at(block.as_mut_bytes(), position)
                .map_err(|e| damaged(&e))?;
            map.take(block.sparse())?;
            position = position.saturating_add(BLOCK);
            goes_on = block.is_extended();
        }
        Ok((map, position))
    }

    fn take(&mut self, parts: &[GnuSparseHeader]) -> Result<(), String> {
        for part in parts.iter().filter(|part| !part.is_empty()) {
            self.push(
                part.offset().map_err(|e| damaged(&e))?,
                part.length().map_err(|e| damaged(&e))?,
            )?;
        }
        Ok(())
    }

    /// The map before the data of a member (form 1.0): decimal numbers in lines, padded to a block.
    /// Returns also the data.
    fn before_data(archive: &File, whole: Extent, size: u64) -> Result<(Self, Extent), String> {
        let (mut digits, mut position, mut block) = (String::new(), 0, [0; BLOCK as usize]);
        let mut next = || -> Result<u64, String> {
            loop {
                let at = (position % BLOCK) as usize;
                if at == 0 {
                    if position + BLOCK > whole.size {
                        return Err("the map of its holes is truncated".into());
                    }
                    archive
                        .read_exact_at(&mut block, whole.offset + position)
                        .map_err(|e| damaged(&e))?;
                }
                position += 1;
                match block[at] {
                    b'\n' => {
                        let number = digits
                            .parse()
                            .map_err(|_| "the map of its holes is invalid");
                        digits.clear();
                        return Ok(number?);
                    }
                    digit if digit.is_ascii_digit() && digits.len() < DIGITS_MAX => {
                        digits.push(char::from(digit));
                    }
                    _ => return Err("the map of its holes is invalid".into()),
                }
            }
        };
        let mut map = Self {
            size,
            ..Self::default()
        };
        for _ in 0..next()? {
            let (offset, size) = (next()?, next()?);
            map.push(offset, size)?;
        }
        let before = position.next_multiple_of(BLOCK);
        let data = Extent {
            offset: whole.offset + before,
            size: whole.size.saturating_sub(before),
        };
        Ok((map, data))
    }

    /// Writes the member as a file with holes. `data` is where its data is in the archive. Returns the
    /// size of the file.
    pub(super) fn expand(&self, archive: &File, data: Extent, to: &Path) -> Result<u64, Fault> {
        let what = || format!("write {}", to.display());
        let folder = to.parent().unwrap_or(to);
        let _space =
            Reservation::take(folder, data.size, SCRATCH_SPARE_BYTES, 1, "a sparse member")?;
        let file = File::create(to).at(what())?;
        file.set_len(self.size).at(what())?;
        let (mut from, mut buffer) = (data.offset, vec![0; BUFFER]);
        for part in &self.parts {
            let mut done = 0;
            while done < part.size {
                let n = (part.size - done).min(BUFFER as u64) as usize;
                archive
                    .read_exact_at(&mut buffer[..n], from)
                    .at("read a sparse member")?;
                file.write_all_at(&buffer[..n], part.offset + done)
                    .at(what())?;
                (from, done) = (from + n as u64, done + n as u64);
            }
        }
        Ok(self.size)
    }
}

/// What the extended headers of a member say about its holes.
#[derive(Debug, Default)]
pub(super) struct Extended {
    /// The name of the member; the header has an invented one.
    pub(super) name: Option<Vec<u8>>,
    /// The major number of the form; absent before 1.0.
    major: Option<u64>,
    size: Option<u64>,
    map: Option<Map>,
    /// Of a part whose size follows.
    offset: Option<u64>,
}

impl Extended {
    /// Whether they say nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.name.is_none() && self.map.is_none()
    }

    /// Takes a record whose key begins with `GNU.sparse.`; `key` is the rest.
    pub(super) fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        let number = || {
            std::str::from_utf8(value)
                .ok()
                .and_then(|text| text.parse::<u64>().ok())
                .ok_or("a number of its extended header is invalid")
        };
        match key {
            b"major" => self.major = Some(number()?),
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => {
                self.size = Some(number()?);
                self.map.get_or_insert_default();
            }
            b"offset" => self.offset = Some(number()?),
            b"numbytes" => {
                let offset = self
                    .offset
                    .take()
                    .ok_or("a part of its map has no offset")?;
                let size = number()?;
                self.map.get_or_insert_default().push(offset, size)?;
            }
            b"map" => {
                let text = std::str::from_utf8(value).unwrap_or_default();
                let map = self.map.get_or_insert_default();
                let mut numbers = text.split(',').map(str::parse::<u64>);
                while let Some(offset) = numbers.next() {
                    let (Ok(offset), Some(Ok(size))) = (offset, numbers.next()) else {
                        return Err("the map of its holes is invalid".into());
                    };
                    map.push(offset, size)?;
                }
            }
            // The minor number, and the number of parts.
            _ => {}
        }
        Ok(())
    }

    /// The map and the data of the member, whose data in the archive is `whole`; `None`: it is not
    /// sparse.
    pub(super) fn map(
        self,
        archive: &File,
        whole: Extent,
    ) -> Result<Option<(Map, Extent)>, String> {
        let Some(map) = self.map else {
            return Ok(None);
        };
        let size = self.size.ok_or("it is a sparse file without a size")?;
        match self.major {
            Some(0) | None => Ok(Some((Map { size, ..map }, whole))),
            Some(1) => Map::before_data(archive, whole, size).map(Some),
            Some(other) => Err(format!("it is a sparse file of the unknown form {other}")),
        }
    }
}

fn damaged(error: &io::Error) -> String {
    format!("the map of its holes is damaged: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPS: Caps = Caps {
        bytes: 1 << 20,
        ratio: 64,
    };

    fn map(records: &[(&str, &str)]) -> Result<Map, String> {
        let mut extended = Extended::default();
        for (key, value) in records {
            extended.take(key.as_bytes(), value.as_bytes())?;
        }
        let archive = tempfile::tempfile().unwrap();
        let whole = Extent { offset: 0, size: 0 };
        extended.map(&archive, whole).map(|found| found.unwrap().0)
    }

    #[test]
    fn a_map_that_does_not_fit_the_file_or_the_data_is_refused() {
        let of = |parts: &str, size: &str| map(&[("map", parts), ("size", size)]).unwrap();
        of("0,10,20,10", "30").check(20, CAPS).unwrap();
        of("0,10,10,10", "20").check(20, CAPS).unwrap();
        for (parts, size, stored) in [
            ("0,10,5,10", "30", 20),
            ("20,10,0,10", "30", 20),
            ("0,10,20,11", "30", 21),
            ("0,10,20,10", "30", 19),
            ("18446744073709551615,10", "30", 10),
            ("0,1", "2097152", 1),
            ("0,1", "18446744073709551615", 1),
        ] {
            let refused = of(parts, size).check(stored, CAPS);
            assert!(refused.is_err(), "{parts} {size} {stored}");
        }
    }

    #[test]
    fn records_that_make_no_map_are_refused() {
        for records in [
            &[("map", "1"), ("size", "2")][..],
            &[("map", "a,b"), ("size", "2")],
            &[("numbytes", "5"), ("size", "9")],
            &[("size", "-1")],
            &[("major", "2"), ("size", "9")],
            &[("major", "1"), ("realsize", "9")],
            &[("map", "0,1")],
        ] {
            assert!(map(records).is_err(), "{records:?}");
        }
        let many = vec!["0,0"; ARCHIVE_SPARSE_PARTS_MAX + 1].join(",");
        assert!(map(&[("map", &many), ("size", "9")]).is_err());
    }
}

//! Copies within and between filesystems that keep holes.

use std::fs::File;
use std::ops::Range;

use rustix::io::Errno;

use super::{Sharing, Stage, sink_fault};
use base::durable;
use base::fault::{Fault, IoContext};
use base::names::RelPath;

/// The bytes per call that copies within the filesystem.
const COPY_WITHIN_BYTES: usize = 64 << 20;

impl Stage {
    /// Copies a complete file within the filesystem; on a NAS the bytes then do not cross the
    /// network. Holes stay holes.
    pub(super) fn copy_within(
        &self,
        source: &File,
        path: &RelPath,
        stat: &rustix::fs::Stat,
    ) -> Result<Sharing, Fault> {
        self.remove_file(path)?;
        let (size, has_holes) = (
            stat.st_size as u64,
            (stat.st_blocks as u64).saturating_mul(512) < stat.st_size as u64,
        );
        let into = match has_holes {
            true => self.open_sparse(path, size)?,
            false => self.open_file(path, size)?,
        };
        let mut at = 0;
        while let Some(data) = next_data(source, at, size, has_holes) {
            match copy_range(source, &into, data.clone()) {
                Ok(()) => at = data.end,
                Err(Errno::NOSPC | Errno::DQUOT) => {
                    return Err(Fault::no_space(self.what("copy", path)));
                }
                // A different filesystem, no support, or a file that became shorter.
                Err(Errno::XDEV | Errno::NOSYS | Errno::NOTSUP | Errno::INVAL | Errno::PERM) => {
                    self.remove_file(path)?;
                    return Ok(Sharing::Not);
                }
                Err(e) => return Err(sink_fault(self.what("copy", path), e)),
            }
        }
        durable::close(into).at_sink(self.what("copy", path))?;
        Ok(Sharing::Copy)
    }
}

/// The next range of a file from `at` on that is not a hole; `None` at its end. A filesystem that
/// does not know its holes has none.
pub(crate) fn next_data(file: &File, at: u64, size: u64, has_holes: bool) -> Option<Range<u64>> {
    if at >= size {
        return None;
    }
    if !has_holes {
        return Some(at..size);
    }
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        Ok(from) => {
            let end = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(from)).unwrap_or(size);
            Some(from..end.clamp(from + 1, size.max(from + 1))).filter(|_| from < size)
        }
        Err(Errno::NXIO) => None,
        Err(_) => Some(at..size),
    }
}

/// Copies a range from one file to the same place in another, by the filesystem.
pub(crate) fn copy_range(from: &File, to: &File, range: Range<u64>) -> Result<(), Errno> {
    let (mut read_at, mut write_at) = (range.start, range.start);
    while write_at < range.end {
        let left = usize::try_from(range.end - write_at)
            .unwrap_or(usize::MAX)
            .min(COPY_WITHIN_BYTES);
        match rustix::fs::copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), left) {
            Ok(0) => return Err(Errno::INVAL),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;
    use crate::stage::StagingRoot;

    #[test]
    fn a_copy_of_a_sparse_file_is_sparse() {
        let dir = tempfile::tempdir().unwrap();
        let root = StagingRoot::open(dir.path()).unwrap();
        let stage = root.stage(&"t-1".parse().unwrap()).unwrap();
        let source = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.path().join("disk.img"))
            .unwrap();
        source.set_len(256 << 20).unwrap();
        source.write_all_at(b"data", 100 << 20).unwrap();
        let stat = rustix::fs::fstat(&source).unwrap();
        let path: RelPath = "copy".parse().unwrap();
        assert_eq!(
            stage.copy_within(&source, &path, &stat).unwrap(),
            Sharing::Copy
        );
        let copy = stage.open_to_read(&path).unwrap();
        let meta = copy.metadata().unwrap();
        assert_eq!(meta.len(), 256 << 20);
        assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
        let mut four = [0; 4];
        copy.read_exact_at(&mut four, 100 << 20).unwrap();
        assert_eq!(&four, b"data");
    }
}

//! Packs: files of frames. Frames are appended; a full pack never changes.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Buf as _, Bytes};
use parking_lot::Mutex;

use crate::chunk::Hash;
use crate::frame::{Frame, FrameError, HEADER_BYTES, Header};
use base::blocking;
use base::buffers::Buffers;
use base::durable;
use base::durable::write_parts;
use base::fault::{Fault, IoContext};
use base::limits::{APPEND_LOOK_BYTES, STATE_INODES_SPARE};
use base::private;
use base::space::Space;

use super::index::Location;

/// What to do if the disk of the store is full.
pub(super) const FREE_SPACE: &str = "free space on that disk ('packhorse gc' removes what failed publishes left), then run the command again";
const MAGIC: &[u8; 8] = b"PHPACK01";
/// The number of read buffers that are kept, more than the concurrent answers to one site: at most
/// 32 MiB.
const BUFFERS_KEPT: usize = 16;
/// The smallest buffer that is kept.
const BUFFER_BYTES_MIN: usize = 128 << 10;
/// The largest buffer that is kept.
const BUFFER_BYTES_MAX: usize = 2 << 20;
/// The number of bytes that a scan reads at once.
const SCAN_BYTES: usize = 2 << 20;
/// The number of packs that are kept open for reading.
const OPEN_PACKS_MAX: usize = 64;

pub(super) struct Packs {
    dir: PathBuf,
    /// Ordered by last use, most recent last.
    open: Mutex<VecDeque<(u32, Arc<File>)>>,
    buffers: Buffers,
}

/// The pack that is being appended to.
pub(super) struct Writer {
    number: u32,
    file: Arc<File>,
    len: u64,
    /// The bytes that may be appended before the free space is checked again.
    unchecked_left: u64,
    path: PathBuf,
    /// Whether the directory was synced since the pack was created.
    is_dir_synced: Arc<AtomicBool>,
}

/// The bytes written to a pack up to some moment, to be synced.
pub(super) struct Unsynced {
    pub(super) number: u32,
    pub(super) len: u64,
    file: Arc<File>,
    path: PathBuf,
    is_dir_synced: Arc<AtomicBool>,
}

impl Packs {
    pub(super) fn new(dir: PathBuf) -> Self {
        let buffers = Buffers::new(BUFFERS_KEPT, BUFFER_BYTES_MIN, BUFFER_BYTES_MAX);
        Self {
            dir,
            open: Mutex::default(),
            buffers,
        }
    }

    /// Frees unused buffers, if there was no read since the last call.
    pub(super) fn rest(&self) {
        self.buffers.rest();
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, number: u32) -> PathBuf {
        self.dir.join(format!("{number:08}.pack"))
    }

    pub(super) fn list(&self) -> Result<Vec<u32>, Fault> {
        blocking::check("a list of packs");
        let mut out = Vec::new();
        for entry in std::fs::read_dir(&self.dir).at(format_args!("list {}", self.dir.display()))? {
            let name = entry
                .at(format_args!("list {}", self.dir.display()))?
                .file_name();
            let number = name
                .to_str()
                .and_then(|n| n.strip_suffix(".pack"))
                .and_then(|n| n.parse().ok());
            // The directory may contain other files whose names only resemble packs.
            out.extend(number.filter(|number| {
                self.path(*number).file_name() == Some(&name) && self.path(*number).is_file()
            }));
        }
        out.sort_unstable();
        Ok(out)
    }

    pub(super) fn len(&self, number: u32) -> Result<u64, Fault> {
        let path = self.path(number);
        Ok(std::fs::metadata(&path).at(path.display())?.len())
    }

    /// Creates a pack, if the disk has at least `spare` bytes free.
    pub(super) fn create(&self, number: u32, spare: u64) -> Result<Writer, Fault> {
        self.check_room(number, spare)?;
        let path = self.path(number);
        let what = || format!("create the pack {}", path.display());
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(private::FILE_MODE)
            .open(&path)
            .at(what())?;
        if let Err(error) = file.write_all(MAGIC) {
            let _ = std::fs::remove_file(&path);
            return Err(Fault::io(what(), &error));
        }
        Ok(Writer {
            number,
            file: Arc::new(file),
            len: MAGIC.len() as u64,
            unchecked_left: APPEND_LOOK_BYTES,
            path,
            is_dir_synced: Arc::default(),
        })
    }

    /// Fails if the disk has less than `spare` bytes free for this pack.
    pub(super) fn check_room(&self, number: u32, spare: u64) -> Result<(), Fault> {
        let path = self.path(number);
        Space::check(
            &self.dir,
            spare,
            STATE_INODES_SPARE,
            format_args!("the pack {}", path.display()),
        )
        .map_err(|fault| fault.with_next(FREE_SPACE))
    }

    pub(super) fn remove(&self, number: u32) -> Result<(), Fault> {
        durable::remove_all(&self.path(number))?;
        // Close the file after its removal: an open file would keep its space on the disk.
        self.open.lock().retain(|(n, _)| *n != number);
        Ok(())
    }

    /// Truncates a pack to this length, or removes it if the length is 0.
    pub(super) fn cut(&self, number: u32, len: u64) -> Result<(), Fault> {
        if len == 0 {
            return self.remove(number);
        }
        let path = self.path(number);
        File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(len))
            .at(format_args!("truncate the pack {}", path.display()))
    }

    /// Opens a pack. A pack that the index names but that does not exist is damage, not an I/O
    /// error.
    fn file(&self, number: u32) -> Result<Arc<File>, Fault> {
        let mut open = self.open.lock();
        if let Some(at) = open.iter().position(|(n, _)| *n == number) {
            // Consecutive reads usually use the same pack, the last one.
            if at + 1 != open.len()
                && let Some(hit) = open.remove(at)
            {
                open.push_back(hit);
            }
            if let Some((_, file)) = open.back() {
                return Ok(file.clone());
            }
        }
        let path = self.path(number);
        let file = match File::open(&path) {
            Ok(file) => Arc::new(file),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(
                    Fault::integrity(format!("the pack {} is missing", path.display())).with_next(
                        "run 'packhorse verify' on the artifacts, then publish the affected ones again",
                    ),
                );
            }
            Err(e) => {
                return Err(Fault::io(
                    format_args!("open the pack {}", path.display()),
                    &e,
                ));
            }
        };
        if open.len() == OPEN_PACKS_MAX {
            open.pop_front();
        }
        open.push_back((number, file.clone()));
        Ok(file)
    }

    /// Reads bytes of a pack. A pack that is too short for the index is damage, not an I/O error.
    pub(super) fn read(&self, number: u32, offset: u64, len: usize) -> Result<Bytes, Fault> {
        blocking::check("a read of a pack");
        let mut out = self.buffers.room(len);
        match self.file(number)?.read_exact_at(&mut out[..len], offset) {
            Ok(()) => Ok(self.buffers.lend(out).slice(..len)),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(Fault::integrity(format!(
                    "the pack {} is truncated: there is no data at offset {offset}",
                    self.path(number).display()
                ))
                .with_next(
                    "run 'packhorse verify' on the artifacts, then publish the affected ones again",
                ))
            }
            Err(e) => Err(Fault::io(
                format_args!("read the pack {}", self.path(number).display()),
                &e,
            )),
        }
    }

    /// Splits the first frame off `bytes` and checks its checksum.
    pub(super) fn split_frame(&self, number: u32, bytes: &mut Bytes) -> Result<Frame, Fault> {
        let len = self.first_header(number, bytes)?.frame_len();
        Frame::parse(bytes.split_to(len)).map_err(|error| self.damaged(number, &error))
    }

    /// Removes the first frame from `bytes`. Only its header is checked.
    pub(super) fn skip_frame(&self, number: u32, bytes: &mut Bytes) -> Result<Header, Fault> {
        let header = self.first_header(number, bytes)?;
        bytes.advance(header.frame_len());
        Ok(header)
    }

    /// The header of the first frame, which `bytes` contains completely.
    fn first_header(&self, number: u32, bytes: &Bytes) -> Result<Header, Fault> {
        let header = bytes
            .first_chunk::<HEADER_BYTES>()
            .ok_or(FrameError::Malformed)
            .and_then(Header::parse)
            .map_err(|error| self.damaged(number, &error))?;
        if header.frame_len() > bytes.len() {
            return Err(self.damaged(number, &FrameError::Malformed));
        }
        Ok(header)
    }

    fn damaged(&self, number: u32, error: &FrameError) -> Fault {
        Fault::integrity(format!("the pack {}: {error}", self.path(number).display())).with_next(
            "run 'packhorse verify' on the artifacts, then publish the affected ones again",
        )
    }

    /// Renames a file that is not a pack to a name that no pack has. The header of a pack is synced
    /// only with its first frames, so after a power failure it may be truncated or zero. Other
    /// bytes come from old disk blocks after a power failure, or from a person; the file is kept in
    /// case a user needs it. Returns `false` if the file may be a pack.
    pub(super) fn put_aside(&self, number: u32) -> Result<bool, Fault> {
        if self.len(number)? < MAGIC.len() as u64 {
            return Ok(false);
        }
        let header = self.read(number, 0, MAGIC.len())?;
        if header == MAGIC[..] || header.iter().all(|byte| *byte == 0) {
            return Ok(false);
        }
        let (path, aside) = (
            self.path(number),
            self.dir
                .join(format!("{number:08}.no-pack-{:08x}", rand::random::<u32>())),
        );
        durable::rename_noreplace(&path, &aside)?;
        self.open.lock().retain(|(n, _)| *n != number);
        tracing::warn!(path = %path.display(), aside = %aside.display(), "a file among the packs is not a pack and was renamed");
        Ok(true)
    }

    /// Reads the frames after `synced`, and cuts off the incomplete rest. Every frame is verified
    /// by its BLAKE3, because a power failure can leave any content.
    pub(super) fn recover(
        &self,
        number: u32,
        synced: u64,
    ) -> Result<(Vec<(Hash, Location)>, u64), Fault> {
        let path = self.path(number);
        let what = || format!("recover the pack {}", path.display());
        let total = self.len(number)?;
        let mut end = synced.max(MAGIC.len() as u64);
        let mut found = Vec::new();
        while end + HEADER_BYTES as u64 <= total {
            let head = self.read(number, end, HEADER_BYTES)?;
            let Some(Ok(header)) = head.first_chunk().map(Header::parse) else {
                break;
            };
            let len = header.frame_len();
            if end + len as u64 > total {
                break;
            }
            let Ok(frame) = Frame::parse(self.read(number, end, len)?) else {
                break;
            };
            if frame.verify(header.id, header.raw_len).is_err() {
                break;
            }
            found.push((
                header.id,
                Location {
                    pack: number,
                    offset: end as u32,
                    frame_len: len as u32,
                },
            ));
            end += len as u64;
        }
        let file = File::options().write(true).open(&path).at(what())?;
        file.set_len(end).at(what())?;
        file.sync_all().at(what())?;
        Ok((found, end))
    }
}

impl Packs {
    /// Calls `see` for every complete frame of a pack, at any position. Returns the number of bytes
    /// after the header that belong to no frame.
    pub(super) fn scan(
        &self,
        number: u32,
        mut see: impl FnMut(Hash, Location) -> Result<(), Fault>,
    ) -> Result<u64, Fault> {
        let total = self.len(number)?;
        let (mut at, mut damaged) = (MAGIC.len() as u64, 0);
        // The buffer and its position in the pack. It contains a frame, or bytes in which the next
        // frame is searched.
        let (mut buffer, mut buffer_start) = (Bytes::new(), at);
        while at + HEADER_BYTES as u64 <= total {
            let is_buffered = |buffer: &Bytes, buffer_start: u64, len: usize| {
                at - buffer_start + len as u64 <= buffer.len() as u64
            };
            if !is_buffered(&buffer, buffer_start, HEADER_BYTES) {
                let len = (total - at).min(SCAN_BYTES as u64) as usize;
                (buffer, buffer_start) = (self.read(number, at, len)?, at);
            }
            let from = (at - buffer_start) as usize;
            let header = buffer[from..].first_chunk().map(Header::parse);
            let Some(Ok(header)) = header.filter(|header| {
                header
                    .as_ref()
                    .is_ok_and(|h| at + h.frame_len() as u64 <= total)
            }) else {
                at += 1;
                damaged += 1;
                continue;
            };
            let len = header.frame_len();
            if !is_buffered(&buffer, buffer_start, len) {
                (buffer, buffer_start) = (
                    self.read(number, at, ((total - at) as usize).min(SCAN_BYTES.max(len)))?,
                    at,
                );
            }
            let from = (at - buffer_start) as usize;
            let frame = Frame::parse(buffer.slice(from..from + len))
                .and_then(|frame| frame.verify(header.id, header.raw_len));
            match (frame, u32::try_from(at)) {
                (Ok(_), Ok(offset)) => {
                    see(
                        header.id,
                        Location {
                            pack: number,
                            offset,
                            frame_len: len as u32,
                        },
                    )?;
                    at += len as u64;
                }
                _ => {
                    at += 1;
                    damaged += 1;
                }
            }
        }
        Ok(damaged + (total.saturating_sub(at)))
    }
}

impl Writer {
    pub(super) fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Appends these pieces one after the other. Returns the offset of the first. The next append
    /// overwrites what a failed append left. Fails if the disk would have less than `spare` bytes
    /// free afterwards, because other packs and other programs write to the same disk.
    pub(super) fn append(&mut self, pieces: &[&[u8]], spare: u64) -> Result<u32, Fault> {
        blocking::check("a write to a pack");
        let bytes = pieces.iter().map(|piece| piece.len() as u64).sum::<u64>();
        if self.unchecked_left < bytes && spare > 0 {
            let need = spare + bytes + APPEND_LOOK_BYTES;
            Space::check(
                &self.path,
                need,
                0,
                format_args!("the pack {}", self.path.display()),
            )
            .map_err(|fault| fault.with_next(FREE_SPACE))?;
            self.unchecked_left = bytes + APPEND_LOOK_BYTES;
        }
        self.unchecked_left = self.unchecked_left.saturating_sub(bytes);
        if let Err(error) = write_parts(&self.file, pieces, self.len) {
            let _ = self.file.set_len(self.len);
            return Err(Fault::io(
                format_args!("write the pack {}", self.path.display()),
                &error,
            ));
        }
        let offset = self.len as u32;
        self.len += bytes;
        Ok(offset)
    }

    /// The state up to the last append, to be synced.
    pub(super) fn unsynced(&self) -> Unsynced {
        let Self {
            number,
            len,
            file,
            path,
            is_dir_synced,
            unchecked_left: _,
        } = self;
        Unsynced {
            number: *number,
            len: *len,
            file: file.clone(),
            path: path.clone(),
            is_dir_synced: is_dir_synced.clone(),
        }
    }

    /// Makes the next sync fail, as a disk does that has lost a write: replaces the file by one
    /// that cannot be synced.
    #[cfg(test)]
    pub(super) fn break_sync(&mut self) -> std::io::Result<()> {
        self.file = Arc::new(File::options().write(true).open("/dev/null")?);
        Ok(())
    }
}

impl Unsynced {
    /// Syncs the bytes, and the first time also the directory.
    pub(super) fn sync(&self) -> Result<(), Fault> {
        self.file
            .sync_data()
            .at(format_args!("sync the pack {}", self.path.display()))?;
        if !self.is_dir_synced.load(Ordering::SeqCst) {
            self.path.parent().map_or(Ok(()), durable::sync_dir)?;
            self.is_dir_synced.store(true, Ordering::SeqCst);
        }
        Ok(())
    }
}

//! Packs: files of frames, appended to, then never changed.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::chunk::Hash;
use crate::frame::{Frame, HEADER_BYTES, Header};
use base::buffers::Buffers;
use base::durable;
use base::durable::write_parts;
use base::fault::{Fault, IoContext};
use base::limits::{APPEND_LOOK_BYTES, STATE_INODES_SPARE};
use base::private;
use base::space::Space;

use super::index::Location;

/// What to do where the store's disk is full.
pub(super) const MAKE_ROOM: &str = "make room on that disk: 'packhorse gc' frees what failed publishes left; then run the command again";
const MAGIC: &[u8; 8] = b"PHPACK01";
/// Read buffers kept, more than a site has answers under way: 32 MiB at the most.
const BUFFERS_KEPT: usize = 16;
/// The smallest buffer worth keeping.
const BUFFER_BYTES_MIN: usize = 128 << 10;
/// The largest buffer that is kept.
const BUFFER_BYTES_MAX: usize = 2 << 20;
/// Bytes that a scan reads at once.
const SCAN_BYTES: usize = 2 << 20;
/// Packs kept open for reading.
const OPEN_PACKS_MAX: usize = 64;

pub(super) struct Packs {
    dir: PathBuf,
    /// Most recently used last.
    open: Mutex<VecDeque<(u32, Arc<File>)>>,
    buffers: Buffers,
}

/// The pack being appended to.
pub(super) struct Writer {
    number: u32,
    file: Arc<File>,
    len: u64,
    /// Bytes that may be appended before the free space is checked again.
    checked: u64,
    path: PathBuf,
    /// Whether its folder was synced since it is there.
    named: Arc<AtomicBool>,
}

/// What was written to a pack up to some moment, to be synced.
pub(super) struct Unsynced {
    pub(super) number: u32,
    pub(super) len: u64,
    file: Arc<File>,
    path: PathBuf,
    named: Arc<AtomicBool>,
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

    /// Gives kept buffers back to the system, if nobody read since the last call.
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
        let mut out = Vec::new();
        for entry in std::fs::read_dir(&self.dir).at(format_args!("list {}", self.dir.display()))? {
            let name = entry
                .at(format_args!("list {}", self.dir.display()))?
                .file_name();
            let number = name
                .to_str()
                .and_then(|n| n.strip_suffix(".pack"))
                .and_then(|n| n.parse().ok());
            // Others may have put things here that only look like packs.
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

    /// A new pack, if the disk has at least `spare` bytes free.
    pub(super) fn create(&self, number: u32, spare: u64) -> Result<Writer, Fault> {
        self.check_room(number, spare)?;
        let path = self.path(number);
        let what = || format!("make the pack {}", path.display());
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
            checked: APPEND_LOOK_BYTES,
            path,
            named: Arc::default(),
        })
    }

    /// Fails when the disk has less than `spare` bytes free for this pack.
    pub(super) fn check_room(&self, number: u32, spare: u64) -> Result<(), Fault> {
        let path = self.path(number);
        Space::check(
            &self.dir,
            spare,
            STATE_INODES_SPARE,
            format_args!("the pack {}", path.display()),
        )
        .map_err(|fault| fault.with_next(MAKE_ROOM))
    }

    pub(super) fn remove(&self, number: u32) -> Result<(), Fault> {
        durable::remove_all(&self.path(number))?;
        // After that nobody can open it any more: one kept open would keep its room on the disk.
        self.open.lock().retain(|(n, _)| *n != number);
        Ok(())
    }

    /// Cuts a pack back to this length, or takes it away where nothing is left of it.
    pub(super) fn cut(&self, number: u32, len: u64) -> Result<(), Fault> {
        if len == 0 {
            return self.remove(number);
        }
        let path = self.path(number);
        File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(len))
            .at(format_args!("cut back the pack {}", path.display()))
    }

    /// A pack that the index names and that is not there is damage, not an I/O error.
    fn file(&self, number: u32) -> Result<Arc<File>, Fault> {
        let mut open = self.open.lock();
        if let Some(at) = open.iter().position(|(n, _)| *n == number) {
            // Reads come in runs from one pack: nearly always the last.
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
                    Fault::integrity(format!("the pack {} is gone", path.display())).with_next(
                        "run 'packhorse verify' on the artifacts, then publish those hit again",
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

    /// Bytes of a pack. A pack that is shorter than the index says is damage, not an I/O error.
    pub(super) fn read(&self, number: u32, offset: u64, len: usize) -> Result<Bytes, Fault> {
        let mut out = self.buffers.room(len);
        match self.file(number)?.read_exact_at(&mut out[..len], offset) {
            Ok(()) => Ok(self.buffers.lend(out).slice(..len)),
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(Fault::integrity(format!(
                    "the pack {} is cut off: nothing at {offset}",
                    self.path(number).display()
                ))
                .with_next("run 'packhorse verify' on the artifacts, then publish those hit again"))
            }
            Err(e) => Err(Fault::io(
                format_args!("read the pack {}", self.path(number).display()),
                &e,
            )),
        }
    }

    /// Takes the first frame off `bytes`, its sum checked.
    pub(super) fn split_frame(&self, number: u32, bytes: &mut Bytes) -> Result<Frame, Fault> {
        let damaged = |error: crate::frame::FrameError| {
            Fault::integrity(format!("the pack {}: {error}", self.path(number).display()))
                .with_next("run 'packhorse verify' on the artifacts, then publish those hit again")
        };
        let head = bytes
            .first_chunk::<HEADER_BYTES>()
            .ok_or(crate::frame::FrameError::Malformed)
            .map_err(damaged)?;
        let len = Header::parse(head).map_err(damaged)?.frame_len();
        if len > bytes.len() {
            return Err(damaged(crate::frame::FrameError::Malformed));
        }
        Frame::parse(bytes.split_to(len)).map_err(damaged)
    }

    /// Puts a file aside that is no pack, under a name that no pack has. The header is synced with
    /// the first frames only: it may be cut short, or never have been written, which leaves zeros.
    /// Where other bytes stand, a power cut on a disk that keeps old blocks left them, or somebody
    /// put the file there: it is kept for whoever misses it. `false`: it may be a pack.
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
        tracing::warn!(path = %path.display(), aside = %aside.display(), "a file among the packs is none, and was put aside");
        Ok(true)
    }

    /// Reads the frames behind `synced` and cuts off what is torn. Every one is verified by its
    /// BLAKE3: what a power cut left may be anything.
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
    /// Shows every whole frame of a pack, wherever it begins. Returns the bytes behind the header
    /// that belong to none.
    pub(super) fn scan(
        &self,
        number: u32,
        mut see: impl FnMut(Hash, Location) -> Result<(), Fault>,
    ) -> Result<u64, Fault> {
        let total = self.len(number)?;
        let (mut at, mut damaged) = (MAGIC.len() as u64, 0);
        // What was read ahead, and where it begins: a frame, or a stretch in which the next one is
        // looked for.
        let (mut ahead, mut begin) = (Bytes::new(), at);
        while at + HEADER_BYTES as u64 <= total {
            let have = |ahead: &Bytes, begin: u64, len: usize| {
                at - begin + len as u64 <= ahead.len() as u64
            };
            if !have(&ahead, begin, HEADER_BYTES) {
                let len = (total - at).min(SCAN_BYTES as u64) as usize;
                (ahead, begin) = (self.read(number, at, len)?, at);
            }
            let from = (at - begin) as usize;
            let header = ahead[from..].first_chunk().map(Header::parse);
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
            if !have(&ahead, begin, len) {
                (ahead, begin) = (
                    self.read(number, at, ((total - at) as usize).min(SCAN_BYTES.max(len)))?,
                    at,
                );
            }
            let from = (at - begin) as usize;
            let frame = Frame::parse(ahead.slice(from..from + len))
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

    /// Appends these pieces behind each other; returns where they begin. What a failure leaves
    /// behind its end is written over. Fails where the disk would have less than `spare` bytes free
    /// then: several packs may be open on one disk, and others write there.
    pub(super) fn append(&mut self, pieces: &[&[u8]], spare: u64) -> Result<u32, Fault> {
        let bytes = pieces.iter().map(|piece| piece.len() as u64).sum::<u64>();
        if self.checked < bytes && spare > 0 {
            let need = spare + bytes + APPEND_LOOK_BYTES;
            Space::check(
                &self.path,
                need,
                0,
                format_args!("the pack {}", self.path.display()),
            )
            .map_err(|fault| fault.with_next(MAKE_ROOM))?;
            self.checked = bytes + APPEND_LOOK_BYTES;
        }
        self.checked = self.checked.saturating_sub(bytes);
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

    /// All that was appended so far.
    pub(super) fn unsynced(&self) -> Unsynced {
        let Self {
            number,
            len,
            file,
            path,
            named,
            checked: _,
        } = self;
        Unsynced {
            number: *number,
            len: *len,
            file: file.clone(),
            path: path.clone(),
            named: named.clone(),
        }
    }

    /// Makes the next sync fail, as a disk does that has lost a write: what is written goes where
    /// nothing can be synced.
    #[cfg(test)]
    pub(super) fn break_sync(&mut self) -> std::io::Result<()> {
        self.file = Arc::new(File::options().write(true).open("/dev/null")?);
        Ok(())
    }
}

impl Unsynced {
    /// Syncs its bytes, and the first time its name.
    pub(super) fn sync(&self) -> Result<(), Fault> {
        self.file
            .sync_data()
            .at(format_args!("sync the pack {}", self.path.display()))?;
        if !self.named.load(Ordering::SeqCst) {
            self.path.parent().map_or(Ok(()), durable::sync_dir)?;
            self.named.store(true, Ordering::SeqCst);
        }
        Ok(())
    }
}

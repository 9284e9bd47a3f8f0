//! gzip, zstd, xz and bzip2, detected by their first bytes and decompressed with a limit. An archive
//! may have any of them; a layer is gzip or zstd, as container runtimes unpack nothing else.
//!
//! A few kilobytes can decompress to terabytes, so every decompressed byte of the image source
//! passes through a [`Bounded`] reader. **The rule**: input is rejected as a decompression bomb if
//! its output exceeds a limit ([`UNPACKED_BYTES_MAX`], or a setting) and also exceeds [`BOMB_RATIO`]
//! times the input. So a layer of zeros passes, and more must have a plausible ratio. Layers are only
//! hashed, and an archive is written only as far as its disk has space, so the limit bounds time.
//!
//! [`to_scratch`] writes one file to the scratch directory, and stops before the disk is full,
//! because the daemon's own state is on the same disk. After a crash, the next start removes the
//! incomplete file.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::path::Path;
use std::rc::Rc;

use bzip2::bufread::MultiBzDecoder;
use flate2::read::MultiGzDecoder;
use lzma_rust2::XzReader;

use super::decoders::{self, DECODERS, Taken, xz_dictionary, zstd_window};
use super::refuse;
use crate::own::{self, Own};
use base::blocking::Stop;
use base::fault::{Code, Fault, IoContext};
use base::limits::{
    BOMB_RATIO, DECODER_EMPTY_BYTES_MAX, SCRATCH_LOOK_BYTES, SCRATCH_SPARE_BYTES,
    UNPACKED_BYTES_MAX,
};
use base::space::{Reservation, Space};

/// The size of read and write buffers, in bytes.
pub(super) const BUFFER: usize = 128 << 10;

/// What an xz decoder needs beside its dictionary, at most.
const XZ_KIB_WITHOUT_DICTIONARY: u32 = 1 << 10;

/// The number of bytes that [`Compression::of`] examines.
pub(super) const SNIFFED_BYTES: usize = 262;

/// A compression format, detected by the first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    /// No known compression.
    None,
    Gzip,
    Zstd,
    Xz,
    Bzip2,
    /// A known format that is not supported; its name.
    Foreign(&'static str),
}

impl Compression {
    /// Detects the format by the first [`SNIFFED_BYTES`]. The magic of a tar takes precedence,
    /// because a tar starts with a file name.
    pub(super) fn of(first: &[u8]) -> Self {
        match first {
            _ if first.get(257..262) == Some(b"ustar") => Self::None,
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Self::Xz,
            [b'B', b'Z', b'h', ..] => Self::Bzip2,
            [0x04, 0x22, 0x4d, 0x18, ..] => Self::Foreign("lz4"),
            [b'P', b'K', 3, 4, ..] => Self::Foreign("zip"),
            _ => Self::None,
        }
    }

    /// The compression of a layer with these first bytes.
    pub(super) fn of_layer(first: &[u8]) -> Self {
        match Self::of(first) {
            Self::Xz => Self::Foreign("xz"),
            Self::Bzip2 => Self::Foreign("bzip2"),
            known => known,
        }
    }

    /// A reader of the decompressed bytes, limited by `caps`, which waits for the memory of its
    /// decoder. It ends when `stop` is set, also while it decompresses nothing.
    pub(super) fn reader<'a>(
        self,
        input: impl Read + 'a,
        caps: Caps,
        stop: &'a Stop,
    ) -> io::Result<Bounded<'a>> {
        let counts = Rc::new(Counts::default());
        let mut input = BufReader::with_capacity(
            BUFFER,
            Counted {
                input,
                counts: Rc::clone(&counts),
                stop,
            },
        );
        let window = match self {
            Self::Zstd => decoders::allowed(zstd_window(input.fill_buf()?))?,
            Self::Xz => decoders::allowed(xz_dictionary(input.fill_buf()?))?,
            _ => 0,
        };
        let memory = DECODERS.take(decoders::memory_of(window), stop)?;
        let output: Box<dyn Read + 'a> = match self {
            Self::None => Box::new(input),
            Self::Gzip => Box::new(MultiGzDecoder::new(input)),
            Self::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(input)?;
                decoder.window_log_max(window.next_power_of_two().ilog2())?;
                Box::new(decoder)
            }
            Self::Xz => {
                let memory_kib = (window >> 10) as u32 + XZ_KIB_WITHOUT_DICTIONARY;
                Box::new(XzReader::new_mem_limit(input, true, memory_kib))
            }
            Self::Bzip2 => Box::new(MultiBzDecoder::new(input)),
            Self::Foreign(name) => {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!("{name} is not supported"),
                ));
            }
        };
        Ok(Bounded {
            output,
            counts,
            caps,
            _memory: memory,
        })
    }
}

/// The limits from which input is rejected as a decompression bomb.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caps {
    pub(super) bytes: u64,
    pub(super) ratio: u64,
}

impl Default for Caps {
    fn default() -> Self {
        Self {
            bytes: UNPACKED_BYTES_MAX,
            ratio: BOMB_RATIO,
        }
    }
}

/// The bytes that a decoder has read and decompressed.
#[derive(Default)]
struct Counts {
    input: Cell<u64>,
    output: Cell<u64>,
}

/// The input of a decoder. A decoder that decompresses nothing still reads, so the rules that end it
/// are here.
struct Counted<'a, R> {
    input: R,
    counts: Rc<Counts>,
    stop: &'a Stop,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.is_set() {
            return Err(io::Error::other("the job was cancelled"));
        }
        let (input, output) = (self.counts.input.get(), self.counts.output.get());
        if input > DECODER_EMPTY_BYTES_MAX.saturating_add(2 * output) {
            let why = format!(
                "only {output} bytes were decompressed from {input} bytes: it consists of empty parts"
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        let n = self.input.read(buffer)?;
        self.counts.input.set(input + n as u64);
        Ok(n)
    }
}

/// Decompressed bytes, up to the limit.
pub(super) struct Bounded<'a> {
    output: Box<dyn Read + 'a>,
    counts: Rc<Counts>,
    caps: Caps,
    /// Returned after the decoder, which is dropped before.
    _memory: Taken<'static>,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.output.read(buffer)?;
        let (input, output) = (self.counts.input.get(), self.counts.output.get() + n as u64);
        self.counts.output.set(output);
        if output > self.caps.bytes && output / self.caps.ratio > input {
            let why = format!(
                "a decompression bomb: {output} bytes were decompressed from {input} bytes, more than the allowed {} (image_unpacked in [limits])",
                self.caps.bytes
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        Ok(n)
    }
}

/// Decompresses the archive `path` to the new file `copy` in the scratch directory.
pub(super) fn to_scratch(
    path: &Path,
    compression: Compression,
    copy: &Path,
    caps: Caps,
    own: &Own,
    stop: &Stop,
) -> Result<(), Fault> {
    let input = own.open(path).map_err(|error| own::fault(path, &error))?;
    let compressed = input
        .metadata()
        .at(format_args!("read the metadata of {}", path.display()))?
        .len();
    let output = File::create(copy).at(format_args!("create {}", copy.display()))?;
    // Reserves the next piece, so that two concurrent decompressions never count the same bytes.
    let mut reservation: Option<Reservation> = None;
    let reserve = |bytes| -> Result<(), Fault> {
        drop(reservation.take()); // its bytes are written and count as used
        reservation = Some(Reservation::take(
            copy,
            bytes,
            SCRATCH_SPARE_BYTES,
            0,
            "the rest of the archive",
        )?);
        Ok(())
    };
    // An archive almost never decompresses to less than its own size, so that much space is
    // required before the start.
    let result = Space::check(copy, compressed.saturating_add(SCRATCH_SPARE_BYTES), 0, "the decompressed archive")
        .and_then(|()| copy_to(path, compression, input, output, (caps, stop), reserve))
        .map_err(|fault| match fault.code {
            Code::NoSpace => fault
                .context(format_args!("decompress {} to {}", path.display(), copy.display()))
                .with_next("free space on that disk and run the command again, or publish the decompressed archive, which needs no copy"),
            _ => fault,
        });
    if result.is_err() {
        let _ = fs::remove_file(copy); // it may have filled the disk; the scratch directory is removed anyway
    }
    result
}

/// `reserve` reserves space for the next bytes of `output`.
fn copy_to(
    path: &Path,
    compression: Compression,
    input: impl Read,
    mut output: impl Write,
    (caps, stop): (Caps, &Stop),
    mut reserve: impl FnMut(u64) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let mut reader = compression
        .reader(input, caps, stop)
        .map_err(|e| damaged(path, &e))?;
    let mut buffer = vec![0; BUFFER];
    // The number of bytes that may be written before space is reserved again.
    let mut reserved = 0;
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return output.flush().at("write the decompressed archive"),
            Ok(n) => {
                if reserved < n {
                    reserve(SCRATCH_LOOK_BYTES)?;
                    reserved = SCRATCH_LOOK_BYTES as usize;
                }
                reserved -= n;
                output
                    .write_all(&buffer[..n])
                    .at("write the decompressed archive")?;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(damaged(path, &e)),
        }
    }
}

fn damaged(path: &Path, error: &io::Error) -> Fault {
    if error.raw_os_error().is_some() {
        return Fault::io(format_args!("read {}", path.display()), error);
    }
    refuse(path, "the archive", why_damaged(error))
}

/// The meaning of a decoder's error.
pub(super) fn why_damaged(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "it is truncated: its compressed data is incomplete".into(),
        _ => format!("it cannot be decompressed: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPS: Caps = Caps {
        bytes: 1 << 20,
        ratio: 64,
    };

    #[test]
    fn both_compressions_are_decompressed() {
        let text = b"panel ".repeat(10_000);
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gz.write_all(&text).unwrap();
        let gz = gz.finish().unwrap();
        for bytes in [
            text.clone(),
            [gz.clone(), gz].concat(),
            zstd::encode_all(&text[..], 1).unwrap(),
        ] {
            let mut out = Vec::new();
            Compression::of(&bytes)
                .reader(&bytes[..], CAPS, &Stop::default())
                .unwrap()
                .read_to_end(&mut out)
                .unwrap();
            assert!(
                out == text || out == text.repeat(2),
                "gzip may come in several members"
            );
        }
    }

    #[test]
    fn a_bomb_is_stopped_early() {
        let bomb = zstd::encode_all(io::repeat(0).take(64 << 20), 1).unwrap();
        let (mut out, stop) = (Vec::new(), Stop::default());
        let error = Compression::Zstd
            .reader(&bomb[..], CAPS, &stop)
            .unwrap()
            .read_to_end(&mut out)
            .unwrap_err();
        assert!(error.to_string().contains("decompression bomb"), "{error}");
        assert!(out.len() < 4 << 20);
    }

    /// The error of a reader of these bytes.
    fn error_of(compression: Compression, bytes: &[u8], stop: &Stop) -> String {
        let reader = compression.reader(bytes, CAPS, stop);
        let read = reader.and_then(|mut reader| io::copy(&mut reader, &mut io::sink()));
        read.unwrap_err().to_string()
    }

    /// Parts without content, each a valid one, more bytes than this.
    fn empty_parts(compression: Compression, bytes: usize) -> Vec<u8> {
        let one = match compression {
            Compression::Gzip => {
                let gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gz.finish().unwrap()
            }
            Compression::Bzip2 => {
                let bz = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
                bz.finish().unwrap()
            }
            Compression::Zstd => vec![0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0],
            _ => lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0))
                .unwrap()
                .finish()
                .unwrap(),
        };
        one.repeat(bytes / one.len() + 1)
    }

    #[test]
    fn endless_parts_without_content_are_refused_and_end_with_their_job() {
        /// Sets the flag with its second read.
        struct Cancelling<'a>(&'a [u8], &'a Stop, u32);
        impl Read for Cancelling<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                self.2 += 1;
                assert!(self.2 <= 2, "nothing is read after the cancellation");
                if self.2 == 2 {
                    self.1.set();
                }
                self.0.read(buffer)
            }
        }
        for compression in [
            Compression::Gzip,
            Compression::Bzip2,
            Compression::Zstd,
            Compression::Xz,
        ] {
            let parts = empty_parts(compression, DECODER_EMPTY_BYTES_MAX as usize + 2 * BUFFER);
            let why = error_of(compression, &parts, &Stop::default());
            assert!(why.contains("empty parts"), "{compression:?}: {why}");
            let stop = Stop::default();
            let reader = compression.reader(Cancelling(&parts, &stop, 0), CAPS, &stop);
            let read = reader.and_then(|mut reader| io::copy(&mut reader, &mut io::sink()));
            let why = read.unwrap_err().to_string();
            assert!(why.contains("cancelled"), "{compression:?}: {why}");
        }
    }

    #[test]
    fn a_window_larger_than_stated_first_is_refused() {
        let zstd = |window_log| {
            let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
            encoder.window_log(window_log).unwrap();
            encoder.write_all(&[7; 1000]).unwrap();
            encoder.finish().unwrap()
        };
        for large in [24, 27] {
            let (large, stop) = (zstd(large), Stop::default());
            let mut out = Vec::new();
            Compression::Zstd
                .reader(&large[..], CAPS, &stop)
                .and_then(|mut reader| reader.read_to_end(&mut out))
                .unwrap();
            assert_eq!(out, [7; 1000]);
            // Behind a frame that needs little memory.
            let why = error_of(Compression::Zstd, &[zstd(20), large].concat(), &stop);
            assert!(why.contains("memory"), "{why}");
        }
    }

    #[test]
    fn truncation_and_a_full_disk_are_distinguished() {
        let whole = zstd::encode_all(&b"x".repeat(300_000)[..], 1).unwrap();
        let path = Path::new("/img.tar.zst");
        let room = |_| Ok(());
        let cut = copy_to(
            path,
            Compression::Zstd,
            &whole[..whole.len() - 4],
            io::sink(),
            (CAPS, &Stop::default()),
            room,
        )
        .unwrap_err();
        assert_eq!(cut.code, Code::Integrity);
        assert!(cut.message.contains("truncated"), "{}", cut.message);
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(
            copy_to(
                path,
                Compression::Zstd,
                &whole[..],
                full,
                (CAPS, &Stop::default()),
                room
            )
            .unwrap_err()
            .code,
            Code::NoSpace
        );
    }

    #[test]
    fn it_stops_before_the_disk_is_full() {
        struct Disk<'a>(&'a Cell<u64>);
        impl Write for Disk<'_> {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.set(
                    self.0
                        .get()
                        .checked_sub(bytes.len() as u64)
                        .ok_or(io::ErrorKind::StorageFull)?,
                );
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let archive = zstd::encode_all(io::repeat(7).take(3 * SCRATCH_LOOK_BYTES), 1).unwrap();
        let copy = |room: u64| {
            let free = Cell::new(room);
            let no_caps = Caps {
                bytes: u64::MAX,
                ratio: 1,
            };
            let result = copy_to(
                Path::new("/img.tar.zst"),
                Compression::Zstd,
                &archive[..],
                Disk(&free),
                (no_caps, &Stop::default()),
                |bytes| {
                    let has_room = free.get() >= SCRATCH_SPARE_BYTES + bytes;
                    if has_room {
                        Ok(())
                    } else {
                        Err(Fault::no_space("no space left"))
                    }
                },
            );
            (result, free.get())
        };
        let (copied, left) = copy(SCRATCH_SPARE_BYTES + 4 * SCRATCH_LOOK_BYTES);
        assert_eq!(
            (copied, left),
            (Ok(()), SCRATCH_SPARE_BYTES + SCRATCH_LOOK_BYTES)
        );
        let (stopped, left) = copy(SCRATCH_SPARE_BYTES + 2 * SCRATCH_LOOK_BYTES);
        assert_eq!(stopped.unwrap_err().code, Code::NoSpace);
        assert!(
            (SCRATCH_SPARE_BYTES..SCRATCH_SPARE_BYTES + SCRATCH_LOOK_BYTES).contains(&left),
            "{left} bytes are left"
        );
    }
}

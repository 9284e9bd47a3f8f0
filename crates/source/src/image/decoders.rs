//! The memory of the decoders of layers and archives, which the author of an image chooses by the
//! window of its compression.
//!
//! All decoders of the process take their memory from one budget before they start, so that many
//! jobs with large windows wait for each other. Each takes at least [`DECODER_BYTES_MIN`], which
//! also limits the layers that are hashed at once.

use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use base::blocking::Stop;
use base::limits::{DECODER_BYTES_MIN, DECODER_WINDOW_BYTES_MAX, DECODERS_BYTES_MAX};

/// How often a thread that waits for memory looks whether its job was cancelled.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The budget of this process.
pub(super) static DECODERS: Room = Room::new(DECODERS_BYTES_MAX);

/// A budget of bytes that threads wait for, in the order of their requests.
pub(super) struct Room {
    total: u64,
    state: Mutex<State>,
    freed: Condvar,
}

struct State {
    used: u64,
    requests: u64,
    waiting: BTreeSet<u64>,
}

/// Bytes taken from a [`Room`]. Dropping them returns them.
pub(super) struct Taken<'a> {
    room: &'a Room,
    bytes: u64,
}

impl Room {
    pub(super) const fn new(total: u64) -> Self {
        Self {
            total,
            state: Mutex::new(State {
                used: 0,
                requests: 0,
                waiting: BTreeSet::new(),
            }),
            freed: Condvar::new(),
        }
    }

    /// Waits until so many bytes are free, or fails when the job is cancelled.
    pub(super) fn take(&self, bytes: u64, stop: &Stop) -> io::Result<Taken<'_>> {
        let mut state = self.state.lock();
        let own = state.requests;
        state.requests += 1;
        state.waiting.insert(own);
        loop {
            let is_next = state.waiting.first() == Some(&own);
            if is_next && (state.used == 0 || state.used + bytes <= self.total) {
                state.used += bytes;
                break;
            }
            if stop.is_set() {
                state.waiting.remove(&own);
                self.freed.notify_all();
                return Err(io::Error::other("the job was cancelled"));
            }
            self.freed.wait_for(&mut state, LOOK_EVERY);
        }
        state.waiting.remove(&own);
        self.freed.notify_all();
        Ok(Taken { room: self, bytes })
    }

    #[cfg(test)]
    fn used(&self) -> u64 {
        self.state.lock().used
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.room.state.lock().used -= self.bytes;
        self.room.freed.notify_all();
    }
}

/// The memory of a decoder with this window.
pub(super) fn memory_of(window: u64) -> u64 {
    (window + (1 << 20)).max(DECODER_BYTES_MIN)
}

/// The window that decoders of zstd and xz support without a statement in the first bytes: a later
/// part with a larger one is refused.
const WINDOW_BYTES_USUAL: u64 = 8 << 20;

/// The window to allow for a stream whose first bytes state this one.
pub(super) fn allowed(stated: Option<u64>) -> io::Result<u64> {
    let window = stated.unwrap_or(0).max(WINDOW_BYTES_USUAL);
    if window > DECODER_WINDOW_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "it needs a window of {} MiB of memory, and {} MiB are allowed: compress it with a smaller window",
                window.div_ceil(1 << 20),
                DECODER_WINDOW_BYTES_MAX >> 20
            ),
        ));
    }
    Ok(window)
}

/// The window in bytes that the first zstd frame states (RFC 8878, 3.1.1.1). `None`: the frame is
/// not in these bytes.
pub(super) fn zstd_window(mut bytes: &[u8]) -> Option<u64> {
    while let [0x50..=0x5f, 0x2a, 0x4d, 0x18, a, b, c, d, rest @ ..] = bytes {
        bytes = rest.get(u32::from_le_bytes([*a, *b, *c, *d]) as usize..)?;
    }
    let [0x28, 0xb5, 0x2f, 0xfd, descriptor, rest @ ..] = bytes else {
        return None;
    };
    let is_single_segment = descriptor & 0x20 != 0;
    if !is_single_segment {
        let window = *rest.first()?;
        let base = 1_u64 << (10 + (window >> 3));
        return Some(base + base / 8 * u64::from(window & 7));
    }
    // The window is the size of the content.
    let dictionary_id_len = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let size_len = 1_usize << (descriptor >> 6);
    let size = rest.get(dictionary_id_len..dictionary_id_len + size_len)?;
    let mut padded = [0; 8];
    padded[..size_len].copy_from_slice(size);
    let size = u64::from_le_bytes(padded);
    Some(if size_len == 2 { size + 256 } else { size })
}

/// The dictionary in bytes that the first block of an xz stream states (The .xz File Format, 3.1).
/// `None`: these bytes do not contain it.
pub(super) fn xz_dictionary(bytes: &[u8]) -> Option<u64> {
    const STREAM_HEADER_BYTES: usize = 12;
    const LZMA2: u64 = 0x21;
    let mut rest = bytes.get(STREAM_HEADER_BYTES..)?;
    let mut byte = || {
        let (first, behind) = rest.split_first()?;
        rest = behind;
        Some(*first)
    };
    let _header_size = byte()?;
    let flags = byte()?;
    let mut number = || {
        let mut value = 0;
        for shift in (0..63).step_by(7) {
            let part = byte()?;
            value |= u64::from(part & 0x7f) << shift;
            if part & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    };
    for has_size in [0x40, 0x80] {
        if flags & has_size != 0 {
            number()?;
        }
    }
    for _ in 0..=flags & 3 {
        let (id, properties) = (number()?, number()?);
        if id == LZMA2 {
            let bits = number()? & 0x3f;
            return Some(match bits {
                40.. => u64::from(u32::MAX),
                _ => (2 | (bits & 1)) << (bits / 2 + 11),
            });
        }
        for _ in 0..properties {
            number()?;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn zstd(window_log: Option<u32>, bytes: &[u8]) -> Vec<u8> {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        if let Some(log) = window_log {
            encoder.window_log(log).unwrap();
        }
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn the_window_is_read_from_the_first_bytes() {
        for log in [10, 20, 23, 24, 27] {
            assert_eq!(zstd_window(&zstd(Some(log), b"panel")), Some(1 << log));
        }
        // A size of the content and no window; behind parts that are skipped.
        for len in [0, 1, 255, 256, 300, 65_791, 65_792] {
            let whole = zstd::bulk::compress(&vec![7; len], 1).unwrap();
            let skipped = [&[0x53, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3], &whole[..]].concat();
            for bytes in [&whole, &skipped] {
                assert_eq!(zstd_window(bytes), Some(len as u64), "{len}");
            }
        }
        assert_eq!(zstd_window(&[0x28, 0xb5, 0x2f, 0xfd]), None);
        assert_eq!(
            zstd_window(&[0x50, 0x2a, 0x4d, 0x18, 255, 255, 255, 255, 0]),
            None
        );
        for (preset, dictionary) in [(0, 256 << 10), (6, 8 << 20), (9, 64 << 20)] {
            let mut writer =
                lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(preset))
                    .unwrap();
            writer.write_all(b"panel").unwrap();
            let bytes = writer.finish().unwrap();
            assert_eq!(xz_dictionary(&bytes), Some(dictionary), "{preset}");
            assert_eq!(xz_dictionary(&bytes[..13]), None);
        }
    }

    #[test]
    fn a_window_that_is_too_large_is_refused_with_its_size() {
        assert_eq!(allowed(None).unwrap(), WINDOW_BYTES_USUAL);
        assert_eq!(allowed(Some(1 << 27)).unwrap(), 1 << 27);
        let fault = allowed(Some((1 << 27) + 1)).unwrap_err().to_string();
        assert!(
            fault.contains("129 MiB") && fault.contains("128 MiB"),
            "{fault}"
        );
    }

    #[test]
    fn memory_is_given_in_order_and_a_cancelled_job_does_not_wait() {
        static ROOM: Room = Room::new(100);
        let go_on = Stop::default();
        let first = ROOM.take(60, &go_on).unwrap();
        let (stop, large_stop) = (Stop::default(), Stop::default());
        let large = std::thread::spawn({
            let stop = large_stop.clone();
            move || ROOM.take(90, &stop).map(drop)
        });
        let waits = |count| {
            while ROOM.state.lock().waiting.len() < count {
                std::thread::yield_now();
            }
        };
        waits(1);
        // It would fit, but it came later.
        let small = std::thread::spawn(move || ROOM.take(30, &stop).map(|taken| taken.bytes));
        waits(2);
        assert_eq!(ROOM.used(), 60);
        large_stop.set();
        assert!(large.join().unwrap().is_err());
        assert_eq!(small.join().unwrap().unwrap(), 30);
        drop(first);
        // More than all, alone.
        let all = ROOM.take(1000, &go_on).unwrap();
        let stopped = Stop::default();
        stopped.set();
        assert!(ROOM.take(1, &stopped).is_err());
        drop(all);
        assert_eq!((ROOM.used(), ROOM.state.lock().waiting.len()), (0, 0));
    }
}

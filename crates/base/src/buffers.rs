//! Buffers, used again: given back to the system and faulted in anew they would cost a tenth of a
//! sender's time.
//!
//! The store reads packs into them, `ingest` reads sources, a fetch takes frames off the line. In
//! memory only.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

/// Buffers with room are multiples of this.
const STEP: usize = 256 << 10;

/// Some buffers of about the same size. Cheap to clone.
#[derive(Clone)]
pub struct Buffers {
    free: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Whether one was taken since the last [`Buffers::rest`].
    used: Arc<AtomicBool>,
    kept_max: usize,
    /// The capacities that are worth keeping, bytes.
    worth: (usize, usize),
}

/// A buffer that goes back when the last slice of it is gone.
struct Lent {
    bytes: Vec<u8>,
    home: Buffers,
}

impl Buffers {
    /// Keeps up to `kept_max` buffers of at least `min` and at most `max` bytes.
    pub fn new(kept_max: usize, min: usize, max: usize) -> Self {
        Self {
            free: Arc::default(),
            used: Arc::default(),
            kept_max,
            worth: (min, max),
        }
    }

    /// A buffer for `len` bytes, with what it held last still in it. Small ones do not deserve, and
    /// must not keep, a large buffer.
    pub fn take(&self, len: usize) -> Vec<u8> {
        self.used.store(true, Ordering::Relaxed);
        let reused = if len >= self.worth.0 {
            self.free.lock().pop()
        } else {
            None
        };
        reused.unwrap_or_else(|| Vec::with_capacity(len))
    }

    /// A buffer of at least `len` bytes, whatever they are. Of round sizes, and never shortened:
    /// what is read is of about one length, and to grow a little each time is to copy and to clear
    /// each time.
    pub fn room(&self, len: usize) -> Vec<u8> {
        if len < self.worth.0 {
            return vec![0; len];
        }
        let out = self.take(len);
        if out.len() > 4 * len {
            // Somebody may hold it for long, who has a share for `len` only.
            self.free.lock().push(out);
        } else if out.len() >= len {
            return out;
        }
        vec![0; len.next_multiple_of(STEP)]
    }

    /// The bytes of a buffer, which comes back when nobody needs them any more.
    pub fn lend(&self, bytes: Vec<u8>) -> Bytes {
        Bytes::from_owner(Lent {
            bytes,
            home: self.clone(),
        })
    }

    /// Gives what is kept back to the system, if none was taken since the last call.
    pub fn rest(&self) {
        if !self.used.swap(false, Ordering::Relaxed) {
            self.free.lock().clear();
        }
    }
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let mut free = self.home.free.lock();
        if bytes.capacity() >= self.home.worth.0
            && bytes.capacity() <= self.home.worth.1
            && free.len() < self.home.kept_max
        {
            free.push(bytes);
        }
    }
}

//! A pool of reusable buffers. Allocating a large buffer for each use would cost about a tenth of a
//! sender's time for page faults.
//!
//! The store reads packs into these buffers, `ingest` reads sources into them, and a fetch reads
//! frames from the connection into them. In memory only.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

/// Buffers returned by [`Buffers::room`] have a length that is a multiple of this…
const STEP: usize = 256 << 10;
/// …or of this, if they are smaller than twice [`STEP`]: many peers hold such buffers.
const SMALL_STEP: usize = 64 << 10;

/// A pool of buffers of similar sizes. Cheap to clone.
#[derive(Clone)]
pub struct Buffers {
    free: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Whether a buffer was taken since the last call of [`Buffers::rest`].
    used: Arc<AtomicBool>,
    kept_max: usize,
    /// The smallest and the largest capacity of a buffer that the pool keeps, in bytes.
    capacity_range: (usize, usize),
}

/// A buffer in use. It returns to the pool when the last slice of it is dropped.
struct InUse {
    bytes: Vec<u8>,
    pool: Buffers,
}

impl Buffers {
    /// Creates a pool that keeps up to `kept_max` buffers with a capacity of at least `min` and at
    /// most `max` bytes.
    pub fn new(kept_max: usize, min: usize, max: usize) -> Self {
        Self {
            free: Arc::default(),
            used: Arc::default(),
            kept_max,
            capacity_range: (min, max),
        }
    }

    /// Returns a buffer for `len` bytes. It may still contain the bytes of its previous use. A
    /// request below the minimum size gets a new buffer, so that it does not occupy a large one.
    pub fn take(&self, len: usize) -> Vec<u8> {
        self.used.store(true, Ordering::Relaxed);
        let reused = if len >= self.capacity_range.0 {
            self.free.lock().pop()
        } else {
            None
        };
        reused.unwrap_or_else(|| Vec::with_capacity(len))
    }

    /// Returns a buffer of at least `len` bytes with undefined content. Its length is rounded up
    /// and never reduced: the lengths of consecutive reads are similar, and each small growth would
    /// copy and zero the buffer.
    pub fn room(&self, len: usize) -> Vec<u8> {
        if len < self.capacity_range.0 {
            return vec![0; len];
        }
        let out = self.take(len);
        if out.len() > 4 * len {
            // The caller accounts for `len` bytes only and may hold the buffer for a long time.
            self.free.lock().push(out);
        } else if out.len() >= len {
            return out;
        }
        let step = if len < 2 * STEP { SMALL_STEP } else { STEP };
        vec![0; len.next_multiple_of(step)]
    }

    /// Makes `Bytes` of a buffer, which returns to the pool when the last slice of them is dropped.
    pub fn lend(&self, bytes: Vec<u8>) -> Bytes {
        Bytes::from_owner(InUse {
            bytes,
            pool: self.clone(),
        })
    }

    /// Frees all unused buffers if none was taken since the last call.
    pub fn rest(&self) {
        if !self.used.swap(false, Ordering::Relaxed) {
            self.free.lock().clear();
        }
    }
}

impl AsRef<[u8]> for InUse {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let mut free = self.pool.free.lock();
        if bytes.capacity() >= self.pool.capacity_range.0
            && bytes.capacity() <= self.pool.capacity_range.1
            && free.len() < self.pool.kept_max
        {
            free.push(bytes);
        }
    }
}

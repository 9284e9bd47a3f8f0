//! The write order on a QUIC connection whose send buffer is full.
//!
//! quinn sends queued data in the order of the streams' priorities (`Inner::position_of`), but it
//! gives free space in the send buffer to the writer that was blocked last. Without this module, an
//! answer of 40 KB could wait for everything that a large transfer had requested. Therefore a write
//! waits while a write of a higher priority is in progress. If that write waits for the window of
//! its own stream, it blocks no other write: there is space in the send buffer, and the waiting
//! write finds it after a short time.

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use parking_lot::Mutex;
use quinn::{SendStream, WriteError};
use tokio::sync::Notify;

/// How long a write waits before it checks whether there is space.
const WAIT_MAX: Duration = Duration::from_millis(100);

/// The writes in progress of one connection.
#[derive(Default)]
pub(super) struct WriteOrder {
    /// The number of writes of each priority.
    writing: Mutex<BTreeMap<i32, usize>>,
    /// Notified when the highest priority changes.
    changed: Notify,
}

/// A write in progress.
struct Writing<'a> {
    turns: &'a WriteOrder,
    position: i32,
}

impl WriteOrder {
    /// Writes all pieces, in the write order. Calls `before` before each part.
    pub(super) async fn write(
        &self,
        stream: &mut SendStream,
        position: i32,
        mut pieces: &mut [Bytes],
        before: impl Fn(),
    ) -> Result<(), WriteError> {
        let turn = self.begin(position);
        while !pieces.is_empty() {
            before();
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            // A write that is cancelled while it waits has written nothing.
            let written = if turn.is_first() {
                tokio::select! {
                    biased;
                    () = changed => continue,
                    written = stream.write_chunks(pieces) => written?,
                }
            } else if tokio::time::timeout(WAIT_MAX, changed).await.is_ok() {
                continue;
            } else if let Some(written) = stream.write_chunks(pieces).now_or_never() {
                written?
            } else {
                continue;
            };
            pieces = &mut pieces[written.chunks..];
        }
        Ok(())
    }

    fn begin(&self, position: i32) -> Writing<'_> {
        let mut writing = self.writing.lock();
        let highest = writing.last_key_value().map(|(highest, _)| *highest);
        *writing.entry(position).or_default() += 1;
        if highest.is_some_and(|highest| highest < position) {
            self.changed.notify_waiters();
        }
        Writing {
            turns: self,
            position,
        }
    }
}

impl Writing<'_> {
    fn is_first(&self) -> bool {
        self.turns
            .writing
            .lock()
            .last_key_value()
            .is_none_or(|(highest, _)| *highest <= self.position)
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let mut writing = self.turns.writing.lock();
        let Some(count) = writing.get_mut(&self.position) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            let was_highest = writing
                .last_key_value()
                .is_some_and(|(highest, _)| *highest == self.position);
            writing.remove(&self.position);
            if was_highest {
                self.turns.changed.notify_waiters();
            }
        }
    }
}

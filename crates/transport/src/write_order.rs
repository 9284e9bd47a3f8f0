//! Who writes next to a QUIC line whose send buffer is full.
//!
//! quinn sends what was written in the order of the streams' places (`Inner::place_of`), but room
//! for more goes to whoever was blocked last: an answer of 40 KB could wait for all that a large
//! transfer had asked for, and the first of that for the last. So a write stands aside while one of
//! a higher place is under way. That one may wait for its own stream's window instead, which keeps
//! nobody else: then there is room, and who has stood aside for a moment finds it.

use std::collections::BTreeMap;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use parking_lot::Mutex;
use quinn::{SendStream, WriteError};
use tokio::sync::Notify;

/// How long a write stands aside before it looks whether there is room.
const ASIDE_MAX: Duration = Duration::from_millis(100);

/// The writes of one line that are under way.
#[derive(Default)]
pub(super) struct WriteOrder {
    /// How many there are of each place.
    writing: Mutex<BTreeMap<i32, usize>>,
    /// PushedManifest when the highest of them is another.
    changed: Notify,
}

/// A write that is under way.
struct Writing<'a> {
    turns: &'a WriteOrder,
    place: i32,
}

impl WriteOrder {
    /// Writes all of it, in turn.
    pub(super) async fn write(
        &self,
        stream: &mut SendStream,
        place: i32,
        mut pieces: &mut [Bytes],
    ) -> Result<(), WriteError> {
        let turn = self.begin(place);
        while !pieces.is_empty() {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            // A write that is given up while it waits has written nothing.
            let written = if turn.is_first() {
                tokio::select! {
                    biased;
                    () = changed => continue,
                    written = stream.write_chunks(pieces) => written?,
                }
            } else if tokio::time::timeout(ASIDE_MAX, changed).await.is_ok() {
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

    fn begin(&self, place: i32) -> Writing<'_> {
        let mut writing = self.writing.lock();
        let highest = writing.last_key_value().map(|(highest, _)| *highest);
        *writing.entry(place).or_default() += 1;
        if highest.is_some_and(|highest| highest < place) {
            self.changed.notify_waiters();
        }
        Writing { turns: self, place }
    }
}

impl Writing<'_> {
    fn is_first(&self) -> bool {
        self.turns
            .writing
            .lock()
            .last_key_value()
            .is_none_or(|(highest, _)| *highest <= self.place)
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let mut writing = self.turns.writing.lock();
        let Some(count) = writing.get_mut(&self.place) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            let was_highest = writing
                .last_key_value()
                .is_some_and(|(highest, _)| *highest == self.place);
            writing.remove(&self.place);
            if was_highest {
                self.turns.changed.notify_waiters();
            }
        }
    }
}

//! Who writes next to a QUIC line whose send buffer is full.
//!
//! quinn sends what was written in the order of the streams' priorities, but room for more goes to whoever was blocked last: an
//! answer of 40 KB could wait for all that a large transfer had asked for. So a write stands aside while one of a higher priority
//! waits. A stream does not wait for its own window meanwhile, for an answer fits in it.

use std::collections::BTreeMap;
use std::pin::pin;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// The writes of one line that are under way.
#[derive(Default)]
pub(super) struct Turns {
    /// How many there are of each priority.
    writing: Mutex<BTreeMap<i32, usize>>,
    changed: Notify,
}

/// A write that is under way.
struct Turn<'a> {
    turns: &'a Turns,
    priority: i32,
}

impl Turns {
    fn begin(&self, priority: i32) -> Turn<'_> {
        let mut writing = self.writing.lock();
        *writing.entry(priority).or_default() += 1;
        if writing.len() > 1 {
            self.changed.notify_waiters();
        }
        Turn { turns: self, priority }
    }

    /// Writes all of it, in turn.
    pub(super) async fn write(
        &self,
        stream: &mut quinn::SendStream,
        priority: i32,
        mut pieces: &mut [Bytes],
    ) -> Result<(), quinn::WriteError> {
        let turn = self.begin(priority);
        while !pieces.is_empty() {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            if !turn.is_first() {
                changed.await;
                continue;
            }
            // Given up, a write that waits has written nothing.
            tokio::select! {
                biased;
                written = stream.write_chunks(pieces) => pieces = &mut std::mem::take(&mut pieces)[written?.chunks..],
                () = changed => {}
            }
        }
        Ok(())
    }
}

impl Turn<'_> {
    fn is_first(&self) -> bool {
        self.turns.writing.lock().last_key_value().is_none_or(|(priority, _)| *priority <= self.priority)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut writing = self.turns.writing.lock();
        if let Some(count) = writing.get_mut(&self.priority) {
            *count -= 1;
            if *count == 0 {
                writing.remove(&self.priority);
                self.turns.changed.notify_waiters();
            }
        }
    }
}

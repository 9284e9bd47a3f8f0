//! Multiplexes streams over one ordered connection: provides the streams of QUIC over TCP + TLS,
//! where UDP is blocked.
//!
//! Windows, limits, priorities, resets and stops behave as in QUIC, so the layers above see no
//! difference. Common multiplexers were not suitable: each stream starts with a window of 256 KiB,
//! a quarter of a request, which is too small for a connection with a long round trip; a reset
//! looks like a normal end; and if a reader disappears, its writer waits forever.
//!
//! [`State`] is the core without I/O. `driver` moves bytes between it and the connection.
//! [`SendStream`] and [`RecvStream`] are the two halves of a stream. Nothing survives a crash.

#[cfg(any(test, feature = "testing"))]
mod driven;
mod driver;
mod frame;
mod state;

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, Semaphore, watch};

#[cfg(any(test, feature = "testing"))]
pub use driven::drive;
pub(crate) use state::End;
use state::State;

use super::{Ended, StreamEnd};
use base::limits::{CONNECTION_FIT_EVERY, CONNECTION_STREAMS_MAX, MUX_FRAME_BYTES_MAX};

struct MuxShared {
    state: Mutex<State>,
    to_write: Notify,
    to_read: Notify,
    to_accept: Notify,
    /// Slots for streams that this end opens.
    slots: Semaphore,
    ended: watch::Sender<Option<Ended>>,
    /// Whether the close message gets little time.
    sever: AtomicBool,
}

impl MuxShared {
    fn with<R>(&self, work: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.state.lock();
        let result = work(&mut state);
        let effects = std::mem::take(&mut state.effects);
        drop(state);
        if effects.write {
            self.to_write.notify_one();
        }
        if effects.read {
            self.to_read.notify_one();
        }
        for _ in 0..effects.accepted {
            self.to_accept.notify_one();
        }
        if effects.slots_freed > 0 {
            self.slots.add_permits(effects.slots_freed);
        }
        result
    }

    fn end(&self, ended: Ended) {
        if self.with(|state| state.end(ended.clone())) {
            self.ended.send_replace(Some(ended));
            self.slots.close();
            self.to_accept.notify_waiters();
        }
    }
}

/// Closes the connection when the last handle of it and of its streams is dropped.
struct Handle(Arc<MuxShared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0
            .end(Ended::by_us(super::CLOSE_DONE, "no longer used"));
    }
}

/// One multiplexed connection.
#[derive(Clone)]
pub(crate) struct Mux {
    handle: Arc<Handle>,
}

impl Mux {
    /// Starts the driver. `rtt` is a first estimate from the handshake; `guard` is dropped when the
    /// connection ends.
    pub(crate) fn start<IO>(io: IO, end: End, rtt: Duration, guard: impl Send + 'static) -> Self
    where
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let shared = Arc::new(MuxShared {
            state: Mutex::new(State::new(end, rtt, Instant::now())),
            to_write: Notify::new(),
            to_read: Notify::new(),
            to_accept: Notify::new(),
            slots: Semaphore::new(CONNECTION_STREAMS_MAX as usize),
            ended: watch::Sender::new(None),
            sever: AtomicBool::new(false),
        });
        let driver = shared.clone();
        tokio::spawn(async move {
            driver::run(io, &driver).await;
            drop(guard);
        });
        Self {
            handle: Arc::new(Handle(shared)),
        }
    }

    /// Sets the number of bytes that the connection may queue for sending.
    pub(crate) fn set_queue_limit(&self, bytes: u64) {
        self.shared().with(|state| state.set_queue_limit(bytes));
    }

    /// Adjusts the number of queued bytes to `room` periodically, until the end of the connection.
    pub(crate) fn adjust_limit(&self, room: impl Fn() -> u64 + Send + 'static) {
        let shared = self.handle.0.clone();
        tokio::spawn(async move {
            let mut ended = shared.ended.subscribe();
            loop {
                let bytes = room();
                shared.with(|state| state.set_queue_limit(bytes));
                if tokio::time::timeout(CONNECTION_FIT_EVERY, ended.wait_for(Option::is_some))
                    .await
                    .is_ok()
                {
                    break;
                }
            }
        });
    }

    /// The limit of the unread data of this connection. It does not keep the connection open.
    pub(crate) fn unread_limit(&self) -> UnreadLimit {
        UnreadLimit(self.handle.0.clone())
    }

    fn shared(&self) -> &MuxShared {
        &self.handle.0
    }

    /// Opens a stream. Waits for a slot if [`CONNECTION_STREAMS_MAX`] are open.
    pub(crate) async fn open(&self, priority: i32) -> Result<(SendStream, RecvStream), StreamEnd> {
        let slot = self
            .shared()
            .slots
            .acquire()
            .await
            .map_err(|_| StreamEnd::LineGone)?;
        slot.forget();
        match self.shared().with(|state| state.open(priority)) {
            Some(id) => Ok(self.halves(id)),
            None => {
                self.shared().end(Ended::lost(
                    "all stream ids are used; a new connection is needed",
                ));
                Err(StreamEnd::LineGone)
            }
        }
    }

    /// The next stream that the peer opened; `None` after the end of the connection.
    pub(crate) async fn accept(&self) -> Option<(SendStream, RecvStream)> {
        let shared = self.shared();
        loop {
            let mut woken = std::pin::pin!(shared.to_accept.notified());
            // Register before checking, so that an event between the two is not missed.
            woken.as_mut().enable();
            let (id, ended) = shared.with(|state| (state.accept(), state.ended.is_some()));
            match id {
                Some(id) => return Some(self.halves(id)),
                None if ended => return None,
                None => woken.await,
            }
        }
    }

    fn halves(&self, id: u32) -> (SendStream, RecvStream) {
        (
            SendStream {
                mux: self.clone(),
                id,
                is_over: false,
            },
            RecvStream {
                mux: self.clone(),
                id,
            },
        )
    }

    /// Closes the connection. `soon`: the close message gets little time.
    pub(crate) fn close(&self, code: u32, reason: &str, soon: bool) {
        self.shared().sever.fetch_or(soon, Ordering::Relaxed);
        self.shared().end(Ended::by_us(code, reason));
    }

    pub(crate) async fn closed(&self) -> Ended {
        let mut ended = self.shared().ended.subscribe();
        match ended.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(ended)) => ended.clone(),
            _ => Ended::lost("its driver ended"),
        }
    }

    pub(crate) fn ended(&self) -> Option<Ended> {
        self.shared().ended.borrow().clone()
    }

    pub(crate) fn rtt(&self) -> Duration {
        self.shared().state.lock().rtt()
    }
}

/// Adjusts the number of unread bytes from which a connection reads nothing more from its socket.
pub(crate) struct UnreadLimit(Arc<MuxShared>);

impl UnreadLimit {
    pub(crate) fn set(&self, bytes: u64) {
        self.0.with(|state| state.set_unread_limit(bytes));
    }
}

/// The writing half of a stream. Dropping it before `finish` resets the stream.
pub(crate) struct SendStream {
    mux: Mux,
    id: u32,
    is_over: bool,
}

impl SendStream {
    /// Queues the bytes when there is space. If this is cancelled, a part of them may have been
    /// queued, as on QUIC.
    pub(crate) async fn write_bytes(&mut self, mut data: Bytes) -> Result<(), StreamEnd> {
        poll_fn(|cx| {
            self.mux
                .shared()
                .with(|state| state.poll_write(self.id, &mut data, cx.waker()))
        })
        .await
    }

    pub(crate) async fn write_many(&mut self, pieces: &mut [Bytes]) -> Result<(), StreamEnd> {
        for piece in pieces {
            self.write_bytes(std::mem::take(piece)).await?;
        }
        Ok(())
    }

    pub(crate) async fn write_all(&mut self, data: &[u8]) -> Result<(), StreamEnd> {
        for piece in data.chunks(MUX_FRAME_BYTES_MAX) {
            self.write_bytes(Bytes::copy_from_slice(piece)).await?;
        }
        Ok(())
    }

    pub(crate) fn finish(&mut self) -> Result<(), StreamEnd> {
        self.is_over = true;
        self.mux.shared().with(|state| state.finish(self.id))
    }

    pub(crate) fn reset(&mut self) {
        self.is_over = true;
        self.mux.shared().with(|state| state.reset(self.id));
    }

    pub(crate) fn set_priority(&self, priority: i32) {
        self.mux
            .shared()
            .with(|state| state.set_priority(self.id, priority));
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        if !self.is_over {
            self.reset();
        }
    }
}

/// The reading half of a stream. Dropping it before the end asks the peer to stop.
pub(crate) struct RecvStream {
    mux: Mux,
    id: u32,
}

impl RecvStream {
    /// The next received bytes, at most `max`; `None` at the end.
    pub(crate) async fn read_chunk(&mut self, max: usize) -> Result<Option<Bytes>, StreamEnd> {
        poll_fn(|cx| {
            self.mux
                .shared()
                .with(|state| state.poll_read(self.id, max, cx.waker()))
        })
        .await
    }

    pub(crate) fn stop(&mut self) {
        self.mux.shared().with(|state| state.stop(self.id));
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        self.mux.shared().with(|state| state.reader_gone(self.id));
    }
}

#[cfg(test)]
mod tests;
